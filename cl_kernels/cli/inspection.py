"""`cl-kernels inspect`: what a safetensors file holds. Reads numbers and text; executes nothing."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cl_kernels.cli import _console
from cl_kernels.errors import CheckpointError

if TYPE_CHECKING:
    import typer
    from torch import Tensor

_PICKLES = ((b"PK\x03\x04", "a zip archive, as torch.save writes it"), (b"\x80", "a pickle"))
_SHOWN = 160  # characters of a metadata value, and tensors of a file, that are shown without --all
_LISTED = 20


def register(app: "typer.Typer") -> None:
    """Add the command."""
    from typer import Argument, Option, echo

    @app.command(name="inspect")
    def inspect(
        file: Annotated[Path, Argument(metavar="FILE.safetensors")],
        as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of tables")] = False,
        everything: Annotated[bool, Option("--all", help="List every tensor, and metadata in full")] = False,
    ) -> None:
        """Show what a safetensors file holds: subspaces with ranks and errors, run checkpoints, backbone weights."""
        facts = examine(file)
        if as_json:
            echo(json.dumps(facts, indent=1))
        else:
            show(facts, everything=everything)


def examine(path: Path) -> dict[str, Any]:
    """Kind, metadata and tensors of a file; for subspaces rank, energy and orthogonality error of every layer.

    JSON values only. Raises CheckpointError for pickles (told by their first bytes), damaged files and subspace files
    whose bases are not orthonormal; OSError for unreadable ones.
    """
    from safetensors import SafetensorError, safe_open

    from cl_kernels.continual import checkpoint

    refuse_pickles(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, no mapping
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    kind = metadata.get("format") or ("backbone" if "architecture" in metadata else "safetensors")
    own = _by_kind(kind, path, metadata)
    names = _paths(json.loads(metadata["tree"])) if kind == checkpoint.FORMAT else {}
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "kind": kind,
        "metadata": metadata,
        "parameters": sum(value.numel() for value in tensors.values()),
        "tensors": [_tensor(names.get(name, name), value) for name, value in tensors.items()],
        **own,
    }


def refuse_pickles(path: Path) -> None:
    """Raise CheckpointError if the file is a pickle, which could run code when it is loaded."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: eight bytes of length, which may look like anything, then the header's brace
        return
    for magic, what in _PICKLES:
        if start.startswith(magic):
            raise CheckpointError(f"{path}: {what}, which can run code when loaded; only safetensors files are read")


