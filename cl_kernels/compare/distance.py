"""How far the user's images are from the images the backbone was trained on, in the backbone's own features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_kernels.compare._classify import fold_numbers
from cl_kernels.compare._moments import Moments, frechet, frechet_line, same_law
from cl_kernels.compare.features import Features, extract
from cl_kernels.compare.probes import linear_probe
from cl_kernels.compare.reference import Reference
from cl_kernels.compare.ruler import RULER, ruler_images
from cl_kernels.data import Backbone

__all__ = ["Moments", "distance_report", "frechet", "frechet_line", "kid", "measure", "proxy_a"]

SIZE = 1000
FOLDS = 5
NORMAL = 1.96  # 95 %
INCEPTION = "Inception-FID: its weights are not part of this package and nothing is downloaded"


def kid(x: Tensor, y: Tensor) -> dict[str, float | int]:
    """Unbiased kernel distance of two samples, with a standard error and a 95 % interval.

    k(x, y) = (x.y / D + 1)^3; the mean of k over pairs i != j of ``x``, plus the same of ``y``, minus twice the mean
    over all pairs (x, y). Unbiased at every n, so it may be below 0. The error is that of the U-statistic
    h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) in closed form, both terms of its variance:
    4 (n-2) / (n (n-1)) zeta_1 + 2 / (n (n-1)) zeta_2. A bootstrap that draws images again was tried: for two samples of
    one law its error was 1.5 times the true one, this one 1.05 times (128-d, n = 500, 60 draws).

    ``x``, ``y``: features [n, D], cut to the smaller n; n at least 4. Returns ``value``, ``se``, ``low``, ``high``,
    ``n``. Cost: three n x n products in float64.
    """
    n = min(len(x), len(y))
    if n < 4 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"features: expected [n, D] twice with n at least 4, got {tuple(x.shape)}, {tuple(y.shape)}")
    a, b = x[:n].double(), y[:n].double()
    inner_a, inner_b, cross = (_kernel(left, right) for left, right in ((a, a), (b, b), (a, b)))
    pairs = n * (n - 1)
    value = float((inner_a.sum() - inner_a.trace() + inner_b.sum() - inner_b.trace()) / pairs - 2 * cross.mean())
    h = (inner_a + inner_b - cross - cross.T).fill_diagonal_(0)
    squares, mean = h.square().sum(), h.sum() / pairs
    first = (h.sum(dim=1).square().sum() - squares) / (pairs * (n - 2)) - mean.square()
    second = squares / pairs - mean.square()
    variance = max(0.0, float(4 * (n - 2) / pairs * first)) + max(0.0, float(2 / pairs * second))
    se = math.sqrt(variance)
    return {"value": value, "se": se, "low": value - NORMAL * se, "high": value + NORMAL * se, "n": n}


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def proxy_a(x: Tensor, y: Tensor, *, seed: int = 0) -> dict[str, float | int]:
    """Proxy-A distance 2 (1 - 2 e), e the cross-validated error of logistic regression between the two samples.

    0: cannot be told apart; 2: always. Both samples are cut to the smaller n. Never below 0 (``error`` may be above one
    half). ``se`` is 4 times the binomial error of ``error``. Returns ``value``, ``se``, ``error``, ``n`` (of each).
    Source: Ben-David et al., Analysis of representations for domain adaptation, 2006.
    """
    n = min(len(x), len(y))
    if n < FOLDS or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"features: expected [n, D] twice with n >= {FOLDS}, got {tuple(x.shape)}, {tuple(y.shape)}")
    both = torch.cat([x[:n], y[:n]]).float()
    domain = torch.cat([torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64)])
    right, _ = linear_probe(both, domain, fold_numbers(domain, FOLDS, seed), range(FOLDS), seed, once=True)
    error = 1 - int(right.sum()) / (2 * n)
    share = (error * 2 * n + 2) / (2 * n + 4)
    se = 4 * math.sqrt(share * (1 - share) / (2 * n + 4))
    return {"value": max(0.0, 2 * (1 - 2 * error)), "se": se, "error": error, "n": n}


def measure(features: Tensor, reference: Reference, *, n: int = SIZE, seed: int = 0, draws: int = 3) -> dict[str, Any]:
    """Frechet, KID and proxy-A distance of features [N, D] to a reference, all at the same n.

    n is cut to what both sides have (``n`` in the answer); both are drawn by ``seed``. Without stored reference
    features, Frechet is taken against the stored moments, and KID and proxy-A are None. ``relative`` values are
    divided by the total variance of the reference.
    """
    stored, moments = reference.features, reference.moments()
    n = min(n, len(features), len(features) if stored is None else len(stored))
    mine = _drawn(features, n, seed)
    theirs = moments if stored is None else _drawn(stored, n, seed + 1)
    value, line, total = frechet(mine, theirs), frechet_line(mine, theirs, seed=seed, draws=draws), moments.total
    found: dict[str, Any] = {"n": n, "frechet": {"value": value, "relative": value / total, "line": line}}
    if line is not None:
        line["intercept_relative"], line["residual_relative"] = line["intercept"] / total, line["residual"] / total
    found["kid"] = kid(mine, theirs) if isinstance(theirs, Tensor) else None
    found["proxy_a"] = proxy_a(mine, theirs, seed=seed) if isinstance(theirs, Tensor) else None
    return found


def _drawn(features: Tensor, n: int, seed: int) -> Tensor:
    if len(features) == n:
        return features
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features[order[:n]]


def distance_report(
    features: Features | Tensor,
    reference: Reference | None,
    *,
    n: int = SIZE,
    seed: int = 0,
    backbone: Backbone | None = None,
    ruler: Sequence[str] = RULER,
    cache: Path | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The "distance" section of results.json: the user's images, a ruler of built-in sets, and what is missing and why.

    ``features``: frozen pooled features of the user's training images; ``reference``: see `reference.find`; None gives
    a report that says so. ``ruler``: built-in sets (`ruler.names`) measured by the same code at the same n, which needs
    ``backbone``; ``cache`` keeps their features, ``should_stop`` is asked before each.

    Returns what `measure` does, and ``images``, ``dimensions``, ``reference`` (name, source, n), ``frechet.chance`` and
    ``chance_relative`` (two samples of one Gaussian with the reference's moments, at the same n), ``frechet.moments``
    (value, relative, n: against all images behind the reference), ``ruler`` [{name, n, frechet, frechet_relative,
    frechet_endless, kid, kid_se, proxy_a, proxy_a_se}], ``notes`` and ``missing``.
    """
    pooled = features.pooled if isinstance(features, Features) else features
    if reference is None:
        why = (
            "distance to the pre-training data: no reference statistics for this backbone; give --reference DIR or FILE"
        )
        return {"reference": None, "images": len(pooled), "ruler": [], "notes": [], "missing": [why, INCEPTION]}
    if pooled.shape[1] != len(reference.mean):
        raise ValueError(
            f"reference: {reference.name} has features of width {len(reference.mean)}, not {pooled.shape[1]}"
        )
    found = measure(pooled, reference, n=n, seed=seed)
    moments = reference.moments()
    chance, whole = same_law(moments, found["n"], seed), frechet(_drawn(pooled, found["n"], seed), moments)
    found["frechet"] |= {
        "chance": chance,
        "chance_relative": chance / moments.total,
        "moments": {"value": whole, "relative": whole / moments.total, "n": reference.n},
    }
    marks, missing = _ruler(reference, found["n"], seed, backbone, ruler, cache, should_stop)
    found |= {
        "images": len(pooled),
        "dimensions": pooled.shape[1],
        "reference": {"name": reference.name, "source": reference.source, "n": reference.n},
        "ruler": marks,
        "notes": _notes(found, n, pooled.shape[1]),
        "missing": [*missing, INCEPTION],
    }
    return found


