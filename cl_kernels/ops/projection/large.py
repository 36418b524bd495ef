"""Grouped matrix products for large weights on CUDA: all parameters of one shape and rank in each.

Twelve layers' weights of one shape make one bucket, whose updates lie beside each other in the workspace: a ViT-B has
four buckets, so a step is 2 launches for its elements, 1 for its step counts and 3 (one pass) or 5 (two) a bucket and
side, against 5 a parameter when each is multiplied by itself. Where torch multiplies in TF32, or V is 16-bit, the basis
is applied twice (reference.passes): TF32 then costs nothing in the promise and the products run on tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_kernels.ops.projection.arguments import Step
from cl_kernels.ops.projection.reference import BASIS, DENSE, passes

__all__ = ["Bucket", "buckets"]


@dataclass(slots=True)
class _Group:
    """One side of a bucket: its matrices [n, d, r] and the memory that its products fill."""

    matrices: list[Tensor]
    form: int
    passes: int
    left: bool
    numbers: list[tuple[float, float]]  # identity and span of each parameter; empty where they live on the device
    uniform: tuple[float, float] | None  # the same where all are equal
    stack: Tensor
    product: Tensor
    rest: Tensor | None

    def apply(self, x: Tensor, scales: Tensor | None) -> None:
        """x <- P x or x P for x [n, m, d] (or [batch, m, d] of one parameter), in place."""
        if self.stack is not self.matrices[0]:
            torch._foreach_copy_(list(self.stack.unbind()), self.matrices)
        v = (self.stack if self.stack.ndim == 3 else self.stack[None]).expand(x.shape[0], -1, -1)
        if self.form == DENSE:
            torch.bmm(v, x, out=self.product) if self.left else torch.bmm(x, v, out=self.product)
            x.copy_(self.product)
        elif self.uniform is not None:
            self._uniform(x, v, *self.uniform)
        else:
            self._scaled(x, v, scales)

    def _product(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of V V^T x, or of x V V^T."""
        inner = torch.bmm(v.mT, x, out=self.product) if self.left else torch.bmm(x, v, out=self.product)
        return (v, inner) if self.left else (inner, v.mT)

    def _uniform(self, x: Tensor, v: Tensor, identity: float, span: float) -> None:
        """Scales that all parameters share ride on the products."""
        if self.rest is None:  # one pass, or P = span (I - V V^T)^2
            for turn in range(self.passes):
                last = turn == self.passes - 1
                x.baddbmm_(*self._product(x, v), beta=identity if last else 1.0, alpha=-span if last else -1.0)
            return
        rest = self._rest(x, v)
        x.mul_(identity - span).add_(rest, alpha=span)

    def _scaled(self, x: Tensor, v: Tensor, scales: Tensor | None) -> None:
        """A pair of scales for each parameter: numbers on the host, or on the device."""
        if scales is None:
            parts = list(x.unbind())
            identity, span = [list(z) for z in zip(*self.numbers, strict=True)]
            if self.rest is None:
                a, b = self._product(x, v)
                torch._foreach_mul_(list(self.product.unbind()), span)
                torch._foreach_mul_(parts, identity)
                x.baddbmm_(a, b, alpha=-1)
            else:
                torch._foreach_mul_(list(self._rest(x, v).unbind()), span)
                torch._foreach_mul_(parts, [p - q for p, q in self.numbers])
                x.add_(self.rest)
            return
        columns = scales.to(x.dtype).view(-1, 4)[:, 0 if self.left else 2 :]
        one, other = columns[:, 0, None, None], columns[:, 1, None, None]
        if self.rest is None:
            a, b = self._product(x, v)
            self.product.mul_(other)
            x.mul_(one)
            x.baddbmm_(a, b, alpha=-1)
        else:
            rest = self._rest(x, v).mul_(other)
            x.mul_(one - other).add_(rest)

    def _rest(self, x: Tensor, v: Tensor) -> Tensor:
        """(I - V V^T)^2 x: the second pass works on what the first has left, so that its own rounding is small too."""
        rest = torch.empty_like(x) if self.rest is None else self.rest
        torch.baddbmm(x, *self._product(x, v), alpha=-1, out=rest)
        return rest.baddbmm_(*self._product(rest, v), alpha=-1)


@dataclass(slots=True)
class Bucket:
    """Large parameters of one shape with sides of one kind."""

    at: slice  # which of the call's parameters
    updates: Tensor  # [n, batch m, d], or [batch, m, d] of one parameter
    groups: list[_Group]  # right first

    def project(self, scales: Tensor | None) -> None:
        """Project the updates in the workspace; `scales` [parameters of the call, 4] where they are on the device."""
        for group in self.groups:
            group.apply(self.updates, None if scales is None else scales[self.at])


def buckets(s: Step, which: Sequence[int], shapes: Sequence[tuple[int, int, int]], workspace: Tensor) -> list[Bucket]:
    """The buckets of a call whose equal parameters stand beside each other, with all the memory they need."""
    found: list[Bucket] = []
    start = first = 0
    keys = [_key(s, i, shape) for i, shape in zip(which, shapes, strict=True)]
    for end in range(1, len(which) + 1):
        if end < len(which) and keys[end] == keys[first] and keys[first] is not None:
            continue
        batch, rows, columns = shapes[first]
        n = end - first
        size = n * batch * rows * columns
        x = workspace[start : start + size]
        x = x.view(batch, rows, columns) if n == 1 else x.view(n, rows, columns)
        members = which[first:end]
        groups = [_group(s, members, x, left=left) for left in (False, True)]
        if size:
            found.append(Bucket(slice(first, end), x, [group for group in groups if group is not None]))
        start, first = start + size, end
    return found


def _key(s: Step, i: int, shape: tuple[int, int, int]) -> tuple[object, ...] | None:
    """What parameters of one bucket share; None stands alone (a batch of matrices under one projector)."""
    if shape[0] != 1:
        return None
    sides = [None if m is None else (m.shape, m.stride(), m.dtype) for m in (s.left[i], s.right[i])]
    return (shape, *sides, *s.forms[2 * i : 2 * i + 2])


def _group(s: Step, members: Sequence[int], x: Tensor, *, left: bool) -> _Group | None:
    side, offset = (s.left, 0) if left else (s.right, 1)
    first = side[members[0]]
    if first is None:
        return None
    form = s.forms[2 * members[0] + offset]
    numbers = [] if s.device_scales is not None else [(s.scales[k], s.scales[k + 1]) for k in _at(members, left)]
    uniform = numbers[0] if len(set(numbers)) == 1 else None
    if form == BASIS and first.shape[-1] == 0 and uniform is not None and uniform[0] == 1.0:
        return None
    (n, m, d), (size, r) = x.shape, first.shape
    turns = passes(first) if form == BASIS else 1
    stack = first
    if len(members) > 1 or first.dtype != x.dtype:  # laid out as the matrices are, so that one launch copies them all
        wide = first.stride(0) == 1 and first.stride(1) != 1
        stack = x.new_empty((len(members), r, size) if wide else (len(members), size, r))
        stack = stack.mT if wide else stack
    rest = torch.empty_like(x) if turns > 1 and (uniform is None or uniform[0] != uniform[1]) else None
    product = x.new_empty((n, r, d) if left else (n, m, r))
    matrices = [matrix for i in members if (matrix := side[i]) is not None]
    return _Group(matrices, form, turns, left, numbers, uniform, stack, product, rest)


def _at(members: Sequence[int], left: bool) -> list[int]:
    return [4 * i + (0 if left else 2) for i in members]
