"""Matrices of a stack whose gradient is zero in a step: updated like all others, or left as they are."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dion2_lightning import Dion2, SelectionTracker, build_optimizer
from dion2_lightning.matrices.layout import local
from tests.algorithms.test_blocks import step_with_zero_gradients
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_layouts import CASES, Case, errors_name_case, part_of, place
from tests.test_skipped_steps import assert_equal, step, weights_and_state
from tests.test_skipped_steps import optimizer_of as optimizer_of_every_kind

SETTINGS: dict[str, dict[str, Any]] = {
    "dion2": {"fraction": 0.4},
    "dion2 nesterov, cautious": {"fraction": 0.3, "nesterov": True, "cautious_weight_decay": True},
    "dion2 output, neurons": {"fraction": 0.4, "select": "output", "normalize_neurons": True},
    "dion2 inputs, neurons": {"fraction": 0.4, "normalize_neurons": True, "cautious_weight_decay": True},
    "dion3": {"algorithm": "dion3", "fraction": 0.4},
    "muon": {"fraction": 1.0},
    "dion": {"algorithm": "dion", "rank_fraction": 0.5, "qr": "qr"},
    "dion cautious": {"algorithm": "dion", "rank_fraction": 0.5, "qr": "qr", "cautious_weight_decay": True},
}
COMMON = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
EXPERTS = 4
IDLE: list[set[int]] = [{1}, set(), {0, 3}, {1, 2}, {0, 1, 2, 3}, {2}, {1}, {1, 3}, set()]
"""Which experts are idle, by step."""

Experts = Callable[[Tensor], Sequence[Tensor]]
FORMS: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any], Experts]] = {
    "wide": ((4, 12, 20), {"batched": True}, {}, torch.unbind),
    "stored (in, out)": ((4, 12, 20), {"batched": True, "transposed": True}, {"transposed": True}, torch.unbind),
    "gate|up": ((4, 14, 9), {"batched": True, "splits": "gate 7 | up 7"}, {"splits": "gate 7 | up 7"}, torch.unbind),
    "in two dimensions": ((48, 10), {"splits": "expert 4*12"}, {}, lambda stack: stack.split(12)),
    "in two dimensions, stored (in, out)": (
        (10, 48),
        {"splits": "expert 4*12", "transposed": True},
        {"transposed": True},
        lambda stack: stack.split(12, dim=1),
    ),
    "groups of a convolution": (
        (32, 5, 3),
        {"convolution": True, "splits": "group 4*8"},
        {"convolution": True},
        lambda stack: stack.split(8),
    ),
}


def gradients(shape: tuple[int, ...], seed: int = 1) -> list[Tensor]:
    """One for each step of ``IDLE``, all of it zero in idle experts, and half of it in an active one."""
    generator = torch.Generator().manual_seed(seed)
    experts = experts_of(shape)
    found = []
    for index, idle in enumerate(IDLE):
        gradient = torch.randn(shape, generator=generator) * (1 + index % 3)
        for number, expert in enumerate(experts(gradient)):
            if number in idle:
                expert.zero_()
            elif index > 2 and number == index % EXPERTS:
                expert[..., : expert.shape[-1] // 2] = 0
        found.append(gradient)
    return found


def experts_of(shape: tuple[int, ...]) -> Experts:
    """The experts of one of the forms."""
    return next(experts for its_shape, _, _, experts in FORMS.values() if its_shape == shape)


def state_of_experts(state: dict[str, Tensor], experts: Experts) -> list[list[Tensor]]:
    """What the state of a stack holds of each expert: its momentum, and then all else that steps change."""
    found = [[momentum] for momentum in experts(state["momentum"])]
    for name, each in state.items():
        if name not in ("momentum", "step"):
            for own, its in zip(found, each.view(EXPERTS, -1, each.shape[-1]), strict=True):
                own.append(its)
    return found


def state_of(state: dict[str, Tensor]) -> list[Tensor]:
    """The same of a parameter by itself."""
    others = [each for name, each in state.items() if name not in ("momentum", "step")]
    return [state["momentum"], *others]


def optimizers_of(
    form: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[nn.Parameter, Dion2, list[nn.Parameter], Dion2]:
    """A stack, its experts apart, and their optimizers with the same state."""
    shape, stored, stored_apart, experts = FORMS[form]
    stack = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    own = [nn.Parameter(each.clone()) for each in experts(stack.detach())]
    together = Dion2([{"params": [stack], **stored, **settings}], **COMMON)
    apart = Dion2([{"params": own, **stored_apart, **settings}], **COMMON)
    for optimizer in (together, apart):
        step_with_zero_gradients(optimizer)
    started = state_of_experts(together.state[stack], experts)
    for expert, its_start in zip(own, started, strict=True):  # names decide where Q begins
        for mine, its in zip(state_of(apart.state[expert]), its_start, strict=True):
            mine.copy_(its)
    return stack, together, own, apart


def check_like_experts_apart(
    form: str, settings: dict[str, Any], *, skips: bool, dtype: torch.dtype = torch.float32
) -> None:
    """Where idle experts are skipped, those apart have no gradient; else one of zeros.

    Momenta and selections are the same bit for bit, of Dion within 1e-4, and so is all of an expert that is skipped
    before and after the step.
    """
    shape, _, _, experts = FORMS[form]
    stack, together, own, apart = optimizers_of(form, {**settings, "skip_idle_experts": skips}, dtype)
    is_dion = settings.get("algorithm") == "dion"
    tolerance = 2.0**-6 if dtype == torch.bfloat16 else 1e-4 if is_dion else 1e-5
    blocks = [each.observed.matrices.name for each in together.observed_parameters()]
    moved = set[int]()
    for gradient, idle in zip(gradients(shape), IDLE, strict=True):
        gradient = gradient.to(dtype)
        weights_before = copy.deepcopy(experts(stack.detach()))
        states_before = copy.deepcopy(state_of_experts(together.state[stack], experts))
        stack.grad = gradient
        for number, (expert, its_gradient) in enumerate(zip(own, experts(gradient), strict=True)):
            expert.grad = None if skips and number in idle else its_gradient.clone()
        for optimizer in (together, apart):
            optimizer.step()

        states = state_of_experts(together.state[stack], experts)
        selections = [] if is_dion else selections_of(together, stack, blocks)
        for number, (found, expert) in enumerate(zip(states, own, strict=True)):
            expected = state_of(apart.state[expert])
            if is_dion:
                torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4 * expected[0].abs().max().item())
            else:
                assert torch.equal(found[0], expected[0])
                for mine, its in zip(found[1:], expected[1:], strict=True):
                    torch.testing.assert_close(mine, its, rtol=1e-5, atol=0)
                if not (skips and number in idle):
                    for one, other in zip(selections, selections_of(apart, expert, blocks), strict=True):
                        assert torch.equal(one.view(EXPERTS, -1)[number], other)
            if number in idle:
                is_same = torch.equal(experts(stack.detach())[number], weights_before[number])
                assert is_same or not skips
                moved |= set() if is_same else {number}
                if skips:
                    assert_equal(found, states_before[number])
    assert (moved == set()) == skips
    for weight, expert in zip(experts(stack.detach()), own, strict=True):
        torch.testing.assert_close(weight, expert.detach(), rtol=tolerance, atol=tolerance)


def selections_of(optimizer: Dion2, parameter: Tensor, blocks: list[str]) -> list[Tensor]:
    """Of all blocks of a parameter, or of one by itself."""
    known = {each.observed.matrices.name for each in optimizer.observed_parameters()}
    names = [block if block in known else "" for block in blocks]
    found = [optimizer.selection_of(parameter, name) for name in names]
    return [each.indices for each in found if each is not None]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_idle_experts_are_skipped(form: str, settings: dict[str, Any]) -> None:
    check_like_experts_apart(form, settings, skips=True)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("form", ["wide", "in two dimensions"])
def test_by_default_they_are_updated_like_others(form: str, settings: dict[str, Any]) -> None:
    check_like_experts_apart(form, settings, skips=False)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_weights_in_half_precision(settings: dict[str, Any], skips: bool) -> None:
    check_like_experts_apart("wide", {**settings, "rounding": "nearest"}, skips=skips, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "settings", [*SETTINGS.values(), {**SETTINGS["dion2 nesterov, cautious"], "state_dtype": "bfloat16"}], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_stochastic_rounding_leaves_them_as_they_are(
    form: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tensors are so large that they are worked on part by part."""
    monkeypatch.setattr("dion2_lightning.kernels.rounding.BLOCK", 64)
    shape, stored, _, experts = FORMS[form]
    stack = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = Dion2([{"params": [stack], **stored, **settings}], **COMMON, skip_idle_experts=True, working_memory=1)
    stack.grad = torch.ones_like(stack)
    optimizer.step()
    for gradient, idle in zip(gradients(shape), IDLE, strict=True):
        weights, states = stack.detach(), state_of_experts(optimizer.state[stack], experts)
        before = copy.deepcopy([[weight, *state] for weight, state in zip(experts(weights), states, strict=True)])
        stack.grad = gradient.bfloat16()
        optimizer.step()
        for number, (weight, state) in enumerate(zip(experts(weights), states, strict=True)):
            if number in idle:
                assert_equal([weight, *state], before[number])
            else:
                assert not torch.equal(weight, before[number][0])


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"fraction": 0.25}, {"fraction": 1.0}, {"algorithm": "dion", "rank_fraction": 0.25}, {"algorithm": "adamw"}],
    ids=["dion2", "muon", "dion", "adamw"],
)
def test_how_far_an_idle_expert_moves(settings: dict[str, Any], skips: bool) -> None:
    """By default at full length at every step, however small its momentum; under AdamW less and less."""
    is_adamw = settings.get("algorithm") == "adamw"
    own = {} if is_adamw else {"batched": True, "momentum": 0.9, "skip_idle_experts": skips}
    stack = nn.Parameter(torch.zeros(2, 32, 32))
    optimizer = Dion2([{"params": [stack], **settings, **own}], lr=0.1, weight_decay=0.0)
    lengths = []
    for index in range(60):
        stack.grad = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(index))
        if index >= 10:
            stack.grad[1] = 0
        before = stack.detach().clone()
        optimizer.step()
        lengths.append((stack.detach()[1] - before[1]).square().mean().sqrt().item())
    if is_adamw:
        assert lengths[-1] < 0.1 * lengths[9]
    elif skips:
        assert set(lengths[10:]) == {0.0}
    else:
        for length in lengths[10:]:
            assert length == pytest.approx(0.2 * 0.1, rel=0.15)


