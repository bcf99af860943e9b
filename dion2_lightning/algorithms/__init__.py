"""One file for each algorithm, what all of them have in common, and the table of them."""

from typing import Final

from dion2_lightning.algorithms.adamw import AdamWAlgorithm
from dion2_lightning.algorithms.algorithm import Algorithm
from dion2_lightning.algorithms.dion2 import Dion2Algorithm

ALGORITHMS: Final[dict[str, Algorithm]] = {each.name: each for each in (Dion2Algorithm(), AdamWAlgorithm())}
"""The algorithms by the names that a group's ``algorithm`` takes."""

DEFAULT_MATRICES: Final = Dion2Algorithm.name
"""What trains the matrices of a model where nothing else is said."""

DEFAULT_REST: Final = AdamWAlgorithm.name
"""What trains everything else."""


def has_setting(algorithm: str, name: str) -> bool:
    """Return whether groups of an algorithm take an entry: its own settings, and what is no algorithm's."""
    return name in ALGORITHMS[algorithm].defaults() or not algorithms_with(name)


def algorithms_with(setting: str) -> list[str]:
    """Return the names of the algorithms that have a setting."""
    return [name for name, algorithm in ALGORITHMS.items() if setting in algorithm.defaults()]
