"""The update on the device against the reference on the CPU, in float64."""

import itertools
from typing import Any

import pytest

from tests.algorithms.test_dion2 import LARGE_SHAPES, SHAPES, check

FRACTIONS = (0.25, 0.5, 1.0)
CPU_CASES: dict[str, tuple[Any, ...]] = {
    "kind": ("wide", "batched transposed tall"),
    "large_kind": ("tall",),
    "fraction": (0.25,),
}
"""The cases on the CPU, where tests/algorithms/test_dion2.py has all of them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    all_cases = {"kind": tuple(SHAPES), "large_kind": tuple(LARGE_SHAPES), "fraction": FRACTIONS}
    cases = all_cases if metafunc.config.getoption("device") == "cuda" else CPU_CASES
    for name in metafunc.fixturenames:
        if name in cases:
            metafunc.parametrize(name, cases[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_matrices(kind: str, fraction: float, dtype: str, device: str) -> None:
    check(**SHAPES[kind], fraction=fraction, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_with_products_in_half_precision(large_kind: str, fraction: float, dtype: str, device: str) -> None:
    check(**LARGE_SHAPES[large_kind], fraction=fraction, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "settings",
    [
        {"state_dtype": "bfloat16"},
        {"select": "output"},
        {"momentum": 0.5, "weight_decay": 1.0},
        {"algorithm": "dion3"},
        {"fraction": 1.0, "normalize_neurons": True},
        {"normalize_neurons": True, "nesterov": True},
        {"algorithm": "dion3", "nesterov": True, "cautious_weight_decay": True},
        *(
            {"adjust_lr_fn": rule, "scale_lr_by_fraction": scaled}
            for rule, scaled in itertools.product(("original", "spectral", "none"), (True, False))
        ),
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any], device: str) -> None:
    check(**SHAPES["odd tall"], **settings, device=device)
