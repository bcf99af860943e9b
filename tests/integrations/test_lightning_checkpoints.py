"""Checkpoints in Lightning: exact resume under every strategy, from one strategy to another, and what does not fit."""

import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import dion2_lightning
from dion2_lightning import NamedOptimizerStates
from tests.distributed.ranks import kill_this_process, run_like_torchrun
from tests.integrations.lightning_training import Llama, Scheduled, fit, make_trainer, ranks_of
from tests.integrations.resume import STEPS, STOP, Phase, check_resume, write_outcome
from tests.integrations.training import make_model

FILE = "checkpoint.ckpt"


class Kill(L.Callback):
    """Ends the process once the checkpoint is there."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == STOP:
            kill_this_process()


def saving(folder: Path) -> ModelCheckpoint:
    """Save after ``STOP`` steps, as ``FILE``."""
    name = FILE.removesuffix(".ckpt")
    return ModelCheckpoint(folder, name, every_n_train_steps=STOP, save_top_k=-1, enable_version_counter=False)


def train_in_lightning(layout: str, kind: str, phase: Phase, folder: Path) -> None:
    killed, resumed = phase is Phase.KILLED, phase is Phase.RESUMED
    module, trainer = fit(
        layout,
        kind,
        module_class=Scheduled,
        steps=STEPS,
        seed=1 if resumed else 0,
        checkpoint=folder / FILE if resumed else None,
        callbacks=[Kill(), saving(folder)] if killed else [],
        enable_checkpointing=killed,
    )
    write_outcome(folder, phase, module.named_parameters(), trainer.optimizers[0], module.losses)


@pytest.mark.parametrize("layout", ["one device", "DDP", "FSDP2", "FSDP2, sharded file", "TP", "FSDP2 x TP"])
def test_resume(layout: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    check_resume(train_in_lightning, "Lightning", layout, ranks_of(layout), tmp_path, record_property)


# From one strategy to another

TWO_GROUPS_OF_MATRICES = {"overrides": {"*.layers.1.*_proj.weight": {"lr": 1e-3}}}
"""With equal shapes in both groups, and the parameters of neither in one piece of the model."""


def make_awkward(model: nn.Module) -> None:
    """A frozen matrix, and one that never has a gradient."""
    model.model.layers[0].self_attn.k_proj.requires_grad_(False)
    model.model.unused = nn.Linear(32, 32, bias=False)


def train_awkward(layout: str, seed: int, checkpoint: Path | None = None, save: Path | None = None) -> None:
    """Train ``STOP`` steps, or load what has; save; write weights and state by name."""
    module, trainer = fit(
        layout,
        steps=STOP,
        seed=seed,
        checkpoint=checkpoint,
        config={"tie_word_embeddings": True},
        settings=TWO_GROUPS_OF_MATRICES,
        change=make_awkward,
        options={"find_unused_parameters": True},
        callbacks=[saving(save)] if save is not None else [],
        enable_checkpointing=save is not None,
    )
    assert len(module.losses) == (0 if checkpoint is not None else STOP)
    if checkpoint is not None and save is not None:
        trainer.save_checkpoint(save / FILE)
    optimizer = trainer.optimizers[0]
    assert [group["algorithm"] for group in optimizer.param_groups].count("dion2") == 2
    folder = save if checkpoint is None else checkpoint.parent / f"loaded by {layout}"
    folder.mkdir(exist_ok=True)
    write_outcome(folder, Phase.UNINTERRUPTED, module.named_parameters(), optimizer, [])


def outcome(folder: Path) -> dict[str, Tensor]:
    result: dict[str, Tensor] = torch.load(folder / f"{Phase.UNINTERRUPTED.value} 0.pt")
    return result


def check_same(loaded: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    assert any("momentum" in name for name in saved)
    assert "model.model.unused.weight: momentum" in saved
    assert loaded.keys() == saved.keys()
    for name, expected in saved.items():
        assert torch.equal(loaded[name], expected), name


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint that a layout has saved, once."""
    folders: dict[str, Path] = {}

    def folder_of(layout: str) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp("saved")
            run_like_torchrun(ranks_of(layout), train_awkward, layout, 0, None, folders[layout])
        return folders[layout]

    return folder_of


@pytest.mark.parametrize(
    ("saving_layout", "loading_layout"),
    [
        ("one device", "FSDP2"),
        ("one device", "DDP"),
        ("one device", "TP"),
        ("one device", "FSDP2 x TP"),
        ("DDP", "FSDP2"),
        ("DDP", "one device"),
        ("FSDP2", "one device"),
        ("FSDP2", "DDP"),
        ("FSDP2", "FSDP2, 4 ranks"),
        ("TP", "FSDP2"),
        ("FSDP2 x TP", "one device"),
        ("FSDP2, sharded file", "FSDP2 x TP"),
    ],
)
def test_every_state_comes_back_to_its_parameter(
    saved_by: Callable[[str], Path], saving_layout: str, loading_layout: str
) -> None:
    folder = saved_by(saving_layout)
    run_like_torchrun(ranks_of(loading_layout), train_awkward, loading_layout, 1, folder / FILE)
    check_same(outcome(folder / f"loaded by {loading_layout}"), outcome(folder))


