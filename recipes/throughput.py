"""How fast a run goes and how much of the hardware it uses, in figures that mean the same in every framework."""

import time
from collections.abc import Mapping

import torch
from lightning.fabric.utilities.throughput import Throughput, get_available_flops
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

WINDOW = 20
"""Steps that a figure averages over."""

HALF_PRECISION_PEAKS = {"H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12}
"""Operations a second, by a part of a GPU's name, where Lightning knows none or counts zeros that are skipped."""


def synchronized_time() -> float:
    """Return the seconds of a clock, once the accelerator, if any, has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the floating-point operations that a device can do in a second, if that is known.

    Args:
        device: Where a model trains.
        dtype: What its products are computed in.
    """
    if device.type != "cuda":
        return None
    if dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for part, peak in HALF_PRECISION_PEAKS.items():
            if part in name:
                return peak
    return get_available_flops(device, dtype)


class Speedometer:
    """Tokens a second, model FLOPs utilisation and peak memory of one rank's steps.

    Call :meth:`step` after every optimizer step and log :meth:`figures` when it is time to. Call :meth:`pause` before
    validation or a checkpoint and :meth:`go_on` after it, so that it does not count.

    Args:
        flops_per_token: What the model needs for a token, forward and backward, see :func:`model_flops_per_token`; 0
            where it is not known.
        device: Where it trains.
        dtype: What its products are computed in; decides the device's peak.
        world_size: Ranks that see different data (default: 1).
        unit: What is counted in the place of tokens, such as images (default: "tokens").
    """

    def __init__(
        self,
        flops_per_token: float,
        device: torch.device,
        dtype: torch.dtype,
        world_size: int = 1,
        unit: str = "tokens",
    ) -> None:
        self._flops_per_token = flops_per_token
        self._device = device
        self._world_size = world_size
        self._unit = unit
        self._throughput = Throughput(
            available_flops=peak_flops(device, dtype), world_size=world_size, window_size=WINDOW
        )
        self._seconds, self._steps, self._tokens = 0.0, 0, 0
        self._last: float | None = None
        self._paused = 0.0

    def step(self, tokens: int) -> None:
        """Count an optimizer step.

        Args:
            tokens: What this rank's model read for it, padding left out.
        """
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._steps += 1
            self._tokens += tokens
            flops = round(self._flops_per_token * tokens)
            # A step counts as one sample, so that a step may also have few tokens.
            self._throughput.update(
                time=self._seconds, batches=self._steps, samples=self._steps, lengths=self._tokens, flops=flops
            )
        self._last = now

    def pause(self) -> None:
        """Stop the clock, once the accelerator has done its steps."""
        self._paused = synchronized_time()

    def go_on(self) -> None:
        """Let the clock go on after :meth:`pause`; before the first step it stands still anyway."""
        if self._last is not None:
            self._last += synchronized_time() - self._paused

    def figures(self) -> dict[str, float]:
        """Return what is known, by the name to log it under.

        Returns:
            `tokens_per_second`, or what else the unit is, of all ranks together, after the first 21 steps;
            `model_flops_utilisation`, a share of the device's peak, where that is known; on a GPU `peak_memory_gb`, the
            most that was allocated so far.
        """
        measured = self._throughput.compute() if self._steps else {}
        figures = {}
        if "device/items_per_sec" in measured:
            figures[f"{self._unit}_per_second"] = measured["device/items_per_sec"] * self._world_size
        if self._flops_per_token and "device/mfu" in measured:
            figures["model_flops_utilisation"] = measured["device/mfu"]
        if self._device.type == "cuda":
            figures["peak_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        return figures


def model_flops_per_token(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """Count the floating-point operations that training takes for a token, see :func:`training_flops`.

    Args:
        model: Before it is wrapped or sharded; left as it was.
        batch: Inputs, `input_ids` among them.
    """
    return training_flops(model, batch) / batch["input_ids"].numel()


def training_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """Count the floating-point operations that training takes for a batch: products, attention included.

    A forward pass is counted. A backward pass takes as much for the gradients of activations, and as much again for
    those of weights, for the share of them that is trained. What gradient checkpointing computes twice counts once.

    Args:
        model: Before it is wrapped or sharded; left as it was.
        batch: Inputs.
    """
    training = model.training
    # The counter does not know the fused attention of CPUs; written out, it is products like the others.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(**batch)
    model.train(training)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in model.parameters())
    return float(counter.get_total_flops()) * (2 + share)
