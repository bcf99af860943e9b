"""What people put beside an optimizer: an adversary, averages of the weights, a search for the batch size."""

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from dion2_lightning import build_optimizer


def make_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("error")
def test_adversaries_that_share_a_loss() -> None:
    """Each backward pass leaves gradients in the other one, whose optimizer must not see them."""

    def train(*, own_gradients: bool) -> list[nn.Module]:
        generator, critic = make_network(0), make_network(1)
        players = [(critic, -1.0), (generator, 1.0)]
        optimizers = [build_optimizer(player, lr=0.01) for player, _ in players]
        for step in range(5):
            noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            for (player, sign), optimizer in zip(players, optimizers, strict=True):
                loss = sign * critic(generator(noise)).square().mean()
                optimizer.zero_grad()
                if own_gradients:
                    weights = list(player.parameters())
                    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                        weight.grad = gradient
                else:
                    loss.backward()
                optimizer.step()
        return [generator, critic]

    for found, expected in zip(train(own_gradients=False), train(own_gradients=True), strict=True):
        assert_same_weights(found, expected)


def test_averages_of_the_weights() -> None:
    """An exponential and an equal average, and a schedule of SWA with a rate for each group."""
    model = make_network()
    optimizer = build_optimizer(model, lr=0.05, adamw_lr=0.01)
    scheduler = SWALR(optimizer, swa_lr=[0.02, 0.004], anneal_epochs=2)
    exponential = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    equal = AveragedModel(model)
    seen: list[list[Tensor]] = []
    for step in range(6):
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        scheduler.step()
        exponential.update_parameters(model)
        equal.update_parameters(model)
        seen.append([parameter.detach().double() for parameter in model.parameters()])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.004])
    for place, (one, other) in enumerate(zip(exponential.parameters(), equal.parameters(), strict=True)):
        weights = [each[place] for each in seen]
        average = weights[0]
        for each in weights[1:]:
            average = 0.9 * average + 0.1 * each
        torch.testing.assert_close(one.double(), average, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(other.double(), torch.stack(weights).mean(0), rtol=1e-6, atol=1e-7)
        assert not torch.equal(weights[0], weights[-1])


class Network(L.LightningModule):
    """Takes batches in order, of a size that a finder changes."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.net = make_network()

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return build_optimizer(self, lr=0.01)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), batch_size=self.batch_size)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_a_batch_size_that_lightning_finds(tmp_path: Path) -> None:
    """Its trials take steps, which must leave no trace."""

    def make_trainer() -> L.Trainer:
        return L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    module, trainer = Network(2), make_trainer()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the checkpoint")
        size = Tuner(trainer).scale_batch_size(module, steps_per_trial=2, init_val=2, max_trials=2)
    assert size is not None and module.batch_size == size > 2
    started = copy.deepcopy(module.net)
    assert_same_weights(started, make_network())
    trainer.fit(module)
    expected = Network(size)
    make_trainer().fit(expected)
    assert_same_weights(module.net, expected.net)
