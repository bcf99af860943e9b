"""From a model to its optimizer."""

import copy
import inspect
import logging
import subprocess
import sys
import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import dion2_lightning
from dion2_lightning import Dion2, build_optimizer
from tests.distributed.ranks import run_on_ranks


class Language(nn.Module):
    """An embedding, two blocks, a head that is not guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)) for _ in range(2)
        )
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def summary(optimizer: Dion2, *entries: str) -> dict[str, tuple]:
    return {group["name"]: tuple(group[entry] for entry in entries) for group in optimizer.param_groups}


def test_groups_matrices_first_and_every_parameter_once():
    model = Language()
    optimizer = build_optimizer(model, lr=0.1)
    assert list(summary(optimizer)) == ["dion2", "adamw", "adamw-no-decay"]
    covered = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())
    assert optimizer.param_groups[0]["param_names"] == [
        name for name, p in model.named_parameters() if p.ndim == 2 and name != "embed.weight"
    ]


def test_learning_rates_and_weight_decays():
    """Everything follows lr and weight_decay unless the adamw_ arguments differ; norms and biases never decay."""
    same = summary(build_optimizer(Language(), lr=0.1, weight_decay=0.2), "lr", "weight_decay")
    assert same == {"dion2": (0.1, 0.2), "adamw": (0.1, 0.2), "adamw-no-decay": (0.1, 0.0)}
    separate = build_optimizer(Language(), 0.1, weight_decay=0.2, adamw_lr=0.3, adamw_weight_decay=0.4)
    assert summary(separate, "lr", "weight_decay") == {
        "dion2": (0.1, 0.2),
        "adamw": (0.3, 0.4),
        "adamw-no-decay": (0.3, 0.0),
    }


def test_every_setting_reaches_the_groups():
    settings = {
        "fraction": 0.5,
        "momentum": 0.8,
        "adjust_lr_fn": "spectral",
        "scale_lr_by_fraction": False,
        "select": "output",
        "orthonormalize_dtype": "float64",
        "state_dtype": "float64",
        "betas": (0.5, 0.6),
        "eps": 1e-5,
        "check_finite": True,
    }

    def custom(submatrices: torch.Tensor) -> torch.Tensor:
        return submatrices

    optimizer = build_optimizer(Language(), 0.1, orthonormalize=custom, **settings)
    reached: set[str] = set()
    for group in optimizer.param_groups:
        assert all(group[name] == value for name, value in settings.items() if name in group)
        reached |= group.keys()
    assert reached >= settings.keys()
    assert optimizer.orthonormalize is custom


def test_the_control_has_the_same_groups_all_adamw():
    model = Language()
    options = {"lr": 0.1, "adamw_lr": 0.3, "weight_decay": 0.2, "overrides": {"blocks.0.*": {"lr": 0.5}}}
    dion2, control = build_optimizer(model, **options), build_optimizer(model, algorithm="adamw", **options)
    assert {group["algorithm"] for group in control.param_groups} == {"adamw"}
    for ours, theirs in zip(dion2.param_groups, control.param_groups, strict=True):
        assert ours["params"] == theirs["params"]
        assert (ours["lr"], ours["weight_decay"]) == (theirs["lr"], theirs["weight_decay"])
    assert control.param_groups[0]["name"] == "adamw-matrices"


def test_muon_is_dion2_at_fraction_one():
    optimizer = build_optimizer(Language(), 0.1, algorithm="muon", fraction=0.25)
    assert optimizer.param_groups[0]["fraction"] == 1.0


def test_an_orthonormalization_that_nothing_uses_is_refused():
    with pytest.raises(ValueError, match="orthonormalize has no effect with algorithm 'dion'; remove it"):
        build_optimizer(Language(), 0.1, algorithm="dion", orthonormalize=torch.sign)


def test_normuon_is_muon_with_normalized_neurons():
    group = build_optimizer(Language(), 0.1, algorithm="normuon").param_groups[0]
    assert (group["algorithm"], group["fraction"], group["normalize_neurons"]) == ("dion2", 1.0, True)


def test_dion3_beside_dion2():
    """A setting of one of them is taken where one is."""
    model = Language()
    overrides = {"blocks.0.1.weight": "dion2"}
    optimizer = build_optimizer(model, 0.1, algorithm="dion3", select="output", neuron_beta=0.5, overrides=overrides)
    dion3, dion2, *_ = sorted(optimizer.param_groups, key=lambda group: group["algorithm"], reverse=True)
    assert (dion3["algorithm"], dion3["neuron_beta"], "select" in dion3) == ("dion3", 0.5, False)
    assert (dion2["algorithm"], dion2["select"], dion2["normalize_neurons"]) == ("dion2", "output", False)


@pytest.mark.parametrize("algorithm", ["dion2", "dion3", "dion", "muon", "normuon", "adamw"])
def test_it_trains(algorithm):
    torch.manual_seed(0)
    model = Language()
    optimizer = build_optimizer(model, lr=0.03, algorithm=algorithm)
    tokens = torch.arange(16).repeat(4, 1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_overrides():
    optimizer = build_optimizer(
        Language(),
        0.1,
        overrides={"head.weight": "adamw", "blocks.1.*": {"lr": 0.5, "weight_decay": 0.7}},
        adamw_lr=0.3,
    )
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert (groups["head.weight"]["algorithm"], groups["head.weight"]["lr"]) == ("adamw", 0.3)
    assert (groups["blocks.1.1.weight"]["algorithm"], groups["blocks.1.1.weight"]["lr"]) == ("dion2", 0.5)
    assert groups["blocks.1.0.bias"]["lr"] == 0.5
    assert groups["blocks.0.1.weight"]["lr"] == 0.1


def test_an_unknown_option_of_an_override_names_its_group():
    with pytest.raises(ValueError, match=r"group 'dion2.*blocks.*': unknown entry 'learning_rate'"):
        build_optimizer(Language(), 0.1, overrides={"blocks.*.1.weight": {"learning_rate": 0.5}})


def test_parameters_added_later_are_split_by_the_same_rules():
    """As Lightning's BackboneFinetuning adds them: one bare group, biases included."""
    model = Language()
    model.blocks[0].requires_grad_(False)
    optimizer = build_optimizer(model, lr=0.1, adamw_lr=0.3)
    model.blocks[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.blocks[0].parameters()), "lr": 0.01})
    assert summary(optimizer, "algorithm", "lr", "weight_decay") == {
        "dion2": ("dion2", 0.1, 0.01),
        "adamw": ("adamw", 0.3, 0.01),
        "adamw-no-decay": ("adamw", 0.3, 0.0),
        "dion2-2": ("dion2", 0.01, 0.01),
        "adamw-no-decay-2": ("adamw", 0.01, 0.0),
    }
    with pytest.raises(ValueError, match="in another group already"):
        optimizer.add_param_group({"params": list(model.blocks[0].parameters())})


