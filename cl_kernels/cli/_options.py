"""From command-line words and a TOML file to a checked RunConfig."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_kernels.cli._errors import UsageError

if TYPE_CHECKING:
    from cl_kernels.continual import RunConfig


def value(text: str) -> Any:
    """`text` as a TOML value (1, 1e-3, true, [1, 2], "x"), `none` as None, .5 as a float, else the string itself."""
    if text.strip().lower() in ("none", "null"):
        return None
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return float(text)  # .5, 5. and 1E-3 are floats to people, not to TOML
    except ValueError:
        return text


def pairs(texts: Iterable[str]) -> dict[str, Any]:
    """`key=value` words as a dict. Raises UsageError for a word without `=`, an empty key, or a key given twice."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, rest = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"--option: expected key=value, got {text!r}")
        if key in found:
            raise UsageError(f"--option: {key} is given twice")
        found[key] = value(rest)
    return found


def read_toml(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """The file's keys, dashes read as underscores. Raises UsageError for bad TOML and for unknown keys."""
    try:
        with open(path, "rb") as file:
            raw = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config: {path} is not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config: {path} is not UTF-8 text") from error
    except OSError as error:
        raise UsageError(f"--config: cannot read {path}: {error.strerror}") from error
    found = {key.replace("-", "_"): item for key, item in raw.items()}
    allowed = sorted(known)
    for key in found:
        if key not in allowed:
            raise UsageError(f"--config: {path}: unknown key {key!r}{nearest(key, allowed)}")
    return found


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean a or b?`, or the whole list when nothing is near."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known are {', '.join(known)}" if known else ""


def run_config(given: Mapping[str, Any], file: Path | None, options: Iterable[str]) -> RunConfig:
    """What the file says, overridden by what the command line says (entries of `given` that are not None).

    Raises UsageError for an unknown key or method, and RunConfig's ValueError or TypeError for a value out of range.
    """
    from cl_kernels import methods
    from cl_kernels.continual import RunConfig

    fields = {f.name for f in dataclasses.fields(RunConfig)}
    values = read_toml(file, fields - {"resume"}) if file is not None else {}
    said = {name: item for name, item in given.items() if item is not None}
    values = {**values, **said}
    extra, base = pairs(options), values.get("options", {})
    if not isinstance(base, Mapping):
        raise UsageError(f"--config: options must be a table, got {base!r}")
    values["options"] = {**base, **extra}
    method = values.get("method")
    if method is None:
        raise UsageError(f"METHOD is missing; known are {', '.join(sorted(methods.names()))}")
    if method not in methods.names():
        raise UsageError(f"method: unknown name {method!r}{nearest(str(method), methods.names())}")
    known = methods.options(method)
    for name in values["options"]:
        if name not in known:
            raise UsageError(f"--option: {method} has no option {name!r}{nearest(str(name), known)}")
    if values.get("stream") == "domain" and "tasks" not in values:
        values["tasks"] = None  # as many as there are domains
    if values.get("out") is None:
        data = Path(str(values.get("data", RunConfig.data))).stem
        values["out"] = Path("out") / f"{method}-{data}-seed{values.get('seed', RunConfig.seed)}"
    return RunConfig(**values)
