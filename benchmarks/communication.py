"""Bytes and collectives of an optimizer step, counted on real processes: Dion2, Dion3 and Dion at several fractions.

    python -m benchmarks.communication --ranks 2 4 --layouts fsdp2 hsdp tp ddp
    python -m benchmarks.communication --ranks 4 --layouts ddp hsdp --layers 2 --sync --fractions 0.5 0.25 0.125

Every rank is a process, connected to the others by gloo, and counts the collectives that reach the communication
library, whoever calls them, and the bytes that it sends to *other* ranks:

- all-to-all: what it sends, without the part that stays on the rank;
- all-gather: its own part once for every other rank, padding included;
- reduce-scatter: the parts of all other ranks;
- all-reduce: the buffer, once. A ring sends almost twice as much, a tree less; none sends more on more ranks.

Gradients are random and no submatrix is orthonormalized, for what is sent depends on neither result.

With ``--sync`` what Dion's replicas send each other is counted instead: in a backward pass of DistributedDataParallel
or of FSDP2, and in the step after it, with full synchronisation, which averages gradients, and with a compressed one.
"""

import argparse
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scale import compressed_bytes
from benchmarks.step import LAYERS
from dion2_lightning import Dion2, build_optimizer
from dion2_lightning.algorithms.hyperparameters import DType

SHAPES = LAYERS["smollm2-135m"]
PLACEMENTS: dict[str, list[list[Any]] | None] = {
    # For each matrix of a layer: query, key, value, output; gate, up, down.
    "fsdp2": [[Shard(0)]] * 7,
    "hsdp": [[Replicate(), Shard(0)]] * 7,
    "row-wise": [[Shard(1)]] * 7,
    "tp": [[Shard(0)]] * 3 + [[Shard(1)]] + [[Shard(0)]] * 2 + [[Shard(1)]],
    "ddp": None,
}
FRACTIONS = {"dion2": "fraction", "dion3": "fraction", "dion": "rank_fraction"}
"""What the fraction is called, by algorithm."""
KINDS = {
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
Sync = Literal["full", "compressed"]
SYNCS: tuple[Sync, Sync] = ("full", "compressed")
REPLICAS = ("ddp", "hsdp")
"""Layouts with replicas of a whole model."""
MEGABYTE = 1e6


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        layout: A key of ``PLACEMENTS``.
        layers: Decoder layers.
        fraction: Of the slices to select; Dion's rank, as a share of the shorter axis.
        algorithm: A key of ``FRACTIONS``.
        dtype: In which submatrices are orthonormalized, and travel.
        steps: How many are counted, after a first one; the selection of each is another.
        sync: Dion's, where the backward pass is counted too; None: the step alone.
    """

    layout: str
    layers: int
    fraction: float
    algorithm: str = "dion2"
    dtype: DType = "float32"
    steps: int = 3
    sync: Sync | None = None


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in all steps of a case.

    Attributes:
        calls: Collectives by kind.
        sent: Bytes to other ranks by kind.
        between_replicas: Bytes to ranks that hold the same, by kind; of what ``sent`` has.
    """

    calls: Counter[str]
    sent: Counter[str]
    between_replicas: Counter[str]

    @property
    def sums(self) -> int:
        """Of norms, and of squares by neuron; all that Dion sends."""
        return self.sent["all-reduce"]

    @property
    def submatrices(self) -> int:
        return self.sent["all-to-all"] + self.sent["all-gather"]

    @property
    def to_replicas(self) -> int:
        return sum(self.between_replicas.values())


class CollectiveCounter(TorchDispatchMode):
    """Counts the traffic of this rank in a ``with`` block. A collective that it does not know is an error."""

    def __init__(self, replicas: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.replicas = replicas
        self.traffic = Traffic(Counter(), Counter(), Counter())

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "c10d":
            kind = KINDS[function.overloadpacket.__name__]
            group = dist.ProcessGroup.unbox(arguments[1 if kind == "all-reduce" else 2])
            sent = sent_to_others(kind, group, arguments)
            self.traffic.calls[kind] += 1
            self.traffic.sent[kind] += sent
            if self.replicas is not None and group.group_name == self.replicas.group_name:
                self.traffic.between_replicas[kind] += sent
        return function(*arguments, **(options or {}))


def sent_to_others(kind: str, group: dist.ProcessGroup, arguments: Sequence[Any]) -> int:
    """Return the bytes that this rank sends in one collective, from the arguments of its c10d operator."""
    first, second = arguments[:2]
    if kind == "all-reduce":
        return sum(tensor.nbytes for tensor in first)
    if kind == "all-gather":
        return second.nbytes * (group.size() - 1)
    if kind == "reduce-scatter":
        return first.nbytes * (group.size() - 1)
    sizes = list(arguments[4])
    del sizes[group.rank()]
    return sum(sizes) * second.itemsize


def measure(ranks: int, cases: Sequence[Case], start_method: str = "spawn") -> list[list[Traffic]]:
    """Return the traffic of every rank for every case, all cases in one set of processes."""
    results = get_context(start_method).SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, f"file://{Path(folder) / 'store'}", cases, results)
        start_processes(_rank, given, nprocs=ranks, start_method=start_method)
    return [results.get() for _ in cases]


def _rank(rank: int, ranks: int, store: str, cases: Sequence[Case], results: Any) -> None:
    torch.set_num_threads(1)
    logging.getLogger("dion2_lightning").setLevel(logging.WARNING)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    for case in cases:
        by_rank: list[Any] = [None] * ranks
        count = traffic_of if case.sync is None else synchronised_traffic_of
        dist.all_gather_object(by_rank, count(case, mesh_of(case, ranks)))
        if rank == 0:
            results.put(by_rank)
    dist.destroy_process_group()


def mesh_of(case: Case, ranks: int) -> DeviceMesh:
    """Return a mesh of all ranks; two replicas of half of them under HSDP."""
    if case.layout == "hsdp":
        return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicas", "shards"))
    return init_device_mesh("cpu", (ranks,))


def traffic_of(case: Case, mesh: DeviceMesh) -> Traffic:
    """Count what this rank sends in steps of Dion2, Dion3 or Dion."""
    placements = PLACEMENTS[case.layout]
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(placed) for placed in random_tensors(case, mesh, generator)]
    optimizer = Dion2(
        [{"params": parameters, "algorithm": case.algorithm, FRACTIONS[case.algorithm]: case.fraction}],
        orthonormalize=lambda submatrices: submatrices,
        orthonormalize_dtype=case.dtype,
        process_group=mesh.get_group() if placements is None else None,
        share_replicas=True,
    )
    count = CollectiveCounter()
    for step in range(case.steps + 1):
        for parameter, gradient in zip(parameters, random_tensors(case, mesh, generator), strict=True):
            parameter.grad = gradient
        with count if step else nullcontext():  # the first also compares the ranks' settings
            optimizer.step()
    return count.traffic


