"""The check for GPUs runs tests: a row for each function, whatever becomes of its tests and their process."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.correct import error_of, run_tests
from benchmarks.gpu.section import Options


def row(passed: int, failed: int, skipped: int, found: str | None = None) -> dict[str, Any]:
    return {"ok": not failed, "passed": passed, "failed": failed, "skipped": skipped, "found": found}


def test_a_row_for_each_function(tmp_path: Path) -> None:
    options = Options("cpu", True, 60, str(tmp_path / "results.jsonl"), "correct")
    options.folder.mkdir(parents=True)
    files = [f"tests/benchmarks/planted_{name}.py" for name in ("tests", "broken", "skipped")]
    rows = {each.pop("what"): each for each in run_tests(options, tests=files)}
    seconds = {name: its_row.pop("seconds") for name, its_row in rows.items()}
    assert 0.2 <= seconds["planted tests: fine"] < 5
    for ended in ("the process dies", "takes too long"):
        assert "crashed while running" in rows[f"planted tests: {ended}"]["found"]
        rows[f"planted tests: {ended}"]["found"] = "crashed"
    assert rows == {
        "planted tests: fine": row(3, 0, 0),
        "planted tests: one of three": row(2, 1, 0, "test_one_of_three[2]: AssertionError: two is wrong"),
        "planted tests: for a gpu": row(0, 0, 1, "Skipped: needs a GPU"),
        "planted tests: the process dies": row(1, 1, 0, "crashed"),
        "planted tests: takes too long": row(0, 1, 0, "crashed"),
        "planted broken": row(0, 1, 0, "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        "planted skipped": row(0, 0, 1, "Skipped: needs something else"),
    }


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("tests/a.py:3: in <module>\n    import b\nE     File c\nE   SyntaxError: invalid", "SyntaxError: invalid"),
        ("AssertionError: from 0.7 to 1.1\nassert False", "AssertionError: from 0.7 to 1.1"),
        ("worker 'gw0' crashed", "worker 'gw0' crashed"),
        (
            "torch.multiprocessing.spawn.ProcessRaisedException: \n\n"
            "-- Process 0 terminated with the following error:\n"
            'Traceback (most recent call last):\n  File "a.py", line 3, in b\n    raise error\n'
            "torch.cuda.OutOfMemoryError: CUDA out of memory\nin the layout FSDP2 on 2",
            "torch.cuda.OutOfMemoryError: CUDA out of memory",
        ),
    ],
)
def test_the_line_that_says_what_was_raised(message: str, line: str) -> None:
    assert error_of(message) == line


def test_a_failure_that_no_row_names_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever pytest counts as failed and does not report as a test's or a file's."""
    (tmp_path / "plugin_that_fails.py").write_text(
        "def pytest_sessionfinish(session):\n    session.exitstatus = 1\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_PLUGINS", "plugin_that_fails")
    options = Options("cpu", True, 60, str(tmp_path / "results.jsonl"), "correct")
    options.folder.mkdir(parents=True)
    rows = list(run_tests(options, tests=["tests/benchmarks/planted_skipped.py"]))
    assert [row["ok"] for row in rows] == [True, False]
    assert rows[-1]["found"] == "ended with code 1; see log.txt"
