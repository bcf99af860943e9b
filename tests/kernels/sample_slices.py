"""Slices in every memory order, and of entries whose float32 sums depend on their order."""

import torch
from torch import Tensor

PLACES = {
    "along": lambda stack: stack.clone(),
    "across": lambda stack: stack.mT.contiguous().mT,
    "neither": lambda stack: torch.zeros(2, 6, 10)[..., ::2].copy_(stack),
    "entry by entry": lambda stack: torch.zeros(6, 5, 2).permute(2, 0, 1).copy_(stack),
    "column by column": lambda stack: torch.zeros(5, 2, 6).permute(1, 2, 0).copy_(stack),
    "side by side with others": lambda stack: torch.zeros(6, 5, 3)[..., :2].permute(2, 0, 1).copy_(stack),
    "heads of inputs": lambda stack: torch.zeros(6, 2, 8)[..., :5].transpose(0, 1).copy_(stack),
}

ORDERS = {
    "rows": lambda slices: slices.contiguous(),
    "rows with gaps": lambda slices: torch.zeros(*slices.shape[:2], 2 * slices.shape[2])[..., ::2].copy_(slices),
    "columns": lambda slices: slices.mT.contiguous().mT,
    "columns with gaps": lambda slices: torch.zeros(*slices.mT.shape, 2)[..., 0].mT.copy_(slices),
}


def random_slices(place: str) -> Tensor:
    """Two matrices of 6 slices with 5 entries each."""
    return PLACES[place](torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)))


def of_many_sizes(count: int, n: int, m: int) -> Tensor:
    """Slices of entries from 1e-4 to 1e4 in many orders: what float32 sums of them differ by most."""
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(count, 1, m, generator=generator) * torch.logspace(-4, 4, m)
    orders = torch.rand(count, n, m, generator=generator).argsort(-1)
    return entries.expand(-1, n, -1).gather(-1, orders)
