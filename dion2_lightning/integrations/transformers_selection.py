"""A callback that logs what is selected, for the Hugging Face Trainer and TRL."""

import base64
import inspect
import json
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState, ProgressCallback
from transformers.trainer_utils import IntervalStrategy
from typing_extensions import override

from dion2_lightning.algorithms.hyperparameters import described
from dion2_lightning.integrations.selection import SelectionRecorder
from dion2_lightning.monitoring.history import SelectionHistory, from_plain, to_plain
from dion2_lightning.monitoring.metrics import SelectionMetrics
from dion2_lightning.monitoring.tracker import SelectionTracker, SelectionWarning, check_bool, check_steps

_MAX_ENTRIES: Final = 25_000
"""Points of a checkpoint's history, times parameters: at most 150 bytes each, so under 4 MB in all."""

_MIN_POINTS: Final = 16


@described(SelectionRecorder)
@dataclass(kw_only=True, eq=False, repr=False)
class SelectionCallback(SelectionRecorder, TrainerCallback, ExportableState):
    """Log what Dion2 selects, with the loss: ``dion2/coverage``, ``dion2/<group>/coverage``, ...

    :class:`~dion2_lightning.SelectionMetrics` defines the metrics. They are in the Trainer's ``log_history`` and go to
    every reporter. The state is saved in ``trainer_state.json``, and ``train(resume_from_checkpoint=...)`` continues
    from it, with ``restore_callback_states_from_checkpoint`` or without; with it, the Trainer replaces this callback by
    a new one that has the saved arguments.

    ``save_to=True`` is ``args.output_dir``. Of the reporters, TensorBoard and W&B take pictures.

    Args:
        every: Steps between metrics; the Trainer then logs at these steps too (default: None, the steps at which the
            Trainer logs).
        progress: Show ``coverage``, and of Dion ``captured_energy``, beside the loss in the progress bar (default:
            True).
        **settings: The fields of :class:`SelectionRecorder`.

    Attributes:
        metrics: The last ones; None before the first.

    Raises:
        ImportError: ``pictures`` needs matplotlib, which is missing.
        TypeError: An argument has the wrong type.
        ValueError: ``every`` or ``window`` is under 1; or, when training begins, the optimizer is no Dion2, neither
            ``every`` nor the Trainer's arguments say at which steps to log, or ``save_to`` is no local folder.

    Example::

        Trainer(..., optimizer_cls_and_kwargs=(Dion2Factory, {"lr": 3e-4}), callbacks=[SelectionCallback()])
    """

    _log = "transformers"

    every: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.every is not None:
            check_steps("every", self.every)
        check_bool("progress", self.progress)
        super().__post_init__()
        self.metrics: SelectionMetrics | None = None
        self._not_logged: dict[str, float] = {}
        self._gathered: str | None = None
        self._gathered_at = 0
        self._handler: CallbackHandler | None = None

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, and continue from the checkpoint's state, if one was loaded."""
        if self.every is None and args.logging_strategy != IntervalStrategy.STEPS:
            raise ValueError(
                f"{self.tracker.name}: every=None follows logging_steps, but logging_strategy is "
                f"{str(args.logging_strategy.value)!r}; pass every=..."
            )
        self._path = self._path_in(args.output_dir)
        self._handler = _calling_handler()
        self._move_before_reporters(self._handler)
        self._restart()
        self.metrics = self._gathered = None
        self._not_logged, self._gathered_at = {}, 0
        name = type(self).__name__
        if state.global_step > 0 and isinstance(saved := state.stateful_callbacks.get(name), dict):
            self.saved = saved["attributes"]["saved"]
        # The Trainer expects an entry, also after a checkpoint that was saved without this callback.
        if name not in state.stateful_callbacks:
            state.stateful_callbacks[name] = self.state()
        self._attach([kwargs["optimizer"]])

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Request metrics of the step that is due."""
        step = state.global_step + 1
        if self.every is not None:
            is_due = step % self.every == 0
        else:
            is_due = step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        if is_due:
            self.tracker.request()

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Pop the metrics, on every rank, and have the Trainer log."""
        self._not_logged = {}
        metrics = self.tracker.pop_metrics()
        if metrics is not None:
            self.metrics = metrics
            self._not_logged = metrics.named(per_matrix=self.per_matrix)
            control.should_log = True
        self._gather(control.should_save)
        return control

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare for a checkpoint of the epoch."""
        self._gather(control.should_save)

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Prepare for a checkpoint that depends on the result."""
        self._gather(self.tracker.is_attached)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to the entry of ``log_history`` and to what the reporters, which come next, are given."""
        # What is logged without a loss is an evaluation, or the summary of the training.
        if logs is None or "loss" not in logs or not self._not_logged:
            return
        logs.update(self._not_logged)
        state.log_history[-1].update(self._not_logged)
        self._not_logged = {}
        if self.progress and self._handler is not None and self.metrics is not None:
            shown = {"loss": logs["loss"], **self.metrics.in_short()}
            for callback in self._handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.set_postfix(shown)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the history."""
        if state.is_world_process_zero:
            self._save()

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the history and pictures, and detach. Reporters, which come next, still take pictures."""
        self.tracker.detach()
        if state.is_world_process_zero and self._handler is not None:
            self._finish(list(_image_loggers(self._handler)), state.global_step)
        self._handler = None

    @override
    def state(self) -> dict[str, Any]:
        """Return arguments and state as the Trainer saves them in ``trainer_state.json``, on one rank."""
        tracker = self.tracker
        if tracker.state_is_spread and tracker.is_attached and self._gathered_at != tracker.step:
            message = (
                f"step {tracker.step}: a checkpoint is saved that was not planned when the step ended, so it holds the "
                f"counts of step {self._gathered_at}; set control.should_save in a callback that stands before "
                f"{tracker.name}"
            )
            warnings.warn(message, SelectionWarning, stacklevel=2)
        arguments = {each.name: getattr(self, each.name) for each in fields(self)}
        if isinstance(self.save_to, Path):
            arguments["save_to"] = str(self.save_to)
        return {"args": arguments, "attributes": {"saved": self.saved}}

    @property
    def saved(self) -> str:
        """The tracker's state as text. The Trainer restores it by setting this."""
        if self.tracker.state_is_spread:
            return self._gathered or _packed(SelectionTracker())
        return _packed(self.tracker)

    @saved.setter
    def saved(self, text: str) -> None:
        self.tracker.load_state_dict(from_plain(json.loads(zlib.decompress(base64.b64decode(text)))))

    def _gather(self, is_needed: bool) -> None:
        """Gather the state on all ranks, if they hold different experts: the Trainer asks one rank alone for it."""
        if is_needed and self.tracker.state_is_spread:
            self._gathered, self._gathered_at = _packed(self.tracker), self.tracker.step

    def _move_before_reporters(self, handler: CallbackHandler) -> None:
        """Move to right behind the callback that decides about logging and saving.

        The Trainer calls a user's callbacks after its reporters, which would report before metrics are added.
        """
        callbacks = handler.callbacks
        flow = [index for index, each in enumerate(callbacks) if isinstance(each, DefaultFlowCallback)]
        place = flow[0] + 1 if flow else 0
        # Only ever to the front: the handler is going through the list, and would leave out another callback.
        if callbacks.index(self) > place:
            callbacks.remove(self)
            callbacks.insert(place, self)


class _WandbRun:
    """What the Trainer's W&B callback logs to, as a logger that takes images."""

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        import wandb

        wandb.log({key: [wandb.Image(image) for image in images], "train/global_step": step})


def _image_loggers(handler: CallbackHandler) -> Iterator[Any]:
    """What the reporters that take images log to."""
    for callback in handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            yield callback.tb_writer
        if isinstance(callback, WandbCallback):
            yield _WandbRun()


def _calling_handler() -> CallbackHandler:
    """Find the handler that calls the present event.

    It is looked up in the frames of the callers, because the Trainer gives callbacks no reference to it, nor to the
    other callbacks, before which this one has to stand.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    raise RuntimeError("SelectionCallback must be called by a Trainer: pass it as Trainer(callbacks=[...])")


def _packed(tracker: SelectionTracker) -> str:
    """Return the state as compressed text; for a large model with fewer points of the history."""
    state = tracker.state_dict()
    history = SelectionHistory()
    history.load_state_dict(state["history"])
    history.thin_out(max(_MIN_POINTS, _MAX_ENTRIES // max(1, len(history.infos))))
    text = json.dumps(to_plain({**state, "history": history.state_dict()}))
    return base64.b64encode(zlib.compress(text.encode())).decode()
