"""Triton kernels of the prefix: the merge into the tokens' attention, and the prefix' part of the gradient.

The tokens' part is torch's own attention; these take what it gives. A prefix that the batch shares is read with a batch
stride of 0, and its gradient is summed over chunks of rows in a workspace, in a fixed order.

Floors on an H200, B = 64, ViT-S (6 heads of 64, 197 tokens), bfloat16, so 9.7 MB a tensor of the queries' size: merge
6.8 us (q and out read, out written), gradient of the rows 11 us (q, grad, out, dq read, dq written), gradient of the
prefix 6.8 us (q, grad, out read), at 4.3 TB/s. They are bounds, not measurements.
"""

import triton
import triton.language as tl

from cl_kernels.ops import _tuning
from cl_kernels.ops._triton import work_item

ALIGNED = tl.constexpr(8)  # widths and strides are multiples of it: 16 bytes of 16-bit numbers
LOWEST = tl.constexpr(float("-inf"))
HIGHEST = tl.constexpr(float("inf"))
_NUMBERS = ["heads", "length", "count", "eighths"]
_STRIDES = [f"{name}_{what}" for name in "qkv" for what in ("image", "head", "row")]
_OF_GRAD = ["g_image", "g_head", "g_row"]


@triton.jit
def tile(base, image_stride, head_stride, row_stride, image, head, rows, columns):
    """Addresses of rows x columns of one head of one image; columns are neighbours."""
    start = image * image_stride + head * head_stride
    return tl.multiple_of(base + (start + rows[:, None] * row_stride + columns[None, :]), [1, 16])  # bytes


