"""Whole training steps of language models with random weights: speed, memory, and the optimizer's share."""

import gc
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.flops import peak_flops, training_flops
from benchmarks.gpu.machine import Timer
from benchmarks.gpu.section import Options, Row
from dion2_lightning import SelectionTracker, SelectionWarning, build_optimizer

MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "gpt2-size": {
        "vocab_size": 256,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
}
TINY = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
"""Sizes of every model with --tiny."""

Build = Callable[[nn.Module], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "torch.optim.AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
    "Muon and AdamW": lambda model: build_optimizer(model, lr=1e-4, algorithm="muon"),
    "Dion2 at 1/2 and AdamW": lambda model: build_optimizer(model, lr=1e-4, fraction=1 / 2),
    "Dion2 at 1/4 and AdamW": lambda model: build_optimizer(model, lr=1e-4, fraction=1 / 4),
    "Dion2 at 1/8 and AdamW": lambda model: build_optimizer(model, lr=1e-4, fraction=1 / 8),
}
IN_BFLOAT16 = ("torch.optim.AdamW, fused", "Dion2 at 1/4 and AdamW")
"""Optimizers that also train bfloat16 weights."""

METRICS_EVERY = 10
"""Steps between two steps with metrics."""


def train(options: Options, *, name: str, rows: int, length: int) -> Iterator[Row]:
    """Yield a row for each optimizer: speed, time and memory of a training step.

    Products are in bfloat16 (autocast), weights in float32; some optimizers also train bfloat16 weights.

    Args:
        options: Of the section.
        name: A key of ``MODELS``.
        rows: Per batch.
        length: Tokens per row.
    """
    device = torch.device(options.device)
    if options.tiny:
        rows, length = 2, 32
    steps = 2 if options.tiny else 10
    cases = [(each, torch.float32) for each in OPTIMIZERS] + [(each, torch.bfloat16) for each in IN_BFLOAT16]
    for optimizer_name, dtype in cases:
        model = make_model(name, options, length, dtype)
        tokens = torch.randint(model.config.vocab_size, (rows, length), device=device)
        peak = peak_flops(device)
        flops = training_flops(model, tokens)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        optimizer = OPTIMIZERS[optimizer_name](model)
        timed = [timed_step(model, optimizer, tokens) for _ in range(steps + 3)]
        loss = timed[-1][2].item()
        whole = statistics.median(each.seconds() for each, _, _ in timed[3:])
        own = statistics.median(each.seconds() for _, each, _ in timed[3:])
        yield {
            "optimizer": optimizer_name,
            "weights": str(dtype).removeprefix("torch."),
            "tokens a second": round(tokens.numel() / whole),
            "model FLOPs utilisation, %": 100 * flops / whole / peak if peak else None,
            "ms a step": 1e3 * whole,
            "of it the optimizer, ms": 1e3 * own,
            "share, %": 100 * own / whole,
            "peak memory, GB": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
            "ok": math.isfinite(loss),
        }
        del model, optimizer, timed
        free_memory(device)


def measure_statistics(options: Options, *, name: str, rows: int, length: int) -> Iterator[Row]:
    """Yield what statistics of the selection add to a training step with Dion2 at a quarter.

    The same training takes blocks of steps with and without a tracker, in turn.
    """
    warnings.simplefilter("ignore", SelectionWarning)  # with one random batch some slices are never selected
    device = torch.device(options.device)
    if options.tiny:
        rows, length = 2, 32
    model = make_model(name, options, length, torch.float32)
    optimizer = build_optimizer(model, lr=1e-4)
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=device)
    tracker = SelectionTracker(every=METRICS_EVERY)
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(3 if options.tiny else 9):
        for with_statistics in (True, False) if number % 2 else (False, True):
            if with_statistics:
                tracker.attach(optimizer)
            timer = Timer(device)
            with timer:
                for _ in range(METRICS_EVERY):
                    timed_step(model, optimizer, tokens)
                    tracker.pop_metrics()
            tracker.detach()
            if number > 0:  # the first step creates the state
                times[with_statistics].append(timer.seconds() / METRICS_EVERY)
    without, with_ = (statistics.median(times[each]) for each in (False, True))
    ratio = statistics.median(b / a for a, b in zip(times[False], times[True], strict=True))
    yield {"steps of": name, "ms without": 1e3 * without, "with": 1e3 * with_, "median ratio of neighbours": ratio}


def make_model(name: str, options: Options, length: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a Llama with random weights on the device, the same whenever it is made."""
    sizes = {**MODELS[name], "tie_word_embeddings": True, "max_position_embeddings": length, "use_cache": False}
    if options.tiny:
        heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
        sizes |= {**TINY, **heads}
    torch.manual_seed(0)
    with torch.device(options.device):
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).train()


def timed_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> tuple[Timer, Timer, Tensor]:
    """Take a training step; return the timers of the whole step and of the optimizer, and the loss."""
    whole, own = Timer(tokens.device), Timer(tokens.device)
    with whole:
        with autocast(tokens.device):
            loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with own:
            optimizer.step()
        optimizer.zero_grad()
    return whole, own, loss.detach()


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast on a GPU; a CPU computes in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def free_memory(device: torch.device) -> None:
    """Free unused memory of the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
