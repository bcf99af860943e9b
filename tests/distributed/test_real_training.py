"""A Llama trained with real backward passes, on one process and on every layout, from the same weights and batches.

Here the gradients themselves differ by rounding, so momenta and selections need not be equal bit for bit: the losses
must agree, and where a selection first differs, the slices in question must be nearly as large as the threshold.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_module
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from dion2_lightning import Dion2, build_optimizer
from tests.distributed.ranks import run_on_ranks

STEPS = 12
BATCH, TOKENS, VOCABULARY = 8, 12, 64
COLUMN_WISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW_WISE = ("self_attn.o_proj", "mlp.down_proj")

Norms = dict[str, Tensor]
Selected = dict[str, list[int]]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=46,  # 23 on each of two ranks of TP, then 12 and 11 with FSDP2 over it
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            use_cache=False,
        )
    )


def optimizer_of(model: nn.Module, **settings: Any) -> Dion2:
    return build_optimizer(
        model, lr=0.02, adamw_lr=0.01, weight_decay=0.1, momentum=0.9, orthonormalize_dtype="float32", **settings
    )


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallelize_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    plan = {
        **{name: ColwiseParallel() for name in COLUMN_WISE},
        **{name: RowwiseParallel() for name in ROW_WISE},
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)


def replace_parameters(optimizer: Dion2, model: nn.Module) -> None:
    """Point an optimizer that was built before sharding to the sharded parameters, as Accelerate does."""
    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [parameters[name] for name in group["param_names"]]


def matrices_of(optimizer: Dion2) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): parameter
        for group in optimizer.param_groups
        if group["algorithm"] == "dion2"
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def train(
    model: nn.Module,
    optimizer: Dion2,
    mesh: DeviceMesh | None = None,
    before_step: Callable[[], None] | None = None,
) -> tuple[list[float], list[Selected]]:
    """Train on the same global batches; return the global loss and the selection of every step.

    Args:
        model: Sharded or not.
        optimizer: Its optimizer.
        mesh: The ranks that the global batch is split over.
        before_step: Looks at gradients and momenta.
    """
    ranks, rank = (mesh.size(), mesh.get_local_rank()) if mesh is not None else (1, 0)
    losses, selections = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        # Short cycles of tokens, so that there is something to learn.
        starts = torch.randint(0, VOCABULARY, (BATCH, 1), generator=generator)
        batch = (starts + 5 * torch.arange(TOKENS)) % VOCABULARY
        part = batch.chunk(ranks)[rank]
        optimizer.zero_grad()
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        if before_step is not None:
            before_step()
        optimizer.step()
        mean = loss.detach().clone()
        if mesh is not None:
            dist.all_reduce(mean, group=mesh.get_group())
        losses.append(mean.item() / ranks)
        selections.append(
            {
                name: optimizer.selection_of(parameter).indices.tolist()
                for name, parameter in matrices_of(optimizer).items()
            }
        )
    return losses, selections


def train_alone() -> tuple[list[float], list[Selected], list[Norms]]:
    """Train in this process; also return the norms of all slices at every step, as they were when it selected."""
    model = llama()
    optimizer = optimizer_of(model)
    norms: list[Norms] = []

    def record_norms() -> None:
        norms.append({})
        for name, parameter in matrices_of(optimizer).items():
            momentum = parameter.grad.double()
            if optimizer.state:
                momentum = momentum + optimizer.state[parameter]["momentum"]
            out_size, in_size = parameter.shape
            norms[-1][name] = momentum.abs().sum(1 if out_size <= in_size else 0)

    losses, selections = train(model, optimizer, before_step=record_norms)
    return losses, selections, norms


def check_same_training(
    layout: str,
    found: tuple[list[float], list[Selected]],
    expected: tuple[list[float], list[Selected], list[Norms]],
) -> None:
    losses, selections = found
    assert losses == pytest.approx(expected[0], rel=1e-3), layout
    for step, (selected, alone, norms) in enumerate(zip(selections, *expected[1:], strict=True)):
        differing = [name for name in alone if selected[name] != alone[name]]
        for name in differing:
            threshold = norms[name][alone[name]].min()
            for index in set(selected[name]) ^ set(alone[name]):
                distance = (norms[name][index] - threshold).abs() / threshold
                assert distance <= 1e-5, f"{layout}, step {step}, {name}: slice {index} is {distance} off the threshold"
        if differing:
            return  # after a different selection the runs may differ


def check_every_layout() -> None:
    """On four ranks; what takes two runs twice, on both pairs."""
    expected = train_alone()
    assert expected[0][-1] < 0.8 * expected[0][0]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    pair = mesh["tp"]

    def shard_over_parallel_layers(model: nn.Module) -> None:
        parallelize_layers(model, mesh["tp"])
        shard_layers(model, mesh["dp"])

    layouts: dict[str, tuple[Callable[[nn.Module], None], DeviceMesh | None]] = {
        "FSDP2": (lambda model: shard_layers(model, pair), pair),
        "HSDP": (lambda model: shard_layers(model, mesh), mesh._flatten()),
        "TP": (lambda model: parallelize_layers(model, pair), None),
        "FSDP2 x TP": (shard_over_parallel_layers, mesh["dp"]),
    }
    for layout, (shard, data_parallel) in layouts.items():
        model = llama()
        optimizer = optimizer_of(model, share_replicas=True)
        shard(model)
        replace_parameters(optimizer, model)
        check_same_training(f"{layout}, built before", train(model, optimizer, data_parallel), expected)

        model = llama()
        shard(model)
        optimizer = optimizer_of(model, share_replicas=True)
        check_same_training(f"{layout}, built after", train(model, optimizer, data_parallel), expected)
        assert all(isinstance(parameter, DTensor) for parameter in matrices_of(optimizer).values())

    for layout, ranks in {"DDP on 2": pair, "DDP on 4": mesh._flatten()}.items():
        replicas = DistributedDataParallel(llama(), process_group=ranks.get_group())
        optimizer = optimizer_of(replicas, strategy=ranks.get_group(), share_replicas=True)
        check_same_training(layout, train(replicas, optimizer, ranks), expected)


def test_every_layout() -> None:
    run_on_ranks(4, check_every_layout)


class Wide(nn.Module):
    """Norm, TP pair under sequence parallelism, and a matrix that every rank holds whole but feeds its own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.last = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.down(nn.functional.gelu(self.up(self.norm(x)))))


