"""Eigendecompositions shared among processes: one owner a matrix, and errors that reach everyone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cl_kernels.errors import NonFiniteError, SolverError, SubspaceError, SubspaceMismatchError

__all__ = ["Solved", "owners", "solved_by_owners"]

# What an owner may fail with, by its number in the status; anything else arrives as a RuntimeError that names it.
_ERRORS: tuple[type[Exception], ...] = (SolverError, NonFiniteError, SubspaceMismatchError, SubspaceError, ValueError)
_FIELDS = 6  # error, message length, protected, dead, energy, condition


class Solved(NamedTuple):
    """The thinner of the protected and the free basis [d, k] of one matrix, and what is known of its spectrum."""

    basis: Tensor
    protected: int
    dead: bool
    energy: float
    condition: float


def owners(dimensions: Sequence[int], processes: int) -> list[int]:
    """The process that solves each matrix: largest first, each to the one with the least d^3 so far."""
    load = [0] * processes
    chosen = [0] * len(dimensions)
    for index in sorted(range(len(dimensions)), key=lambda i: -dimensions[i]):
        chosen[index] = load.index(min(load))
        load[chosen[index]] += dimensions[index] ** 3
    return chosen


def solved_by_owners(
    matrices: Sequence[Tensor], dtype: torch.dtype | None, solve: Callable[[int], Solved], group: dist.ProcessGroup
) -> list[Solved]:
    """`solve(index)` for every matrix, each on one process of `group`, on every process: bases travel, not matrices.

    One all-reduce tells everyone how every owner fared before anything else is sent, so that a failure raises the same
    error, with the owner's message, on every process and leaves none waiting.
    """
    if not matrices:
        return []
    chosen = owners([len(matrix) for matrix in matrices], dist.get_world_size(group))
    mine, failure = _solve_mine([i for i, owner in enumerate(chosen) if owner == dist.get_rank(group)], solve)
    status = torch.zeros(len(matrices), _FIELDS, dtype=torch.float64)
    for index, one in mine.items():
        status[index, 2:] = torch.tensor([one.protected, one.dead, one.energy, one.condition], dtype=torch.float64)
    if failure is not None:
        status[failure.which, :2] = torch.tensor([failure.kind, len(failure.message)], dtype=torch.float64)
    status = status.to(matrices[0].device)
    dist.all_reduce(status, group=group)
    known = status.tolist()
    for index, fields in enumerate(known):
        if fields[0]:
            _raise(failure, fields, chosen[index], matrices[0].device, group)
    return _exchanged(matrices, dtype, mine, known, chosen, group)


class _Failure(NamedTuple):
    which: int
    kind: int
    message: bytes
    error: Exception


def _solve_mine(indices: list[int], solve: Callable[[int], Solved]) -> tuple[dict[int, Solved], _Failure | None]:
    mine: dict[int, Solved] = {}
    for index in indices:
        try:
            mine[index] = solve(index)
        except Exception as error:  # whatever it is, the others must hear of it instead of waiting for a basis
            kind = next((i for i, known in enumerate(_ERRORS) if type(error) is known), len(_ERRORS))
            text = str(error) if kind < len(_ERRORS) else f"{type(error).__name__}: {error}"
            return mine, _Failure(index, kind + 1, text.encode(), error)
    return mine, None


def _raise(
    failure: _Failure | None, fields: list[float], owner: int, device: torch.device, group: dist.ProcessGroup
) -> None:
    own = dist.get_rank(group) == owner
    message = torch.zeros(int(fields[1]), dtype=torch.uint8)
    if own and failure is not None:
        message = torch.frombuffer(bytearray(failure.message), dtype=torch.uint8)
    message = message.to(device)
    dist.broadcast(message, group=group, group_src=owner)
    text = bytes(message.tolist()).decode()
    kind = (*_ERRORS, RuntimeError)[int(fields[0]) - 1]
    raise kind(text) from (failure.error if own and failure is not None else None)


def _exchanged(
    matrices: Sequence[Tensor],
    dtype: torch.dtype | None,
    mine: dict[int, Solved],
    known: list[list[float]],
    chosen: list[int],
    group: dist.ProcessGroup,
) -> list[Solved]:
    solved, under_way = [], []
    for index, matrix in enumerate(matrices):
        protected, dead, energy, condition = known[index][2:]
        columns = min(int(protected), len(matrix) - int(protected))
        basis = matrix.new_empty(len(matrix), columns, dtype=dtype)
        if index in mine:
            basis.copy_(mine[index].basis)
        if columns:
            under_way.append(dist.broadcast(basis, group=group, group_src=chosen[index], async_op=True))
        solved.append(Solved(basis, int(protected), bool(dead), energy, condition))
    for work in under_way:
        if work is not None:
            work.wait()
    return solved
