"""Differences in words: tables of pairs, and the sentences that their intervals carry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from results_data import ACCURACY, FORGETTING, NOT_YET, Book, listed

from cl_kernels.cli.report.summary import Measure, Section

BOTH = (ACCURACY, FORGETTING)
#: (method, what it is compared with, what the difference shows)
Pair = tuple[str, str, str]
READ = "Each cell: mean difference [95 % interval by Student's t]; bootstrap interval; what may be said."
MISSING = f"*This is {NOT_YET}.*"


def divided(book: Book, section: Section, against: str, measure: Measure, labels: Sequence[str] | None = None) -> str:
    """Who is better than `against`, who worse, and of whom neither may be said."""
    names = [g.label for g in section.groups if g.label != against] if labels is None else labels
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(book.verdict(section, name, against, measure), []).append(name)
    parts = [f"{told}: {listed(found.pop(told, []))}" for told in ("better", "not told apart", "worse")]
    parts += [f"{told}: {listed(rest)}" for told, rest in found.items()]
    return f"{_name(measure)} against `{against}`: {'; '.join(parts)}."


def _name(measure: Measure) -> str:
    return measure.title.partition(" (")[0]


def pairs(book: Book, wanted: Sequence[Pair], streams: Iterable[Section], measures: Sequence[Measure]) -> str:
    """Differences of each pair on each stream that has both."""
    lines = [
        "| stream | difference | what it shows | " + " | ".join(m.title for m in measures) + " | seeds |",
        "|---|---|---|" + "---:|" * (len(measures) + 1),
    ]
    for section in streams:
        for label, against, shows in wanted:
            found = book.difference(section, label, against, ACCURACY)
            if found is not None:
                cells = [book.words(section, label, against, measure) for measure in measures]
                told = [section.title, f"`{label}` - `{against}`", shows, *cells, str(found.seeds)]
                lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines) if len(lines) > 2 else MISSING


def across(book: Book, label: str, against: str, measure: Measure, streams: Iterable[Section]) -> str:
    """Of one pair: on which streams it is better, worse or neither; empty where no stream has both."""
    found: dict[str, list[str]] = {}
    for section in streams:
        told = book.difference(section, label, against, measure)
        if told is not None:
            verdict = book.verdict(section, label, against, measure)
            number = f"{told.mean * measure.scale:+.{measure.digits}f}"
            found.setdefault(verdict, []).append(f"{section.title} ({number})")
    if not found:
        return ""
    order = sorted(found, key=lambda v: ("better", "worse", "not told apart", "one seed").index(v))
    return f"{measure.short}: " + "; ".join(f"{verdict} on {', '.join(found[verdict])}" for verdict in order)


def sentence(book: Book, label: str, against: str, streams: Sequence[Section]) -> str:
    """`label` against `against` in accuracy and forgetting over all streams, as far as they were run."""
    parts = [told for measure in BOTH if (told := across(book, label, against, measure, streams))]
    told = ". ".join(first_up(part) for part in parts) or first_up(NOT_YET)
    return f"`{label}` against `{against}`, in points. {told}."


def first_up(text: str) -> str:
    """`text` with a capital."""
    return text[:1].upper() + text[1:]


def best(book: Book, section: Section, measure: Measure, *, brief: bool = False) -> str:
    """The row with the best mean, and which others its intervals tell from it; that it was picked counts against it."""
    pick = max if measure.better == "higher" else min
    means = {g.label: s.mean for g in section.groups if (s := g.spread(measure)) is not None}
    first = pick(means, key=lambda label: means[label])
    others = [label for label in means if label != first]
    apart = [label for label in others if book.verdict(section, first, label, measure) in ("better", "worse")]
    if brief:
        return f"`{first}` has the best mean {measure.short}; told apart from {len(apart)} of the {len(others)} others."
    rest = [label for label in others if label not in apart]
    return f"* Best mean in {measure.short}: `{first}`; told apart from {listed(apart)}; not from {listed(rest)}."


def tally(book: Book, wanted: Sequence[Pair], streams: Iterable[Section], measure: Measure) -> str:
    """Of how many pairs what may be said; empty where none was run."""
    told = [
        book.verdict(section, label, against, measure)
        for section in streams
        for label, against, _ in wanted
        if book.difference(section, label, against, measure) is not None
    ]
    counts = [f"{verdict} in {told.count(verdict)}" for verdict in ("better", "worse", "not told apart")]
    return f"{measure.short}: {', '.join(counts)} of {len(told)}" if told else ""
