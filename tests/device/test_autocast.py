"""A step inside an autocast block, as under Lightning's manual optimization, is the step outside of it."""

from typing import Any

import pytest
import torch
from torch import nn

from dion2_lightning import Dion2


@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"algorithm": "dion3"}, {"algorithm": "dion"}], ids=str)
def test_nothing_more_is_rounded(settings: dict[str, Any], rounded: torch.dtype, device: str) -> None:
    results = []
    for is_inside in (False, True):
        weights = [nn.Parameter(torch.ones(shape, device=device)) for shape in ((160, 96), (160, 96), (96, 384), (9,))]
        groups = [{"params": weights[:3], **settings}, {"params": weights[3:], "algorithm": "adamw"}]
        optimizer = Dion2(groups, lr=0.1)
        for step in range(3):
            for number, parameter in enumerate(weights):
                generator = torch.Generator().manual_seed(10 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            with torch.autocast(device, rounded, enabled=is_inside):
                optimizer.step()
        results.append(weights)
    for outside, inside in zip(*results, strict=True):
        torch.testing.assert_close(inside, outside, rtol=0.0, atol=0.0 if device == "cpu" else 1e-6)
