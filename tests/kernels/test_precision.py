"""Devices without float64: fake tensors on Apple's GPUs, and real ones on a CPU whose float64 is switched off."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fake_tensors import WithoutCuda
from dion2_lightning import Dion2, SelectionTracker, clip_grad_norm_
from dion2_lightning.kernels import precision
from dion2_lightning.kernels.orthonormalize import orthonormalize
from dion2_lightning.kernels.precision import move_sums, sum_dtype
from tests.algorithms.test_dion2 import LARGE_SHAPES, SHAPES, check
from tests.reference import Reference, polar

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.fixture
def cpu_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("cpu", "mps"))


@pytest.fixture
def fake_mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor made in the test is fake; torch chooses its kernels as it does for real MPS tensors."""
    for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        monkeypatch.setattr(sys.modules[module], "_foreach_supported_types", [Tensor, nn.Parameter, FakeTensor])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), WithoutCuda():
        yield


@pytest.mark.parametrize("has_fp64", [True, False])
def test_an_intel_gpu_says_itself_whether_it_has_float64(monkeypatch: pytest.MonkeyPatch, has_fp64: bool) -> None:
    xpu = torch.device("xpu", 0)
    assert sum_dtype(xpu) == torch.float64  # there is none: fake tensors are as on most
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has_fp64))
    assert sum_dtype(xpu) == (torch.float64 if has_fp64 else torch.float32)


class NoFloat64(TorchDispatchMode):
    """Refuse operations that take or make a float64 tensor on a kind of device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for each in tree_leaves((arguments, keywords, result)):
            if isinstance(each, Tensor) and each.dtype == torch.float64 and each.device.type == self._device.type:
                raise AssertionError(f"{function} with a float64 tensor on {each.device}")
        return result


def with_gradient(*shape: int, device: torch.device = MPS, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def groups_on(device: torch.device) -> list[dict[str, Any]]:
    """Both selection axes and storage orders, several matrices in a batch, stacks, half precision, and AdamW."""
    bf16 = torch.bfloat16
    return [
        {"params": [with_gradient(*shape, device=device) for shape in ((40, 96), (40, 96), (96, 40), (64, 64))]},
        {"params": [with_gradient(96, 40, device=device)], "transposed": True, "check_finite": True},
        {"params": [with_gradient(4, 96, 40, device=device)], "batched": True, "select": "output"},
        {"params": [with_gradient(160, 192, device=device, dtype=bf16)], "orthonormalize_dtype": "bfloat16"},
        {"params": [with_gradient(40, 48, device=device)], "state_dtype": "bfloat16"},
        {
            "params": [with_gradient(40, device=device), with_gradient(30, 8, device=device, dtype=bf16)],
            "algorithm": "adamw",
        },
    ]


def parameters_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def checked_steps(groups: list[dict[str, Any]], device: torch.device) -> Tensor:
    """Clip, step and track without float64; return the table of metrics, which is still on the device."""
    optimizer = Dion2(groups, lr=0.1)
    tracker = SelectionTracker(every=1, orthogonality=True)
    tracker.attach(optimizer)
    with NoFloat64(device):
        for _ in range(2):
            clip_grad_norm_(parameters_of(groups), 1.0)
            optimizer.step()
        assert tracker._record is not None
        return tracker._record.table(len(tracker._parameters))


def test_a_step_on_mps_uses_no_float64(fake_mps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dion2_lightning.step_checks.on_any_rank", lambda flags, *_: [False] * len(flags))  # reads data
    groups = groups_on(MPS)
    groups[0]["lr"] = 0.2  # or the first step would only create state
    table = checked_steps(groups, MPS)
    assert (table.device.type, table.dtype) == ("mps", torch.float32)


@pytest.mark.parametrize("first", [CPU, MPS], ids=str)
def test_a_model_on_two_devices(fake_mps: None, monkeypatch: pytest.MonkeyPatch, first: torch.device) -> None:
    """Sums go from one to the other in what both have; the host reads the first device's table."""
    monkeypatch.setattr("dion2_lightning.step_checks.on_any_rank", lambda flags, *_: [False] * len(flags))
    second = MPS if first == CPU else CPU
    table = checked_steps([*groups_on(first), *groups_on(second)], MPS)
    assert (table.device.type, table.dtype) == (first.type, sum_dtype(first))


