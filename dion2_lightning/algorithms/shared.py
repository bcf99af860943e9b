"""What the steps on matrices that several ranks share have in common."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import Tensor

from dion2_lightning.algorithms.matrix_update import MatrixUpdate
from dion2_lightning.distributed.collectives import refuse_disagreement
from dion2_lightning.kernels.precision import has_float64
from dion2_lightning.lists import group_by
from dion2_lightning.matrices.layout import Replicas

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup

U = TypeVar("U", bound=MatrixUpdate)

MORE_THAN_RANKS: Final = 2**20
"""Counts of ranks are under it. With numbers of parts up to 2^16 and 2^17 ranks, sums are exact in float64."""


def split_by_ranks(updates: Sequence[U], share_replicas: bool | None) -> tuple[list[U], list[list[U]]]:
    """Return the updates of this rank alone, and those it shares: lists that the same ranks share in the same way."""
    groups_of = {update: update.sharing(share_replicas) for update in updates}
    shared = [update for update in updates if any(groups_of[update])]
    for update in shared:
        device = update.device
        if not has_float64(device):
            ranks = math.prod(group.size() for group in groups_of[update] if group is not None)
            raise ValueError(
                f"{update.label} is on {device.type!r} and shared by {ranks} ranks, which add up norms in float64, and "
                "there is none on this device; train in one process, or on CUDA or the CPU"
            )
    unshared = [update for update in updates if not any(groups_of[update])]
    return unshared, list(group_by(shared, lambda each: (*groups_of[each], each.device)).values())


def nonzero_gradients(updates: Sequence[U]) -> dict[U, Tensor]:
    """Return what ranks have to add up to know which matrices are idle: float64, of those updates that ask for it."""
    return {update: update.nonzero_gradients().double() for update in updates if update.leaves_idle}


def gradient_counts(updates: Sequence[U], replicas: Replicas | None) -> list[int]:
    """Return a number for each update; their sums over all ranks tell :func:`checked` which gradients there are.

    Each is 1 where this rank has the gradient, or a part of it. With replicas, a multiple of :data:`MORE_THAN_RANKS` is
    added: the number of the part, in the first replica against those in all others. Where all replicas have the same
    parts these add up to 0. If two parts have the same number, one in 2^16, some differences are not seen.
    """
    sign = 0 if replicas is None else 1 if replicas.number else 1 - replicas.count
    return [update.has_gradient * (1 + sign * update.layout.own_part * MORE_THAN_RANKS) for update in updates]


def reading_is_free(device: torch.device) -> bool:
    """Return whether the host need not wait to read what is on a device."""
    return device.type == "cpu"


def checked(
    updates: list[U],
    header: Tensor,
    on_host: Tensor | None,
    *,
    everyone: "Sequence[ProcessGroup]",
    checksum: int,
    replicas: Replicas | None,
) -> list[U]:
    """Return the updates whose gradient some rank has; refuse ranks that differ in settings or gradients.

    Args:
        updates: The same ones in the same order on each rank.
        header: What :func:`~dion2_lightning.distributed.collectives.sum_over_ranks` returned of the checksum and of
            :func:`gradient_counts`.
        on_host: The same, if the host has read it; else all updates are returned, and the device checks the gradients.
        everyone: The groups it was summed over.
        checksum: This rank's.
        replicas: Those that have to have the same gradients.
    """
    refuse_disagreement(header if on_host is None else on_host, everyone, checksum)
    if on_host is not None:
        return _with_gradient(updates, on_host, replicas)
    if replicas is not None:
        is_complete = (header.narrow(0, 1, len(header) - 1) // MORE_THAN_RANKS == 0).all()
        torch._assert_async(is_complete, "some replicas lack gradients that others have")
    return updates


def _with_gradient(updates: Sequence[U], header: Tensor, replicas: Replicas | None) -> list[U]:
    """Return the updates whose gradient some rank has; refuse one that not every replica has: momenta would differ."""
    present = []
    for update, number in zip(updates, header[1:].tolist(), strict=True):
        difference, count = divmod(number, MORE_THAN_RANKS)
        if replicas is not None and difference:
            raise RuntimeError(
                f"{update.label} has a gradient on {count} of {replicas.everyone.size()} ranks, so not in every "
                "replica; average the gradients over the replicas before step(), with zeros where there is none"
            )
        if count:
            present.append(update)
    return present
