"""The figures against hand calculation and against plain loops over what the optimizer says it selected."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.statistics import size_of, tensors_of
from dion2_lightning import Dion2, SelectionStatistics, SelectionWarning, build_optimizer
from dion2_lightning.monitoring.history import MAX_POINTS, SelectionHistory
from dion2_lightning.monitoring.metrics import MEANINGS

SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "wide": ((8, 20), {}),
    "tall": ((20, 8), {}),
    "square": ((12, 12), {"fraction": 0.5}),
    "conv1d": ((10, 30), {"transposed": True}),
    "experts": ((3, 8, 20), {"batched": True}),
}


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
    """The figures of one parameter, from their definitions, matrix by matrix and slice by slice."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.step = 0
        self.last: list[list[int | None]] = []
        self.counts: list[list[int]] = []

    def figures(self, optimizer: Dion2, parameter: Tensor, momentum: Tensor, weight: Tensor) -> dict[str, float]:
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
def test_figures_are_what_their_definitions_say(every: int) -> None:
    named = parameters()
    optimizer = optimizer_of(named, weight_decay=0.0)
    statistics = SelectionStatistics(every=every, window=4)
    statistics.attach(optimizer)
    references = {name: Reference(window=4) for name in named}
    for step in range(1, 13):
        set_gradients(named, step)
        before = {
            name: (optimizer.state[p].get("momentum", torch.zeros_like(p)) + p.grad, p.detach().clone())
            for name, p in named.items()
        }
        optimizer.step()
        figures = statistics.take()
        expected = {name: references[name].figures(optimizer, p, *before[name]) for name, p in named.items()}
        assert (figures is not None) == (step % every == 0)
        if figures is None:
            continue
        assert figures.step == step
        for name in named:
            found = figures.parameters[f"its {name}", name]
            assert list(found) == [each for each in MEANINGS if each != "orthogonality_error"]
            assert found == pytest.approx(expected[name], rel=1e-5, abs=1e-12), (name, step)
            assert figures.groups[f"its {name}"] == found


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_by_hand() -> None:
    """Rows of a 4 x 8 matrix; the gradients say which one is selected. k = 1."""
    weight = nn.Parameter(torch.zeros(4, 8))
    optimizer = optimizer_with(weight, lr=1.0, weight_decay=0.0, adjust_lr_fn="none", orthonormalize_dtype="float32")
    optimizer.orthonormalize = lambda row: nn.functional.normalize(row, dim=-1)
    statistics = SelectionStatistics(every=1, window=2)
    statistics.attach(optimizer)
    overall = []
    for row in (0, 0, 2):
        weight.grad = torch.zeros(4, 8)
        weight.grad[row] = 3.0
        weight.grad[3] = 1.0 if row == 2 else 0.0
        optimizer.step()
        overall.append(statistics.take().overall)
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
    statistics = SelectionStatistics(every=1, orthogonality=True)
    statistics.attach(optimizer)
    set_gradients(named, 1)
    optimizer.step()
    figures = statistics.take()
    expected = [f"dion2/{name}" for name in MEANINGS]
    expected += [f"dion2/its {group}/{name}" for group in named for name in MEANINGS]
    assert list(figures.named()) == expected
    each = [f"dion2/its {group}/{group}/{name}" for group in named for name in MEANINGS]
    assert list(figures.named(per_matrix=True)) == expected + each
    assert figures.named()["dion2/its wide/coverage"] == 0.25


