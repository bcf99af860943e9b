"""Training in Lightning: the same losses under every strategy, and whatever a Trainer does with an optimizer."""

import atexit
import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from dion2_lightning import NamedOptimizerStates, build_optimizer
from tests.distributed.ranks import run_like_torchrun
from tests.integrations import test_plain_loop
from tests.integrations.lightning_training import Llama, Scheduled, fit, make_trainer, mean_over_ranks, ranks_of
from tests.integrations.training import BATCH, make_model

STEPS = 20


def loss_curve(steps: int) -> list[float]:
    """The losses of the common training, by Lightning on one process."""
    module, _ = fit("one device", steps=steps)
    return module.losses


def test_loss_curve_is_that_of_a_loop_by_hand() -> None:
    assert loss_curve(STEPS) == pytest.approx(test_plain_loop.loss_curve(STEPS), rel=0, abs=1e-4)


def check_loss_curve(layout: str, expected: list[float], options: dict[str, Any]) -> None:
    module, trainer = fit(layout, steps=STEPS, options=options)
    assert mean_over_ranks(module.losses) == pytest.approx(expected, rel=1e-4)
    optimizer = trainer.optimizers[0]
    matrices = optimizer.param_groups[0]["params"]
    if layout == "DDP":
        assert optimizer.process_group is dist.group.WORLD  # nobody said strategy=
    else:
        assert optimizer.process_group is None
        assert all(isinstance(parameter, DTensor) for parameter in matrices)
    assert all(optimizer.selection_of(parameter) is not None for parameter in matrices)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("DDP", {}),
        ("DDP", {"static_graph": True, "gradient_as_bucket_view": True}),
        ("DDP", {"find_unused_parameters": True}),
        ("FSDP2", {}),
        ("TP", {}),
        ("FSDP2 x TP", {}),
    ],
    ids=str,
)
def test_every_strategy_has_the_loss_curve_of_one_device(layout: str, options: dict[str, Any]) -> None:
    expected = test_plain_loop.loss_curve(STEPS)
    run_like_torchrun(ranks_of(layout), check_loss_curve, layout, expected, options)


class CheckLosses(L.Callback):
    """In the processes that Lightning starts, each of which has a module of its own."""

    def __init__(self, expected: list[float]) -> None:
        self.expected = expected

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert trainer.optimizers[0].process_group is dist.group.WORLD
        assert mean_over_ranks(pl_module.losses) == pytest.approx(self.expected, rel=1e-4)


class EndWithoutCleanup(L.Callback):
    """Once a process has trained, and sent what it has, it ends without Python's cleanup.

    In that gloo's threads abort a process now and then, whatever the optimizer.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        atexit.register(os._exit, 0)


def test_processes_that_lightning_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not torchrun: the module and its settings go to them pickled, the weights come back.

    With the start method forkserver Lightning leaves a CPU's parameters in memory that the processes share, so that
    steps of whatever optimizer add up; with spawn it does not.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    check = CheckLosses(test_plain_loop.loss_curve(6))
    settings = {"share_replicas": True}
    callbacks = [check, EndWithoutCleanup()]
    module, _ = fit("DDP", options={"start_method": "spawn"}, settings=settings, callbacks=callbacks)
    expected, _ = fit("one device")
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


# Precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: Any) -> None:
    module, trainer = fit("one device", steps=STEPS, precision=precision)
    assert module.losses == pytest.approx(test_plain_loop.loss_curve(STEPS), rel=0.02)
    expected = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert {parameter.dtype for parameter in module.parameters()} == {expected}
    state = trainer.optimizers[0].state
    momenta = [state[parameter]["momentum"] for parameter in trainer.optimizers[0].param_groups[0]["params"]]
    assert {momentum.dtype for momentum in momenta} == {torch.float32}


class ScaledFloat32(MixedPrecision):
    """A GradScaler as with float16, and products in float32: float16's take too long on a CPU."""

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast("cpu", enabled=False)


