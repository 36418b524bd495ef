"""Second moments: of one tensor, of many layers in one call, and of attention queries by head.

In-place operations on state that a collector owns. `alpha` and `beta` as in BLAS: beta 0 overwrites without reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cl_kernels.ops import _checks, _registry
from cl_kernels.ops.covariance import cpu, cuda, reference

__all__ = ["expand_head_grams", "update_covariance_", "update_covariances_", "update_head_grams_"]

_STATE = (torch.float32, torch.float64)
_SCALAR = torch.Size(())
_NAMES = ("cov", "x", "total", "count", "weight")


def update_covariance_(
    cov: Tensor,
    x: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    total: Tensor | None = None,
    count: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Add the second moment of the rows of x: cov <- beta cov + alpha X^T diag(weight) X. Returns `cov`.

    `cov` [d, d] is float32 or float64; `x` [..., d] any real floating dtype, its leading dimensions are the rows;
    `weight` [...] one number per row. When given, `total` [d] <- beta total + alpha sum_r weight_r x_r, and `count`
    (0-d; float64 counts past 2^24) <- beta count + alpha sum_r weight_r, with weight 1 where there is none.

    Only the upper triangle of `cov` is read; both are written, so the result is symmetric to the last bit. Products of
    16-bit rows are exact and summed in float32, and partial sums go to the dtype of `cov` every 512 rows or sooner.
    No rows: only beta applies. NaN and infinity spread as in a product; the reader of the statistic checks, as
    `symmetric_eigh` does. The same inputs give the same bits. Not differentiable.

    Raises `TypeError`, `ValueError` (shape, dtype, expanded or overlapping state), `RuntimeError` (devices); nothing is
    changed then. Cost: n d^2 operations (half of X^T X), one pass over x. Source: NSP2 Eqs. 24-25, GPM, Adam-NSCL.
    """
    _check("", cov, x, total, count, weight)
    _checked_scales(alpha, beta)
    rows = x.detach() if x.requires_grad else x
    _COVARIANCE(cov, rows, total, count, None if weight is None else weight.detach(), float(alpha), float(beta))
    increment_version([state for state in (cov, total, count) if state is not None])
    return cov


def update_covariances_(
    covs: Sequence[Tensor],
    xs: Sequence[Tensor],
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    totals: Sequence[Tensor] | None = None,
    counts: Sequence[Tensor] | None = None,
    weights: Sequence[Tensor] | None = None,
) -> None:
    """`update_covariance_` for many layers in one call; sizes and dtypes may differ from layer to layer.

    On CUDA one launch forms the upper tiles of all layers and another one sums their chunks, without waiting for the
    device, in a workspace of at most 64 MB; what needs more is cut into several such pairs (twelve layers of 768: two).
    float32 rows take one more pass for the scale of their columns, and so does `totals`. The bits of a layer do not
    depend on the others. After one call to compile the kernels, a CUDA graph may capture it.
    All states must be distinct: a layer that is used twice gives its rows in two calls, or concatenated.
    Raises as `update_covariance_`, naming the entry; a wrong entry anywhere changes nothing.
    """
    for name, values in (("xs", xs), ("totals", totals), ("counts", counts), ("weights", weights)):
        if values is not None and len(values) != len(covs):
            raise ValueError(f"{name}: expected {len(covs)} tensors, one for each of covs, got {len(values)}")
    for i, (cov, x) in enumerate(zip(covs, xs, strict=True)):
        _check(f"[{i}]", cov, x, *(values[i] if values is not None else None for values in (totals, counts, weights)))
        if cov.device.type != covs[0].device.type:  # one implementation is given all of them; several GPUs are fine
            raise RuntimeError(f"covs[{i}] is on {cov.device} but covs[0] is on {covs[0].device}; call once for each")
    _checked_scales(alpha, beta)
    if not covs:
        return
    rows = [x.detach() for x in xs]
    weighted = [weight.detach() for weight in weights or ()]
    states = [list(covs), list(totals or ()), list(counts or ())]
    _COVARIANCES(states[0], rows, states[1], states[2], weighted, float(alpha), float(beta))
    increment_version([state for some in states for state in some])


