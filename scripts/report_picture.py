"""Make the README's picture of a comparison's report from the folder of a run.

    python scripts/report_picture.py RUN [--out docs/figures/compare-report.png] [--dark]

Opens RUN/report.html in Chromium (Playwright's Python package, a Chromium on the path), takes the answer and the first
charts, and writes them side by side as a PNG of at most 200 KB: fewer colours until it fits.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
COLUMN = 700  # pixels of the page's width for each of the two halves
MOST = 200_000  # bytes

# The two halves: what is shown of the page in each.
LEFT = "h1, h1 + p, .answer, section:has(> #accuracy)"
RIGHT = "section:has(> #gap), section:has(> #later)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that holds report.html")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/compare-report.png"))
    parser.add_argument("--dark", action="store_true", help="the dark page")
    given = parser.parse_args()
    report, browser = given.run / "report.html", next(filter(None, map(shutil.which, BROWSERS)), None)
    if not report.is_file() or browser is None:
        print(f"needs {report} and a browser ({', '.join(BROWSERS)})", file=sys.stderr)
        return 1
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=browser, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        page = opened.new_page(
            viewport={"width": COLUMN, "height": 900}, device_scale_factor=1.5,
            color_scheme="dark" if given.dark else "light",
        )  # fmt: skip
        halves = [half(page, report, shown) for shown in (LEFT, RIGHT)]
        opened.close()
    size = (sum(one.width for one in halves), max(one.height for one in halves))
    whole = Image.new("RGB", size, halves[0].getpixel((0, 0)))
    whole.paste(halves[0], (0, 0))
    whole.paste(halves[1], (halves[0].width, 0))
    content = smallest(whole)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_bytes(content)
    print(f"{given.out}: {size[0]} x {size[1]} pixels, {len(content) / 1000:.0f} kB")
    return 0 if len(content) <= MOST else 1


def half(page: Page, report: Path, shown: str) -> Image.Image:
    """The page with nothing but `shown` on it, and no folded tables."""
    page.goto(report.resolve().as_uri())
    page.add_style_tag(
        content=f"main > :not({shown}), details {{ display: none }} h2 {{ border: 0; margin-top: .6rem; padding: 0 }}"
        "body { padding: 1rem 1.4rem .6rem } .plot { margin: .6rem 0 }"
    )
    return Image.open(io.BytesIO(page.locator("body").screenshot())).convert("RGB")


def smallest(picture: Image.Image) -> bytes:
    """PNG bytes with as many colours as `MOST` allows, 16 at the least."""
    content = b""
    for colours in (256, 128, 64, 32, 16):
        held = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(held, "PNG", optimize=True)
        content = held.getvalue()
        if len(content) <= MOST:
            break
    return content


if __name__ == "__main__":
    sys.exit(main())