def test_slices_count_alike_and_matrices_count_alike() -> None:
    """Coverage pools 8 slices of which 2 are selected and 12 of which 6 are; captured mass is a mean of two."""
    named = {name: parameter for name, parameter in parameters().items() if name in ("wide", "square")}
    optimizer = optimizer_of(named)
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)
    set_gradients(named, 1)
    optimizer.step()
    figures = statistics.take()
    assert figures.overall["coverage"] == (2 + 6) / (8 + 12)
    masses = [each["captured_mass"] for each in figures.parameters.values()]
    assert figures.overall["captured_mass"] == pytest.approx(sum(masses) / 2)


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
    statistics = SelectionStatistics(every=1, orthogonality=True)
    statistics.attach(optimizer)
    scaled = False
    set_gradients(named, 1)
    optimizer.step()
    assert statistics.take().overall["orthogonality_error"] < 1e-5
    scaled = True
    set_gradients(named, 2)
    optimizer.step()
    with pytest.warns(
        SelectionWarning, match=r"update far from orthonormal: wide \(error 3\), tall \(error 3\), square"
    ):
        figures = statistics.take()
    assert all(each["orthogonality_error"] == pytest.approx(3.0, rel=1e-4) for each in figures.parameters.values())


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
@pytest.mark.parametrize("every", [None, 4])
def test_figures_of_steps_that_were_asked_for(every: int | None) -> None:
    """Besides those that are due anyway; asking lasts until figures would be taken."""
    named = parameters()
    optimizer = optimizer_of(named)
    statistics = SelectionStatistics(every=every)
    statistics.attach(optimizer)
    statistics.ask()
    assert statistics.take() is None  # no step was taken, and nothing is asked for any more
    seen = []
    for step in range(1, 6):
        set_gradients(named, step)
        if step in (3, 5):
            statistics.ask()
        optimizer.step()
        seen.append(statistics.take() is not None)
    assert seen == [False, False, True, every == 4, True]


# Steps that leave nothing


def test_a_parameter_without_gradient_has_no_figures_of_the_step() -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)
    for step in (1, 2):
        set_gradients(named, step)
        if step == 2:
            named["tall"].grad = None
        optimizer.step()
        figures = statistics.take()
    assert list(figures.parameters["its tall", "tall"]) == [
        "selected_fraction", "coverage", "staleness_mean", "staleness_max", "imbalance",
    ]  # fmt: skip
    assert figures.parameters["its tall", "tall"]["selected_fraction"] == 0.0
    assert figures.parameters["its tall", "tall"]["staleness_mean"] == 1 * 0.25 + 2 * 0.75
    assert figures.overall["turnover"] > 0


def test_a_rehearsed_step_leaves_nothing() -> None:
    """As torch.distributed.checkpoint takes it: zero gradients, lr 0."""
    named = parameters()
    optimizer = optimizer_of(named, lr=0.0)
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert statistics.take() is None
    assert statistics.step == 0


def test_steps_that_a_grad_scaler_skips_leave_nothing() -> None:
    model = nn.Linear(8, 4)
    optimizer = build_optimizer(model, lr=0.1)
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    seen = []
    for is_broken in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(2, 8)).square().sum()).backward()
        if is_broken:
            model.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        figures = statistics.take()
        seen.append(None if figures is None else figures.step)
    assert seen == [1, None, 2]


def test_without_statistics_nothing_is_kept() -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)
    set_gradients(named, 1)
    optimizer.step()
    assert {entry for state in optimizer.state.values() for entry in state} == {"momentum"}
    assert copy.deepcopy(optimizer).observer is None
    statistics.detach()
    assert optimizer.observer is None
    optimizer.step()
    assert statistics.step == 1


def test_two_integers_a_slice() -> None:
    """All that can be reached from the statistics, but for what the optimizer has itself and the history on the host.

    Of a step with figures more is kept until they are taken.
    """
    named = parameters()
    optimizer = optimizer_of(named)
    statistics = SelectionStatistics(every=2, orthogonality=True)
    statistics.attach(optimizer)
    integers = 2 * (8 + 8 + 12 + 10 + 3 * 8)
    for step in range(1, 5):
        set_gradients(named, step)
        optimizer.step()
        is_due = step % 2 == 0
        for is_taken in (False, True):
            kept = size_of(tensors_of(statistics, apart_from=[optimizer, statistics.history, *named.values()]))
            assert (kept > 4 * integers) if is_due and not is_taken else (kept == 4 * integers)
            statistics.take()


# Warnings


