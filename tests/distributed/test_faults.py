"""What goes wrong on some ranks: missing gradients, other settings, NaN, ranks that fail, stall or die."""

import copy
import datetime
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dion2_lightning import Dion2
from dion2_lightning.distributed.replicas import compare_gradients
from dion2_lightning.matrices.layout import placements_of_matrices
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import (
    MATRICES,
    STACKS,
    compare_step,
    expected_of,
    groups_of,
    local_part,
    part_of,
    place,
    whole_parameters,
    whole_tensors,
)

SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (16, 16), "bias": (14,)}
SETTINGS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "orthonormalize_dtype": "float32"}
TIMEOUT = datetime.timedelta(seconds=4)

Parameters = dict[str, nn.Parameter]
Whole = dict[str, Tensor]


def whole(seed: int) -> Whole:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def parameters_of(mesh: DeviceMesh | None = None) -> Parameters:
    """The same weights on every rank, sharded by rows where there is a mesh."""
    if mesh is None:
        return {name: nn.Parameter(tensor) for name, tensor in whole(seed=0).items()}
    return {name: nn.Parameter(place(tensor, mesh, (Shard(0),))) for name, tensor in whole(seed=0).items()}


def set_gradients(parameters: Parameters, gradients: Whole) -> None:
    for name, gradient in gradients.items():
        parameter = parameters[name]
        placed = gradient.clone()
        if isinstance(parameter, DTensor):
            placed = place(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = placed


def optimizer_of(parameters: Parameters, **settings: Any) -> Dion2:
    matrices = [(name, parameter) for name, parameter in parameters.items() if name != "bias"]
    groups = [
        {"params": matrices, "name": "matrices"},
        {"params": [("bias", parameters["bias"])], "name": "rest", "algorithm": "adamw"},
    ]
    return Dion2(groups, **{**SETTINGS, **settings})


def snapshot(parameters: Parameters, optimizer: Dion2) -> dict[str, Tensor]:
    """A copy of what this rank holds of weights and state."""
    weights = {name: local_part(parameter).clone() for name, parameter in parameters.items()}
    state = {
        f"{name} {entry}": local_part(value).clone()
        for name, parameter in parameters.items()
        for entry, value in optimizer.state[parameter].items()
    }
    return weights | state


def assert_unchanged(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


# Gradients


def check_gradients_and_settings() -> None:
    mesh = init_device_mesh("cpu", (2,))
    check_settings_that_differ(mesh)
    check_names_and_frozen_parameters_that_differ(mesh)
    check_what_differs_is_named(mesh)
    check_what_one_rank_has_besides(mesh)
    check_runs_that_a_missing_gradient_would_make(mesh)
    check_working_memory_that_differs(mesh)
    check_gradients_that_nothing_has_averaged()
    check_gradients_of_what_was_frozen()
    check_what_one_rank_alone_freezes_later()
    check_an_infinite_gradient_in_the_first_step()
    check_a_gradient_that_is_zero_on_one_rank_alone()
    check_a_sparse_gradient()
    check_a_plain_gradient_of_a_shard(mesh)
    check_gradient_on_one_rank_only(mesh)
    check_gradient_on_one_replica_only()
    check_no_gradient_anywhere(parameters_of(mesh))
    check_no_gradient_anywhere(parameters_of(), process_group=dist.group.WORLD, share_replicas=True)
    check_no_gradient_anywhere(parameters_of(), process_group=dist.group.WORLD, share_replicas=False)
    check_init_step(parameters_of(mesh))
    check_init_step(parameters_of(), process_group=dist.group.WORLD, share_replicas=True)
    check_first_step_at_lr_zero_with_gradients_on_one_rank(mesh)
    check_nan_on_one_rank(parameters_of(mesh), changed="tall")
    check_nan_on_one_rank(parameters_of(mesh), changed="bias")
    check_nan_on_one_rank(parameters_of(), changed="tall", process_group=dist.group.WORLD)
    check_nan_on_one_rank(parameters_of(), changed="bias", process_group=dist.group.WORLD)
    for changed in ("tall", "bias"):
        check_a_skipped_step(lambda: parameters_of(mesh), changed, on_rank=1)
        for share_replicas in (True, False):
            settings = {"process_group": dist.group.WORLD, "share_replicas": share_replicas}
            check_a_skipped_step(parameters_of, changed, on_rank=1, **settings)


def check_gradient_on_one_rank_only(mesh: DeviceMesh) -> None:
    """Where it is missing it counts as zero, as in a single process where that part of it is zero."""
    alone, parameters = parameters_of(), parameters_of(mesh)
    reference, optimizer = optimizer_of(alone), optimizer_of(parameters)
    for step in range(4):
        gradients = whole(seed=100 + step)
        set_gradients(parameters, gradients)
        without = (step + 1) % 2
        if dist.get_rank() == without:
            parameters["wide"].grad = parameters["tall"].grad = None
        for name in ("wide", "tall"):
            gradients[name].chunk(2)[without].zero_()
        set_gradients(alone, gradients)
        optimizer.step()
        reference.step()
        for name in ("wide", "tall", "square"):
            compare_step(name, parameters[name], optimizer, expected_of(alone[name], reference))
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            local_part(parameter), part_of(alone[name].detach(), parameter), rtol=1e-5, atol=1e-6
        )


def check_gradient_on_one_replica_only() -> None:
    """Replicas must have the same gradients, or they would diverge; so every rank gets an error."""
    parameters = parameters_of()
    optimizer = optimizer_of(parameters, process_group=dist.group.WORLD, share_replicas=True)
    set_gradients(parameters, whole(seed=100))
    if dist.get_rank() == 0:
        parameters["tall"].grad = None
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises(RuntimeError, match="'tall' has a gradient on 1 of 2 ranks, so not in every replica"):
        optimizer.step()
    assert_unchanged(before, {name: parameter.detach() for name, parameter in parameters.items()})


def check_gradients_of_replicated_parts() -> None:
    """HSDP: what a shard lacks counts as zero if the same shard of every replica lacks it; else all get an error."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    shard = mesh.get_local_rank("shards")
    for share_replicas in (True, False):
        alone = parameters_of()
        parameters = {
            name: nn.Parameter(place(tensor, mesh, (Replicate(), Shard(0)))) for name, tensor in whole(seed=0).items()
        }
        reference, optimizer = optimizer_of(alone), optimizer_of(parameters, share_replicas=share_replicas)
        gradients = whole(seed=100)
        set_gradients(parameters, gradients)
        if shard == 1:
            parameters["tall"].grad = None
        gradients["tall"].chunk(2)[1].zero_()
        parameters["square"].grad = None
        del gradients["square"]
        set_gradients(alone, gradients)
        optimizer.step()
        reference.step()
        for name in ("wide", "tall"):
            compare_step(name, parameters[name], optimizer, expected_of(alone[name], reference))
        assert optimizer.selection_of(parameters["square"]) is None
    if dist.get_rank() == 3:
        parameters["wide"].grad = None
    optimizer.share_replicas = True
    with pytest.raises(RuntimeError, match="'wide' has a gradient on 3 of 4 ranks, so not in every replica"):
        optimizer.step()


def check_a_gradient_that_a_replica_lacks() -> None:
    """Also where as many ranks have it as there are in a replica, or in several."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for algorithm in ("dion2", "dion"):
        for having in ([0, 1], [2, 3], [0, 3], [1, 2], [0, 1, 2]):
            parameter = nn.Parameter(place(whole(seed=0)["tall"], mesh, (Replicate(), Shard(0))))
            optimizer = Dion2([{"params": [("tall", parameter)], "algorithm": algorithm}])
            if dist.get_rank() in having:
                parameter.grad = place(whole(seed=1)["tall"], mesh, (Replicate(), Shard(0)))
            message = f"'tall' has a gradient on {len(having)} of 4 ranks, so not in every replica"
            with pytest.raises(RuntimeError, match=message):
                optimizer.step()


def check_no_gradient_anywhere(parameters: Parameters, **settings: Any) -> None:
    """Parameters without a gradient are skipped, momentum and weight decay included; the others are updated."""
    optimizer = optimizer_of(parameters, **settings)
    set_gradients(parameters, whole(seed=1))
    optimizer.step()
    before = snapshot(parameters, optimizer)
    set_gradients(parameters, whole(seed=2))
    parameters["tall"].grad = parameters["bias"].grad = None
    optimizer.step()
    after = snapshot(parameters, optimizer)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"wide", "wide momentum", "wide step", "square", "square momentum", "square step"}
    assert optimizer.selection_of(parameters["tall"]) is None
    assert optimizer.selection_of(parameters["wide"]) is not None
    optimizer.zero_grad()
    optimizer.step()
    assert_unchanged(after, snapshot(parameters, optimizer))


