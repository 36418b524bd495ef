"""Triton kernels of the second moments: strips of columns, tiles of the upper triangle, and their ordered sum.

Work is cut into items (matrix, tile, chunk of rows), for all matrices of a call in one launch. What a matrix is comes
from a table of int64 numbers on the device, one record of FIELDS numbers a matrix (written by `plan.py`).

Floors on an H200, for 25216 x 768: 22 us from bfloat16 and 66 us from float32 rows; twelve layers in one call 264 us
and 790 us (operations of the tiles at 790 TFLOP/s; performance.md 2.1). They are bounds, not measurements.
"""

import triton
import triton.language as tl

from cl_kernels.ops import _tuning
from cl_kernels.ops._triton import dot3, split, triangle, work_item

FIELDS = tl.constexpr(24)
ROWS, SIZE, OUTER_STRIDE, INNER, INNER_STRIDE, COLUMN_STRIDE = (tl.constexpr(i) for i in range(6))
X, WEIGHT, COV, TOTAL, COUNT = (tl.constexpr(i) for i in range(6, 11))
COV_ROW, COV_COLUMN, TOTAL_STRIDE, TOTAL_WIDE, COUNT_WIDE = (tl.constexpr(i) for i in range(11, 16))
CHUNK, CHUNKS, FIRST_PAIR, PAIRS, COLUMNS_AT, FIRST_TILE, FIRST_STRIP, FIRST_SUM = (
    tl.constexpr(i) for i in range(16, 24)
)
STRIP = tl.constexpr(32)  # columns of a strip: 128 bytes of float32, and enough strips for all multiprocessors


@triton.jit
def find_record(table, matrices, FIELD: tl.constexpr, MOST: tl.constexpr):
    """The record that this work item belongs to, and the item's number among the record's own."""
    item = work_item()
    at = tl.arange(0, MOST)
    firsts = tl.load(table + at * FIELDS + FIELD, mask=at < matrices, other=1 << 62)
    record = table + (tl.sum((firsts <= item).to(tl.int64)) - 1) * FIELDS
    return record, item - tl.load(record + FIELD)


@triton.jit
def row_offsets(record, start, step, at, ALIGNED: tl.constexpr):
    """Where rows start + step + at begin, in elements: rows lie in two levels, as queries do in a fused projection."""
    inner = tl.load(record + INNER)
    outer_stride = tl.multiple_of(tl.load(record + OUTER_STRIDE), ALIGNED)
    inner_stride = tl.multiple_of(tl.load(record + INNER_STRIDE), ALIGNED)
    outer = start // inner
    within = (start - outer * inner).to(tl.int32) + step + at  # 32 bits: a division in 64 costs as much as the tile
    over = within // inner.to(tl.int32)
    within -= over * inner.to(tl.int32)
    return (outer + over) * outer_stride + within * inner_stride


