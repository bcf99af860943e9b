"""What the callbacks of all frameworks have in common: arguments, a tracker, the file of its history, and pictures."""

import logging
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from dion2_lightning.algorithms.hyperparameters import check_values, checks_of, described, setting
from dion2_lightning.distributed.collectives import is_first_rank
from dion2_lightning.monitoring.tracker import (
    SelectionTracker,
    SelectionWarning,
    check_steps,
    without_wrapper,
)
from dion2_lightning.optimizer import MatrixOptimizer

FILE_NAME: Final = "dion2_selection.json"
"""Name of the file with a run's history, unless ``save_to`` gives it another."""


def _check_place(name: str, value: object) -> None:
    if not isinstance(value, str | Path | bool):
        raise TypeError(f"{name} must be a folder, a file, True or False, got {value!r}")


@dataclass(kw_only=True, eq=False, repr=False)
class SelectionRecorder:
    """The arguments that all callbacks take, and what they do alike. A framework's callback inherits it.

    Args:
        **settings: As follows.

    Attributes:
        tracker: Counts what is selected, and holds the history; every training from the start has a new one.
    """

    window: int = setting(100, "Steps that ``coverage`` looks back.", check_steps)
    per_matrix: bool = setting(False, "Also log each parameter, as ``dion2/<group>/<parameter>/coverage``.")
    orthogonality: bool = setting(False, "Also measure how far updates are from orthonormal.")
    save_to: str | Path | bool = setting(
        True,
        "Where the history is saved, with every checkpoint and at the end: a folder, or a file ending in ``.json``. "
        "True: the framework's folder of this run, if it has one; False: nowhere.",
        _check_place,
    )
    pictures: bool = setting(
        False,
        "At the end, save pictures of the history in a folder ``pictures`` beside it, and send some of them to loggers "
        "that take images, as TensorBoard's and W&B's do; needs matplotlib.",
    )

    # Name of the logger by which the framework tells its user where files are.
    _log: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_values(vars(self), checks_of(SelectionRecorder))
        if self.pictures:
            import dion2_lightning.monitoring.plots  # noqa: F401 - fails at once if matplotlib is missing
        self.tracker = self._new_tracker()
        self._path: Path | None = None
        self._announced: Path | None = None

    def _new_tracker(self) -> SelectionTracker:
        tracker = SelectionTracker(every=None, window=self.window, orthogonality=self.orthogonality)
        tracker.name = type(self).__name__
        return tracker

    def _restart(self) -> None:
        """Make a new tracker, for another training."""
        self.tracker.detach()
        self.tracker = self._new_tracker()
        self._announced = None

    def _attach(self, optimizers: Iterable[Any]) -> None:
        """Attach the tracker to the one Dion2 among a training's optimizers."""
        unwrapped = [without_wrapper(optimizer) for optimizer in optimizers]
        found = [optimizer for optimizer in unwrapped if isinstance(optimizer, MatrixOptimizer)]
        name = self.tracker.name
        if not found:
            others = ", ".join(type(optimizer).__name__ for optimizer in unwrapped) or "none at all"
            raise ValueError(
                f"{name}: no Dion2 optimizer; found {others}. Make it with "
                "dion2_lightning.build_optimizer(model, lr=...), or leave the callback out"
            )
        if len(found) > 1:
            raise ValueError(
                f"{name}: tracks one Dion2 optimizer, found {len(found)}; leave it out, and attach a "
                "dion2_lightning.SelectionTracker to each"
            )
        if not found[0].observed_parameters():
            message = f"{name}: no algorithm of the optimizer has metrics, so there is nothing to show"
            warnings.warn(message, SelectionWarning, stacklevel=2)
        self.tracker.attach(found[0])

    def _path_in(self, folder: str | Path | None) -> Path | None:
        """Return the path of the history's file, by default in the framework's folder; None where it is not saved."""
        chosen = folder if self.save_to is True else self.save_to
        if chosen is None or chosen is False:
            return None
        if "://" not in str(chosen):
            path = Path(str(chosen))
            path = path if path.suffix == ".json" else path / FILE_NAME
            self._refuse_unwritable(path)
            return path
        reason = f"{str(chosen)!r}, which is no local folder; pass one, or save_to=False"
        if self.save_to is not True:
            raise ValueError(f"{self.tracker.name}: save_to is {reason}")
        if is_first_rank():
            message = f"{self.tracker.name}: the history is not saved, because save_to=True is {reason}"
            warnings.warn(message, SelectionWarning, stacklevel=2)
        return None

    def _refuse_unwritable(self, path: Path) -> None:
        """Find out before the training that the first rank, which saves it, cannot save the history."""
        if not is_first_rank():
            return
        folder = next(each for each in path.absolute().parents if each.exists())
        if path.is_dir():
            problem = f"{str(path)!r} is a folder"
        elif not folder.is_dir():
            problem = f"{str(folder)!r} is a file"
        elif not os.access(folder, os.W_OK):
            problem = f"{str(folder)!r} is not writable"
        else:
            return
        raise ValueError(
            f"{self.tracker.name}: save_to: the history cannot be saved as {str(path)!r}, because {problem}; pass "
            "another folder, a file that ends in .json, or save_to=False"
        )

    def _save(self) -> None:
        """Save the history, if it has metrics, and log where it is; called on one rank."""
        path = self._path
        if path is not None and len(self.tracker.history) > 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.tracker.history.save(path)
            if path != self._announced:
                logging.getLogger(self._log).info("%s: the history of the selection is in %s", self.tracker.name, path)
                self._announced = path

    def _finish(self, loggers: Iterable[Any], step: int) -> None:
        """Save the history; if asked for, save pictures beside it and send them to loggers. Called on one rank."""
        self._save()
        history = self.tracker.history
        if not self.pictures or not len(history):
            return
        from dion2_lightning.monitoring.plots import log_pictures, save_pictures

        if self._path is not None:
            save_pictures(history, self._path.parent / "pictures")
        if not log_pictures(history, loggers, step) and self._path is None:
            message = (
                f"{self.tracker.name}: no pictures were made, because the history has no file and no logger takes "
                "images; pass save_to=, or call save_pictures(callback.tracker.history, folder)"
            )
            warnings.warn(message, SelectionWarning, stacklevel=2)


described(SelectionRecorder)(SelectionRecorder)