def test_warnings_name_parameters_once() -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    statistics = SelectionStatistics(every=1, window=3)
    statistics.attach(optimizer)
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
            statistics.take()
        if caught:
            messages[step] = [str(each.message) for each in caught]
    # A half, three tenths and a quarter of the slices; a fair draw misses some for longer where few are selected.
    assert sorted(messages) == [2, 8, 14, 16, 17]
    assert all(len(each) == 1 for each in messages.values())
    assert messages[2][0].startswith(
        "step 2, all-zero momentum: tall (1 of 1 matrices); their gradients have been zero"
    )
    assert messages[8][0].startswith("step 8, slices never selected: square (")
    assert messages[16][0].startswith("step 16, slices never selected: wide (")
    assert "; a lower momentum or a higher fraction" in messages[16][0]
    assert messages[17][0].startswith("step 17, non-finite update: wide (sum of squares nan); weights are damaged")


def test_a_parameter_that_came_late_is_not_said_to_be_left_out() -> None:
    named = parameters()
    late = {"wide": named.pop("wide")}
    optimizer = optimizer_of(named)
    statistics = SelectionStatistics(every=1, window=16)
    statistics.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 24):
            if step == 20:
                group = {"params": [("wide", late["wide"])], "name": "its wide", "algorithm": "dion2"}
                optimizer.add_param_group(group)
                named |= late
            set_gradients(named, step)
            optimizer.step()
            statistics.take()
    assert not any("wide" in str(each.message) for each in caught)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_a_matrix_without_momentum_counts_for_none_of_the_means() -> None:
    """Three experts, a row of each selected: one has no gradient; the errors of the others are 1 - 0.5^2 and 1 - 1."""
    experts = nn.Parameter(torch.zeros(3, 4, 8))
    groups = [{"params": [("experts", experts)], "batched": True}]
    optimizer = Dion2(groups, momentum=0.0, orthonormalize_dtype="float32")
    scales = torch.tensor([0.5, 1.0, 1.0]).view(3, 1, 1)
    optimizer.orthonormalize = lambda rows: nn.functional.normalize(rows, dim=-1) * scales
    statistics = SelectionStatistics(every=1, orthogonality=True)
    statistics.attach(optimizer)
    for step in range(4):
        experts.grad = torch.zeros(3, 4, 8)
        experts.grad[0, 0] = experts.grad[1, step] = 1.0
        optimizer.step()
        overall = statistics.take().overall
    assert overall["orthogonality_error"] == pytest.approx((0.75 + 0.0) / 2)
    # Counts 4, 0, 0, 0 and 1, 1, 1, 1.
    assert overall["imbalance"] == pytest.approx((0.75 + 0.0) / 2)
    assert overall["captured_mass"] == 1.0
    experts.grad = torch.zeros(3, 4, 8)
    optimizer.step()
    assert not {"captured_mass", "imbalance", "orthogonality_error"} & statistics.take().overall.keys()


def test_an_expert_without_momentum_does_not_hide_the_errors_of_the_others() -> None:
    experts = nn.Parameter(torch.zeros(3, 4, 8))
    optimizer = Dion2([{"params": [("experts", experts)], "batched": True}], momentum=0.0)
    optimizer.orthonormalize = lambda rows: 2.0 * nn.functional.normalize(rows, dim=-1)
    statistics = SelectionStatistics(every=1, orthogonality=True)
    statistics.attach(optimizer)
    experts.grad = torch.ones(3, 4, 8)
    experts.grad[2] = 0.0
    optimizer.step()
    with pytest.warns(SelectionWarning, match=r"update far from orthonormal: experts \(error 3\)"):
        statistics.take()


def test_momentum_may_be_zero_at_the_first_step_of_a_parameter_that_came_late() -> None:
    """Not at its second; also where every step selects all slices, so that none of them ever waits."""
    named = parameters()
    late = named.pop("wide")
    optimizer = optimizer_of(named)
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)
    messages: dict[int, list[str]] = {}
    for step in range(1, 5):
        set_gradients(named, step)
        if step == 3:
            optimizer.add_param_group({"params": [("late", late)], "name": "late", "algorithm": "dion2", "fraction": 1})
        late.grad = torch.zeros_like(late) if step >= 3 else None
        optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            statistics.take()
        messages[step] = [str(each.message) for each in caught if "all-zero" in str(each.message)]
    assert messages[1] == messages[2] == messages[3] == []
    [message] = messages[4]
    assert message.startswith("step 4, all-zero momentum: late (1 of 1 matrices);")


