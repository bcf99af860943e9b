"""Fused weights: which rows are q, and which are k, is shown by what the models themselves compute with them.

What reads one position of an attention's output depends on the q of that position alone, so the gradient of the rows
of q has rank one, and that of k has not. Without v the output is zero. What a gate multiplies is affine in its
rows, and the gate is not.
"""

import importlib
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
import transformers
from torch import Tensor, nn

from dion2_lightning import OptimizerSettings, build_optimizer
from dion2_lightning.matrices.splits import blocks_of
from dion2_lightning.routing.router import route_parameters
from tests.routing import models
from tests.routing.models import build, decide, on_meta

TOKENS: dict[str, Any] = {"input_ids": torch.tensor([[5, 17, 3, 60, 41, 8, 22, 9]])}
CROSS = TOKENS | {"encoder_hidden_states": torch.rand(1, 6, 32)}
FRAMES: dict[str, Any] = {"pixel_values": torch.rand(1, 2, 3, 16, 16)}
PATCHES: dict[str, Any] = {"hidden_states": torch.rand(16, 96), "grid_thw": torch.tensor([[1, 4, 4]])}
SPEECH: dict[str, Any] = {"input_values": torch.rand(1, 2000), "decoder_input_ids": TOKENS["input_ids"]}
VECTORS: dict[str, Any] = {"tokens": torch.rand(1, 6, 32)}


class SelfAttention(nn.Module):
    """torch's attention of some tokens to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens, tokens, tokens)[0]


class Holder(nn.Module):
    """A model that is one module, and calls it with its tokens and other arguments."""

    def __init__(self, held: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.held, self.arguments = held, arguments

    def forward(self, tokens: Tensor) -> Tensor:
        return self.held(tokens, **self.arguments)


class Case(NamedTuple):
    """A weight in a model.

    Attributes:
        model: Builds the model.
        inputs: What it is called with.
        weight: The weight's name.
        splits: What has to be found.
        before: Which child of the module gets what the blocks are for; None: what the module returns.
    """

    model: Callable[[], nn.Module]
    inputs: dict[str, Any]
    weight: str
    splits: str
    before: str | None = None


def rows_of(text: str, name: str) -> Tensor:
    """Return the places of a block on its axis."""
    block = next(block for block in blocks_of(text) if block.name == name)
    return torch.tensor([block.place(index) for index in range(block.total)])


class Probe:
    """A weight's module, called with the arguments that its model calls it with."""

    def __init__(self, case: Case, **arguments: Any) -> None:
        torch.manual_seed(0)
        model = case.model().eval()
        self.decision = decide(model, **arguments)[case.weight]
        names = case.weight.split(".")
        above = 1 + (names[-1] == "weight") + ("linear" in names)
        self.module = model.get_submodule(".".join(names[:-above]))
        self.before = case.before
        nn.init.normal_(self.decision.parameter, std=0.3)  # or attention would be all but uniform
        for name, parameter in self.module.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            elif name == "A_log":
                nn.init.constant_(parameter, -6)  # or the last position would see itself alone
            elif name == "conv1d.weight":
                parameter.data.zero_()[..., -1] = 1  # it would mix positions
        calls: list[Any] = []
        hook = self.module.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
        if hasattr(model, "config"):
            model.config.use_cache = False  # a cache would have the positions of the first call already
        with torch.no_grad():
            model(**case.inputs)
        hook.remove()
        self.arguments, self.keywords = calls[0]

    def output(self) -> Tensor:
        """Return what the child gets, or what the module returns."""
        seen: list[Tensor] = []
        if self.before is None:
            result = self.module(*self.arguments, **self.keywords)
            return result[0] if isinstance(result, tuple) else result
        child = self.module.get_submodule(self.before)
        hook = child.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        self.module(*self.arguments, **self.keywords)
        hook.remove()
        return seen[0]

    def rows(self, name: str) -> Tensor:
        """Return which outputs a block has."""
        return rows_of(self.decision.splits, name)

    @torch.no_grad()
    def scaled(self, rows: Tensor, factor: float) -> Tensor:
        """Return the output with some rows of the weight, and of a bias, multiplied."""
        weight = self.decision.parameter
        kept = weight.clone()
        if self.decision.convolution:
            weight[rows] *= factor
        else:
            stored = weight.mT if self.decision.transposed else weight
            stored[..., rows, :] *= factor
        result = self.output().clone()
        weight.copy_(kept)
        return result

    def rank(self, rows: Tensor) -> int:
        """Return the rank of the gradient of some rows, from one position of the output."""
        self.decision.parameter.grad = None
        last = self.output().flatten(0, -2)[-1]
        (last * torch.linspace(1, 2, len(last))).sum().backward()
        gradient: Any = self.decision.parameter.grad
        gradient = gradient.mT if self.decision.transposed else gradient
        return int(torch.linalg.matrix_rank(gradient[rows].double(), rtol=1e-4))

    def bend(self, rows: Tensor) -> float:
        """Return by how much the output is not affine in some rows."""
        nothing, once, more = (self.scaled(rows, factor) for factor in (0, 1, 8))
        return float((more - 8 * once + 7 * nothing).norm() / (more - nothing).norm())


def gpt_bigcode_of_heads() -> nn.Module:
    return models.gpt_bigcode(multi_query=False)


def protein_attention() -> nn.Module:
    return Holder(transformers.models.esm.modeling_esmfold.EsmFoldSelfAttention(32, 4, 8))


def evolla_attention() -> nn.Module:
    attention = transformers.models.evolla.modeling_evolla.EvollaSequenceCompressorAttention(32, 8, 4)
    return Holder(attention, latents=torch.rand(1, 5, 32), mask=torch.ones(1, 11))


def dbrx() -> nn.Module:
    config = transformers.DbrxConfig(
        vocab_size=96,
        d_model=32,
        n_heads=4,
        n_layers=1,
        max_seq_len=16,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )
    return transformers.DbrxForCausalLM(config)


def exaone_vision_attention() -> nn.Module:
    from transformers.models.exaone4_5.configuration_exaone4_5 import Exaone4_5_VisionConfig
    from transformers.models.exaone4_5.modeling_exaone4_5 import Exaone4_5_VisionAttention

    config = Exaone4_5_VisionConfig(hidden_size=32, num_heads=4, num_key_value_heads=2)
    positions = (torch.ones(6, 8), torch.zeros(6, 8))
    return Holder(Exaone4_5_VisionAttention(config), cu_seqlens=torch.tensor([0, 6]), position_embeddings=positions)


def hiera_attention() -> nn.Module:
    return Holder(transformers.models.hiera.modeling_hiera.HieraMaskUnitAttention(32, 64, 4))


def sam_attention() -> nn.Module:
    config = transformers.SamVisionConfig(hidden_size=32, num_attention_heads=4, image_size=16, patch_size=4)
    return Holder(transformers.models.sam.modeling_sam.SamVisionAttention(config, window_size=0))


def focal_modulation() -> nn.Module:
    config = transformers.FocalNetConfig(embed_dim=32, focal_levels=[2], focal_windows=[3], depths=[1])
    return Holder(transformers.models.focalnet.modeling_focalnet.FocalNetModulation(config, 0, 32))


def gemma4_convolution() -> nn.Module:
    config = transformers.Gemma4AudioConfig(hidden_size=32)
    return Holder(transformers.models.gemma4.modeling_gemma4.Gemma4AudioLightConv1d(config))


def levit() -> nn.Module:
    config = transformers.LevitConfig(
        image_size=64,
        hidden_sizes=[32, 48],
        num_attention_heads=[4, 6],
        depths=[1, 1],
        key_dim=[8, 8],
        attention_ratio=[2, 2],
        mlp_ratio=[2, 2],
        down_ops=[["Subsample", 8, 4, 2, 2, 2], [""]],
    )
    return transformers.LevitModel(config)


def held(name: str, config: Any = None, *sizes: int, **arguments: Any) -> Callable[[], nn.Module]:
    """Return what builds a model that is one module of transformers, ``"moshi.MoshiGatingMLP"``, for tokens of 32."""
    family, kind = name.split(".")

    def build_module() -> nn.Module:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        its_sizes = sizes if config is None else (config(), *sizes)
        return Holder(getattr(module, kind)(*its_sizes), **arguments)

    return build_module


def config_of(name: str, **sizes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**sizes)


