"""Each framework resumes bit for bit on the device, in half precision: the optimizer, and torch's AdamW as a control.

The uninterrupted run saves the checkpoint. The tests of the frameworks do the same on the CPU in float32, with killed
processes and under every layout.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dion2_lightning import Dion2Factory
from tests.integrations.conftest import fresh_accelerator_state  # noqa: F401  a fixture
from tests.integrations.huggingface import assert_same, make_accelerator, whole
from tests.integrations.lightning_training import fit
from tests.integrations.resume import OPTIMIZERS, STEPS, STOP, WITH_DION3_AND_DION, make_optimizer, unwrapped
from tests.integrations.test_accelerate import loader_of, train_on
from tests.integrations.test_lightning_checkpoints import FILE, Saving
from tests.integrations.test_trainer import ADAMW, arguments, make_trainer
from tests.integrations.training import SETTINGS, make_model

Outcome = tuple[list[float], dict[str, Tensor]]
"""Losses, and weights with their state."""

SIZES = {"hidden_size": 128, "intermediate_size": 256}
"""Large enough for products in half precision: 32 slices are selected."""

HALF = {"orthonormalize_dtype": "bfloat16"}


def in_lightning(kind: str, precision: str, folder: Path, device: str, resumed: bool) -> Outcome:
    module, trainer = fit(
        "one device",
        kind,
        steps=STEPS,
        seed=int(resumed),
        checkpoint=folder / FILE if resumed else None,
        config=SIZES,
        settings=HALF,
        callbacks=[] if resumed else [Saving(folder)],
        accelerator=device,
        precision=f"bf16-{precision}",
    )
    return module.losses, whole(module, trainer.optimizers[0])


def in_accelerate(kind: str, precision: str, folder: Path, device: str, resumed: bool) -> Outcome:
    accelerator = make_accelerator(
        "one device", cpu=device == "cpu", mixed_precision="bf16" if precision == "mixed" else "no"
    )
    model = model_of(precision, resumed)
    optimizer = make_optimizer(kind, model, strategy=accelerator, **HALF)
    model, wrapped, loader = accelerator.prepare(model, optimizer, loader_of(accelerator, STEPS))
    losses = []
    if resumed:
        accelerator.load_state(str(folder))
        loader = accelerator.skip_first_batches(loader, STOP)
    for index, batch in enumerate(loader):
        losses += train_on(accelerator, [batch], model, wrapped)
        if not resumed and index == STOP - 1:
            accelerator.save_state(str(folder))
    accelerator.free_memory()
    return losses, whole(model, optimizer)


def in_the_trainer(kind: str, precision: str, folder: Path, device: str, resumed: bool) -> Outcome:
    args = arguments(
        folder,
        lr_scheduler_type="linear",
        save_strategy="steps",
        save_steps=STOP,
        use_cpu=device == "cpu",
        bf16=precision == "mixed",
    )
    model = model_of(precision, resumed)
    ours = (Dion2Factory, {**SETTINGS, **WITH_DION3_AND_DION, **HALF})
    trainer = make_trainer(args, model, ADAMW if kind == "AdamW" else ours)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resumed else None)
    return trainer.losses, whole(trainer.model, unwrapped(trainer.optimizer))


def model_of(precision: str, resumed: bool) -> nn.Module:
    """In bfloat16 throughout, or only where autocast says so; a resumed run begins with other weights."""
    model = make_model(seed=int(resumed), **SIZES)
    return model.to(torch.bfloat16) if precision == "true" else model


FRAMEWORKS: tuple[Callable[[str, str, Path, str, bool], Outcome], ...] = (in_lightning, in_accelerate, in_the_trainer)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On the CPU only Dion2 and the harder precision: the tests of the frameworks have the control there."""
    on_gpu = metafunc.config.getoption("device") == "cuda"
    metafunc.parametrize("kind", OPTIMIZERS if on_gpu else OPTIMIZERS[1:])
    metafunc.parametrize("precision", ["mixed", "true"] if on_gpu else ["true"])


@pytest.mark.parametrize("train", FRAMEWORKS, ids=lambda train: train.__name__)
@pytest.mark.usefixtures("deterministic_mode_is_restored")
def test_resumed_equals_uninterrupted(
    train: Callable[..., Outcome], precision: str, kind: str, device: str, tmp_path: Path
) -> None:
    # Some backward kernels add up in no fixed order otherwise. Those without a deterministic version are not ours: they
    # may warn.
    torch.set_deterministic_debug_mode("warn")
    losses, uninterrupted = train(kind, precision, tmp_path, device, False)
    resumed_losses, resumed = train(kind, precision, tmp_path, device, True)
    assert len(losses) == STEPS
    assert resumed_losses == losses[STOP:]
    assert_same(resumed, uninterrupted)
    assert all(tensor.isfinite().all() for tensor in resumed.values())
    momenta = [tensor for name, tensor in resumed.items() if name.endswith(": momentum")]
    assert bool(momenta) == (kind != "AdamW")
    assert all(momentum.dtype == torch.float32 for momentum in momenta)
