"""A weight that holds several matrices is updated as these matrices would be by themselves."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dion2_lightning import Dion2
from dion2_lightning.algorithms import passes
from dion2_lightning.algorithms.matrix_update import MatrixUpdate
from dion2_lightning.algorithms.slices_of_view import SlicesOfView, views_of
from tests.distributed.ranks import run_on_ranks

SETTINGS: dict[str, dict[str, Any]] = {
    "dion2": {"fraction": 0.4},
    "dion2 nesterov, cautious, output": {
        "fraction": 0.3,
        "nesterov": True,
        "cautious_weight_decay": True,
        "select": "output",
    },
    "dion3": {"algorithm": "dion3", "fraction": 0.4},
    "normuon": {"fraction": 1.0, "normalize_neurons": True},
    "muon": {"fraction": 1.0},
    "dion": {"algorithm": "dion", "rank_fraction": 0.5, "qr": "qr"},
}
COMMON = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}

Blocks = Callable[[Tensor], dict[str, Tensor]]


def side_by_side(*sizes: tuple[str, int]) -> Blocks:
    """Blocks of rows, one after the other."""
    return lambda weight: dict(zip([n for n, _ in sizes], weight.split([s for _, s in sizes]), strict=True))


def interleaved(repeats: int, *sizes: tuple[str, int]) -> Blocks:
    """Blocks of rows, in pieces that take turns."""

    def blocks(weight: Tensor) -> dict[str, Tensor]:
        pieces = weight.reshape(repeats, -1, weight.shape[1]).split([size for _, size in sizes], dim=1)
        return {name: piece.reshape(-1, weight.shape[1]) for (name, _), piece in zip(sizes, pieces, strict=True)}

    return blocks


def by_head(blocks: Blocks, size: int) -> Blocks:
    return lambda weight: {name: each.reshape(-1, size, each.shape[1]) for name, each in blocks(weight).items()}


def of_each_expert(blocks: Blocks) -> Blocks:
    def of_stack(stack: Tensor) -> dict[str, Tensor]:
        of_experts = [blocks(weight) for weight in stack]
        return {name: torch.stack([each[name] for each in of_experts]) for name in of_experts[0]}

    return of_stack


def stored_in_out(blocks: Blocks) -> Blocks:
    return lambda weight: {name: each.mT.contiguous() for name, each in blocks(weight.mT.contiguous()).items()}


QKV = side_by_side(("q", 12), ("k", 6), ("v", 6))
FORMS: dict[str, tuple[tuple[int, ...], str, dict[str, Any], Blocks]] = {
    "q|k|v": ((24, 10), "q 12 | k 6 | v 6", {}, QKV),
    "gate|up, tall": ((28, 10), "gate 14 | up 14", {}, side_by_side(("gate", 14), ("up", 14))),
    "q|k|v by head": ((24, 10), "q 4*3 | k 2*3 | v 2*3", {}, by_head(QKV, 3)),
    "interleaved by head": (
        (24, 10),
        "4 x (q 2 | k 2 | v 2)",
        {},
        interleaved(4, ("q", 2), ("k", 2), ("v", 2)),
    ),
    "interleaved, tall": ((48, 10), "4 x (q 4 | k 4 | v 4)", {}, interleaved(4, ("q", 4), ("k", 4), ("v", 4))),
    "interleaved, each head": (
        (24, 10),
        "4 x (q 1*2 | k 1*2 | v 1*2)",
        {},
        by_head(interleaved(4, ("q", 2), ("k", 2), ("v", 2)), 2),
    ),
    "grouped": ((24, 10), "3 x (q 4 | k 2 | v 2)", {}, interleaved(3, ("q", 4), ("k", 2), ("v", 2))),
    "grouped, each head": (
        (24, 10),
        "3 x (q 2*2 | k 1*2 | v 1*2)",
        {},
        by_head(interleaved(3, ("q", 4), ("k", 2), ("v", 2)), 2),
    ),
    "every second row": ((24, 16), "12 x (gate 1 | up 1)", {}, interleaved(12, ("gate", 1), ("up", 1))),
    "every second row, tall": ((24, 7), "12 x (gate 1 | up 1)", {}, interleaved(12, ("gate", 1), ("up", 1))),
    "o by head": (
        (10, 24),
        "head 4*6 along inputs",
        {},
        lambda weight: {"head": weight.reshape(10, 4, 6).transpose(0, 1).contiguous()},
    ),
    "stored (in, out)": (
        (10, 24),
        "q 12 | k 6 | v 6",
        {"transposed": True},
        stored_in_out(QKV),
    ),
    "interleaved, stored (in, out)": (
        (10, 24),
        "4 x (q 2 | k 2 | v 2)",
        {"transposed": True},
        stored_in_out(interleaved(4, ("q", 2), ("k", 2), ("v", 2))),
    ),
    "experts": (
        (3, 24, 10),
        "gate 12 | up 12",
        {"batched": True},
        of_each_expert(side_by_side(("gate", 12), ("up", 12))),
    ),
    "experts, every second column": (
        (3, 10, 24),
        "12 x (gate 1 | up 1)",
        {"batched": True, "transposed": True},
        of_each_expert(stored_in_out(interleaved(12, ("gate", 1), ("up", 1)))),
    ),
    "single columns and others, tall": (
        (4, 25),
        "5 x (a 1 | b 1 | c 2 | d 1)",
        {"transposed": True},
        stored_in_out(interleaved(5, ("a", 1), ("b", 1), ("c", 2), ("d", 1))),
    ),
    "every second column, tall": (
        (7, 24),
        "12 x (gate 1 | up 1)",
        {"transposed": True},
        stored_in_out(interleaved(12, ("gate", 1), ("up", 1))),
    ),
    "interleaved columns, tall": (
        (10, 48),
        "4 x (q 4 | k 4 | v 4)",
        {"transposed": True},
        stored_in_out(interleaved(4, ("q", 4), ("k", 4), ("v", 4))),
    ),
    "interleaved columns of two sizes, tall": (
        (5, 24),
        "3 x (q 4 | k 2 | v 2)",
        {"transposed": True},
        stored_in_out(interleaved(3, ("q", 4), ("k", 2), ("v", 2))),
    ),
    "experts, every second column, tall": (
        (3, 7, 24),
        "12 x (gate 1 | up 1)",
        {"batched": True, "transposed": True},
        of_each_expert(stored_in_out(interleaved(12, ("gate", 1), ("up", 1)))),
    ),
    "experts, every second row, tall": (
        (3, 24, 7),
        "12 x (gate 1 | up 1)",
        {"batched": True},
        of_each_expert(interleaved(12, ("gate", 1), ("up", 1))),
    ),
    "experts, interleaved columns, tall": (
        (3, 5, 24),
        "3 x (q 4 | k 2 | v 2)",
        {"batched": True, "transposed": True},
        of_each_expert(stored_in_out(interleaved(3, ("q", 4), ("k", 2), ("v", 2)))),
    ),
    "experts, interleaved": (
        (3, 24, 10),
        "4 x (a 2 | b 4)",
        {"batched": True},
        of_each_expert(interleaved(4, ("a", 2), ("b", 4))),
    ),
    "stack in two dimensions": ((24, 10), "expert 3*8", {}, by_head(side_by_side(("expert", 24)), 8)),
    "stack in two dimensions, stored (in, out)": (
        (24, 10),
        "expert 3*8 along inputs",
        {"transposed": True},
        by_head(side_by_side(("expert", 24)), 8),
    ),
}


def gradients(shape: tuple[int, ...], steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        rows = torch.rand(*shape[:-1], 1, generator=generator) ** 3
        yield torch.randn(shape, generator=generator) * (0.02 + rows) * (1 + step % 3)


def step_with_zero_gradients(optimizer: Dion2) -> None:
    """Take a step that creates the state and changes nothing else."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