def vision_config_of(name: str) -> Callable[[], Any]:
    """The configuration of a model that makes tokens of text out of patches, four of 8 features together."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    of_text = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
    return config_of(
        name, vision_config=sizes, text_config=of_text, downsample_factor=2, alignment_intermediate_size=96
    )


def convolution(name: str, config: Callable[[], Any], weight: str, before: str | None) -> tuple[Case, str, str]:
    """A convolution whose outputs are 32 that are gated, and 32 gates."""
    case = Case(held(name, config), VECTORS, f"held.{weight}.weight", "up 32 | gate 32", before)
    return case, "up", "gate"


LAYER = "transformer.h.0"
ATTENTION = {
    "torch": Case(SelfAttention, VECTORS, "attention.in_proj_weight", "q 32 | k 32 | v 32"),
    "timm": Case(lambda: Holder(models.timm_blocks()), VECTORS, "held.0.attn.qkv.weight", "q 32 | k 32 | v 32", "proj"),
    "timm, by head": Case(
        lambda: Holder(models.HeadFirstAttention(32, 4)), VECTORS, "held.qkv.weight", "4 x (q 8 | k 8 | v 8)", "proj"
    ),
    "timm, by head with other sizes": Case(
        lambda: Holder(models.TinyAttention(32, 4, key_dim=8, val_dim=16)),
        VECTORS,
        "held.qkv.weight",
        "4 x (q 8 | k 8 | v 16)",
        "proj",
    ),
    "vit-pytorch": Case(
        lambda: Holder(models.NamedAttention(4, to_qkv=nn.Linear(32, 96), to_out=nn.Sequential(nn.Linear(32, 32)))),
        VECTORS,
        "held.to_qkv.weight",
        "q 32 | k 32 | v 32",
        "to_out",
    ),
    "litgpt, fewer heads of k and v": Case(
        lambda: Holder(models.NamedAttention(4, 2, qkv=nn.Linear(32, 64), proj=nn.Linear(32, 32))),
        VECTORS,
        "held.qkv.weight",
        "q 32 | k 16 | v 16",
        "proj",
    ),
    "pvt": Case(
        lambda: Holder(models.NamedAttention(4, q=nn.Linear(32, 32), kv=nn.Linear(32, 64), proj=nn.Linear(32, 32))),
        VECTORS,
        "held.kv.weight",
        "k 32 | v 32",
        "proj",
    ),
    "gpt2": Case(models.gpt2, TOKENS, f"{LAYER}.attn.c_attn.weight", "q 32 | k 32 | v 32", "c_proj"),
    "gpt2 cross": Case(
        models.gpt2_cross_attention, CROSS, f"{LAYER}.crossattention.c_attn.weight", "k 32 | v 32", "c_proj"
    ),
    "phi3": Case(models.phi3, TOKENS, "model.layers.0.self_attn.qkv_proj.weight", "q 32 | k 16 | v 16", "o_proj"),
    "gpt_neox": Case(
        models.gpt_neox,
        TOKENS,
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "4 x (q 8 | k 8 | v 8)",
        "dense",
    ),
    "gpt_neox_japanese": Case(
        models.gpt_neox_japanese,
        TOKENS,
        "gpt_neox_japanese.layers.0.attention.query_key_value.weight",
        "4 x (q 8 | k 8 | v 8)",
        "dense",
    ),
    "bloom": Case(
        models.bloom, TOKENS, f"{LAYER}.self_attention.query_key_value.weight", "4 x (q 8 | k 8 | v 8)", "dense"
    ),
    "persimmon": Case(
        models.persimmon,
        TOKENS,
        "model.layers.0.self_attn.query_key_value.weight",
        "4 x (q 8 | k 8 | v 8)",
        "dense",
    ),
    "falcon": Case(
        models.falcon, TOKENS, f"{LAYER}.self_attention.query_key_value.weight", "2 x (q 16 | k 4 | v 4)", "dense"
    ),
    "falcon, one k and v": Case(
        models.falcon_multi_query,
        TOKENS,
        f"{LAYER}.self_attention.query_key_value.weight",
        "q 32 | k 4 | v 4",
        "dense",
    ),
    "falcon, old": Case(
        models.falcon_old, TOKENS, f"{LAYER}.self_attention.query_key_value.weight", "8 x (q 4 | k 4 | v 4)", "dense"
    ),
    "codegen": Case(models.codegen, TOKENS, f"{LAYER}.attn.qkv_proj.weight", "4 x (q 16 | v 16 | k 16)", "out_proj"),
    "gpt_bigcode": Case(models.gpt_bigcode, TOKENS, f"{LAYER}.attn.c_attn.weight", "q 32 | k 8 | v 8", "c_proj"),
    "gpt_bigcode of heads": Case(
        gpt_bigcode_of_heads, TOKENS, f"{LAYER}.attn.c_attn.weight", "4 x (q 8 | k 8 | v 8)", "c_proj"
    ),
    "mpt": Case(models.mpt, TOKENS, "transformer.blocks.0.attn.Wqkv.weight", "q 32 | k 32 | v 32", "out_proj"),
    "modernbert": Case(models.modernbert, TOKENS, "model.layers.0.attn.Wqkv.weight", "q 32 | k 32 | v 32", "Wo"),
    "deberta": Case(
        models.deberta,
        TOKENS,
        "deberta.encoder.layer.0.attention.self.in_proj.weight",
        "4 x (q 8 | k 8 | v 8)",
    ),
    "esmfold": Case(protein_attention, VECTORS, "held.proj.weight", "4 x (q 8 | k 8 | v 8)", "o_proj"),
    "qwen2_vl": Case(models.qwen2_vl_vision, PATCHES, "blocks.0.attn.qkv.weight", "q 32 | k 32 | v 32", "proj"),
    "timesformer": Case(
        models.timesformer_classifier,
        FRAMES,
        "timesformer.encoder.layer.0.attention.attention.qkv.weight",
        "q 32 | k 32 | v 32",
    ),
    "minimax": Case(
        models.minimax, TOKENS, "model.layers.0.self_attn.qkv_proj.weight", "4 x (q 8 | k 8 | v 8)", "norm"
    ),
    "jetmoe": Case(models.jetmoe, TOKENS, "model.layers.0.self_attention.kv_proj.weight", "k 16 | v 16"),
    "qwen3_5": Case(
        models.qwen3_5,
        TOKENS,
        "model.layers.0.linear_attn.in_proj_qkv.weight",
        "q 16 | k 16 | v 24",
        "norm",
    ),
}

ATTENTION |= {
    "levit": Case(
        levit,
        {"pixel_values": torch.rand(1, 3, 64, 64)},
        "encoder.stages.0.layers.0.module.queries_keys_values.linear.weight",
        "4 x (q 8 | k 8 | v 16)",
        "projection",
    ),
    "levit, fewer positions": Case(
        levit,
        {"pixel_values": torch.rand(1, 3, 64, 64)},
        "encoder.stages.0.layers.2.keys_values.linear.weight",
        "4 x (k 8 | v 16)",
        "projection",
    ),
    "dbrx": Case(
        dbrx,
        TOKENS,
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight",
        "q 32 | k 16 | v 16",
        "out_proj",
    ),
    "exaone, vision": Case(
        exaone_vision_attention, {"tokens": torch.rand(6, 32)}, "held.qkv.weight", "q 32 | k 16 | v 16", "proj"
    ),
    "hiera": Case(hiera_attention, VECTORS, "held.qkv.weight", "q 64 | k 64 | v 64", "proj"),
    "sam": Case(sam_attention, {"tokens": torch.rand(1, 4, 4, 32)}, "held.qkv.weight", "q 32 | k 32 | v 32", "proj"),
    "evolla": Case(evolla_attention, VECTORS, "held.to_kv.weight", "k 32 | v 32", "to_out"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    probe = Probe(ATTENTION[name])
    assert probe.decision.splits == ATTENTION[name].splits
    assert probe.rank(probe.rows("k")) > 1
    if "q" in probe.decision.blocks:
        assert probe.rank(probe.rows("q")) == 1
    assert not probe.scaled(probe.rows("v"), 0).any()
    assert probe.scaled(probe.rows("v"), 2).any()


EXPERTS = "mlp.experts.gate_up_proj"
GATED_CONVOLUTIONS = {
    "parakeet.ParakeetEncoderConvolutionModule": "ParakeetEncoderConfig",
    "lasr.LasrEncoderConvolutionModule": "LasrEncoderConfig",
    "wav2vec2_bert.Wav2Vec2BertConvolutionModule": "Wav2Vec2BertConfig",
    "wav2vec2_conformer.Wav2Vec2ConformerConvolutionModule": "Wav2Vec2ConformerConfig",
    "seamless_m4t.SeamlessM4TConformerConvolutionModule": "SeamlessM4TConfig",
    "seamless_m4t_v2.SeamlessM4Tv2ConformerConvolutionModule": "SeamlessM4Tv2Config",
    "nemotron_asr_streaming.NemotronAsrStreamingEncoderConvolutionModule": "NemotronAsrStreamingEncoderConfig",
}
GATES = {
    # The last two: what is gated, and what the gate's activation is taken of.
    "phi3": (Case(models.phi3, TOKENS, "model.layers.0.mlp.gate_up_proj.weight", "gate 48 | up 48"), "up", "gate"),
    "glm4": (Case(models.glm4, TOKENS, "model.layers.0.mlp.gate_up_proj.weight", "gate 48 | up 48"), "up", "gate"),
    "modernbert": (
        Case(models.modernbert, TOKENS, "model.layers.0.mlp.Wi.weight", "input 48 | gate 48"),
        "gate",
        "input",
    ),
    "moonshine": (
        Case(models.moonshine, SPEECH, "model.decoder.layers.0.mlp.fc1.weight", "up 48 | gate 48"),
        "up",
        "gate",
    ),
    "granite, shared": (
        Case(models.granite_moe_hybrid, TOKENS, "model.layers.0.shared_mlp.input_linear.weight", "gate 40 | up 40"),
        "up",
        "gate",
    ),
    "mixtral": (Case(models.mixtral, TOKENS, f"model.layers.0.{EXPERTS}", "gate 48 | up 48"), "up", "gate"),
    "qwen3_moe": (Case(models.qwen3_moe, TOKENS, f"model.layers.0.{EXPERTS}", "gate 24 | up 24"), "up", "gate"),
    "deepseek_v3": (Case(models.deepseek_v3, TOKENS, f"model.layers.1.{EXPERTS}", "gate 24 | up 24"), "up", "gate"),
    "llama4": (
        Case(models.llama4_text, TOKENS, "model.layers.0.feed_forward.experts.gate_up_proj", "gate 16 | up 16"),
        "up",
        "gate",
    ),
    "gpt_oss": (Case(models.gpt_oss, TOKENS, f"model.layers.0.{EXPERTS}", "48 x (gate 1 | up 1)"), "up", "gate"),
    "gemma4, convolution": (
        Case(gemma4_convolution, VECTORS, "held.linear_start.linear.weight", "up 32 | gate 32", "depthwise_conv1d"),
        "up",
        "gate",
    ),
    "jetmoe": (
        Case(models.jetmoe, TOKENS, "model.layers.0.mlp.input_linear.weight", "gate 48 | up 48"),
        "up",
        "gate",
    ),
    "moshi": (
        Case(
            held("moshi.MoshiGatingMLP", config_of("MoshiConfig", hidden_size=32, ffn_dim=96)),
            VECTORS,
            "held.fc1.weight",
            "gate 48 | up 48",
        ),
        "up",
        "gate",
    ),
    "clvp": (
        Case(
            held(
                "clvp.ClvpGatedLinearUnit",
                config_of("ClvpEncoderConfig", hidden_size=32, intermediate_size=48, num_attention_heads=4),
            ),
            VECTORS,
            "held.proj.weight",
            "up 48 | gate 48",
        ),
        "up",
        "gate",
    ),
    **{
        family: (
            Case(
                held(f"{family}.{kind}MultiModalProjector", vision_config_of(f"{kind}Config")),
                {"tokens": torch.rand(1, 16, 8)},
                "held.linear_1.weight",
                "up 48 | gate 48",
            ),
            "up",
            "gate",
        )
        for family, kind in {"aya_vision": "AyaVision", "cohere2_vision": "Cohere2Vision"}.items()
    },
    "xlstm": (
        Case(
            held("xlstm.xLSTMFeedForward", config_of("xLSTMConfig", hidden_size=32, num_heads=4, weight_mode="fused")),
            VECTORS,
            "held.proj_up_gate_z.weight",
            "gate 128 | up 128",
        ),
        "up",
        "gate",
    ),
    **{
        f"{module.split('.')[0]}, convolution": convolution(
            module, config_of(config, hidden_size=32), "pointwise_conv1", "depthwise_conv"
        )
        for module, config in GATED_CONVOLUTIONS.items()
    },
    "granite_speech, convolution": convolution(
        "granite_speech.GraniteSpeechConformerConvModule",
        config_of("GraniteSpeechEncoderConfig", hidden_dim=32, conv_expansion_factor=1),
        "up_conv",
        "depth_conv",
    ),
    "phi4_multimodal, convolution": convolution(
        "phi4_multimodal.Phi4MultimodalAudioGluPointWiseConv",
        config_of("Phi4MultimodalAudioConfig", hidden_size=32, ext_pw_out_channel=32),
        "ext_pw_conv_1d",
        None,
    ),
    "wavlm, adapter": (
        Case(
            held("wavlm.WavLMAdapterLayer", config_of("WavLMConfig", output_hidden_size=32)),
            {"tokens": torch.rand(1, 32, 12)},
            "held.conv.weight",
            "up 32 | gate 32",
        ),
        "up",
        "gate",
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    case, gated, gate = GATES[name]
    probe = Probe(case)
    assert probe.decision.splits == case.splits
    module: Any = probe.module
    if hasattr(module, "limit"):
        module.limit = 1e6  # what is clamped is affine no more
    assert probe.bend(probe.rows(gated)) < 1e-5
    assert probe.bend(probe.rows(gate)) > 1e-2


def test_one_gate_for_each_of_two_inputs() -> None:
    """What the second gate is for is zero."""
    case = Case(
        held("d_fine.DFineGate", None, 32, hidden_states=torch.zeros(1, 6, 32)), VECTORS, "held.gate.weight", ""
    )
    probe = Probe(case)
    assert probe.decision.splits == "gate1 32 | gate2 32"
    assert not torch.equal(probe.scaled(probe.rows("gate1"), 8), probe.scaled(probe.rows("gate1"), 1))
    assert torch.equal(probe.scaled(probe.rows("gate2"), 8), probe.scaled(probe.rows("gate2"), 1))


def test_groups_of_a_linear_layer() -> None:
    """Each has inputs of its own, and rows below those of the one before."""
    model = held("deepseek_v4.DeepseekV4GroupedLinear", None, 8, 32, 4)()
    decision = decide(model)["held.weight"]
    assert (decision.splits, decision.reason) == ("group 4*8", "linear of 4 groups, each a matrix")
    tokens = torch.rand(1, 6, 4, 8)
    before = model(tokens)
    with torch.no_grad():
        decision.parameter[8:16] = 0  # the second group
    changed = (model(tokens) != before).any(-1).flatten(0, 1).any(0)
    assert changed.tolist() == [False, True, False, False]


def test_modulations() -> None:
    """The norm of what is constant is zero, so that the shift alone is left of it; all else is returned."""
    module: Any = held("qwen2_5_omni.Qwen2_5_OmniAdaLayerNormZero", None, 32)().held
    decision = decide(module)["linear.weight"]
    nn.init.zeros_(module.linear.bias)
    weight = decision.parameter.detach().clone()
    returned = ["attn_shift", "attn_gate", "mlp_shift", "mlp_scale", "mlp_gate"]
    for block in (*returned, "attn_scale"):
        with torch.no_grad():
            decision.parameter.copy_(weight)
            decision.parameter[rows_of(decision.splits, block)] = 0
        results = module(torch.ones(1, 6, 32), emb=torch.rand(1, 32))
        assert [name for name, each in zip(returned, results, strict=True) if not each.any()] == (
            [] if block == "attn_scale" else [block]
        )


def test_convolutions_without_gates_are_kept_whole() -> None:
    class ConvolutionModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pointwise_conv1, self.depthwise_conv = nn.Conv1d(32, 64, 1), nn.Conv1d(64, 64, 3, groups=64)

    assert decide(ConvolutionModule())["pointwise_conv1.weight"].splits == "whole"


QWEN = "qwen2_5_omni.Qwen2_5_Omni"
MODULATED = "attn_shift 32 | attn_scale 32 | attn_gate 32 | mlp_shift 32 | mlp_scale 32 | mlp_gate 32"


ESMFOLD2 = SimpleNamespace(
    pairwise_hidden_size=32,
    chunk_size=None,
    msa_encoder=SimpleNamespace(hidden_size=32, outer_hidden_size=16, outer_product_chunk_size=None),
)
STRUCTURE = SimpleNamespace(
    sequence_dim=32, pairwise_dim=16, ipa_dim=8, num_heads_ipa=4, num_qk_points=4, num_v_points=8, epsilon=1e-8
)
VIBEVOICE = SimpleNamespace(hidden_size=32, intermediate_size=48, mlp_bias=False, hidden_act="silu", rms_norm_eps=1e-6)


@pytest.mark.parametrize(
    ("name", "sizes", "weight", "splits"),
    [
        ("esm.EsmFoldSequenceToPair", (32, 24, 16), "proj", "q 24 | k 24"),
        ("esm.EsmFoldInvariantPointAttention", (STRUCTURE,), "linear_kv", "4 x (k 8 | v 8)"),
        ("esm.EsmFoldInvariantPointAttention", (STRUCTURE,), "linear_kv_points", "12 x (k 4 | v 8)"),
        (f"{QWEN}AdaLayerNormZero", (32,), "linear", MODULATED),
        (f"{QWEN}AdaLayerNormZero_Final", (32,), "linear", "scale 32 | shift 32"),
        (
            "esmfold2.EsmFold2TriangleMultiplicativeUpdate",
            (ESMFOLD2,),
            "proj_bundle",
            "left 32 | right 32 | left_gate 32 | right_gate 32",
        ),
        ("esmfold2.EsmFold2OuterProductMean", (ESMFOLD2,), "input_proj", "left 16 | right 16"),
        ("vibevoice.VibeVoiceDiffusionHeadAdaLayerNorm", (VIBEVOICE,), "linear", "shift 32 | scale 32 | gate 32"),
        ("vibevoice.VibeVoiceDiffusionHeadFinalLayer", (VIBEVOICE, 8), "linear_1", "shift 32 | scale 32"),
    ],
)
def test_parts_by_class(name: str, sizes: tuple[int, ...], weight: str, splits: str) -> None:
    family, kind = name.split(".")
    modeling = {"esm": "esmfold"}.get(family, family)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{modeling}")
    decision = decide(Holder(getattr(module, kind)(*sizes)))[f"held.{weight}.weight"]
    assert (decision.splits, decision.reason) == (splits, f"linear; {splits} by its class")


def test_heads_that_are_not_next_to_each_other_are_not_cut() -> None:
    """What follows ESMFold's attention to points takes sums of several kinds, each of all heads."""
    module = transformers.models.esm.modeling_esmfold.EsmFoldInvariantPointAttention(STRUCTURE)
    decision = decide(Holder(module), per_head=True)["held.linear_out.weight"]
    assert decision.splits == "whole"
    assert decision.reason.endswith("kept whole: its inputs are of several kinds, each by head")


