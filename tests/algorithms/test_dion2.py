"""The update against an independent float64 reference."""

import itertools
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from dion2_lightning import Dion2
from dion2_lightning.algorithms import passes, working_memory
from dion2_lightning.algorithms.matrix_update import MatrixUpdate
from dion2_lightning.matrices.splits import Block, blocks_of
from tests.reference import Reference

SHAPES = {
    "wide": {"shape": (24, 96)},
    "tall": {"shape": (96, 24)},
    "square": {"shape": (40, 40)},
    "odd": {"shape": (37, 53)},
    "odd tall": {"shape": (53, 37)},
    "row": {"shape": (1, 33)},
    "column": {"shape": (33, 1)},
    "transposed wide": {"shape": (96, 24), "transposed": True},
    "transposed tall": {"shape": (24, 96), "transposed": True},
    "transposed square": {"shape": (40, 40), "transposed": True},
    "batched": {"shape": (3, 20, 36), "batched": True},
    "batched tall": {"shape": (3, 36, 20), "batched": True},
    "batched transposed": {"shape": (3, 36, 20), "batched": True, "transposed": True},
    "batched transposed tall": {"shape": (3, 20, 36), "batched": True, "transposed": True},
}
LARGE_SHAPES = {  # at a quarter, all have the 32 slices from which bfloat16 is used
    "wide": {"shape": (128, 192)},
    "tall": {"shape": (192, 128)},
    "square": {"shape": (144, 144)},
    "odd": {"shape": (131, 197)},
    "transposed wide": {"shape": (192, 128), "transposed": True},
    "batched": {"shape": (2, 128, 160), "batched": True},
    "batched transposed tall": {"shape": (2, 128, 160), "batched": True, "transposed": True},
}
STEPS = 12
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def matrices(tensor: Tensor, transposed: bool) -> list[Tensor]:
    """The (out, in) matrices of a parameter."""
    stack = tensor if tensor.ndim == 3 else tensor[None]
    return [matrix.T if transposed else matrix for matrix in stack]


def gradients(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """Gradients whose slices differ in size, so that no slice is selected every time."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[-2], 1, generator=generator) + torch.rand(1, shape[-1], generator=generator)
    return [torch.randn(shape, generator=generator) * scale for _ in range(STEPS)]


def check(
    shape: tuple[int, ...],
    *,
    batched: bool = False,
    transposed: bool = False,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    algorithm: str = "dion2",
    **settings,
):
    """Compare selection and momentum exactly at every step, variances too, and the total update at the end."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(shape)
    parameter = torch.nn.Parameter(weight.to(device))
    start = matrices(weight.double(), transposed)
    group = {"params": [parameter], "batched": batched, "transposed": transposed, "algorithm": algorithm}
    optimizer = Dion2([group], lr=0.02, orthonormalize_dtype=dtype, rounding="nearest", **settings)
    names = {"adjust_lr_fn": "rule", "scale_lr_by_fraction": "scale_by_fraction", "momentum": "mu"}
    own = {names.get(name, name): value for name, value in settings.items() if name != "state_dtype"}
    own |= {"select": "output", "normalize_neurons": True} if algorithm == "dion3" else {}
    state_dtype = getattr(torch, settings.get("state_dtype", "float32"))
    references = [Reference(weight, torch.zeros(weight.shape, dtype=state_dtype), lr=0.02, **own) for weight in start]

    for gradient in gradients(shape, seed=1):
        parameter.grad = gradient.clone().to(device)
        optimizer.step()
        for reference, matrix_gradient in zip(references, matrices(gradient, transposed), strict=True):
            reference.step(matrix_gradient)
        selection = optimizer.selection_of(parameter)
        assert selection.axis == references[0].axis
        assert selection.indices.tolist() == (
            [reference.selected for reference in references] if batched else references[0].selected
        )
        momentum = matrices(optimizer.state[parameter]["momentum"].cpu(), transposed)
        for reference, found in zip(references, momentum, strict=True):
            assert torch.equal(found, reference.momentum)
        if references[0].normalize_neurons:
            expected = torch.stack([reference.variance.unsqueeze(1) for reference in references])
            variance = optimizer.state[parameter]["variance"]
            assert variance.shape == (expected if batched else expected[0]).shape
            roots = variance.cpu().double().view(expected.shape).sqrt()  # what neurons are divided by
            assert torch.linalg.norm(roots - expected.sqrt()) < TOLERANCE[dtype] * torch.linalg.norm(expected.sqrt())

    end = matrices(parameter.detach().cpu(), transposed)
    for before, after, reference in zip(start, end, references, strict=True):
        expected = reference.weight - before
        error = torch.linalg.norm(after.double() - before - expected) / torch.linalg.norm(expected)
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_and_fractions(kind, fraction, dtype):
    check(**SHAPES[kind], fraction=fraction, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", LARGE_SHAPES)
def test_larger_shapes_and_fractions(kind, fraction, dtype):
    check(**LARGE_SHAPES[kind], fraction=fraction, dtype=dtype)


@pytest.mark.parametrize("scale_lr_by_fraction", [True, False])
@pytest.mark.parametrize("rule", ["match_rms_adamw", "original", None, "spectral", "none"])
@pytest.mark.parametrize("kind", ["wide", "tall", "transposed wide", "batched transposed tall"])
def test_scale_rules(kind, rule, scale_lr_by_fraction):
    check(**SHAPES[kind], adjust_lr_fn=rule, scale_lr_by_fraction=scale_lr_by_fraction)


@pytest.mark.parametrize("kind", ["wide", "tall", "transposed wide", "transposed tall", "batched tall"])
def test_output_slices(kind):
    check(**SHAPES[kind], select="output")


@pytest.mark.parametrize("kind", ["wide", "tall", "batched tall"])
def test_a_momentum_in_half_precision_does_not_round_the_update(kind):
    check(**SHAPES[kind], state_dtype="bfloat16")


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.5, 1.0), (0.99, 0.1)])
def test_momentum_and_weight_decay(momentum, weight_decay):
    check(**SHAPES["odd"], momentum=momentum, weight_decay=weight_decay)


