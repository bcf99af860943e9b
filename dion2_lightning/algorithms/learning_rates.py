"""Learning-rate rules: how long the orthonormal update of a matrix is made.

An orthonormal (k, m) update has entries of root mean square 1 / sqrt(m), whatever the gradient. Each rule turns that
into a length that suits matrices of every shape at one learning rate.
"""

import math
from collections.abc import Callable
from typing import Final


def match_rms_adamw(out_size: int, in_size: int) -> float:
    """0.2 sqrt(max(out, in)): as long as an AdamW update, so AdamW's learning rates carry over (arXiv 2502.16982)."""
    return 0.2 * math.sqrt(max(out_size, in_size))


def original(out_size: int, in_size: int) -> float:
    """sqrt(max(1, out / in)): Keller Jordan's Muon, and the default of ``torch.optim.Muon``."""
    return math.sqrt(max(1.0, out_size / in_size))


def spectral(out_size: int, in_size: int) -> float:
    """sqrt(out / in): a change of fixed spectral condition; what the authors of Dion use (arXiv 2504.05295)."""
    return math.sqrt(out_size / in_size)


def none(out_size: int, in_size: int) -> float:
    """1: the orthonormal update as it is."""
    return 1.0


ADJUST_LR_FN: Final[dict[str | None, Callable[[int, int], float]]] = {
    "match_rms_adamw": match_rms_adamw,
    "original": original,
    None: original,  # as in torch.optim.Muon
    "spectral": spectral,
    "none": none,
}
"""The rules by the names that ``adjust_lr_fn`` takes."""


def update_scale(
    shape: tuple[int, int], slices: int, selected: int, adjust_lr_fn: str | None, scale_lr_by_fraction: bool
) -> float:
    """Return the factor between the orthonormal update and ``lr``.

    With ``scale_lr_by_fraction``, sqrt(slices / selected) makes up for the slices that are left out, so that one
    learning rate fits every fraction (the rule of Dion3, arXiv 2608.11612); without it the rule of the Dion2 paper
    (arXiv 2512.16928) is literal. ``shape`` is (out, in) of the whole matrix, whichever way round it is stored.
    """
    scale = ADJUST_LR_FN[adjust_lr_fn](*shape)
    return scale * math.sqrt(slices / selected) if scale_lr_by_fraction else scale
