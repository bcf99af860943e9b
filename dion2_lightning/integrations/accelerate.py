"""What is being selected, in a loop of one's own under Accelerate."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.optim import Optimizer

from dion2_lightning.integrations.selection import SelectionRecorder
from dion2_lightning.monitoring.metrics import Figures
from dion2_lightning.monitoring.tracker import SelectionStatistics, without_wrapper


class SelectionLogger:
    """Log what Dion2 selects, to every tracker: ``dion2/coverage``, ``dion2/<group>/coverage``, ...

    :class:`~dion2_lightning.Figures` says what each figure means. ``accelerator.save_state`` and ``load_state``
    keep the state with everything else. All ranks make it and call it alike.

    Args:
        accelerator: Whose trackers get the figures.
        optimizer: A :class:`~dion2_lightning.Dion2`, prepared or not.
        every: Steps of the optimizer from one set of figures to the next (default: 10).
        window: Steps that ``coverage`` looks back (default: 100).
        per_matrix: Also log every parameter, as ``dion2/<group>/<parameter>/coverage`` (default: False).
        orthogonality: Also measure how far updates are from orthonormal (default: False).
        save_to: Where the history is written when a checkpoint is saved and at :meth:`close`, for plots: a folder, or a
            file ending in ``.json``. True: the accelerator's ``project_dir``, if it has one; False: nowhere
            (default: True).
        pictures: At :meth:`close`, write pictures of the history to a folder ``pictures`` beside it, and send two to
            the trackers that take images, as TensorBoard's and W&B's do; needs matplotlib (default: False).

    Raises:
        ImportError: ``pictures`` needs matplotlib, which is missing.
        RuntimeError: Another callback, whose training is running, looks on at the optimizer.
        TypeError: An argument has the wrong type.
        ValueError: ``every`` or ``window`` is under 1, the optimizer is no Dion2, or ``save_to`` is not on this
            machine.

    Example::

        with SelectionLogger(accelerator, optimizer) as selection:
            for batch in loader:
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                selection.log()
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Optimizer,
        *,
        every: int = 10,
        window: int = 100,
        per_matrix: bool = False,
        orthogonality: bool = False,
        save_to: str | Path | bool = True,
        pictures: bool = False,
    ) -> None:
        statistics = SelectionStatistics(every=every, window=window, orthogonality=orthogonality)
        self._recorder = SelectionRecorder(
            type(self).__name__,
            statistics,
            is_running=self._is_running,
            log="accelerate",
            per_matrix=per_matrix,
            save_to=save_to,
            pictures=pictures,
        )
        self._accelerator = accelerator
        self._is_entered = False
        self._step: int | None = None
        self._path = self._recorder.path(accelerator.project_dir)
        self._recorder.attach([optimizer])
        self._optimizer = without_wrapper(optimizer)
        self._register()

    @property
    def statistics(self) -> SelectionStatistics:
        """What counts, and holds the history."""
        return self._recorder.statistics

    def log(self, step: int | None = None) -> Figures | None:
        """Log the figures of the last step of the optimizer, if it has some. Call it after every batch, on every rank.

        Args:
            step: What trackers log it under (default: None, the steps that the optimizer has taken).

        Returns:
            The figures, for a progress bar; None where there are none.

        Raises:
            RuntimeError: It was closed, or another one has been made for the same optimizer.
        """
        if not self.statistics.is_attached:
            raise RuntimeError(
                f"{self._recorder.name}: looks on no longer, for it was closed, or another callback has been made for "
                "the same optimizer; call log() of that one"
            )
        self._step = step
        figures = self.statistics.take()
        if figures is not None:
            self._accelerator.log(self._recorder.named(figures), step=figures.step if step is None else step)
        return figures

    def close(self) -> None:
        """Write the history and pictures, and look on no longer; while trackers are open: before ``end_training``.

        Closed again, or once another one has taken its place, it does nothing.
        """
        if not self.statistics.is_attached:
            return
        self._detach()
        if self._accelerator.is_main_process:
            step = self.statistics.step if self._step is None else self._step
            self._recorder.finish(self._path, self._accelerator.trackers, step)

    def __enter__(self) -> "SelectionLogger":
        self._is_entered = True
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        """Close it; after an exception without pictures, which take time and may fail in turn."""
        if exception is None:
            self.close()
        else:
            self._save()
            self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the statistics, and write the history; ``save_state`` calls it on every rank."""
        self._save()
        return self.statistics.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; ``load_state`` calls it."""
        self.statistics.load_state_dict(state_dict)

    def _is_running(self) -> bool:
        """Whether it is in use for certain. Without ``with``, an exception in the loop leaves it open for ever."""
        return self._is_entered

    def _register(self) -> None:
        """Take part in checkpoints, in the place of one that looked on at the same optimizer before."""
        objects = self._accelerator._custom_objects
        for place, other in enumerate(objects):
            if isinstance(other, SelectionLogger) and other._optimizer is self._optimizer:
                objects[place] = self
                return
        self._accelerator.register_for_checkpointing(self)

    def _detach(self) -> None:
        self.statistics.detach()
        self._is_entered = False

    def _save(self) -> None:
        # What is closed has been written, and another one may write there now.
        if self._accelerator.is_main_process and self.statistics.is_attached:
            self._recorder.save(self._path)
