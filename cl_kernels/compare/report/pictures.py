"""What each arm looked at, side by side."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import numbers as n
from .arms import Arms, Results
from .blocks import Block, Case, Heading, Note, Picture, Row, Section, Strip, Table, Text

__all__ = ["data_uri", "pictures"]


def pictures(results: Results, arms: Arms, folder: Path | None) -> Section:
    """The maps of all models on the same images, from the files below `folder`."""
    given: Mapping[str, Any] = results.get("pictures") or {}
    title, images = "What each looked at", list(given.get("images") or [])
    if not images:
        return Section("pictures", title, [Note("There are no pictures; “What is missing, and why” says why.")])
    titles = {str(one["name"]): str(one["title"]) for one in given.get("methods") or []}
    blocks: list[Block] = [
        Text(str(given.get("note") or "")),
        Text("Dark blue: little of the map; yellow: much. Rows of one image have one colour scale for all models."),
    ]
    for group in given.get("groups") or []:
        found = [image for image in images if image.get("group") == group["name"]]
        blocks += _group(group, found, titles, arms, folder)
    if given.get("stopped"):
        blocks.append(Note("The time for pictures ran out: the images that are here are whole, further ones are not."))
    sanity = _sanity(given, titles, arms)
    return Section("pictures", title, [*blocks, *([sanity] if sanity else [])])


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


def _group(
    group: Mapping[str, Any], found: list[Mapping[str, Any]], titles: Mapping[str, str], arms: Arms, folder: Path | None
) -> list[Block]:
    words = str(group.get("title") or group["name"])
    for name in sorted(arms.names, key=len, reverse=True):
        words = words.replace(f"{name} ", f"{arms.title(name)} ")
    words = words[0].upper() + words[1:]
    available = int(group.get("available") or 0)
    if not found:
        reason = "there is no such test image" if not available else f"{available} test images, none drawn"
        return [Heading(words), Text(f"Nothing to show: {reason}.")]
    count = f"{available} such test image{'' if available == 1 else 's'}; drawn at random: {len(found)}."
    return [Heading(words), Text(count, soft=True), *(_case(image, titles, arms, folder) for image in found)]


def _case(image: Mapping[str, Any], titles: Mapping[str, str], arms: Arms, folder: Path | None) -> Block:
    said = [
        f"{arms.title(name)} said “{answer['class']}” ({n.percent(n.value_of(answer, 'probability'))} %)"
        for name, answer in (image.get("predicted") or {}).items()
    ]
    strips = [Strip("The image", [_picture(folder, image, "as the models saw it")])]
    for panel in image.get("panels") or []:
        method = titles.get(str(panel["method"]), str(panel["method"]))
        target = panel.get("class")
        why = f" ({panel['why']})" if panel.get("why") else ""
        agreement = n.value_of(panel, "agreement")
        strips.append(
            Strip(
                f"{method} for “{target}”{_titled(why, arms)}" if target is not None else method,
                [_picture(folder, one, _caption(one, arms)) for one in panel.get("maps") or []],
                "" if agreement is None else f"Rank correlation of the maps: {n.number(agreement, 2)}",
            )
        )
    title = f"Test image {image.get('number')}"
    if image.get("class") is not None:
        title += f", true class “{image['class']}”"
    return Case(str(image.get("number")), title, "; ".join(said) + "." if said else "", strips)


def _titled(text: str, arms: Arms) -> str:
    """Names of arms as their titles."""
    for name in sorted(arms.names, key=len, reverse=True):
        text = text.replace(f"predicted by {name}", f"predicted by {arms.title(name)}")
    return text


def _picture(folder: Path | None, one: Mapping[str, Any], caption: str) -> Picture:
    file = str(one["file"])
    source = data_uri(folder, file)
    alt = str(one.get("alt") or "")
    return Picture(source or "", file, alt, caption if source else f"{caption} (the file {file} is not there)")


def _caption(one: Mapping[str, Any], arms: Arms) -> str:
    words = [arms.title(one["arm"])]
    prompts = n.value_of(one, "masses", "prompts")
    if one.get("empty"):
        words.append("nothing speaks for this class")
    if one.get("flagged"):
        words.append(f"incomplete by {n.percent(n.value_of(one, 'completeness'))} %: do not trust")
    if prompts:
        words.append(f"{n.percent(prompts)} % of it on prompts")
    return "; ".join(words)


def _sanity(given: Mapping[str, Any], titles: Mapping[str, str], arms: Arms) -> Table | None:
    rows = []
    for name, by_method in (given.get("sanity") or {}).items():
        for method, entry in by_method.items():
            changed = {True: "yes", False: "no: do not trust these maps"}.get(entry.get("changed"), n.NONE)
            middle = n.number(n.value_of(entry, "spearman"), 2)
            rows.append(Row(f"{arms.title(name)}, {titles.get(method, method)}", [middle, changed]))
    if not rows:
        return None
    caption = "A map must change when the head's weights are replaced by random ones (rank correlation below 0.5)"
    return Table(caption, "Maps", ["Rank correlation", "Changed"], rows, fold="Do the maps depend on the model?")
