"""Weight projection: what keeps fine-tuned weights near their pre-trained ones, the anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_kernels.ops import _checks
from cl_kernels.ops._registry import define, register_autograd
from cl_kernels.ops.weight_projection import autograd, checks, native_rows, reference
from cl_kernels.ops.weight_projection.arguments import present
from cl_kernels.ops.weight_projection.reference import (
    DOT,
    FIRED,
    FIRST,
    FLOORED,
    GAMMA,
    GRADIENT,
    GRADIENT_SQUARES,
    L1,
    LARGEST,
    LARGEST_ROW,
    NORMS,
    PROJECTED,
    SECOND,
    SQUARES,
)
from cl_kernels.ops.weight_projection.steps import ftp_adam_, ftp_adam_step_, ftp_sgd_, ftp_sgd_step_, rule_of

__all__ = [
    "DOT",
    "FIRED",
    "FIRST",
    "FLOORED",
    "GAMMA",
    "GRADIENT",
    "GRADIENT_SQUARES",
    "L1",
    "LARGEST",
    "LARGEST_ROW",
    "NORMS",
    "PROJECTED",
    "SECOND",
    "SQUARES",
    "displacement_products",
    "ftp_adam_",
    "ftp_adam_step_",
    "ftp_sgd_",
    "ftp_sgd_step_",
    "project_to_anchor",
    "rescale_",
    "rule_of",
]

_project = define(
    "project_to_anchor",
    "(Tensor weight, Tensor? anchor, Tensor radius, int norm) -> Tensor",
    reference=reference.project_to_anchor,
    fake=lambda weight, *_: torch.empty_like(weight, memory_format=torch.contiguous_format),
    native_cpu=native_rows.project_to_anchor_cpu,
)
register_autograd("project_to_anchor", autograd.backward, autograd.setup_context)

_products = define(
    "displacement_products",
    "(Tensor[] grads, Tensor[] params, Tensor[] anchors) -> Tensor",
    reference=reference.displacement_products,
    fake=lambda grads, params, anchors: params[0].new_empty((len(params), 5), dtype=torch.float64),
    native_cpu=native_rows.displacement_products_cpu,
)
_rescale = define(
    "rescale_",
    "(Tensor(a!)[] params, Tensor[] anchors, Tensor[] scales, int norm) -> ()",
    reference=reference.rescale_,
    fake=lambda *_: None,
    native_cpu=native_rows.rescale_cpu,
)


def project_to_anchor(weight: Tensor, anchor: Tensor | None, radius: float | Tensor, *, norm: str = "row_l1") -> Tensor:
    """The weight with each row's distance to the anchor cut to a radius, as a fresh tensor.

    y_i = a_i + min(radius_i / n_i, 1) c_i,  c = weight - anchor,  n_i = ||c_i|| + 1e-8: scaled radially, not to the
    nearest point of the L1 ball. Rows are the first dimension's entries (a vector is one row), or with `norm="l2"` the
    whole tensor. `weight` has any floating dtype (16-bit is computed in float32); `anchor` its shape, or None for zero;
    `radius` is a number, a 0-d tensor, or one for each row [R]. Rows within the radius are returned bit for bit.
    Differentiable, twice, in weight, anchor and radius; the radius of a row inside has gradient 0.
    Raises `ValueError` for shapes, dtypes and norms, `RuntimeError` for devices. One pass: 12 bytes an element.
    Source: Gouk et al. 2021 (MARS); TPGM and FTP, Tian et al. 2023.
    """
    code = checks.norm_code(norm)
    _checks.floating("weight", weight)
    checks.anchor("anchor", anchor, "weight", weight)
    if not isinstance(radius, Tensor):
        radius = torch.tensor(_checks.number("radius", radius, 0.0), dtype=torch.float64, device=weight.device)
    _checks.floating("radius", radius)
    _checks.same_device("radius", radius, "weight", weight)
    _fits_rows("radius", radius, "weight", weight, code)
    result: Tensor = _project(weight, anchor, radius, code)
    return result


def displacement_products(
    grads: Sequence[Tensor] | None, params: Sequence[Tensor], anchors: Sequence[Tensor | None]
) -> Tensor:
    """What policies ask of a displacement d = W - W_0, one row for each parameter: float64 [L, 5] on its device.

    Columns DOT <G,d>, L1 |d|_1, SQUARES |d|_2^2, LARGEST_ROW max_i |d_i|_1 (the MARS norm), GRADIENT_SQUARES |G|_2^2;
    the first and the last are 0 where `grads` is None. Sums are float32 within rows, float64 across, in a fixed order.
    Raises `ValueError` for shapes and dtypes, `RuntimeError` for devices. One pass: 12 bytes an element. Not
    differentiable. Source: SPD, Tian et al. 2024 (<G,d>, |d|_2); DiGraP, Huang et al. 2025.
    """
    checks.lengths(len(params), grads=grads, anchors=anchors)
    _pairs(params, anchors, grads)
    if not params:
        return torch.empty(0, 5, dtype=torch.float64)
    with torch.no_grad():
        result: Tensor = _products(list(grads or []), list(params), present(params, anchors))
    return result


def rescale_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    scales: Sequence[float | Tensor],
    *,
    norm: str = "row_l1",
) -> None:
    """W <- W_0 + s (W - W_0) in place: s = 1 leaves a row bit for bit, s = 0 gives the anchor exactly.

    `scales[i]` is a number, a 0-d tensor, or one for each row of parameter i ([R]; rows as in `project_to_anchor`),
    read on the device. Raises `ValueError` for shapes, dtypes and overlapping parameters, `RuntimeError` for devices,
    and then changes nothing. Cost: 12 bytes an element. Source: WiSE-FT, Wortsman et al. 2022 (s = alpha); SPD, Tian et
    al. 2024 (s = 1 - lambda r).
    """
    code = checks.norm_code(norm)
    checks.lengths(len(params), anchors=anchors, scales=scales)
    _pairs(params, anchors, None)
    made: list[Tensor] = []
    for i, (param, scale) in enumerate(zip(params, scales, strict=True)):
        _checks.no_overlap(f"params[{i}]", param)
        if not isinstance(scale, Tensor):
            scale = torch.tensor(_checks.number(f"scales[{i}]", scale), dtype=torch.float64, device=param.device)
        _checks.floating(f"scales[{i}]", scale)
        _checks.same_device(f"scales[{i}]", scale, f"params[{i}]", param)
        _fits_rows(f"scales[{i}]", scale, f"params[{i}]", param, code)
        made.append(scale)
    if not params:
        return
    with torch.no_grad():
        _rescale(list(params), present(params, anchors), made, code)
    torch.autograd.graph.increment_version(list(params))


def _pairs(params: Sequence[Tensor], anchors: Sequence[Tensor | None], grads: Sequence[Tensor] | None) -> None:
    for i, param in enumerate(params):
        _checks.floating(f"params[{i}]", param)
        _checks.same_device(f"params[{i}]", param, "params[0]", params[0])
        checks.anchor(f"anchors[{i}]", anchors[i], f"params[{i}]", param)
        if grads is not None:
            _checks.floating(f"grads[{i}]", grads[i])
            _checks.same_device(f"grads[{i}]", grads[i], f"params[{i}]", param)
            if grads[i].shape != param.shape:
                raise ValueError(f"grads[{i}]: shape {tuple(grads[i].shape)}, but params[{i}] has {tuple(param.shape)}")


def _fits_rows(name: str, value: Tensor, other: str, param: Tensor, norm: int) -> None:
    rows = 1 if norm == NORMS["l2"] or param.ndim < 2 else param.shape[0]
    if value.ndim and tuple(value.shape) != (rows,):
        raise ValueError(
            f"{name}: expected one number, or one for each of the {rows} rows of {other} {tuple(param.shape)}, "
            f"got shape {tuple(value.shape)}"
        )
