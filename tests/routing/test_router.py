"""Which parameter goes where, for many families of models and for everything that wraps them.

The reports of small models are compared with the files in golden/routing. After a change that is meant, write them anew
with ``UPDATE_GOLDEN=1 python -m pytest tests/routing/test_router.py`` and read the difference line by line.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dion2_lightning.routing.router import Decision, Routing, route_parameters
from tests import routing_models
from tests.routing_models import GOLDEN, build

GOLDEN_DIRECTORY = Path(__file__).parent / "golden"


def decide(model: nn.Module, **arguments: Any) -> dict[str, Decision]:
    return {decision.name: decision for decision in route_parameters(model, **arguments).decisions}


def algorithms(model: nn.Module, **arguments: Any) -> dict[str, str]:
    return {name: decision.algorithm for name, decision in decide(model, **arguments).items()}


def groups(routing: Routing) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in routing.param_groups()}


def on_meta(builder: Callable[..., nn.Module], **changes: Any) -> nn.Module:
    with torch.device("meta"):
        return builder(**changes)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_report(name: str) -> None:
    report = route_parameters(build(name)).report() + "\n"
    path = GOLDEN_DIRECTORY / f"{name}.txt"
    if "UPDATE_GOLDEN" in os.environ:
        path.write_text(report)
    assert report == path.read_text()


def test_every_golden_file_has_a_model() -> None:
    assert {path.stem for path in GOLDEN_DIRECTORY.glob("*.txt")} == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_trainable_parameter_once_and_in_model_order(name: str) -> None:
    model = build(name)
    routing = route_parameters(model)

    assert [decision.name for decision in routing.decisions] == [name for name, _ in model.named_parameters()]
    grouped = [parameter for group in routing.param_groups() for _, parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    position = {parameter: index for index, parameter in enumerate(model.parameters())}
    for group in routing.param_groups():
        order = [position[parameter] for _, parameter in group["params"]]
        assert order and order == sorted(order)


class TestGroups:
    def test_order_and_entries(self) -> None:
        routing = route_parameters(build("gpt_oss"))
        entries = [{key: value for key, value in group.items() if key != "params"} for group in routing.param_groups()]
        assert entries == [
            {"name": "dion2", "algorithm": "dion2"},
            {"name": "dion2-experts-transposed", "algorithm": "dion2", "batched": True, "transposed": True},
            {"name": "adamw", "algorithm": "adamw"},
            {"name": "adamw-no-decay", "algorithm": "adamw", "weight_decay": 0.0},
        ]

    def test_torch_optimizers_take_them(self) -> None:
        optimizer = torch.optim.SGD(route_parameters(routing_models.mlp()).param_groups(), lr=0.1)
        assert [group["param_names"] for group in optimizer.param_groups] == [
            ["0.weight", "2.weight", "4.weight"],
            ["0.bias", "2.bias", "4.bias"],
        ]

    def test_each_call_returns_new_groups(self) -> None:
        routing = route_parameters(routing_models.mlp())
        routing.param_groups()[0]["params"].clear()
        assert len(routing.param_groups()[0]["params"]) == 3

    def test_only_some_parameters(self) -> None:
        model = routing_models.mlp()
        added = route_parameters(model).param_groups(only=model.get_submodule("2").parameters())
        assert [[name for name, _ in group["params"]] for group in added] == [["2.weight"], ["2.bias"]]

    def test_no_decay(self) -> None:
        model: Any = nn.Linear(4, 4)
        model.attention_bias = nn.Parameter(torch.zeros(2, 3))
        model.table = nn.Parameter(torch.zeros(2, 3))
        model.marked = nn.Parameter(torch.zeros(2, 3))
        model.marked._no_weight_decay = True
        names = {name: [each for each, _ in group["params"]] for name, group in groups(route_parameters(model)).items()}
        assert names == {
            "dion2": ["weight"],
            "adamw": ["table"],
            "adamw-no-decay": ["bias", "attention_bias", "marked"],
        }

    def test_matrices_can_be_marked_too(self) -> None:
        model: Any = nn.Linear(4, 4, bias=False)
        model.weight._no_weight_decay = True
        assert groups(route_parameters(model))["dion2-no-decay"]["weight_decay"] == 0.0


class TestOrientation:
    def test_conv1d_stores_in_out(self) -> None:
        weight = decide(build("gpt2"))["transformer.h.0.attn.c_attn.weight"]
        assert (weight.shape, weight.transposed, weight.batched) == ((32, 96), True, False)

    @pytest.mark.parametrize(
        ("name", "pattern", "transposed"),
        [
            ("gpt_oss", "experts.", True),
            ("llama4_text", "experts.", True),
            ("mixtral", "experts.", False),
            ("qwen3_moe", "experts.", False),
            ("jetmoe", "_linear.", False),
        ],
    )
    def test_expert_stacks(self, name: str, pattern: str, transposed: bool) -> None:
        stacks = [each for each in decide(build(name)).values() if pattern in each.name and len(each.shape) == 3]
        assert stacks
        assert all(each.batched and each.transposed is transposed and each.algorithm == "dion2" for each in stacks)

    @pytest.mark.parametrize(("first", "second"), [("gate_up_proj", "down_proj"), ("w1", "w2")])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_hidden_size_tells_even_if_one_stack_is_square(self, first: str, second: str, transposed: bool) -> None:
        model: Any = nn.Module()
        model.experts = nn.Module()
        model.experts.hidden_size = 8
        shapes = {first: (4, 8, 8), second: (4, 3, 8) if transposed else (4, 8, 3)}
        for name, shape in shapes.items():
            model.experts.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        assert all(each.transposed is transposed for each in decide(model).values())

    def test_stack_of_vectors_is_no_stack_of_matrices(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        model.register_module("experts", nn.ParameterList([nn.Parameter(torch.zeros(4, 1, 8))]))
        assert decide(model)["experts.0"].algorithm == "adamw"


class TestEmbeddings:
    def test_tied_by_identity(self) -> None:
        decisions = decide(build("llama_tied"))
        assert "lm_head.weight" not in decisions
        assert decisions["model.embed_tokens.weight"].reason == "input embedding, tied to `lm_head.weight`"

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_tied_by_storage(self, device: str) -> None:
        with torch.device(device):
            model: Any = nn.ModuleDict(
                {"embedding": nn.Embedding(8, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 8)}
            )
        model["head"].weight = nn.Parameter(model["embedding"].weight.data)
        assert model["head"].weight is not model["embedding"].weight
        decisions = decide(model)
        assert decisions["head.weight"].reason == "output embedding tied to `embedding.weight`"
        assert decisions["body.weight"].algorithm == "dion2"

    def test_head_before_the_embedding_that_it_is_tied_to(self) -> None:
        model: Any = nn.ModuleDict({"head": nn.Linear(4, 8, bias=False), "embedding": nn.Embedding(8, 4)})
        model["embedding"].weight = model["head"].weight
        assert algorithms(model) == {"head.weight": "adamw"}

    def test_views_into_one_buffer_are_not_tied(self) -> None:
        flat = torch.zeros(2, 4, 4)
        model: Any = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "linear": nn.Linear(4, 4, bias=False)})
        model["embedding"].weight = nn.Parameter(flat[0])
        model["linear"].weight = nn.Parameter(flat[1])
        assert algorithms(model) == {"embedding.weight": "adamw", "linear.weight": "dion2"}

    def test_sparse_parameters_have_no_storage_to_share(self) -> None:
        model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3, bias=False))
        model.register_parameter("table", nn.Parameter(torch.eye(3).to_sparse()))
        assert algorithms(model) == {"0.weight": "adamw", "1.weight": "dion2", "table": "adamw"}

    def test_an_error_while_looking_for_ties_is_not_taken_for_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An embedding whose tie is missed would be trained as a matrix."""

        def fail(self: torch.Tensor) -> None:
            raise RuntimeError("storage was freed")

        monkeypatch.setattr(torch.Tensor, "untyped_storage", fail)
        with pytest.raises(RuntimeError, match="storage was freed"):
            route_parameters(nn.Linear(4, 4))

    def test_models_that_look_for_an_embedding_in_a_part_they_lack(self) -> None:
        """As transformers' SAM 3 tracker does, whose vision encoder is optional."""

        class Tracker(transformers.LlamaForCausalLM):
            def get_input_embeddings(self) -> nn.Module:
                raise AttributeError("'NoneType' object has no attribute 'get_input_embeddings'")

        model = on_meta(lambda: Tracker(routing_models.llama().config))
        decisions = decide(model)
        assert decisions["model.embed_tokens.weight"].algorithm == "adamw"
        assert decisions["model.layers.0.mlp.up_proj.weight"].algorithm == "dion2"

    def test_nested_models_have_embeddings_too(self) -> None:
        class Captioner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.decoder = routing_models.llama()

        decisions = decide(on_meta(Captioner))
        assert decisions["decoder.lm_head.weight"].reason == "output embedding"
        assert decisions["decoder.model.layers.0.mlp.up_proj.weight"].algorithm == "dion2"


