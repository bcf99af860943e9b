"""The text that says which matrices lie side by side in a weight."""

import pytest

from dion2_lightning.matrices.splits import check_splits, misfit, read_splits
from dion2_lightning.matrices.views import read_matrices


def places(text: str) -> dict[str, list[int]]:
    """Which slices of the axis each block has."""
    splits = read_splits(text)
    assert splits is not None
    return {block.name: [block.place(index) for index in range(block.total)] for block in splits.blocks}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q 3 | k 2", {"q": [0, 1, 2], "k": [3, 4]}),
        ("2 x (q 2 | k 1)", {"q": [0, 1, 3, 4], "k": [2, 5]}),
        ("3 x (gate 1 | up 1)", {"gate": [0, 2, 4], "up": [1, 3, 5]}),
        ("q 2*2 | k 1*2", {"q": [0, 1, 2, 3], "k": [4, 5]}),
        ("expert 2*3 along inputs", {"expert": [0, 1, 2, 3, 4, 5]}),
    ],
)
def test_places(text: str, expected: dict[str, list[int]]) -> None:
    assert places(text) == expected


def test_what_comes_before_a_place_counts_those_of_the_block() -> None:
    splits = read_splits("2 x (q 2 | k 1 | v 3)")
    assert splits is not None
    for block in splits.blocks:
        its_places = [block.place(index) for index in range(block.total)]
        for place in range(splits.size + 1):
            assert block.before(place) == sum(each < place for each in its_places)


@pytest.mark.parametrize(
    ("shape", "storage", "expected"),
    [
        ((8, 5), {"splits": "q 4 | k 2 | v 2"}, {"q": (1, (4, 5)), "k": (1, (2, 5)), "v": (1, (2, 5))}),
        ((5, 8), {"splits": "q 4 | k 4", "transposed": True}, {"q": (1, (4, 5)), "k": (1, (4, 5))}),
        ((5, 8), {"splits": "head 2*4 along inputs"}, {"head": (2, (5, 4))}),
        ((8, 5), {"splits": "expert 2*4 along inputs", "transposed": True}, {"expert": (2, (5, 4))}),
        ((3, 8, 5), {"splits": "gate 4 | up 4", "batched": True}, {"gate": (3, (4, 5)), "up": (3, (4, 5))}),
        ((8, 3, 2, 2), {"convolution": True}, {"": (1, (8, 12))}),
        ((8, 3, 2), {"convolution": True, "transposed": True}, {"": (1, (6, 8))}),
        ((8, 3, 2), {"convolution": True, "splits": "group 2*4"}, {"group": (2, (4, 6))}),
        (
            (8, 3, 2),
            {"convolution": True, "transposed": True, "splits": "group 2*4 along inputs"},
            {"group": (2, (6, 4))},
        ),
    ],
)
def test_matrices(shape: tuple[int, ...], storage: dict, expected: dict[str, tuple[int, tuple[int, int]]]) -> None:
    found = read_matrices(shape, **storage)
    assert {each.name: (each.count, each.shape) for each in found} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q", "'q' is no list of blocks; write it as 'q 2048 | k 512"),
        ("", "is no list of blocks"),
        ("q 3|k 2", "is no list of blocks"),
        ("2 x q 3 | k 2", "is no list of blocks"),
        ("q 3 | k 2 along rows", "is no list of blocks"),
        ("q 3 | q 2", "has two blocks named 'q'; give each a name of its own"),
        ("q 3 | k 0", "has an empty block; leave it out"),
        ("0 x (q 3)", "has an empty block; leave it out"),
        ("q 0*4 | k 3", "has an empty block; leave it out"),
    ],
)
def test_texts_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_splits("splits", text)
    assert str(error.value).startswith(f"splits: {text!r}")
    assert message in str(error.value)


def test_other_types() -> None:
    with pytest.raises(TypeError, match=r"^splits must be a text such as 'q 2048 \| k 512 \| v 512', got \['q'\]"):
        check_splits("splits", ["q"])


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("q 4 | k 2", (6, 5), None),
        ("whole", (7, 5), None),
        ("q 4 | k 2", (7, 5), "is 6 outputs, and the weight has 7; its blocks must sum to that"),
        ("q 4 | k 2", (12, 5), "2 x (...) would fit"),
        ("q 4 | k 2", (5, 6), "it would fit along inputs"),
        (
            "head 2*3 along inputs",
            (6, 5),
            "is 6 inputs, and the weight has 5; its blocks must sum to that; it would fit",
        ),
        ("q 4 | dt 1", (5, 5), "block 'dt' of 'q 4 | dt 1' has a single output in each matrix, which is a vector"),
        ("a 4 | b 4", (8, 1), "'a 4 | b 4' makes vectors of it, as it has a single one of its inputs"),
        ("q 4*1 | k 4", (8, 5), "block 'q' of 'q 4*1 | k 4' has a single output in each matrix"),
    ],
)
def test_texts_that_do_not_fit(text: str, shape: tuple[int, int], message: str | None) -> None:
    found = misfit(text, shape)
    assert (found is None) == (message is None)
    assert message is None or (found is not None and message in found)
