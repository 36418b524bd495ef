"""The compiled CPU form of the room (csrc/orthogonal_qr_cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops.orthogonal_qr import reference

__all__ = ["allocate", "backward_fields", "forward_fields", "qr", "qr_backward"]


def qr(a: Tensor, floor: Tensor | None = None) -> reference.Factors:
    """A thread for each matrix; float64 matrices without full rank are left to LAPACK."""
    out = allocate(a)
    fields, _held = forward_fields(a, floor, out)
    _native.load().qr_cpu(fields, _native.DTYPE[a.dtype], torch.get_num_threads())
    if a.dtype == torch.float64 and a.numel():
        declined = out[3] == reference.DECLINED
        if bool(declined.any()):
            for mine, found in zip(out, reference.qr(a[declined]), strict=True):
                mine[declined] = found
    return out


def qr_backward(gq: Tensor | None, gr: Tensor | None, q: Tensor, r: Tensor, solve: Tensor) -> Tensor:
    """One pass over the saved factors and the gradients, in double."""
    ga = torch.empty_like(q, memory_format=torch.contiguous_format)
    fields, _held = backward_fields(gq, gr, q, r, solve, ga)
    _native.load().qr_backward_cpu(fields, _native.DTYPE[q.dtype], torch.get_num_threads())
    return ga


def allocate(a: Tensor) -> reference.Factors:
    """Memory for q, r, solve and status."""
    lead, n = a.shape[:-2], a.shape[-1]
    r, solve = a.new_empty(*lead, n, n), a.new_empty(*lead, n, n)
    return torch.empty_like(a, memory_format=torch.contiguous_format), r, solve, a.new_empty(lead, dtype=torch.int32)


def forward_fields(a: Tensor, floor: Tensor | None, out: reference.Factors) -> tuple[list[int], list[Tensor]]:
    """The fields of QrBatch, and the tensors that must outlive the call."""
    x = _batch(a)
    held = [x] if floor is None else [x, floor.to(a.dtype).contiguous()]
    addresses = [held[1].data_ptr() if len(held) > 1 else 0, *(t.data_ptr() for t in out)]
    return [x.data_ptr(), *x.shape, *x.stride(), *addresses], held


def backward_fields(
    gq: Tensor | None, gr: Tensor | None, q: Tensor, r: Tensor, solve: Tensor, ga: Tensor
) -> tuple[list[int], list[Tensor]]:
    """The fields of QrGradients, and the tensors that must outlive the call."""
    grads = [None if g is None else _batch(g.to(q.dtype)) for g in (gq, gr)]
    saved = [t.contiguous() for t in (q, r, solve)]
    addresses = [0 if g is None else g.data_ptr() for g in grads] + [t.data_ptr() for t in (*saved, ga)]
    strides = [s for g in grads for s in ((0, 0, 0) if g is None else g.stride())]
    m, n = q.shape[-2:]
    return [*addresses, q.numel() // (m * n) if m * n else 0, m, n, *strides], [
        *(g for g in grads if g is not None),
        *saved,
    ]


def _batch(x: Tensor) -> Tensor:
    """One batch dimension, without a copy where the strides allow."""
    return x if x.ndim == 3 else x.reshape(-1, *x.shape[-2:]) if x.numel() else x.new_empty(0, *x.shape[-2:])
