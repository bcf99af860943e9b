"""What is being selected, in Lightning: a callback that logs it."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from dion2_lightning.integrations.selection import SelectionRecorder
from dion2_lightning.monitoring.metrics import Figures
from dion2_lightning.monitoring.tracker import SelectionStatistics, check_steps, check_truth

if TYPE_CHECKING or find_spec("lightning") is not None:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerStatus
else:  # the same classes, under the package's other name
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.trainer.states import TrainerStatus


class SelectionMonitor(Callback):
    """Log what Dion2 selects, to every logger: ``dion2/coverage``, ``dion2/<group>/coverage``, ...

    :class:`~dion2_lightning.Figures` says what each figure means. They are also in ``trainer.callback_metrics``, for
    ``ModelCheckpoint`` and ``EarlyStopping``. The state goes into checkpoints, so that figures go on where they were.

    Args:
        every: Steps from one set of figures to the next (default: None, the Trainer's ``log_every_n_steps``).
        window: Steps that ``coverage`` looks back (default: 100).
        per_matrix: Also log every parameter, as ``dion2/<group>/<parameter>/coverage`` (default: False).
        orthogonality: Also measure how far updates are from orthonormal (default: False).
        save_to: Where the history is written when a checkpoint is saved and when training ends, for plots: a folder, or
            a file ending in ``.json``. True: where the first logger keeps this run, or Lightning its checkpoints
            (``<save_dir>/<name>/<version>``), if there is a logger; False: nowhere (default: True).
        progress: Show ``coverage`` in the progress bar (default: True).
        pictures: When training ends, write pictures of the history to a folder ``pictures`` beside it, and send two to
            the loggers that take images, as TensorBoard's and W&B's do; needs matplotlib (default: False).

    Attributes:
        figures: The last ones; None before the first.

    Raises:
        ImportError: ``pictures`` needs matplotlib, which is missing.
        RuntimeError: When the fit starts, another callback looks on at the optimizer.
        TypeError: An argument has the wrong type.
        ValueError: ``every`` or ``window`` is under 1; or, when the fit starts, the Trainer has no Dion2 optimizer or
            several, neither ``every`` nor the Trainer says how often to log, or ``save_to`` is not on this machine.

    Example::

        trainer = Trainer(callbacks=[SelectionMonitor()])
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        window: int = 100,
        per_matrix: bool = False,
        orthogonality: bool = False,
        save_to: str | Path | bool = True,
        progress: bool = True,
        pictures: bool = False,
    ) -> None:
        if every is not None:
            check_steps("every", every)
        check_truth("progress", progress)
        statistics = SelectionStatistics(every=None, window=window, orthogonality=orthogonality)
        self._recorder = SelectionRecorder(
            type(self).__name__,
            statistics,
            is_running=self._is_running,
            log=Trainer.__module__.removesuffix(".trainer.trainer"),
            per_matrix=per_matrix,
            save_to=save_to,
            pictures=pictures,
        )
        self.every, self.progress = every, progress
        self.figures: Figures | None = None
        self._interval = 0
        self._path: Path | None = None
        self._trainer: Trainer | None = None

    @property
    def statistics(self) -> SelectionStatistics:
        """What counts, and holds the history; another one after each start of a training."""
        return self._recorder.statistics

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew, unless a fit goes on; under every strategy this comes before a checkpoint is loaded."""
        if stage == "fit" and trainer.global_step == 0:
            self._recorder.restart()
            self.figures = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look on, now that there are optimizers. Sharded strategies load checkpoints after this, others before."""
        self._interval = self.every or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._interval < 1:
            raise ValueError(
                f"{self._recorder.name}: every=None follows the Trainer, whose log_every_n_steps is {self._interval}; "
                "pass every=..."
            )
        self._path = self._recorder.path(_folder(trainer))
        self._recorder.attach(trainer.optimizers)
        self._trainer = trainer

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for figures of the step that is due; under accumulation of the one that ends these batches."""
        if (_step(trainer) + 1) % self._interval == 0:
            self.statistics.ask()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, on the step that the loss of this batch is logged on. Every rank takes part."""
        figures = self.statistics.take()
        if figures is None:
            return
        self.figures = figures
        named = self._recorder.named(figures)
        for logger in trainer.loggers:
            logger.log_metrics(named, step=_step(trainer))
        values = torch.tensor(list(named.values()), device=trainer.strategy.root_device)
        trainer.callback_metrics.update(zip(named, values.unbind(), strict=True))
        if self.progress:
            trainer.progress_bar_metrics["coverage"] = figures.overall["coverage"]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the history."""
        self._save(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the history and pictures, and look on no longer."""
        self.statistics.detach()
        if trainer.is_global_zero:
            last = max(0, _step(trainer) - 1)  # by now it is that of a batch to come
            self._recorder.finish(self._path, trainer.loggers, last)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the history, which is wanted then, and look on no longer: another fit pays nothing."""
        self._save(trainer)
        self.statistics.detach()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the statistics. Lightning calls it on every rank, as stacks of experts need."""
        return self.statistics.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.statistics.load_state_dict(state_dict)

    def _is_running(self) -> bool:
        trainer: Any = self._trainer
        return trainer is not None and trainer.state.status == TrainerStatus.RUNNING and self in trainer.callbacks

    def _save(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self._recorder.save(self._path)


def _folder(trainer: Any) -> str | None:
    """The folder of this run, on every rank that of the first; None where nothing is logged."""
    if not trainer.loggers or trainer.fast_dev_run:
        return None
    logger = trainer.loggers[0]
    folder = getattr(logger, "log_dir", None)
    if folder is None:
        # Some loggers, as W&B's, have one folder for all runs. Lightning keeps checkpoints apart in it like this.
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = "/".join([str(logger.save_dir or trainer.default_root_dir), str(logger.name), version])
    broadcast: str = trainer.strategy.broadcast(folder)
    return broadcast


def _step(trainer: Trainer) -> int:
    """The step under which Lightning logs what belongs to the present batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