def check_init_step(parameters: Parameters, **settings: Any) -> None:
    """torch.distributed.checkpoint creates an optimizer's state by a step with lr 0 and zero gradients."""
    optimizer = optimizer_of(parameters, lr=0.0, **settings)
    weights = {name: local_part(parameter).clone() for name, parameter in parameters.items()}
    set_gradients(parameters, {name: torch.zeros_like(tensor) for name, tensor in whole(seed=0).items()})
    optimizer.step()
    after = snapshot(parameters, optimizer)
    assert_unchanged(weights, {name: after.pop(name) for name in weights})
    assert {name.split()[1] for name in after} == {"momentum", "step", "exp_avg", "exp_avg_sq"}
    assert not any(tensor.any() for tensor in after.values())
    assert all(optimizer.selection_of(parameters[name]) is None for name in ("wide", "tall", "square"))


def check_first_step_at_lr_zero_with_gradients_on_one_rank(mesh: DeviceMesh) -> None:
    """That is no init step, on any rank: a warm-up may start at lr 0."""
    parameters, alone = parameters_of(mesh), parameters_of()
    optimizer, reference = optimizer_of(parameters, lr=0.0), optimizer_of(alone, lr=0.0)
    gradients = whole(seed=1)
    for gradient in gradients.values():
        gradient.chunk(2)[1].zero_()
    set_gradients(parameters, gradients)
    set_gradients(alone, gradients)
    optimizer.step()
    reference.step()
    for name in ("wide", "tall", "square"):
        compare_step(name, parameters[name], optimizer, expected_of(alone[name], reference))
    assert optimizer.state[parameters["bias"]]["step"] == 1


