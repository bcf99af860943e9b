"""The attention backends of supervised fine-tuning on packed rows: whether they agree, and how fast they are."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from benchmarks.gpu.machine import REPEATS, median_seconds
from benchmarks.gpu.random_models import CONVERSATIONS, DECODER, shared_files
from benchmarks.gpu.section import Options, Row
from benchmarks.gpu.training import autocast, free_memory
from recipes.supervised_fine_tuning.model import check_packing

Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]

REFERENCE: Final[Attention] = "eager"
OTHERS: Final[tuple[Attention, ...]] = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""Packages that some backends need."""

LENGTH = 1024
"""Tokens of a row."""

TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}
"""Relative to the largest logit, the loss and the norm of the gradients; a GPU computes in bfloat16."""


class Outcome(NamedTuple):
    """Results of a model with one attention on a batch, its time, and its memory in GB (None on a CPU)."""

    logits: Tensor
    loss: float
    gradients: Tensor
    seconds: float
    memory: float | None


def compare(options: Options) -> Iterator[Row]:
    """Yield a row for each attention: how fast it is, and how far from the reference on the same weights."""
    model = shared_files(options) / DECODER
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = packed_rows(model.with_name(CONVERSATIONS), tokenizer, count=2 if options.tiny else 4)
    conversations = sum(map(len, rows["seq_lengths"]))
    yield {
        "rows": len(rows),
        "of tokens": LENGTH,
        "conversations": conversations,
        "ok": conversations > len(rows),  # else no row holds several conversations
    }
    batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)(list(rows))
    device = torch.device(options.device)
    tolerance = TOLERANCE[device.type]
    repeats = 2 if options.tiny else REPEATS
    reference = run(model, REFERENCE, batch, device, repeats)
    yield row_of(REFERENCE, reference, reference, tolerance)
    for attention in OTHERS if device.type == "cuda" else OTHERS[:1]:
        package = PACKAGES.get(attention)
        if package is not None and find_spec(package) is None:
            yield row_of(attention, None, reference, tolerance) | {"found": f"{package} is not installed"}
            continue
        try:
            outcome = run(model, attention, batch, device, repeats)
        except Exception as error:  # whatever one kernel raises, the next is tried
            found = f"{type(error).__name__}: {error}"[:500]
            yield row_of(attention, None, reference, tolerance) | {"ok": False, "found": found}
        else:
            yield row_of(attention, outcome, reference, tolerance)


def packed_rows(conversations: Path, tokenizer: Any, count: int) -> Dataset:
    """Return rows of several conversations each, packed as for supervised fine-tuning."""
    lines = [json.loads(line) for line in conversations.read_text(encoding="utf-8").splitlines()]
    chats = [
        [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}]
        for line in lines
    ]
    tokens = [tokenizer.apply_chat_template(chat)["input_ids"] for chat in chats]
    packed = pack_dataset(Dataset.from_dict({"input_ids": tokens}), LENGTH)
    return packed.shuffle(seed=0).select(range(count))  # it begins with the longest, which fill rows of their own


def run(model_folder: Path, attention: Attention, batch: dict[str, Any], device: torch.device, repeats: int) -> Outcome:
    """Run a batch forward and backward, as supervised fine-tuning does."""
    cuda = device.type == "cuda"
    free_memory(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation=attention)
    model.to(device).train()
    with autocast(device):
        check_packing(model)
    batch = send_to_device(batch, device)

    def step() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with autocast(device):
            output = model(**batch, use_cache=False)
        output.loss.backward()
        return output.loss.detach(), output.logits.detach().flatten(0, 1)

    loss, logits = step()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    seconds = median_seconds(step, device, repeats)
    memory = (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else None
    return Outcome(logits, loss.item(), gradients, seconds, memory)


def row_of(attention: Attention, outcome: Outcome | None, reference: Outcome, tolerance: float) -> Row:
    """Return a row of the report; ``outcome`` is None where the attention could not run."""
    names = ("ms", "peak GB", "logits off by", "loss off by", "gradients off by")
    if outcome is None:
        return {"attention": attention, **dict.fromkeys(names), "ok": True, "found": ""}
    off = (
        ((outcome.logits - reference.logits).abs().max() / reference.logits.abs().max()).item(),
        abs(outcome.loss - reference.loss) / reference.loss,
        ((outcome.gradients - reference.gradients).norm() / reference.gradients.norm()).item(),
    )
    values = dict(zip(names, (1e3 * outcome.seconds, outcome.memory, *off), strict=True))
    return {"attention": attention, **values, "ok": all(each <= tolerance for each in off), "found": ""}