def test_parameters_of_another_model_cannot_be_added_without_algorithm():
    model = Language()
    optimizer = build_optimizer(model, lr=0.1)
    with pytest.raises(ValueError, match="parameters that are not in the model, or frozen"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))]})


def test_of_an_added_group_that_is_split_all_parts_are_added_or_none():
    model = Language()
    model.blocks.requires_grad_(False)
    optimizer = build_optimizer(model, lr=0.1)
    before = [group["name"] for group in optimizer.param_groups]
    model.blocks.requires_grad_()
    added = {"params": list(model.blocks.parameters()), "eps": -1.0}  # which only AdamW has, for the biases
    with pytest.raises(ValueError, match="eps must be"):
        optimizer.add_param_group(added)
    assert [group["name"] for group in optimizer.param_groups] == before


def test_entries_of_an_added_group_go_where_they_belong():
    model = Language()
    model.blocks.requires_grad_(False)
    optimizer = build_optimizer(model, lr=0.1)
    model.blocks.requires_grad_()
    own = {"fraction": 0.5, "weight_decay": 0.2, "eps": 1e-6, "lr": 0.3, "name": "late"}
    with pytest.raises(ValueError, match="unknown entry 'fractoin'"):
        optimizer.add_param_group({"params": list(model.blocks.parameters()), "fractoin": 0.5})
    bias = model.blocks[0][1].bias
    with pytest.raises(ValueError, match=r"weight_decay=0.2 has no effect on biases.*'blocks.0.1.bias'; remove it"):
        optimizer.add_param_group({"params": [bias], "weight_decay": 0.2})
    with pytest.raises(ValueError, match="the added group holds a parameter twice"):
        optimizer.add_param_group({"params": [bias, bias]})
    optimizer.add_param_group({"params": list(model.blocks.parameters()), **own})
    added = {group["name"]: group for group in optimizer.param_groups if group["name"].startswith("late-")}
    assert list(added) == ["late-dion2", "late-adamw-no-decay"]
    matrices, biases = added.values()
    assert matrices["fraction"] == 0.5 and matrices["weight_decay"] == 0.2 and matrices["lr"] == biases["lr"] == 0.3
    assert biases["eps"] == 1e-6 and biases["weight_decay"] == 0.0