@pytest.mark.parametrize(
    ("kind", "weight", "splits"),
    [
        ("moshi", "layers.0.mlp.fc1", "gate 11264 | up 11264"),
        ("deepseek_v4", "layers.0.self_attn.o_a_proj", "group 8*1024"),
        ("axk2", "layers.0.self_attn.q_gate_proj", "32 x (q 96 | gate 64)"),
        ("deepseek_v4", "compressor.kv_proj", "a 512 | b 512"),
        ("deepseek_v4", "compressor.indexer.gate_proj", "a 128 | b 128"),
        ("pp_doclayout_v3", "decoder_global_pointer.dense", "q 64 | k 64"),
        ("seamless_m4t", "speech_encoder.adapter.layers.0.self_attn_conv", "up 1024 | gate 1024"),
        ("mobilevitv2", "encoder.layer.2.transformer.layer.0.attention.qkv_proj.convolution", "q_k 129 | v 128"),
    ],
)
def test_default_configurations(kind: str, weight: str, splits: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.CONFIG_MAPPING[kind]())
    decisions = decide(model)
    assert splits in {each.splits for name, each in decisions.items() if name.endswith(f"{weight}.weight")}


def test_xlstm() -> None:
    config = transformers.xLSTMConfig(
        vocab_size=64, hidden_size=32, num_heads=4, num_hidden_layers=1, weight_mode="fused"
    )
    decisions = decide(on_meta(transformers.xLSTMModel, config=config))
    splits = {name.split(".")[-2]: each.splits for name, each in decisions.items() if each.blocks}
    assert splits == {"qkv_opreact": "q 16 | k 16 | v 32 | o 32", "proj_up_gate_z": "gate 128 | up 128"}


