"""What a parameter is, and how its matrices are stored."""

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from dion2_lightning import build_optimizer
from dion2_lightning.routing.router import route_parameters
from dion2_lightning.routing.rules import Role
from tests.installed import is_before
from tests.routing import models
from tests.routing.models import algorithms, build, decide, on_meta


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        (
            "mixtral",
            {
                "model.embed_tokens.weight": Role.EMBEDDING,
                "model.layers.0.self_attn.q_proj.weight": Role.MATRIX,
                "model.layers.0.mlp.gate.weight": Role.ROUTER,
                "model.layers.0.mlp.experts.down_proj": Role.EXPERTS,
                "model.norm.weight": Role.VECTOR,
                "lm_head.weight": Role.HEAD,
            },
        ),
        ("llama_tied", {"model.embed_tokens.weight": Role.EMBEDDING}),
        ("bert_classifier", {"classifier.weight": Role.HEAD, "classifier.bias": Role.VECTOR}),
        (
            "conv_net",
            {
                "0.weight": Role.CONVOLUTION,
                "1.weight": Role.VECTOR,
                "3.weight": Role.CONVOLUTION_OTHER,
                "5.weight": Role.MATRIX,
            },
        ),
        ("vit_classifier", {"vit.embeddings.patch_embeddings.projection.weight": Role.EMBEDDING}),
        ("dbrx", {"transformer.blocks.0.ffn.experts.mlp.w2": Role.EXPERTS}),
        ("mamba", {"backbone.layers.0.mixer.A_log": Role.OTHER}),
        ("transformer_encoder", {"layers.0.self_attn.in_proj_weight": Role.MATRIX}),
        (
            "lora_llama",
            {
                "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": Role.FROZEN,
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": Role.LORA_A,
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight": Role.LORA_B,
                "base_model.model.lm_head.modules_to_save.default.weight": Role.HEAD,
            },
        ),
    ],
)
def test_roles(name: str, roles: dict[str, Role]) -> None:
    """They say what a parameter is, whatever it is trained by."""
    model = build(name)
    for arguments in ({}, {"lora": "both"}, {"control": True}, {"overrides": {"*": "adamw"}}):
        decisions = decide(model, **arguments)
        assert {each: decisions[each].role for each in roles} == roles


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

    @pytest.mark.parametrize("transposed", [False, True])
    def test_the_router_may_be_inside_a_module_of_its_own(self, transposed: bool) -> None:
        block = nn.Module()
        block.router = nn.Sequential(nn.Linear(6, 4), nn.Linear(32, 8, bias=False))
        block.experts = nn.Module()
        shapes = {"c_fc": (32, 128), "c_proj": (128, 32)}
        for name, shape in shapes.items():
            stored = shape if transposed else shape[::-1]
            block.experts.register_parameter(name, nn.Parameter(torch.zeros(8, *stored)))
        decisions = decide(block)
        assert all(decisions[f"experts.{name}"].transposed is transposed for name in shapes)

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

    def test_stacks_in_two_dimensions(self) -> None:
        """DBRX multiplies by w1[e]^T and v1[e]^T, and by w2[e] as it is: only that is stored (in, out)."""
        decisions = decide(build("dbrx"))
        name = "transformer.blocks.0.ffn.experts.mlp."
        assert {
            each: (decisions[name + each].transposed, decisions[name + each].splits) for each in ("w1", "v1", "w2")
        } == {
            "w1": (False, "expert 4*48"),
            "v1": (False, "expert 4*48"),
            "w2": (True, "expert 4*48 along inputs"),
        }

    @pytest.mark.parametrize(
        ("registered", "name", "shape", "sizes", "is_stack"),
        [
            ("experts", "w1", (12, 8), {}, True),
            ("experts", "scale", (12, 8), {}, False),
            ("experts", "w1", (12, 6), {}, False),
            ("experts", "w1", (4, 8), {"width": 1}, False),
            ("experts", "w1", (12, 8), {"num_experts": 5, "n_shared_experts": 0}, False),
            ("experts", "w1", (12, 8), {"num_experts": None, "num_experts_per_tok": 4}, False),
            ("experts", "w1", (12, 8), {"width": 6}, False),
            ("shared_experts", "w1", (12, 8), {}, False),
        ],
        ids=["it is", "name", "hidden size", "one row each", "count", "another number", "width", "shared"],
    )
    def test_what_is_no_stack_in_two_dimensions(
        self, registered: str, name: str, shape: tuple[int, int], sizes: dict[str, Any], is_stack: bool
    ) -> None:
        model, experts = nn.Module(), nn.Module()
        model.register_module(registered, experts)
        vars(experts).update({"hidden_size": 8, "width": 3, "num_experts": 4} | sizes)
        experts.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        role = Role.EXPERTS if is_stack else Role.OTHER
        assert decide(model)[f"{registered}.{name}"].role is role

    def test_a_single_expert_is_no_stack(self) -> None:
        """Its second weight lies across the first."""
        model, expert = nn.Module(), nn.Module()
        model.register_module("expert", expert)
        vars(expert).update(hidden_size=8, num_experts=2)
        for name, shape in {"w1": (16, 8), "w2": (8, 16)}.items():
            expert.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        assert {each.role for each in decide(model).values()} == {Role.OTHER}

    def test_stack_of_vectors_is_no_stack_of_matrices(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        model.register_module("experts", nn.ParameterList([nn.Parameter(torch.zeros(4, 1, 8))]))
        assert decide(model)["experts.0"].algorithm == "adamw"


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

    @pytest.mark.parametrize("frozen", [True, False])
    def test_a_network_beside_a_transformers_model_is_no_head(self, frozen: bool) -> None:
        """As a U-Net beside its text encoder; a probe of few layers is one."""
        encoder, network = build("bert_classifier").requires_grad_(not frozen), models.transformer_encoder()
        model = nn.ModuleDict({"encoder": encoder, "network": network, "probe": nn.Linear(32, 3)})
        routing = route_parameters(model)
        roles = {each.name: each.role for each in routing.decisions}
        assert roles["network.layers.0.self_attn.in_proj_weight"] is Role.MATRIX
        assert roles["network.layers.0.linear1.weight"] is Role.MATRIX
        assert roles["probe.weight"] is Role.HEAD
        tasks = nn.ModuleDict({f"task {number}": nn.Linear(32, 3) for number in range(5)})
        layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)))
        others = decide(nn.ModuleDict({"encoder": encoder, "tasks": tasks, "lm_head": layers, "layers": layers[:4]}))
        assert {each.role for name, each in others.items() if name[:4] in ("task", "lm_h", "laye")} <= {
            Role.HEAD,
            Role.VECTOR,
        }
        five = decide(nn.ModuleDict({"encoder": encoder, "layers": layers}))
        assert five["layers.0.weight"].role is Role.MATRIX
        del model["probe"]
        report = route_parameters(model).report()
        assert frozen is ("a network beside `encoder` was found, so no head was guessed" in report)

    def test_a_network_beside_the_base_model_is_no_head(self) -> None:
        """In the model's own class as in another module; what is called a head in it is one."""
        of_part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
        sizes = {f"{part}{name}": size for part in ("", "decoder_") for name, size in of_part.items()}
        model: Any = on_meta(
            transformers.ViTMAEForPreTraining, config=transformers.ViTMAEConfig(**sizes, image_size=32)
        )
        alone = nn.ModuleDict({"vit": model.vit, "decoder": model.decoder})
        inside = "the base model"
        cases = (model, "", inside), (nn.ModuleDict({"model": model}), "model.", inside), (alone, "", "`vit`")
        for holder, prefix, beside in cases:
            routing = route_parameters(holder)
            roles = {each.name: each.role for each in routing.decisions}
            assert roles[f"{prefix}decoder.decoder_layers.0.mlp.fc1.weight"] is Role.MATRIX
            assert Role.HEAD not in roles.values()
            assert f"a network beside {beside} was found" in routing.report()
            assert f'overrides={{"{prefix}decoder.decoder_pred.weight": "adamw"}}' in routing.report()
        config = transformers.VideoMAEConfig(**sizes, image_size=32)
        decisions = decide(on_meta(transformers.VideoMAEForPreTraining, config=config))
        assert decisions["decoder.decoder_layers.0.attention.output.dense.weight"].role is Role.MATRIX
        heads = [name for name, each in decisions.items() if each.role is Role.HEAD]
        assert heads == ["encoder_to_decoder.weight", "decoder.head.weight"]

    def test_a_head_that_an_adapter_copies_or_adapts_is_one(self) -> None:
        """Although there are its weights once for each adapter, and twice in the factors of LoRA."""
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        config = transformers.BertConfig(**sizes, vocab_size=64)

        def adapted(kind: Any, *adapters: str, **settings: Any) -> nn.Module:
            lora = peft.LoraConfig(target_modules=["query"], **settings)
            model = peft.get_peft_model(kind(config), lora, adapter_name=adapters[0])
            for name in adapters[1:]:
                model.add_adapter(name, lora)
            return model.requires_grad_(True)

        for model in (
            adapted(transformers.BertForPreTraining, "a", modules_to_save=["cls"]),
            adapted(transformers.BertForMaskedLM, "a", "b", "c", modules_to_save=["cls"]),
        ):
            roles = {name: each.role for name, each in decide(model).items() if ".cls." in name}
            assert set(roles.values()) <= {Role.HEAD, Role.VECTOR, Role.EMBEDDING}
            assert Role.HEAD in roles.values()
        on_head = peft.LoraConfig(target_modules=["dense", "seq_relationship"])
        model = peft.get_peft_model(transformers.BertForPreTraining(config), on_head)
        routing = route_parameters(model)
        assert any(each.role is Role.LORA_A and ".cls." in each.name for each in routing.decisions)
        assert "no head was guessed" not in routing.report()

    def test_what_classes_say_is_their_head(self) -> None:
        """As timm's models do, also where they have none, or several."""

        class OfTimm(nn.Module):
            def __init__(self, *heads: nn.Module) -> None:
                super().__init__()
                self.body, self.heads = nn.Linear(8, 8), nn.ModuleList(heads)

            def get_classifier(self) -> Any:
                heads = list(self.heads)
                return [tuple(heads), heads][len(heads) % 2] if len(heads) > 1 else heads[0] if heads else self.missing

        assert not [each for each in decide(OfTimm(nn.Linear(8, 4))).values() if each.role is Role.HEAD]
        OfTimm.__module__ = "timm.models.some"
        for count in range(4):
            decisions = decide(OfTimm(*(nn.Linear(8, 4) for _ in range(count))))
            found = [name for name, each in decisions.items() if each.role is Role.HEAD]
            assert found == [f"heads.{number}.weight" for number in range(count)]
            assert decisions["body.weight"].role is Role.MATRIX

    def test_adaptive_softmax(self) -> None:
        decisions = decide(nn.AdaptiveLogSoftmaxWithLoss(32, 100, [10, 50]))
        assert {each.role for each in decisions.values()} == {Role.HEAD}

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

    @pytest.mark.parametrize(
        ("kind", "config", "heads"),
        [
            (transformers.BarkSemanticModel, transformers.BarkSemanticConfig(num_layers=1), ["lm_head.weight"]),
            (transformers.ParakeetForCTC, transformers.ParakeetCTCConfig(), ["ctc_head.weight"]),
            (transformers.ParakeetForTDT, transformers.ParakeetTDTConfig(), ["joint.head.weight"]),
            (transformers.EomtForUniversalSegmentation, transformers.EomtConfig(), ["class_predictor.weight"]),
            (
                transformers.RTDetrForObjectDetection,
                transformers.RTDetrConfig(num_labels=80, decoder_layers=2),
                [
                    "model.enc_score_head.weight",
                    "model.decoder.class_embed.0.weight",
                    "model.decoder.class_embed.1.weight",
                ],
            ),
        ],
    )
    def test_head_inside_of_the_base_model(self, kind: type[nn.Module], config: Any, heads: list[str]) -> None:
        decisions = decide(on_meta(kind, config=config))
        found = [name for name, each in decisions.items() if each.role is Role.HEAD]
        assert found == heads
        assert decisions[heads[0]].reason == "head: by its name, one row for each token or label"

    def test_head_that_an_adapter_saves(self) -> None:
        model = on_meta(transformers.ParakeetForCTC, config=transformers.ParakeetCTCConfig())
        saved = on_meta(
            lambda: peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["ctc_head"]))
        )
        found = [name for name, each in decide(saved).items() if each.role is Role.HEAD]
        assert found == ["base_model.model.ctc_head.modules_to_save.default.weight"]

    @pytest.mark.parametrize("config", [None, {"vocab_size": 96}, "a text"])
    def test_a_layer_called_a_head_with_other_rows_is_none(self, config: Any) -> None:
        model = on_meta(models.llama)
        attention = model.get_submodule("model.layers.0.self_attn")
        attention.config = config or attention.config
        attention.attn_head = nn.Linear(32, 16, device="meta")
        assert decide(model)["model.layers.0.self_attn.attn_head.weight"].role is Role.MATRIX

    def test_plain_module_says_that_no_head_was_guessed(self) -> None:
        routing = route_parameters(models.mlp())
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
        decisions = decide(nn.ModuleDict({"lstm": nn.LSTM(4, 4), "bilinear": nn.Bilinear(2, 3, 4)}))
        assert decisions["lstm.weight_ih_l0"].reason == "not a linear module's weight; opt in with an override"
        assert {each.algorithm for each in decisions.values()} == {"adamw"}

    def test_complex_weights(self) -> None:
        assert decide(nn.Linear(4, 4, dtype=torch.complex64))["weight"].reason == "not a real matrix"


