"""Metrics against hand calculation and against plain loops over the optimizer's selections."""

import copy
import gc
import math
import warnings
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.statistics import size_of, tensors_of
from dion2_lightning import Dion2, SelectionTracker, SelectionWarning, build_optimizer
from dion2_lightning.monitoring.history import MAX_POINTS, SelectionHistory
from dion2_lightning.monitoring.metrics import HEALTH_CHECKS

SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "wide": ((8, 20), {}),
    "tall": ((20, 8), {}),
    "square": ((12, 12), {"fraction": 0.5}),
    "conv1d": ((10, 30), {"transposed": True}),
    "experts": ((3, 8, 20), {"batched": True}),
}

OF_SLICES = [
    "selected_fraction", "coverage", "staleness_mean", "staleness_max", "turnover", "captured_mass", "imbalance",
]  # fmt: skip
"""The metrics of selected slices, in their order."""


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, (shape, _) in SHAPES.items()}


def optimizer_of(named: dict[str, nn.Parameter], **settings: Any) -> Dion2:
    groups = [{"params": [(name, named[name])], "name": f"its {name}", **SHAPES[name][1]} for name in named]
    return Dion2(groups, **{"lr": 0.1, "momentum": 0.6, "orthonormalize_dtype": "float32", **settings})


def optimizer_with(weight: nn.Parameter, **settings: Any) -> Dion2:
    return Dion2([("weight", weight)], momentum=0.0, **settings)


def set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        scales = torch.logspace(0, 1, parameter.shape[-2]).unsqueeze(-1)
        parameter.grad = scales * torch.randn(parameter.shape, generator=generator)