class InjectInf(L.Callback):
    """Makes one gradient infinite at one step, and looks whether anything changes in it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.batches = 0
        self.before: list[torch.Tensor] = []

    def everything(self, trainer: L.Trainer, module: Any) -> list[torch.Tensor]:
        optimizer = trainer.optimizers[0]
        selected = [optimizer.selection_of(p) for p in optimizer.param_groups[0]["params"]]
        states = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [*module.parameters(), *states, *(selection.indices for selection in selected)]
        return [tensor.detach().clone() for tensor in tensors]

    def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
        if self.batches == self.step:
            self.before = self.everything(trainer, module)
            module.model.lm_head.weight.grad[0, 0] = torch.inf
        self.batches += 1

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.batches == self.step + 1:
            after = self.everything(trainer, module)
            assert len(self.before) > 30
            assert all(torch.equal(one, other) for one, other in zip(self.before, after, strict=True))


def test_a_step_that_the_grad_scaler_skips_changes_nothing() -> None:
    plugin = ScaledFloat32("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    injection = InjectInf(step=3)
    module, trainer = fit("one device", steps=8, plugins=[plugin], callbacks=[injection])
    assert injection.before
    assert plugin.scaler.get_scale() == 2.0
    assert trainer.optimizers[0].state[module.model.lm_head.weight]["step"] == 7
    assert module.losses[:4] == pytest.approx(test_plain_loop.loss_curve(8)[:4], rel=1e-5)
    assert module.losses[7] < module.losses[0]


def check_precision_under_ddp(expected: list[float]) -> None:
    module, _ = fit("DDP", steps=8, precision="bf16-mixed")
    assert mean_over_ranks(module.losses) == pytest.approx(expected, rel=0.02)

    plugin = ScaledFloat32("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    injection = InjectInf(step=3)
    module, trainer = fit("DDP", steps=8, plugins=[plugin], callbacks=[injection])
    assert injection.before
    assert plugin.scaler.get_scale() == 2.0
    assert trainer.optimizers[0].state[module.model.lm_head.weight]["step"] == 7
    assert mean_over_ranks(module.losses[:4]) == pytest.approx(expected[:4], rel=1e-4)


def test_precisions_of_replicas() -> None:
    run_like_torchrun(2, check_precision_under_ddp, test_plain_loop.loss_curve(8))


# What a Trainer does with an optimizer


def test_accumulated_batches_make_one_step() -> None:
    """Halves of a batch one after the other, as the two ranks of DDP have them side by side."""

    class Halves(Llama):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.sequences, batch_size=BATCH // 2)

    module = Halves("Dion2", "one device", make_model(), 6)
    make_trainer("one device", 6, accumulate_grad_batches=2).fit(module)
    losses = [(first + second) / 2 for first, second in zip(module.losses[::2], module.losses[1::2], strict=True)]
    assert losses == pytest.approx(test_plain_loop.loss_curve(6), rel=1e-4)


def test_learning_rate_monitor_shows_every_group(tmp_path: Path) -> None:
    trainer = make_trainer(
        "one device", 4, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[LearningRateMonitor("step")]
    )
    trainer.fit(Scheduled("Dion2", "one device", make_model(), 4))
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, start in {"dion2": 3e-3, "adamw": 2e-3, "adamw-no-decay": 2e-3}.items():
        shown = [float(row[f"lr-Dion2/{name}"]) for row in rows]
        assert shown == pytest.approx([start, start / 2, start / 3, start / 4])
    assert all(type(group["lr"]) is float for group in trainer.optimizers[0].param_groups)


def test_learning_rate_monitor_shows_the_momentum_of_the_matrices(tmp_path: Path) -> None:
    """AdamW's groups have none of that name, which Lightning says, and shows as 0."""
    monitor = LearningRateMonitor("step", log_momentum=True)
    trainer = make_trainer("one device", 2, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[monitor])
    with pytest.warns(RuntimeWarning, match="some optimizers do not have momentum"):
        trainer.fit(Scheduled("Dion2", "one device", make_model(), 2, momentum=0.7))
    assert monitor.last_momentum_values == {
        "lr-Dion2/dion2-momentum": 0.7,
        "lr-Dion2/adamw-momentum": 0,
        "lr-Dion2/adamw-no-decay-momentum": 0,
    }