class PatchEmbed(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, 32, 2, stride=2)


class TestConvolutions:
    @pytest.mark.parametrize(
        ("module", "storage"),
        [
            (nn.Conv1d(4, 8, 3), (False, "whole")),
            (nn.Conv2d(32, 64, 3, groups=2), (False, "group 2*32")),
            (nn.Conv3d(4, 8, 3), (False, "whole")),
            (nn.ConvTranspose1d(4, 8, 3), (True, "whole")),
            (nn.ConvTranspose2d(64, 32, 3, groups=2), (True, "group 2*32 along inputs")),
            (nn.ConvTranspose3d(4, 8, 3), (True, "whole")),
        ],
    )
    def test_dense_ones_and_large_groups(self, module: nn.Module, storage: tuple[bool, str]) -> None:
        weight = decide(module)["weight"]
        assert (weight.algorithm, weight.convolution) == ("dion2", True)
        assert (weight.transposed, weight.splits) == storage

    @pytest.mark.parametrize(
        ("module", "is_matrix"),
        [
            (nn.Conv2d(32, 32, 3, groups=2), True),
            (nn.Conv2d(32, 30, 3, groups=2), False),
            (nn.Conv1d(10, 64, 3, groups=2), False),
            (nn.Conv1d(10, 64, 4, groups=2), True),
            (nn.ConvTranspose1d(32, 10, 4, groups=2), True),
            (nn.ConvTranspose1d(30, 10, 4, groups=2), False),
            (nn.ConvTranspose1d(32, 10, 3, groups=2), False),
        ],
    )
    def test_how_large_groups_have_to_be(self, module: nn.Module, is_matrix: bool) -> None:
        """16 on both sides, with the taps counted."""
        weight = decide(module)["weight"]
        assert (weight.algorithm == "dion2") is is_matrix
        assert ("one side under 16" in weight.reason) is not is_matrix

    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            (nn.Conv2d(32, 32, 3, groups=32), "depthwise convolution"),
            (nn.Conv2d(32, 64, 3, groups=32), "depthwise convolution"),
            (nn.ConvTranspose2d(32, 64, 3, groups=32), "depthwise transposed convolution"),
            (nn.Conv2d(32, 1, 3), "convolution: not a matrix, a single row or column"),
            (nn.ConvTranspose2d(1, 8, 3), "transposed convolution: not a matrix, a single row or column"),
        ],
    )
    def test_what_holds_no_matrix(self, module: nn.Module, reason: str) -> None:
        weight = decide(module)["weight"]
        assert (weight.group, weight.reason, weight.convolution) == ("adamw", reason, False)

    @pytest.mark.parametrize(
        ("model", "patch_embeddings"),
        [
            (nn.Sequential(nn.Conv2d(3, 32, 4, stride=4), nn.Conv2d(32, 64, 2, stride=2)), ["0.weight"]),
            (nn.Sequential(nn.Conv2d(5, 32, 4, stride=4)), []),
            (nn.Sequential(nn.Conv2d(3, 32, 7, stride=4)), []),
            (nn.Sequential(nn.Conv2d(3, 32, 1)), []),
            (nn.Sequential(nn.ConvTranspose2d(3, 32, 2, stride=2)), []),
            (nn.Sequential(PatchEmbed(16), PatchEmbed(32)), ["0.proj.weight"]),
            (nn.ModuleDict({"patch_embedding": nn.Conv2d(3, 32, 7, stride=4)}), ["patch_embedding.weight"]),
            (nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 2, stride=2)), []),
            (nn.Sequential(PatchEmbed(3), PatchEmbed(3)), ["0.proj.weight", "1.proj.weight"]),
            (
                nn.ModuleDict({each: nn.Sequential(nn.Conv2d(3, 32, 2, stride=2), nn.ReLU()) for each in "ab"}),
                ["a.0.weight"],
            ),
        ],
        ids=[
            "pixels",
            "not pixels",
            "overlapping",
            "one tap",
            "transposed",
            "first of its name",
            "name",
            "not first",
            "two images",
            "halves of the second",
        ],
    )
    def test_patch_embeddings(self, model: nn.Module, patch_embeddings: list[str]) -> None:
        found = [name for name, each in decide(model).items() if each.reason == "patch embedding"]
        assert found == patch_embeddings

    def test_patch_embeddings_of_transformers(self) -> None:
        for name, patch_embedding in {
            "vit_classifier": "vit.embeddings.patch_embeddings.projection.weight",
            "convnext_classifier": "convnext.embeddings.patch_embeddings.weight",
            "segformer": "segformer.stages.0.patch_embeddings.proj.weight",
            "whisper": None,
            "resnet_classifier": None,
        }.items():
            found = [each.name for each in decide(build(name)).values() if each.reason == "patch embedding"]
            assert found == [patch_embedding] * (patch_embedding is not None)

    @pytest.mark.parametrize(
        "normalize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
    )
    def test_parts_that_a_kernel_is_computed_from(self, normalize: Any) -> None:
        found = [each for name, each in decide(normalize(nn.Conv2d(4, 8, 3))).items() if "original" in name]
        assert found[-1].shape == (8, 4, 3, 3)
        assert (found[-1].group, found[-1].role) == ("adamw", Role.CONVOLUTION_OTHER)
        assert "weight_norm" in found[-1].reason

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
    def test_parts_of_the_older_weight_norm(self) -> None:
        weights = decide(nn.utils.weight_norm(nn.Conv2d(4, 8, 3)))
        assert weights["weight_v"].role is Role.CONVOLUTION_OTHER
        assert weights["weight_g"].role is Role.VECTOR

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
    @pytest.mark.parametrize(
        "normalize",
        [
            nn.utils.parametrizations.weight_norm,
            nn.utils.parametrizations.spectral_norm,
            nn.utils.parametrizations.orthogonal,
            nn.utils.weight_norm,
            lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
        ],
    )
    def test_parts_that_a_linear_weight_is_computed_from(self, normalize: Any) -> None:
        layer = normalize(nn.Linear(8, 8))
        found = [each for each in decide(layer).values() if each.shape == (8, 8)]
        assert [each.role for each in found] == [Role.OTHER]
        assert found[0].reason == "part of a linear layer, whose weight is computed from it, as by weight_norm"

    def test_in_a_head(self) -> None:
        assert decide(build("segformer"))["decode_head.linear_fuse.weight"].role is Role.HEAD

    @pytest.mark.parametrize("algorithm", ["dion2", "dion3", "dion", "muon", "adamw"])
    def test_the_optimizer_takes_their_groups(self, algorithm: Any) -> None:
        groups = build_optimizer(models.UNet(), lr=0.1, algorithm=algorithm).param_groups
        kernels = [name for group in groups for name in group["param_names"] if "convolutions" in group["name"]]
        assert kernels == ["stem.weight", "down.weight", "groups.weight", "up.weight", "groups_up.weight"]