def check_sequence_parallel() -> None:
    """Gradients of replicated parameters are partial sums there; they must be added up over the ranks."""
    # Before 2.13 torch flattens what a linear layer reads, and cannot where ranks hold parts of the sequence.
    rows = (3, 10) if Version(torch.__version__) >= Version("2.13") else (30,)
    dim = len(rows) - 1
    torch.manual_seed(0)
    alone = Wide()
    parallel = copy.deepcopy(alone)
    mesh = init_device_mesh("cpu", (2,))
    plan = {
        "norm": SequenceParallel(sequence_dim=dim),
        "up": ColwiseParallel(input_layouts=Shard(dim)),
        "down": RowwiseParallel(output_layouts=Shard(dim), use_local_output=False),
    }
    parallelize_module(parallel, mesh, plan)
    distribute_module(parallel.last, mesh)
    optimizers = [
        build_optimizer(model, lr=0.02, orthonormalize_dtype="float32", overrides={"last.weight": "dion2"})
        for model in (alone, parallel)
    ]
    for step in range(6):
        inputs = torch.randn(*rows, 8, generator=torch.Generator().manual_seed(step))
        alone(inputs).square().mean().backward()
        outputs = parallel(inputs.chunk(2, dim)[mesh.get_local_rank()])
        outputs.square().mean().backward()
        if step == 0:
            placements = {parallel.norm.weight.grad.placements, parallel.last.weight.grad.placements}
            assert placements == {(Partial(),)}
        with CommDebugMode() as collectives:
            optimizers[1].step()
        if step:
            # The summands of the norm's weight and bias and of the last layer's weight; the slice norms of what is in
            # parts and of the last layer, which is replicated; submatrices both ways.
            assert collectives.get_total_counts() == 1 + 2 + 2
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    for (name, expected), found in zip(alone.named_parameters(), parallel.parameters(), strict=True):
        torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-4, atol=1e-5, msg=f"{name} differs")


def test_gradients_that_are_partial_sums() -> None:
    run_on_ranks(2, check_sequence_parallel)
