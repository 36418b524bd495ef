"""Orthonormal factors of many tall matrices at once: thin QR, polar factor, extension of a basis, and a penalty."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_kernels.errors import NonFiniteError, SubspaceError
from cl_kernels.ops import _checks
from cl_kernels.ops._registry import define, register_autograd
from cl_kernels.ops.orthogonal_qr import autograd, cuda, native, reference
from cl_kernels.ops.orthogonal_qr.compositions import PENALTIES, extend, penalty, polar_factor

__all__ = ["QR", "Extension", "extend_basis", "orthogonality_penalty", "polar", "qr"]


class QR(NamedTuple):
    """A = q r, q [..., m, n] with orthonormal columns, r [..., n, n] upper triangular, diagonal not negative."""

    q: Tensor
    r: Tensor


class Extension(NamedTuple):
    """A = basis coefficients + q r; `kept` [..., n] tells which columns of A gave a new direction.

    Where `kept` is false, the column of q and the row of r are zero.
    """

    q: Tensor
    coefficients: Tensor
    r: Tensor
    kept: Tensor


def _fake_qr(a: Tensor, floor: Tensor | None = None) -> tuple[Tensor, ...]:
    lead, n = a.shape[:-2], a.shape[-1]
    square = a.new_empty(*lead, n, n)
    return (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        square,
        torch.empty_like(square),
        a.new_empty(lead, dtype=torch.int32),
    )


_qr = define(
    "qr",
    "(Tensor a, Tensor? floor=None) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.qr,
    fake=_fake_qr,
    native_cpu=native.qr,
    native_cuda=cuda.qr,
)
register_autograd("qr", autograd.qr_backward, autograd.qr_context)

define(
    "qr_backward",
    "(Tensor? gq, Tensor? gr, Tensor q, Tensor r, Tensor solve) -> Tensor",
    reference=reference.qr_backward,
    fake=lambda gq, gr, q, r, solve: torch.empty_like(q, memory_format=torch.contiguous_format),
    native_cpu=native.qr_backward,
    native_cuda=cuda.qr_backward,
)

_polar = define(
    "polar",
    "(Tensor a) -> (Tensor, Tensor, Tensor)",
    reference=polar_factor,
    fake=lambda a: (_fake_qr(a)[0], _fake_qr(a)[1], a.new_empty(*a.shape[:-2], a.shape[-1])),
)
register_autograd("polar", autograd.polar_backward, autograd.polar_context)


def _fake_extend(basis: Tensor, a: Tensor, tolerance: float) -> tuple[Tensor, ...]:
    q, r, solve, status = _fake_qr(a)
    return q, a.new_empty(*a.shape[:-2], basis.shape[-1], a.shape[-1]), r, solve, status


_extend = define(
    "extend_basis",
    "(Tensor basis, Tensor a, float tolerance) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=extend,
    fake=_fake_extend,
)
register_autograd("extend_basis", autograd.extend_backward, autograd.extend_context)


def qr(a: Tensor, *, check: bool = False) -> QR:
    """The thin QR of every matrix [..., m, n], m >= n >= 1: A = Q R with Q^T Q = I and diag(R) >= 0.

    float32 and float64; 16-bit input is computed in float32, its Q returned in the input's dtype and R in float32. Any
    strides. Unique, and so comparable between devices, where A has full rank. Where it has not, Q is orthonormal all
    the same, with arbitrary directions for what A does not determine (A = 0 gives Q = I, R = 0), and the gradient is
    damped instead of infinite. A matrix that holds NaN or infinity gives NaN for itself and changes no other.

    Differentiable, twice where the rank is full. `check=True` reads one number from the device and raises
    `NonFiniteError`, or `SubspaceError` for a deficient rank, naming the first such matrix. Raises `ValueError` where
    m < n. Cost: Gram matrix, Cholesky factor and Q = A R^-1 in float64, 2 m n^2 operations and two passes over A; twice
    that from a condition number of 1e4, and for float64. Source: Yamazaki, Tomov and Dongarra (2015); for the
    gradient, Walter and Lehmann (2010).
    """
    x = _tall("a", a)
    q, r, _, status = _qr(x)
    if check and bool((status != reference.OK).any()):
        _complain(status)
    return QR(q.to(a.dtype), r)


def polar(a: Tensor) -> Tensor:
    """The matrix with orthonormal columns nearest to A [..., m, n], m >= n: Q = A (A^T A)^(-1/2).

    Q of the QR times the polar factor of R, by an SVD of R in float64: orthonormal for any rank (then not unique).
    dtypes as for `qr`; differentiable once, with gradients of directions that A hardly has damped. A matrix that holds
    NaN or infinity gives NaN for itself. Raises `ValueError` where m < n. Cost: that of `qr`, an n x n SVD and
    2 m n^2 more. Source: Higham (1986); gradient by the Sylvester equation H W + W H = X - X^T.
    """
    q: Tensor = _polar(_tall("a", a))[0]
    return q if q.dtype == a.dtype else q.to(a.dtype)


def extend_basis(basis: Tensor, a: Tensor, *, tolerance: float | None = None) -> Extension:
    """What A adds to an orthonormal basis P [..., m, k]: A = P S + Q R with [P, Q] orthonormal.

    Block Gram-Schmidt in two passes, S = P^T A, (Q, R) = qr(A - P S) and both again, with its products in float64. A
    column whose part outside of P and of the columns before it is at most `tolerance` of its length is dropped instead
    of giving a direction inside the old span: its column of q and row of r are zero, and `kept` is False. So a full
    history (k = m) keeps nothing. The default tolerance is 1e-3 for float32 and 16-bit input, 1e-6 for float64.

    a is [..., m, n] with m >= n; basis broadcasts against it and is held constant: gradients flow to A alone, and not
    from dropped columns. The orthonormality of `basis` is not tested. Raises `ValueError` where sizes do not fit or
    `tolerance` is not within [0, 1). Cost: 8 m k n operations and two `qr`. Source: Gram-Schmidt "twice is enough".
    """
    x = _tall("a", a)
    _checks.floating("basis", basis)
    _checks.matrix("basis", basis, rows=a.shape[-2])
    _checks.same_device("basis", basis, "a", a)
    lead = torch.broadcast_shapes(basis.shape[:-2], a.shape[:-2])
    if tolerance is None:
        tolerance = 1e-6 if x.dtype == torch.float64 else 1e-3
    _checks.number("tolerance", tolerance, 0.0, 1.0, closed=False)
    q, coefficients, r, _, _ = _extend(basis.detach(), x.expand(*lead, *a.shape[-2:]), float(tolerance))
    return Extension(q.to(a.dtype), coefficients, r, r.detach().diagonal(dim1=-2, dim2=-1) != 0)


def orthogonality_penalty(
    new: Tensor, old: Tensor | None = None, *, norm: str = "frobenius", past: Tensor | None = None
) -> Tensor:
    """How far the columns of [old, new] are from orthonormal, a number for each matrix [..., m, n]; `.sum()` is a loss.

    With C = old^T new, k columns of `old` [..., m, k], held constant:
        "frobenius"    || [old, new]^T [old, new] - I ||_F, from the new blocks alone: sqrt(past + 2 |C|^2 + |S|^2),
                       S = new^T new - I                                                       (LoRAC, official code)
        "cross"        ||C||_F
        "l1"           the sum of |C|                                                          (O-LoRA, official code)
        "mean_square"  ||C||_F^2 / (k n), which does not grow with the number of tasks
    `past` is || old^T old - I ||_F^2, constant during a task: `orthogonality_penalty(old).square()`; it is computed
    where it is not given. Its gradient is 2 (old C + new S) / value for "frobenius", and 0 where the value is 0.

    Any floating dtype, 16-bit computed in float32. Raises `ValueError` for sizes, another norm, or a norm that needs
    `old`. Cost: 2 m n (k + n) operations, and 2 m k^2 without `past`. Source: LoRAC-IPC 4; O-LoRA, Eq. 8.
    """
    _checks.floating("new", new)
    _checks.matrix("new", new)
    if norm not in PENALTIES:
        raise ValueError(f"norm: expected one of {', '.join(PENALTIES)}, got {norm!r}")
    if old is not None:
        _checks.floating("old", old)
        _checks.matrix("old", old, rows=new.shape[-2])
        _checks.same_device("old", old, "new", new)
    elif norm != "frobenius":
        raise ValueError(f"old: norm {norm!r} measures new columns against old ones, got None")
    work = torch.promote_types(new.dtype, torch.float32)
    return penalty(new.to(work), None if old is None else old.detach().to(work), norm, past)


def _tall(name: str, a: Any) -> Tensor:
    """`a` in the dtype that is computed in, if it can be factored."""
    _checks.floating(name, a)
    _checks.matrix(name, a)
    m, n = a.shape[-2:]
    if n < 1 or m < n:
        raise ValueError(
            f"{name}: expected [..., m, n] with m >= n >= 1, got {tuple(a.shape)}; transpose wide matrices"
        )
    work: Tensor = a if a.dtype == torch.float64 else a.float()
    return work


def _complain(status: Tensor) -> None:
    """Name the first matrix that is not what it should be."""
    first = [int(i) for i in (status != reference.OK).nonzero()[0]]
    what = f"a{first}" if first else "a"
    if int(status[tuple(first)]) == reference.NONFINITE:
        raise NonFiniteError(f"{what} holds NaN or infinity")
    raise SubspaceError(f"{what} is numerically rank deficient: a column adds nothing to the columns before it")
