"""The GPU check: sections that fail, raise, crash or take too long do not harm the others' results."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.section import Section
from benchmarks.gpu.sections import SECTIONS
from tests.integrations.test_docs import ROOT

BEFORE = signal.getsignal(signal.SIGTERM)


def sample(name: str, minutes: float = 1, **options: Any) -> Section:
    return Section(name, f"Title of {name}", f"tests.benchmarks.sample_sections:{name}", minutes, **options)


ALL = (
    sample("wrong"),
    sample("raises"),
    sample("dies"),
    sample("takes_too_long", minutes=5 / 60),
    sample("fine", arguments={"number": 7}),
    Section("missing_package", "", "tests.benchmarks.sample_sections:fine", 1, needs=("a_package_that_is_not_there",)),
    Section("on_a_gpu", "", "tests.benchmarks.sample_sections:fine", 1, cuda_only=True),
    sample("sees_no_earlier_files"),
)


def run(folder: Path, *arguments: str, sections: tuple[Section, ...] = ALL) -> int:
    return main(["--device", "cpu", "--tiny", "--output", str(folder), *arguments], sections)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("check")
    (folder / "results.jsonl").write_text("of an earlier check")
    (folder / "work" / "shared").mkdir(parents=True)  # of a check that was killed
    (folder / "packages").mkdir()
    return run(folder), folder


def test_every_section_ends_in_its_own_way(checked: tuple[int, Path]) -> None:
    code, folder = checked
    outcomes = {line["section"]: (line["status"], line["why"]) for line in lines(folder) if "status" in line}
    assert code == 1
    assert outcomes == {
        "wrong": ("failed", ""),
        "raises": ("failed", ""),
        "dies": ("failed", "its process ended with code 9; see log.txt"),
        "takes_too_long": ("stopped", "not through after 5 s"),
        "fine": ("passed", ""),
        "missing_package": (
            "skipped",
            "a_package_that_is_not_there not installed; make gpu-wheels collects wheels to bring along",
        ),
        "on_a_gpu": ("skipped", "needs a GPU"),
        "sees_no_earlier_files": ("passed", ""),
    }


def test_rows_before_a_failure_are_kept(checked: tuple[int, Path]) -> None:
    _, folder = checked
    rows: dict[str, list[Any]] = {}
    for line in lines(folder):
        if "row" in line:
            rows.setdefault(line["section"], []).append(line["row"])
    assert [row["what"] for row in rows["wrong"]] == ["the first", "the second"]
    assert rows["raises"][1] == {"what": "error", "ok": False, "found": "ValueError: injected"}
    assert rows["dies"] == rows["takes_too_long"] == [{"what": "before", "ok": True}]
    assert rows["fine"] == [{"what": "a number", "found": 7, "ok": True}]
    report = (folder / "report.md").read_text()
    assert "| takes_too_long | stopped |" in report
    assert "## Title of fine" in report
    assert "| a number | 7 | yes |" in report
    assert "ValueError: injected" in (folder / "log.txt").read_text()


def test_no_process_and_no_file_is_left(checked: tuple[int, Path]) -> None:
    _, folder = checked
    child = int((folder / "process of takes_too_long").read_text())
    wait_until(partial(has_ended, child), 10)
    assert signal.getsignal(signal.SIGTERM) is BEFORE
    assert sorted(path.name for path in folder.iterdir()) == [
        "log.txt",
        "process of takes_too_long",
        "report.md",
        "results.jsonl",
    ]


def test_the_report_names_commit_and_versions(checked: tuple[int, Path]) -> None:
    _, folder = checked
    head = lines(folder)[0]
    assert head["machine"]["torch"] == torch.__version__
    assert head["commit"] in (folder / "report.md").read_text()


def test_all_passed(tmp_path: Path) -> None:
    assert run(tmp_path, "--only", "fi*", "--commit", "abc") == 0
    assert [line.get("status") for line in lines(tmp_path)] == [None, None, "passed"]
    assert lines(tmp_path)[0]["commit"] == "abc"


@pytest.mark.parametrize("minutes", [1e-4, 1], ids=["for any", "for one that needs more"])
def test_no_time_left(minutes: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = (sample("fine", min_seconds=100),)
    assert run(tmp_path, "--minutes", str(minutes), sections=sections) == 3
    assert (lines(tmp_path)[-1]["status"], lines(tmp_path)[-1]["why"]) == ("skipped", "no time left")
    assert "no time left: fine" in capsys.readouterr().out


def test_a_section_with_less_than_its_own_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--minutes", "0.05", sections=(sample("takes_too_long"),)) == 3
    assert lines(tmp_path)[-1]["status"] == "stopped"
    assert re.fullmatch(r"no time left; not through after [123] s", lines(tmp_path)[-1]["why"])
    assert "no time left: takes_too_long" in capsys.readouterr().out


def test_a_failure_decides_the_exit_code(tmp_path: Path) -> None:
    assert run(tmp_path, sections=(sample("wrong"), sample("fine", min_seconds=1000))) == 1


CHECK = """
import sys
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.section import Section

names = ("takes_too_long", "fine", "waits", "fine")
sections = [Section(name, f"Title of {name}", f"tests.benchmarks.sample_sections:{name}", 1) for name in names]
sys.exit(main(["--device", "cpu", "--output", *sys.argv[1:]], sections))
"""


@pytest.mark.parametrize("tiny", [True, False], ids=["two side by side", "one after the other"])
def test_terminated(tiny: bool, tmp_path: Path) -> None:
    """The report names the sections that were running, and no process is left."""
    command = [sys.executable, "-c", CHECK, str(tmp_path), *(["--tiny"] if tiny else [])]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            running = ["waits", "takes_too_long"] if tiny else ["takes_too_long"]
            wait_until(lambda: all((tmp_path / f"process of {name}").exists() for name in running), 60)
            process.terminate()
            assert process.wait(30) == 143
        finally:
            process.kill()
    for name in running:
        wait_until(partial(has_ended, int((tmp_path / f"process of {name}").read_text())), 10)
    outcomes = [(line["section"], line["status"], line["why"]) for line in lines(tmp_path) if "status" in line]
    stopped = sorted((name, "stopped", "the check was ended") for name in running)
    assert sorted(outcomes) == sorted([*stopped, *([("fine", "passed", "")] if tiny else [])])
    report = (tmp_path / "report.md").read_text()
    assert "| takes_too_long | stopped |" in report
    assert "## Title of takes_too_long" in report
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_a_gpu_the_error_says_how_to_try_it(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as raised:
        main([])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no GPU here" in error
    assert "python -m benchmarks.gpu --device cpu --tiny" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "stpe-*"], "--only stpe-*: no such section; there are machine, correct, step-smollm2-135m"),
        (["--minutes", "0"], "--minutes must be over 0, got 0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--device", "cpu", *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_real_section(tmp_path: Path) -> None:
    """The rates of the machine, by the command itself."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--only", "machine"]
    subprocess.run([*command, "--output", str(tmp_path)], cwd=ROOT, check=True, timeout=60)
    rows = [line["row"] for line in lines(tmp_path) if "row" in line]
    assert len(rows) == 3
    assert all(row["rate"] > 0 for row in rows)


def test_names_of_sections_differ() -> None:
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
