"""What the Triton kernels of several rooms share. Imported only by a room's `kernels.py`: importing it imports Triton.

On the device: work items as 64-bit numbers, the map from a work item to a tile of the upper triangle, and products of
float32 tiles on tensor cores. On the host: small tables of numbers for a kernel to read, and the compute capability.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from cl_kernels.ops import _tuning

__all__ = ["capability", "device_table", "dot3", "dtype_name", "split", "triangle", "work_item"]

_NAMES: Final = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
_TABLES_KEPT: Final = 64  # a table is a few KB; a collector with one call a layer needs as many tables as layers
_WRITTEN: Final = 16  # numbers that one launch of `cl_write_table` carries
_tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()


@triton.jit
def work_item():
    """The number of this program, in 64 bits: products with strides must not wrap at 2^31."""
    return tl.program_id(0).to(tl.int64)


@triton.jit
def triangle(item):
    """Work item 0, 1, 2 ... -> tile (row, column) of the upper triangle, row <= column, column by column:
    (0,0), (0,1), (1,1), (0,2) ... The root is taken in float32 and then corrected, so it is exact below 2^24.
    """
    column = ((tl.sqrt(8.0 * item.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int64)
    column -= (column * (column + 1) // 2 > item).to(tl.int64)
    column += ((column + 1) * (column + 2) // 2 <= item).to(tl.int64)
    return item - column * (column + 1) // 2, column


@triton.jit
def split(x):
    """float32 x -> two float16 numbers with x = high + low / 2048 to 22 bits. |x| must stay below 65504; numbers above
    2^-14 keep all 22 bits, so scale a column by a power of two first, towards 2^14.
    """
    high = x.to(tl.float16)
    low = ((x - high.to(tl.float32)) * 2048.0).to(tl.float16)
    return high, low


@triton.jit
def dot3(a_high, a_low, b_high, b_low):
    """A B of split float32 tiles in three tensor-core products, starting at zero: what is left out is 2^-22 of it.

    Tensor cores cut off what they add instead of rounding it. Summing the results of short products outside of them,
    in float32, is what makes the error that of a float32 product: add each result to an accumulator, do not chain.
    """
    low = tl.dot(a_high, b_low)
    low = tl.dot(a_low, b_high, low)
    return tl.dot(a_high, b_high, low * (1.0 / 2048.0))


@triton.jit(do_not_specialize=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])
def cl_write_table(
    table,
    v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64, v4: tl.int64, v5: tl.int64, v6: tl.int64, v7: tl.int64,
    v8: tl.int64, v9: tl.int64, v10: tl.int64, v11: tl.int64, v12: tl.int64, v13: tl.int64, v14: tl.int64,
    v15: tl.int64,
):  # fmt: skip
    """Sixteen numbers into memory. They are part of the launch, so a captured graph carries them with it."""
    tl.store(table + 0, v0)
    tl.store(table + 1, v1)
    tl.store(table + 2, v2)
    tl.store(table + 3, v3)
    tl.store(table + 4, v4)
    tl.store(table + 5, v5)
    tl.store(table + 6, v6)
    tl.store(table + 7, v7)
    tl.store(table + 8, v8)
    tl.store(table + 9, v9)
    tl.store(table + 10, v10)
    tl.store(table + 11, v11)
    tl.store(table + 12, v12)
    tl.store(table + 13, v13)
    tl.store(table + 14, v14)
    tl.store(table + 15, v15)


def device_table(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor of these numbers (addresses, strides, sizes) on the device, without waiting for it.

    Kept for the same numbers on the same stream: layers of a model come back at the same addresses. While a CUDA graph
    is captured nothing is looked up or kept: the table lives in the graph's memory and the numbers in its launches, so
    the graph needs nothing on the host to stay alive (warm up once before: kernels are loaded then).
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64)
    if torch.cuda.is_current_stream_capturing():
        table = torch.empty(-(-len(values) // _WRITTEN) * _WRITTEN, dtype=torch.int64, device=device)
        padded = [*values, *[0] * (table.numel() - len(values))]
        for first in range(0, len(padded), _WRITTEN):
            cl_write_table[(1,)](table[first:], *padded[first : first + _WRITTEN], **_TABLE_CONFIG.options())
        return table
    _load_writer(device)
    key = (torch.cuda.current_stream(device).cuda_stream, device.index, *values)
    found = _tables.pop(key, None)
    if found is None:
        found = torch.tensor(values, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
        while len(_tables) >= _TABLES_KEPT:
            _tables.popitem(last=False)
    _tables[key] = found  # the newest last
    return found


@functools.cache
def _load_writer(device: torch.device) -> None:
    """Launch `cl_write_table` once a device before any capture: only captures use it, and the driver loads no code then
    ("operation not permitted when stream is capturing").
    """
    scratch = torch.empty(_WRITTEN, dtype=torch.int64, device=device)
    cl_write_table[(1,)](scratch, *[0] * _WRITTEN, **_TABLE_CONFIG.options())


def capability(device: torch.device) -> int:
    """The compute capability, such as 90; 0 for the CPU, where only the interpreter runs a kernel."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dtype_name(dtype: torch.dtype) -> str:
    """What Triton calls a dtype in a signature."""
    return _NAMES[dtype]


_TABLE_CONFIG: Final = _tuning.Config((), warps=1, stages=1)
_tuning.declare(
    cl_write_table,
    lambda _: {"table": "*i64"} | {f"v{i}": "i64" for i in range(_WRITTEN)},
    {capability: {("i64", "any"): _TABLE_CONFIG} for capability in _tuning.ARCHITECTURES},
)
