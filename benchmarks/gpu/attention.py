"""The attention backends of supervised fine-tuning on packed rows: whether they agree, and how fast they are."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.gpu.machine import REPEATS, median_seconds
from benchmarks.gpu.random_models import CONVERSATIONS, DECODER, shared_files
from benchmarks.gpu.section import Options, Row
from benchmarks.gpu.training import autocast, free_memory
from recipes.supervised_fine_tuning.conversations import load_conversations
from recipes.supervised_fine_tuning.data import PackedConversations, collate_for, pack_training_rows
from recipes.supervised_fine_tuning.model import load_model
from recipes.supervised_fine_tuning.settings import Settings

Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]

REFERENCE: Final[Attention] = "eager"
OTHERS: Final[tuple[Attention, ...]] = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""Packages that some backends need."""

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
    files = shared_files(options)
    settings = Settings(
        model=str(files / DECODER),
        attention=REFERENCE,
        dataset=str(files / CONVERSATIONS),
        length=1024,
        batch_size=2 if options.tiny else 8,
    )
    train, _ = load_conversations(settings)
    rows = pack_training_rows(train, AutoTokenizer.from_pretrained(settings.model), settings, settings.batch_size)
    yield {
        "rows": len(rows),
        "of tokens": settings.length,
        "conversations": rows.packed,
        "ok": rows.packed > len(rows),  # else no row holds several conversations
    }
    device = torch.device(options.device)
    tolerance = TOLERANCE[device.type]
    reference = run(settings, rows, device, 2 if options.tiny else REPEATS)
    yield row_of(REFERENCE, reference, reference, tolerance)
    for attention in OTHERS if device.type == "cuda" else OTHERS[:1]:
        package = PACKAGES.get(attention)
        if package is not None and find_spec(package) is None:
            yield row_of(attention, None, reference, tolerance) | {"found": f"{package} is not installed"}
            continue
        try:
            outcome = run(replace(settings, attention=attention), rows, device, 2 if options.tiny else REPEATS)
        except Exception as error:  # whatever one kernel raises, the next is tried
            found = f"{type(error).__name__}: {error}"[:500]
            yield row_of(attention, None, reference, tolerance) | {"ok": False, "found": found}
        else:
            yield row_of(attention, outcome, reference, tolerance)


def run(settings: Settings, rows: PackedConversations, device: torch.device, repeats: int) -> Outcome:
    """Run rows forward and backward, as the recipe does."""
    cuda = device.type == "cuda"
    free_memory(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = load_model(settings)[0].to(device)
    batch = {
        name: part.to(device)
        for name, part in collate_for(settings.attention)([rows[index] for index in range(len(rows))]).items()
    }

    def step() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with autocast(device):
            output = model(**batch)
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