def _ruler(
    reference: Reference,
    n: int,
    seed: int,
    backbone: Backbone | None,
    names: Sequence[str],
    cache: Path | None,
    should_stop: Callable[[], bool] | None,
) -> tuple[list[dict[str, Any]], list[str]]:
    rows = [_mark(name, found) for name, found in reference.marks.items()]
    missing = []
    if backbone is None:
        missing = ["the ruler of distances: no backbone was given"] if names else []
        names = ()
    for name in names:
        if should_stop is not None and should_stop():
            missing.append(f"{name!r} on the ruler of distances: no time was left")
        elif backbone is not None:
            images = ruler_images(name, backbone.preprocessing.size, n, seed)
            features = extract(backbone, images, cache=cache).pooled
            rows.append(_mark(name, measure(features, reference, n=n, seed=seed, draws=1)))
    return sorted(rows, key=lambda row: float(row["frechet"])), missing


def _mark(name: str, found: dict[str, Any]) -> dict[str, Any]:
    line, kernel, proxy = found["frechet"]["line"], found["kid"] or {}, found["proxy_a"] or {}
    return {
        "name": name,
        "n": found["n"],
        "frechet": found["frechet"]["value"],
        "frechet_relative": found["frechet"]["relative"],
        "frechet_endless": None if line is None else line["intercept_relative"],
        "kid": kernel.get("value"),
        "kid_se": kernel.get("se"),
        "proxy_a": proxy.get("value"),
        "proxy_a_se": proxy.get("se"),
    }


def _notes(found: dict[str, Any], wanted: int, width: int) -> list[str]:
    notes = [
        f"a Frechet distance depends on n: compare it only with others at n = {found['n']}",
        "near means near in this backbone's features: what it cannot see counts as near too, so read distances beside "
        "the linear probe",
    ]
    if found["n"] < wanted:
        notes.append(f"taken at n = {found['n']}, as there are fewer than {wanted} images")
    if found["n"] <= 2 * width:
        notes.append(
            f"n = {found['n']} is near or below the {width} dimensions: the 1/n line lowers the bias and does not "
            "remove it; rely on KID"
        )
    if found["kid"] is None:
        notes.append("KID and proxy-A distance need stored reference features; this reference has moments only")
    return notes
