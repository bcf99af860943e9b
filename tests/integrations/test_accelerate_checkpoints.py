"""Accelerate's checkpoints: moved between numbers of ranks, of awkward models, and of other optimizers."""

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dion2_lightning import Dion2, build_optimizer
from tests.distributed.ranks import run_like_torchrun
from tests.integrations.huggingface import STATE_DICTS, assert_same, make_accelerator, whole
from tests.integrations.test_accelerate import loader_of, train_on
from tests.integrations.training import SETTINGS, make_model

STEPS = 3


def awkward_model(seed: int) -> nn.Module:
    """bfloat16 with tied embeddings, a frozen matrix, and a matrix that never has a gradient."""
    model = make_model(seed, tie_word_embeddings=True)
    model.model.layers[0].unused = nn.Linear(32, 32, bias=False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    return model.to(torch.bfloat16)


def prepared(accelerator: Accelerator, model: nn.Module) -> tuple[nn.Module, Dion2, Any]:
    optimizer = build_optimizer(model, **SETTINGS, strategy=accelerator)
    model, wrapped = accelerator.prepare(model, optimizer)
    return model, optimizer, wrapped


def train_and_save(layout: str, folder: Path) -> None:
    accelerator = make_accelerator(layout)
    model, optimizer, wrapped = prepared(accelerator, awkward_model(seed=0))
    train_on(accelerator, accelerator.prepare(loader_of(accelerator, STEPS)), model, wrapped)
    accelerator.save_state(str(folder / "two"))
    trained = whole(model, optimizer)
    momentum = trained["model.layers.0.mlp.up_proj.weight: momentum"]
    assert momentum.dtype == torch.float32
    assert not torch.equal(momentum, momentum.to(torch.bfloat16).float()), "rounding would not be noticed"
    assert not trained["model.layers.0.unused.weight: momentum"].any()
    if accelerator.is_main_process:
        torch.save(trained, folder / "trained.pt")


def load_compare_and_save(layout: str, folder: Path, source: str, target: str) -> None:
    accelerator = make_accelerator(layout)
    model, optimizer, _ = prepared(accelerator, awkward_model(seed=1))
    accelerator.load_state(str(folder / source))
    assert_same(whole(model, optimizer), torch.load(folder / "trained.pt"))
    accelerator.save_state(str(folder / target))


@pytest.mark.parametrize("layout", STATE_DICTS)
def test_fsdp2_from_two_ranks_to_four_to_two_to_one(layout: str, tmp_path: Path) -> None:
    run_like_torchrun(2, train_and_save, layout, tmp_path)
    run_like_torchrun(4, load_compare_and_save, layout, tmp_path, "two", "four")
    run_like_torchrun(2, load_compare_and_save, layout, tmp_path, "four", "last")

    # The files name the parameters, so that one process loads them without Accelerate.
    files = {"model": "pytorch_model_fsdp", "optimizer": "optimizer"}
    if STATE_DICTS[layout] == "SHARDED_STATE_DICT":
        for name in files.values():
            dcp_to_torch_save(tmp_path / "last" / f"{name}_0", tmp_path / "last" / f"{name}.bin")
    saved = {key: torch.load(tmp_path / "last" / f"{name}.bin", weights_only=True) for key, name in files.items()}
    saved = {key: value.get(key, value) for key, value in saved.items()}
    model = awkward_model(seed=1)
    optimizer = build_optimizer(model, **SETTINGS)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert_same(whole(model, optimizer), torch.load(tmp_path / "trained.pt"))


def load_and_save(source: Path, target: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, _ = prepared(accelerator, make_model(seed=1).to(torch.bfloat16))
    accelerator.load_state(str(source))
    assert_same(whole(model, optimizer), torch.load(source / "trained.pt"))
    accelerator.save_state(str(target))


def test_from_one_process_to_ddp_and_back(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, wrapped = prepared(accelerator, make_model().to(torch.bfloat16))
    train_on(accelerator, loader_of(accelerator, STEPS), model, wrapped)
    accelerator.save_state(str(tmp_path / "one"))
    trained = whole(model, optimizer)
    torch.save(trained, tmp_path / "one" / "trained.pt")
    run_like_torchrun(2, load_and_save, tmp_path / "one", tmp_path / "two")

    accelerator.free_memory()
    model, optimizer, _ = prepared(accelerator, make_model(seed=1).to(torch.bfloat16))
    accelerator.load_state(str(tmp_path / "two"))
    assert_same(whole(model, optimizer), trained)


# What does not fit


def saved(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """A checkpoint after one step."""
    accelerator = Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(model, optimizer)
    train_on(accelerator, loader_of(accelerator, 1), model, wrapped)
    accelerator.save_state(str(folder))
    accelerator.free_memory()
    return folder


def of_adamw(folder: Path) -> None:
    model = make_model()
    saved(folder, model, torch.optim.AdamW(model.parameters()))


def of_adamw_by_groups(folder: Path) -> None:
    """AdamW of as many groups, with as many parameters each."""
    model = make_model()
    groups = [{"params": group["params"]} for group in build_optimizer(model, **SETTINGS).param_groups]
    saved(folder, model, torch.optim.AdamW(groups))


def of_another_depth(folder: Path) -> None:
    model = make_model(num_hidden_layers=3)
    saved(folder, model, build_optimizer(model, **SETTINGS))


def of_another_width(folder: Path) -> None:
    model = make_model(intermediate_size=48)
    saved(folder, model, build_optimizer(model, **SETTINGS))


def of_fewer_groups(folder: Path) -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    saved(folder, model, build_optimizer(model, **SETTINGS))


def truncated(folder: Path) -> None:
    model = make_model()
    saved(folder, model, build_optimizer(model, **SETTINGS))
    file = folder / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-1000])


FOREIGN = {
    of_adamw: "the checkpoint is of another optimizer: its groups say no algorithm and have amsgrad, ",
    of_adamw_by_groups: "the checkpoint is of another optimizer: its groups say no algorithm and have amsgrad, ",
    of_another_depth: r"group 'dion2': the checkpoint has 21 parameters, this optimizer 14; it is of another model",
    of_another_width: r"gate_proj.weight': the checkpoint's 'momentum' has shape \(48, 32\), this optimizer's \(64",
    of_fewer_groups: r"the checkpoint has 2 groups, \['dion2', 'adamw'\]; this optimizer 3, \['dion2',",
    truncated: "PytorchStreamReader failed reading zip archive",
}


@pytest.mark.parametrize("made", FOREIGN, ids=lambda made: made.__name__)
def test_what_does_not_fit_is_refused_whole(made: Any, tmp_path: Path) -> None:
    made(tmp_path / "foreign")
    accelerator = Accelerator(cpu=True)
    model, optimizer, wrapped = prepared(accelerator, make_model(seed=1))
    train_on(accelerator, loader_of(accelerator, 1), model, wrapped)
    # The weights of another architecture fail before; what the optimizer says is asked here.
    model_file = tmp_path / "foreign" / "model.safetensors"
    model_file.unlink()
    accelerator.save_model(model, str(tmp_path / "own"))
    (tmp_path / "own" / "model.safetensors").rename(model_file)
    before, groups = whole(model, optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises((ValueError, RuntimeError), match=FOREIGN[made]):
        accelerator.load_state(str(tmp_path / "foreign"))
    assert_same(whole(model, optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


def save_adamw_then_load_dion2(layout: str, folder: Path) -> None:
    accelerator = make_accelerator(layout)
    model = make_model()
    model, wrapped = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    train_on(accelerator, accelerator.prepare(loader_of(accelerator, 1)), model, wrapped)
    accelerator.save_state(str(folder))
    accelerator.free_memory()

    model, optimizer, _ = prepared(accelerator, make_model(seed=1))
    with pytest.raises((ValueError, RuntimeError, CheckpointException)) as raised:
        accelerator.load_state(str(folder))
    name = "model.layers.0.self_attn.q_proj.weight"
    if layout == "FSDP2, sharded":
        assert f"Missing key in checkpoint state_dict: optimizer.state.{name}.momentum" in str(raised.value)
        assert all(not value.any() for value in chain(*(state.values() for state in optimizer.state.values())))
    elif accelerator.is_main_process:  # which alone has read the file; the others only see it go
        assert str(raised.value).startswith(f"group 'dion2': parameter '{name}': the checkpoint holds ['exp_avg', ")


@pytest.mark.parametrize("layout", STATE_DICTS)
def test_a_sharded_checkpoint_of_adamw_is_refused(layout: str, tmp_path: Path) -> None:
    run_like_torchrun(2, save_adamw_then_load_dion2, layout, tmp_path)
