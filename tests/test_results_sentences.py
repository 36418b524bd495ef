"""The sentences of docs/results.md follow from the intervals, and from nothing else."""

from __future__ import annotations

import re

from results_runs import (
    BASE,
    DOWN,
    LOST,
    NOISE,
    UP,
    cost,
    data,
    kept,
    page,
    record,
    run,
    sample,
    shifted,
    tables,
    words,
)  # fmt: skip


def test_better_worse_and_not_told_apart() -> None:
    book = data.Book(kept(sample()))
    (stream,) = book.reported
    said = words.divided(book, stream, "matched-lr", data.ACCURACY)
    for told, names in (("better", ["`nsp2`", "`nsp2-exact`"]), ("worse", ["`sequential, rate of nsp2`", "`linear`"])):
        part = said.split(f"{told}: ")[1].split(";")[0]
        assert set(names) <= set(re.findall(r"`[^`]+`", part))
    for name in ("nsp2", "nsp2-exact", "linear", "class-mean", "sequential, rate of nsp2"):
        assert said.count(f"`{name}`") == 1, "every method is in one group"
    assert book.verdict(stream, "nsp2-exact", "nsp2", data.ACCURACY) == "worse"
    assert book.verdict(stream, "linear", "class-mean", data.ACCURACY) == "not told apart"
    assert book.verdict(stream, "nsp2", "matched-lr", data.FORGETTING) == "better", "less forgetting is better"


def test_a_difference_that_rounds_to_nothing_is_none() -> None:
    """As where every seed differs in the same one of thousands of test images, and the interval has no width."""
    tiny = record(("class-mean", BASE, LOST), ("nsp2", shifted((2e-4,) * 3), shifted((6e-4,) * 3, LOST)))
    book = data.Book(kept(tiny))
    assert book.verdict(book.reported[0], "nsp2", "class-mean", data.ACCURACY) == "not told apart"
    assert book.verdict(book.reported[0], "nsp2", "class-mean", data.FORGETTING) == "worse"


def test_drift_and_directions_are_lower_or_higher_and_not_better() -> None:
    study = record(("nsp2", BASE, LOST), ("nsp2-exact", BASE, LOST))
    for one in study["runs"]:
        one["feature_drift"]["final_relative"] += 0.1 * (one["label"] == "nsp2") + 0.001 * one["seed"]
    (row,) = (line for line in tables.exact(data.Book(kept(study))).splitlines() if line.startswith("| a stream |"))
    assert "; lower |" in row
    assert "better" not in row


def test_the_two_parts_of_a_gain_are_the_gain() -> None:
    slower = shifted(tuple(-by for by in DOWN))
    rows = (("sequential, rate of nsp2", BASE, LOST), ("matched-lr", slower, LOST), ("nsp2", shifted(UP, slower), LOST))
    book = data.Book(kept(record(*rows)))
    told = tables.split(book, book.reported[0])
    assert len(told) == 2, "accuracy and forgetting of nsp2; null-space was not run"
    assert list(map(float, re.findall(r"[+-]\d+\.\d", told[0]))) == [7.2, 2.1, 5.1], (
        "the whole, the step, the direction"
    )
    assert told[0].endswith("(better).")
    assert "no gain to divide" in told[1]
    noisy = record(("sequential, rate of nsp2", BASE, LOST), ("matched-lr", BASE, LOST), ("nsp2", shifted(NOISE), LOST))
    book = data.Book(kept(noisy))
    assert all("no gain to divide" in line for line in tables.split(book, book.reported[0]))


def test_what_differs_in_its_learning_rate_too_is_not_divided() -> None:
    study = record(("full", BASE, LOST), ("null-space matched", BASE, LOST), ("null-space", shifted(UP), LOST))
    for one in study["runs"]:
        one["config"]["lr"] = 1e-4
    book = data.Book(kept(study))
    assert "come with the smaller step and +5.1 with the direction (better)" in tables.split(book, book.reported[0])[0]
    for one in study["runs"]:
        one["config"]["lr"] = 1e-5 if one["label"] == "full" else 1e-4
    book = data.Book(kept(study))
    (told,) = tables.split(book, book.reported[0])
    assert told.endswith("`null-space` learns at 0.0001 and `full` at 1e-05, so their difference does not divide into "
                         "step and direction.")  # fmt: skip


def test_the_readme_names_plain_training_at_its_own_rate() -> None:
    """At the projected method's rate plain training may fall apart, and a control at that rate with it."""
    rows = (("full", BASE, LOST), ("null-space matched", shifted(DOWN), LOST), ("null-space", shifted(NOISE), LOST))
    said = page.section(data.Book(kept(record(*rows))))
    assert "`null-space` against `full`, in points. Accuracy: not told apart on a stream" in said


def test_rows_that_did_the_same_are_told() -> None:
    """As LoRAC-IPC where its share of few positions rounds to none."""
    study = record(("lorac", BASE, LOST), ("lorac-ipc", BASE, LOST), ("nsp2", shifted(UP), LOST))
    (stream,) = data.Book(kept(study)).reported
    told = tables.twins(stream)
    assert told == ["* `lorac`, `lorac-ipc` are one method here: their losses and accuracies are the same.", ""]
    study["runs"][0]["loss"] = [[0.5]]
    (stream,) = data.Book(kept(study)).reported
    assert tables.twins(stream) == [], "as accurate by another way"


