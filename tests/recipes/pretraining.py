"""What the tests of the pretraining recipe and of the launch configurations share: tiny runs on several ranks."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM

from dion2_lightning import OptimizerSettings
from recipes.metrics import read_metrics
from recipes.pretraining.settings import Settings
from recipes.pretraining.train import pretrain
from tests.distributed.ranks import run_like_torchrun
from tests.integrations.huggingface import fsdp2_on_cpu

OPTIMIZER = OptimizerSettings(lr=3e-3, momentum=0.8, weight_decay=0.1, orthonormalize_dtype="float32")


def tiny_settings(folder: Path, **changes: Any) -> Settings:
    """Settings of a run that takes a second: four steps on a text file, a checkpoint after the second."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:30_000], encoding="utf-8")
    settings = Settings(
        hidden_size=32,
        layers=2,
        heads=4,
        length=32,
        dataset=str(text),
        held_out_windows=10,
        optimizer=OPTIMIZER,
        steps=4,
        batch_size=8,
        log_every=1,
        checkpoint_every=2,
        output=folder / "run",
    )
    return replace(settings, **changes)


def run_on_ranks(ranks: int, settings: Settings, environment: Mapping[str, str]) -> None:
    """Trains on several processes that find this environment, on the CPU whatever it asks for."""
    run_like_torchrun(ranks, _rank, settings, dict(environment))


def _rank(settings: Settings, environment: dict[str, str]) -> None:
    os.environ |= environment
    datasets.config.HF_DATASETS_CACHE = settings.output.parent / "cache"
    if {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"} & environment.keys():
        fsdp2_on_cpu()
    pretrain(settings)


def logged(settings: Settings, name: str) -> list[float]:
    """A figure of a run, step by step."""
    return [line[name] for line in read_metrics(settings.output / "metrics.jsonl") if name in line]


def saved_logits(settings: Settings) -> torch.Tensor:
    """What the model that a run saved answers to every token of the vocabulary's beginning."""
    model = AutoModelForCausalLM.from_pretrained(settings.output / "model")
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(settings.length)[None]).logits
    return logits


def saved_weights(settings: Settings) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(settings.output / "model").state_dict())
