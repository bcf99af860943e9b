"""Pictures show what the history says: the data of their artists is compared with it; files and loggers get them."""

import io
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dion2_lightning.monitoring import plots
from dion2_lightning.monitoring.history import BINS, SelectionHistory
from dion2_lightning.monitoring.plots import draw, log_pictures, pictures_of, save_pictures
from tests.selection_histories import LLAMA, extend, infos_of, llama, low_rank_history, make_history

MODELS = {
    "one matrix": ["weight"],
    "four matrices": llama(1, ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"]),
    "names without layers": ["encoder.weight", "middle.weight", "decoder.weight"],
    "a sequence": ["0.weight", "2.weight", "4.weight"],
    "30 layers of 7": llama(30),
    "layers and others": [*llama(3), "model.pooler.weight", "score.weight"],
    "50 without layers": [f"stage{name}.conv.weight" for name in range(50)],
    "experts in lists": [f"layers.{layer}.experts.{expert}.up" for layer in range(2) for expert in range(3)],
    "the same names": ["parameter 0", "parameter 1"],
    "numbers that are equal": ["1.weight", "01.weight", "001.weight", "2.weight"],
}


@pytest.fixture(scope="module")
def layered() -> SelectionHistory:
    return make_history([*llama(3), "model.pooler.weight"], points=5)


def lines_of(axes: Axes) -> dict[str, Any]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.lines}


def mesh_of(axes: Axes) -> Any:
    [mesh] = [each for each in axes.collections if isinstance(each, QuadMesh)]
    return mesh.get_array()


def panel(history: SelectionHistory, name: str) -> Axes:
    """Draw the picture that has this panel; return the panel."""
    picture, place = {
        "counts": ("overview", 1), "coverage": ("overview", 2), "captured_mass": ("overview", 3),
        "staleness_mean": ("staleness", 0), "staleness_max": ("staleness", 1), "turnover": ("staleness", 2),
    }[name]  # fmt: skip
    return draw(history, picture).axes[place]


def panels_of(figure: Any) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


# What is drawn


@pytest.mark.parametrize("metric", ["coverage", "turnover", "staleness_mean", "staleness_max"])
def test_curves_are_the_metrics(layered: SelectionHistory, metric: str) -> None:
    axes = panel(layered, metric)
    assert lines_of(axes)["all matrices"].tolist() == [point[metric] for point in layered.overall]
    assert axes.lines[0].get_xdata().tolist() == layered.steps
    [band] = axes.collections
    edges = band.get_paths()[0].vertices
    values = [point[metric] for point in layered.parameters[-1]]
    at_the_end = edges[edges[:, 0] == layered.steps[-1], 1]
    assert (at_the_end.min(), at_the_end.max()) == pytest.approx(tuple(np.percentile(values, [10, 90])))


def test_curves_of_several_groups() -> None:
    infos = [*infos_of(llama(2)), *infos_of(["head.weight"], group="dion2-head")]
    history = extend(SelectionHistory(), infos, 4)
    lines = lines_of(panel(history, "coverage"))
    for group in ("dion2", "dion2-head"):
        assert lines[group].tolist() == [point[group]["coverage"] for point in history.groups]


def test_references_are_those_of_even_selection(layered: SelectionHistory) -> None:
    assert lines_of(panel(layered, "turnover"))["random selection: 75%"][0] == 0.75
    left, right = panel(layered, "staleness_mean"), panel(layered, "staleness_max")
    assert lines_of(left)["slices take turns: 3 steps"][0] == 3
    assert lines_of(right)["a slice never selected"].tolist() == [0, layered.steps[-1]]
    assert lines_of(right)["all matrices"].tolist() == [point["staleness_max"] for point in layered.overall]


