"""The benchmarks refuse to time what is wrong, see the memory a call takes, and their own outputs are right."""

from __future__ import annotations

import importlib
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cl_kernels.benchmarks import bench_covariance, cpu_timing, cuda_timing, harness, memory, records, spread, suite
from cl_kernels.benchmarks.options import Options, parse

from cl_kernels import ops

ROOT = Path(__file__).resolve().parents[1]
RATES = harness.Rates(sgemm=100.0, dgemm=50.0, bf16gemm=400.0, copy=40.0)
NEEDS_TIMM = ("kdp_schedule", "lora_stack", "prefix_attention", "statistics")


def plan(case: harness.Case, name: str = "c") -> harness.Plan:
    return harness.Plan(name, lambda: case)


def measure(case: harness.Case) -> dict[str, Any]:
    return harness.measure(plan(case), RATES, budget_s=0.01, peaks=False)


def test_compiling_is_no_part_of_a_compiled_baselines_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cold cache its first call took 2.7 s, and was all that was counted: a speed-up of 35 000."""
    now, coming = [0.0], [3.0, 0.5]
    monkeypatch.setattr(cpu_timing, "clock", lambda: now[0])

    def call() -> torch.Tensor:
        now[0] += coming.pop(0)
        return torch.ones(2)

    assert harness.Case({"torch.compile": call}, torch.ones(2), 0.0).check("torch.compile")[1] == 0.5


def test_nothing_wrong_is_timed() -> None:
    """A baseline that disagrees has its disagreement and no speed-up; where ours is wrong nothing has a time."""
    right, wrong = torch.ones(4, 4), torch.full((4, 4), 1.1)
    case = harness.Case({"ours": lambda: right, "other": lambda: wrong}, right, {"ours": 1e-6, "other": 0.2})
    ours, other = measure(case)["rows"]
    assert other["error"] == pytest.approx(0.1, rel=1e-5)
    assert other["times_ours"] == pytest.approx(other["median_s"] / ours["median_s"])
    case.tolerance = 0.05
    ours, other = measure(case)["rows"]
    assert other == {"variant": "other", "failed": "other is wrong, error 1.0e-01 > 5.0e-02"}
    assert ours["times_ours"] == 1.0
    case.tolerance, case.variants = math.inf, {"ours": lambda: right, "other": lambda: right / 0}
    assert measure(case)["rows"][1] == {"variant": "other", "failed": "other disagrees, error inf"}
    case.tolerance, case.variants = 0.05, {"ours": lambda: wrong, "other": lambda: right}
    assert all("median_s" not in row for row in measure(case)["rows"])
    nan = harness.Case({"ours": lambda: torch.full((4, 4), math.nan)}, right, 1.0)
    with pytest.raises(ValueError, match="ours is wrong"):
        nan.check("ours")
    shape = harness.Case({"ours": lambda: right[:2]}, right, 1.0)
    with pytest.raises(ValueError, match="ours is wrong, error inf"):
        shape.check("ours")


def test_a_variant_that_cannot_run_says_why() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel\nand more")

    one = torch.ones(1)
    rows = measure(harness.Case({"ours": lambda: one, "other": broken}, one, 0.0))["rows"]
    assert rows[1] == {"variant": "other", "failed": "RuntimeError: no kernel"}


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The deliberately wrong one: every sum a thousandth too large."""
    right = ops.update_covariance_

    def wrong(cov: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return right(cov, x).mul_(1.001)

    words = ["covariance", "--quick", "--only", "covariance 197x64 float32", "--device", "cpu"]
    assert suite.command(words) == 0
    assert "of floor" in capsys.readouterr().out
    monkeypatch.setattr(bench_covariance.ops, "update_covariance_", wrong)
    assert suite.command(words) == 1
    out = capsys.readouterr().out
    assert "WRONG: covariance: covariance 197x64 float32: ours is wrong, error 1.0e-03 > 1.0e-06" in out
    assert "of floor" not in out


def test_measures_have_limits_for_those_that_promise() -> None:
    one = torch.ones(1)
    case = harness.Case(
        {"ours": lambda: one, "baseline": lambda: one}, one, 1.0, measures={"leak": float}, limits={"leak": 0.5}
    )
    assert case.check("baseline")[0] == {"error": 0.0, "leak": 1.0}
    with pytest.raises(ValueError, match="ours is wrong, leak"):
        case.check("ours")


def test_a_plan_costs_nothing_and_builds_the_same_case_again() -> None:
    built = []

    @harness.planned("sum of {n} {dtype}")
    def case(n: int, dtype: torch.dtype = torch.bfloat16, *, slow: bool = False) -> harness.Case:
        built.append(n)
        x = torch.randn(n, dtype=dtype)
        return harness.Case({"ours": lambda: x}, x, 0.0)

    made = case(3, slow=True)
    assert (made.name, made.dtype, made.slow, built) == ("sum of 3 bfloat16", torch.bfloat16, True, [])
    assert torch.equal(made.made().variants["ours"](), made.made().variants["ours"]())
    assert built == [3, 3]


def test_variants_take_turns_evenly() -> None:
    order = list(cpu_timing.schedule({"quick": 6, "slow": 2, "never": 0}))
    assert (order.count("quick"), order.count("slow")) == (6, 2)
    between = [i for i, name in enumerate(order) if name == "slow"]
    assert between[0] <= 4
    assert between[1] >= 4, "the slow one is not timed all at once"
    assert list(cpu_timing.schedule({})) == []


def test_a_budget_decides_how_often() -> None:
    """All have the same share; a first call counts where it is long, and is the only one where it takes seconds."""
    calls = {"quick": 0, "long": 0, "endless": 0}

    def call(name: str) -> None:
        calls[name] += 1

    variants = {name: (lambda name=name: call(name)) for name in calls}
    found = cpu_timing.times(variants, {"quick": 0.2, "long": 1.0, "endless": 100.0}, 6.0, peaks=False)
    assert [len(found[name]["blocks"][0]) for name in calls] == [10, 3, 1]
    assert found["endless"]["blocks"] == [[100.0]]
    assert calls == {"quick": 10, "long": 2, "endless": 0}


def test_the_clock_counts_children() -> None:
    import subprocess
    import sys

    before = cpu_timing.clock()
    subprocess.run([sys.executable, "-c", "for _ in range(3_000_000): pass"], check=True)
    assert cpu_timing.clock() - before >= 0.02


def test_sets_of_inputs_push_each_other_out_of_the_cache() -> None:
    assert cuda_timing.sets_wanted(300e6) == 1
    assert cuda_timing.sets_wanted(38.7e6) == 7
    assert cuda_timing.sets_wanted(1e6) == 0, "L2 is zeroed instead: 240 sets would be built"
    assert cuda_timing.sets_wanted(0.0) == 0


def row(*passes: list[float], variant: str = "ours") -> dict[str, Any]:
    return {"variant": variant, "blocks": list(passes), "error": 0.0}


def result(*rows: dict[str, Any], case: str = "c") -> dict[str, Any]:
    return {"room": "r", "case": case, "device": "cpu", "floor_s": None, "seconds": 1.0, "rows": list(rows)}


def test_the_spread_holds_what_varies_between_blocks_processes_and_the_whole_run() -> None:
    (blocks,) = spread.summarised(result(row([1.0, 1.2, 0.8, 1.1, 0.9], [1.0, 1.2, 0.8, 1.1, 0.9])))["rows"]
    assert (blocks["median_s"], blocks["min_s"]) == (1.0, 0.8)
    assert blocks["spread"] == pytest.approx((blocks["p75_s"] - blocks["p25_s"]) / 2)
    (processes,) = spread.summarised(result(row([1.0, 1.0], [1.2, 1.2])))["rows"]
    assert processes["spread"] == pytest.approx(0.2 / 1.1)
    (once,) = spread.summarised(result(row([1.0, 1.0, 1.0])))["rows"]
    assert once["spread"] == spread.ONE_PASS, "one process says nothing about another"
    steady = [result(row([1.0], [1.0]), case=f"c{i}") for i in range(8)]
    apart = [result(row([1.0], [1.06]), case=f"d{i}") for i in range(2)]
    whole = spread.pooled(steady + apart)
    assert min(one["rows"][0]["spread"] for one in whole) == pytest.approx(0.06 / 1.03), "the machine's drift"


def test_passes_are_put_together() -> None:
    first = [result(row([1.0, 2.0]), row([4.0], variant="other")), result(row([1.0]), case="only once")]
    second = [result(row([3.0]), {"variant": "other", "failed": "other is wrong"})]
    whole, once = spread.merged([first, second])
    assert whole["rows"][0]["blocks"] == [[1.0, 2.0], [3.0]]
    assert whole["rows"][0]["median_s"] == 2.0
    assert whole["rows"][1] == {"variant": "other", "failed": "other is wrong"}
    assert whole["seconds"] == 2.0
    assert once["rows"][0]["spread"] == pytest.approx(2 / 3), "what the run's other passes lie apart"
    late = spread.merged([[result(row([1.0]))], [result(row([1.0])), result(row([2.0]), case="later")]])
    assert [(one["case"], len(one["rows"][0]["blocks"])) for one in late] == [("c", 2), ("later", 1)]
    alike = spread.merged([[result(row([1.0]))], [result(row([2.0])) | {"room": "another"}]])
    assert [one["rows"][0]["blocks"] for one in alike] == [[[1.0]], [[2.0]]], "of another room"


def test_repetitions_agree_as_often_as_the_spread_claims() -> None:
    """Runs of a machine whose processes differ by 3 % and whose blocks by 2 %: 19 of 20 rows must agree."""
    generator = torch.Generator().manual_seed(0)

    def blocks() -> list[float]:
        process = 1 + 0.03 * float(torch.randn((), generator=generator))
        return [process * (1 + 0.02 * float(x)) for x in torch.randn(9, generator=generator)]

    runs = [spread.pooled([result(row(blocks(), blocks()), case=str(i)) for i in range(60)]) for _ in range(2)]
    pairs = list(zip(*([one["rows"][0] for one in run] for run in runs), strict=True))
    assert statistics.mean(spread.agree(a, b) for a, b in pairs) >= 0.95
    assert max(a["spread"] for a, _ in pairs) < 0.2, "a spread that covers everything says nothing"


def test_a_peak_is_what_the_call_takes() -> None:
    kept = torch.ones(1 << 20)
    none = memory.peak_extra(lambda: kept)
    if none is None:
        pytest.skip("this system does not reset the peak of a process")
    assert none < 4 << 20
    found = memory.peak_extra(lambda: torch.ones(16 << 20).sum())
    assert 60 << 20 < found < 80 << 20  # 64 MiB, freed before the call returns


def test_a_file_of_numbers_is_whole_after_each_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "numbers.json"
    one = torch.ones(2)

    def cases(quick: bool) -> Iterator[harness.Plan]:
        yield plan(harness.Case({"ours": lambda: one}, one, 0.0, flops=1.0), "first")
        yield harness.Plan("second", second)
        yield harness.Plan("third", third)

    def second() -> harness.Case:
        assert [one["case"] for one in records.read(path)["results"]] == ["first"]
        raise ModuleNotFoundError("No module named 'timm'")

    def third() -> harness.Case:
        raise harness.NotHereError("needs 18 GB")

    monkeypatch.setattr(bench_covariance, "cases", cases)
    threads = torch.get_num_threads()
    assert suite.command(["covariance", "--quick", "--json", str(path), "--device", "cpu"]) == 0
    assert torch.get_num_threads() == threads
    report = records.read(path)
    assert [one["case"] for one in report["results"]] == ["first"]
    assert report["not_run"] == {
        "covariance: second": "not run: No module named 'timm'",
        "covariance: third": "not run: needs 18 GB",
    }
    assert report["environment"]["device"] == "cpu"
    assert "covariance" in report["rates"]


def test_time_that_is_up_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(2)
    monkeypatch.setattr(bench_covariance, "cases", lambda quick: [plan(harness.Case({"ours": lambda: one}, one, 0.0))])
    given = Options(rooms=("covariance",), quick=True, limit=0.5)
    report = suite.run_pass("covariance", given, "cpu", say=lambda _: None, save=lambda _: None)
    assert report["not_run"] == {"covariance: c": "not run: the time was up"}
    assert report["results"] == []


ROOMS = [room for room in suite.rooms() if room != "import"]


@pytest.mark.parametrize("room", ROOMS)
def test_outputs_are_right_at_small_sizes(room: str) -> None:
    if room in NEEDS_TIMM:
        pytest.importorskip("timm", reason="its models are timm's")
    module = importlib.import_module(f"cl_kernels.benchmarks.bench_{room}")
    checked = 0
    for one in module.cases(True):
        case = one.made()
        for variant in case.variants:
            case.check(variant)
            checked += 1
    assert checked >= 6


@pytest.mark.parametrize("room", suite.rooms())
def test_a_table_names_cases_that_exist_and_the_readme_asks_for_no_other(room: str) -> None:
    module = suite.module_of(room)
    plans = list(module.cases(False))
    for start in module.TABLE:
        assert any(one.name.startswith(start) for one in plans), start
    assert len({one.name for one in plans}) == len(plans), "names tell cases apart"
    spec = importlib.util.spec_from_file_location("readme_benchmarks", ROOT / "scripts" / "readme_benchmarks.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    chosen = [one.name for one in suite.table(module, plans)]
    for table in script.TABLES:
        for line in table.lines if table.file == room else ():
            assert any(name.startswith(line.case) for name in chosen), f"{line.case} is in README.md, not in the table"


def test_every_kept_result_has_a_room() -> None:
    kept = {path.stem for path in (ROOT / "benchmarks" / "results" / "cpu").glob("*.json")}
    assert kept <= set(suite.rooms())


def test_a_report_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    good = suite.empty_report(parse(["--quick"]), "cpu")
    records.write(path, good)
    assert records.read(path) == json.loads(path.read_text())
    for change, text in (
        ({"schema": "cl_kernels.bench/1"}, "expected a report of cl_kernels.bench/2, got 'cl_kernels.bench/1'"),
        ({"results": {}}, "results: expected a list, got dict"),
        ({"environment": {"cpu": "x"}}, "environment: device is missing"),
        ({"results": [{"case": "c"}]}, r"results\[0\]: device, room, rows is missing"),
        ({"results": [result({"variant": "ours"})]}, "neither times nor a reason"),
    ):
        records.write(path, good | change)
        with pytest.raises(ValueError, match=text):
            records.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        records.read(path)


def test_the_table_says_what_it_belongs_to() -> None:
    report = suite.empty_report(parse(["--quick"]), "cpu")
    report["results"] = spread.pooled([result(row([2e-3], [2e-3]), {"variant": "b", "failed": "b is wrong, error 1"})])
    text = records.markdown(report)
    assert "No GPU here: CPU cases, which say nothing about a GPU." in text
    assert "| c | ours | 2 ms ± 0 % |  | 1 | 0e+00 |" in text
    assert "|  | b | no time: b is wrong, error 1 | | | |" in text


def test_the_listed_parameters_are_timms() -> None:
    timm = pytest.importorskip("cl_kernels._timm").import_timm()
    from cl_kernels.benchmarks import ftp_variants

    for ours, theirs in {"ViT-B/16": "vit_base_patch16_224", "ResNet-50": "resnet50"}.items():
        with torch.device("meta"):
            model = timm.create_model(theirs, num_classes=0)
        assert [tuple(p.shape) for p in model.parameters()] == ftp_variants.parameter_list(ours)


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_the_wanted_share_is_projected_and_counted(base: str) -> None:
    from cl_kernels.benchmarks import bench_weight_projection, counting, ftp_variants

    for share in (0.0, 0.3, 1.0):
        s = ftp_variants.layers("2 blocks of width 128", share, "cpu", base)
        ours = bench_weight_projection.Ours(s)
        s.reset()
        for _ in range(3):
            ours.step()
            assert ours.share() == pytest.approx(share, abs=0.02)
    counter = counting.Counter.of(ftp_variants.official(s))
    assert counter.waits >= 2 * len(s.params)
    assert counter.operations >= 40 * len(s.params)


@pytest.mark.parametrize(("variant", "code"), [("ours", 1), ("ours, bf16 anchors", 1), ("torch eager", 0)])
def test_every_variant_of_ours_must_be_right(variant: str, code: int) -> None:
    rows = [{"variant": variant, "failed": "error 1 > 1e-6"}]
    report = {"results": [{"room": "r", "case": "c", "rows": rows}], "not_run": {}}
    assert suite._verdict(report, None, Options()) == code
