"""A real browser, headless, for pages on disk."""

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.image
import numpy as np
import pytest


def check_shown(page: Path, screenshot: Path) -> None:
    """Open a page in the browser: no strip of the screenshot is blank, and the console is empty."""
    width, height, strips = 1200, 2400, 12
    result = browse(page, f"--window-size={width},{height}", f"--screenshot={screenshot}")
    assert "CONSOLE" not in result.stderr
    pixels = matplotlib.image.imread(screenshot)
    assert pixels.shape[:2] == (height, width)
    for strip in np.split(pixels[..., :3], strips):
        assert strip.std() > 0.02


def _browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        path = shutil.which(name)
        # Some distributions have a script of that name that only says how to install it.
        if path is not None and subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0:
            return path
    pytest.skip("no Chromium or Chrome on this machine that runs: apt-get install chromium")


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page from disk in a fresh profile; skip the test where there is no browser."""
    quiet = "--disable-background-networking --disable-component-update --disable-sync --no-first-run --disable-quic"
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *quiet.split()]
        # The page's console is printed to stderr, each message after CONSOLE.
        command += ["--enable-logging=stderr", f"--user-data-dir={profile}", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