def test_convolutions_that_look_fused_are_kept_whole() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.qkv, self.proj = nn.Conv2d(32, 96, 1), nn.Conv2d(32, 32, 1)

    decision = decide(Attention())["qkv.weight"]
    assert (decision.splits, decision.reason) == (
        "whole",
        "convolution; fused projections kept whole: pass splits=",
    )
    assert decide(Attention(), splits={"qkv.weight": "q 32 | k 32 | v 32"})["qkv.weight"].splits == "q 32 | k 32 | v 32"


def test_the_gate_of_speech_comes_last() -> None:
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioMLP

    name = "model.embed_tokens_extend.audio_embed.encoder.encoders.0.feed_forward_in.gate_up_proj.weight"
    model = models.phi4_multimodal()
    decision = decide(model)[name]
    module = model.get_submodule(name.removesuffix(".gate_up_proj.weight"))
    assert isinstance(module, Phi4MultimodalAudioMLP)
    assert decision.splits == "up 24 | gate 24"
    probe = Probe(Case(lambda: Holder(module), {"tokens": torch.rand(1, 6, 16)}, "held.gate_up_proj.weight", ""))
    assert probe.bend(probe.rows("up")) < 1e-5
    assert probe.bend(probe.rows("gate")) > 1e-2


MIXERS = {
    # Without these rows what comes out of the mixer is zero; these depend on one position only.
    "mamba": (
        Case(models.mamba, TOKENS, "backbone.layers.0.mixer.in_proj.weight", "x 64 | gate 64", "out_proj"),
        "gate",
    ),
    "jamba": (
        Case(models.jamba, TOKENS, "model.layers.0.mamba.in_proj.weight", "x 64 | gate 64", "out_proj"),
        "gate",
    ),
    "zamba": (
        Case(models.zamba, TOKENS, "model.layers.0.mamba.in_proj.weight", "64 x (x 1 | gate 1)", "out_proj"),
        "gate",
    ),
    "mamba2": (
        Case(
            models.mamba2,
            TOKENS,
            "backbone.layers.0.mixer.in_proj.weight",
            "gate 64 | x 64 | B 16 | C_dt 24",
            "out_proj",
        ),
        "gate",
    ),
    "granite, hybrid": (
        Case(
            models.granite_moe_hybrid,
            TOKENS,
            "model.layers.0.mamba.in_proj.weight",
            "gate 64 | x 64 | B 16 | C_dt 24",
            "out_proj",
        ),
        "gate",
    ),
    "falcon_h1": (
        Case(
            models.falcon_h1,
            TOKENS,
            "model.layers.0.mamba.in_proj.weight",
            "gate 64 | x 64 | B 16 | C_dt 24",
            "out_proj",
        ),
        "gate",
    ),
    "lfm2": (
        Case(models.lfm2, TOKENS, "model.layers.0.conv.in_proj.weight", "B 32 | C 32 | x 32", "out_proj"),
        "C",
    ),
}


@pytest.mark.parametrize("name", MIXERS)
def test_mixers(name: str) -> None:
    case, gate = MIXERS[name]
    probe = Probe(case)
    assert probe.decision.splits == case.splits
    assert not probe.scaled(probe.rows(gate), 0).any()
    blocks = {block: probe.rows(block) for block in probe.decision.blocks}
    if "C_dt" in blocks:  # C as gates do belongs to one position, dt to all
        blocks["C"], blocks["dt"] = blocks["C_dt"][:16], blocks.pop("C_dt")[16:]
    ranks = {block: probe.rank(rows) for block, rows in blocks.items()}
    assert {block for block, rank in ranks.items() if rank == 1} == {gate, "C"} & set(blocks)


class MambaOfAnotherLibrary(nn.Module):
    """The attributes and layers of ``mamba_ssm``'s modules."""

    def __init__(self, outputs: int, **sizes: int) -> None:
        super().__init__()
        self.__dict__ |= {"d_inner": 64, "d_state": 16} | sizes
        self.in_proj, self.x_proj = nn.Linear(32, outputs), nn.Linear(64, sizes.get("dt_rank", 16) + 32)


class Mamba(MambaOfAnotherLibrary):
    pass


class Mamba2(MambaOfAnotherLibrary):
    pass


def test_mamba_of_another_library() -> None:
    decisions = decide(Mamba(128, dt_rank=24))
    assert decisions["in_proj.weight"].splits == "x 64 | gate 64"
    assert decisions["x_proj.weight"].splits == "dt 24 | B 16 | C 16"
    decisions = decide(Mamba2(216, ngroups=2, nheads=24))
    assert decisions["in_proj.weight"].splits == "gate 64 | x 64 | B 32 | C 32 | dt 24"
    decisions = decide(Mamba2(216, ngroups=2, nheads=24, d_ssm=32))  # the other inner ones go through an MLP
    assert decisions["in_proj.weight"].splits == "mlp_gate 32 | mlp_up 32 | gate 32 | x 32 | B 32 | C 32 | dt 24"
    assert "does not fit" in decide(Mamba2(216 + 64, ngroups=2, nheads=24))["in_proj.weight"].reason
    assert decide(Mamba(128))["x_proj.weight"].reason == "linear; kept whole: its sizes are not known: pass splits="


