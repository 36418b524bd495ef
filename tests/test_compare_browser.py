"""Reports in a real browser: nothing leaves the page, charts are drawn and answer to mouse and keys, text can be read.

Chromium is driven by Playwright's Python package; Playwright's own browsers are not needed."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_results import ARMS, SIZES, results, with_pictures
from compare_small import run_small, small_data
from conftest import ROOT
from test_cli_report import result, shifted

from cl_kernels.cli.report import write_report as write_train
from cl_kernels.compare.attribution.sheet import explain
from cl_kernels.compare.attribution.sources import open_models, read_images
from cl_kernels.compare.report import write_report

pytest.importorskip("jinja2", reason="reports are jinja2 templates")
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
PAGES = ["compare", "compare-real", "explain", "train"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium with an empty profile."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        except sync_api.Error as error:
            pytest.skip(f"{found} does not start: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@dataclass
class Opened:
    """A page, and what it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.page, name)


Open = Callable[..., Opened]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open a file at a width and colour scheme; on the way out: no message of the page, no request but for the file."""
    contexts, pages = [], []

    def go(path: Path, width: int = 1280, scheme: str = "light") -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.on("console", lambda message: found.said.append(message.text))
        found.page.on("pageerror", lambda error: found.said.append(str(error)))
        found.page.on("request", lambda request: found.asked.append(request.url))
        found.page.goto(path.as_uri())
        pages.append((path, found))
        return found

    yield go
    for path, found in pages:
        assert found.said == []
        assert [url for url in found.asked if not url.startswith("data:")] == [path.as_uri()]
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """report.html of made-up and of real results of a comparison, explain.html of its models, a training's report."""

    folder = tmp_path_factory.mktemp("reports")
    runs = [result(m, s, subspace=m == "null-space") for m in ("full", "null-space") for s in range(2)]
    for number, one in enumerate(runs):
        one["shift"] = shifted(one["average_accuracy"], number)
    real = folder / "real"
    real.mkdir()
    run_small(real, small_data(100, 60), arms=("vpt-deep", "full"), pictures=True, overwrite=True)
    models = open_models(real, device=torch.device("cpu"))
    images, _, _ = read_images(["digits"], size=next(iter(models.values())).preprocess.size, count=1, seed=0)
    explain(models, images, out=folder / "explain", methods=("gradcam", "rollout"))
    return {
        "compare": write_report(with_pictures(results(), folder / "compare"), folder / "compare"),
        "compare-real": real / "report.html",
        "explain": folder / "explain" / "explain.html",
        "train": write_train(runs, folder / "train" / "report.html"),
    }


@pytest.fixture(params=PAGES)
def report(request: pytest.FixtureRequest, reports: dict[str, Path]) -> Path:
    """One of the pages."""
    path: Path = reports[request.param]
    return path


