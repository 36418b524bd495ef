"""What a page is made of: sections of blocks. The HTML template and the Markdown writer both walk through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = [
    "Block", "Case", "Chart", "Charts", "Code", "Heading", "Items", "Key", "Note", "Page", "Picture", "Row", "Section",
    "Strip", "Table", "Text", "Tile", "Tiles",
]  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A paragraph; `soft` for remarks."""

    text: str
    soft: bool = False
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Note:
    """A paragraph that must be seen: what is missing, what limits the answer."""

    text: str
    kind: str = field(default="note", init=False)


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str
    kind: str = field(default="heading", init=False)


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: Sequence[str]
    kind: str = field(default="items", init=False)


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is about, and its cells; the cells whose numbers are in `best` stand out."""

    head: str
    cells: Sequence[str]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Table:
    """`columns` without the first, whose title is `head`; `fold` is the text behind which the table is folded away.
    `words` for cells that hold sentences and may wrap."""

    caption: str
    head: str
    columns: Sequence[str]
    rows: Sequence[Row]
    fold: str = ""
    words: bool = False
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Key:
    """An entry of a chart's legend: a small SVG and what it stands for."""

    swatch: str
    label: str


@dataclass(frozen=True)
class Chart:
    """An SVG with its legend and, folded away, the numbers behind it. `svg` and the legend's swatches are escaped."""

    caption: str
    svg: str
    legend: Sequence[Key]
    table: Table
    note: str = ""
    kind: str = field(default="chart", init=False)


@dataclass(frozen=True)
class Charts:
    """Charts that stand beside each other where there is room."""

    charts: Sequence[Chart]
    kind: str = field(default="charts", init=False)


@dataclass(frozen=True)
class Tile:
    """A short answer: what was asked, the answer, what it rests on."""

    title: str
    answer: str
    detail: str
    tone: str = ""


@dataclass(frozen=True)
class Tiles:
    tiles: Sequence[Tile]
    kind: str = field(default="tiles", init=False)


@dataclass(frozen=True)
class Picture:
    """One image: `source` is a data URI in the page, `file` its path beside the page."""

    source: str
    file: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Strip:
    """Images to see beside each other, and what they show."""

    title: str
    pictures: Sequence[Picture]
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One image of the data: what it is, and strips of what the models made of it."""

    number: str
    title: str
    note: str
    strips: Sequence[Strip]
    kind: str = field(default="case", init=False)


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str
    caption: str = ""
    kind: str = field(default="code", init=False)


Block = Text | Note | Heading | Items | Table | Chart | Charts | Tiles | Case | Code


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """The whole: what it is about, the answer and how sure it is, its reasons, and the sections."""

    title: str
    subtitle: str
    sentence: str
    confidence: str
    reasons: Sequence[Block]
    sections: Sequence[Section]
