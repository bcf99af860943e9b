"""One file for each algorithm, what all of them have in common, and here the tables of them.

A new algorithm is a file, a line in :data:`ALGORITHMS`, and, for ``build_optimizer``, its settings among those of
:class:`EverySetting`, and a line in :data:`CHOICES` with its name in :data:`ChoiceName`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from dion2_lightning.algorithms.adamw import AdamWAlgorithm, AdamWSettings
from dion2_lightning.algorithms.algorithm import Algorithm
from dion2_lightning.algorithms.dion import DionAlgorithm, DionSettings
from dion2_lightning.algorithms.dion2 import Dion2Algorithm, Dion2Settings
from dion2_lightning.algorithms.dion3 import Dion3Algorithm

ALGORITHMS: Final[dict[str, Algorithm]] = {
    each.name: each for each in (Dion2Algorithm(), Dion3Algorithm(), DionAlgorithm(), AdamWAlgorithm())
}
"""The algorithms by the names that a group's ``algorithm`` takes."""

DEFAULT_MATRICES: Final = Dion2Algorithm.name
"""What trains the matrices of a model where nothing else is said."""

DEFAULT_REST: Final = AdamWAlgorithm.name
"""What trains everything else."""


ChoiceName = Literal["dion2", "dion3", "dion", "muon", "normuon", "adamw"]
"""The names in :data:`CHOICES`."""


class Choice(NamedTuple):
    """One value of build_optimizer's ``algorithm``.

    Attributes:
        headline: First line of the report.
        matrices: The algorithm of the matrices; everything else is updated by AdamW.
        settings: What it sets.
        control: Whether AdamW updates the matrices too.
    """

    headline: str
    matrices: str
    settings: Mapping[str, Any]
    control: bool = False


CHOICES: Final = {
    "dion2": Choice("Dion2 and AdamW", "dion2", {}),
    "dion3": Choice("Dion3 and AdamW", "dion3", {}),
    "dion": Choice("Dion and AdamW", "dion", {}),
    "muon": Choice("Muon (dion2 groups at fraction 1) and AdamW", "dion2", {"fraction": 1.0}),
    "normuon": Choice(
        "NorMuon (dion2 groups at fraction 1 with normalize_neurons) and AdamW",
        "dion2",
        {"fraction": 1.0, "normalize_neurons": True},
    ),
    "adamw": Choice("AdamW (dion2 groups too)", "dion2", {}, control=True),
}
"""The values of build_optimizer's ``algorithm``."""


@dataclass(kw_only=True)
class EverySetting(AdamWSettings, DionSettings, Dion2Settings):
    """The settings of all algorithms. What several have is the same setting: the same type, default and check."""


def has_setting(algorithm: str, name: str) -> bool:
    """Return whether groups of an algorithm take an entry: its own settings, and what is no algorithm's."""
    return name in ALGORITHMS[algorithm].defaults() or not algorithms_with(name)


def algorithms_with(setting: str) -> list[str]:
    """Return the names of the algorithms that have a setting."""
    return [name for name, algorithm in ALGORITHMS.items() if setting in algorithm.defaults()]