class TestFewRows:
    """What has under 16 rows is no matrix of its own, and what has more is one, in every family."""

    @pytest.mark.parametrize(
        ("heads", "state", "splits"),
        [
            (16, 8, "gate 64 | x 64 | B 16 | C 16 | dt 16"),
            (8, 8, "gate 64 | x 64 | B 16 | C_dt 24"),
            (8, 4, "gate 64 | x 64 | B_C_dt 24"),
            (16, 4, "gate 64 | x 64 | B_C 16 | dt 16"),
        ],
    )
    def test_mamba2(self, heads: int, state: int, splits: str) -> None:
        model = on_meta(models.mamba2, num_heads=heads, head_dim=64 // heads, state_size=state)
        assert decide(model)["backbone.layers.0.mixer.in_proj.weight"].splits == splits

    @pytest.mark.parametrize(
        ("rank", "state", "splits", "reason"),
        [
            (32, 16, "dt 32 | B 16 | C 16", "linear; dt 32 | B 16 | C 16 by its class"),
            (4, 16, "dt_B 20 | C 16", "linear; dt_B 20 | C 16 by its class"),
            (32, 8, "dt 32 | B_C 16", "linear; dt 32 | B_C 16 by its class"),
            (4, 4, "whole", "linear; kept whole: too few rows for dt 4 | B 4 | C 4"),
        ],
    )
    def test_jamba(self, rank: int, state: int, splits: str, reason: str) -> None:
        model = on_meta(models.jamba, mamba_dt_rank=rank, mamba_d_state=state)
        decision = decide(model)["model.layers.0.mamba.x_proj.weight"]
        assert (decision.splits, decision.reason) == (splits, reason)

    def test_linear_attention(self) -> None:
        decision = decide(on_meta(models.qwen3_next))["model.layers.0.linear_attn.in_proj_ba.weight"]
        assert (decision.splits, decision.reason) == (
            "whole",
            "linear; kept whole: too few rows for 2 x (b 2 | a 2)",
        )


def test_focal_modulation() -> None:
    case = Case(
        focal_modulation, {"tokens": torch.rand(1, 4, 4, 32)}, "held.projection_in.weight", "", "projection_out"
    )
    probe = Probe(case)
    assert probe.decision.splits == "q 32 | context_gates 35"
    assert not probe.scaled(probe.rows("q"), 0).any()
    assert probe.bend(probe.rows("q")) < 1e-5
    assert probe.rank(probe.rows("q")) == 1
    assert probe.rank(probe.rows("context_gates")[:32]) > 1
    assert probe.rank(probe.rows("context_gates")[32:]) == 1


def test_what_linear_attention_takes_apart() -> None:
    model = models.qwen3_next(linear_num_value_heads=16)
    attention: Any = model.get_submodule("model.layers.0.linear_attn")
    decisions = decide(model)
    found = {name: decisions[f"model.layers.0.linear_attn.in_proj_{name}.weight"] for name in ("qkvz", "ba")}
    assert found["qkvz"].splits == "2 x (q 8 | k 8 | v 48 | z 48)"
    assert found["ba"].splits == "2 x (b 8 | a 8)"
    weights = [attention.in_proj_qkvz.weight.T[None], attention.in_proj_ba.weight.T[None]]
    parts = dict(zip("qkvzba", attention.fix_query_key_value_ordering(*weights), strict=True))
    for name, decision in found.items():
        for block in name:
            torch.testing.assert_close(
                decision.parameter[rows_of(decision.splits, block)].T, parts[block].flatten(2)[0]
            )


def test_latent_attention() -> None:
    name = "model.layers.0.self_attn"
    probe = Probe(Case(models.deepseek_v3, TOKENS, f"{name}.kv_b_proj.weight", "", "o_proj"))
    assert probe.decision.splits == "4 x (k 4 | v 8)"
    assert not probe.scaled(probe.rows("v"), 0).any()
    assert probe.scaled(probe.rows("k"), 0).any()
    probe = Probe(Case(models.deepseek_v3, TOKENS, f"{name}.kv_a_proj_with_mqa.weight", "", "o_proj"))
    assert probe.decision.splits == "kv 8 | k_rope 4"
    assert not probe.scaled(probe.rows("kv"), 0).any()
    assert probe.scaled(probe.rows("k_rope"), 0).any()


@pytest.mark.parametrize("builder", [models.qwen3_next, models.qwen3_5])
def test_queries_with_a_gate(builder: Callable[[], nn.Module]) -> None:
    probe = Probe(Case(builder, TOKENS, "model.layers.1.self_attn.q_proj.weight", "", "o_proj"))
    assert probe.decision.splits == "4 x (q 8 | gate 8)"
    without_q = probe.scaled(probe.rows("q"), 0)
    half = probe.scaled(torch.arange(64), 0)  # a gate at zero lets half of it pass
    torch.testing.assert_close(probe.scaled(probe.rows("gate"), 0)[0, 0], half[0, 0])  # the first sees itself alone
    nn.init.zeros_(probe.module.get_parameter("k_proj.weight"))
    torch.testing.assert_close(probe.output(), without_q)


# Heads

VALUES = {
    "gpt2": (ATTENTION["gpt2"], "c_proj", "v", "q 4*8 | k 4*8 | v 4*8"),
    "phi3": (ATTENTION["phi3"], "o_proj", "v", "q 4*8 | k 2*8 | v 2*8"),
    "gpt_neox": (ATTENTION["gpt_neox"], "dense", "v", "4 x (q 1*8 | k 1*8 | v 1*8)"),
    "falcon": (ATTENTION["falcon"], "dense", "v", "2 x (q 4*4 | k 1*4 | v 1*4)"),
    "falcon, one k and v": (ATTENTION["falcon, one k and v"], "dense", "v", "q 8*4 | k 1*4 | v 1*4"),
    "codegen": (ATTENTION["codegen"], "out_proj", "v", "4 x (q 2*8 | v 2*8 | k 2*8)"),
    "llama": (
        Case(models.llama, TOKENS, "model.layers.0.self_attn.v_proj.weight", "", "o_proj"),
        "o_proj",
        "head",
        "head 2*8",
    ),
    "gemma2": (
        Case(models.gemma2, TOKENS, "model.layers.0.self_attn.v_proj.weight", "", "o_proj"),
        "o_proj",
        "head",
        "head 2*8",
    ),
    "deepseek_v3": (
        Case(models.deepseek_v3, TOKENS, "model.layers.0.self_attn.kv_b_proj.weight", "", "o_proj"),
        "o_proj",
        "v",
        "4 x (k 1*4 | v 1*8)",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_heads_of_v_are_those_of_the_output(name: str) -> None:
    """What follows attention gets zeros from the heads of a v without weights, and from no others."""
    case, output, block, text = VALUES[name]
    probe = Probe(case, per_head=True)
    assert probe.decision.splits == text
    decisions = decide(case.model(), per_head=True)
    other = decisions[case.weight.removesuffix(case.weight.split(".")[-2] + ".weight") + f"{output}.weight"].splits
    heads = rows_of(other, "head").chunk(blocks_of(other)[0].matrices)
    assert other.endswith(" along inputs")
    matrices = next(each.matrices for each in blocks_of(text) if each.name == block)
    for index, rows in enumerate(probe.rows(block).chunk(matrices)):
        got = probe.scaled(rows, 0)
        group = len(heads) // matrices
        is_zero = [not got[..., columns].any() for columns in heads]
        assert is_zero == [index * group <= head < (index + 1) * group for head in range(len(heads))]


PER_HEAD = {
    "bert_classifier": {
        "bert.encoder.layer.0.attention.self.query.weight": "head 4*8",
        "bert.encoder.layer.0.attention.self.key.weight": "head 4*8",
        "bert.encoder.layer.0.attention.output.dense.weight": "head 4*8 along inputs",
        "bert.encoder.layer.0.output.dense.weight": "whole",
    },
    "t5": {
        "encoder.block.0.layer.0.SelfAttention.q.weight": "head 4*8",
        "encoder.block.0.layer.0.SelfAttention.o.weight": "head 4*8 along inputs",
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": "whole",
    },
    "llama": {
        "model.layers.1.self_attn.q_proj.weight": "head 4*8",
        "model.layers.1.self_attn.k_proj.weight": "head 2*8",
        "model.layers.1.mlp.up_proj.weight": "whole",
    },
    "deepseek_v3": {
        "model.layers.0.self_attn.q_a_proj.weight": "whole",
        "model.layers.0.self_attn.q_b_proj.weight": "head 4*8",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": "kv 8 | k_rope 4",
    },
    "qwen3_next": {
        "model.layers.0.linear_attn.in_proj_qkvz.weight": "2 x (q 1*8 | k 1*8 | v 2*6 | z 2*6)",
        "model.layers.0.linear_attn.out_proj.weight": "head 4*6 along inputs",
        "model.layers.1.self_attn.q_proj.weight": "4 x (q 1*8 | gate 1*8)",
    },
    "mixtral": {
        "model.layers.0.self_attn.v_proj.weight": "head 2*8",
        "model.layers.0.mlp.experts.gate_up_proj": "gate 48 | up 48",
    },
    "gpt2": {
        "transformer.h.0.attn.c_proj.weight": "head 4*8 along inputs",
        "transformer.h.0.mlp.c_proj.weight": "whole",
    },
    "cross_attention": {
        "attention.q_proj_weight": "head 4*8",
        "attention.v_proj_weight": "head 4*8",
        "attention.out_proj.weight": "head 4*8 along inputs",
    },
    "swin_classifier": {
        "swin.encoder.layers.0.blocks.0.attention.q_proj.weight": "head 2*8",
        "swin.encoder.layers.1.blocks.0.attention.o_proj.weight": "head 4*8 along inputs",
    },
    "mamba2": {
        "backbone.layers.0.mixer.in_proj.weight": "gate 64 | x 64 | B 16 | C_dt 24",
        "backbone.layers.0.mixer.out_proj.weight": "whole",
    },
}


SMALL = {"hidden_size": 32, "num_attention_heads": 4}
HEADS_OF = {
    "lxmert": (
        lambda: transformers.LxmertModel(
            transformers.LxmertConfig(**SMALL, vocab_size=64, l_layers=1, x_layers=1, r_layers=1, intermediate_size=48)
        ),
        {
            "encoder.layer.0.attention.self.query.weight": "head 4*8",
            "encoder.layer.0.attention.output.dense.weight": "head 4*8 along inputs",
        },
    ),
    "ctrl": (
        lambda: transformers.CTRLModel(transformers.CTRLConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, dff=48)),
        {
            "h.0.multi_head_attention.Wq.weight": "head 4*8",
            "h.0.multi_head_attention.Wv.weight": "head 4*8",
            "h.0.multi_head_attention.dense.weight": "head 4*8 along inputs",
            "h.0.ffn.2.weight": "whole",
        },
    ),
    "cpmant": (
        lambda: transformers.CpmAntModel(
            transformers.CpmAntConfig(**SMALL, vocab_size=64, dim_head=8, dim_ff=48, num_hidden_layers=1)
        ),
        {
            "encoder.layers.0.self_att.self_attention.project_k.weight": "head 4*8",
            "encoder.layers.0.self_att.self_attention.attention_out.weight": "head 4*8 along inputs",
        },
    ),
    "led": (
        lambda: transformers.LEDModel(
            transformers.LEDConfig(
                vocab_size=64,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                attention_window=4,
            )
        ),
        {
            "encoder.layers.0.self_attn.longformer_self_attn.query.weight": "head 4*8",
            "encoder.layers.0.self_attn.longformer_self_attn.key_global.weight": "head 4*8",
            "encoder.layers.0.self_attn.output.weight": "head 4*8 along inputs",
        },
    ),
    "bark": (
        lambda: transformers.BarkSemanticModel(
            transformers.BarkSemanticConfig(
                input_vocab_size=64, output_vocab_size=48, hidden_size=32, num_layers=1, num_heads=4
            )
        ),
        {
            "layers.0.attn.att_proj.weight": "q 4*8 | k 4*8 | v 4*8",
            "layers.0.attn.out_proj.weight": "head 4*8 along inputs",
            "layers.0.mlp.out_proj.weight": "whole",
        },
    ),
}


def test_what_follows_an_attention_with_its_own_output_is_no_output_of_it() -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))

    class AttentionLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.fc, self.out = SelfAttention(), nn.Linear(32, 50), nn.Linear(50, 32)

    decisions = decide(AttentionLayer(), per_head=True)
    assert decisions["attn.o_proj.weight"].splits == "head 4*8 along inputs"
    assert decisions["out.weight"].splits == "whole"


