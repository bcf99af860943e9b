"""Pretraining at GPT-2-small's size in the time left, the same for every method: validation losses by time.

The text is on every machine: the sources of Python's library and of the installed packages. It differs between
machines, so losses can be compared within one report only.
"""

import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.section import Options, Row
from benchmarks.gpu.training import autocast, free_memory, make_model
from dion2_lightning import Dion2, build_optimizer

METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {"algorithm": "adamw", "lr": 1.5e-3},
    "Muon": {"algorithm": "muon", "lr": 3e-3},
    "Dion2 at 1/2": {"fraction": 1 / 2, "lr": 3e-3, "momentum": 0.95**2},
    "Dion2 at 1/4": {"fraction": 1 / 4, "lr": 3e-3, "momentum": 0.95**4},
}
"""Common settings, not tuned at this size; the momenta remember as many steps as Muon's 0.95."""

SETTINGS: dict[str, Any] = {"adamw_lr": 1.5e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
TEXT_BYTES = 100_000_000
VALIDATION_SHARE = 0.02
WARMUP, DECAY = 0.05, 0.4
"""Shares of the time in which the learning rates rise, and in which they fall to zero."""

MEASUREMENTS = 6
"""How often a method's validation loss is measured."""

RESERVED_SECONDS = 35.0
"""Seconds for starting the process, reading the text and validating."""

READING_SECONDS = 15.0
"""Seconds after which no more text is read."""


def pretrain(options: Options, *, rows: int, length: int) -> Iterator[Row]:
    """Yield each method's validation loss, in nats per byte, at equal times.

    Args:
        options: Of the section; its time is divided among the methods.
        rows: Windows per step.
        length: Bytes per window.
    """
    began = time.monotonic()
    device = torch.device(options.device)
    if options.tiny:
        rows, length = 2, 64
    train, validation = read_windows(200_000 if options.tiny else TEXT_BYTES, length)
    yield {
        "text, MB": (train.numel() + validation.numel()) / 1e6,
        "windows": len(train),
        "validation windows": len(validation),
    }
    validation = validation[: 4 if options.tiny else 256].to(device)
    left = options.seconds - (time.monotonic() - began) - RESERVED_SECONDS
    seconds = 1.0 if options.tiny else max(1.0, left / len(METHODS))
    for method, settings in METHODS.items():
        model = make_model("gpt2-size", options, length, torch.float32)
        optimizer = build_optimizer(model, **{**SETTINGS, **settings})
        for point in run(model, optimizer, train, validation, rows, seconds):
            yield {"method": method, "lr": settings["lr"], **point}
        del model, optimizer
        free_memory(device)


def run(
    model: nn.Module, optimizer: Dion2, train: Tensor, validation: Tensor, rows: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Train for a time, without that of validation, and yield the validation loss ``MEASUREMENTS`` times."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(0)
    trained, steps = 0.0, 0
    for point in range(1, MEASUREMENTS + 1):
        while trained < seconds * point / MEASUREMENTS:
            start = time.perf_counter()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_factor(trained / seconds)
            windows = train[torch.randint(len(train), (rows,), generator=generator)].to(validation.device).long()
            with autocast(validation.device):
                loss = model(input_ids=windows, labels=windows).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            trained += time.perf_counter() - start
            steps += 1
        validation_loss = measure(model, validation, rows)
        yield {
            "steps": steps,
            "seconds": round(trained, 1),
            "training loss": loss.item(),
            "validation loss": validation_loss,
            "ok": math.isfinite(validation_loss),
        }


def lr_factor(done: float) -> float:
    """Return the learning rate as a share of its peak: it rises, stays, and falls to zero."""
    return max(0.01, min(1.0, done / WARMUP, (1 - done) / DECAY))


@torch.no_grad()
def measure(model: nn.Module, validation: Tensor, rows: int) -> float:
    """Return the mean loss over all validation windows."""
    model.eval()
    total = 0.0
    for windows in validation.long().split(rows):
        with autocast(validation.device):
            total += model(input_ids=windows, labels=windows).loss.item() * len(windows)
    model.train()
    return total / len(validation)


def read_windows(size: int, length: int) -> tuple[Tensor, Tensor]:
    """Return about ``size`` bytes of Python sources as uint8 (windows, length), for training and for validation."""
    paths = sysconfig.get_paths()
    files = sorted({file for folder in (paths["stdlib"], paths["purelib"]) for file in Path(folder).rglob("*.py")})
    random.Random(0).shuffle(files)
    texts, total, deadline = [], 0, time.monotonic() + READING_SECONDS
    for file in files:
        text = file.read_bytes() + b"\0"
        if len(text) < length:  # many are empty, and a few files alone may be for validation
            continue
        texts.append(text)
        total += len(text)
        if total > size or time.monotonic() > deadline:
            break
    count = max(1, round(VALIDATION_SHARE * len(texts)))
    return _windows(texts[count:], length), _windows(texts[:count], length)


def _windows(texts: list[bytes], length: int) -> Tensor:
    stream = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
    return stream[: len(stream) // length * length].view(-1, length)