def test_sharded_files_from_two_ranks_to_four_and_back(saved_by: Callable[[str], Path], tmp_path: Path) -> None:
    two, four = "FSDP2, sharded file", "FSDP2, 4 ranks, sharded file"
    folder = saved_by(two)
    run_like_torchrun(4, train_awkward, four, 1, folder / FILE, tmp_path)
    check_same(outcome(folder / f"loaded by {four}"), outcome(folder))
    run_like_torchrun(2, train_awkward, two, 2, tmp_path / FILE)
    check_same(outcome(tmp_path / f"loaded by {two}"), outcome(folder))


class Stack(L.LightningModule):
    """Four matrices of one shape in two groups: nothing but their names tells their states apart.

    Args:
        layout: ``"one device"`` or ``"FSDP2"``.
        given: What ``build_optimizer`` is given in ``configure_optimizers``, one of ``GIVEN``.
    """

    def __init__(self, layout: str, given: str = "the module") -> None:
        super().__init__()
        self.layout, self.given = layout, given
        self.layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))

    def configure_model(self) -> None:
        if self.layout == "FSDP2" and not hasattr(self.layers[0].weight, "device_mesh"):
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> dion2_lightning.Dion2:
        strategies = {"the module, the strategy": self.trainer.strategy, "a part, the strategy": self.trainer.strategy}
        return dion2_lightning.build_optimizer(
            self.layers if "a part" in self.given else self,
            lr=0.01,
            overrides={"*[13].weight": {"lr": 0.02}},
            strategy=strategies.get(self.given),
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(4, 8), batch_size=2)


GIVEN = ("the module", "the module, the strategy", "a part, the strategy", "a part")


def with_entry_points(folder: Path) -> str:
    """A folder for the front of ``sys.path``: a package of this one's name with its entry points and nothing else."""
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]["entry-points"]
    installed = folder / "dion2_lightning-9.9.dist-info"
    installed.mkdir(exist_ok=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: dion2-lightning\nVersion: 9.9\n")
    (installed / "entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "\n".join(f"{name} = {it}" for name, it in of.items()) for group, of in declared.items()
        )
    )
    return str(folder)


class WithoutNames(L.Callback):
    """Takes out the callback that build_optimizer has added."""

    def on_fit_start(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, NamedOptimizerStates)]


def save_stack(path: Path, with_names: bool = True, given: str = "the module") -> None:
    torch.manual_seed(0)
    trainer, module = (
        make_trainer("one device", 2, callbacks=[] if with_names else [WithoutNames()]),
        Stack("one device", given),
    )
    trainer.fit(module)
    trainer.save_checkpoint(path)
    write_outcome(path.parent, Phase.KILLED, module.named_parameters(), trainer.optimizers[0], [])


def load_stack(path: Path, given: str = "the module") -> None:
    if given == "a part":
        sys.path.insert(0, with_entry_points(path.parent))
    trainer, module = make_trainer("FSDP2", 2), Stack("FSDP2", given)
    trainer.fit(module, ckpt_path=path)
    write_outcome(path.parent, Phase.RESUMED, module.named_parameters(), trainer.optimizers[0], [])


def load_stack_in_vain(path: Path, given: str) -> None:
    with pytest.raises(RuntimeError, match="states went to other parameters"):
        load_stack(path, given)


@pytest.mark.parametrize("given", ["the module", "a part"])
def test_states_that_lightning_has_swapped_are_refused(given: str, tmp_path: Path) -> None:
    """All shapes are equal, and so are the groups' sizes: Lightning and torch notice nothing."""
    save_stack(tmp_path / FILE, False, given)
    state = torch.load(tmp_path / FILE, weights_only=True)["optimizer_states"][0]
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3]]
    run_like_torchrun(2, load_stack_in_vain, tmp_path / FILE, given)