class Reference:
    """The metrics of one parameter by their definitions, in plain loops over matrices and slices."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.step = 0
        self.last: list[list[int | None]] = []
        self.counts: list[list[int]] = []

    def metrics(self, optimizer: Dion2, parameter: Tensor, momentum: Tensor, weight: Tensor) -> dict[str, float]:
        """Take the momentum after accumulation and the weight before the step; weight decay must be 0."""
        self.step += 1
        selection = optimizer.selection_of(parameter)
        assert selection is not None
        indices = selection.indices.reshape(-1, selection.indices.shape[-1]).tolist()
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        by_rows = (selection.axis == 0) != group["transposed"]
        stack = momentum.double().reshape(-1, *momentum.shape[-2:])
        slices = stack if by_rows else stack.mT
        n = slices.shape[1]
        self.last = self.last or [[None] * n for _ in slices]
        self.counts = self.counts or [[0] * n for _ in slices]
        fresh = captured = gini = 0.0
        for matrix, chosen in enumerate(indices):
            fresh += sum(self.last[matrix][i] is None or self.last[matrix][i] != self.step - 1 for i in chosen)
            norms = [slices[matrix, i].abs().sum().item() for i in range(n)]
            captured += sum(norms[i] for i in chosen) / sum(norms)
            for i in chosen:
                self.last[matrix][i] = self.step
                self.counts[matrix][i] += 1
            differences = sum(abs(a - b) for a in self.counts[matrix] for b in self.counts[matrix])
            gini += differences / (2 * n * sum(self.counts[matrix]))
        waits = [self.step - (last or 0) for each in self.last for last in each]
        recent = [last is not None and last > self.step - self.window for each in self.last for last in each]
        return {
            "selected_fraction": len(indices[0]) / n,
            "coverage": sum(recent) / len(recent),
            "staleness_mean": sum(waits) / len(waits),
            "staleness_max": float(max(waits)),
            "turnover": fresh / sum(map(len, indices)),
            "captured_mass": captured / len(indices),
            "imbalance": gini / len(indices),
            "update_rms": (parameter.detach() - weight).double().square().mean().sqrt().item(),
        }


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize("every", [1, 3])
def test_metrics_follow_their_definitions(every: int) -> None:
    named = parameters()
    optimizer = optimizer_of(named, weight_decay=0.0)
    tracker = SelectionTracker(every=every, window=4)
    tracker.attach(optimizer)
    references = {name: Reference(window=4) for name in named}
    for step in range(1, 13):
        set_gradients(named, step)
        before = {
            name: (optimizer.state[p].get("momentum", torch.zeros_like(p)) + p.grad, p.detach().clone())
            for name, p in named.items()
        }
        optimizer.step()
        metrics = tracker.pop_metrics()
        expected = {name: references[name].metrics(optimizer, p, *before[name]) for name, p in named.items()}
        assert (metrics is not None) == (step % every == 0)
        if metrics is None:
            continue
        assert metrics.step == step
        for name in named:
            found = metrics.parameters[f"its {name}", name]
            assert list(found) == [*OF_SLICES, "update_rms"]
            assert found == pytest.approx(expected[name], rel=1e-5, abs=1e-12), (name, step)
            assert metrics.groups[f"its {name}"] == found


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_by_hand() -> None:
    """Rows of a 4 x 8 matrix; the gradients say which one is selected. k = 1."""
    weight = nn.Parameter(torch.zeros(4, 8))
    optimizer = optimizer_with(weight, lr=1.0, weight_decay=0.0, adjust_lr_fn="none", orthonormalize_dtype="float32")
    optimizer.orthonormalize = lambda row: nn.functional.normalize(row, dim=-1)
    tracker = SelectionTracker(every=1, window=2)
    tracker.attach(optimizer)
    overall = []
    for row in (0, 0, 2):
        weight.grad = torch.zeros(4, 8)
        weight.grad[row] = 3.0
        weight.grad[3] = 1.0 if row == 2 else 0.0
        optimizer.step()
        overall.append(tracker.pop_metrics().overall)
    # One orthonormal row times the square root of n / k = 2, over 32 entries.
    rms = pytest.approx(math.sqrt(4 / 32))
    assert overall[0] == {
        "selected_fraction": 0.25, "coverage": 0.25, "staleness_mean": 0.75, "staleness_max": 1.0, "turnover": 1.0,
        "captured_mass": 1.0, "imbalance": 0.75, "update_rms": rms,
    }  # fmt: skip
    assert overall[1] == {
        "selected_fraction": 0.25, "coverage": 0.25, "staleness_mean": 1.5, "staleness_max": 2.0, "turnover": 0.0,
        "captured_mass": 1.0, "imbalance": 0.75, "update_rms": rms,
    }  # fmt: skip
    # Counts 0, 0, 1, 2: (-3 * 0 - 1 * 0 + 1 * 1 + 3 * 2) / (4 * 3) = 7 / 12. Waits 1, 3, 0, 3.
    assert overall[2] == {
        "selected_fraction": 0.25, "coverage": 0.5, "staleness_mean": 1.75, "staleness_max": 3.0, "turnover": 1.0,
        "captured_mass": 0.75, "imbalance": pytest.approx(7 / 12), "update_rms": rms,
    }  # fmt: skip


def test_names() -> None:
    named = {name: parameter for name, parameter in parameters().items() if name in ("wide", "square")}
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=1, orthogonality=True)
    tracker.attach(optimizer)
    set_gradients(named, 1)
    optimizer.step()
    metrics = tracker.pop_metrics()
    names = [*OF_SLICES, "update_rms", "orthogonality_error"]
    expected = [f"dion2/{name}" for name in names]
    expected += [f"dion2/its {group}/{name}" for group in named for name in names]
    assert list(metrics.named()) == expected
    each = [f"dion2/its {group}/{group}/{name}" for group in named for name in names]
    assert list(metrics.named(per_matrix=True)) == expected + each
    assert metrics.named()["dion2/its wide/coverage"] == 0.25


def test_weights_of_slices_and_matrices_in_means() -> None:
    """Coverage pools 8 slices of which 2 are selected and 12 of which 6 are; captured mass is a mean of two."""
    named = {name: parameter for name, parameter in parameters().items() if name in ("wide", "square")}
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    set_gradients(named, 1)
    optimizer.step()
    metrics = tracker.pop_metrics()
    assert metrics.overall["coverage"] == (2 + 6) / (8 + 12)
    masses = [each["captured_mass"] for each in metrics.parameters.values()]
    assert metrics.overall["captured_mass"] == pytest.approx(sum(masses) / 2)


def test_variance_spread() -> None:
    """Of the neurons that have a variance, by matrix; matrices without any do not count."""
    stack, matrix = nn.Parameter(torch.zeros(2, 8, 12)), nn.Parameter(torch.zeros(6, 12))
    optimizer = Dion2([{"params": [stack], "batched": True, "algorithm": "dion3"}, {"params": [matrix]}], lr=0.1)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    stack.grad, matrix.grad = torch.zeros(2, 8, 12), torch.ones(6, 12)
    stack.grad[0] = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        optimizer.step()
        metrics = tracker.pop_metrics()
    variance = optimizer.state[stack]["variance"][0]
    variance = variance[variance > 0].double()
    assert 2 < len(variance) < 8
    expected = (variance.std(correction=0) / variance.mean()).item()
    assert metrics.overall["variance_spread"] == pytest.approx(expected, rel=1e-9)
    assert "variance_spread" not in metrics.groups["dion2"]


def test_orthogonality_error() -> None:
    """What the optimizer's own result gives; far from orthonormal is worth a warning."""
    named = parameters()
    optimizer = optimizer_of(named)
    results: list[Tensor] = []

    def twice(submatrices: Tensor) -> Tensor:
        left, _, right = torch.linalg.svd(submatrices, full_matrices=False)
        results.append(left @ right)
        return 2.0 * left @ right if scaled else left @ right

    optimizer.orthonormalize = twice
    tracker = SelectionTracker(every=1, orthogonality=True)
    tracker.attach(optimizer)
    scaled = False
    set_gradients(named, 1)
    optimizer.step()
    assert tracker.pop_metrics().overall["orthogonality_error"] < 1e-5
    scaled = True
    set_gradients(named, 2)
    optimizer.step()
    with pytest.warns(
        SelectionWarning, match=r"update far from orthonormal: wide \(error 3\), tall \(error 3\), square"
    ):
        metrics = tracker.pop_metrics()
    assert all(each["orthogonality_error"] == pytest.approx(3.0, rel=1e-4) for each in metrics.parameters.values())


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize("every", [None, 4])
def test_requested_metrics(every: int | None) -> None:
    """Besides those that are due anyway; a request lasts until metrics are popped."""
    named = parameters()
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=every)
    tracker.attach(optimizer)
    tracker.request()
    assert tracker.pop_metrics() is None  # no step was taken; popping ends the request
    seen = []
    for step in range(1, 6):
        set_gradients(named, step)
        if step in (3, 5):
            tracker.request()
        optimizer.step()
        seen.append(tracker.pop_metrics() is not None)
    assert seen == [False, False, True, every == 4, True]