@pytest.mark.parametrize("name", HEADS_OF)
def test_heads_of_attentions_with_names_of_their_own(name: str) -> None:
    builder, expected = HEADS_OF[name]
    decisions = decide(on_meta(builder), per_head=True)
    assert {weight: decisions[weight].splits for weight in expected} == expected


@pytest.mark.parametrize("name", PER_HEAD)
def test_per_head(name: str) -> None:
    decisions = decide(build(name), per_head=True)
    assert {weight: decisions[weight].splits for weight in PER_HEAD[name]} == PER_HEAD[name]


class Attention(nn.Module):
    """Some attention that no rule knows, with an odd number of heads."""

    def __init__(self, num_heads: int | None = 5, **others: Any) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(24, 24), nn.Linear(24, 24)
        for name, value in (others | {"num_heads": num_heads}).items():
            setattr(self, name, value)


def test_keys_and_values_have_the_heads_that_their_sizes_say() -> None:
    """The sliding layers of this model have twice as many as its configuration says, and heads of v are smaller."""
    pytest.importorskip("transformers.models.mimo_v2_flash")  # newer than the oldest version that is supported
    decisions = decide(on_meta(models.mimo_v2_flash), per_head=True)
    found = {name.split(".", 2)[2]: each.splits for name, each in decisions.items() if "_proj.weight" in name}
    assert {name: text for name, text in found.items() if "self_attn" in name} == {
        "0.self_attn.q_proj.weight": "head 8*12",
        "0.self_attn.k_proj.weight": "head 2*12",
        "0.self_attn.v_proj.weight": "head 2*8",
        "0.self_attn.o_proj.weight": "head 8*8 along inputs",
        "1.self_attn.q_proj.weight": "head 8*12",
        "1.self_attn.k_proj.weight": "head 4*12",
        "1.self_attn.v_proj.weight": "head 4*8",
        "1.self_attn.o_proj.weight": "head 8*8 along inputs",
    }


def test_a_configuration_does_not_say_how_many_heads_another_attention_has() -> None:
    model: Any = evolla_attention()
    model.config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2)
    decisions = decide(model, per_head=True)
    assert decisions["held.to_kv.weight"].splits == "k 4*8 | v 4*8"
    assert decisions["held.to_q.weight"].splits == "head 4*8"


class NamedAttention(nn.Module):
    """Attention of 4 heads, k and v of 2, in layers of some names."""

    def __init__(self, *names: str, keys: int = 12, **heads: int) -> None:
        super().__init__()
        for name, outputs in zip(names, (24, keys, keys, 24), strict=True):
            self.register_module(name, nn.Linear(24, outputs, bias=False))
        self.__dict__ |= heads or {"n_head": 4}


class TestHeadsByName:
    @pytest.mark.parametrize(
        "names",
        [("c_q", "c_k", "c_v", "c_proj"), ("wq", "wk", "wv", "wo"), ("query", "key", "value", "out_proj")],
    )
    def test_of_layers(self, names: tuple[str, ...]) -> None:
        decisions = decide(NamedAttention(*names), per_head=True)
        assert [decisions[f"{name}.weight"].splits for name in names] == [
            "head 4*6",
            "head 2*6",
            "head 2*6",
            "head 4*6 along inputs",
        ]

    @pytest.mark.parametrize("name", ["num_key_value_heads", "n_kv_head", "num_query_groups", "n_query_groups"])
    def test_of_numbers_where_no_layer_has_q(self, name: str) -> None:
        model = NamedAttention("other", "k_proj", "v_proj", "o_proj", **{"n_head": 4, name: 2})
        model.query = nn.Parameter(torch.zeros(1, 3, 24))
        decisions = decide(model, per_head=True)
        assert decisions["k_proj.weight"].splits == decisions["v_proj.weight"].splits == "head 2*6"

    def test_keys_that_are_no_heads_of_the_size_of_q(self) -> None:
        model = NamedAttention("q_proj", "k_proj", "v_proj", "o_proj", keys=16)
        decision = decide(model, per_head=True)["k_proj.weight"]
        assert (decision.splits, decision.reason) == (
            "whole",
            "linear; kept whole: heads of q have 6 outputs, and k 16",
        )

    def test_linear_attention_with_more_heads_of_v(self) -> None:
        config = transformers.OlmoHybridConfig(
            **models._DECODER,
            **models._DELTA_NET | {"linear_value_head_dim": 8},
        )
        model = on_meta(lambda: transformers.OlmoHybridForCausalLM(config))
        decisions = decide(model, per_head=True)
        name = "model.layers.0.linear_attn."
        assert [decisions[f"{name}{each}_proj.weight"].splits for each in "qkvo"] == [
            "head 2*8",
            "head 2*8",
            "head 4*8",
            "head 4*8 along inputs",
        ]

    @pytest.mark.parametrize("model", [models.mlp(), NamedAttention("q_proj", "k", "v", "o", n_head=1, keys=24)])
    def test_nothing_to_cut(self, model: nn.Module) -> None:
        [*_, note] = route_parameters(model, per_head=True).notes
        assert note.startswith("per_head=True cuts nothing: no attention of several heads was found in what dion2")

    @pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
    def test_something_to_cut(self, name: str) -> None:
        assert not route_parameters(build(name), per_head=True).notes


class TestHeadsThatDoNotFit:
    @pytest.mark.parametrize(("num_heads", "fits"), [(5, "4 or 6"), (7, "6 or 8"), (24, "8 or 12"), (50, "8 or 12")])
    def test_a_number_that_does_not_divide(self, num_heads: int, fits: str) -> None:
        message = (
            r"^per_head=True cannot cut '0.q_proj.weight' of shape \(24, 24\): it has 24 outputs, and "
            rf"{num_heads} heads; {fits} would fit. To keep it whole, pass splits={{'0.q_proj.weight': 'whole'}}$"
        )
        with pytest.raises(ValueError, match=message):
            route_parameters(nn.Sequential(Attention(num_heads)), per_head=True)

    def test_the_way_out(self) -> None:
        splits = {"0.q_proj.weight": "whole", "0.o_proj.weight": "head 4*6 along inputs"}
        decisions = decide(nn.Sequential(Attention()), per_head=True, splits=splits)
        assert {name: decisions[name].splits for name in splits} == splits

    def test_fused(self) -> None:
        config = transformers.GPT2Config(**models._GPT2)
        with torch.device("meta"):
            model = transformers.GPT2LMHeadModel(config)
        for block in model.transformer.h:
            block.attn.num_heads = 5
        with pytest.raises(
            ValueError, match=r"h.0.attn.c_attn.weight' of shape \(32, 96\): it has 32 outputs of q, and"
        ):
            route_parameters(model, per_head=True)
        assert decide(model)["transformer.h.0.attn.c_attn.weight"].splits == "q 32 | k 32 | v 32"

    def test_no_number_is_known(self) -> None:
        decision = decide(nn.Sequential(Attention(None)), per_head=True)["0.q_proj.weight"]
        assert (decision.splits, decision.reason) == ("whole", "linear; kept whole: no number of heads is known")

    def test_one_head_is_the_whole(self) -> None:
        decision = decide(nn.Sequential(Attention(1)), per_head=True)["0.q_proj.weight"]
        assert (decision.splits, decision.reason) == ("whole", "linear")

    def test_the_size_of_a_head_tells_how_many_there_are(self) -> None:
        decision = decide(nn.Sequential(Attention(4, head_dim=3)), per_head=True)["0.q_proj.weight"]
        assert decision.splits == "head 8*3"

    def test_layers_in_a_wrapper_of_their_own(self) -> None:
        model = nn.Sequential(Attention(4))
        attention: Any = model[0]
        attention.q_proj = nn.ModuleDict({"linear": nn.Linear(24, 24)})
        assert decide(model, per_head=True)["0.q_proj.linear.weight"].splits == "head 4*6"

    def test_a_configuration_that_refuses_to_tell(self) -> None:
        class Config:
            @property
            def num_attention_heads(self) -> int:
                raise RuntimeError("it varies by layer")

        model = nn.Sequential(Attention(None, config=Config(), head_dim=6))
        assert decide(model, per_head=True)["0.q_proj.weight"].splits == "head 4*6"

    def test_not_a_bool(self) -> None:
        with pytest.raises(TypeError, match="per_head must be True or False, got 'yes'"):
            route_parameters(models.mlp(), per_head=cast("Any", "yes"))


