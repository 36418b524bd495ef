"""The benchmarks refuse to time what is wrong, see the memory a call takes, and their own outputs are right."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The harness, imported as the scripts do it: by a name beside them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    known = set(sys.modules)
    import harness

    threads = torch.get_num_threads()
    yield harness
    torch.set_num_threads(threads)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


RATES = {"sgemm": 100.0, "dgemm": 50.0, "bf16gemm": 400.0, "copy": 40.0}


def test_nothing_wrong_is_timed(bench: ModuleType) -> None:
    right, wrong = torch.ones(4, 4), torch.full((4, 4), 1.1)
    case = bench.Case("c", {"ours": lambda: right, "other": lambda: wrong}, right, {"ours": 1e-6, "other": 0.2})
    result = bench.measure(case, bench.Rates(**RATES), rounds=1)
    assert [row["variant"] for row in result["rows"]] == ["ours", "other"]
    assert result["rows"][1]["error"] == pytest.approx(0.1, rel=1e-5)
    case.tolerance = 0.05
    with pytest.raises(ValueError, match="other is wrong, error"):
        bench.measure(case, bench.Rates(**RATES), rounds=1)
    nan = bench.Case("n", {"ours": lambda: torch.full((4, 4), math.nan)}, right, 1.0)
    with pytest.raises(ValueError, match="ours is wrong"):
        nan.check("ours")


def test_measures_have_limits_for_those_that_promise(bench: ModuleType) -> None:
    one = torch.ones(1)
    case = bench.Case(
        "c", {"ours": lambda: one, "baseline": lambda: one}, one, 1.0, measures={"leak": float}, limits={"leak": 0.5}
    )
    assert case.check("baseline")[0] == {"error": 0.0, "leak": 1.0}
    with pytest.raises(ValueError, match="ours is wrong, leak"):
        case.check("ours")


def test_a_peak_is_what_the_call_takes(bench: ModuleType) -> None:
    import memory

    kept = torch.ones(1 << 20)
    none = memory.peak_extra(lambda: kept)
    if none is None:
        pytest.skip("this system does not reset the peak of a process")
    assert none < 4 << 20
    found = memory.peak_extra(lambda: torch.ones(16 << 20).sum())
    assert 60 << 20 < found < 80 << 20  # 64 MiB, freed before the call returns


def test_a_file_of_numbers_is_whole_after_each_case(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "numbers.json"
    one = torch.ones(2)

    def cases(quick: bool) -> Iterator[object]:
        yield bench.Case("first", {"ours": lambda: one}, one, 0.0, flops=1.0)
        yield bench.Case("slow", {"ours": lambda: one}, one, 0.0, slow=True)
        assert [result["case"] for result in json.loads(path.read_text())["results"]] == ["first"]
        yield bench.Case("second", {"ours": lambda: one}, one, 0.0)

    assert bench.main("d", cases, arguments=["--quick", "--json", str(path), "--device", "cpu"]) == 0
    report = json.loads(path.read_text())
    assert [result["case"] for result in report["results"]] == ["first", "second"]
    assert report["environment"]["device"] == "cpu"


@pytest.mark.parametrize(
    "name",
    [
        "bench_covariance",
        "bench_distillation",
        "bench_kdp_schedule",
        "bench_lora_stack",
        "bench_null_space",
        "bench_orthogonal_qr",
        "bench_prefix_attention",
        "bench_statistics",
        "bench_weight_projection",
    ],
)
def test_outputs_are_right_at_small_sizes(bench: ModuleType, name: str) -> None:
    if name in ("bench_lora_stack", "bench_prefix_attention", "bench_statistics", "bench_kdp_schedule"):
        pytest.importorskip("timm", reason="its models are timm's")
    module = __import__(name)
    checked = 0
    for case in module.cases(True):
        for variant in case.variants:
            case.check(variant)
            checked += 1
    assert checked >= 6


def test_the_listed_parameters_are_timms(bench: ModuleType) -> None:
    timm = pytest.importorskip("cl_kernels._timm").import_timm()
    import ftp_variants

    for ours, theirs in {"ViT-B/16": "vit_base_patch16_224", "ResNet-50": "resnet50"}.items():
        with torch.device("meta"):
            model = timm.create_model(theirs, num_classes=0)
        assert [tuple(p.shape) for p in model.parameters()] == ftp_variants.parameter_list(ours)


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_the_wanted_share_is_projected_and_counted(bench: ModuleType, base: str) -> None:
    import bench_weight_projection
    import ftp_variants

    for share in (0.0, 0.3, 1.0):
        s = ftp_variants.layers("2 blocks of width 128", share, "cpu", base)
        ours = bench_weight_projection.Ours(s)
        s.reset()
        for _ in range(3):
            ours.step()
            assert ours.share() == pytest.approx(share, abs=0.02)
    counter = ftp_variants.Counter.of(ftp_variants.official(s))
    assert counter.waits >= 2 * len(s.params)
    assert counter.operations >= 40 * len(s.params)
