"""What the callbacks of all frameworks have in common: whom they look at, when, and in which file it is kept."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from dion2_lightning.figures import Figures
from dion2_lightning.optimizer import Dion2
from dion2_lightning.statistics import SelectionStatistics, SelectionWarning, check_truth, without_wrapper

FILE_NAME: Final = "dion2_selection.json"
"""What the file of a run's history is called, unless ``save_to`` gives it a name."""


class SelectionRecorder:
    """The statistics of one training, and the file of their history.

    Args:
        owner: Name of the callback that an error is about.
        statistics: Of the first training.
        per_matrix: Whether figures have names for every parameter.
        save_to: A folder, a file whose name ends in ``.json``, True for the framework's folder, or False for none.

    Attributes:
        statistics: Of the training that runs or ran last.

    Raises:
        TypeError: An argument has the wrong type.
    """

    def __init__(
        self, owner: str, statistics: SelectionStatistics, *, per_matrix: bool, save_to: str | Path | bool
    ) -> None:
        check_truth("per_matrix", per_matrix)
        if not isinstance(save_to, str | Path | bool):
            raise TypeError(f"save_to must be a folder, a file, True or False, got {save_to!r}")
        self.owner, self.statistics, self.per_matrix, self.save_to = owner, statistics, per_matrix, save_to

    def restart(self) -> None:
        """Begin anew, for another training."""
        self.statistics.detach()
        before = self.statistics
        self.statistics = SelectionStatistics(
            every=before.every, window=before.window, orthogonality=before.orthogonality
        )

    def attach(self, optimizers: Iterable[Any]) -> None:
        """Look on at the one Dion2 among a training's optimizers.

        Raises:
            ValueError: There is none, or several.
        """
        unwrapped = [without_wrapper(optimizer) for optimizer in optimizers]
        found = [optimizer for optimizer in unwrapped if isinstance(optimizer, Dion2)]
        if not found:
            others = ", ".join(type(optimizer).__name__ for optimizer in unwrapped) or "none at all"
            raise ValueError(
                f"{self.owner}: no Dion2 optimizer; found {others}. Make it with "
                "dion2_lightning.build_optimizer(model, lr=...), or leave the callback out"
            )
        if len(found) > 1:
            raise ValueError(
                f"{self.owner}: looks on at one Dion2 optimizer, found {len(found)}; leave it out, and attach a "
                "dion2_lightning.SelectionStatistics to each"
            )
        if not any(group["algorithm"] == "dion2" for group in found[0].param_groups):
            message = f"{self.owner}: no group of the optimizer has algorithm 'dion2', so there is nothing to show"
            warnings.warn(message, SelectionWarning, stacklevel=2)
        self.statistics.attach(found[0])

    def named(self, figures: Figures) -> dict[str, float]:
        """Return figures by the names that loggers get."""
        return figures.named(per_matrix=self.per_matrix)

    def path(self, folder: str | Path | None) -> Path | None:
        """Return the file for the history, if any.

        Args:
            folder: The framework's.

        Raises:
            ValueError: It is not on this machine's file system.
        """
        chosen = folder if self.save_to is True else self.save_to
        if chosen is None or chosen is False:
            return None
        if "://" in str(chosen):
            raise ValueError(
                f"{self.owner}: save_to would be {str(chosen)!r}, which is no local folder; pass one, or save_to=False"
            )
        path = Path(str(chosen))
        return path if path.suffix == ".json" else path / FILE_NAME

    def save(self, path: Path | None) -> None:
        """Write the history, once it holds something. For one rank."""
        if path is not None and len(self.statistics.history) > 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.statistics.history.save(path)
