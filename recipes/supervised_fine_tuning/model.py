"""What the three programs do alike: refuse a model that mixes up packed conversations, and validate."""

import os
from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import PreTrainedModel

IGNORED = -100

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of the largest logit: products of a mixture of experts have other shapes, and round differently."""


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise a ValueError if a conversation changes the logits of the next one in its row.

    transformers tells packed conversations apart by their positions. Some models ignore these (GPT-OSS, Falcon, OPT,
    Mamba), and no loss shows it.
    """
    if any(weight.is_meta for weight in model.parameters()) or os.environ.get("LOCAL_RANK", "0") != "0":
        return  # FSDP brings the weights later; the first rank has them
    row = torch.arange(32, device=model.device) % model.get_input_embeddings().num_embeddings
    other = torch.cat([row[:16].flip(0), row[16:]])
    positions = torch.arange(32, device=model.device) % 16
    training = model.training
    model.eval()
    one, changed = (
        model(input_ids=each[None], position_ids=positions[None], use_cache=False).logits[0, 16:]
        for each in (row, other)
    )
    model.train(training)
    if (one - changed).abs().max() > TOLERANCE[one.dtype] * one.abs().max():
        raise ValueError(f"packing: {type(model).__name__} mixes up conversations in one row; pass --packing false")


def pad_rows(rows: Dataset, multiple: int) -> Dataset:
    """Add rows without labels up to a multiple; otherwise several ranks would repeat rows, and count them twice."""
    unlabelled = {**rows[0], "labels": [IGNORED] * len(rows[0]["labels"])}
    missing = -len(rows) % multiple
    return concatenate_datasets([rows, Dataset.from_list([unlabelled] * missing, rows.features)]) if missing else rows


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], accelerator: Accelerator) -> float:
    """Return the mean over all tokens with labels, on all ranks. The model stays in evaluation mode."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        loss = model(**batch, fused_lm_head=True, num_items_in_batch=1).loss  # the sum over tokens
        total += torch.stack([loss.double(), (batch["labels"] != IGNORED).sum()])
    loss, tokens = accelerator.reduce(total).tolist()
    return float(loss / tokens)
