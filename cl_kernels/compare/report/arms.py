"""The arms of a comparison in a fixed order, each with its words, its colour and its numbers by size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .numbers import value_of

__all__ = ["PROMPTS", "Arms", "Results", "verdict_words"]

Results = Mapping[str, Any]

#: Arms that tune prompts and leave the backbone as it is: what "prompts" means in a verdict.
PROMPTS = ("vpt-shallow", "vpt-deep")


class Arms:
    """Titles and slots (colour and marker) of the arms of `results`, and the bootstrap's accuracies by size."""

    def __init__(self, results: Results) -> None:
        listed = [(str(arm["name"]), str(arm.get("title") or arm["name"])) for arm in results.get("arms") or []]
        names = [name for name, _ in listed]
        extra = [str(run["arm"]) for run in results.get("runs") or [] if str(run["arm"]) not in names]
        self.titles = dict(listed) | {name: name for name in dict.fromkeys(extra)}
        self.names = list(self.titles)
        self.decision: Mapping[str, Any] = results.get("decision") or {}
        level = value_of(self.decision, "rule", "level")
        self.level = f"{100 * (0.95 if level is None else level):g} %"  # of the intervals
        self.sizes: list[int] = sorted({int(size) for size in results.get("sizes") or []})
        self._accuracy = {(str(a["arm"]), int(a["size"])): a for a in self.decision.get("accuracy") or []}

    def title(self, name: Any) -> str:
        return self.titles.get(str(name), str(name))

    def slot(self, name: str) -> int:
        return self.names.index(name) if name in self.names else len(self.names)

    def accuracy(self, name: str, size: int) -> Mapping[str, Any] | None:
        """mean, low and high in [0, 1] of this arm with `size` training images, or None where it was not run."""
        found = self._accuracy.get((name, size))
        return found if found is not None and value_of(found, "mean") is not None else None

    def measured(self, name: str) -> list[int]:
        """The sizes at which this arm has an accuracy."""
        return [size for size in self.sizes if self.accuracy(name, size) is not None]

    def compared(self) -> set[str]:
        """The arms the verdict is about: they are drawn thicker."""
        named = {str(self.decision.get("arm")), "full"}
        if self.sizes:
            prompts = {name: a["mean"] for name in PROMPTS if (a := self.accuracy(name, self.sizes[-1])) is not None}
            named |= {max(prompts, key=lambda name: prompts[name])} if prompts else set()
        return named & set(self.names)

    def best(self, size: int) -> str | None:
        """The arm with the highest mean accuracy at `size`."""
        found = {name: a["mean"] for name in self.names if (a := self.accuracy(name, size)) is not None}
        return max(found, key=lambda name: found[name]) if found else None


def verdict_words(verdict: Any, arm: Any, arms: Arms) -> str:
    """A verdict in two or three words."""
    named = {"prompts": "Prompt tuning", "full": "Full fine-tuning", "too-close": "Too close to call"}
    if verdict == "other":
        return arms.title(arm) if arm else "Another method"
    return named.get(str(verdict), str(verdict))
