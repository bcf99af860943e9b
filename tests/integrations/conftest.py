"""What every test of a framework needs."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test() -> Iterator[None]:
    """All Accelerators of a process share one state, the Trainer's too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
