"""Accelerate's FSDP2 adds up in float32, whatever its products are computed in."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from recipes.precision import sum_in_float32

ROOT = Path(__file__).parents[2]


def accelerator_with(plugin: Any) -> Any:
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))


def test_gradients_and_losses_are_not_rounded() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")  # as an Accelerator does
    assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16, "there is something to mend"
    sum_in_float32(accelerator_with(plugin))
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None
    )
    (advised,) = re.findall(r"MixedPrecisionPolicy\([^)]*\)", (ROOT / "docs" / "huggingface.md").read_text())
    assert eval(advised) == plugin.mixed_precision_policy


def test_full_precision_stays() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    sum_in_float32(accelerator_with(plugin))
    assert plugin.mixed_precision_policy is None


def test_without_fsdp_nothing_happens() -> None:
    sum_in_float32(Accelerator(cpu=True))
