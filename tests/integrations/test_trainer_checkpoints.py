"""The Trainer's checkpoints: of awkward models and LoRA, moved between numbers of ranks, and of other optimizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from dion2_lightning import Dion2, Dion2Factory, build_optimizer
from tests.distributed.ranks import run_like_torchrun
from tests.integrations.huggingface import STATE_DICTS, assert_same, fsdp2_on_cpu, plain_groups, whole
from tests.integrations.resume import unwrapped
from tests.integrations.test_trainer import FSDP, InOrder, arguments, make_trainer
from tests.integrations.training import SETTINGS, make_model

STOP, STEPS = 2, 4


def tied_frozen_unused(seed: int) -> nn.Module:
    """bfloat16 with tied embeddings, a frozen matrix, and a matrix that never has a gradient."""
    model = make_model(seed, tie_word_embeddings=True)
    model.model.layers[0].unused = nn.Linear(32, 32, bias=False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    return model.to(torch.bfloat16)


def with_lora(seed: int) -> nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.0)
    model: nn.Module = get_peft_model(make_model(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)  # B is 0 otherwise, and so is A's first gradient
    return model


MODELS: dict[str, tuple[Callable[[int], nn.Module], dict[str, Any], int]] = {
    "tied, frozen, unused": (tied_frozen_unused, {}, 14),
    "LoRA": (with_lora, {}, 8),
    "LoRA by AdamW": (with_lora, {"lora": "adamw"}, 0),
    "LoRA, B by Dion2": (with_lora, {"lora": "B"}, 4),
}
"""How to make them from a seed, further settings, and how many parameters Dion2 updates."""


@pytest.mark.filterwarnings("error:the checkpoint's settings replace")
@pytest.mark.parametrize("name", MODELS)
def test_resume(name: str, tmp_path: Path) -> None:
    make, settings, matrices = MODELS[name]
    pair = (Dion2Factory, {**SETTINGS, **settings})
    run = {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": STOP}
    uninterrupted = make_trainer(arguments(tmp_path, steps=STEPS, **run), make(0), pair)
    uninterrupted.train()
    resumed = make_trainer(arguments(tmp_path, steps=STEPS, **run), make(0 if "LoRA" not in name else 1), pair)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert resumed.losses == uninterrupted.losses[STOP:]
    optimizer = dion2_of(resumed)
    assert_same(whole(resumed.model, optimizer), whole(uninterrupted.model, dion2_of(uninterrupted)))
    updated = [p for group in optimizer.param_groups if group["algorithm"] == "dion2" for p in group["params"]]
    assert len(updated) == matrices
    assert len(optimizer.state) == sum(parameter.requires_grad for parameter in resumed.model.parameters())
    assert {optimizer.state[parameter]["momentum"].dtype for parameter in updated} <= {torch.float32}


def dion2_of(trainer: InOrder) -> Dion2:
    optimizer = unwrapped(trainer.optimizer)
    assert isinstance(optimizer, Dion2)
    return optimizer


def check_lora_under_fsdp2(folder: Path) -> None:
    fsdp2_on_cpu()
    run = {"fsdp": True, "fsdp_config": FSDP, "save_strategy": "steps", "save_steps": STOP}
    pair = (Dion2Factory, {**SETTINGS, "lora": "B"})
    uninterrupted = make_trainer(arguments(folder, 2, STEPS, **run), with_lora(0), pair)
    uninterrupted.train()
    resumed = make_trainer(arguments(folder, 2, STEPS, **run), with_lora(1), pair)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}"))
    assert resumed.losses == uninterrupted.losses[STOP:]
    assert_same(whole(resumed.model, dion2_of(resumed)), whole(uninterrupted.model, dion2_of(uninterrupted)))
    assert sum(len(group["params"]) for group in dion2_of(resumed).param_groups if group["algorithm"] == "dion2") == 4


def test_resume_lora_under_fsdp2(tmp_path: Path) -> None:
    run_like_torchrun(2, check_lora_under_fsdp2, tmp_path)


# Other numbers of ranks


class CompareAtTheStart(TrainerCallback):
    """Compares what a trainer has loaded with what was saved."""

    def __init__(self, trainer: InOrder, expected: Path) -> None:
        self.trainer, self.expected, self.has_compared = trainer, expected, False

    def on_train_begin(self, *arguments: Any, **settings: Any) -> None:
        assert_same(whole(self.trainer.model, dion2_of(self.trainer)), torch.load(self.expected))
        self.has_compared = True


def train_to(step: int, ranks: int, layout: str, folder: Path) -> None:
    """Train one more step than the checkpoint in the folder has, if there is one."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": step}
    if layout in STATE_DICTS:
        fsdp2_on_cpu()
        settings |= {"fsdp": True, "fsdp_config": {**FSDP, "state_dict_type": STATE_DICTS[layout]}}
    args = arguments(folder, ranks, step, **settings)
    trainer = make_trainer(args, make_model(seed=step))
    if step == 1:
        trainer.train()
    else:
        comparison = CompareAtTheStart(trainer, folder / f"{step - 1}.pt")
        trainer.add_callback(comparison)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step - 1}"))
        assert comparison.has_compared
    trained = whole(trainer.model, dion2_of(trainer))
    if args.process_index == 0:
        torch.save(trained, folder / f"{step}.pt")


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [("DDP", (1, 2, 1)), ("FSDP2, sharded", (2, 4, 2))],
)
def test_other_numbers_of_ranks(layout: str, ranks: tuple[int, int, int], tmp_path: Path) -> None:
    for step, number in enumerate(ranks, start=1):
        run_like_torchrun(number, train_to, step, number, layout, tmp_path)