@triton.jit
def load(addresses, rows, limit, columns, width):
    """A tile of which the first `limit` rows and `width` columns exist; zeros beyond."""
    return tl.load(addresses, mask=(rows < limit)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit(do_not_specialize=[*_STRIDES, *_NUMBERS])
def cl_prefix_merge(
    q, prefix_k, prefix_v, before, lse, out, merged, scale,
    q_image: tl.int64, q_head: tl.int64, q_row: tl.int64, k_image: tl.int64, k_head: tl.int64, k_row: tl.int64,
    v_image: tl.int64, v_head: tl.int64, v_row: tl.int64, heads, length, count, eighths,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = exp(lse - l) before + sum_m exp(a_m - l) v_m, merged = l = log(exp(lse) + sum_m exp(a_m)), a = scale q k^T.

    One program for some rows of one head: an online softmax that starts from the tokens' part. `before` and `out` are
    laid out [B, L, H, d].
    """
    item = work_item()
    width = eighths * ALIGNED  # a product: what a helper says of its argument is lost when it is inlined
    step = heads.to(tl.int64) * width
    tiles = tl.cdiv(length, ROWS)
    rows = (item % tiles) * ROWS + tl.arange(0, ROWS)
    head, image = (item // tiles) % heads, item // tiles // heads
    columns = tl.arange(0, WIDTH)
    queries = load(tile(q, q_image, q_head, q_row, image, head, rows, columns), rows, length, columns, width)
    part = load(
        tile(before, length * step, width, step, image, head, rows, columns),
        rows, length, columns, width,
    )  # fmt: skip
    at = (image * heads + head) * length + rows
    top = tl.load(lse + at, mask=rows < length, other=0.0)
    nothing = tl.sum(tl.abs(part.to(tl.float32)), 1) == 0  # not the maximum, which leaves out NaN
    none = (top == LOWEST) | ((top == HIGHEST) & nothing)  # flash attention says +inf where all scores are -inf
    top = tl.where(none, LOWEST, top)
    total = tl.where(none, 0.0, 1.0)
    mixed = tl.where(none[:, None], 0.0, part.to(tl.float32))
    for first in range(0, count, KEYS):
        keys = first + tl.arange(0, KEYS)
        key = load(tile(prefix_k, k_image, k_head, k_row, image, head, keys, columns), keys, count, columns, width)
        value = load(tile(prefix_v, v_image, v_head, v_row, image, head, keys, columns), keys, count, columns, width)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where((keys < count)[None, :], scores, LOWEST)
        highest = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(highest == LOWEST, 0.0, highest)
        weights = tl.exp(scores - finite[:, None])
        rescale = tl.exp(top - finite)
        total = total * rescale + tl.sum(weights, 1)
        mixed = mixed * rescale[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        top = highest
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    inside = (rows < length)[:, None] & (columns < width)[None, :]
    place = tile(out, length * step, width, step, image, head, rows, columns)
    tl.store(place, mixed.to(part.dtype), mask=inside)
    tl.store(merged + at, top + tl.log(total), mask=rows < length)


@triton.jit
def slopes(queries, grad, before, lse, key, value, keys, count, scale):
    """p = exp(scale q k^T - l) and the gradient of the scores before their scale, p (g v^T - rowsum(g out)) scale."""
    scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
    weights = tl.where((keys < count)[None, :], tl.exp(scores - lse[:, None]), 0.0)
    inner = tl.sum(grad.to(tl.float32) * before.to(tl.float32), 1)
    from_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
    return weights, weights * (from_weights - inner[:, None]) * scale


@triton.jit(do_not_specialize=[*_STRIDES, *_OF_GRAD, *_NUMBERS])
def cl_prefix_rows(
    q, grad, prefix_k, prefix_v, out, lse, dq, scale,
    q_image: tl.int64, q_head: tl.int64, q_row: tl.int64, g_image: tl.int64, g_head: tl.int64, g_row: tl.int64,
    k_image: tl.int64, k_head: tl.int64, k_row: tl.int64, v_image: tl.int64, v_head: tl.int64, v_row: tl.int64,
    heads, length, count, eighths, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dq <- dq + da k for the keys of the prefix; `out` and `dq` are laid out [B, L, H, d]."""
    item = work_item()
    width = eighths * ALIGNED  # a product: what a helper says of its argument is lost when it is inlined
    step = heads.to(tl.int64) * width
    tiles = tl.cdiv(length, ROWS)
    rows = (item % tiles) * ROWS + tl.arange(0, ROWS)
    head, image = (item // tiles) % heads, item // tiles // heads
    columns = tl.arange(0, WIDTH)
    queries = load(tile(q, q_image, q_head, q_row, image, head, rows, columns), rows, length, columns, width)
    slope = load(tile(grad, g_image, g_head, g_row, image, head, rows, columns), rows, length, columns, width)
    before = load(
        tile(out, length * step, width, step, image, head, rows, columns),
        rows, length, columns, width,
    )  # fmt: skip
    place = tile(dq, length * step, width, step, image, head, rows, columns)
    level = tl.load(lse + (image * heads + head) * length + rows, mask=rows < length, other=0.0)
    total = load(place, rows, length, columns, width).to(tl.float32)
    for first in range(0, count, KEYS):
        keys = first + tl.arange(0, KEYS)
        key = load(tile(prefix_k, k_image, k_head, k_row, image, head, keys, columns), keys, count, columns, width)
        value = load(tile(prefix_v, v_image, v_head, v_row, image, head, keys, columns), keys, count, columns, width)
        _, scores = slopes(queries, slope, before, level, key, value, keys, count, scale)
        total += tl.dot(scores.to(key.dtype), key, input_precision="ieee")
    inside = (rows < length)[:, None] & (columns < width)[None, :]
    tl.store(place, total.to(dq.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_STRIDES, *_OF_GRAD, *_NUMBERS, "images", "chunks"])
def cl_prefix_keys(
    q, grad, prefix_k, prefix_v, out, lse, dk, dv, scale,
    q_image: tl.int64, q_head: tl.int64, q_row: tl.int64, g_image: tl.int64, g_head: tl.int64, g_row: tl.int64,
    k_image: tl.int64, k_head: tl.int64, k_row: tl.int64, v_image: tl.int64, v_head: tl.int64, v_row: tl.int64,
    heads, length, count, eighths, images, chunks, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dk = da^T q and dv = p^T g of some keys of one head over a chunk of the rows of `images` images that share them.

    `dk` and `dv` [chunks, prefixes, H, M, d] in float32: every program writes a place of its own, torch sums them.
    """
    item = work_item()
    width = eighths * ALIGNED  # a product: what a helper says of its argument is lost when it is inlined
    step = heads.to(tl.int64) * width
    chunk, item = item % chunks, item // chunks
    blocks = tl.cdiv(count, KEYS)
    keys = (item % blocks) * KEYS + tl.arange(0, KEYS)
    head, prefix = (item // blocks) % heads, item // blocks // heads
    columns = tl.arange(0, WIDTH)
    key = load(tile(prefix_k, k_image, k_head, k_row, prefix, head, keys, columns), keys, count, columns, width)
    value = load(tile(prefix_v, v_image, v_head, v_row, prefix, head, keys, columns), keys, count, columns, width)
    for_key = tl.zeros((KEYS, WIDTH), tl.float32)
    for_value = tl.zeros((KEYS, WIDTH), tl.float32)
    tiles = tl.cdiv(length, ROWS)
    share = tl.cdiv(tiles * images, chunks)
    for number in range(chunk * share, tl.minimum((chunk + 1) * share, tiles * images)):
        image = prefix * images + number // tiles
        rows = (number % tiles) * ROWS + tl.arange(0, ROWS)
        queries = load(tile(q, q_image, q_head, q_row, image, head, rows, columns), rows, length, columns, width)
        slope = load(tile(grad, g_image, g_head, g_row, image, head, rows, columns), rows, length, columns, width)
        before = load(
            tile(out, length * step, width, step, image, head, rows, columns),
            rows, length, columns, width,
        )  # fmt: skip
        level = tl.load(lse + (image * heads + head) * length + rows, mask=rows < length, other=HIGHEST)
        weights, scores = slopes(queries, slope, before, level, key, value, keys, count, scale)
        for_value -= tl.dot(tl.trans(weights.to(slope.dtype)), slope, input_precision="ieee")
        for_key -= tl.dot(tl.trans(scores.to(queries.dtype)), queries, input_precision="ieee")
    prefixes = tl.num_programs(0) // (chunks * blocks * heads)
    start = ((chunk * prefixes + prefix) * heads + head) * count * width  # in 64 bits, as the item is
    place = start + keys[:, None] * width + columns[None, :]
    inside = (keys < count)[:, None] & (columns < width)[None, :]
    tl.store(dk + place, -for_key, mask=inside)
    tl.store(dv + place, -for_value, mask=inside)


def _configs():
    """By dtype and width of a head: rows and keys of a block, warps.

    float32 is multiplied without tensor cores, with whole rows in registers: 16 rows of 128 numbers still fit.
    """
    configs = {}
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (64, 128):
            rows, keys, warps = (64, 32, width // 16) if dtype != "fp32" else (32 if width == 64 else 16, 16, 8)
            constants = {"ROWS": rows, "KEYS": keys, "WIDTH": width}
            configs[dtype, str(width)] = _tuning.Config(tuple(constants.items()), warps, 1)
    return configs


def _types(dtype):
    strides = {f"{name}_{what}": "i64" for name in "qgkv" for what in ("image", "head", "row")}
    numbers = dict.fromkeys(("heads", "length", "count", "eighths", "images", "chunks"), "i32")
    tensors = dict.fromkeys(("q", "grad", "prefix_k", "prefix_v", "before", "out", "dq"), f"*{dtype}")
    return tensors | dict.fromkeys(("lse", "merged", "dk", "dv"), "*fp32") | strides | numbers | {"scale": "fp32"}


_EVERYWHERE = {capability: _configs() for capability in _tuning.ARCHITECTURES}
MERGE = _tuning.declare(cl_prefix_merge, _types, _EVERYWHERE)
ROWS = _tuning.declare(cl_prefix_rows, _types, _EVERYWHERE)
KEYS = _tuning.declare(cl_prefix_keys, _types, _EVERYWHERE)
