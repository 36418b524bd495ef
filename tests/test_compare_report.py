"""The report of a comparison: its numbers are those of the results, whatever is missing is said, nothing is fetched."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from compare_results import ARMS, SIZES, results, with_pictures
from html_pages import Page

from cl_kernels import pages
from cl_kernels.compare.report import numbers, render, svg, write_report
from cl_kernels.compare.report.curves import COLUMNS, curves
from cl_kernels.errors import CheckpointError

pytest.importorskip("jinja2", reason="the report is a jinja2 template")

VERDICTS = ["prompts", "full", "other", "too-close"]


def page_of(found: dict[str, Any], folder: Path | None = None) -> Page:
    return Page(render(found, folder)[0])


@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_answer_comes_first_then_the_rest_in_order(verdict: str) -> None:
    found = results(verdict=verdict)
    page = page_of(found)
    words = page.text
    assert words.index(found["decision"]["sentence"]) < words.index("Accuracy against data size")
    assert words.count("Prompts or full fine-tuning?") == 2, "as the title and as the heading"
    titles = re.findall(r"<h2[^>]*>([^<]+)</h2>", render(found)[0])
    assert titles == [
        "Accuracy against data size", "Prompts minus full fine-tuning", "The verdict now and with more data",
        "What each arm costs", "Accuracy against cost", "What each looked at", "Evidence about the data",
        "What happened during training", "How it was decided", "What was published before",
        "What would change the verdict", "Using the best weights", "What is missing, and why",
    ]  # fmt: skip
    for text in (*found["decision"]["reasons"], *found["decision"]["changes"], *found["missing"]):
        assert text in words


def test_how_sure_the_answer_is() -> None:
    def told(verdict: str, low: float, high: float, **more: Any) -> str:
        found = results(verdict=verdict)
        found["decision"] |= more
        found["decision"]["at"]["1x"] |= {"low": low, "high": high, "verdict": verdict}
        return page_of(found).text

    assert "+1.0 to +3.0 points, leaves out no difference; 20 of 20 re-draws name" in told("prompts", 0.01, 0.03)
    assert "−1.0 to +3.0 points, includes no difference at all." in told("too-close", -0.01, 0.03)
    words = told("prompts", -0.01, 0.03, tie={"prefer": "storage", "broken": True})
    assert "includes no difference at all; your preference decided." in words
    words = told("too-close", 0.01, 0.03, underfit={"full": 0.4, "winner": 0.1})
    assert "no verdict is given: full fine-tuning had not fitted" in words
    assert "no verdict is given: the rest of the rule" in told("too-close", 0.01, 0.03)
    against = {name: {"gap": 0.02, "low": 0.01, "high": 0.03} for name in ("prompts", "full")}
    words = told("other", -0.01, 0.03, other={"arm": "lora", "wins": True, "against": against})
    assert "+1.0 to +3.0 points ahead of prompts and +1.0 to +3.0 points ahead of full fine-tuning (95 %" in words


def test_the_page_needs_nothing_but_itself() -> None:
    text = render(results())[0]
    page = Page(text)
    ids = [str(a["id"]) for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert not page.all("link")
    assert not re.search(r"(?:https?:)?//[a-z]", text.replace("// ", "")), "nothing may be fetched"
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:") or value[1:] in ids, (tag, value)
    for reference in re.findall(r"url\(#([^)]+)\)|aria-labelledby=\"([^\"]+)\"", text):
        assert "".join(reference) in ids
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (policy,) = [str(a["content"]) for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src '{pages.script_hash(script)}'" in policy, "this script and no other may run"
    assert "default-src 'none'" in policy


def test_the_numbers_are_those_of_the_results() -> None:
    found = results()
    page = page_of(found)
    words = page.text
    for one in found["decision"]["accuracy"]:
        mean, low, high = (f"{100 * one[end]:.1f}" for end in ("mean", "low", "high"))
        assert f"{mean} ({low} to {high})" in words
    for one in found["decision"]["gaps"]:
        assert f"{100 * one['mean']:+.1f}".replace("-", "−") in words
    for one in found["cost"]:
        assert f"{one['trainable_parameters']:,}" in words
        assert numbers.number(one["latency_ms"]) in words
    for stage in found["budget"]["stages"]:
        assert stage["stage"] in words
    assert "41.8" not in words
    assert "0.418" in words, "LogME with three digits"
    for probe in (found["probes"]["linear"], *found["probes"]["knn"].values(), *found["probes"]["layers"]):
        assert f"{100 * probe['accuracy']:.1f}" in words
    assert "interval 520 to 980" in words


def test_every_mark_of_a_chart_is_a_value_of_the_results() -> None:
    text = render(results())[0]
    charts = {
        found.group(1): found.group(0) for found in re.finditer(r'<svg class="chart" id="([^"]+)".*?</svg>', text)
    }
    assert set(charts) == {
        "accuracy-chart", "gap-chart", "time-chart", "bytes-chart", "layers-chart", "train-loss-chart",
        "test-loss-chart", "mass-chart", "ruler-chart",
    }  # fmt: skip
    found = results()
    expected = {(float(one["size"]), 100 * one["mean"]) for one in found["decision"]["accuracy"]}
    drawn = re.findall(r'data-x="([^"]+)" data-y="([^"]+)"', charts["accuracy-chart"])
    assert {(float(x), float(y)) for x, y in drawn} == expected
    assert len(drawn) == len(ARMS) * len(SIZES)
    for chart in charts.values():
        places = re.findall(r'class="pt [^>]*aria-label="([^"]+)"[^>]*translate\(([-\d.]+) ([-\d.]+)\)', chart)
        assert len(places) >= (4 if 'id="ruler' in chart else 5)
        for told, x, y in places:
            assert re.search(r"\d", told)
            assert svg.LEFT - 1 <= float(x) <= svg.RIGHT + 1
            assert svg.TOP - 1 <= float(y) <= svg.BOTTOM + 1


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path) -> None:
    bare = {
        "schema": "cl_kernels.compare/1",
        "decision": {"verdict": "too-close", "sentence": "Too close to call: nothing could be measured."},
        "sizes": [],
    }
    page = page_of(bare)
    assert "Too close to call" in page.text
    assert not page.all("table")
    assert not page.all("svg")
    for section in ("No arm finished", "could not be measured", "Costs were not measured", "There are no pictures"):
        assert section in page.text
    assert write_report(bare, tmp_path).read_text() == render(bare)[0]
    found = results()
    for name in [key for key in found if key not in ("schema", "decision")]:
        page_of({key: value for key, value in found.items() if key != name})
    for name in [key for key in found["decision"] if key != "sentence"]:
        page_of(found | {"decision": {key: value for key, value in found["decision"].items() if key != name}})


def test_numbers_that_are_not_there_are_dashes() -> None:
    found = results()
    found["cost"][0] |= {"latency_ms": None, "peak_bytes": math.nan}
    found["decision"]["accuracy"] = [one for one in found["decision"]["accuracy"] if one["arm"] != "ftp"]
    found["runs"][0]["curve"][0]["train_loss"] = None
    page = page_of(found)
    assert "nan" not in page.text.lower()
    assert "None" not in page.text
    assert "Not drawn, because no run finished: FTP." in page.text


HOSTILE = '<script>alert("1")</script>\'|`*_\n# x'


def hostile(value: Any) -> Any:
    """The same tree, every text in it replaced but the ones that name things."""
    if isinstance(value, dict):
        return {
            key: item
            if key in ("schema", "arm", "name", "arms", "verdict", "file", "method", "group")
            else hostile(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    found = hostile(with_pictures(results(), tmp_path))
    for arm in found["arms"]:
        arm["title"] = HOSTILE
    text, plain = render(found, tmp_path)
    page = Page(text)
    assert len(page.all("script")) == 1
    assert page.text.count("alert(") > 50
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "h4", "p", "section", "nav", "ul",
        "li", "a", "figure", "figcaption", "b", "span", "svg", "g", "path", "circle", "rect", "defs", "clippath",
        "text", "details", "summary", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "strong", "img",
        "pre", "code", "script", "article",
    }, "what a name holds never becomes a tag"  # fmt: skip
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    outside = re.sub(r"^(`{3,})python\n.*?^\1$", "", plain, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)<script", outside)
    assert "\n# x" not in outside
    assert all(line.count("|") - line.count("\\|") >= 2 for line in outside.splitlines() if line.startswith("|"))


def test_pictures_are_in_the_page_and_nothing_outside_the_folder_is(tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = with_pictures(results(), out)
    page = page_of(found, out)
    images = page.all("img")
    assert len(images) == 2 * (1 + 2 * 2)
    assert all(str(image["src"]).startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert "Prompts, deep right, Full fine-tuning wrong" in page.text
    assert "there is no such test image" in page.text
    assert "predicted by Full fine-tuning" in page.text
    assert "30.0 % of it on prompts" in page.text
    (tmp_path / "secret.png").write_bytes((out / "figures" / "37.png").read_bytes())
    found["pictures"]["images"][0]["file"] = "../secret.png"
    found["pictures"]["images"][1]["file"] = "figures/gone.png"
    page = page_of(found, out)
    assert len(page.all("img")) == len(images) - 2
    assert "(the file figures/gone.png is not there)" in page.text


def test_markdown_says_the_same(tmp_path: Path) -> None:
    found = with_pictures(results(), tmp_path)
    write_report(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Prompts or full fine-tuning?\n")
    assert f"**{found['decision']['sentence']}**" in text
    page = page_of(found, tmp_path)
    assert text.count("\n## ") == len(page.all("h2"))
    assert text.count("|---|") == len(page.all("table")), "every table of the page, those behind charts too"
    for one in found["decision"]["accuracy"]:
        assert f"{100 * one['mean']:.1f} ({100 * one['low']:.1f} to {100 * one['high']:.1f})" in text
    first = max(found["decision"]["accuracy"], key=lambda one: (one["size"] == SIZES[-1], one["mean"]))
    assert f"**{100 * first['mean']:.1f} ({100 * first['low']:.1f} to" in text, "the best of a column stands out"
    for line in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (tmp_path / line).is_file()


def test_curves_have_a_line_for_every_epoch() -> None:
    found = results(seeds=2, epochs=3)
    rows = list(csv.DictReader(io.StringIO(curves(found))))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(found["runs"]) * 3
    first = found["runs"][0]
    for index, row in enumerate(rows[:3]):
        step = first["curve"][index]
        assert (row["arm"], int(row["size"]), int(row["seed"])) == (first["arm"], first["size"], first["seed"])
        assert [float(row[name]) for name in ("epoch", "train_loss", "lr")] == [
            step[name] for name in ("epoch", "train_loss", "lr")
        ]
        told = first["test_loss_curve"][index]
        assert row["test_loss"] == ("" if told is None else repr(told))
    first["arm"] = "=cmd()"
    assert curves(found).splitlines()[1].startswith("'=cmd()")
    first["curve"][0]["validation_loss"] = 0.25
    assert next(csv.DictReader(io.StringIO(curves(found))))["validation_loss"] == "0.25"


def test_what_is_no_finished_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cl_kernels\.compare/1"):
        write_report({"schema": "cl_kernels.compare/9"}, tmp_path)
    with pytest.raises(CheckpointError, match="decision"):
        write_report({"schema": "cl_kernels.compare/1", "decision": {}}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    found = json.loads(json.dumps(results()))
    first = [write_report(found, tmp_path / name).parent for name in ("a", "b")]
    assert sorted(p.name for p in first[0].iterdir()) == ["curves.csv", "report.html", "report.md"]
    for file in first[0].iterdir():
        assert file.read_bytes() == (first[1] / file.name).read_bytes()


@pytest.mark.parametrize("sizes", [[50], [40, 80], [50, 51, 52, 1000, 100_000]])
def test_one_size_or_sizes_close_together(sizes: list[int]) -> None:
    assert page_of(results(sizes=sizes, seeds=1, epochs=1)).all("svg")


def test_long_curves_stay_light() -> None:
    text = render(results(epochs=200, seeds=1))[0]
    chart = re.search(r'<svg class="chart" id="train-loss-chart".*?</svg>', text)
    assert chart is not None
    assert chart.group(0).count('class="pt') <= 24 * len(ARMS)
    assert "epoch 200:" in chart.group(0), "the last value is one of those that can be asked for"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "–"), (0.0, "0"), (0.01234, "0.0123"), (4.567, "4.57"), (9.999, "10.0"), (1234.5, "1,230"),
        (-0.5, "−0.500"), (3e7, "3.00e+07"), (2e-6, "2.00e−06"), (999_999.0, "1.00e+06"),
    ],
)  # fmt: skip
def test_number(value: float | None, told: str) -> None:
    assert numbers.number(value) == told


def test_other_numbers() -> None:
    assert [numbers.points(v) for v in (0.042, -0.0031, 0.0, -0.0004, None)] == ["+4.2", "−0.3", "0.0", "0.0", "–"]
    assert [numbers.seconds(v) for v in (0.351, 12.0, 125, 3840, None)] == [
        "0.35 s",
        "12 s",
        "2 min 5 s",
        "1 h 4 min",
        "–",
    ]
    assert [numbers.size(v) for v in (0, 999, 12_345, 1_240_000, 3.2e9)] == [
        "0 B",
        "999 B",
        "12.3 kB",
        "1.24 MB",
        "3.20 GB",
    ]
    assert numbers.spread("81.2", "79.9", "82.6") == "81.2 (79.9 to 82.6)"
    assert numbers.spread("81.2", "–", "–") == "81.2"
    assert numbers.value_of({"a": {"b": math.inf}}, "a", "b") is None
    assert numbers.value_of({"a": True}, "a") is None


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (58.3, 86.7), (-3.2, 0.4), (97.1, 97.2), (5.0, 5.0), (0.0, 0.0)])
def test_ticks_hold_the_range_and_are_round(low: float, high: float) -> None:
    ticks = svg.linear_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1
    assert len({label for _, label in svg.tick_labels(ticks)}) == len(ticks)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("colours", "page"), [(pages.LIGHT, "#ffffff"), (pages.DARK, "#15171a")])
def test_series_stand_out_from_the_page_and_from_each_other(colours: tuple[str, ...], page: str) -> None:
    """WCAG 1.4.11: 3:1 against the page. Any two differ as seen by people without one kind of cone."""
    for colour in colours:
        lighter, darker = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3
    assert len(colours) == len(svg.SHAPES), "as many markers: a colour is never the only difference"
    for blind in (((1, 0, 0), (0, 1, 0), (0, 0, 1)), *CONES.values()):
        seen = [lab(apply(blind, colour)) for colour in colours]
        near = min(math.dist(a, b) for i, a in enumerate(seen) for b in seen[:i])
        assert near > 12, "a just noticeable difference is about 2.3"


# Viénot, Brettel and Mollon (1999): linear RGB as people see it who lack one kind of cone.
CONES = {
    "protan": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
    "deutan": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
}


def apply(matrix: tuple[tuple[float, ...], ...], colour: str) -> tuple[float, ...]:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return tuple(max(0.0, sum(a * b for a, b in zip(row, linear, strict=True))) for row in matrix)


def lab(linear: tuple[float, ...]) -> tuple[float, float, float]:
    r, g, b = linear
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)
