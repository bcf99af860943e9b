"""Rounding to half precision: single numbers by hand, statistics over a million, and bits from a second hash."""

import math

import pytest
import torch
from torch import Tensor

from dion2_lightning.kernels import rounding
from dion2_lightning.kernels.rounding import RandomBits, blocks, multiply_add_, random_bits, store_

HALF = [torch.bfloat16, torch.float16]
SIZE = (1000, 1000)


def bits_of(
    shape: tuple[int, ...], seed: int = 1, step: int = 0, first_row: int = 0, first_column: int = 0
) -> RandomBits:
    rows = torch.arange(math.prod(shape[:-1])) + first_row
    columns = torch.arange(shape[-1]) + first_column
    [bits] = random_bits([(rows, columns)], [seed], [torch.tensor(float(step))])
    return bits.shaped(shape)


def rounded(values: Tensor, dtype: torch.dtype, bits: RandomBits | None) -> Tensor:
    result = torch.empty_like(values, dtype=dtype)
    store_(result, values.clone(), bits)
    return result


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of a dtype around each value, in float64; both are the value where the dtype has it."""
    nearest = values.to(dtype).double()
    spacing = 2.0 ** (values.double().abs().log2().floor().clamp(min=-14 if dtype == torch.float16 else -126))
    spacing *= torch.finfo(dtype).eps
    exact = values.double() / spacing
    assert torch.equal(nearest, exact.round() * spacing), "the spacing is the dtype's"
    return exact.floor() * spacing, exact.ceil() * spacing


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-7], ids=str)  # float16 numbers under 6e-5 are subnormal
def test_a_value_becomes_one_of_its_neighbours_and_on_average_itself(dtype: torch.dtype, size: float) -> None:
    values = size * torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    below, above = neighbours(values, dtype)
    result = rounded(values, dtype, bits_of(SIZE)).double()
    assert ((result == below) | (result == above)).all()
    errors = (result - values.double()) / (above - below).clamp(min=1e-300)
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(errors.numel())
    # Every distance from the lower neighbour has its own share of those that go up.
    distance = ((values.double() - below) / (above - below).clamp(min=1e-300)).flatten()
    went_up = (result > values).flatten()
    for tenth in range(10):
        there = (distance >= tenth / 10) & (distance < (tenth + 1) / 10) & (distance > 0)
        expected, count = distance[there].mean(), there.sum()
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert abs(went_up[there].double().mean() - expected) < 4 * deviation


def test_to_the_nearest_numbers_the_average_is_wrong() -> None:
    """What stochastic rounding is for: one and a tenth of the last bit becomes one, every time."""
    values = torch.full(SIZE, 1 + 0.1 * 2**-7)
    assert (rounded(values, torch.bfloat16, None) == 1).all()
    mean = rounded(values, torch.bfloat16, bits_of(SIZE)).double().mean()
    assert mean == pytest.approx(1 + 0.1 * 2**-7, abs=4 * 2**-7 * 0.3 / 1000)


@pytest.mark.parametrize("dtype", HALF)
def test_what_the_dtype_has_stays_as_it_is(dtype: torch.dtype) -> None:
    """Also both zeros, with their signs, subnormal numbers and the largest; whatever is added never moves them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    for step in range(4):
        result = rounded(every.float(), dtype, bits_of(every.shape, step=step))
        assert torch.equal(result.view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_not_finite_never_becomes_a_number(dtype: torch.dtype) -> None:
    """The NaN of CUDA, and its negative, have all bits set: adding to them carries over into the sign.

    An infinite entry, as masks have it, stays as it is.
    """
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    infinite = torch.tensor([math.inf, -math.inf])
    values = torch.cat([payloads, infinite]).expand(1000, -1).contiguous()
    result = rounded(values, dtype, bits_of((1000, 6)))
    assert result[:, :4].isnan().all()
    assert (result[:, 4:] == infinite).all()


def test_subnormal_numbers_of_float16_need_none_of_float32() -> None:
    """Some devices have none and take them for zero."""
    values = torch.linspace(-6e-5, 6e-5, 1000).expand(100, -1).contiguous()
    expected = rounded(values, torch.float16, bits_of((100, 1000)))
    assert expected.double().mean(0).sub(values[0].double()).abs().max() < 5 * 2**-24 / 20
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU has them always")
        assert torch.equal(rounded(values, torch.float16, bits_of((100, 1000))), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("dtype", "between", "beyond"), [(torch.bfloat16, 3.4e38, None), (torch.float16, 65530.0, 7e4)]
)
def test_what_is_too_large_overflows(dtype: torch.dtype, between: float, beyond: float | None) -> None:
    """Between the largest number and where the next would be: to one of them, of which the upper is infinite."""
    result = rounded(torch.full((100, 100), between), dtype, bits_of((100, 100)))
    assert set(result.flatten().tolist()) == {torch.finfo(dtype).max, math.inf}
    if beyond is not None:
        assert (rounded(torch.full((100, 100), beyond), dtype, bits_of((100, 100))) == math.inf).all()


def murmur(number: int) -> int:
    """The final mix of Murmur3, in Python's integers."""
    number = ((number ^ number >> 16) * 0x85EBCA6B) % 2**32
    number = ((number ^ number >> 13) * 0xC2B2AE35) % 2**32
    return number ^ number >> 16


def test_bits_are_what_the_hash_of_seed_step_row_and_column_says() -> None:
    """Written a second time, so that a run that is resumed with another version of this package goes on as it was."""
    seed, step = 0xDEADBEEF, 1234
    bits = bits_of((3, 4), seed, step, first_row=100_000, first_column=7)
    offset = 2**31  # the seed is in [0, 2^32), its place among the int32 numbers is shifted
    for row in range(3):
        for column in range(4):
            of_row = murmur(murmur((100_000 + row) ^ (seed - offset) % 2**32) ^ step) | 1
            of_column = murmur(murmur((7 + column) ^ ((seed ^ 0x9E3779B9) - offset) % 2**32) ^ step)
            assert (bits.rows[row, 0] * bits.columns[0, column]).item() % 2**32 == of_row * of_column % 2**32


def test_bits_of_several_tensors_are_those_of_each() -> None:
    coordinates = [
        (torch.arange(5), torch.arange(7)),
        (torch.arange(2), torch.arange(9)),
        (torch.arange(0), torch.arange(3)),
    ]
    coordinates += [coordinates[0], coordinates[2]]  # which are drawn with these
    seeds = [1, 2, 3, 2**32 - 1, 5]
    steps = [torch.tensor(float(step)) for step in (3, 5, 5, 7, 5)]
    together = random_bits(coordinates, seeds, steps)
    for found, pair, seed, step in zip(together, coordinates, seeds, steps, strict=True):
        [alone] = random_bits([pair], [seed], [step])
        assert [each.shape for each in found] == [each.shape for each in pair]
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert not torch.equal(together[0].columns, together[3].columns)


def noise_of(bits: RandomBits) -> Tensor:
    """The noise that is added, in [0, 1), in units of the last bit of bfloat16."""
    return ((bits.rows * bits.columns) >> 16 & 0xFFFF).double() / 2**16


def test_noise_is_uniform_and_differs_by_seed_and_step() -> None:
    first = noise_of(bits_of(SIZE))
    counts = torch.histc(first, 64, 0, 1)
    assert ((counts - 1e6 / 64).square() / (1e6 / 64)).sum() < 130  # chi-squared of 63 degrees; 1e-6 lie above 134
    for other in (bits_of(SIZE, step=1), bits_of(SIZE, seed=2), bits_of(SIZE, first_row=1)):
        correlation = torch.corrcoef(torch.stack([first.flatten(), noise_of(other).flatten()]))[0, 1]
        assert abs(correlation) < 4e-3


def test_neighbouring_entries_are_independent() -> None:
    noise = noise_of(bits_of(SIZE)) - 0.5
    for down, right in ((0, 1), (1, 0), (1, 1), (7, 3)):
        pairs = noise[down:, right:] * noise[: len(noise) - down, : noise.shape[1] - right]
        assert abs(pairs.mean()) < 4 * pairs.std() / math.sqrt(pairs.numel())


def test_what_is_added_is_no_matrix_of_low_rank() -> None:
    """As a matrix, noise is as large as independent noise; the sum of two hashes would give one ten times as large."""
    values = torch.full((512, 512), 1 + 2**-8)
    errors = rounded(values, torch.bfloat16, bits_of((512, 512))).double() - values.double()
    largest = torch.linalg.matrix_norm(errors / errors.std(), 2)
    assert largest < 1.1 * 2 * math.sqrt(512)


# The parts of a tensor


def test_a_part_is_rounded_as_in_the_whole() -> None:
    values = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    whole = rounded(values, torch.bfloat16, bits_of((40, 60)))
    part = rounded(values[10:, 20:].clone(), torch.bfloat16, bits_of((30, 40), first_row=10, first_column=20))
    assert torch.equal(part, whole[10:, 20:])


def test_memory_order_and_size_of_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, bits = torch.randn(3, 17, 29, generator=torch.Generator().manual_seed(0)), bits_of((3, 17, 29))
    expected = rounded(values, torch.bfloat16, bits)
    for block in (1, 50, 100, 1000):
        monkeypatch.setattr(rounding, "BLOCK", block)
        assert torch.equal(rounded(values, torch.bfloat16, bits), expected)
        across = values.mT.contiguous().mT
        assert torch.equal(rounded(across, torch.bfloat16, bits), expected)
        found = torch.empty(3, 17, 58, dtype=torch.bfloat16)[..., ::2]
        store_(found, values, bits)
        assert torch.equal(found, expected)
        assert torch.equal(rounded(across.mT, torch.bfloat16, bits.mT), expected.mT)


def test_blocks_are_bounded_and_cover_everything() -> None:
    tensor = torch.zeros(7, 5, 11)
    for entries in (1, 10, 11, 60, 100, 385):
        tensor.zero_()
        for (part,), bits in blocks([tensor], bits_of((7, 5, 11)), entries):
            assert part.numel() <= entries
            assert (bits.rows * bits.columns).broadcast_to(part.shape).shape == part.shape
            part += 1
        assert (tensor == 1).all()
    assert next(blocks([torch.zeros(())], None))[0][0].shape == ()


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_of_slices_and_matrices(n: int, m: int, transposed: bool) -> None:
    bits = bits_of((4, m, n)).mT if transposed else bits_of((4, n, m))
    noise = noise_of(bits)
    for indices in (torch.tensor([[0, n - 1], [0, 0], [n - 1, 0], [n // 2, 0]]), torch.empty(4, 0, dtype=torch.int64)):
        expected = noise.gather(1, indices.unsqueeze(-1).expand(-1, -1, m))
        found = noise_of(bits.of_slices(indices)).broadcast_to(expected.shape)
        assert torch.equal(found, expected)
    assert torch.equal(noise_of(bits.of_matrices(1, 2)), noise[1:3])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("addend", [torch.float32, torch.bfloat16, torch.float64, None], ids=str)
def test_multiply_add_rounds_once(dtype: torch.dtype, addend: torch.dtype | None) -> None:
    """Against float64: a second rounding in between would put an entry in a hundred a bit off."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(300, 200, generator=generator).to(dtype)
    added = None if addend is None else 0.01 * torch.randn(300, 200, generator=generator).to(addend)
    exact = tensor.double() * 0.97 + (0 if added is None else added.double())
    found = tensor.clone()
    multiply_add_(found, 0.97, added, None)
    assert (found == exact.to(dtype)).double().mean() > 0.9999  # float32 itself rounds
    below, above = neighbours(exact.float(), dtype)
    multiply_add_(tensor, 0.97, added, bits_of((300, 200)))
    assert ((tensor.double() == below) | (tensor.double() == above)).double().mean() > 0.9999
    errors = (tensor.double() - exact) / (above - below).clamp(min=1e-300)
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(errors.numel())
