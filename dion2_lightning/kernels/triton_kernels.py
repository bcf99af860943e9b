"""The kernels of fused.py, in Triton: each makes one pass over the memory of many matrices, whatever their shapes.

A program works on some slices of one matrix. What it has to know stands in a table of int64 numbers: for each matrix
where the row of its stack begins, then a row for each stack, or each piece of one, which fused.py writes column by
column as they are read here. So shapes, addresses and numbers change without a compilation. A row begins with the
number of its first matrix and three sizes; then come

    a view: address, strides of (count, n, m)
    a vector, with a number for each slice or entry of a matrix: address, strides of the matrix and of the number
    a scalar: address and stride of float32 numbers by matrix, or else zero, and the bits of one for all

A tile has the axis along which memory is dense last: ``ALONG`` says whether it runs along slices, which then are the
tile's rows. ``UNIT`` says of a view that its last stride is 1, and ``ALIGNED`` of all views that their other strides,
and the size of the tile's last axis, are multiples of 16 and their addresses of 16 bytes, so that loads are wide.

Products are rounded before they are added, as torch does it: kernels are launched with ``enable_fp_fusion=False``.
"""

from typing import Final

import torch
import triton
import triton.language as tl

TYPES: Final = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
"""Triton's names of the dtypes."""

LAUNCH: Final = ("table", "tiles")
"""Arguments that no kernel is compiled for: else a number that is 1, or a multiple of 16, would get one of its own."""


@triton.jit
def set_one(number):
    """Set a float32 number to 1, to see whether kernels can be compiled and launched."""
    tl.store(number, 1.0)


