"""FTP steps to try kernels with: shapes, options, and models half on their anchors and half away from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops import weight_projection as wp

__all__ = ["LONG", "OPTIONS", "SHAPES", "on", "problem", "step", "to_double", "written"]

# A warp a row and a block a row, vectors of four and single elements, one row, one element, none.
SHAPES: list[tuple[int, ...]] = [
    (37, 64), (5, 3, 7, 7), (1000,), (7,), (1, 9, 48), (3, 1024), (3, 1025), (0, 16), (1, 1), (70, 1), (),
]  # fmt: skip
LONG: list[tuple[int, ...]] = [(2, 9000), (3, 20001), (2, 264_196)]  # rows in 2, 3 and 33 parts
OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": "row_l2", "weight_decay": 0.1},
    {"norm": "l2", "masked": True},
    {"kappa": 0.5, "masked": True, "maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": False},
    {"radius_floor": 1e-3, "radius_lr": 0.05},
    {"fixed_radius": 0.03},
]


def problem(
    base: str,
    weight: torch.dtype = torch.float32,
    moment: torch.dtype = torch.float32,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> dict[str, Any]:
    """Half of the tensors are fresh, on their anchors; the others are away from them, some rows near, some far."""
    p: dict[str, Any] = {"params": [], "anchors": [], "radii": [], "grads": []}
    for i, shape in enumerate(shapes):
        anchor = (torch.randn(shape) * 0.05).bfloat16().float()
        far = (
            torch.zeros(shape) if i % 2 else torch.randn(shape) * torch.rand(shape[:1] + (1,) * (len(shape) - 1)) * 1e-3
        )
        p["params"].append((anchor + far).to(weight))
        anchor = anchor.to(weight)
        kinds = [anchor, None if not i % 2 else anchor, anchor.bfloat16() if weight == torch.float32 else anchor]
        p["anchors"].append(kinds[i % 3])
        radius = torch.zeros(8)
        if i % 2 == 0:
            rows = wp.reference.as_rows(far, 0)
            radius[wp.GAMMA] = rows.abs().sum(1).mean() if rows.numel() else 0.0
            radius[wp.FIRST], radius[wp.SECOND] = 0.1, 0.1
        p["radii"].append(radius)
        p["grads"].append(torch.randn(shape).to(weight))
    p["steps"] = [torch.tensor(0.0 if i % 2 else 20.0) for i in range(len(shapes))]
    moments = [(torch.randn(shape) * 0.1).to(moment) for shape in shapes]
    if base == "adam":
        p |= {"exp_avgs": moments, "exp_avg_sqs": [(torch.rand(shape) * 0.1).to(moment) for shape in shapes]}
        return p | {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    p |= {"momentum_buffers": moments, "lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "nesterov": True}
    return p | {"weight_decay": 0.0}


def step(p: dict[str, Any], times: int = 1, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(times):
        (wp.ftp_adam_step_ if "beta1" in p else wp.ftp_sgd_step_)(**p)
        for grad in p["grads"]:
            grad.copy_(torch.randn(grad.shape, generator=generator))


def written(p: dict[str, Any]) -> list[Tensor]:
    keys = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "momentum_buffers", "steps", "radii", "anchors")
    return [t for key in keys for t in p.get(key) or [] if t is not None]


def to_double(p: dict[str, Any]) -> dict[str, Any]:
    """For the exact result; anchors stay 16-bit where they are, so that c is rounded there as it must be."""
    out: dict[str, Any] = {}
    for key, value in p.items():
        if isinstance(value, list):
            wide = [t if t is None or (key == "anchors" and t.dtype == torch.bfloat16) else t.double() for t in value]
            out[key] = [None if t is None else t.clone() for t in wide]
        else:
            out[key] = value
    return out


def on(device: str, p: Any) -> Any:
    if isinstance(p, dict):
        return {key: on(device, value) for key, value in p.items()}
    if isinstance(p, list):
        return [on(device, value) for value in p]
    return p.to(device, copy=True) if isinstance(p, Tensor) else p
