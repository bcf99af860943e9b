"""Everything a run can be told, as one dataclass: its docstring is the command's help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recipes.inputs import InputError, check_below_one, check_positive

OFFLINE_DATASET = "digits"
SMALL_VIT = "small-vit"
COUNTS = (
    "held_out_rows",
    "steps",
    "batch_size",
    "accumulation",
    "repeats",
    "log_every",
    "validate_every",
    "checkpoint_every",
)


@dataclass(frozen=True)
class Settings:
    """Train a Vision Transformer to classify images with the Hugging Face Trainer and Dion2, next to its AdamW control.

    Without arguments it trains a small one from scratch to read handwritten digits; that needs neither network nor GPU.

    Attributes:
        model: "small-vit" (0.2M parameters, trained from nothing), a name on the hub, or a folder. Pretrained weights
            come with their image processor and get a new head for the classes.
        dataset: "digits" (8 x 8 grey images, from scikit-learn), a name on the hub, or a folder of images: one folder
            for each class, or such folders in train/ and test/.
        subset: Configuration of a hub dataset that has several.
        image_column: Column that holds the images.
        label_column: Column that holds the labels: class numbers or names.
        train_split: Split to train on.
        held_out: Split to measure on. By default `held_out_rows` rows of the training data.
        held_out_rows: Rows to hold out where `held_out` names none.
        shift: Farthest random shift of a training image, as a share of its width and height. What moves in is black.
        flip: Whether to mirror every other training image. Digits and letters must not be.
        algorithm: What trains the matrices.
        lr: Peak learning rate of the matrices.
        adamw_lr: Peak learning rate of all other parameters, in the control too; null is `lr`.
        fraction: Share of each matrix that a step of Dion2 updates.
        momentum: Momentum of the matrices. 0.8 suits runs of some hundred steps, 0.95 long ones.
        beta1: First beta of AdamW, for all other parameters.
        weight_decay: Decoupled weight decay; biases and norms get none.
        control: Whether to train with AdamW too, with the same data, order and initial weights.
        control_lr: Peak learning rate of the matrices in the control.
        control_beta1: First beta of AdamW in the control, for all parameters.
        steps: Optimizer steps of each run.
        batch_size: Images in a step, on all devices together.
        accumulation: Parts that a device takes its share of a step in, one after the other, to save memory.
        gradient_checkpointing: Whether to compute activations twice rather than keep them, to save memory.
        warmup: Share of the steps in which the learning rate rises; afterwards it follows a half cosine down to zero.
        seed: Decides the initial weights, the order of the data and the shifts. The held-out rows do not depend on it.
        repeats: Runs of each optimizer, with seeds `seed`, `seed` + 1, ...
        cpu: Whether to train on the CPU where there is a CUDA GPU.
        precision: "auto" is bf16 autocast on GPUs that have it and float32 elsewhere.
        workers: Processes of each device that read and prepare images; 0 does it between the steps.
        output: Folder for checkpoints, metrics and trained models.
        log_every: Steps between two lines of the log: loss, learning rate, images a second.
        report_to: Where the Trainer sends the log too, such as [tensorboard].
        validate_every: Steps between two validations; one always comes at the end.
        checkpoint_every: Steps between two checkpoints; one is always written at the end.
        resume: Whether to go on from the checkpoints in `output`, with all other arguments as in the first call.
    """

    model: str = SMALL_VIT
    dataset: str = OFFLINE_DATASET
    subset: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    held_out: str | None = None
    held_out_rows: int = 397
    shift: float = 0.125
    flip: bool = False
    algorithm: Literal["dion2", "muon", "adamw"] = "dion2"
    lr: float = 8e-3
    adamw_lr: float | None = 2e-3
    fraction: float = 0.25
    momentum: float = 0.8
    beta1: float = 0.9
    weight_decay: float = 0.01
    control: bool = True
    control_lr: float = 2e-3
    control_beta1: float = 0.9
    steps: int = 300
    batch_size: int = 64
    accumulation: int = 1
    gradient_checkpointing: bool = False
    warmup: float = 0.1
    seed: int = 0
    repeats: int = 1
    cpu: bool = False
    precision: Literal["auto", "float32", "bf16"] = "auto"
    workers: int = 0
    output: Path = Path("runs/image_classification")
    log_every: int = 10
    report_to: list[str] = field(default_factory=list)
    validate_every: int = 100
    checkpoint_every: int = 500
    resume: bool = False

    def __post_init__(self) -> None:
        check_positive(self, *COUNTS)
        check_below_one(self, "warmup", "beta1", "control_beta1", "shift")
        if self.workers < 0:
            raise InputError(f"--workers has to be 0 or more, got {self.workers}.")
