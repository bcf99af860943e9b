"""Cautious weight decay (arXiv 2510.12402): a weight decays unless its update pushes it away from zero."""

import torch
from torch import Tensor


def decayed(weight: Tensor, direction: Tensor, factor: float | Tensor) -> Tensor:
    """Return weights of which those that decay are multiplied by a factor, in float32 at least.

    Args:
        weight: Any shape.
        direction: The same shape: what a step subtracts from the weight a positive multiple of. Where one of the two is
            zero there is nothing to be cautious about, and the weight decays.
        factor: 1 - lr * weight_decay; a tensor is 0-d, or broadcasts with the weight.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # The sign and not the weight itself: products of small numbers vanish.
    return torch.where(direction * wide.sign() >= 0, wide * factor, wide)
