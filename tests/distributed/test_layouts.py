"""One result, whatever the layout: the same global gradients on one process and on every layout, for 20 steps.

Every rank also trains the whole model by itself, with plain parameters and no group, and compares its part of
every layout: momenta and selected indices bit for bit at every step, weights and variances within 1e-5; in bfloat16,
and where torch is asked for deterministic algorithms, those of matrices bit for bit too.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from dion2_lightning import Dion2
from dion2_lightning.algorithms import dion2_shared
from dion2_lightning.kernels.selection import Selection
from dion2_lightning.matrices.layout import local
from tests.distributed.ranks import run_on_ranks

STEPS = 20
DION3 = {"select": "output", "normalize_neurons": True}
"""In a Dion2 group: the same update, in the same messages as the others'."""
MATRICES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "odd": ((37, 53), {}),
    "odd tall": ((53, 37), {}),
    "few rows": ((3, 64), {}),
    "few columns": ((64, 3), {}),
    "wide": ((24, 96), {}),
    "wide twin": ((24, 96), {}),
    "tall": ((96, 24), {}),
    "square": ((16, 16), {}),
    "square stored (in, out)": ((16, 16), {"transposed": True}),
    "stored (in, out)": ((20, 60), {"transposed": True}),
    "row": ((1, 9), {}),
    "half": ((30, 40), {"fraction": 0.5, "lr": 0.05}),
    "Dion3": ((37, 53), {**DION3, "nesterov": True}),
    "neurons of selected inputs": ((53, 37), {"normalize_neurons": True, "cautious_weight_decay": True}),
    "q|k|v": ((30, 14), {"splits": "q 15 | k 8 | v 7", "cautious_weight_decay": True}),
    "interleaved": ((24, 10), {"splits": "4 x (q 2 | k 2 | v 2)", "normalize_neurons": True}),
    "interleaved heads": ((24, 10), {"splits": "3 x (q 2*2 | k 1*2 | v 1*2)"}),
    "every second output, stored (in, out)": ((10, 26), {"splits": "13 x (gate 1 | up 1)", "transposed": True}),
    "interleaved outputs, stored (in, out)": ((6, 24), {"splits": "2 x (q 8 | k 4)", "transposed": True}),
    "heads of inputs": ((10, 24), {"splits": "head 4*6 along inputs", **DION3}),
    "kernel, selected channels": ((40, 4, 3), {"convolution": True, "normalize_neurons": True}),
    "kernel, transposed": ((4, 10, 3), {"convolution": True, "transposed": True}),
    "kernel in groups": ((24, 3, 3), {"convolution": True, "splits": "group 4*6"}),
}
STACKS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "experts": ((5, 12, 20), {"batched": True}),
    "experts stored (in, out)": ((4, 12, 20), {"batched": True, "transposed": True}),
    "Dion3's experts, stored (in, out)": (
        (5, 20, 12),
        {"batched": True, "transposed": True, **DION3, "nesterov": True, "cautious_weight_decay": True},
    ),
    "experts' gate|up": ((5, 12, 20), {"batched": True, "splits": "gate 6 | up 6", "normalize_neurons": True}),
    "experts' every second output, stored (in, out)": (
        (4, 12, 20),
        {"batched": True, "transposed": True, "splits": "10 x (gate 1 | up 1)"},
    ),
    "experts' every second output, more of them than inputs": (
        (4, 20, 8),
        {"batched": True, "splits": "10 x (gate 1 | up 1)"},
    ),
}
ADAMW: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "bias": ((37,), {}),
    "embedding": ((29, 6), {"cautious_weight_decay": True}),
}


@dataclass(frozen=True)
class Case:
    """A mesh and the placements of matrices, stacks and the rest on it."""

    mesh: tuple[int, ...]
    placements: tuple[Any, ...]
    stacks: tuple[Any, ...] | None = None
    rest: tuple[Any, ...] | None = None
    order: tuple[int, ...] | None = None

    @property
    def has_replicas(self) -> bool:
        return Replicate() in self.placements