class TestHeads:
    def test_several_layers_outside_the_base_model(self) -> None:
        decisions = decide(build("deberta_v2_classifier"))
        assert decisions["pooler.dense.weight"].reason == "head: outside base model `deberta`"
        assert decisions["classifier.weight"].algorithm == "adamw"

    def test_head_of_a_lightning_module(self) -> None:
        routing = route_parameters(build("lightning_classifier"))
        assert [
            each.name for each in routing.decisions if each.reason == "head: outside transformers model `backbone`"
        ] == [
            "head.0.weight",
            "head.2.weight",
        ]

    def test_transformers_model_inside_a_module_keeps_its_own_head(self) -> None:
        model = nn.ModuleDict({"model": build("bert_classifier")})
        decisions = decide(model)
        assert decisions["model.classifier.weight"].reason == "head: outside base model `bert`"
        assert decisions["model.bert.pooler.dense.weight"].algorithm == "dion2"

    def test_label_layer_of_a_model_without_base_model(self) -> None:
        config = transformers.CLIPConfig(
            text_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            num_labels=5,
        )
        decisions = decide(on_meta(transformers.CLIPForImageClassification, config=config))
        assert decisions["classifier.weight"].reason == "head: one row a label"
        assert [name for name, each in decisions.items() if each.reason.startswith("head")] == ["classifier.weight"]

    def test_plain_module_says_that_no_head_was_guessed(self) -> None:
        routing = route_parameters(routing_models.mlp())
        assert 'overrides={"4.weight": "adamw"}' in routing.notes[0]


