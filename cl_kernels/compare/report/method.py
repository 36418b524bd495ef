"""How the verdict was reached, what was published before, what would change it, and how to use the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import numbers as n
from .arms import Arms, Results
from .blocks import Block, Code, Heading, Items, Note, Row, Section, Table, Text

TUNING = (
    "Every arm had its own settings tried by successive halving, with the same number of trials and the same rule: "
    "many settings first, the better ones again with more. Only images for training were used to choose."
)

__all__ = ["changes", "decided", "missing", "options_text", "prior", "weights"]


def decided(results: Results, arms: Arms) -> Section:
    """Protocol, trials, halving, bootstrap, budget and machine."""
    settings: Mapping[str, Any] = results.get("settings") or {}
    runs = list(results.get("runs") or [])
    seeds = sorted({int(run["seed"]) for run in runs})
    steps = [
        "At each size the same images, in the same order, went to every arm; smaller sets are parts of larger ones and "
        "keep the shares of the classes. Another draw takes other images.",
        str((results.get("plan") or {}).get("tuning_rule") or TUNING),
        "Test labels were read once, after all training. Accuracy is that of the last epoch unless another is named.",
        "The gap and its interval come from a paired bootstrap: test images and seeds are drawn again, with "
        "replacement, for both arms together. The crossing comes from a line in the logarithm of the size, fitted to "
        "those gaps.",
        _rule(results),
    ]
    blocks: list[Block] = [
        Text(
            f"{n.count(len(runs))} trainings were compared: {_words([arms.title(name) for name in arms.names])}; "
            f"{len(arms.sizes)} sizes ({', '.join(n.count(size) for size in arms.sizes)}); "
            f"{_plural(len(seeds), 'draw')} of the training images at each size."
        ),
        Items(steps),
        *_tuning(results, arms),
        *_not_tested(results, arms),
        *_budget(results),
    ]
    if settings:
        blocks.append(_pairs("Settings", settings, "Setting"))
    if results.get("environment"):
        blocks.append(_pairs("Machine and versions", results["environment"], "What"))
    return Section("decided", "How it was decided", blocks)


def prior(results: Results) -> Section:
    """What the published study found, beside the measurement and never instead of it."""
    given: Mapping[str, Any] = (results.get("decision") or {}).get("prior") or {}
    title = "What was published before"
    text = given.get("text")
    if not text:
        return Section("prior", title, [Note("No published result fits this backbone and data size.")])
    blocks: list[Block] = [
        Text(str(text)),
        Text("It is shown beside the measurement for comparison; it had no part in the verdict.", soft=True),
    ]
    if given.get("source"):
        blocks.append(Text(f"Source: {given['source']}", soft=True))
    return Section("prior", title, blocks)


def changes(results: Results) -> Section:
    """What would change the verdict."""
    given = [n.sentence(change) for change in (results.get("decision") or {}).get("changes") or []]
    title = "What would change the verdict"
    return Section("changes", title, [Items(given) if given else Note("Nothing that was looked at would change it.")])


def weights(results: Results, arms: Arms) -> Section:
    """The best weights of each arm, with a line that loads them."""
    title = "Using the best weights"
    given: Mapping[str, Any] = results.get("weights") or {}
    if not given:
        return Section("weights", title, [Note("No weights were kept; what is missing, below, says why.")])
    rows = [Row(arms.title(name), [str(entry["file"])]) for name, entry in given.items()]
    decision: Mapping[str, Any] = results.get("decision") or {}
    wanted = [str(decision.get(name)) for name in ("arm", "prompts_arm")]
    first = next((name for name in wanted if name in given), next(iter(given)))
    return Section(
        "weights",
        title,
        [
            Text("The weights of each arm's best run lie beside this page as safetensors files: loading runs no code."),
            Code(str(given[first]["loader"]), f"To load {arms.title(first)}:"),
            Table("The files of all arms; each is loaded in the same way", "Arm", ["File"], rows),
        ],
    )  # fmt: skip


def missing(results: Results) -> Section:
    """What is not here, and why."""
    given = [n.sentence(one) for one in results.get("missing") or []]
    return Section("missing", "What is missing, and why", [Items(given) if given else Text("Nothing is missing.")])


def options_text(options: Mapping[str, Any] | None) -> str:
    """`lr 0.001, prompts 10`; words where there are none."""
    if not options:
        return "no options"
    return ", ".join(f"{name} {_value(value)}" for name, value in options.items())


def _rule(results: Results) -> str:
    """What a verdict needs, by the decision's own numbers."""
    rule = (results.get("decision") or {}).get("rule") or {}
    level, smallest, agree, redraws = (n.value_of(rule, name) for name in ("level", "smallest", "agree", "redraws"))
    if level is None or smallest is None or agree is None or redraws is None:
        return "Where the redraws do not agree, the verdict is “too close to call”."
    return (
        f"A verdict needs a gap of at least {n.number(100 * smallest, 2)} points, a {100 * level:g} % interval that "
        f"leaves out no difference, and the same winner in {n.count(agree)} of {n.count(redraws)} re-draws. Else it is "
        "“too close to call”."
    )


