"""Projection: `P_left U P_right` of an update, and the Adam step whose update is projected before it is applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops import _checks
from cl_kernels.ops._projector import Projector
from cl_kernels.ops._registry import define, register_autograd
from cl_kernels.ops.projection import autograd, cuda, native, reference
from cl_kernels.ops.projection.reference import BASIS, DENSE, NONE, matrix_shape

__all__ = [
    "BASIS",
    "DENSE",
    "NONE",
    "Side",
    "matrix_shape",
    "project",
    "project_sides",
    "projected_adam_step_",
    "side_of",
    "step_",
]

# One side of one parameter as the operation takes it: matrix (basis or dense P) or None, form, identity, span.
Side = tuple[Tensor | None, int, float | Tensor, float | Tensor]
_ABSENT: Side = (None, NONE, 1.0, 0.0)

_project = define(
    "project",
    "(Tensor update, Tensor? left, Tensor? left_identity, Tensor? left_span, int left_form,"
    " Tensor? right, Tensor? right_identity, Tensor? right_span, int right_form) -> Tensor",
    reference=reference.project,
    fake=lambda update, *_: torch.empty_like(update, memory_format=torch.contiguous_format),
)
register_autograd("project", autograd.backward, autograd.setup_context)

_step = define(
    "projected_adam_step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor?[] left, Tensor?[] right, int[] forms, float[] scales,"
    " Tensor? device_scales, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay,"
    " bool decoupled_weight_decay, bool project_decay, bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()",
    reference=reference.projected_adam_step_,
    fake=lambda *_: None,
    native_cpu=native.step_cpu,
    native_cuda=cuda.step_cuda,
)


def project(update: Tensor, left: Projector | None = None, right: Projector | None = None) -> Tensor:
    """The projected update `P_left U P_right`, as a fresh tensor.

    `update` is [..., m, d] of any floating dtype (16-bit is computed in float32), `left` acts on m, `right` on d, None
    `update` is [..., m, d] of any floating dtype (16-bit is computed in float32), `left` acts on m, `right` on d, None
    leaves that side alone; batch dimensions broadcast. A 16-bit basis, and any on CUDA where torch multiplies in TF32,
    is applied twice, P = (identity - span) I + span (I - V V^T)^2, because one pass leaks there. Differentiable, twice,
    in the update, the bases and tensor scales. Raises `ValueError` where sizes differ, `RuntimeError` where devices do.
    Plain matrix products: 4 m d r operations a side and pass in the basis form, 2 m d^2 in the dense form. Source:
    NSP2, Alg. 2; GPM, Eq. 6.
    """
    _checks.floating("update", update)
    _checks.matrix("update", update)
    sides = (side_of("left", left), side_of("right", right))
    for name, (matrix, *_), size in zip(("left", "right"), sides, update.shape[-2:], strict=True):
        if matrix is not None:
            _fits(name, matrix, size, "update", update)
    return project_sides(update, sides)


def projected_adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    left: Sequence[Projector | None],
    right: Sequence[Projector | None],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    project_decay: bool = True,
) -> None:
    """One Adam step of many parameters, each update projected before it is added: p <- p + P_left u P_right.

    u is the complete Adam update, `-lr` and decoupled weight decay included; moments see the raw gradient, as they
    must: projecting gradients instead leaks a third of the step. `project_decay=False` applies decoupled decay
    unprojected. Writes params, exp_avgs, exp_avg_sqs, steps (0-d, counted up) and max_exp_avg_sqs (amsgrad).

    Each parameter is [..., m, d] of any floating dtype, its gradient alike, its moments of its shape; a weight
    [out, c, kh, kw] may have a right projector of size c kh kw. `lr` is a number or a 0-d tensor. `grad_scale` divides
    the gradients; where `found_inf` is not 0 nothing is written, decided on the device. A 16-bit basis is applied twice
    (see `project`). Raises `ValueError` for shapes, dtypes and expanded or overlapping outputs, `RuntimeError` for
    devices; all checks and all allocations come before the first write.

    Cost: one pass over p, g, m, v and 4 m d r operations a side and pass. Source: NSP2 6 and Alg. 2; Adam-NSCL.
    """
    largest = [] if max_exp_avg_sqs is None else list(max_exp_avg_sqs)
    named: dict[str, Sequence[Any]] = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    named |= {"left": left, "right": right} | ({} if max_exp_avg_sqs is None else {"max_exp_avg_sqs": largest})
    for name, values in named.items():
        if len(values) != len(params):
            raise ValueError(f"{name}: expected {len(params)} entries, one for each parameter, got {len(values)}")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        _checks.number(name, value, 0.0, 1.0, closed=False)
    _checks.number("eps", eps, 0.0)
    _checks.number("weight_decay", weight_decay, 0.0)
    for name, given in (("lr", lr), ("grad_scale", grad_scale), ("found_inf", found_inf)):
        if isinstance(given, Tensor) and given.numel() != 1:
            raise ValueError(f"{name}: expected one number, got shape {tuple(given.shape)}")
    sides: list[tuple[Side, Side]] = []
    for i, param in enumerate(params):
        pair = (side_of(f"left[{i}]", left[i]), side_of(f"right[{i}]", right[i]))
        state = [exp_avgs[i], exp_avg_sqs[i], *largest[i : i + 1]]
        _check_entry(i, param, grads[i], state, steps[i], *pair)
        sides.append(pair)
    step_(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), sides,
        lr=lr, max_exp_avg_sqs=largest, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay, maximize=maximize, grad_scale=grad_scale, found_inf=found_inf,
        project_decay=project_decay,
    )  # fmt: skip


def step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    sides: Sequence[tuple[Side, Side]],
    *,
    lr: float | Tensor,
    max_exp_avg_sqs: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    project_decay: bool,
) -> None:
    """`projected_adam_step_` for a caller that has checked its lists and keeps its sides: the optimizers."""
    if not params:
        return
    forms = [side[1] for pair in sides for side in pair]
    scales = [scale for pair in sides for side in pair for scale in side[2:]]
    device_scales = None
    if any(issubclass(kind, Tensor) for kind in set(map(type, scales))):
        device = params[0].device
        device_scales = torch.stack([torch.as_tensor(s, dtype=torch.float64, device=device) for s in scales]).view(
            -1, 4
        )
        scales = []
    tensor_lr = lr if isinstance(lr, Tensor) else None
    with torch.no_grad():
        _step(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, [a[0] for a, _ in sides],
            [b[0] for _, b in sides], forms, scales, device_scales, 0.0 if tensor_lr is not None else lr, tensor_lr,
            beta1, beta2, eps, weight_decay, decoupled_weight_decay, project_decay, maximize, grad_scale, found_inf,
        )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps, *max_exp_avg_sqs])


def project_sides(update: Tensor, sides: tuple[Side, Side]) -> Tensor:
    """`project` of an update of any shape that the step accepts, for a caller that keeps its sides."""
    shape = matrix_shape(update.shape, *(None if matrix is None else matrix.shape[-2] for matrix, *_ in sides))
    if shape is None:
        raise ValueError(f"update: its projectors do not fit shape {tuple(update.shape)}")
    x = update if update.ndim > 1 and shape[1:] == tuple(update.shape[-2:]) else update.reshape(shape)
    args: list[Any] = []
    for matrix, form, identity, span in sides:
        scales = (None, None) if form != BASIS else (_scale(identity), _scale(span))
        args += [matrix, *scales, form]
    result: Tensor = _project(x, *args)
    return result.reshape(update.shape)


def side_of(name: str, projector: Projector | None) -> Side:
    """One side of one parameter as the operation takes it. A batch of scales turns into a batch of dense projectors."""
    if projector is None:
        return _ABSENT
    if not isinstance(projector, Projector):
        raise TypeError(f"{name}: expected a Projector or None, got {type(projector).__name__}")
    if projector.dense is not None:
        return projector.dense, DENSE, 0.0, 0.0
    identity, span = projector.identity, projector.span
    if any(isinstance(s, Tensor) and s.ndim for s in (identity, span)):
        return projector.matrix(), DENSE, 0.0, 0.0
    return projector.basis, BASIS, identity, span


def _scale(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _fits(name: str, matrix: Tensor, size: int, other: str, update: Tensor) -> None:
    _checks.floating(name, matrix)
    _checks.same_device(name, matrix, other, update)
    if matrix.ndim < 2 or matrix.shape[-2] != size:
        raise ValueError(f"{name}: a projector of size {matrix.shape[-2]} cannot act on {other} {tuple(update.shape)}")


def _check_entry(
    i: int, param: Tensor, grad: Tensor, state: list[Tensor], step: Tensor, left: Side, right: Side
) -> None:
    name = f"params[{i}]"
    _checks.floating(name, param)
    _checks.floating(f"grads[{i}]", grad)
    _checks.floating(f"steps[{i}]", step)
    if step.numel() != 1:
        raise ValueError(f"steps[{i}]: expected one number, got shape {tuple(step.shape)}")
    for value in (grad, *state):
        if value.shape != param.shape:
            raise ValueError(f"{name}: shape {tuple(param.shape)}, but its gradient or moment has {tuple(value.shape)}")
        _checks.same_device(name, param, "its gradient or moment", value)
    for value in (param, *state):
        _checks.no_overlap(name, value)
    for side, matrix in (("left", left[0]), ("right", right[0])):
        if matrix is not None:
            _checks.same_device(f"{side}[{i}]", matrix, name, param)
    sizes = [None if matrix is None else matrix.shape[-2] for matrix in (left[0], right[0])]
    shape = matrix_shape(param.shape, *sizes)
    if shape is None or not all(_fits_batch(param, shape, matrix) for matrix in (left[0], right[0])):
        raise ValueError(
            f"{name}: projectors of sizes {sizes[0]} (left) and {sizes[1]} (right) do not fit {tuple(param.shape)}"
        )


def _fits_batch(param: Tensor, shape: tuple[int, int, int], matrix: Tensor | None) -> bool:
    """Whether a batch of projectors broadcasts to the parameter's leading dimensions."""
    if matrix is None:
        return True
    batch, lead = matrix.shape[:-2], param.shape[:-2] if shape[1:] == tuple(param.shape[-2:]) else ()
    return len(batch) <= len(lead) and all(a in (1, b) for a, b in zip(reversed(batch), reversed(lead), strict=False))
