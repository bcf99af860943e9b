"""A step on a GPU never makes the host wait: it launches kernels, and may send small constants to the device.

The step runs on fake CUDA tensors, which have shapes and devices but no data, so no GPU is needed. A dispatch mode sees
every operation and refuses those that bring data to the host. Of the package's own operators it sees a call; what they
do with their arguments is run in a test of its own, up to the launch of a kernel.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_tensors import fake_tensors
from benchmarks.statistics import size_of, tensors_of
from dion2_lightning import Dion2, SelectionTracker
from dion2_lightning.algorithms import dion2_shared, shared
from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.algorithms.hyperparameters import RATES
from dion2_lightning.distributed import collectives
from dion2_lightning.kernels import triton_launch
from dion2_lightning.matrices import layout
from dion2_lightning.monitoring.history import SelectionHistory
from tests.every_kind import SLICES, groups_of_every_kind, parameters_of

aten = torch.ops.aten
Placements = tuple[Any, ...]

READS_DATA = {
    aten._local_scalar_dense.default,  # .item(), .tolist(), bool(), float(), int()
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}


class HostWaits(AssertionError):
    pass


class NoHostWait(TorchDispatchMode):
    """Refuse what makes the host wait for the device.

    Attributes:
        sent: The copies from the host to the device: how many entries each.
        collectives: How many were started.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []
        self.collectives = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if function in READS_DATA and any(is_on_device(each) for each in arguments):
            raise HostWaits(f"{function} reads from the device")
        if function in COPIES:
            self._look_at_copy(function, arguments, keywords)
        self.collectives += function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function)
        return function(*arguments, **keywords)

    def _look_at_copy(self, function: Any, arguments: Any, keywords: Any) -> None:
        source, target = arguments[0].device, keywords.get("device") or arguments[0].device
        if function is not aten._to_copy.default:
            source, target = arguments[1].device, arguments[0].device
        if source.type == target.type:
            return
        size = arguments[0].numel()
        if target.type == "cpu":
            raise HostWaits(f"{function} brings {size} entries to the host")
        self.sent.append(size)
        # A blocking copy to the device waits for everything that was launched before it.
        if not (keywords.get("non_blocking") or (len(arguments) > 2 and arguments[2])):
            raise HostWaits(f"{function} sends {size} entries to the device and waits for their arrival")


def is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


@pytest.fixture(autouse=True)
def fake_cuda() -> Iterator[None]:
    with fake_tensors():
        yield


@pytest.fixture
def ranks() -> Iterator[None]:
    """Four ranks, of which this is the second; collectives return at once."""
    import torch.distributed._tools.fake_collectives  # noqa: F401  fake tensors in c10d operations

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def optimizer_of(**settings: Any) -> Dion2:
    return Dion2(groups_of_every_kind("cuda"), lr=0.1, **settings)


def checked_step(optimizer: Dion2, process_group: dist.ProcessGroup | None = None) -> NoHostWait:
    """Take a first step, which creates the state and may wait for other ranks, and check a second one."""
    optimizer.step()
    optimizer.process_group = process_group
    # Gradients of replicas are compared once.
    optimizer._compared.update(parameter for group in optimizer.param_groups for parameter in group["params"])
    with NoHostWait() as host:
        optimizer.step()
    return host


@pytest.mark.parametrize("skip_idle_experts", [False, True])
@pytest.mark.parametrize("check_finite", [False, "skip"])
def test_a_step_on_one_device_neither_waits_nor_sends_anything(check_finite: Any, skip_idle_experts: bool) -> None:
    optimizer = optimizer_of(check_finite=check_finite, skip_idle_experts=skip_idle_experts)
    assert checked_step(optimizer).sent == []
    matrix, rest = optimizer.param_groups[0]["params"][0], optimizer.param_groups[-1]["params"][0]
    assert optimizer.state[matrix]["momentum"].device.type == "cuda"
    assert optimizer.state[rest]["step"].device.type == "cuda"
    assert optimizer.selection_of(matrix).indices.device.type == "cuda"