def check_nan_on_one_rank(parameters: Parameters, changed: str, **settings: Any) -> None:
    optimizer = optimizer_of(parameters, check_finite=True, **settings)
    set_gradients(parameters, whole(seed=1))
    optimizer.step()
    before = snapshot(parameters, optimizer)
    set_gradients(parameters, whole(seed=2))
    if dist.get_rank() == 1:
        local_part(parameters[changed].grad).view(-1)[3] = torch.nan
    with pytest.raises(FloatingPointError, match=f"parameter '{changed}' has a gradient with NaN or Inf"):
        optimizer.step()
    assert_unchanged(before, snapshot(parameters, optimizer))
    # The optimizer still works.
    set_gradients(parameters, whole(seed=2))
    optimizer.step()
    optimizer.state_dict()


def check_a_skipped_step(make: Callable[[], Parameters], changed: str, on_rank: int, **settings: Any) -> None:
    """One rank's gradient is bad, and no rank takes the step; the next ones are those of a run without it."""
    parameters, others = make(), make()
    optimizer, control = optimizer_of(parameters, check_finite="skip", **settings), optimizer_of(others, **settings)
    for seed in range(1, 4):
        set_gradients(parameters, whole(seed))
        if seed == 2 and dist.get_rank() == on_rank:
            local_part(parameters[changed].grad).view(-1)[3] = torch.inf
        optimizer.step()
        if seed != 2:
            set_gradients(others, whole(seed))
            control.step()
        assert_unchanged(snapshot(others, control), snapshot(parameters, optimizer))
    assert optimizer.skipped_steps == 1


def check_a_skipped_step_on_several_meshes() -> None:
    """The bad gradient is on one rank, of the bias that is on another mesh than the matrices, or on none."""
    for make in on_several_meshes():
        check_a_skipped_step(make, "bias", on_rank=3)


# Settings


def on_several_meshes() -> list[Callable[[], Parameters]]:
    """Matrices on a mesh of two dimensions, and the bias on one of them, or on no mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    strided = (_StridedShard(0, split_factor=2), Shard(0))

    def make(bias_on_a_mesh: bool) -> Parameters:
        tensors = whole(seed=0)
        bias = place(tensors["bias"], mesh["data"], (Shard(0),)) if bias_on_a_mesh else tensors["bias"]
        return {
            "wide": nn.Parameter(place(tensors["wide"], mesh, strided)),
            "tall": nn.Parameter(place(tensors["tall"], mesh, (Shard(0), Replicate()))),
            "square": nn.Parameter(place(tensors["square"], mesh, strided)),
            "bias": nn.Parameter(bias),
        }

    return [partial(make, True), partial(make, False)]


def check_a_skipped_step_along_a_chain_of_meshes() -> None:
    """A rank that steps with one part of a matrix, and one that skips with the other, would leave it torn."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "shards"))
    is_first = dist.get_rank() < 2
    stage = nn.Parameter(place(whole(seed=0)["wide"], mesh["shards"], (Shard(0),)))
    tied = nn.Parameter(place(whole(seed=0)["tall"], mesh["stages"], (Replicate(),)))
    in_order = [stage, tied] if is_first else [tied, stage]
    algorithms = {stage: "dion2", tied: "adamw"}
    groups = [{"params": [each], "algorithm": algorithms[each], "check_finite": "skip"} for each in in_order]
    optimizer = Dion2(groups, lr=0.1)
    for parameter in in_order:
        parameter.grad = torch.ones_like(parameter)
    if dist.get_rank() == 2:
        local_part(stage.grad)[0, 0] = torch.nan
    before = local_part(stage).clone()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(local_part(stage), before)


def check_ranks_on_unequally_many_meshes() -> None:
    """How often ranks of one mesh talk to each other does not depend on what else they have."""
    everyone, first = init_device_mesh("cpu", (4,)), DeviceMesh("cpu", [0, 1])
    for check_finite in (False, "skip"):
        for algorithm in ("dion2", "adamw"):
            parameters = {"tall": nn.Parameter(place(whole(seed=0)["tall"], everyone, (Shard(0),)))}
            if dist.get_rank() < 2:
                parameters["wide"] = nn.Parameter(place(whole(seed=0)["wide"], first, (Shard(0),)))
            groups = [{"params": [*parameters.items()], "name": "its", "algorithm": algorithm}]
            optimizer = Dion2(groups, check_finite=check_finite)
            set_gradients(parameters, {name: whole(seed=1)[name] for name in parameters})
            optimizer.step()
            alone = nn.Parameter(whole(seed=0)["tall"])
            alone.grad = whole(seed=1)["tall"]
            Dion2([{"params": [alone], "algorithm": algorithm}]).step()
            torch.testing.assert_close(parameters["tall"].full_tensor(), alone.data)


