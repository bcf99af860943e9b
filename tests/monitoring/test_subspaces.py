"""Metrics of updates of low rank against singular values and angles in float64, and which algorithm has which."""

import math
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dion2_lightning import Dion2, SelectionTracker, SelectionWarning, build_optimizer
from dion2_lightning.algorithms.projections import Projections
from dion2_lightning.monitoring.history import SelectionHistory
from dion2_lightning.monitoring.subspaces import captured_energies, rank_uses, turns
from tests.monitoring.test_tracker import OF_SLICES

SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "wide": ((12, 30), {}),
    "tall": ((30, 12), {}),
    "square": ((16, 16), {"rank_fraction": 0.5}),
    "conv1d": ((10, 30), {"transposed": True}),
    "experts": ((3, 12, 30), {"batched": True}),
    "rank 1": ((8, 20), {"rank_fraction": 0.1}),
    "full rank": ((8, 20), {"rank_fraction": 1.0}),
}
OF_SUBSPACES = ["captured_energy", "subspace_turn", "rank_use"]


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, (shape, _) in SHAPES.items()}


def optimizer_of(named: dict[str, nn.Parameter], **settings: Any) -> Dion2:
    groups = [{"params": [(name, named[name])], "name": f"its {name}", **SHAPES[name][1]} for name in named]
    return Dion2([{**group, "algorithm": "dion"} for group in groups], lr=0.1, weight_decay=0.0, **settings)


def set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        scales = torch.logspace(0, 1, parameter.shape[-2]).unsqueeze(-1)
        parameter.grad = scales * torch.randn(parameter.shape, generator=generator)


def tracked(optimizer: Dion2, **settings: Any) -> SelectionTracker:
    tracker = SelectionTracker(**settings)
    tracker.attach(optimizer)
    return tracker


def principal_sines(first: Tensor, second: Tensor) -> Tensor:
    bases = [torch.linalg.svd(each, full_matrices=False).U for each in (first, second)]
    cosines = torch.linalg.svdvals(bases[0].mT @ bases[1])
    return (1 - cosines.square()).clamp(min=0).sqrt()


def expected_metrics(momentum: Tensor, before: Tensor, after: Tensor, is_turned: bool) -> dict[str, float]:
    """Of one matrix: B as it is stored, and Q before and after the step, by decompositions in float64."""
    long = momentum.double().mT if is_turned else momentum.double()
    basis = torch.linalg.svd(long @ before.double(), full_matrices=False).U
    taken = basis @ basis.mT @ long  # P R^T
    shares = torch.linalg.svdvals(taken)[: before.shape[1]].square()
    return {
        "captured_energy": (taken.square().sum() / long.square().sum()).item(),
        "subspace_turn": principal_sines(before.double(), after.double()).square().mean().item(),
        "rank_use": (shares.sum().square() / (len(shares) * shares.square().sum())).item(),
    }


@pytest.mark.parametrize("every", [1, 3])
def test_metrics_follow_their_definitions(every: int) -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    optimizer.step()  # without gradients: Q as it starts
    tracker = tracked(optimizer, every=every)
    for step in range(1, 7):
        set_gradients(named, step)
        states = [optimizer.state[each] for each in named.values()]
        before = {
            name: (state["momentum"] + named[name].grad, state["Q"].clone(), named[name].detach().clone())
            for name, state in zip(named, states, strict=True)
        }
        optimizer.step()
        metrics = tracker.pop_metrics()
        assert (metrics is not None) == (step % every == 0)
        if metrics is None:
            continue
        of_matrices = []
        for name, parameter in named.items():
            momentum, q, weight = before[name]
            is_turned = q.shape[-2] == momentum.shape[-2] and momentum.shape[-2] != momentum.shape[-1]
            tensors = momentum, q, optimizer.state[parameter]["Q"]
            stacks = [each if each.ndim == 3 else each.unsqueeze(0) for each in tensors]
            each_matrix = [expected_metrics(b, old, new, is_turned) for b, old, new in zip(*stacks, strict=True)]
            expected = {key: sum(each[key] for each in each_matrix) / len(each_matrix) for key in OF_SUBSPACES}
            expected["update_rms"] = (parameter.detach() - weight).double().square().mean().sqrt().item()
            constant = {"rank 1": ["rank_use"], "full rank": ["captured_energy", "subspace_turn"]}.get(name, [])
            kept = {key: value for key, value in expected.items() if key not in constant}
            found = metrics.parameters[f"its {name}", name]
            assert list(found) == list(kept)
            assert found == pytest.approx(kept, rel=1e-4, abs=1e-6), (name, step)
            assert metrics.groups[f"its {name}"] == found
            of_matrices += [{key: each[key] for key in OF_SUBSPACES if key not in constant} for each in each_matrix]
        assert list(metrics.overall) == [*OF_SUBSPACES, "update_rms"]
        for key in OF_SUBSPACES:
            values = [each[key] for each in of_matrices if key in each]
            assert metrics.overall[key] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)


