"""Fused weights: what it costs to update their blocks one by one, and whether training goes as without fusing.

    python -m benchmarks.fused cost
    python -m benchmarks.fused cost --ranks 2 --only "9 heads"    # a border between ranks cuts a head
    python -m benchmarks.fused losses        # some minutes on one core

`cost`: a step of weights that hold several matrices, against the same matrices as parameters of their own, in turn in
one process. The ratio is the median over pairs of steps. Quote the ratios. On several ranks, processes connected by
gloo, every weight is sharded along its first axis, and the first rank is timed. On a CPU the time is that of the
processor, which other processes disturb less, and in which no rank waits.

`losses`: SmolLM2-135M, and the same model with q, k and v in one weight and gate and up in another, as Phi-3 has them,
trained on the same batches of text. Exits with 1 if two losses are more than 0.001 apart.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

from benchmarks.statistics import keep_memory
from benchmarks.step import timed
from dion2_lightning import Dion2, build_optimizer
from dion2_lightning.matrices.views import read_matrices
from recipes.offline_data import read_prose
from recipes.offline_models import SMOLLM2, model_folder

# Cost

Weight = tuple[tuple[int, ...], dict[str, Any]]
"""The shape of a weight, and how its matrices are stored in it; ``dtype`` is the weight's, float32 by default."""

IN_OUT: Final = {"batched": True, "transposed": True}
LAYERS: Final[dict[str, list[Weight]]] = {
    "SmolLM2-135M: q|k|v": [((960, 576), {"splits": "q 576 | k 192 | v 192"})],
    "SmolLM2-135M: gate|up": [((3072, 576), {"splits": "gate 1536 | up 1536"})],
    "SmolLM2-135M: a layer": [
        ((960, 576), {"splits": "q 576 | k 192 | v 192"}),
        ((576, 576), {}),
        ((3072, 576), {"splits": "gate 1536 | up 1536"}),
        ((576, 1536), {}),
    ],
    "SmolLM2-135M: q|k|v by head": [((960, 576), {"splits": "q 9*64 | k 3*64 | v 3*64"})],
    "SmolLM2-135M: o by head": [((576, 576), {"splits": "head 9*64 along inputs"})],
    "Pythia-160M: q|k|v, interleaved": [((2304, 768), {"splits": "12 x (q 64 | k 64 | v 64)"})],
    "Pythia-160M: by head": [((2304, 768), {"splits": "12 x (q 1*64 | k 1*64 | v 1*64)"})],
    "Pythia-160M: q|k|v, interleaved, bfloat16": [
        ((2304, 768), {"dtype": "bfloat16", "splits": "12 x (q 64 | k 64 | v 64)"})
    ],
    "Pythia-160M: q|k|v, interleaved, stored (in, out)": [
        ((768, 2304), {"transposed": True, "splits": "12 x (q 64 | k 64 | v 64)"})
    ],
    "Pythia-160M: q|k|v, interleaved, stored (in, out), bfloat16": [
        ((768, 2304), {"dtype": "bfloat16", "transposed": True, "splits": "12 x (q 64 | k 64 | v 64)"})
    ],
    "Pythia-160M, 9 heads: q|k|v, interleaved": [((1728, 576), {"splits": "9 x (q 64 | k 64 | v 64)"})],
    "DeepSeek-V2-Lite, half as wide: k|v of each head": [((2048, 256), {"splits": "8 x (k 128 | v 128)"})],
    "Pythia-160M: a layer": [
        ((2304, 768), {"splits": "12 x (q 64 | k 64 | v 64)"}),
        ((768, 768), {}),
        ((3072, 768), {}),
        ((768, 3072), {}),
    ],
    "GPT-OSS, half as wide, 2 experts: gate|up": [((2, 1440, 2880), {**IN_OUT, "splits": "1440 x (gate 1 | up 1)"})],
    "GPT-OSS, half as wide, 2 experts: a layer": [
        ((2, 1440, 2880), {**IN_OUT, "splits": "1440 x (gate 1 | up 1)"}),
        ((2, 1440, 1440), IN_OUT),
    ],
    "GPT-OSS, a fifth as wide, 8 experts: gate|up": [((8, 576, 1152), {**IN_OUT, "splits": "576 x (gate 1 | up 1)"})],
    "GPT-OSS, half as wide, 2 experts of twice the outputs: gate|up": [
        ((2, 1440, 5760), {**IN_OUT, "splits": "2880 x (gate 1 | up 1)"})
    ],
    "Zamba, half as wide: x|gate, every second row": [((7424, 1856), {"splits": "3712 x (x 1 | gate 1)"})],
    "4 experts of 512 x 2048: gate|up, every second column": [
        ((4, 512, 2048), {**IN_OUT, "splits": "1024 x (gate 1 | up 1)"})
    ],
    "512 x 2048: gate|up, every second column": [
        ((512, 2048), {"transposed": True, "splits": "1024 x (gate 1 | up 1)"})
    ],
    "512 x 2048: gate|up, every second column, bfloat16": [
        ((512, 2048), {"dtype": "bfloat16", "transposed": True, "splits": "1024 x (gate 1 | up 1)"})
    ],
    "2048 x 512: gate|up, every second row": [((2048, 512), {"splits": "1024 x (gate 1 | up 1)"})],
    "512 x 2304: q|k|v, interleaved columns": [
        ((512, 2304), {"transposed": True, "splits": "12 x (q 64 | k 64 | v 64)"})
    ],
}
"""By model and layer; where no model is named, slices run across columns or rows that are apart."""

SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "Dion2 at 1/4": {"fraction": 0.25},
    "Muon": {"fraction": 1.0},
    "Dion at 1/4": {"algorithm": "dion", "rank_fraction": 0.25},
}


def compare_times(arguments: argparse.Namespace) -> None:
    """Print a table of the ratios."""
    threads = torch.get_num_threads() if arguments.ranks == 1 else 1
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.device}, {threads} threads")
    print(f"{arguments.ranks} ranks, {arguments.layers} layers, medians of {arguments.rounds} pairs of steps")
    print(f"{'':80}{'separate, ms':>13}{'fused, ms':>11}{'ratio':>8}", flush=True)
    if arguments.ranks == 1:
        _print_times(arguments, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (f"file://{Path(folder) / 'store'}", arguments), nprocs=arguments.ranks)


def _rank(rank: int, store: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=arguments.ranks)
    try:
        _print_times(arguments, init_device_mesh(arguments.device.type, (arguments.ranks,)))
    finally:
        dist.destroy_process_group()


def _print_times(arguments: argparse.Namespace, mesh: DeviceMesh | None) -> None:
    """Take the steps; the first rank prints a row for each weight and algorithm."""
    keep_memory()
    for name, layer in LAYERS.items():
        for algorithm, settings in SETTINGS.items():
            label = f"{name}, {algorithm}"
            if all(each in label for each in arguments.only):
                separate, fused, ratio = _times(layer * arguments.layers, settings, arguments, mesh)
                if mesh is None or mesh.get_rank() == 0:
                    print(f"{label:80}{separate:13.1f}{fused:11.1f}{ratio:8.2f}", flush=True)