class OwnOperators(TorchDispatchMode):
    """Keeps the calls of the package's own operators: their names and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "dion2":
            self.calls.append((function._opname, arguments))
        return function(*arguments, **(keywords or {}))


class Launcher:
    """A kernel that is not launched."""

    def __init__(self, launched: list[str], name: str) -> None:
        self.launched, self.name = launched, name

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda table, *_, **__: self.launched.append(f"{self.name} on {table.device}")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would be launched, on a machine without CUDA."""
    triton_kernels = pytest.importorskip("dion2_lightning.kernels.triton_kernels")
    recorded: list[str] = []
    for name in ("accumulate", "take", "norm_parts", "divide", "neuron_sums", "neuron_factors", "apply"):
        monkeypatch.setattr(triton_kernels, name, Launcher(recorded, name))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    return recorded


def run_operators(calls: Sequence[tuple[str, tuple[Any, ...]]]) -> NoHostWait:
    """Do what the operators do with their arguments."""
    with NoHostWait() as host:
        for name, arguments in calls:
            triton_launch.launch(triton_launch.PASSES[name](*arguments), torch.device("cuda"))
    return host


@pytest.mark.parametrize("are_tensors", [False, True], ids=["numbers", "tensors and gates"])
def test_own_operators_send_a_table_each_and_do_not_wait(are_tensors: bool, launched: list[str]) -> None:
    settings = {"check_finite": "skip", "skip_idle_experts": True} if are_tensors else {}
    optimizer = optimizer_of(normalize_neurons=True, cautious_weight_decay=True, nesterov=True, **settings)
    optimizer.step()
    if are_tensors:
        put_rates_on_device(optimizer)
    with OwnOperators() as own:
        optimizer.step()
    assert {name for name, _ in own.calls} == set(triton_launch.PASSES)
    host = run_operators(own.calls)
    assert len(host.sent) == len(own.calls)
    assert len(launched) > len(own.calls) and all(each.endswith(" on cuda:0") for each in launched)


