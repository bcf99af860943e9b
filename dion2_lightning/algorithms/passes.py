"""The lines of the boxes of Dion2 and Dion3, one function each, for many matrices together.

A line that goes over the memory of matrices does so by kernels of Triton (kernels/fused.py), once for all matrices that
these take, and by operations of torch for each of the others; the results are the same.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Final, TypeVar

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.algorithms.matrix_update import MatrixUpdate, SelectedSlices
from dion2_lightning.algorithms.working_memory import bounded, pass_bytes
from dion2_lightning.kernels import fused
from dion2_lightning.kernels.decay import decayed
from dion2_lightning.kernels.device_numbers import DeviceNumber, as_factor
from dion2_lightning.kernels.gate import Gate
from dion2_lightning.kernels.orthonormalize import SAFETY, dtype_of_products, orthonormalize, polar_factor
from dion2_lightning.kernels.rounding import HALF_PRECISION, RandomBits, blocks, multiply_add_, store_
from dion2_lightning.kernels.selection import (
    add_,
    decay_,
    estimate_slice_sums,
    gather,
    largest,
    largest_by_estimates,
    put_,
    slice_sums,
)
from dion2_lightning.kernels.stacks import concatenate, empty_stacks, runs_along
from dion2_lightning.matrices.layout import group_by, local, local_gradient

CACHE: Final = 2**22
"""Bytes of momenta that a CPU keeps in its cache beside their gradients."""

S = TypeVar("S", MatrixUpdate, SelectedSlices)
R = TypeVar("R")


def split_off_wholes(updates: Sequence[MatrixUpdate]) -> tuple[list[MatrixUpdate], list[MatrixUpdate]]:
    """Return updates for what is the same for every entry of a parameter: one for all its blocks, and blocks alone.

    A pass over every second column takes as long as one over all of them, and blocks in pieces may have to be copied.
    """
    at_once: list[MatrixUpdate] = []
    alone: list[MatrixUpdate] = []
    for parameter, of_parameter in group_by(updates, lambda update: update.parameter).items():
        is_alike = not any(each.own_gates or "accumulate" in each.bits for each in of_parameter)
        if is_alike and sum(each.held_entries for each in of_parameter) == local(parameter).numel():
            at_once.append(of_parameter[0])
        else:
            alone += of_parameter
    return at_once, alone


def accumulate_and_sum(
    updates: Sequence[MatrixUpdate], working_memory: int, may_estimate: bool = False
) -> list[Tensor]:
    """M <- M + G, where there is a G; return the sums of |M| over the slices, (count, held slices), in float64.

    With ``may_estimate`` they are estimates where :attr:`MatrixUpdate.can_estimate_sums` says so.
    """
    fused_updates = [update for update in updates if update.is_fused]
    sums = dict(zip(fused_updates, _accumulate_at_once(fused_updates), strict=True)) if fused_updates else {}
    for some in _in_cache([update for update in updates if not update.is_fused]):
        accumulate(some, working_memory)
        for update in some:
            of_slices = estimate_slice_sums if may_estimate and update.can_estimate_sums else slice_sums
            sums[update] = _slice_sums(update, working_memory, of_slices)
    return [_sums_of_channels(update, sums[update]) for update in updates]


def _in_cache(updates: Sequence[MatrixUpdate]) -> Iterator[Sequence[MatrixUpdate]]:
    """Cut updates into lists whose momenta stay in a CPU's cache from one pass to the next, all of a parameter in one.

    That saves 6% of a step at 1/8, of which the sums would otherwise read all momenta from memory once more.
    """
    for device, there in group_by(updates, lambda update: update.device).items():
        if device.type != "cpu":
            yield there
            continue
        of_parameters = list(group_by(there, lambda update: update.parameter).values())
        for some in bounded(of_parameters, lambda each: each[0].state["momentum"].nbytes, CACHE):
            yield [update for of_parameter in some for update in of_parameter]


def _accumulate_at_once(updates: Sequence[MatrixUpdate]) -> list[Tensor]:
    return fused.accumulate(
        [update.momentum for update in updates],
        [update.gradient for update in updates],
        opens=[None if update.gate is None else update.gate.is_open for update in updates],
        bits=[update.bits.get("accumulate") for update in updates],
    )


def accumulate(updates: Sequence[MatrixUpdate], working_memory: int) -> None:
    """M <- M + G, where there is a G. What takes memory, a closed gate and rounding, goes over M block by block."""
    together: list[tuple[Tensor, Tensor]] = []
    at_once, alone = split_off_wholes(updates)
    terms: list[tuple[MatrixUpdate, Tensor, Tensor | None, RandomBits | None]] = [
        (each, local(each.state["momentum"]), local_gradient(each.parameter), None) for each in at_once
    ]
    for each in alone:
        if each.gradient is not None:
            own_bits = each.own_bits(each.bits.get("accumulate"))
            terms += zip(repeat(each), each.own(each.momentum), each.own(each.gradient), own_bits)
    for update, momentum, gradient, bits in terms:
        if gradient is None:
            continue
        if update.gate is None and bits is None:
            together.append((momentum, gradient))
            continue
        entries = max(update.slices * update.entries, working_memory // pass_bytes(momentum.dtype))
        for (part, its_gradient), its_bits in blocks([momentum, gradient], bits, entries):
            addend = its_gradient if update.gate is None else update.gate.gradient(its_gradient)
            if its_bits is None:
                part.add_(addend)
            else:
                multiply_add_(part, 1.0, addend, its_bits)
    if together:
        momenta, gradients = zip(*together, strict=True)
        torch._foreach_add_(momenta, gradients)


def leave_idle(updates: Sequence[MatrixUpdate]) -> None:
    """Leave idle matrices as they are, where the settings say so and no other rank shares them."""
    for update in updates:
        if update.leaves_idle:
            update.leave_idle(update.nonzero_gradients())


def _slice_sums(update: MatrixUpdate, working_memory: int, of_slices: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum up |M|, as many matrices at a time as memory allows."""
    momentum = update.momentum
    size = max(1, working_memory * len(momentum) // max(1, momentum.nbytes))
    if len(momentum) > size:
        sums = [torch.cat([of_slices(some) for some in own.split(size)]) for own in update.own(momentum)]
    else:
        sums = [of_slices(own) for own in update.own(momentum)]
    if update.is_in_pieces:
        return sums[0].sum(1)
    return sums[0].flatten(1) if len(sums) == 1 else torch.cat([each.flatten(1) for each in sums], 1)


def _sums_of_channels(update: MatrixUpdate, sums: Tensor) -> Tensor:
    """Add up the sums of the taps of a channel, where that is what a slice is."""
    if update.taps == 1:
        return sums
    channels = sums.shape[1] // update.taps
    shape = (update.taps, channels) if update.taps_first else (channels, update.taps)
    return sums.view(len(sums), *shape).sum(1 if update.taps_first else 2)


def select(
    updates: Sequence[MatrixUpdate], sums: Sequence[Tensor], may_estimate: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """K: the sorted indices of the largest slices, from the sums over all slices, (count, slices).

    ``may_estimate`` says what it said when the sums were taken. The selection does not depend on it.

    Returns:
        For each update the indices, (count, selected), and the norms: the sums in float32.
    """

    def key(at: int) -> tuple[int, int, bool]:
        return sums[at].shape[1], updates[at].selected, may_estimate and updates[at].can_estimate_sums

    selected: dict[int, tuple[Tensor, Tensor]] = {}
    for (_, k, are_estimates), equal in group_by(range(len(updates)), key).items():
        counts = [len(sums[at]) for at in equal]
        norms = torch.cat([sums[at] for at in equal])
        if are_estimates:
            matrices = [(updates[at], matrix) for at in equal for matrix in range(len(sums[at]))]
            indices = largest_by_estimates(norms, k, partial(_norms_of, matrices))
        norms = norms.float()
        if not are_estimates:
            indices = largest(norms, k)
        selected.update(zip(equal, zip(indices.split(counts), norms.split(counts), strict=True), strict=True))
    return [selected[at] for at in range(len(updates))]


def _norms_of(matrices: Sequence[tuple[MatrixUpdate, int]], number: int, indices: Tensor) -> Tensor:
    """The norms of some slices (c,) of one of many matrices, each the matrix of an update and of that number."""
    update, matrix = matrices[number]
    momentum = update.momentum.narrow(0, matrix, 1)
    return slice_sums(gather(momentum, update.at(indices.unsqueeze(0)))).squeeze(0).float()


def take(slices: Sequence[SelectedSlices]) -> list[Tensor]:
    """S <- M[K], or G[K] + mu M[K] with Nesterov, then M[K] <- mu M[K]; S in the orthonormalization's precision."""
    others = [each for each in slices if not each.is_fused]
    stacks = empty_stacks(
        [(*each.indices.shape, each.update.held_of_slices) for each in others],
        [runs_along(each.momentum) for each in others],
        [each.update.dtype for each in others],
        others[0].momentum.device if others else None,
    )
    into = dict(zip(others, stacks, strict=True))
    return at_once_or_one_by_one(slices, _take_at_once, lambda each: _take(each, into[each]))


def _take_at_once(slices: Sequence[SelectedSlices]) -> list[Tensor]:
    taken: dict[SelectedSlices, Tensor] = {}
    for (dtype, nesterov), alike in group_by(slices, lambda each: (each.update.dtype, each.update.nesterov)).items():
        gates = [each.update.gate for each in alike]
        stacks = fused.take(
            [each.momentum for each in alike],
            [each.indices for each in alike],
            [each.number(each.update.momentum_factor, 1.0, each.momentum) for each in alike],
            dtype,
            gradients=[each.gradient for each in alike] if nesterov else None,
            nesterov_factors=[as_factor(each.update.momentum_factor, torch.float32) for each in alike]
            if nesterov
            else None,
            opens=[None if gate is None else gate.is_open for gate in gates],
            bits=[each.bits("decay") for each in alike],
        )
        taken.update(zip(alike, stacks, strict=True))
    return [taken[each] for each in slices]


def _take(slices: SelectedSlices, into: Tensor) -> Tensor:
    update, momentum, indices = slices.update, slices.momentum, slices.indices
    places = update.at(indices)
    submatrices = gather(momentum, places)
    factor = slices.number(update.momentum_factor, 1.0, submatrices)
    bits = slices.bits("decay")
    if bits is None:
        decay_(momentum, places, submatrices, factor)
    else:
        shrunk = submatrices.clone()
        multiply_add_(shrunk, factor, None, bits.of_slices(indices))
        put_(momentum, places, shrunk)
    if update.nesterov:
        submatrices = submatrices.to(torch.promote_types(momentum.dtype, torch.float32))
        submatrices = submatrices * as_factor(update.momentum_factor, submatrices.dtype)
        if slices.gradient is not None:
            selected = gather(slices.gradient, places)
            submatrices += selected if update.gate is None else update.gate.gradient(selected)
    return into.copy_(submatrices)


def polar_factors(stacks: Sequence[Tensor], updates: Sequence[MatrixUpdate], context: StepContext) -> list[Tensor]:
    """O: the polar factors of stacks of submatrices, (count, k, m) each; those of one (k, m) together."""

    def key(at: int) -> Hashable:
        stack, update = stacks[at], updates[at]
        return stack.shape[1:], stack.stride(-1) != 1, stack.dtype, stack.device, update.goes_alone, update.is_fused

    results: dict[int, Tensor] = {}
    in_order = [at for alike in group_by(range(len(stacks)), key).values() for at in alike]
    for turn in bounded(in_order, lambda at: len(stacks[at]) * updates[at].working_bytes, context.working_memory):
        equal = list(group_by(turn, key).values())
        batches = [concatenate([stacks[at] for at in alike]) for alike in equal]
        factors = _polar_factors(batches, [updates[alike[0]] for alike in equal], context)
        for alike, its_factors in zip(equal, factors, strict=True):
            results.update(zip(alike, its_factors.split([len(stacks[at]) for at in alike]), strict=True))
    return [results[at] for at in range(len(stacks))]


def _polar_factors(
    batches: Sequence[Tensor], updates: Sequence[MatrixUpdate], context: StepContext
) -> Iterator[Tensor]:
    """The polar factors of batches, given an update that each is of."""
    if context.orthonormalize is not None:
        yield from (_checked_result(context.orthonormalize(batch.contiguous()), batch) for batch in batches)
        return
    at_once = [at for at, update in enumerate(updates) if update.is_fused and not update.goes_alone]
    normalized: dict[int, Tensor] = {}
    if at_once:
        dtypes = [dtype_of_products(batches[at]) for at in at_once]
        normalized.update(zip(at_once, fused.normalize([batches[at] for at in at_once], SAFETY, dtypes), strict=True))
    for at, (batch, update) in enumerate(zip(batches, updates, strict=True)):
        if at in normalized:
            yield polar_factor(normalized.pop(at), batch.dtype)
        elif update.goes_alone:
            yield concatenate([orthonormalize(matrix.contiguous(), batch.dtype) for matrix in batch.split(1)])
        else:
            yield orthonormalize(batch, batch.dtype)


def _checked_result(result: Tensor, batch: Tensor) -> Tensor:
    """What a callable instead of the package's own has returned, in the precision of the batch."""
    if result.shape != batch.shape:
        raise ValueError(
            f"orthonormalize must return the shape it is given: got {tuple(result.shape)} for {tuple(batch.shape)}"
        )
    return result.to(batch.dtype)


def shrink(updates: Sequence[MatrixUpdate]) -> None:
    """X <- (1 - lr weight_decay) X.

    What is in half precision, or decays cautiously, is left to :func:`apply`: it rounds once, and knows the update. So
    is what a kernel goes over, once.
    """
    at_once, alone = split_off_wholes(
        [
            each
            for each in updates
            if each.shrink != 1.0 and not (each.is_cautious or each.is_fused or each.parameter.dtype in HALF_PRECISION)
        ]
    )
    pairs = [(each, local(each.parameter)) for each in at_once]
    pairs += [(each, own) for each in alone for own in each.own(each.weight)]

    def key(pair: tuple[MatrixUpdate, Tensor]) -> tuple[Gate | None, DeviceNumber | None, torch.dtype]:
        update, weight = pair
        return update.own_gate, update.shrink if isinstance(update.shrink, DeviceNumber) else None, weight.dtype

    for (gate, factor, dtype), equal in group_by(pairs, key).items():
        if gate is not None:
            for update, weight in equal:
                weight.mul_(update.number(update.shrink, 1.0, weight))
        elif factor is not None:
            torch._foreach_mul_([weight for _, weight in equal], factor.to(dtype))
        else:
            factors = [update.shrink for update, _ in equal if not isinstance(update.shrink, DeviceNumber)]
            torch._foreach_mul_([weight for _, weight in equal], factors)


def apply(
    slices: Sequence[SelectedSlices],
    results: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    context: StepContext,
) -> None:
    """X[K] <- X[K] - lr scale O, each neuron times its factor where there are any.

    In half precision X <- (1 - lr weight_decay) X comes first, so that what is selected is rounded once; so it does
    where it is cautious. Slices that are not selected have no update, and are judged by M, of which it will be made.
    """
    of_results = dict(zip(slices, zip(results, factors, strict=True), strict=True))
    at_once_or_one_by_one(
        slices,
        lambda at_once: _apply_at_once(at_once, [of_results[each] for each in at_once]),
        lambda each: _apply(each, *of_results[each]),
    )
    if context.observer is not None and context.observer.wants_results:
        for each, (result, its_factors) in of_results.items():
            context.observer.moved(each.update.source, _change(each, result, its_factors))


def _apply_at_once(slices: Sequence[SelectedSlices], results: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[None]:
    fused.apply(
        [each.weight for each in slices],
        [each.indices for each in slices],
        [result for result, _ in results],
        [each.number(each.update.step_size, 0.0, each.weight) for each in slices],
        [1.0 if each.update.shrink == 1.0 else each.number(each.update.shrink, 1.0, each.weight) for each in slices],
        factors=[factors for _, factors in results],
        factor_dims=[each.update.neuron_dim for each in slices],
        cautious=[each.momentum if each.update.is_cautious else None for each in slices],
        bits=[each.bits("apply") for each in slices],
    )
    return [None] * len(slices)


def _change(slices: SelectedSlices, result: Tensor, factors: Tensor | None) -> Tensor:
    """What is added to X[K], in float32 at least."""
    update = slices.update
    change = result.to(torch.promote_types(update.parameter.dtype, torch.float32))
    change = change * slices.number(-update.step_size, 0.0, change)
    if factors is not None:
        change *= factors.unsqueeze(update.neuron_dim)
    return change


def _apply(slices: SelectedSlices, result: Tensor, factors: Tensor | None) -> None:
    update, weight, bits = slices.update, slices.weight, slices.bits("apply")
    change = _change(slices, result, factors)
    places, its_bits = update.at(slices.indices), None if bits is None else bits.of_slices(slices.indices)
    if update.is_cautious or weight.dtype in HALF_PRECISION:
        moved = gather(weight, places)
        shrink = slices.number(update.shrink, 1.0, moved)
        if update.is_cautious:
            store_(moved, decayed(moved, result, shrink) + change, its_bits)
        else:
            multiply_add_(moved, shrink, change, its_bits)
        everything = zip(update.own(weight), update.own(slices.momentum), update.own_bits(bits), strict=True)
        for own, direction, own_bits in everything:
            shrink = slices.number(update.shrink, 1.0, own)
            if update.is_cautious:
                store_(own, decayed(own, direction, shrink), own_bits)
            elif update.shrink != 1.0:
                multiply_add_(own, shrink, None, own_bits)
        put_(weight, places, moved)
    else:
        add_(weight, places, change)


def at_once_or_one_by_one(
    items: Sequence[S], at_once: Callable[[list[S]], Sequence[R]], one: Callable[[S], R]
) -> list[R]:
    """Return what a function makes of all items together that kernels go over, and another one of each of the rest."""
    together = [each for each in items if each.is_fused]
    made = dict(zip(together, at_once(together), strict=True)) if together else {}
    return [made[each] if each in made else one(each) for each in items]


def show_result(update: MatrixUpdate, result: Tensor, context: StepContext) -> None:
    """Show the observer whole orthonormal submatrices (count, k, m), if it wants them."""
    if context.observer is not None and context.observer.wants_results:
        context.observer.orthonormalized(update.source, result)


def record_selection(update: MatrixUpdate, indices: Tensor, norms: Tensor, context: StepContext) -> None:
    """Keep what was selected, (count, selected), and show the observer that and the norms of all slices."""
    if context.observer is not None:
        context.observer.selected(update.source, indices, norms)
    key = update.parameter, update.matrices.name
    if update.part.first:  # more matrices of a block
        indices = torch.cat([context.selections[key].indices.view(-1, update.selected), indices])
    context.selections[key] = update.selection(indices)