CASES = {
    "FSDP2 on 2": Case((2,), (Shard(0),)),
    "FSDP2 on 3": Case((3,), (Shard(0),)),
    "FSDP2 on 4": Case((4,), (Shard(0),)),
    "FSDP2 on 2, stacks by rows": Case((2,), (Shard(0),), stacks=(Shard(1),)),
    "HSDP 2 x 2": Case((2, 2), (Replicate(), Shard(0))),
    "HSDP 2 x 2, by columns": Case(
        (2, 2), (Replicate(), Shard(1)), stacks=(Replicate(), Shard(2)), rest=(Replicate(),) * 2
    ),
    # Stacks by rows: torch itself gathers what is spread over experts in the order of the ranks, not of the mesh.
    "HSDP 2 x 2, ranks in another order": Case(
        (2, 2), (Replicate(), Shard(0)), stacks=(Replicate(), Shard(1)), order=(0, 3, 2, 1)
    ),
    "TP on 2, column-wise": Case((2,), (Shard(0),), stacks=(Shard(2),), rest=(Replicate(),)),
    "TP on 2, row-wise": Case((2,), (Shard(1),), stacks=(Shard(2),), rest=(Replicate(),)),
    "FSDP2 x TP 2 x 2, column-wise": Case(
        (2, 2), (_StridedShard(0, split_factor=2), Shard(0)), stacks=(Shard(0), Shard(1)), rest=(Shard(0), Replicate())
    ),
    "FSDP2 x TP 2 x 2, row-wise": Case(
        (2, 2), (Shard(0), Shard(1)), stacks=(Shard(0), Shard(2)), rest=(Shard(0), Replicate())
    ),
    "replicated on 2": Case((2,), (Replicate(),)),
    "experts shared out on 2, replicated on 2": Case(
        (2, 2), (Replicate(), Replicate()), stacks=(Shard(0), Replicate())
    ),
}


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that is placed like another one."""
    if not isinstance(like, DTensor):
        return whole.clone()
    shape, offset = compute_local_shape_and_global_offset(whole.shape, like.device_mesh, like.placements)
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
    return whole.clone()


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, outside the graph."""
    return local(tensor).detach()


def place(whole: Tensor, mesh: Any, placements: tuple[Any, ...]) -> DTensor:
    """Distribute a tensor without communication: every rank has all of it and keeps its part."""
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    part = whole
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        part = part.narrow(dim, min(start, part.shape[dim]), size)
    part = part.clone()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def groups_of(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """A group for each matrix, and for each of the rest, some with their own settings."""
    kinds = {**MATRICES, **STACKS}
    groups = [{"params": [(name, parameters[name])], "name": name, **settings} for name, (_, settings) in kinds.items()]
    rest = [
        {"params": [(name, parameters[name])], "name": name, "algorithm": "adamw", **settings}
        for name, (_, settings) in ADAMW.items()
    ]
    return [*groups, *rest]


def whole_tensors(seed: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape for name, (shape, _) in {**MATRICES, **STACKS, **ADAMW}.items()}
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}


