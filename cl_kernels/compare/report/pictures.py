"""What each arm looked at, side by side."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .arms import Arms, Results
from .blocks import Block, Note, Section

__all__ = ["data_uri", "pictures"]


def pictures(results: Results, arms: Arms, folder: Path | None) -> Section:
    """The maps of both arms on the same images, from the files below `folder`."""
    given: Mapping[str, Any] = results.get("pictures") or {}
    blocks: list[Block] = []
    if not given or not blocks:
        blocks.append(Note("There are no pictures; what is missing, at the end of this page, says why."))
    return Section("pictures", "What each looked at", blocks)


def data_uri(folder: Path | None, file: str) -> str | None:
    """The PNG `file` below `folder` as a data URI; None where it is not there, not a PNG, or outside the folder."""
    if folder is None:
        return None
    place = (folder / file).resolve()
    if not place.is_relative_to(folder.resolve()) or not place.is_file():
        return None
    content = place.read_bytes()
    if not content.startswith(b"\x89PNG\r\n"):
        return None
    return "data:image/png;base64," + base64.b64encode(content).decode()
