"""The same cases under pytest-benchmark: `pytest --benchmark-only benchmarks/`, a test for each variant of each case.

An output that is wrong fails its test before anything is timed. Process CPU time of one thread, or on a GPU wall time
to the end of the kernels; `cl-kernels bench` interleaves and is the one to quote. `--bench-quick` takes tiny shapes,
`--bench-all` every case instead of the table's. Cases are built once to learn their variants, and again when they run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cl_kernels.benchmarks import cpu_timing, harness, suite
from cl_kernels.benchmarks.options import Options


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cl_kernels")
    group.addoption("--bench-quick", action="store_true", help="tiny shapes: does it run, are outputs right")
    group.addoption("--bench-all", action="store_true", help="every case instead of the table's")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """The suite's options switch benchmarks off by default; who asks for nothing else wants them on."""
    if config.getoption("benchmark_only", False):
        config.option.benchmark_disable = False


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return Room.from_parent(parent, path=file_path)  # type: ignore[no-any-return]
    return None


class Room(pytest.File):
    """A benchmark file: a collector for each plan."""

    def collect(self) -> Iterator[pytest.Collector]:
        room, config = suite.room_of(self.path.name), self.config
        given = Options(rooms=(room,), quick=config.getoption("bench_quick"), all=config.getoption("bench_all"))
        for plan in suite.selected(room, given, suite.device_of("auto")):
            yield Planned.from_parent(self, name=plan.name, plan=plan, room=room)


class Planned(pytest.Collector):
    """A plan: an item for each variant; one case is in memory at a time."""

    built: tuple[Planned, harness.Case] | None = None

    def __init__(self, *, plan: harness.Plan, room: str, **rest: Any) -> None:
        super().__init__(**rest)
        self.plan, self.room = plan, room

    def collect(self) -> Iterator[pytest.Item]:
        for variant in self.plan.made().variants:
            yield Variant.from_parent(self, name=variant)

    def case(self) -> harness.Case:
        if Planned.built is None or Planned.built[0] is not self:
            Planned.built = None
            Planned.built = (self, self.plan.made())
        return Planned.built[1]


class Variant(pytest.Function):
    """One variant: checked, then handed to the `benchmark` fixture."""

    parent: Planned

    @classmethod
    def from_parent(cls, parent: Planned, **rest: Any) -> Variant:
        made: Variant = super().from_parent(parent, callobj=checked_and_timed, **rest)
        timer = time.perf_counter if suite.device_of("auto") == "cuda" else cpu_timing.clock
        made.add_marker(pytest.mark.benchmark(group=f"{parent.room}: {parent.plan.name}", timer=timer))
        return made


def checked_and_timed(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """The body of every item."""
    item = request.node
    case, threads = item.parent.case(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found, _ = case.check(item.name)
        benchmark.extra_info.update(found)
        call = case.variants[item.name]
        benchmark(_finished(call) if suite.device_of("auto") == "cuda" else call)
    finally:
        torch.set_num_threads(threads)


def _finished(call: Any) -> Any:
    """On a GPU a call has ended when its kernels have."""

    def whole() -> None:
        call()
        torch.cuda.synchronize()

    return whole
