"""``check_finite="skip"`` on the device, as tests/test_skipped_steps.py has it on the CPU."""

import pytest

from tests.test_skipped_steps import PARAMETERS, check_bad_gradient, check_good_gradients


def test_good_gradients(device: str) -> None:
    check_good_gradients(device)


@pytest.mark.parametrize("index", [0, PARAMETERS - 1])
def test_a_bad_gradient(index: int, device: str) -> None:
    check_bad_gradient(index, 1, device)
