"""The Triton kernel of the losses: a program for each row, and the last one to finish adds up the losses of all rows.

A slice of at most 1024 columns is read once and stays in registers. Wider rows are read twice, the second time from L2
(132 rows of 32000 columns in bfloat16, for student and teacher, are 17 MB of 50): once for maxima and sums, which are
rescaled when a block has a larger maximum, and once for the gradient. Scalars of a row are float64.

Floors on an H200 (performance.md 8): the launch, 3 us, at 256 x 1000; 0.37 ms at 8192 x 32000 in bfloat16. They are
bounds, not measurements.
"""

import triton
import triton.language as tl

from cl_kernels.ops import _tuning
from cl_kernels.ops._triton import work_item

SUMMED = tl.constexpr(256)  # losses of rows that the last program adds up at a time


@triton.jit
def number(bits):
    """A float64 that was passed as an integer: Triton hands Python's floats over as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)  # the interpreter narrows a 0


@triton.jit
def place(x, offset, column, stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Where these columns of a row lie; 16 bytes can be read at once where `ALIGNED` elements fill them."""
    if UNIT:
        return x + tl.multiple_of(offset, ALIGNED) + column
    return x + offset + column * stride


@triton.jit
def reference_point(top):
    """What is subtracted before an exponential: the maximum, or 0 as long as there is none."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def two_ways(odds):
    """log p, log (1 - p), p and 1 - p of the sigmoid of the odds."""
    small = tl.exp(-tl.abs(odds))
    tail = tl.log(1.0 + small)
    yes, no = tl.where(odds >= 0, 1.0, small) / (1.0 + small), tl.where(odds >= 0, small, 1.0) / (1.0 + small)
    return tl.minimum(odds, 0.0) - tail, tl.minimum(-odds, 0.0) - tail, yes, no


@triton.jit
def times(probability, value):
    """probability * value, 0 where the probability is 0 whatever the value is; NaN stays."""
    return tl.where(probability == 0, 0.0, probability * value)


@triton.jit
def fill_around(gradient, offset, first, last, columns, BLOCK: tl.constexpr):
    """Zeros in front of the slice and behind it."""
    at = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), gradient.dtype.element_ty)
    for start in range(0, first, BLOCK):
        tl.store(gradient + offset + start + at, zeros, mask=start + at < first)
    for start in range(last, columns, BLOCK):
        tl.store(gradient + offset + start + at, zeros, mask=start + at < columns)


@triton.jit
def hard_row(
    z, offset, stride, gradient, to, wanted, y, n, weight, WORK: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """weight times the cross-entropy of a row, in float64, and its gradient."""
    at = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), WORK)
    total = tl.zeros((BLOCK,), WORK)
    chosen = tl.zeros((BLOCK,), WORK)
    e = tl.zeros((BLOCK,), WORK)
    for start in range(0, n if LOOP else 1, BLOCK):
        column = start + at
        x = tl.load(place(z, offset, column, stride, UNIT, ALIGNED), mask=column < n, other=float("-inf")).to(WORK)
        higher = tl.maximum(top, tl.max(x, 0))
        point = reference_point(higher)
        e = tl.exp(x - point)
        total = total * tl.exp(top - point) + e
        chosen += tl.where(column == y, x, 0.0)
        top = higher
    top = tl.where(top == float("-inf"), float("nan"), top)
    everything = tl.sum(total, 0).to(tl.float64)
    fits = ((y >= 0) & (y < n)) | (weight == 0)  # the target of a row that does not count may be anything
    loss = weight * (tl.log(everything) - (tl.sum(chosen, 0).to(tl.float64) - top.to(tl.float64)))
    weight = tl.where(fits, weight, float("nan"))
    if wanted:
        for start in range(0, n if LOOP else 1, BLOCK):
            column = start + at
            if LOOP:
                again = place(z, offset, column, stride, UNIT, ALIGNED)
                e = tl.exp(tl.load(again, mask=column < n, other=float("-inf")).to(WORK) - top)
            g = e * (1.0 / everything).to(WORK) - tl.where(column == y, 1.0, 0.0)
            g = tl.where(weight == 0, 0.0, g * weight.to(WORK))
            tl.store(place(gradient, to, column, 1, True, ALIGNED), g.to(gradient.dtype.element_ty), mask=column < n)
    return tl.where(weight == 0, 0.0, tl.where(fits, loss, float("nan")))


@triton.jit
def soft_row(
    s, s_offset, s_stride, t, t_offset, t_stride, gradient, to, wanted, decoupled, y, n, temperature, weight, soft,
    two_way, WORK: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """weight T^2 (soft KL + two_way KL of (target, rest)) of a row, in float64, and its gradient; only a decoupled loss
    has the second part, and its first one sees the rest alone.

    In the sum of e_t (t - s) maxima are subtracted: from the difference where they are close, for differences of close
    logits are exact, and from each logit elsewhere.
    """
    at = tl.arange(0, BLOCK)
    left_out = tl.where(decoupled != 0, y, -1)
    cold = (1.0 / temperature).to(WORK)
    top_s = tl.full((), float("-inf"), WORK)
    top_t = tl.full((), float("-inf"), WORK)
    point_s = tl.zeros((), WORK)
    point_t = tl.zeros((), WORK)
    total_s = tl.zeros((BLOCK,), WORK)
    total_t = tl.zeros((BLOCK,), WORK)
    product = tl.zeros((BLOCK,), WORK)
    target_s = tl.zeros((BLOCK,), WORK)
    target_t = tl.zeros((BLOCK,), WORK)
    e_s = tl.zeros((BLOCK,), WORK)
    e_t = tl.zeros((BLOCK,), WORK)
    for start in range(0, n if LOOP else 1, BLOCK):
        column = start + at
        x = tl.load(place(s, s_offset, column, s_stride, UNIT, ALIGNED), mask=column < n, other=float("-inf"))
        z = tl.load(place(t, t_offset, column, t_stride, UNIT, ALIGNED), mask=column < n, other=float("-inf"))
        x, z = x.to(WORK), z.to(WORK)
        target_s += tl.where(column == left_out, x, 0.0)
        target_t += tl.where(column == left_out, z, 0.0)
        x = tl.where(column == left_out, float("-inf"), x)
        z = tl.where(column == left_out, float("-inf"), z)
        higher_s, higher_t = tl.maximum(top_s, tl.max(x, 0)), tl.maximum(top_t, tl.max(z, 0))
        new_s, new_t = reference_point(higher_s), reference_point(higher_t)
        further = (new_t - point_t) - (new_s - point_s)
        point_s, point_t = new_s, new_t
        apart = point_t - point_s
        difference = tl.where(tl.abs(apart) <= 2, (z - x) - apart, (z - point_t) - (x - point_s))
        e_s, e_t = tl.exp((x - point_s) * cold), tl.exp((z - point_t) * cold)
        shrink = tl.exp((top_t - point_t) * cold)
        product = times(shrink, product - further * total_t) + times(e_t, difference)
        total_s = total_s * tl.exp((top_s - point_s) * cold) + e_s
        total_t = total_t * shrink + e_t
        top_s, top_t = higher_s, higher_t
    top_s = tl.where(top_s == float("-inf"), float("nan"), top_s)
    top_t = tl.where(top_t == float("-inf"), float("nan"), top_t)
    all_s, all_t = tl.sum(total_s, 0).to(tl.float64), tl.sum(total_t, 0).to(tl.float64)
    wide_s, wide_t = top_s.to(tl.float64), top_t.to(tl.float64)
    log_s, log_t = tl.log(all_s), tl.log(all_t)
    loss = soft * (tl.sum(product, 0).to(tl.float64) / all_t / temperature - (log_t - log_s))
    for_target = tl.zeros((), tl.float64)
    if decoupled:
        odds_s = (tl.sum(target_s, 0).to(tl.float64) - wide_s) / temperature - log_s
        odds_t = (tl.sum(target_t, 0).to(tl.float64) - wide_t) / temperature - log_t
        log_yes, log_no, yes, no = two_ways(odds_t)
        student_log_yes, student_log_no, student_yes, _ = two_ways(odds_s)
        loss += two_way * (times(yes, log_yes - student_log_yes) + times(no, log_no - student_log_no))
        for_target = two_way * (student_yes - yes)
        there = (y >= 0) & (y < n)
        loss = tl.where(there, loss, float("nan"))
        for_target = tl.where(there, for_target, float("nan"))
    if wanted:
        warm = temperature * weight
        for_s, for_t = (warm * (soft - for_target) / all_s).to(WORK), (warm * soft / all_t).to(WORK)
        at_target = (warm * for_target).to(WORK)
        for start in range(0, n if LOOP else 1, BLOCK):
            column = start + at
            if LOOP:
                again_s = place(s, s_offset, column, s_stride, UNIT, ALIGNED)
                again_t = place(t, t_offset, column, t_stride, UNIT, ALIGNED)
                x = tl.load(again_s, mask=column < n, other=float("-inf")).to(WORK)
                e_s = tl.exp((x - top_s) * cold)
                x = tl.load(again_t, mask=column < n, other=float("-inf")).to(WORK)
                e_t = tl.exp((x - top_t) * cold)
            g = tl.where(column == left_out, at_target, e_s * for_s - e_t * for_t)
            g = tl.where(weight == 0, 0.0, g).to(gradient.dtype.element_ty)
            tl.store(place(gradient, to, column, 1, True, ALIGNED), g, mask=column < n)
    return tl.where(weight == 0, 0.0, temperature * temperature * weight * loss)


_NUMBERS = (
    "rows", "columns", "first", "last", "hard_row_stride", "hard_column_stride", "student_row_stride",
    "student_column_stride", "teacher_row_stride", "teacher_column_stride", "target_stride", "has_hard", "has_soft",
    "has_target", "has_weight", "decoupled", "hard_wanted", "student_wanted", "summed", "hard_bits", "soft_bits",
    "two_way_bits", "temperature_bits", "scale_bits",
)  # fmt: skip


@triton.jit(do_not_specialize=list(_NUMBERS))
def cl_distillation_rows(
    hard, student, teacher, target, weights, hard_grad, student_grad, losses, total, arrived, rows, columns, first,
    last, hard_row_stride: tl.int64, hard_column_stride: tl.int64, student_row_stride: tl.int64,
    student_column_stride: tl.int64, teacher_row_stride: tl.int64, teacher_column_stride: tl.int64,
    target_stride: tl.int64, has_hard, has_soft, has_target, has_weight, decoupled, hard_wanted, student_wanted,
    summed, hard_bits: tl.int64, soft_bits: tl.int64, two_way_bits: tl.int64, temperature_bits: tl.int64,
    scale_bits: tl.int64, WORK: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row. Its loss goes to `losses`; whoever finds that all others have arrived adds them up in their order.

    The counter is 0 again at the end. Losses are written before the counter is raised and read behind it, past L1.
    """
    row = work_item()
    n = last - first
    weight = number(scale_bits)
    if has_weight:
        weight = tl.load(weights + row)
    y = tl.full((), -1, tl.int64)
    if has_target:
        y = tl.load(target + row * target_stride) - first
    to = row * columns + first
    loss = tl.zeros((), tl.float64)
    if has_hard:
        loss += hard_row(
            hard, row * hard_row_stride + first * hard_column_stride, hard_column_stride, hard_grad, to, hard_wanted, y,
            n, number(hard_bits) * weight, WORK, BLOCK, LOOP, UNIT, ALIGNED,
        )  # fmt: skip
        if hard_wanted:
            fill_around(hard_grad, row * columns, first, last, columns, BLOCK)
    if has_soft:
        loss += soft_row(
            student, row * student_row_stride + first * student_column_stride, student_column_stride, teacher,
            row * teacher_row_stride + first * teacher_column_stride, teacher_column_stride, student_grad, to,
            student_wanted, decoupled, y, n, number(temperature_bits), weight, number(soft_bits), number(two_way_bits),
            WORK, BLOCK, LOOP, UNIT, ALIGNED,
        )  # fmt: skip
        if student_wanted:
            fill_around(student_grad, row * columns, first, last, columns, BLOCK)
    tl.store(losses + row, loss)
    if summed:
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1, sem="acq_rel") == rows - 1:
            at = tl.arange(0, SUMMED)
            parts = tl.zeros((SUMMED,), tl.float64)
            for start in range(0, rows, SUMMED):
                parts += tl.load(losses + start + at, mask=start + at < rows, other=0.0, cache_modifier=".cg")
            tl.store(total, tl.sum(parts, 0).to(total.dtype.element_ty))
            tl.store(arrived, 0)