def _tuning(results: Results, arms: Arms) -> list[Block]:
    rows, trials = [], []
    for arm in results.get("arms") or []:
        tuning: Mapping[str, Any] = arm.get("tuning") or {}
        tried = list(tuning.get("trials") or [])
        rungs = sorted({int(trial["rung"]) for trial in tried})
        per_rung = " → ".join(str(sum(int(t["rung"]) == rung for t in tried)) for rung in rungs)
        rows.append(
            Row(
                str(arm.get("title") or arm["name"]),
                [str(len(tried)), per_rung or n.NONE, options_text(tuning.get("chosen"))],
            )
        )
        trials += [
            Row(
                str(arm.get("title") or arm["name"]),
                [
                    options_text(t.get("options")), str(t.get("rung", n.NONE)), n.count(n.value_of(t, "images")),
                    n.count(n.value_of(t, "epochs")), n.percent(n.value_of(t, "validation_accuracy")),
                ],
            )
            for t in tried
        ]  # fmt: skip
    if not rows:
        return []
    blocks: list[Block] = [
        Heading("Tuning"),
        Table(
            "Trials of each arm, by rung of the halving, and the settings chosen",
            "Arm",
            ["Trials", "By rung", "Chosen"],
            rows,
            words=True,
        ),
    ]
    if trials:
        columns = ["Settings", "Rung", "Images", "Epochs", "Validation accuracy (%)"]
        blocks.append(Table("Every trial", "Arm", columns, trials, fold=f"All {len(trials)} trials", words=True))
    return blocks


def _not_tested(results: Results, arms: Arms) -> list[Block]:
    """Given by the decision where it says so; what follows from the runs otherwise."""
    given = [str(one) for one in (results.get("decision") or {}).get("not_tested") or []]
    if not given:
        given = [
            "Other backbones, other image sizes, stronger augmentation and longer training.",
            "Images that differ from the test images given: other cameras, places or times.",
        ]
        if arms.sizes:
            given.append(
                f"More than {n.count(arms.sizes[-1])} training images: what is said of them comes from the fit."
            )
    return [Heading("What was not tested"), Items(given)]


def _budget(results: Results) -> list[Block]:
    budget: Mapping[str, Any] = results.get("budget") or {}
    if not budget:
        return []
    spent, allowed = n.value_of(budget, "spent"), n.value_of(budget, "seconds")
    threads = n.value_of(budget, "threads")
    words = f"{n.seconds(spent)} of {n.seconds(allowed)} were used"
    if threads is not None:
        words += f", on {_plural(round(threads), 'thread')}"
    stages = [Row(str(one["stage"]), [n.seconds(n.value_of(one, "seconds"))]) for one in budget.get("stages") or []]
    blocks: list[Block] = [Heading("Time"), Text(words + ".")]
    return [*blocks, Table("Time by stage", "Stage", ["Time"], stages, fold="Time by stage")] if stages else blocks


def _pairs(title: str, values: Mapping[str, Any], head: str) -> Table:
    rows = [Row(name, [text]) for name, text in _flat(values)]
    return Table(title, head, ["Value"], rows, fold=title, words=True)


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            out += _flat(value, f"{before}{name}.")
        elif value is not None:
            out.append((f"{before}{name}", _value(value)))
    return out


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}".replace("-", "−") if value == value else "not a number"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(one) for one in value)
    return str(value)


def _plural(number: int, word: str) -> str:
    return f"{n.count(number)} {word}{'' if number == 1 else 's'}"


def _words(names: Sequence[str]) -> str:
    """a, b and c."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