class Matrices(nn.Module):
    """The matrices of a case; the gradient of each is what ``forward`` gets for it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in SHAPES * layers)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        pairs = zip(self.parameters(), gradients, strict=True)
        return torch.stack([(parameter * gradient).sum() for parameter, gradient in pairs]).sum()


def synchronised_traffic_of(case: Case, mesh: DeviceMesh) -> Traffic:
    """Count what this rank sends in backward passes and steps of Dion, whose gradients differ between replicas."""
    group = mesh.get_group("replicas" if case.layout == "hsdp" else None)
    torch.manual_seed(0)  # FSDP2 does not give replicas the same weights
    model: nn.Module = Matrices(case.layers)
    if case.layout == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=mesh if case.sync == "full" else mesh["shards"])
    optimizer = build_optimizer(
        model,
        algorithm="dion",
        rank_fraction=case.fraction,
        sync=case.sync or "full",
        strategy=group if case.layout == "ddp" or case.sync == "compressed" else None,
    )
    generator = torch.Generator().manual_seed(dist.get_rank())
    count = CollectiveCounter(group)
    for step in range(case.steps + 1):
        gradients = [torch.randn(shape, generator=generator) for shape in SHAPES * case.layers]
        loss = model(gradients)
        with count if step else nullcontext():  # the first also compares the ranks' settings
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return count.traffic


def random_tensors(case: Case, mesh: DeviceMesh, generator: torch.Generator) -> list[Tensor]:
    """Return a random tensor for every matrix of the model, placed as the case says."""
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES * case.layers]
    placements = PLACEMENTS[case.layout]
    if placements is None:
        return tensors
    pairs = zip(tensors, placements * case.layers, strict=True)
    return [distribute_tensor(tensor, mesh, placed, src_data_rank=None) for tensor, placed in pairs]


def main() -> None:
    """Run the cases that the command line asks for and print a table for each layout and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default: 2 4")
    parser.add_argument("--layouts", choices=PLACEMENTS, nargs="+", default=["fsdp2"], help="default: fsdp2")
    parser.add_argument("--layers", type=int, default=6, help="decoder layers; SmolLM2-135M has 30 (default: 6)")
    parser.add_argument("--algorithms", choices=FRACTIONS, nargs="+", default=["dion2"], help="default: dion2")
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.125])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    parser.add_argument("--steps", type=int, default=3, help="steps to average over (default: 3)")
    parser.add_argument("--sync", action="store_true", help="what Dion's replicas send each other: full and compressed")
    arguments = parser.parse_args()
    if arguments.sync and not set(arguments.layouts) <= set(REPLICAS):
        parser.error(f"--sync needs layouts with replicas: {' '.join(REPLICAS)}")

    base = Case("", arguments.layers, 1.0, dtype=arguments.dtype, steps=arguments.steps)
    for ranks in arguments.ranks:
        if arguments.sync:
            compare_synchronisation(ranks, arguments.layouts, arguments.fractions, base)
            continue
        cases = [
            replace(base, layout=layout, algorithm=algorithm, fraction=fraction)
            for layout in arguments.layouts
            for algorithm in arguments.algorithms
            for fraction in arguments.fractions
        ]
        measured = dict(zip(cases, measure(ranks, cases), strict=True))
        for layout in arguments.layouts:
            report(ranks, {case: by_rank for case, by_rank in measured.items() if case.layout == layout})


