"""Waits for processes that the check starts, and ends them with their child processes."""

import os
import signal
import subprocess
import time
from threading import Event

GRACE = 5.0
"""Seconds between asking a process to end and killing it."""


def wait_for(process: "subprocess.Popen[bytes]", seconds: float, stop: Event) -> int | None:
    """Return the exit code of a process; None if its time is up first, or ``stop`` is set.

    Args:
        process: What to wait for.
        seconds: Time limit.
        stop: Set to stop waiting.
    """
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline or stop.wait(0.05):
            return None
    return process.returncode


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and its child processes: all of the session that was made for it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + GRACE
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()
