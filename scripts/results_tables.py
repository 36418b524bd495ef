"""The answers of docs/results.md: a table of paired differences for each question, and the sentences they carry."""

from __future__ import annotations

import json
from collections.abc import Sequence

from results_data import ACCURACY, DRIFT, END_TASK, ENERGY, FORGETTING, KNOWN, NOT_YET, SHARE, Book, group_of, listed
from results_words import BOTH, MISSING, READ, Pair, best, divided, first_up, pairs, sentence, tally

from cl_kernels.cli.report.summary import Group, Section
from cl_kernels.cli.report.versus import difference_table, result_table

AGAINST, HEADS = "class-mean", "linear"
#: (method, what it is compared with, what the difference shows)
STEP: tuple[Pair, ...] = (
    ("nsp2", "sequential", "NSP2 against its prompts, each at the rate its trials chose"),
    ("nsp2", "sequential, rate of nsp2", "all that NSP2 adds"),
    ("matched-lr", "sequential, rate of nsp2", "the smaller step alone"),
    ("nsp2", "matched-lr", "the direction, and NSP2's drift term"),
    ("nsp2", "sequential, small step", "against the best constant smaller step"),
    ("null-space", "full", "the projection against none, each at the rate its trials chose"),
    ("null-space matched", "full", "the smaller step, and its rate"),
    ("null-space", "null-space matched", "the direction"),
    ("null-space", "full, small step", "against the best constant smaller step"),
    ("gpm", "sgd, nothing protected", "GPM against its optimizer alone, each at the rate its trials chose"),
)
#: (method, the same with steps as small, without either, what the method has beside steps as small)
SPLIT = (
    ("nsp2", "matched-lr", "sequential, rate of nsp2", "the direction and the drift term"),
    ("null-space", "null-space matched", "full", "the direction"),
)
EXACT: tuple[Pair, ...] = (("nsp2-exact", "nsp2", "the exact form"),)
STUDENT: tuple[Pair, ...] = (
    ("kdp (student)", "student alone", "what the teacher adds"),
    ("kdp (student)", "class-mean (student)", "against no training"),
)
WHOLE = "nsp2-exact: all"
#: Methods that take a rank rule, and the row that protects nothing at the same learning rate.
RULES = {"null-space": "full: none", "nsp2": "sequential: none", "adam-nscl": "full: none"}
LORAC = ("lorac", "lorac-ipc")
INFERENCE = ("last", "batch", "instance", "known")
SOFT = ", soft edge"


def methods(book: Book, section: Section) -> str:
    """One stream: all methods, and what beats class means."""
    lines = [result_table(section, section.measures()), "", *twins(section)]
    same = comparable(section)
    table = difference_table(same, AGAINST)
    if not table:
        return "\n".join([*lines, f"The comparison with `{AGAINST}` is {NOT_YET}."])
    for measure in (*BOTH, KNOWN):
        for group in same.groups:
            if group.label != AGAINST:
                book.difference(same, group.label, AGAINST, measure)
    told = [f"* {divided(book, same, AGAINST, measure)}" for measure in BOTH]
    told += [f"* {divided(book, same, HEADS, ACCURACY)}"] if group_of(same, HEADS) else []
    return "\n".join([*lines, f"Minus `{AGAINST}`, seed by seed. {READ}", "", table, "", *told])


def twins(section: Section) -> list[str]:
    """Rows that did the same in every run: a setting that does nothing here is no other method."""
    found: dict[str, list[str]] = {}
    for group in section.groups:
        runs = sorted((result["seed"], result["accuracy_matrix"], result["loss"]) for result in group.results)
        found.setdefault(json.dumps(runs), []).append(group.label)
    same = [labels for labels in found.values() if len(labels) > 1]
    told = [f"{listed(labels)} are one method here: their losses and accuracies are the same." for labels in same]
    return [*(f"* {one}" for one in told), ""] if told else []


def comparable(section: Section) -> Section:
    """The methods on the backbone of class-mean: a student's is smaller."""
    reference = group_of(section, AGAINST)
    if reference is None:
        return section
    backbone = reference.results[0]["config"]["backbone"]
    return Section(section.title, [g for g in section.groups if g.results[0]["config"]["backbone"] == backbone])


def split(book: Book, section: Section) -> list[str]:
    """How the gain of a projection divides into its smaller step and its direction, where there is a gain to divide."""
    told = []
    for label, matched, plain, beside in SPLIT:
        rates = [_rate(section, name) for name in (label, plain)]
        if None not in rates and rates[0] != rates[1]:
            apart = f"`{label}` learns at {rates[0]:g} and `{plain}` at {rates[1]:g}"
            told.append(f"* {section.title}: {apart}, so their difference does not divide into step and direction.")
            continue
        for measure in BOTH:
            whole, part, rest = (
                book.difference(section, one, other, measure)
                for one, other in ((label, plain), (matched, plain), (label, matched))
            )
            if whole is None or part is None or rest is None:
                continue
            name, scale = measure.short, measure.scale
            if book.verdict(section, label, plain, measure) not in ("better", "worse"):
                apart = f"`{label}` and `{plain}` are not told apart, so there is no gain to divide"
                told.append(f"* {section.title}, {name}: {apart}.")
                continue
            verdict = book.verdict(section, label, matched, measure)
            told.append(
                f"* {section.title}, {name}: of `{label}`'s {scale * whole.mean:+.1f} points against `{plain}`, "
                f"{scale * part.mean:+.1f} come with the smaller step and {scale * rest.mean:+.1f} with {beside} "
                f"({verdict})."
            )
    return told


