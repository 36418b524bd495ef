"""docs/null_space.md tells the truth: tables come from files, the files from the code, and what it names is there."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cl_kernels import CovarianceCollector, data, ops, rules

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "null_space.md").read_text(encoding="utf-8")
FOUND: list[dict[str, Any]] = json.loads((ROOT / "docs" / "figures" / "stability.json").read_text(encoding="utf-8"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_files() -> None:
    filled = script("null_space_page").filled
    assert filled(PAGE) == PAGE, "python scripts/null_space_page.py"
    changed = re.sub(r"(\d)\.(\d) %", r"\1.9\2 %", PAGE)
    assert changed != PAGE
    assert filled(changed) == PAGE
    with pytest.raises(SystemExit, match="no section"):
        filled("a page without markers")


def test_the_kept_numbers_are_those_of_the_code() -> None:
    """The digits at three thresholds, again: platforms differ in the last digits, changed filters in the first."""
    pytest.importorskip("timm", reason="the backbone is timm's")
    kept = FOUND[0]
    at = (2, 12, 22)
    again = script("figure_stability").sweep(kept["data"], taus=[kept["taus"][i] for i in at])
    for edge, curve in again["curves"].items():
        for measure, values in curve.items():
            wanted = [kept["curves"][edge][measure][i] for i in at]
            assert values == pytest.approx(wanted, rel=0.02), (edge, measure)


def test_what_the_page_concludes() -> None:
    """Fewer steps, a steadier projector; a soft edge stays below the hard cut's energy at the same free share."""
    assert [entry["data"] for entry in FOUND] == ["digits", "tin32_novel100"]
    for entry in FOUND:
        rows = [entry["summary"][edge] for edge in ("hard cut", "4 steps", "3 steps", "2 steps")]
        for measure in ("change", "worst_energy", "worst_layer"):
            values = [row[measure] for row in rows]
            assert values == sorted(values, reverse=True), measure
        assert rows[2]["change"] < 0.8 * rows[0]["change"]
        assert rows[2]["worst_energy"] < 0.9
        shares = [row["free_share"] for row in rows]
        assert max(shares) - min(shares) < 0.01, "otherwise steadiness would be bought with freedom"


def test_the_figure_is_small_and_whole() -> None:
    figure = (ROOT / "docs" / "figures" / "stability.svg").read_text(encoding="utf-8")
    assert len(figure) < 100_000
    assert not re.findall(r'href="(?!#)[^"]*"', figure), "it loads nothing from elsewhere"
    assert all(label in figure for label in ("hard cut", "3 steps", "change of P", "digits"))


def test_what_it_names_exists() -> None:
    for name in re.findall(r"`(\w+)\((?:cov|covariance)", PAGE):
        assert callable(getattr(ops, name)), name
    named = set(re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE))
    assert {"Energy", "Threshold", "Rank", "Knee"} <= named
    assert all(hasattr(rules, name) for name in named)


def test_its_example_runs() -> None:
    pytest.importorskip("timm", reason="the backbone is timm's")
    import cl_kernels as clk

    backbone = data.load_backbone()
    images = backbone.preprocessing(data.load("digits").train.tensors()[:20])
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    names: dict[str, Any] = {"clk": clk, "torch": torch, "model": backbone.model, "loader": [(images, None)]}
    exec(compile(code, "docs/null_space.md", "exec"), names)
    assert isinstance(names["collector"], CovarianceCollector)
    assert names["projector"].dim == 128