def text_of(page: Opened) -> str:
    return " ".join(page.evaluate("document.body.innerText").split())


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_its_width(report: Path, open_page: Open, width: int) -> None:
    page = open_page(report, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate(
        """() => [...document.querySelectorAll('p, li, h1, h2, h3, h4, figcaption, svg, img')]
            .filter((one) => one.checkVisibility() && !one.closest('.wide'))
            .filter((one) => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .map((one) => one.outerHTML.slice(0, 90))"""
    )
    assert cut == []


def test_headings_names_and_labels(report: Path, open_page: Open) -> None:
    page = open_page(report)
    assert page.title()
    assert page.evaluate("document.documentElement.lang") == "en"
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4, h5')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), "no level is left out"
    assert page.locator("main").count() == 1
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    for svg in page.locator("svg:not([aria-hidden])").all():
        assert svg.get_attribute("role") in ("img", "group")
        assert page.locator(f"#{svg.get_attribute('aria-labelledby')}").text_content()
    assert page.locator("table:not(:has(caption)), th:not([scope])").count() == 0
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('[tabindex="0"], a[href], summary')]
            .filter((one) => !(one.getAttribute('aria-label') || one.textContent).trim()).length"""
    )
    assert unnamed == 0


CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const found = channels(getComputedStyle(one).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const one = node.parentElement;
    if (!node.textContent.trim() || one.closest('script, style, title') || !one.checkVisibility()) continue;
    if (one.closest('svg:not(.chart)')) continue; // a heat map's numbers lie on its cells
    const style = getComputedStyle(one);
    const ink = channels(one.closest('svg') ? style.fill : style.color);
    const [high, low] = [luminance(ink), luminance(behind(one))].sort((a, b) => b - a);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if ((high + 0.05) / (low + 0.05) < (large ? 3 : 4.5)) bad.push([node.textContent.trim().slice(0, 40), style.color]);
  }
  return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(report: Path, open_page: Open, scheme: str) -> None:
    """WCAG 1.4.3, by the styles as they are computed."""
    page = open_page(report, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert page.evaluate(CONTRAST) == []


def test_paper(report: Path, open_page: Open) -> None:
    page = open_page(report, scheme="dark")
    paper = page.pdf(format="A4")
    pages = len(re.findall(rb"/Type\s*/Page[^s]", paper))
    assert 1 <= pages <= 60
    page.emulate_media(media="print", color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRAST) == []


def test_paper_shows_what_is_folded_away(reports: dict[str, Path], open_page: Open) -> None:
    page = open_page(reports["compare"])
    folded = page.locator("details:not([open])").count()
    assert folded > 5
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == folded


CROSSED = """() => [...document.querySelectorAll('svg.chart .axes')].flatMap((axes) => {
  const boxes = [...axes.querySelectorAll('text')].map((one) => [one.textContent, one.getBoundingClientRect()]);
  return boxes.flatMap(([text, a], index) => boxes.slice(0, index)
    .filter(([_, b]) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
    .map(([other]) => [text, other]));
})"""


@pytest.mark.parametrize("width", [360, 1280])
def test_charts_are_drawn(reports: dict[str, Path], open_page: Open, width: int) -> None:
    page = open_page(reports["compare"], width)
    charts = page.locator("svg.chart")
    assert charts.count() == 9
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('svg.chart')].map((chart) => [
            chart.getBoundingClientRect().toJSON(),
            [...chart.querySelectorAll('.pt > :last-child')].map((one) => one.getBoundingClientRect().toJSON())])"""
    )
    for box, marks in boxes:
        assert box["width"] > 0.75 * min(width, 500)
        assert box["height"] > 100
        assert len(marks) >= 4
        for mark in marks:
            assert mark["width"] > 2
            assert box["left"] <= mark["left"]
            assert mark["right"] <= box["right"] + 1
            assert box["top"] <= mark["top"]
            assert mark["bottom"] <= box["bottom"]
    assert page.locator("#accuracy-chart .pt").count() == len(ARMS) * len(SIZES)
    assert page.locator("#accuracy-chart .line").count() == page.locator("#accuracy-chart .band").count() == len(ARMS)
    assert page.locator(".plot:has(#accuracy-chart) .legend li").count() == len(ARMS)
    letters = page.evaluate(
        "[...document.querySelectorAll('svg.chart text')].map((one) => one.getBoundingClientRect().height)"
    )
    assert min(letters) >= 9, "letters of a chart can be read"
    crossed = page.evaluate(CROSSED)
    assert crossed == [], "labels of axes do not run into each other"


def test_numbers_on_the_page_are_those_of_the_results(reports: dict[str, Path], open_page: Open) -> None:
    page = open_page(reports["compare"])
    found = results()
    names = [title for title, *_ in ARMS.values()]
    table = page.locator(".plot:has(#accuracy-chart) table")
    rows = table.locator("tbody tr")
    assert rows.count() == len(ARMS)
    by_cell = {(one["arm"], one["size"]): one for one in found["decision"]["accuracy"]}
    for row, name in enumerate(ARMS):
        assert rows.nth(row).locator("th").text_content() == names[row]
        for column, size in enumerate(SIZES):
            one = by_cell[name, size]
            told = f"{100 * one['mean']:.1f} ({100 * one['low']:.1f} to {100 * one['high']:.1f})"
            assert rows.nth(row).locator("td").nth(column).text_content() == told
    marks = page.evaluate(
        "[...document.querySelectorAll('#gap-chart .pt')].map((one) => [Number(one.dataset.x), Number(one.dataset.y)])"
    )
    expected = [[one["size"], 100 * one["mean"]] for one in found["decision"]["gaps"]]
    expected += [[one["size"], 100 * one["gap"]] for one in found["decision"]["at"].values() if one["extrapolated"]]
    assert marks == expected
    told = text_of(page)
    assert told.index("Use full fine-tuning") < told.index("Accuracy against data size")
    for one in found["decision"]["at"].values():
        assert f"{100 * one['gap']:+.1f}".replace("-", "−") in told


