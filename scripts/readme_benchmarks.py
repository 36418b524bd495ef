"""Write the benchmark tables into README.md from benchmarks/results/cpu/*.json: no number there is typed by hand.

python scripts/readme_benchmarks.py            rewrites the section between the markers
python scripts/readme_benchmarks.py --check    changes nothing and exits with 1 if README.md says something else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


class Line(NamedTuple):
    """One line: the beginning of a case's name, and which variants it is compared with under which heading."""

    case: str
    official: str = ""
    torch: str = ""


class Table(NamedTuple):
    """One file's table. `ours` is the variant all ratios are quoted for; `measure` says how wrong each is."""

    title: str
    file: str
    lines: tuple[Line, ...]
    measure: str = "error"
    meaning: str = "relative error against float64"
    first_meaning: str = ""  # what the measure was in files without a schema


TABLES = (
    Table(
        "Second moments",
        "covariance",
        (
            Line("head Grams 4x12", "official expansion", "torch batched Grams"),
            Line("head Grams 256x12", "official expansion", "torch batched Grams"),
            Line("covariance 25216x768 float32", "", "torch C += X.T @ X"),
            Line("covariance 25216x768 bfloat16", "torch, X.float() first", "torch C += X.T @ X"),
            Line("covariance 6304x3072 float32", "", "torch C += X.T @ X"),
            Line("covariances 12 layers of 1576x768 float32", "", "torch loop, X.float().T @ X.float()"),
        ),
    ),
    Table(
        "Null-space projectors, float32",
        "null_space",
        (
            Line("projectors 12x768 float32, vit-like", "official: full SVD loop, dense", "eigh batched, dense"),
            Line("projectors 12x768 float32, rank 64", "official: full SVD loop, dense", "eigh batched, dense"),
            Line("projectors 12x384 float32", "official: full SVD loop, dense", "eigh batched, dense"),
            Line("projectors 12x4 float32", "official: full SVD loop, dense", "eigh batched, dense"),
        ),
        "leak",
        "the leak, the largest protected energy that passes, in units of the cut (at most 1e-2 is wanted)",
    ),
    Table(
        "Projected Adam step",
        "projection",
        (
            Line("prompts 12 x (4 x 768), rank 64", "official loop", "stacked thin, fused Adam"),
            Line("prompts 12 x (100 x 768), rank 300", "official loop", "thin loop, fused Adam"),
            Line("LoRA factors of ViT-B/16, rank 64", "official loop", "thin loop, fused Adam"),
            Line("full weights, 1 block of ViT-B/16, rank 64", "official loop", "thin loop, fused Adam"),
            Line("full weights, 1 block of ViT-B/16, rank 300", "official loop", "thin loop, fused Adam"),
        ),
    ),
    Table(
        "Batched QR, float32",
        "orthogonal_qr",
        (
            Line("qr 48x768x16 condition 1e+01 forward", "", "linalg.qr"),
            Line("qr 48x768x16 condition 1e+01 forward + backward", "", "linalg.qr"),
            Line("qr 24x768x64 condition 1e+01 forward", "", "linalg.qr"),
            Line("qr 96x768x4 condition 1e+07 forward", "", "linalg.qr"),
            Line("penalty 72 matrices", "official loop"),
        ),
        meaning="relative error of Q R, or of the gradient, against float64",
    ),
    Table(
        "LoRA stack of a ViT-B block, forward and backward",
        "lora_stack",
        (
            Line("layers of a block, 10 tasks, 1 images", "official rebuild", "frozen layers alone"),
            Line("layers of a block, 10 tasks, 8 images", "official rebuild", "frozen layers alone"),
            Line("penalty of a block, 10 tasks", "official"),
        ),
        meaning="relative error against float64. The frozen layers without any adapter are the yardstick",
        first_meaning="relative difference from the official form. The frozen layers without any adapter are the "
        "yardstick",
    ),
    Table(
        "Attention with a prefix, float32",
        "prefix_attention",
        (
            Line("VPT-deep ViT width 384", "prompts as rows"),
            Line(
                "prefix attention 8x6, 197 tokens of 64 + 100 shared, float32, forward + backward",
                "softmax written out",
                "torch concat + SDPA",
            ),
            Line(
                "prefix attention 8x6, 197 tokens of 64 + 100 shared, float32, prefix alone",
                "softmax written out",
                "torch concat + SDPA",
            ),
            Line(
                "prefix attention 64x6, 2 queries of 198 tokens of 64 + 53 shared, float32, forward + backward",
                "softmax written out",
                "torch concat + SDPA",
            ),
            Line("prefix attention 64x6, 17 tokens of 64", "softmax written out", "torch concat + SDPA"),
        ),
    ),
    Table(
        "Distillation loss of two heads, forward and backward",
        "distillation",
        (
            Line("two heads 64x20 float32", "official", "eager torch"),
            Line("two heads 256x100 float32", "official", "eager torch"),
            Line("two heads 256x1000 float32", "official", "eager torch"),
            Line("two heads 256x1000 bfloat16", "official", "eager torch"),
            Line("two heads 512x32000 float32", "official", "eager torch"),
            Line("decoupled 256x1000 float32", "official"),
            Line("linear heads 2048x64", "", "eager torch"),
        ),
        meaning="relative error of loss and gradients, the largest, against float64",
    ),
    Table(
        "Step with a trainable projection",
        "weight_projection",
        (
            Line("FTPAdamW step, 4 blocks of ViT-B/16, 0% projected", "official loop", "AdamW fused"),
            Line("FTPAdamW step, 4 blocks of ViT-B/16, 30% projected", "official loop", "AdamW fused"),
            Line("FTPAdamW step, 4 blocks of ViT-B/16, 100% projected", "official loop", "AdamW fused"),
            Line("FTPAdamW step, ViT-B/16, 30% projected", "official loop", "AdamW fused"),
            Line("FTPAdamW step, ResNet-50, 30% projected", "official loop", "AdamW fused"),
            Line("FTPSGD step, 4 blocks of ViT-B/16, 30% projected", "official loop", "SGD fused"),
        ),
        meaning="relative error of W - W_0 against float64. Torch's fused AdamW and SGD, which project nothing, are "
        "the yardstick here",
    ),
    Table(
        "One task of KDP, teacher and student phase",
        "kdp_schedule",
        (Line("kdp task", "official schedule", "frozen, query shared"),),
        meaning="relative difference of the final predictions. The last column caches nothing, as with augmentation",
    ),
    Table(
        "Whole optimizer step",
        "optim",
        (
            Line("optimizer step, embedded model", "official loop", "AdamW fused"),
            Line("optimizer step, ViT-B/16 prompts M=4, rank 64", "official loop", "AdamW fused"),
            Line("optimizer step, 2 blocks of ViT-B/16, rank 64", "", "AdamW fused"),
        ),
        meaning="relative error against float64. Torch's fused AdamW, which projects nothing, is the yardstick here",
    ),
)


