"""Torch's own detector of a host that waits for a GPU."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """Raise an error where the host waits for a GPU; do nothing on a CPU."""
    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
