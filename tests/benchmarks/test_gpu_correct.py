"""The GPU check runs tests: a row for each function, whatever happens to its tests and their process."""

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
    files = [f"tests/benchmarks/sample_{name}.py" for name in ("tests", "broken", "skipped")]
    rows = {each.pop("what"): each for each in run_tests(options, tests=files)}
    seconds = {name: each_row.pop("seconds") for name, each_row in rows.items()}
    assert 0.2 <= seconds["sample tests: fine"] < 5
    for crashed in ("the process dies", "takes too long"):
        assert "crashed while running" in rows[f"sample tests: {crashed}"]["found"]
        rows[f"sample tests: {crashed}"]["found"] = "crashed"
    assert rows == {
        "sample tests: fine": row(3, 0, 0),
        "sample tests: one of three": row(2, 1, 0, "test_one_of_three[2]: AssertionError: two is wrong"),
        "sample tests: for a gpu": row(0, 0, 1, "Skipped: needs a GPU"),
        "sample tests: the process dies": row(1, 1, 0, "crashed"),
        "sample tests: takes too long": row(0, 1, 0, "crashed"),
        "sample broken": row(0, 1, 0, "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        "sample skipped": row(0, 0, 1, "Skipped: needs something else"),
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
def test_the_line_that_names_the_error(message: str, line: str) -> None:
    assert error_of(message) == line


def test_a_failure_of_pytest_itself_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that pytest reports of neither a test nor a file."""
    (tmp_path / "plugin_that_fails.py").write_text(
        "def pytest_sessionfinish(session):\n    session.exitstatus = 1\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_PLUGINS", "plugin_that_fails")
    options = Options("cpu", True, 60, str(tmp_path / "results.jsonl"), "correct")
    options.folder.mkdir(parents=True)
    rows = list(run_tests(options, tests=["tests/benchmarks/sample_skipped.py"]))
    assert [row["ok"] for row in rows] == [True, False]
    assert rows[-1]["found"] == "ended with code 1; see log.txt"
