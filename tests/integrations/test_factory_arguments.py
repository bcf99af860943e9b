"""The factory for the Trainer: text read as what it stands for, arguments of the Trainer, and what is refused."""

import copy
import re
import sys
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn

import dion2_lightning
from dion2_lightning import Dion2, Dion2Factory, build_optimizer
from dion2_lightning.integrations.transformers import _pairs, _parsed
from tests.integrations.huggingface import plain_groups
from tests.integrations.training import make_model


def arguments(**settings: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(use_cpu=True, report_to=[], **settings)


def test_the_package_hands_it_out_and_nothing_that_is_not_there() -> None:
    from dion2_lightning.integrations.transformers import Dion2Factory as its_own

    assert Dion2Factory is its_own
    with pytest.raises(AttributeError, match="module 'dion2_lightning' has no attribute 'Dion3Factory'"):
        dion2_lightning.Dion3Factory  # noqa: B018


def test_an_older_transformers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some versions of transformers replace their own module while they load parts of themselves.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.1.9")
    monkeypatch.delitem(sys.modules, "dion2_lightning.integrations.transformers")
    with pytest.raises(ImportError, match=re.escape("needs transformers 5.2 or later, found 5.1.9")):
        dion2_lightning.Dion2Factory  # noqa: B018


def test_it_builds_what_build_optimizer_builds() -> None:
    settings = {"lr": 1e-3, "fraction": 0.5, "overrides": {"*.q_proj.weight": {"lr": 2e-3}}}
    built = Dion2Factory()(make_model(), **settings)
    assert type(built) is Dion2
    assert plain_groups(built) == plain_groups(build_optimizer(make_model(), **settings))


TEXT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "number": ({"lr": "3e-4"}, {"lr": 3e-4}),
    "spaces": ({"fraction": " 0.5 "}, {"fraction": 0.5}),
    "optional number": ({"adamw_lr": "1e-3"}, {"adamw_lr": 1e-3}),
    "no number": ({"adamw_lr": "none", "adamw_weight_decay": "null"}, {}),
    "betas": ({"betas": "0.8,0.95"}, {"betas": (0.8, 0.95)}),
    "betas in brackets": ({"betas": "(0.8, 0.95)"}, {"betas": (0.8, 0.95)}),
    "betas in a list": ({"betas": ["8e-1", 0.95]}, {"betas": (0.8, 0.95)}),
    "true": ({"check_finite": "true"}, {"check_finite": True}),
    "true or a word": ({"check_finite": "skip"}, {"check_finite": "skip"}),
    "yes": (
        {"check_finite": "yes", "scale_lr_by_fraction": "Off"},
        {"check_finite": True, "scale_lr_by_fraction": False},
    ),
    "nothing": ({"adamw_lr": ""}, {}),
    "betas in a tuple": ({"betas": ("0.8", "0.95")}, {"betas": (0.8, 0.95)}),
    "false": ({"scale_lr_by_fraction": "False"}, {"scale_lr_by_fraction": False}),
    "optional truth": ({"share_replicas": "none"}, {"share_replicas": None}),
    "dtype": ({"state_dtype": "bfloat16"}, {"state_dtype": torch.bfloat16}),
    "no dtype": ({"orthonormalize_dtype": "none"}, {}),
    "a rule called none": ({"adjust_lr_fn": "none"}, {"adjust_lr_fn": "none"}),
    "a name": ({"algorithm": "muon", "lora": "B", "select": "output"}, {"algorithm": "muon", "select": "output"}),
    "no object": ({"strategy": "none", "orthonormalize": "none", "overrides": "none"}, {}),
    "options of a group": (
        {"overrides": {"*.q_proj.*": {"lr": "2e-3", "fraction": "0.5"}, "*.k_proj.weight": "adamw"}},
        {"overrides": {"*.q_proj.*": {"lr": 2e-3, "fraction": 0.5}, "*.k_proj.weight": "adamw"}},
    ),
}


@pytest.mark.parametrize("case", TEXT)
def test_text_is_read(case: str) -> None:
    text, meant = TEXT[case]
    built = Dion2Factory()(make_model(), **{"lr": "1e-3", **text})
    assert plain_groups(built) == plain_groups(build_optimizer(make_model(), **{"lr": 1e-3, **meant}))


REFUSED: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "number": (TypeError, {"lr": "fast"}, "lr must be a number, got the str 'fast'; pass a float"),
    "out of range": (ValueError, {"fraction": "1.5"}, "fraction must lie in (0, 1], got 1.5"),
    "truth": (TypeError, {"share_replicas": "maybe"}, "share_replicas must be True, False or None, got 'maybe'"),
    "truth or a word": (
        ValueError,
        {"check_finite": "maybe"},
        "check_finite must be one of True, False, 'skip', got 'maybe'",
    ),
    "one beta": (TypeError, {"betas": "0.9"}, "betas must be two numbers, got 0.9"),
    "a wrong beta": (TypeError, {"betas": ["0.9", "high"]}, "betas[1] must be a number, got the str 'high'"),
    "none where a number is": (TypeError, {"eps": "none"}, "eps must be a number, got a NoneType"),
    "a mapping": (TypeError, {"overrides": "adamw"}, "overrides must be a mapping from patterns of names, got str"),
    "a strategy": (TypeError, {"strategy": "ddp"}, "strategy must be a Lightning Trainer,"),
    "an option": (
        TypeError,
        {"overrides": {"*.q_proj.weight": {"lr": "fast"}}},
        "lr must be a number, got the str 'fast'",
    ),
    "unknown, near": (ValueError, {"fractoin": 0.5}, "unknown argument 'fractoin'; did you mean 'fraction'?"),
    "unknown, the Trainer's": (ValueError, {"learning_rate": 1}, "unknown argument 'learning_rate'; did you mean 'lr'"),
    "unknown, far": (
        ValueError,
        {"foreach": True},
        "unknown argument 'foreach'; known are lr, weight_decay, cautious_weight_decay, check_finite, capturable,",
    ),
    "arguments by other names": (ValueError, {"args": None}, "unknown argument 'args'; did you mean 'arguments'?"),
    "arguments are known too": (ValueError, {"foreach": True}, "strategy, arguments"),
    "other arguments": (TypeError, {"arguments": {}}, "arguments must be the Trainer's TrainingArguments, got dict"),
    "a wrong name": (
        ValueError,
        {"algorithm": "none"},
        "algorithm must be one of 'dion2', 'dion3', 'dion', 'muon', 'normuon', 'adamw', got",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case: str) -> None:
    error, settings, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        Dion2Factory()(make_model(), **{"lr": 1e-3, **settings})


