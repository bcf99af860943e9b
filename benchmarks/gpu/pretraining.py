"""Pretraining at GPT-2-small's size for as long as there is time: the same time for every method, losses against it.

The text is what every machine that runs this has: the sources of Python's library and of the packages installed beside
it. It differs from machine to machine, so losses are compared within one report alone.
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
"""Usual settings, tuned nowhere at this size; the momenta remember as many steps as Muon's 0.95."""

SETTINGS: dict[str, Any] = {"adamw_lr": 1.5e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
TEXT_BYTES = 100_000_000
HELD_OUT_SHARE = 0.02
WARMUP, DECAY = 0.05, 0.4
"""Shares of the time in which the learning rates rise, and in which they fall to zero."""

LOOKS = 6
"""Times that a method's held-out loss is measured."""

RESERVE = 35.0
"""Seconds that starting the process, reading the text and measuring take besides."""

READING = 15.0
"""Seconds after which no more text is read."""


def pretrain(options: Options, *, rows: int, length: int) -> Iterator[Row]:
    """Yield each method's held-out loss, in nats a byte, at equal times.

    Args:
        options: Of the section; its time is divided among the methods.
        rows: Windows of a step.
        length: Bytes of a window.
    """
    began = time.monotonic()
    device = torch.device(options.device)
    if options.tiny:
        rows, length = 2, 64
    train, held_out = read_windows(200_000 if options.tiny else TEXT_BYTES, length)
    yield {"text, MB": (train.numel() + held_out.numel()) / 1e6, "windows": len(train), "held out": len(held_out)}
    held_out = held_out[: 4 if options.tiny else 256].to(device)
    left = options.seconds - (time.monotonic() - began) - RESERVE
    seconds = 1.0 if options.tiny else max(1.0, left / len(METHODS))
    for method, settings in METHODS.items():
        model = make_model("gpt2-size", options, length, torch.float32)
        optimizer = build_optimizer(model, **{**SETTINGS, **settings})
        for point in run(model, optimizer, train, held_out, rows, seconds):
            yield {"method": method, "lr": settings["lr"], **point}
        del model, optimizer
        free_memory(device)


def run(
    model: nn.Module, optimizer: Dion2, train: Tensor, held_out: Tensor, rows: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Train for so long, measurements left out, and yield the held-out loss now and then."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(0)
    trained, steps = 0.0, 0
    for look in range(1, LOOKS + 1):
        while trained < seconds * look / LOOKS:
            start = time.perf_counter()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share_of_rate(trained / seconds)
            windows = train[torch.randint(len(train), (rows,), generator=generator)].to(held_out.device).long()
            with autocast(held_out.device):
                loss = model(input_ids=windows, labels=windows).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            trained += time.perf_counter() - start
            steps += 1
        held_out_loss = measure(model, held_out, rows)
        yield {
            "steps": steps,
            "seconds": round(trained, 1),
            "training loss": loss.item(),
            "held-out loss": held_out_loss,
            "ok": math.isfinite(held_out_loss),
        }


def share_of_rate(done: float) -> float:
    """Return the learning rate as a share of its peak: it rises, stays, and falls to zero."""
    return max(0.01, min(1.0, done / WARMUP, (1 - done) / DECAY))


@torch.no_grad()
def measure(model: nn.Module, held_out: Tensor, rows: int) -> float:
    """Return the mean loss over all held-out windows, equal in length."""
    model.eval()
    total = 0.0
    for windows in held_out.long().split(rows):
        with autocast(held_out.device):
            total += model(input_ids=windows, labels=windows).loss.item() * len(windows)
    model.train()
    return total / len(held_out)


def read_windows(size: int, length: int) -> tuple[Tensor, Tensor]:
    """Return about so many bytes of Python sources as windows (windows, length), uint8: to train on, and held out."""
    paths = sysconfig.get_paths()
    files = sorted({file for folder in (paths["stdlib"], paths["purelib"]) for file in Path(folder).rglob("*.py")})
    random.Random(0).shuffle(files)
    texts, total, deadline = [], 0, time.monotonic() + READING
    for file in files:
        texts.append(file.read_bytes() + b"\0")
        total += len(texts[-1])
        if total > size or time.monotonic() > deadline:
            break
    held_out = max(1, round(HELD_OUT_SHARE * len(texts)))
    return _windows(texts[held_out:], length), _windows(texts[:held_out], length)


def _windows(texts: list[bytes], length: int) -> Tensor:
    stream = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
    return stream[: len(stream) // length * length].view(-1, length)