# State


def test_it_goes_on_after_a_resume(tmp_path: Any) -> None:
    """Figures and history of an interrupted run are those of one that was not; the file loads with weights_only."""
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
    statistics = SelectionStatistics(every=2, window=9)
    statistics.attach(optimizer)
    if saved is not None:
        optimizer.load_state_dict(saved[0])
        statistics.load_state_dict(saved[1])
        for name, parameter in named.items():
            parameter.data.copy_(saved[2][name])
    figures = []
    for step in steps:
        set_gradients(named, step)
        optimizer.step()
        figures.append(statistics.take())
    weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    return optimizer, statistics, weights, [each for each in figures if each is not None]


def test_state_that_was_loaded_and_not_used_yet_is_saved_again() -> None:
    _, statistics, _, _ = run(range(1, 5), None)
    other = SelectionStatistics()
    other.load_state_dict(statistics.state_dict())
    assert other.state_dict()["counts"].keys() == statistics.state_dict()["counts"].keys()


def test_parameters_that_are_added_later_start_anew() -> None:
    named = parameters()
    late = {"wide": named.pop("wide")}
    optimizer = optimizer_of(named)
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)
    for step in (1, 2, 3):
        if step == 3:
            optimizer.add_param_group({"params": [("wide", late["wide"])], "name": "its wide", "algorithm": "dion2"})
            named |= late
        set_gradients(named, step)
        optimizer.step()
        figures = statistics.take()
    new, old = figures.parameters["its wide", "wide"], figures.parameters["its tall", "tall"]
    assert (new["coverage"], new["staleness_max"], new["turnover"]) == (0.25, 1.0, 1.0)
    assert old["staleness_max"] == 3.0
    assert statistics.history.shares.shape[:2] == (3, 5)


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
        SelectionStatistics(**arguments)


def test_what_cannot_be_attached() -> None:
    statistics = SelectionStatistics()
    with pytest.raises(TypeError, match=r"optimizer must be a Dion2, got SGD; make it with dion2_lightning\.build_opt"):
        statistics.attach(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))]))
    optimizer = optimizer_of(parameters())
    statistics.attach(optimizer)
    statistics.attach(optimizer)
    with pytest.raises(RuntimeError, match="other statistics look on at this optimizer already"):
        SelectionStatistics().attach(optimizer)


def test_statistics_look_on_at_one_optimizer_at_a_time() -> None:
    statistics = SelectionStatistics()
    first, second = optimizer_of(parameters()), optimizer_of(parameters())
    statistics.attach(first)
    statistics.attach(second)
    assert first.observer is None
    assert second.observer is statistics


# History


def test_shares_say_how_often_each_part_was_selected() -> None:
    """128 slices are two a bin; the gradient selects the same quarter of them in three of four steps."""
    weight = nn.Parameter(torch.zeros(128, 130))
    optimizer = optimizer_with(weight)
    statistics = SelectionStatistics(every=4)
    statistics.attach(optimizer)
    for step in range(8):
        weight.grad = torch.zeros(128, 130)
        start = 0 if step % 4 else 64
        weight.grad[start : start + 32] = 1.0
        optimizer.state[weight]["momentum"] = torch.zeros(128, 130)
        optimizer.step()
        statistics.take()
    shares = statistics.history.shares
    expected = torch.zeros(64)
    expected[:16], expected[32:48] = 0.75, 0.25
    assert torch.equal(shares, (expected * 255).round().to(torch.uint8).expand(2, 1, 64))
    assert statistics.history.counts[0].tolist() == [0] * 32 + [2] * 16 + [6] * 16


def test_few_slices_fill_all_bins() -> None:
    statistics = run(range(1, 5), None)[1]
    wide = statistics.history.shares[-1, 0]
    assert len(wide) == 64
    assert torch.equal(wide, wide[::8].repeat_interleave(8))


