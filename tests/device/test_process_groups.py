"""Process groups on the device: one rank by NCCL, and two by gloo that share a GPU, which NCCL refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dion2_lightning import Dion2, SelectionTracker, build_optimizer, clip_grad_norm_
from dion2_lightning.distributed.owner_exchange import all_gather
from dion2_lightning.distributed.summing import add_up
from dion2_lightning.distributed.torch_versions import all_gather_single
from dion2_lightning.matrices.layout import Layout, Rectangle
from tests.device.host_sync import no_host_sync
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import CASES, errors_name_case, sharded, train_and_compare, whole_parameters
from tests.distributed.test_real_training import matrices_of, shard_layers
from tests.every_kind import fill, groups_of_every_kind, parameters_of
from tests.integrations.huggingface import assert_same, whole
from tests.integrations.training import BATCH, SETTINGS, Sequences, make_model

STEPS = 4
MAX_NORM = 0.1
SECONDS = {"cpu": 90, "cuda": 60}


def run(ranks: int, function: Any, device: str, *arguments: Any, backend: str | None = None) -> None:
    chosen = backend or {"cpu": "gloo", "cuda": "nccl"}[device]
    run_on_ranks(ranks, function, device, *arguments, seconds=SECONDS[device], backend=chosen, device=device)


# One rank


def check_fully_sharded(device: str) -> None:
    """FSDP2 beside a plain model: gradients are nearly the same; from equal gradients, steps are equal bit for bit."""
    mesh = init_device_mesh(device, (1,))
    models = [make_model(hidden_size=128, intermediate_size=256).to(device) for _ in range(2)]
    plain, sharded_model = models
    shard_layers(sharded_model, mesh)
    chosen = {**SETTINGS, "orthonormalize_dtype": None}
    optimizers = [build_optimizer(model, **chosen) for model in models]
    tracker = SelectionTracker(every=1, orthogonality=True)
    tracker.attach(optimizers[1])
    for step, batch in enumerate(Sequences(STEPS).pieces.to(device).split(BATCH)):
        for model in models:
            model(input_ids=batch, labels=batch).loss.backward()
        expected = nn.utils.get_total_norm([parameter.grad for parameter in plain.parameters()])
        assert expected > MAX_NORM
        norms = [clip_grad_norm_(model.parameters(), MAX_NORM) for model in models]
        torch.testing.assert_close(norms, [expected, expected], rtol=1e-4, atol=0)
        for (name, one), other in zip(plain.named_parameters(), sharded_model.parameters(), strict=True):
            assert isinstance(other, DTensor)
            found = other.grad.full_tensor()
            torch.testing.assert_close(found, one.grad, rtol=1e-3, atol=1e-5, msg=f"{name}, step {step}")
            one.grad.copy_(found)
        for optimizer in optimizers:
            with no_host_sync(device if step else "cpu"):
                optimizer.step()
            optimizer.zero_grad()
        assert tracker.pop_metrics() is not None
        assert_same(whole(sharded_model, optimizers[1]), whole(plain, optimizers[0]))
        assert_same(selected_indices(optimizers[1]), selected_indices(optimizers[0]))


def selected_indices(optimizer: Dion2) -> dict[str, Tensor]:
    return {name: optimizer.selection_of(matrix).indices for name, matrix in matrices_of(optimizer).items()}


def check_process_group_of_one(device: str) -> None:
    """A process group of one rank changes nothing."""
    results = []
    for process_group in (None, dist.group.WORLD):
        optimizer = Dion2(groups_of_every_kind(device), lr=0.1, process_group=process_group, share_replicas=True)
        fill(optimizer, weights=100)
        for step in range(STEPS):
            fill(optimizer, gradients=step)
            with no_host_sync(device if step else "cpu"):
                optimizer.step()
        results.append(list(parameters_of(optimizer)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@contextmanager
def one_rank_shares() -> Iterator[None]:
    """Let the only rank of a process group take the path of several: it owns, and sends to itself, all parts."""
    from dion2_lightning.matrices import parts

    read = parts.layout_of

    def layout_of(parameter: Tensor, label: str, *, process_group: Any, is_kernel: bool, **settings: Any) -> Layout:
        if process_group is None:
            return read(parameter, label, process_group=None, is_kernel=is_kernel, **settings)
        rows, columns = (len(parameter), parameter[0].numel()) if is_kernel else parameter.shape[-2:]
        return Layout(process_group, (Rectangle((0, rows), (0, columns)),))

    with mock.patch.object(parts, "layout_of", layout_of):
        yield


def check_collectives_of_one(device: str) -> None:
    """The all-reduce, both all-to-alls and the all-gather of a step, by the real backend."""
    with one_rank_shares():
        train_and_compare(whole_parameters(device), steps=STEPS, process_group=dist.group.WORLD)
        optimizer = Dion2(groups_of_every_kind(device), lr=0.1, process_group=dist.group.WORLD)
        for step in range(STEPS):
            fill(optimizer, gradients=step)
            with no_host_sync(device if step else "cpu"):
                optimizer.step()

    results = [torch.randn(shape, device=device).bfloat16() for shape in ((3, 5), (1, 7))]
    with no_host_sync(device):
        gathered = all_gather(results, dist.group.WORLD, [0, 0], [(3, 5), (1, 7)], results[0].new_empty(0))()
    for found, expected in zip(gathered, results, strict=True):
        assert torch.equal(found, expected)

    numbers = torch.randn(5, device=device)
    found = numbers.clone()
    for _ in add_up(found, dist.group.WORLD, dist.group.WORLD):
        pass
    assert torch.equal(found, numbers)


def check_one_rank(device: str) -> None:
    """All checks in one process: starting one on a GPU takes longer than they do."""
    for check in (check_fully_sharded, check_process_group_of_one, check_collectives_of_one):
        with errors_name_case(check.__name__):
            check(device)


def test_one_rank(device: str) -> None:
    run(1, check_one_rank, device)


# Two ranks on one device


def probe(device: str) -> None:
    """Call every collective that a step needs; what the backend lacks is an error."""
    numbers = torch.ones(4, dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    received, gathered = torch.empty_like(numbers), numbers.new_empty(8)
    dist.all_to_all_single(received, numbers, [2, 2], [2, 2])
    all_gather_single(gathered, numbers)
    assert gathered.tolist() == [2.0] * 8


def check_compressed(device: str) -> None:
    """DDP whose hook leaves Dion's matrices out: the same weights on both ranks, those of full synchronisation."""
    group, rank = dist.group.WORLD, dist.get_rank()
    models = [DistributedDataParallel(make_model().to(device)) for _ in range(2)]
    chosen = {**{name: SETTINGS[name] for name in ("lr", "adamw_lr", "weight_decay")}, "algorithm": "dion"}
    optimizers = [
        build_optimizer(model, **chosen, sync=sync, strategy=group)
        for model, sync in zip(models, ("compressed", "full"), strict=True)
    ]
    batches = Sequences(2 * STEPS).pieces.to(device).split(BATCH)
    for step in range(STEPS):
        batch = batches[2 * step + rank]
        for model, optimizer in zip(models, optimizers, strict=True):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for parameter, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        weight = parameter.detach().flatten()
        of_both = weight.new_empty(2 * weight.numel())
        all_gather_single(of_both, weight)
        assert torch.equal(*of_both.chunk(2))
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)


def check_two_ranks(device: str, refusal: Path) -> None:
    try:
        probe(device)
    except RuntimeError as error:
        if device == "cpu":  # gloo is made for it
            raise
        refusal.write_text(f"gloo takes no tensors of this device: {error}".splitlines()[0])
        return
    for name in ("FSDP2 on 2, stacks by rows", "TP on 2, row-wise"):
        with errors_name_case(name):
            train_and_compare(sharded(CASES[name], device), steps=STEPS)
    with errors_name_case("replicas"):
        train_and_compare(whole_parameters(device), steps=STEPS, process_group=dist.group.WORLD, share_replicas=True)
    with errors_name_case("compressed synchronisation"):
        check_compressed(device)


def test_two_ranks_on_one_device(device: str, tmp_path: Path) -> None:
    refusal = tmp_path / "refusal"
    run(2, check_two_ranks, device, refusal, backend="gloo")
    if refusal.exists():
        pytest.skip(refusal.read_text())
