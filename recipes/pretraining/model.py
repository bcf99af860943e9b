"""Models that are trained from nothing: a small Llama, in sizes that a laptop trains in minutes, or any other."""

import shutil
from pathlib import Path

import transformers
from accelerate import Accelerator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from recipes.inputs import InputError
from recipes.pretraining.settings import BYTES, SMALL_MODEL, Settings
from recipes.versions import DIVIDES_MODELS

VOCABULARY_MULTIPLE = 64
"""Output heads whose size is a multiple of this are much faster on GPUs, and divide over ranks."""


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """Returns the tokenizer.

    Raises:
        InputError: If it cannot be loaded, or has no end token to put between documents.
    """
    if settings.tokenizer == BYTES:
        return ByT5Tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--tokenizer {settings.tokenizer!r} could not be loaded. Give {BYTES!r}, a folder, or a name on the hub."
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"--tokenizer {settings.tokenizer} has no end token, which has to close every document.")
    return tokenizer


def make_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Returns the model that the settings ask for, with random weights, that knows the tokenizer's special tokens.

    Raises:
        InputError: If there is no such configuration, or it does not read windows of that length or such tokens.
    """
    vocabulary = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if settings.model == SMALL_MODEL:
        sizes = {name: getattr(settings, name) for name in ("length", "hidden_size", "layers", "heads")}
        model: PreTrainedModel = build_model(vocabulary, **sizes)
    else:
        model = _build_like(settings.model, vocabulary, settings.length)
    held = model.get_input_embeddings().weight.shape[0]  # a part of a composed configuration may keep a size of its own
    if held < len(tokenizer):
        raise InputError(
            f"--model {settings.model}: it keeps a vocabulary of {held}, and --tokenizer {settings.tokenizer} has "
            f"{len(tokenizer)} tokens. Choose another of the two."
        )
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    return model


def divide_model(model: PreTrainedModel, accelerator: Accelerator, folder: Path) -> PreTrainedModel:
    """Returns a model whose layers are divided among ranks by tensor parallelism and FSDP2. Every rank calls it.

    transformers divides a model as it reads it, so this one is written first.

    Args:
        model: The same on every rank.
        accelerator: Whose launch configuration says among how many.
        folder: Where it is written; removed afterwards.

    Raises:
        InputError: If this transformers cannot.
    """
    if not DIVIDES_MODELS:
        raise InputError(
            "The launch configuration asks for tensor parallelism, for which transformers 5.23 or later is needed; "
            f"found {transformers.__version__}. Upgrade it, or leave it to FSDP2 (recipes/launch/fsdp2-8.yaml)."
        )
    sizes = accelerator.parallelism_config
    if accelerator.is_main_process:
        model.save_pretrained(folder)
    accelerator.wait_for_everyone()
    divided: PreTrainedModel = type(model).from_pretrained(
        folder,
        distributed_config=DistributedConfig(
            dp_replicate_size=sizes.dp_replicate_size, fsdp_size=sizes.dp_shard_size, tp_size=sizes.tp_size
        ),
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder)
    return divided.train()


def is_divided(model: PreTrainedModel) -> bool:
    """Says whether a model is one that :func:`divide_model` returned."""
    return getattr(model.config, "distributed_config", None) is not None


def build_model(vocabulary_size: int, *, length: int, hidden_size: int, layers: int, heads: int) -> LlamaForCausalLM:
    """Returns a randomly initialized Llama with an output head of its own.

    Args:
        vocabulary_size: Of the tokenizer.
        length: Longest window in tokens.
        hidden_size: Width; the feed-forward layers are 8/3 as wide, rounded up to a multiple of 8.
        layers: Decoder layers.
        heads: Attention heads of each.
    """
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 24) * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _build_like(name: str, vocabulary_size: int, length: int) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, vocab_size=vocabulary_size, use_cache=False)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise InputError(f"--length {length}: the model reads {longest} tokens at most.")
        return AutoModelForCausalLM.from_config(config, dtype="float32")
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model {name!r}: no configuration of a causal language model was found. Give {SMALL_MODEL!r}, a folder "
            "with a config.json, or a name on the hub."
        ) from error