def test_a_long_history_stays_even() -> None:
    """However long the run: points are about as far apart everywhere, and nothing of what was counted is lost."""
    weight = nn.Parameter(torch.zeros(64, 70))
    optimizer = optimizer_with(weight, fraction=0.5)
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)
    steps = 5 * MAX_POINTS
    for step in range(steps):
        weight.grad = torch.zeros(64, 70)
        weight.grad[32 * (step % 2) :][:32] = 1.0
        optimizer.state[weight]["momentum"] = torch.zeros(64, 70)
        optimizer.step()
        statistics.take()
    history = statistics.history
    assert len(history) == len(history.overall) == len(history.parameters) == len(history.shares) == MAX_POINTS
    assert history.steps[-1] == steps
    spacing = torch.tensor([0, *history.steps]).diff()[:-1]
    assert spacing.max() <= 2 * spacing.min()
    lengths = torch.tensor([0, *history.steps]).diff().view(-1, 1).double()
    selected = (history.shares[:, 0, :].double() / 255 * lengths).sum(0)
    torch.testing.assert_close(selected, torch.full((64,), steps / 2, dtype=torch.float64), rtol=0.01, atol=2.0)


def test_parameters_without_names_are_followed_by_what_they_are() -> None:
    """Not by their position, which changes when one leaves."""
    first, second = (nn.Parameter(torch.zeros(8, 9)) for _ in range(2))
    optimizer = Dion2([first, second], momentum=0.0)
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)
    for step in range(4):
        if step == 3:
            optimizer.param_groups[0]["params"].pop(0)
        for row, parameter in ((0, first), (4, second)):
            parameter.grad = torch.zeros(8, 9)
            parameter.grad[row : row + 2] = 1.0
        optimizer.step()
        statistics.take()
    [entry] = statistics._entries.values()
    assert entry.ledger.hits[0].tolist() == [0, 0, 0, 0, 4, 4, 0, 0]


def test_settings_and_shapes_that_change_start_anew() -> None:
    """A weight that is selected by its other axis, or replaced by one of another shape under its name."""
    model = nn.Linear(6, 16, bias=False)
    optimizer = build_optimizer(model, lr=0.1)
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)

    def step() -> float:
        weight = optimizer.param_groups[0]["params"][0]
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        return statistics.take().overall["staleness_max"]

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
    statistics = SelectionStatistics(every=1)
    statistics.attach(optimizer)
    for step in range(1, 4):
        set_gradients(named, step)
        optimizer.step()
    saved = statistics.state_dict()
    resumed = SelectionStatistics(every=1)
    resumed.load_state_dict(saved)
    others = {name: parameter for name, parameter in named.items() if name != "wide"}
    other = optimizer_of(others)
    resumed.attach(other)
    other.step()
    assert resumed.state_dict()["counts"].keys() == saved["counts"].keys()
    other.add_param_group({"params": [("wide", named["wide"])], "name": "its wide", "algorithm": "dion2"})
    other.step()
    assert resumed.state_dict()["counts"]["its wide/wide"]["hits"].sum() == 4 * 2


def test_a_file_holds_all(tmp_path: Any) -> None:
    history = run(range(1, 9), None)[1].history
    history.save(tmp_path / "statistics.json")
    loaded = SelectionHistory.load(tmp_path / "statistics.json")
    for name, value in history.state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, name


def test_a_history_knows_the_window_of_its_statistics() -> None:
    """The present one, where a run goes on with another."""
    statistics = run(range(1, 5), None)[1]
    assert statistics.history.window == 9
    resumed = SelectionStatistics(window=30)
    resumed.load_state_dict(statistics.state_dict())
    assert resumed.history.window == 30
    assert resumed.history.steps == statistics.history.steps


def test_a_file_that_cannot_be_written_leaves_the_one_of_before(tmp_path: Any, monkeypatch: Any) -> None:
    history = run(range(1, 5), None)[1].history
    history.save(tmp_path / "statistics.json")
    before = (tmp_path / "statistics.json").read_text()

    def cut_short(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text[:100].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(OSError, match="no space left"):
        run(range(1, 9), None)[1].history.save(tmp_path / "statistics.json")
    assert (tmp_path / "statistics.json").read_text() == before


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
