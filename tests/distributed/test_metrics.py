"""The metrics of one process, whatever the layout: every metric of every parameter, at every step."""

import copy
import math
import warnings
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode

from dion2_lightning import Dion2, SelectionMetrics, SelectionTracker, SelectionWarning
from tests.distributed import test_dion_layouts as dion
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import (
    CASES,
    Case,
    errors_name_case,
    groups_of,
    place,
    sharded,
    whole_parameters,
    whole_tensors,
)

STEPS = 6
OF_SUBSPACES = ("captured_energy", "subspace_turn", "rank_use")
SETTINGS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "orthonormalize_dtype": "float32"}


def metrics_of(
    parameters: dict[str, nn.Parameter], *, of_dion: bool = False, **settings: Any
) -> tuple[list[SelectionMetrics], dict[str, Any]]:
    """Metrics of every second step; the tracker is resumed in the middle."""
    if of_dion:
        optimizer = dion.optimizer_of(parameters, **settings)
    else:
        optimizer = Dion2(groups_of(parameters), **SETTINGS, **settings)
    tracker = SelectionTracker(every=2, window=3, orthogonality=True)
    tracker.attach(optimizer)
    metrics = []
    for step in range(STEPS):
        for name, gradient in whole_tensors(seed=100 + step).items():
            parameter: Any = parameters[name]
            is_spread = hasattr(parameter, "device_mesh")
            parameter.grad = place(gradient, parameter.device_mesh, parameter.placements) if is_spread else gradient
        if step == 3:
            parameters["wide"].grad = None
        if step == 4:
            saved = copy.deepcopy(tracker.state_dict())
            tracker.detach()
            tracker = SelectionTracker(every=2, window=3, orthogonality=True)
            tracker.load_state_dict(saved)
            tracker.attach(optimizer)
        optimizer.step()
        with CommDebugMode() as collectives:
            found = tracker.pop_metrics()
        assert collectives.get_total_counts() <= (0 if found is None else 1)
        if found is not None:
            metrics.append(found)
    return metrics, tracker.state_dict()


def assert_same(found: SelectionMetrics, expected: SelectionMetrics) -> None:
    assert found.step == expected.step
    pairs = [(found.overall, expected.overall)]
    pairs += [(found.groups[name], expected.groups[name]) for name in expected.groups]
    pairs += [(found.parameters[name], expected.parameters[name]) for name in expected.parameters]
    for values, expected_values in pairs:
        assert list(values) == list(expected_values)
        for name, value in expected_values.items():
            # Only float sums are rounded differently under other layouts.
            of_updates = name in ("update_rms", "variance_spread", "orthogonality_error", *OF_SUBSPACES)
            is_rounded = of_updates or name in ("captured_mass", "imbalance")
            tolerance = 1e-4 if of_updates else 1e-12
            same = (
                math.isclose(values[name], value, rel_tol=tolerance, abs_tol=1e-5 if name in OF_SUBSPACES else 1e-7)
                if is_rounded
                else values[name] == value
            )
            assert same, (name, values[name], value)


@cache
def metrics_alone(*, of_dion: bool) -> tuple[list[SelectionMetrics], dict[str, Any]]:
    """Those of one process, with which all layouts are compared."""
    return metrics_of(whole_parameters(), of_dion=of_dion, **({"qr": "qr"} if of_dion else {}))


def check(name: str, parameters: dict[str, nn.Parameter], **settings: Any) -> None:
    with warnings.catch_warnings(), errors_name_case(name):
        warnings.simplefilter("ignore", SelectionWarning)
        expected, expected_state = metrics_alone(of_dion=False)
        found, state = metrics_of(parameters, **settings)
        for metrics, expected_metrics in zip(found, expected, strict=True):
            assert_same(metrics, expected_metrics)
        for key, counts in expected_state["counts"].items():
            for entry, value in counts.items():
                assert torch.equal(state["counts"][key][entry], value), (key, entry)
        assert torch.equal(state["history"]["shares"], expected_state["history"]["shares"])


