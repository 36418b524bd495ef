"""Ten seconds of self-test: every operation, every implementation that can run here, against the float64 reference."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_kernels import ops
from cl_kernels.ops import _registry, weight_projection

Case = Callable[[torch.device, torch.dtype], Tensor]

#: Relative Frobenius error allowed to float32 against float64: 4e-7 is usual, a wrong kernel is off by 1e-2 and more.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Outcome:
    """One implementation of one operation on one device."""

    op: str
    device: str
    backend: str
    error: float | None
    seconds: float
    failure: str | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None


def run(devices: list[torch.device]) -> Iterator[Outcome]:
    """Try every operation; one outcome at a time, so that the caller can show progress."""
    for name in sorted(_registry.OPS):
        case = CASES.get(name)
        if case is None:
            yield Outcome(name, "-", "-", None, 0.0, "no self-test is written for this operation")
            continue
        with _registry.use_backend("reference"):
            wanted = case(torch.device("cpu"), torch.float64)
        for device in devices:
            for backend in _runnable(name, device):
                yield _try(name, case, device, backend, wanted)


def _runnable(name: str, device: torch.device) -> list[str]:
    there = [i.backend for i in _registry.OPS[name].on(device.type) if i.missing() is None]
    return [*there, "reference"]


def _try(name: str, case: Case, device: torch.device, backend: str, wanted: Tensor) -> Outcome:
    start = time.perf_counter()
    error, failure = None, None
    try:
        with _registry.use_backend(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = case(device, torch.float32).to("cpu", torch.float64)
        error = float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))
        if not error <= TOLERANCE:  # catches NaN too
            failure = f"relative error {error:.1e} against the float64 reference, allowed {TOLERANCE:.0e}"
    except Exception as problem:  # whatever it is, doctor has to report it and go on
        failure = f"{type(problem).__name__}: {problem}"
    return Outcome(name, str(device), backend, error, time.perf_counter() - start, failure)


def _normal(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same numbers on every device and in every dtype: drawn in float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def _projector(dim: int, rank: int, seed: int, device: torch.device, dtype: torch.dtype) -> ops.Projector:
    q, _ = torch.linalg.qr(_normal((dim, rank), seed, torch.device("cpu"), torch.float64))
    return ops.Projector(q.to(device, dtype), 0.9, 0.7)


def _covariance(device: torch.device, dtype: torch.dtype) -> Tensor:
    cov = torch.zeros(37, 37, device=device, dtype=dtype)
    ops.update_covariance_(cov, _normal((5, 61, 37), 1, device, dtype), alpha=0.5)
    return cov


def _covariances(device: torch.device, dtype: torch.dtype) -> Tensor:
    covs = [torch.ones(d, d, device=device, dtype=dtype) for d in (24, 41)]
    ops.update_covariances_(covs, [_normal((99, d), d, device, dtype) for d in (24, 41)], beta=0.5)
    return torch.cat([c.flatten() for c in covs])


def _head_grams(device: torch.device, dtype: torch.dtype) -> Tensor:
    grams = torch.zeros(3, 16, 16, device=device, dtype=dtype)
    ops.update_head_grams_(grams, _normal((2, 3, 29, 16), 2, device, dtype))
    return grams


def _expand(device: torch.device, dtype: torch.dtype) -> Tensor:
    q = _normal((3, 40, 16), 3, device, dtype)
    return ops.expand_head_grams(q.mT @ q, _normal((48, 33), 4, device, dtype))


def _spd(device: torch.device, dtype: torch.dtype) -> Tensor:
    """A covariance whose spectrum falls by 1.45 a step, so that its directions are well separated."""
    q, _ = torch.linalg.qr(_normal((32, 32), 5, torch.device("cpu"), torch.float64))
    spectrum = torch.logspace(0, -5, 32, dtype=torch.float64)
    cov: Tensor = (q * spectrum) @ q.mT
    return ((cov + cov.mT) / 2).to(device, dtype)


def _eigh(device: torch.device, dtype: torch.dtype) -> Tensor:
    values, vectors = ops.symmetric_eigh(_spd(device, dtype))
    return (vectors * values[..., None, :]) @ vectors.mT  # signs of vectors are free, the product is not


def _spectral(device: torch.device, dtype: torch.dtype) -> Tensor:
    return ops.spectral_projector(_spd(device, dtype), 1e-2)


def _filter(device: torch.device, dtype: torch.dtype) -> Tensor:
    return ops.log_odds_filter(_spd(device, dtype), 1e-2).projector


def _project(device: torch.device, dtype: torch.dtype) -> Tensor:
    left, right = _projector(7, 3, 6, device, dtype), _projector(45, 11, 7, device, dtype)
    return ops.project(_normal((2, 7, 45), 8, device, dtype), left, right)


def _adam(device: torch.device, dtype: torch.dtype) -> Tensor:
    shapes = ((19, 45), (4, 45), (45,))
    params = [_normal(s, 10 + i, device, dtype) for i, s in enumerate(shapes)]
    grads = [_normal(s, 20 + i, device, dtype) for i, s in enumerate(shapes)]
    averages = [torch.zeros_like(p) for p in params]
    squares = [torch.zeros_like(p) for p in params]
    steps = [torch.zeros((), device=device) for _ in params]
    left = [None, _projector(4, 1, 9, device, dtype), None]
    right = [_projector(45, 11, 7, device, dtype), _projector(45, 30, 8, device, dtype), None]
    for _ in range(2):
        ops.projected_adam_step_(
            params, grads, averages, squares, steps, left, right,
            lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled_weight_decay=True,
        )  # fmt: skip
    return torch.cat([p.flatten() for p in params])


_ANCHORED = ((19, 45), (6, 3, 3, 3), (45,))


def _ftp(device: torch.device, dtype: torch.dtype, *, adam: bool) -> Tensor:
    """Three steps, so that the radius opens: from the anchor, off its floor, and within a ball."""
    anchors = [_normal(s, 30 + i, device, dtype) for i, s in enumerate(_ANCHORED)]
    params = [a.clone() for a in anchors]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    steps, radii = [torch.zeros((), device=device) for _ in params], [torch.zeros(8, device=device) for _ in params]
    grads = [_normal(s, 40 + i, device, dtype) for i, s in enumerate(_ANCHORED)]
    for _ in range(3):
        if adam:
            ops.ftp_adam_step_(
                params, grads, first, second, steps, anchors, radii,
                lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01,
            )  # fmt: skip
        else:
            ops.ftp_sgd_step_(
                params, grads, first, steps, anchors, radii,
                lr=0.01, momentum=0.9, dampening=0.0, weight_decay=0.01, nesterov=True,
            )  # fmt: skip
    return torch.cat([t.flatten().to(dtype) for t in (*params, *(r[:1] for r in radii))])


def _project_to_anchor(device: torch.device, dtype: torch.dtype) -> Tensor:
    weight, anchor = (_normal((19, 45), seed, device, dtype) for seed in (50, 51))
    weight.requires_grad_()
    return _with_gradient(weight, ops.project_to_anchor(weight, anchor, 40.0))


def _displacement_products(device: torch.device, dtype: torch.dtype) -> Tensor:
    grads, params, anchors = (
        [_normal(s, seed + i, device, dtype) for i, s in enumerate(_ANCHORED)] for seed in (52, 55, 58)
    )
    return weight_projection.displacement_products(grads, params, anchors)


def _rescale(device: torch.device, dtype: torch.dtype) -> Tensor:
    params, anchors = ([_normal(s, seed + i, device, dtype) for i, s in enumerate(_ANCHORED)] for seed in (61, 64))
    weight_projection.rescale_(params, anchors, [0.5, torch.linspace(0, 1, 6, device=device), 1.5])
    return torch.cat([p.flatten() for p in params])


def _tall(device: torch.device, dtype: torch.dtype, columns: int = 19) -> Tensor:
    return _normal((3, 131, columns), 11 + columns, device, dtype).requires_grad_()


def _with_gradient(x: Tensor, *outputs: Tensor) -> Tensor:
    """The outputs, and the gradient of a loss that is not the same for all their entries."""
    loss = torch.stack([(out * torch.linspace(-1, 1, out.numel()).to(out).view_as(out)).sum() for out in outputs]).sum()
    (grad,) = torch.autograd.grad(loss, x)
    return torch.cat([t.detach().flatten() for t in (*outputs, grad)])


def _qr(device: torch.device, dtype: torch.dtype) -> Tensor:
    a = _tall(device, dtype)
    return _with_gradient(a, *ops.qr(a))


def _polar(device: torch.device, dtype: torch.dtype) -> Tensor:
    a = _tall(device, dtype)
    return _with_gradient(a, ops.polar(a))


def _extend_basis(device: torch.device, dtype: torch.dtype) -> Tensor:
    a = _tall(device, dtype)
    extension = ops.extend_basis(ops.qr(_tall(device, dtype, 40).detach()).q, a)
    return _with_gradient(a, extension.q, extension.coefficients, extension.r)


def _prefix(device: torch.device, dtype: torch.dtype) -> Tensor:
    q, k, v = (_normal((2, 3, rows, 16), 20 + i, device, dtype).requires_grad_() for i, rows in enumerate((9, 37, 37)))
    prefix = [_normal((1, 3, 7, 16), 30 + i, device, dtype).requires_grad_() for i in range(2)]
    out, _ = torch.ops.cl_kernels.prefix_attention(q, k, v, *prefix, 0.25)
    grads = torch.autograd.grad((out * torch.linspace(-1, 1, 16).to(out)).sum(), (q, k, v, *prefix))
    return torch.cat([t.detach().flatten() for t in (out, *grads)])


def _heads(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, s, t = (_normal((7, 300), 40 + i, device, dtype) for i in range(3))
    return z.requires_grad_(), s.requires_grad_(), t, torch.arange(20, 27, device=device)


def _distillation(device: torch.device, dtype: torch.dtype) -> Tensor:
    z, s, t, y = _heads(device, dtype)
    loss = ops.distillation_loss(z, s, t, y, classes=slice(11, 290), alpha=0.4)
    return torch.cat([loss.detach().flatten(), *(g.flatten() for g in torch.autograd.grad(loss, (z, s)))])


def _kl(device: torch.device, dtype: torch.dtype) -> Tensor:
    _, s, t, _ = _heads(device, dtype)
    return _with_gradient(s, ops.kl_loss(s, t, temperature=3.0, classes=slice(5, 60)))


def _dkd(device: torch.device, dtype: torch.dtype) -> Tensor:
    _, s, t, y = _heads(device, dtype)
    return _with_gradient(s, ops.dkd_loss(s, t, y))


def _linear_kl(device: torch.device, dtype: torch.dtype) -> Tensor:
    x, w, t, v = (_normal(shape, 50 + i, device, dtype) for i, shape in enumerate(((9, 8), (70, 8), (9, 12), (70, 12))))
    inputs = (x.requires_grad_(), w.requires_grad_())
    loss = ops.linear_kl_loss(*inputs, t, v, temperature=2.0, classes=slice(3, 60), rows_at_once=4)
    return torch.cat([loss.detach().flatten(), *(g.flatten() for g in torch.autograd.grad(loss, inputs))])


def _jsd(device: torch.device, dtype: torch.dtype) -> Tensor:
    _, s, t, _ = _heads(device, dtype)
    return _with_gradient(s, ops.jsd_loss(s, t, beta=0.3, temperature=2.0))


CASES: dict[str, Case] = {
    "update_covariance_": _covariance,
    "update_covariances_": _covariances,
    "update_head_grams_": _head_grams,
    "expand_head_grams": _expand,
    "symmetric_eigh": _eigh,
    "spectral_projector": _spectral,
    "log_odds_filter": _filter,
    "project": _project,
    "projected_adam_step_": _adam,
    "project_to_anchor": _project_to_anchor,
    "ftp_adam_step_": functools.partial(_ftp, adam=True),
    "ftp_sgd_step_": functools.partial(_ftp, adam=False),
    "displacement_products": _displacement_products,
    "rescale_": _rescale,
    "qr": _qr,
    "qr_backward": _qr,
    "polar": _polar,
    "extend_basis": _extend_basis,
    "distillation_loss": _distillation,
    "kl_loss": _kl,
    "dkd_loss": _dkd,
    "jsd_loss": _jsd,
    "linear_kl_loss": _linear_kl,
    "prefix_attention": _prefix,
    "prefix_attention_backward": _prefix,
}