def sharded(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    names = ("first", "second", "third")[: len(case.mesh)]
    ranks = torch.tensor(case.order or range(math.prod(case.mesh))).view(case.mesh)
    mesh = DeviceMesh(device, ranks, mesh_dim_names=names)
    placements = {
        **dict.fromkeys(MATRICES, case.placements),
        **dict.fromkeys(STACKS, case.stacks or case.placements),
        **dict.fromkeys(ADAMW, case.rest or case.placements),
    }
    start = whole_tensors(seed=0, device=device)
    return {name: as_parameter(place((0.1 * whole).to(dtype), mesh, placements[name])) for name, whole in start.items()}


def as_parameter(tensor: DTensor) -> nn.Parameter:
    """``nn.Parameter(tensor)`` without its detach(), which torch 2.15 plans for 0.1 s a shape on three dimensions."""
    tensor.requires_grad_()._is_param = True
    assert isinstance(tensor, nn.Parameter)
    return tensor


def whole_parameters(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter((0.1 * whole).to(dtype)) for name, whole in whole_tensors(seed=0, device=device).items()}


def train_and_compare(
    parameters: dict[str, nn.Parameter], steps: int = STEPS, state_dtype: str | None = None, **settings: Any
) -> None:
    """Train these and plain parameters; compare momenta and selections at every step, weights at the end."""
    device, dtype = parameters["odd"].device.type, parameters["odd"].dtype
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    alone = trained_alone(device, dtype, state_dtype, is_deterministic)
    tolerance = 0.0 if dtype == torch.bfloat16 or is_deterministic else 1e-5
    optimizer = optimizer_of(parameters, state_dtype=state_dtype, **settings)
    for step in range(steps):
        set_gradients(parameters, step)
        optimizer.step()
        for name, state in alone.after(step).states.items():
            compare_step(name, parameters[name], optimizer, state, tolerance)
    for name, whole in alone.after(steps - 1).weights.items():
        parameter = parameters[name]
        expected = part_of(whole, parameter)
        found = local_part(parameter)
        # torch's own AdamW rounds the last entries of a tensor otherwise than the others, in float32.
        its_tolerance = 1e-5 if name in ADAMW and dtype == torch.float32 else tolerance
        assert torch.linalg.norm(found - expected) <= its_tolerance * torch.linalg.norm(expected), name


def optimizer_of(parameters: dict[str, nn.Parameter], **settings: Any) -> Dion2:
    return Dion2(groups_of(parameters), lr=0.02, weight_decay=0.1, orthonormalize_dtype="float32", **settings)


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Give each parameter its part of the same gradient."""
    for name, whole in whole_tensors(seed=100 + step, device=parameters["odd"].device).items():
        parameter = parameters[name]
        gradient = whole.to(parameter.dtype)
        is_placed = isinstance(parameter, DTensor)
        parameter.grad = place(gradient, parameter.device_mesh, parameter.placements) if is_placed else gradient


class Expected(NamedTuple):
    """State of a whole matrix, and its selections by block."""

    momentum: Tensor
    variance: Tensor | None
    selections: dict[str, Selection | None]


class Trained(NamedTuple):
    """What steps have made of whole tensors, by name."""

    weights: dict[str, Tensor]
    states: dict[str, Expected]


class ReferenceTraining:
    """Plain parameters without a group, trained as far as layouts have been compared with them."""

    def __init__(self, device: str, dtype: torch.dtype, state_dtype: str | None) -> None:
        self.parameters = whole_parameters(device, dtype)
        self.optimizer = optimizer_of(self.parameters, state_dtype=state_dtype)
        self.trained: list[Trained] = []

    def after(self, step: int) -> Trained:
        """What they are after a step, counted from 0."""
        while len(self.trained) <= step:
            set_gradients(self.parameters, len(self.trained))
            self.optimizer.step()
            weights = {name: each.detach().clone() for name, each in self.parameters.items()}
            states = {name: expected_of(self.parameters[name], self.optimizer) for name in {**MATRICES, **STACKS}}
            self.trained.append(Trained(weights, states))
        return self.trained[step]


@cache
def trained_alone(
    device: str, dtype: torch.dtype, state_dtype: str | None, is_deterministic: bool
) -> ReferenceTraining:
    """One for each of these; ``deterministic`` is what torch has been asked for."""
    return ReferenceTraining(device, dtype, state_dtype)


def expected_of(whole: Tensor, optimizer: Dion2) -> Expected:
    state = {name: tensor.clone() for name, tensor in optimizer.state[whole].items()}
    blocks = [each.observed.matrices.name for each in optimizer.observed_parameters() if each.parameter is whole]
    assert blocks
    return Expected(
        state["momentum"], state.get("variance"), {block: optimizer.selection_of(whole, block) for block in blocks}
    )


def compare_step(name: str, parameter: Tensor, optimizer: Dion2, expected: Expected, tolerance: float = 1e-5) -> None:
    for block, its_selection in expected.selections.items():
        selection = optimizer.selection_of(parameter, block)
        assert selection is not None and its_selection is not None, name
        indices = selection.indices
        # Where ranks hold different experts, the indices are spread like them.
        indices = indices.full_tensor() if isinstance(indices, DTensor) else indices
        assert selection.axis == its_selection.axis, name
        assert torch.equal(indices, its_selection.indices), name
    momentum = optimizer.state[parameter]["momentum"]
    assert type(momentum) is (DTensor if isinstance(parameter, DTensor) else Tensor)
    assert torch.equal(local(momentum), part_of(expected.momentum, parameter)), name
    if expected.variance is not None:
        variance = optimizer.state[parameter]["variance"]
        expected_part = part_of(expected.variance, variance)
        error = torch.linalg.norm(local(variance) - expected_part)
        assert error <= tolerance * torch.linalg.norm(expected_part), name


def check_sharded(name: str, case: Case) -> None:
    """All steps as it is by default, and some with and without shared work."""
    for share_replicas, steps in ((None, STEPS), (True, 5), (False, 5)) if case.has_replicas else ((None, STEPS),):
        with errors_name_case(f"{name}, share_replicas={share_replicas}"):
            train_and_compare(sharded(case), steps, share_replicas=share_replicas)


def check_replicated(share_replicas: bool | None) -> None:
    steps = STEPS if share_replicas is None else 5
    train_and_compare(whole_parameters(), steps, process_group=dist.group.WORLD, share_replicas=share_replicas)


def check_without_reading_from_the_device() -> None:
    """As on a GPU, where the host reads results from the device only if it must."""
    with mock.patch("dion2_lightning.algorithms.dion2_shared.reading_is_free", return_value=False):
        for share_replicas in (True, None):
            check_replicated(share_replicas)
        case = CASES["HSDP 2 x 2, by columns"]
        # Not the tall ones: ranks would hold different slices of them, so the host would have to read.
        parameters = sharded(case)
        wide = {name: each for name, each in parameters.items() if name in ("wide", "wide twin", "square", "odd")}
        optimizer = Dion2(list(wide.items()), share_replicas=True)
        for step in range(2):
            for name, each in wide.items():
                each.grad = place(whole_tensors(seed=100 + step)[name], each.device_mesh, each.placements)
            optimizer.step()
        wide["odd"].grad = None
        # The rank that lacks a gradient raises on its host; on the others the device does.
        with pytest.raises(RuntimeError, match=r"(some replicas lack gradients|has a gradient on)"):
            if dist.get_rank() != 3:
                wide["odd"].grad = torch.zeros_like(wide["odd"])
            optimizer.step()


def check_meshes_of_three_dimensions() -> None:
    """Meshes of three dimensions, in order and permuted."""
    for placements in (
        (Replicate(), _StridedShard(0, split_factor=2), Shard(0)),
        (Replicate(), Shard(0), Shard(1)),
        (Replicate(), Shard(0), Replicate()),
        (Shard(0), Replicate(), Shard(1)),
        (Replicate(), Replicate(), Shard(1)),
    ):
        for order in (None, (0, 5, 2, 7, 4, 1, 6, 3)):
            # By rows: torch gathers what is spread over experts in the order of the ranks, not of the mesh.
            stacks = tuple(
                Shard(1) if each == Shard(0) else Shard(2) if each == Shard(1) else Replicate() for each in placements
            )
            rest = tuple(Replicate() for _ in placements)
            case = Case((2, 2, 2), placements, stacks=stacks, rest=rest, order=order)
            with errors_name_case(f"{placements}, order {order}"):
                train_and_compare(sharded(case), steps=3, share_replicas=True)


def check_fewer_experts_than_ranks() -> None:
    """Ranks that hold no matrix of a stack take part in the steps of the others; matrices beside it are updated too."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("first", "second"))
    for of_experts in ((Replicate(), Shard(0)), (Shard(1), Shard(0))):
        of_matrix = (Shard(0) if of_experts[0].is_shard() else Replicate(), Replicate())
        alone = {
            name: nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
            for name, shape in (("experts", (1, 8, 12)), ("matrix", (12, 8)))
        }
        parameters = {
            "experts": nn.Parameter(place(alone["experts"].detach(), mesh, of_experts)),
            "matrix": nn.Parameter(place(alone["matrix"].detach(), mesh, of_matrix)),
        }
        optimizers = [
            Dion2(
                [
                    {"params": [("experts", each["experts"])], "name": "experts", "batched": True},
                    {"params": [("matrix", each["matrix"])], "name": "matrix"},
                ],
                lr=0.02,
                orthonormalize_dtype="float32",
                share_replicas=True,
            )
            for each in (parameters, alone)
        ]
        with errors_name_case(f"{of_experts}"):
            for step in range(3):
                for name, whole in alone.items():
                    whole.grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(100 + step))
                    parameter = parameters[name]
                    parameter.grad = place(whole.grad, mesh, parameter.placements)
                for optimizer in optimizers:
                    optimizer.step()
                for name in alone:
                    compare_step(name, parameters[name], optimizers[0], expected_of(alone[name], optimizers[1]))
            for name, whole in alone.items():
                expected = part_of(whole.detach(), parameters[name])
                torch.testing.assert_close(local(parameters[name]).detach(), expected, rtol=1e-5, atol=1e-6)


