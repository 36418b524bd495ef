"""The low-rank adapters of one weight: a frozen history, one coefficient each, and the adapter that trains now."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_kernels.nn._composed import Part

__all__ = ["Adapters", "Coefficients"]


class Coefficients(NamedTuple):
    """How the history enters a forward pass: its first `columns` columns, scaled by `values` (None: all by one)."""

    columns: int
    values: Tensor | None


class Current(NamedTuple):
    """The adapter that trains: a [in, r] as the forward pass uses it, b [r, out], and its gain where one trains."""

    a: Tensor
    b: Tensor
    gain: Tensor | None


class Adapters(nn.Module):
    """dW = s (sum_i c_i A_i B_i + c_t A_t B_t) for one weight [out, in], in the convention y = x W^T + x dW.

    The history is stored side by side, `past_a` [in, K] and `past_b` [K, out], so that its cost is two thin products
    whatever the number of tasks. `omega` [n] holds one coefficient for each of its n adapters. `lora_a` [in, r] and
    `lora_b` [r, out] train; they are None between tasks and once the position is frozen. A snapshot keeps the
    coefficients at the end of a task.
    """

    past_a: Tensor
    past_b: Tensor
    norms: Tensor
    owner: Tensor
    bank: Tensor
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None
    gain: nn.Parameter | None

    def __init__(self, size_in: int, size_out: int, scale: float, like: Tensor, *, normalized: bool) -> None:
        super().__init__()
        self.scale = scale
        self.normalized = normalized  # SD-LoRA: the history enters as directions A_i B_i / (||A_i|| ||B_i||)
        self.ranks: list[int] = []
        self.tasks: list[int] = []
        self.frozen_after: int | None = None
        self.snapshots: list[int] = []  # how many adapters each ended task had; a row of `bank` each
        self.register_buffer("past_a", like.new_empty(size_in, 0))
        self.register_buffer("past_b", like.new_empty(0, size_out))
        self.register_buffer("norms", like.new_empty(0))
        self.register_buffer("bank", like.new_empty(0, 0))
        self.register_buffer("owner", torch.empty(0, dtype=torch.int64, device=like.device), persistent=False)
        self.omega = nn.Parameter(like.new_empty(0), requires_grad=False)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.register_parameter("gain", None)  # of the current adapter, where it trains
        self.orthonormal_a: Tensor | None = None  # stands for lora_a while the stack parametrises it by QR
        self.shown: int | None = None  # snapshot in use; None: the live state

    def __getstate__(self) -> dict[str, Any]:
        """Without Q, which hangs in a graph that cannot be copied; the next forward pass makes it anew."""
        return self.__dict__ | {"orthonormal_a": None}

    @property
    def frozen(self) -> bool:
        return self.frozen_after is not None

    @property
    def current(self) -> Current | None:
        """What trains now, whether or not a snapshot is shown."""
        if self.lora_a is None or self.lora_b is None:
            return None
        return Current(self.lora_a if self.orthonormal_a is None else self.orthonormal_a, self.lora_b, self.gain)

    def start(self, a: Tensor, b: Tensor, *, train_a: bool, train_gain: bool, train_omega: bool) -> None:
        """A new adapter that trains."""
        self.lora_a = nn.Parameter(a, requires_grad=train_a)
        self.lora_b = nn.Parameter(b)
        self.gain = nn.Parameter(a.new_ones(())) if train_gain else None
        self.omega.requires_grad_(train_omega and self.omega.numel() > 0)

    @torch.no_grad()
    def absorb(self, task: int) -> None:
        """The current adapter joins the history."""
        current = self.current
        if current is not None:
            gain = current.b.new_ones(()) if current.gain is None else current.gain
            self.append(current.a.detach(), current.b.detach(), gain.detach(), task)
        self.lora_a = self.lora_b = self.gain = self.orthonormal_a = None
        self.omega.requires_grad_(False)

    @torch.no_grad()
    def append(self, a: Tensor, b: Tensor, coefficient: Tensor, task: int) -> None:
        """Add A [in, r], B [r, out] with their coefficient to the history."""
        norm = a.norm() * b.norm()
        if self.normalized:  # the coefficient takes over the length, so that the function does not change
            coefficient = coefficient * norm
        self.past_a = torch.cat((self.past_a, a), dim=1)
        self.past_b = torch.cat((self.past_b, b))
        self.norms = torch.cat((self.norms, norm.reshape(1)))
        self.omega = nn.Parameter(torch.cat((self.omega, coefficient.reshape(1).to(self.omega))), requires_grad=False)
        self.ranks.append(a.shape[1])
        self.tasks.append(task)
        self._index()

    @torch.no_grad()
    def snapshot(self) -> None:
        """Keep the coefficients as they are now as those of the task that ends."""
        count, rows = self.omega.numel(), len(self.snapshots)
        bank = self.bank.new_zeros(rows + 1, count)
        bank[:rows, : self.bank.shape[1]] = self.bank
        bank[rows] = self.omega.detach()
        self.bank = bank
        self.snapshots.append(count)

    def coefficients(self) -> Coefficients:
        """Of the history, in the live state or in the snapshot shown."""
        count = len(self.ranks) if self.shown is None else self.snapshots[self.shown]
        columns = sum(self.ranks[:count])
        values = self.omega if self.shown is None else self.bank[self.shown, :count]
        if self.normalized:
            values = values / self.norms[:count].clamp_min(torch.finfo(self.norms.dtype).tiny)
        return Coefficients(columns, values[self.owner[:columns]] if columns else None)

    def forward(self, x: Tensor) -> Tensor | None:
        """x dW [..., out], or None when there is no adapter."""
        columns, values = self.coefficients()
        parts = []
        if columns and values is not None:
            parts.append(((x @ self.past_a[:, :columns]) * values) @ self.past_b[:columns])
        current = self.current if self.shown is None else None
        if current is not None:
            thin = x @ current.a
            parts.append((thin if current.gain is None else thin * current.gain) @ current.b)
        return self.scale * (parts[0] if len(parts) == 1 else parts[0] + parts[1]) if parts else None

    def part(self, where: slice) -> Part | None:
        """What `composed_linear` needs for the output columns `where`; None when there is no adapter."""
        columns, values = self.coefficients()
        current = self.current if self.shown is None else None
        if not columns and current is None:
            return None
        a, b = (self.past_a[:, :columns], self.past_b[:columns]) if columns else (None, None)
        new = current or (None, None, None)
        return Part(where.start, where.stop, self.scale, a, b, values, new[0], new[1], new[2])

    @torch.no_grad()
    def delta(self) -> Tensor:
        """dW [in, out], dense: for merging and for importance, never in a forward pass."""
        a, b = self.factors()
        return a @ b

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A [in, K], B [K, out]) with A B = dW: coefficients and scale are in B."""
        columns, values = self.coefficients()
        a, b = self.past_a[:, :columns], self.past_b[:columns]
        if values is not None:
            b = b * values[:, None]
        current = self.current if self.shown is None else None
        if current is not None:
            a = torch.cat((a, current.a), dim=1)
            b = torch.cat((b, current.b if current.gain is None else current.b * current.gain))
        return a, self.scale * b

    def _index(self) -> None:
        owner = [index for index, rank in enumerate(self.ranks) for _ in range(rank)]
        self.owner = torch.tensor(owner, dtype=torch.int64, device=self.past_a.device)

    # What a state dict cannot say by shapes alone -----------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Plain lists; they travel beside the tensors."""
        return {
            "ranks": list(self.ranks),
            "tasks": list(self.tasks),
            "snapshots": list(self.snapshots),
            "frozen_after": self.frozen_after,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.ranks, self.tasks = [int(r) for r in state["ranks"]], [int(t) for t in state["tasks"]]
        self.snapshots, self.frozen_after = [int(s) for s in state["snapshots"]], state["frozen_after"]
        self._index()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the shapes of what comes in: a history grows."""
        for name in ("past_a", "past_b", "norms", "bank"):
            given = state_dict.get(prefix + name)
            if given is not None:
                setattr(self, name, torch.empty_like(given, device=self.past_a.device, dtype=self.past_a.dtype))
        for name in ("omega", "lora_a", "lora_b", "gain"):
            given, mine = state_dict.get(prefix + name), getattr(self, name)
            if given is None:
                if name != "omega":
                    setattr(self, name, None)
            elif mine is None or mine.shape != given.shape:
                fresh = torch.empty_like(given, device=self.past_a.device, dtype=self.past_a.dtype)
                setattr(self, name, nn.Parameter(fresh, requires_grad=name != "omega"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def kaiming_bound(rank: int) -> float:
    """Half width of the uniform law of A [in, r]: torch's kaiming law with a = sqrt(5) reads fan_in = r there."""
    return 1.0 / math.sqrt(rank)