def check_what_one_rank_has_besides(mesh: DeviceMesh) -> None:
    """Such as a local expert: the memory of a step does not depend on its size, as ranks form the same batches."""
    for algorithm in ("dion2", "dion"):
        alone, parameters = parameters_of(), parameters_of(mesh)
        del alone["bias"], parameters["bias"]
        reference = Dion2([{"params": [*alone.items()], "algorithm": algorithm}], **SETTINGS)
        own = nn.Parameter(torch.ones(3, 10**5 if dist.get_rank() else 4))
        groups: list[dict[str, Any]] = [
            {"params": [*parameters.items()], "algorithm": algorithm},
            {"params": [("own", own)], "algorithm": "adamw"},
        ]
        optimizer = Dion2(groups, **SETTINGS)
        with mock.patch("dion2_lightning.algorithms.algorithm.MIN_WORKING_MEMORY", 1):
            for step in range(2):
                for each in (alone, parameters):
                    set_gradients(each, {name: value for name, value in whole(seed=step).items() if name in each})
                own.grad = torch.ones_like(own)
                reference.step()
                optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.full_tensor(), alone[name], rtol=1e-4, atol=1e-5)
        assert (own != 1).all()


def check_runs_that_a_missing_gradient_would_make(mesh: DeviceMesh) -> None:
    """Of Dion, on ranks with other memory: they are made of all matrices, so that they differ at once or never."""
    shapes = {"first": (32, 32), "middle": (64, 32), "last": (32, 33)}
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in shapes.items()}
    parameters = {name: nn.Parameter(place(weight, mesh, (Shard(0),))) for name, weight in weights.items()}
    optimizer = Dion2([{"params": [*parameters.items()], "algorithm": "dion"}], lr=0.1)
    for number, without in enumerate((None, "middle")):
        for name, parameter in parameters.items():
            parameter.grad = None if name == without else torch.ones_like(parameter)
        optimizer.step()
        if number == 0:
            optimizer.working_memory = 34_000 if dist.get_rank() else 20_000
    assert all(optimizer.state[parameter]["momentum"].any() for parameter in parameters.values())


def check_settings_that_differ(mesh: DeviceMesh) -> None:
    """In the middle of a run, in every number and precision that a group has."""
    of_matrices = {"fraction": 0.5, "lr": 0.06, "momentum": 0.5, "weight_decay": 0.0, "orthonormalize_dtype": "float64"}
    of_the_rest = {"lr": 0.06, "betas": (0.5, 0.6), "eps": 1e-4, "weight_decay": 0.0}
    changes = [("matrices", *each) for each in of_matrices.items()] + [("rest", *each) for each in of_the_rest.items()]
    for name, setting, other in changes:
        for settings in ({}, {"process_group": dist.group.WORLD, "share_replicas": True}):
            parameters = parameters_of(None if settings else mesh)
            optimizer = optimizer_of(parameters, **settings)
            set_gradients(parameters, whole(seed=1))
            optimizer.step()
            saved = copy.deepcopy(optimizer.state_dict())
            if dist.get_rank() == 1:
                [group] = [group for group in optimizer.param_groups if group["name"] == name]
                group[setting] = other
            with pytest.raises(RuntimeError, match="ranks share parameters but disagree about their settings"):
                optimizer.step()
            assert_refuses_until_load(optimizer, saved)
            optimizer.step()


def check_what_differs_is_named(mesh: DeviceMesh) -> None:
    """Of the first parameter: a setting, and what each rank says; also where one rank alone has loaded a checkpoint."""
    is_second = dist.get_rank() == 1
    for on_mesh, settings in ((mesh, {}), (None, {"process_group": dist.group.WORLD})):
        parameters = parameters_of(on_mesh)
        optimizer = optimizer_of(parameters, lr=0.02 if is_second else 0.01, **settings)
        set_gradients(parameters, whole(seed=1))
        with pytest.raises(RuntimeError, match=r"Of '?.* of shape \(.*\), lr is 0.01 on rank 0 and 0.02 on rank 1\."):
            optimizer.step()
    for share_replicas in (None, False):  # alone, each rank may go on from where it is
        parameters = parameters_of(None)
        optimizer = optimizer_of(parameters, process_group=dist.group.WORLD, share_replicas=share_replicas)
        set_gradients(parameters, whole(seed=1))
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        optimizer.load_state_dict(saved if is_second else copy.deepcopy(optimizer.state_dict()))
        if share_replicas is False:
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match=r"number of steps is 2 on rank 0 and 1 on rank 1\."):
            optimizer.step()


def check_names_and_frozen_parameters_that_differ(mesh: DeviceMesh) -> None:
    """Matrices of one shape in another order, which only their names tell; or frozen on one rank alone."""
    layouts: list[tuple[DeviceMesh | None, dict[str, Any]]] = [(mesh, {}), (None, {"process_group": dist.group.WORLD})]
    for algorithm in ("dion2", "dion3", "dion"):
        for on_mesh, settings in layouts:
            for reverses in (True, False):
                both = [(name, parameters_of(on_mesh)["square"]) for name in ("first", "second")]
                if dist.get_rank() == 1 and reverses:
                    both.reverse()
                optimizer = Dion2([{"params": both, "algorithm": algorithm}], **settings)
                if dist.get_rank() == 1 and not reverses:
                    both[0][1].requires_grad_(False)
                for _, parameter in both:
                    parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
                with pytest.raises(RuntimeError, match="their number, their names or order, or which of them are froz"):
                    optimizer.step()