@pytest.mark.parametrize("settings", [{}, {"state_dtype": "bfloat16", "fraction": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["wide", "odd tall", "batched transposed tall"])
def test_nesterov(kind, settings):
    check(**SHAPES[kind], nesterov=True, **settings)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.0, "fraction": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["wide", "odd tall", "batched transposed tall"])
def test_cautious_weight_decay(kind, settings):
    check(**SHAPES[kind], cautious_weight_decay=True, weight_decay=2.0, **settings)


def test_a_shape_that_is_stepped_in_several_batches():
    """Bounding the working memory changes nothing in the result."""

    def weights_after(working_memory: int) -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(16, 24)) for _ in range(5)]
        optimizer = Dion2(parameters, lr=0.1, orthonormalize_dtype="float32", working_memory=working_memory)
        for step in range(3):
            for index, parameter in enumerate(parameters):
                parameter.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(10 * step + index))
            optimizer.step()
        return parameters

    for whole, parts in zip(weights_after(2**24), weights_after(1), strict=True):
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)


def test_different_settings_in_equal_shapes_stay_apart():
    """What is batched by shape keeps its own lr, momentum, weight decay and scale."""
    settings = [
        {"lr": lr, "momentum": mu, "weight_decay": decay, "adjust_lr_fn": rule, "fraction": 0.5}
        for lr, mu, decay, rule in itertools.product([0.1, 0.01], [0.9, 0.5], [0.0, 1.0], ["original", "none"])
    ]
    shape = (24, 12)
    together = [torch.nn.Parameter(torch.ones(shape)) for _ in settings]
    alone = [torch.nn.Parameter(torch.ones(shape)) for _ in settings]
    one = Dion2([{"params": [p], **own} for p, own in zip(together, settings, strict=True)])
    several = [Dion2([{"params": [p], **own}]) for p, own in zip(alone, settings, strict=True)]
    for gradient in gradients(shape, seed=3):
        for parameter in together + alone:
            parameter.grad = gradient.clone()
        for optimizer in [one, *several]:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert len({tuple(parameter.flatten().tolist()) for parameter in alone}) == len(settings)


@pytest.mark.parametrize("layout", ["transposed view", "strided view"])
def test_parameters_that_are_not_contiguous(layout):
    torch.manual_seed(0)
    start = torch.randn(24, 12)
    plain = torch.nn.Parameter(start.clone())
    if layout == "transposed view":
        odd = torch.nn.Parameter(start.T.contiguous().T)
    else:
        odd = torch.nn.Parameter(torch.zeros(24, 24)[:, ::2].copy_(start))
    assert not odd.is_contiguous()
    optimizer = Dion2([plain, odd], lr=0.1, orthonormalize_dtype="float32")
    for gradient in gradients((24, 12), seed=3):
        plain.grad, odd.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    torch.testing.assert_close(plain, odd, rtol=0, atol=1e-6)
    assert torch.equal(optimizer.selection_of(plain).indices, optimizer.selection_of(odd).indices)


def test_zero_gradients_move_nothing_but_the_weight_decay():
    parameter = torch.nn.Parameter(torch.ones(8, 12))
    optimizer = Dion2([parameter], lr=0.5, weight_decay=0.5)
    parameter.grad = torch.zeros(8, 12)
    optimizer.step()
    assert torch.equal(parameter, torch.full((8, 12), 0.75))


def test_a_zero_matrix_beside_others_gets_no_update_and_no_nan():
    parameter = torch.nn.Parameter(torch.zeros(3, 8, 12))
    optimizer = Dion2([{"params": [parameter], "batched": True}], lr=0.1)
    parameter.grad = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    parameter.grad[1] = 0
    optimizer.step()
    assert torch.equal(parameter[1], torch.zeros(8, 12))
    assert parameter[0].norm() > 0
    assert parameter[2].norm() > 0


