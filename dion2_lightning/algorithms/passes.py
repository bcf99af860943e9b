"""The lines of the boxes of Dion2 and Dion3, one function each, for many matrices together.

A line that goes over the memory of matrices does so by kernels of Triton (kernels/fused.py), once for all matrices that
these take, and by operations of torch for each of the others; the results are the same.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.algorithms.matrix_update import MatrixUpdate, SelectedSlices
from dion2_lightning.algorithms.slices_of_view import SlicesOfView, views_of
from dion2_lightning.algorithms.working_memory import pass_bytes
from dion2_lightning.kernels import fused
from dion2_lightning.kernels.decay import decayed
from dion2_lightning.kernels.device_numbers import DeviceNumber, as_factor
from dion2_lightning.kernels.estimated_norms import estimate_slice_sums, largest_by_estimates
from dion2_lightning.kernels.gate import Gate
from dion2_lightning.kernels.moving_slices import add_, decay_, gather, put_
from dion2_lightning.kernels.orthonormalize import SAFETY, dtype_of_products, orthonormalize, polar_factor
from dion2_lightning.kernels.rounding import HALF_PRECISION, RandomBits, blocks, multiply_add_, store_
from dion2_lightning.kernels.selection import largest, slice_sums
from dion2_lightning.kernels.stacks import concatenate, empty_stacks, runs_along
from dion2_lightning.lists import bounded, group_by
from dion2_lightning.matrices.layout import local, local_gradient

CACHE: Final = 2**20
"""Entries of matrices that a CPU keeps in its cache from one pass to the next."""

CONVERTED: Final = 2**19
"""Entries of a gradient that a CPU adds at once to a momentum of another precision. It makes a copy in that first, and
keeps it in cache: that saves 2% of a step of two large experts in bfloat16."""

GATHERED: Final = 2**20
"""Entries of slices that are copied at once, to be compared by their norms."""

S = TypeVar("S", MatrixUpdate, SelectedSlices)


def split_off_wholes(updates: Sequence[MatrixUpdate]) -> tuple[list[MatrixUpdate], list[MatrixUpdate]]:
    """Return updates for what is the same for every entry of a parameter: one for all its blocks, and blocks alone.

    A pass over every second column takes as long as one over all of them, and blocks in pieces may have to be copied.
    """
    at_once: list[MatrixUpdate] = []
    alone: list[MatrixUpdate] = []
    for parameter, of_parameter in group_by(updates, lambda update: update.parameter).items():
        first = of_parameter[0]
        is_alike = all(each.active is None and "accumulate" not in each.bits for each in of_parameter)
        is_whole = first.matrices.block is None  # then it is the only one of the parameter
        if is_alike and (is_whole or sum(each.held_entries for each in of_parameter) == local(parameter).numel()):
            at_once.append(first)
        else:
            alone += of_parameter
    return at_once, alone


class SliceSums(NamedTuple):
    """Sums of |M| over the slices of matrices.

    Attributes:
        sums: In float64, (count, held slices).
        are_estimates: Whether they are estimates, see kernels/estimated_norms.py.
    """

    sums: Tensor
    are_estimates: bool = False


def accumulate_and_sum(
    updates: Sequence[MatrixUpdate], working_memory: int, may_estimate: bool = False
) -> list[SliceSums]:
    """M <- M + G, where there is a G; return the sums of |M| over the slices, or estimates of them if these will do."""
    fused_updates, others = split_off_fused(updates)
    sums = dict(zip(fused_updates, map(SliceSums, _accumulate_at_once(fused_updates)), strict=True))
    for some in in_cache(others):
        accumulate(some, working_memory)
        for alike in group_by(some, lambda update: update.sums_key).values():
            are_estimates = may_estimate and all(update.can_estimate_sums for update in alike)
            of_slices = estimate_slice_sums if are_estimates else slice_sums
            of_updates = _slice_sums(alike, working_memory, of_slices)
            sums.update(zip(alike, (SliceSums(each, are_estimates) for each in of_updates), strict=True))
    return [SliceSums(_sums_of_channels(each, sums[each].sums), sums[each].are_estimates) for each in updates]


def split_off_fused(items: Sequence[S]) -> tuple[list[S], list[S]]:
    """Return what kernels of Triton go over, all together, and the others."""
    return [each for each in items if each.is_fused], [each for each in items if not each.is_fused]


def in_cache(items: Sequence[S]) -> Iterator[list[S]]:
    """Cut updates, or slices, into lists whose matrices stay in a CPU's cache from one pass to the next.

    What belongs to one parameter stays in one list. That saves 3% of a step at 1/8 where M is summed up, and 4% where
    X is moved: the second pass would otherwise read it from memory once more.
    """
    for device, there in group_by(items, lambda each: each.device).items():
        if device.type != "cpu":
            yield there
            continue
        of_parameters = list(group_by(there, lambda each: each.parameter).values())
        for some in bounded(of_parameters, lambda each: local(each[0].parameter).numel(), CACHE):
            yield [each for of_parameter in some for each in of_parameter]


def _accumulate_at_once(updates: Sequence[MatrixUpdate]) -> list[Tensor]:
    if not updates:
        return []
    members = [member for update in updates for member in update.members]
    return fused.accumulate(
        [member.momentum for member in members],
        [member.gradient for member in members],
        pieces=[len(update.members) for update in updates],
        opens=[None if update.gate is None else update.gate.is_open for update in updates],
        bits=[member.bits.get("accumulate") for member in members],
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
        entries = max(update.slices * update.entries, working_memory // pass_bytes(momentum.dtype))
        if update.gate is None and bits is None:
            if momentum.dtype == gradient.dtype or momentum.device.type != "cpu":
                together.append((momentum, gradient))
                continue
            entries = CONVERTED
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


def _slice_sums(updates: Sequence[MatrixUpdate], working_memory: int, of_slices: Callable[..., Tensor]) -> list[Tensor]:
    """Sum up |M| for updates with one key."""
    if len(updates) == 1:
        return [_sums_of_pieces(updates[0], working_memory, of_slices)]
    first = updates[0]
    whole = first.matrices.slices(first.part.stack(local(first.state["momentum"])), first.axis)
    if sum(update.held_entries for update in updates) == whole.numel():
        period = None if first.is_scattered or not runs_along(whole) else first.part.period_of(whole.shape[-1])
        sums_bytes = whole.shape[:-1].numel() * (period or 1) * torch.float64.itemsize
        if whole.nbytes + sums_bytes <= working_memory:
            if first.is_scattered:
                sums = of_slices(whole)
                return [sums.index_select(1, update.own_places) for update in updates]
            if period is not None:
                sums = of_slices(whole, period)
                return [update.part.sum_of_period(sums) for update in updates]
    return [_sums_of_pieces(update, working_memory, of_slices) for update in updates]


def _sums_of_pieces(update: MatrixUpdate, working_memory: int, of_slices: Callable[[Tensor], Tensor]) -> Tensor:
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


def select(updates: Sequence[MatrixUpdate], sums: Sequence[SliceSums]) -> list[tuple[Tensor, Tensor | None]]:
    """K: the sorted indices of the largest slices, from the sums over all slices, (count, slices).

    Returns:
        For each update the indices, (count, selected), and the norms: the sums in float32. None for the norms where
        sums are estimates; the indices are the same.
    """

    def key(at: int) -> tuple[int, int, bool]:
        return sums[at].sums.shape[1], updates[at].selected, sums[at].are_estimates

    selected: dict[int, tuple[Tensor, Tensor | None]] = {}
    for (_, k, are_estimates), equal in group_by(range(len(updates)), key).items():
        counts = [len(sums[at].sums) for at in equal]
        together = torch.cat([sums[at].sums for at in equal])
        its_norms: Iterable[Tensor | None] = [None] * len(equal)
        if are_estimates:
            matrices = [(updates[at], matrix) for at in equal for matrix in range(len(sums[at].sums))]
            indices = largest_by_estimates(together, k, partial(_norms_of, matrices))
        else:
            norms = together.float()
            indices, its_norms = largest(norms, k), norms.split(counts)
        selected.update(zip(equal, zip(indices.split(counts), its_norms, strict=True), strict=True))
    return [selected[at] for at in range(len(updates))]


def _norms_of(matrices: Sequence[tuple[MatrixUpdate, int]], number: int, indices: Tensor) -> Tensor:
    """The norms of some slices (c,) of one of many matrices, each the matrix of an update and of that number."""
    update, matrix = matrices[number]
    momentum, places = update.momentum.narrow(0, matrix, 1), update.at(indices.unsqueeze(0))
    some = places.split(max(1, GATHERED // update.entries), 1)
    return torch.cat([slice_sums(gather(momentum, each)).squeeze(0) for each in some]).float()


def take(slices: Sequence[SelectedSlices]) -> list[Tensor]:
    """S <- M[K], or G[K] + mu M[K] with Nesterov, then M[K] <- mu M[K]; S in the orthonormalization's precision."""
    fused_slices, others = split_off_fused(slices)
    taken = dict(zip(fused_slices, _take_at_once(fused_slices), strict=True))
    batches = _empty_batches(others)
    for view in views_of(others):
        for each, submatrices in zip(view.slices, _take(view), strict=True):
            batch = batches.get(each)
            taken[each] = submatrices.to(each.update.dtype) if batch is None else batch.copy_(submatrices)
    return [taken[each] for each in slices]


