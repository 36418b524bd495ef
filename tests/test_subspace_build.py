"""From second moments to projectors: what is protected, recorded, warned of and refused."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from cl_kernels import NonFiniteError, SubspaceError, SubspaceMismatchError, rules
from cl_kernels.subspace import Covariance, CovarianceCollector, PromptCovariance, SubspaceStore, build_store

F64 = torch.float64


def orthonormal(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(seed))).Q


def moments(values: list[float] | Tensor, seed: int = 0, rows: int = 10**6) -> Covariance:
    spectrum = torch.as_tensor(values, dtype=F64)
    vectors = orthonormal(len(spectrum), seed)
    matrix = (vectors * spectrum) @ vectors.mT
    return Covariance((matrix + matrix.mT) / 2, float(rows), torch.zeros(len(spectrum), dtype=F64), rows)


@pytest.mark.parametrize("normalize", [None, "fro"])
@pytest.mark.parametrize("mix", [1.0, 0.97])
@pytest.mark.parametrize("protected", [0, 2, 5])
def test_projector(protected: int, mix: float, normalize: str | None) -> None:
    """B = mix Q / (||Q||_F or 1) + (1 - mix) I, with the residual energy of property 5."""
    spectrum = torch.tensor([9, 5, 3, 0.5, 0.25, 1e-3], dtype=F64)
    store = build_store({"layer": moments(spectrum)}, rules.Rank(protected), mix=mix, normalize=normalize)
    free = orthonormal(6)[:, protected:]
    q = free @ free.mT
    expected = mix * q / (q.norm() if normalize else 1) + (1 - mix) * torch.eye(6, dtype=F64)
    assert torch.allclose(store["layer"].matrix(), expected, atol=1e-12)
    assert store["layer"].rank == min(protected, 6 - protected), "the thinner basis is kept"
    (row,) = store.report()
    assert row["rank"] == protected
    assert row["energy"] == pytest.approx(float(spectrum[:protected].sum() / spectrum.sum()), abs=1e-12)
    assert row["condition"] == pytest.approx(9e3, rel=1e-9)
    left = float(torch.trace(free.mT @ moments(spectrum).matrix @ free))
    assert left == pytest.approx(float(spectrum[protected:].sum()), rel=1e-10)


def test_against_the_operation() -> None:
    from cl_kernels import ops

    spectrum = torch.exp(-torch.arange(140) / 9.0).to(F64) + 1e-6
    covariance = moments(spectrum)
    for rule in (rules.Knee(), rules.Energy(0.9), rules.RatioToLargest(1e-2)):
        for mix, normalize in ((1.0, None), (0.95, "fro")):
            ours = build_store({"a": covariance}, rule, mix=mix, normalize=normalize)["a"].matrix()
            theirs = ops.null_space_projector(covariance.matrix, rule, mix=mix, normalize=normalize).matrix()
            assert (ours - theirs.to(F64)).norm() <= 1e-10 * theirs.norm()


def test_prompts_get_both_sides() -> None:
    both = PromptCovariance(moments([10, 3, 1, 0.5], seed=1), moments([8, 4, 2, 1, 0.1], seed=2))
    store = build_store({"prompts.0": both}, rules.Rank(2), left_rule=rules.Rank(1), mix=0.97, left_mix=1.0)
    sides = store.sides("prompts.0")
    assert [row["rank"] for row in store.report()] == [1, 2]
    assert torch.linalg.eigvalsh(sides.left.matrix()).tolist() == pytest.approx([0, 1, 1, 1], abs=1e-12)
    assert torch.linalg.eigvalsh(sides.right.matrix()).tolist() == pytest.approx([0.03, 0.03, 1, 1, 1], abs=1e-12)
    same = build_store({"prompts.0": both}, rules.Rank(1), mix=0.97)
    assert [row["rank"] for row in same.report()] == [1, 1]
    assert float(torch.linalg.eigvalsh(same.sides("prompts.0").left.matrix())[0]) == pytest.approx(0.03)


def test_output_side_and_dtype() -> None:
    store = build_store({"a": moments([2, 1, 0])}, rules.Rank(1), side="left", dtype=torch.float32)
    assert store.sides("a").right is None
    assert store.sides("a").left.basis.dtype == torch.float32
    assert store.report()[0]["side"] == "left"


def test_dead_layers_stay_free() -> None:
    """F20."""
    with pytest.warns(UserWarning, match=r"dead \(right\).*energy"):
        store = build_store({"dead": moments(torch.zeros(130))}, rules.Knee())
    assert torch.equal(store["dead"].matrix(), torch.eye(130, dtype=F64))
    (row,) = store.report()
    assert (row["rank"], row["energy"], row["condition"]) == (0, 0.0, 1.0)


@pytest.mark.parametrize(
    "spectrum",
    [
        [4, 4, 4, 0, 0, 0],
        [5, 1, 1, 1, 1, 1],
        [1, 1e-20, 0, 0, 0, 0],
        [1e12, 1, 1e-12, 1e-13, 0, 0],
        [3, 2, 1, -1e-13, -1e-12, -1e-11],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_degenerate_spectra(spectrum: list[float], dtype: torch.dtype) -> None:
    """F21 and F22: rank-deficient, repeated, slightly negative."""
    covariance = moments(spectrum)
    covariance = Covariance(covariance.matrix.to(dtype), covariance.count, covariance.mean, covariance.rows)
    for rule in (rules.Energy(0.45), rules.RatioToSmallest(10), rules.RatioToLargest(0.5)):
        store = build_store({"a": covariance}, rule)
        (row,) = store.report()
        assert row["orthogonality_error"] <= 1e-5
        assert row["rank"] == rule.protected(torch.tensor(spectrum, dtype=dtype).clamp_min(0)) < 6
        assert 0 <= row["energy"] <= 1 + 1e-12
        assert math.isfinite(row["condition"])


@pytest.mark.parametrize("scale", [1e-320, 1e-310, 1e-300, 1e290])
def test_energy_and_condition_at_the_ends_of_the_range(scale: float) -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64)) * scale
    covariance = Covariance(matrix, 100.0, torch.zeros(4, dtype=torch.float64), 100)
    (row,) = build_store({"w": covariance}, rules.Energy(0.7)).report()
    assert row["rank"] == 1
    assert row["energy"] == pytest.approx(0.75, rel=1e-3)
    assert row["condition"] == pytest.approx(1 / (4 * torch.finfo(torch.float64).eps))


def test_nothing_left_free() -> None:
    """F24."""
    full = {"layer": moments([3, 2, 1])}
    with pytest.warns(UserWarning, match=r"layer \(right\): all 3 directions") as caught:
        store = build_store(full, rules.Energy(1.0))
    assert len(caught) == 1
    assert not store["layer"].matrix().any()
    assert store.capacity() == {"layer": 0}
    with pytest.raises(SubspaceError, match="nothing is left to train"):
        build_store(full, rules.Energy(1.0), on_full="raise")
    relaxed = build_store(full, rules.Energy(1.0), on_full="relax")
    weakest = orthonormal(3)[:, 2:]
    assert torch.allclose(relaxed["layer"].matrix(), weakest @ weakest.mT, atol=1e-12)
    blended = build_store(full, rules.Rank(3), mix=0.9, normalize="fro", on_full="relax")
    assert torch.isfinite(blended["layer"].matrix()).all()


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.tensor([[1.0, 0.1], [0.0, 1.0]]), SubspaceMismatchError, "not symmetric"),
        (torch.ones(2, 3), SubspaceMismatchError, r"\(2, 3\)"),
        (torch.ones(3), SubspaceMismatchError, r"\(3,\)"),
        (torch.full((2, 2), float("nan")), NonFiniteError, "4 of 4"),
    ],
)
def test_what_is_no_covariance_is_refused(matrix: Tensor, error: type[Exception], message: str) -> None:
    """F25."""
    with pytest.raises(error, match=message) as caught:
        build_store({"blocks.0.weight": Covariance(matrix, 1.0, matrix)}, rules.Rank(1))
    assert "blocks.0.weight" in str(caught.value)


def test_few_rows_are_warned_of() -> None:
    """F29, also when batches are counted instead of rows."""
    few = moments([4, 3, 2, 1, 0.1], rows=11)
    with pytest.warns(UserWarning, match="11 rows are few for 3"):
        build_store({"a": few}, rules.Rank(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_store({"a": few}, rules.Rank(2))
        build_store({"a": Covariance(few.matrix, 1.0, few.mean, 12)}, rules.Rank(3))
        build_store({"a": Covariance(few.matrix, 1.0, few.mean)}, rules.Rank(3))


def test_options_are_checked() -> None:
    covariances = {"a": moments([2, 1, 0.5])}
    for options in (
        {"mix": 1.5},
        {"mix": 0.5, "left_mix": -0.1},
        {"normalize": "l2"},
        {"side": "both"},
        {"on_full": "ignore"},
    ):
        with pytest.raises(ValueError, match=next(iter(options)).replace("left_", "")):
            build_store(covariances, rules.Rank(3 if "on_full" in options else 1), **options)


def test_from_features_to_files_and_tasks(tmp_path) -> None:  # type: ignore[no-untyped-def]  # pytest's fixture
    """Three tasks through collector, rule, merge and file: old inputs keep their outputs under any projected step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 5, bias=False).to(F64)
    tasks = [torch.randn(200, 3, dtype=F64) @ torch.randn(3, 12, dtype=F64) for _ in range(3)]
    store = SubspaceStore()
    for x in tasks:
        with CovarianceCollector(layer) as collector:
            layer(x)
        store.merge(build_store(collector.covariances(), rules.RatioToLargest(1e-10)))
        store.save(tmp_path / "s.safetensors")
        store = SubspaceStore.load(tmp_path / "s.safetensors")
    assert store.capacity() == {"weight": pytest.approx(3 / 12)}
    step = store["weight"].apply(torch.randn(5, 12, dtype=F64))
    assert step.norm() > 0.5
    for x in tasks:
        assert (x @ step.mT).norm() <= 1e-6 * x.norm() * step.norm()