def check_gradients_that_nothing_has_averaged() -> None:
    """As in local steps: ranks must not share work then, and each can take its own step."""
    for algorithm in ("dion2", "dion3", "dion"):

        def optimizer_on(parameters: Parameters, algorithm: str = algorithm, **settings: Any) -> Dion2:
            matrices = [(name, parameters[name]) for name in ("wide", "tall")]
            return Dion2([{"params": matrices, "algorithm": algorithm}], **SETTINGS, **settings)

        shares = {"process_group": dist.group.WORLD, "share_replicas": True if algorithm == "dion" else None}
        parameters, alone, others = parameters_of(), parameters_of(), parameters_of()
        optimizer, control = optimizer_on(parameters, **shares), optimizer_on(alone)
        own = whole(seed=100 + dist.get_rank())
        set_gradients(parameters, {name: torch.zeros_like(each) for name, each in own.items()})
        for each in (optimizer, control):  # gradients that say nothing
            set_gradients(alone, {name: torch.zeros_like(gradient) for name, gradient in own.items()})
            each.step()
        set_gradients(parameters, own)
        set_gradients(alone, own)
        before = snapshot_of_weights(parameters)
        with pytest.raises(RuntimeError, match=r"'wide' has gradients of norm .* pass share_replicas=False"):
            optimizer.step()
        assert_unchanged(before, snapshot_of_weights(parameters))
        optimizer.share_replicas = None if algorithm == "dion" else False  # which shares nothing either
        optimizer.step()
        control.step()
        assert_unchanged(snapshot_of_weights(alone), snapshot_of_weights(parameters))
        # What differs by rounding alone is shared, and what is frozen is not asked.
        set_gradients(others, {name: each * (1 + 1e-5 * dist.get_rank()) for name, each in whole(seed=1).items()})
        others["tall"].grad = own["tall"]
        others["tall"].requires_grad_(False)
        optimizer_on(others, **shares).step()


def check_gradients_of_what_was_frozen() -> None:
    """They are asked, once, when they are thawed: by then DistributedDataParallel may not know of them."""
    parameters = parameters_of()
    optimizer = optimizer_of(parameters, process_group=dist.group.WORLD)
    parameters["tall"].requires_grad_(False)
    set_gradients(parameters, whole(seed=1))
    with mock.patch("dion2_lightning.optimizer.compare_gradients", wraps=compare_gradients) as compared:
        optimizer.step()
        optimizer.step()
        assert compared.call_count == 1
    own = whole(seed=100 + dist.get_rank())
    parameters["tall"].requires_grad_(True)
    parameters["tall"].grad = own["tall"]
    with pytest.raises(RuntimeError, match=r"'tall' has gradients of norm .* wrap that anew"):
        optimizer.step()


def check_what_one_rank_alone_freezes_later() -> None:
    """What ranks do not share is no other rank's business."""
    for frozen, settings in (("bias", {}), ("tall", {"share_replicas": False})):
        parameters = parameters_of()
        optimizer = optimizer_of(parameters, process_group=dist.group.WORLD, **settings)
        for seed in (1, 2, 3):
            set_gradients(parameters, whole(seed))
            if seed == 2 and dist.get_rank() == 1:
                parameters[frozen].requires_grad_(False)
            optimizer.step()


def check_an_infinite_gradient_in_the_first_step() -> None:
    """Of one rank alone it is left to check_finite."""
    parameters = parameters_of()
    set_gradients(parameters, whole(seed=1))
    if dist.get_rank() == 1:
        parameters["tall"].grad[0, 0] = torch.inf
    optimizer = optimizer_of(parameters, process_group=dist.group.WORLD, check_finite="skip")
    optimizer.step()
    assert optimizer.skipped_steps == 1


def check_a_gradient_that_is_zero_on_one_rank_alone() -> None:
    parameters = parameters_of()
    set_gradients(parameters, whole(seed=1))
    if dist.get_rank() == 1:
        parameters["tall"].grad = torch.zeros_like(parameters["tall"])
    with pytest.raises(RuntimeError, match=r"'tall' has gradients of norm 0 to "):
        optimizer_of(parameters, process_group=dist.group.WORLD).step()


def check_a_sparse_gradient() -> None:
    parameters = parameters_of()
    set_gradients(parameters, whole(seed=1))
    parameters["tall"].grad = parameters["tall"].grad.to_sparse()
    with pytest.raises(ValueError, match=r"'tall' has a gradient stored as torch.sparse_coo; use sparse=False"):
        optimizer_of(parameters, process_group=dist.group.WORLD).step()


def snapshot_of_weights(parameters: Parameters) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def check_a_plain_gradient_of_a_shard(mesh: DeviceMesh) -> None:
    parameters = parameters_of(mesh)
    set_gradients(parameters, whole(seed=1))
    optimizer = optimizer_of(parameters)
    parameters["tall"].grad = whole(seed=1)["tall"]
    with pytest.raises(TypeError, match="'tall' is a DTensor, and its gradient a plain tensor"):
        optimizer.step()


