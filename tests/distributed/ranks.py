"""Real processes for the tests: spawned, connected by gloo, ended within a time limit."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

SECONDS = 90

# Processes are forked from a server that has imported what takes seconds, and has no threads that a fork would lose.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "transformers"])


def run_on_ranks(ranks: int, function: Callable[..., None], *arguments: Any, seconds: float = SECONDS) -> None:
    """Call ``function(*arguments)`` on every rank of a gloo group; raise what a rank raised, or after the time limit.

    Ends no process but those it started.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        context = start_processes(
            _rank, (ranks, store, function, arguments), nprocs=ranks, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} did not finish on {ranks} ranks within {seconds} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.terminate()


def _rank(rank: int, ranks: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