def test_no_bit_differs_where_none_is_idle() -> None:
    """Of parameters of every kind."""
    optimizer, control = optimizer_of_every_kind(skip_idle_experts=True), optimizer_of_every_kind()
    for seed in range(3):
        step(optimizer, seed)
        step(control, seed)
        assert_equal(weights_and_state(optimizer), weights_and_state(control))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_together_with_steps_that_are_skipped(settings: dict[str, Any]) -> None:
    """A step with NaN changes nothing, and the others are what they would be without it."""
    shape, stored, _, _ = FORMS["wide"]
    found = []
    for check_finite in (False, "skip"):
        stack = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        group = {"params": [("stack", stack)], "check_finite": check_finite, **stored, **settings}
        optimizer = Dion2([group], **COMMON, skip_idle_experts=True)
        for gradient in gradients(shape):
            if check_finite:
                stack.grad = gradient.clone()
                stack.grad[2, 3, 4] = math.nan
                optimizer.step()
            stack.grad = gradient
            optimizer.step()
        found.append(weights_and_state(optimizer))
        assert optimizer.skipped_steps == (len(IDLE) if check_finite else 0)
    assert_equal(*found)


def test_what_is_no_stack_is_updated_as_ever() -> None:
    """Nor is a weight in blocks of one matrix each; and NaN is a gradient."""
    weights = []
    for skips in (False, True):
        plain, fused, stack = (
            nn.Parameter(torch.ones(8, 12)),
            nn.Parameter(torch.ones(8, 12)),
            nn.Parameter(torch.ones(2, 8, 8)),
        )
        groups = [{"params": [plain]}, {"params": [fused], "splits": "q 4 | k 4"}, {"params": [stack], "batched": True}]
        optimizer = Dion2(groups, lr=0.1, skip_idle_experts=skips)
        for scale in (1.0, 0.0):
            for each in (plain, fused):
                each.grad = scale * torch.arange(96.0).view(8, 12)
            stack.grad = torch.full_like(stack, math.nan) * scale
            before = plain.detach().clone(), fused.detach().clone()
            optimizer.step()
        assert not torch.equal(plain, before[0])
        assert not torch.equal(fused, before[1])
        assert stack.isnan().any(2).any(1).all()
        weights.append([plain.detach(), fused.detach()])
    assert_equal(*weights)


