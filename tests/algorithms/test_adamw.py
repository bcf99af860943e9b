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


def test_a_gradient_of_another_dtype():
    """torch lets ``grad_dtype`` be another than the parameter's, and its own AdamW refuses such a gradient."""
    mixed, alike = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    mixed.grad_dtype = torch.bfloat16
    optimizers = [Dion2([{"params": [each], "algorithm": "adamw"}], lr=0.1) for each in (mixed, alike)]
    for step in range(3):
        mixed.grad = torch.linspace(-1, step + 1, 5).bfloat16()
        alike.grad = mixed.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(mixed, alike)


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


def _transposed(like):
    return like.mT.contiguous().mT


def _with_gaps(like):
    return torch.zeros(*like.shape[:-1], like.shape[-1] + 3, dtype=like.dtype)[..., : like.shape[-1]].copy_(like)


def _expanded(like):
    return like[..., :1].expand(like.shape)


@pytest.mark.parametrize("settings", [{}, {"cautious_weight_decay": True}, {"working_memory": 2000}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order_of_gradient", [torch.clone, _transposed, _with_gaps, _expanded])
@pytest.mark.parametrize("order_of_weight", [torch.clone, _transposed, _with_gaps])
def test_memory_orders(order_of_weight, order_of_gradient, dtype, settings):
    """torch's fused kernel goes along the memory of all tensors; the result must not depend on how they lie in it."""
    results = []
    for is_in_order in (False, True):
        generator = torch.Generator().manual_seed(0)
        weight = order_of_weight(torch.randn(12, 20, generator=generator).to(dtype))
        parameter = nn.Parameter(weight.contiguous() if is_in_order else weight)
        group = {"params": [parameter], "algorithm": "adamw", "rounding": "nearest"}
        optimizer = Dion2([group], lr=0.1, weight_decay=0.5, **settings)
        for _ in range(3):
            gradient = order_of_gradient(torch.randn(12, 20, generator=generator).to(dtype))
            parameter.grad = gradient.contiguous() if is_in_order else gradient
            optimizer.step()
        results.append(parameter.detach().contiguous())
    if "working_memory" in settings:  # where blocks are cut, on which the last bits depend
        torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    else:
        assert torch.equal(*results)


def test_what_lies_between_the_rows_of_a_parameter_stays_as_it_is():
    whole = torch.zeros(4, 8)
    parameter = nn.Parameter(whole[:, :5])
    parameter.grad = torch.ones(4, 8)[:, :5]
    Dion2([{"params": [parameter], "algorithm": "adamw"}], lr=0.1).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 5), -0.1))
    assert not whole[:, 5:].any()


def test_memory_orders_against_torch():
    """Also of a parameter that became channels_last after its first step."""
    parameters = [nn.Parameter(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    ours = Dion2([{"params": parameters[:1], "algorithm": "adamw"}], lr=0.1)
    theirs = torch.optim.AdamW(parameters[1:], lr=0.1, weight_decay=0.01, foreach=False)
    for step in range(4):
        for each in parameters:
            if step == 2:
                each.data = each.data.to(memory_format=torch.channels_last)
            each.grad = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        ours.step()
        theirs.step()
    torch.testing.assert_close(*parameters, rtol=0, atol=1e-6)


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
