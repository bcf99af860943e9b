"""Counted bytes and operations of a step, against counts by hand."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import kernel_traffic, traffic
from benchmarks.fake_tensors import fake_tensors
from benchmarks.step import LAYERS, TRANSPOSED
from benchmarks.traffic import (
    OTHER,
    PHASES,
    PRODUCTS,
    Traffic,
    TrafficCounter,
    UnknownOperationError,
    count_step,
    main,
    optimizers,
)
from dion2_lightning import Dion2
from dion2_lightning.kernels import fused

aten = torch.ops.aten

IS_MISSING = fused.unavailable(torch.device("cuda"))
needs_triton = pytest.mark.skipif(IS_MISSING is not None, reason=str(IS_MISSING))
each_kernels = pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])

X, Y, OUT = torch.rand(4, 6), torch.rand(4, 6), torch.empty(4, 6)
"""96 bytes each."""
SQUARE, OTHER_SQUARE = torch.rand(4, 4), torch.rand(4, 4)
"""64 bytes each."""
SHORT, HALF = X.bfloat16(), X.half()
"""48 bytes each."""
ROW = torch.rand(6)
"""24 bytes."""
ROWS = torch.tensor([0, 2])
"""16 bytes."""
TWO_ROWS = torch.rand(2, 6)
"""48 bytes."""
EVERYWHERE = ROWS.unsqueeze(1).expand(2, 6)
"""ROWS in each of 6 columns: still 16 bytes."""
COLUMNS = ROWS.expand(4, 2)
"""ROWS in each of 4 rows: still 16 bytes."""
DENSE_COLUMNS = COLUMNS.contiguous()
"""64 bytes."""
MASK = X > 0.5
"""24 bytes."""

COUNTS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "two tensors": (lambda: X + Y, 192, 96),
    "a number": (lambda: X * 2.0, 96, 96),
    "the same tensor twice": (lambda: X * X, 96, 96),
    "a tensor and its transpose": (lambda: SQUARE + SQUARE.mT, 64, 64),
    "broadcast": (lambda: X + ROW, 96 + 24, 96),
    "expanded": (lambda: X + ROW.expand(4, 6), 96 + 24, 96),
    "part of a tensor": (lambda: X[:2] + TWO_ROWS, 48 + 48, 48),
    "every second column": (lambda: X[:, ::2].abs(), 48, 48),
    "two dtypes": (lambda: X + SHORT, 96 + 48, 96),
    "in place": (lambda: OUT.add_(X), 192, 96),
    "in place, a number": (lambda: OUT.mul_(0.5), 96, 96),
    "in place, a column": (lambda: OUT[:, 1].mul_(0.5), 16, 16),
    "in place, three tensors": (lambda: OUT.addcmul_(X, Y), 3 * 96, 96),
    "into a tensor": (lambda: torch.mul(X, Y, out=OUT), 192, 96),
    "where": (lambda: torch.where(MASK, X, Y), 24 + 192, 96),
    "comparison": (lambda: X > Y, 192, 24),
    "copy": (lambda: OUT.copy_(X), 96, 96),
    "copy of another dtype": (lambda: OUT.copy_(SHORT), 48, 96),
    "fill": (lambda: OUT.fill_(1.0), 0, 96),
    "zero": (lambda: OUT.zero_(), 0, 96),
    "zeros": (lambda: torch.zeros(4, 6), 0, 96),
    "full": (lambda: torch.full((4, 6), 2.0), 0, 96),
    "arange": (lambda: torch.arange(6), 0, 48),
    "zeros like": (lambda: torch.zeros_like(X), 0, 96),
    "clone": (lambda: X.clone(), 96, 96),
    "contiguous": (lambda: X.mT.contiguous(), 96, 96),
    "conversion": (lambda: X.to(torch.bfloat16), 96, 48),
    "conversion back": (lambda: HALF.float(), 48, 96),
    "concatenation": (lambda: torch.cat([X, Y]), 192, 192),
    "stack": (lambda: torch.stack([X, Y]), 192, 192),
    "sums": (lambda: X.sum(-1), 96, 4 * 4),
    "norm": (lambda: torch.linalg.vector_norm(X), 96, 4),
    "sort": (lambda: torch.sort(ROW, stable=True), 24, 24 + 48),
    "a number for the host": (lambda: X[0, 0].item(), 4, 0),
    "index_select": (lambda: X.index_select(0, ROWS), 48 + 16, 48),
    "gather of rows": (lambda: X.gather(0, EVERYWHERE), 48 + 16, 48),
    "gather of columns": (lambda: X.gather(1, COLUMNS), 32 + 16, 32),
    "gather, distinct indices": (lambda: X.gather(1, DENSE_COLUMNS), 32 + 64, 32),
    "index_copy": (lambda: OUT.index_copy_(0, ROWS, TWO_ROWS), 48 + 16, 48),
    "scatter": (lambda: OUT.scatter_(0, EVERYWHERE, TWO_ROWS), 48 + 16, 48),
    "scatter of a larger source": (lambda: OUT.scatter_(0, EVERYWHERE, X), 48 + 16, 48),
    "scatter of an expanded source": (lambda: OUT.scatter_(0, EVERYWHERE, ROW.expand(2, 6)), 24 + 16, 48),
    "scatter of a number": (lambda: OUT.scatter_(0, EVERYWHERE, 1.0), 16, 48),
    "index_add": (lambda: OUT.index_add_(0, ROWS, TWO_ROWS), 48 + 48 + 16, 48),
    "scatter_add": (lambda: OUT.scatter_add_(0, EVERYWHERE, TWO_ROWS), 48 + 48 + 16, 48),
    "lists": (lambda: torch._foreach_add([X, ROW], [Y, ROW]), 192 + 24, 96 + 24),
    "lists in place": (lambda: torch._foreach_add_([OUT, ROW], [X, ROW]), 192 + 24, 96 + 24),
    "lists by numbers": (lambda: torch._foreach_mul_([OUT, ROW], [1.0, 2.0]), 96 + 24, 96 + 24),
    "list of norms": (lambda: torch._foreach_norm([X, ROW]), 96 + 24, 8),
    "lists copied": (lambda: torch._foreach_copy_([OUT], [X]), 96, 96),
    "lists to zero": (lambda: torch._foreach_zero_([OUT]), 0, 96),
}
"""Bytes read and written by one operation."""


def counted(function: Callable[[], Any], phase: str = OTHER) -> Traffic:
    with TrafficCounter("cpu") as counter:
        function()
    assert set(counter.by_phase) <= {phase}
    return counter.by_phase[phase]


@pytest.mark.parametrize("name", COUNTS)
def test_bytes_of_an_operation(name: str) -> None:
    function, read, written = COUNTS[name]
    assert counted(function) == Traffic(1, read, written)


@pytest.mark.parametrize(
    ("function", "read", "written"),
    [
        (lambda: X.sum(-1, dtype=torch.float64), 96 + 192, 192 + 4 * 8),
        (lambda: ROW.expand(4, 6).sum(dtype=torch.float64), 24 + 192, 192 + 8),
        (lambda: torch.linalg.vector_norm(SHORT, dim=0, dtype=torch.float32), 48 + 96, 96 + 6 * 4),
        (lambda: MASK.sum(), 24 + 192, 192 + 8),
    ],
)
def test_sums_in_another_dtype_are_those_of_a_converted_copy(
    function: Callable[[], Any], read: int, written: int
) -> None:
    assert counted(function) == Traffic(2, read, written)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    assert [event.name for event in profiler.events()].count("aten::_to_copy") == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda: X.mT[1:].view(-1, 4, 1).expand(-1, -1, 3).unsqueeze(0),
        lambda: X.as_strided((2, 2), (6, 1)).detach(),
        lambda: torch.split(X, 2) + X.split([1, 3]),
        lambda: X.view(torch.int32),
        lambda: (torch.empty(4, 6), torch.empty_like(X), X.new_empty(3)),
    ],
)
def test_views_and_allocations_are_free(function: Callable[[], Any]) -> None:
    assert counted(function) == Traffic()


def test_lists_that_multi_tensor_kernels_refuse_are_one_operation_a_tensor() -> None:
    assert counted(lambda: torch._foreach_add_([OUT, OUT[0]], [SHORT, SHORT[0]])).operations == 2
    assert counted(lambda: torch._foreach_mul_([OUT[:, ::2], ROW], 2.0)).operations == 2
    assert counted(lambda: torch._foreach_add_([SQUARE, X], [OTHER_SQUARE.mT, Y])).operations == 2
    assert counted(lambda: torch._foreach_mul_([OUT.mT, ROW], 2.0)).operations == 1
    half, mixed = [OUT.bfloat16(), ROW.bfloat16()], [OUT.bfloat16(), ROW]
    assert counted(lambda: torch._foreach_copy_([OUT, ROW], half)).operations == 1
    assert counted(lambda: torch._foreach_copy_([OUT, ROW], mixed)).operations == 2


@pytest.mark.parametrize(
    ("function", "flops", "read", "written"),
    [
        (lambda: X @ Y.mT, 2 * 4 * 6 * 4, 192, 64),
        (lambda: X @ X.mT, 2 * 4 * 6 * 4, 96, 64),
        (lambda: torch.bmm(X.expand(3, 4, 6), Y.mT.expand(3, 6, 4)), 3 * 2 * 4 * 6 * 4, 192, 3 * 64),
        (lambda: torch.addmm(SQUARE, X, Y.mT), 2 * 4 * 6 * 4, 64 + 192, 64),
        (lambda: torch.mm(X, Y.mT, out=torch.empty(4, 4)), 2 * 4 * 6 * 4, 192, 64),
        (lambda: SQUARE.unsqueeze(0).baddbmm_(X.unsqueeze(0), Y.mT.unsqueeze(0)), 2 * 4 * 6 * 4, 64 + 192, 64),
        (lambda: torch.linalg.qr(X.mT), 0, 96, 96 + 64),
    ],
)
def test_products_are_counted_apart(function: Callable[[], Any], flops: int, read: int, written: int) -> None:
    with TrafficCounter("cpu") as counter:
        function()
    assert dict(counter.by_phase) == {PRODUCTS: Traffic(1, read, written)}
    assert counter.flops == flops
    assert counter.beside_products == Traffic()


def test_fused_adamw_moves_28_bytes_an_entry() -> None:
    """It reads p, g, m and v, and writes p, m and v; and a step count for each tensor, which is increased before."""
    sizes, fused = [(8, 6), (5, 1)], dict(optimizers("gpt2"))["torch.optim.AdamW, fused"]
    entries = sum(rows * columns for rows, columns in sizes)
    assert count_step(fused, sizes).beside_products == Traffic(2, 16 * entries + 2 * 8, 12 * entries + 2 * 4)


def test_adamw_of_lists() -> None:
    """By its source: p *= a; m.lerp_(g); v *= b; v.addcmul_(g, g); d = sqrt(v); d /= c; d += eps; p.addcdiv_(m, d)."""
    foreach = dict(optimizers("gpt2"))["torch.optim.AdamW, foreach"]
    read, written = 4 * (1 + 2 + 1 + 2 + 1 + 1 + 1 + 3), 4 * 8
    assert count_step(foreach, [(8, 6)]).beside_products == Traffic(8, read * 48, written * 48)


# Devices


@pytest.fixture
def fake() -> Iterator[None]:
    with fake_tensors():
        yield


def test_a_copy_to_the_device_is_an_operation_and_its_bytes(fake: None) -> None:
    numbers = torch.zeros(6, device="cpu")
    with TrafficCounter("cuda") as counter:
        numbers.to(torch.device("cuda"), non_blocking=True)
    assert dict(counter.by_phase) == {OTHER: Traffic(1, 0, 24)}


def test_operations_of_the_host_are_not_counted(fake: None) -> None:
    host, device = torch.zeros(6, device="cpu"), torch.zeros(6, device="cuda")
    with TrafficCounter("cuda") as counter:
        torch._foreach_add_([host], 1)
        torch.erf(host)
        device *= torch.ones((), device="cpu")
    assert dict(counter.by_phase) == {OTHER: Traffic(1, 24, 24)}


def test_a_gpu_sums_half_precision_in_float32_without_a_copy(fake: None) -> None:
    short = torch.zeros(4, 6, dtype=torch.bfloat16, device="cuda")
    with TrafficCounter("cuda") as counter:
        short.sum(dtype=torch.float32)
    assert dict(counter.by_phase) == {OTHER: Traffic(1, 48, 4)}


def test_fake_tensors_are_counted_as_real_ones() -> None:
    sizes = [(66, 48), (34, 90), (90, 34)]  # no whole chunks: the host would read estimates on a CPU
    for name, build in optimizers("smollm2-135m", ["torch"]):
        if name.startswith("Dion at"):  # on a CPU the host reads how exact its QR is
            continue
        parameters: list[Tensor] = [nn.Parameter(torch.rand(size)) for size in sizes]
        optimizer = build(parameters)
        for parameter in parameters:
            parameter.grad = torch.rand_like(parameter)
        optimizer.step()
        with TrafficCounter("cpu") as real:
            optimizer.step()
        faked = count_step(build, sizes, device="cpu")
        assert (real.by_phase, real.flops) == (faked.by_phase, faked.flops), name


# What is not known


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda: torch.erf(X), "aten.erf.default"),
        (lambda: X.index_add(0, ROWS, TWO_ROWS), "aten.index_add.default"),
        (lambda: X.scatter(0, EVERYWHERE, 1.0), "aten.scatter.value"),
        (lambda: OUT.erf_(), "aten.erf_.default"),
    ],
)
def test_an_operation_without_a_rule_is_refused(function: Callable[[], Any], name: str) -> None:
    with pytest.raises(UnknownOperationError, match=f"{name} has no rule"), TrafficCounter("cpu"):
        function()


@torch.library.custom_op("dion2::halve_in_a_test", mutates_args={"target"})
def halve(target: Tensor, times: int = 1, *, offset: float = 0.0) -> Tensor:
    target.mul_(0.5**times).add_(offset)
    return target.sum(-1)


@torch.library.custom_op("elsewhere::halve_in_a_test", mutates_args={"target"})
def halve_elsewhere(target: Tensor) -> None:
    target.mul_(0.5)


def test_operators_of_the_package_declare_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def declares(name: str, arguments: tuple[Any, ...]) -> tuple[int, int]:
        asked.append((name, arguments[1:]))
        return arguments[0].nbytes, arguments[0].nbytes + 16

    monkeypatch.setattr(kernel_traffic, "traffic", declares)
    monkeypatch.setattr(kernel_traffic, "launches", lambda name, arguments: 3)
    assert counted(lambda: halve(OUT, offset=1.0)) == Traffic(3, 96, 96 + 16)
    assert asked == [("halve_in_a_test", (1, 1.0))]


def test_operators_that_declare_nothing_are_refused() -> None:
    with pytest.raises(UnknownOperationError, match=r"elsewhere.halve_in_a_test.default has no rule"):
        counted(lambda: halve_elsewhere(OUT))
    with pytest.raises(UnknownOperationError, match=r"dion2.halve_in_a_test.default has no rule"):
        counted(lambda: halve(OUT))


# Phases


def test_the_innermost_function_names_the_phase() -> None:
    def inner() -> None:
        torch.add(X, Y)

    def outer() -> None:
        inner()
        X.abs()
        torch.mm(SQUARE, SQUARE)

    with TrafficCounter("cpu", {inner: "inner", outer: "outer"}) as counter:
        outer()
        X.sqrt()
    assert counter.by_phase == {
        "inner": Traffic(1, 192, 96),
        "outer": Traffic(1, 96, 96),
        OTHER: Traffic(1, 96, 96),
        PRODUCTS: Traffic(1, 64, 64),
    }
    assert counter.beside_products == Traffic(3, 384, 288)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=needs_triton) if "triton" in name else name for name, _ in optimizers("gpt2")],
)
def test_the_phases_add_up(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what is counted without any: the second step once more, of which no function has a phase."""
    build, sizes = dict(optimizers("gpt2"))[name], [(64, 48), (32, 96), (96, 32)]
    counter = count_step(build, sizes, dtype=dtype)
    monkeypatch.setattr(traffic, "TrafficCounter", lambda device: TrafficCounter(device, {}))
    at_once = count_step(build, sizes, dtype=dtype)
    assert set(counter.by_phase) <= {*PHASES, PRODUCTS}
    assert set(at_once.by_phase) <= {OTHER, PRODUCTS}
    assert counter.beside_products == at_once.by_phase[OTHER]
    assert counter.by_phase[PRODUCTS] == at_once.by_phase[PRODUCTS]