class TestRouters:
    @pytest.mark.parametrize(
        ("name", "router"),
        [
            ("mixtral", "mlp.gate.weight"),
            ("qwen3_moe", "mlp.gate.weight"),
            ("deepseek_v3", "mlp.gate.weight"),
            ("hunyuan_moe", "mlp.gate.wg.weight"),
            ("jetmoe", "mlp.router.layer.weight"),
            ("gpt_oss", "mlp.router.weight"),
            ("llama4_text", "feed_forward.router.weight"),
            ("switch_transformer", "mlp.router.classifier.weight"),
        ],
    )
    def test_by_class(self, name: str, router: str) -> None:
        found = [each for each in decide(build(name)).values() if each.name.endswith(router)]
        assert found
        assert all(each.algorithm == "adamw" and each.reason.startswith("router") for each in found)

    def test_by_structure(self) -> None:
        class Gate(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.projection = nn.Linear(8, 4, bias=False)

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate = nn.Linear(8, 4, bias=False)
                self.second_gate = Gate()
                self.experts = nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(4))
                self.shared_experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(8))
                self.attention = nn.ModuleDict(
                    {"key": nn.Linear(8, 4, bias=False), "query": nn.Linear(8, 8, bias=False)}
                )
                self.wide = nn.Linear(8, 8, bias=False)

        routed = [name for name, algorithm in algorithms(Block()).items() if algorithm == "adamw"]
        assert routed == ["gate.weight", "second_gate.projection.weight"]

    def test_gated_layers_are_no_routers(self) -> None:
        class GatedMLP(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate_proj = nn.Linear(8, 8)

        class MoeForgetGate(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate = nn.Linear(8, 8)

        model = nn.Sequential(GatedMLP(), MoeForgetGate())
        assert algorithms(model)["0.gate_proj.weight"] == algorithms(model)["1.gate.weight"] == "dion2"

    def test_name_of_the_root_does_not_count(self) -> None:
        class RouterNet(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)

        assert algorithms(RouterNet())["linear.weight"] == "dion2"


class TestLinear:
    def test_classes_by_name(self) -> None:
        class QuantizedLinear(nn.Module):
            def __init__(self, *shape: int) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(shape))
                self.scale = nn.Parameter(torch.zeros(shape))

        model = nn.Sequential(QuantizedLinear(4, 4), QuantizedLinear(3, 4, 4))
        assert algorithms(model) == {"0.weight": "dion2", "0.scale": "adamw", "1.weight": "adamw", "1.scale": "adamw"}

    def test_attention_projections(self) -> None:
        decisions = decide(nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True))
        assert [name for name, each in decisions.items() if each.algorithm == "dion2"] == [
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "out_proj.weight",
        ]

    @pytest.mark.parametrize("module", [nn.Linear(8, 1), nn.Linear(1, 8)])
    def test_single_row_or_column(self, module: nn.Module) -> None:
        assert algorithms(module) == {"weight": "adamw", "bias": "adamw"}

    def test_other_weights(self) -> None:
        decisions = decide(
            nn.ModuleDict({"lstm": nn.LSTM(4, 4), "bilinear": nn.Bilinear(2, 3, 4), "conv": nn.Conv1d(4, 4, 2)})
        )
        assert decisions["conv.weight"].reason == "convolution"
        assert decisions["lstm.weight_ih_l0"].reason == "not a linear module's weight; opt in with an override"
        assert {each.algorithm for each in decisions.values()} == {"adamw"}

    def test_complex_weights(self) -> None:
        assert decide(nn.Linear(4, 4, dtype=torch.complex64))["weight"].reason == "not a real matrix"


