"""The sums of every watched layer: planned, bounded, added to, and read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cl_kernels.subspace import _rows
from cl_kernels.subspace._moments import Moments, Sums
from cl_kernels.subspace._plans import Plan, refuse_large
from cl_kernels.subspace._reduce import all_reduce_sums
from cl_kernels.subspace.prompts import PromptMoments

__all__ = ["Tally", "Weighting"]

Weighting = Literal["rows", "batches"]


class Tally:
    """State by name, made when its first rows come. See `CovarianceCollector` for what the options mean."""

    def __init__(
        self,
        plans: dict[str, Plan],
        *,
        dtype: torch.dtype,
        device: torch.device | None,
        max_bytes: int | None,
        weighting: Weighting,
        token_rate: float,
        row_dtype: torch.dtype | None,
        seed: int,
    ) -> None:
        self.plans = plans
        self.dtype, self.device, self.max_bytes = dtype, device, max_bytes
        self.weighting, self.token_rate, self.row_dtype = weighting, token_rate, row_dtype
        self.states: dict[str, Moments | PromptMoments] = {}
        self._generator = torch.Generator().manual_seed(seed)
        refuse_large(plans, dtype, max_bytes)

    def plan(self, name: str, plan: Plan) -> None:
        """Make room for another layer. Raises `ValueError` when `max_bytes` does not allow it."""
        refuse_large({**self.plans, name: plan}, self.dtype, self.max_bytes)
        self.plans[name] = plan

    def add(self, name: str, rows: _rows.Rows) -> None:
        """Add the rows of one batch."""
        number, pieces = rows.number, rows.pieces
        if self.token_rate < 1:
            number, pieces = self._kept(number), self._sampled(pieces)
        if number:
            state = self.state(name, rows.device)
            if isinstance(state, Moments):
                state.update(self._prepared(pieces), number, self.weighting)

    def add_prompt(self, name: str, q: Tensor, mass: Tensor) -> None:
        """Add the queries and prompt columns of one batch."""
        if self.token_rate < 1:
            chosen = self._sample(q.shape[2], self._kept(q.shape[2]), q.device)
            q, mass = q.index_select(2, chosen), mass.index_select(2, chosen)
        state = self.state(name, q.device)
        if isinstance(state, PromptMoments):
            state.update(q if self.row_dtype is None else q.to(self.row_dtype), mass, self.weighting)

    def state(self, name: str, device: torch.device) -> Moments | PromptMoments:
        """The state of a layer, zeros where there was none."""
        state = self.states.get(name)
        if state is None:
            state = self.states[name] = self.plans[name].state(self.dtype, self.device or device)
        return state

    def read(self, group: dist.ProcessGroup | None, home: torch.device) -> dict[str, tuple[Sums, ...]]:
        """Sums by name, over all processes of the group; those without samples take part with zeros."""
        if group is not None:
            for name in self.plans:
                self.state(name, home)
        read = {name: self.states[name].sums() for name in self.plans if name in self.states}
        if group is None:
            return read
        flat = iter(
            all_reduce_sums([n for n, some in read.items() for _ in some], [*itertools.chain(*read.values())], group)
        )
        return {name: tuple(itertools.islice(flat, len(some))) for name, some in read.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the state once every layer has been seen."""
        return sum(plan.nbytes(self.dtype) for plan in self.plans.values())

    def _kept(self, rows: int) -> int:
        """How many of the first `rows` rows of a batch are used."""
        return max(1, round(self.token_rate * rows)) if rows else 0

    def _sampled(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """A random share of the rows of each piece; what is copied of a large one at a time is bounded."""
        seen = 0
        for piece in pieces:
            for part in _rows.parts(piece, _rows.WORKSPACE_BYTES):
                flat = part.reshape(-1, part.shape[-1])
                before, seen = seen, seen + len(flat)
                if kept := self._kept(seen) - self._kept(before):
                    yield flat.index_select(0, self._sample(len(flat), kept, flat.device))

    def _sample(self, count: int, kept: int, device: torch.device) -> Tensor:
        return torch.randperm(count, generator=self._generator)[:kept].sort().values.to(device, non_blocking=True)

    def _prepared(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Rows in the dtype asked for. Rows with gaps go in bounded parts, for implementations that copy them."""
        for piece in pieces:
            narrower = self.row_dtype is not None and piece.element_size() > self.row_dtype.itemsize
            if piece.is_contiguous() and not narrower:
                yield piece
                continue
            for part in _rows.parts(piece, _rows.WORKSPACE_BYTES):
                yield part.to(self.row_dtype) if narrower else part
