"""Second moments on CUDA: what the Triton kernels are given, and in which order they are launched.

Nothing here waits for the device. Memory: the state, the records of the call (24 numbers a matrix), and one workspace
of at most 64 MB. Rows that 16-byte loads cannot read (odd widths or addresses) are read in place by a slower form;
only rows that lie in more than two strides are copied.

float64 rows go to torch's own float64 products, a triangle of blocks of them: those run on float64 tensor cores, which
Triton does not reach, and they are right as they are. So do fewer than 32 float32 rows: two float16 numbers hold 22 of
24 bits, and the error of that averages out over rows (5 times that of torch's float32 product for one row, equal from
16 rows on, a fifth from 128 on).
"""

from __future__ import annotations

import contextlib
import functools
import struct
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from cl_kernels.ops import _tuning
from cl_kernels.ops._registry import Unsupported
from cl_kernels.ops.covariance import plan
from cl_kernels.ops.covariance.reference import PROMOTED_ROWS, add_moment_
from cl_kernels.ops.covariance.state import add_count_, refuse_shared_memory, row_levels

__all__ = ["how", "update_covariance_", "update_covariances_", "update_head_grams_"]

_OLDEST: Final = 80  # bfloat16 on tensor cores, asynchronous copies
_WIDE: Final = 256  # from this size on tiles of 128: below, half of such a tile would be waste
_FEW: Final = 32
_ROW_TYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


class _Kind(NamedTuple):
    """What the matrices of one launch have in common."""

    device: torch.device
    rows: torch.dtype
    size: str  # of the tiles' configuration: wide, narrow, any, weighted
    state: torch.dtype


def update_covariance_(
    cov: Tensor,
    x: Tensor,
    total: Tensor | None,
    count: Tensor | None,
    weight: Tensor | None,
    alpha: float,
    beta: float,
) -> None:
    refuse_shared_memory({"cov": [cov], "total": [total], "count": [count]}, {"x": [x], "weight": [weight]})
    totals, counts, weights = ([] if value is None else [value] for value in (total, count, weight))
    _update_([cov], [x], totals, counts, weights, alpha, beta)


def update_covariances_(
    covs: list[Tensor],
    xs: list[Tensor],
    totals: list[Tensor],
    counts: list[Tensor],
    weights: list[Tensor],
    alpha: float,
    beta: float,
) -> None:
    refuse_shared_memory({"covs": covs, "totals": totals, "counts": counts}, {"xs": xs, "weights": weights})
    _update_(covs, xs, totals, counts, weights, alpha, beta)


def update_head_grams_(grams: Tensor, q: Tensor, alpha: float, beta: float) -> None:
    refuse_shared_memory({"grams": [grams]}, {"q": [q]})
    _update_(list(grams.unbind(0)), list(q.unbind(1)), [], [], [], alpha, beta)


def how(*arguments: Any) -> str | None:
    """For `explain`: what is special about these arguments of a public function; raises `Unsupported` as it would."""
    given = arguments[1] if len(arguments) > 1 else []
    rows = [x for x in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(x, Tensor)]
    for x in rows:
        _refuse(x)
    if any(_is_for_torch(x) for x in rows):
        return "float64 rows and very few float32 rows through torch's own float64 products"
    return None


def _is_for_torch(x: Tensor) -> bool:
    return x.dtype == torch.float64 or (x.dtype == torch.float32 and x.shape[:-1].numel() < _FEW)