class TestLora:
    def test_both_factors_are_matrices_unless_something_else_is_said(self) -> None:
        """Dion2 trains what it was asked to; on LoRA it stands to AdamW as it does on all weights."""
        model = build("lora_llama")
        assert decide(model) == decide(model, lora="both")
        assert route_parameters(model).why_no_matrices is None

    def test_what_changes_it_where_none_are(self) -> None:
        said = route_parameters(build("lora_llama"), lora="adamw").why_no_matrices
        assert said is not None
        assert said.startswith(
            'dion2 trains nothing, adamw everything. LoRA factors (8): lora="both", the default, sends them to dion2'
        )

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
        decisions = decide(on_meta(models.lora_llama, **changes), lora="both")
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
            route_parameters(models.mlp(), lora="A")

    @pytest.mark.parametrize(("rank", "fraction"), [(15, 1.0), (16, 0.25)])
    def test_a_step_updates_all_of_a_factor_of_low_rank(self, rank: int, fraction: float) -> None:
        """Also where the fraction was passed, but for an override."""
        model = models.lora_llama(r=rank, modules_to_save=None)
        [group] = build_optimizer(model, lr=0.1, fraction=0.25).param_groups
        assert group["fraction"] == fraction
        assert group["name"] == ("dion2" if rank == 16 else "dion2-low-rank")

        overrides = {"*lora_A*": {"fraction": 0.5}, "*": {"lr": 0.2}}
        a, b = build_optimizer(model, lr=0.1, fraction=0.25, overrides=overrides).param_groups
        assert (a["fraction"], b["fraction"]) == (0.5, fraction)
        reasons = {name: each.reason for name, each in decide(model, overrides=overrides).items() if "lora" in name}
        assert [name for name, reason in reasons.items() if "fraction 1" in reason] == [
            name for name in reasons if "lora_B" in name and rank == 15
        ]

    @pytest.mark.parametrize(
        ("algorithm", "share"), [("dion2", "fraction"), ("dion3", "fraction"), ("dion", "rank_fraction")]
    )
    def test_the_setting_is_the_algorithms(self, algorithm: Any, share: str) -> None:
        model = models.lora_llama(modules_to_save=None)
        assert all(
            each.reason.endswith(f"rank 4: {share} 1")
            for each in decide(model, matrices=algorithm).values()
            if each.group
        )
        [group] = build_optimizer(model, lr=0.1, algorithm=algorithm).param_groups
        assert group[share] == 1.0

    def test_factors_that_an_override_sends_to_matrices(self) -> None:
        model = build("lora_llama")
        [factor] = {
            each.reason
            for each in decide(model, lora="adamw", overrides={"*lora_B*": "dion2"}).values()
            if each.low_rank
        }
        assert factor == "override `*lora_B*`; rank 4: fraction 1"

    def test_the_control_has_the_same_groups(self) -> None:
        groups = build_optimizer(models.lora_llama(), lr=0.1, algorithm="adamw").param_groups
        assert [group["name"] for group in groups] == ["adamw-matrices-low-rank", "adamw"]

    def test_ranks_that_differ_between_layers_and_adapters(self) -> None:
        routing = route_parameters(build("lora_two_adapters"))
        assert {group["name"]: len(group["params"]) for group in routing.param_groups()} == {
            "dion2": 4,
            "dion2-low-rank": 8,
        }
        pattern = on_meta(models.lora_llama, rank_pattern={"v_proj": 16})
        ranks = {each.name: each.group for each in decide(pattern).values() if ".lora_B." in each.name}
        assert all(group == ("dion2" if "v_proj" in name else "dion2-low-rank") for name, group in ranks.items())

    @pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
    def test_factors_of_convolutions(self) -> None:
        """A is the kernel (rank, in, taps), B that of a convolution of one tap."""
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
        factors = decide(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "1"])))
        trained = {name.split("model.")[-1]: each.group for name, each in factors.items() if each.group}
        assert trained == {
            "0.lora_A.default.weight": "dion2-convolutions-low-rank",
            "0.lora_B.default.weight": "dion2-convolutions-low-rank",
            "1.lora_A.default.weight": "dion2-convolutions-low-rank",
            "1.lora_B.default.weight": "adamw",
        }

    def test_factors_of_convolutions_that_are_vectors(self) -> None:
        factors = decide(
            peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3)), peft.LoraConfig(r=1, target_modules=["0"]))
        )
        assert not any(each.as_matrices for each in factors.values())

    def test_factors_of_stacks_of_experts(self) -> None:
        """They hold those of 4 experts, each of rank 4; before version 0.21 peft takes the weights for (in, out)."""
        config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"])
        factors = decide(on_meta(lambda: peft.get_peft_model(models.mixtral(), config)))
        trained = [each for each in factors.values() if each.group]
        shapes = {(16, 32), (48, 16)} if is_before("peft", "0.21") else {(16, 48), (32, 16)}
        assert {each.shape for each in trained} == shapes
        assert {(each.group, each.reason[-18:]) for each in trained} == {("dion2-low-rank", "rank 4: fraction 1")}

    def test_a_number_of_experts_beside_a_layer_does_not_change_its_rank(self) -> None:
        """AdaLoRA holds its factors one level higher than LoRA."""
        block: Any = nn.Module()
        block.lin, block.num_experts = nn.Linear(64, 64), 8
        config = peft.AdaLoraConfig(init_r=32, target_r=16, total_step=9, tinit=1, tfinal=1, target_modules=["lin"])
        factors = decide(peft.get_peft_model(nn.Sequential(block), config))
        assert {each.group for each in factors.values() if each.as_matrices} == {"dion2"}

    def test_an_adapter_that_is_not_active_is_frozen(self) -> None:
        model: Any = build("lora_llama")
        model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["o_proj"]))
        assert {each.group for name, each in decide(model).items() if ".second." in name} == {None}

    def test_scaling_by_the_root_of_the_rank_changes_nothing(self) -> None:
        """It is in the forward pass."""
        plain, scaled = (decide(on_meta(models.lora_llama, use_rslora=value)) for value in (False, True))
        assert plain == scaled