# What does not fit


def of_adamw(folder: Path) -> None:
    args = arguments(folder, steps=1, save_strategy="steps", save_steps=1)
    make_trainer(args, make_model(), (torch.optim.AdamW, {"lr": 1e-3})).train()


def of_dion2(folder: Path) -> None:
    make_trainer(arguments(folder, steps=1, save_strategy="steps", save_steps=1), make_model()).train()


def of_another_model(folder: Path) -> None:
    """Only optimizer.pt: the Trainer refuses the weights of another model by itself."""
    of_dion2(folder)
    model = make_model(num_hidden_layers=1)
    model(**{name: torch.zeros(1, 4, dtype=torch.long) for name in ("input_ids", "labels")}).loss.backward()
    optimizer = build_optimizer(model, **SETTINGS)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "checkpoint-1" / "optimizer.pt")


def with_a_group_less(folder: Path) -> None:
    of_dion2(folder)
    file = folder / "checkpoint-1" / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    saved["param_groups"].pop()
    torch.save(saved, file)


def truncated(folder: Path) -> None:
    of_dion2(folder)
    file = folder / "checkpoint-1" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1000])


FOREIGN = {
    of_adamw: r"the checkpoint is of another optimizer: .* from_pretrained\(\) and train\(\) without resume_",
    of_another_model: r"group 'dion2': the checkpoint has 7 parameters, this optimizer 14; it is of another model",
    with_a_group_less: r"the checkpoint has 2 groups, \['dion2', 'adamw'\]; this optimizer 3",
    truncated: "PytorchStreamReader failed reading zip archive",
}


@pytest.mark.parametrize("made", FOREIGN, ids=lambda made: made.__name__)
def test_what_does_not_fit_is_refused_whole(made: Any, tmp_path: Path) -> None:
    made(tmp_path)
    trainer = make_trainer(arguments(tmp_path, steps=2), make_model())
    with pytest.raises((ValueError, RuntimeError), match=FOREIGN[made]):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not trainer.losses
    assert not dion2_of(trainer).state
    assert plain_groups(dion2_of(trainer)) == plain_groups(build_optimizer(make_model(), **SETTINGS))
