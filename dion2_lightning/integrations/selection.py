"""What the callbacks of all frameworks have in common: whom they look at, in which file it is kept, and pictures."""

import logging
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from dion2_lightning.factory import Dion2
from dion2_lightning.monitoring.metrics import Figures
from dion2_lightning.monitoring.tracker import (
    SelectionStatistics,
    SelectionWarning,
    check_truth,
    is_first_rank,
    without_wrapper,
)

FILE_NAME: Final = "dion2_selection.json"
"""What the file of a run's history is called, unless ``save_to`` gives it a name."""


class SelectionRecorder:
    """The statistics of one training, the file of their history, and pictures of it.

    Args:
        name: Of the callback, which errors are about.
        statistics: Of the first training.
        is_running: Says whether the callback's training goes on.
        log: Name of the logger that the framework tells its user through where files go.
        per_matrix: Whether figures have names for every parameter.
        save_to: A folder, a file whose name ends in ``.json``, True for the framework's folder, or False for none.
        pictures: Whether there are pictures when training ends.

    Attributes:
        statistics: Of the training that runs or ran last.

    Raises:
        ImportError: Pictures are wanted, and matplotlib is missing.
        TypeError: An argument has the wrong type.
    """

    def __init__(
        self,
        name: str,
        statistics: SelectionStatistics,
        *,
        is_running: Callable[[], bool],
        log: str,
        per_matrix: bool,
        save_to: str | Path | bool,
        pictures: bool,
    ) -> None:
        check_truth("per_matrix", per_matrix)
        check_truth("pictures", pictures)
        if not isinstance(save_to, str | Path | bool):
            raise TypeError(f"save_to must be a folder, a file, True or False, got {save_to!r}")
        if pictures:
            import_module("dion2_lightning.monitoring.plots")  # says at once if matplotlib is missing
        self.name, self.statistics, self.is_running, self.log = name, statistics, is_running, log
        self.per_matrix, self.save_to, self.pictures = per_matrix, save_to, pictures
        self._said: Path | None = None
        statistics.owner = self

    def restart(self) -> None:
        """Begin anew, for another training."""
        self.statistics.detach()
        before = self.statistics
        self.statistics = SelectionStatistics(
            every=before.every, window=before.window, orthogonality=before.orthogonality
        )
        self.statistics.owner = self
        self._said = None

    def attach(self, optimizers: Iterable[Any]) -> None:
        """Look on at the one Dion2 among a training's optimizers.

        Raises:
            RuntimeError: Another callback, whose training is running, or other statistics look on at it.
            ValueError: There is none, or several.
        """
        unwrapped = [without_wrapper(optimizer) for optimizer in optimizers]
        found = [optimizer for optimizer in unwrapped if isinstance(optimizer, Dion2)]
        if not found:
            others = ", ".join(type(optimizer).__name__ for optimizer in unwrapped) or "none at all"
            raise ValueError(
                f"{self.name}: no Dion2 optimizer; found {others}. Make it with "
                "dion2_lightning.build_optimizer(model, lr=...), or leave the callback out"
            )
        if len(found) > 1:
            raise ValueError(
                f"{self.name}: looks on at one Dion2 optimizer, found {len(found)}; leave it out, and attach a "
                "dion2_lightning.SelectionStatistics to each"
            )
        if not any(group["algorithm"] == "dion2" for group in found[0].param_groups):
            message = f"{self.name}: no group of the optimizer has algorithm 'dion2', so there is nothing to show"
            warnings.warn(message, SelectionWarning, stacklevel=2)
        self.statistics.attach(found[0])

    def named(self, figures: Figures) -> dict[str, float]:
        """Return figures by the names that loggers get."""
        return figures.named(per_matrix=self.per_matrix)

    def path(self, folder: str | Path | None) -> Path | None:
        """Return the file for the history, if any.

        Args:
            folder: The framework's. Where that is not on this machine's file system, there is no file, and a warning
                says so.

        Raises:
            ValueError: ``save_to`` is not on this machine's file system.
        """
        chosen = folder if self.save_to is True else self.save_to
        if chosen is None or chosen is False:
            return None
        if "://" in str(chosen):
            if self.save_to is not True:
                raise ValueError(
                    f"{self.name}: save_to is {str(chosen)!r}, which is no local folder; pass one, or save_to=False"
                )
            message = (
                f"{self.name}: the history is written nowhere, for save_to=True is {str(chosen)!r}, which is no local "
                "folder; pass one, or save_to=False"
            )
            if is_first_rank():
                warnings.warn(message, SelectionWarning, stacklevel=2)
            return None
        path = Path(str(chosen))
        return path if path.suffix == ".json" else path / FILE_NAME

    def save(self, path: Path | None) -> None:
        """Write the history, once it holds something, and say where. For one rank."""
        if path is not None and len(self.statistics.history) > 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.statistics.history.save(path)
            if path != self._said:
                logging.getLogger(self.log).info("%s: the history of what is selected is in %s", self.name, path)
                self._said = path

    def finish(self, path: Path | None, loggers: Iterable[Any], step: int) -> None:
        """Write the history; where pictures are wanted, write them beside it and send them to loggers. For one rank.

        Args:
            path: Of the history.
            loggers: See :func:`~dion2_lightning.monitoring.plots.log_pictures`.
            step: Step that pictures are logged under.
        """
        self.save(path)
        history = self.statistics.history
        if not self.pictures or not len(history):
            return
        from dion2_lightning.monitoring.plots import log_pictures, save_pictures

        if path is not None:
            save_pictures(history, path.parent / "pictures")
        if not log_pictures(history, loggers, step) and path is None:
            message = (
                f"{self.name}: there are no pictures, for the history has no file and no logger takes images; pass "
                "save_to=, or save_pictures(callback.statistics.history, folder) by hand"
            )
            warnings.warn(message, SelectionWarning, stacklevel=2)
