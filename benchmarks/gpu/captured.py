"""Steps that a CUDA graph holds: are replays, at rates that change, the steps that they replace, bit for bit?

Without a GPU nothing is captured: then rates that are tensors are compared with floats alone.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.gpu.machine import Timer, synchronize
from benchmarks.gpu.section import Options, Row
from dion2_lightning import Dion2

WARM_UP: Final = 3
"""Steps before the capture: they create the state, and have libraries allocate what they need."""

STEPS: Final = 8
"""Steps that are compared, the first ones included."""

RATES: Final = {"lr": 2.0**-7, "momentum": 0.9375, "weight_decay": 0.0625}
"""Numbers that float32 has."""

WAYS: Final[dict[str, dict[str, Any]]] = {
    "dion2": {},
    "dion2, bad gradients skipped, clipped": {"check_finite": "skip", "max_grad_norm": 1.0},
    "dion2, in bfloat16": {"dtype": torch.bfloat16},
    "muon with Nesterov and cautious decay": {"fraction": 1.0, "nesterov": True, "cautious_weight_decay": True},
    "dion3": {"algorithm": "dion3"},
    "dion": {"algorithm": "dion"},
}
"""What is captured: the algorithm of the matrices, with AdamW for vectors."""


def compare(options: Options) -> Iterator[Row]:
    """Yield a row for each way: rates in tensors against floats, and replays of a captured step against both."""
    device = torch.device(options.device)
    for name, settings in WAYS.items():
        expected, _ = train(device, options.tiny, tensors=False, **settings)
        found, plain = train(device, options.tiny, tensors=True, **settings)
        row = {"step of": name, "rates": "tensors", "ms a step": 1e3 * plain, "ok": _are_equal(found, expected)}
        yield row
        if device.type != "cuda":
            yield {"step of": name, "rates": "tensors, captured", "skipped": "a CUDA graph needs a GPU"}
            continue
        try:
            found, seconds = train(device, options.tiny, tensors=True, captured=True, **settings)
        except RuntimeError as error:
            yield {**row, "rates": "tensors, captured", "ok": False, "found": str(error)[:500]}
            continue
        is_same = _are_equal(found, expected)
        yield {"step of": name, "rates": "tensors, captured", "ms a step": 1e3 * seconds, "ok": is_same}


def train(
    device: torch.device,
    tiny: bool,
    *,
    tensors: bool,
    captured: bool = False,
    algorithm: str = "dion2",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[list[Tensor], float]:
    """Take steps at rates that are halved at every step, on given gradients, by kernels that a graph can hold.

    Args:
        device: Of the weights.
        tiny: Whether they are.
        tensors: Whether the rates are tensors.
        captured: Whether steps after the first ones are replays of one that a CUDA graph has captured.
        algorithm: Of the matrices.
        dtype: Of the weights.
        settings: Of the optimizer.

    Returns:
        Weights and state at the end, and the seconds of the last step.
    """
    width = 32 if tiny else 1024
    generator = torch.Generator().manual_seed(0)
    shapes = [(width, 4 * width), (4 * width, width), (width, width), (width, width)]
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in [*shapes, (width,)]
    ]
    rates = {name: torch.tensor(rate, device=device) if tensors else rate for name, rate in RATES.items()}
    optimizer = Dion2(
        [
            {"params": parameters[:-1], "algorithm": algorithm, **rates},
            {"params": parameters[-1:], "algorithm": "adamw", "lr": rates["lr"]},
        ],
        capturable=tensors,
        kernels="torch",
        **settings,
    )
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    step: Callable[[], object] = optimizer.step
    # Libraries allocate by stream, and some only outside of a capture.
    stream = torch.cuda.Stream(device) if captured else None
    for number in range(STEPS):
        if captured and number == WARM_UP:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                optimizer.step()
            step = graph.replay
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        for group in optimizer.param_groups:
            if not tensors:
                group["lr"] = RATES["lr"] / 2**number
            else:
                group["lr"].fill_(RATES["lr"] / 2**number)
        timer = Timer(device)
        synchronize(device)
        with torch.cuda.stream(stream if number < WARM_UP else None), timer:
            step()
        synchronize(device)
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [*(parameter.detach() for parameter in parameters), *states], timer.seconds()


def _are_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other.to(one.device)) for one, other in zip(found, expected, strict=True))