def _empty_batches(slices: Sequence[SelectedSlices]) -> dict[SelectedSlices, Tensor]:
    """Make room for the submatrices of equal shapes, one after another; the only one of its shape needs none.

    Batches would else be put together by a copy: one byte a parameter at 1/4, of 73.
    """

    def key(each: SelectedSlices) -> Hashable:
        update = each.update
        return each.indices.shape[1], update.held_of_slices, runs_along(each.momentum), update.dtype, update.device

    batches: dict[SelectedSlices, Tensor] = {}
    for equal in group_by(slices, key).values():
        if len(equal) > 1:
            update, along = equal[0].update, runs_along(equal[0].momentum)
            shapes = [(*each.indices.shape, update.held_of_slices) for each in equal]
            stacks = empty_stacks(shapes, [along] * len(equal), [update.dtype] * len(equal), update.device)
            batches.update(zip(equal, stacks, strict=True))
    return batches


def _take_at_once(slices: Sequence[SelectedSlices]) -> list[Tensor]:
    """Take S and decay M[K] by one kernel of Triton, of all matrices at once."""
    taken: dict[SelectedSlices, Tensor] = {}
    for (dtype, nesterov), alike in group_by(slices, lambda each: (each.update.dtype, each.update.nesterov)).items():
        members = [member for each in alike for member in each.members]
        gates = [each.update.gate for each in alike]
        stacks = fused.take(
            [member.momentum for member in members],
            [each.indices for each in alike],
            [each.number(each.update.momentum_factor, 1.0, each.members[0].momentum) for each in alike],
            dtype,
            pieces=[len(each.members) for each in alike],
            gradients=[member.gradient for member in members] if nesterov else None,
            nesterov_factors=[as_factor(each.update.momentum_factor, torch.float32) for each in alike]
            if nesterov
            else None,
            opens=[None if gate is None else gate.is_open for gate in gates],
            bits=[member.bits("decay") for member in members],
        )
        taken.update(zip(alike, stacks, strict=True))
    return [taken[each] for each in slices]