class Searched(L.LightningModule):
    """Its rate is searched for; that of the head is to be a fifth of it. Records the rates of every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = 1e-3
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 8)
        self.rates: list[tuple[float, ...]] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return (self.head(self.body(batch)) - batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, lr=self.lr, adamw_lr=self.lr / 5, overrides={"head.weight": "adamw"})
        optimizer.register_step_post_hook(
            lambda optimizer, *_: self.rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        )
        return optimizer

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(120, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)


@pytest.mark.parametrize("by", ["callback", "tuner"])
def test_a_search_for_the_learning_rate_keeps_the_ratio_of_the_rates(by: str, tmp_path: Path) -> None:
    """Lightning sets one rate for all groups, at every step of the search and for the training after it."""
    module = Searched()
    search: dict[str, Any] = {"min_lr": 1e-4, "max_lr": 1e-1, "early_stop_threshold": None}
    if by == "callback":
        finder = LearningRateFinder(num_training_steps=20, **search)
        make_trainer("one device", 24, callbacks=[finder], default_root_dir=tmp_path).fit(module)
        found = finder.optimal_lr
    else:
        trainer = make_trainer("one device", 24, default_root_dir=tmp_path)
        found = Tuner(trainer).lr_find(module, num_training=20, **search)
        trainer.fit(module)
    assert found is not None
    tried = found.results["lr"]
    assert module.lr == found.suggestion() != 1e-3
    assert [rates[0] for rates in module.rates] == pytest.approx([*tried, *[module.lr] * 24])
    assert len(set(tried)) > 10
    for matrices, *rest in module.rates:
        assert rest == pytest.approx([matrices / 5] * 2)


class OneRate(L.Callback):
    """Gives all groups one rate from the third batch on, as a schedule with a floor may."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx >= 2:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 1e-4


def test_one_rate_that_is_set_after_a_search_stays(tmp_path: Path) -> None:
    module = Searched()
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-4, max_lr=1e-1, early_stop_threshold=None)
    make_trainer("one device", 4, callbacks=[finder, OneRate()], default_root_dir=tmp_path).fit(module)
    assert module.rates[-4:-2] == [pytest.approx((module.lr, module.lr / 5, module.lr / 5))] * 2
    assert module.rates[-2:] == [(1e-4, 1e-4, 1e-4)] * 2


class TransferLearning:
    """What BackboneFinetuning wants: a backbone to thaw, and a head; of a LightningModule of either package."""

    backbone: nn.Sequential
    head: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))
        self.head = nn.Linear(8, 8)
        self.losses: list[float] = []
        self.is_capturable = False

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = (self.head(self.backbone(batch)) - batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        lr = torch.tensor(0.01) if self.is_capturable else 0.01
        return build_optimizer(self, lr=lr, capturable=self.is_capturable)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)


class Transfer(TransferLearning, L.LightningModule):
    pass


class Thaw(BackboneFinetuning):
    """Lightning's leaves the backbone frozen when it resumes after the thaw, whatever the optimizer."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.previous_backbone_lr is not None:
            self.make_trainable(pl_module.backbone)


def finetune(epochs: int, checkpoint: Path | None = None, *, capturable: bool) -> tuple[Transfer, L.Trainer]:
    thaw = Thaw(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5, lambda_func=lambda epoch: 1.2)
    trainer = make_trainer("one device", -1, max_epochs=epochs, callbacks=[thaw])
    module = Transfer()
    module.is_capturable = capturable
    trainer.fit(module, ckpt_path=checkpoint)
    return module, trainer


@pytest.mark.parametrize("capturable", [False, True], ids=["floats", "tensors"])
def test_backbone_finetuning(capturable: bool, tmp_path: Path) -> None:
    """It adds one bare group, biases and norms included; resumed, it replaces all groups."""
    whole, trainer = finetune(4, capturable=capturable)
    optimizer = trainer.optimizers[0]
    groups = {group["name"]: (group["algorithm"], group["param_names"]) for group in optimizer.param_groups}
    assert groups == {
        "dion2": ("dion2", ["head.weight"]),
        "adamw-no-decay": ("adamw", ["head.bias"]),
        "dion2-2": ("dion2", ["backbone.0.weight", "backbone.2.weight"]),
        "adamw-no-decay-2": ("adamw", ["backbone.0.bias", "backbone.1.weight", "backbone.1.bias", "backbone.2.bias"]),
    }
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([0.01, 0.01, *[0.01 * 0.5 * 1.2**2] * 2])
    assert optimizer.selection_of(whole.backbone[0].weight).indices.shape == (2,)

    _, stopped = finetune(2, capturable=capturable)
    stopped.save_checkpoint(tmp_path / "checkpoint.ckpt")
    resumed, trainer = finetune(4, tmp_path / "checkpoint.ckpt", capturable=capturable)
    assert resumed.losses == whole.losses[4:]
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_package_pytorch_lightning(tmp_path: Path) -> None:
    """Installed beside ``lightning``, with classes of its own: its Trainer takes no callbacks of the other package."""
    import pytorch_lightning
    from pytorch_lightning.callbacks import BackboneFinetuning as Finetuning

    from dion2_lightning.integrations import pytorch_lightning as callbacks

    class Module(TransferLearning, pytorch_lightning.LightningModule):
        pass

    thaw = Finetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5, lambda_func=lambda epoch: 1.2)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", max_epochs=4, enable_checkpointing=False, callbacks=[thaw], **quiet
    )
    trainer.fit(Module())
    assert issubclass(callbacks.NamedOptimizerStates, pytorch_lightning.Callback)
    assert [type(callback) for callback in trainer.callbacks].count(callbacks.NamedOptimizerStates) == 1
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([0.01, 0.01, *[0.01 * 0.5 * 1.2**2] * 2])
    trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
    state = torch.load(tmp_path / "checkpoint.ckpt", weights_only=True)["optimizer_states"][0]
    assert state["param_groups"][0]["params"] == ["head.weight"]
    pytorch_lightning.Trainer(accelerator="cpu", callbacks=[callbacks.NamedOptimizerStates()], **quiet)


class Rebuilt(Transfer):
    """Makes its head anew at the second epoch, where the optimizer exists already."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.head = nn.Linear(8, 8)


