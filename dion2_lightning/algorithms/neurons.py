"""Neuron normalization (NorMuon, arXiv 2510.05491; Dion3, arXiv 2608.11612): all neurons get updates of about one size.

    v  <- v + (1 - neuron_beta) (mean square of O - v)   a number for each neuron
    O' <- O / (sqrt(v) + 1e-8)                           neuron by neuron
    O  <- O' |O| / |O'|                                  by matrix, as long as before: |O| is the Frobenius norm

A neuron is an output of a matrix, whichever way round it is stored, and whatever its slices are. Where slices are
outputs, only the v of the selected ones change; where they are inputs, each of which is an entry of every neuron, all v
do. v starts at zero and has no bias correction.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import StateTensor, StepContext
from dion2_lightning.algorithms.matrix_update import MatrixUpdate, SelectedSlices
from dion2_lightning.algorithms.passes import split_off_fused
from dion2_lightning.kernels import fused
from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.lists import group_by
from dion2_lightning.matrices.layout import local, placements_of_matrices
from dion2_lightning.matrices.views import Matrices

EPS: Final = 1e-8


def variance_of(parameter: Tensor, blocks: Sequence[Matrices]) -> StateTensor:
    """Return the state v of a parameter: shape (out, 1), of a stack (count, out, 1); block after block.

    Every rank that holds a part of a matrix has all of its v: it is as small as one column of the momentum, and what
    the ranks add up to update it they all need for the Frobenius norms too.
    """
    first = blocks[0]
    size = sum(block.neurons for block in blocks)
    shape = (first.count, size, 1) if first.is_stack else (size, 1)
    placements = placements_of_matrices(parameter, is_stack=first.is_stack)
    return StateTensor(shape, torch.float32, parameter.device, placements)


def square_sums(results: Mapping[SelectedSlices, Tensor]) -> dict[SelectedSlices, Tensor]:
    """Return the sum of squares of O, or of a part of it, for every neuron: (count, k), or (count, m) of input slices.

    In float64 where there is one: rounded to float32 they do not depend on how ranks share the matrix.
    """
    sums: dict[SelectedSlices, Tensor] = {}
    fused_slices, others = split_off_fused(list(results))
    if fused_slices:
        dims = [each.update.neuron_dim for each in fused_slices]
        sums.update(zip(fused_slices, fused.square_sums([results[each] for each in fused_slices], dims), strict=True))
    for each in others:
        result = results[each]
        norms = torch.linalg.vector_norm(result, dim=each.update.neuron_dim, dtype=sum_dtype(result.device))
        sums[each] = norms.square()
    return sums


def factors(sums: Mapping[SelectedSlices, Tensor], context: StepContext) -> dict[SelectedSlices, Tensor]:
    """Update v, and return what each neuron of O is multiplied by, in the shape of its sum.

    Args:
        sums: What :func:`square_sums` returned, summed over all ranks; of a kernel over all taps of its channels. Where
            a gate is closed, v stays.
        context: Of the step; its observer is shown v.
    """
    at_once = {each: its_sums for each, its_sums in sums.items() if each.is_fused}
    others = {each: its_sums for each, its_sums in sums.items() if not each.is_fused}
    results = (_factors_at_once(at_once) if at_once else {}) | _factors(others)
    if context.observer is not None and context.observer.wants_results:
        for each in (member for slices in sums for member in slices.members):
            context.observer.normalized(each.update.source, _variance(each))
    return results


def _factors_at_once(sums: Mapping[SelectedSlices, Tensor]) -> dict[SelectedSlices, Tensor]:
    variances = {each: [_variance(member) for member in each.members] for each in sums}
    made = fused.neuron_factors(
        list(sums.values()),
        [each for of_members in variances.values() for each in of_members],
        [each.indices if each.update.slices_are_neurons else None for each in sums],
        [_size(each.update) for each in sums],
        [_weight(each, first.unsqueeze(-1)) for each, (first, *_) in variances.items()],
        EPS,
        pieces=[len(of_members) for of_members in variances.values()],
    )
    return dict(zip(sums, made, strict=True))


def _factors(sums: Mapping[SelectedSlices, Tensor]) -> dict[SelectedSlices, Tensor]:
    results: dict[SelectedSlices, Tensor] = {}

    def key(each: SelectedSlices) -> Hashable:
        update = each.update
        shape = update.slices_are_neurons, update.k, update.entries
        return shape, update.neuron_beta, update.own_gate, sums[each].device

    for equal in group_by(sums, key).values():
        counts = [len(sums[each]) for each in equal]
        squares = torch.cat([sums[each] for each in equal]).float()  # the same numbers under every layout
        means = squares * (1.0 / _size(equal[0].update))  # as GPUs divide by a number: all round alike
        known = torch.cat([_known(each) for each in equal])
        weight = _weights(equal, known.split(counts))
        known += (means - known) * weight
        known = torch.maximum(known, means * weight)  # rounding may take more, where v was many times as large
        precise, wide = (each.to(sum_dtype(each.device)) for each in (squares, known))
        inverse = 1.0 / (wide.sqrt() + EPS)  # in float32 devices differ in the last bits of roots
        before, after = precise.sum(1, keepdim=True), (precise * inverse.square()).sum(1, keepdim=True)
        inverse *= (before / after.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
        results.update(zip(equal, torch.split(inverse.float(), counts), strict=True))
        for each, its_known in zip(equal, torch.split(known, counts), strict=True):
            if each.update.slices_are_neurons:
                _variance(each).scatter_(1, each.indices, its_known)
            else:
                _variance(each).copy_(its_known)
    return results


def _size(update: MatrixUpdate) -> int:
    """How many entries of O a neuron has."""
    return update.entries if update.slices_are_neurons else update.k


def _weight(each: SelectedSlices, variances: Tensor) -> float | Tensor:
    """What the mean squares count for in v."""
    assert each.update.neuron_beta is not None
    return each.number(1.0 - each.update.neuron_beta, 0.0, variances)


def _weights(slices: Sequence[SelectedSlices], variances: Sequence[Tensor]) -> float | Tensor:
    """What the mean squares of several count for in v: one number, or one for each matrix where some may be idle."""
    if slices[0].update.active is None:
        return _weight(slices[0], variances[0])
    return torch.cat([torch.as_tensor(_weight(*each)) for each in zip(slices, variances, strict=True)])


def _known(each: SelectedSlices) -> Tensor:
    """The v of the neurons of O, before the step."""
    return _variance(each).gather(1, each.indices) if each.update.slices_are_neurons else _variance(each)


def _variance(each: SelectedSlices) -> Tensor:
    """View the v of these matrices as (count, out)."""
    update = each.update
    matrices, per_neuron = update.matrices, local(update.state["variance"]).squeeze(-1)
    if matrices.is_stack:
        of_update = per_neuron.narrow(1, matrices.first_neuron, matrices.out_size)
    else:
        first = matrices.first_neuron + update.part.first * matrices.out_size
        of_update = per_neuron.narrow(0, first, update.count * matrices.out_size).view(-1, matrices.out_size)
    return each.of_matrices(of_update)
