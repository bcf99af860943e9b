"""Weights in half precision: what stochastic rounding costs, what memory is saved, and what is lost in fine-tuning.

    python -m benchmarks.half_precision time
    python -m benchmarks.half_precision memory
    python -m benchmarks.half_precision fine-tuning      # an hour or two on 2 cores

`time`: a step with bfloat16 weights, rounded to nearest and stochastically, in turn in one process, on the matrices of
a model and on an embedding. Quote the ratios.

`memory`: bytes a parameter of SmolLM2-135M with random weights and 8 tokens, so that there is next to nothing else.
Held is what stays between two steps, with gradients; peak the most that tensors hold at once in a training step,
counted operation by operation.

`fine-tuning`: the task of benchmarks/convergence, SmolLM2-135M on docstrings, with the settings that were best in
float32 there. What is compared is the precision of the weights that the optimizer has, and of the gradients it is
given, bfloat16 like the weights: products are taken in float32 throughout, from float32 copies of the weights. Each run
is a line of a file, and a run that is there is not made again.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.statistics import keep_memory, size_of
from benchmarks.step import LAYERS, Sizes, timed, weights
from dion2_lightning import Dion2, build_optimizer

MAX_GRADIENT_NORM = 1.0
ROUNDINGS: Final = ("nearest", "stochastic")


@dataclass(frozen=True)
class Setup:
    """What an optimizer's weights are kept in, and which optimizer it is.

    Attributes:
        name: For tables.
        dtype: Of weights and gradients.
        settings: For `build_optimizer`; None for torch's own AdamW.
        autocast: Whether the model multiplies in bfloat16.
    """

    name: str
    dtype: torch.dtype = torch.bfloat16
    settings: dict[str, Any] | None = field(default_factory=dict)
    autocast: bool = False


# Time


def compare_times(arguments: argparse.Namespace) -> None:
    """Print a table: milliseconds a step, and the ratio to rounding to nearest."""
    keep_memory()
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.device}, {torch.get_num_threads()} threads")
    print(f"{'':44}{'nearest, ms':>12}{'stochastic':>12}{'ratio':>8}")
    for row in times_of_rounding(LAYERS[arguments.shapes] * arguments.layers, arguments.rounds, arguments.device):
        print(f"{row['weights']:44}{row['nearest, ms']:12.1f}{row['stochastic, ms']:12.1f}{row['ratio']:8.2f}")


def times_of_rounding(
    sizes: Sizes, rounds: int, device: torch.device, embedding: tuple[int, int] = (49152, 576)
) -> Iterator[dict[str, Any]]:
    """Yield the median milliseconds of a step with bfloat16 weights by either rounding, and their median ratio."""
    cases: dict[str, tuple[Sizes, dict[str, Any]]] = {
        "matrices": (sizes, {}),
        "the same with a momentum in bfloat16": (sizes, {"state_dtype": "bfloat16"}),
        "the same without weight decay": (sizes, {"weight_decay": 0.0}),
        f"AdamW: an embedding of {embedding[0]} x {embedding[1]}": ([embedding], {"algorithm": "adamw"}),
    }
    for name, (its_sizes, group) in cases.items():
        optimizers = {
            rounding: _optimizer_of(its_sizes, device, {"rounding": rounding, **group}) for rounding in ROUNDINGS
        }
        times: dict[str, list[float]] = {rounding: [] for rounding in ROUNDINGS}
        for number in range(rounds + 1):
            for rounding in ROUNDINGS if number % 2 else reversed(ROUNDINGS):
                elapsed = timed(optimizers[rounding].step, device)
                if number > 0:  # the first creates state
                    times[rounding].append(elapsed)
        medians = {f"{rounding}, ms": statistics.median(values) for rounding, values in times.items()}
        ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
        yield {"weights": name, **medians, "ratio": ratio}


def _optimizer_of(sizes: Sizes, device: torch.device, group: dict[str, Any]) -> Dion2:
    parameters = []
    for each in weights(sizes, device):
        parameter = nn.Parameter(each.detach().to(torch.bfloat16))
        assert each.grad is not None
        parameter.grad = each.grad.to(torch.bfloat16)
        parameters.append(parameter)
    # More decay than rounding to nearest loses, so that there is nothing to warn of.
    return Dion2([{"params": parameters, "lr": 0.05, "weight_decay": 0.1, **group}])


# Memory

SETUPS_OF_MEMORY: Final = [
    Setup("AdamW of torch, float32", torch.float32, None),
    Setup("AdamW of torch, mixed", torch.float32, None, autocast=True),
    Setup("AdamW of torch, bfloat16", settings=None),
    Setup("AdamW, bfloat16", settings={"algorithm": "adamw"}),
    Setup("Dion2, float32", torch.float32),
    Setup("Dion2, mixed", torch.float32, autocast=True),
    Setup("Dion2, bfloat16"),
    Setup("Dion2, bfloat16, momentum too", settings={"state_dtype": "bfloat16"}),
]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations in its block make and that are still alive.

    Attributes:
        now: Of those that are alive.
        peak: The most there were.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for each in before:
            self._add(each)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        results = function(*arguments, **(keywords or {}))
        for each in tree_leaves(results):
            if isinstance(each, Tensor):
                self._add(each)
        return results

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def compare_memory(arguments: argparse.Namespace) -> None:
    """Print a table of bytes a parameter."""
    print("| | weights | gradients | state | held | peak |\n|---|---|---|---|---|---|")
    for setup in SETUPS_OF_MEMORY:
        figures = " | ".join(f"{each:.1f}" for each in bytes_per_parameter(setup, arguments.layers))
        print(f"| {setup.name} | {figures} |", flush=True)


def bytes_per_parameter(setup: Setup, layers: int) -> tuple[float, float, float, float, float]:
    """Take two training steps, and return the bytes of weights, gradients, state, all three, and at the peak."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(setup.dtype)
    optimizer = _optimizer(setup, model, lr=1e-3)
    tokens = torch.arange(8).unsqueeze(0)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()

    step()
    parameters = list(model.parameters())
    kinds = (
        parameters,
        [each.grad for each in parameters if each.grad is not None],
        [each for state in optimizer.state.values() for each in state.values()],
    )
    count = sum(each.numel() for each in parameters)
    held = [size_of(tensors) / count for tensors in kinds]
    with LiveBytes(each for tensors in kinds for each in tensors) as live:
        step()
    return held[0], held[1], held[2], sum(held), live.peak / count