def test_a_step_on_a_cpu_without_float64(cpu_without_float64: None) -> None:
    """With real tensors, so that all operations run."""
    groups = groups_on(CPU)
    for parameter in parameters_of(groups):
        parameter.grad.normal_(generator=torch.Generator().manual_seed(0))
    assert checked_steps(groups, CPU).isfinite().all()


@pytest.mark.parametrize("device", [CPU, MPS], ids=str)
def test_the_detector_detects(fake_mps: None, device: torch.device) -> None:
    with pytest.raises(AssertionError, match="with a float64 tensor"), NoFloat64(device):
        torch.zeros(3, device=device).double()


def test_sums_are_moved_in_what_both_devices_have(fake_mps: None) -> None:
    on_cpu, on_mps = torch.zeros(3, dtype=torch.float64), torch.zeros(3, device=MPS)
    with NoFloat64(MPS):
        assert (move_sums(on_cpu, MPS).dtype, move_sums(on_mps, CPU).dtype) == (torch.float32, torch.float64)
        assert move_sums(on_cpu, CPU) is on_cpu


# Numbers


@pytest.mark.parametrize("kind", SHAPES)
def test_the_update_equals_the_reference(cpu_without_float64: None, kind: str) -> None:
    """The same selections and momenta: none of these norms lie within float32's rounding of each other."""
    check(**SHAPES[kind])


@pytest.mark.parametrize("kind", LARGE_SHAPES)
def test_the_update_in_bfloat16_equals_the_reference(cpu_without_float64: None, kind: str) -> None:
    check(**LARGE_SHAPES[kind], dtype="bfloat16")


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("shape", [(24, 96), (96, 24)], ids=str)
def test_tiny_and_huge_gradients(cpu_without_float64: None, shape: tuple[int, int], scale: float) -> None:
    """Their squares vanish or overflow in float32."""
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = Dion2([parameter], lr=0.02, orthonormalize_dtype="float32")
    reference = Reference(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        parameter.grad = scale * torch.randn(shape, generator=generator)
        reference.step(parameter.grad)
        optimizer.step()
        assert optimizer.selection_of(parameter).indices.tolist() == reference.selected
    error = torch.linalg.norm(parameter.double() - reference.weight) / torch.linalg.norm(reference.weight)
    assert error < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1.0, 1e25, 1e36])
def test_orthonormalization_at_any_scale(
    cpu_without_float64: None, scale: float, dtype: torch.dtype, tolerance: float
) -> None:
    for shape in ((8, 32), (48, 192), (192, 48)):
        matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        result, expected = orthonormalize(scale * matrix, dtype)[0].double(), polar(matrix[0])
        assert torch.linalg.norm(result - expected) / torch.linalg.norm(expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gives_zero_and_a_denormal_matrix_no_nan(cpu_without_float64: None, dtype: torch.dtype) -> None:
    matrices = torch.randn(3, 48, 192, generator=torch.Generator().manual_seed(0))
    result = orthonormalize(matrices * torch.tensor([1.0, 0.0, 1e-43]).view(3, 1, 1), dtype)
    assert result.isfinite().all()
    assert result[1].count_nonzero() == 0
    assert torch.equal(result[0], orthonormalize(matrices[:1], dtype)[0])
    assert torch.linalg.svdvals(result[2].float()).max() < 1.15


def test_a_zero_matrix_beside_others_gets_no_update(cpu_without_float64: None) -> None:
    parameter = nn.Parameter(torch.zeros(3, 8, 12))
    optimizer = Dion2([{"params": [parameter], "batched": True}], lr=0.1)
    parameter.grad = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    parameter.grad[1] = 0
    optimizer.step()
    assert parameter[1].count_nonzero() == 0
    assert parameter[0].norm() > 0
    assert parameter[2].norm() > 0


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_clipping_equals_torch(cpu_without_float64: None, norm_type: float) -> None:
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in ((6, 8), (8,), (3, 3))] for _ in range(2))
    torch.manual_seed(0)
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = clip_grad_norm_(ours, 0.5, norm_type)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 0.5, norm_type))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_metrics_are_those_of_a_device_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def after_steps() -> tuple[SelectionTracker, list[Any]]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape)) for shape in ((16, 24), (24, 16), (40, 40))]
        optimizer = Dion2([{"params": parameters}], lr=0.1, orthonormalize_dtype="float32")
        tracker = SelectionTracker(every=5, orthogonality=True)
        tracker.attach(optimizer)
        metrics = []
        for _ in range(20):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            metrics.append(tracker.pop_metrics())
        return tracker, [each.named(per_matrix=True) for each in metrics if each is not None]

    expected, expected_metrics = after_steps()
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("cpu",))
    found, metrics = after_steps()
    assert len(metrics) == 4
    for values, expected_values in zip(metrics, expected_metrics, strict=True):
        assert values == pytest.approx(expected_values, rel=1e-5, abs=1e-5)
    assert found.history.counts.dtype == torch.float64
    assert torch.equal(found.history.counts, expected.history.counts)
    assert torch.equal(found.history.shares, expected.history.shares)


