"""What the callbacks of all frameworks have in common: attaching a tracker, the file of its history, and pictures."""

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from dion2_lightning.monitoring.tracker import (
    SelectionTracker,
    SelectionWarning,
    check_bool,
    is_first_rank,
    without_wrapper,
)
from dion2_lightning.optimizer import MatrixOptimizer

FILE_NAME: Final = "dion2_selection.json"
"""Name of the file with a run's history, unless ``save_to`` gives it another."""


class SelectionRecorder:
    """The tracker of one training, the file of its history, and pictures of it.

    Args:
        name: Name of the callback, for messages.
        log: Name of the logger by which the framework tells its user where files are.
        tracker: Tracker of the first training.
        per_matrix: Whether metrics are logged for every parameter.
        save_to: A folder, a file whose name ends in ``.json``, True for the framework's folder, or False for none.
        pictures: Whether pictures are made when training ends.

    Attributes:
        tracker: Tracker of the training that runs or ran last.

    Raises:
        ImportError: ``pictures`` needs matplotlib, which is missing.
        TypeError: An argument has the wrong type.
    """

    def __init__(
        self,
        name: str,
        log: str,
        tracker: SelectionTracker,
        per_matrix: bool,
        save_to: str | Path | bool,
        pictures: bool,
    ) -> None:
        check_bool("per_matrix", per_matrix)
        check_bool("pictures", pictures)
        if not isinstance(save_to, str | Path | bool):
            raise TypeError(f"save_to must be a folder, a file, True or False, got {save_to!r}")
        if pictures:
            import dion2_lightning.monitoring.plots  # noqa: F401 - fails at once if matplotlib is missing
        self.name, self.log, self.tracker = name, log, tracker
        self.per_matrix, self.save_to, self.pictures = per_matrix, save_to, pictures
        self._announced: Path | None = None
        tracker.name = name

    def restart(self) -> None:
        """Make a new tracker, for another training."""
        old = self.tracker
        old.detach()
        self.tracker = SelectionTracker(every=old.every, window=old.window, orthogonality=old.orthogonality)
        self.tracker.name = self.name
        self._announced = None

    def attach(self, optimizers: Iterable[Any]) -> None:
        """Attach the tracker to the one Dion2 among a training's optimizers.

        Raises:
            ValueError: There is none, or several.
        """
        unwrapped = [without_wrapper(optimizer) for optimizer in optimizers]
        found = [optimizer for optimizer in unwrapped if isinstance(optimizer, MatrixOptimizer)]
        if not found:
            others = ", ".join(type(optimizer).__name__ for optimizer in unwrapped) or "none at all"
            raise ValueError(
                f"{self.name}: no Dion2 optimizer; found {others}. Make it with "
                "dion2_lightning.build_optimizer(model, lr=...), or leave the callback out"
            )
        if len(found) > 1:
            raise ValueError(
                f"{self.name}: tracks one Dion2 optimizer, found {len(found)}; leave it out, and attach a "
                "dion2_lightning.SelectionTracker to each"
            )
        if not found[0].sliced_parameters():
            message = f"{self.name}: the optimizer selects from no parameter, so there is nothing to show"
            warnings.warn(message, SelectionWarning, stacklevel=2)
        self.tracker.attach(found[0])

    def path(self, folder: str | Path | None) -> Path | None:
        """Return the path of the history's file; None where it is not to be saved.

        Args:
            folder: The framework's. If it is no local folder, nothing is saved, and a warning says so.

        Raises:
            ValueError: ``save_to`` is no local folder.
        """
        chosen = folder if self.save_to is True else self.save_to
        if chosen is None or chosen is False:
            return None
        if "://" not in str(chosen):
            path = Path(str(chosen))
            return path if path.suffix == ".json" else path / FILE_NAME
        reason = f"{str(chosen)!r}, which is no local folder; pass one, or save_to=False"
        if self.save_to is not True:
            raise ValueError(f"{self.name}: save_to is {reason}")
        if is_first_rank():
            message = f"{self.name}: the history is not saved, because save_to=True is {reason}"
            warnings.warn(message, SelectionWarning, stacklevel=2)
        return None

    def save(self, path: Path | None) -> None:
        """Save the history, if it has metrics, and log where it is; called on one rank."""
        if path is not None and len(self.tracker.history) > 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.tracker.history.save(path)
            if path != self._announced:
                logging.getLogger(self.log).info("%s: the history of the selection is in %s", self.name, path)
                self._announced = path

    def finish(self, path: Path | None, loggers: Iterable[Any], step: int) -> None:
        """Save the history; if asked for, save pictures beside it and send them to loggers. Called on one rank.

        Args:
            path: Path of the history's file.
            loggers: See :func:`~dion2_lightning.monitoring.plots.log_pictures`.
            step: Step that pictures are logged under.
        """
        self.save(path)
        history = self.tracker.history
        if not self.pictures or not len(history):
            return
        from dion2_lightning.monitoring.plots import log_pictures, save_pictures

        if path is not None:
            save_pictures(history, path.parent / "pictures")
        if not log_pictures(history, loggers, step) and path is None:
            message = (
                f"{self.name}: no pictures were made, because the history has no file and no logger takes images; pass "
                "save_to=, or call save_pictures(callback.tracker.history, folder)"
            )
            warnings.warn(message, SelectionWarning, stacklevel=2)