def test_parameters_that_are_replaced_between_epochs() -> None:
    """In automatic optimization the gradients are made in a closure, so that none before the step says nothing."""
    trainer = make_trainer("one device", -1, max_epochs=2)
    with pytest.raises(
        RuntimeError, match=r"^parameter 'head.weight', 'head.bias' of this optimizer: the model has an"
    ):
        trainer.fit(Rebuilt())
    assert trainer.global_step == 2


class InTurns(Transfer):
    """One model for two Trainers, which share its optimizer or have one each."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.optimizer = build_optimizer(self, lr=0.01) if shared else None

    def configure_optimizers(self) -> Any:
        return self.optimizer or build_optimizer(self, lr=0.01)


@pytest.mark.parametrize("shared", [True, False])
def test_two_trainers_that_take_turns(shared: bool) -> None:
    """Each fit of a Trainer makes an optimizer, unless the module has one: no turn is ever taken back."""
    module = InTurns(shared)
    first, second = (make_trainer("one device", -1, max_epochs=1) for _ in range(2))
    for trainer in (first, second, first, second):
        trainer.fit_loop.max_epochs = trainer.current_epoch + 1
        trainer.fit(module)
    assert len(module.losses) == 8


class Pair(L.LightningModule):
    """Two optimizers on two parts of a module, by manual optimization, with and without a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def training_step(self, batch: torch.Tensor, _: int) -> None:
        first, second = self.optimizers()

        def closure() -> torch.Tensor:
            first.zero_grad()
            loss = self.one(batch).square().mean()
            self.manual_backward(loss)
            return loss

        first.step(closure)
        second.zero_grad()
        self.manual_backward((self.other(self.one(batch).detach()) - batch).square().mean())
        second.step()

    def configure_optimizers(self) -> Any:
        return [build_optimizer(self.one, lr=0.01), build_optimizer(self.other, lr=0.02)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(6, 8), batch_size=2)


def test_two_optimizers_on_two_parts(tmp_path: Path) -> None:
    callback = NamedOptimizerStates()  # parts know no Trainer, so build_optimizer cannot add it
    trainer = make_trainer("one device", -1, max_epochs=2, gradient_clip_val=None, callbacks=[callback])
    module = Pair()
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
    states = torch.load(tmp_path / "checkpoint.ckpt", weights_only=True)["optimizer_states"]
    assert [group["params"] for state in states for group in state["param_groups"]] == [
        ["one.weight"],
        ["one.bias"],
        ["other.weight"],
        ["other.bias"],
    ]
    resumed = make_trainer("one device", -1, max_epochs=2, gradient_clip_val=None)
    again = Pair()
    resumed.fit(again, ckpt_path=tmp_path / "checkpoint.ckpt")
    for one, other in zip(trainer.optimizers, resumed.optimizers, strict=True):
        momentum = one.state[one.param_groups[0]["params"][0]]["momentum"]
        assert torch.equal(momentum, other.state[other.param_groups[0]["params"][0]]["momentum"])