# The three numbers


def grams_of(before: Tensor, after: Tensor) -> Tensor:
    both = torch.cat([before, after], dim=-1).double()
    return both.mT @ both


def test_numbers_by_hand() -> None:
    """In three dimensions, a plane that keeps one of its directions; a momentum with 9 + 4 of 16 in it."""
    x, y, z = torch.eye(3).unsqueeze(-1).unbind(0)
    stay, half, new = [x, x + y], [x, z], [z, 5 * z + y]  # the last has y and z
    grams = torch.stack([grams_of(torch.cat([x, y], 1), torch.cat(after, 1)) for after in (stay, half, new)])
    assert turns(grams).tolist() == pytest.approx([0, 0.5, 0.5], abs=1e-9)
    norms = torch.tensor([[3.0, 2.0]] * 3).double()
    captured = norms.square().sum(-1)
    assert captured_energies(torch.tensor([16.0, 26.0, 0.0]).double(), captured).tolist() == [13 / 16, 0.5, 0.0]
    # R's columns are orthogonal only in the second case; 13^2 / (2 (81 + 16)), and with equal ones a single direction.
    assert rank_uses(grams, norms)[1].item() == pytest.approx(169 / 194)
    same = grams_of(torch.cat([x, y], 1), torch.cat([x, x], 1)).unsqueeze(0)
    assert rank_uses(same, norms[:1]).item() == pytest.approx(0.5)
    assert rank_uses(grams, 1e-200 * norms)[1].item() == pytest.approx(169 / 194)
    assert rank_uses(grams, 0 * norms).tolist() == [0, 0, 0]


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
def test_turns_do_not_depend_on_the_basis(condition: float) -> None:
    """Up to columns that float32 hardly tells apart: stretched and mixed ones span the same space."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(60, 8, generator=generator).double() for _ in range(2))
    second = first + 0.3 * second
    expected = principal_sines(first, second).square().mean().item()
    mixing = torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q
    mixing = mixing * torch.logspace(0, -math.log10(condition), 8).double() @ mixing.mT
    found = turns(torch.stack([grams_of(first @ mixing, second @ mixing), grams_of(first, first @ mixing)]))
    assert found.tolist() == pytest.approx([expected, 0.0], rel=1e-2, abs=1e-2 if condition == 1e5 else 1e-5)


def test_columns_that_are_the_same_do_not_turn_when_they_stay() -> None:
    column = torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    assert turns(grams_of(column.expand(-1, 4), column.expand(-1, 4)).unsqueeze(0)).item() == pytest.approx(0, abs=1e-6)


# What is counted, and what it costs


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_matrices_without_momentum_are_left_out() -> None:
    named = {"experts": parameters()["experts"]}
    optimizer = optimizer_of(named)
    tracker = tracked(optimizer, every=1)
    [experts] = named.values()
    for step in (1, 2):
        set_gradients(named, step)
        experts.grad[1] = 0.0
        before = optimizer.state[experts]["Q"].clone() if step == 2 else None
        momentum = optimizer.state[experts]["momentum"] + experts.grad if step == 2 else None
        optimizer.step()
        metrics = tracker.pop_metrics()
    q = optimizer.state[experts]["Q"]
    expected = [expected_metrics(momentum[each], before[each], q[each], is_turned=True) for each in (0, 2)]
    for key in OF_SUBSPACES:
        assert metrics.overall[key] == pytest.approx(sum(each[key] for each in expected) / 2, rel=1e-4)


def test_warnings() -> None:
    """Of a momentum that is zero at a second step with metrics, and of damaged weights."""
    named = parameters()
    optimizer = optimizer_of(named)
    tracker = tracked(optimizer, every=2)
    messages = []
    for step in range(1, 7):
        set_gradients(named, step)
        named["experts"].grad[1] = 0.0
        if step == 6:
            named["tall"].grad[0, 0] = math.nan
        optimizer.step()
        with pytest.warns() as caught:
            tracker.pop_metrics()
            warnings.warn("so that there is one", stacklevel=1)
        messages.append([str(each.message) for each in caught if each.category is SelectionWarning])
    assert [len(each) for each in messages] == [0, 0, 0, 1, 0, 1]
    assert messages[3][0].startswith("step 4, all-zero momentum: experts (1 of 3 matrices);")
    assert messages[5][0].startswith("step 6, non-finite update: tall (sum of squares nan);")


def test_a_step_that_is_skipped_has_no_metrics_of_subspaces() -> None:
    named = parameters()
    optimizer = optimizer_of(named, check_finite="skip")
    tracker = tracked(optimizer, every=1)
    found = []
    for step in (1, 2, 3):
        set_gradients(named, step)
        if step == 2:
            named["wide"].grad[0, 0] = math.inf
        optimizer.step()
        found.append(tracker.pop_metrics().overall)
    assert optimizer.skipped_steps == 1
    assert [list(each) for each in found] == [[*OF_SUBSPACES, "update_rms"], ["update_rms"], list(found[0])]
    assert found[1]["update_rms"] == 0.0


def test_steps_without_metrics_compute_nothing_for_them() -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    tracker = tracked(optimizer, every=3)
    with (
        mock.patch.object(tracker, "projected", wraps=tracker.projected) as told,
        mock.patch.object(Projections, "__init__", autospec=True, side_effect=Projections.__init__) as made,
    ):
        for step in range(1, 7):
            set_gradients(named, step)
            optimizer.step()
            assert (told.call_count > 0) == (made.call_count > 0) == (step % 3 == 0)
            told.reset_mock()
            made.reset_mock()


# Which algorithm has which metric

METRICS_OF: dict[str, list[str]] = {
    "dion2": [*OF_SLICES, "update_rms", "orthogonality_error"],
    "dion3": [*OF_SLICES, "update_rms", "variance_spread", "orthogonality_error"],
    "muon": ["update_rms", "orthogonality_error"],
    "normuon": ["update_rms", "variance_spread", "orthogonality_error"],
    "dion": [*OF_SUBSPACES, "update_rms"],
}


@pytest.mark.parametrize("algorithm", METRICS_OF)
def test_what_is_constant_by_definition_is_left_out(algorithm: Any) -> None:
    model = nn.Linear(30, 12)
    optimizer = build_optimizer(model, algorithm=algorithm)
    tracker = tracked(optimizer, every=1, orthogonality=True)
    for seed in range(2):
        model(torch.randn(40, 30, generator=torch.manual_seed(seed))).square().mean().backward()
        optimizer.step()
        metrics = tracker.pop_metrics()
    assert list(metrics.overall) == METRICS_OF[algorithm]
    assert list(metrics.in_short()) == [each for each in ("coverage", "captured_energy") if each in metrics.overall]
    model.weight.grad = None
    optimizer.step()
    without_gradient = [each for each in OF_SLICES if each not in ("turnover", "captured_mass")]
    assert list(tracker.pop_metrics().overall) == (without_gradient if "coverage" in metrics.overall else [])


def test_groups_of_several_algorithms_count_where_they_have_a_metric() -> None:
    names = ("dion2", "muon", "dion")
    weights = {name: nn.Parameter(torch.zeros(12, 30)) for name in names}
    own: dict[str, dict[str, Any]] = {"dion2": {}, "muon": {"algorithm": "dion2", "fraction": 1.0}, "dion": {}}
    optimizer = Dion2(
        [{"params": [("w", weights[each])], "name": each, "algorithm": each, **own[each]} for each in names]
    )
    tracker = tracked(optimizer, every=1)
    set_gradients(weights, 1)
    optimizer.step()
    metrics = tracker.pop_metrics()
    for name in OF_SLICES:
        assert metrics.overall[name] == metrics.groups["dion2"][name]
    for name in OF_SUBSPACES:
        assert metrics.overall[name] == metrics.groups["dion"][name]
    squares = [metrics.groups[each]["update_rms"] ** 2 for each in names]
    assert metrics.overall["update_rms"] == pytest.approx(math.sqrt(sum(squares) / 3))


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_resume_and_file(tmp_path: Path) -> None:
    """Metrics are those of a run that was not interrupted; files from before know no rank."""
    named = parameters()
    optimizer = optimizer_of(named)
    tracker, resumed = tracked(optimizer, every=2), SelectionTracker(every=2)
    for step in range(1, 9):
        set_gradients(named, step)
        optimizer.step()
        tracker.pop_metrics()
        if step == 4:
            saved = tracker.state_dict()
            tracker.detach()
            resumed.load_state_dict(saved)
            resumed.attach(optimizer)
            tracker = resumed
    history = resumed.history
    assert history.steps == [2, 4, 6, 8]
    assert resumed.state_dict()["counts"]["its experts/experts"]["hits"].tolist() == [[4]] * 3
    history.save(tmp_path / "history.json")
    assert SelectionHistory.load(tmp_path / "history.json").parameters == history.parameters
    assert history.infos[0] == ("its wide", "wide", 1, 12, 0, False, 3)
    history.load_state_dict({**history.state_dict(), "kinds": [list(each[:5]) for each in history.infos]})
    assert history.infos[0] == ("its wide", "wide", 1, 12, 0, True, 0)


def test_the_rank_of_a_convolution_counts_its_taps():
    """Of 4 channels with 3 taps each the shorter axis has 12 entries, not 4."""
    weight = nn.Parameter(torch.randn(32, 4, 3, generator=torch.Generator().manual_seed(0)))
    weight.grad = torch.randn_like(weight)
    optimizer = Dion2([{"params": [weight], "algorithm": "dion", "convolution": True, "rank_fraction": 0.5}], lr=0.1)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    optimizer.step()
    metrics = tracker.pop_metrics()
    assert metrics is not None and set(OF_SUBSPACES) <= metrics.overall.keys()