@pytest.mark.parametrize("given", GIVEN)
def test_the_same_checkpoint_with_names_is_loaded(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever build_optimizer is given: the Trainer is found, or has the callback by the entry point."""
    if given == "a part":
        monkeypatch.syspath_prepend(with_entry_points(tmp_path))
    save_stack(tmp_path / FILE, True, given)
    state = torch.load(tmp_path / FILE, weights_only=True)["optimizer_states"][0]
    assert [group["params"] for group in state["param_groups"]] == [
        ["layers.0.weight", "layers.2.weight"],
        ["layers.1.weight", "layers.3.weight"],
    ]
    run_like_torchrun(2, load_stack, tmp_path / FILE, given)
    saved, loaded = (torch.load(tmp_path / f"{phase.value} 0.pt") for phase in (Phase.KILLED, Phase.RESUMED))
    assert sum("momentum" in name for name in saved) == 4
    assert saved.keys() == loaded.keys()
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []


class Turned(Stack):
    """The optimizer gets the layers in another order than the module has them."""

    def configure_optimizers(self) -> dion2_lightning.Dion2:
        layers = {f"layer {number}": layer for number, layer in enumerate(self.layers)}
        part = nn.ModuleDict(dict(reversed(layers.items())))
        return dion2_lightning.build_optimizer(part, lr=0.01, strategy=self.trainer)


def save_and_load_turned(path: Path) -> None:
    for layout, phase, checkpoint in (("FSDP2", Phase.KILLED, None), ("FSDP2", Phase.RESUMED, path)):
        torch.manual_seed(0 if checkpoint is None else 1)
        trainer, module = make_trainer(layout, 2), Turned(layout)
        trainer.fit(module, ckpt_path=checkpoint)
        if checkpoint is None:
            trainer.save_checkpoint(path)
        write_outcome(path.parent, phase, module.named_parameters(), trainer.optimizers[0], [])


def test_parameters_in_another_order_than_the_modules(tmp_path: Path) -> None:
    """Lightning sorts the numbers of a file that FSDP2 saves."""
    run_like_torchrun(2, save_and_load_turned, tmp_path / FILE)
    saved, loaded = (torch.load(tmp_path / f"{phase.value} 0.pt") for phase in (Phase.KILLED, Phase.RESUMED))
    assert sum("momentum" in name for name in saved) == 4
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []


def test_a_checkpoint_with_numbers_matters_only_where_it_is_trained(tmp_path: Path) -> None:
    """Trainer.test loads no optimizer, but those of the fit before are still there."""
    save_stack(tmp_path / FILE, with_names=False)
    run_like_torchrun(2, evaluate_after_fit, tmp_path / FILE)


class Evaluated(Stack):
    def test_step(self, batch: Tensor, _: int) -> None:
        self.training_step(batch, _)

    def test_dataloader(self) -> DataLoader:
        return self.train_dataloader()


def evaluate_after_fit(path: Path) -> None:
    trainer, module = make_trainer("FSDP2", 2), Evaluated("FSDP2")
    trainer.fit(module)
    trainer.test(module, ckpt_path=path)
    assert trainer.state.finished


# What else a model or a run may hold


def inject_lora(model: nn.Module) -> None:
    """Freeze the model and add adapters."""
    model.requires_grad_(False)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, model)


def compile_a_layer(model: nn.Module) -> None:
    model.model.layers[0].compile(backend="eager")


VARIANTS: dict[str, dict[str, Any]] = {
    "bf16-true": {"precision": "bf16-true"},
    "LoRA": {"change": inject_lora, "settings": {"lora": "both"}},
    "compiled layer": {"change": compile_a_layer},
}


class Saving(L.Callback):
    """Saves once, after ``STOP`` steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == STOP:
            trainer.save_checkpoint(self.folder / FILE)


def save_and_resume(layout: str, variant: str, folder: Path) -> None:
    """Train, save and go on; load in a new run and go on; all must be the same, bit for bit."""
    arguments = VARIANTS[variant]
    module, trainer = fit(layout, steps=STEPS, callbacks=[Saving(folder)], **arguments)
    write_outcome(folder, Phase.UNINTERRUPTED, module.named_parameters(), trainer.optimizers[0], module.losses[STOP:])
    resumed, trainer = fit(layout, steps=STEPS, seed=1, checkpoint=folder / FILE, **arguments)
    write_outcome(folder, Phase.RESUMED, resumed.named_parameters(), trainer.optimizers[0], resumed.losses)
    one, other = (torch.load(folder / f"{phase.value} 0.pt") for phase in (Phase.UNINTERRUPTED, Phase.RESUMED))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    momenta = [value for name, value in one.items() if name.endswith("momentum")]
    assert momenta and all(momentum.dtype == torch.float32 for momentum in momenta)


@pytest.mark.parametrize("layout", ["one device", "FSDP2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_of(variant: str, layout: str, tmp_path: Path) -> None:
    run_like_torchrun(ranks_of(layout), save_and_resume, layout, variant, tmp_path)


def wrap_a_layer(model: Any) -> None:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")


def test_names_have_no_prefixes_of_wrappers(tmp_path: Path) -> None:
    """A compiled layer's parameters are saved under the names that FSDP2 would look for."""
    _, trainer = fit("one device", steps=2, change=wrap_a_layer)
    trainer.save_checkpoint(tmp_path / FILE)
    checkpoint = torch.load(tmp_path / FILE, weights_only=True)
    assert any("_orig_mod" in name for name in checkpoint["state_dict"])
    names = [name for group in checkpoint["optimizer_states"][0]["param_groups"] for name in group["params"]]
    assert "model.model.layers.0.self_attn.q_proj.weight" in names
    assert not any("_orig_mod" in name for name in names)
    resumed, again = fit("one device", steps=4, seed=1, change=wrap_a_layer, checkpoint=tmp_path / FILE)
    assert len(resumed.losses) == 2
    assert {state["step"].item() for state in again.optimizers[0].state.values() if "step" in state} == {4}


def test_settings_that_the_checkpoint_replaces_are_named(tmp_path: Path) -> None:
    """Those alone: a learning rate that a schedule has changed is still the one that was given."""
    scheduled: dict[str, Any] = {"module_class": Scheduled, "steps": STEPS}
    fit("one device", callbacks=[saving(tmp_path)], enable_checkpointing=True, **scheduled)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the checkpoint's settings replace")
        fit("one device", checkpoint=tmp_path / FILE, **scheduled)
    message = (
        r"optimizer was given: momentum 0.9 instead of 0.8 \('dion2'\); fraction 0.25 instead of 0.5 \('dion2'\)\. "
    )
    with pytest.warns(UserWarning, match=message):
        _, trainer = fit(
            "one device", checkpoint=tmp_path / FILE, settings={"fraction": 0.5, "momentum": 0.8}, **scheduled
        )
    assert trainer.optimizers[0].param_groups[0]["fraction"] == 0.25


# What does not fit


def changed_file(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["optimizer_states"][0])
    changed = path.with_name("changed.ckpt")
    torch.save(checkpoint, changed)
    return changed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    fit("one device", steps=STOP, callbacks=[saving(folder)], enable_checkpointing=True)
    return folder / FILE


def refuse_to_load(path: Path, error: type[Exception], message: str, **arguments: Any) -> tuple[Llama, L.Trainer]:
    module, trainer = Llama("Dion2", "one device", make_model(1), STEPS, **arguments), make_trainer("one device", STEPS)
    with pytest.raises(error, match=message):
        trainer.fit(module, ckpt_path=path)
    return module, trainer


def test_a_checkpoint_from_before_a_setting_was_there(saved: Path) -> None:
    def forget(state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            for setting in ("check_finite", "state_dtype"):
                group.pop(setting, None)

    _, trainer = fit("one device", steps=STEPS, checkpoint=changed_file(saved, forget))
    assert all(group["check_finite"] is False for group in trainer.optimizers[0].param_groups)
    assert all(state for state in trainer.optimizers[0].state.values())


def test_a_checkpoint_of_another_optimizer(tmp_path: Path) -> None:
    fit("one device", "AdamW", steps=STOP, callbacks=[saving(tmp_path)], enable_checkpointing=True)
    message = (
        r"the checkpoint is of another optimizer: .* in Lightning load_from_checkpoint\(\) and fit\(\) without ckpt_"
    )
    _, trainer = refuse_to_load(tmp_path / FILE, ValueError, message)
    assert not trainer.optimizers[0].state


def test_a_checkpoint_of_another_split(saved: Path) -> None:
    _, trainer = refuse_to_load(saved, ValueError, "the checkpoint has 3 groups", **TWO_GROUPS_OF_MATRICES)
    assert not trainer.optimizers[0].state


def test_a_checkpoint_of_other_parameters(saved: Path) -> None:
    def rename(state: dict[str, Any]) -> None:
        group = state["param_groups"][0]
        state["state"]["encoder.weight"] = state["state"].pop(group["params"][0])
        group["params"][0] = group["param_names"][0] = "encoder.weight"

    message = (
        "only in the checkpoint: encoder.weight; only in this optimizer: model.model.layers.0.self_attn.q_proj.weight"
    )
    _, trainer = refuse_to_load(changed_file(saved, rename), ValueError, message)
    assert not trainer.optimizers[0].state


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    """Lightning restores the weights first, and torch refuses them."""
    config = {"hidden_size": 64}
    fit("one device", steps=STOP, config=config, callbacks=[saving(tmp_path)], enable_checkpointing=True)
    _, trainer = refuse_to_load(tmp_path / FILE, RuntimeError, "size mismatch for model.model.embed_tokens.weight")
    assert not any(optimizer.state for optimizer in trainer.optimizers)


def test_a_truncated_checkpoint(saved: Path) -> None:
    truncated = saved.with_name("truncated.ckpt")
    truncated.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    module, trainer = refuse_to_load(truncated, RuntimeError, "zip archive")
    for parameter, untouched in zip(module.model.parameters(), make_model(1).parameters(), strict=True):
        assert torch.equal(parameter, untouched)
    assert not any(optimizer.state for optimizer in trainer.optimizers)