def check_of_dion(name: str, parameters: dict[str, nn.Parameter], **settings: Any) -> None:
    """The same for Dion; Q starts alike on every layout."""
    with warnings.catch_warnings(), errors_name_case(f"Dion, {name}"):
        warnings.simplefilter("ignore", SelectionWarning)
        expected, expected_state = metrics_alone(of_dion=True)
        found, state = metrics_of(parameters, of_dion=True, **settings)
        for metrics, expected_metrics in zip(found, expected, strict=True):
            assert_same(metrics, expected_metrics)
        for key, counts in expected_state["counts"].items():
            assert torch.equal(state["counts"][key]["hits"], counts["hits"])


def check_messages_of_dion() -> None:
    """A step with metrics has one more for each way to hold a matrix, of (2 r)^2 + 2 entries a matrix."""
    mesh = init_device_mesh("cpu", (2,))
    weights = [nn.Parameter(place(torch.zeros(shape), mesh, (Shard(0),))) for shape in ((96, 24), (24, 96))]
    optimizer = Dion2([{"params": weights, "algorithm": "dion"}], lr=0.1)
    tracker = SelectionTracker(every=2)
    sent = []
    for step in range(4):
        if step == 1:  # the first step compares settings
            tracker.attach(optimizer)
        for weight in weights:
            weight.grad = place(torch.randn(weight.shape), mesh, (Shard(0),))
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as calls:
            optimizer.step()
        sent.append((calls.call_count, sum(call.args[0].numel() for call in calls.call_args_list)))
        tracker.pop_metrics()
    assert sent[1] == sent[3]
    assert (sent[2][0] - sent[1][0], sent[2][1] - sent[1][1]) == (2, 2 * (2 + 12**2))


def check_all_layouts(ranks: int) -> None:
    for name, case in CASES.items():
        if math.prod(case.mesh) == ranks and case.order is None:
            check(name, sharded(case), share_replicas=True if case.has_replicas else None)
            check_of_dion(name, sharded(case))
    check_of_dion("DDP", whole_parameters(), process_group=dist.group.WORLD)
    if ranks == 2:
        check_messages_of_dion()
    for share_replicas in (True, False):
        parameters = whole_parameters()
        check(
            f"DDP on {ranks}, share_replicas={share_replicas}",
            parameters,
            process_group=dist.group.WORLD,
            share_replicas=share_replicas,
        )
    if ranks == 4:
        check("HSDP 2 x 2, no work shared", sharded(CASES["HSDP 2 x 2"]), share_replicas=False)


def test_metrics_on_two_ranks() -> None:
    run_on_ranks(2, check_all_layouts, 2)


def test_metrics_on_four_ranks() -> None:
    run_on_ranks(4, check_all_layouts, 4)


def check_rank_without_experts() -> None:
    """Four experts over three ranks: the last rank holds none."""
    mesh = init_device_mesh("cpu", (3,))
    whole = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    alone, spread = nn.Parameter(whole.clone()), nn.Parameter(place(whole, mesh, (Shard(0),)))
    metrics = []
    for parameter in (alone, spread):
        optimizer = Dion2([{"params": [("experts", parameter)], "batched": True}], **SETTINGS)
        tracker = SelectionTracker(every=1)
        tracker.attach(optimizer)
        parameter.grad = whole if parameter is alone else place(whole, mesh, (Shard(0),))
        optimizer.step()
        metrics.append(tracker.pop_metrics())
    assert_same(metrics[1], metrics[0])


def check_warnings() -> None:
    """Only the first rank warns."""
    parameters = sharded(Case((2,), CASES["FSDP2 on 2"].placements))
    optimizer = Dion2(groups_of(parameters), **SETTINGS)
    tracker = SelectionTracker(every=1)
    tracker.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            tracker.pop_metrics()
    found = [each for each in caught if each.category is SelectionWarning]
    assert bool(found) == (dist.get_rank() == 0)


def test_warnings_come_from_one_rank() -> None:
    run_on_ranks(2, check_warnings)


def test_rank_without_experts() -> None:
    run_on_ranks(3, check_rank_without_experts)