@pytest.mark.parametrize("argument", ["overrides", "splits"])
def test_patterns_for_what_is_frozen_by_now_do_not_hinder_what_is_added(argument: str):
    model = Language()
    model.blocks[0].requires_grad_(False)
    pattern = {"overrides": {"blocks.1.*": {"lr": 0.5}}, "splits": {"blocks.1.1.weight": "whole"}}[argument]
    optimizer = build_optimizer(model, lr=0.1, **{argument: pattern})
    model.blocks[1].requires_grad_(False)
    model.blocks[0].requires_grad_()
    optimizer.add_param_group({"params": list(model.blocks[0].parameters())})
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert trained.issuperset(model.blocks[0].parameters())


def test_an_added_group_has_names_if_the_others_have():
    model = Language()
    optimizer = build_optimizer(model, lr=0.1)
    extra = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"params must be \(name, parameter\) pairs, as in the other groups"):
        optimizer.add_param_group({"params": [extra], "algorithm": "dion2"})
    optimizer.add_param_group({"params": [("extra", extra)], "algorithm": "dion2"})
    plain = Dion2([nn.Parameter(torch.ones(3, 3))])
    with pytest.raises(ValueError, match="params must be parameters without names, as in the other groups"):
        plain.add_param_group({"params": [("extra", extra)], "algorithm": "dion2"})


# What it says


SUMMARY = (
    "Dion2 and AdamW for Language: of 712 trainable parameters dion2 71.9% (5 tensors), adamw 28.1% (9 tensors)\n"
    "Note: no transformers model was found, so no head was guessed. An output layer belongs to adamw: if `head.weight` "
    'is one, pass overrides={"head.weight": "adamw"}.'
)