# Steps that are not counted


def test_a_parameter_without_gradient_has_no_metrics_of_the_step() -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    for step in (1, 2):
        set_gradients(named, step)
        if step == 2:
            named["tall"].grad = None
        optimizer.step()
        metrics = tracker.pop_metrics()
    assert list(metrics.parameters["its tall", "tall"]) == [
        "selected_fraction", "coverage", "staleness_mean", "staleness_max", "imbalance",
    ]  # fmt: skip
    assert metrics.parameters["its tall", "tall"]["selected_fraction"] == 0.0
    assert metrics.parameters["its tall", "tall"]["staleness_mean"] == 1 * 0.25 + 2 * 0.75
    assert metrics.overall["turnover"] > 0


def test_the_step_that_creates_state_is_not_counted() -> None:
    """torch.distributed.checkpoint takes it, with zero gradients and lr 0."""
    named = parameters()
    optimizer = optimizer_of(named, lr=0.0)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert tracker.pop_metrics() is None
    assert tracker.step == 0


def test_steps_that_a_grad_scaler_skips_are_not_counted() -> None:
    model = nn.Linear(8, 4)
    optimizer = build_optimizer(model, lr=0.1)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    seen = []
    for has_inf in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(2, 8)).square().sum()).backward()
        if has_inf:
            model.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        metrics = tracker.pop_metrics()
        seen.append(None if metrics is None else metrics.step)
    assert seen == [1, None, 2]


def test_without_a_tracker_nothing_is_kept() -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    set_gradients(named, 1)
    optimizer.step()
    assert {entry for state in optimizer.state.values() for entry in state} == {"momentum", "step"}
    assert copy.deepcopy(optimizer).observer is None
    tracker.detach()
    assert optimizer.observer is None
    optimizer.step()
    assert tracker.step == 1


def test_memory_is_two_integers_per_slice() -> None:
    """What a tracker keeps on the device between steps; a step with metrics keeps more until they are popped."""
    named = parameters()
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=2, orthogonality=True)
    tracker.attach(optimizer)
    integers = 2 * (8 + 8 + 12 + 10 + 3 * 8)
    for step in range(1, 5):
        set_gradients(named, step)
        optimizer.step()
        is_due = step % 2 == 0
        for is_popped in (False, True):
            kept = size_of(tensors_of(tracker, apart_from=[optimizer, tracker.history, *named.values()]))
            assert (kept > 4 * integers) if is_due and not is_popped else (kept == 4 * integers)
            tracker.pop_metrics()


# Warnings


def test_warnings_name_parameters_once() -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=1, window=3)
    tracker.attach(optimizer)
    messages: dict[int, list[str]] = {}
    for step in range(1, 18):
        for name, parameter in named.items():
            parameter.grad = torch.ones_like(parameter)  # ties: the first slices win, as their momentum is kept
            parameter.grad[..., 4:, :] = 0.0
            if name == "tall":
                parameter.grad.zero_()
        if step == 17:
            named["wide"].grad[0, 0] = math.nan
        optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tracker.pop_metrics()
        if caught:
            messages[step] = [str(each.message) for each in caught]
    # Fractions of a half, three tenths and a quarter: the smaller, the longer a slice may wait by chance.
    assert sorted(messages) == [2, 8, 14, 16, 17]
    assert all(len(each) == 1 for each in messages.values())
    assert messages[2][0].startswith(
        "step 2, all-zero momentum: tall (1 of 1 matrices); their gradients have been zero"
    )
    assert messages[8][0].startswith("step 8, slices never selected: square (")
    assert messages[16][0].startswith("step 16, slices never selected: wide (")
    assert "; select more slices a step, or keep less momentum;" in messages[16][0]
    assert messages[17][0].startswith("step 17, non-finite update: wide (sum of squares nan); weights are damaged")


