"""A test file that cannot be imported, for the tests of the GPU check."""

import a_package_that_is_not_there  # type: ignore[import-not-found]


def test_of_it() -> None:
    assert a_package_that_is_not_there
