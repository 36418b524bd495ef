"""What an arm costs: parameters, bytes for many tasks, time, memory, operations; all measured on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.compare.arms import Arm
from cl_kernels.compare.session import Session
from cl_kernels.compare.trial import train_trial
from cl_kernels.continual import Deployed
from cl_kernels.continual.latency import CALLS, WARM_UP, latency

__all__ = ["measure", "multiply_adds", "task_bytes"]

BATCH = 32  # images of a timed step and of the throughput


def measure(
    session: Session, arm: Arm, options: Mapping[str, Any], model: Deployed, records: Sequence[Mapping[str, Any]],
    future_tasks: int,
) -> dict[str, Any]:  # fmt: skip
    """The entry of results["cost"] of one arm.

    `records` are its runs at the largest size; `model` is one of them. A step of training is the median of 20 after 3
    that are not counted, of `BATCH` images; so are the latency of one image and the throughput of a batch."""
    images = session.test_images()[:BATCH].to(session.device)
    rows = session.rows(min(BATCH, session.size), 0)
    inputs = session.features(rows) if arm.frozen_features else session.images(rows)
    steps = train_trial(
        arm, dict(options), session.backbone.model, inputs, session.labels[rows], classes=session.classes,
        epochs=WARM_UP + CALLS, batch_size=BATCH, seed=0,
    )  # fmt: skip
    method = model.method
    with torch.no_grad():
        seconds = latency(method.predict, images)
        macs = multiply_adds(method.predict, images[:1])
    stored = int(records[0]["stored_bytes"])
    backbone = _bytes(session.backbone.model)
    return {
        "arm": arm.name,
        "trainable_parameters": int(records[0]["trainable_parameters"]),
        "stored_bytes": stored,
        "backbone_bytes": backbone,
        "seconds_per_epoch": _median(records, "epoch"),
        "seconds_to_best": _median(records, "to_best"),
        "step_ms": 1000 * steps.seconds["epoch"],
        "step_images": len(rows),
        "peak_bytes": int(max(record["peak_bytes"] for record in records)),
        "latency_ms": 1000 * seconds["one"],
        "images_per_second": len(images) / seconds["batch"],
        "macs": macs,
        "task_bytes": task_bytes(stored, backbone, [1, 2, 5, 20, future_tasks]),
    }


def task_bytes(stored: int, backbone: int, tasks: Sequence[int]) -> dict[str, int]:
    """Bytes of models for so many tasks: what trains is stored for each, and the backbone once if it is not part of it.

    An arm that stores at least as much as the backbone holds has trained all of it, and needs no other copy."""
    shared = 0 if stored >= backbone else backbone
    return {str(count): shared + count * stored for count in sorted(set(tasks))}


def multiply_adds(predict: Any, images: Tensor) -> int:
    """Multiply-accumulates of one call, the products of matrices and convolutions, by torch's counter.

    torch counts two operations for one; prompts as a prefix of the attention are this package's own operation, and so
    counted here."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where it is installed

    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_custom()) as counter:
        predict(images)
    return int(counter.get_total_flops()) // 2


def _custom() -> dict[Any, Any]:
    def attention(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
        batch, heads, rows, width = query
        return int(4 * batch * heads * rows * key[-2] * width)

    def prefixed(
        query: Sequence[int], key: Sequence[int], _value: Any, prefix: Sequence[int], *_: Any, **__: Any
    ) -> int:
        batch, heads, rows, width = query
        return int(4 * batch * heads * rows * (key[-2] + prefix[-2]) * width)

    found: dict[Any, Any] = {}
    plain = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if plain is not None:
        found[plain] = attention
    ours = getattr(torch.ops.cl_kernels, "prefix_attention", None)
    if ours is not None:
        found[ours] = prefixed
    return found


def _bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters())


def _median(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [float(record["seconds"][name]) for record in records if record["seconds"].get(name) is not None]
    return statistics.median(values) if values else None
