"""Where in a parameter its matrices are, and which part of them a rank holds."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dion2_lightning.matrices import parts
from dion2_lightning.matrices.layout import Layout, Rectangle, Span
from dion2_lightning.matrices.parts import Part, parts_of
from dion2_lightning.matrices.views import Matrices, read_matrices


def layout_on(ranks: int, rank: int, shape: tuple[int, int], axis: int) -> Layout:
    """Rows or columns in pieces, as torch cuts them."""
    size = -(-shape[axis] // ranks)
    spans = [(min(index * size, shape[axis]), min((index + 1) * size, shape[axis])) for index in range(ranks)]
    other = (0, shape[1 - axis])
    rectangles = tuple(Rectangle(span, other) if axis == 0 else Rectangle(other, span) for span in spans)
    layout = mock.Mock(spec=Layout, group="ranks", rectangles=rectangles, replicas=None, own_rank=rank)
    layout.rows = [each.rows for each in rectangles]
    layout.columns = [each.columns for each in rectangles]
    return layout


def found_parts(matrices: Matrices, layout: Layout) -> list[Part]:
    with (
        mock.patch.object(parts, "layout_of", return_value=layout),
        mock.patch.object(parts, "Layout", side_effect=lambda *given: cut_layout(layout, *given)),
    ):
        return parts_of(torch.empty(0), matrices, "w", process_group=None, known={})


def cut_layout(layout: Layout, group: Any, rectangles: tuple[Rectangle, ...], replicas: Any) -> Layout:
    found = mock.Mock(spec=Layout, group=group, rectangles=rectangles, replicas=replicas, own_rank=layout.own_rank)
    found.rows, found.columns = [each.rows for each in rectangles], [each.columns for each in rectangles]
    return found


TEXTS = [
    "q 12 | k 6 | v 6",
    "4 x (q 2 | k 2 | v 2)",
    "3 x (q 4 | k 2 | v 2)",
    "12 x (a 1 | b 1)",
    "q 4*3 | k 2*3 | v 2*3",
    "4 x (q 1*2 | k 1*2 | v 1*2)",
    "3 x (q 2*2 | k 1*2 | v 1*2)",
    "expert 3*8",
]


@pytest.mark.parametrize("along_inputs", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("text", TEXTS)
def test_the_parts_of_all_ranks_are_the_blocks(text: str, ranks: int, along_inputs: bool) -> None:
    """Each rank's parts, put where its rectangles say, give every block's matrices, whatever the borders."""
    text = f"{text} along inputs" if along_inputs else text
    shape = (5, 24) if along_inputs else (24, 5)
    weight = torch.arange(120.0).view(shape)
    for matrices in read_matrices(shape, splits=text):
        assert matrices.block is not None
        axis = int(along_inputs)
        places = [matrices.block.place(index) for index in range(matrices.block.total)]
        expected = weight.index_select(axis, torch.tensor(places))
        expected = torch.stack(expected.chunk(matrices.count, axis))
        whole = torch.full_like(expected, torch.nan)
        for rank in range(ranks):
            layout = layout_on(ranks, rank, shape, axis) if ranks > 1 else Layout()
            (start, stop) = (0, 24) if ranks == 1 else (layout.rows, layout.columns)[axis][rank]
            own = weight.narrow(axis, start, stop - start)
            for part in found_parts(matrices, layout):
                assert part.count is not None
                found, where = part.read(own), whole.narrow(0, part.first, part.count)
                if ranks > 1:
                    (top, bottom), (left, right) = part.layout.rectangles[rank]
                    where = where[:, top:bottom, left:right]
                assert found.shape == where.shape
                assert where.isnan().all()  # no other rank has it
                where.copy_(found)
        assert torch.equal(whole, expected)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("text", ["4 x (q 2 | k 2 | v 2)", "3 x (q 4 | k 2 | v 2)", "12 x (a 1 | b 1)"])
def test_matrices_apart_are_pieces_in_places(text: str, ranks: int) -> None:
    """Pieces, put together, are what is read, and places are those of its slices."""
    weight = torch.arange(120.0).view(24, 5)
    for matrices in read_matrices((24, 5), splits=text):
        for rank in range(ranks):
            layout = layout_on(ranks, rank, (24, 5), 0) if ranks > 1 else Layout()
            start, stop = layout.rows[rank] if ranks > 1 else (0, 24)
            own = weight[None, start:stop]
            for part in found_parts(matrices, layout):
                if part.is_apart:
                    found = part.copy(own[0])
                    assert torch.equal(torch.cat([each.flatten(1, 2) for each in part.pieces(own, 1)], 1), found)
                    assert torch.equal(torch.cat([each.flatten(1, 2) for each in part.in_pieces(found, 1)], 1), found)
                    assert torch.equal(own[0][part.places(torch.arange(found.shape[1]))], found[0])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("text", ["4 x (q 2 | k 2 | v 2)", "3 x (q 4 | k 2 | v 2)", "12 x (a 1 | b 1)"])
def test_a_product_is_added_where_matrices_apart_are(text: str, axis: int, ranks: int) -> None:
    """Whole numbers, whose products and sums are exact."""
    generator = torch.Generator().manual_seed(0)
    shape = [5, 5]
    shape[axis] = 24
    for matrices in read_matrices(tuple(shape), splits=text, transposed=axis == 1):
        for rank in range(ranks):
            layout = layout_on(ranks, rank, tuple(shape), axis) if ranks > 1 else Layout()
            start, stop = (layout.rows, layout.columns)[axis][rank] if ranks > 1 else (0, 24)
            weight = torch.arange(120.0).view(shape).narrow(axis, start, stop - start)
            for part in found_parts(matrices, layout):
                if part.is_apart:
                    found = part.copy(weight)
                    left, right = (
                        torch.randint(-9, 9, (1, n, 3), generator=generator).float() for n in found.shape[1:]
                    )
                    changed = weight.clone()
                    part.add_product(changed, left, right)
                    places = part.places(torch.arange(found.shape[1 + axis]))
                    expected = weight.clone().index_add_(axis, places, (left @ right.mT)[0])
                    assert torch.equal(changed, expected)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_changed_arrives_in_the_weight(text: str, ranks: int) -> None:
    own: Span = (0, 24) if ranks == 1 else (8, 16)
    weight = torch.zeros(own[1] - own[0], 5)
    for matrices in read_matrices((24, 5), splits=text):
        layout = layout_on(ranks, 1, (24, 5), 0) if ranks > 1 else Layout()
        for part in found_parts(matrices, layout):
            found = part.read(weight)
            found += 1
            if not part.is_view(weight):
                part.write(weight, found)
    assert torch.equal(weight, torch.ones_like(weight))


def test_ranks_that_hold_whole_heads_share_one_part_each() -> None:
    (matrices,) = read_matrices((24, 5), splits="head 6*4")
    found = found_parts(matrices, layout_on(2, 0, (24, 5), 0))
    assert [(part.first, part.count, part.layout.rows) for part in found] == [
        (0, 3, [(0, 4), (4, 4)]),
        (3, 3, [(0, 0), (0, 4)]),
    ]


def kernels(tensor: Tensor, transposed: bool) -> Tensor:
    """(out, in x kernel), or (out x kernel, in) of a transposed convolution."""
    matrix = tensor.flatten(1)
    return matrix.T if transposed else matrix


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_kernels_are_views_in_either_memory_order(memory_format: torch.memory_format) -> None:
    weight = torch.randn(6, 4, 3, 3).to(memory_format=memory_format)
    (matrices,) = read_matrices((6, 4, 3, 3), convolution=True)
    taps_first = memory_format == torch.channels_last
    part = Part(matrices, 0, None, Layout())
    found = part.read(weight, taps_first=taps_first)
    assert part.is_view(weight, taps_first=taps_first) and found.data_ptr() == weight.data_ptr()
    expected = weight.movedim(1, -1).flatten(1) if taps_first else weight.flatten(1)
    assert torch.equal(found, expected[None])
    assert not part.is_view(weight, taps_first=not taps_first)
    copy = part.read(weight, taps_first=not taps_first)
    part.write(weight, copy + 1, taps_first=not taps_first)
    assert torch.equal(found, expected[None]) and torch.equal(copy + 1, part.read(weight, taps_first=not taps_first))