@each_kernels
def test_accumulating_reads_g_and_m_and_writes_m(kernels: Any) -> None:
    counter = count_step(lambda params: Dion2([{"params": params}], kernels=kernels), [(64, 48), (32, 96)])
    assert counter.by_phase["accumulate"].moved >= 12 * (64 * 48 + 32 * 96)


@pytest.mark.parametrize(
    "settings",
    [
        {"nesterov": True, "check_finite": "skip"},
        {"cautious_weight_decay": True, "normalize_neurons": True},
        {"rounding": "nearest", "state_dtype": "bfloat16"},
        {"algorithm": "dion", "check_finite": "skip", "cautious_weight_decay": True},
        {"algorithm": "adamw", "cautious_weight_decay": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kernels
def test_every_operation_of_the_package_has_a_rule(settings: dict[str, Any], dtype: torch.dtype, kernels: Any) -> None:
    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        return Dion2([{"params": params, **settings}], kernels=kernels)

    counter = count_step(build, [(64, 48), (32, 96)], dtype=dtype)
    assert counter.beside_products.moved > 0


# The table


@needs_triton
@pytest.mark.parametrize("shapes", ["smollm2-135m", "gpt2", "llama-1b"])
def test_fused_passes_move_fewer_bytes_than_adamw_in_launches_that_do_not_grow(shapes: str) -> None:
    """At a quarter, at a fixed working memory; the products are bounded by the number of shapes."""

    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        return Dion2([{"params": params, "transposed": TRANSPOSED[shapes]}], kernels="triton", working_memory=2**40)

    counters = []
    for layers in (2, 6, 30):
        sizes = LAYERS[shapes] * layers
        counter = count_step(build, sizes)
        assert counter.beside_products.moved <= 28 * sum(rows * columns for rows, columns in sizes)
        counters.append(counter)
    assert len({counter.beside_products.operations for counter in counters}) == 1
    assert counters[0].beside_products.operations <= 30
    products = {counter.by_phase[PRODUCTS].operations for counter in counters}
    assert len(products) == 1 and products.pop() <= 15 * len(set(LAYERS[shapes]))


@needs_triton
def test_rounding_stochastically_takes_launches_that_do_not_grow() -> None:
    """The random bits of matrices that are alike are drawn together."""

    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        return Dion2([{"params": params}], kernels="triton", working_memory=2**40)

    sizes = LAYERS["smollm2-135m"]
    counters = [count_step(build, sizes * layers, dtype=torch.bfloat16) for layers in (2, 6)]
    operations = [counter.beside_products.operations for counter in counters]
    assert operations[0] == operations[1] <= 90


@needs_triton
@pytest.mark.parametrize("settings", [{"max_grad_norm": 1.0}, {"check_finite": "skip"}], ids=str)
def test_looking_at_gradients_takes_launches_that_do_not_grow(settings: dict[str, Any]) -> None:
    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        return Dion2([{"params": params}], kernels="triton", working_memory=2**40, **settings)

    sizes = LAYERS["smollm2-135m"]
    few, many = (count_step(build, sizes * layers).beside_products.operations for layers in (2, 6))
    assert few == many <= 50


@pytest.mark.parametrize(("rounding", "operations"), [("nearest", 0), ("stochastic", 1)])
@pytest.mark.filterwarnings("ignore:rounding=.nearest. loses")
def test_adamw_of_half_precision_takes_few_launches_for_each_small_parameter(rounding: str, operations: int) -> None:
    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        return Dion2([{"params": params, "algorithm": "adamw", "rounding": rounding}])

    few, many = (count_step(build, [(1, 576)] * count, dtype=torch.bfloat16) for count in (20, 60))
    assert few.beside_products.operations <= 60 + 20 * operations
    assert many.beside_products.operations - few.beside_products.operations == 40 * operations


@needs_triton
@pytest.mark.parametrize("settings", [{"algorithm": "dion3"}, {"normalize_neurons": True}], ids=str)
@pytest.mark.parametrize("shapes", ["smollm2-135m", "gpt2"])
def test_fused_neurons_cost_one_more_reading_of_o(shapes: str, settings: dict[str, Any]) -> None:
    """At a quarter half a byte a parameter, and their sums; in launches that do not grow with the layers."""

    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": params, "transposed": TRANSPOSED[shapes], **settings}]
        return Dion2(groups, kernels="triton", working_memory=2**40)

    operations = set()
    for layers in (2, 6):
        sizes = LAYERS[shapes] * layers
        counter = count_step(build, sizes)
        assert 0.5 <= counter.by_phase["neurons"].moved / sum(rows * columns for rows, columns in sizes) <= 0.55
        operations.add(counter.beside_products.operations)
    assert len(operations) == 1 and operations.pop() <= 30


@pytest.mark.parametrize(
    ("asked", "kernels"),
    [
        pytest.param([], ["torch", "triton"], marks=needs_triton),
        (["--kernels", "torch"], ["torch"]),
    ],
)
def test_main_prints_a_row_for_each_optimizer_and_writes_the_figures(
    asked: list[str],
    kernels: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LAYERS, "gpt2", [(24, 72), (24, 24)])
    file = tmp_path / "traffic.json"
    main(["--shapes", "gpt2", "--layers", "1", "2", "--json", str(file), *asked])
    printed, tables = capsys.readouterr().out, json.loads(file.read_text())
    assert [table["matrices"] for table in tables] == [2, 4]
    names = [name for name, _ in optimizers("gpt2", kernels)]
    for table in tables:
        assert list(table["optimizers"]) == names
        assert table["entries"] == table["layers"] * 24 * (72 + 24)
    for name in names:
        assert printed.count(f"\n{name} ") == 2
    [fused] = [line for line in printed.splitlines() if "fused" in line][:1]
    # The step counts of two matrices add 12 bytes each.
    assert fused.split()[-5:] == [f"{28 + 24 / tables[0]['entries']:.2f}", "2", "0.00", "0", "0.0"]


def test_kernels_are_an_argument_of_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(traffic, "Dion2", lambda groups, **arguments: given.append(arguments))
    builds = dict(optimizers("gpt2"))
    assert [name for name in builds if name.startswith("Dion3")] == ["Dion3 at 1/4, torch", "Dion3 at 1/4, triton"]
    for name in ("Dion2 at 1/8, triton", "Dion at 1/4"):
        builds[name]([])
    dict(optimizers("gpt2", working_memory=1000))["Dion2 at 1, torch"]([])
    bounds = [each.pop("working_memory") for each in given]
    assert given == [{"kernels": "triton"}, {"kernels": "auto"}, {"kernels": "torch"}]
    assert bounds == [None, None, 1000]
