"""Cautious weight decay: what decays, at its edges."""

import torch

from dion2_lightning.kernels.decay import decayed


def test_what_decays():
    """What is zero has nothing to be cautious about, and products of small numbers vanish."""
    weight = torch.tensor([2.0, 2.0, 2.0, 0.0, -2.0, 1e-30, 1e-30])
    direction = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1e-30, -1e-30])
    expected = torch.tensor([1.0, 2.0, 1.0, 0.0, -1.0, 5e-31, 1e-30])
    assert torch.equal(decayed(weight, direction, 0.5), expected)
