"""What holds for all tests of the algorithms."""

import pytest

from dion2_lightning.kernels import selection


@pytest.fixture(autouse=True)
def estimates_of_small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have estimates decide where they otherwise would not pay, as the matrices here are small."""
    monkeypatch.setattr(selection, "MIN_ESTIMATED", 1)
