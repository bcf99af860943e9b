"""Sections for the tests of the check: some pass, others fail in several ways."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.section import Options, Row


def fine(options: Options, *, number: int = 1) -> Iterator[Row]:
    (options.folder / "left behind").touch()
    yield {"what": "a number", "found": number, "ok": True}


def wrong(options: Options) -> Iterator[Row]:
    yield {"what": "the first", "ok": False}
    yield {"what": "the second", "ok": True}


def raises(options: Options) -> Iterator[Row]:
    yield {"what": "before", "ok": True}
    raise ValueError("injected")


def dies(options: Options) -> Iterator[Row]:
    yield {"what": "before", "ok": True}
    os._exit(9)


def takes_too_long(options: Options) -> Iterator[Row]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield {"what": "before", "ok": True}
    write_process_id(options, child.pid)
    time.sleep(60)


def waits(options: Options) -> Iterator[Row]:
    write_process_id(options, os.getpid())
    time.sleep(60)
    yield {}


def sees_no_earlier_files(options: Options) -> Iterator[Row]:
    yield {"what": "left by an earlier check", "ok": not (options.folder.parent / "shared").exists()}


def write_process_id(options: Options, process: int) -> None:
    unfinished = Path(options.results).with_name("unfinished")
    unfinished.write_text(str(process))
    unfinished.rename(unfinished.with_name(f"process of {options.section}"))
