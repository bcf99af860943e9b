"""Patterns of parameter names, and the errors of those that cannot be followed."""

from typing import Any

import pytest
import torch
from torch import nn

from dion2_lightning.routing.router import route_parameters
from tests.routing import models
from tests.routing.models import build, decide, groups


class TestOverrides:
    def test_algorithms(self) -> None:
        model = build("bert_classifier")
        decisions = decide(model, overrides={"classifier.weight": "dion2", "*.pooler.*": "adamw"})
        assert decisions["classifier.weight"].algorithm == "dion2"
        assert decisions["classifier.weight"].reason == "override `classifier.weight`"
        assert decisions["bert.pooler.dense.weight"].group == "adamw"
        assert decisions["bert.pooler.dense.bias"].group == "adamw-no-decay"

    def test_first_match_wins(self) -> None:
        decisions = decide(models.mlp(), overrides={"4.*": {"lr": 1.0}, "*.weight": "adamw"})
        assert [decisions[f"{index}.weight"].group for index in (0, 2, 4)] == ["adamw", "adamw", "dion2 [4.*]"]

    def test_options_make_groups_of_their_own(self) -> None:
        overrides: dict[str, Any] = {"4.*": {"lr": 0.5, "fraction": 1.0}, "2.weight": {"algorithm": "adamw", "lr": 0.1}}
        routing = route_parameters(models.mlp(), overrides=overrides)
        entries = [{key: value for key, value in group.items() if key != "params"} for group in routing.param_groups()]
        assert entries == [
            {"name": "dion2", "algorithm": "dion2"},
            {"name": "dion2 [4.*]", "algorithm": "dion2", "lr": 0.5, "fraction": 1.0},
            {"name": "adamw-no-decay", "algorithm": "adamw", "weight_decay": 0.0},
            {"name": "adamw-no-decay [4.*]", "algorithm": "adamw", "weight_decay": 0.0, "lr": 0.5},
            {"name": "adamw [2.weight]", "algorithm": "adamw", "lr": 0.1},
        ]
        assert {each.name: each.reason for each in routing.decisions}["4.weight"] == "linear; override `4.*`"

    def test_an_option_that_no_group_takes_is_refused(self) -> None:
        """A pattern may match matrices and biases, but then some of them have to have the setting."""
        message = r"override '\*.bias': 'fraction' has no effect on what it matches, which is trained by 'adamw'"
        with pytest.raises(ValueError, match=message):
            route_parameters(models.mlp(), overrides={"*.bias": {"lr": 0.5, "fraction": 1.0}})

    def test_explicit_weight_decay_wins_for_biases_too(self) -> None:
        routing = route_parameters(models.mlp(), overrides={"*.bias": {"weight_decay": 0.3}})
        assert groups(routing)["adamw [*.bias]"]["weight_decay"] == 0.3

    def test_detected_storage_stays(self) -> None:
        decisions = decide(
            build("gpt2"), overrides={"*.c_fc.weight": "dion2", "*.c_attn.weight": {"transposed": False}}
        )
        assert decisions["transformer.h.0.mlp.c_fc.weight"].group == "dion2-transposed"
        assert decisions["transformer.h.0.attn.c_attn.weight"].group == "dion2"

        experts = decide(build("llama4_text"), overrides={"*.experts.*": "dion2"})
        assert experts["model.layers.0.feed_forward.experts.down_proj"].group == "dion2-experts-transposed"

    def test_stack_by_hand(self) -> None:
        model = nn.ParameterDict({"stack": torch.zeros(3, 4, 5)})
        override = {"algorithm": "dion2", "batched": True, "transposed": True}
        assert decide(model, overrides={"stack": override})["stack"].group == "dion2-experts-transposed"

    def test_convolution_by_hand(self) -> None:
        model = nn.ParameterDict({"kernel": torch.zeros(8, 4, 3, 3), "up": torch.zeros(8, 4, 3)})
        overrides: dict[str, Any] = {
            "kernel": {"algorithm": "dion2", "convolution": True},
            "up": {"algorithm": "dion2", "convolution": True, "transposed": True, "splits": "group 2*4 along inputs"},
        }
        decisions = decide(model, overrides=overrides)
        assert {name: each.group for name, each in decisions.items()} == {
            "kernel": "dion2-convolutions",
            "up": "dion2-convolutions-group-transposed",
        }

    def test_groups_of_a_convolution_that_are_small(self) -> None:
        model = nn.Conv2d(8, 16, 3, groups=4)
        assert decide(model)["weight"].algorithm == "adamw"
        weight = decide(model, overrides={"weight": "dion2"})["weight"]
        assert (weight.group, weight.splits) == ("dion2-convolutions-group", "group 4*4")
        whole = decide(model, overrides={"weight": {"algorithm": "dion2", "splits": "whole"}})["weight"]
        assert (whole.group, whole.splits) == ("dion2-convolutions", "whole")

    def test_splits_beside_an_override_take_all_groups_together(self) -> None:
        model = nn.Conv2d(64, 64, 3, groups=64)
        whole = decide(model, overrides={"weight": {"algorithm": "dion2"}}, splits={"weight": "whole"})["weight"]
        assert (whole.group, whole.splits) == ("dion2-convolutions", "whole")

    def test_patch_embedding(self) -> None:
        name = "vit.embeddings.patch_embeddings.projection.weight"
        assert decide(build("vit_classifier"), overrides={name: "dion2"})[name].group == "dion2-convolutions"

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (
                nn.Conv2d(8, 8, 3, groups=8),
                "override 'weight': parameter 'weight' of shape (8, 1, 3, 3) is the kernel of a convolution with "
                "groups=8, each a vector of 9 entries, which is no matrix; leave it to 'adamw', or pass "
                "splits='whole' to take all groups as one matrix (8, 9)",
            ),
            (
                nn.ConvTranspose1d(8, 8, 3, groups=8),
                "override 'weight': parameter 'weight' of shape (8, 1, 3) is the kernel of a convolution with "
                "groups=8, each a vector of 3 entries, which is no matrix; leave it to 'adamw', or pass "
                "splits='whole' to take all groups as one matrix (8, 3)",
            ),
        ],
    )
    def test_groups_of_a_convolution_that_are_vectors(self, module: nn.Module, message: str) -> None:
        with pytest.raises(ValueError) as error:
            decide(module, overrides={"weight": "dion2"})
        assert str(error.value) == message
        whole = {"algorithm": "dion2", "splits": "whole"}
        assert decide(module, overrides={"weight": whole})["weight"].group.startswith("dion2-convolutions")

    def test_any_name_of_a_tied_parameter_matches(self) -> None:
        decisions = decide(build("llama_tied"), overrides={"lm_head.*": {"lr": 1e-3}})
        assert decisions["model.embed_tokens.weight"].group == "adamw [lm_head.*]"

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"*.qproj.weight": "adamw"}, r"'\*.qproj.weight' matches no parameter \(close names: .*q_proj.weight'"),
            ({"*.Q_proj.weight": "adamw"}, "is case-sensitive"),
            ({"*.q_proj.*": "adamw", "*.layers.0.*.q_proj.weight": "dion2"}, r"earlier patterns \('\*.q_proj.\*'\)"),
            ({"model.embed_tokens.*": "adamw"}, "matches frozen parameters only, such as 'model.embed_tokens.weight'"),
            (
                {"*.weight": "muon"},
                r"'\*.weight': the algorithm must be 'dion2' or 'dion3' or 'dion' or 'adamw', got 'muon'",
            ),
            (
                {"*.weight": {"algorithm": ["dion2"]}},
                r"must be 'dion2' or 'dion3' or 'dion' or 'adamw', got \['dion2'\]",
            ),
            ({"*.weight": {"algorithm": "frozen"}}, r"requires_grad_\(False\)"),
            ({"*.weight": {"name": "mine"}}, "name cannot be set"),
            (
                {"model.norm.weight": "dion2"},
                r"^override 'model.norm.weight' sends 'model.norm.weight' of shape \(32,\) to 'dion2', which needs",
            ),
            ({"*.q_proj.weight": {"batched": True}}, r"q_proj.weight' of shape \(32, 32\) is not a stack of matrices"),
        ],
    )
    def test_errors(self, overrides: dict[str, Any], message: str) -> None:
        model = build("llama")
        model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
        with pytest.raises(ValueError, match=message):
            route_parameters(model, overrides=overrides)

    @pytest.mark.parametrize(
        ("pattern", "close"),
        [("2.wieght", "'2.weight'"), ("*.wieght", "'*.weight'"), ("[24].wieght", "'*.weight'")],
    )
    def test_a_misspelt_name_is_answered_with_names_and_a_pattern_with_patterns(self, pattern: str, close: str) -> None:
        with pytest.raises(ValueError) as error:
            route_parameters(models.mlp(), overrides={pattern: "adamw"})
        assert f"override {pattern!r} matches no parameter (close names: {close}" in str(error.value)

    @pytest.mark.parametrize(
        ("parameter", "message"),
        [
            (
                torch.zeros(3, 4, 5),
                r"^override 'table': .* is not a matrix, .*; for a stack of matrices set batched=True.*, for a "
                "convolution convolution=True",
            ),
            (torch.zeros(2, 3, 4, 5), r"^override 'table': parameter 'table' of shape \(2, 3, 4, 5\) is not a matrix"),
            (torch.zeros(3, 4, dtype=torch.complex64), r"^override 'table': .* is in torch.complex64; only real"),
        ],
    )
    def test_what_holds_no_matrix(self, parameter: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            route_parameters(nn.ParameterDict({"table": parameter}), overrides={"table": "dion2"})

    def test_wrong_type(self) -> None:
        message = "expected 'dion2', 'dion3', 'dion', 'adamw' or a mapping of group options, got 3"
        with pytest.raises(TypeError, match=message):
            route_parameters(models.mlp(), overrides={"*": 3})  # type: ignore[dict-item]

    def test_types(self) -> None:
        with pytest.raises(TypeError, match=r"^override '\*\.weight': batched must be True or False, got 'yes'"):
            decide(build("llama"), overrides={"*.weight": {"batched": "yes"}})
        with pytest.raises(TypeError, match=r"^override '\*\.weight': splits must be a text such as 'q 2048"):
            decide(build("llama"), overrides={"*.weight": {"splits": 3}})


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["*.weight"], TypeError, "overrides must be a mapping from patterns of names, got list"),
        ({3: "adamw"}, TypeError, "overrides: a pattern of names must be a text, got 3"),
        ({"lm_head.weight": {"given_lr": 1.0}}, ValueError, "given_lr cannot be set, routing does that"),
        ({"lm_head.weight": {"max_grad_norm": 1.0}}, ValueError, "is of a whole step; pass it to build_optimizer"),
        ({"lm_head.weight": {"transposed": True}}, ValueError, "'transposed' has no effect on what it matches"),
        ({"*.Q_PROJ.weight": "adamw"}, ValueError, r"close names: 'model.layers.\*.self_attn.q_proj.weight'"),
        ({"*.self_attn.q_prj": "adamw"}, ValueError, r"close names: '.*q_proj.weight'"),
    ],
)
def test_more_errors(overrides: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route_parameters(build("llama"), overrides=overrides)


def test_what_is_no_model() -> None:
    nothing: Any = None
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got NoneType"):
        route_parameters(nothing)
