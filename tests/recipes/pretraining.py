"""What the tests of the pretraining recipe and of the launch configurations share: tiny runs, and what they leave."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import psutil  # type: ignore[import-untyped]
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from dion2_lightning import OptimizerSettings
from recipes.pretraining.train import Settings, train
from tests.distributed.ranks import kill_this_process, run_like_torchrun
from tests.integrations.huggingface import fsdp2_on_cpu

OPTIMIZER = OptimizerSettings(lr=3e-3, momentum=0.8, weight_decay=0.1, orthonormalize_dtype="float32")
METRICS = ("train_loss", "gradient_norm", "learning_rate", "val_loss")


def tiny_settings(folder: Path, **changes: Any) -> Settings:
    """Settings of a run that takes a second: four steps on a text file, a checkpoint after the second."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:30_000], encoding="utf-8")
    settings = Settings(
        hidden_size=32,
        layers=2,
        heads=4,
        length=32,
        dataset=str(text),
        validation_windows=11,  # no multiple of what several ranks read at once
        optimizer=OPTIMIZER,
        steps=4,
        batch_size=8,
        log_every=1,
        log_with="tensorboard",
        validate_every=2,
        checkpoint_every=2,
        output=folder / "run",
    )
    return replace(settings, **changes)


@contextmanager
def alone(cache: Path) -> Iterator[None]:
    """What `datasets` keeps on disk is the test's own, and Accelerate's classes begin as in a new process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def run(settings: Settings, **changes: Any) -> Settings:
    """Train on this process, and return the settings of that run."""
    settings = replace(settings, **changes)
    _leave_the_second(settings)
    with alone(settings.output.parent / "cache"):
        train(settings)
    return settings


def _leave_the_second(settings: Settings) -> None:
    """Have a run that goes on begin in another second than the one before.

    TensorBoard reads their files by the seconds in which they were begun, and in one second by the numbers of their
    processes, as text: 10000 before 9999, so that the later steps come first.
    """
    if settings.resume:
        time.sleep(1)


class PowerCutError(Exception):
    pass


def run_until_power_cut(settings: Settings, **changes: Any) -> Settings:
    """Train on this process until the first checkpoint is written, and return the settings of a run that goes on."""

    def fail() -> None:
        raise PowerCutError

    with pytest.raises(PowerCutError), pytest.MonkeyPatch.context() as patch:
        _call_after_checkpoint(patch, fail)
        run(settings, **changes)
    assert not (settings.output / "model").exists()
    return replace(settings, resume=True)


def run_on_ranks(
    ranks: int, settings: Settings, environment: Mapping[str, str], *, killed: bool = False, **changes: Any
) -> Settings:
    """Train on several processes that find this environment, on the CPU whatever it asks for.

    If they are to be killed, they are when the first checkpoint is written.
    """
    settings = replace(settings, **changes)
    _leave_the_second(settings)
    run_like_torchrun(ranks, _rank, settings, dict(environment), killed, killed=killed)
    return settings


def _rank(settings: Settings, environment: dict[str, str], killed: bool) -> None:
    os.environ |= environment
    datasets.config.HF_DATASETS_CACHE = settings.output.parent / "cache"
    if "ACCELERATE_USE_FSDP" in environment:
        fsdp2_on_cpu()
    if killed:
        _call_after_checkpoint(pytest.MonkeyPatch(), kill_this_process)
    train(settings)


def _call_after_checkpoint(patch: pytest.MonkeyPatch, function: Callable[[], None]) -> None:
    save_state = Accelerator.save_state

    def save_state_and_call(self: Accelerator) -> None:
        save_state(self)
        function()

    patch.setattr(Accelerator, "save_state", save_state_and_call)


def run_launcher(command: list[str], seconds: float, **environment: str) -> str:
    """Run a launcher, and return what it printed. If it does not end in time, end it and the ranks it started.

    Torch gives each rank a session of its own, so ending the launcher's process group would leave them.
    """
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, **pipes)
    try:
        printed, errors = launcher.communicate(timeout=seconds)
    finally:
        if launcher.poll() is None:
            for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                process.kill()
            launcher.communicate()
    assert launcher.returncode == 0, errors
    return printed


def logged(settings: Settings, name: str) -> list[float]:
    """A metric of a run, step by step."""
    events = EventAccumulator(str(settings.output / "pretraining")).Reload()
    return [event.value for event in events.Scalars(name)] if name in events.Tags()["scalars"] else []


def saved_model(settings: Settings) -> Any:
    return AutoModelForCausalLM.from_pretrained(settings.output / "model")


def saved_logits(settings: Settings) -> torch.Tensor:
    """What the model that a run saved answers to every token of the vocabulary's beginning."""
    with torch.no_grad():
        logits: torch.Tensor = saved_model(settings)(input_ids=torch.arange(settings.length)[None]).logits
    return logits


def assert_same(found: Settings, expected: Settings) -> None:
    """Two runs ended with the same weights and logged the same metrics, bit for bit."""
    weights, others = saved_model(found).state_dict(), saved_model(expected).state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in others)
    assert logged(expected, "train_loss")
    for name in (*METRICS, "dion2/coverage", "dion2/turnover"):
        assert logged(found, name) == logged(expected, name), name


def assert_alike(found: Settings, expected: Settings) -> None:
    """Two runs trained alike but for rounding."""
    for name in METRICS:
        assert logged(found, name) == pytest.approx(logged(expected, name), abs=1e-4), name
    # The first selections are the same; later ones may differ where norms are equal but for rounding.
    for name in ("dion2/coverage", "dion2/captured_mass"):
        assert logged(expected, name)
        assert logged(found, name)[:2] == pytest.approx(logged(expected, name)[:2], abs=1e-4), name
    torch.testing.assert_close(saved_logits(found), saved_logits(expected), rtol=0, atol=1e-4)
