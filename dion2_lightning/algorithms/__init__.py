"""One file for each algorithm, what all of them have in common, and the table of them."""

from typing import Final

from dion2_lightning.algorithms.adamw import AdamWAlgorithm
from dion2_lightning.algorithms.algorithm import Algorithm
from dion2_lightning.algorithms.dion2 import Dion2Algorithm

ALGORITHMS: Final[dict[str, Algorithm]] = {each.name: each for each in (Dion2Algorithm(), AdamWAlgorithm())}
"""The algorithms by the names that a group's ``algorithm`` takes."""
