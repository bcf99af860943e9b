"""The device of these tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """What the tests run on, "cpu" or "cuda"."""
    chosen: str = pytestconfig.getoption("device")
    return chosen


@pytest.fixture
def gpu(device: str) -> str:
    """The same, but skip the test on a CPU."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture
def deterministic_mode_is_restored() -> Iterator[None]:
    """Restore torch's deterministic mode after the test."""
    before = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(before)
