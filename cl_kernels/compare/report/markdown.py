"""`report.md`: the blocks of the page as Markdown; charts become their tables, pictures links to their files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from urllib.parse import quote

from .blocks import Block, Case, Chart, Charts, Code, Heading, Items, Note, Page, Strip, Table, Text, Tiles

__all__ = ["markdown"]


def markdown(page: Page) -> str:
    """The whole report as text."""
    parts = [f"# {plain(page.title)}", plain(page.subtitle), f"**{plain(page.sentence)}**", plain(page.confidence)]
    parts += [_block(block) for block in page.reasons]
    for section in page.sections:
        parts += [f"## {plain(section.title)}", *(_block(block) for block in section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """Text in which nothing is taken for HTML or for Markdown: names come from the user's folders."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", text)


def _block(block: Block) -> str:
    match block:
        case Text():
            return plain(block.text)
        case Note():
            return f"> {plain(block.text)}"
        case Heading():
            return f"### {plain(block.text)}"
        case Items():
            return "\n".join(f"* {plain(item)}" for item in block.items)
        case Table():
            return _table(block)
        case Chart():
            return "\n\n".join(filter(None, [_table(block.table), plain(block.note)]))
        case Charts():
            return "\n\n".join(_block(chart) for chart in block.charts)
        case Tiles():
            return "\n".join(f"* {plain(t.title)}: **{plain(t.answer)}**, {plain(t.detail)}" for t in block.tiles)
        case Case():
            strips = [_strip(strip) for strip in block.strips]
            return "\n\n".join(filter(None, [f"### {plain(block.title)}", plain(block.note), *strips]))
        case Code():
            return "\n\n".join(filter(None, [plain(block.caption), _fenced(block.text)]))


def _table(table: Table) -> str:
    """A pipe table, its caption above it."""

    def told(cells: Iterable[str], best: Collection[int] = ()) -> str:
        texts = [f"**{plain(cell)}**" if index in best else plain(cell) or " " for index, cell in enumerate(cells, -1)]
        return "| " + " | ".join(texts) + " |"

    texts = [told([table.head, *table.columns]), *(told([row.head, *row.cells], row.best) for row in table.rows)]
    rule = "|" + "|".join(["---", *["--:"] * len(table.columns)]) + "|"
    return "\n".join([f"{plain(table.caption)}:", "", texts[0], rule, *texts[1:]])


def _strip(strip: Strip) -> str:
    images = " ".join(f"![{plain(one.alt)}]({quote(one.file)})" for one in strip.pictures if one.file)
    return "\n\n".join(filter(None, [f"{plain(strip.title)}:", images, plain(strip.note)]))


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}python\n{text}\n{fence}"