def test_no_warning_of_a_parameter_that_was_added_late() -> None:
    named = parameters()
    late = {"wide": named.pop("wide")}
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=1, window=16)
    tracker.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 24):
            if step == 20:
                group = {"params": [("wide", late["wide"])], "name": "its wide", "algorithm": "dion2"}
                optimizer.add_param_group(group)
                named |= late
            set_gradients(named, step)
            optimizer.step()
            tracker.pop_metrics()
    assert not any("wide" in str(each.message) for each in caught)


def test_matrices_without_a_gradient_are_named() -> None:
    """As experts that no token is routed to: from the start, or from some step on. What is frozen needs none."""
    named = parameters()
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=10, window=100)
    tracker.attach(optimizer)
    named["square"].requires_grad_(False)
    messages: dict[int, list[str]] = {}
    for step in range(1, 251):
        set_gradients(named, step)
        named["tall"].grad = named["square"].grad = None
        if step > 50:
            named["experts"].grad = None
        optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tracker.pop_metrics()
        if caught:
            messages[step] = [str(each.message) for each in caught]
    assert sorted(messages) == [100, 150]
    advice = "no step within the window had a gradient for them: does the loss depend on them?"
    assert messages[100][0].startswith(f"step 100, no gradient: tall (1 of 1 matrices); {advice}")
    assert messages[150][0].startswith(f"step 150, no gradient: experts (3 of 3 matrices); {advice}")


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_a_matrix_without_momentum_is_left_out_of_means() -> None:
    """Three experts, a row of each selected: one has no gradient; the errors of the others are 1 - 0.5^2 and 1 - 1."""
    experts = nn.Parameter(torch.zeros(3, 4, 8))
    groups = [{"params": [("experts", experts)], "batched": True}]
    optimizer = Dion2(groups, momentum=0.0, orthonormalize_dtype="float32")
    scales = torch.tensor([0.5, 1.0, 1.0]).view(3, 1, 1)
    optimizer.orthonormalize = lambda rows: nn.functional.normalize(rows, dim=-1) * scales
    tracker = SelectionTracker(every=1, orthogonality=True)
    tracker.attach(optimizer)
    for step in range(4):
        experts.grad = torch.zeros(3, 4, 8)
        experts.grad[0, 0] = experts.grad[1, step] = 1.0
        optimizer.step()
        overall = tracker.pop_metrics().overall
    assert overall["orthogonality_error"] == pytest.approx((0.75 + 0.0) / 2)
    # Counts 4, 0, 0, 0 and 1, 1, 1, 1.
    assert overall["imbalance"] == pytest.approx((0.75 + 0.0) / 2)
    assert overall["captured_mass"] == 1.0
    experts.grad = torch.zeros(3, 4, 8)
    optimizer.step()
    assert not {"captured_mass", "imbalance", "orthogonality_error"} & tracker.pop_metrics().overall.keys()


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_what_no_step_has_updated_and_what_is_frozen_is_left_out_of_means() -> None:
    """The counts of the trained one are 4, 0, 0, 0; another never has a gradient, a third is frozen after a step."""
    named = {name: nn.Parameter(torch.zeros(4, 8)) for name in ("trained", "unused", "frozen")}
    optimizer = Dion2([{"params": [*named.items()]}], momentum=0.0)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    for step in range(4):
        for name in ("trained", "frozen"):
            named[name].grad = torch.zeros(4, 8)
            named[name].grad[0] = 1.0
        if step:
            named["frozen"].grad = None
            named["frozen"].requires_grad_(False)
        optimizer.step()
        metrics = tracker.pop_metrics()
    assert metrics.overall["imbalance"] == 0.75
    assert metrics.overall["selected_fraction"] == 1 / 8
    assert metrics.overall["coverage"] == metrics.groups["dion2"]["coverage"] == 1 / 8
    assert "imbalance" not in metrics.parameters["dion2", "unused"]
    assert metrics.parameters["dion2", "frozen"]["staleness_mean"] == (3 + 3 * 4) / 4