@triton.jit(do_not_specialize=["matrices"])
def cl_gram_strips(
    table, matrices, columns, MOST: tl.constexpr, DTYPE: tl.constexpr, STEP: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """For a chunk of rows and a strip of columns: 2^-s that undoes the scale of w x and of x, and the sum of w x.

    Scaled by 2^s the largest number of a column in this chunk lies in [2^14, 2^15), where two float16 numbers hold 22
    bits of it. Exponents are compared as integers, so NaN and infinity need no care.
    """
    record, item = find_record(table, matrices, FIRST_STRIP, MOST)
    size = tl.multiple_of(tl.load(record + SIZE), ALIGNED)
    chunks = tl.load(record + CHUNKS)
    chunk, strip = item % chunks, item // chunks
    start = chunk * tl.load(record + CHUNK)
    rows = tl.minimum(tl.load(record + ROWS) - start, tl.load(record + CHUNK)).to(tl.int32)
    x = tl.load(record + X).to(tl.pointer_type(DTYPE))
    weight = tl.load(record + WEIGHT).to(tl.pointer_type(tl.float32)) + start
    weights_there = tl.where(tl.load(record + WEIGHT) != 0, rows, 0)
    column = strip * STRIP + tl.arange(0, STRIP)
    at = tl.arange(0, STEP)
    column_offsets = column if ALIGNED > 1 else column * tl.load(record + COLUMN_STRIDE)
    weighted_top = tl.zeros((STRIP,), tl.int32)
    top = tl.zeros((STRIP,), tl.int32)
    total = tl.zeros((STRIP,), tl.float64)
    weights = tl.zeros((STEP,), tl.float64)
    for step in range(0, rows, STEP):
        offsets = row_offsets(record, start, step, at, ALIGNED)
        there = step + at < rows
        place = x + (offsets[:, None] + column_offsets[None, :])
        if ALIGNED > 1:
            place = tl.multiple_of(place, [1, 16])
        plain = tl.load(place, mask=there[:, None] & (column < size)[None, :], other=0.0).to(tl.float32)
        w = tl.load(weight + step + at, mask=step + at < weights_there, other=1.0)
        tile = plain * w[:, None]
        weights += tl.where(there, w, 0.0).to(tl.float64)
        total += tl.sum(tile, 0).to(tl.float64)
        top = tl.maximum(top, tl.max(plain.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
        weighted_top = tl.maximum(weighted_top, tl.max(tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
    place = columns + tl.load(record + COLUMNS_AT) + chunk * 3 * size + column
    tl.store(place, undo_scale(weighted_top), mask=column < size)
    tl.store(place + size, undo_scale(top), mask=column < size)
    tl.store(place + 2 * size, total.to(tl.float32), mask=column < size)
    if strip == 0:
        tl.store(columns + tl.load(record + COLUMNS_AT) + chunks * 3 * size + chunk, tl.sum(weights).to(tl.float32))


@triton.jit
def undo_scale(top):
    """2^-s as float32, from the bits of the largest absolute value; s is at most 126, so that 2^s is a number."""
    exponent = tl.minimum(141 - (top >> 23), 126)
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse(power):
    """1 / 2^-s, from its bits: a division on the device is right to 2 ulp only."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["matrices"])
def cl_gram_tiles(
    table, matrices, columns, partial, MOST: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    ALIGNED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of the upper triangle over one chunk of rows, in float32: X_i^T X_j of 16-bit rows, products of halves
    scaled by columns (`cl_gram_strips`) where SPLIT.

    A tensor core cuts off what it adds: one accumulator drifts by 2e-5 over 25k rows, by 7e-7 over 512. So each product
    of STEP rows starts at zero and is added outside of it. It is subtracted, and the sign turned at the end, because
    Triton makes `total += dot(a, b)` one accumulator again (a test counts the subtractions in the machine code).
    """
    record, item = find_record(table, matrices, FIRST_TILE, MOST)
    pairs = tl.load(record + PAIRS)
    chunk = item // pairs  # all tiles of a chunk run together: they read the same rows
    i, j = triangle(tl.load(record + FIRST_PAIR) + item % pairs)
    size = tl.multiple_of(tl.load(record + SIZE), ALIGNED)
    start = chunk * tl.load(record + CHUNK)
    rows = tl.minimum(tl.load(record + ROWS) - start, tl.load(record + CHUNK)).to(tl.int32)
    x = tl.load(record + X).to(tl.pointer_type(DTYPE))
    within = tl.arange(0, TILE)
    left, right = i * TILE + within, j * TILE + within
    at = tl.arange(0, STEP)
    if ALIGNED > 1:
        left_offsets, right_offsets = left, right
    else:
        left_offsets = left * tl.load(record + COLUMN_STRIDE)
        right_offsets = right * tl.load(record + COLUMN_STRIDE)
    if SPLIT:
        weight = tl.load(record + WEIGHT).to(tl.pointer_type(tl.float32)) + start
        weights_there = tl.where(tl.load(record + WEIGHT) != 0, rows, 0)
        scales = columns + tl.load(record + COLUMNS_AT) + chunk * 3 * size
        left_scale = inverse(tl.load(scales + left, mask=left < size, other=1.0))
        right_scale = inverse(tl.load(scales + size + right, mask=right < size, other=1.0))
    total = tl.zeros((TILE, TILE), tl.float32)
    for step in range(0, rows, STEP):
        offsets = row_offsets(record, start, step, at, ALIGNED)
        there = step + at < rows
        left_place = x + (offsets[:, None] + left_offsets[None, :])
        right_place = x + (offsets[:, None] + right_offsets[None, :])
        if ALIGNED > 1:
            left_place = tl.multiple_of(left_place, [1, 16])
            right_place = tl.multiple_of(right_place, [1, 16])
        a = tl.load(left_place, mask=there[:, None] & (left < size)[None, :], other=0.0)
        b = tl.load(right_place, mask=there[:, None] & (right < size)[None, :], other=0.0)
        if SPLIT:
            w = tl.load(weight + step + at, mask=step + at < weights_there, other=1.0)
            a_high, a_low = split(a.to(tl.float32) * w[:, None] * left_scale[None, :])
            b_high, b_low = split(b.to(tl.float32) * right_scale[None, :])
            total -= dot3(tl.trans(a_high), tl.trans(a_low), b_high, b_low)
        else:
            total -= tl.dot(tl.trans(a), b)
    tl.store(partial + item_place(record, chunk, item % pairs, TILE) + within[:, None] * TILE + within[None, :], -total)


@triton.jit
def item_place(record, chunk, pair, TILE: tl.constexpr):
    """Where in the workspace the sums of a tile over a chunk lie."""
    return (tl.load(record + FIRST_TILE) + chunk * tl.load(record + PAIRS) + pair) * (TILE * TILE)


@triton.jit
def store_scaled(address, wide, offsets, sums, alpha, beta, mask, read):
    """state <- beta state + alpha sums at an address whose dtype, float64 or float32, is known at run time only."""
    if wide:
        place = address.to(tl.pointer_type(tl.float64)) + offsets
        tl.store(place, beta * tl.load(place, mask=read, other=0.0) + alpha * sums, mask=mask)
    else:
        short = address.to(tl.pointer_type(tl.float32)) + offsets
        before = tl.load(short, mask=read, other=0.0).to(tl.float64)
        tl.store(short, (beta * before + alpha * sums).to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["matrices", "scaled", "alpha_bits", "beta_bits"])
def cl_gram_sum(
    table, matrices, columns, partial, scaled, alpha_bits: tl.int64, beta_bits: tl.int64, MOST: tl.constexpr,
    STATE: tl.constexpr, TILE: tl.constexpr, ROWS_AT_ONCE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Chunks added in ascending order in float64, whatever the dtype of the state; both triangles written.

    Each element of the upper triangle belongs to one program, which also writes its mirror image: no two programs
    write one place, none reads what another one writes, so the bits are the same on every run.
    """
    alpha = alpha_bits.to(tl.int64).to(tl.float64, bitcast=True)
    beta = beta_bits.to(tl.int64).to(tl.float64, bitcast=True)  # the interpreter narrows a 0
    record, item = find_record(table, matrices, FIRST_SUM, MOST)
    parts = TILE // ROWS_AT_ONCE
    pair = item // parts
    i, j = triangle(tl.load(record + FIRST_PAIR) + pair)
    size, chunks = tl.load(record + SIZE), tl.load(record + CHUNKS)
    readable = tl.where(beta != 0, size, 0)  # beta 0 reads nothing
    above = (item % parts) * ROWS_AT_ONCE + tl.arange(0, ROWS_AT_ONCE)
    within = tl.arange(0, TILE)
    row, column = i * TILE + above, j * TILE + within
    scales = columns + tl.load(record + COLUMNS_AT)
    sums = tl.zeros((ROWS_AT_ONCE, TILE), tl.float64)
    for first in range(0, chunks, AHEAD):
        for k in tl.static_range(AHEAD):  # so many loads are on their way at once
            chunk = first + k
            there = tl.where(chunk < chunks, size, 0)
            loaded = within < tl.where(chunk < chunks, TILE, 0)  # the whole tile: zeros were stored beyond the edge
            place = partial + item_place(record, chunk, pair, TILE) + above[:, None] * TILE + within[None, :]
            some = tl.load(place, mask=loaded[None, :], other=0.0).to(tl.float64)
            left = tl.load(scales + chunk * 3 * size + row, mask=row < there * scaled, other=1.0)
            right = tl.load(scales + (chunk * 3 + 1) * size + column, mask=column < there * scaled, other=1.0)
            some = some * left.to(tl.float64)[:, None] * right.to(tl.float64)[None, :]
            sums += some
    above_diagonal = row[:, None] <= column[None, :]
    upper = above_diagonal & (column < size)[None, :]
    cov = tl.load(record + COV).to(tl.pointer_type(STATE))
    down, across = tl.load(record + COV_ROW), tl.load(record + COV_COLUMN)
    place = cov + row[:, None] * down + column[None, :] * across
    before = tl.load(place, mask=above_diagonal & (column < readable)[None, :], other=0.0).to(tl.float64)
    after = (beta * before + alpha * sums).to(STATE)
    tl.store(place, after, mask=upper)
    mirror = cov + column[:, None] * down + row[None, :] * across
    tl.store(mirror, tl.trans(after), mask=tl.trans(upper))
    if (i == j) & (tl.load(record + TOTAL) != 0):
        added = tl.zeros((ROWS_AT_ONCE,), tl.float64)
        for chunk in range(chunks):
            added += tl.load(scales + (chunk * 3 + 2) * size + row, mask=row < size, other=0.0)
        offsets = row * tl.load(record + TOTAL_STRIDE)
        wide = tl.load(record + TOTAL_WIDE) != 0
        store_scaled(tl.load(record + TOTAL), wide, offsets, added, alpha, beta, row < size, row < readable)
    if (j == 0) & (item == 0) & (tl.load(record + COUNT) != 0):
        number = tl.load(record + ROWS).to(tl.float64)
        if tl.load(record + WEIGHT) != 0:
            number = number * 0.0
            for chunk in range(chunks):
                number += tl.load(scales + chunks * 3 * size + chunk)
        wide = tl.load(record + COUNT_WIDE) != 0
        store_scaled(tl.load(record + COUNT), wide, 0, number, alpha, beta, True, beta != 0)


_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}
_VECTOR = {"bf16": 8, "fp16": 8, "fp32": 4, "fp64": 2}  # elements in 16 bytes
MOST = 128  # matrices of one launch


def _tiles(dtype, tile, step, warps, stages, *, aligned=True, split=None):
    constants = {"MOST": MOST, "DTYPE": _TYPES[dtype], "TILE": tile, "STEP": step}
    constants |= {
        "ALIGNED": _VECTOR[dtype] if aligned else 1,
        "SPLIT": dtype == "fp32" if split is None else split,
    }
    return _tuning.Config(tuple(constants.items()), warps, stages)


def _tile_configs(short, wide, narrow=(64, 64, 4, 4)):
    """For an architecture: (tile, step, warps, stages) of 16-bit and of float32 rows; sizes below 256 take tiles of 64.

    "any" is for rows that no 16-byte load can read: odd widths, odd addresses, columns that are not neighbours.
    """
    configs = {}
    for dtype in ("bf16", "fp16"):
        configs[dtype, "wide"] = _tiles(dtype, *short)
        configs[dtype, "narrow"] = _tiles(dtype, *narrow)
        configs[dtype, "any"] = _tiles(dtype, 64, 32, 4, 2, aligned=False)  # 64 rows at once spill with Triton 3.6
        configs[dtype, "weighted"] = _tiles(dtype, 64, 32, 4, 1, aligned=False, split=True)
    configs["fp32", "wide"] = _tiles("fp32", *wide)
    configs["fp32", "narrow"] = _tiles("fp32", 64, 32, 4, 3)
    configs["fp32", "any"] = _tiles("fp32", 64, 32, 4, 2, aligned=False)
    return configs


def _strip_configs(step):
    configs = {}
    for dtype in ("bf16", "fp16", "fp32"):
        for size, aligned in (("aligned", _VECTOR[dtype]), ("any", 1)):
            constants = {"MOST": MOST, "DTYPE": _TYPES[dtype], "STEP": step, "ALIGNED": aligned}
            configs[dtype, size] = _tuning.Config(tuple(constants.items()), 4, 4)
    return configs


def _sum_configs(ahead):
    configs = {}
    for dtype in ("fp32", "fp64"):
        for tile in (64, 128):
            at_once = tile // 8  # 16 rows of a tile of 64 spill with Triton 3.6
            constants = {"MOST": MOST, "STATE": _TYPES[dtype], "TILE": tile, "ROWS_AT_ONCE": at_once, "AHEAD": ahead}
            configs[dtype, str(tile)] = _tuning.Config(tuple(constants.items()), 4, 1)
    return configs


def _types(dtype):
    arguments = {"table": "*i64", "matrices": "i32", "columns": "*fp32", "partial": "*fp32"}
    return arguments | {"scaled": "i32", "alpha_bits": "i64", "beta_bits": "i64"}


STRIPS = _tuning.declare(
    cl_gram_strips, _types, {80: _strip_configs(32), 90: _strip_configs(64), 100: _strip_configs(64)}
)
TILES = _tuning.declare(
    cl_gram_tiles,
    _types,
    {
        80: _tile_configs((128, 32, 8, 3), (64, 32, 4, 3), (64, 64, 4, 3)),
        90: _tile_configs((128, 128, 8, 3), (128, 32, 8, 3)),
        100: _tile_configs((128, 64, 8, 4), (128, 32, 8, 3)),
    },
)
SUM = _tuning.declare(cl_gram_sum, _types, {80: _sum_configs(2), 90: _sum_configs(4), 100: _sum_configs(4)})