def cell(row: dict[str, Any] | None, measure: str) -> str:
    """How much longer a variant takes, and how wrong it is."""
    if row is None:
        return ""
    shown = f"{row['times_ours']:.2g}" if row["times_ours"] < 10 else f"{row['times_ours']:.0f}"
    return f"{shown}x ({row[measure]:.0e})"


def time(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def table_lines(table: Table) -> Iterator[str]:
    """Markdown of one table."""
    record = json.loads((RESULTS / f"{table.file}.json").read_text())
    new = "schema" in record  # the first files had minima alone
    cases = {result["case"]: result for result in record["results"]}
    yield f"| {table.title} | ours | the official way takes | torch takes |"
    yield "|---|---:|---:|---:|"
    for line in table.lines:
        named = [result for name, result in cases.items() if name.startswith(line.case)]
        found = [cases[line.case]] if line.case in cases else named
        if len(found) != 1:
            raise SystemExit(f"{table.file}.json: {len(found)} cases begin with {line.case!r}")
        rows = {row["variant"]: row for row in found[0]["rows"] if "failed" not in row}
        wanted = [name for name in ("ours", line.official, line.torch) if name]
        if missing := [name for name in wanted if name not in rows]:
            raise SystemExit(f"{table.file}.json: {found[0]['case']} has no time for {missing}")
        ours = rows["ours"]
        others = " | ".join(cell(rows.get(name), table.measure) for name in (line.official, line.torch))
        shown = f"{time(ours['median_s'])} ± {100 * ours['spread']:.0f} %" if new else time(ours["min_s"])
        yield f"| {found[0]['case']} | {shown} ({ours[table.measure]:.0e}) | {others} |"
    machine = record["environment"]
    meaning = table.meaning if new or not table.first_meaning else table.first_meaning
    how = "median of blocks in two processes ± its spread" if new else "minimum of several interleaved rounds"
    yield ""
    yield (
        f"In brackets: {meaning}. Process CPU time, {how}, one thread of "
        f"{machine['cpu']}, torch {machine['torch']}, commit {machine['commit'].rstrip('+')}."
    )


def device_lines(folder: Path) -> Iterator[str]:
    """A GPU's own table: every case of its files, ours beside the best of the others."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    yield f"| {records[0]['environment']['device']} | ours | of floor | the quickest other takes |"
    yield "|---|---:|---:|---:|"
    for result in (result for record in records for result in record["results"]):
        rows = {row["variant"]: row for row in result["rows"] if "failed" not in row}
        if "ours" not in rows:
            raise SystemExit(f"{folder.name}: {result['case']} has no time for ours")
        ours = rows["ours"]
        others = [row for name, row in rows.items() if not name.startswith("ours") and not row.get("yardstick")]
        best = min(others, key=lambda row: float(row["times_ours"]), default=None)
        floor = f"{ours['floor_percent']:.0f} %" if ours["floor_percent"] is not None else ""
        other = f"{cell(best, 'error')}, {best['variant']}" if best else ""
        yield f"| {result['case']} | {time(ours['median_s'])} ({ours['error']:.0e}) | {floor} | {other} |"
    machine = records[0]["environment"]
    commits = ", ".join(sorted({record["environment"]["commit"].rstrip("+") for record in records}))
    yield ""
    how = f"{machine['clock']}, torch {machine['torch']}, commit {commits}"
    yield f"In brackets: relative error against float64. {how}."


def block() -> str:
    """The Markdown between the markers: the CPU's tables, then one for each GPU that has results."""
    tables = ["\n".join(table_lines(table)) for table in TABLES]
    devices = sorted(path for path in RESULTS.parent.iterdir() if path.is_dir() and path != RESULTS)
    tables += ["\n".join(device_lines(path)) for path in devices if any(path.glob("*.json"))]
    return "\n\n".join(tables)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README}: the markers {BEGIN} and {END} are not there")
    fresh = f"{before}{BEGIN}\n{block()}\n{END}{after}"
    if fresh == text:
        return 0
    if options.check:
        sys.stdout.write("README.md does not say what the benchmark results say; run scripts/readme_benchmarks.py\n")
        return 1
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
