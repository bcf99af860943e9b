"""A step that a CUDA graph captures: what has to be there before, and what no graph can hold.

A replay runs kernels and no Python: it reads and writes the memory that the capture saw, and numbers that were on the
host stay as they were.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.distributed.collectives import RanksAround

Labelled = Iterable[tuple[Mapping[str, Any], Tensor, str]]
"""Parameters, each with its group before it and its name for error messages behind."""

UNCAPTURED: Final = "a CUDA graph cannot hold this step of Dion2: "


def is_capturing() -> bool:
    """Return whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(
    labelled: Labelled,
    state: Mapping[Tensor, object],
    ranks: RanksAround,
    *,
    is_agreed: bool,
    is_observed: bool,
    is_offloaded: bool,
    share_replicas: bool | None,
) -> None:
    """Raise an error about what a CUDA graph cannot hold.

    Raises:
        RuntimeError: It says what, and what to do.
    """
    if is_observed:
        raise RuntimeError(
            f"{UNCAPTURED}statistics are collected by Python, which no replay runs; detach the SelectionTracker, or "
            "leave out the callback that has it"
        )
    if is_offloaded:
        raise RuntimeError(f"{UNCAPTURED}offload='cpu' brings the state from the host and back; set offload to None")
    for group, parameter, label in labelled:
        algorithm = ALGORITHMS[group["algorithm"]]
        if not group["capturable"]:
            raise RuntimeError(f"{UNCAPTURED}group {group['name']!r} is not capturable; pass capturable=True")
        if group["check_finite"] is True:
            raise RuntimeError(
                f"{UNCAPTURED}check_finite=True of group {group['name']!r} waits for the device; "
                'check_finite="skip" decides there'
            )
        if parameter.requires_grad and not state.get(parameter):
            raise RuntimeError(f"{UNCAPTURED}{label} has no state yet; take a step before the capture")
        why = algorithm.why_not_captured(group)
        if why is not None:
            raise RuntimeError(f"{UNCAPTURED}group {group['name']!r}: {why}")
        mesh = getattr(parameter, "device_mesh", None)
        if not ranks.groups(mesh):
            continue
        if mesh is not None:
            raise RuntimeError(
                f"{UNCAPTURED}{label} is a DTensor on several ranks, whose messages begin with numbers of the host, "
                "and whose sizes may depend on the selection; capture the model alone, and step outside"
            )
        if (algorithm.needs_matrices and share_replicas is not False) or group["check_finite"] == "skip":
            raise RuntimeError(
                f"{UNCAPTURED}{label} has replicas, whose ranks talk to each other in it; pass share_replicas=False "
                "and check_finite=False"
            )
    if not is_agreed:
        raise RuntimeError(f"{UNCAPTURED}groups are new, or were loaded; take a step before the capture")