def check_working_memory_that_differs(mesh: DeviceMesh) -> None:
    """It decides in how many buckets matrices travel: an owner of two has two on one rank, and one on the other."""
    for settings in ({}, {"process_group": dist.group.WORLD, "share_replicas": True}):
        parameters = parameters_of(None if settings else mesh)
        optimizer = optimizer_of(parameters, **settings)
        set_gradients(parameters, whole(seed=1))
        optimizer.step()
        if dist.get_rank() == 1:
            optimizer.working_memory = 1
        with pytest.raises(RuntimeError, match="ranks share parameters but disagree about their settings"):
            optimizer.step()


def check_settings_of_groups_on_other_meshes() -> None:
    """The settings of a group on another mesh than the matrices, or on none, are compared too."""
    for make in on_several_meshes():
        parameters = make()
        for name, setting in (("rest", "lr"), ("matrices", "lr")):
            optimizer = optimizer_of(parameters)
            set_gradients(parameters, whole(seed=1))
            optimizer.step()
            if dist.get_rank() == 3:
                [group] = [group for group in optimizer.param_groups if group["name"] == name]
                group[setting] = 0.06
            with pytest.raises(RuntimeError, match="ranks share parameters but disagree about their settings"):
                optimizer.step()
            dist.barrier()


def check_settings_that_differ_on_a_part_of_the_ranks() -> None:
    """All ranks say so at once, also those that share nothing of which anything differs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    expert = nn.Parameter(place(whole(seed=0)["wide"], mesh["ep"], (Shard(0),)))
    dense = nn.Parameter(whole(seed=0)["tall"])
    lr = 0.2 if dist.get_rank() == 1 else 0.1
    groups = [{"params": [("expert", expert)], "lr": lr}, {"params": [("dense", dense)]}]
    optimizer = Dion2(groups, process_group=dist.group.WORLD)
    for parameter in (expert, dense):
        parameter.grad = torch.ones_like(parameter)
    found = "lr is 0.1 on rank 0 and 0.2 on rank 1" if dist.get_rank() < 2 else "Other ranks say what differs"
    with pytest.raises(RuntimeError, match=found):
        optimizer.step()


def check_a_rank_that_does_not_belong_to_the_process_group() -> None:
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match=r"this rank is not in process_group, .* or pass None"):
            Dion2([nn.Parameter(torch.ones(3, 4))], process_group=group)


def check_fractions_on_both_sides_of_the_cost_rule() -> None:
    """At one rank's fraction sharing the work pays, at the other's not; they must still call the same collectives."""
    size = 1024
    for fraction, other in ((1.0, 0.25), (0.25, 1.0)):
        weight = nn.Parameter(torch.zeros(size, size))
        optimizer = Dion2([weight], fraction=fraction, process_group=dist.group.WORLD, orthonormalize_dtype="float32")
        optimizer.orthonormalize = lambda submatrices: submatrices
        weight.grad = torch.ones(size, size)
        optimizer.step()
        if dist.get_rank() == 1:
            optimizer.param_groups[0]["fraction"] = other
        with pytest.raises(RuntimeError, match="ranks share parameters but disagree about their settings"):
            optimizer.step()


def check_replicas_that_round_differently() -> None:
    """Their momenta differ in the last digits; selection and weights do not, and nothing hangs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    parameters = {
        name: nn.Parameter(place(tensor, mesh, (Replicate(), Shard(0)))) for name, tensor in whole(seed=0).items()
    }
    optimizer = optimizer_of(parameters, share_replicas=True)
    for step in range(4):
        equal = torch.ones(12, 20) * (1 + 1e-7 * mesh.get_local_rank("replicas") * torch.randn(12, 20))
        set_gradients(parameters, whole(seed=step) | {"wide": equal})
        optimizer.step()
        for name in ("wide", "tall", "square"):
            mine = torch.cat(
                [optimizer.selection_of(parameters[name]).indices.float(), local_part(parameters[name]).flatten()]
            )
            both = [torch.zeros_like(mine) for _ in range(2)]
            dist.all_gather(both, mine, group=mesh.get_group("replicas"))
            assert torch.equal(*both), name


def check_meshes_without_this_rank() -> None:
    """A rank that is not in a parameter's mesh cannot hold a part of it."""
    mesh = DeviceMesh("cpu", torch.tensor([0, 1]))
    parameters = (
        {name: nn.Parameter(place(tensor, mesh, (Shard(0),))) for name, tensor in whole(seed=0).items()}
        if (dist.get_rank() < 2)
        else {
            name: nn.Parameter(DTensor.from_local(torch.zeros(0), mesh, (Shard(0),), run_check=False))
            for name in SHAPES
        }
    )
    if dist.get_rank() == 2:
        optimizer = Dion2([{"params": [("bias", parameters["bias"])], "algorithm": "adamw"}])
        with pytest.raises(
            ValueError, match=r"parameter 'bias' is on .* to which rank 2 does not belong; leave it out"
        ):
            optimizer.step()
    else:
        optimizer = optimizer_of(parameters)
        set_gradients(parameters, whole(seed=1))
        optimizer.step()


