"""Operations of a training step, and those that a GPU can do: their ratio is the model FLOPs utilisation."""

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PEAKS = {"H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12}
"""Operations a second in half precision, by a part of the GPU's name, where Lightning knows none or counts zeros that
are skipped."""


def peak_flops(device: torch.device) -> float | None:
    """Return the bfloat16 operations that a GPU can do in a second; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((peak for part, peak in PEAKS.items() if part in name), None)
    return known or get_available_flops(device, torch.bfloat16)


@torch.no_grad()
def training_flops(model: nn.Module, tokens: Tensor) -> float:
    """Return the operations of a training step: products, attention included.

    A forward pass is counted. A backward pass takes as much for the gradients of activations, and as much again for
    those of weights.

    Args:
        model: All of its weights are trained.
        tokens: Shape (rows, length).
    """
    # The counter does not know the fused attention of CPUs; written out, it is products like the others.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens[:1])
    return 3.0 * len(tokens) * counter.get_total_flops()