def test_a_stack_without_a_gradient_is_left_out() -> None:
    stack = nn.Parameter(torch.ones(2, 8, 12))
    optimizer = Dion2([{"params": [stack], "batched": True}], lr=0.1, skip_idle_experts=True)
    stack.grad = torch.ones_like(stack)
    optimizer.step()
    before = weights_and_state(optimizer)
    stack.grad = None
    optimizer.step()
    assert_equal(weights_and_state(optimizer), before)


def test_one_group_alone_can_have_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = build_optimizer(model, lr=0.1, overrides={"1.weight": {"skip_idle_experts": True}})
    values = {name: group.get("skip_idle_experts") for group in optimizer.param_groups for name in group["param_names"]}
    assert values == {"0.weight": False, "1.weight": True, "0.bias": None, "1.bias": None}


@pytest.mark.parametrize("value", [1, "yes", None])
def test_bad_values(value: Any) -> None:
    message = f"skip_idle_experts must be True or False, got {value!r}"
    with pytest.raises(TypeError, match=message):
        Dion2([nn.Parameter(torch.ones(4, 4))], lr=0.1, skip_idle_experts=value)
    with pytest.raises(TypeError, match=message):
        build_optimizer(nn.Linear(4, 4), lr=0.1, skip_idle_experts=value)