@pytest.mark.parametrize("wait", [lambda tensors: tensors[0].sum().item(), lambda tensors: tensors[0].cpu()])
def test_own_operators_that_wait_are_found(
    wait: Callable[[Any], Any], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def waiting(*arguments: Any) -> triton_launch.Passes:
        wait(arguments[0])
        return []

    monkeypatch.setitem(triton_launch.PASSES, "accumulate", waiting)
    with pytest.raises((HostWaits, DataDependentOutputException)):
        run_operators([("accumulate", ([torch.ones(1, 2, 3, device="cuda")],))])


def put_rates_on_device(optimizer: Dion2, dtype: torch.dtype = torch.float32) -> None:
    """Have the rates of all groups be tensors, as a step that is captured needs them."""
    for group in optimizer.param_groups:
        rates = {name: torch.zeros((), dtype=dtype, device="cuda") for name in RATES if name in group}
        group.update(rates, capturable=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"check_finite": "skip", "skip_idle_experts": True},
        {"cautious_weight_decay": True, "rounding": "nearest"},
        {"max_grad_norm": 1.0, "working_memory": 100_000},
    ],
    ids=str,
)
def test_rates_on_the_device_are_not_read(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """And a step is one that a CUDA graph could hold: nothing waits, nothing is sent, no state is replaced."""
    optimizer = optimizer_of(**settings)
    optimizer.step()
    put_rates_on_device(optimizer, dtype)
    state = [value for entries in optimizer.state.values() for value in entries.values()]
    for _ in range(2):
        with NoHostWait() as host:
            optimizer.step()
        assert host.sent == []
    found = [value for entries in optimizer.state.values() for value in entries.values()]
    assert all(one is other for one, other in zip(state, found, strict=True))


def test_rates_on_the_device_are_not_read_by_adamw_without_a_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dion2_lightning.algorithms.adamw._is_fused", lambda _: False)
    optimizer = Dion2(groups_of_every_kind("cuda")[-1:], lr=0.1, capturable=True)
    optimizer.step()
    put_rates_on_device(optimizer)
    with NoHostWait() as host:
        optimizer.step()
    assert host.sent == []
    assert {entries["step"].device.type for entries in optimizer.state.values()} == {"cuda"}


def test_numbers_are_made_once_for_each_group_and_scale() -> None:
    """However many matrices there are: a launch costs as much as a small product."""
    launches = []
    for count in (1, 20):
        parameters = [nn.Parameter(torch.zeros(40, 96, device="cuda")) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = Dion2([{"params": parameters}], lr=0.1)
        optimizer.step()
        put_rates_on_device(optimizer)
        with CountedNumbers() as counted:
            optimizer.step()
        launches.append(counted.launches)
    assert launches[0] == launches[1] > 0


class CountedNumbers(TorchDispatchMode):
    """Count what is calculated of 0-d tensors on the device alone."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        self.launches += is_on_device(result) and result.ndim == 0
        return result


@pytest.mark.parametrize("rate", RATES[:3])
def test_a_rate_that_is_read_is_detected(rate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(context: StepContext, value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) else value

    optimizer = optimizer_of()
    optimizer.step()
    for group in optimizer.param_groups:
        if rate in group:
            group.update({rate: torch.zeros((), device="cuda"), "capturable": True})
    monkeypatch.setattr(StepContext, "number", read)
    with pytest.raises(HostWaits), NoHostWait():
        optimizer.step()


@pytest.mark.parametrize(("left_on", "groups"), [("cpu", slice(None)), ("cuda", slice(-1, None))], ids=["cpu", "cuda"])
def test_the_state_follows_its_parameter(left_on: str, groups: slice) -> None:
    """``model.to(device)`` moves parameters alone, Lightning moments as well, but no step counts."""
    optimizer = Dion2(groups_of_every_kind("cuda" if left_on == "cpu" else "cpu")[groups], lr=0.1)
    optimizer.step()
    for state in optimizer.state.values():
        for name, tensor in state.items():
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=left_on)
    optimizer.step()
    for parameter, state in optimizer.state.items():
        assert {tensor.device for tensor in state.values()} == {parameter.device}


def test_counters_follow_their_parameters() -> None:
    optimizer = Dion2([nn.Parameter(torch.zeros(40, 96, device="cuda"))], lr=0.1)
    tracker = SelectionTracker()
    tracker.attach(optimizer)
    [parameter] = optimizer.param_groups[0]["params"]
    for device in ("cuda", "cpu", "cuda"):
        parameter.fake_device, optimizer.state[parameter] = torch.zeros((), device=device).device, {}
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        kept = tensors_of(tracker, apart_from=[optimizer, parameter])
        assert {each.device.type for each in kept if each.dtype == torch.int32} == {device}


@pytest.mark.parametrize(("check_finite", "skip_idle_experts"), [(False, False), ("skip", False), (False, True)])
@pytest.mark.parametrize("share_replicas", [True, False, None])
@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
def test_a_step_on_replicas_does_not_wait(
    ranks: None, tensors: bool, share_replicas: bool | None, check_finite: Any, skip_idle_experts: bool
) -> None:
    """Each algorithm sends one constant to the device, the header of an all-reduce: a checksum, and a flag a block."""
    optimizer = optimizer_of(
        share_replicas=share_replicas, check_finite=check_finite, skip_idle_experts=skip_idle_experts
    )
    if tensors:
        optimizer.step()
        put_rates_on_device(optimizer)
    sent = checked_step(optimizer, dist.group.WORLD).sent
    selected = [each.observed.selected > 0 for each in optimizer.observed_parameters()]
    assert sent == ([] if share_replicas is False else [selected.count(True) + 1, selected.count(False) + 1])


# Shards


class FakeReads:
    """Replaces ``read_together``, the only place where a step on shards may copy something to the host.

    Fake tensors have no data, so it returns a possible result: each rank has every gradient, and the first slices
    have the largest norms.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.calls += 1
        with unset_fake_temporarily():
            return [header(len(each)) if each.ndim == 1 else first(each.shape) for each in tensors]


def header(size: int) -> Tensor:
    return torch.full((size,), 4)


def first(shape: torch.Size) -> Tensor:
    return torch.arange(shape[1]).expand(shape).contiguous()


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function work on real tensors, on the host."""

    def with_real_tensors(*arguments: Any, **keywords: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments, **keywords)

    return with_real_tensors


class OnHost:
    """A real tensor that can only be indexed, narrowed and read."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, key: Any) -> "OnHost":
        return OnHost(on_host(self._tensor.__getitem__)(key))

    def narrow(self, dim: int, start: int, length: int) -> "OnHost":
        return OnHost(on_host(self._tensor.narrow)(dim, start, length))

    def tolist(self) -> Any:
        return on_host(self._tensor.tolist)()


@pytest.fixture
def reads(ranks: None, monkeypatch: pytest.MonkeyPatch) -> FakeReads:
    """Let optimizers step on fake shards."""
    reads = FakeReads()
    monkeypatch.setattr("dion2_lightning.distributed.overlap.read_together", reads)
    edges = on_host(dion2_shared._edges)
    monkeypatch.setattr("dion2_lightning.algorithms.dion2_shared._edges", lambda *read: OnHost(edges(*read)))
    monkeypatch.setattr(collectives, "_agree", lambda header, *_: (header == header).all())
    refuse = collectives.refuse_disagreement
    of_host = on_host(refuse)
    monkeypatch.setattr(
        shared,
        "refuse_disagreement",
        lambda header, *others: (of_host if header.device.type == "cpu" else refuse)(header, *others),
    )
    monkeypatch.setattr(shared, "_with_gradient", on_host(shared._with_gradient))
    monkeypatch.setattr("dion2_lightning.matrices.parts.layout_of", on_host(layout.layout_of))
    monkeypatch.setattr("dion2_lightning.optimizer.check_agreement", lambda *_: None)  # waits, at the first step
    return reads


def mesh_of(placements: Placements) -> DeviceMesh:
    with unset_fake_temporarily():
        ranks = torch.arange(4).view([4] if len(placements) == 1 else [2, 2])
        return DeviceMesh("cuda", ranks, mesh_dim_names=("first", "second")[: len(placements)])


def spread(mesh: DeviceMesh, placements: Placements, *shape: int) -> nn.Parameter:
    """A parameter on four ranks, with a gradient."""
    part = list(shape)
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            part[placement.dim] //= mesh.size(dim)
    stride = torch.empty(shape, device="meta").stride()

    def zeros() -> DTensor:
        local = torch.zeros(part, device="cuda")
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    parameter = nn.Parameter(zeros())
    parameter.grad = zeros()
    return parameter


@pytest.mark.parametrize(
    ("placements", "shapes", "waits"),
    [
        ((Shard(0),), [(40, 96), (40, 96), (96, 40), (64, 64)], 1),  # ranks hold different slices of the wide matrices
        ((Shard(1),), [(40, 96), (40, 96), (64, 64)], 0),  # ranks hold parts of the same slices
        ((Shard(0),), [(96, 40), (96, 40)], 0),
        ((Shard(1),), [(96, 40), (40, 96), (96, 40)], 1),
        ((Replicate(), Shard(0)), [(40, 96), (96, 40)], 1),
        ((Replicate(), Shard(1)), [(40, 96), (64, 64)], 0),
        ((Shard(0), Shard(1)), [(40, 96), (96, 40)], 1),
        ((Replicate(), Replicate()), [(40, 96), (96, 40)], 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("check_finite", [False, "skip"])
def test_a_step_on_shards_waits_once_at_most(
    reads: FakeReads, placements: Placements, shapes: list[tuple[int, int]], waits: int, check_finite: Any
) -> None:
    """Once for all matrices and precisions together, and only where ranks hold different slices."""
    mesh = mesh_of(placements)
    precisions = ("float32", "bfloat16")
    groups = [
        {"params": [spread(mesh, placements, *shape) for shape in shapes], "orthonormalize_dtype": dtype}
        for dtype in precisions
    ]
    optimizer = Dion2(groups, lr=0.1, share_replicas=True, check_finite=check_finite)
    optimizer.step()
    assert reads.calls == waits
    with NoHostWait() as host:
        optimizer.step()
    assert reads.calls == 2 * waits
    matrices = len(precisions) * len(shapes)
    assert host.sent == [matrices + 1]


@pytest.mark.parametrize("placements", [(Shard(1),), (Shard(2),), (Replicate(), Shard(1))], ids=str)
def test_idle_experts_cost_no_wait_and_no_message(reads: FakeReads, placements: Placements) -> None:
    """Their numbers of gradient entries are in the message with the norms."""
    mesh = mesh_of(placements)
    seen = []
    for skip_idle_experts in (False, True):
        groups = [
            {"params": [spread(mesh, placements, 4, 40, 96)], "batched": True, "algorithm": algorithm}
            for algorithm in ("dion2", "dion3")
        ]
        optimizer = Dion2(groups, lr=0.1, share_replicas=True, skip_idle_experts=skip_idle_experts)
        optimizer.step()
        reads.calls = 0
        with NoHostWait() as host:
            optimizer.step()
        seen.append((reads.calls, host.sent, host.collectives))
    assert seen[0] == seen[1]
    assert seen[0][2] > 0


# Tracking


class CountedCopies(TorchFunctionMode):
    """Let ``Tensor.cpu`` copy to the host, where all values are 1, and count the copies."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is not Tensor.cpu or not is_on_device(arguments[0]):
            return function(*arguments, **(keywords or {}))
        self.calls += 1
        shape = arguments[0].shape
        return OnHost(on_host(torch.ones)(shape, dtype=torch.float64))


def check_cost_of_tracking(
    optimizer: Dion2,
    monkeypatch: pytest.MonkeyPatch,
    *,
    slices: int,
    collectives: int,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """What a tracker adds: nothing to a step; to popped metrics one copy to the host, and some collectives.

    Once metrics are popped, it keeps two integers per slice on the device, and nothing else there.
    """
    append = on_host(SelectionHistory.append)
    monkeypatch.setattr(
        SelectionHistory, "append", lambda self, *given: append(self, *given[:2], *(each._tensor for each in given[2:]))
    )
    alone = checked_step(optimizer, process_group)
    tracker = SelectionTracker(every=2, orthogonality=True)
    tracker.attach(optimizer)
    for step in range(1, 5):
        is_due = step % 2 == 0
        with NoHostWait() as host:
            optimizer.step()
        assert (host.sent, host.collectives) == (alone.sent, alone.collectives)
        with CountedCopies() as copies, NoHostWait() as host:
            assert (tracker.pop_metrics() is not None) == is_due
        assert (copies.calls, host.collectives) == ((1, collectives) if is_due else (0, 0))
        kept = tensors_of(tracker, apart_from=[optimizer, *parameters_of(optimizer)])
        assert size_of(each for each in kept if is_on_device(each)) == 2 * slices * torch.int32.itemsize


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_tracking_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    check_cost_of_tracking(optimizer_of(), monkeypatch, slices=SLICES, collectives=0)


def test_tracking_on_replicas(ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas measure the updates of different matrices, so the metrics take a collective."""
    optimizer = optimizer_of(share_replicas=True)
    check_cost_of_tracking(optimizer, monkeypatch, slices=SLICES, collectives=1, process_group=dist.group.WORLD)


@pytest.mark.parametrize(
    "placements", [(Shard(0),), (Shard(1),), (Replicate(), Shard(0)), (Shard(0), Shard(1))], ids=str
)
def test_tracking_on_shards(reads: FakeReads, monkeypatch: pytest.MonkeyPatch, placements: Placements) -> None:
    mesh = mesh_of(placements)
    parameters = [spread(mesh, placements, *shape) for shape in ((40, 96), (96, 40), (64, 64))]
    check_cost_of_tracking(Dion2([{"params": parameters}], lr=0.1), monkeypatch, slices=40 + 40 + 64, collectives=1)
    assert reads.calls in (0, 6)  # one read for each step, or none


# State on the host


class Visits(NoHostWait):
    """Let state in pinned memory come from and go to the host without waiting, and follow what of it is on the device.

    Attributes:
        most: The most bytes of it that were on the device at once.
        returned: How many entries came back.
    """

    def __init__(self, optimizer: Dion2) -> None:
        super().__init__()
        self._pinned = {storage_of(tensor) for tensor in offloaded_state(optimizer)}
        self._present: dict[StorageWeakRef, int] = {}
        self.most = self.returned = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = super().__torch_dispatch__(function, types, arguments, keywords)
        if function is aten._to_copy.default and storage_of(arguments[0]) in self._pinned and is_on_device(result):
            self._present[storage_of(result)] = result.nbytes
        self._present = {storage: size for storage, size in self._present.items() if not storage.expired()}
        self.most = max(self.most, sum(self._present.values()))
        return result

    def _look_at_copy(self, function: Any, arguments: Any, keywords: Any) -> None:
        if function is aten.copy_.default and storage_of(arguments[0]) in self._pinned:
            assert arguments[2:] == (True,)  # non_blocking
            assert storage_of(arguments[1]) in self._present
            self.returned += arguments[1].numel()
        else:
            super()._look_at_copy(function, arguments, keywords)


def storage_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def offloaded_state(optimizer: Dion2) -> list[Tensor]:
    """What this rank has of the state, apart from numbers."""
    everything = (tensor for state in optimizer.state.values() for tensor in state.values())
    return [layout.local(tensor) for tensor in everything if tensor.ndim]


class FakeStream:
    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"

    def record_event(self) -> None:
        pass

    wait_event = wait_stream = staticmethod(lambda _: None)


@pytest.fixture
def devices_seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Give fake CUDA devices fake streams; return on which devices functions of the algorithms see the state."""
    monkeypatch.setattr("dion2_lightning.offload.is_pinned", lambda _: True)
    for name, replaced in (
        ("Stream", FakeStream),
        ("current_stream", FakeStream),
        ("stream", contextlib.nullcontext),
        ("synchronize", FakeStream),
    ):
        monkeypatch.setattr(torch.cuda, name, replaced)
    seen: dict[str, set[str]] = {}

    def spy_on(place: str, state_of: Callable[..., list[Tensor]]) -> None:
        module, name = place.rsplit(".", 1)
        function = getattr(sys.modules[f"dion2_lightning.algorithms.{module}"], name)

        def spy(*arguments: Any) -> Any:
            seen.setdefault(place, set()).update(tensor.device.type for tensor in state_of(*arguments))
            return function(*arguments)

        monkeypatch.setattr(f"dion2_lightning.algorithms.{place}", spy)

    def state_of_updates(updates: Any, *_: Any) -> list[Tensor]:
        return [tensor for update in updates for name, tensor in update.state.items() if name != "step"]

    for place in ("dion2.accumulate_and_sum", "dion2_shared.accumulate_and_sum", "dion.accumulate"):
        spy_on(place, state_of_updates)
    spy_on("adamw._adamw", lambda pieces, *_: [*pieces.exp_avgs, *pieces.exp_avg_sqs])
    return seen


@pytest.mark.parametrize("working_memory", [None, 2**18, 1])
@pytest.mark.parametrize("check_finite", [False, "skip"])
def test_offloaded_state_visits_the_device(
    devices_seen: dict[str, set[str]], check_finite: Any, working_memory: int | None
) -> None:
    """It is on the host before and after a step, and on the device within; nobody waits."""
    optimizer = optimizer_of(check_finite=check_finite, working_memory=working_memory, offload="cpu")
    optimizer.step()
    before = offloaded_state(optimizer)
    assert {tensor.device.type for tensor in before} == {"cpu"}
    with Visits(optimizer) as host:
        optimizer.step()
    assert [storage_of(each) for each in offloaded_state(optimizer)] == [storage_of(each) for each in before]
    assert {name: seen for name, seen in devices_seen.items() if "shared" not in name} == {
        "dion2.accumulate_and_sum": {"cuda"},
        "dion.accumulate": {"cuda"},
        "adamw._adamw": {"cuda"},
    }
    sizes = [tensor.numel() for tensor in before]
    assert sorted(host.sent) == sorted(sizes)
    assert host.returned == sum(sizes)
    of_parameters = [size_of(tensor for tensor in state.values() if tensor.ndim) for state in optimizer.state.values()]
    assert host.most <= max((working_memory or 2**28) // 2, *of_parameters)
    if working_memory is None:
        assert host.most == sum(of_parameters)
    left = filter(is_on_device, tensors_of(optimizer, apart_from=[*parameters_of(optimizer)]))
    assert all(each.ndim == 0 or each.dtype == torch.int64 for each in left)  # counts of steps, and what was selected


def test_the_next_state_comes_while_a_step_works_on_the_present_one(devices_seen: dict[str, set[str]]) -> None:
    """Where both have room; one that takes more than half of it comes alone."""
    shapes, memory = [(40, 96)] * 4 + [(96, 160)], 4 * 40 * 96 * 4
    parameters = [nn.Parameter(torch.zeros(shape, device="cuda")) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = Dion2(parameters, lr=0.1, working_memory=memory, offload="cpu")
    optimizer.step()
    sent: list[int] = []
    host = Visits(optimizer)

    def orthonormalize(stack: Tensor) -> Tensor:
        sent.append(len(host.sent))
        return stack

    optimizer.orthonormalize = orthonormalize
    with host:
        optimizer.step()
    assert sent == [2, 3, 4, 4, 5]


@pytest.mark.parametrize("placements", [(Shard(0),), (Replicate(), Shard(1)), (Replicate(), Replicate())], ids=str)
@pytest.mark.parametrize("working_memory", [None, 1])
def test_offloaded_state_of_shards(
    reads: FakeReads, devices_seen: dict[str, set[str]], placements: Placements, working_memory: int | None
) -> None:
    """The state is placed as the parameter is, on its mesh of GPUs, and this rank's part of it is on the host."""
    mesh = mesh_of(placements)
    matrices, rest = [spread(mesh, placements, 40, 96) for _ in range(2)], [spread(mesh, placements, 40, 96)]
    groups = [{"params": matrices, "normalize_neurons": True}, {"params": rest, "algorithm": "adamw"}]
    optimizer = Dion2(groups, lr=0.1, share_replicas=True, working_memory=working_memory, offload="cpu")
    optimizer.step()
    with Visits(optimizer):
        optimizer.step()
    assert devices_seen.keys() == {"dion2_shared.accumulate_and_sum", "adamw._adamw"}
    assert set().union(*devices_seen.values()) == {"cuda"}
    assert reads.calls == (2 if Shard(0) in placements else 0) * (1 if working_memory is None else 2)
    for parameter in parameters_of(optimizer):
        for name, tensor in optimizer.state[parameter].items():
            if name != "step":
                assert (tensor.device.type, tensor.to_local().device.type) == ("cpu", "cpu")
                assert tensor.device_mesh == mesh
                assert tensor.placements == (placements if name != "variance" else (Replicate(),) * len(placements))


@pytest.mark.parametrize("offload", ["cpu", None])
def test_state_follows_the_argument(devices_seen: dict[str, set[str]], offload: Any) -> None:
    optimizer = optimizer_of(offload="cpu" if offload is None else None)
    optimizer.step()
    optimizer.offload = offload
    optimizer.step()
    assert {tensor.device.type for tensor in offloaded_state(optimizer)} == {"cuda" if offload is None else "cpu"}


def test_what_is_loaded_goes_to_the_host_alone(devices_seen: dict[str, set[str]]) -> None:
    optimizers = [optimizer_of(offload=offload) for offload in (None, "cpu")]
    for optimizer in optimizers:
        optimizer.step()
    saved = optimizers[0].state_dict()
    with FollowsNew() as made:
        optimizers[1].load_state_dict(saved)
    assert {tensor.device.type for tensor in offloaded_state(optimizers[1])} == {"cpu"}
    assert max(made.sizes, default=0) == 1


class FollowsNew(TorchDispatchMode):
    """Notes how many entries each new tensor on the device has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if is_on_device(result) and not any(result is each for each in arguments):
            self.sizes.append(result.numel())
        return result


# The detector


def item(stack: Tensor) -> Tensor:
    return stack * stack.sum().item()


def tolist(stack: Tensor) -> Tensor:
    return stack * stack.sum((0, 1)).tolist()[0]


def to_bool(stack: Tensor) -> Tensor:
    return -stack if stack.sum() > 0 else stack


def to_host(stack: Tensor) -> Tensor:
    stack.sum().cpu()
    return stack


def to_host_without_waiting(stack: Tensor) -> Tensor:
    stack.sum().to(torch.device("cpu"), non_blocking=True)
    return stack


def copied_to_host(stack: Tensor) -> Tensor:
    torch.empty(stack.shape).copy_(stack)
    return stack


def blocking_constant(stack: Tensor) -> Tensor:
    return stack * torch.tensor([1.0], device="cuda")


@pytest.mark.parametrize(
    "orthonormalize",
    [item, tolist, to_bool, to_host, to_host_without_waiting, copied_to_host, blocking_constant],
    ids=lambda orthonormalize: orthonormalize.__name__,
)
def test_the_detector_detects(orthonormalize: Callable[[Tensor], Tensor]) -> None:
    optimizer = optimizer_of()
    optimizer.step()
    optimizer.orthonormalize = orthonormalize
    with pytest.raises(HostWaits), NoHostWait():
        optimizer.step()


def test_check_finite_waits_and_is_detected() -> None:
    optimizer = optimizer_of()
    optimizer.step()
    optimizer.param_groups[0]["check_finite"] = True
    with pytest.raises(HostWaits), NoHostWait():
        optimizer.step()
