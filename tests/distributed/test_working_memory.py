"""What a step on shared matrices takes beside weights, gradients and state."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dion2_lightning import Dion2
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import place
from tests.every_kind import garbage_of_a_step

SHAPE, COUNT, FRACTION = (512, 512), 16, 0.25


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made in a ``with`` block.

    Attributes:
        peak: The most that were there at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in tensors_in((arguments, keywords))}
        result = function(*arguments, **(keywords or {}))
        for each in tensors_in(result):
            storage = each.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def tensors_in(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if type(each) in (Tensor, nn.Parameter)]


def peak_of_a_step(mesh: DeviceMesh, working_memory: int) -> int:
    """The most bytes that the second step takes, on this rank."""

    def random() -> Tensor:
        return place(torch.randn(SHAPE), mesh, (Shard(0),))

    parameters = [nn.Parameter(random()) for _ in range(COUNT)]
    optimizer = Dion2(parameters, fraction=FRACTION, orthonormalize_dtype="bfloat16", working_memory=working_memory)
    live = LiveBytes()
    for parameter in parameters:
        parameter.grad = random()
    optimizer.step()
    with live:
        optimizer.step()
    return live.peak


def check_peaks() -> None:
    """Of 24 bytes for an entry that a rank owns, 16 of work and 8 in flight, a third is enough if it has to be."""
    mesh = init_device_mesh("cpu", (2,))
    entries = int(COUNT * SHAPE[0] * SHAPE[1] * FRACTION) // dist.get_world_size()
    third = 24 * entries // 3
    assert peak_of_a_step(mesh, working_memory=third) <= third < peak_of_a_step(mesh, working_memory=4 * third)


def peak_of_dion(parameters: list[Tensor], working_memory: int, **settings: Any) -> int:
    """The same of Dion."""
    optimizer = Dion2([{"params": parameters, "algorithm": "dion"}], working_memory=working_memory, **settings)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    with LiveBytes() as live:
        optimizer.step()
    return live.peak


def check_garbage() -> None:
    """Python collects none in a step: what it left would stay."""
    mesh = init_device_mesh("cpu", (2,))
    for algorithm in ("dion2", "dion3", "dion"):
        for placement in (Shard(0), Replicate()):
            parameters = [nn.Parameter(place(torch.randn(64, 32), mesh, (placement,))) for _ in range(3)]
            optimizer = Dion2([{"params": parameters, "algorithm": algorithm}], share_replicas=True)
            for parameter in parameters:
                parameter.grad = place(torch.randn(64, 32), mesh, (placement,))
            for _ in range(2):  # the first imports
                optimizer.step()
            assert garbage_of_a_step(optimizer) == 0, (algorithm, placement)


def check_dion() -> None:
    """P and R of all matrices are several times as much as is allowed."""
    memory, mesh = 4 * 2**20, init_device_mesh("cpu", (2,))
    for shape in ((256, 256), (1024, 64), (64, 1024)):
        replicas = [nn.Parameter(torch.randn(shape)) for _ in range(100)]
        shards = [nn.Parameter(place(torch.randn(shape), mesh, (Shard(0),))) for _ in range(100)]
        ddp: dict[str, Any] = {"process_group": dist.group.WORLD, "share_replicas": True}
        for parameters, settings in ((replicas, ddp), (shards, {})):
            assert peak_of_dion(parameters, memory, **settings) <= memory
            assert peak_of_dion(parameters, 2**40, **settings) > 2 * memory


def test_buckets_keep_to_the_working_memory() -> None:
    run_on_ranks(2, check_peaks)


def test_dion_keeps_to_the_working_memory() -> None:
    run_on_ranks(2, check_dion)


def test_a_step_leaves_no_garbage() -> None:
    run_on_ranks(2, check_garbage)