# What is kept whole


class FusedLayers(nn.Module):
    """Layers with names that say they are fused, of a class that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.gate_up_proj, self.w12 = nn.Linear(32, 96), nn.Linear(32, 96), nn.Linear(32, 96)


def test_what_no_rule_knows_is_kept_whole() -> None:
    for name, decision in decide(FusedLayers()).items():
        if not name.endswith("bias"):
            reason = "linear; fused projections kept whole: pass splits="
            assert (decision.splits, decision.reason) == ("whole", reason)


def test_copies_of_gpt2() -> None:
    class CausalSelfAttention(nn.Module):
        def __init__(self, **heads: int) -> None:
            super().__init__()
            self.c_attn, self.c_proj = nn.Linear(32, 96), nn.Linear(32, 32)
            self.__dict__ |= heads

    decision = decide(CausalSelfAttention(n_head=4), per_head=True)["c_attn.weight"]
    assert decision.splits == "q 4*8 | k 4*8 | v 4*8"
    assert decision.reason == "linear; q 4*8 | k 4*8 | v 4*8 by its name and shape"
    assert decide(CausalSelfAttention())["c_attn.weight"].splits == "q 32 | k 32 | v 32"


@pytest.mark.parametrize(
    ("name", "layers", "splits"),
    [
        ("qkv", {"qkv": nn.Linear(48, 96), "proj": nn.Linear(32, 48)}, "q 32 | k 32 | v 32"),
        ("to_qkv.1", {"to_qkv": nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 96)), "to_out": nn.Linear(32, 32)}, None),
        (
            "wqkv",
            {"wqkv": nn.Linear(32, 64), "wo": nn.Linear(32, 32)},
            "whole",
        ),  # k and v, as in GCViT, for all it says
        ("qkv", {"qkv": nn.Linear(32, 96), "merge": nn.Linear(32, 32)}, "q 32 | k 32 | v 32"),
        ("qkv", {"qkv": nn.Linear(32, 96), "project": nn.Sequential(nn.Linear(8, 32))}, "q 32 | k 32 | v 32"),
        ("qk", {"qk": nn.Linear(32, 64), "v": nn.Linear(32, 32), "proj": nn.Linear(32, 32)}, "q 32 | k 32"),
        ("kv", {"q": nn.Linear(32, 32), "kv": nn.Linear(32, 96), "proj": nn.Linear(32, 32)}, "whole"),
        ("kv", {"kv": nn.Linear(32, 64), "proj": nn.Linear(32, 32)}, "whole"),
        ("qkv", {"qkv": nn.Linear(32, 96)}, "whole"),
        ("qkv", {"qkv": nn.Linear(32, 80), "proj": nn.Linear(16, 32)}, "whole"),
    ],
)
def test_sizes_say_what_lies_in_an_attention(name: str, layers: dict[str, nn.Module], splits: str | None) -> None:
    decision = decide(models.NamedAttention(4, **layers))[f"{name}.weight"]
    assert decision.splits == (splits or "q 32 | k 32 | v 32")
    fewer = decide(models.NamedAttention(4, 2, **layers), per_head=True)[f"{name}.weight"]
    if name == "wqkv":
        assert fewer.splits == "q 4*8 | k 2*8 | v 2*8"


def test_fewer_heads_of_k_and_v_where_all_are_three_times_the_inputs() -> None:
    """As of litgpt's models whose heads are wider than the model's width over their number."""
    attention = models.NamedAttention(16, 4, qkv=nn.Linear(64, 192), proj=nn.Linear(128, 64))
    assert decide(attention)["qkv.weight"].splits == "q 128 | k 32 | v 32"


def test_a_parameter_of_a_sequence_itself() -> None:
    sequence = nn.Sequential(nn.Linear(8, 8))
    sequence.register_parameter("table", nn.Parameter(torch.zeros(8, 8)))
    assert decide(nn.ModuleList([sequence]), overrides={"0.table": "dion2"})["0.table"].splits == "whole"


def test_a_layer_that_a_module_wraps_as_linear() -> None:
    """As timm's LeViT has it, with a norm behind."""
    attention = models.TinyAttention(32, 4, key_dim=8, val_dim=16)
    attention.qkv = nn.ModuleDict({"linear": attention.qkv, "norm": nn.LayerNorm(128)})  # type: ignore[assignment]
    assert decide(attention)["qkv.linear.weight"].splits == "4 x (q 8 | k 8 | v 16)"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("AdaLayerNormZeroSingle", 3),
        ("SD35AdaLayerNormZeroX", 9),
        ("CogVideoXLayerNormZero", 6),
        ("LuminaRMSNormZero", 4),
        ("AdaLayerNormContinuous", 2),
        ("AdaLayerNormSingle", 6),
        ("CogView4AdaLayerNormZero", 12),
        ("QwenImage21AdaLayerNormContinuous", 0),
        ("LTX2AdaLayerNormSingle", 0),
    ],
)
def test_adaptive_norms_of_diffusers(name: str, parts: int) -> None:
    norm = type(name, (nn.ModuleDict,), {})({"linear": nn.Linear(32, 32 * (parts or 4))})
    splits = decide(nn.ModuleList([norm]))["0.linear.weight"].splits
    assert [block.size for block in blocks_of(splits)] == [32] * parts


class GEGLU(nn.Module):
    """Without layers, as in packages whose feed-forward is a sequence; or with one, as in diffusers."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.proj = nn.Linear(*sizes) if sizes else nn.Identity()


class GluMlp(nn.Module):
    """As in timm."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 2 * inner), nn.Linear(inner, 32)


class PackedSwiGLU(nn.Module):
    """As in xformers: w1 and w2 take the same inputs, and are halves of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)


class TwoHalves(nn.Module):
    """A gate and what it gates, as layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(48, 96), nn.Linear(48, 96)


TwoHalves.__name__ = "GLU"