def _rate(section: Section, label: str) -> float | None:
    """The learning rate of a row; None where there is none."""
    group = group_of(section, label)
    return None if group is None else group.results[0]["config"].get("lr")


def variants(section: Section, base: str) -> list[str]:
    """The rows "BASE: VARIANT" of a stream."""
    return [group.label for group in section.groups if group.label.startswith(f"{base}: ")]


def step(book: Book) -> str:
    told = [line for section in book.reported for line in split(book, section)]
    table = pairs(book, STEP, book.reported, (ACCURACY, FORGETTING, KNOWN, DRIFT))
    return "\n".join([READ, "", table, "", *told]) if table != MISSING else MISSING


def exact(book: Book) -> str:
    """The exact form on every stream, then its parts."""
    table = pairs(book, EXACT, book.reported, (ACCURACY, FORGETTING, KNOWN, DRIFT))
    lines = [READ, "", table, "", f"* {sentence(book, 'nsp2-exact', 'nsp2', book.reported)}"]
    labels = dict.fromkeys(label for section in book.asked for label in variants(section, "nsp2-exact"))
    parts = [(label, WHOLE, "without this part") for label in labels if label != WHOLE]
    wanted = [(WHOLE, "nsp2: knee", "the exact form, the same rule and rate"), *parts]
    lines += ["", "Its parts:", "", pairs(book, wanted, book.asked, (ACCURACY, FORGETTING, KNOWN, DRIFT))]
    lines += tallied(book, "Leaving a part out", parts)
    return "\n".join(lines)


def ruled(section: Section, base: str) -> list[Group]:
    """The rows of one method by rank rule."""
    return [group for group in section.groups if group.label in variants(section, base)]


def rules(book: Book) -> str:
    """Each rank rule with what it costs, against no protection; the best of them; the soft edge."""
    lines: list[str] = []
    soft: list[Pair] = []
    for section in book.asked:
        for base, plain in RULES.items():
            rows = ruled(section, base)
            if not rows:
                continue
            labels = [group.label for group in rows]
            groups = [*(group for group in section.groups if group.label == plain), *rows]
            wanted = [ACCURACY, FORGETTING, DRIFT, SHARE, ENERGY, END_TASK]
            measures = [m for m in wanted if any(g.spread(m) is not None for g in groups)]
            lines += [f"**{section.title}: `{base}`**", "", result_table(Section(section.title, groups), measures), ""]
            if len(groups) > len(rows):
                lines += [f"* {divided(book, section, plain, measure, labels)}" for measure in BOTH]
            lines += [best(book, Section(section.title, rows), measure) for measure in BOTH]
            lines.append("")
            soft += [(row, row.removesuffix(SOFT), "soft edge against hard") for row in labels if row.endswith(SOFT)]
    table = pairs(book, list(dict.fromkeys(soft)), book.asked, (ACCURACY, FORGETTING, DRIFT, SHARE))
    told = tallied(book, "The soft edge against the hard one", list(dict.fromkeys(soft)))
    return "\n".join([*(lines or [MISSING, ""]), "The soft edge against the hard one:", "", table, *told])


def tallied(book: Book, what: str, wanted: Sequence[Pair]) -> list[str]:
    """One line for all pairs of the questions together."""
    counts = [told for measure in BOTH if (told := tally(book, wanted, book.asked, measure))]
    return ["", f"* {what}. {first_up('; '.join(counts))}."] if counts else []


def lorac(book: Book) -> str:
    """LoRAC by what is known of a test image, against one adapter trained on and on."""
    streams = book.reported + book.asked
    wanted: list[Pair] = []
    other = "sequential-lora: last"
    for base in LORAC:
        wanted.append((base, "sequential-lora", "the study's row, image by image"))
        wanted += [(f"{base}: {how}", other, how) for how in INFERENCE]
        wanted += [(f"{base}: {how}", f"{base}: last", f"{how} against last") for how in INFERENCE[1:]]
    lines = []
    for section in book.asked:
        names = [f"{b}: {how}" for b in LORAC for how in INFERENCE]
        groups = [g for g in section.groups if g.label in (*names, other)]
        if any(g.label in names for g in groups):
            shown = Section(section.title, groups)
            lines += [f"**{section.title}**", "", result_table(shown, shown.measures()), ""]
    table = pairs(book, wanted, streams, (ACCURACY, FORGETTING, KNOWN))
    told = [f"* {sentence(book, base, 'sequential-lora', book.reported)}" for base in LORAC]
    for base in LORAC:
        told += [f"* {sentence(book, f'{base}: {how}', other, book.asked)}" for how in ("instance", "batch")]
    return "\n".join([*(lines or [MISSING, ""]), READ, "", table, "", *told])


def distilled(book: Book) -> str:
    table = pairs(book, STUDENT, book.reported, (ACCURACY, FORGETTING, KNOWN))
    told = [f"* {sentence(book, label, against, book.reported)}" for label, against, _ in STUDENT]
    return "\n".join([READ, "", table, "", *told])
