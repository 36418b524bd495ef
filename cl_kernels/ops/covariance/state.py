"""What all implementations do: scale the state, count rows, find the strides of rows, refuse shared memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_count_", "refuse_shared_memory", "row_levels", "scale_"]


def scale_(state: Tensor, beta: float) -> None:
    if beta == 0:
        state.zero_()  # as in BLAS: what is not read cannot spread its NaN
    elif beta != 1:
        state.mul_(beta)


def add_count_(count: Tensor, rows: int, weight: Tensor | None, alpha: float, beta: float) -> None:
    scale_(count, beta)
    count.add_(rows if weight is None else weight.sum(dtype=torch.float64), alpha=alpha)


def row_levels(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, innermost first; neighbours that one stride serves are merged."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    return merged


def refuse_shared_memory(written: dict[str, Sequence[Tensor | None]], read: dict[str, Sequence[Tensor | None]]) -> None:
    """Raise `ValueError` if a written tensor may share memory with any other one. Keys name the arguments."""
    spans = _spans(written, True) + _spans(read, False)
    spans.sort()
    end_written = end_any = 0
    for i, (start, end, writes, name, _) in enumerate(spans):
        if start < (end_any if writes else end_written):
            other = next(span for span in spans[:i] if span[1] > start and (span[2] or writes))
            raise ValueError(
                f"{_named(name, spans[i][4])} and {_named(other[3], other[4])} share memory; what is written must "
                "stand alone, pass a `.clone()`"
            )
        end_any = max(end_any, end)
        end_written = max(end_written, end) if writes else end_written


def _spans(named: dict[str, Sequence[Tensor | None]], writes: bool) -> list[tuple[int, int, bool, str, int]]:
    """(first byte, one past the last, written?, argument, entry) of every tensor that has elements."""
    spans = []
    for name, tensors in named.items():
        for i, tensor in enumerate(tensors):
            if tensor is None or (count := tensor.numel()) == 0:
                continue
            if not tensor.is_contiguous():
                count = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((start, start + count * tensor.element_size(), writes, name, i if len(tensors) > 1 else -1))
    return spans


def _named(name: str, entry: int) -> str:
    return name if entry < 0 else f"{name}[{entry}]"