@triton.jit(do_not_specialize=LAUNCH)
def accumulate(
    table,
    tiles,
    M_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    ALONG: tl.constexpr,
    M_UNIT: tl.constexpr,
    G_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SLICES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """M <- M + G, and the sums of |M| by slice. A program has all entries of its slices."""
    row, matrix, tile = _place(table, tiles)
    n, m = _sizes(row, ALONG, ALIGNED)
    if tile * SLICES >= n:
        return
    momentum, m_slice, m_entry = _view(row + 4, matrix, M_TYPE, ALONG, ALIGNED)
    gradient, g_slice, g_entry = _view(row + 8, matrix, M_TYPE if G_TYPE is None else G_TYPE, ALONG, ALIGNED)
    is_open = _gate(row + 12, matrix)
    sums = tl.load(row + 20).to(tl.pointer_type(tl.float64)) + matrix * n

    slices = tile * SLICES + tl.arange(0, SLICES)
    s = _of_slices(slices, ALONG)
    slice_bits = _of_slices(_hashes(row + 14, matrix, slices, slices < n, STOCHASTIC), ALONG)
    total = tl.zeros((SLICES, ENTRIES) if ALONG else (ENTRIES, SLICES), tl.float64)
    for start in range(0, m, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        e = _of_entries(entries, ALONG)
        mask = (s < n) & (e < m)
        place = momentum + _offsets(s, e, m_slice, m_entry, ALONG, M_UNIT)
        new = tl.load(place, mask=mask, other=0)
        if G_TYPE is not None:
            added = gradient + _offsets(s, e, g_slice, g_entry, ALONG, G_UNIT)
            wide = new.to(tl.float32) + tl.load(added, mask=(mask & is_open) != 0, other=0).to(tl.float32)
            entry_bits = _of_entries(_hashes(row + 17, matrix, entries, entries < m, STOCHASTIC), ALONG)
            new = _rounded(wide, slice_bits * entry_bits, M_TYPE, STOCHASTIC)
            tl.store(place, new, mask=mask)
        total += tl.abs(new.to(tl.float32)).to(tl.float64)
    tl.store(sums + slices, tl.sum(total, 1 if ALONG else 0), mask=slices < n)


@triton.jit(do_not_specialize=LAUNCH)
def take(
    table,
    tiles,
    M_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALONG: tl.constexpr,
    M_UNIT: tl.constexpr,
    G_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SLICES: tl.constexpr,
    ENTRIES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """S <- M[K], or G[K] + mu M[K], then M[K] <- mu M[K]. A program has a span of entries of its selected slices."""
    row, matrix, tile = _place(table, tiles)
    _, m = _sizes(row, ALONG, ALIGNED)
    k = tl.load(row + 3)
    spans = tl.cdiv(m, SPAN)
    if tile >= tl.cdiv(k, SLICES) * spans:
        return
    momentum, m_slice, m_entry = _view(row + 4, matrix, M_TYPE, ALONG, ALIGNED)
    gradient, g_slice, g_entry = _view(row + 8, matrix, M_TYPE if G_TYPE is None else G_TYPE, ALONG, ALIGNED)
    submatrix, s_slice, s_entry = _view(row + 12, matrix, S_TYPE, ALONG, ALIGNED)
    is_open = _gate(row + 16, matrix)
    factor, nesterov_factor = _scalar(row + 18, matrix), _scalar(row + 21, matrix)

    positions = tile // spans * SLICES + tl.arange(0, SLICES)
    selected = _selected(row + 24, matrix, positions, k)
    p, s = _of_slices(positions, ALONG), _of_slices(selected, ALONG)
    slice_bits = _of_slices(_hashes(row + 27, matrix, selected, positions < k, STOCHASTIC), ALONG)
    first = tile % spans * SPAN
    for start in range(first, tl.minimum(first + SPAN, m), ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        e = _of_entries(entries, ALONG)
        mask = (p < k) & (e < m)
        place = momentum + _offsets(s, e, m_slice, m_entry, ALONG, M_UNIT)
        old = tl.load(place, mask=mask, other=0).to(tl.float32)
        taken = old
        if NESTEROV:
            taken = old * nesterov_factor
        if G_TYPE is not None:
            added = gradient + _offsets(s, e, g_slice, g_entry, ALONG, G_UNIT)
            taken += tl.load(added, mask=(mask & is_open) != 0, other=0).to(tl.float32)
        target = submatrix + _offsets(p, e, s_slice, s_entry, ALONG, True)
        tl.store(target, _rounded(taken, 0, S_TYPE, False), mask=mask)
        entry_bits = _of_entries(_hashes(row + 30, matrix, entries, entries < m, STOCHASTIC), ALONG)
        tl.store(place, _rounded(old * factor, slice_bits * entry_bits, M_TYPE, STOCHASTIC), mask=mask)


@triton.jit(do_not_specialize=LAUNCH)
def norm_parts(
    table,
    tiles,
    S_TYPE: tl.constexpr,
    ALONG: tl.constexpr,
    S_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    ENTRIES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sum the squares of the entries of a matrix, in at most ``PARTS`` parts. A program has one of them."""
    row, matrix, part = _place(table, tiles)
    k, m = _sizes(row, ALONG, ALIGNED)
    across = tl.cdiv(m, ENTRIES)
    blocks = tl.cdiv(k, SLICES) * across
    if part >= blocks:
        return
    source, s_slice, s_entry = _view(row + 4, matrix, S_TYPE, ALONG, ALIGNED)
    total = tl.zeros((SLICES, ENTRIES) if ALONG else (ENTRIES, SLICES), tl.float64)
    for block in range(part.to(tl.int64), blocks, PARTS):
        s = _of_slices(block // across * SLICES + tl.arange(0, SLICES), ALONG)
        e = _of_entries(block % across * ENTRIES + tl.arange(0, ENTRIES), ALONG)
        place = source + _offsets(s, e, s_slice, s_entry, ALONG, S_UNIT)
        wide = tl.load(place, mask=(s < k) & (e < m), other=0).to(tl.float32).to(tl.float64)
        total += wide * wide
    tl.store(tl.load(row + 12).to(tl.pointer_type(tl.float64)) + matrix * PARTS + part, tl.sum(total))


@triton.jit(do_not_specialize=LAUNCH)
def divide(
    table,
    tiles,
    S_TYPE: tl.constexpr,
    O_TYPE: tl.constexpr,
    ALONG: tl.constexpr,
    S_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    ENTRIES: tl.constexpr,
    SPAN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Divide a matrix by a little more than its norm. A program has a span of entries of its slices."""
    row, matrix, tile = _place(table, tiles)
    k, m = _sizes(row, ALONG, ALIGNED)
    spans = tl.cdiv(m, SPAN)
    if tile >= tl.cdiv(k, SLICES) * spans:
        return
    source, s_slice, s_entry = _view(row + 4, matrix, S_TYPE, ALONG, ALIGNED)
    target, o_slice, o_entry = _view(row + 8, matrix, O_TYPE, ALONG, ALIGNED)
    parts = tl.arange(0, PARTS)
    known = tl.load(
        tl.load(row + 12).to(tl.pointer_type(tl.float64)) + matrix * PARTS + parts,
        mask=parts < tl.cdiv(k, SLICES) * tl.cdiv(m, ENTRIES),
        other=0,
    )
    safety = tl.load(row + 13).to(tl.float64, bitcast=True)
    norm = (tl.sqrt(tl.sum(known)) * safety).to(tl.float32)
    norm = tl.where(norm < 1.1754943508222875e-38, 1.1754943508222875e-38, norm)  # the smallest normal number

    slices = tile // spans * SLICES + tl.arange(0, SLICES)
    s = _of_slices(slices, ALONG)
    first = tile % spans * SPAN
    for start in range(first, tl.minimum(first + SPAN, m), ENTRIES):
        e = _of_entries(start + tl.arange(0, ENTRIES), ALONG)
        mask = (s < k) & (e < m)
        place = source + _offsets(s, e, s_slice, s_entry, ALONG, S_UNIT)
        divided = tl.div_rn(tl.load(place, mask=mask, other=0).to(tl.float32), norm)
        place = target + _offsets(s, e, o_slice, o_entry, ALONG, True)
        tl.store(place, _rounded(divided, 0, O_TYPE, False), mask=mask)


@triton.jit(do_not_specialize=LAUNCH)
def neuron_sums(
    table,
    tiles,
    O_TYPE: tl.constexpr,
    ALONG: tl.constexpr,
    O_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Sum the squares of slices. A program has all entries of its slices."""
    row, matrix, tile = _place(table, tiles)
    n, m = _sizes(row, ALONG, ALIGNED)
    if tile * SLICES >= n:
        return
    result, o_slice, o_entry = _view(row + 4, matrix, O_TYPE, ALONG, ALIGNED)
    sums = tl.load(row + 8).to(tl.pointer_type(tl.float64)) + matrix * n

    slices = tile * SLICES + tl.arange(0, SLICES)
    s = _of_slices(slices, ALONG)
    total = tl.zeros((SLICES, ENTRIES) if ALONG else (ENTRIES, SLICES), tl.float64)
    for start in range(0, m, ENTRIES):
        e = _of_entries(start + tl.arange(0, ENTRIES), ALONG)
        place = result + _offsets(s, e, o_slice, o_entry, ALONG, O_UNIT)
        wide = tl.load(place, mask=(s < n) & (e < m), other=0).to(tl.float32).to(tl.float64)
        total += wide * wide
    # Squares of norms: sums that lie halfway between two float32 numbers are common, and are then rounded as by torch.
    norms = tl.sqrt(tl.sum(total, 1 if ALONG else 0))
    tl.store(sums + slices, norms * norms, mask=slices < n)


@triton.jit(do_not_specialize=LAUNCH)
def neuron_factors(table, tiles, S_TYPE: tl.constexpr, INDEXED: tl.constexpr, NEURONS: tl.constexpr):
    """Update the variances of neurons, and make their factors. A program has all neurons of a matrix."""
    row, matrix, _tile = _place(table, tiles)
    n = tl.load(row + 1)
    before, after = tl.zeros((NEURONS,), tl.float64), tl.zeros((NEURONS,), tl.float64)
    for start in range(0, n, NEURONS):
        squares, inverse, variance, place = _normalized(row, matrix, start + tl.arange(0, NEURONS), n, S_TYPE, INDEXED)
        before += squares
        after += squares * (inverse * inverse)
    length = tl.sum(after)
    length = tl.where(length < 1.1754943508222875e-38, 1.1754943508222875e-38, length)  # the smallest normal number
    scale = tl.sqrt(tl.sum(before) / length)

    factors = tl.load(row + 18).to(tl.pointer_type(tl.float32)) + matrix * n
    for start in range(0, n, NEURONS):
        neurons = start + tl.arange(0, NEURONS)
        squares, inverse, variance, place = _normalized(row, matrix, neurons, n, S_TYPE, INDEXED)
        tl.store(place, variance, mask=neurons < n)
        tl.store(factors + neurons, (inverse * scale).to(tl.float32), mask=neurons < n)


@triton.jit
def _normalized(row, matrix, neurons, n, S_TYPE: tl.constexpr, INDEXED: tl.constexpr):
    """Return of neurons: sums of squares, what divides by their size, the new variances, and where these belong."""
    mask = neurons < n
    sums = tl.load(row + 4).to(tl.pointer_type(S_TYPE)) + matrix * tl.load(row + 5)
    squares = tl.load(sums + neurons * tl.load(row + 6), mask=mask, other=0).to(tl.float32)
    variances = tl.load(row + 7).to(tl.pointer_type(tl.float32)) + matrix * tl.load(row + 8)
    outputs = neurons
    if INDEXED:
        outputs = _selected(row + 10, matrix, neurons, n)
    place = variances + outputs * tl.load(row + 9)
    known = tl.load(place, mask=mask, other=0)
    mean, weight = squares * _float(row + 16), _scalar(row + 13, matrix)
    known += (mean - known) * weight
    known = tl.where(known < mean * weight, mean * weight, known)
    eps = tl.load(row + 17).to(tl.float64, bitcast=True)
    return squares.to(tl.float64), 1.0 / (tl.sqrt(known.to(tl.float64)) + eps), known, place


@triton.jit(do_not_specialize=LAUNCH)
def apply(
    table,
    tiles,
    X_TYPE: tl.constexpr,
    O_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr,
    DECAYS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    FACTORS_OF_SLICES: tl.constexpr,
    ALONG: tl.constexpr,
    X_UNIT: tl.constexpr,
    O_UNIT: tl.constexpr,
    M_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SLICES: tl.constexpr,
    ENTRIES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """X <- shrink X, and X[K] <- X[K] - step_size O. A program has a span of entries of its slices.

    Slices are all where ``DECAYS``, else the selected ones. With ``M_TYPE`` the decay is cautious.
    """
    row, matrix, tile = _place(table, tiles)
    n, m = _sizes(row, ALONG, ALIGNED)
    k = tl.load(row + 3)
    size = n if DECAYS else k
    spans = tl.cdiv(m, SPAN)
    if tile >= tl.cdiv(size, SLICES) * spans:
        return
    weight, x_slice, x_entry = _view(row + 4, matrix, X_TYPE, ALONG, ALIGNED)
    result, o_slice, o_entry = _view(row + 8, matrix, O_TYPE, ALONG, ALIGNED and ALONG)
    momentum, m_slice, m_entry = _view(row + 12, matrix, X_TYPE if M_TYPE is None else M_TYPE, ALONG, ALIGNED)
    step = 0.0 - _scalar(row + 16, matrix)  # of a step that is skipped 0, and not -0
    shrink = _scalar(row + 19, matrix)

    own = tile // spans * SLICES + tl.arange(0, SLICES)
    if DECAYS:
        slices = own.to(tl.int64)
        positions, is_selected = _find(row + 22, matrix, slices, slices < n, k)
    else:
        positions, is_selected = own, own < k
        slices = _selected(row + 22, matrix, own, k)
    s, p, selected = _of_slices(slices, ALONG), _of_slices(positions, ALONG), _of_slices(is_selected, ALONG)
    is_own = _of_slices(own < size, ALONG)
    slice_bits = _of_slices(_hashes(row + 25, matrix, slices, own < size, STOCHASTIC), ALONG)
    factors = tl.load(row + 31).to(tl.pointer_type(tl.float32)) + matrix * tl.load(row + 32)
    factor_stride = tl.load(row + 33)
    first = tile % spans * SPAN
    for start in range(first, tl.minimum(first + SPAN, m), ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        e = _of_entries(entries, ALONG)
        mask = is_own & (e < m)
        place = weight + _offsets(s, e, x_slice, x_entry, ALONG, X_UNIT)
        old = tl.load(place, mask=mask, other=0).to(tl.float32)
        source = result + _offsets(p, e, o_slice, o_entry, ALONG, O_UNIT)
        direction = tl.load(source, mask=mask & selected, other=0).to(tl.float32)
        change = direction * step
        if HAS_FACTORS:
            if FACTORS_OF_SLICES:
                change *= _of_slices(tl.load(factors + positions * factor_stride, mask=is_selected, other=0), ALONG)
            else:
                change *= _of_entries(tl.load(factors + entries * factor_stride, mask=entries < m, other=0), ALONG)
        new = old
        if DECAYS:
            new = old * shrink
        if M_TYPE is not None:
            source = momentum + _offsets(s, e, m_slice, m_entry, ALONG, M_UNIT)
            of_momentum = tl.load(source, mask=mask & (selected == 0), other=0).to(tl.float32)
            sign = (old > 0).to(tl.float32) - (old < 0).to(tl.float32)
            new = tl.where(tl.where(selected, direction, of_momentum) * sign >= 0, new, old)
        new = tl.where(selected, new + change, new)
        entry_bits = _of_entries(_hashes(row + 28, matrix, entries, entries < m, STOCHASTIC), ALONG)
        tl.store(place, _rounded(new, slice_bits * entry_bits, X_TYPE, STOCHASTIC), mask=mask)


# The table


@triton.jit
def _place(table, tiles):
    """Return this program's row, the number of its matrix in the stack, and of its tile in the matrix."""
    program = tl.program_id(0)
    number = program // tiles
    row = table + tl.load(table + number)
    return row, number - tl.load(row), program % tiles


@triton.jit
def _sizes(row, ALONG: tl.constexpr, ALIGNED: tl.constexpr):
    """Return n and m."""
    n, m = tl.load(row + 1), tl.load(row + 2)
    if ALIGNED:
        if ALONG:
            m = tl.multiple_of(m, 16)
        else:
            n = tl.multiple_of(n, 16)
    return n, m


@triton.jit
def _view(row, matrix, TYPE: tl.constexpr, ALONG: tl.constexpr, ALIGNED: tl.constexpr):
    """Return where a matrix begins, and the strides of its slices and entries."""
    pointer, of_matrices = tl.load(row).to(tl.pointer_type(TYPE)), tl.load(row + 1)
    of_slices, of_entries = tl.load(row + 2), tl.load(row + 3)
    if ALIGNED:
        pointer, of_matrices = tl.multiple_of(pointer, 16), tl.multiple_of(of_matrices, 16)
        if ALONG:
            of_slices = tl.multiple_of(of_slices, 16)
        else:
            of_entries = tl.multiple_of(of_entries, 16)
    return pointer + matrix * of_matrices, of_slices, of_entries


@triton.jit
def _scalar(row, matrix):
    """Return a matrix's float32 number: the one at an address, or else the one in the table."""
    address, stride = tl.load(row), tl.load(row + 1)
    place = address.to(tl.pointer_type(tl.float32)) + matrix * stride
    return tl.load(place, mask=address != 0, other=_float(row + 2))


@triton.jit
def _float(row):
    """Return a float32 number whose bits are in the table."""
    return tl.load(row).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _gate(row, matrix):
    """Return whether a matrix's gradient counts: always, where there is no address.

    Where it is joined to a mask, ``!= 0`` keeps that a mask: the interpreter of Triton 3.9 makes int8 of it.
    """
    address, stride = tl.load(row), tl.load(row + 1)
    return tl.load(address.to(tl.pointer_type(tl.int8)) + matrix * stride, mask=address != 0, other=1) != 0


@triton.jit
def _selected(row, matrix, positions, k):
    """Return which slices are at some positions of K."""
    indices = tl.load(row).to(tl.pointer_type(tl.int64)) + matrix * tl.load(row + 1)
    return tl.load(indices + positions * tl.load(row + 2), mask=positions < k, other=0)


@triton.jit
def _find(row, matrix, slices, mask, k):
    """Return the positions of slices in K, which is sorted, and whether they are there at all."""
    indices, stride = tl.load(row).to(tl.pointer_type(tl.int64)) + matrix * tl.load(row + 1), tl.load(row + 2)
    low = slices * 0
    high = low + tl.where(mask, k, 0)
    left = k
    while left > 0:
        middle = (low + high) // 2
        is_before = low < high
        is_before &= tl.load(indices + middle * stride, mask=is_before, other=0) < slices
        low, high = tl.where(is_before, middle + 1, low), tl.where(is_before, high, middle)
        left = left // 2
    there = mask & (low < k)
    return low, there & (tl.load(indices + low * stride, mask=there, other=-1) == slices)


@triton.jit
def _hashes(row, matrix, places, mask, STOCHASTIC: tl.constexpr):
    """Return the hashes of slices or entries, whose products are the random bits."""
    if STOCHASTIC:
        hashes = tl.load(row).to(tl.pointer_type(tl.int32)) + matrix * tl.load(row + 1)
        found = tl.load(hashes + places * tl.load(row + 2), mask=mask, other=0)
    else:
        found = (places * 0).to(tl.int32)
    return found


# Tiles


@triton.jit
def _of_slices(numbers, ALONG: tl.constexpr):
    """Spread numbers of slices over a tile."""
    return numbers[:, None] if ALONG else numbers[None, :]


@triton.jit
def _of_entries(numbers, ALONG: tl.constexpr):
    """Spread numbers of entries over a tile."""
    return numbers[None, :] if ALONG else numbers[:, None]


@triton.jit
def _offsets(s, e, of_slices, of_entries, ALONG: tl.constexpr, UNIT: tl.constexpr):
    """Return where the entries of a tile are in the matrix."""
    if not UNIT:
        return s * of_slices + e * of_entries
    return s * of_slices + e if ALONG else e * of_entries + s


# Rounding, as in rounding.py


@triton.jit
def _rounded(values, bits, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round float32 numbers to a dtype: to the nearest number, or by random bits to one of the two around."""
    if STOCHASTIC:
        SPARE: tl.constexpr = 16 if tl.bfloat16 == TYPE else 13
        noise = (bits >> (32 - SPARE)) & ((1 << SPARE) - 1)
        raw = values.to(tl.int32, bitcast=True)
        kept = ((raw + noise) & -(1 << SPARE)).to(tl.float32, bitcast=True)
        if tl.float16 == TYPE:
            multiples = tl.floor(tl.abs(values) * 16777216.0 + noise.to(tl.float32) * (1.0 / 8192)) * (1.0 / 16777216)
            small = multiples.to(tl.int32, bitcast=True) | (raw & -0x80000000)
            kept = tl.where(tl.abs(values) < 6.103515625e-05, small.to(tl.float32, bitcast=True), kept)
        values = tl.where(values != values, float("nan"), kept)
    elif tl.bfloat16 == TYPE:
        # To the nearest number, of two the even one. Written out, as Triton's interpreter cuts the lower bits off.
        raw = values.to(tl.int32, bitcast=True)
        kept = ((raw + 0x7FFF + ((raw >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        values = tl.where(values != values, float("nan"), kept)
    return values.to(TYPE)
