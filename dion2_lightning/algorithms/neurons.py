"""Neuron normalization (NorMuon, arXiv 2510.05491; Dion3, arXiv 2608.11612): all neurons get updates of about one size.

    v  <- v + (1 - neuron_beta) (mean square of O - v)   a number for each neuron
    O' <- O / (sqrt(v) + 1e-8)                           neuron by neuron
    O  <- O' |O| / |O'|                                  by matrix, as long as before: |O| is the Frobenius norm

A neuron is an output of a matrix, whichever way round it is stored, and whatever its slices are. Where slices are
outputs, only the v of the selected ones change; where they are inputs, each of which is an entry of every neuron, all v
do. v starts at zero and has no bias correction: what it lacks at first is a factor that all neurons share, and the last
line takes it out.
"""

from typing import Final

import torch
from torch import Tensor

from dion2_lightning.algorithms.algorithm import StateTensor, StepContext
from dion2_lightning.algorithms.matrix_update import MatrixUpdate
from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.matrices.layout import local, placements_of_matrices
from dion2_lightning.matrices.views import Matrices

EPS: Final = 1e-8


def variance_of(parameter: Tensor, matrices: Matrices) -> StateTensor:
    """Return the state v of a parameter: shape (out, 1), of a stack (count, out, 1).

    Every rank that holds a part of a matrix has all of its v. The ranks add up mean squares anyway, so it costs no
    message, and it is smaller than the momentum by the size of an input.
    """
    shape = (matrices.out_size, 1) if parameter.ndim == 2 else (matrices.count, matrices.out_size, 1)
    return StateTensor(shape, torch.float32, parameter.device, placements_of_matrices(parameter))


def square_sums(update: MatrixUpdate, result: Tensor) -> Tensor:
    """Return the sum of squares of O, or of a part of it, for every neuron: (count, k), or (count, m) of input slices.

    In float64 where there is one: rounded to float32 they do not depend on how ranks share the matrix.
    """
    return result.to(sum_dtype(result.device)).square().sum(update.neuron_dim)


def factors(update: MatrixUpdate, indices: Tensor, sums: Tensor, context: StepContext) -> Tensor:
    """Update v, and return what each neuron of O is multiplied by, in the shape of ``sums``.

    Args:
        update: The parameter. Where its gate is closed, v stays.
        indices: K, (count, k).
        sums: What :func:`square_sums` returned, of whole matrices.
        context: Of the step; its observer is shown v.
    """
    assert update.neuron_beta is not None
    sums = sums.float()  # the same numbers on every rank and under every layout
    variance = torch.atleast_2d(local(update.state["variance"]).squeeze(-1))
    known = variance.gather(1, indices) if update.slices_are_neurons else variance
    means = sums / (update.entries if update.slices_are_neurons else update.k)
    known = known + (means - known) * update.number(1.0 - update.neuron_beta, 0.0, variance)
    if update.slices_are_neurons:
        variance.scatter_(1, indices, known)
    else:
        variance.copy_(known)
    if context.observer is not None and context.observer.wants_results:
        context.observer.normalized(update.parameter, variance)

    result = 1.0 / (known.sqrt() + EPS)
    precise = sums.to(sum_dtype(sums.device))
    before, after = precise.sum(1, keepdim=True), (precise * result.square()).sum(1, keepdim=True)
    return result * (before / after.clamp_min(torch.finfo(torch.float32).tiny)).sqrt().float()