def _by_kind(kind: str, path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """What is known of the package's own files besides their tensors."""
    from cl_kernels.continual import checkpoint
    from cl_kernels.subspace import SubspaceStore

    if kind == "cl_kernels.subspace":
        store = SubspaceStore.load(path)
        free = store.capacity()
        layers = [
            {**row, "tasks_left": _ended(row["tasks_left"]), "free": free[row["layer"]]} for row in store.report()
        ]
        return {"layers": layers, "provenance": store.provenance}
    if kind == "cl_kernels.covariances":
        return {"covariances": _statistics(path)}
    if kind == checkpoint.FORMAT:
        import torch

        tree = checkpoint.load(path, fingerprint=metadata.get("fingerprint", ""), device=torch.device("cpu"))
        return {"run": _scalars(tree), "layers": _reported(tree)}
    return {}


def _ended(tasks: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "no end" if tasks == float("inf") else tasks


def _statistics(path: Path) -> list[dict[str, Any]]:
    """Dimension, counts and mean energy of a row for every covariance."""
    from cl_kernels.subspace import Covariance, load_covariances

    rows = []
    for name, value in load_covariances(path).items():
        parts = {"": value} if isinstance(value, Covariance) else {"left": value.left, "right": value.right}
        for part, moments in parts.items():
            energy = float(moments.matrix.diagonal().double().sum())
            rows.append(
                {"layer": name, "part": part, "dimension": len(moments.matrix), "rows": moments.rows,
                 "count": moments.count, "centred": moments.centred,
                 "energy": energy / moments.count if moments.count else None}
            )  # fmt: skip
    return rows


def _paths(node: Any, path: str = "") -> dict[str, str]:
    """Where in a checkpoint's tree each of its numbered tensors stands, such as method.parameters.prompts.0."""
    if not isinstance(node, dict):
        return {}
    ((kind, body),) = node.items()
    if kind in ("tensor", "device tensor"):
        return {body: path.removeprefix(".")}
    children = body if kind == "dict" else enumerate(body)
    found: dict[str, str] = {}
    for name, child in children:
        found.update(_paths(child, f"{path}.{name}"))
    return found


def _scalars(tree: Any) -> dict[str, Any]:
    """Numbers and words of the two upper levels of a checkpoint: task, epoch, step and the like."""
    found: dict[str, Any] = {}
    if isinstance(tree, dict):
        for name, value in tree.items():
            if isinstance(value, dict):
                plain = {f"{name}.{k}": v for k, v in value.items() if isinstance(v, str | int | float | bool)}
                found.update(plain)
            elif isinstance(value, str | int | float | bool):
                found[str(name)] = value
    return found


def _reported(tree: Any) -> list[dict[str, Any]]:
    """The subspace report a method keeps in its state: parameter -> side -> {dim, protected, energy}."""
    if not isinstance(tree, dict):
        return []
    report = tree.get("report")
    if isinstance(report, dict):
        return [
            {"layer": layer, "side": side, "dimension": entry.get("dim"), "rank": entry.get("protected"),
             "energy": entry.get("energy"), "condition": None, "orthogonality_error": None,
             "free": 1 - entry.get("protected", 0) / entry["dim"] if entry.get("dim") else None,
             "added": entry.get("added"), "tasks_left": entry.get("tasks_left")}
            for layer, sides in report.items() for side, entry in sides.items()
        ]  # fmt: skip
    return next((rows for value in tree.values() if (rows := _reported(value))), [])


def _tensor(name: str, value: "Tensor") -> dict[str, Any]:
    import torch

    norm = float(torch.linalg.vector_norm(value, dtype=torch.float64)) if value.is_floating_point() else None
    finite = norm is None or bool(torch.isfinite(value).all())
    return {
        "name": name,
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "norm": norm if finite else None,
        "finite": finite,
    }


def show(facts: dict[str, Any], *, everything: bool) -> None:
    """The facts as tables."""
    console = _console.console()
    size = f"{facts['bytes']:,} bytes, {len(facts['tensors'])} tensors, {facts['parameters']:,} numbers"
    console.print(f"{facts['file']}: {facts['kind']}, {size}", markup=False)
    plain = _console.listing()
    known = {k: v for k, v in facts["metadata"].items() if k not in ("ties", "provenance", "tree")}
    for name, value in {**known, **facts.get("provenance", {}), **facts.get("run", {})}.items():
        text = str(value)
        long = len(text) > _SHOWN and not everything
        plain.add_row(name, f"{text[:_SHOWN]}... ({len(text)} characters)" if long else text)
    console.print(plain)
    if facts.get("layers"):
        console.print(_layer_table(facts["layers"]))
    if facts.get("covariances"):
        console.print(_statistics_table(facts["covariances"]))
    listed = facts["tensors"] if everything else facts["tensors"][:_LISTED]
    table = _console.table("tensor", "shape", "dtype", "norm")
    for tensor in listed:
        norm = "NaN or infinity" if not tensor["finite"] else _number(tensor["norm"], ".4g")
        table.add_row(tensor["name"], "x".join(map(str, tensor["shape"])) or "scalar", tensor["dtype"], norm)
    console.print(table)
    if len(listed) < len(facts["tensors"]):
        console.print(f"... and {len(facts['tensors']) - len(listed)} more (--all lists them)")


def _layer_table(layers: list[dict[str, Any]]) -> Any:
    columns = ("layer", "side", "size", "protected", "energy", "condition", "orthogonality error", "free", "last task",
               "tasks left")  # fmt: skip
    table = _console.table(*columns)
    for row in layers:
        table.add_row(
            row["layer"], row["side"], str(row["dimension"]), "dense" if row["rank"] is None else str(row["rank"]),
            _number(row["energy"], ".1%"), _number(row["condition"], ".1e"), _number(row["orthogonality_error"], ".1e"),
            _number(row["free"], ".1%"), _number(row.get("added"), "+.3g"), _left(row.get("tasks_left")),
        )  # fmt: skip
    return table


def _left(tasks: float | str | None) -> str:
    return tasks if isinstance(tasks, str) else _number(tasks, ".0f")


def _statistics_table(rows: list[dict[str, Any]]) -> Any:
    table = _console.table("covariance of", "part", "size", "rows", "count", "centred", "energy of a row")
    for row in rows:
        table.add_row(
            row["layer"], row["part"] or "-", str(row["dimension"]), str(row["rows"]), f"{row['count']:g}",
            "yes" if row["centred"] else "no", _number(row["energy"], ".4g"),
        )  # fmt: skip
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