def test_the_summary_is_logged_once_on_rank_zero_and_the_table_on_demand(caplog, monkeypatch):
    for level, count in ((logging.WARNING, 0), (logging.INFO, 1), (logging.DEBUG, 2)):
        caplog.clear()
        with caplog.at_level(level, logger="dion2_lightning"):
            build_optimizer(Language(), lr=0.1)
        assert len(caplog.records) == count
    assert caplog.records[0].message == SUMMARY
    assert "blocks.*.*.weight" in caplog.records[1].message
    monkeypatch.setenv("RANK", "1")
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="dion2_lightning"):
        build_optimizer(nn.Conv2d(3, 4, 3), lr=0.1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("configured", "is_said"),
    [
        ("", True),
        ("logging.basicConfig(format='%(message)s')", True),
        ("logging.getLogger('dion2_lightning').setLevel('WARNING')", False),
        ("logging.disable(logging.INFO)", False),
    ],
    ids=["nothing", "the root logger at WARNING", "silenced", "all silenced"],
)
def test_the_summary_is_seen_without_configuring_anything(configured, is_said):
    code = (
        f"import logging; {configured}\n"
        "import torch\nfrom torch import nn\n"
        "from dion2_lightning import build_optimizer\n"
        f"{inspect.getsource(Language)}\n"  # importing this module takes four times as long as all else
        "build_optimizer(Language(), lr=0.1)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == ""
    assert result.stderr.strip() == (SUMMARY if is_said else "")


def warnings_of_building(model: nn.Module, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_optimizer(model, lr=0.1, **settings)
    return [str(each.message) for each in caught]


def frozen_body() -> nn.Module:
    model = Language()
    model.requires_grad_(False)
    model.embed.requires_grad_(True)
    return model


NOTHING_TO_DION2 = {
    "convolutions": (
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
        {},
        "Sequential: dion2 trains nothing, adamw everything. Convolutions without a matrix (1): the report says of "
        "each why it has none.",
    ),
    "dense convolutions": (
        nn.Conv2d(4, 4, 3),
        {"overrides": {"weight": "adamw"}},
        "Conv2d: dion2 trains nothing, adamw everything. Dense convolutions (1): overrides send them elsewhere.",
    ),
    "frozen": (
        frozen_body(),
        {},
        "Language: dion2 trains nothing, adamw everything. Frozen weights (5): unfreeze what should train before the "
        "optimizer is built.",
    ),
    "recurrent": (
        nn.LSTM(4, 4),
        {},
        "LSTM: dion2 trains nothing, adamw everything. Parameters of no known layer (2): if linear, pass "
        'overrides={"weight_ih_l0": "dion2"}.',
    ),
    "overrides": (
        Language(),
        {"overrides": {"blocks.*": "adamw", "head.*": "adamw"}},
        "Language: dion2 trains nothing, adamw everything. Weights of linear layers (5): overrides send them "
        "elsewhere.",
    ),
    "vectors": (nn.LayerNorm(4), {}, "LayerNorm: dion2 trains nothing, adamw everything. It has no linear layers."),
}


@pytest.mark.parametrize("case", NOTHING_TO_DION2)
def test_where_nothing_goes_to_dion2_a_warning_says_why_and_what_changes_that(case):
    model, settings, reason = NOTHING_TO_DION2[case]
    advice = 'If AdamW is what you want, algorithm="adamw" says so.'
    assert warnings_of_building(model, **settings) == [f"{reason} {advice}"]
    assert warnings_of_building(model, algorithm="adamw", **settings) == []


def test_that_warning_shows_the_line_that_builds():
    with pytest.warns(UserWarning, match="dion2 trains nothing") as caught:
        build_optimizer(nn.LayerNorm(4), lr=0.1)
    assert [each.filename for each in caught] == [__file__]


def test_where_dion2_trains_something_there_is_no_warning():
    assert warnings_of_building(Language()) == []


def test_lightning_module_in_configure_optimizers(tmp_path):
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Language()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.model(batch[0]).flatten(0, 1), batch[0].flatten())

        def configure_optimizers(self):
            return build_optimizer(self, lr=0.01, strategy=self)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(torch.randint(0, 16, (8, 4))), batch_size=2
            )

    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    module = Module()
    trainer.fit(module)
    optimizer = trainer.optimizers[0]
    assert optimizer.selection_of(module.model.head.weight).indices.shape == (2,)
    assert [group["name"] for group in optimizer.param_groups] == ["dion2", "adamw", "adamw-no-decay"]


def strategies():
    import accelerate
    import transformers

    yield L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    yield SingleDeviceStrategy(torch.device("cpu"))
    yield L.Fabric(accelerator="cpu")
    yield accelerate.Accelerator(cpu=True)
    yield transformers.TrainingArguments(use_cpu=True, report_to=[])


def test_strategies_of_one_rank_are_accepted():
    for strategy in strategies():
        assert isinstance(build_optimizer(Language(), lr=0.1, strategy=strategy), Dion2), strategy


