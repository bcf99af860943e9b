"""AdamW with several dtypes, and fused; test_optimizer.py compares it with torch.optim.AdamW."""

import pytest
import torch
from torch import nn

from dion2_lightning import Dion2
from dion2_lightning.algorithms.adamw import _is_fused


def test_one_group_of_several_dtypes():
    """The fused kernel takes one dtype at a time; each parameter must move as torch moves it in a group of its own.

    In bfloat16 that is one step, as torch's moments are then rounded.
    """
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.bfloat16]
    mixed = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in dtypes]
    alone = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in dtypes]
    ours = Dion2([{"params": mixed, "algorithm": "adamw", "rounding": "nearest"}], lr=0.1)
    theirs = [torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.01, fused=True) for parameter in alone]
    for step in range(3):
        for a, b in zip(mixed, alone, strict=True):
            a.grad = torch.full_like(a, step + 1.0)
            b.grad = a.grad.clone()
        for optimizer in [ours, *theirs]:
            optimizer.step()
    for a, b in zip(mixed, alone, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"), [(torch.float32, 8, 1e-6), (torch.float64, 8, 1e-12), (torch.bfloat16, 1, 2**-8)]
)
def test_cautious_weight_decay(dtype, steps, tolerance):
    """Against a plain loop in float64; in bfloat16 one step, rounded once, by half a spacing at most."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator).to(dtype)
    parameter = nn.Parameter(start.clone())
    settings = {"lr": 0.01, "weight_decay": 5.0, "cautious_weight_decay": True, "rounding": "nearest"}
    optimizer = Dion2([{"params": [parameter], "algorithm": "adamw", **settings}])
    x, m, v = start.double().flatten().tolist(), [0.0] * 35, [0.0] * 35
    for step in range(1, steps + 1):
        parameter.grad = torch.randn(5, 7, generator=generator).to(dtype)
        optimizer.step()
        for i, g in enumerate(parameter.grad.double().flatten().tolist()):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            update = m[i] / (1 - 0.9**step) / ((v[i] / (1 - 0.999**step)) ** 0.5 + 1e-8)
            x[i] = x[i] * (1 - 0.05 if update * x[i] >= 0 else 1) - 0.01 * update
    expected = torch.tensor(x, dtype=torch.float64).view(5, 7)
    if dtype is torch.bfloat16:
        assert ((parameter.double() - expected).abs() <= 1.001 * tolerance * expected.abs()).all()
    else:
        assert (parameter.double() - expected).norm() < tolerance * (expected - start.double()).norm()


def test_the_fused_kernel_is_used_where_torch_has_one(monkeypatch):
    from dion2_lightning.algorithms import adamw

    assert _is_fused([nn.Parameter(torch.ones(2))])
    assert not _is_fused([nn.Parameter(torch.ones(2, device="meta"))])
    seen = []
    original = adamw.adamw

    def spy(*args, **kwargs):
        seen.append(kwargs["fused"])
        original(*args, **kwargs)

    monkeypatch.setattr(adamw, "adamw", spy)
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    Dion2([{"params": [parameter], "algorithm": "adamw"}]).step()
    assert seen == [True]