@pytest.mark.filterwarnings("ignore::dion2_lightning.SelectionWarning")
def test_metrics_of_dion_leave_them_out() -> None:
    """They are those of the experts apart; the update's root mean square is over all entries, and zero in idle ones."""
    stack, together, own, apart = optimizers_of("wide", {**SETTINGS["dion"], "skip_idle_experts": True})
    trackers = [SelectionTracker(every=1) for _ in range(2)]
    for tracker, optimizer in zip(trackers, (together, apart), strict=True):
        tracker.attach(optimizer)
    for gradient, idle in zip(gradients((4, 12, 20)), IDLE, strict=True):
        stack.grad = gradient
        for number, expert in enumerate(own):
            expert.grad = None if number in idle else gradient[number].clone()
        for optimizer in (together, apart):
            optimizer.step()
        popped = [tracker.pop_metrics() for tracker in trackers]
        found, expected = (each.overall for each in popped if each is not None)
        active = (EXPERTS - len(idle)) / EXPERTS
        assert found["update_rms"] == pytest.approx(expected.get("update_rms", 0.0) * active**0.5, rel=1e-3)
        for name in ("captured_energy", "subspace_turn", "rank_use"):
            assert (name in found) == (name in expected) == (active > 0)
            assert not active or found[name] == pytest.approx(expected[name], rel=1e-3), name


# Several ranks

KINDS_OF_SHARDS = {
    (form, name): SETTINGS[name]
    for form in ("wide", "stored (in, out)", "gate|up", "in two dimensions")
    for name in ("dion2 nesterov, cautious", "dion2 inputs, neurons", "dion3", "dion")
}


