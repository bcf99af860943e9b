"""A test file that skips itself, for the tests of the GPU check."""

import pytest

pytest.skip("needs something else", allow_module_level=True)
