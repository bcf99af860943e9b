"""Orthonormalization: the polar factor of a batch of matrices, by products alone.

For ``S = U diag(sigma) V^T`` the polar factor is ``U V^T``. A Newton-Schulz iteration ``X <- a X + b (X X^T) X + c (X
X^T)^2 X`` moves every singular value towards 1 and keeps the singular vectors. The coefficients are Polar Express
(arXiv 2505.16932): five polynomials, each the best one for the interval the previous one leaves.
"""

from functools import cache
from typing import Final

import torch
from torch import Tensor

from dion2_lightning.kernels.precision import has_float64, sum_dtype

POLAR_EXPRESS: Final = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Coefficients (a, b, c) of the five steps, the first one applied first."""

SAFETY: Final = 1.02
"""The polynomials are made for singular values up to 1; rounding must not push the largest one over it."""

GRAM_ASPECT: Final = 1.5
"""Five steps on (k, m) cost 20 k^2 m + 10 k^3 FLOPs as written, 4 k^2 m + 34 k^3 on the Gram matrix."""

MIN_FLOAT32_ROWS: Final = 24
"""Rows of a Gram matrix from which on float32 products are exact enough; fewer are multiplied in float64."""

MAX_SHORT_ENTRIES: Final = 64
"""Entries of rows up to which float32 products are exact enough, however few the rows."""

MAX_FLOAT32_ENTRIES: Final = 2048
"""Entries of rows whose products are summed up in float32; of longer rows such sums are added up in float64."""

MIN_BF16_DIM: Final = 32
"""Matrices with a shorter axis below this are never multiplied in bfloat16, only rounded to it.

Its error grows as they shrink, from 1.5% of the polar factor at 48 x 192 to 5% of a single vector, and products this
small are no faster in it.
"""


def orthonormalize(submatrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the polar factor of every matrix of a batch.

    A singular value of at least 1e-3 of its matrix's Frobenius norm lands in [0.85, 1.15]; smaller ones stay below
    1.15. A zero matrix gives zero. The result does not depend on the scale of the input, down to norms under the
    smallest normal number of its dtype, where it fades to zero.

    Args:
        submatrices: Shape (batch, k, m). Wide is fastest, tall works. A batch that is contiguous in its transpose
            (``submatrices.mT``) is not copied, and the result comes back in the same memory order.
        dtype: Precision of the products, to which the input is rounded: ``torch.bfloat16`` (products in float32 still
            where an axis is shorter than :data:`MIN_BF16_DIM`), ``torch.float32`` or ``torch.float64`` (default: None,
            by hardware: :func:`default_dtype`).

    Returns:
        Shape (batch, k, m), of ``dtype``.
    """
    dtype = default_dtype(submatrices.device) if dtype is None else dtype
    # Rounded before anything else, as it is on its way to another rank: every layout sees the same numbers.
    rounded = submatrices.to(dtype)
    return polar_factor(_normalize(rounded, dtype_of_products(rounded)), dtype)


def dtype_of_products(submatrices: Tensor) -> torch.dtype:
    """Return the precision in which submatrices of a dtype are multiplied: float32 at least, where they are small."""
    is_small = min(submatrices.shape[1:]) < MIN_BF16_DIM
    return torch.promote_types(submatrices.dtype, torch.float32) if is_small else submatrices.dtype


def polar_factor(normalized: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the polar factors of matrices (batch, k, m) whose Frobenius norms are 1 / :data:`SAFETY`, in ``dtype``."""
    if normalized.shape[1] > normalized.shape[2]:
        return polar_factor(normalized.mT, dtype).mT
    iterate = _gram_newton_schulz if _gram_pays(normalized) else _newton_schulz
    return iterate(normalized).to(dtype)


def flops(k: int, m: int) -> int:
    """Return the FLOPs of orthonormalizing a (k, m) matrix."""
    short, long = sorted((k, m))
    return 20 * short * short * long + 10 * short**3


def _normalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide matrices by a little more than their Frobenius norms, in float32 at least, and round that to ``dtype``."""
    precise = torch.promote_types(matrices.dtype, torch.float32)
    smallest = torch.finfo(precise).tiny
    if not has_float64(matrices.device):
        # Squares of float32 entries under 1e-19 would vanish, over 1e19 overflow: the largest entry is made 1 first.
        largest = matrices.abs().amax((-2, -1), keepdim=True).to(precise)
        matrices = matrices / largest.clamp_min(smallest)
        norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True) * SAFETY
        return torch.div(matrices, norm.clamp_min(smallest)).to(dtype)
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=torch.float64) * SAFETY
    divisors = norms.to(precise).clamp_min(smallest)
    if matrices.device.type != "cpu" or not matrices.dtype == dtype != precise:
        return torch.div(matrices, divisors.view(-1, 1, 1)).to(dtype)
    # Matrix by matrix: torch would first copy a whole batch to float32 to divide it by a number for each matrix.
    quotients = torch.empty_like(matrices)
    for matrix, divisor, quotient in zip(matrices, divisors, quotients, strict=True):
        torch.div(matrix, divisor, out=quotient)
    return quotients