def test_the_past_of_a_matrix_whose_fraction_changes() -> None:
    """From all slices, as a warm-up by Muon, to a quarter, and back."""
    weight = nn.Parameter(torch.zeros(128, 130))
    optimizer = Dion2([{"params": [("w", weight)]}], fraction=1.0)
    tracker = SelectionTracker(every=4)
    tracker.attach(optimizer)
    for step in range(12):
        weight.grad = torch.randn(128, 130, generator=torch.manual_seed(step))
        optimizer.param_groups[0]["fraction"] = 0.25 if 4 <= step < 8 else 1.0
        optimizer.step()
        tracker.pop_metrics()
    shares = tracker.history.shares.double().div(255)
    assert torch.equal(shares[[0, 2]], torch.ones(2, 1, 64).double())
    assert float(shares[1].mean()) == pytest.approx(0.25, abs=0.01)
    assert all(point[0] for point in tracker.history.parameters)


def test_an_expert_without_momentum_does_not_hide_the_errors_of_the_others() -> None:
    experts = nn.Parameter(torch.zeros(3, 4, 8))
    optimizer = Dion2([{"params": [("experts", experts)], "batched": True}], momentum=0.0)
    optimizer.orthonormalize = lambda rows: 2.0 * nn.functional.normalize(rows, dim=-1)
    tracker = SelectionTracker(every=1, orthogonality=True)
    tracker.attach(optimizer)
    experts.grad = torch.ones(3, 4, 8)
    experts.grad[2] = 0.0
    optimizer.step()
    with pytest.warns(SelectionWarning, match=r"update far from orthonormal: experts \(error 3\)"):
        tracker.pop_metrics()


def test_momentum_may_be_zero_at_the_first_step_of_a_late_parameter() -> None:
    """Not at its second; also where every step selects all slices, so that none of them ever waits."""
    named = parameters()
    late = named.pop("wide")
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    messages: dict[int, list[str]] = {}
    for step in range(1, 5):
        set_gradients(named, step)
        if step == 3:
            optimizer.add_param_group({"params": [("late", late)], "name": "late", "algorithm": "dion2", "fraction": 1})
        late.grad = torch.zeros_like(late) if step >= 3 else None
        optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tracker.pop_metrics()
        messages[step] = [str(each.message) for each in caught if "all-zero" in str(each.message)]
    assert messages[1] == messages[2] == messages[3] == []
    [message] = messages[4]
    assert message.startswith("step 4, all-zero momentum: late (1 of 1 matrices);")


# State


def test_resume(tmp_path: Any) -> None:
    """Metrics and history are those of a run that was not interrupted; the state loads with weights_only."""
    uninterrupted = run(range(1, 9), None)
    first = run(range(1, 5), None)
    torch.save([first[0].state_dict(), first[1].state_dict(), first[2]], tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = run(range(5, 9), saved)
    assert resumed[3] == uninterrupted[3][2:]
    assert torch.equal(resumed[1].history.shares, uninterrupted[1].history.shares)
    assert resumed[1].history.overall == uninterrupted[1].history.overall


def run(steps: range, saved: Any) -> Any:
    named = parameters()
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=2, window=9)
    tracker.attach(optimizer)
    if saved is not None:
        optimizer.load_state_dict(saved[0])
        tracker.load_state_dict(saved[1])
        for name, parameter in named.items():
            parameter.data.copy_(saved[2][name])
    metrics = []
    for step in steps:
        set_gradients(named, step)
        optimizer.step()
        metrics.append(tracker.pop_metrics())
    weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    return optimizer, tracker, weights, [each for each in metrics if each is not None]


def test_names_in_saved_states_and_files_are_those_of_version_0_1_0() -> None:
    """Otherwise its checkpoints and files could not be loaded."""
    state = run(range(1, 5), None)[1].state_dict()
    assert list(state) == ["step", "counts", "history", "warned"]
    assert list(state["counts"]["its wide/wide"]) == ["last", "hits"]
    names = ["window", "steps", "overall", "groups", "parameters", "kinds", "shares", "counts", "hits"]
    assert list(state["history"]) == names
    assert state["history"]["kinds"][0] == ["its wide", "wide", 1, 8, 0, True, 0]
    assert [check.name for check in HEALTH_CHECKS] == [
        "slices never selected", "all-zero momentum", "no gradient", "non-finite update", "update far from orthonormal",
    ]  # fmt: skip


def test_loaded_state_that_is_not_used_yet_is_saved_again() -> None:
    _, tracker, _, _ = run(range(1, 5), None)
    other = SelectionTracker()
    other.load_state_dict(tracker.state_dict())
    assert other.state_dict()["counts"].keys() == tracker.state_dict()["counts"].keys()


