"""Accelerate: built before or after prepare, precisions, accumulation, scaling, schedules, and what is refused."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import PartialState
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from dion2_lightning import Dion2, build_optimizer
from tests.distributed.ranks import run_like_torchrun
from tests.integrations import test_plain_loop
from tests.integrations.huggingface import (
    assert_same,
    fsdp2_on_cpu,
    fsdp_plugin,
    make_accelerator,
    whole,
)
from tests.integrations.test_accelerate import loader_of, train_on
from tests.integrations.training import SETTINGS, make_model

STEPS = 3


def build_before(accelerator: Accelerator) -> tuple[nn.Module, Dion2, Any]:
    model = make_model()
    optimizer = build_optimizer(model, **SETTINGS, strategy=accelerator)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    return prepared, optimizer, wrapped


def build_after(accelerator: Accelerator) -> tuple[nn.Module, Dion2, Any]:
    model = make_model()
    if accelerator.is_fsdp2:  # which asks for some optimizer beside the model
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    else:
        model = accelerator.prepare(model)
    optimizer = build_optimizer(model, **SETTINGS, strategy=accelerator)
    return model, optimizer, accelerator.prepare_optimizer(optimizer)


def check_before_and_after(layout: str) -> None:
    accelerator = make_accelerator(layout)
    loader = accelerator.prepare(loader_of(accelerator, STEPS))
    outcomes = []
    for build in (build_before, build_after):
        model, optimizer, wrapped = build(accelerator)
        train_on(accelerator, loader, model, wrapped)
        assert isinstance(next(model.parameters()), DTensor) == (layout != "DDP")
        assert (optimizer.process_group is not None) == (layout == "DDP")
        outcomes.append(whole(model, optimizer))
        accelerator.free_memory()  # so that it clips the next model's gradients alone
    assert_same(*outcomes)


@pytest.mark.parametrize("layout", ["DDP", "FSDP2, full"])
def test_before_or_after_prepare(layout: str) -> None:
    run_like_torchrun(2, check_before_and_after, layout)


# Precisions


def check_parameters_are_upcast() -> None:
    """FSDP2 under mixed precision makes float32 of the parameters after the optimizer was made."""
    accelerator = make_accelerator("FSDP2, full", mixed_precision="bf16")
    model = make_model().to(torch.bfloat16)
    optimizer = build_optimizer(model, **SETTINGS, strategy=accelerator)
    model, wrapped, loader = accelerator.prepare(model, optimizer, loader_of(accelerator, STEPS))
    losses = torch.tensor(train_on(accelerator, loader, model, wrapped))
    parameters = list(model.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert optimizer.state.keys() == set(parameters)
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert accelerator.reduce(losses, "mean").tolist() == pytest.approx(test_plain_loop.loss_curve(STEPS), rel=0.02)


def test_parameters_that_are_upcast_by_prepare() -> None:
    run_like_torchrun(2, check_parameters_are_upcast)


def test_autocast() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer, wrapped = build_before(accelerator)
    losses = train_on(accelerator, loader_of(accelerator, STEPS), model, wrapped)
    assert losses != pytest.approx(test_plain_loop.loss_curve(STEPS), abs=1e-5), "nothing was computed in bfloat16"
    assert losses == pytest.approx(test_plain_loop.loss_curve(STEPS), rel=0.02)
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}


# Steps


def test_accumulated_gradients() -> None:
    """Two halves of a batch make one step, and one of the scheduler."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, wrapped = build_before(accelerator)
    scheduler = accelerator.prepare(LambdaLR(wrapped, lambda step: 1.0))
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for batch in loader_of(accelerator, STEPS):
        for half in (slice(0, 2), slice(2, 4)):
            with accelerator.accumulate(model):
                loss = model(**{name: value[half] for name, value in batch.items()}).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
    assert (len(steps), scheduler.scheduler.last_epoch) == (STEPS, STEPS)
    accelerator.gradient_state._reset_state()

    plain_model, _, plain = build_before(accelerator)
    train_on(accelerator, loader_of(accelerator, STEPS), plain_model, plain)
    for name, expected in whole(plain_model).items():
        assert torch.allclose(whole(model)[name], expected, atol=1e-5), name