# What is refused


@pytest.mark.parametrize("name", ["orthonormalize_dtype", "state_dtype"])
def test_float64_settings_are_refused(fake_mps: None, name: str) -> None:
    message = f"group 0: parameter 'w' of shape .* is on 'mps', which has no float64, and {name} is 'float64'; choose"
    parameter = nn.Parameter(torch.zeros(4, 6, device=MPS))
    with pytest.raises(ValueError, match=message):
        Dion2([("w", parameter)], **{name: torch.float64})
    with pytest.raises(ValueError, match=message):
        Dion2([{"params": [("w", parameter)], name: "float64"}])
    Dion2([{"params": [("w", parameter)], "algorithm": "adamw"}], **{name: "float64"})  # AdamW has neither setting


@pytest.mark.parametrize("name", ["orthonormalize_dtype", "state_dtype"])
def test_float64_settings_are_refused_after_a_move_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is touched."""
    parameter = nn.Parameter(torch.ones(4, 6))
    parameter.grad = torch.ones(4, 6)
    optimizer = Dion2([("w", parameter)], lr=0.1, **{name: "float64"})
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("cpu",))
    with pytest.raises(ValueError, match=f"group 'dion2': parameter 'w' is on 'cpu', which .* {name} is 'float64'"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(4, 6))
    assert not optimizer.state
    optimizer.param_groups[0][name] = None
    optimizer.step()


def test_a_float64_momentum_in_a_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.ones(4, 6, dtype=torch.float64))
    parameter.grad = torch.ones_like(parameter)
    optimizer = Dion2([("w", parameter)], lr=0.1)
    optimizer.step()
    saved = optimizer.state_dict()
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("cpu",))
    other = Dion2([("w", nn.Parameter(torch.ones(4, 6)))], lr=0.2)
    with pytest.raises(ValueError, match=r"'w' is on 'cpu', which .* checkpoint's 'momentum' is in float64; .*\.float"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.2
    assert not other.state
    saved["state"][0]["momentum"] = saved["state"][0]["momentum"].float()
    other.load_state_dict(saved)


def test_several_ranks_are_refused(cpu_without_float64: None) -> None:
    """They add up norms in float64. AdamW adds up nothing, nor do replicas that do not share the work."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        for shape, algorithm, share_replicas in (
            ((4, 6), "dion2", None),
            ((4,), "adamw", None),
            ((4, 6), "dion2", False),
        ):
            groups = [{"params": [("w", with_gradient(*shape, device=CPU))], "algorithm": algorithm}]
            optimizer = Dion2(groups, lr=0.1, process_group=dist.group.WORLD, share_replicas=share_replicas)
            if algorithm == "dion2" and share_replicas is None:
                with pytest.raises(ValueError, match=r"'w' is on 'cpu' and shared by 4 ranks, .* train in one process"):
                    optimizer.step()
            else:
                optimizer.step()
    finally:
        dist.destroy_process_group()
