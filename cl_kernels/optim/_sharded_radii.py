"""An FTP step of parameters whose rows lie in several processes.

Base step, row norms and rescaling are local; what the radius learns from adds up over the processes first. One call
carries all tensors' sums, a second the counts of projected rows, so every process has the same radii, bit for bit.
A tensor that is one row (a vector, or the norm "l2") has its <G, d> and its norms added up before any division.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cl_kernels.ops.weight_projection import NORMS, base, reference
from cl_kernels.ops.weight_projection.arguments import SGD, Rule, Step, present
from cl_kernels.optim import _rows, _shards

__all__ = ["step_"]

_SUMS = 5  # of the six numbers of `reference.summed`: all but the largest norm add up


def step_(
    group: dict[str, Any],
    lists: Any,
    numbers: Any,
    rule: tuple[Any, ...],
    scale: Tensor | None,
    found: Tensor | None,
) -> None:
    """The step of `lists` (their `params` are DTensors, all else is local); every process must take part."""
    lr = _shards.local(group["lr"])
    rate, rates = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    slots = present(lists.weights, lists.slots)
    s = Step(
        lists.weights, lists.grads, lists.firsts, lists.seconds, lists.largests, lists.steps, slots, lists.records,
        rate, rates, group["weight_decay"], group["maximize"], scale, found, numbers, Rule(*rule),
    )  # fmt: skip
    step_of = base.sgd if isinstance(numbers, SGD) else base.adam
    made: list[tuple[Tensor, Tensor]] = []
    parts: list[reference.Parts] = []
    for i in range(len(s.params)):
        weight, grad = reference.raised(s, i)
        update, state = step_of(s, i, weight, grad, s.steps[i] + 1)
        made += [*state, (s.steps[i], s.steps[i] + 1)]
        parts.append(reference.measured(s, i, weight, grad, update))

    norm = next(name for name, code in NORMS.items() if code == s.rule.norm)
    single = [_rows.is_one_row(p, norm) for p in lists.params]
    mine = [_of_piece(x) if one else reference.summed(s, i, x) for i, (x, one) in enumerate(zip(parts, single))]
    total = _added(torch.stack(mine), lists.params)
    decisions = []
    for i, one in enumerate(single):
        if one:
            parts[i] = _whole(parts[i], total[i])
        sums = reference.summed(s, i, parts[i]) if one else total[i]
        decisions.append(reference.decided(s, i, sums, s.steps[i] + 1))

    hits = [reference.hit_rows(x, y).sum().double() for x, y in zip(parts, decisions, strict=True)]
    cut = [i for i, one in enumerate(single) if not one]
    if cut:
        counts = _shards.summed(torch.stack([hits[i] for i in cut]), [lists.params[i] for i in cut])
        for i, count in zip(cut, counts, strict=True):
            hits[i] = count
    for i, (x, y) in enumerate(zip(parts, decisions, strict=True)):
        made += reference.settled(s, i, x, y, hits[i])
    reference.write(made, found)


def _of_piece(parts: reference.Parts) -> Tensor:
    """The sums of a piece of a row, as wide as those of `reference.summed`."""
    sums = [x.sum().double() for x in (parts.products, parts.before, parts.after, parts.pushed)]
    return torch.stack([*sums, torch.zeros_like(sums[0]), torch.zeros_like(sums[0])])


def _whole(parts: reference.Parts, sums: Tensor) -> reference.Parts:
    """The parts of a piece with the sums of the whole row."""
    kind = parts.products.dtype
    products, before, after, pushed = (sums[k].to(kind)[None] for k in range(4))
    return parts._replace(products=products, before=before, after=after, pushed=pushed[0])


def _added(values: Tensor, params: Sequence[Tensor]) -> Tensor:
    """`values` [L, 6] of all processes that hold pieces: sums, and the largest of the last column.

    All are gathered and added in the order of the processes, so that both take one call and all end with equal bits.
    """
    values = values.clone()
    for groups, entries in _shards.by_mesh(params):
        part = values[entries]
        for group in groups:
            gathered = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, part, group=group)
            every = torch.stack(gathered)
            part = torch.cat([every[..., :_SUMS].sum(0), every[..., _SUMS:].amax(0)], -1)
        values[entries] = part
    return values