def test_a_missing_learning_rate_is_named() -> None:
    with pytest.raises(TypeError, match=r"lr is missing.*Dion2Factory\.from_arguments\(args\)"):
        Dion2Factory()(make_model(), fraction=0.5)


# The Trainer's arguments


def test_arguments_say_what_overrides_do_not() -> None:
    args = arguments(learning_rate=1e-3, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    factory, settings = Dion2Factory.from_arguments(args, fraction=0.5)
    expected = build_optimizer(make_model(), 1e-3, weight_decay=0.2, betas=(0.8, 0.95), eps=1e-6, fraction=0.5)
    assert plain_groups(factory()(make_model(), **settings)) == plain_groups(expected)

    factory, settings = Dion2Factory.from_arguments(args, lr="2e-3", adamw_lr=1e-4, weight_decay=0.0, betas=(0.9, 0.9))
    expected = build_optimizer(make_model(), 2e-3, adamw_lr=1e-4, weight_decay=0.0, betas=(0.9, 0.9), eps=1e-6)
    assert plain_groups(factory()(make_model(), **settings)) == plain_groups(expected)


def test_arguments_are_read_when_the_optimizer_is_wanted() -> None:
    """A hyperparameter search changes them between trials."""
    args = arguments(learning_rate=1e-3)
    factory, settings = Dion2Factory.from_arguments(args)
    args.learning_rate = 5e-3
    assert factory()(make_model(), **settings).param_groups[0]["lr"] == 5e-3


def test_optim_args_are_arguments_too() -> None:
    args = arguments(optim_args="fraction=0.125, momentum=0.8,check_finite=true")
    factory, settings = Dion2Factory.from_arguments(args, momentum=0.7)
    group = factory()(make_model(), **settings).param_groups[0]
    assert (group["fraction"], group["momentum"], group["check_finite"]) == (0.125, 0.7, True)


@pytest.mark.parametrize(
    ("optim_args", "settings"),
    [
        ("splits={'*.a': 'whole', '*.b': 'q 1*2 | k 2'},lr=1", {"splits": {"*.a": "whole", "*.b": "q 1*2 | k 2"}}),
        ("lr=1, betas=(0.9, 0.95)", {"betas": (0.9, 0.95)}),
        (
            """overrides={"a,[b]": {'lr': 2, 'note': "a, b"}},lr=1""",
            {"overrides": {"a,[b]": {"lr": 2, "note": "a, b"}}},
        ),
        ("splits={'*.(.a': 'whole'},lr=1", {"splits": {"*.(.a": "whole"}}),
    ],
)
def test_commas_within_an_optim_arg(optim_args: str, settings: dict[str, Any]) -> None:
    assert _parsed(_pairs(optim_args)) == settings | {"lr": 1}


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        *(
            (wrong, f"like 'fraction=0.25,momentum=0.8', a value with a comma in parentheses, got '{wrong}'")
            for wrong in (
                "fraction",
                "betas=0.9,0.95",
                "fraction=0.25)(momentum=0.5",
                "**fraction",
                "fraction=1,fraction=2",
                "a=1,,b=2",
            )
        ),
        ("rank=4", "unknown argument 'rank'"),
        ("fraction=2", "fraction must lie in (0, 1], got 2"),
    ],
)
def test_wrong_optim_args_are_refused_at_once(optim_args: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Dion2Factory.from_arguments(arguments(optim_args=optim_args))


def test_wrong_overrides_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="did you mean 'fraction'"):
        Dion2Factory.from_arguments(arguments(), fractions=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="arguments must be the Trainer's TrainingArguments, got dict"):
        Dion2Factory.from_arguments({"learning_rate": 1e-3})


def test_the_pair_can_be_copied() -> None:
    factory, settings = copy.deepcopy(Dion2Factory.from_arguments(arguments(learning_rate=2e-3), fraction=0.5))
    group = factory()(make_model(), **settings).param_groups[0]
    assert (group["lr"], group["fraction"]) == (2e-3, 0.5)


# What leaves no matrices


def test_arguments_of_fsdp1_are_refused() -> None:
    args = arguments(fsdp=True, fsdp_config={"version": 1})
    factory, settings = Dion2Factory.from_arguments(args)
    with pytest.raises(ValueError, match=r"TrainingArguments with FSDP1 flattens matrices.*use FSDP2"):
        factory()(make_model(), **settings)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_what_accelerate_runs_under_is_refused_though_the_arguments_do_not_say_it(kind: DistributedType) -> None:
    """As under ``accelerate launch --use_deepspeed``."""
    accelerate.Accelerator(cpu=True)
    AcceleratorState._shared_state["distributed_type"] = kind
    PartialState._shared_state["distributed_type"] = kind
    with pytest.raises(ValueError, match=f"Accelerator with {kind.name} flattens matrices"):
        Dion2Factory()(nn.Linear(4, 4), lr=1e-3)
