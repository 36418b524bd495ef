"""docs/results.md and the README's section say what the kept runs carry, and "not yet run" of what is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from results_runs import ROOT, cost, data, drawings, page, run, sample

from cl_kernels.continual import study

RESULTS = ROOT / "benchmarks" / "results"
PAGE = page.PAGE.read_text(encoding="utf-8")
README = page.README.read_text(encoding="utf-8")
RUN_SO_FAR = [name for name in data.STUDIES if (RESULTS / f"{name}.json").is_file()]


class TestCommitted:
    def test_page_and_section_are_those_of_the_kept_runs(self) -> None:
        book = data.Book(data.load())
        assert page.filled(README, {"results": page.section(book)}, "README.md") == README, (
            "python scripts/results_page.py"
        )
        made = page.blocks(book)
        assert page.filled(PAGE, made, "results.md") == PAGE, "python scripts/results_page.py"
        number = re.compile(r"\| vit_omniglot \| 0 \| 0\.\d")
        changed = number.sub("| vit_omniglot | 0 | 9.9", PAGE)
        assert changed != PAGE
        assert page.filled(changed, made, "results.md") == PAGE
        with pytest.raises(SystemExit, match="not there once"):
            page.filled("a page without markers", made, "results.md")

    def test_prose_holds_no_number(self) -> None:
        prose = re.sub(r"<!-- (\S+): begin -->.*?<!-- \1: end -->", "", PAGE, flags=re.DOTALL)
        prose = re.sub(r"^#.*$|`[^`]*`", "", prose, flags=re.MULTILINE)
        assert set(re.findall(r"\b\d+(?:\.\d+)?", prose)) <= {"95", "7"}, (
            "the level of intervals, and a part of the page"
        )

    @pytest.mark.parametrize("name", data.STUDIES)
    def test_kept_runs_are_small_and_those_of_the_settings(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if name not in RUN_SO_FAR:
            pytest.skip("not yet run")
        text = (RESULTS / f"{name}.json").read_text(encoding="utf-8")
        found = json.loads(text)
        assert not found["quick"]
        assert len(text) <= 4096 * (len(found["runs"]) + 1)
        assert not re.findall(r'"/(?:\w+/)+', text), "paths of one machine"
        monkeypatch.setattr(study, "_check_names", lambda config: None, raising=False)  # the data need not be here
        seeds = 1 + max(one["seed"] for one in found["runs"])
        jobs = study.load_plan(ROOT / "examples" / f"{name}.toml", "out", seeds=seeds).jobs
        plan = {(job.title, job.label, job.seed): job.config().as_json() for job in jobs}
        for one in found["runs"]:
            wanted = data.said(data.rounded(plan[one["title"], one["label"], one["seed"]]))
            assert one["config"] == wanted, (one["label"], one["seed"])

    def test_figures_are_small_whole_and_described(self) -> None:
        book = data.Book(data.load())
        named = re.findall(r"!\[([^\]]+)\]\(figures/(results-[^)]+\.svg)\)", PAGE)
        there = sorted(path.name for path in page.FIGURES.glob("results-*.svg"))
        assert sorted(name for _, name in named) == there
        assert (not there) == (not book.reported)
        texts = {name: (page.FIGURES / name).read_text(encoding="utf-8") for name in there}
        assert sum(map(len, texts.values())) <= 400_000
        for text in texts.values():
            assert not re.findall(r'href="(?!#)[^"]*"', text), "it loads nothing from elsewhere"

    def test_figures_are_drawn_from_the_kept_runs(self) -> None:
        pytest.importorskip("matplotlib", reason="figures are matplotlib's")
        labels = re.compile(r"<text[^>]*>([^<]*)</text>")
        for name, svg in drawings.drawn(data.Book(data.load())).items():
            committed = (page.FIGURES / name).read_text(encoding="utf-8")
            assert labels.findall(svg) == labels.findall(committed), "python scripts/results_page.py"

    @pytest.mark.parametrize("name", data.REPORTED)
    def test_settings_are_what_the_trials_chose(self, name: str) -> None:
        if not (RESULTS / f"{name}_tuning.json").is_file():
            pytest.skip("not yet run")
        tuned = json.loads((RESULTS / f"{name}_tuning.json").read_text(encoding="utf-8"))
        choose = page.tuning().choose
        assert len({len(entry["trials"]) for entry in tuned["methods"].values()}) == 1, "as many for one as for another"
        for entry in tuned["methods"].values():
            best = choose(entry["trials"])
            assert {key: best[key] for key in best if key != "scores"} == entry["chosen"]


def test_what_is_not_there_is_not_yet_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "results-old.svg").write_text("<svg/>", encoding="utf-8")
    for name, text in (("PAGE", PAGE), ("README", README)):
        monkeypatch.setattr(page, name, tmp_path / f"{name}.md")
        (tmp_path / f"{name}.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr(page, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "load", lambda: data.load(tmp_path))
    assert page.main([]) == 0
    told = (tmp_path / "PAGE.md").read_text(encoding="utf-8")
    for name in ("methods", "step", "exact", "rules", "lorac", "sixth", "kdp", "streams", "machine", "settings"):
        part = told.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]
        assert "not yet run" in part, name
    assert "not yet run" in (tmp_path / "README.md").read_text(encoding="utf-8").split("<!-- results: begin -->")[1]
    assert not list((tmp_path / "figures").iterdir()), "an old figure is no result"
    assert page.main(["--check"]) == 0

    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps({**sample(), "quick": True}), encoding="utf-8")
    with pytest.raises(SystemExit, match="--quick"):
        page.main(["--keep", "study", str(raw)])
    pytest.importorskip("matplotlib", reason="figures are matplotlib's")
    raw.write_text(json.dumps(sample()), encoding="utf-8")
    assert page.main(["--keep", "study", str(raw)]) == 0
    assert page.main(["--check"]) == 0
    assert "### a stream" in (tmp_path / "PAGE.md").read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "results-a-stream-cost.svg").is_file()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text.replace("| nsp2 | 60.", "| nsp2 | 61."), encoding="utf-8")
    assert page.main(["--check"]) == 1


def test_a_kept_run_has_what_the_page_needs_and_no_more() -> None:
    one = run("nsp2", 0, 1 / 3, 0.1)
    short = data.compact(one)
    assert short["average_accuracy"] == 0.33333
    assert short["subspace"] == [{"dim": 96, "protected": 24, "energy": 0.85}] * 2 + [{}]
    assert short["config"]["seed"] == 0
    assert "lr" not in short["config"]
    assert short["feature_drift"] == {"final_relative": 0.25, "final_cosine": 0.33333}
    assert not {"prompt_usage", "anchoring", "tasks"} & set(short)
    assert data.SHARE.pick(short) == 0.25
    assert data.SHARE.pick({**short, "method": "matched-lr"}) is None, "the control protects nothing"
    for measure in (data.ACCURACY, data.FORGETTING, data.KNOWN, data.DRIFT, data.SECONDS, data.END_TASK):
        assert measure.pick(short) == pytest.approx(measure.pick(one), rel=1e-4)


def test_the_spread_of_norm1(tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.torch", reason="backbones are safetensors files").save_file
    tensors = {"blocks.0.norm1.weight": torch.full((8,), 2.0), "blocks.1.norm1.weight": torch.tensor([1.0, 3.0] * 50)}
    save({**tensors, "blocks.0.norm2.weight": torch.ones(3)}, str(tmp_path / "a.safetensors"))
    told = cost.norms([tmp_path])
    assert "| a | 0 | 2.000 | 2.000 | 2.000 | 0.000 |" in told
    assert f"| a | 1 | 1.000 | 3.000 | 2.000 | {torch.tensor([1.0, 3.0] * 50).std() / 2:.3f} |" in told
    assert told.count("| a |") == 2
