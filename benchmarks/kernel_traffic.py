"""What the operators of kernels/fused.py read and write, and how many launches they take."""

from collections.abc import Callable, Sequence
from typing import Any, Final

from torch import Tensor

from dion2_lightning.kernels.fused import decays
from dion2_lightning.kernels.triton_launch import PASSES, cut, launches_of


def traffic(name: str, arguments: tuple[Any, ...]) -> tuple[int, int]:
    """Return how many bytes a call of the operator ``dion2::name`` reads and writes.

    Left out is what it reads of small tables: numbers by matrix, slice or entry, indices, and hashes; and the partial
    sums of ``normalize``, at most 1 KB a matrix, which it writes once and reads once for each tile. Of single columns
    a GPU moves more than they have: what lies between them in the same 32 bytes.

    Args:
        name: Such as "accumulate".
        arguments: All of the call, positional.

    Raises:
        KeyError: If there is no such operator.
    """
    return _TRAFFIC[name](*arguments)


def launches(name: str, arguments: tuple[Any, ...]) -> int:
    """Return how many launches a call of the operator takes, the copy of its table among them.

    Tensors without data count as if their storages began at multiples of 16 bytes, as those on a device do.

    Raises:
        KeyError: If there is no such operator.
    """
    count = len(launches_of(PASSES[name](*arguments)))
    return count + 1 if count else 0


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _accumulate_traffic(momenta: Sequence[Tensor], gradients: Sequence[Tensor | None], *others: Any) -> tuple[int, int]:
    pairs = [(momentum, each) for momentum, each in zip(momenta, gradients, strict=True) if each is not None]
    read = sum(map(_size, momenta)) + sum(_size(gradient) for _, gradient in pairs)
    return read, sum(_size(momentum) for momentum, _ in pairs) + _size(others[-1])


def _take_traffic(
    momenta: Sequence[Tensor], gradients: Sequence[Tensor | None], pieces: Sequence[int], *others: Any
) -> tuple[int, int]:
    stacks: Sequence[Tensor] = others[-1]
    of_momenta = sum(
        stack.numel() * first.itemsize for stack, (first, *_) in zip(stacks, cut(momenta, pieces), strict=True)
    )
    of_gradients = sum(
        stack.numel() * first.itemsize
        for stack, (first, *_) in zip(stacks, cut(gradients, pieces), strict=True)
        if first is not None
    )
    return of_momenta + of_gradients, of_momenta + sum(map(_size, stacks))


def _normalize_traffic(
    stacks: Sequence[Tensor], safety: float, partial: Tensor, results: Sequence[Tensor]
) -> tuple[int, int]:
    return 2 * sum(map(_size, stacks)), sum(map(_size, results))


def _square_sums_traffic(stacks: Sequence[Tensor], sums: Tensor) -> tuple[int, int]:
    return sum(map(_size, stacks)), _size(sums)


def _neuron_factors_traffic(sums: Sequence[Tensor], variances: Sequence[Tensor], *others: Any) -> tuple[int, int]:
    factors: Tensor = others[-1]
    return 2 * (sum(map(_size, sums)) + _size(factors)), 2 * _size(factors)  # v of a neuron is as large as its factor


def _apply_traffic(
    weights: Sequence[Tensor],
    pieces: Sequence[int],
    indices: Sequence[Tensor],
    results: Sequence[Tensor],
    step_sizes: Sequence[float],
    step_tensors: Sequence[Tensor | None],
    shrinks: Sequence[float],
    shrink_tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    factor_dims: Sequence[int],
    momenta: Sequence[Tensor | None],
    *hashes: Any,
) -> tuple[int, int]:
    read = written = 0
    of_pieces = cut(weights, pieces), cut(momenta, pieces)
    for its_weights, its_momenta, result, shrink, tensor in zip(
        *of_pieces, results, shrinks, shrink_tensors, strict=True
    ):
        weight, momentum, entries = its_weights[0], its_momenta[0], sum(each.numel() for each in its_weights)
        touched = entries if decays(shrink, tensor) else result.numel()
        read += touched * weight.itemsize + _size(result)
        written += touched * weight.itemsize
        if momentum is not None and decays(shrink, tensor):
            read += (entries - result.numel()) * momentum.itemsize
    return read, written


_TRAFFIC: Final[dict[str, Callable[..., tuple[int, int]]]] = {
    "accumulate": _accumulate_traffic,
    "take": _take_traffic,
    "normalize": _normalize_traffic,
    "square_sums": _square_sums_traffic,
    "neuron_factors": _neuron_factors_traffic,
    "apply": _apply_traffic,
}
