"""A logger of what is selected, for your own loop under Accelerate."""

from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch.optim import Optimizer

from dion2_lightning.algorithms.hyperparameters import described
from dion2_lightning.integrations.selection import SelectionRecorder
from dion2_lightning.monitoring.metrics import SelectionMetrics
from dion2_lightning.monitoring.tracker import check_steps, without_wrapper


@described(SelectionRecorder)
@dataclass(eq=False, repr=False)
class SelectionLogger(SelectionRecorder):
    """Log what Dion2 selects, to every tracker of Accelerate: ``dion2/coverage``, ``dion2/<group>/coverage``, ...

    :class:`~dion2_lightning.SelectionMetrics` defines the metrics. ``accelerator.save_state`` and ``load_state`` save
    and load the state with everything else. Every rank must make it and call it alike.

    Args:
        accelerator: Its trackers get the metrics, and ``save_to=True`` is its ``project_dir``.
        optimizer: A :class:`~dion2_lightning.Dion2`, prepared or not.
        every: Steps of the optimizer between metrics (default: 10).
        **settings: The fields of :class:`SelectionRecorder`.

    Raises:
        ImportError: ``pictures`` needs matplotlib, which is missing.
        TypeError: An argument has the wrong type.
        ValueError: ``every`` or ``window`` is under 1, the optimizer is no Dion2, or ``save_to`` is no local folder.

    Example::

        with SelectionLogger(accelerator, optimizer) as selection:
            for batch in loader:
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                selection.log()
    """

    _log = "accelerate"

    accelerator: Accelerator
    optimizer: Optimizer
    every: int = field(default=10, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments, attach to the optimizer, and register for checkpoints."""
        check_steps("every", self.every)
        super().__post_init__()
        self.tracker.every = self.every
        self._step: int | None = None
        self._path = self._path_in(self.accelerator.project_dir)
        self._attach([self.optimizer])
        self._register()

    def log(self, step: int | None = None) -> SelectionMetrics | None:
        """Log the metrics of the optimizer's last step, if it has some. Call it after every batch, on every rank.

        Args:
            step: Step that they are logged under (default: None, the steps that the optimizer has taken).

        Returns:
            The metrics, for a progress bar; None where there are none.

        Raises:
            RuntimeError: It was closed, or replaced as the optimizer's observer.
        """
        if not self.tracker.is_attached:
            raise RuntimeError(
                f"{self.tracker.name}: it was closed, or another observer has replaced it at the optimizer; call "
                "log() of the newest one"
            )
        self._step = step
        metrics = self.tracker.pop_metrics()
        if metrics is not None:
            named = metrics.named(per_matrix=self.per_matrix)
            self.accelerator.log(named, step=metrics.step if step is None else step)
        return metrics

    def close(self) -> None:
        """Save the history and pictures, and detach; before ``end_training``, while trackers are open.

        If it was closed or replaced before, it does nothing.
        """
        if not self.tracker.is_attached:
            return
        self.tracker.detach()
        if self.accelerator.is_main_process:
            step = self.tracker.step if self._step is None else self._step
            self._finish(self.accelerator.trackers, step)

    def __enter__(self) -> "SelectionLogger":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        """Close it; after an exception without pictures, which take time and may fail in turn."""
        if exception is None:
            self.close()
        else:
            self._save_history()
            self.tracker.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the tracker's state, and save the history; ``save_state`` calls this on every rank."""
        self._save_history()
        return self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there; ``load_state`` calls this."""
        self.tracker.load_state_dict(state_dict)

    def _register(self) -> None:
        """Register for checkpoints, in the place of those that an earlier try has left.

        They are of the same optimizer, or closed and of one that the accelerator has let go of, as it does after a try
        that ran out of memory. A checkpoint has to hold as many objects as the run that loads it.
        """
        objects, optimizer = self.accelerator._custom_objects, without_wrapper(self.optimizer)
        prepared = [without_wrapper(each) for each in self.accelerator._optimizers]

        def is_left(other: object) -> bool:
            if not isinstance(other, SelectionLogger):
                return False
            its = without_wrapper(other.optimizer)
            return its is optimizer or not (other.tracker.is_attached or any(its is each for each in prepared))

        left = [other for other in objects if is_left(other)]
        if not left:
            self.accelerator.register_for_checkpointing(self)
            return
        objects[:] = [self if each is left[0] else each for each in objects if not any(each is it for it in left[1:])]

    def _save_history(self) -> None:
        # A closed one has saved its history, and another one may save to the same place by now.
        if self.accelerator.is_main_process and self.tracker.is_attached:
            self._save()
