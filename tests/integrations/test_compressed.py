"""Compressed synchronisation in every framework: accumulation, clipping, equal replicas, checkpoints.

What is expected is trained in one process: the gradient of every replica, clipped as the replicas clip, and their mean
given to Dion with full synchronisation. Its update is linear in B, so momenta that go apart move the weights as one.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset
from transformers import TrainerControl, TrainerState, TrainingArguments

from dion2_lightning import (
    CompressedParallelismConfig,
    Dion2,
    Dion2Factory,
    SynchronizeCallback,
    build_optimizer,
)
from dion2_lightning.distributed.strategies import refuse_scaling_by_replica
from tests.distributed.ranks import run_like_torchrun, run_on_ranks
from tests.distributed.test_compressed import assert_equal_on
from tests.integrations import lightning_training
from tests.integrations.huggingface import fsdp2_on_cpu, fsdp_plugin, make_accelerator
from tests.integrations.resume import unwrapped
from tests.integrations.test_fabric import make_fabric
from tests.integrations.test_trainer import arguments, make_trainer
from tests.integrations.training import BATCH, SETTINGS, Sequences, make_model

STEPS, STOP, ACCUMULATED = 4, 2, 2
MAX_NORM = 0.5
RATES = {name: SETTINGS[name] for name in ("lr", "adamw_lr", "weight_decay")}
DION: dict[str, Any] = {**RATES, "algorithm": "dion", "sync": "compressed", "max_grad_norm": MAX_NORM}

Pick = Callable[[int, int], list[int]]


def dealt(batch: int, replica: int) -> list[int]:
    """The sequences of a replica's part of a batch where samplers deal them one by one."""
    return [BATCH * batch + replica + 2 * index for index in range(BATCH // 2)]


def in_a_row(batch: int, replica: int) -> list[int]:
    """The same where loaders deal whole batches."""
    return [BATCH * batch + BATCH // 2 * replica + index for index in range(BATCH // 2)]


def loss_of(model: nn.Module, indices: list[int]) -> Tensor:
    batch = Sequences(STEPS * ACCUMULATED).pieces[indices]
    loss: Tensor = model(input_ids=batch, labels=batch).loss / ACCUMULATED
    return loss


def expected_weights(pick: Pick, is_inside: bool, all_apart: bool) -> dict[str, Tensor]:
    """What one process makes of it; ``all_apart`` where no gradient is averaged yet when the norm is taken."""
    model = make_model().train()
    # Q begins as its parameter's name says, which is that in the module that the optimizer is built of.
    whole = nn.ModuleDict({"model": model}) if is_inside else model
    with mock.patch.dict(AcceleratorState._shared_state, clear=True):  # of this model Accelerate shards nothing
        optimizer = build_optimizer(whole, **{**DION, "sync": "full", "max_grad_norm": None})
    compressed = [p for group in optimizer.param_groups if group["algorithm"] == "dion" for p in group["params"]]
    for step in range(STEPS):
        of_replicas = []
        for replica in range(2):
            for number in range(ACCUMULATED):
                loss_of(model, pick(step * ACCUMULATED + number, replica)).backward()
            of_replicas.append([parameter.grad.double() for parameter in model.parameters()])
            optimizer.zero_grad()
        squares = torch.zeros((), dtype=torch.float64)
        for parameter, *gradients in zip(model.parameters(), *of_replicas, strict=True):
            stacked = torch.stack(gradients)
            parameter.grad = stacked.mean(0).float()
            is_apart = all_apart or any(parameter is each for each in compressed)
            squares += stacked.square().sum() / 2 if is_apart else stacked.mean(0).square().sum()
        assert squares.sqrt() > MAX_NORM
        for parameter in model.parameters():
            parameter.grad *= MAX_NORM / squares.sqrt()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def watched(optimizer: Dion2, group: Any = None) -> Dion2:
    """Compare the replicas' weights after every step, bit for bit."""

    def compare(*_: Any) -> None:
        parameters = [parameter for each in optimizer.param_groups for parameter in each["params"]]
        assert_equal_on(group or dist.group.WORLD, dict(enumerate(parameters)))

    optimizer.register_step_post_hook(compare)
    return optimizer


def assert_as_expected(model: nn.Module, pick: Pick, is_inside: bool = False, all_apart: bool = False) -> None:
    start = dict(make_model().named_parameters())
    expected = expected_weights(pick, is_inside, all_apart)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
        moved, wanted = whole - start[name].detach(), expected[name] - start[name].detach()
        assert torch.linalg.norm(moved - wanted) <= 1e-4 * torch.linalg.norm(wanted), name


def assert_resumed(model: nn.Module, optimizer: Dion2, resumed: nn.Module, other: Dion2) -> None:
    """Weights bit for bit, and momenta: of both runs, as they were averaged at the same step."""
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
        for entry, value in optimizer.state[one].items():
            assert torch.equal(value, other.state[two][entry]), entry


class Llama(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_model().train()

    def configure_optimizers(self) -> Any:
        return watched(build_optimizer(self, **DION))

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def train_dataloader(self) -> DataLoader:
        done = self.trainer.global_step * ACCUMULATED * BATCH
        pieces = Subset(Sequences(STEPS * ACCUMULATED), range(done, STEPS * ACCUMULATED * BATCH))
        return DataLoader(pieces, batch_size=BATCH // 2, sampler=DistributedSampler(pieces, shuffle=False))


def fit_in_lightning(folder: Path, checkpoint: Path | None = None, **settings: Any) -> tuple[nn.Module, Dion2]:
    module = Llama()
    chosen = {"gradient_clip_val": None, "accumulate_grad_batches": ACCUMULATED, "enable_checkpointing": True}
    saving = ModelCheckpoint(folder, "saved", every_n_train_steps=STOP, save_top_k=-1, save_on_train_epoch_end=False)
    trainer = lightning_training.make_trainer("DDP", STEPS, **{**chosen, "callbacks": [saving], **settings})
    trainer.fit(module, ckpt_path=checkpoint)
    return module.model, unwrapped(trainer.optimizers[0])


def check_lightning(folder: Path) -> None:
    model, optimizer = fit_in_lightning(folder)
    assert_as_expected(model, dealt, is_inside=True)
    assert_resumed(model, optimizer, *fit_in_lightning(folder / "again", folder / "saved.ckpt"))
    with pytest.raises(ValueError, match=r"gradient_clip_val=1\.0 clips each replica .*max_grad_norm=1\.0"):
        fit_in_lightning(folder / "clipped", gradient_clip_val=1.0)


def test_lightning(tmp_path: Path) -> None:
    run_like_torchrun(2, check_lightning, tmp_path)


class ShardedLlama(Llama):
    """HSDP: sharded over one dimension of a mesh of its own, and the optimizer knows of the other one."""

    def configure_model(self) -> None:
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=self.mesh["shard"])
        fully_shard(self.model, mesh=self.mesh["shard"])

    def configure_optimizers(self) -> Any:
        group = self.mesh["replicate"].get_group()
        return watched(build_optimizer(self, **DION, strategy=group), group)

    def train_dataloader(self) -> DataLoader:
        pieces = Sequences(STEPS * ACCUMULATED)
        sampler: Any = DistributedSampler(pieces, shuffle=False, **self.trainer.distributed_sampler_kwargs)
        return DataLoader(pieces, batch_size=1, sampler=sampler)


def check_sharded_lightning(folder: Path) -> None:
    module = ShardedLlama()
    chosen = {"gradient_clip_val": None, "accumulate_grad_batches": ACCUMULATED}
    trainer = lightning_training.make_trainer("FSDP2, 4 ranks", STEPS, **chosen)
    trainer.fit(module)
    assert_as_expected(module.model, in_a_row, is_inside=True)
    with pytest.raises(RuntimeError, match=r"call optimizer\.synchronize\(\) on every rank first"):
        trainer.save_checkpoint(folder / "refused.ckpt")
    unwrapped(trainer.optimizers[0]).synchronize()
    trainer.save_checkpoint(folder / "saved.ckpt")


def test_lightning_on_shards(tmp_path: Path) -> None:
    run_like_torchrun(4, check_sharded_lightning, tmp_path)


def run_accelerate(
    folder: Path, resumes: bool = False, clips: bool = False, **settings: Any
) -> tuple[nn.Module, Dion2]:
    """Under DDP, or HSDP where settings are an Accelerator's for that; clipped by the optimizer or by Accelerate."""
    layout = "HSDP" if settings else "DDP"
    accelerator = make_accelerator(layout, gradient_accumulation_steps=ACCUMULATED, **settings)
    # Every rank makes weights of its own, and gets those of the first one: by DDP, and for what DDP ignores by the
    # optimizer; or by Accelerate, where it fills the shards of FSDP2.
    model = make_model(seed=accelerator.process_index).train()
    chosen = {**DION, "max_grad_norm": None} if clips else DION
    group = accelerator.torch_device_mesh["dp_replicate"].get_group() if settings else None
    optimizer = watched(build_optimizer(model, **chosen, strategy=accelerator), group)
    loader = DataLoader(Sequences(STEPS * ACCUMULATED), batch_size=BATCH // accelerator.num_processes)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    if resumes:
        accelerator.load_state(str(folder))
        loader = accelerator.skip_first_batches(loader, STOP * ACCUMULATED)
    for number, batch in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if clips and accelerator.sync_gradients:
                assert accelerator.clip_grad_norm_(model.parameters(), MAX_NORM) > MAX_NORM
            prepared.step()
            prepared.zero_grad()
        if number == STOP * ACCUMULATED and not resumes:
            accelerator.save_state(str(folder))
    return accelerator.unwrap_model(model), optimizer


def check_accelerate(folder: Path) -> None:
    for clips in (False, True):
        path = folder / f"clipped by Accelerate {clips}"
        model, optimizer = run_accelerate(path, clips=clips)
        assert_as_expected(model, in_a_row)
        assert_resumed(model, optimizer, *run_accelerate(path, resumes=True, clips=clips))
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    with pytest.raises(ValueError, match=r"loss scaling, of float16, .* train in bfloat16, or with sync='full'"):
        build_optimizer(make_model(), **DION, strategy=accelerator)


def test_accelerate(tmp_path: Path) -> None:
    run_like_torchrun(2, check_accelerate, tmp_path)


def two_by_two() -> CompressedParallelismConfig:
    return CompressedParallelismConfig(dp_replicate_size=2, dp_shard_size=2)


def hsdp(kind: str) -> dict[str, Any]:
    plugin = fsdp_plugin(state_dict_type=kind, cpu_ram_efficient_loading=True)
    return {"parallelism_config": two_by_two(), "fsdp_plugin": plugin}


def check_accelerate_on_shards(folder: Path, kind: str, clips: bool) -> None:
    model, optimizer = run_accelerate(folder, clips=clips, **hsdp(kind))
    assert {parameter.placements for parameter in model.parameters()} == {(Shard(0),)}
    assert_as_expected(model, in_a_row, all_apart=clips)
    assert_resumed(model, optimizer, *run_accelerate(folder, resumes=True, clips=clips, **hsdp(kind)))
    with pytest.raises(ValueError, match="CompressedParallelismConfig keeps FSDP2 from averaging"):
        build_optimizer(make_model(), **RATES)  # no strategy tells of the replicas


@pytest.mark.parametrize(("kind", "clips"), [("SHARDED_STATE_DICT", False), ("FULL_STATE_DICT", True)])
def test_accelerate_on_shards(kind: str, clips: bool, tmp_path: Path) -> None:
    run_like_torchrun(4, check_accelerate_on_shards, tmp_path, kind, clips)


def run_fabric(folder: Path, before: bool, resumes: bool = False) -> tuple[nn.Module, Dion2]:
    """Built before the module is wrapped, or after."""
    fabric = make_fabric("DDP")
    model: Any = make_model().train()
    if before:
        model, optimizer = fabric.setup(model, build_optimizer(model, **DION, strategy=fabric))
    else:
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(build_optimizer(model, **DION))
    dion, first = watched(unwrapped(optimizer)), 0
    if resumes:
        fabric.load(folder, {"model": model, "optimizer": optimizer})
        first = STOP
    for step in range(first, STEPS):
        if step == STOP and not resumes:
            fabric.save(folder, {"model": model, "optimizer": optimizer})
        for number in range(ACCUMULATED):
            with fabric.no_backward_sync(model, enabled=number < ACCUMULATED - 1):
                fabric.backward(loss_of(model, in_a_row(step * ACCUMULATED + number, fabric.global_rank)))
        optimizer.step()
        optimizer.zero_grad()
    return model.module, dion


def check_fabric(folder: Path) -> None:
    for before in (True, False):
        path = folder / f"built {before}.ckpt"
        model, optimizer = run_fabric(path, before)
        assert_as_expected(model, in_a_row)
        assert_resumed(model, optimizer, *run_fabric(path, before, resumes=True))


def test_fabric(tmp_path: Path) -> None:
    run_like_torchrun(2, check_fabric, tmp_path)


class Watching(Dion2Factory):
    def __call__(self, *args: Any, **settings: Any) -> Dion2:
        optimizer = super().__call__(*args, **settings)
        return watched(optimizer, optimizer.process_group)


def run_trainer(
    folder: Path, callbacks: list[Any], checkpoint: str | None = None, ranks: int = 2, **settings: Any
) -> tuple[nn.Module, Dion2]:
    chosen = {"gradient_accumulation_steps": ACCUMULATED, "max_grad_norm": 0, "save_strategy": "steps", **settings}
    args = arguments(folder, ranks, STEPS, save_steps=STOP, **chosen)
    pair = (Watching, {**DION, "strategy": args})
    trainer = make_trainer(args, make_model(), pair, callbacks=callbacks)
    trainer.train_dataset = Sequences(STEPS * ACCUMULATED)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.model, unwrapped(trainer.optimizer)


def check_trainer(folder: Path) -> None:
    check_resumed_trainer(folder)
    args = arguments(folder, 2)
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 clips each replica .*; set max_grad_norm=0\.0, and pass"):
        refuse_scaling_by_replica(args)


def check_resumed_trainer(folder: Path, **settings: Any) -> None:
    model, optimizer = run_trainer(folder, [SynchronizeCallback()], **settings)
    assert_as_expected(model, in_a_row)
    again = run_trainer(folder / "again", [SynchronizeCallback()], str(folder / f"checkpoint-{STOP}"), **settings)
    for each in (optimizer, again[1]):
        each.synchronize()
    assert_resumed(model, optimizer, *again)


@pytest.mark.parametrize(
    ("strategy", "event", "should_save", "averages"),
    [
        ("steps", "on_step_end", True, True),
        ("steps", "on_step_end", False, False),
        ("epoch", "on_epoch_end", True, True),
        ("epoch", "on_epoch_end", False, False),
        ("best", "on_evaluate", False, True),
        ("steps", "on_evaluate", False, False),
    ],
)
def test_the_trainer_averages_before_it_saves(
    strategy: str, event: str, should_save: bool, averages: bool, tmp_path: Path
) -> None:
    """With "best" it decides after an evaluation, of which callbacks hear first."""
    args = TrainingArguments(tmp_path, save_strategy=strategy, metric_for_best_model="loss", use_cpu=True)
    optimizer = build_optimizer(nn.Linear(4, 4), lr=0.1)
    with mock.patch.object(Dion2, "synchronize") as synchronize:
        callback, control = SynchronizeCallback(), TrainerControl(should_save=should_save)
        getattr(callback, event)(args, TrainerState(), control, optimizer=optimizer)
    assert synchronize.called == averages


def test_trainer(tmp_path: Path) -> None:
    run_like_torchrun(2, check_trainer, tmp_path)


def check_trainer_on_shards(folder: Path, kind: str) -> None:
    fsdp2_on_cpu()
    sharding = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "state_dict_type": kind}
    settings: dict[str, Any] = {"fsdp": True, "fsdp_config": sharding, "parallelism_config": two_by_two()}
    check_resumed_trainer(folder, ranks=4, **settings)
    refused = [
        ({"max_grad_norm": 1.0}, DION, r"max_grad_norm=1\.0 clips each replica .*; set max_grad_norm=0\.0, and pass"),
        ({}, RATES, "CompressedParallelismConfig keeps FSDP2 from averaging .*; pass sync='compressed', or Para"),
        (
            {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)},
            DION,
            "=CompressedParallelismConfig",
        ),
    ]
    for changed, given, message in refused:
        args = arguments(folder, 4, STEPS, **{"max_grad_norm": 0, **settings, **changed})
        for strategy in ({"strategy": args}, {}) if given is RATES else ({"strategy": args},):
            with pytest.raises(ValueError, match=message):
                make_trainer(args, make_model(), (Dion2Factory, {**given, **strategy})).train()


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_trainer_on_shards(kind: str, tmp_path: Path) -> None:
    run_like_torchrun(4, check_trainer_on_shards, tmp_path, kind)


def train_by_hand(model: nn.Module, optimizer: Dion2, pick: Pick, replica: int, no_sync: Any) -> None:
    for step in range(STEPS):
        for number in range(ACCUMULATED):
            is_last = number == ACCUMULATED - 1
            no_sync(not is_last)
            loss_of(model, pick(step * ACCUMULATED + number, replica)).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_ddp_and_hsdp() -> None:
    """DDP by its hook, on the replicas alone; FSDP2 on the shards, where nothing else is averaged by anyone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group, replica = mesh["replicate"].get_group(), mesh.get_local_rank("replicate")

    ddp = DistributedDataParallel(make_model().train(), process_group=group)
    optimizer = watched(build_optimizer(ddp, **DION, strategy=group), group)
    train_by_hand(
        ddp, optimizer, in_a_row, replica, lambda waits: setattr(ddp, "require_backward_grad_sync", not waits)
    )
    assert_as_expected(ddp.module, in_a_row)

    model = make_model().train()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    optimizer = watched(build_optimizer(model, **DION, strategy=group), group)
    train_by_hand(model, optimizer, in_a_row, replica, lambda waits: None)
    assert_as_expected(model, in_a_row)


def test_ddp_and_hsdp() -> None:
    run_on_ranks(4, check_ddp_and_hsdp)


def step_on(model: nn.Module, optimizer: Any) -> None:
    generator = torch.manual_seed(dist.get_rank())
    model(torch.randn(8, 32, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False))


def check_all_compressed() -> None:
    """A module that leaves DDP nothing, as with LoRA, and is wrapped later: DDP averages the smallest matrix too."""
    group, model = dist.group.WORLD, linears()
    optimizer = watched(build_optimizer(model, **RATES, algorithm="dion", sync="compressed", strategy=group))
    ddp = DistributedDataParallel(model)
    expected = linears()
    other = build_optimizer(expected, **RATES, algorithm="dion")
    averaging = DistributedDataParallel(expected)
    for _ in range(3):
        step_on(ddp, optimizer)
        step_on(averaging, other)
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def check_later_optimizers() -> None:
    """DDP averages again what an optimizer has left, or was given back; where it cannot, that is an error."""
    group = dist.group.WORLD
    for settings in ({"algorithm": "dion"}, {}, None):
        ddp = DistributedDataParallel(linears())
        first = build_optimizer(ddp, **RATES, algorithm="dion", sync="compressed", strategy=group)
        step_on(ddp, first)
        if settings is None:
            del first
            second: Any = torch.optim.AdamW(ddp.parameters())
        else:
            second = build_optimizer(ddp, **RATES, **settings, strategy=group)
        for _ in range(2):
            step_on(ddp, second)
            assert_equal_on(group, dict(ddp.named_parameters()))
    model = linears()
    build_optimizer(model, **RATES, algorithm="dion", sync="compressed", strategy=group)
    assert not model._ddp_params_and_buffers_to_ignore
    first = build_optimizer(model, **RATES, algorithm="dion", sync="compressed", strategy=group)
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight"]
    ddp = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="wrapped in DistributedDataParallel for an optimizer with sync='compressed'"):
        build_optimizer(ddp, **RATES, strategy=group)
    step_on(ddp, first)
    is_first = dist.get_rank() == 0
    expected = pytest.warns(UserWarning, match="compresses nothing") if is_first else contextlib.nullcontext()
    with expected:
        build_optimizer(linears(), **RATES, algorithm="dion", sync="compressed", rank_fraction=1.0, strategy=group)


def check_plain_modules() -> None:
    check_all_compressed()
    check_later_optimizers()


def test_plain_modules() -> None:
    run_on_ranks(2, check_plain_modules)
