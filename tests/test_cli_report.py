"""report.html: whole, self-contained, valid, and with the numbers of the results it was made from."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from html_pages import Page

from cl_kernels.cli.report import charts, render, write_report
from cl_kernels.cli.report.summary import MEASURES, Spread, accuracy_curve, forgetting_curve, sections
from cl_kernels.errors import BackendUnavailableError, CheckpointError

pytest.importorskip("jinja2", reason="the report is a jinja2 template")


def result(method: str, seed: int, *, tasks: int = 3, subspace: bool = False, **extra: Any) -> dict[str, Any]:
    """Results with made-up numbers in the format of a run; the summaries are computed from the matrix."""
    draw = random.Random(f"{method}{seed}")
    matrix = [[round(draw.random(), 4) if j <= i else None for j in range(tasks)] for i in range(tasks)]
    last = [v for v in matrix[-1] if v is not None]
    lost = [max(matrix[k][j] or 0.0 for k in range(j, tasks - 1)) - last[j] for j in range(tasks - 1)]
    use = {"blocks.0.attn.qkv.weight": {"right": {"dim": 64, "protected": 17, "gain": 0.8, "energy": 0.951}}}
    return {
        "method": method,
        "seed": seed,
        "accuracy_matrix": matrix,
        "average_accuracy": sum(last) / tasks,
        "forgetting": sum(lost) / len(lost) if lost else 0.0,
        "task_incremental": {"average_accuracy": 0.9, "forgetting": 0.01},
        "feature_drift": {"final_relative": 0.123} if subspace else None,
        "subspace": [use, use, {}] if subspace else [{}] * tasks,
        "seconds": {"train": [1.0, 2.0, 3.0], "total": 7.25},
        "config": {"method": method, "data": "digits", "backbone": "embedded", "options": {"eta": 0.97}},
        "environment": {"torch": "2.x", "device": "cpu"},
        **extra,
    }  # fmt: skip


def shifted(clean: float, seed: int) -> dict[str, Any]:
    """What eval_shift adds, with made-up numbers that fall with severity."""
    draw = random.Random(seed)
    families = {n: [round(clean * (1 - 0.1 * s * draw.random()), 4) for s in range(1, 6)] for n in ("fog", "jpeg")}
    mean = sum(v for values in families.values() for v in values) / 10
    return {
        "clean": clean, "mean": mean, "relative": mean / clean, "families": families,
        "severities": [sum(v) / 2 for v in zip(*families.values(), strict=True)],
        "groups": {"weather": sum(families["fog"]) / 5, "digital": sum(families["jpeg"]) / 5},
    }  # fmt: skip


def many() -> list[dict[str, Any]]:
    return [result(m, s, subspace=m == "null-space") for m in ("linear", "full", "null-space") for s in range(3)]


def needs_matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="charts are drawn by matplotlib")


@pytest.mark.parametrize("plot", [True, False])
def test_page_is_valid_and_self_contained(plot: bool) -> None:
    if plot:
        needs_matplotlib()
    text = render(many(), plot=plot)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html")[0]["lang"] == "en"
    ids = [str(a["id"]) for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert not page.all("script")
    assert not page.all("link")
    assert not re.search(r"(?:https?:)?//[a-z]", text), "nothing may be fetched"
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or (value.startswith("#") and value[1:] in ids), (tag, value)
    for reference in re.findall(r"url\(#([^)]+)\)", text):
        assert reference in ids
    assert len(page.all("svg")) == (2 + 3 + 1 if plot else 0)


def test_charts_have_a_text_alternative_with_the_numbers() -> None:
    needs_matplotlib()
    results = many()
    text = render(results, plot=True)
    page = Page(text)
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        title = re.search(rf'<title id="{svg["aria-labelledby"]}">([^<]+)</title>', text)
        assert title is not None
        assert len(title.group(1)) > 40
    group = sections(results)[0].groups[0]
    last = group.mean_matrix()[-1]
    assert f"after task 3: {', '.join(f'{100 * v:.0f}' for v in last if v is not None)}" in text


def test_page_follows_light_and_dark() -> None:
    needs_matplotlib()
    text = render(many(), plot=True)
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert charts._INK not in text


@pytest.mark.parametrize("plot", [True, False])
def test_page_holds_the_numbers_of_the_results(plot: bool) -> None:
    if plot:
        needs_matplotlib()
    results = many()
    words = Page(render(results, plot=plot)).text
    for group in sections(results)[0].groups:
        for measure in MEASURES:
            spread = group.spread(measure)
            assert spread is None or measure.text(spread) in words
        for row in group.mean_matrix():
            for value in row:
                assert value is None or f"{100 * value:.1f}" in words
    for one in results:
        assert f"{100 * one['average_accuracy']:.1f}" in words
    assert "17/64 (95.1 %)" in words
    assert "options.eta 0.97" in words
    assert ("cl-kernels[plot]" in words) == (not plot)


def test_one_run_one_task() -> None:
    page = Page(render([result("linear", 0, tasks=1)]))
    assert "linear on digits: 1 tasks" in page.text


def test_quick_results_are_marked() -> None:
    assert "--quick" not in Page(render(many(), plot=False)).text
    one = result("full", 0)
    one["config"]["quick"] = True
    assert "Made with --quick" in Page(render([*many(), one], plot=False)).text


def test_a_control_that_protects_nothing_shows_no_subspace() -> None:
    assert "is protected" in Page(render([result("null-space", 0, subspace=True)], plot=False)).text
    assert "is protected" not in Page(render([result("matched-lr", 0, subspace=True)], plot=False)).text


@pytest.mark.parametrize("plot", [True, False])
def test_in_and_out_of_distribution_side_by_side(plot: bool) -> None:
    if plot:
        needs_matplotlib()
    results = [result(m, s) for m in ("full", "ftp") for s in range(2)]
    for number, one in enumerate(results[:3]):  # the last was run without: its method is shown by the other seed
        one["shift"] = shifted(one["average_accuracy"], number)
    text = render([*results, result("linear", 0, shift=None)], plot=plot)
    page = Page(text)
    words = page.text
    assert "In and out of distribution" in words
    shifts = [one["shift"] for one in results[:2]]
    for values in (
        [part["clean"] for part in shifts],
        [part["mean"] for part in shifts],
        [part["relative"] for part in shifts],
        [part["groups"]["weather"] for part in shifts],
        *([part["families"]["jpeg"][i] for part in shifts] for i in range(5)),
    ):
        spread = Spread.of(values)
        assert spread is not None
        assert spread.text() in words
    assert f"{100 * results[2]['shift']['mean']:.1f}" in words
    assert "Corrupted images: accuracy (%)" in words
    assert len(page.all("svg")) == (2 + 3 + 1 + 2 if plot else 0), "a curve for all, a map for each of the two"
    if plot:
        assert "severity of the corruption" in text
        severities = [sum(part["severities"][4] for part in shifts) / 2]
        assert f"{100 * severities[0]:.1f}" in text
    ids = [str(a["id"]) for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_without_corrupted_images_nothing_is_said_of_them() -> None:
    words = Page(render([result("full", 0, shift=None), result("full", 1)], plot=False)).text
    assert "orrupted" not in words


def test_hostile_names_stay_text() -> None:
    bad = '<script>alert("1")</script>'
    page = Page(render([result(bad, 0, label=bad, title=bad, environment={bad: bad})]))
    assert not page.all("script")
    assert page.text.count("alert") >= 3


def test_streams_are_not_averaged_together() -> None:
    plain, other = result("full", 0), result("full", 1, title="digits, inverted")
    longer = result("full", 2, tasks=4)
    found = sections([plain, other, longer])
    assert [len(s.groups[0].results) for s in found] == [1, 1, 1]
    labelled = sections([plain, result("full", 1, label="full, small step")])
    assert [g.label for g in labelled[0].groups] == ["full", "full, small step"]


def test_spread() -> None:
    assert Spread.of([0.5, 0.7, 0.6]) == Spread(pytest.approx(0.6), pytest.approx(0.1), 3)
    assert Spread.of([0.5, None, math.nan]) == Spread(0.5, None, 1)
    assert Spread.of([]) is None
    assert Spread(0.5, None, 1).text() == "50.0"
    assert Spread(0.5, 0.012, 3).text() == "50.0 ± 1.2"


def test_curves_by_hand() -> None:
    matrix = [[0.9, None, None], [0.5, 0.8, None], [0.6, 0.4, 1.0]]
    assert accuracy_curve(matrix) == pytest.approx([0.9, 0.65, 2 / 3])
    assert forgetting_curve(matrix) == pytest.approx([0.0, 0.4, (0.3 + 0.4) / 2])


def test_curves_end_in_the_summaries() -> None:
    one = result("full", 5, tasks=6)
    assert accuracy_curve(one["accuracy_matrix"])[-1] == pytest.approx(one["average_accuracy"])
    assert forgetting_curve(one["accuracy_matrix"])[-1] == pytest.approx(one["forgetting"])


def test_what_is_not_a_result_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        render([])
    with pytest.raises(CheckpointError, match="accuracy_matrix, average_accuracy, forgetting missing"):
        render([{"method": "full", "seed": 0}])
    with pytest.raises(CheckpointError, match="non-empty list of lists"):
        render([result("full", 0) | {"accuracy_matrix": []}])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(charts, "available", lambda: False)
    with pytest.raises(BackendUnavailableError, match=r"cl-kernels\[plot\]"):
        render(many(), plot=True)
    path = write_report(many(), tmp_path / "new" / "report.html")
    assert not Page(path.read_text()).all("svg")


def test_writing_leaves_nothing_else(tmp_path: Path) -> None:
    path = write_report(many()[:1], tmp_path / "report.html", plot=False)
    write_report(many()[:1], path, plot=False)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_teacher_against_student() -> None:
    """Per task, in points, with sizes and latencies; methods without a teacher show nothing of it."""
    teacher = {
        "backbone": "large", "accuracy_matrix": [[0.5, None, None], [0.6, 0.7, None], [0.9, 0.8, 0.7]],
        "average_accuracy": 0.8, "forgetting": 0.0, "parameters": 2_500_000, "bytes": 10_000_000,
    }  # fmt: skip
    latency = {"teacher": {"one": 0.004, "batch": 0.1}, "student": {"one": 0.0015, "batch": 0.02}}
    distilled = result("kdp", 0, teacher=teacher, student={"parameters": 500_000, "bytes": 2_000_000})
    distilled["seconds"] = {"total": 1.0, "latency": latency}
    page = Page(render([distilled, result("nsp2", 0)]))
    assert "Teacher against student" in page.text
    last = distilled["accuracy_matrix"][2]
    assert f"90.0 {100 * last[0]:.1f} {100 * (last[0] - 0.9):.1f}" in page.text
    for words in ("2.50 0.50", "10.00 2.00", "4.00 1.50", "100.00 20.00", "load_model"):
        assert words in page.text
    assert "Teacher against student" not in Page(render([result("nsp2", 0)])).text


@pytest.mark.parametrize("plot", [True, False])
def test_which_prompts_images_choose(plot: bool) -> None:
    if plot:
        needs_matplotlib()
    usage = [{"blocks.0": [0.5, 0.0]}, {"blocks.0": [1.0, 0.25, 0.0], "blocks.1": [0.0, 0.75, 0.25]}, {}]
    page = Page(render([result("l2p", 4, prompt_usage=usage), result("nsp2", 0, prompt_usage=[{}, {}, {}])], plot=plot))
    assert "Which prompts the images choose" in page.text
    assert "seed 4" in page.text
    for words in ("blocks.0 1/2 (50 %) 2/3 (100 %)", "blocks.1 2/3 (75 %)"):
        assert words in page.text
    usage[2] = {"blocks.0": [0.2] * 40}
    assert "40/40 (20 %)" in Page(render([result("l2p", 4, prompt_usage=usage)], plot=plot)).text
    assert "Which prompts" not in Page(render([result("nsp2", 0, prompt_usage=[{}] * 3)], plot=plot)).text


def test_how_far_weights_went_from_their_anchors() -> None:
    ftp = {"distance": 0.5, "relative": 0.0123, "radius": 0.061, "projected": 0.5, "fire_rate": 1.0}
    reports = [{"blocks.0.attn.qkv.weight": ftp}, {"blocks.0.attn.qkv.weight": {"distance": 1.0, "relative": 0.25}}, {}]
    page = Page(render([result("ftp", 3, anchoring=reports), result("full", 0, anchoring=[{}, {}, {}])]))
    assert "How far the weights went from their anchors" in page.text
    assert "ftp, seed 3" in page.text
    assert "1.23 % (radius 0.061, 50 % of rows, 100 % of steps) 25.00 %" in page.text
    assert "full, seed 0" not in page.text
    assert "How far the weights" not in Page(render([result("full", 0)])).text


@pytest.mark.parametrize("draw", ["curves", "scatter", "heat"])
def test_a_figure_as_a_file_loses_bytes_and_no_word(draw: str) -> None:
    needs_matplotlib()
    rng = random.Random(0)
    names = [f"method {i}, #{i}" for i in range(9)]
    lines = {name: [Spread(rng.random(), 0.1, 3)] * 4 for name in names}
    points = {name: (Spread(3.0 + rng.random(), 0.1, 3), Spread(0.5, 0.1, 3)) for name in names}
    cells = [[rng.random() for _ in range(5)] for _ in range(5)]
    made: dict[str, Callable[[], str]] = {
        "curves": lambda: charts.curves(lines, ylabel="y", alt="a <b>", key="k-x"),
        "scatter": lambda: charts.scatter(points, xlabel="s", ylabel="y", alt="0.12345 s", key="k-x"),
        "heat": lambda: charts.heat_map(cells, alt="map", key="k-x", rows=list("12345"), columns=list("12345"),
                                        xlabel="x", ylabel="y"),
    }  # fmt: skip
    inline = made[draw]()
    alone = charts.standalone(inline)
    assert len(alone) < 0.7 * len(inline)

    def said(svg: str) -> list[str]:
        return [text for text in (t.strip() for t in ElementTree.fromstring(svg).itertext()) if text]

    named = '<svg xmlns:xlink="http://www.w3.org/1999/xlink" '
    assert said(re.sub(r"<style>.*?</style>", "", alone)) == said(inline.replace("<svg ", named, 1))
    ids = re.findall(r' id="([^"]+)"', alone)
    assert sorted(ids) == sorted(set(re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', alone)))
    assert set(re.findall(r' class="([^"]+)"', alone)) == set(re.findall(r"\.(c\d+) ", alone))
