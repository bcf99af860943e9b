"""Processes that the check starts: waiting for them, and ending them with all that they started."""

import os
import signal
import subprocess
import time
from threading import Event

GRACE = 5.0
"""Seconds between asking a process to end and ending it."""


def wait_for(process: "subprocess.Popen[bytes]", seconds: float, ending: Event) -> int | None:
    """Return the code that a process ends with; None where its time is up before, or it is to be ended.

    Args:
        process: What to wait for.
        seconds: How long.
        ending: Set when the process is to be ended.
    """
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline or ending.wait(0.05):
            return None
    return process.returncode


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those that it started: all of the session that was made for it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + GRACE
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()