_TYPES = {"bf16": tl.float32, "fp16": tl.float32, "fp32": tl.float32, "fp64": tl.float64}
_VECTOR = {"bf16": 8, "fp16": 8, "fp32": 4, "fp64": 2}  # elements in 16 bytes
BLOCK = 1024  # columns at a time: 96 registers, so that five rows are on their way in a multiprocessor; 4096 take 230
NARROW = BLOCK  # columns of a slice that are read once


def _config(dtype, *, loop, unit=True, aligned=False):
    constants = {"WORK": _TYPES[dtype], "BLOCK": 512 if dtype == "fp64" else BLOCK, "LOOP": loop, "UNIT": unit}
    constants["ALIGNED"] = _VECTOR[dtype] if aligned else 1
    return _tuning.Config(tuple(constants.items()), 4, 1)


def _configs():
    """ "narrow": in registers; "wide": 16 bytes at once; "any": any strides and addresses."""
    configs = {}
    for dtype in ("bf16", "fp16", "fp32"):
        configs[dtype, "narrow"] = _config(dtype, loop=False)
        configs[dtype, "wide"] = _config(dtype, loop=True, aligned=True)
        configs[dtype, "any"] = _config(dtype, loop=True, unit=False)
    configs["fp64", "any"] = _config("fp64", loop=True, unit=False)
    return configs


def _signature(dtype):
    work = "fp64" if dtype == "fp64" else "fp32"
    pointers = dict.fromkeys(("hard", "student", "teacher", "hard_grad", "student_grad"), f"*{dtype}")
    pointers |= {"target": "*i64", "weights": "*fp64", "losses": "*fp64", "total": f"*{work}", "arrived": "*i32"}
    wide = {name: "i64" for name in _NUMBERS if name.endswith(("_stride", "_bits"))}
    return pointers | dict.fromkeys(_NUMBERS, "i32") | wide


ROWS = _tuning.declare(
    cl_distillation_rows, _signature, {capability: _configs() for capability in _tuning.ARCHITECTURES}
)