def _take(selected: SlicesOfView) -> Sequence[Tensor]:
    """Take S and decay M[K] in one view, by operations of torch; return S block by block."""
    first, momentum, places = selected.first, selected.momentum, selected.places
    gathered = gather(momentum, places)
    factor = first.number(first.update.momentum_factor, 1.0, gathered)
    bits = selected.selected_bits("decay")
    if bits is None:
        decay_(momentum, places, gathered, factor)
    else:
        shrunk = gathered.clone()
        multiply_add_(shrunk, factor, None, bits)
        put_(momentum, places, shrunk)
    return selected.split(_with_gradient(selected, gathered) if first.update.nesterov else gathered)


def _with_gradient(selected: SlicesOfView, gathered: Tensor) -> Tensor:
    """Return G[K] + mu M[K], in float32 at least."""
    update = selected.first.update
    gathered = gathered.to(torch.promote_types(gathered.dtype, torch.float32))
    gathered = gathered * as_factor(update.momentum_factor, gathered.dtype)
    if selected.gradient is not None:
        gradient = gather(selected.gradient, selected.places)
        gathered += gradient if update.gate is None else update.gate.gradient(gradient)
    return gathered


def polar_factors(stacks: Sequence[Tensor], updates: Sequence[MatrixUpdate], context: StepContext) -> list[Tensor]:
    """O: the polar factors of stacks of submatrices, (count, k, m) each; those of one (k, m) together."""

    def key(stack: Tensor, update: MatrixUpdate) -> Hashable:
        return stack.shape[1:], stack.stride(-1) != 1, stack.dtype, stack.device, update.goes_alone, update.is_fused

    results: dict[int, Tensor] = {}
    counts, keys = [len(stack) for stack in stacks], [*map(key, stacks, updates)]
    in_order = [at for alike in group_by(range(len(stacks)), keys.__getitem__).values() for at in alike]
    for turn in bounded(in_order, lambda at: counts[at] * updates[at].working_bytes, context.working_memory):
        equal = list(group_by(turn, keys.__getitem__).values())
        batches = [concatenate([stacks[at] for at in alike]) for alike in equal]
        factors = _polar_factors(batches, [updates[alike[0]] for alike in equal], context)
        for alike, its_factors in zip(equal, factors, strict=True):
            results.update(zip(alike, its_factors.split([counts[at] for at in alike]), strict=True))
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
    found = tuple(result.shape) if isinstance(result, Tensor) else f"a {type(result).__name__}"
    if found != tuple(batch.shape):
        raise ValueError(f"orthonormalize must return the shape it is given: got {found} for {tuple(batch.shape)}")
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
    fused_slices, others = split_off_fused(slices)
    if fused_slices:
        _apply_at_once(fused_slices, [of_results[each] for each in fused_slices])
    for view in views_of(others):
        update = view.first.update
        change = view.join([_change(each, *of_results[each]) for each in view.slices])
        if update.is_cautious or update.parameter.dtype in HALF_PRECISION:
            result = view.join([of_results[each][0] for each in view.slices]) if update.is_cautious else None
            _apply_rounded_once(view, change, result)
        else:
            add_(view.weight, view.places, change)
    if context.observer is not None and context.observer.wants_results:
        for each, (result, its_factors) in of_results.items():
            change = _change(each, result, its_factors)
            for member, its_change in zip(each.members, each.update.split(change), strict=True):
                context.observer.moved(member.update.source, its_change)