# Fine-tuning

BEST_OF_DION2: Final = {"lr": 0.0014, "adamw_lr": 8.9e-5, "momentum": 0.5**4, "fraction": 0.25}
BEST_OF_ADAMW: Final = {"lr": 1.3e-4, "adamw_lr": 3e-4, "betas": (0.3, 0.999), "algorithm": "adamw"}

SETUPS_OF_FINE_TUNING: Final = [
    Setup("Dion2, float32", torch.float32, BEST_OF_DION2),
    Setup("Dion2, bfloat16, stochastic", settings=BEST_OF_DION2),
    Setup("Dion2, bfloat16, nearest", settings={**BEST_OF_DION2, "rounding": "nearest"}),
    Setup("Dion2, bfloat16, stochastic, momentum too", settings={**BEST_OF_DION2, "state_dtype": "bfloat16"}),
    Setup("AdamW, float32", torch.float32, BEST_OF_ADAMW),
    Setup("AdamW, bfloat16, stochastic", settings=BEST_OF_ADAMW),
    Setup("AdamW, bfloat16, nearest", settings={**BEST_OF_ADAMW, "rounding": "nearest"}),
]


def compare_losses(arguments: argparse.Namespace) -> None:
    """Make the runs that are missing, and print a table of all: held-out losses, and how much of float32's way."""
    from benchmarks.convergence.tasks import SMALL

    task = SMALL[arguments.task]
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    runs = [json.loads(line) for line in arguments.file.read_text().splitlines()] if arguments.file.exists() else []
    for seed in arguments.seeds:
        for setup in [each for each in SETUPS_OF_FINE_TUNING if each.name in (arguments.only or each.name)]:
            if not any(run["name"] == setup.name and run["seed"] == seed for run in runs):
                runs.append({"name": setup.name, "seed": seed, **fine_tune(setup, seed, task)})
                with arguments.file.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
                print(runs[-1], flush=True)
    print("| | held-out loss | distance walked |\n|---|---|---|")
    for setup in SETUPS_OF_FINE_TUNING:
        own = [run for run in runs if run["name"] == setup.name]
        print(
            f"| {setup.name} | {_mean_of([run['loss'] for run in own])} | {_mean_of([run['walked'] for run in own])} |"
        )


def fine_tune(setup: Setup, seed: int, task: Any) -> dict[str, Any]:
    """Train once; return the loss on held-out data before and after, and the distance between the weights."""
    torch.manual_seed(seed)
    model = task.model().train()
    # Half-precision weights can hold the start of all runs, so that distances are of training alone.
    model.to(torch.bfloat16).float()
    trained = copy.deepcopy(model).to(setup.dtype)
    pairs = list(zip(model.parameters(), trained.parameters(), strict=True))
    start = [each.detach().clone() for each in model.parameters()]
    optimizer = _optimizer(setup, trained, weight_decay=task.weight_decay)
    schedule = task.schedule(optimizer, task.steps)
    before = _measured(task, model)
    for batch in task.batches(seed, task.steps):
        task.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for computed, own in pairs:
            own.grad, computed.grad = None if computed.grad is None else computed.grad.to(setup.dtype), None
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for computed, own in pairs:
                computed.copy_(own)
    moved = [
        (after.detach() - own).double().square().sum() for after, own in zip(model.parameters(), start, strict=True)
    ]
    return {"loss": _measured(task, model), "before": before, "walked": math.sqrt(float(sum(moved)))}


def _measured(task: Any, model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        loss: float = task.measure(model, torch.device("cpu"))["loss"]
    model.train()
    return loss


def _mean_of(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation} ({', '.join(f'{each:.3f}' for each in values)})"


def _optimizer(setup: Setup, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    if setup.settings is None:
        return torch.optim.AdamW(model.parameters(), fused=True, **settings)
    return build_optimizer(model, **{**settings, **setup.settings})


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    times = commands.add_parser("time")
    times.set_defaults(run=compare_times)
    times.add_argument("--shapes", choices=LAYERS, default="smollm2-135m", help="default: smollm2-135m")
    times.add_argument("--layers", type=int, default=6, help="decoder layers (default: 6)")
    times.add_argument("--rounds", type=int, default=9, help="steps of each that count (default: 9)")
    times.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    memory = commands.add_parser("memory")
    memory.set_defaults(run=compare_memory)
    memory.add_argument("--layers", type=int, default=30, help="decoder layers (default: 30)")
    losses = commands.add_parser("fine-tuning")
    losses.set_defaults(run=compare_losses)
    losses.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    losses.add_argument("--only", nargs="+", help="names of the rows to run (default: all)")
    losses.add_argument("--task", default="fine-tuning", help="of benchmarks/convergence (default: fine-tuning)")
    losses.add_argument("--file", type=Path, default=Path("runs/half_precision.jsonl"), help="where runs are written")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
