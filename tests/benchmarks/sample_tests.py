"""Tests that pass, fail, are skipped, take too long or end their process, for the tests of the GPU check."""

import os
import time

import pytest


@pytest.mark.parametrize("number", [1, 2, 3])
def test_fine(number: int, pytestconfig: pytest.Config) -> None:
    time.sleep(0.1)
    assert pytestconfig.getoption("device") == "cpu"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_of_three(number: int) -> None:
    assert number != 2, "two is wrong"


def test_for_a_gpu() -> None:
    pytest.skip("needs a GPU")


@pytest.mark.parametrize("dies", [False, True])
def test_the_process_dies(dies: bool) -> None:
    if dies:
        os._exit(3)


@pytest.mark.timeout(2)
def test_takes_too_long() -> None:
    time.sleep(60)
