"""A callback that logs what is selected, for Lightning."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from dion2_lightning.algorithms.hyperparameters import described
from dion2_lightning.integrations.selection import SelectionRecorder
from dion2_lightning.monitoring.metrics import SelectionMetrics
from dion2_lightning.monitoring.tracker import check_bool, check_steps

if TYPE_CHECKING or find_spec("lightning") is not None:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:  # the same classes in the other package
    from pytorch_lightning import Callback, LightningModule, Trainer


@described(SelectionRecorder)
@dataclass(kw_only=True, eq=False, repr=False)
class SelectionMonitor(SelectionRecorder, Callback):
    """Log what Dion2 selects, to every logger: ``dion2/coverage``, ``dion2/<group>/coverage``, ...

    :class:`~dion2_lightning.SelectionMetrics` defines the metrics. They are also in ``trainer.callback_metrics``, for
    ``ModelCheckpoint`` and ``EarlyStopping``. The state is saved in checkpoints, and a resumed fit continues from it.
    ``save_to=True`` is the folder of the first logger's run, or where Lightning keeps its checkpoints
    (``<save_dir>/<name>/<version>``).

    Args:
        every: Steps between metrics (default: None, the Trainer's ``log_every_n_steps``).
        progress: Show ``coverage``, and of Dion ``captured_energy``, in the progress bar (default: True).
        **settings: The fields of :class:`SelectionRecorder`.

    Attributes:
        metrics: The last ones; None before the first.

    Raises:
        ImportError: ``pictures`` needs matplotlib, which is missing.
        TypeError: An argument has the wrong type.
        ValueError: ``every`` or ``window`` is under 1; or, when the fit starts, the Trainer has no Dion2 optimizer or
            several, neither ``every`` nor the Trainer says how often to log, or ``save_to`` is no local folder.

    Example::

        trainer = Trainer(callbacks=[SelectionMonitor()])
    """

    _log = Trainer.__module__.removesuffix(".trainer.trainer")

    every: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.every is not None:
            check_steps("every", self.every)
        check_bool("progress", self.progress)
        super().__post_init__()
        self.metrics: SelectionMetrics | None = None
        self._interval = 0
        self._is_waiting = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew, unless a fit is continued; under every strategy a checkpoint is loaded after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._restart()
            self.metrics, self._is_waiting = None, False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, now that there are optimizers. Sharded strategies load checkpoints after this, others before."""
        self._interval = self.every or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._interval < 1:
            raise ValueError(
                f"{self.tracker.name}: every=None follows the Trainer, whose log_every_n_steps is {self._interval}; "
                "pass every=..."
            )
        self._path = self._path_in(_run_folder(trainer))
        self._attach(trainer.optimizers)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Request metrics of the step that is due; under accumulation, of the step that ends these batches.

        Under manual optimization a batch may take none: then of the next step.
        """
        is_due = (_logged_step(trainer) + 1) % self._interval == 0
        self._is_waiting = is_due or (self._is_waiting and not pl_module.automatic_optimization)
        if self._is_waiting:
            self.tracker.request()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the step at which the loss of this batch is logged; called on every rank."""
        metrics = self.tracker.pop_metrics()
        if metrics is None:
            return
        self._is_waiting = False
        self.metrics = metrics
        named = metrics.named(per_matrix=self.per_matrix)
        for logger in trainer.loggers:
            logger.log_metrics(named, step=_logged_step(trainer))
        values = torch.tensor(list(named.values()), device=trainer.strategy.root_device)
        trainer.callback_metrics.update(zip(named, values.unbind(), strict=True))
        if self.progress:
            trainer.progress_bar_metrics.update(metrics.in_short())

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the history."""
        if trainer.is_global_zero:
            self._save()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the history and pictures, and detach."""
        self.tracker.detach()
        if trainer.is_global_zero:
            last = max(0, _logged_step(trainer) - 1)  # by now the step is that of the next batch
            self._finish(trainer.loggers, last)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the history, and detach, so that another fit without this callback computes nothing for it."""
        if trainer.is_global_zero:
            self._save()
        self.tracker.detach()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the tracker's state. Lightning calls this on every rank, as stacks of experts need."""
        return self.tracker.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.tracker.load_state_dict(state_dict)


def _run_folder(trainer: Any) -> str | None:
    """The folder of this run, on every rank that of the first; None where nothing is logged."""
    if not trainer.loggers or trainer.fast_dev_run:
        return None
    logger = trainer.loggers[0]
    folder = getattr(logger, "log_dir", None)
    if folder is None:
        # Some loggers, as W&B's, have one folder for all runs. Lightning keeps their checkpoints apart like this.
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = "/".join([str(logger.save_dir or trainer.default_root_dir), str(logger.name), version])
    broadcast: str = trainer.strategy.broadcast(folder)
    return broadcast


def _logged_step(trainer: Trainer) -> int:
    """The step under which Lightning logs what belongs to the present batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
