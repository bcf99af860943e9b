"""What holds for all tests of the algorithms."""

import pytest

from dion2_lightning.kernels import estimated_norms


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the matrices here, which are small, as large ones."""
    monkeypatch.setattr(estimated_norms, "MIN_ESTIMATED", 1)
