"""Kernels of convolutions: what a slice is, groups, transposed ones, and memory orders."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion2_lightning import Dion2
from dion2_lightning.algorithms.algorithm import StepContext
from dion2_lightning.algorithms.low_rank import FACTOR_COPIES, LowRankUpdate
from dion2_lightning.matrices.parts import Part
from tests.algorithms.test_blocks import COMMON, SETTINGS, gradients, step_with_zero_gradients
from tests.reference import polar

STEPS = 8


def kernel_gradients(shape: tuple[int, ...]) -> list[Tensor]:
    """Gradients whose filters and channels differ in size."""
    flat = [each.view(shape) for each in gradients((shape[0] * shape[1], math.prod(shape[2:])), STEPS)]
    return [each * (1 + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)) % 3) for each in flat]


def run(weights: list[nn.Parameter], entries: dict[str, Any], steps: list[list[Tensor]]) -> Dion2:
    optimizer = Dion2([{"params": weights, **entries}], **COMMON)
    for of_step in steps:
        for weight, gradient in zip(weights, of_step, strict=True):
            weight.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return optimizer


def near(found: Tensor, expected: Tensor, is_dion: bool = False) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4 if is_dion else 1e-5, atol=1e-4 if is_dion else 1e-5)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", [(12, 5, 3), (12, 5, 3, 3), (8, 4, 2, 2, 2)])
def test_a_kernel_is_the_matrix_it_is_reshaped_to(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    """Where outputs are selected, or nothing is: a filter is a row."""
    start = torch.randn(shape, generator=torch.manual_seed(0))
    kernel, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    steps = [[gradient] for gradient in kernel_gradients(shape)]
    found = run([kernel], {"convolution": True, **settings}, steps)
    expected = run([matrix], settings, [[gradient.flatten(1)] for (gradient,) in steps])
    if settings.get("algorithm") != "dion":
        selection, of_matrix = found.selection_of(kernel), expected.selection_of(matrix)
        assert selection is not None and of_matrix is not None
        assert selection.axis == of_matrix.axis == 0 and torch.equal(selection.indices, of_matrix.indices)
    assert torch.equal(found.state[kernel]["momentum"].flatten(1), expected.state[matrix]["momentum"])
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_input_slice_is_a_channel_with_all_its_taps(transposed: bool, memory_format: torch.memory_format) -> None:
    """Against plain loops in float64: the channels are ranked, and what is orthonormalized has all taps of them."""
    out_size, in_size, kernel_size = (28, 4, (3, 2)) if not transposed else (4, 28, (3, 2))
    # The shorter axis is that of 4 channels with 6 taps each, 24 of 28.
    shape = (out_size, in_size, *kernel_size) if not transposed else (in_size, out_size, *kernel_size)
    start = torch.randn(shape, generator=torch.manual_seed(0))
    weight = nn.Parameter(start.clone().to(memory_format=memory_format))
    optimizer = Dion2(
        [{"params": [weight], "convolution": True, "transposed": transposed}],
        lr=0.02,
        weight_decay=0.1,
        momentum=0.9,
        fraction=0.5,
        orthonormalize_dtype="float32",
    )
    reference, momentum = start.double(), torch.zeros(shape, dtype=torch.float64)
    for gradient in kernel_gradients(shape):
        weight.grad = gradient.clone().to(memory_format=memory_format)
        optimizer.step()
        momentum = momentum + gradient.double()
        norms = [float(momentum[:, channel].abs().sum()) for channel in range(4)]
        chosen = sorted(sorted(range(4), key=lambda channel: -norms[channel])[:2])
        selection = optimizer.selection_of(weight)
        assert selection is not None
        assert (selection.axis, selection.indices.tolist()) == (0 if transposed else 1, chosen)
        update = polar(momentum[:, chosen].flatten(1))
        reference = reference * (1 - 0.02 * 0.1)
        scale = 0.2 * math.sqrt(28) * math.sqrt(2)
        reference[:, chosen] -= 0.02 * scale * update.view(28, 2, *kernel_size)
        momentum[:, chosen] *= 0.9
    near(optimizer.state[weight]["momentum"], momentum.float())
    moved, expected = weight.detach().double() - start, reference - start
    assert torch.linalg.norm(moved - expected) < 1e-4 * torch.linalg.norm(expected)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("transposed", [False, True])
def test_groups_apart_are_one_grouped_kernel(transposed: bool, settings: dict[str, Any]) -> None:
    shape, groups = (24, 5, 3), 4
    start = torch.randn(shape, generator=torch.manual_seed(0))
    one = nn.Parameter(start.clone())
    apart = [nn.Parameter(each.clone()) for each in start.chunk(groups)]
    stored = {"convolution": True, "transposed": transposed, **settings}
    splits = f"group 4*6{' along inputs' if transposed else ''}"
    grouped = Dion2([{"params": [one], "splits": splits, **stored}], **COMMON)
    separate = Dion2([{"params": [each], **stored} for each in apart], **COMMON)
    is_dion = settings.get("algorithm") == "dion"
    if is_dion:
        step_with_zero_gradients(grouped)
        step_with_zero_gradients(separate)
        for each, q in zip(apart, grouped.state[one]["Q[group]"], strict=True):
            separate.state[each]["Q"].copy_(q)
    for gradient in kernel_gradients(shape):
        one.grad = gradient
        for each, its_gradient in zip(apart, gradient.chunk(groups), strict=True):
            each.grad = its_gradient.clone()
        grouped.step()
        separate.step()
        momenta = [separate.state[each]["momentum"] for each in apart]
        if is_dion:
            near(grouped.state[one]["momentum"], torch.cat(momenta), is_dion)
            continue
        assert torch.equal(grouped.state[one]["momentum"], torch.cat(momenta))
        selections = [separate.selection_of(each) for each in apart]
        found = grouped.selection_of(one, "group")
        assert found is not None
        assert torch.equal(found.indices, torch.stack([each.indices for each in selections if each is not None]))
    near(one.detach(), torch.cat([each.detach() for each in apart]), is_dion)


@pytest.mark.parametrize("name", ["dion2", "dion3", "dion"])
def test_kernels_of_one_shape_together_are_each_alone(name: str) -> None:
    shape = (10, 4, 3, 3)
    starts = [torch.randn(shape, generator=torch.manual_seed(seed)) for seed in range(3)]
    steps = [kernel_gradients(shape), [each.flip(0) for each in kernel_gradients(shape)], kernel_gradients(shape)[::-1]]
    together = [nn.Parameter(start.clone()) for start in starts]
    entries = {"convolution": True, **SETTINGS[name]}
    optimizer = run(together, entries, [list(each) for each in zip(*steps, strict=True)])
    for place, (start, its_steps) in enumerate(zip(starts, steps, strict=True)):
        alone = nn.Parameter(start.clone())
        by_itself = Dion2([{"params": [alone], **entries}], **COMMON)
        if name == "dion":  # places in the group decide where Q begins
            step_with_zero_gradients(by_itself)
            fresh = Dion2([{"params": [nn.Parameter(each.clone()) for each in starts], **entries}], **COMMON)
            step_with_zero_gradients(fresh)
            by_itself.state[alone]["Q"].copy_(fresh.state[fresh.param_groups[0]["params"][place]]["Q"])
        for gradient in its_steps:
            alone.grad = gradient.clone()
            by_itself.step()
        near(by_itself.state[alone]["momentum"], optimizer.state[together[place]]["momentum"], name == "dion")
        near(alone.detach(), together[place].detach(), name == "dion")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((12, 5, 3, 3), {}),
        ((28, 4, 3, 2), {"normalize_neurons": True}),
        ((4, 6, 3, 2), {"transposed": True, "algorithm": "dion3"}),
        ((28, 4, 3, 2), {"algorithm": "dion", "rank_fraction": 0.5}),
        ((4, 6, 3, 2), {"transposed": True, "algorithm": "dion", "rank_fraction": 0.5}),
    ],
)
def test_mixed_memory_orders_give_the_same(
    shape: tuple[int, ...], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """Whatever the orders of weight, gradient and momentum: a checkpoint or a cast may change each, also in a run."""
    formats = (torch.contiguous_format, torch.channels_last)
    results = []
    for of_weight in formats:
        for of_gradient in formats:
            for of_momentum in formats:
                start = torch.randn(shape, generator=torch.manual_seed(0)).to(dtype)
                weight = nn.Parameter(start.to(memory_format=of_weight))
                optimizer = Dion2([{"params": [("w", weight)], "convolution": True, **settings}], **COMMON)
                step_with_zero_gradients(optimizer)
                state = optimizer.state[weight]
                state["momentum"] = state["momentum"].to(memory_format=of_momentum)
                for step, gradient in enumerate(kernel_gradients(shape)):
                    weight.grad = gradient.to(dtype).to(memory_format=of_gradient)
                    if step == STEPS // 2:
                        weight.data = weight.data.contiguous()
                        weight.grad = weight.grad.contiguous()
                    optimizer.step()
                results.append(weight.detach().float())
                assert optimizer.state[weight]["momentum"].is_contiguous(memory_format=of_momentum)
    for result in results:
        tolerance = (1e-5 if settings.get("algorithm") != "dion" else 1e-4) if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(result, results[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (64, 4, 3), (4, 16, 3)])
def test_the_rank_of_dion_is_that_of_q(shape: tuple[int, ...], transposed: bool) -> None:
    """Also where the longer axis is that of channels with all their taps."""
    stored = {"algorithm": "dion", "convolution": True, "transposed": transposed}
    optimizer = run([weight := nn.Parameter(torch.ones(shape))], stored, [[torch.ones(shape)]])
    [member] = optimizer._members()
    [update] = LowRankUpdate.read(member, StepContext())
    assert update.rank == optimizer.state[weight]["Q"].shape[-1]
    assert update.working_bytes == FACTOR_COPIES * 4 * update.rank * (update.slices + update.entries)


@pytest.mark.parametrize("algorithm", ["dion2", "dion3", "dion"])
@pytest.mark.parametrize("dims", [1, 2])
def test_a_kernel_of_one_tap_that_lies_transposed(dims: int, algorithm: str) -> None:
    """As that of a pointwise convolution that was made of a linear layer's weight."""
    start = torch.randn(17, 12, generator=torch.Generator().manual_seed(0)).t()[(..., *[None] * dims)]
    shape = tuple(start.shape)
    weights = [nn.Parameter(start), nn.Parameter(start.clone(memory_format=torch.contiguous_format))]
    assert not weights[0].is_contiguous()
    for weight in weights:
        run([weight], {"convolution": True, "algorithm": algorithm}, [[each] for each in kernel_gradients(shape)])
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_channels_last_copies_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight, gradient and momentum are views."""
    weight = nn.Parameter(torch.randn(12, 5, 3, 3).to(memory_format=torch.channels_last))
    optimizer = Dion2([{"params": [weight], "convolution": True}], lr=0.1)
    read = Part.read
    shared: list[bool] = []

    def noting(part: Part, tensor: Tensor, **order: bool) -> Tensor:
        shared.append(read(part, tensor, **order).data_ptr() == tensor.data_ptr())
        return read(part, tensor, **order)

    monkeypatch.setattr(Part, "read", noting)
    monkeypatch.delattr(Part, "write")
    before = weight.detach().clone()
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert len(shared) == 4 and all(shared) and not torch.equal(weight, before)
    assert optimizer.state[weight]["momentum"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "entries", "message"),
    [
        ((12, 4, 3, 3), {}, "is not a matrix, .*for a convolution set convolution=True"),
        ((12, 4), {"convolution": True}, r"is not the kernel of a convolution \(out, in, taps, ...\)"),
        ((12, 4, 3), {"convolution": True, "batched": True}, "cannot be batched and a convolution"),
        ((12, 4, 3), {"convolution": True, "splits": "group 5*2"}, "is 10 outputs, and the weight has 12"),
        ((12, 4, 3), {"convolution": True, "splits": "a 6 | b 6 along inputs"}, "is not made of its first axis"),
        ((12, 4, 3), {"convolution": True, "splits": "2 x (a 3 | b 3)"}, "is not made of its first axis"),
        ((12, 4, 3), {"convolution": True, "splits": "a 2 | b 2 along inputs"}, "is not made of its first axis"),
        ((12, 4, 3), {"convolution": True, "splits": "a 3 | b 3"}, "the weight has 12; its blocks must sum to that$"),
        ((12, 4), {"batched": True}, r"is not a stack of matrices .*; where its rows are those of several, say so"),
        ((3, 12, 4), {"batched": True, "splits": "a 2*6"}, "a stack of matrices cannot be split into stacks"),
        ((12, 4), {"splits": "q 6 | k 5"}, "is not what its splits say: 'q 6 | k 5' is 11 outputs"),
    ],
)
def test_bad_input(shape: tuple[int, ...], entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^group 'mine': parameter 'w' of shape .*{message}"):
        Dion2([{"params": [("w", nn.Parameter(torch.ones(shape)))], "name": "mine", **entries}], lr=0.1)


@pytest.mark.parametrize("algorithm", ["dion2", "dion"])
@pytest.mark.parametrize("shape", [(12, 1, 10), (12, 6, 1, 4), (12, 6, 4, 1)], ids=str)
def test_kernels_whose_axes_lie_in_memory_in_another_order(shape, algorithm):
    """As those that come from other frameworks: (taps, in, out) there. What is read of some of them is a view."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    results = []
    for order in (range(len(shape)), range(len(shape) - 1, -1, -1)):
        weight = nn.Parameter(values.permute(*order).contiguous().permute(*order).clone())
        optimizer = Dion2([{"params": [weight], "algorithm": algorithm, "convolution": True}], lr=0.1)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        results.append(weight.detach().contiguous())
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