def update_head_grams_(grams: Tensor, q: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Second moments of queries, one per head: G_h <- beta G_h + alpha sum over images and tokens of q_h q_h^T.

    `grams` [H, dh, dh] is float32 or float64, `q` [B, H, N, dh] any real floating dtype and any strides: the view that
    a fused qkv projection gives is read in place. With the key weights these Grams are all that the NSP2 affinity
    condition needs (`expand_head_grams`), at dh/D of the cost: 156 times less for ViT-B. Returns `grams`.
    Symmetry, accuracy, errors: as `update_covariance_`. Source: method-null-space, section 12.2.
    """
    _checks.floating("q", q)
    if q.ndim != 4:
        raise ValueError(f"q: expected shape [B, H, N, dh], got {tuple(q.shape)}")
    _checks.floating("grams", grams, *_STATE)
    if tuple(grams.shape) != (q.shape[1], q.shape[3], q.shape[3]):
        wanted = (q.shape[1], q.shape[3], q.shape[3])
        raise ValueError(f"grams: expected shape {wanted} for q of shape {tuple(q.shape)}, got {tuple(grams.shape)}")
    _checks.same_device("q", q, "grams", grams)
    _writable("grams", grams)
    _checked_scales(alpha, beta)
    _HEAD_GRAMS(grams, q.detach(), float(alpha), float(beta))
    increment_version(grams)
    return grams


def expand_head_grams(grams: Tensor, weight: Tensor) -> Tensor:
    """The NSP2 key-side matrix from head Grams: sum_h W_h^T G_h W_h, of shape [D, D], in the dtype of `grams`.

    `grams` [H, dh, dh]; `weight` [H dh, D] is the key projection in torch's [out, in] layout, head h owning rows
    h dh ... (h+1) dh. Computed in float64 whatever the dtypes (in float32 it would lose 2.4e-7); exactly symmetric.
    Differentiable in both. Raises `ValueError` for shapes and dtypes, `RuntimeError` for devices.
    Cost: 2 D^2 (H dh) + 2 D H dh^2 operations, once per task. Source: NSP2 Eq. 24 and method-null-space 12.2.
    """
    _checks.floating("grams", grams, *_STATE)
    if grams.ndim != 3 or grams.shape[1] != grams.shape[2]:
        raise ValueError(f"grams: expected shape [H, dh, dh], got {tuple(grams.shape)}")
    _checks.floating("weight", weight)
    if weight.ndim != 2 or weight.shape[0] != grams.shape[0] * grams.shape[1]:
        rows = grams.shape[0] * grams.shape[1]
        raise ValueError(f"weight: expected shape [{rows}, D] (heads x head width rows), got {tuple(weight.shape)}")
    _checks.same_device("weight", weight, "grams", grams)
    expanded: Tensor = _EXPAND(grams, weight)
    return expanded


def _check(entry: str, cov: Tensor, x: Tensor, total: Tensor | None, count: Tensor | None, w: Tensor | None) -> None:
    cov_name, x_name, total_name, count_name, weight_name = (
        tuple(f"{name}s{entry}" for name in _NAMES) if entry else _NAMES
    )
    if isinstance(cov, Tensor) and cov.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{cov_name}: expected torch.float32 or torch.float64, got {cov.dtype}; sums kept in 16 bits lose positive "
            "definiteness (126 of 768 eigenvalues came out negative)"
        )
    _checks.floating(cov_name, cov, *_STATE)
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"{cov_name}: expected shape [d, d], got {tuple(cov.shape)}")
    _checks.floating(x_name, x)
    if x.ndim < 1 or x.shape[-1] != cov.shape[0]:
        raise ValueError(f"{x_name}: expected shape [..., {cov.shape[0]}] for {cov_name}, got {tuple(x.shape)}")
    _checks.same_device(x_name, x, cov_name, cov)
    _writable(cov_name, cov)
    for name, state, shape in ((total_name, total, cov.shape[:1]), (count_name, count, _SCALAR)):
        if state is not None:
            _checks.floating(name, state, *_STATE)
            if state.shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(state.shape)}")
            _checks.same_device(name, state, cov_name, cov)
            _writable(name, state)
    if w is not None:
        _checks.floating(weight_name, w)
        if w.shape != x.shape[:-1]:
            raise ValueError(f"{weight_name}: expected shape {tuple(x.shape[:-1])}, got {tuple(w.shape)}")
        _checks.same_device(weight_name, w, cov_name, cov)


def _writable(name: str, state: Tensor) -> None:
    _checks.no_overlap(name, state)
    if state.requires_grad:
        raise ValueError(f"{name}: is written in place and must not require a gradient; pass `.detach()`")


def _checked_scales(alpha: float, beta: float) -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        if type(value) is float and math.isfinite(value):
            continue  # what is usual should cost nothing
        if not math.isfinite(_checks.number(name, value)):
            raise ValueError(f"Invalid {name} value: {value} (expected a finite number)")


def _writes_only(*_: object) -> None:
    """Fake kernel of the in-place operations: shapes are the arguments' own."""


def _fake_expand(grams: Tensor, weight: Tensor) -> Tensor:
    return grams.new_empty((weight.shape[1], weight.shape[1]))


def _save_expand(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _expand_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """With S the symmetric part of the gradient: dG_h = W_h S W_h^T, dW_h = (G_h + G_h^T) W_h S."""
    grams, weight = ctx.saved_tensors  # type: ignore[attr-defined]  # torch leaves its own attribute out of the type
    heads, size, _ = grams.shape
    symmetric = (grad.double() + grad.double().mT) / 2
    slices = weight.double().reshape(heads, size, -1)
    through = slices @ symmetric
    wide = grams.double()
    for_weight = ((wide + wide.mT) @ through).reshape(weight.shape).to(weight.dtype)
    return (through @ slices.mT).to(grams.dtype), for_weight


_COVARIANCE = _registry.define(
    "update_covariance_",
    "(Tensor(a!) cov, Tensor x, Tensor(b!)? total, Tensor(c!)? count, Tensor? weight, float alpha, float beta) -> ()",
    reference=reference.update_covariance_,
    fake=_writes_only,
    native_cpu=cpu.update_covariance_,
    triton=cuda.update_covariance_,
    triton_details=cuda.how,
)
_COVARIANCES = _registry.define(
    "update_covariances_",
    "(Tensor(a!)[] covs, Tensor[] xs, Tensor(b!)[] totals, Tensor(c!)[] counts, Tensor[] weights, float alpha, "
    "float beta) -> ()",
    reference=reference.update_covariances_,
    fake=_writes_only,
    native_cpu=cpu.update_covariances_,
    triton=cuda.update_covariances_,
    triton_details=cuda.how,
)
_HEAD_GRAMS = _registry.define(
    "update_head_grams_",
    "(Tensor(a!) grams, Tensor q, float alpha, float beta) -> ()",
    reference=reference.update_head_grams_,
    fake=_writes_only,
    native_cpu=cpu.update_head_grams_,
    triton=cuda.update_head_grams_,
    triton_details=cuda.how,
)
_EXPAND = _registry.define(
    "expand_head_grams",
    "(Tensor grams, Tensor weight) -> Tensor",
    reference=reference.expand_head_grams,
    fake=_fake_expand,
)
_registry.register_autograd("expand_head_grams", _expand_backward, _save_expand)