def test_captured_mass_by_layer() -> None:
    """The mean of the last quarter of the points; the layer of a name is its first number that varies."""
    history = make_history([f"net.0.layers.{layer}.{role}.weight" for layer in (7, 11) for role in "ab"], points=8)
    history.parameters[-1][0]["captured_mass"] = 0.5
    history.parameters[-2][0]["captured_mass"] = 0.7
    axes = panel(history, "captured_mass")
    assert set(lines_of(axes)) == {"a", "b", "slices all alike"}
    assert lines_of(axes)["a"].tolist() == pytest.approx([0.6, history.parameters[-1][2]["captured_mass"]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["7", "11"]
    assert "since step 70" in axes.get_title(loc="left")


def test_captured_mass_of_matrices_without_layers(layered: SelectionHistory) -> None:
    axes = panel(layered, "captured_mass")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "pooler"]
    assert axes.lines[-2].get_xdata().tolist() == [3]
    assert axes.lines[-2].get_ydata().tolist() == [layered.parameters[-1][-1]["captured_mass"]]


def test_counts_are_shares_of_the_steps() -> None:
    """Of a stack of experts the mean; of a parameter that came later, of the steps since."""
    history = extend(SelectionHistory(), infos_of(["old"]), 3)
    history = extend(history, [*infos_of(["old"]), *infos_of(["new"], matrices=4)], 2)
    axes = panel(history, "counts")
    old, new = (np.asarray(line.get_ydata()) for line in axes.lines[:2])
    assert old.tolist() == (history.counts[0] / 50).tolist()
    assert new.tolist() == (history.counts[1] / 4 / 20).tolist()
    assert new.mean() == pytest.approx(0.25, abs=0.05)
    assert lines_of(axes)["mean of the matrices"].tolist() == pytest.approx(((old + new) / 2).tolist())


# Updates


def pairs_of(figure: Any) -> list[tuple[Axes, Axes]]:
    """The panels over time and by layer, by metric."""
    panels = figure.axes
    return list(zip(panels[: len(panels) // 2], panels[len(panels) // 2 :], strict=True))


def test_subspaces_over_time_and_by_layer() -> None:
    history = low_rank_history(llama(3), points=8)
    pairs = pairs_of(draw(history, "subspaces"))
    for (over_time, by_layer), name in zip(pairs, ("captured_energy", "subspace_turn", "rank_use"), strict=True):
        assert lines_of(over_time)["all matrices"].tolist() == [point[name] for point in history.overall]
        values = [[point[member][name] for point in history.parameters[-2:]] for member in (0, 7, 14)]  # of q_proj
        assert lines_of(by_layer)["self_attn.q_proj"].tolist() == pytest.approx(np.mean(values, axis=1).tolist())
    references = [{line for line in lines_of(axes) if ":" in line} for axes, _ in pairs]
    assert references == [{"directions all alike: 25%"}, {"random subspaces: 75%"}, set()]


def test_updates_show_the_metrics_that_there_are() -> None:
    history = make_history(llama(2), points=4)
    assert len(pairs_of(draw(history, "updates"))) == 1
    for point, overall in zip(history.parameters, history.overall, strict=True):
        for metrics in (*point, overall):
            metrics["variance_spread"] = 0.3
    [_, (over_time, by_layer)] = pairs_of(draw(history, "updates"))
    assert over_time.get_title(loc="left").startswith("Variance spread")
    assert lines_of(over_time)["all matrices"].tolist() == [0.3] * 4
    assert lines_of(by_layer)["mlp.up_proj"].tolist() == [0.3] * 2


def test_pictures_that_show_nothing_are_left_out(tmp_path: Path) -> None:
    """Of updates of low rank those of slices, and the other way round; where all slices are selected, both."""
    history = low_rank_history(llama(1))
    assert [path.stem for path in save_pictures(history, tmp_path)] == ["subspaces", "updates"]
    with pytest.raises(ValueError, match="no matrix has the metrics that the picture 'heatmap' shows; choose from sub"):
        draw(history, "heatmap")
    whole = history.part(lambda info: False)
    whole.infos = [info._replace(rank=0) for info in history.infos]
    assert pictures_of(whole) == ["updates"]


def test_pictures_of_several_algorithms_show_their_own_matrices() -> None:
    """With a group of each, metrics of all matrices are of those that have them."""
    first, second = make_history(llama(2), points=3), low_rank_history(llama(2), points=3)
    state, other = first.state_dict(), second.state_dict()
    for name in ("overall", "groups"):
        state[name] = [one | two for one, two in zip(other[name], state[name], strict=True)]
    state["parameters"] = [one + two for one, two in zip(state["parameters"], other["parameters"], strict=True)]
    state["kinds"] += other["kinds"]
    for name, dim in (("shares", 1), ("counts", 0), ("hits", 0)):
        state[name] = torch.cat([state[name], other[name]], dim)
    both = SelectionHistory()
    both.load_state_dict(state)
    assert pictures_of(both) == ["overview", "heatmap", "staleness", "subspaces", "updates"]
    for name, alone in (("heatmap", first), ("overview", first), ("staleness", first), ("subspaces", second)):
        for found, expected in zip(draw(both, name).axes, draw(alone, name).axes, strict=True):
            for line, its_twin in zip(found.lines, expected.lines, strict=True):
                assert np.allclose(line.get_ydata(), its_twin.get_ydata())


# The heatmap


def test_heatmap_shows_the_shares() -> None:
    """0 is never, 0.5 the fair share, 1 every step; here a bin each of these, in both layers, and the rest never."""
    history = make_history(["layers.0.up.weight", "layers.1.up.weight"], points=2)
    shares = torch.zeros_like(history.shares)
    shares[:, :, :16] = 255
    shares[1, :, 16:32] = 64  # a quarter, but for rounding
    shares[1, 1, 48:] = round(255 * 0.625)  # half-way from a quarter to all
    history.load_state_dict(history.state_dict() | {"shares": shares})
    axes = panels_of(draw(history, "heatmap"))["up"]
    values = mesh_of(axes)
    assert values.shape == (2 * 64, 2)
    expected = np.zeros((128, 2))
    expected[[*range(16), *range(64, 80)]] = 1.0
    expected[[*range(16, 32), *range(80, 96)], 1] = 0.5
    expected[112:, 1] = 0.75
    assert np.abs(values - expected).max() < 0.003
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]


def test_shares_are_put_together_once_a_panel(layered: SelectionHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once a matrix: of 10,000 matrices that took 19 GB."""
    put_together = 0
    whole = SelectionHistory.shares.fget

    def count(history: SelectionHistory) -> Any:
        nonlocal put_together
        put_together += 1
        return whole(history)

    monkeypatch.setattr(SelectionHistory, "shares", property(count))
    draw(layered, "heatmap")
    assert put_together <= len(plots._families(layered.infos)) + 1


def test_names_are_shown_as_they_are() -> None:
    """A dollar sign begins no formula, and a legend leaves out nothing that begins with an underscore."""
    names = [f"layers.{layer}.{part}.weight" for layer in range(2) for part in ("_expand", "_reduce")] + [
        "a$x_{$.weight"
    ]
    history = make_history(names, points=3)
    for name in pictures_of(history):
        draw(history, name).savefig(io.BytesIO())
    shown = {text.get_text().strip("\u200b") for text in panel(history, "captured_mass").get_legend().get_texts()}
    assert {"_expand", "_reduce"} <= shown


def test_heatmap_merges_intervals_by_their_lengths() -> None:
    history = make_history(["weight"], points=2 * plots._MAX_COLUMNS)
    history.steps = [1, *range(10, 10 * len(history), 10)]
    shares = torch.zeros_like(history.shares)
    shares[1] = 51
    history.load_state_dict(history.state_dict() | {"shares": shares})
    values = mesh_of(draw(history, "heatmap").axes[0])
    assert values.shape == (BINS, plots._MAX_COLUMNS)
    # 9 of 10 steps at a share of 0.2, against a fair share of 0.25, which is drawn at 0.5.
    assert np.allclose(values[:, 0], 0.9 * 0.2 / 0.25 * 0.5)
    assert not values[:, 1:].any()


def test_what_was_not_there_yet_is_neither_never_nor_fair() -> None:
    history = extend(SelectionHistory(), infos_of(["layers.0.up"]), 3)
    history = extend(history, infos_of(["layers.0.up", "layers.1.up"]), 2)
    values = mesh_of(draw(history, "heatmap").axes[0])
    assert not np.ma.getmaskarray(values)[:64].any()
    assert np.ma.getmaskarray(values)[64:, :3].all()
    assert not np.ma.getmaskarray(values)[64:, 3:].any()


def test_muon_is_even() -> None:
    history = extend(SelectionHistory(), infos_of(["weight"]), 3, fraction=1.0)
    assert np.allclose(mesh_of(draw(history, "heatmap").axes[0]), 0.5)


def test_heatmap_has_a_panel_for_each_kind_of_matrix() -> None:
    figure = draw(make_history([*llama(30), "lm_head.weight", "pooler.weight"], points=2), "heatmap")
    panels = panels_of(figure)
    assert list(panels) == [*LLAMA, "other matrices"]
    assert [label.get_text() for label in panels["other matrices"].get_yticklabels()] == ["lm_head", "pooler"]
    layers = [int(label.get_text()) for label in panels["mlp.up_proj"].get_yticklabels()]
    assert layers == list(range(0, 30, 3))


def test_the_overview_shows_the_kind_that_is_least_even() -> None:
    history = make_history(llama(3), points=3)
    for point in history.parameters:
        for info, metrics in zip(history.infos, point, strict=True):
            metrics["imbalance"] = 0.9 if "v_proj" in info.name else 0.1
    panels = panels_of(draw(history, "overview"))
    assert len(panels) == 4
    shown = mesh_of(panels["Selected where and when: self_attn.v_proj"])
    assert np.array_equal(shown, mesh_of(panels_of(draw(history, "heatmap"))["self_attn.v_proj"]))


# Any model, any run


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", MODELS.values(), ids=MODELS)
def test_labels_stay_apart_whatever_the_model(names: list[str]) -> None:
    """No label of an axis lies on its neighbour, and every matrix is in the heatmap."""
    history = make_history(names, points=2, every=5)
    if names[0] == "parameter 0":
        history = extend(SelectionHistory(), [*infos_of(names), *infos_of(names, group="other")], 2)
    low_rank = low_rank_history(names, points=2)
    for figure in (draw(history, "overview"), draw(history, "heatmap"), draw(low_rank, "subspaces")):
        figure.draw_without_rendering()
        for axes in figure.axes:
            for labels in (axes.get_yticklabels(), axes.get_xticklabels()):
                boxes = [label.get_window_extent() for label in labels if label.get_text() and not label.get_rotation()]
                boxes.sort(key=lambda box: (box.y0, box.x0))
                overlaps = [a for a, b in pairwise(boxes) if a.overlaps(b)]
                assert not overlaps, [label.get_text() for label in labels]
    meshes = [axes for axes in draw(history, "heatmap").axes if any(isinstance(c, QuadMesh) for c in axes.collections)]
    assert len(meshes[:-1]) == len(plots._families(history.infos))  # the last one is the colour bar
    members = [member for family in plots._families(history.infos) for member in family.members]
    assert sorted(members) == list(range(len(history.infos)))
    assert all(len(set(family.labels)) == len(family.labels) for family in plots._families(history.infos))


@pytest.mark.filterwarnings("error")
def test_a_single_step_with_metrics() -> None:
    history = make_history(llama(1), points=1)
    for name in pictures_of(history):
        draw(history, name).draw_without_rendering()
    axes = panel(history, "coverage")
    assert lines_of(axes)["all matrices"].tolist() == [history.overall[0]["coverage"]]
    assert axes.lines[0].get_marker() == "o"
    assert mesh_of(draw(history, "heatmap").axes[0]).shape[1] == 1


def test_metrics_that_are_missing_or_not_finite_leave_gaps() -> None:
    history = make_history(llama(2), points=3)
    for name in ("turnover", "captured_mass"):
        del history.overall[1][name], history.parameters[1][0][name]
        history.parameters[2][1][name] = float("nan")
    for name in pictures_of(history):
        draw(history, name).draw_without_rendering()
    assert np.isnan(lines_of(panel(history, "turnover"))["all matrices"]).tolist() == [False, True, False]


def test_a_resumed_history_is_drawn_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole = make_history(llama(2), points=6)
    whole.save(tmp_path / "whole.json")
    first = extend(SelectionHistory(), infos_of(llama(2)), 3)
    resumed = SelectionHistory()
    resumed.load_state_dict(first.state_dict())
    extend(resumed, infos_of(llama(2)), 3, seed=1)
    assert resumed.steps == whole.steps
    values = mesh_of(draw(resumed, "heatmap").axes[0])
    assert np.array_equal(values[:, :3], mesh_of(draw(whole, "heatmap").axes[0])[:, :3])
    assert np.array_equal(
        mesh_of(draw(SelectionHistory.load(tmp_path / "whole.json"), "heatmap").axes[0]),
        mesh_of(draw(whole, "heatmap").axes[0]),
    )


def test_a_history_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"history has no metrics to draw.*choose a smaller `every`"):
        save_pictures(SelectionHistory(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# Files and loggers


def test_files(layered: SelectionHistory, tmp_path: Path) -> None:
    paths = save_pictures(layered, tmp_path / "new" / "folder")
    names = ["overview", "heatmap", "staleness", "updates"]
    assert paths == [tmp_path / "new" / "folder" / f"{name}.png" for name in names]
    for path in paths:
        height, width, _ = matplotlib.image.imread(path).shape
        assert 600 < width < 2000 and 300 < height < 2000, path
        assert path.stat().st_size < 400_000


def test_nothing_of_matplotlib_is_changed_or_kept(layered: SelectionHistory, tmp_path: Path) -> None:
    """In a process of its own: pyplot is not even imported, and the user's style is neither used nor changed."""
    layered.save(tmp_path / "history.json")
    program = f"""
import sys, matplotlib
matplotlib.rcParams.update({{"axes.facecolor": "black", "figure.figsize": (1, 1)}})
before = matplotlib.rcParams.copy()
from dion2_lightning.monitoring.history import SelectionHistory
from dion2_lightning.monitoring.plots import draw, save_pictures
history = SelectionHistory.load({str(tmp_path / "history.json")!r})
save_pictures(history, {str(tmp_path)!r})
assert draw(history, "overview").axes[2].get_facecolor() == (1, 1, 1, 1)
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_without_matplotlib_the_error_says_what_to_install() -> None:
    program = "import sys; sys.modules['matplotlib'] = None\nimport dion2_lightning.monitoring.plots"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "ImportError: pictures need matplotlib: pip install matplotlib" in result.stderr


def test_tensorboard_and_wandb_get_pictures(layered: SelectionHistory, tmp_path: Path) -> None:
    """Lightning's own TensorBoardLogger; of W&B's the method alone, which needs an account."""
    board = TensorBoardLogger(tmp_path, name="", version="")
    images: dict[tuple[str, int], Any] = {}

    class Wandb:
        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            [sent[key, step]] = [images]

    sent = images
    wandb, csv = Wandb(), CSVLogger(tmp_path, name="csv")
    assert log_pictures(layered, [board, csv, wandb], 50) == [board, wandb]
    board.finalize("success")
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["dion2/overview", "dion2/heatmap"]
    [event] = events.Images("dion2/heatmap")
    assert event.step == 50
    assert event.width > 600
    assert set(images) == {("dion2/overview", 50), ("dion2/heatmap", 50)}
    [pixels] = images["dion2/overview", 50]
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.std() > 10


def test_a_writer_and_a_tracker_get_pictures(layered: SelectionHistory) -> None:
    """torch's SummaryWriter itself, and what Accelerate's TensorBoardTracker calls it."""
    calls = []
    writer = SimpleNamespace(add_figure=lambda tag, figure, global_step: calls.append((tag, global_step)))
    log_pictures(layered, [writer, SimpleNamespace(tracker=writer)], 7)
    assert calls == [("dion2/overview", 7), ("dion2/heatmap", 7)] * 2


def test_loggers_get_the_pictures_that_there_are() -> None:
    calls = []
    writer = SimpleNamespace(add_figure=lambda tag, figure, global_step: calls.append(tag))
    history = low_rank_history(llama(1))
    log_pictures(history, [writer], 7)
    history.infos = [info._replace(rank=0) for info in history.infos]
    log_pictures(history, [writer], 7)
    assert calls == ["dion2/subspaces", "dion2/updates"]


def test_unknown_pictures_are_refused(layered: SelectionHistory) -> None:
    with pytest.raises(ValueError, match="there is no picture 'loss'; choose from overview, heatmap"):
        draw(layered, "loss")


def test_the_helper_makes_what_the_optimizer_leaves() -> None:
    """The histories of these tests have the shapes and the sums of real ones."""
    history = make_history(["weight"], points=4)
    assert history.shares.shape == (4, 1, BINS)
    assert history.shares.float().mean().item() / 255 == pytest.approx(0.25, abs=0.01)
    assert torch.equal(history.counts, history.counts.sort(dim=1).values)
