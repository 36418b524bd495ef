"""Rank rules: how many leading eigendirections of a second moment are protected.

Every rule is a frozen dataclass with one method, `protected(eigenvalues) -> int`, for eigenvalues [n] sorted in
descending order and at least 0. The first `protected` directions carry the old tasks; the other n - protected are free.
All but `Threshold` are unchanged when the second moment is scaled. Cost: O(n), one read of the values from the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from cl_kernels.ops import _checks

__all__ = ["Energy", "Knee", "PaperKnee", "Rank", "RatioToLargest", "RatioToSmallest", "Rule", "Threshold"]

SIGMA_MOST = 1e4  # the kernel has 8 sigma entries
SMOOTHED_FROM = 128  # shorter spectra are neither smoothed nor trimmed (NSP2 repository, train_eval.py:643-669)


class Rule(Protocol):
    """What `null_space_projector` asks of a rule."""

    def protected(self, eigenvalues: Tensor) -> int: ...


@dataclass(frozen=True)
class Knee:
    """The adaptive nullity of the NSP2 repository: cut where the smoothed spectrum bends most.

    For n >= 128 the curve is smoothed with a Gaussian of `sigma` indices (radius 4 sigma, half-sample symmetric ends)
    and floor(trim n / 2) second differences are dropped at each end; shorter curves are used as they are. With k the
    index of the largest second difference, the free directions are those from the last index whose eigenvalue is at
    least that at k: the knee itself is free. `offset` moves the cut: in [0, 1) by that share of the free directions,
    otherwise by that many indices (integer parts).

    When positive eigenvalues equal the one at the knee exactly, "the last index" is the end of that run, and the
    repository frees next to nothing. `ties="raise"` refuses with a `ValueError`; "first" cuts before the run, which is
    what the rule means; "last" does as the repository. Zeros are no tie: they are free.
    Raises `ValueError` for fewer than 3 eigenvalues. Source: method-null-space, section 4.
    """

    sigma: float = 10.0
    trim: float = 0.03
    offset: float = 0.0
    ties: Literal["raise", "first", "last"] = "raise"

    def __post_init__(self) -> None:
        if not 0 < _checks.number("sigma", self.sigma) <= SIGMA_MOST:
            raise ValueError(f"Invalid sigma value: {self.sigma} (expected 0 < sigma <= {SIGMA_MOST:g})")
        _checks.number("trim", self.trim, 0.0, 1.0, closed=False)
        _checks.number("offset", self.offset)
        if not math.isfinite(self.offset):
            raise ValueError(f"Invalid offset value: {self.offset} (expected a finite number)")
        if self.ties not in ("raise", "first", "last"):
            raise ValueError(f"ties: expected 'raise', 'first' or 'last', got {self.ties!r}")

    def protected(self, eigenvalues: Tensor) -> int:
        curve = _curve(eigenvalues, least=3)
        n = curve.numel()
        long = n >= SMOOTHED_FROM
        dropped = min(int(self.trim * n / 2), (n - 3) // 2) if long else 0
        bend = _second_difference(_smooth(curve, self.sigma) if long else curve)
        knee = int(bend[dropped : n - 2 - dropped].argmax()) + dropped + 1
        return self._shifted(self._cut(curve, knee), n)

    def _cut(self, curve: Tensor, knee: int) -> int:
        at_knee = curve[knee]
        first = int((curve > at_knee).sum())
        last = int((curve >= at_knee).sum()) - 1
        if self.ties == "last" or first == last:
            return last
        if self.ties == "raise" and at_knee > 0:
            raise ValueError(
                f"eigenvalues: the knee lies in a run of {last - first + 1} equal eigenvalues ({float(at_knee):.3e}, "
                f"indices {first} to {last} of {curve.numel()}), where the rule of the NSP2 repository would free only "
                f'{curve.numel() - last} directions; use Knee(ties="first") to free the whole run, or an Energy rule'
            )
        return first

    def _shifted(self, cut: int, n: int) -> int:
        if 0 <= self.offset < 1:
            return min(cut + int(self.offset * (n - cut)), n - 1)
        return min(max(cut + int(self.offset), 0), n - 1)


@dataclass(frozen=True)
class PaperKnee:
    """Eq. 28 of the NSP2 paper: the largest unsmoothed second difference; the knee itself is protected.

    On smooth spectra this is almost always the very first bend, so that two directions are protected.
    Raises `ValueError` for fewer than 3 eigenvalues.
    """

    def protected(self, eigenvalues: Tensor) -> int:
        return int(_second_difference(_curve(eigenvalues, least=3)).argmax()) + 2


@dataclass(frozen=True)
class Energy:
    """Protect the fewest leading directions that hold at least `keep` (in [0, 1]) of the trace (GPM)."""

    keep: float

    def __post_init__(self) -> None:
        _checks.number("keep", self.keep, 0.0, 1.0)

    def protected(self, eigenvalues: Tensor) -> int:
        held = _curve(eigenvalues).cumsum(0)
        wanted = self.keep * held[-1]
        return 0 if wanted <= 0 else int((held < wanted).sum()) + 1


@dataclass(frozen=True)
class RatioToLargest:
    """Leave free what is at most `ratio` (in [0, 1]) times the largest eigenvalue."""

    ratio: float

    def __post_init__(self) -> None:
        _checks.number("ratio", self.ratio, 0.0, 1.0)

    def protected(self, eigenvalues: Tensor) -> int:
        curve = _curve(eigenvalues)
        return _above(curve, self.ratio * float(curve[0]))


@dataclass(frozen=True)
class RatioToSmallest:
    """Adam-NSCL: leave free what is at most `ratio` times the smallest eigenvalue (10 or 30 in its scripts).

    The smallest eigenvalue of a rank-deficient matrix is rounding noise, so it counts as at least eps n lambda_max,
    with eps of the dtype that the eigenvalues come in, and as at least `floor` lambda_max. The rows behind a second
    moment summed in float64 may be rounded more than it is: activations in float32 leave noise near 1e-12 lambda_max.
    """

    ratio: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        _checks.number("ratio", self.ratio, 0.0)
        _checks.number("floor", self.floor, 0.0, 1.0)

    def protected(self, eigenvalues: Tensor) -> int:
        curve = _curve(eigenvalues)
        floor = max(self.floor, torch.finfo(eigenvalues.dtype).eps * curve.numel())
        return _above(curve, self.ratio * max(float(curve[-1]), floor * float(curve[0])))


@dataclass(frozen=True)
class Rank:
    """Protect the `count` largest directions, all of them where there are fewer."""

    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool):
            raise TypeError(f"count: expected an int, got {type(self.count).__name__}")
        _checks.number("count", self.count, 0)

    def protected(self, eigenvalues: Tensor) -> int:
        return min(self.count, _curve(eigenvalues).numel())


@dataclass(frozen=True)
class Threshold:
    """Leave free what is at most `tau`, in the units of the second moment."""

    tau: float

    def __post_init__(self) -> None:
        _checks.number("tau", self.tau, 0.0)

    def protected(self, eigenvalues: Tensor) -> int:
        return _above(_curve(eigenvalues), self.tau)


def _curve(eigenvalues: Tensor, least: int = 1) -> Tensor:
    """The checked spectrum in float64 on the CPU."""
    _checks.floating("eigenvalues", eigenvalues)
    if eigenvalues.ndim != 1 or eigenvalues.numel() < least:
        raise ValueError(f"eigenvalues: expected shape (n,) with n >= {least}, got {tuple(eigenvalues.shape)}")
    curve = eigenvalues.detach().to("cpu", torch.float64)
    descending = bool((curve[1:] <= curve[:-1]).all())  # never with a NaN, unless there is one number only
    if not (descending and curve[0] < math.inf and curve[-1] >= 0):
        _checks.finite("eigenvalues", curve)
        raise ValueError("eigenvalues: expected descending values >= 0 (clamp rounding noise below 0 first)")
    return curve


def _above(curve: Tensor, threshold: float) -> int:
    return int((curve > threshold).sum())


def _second_difference(curve: Tensor) -> Tensor:
    return curve[:-2] - 2 * curve[1:-1] + curve[2:]


def _smooth(curve: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing with half-sample symmetric ends (d c b a | a b c d | d c b a), cut off at 4 sigma."""
    n, radius = curve.numel(), int(4 * sigma + 0.5)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma).double().square())
    place = torch.arange(-radius, n + radius).remainder(2 * n)
    extended = curve[torch.minimum(place, 2 * n - 1 - place)]
    return torch.nn.functional.conv1d(extended[None, None], (weights / weights.sum())[None, None])[0, 0]