def report(ranks: int, measured: dict[Case, list[Traffic]]) -> None:
    """Print a table of one layout's cases; the first is what the others are measured against."""
    first = next(iter(measured))
    count = sum(rows * columns for rows, columns in SHAPES) * first.layers
    print(f"\n{first.layout} on {ranks} ranks, {first.layers} layers, {count / 1e6:.1f}M parameters, {first.dtype}")
    print("A step, in MB:             submatrices                                     sums")
    print(
        f"fraction       {'all ranks':>12}{'largest rank':>14}{'ratio':>9}{'ratio / f':>11}{'a rank':>9}  collectives"
    )
    whole = sum(traffic.submatrices for traffic in measured[first])
    for case, by_rank in measured.items():
        submatrices = [traffic.submatrices for traffic in by_rank]
        sums = max(traffic.sums for traffic in by_rank) / case.steps / MEGABYTE
        total, largest = (number / case.steps / MEGABYTE for number in (sum(submatrices), max(submatrices)))
        ratio = sum(submatrices) / whole
        relative = ratio * first.fraction / case.fraction
        calls = ", ".join(f"{calls / case.steps:g} {kind}" for kind, calls in by_rank[0].calls.items())
        name = f"{case.algorithm} {case.fraction:g}"
        print(f"{name:15}{total:12.3f}{largest:14.3f}{ratio:9.4f}{relative:11.4f}{sums:9.3f}  {calls}")


def compare_synchronisation(ranks: int, layouts: Sequence[str], fractions: Sequence[float], base: Case) -> None:
    """Print for each layout what Dion's replicas send each other, with full and with compressed synchronisation."""
    cases = [
        replace(base, layout=layout, algorithm="dion", fraction=fraction, sync=sync)
        for layout in layouts
        for fraction in fractions
        for sync in SYNCS
    ]
    sent = {
        case: sum(traffic.to_replicas for traffic in by_rank) / case.steps
        for case, by_rank in zip(cases, measure(ranks, cases), strict=True)
    }
    count = sum(map(math.prod, SHAPES)) * base.layers
    for layout in layouts:
        replicas = 2 if layout == "hsdp" else ranks
        print(
            f"\n{layout}, {replicas} x {ranks // replicas} ranks, {base.layers} layers, {count / 1e6:.1f}M parameters"
        )
        print("Sent to other replicas in a backward pass and a step, full and compressed:")
        print(f"{'rank':12}{'MB a rank':>12}{'':10}{'bytes a parameter':>22}{'':10}{'ratio':>9}{'computed':>10}")
        for full, compressed in zip(cases[::2], cases[1::2], strict=True):
            if full.layout == layout:
                by_rank = [sent[case] / ranks / MEGABYTE for case in (full, compressed)]
                by_parameter = [sent[case] / replicas / count for case in (full, compressed)]
                ratio = sum(compressed_bytes(SHAPES, full.fraction, 4)) / (4 * count / base.layers)
                print(
                    f"{full.fraction:<12g}{by_rank[0]:12.3f}{by_rank[1]:10.3f}{by_parameter[0]:22.4f}"
                    f"{by_parameter[1]:10.4f}{sent[compressed] / sent[full]:9.4f}{ratio:10.4f}"
                )


if __name__ == "__main__":
    main()
