"""The CUDA form of the room (csrc/orthogonal_qr.cu): one launch, a block of threads for each matrix, no host."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops._registry import Unsupported
from cl_kernels.ops.orthogonal_qr import reference
from cl_kernels.ops.orthogonal_qr.native import allocate, backward_fields, forward_fields

__all__ = ["qr", "qr_backward"]

_MOST_COLUMNS = 480  # csrc/orthogonal_qr_block.h: kQrMostColumns


def qr(a: Tensor, floor: Tensor | None = None) -> reference.Factors:
    """All matrices in one launch; one without full rank goes to Householder reflections within it."""
    _covered(a)
    out = allocate(a)
    fields, held = forward_fields(a, floor, out)
    workspace = _workspace(a)
    with torch.cuda.device(a.device):
        _native.load().qr_cuda(fields, _native.DTYPE[a.dtype], workspace.data_ptr(), _stream(a))
    del held  # the allocator keeps their memory for this stream
    return out


def qr_backward(gq: Tensor | None, gr: Tensor | None, q: Tensor, r: Tensor, solve: Tensor) -> Tensor:
    """One launch."""
    _covered(q)
    ga = torch.empty_like(q, memory_format=torch.contiguous_format)
    fields, held = backward_fields(gq, gr, q, r, solve, ga)
    workspace = _workspace(q)
    with torch.cuda.device(q.device):
        _native.load().qr_backward_cuda(fields, _native.DTYPE[q.dtype], workspace.data_ptr(), _stream(q))
    del held
    return ga


def _covered(a: Tensor) -> None:
    if a.shape[-1] > _MOST_COLUMNS:
        raise Unsupported(f"more than {_MOST_COLUMNS} columns, got {a.shape[-1]}")


def _workspace(a: Tensor) -> Tensor:
    """Room for the small matrices of each problem; none where they fit into shared memory."""
    n = a.shape[-1]
    batch = a.numel() // (a.shape[-2] * n) if a.numel() else 0
    return a.new_empty(batch * _native.load().qr_workspace(n), dtype=torch.float64)


def _stream(a: Tensor) -> int:
    return torch.cuda.current_stream(a.device).cuda_stream