def check_all_layouts(ranks: int) -> None:
    """Every layout of this many ranks, in one set of processes: starting them takes longer than a layout."""
    for name, case in CASES.items():
        if math.prod(case.mesh) == ranks:
            check_sharded(name, case)
    for share_replicas in (True, False, None):
        with errors_name_case(f"DDP on {ranks}, share_replicas={share_replicas}"):
            check_replicated(share_replicas)


def check_half_precision(ranks: int) -> None:
    """Weights and momenta in bfloat16, rounded stochastically: an entry is rounded alike on whatever rank it is."""
    for state_dtype in (None, "bfloat16"):
        for name, case in CASES.items():
            if math.prod(case.mesh) == ranks:
                with errors_name_case(f"{name}, {state_dtype}"):
                    train_and_compare(sharded(case, dtype=torch.bfloat16), steps=3, state_dtype=state_dtype)
        with errors_name_case(f"DDP on {ranks}, {state_dtype}"):
            parameters = whole_parameters(dtype=torch.bfloat16)
            train_and_compare(parameters, steps=3, state_dtype=state_dtype, process_group=dist.group.WORLD)


def check_deterministic(ranks: int) -> None:
    """Variances and weights of matrices bit for bit, in float32."""
    torch.use_deterministic_algorithms(True)
    for name, case in CASES.items():
        if math.prod(case.mesh) == ranks:
            with errors_name_case(f"{name}, deterministic"):
                train_and_compare(sharded(case), steps=3)
    with errors_name_case(f"DDP on {ranks}, deterministic"):
        train_and_compare(whole_parameters(), steps=3, process_group=dist.group.WORLD)


