"""The Dion2 update (arXiv 2512.16928), one function on one page.

    M    <- M + G                              accumulate
    K    <- the k slices of M with the largest L1 norms
    S    <- M[K]
    M[K] <- mu M[K]                            only what is selected decays
    O    <- U V^T of S = U Sigma V^T           orthonormalize
    X    <- (1 - lr weight_decay) X            every entry
    X[K] <- X[K] - lr scale O                  only what is selected moves

A slice is a row or a column of the matrix, along its shorter axis unless told otherwise.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from dion2_lightning.layout import Matrices
from dion2_lightning.orthonormalize import orthonormalize
from dion2_lightning.scaling import update_scale
from dion2_lightning.selection import Selection, add_, decay_, gather, largest, selected_count, slice_norms

BATCH_ELEMENTS: Final = 2**24
"""Submatrix entries that are orthonormalized at once: enough to fill a GPU, few enough to bound the working memory."""


@dataclass(frozen=True, eq=False)
class MatrixUpdate:
    """One parameter's part in a step: its matrices as (count, n, m) views, n slices of m entries, and its numbers.

    Attributes:
        parameter: The parameter itself.
        weight: X, updated in place.
        gradient: G.
        momentum: M, updated in place.
        axis: What a slice is: 0 output, 1 input.
        k: Slices to select in each matrix.
        momentum_factor: mu.
        step_size: lr times the scale rule.
        shrink: 1 - lr * weight_decay.
        dtype: Precision of the orthonormalization; None by hardware.
    """

    parameter: Tensor
    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    axis: int
    k: int
    momentum_factor: float
    step_size: float
    shrink: float
    dtype: torch.dtype | None

    @classmethod
    def of(cls, parameter: Tensor, momentum: Tensor, group: Mapping[str, Any]) -> "MatrixUpdate":
        """Read a parameter with a gradient, its momentum and its group."""
        assert parameter.grad is not None
        matrices = Matrices.of(parameter.shape, batched=group["batched"], transposed=group["transposed"])
        axis = matrices.selection_axis(group["select"])
        slices = matrices.shape[axis]
        k = selected_count(slices, group["fraction"])
        scale = update_scale(matrices.shape, slices, k, group["adjust_lr_fn"], group["scale_lr_by_fraction"])
        dtype = group["orthonormalize_dtype"]
        return cls(
            parameter=parameter,
            weight=matrices.slices(parameter, axis),
            gradient=matrices.slices(parameter.grad, axis),
            momentum=matrices.slices(momentum, axis),
            axis=axis,
            k=k,
            momentum_factor=group["momentum"],
            step_size=group["lr"] * scale,
            shrink=1.0 - group["lr"] * group["weight_decay"],
            dtype=None if dtype is None else getattr(torch, dtype),
        )


def dion2_update(
    updates: Sequence[MatrixUpdate], custom: Callable[[Tensor], Tensor] | None = None
) -> dict[Tensor, Selection]:
    """Take one step on every matrix, equal shapes together.

    Args:
        updates: The parameters that have a gradient.
        custom: Replaces the orthonormalization: (batch, k, m) -> the same shape (default: None).

    Returns:
        What was selected, by parameter.
    """
    selections = {}
    for batch in _batches(updates):
        accumulate(batch)
        selected = select(batch)
        submatrices = take(batch, selected)
        apply(batch, selected, _orthonormalize(submatrices, batch[0].dtype, custom))
        for update, indices in zip(batch, selected, strict=True):
            batched = update.parameter.ndim == 3
            selections[update.parameter] = Selection(update.axis, indices if batched else indices[0])
    return selections


def accumulate(batch: Sequence[MatrixUpdate]) -> None:
    """M <- M + G."""
    torch._foreach_add_([update.momentum for update in batch], [update.gradient for update in batch])


def select(batch: Sequence[MatrixUpdate]) -> Sequence[Tensor]:
    """K: the sorted indices of the largest slices, shape (count, k) for each update."""
    norms = torch.cat([slice_norms(update.momentum) for update in batch])
    return torch.split(largest(norms, batch[0].k), [len(update.momentum) for update in batch])


def take(batch: Sequence[MatrixUpdate], selected: Sequence[Tensor]) -> Tensor:
    """S <- M[K], then M[K] <- mu M[K]; shape (all matrices of the batch, k, m)."""
    submatrices = []
    for update, indices in zip(batch, selected, strict=True):
        submatrices.append(gather(update.momentum, indices))
        decay_(update.momentum, indices, submatrices[-1], update.momentum_factor)
    return _stack(submatrices)


def apply(batch: Sequence[MatrixUpdate], selected: Sequence[Tensor], orthonormal: Tensor) -> None:
    """X <- (1 - lr weight_decay) X, then X[K] <- X[K] - lr scale O."""
    torch._foreach_mul_([update.weight for update in batch], [update.shrink for update in batch])
    changes = orthonormal.split([len(update.weight) for update in batch])
    torch._foreach_mul_(changes, [-update.step_size for update in batch])
    for update, indices, change in zip(batch, selected, changes, strict=True):
        add_(update.weight, indices, change)


def _orthonormalize(
    submatrices: Tensor, dtype: torch.dtype | None, custom: Callable[[Tensor], Tensor] | None
) -> Tensor:
    if custom is None:
        return orthonormalize(submatrices, dtype).to(submatrices.dtype)
    result = custom(submatrices.contiguous())
    if result.shape != submatrices.shape:
        raise ValueError(
            f"orthonormalize must return the shape it is given: got {tuple(result.shape)} for "
            f"{tuple(submatrices.shape)}"
        )
    return result.to(submatrices.dtype)


def _batches(updates: Sequence[MatrixUpdate]) -> Iterator[list[MatrixUpdate]]:
    """Group what can be selected and orthonormalized together, at most ``BATCH_ELEMENTS`` entries at a time."""
    alike: dict[tuple[Any, ...], list[MatrixUpdate]] = defaultdict(list)
    for update in updates:
        momentum = update.momentum
        across = momentum.stride(-1) != 1
        alike[momentum.shape[1:], update.k, across, momentum.device, momentum.dtype, update.dtype].append(update)
    for batch in alike.values():
        count, _, m = batch[0].momentum.shape
        size = max(1, BATCH_ELEMENTS // (count * batch[0].k * m))
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def _stack(submatrices: Sequence[Tensor]) -> Tensor:
    """Concatenate along the batch, in the memory order the parts have."""
    if len(submatrices) == 1:
        return submatrices[0]
    if submatrices[0].stride(-1) != 1:
        return torch.cat([submatrix.mT for submatrix in submatrices]).mT
    return torch.cat(list(submatrices))
