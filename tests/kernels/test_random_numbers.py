"""Random numbers that are hashes: their distribution, and that an entry is the same whatever part is computed."""

import math

import pytest
import torch

from dion2_lightning.kernels.random_numbers import normals, uniforms

ROWS, COLUMNS = torch.arange(600), torch.arange(400)


@pytest.mark.parametrize(("draw", "fourth_moment"), [(uniforms, 9 / 5), (normals, 3.0)])
def test_moments_and_independence(draw, fourth_moment):
    values = draw(ROWS, COLUMNS, 3).double()
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.square().mean().item() == pytest.approx(1, rel=0.02)
    assert values.pow(4).mean().item() == pytest.approx(fourth_moment, rel=0.04)
    # A random matrix has no direction that stands out, which no pair of entries would show.
    largest, *_, smallest = (torch.linalg.svdvals(values) / math.sqrt(600)).tolist()
    assert largest == pytest.approx(1 + math.sqrt(400 / 600), rel=0.02)
    assert smallest == pytest.approx(1 - math.sqrt(400 / 600), rel=0.1)


@pytest.mark.parametrize("draw", [uniforms, normals])
def test_an_entry_depends_on_seed_row_and_column_alone(draw):
    whole = draw(ROWS, COLUMNS, 3).float()
    rows, columns = torch.tensor([7, 3, 599]), torch.tensor([399, 0])
    assert torch.equal(draw(rows, columns, 3).float(), whole[rows][:, columns])
    assert not torch.equal(draw(rows, columns, 4).float(), whole[rows][:, columns])
