"""How the adapters of a LoRA stack make one update, by name; and the checks of a stack's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cl_kernels.nn._lora_linear import POSITIONS

__all__ = ["COMPOSITIONS", "Composition", "checked_composition", "checked_positions", "checked_rank"]


@dataclass(frozen=True, kw_only=True)
class Composition:
    """How the adapters of all tasks make one update, and what trains.

    * trains: "ab" both factors of the current adapter, "b" the up-projection alone (InfLoRA).
    * omega: the coefficients of earlier adapters train.
    * normalized: earlier adapters enter as A_i B_i / (||A_i||_F ||B_i||_F), and the current one has a gain (SD-LoRA).
    * penalty: what `LoRAStack.penalty` measures: "stack" ||[A_old, A]^T [A_old, A] - I||_F (LoRAC), "cross"
      sum |A_old^T A| (O-LoRA), or None.
    """

    trains: Literal["ab", "b"] = "ab"
    omega: bool = False
    normalized: bool = False
    penalty: Literal["stack", "cross"] | None = None


COMPOSITIONS = {
    "sum": Composition(),
    "lorac": Composition(omega=True, penalty="stack"),
    "o-lora": Composition(penalty="cross"),
    "inf-lora": Composition(trains="b"),
    "sd-lora": Composition(omega=True, normalized=True),
}


def checked_rank(rank: int) -> int:
    """`rank`, or `ValueError`."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 4096:
        raise ValueError(f"Invalid rank value: {rank!r} (expected an integer from 1 to 4096)")
    return rank


def checked_positions(positions: Sequence[str]) -> tuple[str, ...]:
    """`positions` in the order of `POSITIONS`, or `ValueError`."""
    wanted = [positions] if isinstance(positions, str) else list(positions)
    unknown = [name for name in wanted if name not in POSITIONS]
    if unknown or not wanted:
        raise ValueError(f"positions: expected some of {', '.join(POSITIONS)}, got {wanted}")
    return tuple(name for name in POSITIONS if name in wanted)


def checked_composition(composition: str | Composition) -> Composition:
    """The `Composition`, or `ValueError` naming those there are."""
    if isinstance(composition, Composition):
        return composition
    if composition not in COMPOSITIONS:
        raise ValueError(f"composition: expected one of {', '.join(COMPOSITIONS)}, got {composition!r}")
    return COMPOSITIONS[composition]
