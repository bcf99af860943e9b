"""The Trainer: schedules, accumulation, bfloat16, subclasses, what it logs, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_utils import SchedulerType

from dion2_lightning import Dion2, Dion2Factory, build_optimizer
from tests.distributed.ranks import run_like_torchrun
from tests.integrations import test_plain_loop
from tests.integrations.huggingface import fsdp2_on_cpu, whole
from tests.integrations.resume import unwrapped
from tests.integrations.test_trainer import FSDP, InOrder, arguments, make_trainer
from tests.integrations.training import SETTINGS, Sequences, make_model

STEPS = 4

# An evaluation after every step, which never improves by a factor of 1000, halves the learning rate.
ON_EVALUATION = {"factor": 0.5, "patience": 0, "threshold": 999.0}
SCHEDULE_SETTINGS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "warmup_stable_decay": {"num_decay_steps": 2, "num_stable_steps": 1},
    "reduce_lr_on_plateau": ON_EVALUATION,
    "greedy": {"factor": 0.5, "patience": 0},
}
MOVED_BY_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")


class RatesOfEveryStep(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})


def learning_rates(trainer: InOrder) -> list[float]:
    """As the Trainer has logged them."""
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize("schedule", [str(each.value) for each in SchedulerType])
def test_schedules_move_both_sides_as_they_move_adamw(schedule: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": SCHEDULE_SETTINGS.get(schedule, {}),
        "warmup_steps": 0 if schedule in MOVED_BY_EVALUATIONS else 1,
    }
    if schedule in MOVED_BY_EVALUATIONS:
        settings |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    logged, rates = [], RatesOfEveryStep()
    for pair in ((torch.optim.AdamW, {"lr": 3e-3}), (Dion2Factory, {"lr": "3e-3", "adamw_lr": "1e-3"})):
        args = arguments(tmp_path, steps=STEPS, **settings)
        trainer = make_trainer(args, make_model(), pair, eval_dataset=Sequences(1))
        if pair[0] is Dion2Factory:
            trainer.add_callback(rates)
        trainer.train()
        logged.append(learning_rates(trainer))
    assert logged[0] == logged[1]
    assert schedule == "constant" or len(set(logged[1])) > 1, "this schedule has not moved anything"
    assert len(rates.seen) == STEPS
    assert max(step["dion2"] for step in rates.seen) > 0
    for step in rates.seen:
        assert step["adamw"] == pytest.approx(step["dion2"] / 3)
        assert step["adamw-no-decay"] == step["adamw"]


def test_the_matrices_learning_rate_is_logged(tmp_path: Path) -> None:
    trainer = make_trainer(arguments(tmp_path, steps=1), make_model())
    trainer.train()
    assert learning_rates(trainer) == [SETTINGS["lr"]]


def test_accumulated_gradients(tmp_path: Path) -> None:
    args = arguments(tmp_path, steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    accumulating, plain = make_trainer(args, make_model()), make_trainer(arguments(tmp_path, steps=STEPS), make_model())
    accumulating.train()
    plain.train()
    assert len(accumulating.losses) == 2 * len(plain.losses)
    for name, expected in whole(plain.model).items():
        assert torch.allclose(whole(accumulating.model)[name], expected, atol=1e-5), name


def test_autocast(tmp_path: Path) -> None:
    trainer = make_trainer(arguments(tmp_path, steps=STEPS, bf16=True), make_model())
    trainer.train()
    assert trainer.losses != pytest.approx(test_plain_loop.loss_curve(STEPS), abs=1e-5), (
        "nothing was computed in bfloat16"
    )
    assert trainer.losses == pytest.approx(test_plain_loop.loss_curve(STEPS), rel=0.02)
    state = unwrapped(trainer.optimizer).state
    assert {value.dtype for entries in state.values() for value in entries.values()} == {torch.float32}


def test_arguments_reach_the_optimizer(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, steps=1, learning_rate=2e-3, weight_decay=0.3, adam_beta2=0.95, optim_args="momentum=0.8"
    )
    trainer = make_trainer(args, make_model(), Dion2Factory.from_arguments(args, fraction="0.5"))
    trainer.train()
    matrices, rest, _ = trainer.optimizer.param_groups
    assert (matrices["lr"], matrices["weight_decay"], matrices["fraction"], matrices["momentum"]) == (
        2e-3,
        0.3,
        0.5,
        0.8,
    )
    assert (rest["algorithm"], rest["lr"], rest["betas"]) == ("adamw", 2e-3, (0.9, 0.95))


def test_an_optimizer_made_by_hand(tmp_path: Path) -> None:
    model = make_model()
    trainer = InOrder(
        model,
        arguments(tmp_path, steps=STEPS),
        train_dataset=Sequences(STEPS),
        optimizers=(build_optimizer(model, **SETTINGS), None),
    )
    trainer.losses = []
    trainer.train()
    assert trainer.losses == pytest.approx(test_plain_loop.loss_curve(STEPS), abs=1e-4)


# Several ranks


class WithItsOwnOptimizer(InOrder):
    optimizer: Optimizer | None

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model, **SETTINGS, strategy=self.args)
        return self.optimizer


def check_overridden_create_optimizer(folder: Path, settings: dict[str, Any]) -> None:
    if settings:
        fsdp2_on_cpu()
    trainer = WithItsOwnOptimizer(make_model(), arguments(folder, 2, STEPS, **settings), train_dataset=Sequences(STEPS))
    trainer.losses = []
    trainer.train()
    optimizer = unwrapped(trainer.optimizer)
    assert isinstance(optimizer, Dion2)
    assert (optimizer.process_group is not None) == (not settings)
    losses = trainer.accelerator.reduce(torch.tensor(trainer.losses), reduction="mean")
    assert losses.tolist() == pytest.approx(test_plain_loop.loss_curve(STEPS), abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"fsdp": True, "fsdp_config": FSDP}], ids=["DDP", "FSDP2"])
def test_a_subclass_with_its_own_optimizer(settings: dict[str, Any], tmp_path: Path) -> None:
    run_like_torchrun(2, check_overridden_create_optimizer, tmp_path, settings)


def check_offload(folder: Path) -> None:
    fsdp2_on_cpu()
    config = {**FSDP, "cpu_offload": True}
    trainer = make_trainer(arguments(folder, 2, STEPS, fsdp=True, fsdp_config=config), make_model())
    plugin = trainer.accelerator.state.fsdp_plugin
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy), "the Trainer has handed it on"
    plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # there is no GPU to pin it for
    trainer.train()
    losses = trainer.accelerator.reduce(torch.tensor(trainer.losses), reduction="mean")
    assert losses.tolist() == pytest.approx(test_plain_loop.loss_curve(STEPS), abs=1e-4)


def test_parameters_offloaded_to_the_cpu(tmp_path: Path) -> None:
    """As far as a CPU shows it; where its ranks communicate on GPUs alone, the step refuses (test_faults.py)."""
    run_like_torchrun(2, check_offload, tmp_path)


def check_fsdp1_is_refused(folder: Path) -> None:
    fsdp2_on_cpu()
    # Without a GPU there is no device to send the modules' states through.
    config = {**FSDP, "version": 1, "sync_module_states": False}
    args = arguments(folder, 2, STEPS, fsdp=True, fsdp_config=config)
    steps = []
    for pair, said in (
        (Dion2Factory.from_arguments(args), "strategy TrainingArguments with FSDP1 flattens matrices"),
        ((Dion2Factory, {"lr": 1e-3}), "strategy Accelerator with FSDP1 flattens matrices"),
    ):
        trainer = make_trainer(args, make_model(), pair)
        # FSDP1 does not take "cpu:0", which a world of GPUs has made of the device.
        PartialState._shared_state["device"] = AcceleratorState().device = torch.device("cpu")
        with pytest.raises(ValueError, match=said):
            trainer.train()
        steps += trainer.losses
    assert not steps


def test_fsdp1_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run_like_torchrun(2, check_fsdp1_is_refused, tmp_path)
