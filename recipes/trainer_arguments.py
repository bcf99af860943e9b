"""The optimizer on the command line of a Trainer, beside TrainingArguments, which have the learning rate."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from dion2_lightning import Dion2Factory


@dataclass
class OptimizerArguments:
    """What Dion2 needs and TrainingArguments do not have."""

    algorithm: Literal["dion2", "dion3", "dion", "muon", "normuon", "adamw"] = field(
        default="dion2", metadata={"help": "Trains the matrices."}
    )
    fraction: float = field(default=0.25, metadata={"help": "Share of each matrix that a step of Dion2 updates."})
    momentum: float = field(default=0.95, metadata={"help": "Of the matrices; runs of some hundred steps want less."})
    adamw_lr: float | None = field(default=None, metadata={"help": "Learning rate of all other parameters."})
    lora: Literal["adamw", "B", "both"] = field(default="both", metadata={"help": "LoRA factors that Dion2 trains."})

    def factory(self, args: TrainingArguments) -> tuple[type[Dion2Factory], dict[str, Any]]:
        """Return what a Trainer takes as ``optimizer_cls_and_kwargs``."""
        return Dion2Factory.from_arguments(args, **asdict(self))