HALF = {"rounding": "nearest", "state_dtype": "bfloat16", "orthonormalize_dtype": "float32"}


@pytest.mark.parametrize("settings", [{"fraction": 0.4}, {"fraction": 0.4, "cautious_weight_decay": True}])
@pytest.mark.parametrize("form", FORMS)
def test_fused_equals_separate_in_half_precision(form: str, settings: dict[str, Any]) -> None:
    """Rounded to nearest; random bits depend on names and places, which differ."""
    shape, splits, storage, blocks = FORMS[form]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    parameter = torch.nn.Parameter(values)
    own = {name: torch.nn.Parameter(each.clone()) for name, each in blocks(values).items()}
    fused = Dion2([{"params": [parameter], "splits": splits, **storage, **settings, **HALF}], **COMMON)
    stored = {"transposed": storage.get("transposed", False), **settings, **HALF}
    apart = Dion2([{"params": [each], "batched": each.ndim == 3, **stored} for each in own.values()], **COMMON)
    for gradient in gradients(shape, 6):
        parameter.grad = gradient.bfloat16()
        for name, its_gradient in blocks(parameter.grad).items():
            own[name].grad = its_gradient.clone()
        fused.step()
        apart.step()
        for name, momentum in blocks(fused.state[parameter]["momentum"]).items():
            assert torch.equal(momentum, apart.state[own[name]]["momentum"])
    for name, found in blocks(parameter.detach()).items():
        torch.testing.assert_close(found, own[name].detach(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("settings", [{"fraction": 0.4}, {"fraction": 0.4, "cautious_weight_decay": True}])
@pytest.mark.parametrize("form", [form for form in FORMS if "interleaved" in form or "every second" in form])
def test_random_bits_are_those_of_copies(form: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are updated where they are, are rounded as copies of them would be."""
    shape, splits, storage, _ = FORMS[form]
    rounded = {"rounding": "stochastic", "state_dtype": "bfloat16", "orthonormalize_dtype": "float32"}
    results = []
    for is_copied in (False, True):
        if is_copied:
            monkeypatch.setattr(MatrixUpdate, "is_scattered", False)
            monkeypatch.setattr(MatrixUpdate, "is_in_pieces", False)
            monkeypatch.setattr(MatrixUpdate, "is_interleaved", False)
        parameter = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
        optimizer = Dion2([{"params": [parameter], "splits": splits, **storage, **settings, **rounded}], **COMMON)
        for gradient in gradients(shape, 6):
            parameter.grad = gradient.bfloat16()
            optimizer.step()
        results.append((parameter.detach(), optimizer.state[parameter]["momentum"]))
    (weight, momentum), (expected_weight, expected_momentum) = results
    assert torch.equal(momentum, expected_momentum) and torch.equal(weight, expected_weight)


@pytest.mark.parametrize("settings", [{}, {"working_memory": 1}], ids=str)
def test_a_cache_changes_no_bit(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU goes over some parameters after the others, and each decays once."""
    results = []
    for entries in (2**20, 1):
        monkeypatch.setattr(passes, "CACHE", entries)
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape, *_ in FORMS.values()]
        stored = [{"splits": splits, **storage} for _, splits, storage, _ in FORMS.values()]
        groups = [{"params": [each], **how} for each, how in zip(parameters, stored, strict=True)]
        optimizer = Dion2(groups, **COMMON, **settings)
        for of_step in zip(*(gradients(each.shape, 3) for each in parameters), strict=True):
            for parameter, gradient in zip(parameters, of_step, strict=True):
                parameter.grad = gradient
            optimizer.step()
        results.append([*parameters, *(optimizer.state[each]["momentum"] for each in parameters)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("settings", [{"fraction": 0.4}, {"algorithm": "dion3", "fraction": 0.4}])
@pytest.mark.parametrize("form", ["experts", "experts, interleaved", "experts, every second column"])
def test_idle_experts_stay(form: str, settings: dict[str, Any]) -> None:
    shape, splits, storage, _ = FORMS[form]
    parameter = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    group = {"params": [parameter], "splits": splits, "skip_idle_experts": True, **storage, **settings}
    optimizer = Dion2([group], **COMMON)
    for number, gradient in enumerate(gradients(shape, 3)):
        before, momenta = parameter.detach().clone(), optimizer.state[parameter].get("momentum", torch.zeros(shape))
        momenta = momenta.clone()
        idle = number % 3
        gradient[idle] = 0
        parameter.grad = gradient
        optimizer.step()
        for expert in range(3):
            assert torch.equal(parameter[expert], before[expert]) == (expert == idle)
            assert torch.equal(optimizer.state[parameter]["momentum"][expert], momenta[expert]) == (expert == idle)


ONE_VIEW = [form for form in FORMS if "interleaved" in form or "every second" in form]


@pytest.mark.parametrize(
    "settings", [{"select": "output"}, {"select": "output", "cautious_weight_decay": True}], ids=str
)
@pytest.mark.parametrize("form", [form for form in ONE_VIEW if "experts" in form])
def test_a_block_of_one_expert_is_idle(form: str, settings: dict[str, Any]) -> None:
    """Then not the same happens to all blocks of the view."""
    shape, splits, storage, blocks = FORMS[form]
    parameter = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    own = {name: torch.nn.Parameter(each.clone()) for name, each in blocks(parameter.detach()).items()}
    idle = {"skip_idle_experts": True, "select": "output", **settings}
    fused = Dion2([{"params": [parameter], "splits": splits, **storage, **idle}], **COMMON)
    stored = {"batched": True, "transposed": storage.get("transposed", False), **idle}
    apart = Dion2([{"params": [each], **stored} for each in own.values()], **COMMON)
    for number, gradient in enumerate(gradients(shape, 6)):
        name = list(own)[number % 2]
        of_blocks = blocks(gradient)
        of_blocks[name][number % 3] = 0
        for each, its_gradient in of_blocks.items():
            own[each].grad = its_gradient.clone()
        parameter.grad = torch.where(is_of(blocks, shape, name, number % 3), 0.0, gradient)
        fused.step()
        apart.step()
        for each, momentum in blocks(fused.state[parameter]["momentum"]).items():
            assert torch.equal(momentum, apart.state[own[each]]["momentum"])
        for each, found in blocks(parameter.detach()).items():
            torch.testing.assert_close(found, own[each].detach(), rtol=1e-5, atol=1e-5)


def is_of(blocks: Blocks, shape: tuple[int, ...], name: str, expert: int) -> Tensor:
    """Which entries belong to a block of an expert."""
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    return torch.isin(numbers, blocks(numbers)[name][expert])


@pytest.mark.parametrize(
    "settings", [{}, {"cautious_weight_decay": True}, {"rounding": "stochastic", "state_dtype": "bfloat16"}], ids=str
)
@pytest.mark.parametrize("form", ONE_VIEW)
def test_little_memory_changes_no_bit(form: str, settings: dict[str, Any]) -> None:
    """Matrices go one by one then, and blocks of one view each alone."""
    shape, splits, storage, _ = FORMS[form]
    is_rounded = "rounding" in settings
    results = []
    for memory in (1, None):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        parameter = torch.nn.Parameter(values.bfloat16() if is_rounded else values)
        group = {"splits": splits, "orthonormalize_dtype": "float64", "select": "output", **storage, **settings}
        optimizer = Dion2([{"params": [parameter], **group}], working_memory=memory, **COMMON)
        for gradient in gradients(shape, 4):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
        results.append((parameter.detach(), optimizer.state[parameter]["momentum"]))
    (weight, momentum), (expected_weight, expected_momentum) = results
    assert torch.equal(momentum, expected_momentum)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-12 if not is_rounded else 0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"nesterov": True}, {"cautious_weight_decay": True}], ids=str)
@pytest.mark.parametrize("form", [form for form in FORMS if "tall" in form])
def test_memory_may_have_any_order(form: str, settings: dict[str, Any]) -> None:
    """That of a gradient, and that of a weight."""
    shape, splits, storage, _ = FORMS[form]
    results = []
    for weight_order, gradient_order in ((in_order, in_order), (in_order, out_of_order), (out_of_order, out_of_order)):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        parameter = torch.nn.Parameter(weight_order(values))
        group = {"splits": splits, "orthonormalize_dtype": "float64", "fraction": 0.4, **storage, **settings}
        optimizer = Dion2([{"params": [parameter], **group}], **COMMON)
        for gradient in gradients(shape, 4):
            parameter.grad = gradient_order(gradient)
            optimizer.step()
        results.append((parameter.detach(), optimizer.state[parameter]["momentum"]))
    for weight, momentum in results[1:]:
        assert torch.equal(momentum, results[0][1])
        torch.testing.assert_close(weight, results[0][0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("splits", ["400 x (a 1 | b 1 | c 1)", "6 x (q 64 | k 128 | v 8)"])
def test_large_weights_may_lie_in_memory_in_any_order(splits: str) -> None:
    """More entries than are summed at once."""
    results = []
    for order in (in_order, out_of_order):
        parameter = torch.nn.Parameter(order(torch.zeros(128, 1200)))
        optimizer = Dion2([{"params": [parameter], "splits": splits, "transposed": True}], **COMMON)
        for gradient in gradients((128, 1200), 2):
            parameter.grad = gradient
            optimizer.step()
        results.append(optimizer.state[parameter]["momentum"])
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", [(7, 24), (24, 7)])
def test_a_gradient_may_be_expanded(shape: tuple[int, int]) -> None:
    """Then those of all blocks are the same memory."""
    results = []
    for is_expanded in (True, False):
        parameter = torch.nn.Parameter(torch.ones(shape))
        group = {"splits": "12 x (gate 1 | up 1)", "transposed": shape[0] < shape[1], "nesterov": True}
        optimizer = Dion2([{"params": [parameter], **group}], **COMMON)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            one = torch.randn(7, generator=generator)
            gradient = (one.unsqueeze(1) if shape[0] == 7 else one).expand(shape)
            parameter.grad = gradient if is_expanded else gradient.contiguous()
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("splits", ["expert 4*2 along inputs", "q 1*2 | k 2*3 along inputs", "expert 4*5"])
def test_the_gradient_of_a_stack_may_be_expanded(splits: str) -> None:
    results = []
    for is_expanded in (True, False):
        parameter = torch.nn.Parameter(torch.ones(20, 8))
        optimizer = Dion2([{"params": [parameter], "splits": splits, "nesterov": True, "select": "output"}], **COMMON)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            gradient = torch.randn(20, 1, generator=generator).expand(20, 8)
            parameter.grad = gradient if is_expanded else gradient.contiguous()
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("form", [form for form in FORMS if "every second" in form])
def test_blocks_are_gone_over_together(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their slices lie in between each other."""
    views: list[SlicesOfView] = []

    def seen(*given: Any) -> list[SlicesOfView]:
        its_views = views_of(*given)
        views.extend(its_views)
        return its_views

    monkeypatch.setattr(passes, "views_of", seen)
    shape, splits, storage, _ = FORMS[form]
    parameters = [torch.nn.Parameter(torch.ones(shape)) for _ in range(3)]
    optimizer = Dion2([{"params": parameters, "splits": splits, "select": "output", **storage}], **COMMON)
    for parameter, gradient in zip(parameters, gradients(shape, 3), strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert {len(view.slices) for view in views} == {2}


def in_order(tensor: Tensor) -> Tensor:
    return tensor


def out_of_order(tensor: Tensor) -> Tensor:
    """The same in another order of memory."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def test_ranks_whose_slices_have_one_entry_or_none() -> None:
    """What random bits have one number for, a slice or an entry, does not depend on sizes."""
    run_on_ranks(3, check_slices_of_one_entry)


def check_slices_of_one_entry() -> None:
    mesh, results = init_device_mesh("cpu", (3,)), []
    for is_sharded in (False, True):
        values = torch.ones(64, 2, dtype=torch.bfloat16)
        gradient = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
        if is_sharded:
            values, gradient = (distribute_tensor(each, mesh, [Shard(1)]) for each in (values, gradient))
        parameter = torch.nn.Parameter(values)
        optimizer = Dion2([{"params": [parameter], "splits": "4 x (a 8 | b 8)", "select": "output"}], lr=0.1)
        parameter.grad = gradient
        optimizer.step()
        weight = parameter.detach()
        results.append(weight.full_tensor() if isinstance(weight, DTensor) else weight)
    assert torch.equal(*results)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_fused_equals_separate(form: str, settings: dict[str, Any]) -> None:
    shape, splits, storage, blocks = FORMS[form]
    is_dion = settings.get("algorithm") == "dion"
    parameter = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    own = {name: torch.nn.Parameter(each.clone()) for name, each in blocks(parameter.detach()).items()}
    fused = Dion2([{"params": [parameter], "splits": splits, **storage, **settings}], **COMMON)
    stored = {"transposed": storage.get("transposed", False), **settings}
    apart = Dion2([{"params": [each], "batched": each.ndim == 3, **stored} for each in own.values()], **COMMON)
    if is_dion:  # names decide where Q begins
        step_with_zero_gradients(fused)
        step_with_zero_gradients(apart)
        for name, each in own.items():
            apart.state[each]["Q"].copy_(fused.state[parameter][f"Q[{name}]"])

    for gradient in gradients(shape, 12):
        parameter.grad = gradient
        for name, its_gradient in blocks(gradient).items():
            own[name].grad = its_gradient.clone()
        fused.step()
        apart.step()
        momenta = blocks(fused.state[parameter]["momentum"])
        for name, each in own.items():
            momentum = apart.state[each]["momentum"]
            if is_dion:
                torch.testing.assert_close(momenta[name], momentum, rtol=1e-4, atol=1e-4 * momentum.abs().max().item())
                continue
            assert torch.equal(momenta[name], momentum)
            selection, expected = fused.selection_of(parameter, name), apart.selection_of(each)
            assert selection is not None and expected is not None
            assert selection.axis == expected.axis and torch.equal(selection.indices, expected.indices)
    for name, found in blocks(parameter.detach()).items():
        tolerance = 1e-4 if is_dion else 1e-5
        torch.testing.assert_close(found, own[name].detach(), rtol=tolerance, atol=tolerance)
