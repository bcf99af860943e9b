"""The traffic of a step, counted on 2 and 4 ranks."""

import math
from dataclasses import replace

import pytest

from benchmarks.communication import Case, Traffic, measure
from benchmarks.scale import Layout, compressed_bytes, simulate
from benchmarks.step import LAYERS
from tests.distributed.ranks import FORKED

WHOLE = Case("fsdp2", layers=2, fraction=1.0, steps=1)
PARTS = [replace(WHOLE, fraction=fraction) for fraction in (0.5, 0.25, 0.125)]
QUARTER = PARTS[1]
MORE_LAYERS = replace(QUARTER, layers=6)
BUCKETS = replace(WHOLE, layers=8)
"""An owner works on 14.2M entries with 32 bytes each, and has parts of as many in flight, 4 bytes four times: 2.5 times
the 256 MiB of working memory."""
TENSOR_PARALLEL = replace(QUARTER, layout="tp")
REPLICATED = replace(QUARTER, layout="ddp")
HYBRID = replace(QUARTER, layout="hsdp")
HYBRID_WHOLE = replace(WHOLE, layout="hsdp", dtype="bfloat16")
HYBRID_BUCKETS = replace(HYBRID_WHOLE, layers=10)
"""Of 8.8M entries with 16 bytes each, and parts of 17.7M in flight, 2 bytes four times: 1.06 times that memory."""
HALF_PRECISION = replace(WHOLE, dtype="bfloat16")
NORMALIZED = replace(QUARTER, algorithm="dion3")
FEW_SLICES = replace(HALF_PRECISION, fraction=0.125)  # 24 of a key's 192 rows: too few for products in bfloat16
AVERAGED = Case("ddp", layers=1, fraction=0.125, algorithm="dion", steps=1, sync="full")
COMPRESSED = [replace(AVERAGED, sync="compressed", fraction=fraction) for fraction in (0.5, 0.25, 0.125)]
SYNCHRONISED = [AVERAGED, *COMPRESSED]
SYNCHRONISED_SHARDS = [replace(case, layout="hsdp") for case in SYNCHRONISED]

Measured = dict[Case, list[Traffic]]


@pytest.fixture(scope="module")
def on_2() -> Measured:
    cases = [WHOLE, *PARTS, MORE_LAYERS, BUCKETS, TENSOR_PARALLEL, REPLICATED, NORMALIZED, *SYNCHRONISED]
    return dict(zip(cases, measure(2, cases, FORKED), strict=True))


@pytest.fixture(scope="module")
def on_4() -> Measured:
    cases = [
        WHOLE,
        *PARTS,
        HYBRID,
        HYBRID_WHOLE,
        HYBRID_BUCKETS,
        HALF_PRECISION,
        FEW_SLICES,
        *SYNCHRONISED,
        *SYNCHRONISED_SHARDS,
    ]
    return dict(zip(cases, measure(4, cases, FORKED), strict=True))


def submatrices(by_rank: list[Traffic]) -> int:
    return sum(traffic.submatrices for traffic in by_rank)


@pytest.mark.parametrize("case", PARTS, ids=lambda case: f"{case.fraction:g}")
@pytest.mark.parametrize("measured", ["on_2", "on_4"])
def test_submatrices_shrink_with_the_fraction(case: Case, measured: str, request: pytest.FixtureRequest) -> None:
    traffic = request.getfixturevalue(measured)
    assert submatrices(traffic[case]) <= 1.05 * case.fraction * submatrices(traffic[WHOLE])


def test_few_slices_are_sent_in_half_precision_too(on_4: Measured) -> None:
    assert submatrices(on_4[FEW_SLICES]) <= 1.05 * 0.125 * submatrices(on_4[HALF_PRECISION])
    assert all(traffic.calls == {"all-reduce": 1, "all-to-all": 2} for traffic in on_4[FEW_SLICES])


def test_norms_do_not_grow_with_the_ranks(on_2: Measured, on_4: Measured) -> None:
    for case in (WHOLE, *PARTS):
        assert {traffic.sums for traffic in on_2[case] + on_4[case]} == {on_2[case][0].sums}


def test_collectives_do_not_grow_with_the_layers(on_2: Measured) -> None:
    for traffic in (*on_2[QUARTER], *on_2[MORE_LAYERS]):
        assert traffic.calls == {"all-reduce": 1, "all-to-all": 2}


