"""Compressed synchronisation: replicas with gradients of their own, against a float64 reference of their momenta."""

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dion2_lightning import Dion2, SelectionTracker, build_optimizer, clip_grad_norm_
from dion2_lightning.distributed import summing
from dion2_lightning.matrices.layout import local
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import errors_name_case, part_of, place
from tests.reference import DionReference

STEPS = 20
LR = 0.02
MATRICES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "tall": ((53, 37), {}),
    "wide": ((24, 96), {}),
    "square": ((16, 16), {}),
    "stored (in, out)": ((20, 60), {"transposed": True}),
    "experts": ((3, 12, 20), {"batched": True}),
    "heads": ((36, 20), {"splits": "head 3*12"}),
    "of too high a rank": ((16, 16), {"rank_fraction": 0.75}),
}
STACKS = {"heads": (3, 12, 20)}
"""The matrices of a weight in two dimensions that holds several."""
REST = {"embedding": (29, 6)}
MEAN = ("of too high a rank", "embedding")
"""What is averaged as a gradient: what P and R have more numbers than, and what is no matrix."""

Parameters = dict[str, nn.Parameter]


def whole(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {**{name: shape for name, (shape, _) in MATRICES.items()}, **REST}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plain() -> Parameters:
    return {name: nn.Parameter(0.1 * values) for name, values in whole(0).items()}


def sharded(mesh: DeviceMesh, dim: int) -> Parameters:
    """Rows or columns of matrices, and rows of the rest."""
    return {
        name: nn.Parameter(place(0.1 * values, mesh, (Shard(0 if name in REST else values.ndim - 2 + dim),)))
        for name, values in whole(0).items()
    }


def optimizer_of(parameters: Parameters, group: Any, **settings: Any) -> Dion2:
    matrices = [
        {"params": [(name, parameters[name])], "name": name, "algorithm": "dion", **own}
        for name, (_, own) in MATRICES.items()
    ]
    rest = {"params": [(name, parameters[name]) for name in REST], "algorithm": "adamw", "name": "rest"}
    chosen = {"lr": LR, "weight_decay": 0.1, "sync": "compressed", **settings}
    return Dion2([*matrices, rest], process_group=group, **chosen)


def gradients_of(step: int, replica: int) -> dict[str, Tensor]:
    return whole(seed=1000 * (step + 1) + replica)


def set_gradients(parameters: Parameters, gradients: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        gradient = gradients[name]
        if isinstance(parameter, DTensor):
            parameter.grad = place(gradient, parameter.device_mesh, parameter.placements)
        else:
            parameter.grad = gradient.clone()


def average(parameters: Parameters, names: Any, group: Any) -> None:
    """What DistributedDataParallel does of the gradients that are left to it."""
    for name in names:
        dist.all_reduce(parameters[name].grad, group=group)
        parameters[name].grad /= group.size()


class Expected:
    """The float64 reference of every matrix, and torch's AdamW for the rest, fed with the gradients of all replicas."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self.parameters = plain()
        # A step with zero gradients at lr 0 makes the state, and Q at its start.
        made = optimizer_of(self.parameters, None, lr=0.0, sync="full")
        set_gradients(self.parameters, {name: torch.zeros_like(each) for name, each in self.parameters.items()})
        made.step()
        self.references: dict[str, list[DionReference]] = {}
        for name in MATRICES:
            q = made.state[self.parameters[name]]["Q[head]" if name in STACKS else "Q"].double()
            self.references[name] = [
                DionReference(weight, its_q, lr=LR, weight_decay=0.1, replicas=1 if name in MEAN else replicas)
                for weight, its_q in zip(
                    self.matrices(name, self.parameters[name].detach()), q.view(-1, *q.shape[-2:]), strict=True
                )
            ]
        self.rest = [self.parameters[name] for name in REST]
        self.adamw = torch.optim.AdamW(self.rest, lr=LR, weight_decay=0.1)

    @staticmethod
    def matrices(name: str, stored: Tensor) -> list[Tensor]:
        """The matrices of a parameter in (out, in)."""
        stack = stored.double().view(STACKS.get(name, (-1, *stored.shape[-2:])))
        return list(stack.mT if MATRICES[name][1].get("transposed") else stack)

    def step(self, step: int, factor: float = 1.0) -> None:
        of_replicas = [gradients_of(step, replica) for replica in range(self.replicas)]
        for name, references in self.references.items():
            by_replica = [self.matrices(name, factor * gradients[name]) for gradients in of_replicas]
            for index, reference in enumerate(references):
                gradients = [each[index] for each in by_replica]
                reference.step(*([sum(gradients) / self.replicas] if name in MEAN else gradients))
        for name in REST:
            self.parameters[name].grad = factor * torch.stack([each[name] for each in of_replicas]).mean(0)
        self.adamw.step()

    def stored(self, name: str, matrices: list[Tensor]) -> Tensor:
        stack = torch.stack(matrices)
        stack = stack.mT if MATRICES[name][1].get("transposed") else stack
        return stack.reshape(MATRICES[name][0])

    def weight(self, name: str) -> Tensor:
        if name in REST:
            return self.parameters[name].detach().double()
        return self.stored(name, [each.weight for each in self.references[name]])

    def momentum(self, name: str, replica: int) -> Tensor:
        return self.stored(name, [each.momenta[0 if name in MEAN else replica] for each in self.references[name]])


def assert_near(found: Tensor, expected: Tensor, size: Tensor, bound: float = 1e-4) -> None:
    assert torch.linalg.norm(found.double() - expected) <= bound * torch.linalg.norm(size)


def assert_equal_on(group: Any, parameters: Parameters) -> None:
    """The same bits on all replicas."""
    for name, parameter in parameters.items():
        own = local(parameter).detach()
        others = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(others, own.contiguous(), group=group)
        assert all(torch.equal(own, other) for other in others), name


def layouts(ranks: int) -> Iterator[tuple[str, Parameters, Any]]:
    """Every layout with replicas of this many ranks: its parameters, and the ranks that hold replicas."""
    yield "DDP", plain(), dist.group.WORLD
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for dim in (0, 1):
            yield f"HSDP along {dim}", sharded(mesh["shard"], dim), mesh["replicate"].get_group()


def check_against_reference(ranks: int) -> None:
    for name, parameters, group in layouts(ranks):
        with errors_name_case(name):
            train_and_compare(parameters, group)


def train_and_compare(parameters: Parameters, group: Any) -> None:
    replica = dist.get_rank(group)
    expected, starts = Expected(group.size()), whole(0)
    optimizer = optimizer_of(parameters, group)
    for step in range(STEPS):
        set_gradients(parameters, gradients_of(step, replica))
        if not isinstance(parameters["tall"], DTensor):
            average(parameters, MEAN, group)
        optimizer.step()
        expected.step(step)
        assert_equal_on(group, parameters)
    for name, parameter in parameters.items():
        with errors_name_case(name):
            start, end = 0.1 * starts[name].double(), expected.weight(name)
            moved = local(parameter).detach() - part_of(start, parameter)
            assert_near(moved, part_of(end - start, parameter), end - start)
            if name in MATRICES:
                momentum = expected.momentum(name, replica)
                assert_near(local(optimizer.state[parameter]["momentum"]), part_of(momentum, parameter), momentum)
    optimizer.synchronize()
    assert_equal_on(group, {name: optimizer.state[parameters[name]]["momentum"] for name in MATRICES})
    for name in MATRICES:
        momenta = [expected.momentum(name, each) for each in range(group.size())]
        mean = torch.stack(momenta).mean(0)
        momentum = optimizer.state[parameters[name]]["momentum"]
        assert_near(local(momentum), part_of(mean, momentum), mean)


@pytest.mark.parametrize("ranks", [2, 4])
def test_against_a_reference_of_momenta_that_go_apart(ranks: int) -> None:
    run_on_ranks(ranks, check_against_reference, ranks)


@contextmanager
def counted(group: Any) -> Iterator[list[int]]:
    """What is sent to other replicas, in bytes of each message."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is group:
            sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", count):
        yield sent


def check_bytes(ranks: int) -> None:
    """(long + short) r for every (long, short): of what full synchronisation sends, each rank its share, to 5%."""
    shapes = {"tall": (192, 96), "wide": (64, 256), "nearly square": (128, 160)}
    torch.manual_seed(dist.get_rank() // (ranks // 2))  # by replica
    for layout in ("DDP", "HSDP") if ranks == 4 else ("DDP",):
        group, mesh, shards = dist.group.WORLD, None, 1
        if layout == "HSDP":
            both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            group, mesh, shards = both["replicate"].get_group(), both["shard"], 2
        for layers in (1, 3):
            for rank_fraction in (1 / 2, 1 / 4, 1 / 8):
                parameters = {
                    f"{name} {layer}": nn.Parameter(
                        torch.zeros(shape) if mesh is None else place(torch.zeros(shape), mesh, (Shard(0),))
                    )
                    for layer in range(layers)
                    for name, shape in shapes.items()
                }
                settings = {"algorithm": "dion", "sync": "compressed", "rank_fraction": rank_fraction}
                optimizer = Dion2([{"params": list(parameters.items()), **settings}], process_group=group)
                for _ in range(2):  # the first one compares settings and gradients too
                    for parameter in parameters.values():
                        gradient = torch.randn(parameter.shape)
                        parameter.grad = gradient if mesh is None else place(gradient, mesh, (Shard(0),))
                    with counted(group) as sent:
                        optimizer.step()
                full = 4 * layers * sum(map(math.prod, shapes.values())) // shards
                products = layers * sum(4 * sum(shape) * round(rank_fraction * min(shape)) for shape in shapes.values())
                with errors_name_case(f"{layout}, {layers} layers, rank {rank_fraction}: {sent}"):
                    assert sum(sent) / full == pytest.approx(products / shards / full, rel=0.05)
                    # Sharded ones have P for rows and for columns apart, and R at another time.
                    assert len(sent) <= (3 if layout == "DDP" else 6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes(ranks: int) -> None:
    run_on_ranks(ranks, check_bytes, ranks)


def check_clipping_by_hand(parameters: Parameters, group: Any, norm: Tensor) -> None:
    copies = {name: nn.Parameter(each.detach().clone()) for name, each in parameters.items()}
    for name, each in copies.items():
        each.grad = parameters[name].grad.clone()
    replicas = {copies[name]: group for name in MATRICES if name not in MEAN}
    found = clip_grad_norm_(copies.values(), 1.0, replicas=replicas)
    torch.testing.assert_close(found.double(), norm, rtol=1e-6, atol=0)
    for name, each in copies.items():
        torch.testing.assert_close(each.grad, parameters[name].grad / found, rtol=1e-5, atol=0)
    largest = clip_grad_norm_(copies.values(), 1.0, norm_type=math.inf, replicas=replicas)
    expected = max(each.grad.abs().max() for each in copies.values())
    dist.all_reduce(expected, op=dist.ReduceOp.MAX)
    assert largest == expected


def check_clipping() -> None:
    """By the root mean square of the replicas' norms, the same on all; and what is averaged by its own norm."""
    for name, parameters, group in layouts(dist.get_world_size()):
        replica, is_plain = dist.get_rank(group), not isinstance(parameters["tall"], DTensor)
        expected = Expected(group.size())
        optimizer = optimizer_of(parameters, group, max_grad_norm=1.0)
        for step in range(3):
            of_replicas = [gradients_of(step, each) for each in range(group.size())]
            set_gradients(parameters, of_replicas[replica])
            if is_plain:
                average(parameters, MEAN, group)
            squares = []
            for each in parameters:
                gradients = torch.stack([gradients[each].double() for gradients in of_replicas])
                if each in MEAN:
                    gradients = gradients.mean(0, keepdim=True)
                squares.append(gradients.square().sum() / len(gradients))
            norm = torch.stack(squares).sum().sqrt()
            if is_plain:
                assert optimizer.replicas().keys() == {parameters[each] for each in MATRICES if each not in MEAN}
                check_clipping_by_hand(parameters, group, norm)
            optimizer.step()
            torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=1e-6, atol=0)
            expected.step(step, factor=1.0 / norm.item())
            assert_equal_on(group, parameters)
        for each in MATRICES:
            with errors_name_case(f"{name}, {each}"):
                start, end = 0.1 * whole(0)[each].double(), expected.weight(each)
                moved = local(parameters[each]).detach() - part_of(start, parameters[each])
                assert_near(moved, part_of(end - start, parameters[each]), end - start)


def test_clipping() -> None:
    run_on_ranks(4, check_clipping)


def train(parameters: Parameters, optimizer: Dion2, group: Any, steps: range) -> None:
    for step in steps:
        set_gradients(parameters, gradients_of(step, 0 if group is None else dist.get_rank(group)))
        if group is not None:
            average(parameters, MEAN, group)
        optimizer.step()


def save_on(folder: Path) -> None:
    """Train on these ranks, average, save, and go on: with what was averaged."""
    parameters = plain()
    group = dist.group.WORLD
    optimizer = optimizer_of(parameters, group)
    train(parameters, optimizer, group, range(3))
    with pytest.raises(RuntimeError, match=r"call optimizer\.synchronize\(\) on every rank first"):
        optimizer.state_dict()
    means = {name: optimizer.state[parameters[name]]["momentum"].double() for name in MATRICES}
    for mean in means.values():
        dist.all_reduce(mean)
        mean /= group.size()
    optimizer.synchronize()
    if dist.get_rank() == 0:
        weights = {name: each.detach() for name, each in parameters.items()}
        torch.save({"weights": weights, "means": means, "optimizer": optimizer.state_dict()}, folder / "saved.pt")
    optimizer.consolidate_state_dict()  # nothing to do any more
    optimizer.state_dict()


def resume_on(folder: Path) -> None:
    """On fewer ranks, and on one by the means of their gradients: the momenta that they begin with are the means."""
    saved = torch.load(folder / "saved.pt")
    group = dist.group.WORLD
    parameters, alone = (
        {name: nn.Parameter(each.clone()) for name, each in saved["weights"].items()} for _ in range(2)
    )
    optimizer, other = optimizer_of(parameters, group), optimizer_of(alone, None, sync="full")
    for each in (optimizer, other):
        each.load_state_dict(copy.deepcopy(saved["optimizer"]))
    assert {group["sync"] for group in other.param_groups if "sync" in group} == {"full"}
    for name in MATRICES:
        torch.testing.assert_close(optimizer.state[parameters[name]]["momentum"], saved["means"][name].float())
    train(parameters, optimizer, group, range(3, 6))
    assert_equal_on(group, parameters)
    for step in range(3, 6):
        gradients = [gradients_of(step, replica) for replica in range(2)]
        set_gradients(alone, {name: torch.stack([each[name] for each in gradients]).mean(0) for name in alone})
        other.step()
    for name, start in saved["weights"].items():
        assert_near(parameters[name].detach() - start, (alone[name].detach() - start).double(), alone[name] - start)


def test_a_checkpoint_of_four_ranks_on_two(tmp_path: Path) -> None:
    run_on_ranks(4, save_on, tmp_path)
    run_on_ranks(2, resume_on, tmp_path)


def check_gradients() -> None:
    """One that a replica lacks counts as zero there; NaN on one is an error on all, or skips the step on all."""
    group, rank = dist.group.WORLD, dist.get_rank()
    lacking, zero = plain(), plain()
    optimizers = [optimizer_of(each, group) for each in (lacking, zero)]
    for step in range(2):
        for parameters, optimizer in zip((lacking, zero), optimizers, strict=True):
            set_gradients(parameters, gradients_of(step, rank))
            average(parameters, MEAN, group)
            if rank == 1 and step == 1:
                parameters["tall"].grad = None if parameters is lacking else torch.zeros_like(parameters["tall"])
            optimizer.step()
    assert all(torch.equal(lacking[name], zero[name]) for name in lacking)

    for check_finite in (True, "skip"):
        parameters = plain()
        optimizer = optimizer_of(parameters, group, check_finite=check_finite)
        for step in range(2):
            set_gradients(parameters, gradients_of(step, rank))
            average(parameters, MEAN, group)
            if step == 0:
                optimizer.step()
        before = {name: each.detach().clone() for name, each in parameters.items()}
        if rank == 1:
            parameters["wide"].grad[0, 0] = torch.nan
        if check_finite is True:
            with pytest.raises(FloatingPointError, match="'wide' has a gradient with NaN or Inf"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
        assert all(torch.equal(before[name], parameters[name]) for name in parameters)


def check_added_and_frozen() -> None:
    """Parameters without state have nothing to average; one that is added is compressed from the next step on."""
    group, rank = dist.group.WORLD, dist.get_rank()
    parameters = {name: nn.Parameter(torch.ones(24, 12)) for name in ("first", "frozen", "added")}
    parameters["frozen"].requires_grad_(False)
    settings = {"algorithm": "dion", "sync": "compressed"}
    optimizer = Dion2([{"params": [parameters["first"], parameters["frozen"]], **settings}], process_group=group)
    for step in range(2):
        for name in ("first", "added"):
            parameters[name].grad = torch.randn(24, 12, generator=torch.manual_seed(2 * step + rank))
        optimizer.step()
        if step == 0:
            optimizer.add_param_group({"params": [parameters["added"]], **settings})
        optimizer.synchronize()
        optimizer.state_dict()
    assert_equal_on(group, parameters)
    assert not torch.equal(parameters["added"], parameters["frozen"])


def check_captured_energy() -> None:
    """The mean of the replicas' ||R||^2 over that of their ||B||^2, the same on all."""
    group, parameters, expected = dist.group.WORLD, plain(), Expected(2)
    optimizer = optimizer_of(parameters, group)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    for step in range(2):
        [reference] = expected.references["tall"]
        bs = [m + gradients_of(step, each)["tall"].double() for each, m in enumerate(reference.momenta)]
        train(parameters, optimizer, group, range(step, step + 1))
        expected.step(step)
        lost = torch.stack(bs) - torch.stack(reference.momenta)  # (1 - mu) P R^T of each
        captured = (lost / (1 - reference.mu)).square().sum() / torch.stack(bs).square().sum()
        metrics = tracker.pop_metrics()
        assert metrics is not None
        assert metrics.groups["tall"]["captured_energy"] == pytest.approx(captured.item(), rel=1e-4)


def check_errors() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    spread = sharded(mesh, 0)

    def step(
        parameters: Parameters, its_group: Any, change: Callable[[], object] | None = None, **settings: Any
    ) -> None:
        optimizer = optimizer_of(parameters, its_group, **settings)
        set_gradients(parameters, gradients_of(0, rank))
        if not isinstance(parameters["tall"], DTensor) and its_group is not None:
            average(parameters, MEAN, its_group)
        if change is not None:
            change()
        optimizer.step()

    with pytest.raises(ValueError, match=r"sync='compressed' needs ranks that hold replicas"):
        step(plain(), None)
    with pytest.raises(ValueError, match="or under FSDP2 alone, use sync='full'"):
        step(spread, None)
    with pytest.raises(ValueError, match=r"over ranks \[0, 1\], and \[0, 1\] of them are in the process group"):
        step(spread, group)
    replicated = {name: nn.Parameter(place(0.1 * each, mesh, (Replicate(),))) for name, each in whole(0).items()}
    with pytest.raises(ValueError, match=r"has replicas along dimension 0 of .*call fully_shard with the mesh of"):
        step(replicated, group)
    with pytest.raises(ValueError, match="share_replicas=False keeps replicas apart"):
        step(plain(), group, share_replicas=False)
    averaged = plain()
    with pytest.raises(RuntimeError, match=r"the same gradients on all replicas, so .* they were averaged already"):
        step(averaged, group, lambda: average(averaged, [name for name in averaged if name not in MEAN], group))
    clipped = plain()
    with pytest.raises(RuntimeError, match=r"'of too high a rank' has gradients that differ between .*max_grad_norm="):
        step(clipped, group, lambda: nn.utils.clip_grad_norm_(clipped.values(), 1.0))
    later = plain()
    optimizer = optimizer_of(later, group)
    train(later, optimizer, group, range(1))
    set_gradients(later, gradients_of(1, rank))
    average(later, MEAN, group)
    nn.utils.clip_grad_norm_(later.values(), 1.0)
    with pytest.raises(RuntimeError, match=r"has gradients that differ between .*max_grad_norm="):
        optimizer.step()
    others = {name: nn.Parameter(each + rank) for name, each in plain().items()}
    with pytest.raises(RuntimeError, match=r"'tall' differs between replicas, .*give all ranks the same weights"):
        step(others, group)
    changed = plain()
    optimizer = optimizer_of(changed, group)
    train(changed, optimizer, group, range(1))
    with pytest.raises(RuntimeError, match="replicas have momenta of their own"):
        copy.deepcopy(optimizer).state_dict()
    for each in optimizer.param_groups:
        if "sync" in each:
            each["sync"] = "full"
    for use in (optimizer.step, optimizer.synchronize):
        with pytest.raises(RuntimeError, match="sync was changed from 'compressed' to 'full'"):
            use()
    with pytest.raises(RuntimeError, match="replicas have momenta of their own"):
        optimizer.state_dict()
    with pytest.raises(ValueError, match=r"sync must be one of 'full', 'compressed', got 'half'"):
        optimizer_of(plain(), group, sync="half")
    with pytest.raises(ValueError, match="max_grad_norm must be over 0 and finite, got 0; None switches it off"):
        Dion2([nn.Parameter(torch.zeros(2, 2))], max_grad_norm=0)
    with pytest.raises(ValueError, match="sync='compressed' needs ranks that hold replicas"):
        build_optimizer(nn.Sequential(nn.Linear(8, 8)), algorithm="dion", sync="compressed")
    with pytest.raises(ValueError, match="sync='compressed' is no setting of algorithm 'dion2'"):
        build_optimizer(nn.Sequential(nn.Linear(8, 8)), sync="compressed", strategy=group)


def check_copies_of_the_module() -> None:
    """What DDP is told to leave to an optimizer holds for its module alone: another optimizer of a copy needs it."""
    group = dist.group.WORLD
    module = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    optimizer = build_optimizer(module, algorithm="dion", sync="compressed", strategy=group)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for each, is_copy in (
        (module, False),
        (copy.deepcopy(module), True),
        (torch.load(file, weights_only=False), True),
    ):
        ignored = nn.parallel.DistributedDataParallel(each).parameters_to_ignore
        assert bool(ignored) is not is_copy
    assert optimizer.is_compressing


def check_two_ranks() -> None:
    check_copies_of_the_module()
    check_gradients()
    check_added_and_frozen()
    check_captured_energy()
    check_errors()


def test_gradients_and_errors() -> None:
    run_on_ranks(2, check_two_ranks)


def check_init_step() -> None:
    """By which torch.distributed.checkpoint makes the state: zero gradients at lr 0 are not taken for averaged ones."""
    parameters = plain()
    optimizer = optimizer_of(parameters, dist.group.WORLD, lr=0.0)
    set_gradients(parameters, {name: torch.zeros_like(each) for name, each in parameters.items()})
    optimizer.step()
    assert optimizer.state_dict()["state"]


def check_failures() -> None:
    """A randomized Cholesky QR that fails on spread rows, of the mean of replicas' products, takes an exact QR."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh["replicate"].get_group()
    parameter = nn.Parameter(place(torch.zeros(96, 24), mesh["shard"], (Shard(0),)))
    group_of = {"params": [("w", parameter)], "algorithm": "dion", "sync": "compressed", "lr": 0.1}
    optimizer = Dion2([group_of], process_group=group)
    gradient = torch.full((96, 24), 0.3 + 0.1 * dist.get_rank(group))
    parameter.grad = place(gradient, mesh["shard"], (Shard(0),))
    with pytest.warns(UserWarning, match="a randomized Cholesky QR has failed"):
        optimizer.step()
    assert optimizer.fallbacks["rcqr"] == 1
    alone = nn.Parameter(torch.zeros(96, 24))
    other = Dion2([{**group_of, "params": [("w", alone)], "sync": "full"}])
    alone.grad = torch.full((96, 24), 0.35)
    other.step()
    torch.testing.assert_close(local(parameter).detach(), part_of(alone.detach(), parameter), rtol=1e-4, atol=1e-6)


def check_nothing_worth_compressing() -> None:
    """On a mesh all is averaged as gradients then, as it is without."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh["replicate"].get_group()
    spread = nn.Parameter(place(torch.ones(16, 16), mesh["shard"], (Shard(0),)))
    alone = nn.Parameter(torch.ones(16, 16))
    settings = {"algorithm": "dion", "rank_fraction": 1.0, "lr": 0.1}
    optimizers = [Dion2([{"params": [("w", spread)], **settings, "sync": "compressed"}], process_group=group)]
    optimizers.append(Dion2([{"params": [("w", alone)], **settings}]))
    gradients = [torch.randn(16, 16, generator=torch.manual_seed(replica)) for replica in range(2)]
    spread.grad = place(gradients[dist.get_rank(group)], mesh["shard"], (Shard(0),))
    alone.grad = (gradients[0] + gradients[1]) / 2
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(local(spread).detach(), part_of(alone.detach(), spread), rtol=1e-4, atol=1e-5)


def check_a_first_gradient_on_one_replica_alone() -> None:
    """What the others lack counts as zero, also where they have no gradient at all to look at."""
    parameter, alone = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64))
    settings = {"algorithm": "dion", "lr": 0.1}
    group = {"params": [("w", parameter)], **settings, "sync": "compressed"}
    optimizers = [Dion2([group], process_group=dist.group.WORLD)]
    optimizers.append(Dion2([{"params": [("w", alone)], **settings}]))
    gradient = torch.randn(64, 64, generator=torch.manual_seed(0))
    parameter.grad = gradient.clone() if dist.get_rank() == 0 else None
    alone.grad = gradient / dist.get_world_size()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), alone.detach(), rtol=1e-4, atol=1e-5)


def check_four_ranks() -> None:
    check_init_step()
    check_failures()
    check_nothing_worth_compressing()
    check_a_first_gradient_on_one_replica_alone()


def test_first_steps_and_fallbacks() -> None:
    run_on_ranks(4, check_four_ranks)


def test_without_a_group_this_rank_has_the_sum() -> None:
    def work() -> summing.SummingWork:
        for over in summing.Over:
            assert torch.equal((yield summing.Summand(torch.ones(3), over)), torch.ones(3))

    for _ in summing.run_together([work()], None):
        pass