def check_buckets(ranks: int) -> None:
    """In two and three, in one for each matrix of an owner, and in as many as little memory takes: bit for bit."""
    torch.use_deterministic_algorithms(True)
    for name, case in CASES.items():
        for buckets, dtype in ((2, torch.float32), (3, torch.bfloat16), (99, torch.float32)):
            number = mock.patch.object(dion2_shared, "count_buckets", return_value=buckets)
            if math.prod(case.mesh) == ranks:
                with errors_name_case(f"{name}, {buckets} buckets, {dtype}"), number:
                    train_and_compare(sharded(case, dtype=dtype), steps=2, share_replicas=case.has_replicas or None)
    exchange = mock.patch.object(dion2_shared, "OwnerExchange", wraps=dion2_shared.OwnerExchange)
    for name, parameters in (("FSDP2", sharded(Case((ranks,), (Shard(0),)))), ("DDP", whole_parameters())):
        shared: dict[str, Any] = {"process_group": dist.group.WORLD, "share_replicas": True} if name == "DDP" else {}
        with errors_name_case(f"{name} on {ranks}, little memory"), exchange as exchanges:
            train_and_compare(parameters, steps=2, working_memory=1, **shared)
            assert exchanges.call_count >= 2 * 3


@contextlib.contextmanager
def errors_name_case(name: str) -> Iterator[None]:
    """Add the name of a layout to the errors raised in the block."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the layout {name}")
        raise


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_layouts(ranks: int) -> None:
    run_on_ranks(ranks, check_all_layouts, ranks, seconds=200)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_half_precision(ranks: int) -> None:
    run_on_ranks(ranks, check_half_precision, ranks, seconds=200)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_deterministic_algorithms(ranks: int) -> None:
    run_on_ranks(ranks, check_deterministic, ranks, seconds=200)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_buckets(ranks: int) -> None:
    run_on_ranks(ranks, check_buckets, ranks, seconds=200)


def test_without_reading_from_the_device() -> None:
    run_on_ranks(4, check_without_reading_from_the_device)


def test_a_stack_of_fewer_experts_than_ranks() -> None:
    run_on_ranks(4, check_fewer_experts_than_ranks)


def test_meshes_of_three_dimensions() -> None:
    run_on_ranks(8, check_meshes_of_three_dimensions, seconds=100)
