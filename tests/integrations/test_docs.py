"""The examples of README.md, the guide and the frameworks' pages run as they stand, TRL's on a CPU and shortened."""

import contextlib
import copy
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, Trainer, TrainingArguments

import dion2_lightning
from dion2_lightning import Dion2, Dion2Factory, OptimizerSettings, SelectionCallback, build_optimizer, route_parameters
from tests.integrations.resume import unwrapped
from tests.integrations.training import BATCH, Sequences, make_model

ROOT = Path(__file__).parents[2]


def examples(page: str) -> list[str]:
    """The Python blocks of a page, one after the other."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def data(tmp_path: Path) -> dict[str, Any]:
    """What README's examples take for granted."""
    return {
        "dataset": Sequences(3),
        "loader": DataLoader(Sequences(3), BATCH),
        "model": make_model(),
        "path": tmp_path / "checkpoint",
    }


def names_in_examples(tmp_path: Path) -> dict[str, Any]:
    """What the examples of the frameworks' pages take for granted, which import less."""
    return {
        **data(tmp_path),
        "Accelerator": Accelerator,
        "Dion2Factory": Dion2Factory,
        "L": L,
        "LightningModule": L.LightningModule,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "args": TrainingArguments("runs", report_to=[]),
        "dpo_trainer": SimpleNamespace(),
        "accelerator": Accelerator(),  # after the arguments, which reset the state that all Accelerators share
        "build_optimizer": build_optimizer,
        "dion2_lightning": dion2_lightning,
    }


@pytest.fixture(autouse=True)
def on_cpu_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def run(example: str, page: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(example, str(ROOT / page), "exec"), names)
    return names


def assert_trained(optimizer: Any) -> None:
    assert {group["algorithm"] for group in unwrapped(optimizer).param_groups} == {"dion2", "adamw"}
    assert unwrapped(optimizer).state


def fit(module_class: Any, *arguments: Any) -> L.Trainer:
    """Train a module whose example says only how it makes its optimizer."""

    class Complete(module_class):
        def __init__(self) -> None:
            super().__init__(*arguments)
            self.model = make_model()

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return self.model(**batch).loss

    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers of loaders
        trainer.fit(Complete(), DataLoader(Sequences(3), BATCH))
    assert_trained(trainer.optimizers[0])
    return trainer


class TestReadme:
    """Five examples: any loop, Lightning, Accelerate, the Trainer, TRL with LoRA; each trains, with a schedule."""

    def test_all_are_here(self) -> None:
        assert len(examples("README.md")) == 5

    def test_any_loop(self, tmp_path: Path) -> None:
        names = run(examples("README.md")[0], "README.md", data(tmp_path))
        assert isinstance(names["optimizer"], Dion2)
        assert_trained(names["optimizer"])
        assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(0.0)
        assert "linear" in route_parameters(names["model"]).report()

    def test_lightning(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about workers of loaders
            trainer = run(examples("README.md")[1], "README.md", data(tmp_path))["trainer"]
        assert_trained(trainer.optimizers[0])
        assert [group["initial_lr"] for group in trainer.optimizers[0].param_groups] == [3e-4, 1e-4, 1e-4]
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)

    def test_accelerate(self, tmp_path: Path) -> None:
        assert_trained(run(examples("README.md")[2], "README.md", data(tmp_path))["optimizer"])

    def test_trainer(self, tmp_path: Path) -> None:
        trainer = run(examples("README.md")[3], "README.md", data(tmp_path))["trainer"]
        assert_trained(trainer.optimizer)
        assert any(isinstance(callback, SelectionCallback) for callback in trainer.callback_handler.callbacks)

    def test_trl(self, tmp_path: Path) -> None:
        """As it stands, but on a CPU, for two steps, and with a tokenizer that is not from the hub."""
        texts = datasets.Dataset.from_dict({"input_ids": Sequences(3).pieces.tolist()})
        example = examples("README.md")[4]
        small = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "max_steps": 2}
        example = example.replace('SFTConfig("runs",', 'SFTConfig("runs", **small,')
        example = example.replace(
            "SFTTrainer(model, args,", "SFTTrainer(model, args, processing_class=ByT5Tokenizer(),"
        )
        names = {**data(tmp_path), "dataset": texts, "small": small, "ByT5Tokenizer": ByT5Tokenizer}
        trainer = run(example, "README.md", names)["trainer"]
        groups = unwrapped(trainer.optimizer).param_groups
        assert [group["algorithm"] for group in groups] == ["dion2"]
        assert all("lora" in name for group in groups for name in group["param_names"])


def test_rates_of_schedules_and_searches(tmp_path: Path) -> None:
    """Both examples of the guide keep the ratio of the two rates."""
    schedule, search = examples("docs/fine-tuning.md")
    optimizer = build_optimizer(make_model(), lr=3e-3, adamw_lr=1e-3)
    for example, names in ((schedule, {"optimizer": optimizer}), (search, {"model": make_model()})):
        names = run(example, "docs/fine-tuning.md", names | {"torch": torch, "build_optimizer": build_optimizer})
        seen = []
        for _ in range(100):
            names["optimizer"].step()
            names["scheduler"].step()
            seen.append([group["lr"] for group in names["optimizer"].param_groups])
        assert seen[0][0] < seen[-1][0]
        assert all(rest == pytest.approx([matrices / 3] * 2) for matrices, *rest in seen)


