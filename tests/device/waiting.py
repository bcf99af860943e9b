"""What torch itself says of a host that waits for a GPU."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Let torch raise an error where the host waits for the device; a CPU has nothing to wait for."""
    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
