"""What is being selected, in the Hugging Face Trainer and TRL: a callback that logs it."""

import base64
import inspect
import json
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState, ProgressCallback
from transformers.trainer_utils import IntervalStrategy
from typing_extensions import override

from dion2_lightning.integrations.selection import SelectionRecorder
from dion2_lightning.monitoring.history import SelectionHistory, from_plain, to_plain
from dion2_lightning.monitoring.metrics import Figures
from dion2_lightning.monitoring.tracker import SelectionStatistics, SelectionWarning, check_steps, check_truth

_MAX_ENTRIES: Final = 25_000
"""Points of a checkpoint's history, times parameters: 150 bytes each at the most, so under 4 MB in all."""

_MIN_POINTS: Final = 16


class SelectionCallback(TrainerCallback, ExportableState):
    """Log what Dion2 selects, with the loss: ``dion2/coverage``, ``dion2/<group>/coverage``, ...

    :class:`~dion2_lightning.Figures` says what each figure means. They are in the Trainer's ``log_history`` and go to
    every reporter. The state goes into ``trainer_state.json``, and ``train(resume_from_checkpoint=...)`` goes on from
    it, with ``restore_callback_states_from_checkpoint`` or without; with it, the Trainer puts a new callback, with the
    saved arguments, into the place of the one it was given.

    Args:
        every: Steps from one set of figures to the next; the Trainer then logs at these steps too (default: None, at
            the steps at which the Trainer logs).
        window: Steps that ``coverage`` looks back (default: 100).
        per_matrix: Also log every parameter, as ``dion2/<group>/<parameter>/coverage`` (default: False).
        orthogonality: Also measure how far updates are from orthonormal (default: False).
        save_to: Where the history is written when a checkpoint is saved and when training ends, for plots: a folder, or
            a file ending in ``.json``. True: ``args.output_dir``; False: nowhere (default: True).
        progress: Show ``coverage`` beside the loss in the progress bar (default: True).
        pictures: When training ends, write pictures of the history to a folder ``pictures`` beside it, and send two to
            TensorBoard and W&B, where ``report_to`` names them; needs matplotlib (default: False).

    Attributes:
        figures: The last ones; None before the first.

    Raises:
        ImportError: ``pictures`` needs matplotlib, which is missing.
        RuntimeError: When training begins, another callback looks on at the optimizer.
        TypeError: An argument has the wrong type.
        ValueError: ``every`` or ``window`` is under 1; or, when training begins, the optimizer is no Dion2, neither
            ``every`` nor the Trainer's arguments say at which steps to log, or ``save_to`` is not on this machine.

    Example::

        Trainer(..., optimizer_cls_and_kwargs=(Dion2Factory, {"lr": 3e-4}), callbacks=[SelectionCallback()])
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
            log="transformers",
            per_matrix=per_matrix,
            save_to=save_to,
            pictures=pictures,
        )
        self.every, self.progress = every, progress
        self.figures: Figures | None = None
        self._path: Path | None = None
        self._entry: dict[str, float] | None = None
        self._gathered: str | None = None
        self._gathered_at = 0
        self._handler: CallbackHandler | None = None

    @property
    def statistics(self) -> SelectionStatistics:
        """What counts, and holds the history; another one after each start of a training."""
        return self._recorder.statistics

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look on; go on from the checkpoint's state, where one was loaded."""
        if self.every is None and args.logging_strategy != IntervalStrategy.STEPS:
            raise ValueError(
                f"{self._recorder.name}: every=None follows logging_steps, but logging_strategy is "
                f"{str(args.logging_strategy.value)!r}; pass every=..."
            )
        self._path = self._recorder.path(args.output_dir)
        self._handler = _handler_of_this_event()
        self._go_before_reporters(self._handler)
        self._recorder.restart()
        self.figures = self._entry = self._gathered = None
        self._gathered_at = 0
        name = type(self).__name__
        if state.global_step > 0 and isinstance(saved := state.stateful_callbacks.get(name), dict):
            self.saved = saved["attributes"]["saved"]
        # The Trainer takes for granted that there is an entry, also where the checkpoint was saved without it.
        if name not in state.stateful_callbacks:
            state.stateful_callbacks[name] = self.state()
        self._recorder.attach([kwargs["optimizer"]])

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for figures of the step that is due."""
        if self._is_due(state.global_step + 1, args, state):
            self.statistics.ask()

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Take the figures, on every rank, and have them logged.

        They come into the history of this step at once: a callback behind may decide that it is not logged.
        """
        figures = self.statistics.take()
        if figures is not None:
            self.figures = figures
            self._entry = {**self._recorder.named(figures), "epoch": state.epoch, "step": state.global_step}
            state.log_history.append(self._entry)
            control.should_log = True
        self._gather(control.should_save)
        return control

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Get ready for a checkpoint of the epoch."""
        self._gather(control.should_save)

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Get ready for a checkpoint that depends on the result."""
        self._gather(self._handler is not None)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to what is being logged: to the history's entry, and to what the reporters get next."""
        # What is logged without a loss is an evaluation, or the end of the training.
        if logs is None or "loss" not in logs:
            return
        entry, self._entry = self._entry, None
        if entry is None or entry["step"] != state.global_step or self._handler is None:
            return
        state.log_history[:] = [each for each in state.log_history if each is not entry]
        figures = {name: value for name, value in entry.items() if name not in ("epoch", "step")}
        logs.update(figures)
        state.log_history[-1].update(figures)
        if self.progress:
            shown = {name.removeprefix("dion2/"): logs[name] for name in ("loss", "dion2/coverage") if name in logs}
            for callback in self._handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.set_postfix(shown)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the history."""
        if state.is_world_process_zero:
            self._recorder.save(self._path)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the history and pictures, and look on no longer. Reporters, which come later, still take them."""
        self.statistics.detach()
        if state.is_world_process_zero and self._handler is not None:
            self._recorder.finish(self._path, list(_taking_pictures(self._handler)), state.global_step)
        self._handler = None

    @override
    def state(self) -> dict[str, Any]:
        """Return arguments and statistics as the Trainer keeps them in ``trainer_state.json``."""
        recorder, statistics = self._recorder, self.statistics
        return {
            "args": {
                "every": self.every,
                "window": statistics.window,
                "per_matrix": recorder.per_matrix,
                "orthogonality": statistics.orthogonality,
                "save_to": recorder.save_to if isinstance(recorder.save_to, bool) else str(recorder.save_to),
                "progress": self.progress,
                "pictures": recorder.pictures,
            },
            "attributes": {"saved": self.saved},
        }

    @property
    def saved(self) -> str:
        """The state of the statistics as text; to set it is to go on from there."""
        if not self.statistics.state_is_spread:
            return _packed(self.statistics)
        # The Trainer asks one rank alone, and all are needed.
        if self._handler is not None and self._gathered_at != self.statistics.step:
            message = (
                f"step {self.statistics.step}: a checkpoint is saved that was not planned when the step ended, so it "
                f"holds the statistics of step {self._gathered_at}; set control.should_save in a callback that stands "
                f"before {self._recorder.name}"
            )
            warnings.warn(message, SelectionWarning, stacklevel=2)
        return self._gathered or _packed(SelectionStatistics())

    @saved.setter
    def saved(self, text: str) -> None:
        self.statistics.load_state_dict(from_plain(json.loads(zlib.decompress(base64.b64decode(text)))))

    def _is_due(self, step: int, args: TrainingArguments, state: TrainerState) -> bool:
        if self.every is not None:
            return step % self.every == 0
        return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)

    def _gather(self, is_needed: bool) -> None:
        """Bring together what ranks hold of stacks of experts, on all ranks."""
        if is_needed and self.statistics.state_is_spread:
            self._gathered, self._gathered_at = _packed(self.statistics), self.statistics.step

    def _go_before_reporters(self, handler: CallbackHandler) -> None:
        """Move to behind what decides about logging and saving, so that reporters come later.

        The Trainer puts a user's callbacks behind its reporters, so they would have reported before there are figures.
        """
        callbacks = handler.callbacks
        flow = [index for index, each in enumerate(callbacks) if isinstance(each, DefaultFlowCallback)]
        place = flow[0] + 1 if flow else 0
        # Only ever to the front: the handler is going through the list, and would leave out another callback.
        if callbacks.index(self) > place:
            callbacks.remove(self)
            callbacks.insert(place, self)

    def _is_running(self) -> bool:
        """Whether its Trainer trains. After an exception none tells its callbacks, and ``is_in_train`` stays true."""
        handler = self._handler
        if handler is None or self not in handler.callbacks:
            return False
        callers = (each for newest in sys._current_frames().values() for each in _callers(newest))
        trainers = (frame.f_locals.get("self") for frame in callers if frame.f_code.co_name == "train")
        return any(getattr(trainer, "callback_handler", None) is handler for trainer in trainers)


class _WandbRun:
    """What the Trainer's W&B callback logs to, as a logger that takes images."""

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        import wandb

        wandb.log({key: [wandb.Image(image) for image in images], "train/global_step": step})


def _taking_pictures(handler: CallbackHandler) -> Iterator[Any]:
    """What reporters log to, of those that log images."""
    for callback in handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            yield callback.tb_writer
        if isinstance(callback, WandbCallback):
            yield _WandbRun()


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame, and those that wait for it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _handler_of_this_event() -> CallbackHandler:
    """The handler that calls, which gives its callbacks everything but itself."""
    for frame in _callers(inspect.currentframe()):
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
    raise RuntimeError("SelectionCallback must be called by a Trainer: pass it as Trainer(callbacks=[...])")


def _packed(statistics: SelectionStatistics) -> str:
    """The state as text, a fraction as long as its JSON; of large models the history has fewer points in it."""
    state = statistics.state_dict()
    history = SelectionHistory()
    history.load_state_dict(state["history"])
    history.thin_out(max(_MIN_POINTS, _MAX_ENTRIES // max(1, len(history.kinds))))
    text = json.dumps(to_plain({**state, "history": history.state_dict()}))
    return base64.b64encode(zlib.compress(text.encode())).decode()
