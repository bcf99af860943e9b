"""Orthonormal bases of the columns of tall matrices P (n, r): an exact QR, or randomized Cholesky QR for spread rows.

Randomized Cholesky QR (Garrison and Ipsen, arXiv 2406.11751) needs no rank to hold a whole column. What it sums up over
the rows is small:

    R1 <- the triangle in a QR of S P        S: a random sketch, (about 2 r, n)
    P  <- P R1^-1                            its condition number is now below 6, whatever it was
    R2 <- the triangle in a Cholesky factorization of P^T P = R2^T R2
    P  <- P R2^-1

All but the sketch is computed in float64 where there is one, and what is kept and sent is rounded to the precision of
P: in float32 the solve for P R1^-1 would turn columns by 6e-8 times the condition number of P. It fails where P has no
r independent columns, and says so; an exact QR then completes what there is to r orthonormal columns.
"""

from typing import Final

import torch
from torch import Tensor

from dion2_lightning.kernels.precision import sum_dtype
from dion2_lightning.kernels.random_numbers import uniforms

SPARE_ROWS: Final = 8
"""Rows that a sketch has besides 2 r; without them that of two or three columns is now and then of nearly rank one.

With 2 r rows P R1^-1 has a condition number below (1 + sqrt(1/2)) / (1 - sqrt(1/2)) = 5.8, and columns end as
orthonormal as to 1e-7; with 5/4 r, which others use, it is 18, and they are so to 4e-7.
"""

SMALLEST_PIVOT: Final = 0.1
"""Of R2's diagonal, as a share of the largest entry; less is no basis. 0.38 is the smallest of hundreds of random P."""

TURNED: Final = (2.5e-5, 0.1)
"""Between which relative errors of its columns a float32 QR is repeated in float64; with more they are noise."""

PROBES: Final = 16
"""Random vectors by which a norm of an inverse is estimated; it is over three times as large in 1 of 100,000 cases."""

_SKETCH_SEED: Final = 0x44696F6E
_PROBE_SEED: Final = 0x50726F62


def orthonormal_columns(matrices: Tensor) -> Tensor:
    """Return P's orthonormal factor in an exact QR, for a batch of P (batch, n, r), n at least r.

    Its columns are orthonormal whatever the rank of P, also where P is zero. Those of a float32 QR are turned by
    rounding, as far as P is ill-conditioned. On a CPU, where the host need not wait to know, such P get a float64 QR.
    """
    basis: Tensor
    basis, triangles = torch.linalg.qr(matrices)
    if matrices.device.type == "cpu" and matrices.dtype == torch.float32:
        low, high = TURNED
        errors = _expected_errors(triangles)
        is_turned = (errors > low) & (errors < high)
        if is_turned.any():
            basis[is_turned] = torch.linalg.qr(matrices[is_turned].double()).Q.float()
    return basis


def sketch_rows(rank: int) -> int:
    """Return the number of rows of the sketch S P of P (n, r). Where n is no larger, P itself is better."""
    return 2 * rank + SPARE_ROWS


def sketches(matrices: Tensor, rows: Tensor) -> Tensor:
    """Return S P, or this rank's summand of it, for a batch of P, or of the rows of it that this rank holds.

    Args:
        matrices: Shape (batch, n, r).
        rows: The numbers of these n rows in the whole matrix.

    Returns:
        Shape (batch, :func:`sketch_rows`, r). S has entries of variance 1; as a factor it has no effect.
    """
    size = sketch_rows(matrices.shape[-1])
    sketch = uniforms(torch.arange(size, device=rows.device), rows, _SKETCH_SEED)
    return sketch.to(matrices.dtype) @ matrices


def grams(matrices: Tensor) -> Tensor:
    """Return P^T P, or this rank's summand of it, for a batch of P (batch, n, r): rounded once, to P's precision."""
    exact = matrices.to(sum_dtype(matrices.device))
    return (exact.mT @ exact).to(matrices.dtype)


def precondition(matrices: Tensor, its_sketches: Tensor) -> Tensor:
    """Return P R1^-1 for a batch of P, or of some of their rows, given the sketches of the whole.

    It is NaN where P has columns that depend on others but for less than its rounding errors.
    """
    triangles = _unless_zero(torch.linalg.qr(its_sketches.to(sum_dtype(its_sketches.device)), mode="r").R)
    pivots = triangles.diagonal(dim1=-2, dim2=-1).abs()
    is_dependent = pivots.amin(-1) < torch.finfo(matrices.dtype).eps / 4 * pivots.amax(-1)
    return _divide(matrices, triangles.masked_fill(is_dependent.view(-1, 1, 1), torch.nan))


def finish(matrices: Tensor, its_grams: Tensor) -> tuple[Tensor, Tensor]:
    """Return P R2^-1 for a batch of preconditioned P, or of some of their rows, and where it failed.

    Args:
        matrices: Shape (batch, n, r).
        its_grams: P^T P of the whole, (batch, r, r).

    Returns:
        What has orthonormal columns, or is zero where P is zero; and a boolean for each P, (batch,): whether it has no
        r independent columns, so that the result is of no use.
    """
    exact = _unless_zero(its_grams.to(sum_dtype(its_grams.device)))
    triangles, failures = torch.linalg.cholesky_ex(exact, upper=True)
    pivots = triangles.diagonal(dim1=-2, dim2=-1)
    is_basis = (failures == 0) & (pivots.amin(-1) >= SMALLEST_PIVOT * pivots.amax(-1))
    return _divide(matrices, triangles), is_basis.logical_not()


def randomized_cholesky_qr(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`finish` does, for a batch of whole P (batch, n, r)."""
    rows = torch.arange(matrices.shape[1], device=matrices.device)
    matrices = precondition(matrices, sketches(matrices, rows))
    return finish(matrices, grams(matrices))


def _divide(matrices: Tensor, triangles: Tensor) -> Tensor:
    """Return P R^-1, solved in the precision of R, in that of P."""
    dividends = matrices.to(triangles.dtype)
    quotients: Tensor = torch.linalg.solve_triangular(triangles, dividends, upper=True, left=False)
    return quotients.to(matrices.dtype)


def _expected_errors(triangles: Tensor) -> Tensor:
    """Estimate by how much rounding turns the columns of Q in a QR, (batch,): |Q - exact Q| / sqrt(r).

    A QR in float32 is an exact one of P + E, where E is random and of about 2 eps |P|. So Q differs by E R^-1, which is
    of about 2 eps |R| |R^-1| / sqrt(r). Norms are Frobenius norms.
    """
    size, dtype, device = triangles.shape[-1], triangles.dtype, triangles.device
    largest = triangles.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    triangles = triangles / largest  # squares in a norm neither overflow nor vanish
    places = torch.arange(size, device=device), torch.arange(PROBES, device=device)
    probes = uniforms(*places, _PROBE_SEED).to(dtype).expand(len(triangles), -1, -1)
    inverse = torch.linalg.solve_triangular(triangles, probes, upper=True)
    norms = torch.linalg.matrix_norm(triangles) * torch.linalg.matrix_norm(inverse) / PROBES**0.5
    errors: Tensor = 2 * torch.finfo(dtype).eps * norms / size
    return errors


def _unless_zero(squares: Tensor) -> Tensor:
    """Replace square matrices that are zero, as those of a zero P are, by the identity."""
    is_zero = (squares == 0).flatten(1).all(1).view(-1, 1, 1)
    return torch.where(is_zero, torch.eye(squares.shape[-1], dtype=squares.dtype, device=squares.device), squares)