def test_a_step_with_infinite_gradients_is_skipped_by_the_scaler() -> None:
    accelerator = Accelerator(cpu=True)
    model = make_model()
    optimizer = build_optimizer(model, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    batches = list(loader_of(accelerator, 3))

    def step(has_inf: bool) -> None:
        scaler.scale(model(**batches[0]).loss).backward()
        if has_inf:
            model.model.layers[0].mlp.up_proj.weight.grad[3, 5] = float("inf")
        scaler.unscale_(optimizer)
        wrapped.step()
        wrapped.zero_grad()

    untouched = whole(model)
    step(has_inf=True)
    assert wrapped.step_was_skipped
    assert_same(whole(model, optimizer), untouched)  # no state either

    step(has_inf=False)
    assert not wrapped.step_was_skipped
    trained = whole(model, optimizer)
    assert not torch.equal(trained["lm_head.weight"], untouched["lm_head.weight"])

    step(has_inf=True)
    assert wrapped.step_was_skipped
    assert_same(whole(model, optimizer), trained)
    assert scaler.get_scale() == 0.5


def check_ranks_skip_together() -> None:
    """An infinite gradient in one rank's shard stops the step on both."""
    accelerator = make_accelerator("FSDP2, full")
    model, optimizer, _ = build_before(accelerator)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    batch = next(iter(accelerator.prepare(loader_of(accelerator, 1))))
    before = whole(model)
    for has_inf in (True, False):
        scaler.scale(model(**batch).loss).backward()
        if has_inf and accelerator.process_index == 1:
            model.model.layers[0].mlp.up_proj.weight.grad.to_local()[3, 5] = float("inf")
        scaler.unscale_(optimizer)
        wrapped.step()
        wrapped.zero_grad()
        assert wrapped.step_was_skipped == has_inf
        if has_inf:
            assert_same(whole(model, optimizer), before)
    assert not torch.equal(whole(model)["lm_head.weight"], before["lm_head.weight"])


def test_ranks_skip_together() -> None:
    run_like_torchrun(2, check_ranks_skip_together)


def test_a_closure_is_called_once() -> None:
    accelerator = Accelerator(cpu=True)
    model, _, wrapped = build_before(accelerator)
    (batch,) = loader_of(accelerator, 1)
    calls = []

    def closure() -> float:
        calls.append(1)
        loss = model(**batch).loss
        accelerator.backward(loss)
        return loss.item()

    before = whole(model)
    wrapped.step(closure)
    assert calls == [1]
    assert not torch.equal(whole(model)["lm_head.weight"], before["lm_head.weight"])


def test_a_prepared_schedule_moves_all_groups() -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, wrapped = build_before(accelerator)
    scheduler = accelerator.prepare(LambdaLR(wrapped, lambda step: 0.5**step))
    train_on(accelerator, loader_of(accelerator, STEPS), model, wrapped, scheduler)
    lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert lrs == {"dion2": 3e-3 / 8, "adamw": 2e-3 / 8, "adamw-no-decay": 2e-3 / 8}


# CPU offload, and what is refused


def check_offload() -> None:
    fsdp2_on_cpu()
    # There is no memory to pin without a GPU.
    plugin = fsdp_plugin(cpu_offload=CPUOffloadPolicy(pin_memory=False))
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model, _, wrapped = build_before(accelerator)
    loader = accelerator.prepare(loader_of(accelerator, STEPS))
    losses = torch.tensor(train_on(accelerator, loader, model, wrapped))
    assert accelerator.reduce(losses, "mean").tolist() == pytest.approx(test_plain_loop.loss_curve(STEPS), abs=1e-4)


def test_parameters_offloaded_to_the_cpu() -> None:
    run_like_torchrun(2, check_offload)


def check_fsdp1_is_refused() -> None:
    fsdp2_on_cpu()
    accelerator = Accelerator(cpu=True, fsdp_plugin=fsdp_plugin(fsdp_version=1, reshard_after_forward="FULL_SHARD"))
    # FSDP1 does not take "cpu:0", which a world of GPUs has made of the device.
    PartialState._shared_state["device"] = accelerator.state.device = torch.device("cpu")
    model = make_model()
    with pytest.raises(ValueError, match=r"Accelerator with FSDP1 flattens matrices.*fsdp_version=2"):
        build_optimizer(model, **SETTINGS, strategy=accelerator)
    prepared = accelerator.prepare(model)
    with pytest.raises(ValueError, match=r"FSDP1.*FSDP2"):
        build_optimizer(prepared, **SETTINGS)


def test_fsdp1_is_refused() -> None:
    run_like_torchrun(2, check_fsdp1_is_refused)