def _update_(
    covs: list[Tensor],
    xs: list[Tensor],
    totals: list[Tensor],
    counts: list[Tensor],
    weights: list[Tensor],
    alpha: float,
    beta: float,
) -> None:
    for x in xs:
        _refuse(x)
    kept: list[Tensor] = []  # temporaries whose addresses are in the records
    kinds: dict[_Kind, list[plan.Matrix]] = {}
    others: list[int] = []
    for i, (cov, x) in enumerate(zip(covs, xs, strict=True)):
        total, count, weight = (values[i] if values else None for values in (totals, counts, weights))
        if cov.shape[0] == 0 or _is_for_torch(x):
            others.append(i)
            continue
        kind, matrix = _described(cov, x, total, count, weight, kept)
        kinds.setdefault(kind, []).append(matrix)
    with_sums = bool(totals) or (bool(counts) and bool(weights))
    for kind, matrices in kinds.items():
        _launch(kind, matrices, with_sums, alpha, beta)
    for i in others:
        total, count, weight = (values[i] if values else None for values in (totals, counts, weights))
        if covs[i].shape[0] == 0:
            if count is not None:
                add_count_(count, xs[i].shape[:-1].numel(), weight, alpha, beta)
            continue
        at_once = max(PROMOTED_ROWS, plan.WORKSPACE_BYTES // (8 * covs[i].shape[0]))
        add_moment_(covs[i], xs[i].double(), total, count, weight, alpha, beta, at_once)


def _refuse(x: Tensor) -> None:
    if x.device.type == "cpu":
        if x.dtype not in (torch.float64, torch.float32, torch.float16):
            raise Unsupported(f"Triton's interpreter multiplies {x.dtype} wrongly")
    elif _capability(x.device) < _OLDEST:
        raise Unsupported(f"compute capability {_capability(x.device) / 10} is older than {_OLDEST / 10}")


@functools.cache
def _capability(device: torch.device) -> int:
    from cl_kernels.ops import _triton

    return _triton.capability(device)


def _described(
    cov: Tensor, x: Tensor, total: Tensor | None, count: Tensor | None, weight: Tensor | None, kept: list[Tensor]
) -> tuple[_Kind, plan.Matrix]:
    if x.dtype not in _ROW_TYPES:
        x = x.to(torch.bfloat16)  # 8-bit floats: bfloat16 holds every one of them
        kept.append(x)
    levels = row_levels(x)
    if len(levels) > 2 or any(size > plan.MOST_INNER for size, _ in levels[:-1]):
        x = x.contiguous()
        kept.append(x)
        levels = row_levels(x)
    rows, size = x.shape[:-1].numel(), cov.shape[0]
    if len(levels) == 2:
        (inner, inner_stride), (_, outer_stride) = levels
    else:
        inner, inner_stride = plan.SINGLE_LEVEL, levels[0][1] if levels else size
        outer_stride = inner * inner_stride
    if weight is not None:
        weight = weight.reshape(-1).to(torch.float32).contiguous()
        kept.append(weight)
    matrix = plan.Matrix(
        rows, size, outer_stride, inner, inner_stride, x.stride(-1),
        x.data_ptr(), _address(weight), cov.data_ptr(), _address(total), _address(count),
        cov.stride(0), cov.stride(1), 1 if total is None else total.stride(0),
        total_wide=int(total is not None and total.dtype == torch.float64),
        count_wide=int(count is not None and count.dtype == torch.float64),
    )  # fmt: skip
    return _Kind(x.device, x.dtype, _tile_size(x, matrix), cov.dtype), matrix


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tile_size(x: Tensor, matrix: plan.Matrix) -> str:
    if matrix.weight and x.dtype != torch.float32:
        return "weighted"
    steps = (matrix.size, matrix.outer_stride, matrix.inner_stride)
    aligned = matrix.column_stride == 1 and not any(step * x.element_size() % 16 for step in steps)
    if not aligned or matrix.x % 16:
        return "any"
    return "wide" if matrix.size >= _WIDE else "narrow"


def _launch(kind: _Kind, matrices: list[plan.Matrix], with_sums: bool, alpha: float, beta: float) -> None:
    """Strips where something needs them, tiles, sums; on the current stream of the device."""
    from cl_kernels.ops import _triton
    from cl_kernels.ops.covariance import kernels

    capability, name = _capability(kind.device), _triton.dtype_name(kind.rows)
    tiles = kernels.TILES.choose(capability, name, kind.size)
    strips = kernels.STRIPS.choose(capability, name, "any" if kind.size in ("any", "weighted") else "aligned")
    tile, split = tiles["TILE"], tiles["SPLIT"]
    sums = kernels.SUM.choose(capability, _triton.dtype_name(kind.state), str(tile))
    parts = list(plan.launches(matrices, tile, sums["ROWS_AT_ONCE"]))
    scales = [struct.unpack("q", struct.pack("d", value))[0] for value in (alpha, beta)]
    floats = max(tile * tile * part.tiles + part.columns for part in parts)
    with _on(kind.device):
        workspace = torch.empty(floats, dtype=torch.float32, device=kind.device)
        for part in parts:
            table = _triton.device_table(part.records, kind.device)
            columns = workspace[tile * tile * part.tiles :]
            arguments = (table, part.matrices, columns)
            if part.strips and (split or with_sums):
                _run(kernels.STRIPS, strips, part.strips, *arguments)
            if part.tiles:
                _run(kernels.TILES, tiles, part.tiles, *arguments, workspace)
            _run(kernels.SUM, sums, part.sums, *arguments, workspace, int(split), *scales)


def _run(table: _tuning.KernelTable, config: _tuning.Config, items: int, *arguments: Any) -> None:
    table.kernel[(items,)](*arguments, **dict(config.constants), **config.options())


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
