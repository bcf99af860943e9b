"""Tests that cannot be collected, for the check that runs tests on a GPU."""

import a_package_that_is_not_there  # type: ignore[import-not-found]


def test_of_it() -> None:
    assert a_package_that_is_not_there
