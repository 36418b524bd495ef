"""What `make gpu` leaves behind: report.json for machines, table.md for people. Needs neither torch nor the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["markdown", "write"]


def write(out: Path, report: dict[str, Any]) -> None:
    """Both files, with the benchmarks' and resources' own files taken in."""
    out.mkdir(parents=True, exist_ok=True)
    whole = report | {"benchmarks": _read_all(out / "bench"), "resources": _read(out / "resources.json")}
    (out / "report.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(whole), encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _read_all(folder: Path) -> dict[str, Any]:
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def markdown(report: dict[str, Any]) -> str:
    """Device and commit, the units, resources, benchmarks, and the rows of the table of what was last verified."""
    changed = " with changes" if report.get("changed") else ""
    lines = [
        f"# {report.get('device') or 'no GPU'}, commit {str(report.get('commit'))[:10]}{changed}",
        "",
        f"{report.get('date')}, torch {report.get('torch')}, CUDA {report.get('cuda')}, driver {report.get('driver')}",
        "",
        "| unit | outcome | seconds |",
        "|---|---|---:|",
    ]
    lines += [f"| {key} | {one['status']} | {one.get('seconds', '')} |" for key, one in report["units"].items()]
    lines += ["", "## Last verified", "", *verified(report)]
    if report.get("resources"):
        lines += ["", "## Resources", "", *resources(report["resources"])]
    for room, found in report.get("benchmarks", {}).items():
        lines += ["", f"## {room}", "", *_benchmark(found)]
    return "\n".join(lines) + "\n"


def verified(report: dict[str, Any]) -> Iterator[str]:
    """A row a room: the commit, if its tests and all three tools of the sanitizer are clean, and its share of floor."""
    yield "| room | device | commit last seen correct | share of floor |"
    yield "| --- | --- | --- | --- |"
    for room, found in report.get("benchmarks", {}).items():
        about = [one["status"] for key, one in report["units"].items() if f"test_{room}_gpu" in key]
        clean = len(about) >= 4 and set(about) == {"done"}
        commit = str(report.get("commit"))[:10] if clean else f"not clean: {_worst(report, room)}"
        yield f"| {room} | {report.get('device')} | {commit} | {_share(found)} |"


def _worst(report: dict[str, Any], room: str) -> str:
    about = {key: one["status"] for key, one in report["units"].items() if f"test_{room}_gpu" in key}
    bad = [f"{key} {status}" for key, status in about.items() if status != "done"]
    return bad[0] if bad else f"{len(about)} of 4 units were run"


def _share(found: dict[str, Any]) -> str:
    shares = [
        row["floor_percent"]
        for result in found["results"]
        for row in result["rows"]
        if row["variant"] == "ours" and row.get("floor_percent") is not None
    ]
    return f"{min(shares):.0f} to {max(shares):.0f} %" if shares else "–"


def resources(found: list[dict[str, Any]]) -> Iterator[str]:
    """For each kernel and architecture the most that any of its compiled forms takes."""
    yield "| kernel | arch | forms | registers | shared bytes | spilled bytes |"
    yield "|---|---|---:|---:|---:|---:|"
    for kernel, arch in sorted({(one["kernel"], one["arch"]) for one in found}):
        forms = [one for one in found if (one["kernel"], one["arch"]) == (kernel, arch)]
        most = {name: max(one[name] for one in forms) for name in ("registers", "shared", "spilled")}
        yield f"| {kernel} | {arch} | {len(forms)} | {most['registers']} | {most['shared']} | {most['spilled']} |"


def _benchmark(found: dict[str, Any]) -> Iterator[str]:
    yield "| case | variant | cold us | graph us | of floor | times ours | error |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for result in found["results"]:
        for row in result["rows"]:
            name = f"{result['case']} | {row['variant']}"
            if "failed" in row:
                yield f"| {name} | {row['failed']} | | | | |"
                continue
            graph = f"{1e6 * row['graph_s']:.1f}" if row.get("graph_s") else str(row.get("graph_reason", ""))[:40]
            floor = f"{row['floor_percent']:.0f} %" if row.get("floor_percent") is not None else ""
            ratio = f"{row['times_ours']:.2f}" if row.get("times_ours") is not None else ""
            yield f"| {name} | {1e6 * row['median_s']:.1f} | {graph} | {floor} | {ratio} | {row['error']:.0e} |"