def check_first_steps_that_differ() -> None:
    """Settings that decide which collectives a step calls must be compared before the first of them."""
    mesh = init_device_mesh("cpu", (2,))
    is_second = dist.get_rank() == 1
    replicas = {"process_group": dist.group.WORLD}
    for settings, other in (
        ({}, {"orthonormalize_dtype": "bfloat16"}),
        (replicas, {"share_replicas": True}),
        (replicas, {"betas": (0.5, 0.6)}),
    ):
        parameters = parameters_of(None if settings else mesh)
        optimizer = optimizer_of(parameters, **{**settings, **(other if is_second else {})})
        set_gradients(parameters, whole(seed=1))
        with pytest.raises(RuntimeError, match="ranks share parameters but disagree about their settings"):
            optimizer.step()
    one_less = parameters_of(mesh)
    optimizer = Dion2([one_less["wide"]] if is_second else [one_less["wide"], one_less["tall"]])
    set_gradients(one_less, whole(seed=1))
    with pytest.raises(RuntimeError, match=r"Rank 0 has 2 of the parameters, rank 1 has 1\."):
        optimizer.step()
    check_first_step_at_lr_zero_on_one_rank()


def check_first_step_at_lr_zero_on_one_rank() -> None:
    """All ranks must agree whether the first step only creates state, as for a checkpoint."""
    parameters = parameters_of(init_device_mesh("cpu", (2,)))
    optimizer = optimizer_of(parameters, lr=0.0 if dist.get_rank() == 1 else 0.05)
    set_gradients(parameters, whole(seed=1))
    with pytest.raises(RuntimeError, match="ranks share parameters but disagree about their settings"):
        optimizer.step()


def assert_refuses_until_load(optimizer: Dion2, saved: dict[str, Any]) -> None:
    for refused in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"'matrices', 'rest' may be half updated; load model and optimizer"):
            refused()
    optimizer.load_state_dict(saved)
    optimizer.state_dict()


# Another mesh


def check_redistribution() -> None:
    """The same parameters, redistributed four times during training, as after loading on other ranks."""
    everyone = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "second"))
    placements: list[tuple[DeviceMesh | None, tuple[Any, ...]]] = [
        (everyone, (Shard(0),)),
        (square, (Replicate(), Shard(0))),
        (None, ()),
        (square, (_StridedShard(0, split_factor=2), Shard(0))),
        (everyone, (Replicate(),)),
    ]
    alone = whole_parameters()
    reference = Dion2(groups_of(alone), **SETTINGS)
    parameters: Parameters = {}
    optimizer: Dion2 | None = None
    for phase, (mesh, placed) in enumerate(placements):
        settings = {"process_group": dist.group.WORLD, "share_replicas": True} if mesh is None else {}
        if optimizer is None:
            parameters = {name: nn.Parameter(redistribute(tensor, mesh, placed)) for name, tensor in alone.items()}
            optimizer = Dion2(groups_of(parameters), **SETTINGS)
        else:
            # In turn within the optimizer, as Accelerate does, and through a checkpoint.
            redistribute_all = redistribute_within if phase % 2 else redistribute_by_checkpoint
            parameters, optimizer = redistribute_all(parameters, optimizer, mesh, placed, settings)
        for step in range(2 * phase, 2 * phase + 2):
            for name, gradient in whole_tensors(seed=100 + step).items():
                alone[name].grad = gradient
                parameters[name].grad = redistribute(gradient, mesh, placed)
            optimizer.step()
            reference.step()
            for name in {**MATRICES, **STACKS}:
                compare_step(
                    f"{name} in phase {phase}", parameters[name], optimizer, expected_of(alone[name], reference)
                )
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            local_part(parameter), part_of(alone[name].detach(), parameter), rtol=1e-5, atol=1e-5
        )