def _apply_at_once(slices: Sequence[SelectedSlices], results: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    members = [member for each in slices for member in each.members]
    firsts = [each.members[0].weight for each in slices]
    fused.apply(
        [member.weight for member in members],
        [each.indices for each in slices],
        [result for result, _ in results],
        [each.number(each.update.step_size, 0.0, first) for each, first in zip(slices, firsts, strict=True)],
        [
            1.0 if each.update.shrink == 1.0 else each.number(each.update.shrink, 1.0, first)
            for each, first in zip(slices, firsts, strict=True)
        ],
        pieces=[len(each.members) for each in slices],
        factors=[factors for _, factors in results],
        factor_dims=[each.update.neuron_dim for each in slices],
        cautious=[member.momentum if member.update.is_cautious else None for member in members],
        bits=[member.bits("apply") for member in members],
    )


def _change(slices: SelectedSlices, result: Tensor, factors: Tensor | None) -> Tensor:
    """What is added to X[K], in float32 at least."""
    update = slices.update
    change = result.to(torch.promote_types(update.parameter.dtype, torch.float32))
    number = slices.number(-update.step_size, 0.0, change)
    change = change * number if change is result else change.mul_(number)
    if factors is not None:
        change *= factors.unsqueeze(update.neuron_dim)
    return change


def _apply_rounded_once(selected: SlicesOfView, change: Tensor, result: Tensor | None) -> None:
    """X <- (1 - lr weight_decay) X and X[K] <- X[K] + change, each entry rounded once; cautiously, given the result."""
    first, places = selected.first, selected.places
    moved, bits = gather(selected.weight, places), selected.selected_bits("apply")
    shrink = first.number(first.update.shrink, 1.0, moved)
    if result is not None:
        store_(moved, decayed(moved, result, shrink) + change, bits)
    else:
        multiply_add_(moved, shrink, change, bits)
    for weight, momentum, its_bits in selected.everything("apply"):
        shrink = first.number(first.update.shrink, 1.0, weight)
        if result is not None:
            store_(weight, decayed(weight, momentum, shrink), its_bits)
        elif first.update.shrink != 1.0:
            multiply_add_(weight, shrink, None, its_bits)
    put_(selected.weight, places, moved)


def show_results(results: Mapping[SelectedSlices, Tensor], context: StepContext) -> None:
    """Show the observer orthonormal submatrices (count, k, m), parameter by parameter, if it wants them."""
    if context.observer is not None and context.observer.wants_results:
        for each, result in results.items():
            for member, its_result in zip(each.members, each.update.split(result), strict=True):
                context.observer.orthonormalized(member.update.source, its_result)


def show_result(update: MatrixUpdate, result: Tensor, context: StepContext) -> None:
    """Show the observer whole orthonormal submatrices (count, k, m) of a parameter, if it wants them."""
    if context.observer is not None and context.observer.wants_results:
        context.observer.orthonormalized(update.source, result)


def record_selection(update: MatrixUpdate, indices: Tensor, norms: Tensor | None, context: StepContext) -> None:
    """Keep what was selected, (count, selected), and show the observer that and the norms of all slices."""
    members = update.members
    their_norms = [None] * len(members) if norms is None else update.split(norms)
    for member, its_indices, its_norms in zip(members, update.split(indices), their_norms, strict=True):
        if context.observer is not None:
            context.observer.selected(member.source, its_indices, its_norms)
        key = member.parameter, member.matrices.name
        if member.part.first:  # more matrices of a block
            its_indices = torch.cat([context.selections[key].indices.view(-1, member.selected), its_indices])
        context.selections[key] = member.selection(its_indices)