def _newton_schulz(x: Tensor) -> Tensor:
    """The iteration as written at the top of this file; keeps its bound in half precision too."""
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = _multiply(torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, plus=a)
    return x


def _gram_newton_schulz(x: Tensor) -> Tensor:
    """The same polynomials on the (k, k) Gram matrix; ``x`` itself is read twice, whatever the number of steps.

    With ``R = X X^T`` and ``Z = a I + b R + c R^2`` a step is ``X <- Z X``, so ``R <- Z R Z``, and the product of all Z
    is applied to ``x`` once at the end (Gram Newton-Schulz, Dao-AILab). The products are symmetric and commute.
    """
    gram = _gram(x)
    factor = None
    for step, (a, b, c) in enumerate(POLAR_EXPRESS):
        z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        z.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = z if factor is None else z @ factor
        if step < len(POLAR_EXPRESS) - 1:
            gram = z @ gram @ z
    assert factor is not None
    return _multiply(factor, x)


def _gram(x: Tensor) -> Tensor:
    """``x @ x.mT``; of few rows in float64, unless they are short; of long ones summed up in float64 piece by piece.

    Where rows are nearly alike and their entries are of one size, the errors of float32 sums add up: R gets negative
    eigenvalues, of 1e-5 for rows of 65,536 entries, and the iteration makes over 1e4 of these.
    """
    dtype = sum_dtype(x.device)
    if x.shape[-2] < MIN_FLOAT32_ROWS and x.shape[-1] > MAX_SHORT_ENTRIES:
        precise = x.to(dtype)
        return (precise @ precise.mT).to(x.dtype)
    if x.shape[-1] <= MAX_FLOAT32_ENTRIES:
        return x @ x.mT
    gram = x.new_zeros((*x.shape[:-1], x.shape[-2]), dtype=dtype)
    for piece in x.split(MAX_FLOAT32_ENTRIES, -1):
        gram += piece @ piece.mT
    return gram.to(x.dtype)


def _multiply(left: Tensor, x: Tensor, plus: float = 0.0) -> Tensor:
    """Return ``left @ x + plus * x`` in the memory order of ``x``."""
    if x.stride(-1) != 1:
        stored = x.mT
        return torch.baddbmm(stored, stored, left.mT, beta=plus).mT
    return torch.baddbmm(x, left, x, beta=plus)


def _gram_pays(x: Tensor) -> bool:
    """Whether the Gram matrix is both cheaper and exact enough.

    Rounding errors in R are amplified by 1 / sigma^2: in bfloat16, or in float32 products that are rounded to bfloat16
    or TF32 inside, the singular values leave [0.8, 1.2].
    """
    rounded = x.dtype == torch.float32 and _rounds_float32(x.device)
    return x.dtype != torch.bfloat16 and not rounded and x.shape[-1] > GRAM_ASPECT * x.shape[-2]


def _rounds_float32(device: torch.device) -> bool:
    """Whether the user lets float32 products be rounded inside, by torch's older or newer setting."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    own = backend.matmul.fp32_precision
    inherited = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return (inherited if own == "none" else own) not in ("ieee", "none")


def default_dtype(device: torch.device) -> torch.dtype:
    """Return a device's fastest precision: bfloat16 on GPUs and CPUs that are built for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if _gpu_multiplies_bfloat16(device) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_bfloat16() else torch.float32


@cache
def _gpu_multiplies_bfloat16(device: torch.device) -> bool:
    """All but NVIDIA's before compute capability 8.0, which emulate it, at half the speed of float32 or less."""
    is_nvidia = torch.cuda.is_available() and torch.version.hip is None  # a device may be fake
    return not is_nvidia or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _cpu_multiplies_bfloat16() -> bool:
    """AMX tiles, or AVX512-BF16 on AMD: there bfloat16 products run 4 to 10 times faster than float32.

    AVX512-BF16 alone is no sign of speed: on an Intel Xeon without AMX, bfloat16 products ran at 0.6 of float32's rate.
    """
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16", False):
        return True
    return bool(capabilities.get("avx512_bf16", False)) and "AMD" in str(capabilities.get("cpu_name", ""))
