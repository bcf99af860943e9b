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
from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.matrices.layout import group_by, local, placements_of_matrices
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


def square_sums(update: MatrixUpdate, result: Tensor) -> Tensor:
    """Return the sum of squares of O, or of a part of it, for every neuron: (count, k), or (count, m) of input slices.

    In float64 where there is one: rounded to float32 they do not depend on how ranks share the matrix.
    """
    norms: Tensor = torch.linalg.vector_norm(result, dim=update.neuron_dim, dtype=sum_dtype(result.device))
    return norms.square()


def factors(sums: Mapping[SelectedSlices, Tensor], context: StepContext) -> dict[SelectedSlices, Tensor]:
    """Update v, and return what each neuron of O is multiplied by, in the shape of its sum.

    Args:
        sums: What :func:`square_sums` returned, of whole matrices, by what is selected of them; of a kernel all taps of
            its channels. Where its gate is closed, v stays.
        context: Of the step; its observer is shown v.
    """
    results: dict[SelectedSlices, Tensor] = {}

    def key(each: SelectedSlices) -> Hashable:
        update = each.update
        shape = update.slices_are_neurons, update.k, update.entries
        return shape, update.neuron_beta, update.own_gate, sums[each].device

    for equal in group_by(sums, key).values():
        first, counts = equal[0].update, [len(sums[each]) for each in equal]
        assert first.neuron_beta is not None
        squares = torch.cat([sums[each] for each in equal]).float()  # the same numbers under every layout
        means = squares / (first.entries if first.slices_are_neurons else first.k)
        known = torch.cat([_known(each) for each in equal])
        known += (means - known) * equal[0].number(1.0 - first.neuron_beta, 0.0, known)
        inverse = 1.0 / (known.sqrt() + EPS)
        precise = squares.to(sum_dtype(squares.device))
        before, after = precise.sum(1, keepdim=True), (precise * inverse.square()).sum(1, keepdim=True)
        inverse *= (before / after.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
        results.update(zip(equal, torch.split(inverse, counts), strict=True))
        for each, its_known in zip(equal, torch.split(known, counts), strict=True):
            variance = each.of_matrices(_variance(each.update))
            if each.update.slices_are_neurons:
                variance.scatter_(1, each.indices, its_known)
            else:
                variance.copy_(its_known)
            if context.observer is not None and context.observer.wants_results:
                context.observer.normalized(each.update.source, variance)
    return results


def _known(each: SelectedSlices) -> Tensor:
    """The v of the neurons of O, before the step."""
    variance = each.of_matrices(_variance(each.update))
    return variance.gather(1, each.indices) if each.update.slices_are_neurons else variance


def _variance(update: MatrixUpdate) -> Tensor:
    """View v as (count, out)."""
    matrices, per_neuron = update.matrices, local(update.state["variance"]).squeeze(-1)
    if matrices.is_stack:
        return per_neuron.narrow(1, matrices.first_neuron, matrices.out_size)
    first = matrices.first_neuron + update.part.first * matrices.out_size
    return per_neuron.narrow(0, first, update.count * matrices.out_size).view(update.count, matrices.out_size)
