"""AdamW with several dtypes, and fused; test_optimizer.py compares it with torch.optim.AdamW."""

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
