"""Learning-rate rules by hand."""

import math

import pytest

from dion2_lightning.algorithms.learning_rates import update_scale


@pytest.mark.parametrize(
    ("rule", "wide", "tall"),
    [
        ("match_rms_adamw", 0.2 * 4, 0.2 * 4),
        ("original", 1.0, 2.0),
        (None, 1.0, 2.0),
        ("spectral", 0.5, 2.0),
        ("none", 1.0, 1.0),
    ],
)
def test_rules(rule, wide, tall):
    assert update_scale((4, 16), 4, 4, rule, True) == pytest.approx(wide)
    assert update_scale((16, 4), 4, 4, rule, True) == pytest.approx(tall)


def test_fraction_is_made_up_for_by_what_was_really_selected():
    """sqrt(n / k) with k = 3 of 10, not sqrt(1 / 0.25)."""
    assert update_scale((10, 10), 10, 3, "none", True) == pytest.approx(math.sqrt(10 / 3))
    assert update_scale((10, 10), 10, 3, "none", False) == 1.0