class TestLora:
    @pytest.mark.parametrize(("lora", "factors"), [("adamw", ()), ("B", ("lora_B",)), ("both", ("lora_A", "lora_B"))])
    def test_modes(self, lora: str, factors: tuple[str, ...]) -> None:
        decisions = decide(build("lora_llama"), lora=lora)
        matrices = [name for name, each in decisions.items() if each.algorithm == "dion2"]
        expected = [name for name in decisions if any(f".{factor}." in name for factor in factors)]
        assert matrices == expected
        assert len(matrices) == 4 * len(factors)

    def test_modules_to_save(self) -> None:
        decisions = decide(build("lora_llama"), lora="both")
        saved = {name: each.reason for name, each in decisions.items() if "modules_to_save" in name}
        assert list(saved.values()) == ["input embedding", "output embedding"]

    def test_factors_of_heads_embeddings_and_magnitudes(self) -> None:
        changes = {"target_modules": ["lm_head", "embed_tokens", "q_proj"], "modules_to_save": None, "use_dora": True}
        decisions = decide(on_meta(routing_models.lora_llama, **changes), lora="both")
        prefix = "base_model.model."
        assert decisions[f"{prefix}lm_head.lora_B.default.weight"].algorithm == "dion2"
        assert decisions[f"{prefix}model.embed_tokens.lora_embedding_B.default"].reason == "LoRA factor of an embedding"
        assert {each.algorithm for name, each in decisions.items() if "magnitude" in name} == {"adamw"}

    def test_unfrozen_base_layer_is_linear(self) -> None:
        model = build("lora_llama")
        name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
        model.get_parameter(name).requires_grad_()
        assert decide(model)[name].reason == "linear"

    def test_names_alone_make_no_factor(self) -> None:
        assert decide(nn.ModuleDict({"lora_A": nn.Linear(8, 4)}))["lora_A.weight"].reason == "linear"

    def test_unknown_mode(self) -> None:
        with pytest.raises(ValueError, match="lora must be one of 'adamw', 'B', 'both', got 'A'"):
            route_parameters(routing_models.mlp(), lora="A")


