"""Runs tests on real processes, connected by gloo or by a framework, within a time limit."""

import gc
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes
from torch.serialization import register_package

SECONDS = 90
FORKED = "forkserver"

# Before 2.13 torch cannot load to "cpu:0", which is where the Trainer loads to under DDP on CPUs.
register_package(0, lambda _: None, lambda storage, device: storage if device.startswith("cpu:") else None)

PRELOADED = [
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "transformers.trainer",
    "lightning",
    "accelerate",
    "pytest",
    "dion2_lightning.integrations.transformers",
]
"""What takes time to import. Processes are forked from a server that has done so; it has no threads, which a fork would
lose. The last one imports most of the package."""

multiprocessing.set_forkserver_preload(PRELOADED)


def run_on_ranks(
    ranks: int,
    function: Callable[..., None],
    *arguments: Any,
    seconds: float = SECONDS,
    backend: str = "gloo",
    device: str = "cpu",
) -> None:
    """Call ``function(*arguments)`` on every rank of a group; raise what a rank raised, or after the time limit.

    Ends no process but those it started.

    Args:
        ranks: How many.
        function: What each calls.
        arguments: With what.
        seconds: The time limit.
        backend: What the group communicates by.
        device: What the ranks compute on, "cpu" or "cuda"; all on one GPU.
    """
    # A forked process cannot use CUDA if its parent has as much as looked for a GPU.
    method = "spawn" if device == "cuda" else FORKED
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, str(Path(folder) / "store"), backend, device, function, arguments)
        _run(ranks, _rank_of_a_group, given, function.__name__, seconds, method)


def run_like_torchrun(
    ranks: int, function: Callable[..., None], *arguments: Any, killed: bool = False, seconds: float = SECONDS
) -> None:
    """Call ``function(*arguments)`` on new processes whose environment is torchrun's, as frameworks expect it.

    One rank has no such environment, like a plain script; the framework makes the process group, if any.

    Args:
        ranks: How many.
        function: What each calls.
        arguments: With what.
        killed: Whether the processes are to end by :func:`kill_this_process`; they must.
        seconds: The time limit.
    """
    # The parent keeps the store, like torchrun: a port that is only looked up may be taken by the time it is used.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        _run(ranks, _rank_of_a_framework, (ranks, store.port, function, arguments), function.__name__, seconds)
    except ProcessExitedException as error:
        if not killed or error.signal_name != "SIGKILL":
            raise
    else:
        assert not killed, f"{function.__name__} was to be killed, and ended by itself"


def kill_this_process() -> None:
    """End like a crash of the machine, once every rank is here: nothing is flushed, closed or destroyed."""
    if dist.is_initialized():
        dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def _run(
    ranks: int,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    name: str,
    seconds: float,
    method: str = FORKED,
) -> None:
    context = start_processes(_frozen, (target, *arguments), nprocs=ranks, join=False, start_method=method)
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} did not finish on {ranks} ranks within {seconds} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.terminate()


def _frozen(rank: int, target: Callable[..., None], *arguments: Any) -> None:
    """Call ``target``; the garbage collector leaves alone what was imported before."""
    gc.freeze()
    target(rank, *arguments)


def _rank_of_a_group(
    rank: int,
    ranks: int,
    store: str,
    backend: str,
    device: str,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def _rank_of_a_framework(
    rank: int, ranks: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    try:
        function(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
