"""What both implementations do to the state: scale it, count rows, and refuse memory that is written and read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["add_count_", "refuse_shared_memory", "scale_"]


def scale_(state: Tensor, beta: float) -> None:
    if beta == 0:
        state.zero_()  # as in BLAS: what is not read cannot spread its NaN
    elif beta != 1:
        state.mul_(beta)


def add_count_(count: Tensor, rows: int, weight: Tensor | None, alpha: float, beta: float) -> None:
    scale_(count, beta)
    count.add_(rows if weight is None else weight.sum(dtype=torch.float64), alpha=alpha)


def refuse_shared_memory(written: dict[str, Sequence[Tensor | None]], read: dict[str, Sequence[Tensor | None]]) -> None:
    """Raise `ValueError` if a written tensor may share memory with any other one. Keys name the arguments."""
    spans = sorted(itertools.chain(_spans(written, True), _spans(read, False)))
    end_written = end_any = 0
    for i, (start, end, writes, name) in enumerate(spans):
        if start < (end_any if writes else end_written):
            others = [other for s, e, w, other in spans[:i] if e > start and (w or writes)]
            raise ValueError(
                f"{name} and {others[0]} share memory; what is written must stand alone, pass a `.clone()`"
            )
        end_any = max(end_any, end)
        end_written = max(end_written, end) if writes else end_written


def _spans(named: dict[str, Sequence[Tensor | None]], writes: bool) -> Iterable[tuple[int, int, bool, str]]:
    for name, tensors in named.items():
        for i, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                start = tensor.data_ptr()
                end = start + (last + 1) * tensor.element_size()
                yield start, end, writes, f"{name}[{i}]" if len(tensors) > 1 else name
