"""Several processes: sums over uneven shares, wrappers, sharded eigendecompositions, errors that reach everyone."""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_kernels import NonFiniteError, SolverError, SubspaceError, SubspaceMismatchError, rules
from cl_kernels.subspace import Covariance, CovarianceCollector, PromptCovariance, _owners, _reduce, build, build_store

Work = Callable[[int, "dist.ProcessGroup"], None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def close(a: Tensor, b: Tensor, bound: float = 1e-12) -> bool:
    return bool((a.double() - b.double()).norm() <= bound * b.double().norm() + 1e-30)


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_processes(number: int, work: Work, folder: Path) -> None:
    """Run `work(rank, group)` on `number` gloo processes; fails with what any of them printed."""
    if not dist.is_available() or "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs torch.distributed and fork")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_child, args=(rank, number, work, str(folder))) for rank in range(number)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        child.kill()  # nothing, unless it hangs
        child.join()
    assert [child.exitcode for child in children] == [0] * number


def _child(rank: int, number: int, work: Work, folder: str) -> None:
    torch.set_num_threads(1)  # a forked child has none of its parent's OpenMP threads, and would wait for them for ever
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=number)
        group = dist.group.WORLD
        assert group is not None
        work(rank, group)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


# ---------------------------------------------------------------------------------------------------- sums
@pytest.mark.parametrize("number", [2, 4])
def test_sums_over_uneven_shares(number: int, tmp_path: Path) -> None:
    """Shares of different sizes, one of them empty, give what one process gives; so do the fourth moments."""

    def work(rank: int, group: dist.ProcessGroup) -> None:
        model, x = Net().double(), data(11, 5)
        shares = [x[:3], x[3:4], x[4:4], x[4:]] if number == 4 else [x, x[:0]]
        for options in ({"centred": True}, {"weighting": "batches"}, {"shrinkage": "ledoit-wolf"}):
            with CovarianceCollector(model, process_group=group, **options) as collector:
                if len(shares[rank]):
                    model(shares[rank])
            shared, again = collector.covariances(), collector.covariances()
            with CovarianceCollector(model, **options) as single:
                for share in shares:
                    if len(share):
                        model(share)
            for name, expected in single.covariances().items():
                assert close(shared[name].matrix, expected.matrix)
                assert torch.equal(shared[name].matrix, shared[name].matrix.mT)
                assert close(shared[name].mean, expected.mean)
                assert torch.equal(shared[name].matrix, again[name].matrix)
                assert (shared[name].count, shared[name].rows) == (pytest.approx(expected.count), expected.rows)
                if "shrinkage" in options:
                    assert shared[name].shrinkage("ledoit-wolf") == pytest.approx(expected.shrinkage("ledoit-wolf"))

    on_processes(number, work, tmp_path)


