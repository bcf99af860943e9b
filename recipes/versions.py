"""What differs between the versions of transformers that the recipes support, each with the version that brought it."""

from dataclasses import fields
from typing import Any, Final

from transformers import PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig

# 5.23 renamed it; the old name is to go in 6.
CHECKPOINTING: Final = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
"""What TrainingArguments call computing activations again."""

# 5.23: replicas of shards, beside shards and tensor parallelism.
DIVIDES_MODELS: Final = "dp_replicate_size" in {field.name for field in fields(DistributedConfig)}
"""Whether transformers divides a model among ranks in every way that the recipes ask for."""


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have a model keep fewer activations and compute them again.

    Raises:
        ValueError: If the model cannot.
    """
    getattr(model, f"{CHECKPOINTING}_enable")()


def checkpoints_activations(model: Any) -> bool:
    """Say whether a model does so."""
    return bool(getattr(model, f"is_{CHECKPOINTING}"))
