"""What one parameter brings to a step on matrices, and the lines of the Dion2 box: one function each."""

import zlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import Member, Observer, StepContext, matrices_of
from dion2_lightning.algorithms.learning_rates import update_scale
from dion2_lightning.kernels.orthonormalize import default_dtype, orthonormalize
from dion2_lightning.kernels.selection import Selection, add_, decay_, gather, largest, selected_count
from dion2_lightning.matrices.layout import (
    Layout,
    Spans,
    group_by,
    layout_of,
    local,
    local_gradient,
    placed_like_stack,
)
from dion2_lightning.matrices.views import Matrices

BATCH_ELEMENTS: Final = 2**24
"""Submatrix entries that are orthonormalized at once: enough to fill a GPU, few enough to bound the working memory."""


@dataclass(frozen=True, eq=False)
class MatrixUpdate:
    """One parameter in a step: its matrices as (count, n, m) views, n slices of m entries each, and its numbers.

    Attributes:
        parameter: The parameter itself.
        label: Its name for error messages.
        matrices: Its matrices, on all ranks together.
        layout: Which ranks hold which part of them.
        weight: X, this rank's part, updated in place.
        gradient: G, this rank's part; None where only other ranks have it.
        momentum: M, this rank's part, updated in place.
        axis: What a slice is: 0 output, 1 input.
        k: Slices to select in each matrix.
        momentum_factor: mu.
        step_size: lr times the scale rule.
        shrink: 1 - lr * weight_decay.
        dtype: Precision of the orthonormalization.
        observer: What receives the events of the step.
    """

    parameter: Tensor
    label: str
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
    def of(cls, member: Member, context: StepContext) -> "MatrixUpdate":
        """Read a parameter, its momentum, its group and its layout, as they are now."""
        parameter, state, group, label = member
        matrices = matrices_of(parameter, group)
        axis = matrices.selection_axis(group["select"])
        slices = matrices.shape[axis]
        k = selected_count(slices, group["fraction"])
        scale = update_scale(matrices.shape, slices, k, group["adjust_lr_fn"], group["scale_lr_by_fraction"])
        gradient = local_gradient(parameter)
        return cls(
            parameter=parameter,
            label=label,
            matrices=matrices,
            layout=layout_of(
                parameter,
                label,
                batched=group["batched"],
                process_group=context.process_group,
                known=context.layouts,
            ),
            weight=matrices.slices(local(parameter), axis),
            gradient=None if gradient is None else matrices.slices(gradient, axis),
            momentum=matrices.slices(local(state["momentum"]), axis),
            axis=axis,
            k=k,
            momentum_factor=group["momentum"],
            step_size=group["lr"] * scale,
            shrink=1.0 - group["lr"] * group["weight_decay"],
            dtype=orthonormalization_dtype(parameter, group["orthonormalize_dtype"]),
            observer=context.observer,
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

    def selection(self, indices: Tensor) -> Selection:
        """Return the indices (count, k) in the shape and placement that users see."""
        if self.parameter.ndim == 2:
            return Selection(self.axis, indices.squeeze(0))
        return Selection(self.axis, placed_like_stack(indices, self.parameter, self.matrices.count))

    def checksum(self) -> int:
        """Return a number made of all that ranks must agree about."""
        numbers = (self.k, self.momentum_factor, self.step_size, self.shrink, self.dtype, self.layout.fingerprint)
        return zlib.crc32(repr((self.matrices, self.axis, numbers)).encode())


def orthonormalization_dtype(parameter: Tensor, asked: str | None) -> torch.dtype:
    """Return the precision that a group asks for, or else the fastest of the parameter's device."""
    return default_dtype(parameter.device) if asked is None else getattr(torch, asked)


def batches(updates: Sequence[MatrixUpdate]) -> Iterator[list[MatrixUpdate]]:
    """Group updates that can be selected and orthonormalized together, at most ``BATCH_ELEMENTS`` entries at a time."""

    def key(update: MatrixUpdate) -> Hashable:
        momentum = update.momentum
        return momentum.shape[1:], update.k, momentum.stride(-1) != 1, momentum.device, momentum.dtype, update.dtype

    for batch in group_by(updates, key).values():
        size = max(1, BATCH_ELEMENTS // max(1, len(batch[0].momentum) * batch[0].k * batch[0].entries))
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


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


def polar_factors(submatrices: Sequence[Tensor], context: StepContext) -> Tensor:
    """O: the polar factors of stacks of equal submatrices, (count, k, m) each, in one batch."""
    stack = _concatenate(submatrices)
    if context.orthonormalize is None:
        return orthonormalize(stack, stack.dtype)
    result = context.orthonormalize(stack.contiguous())
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


def apply(update: MatrixUpdate, weight: Tensor, indices: Tensor, result: Tensor) -> None:
    """X[K] <- X[K] - lr scale O."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    change = result.to(precise) * -update.step_size
    add_(weight, indices, change)
    if update.observer is not None and update.observer.wants_results:
        update.observer.moved(update.parameter, change)


def show_result(update: MatrixUpdate, result: Tensor) -> None:
    """Show the observer whole orthonormal submatrices (count, k, m), if it wants them."""
    if update.observer is not None and update.observer.wants_results:
        update.observer.orthonormalized(update.parameter, result)


def record_selection(update: MatrixUpdate, indices: Tensor, norms: Tensor, context: StepContext) -> None:
    """Keep what was selected, indices (count, k), and show the observer that and the norms (count, n)."""
    if update.observer is not None:
        update.observer.selected(update.parameter, indices, norms)
    context.selections[update.parameter] = update.selection(indices)


def _concatenate(stacks: Sequence[Tensor]) -> Tensor:
    """Concatenate along the batch, in the memory order the parts have."""
    if len(stacks) == 1:
        return stacks[0]
    if stacks[0].stride(-1) != 1:
        return torch.cat([stack.mT for stack in stacks]).mT
    return torch.cat(list(stacks))
