"""A step that a CUDA graph captures: what has to be there before, and what no graph can hold.

A replay runs kernels and no Python: it reads and writes the memory that the capture saw, and numbers that were on the
host stay as they were.
"""

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.algorithms.algorithm import Algorithm, StateTensor
from dion2_lightning.parameter_groups import labelled_parameters

UNCAPTURED: Final = "a CUDA graph cannot hold this step of Dion2: "


def refuse_capture(optimizer: Any) -> None:
    """Raise an error about what a CUDA graph cannot hold of a step of an optimizer.

    Raises:
        RuntimeError: It says what, and what to do.
    """
    ranks, state, left = optimizer._ranks(), optimizer.state, optimizer._left.values()
    counts_skipped_steps = any(optimizer._skipped_steps is each for each in left)
    if optimizer.observer is not None:
        raise RuntimeError(
            f"{UNCAPTURED}statistics are collected by Python, which no replay runs; detach the SelectionTracker, or "
            "leave out the callback that has it"
        )
    if optimizer.offload is not None:
        raise RuntimeError(f"{UNCAPTURED}offload='cpu' brings the state from the host and back; set offload to None")
    if optimizer.kernels == "triton":
        raise RuntimeError(
            f"{UNCAPTURED}kernels='triton' reads tables that are gone by a replay; pass kernels='torch' or 'auto'"
        )
    for group, parameter, label in labelled_parameters(optimizer.param_groups):
        algorithm = ALGORITHMS[group["algorithm"]]
        if not group["capturable"]:
            raise RuntimeError(f"{UNCAPTURED}group {group['name']!r} is not capturable; pass capturable=True")
        if group["check_finite"] is True:
            raise RuntimeError(
                f"{UNCAPTURED}check_finite=True of group {group['name']!r} waits for the device; "
                'check_finite="skip" decides there'
            )
        if parameter.requires_grad:
            if not state.get(parameter):
                raise RuntimeError(f"{UNCAPTURED}{label} has no state yet; take a step before the capture")
            if _changes(state[parameter], optimizer._state_of(parameter, group), algorithm):
                raise RuntimeError(f"{UNCAPTURED}state of {label} changes in this step; take a step before the capture")
        if group["check_finite"] == "skip" and not counts_skipped_steps:
            raise RuntimeError(
                f"{UNCAPTURED}it is the first in which group {group['name']!r} skips bad gradients, and would count "
                "them anew in every replay; take a step before the capture"
            )
        why = algorithm.why_not_captured(group)
        if why is not None:
            raise RuntimeError(f"{UNCAPTURED}group {group['name']!r}: {why}")
        mesh = getattr(parameter, "device_mesh", None)
        if not ranks.groups(mesh):
            continue
        if optimizer.is_compressing:
            raise RuntimeError(
                f"{UNCAPTURED}with sync='compressed' the ranks that hold replicas of {label} talk to each other in it; "
                "capture the model alone, and step outside"
            )
        if mesh is not None:
            raise RuntimeError(
                f"{UNCAPTURED}{label} is a DTensor on several ranks, whose messages begin with numbers of the host, "
                "and whose sizes may depend on the selection; capture the model alone, and step outside"
            )
        causes = []
        if algorithm.needs_matrices and optimizer.share_replicas is not False:
            causes.append("share_replicas=False")
        if group["check_finite"] == "skip":
            causes.append("check_finite=False")
        if causes:
            raise RuntimeError(
                f"{UNCAPTURED}{label} has replicas, whose ranks talk to each other in it; pass {' and '.join(causes)}"
            )
    if not optimizer._is_agreed:
        raise RuntimeError(f"{UNCAPTURED}groups are new, or were loaded; take a step before the capture")


def _changes(state: Mapping[str, Tensor], expected: Mapping[str, StateTensor], algorithm: Algorithm) -> bool:
    """Return whether a step makes, replaces or removes entries of a parameter's state."""
    return any(map(algorithm.depends_on_settings, state.keys() - expected.keys())) or any(
        entry not in state or state[entry].device != like.device or state[entry].dtype != like.dtype
        for entry, like in expected.items()
    )