def test_ties_take_the_lower_index_and_a_square_the_output_axis():
    """Equal norms, in a weight stored (in, out): the output slices 0 and 1 are columns 0 and 1."""
    parameter = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Dion2([{"params": [parameter], "transposed": True}], lr=1.0, weight_decay=0.0)
    parameter.grad = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q.sign()
    optimizer.step()
    selection = optimizer.selection_of(parameter)
    assert (selection.axis, selection.indices.tolist()) == (0, [0, 1])
    assert parameter[:, 2:].count_nonzero() == 0
    assert parameter[:, :2].count_nonzero() == 16


TIED: dict[str, dict[str, Any]] = {
    "rows": {},
    "columns": {"transposed": True},
    "blocks": {"splits": "a 64 | b 64"},
    "interleaved": {"splits": "4 x (a 16 | b 16)"},
    "interleaved columns": {"splits": "4 x (a 16 | b 16)", "transposed": True, "select": "output"},
    "every second entry": {"splits": "64 x (a 1 | b 1) along inputs", "select": "output"},
    "every second entry of columns": {
        "splits": "64 x (a 1 | b 1) along inputs",
        "transposed": True,
        "select": "output",
    },
    "pieces of rows": {"splits": "2 x (a 32 | b 32) along inputs", "select": "output"},
    "heads": {"splits": "a 4*16 | b 64"},
    "stack": {"batched": True},
    "channels": {"convolution": True},
}


def blocks_along_inputs(form: str) -> tuple[Block, ...]:
    splits = TIED[form].get("splits", "")
    return blocks_of(splits) if "along inputs" in splits else ()


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("form", TIED)
def test_estimated_norms_select_what_exact_ones_do(form, memory, monkeypatch):
    """Slices of the same entries in other orders have estimates that differ, and norms that are equal, or nearly."""
    rows, columns = (160, 128) if form == "channels" else (128, 128)
    shape = {"stack": (3, 128, 128), "channels": (160, 32, 2, 2)}.get(form, (128, 128))
    generator = torch.Generator().manual_seed(0)
    exact = Mock(side_effect=passes._norms_of)
    monkeypatch.setattr(passes, "_norms_of", exact)
    for are_rows in (True, False):
        n, m = (rows, columns) if are_rows else (columns, rows)
        places = [[block.place(number) for number in range(block.total)] for block in blocks_along_inputs(form)]
        entries = torch.empty(3, n, m)
        for own in places or [list(range(m))]:
            orders = torch.rand(3, n, len(own), generator=generator).argsort(-1)
            entries[..., own] = torch.logspace(-4, 4, len(own)).expand(3, n, -1).gather(-1, orders)
        entries *= 1 + 1e-6 * torch.randint(0, 3, (3, n, 1), generator=generator)
        gradient = (entries if are_rows else entries.mT)[: 3 if form == "stack" else 1].reshape(shape)
        by_estimates, by_norms = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        of_estimates, of_norms = (
            Dion2([{"params": [each], **TIED[form]}], lr=0.1, working_memory=memory)
            for each in (by_estimates, by_norms)
        )
        for step in range(4):
            by_estimates.grad = by_norms.grad = gradient * (-1.0) ** step
            of_estimates.step()
            with monkeypatch.context() as patch:
                patch.setattr(MatrixUpdate, "can_estimate_sums", False)
                of_norms.step()
            assert torch.equal(by_estimates, by_norms)
            assert torch.equal(of_estimates.state[by_estimates]["momentum"], of_norms.state[by_norms]["momentum"])
    assert exact.called or form == "channels"  # of which each has several slices


def test_observers_are_shown_norms_and_no_estimates():
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = Dion2([parameter])
    optimizer.observer = Mock(wants_results=True)
    for wants_results in (True, False):
        optimizer.observer.wants_results = wants_results
        parameter.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        _, indices, norms = optimizer.observer.selected.call_args.args
        if wants_results:
            assert torch.equal(norms, parameter.grad.double().abs().sum(1).float().unsqueeze(0))
        else:
            assert norms is None
        assert indices.shape == (1, 16)


def test_a_cpu_takes_less_at_once_than_it_may(monkeypatch):
    """64 MiB by default; 12 matrices of equal shape then go in several batches."""
    sizes = []

    def orthonormalize(submatrices):
        sizes.append(len(submatrices))
        return submatrices

    parameters = [torch.nn.Parameter(torch.zeros(64, 96)) for _ in range(12)]
    for parameter in parameters:
        parameter.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    optimizer = Dion2([{"params": parameters, "orthonormalize_dtype": "float32"}], orthonormalize=orthonormalize)
    optimizer.step()
    assert sizes == [12]
    sizes.clear()
    monkeypatch.setattr(working_memory, "CPU_BYTES", 5 * working_memory.working_bytes(16, 96, 64, 4))
    optimizer.step()
    assert sizes == [5, 5, 2]