def test_modules_that_are_equal_to_everything() -> None:
    """As metrics are whose operators make new metrics: each is a module of its own all the same."""

    class Metric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(8, 8)

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = nn.Module.__hash__

    model = nn.ModuleDict({"metric": Metric(), "body": nn.Linear(8, 8), "encoder": build("bert_classifier")})
    decisions = decide(model)
    assert decisions["metric.network.weight"].role is Role.HEAD
    assert decisions["body.weight"].reason == "head: outside transformers model `encoder`"
    assert decisions["encoder.bert.pooler.dense.weight"].role is Role.MATRIX


def test_scripted_modules() -> None:
    """Their containers of modules have fewer methods than dicts."""
    scripted: Any = torch.jit.script(nn.Linear(8, 8))
    assert len(decide(nn.Sequential(nn.Linear(8, 8), scripted))) == 4


def test_norms_over_several_axes_do_not_decay() -> None:
    for norm in (nn.LayerNorm([4, 8]), nn.RMSNorm([4, 8])):
        decision = decide(nn.Sequential(norm, nn.Linear(8, 8)))["0.weight"]
        assert (decision.role, decision.group) == (Role.VECTOR, "adamw-no-decay")


@pytest.mark.parametrize("as_layers", [True, False])
def test_lora_of_other_packages(as_layers: bool) -> None:
    """As in torchtune, whose factors are layers, and in loralib, whose are parameters."""

    class Layer(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            names = ("lora_a", "lora_b") if as_layers else ("lora_A", "lora_B")
            factors = nn.Linear(24, 4, bias=False), nn.Linear(rank, 32, bias=False)
            for name, factor in zip(names, factors, strict=True):
                setattr(self, name, factor if as_layers else nn.Parameter(factor.weight.detach()))

    decisions = list(decide(nn.Sequential(Layer(4))).values())
    assert [each.role for each in decisions] == [Role.LORA_A, Role.LORA_B]
    assert all(each.low_rank for each in decisions)
    assert {each.algorithm for each in decide(nn.Sequential(Layer(4)), lora="adamw").values()} == {"adamw"}
    assert not any("lora" in each.role for each in decide(nn.Sequential(Layer(5))).values())
    alone = nn.ModuleDict({"lora_a": nn.Linear(24, 4, bias=False)})
    assert decide(nn.Sequential(alone))["0.lora_a.weight"].role is Role.MATRIX


def test_lora_factors_of_an_embedding_in_loralib() -> None:
    embedding = nn.Embedding(100, 32)
    embedding.lora_A, embedding.lora_B = nn.Parameter(torch.zeros(4, 100)), nn.Parameter(torch.zeros(32, 4))
    roles = [each.role for each in decide(nn.Sequential(embedding, nn.Linear(8, 8))).values()]
    assert roles[:3] == [Role.EMBEDDING, Role.LORA_OTHER, Role.LORA_OTHER]


def test_the_first_layer_of_each_image_encoder_takes_patches() -> None:
    encoder = models.conv_net
    stems = [nn.Sequential(nn.Conv2d(channels, 32, 4, stride=4), *encoder().children()) for channels in (3, 1)]
    decisions = decide(nn.ModuleDict({"color": stems[0], "depth": stems[1]}))
    found = [name for name, each in decisions.items() if each.reason == "patch embedding"]
    assert found == ["color.0.weight", "depth.0.weight"]
    wrapped = decide(nn.ModuleDict({"model": nn.ModuleDict({"color": stems[0], "depth": stems[1]})}))
    assert [name for name, each in wrapped.items() if each.reason == "patch embedding"] == [
        "model.color.0.weight",
        "model.depth.0.weight",
    ]


class OwnExperts(nn.Module):
    """Experts in three dimensions; sizes say what their module calls the sizes."""

    def __init__(self, shapes: dict[str, tuple[int, int]], **sizes: int) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(4, *shape)))
        self.__dict__ |= sizes