class TestOverrides:
    def test_algorithms(self) -> None:
        model = build("bert_classifier")
        decisions = decide(model, overrides={"classifier.weight": "dion2", "*.pooler.*": "adamw"})
        assert decisions["classifier.weight"].algorithm == "dion2"
        assert decisions["classifier.weight"].reason == "override `classifier.weight`"
        assert decisions["bert.pooler.dense.weight"].group == "adamw"
        assert decisions["bert.pooler.dense.bias"].group == "adamw-no-decay"

    def test_first_match_wins(self) -> None:
        decisions = decide(routing_models.mlp(), overrides={"4.*": {"lr": 1.0}, "*.weight": "adamw"})
        assert [decisions[f"{index}.weight"].group for index in (0, 2, 4)] == ["adamw", "adamw", "dion2 [4.*]"]

    def test_options_make_groups_of_their_own(self) -> None:
        overrides: dict[str, Any] = {"4.*": {"lr": 0.5, "fraction": 1.0}, "2.weight": {"algorithm": "adamw", "lr": 0.1}}
        routing = route_parameters(routing_models.mlp(), overrides=overrides)
        entries = [{key: value for key, value in group.items() if key != "params"} for group in routing.param_groups()]
        assert entries == [
            {"name": "dion2", "algorithm": "dion2"},
            {"name": "dion2 [4.*]", "algorithm": "dion2", "lr": 0.5, "fraction": 1.0},
            {"name": "adamw-no-decay", "algorithm": "adamw", "weight_decay": 0.0},
            {"name": "adamw-no-decay [4.*]", "algorithm": "adamw", "weight_decay": 0.0, "lr": 0.5, "fraction": 1.0},
            {"name": "adamw [2.weight]", "algorithm": "adamw", "lr": 0.1},
        ]
        assert {each.name: each.reason for each in routing.decisions}["4.weight"] == "linear; override `4.*`"

    def test_explicit_weight_decay_wins_for_biases_too(self) -> None:
        routing = route_parameters(routing_models.mlp(), overrides={"*.bias": {"weight_decay": 0.3}})
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

    def test_any_name_of_a_tied_parameter_matches(self) -> None:
        decisions = decide(build("llama_tied"), overrides={"lm_head.*": {"lr": 1e-3}})
        assert decisions["model.embed_tokens.weight"].group == "adamw [lm_head.*]"

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"*.qproj.weight": "adamw"}, r"'\*.qproj.weight' matches no parameter \(close names: .*q_proj.weight'"),
            ({"*.Q_proj.weight": "adamw"}, "tells upper from lower case"),
            ({"*.q_proj.*": "adamw", "*.layers.0.*.q_proj.weight": "dion2"}, r"earlier patterns \('\*.q_proj.\*'\)"),
            ({"model.embed_tokens.*": "adamw"}, "matches frozen parameters only, such as 'model.embed_tokens.weight'"),
            ({"*.weight": "muon"}, r"'\*.weight': the algorithm must be 'dion2' or 'adamw', got 'muon'"),
            ({"*.weight": {"algorithm": "frozen"}}, r"requires_grad_\(False\)"),
            ({"*.weight": {"name": "mine"}}, "name cannot be set"),
            ({"*.weight": {"batched": "yes"}}, "batched must be True or False, got 'yes'"),
            (
                {"model.norm.weight": "dion2"},
                r"sends 'model.norm.weight' of shape \(32,\) to dion2, but it is not a matrix",
            ),
            ({"*.q_proj.weight": {"batched": True}}, "batched=True needs 3 axes"),
        ],
    )
    def test_errors(self, overrides: dict[str, Any], message: str) -> None:
        model = build("llama")
        model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
        with pytest.raises(ValueError, match=message):
            route_parameters(model, overrides=overrides)

    @pytest.mark.parametrize(
        ("parameter", "message"),
        [
            (torch.zeros(3, 4, 5), "it has 3 axes; add batched=True"),
            (torch.zeros(2, 3, 4, 5), "it is not a matrix"),
            (torch.zeros(3, 4, dtype=torch.complex64), "torch.complex64 is not real"),
        ],
    )
    def test_what_holds_no_matrix(self, parameter: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            route_parameters(nn.ParameterDict({"table": parameter}), overrides={"table": "dion2"})

    def test_wrong_type(self) -> None:
        with pytest.raises(TypeError, match="expected 'dion2', 'adamw' or a mapping of group options, got 3"):
            route_parameters(routing_models.mlp(), overrides={"*": 3})  # type: ignore[dict-item]


class TestWrappers:
    def test_checkpointed_and_compiled_layers(self) -> None:
        plain, wrapped = build("mixtral"), build("mixtral")
        body: Any = wrapped.get_submodule("model")
        body.layers[0] = checkpoint_wrapper(body.layers[0])
        body.layers[1].mlp.gate = torch.compile(body.layers[1].mlp.gate)
        body.layers[1].mlp.experts = torch.compile(checkpoint_wrapper(body.layers[1].mlp.experts))
        body.embed_tokens = torch.compile(body.embed_tokens)
        assert decide(wrapped) == decide(plain)

    def test_compiled_base_model_head_and_root(self) -> None:
        plain = build("bert_classifier")
        wrapped: Any = build("bert_classifier")
        wrapped.bert = torch.compile(wrapped.bert)
        wrapped.classifier = torch.compile(wrapped.classifier)
        compiled: Any = torch.compile(wrapped)
        assert decide(compiled) == decide(plain)
        assert decide(nn.DataParallel(compiled)) == decide(plain)

    def test_prefix_module_is_kept_inside(self) -> None:
        assert set(decide(nn.ModuleDict({"module": nn.Linear(4, 4)}))) == {"module.weight", "module.bias"}

    def test_shared_and_cyclic_modules(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.append(model[0])
        object.__setattr__(model[1], "_modules", {"parent": model})
        assert set(decide(model)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


class TestFrozen:
    def test_left_out_but_reported(self) -> None:
        model = routing_models.mlp()
        model.get_submodule("0").requires_grad_(False)
        routing = route_parameters(model)
        assert [each.group for each in routing.decisions] == [None, None, *["dion2", "adamw-no-decay"] * 2]
        assert "frozen           2         144             -" in routing.report()

    def test_nothing_to_train(self) -> None:
        with pytest.raises(ValueError, match="Sequential has no trainable parameter"):
            route_parameters(routing_models.mlp().requires_grad_(False))


class TestRefused:
    @pytest.mark.parametrize(
        ("attribute", "message"),
        [("_fsdp_flattened", "FSDP1.*fully_shard"), ("ds_id", "ZeRO.*fully_shard"), ("ds_tensor", "ZeRO.*fully_shard")],
    )
    def test_flattened_parameters(self, attribute: str, message: str) -> None:
        model = routing_models.mlp()
        setattr(model.get_parameter("2.weight"), attribute, True)
        with pytest.raises(ValueError, match=f"'2.weight' .*{message}"):
            route_parameters(model)

    def test_uninitialized_parameters(self) -> None:
        with pytest.raises(ValueError, match="'weight' has no shape yet"):
            route_parameters(nn.LazyLinear(4))

    def test_a_parameter_out_of_reach_is_noticed(self) -> None:
        class Hidden(nn.Linear):
            def named_children(self) -> Iterator[tuple[str, nn.Module]]:
                return iter(())

        model = Hidden(4, 4)
        model.add_module("extra", nn.Linear(4, 4))
        with pytest.raises(RuntimeError, match="4 trainable parameters became 2 in the groups"):
            route_parameters(model)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_parameters() -> None:
    plain, sharded = routing_models.llama_tied(), routing_models.llama_tied()
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    assert decide(sharded) == decide(plain)


def test_imports_torch_only() -> None:
    program = (
        "import sys, dion2_lightning.routing.router;"
        "print([name for name in ('transformers', 'peft', 'lightning', 'accelerate') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_module_set_up_by_fabric_is_looked_through() -> None:
    from lightning import Fabric

    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8))
    wrapped = Fabric(accelerator="cpu", devices=1).setup_module(model)
    assert [each.name for each in route_parameters(wrapped).decisions] == ["0.weight", "1.weight", "1.bias"]
    assert route_parameters(wrapped).decisions == route_parameters(model).decisions
