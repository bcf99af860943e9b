"""The Dion2 update (arXiv 2512.16928), one function on one page.

    M    <- M + G                              accumulate
    K    <- the k slices of M with the largest L1 norms
    S    <- M[K]
    M[K] <- mu M[K]                            only what is selected decays
    O    <- U V^T of S = U Sigma V^T           orthonormalize
    X    <- (1 - lr weight_decay) X            every entry
    X[K] <- X[K] - lr scale O                  only what is selected moves

A slice is a row or a column of the matrix, along its shorter axis unless told otherwise. Here every matrix is whole on
this rank; sharing.py goes down the same page for matrices that several ranks share.
"""

import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor

from dion2_lightning.algorithms.learning_rates import update_scale
from dion2_lightning.kernels.orthonormalize import default_dtype, orthonormalize
from dion2_lightning.kernels.selection import Selection, add_, decay_, gather, largest, selected_count, slice_sums
from dion2_lightning.matrices.layout import (
    Layout,
    Layouts,
    Matrices,
    Spans,
    alike,
    layout_of,
    local,
    local_gradient,
    placed_like_stack,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BATCH_ELEMENTS: Final = 2**24
"""Submatrix entries that are orthonormalized at once: enough to fill a GPU, few enough to bound the working memory."""

Orthonormalize = Callable[[Tensor], Tensor]


class Observer(Protocol):
    """What looks on while a step is taken; see :class:`~dion2_lightning.monitoring.tracker.SelectionTracker`.

    Attributes:
        wants_results: Whether to call :meth:`orthonormalized` and :meth:`moved` in this step.
    """

    wants_results: bool

    def begin_step(self) -> None:
        """Come before a step."""

    def end_step(self) -> None:
        """Come after a step that did not fail."""

    def selected(self, parameter: Tensor, indices: Tensor, norms: Tensor) -> None:
        """Take the selected slices (count, k) and the norms of all slices (count, n), the same on every rank."""

    def orthonormalized(self, parameter: Tensor, result: Tensor) -> None:
        """Take the orthonormal submatrices (count, k, m) of some matrices, whole, on the rank that made them."""

    def moved(self, parameter: Tensor, change: Tensor) -> None:
        """Take what is added to this rank's part of some selected slices."""


@dataclass(frozen=True, eq=False)
class MatrixUpdate:
    """One parameter's part in a step: its matrices as (count, n, m) views, n slices of m entries, and its numbers.

    Attributes:
        parameter: The parameter itself.
        what: How to call it in an error.
        matrices: What its matrices are, on all ranks together.
        layout: Who holds which part of them.
        weight: X, this rank's part, updated in place.
        gradient: G, this rank's part; None where only other ranks have it.
        momentum: M, this rank's part, updated in place.
        axis: What a slice is: 0 output, 1 input.
        k: Slices to select in each matrix.
        momentum_factor: mu.
        step_size: lr times the scale rule.
        shrink: 1 - lr * weight_decay.
        dtype: Precision of the orthonormalization.
        observer: What looks on.
    """

    parameter: Tensor
    what: str
    matrices: Matrices
    layout: Layout
    weight: Tensor
    gradient: Tensor | None
    momentum: Tensor
    axis: int
    k: int
    momentum_factor: float
    step_size: float
    shrink: float
    dtype: torch.dtype
    observer: Observer | None

    @classmethod
    def of(
        cls,
        parameter: Tensor,
        what: str,
        momentum: Tensor,
        group: Mapping[str, Any],
        process_group: "ProcessGroup | None",
        observer: Observer | None = None,
        layouts: Layouts | None = None,
    ) -> "MatrixUpdate":
        """Read a parameter, its momentum, its group and its layout, as they are now.

        Args:
            parameter: With or without a gradient.
            what: How to call it in an error.
            momentum: Placed like the parameter.
            group: Its settings.
            process_group: The ranks that hold replicas of plain parameters.
            observer: What looks on (default: None).
            layouts: What was read in this step (default: None).
        """
        matrices = Matrices.of(parameter.shape, batched=group["batched"], transposed=group["transposed"])
        axis = matrices.selection_axis(group["select"])
        slices = matrices.shape[axis]
        k = selected_count(slices, group["fraction"])
        scale = update_scale(matrices.shape, slices, k, group["adjust_lr_fn"], group["scale_lr_by_fraction"])
        asked = group["orthonormalize_dtype"]
        layout = layout_of(parameter, what, batched=group["batched"], process_group=process_group, known=layouts)
        gradient = local_gradient(parameter)
        return cls(
            parameter=parameter,
            what=what,
            matrices=matrices,
            layout=layout,
            weight=matrices.slices(local(parameter), axis),
            gradient=None if gradient is None else matrices.slices(gradient, axis),
            momentum=matrices.slices(local(momentum), axis),
            axis=axis,
            k=k,
            momentum_factor=group["momentum"],
            step_size=group["lr"] * scale,
            shrink=1.0 - group["lr"] * group["weight_decay"],
            dtype=default_dtype(parameter.device) if asked is None else getattr(torch, asked),
            observer=observer,
        )

    @property
    def slices(self) -> int:
        """Slices of each whole matrix, n."""
        return self.matrices.shape[self.axis]

    @property
    def entries(self) -> int:
        """Entries of each whole slice, m."""
        return self.matrices.shape[1 - self.axis]

    @property
    def held(self) -> Spans:
        """By rank of the layout's group: which slices it touches. Without a group this rank is the only one."""
        if self.layout.group is None:
            return Spans([(0, self.slices)])
        return self.layout.rows if self.matrices.slices_are_rows(self.axis) else self.layout.columns

    @property
    def columns(self) -> Spans:
        """By rank of the layout's group: which entries of the slices it holds."""
        if self.layout.group is None:
            return Spans([(0, self.entries)])
        return self.layout.columns if self.matrices.slices_are_rows(self.axis) else self.layout.rows

    @property
    def is_split(self) -> bool:
        """Whether ranks hold different slices: how many of the selected ones each holds depends on the selection."""
        return not self.held.are_equal

    def selection(self, indices: Tensor, norms: Tensor) -> Selection:
        """Return what users see of the indices (count, k); the observer sees the norms (count, n) too."""
        if self.observer is not None:
            self.observer.selected(self.parameter, indices, norms)
        if self.parameter.ndim == 2:
            return Selection(self.axis, indices.squeeze(0))
        return Selection(self.axis, placed_like_stack(indices, self.parameter, self.matrices.count))

    def fingerprint(self) -> int:
        """Return a number in which all that ranks must agree about is mixed."""
        blocks = self.layout.fingerprint
        numbers = (self.k, self.momentum_factor, self.step_size, self.shrink, self.dtype, blocks)
        return zlib.crc32(repr((self.matrices, self.axis, numbers)).encode())


def dion2_update(updates: Sequence[MatrixUpdate], custom: Orthonormalize | None = None) -> dict[Tensor, Selection]:
    """Take one step on matrices that are whole on this rank, equal shapes together.

    Args:
        updates: Parameters that have a gradient.
        custom: Replaces the orthonormalization: (batch, k, m) -> the same shape (default: None).

    Returns:
        What was selected, by parameter.
    """
    selections = {}
    for batch in batches(updates):
        accumulate(batch)
        norms = [slice_sums(update.momentum).float() for update in batch]
        selected = select(batch, norms)
        submatrices = [take(update.momentum, indices, update) for update, indices in zip(batch, selected, strict=True)]
        orthonormal = torch.split(orthonormal_of(submatrices, custom), [len(indices) for indices in selected])
        shrink(batch)
        for update, indices, its_norms, result in zip(batch, selected, norms, orthonormal, strict=True):
            look_at(result, update)
            apply(update.weight, indices, result, update)
            selections[update.parameter] = update.selection(indices, its_norms)
    return selections


def accumulate(updates: Sequence[MatrixUpdate]) -> None:
    """M <- M + G, where there is a G."""
    present = [(update.momentum, update.gradient) for update in updates if update.gradient is not None]
    if present:
        momenta, gradients = zip(*present, strict=True)
        torch._foreach_add_(momenta, gradients)


def select(batch: Sequence[MatrixUpdate], norms: Sequence[Tensor]) -> Sequence[Tensor]:
    """K: the sorted indices of the largest slices, (count, k) for each update, from the norms (count, n)."""
    return torch.split(largest(torch.cat(list(norms)), batch[0].k), [len(each) for each in norms])


def take(momentum: Tensor, indices: Tensor, update: MatrixUpdate) -> Tensor:
    """S <- M[K], then M[K] <- mu M[K]; S in the precision of the orthonormalization."""
    submatrices = gather(momentum, indices)
    decay_(momentum, indices, submatrices, update.momentum_factor)
    return submatrices.to(update.dtype)


def orthonormal_of(submatrices: Sequence[Tensor], custom: Orthonormalize | None) -> Tensor:
    """O: the polar factors of stacks of equal submatrices, (count, k, m) each, in one batch."""
    stack = _concatenate(submatrices)
    if custom is None:
        return orthonormalize(stack, stack.dtype)
    result = custom(stack.contiguous())
    if result.shape != stack.shape:
        raise ValueError(
            f"orthonormalize must return the shape it is given: got {tuple(result.shape)} for {tuple(stack.shape)}"
        )
    return result.to(stack.dtype)


def shrink(updates: Sequence[MatrixUpdate]) -> None:
    """X <- (1 - lr weight_decay) X."""
    decaying = [update for update in updates if update.shrink != 1.0]
    if decaying:
        torch._foreach_mul_([update.weight for update in decaying], [update.shrink for update in decaying])


def apply(weight: Tensor, indices: Tensor, orthonormal: Tensor, update: MatrixUpdate) -> None:
    """X[K] <- X[K] - lr scale O."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    change = orthonormal.to(precise) * -update.step_size
    add_(weight, indices, change)
    if update.observer is not None and update.observer.wants_results:
        update.observer.moved(update.parameter, change)


def look_at(orthonormal: Tensor, update: MatrixUpdate) -> None:
    """Show the observer whole orthonormal submatrices (count, k, m), if it wants them."""
    if update.observer is not None and update.observer.wants_results:
        update.observer.orthonormalized(update.parameter, orthonormal)


def batches(updates: Sequence[MatrixUpdate]) -> Iterator[list[MatrixUpdate]]:
    """Group what can be selected and orthonormalized together, at most ``BATCH_ELEMENTS`` entries at a time."""

    def likeness(update: MatrixUpdate) -> Hashable:
        momentum = update.momentum
        return momentum.shape[1:], update.k, momentum.stride(-1) != 1, momentum.device, momentum.dtype, update.dtype

    for batch in alike(updates, likeness).values():
        size = max(1, BATCH_ELEMENTS // max(1, len(batch[0].momentum) * batch[0].k * batch[0].entries))
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def _concatenate(stacks: Sequence[Tensor]) -> Tensor:
    """Concatenate along the batch, in the memory order the parts have."""
    if len(stacks) == 1:
        return stacks[0]
    if stacks[0].stride(-1) != 1:
        return torch.cat([stack.mT for stack in stacks]).mT
    return torch.cat(list(stacks))