class OwnBlock(nn.Module):
    def __init__(self, experts: nn.Module, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.experts = experts


@pytest.mark.parametrize(
    ("block", "transposed"),
    [
        # "hidden" may be the size inside: "dim", or what the router takes, is that of the model.
        (OwnBlock(OwnExperts({"w1": (32, 64), "w2": (64, 32)}, dim=32, hidden_dim=64)), [True, True]),
        (OwnBlock(OwnExperts({"w1": (64, 32), "w2": (32, 64)}, dim=32, hidden_dim=64)), [False, False]),
        (OwnBlock(OwnExperts({"c_fc": (32, 64), "c_proj": (64, 32)}), gate=nn.Linear(32, 4)), [True, True]),
        (OwnBlock(OwnExperts({"w1": (64, 32), "w2": (32, 64)}, hidden_dim=64), gate=nn.Linear(32, 4)), [False, False]),
        # The router beside may be one module further out, and what has another number of rows is none.
        (
            OwnBlock(
                nn.ModuleDict({"mlp": OwnExperts({"w1": (64, 32), "w2": (32, 64)}, hidden_dim=64)}),
                aggregate=nn.Linear(64, 8),
                gate=nn.Linear(32, 4),
            ),
            [False, False],
        ),
        # As DBRX's, but in three dimensions: all of one shape.
        (OwnBlock(OwnExperts({"w1": (64, 32), "v1": (64, 32), "w2": (64, 32)}, hidden_size=32)), [False, False, True]),
    ],
)
def test_how_experts_of_other_packages_are_stored(block: nn.Module, transposed: list[bool]) -> None:
    found = [each for name, each in decide(nn.ModuleList([block])).items() if "experts" in name]
    assert {each.role for each in found} == {Role.EXPERTS}
    assert [each.transposed for each in found] == transposed


def test_gates_of_other_packages() -> None:
    """Deeper than their own module, beside experts in a module of that name, and in blocks with such names."""

    class Top2GatedExperts(OwnBlock): ...

    def experts() -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    nested = OwnBlock(nn.ModuleDict({"experts": experts()}), gate=nn.ModuleDict({"to_gates": nn.Linear(8, 4)}))
    tasks = nn.ModuleList(nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 4))}) for _ in range(2))
    model = nn.ModuleList([nested, OwnBlock(experts(), gates=tasks), Top2GatedExperts(experts(), gate=nn.Linear(8, 4))])
    roles = {name: each.role for name, each in decide(model).items() if name.endswith("weight")}
    assert {name for name, role in roles.items() if role is Role.ROUTER} == {name for name in roles if "gate" in name}
    assert {role for name, role in roles.items() if "experts" in name} == {Role.MATRIX}
    # Of layers whose names only look so, those that have as many rows as there are experts by chance are none.
    chance = OwnBlock(nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), aggregate=nn.ModuleDict({"a": nn.Linear(4, 4)}))
    chance.add_module("deep", nn.ModuleDict({"aggregate": nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4)})})}))
    assert decide(nn.ModuleList([chance]))["0.deep.aggregate.a.q.weight"].role is Role.MATRIX
    noisy = type("NoisyTopkRouter", (nn.ModuleDict,), {})({"expert_head": nn.Linear(8, 4), "noise": nn.Linear(8, 4)})
    assert {each.role for name, each in decide(nn.ModuleList([noisy])).items() if "weight" in name} == {Role.ROUTER}
    tasks = type("MultiTaskRouter", (nn.ModuleDict,), {})({"expert_gates": experts()})
    assert {each.role for name, each in decide(nn.ModuleList([tasks])).items() if "weight" in name} == {Role.ROUTER}
    table = OwnExperts({})
    table.register_parameter("positions", nn.Parameter(torch.zeros(1, 8, 16)))
    assert decide(nn.ModuleList([table]))["0.positions"].role is Role.OTHER