def test_parameters_that_are_added_later_start_at_zero() -> None:
    named = parameters()
    late = {"wide": named.pop("wide")}
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    for step in (1, 2, 3):
        if step == 3:
            optimizer.add_param_group({"params": [("wide", late["wide"])], "name": "its wide", "algorithm": "dion2"})
            named |= late
        set_gradients(named, step)
        optimizer.step()
        metrics = tracker.pop_metrics()
    new, old = metrics.parameters["its wide", "wide"], metrics.parameters["its tall", "tall"]
    assert (new["coverage"], new["staleness_max"], new["turnover"]) == (0.25, 1.0, 1.0)
    assert old["staleness_max"] == 3.0
    assert tracker.history.shares.shape[:2] == (3, 5)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1 step, got 0"),
        ({"window": 2.5}, TypeError, r"window must be a whole number of steps, got 2\.5"),
        ({"every": True}, TypeError, "every must be a whole number of steps, got True"),
        ({"orthogonality": "yes"}, TypeError, "orthogonality must be True or False, got 'yes'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SelectionTracker(**arguments)


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a Dion2, got SGD; make it with dion2_lightning\.build_opt"):
        SelectionTracker().attach(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))]))


def test_the_newest_observer_replaces_another() -> None:
    """With a warning that names both; attaching again, or after the other was detached, warns of nothing."""
    optimizer = optimizer_of(parameters())
    old, new = SelectionTracker(every=1), SelectionTracker(every=1)
    new.name = "SelectionMonitor"
    old.attach(optimizer)
    old.attach(optimizer)
    optimizer.step()
    with pytest.warns(SelectionWarning) as caught:
        new.attach(optimizer)
    assert [str(each.message) for each in caught] == [
        "SelectionMonitor replaces SelectionTracker as the optimizer's observer; SelectionTracker records nothing from "
        "now on"
    ]
    assert optimizer.observer is new
    assert old.pop_metrics() is None and not old.is_attached
    old.detach()  # it is no longer the observer
    assert optimizer.observer is new
    new.detach()
    old.attach(optimizer)
    assert optimizer.observer is old


def test_a_tracker_observes_one_optimizer_at_a_time() -> None:
    tracker = SelectionTracker()
    first, second = optimizer_of(parameters()), optimizer_of(parameters())
    tracker.attach(first)
    tracker.attach(second)
    assert first.observer is None
    assert second.observer is tracker


def test_attaching_to_the_same_optimizer_again_loses_no_metrics() -> None:
    named = parameters()
    optimizer, tracker = optimizer_of(named), SelectionTracker(every=1)
    tracker.attach(optimizer)
    set_gradients(named, 0)
    optimizer.step()
    tracker.attach(optimizer)
    assert tracker.pop_metrics() is not None


def test_what_was_counted_of_another_optimizer_is_left_out() -> None:
    """Unless its parameters have the same names."""
    weight, other = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 6))
    tracker = SelectionTracker()
    for name, parameter in (("weight", weight), ("weight", other), ("other", other)):
        optimizer = Dion2([(name, parameter)])
        tracker.attach(optimizer)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        tracker.detach()
    counts = tracker.state_dict()["counts"]
    assert [*counts] == ["dion2/other"]
    assert counts["dion2/other"]["hits"].sum() == 2  # of 6 slices a quarter


