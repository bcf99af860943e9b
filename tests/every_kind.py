"""Parameters of every kind that a step treats differently, on any device."""

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dion2_lightning import Dion2


def groups_of_every_kind(device: torch.device | str) -> list[dict[str, Any]]:
    """Both selection axes and storage orders, stacks, blocks, kernels, half precision, Dion3, Dion, and AdamW.

    All weights are zero, and so are their gradients.
    """

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        parameter.grad = torch.zeros_like(parameter)
        return parameter

    def channels_last(parameter: nn.Parameter) -> nn.Parameter:
        parameter.data = parameter.data.to(memory_format=torch.channels_last)
        parameter.grad = torch.zeros_like(parameter)
        return parameter

    return [
        {"params": [zeros(40, 96), zeros(40, 96), zeros(96, 40), zeros(64, 64)]},
        {"params": [zeros(40, 96), zeros(96, 40)], "transposed": True, "orthonormalize_dtype": "float32"},
        {
            "params": [zeros(4, 96, 40)],
            "batched": True,
            "select": "output",
            "state_dtype": "float64",
            "normalize_neurons": True,
            "nesterov": True,
            "cautious_weight_decay": True,
        },
        {"params": [zeros(40, 48, dtype=torch.bfloat16)]},
        {"params": [zeros(40, 96), zeros(40, 96), zeros(40, 48, dtype=torch.bfloat16)], "algorithm": "dion"},
        {
            "params": [zeros(4, 96, 40)],
            "algorithm": "dion",
            "batched": True,
            "transposed": True,
            "cautious_weight_decay": True,
        },
        {"params": [zeros(96, 40), zeros(96, 40, dtype=torch.bfloat16)], "splits": "8 x (q 4 | k 4 | v 4)"},
        {"params": [zeros(40, 96)], "splits": "head 4*24 along inputs", "normalize_neurons": True},
        {"params": [channels_last(zeros(48, 8, 3, 3)), zeros(48, 4, 3)], "convolution": True},
        {"params": [zeros(48, 8, 3)], "convolution": True, "transposed": True, "splits": "group 4*12 along inputs"},
        {"params": [zeros(96, 40)], "splits": "8 x (q 4 | k 4 | v 4)", "algorithm": "dion"},
        {"params": [zeros(40), zeros(30, 8), zeros(40, dtype=torch.bfloat16)], "algorithm": "adamw"},
    ]


def garbage_of_a_step(optimizer: Dion2) -> int:
    """How many objects a step leaves that only the garbage collector frees."""
    gc.collect()
    gc.disable()
    try:
        optimizer.step()
        return gc.collect()
    finally:
        gc.enable()


SLICES = 3 * 40 + 64 + 2 * 40 + 4 * 96 + 40 + (3 + 4) + 2 * 3 * 32 + 4 * 24 + 48 + 4 + 4 * 12 + 3
"""How many slices the matrices above have, along the axis that is selected from; each one of Dion counts as one."""


def parameters_of(optimizer: Dion2) -> Iterator[Tensor]:
    """All parameters, in the order of the groups."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def matrices_of(optimizer: Dion2) -> Iterator[Tensor]:
    """The parameters of which slices are selected."""
    groups = (group for group in optimizer.param_groups if group["algorithm"] == "dion2")
    return (parameter for group in groups for parameter in group["params"])


def selections_of(optimizer: Dion2) -> Iterator[Tensor]:
    """What the last step selected of each matrix, or block of one."""
    for each in optimizer.observed_parameters():
        if each.observed.selected:
            selection = optimizer.selection_of(each.parameter, each.observed.matrices.name)
            assert selection is not None
            yield selection.indices


@torch.no_grad()
def fill(optimizer: Dion2, *, weights: int | None = None, gradients: int | None = None) -> None:
    """Fill weights and gradients with random numbers from these seeds, the same on every device."""
    for seed, name in ((weights, "data"), (gradients, "grad")):
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for parameter in parameters_of(optimizer):
                getattr(parameter, name).copy_(torch.randn(parameter.shape, generator=generator))