def _times(
    layers: list[Weight], settings: dict[str, Any], arguments: argparse.Namespace, mesh: DeviceMesh | None
) -> tuple[float, float, float]:
    """Return the median milliseconds of a step of separate and of fused weights, and the median ratio of a pair."""
    separate = [block for weight in layers for block in _apart(*weight)]
    optimizers = [_optimizer_of(weights, settings, arguments.device, mesh) for weights in (separate, layers)]
    times: list[list[float]] = [[], []]
    for number in range(arguments.rounds + 1):
        for each in (0, 1) if number % 2 else (1, 0):
            if mesh is not None:
                dist.barrier()
            elapsed = _timed(optimizers[each].step, arguments.device)
            if number > 0:  # the first creates state
                times[each].append(elapsed)
    ratio = statistics.median(fused / apart for apart, fused in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def _timed(step: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one step; on a CPU those of its processor."""
    if device.type != "cpu":
        return timed(step, device)
    begin = time.process_time()
    step()
    return (time.process_time() - begin) * 1e3


def _apart(shape: tuple[int, ...], storage: dict[str, Any]) -> Iterator[Weight]:
    """Yield the blocks of a weight as weights of their own; one with several matrices is a stack of them."""
    stored = dict(storage)
    own = {"dtype": stored.pop("dtype")} if "dtype" in stored else {}
    for block in read_matrices(shape, **stored):
        size = block.shape[::-1] if block.transposed else block.shape
        is_stack = block.count > 1 or block.is_stack
        own |= {"batched": is_stack, "transposed": block.transposed}
        yield (block.count, *size) if is_stack else size, dict(own)


def _optimizer_of(
    weights: list[Weight], settings: dict[str, Any], device: torch.device, mesh: DeviceMesh | None
) -> Dion2:
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=device).to(dtype)
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    groups = []
    for shape, storage in weights:
        stored = dict(storage)
        dtype = getattr(torch, stored.pop("dtype", "float32"))
        parameter = nn.Parameter(random(shape, dtype))
        parameter.grad = random(shape, dtype)
        groups.append({"params": [parameter], **stored, **settings})
    return Dion2(groups)


# Losses

TOLERANCE: Final = 1e-3
"""How far apart two losses may be."""

FUSED: Final = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

SAME: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""What the configurations of both models say alike."""

TRAINED: Final[dict[str, dict[str, Any]]] = {
    "Dion2 at 1/4": {"algorithm": "dion2", "fraction": 0.25},
    "Dion3 at 1/4": {"algorithm": "dion3", "fraction": 0.25},
}


def compare_losses(arguments: argparse.Namespace) -> bool:
    """Print the losses of both models; return whether they agree."""
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    print(f"{arguments.steps} steps of {arguments.rows} x {arguments.length} tokens")
    batches = _batches(arguments)
    farthest = 0.0
    for name, settings in TRAINED.items():
        if arguments.only not in name:
            continue
        losses = [_losses(build(), batches, settings) for build in (_separate, _fused)]
        print(f"{name:24}{'separate':>12}{'fused':>12}{'difference':>14}")
        for step, (separate, fused) in enumerate(zip(*losses, strict=True), 1):
            print(f"{step:24}{separate:12.6f}{fused:12.6f}{abs(separate - fused):14.2e}")
        largest = max(abs(separate - fused) for separate, fused in zip(*losses, strict=True))
        print(f"{'largest':48}{largest:14.2e}", flush=True)
        farthest = max(farthest, largest)
    return farthest <= TOLERANCE


def _batches(arguments: argparse.Namespace) -> list[Tensor]:
    """Return a batch of tokens (rows, length) for each step: documents, each closed with the end token, in a row."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(SMOLLM2))
    documents = tokenizer(read_prose(), add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for each in documents for token in [*each, tokenizer.eos_token_id]])
    windows = stream[: len(stream) // arguments.length * arguments.length].view(-1, arguments.length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    return list(windows[order[: arguments.steps * arguments.rows]].split(arguments.rows))


def _separate() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_folder(SMOLLM2))


def _fused() -> nn.Module:
    """Return the same model with fused weights."""
    separate = _separate()
    config = separate.config
    fused = Phi3ForCausalLM(Phi3Config(**{name: getattr(config, name) for name in SAME}))
    weights = separate.state_dict()
    for name in fused.state_dict():
        for whole, parts in FUSED.items():
            if f".{whole}." in name:
                weights[name] = torch.cat([weights.pop(name.replace(whole, part)) for part in parts])
    fused.load_state_dict(weights)
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(fused(tokens).logits, separate(tokens).logits, rtol=1e-5, atol=1e-5)
    return fused


def _losses(model: nn.Module, batches: list[Tensor], settings: dict[str, Any]) -> list[float]:
    """Train a model and return the loss of each batch."""
    optimizer = build_optimizer(model, lr=3e-4, adamw_lr=1e-4, weight_decay=0.1, **settings)
    model.train()
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = parser.add_subparsers(dest="section", required=True)
    cost = sections.add_parser("cost", help="time of a step")
    cost.add_argument("--layers", type=int, default=6, help="of each kind (default: 6)")
    cost.add_argument("--rounds", type=int, default=15, help="pairs of steps that count (default: 15)")
    cost.add_argument("--ranks", type=int, default=1, help="that share each weight (default: 1)")
    cost.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    cost.add_argument("--only", default=[], nargs="+", help="only what has all of these in its name")
    losses = sections.add_parser("losses", help="losses with and without fusing")
    losses.add_argument("--steps", type=int, default=24, help="default: 24")
    losses.add_argument("--rows", type=int, default=2, help="of a batch (default: 2)")
    losses.add_argument("--length", type=int, default=128, help="tokens of a row (default: 128)")
    losses.add_argument("--only", default="", help="only what has this in its name")
    arguments = parser.parse_args()
    if arguments.section == "losses":
        return 0 if compare_losses(arguments) else 1
    compare_times(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