def redistribute(tensor: Tensor, mesh: DeviceMesh | None, placements: tuple[Any, ...]) -> Tensor:
    """Like ``DTensor.redistribute``, which does not support strided shards."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    tensor = tensor.detach().clone()
    return tensor if mesh is None or tensor.ndim == 0 else place(tensor, mesh, placements)


def redistribute_state(state: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """Place a state for a parameter: what there is once for a matrix lies whole where a part of the matrix lies."""
    if not isinstance(parameter, DTensor):
        return {entry: redistribute(value, None, ()) for entry, value in state.items()}
    is_stack = "variance" in state and state["variance"].ndim == 3
    placements = {"variance": placements_of_matrices(parameter, is_stack=is_stack) or ()}
    return {
        entry: redistribute(value, parameter.device_mesh, placements.get(entry, parameter.placements))
        for entry, value in state.items()
    }


Redistributed = tuple[Parameters, Dion2]


def redistribute_within(
    parameters: Parameters, optimizer: Dion2, mesh: DeviceMesh | None, placed: tuple[Any, ...], settings: dict[str, Any]
) -> Redistributed:
    redistributed = {
        name: nn.Parameter(redistribute(parameter, mesh, placed)) for name, parameter in parameters.items()
    }
    for group in optimizer.param_groups:
        group["params"] = [redistributed[name] for name in group["param_names"]]
    for name, parameter in parameters.items():
        state = optimizer.state.pop(parameter)
        optimizer.state[redistributed[name]] = redistribute_state(state, redistributed[name])
    optimizer.process_group = settings.get("process_group")
    optimizer.share_replicas = settings.get("share_replicas")
    return redistributed, optimizer


def redistribute_by_checkpoint(
    parameters: Parameters, optimizer: Dion2, mesh: DeviceMesh | None, placed: tuple[Any, ...], settings: dict[str, Any]
) -> Redistributed:
    redistributed = {
        name: nn.Parameter(redistribute(parameter, mesh, placed)) for name, parameter in parameters.items()
    }
    saved = optimizer.state_dict()
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    for key, state in saved["state"].items():
        state.update(redistribute_state(state, redistributed[names[key]]))
    other = Dion2(groups_of(redistributed), **SETTINGS, **settings)
    other.load_state_dict(saved)
    return redistributed, other


# Ranks that fail


def fails(_: Tensor) -> Tensor:
    raise ArithmeticError


def dies(_: Tensor) -> Tensor:
    os._exit(0)


def check_ranks_that_fail() -> None:
    """Three ranks step together, and the last of them fails while submatrices are in flight."""
    cases = [
        ([0, 1, 2], fails, True),
        ([0, 1, 2], fails, False),
        ([0, 1, 3], dies, True),
        ([0, 1, 2], dies, False),
    ]
    groups = [dist.new_group(ranks, timeout=TIMEOUT) for ranks, _, _ in cases]
    alive, survivors = dist.group.WORLD, dist.new_group([0, 1, 2])
    for (ranks, fail, sharded), group in zip(cases, groups, strict=True):
        dist.barrier(alive)  # a rank that started early would run into the timeout
        if dist.get_rank() in ranks:
            check_rank_that_fails(group, fail, sharded)
        if fail is dies:
            alive = survivors


def check_rank_that_fails(group: dist.ProcessGroup, fail: Callable[[Tensor], Tensor], sharded: bool) -> None:
    """The other two must neither wait forever nor continue as if nothing had happened."""
    parameters = parameters_of(DeviceMesh.from_group(group, "cpu") if sharded else None)
    optimizer = optimizer_of(parameters, **({} if sharded else {"process_group": group, "share_replicas": True}))
    set_gradients(parameters, whole(seed=1))
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    fails_here = dist.get_rank(group) == 2
    if fails_here:
        optimizer.orthonormalize = fail
    start = time.monotonic()
    with pytest.raises(ArithmeticError if fails_here else RuntimeError):
        optimizer.step()
    assert time.monotonic() - start < 3 * TIMEOUT.total_seconds()
    assert_refuses_until_load(optimizer, saved)


def check_devices_without_a_backend() -> None:
    """As with CPU offload over NCCL alone; a group without a backend for the CPU stands in for it."""
    group = dist.new_group(backend="cuda:gloo")
    sharded = parameters_of(DeviceMesh.from_group(group, "cpu"))
    replicated = parameters_of()
    for parameters, process_group in ((sharded, None), (replicated, group)):
        optimizer = optimizer_of(parameters, process_group=process_group)
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(ValueError, match=r"'matrices': parameter 'wide' is on 'cpu'.*on 'cuda' only.*'cpu:"):
            optimizer.step()
        assert not optimizer.state


def test_devices_without_a_backend() -> None:
    run_on_ranks(2, check_devices_without_a_backend)


def test_gradients_and_settings_that_differ_between_ranks() -> None:
    run_on_ranks(2, check_gradients_and_settings)


def test_gradients_of_replicated_parts() -> None:
    run_on_ranks(4, check_gradients_of_replicated_parts)


def test_a_gradient_that_a_replica_lacks() -> None:
    run_on_ranks(4, check_a_gradient_that_a_replica_lacks)


def test_settings_of_groups_on_other_meshes() -> None:
    run_on_ranks(4, check_settings_of_groups_on_other_meshes)


def test_a_skipped_step_on_several_meshes() -> None:
    run_on_ranks(4, check_a_skipped_step_on_several_meshes)


def test_a_skipped_step_along_a_chain_of_meshes() -> None:
    run_on_ranks(4, check_a_skipped_step_along_a_chain_of_meshes)


def test_ranks_on_unequally_many_meshes() -> None:
    run_on_ranks(4, check_ranks_on_unequally_many_meshes)


def test_settings_that_differ_on_a_part_of_the_ranks() -> None:
    run_on_ranks(4, check_settings_that_differ_on_a_part_of_the_ranks)


def test_a_rank_that_does_not_belong_to_the_process_group() -> None:
    run_on_ranks(2, check_a_rank_that_does_not_belong_to_the_process_group)


def test_fractions_on_both_sides_of_the_cost_rule() -> None:
    run_on_ranks(2, check_fractions_on_both_sides_of_the_cost_rule)


def test_replicas_that_round_differently() -> None:
    run_on_ranks(4, check_replicas_that_round_differently)


def test_meshes_without_this_rank() -> None:
    run_on_ranks(3, check_meshes_without_this_rank)


def test_first_steps_that_differ() -> None:
    run_on_ranks(2, check_first_steps_that_differ)


def test_redistribution() -> None:
    run_on_ranks(4, check_redistribution)


def test_ranks_that_fail() -> None:
    run_on_ranks(4, check_ranks_that_fail)
