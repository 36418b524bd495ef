"""Triton kernels of the log-odds filter: symmetric products of matrices that are kept as two float16 halves.

Powers of one symmetric matrix commute, so every product is symmetric: only tiles of the upper triangle are computed,
of all matrices of a batch in one launch, and each is stored twice. x = high + low / 2048 to 22 bits; no scale is
needed, because entries stay below 4. Matrices are padded with zeros to whole tiles, so that no load of the inner loop
has a mask, and both factors are read along their rows.

Floors of one product on an H200: 24 us for 12 x 768, 110 us for 24 x 1024 (performance.md 4.1); not measured yet.
"""

import triton
import triton.language as tl

from cl_kernels.ops import _tuning
from cl_kernels.ops._triton import dot3, split, triangle, work_item


@triton.jit
def tile_of(blocks, TILE: tl.constexpr):
    """The matrix of this program, and rows and columns of its tile: 32 bits, for one matrix has fewer than 2^31 entries
    and 64-bit offsets of a tile would take all registers.
    """
    item = work_item()
    pairs = blocks * (blocks + 1) // 2
    i, j = triangle(item % pairs)
    within = tl.arange(0, TILE)
    return item // pairs, i.to(tl.int32) * TILE + within, j.to(tl.int32) * TILE + within


@triton.jit(do_not_specialize=["size", "blocks"])
def cl_symmetric_halves(source, high, low, size, blocks, TILE: tl.constexpr):
    """The upper triangle of float64 matrices [L, size, size] as halves [L, padded, padded], mirrored, zero beyond."""
    layer, row, column = tile_of(blocks, TILE)
    padded = blocks * TILE
    inside = (row < size)[:, None] & (column < size)[None, :]
    wide = tl.load(source + layer * size * size + (row[:, None] * size + column[None, :]), mask=inside, other=0.0)
    a, b = split(wide.to(tl.float32))
    store_mirrored(high + layer * padded * padded, a, row, column, padded, padded)
    store_mirrored(low + layer * padded * padded, b, row, column, padded, padded)


@triton.jit(do_not_specialize=["size", "blocks"])
def cl_symmetric_product(
    a_high, a_low, b_high, b_low, d_high, d_low, out_high, out_low, out, size, blocks, alpha, beta, gamma,
    TILE: tl.constexpr, STEP: tl.constexpr, ADD: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """alpha A B + beta D + gamma I; halves again, or float32 [L, size, size] if LAST. D is read only if ADD."""
    layer, row, column = tile_of(blocks, TILE)
    padded = blocks * TILE
    first = layer * padded * padded
    at = tl.arange(0, STEP)
    left = row[:, None] * padded + at[None, :]
    right = column[:, None] * padded + at[None, :]  # rows of B, which are its columns
    total = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, padded, STEP):
        p_high, p_low = tl.load(a_high + first + k + left), tl.load(a_low + first + k + left)
        q_high, q_low = tl.load(b_high + first + k + right), tl.load(b_low + first + k + right)
        total += dot3(p_high, p_low, tl.trans(q_high), tl.trans(q_low))
    value = alpha * total
    if ADD:
        place = row[:, None] * padded + column[None, :]
        high, low = tl.load(d_high + first + place), tl.load(d_low + first + place)
        value += beta * (high.to(tl.float32) + low.to(tl.float32) * (1.0 / 2048.0))
    value += tl.where((row[:, None] == column[None, :]) & (row < size)[:, None], gamma, 0.0)
    if LAST:
        store_mirrored(out + layer * size * size, value, row, column, size, size)
    else:
        new_high, new_low = split(value)
        store_mirrored(out_high + first, new_high, row, column, padded, padded)
        store_mirrored(out_low + first, new_low, row, column, padded, padded)


@triton.jit
def store_mirrored(out, value, row, column, size, stride):
    """What lies on and above the diagonal, to both sides of it: symmetric to the last bit, each place written once."""
    upper = (row[:, None] <= column[None, :]) & (column < size)[None, :]
    tl.store(out + (row[:, None] * stride + column[None, :]), value, mask=upper)
    tl.store(out + (column[:, None] * stride + row[None, :]), tl.trans(value), mask=tl.trans(upper))


def _product_types(dtype):
    halves = {f"{name}_{half}": f"*{dtype}" for name in ("a", "b", "d", "out") for half in ("high", "low")}
    numbers = {"size": "i32", "blocks": "i32", "alpha": "fp32", "beta": "fp32", "gamma": "fp32"}
    return halves | {"out": "*fp32"} | numbers


def _halves_types(dtype):
    return {"source": "*fp64", "high": f"*{dtype}", "low": f"*{dtype}", "size": "i32", "blocks": "i32"}


def _product_configs(wide, narrow):
    """(tile, step, warps, stages) for large batches of large matrices, and for what would leave processors idle."""
    configs = {}
    for name, (tile, step, warps, stages) in (("wide", wide), ("narrow", narrow)):
        for form, add, last in (("square", False, False), ("add", True, False), ("last", False, True)):
            constants = {"TILE": tile, "STEP": step, "ADD": add, "LAST": last}
            configs["fp16", f"{name}-{form}"] = _tuning.Config(tuple(constants.items()), warps, stages)
    return configs


HALVES_TILE = 64
HALVES = _tuning.declare(
    cl_symmetric_halves,
    _halves_types,
    {c: {("fp16", "any"): _tuning.Config((("TILE", HALVES_TILE),), 4, 1)} for c in _tuning.ARCHITECTURES},
)
PRODUCT = _tuning.declare(
    cl_symmetric_product,
    _product_types,
    {
        80: _product_configs((128, 32, 8, 3), (64, 32, 4, 3)),
        90: _product_configs((128, 64, 8, 3), (64, 64, 4, 4)),
        100: _product_configs((128, 32, 8, 4), (64, 64, 4, 4)),  # (128, 64, 8, 3) takes 246 KB with Triton 3.6
    },
)
