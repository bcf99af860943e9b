"""The model: loaded with its tokenizer, LoRA and checkpointing; measured; and saved from whatever layout."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from recipes.inputs import InputError
from recipes.offline import SMOLLM2, forget_quantization, model_source
from recipes.supervised_fine_tuning.settings import Settings


def load_model(settings: Settings, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the pretrained model in float32, with adapters if wanted, ready to train, and its tokenizer.

    Args:
        settings: Of the run; its seed draws the adapters' weights, the same on every rank.
        options: More for `from_pretrained`.

    Raises:
        InputError: If it cannot be loaded, has no chat template, or reads less than `length` tokens.
    """
    source = model_source(settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, attn_implementation=settings.attention, **options
        )
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"--model {settings.model!r}, --attention {settings.attention}: it could not be loaded: {reason}. Give "
            f"{SMOLLM2!r}, a folder with a causal language model and its tokenizer, or a name on the hub."
        ) from error
    if tokenizer.chat_template is None:
        raise InputError(f"--model {settings.model}: its tokenizer has no chat template. Choose an instruct model.")
    longest = getattr(model.config, "max_position_embeddings", settings.length)
    if settings.length > longest:
        raise InputError(f"--length {settings.length}: the model reads {longest} tokens at most.")
    forget_quantization(model)
    model.config.use_cache = False  # with a cache, packed conversations would see each other
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable()
    set_seed(settings.seed)
    if settings.lora_rank:
        adapters = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, adapters)
    return model.train(), tokenizer


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves the model, or its adapters, in the format of `save_pretrained`. All ranks call it.

    Args:
        model: As `load_model` returned it, out of a framework's wrapper; its parameters may be sharded.
        tokenizer: Saved beside it.
        folder: Where.
    """
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not dist.is_initialized() or dist.get_rank() == 0:
        model.config.use_cache = True  # for those who will generate with it
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        model.config.use_cache = False
    if dist.is_initialized():
        dist.barrier()  # no rank reads what is not written