def test_every_test_that_a_page_names_is_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(?:\w+::)?(\w+)`", (ROOT / "docs/situations.md").read_text())
    assert len(named) > 20
    assert [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []


def test_routing(tmp_path: Path) -> None:
    """Overrides of every form, on a model that has what they match."""
    mlp = torch.nn.ModuleDict({"gate": torch.nn.Linear(4, 4), "up": torch.nn.Linear(4, 8)})
    layer = torch.nn.ModuleDict({"mlp": mlp, "mixer": torch.nn.ParameterDict({"kernel": torch.ones(4, 8)})})
    layers = torch.nn.ModuleList([layer, copy.deepcopy(layer)])
    model = torch.nn.ModuleDict(
        {"model": torch.nn.ModuleDict({"layers": layers}), "lm_head": torch.nn.Linear(4, 6, bias=False)}
    )
    [example] = examples("docs/routing.md")
    assert example.startswith("build_optimizer(")
    names = run(f"optimizer = {example}", "docs/routing.md", {"model": model, "build_optimizer": build_optimizer})
    found = {group["name"]: group["param_names"] for group in names["optimizer"].param_groups}
    assert found == {
        "dion2": ["model.layers.1.mlp.up.weight", "lm_head.weight"],
        "dion2 [*.layers.0.*]": ["model.layers.0.mlp.up.weight"],
        "dion2-transposed": ["model.layers.1.mixer.kernel"],
        "adamw": ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"],
        "adamw-no-decay": ["model.layers.1.mlp.gate.bias", "model.layers.1.mlp.up.bias"],
        "adamw-no-decay [*.layers.0.*]": ["model.layers.0.mlp.gate.bias", "model.layers.0.mlp.up.bias"],
        "adamw [*.layers.0.*]": ["model.layers.0.mixer.kernel"],
    }


@pytest.mark.parametrize("example", examples("docs/huggingface.md"), ids=range(len(examples("docs/huggingface.md"))))
def test_huggingface(example: str, tmp_path: Path) -> None:
    names = run(example, "docs/huggingface.md", names_in_examples(tmp_path))
    optimizer = names["trainer"].optimizer if "trainer" in names else names.get("optimizer")
    if optimizer is not None:  # an example has trained
        assert_trained(optimizer)


def test_capturable_steps() -> None:
    """The graph is one of a GPU; here its names are, and a replay does nothing."""
    compiled, captured = examples("docs/algorithm.md")

    class Graph(contextlib.nullcontext[None]):
        replays = 0

        def replay(self) -> None:
            self.replays += 1

    def train(model: nn.Module, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            model(torch.ones(3, 4)).square().mean().backward()
            optimizer.step()

    def names() -> dict[str, Any]:
        cuda = SimpleNamespace(CUDAGraph=Graph, graph=lambda graph: graph)
        without_gpu = SimpleNamespace(**{**vars(torch), "cuda": cuda})
        batches = [torch.ones(3, 4)] * 2
        common = {"torch": without_gpu, "build_optimizer": build_optimizer, "device": "cpu", "train": train}
        return {**common, "model": nn.Linear(4, 6), "batches": batches, "static_batch": torch.ones(3, 4)}

    known = run(compiled, "docs/algorithm.md", names())
    assert 0 < known["lr"] < 3e-4
    assert all(known["optimizer"].state[parameter] for parameter in known["model"].parameters())
    given = {**names(), "batches": [(torch.ones(3, 4), 1e-3)] * 2}
    known = run(captured.replace('"cuda"', '"cpu"'), "docs/algorithm.md", given)
    assert known["graph"].replays == 2
    assert known["lr"] == torch.tensor(1e-3)


class TestLightning:
    """A module, clipping, command line, backbone, Fabric, names for Fabric."""

    page = "docs/lightning.md"

    def test_all_are_here(self) -> None:
        assert len(examples(self.page)) == 6
        assert len(examples("docs/huggingface.md")) == 4

    def test_a_module_and_its_clipping(self, tmp_path: Path) -> None:
        module, clipping, *_ = examples(self.page)
        names = run(module + clipping, self.page, names_in_examples(tmp_path))
        fit(names["Model"])

    def test_settings(self, tmp_path: Path) -> None:
        asked: list[Any] = []
        names = names_in_examples(tmp_path) | {"LightningCLI": asked.append}
        run(examples(self.page)[2], self.page, names)
        assert asked == [names["Model"]]
        fit(names["Model"], OptimizerSettings(lr=1e-3))

    def test_a_backbone_that_stays_thawed(self, tmp_path: Path) -> None:
        names = names_in_examples(tmp_path) | {"BackboneFinetuning": L.pytorch.callbacks.BackboneFinetuning}
        assert issubclass(run(examples(self.page)[3], self.page, names)["Thaw"], L.pytorch.callbacks.BackboneFinetuning)

    def test_fabric(self, tmp_path: Path) -> None:
        names = names_in_examples(tmp_path) | {"fabric": L.Fabric(accelerator="cpu")}
        setting_up, naming = examples(self.page)[4:]
        run(setting_up, self.page, names)
        names["fabric"].backward(names["model"](**next(iter(names["loader"]))).loss)
        names["optimizer"].step()
        run(naming, self.page, names)
        saved = names["fabric"].load(names["path"])["optimizer"]
        assert all(isinstance(name, str) for name in saved["state"])
        assert_trained(names["optimizer"])
