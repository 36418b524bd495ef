"""How steady a projector is: hard cut against soft edges, between two halves of a real data set, as a figure and JSON.

    python scripts/figure_stability.py [--shard FILE.npz] [--out docs/figures]

The inputs of every linear layer of the embedded backbone are gathered over each half of the images. For thresholds tau
from 2e-4 to 2e-2 of the trace, projectors P1 and P2 of the two halves are compared: |P1 - P2|_F / |P1|_F, the worst
energy |P1 C2 P1|_2 / tau that a step allowed by one half has on the other, and the effective dimension trace(P1) / d.
Writes stability.svg and stability.json; the page docs/null_space.md takes its numbers from the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cl_kernels import CovarianceCollector, data  # noqa: E402 - found through the line above
from cl_kernels.ops import symmetric_eigh  # noqa: E402
from cl_kernels.ops.null_space.spectral import response  # noqa: E402

EDGES = {"hard cut": None, "4 steps": 4, "3 steps": 3, "2 steps": 2}
MEASURES = ("change", "worst_energy", "free_share")
TAUS = [2 * 10 ** (-4 + 2 * i / 24) for i in range(25)]  # as shares of the trace
COLOURS = {"hard cut": "#d62728", "4 steps": "#9ecae1", "3 steps": "#3182bd", "2 steps": "#08306b"}


def halves(name: str | Path, classes: int, images: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moments C/n of every layer's input over the even and over the odd images, divided by their trace."""
    backbone = data.load_backbone()
    train = data.load(name).train.of_classes(range(classes))
    chosen = train.subset(torch.linspace(0, len(train) - 1, min(images, len(train))).long())
    pixels = backbone.preprocessing(chosen.tensors())
    found = []
    for part in (pixels[0::2], pixels[1::2]):
        with CovarianceCollector(backbone.model, "linear") as collector, torch.no_grad():
            for batch in part.split(100):
                backbone.model(batch)
        found.append({name: c.matrix / c.count for name, c in collector.covariances().items()})
    first, second = found
    scale = {name: float(matrix.trace()) for name, matrix in first.items()}
    return {n: c / scale[n] for n, c in first.items()}, {n: c / scale[n] for n, c in second.items()}


def projector(values: Tensor, vectors: Tensor, tau: float, steps: int | None) -> Tensor:
    ratio = values.clamp_min(0) / tau
    gains = (ratio <= 1).to(ratio) if steps is None else response(ratio, steps)
    return (vectors * gains) @ vectors.mT


def compare(p1: Tensor, p2: Tensor, c2: Tensor, tau: float) -> dict[str, float]:
    return {
        "change": float((p1 - p2).norm() / p1.norm()),
        "worst_energy": float(torch.linalg.eigvalsh(p1 @ c2 @ p1)[-1]) / tau,
        "free_share": float(p1.trace()) / len(p1),
    }


def sweep(name: str | Path, classes: int = 20, images: int = 1400, taus: list[float] | None = None) -> dict[str, Any]:
    """All measures by edge: the mean over layers (and the worst layer's energy) at every tau, and over all of them.

    Left out at a tau are layers where a hard cut frees no direction in one of the halves: there is nothing to compare.
    """
    taus = TAUS if taus is None else taus
    first, second = halves(name, classes, images)
    spectra = {layer: (symmetric_eigh(first[layer]), symmetric_eigh(second[layer])) for layer in first}
    curves: dict[str, dict[str, list[float]]] = {e: {m: [] for m in (*MEASURES, "worst_layer")} for e in EDGES}
    for tau in taus:
        kept = [n for n, (one, two) in spectra.items() if max(float(one[0][-1]), float(two[0][-1])) <= tau]
        for edge, steps in EDGES.items():
            rows = []
            for layer in kept:
                one, two = (projector(*spectrum, tau, steps) for spectrum in spectra[layer])
                rows.append(compare(one, two, second[layer], tau))
            for measure in MEASURES:
                curves[edge][measure].append(statistics.mean(row[measure] for row in rows))
            curves[edge]["worst_layer"].append(max(row["worst_energy"] for row in rows))
    summary = {e: {m: statistics.mean(c[m]) for m in MEASURES} for e, c in curves.items()}
    for edge, curve in curves.items():
        summary[edge]["worst_layer"] = max(curve["worst_layer"])
    source = Path(name).stem
    return {"data": source, "layers": len(first), "taus": taus, "summary": summary, "curves": curves}


def draw(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "stability", "font.family": "sans-serif", "font.size": 9}
    figure, axes = plt.subplots(
        2, len(found), figsize=(3.6 * len(found), 4.6), sharex=True, sharey="row", squeeze=False
    )
    for column, entry in enumerate(found):
        above, below = axes[:, column]
        for edge, curve in entry["curves"].items():
            above.plot(entry["taus"], curve["change"], color=COLOURS[edge], label=edge, linewidth=1.6)
            below.plot(entry["taus"], curve["worst_energy"], color=COLOURS[edge], linewidth=1.6)
        below.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
        above.set_title(entry["data"], fontsize=9)
        above.set_xscale("log")
        below.set_xlabel("threshold tau / trace")
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", linewidth=0.4, color="#dddddd")
    for axis in axes[:, 0]:  # at the end: an axis shared with a neighbour keeps the limits of what is drawn by then
        axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("change of P")
    axes[1, 0].set_ylabel("worst energy / tau")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def rounded(value: Any) -> Any:
    """Four digits: more would only make the file differ from machine to machine."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", type=Path, help="an .npz shard of real images, beside the embedded digits")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [sweep(name) for name in ("digits", options.shard) if name is not None]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "stability.json").write_text(json.dumps(rounded(found), indent=1) + "\n")
    draw(found, options.out / "stability.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