def test_every_comparison_counts_once() -> None:
    book = data.Book(kept(sample()))
    first = page.blocks(book)
    total = int(re.findall(r"make (\d+) comparisons", first["count"])[0])
    assert total == len(book.counted)
    assert page.blocks(book) == first
    read = re.compile(r"; (better|worse|lower|higher|not told apart) (?=\|)")
    cells = [told for text in first.values() for told in read.findall(text)]
    heads = len(sample()["runs"]) // 3 - 1
    assert total == len(cells) + heads, "those against `linear` stand in a sentence alone"
    apart = int(re.findall(r"and (\d+) of them tell", first["count"])[0])
    assert apart == sum(verdict != "not told apart" for verdict in book.counted.values())
    assert re.findall(r"^\| (\S+) .*\| yes \|$", page.section(book), re.MULTILINE) == ["nsp2"], (
        "by hand: 0.102 ± 0.090; that of nsp2-exact is 0.081 ± 0.090"
    )


def test_the_best_row_and_what_it_is_told_from() -> None:
    asked = record(
        ("null-space: a", BASE, LOST), ("null-space: b", shifted(UP), LOST), ("null-space: c", shifted(NOISE), LOST)
    )
    book = data.Book(kept(None, study_questions=asked))
    said = words.best(book, book.asked[0], data.ACCURACY)
    assert said == (
        "* Best mean in accuracy: `null-space: b`; told apart from `null-space: a`; not from `null-space: c`."
    )


def test_a_students_backbone_is_not_compared_with_another() -> None:
    study = sample()
    for seed in range(3):
        study["runs"].append(run("student alone", seed, 0.9, 0.0))
        study["runs"][-1]["config"]["backbone"] = "embedded-small"
    book = data.Book(kept(study))
    said = tables.methods(book, book.reported[0])
    assert "| student alone | 90.0" in said
    assert "`student alone`" not in said
    assert "| student alone | 90.0 ± 0.0 | 0.0 ± 0.0 | another backbone |" in page.section(book)


def test_variants_are_compared_at_their_own_settings() -> None:
    asked = record(
        ("full: none", shifted(DOWN), shifted(UP, LOST)),
        ("null-space: energy:0.9", BASE, LOST),
        ("null-space: energy:0.9, soft edge", shifted(UP), LOST),
        ("nsp2-exact: all", BASE, LOST),
        ("nsp2-exact: no gain", shifted(DOWN), LOST),
    )
    book = data.Book(kept(sample(), study_questions=asked))
    parts = tables.exact(book)
    assert "| a stream (questions) | `nsp2-exact: no gain` - `nsp2-exact: all` |" in parts
    assert "`nsp2-exact: no gain` - `nsp2-exact` " not in parts, "the study's row has another learning rate"
    rules = tables.rules(book)
    assert "| a stream (questions) | `null-space: energy:0.9, soft edge` - `null-space: energy:0.9` |" in rules
    assert "Forgetting against `full: none`: better: `null-space: energy:0.9`, `null-space: energy:0.9, soft" in rules
    assert "| 25.0 ± 0.0 | 85.0 ± 0.0 | 1.00 ± 0.00 |" in rules, "directions, energy, seconds of end_task"
    assert "`nsp2-exact: all`" not in rules


def test_lorac_by_what_it_knows() -> None:
    asked = record(
        ("sequential-lora: last", BASE, LOST),
        ("lorac: instance", shifted(DOWN), LOST),
        ("lorac: known", shifted(UP), LOST),
    )
    said = tables.lorac(data.Book(kept(None, study_questions=asked)))
    rows = {line.split(" | ")[1]: line for line in said.splitlines() if line.startswith("| a stream (")}
    assert "; worse |" in rows["`lorac: instance` - `sequential-lora: last`"]
    assert "; better |" in rows["`lorac: known` - `sequential-lora: last`"]


def test_the_sixth_task() -> None:
    given = {
        "columns": [["title", "Method", None], ["end_s", "End (s)", 2], ["difference", "Difference", None]],
        "rows": [{"title": "nsp2", "end_s": 1.234, "difference": 1.2e-6}, {"title": "gpm", "end_s": None}],
        "notes": ["A note."],
    }
    study = sample()
    for one in study["runs"]:
        one["accuracy_matrix"] = [[0.5] * 6] * 6
        one["seconds"] |= {"train": [2.0] + [1.0] * 4 + [3.0], "end_task": [0.0] * 5 + [1.0]}
    said = cost.sixth(data.Book(kept(study, sixth_task=given)))
    assert "| nsp2 | 1.23 | 1e-06 |" in said
    assert "| gpm | – | – |" in said
    assert "* A note." in said
    assert "| nsp2 | 4.00 | 2.00 | – | – | 25 |" in said, "by its first task; sequential and full were not run"