def check_sharded(case: Case, dtype: torch.dtype, **of_run: Any) -> None:
    """Every rank trains whole stacks too, by itself, and compares its parts."""
    names = ("first", "second")[: len(case.mesh)]
    mesh = DeviceMesh("cpu", torch.arange(math.prod(case.mesh)).view(case.mesh), mesh_dim_names=names)
    alone, spread = dict[tuple[str, str], nn.Parameter](), dict[tuple[str, str], nn.Parameter]()
    groups: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for (form, name), settings in KINDS_OF_SHARDS.items():
        shape, stored, _, _ = FORMS[form]
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        placements = (case.stacks or case.placements) if len(shape) == 3 else case.placements
        alone[form, name] = nn.Parameter(start)
        spread[form, name] = nn.Parameter(place(start, mesh, placements))
        for its_groups, each in zip(groups, (alone, spread), strict=True):
            its_groups.append({"params": [(f"{form}, {name}", each[form, name])], **stored, **settings})
    common = {**COMMON, "skip_idle_experts": True, "orthonormalize_dtype": "float32"}
    reference, optimizer = Dion2(groups[0], **common), Dion2(groups[1], **common, **of_run)
    of_forms = {form: gradients(FORMS[form][0]) for form, _ in KINDS_OF_SHARDS}
    for index in range(7):
        for (form, _), whole, part in zip(KINDS_OF_SHARDS, alone.values(), spread.values(), strict=True):
            whole.grad = of_forms[form][index].to(dtype)
            part.grad = place(whole.grad, mesh, part.placements)
        reference.step()
        optimizer.step()
        for kind, whole in alone.items():
            with errors_name_case(f"{kind}, {dtype}, step {index}"):
                compare_part(spread[kind], optimizer, whole, reference)


def compare_part(spread: nn.Parameter, optimizer: Dion2, whole: nn.Parameter, reference: Dion2) -> None:
    is_dion = any(name.startswith("Q") for name in reference.state[whole])
    tolerance = 1e-4 if is_dion else 1e-5
    for name, expected in reference.state[whole].items():
        state = optimizer.state[spread][name]
        found, part = local(state), part_of(expected, state)
        if name.startswith("Q"):
            found = found * (found * part).sum(-2, keepdim=True).sign()  # a QR may choose either
        if is_dion or name == "variance":
            assert torch.linalg.norm(found - part) <= tolerance * torch.linalg.norm(expected), name
        else:
            assert torch.equal(found, part), name
    found, part = local(spread).detach(), part_of(whole.detach(), spread)
    if spread.dtype == torch.float32:
        torch.testing.assert_close(found, part, rtol=tolerance, atol=tolerance)
    else:  # with the same random bits: of Dion the other way only where float32 is at the edge
        assert (found != part).sum() <= (0.03 * whole.numel() if is_dion else 0)


def check_layouts(names: list[str]) -> None:
    for name in names:
        for share_replicas, dtype in ((True, torch.float32), (True, torch.bfloat16), (False, torch.float32)):
            if share_replicas or CASES[name].has_replicas:
                with errors_name_case(f"{name}, share_replicas={share_replicas}"):
                    check_sharded(CASES[name], dtype, share_replicas=share_replicas)


def check_messages() -> None:
    """No more of them than without the setting, and the experts' counts are all that they have more."""
    mesh = init_device_mesh("cpu", (2,))
    for settings in (SETTINGS["dion2"], SETTINGS["dion"]):
        sent = []
        for skips in (False, True):
            stack = nn.Parameter(place(torch.ones(4, 12, 20), mesh, (Shard(1),)))
            group = {"params": [stack], "batched": True, **settings, "skip_idle_experts": skips}
            optimizer = Dion2([group], lr=0.1)
            optimizer.step()  # compares the settings of ranks
            stack.grad = place(gradients((4, 12, 20))[0], mesh, (Shard(1),))
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
                optimizer.step()
            sent.append([call.args[0].numel() for call in reduced.call_args_list])
        first, *others = sent[0]
        assert sent[1] == [first + 4, *others]


def check_gradients_of_one_rank() -> None:
    """The other has none, which counts as zero there; what is idle on one rank alone is not idle."""
    mesh = init_device_mesh("cpu", (2,))
    for settings in (SETTINGS["dion2"], SETTINGS["dion3"], SETTINGS["dion"]):
        start = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(0))
        alone, spread = nn.Parameter(start), nn.Parameter(place(start, mesh, (Shard(1),)))
        group = {"batched": True, **settings, "skip_idle_experts": True}
        optimizers = [Dion2([{"params": [("stack", each)], **group}], **COMMON) for each in (spread, alone)]
        for gradient in gradients((4, 12, 20)):
            gradient[:, 6:] = 0
            alone.grad = gradient
            spread.grad = place(gradient, mesh, (Shard(1),)) if dist.get_rank() == 0 else None
            for optimizer in optimizers:
                optimizer.step()
        assert isinstance(spread, DTensor)
        torch.testing.assert_close(local(spread).detach(), part_of(alone.detach(), spread), rtol=1e-4, atol=1e-4)


