"""The small training in Fabric: the same losses, exact resume, states that come back to their parameters, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Subset

from dion2_lightning import Dion2, build_optimizer, with_parameter_names
from tests.distributed.ranks import kill_this_process, run_like_torchrun
from tests.integrations import test_plain_loop
from tests.integrations.lightning_training import mean_over_ranks, parallelize
from tests.integrations.resume import STEPS, STOP, Phase, check_resume, make_optimizer, unwrapped, write_outcome
from tests.integrations.training import BATCH, MAX_NORM, SETTINGS, Sequences, make_model

RANKS = {"one device": 1, "DDP": 2, "FSDP2": 2, "FSDP2, sharded file": 2}


def make_fabric(layout: str) -> L.Fabric:
    strategy: Any = SingleDeviceStrategy(torch.device("cpu"))
    if layout == "DDP":
        strategy = DDPStrategy()
    elif layout.startswith("FSDP2"):
        strategy = ModelParallelStrategy(parallelize, 2, 1, save_distributed_checkpoint="sharded" in layout)
    fabric = L.Fabric(accelerator="auto" if layout == "one device" else "cpu", devices=RANKS[layout], strategy=strategy)
    fabric.launch()
    return fabric


def set_up(fabric: L.Fabric, layout: str, kind: str, seed: int = 0, before: bool = False, **settings: Any) -> Any:
    """Make model and optimizer, this before or after the model is set up."""
    model = make_model(seed).train()
    if before:
        return fabric.setup(model, make_optimizer(kind, model, fabric, **settings))
    model = fabric.setup_module(model)
    return model, fabric.setup_optimizers(make_optimizer(kind, model, fabric, **settings))


def train(
    fabric: L.Fabric, model: Any, optimizer: Any, steps: range, of: int, scheduler: LRScheduler | None = None
) -> list[float]:
    pieces = Subset(Sequences(of), range(steps.start * BATCH, steps.stop * BATCH))
    losses = []
    for batch in fabric.setup_dataloaders(DataLoader(pieces, batch_size=BATCH // fabric.world_size)):
        loss = model(**batch).loss
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def loss_curve(steps: int, layout: str = "one device", before: bool = False) -> list[float]:
    """The losses of the common training, by Fabric; the means over its ranks."""
    fabric = make_fabric(layout)
    model, optimizer = set_up(fabric, layout, "Dion2", before=before)
    group = unwrapped(optimizer).process_group
    assert group is (dist.group.WORLD if layout == "DDP" else None)
    return mean_over_ranks(train(fabric, model, optimizer, range(steps), steps))


@pytest.mark.parametrize("before", [True, False], ids=["built before", "built after"])
def test_loss_curve_is_that_of_a_loop_by_hand(before: bool) -> None:
    assert loss_curve(20, before=before) == pytest.approx(test_plain_loop.loss_curve(20), rel=0, abs=1e-4)


def check_loss_curve(layout: str, before: bool, expected: list[float]) -> None:
    assert loss_curve(len(expected), layout, before) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("layout", "before"), [("DDP", True), ("DDP", False), ("FSDP2", False)])
def test_every_strategy_has_the_loss_curve_of_one_device(layout: str, before: bool) -> None:
    run_like_torchrun(2, check_loss_curve, layout, before, test_plain_loop.loss_curve(20))


def train_in_fabric(layout: str, kind: str, phase: Phase, folder: Path) -> None:
    fabric = make_fabric(layout)
    model, optimizer = set_up(fabric, layout, kind, seed=1 if phase is Phase.RESUMED else 0)
    scheduler = LambdaLR(unwrapped(optimizer), lambda step: 1 / (1 + step))
    # Its state, not itself: of a folder Fabric leaves objects as they are.
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler.state_dict()}
    if phase is Phase.RESUMED:
        fabric.load(folder / "checkpoint", state)
        scheduler.load_state_dict(state["scheduler"])
        losses = train(fabric, model, optimizer, range(STOP, STEPS), STEPS, scheduler)
    elif phase is Phase.KILLED:
        train(fabric, model, optimizer, range(STOP), STEPS, scheduler)
        fabric.save(folder / "checkpoint", {**state, "scheduler": scheduler.state_dict()})
        kill_this_process()
    else:
        losses = train(fabric, model, optimizer, range(STEPS), STEPS, scheduler)
    write_outcome(folder, phase, model.module.named_parameters(), unwrapped(optimizer), losses)


@pytest.mark.parametrize("layout", RANKS)
def test_resume(layout: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    check_resume(train_in_fabric, "Fabric", layout, RANKS[layout], tmp_path, record_property)


# From one strategy to another

TWO_GROUPS_OF_MATRICES = {"overrides": {"*.layers.1.*_proj.weight": {"lr": 1e-3}}}


def save(layout: str, folder: Path) -> None:
    fabric = make_fabric(layout)
    model, optimizer = set_up(fabric, layout, "Dion2", **TWO_GROUPS_OF_MATRICES)
    train(fabric, model, optimizer, range(STOP), STOP)
    state: Any = optimizer
    if layout != "FSDP2":  # whose checkpoints have names
        state = with_parameter_names(optimizer.state_dict(), optimizer, model)
    fabric.save(folder / "checkpoint", {"model": model, "optimizer": state})
    write_outcome(folder, Phase.UNINTERRUPTED, model.module.named_parameters(), unwrapped(optimizer), [])


def load(layout: str, folder: Path) -> None:
    fabric = make_fabric(layout)
    model, optimizer = set_up(fabric, layout, "Dion2", seed=1, **TWO_GROUPS_OF_MATRICES)
    fabric.load(folder / "checkpoint", {"model": model, "optimizer": optimizer})
    write_outcome(folder, Phase.RESUMED, model.module.named_parameters(), unwrapped(optimizer), [])


@pytest.mark.parametrize(
    ("saving", "loading"), [("one device", "FSDP2"), ("DDP", "FSDP2"), ("FSDP2", "one device"), ("FSDP2", "DDP")]
)
def test_every_state_comes_back_to_its_parameter(saving: str, loading: str, tmp_path: Path) -> None:
    run_like_torchrun(RANKS[saving], save, saving, tmp_path)
    run_like_torchrun(RANKS[loading], load, loading, tmp_path)
    saved, loaded = (torch.load(tmp_path / f"{phase.value} 0.pt") for phase in (Phase.UNINTERRUPTED, Phase.RESUMED))
    assert saved.keys() == loaded.keys()
    assert sum("momentum" in name for name in saved) == 14
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []


def test_a_parameter_without_a_name() -> None:
    model, other = make_model(), make_model(1)
    optimizer = build_optimizer(model, lr=0.1)
    with pytest.raises(ValueError, match=r"^group 'dion2' of the optimizer holds a parameter of shape \(32, 32\)"):
        with_parameter_names(optimizer.state_dict(), optimizer, other)


# What Fabric itself says, and refusals


def test_a_module_that_fabric_has_set_up_knows_its_strategy() -> None:
    fabric = make_fabric("one device")
    model = fabric.setup_module(make_model())
    fabric.strategy.__class__ = type("FSDPStrategy", (type(fabric.strategy),), {})
    for strategy in (None, fabric):
        with pytest.raises(ValueError, match=r"^strategy FSDPStrategy \(FSDP1\) flattens matrices"):
            build_optimizer(model, lr=0.1, strategy=strategy)


class InFabric(L.LightningModule):
    """A LightningModule that Fabric trains; configure_model is called by the user, if at all."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def configure_model(self) -> None:
        pass

    def training_step(self, batch: Any) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Dion2:
        return build_optimizer(self, **SETTINGS)


def test_a_lightning_module_in_fabric() -> None:
    fabric = make_fabric("one device")
    module = fabric.setup_module(InFabric())
    optimizer = fabric.setup_optimizers(module.configure_optimizers())
    batch = Sequences(1)[0]
    fabric.backward(module.training_step({name: tokens[None] for name, tokens in batch.items()}))
    optimizer.step()
    assert unwrapped(optimizer).state


def check_built_before_sharding() -> None:
    fabric = make_fabric("FSDP2")
    model = make_model()
    optimizer = build_optimizer(model, strategy=fabric, **SETTINGS)
    sharded = fabric.setup_module(model)
    with pytest.raises(RuntimeError, match=r"The model was sharded \(fully_shard\).*; build the optimizer after that"):
        train(fabric, sharded, fabric.setup_optimizers(optimizer), range(1), 1)


def test_an_optimizer_that_was_built_before_fsdp2() -> None:
    """Fabric replaces the parameters in the model only."""
    run_like_torchrun(2, check_built_before_sharding)
