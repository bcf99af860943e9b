"""Everything a run can be told, as one dataclass: its docstring is the command's help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dion2_lightning import OptimizerSettings
from recipes.inputs import InputError, check_positive

SMALL_MODEL = "small"
BYTES = "bytes"
OFFLINE_DATASET = "python"
COUNTS = (
    "hidden_size",
    "layers",
    "heads",
    "length",
    "held_out_windows",
    "tokenizing_processes",
    "steps",
    "batch_size",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
)

Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]


def _optimizer() -> OptimizerSettings:
    return OptimizerSettings(lr=4.5e-3, adamw_lr=6.7e-3, momentum=0.4, weight_decay=0.1, betas=(0.9, 0.95))


@dataclass(frozen=True)
class Settings:
    """Pretrain a causal language model from scratch with Dion2 and Accelerate.

    Without arguments it trains a small Llama on the bytes of Python's manual and docstrings; that needs neither network
    nor GPU. Start it with python, accelerate launch or torchrun.

    Attributes:
        model: "small", a Llama of the three sizes below; or a name on the hub or a folder, whose configuration is taken
            and whose weights are not.
        hidden_size: Width of the small model.
        layers: Decoder layers of the small model.
        heads: Attention heads of the small model, in each layer.
        tokenizer: "bytes" (no files), a name on the hub, or a folder.
        dataset: "python" (read from the running Python), a name on the hub, or a .txt file with a blank line between
            documents, or a .json, .jsonl or .parquet file.
        subset: Configuration of a hub dataset that has several.
        text_column: Column that holds the documents.
        train_split: Split of a hub dataset to train on.
        held_out: Split of a hub dataset, or file, to measure on. By default `held_out_share` of the training data.
        held_out_share: Share of the data to hold out where `held_out` names none.
        held_out_windows: Windows to measure on, at most.
        length: Tokens of a window.
        tokenizing_processes: Processes that tokenize a dataset from the hub or a file; the result is kept on disk.
        optimizer: What trains the matrices, and everything else.
        steps: Optimizer steps.
        batch_size: Windows in a step, on all ranks together: the training is the same however many there are.
        micro_batch_size: Windows that a rank reads at once; gradients accumulate up to the batch size. By default all
            of the rank's share.
        warmup: Share of the steps in which the learning rate rises.
        decay: Share of the steps, at the end, in which it falls to zero; in between it is constant.
        max_gradient_norm: Gradients are scaled down to this norm.
        precision: "auto" is what the launcher says; without one, bf16 on GPUs that have it.
        gradient_checkpointing: Whether to compute activations again in the backward pass, which saves memory.
        compile: Whether to compile the decoder layers.
        seed: Decides the initial weights and the order of the data. The held-out windows do not depend on it.
        output: Folder for checkpoints, figures and the model. Several machines have to share it.
        log_every: Steps between two lines of figures.
        log_with: Trackers that get the figures too, besides metrics.jsonl.
        validate_every: Steps between two measurements on the held-out windows; one always comes at the end.
        checkpoint_every: Steps between two checkpoints; one is always written at the end.
        keep_checkpoints: Checkpoints that are kept: the newest.
        resume: Whether to go on from the newest checkpoint in `output`. More steps may be given than in the first call.
    """

    model: str = SMALL_MODEL
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    tokenizer: str = BYTES
    dataset: str = OFFLINE_DATASET
    subset: str | None = None
    text_column: str = "text"
    train_split: str = "train"
    held_out: str | None = None
    held_out_share: float = 0.05
    held_out_windows: int = 128
    length: int = 128
    tokenizing_processes: int = 1
    optimizer: OptimizerSettings = field(default_factory=_optimizer)
    steps: int = 400
    batch_size: int = 16
    micro_batch_size: int | None = None
    warmup: float = 0.1
    decay: float = 0.5
    max_gradient_norm: float = 1.0
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    output: Path = Path("runs/pretraining")
    log_every: int = 10
    log_with: list[Tracker] = field(default_factory=list)
    validate_every: int = 100
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        check_positive(self, *COUNTS, *(["micro_batch_size"] if self.micro_batch_size is not None else []))
        if not 0 < self.held_out_share < 1:
            raise InputError(f"--held_out_share is a share of the data, between 0 and 1, got {self.held_out_share}.")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise InputError(
                f"--warmup and --decay are shares of the steps, 1 at most together, got {self.warmup} and {self.decay}."
            )
        if self.max_gradient_norm <= 0:
            raise InputError(f"--max_gradient_norm has to be over 0, got {self.max_gradient_norm}.")
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise InputError(
                f"--hidden_size {self.hidden_size} has to be a multiple of twice --heads {self.heads}: every head gets "
                "an even width."
            )
