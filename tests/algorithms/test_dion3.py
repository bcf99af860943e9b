"""Dion3, NorMuon and neuron normalization against the independent float64 reference."""

import pytest
import torch
from torch import nn

from dion2_lightning import Dion2
from tests.algorithms.test_dion2 import LARGE_SHAPES, SHAPES, check, gradients

NORMUON = {"fraction": 1.0, "normalize_neurons": True}


@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize("kind", SHAPES)
def test_dion3(kind, fraction):
    check(**SHAPES[kind], algorithm="dion3", fraction=fraction)


@pytest.mark.parametrize("kind", SHAPES)
def test_normuon(kind):
    check(**SHAPES[kind], **NORMUON)


@pytest.mark.parametrize("kind", ["wide", "odd tall", "batched transposed tall"])
def test_normalized_neurons_of_selected_inputs(kind):
    """A neuron is an output, also where slices are inputs: every neuron has the entries of these."""
    check(**SHAPES[kind], normalize_neurons=True, neuron_beta=0.5)


@pytest.mark.parametrize("kind", ["tall", "batched transposed"])
def test_nesterov_and_cautious_weight_decay(kind):
    check(**SHAPES[kind], algorithm="dion3", nesterov=True, cautious_weight_decay=True, weight_decay=2.0)


@pytest.mark.parametrize("kind", ["tall", "batched transposed tall"])
def test_products_in_half_precision(kind):
    check(**LARGE_SHAPES[kind], algorithm="dion3", dtype="bfloat16")


def test_a_momentum_in_half_precision():
    check(**SHAPES["tall"], algorithm="dion3", state_dtype="bfloat16", momentum=0.5, weight_decay=1.0)


@pytest.mark.parametrize("kind", ["tall", "batched transposed"])
def test_dion3_at_fraction_one_is_normuon_bit_for_bit(kind):
    shape, *_ = SHAPES[kind].values()
    storage = {name: value for name, value in SHAPES[kind].items() if name != "shape"}
    ours, theirs = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    dion3 = Dion2([{"params": [ours], "algorithm": "dion3", "fraction": 1.0, **storage}], lr=0.1)
    normuon = Dion2([{"params": [theirs], "select": "output", **NORMUON, **storage}], lr=0.1)
    for gradient in gradients(shape, seed=2):
        ours.grad, theirs.grad = gradient, gradient.clone()
        dion3.step()
        normuon.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(dion3.state[ours]["variance"], normuon.state[theirs]["variance"])


def test_zero_momentum_moves_nothing():
    """A zero matrix, a zero neuron and a first step of zeros: no NaN, and variances of zero."""
    parameter = nn.Parameter(torch.zeros(2, 8, 12))
    optimizer = Dion2([{"params": [parameter], "batched": True, "algorithm": "dion3", "fraction": 1.0}], lr=0.1)
    parameter.grad = torch.zeros(2, 8, 12)
    optimizer.step()
    parameter.grad[0, 1:] = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert parameter[0, 1:].count_nonzero() == 7 * 12
    assert parameter[0, 0].count_nonzero() == parameter[1].count_nonzero() == 0
    assert optimizer.state[parameter]["variance"].count_nonzero() == 7


def test_neurons_of_unequal_gradients_get_equal_updates():
    """What it is for: a neuron that orthonormalization leaves a small update gets one as large as the others'."""

    def spread(**settings) -> float:
        generator = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.zeros(24, 16))
        optimizer = Dion2([{"params": [parameter], "fraction": 1.0, **settings}], lr=0.1, weight_decay=0.0)
        for _ in range(3):
            parameter.grad = torch.randn(24, 16, generator=generator) * torch.arange(1.0, 25.0).unsqueeze(1)
            optimizer.step()
        sizes = parameter.detach().norm(dim=1)
        return (sizes.std() / sizes.mean()).item()

    assert spread(normalize_neurons=True) < spread() / 2


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_variances_without_memory(kernels: str) -> None:
    """neuron_beta=0: every neuron gets the same length, also one whose variance falls by many orders of magnitude."""
    if kernels == "triton":
        pytest.importorskip("triton")
    weight = nn.Parameter(torch.zeros(8, 64))
    settings = {"algorithm": "dion3", "fraction": 1.0, "neuron_beta": 0.0, "momentum": 0.0, "lr": 1.0}
    optimizer = Dion2([{"params": [weight], **settings}], orthonormalize=lambda rows: rows, kernels=kernels)
    for smallest in (1.0, 1e-5):
        before = weight.detach().clone()
        weight.grad = torch.randn(8, 64, generator=torch.manual_seed(0))
        weight.grad[5] *= smallest
        optimizer.step()
    lengths = (weight.detach() - before).norm(dim=1)
    torch.testing.assert_close(lengths, lengths.mean().expand(8), rtol=1e-3, atol=0.0)
