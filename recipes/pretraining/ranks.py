"""Devices, ranks and precision: what the launcher and the settings ask for, and what of a batch is each rank's."""

import os

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType

from recipes.inputs import InputError
from recipes.pretraining.settings import Settings


def make_accelerator(settings: Settings) -> Accelerator:
    """Returns what knows about devices, ranks and precision: as the launcher says, and one process without it.

    Raises:
        InputError: If the launcher or the settings ask for something that is not there.
    """
    missing = set(settings.log_with) - {str(each) for each in get_available_trackers()}
    if missing:
        raise InputError(f"--log_with {', '.join(sorted(missing))}: not installed. Install it, or leave it out.")
    try:
        accelerator = Accelerator(
            cpu=not has_accelerator(),
            mixed_precision=precision(settings),
            log_with=[*settings.log_with] or None,
            project_dir=settings.output,
            step_scheduler_with_optimizer=False,  # or it would take a step for each rank
        )
    except ValueError as error:
        raise InputError(f"--precision {settings.precision}, or the launch configuration: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU. Give bf16 or no.")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise InputError(
            "The launch configuration asks for FSDP, which Accelerate turns on for several GPUs only; it found "
            f"{accelerator.distributed_type.value}. Use recipes/launch/gpu-1.yaml or cpu.yaml."
        )
    return accelerator


def tensor_parallel_size(accelerator: Accelerator) -> int:
    """Returns among how many ranks each layer is divided, as the launch configuration says.

    Raises:
        InputError: If it asks for more than this recipe does.
    """
    asked = accelerator.parallelism_config
    if asked is None:
        return 1
    if asked.cp_enabled or asked.sp_enabled:
        raise InputError("The launch configuration asks for context or sequence parallelism, which is not supported.")
    if asked.tp_enabled and accelerator.is_fsdp2:
        raise InputError(
            "The launch configuration asks for tensor parallelism under Accelerate's FSDP. Let distributed_type be "
            "MULTI_GPU, as in recipes/launch/fsdp2-tp.yaml."
        )
    size: int = asked.tp_size
    return size


def has_accelerator() -> bool:
    """Says whether there is a device to train on besides the CPU. Apple's has no float64 to sum losses in."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type != "mps"


def precision(settings: Settings) -> str | None:
    """Returns what to compute in; None is what the launcher says."""
    if settings.precision != "auto":
        return settings.precision
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def share_of_batch(settings: Settings, ranks: int) -> tuple[int, int]:
    """Returns the windows that a rank reads at once, and how many times it does in a step.

    Raises:
        InputError: If the batch cannot be divided so.
    """
    size = settings.micro_batch_size or max(1, settings.batch_size // ranks)
    if settings.batch_size % (ranks * size):
        raise InputError(
            f"--batch_size {settings.batch_size} cannot be divided over {ranks} ranks that read {size} windows at "
            f"once: give a multiple of {ranks * size}, or another --micro_batch_size."
        )
    return size, settings.batch_size // (ranks * size)