def test_what_takes_more_than_the_working_memory_goes_in_buckets(on_2: Measured) -> None:
    """As many bytes, in three times as many all-to-alls."""
    for traffic in on_2[BUCKETS]:
        assert traffic.calls == {"all-reduce": 1, "all-to-all": 2 * 3}
    assert submatrices(on_2[BUCKETS]) == 4 * submatrices(on_2[WHOLE])


def test_neurons_take_one_more_sum(on_2: Measured) -> None:
    """In float64: the norms of all outputs, the squares of the selected ones, and a word or two a matrix."""
    outputs = sum(rows for rows, _ in LAYERS["smollm2-135m"] * NORMALIZED.layers)
    for traffic in on_2[NORMALIZED]:
        assert traffic.calls == {"all-reduce": 2, "all-to-all": 2}
        assert 0 <= traffic.sums - 8 * (outputs + outputs // 4) <= 16 * 7 * NORMALIZED.layers
    assert submatrices(on_2[NORMALIZED]) <= 1.05 * 0.25 * submatrices(on_2[WHOLE])


def test_tensor_parallelism_takes_one_owner_round_trip(on_2: Measured) -> None:
    for traffic in on_2[TENSOR_PARALLEL]:
        assert traffic.calls == {"all-reduce": 1, "all-to-all": 2}


def test_replicas_take_one_all_gather(on_2: Measured) -> None:
    for traffic in on_2[REPLICATED]:
        assert traffic.calls == {"all-reduce": 1, "all-gather": 1}


def test_replicas_of_shards_take_one_more_all_gather(on_4: Measured) -> None:
    for traffic in on_4[HYBRID]:
        assert traffic.calls == {"all-reduce": 1, "all-to-all": 2, "all-gather": 1}
        assert traffic.sums == on_4[QUARTER][0].sums


def test_replicas_sum_norms_like_shards(on_2: Measured) -> None:
    assert on_2[REPLICATED][0].sums == on_2[QUARTER][0].sums


def test_simulation_predicts_what_is_counted(on_4: Measured) -> None:
    step = simulate(LAYERS["smollm2-135m"] * HALF_PRECISION.layers, Layout("", ranks=4), fraction=1.0)
    assert [traffic.submatrices for traffic in on_4[HALF_PRECISION]] == step.sent
    for case, buckets in ((HYBRID_WHOLE, 1), (HYBRID_BUCKETS, 2)):
        hybrid = simulate(LAYERS["smollm2-135m"] * case.layers, Layout("", ranks=2, replicas=2), fraction=1.0)
        assert [traffic.submatrices for traffic in on_4[case]] == hybrid.sent
        for traffic in on_4[case]:
            assert traffic.calls == {"all-reduce": 1, "all-to-all": 2 * buckets, "all-gather": buckets}


@pytest.mark.parametrize("case", COMPRESSED, ids=lambda case: f"{case.fraction:g}")
@pytest.mark.parametrize(("measured", "layout"), [("on_2", "ddp"), ("on_4", "ddp"), ("on_4", "hsdp")])
def test_compressed_synchronisation(case: Case, measured: str, layout: str, request: pytest.FixtureRequest) -> None:
    """P and R against the gradient, each rank its share; and of a square matrix at a half, the gradient."""
    traffic: Measured = request.getfixturevalue(measured)
    full, compressed = (traffic[replace(each, layout=layout)] for each in (AVERAGED, case))
    gradients = [math.prod(shape) for shape in LAYERS["smollm2-135m"]]
    products = [sum(shape) * case.fraction * min(shape) for shape in LAYERS["smollm2-135m"]]
    expected = sum(map(min, products, gradients)) / sum(gradients)
    for one, other in zip(full, compressed, strict=True):
        assert other.to_replicas / one.to_replicas == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("layout", ["ddp", "hsdp"])
def test_computed_bytes_of_replicas_are_counted(on_4: Measured, layout: str) -> None:
    """But for a word or two a matrix: of checksums, and of which gradients there are."""
    shapes, shards = LAYERS["smollm2-135m"], 2 if layout == "hsdp" else 1
    for case in SYNCHRONISED:
        computed = 4 * sum(map(math.prod, shapes))
        if case.sync == "compressed":
            computed = sum(compressed_bytes(shapes, case.fraction, gradient_bytes=4))
        for traffic in on_4[replace(case, layout=layout)]:
            assert 0 <= traffic.to_replicas - computed / shards <= 16 * len(shapes)
