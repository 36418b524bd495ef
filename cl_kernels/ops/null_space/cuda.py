"""The log-odds filter on CUDA: Cholesky factorisation by cuSOLVER, products by the Triton kernels of `kernels.py`.

Nothing here waits for the device, but for one read of the status in `spectral_projector`.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from cl_kernels.ops._registry import Unsupported
from cl_kernels.ops.null_space import curves, log_odds

__all__ = ["log_odds_filter", "spectral_projector"]

FEW: Final = 200  # tiles of 128: with fewer, tiles of 64 keep more of the 132 multiprocessors of an H200 busy
LARGEST: Final = 46336  # rows of a matrix whose entries can be counted in 31 bits
OLDEST: Final = 80  # compute capability; older ones have no asynchronous copies and are compiled for by nobody here


class _Halves(NamedTuple):
    """high + low / 2048, each [L, padded, padded] in float16 with zeros beyond `size`, in tiles of `tile`."""

    high: Tensor
    low: Tensor
    size: int
    tile: int


def spectral_projector(cov: Tensor, tau: Tensor, steps: int) -> Tensor:
    """P in the dtype of `cov`; what failed is solved again, except while a CUDA graph is captured."""
    size = cov.shape[-1]
    flat, taus = cov.reshape(cov.shape[:-2].numel(), size, size), tau.reshape(-1)
    projector, status = log_odds_filter(flat, taus, steps, None, True)
    if not (cov.is_cuda and torch.cuda.is_current_stream_capturing()):
        projector = curves.recomputed(projector, status, flat, taus, steps)
    return projector.to(cov.dtype).reshape(cov.shape)


def log_odds_filter(
    cov: Tensor, tau: Tensor, steps: int, previous: Tensor | None, check_psd: bool
) -> tuple[Tensor, Tensor]:
    """As `log_odds.log_odds_filter`, with products of split float16 numbers on tensor cores."""
    size = cov.shape[-1]
    flat = cov.reshape(cov.shape[:-2].numel(), size, size)
    if not flat.numel():
        return log_odds.log_odds_filter(cov, tau, steps, previous, check_psd)
    _refuse(flat)
    before = None if previous is None else previous.reshape(flat.shape)
    with torch.autocast(cov.device.type, enabled=False), _on(cov.device):
        begun = log_odds.start(flat, tau.reshape(-1), check_psd)
        projector = _last(*log_odds.sharpen(_halves(begun.s), steps, _product))
        projector, status = log_odds.finish(projector, begun, before)
    return projector.reshape(cov.shape), status.reshape(cov.shape[:-2])


def _refuse(flat: Tensor) -> None:
    from cl_kernels.ops import _triton

    if flat.shape[-1] > LARGEST:
        raise Unsupported(f"matrices of {flat.shape[-1]} rows have more than 2^31 entries")
    if 0 < (capability := _triton.capability(flat.device)) < OLDEST:
        raise Unsupported(f"compute capability {capability / 10} is older than {OLDEST / 10}")


def _halves(s: Tensor) -> _Halves:
    from cl_kernels.ops.null_space import kernels

    layers, size, _ = s.shape
    tile = 128 if layers * _pairs(-(-size // 128)) >= FEW else 64
    padded = -(-size // tile) * tile
    high, low = (s.new_empty(layers, padded, padded, dtype=torch.float16) for _ in range(2))
    blocks = padded // kernels.HALVES_TILE
    _run(kernels.HALVES, "any", layers * _pairs(blocks), s.contiguous(), high, low, size, blocks)
    return _Halves(high, low, size, tile)


def _product(a: _Halves, b: _Halves, alpha: float, beta: float, addend: _Halves | None, gamma: float) -> _Halves:
    out = _Halves(torch.empty_like(a.high), torch.empty_like(a.low), a.size, a.tile)
    _multiply("square" if addend is None else "add", (a, b, addend or a, out), a.high, alpha, beta, gamma)
    return out


def _last(a: _Halves, b: _Halves) -> Tensor:
    """(I + A B) / 2 in float32."""
    out = torch.empty(len(a.high), a.size, a.size, dtype=torch.float32, device=a.high.device)
    _multiply("last", (a, b, a, a), out, 0.5, 0.0, 0.5)
    return out


def _multiply(form: str, matrices: tuple[_Halves, ...], last: Tensor, *numbers: float) -> None:
    """The kernel takes all its arguments in every form, and leaves alone what it does not need."""
    from cl_kernels.ops.null_space import kernels

    a = matrices[0]
    blocks = a.high.shape[-1] // a.tile
    halves = [half for matrix in matrices for half in (matrix.high, matrix.low)]
    name = f"{'wide' if a.tile == 128 else 'narrow'}-{form}"
    _run(kernels.PRODUCT, name, len(a.high) * _pairs(blocks), *halves, last, a.size, blocks, *numbers)


def _run(table: Any, form: str, items: int, *arguments: Any) -> None:
    from cl_kernels.ops import _triton

    config = table.choose(_triton.capability(arguments[0].device), "fp16", form)
    table.kernel[(items,)](*arguments, **dict(config.constants), **config.options())


def _pairs(blocks: int) -> int:
    return blocks * (blocks + 1) // 2


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