class Deep(nn.Module):
    """Layers one after another, of which a later one has half as many inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 256), nn.Linear(256, 128), nn.Linear(128, 64)


Deep.__name__ = "MlpGLU"


@pytest.mark.parametrize(
    ("model", "splits"),
    [
        (nn.Sequential(nn.Linear(32, 64), GEGLU(), nn.Linear(32, 32)), {"0.weight": "up 32 | gate 32"}),
        (nn.Sequential(nn.Linear(32, 64), nn.GLU(), nn.Linear(64, 32)), {}),
        (nn.Sequential(nn.Linear(32, 64), nn.GLU()), {"0.weight": "up 32 | gate 32"}),
        (nn.Sequential(nn.Linear(32, 128), GEGLU(128, 128), nn.Linear(64, 8)), {}),
        (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), {}),
        (nn.Sequential(nn.Conv1d(32, 64, 3), nn.GLU(dim=1), nn.Conv1d(32, 32, 3)), {"0.weight": "up 32 | gate 32"}),
        (nn.Sequential(GEGLU(32, 256), nn.Linear(128, 32)), {"0.proj.weight": "up 128 | gate 128"}),
        (GluMlp(48), {"fc1.weight": "up 48 | gate 48"}),
        (GluMlp(32), {"fc1.weight": "up 32 | gate 32"}),
        (GluMlp(16), {"fc1.weight": "up 16 | gate 16"}),
        (PackedSwiGLU(), {}),
        (TwoHalves(), {}),
        (Deep(), {}),
        (GEGLU(64, 64), {}),
        (nn.Sequential(nn.Linear(32, 64), nn.GLU(dim=1)), {}),
        (nn.Sequential(nn.Conv1d(32, 64, 3), nn.GLU()), {}),
    ],
)
def test_what_is_gated_outside_transformers(model: nn.Module, splits: dict[str, str]) -> None:
    found = {name: each.splits for name, each in decide(model).items() if each.splits != "whole"}
    assert found == splits


def test_of_transformers_only_what_has_been_read_is_split() -> None:
    of_transformers = type("SomeGLU", (GEGLU,), {"__module__": "transformers.models.some.modeling_some"})
    assert decide(nn.Sequential(of_transformers(32, 256)))["0.proj.weight"].splits == "whole"


def test_what_does_not_fit_is_kept_whole() -> None:
    model = on_meta(models.phi3)
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.qkv_proj = nn.Linear(32, 72, bias=False)
    decisions = decide(model)
    assert decisions["model.layers.0.self_attn.qkv_proj.weight"].splits == "whole"
    assert decisions["model.layers.0.self_attn.qkv_proj.weight"].reason == (
        "linear; fused projections kept whole, as q 32 | k 16 | v 16 does not fit: pass splits="
    )
    assert decisions["model.layers.1.self_attn.qkv_proj.weight"].splits == "q 32 | k 16 | v 16"


@pytest.mark.parametrize(
    ("builder", "module", "changes"),
    [
        (models.deepseek_v3, "model.layers.0.self_attn.kv_a_proj_with_mqa", {"kv_lora_rank": 7}),
        (models.deepseek_v3, "model.layers.0.self_attn.kv_b_proj", {"v_head_dim": 7}),
        (models.falcon, "transformer.h.0.self_attention.query_key_value", {"num_kv_heads": 16}),
        (models.gpt_neox, "gpt_neox.layers.0.attention.query_key_value", {"num_heads": 64}),
        (models.gpt_neox, "gpt_neox.layers.0.attention.query_key_value", {"num_heads": 5}),
        (models.mamba2, "backbone.layers.0.mixer.in_proj", {"n_groups": 3}),
        (models.qwen3_next, "model.layers.0.linear_attn.in_proj_qkvz", {"num_v_heads": 1}),
    ],
)
def test_numbers_that_do_not_fit_are_no_error(
    builder: Callable[[], nn.Module], module: str, changes: dict[str, int]
) -> None:
    model = on_meta(builder)
    for name, value in changes.items():
        setattr(model.get_submodule(module.rpartition(".")[0]), name, value)
    for per_head in (False, True):
        decision = decide(model, per_head=per_head)[f"{module}.weight"]
        assert decision.splits == "whole"
        assert re.fullmatch("linear; fused projections kept whole, as .* does not fit: pass splits=", decision.reason)


def test_cross_attention_of_gpt_bigcode_is_kept_whole() -> None:
    model = on_meta(gpt_bigcode_of_heads)
    attention: Any = model.get_submodule("transformer.h.0.attn")
    attention.is_cross_attention = True
    decision = decide(model)["transformer.h.0.attn.c_attn.weight"]
    assert decision.splits == "whole"
    assert decision.reason.startswith("linear; kept whole: its class takes one head")


def test_a_class_that_inherits_is_known() -> None:
    class Mine(transformers.models.phi3.modeling_phi3.Phi3Attention):
        pass

    model = on_meta(models.phi3)
    model.get_submodule("model.layers.0.self_attn").__class__ = Mine
    assert decide(model)["model.layers.0.self_attn.qkv_proj.weight"].splits == "q 32 | k 16 | v 16"


def test_weights_that_an_adapter_saves_are_split() -> None:
    import peft

    def save(builder: Callable[[], nn.Module], *names: str) -> nn.Module:
        config = peft.LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=list(names))
        return on_meta(lambda: peft.get_peft_model(builder(), config))

    layer = "base_model.model.model.layers.0."
    saved = "modules_to_save.default.weight"
    decisions = decide(save(models.phi3, "qkv_proj", "gate_up_proj"), per_head=True)
    assert decisions[f"{layer}self_attn.qkv_proj.{saved}"].splits == "q 4*8 | k 2*8 | v 2*8"
    assert decisions[f"{layer}mlp.gate_up_proj.{saved}"].splits == "gate 48 | up 48"
    decisions = decide(save(models.llama, "q_proj", "k_proj"), per_head=True)
    assert decisions[f"{layer}self_attn.k_proj.{saved}"].splits == "head 2*8"


def test_lora_factors_are_never_split() -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["qkv_proj", "o_proj"])
    model = peft.get_peft_model(on_meta(models.phi3), config)
    decisions = decide(model, per_head=True, lora="both")
    trained = [each for each in decisions.values() if each.as_matrices]
    assert len(trained) == 8
    assert {each.splits for each in trained} == {"whole"}


# splits=


QKV = "model.layers.*.self_attn.qkv_proj.weight"


class TestSplits:
    def test_they_come_before_what_is_found(self) -> None:
        splits = {"*.layers.0.*.qkv_proj.weight": "q 4*8 | kv 32", "*.layers.1.*.gate_up_proj.weight": "whole"}
        decisions = decide(build("phi3"), splits=splits)
        assert decisions["model.layers.0.self_attn.qkv_proj.weight"].splits == "q 4*8 | kv 32"
        assert decisions["model.layers.0.self_attn.qkv_proj.weight"].reason == (
            "linear; q 4*8 | kv 32 by splits `*.layers.0.*.qkv_proj.weight`"
        )
        assert decisions["model.layers.1.self_attn.qkv_proj.weight"].splits == "q 32 | k 16 | v 16"
        assert decisions["model.layers.0.mlp.gate_up_proj.weight"].splits == "gate 48 | up 48"
        assert decisions["model.layers.1.mlp.gate_up_proj.weight"].splits == "whole"

    def test_the_first_match_wins(self) -> None:
        splits = {"model.layers.0.*.qkv_proj.weight": "whole", QKV: "a 32 | b 32"}
        decisions = decide(build("phi3"), splits=splits)
        found = [decisions[QKV.replace("*", str(layer), 1)].splits for layer in (0, 1)]
        assert found == ["whole", "a 32 | b 32"]

    def test_an_override_comes_before_them(self) -> None:
        overrides = {"model.layers.0.*.qkv_proj.weight": {"splits": "q 32 | rest 32"}}
        decisions = decide(build("phi3"), splits={QKV: "a 32 | b 32"}, overrides=overrides)
        found = [decisions[QKV.replace("*", str(layer), 1)].splits for layer in (0, 1)]
        assert found == ["q 32 | rest 32", "a 32 | b 32"]

    def test_other_options_of_an_override_leave_what_is_found(self) -> None:
        decisions = decide(build("phi3"), overrides={QKV: {"lr": 0.5}})
        assert decisions[QKV.replace("*", "0", 1)].splits == "q 32 | k 16 | v 16"

    @pytest.mark.parametrize(("per_head", "splits"), [(False, "q 32 | k 32 | v 32"), (True, "q 4*8 | k 4*8 | v 4*8")])
    def test_what_is_found_fits_what_overrides_say_of_the_storage(self, per_head: bool, splits: str) -> None:
        arguments: dict[str, Any] = {"overrides": {"*.c_attn.weight": {"transposed": True}}, "per_head": per_head}
        assert decide(build("gpt2"), **arguments)["transformer.h.0.attn.c_attn.weight"].splits == splits

    def test_what_overrides_say_of_the_storage_drops_what_contradicts_it(self) -> None:
        decisions = decide(build("gpt2"), overrides={"*.c_attn.weight": {"transposed": False}})
        decision = decisions["transformer.h.0.attn.c_attn.weight"]
        assert (decision.transposed, decision.splits) == (False, "whole")
        assert decision.reason.endswith("does not fit: pass splits=")

    def test_of_what_an_override_sends_to_matrices(self) -> None:
        arguments = {"overrides": {"cls.predictions.transform.dense.weight": "dion2"}}
        decisions = decide(build("deberta"), splits={"cls.*.dense.weight": "a 16 | b 16"}, **arguments)
        assert decisions["cls.predictions.transform.dense.weight"].splits == "a 16 | b 16"

    def test_experts(self) -> None:
        decisions = decide(build("mixtral"), splits={"*.gate_up_proj": "48 x (gate 1 | up 1)"})
        assert decisions["model.layers.0.mlp.experts.gate_up_proj"].splits == "48 x (gate 1 | up 1)"

    @pytest.mark.parametrize(
        ("splits", "message"),
        [
            (
                {QKV: "q 32 | k 32"} | {"*.o_proj.weight": "q 32 | k 16 | v 16"},
                r"^splits '\*.o_proj.weight': parameter 'model.layers.0.self_attn.o_proj.weight' of shape \(32, 32\) "
                r"is not what its splits say: 'q 32 \| k 16 \| v 16' is 64 outputs, and the weight has 32",
            ),
            (
                {"*.embed_tokens.weight": "a 48 | b 48"},
                r"matches nothing that could be split, but .*'model.embed_tokens",
            ),
            ({"*.nothing.weight": "a 48 | b 48"}, r"^splits '\*.nothing.weight' matches no parameter"),
            ({QKV: "whole", "*.layers.0.*.qkv_proj.weight": "whole"}, "has no effect: earlier patterns"),
            ({QKV: "q 32, k 16"}, r"^splits 'model.layers.\*.self_attn.qkv_proj.weight': 'q 32, k 16' is no list"),
        ],
    )
    def test_bad_values(self, splits: dict[str, str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            route_parameters(build("phi3"), splits=splits)

    def test_overrides_split_all(self) -> None:
        overrides = {QKV: {"splits": "whole"}}
        with pytest.raises(ValueError, match="has no effect: overrides split all that it matches; remove it"):
            route_parameters(build("phi3"), splits={QKV: "a 32 | b 32"}, overrides=overrides)

    @pytest.mark.parametrize(
        ("splits", "message"),
        [
            ({QKV: [32, 32]}, r"^splits 'model.layers.\*.self_attn.qkv_proj.weight' must be a text such as"),
            (["a 32 | b 32"], "^splits must be a mapping from patterns of names, got list"),
        ],
    )
    def test_bad_types(self, splits: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            route_parameters(build("phi3"), splits=splits)
        with pytest.raises(TypeError, match=message):
            OptimizerSettings(lr=0.1, splits=splits)

    def test_build_optimizer(self) -> None:
        settings = OptimizerSettings(lr=0.1, splits={"*.gate_up_proj.weight": "whole"}, per_head=True)
        groups = settings.build(build("phi3")).param_groups
        found = {group["name"]: group["splits"] for group in groups if group["algorithm"] == "dion2"}
        assert found == {
            "dion2": "whole",
            "dion2-q-k-v": "q 4*8 | k 2*8 | v 2*8",
            "dion2-head": "head 4*8 along inputs",
        }
        groups = build_optimizer(build("phi3"), lr=0.1).param_groups
        assert [group["name"] for group in groups][:3] == ["dion2", "dion2-gate-up", "dion2-q-k-v"]