def check_replicas_of_dion_that_differ() -> None:
    """Each with gradients of its own: what is idle on one alone is not idle, and all have the same weights."""
    stack = nn.Parameter(torch.randn(4, 32, 24, generator=torch.Generator().manual_seed(0)))
    group = {"params": [stack], "batched": True, "algorithm": "dion", "sync": "compressed", "rank_fraction": 0.25}
    optimizer = Dion2([group], **COMMON, skip_idle_experts=True, process_group=dist.group.WORLD)
    rank = dist.get_rank()
    for number in range(3):
        before = copy.deepcopy([stack.detach(), *state_of(optimizer.state[stack])]) if number else []
        stack.grad = torch.randn(4, 32, 24, generator=torch.Generator().manual_seed(10 * rank + number))
        stack.grad[1 + (rank + number) % 2] = 0  # idle here alone
        stack.grad[3] = 0  # idle on both
        optimizer.step()
        for old, new in zip(before, [stack.detach(), *state_of(optimizer.state[stack])], strict=bool(before)):
            assert torch.equal(new[3], old[3])
            assert not any(torch.equal(new[active], old[active]) for active in range(3))
    weights = [torch.empty_like(stack) for _ in range(2)]
    dist.all_gather(weights, stack.detach())
    assert torch.equal(*weights)


def check_two_ranks() -> None:
    check_layouts(["FSDP2 on 2", "FSDP2 on 2, stacks by rows", "TP on 2, row-wise"])
    check_messages()
    check_gradients_of_one_rank()
    check_replicas_of_dion_that_differ()


def test_on_two_ranks() -> None:
    run_on_ranks(2, check_two_ranks)


def test_on_replicas_of_shards() -> None:
    run_on_ranks(4, check_layouts, ["HSDP 2 x 2", "HSDP 2 x 2, by columns"], seconds=200)


def check_buckets_of_normalized_neurons() -> None:
    """Experts of one stack travel in several buckets, not in their order: each keeps its own gate."""
    mesh = init_device_mesh("cpu", (3,))
    for shape in ((4, 8, 1), (7, 8, 6)):
        stack = nn.Parameter(torch.randn(shape, generator=torch.manual_seed(0)))
        spread = nn.Parameter(place(stack.detach(), mesh, (Shard(1),)))
        other, its_spread = nn.Parameter(torch.ones(40, 15)), nn.Parameter(place(torch.ones(40, 15), mesh, (Shard(1),)))
        optimizers = [
            Dion2(
                [
                    {"params": [("experts", experts)], "batched": True, "normalize_neurons": True},
                    {"params": [("other", matrix)]},
                ],
                **COMMON,
                skip_idle_experts=True,
                orthonormalize_dtype="float32",
                **({} if memory is None else {"working_memory": memory}),
            )
            for experts, matrix, memory in ((stack, other, None), (spread, its_spread, 1))
        ]
        other.grad, its_spread.grad = torch.ones(40, 15), place(torch.ones(40, 15), mesh, (Shard(1),))
        for idle in ([], [3], [0, 2]):
            stack.grad = torch.randn(shape, generator=torch.manual_seed(len(idle)))
            stack.grad[idle] = 0.0
            spread.grad = place(stack.grad, mesh, (Shard(1),))
            for optimizer in optimizers:
                optimizer.step()
            variances = [each.state[p]["variance"] for each, p in zip(optimizers, (stack, spread), strict=True)]
            for whole, part in (variances, (stack.detach(), spread.detach())):
                torch.testing.assert_close(local(part), part_of(whole, part), rtol=1e-5, atol=1e-5)


def test_buckets_of_normalized_neurons() -> None:
    run_on_ranks(3, check_buckets_of_normalized_neurons)
