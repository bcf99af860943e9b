"""Awkward numbers: ties, zeros, denormals, huge entries, half precision, ranks that hold nothing.

The expectation comes from one process that holds everything; it is checked against the paper's rules in float64 in
tests/algorithms/test_dion2.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dion2_lightning import Dion2
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import part_of, place

Placements = tuple[Any, ...]
MakeGradient = Callable[[torch.Generator], Tensor]


def equal_rows(generator: torch.Generator) -> Tensor:
    """All norms tie: the first three win, all on the first rank of FSDP2."""
    return torch.randn(1, 24, generator=generator).expand(12, 24).clone()


def ties_at_the_threshold(generator: torch.Generator) -> Tensor:
    """Rows 2, 5, 8 and 11, one on each rank, have different entries and the same, largest norm; three are selected."""
    rows = 0.1 * torch.randn(12, 24, generator=generator).sign()
    for first, row in enumerate((2, 5, 8, 11)):
        rows[row] = 0
        rows[row, first : first + 8] = 1.0 if first % 2 else -1.0
    return rows


def ties_over_columns(generator: torch.Generator) -> Tensor:
    """The same for columns of a tall matrix, which are selected along the input axis."""
    return ties_at_the_threshold(generator).T.contiguous()


def zero_rows(generator: torch.Generator) -> Tensor:
    """Only a row of the last rank is nonzero, so zero rows are selected too."""
    rows = torch.zeros(12, 24)
    rows[11:] = torch.randn(1, 24, generator=generator)
    return rows


def all_zero(_: torch.Generator) -> Tensor:
    return torch.zeros(12, 24)


def denormal(generator: torch.Generator) -> Tensor:
    return torch.randn(12, 24, generator=generator) * 1e-40


def huge(generator: torch.Generator) -> Tensor:
    return torch.randn(12, 24, generator=generator) * 1e30


def fewer_rows_than_ranks(generator: torch.Generator) -> Tensor:
    """Three rows over four ranks."""
    return torch.randn(3, 64, generator=generator)


def mixed_scales(generator: torch.Generator) -> Tensor:
    """Rows from 1e-30 to 1e30, whose squares underflow and overflow in float32."""
    return torch.randn(12, 24, generator=generator) * torch.logspace(-30, 30, 12).unsqueeze(1)


MATRICES: dict[str, MakeGradient] = {
    make.__name__: make
    for make in (
        equal_rows, ties_at_the_threshold, ties_over_columns, zero_rows, all_zero, denormal, huge,
        fewer_rows_than_ranks, mixed_scales,
    )
}  # fmt: skip


def check_selection(four: DeviceMesh, square: DeviceMesh) -> None:
    layouts: dict[str, tuple[DeviceMesh, Placements]] = {
        "rows": (four, (Shard(0),)),
        "columns": (four, (Shard(1),)),
        "replicas of rows": (square, (Replicate(), Shard(0))),
        "FSDP2 x TP": (square, (_StridedShard(0, split_factor=2), Shard(0))),
        "blocks": (square, (Shard(0), Shard(1))),
    }
    for layout, (mesh, placements) in layouts.items():
        check_matrices(layout, mesh, placements)
    check_matrices("columns, select output", four, (Shard(1),), select="output")


def check_matrices(label: str, mesh: DeviceMesh, placements: Placements, **settings: Any) -> None:
    """Two steps, on this layout and on one process: selection and momentum bit for bit, weights finite and close."""
    start = {name: torch.ones_like(make(torch.Generator())) for name, make in MATRICES.items()}
    alone = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    spread = {name: nn.Parameter(place(tensor, mesh, placements)) for name, tensor in start.items()}
    common = {"lr": 0.1, "orthonormalize_dtype": "float32", **settings}
    reference, optimizer = (Dion2(list(named.items()), **common) for named in (alone, spread))
    for step in range(2):
        for name, make in MATRICES.items():
            gradient = make(torch.Generator().manual_seed(step))
            alone[name].grad = gradient
            spread[name].grad = place(gradient, mesh, placements)
        optimizer.step()
        reference.step()
        for name in MATRICES:
            found, expected = optimizer.selection_of(spread[name]), reference.selection_of(alone[name])
            assert found.axis == expected.axis
            assert torch.equal(found.indices, expected.indices), f"{label}, {name}"
            assert_same_momentum(f"{label}, {name}", spread[name], optimizer, alone[name], reference)
    for name, parameter in spread.items():
        weight, expected_weight = parameter.detach().to_local(), part_of(alone[name].detach(), parameter)
        assert weight.isfinite().all(), f"{label}, {name}"
        assert torch.allclose(weight, expected_weight, rtol=1e-5, atol=1e-5), f"{label}, {name}"


def assert_same_momentum(label: str, parameter: DTensor, optimizer: Dion2, whole: Tensor, reference: Dion2) -> None:
    found = optimizer.state[parameter]["momentum"].to_local()
    assert torch.equal(found, part_of(reference.state[whole]["momentum"], parameter)), label


def check_known_ties(four: DeviceMesh) -> None:
    """Selections known by hand: among equal norms the lower index wins, whatever rank holds it."""
    for make, expected in ((equal_rows, [0, 1, 2]), (ties_at_the_threshold, [2, 5, 8]), (all_zero, [0, 1, 2])):
        parameter = nn.Parameter(place(torch.zeros(12, 24), four, (Shard(0),)))
        parameter.grad = place(make(torch.Generator().manual_seed(0)), four, (Shard(0),))
        optimizer = Dion2([parameter], lr=0.1)
        optimizer.step()
        assert optimizer.selection_of(parameter).indices.tolist() == expected, make.__name__
    # A zero matrix gets a zero update.
    assert not parameter.to_local().any()


def check_scale_invariance(four: DeviceMesh) -> None:
    """The squares of such gradients overflow or underflow in float32; the polar factor does not change."""
    gradient = torch.randn(12, 24, generator=torch.Generator().manual_seed(0))
    weights = []
    for scale in (1.0, 2.0**100, 2.0**-100):
        parameter = nn.Parameter(place(torch.zeros(12, 24), four, (Shard(0),)))
        parameter.grad = place(gradient * scale, four, (Shard(0),))
        Dion2([parameter], lr=0.1, orthonormalize_dtype="float32").step()
        weights.append(parameter.full_tensor())
    assert torch.linalg.norm(weights[0]) > 0.1
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0], rtol=1e-4, atol=1e-6)


def check_half_precision(four: DeviceMesh) -> None:
    """bfloat16 parameters and gradients, float32 momentum, products in bfloat16: momentum bit for bit."""
    shape = (128, 160)  # at a quarter 32 rows, enough for products in bfloat16
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    alone = nn.Parameter(start.clone())
    spread = nn.Parameter(place(start, four, (Shard(0),)))
    reference, optimizer = (Dion2([each], lr=0.05, orthonormalize_dtype="bfloat16") for each in (alone, spread))
    for step in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1 + step)).to(torch.bfloat16)
        alone.grad, spread.grad = gradient, place(gradient, four, (Shard(0),))
        optimizer.step()
        reference.step()
        assert torch.equal(optimizer.selection_of(spread).indices, reference.selection_of(alone).indices)
        assert optimizer.state[spread]["momentum"].dtype == torch.float32
        assert_same_momentum("bfloat16", spread, optimizer, alone, reference)
    found, expected = spread.detach().to_local(), part_of(alone.detach(), spread)
    assert found.dtype == torch.bfloat16
    # bfloat16 has 8 bits; the last may differ.
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    assert (expected != part_of(start, spread)).any()


def check_sharded_stacks(square: DeviceMesh) -> None:
    """Experts over one dimension of the mesh, their rows or columns over the other; 3 experts over 2 ranks."""
    for placements in ((Shard(0), Shard(1)), (Shard(0), Shard(2)), (Shard(2), Shard(0)), (Shard(1), Shard(2))):
        for transposed in (False, True):
            start = torch.randn(3, 10, 14, generator=torch.Generator().manual_seed(0))
            alone, spread = nn.Parameter(start.clone()), nn.Parameter(place(start, square, placements))
            reference, optimizer = (
                Dion2(
                    [{"params": [each], "batched": True, "transposed": transposed}],
                    lr=0.1,
                    orthonormalize_dtype="float32",
                )
                for each in (alone, spread)
            )
            for step in range(2):
                gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(1 + step))
                alone.grad, spread.grad = gradient, place(gradient, square, placements)
                optimizer.step()
                reference.step()
            label = f"{placements}, transposed {transposed}"
            indices = optimizer.selection_of(spread).indices
            indices = indices.full_tensor() if isinstance(indices, DTensor) else indices
            assert torch.equal(indices, reference.selection_of(alone).indices), label
            assert_same_momentum(label, spread, optimizer, alone, reference)
            found, expected = spread.detach().to_local(), part_of(alone.detach(), spread)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), label


def check_partial_parameters(four: DeviceMesh) -> None:
    """A ``Partial`` parameter is refused by name before anything changes."""
    for algorithm in ("dion2", "adamw"):
        whole, broken = (
            nn.Parameter(DTensor.from_local(torch.ones(4, 6), four, [each])) for each in (Shard(0), Partial())
        )
        whole.grad, broken.grad = torch.ones_like(whole), torch.ones_like(broken)
        optimizer = Dion2([{"params": [("whole", whole), ("broken", broken)], "algorithm": algorithm}], lr=0.1)
        with pytest.raises(ValueError, match=rf"group '{algorithm}': parameter 'broken' .*Partial.*: sum it up with"):
            optimizer.step()
        assert (whole.to_local() == 1).all()
        assert not any(local.to_local().any() for local in optimizer.state[whole].values() if local.ndim)
        # A refusal before any change leaves nothing half updated, so the optimizer can still be saved.
        optimizer.state_dict()


def check_groups_are_made_once(square: DeviceMesh) -> None:
    """Flattening a mesh makes a process group, which must not happen at every step."""
    parameter = nn.Parameter(place(torch.ones(8, 8), square, (Shard(0), Shard(1))))
    optimizer = Dion2([parameter], lr=0.1)
    parameter.grad = place(torch.eye(8), square, (Shard(0), Shard(1)))
    optimizer.step()
    groups = len(dist.distributed_c10d._world.pg_map)
    optimizer.step()
    assert len(dist.distributed_c10d._world.pg_map) == groups


def check_numerics() -> None:
    four = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "second"))
    check_selection(four, square)
    check_known_ties(four)
    check_scale_invariance(four)
    check_half_precision(four)
    check_sharded_stacks(square)
    check_groups_are_made_once(square)
    check_partial_parameters(four)


def test_numerics() -> None:
    run_on_ranks(4, check_numerics)
