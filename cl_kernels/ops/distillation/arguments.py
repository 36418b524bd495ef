"""Arguments of the losses: checked before anything is computed; what a batch holds, only once its loss is not finite.

Looking at values would wait for a GPU. So the kernels let a wrong value make the loss NaN, and `complain`, which runs
on the CPU alone, says which argument it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from cl_kernels.errors import NonFiniteError
from cl_kernels.ops import _checks

__all__ = [
    "BATCHMEAN",
    "NONE",
    "SUM",
    "complain",
    "constant",
    "kept_rows",
    "logits_pair",
    "positive",
    "reduced",
    "reduction_code",
    "row_scale",
    "scaled",
    "slice_of",
    "targets",
    "work_dtype",
]

NONE, SUM, BATCHMEAN = 0, 1, 2
_REDUCTIONS: Final = {"none": NONE, "sum": SUM, "batchmean": BATCHMEAN}


def logits_pair(student_name: str, student: Any, teacher_name: str, teacher: Any) -> None:
    """Both [B, C] of the same sizes on one device, in any float dtype; the teacher is not being trained."""
    for name, value in ((student_name, student), (teacher_name, teacher)):
        _checks.floating(name, value, torch.float32, torch.float64, torch.float16, torch.bfloat16)
        if value.ndim != 2:
            raise ValueError(f"{name}: expected shape [B, C], got {tuple(value.shape)}")
    if student.shape != teacher.shape:
        wrong = "classes" if student.shape[1] != teacher.shape[1] else "rows"
        raise ValueError(
            f"{teacher_name}: expected as many {wrong} as {student_name} {tuple(student.shape)}, "
            f"got {tuple(teacher.shape)}"
        )
    _checks.same_device(student_name, student, teacher_name, teacher)


def constant(name: str, teacher: Tensor) -> None:
    """No gradient would flow into a teacher."""
    if teacher.requires_grad:
        raise ValueError(
            f"{name}: expected a teacher that is not being trained, got a tensor that requires a gradient; "
            "run it under `torch.no_grad()` or pass `.detach()`"
        )


def targets(target: Any, rows: int, logits_name: str, logits: Tensor) -> Tensor:
    """Class indices [B] as int64."""
    checked = _checks.tensor("target", target)
    if checked.is_floating_point() or checked.is_complex() or checked.dtype == torch.bool:
        raise ValueError(f"target: expected class indices (torch.int64), got {checked.dtype}")
    _checks.vector("target", checked, rows)
    _checks.same_device("target", checked, logits_name, logits)
    return checked.long()


def slice_of(classes: slice | None, columns: int, least: int = 1) -> tuple[int, int]:
    """The first column of the slice and the one after its last, -1 for all of them."""
    if classes is not None and not isinstance(classes, slice):
        raise TypeError(f"classes: expected a slice or None, got {type(classes).__name__}")
    start, stop = (0, columns) if classes is None else (classes.start, classes.stop)
    start, stop = 0 if start is None else start, columns if stop is None else stop
    for bound in (start, stop):
        if not isinstance(bound, (int, torch.SymInt)):
            raise TypeError(f"classes: expected whole numbers, got {classes}")
    start, stop = start + columns if start < 0 else start, stop + columns if stop < 0 else stop
    if classes is not None and classes.step not in (None, 1):
        raise ValueError(f"classes: expected neighbouring classes (step 1), got {classes}")
    if not 0 <= start <= stop <= columns or stop - start < least:
        wanted = "at least one class" if least == 1 else f"at least {least} classes"
        raise ValueError(f"classes: expected {wanted} within 0..{columns}, got {classes}")
    return start, -1 if classes is None else stop


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    _checks.number(name, value if value == value else 0.0)  # the type; NaN is caught below
    if not 0 < value < math.inf:
        raise ValueError(f"Invalid {name} value: {value} (expected 0 < {name} < inf)")
    return float(value)


def reduction_code(reduction: Any) -> int:
    if reduction not in _REDUCTIONS:
        hint = '; "mean" would divide by the classes too, "batchmean" is what is meant' if reduction == "mean" else ""
        raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}{hint}")
    return _REDUCTIONS[reduction]


def kept_rows(target: Tensor, ignored: int | None, reduction: int, dtype: torch.dtype) -> Tensor | None:
    """A weight for each row: 0 where the target is `ignored`, and the mean is over the others."""
    if ignored is None:
        return None
    kept = (target != ignored).to(dtype)
    return kept / kept.sum().clamp_min(1) if reduction == BATCHMEAN else kept


def row_scale(rows: int, reduction: int) -> float:
    """What a row's loss counts; an empty batch has loss 0."""
    return 1.0 / max(rows, 1) if reduction == BATCHMEAN else 1.0


def work_dtype(*logits: Tensor) -> torch.dtype:
    """What the losses are computed in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def scaled(rows: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    """Rows times their weight; what has weight 0 is 0 even where it is NaN."""
    if weight is None:
        return rows * row_scale(len(rows), reduction)
    factors = weight.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
    return torch.where(factors == 0, 0.0, rows * factors)


def reduced(rows: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    """The loss from the losses of rows."""
    values = scaled(rows, weight, reduction)
    return values if reduction == NONE else values.sum()


def complain(
    loss: Tensor,
    logits: Mapping[str, Tensor | None],
    target: Tensor | None,
    weight: Tensor | None,
    first: int,
    last: int,
    *,
    rest: bool = False,
) -> None:
    """On the CPU, for a loss that is not finite: raise for what is wrong in the batch.

    `rest`: a finite column beside the target is needed. A loss may be infinite for a good reason: the student gives no
    probability to what the teacher holds possible.
    """
    if loss.device.type != "cpu" or (math.isfinite(loss.item()) if loss.ndim == 0 else bool(loss.isfinite().all())):
        return
    stop = None if last < 0 else last
    there = torch.ones((), dtype=torch.bool) if weight is None else weight != 0
    parts = {name: value.detach()[:, first:stop] for name, value in logits.items() if value is not None}
    for name, part in parts.items():
        bad = part.isnan() | (part == math.inf)
        if (row := _first(bad.any(1) & there)) is not None:
            raise NonFiniteError(
                f"{name}: {int(bad.sum())} of {part.numel()} logits are NaN or +inf, first in row {row}"
            )
        if (row := _first((part == -math.inf).all(1) & there)) is not None:
            raise NonFiniteError(f"{name}: row {row} is -inf in every class, one must be finite")
    if target is None:
        return
    width = next(iter(parts.values())).shape[1]
    outside = ((target < first) | (target >= first + width)) & there
    if (row := _first(outside)) is not None:
        raise ValueError(
            f"target: expected classes {first} to {first + width - 1}, got {int(target[row])} in row {row} "
            f"({int(outside.sum())} of {len(target)} rows lie outside)"
        )
    if rest:
        index = torch.where(there, target - first, 0)[:, None]
        for name, part in parts.items():
            if (row := _first((part.scatter(1, index, -math.inf) == -math.inf).all(1) & there)) is not None:
                raise NonFiniteError(f"{name}: row {row} is -inf in every class but its target, one must be finite")


def _first(rows: Tensor) -> int | None:
    """The number of the first row that is marked."""
    marked = rows.nonzero()
    return int(marked[0]) if len(marked) else None