def test_triangles_travel_in_bounded_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and buckets smaller than a matrix and larger than one; head Grams; about half of the numbers are sent."""
    monkeypatch.setattr(_reduce, "BLOCK_ROWS", 3)
    monkeypatch.setattr(_reduce, "BUCKET_BYTES", 8 * 60)

    def work(rank: int, group: dist.ProcessGroup) -> None:
        sent: list[int] = []
        plain = dist.all_reduce

        def counted(tensor: Tensor, *args: object, **options: object) -> object:
            sent.append(tensor.numel() if options.get("async_op") else 0)
            return plain(tensor, *args, **options)

        monkeypatch.setattr(dist, "all_reduce", counted)
        matrices = [data(10, 10, seed=3 + rank), data(4, 7, 7, seed=5 + rank), data(1, 1), data(2, 2)]
        matrices = [m + m.mT for m in matrices]
        before = [m.clone() for m in matrices]
        found = _reduce._reduced_matrices(matrices, group)
        for i, (mine, matrix) in enumerate(zip(before, found, strict=True)):
            assert torch.equal(mine, matrices[i])
            seeds = {0: (3, 4), 1: (5, 6)}.get(i)
            if seeds:
                both = [data(*mine.shape, seed=seed) for seed in seeds]
                expected = sum(m + m.mT for m in both)
            else:
                expected = 2 * mine
            assert close(matrix, expected)
        assert max(sent) <= 4 * 7 * 7
        assert sum(sent) < 0.8 * sum(m.numel() for m in matrices)

    on_processes(2, work, tmp_path)


def test_errors_reach_every_process(tmp_path: Path) -> None:
    def work(rank: int, group: dist.ProcessGroup) -> None:
        model, x = Net().double(), data(10, 5)
        with CovarianceCollector(model, process_group=group) as collector:
            model(x)
            model(x * (float("nan") if rank == 2 else 1.0))
        with pytest.raises(NonFiniteError, match=r"first\.weight.*batch 1 .*of 6 seen"):
            collector.covariances()
        with CovarianceCollector(model, ["first"] if rank else ["second"], process_group=group) as collector:
            model(x)
        with pytest.raises(SubspaceMismatchError, match="different layers"):
            collector.covariances()

    on_processes(3, work, tmp_path)


def test_a_process_with_nothing_is_told_and_leaves_nobody_waiting(tmp_path: Path) -> None:
    """Rows given by name: a process without any knows no layer. Other options on one process are another layer."""

    def work(rank: int, group: dist.ProcessGroup) -> None:
        for options in ({"dtype": (torch.float64, torch.float32)[rank]}, {"shrinkage": ("ledoit-wolf", None)[rank]}):
            collector = CovarianceCollector(process_group=group, **options)
            collector.update("w", data(8, 4))
            with pytest.raises(SubspaceMismatchError, match="different layers"):
                collector.covariances()
        nobody = CovarianceCollector(process_group=group)
        assert nobody.covariances() == {}
        assert len(build_store({}, rules.Rank(1), process_group=group)) == 0
        if rank:
            nobody.update("w", data(8, 4))
        with pytest.raises(SubspaceMismatchError, match="different layers"):
            nobody.covariances()
        found = {"w": moments(4, 1)} if rank else {}
        with pytest.raises(SubspaceMismatchError, match="different stores"):
            build_store(found, rules.Rank(1), process_group=group)

    on_processes(2, work, tmp_path)


def test_models_that_are_wrapped_for_several_processes(tmp_path: Path) -> None:
    """DistributedDataParallel, within no_sync and Join as well, and fully_shard: activations are whole everywhere."""

    def work(rank: int, group: dist.ProcessGroup) -> None:
        from torch.distributed.algorithms.join import Join
        from torch.distributed.fsdp import fully_shard

        x = data(9, 5, seed=7 + rank)
        everything = torch.cat([data(9, 5, seed=7), data(9, 5, seed=8)])
        plain = Net().double()
        for what in ("input", "output_grad"):
            with CovarianceCollector(plain, what=what) as single:
                plain(everything).sum().backward()
            expected = single.covariances()
            wrapped = nn.parallel.DistributedDataParallel(Net().double())
            with CovarianceCollector(wrapped, what=what, process_group=group) as collector, wrapped.no_sync():
                wrapped(x).sum().backward()
            found = collector.covariances()
            assert list(found) == ["first.weight", "second.weight"]
            for name, covariance in expected.items():
                assert close(found[name].matrix, covariance.matrix)
        joined = nn.parallel.DistributedDataParallel(Net().double())
        with CovarianceCollector(joined, process_group=group) as collector, Join([joined]):
            for part in x.split(2)[: 5 - 2 * rank]:  # the second process runs out of batches first
                joined(part).sum().backward()
        assert collector.covariances()["first.weight"].rows == 9 + 6
        sharded = Net().double()
        fully_shard(sharded, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
        with CovarianceCollector(sharded, process_group=group) as collector:
            sharded(x)
        with CovarianceCollector(plain) as single:
            plain(everything)
        for name, covariance in single.covariances().items():
            assert close(collector.covariances()[name].matrix, covariance.matrix)

    on_processes(2, work, tmp_path)


# -------------------------------------------------------------------------------------------------- eigendecompositions
def moments(d: int, seed: int, rows: int = 10**6) -> Covariance:
    x = data(2 * d, d, seed=seed)
    return Covariance(x.mT @ x, float(rows), x.mean(0), rows)


def test_the_largest_go_first_to_whoever_has_least() -> None:
    assert _owners.owners([768, 64, 64, 96, 128], 2) == [0, 1, 1, 1, 1]
    assert _owners.owners([4, 4, 4, 4], 2) == [0, 1, 0, 1]
    assert _owners.owners([3, 2, 1], 5) == [0, 1, 2]
    assert _owners.owners([], 3) == []


@pytest.mark.parametrize("number", [2, 3])
def test_sharded_stores_are_those_of_one_process(number: int, tmp_path: Path) -> None:
    """Bit for bit, whoever solved what, each matrix by one process, with the same warnings everywhere."""

    def work(rank: int, group: dist.ProcessGroup) -> None:
        solved: list[str] = []
        plain = build._solve

        def counted(item: build._Item, *rest: object) -> _owners.Solved:
            solved.append(item.label)
            return plain(item, *rest)

        build._solve = counted
        found = {f"layer{i}": moments(d, i) for i, d in enumerate((24, 8, 8, 12, 1))}
        found["few"] = moments(9, 11, rows=3)
        found["dead"] = Covariance(torch.zeros(5, 5, dtype=torch.float64), 10.0, torch.zeros(5), 10)
        found["prompts.0"] = PromptCovariance(moments(4, 12), moments(16, 13))
        for options in ({}, {"mix": 0.9, "normalize": "fro", "dtype": torch.float32}, {"side": "left"}):
            for rule in (rules.Rank(1), rules.Energy(0.6), rules.Energy(0.95)):
                warned = []
                for shared in (True, False):
                    solved.clear()
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        store = build_store(found, rule, process_group=group if shared else None, **options)
                    warned.append([str(w.message) for w in caught])
                    if shared:
                        mine, sharded = list(solved), store
                assert warned[0] == warned[1]
                assert list(sharded) == list(store)
                assert {name: store.fingerprint(name) for name in store} == {
                    name: sharded.fingerprint(name) for name in store
                }
                assert sharded.report() == store.report()
                everyone = torch.tensor(len(mine))
                dist.all_reduce(everyone, group=group)
                assert int(everyone) == len(solved) == 9
                assert 0 < len(mine) < 9
        assert len(build_store({}, rules.Rank(1), process_group=group)) == 0

    on_processes(number, work, tmp_path)


def test_a_failure_of_one_owner_is_raised_by_all(tmp_path: Path) -> None:
    """J2: the same error with the same message on every process, and none waits for a basis that never comes."""

    def work(rank: int, group: dist.ProcessGroup) -> None:
        plain = torch.linalg.eigh

        def failing(matrix: Tensor) -> object:
            if matrix.shape[-1] == 12:
                raise torch.linalg.LinAlgError("did not converge")
            return plain(matrix)

        good = {"a": moments(16, 1), "b": moments(12, 2), "c": moments(8, 3), "d": moments(9, 4)}
        broken = good | {"c": Covariance(torch.full((8, 8), float("nan")), 1.0, torch.zeros(8), 1)}
        skewed = good | {"d": Covariance(torch.eye(9).roll(1, 0), 1.0, torch.zeros(9), 1)}
        cases = [
            (broken, rules.Rank(1), {}, NonFiniteError, r"c \(right\): 64 of 64"),
            (skewed, rules.Rank(1), {}, SubspaceMismatchError, r"d \(right\).*not symmetric"),
            (good, rules.Energy(1.0), {"on_full": "raise"}, SubspaceError, r"a \(right\): all 16"),
            (good | {"e": moments(2, 5)}, rules.Knee(), {}, ValueError, "2"),
        ]
        for found, rule, options, error, message in cases:
            with pytest.raises(error, match=message) as caught:
                build_store(found, rule, process_group=group, **options)
            assert type(caught.value) is error
        torch.linalg.eigh = failing
        with pytest.raises(SolverError, match=r"no rung of the ladder.*did not converge") as caught:
            build_store(good, rules.Rank(1), process_group=group)
        assert (caught.value.__cause__ is not None) == (_owners.owners([16, 12, 8, 9], 3)[1] == rank)
        torch.linalg.eigh = plain
        with pytest.raises(RuntimeError, match="TypeError: no number"):
            build_store(good, _Broken(), process_group=group)
        with pytest.raises(SubspaceMismatchError, match="different stores"):
            build_store(good, rules.Rank(1), process_group=group, mix=0.5 + rank / 10)
        assert len(build_store(good, rules.Rank(1), process_group=group)) == 4

    on_processes(3, work, tmp_path)


class _Broken(rules.Rank):
    def __init__(self) -> None:
        pass

    def protected(self, spectrum: Tensor) -> int:
        raise TypeError("no number")