def test_detaching_does_not_wait_for_the_device() -> None:
    """Which may have failed, as where a callback detaches after an exception."""
    weight = nn.Parameter(torch.randn(8, 6))
    optimizer, tracker = Dion2([("weight", weight)]), SelectionTracker()
    tracker.attach(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with mock.patch.object(Tensor, "cpu", side_effect=RuntimeError):
        tracker.detach()


def test_a_tracker_that_is_detached_keeps_what_it_counted_and_no_parameter() -> None:
    states = []
    for detaches in (False, True):
        named = parameters()
        optimizer, tracker = optimizer_of(named), SelectionTracker(every=1)
        for step in range(4):
            tracker.attach(optimizer)
            set_gradients(named, step)
            optimizer.step()
            if detaches:
                tracker.detach()
        states.append(tracker.state_dict())
        alive = [weakref.ref(parameter) for parameter in named.values()]
        del optimizer, named
        gc.collect()
        assert [each() is None for each in alive] == [detaches] * len(SHAPES)
    assert states[0]["counts"].keys() == states[1]["counts"].keys()
    for key, counts in states[0]["counts"].items():
        assert counts["hits"].any()
        assert all(torch.equal(count, states[1]["counts"][key][name]) for name, count in counts.items())


# History


def test_shares_say_how_often_each_part_was_selected() -> None:
    """128 slices are two a bin; the gradient selects the same quarter of them in three of four steps."""
    weight = nn.Parameter(torch.zeros(128, 130))
    optimizer = optimizer_with(weight)
    tracker = SelectionTracker(every=4)
    tracker.attach(optimizer)
    for step in range(8):
        weight.grad = torch.zeros(128, 130)
        start = 0 if step % 4 else 64
        weight.grad[start : start + 32] = 1.0
        optimizer.state[weight]["momentum"] = torch.zeros(128, 130)
        optimizer.step()
        tracker.pop_metrics()
    shares = tracker.history.shares
    expected = torch.zeros(64)
    expected[:16], expected[32:48] = 0.75, 0.25
    assert torch.equal(shares, (expected * 255).round().to(torch.uint8).expand(2, 1, 64))
    assert tracker.history.counts[0].tolist() == [0] * 32 + [2] * 16 + [6] * 16


def test_few_slices_fill_all_bins() -> None:
    tracker = run(range(1, 5), None)[1]
    wide = tracker.history.shares[-1, 0]
    assert len(wide) == 64
    assert torch.equal(wide, wide[::8].repeat_interleave(8))


def test_a_long_history_stays_even() -> None:
    """However long the run: points are about as far apart everywhere, and nothing of what was counted is lost."""
    weight = nn.Parameter(torch.zeros(64, 70))
    optimizer = optimizer_with(weight, fraction=0.5)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    steps = 5 * MAX_POINTS
    for step in range(steps):
        weight.grad = torch.zeros(64, 70)
        weight.grad[32 * (step % 2) :][:32] = 1.0
        optimizer.state[weight]["momentum"] = torch.zeros(64, 70)
        optimizer.step()
        tracker.pop_metrics()
    history = tracker.history
    assert len(history) == len(history.overall) == len(history.parameters) == len(history.shares) == MAX_POINTS
    assert history.steps[-1] == steps
    spacing = torch.tensor([0, *history.steps]).diff()[:-1]
    assert spacing.max() <= 2 * spacing.min()
    lengths = torch.tensor([0, *history.steps]).diff().view(-1, 1).double()
    selected = (history.shares[:, 0, :].double() / 255 * lengths).sum(0)
    torch.testing.assert_close(selected, torch.full((64,), steps / 2, dtype=torch.float64), rtol=0.01, atol=2.0)


def test_parameters_without_names_are_identified_by_themselves() -> None:
    """Not by their position, which changes when one leaves."""
    first, second = (nn.Parameter(torch.zeros(8, 9)) for _ in range(2))
    optimizer = Dion2([first, second], momentum=0.0)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    for step in range(4):
        if step == 3:
            optimizer.param_groups[0]["params"].pop(0)
        for row, parameter in ((0, first), (4, second)):
            parameter.grad = torch.zeros(8, 9)
            parameter.grad[row : row + 2] = 1.0
        optimizer.step()
        tracker.pop_metrics()
    [tracked] = tracker._parameters.values()
    assert tracked.counters.hits[0].tolist() == [0, 0, 0, 0, 4, 4, 0, 0]


def test_counts_start_at_zero_after_a_change_of_axis_or_shape() -> None:
    """A weight that is selected by its other axis, or replaced by one of another shape under its name."""
    model = nn.Linear(6, 16, bias=False)
    optimizer = build_optimizer(model, lr=0.1)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)

    def step() -> float:
        weight = optimizer.param_groups[0]["params"][0]
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        return tracker.pop_metrics().overall["staleness_max"]

    assert [step(), step()] == [1.0, pytest.approx(1.5, abs=0.5)]
    optimizer.param_groups[0]["select"] = "output"
    assert step() == 1.0
    model.weight = nn.Parameter(torch.randn(8, 6))
    optimizer.param_groups[0]["params"][0] = model.weight
    optimizer.state.clear()
    assert step() == 1.0


def test_counts_of_a_group_that_comes_after_a_resume(tmp_path: Any) -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    for step in range(1, 4):
        set_gradients(named, step)
        optimizer.step()
    saved = tracker.state_dict()
    resumed = SelectionTracker(every=1)
    resumed.load_state_dict(saved)
    others = {name: parameter for name, parameter in named.items() if name != "wide"}
    other = optimizer_of(others)
    resumed.attach(other)
    other.step()
    assert resumed.state_dict()["counts"].keys() == saved["counts"].keys()
    other.add_param_group({"params": [("wide", named["wide"])], "name": "its wide", "algorithm": "dion2"})
    other.step()
    assert resumed.state_dict()["counts"]["its wide/wide"]["hits"].sum() == 4 * 2


def test_a_file_holds_everything(tmp_path: Any) -> None:
    history = run(range(1, 9), None)[1].history
    history.save(tmp_path / "history.json")
    loaded = SelectionHistory.load(tmp_path / "history.json")
    for name, value in history.state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, name


