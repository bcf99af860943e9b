"""The page that dion2-report writes: what it says, that it stands alone, and that a real browser shows it."""

import base64
import json
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from dion2_lightning.monitoring.history import SelectionHistory, to_plain
from dion2_lightning.monitoring.metrics import MEANINGS
from dion2_lightning.monitoring.plots import save_pictures
from dion2_lightning.monitoring.report import HEALTHY, LOOK, UNKNOWN, main, render_report, verdicts
from tests.browser import browse, check_shown
from tests.selection_histories import extend, infos_of, llama, low_rank_history, make_history

HOSTILE = 'layers.0.<script>alert("x")</script>&amp;\'"'
VOID = {"meta", "link", "img", "wbr"}


class Page(HTMLParser):
    """What is in a page; refuses tags that are not closed, or in another order than they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.counts: dict[str, int] = {}
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "poster")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def history() -> SelectionHistory:
    infos = [*infos_of(llama(2, ["up", "down"])), *infos_of(["experts"], matrices=4, group="dion2-experts")]
    return extend(SelectionHistory(), infos, 5)


@pytest.fixture(scope="module")
def html(history: SelectionHistory) -> str:
    return render_report(history, title="Tom & Jerry")


@pytest.fixture
def statistics(history: SelectionHistory, tmp_path: Path) -> Path:
    history.save(tmp_path / "statistics.json")
    return tmp_path / "statistics.json"


# The page


def test_the_page_stands_alone_and_is_well_formed(html: str) -> None:
    page = Page(html)
    assert page.counts["img"] == 4
    assert all(link.startswith("data:") for link in page.links)
    assert "http" not in html.replace("data-", "")
    assert "url(" not in html and "@import" not in html
    assert page.counts["script"] == 1


def test_pictures_that_are_there_are_not_drawn_again(history: SelectionHistory, html: str, tmp_path: Path) -> None:
    paths = save_pictures(history, tmp_path)
    assert render_report(history, title="Tom & Jerry", pictures=paths) == html
    paths[0].write_bytes(b"another picture")
    assert base64.b64encode(b"another picture").decode() in render_report(history, pictures=paths)


def test_it_says_what_was_trained(html: str) -> None:
    texts = Page(html).texts
    facts = {"steps": "50", "parameters": "5", "matrices": "8", "slices": "1,024", "selected a step": "25.0%"}
    for name, value in {**facts, "groups": "dion2, dion2-experts"}.items():
        assert texts[texts.index(name) + 1] == value
    assert "Tom & Jerry" in texts


def test_tables_hold_the_metrics(html: str, history: SelectionHistory) -> None:
    rows = {row[0]: row[1:] for row in Page(html).rows}
    metrics = history.parameters[-1][1]
    assert rows["model.layers.0.down.weight"] == [
        "dion2", "1", "128", "outputs", "-", "25.0%", f"{metrics['coverage']:.1%}", f"{metrics['staleness_mean']:.1f}",
        f"{metrics['staleness_max']:.0f}", f"{metrics['turnover']:.1%}", f"{metrics['captured_mass']:.1%}",
        f"{metrics['imbalance']:.2f}", "1.00e-04",
    ]  # fmt: skip
    assert rows["experts"][:4] == ["dion2-experts", "4", "128", "outputs"]
    assert rows["dion2-experts"][0] == "1"
    assert rows["all"][2] == f"{history.overall[-1]['coverage']:.1%}"
    for name, meaning in MEANINGS.items():
        if name in history.overall[-1] and name != "coverage":
            assert any(label.endswith(meaning) for label in rows), name


def test_names_are_escaped() -> None:
    history = make_history([HOSTILE, "other"], points=2)
    html = render_report(history, title=HOSTILE)
    page = Page(html)
    assert page.counts["script"] == 1
    assert "<script>alert" not in html
    assert HOSTILE in [row[0] for row in page.rows]
    assert page.texts.count(HOSTILE) == 2  # title and heading


def test_one_matrix_one_step() -> None:
    page = Page(render_report(make_history(["weight"], points=1, every=3)))
    states = {row[0]: row[2] for row in page.rows if len(row) == 4}
    [coverage] = [state for label, state in states.items() if label.startswith("coverage")]
    assert coverage.startswith("no verdicttoo early: judged after 4 / fraction = 16 steps")


def test_updates_of_low_rank() -> None:
    """They have no slices and no thresholds; the parameter that captures least is named."""
    history = low_rank_history(llama(1), points=3)
    page = Page(render_report(history))
    assert page.counts["img"] == 2
    assert "selected a step" not in page.texts
    rows = {row[0]: row[1:] for row in page.rows}
    [energy] = [row for label, row in rows.items() if label.startswith("captured energy")]
    least = min(history.parameters[-1], key=lambda each: each["captured_energy"])["captured_energy"]
    assert energy[1].startswith("no verdict") and energy[2].startswith(f"{least:.1%}model.layers.0.")
    assert rows["model.layers.0.self_attn.q_proj.weight"][:5] == ["dion", "1", "128", "outputs", "32"]
    assert {verdict.state for verdict in verdicts(history).values()} == {UNKNOWN}
    history.overall[-1]["rank_use"] = float("nan")
    assert verdicts(history)["rank_use"].state == LOOK


# Verdicts


def history_at(step: int, **metrics: float) -> SelectionHistory:
    history = make_history(["a", "b"], points=1)
    history.steps[-1] = step
    healthy = {
        "selected_fraction": 0.25, "coverage": 1.0, "staleness_mean": 3.0, "staleness_max": 20.0, "turnover": 0.7,
        "captured_mass": 0.4, "imbalance": 0.2, "update_rms": 1e-3, "variance_spread": 0.3,
        "orthogonality_error": 0.2,
    }  # fmt: skip
    history.overall[-1] = {**healthy, **metrics}
    history.parameters[-1] = [{**healthy, **metrics} for _ in history.infos]
    return history


@pytest.mark.parametrize(
    ("name", "healthy", "look"),
    [
        ("coverage", 0.95, 0.94),
        ("staleness_mean", 12.0, 12.1),
        ("staleness_max", 50.0, 51.0),
        ("turnover", 0.0751, 0.0749),
        ("captured_mass", 0.92, 0.93),
        ("imbalance", 0.5, 0.51),
        ("orthogonality_error", 0.5, 0.51),
        ("update_rms", 1.0, float("nan")),
        ("variance_spread", 9.0, float("nan")),
    ],
)
def test_thresholds(name: str, healthy: float, look: float) -> None:
    """At a fraction of a quarter, after 100 steps."""
    assert verdicts(history_at(100, **{name: healthy}))[name].state != LOOK
    judged = verdicts(history_at(100, **{name: look}))
    assert [each for each, verdict in judged.items() if verdict.state == LOOK] == [name]


def test_no_verdict_before_slices_had_their_turns() -> None:
    timed = {"coverage", "staleness_mean", "staleness_max", "turnover", "imbalance"}
    early, late = (verdicts(history_at(step, coverage=0.5)) for step in (15, 16))
    assert {name for name in timed if early[name].state == UNKNOWN} == timed
    assert late["coverage"].state == LOOK


@pytest.mark.parametrize(("step", "healthy", "look"), [(100, 50.0, 51.0), (1000, 400.0, 401.0), (10**5, 400.0, 401.0)])
def test_a_slice_that_waits_long_is_seen_however_long_the_run(step: int, healthy: float, look: float) -> None:
    """A slice that waited 401 of 100,000 steps may have had a hundredth of its fair share, all the time."""
    states = [verdicts(history_at(step, staleness_max=value))["staleness_max"].state for value in (healthy, look)]
    assert states == [HEALTHY, LOOK]


def test_the_longest_of_many_waits_by_chance() -> None:
    """Of 256 slices, drawn at a fraction of a quarter: (3 / 4)^w * 256 is a thousandth where w is 43.3 steps."""
    for step, value, state in ((43, 43.0, UNKNOWN), (44, 43.0, HEALTHY), (44, 44.0, LOOK)):
        assert verdicts(history_at(step, staleness_max=value))["staleness_max"].state == state


@pytest.mark.parametrize(
    ("fraction", "healthy", "look"), [(0.0625, 0.9, 0.91), (0.9, 0.98, 0.991), (0.95, 0.99, 0.996)]
)
def test_captured_mass_is_judged_by_what_is_left_for_the_others(fraction: float, healthy: float, look: float) -> None:
    """It is k / n at least: of nine tenths of the slices, 95% is half of what the others would have at random."""
    judged = [
        verdicts(history_at(1000, selected_fraction=fraction, captured_mass=value))["captured_mass"]
        for value in (healthy, look)
    ]
    assert [verdict.state for verdict in judged] == [HEALTHY, LOOK]
    assert judged[0].reason.startswith(f"over {1 - (1 - fraction) / 10:.1%} the slices left out have under a tenth")


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (60, "healthy up to 43 steps: of so many slices one may wait as long by chance; 60 is"),
        (100, "healthy up to 50 steps: half of all; 100 is"),
        (1000, "healthy up to 400 steps: 100 / fraction; 1000 is"),
    ],
)
def test_the_longest_wait_names_the_rule_that_made_its_limit(step: int, reason: str) -> None:
    assert verdicts(history_at(step))["staleness_max"].reason.startswith(reason)


def test_no_verdict_before_what_came_late_had_its_turns() -> None:
    """Two of its steps have passed at step 120; at 140 there were enough, by the first point that knows of it."""
    old, late = infos_of(["old"]), infos_of(["late"], group="late")
    history = extend(SelectionHistory(), old, 11)
    judged = []
    for _ in range(3):
        extend(history, [*old, *late], 1)
        history.overall[-1] = history.overall[-1] | {"coverage": 0.7}
        judged.append(verdicts(history)["coverage"])
    assert [each.state for each in judged] == [UNKNOWN, UNKNOWN, LOOK]
    assert judged[0].reason == (
        "too early: judged after 4 / fraction = 16 steps with every parameter, of which some came late"
    )


def test_no_verdict_of_a_step_without_gradients() -> None:
    history = history_at(100, selected_fraction=0.0, coverage=0.1)
    for metrics in history.parameters[-1]:
        del metrics["turnover"]
    assert verdicts(history)["coverage"].state == UNKNOWN


def test_the_fraction_is_that_of_what_had_gradients() -> None:
    """One of two parameters had none in the last step: the share of all slices is half of the fraction."""
    history = history_at(100, selected_fraction=0.125, staleness_mean=10.0)
    history.parameters[-1][0]["selected_fraction"] = 0.25
    history.parameters[-1][1]["selected_fraction"] = 0.0
    del history.parameters[-1][1]["turnover"]
    assert "25% is that of slices all alike" in str(verdicts(history)["captured_mass"])


def test_all_of_every_matrix_is_healthy() -> None:
    judged = verdicts(history_at(100, selected_fraction=1.0, turnover=0.0, captured_mass=1.0))
    assert LOOK not in {verdict.state for verdict in judged.values()}


def test_the_parameter_to_look_at_first_is_named() -> None:
    history = make_history(["a", "b", "c"], points=4)
    for point, coverage, wait in zip(history.parameters[-1], (0.3, 0.99, 0.4), (8.0, 9.0, 40.0), strict=True):
        point["coverage"], point["staleness_max"] = coverage, wait
    history.overall[-1]["coverage"] = 0.9
    page = Page(render_report(history, pictures=[]))
    assert "Worth a look: coverage." in page.texts
    rows = {row[0]: row for row in page.rows if len(row) == 4}
    metrics = ("coverage", "staleness max")
    found = {name: row[3] for label, row in rows.items() for name in metrics if label.startswith(name)}
    assert found == {"coverage": "30.0%a", "staleness max": "40 stepsc"}


# The command


def test_the_command_writes_beside_the_statistics(statistics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(statistics)]) == 0
    assert capsys.readouterr().out == f"{statistics.with_suffix('.html')}\n"
    assert "What was selected" in Page(statistics.with_suffix(".html").read_text()).texts


def test_the_command_is_a_module_too(statistics: Path, tmp_path: Path) -> None:
    """What the console script calls; here without an installation of its own."""
    output = tmp_path / "page.html"
    command = [sys.executable, "-m", "dion2_lightning.monitoring.report", statistics, "-o", output]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    assert "What was selected" in Page(output.read_text()).texts


def test_the_console_script_is_the_command() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    entry = EntryPoint("dion2-report", project["scripts"]["dion2-report"], "console_scripts")
    assert entry.load() is main


def test_help_and_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "SelectionMonitor(save_to=...)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no JSON file, or not all of it"),
        (b"\xff\xfe", "is no JSON file, or not all of it"),
        (None, "there is no file"),
        ('{"loss": 1.0}', "is no file of selection statistics"),
        ('{"format": "dion2 selection history", "version": 1}', "is damaged (KeyError: 'window')"),
    ],
    ids=["empty", "binary", "missing", "foreign", "without its content"],
)
def test_bad_files(content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "statistics.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert main([str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("dion2-report: error: ") and message in printed.err and str(path) in printed.err
    assert not path.with_suffix(".html").exists() and printed.out == ""


def test_a_truncated_file(statistics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics.write_text(statistics.read_text()[:-100])
    assert main([str(statistics)]) == 1
    assert "is no JSON file, or not all of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("steps", [10], "numbers of points differ: steps 1, overall 5"),
        ("steps", [10, 20, 20, 30, 40], "steps do not count up"),
        ("steps", [50, 40, 30, 20, 10], "steps do not count up"),
        ("steps", [0, 10, 20, 30, 40], "steps do not count up"),
        ("kinds", [["dion2", "a", 1, 4, 0]], "parameters and kinds differ in number"),
        ("kinds", 5 * [["dion2", "a", 1, 4, 7]], "a kind has an axis other than 0 and 1"),
        ("kinds", 5 * [["dion2", "a", 1, 0, 1]], "a kind has an axis other than 0 and 1, or no slices"),
        ("window", None, "window is nan"),
        ("overall", 5 * [{"loss": 1.0}], "there is no metric 'loss'"),
        ("overall", 5 * [{"coverage": 1.0}], "selected_fraction is missing beside ['coverage']"),
        ("shares", {"dtype": "uint8", "shape": [1, 1, 64], "base64": "AAAA"}, "RuntimeError"),
        ("shares", to_plain(torch.zeros(5, 5, 32, dtype=torch.uint8)), "shares has another shape"),
        ("counts", to_plain(torch.zeros(5, 32)), "counts has another shape than 5 kinds of 64 bins"),
        ("hits", to_plain(torch.zeros(4, 64)), "hits has another shape than 5 kinds of 64 bins"),
    ],
)
def test_a_damaged_file(
    part: str, value: Any, message: str, statistics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = json.loads(statistics.read_text())
    statistics.write_text(json.dumps({**saved, part: value}))
    assert main([str(statistics)]) == 1
    error = capsys.readouterr().err
    assert "is damaged" in error and message in error


def test_a_run_without_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SelectionHistory().save(tmp_path / "statistics.json")
    assert main([str(tmp_path / "statistics.json")]) == 1
    assert "history has no metrics to draw" in capsys.readouterr().err


def test_outputs_that_cannot_be(statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for output, message in {
        tmp_path / "missing" / "page.html": f"there is no folder {tmp_path / 'missing'}; make it first",
        tmp_path: f"{tmp_path}: Is a directory",
        statistics: "would overwrite the history",
    }.items():
        before = statistics.read_bytes()
        assert main([str(statistics), "-o", str(output)]) == 1
        assert message in capsys.readouterr().err
        assert statistics.read_bytes() == before


def test_without_matplotlib(statistics: Path) -> None:
    program = "import sys; sys.modules['matplotlib'] = None\nfrom dion2_lightning.monitoring.report import main\n"
    program += f"sys.exit(main([{str(statistics)!r}]))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "pip install matplotlib" in result.stderr and "Traceback" not in result.stderr


# A browser


@pytest.fixture
def page(html: str, tmp_path: Path) -> Path:
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    return tmp_path / "report.html"


def test_a_browser_shows_it(page: Path, tmp_path: Path) -> None:
    check_shown(page, tmp_path / "screen.png")


def test_a_click_on_a_heading_sorts_and_another_sorts_back(page: Path, history: SelectionHistory) -> None:
    turnover = {k.name: point["turnover"] for k, point in zip(history.infos, history.parameters[-1], strict=True)}
    by_turnover = sorted(turnover, key=turnover.__getitem__)
    for clicks, expected in ((1, by_turnover), (2, by_turnover[::-1])):
        heading = "[...document.querySelectorAll('button')].findLast(each => each.textContent === 'turnover')"
        click = f"{heading}.click();" * clicks
        page.write_text(page.read_text().replace("</body>", f"<script>{click}</script></body>"))
        rows = Page(browse(page, "--dump-dom").stdout).rows
        assert [row[0] for row in rows if row[0] in turnover] == expected
        page.write_text(page.read_text().replace(f"<script>{click}</script>", ""))


def test_the_browser_would_tell_of_an_error(page: Path) -> None:
    """What the tests above rely on."""
    page.write_text(page.read_text().replace("</body>", "<script>missing()</script></body>"))
    assert "CONSOLE" in browse(page, "--dump-dom").stderr