@pytest.mark.parametrize("strategy", ["ddp", 2, object(), nn.Linear(2, 2)], ids=["str", "int", "object", "module"])
def test_other_strategies_are_refused(strategy):
    with pytest.raises(TypeError, match=f"strategy must be a Lightning Trainer, .*, got {type(strategy).__name__}"):
        build_optimizer(Language(), lr=0.1, strategy=strategy)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "^lr must be at least 0"),
        ({"lr": "3e-4"}, TypeError, "^lr must be a number, got the str '3e-4'"),
        ({"lr": 0.1, "adamw_lr": -1.0}, ValueError, "^adamw_lr must be at least 0"),
        ({"lr": 0.1, "adamw_weight_decay": -1.0}, ValueError, "^adamw_weight_decay must be at least 0"),
        (
            {"lr": 0.1, "algorithm": "sgd"},
            ValueError,
            "^algorithm must be one of 'dion2', 'dion3', 'dion', 'muon', 'normuon', 'adamw', got 'sgd'",
        ),
        ({"lr": 0.1, "fraction": 0.0}, ValueError, r"^fraction must lie in \(0, 1\]"),
        (
            {"lr": 0.1, "algorithm": "dion3", "select": "output"},
            ValueError,
            "^select='output' is no setting of algorithm 'dion3'; it belongs to 'dion2', remove it",
        ),
        (
            {"lr": 0.1, "algorithm": "normuon", "fraction": 0.5},
            ValueError,
            "^fraction is 1.0 with algorithm 'normuon', got",
        ),
        ({"lr": 0.1, "lora": "A"}, ValueError, "lora must be one of"),
        ({"lr": 0.1, "overrides": {"bolcks.*": "adamw"}}, ValueError, "bolcks"),
        ({"learning_rat": 0.1}, TypeError, r"^build_optimizer\(\) has no argument 'learning_rat'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        build_optimizer(Language(), **arguments)


def test_what_is_returned_stays_visible():
    assert inspect.signature(build_optimizer).return_annotation is Dion2
    with pytest.raises(TypeError, match=r"^build_optimizer\(\) takes lr by its place, and all else by name"):
        build_optimizer(Language(), 0.1, 0.25)  # type: ignore[call-arg]


def test_a_model_is_asked_for():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got generator"):
        build_optimizer(Language().parameters(), lr=0.1)


def test_names_of_integrations_are_listed():
    """For completion; they are imported on first use, and not by a star."""
    lazy = {"Dion2Factory", "NamedOptimizerStates", "with_parameter_names"}
    assert lazy <= set(dir(dion2_lightning))
    assert lazy.isdisjoint(dion2_lightning.__all__)
    assert {"build_optimizer", "Dion2", "__version__"} <= set(dir(dion2_lightning))
    for name in lazy:
        assert getattr(dion2_lightning, name).__name__ == name


def test_importing_the_package_needs_torch_alone():
    frameworks = "lightning", "pytorch_lightning", "accelerate", "transformers", "datasets", "peft"
    code = f"import sys; from dion2_lightning import *; print([name for name in {frameworks!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# What a model says about its ranks, and models that are refused


class InLightning(L.LightningModule):
    """Builds its optimizer in whichever hook it is told."""

    def __init__(self, hook: str = "configure_optimizers", **options: Any) -> None:
        super().__init__()
        self.hook, self.options = hook, options
        self.model = Language()

    def build(self, hook: str) -> Any:
        return build_optimizer(self, lr=0.01, **self.options) if hook == self.hook else None

    def setup(self, stage: str) -> None:
        self.build("setup")

    def configure_optimizers(self) -> Any:
        return self.build("configure_optimizers")

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]).flatten(0, 1), batch[0].flatten())

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randint(0, 16, (8, 4))), batch_size=4)


class MadeLater(InLightning):
    """Makes its parameters in ``configure_model``, or other ones."""

    def configure_model(self) -> None:
        self.model = Language()
        self.build("configure_model")


def quiet_trainer(**arguments: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, **arguments})


def test_lightning_module_outside_a_trainer():
    """Nothing is replaced later, so it is a model like any other."""
    assert build_optimizer(InLightning(), lr=0.1).process_group is None


@pytest.mark.parametrize("backend", [None, "eager"], ids=["plain", "compiled"])
def test_a_module_knows_its_trainer(backend):
    """Also one that torch.compile has wrapped."""

    class Compiled(InLightning):
        def configure_optimizers(self):
            model = self if backend is None else torch.compile(self, backend=backend)
            return build_optimizer(model, lr=0.01)

    trainer = quiet_trainer()
    trainer.fit(Compiled())
    assert any(type(callback).__name__ == "NamedOptimizerStates" for callback in trainer.callbacks)


def test_lightning_module_whose_parameters_are_made_later():
    with pytest.raises(ValueError, match=r"^model MadeLater is in no Trainer yet, and there its hook configure_m"):
        build_optimizer(MadeLater(), lr=0.1)


