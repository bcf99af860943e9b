"""The model: loaded with its tokenizer, adapters and checkpointing; measured; and saved from whatever layout."""

import copy
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from recipes.inputs import InputError
from recipes.offline import SMOLLM2, forget_gguf, model_source
from recipes.resuming import put_in_place, remove
from recipes.supervised_fine_tuning.encoding import IGNORED
from recipes.supervised_fine_tuning.packing import check_packing
from recipes.supervised_fine_tuning.settings import Settings
from recipes.throughput import model_flops_per_token
from recipes.versions import checkpoint_activations

logger = logging.getLogger("recipes")


def load_model(settings: Settings, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the pretrained model in float32, with adapters if wanted, ready to train, and its tokenizer.

    Args:
        settings: Of the run; its seed draws the adapters' weights, the same on every rank.
        options: More for `from_pretrained`.

    Raises:
        InputError: If it cannot be loaded, has no chat template, reads less than `length` tokens, or cannot tell packed
            conversations apart.
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
    forget_gguf(model)
    if getattr(model, "is_quantized", False):
        method = model.config.quantization_config.quant_method
        raise InputError(
            f"--model {settings.model}: its weights are quantized ({method.value}), which this recipe does not train. "
            "Choose a model with dense weights."
        )
    model.config.use_cache = False  # with a cache, packed conversations would see each other
    if settings.packing:
        check_packing(model, settings)
    if settings.gradient_checkpointing:
        try:
            checkpoint_activations(model)
        except ValueError as error:
            raise InputError(f"--gradient_checkpointing: {error}") from error
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


def autocast_dtype(settings: Settings) -> torch.dtype:
    """Returns what products are computed in: as the settings say, or else the launcher, or else bfloat16 on GPUs.

    Raises:
        InputError: If the launcher says something else than bf16 or no mixed precision.
    """
    precision = settings.precision
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision == "auto" and launched_with is not None:
        if launched_with not in ("bf16", "no"):
            raise InputError(
                f"the launch configuration's mixed_precision is {launched_with}, which this recipe does not do. Let it "
                "be bf16 or no there, or give --precision."
            )
        precision = "bf16" if launched_with == "bf16" else "float32"
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def count_flops_per_token(model: PreTrainedModel, length: int) -> float:
    """Counts what training takes for a token of a row, before the model is wrapped; nothing is computed.

    Where it cannot be counted so, as in a mixture of experts, where it depends on the values, it is unknown: 0.
    """
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    twin = copy.deepcopy(model, memo)
    twin.set_attn_implementation("eager")
    with torch.device("meta"):
        # With a mask that is ready, nobody looks at the values of the positions.
        batch = {
            "input_ids": torch.ones(1, length, dtype=torch.long),
            "attention_mask": torch.ones(1, 1, length, length),
        }
    try:
        return model_flops_per_token(twin, batch)
    except Exception as error:  # whatever a model does to tensors without values: a figure in the log ends no run
        logger.warning("model_flops_utilisation is not known for this model: %s", (str(error) or "?").splitlines()[0])
        return 0.0


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Returns the mean loss of all tokens to be learnt, over all ranks, which call it with their batches."""
    training = model.training
    model.eval()
    total: Any = 0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=1).loss  # the sum over tokens
        total = total + torch.stack([loss.double(), (batch["labels"] != IGNORED).sum()])
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total[0] / total[1])


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves the model, or its adapters, in the format of `save_pretrained`, as a whole. All ranks call it.

    Args:
        model: As `load_model` returned it, out of a framework's wrapper; its parameters may be sharded.
        tokenizer: Saved beside it.
        folder: Where, in the place of a model that an earlier run left there.
    """
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    weights = {name: weight for name, weight in weights.items() if name not in tied}
    if not dist.is_initialized() or dist.get_rank() == 0:
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        remove(unfinished)
        model.config.use_cache = True  # for those who will generate with it
        model.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        model.config.use_cache = False
        put_in_place(unfinished, folder)
    if dist.is_initialized():
        dist.barrier()  # no rank reads what is not written
