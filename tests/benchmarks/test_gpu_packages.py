"""The GPU check: packages that sections may import, and wheels that were brought along."""

import os
import zipfile
from pathlib import Path
from threading import Event

import pytest

from benchmarks.gpu import __main__ as check
from benchmarks.gpu import packages
from benchmarks.gpu.packages import Packages, install_wheels


def write_wheel(folder: Path, name: str, tag: str = "py3-none-any") -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-99-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{name}-99.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n")
        wheel.writestr(f"{name}-99.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{name}-99.dist-info/RECORD", "")


def missing(found: Packages, *names: str) -> str:
    return found.explain_missing(names, found.environment(), Event())


def test_wheels_do_not_replace_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "not_there"):
        write_wheel(tmp_path / "wheels", name)
    monkeypatch.setattr(packages, "WHEELS", tmp_path / "wheels")
    monkeypatch.chdir(tmp_path)
    installed = install_wheels(Path(), tmp_path / "log.txt")
    assert installed.folder is not None
    assert installed.folder.is_absolute()
    assert sorted(path.name for path in installed.folder.glob("*.py")) == ["not_there.py"]
    assert missing(installed, "numpy", "not_there") == ""
    assert missing(installed, "neither_there").startswith("neither_there not installed; the wheels in ")
    monkeypatch.setattr(check, "PACKAGES", ("not_there", "neither_there"))
    machine = check.describe("cpu", "abc", installed)["machine"]
    assert (machine["not_there"], machine["neither_there"]) == ("99", None)


def test_wheels_that_cannot_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(tmp_path / "wheels", "not_there", tag="cp27-cp27m-win32")
    monkeypatch.setattr(packages, "WHEELS", tmp_path / "wheels")
    found = install_wheels(tmp_path, tmp_path / "log.txt")
    assert found.folder is None
    assert not (tmp_path / "packages").exists()
    explanation = missing(found, "not_there")
    assert explanation.startswith(
        f"not_there not installed; the wheels in {tmp_path / 'wheels'} could not be installed: ERROR"
    )
    assert "is not a supported wheel on this platform" in explanation
    assert "is not a supported wheel on this platform" in (tmp_path / "log.txt").read_text()


def test_packages_are_imported(tmp_path: Path) -> None:
    """One that is installed and lacks a dependency is missing too."""
    (tmp_path / "lacks_one.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "raises.py").write_text("raise ValueError('injected')")
    (tmp_path / "talks.py").write_text("print('[1, 2', end='')")
    (tmp_path / "dies.py").write_text("import os; os._exit(9)")
    found = Packages(tmp_path, "do this")
    assert missing(found, "json", "lacks_one", "raises", "talks") == (
        "lacks_one cannot be imported (No module named 'a_package_that_is_not_there'); "
        "raises cannot be imported (ValueError: injected); do this"
    )
    assert missing(found, "talks", "dies") == "dies ends Python with code 9; do this"


def test_a_package_is_tried_once(tmp_path: Path) -> None:
    (tmp_path / "counts.py").write_text(f"open({str(tmp_path / 'count')!r}, 'a').write('x')")
    found = Packages(tmp_path)
    assert [missing(found, "counts", each) for each in ("json", "zlib")] == ["", ""]
    assert (tmp_path / "count").read_text() == "x"


def test_stopping_does_not_wait_for_an_import(tmp_path: Path) -> None:
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)")
    stop = Event()
    stop.set()
    found = Packages(tmp_path)
    assert found.explain_missing(["sleeps"], found.environment(), stop)


def test_the_project_can_be_imported_too() -> None:
    assert Packages().environment()["PYTHONPATH"].split(os.pathsep)[0] == os.getcwd()
