"""What differs between the versions of torch that the package supports, each with the version that brought it."""

from typing import Any

import torch
import torch.distributed as dist

if dist.is_available():
    # 2.13 renamed all_gather_into_tensor, and warns of the old name.
    all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def cpu_capabilities() -> dict[str, Any]:
    """Return what the CPU can do, by name."""
    if hasattr(torch.cpu, "get_capabilities"):  # not in 2.10, which knows of AMX
        return torch.cpu.get_capabilities()
    return {"amx_bf16": torch.cpu._is_amx_tile_supported()}