def test_pointing_at_a_mark_shows_its_value(reports: dict[str, Path], open_page: Open) -> None:
    page = open_page(reports["compare"])
    tip = page.locator("#tip")
    assert not tip.is_visible()
    for index in (0, 5, 17):
        mark = page.locator("#accuracy-chart .pt").nth(index)
        mark.scroll_into_view_if_needed()
        box = mark.locator(".hit").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2)
        assert tip.is_visible()
        assert tip.text_content() == mark.get_attribute("aria-label")
        assert re.search(r"images: \d\d\.\d", tip.text_content())
        inside = tip.bounding_box()
        assert inside["x"] >= 0
        assert inside["x"] + inside["width"] <= 1280
    page.mouse.move(1, 1)
    assert not tip.is_visible()


def test_keys_walk_through_the_marks(reports: dict[str, Path], open_page: Open) -> None:
    page = open_page(reports["compare"], 360)
    marks = page.locator("#accuracy-chart .pt")
    assert page.locator("#accuracy-chart .pt[tabindex='0']").count() == 1, "one stop of the Tab key for a chart"
    page.locator("nav a").last.focus()
    page.keyboard.press("Tab")
    tip = page.locator("#tip")

    def focused() -> str:
        return str(page.evaluate("document.activeElement.getAttribute('aria-label')"))

    assert focused() == marks.nth(0).get_attribute("aria-label")
    assert tip.is_visible()
    assert tip.text_content() == focused()
    for key, place in (("ArrowRight", 1), ("ArrowDown", 2), ("ArrowLeft", 1), ("End", marks.count() - 1), ("Home", 0)):
        page.keyboard.press(key)
        assert focused() == marks.nth(place).get_attribute("aria-label")
        assert tip.text_content() == focused()
    ring = page.evaluate("getComputedStyle(document.activeElement.querySelector('.hit')).stroke")
    assert ring not in ("none", ""), "what has the focus can be seen"
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.keyboard.press("ArrowRight")
    assert tip.is_visible()
    page.keyboard.press("Tab")
    assert not tip.is_visible()
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "the numbers behind the chart come next"
    page.keyboard.press("Enter")
    assert page.locator(".plot:has(#accuracy-chart) table").is_visible()


def test_without_scripts_every_mark_has_its_words(reports: dict[str, Path], browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(reports["compare"].as_uri())
    marks = page.locator("svg.chart .pt")
    assert marks.count() == page.locator("svg.chart .pt[tabindex='0'] > title").count() > 100
    context.close()


def test_no_script_but_the_pages_own_runs(tmp_path: Path, browser: Any) -> None:
    """Should a name ever get through unescaped, the page's policy stops it."""
    path = write_report(results(), tmp_path)
    bad = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'></main>"
    path.write_text(path.read_text().replace("</main>", bad))
    context = browser.new_context()
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("#tip").count() == 1, "its own script ran"
    assert page.evaluate("window.ran === undefined")
    context.close()


def test_pictures_are_shown(reports: dict[str, Path], open_page: Open) -> None:
    page = open_page(reports["compare"], 360)
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    images = page.locator("img")
    assert images.count() == 10
    for image in images.all():
        assert image.evaluate("(one) => one.complete && one.naturalWidth") == 64
        assert image.bounding_box()["width"] > 90


def test_a_real_run_says_what_its_results_say(reports: dict[str, Path], open_page: Open) -> None:
    path = reports["compare-real"]
    found = json.loads((path.parent / "results.json").read_text())
    page = open_page(path)
    told = text_of(page)
    assert page.evaluate(CROSSED) == []
    assert found["decision"]["sentence"] in told
    assert f"{found['data']['train']['n']:,} training images" in told
    for one in found["decision"]["accuracy"]:
        mark = page.locator(f"#accuracy-chart .pt[data-x='{float(one['size'])!r}'][data-y='{100 * one['mean']!r}']")
        assert mark.count() >= 1
    for one in found["missing"]:
        assert one[1:].rstrip(".") in told


def test_the_readmes_picture_can_be_made(reports: dict[str, Path], browser: Any, tmp_path: Path) -> None:
    out = tmp_path / "figures" / "picture.png"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "report_picture.py"),
        str(reports["compare"].parent),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert 10_000 < out.stat().st_size <= 200_000
