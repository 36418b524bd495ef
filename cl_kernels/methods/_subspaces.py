"""What the projecting methods share: rank rules by name, gains of projectors, and their report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cl_kernels.methods._options import Options, number, require
from cl_kernels.ops import Projector, Sides, rules
from cl_kernels.subspace import SubspaceStore
from cl_kernels.subspace._algebra import protected_rank

__all__ = [
    "CutOptions",
    "Report",
    "check_rule",
    "matched",
    "new_store",
    "parse_rule",
    "protected_energy",
    "restored_store",
    "rms_gain",
    "side_report",
]

Report = dict[str, dict[str, dict[str, Any]]]
"""By parameter, by side: dim, protected, gain, energy, added, tasks_left."""


@dataclass(frozen=True, kw_only=True)
class CutOptions(Options):
    """rule: which directions are protected, see `parse_rule`; eta: weight of the projector against the identity;
    normalize: "fro" divides the projector by its Frobenius norm, "none" does not; edge: "hard", or "soft", which lets
    directions near the cut through in part (`null_space_projector` with the solver "filter")."""

    rule: str = "energy:0.95"
    eta: float = 1.0
    normalize: str = "none"
    edge: str = "hard"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule("rule", self.rule)
        require("eta", number(self.eta, 0.0, 1.0), "a number in [0, 1]", self.eta)
        require("normalize", self.normalize in ("fro", "none"), "fro or none", self.normalize)
        require("edge", self.edge in ("hard", "soft"), "hard or soft", self.edge)

    @property
    def norm(self) -> Literal["fro"] | None:
        """`normalize` as `null_space_projector` takes it."""
        return None if self.normalize == "none" else "fro"

    @property
    def solver(self) -> Literal["eigh", "filter"]:
        """`edge` as `null_space_projector` takes it."""
        return "filter" if self.edge == "soft" else "eigh"


def parse_rule(name: str, text: str, floor: float = 0.0) -> rules.Rule:
    """The rank rule written as `text`: "knee", "paper-knee", or with a number "energy:0.95", "rank:20", "ratio:0.01"
    (of the largest eigenvalue), "times:10" (of the smallest), "threshold:1e-3". Raises `ValueError`.

    "knee" cuts before a run of equal eigenvalues where `rules.Knee()` would raise: a run must not stop after hours of
    training; elsewhere the two are the same. "knee-first" is another name of it. `floor` is that of "times", see
    `rules.RatioToSmallest`."""
    kind, _, number = text.partition(":")
    plain: dict[str, rules.Rule] = {
        "knee": rules.Knee(ties="first"),
        "knee-first": rules.Knee(ties="first"),
        "paper-knee": rules.PaperKnee(),
    }
    scaled: dict[str, Callable[[float], rules.Rule]] = {
        "energy": rules.Energy,
        "rank": lambda value: rules.Rank(int(value)),
        "ratio": rules.RatioToLargest,
        "times": lambda value: rules.RatioToSmallest(value, floor),
        "threshold": rules.Threshold,
    }
    if kind in plain and not number:
        return plain[kind]
    try:
        return scaled[kind](float(number))
    except (KeyError, ValueError, OverflowError) as error:
        wanted = "knee, paper-knee, energy:E, rank:K, ratio:R, times:R or threshold:T"
        raise ValueError(f"{name}: expected {wanted}, got {text!r} ({error})") from error


def rms_gain(projector: Projector | None) -> float:
    """`||P||_F / sqrt(d)`: the root mean square factor on a step without preferred direction; 1 for None.

    Eigenvalues are `identity` on d - r directions and `identity - span` on r (method-null-space.md 5).
    """
    if projector is None:
        return 1.0
    if projector.dense is not None:
        return float(projector.dense.double().norm()) / math.sqrt(projector.dim)
    a, b, d, r = float(projector.identity), float(projector.span), projector.dim, projector.rank
    return math.sqrt(((d - r) * a * a + r * (a - b) ** 2) / d)


def scaled_identity(projector: Projector | None) -> Projector | None:
    """`g I` with g the RMS gain of `projector`: the same mean step, without a direction."""
    if projector is None:
        return None
    empty = projector.basis.new_zeros((projector.dim, 0))
    return Projector(empty, rms_gain(projector), 0.0)


def protected_energy(covariance: Tensor, projector: Projector) -> float:
    """The share of `covariance`'s trace inside the protected directions; NaN-free: 0 for a zero matrix, and for c I."""
    total = float(covariance.diagonal().sum())
    if projector.dense is not None:
        low, high = _ends(projector.dense)
        if total <= 0 or low == high:
            return float(high == 0 and total > 0)
        return (high - float((covariance.double() * projector.dense.double()).sum()) / total) / (high - low)
    span = float(projector.span)
    if total <= 0 or span == 0:
        return 0.0
    basis = projector.basis.to(covariance)
    held = float(((covariance @ basis) * basis).sum()) / total
    return held if span > 0 else 1.0 - held


def side_report(
    projector: Projector, covariance: Tensor, before: Mapping[str, Any] | None = None
) -> dict[str, float | None]:
    """Dimension, protected directions, RMS gain and protected energy of one side, for results.json.

    `before`: the report of the task before. `added`: how many more directions are protected now; `tasks_left`: how many
    tasks that add as many still fit, None (JSON has no infinity) where the last one added none."""
    protected = _soft_rank(projector.dense) if projector.dense is not None else protected_rank(projector) or 0
    added = protected - (before["protected"] if before else 0)
    return {
        "dim": projector.dim,
        "protected": protected,
        "gain": rms_gain(projector),
        "energy": protected_energy(covariance, projector),
        "added": added,
        "tasks_left": (projector.dim - protected) // added if added > 0 else None,
    }


def _ends(dense: Tensor) -> tuple[float, float]:
    """The smallest and the largest gain of a dense projector; (c, c) for c I, to the rounding of float32."""
    gains = torch.linalg.eigvalsh(dense.double())
    low, high = float(gains[0]), float(gains[-1])
    return (low, high) if high - low > 1e-5 * abs(high) else (high, high)


def _soft_rank(dense: Tensor) -> int:
    """How many directions get less than the mean of the smallest and the largest gain: at tau a soft edge is 1/2. All
    where the matrix is 0."""
    low, high = _ends(dense)
    return len(dense) if high == 0 else int((torch.linalg.eigvalsh(dense.double()) < (low + high) / 2).sum())


def matched(sides: Sides) -> Sides:
    """Both sides replaced by the multiple of the identity with the same RMS gain."""
    return Sides(scaled_identity(sides.left), scaled_identity(sides.right))


def check_rule(name: str, text: str | None) -> None:
    """`parse_rule` for its error alone; None passes."""
    if text is not None:
        require(name, isinstance(text, str), "a string", text)
        parse_rule(name, text)


def new_store(sides: dict[str, Sides], report: Report, before: SubspaceStore | None) -> SubspaceStore:
    """A store of `sides` that knows the protected energies, and by how much each is larger than in `before`."""
    store = SubspaceStore(before)
    for name, pair in sides.items():
        store.put(name, pair, **{f"{side}_energy": values["energy"] for side, values in report[name].items()})
    return store


def restored_store(state: dict[str, Tensor] | None, device: torch.device) -> SubspaceStore | None:
    """The store whose `state_dict` this is, on `device`; None for None."""
    if state is None:
        return None
    store = SubspaceStore()
    store.load_state_dict(state)
    return store.to(device)
