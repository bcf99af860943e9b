"""Precision under Accelerate's FSDP2: products in half precision, sums in float32."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy


def sum_in_float32(accelerator: Accelerator) -> None:
    """Lets FSDP2 add up gradients in float32 and return losses as they are, before the model is prepared.

    With mixed precision, Accelerate has both rounded to the precision of the products. A loss that is a sum over tokens
    then has three digits. Outputs are left as they are: in float32, as could be asked for, those of the layers inside
    would be too, and what follows them multiplies in half precision.

    Args:
        accelerator: Whatever it does; without FSDP2 nothing changes.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