class MadeOnce(InLightning):
    """As Lightning wants ``configure_model``: to be called again changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        del self.model

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = Language()


def test_lightning_module_in_a_loop_of_ones_own():
    """The error names what works."""
    module = MadeOnce()
    module.configure_model()
    with pytest.raises(ValueError, match=r"say so by strategy=: SingleDeviceStrategy\(\) of Lightning"):
        build_optimizer(module, lr=0.1)
    optimizer = build_optimizer(module, lr=0.1, strategy=SingleDeviceStrategy())
    before = module.model.head.weight.detach().clone()
    module.training_step([torch.randint(0, 16, (4, 4))], 0).backward()
    optimizer.step()
    assert not torch.equal(module.model.head.weight, before)
    assert optimizer.process_group is None


def test_an_optimizer_that_was_built_before_all_the_same():
    """The strategy says that the user knows; the step says that it was wrong."""
    module, trainer = MadeLater(), quiet_trainer()
    optimizer = build_optimizer(module, lr=0.1, strategy=trainer)
    setattr(module, "configure_optimizers", lambda: optimizer)  # noqa: B010
    with pytest.raises(RuntimeError, match=r"'model.blocks.0.1.weight'.* the model has another parameter"):
        trainer.fit(module)


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_lightning_module_in_a_hook_that_comes_too_early(hook):
    with pytest.raises(ValueError, match=f"^model MadeLater is in its hook {hook}, and configure_model may still make"):
        quiet_trainer().fit(MadeLater(hook))


def test_lightning_module_made_in_configure_model():
    module, trainer = MadeLater(), quiet_trainer()
    trainer.fit(module)
    assert trainer.optimizers[0].state


def test_lightning_cli_that_builds_the_optimizer_by_itself():
    """From the bare parameters, before configure_model: one of them at least is no matrix."""
    with pytest.raises(ValueError, match=r"parameter \d+ of shape \(\d+,\) is not a matrix.* let build_optimizer"):
        LightningCLI(MadeLater, args=["--optimizer=dion2_lightning.Dion2"], run=False, save_config_callback=None)


class FSDPStrategy(SingleDeviceStrategy):
    """Fails where the real one would, before it asks for a GPU."""


class DeepSpeedStrategy(SingleDeviceStrategy):
    """As above."""


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_of_a_trainer_that_flatten_are_refused(strategy):
    """Without strategy=, in configure_optimizers."""
    with pytest.raises(ValueError, match=f"^strategy {strategy.__name__} .*flattens matrices.*ModelParallelStrategy$"):
        quiet_trainer(accelerator="auto", strategy=strategy(torch.device("cpu"))).fit(InLightning())


def test_an_explicit_strategy_wins():
    with pytest.raises(ValueError, match="several dimensions without mesh_dim_names"):
        quiet_trainer().fit(InLightning(strategy=FakeMesh()))


class FakeMesh:
    """Tells which argument was read."""

    ndim = 2
    mesh_dim_names = None


FakeMesh.__name__, FakeMesh.__module__ = "DeviceMesh", "torch"


class DeepSpeedEngine(nn.Module):
    """What DeepSpeed makes of a model, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Language()


def test_a_deepspeed_engine_is_refused():
    with pytest.raises(ValueError, match=r"^model is a DeepSpeedEngine \(DeepSpeed\), which flattens .* use FSDP2"):
        build_optimizer(DeepSpeedEngine(), lr=0.1)


def check_wrappers():
    for use_orig_params in (False, True):
        model = Language()
        built_before = build_optimizer(model, lr=0.1)
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        for given in (wrapped, nn.Sequential(wrapped)):
            for strategy in (None, dist.group.WORLD):
                with pytest.raises(ValueError, match=r"^model holds a FullyShardedDataParallel \(FSDP1\)"):
                    build_optimizer(given, lr=0.1, strategy=strategy)
        tokens = torch.arange(8).view(2, 4)
        nn.functional.cross_entropy(wrapped(tokens).flatten(0, 1), tokens.flatten()).backward()
        with pytest.raises((RuntimeError, ValueError), match=r"the model has another parameter|flattened by FSDP1"):
            built_before.step()

    # Whether the ranks' gradients are equal is not the wrapper's to say: in local steps they are not.
    replicas = DistributedDataParallel(Language())
    for each in (replicas, torch.compile(replicas, backend="eager")):
        assert build_optimizer(each, lr=0.1).process_group is None
        assert build_optimizer(each, lr=0.1, strategy=replicas.process_group).process_group is replicas.process_group
    with pytest.raises(TypeError, match="strategy must be"):
        build_optimizer(replicas, lr=0.1, strategy=3)


def test_wrapped_models():
    run_on_ranks(2, check_wrappers)


def check_local_steps():
    torch.manual_seed(0)
    replicas = DistributedDataParallel(nn.Linear(16, 16))
    alone = copy.deepcopy(replicas.module)
    own = torch.randn(4, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    for model, optimizer in ((it, build_optimizer(it, lr=0.1, share_replicas=True)) for it in (replicas, alone)):
        with replicas.no_sync():
            model(own).square().mean().backward()
        optimizer.step()
    assert torch.equal(replicas.module.weight, alone.weight)


def test_local_steps_of_replicas_are_each_ranks_own():
    """As local SGD takes them: a rank that took another's update would lose its own batch."""
    run_on_ranks(2, check_local_steps)