def test_a_history_has_the_window_of_its_tracker() -> None:
    """The present one, where a run is resumed with another window."""
    tracker = run(range(1, 5), None)[1]
    assert tracker.history.window == 9
    resumed = SelectionTracker(window=30)
    resumed.load_state_dict(tracker.state_dict())
    assert resumed.history.window == 30
    assert resumed.history.steps == tracker.history.steps


def test_a_file_that_cannot_be_written_leaves_the_previous_one(tmp_path: Any, monkeypatch: Any) -> None:
    history = run(range(1, 5), None)[1].history
    history.save(tmp_path / "history.json")
    before = (tmp_path / "history.json").read_text()

    def cut_short(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text[:100].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(OSError, match="no space left"):
        run(range(1, 9), None)[1].history.save(tmp_path / "history.json")
    assert (tmp_path / "history.json").read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON file, or not all of it"),
        ("[1]", "is no file of selection statistics"),
        ('{"format": "dion2 selection history", "version": 7}', "is of version 7, this release reads version 1"),
    ],
)
def test_other_files_are_refused(tmp_path: Any, text: str, message: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        SelectionHistory.load(tmp_path / "other.json")


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize("algorithm", ["dion2", "dion3", "dion"])
def test_blocks_have_metrics_under_their_names(algorithm: str) -> None:
    """As q, k and v have that are parameters of their own; the heads of a block are matrices of it."""
    qkv = nn.Parameter(torch.randn(24, 10, generator=torch.manual_seed(0)))
    own = dict(zip("qkv", qkv.detach().clone().split([12, 6, 6]), strict=True))
    weights = {"q": nn.Parameter(own["q"].view(4, 3, 10)), "k": nn.Parameter(own["k"]), "v": nn.Parameter(own["v"])}
    fused = Dion2(
        [{"params": [("qkv", qkv)], "name": "its", "splits": "q 4*3 | k 6 | v 6", "algorithm": algorithm}], lr=0.1
    )
    groups = [
        {"params": [(f"qkv[{name}]", each)], "name": name, "batched": name == "q", "algorithm": algorithm}
        for name, each in weights.items()
    ]
    apart = Dion2(groups, lr=0.1)
    trackers = [SelectionTracker(every=1, orthogonality=True) for _ in range(2)]
    for tracker, optimizer in zip(trackers, (fused, apart), strict=True):
        tracker.attach(optimizer)
    for step in range(6):
        qkv.grad = torch.randn(24, 10, generator=torch.manual_seed(step)) * torch.logspace(0, 1, 24).unsqueeze(1)
        for each, gradient in zip(weights.values(), qkv.grad.split([12, 6, 6]), strict=True):
            each.grad = gradient.clone().view(each.shape)
        if step == 1 and algorithm == "dion":  # names decide where Q begins
            momenta = fused.state[qkv]["momentum"].split([12, 6, 6])
            for (name, each), momentum in zip(weights.items(), momenta, strict=True):
                apart.state[each]["Q"].copy_(fused.state[qkv][f"Q[{name}]"])
                apart.state[each]["momentum"].copy_(momentum.view(each.shape))
        fused.step()
        apart.step()
        found, expected = (tracker.pop_metrics() for tracker in trackers)
        assert found is not None and expected is not None
        assert [name for _, name in found.parameters] == ["qkv[q]", "qkv[k]", "qkv[v]"]
        if step < 2 and algorithm == "dion":
            continue
        for name in weights:
            of_block, of_weight = found.parameters["its", f"qkv[{name}]"], expected.parameters[name, f"qkv[{name}]"]
            assert of_block == pytest.approx(of_weight, rel=1e-4, abs=1e-6)
        assert found.overall == pytest.approx(expected.overall, rel=1e-4, abs=1e-6)
    counts = trackers[0].state_dict()["counts"]
    assert {name: value["hits"].shape[0] for name, value in counts.items()} == {
        "its/qkv[q]": 4,
        "its/qkv[k]": 1,
        "its/qkv[v]": 1,
    }


def test_the_update_of_a_large_matrix() -> None:
    """All its entries change by one size: a single float32 sum of their squares would be off by 2e-3."""
    weight = nn.Parameter(torch.zeros(4096, 4096))
    weight.grad = torch.ones(4096, 4096)
    optimizer = Dion2(
        [weight], lr=0.1, weight_decay=0.0, orthonormalize=lambda submatrices: torch.ones_like(submatrices)
    )
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    optimizer.step()
    metrics = tracker.pop_metrics()
    assert metrics is not None
    moved = weight.detach()[optimizer.selection_of(weight).indices].double()
    expected = (moved.square().sum() / weight.numel()).sqrt().item()
    assert metrics.overall["update_rms"] == pytest.approx(expected, rel=1e-5)
