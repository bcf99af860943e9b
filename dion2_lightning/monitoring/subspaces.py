"""What an update of low rank P Q^T takes of a momentum B: three numbers for each matrix.

They follow from a few sums: the squared norm of B, the norms of the columns of R = B^T P, and Gram matrices of Q, whose
columns after a step are those of R divided by their norms. Ranks that hold parts of B, R and Q add up their parts.
"""

import torch
from torch import Tensor


def captured_energies(energies: Tensor, captured: Tensor) -> Tensor:
    """Return ||B^T P||^2 / ||B||^2 in Frobenius norms, the share of B that lies in P's columns; 0 where B is zero.

    Args:
        energies: Squared norms of B, (matrices,).
        captured: Squared norms of B^T P, (matrices,).
    """
    return torch.where(energies == 0, 0.0, captured / energies)


def rank_uses(grams: Tensor, norms: Tensor) -> Tensor:
    """Return (sum of s^2)^2 / (r sum of s^4) over the singular values s of R, in [1 / r, 1]; 0 where R is zero.

    It is 1 where all r directions of P R^T hold as much, and 1 / r where one holds everything. No decomposition is
    needed: the sums are the trace of R^T R, and its squared Frobenius norm.

    Args:
        grams: Z^T Z of Z = [Q before the step, Q after it], (matrices, 2 r, 2 r).
        norms: Of the columns of R, (matrices, r).
    """
    rank = norms.shape[-1]
    scaled = norms / norms.amax(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    after = grams.narrow(1, rank, rank).narrow(2, rank, rank)
    factors = scaled * _inverse_lengths(after)
    gram = after * factors.unsqueeze(-1) * factors.unsqueeze(-2)
    squares, fourths = scaled.square().sum(-1), gram.square().sum((-2, -1))
    return torch.where(squares == 0, 0.0, squares.square() / (rank * fourths))


def turns(grams: Tensor) -> Tensor:
    """Return the mean squared sine of the angles between the columns of Q before a step and after it, in [0, 1].

    That is 1 - ||U^T V||^2 / r for orthonormal bases U and V: 0 where the subspace stays, 1 where it is wholly new. The
    bases are those of Cholesky factorizations. A number added to the diagonals keeps these from failing where columns
    are nearly dependent. Such directions then hardly count, in U and V as in r.

    Args:
        grams: Z^T Z of Z = [Q before the step, Q after it], (matrices, 2 r, 2 r).
    """
    rank = grams.shape[-1] // 2
    # Much more than a factorization rounds by. It blurs columns that differ by about 1e-6, as rounding Q nearly does.
    added = rank * torch.finfo(grams.dtype).eps ** 0.75
    identity = torch.eye(rank, dtype=grams.dtype, device=grams.device)
    before, between, after = _blocks(grams)
    triangles = torch.linalg.cholesky_ex(torch.stack([before, after]) + added * identity).L
    inverses = torch.linalg.solve_triangular(triangles, identity, upper=False)
    overlap = (inverses.select(0, 0) @ between @ inverses.select(0, 1).mT).square().sum((-2, -1))
    ranks = rank - added * inverses.square().sum((-2, -1))
    shares: Tensor = overlap / ranks.prod(0).sqrt()
    return (1.0 - shares).clamp(0.0, 1.0)


def _blocks(grams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U^T U, U^T V and V^T V, (matrices, r, r): U and V are Q before a step and after it, with columns of norm 1."""
    inverse = _inverse_lengths(grams)
    upper, lower = (grams * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).chunk(2, dim=1)
    before, between = upper.chunk(2, dim=2)
    return before, between, lower.chunk(2, dim=2)[1]


def _inverse_lengths(grams: Tensor) -> Tensor:
    """One over the norms of the columns that Gram matrices are of."""
    inverse: Tensor = grams.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(grams.dtype).tiny).rsqrt()
    return inverse
