"""Null-space projectors: golden vectors V3, constructions P1 and P2, projector algebra, and the solver ladder."""

import itertools
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import relative, with_spectrum

import cl_kernels as clk
from cl_kernels.ops import Projector, _registry, null_space_projector, symmetric_eigh
from cl_kernels.ops.null_space import reference
from cl_kernels.ops.rules import Energy, Knee, PaperKnee, Rank, RatioToLargest, RatioToSmallest, Threshold

F64 = torch.float64
RULES = [Knee(), PaperKnee(), Energy(0.95), RatioToLargest(1e-3), RatioToSmallest(10.0), Rank(3), Threshold(0.1)]


def q_of(*shape):
    return torch.linalg.qr(torch.randn(*shape, dtype=F64))[0]


# -- golden vectors and constructions -----------------------------------------------------------------------------


def v3_c1():
    """C1 rows of V3 in full; test_covariance.py computes it from the queries, here it is built from its definition."""
    b, h, n, j = torch.meshgrid(*(torch.arange(k, dtype=F64) for k in (3, 2, 3, 2)), indexing="ij")
    q = ((7 * b + 5 * h + 3 * n + 2 * j) % 11 - 5) / 4
    r, c = torch.meshgrid(torch.arange(4, dtype=F64), torch.arange(4, dtype=F64), indexing="ij")
    weight = (((3 * r + 5 * c + r * c) % 7 - 3) / 4).reshape(2, 2, 4)
    rows = torch.einsum("bhnj,hjd->bhnd", q, weight).reshape(-1, 4)
    return rows.mT @ rows


def test_v3_projector():
    c1 = v3_c1()
    values, _ = symmetric_eigh(c1)
    expected = torch.tensor([22.9255219363, 5.2855219816, 0.8709873321, 0], dtype=F64)
    assert torch.allclose(values, expected, atol=1e-9)
    projector = null_space_projector(c1, Knee(), mix=0.97, normalize="fro")
    assert projector.rank == 1
    assert projector.identity == pytest.approx(0.5900297611, abs=1e-9)
    assert projector.span == pytest.approx(0.5600297611, abs=1e-9)
    matrix = projector.matrix()
    listed = torch.cat([matrix[0], matrix.diagonal()[1:]])
    expected = [0.5416778404, -0.0563238617, -0.0872346504, -0.1181454390, 0.5244195982, 0.4326444058, 0.3013474390]
    assert torch.allclose(listed, torch.tensor(expected, dtype=F64), atol=1e-9)


def test_v2_projector_numbers():
    right = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 0.5]], dtype=F64)
    left = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=F64)
    one = null_space_projector(right, Rank(1), mix=0.97, normalize="fro")
    two = null_space_projector(left, Rank(1), mix=0.97, normalize="fro")
    assert one.identity == pytest.approx(0.7158935778, abs=1e-9)
    assert one.span == pytest.approx(0.6858935778, abs=1e-9)
    assert (two.identity, two.span) == pytest.approx((1.0, 0.97), abs=1e-9)


@pytest.mark.parametrize(
    ("eta", "free", "gain", "forbidden", "rms"),
    [
        (1.00, 745, 0.0366, 0.0, 0.0361),
        (0.98, 745, 0.0559, 0.02, 0.0552),
        (0.97, 745, 0.0655, 0.03, 0.0648),
        (0.95, 745, 0.0848, 0.05, 0.0840),
        (0.94, 745, 0.0944, 0.06, 0.0936),
    ],
)
def test_gains_of_the_published_settings(eta, free, gain, forbidden, rms):
    values = torch.cat([torch.ones(768 - free, dtype=F64), torch.full((free,), 1e-6, dtype=F64)])
    projector = null_space_projector(torch.diag(values), Threshold(1e-3), mix=eta, normalize="fro")
    found = torch.linalg.eigvalsh(projector.matrix())
    assert float(found[-1]) == pytest.approx(gain, abs=1e-4)
    assert float(found[0]) == pytest.approx(forbidden, abs=1e-12)
    assert float(found.square().mean().sqrt()) == pytest.approx(rms, abs=1e-4)


def test_p1_white_updates_shrink_by_one_over_root_d_whatever_is_free():
    torch.manual_seed(0)
    for free in (100, 400, 745):
        basis = q_of(768, free)
        white = torch.randn(4000, 768, dtype=F64)
        projector = null_space_projector(
            torch.eye(768, dtype=F64) - basis @ basis.mT, Rank(768 - free), normalize="fro"
        )
        gain = float(projector.apply(white).norm() / white.norm())
        assert gain == pytest.approx(768**-0.5, rel=1e-2)


@pytest.mark.parametrize(("dtype", "leak", "same"), [(F64, 1e-13, 1e-14), (torch.float32, 1e-6, 1e-6)])
@pytest.mark.parametrize("seed", range(4))
def test_p2_leak_and_dense_equals_low_rank(seed, dtype, leak, same):
    torch.manual_seed(seed)
    basis = q_of(768, 100)
    update = torch.randn(4, 768, dtype=F64).float().to(dtype)
    projector = null_space_projector((basis @ basis.mT).to(dtype), Threshold(0.5), normalize="fro")
    assert projector.rank == 100
    low, dense = projector.apply(update), update @ projector.matrix()
    inside = (update.double() @ basis).norm()
    # the columns that the projector itself keeps: those of P2 are known only to the rounding of the matrix
    own = projector.basis.double()
    assert float((low.double() @ own).norm() / inside) <= leak
    assert float((dense.double() @ own).norm() / inside) <= leak
    assert relative(low, dense) <= 10 * same  # the larger of Frobenius and max norm; the property speaks of the former
    assert float((low - dense).norm() / dense.norm()) <= same


# -- projector algebra --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "allowed"), [(F64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("protected", [0, 1, 40, 64, 65, 100, 128])
@pytest.mark.filterwarnings("ignore:null_space_projector")
def test_algebra(protected, dtype, allowed):
    d, eta = 128, 0.95
    cov = with_spectrum(torch.logspace(0, -6, d)).to(dtype)
    plain = null_space_projector(cov, Rank(protected))
    free = d - protected
    assert plain.rank == min(protected, free)
    matrix = plain.matrix()
    assert torch.allclose(matrix, matrix.mT, rtol=0, atol=allowed)
    if not free:
        assert not matrix.any()
        return
    assert float((matrix @ matrix - matrix).norm()) / free**0.5 <= allowed
    assert float(matrix.trace()) == pytest.approx(free, rel=10 * allowed)
    normed = null_space_projector(cov, Rank(protected), normalize="fro").matrix()
    assert float(normed.norm()) == pytest.approx(1.0, rel=10 * allowed)
    assert float(torch.linalg.eigvalsh(normed)[-1]) == pytest.approx(free**-0.5, rel=10 * allowed)
    blended = torch.linalg.eigvalsh(null_space_projector(cov, Rank(protected), mix=eta, normalize="fro").matrix())
    wanted = torch.tensor([1 - eta] * protected + [eta * free**-0.5 + 1 - eta] * free, dtype=dtype)
    assert torch.allclose(blended, wanted, rtol=0, atol=10 * allowed)


def test_energy_left_in_the_null_space_is_the_sum_of_its_eigenvalues():
    cov = with_spectrum(torch.logspace(0, -6, 96, dtype=F64))
    values, vectors = symmetric_eigh(cov)
    for protected in (0, 10, 60, 95):
        free = vectors[:, protected:]
        left = float((free.mT @ cov @ free).trace())
        assert left == pytest.approx(float(values[protected:].sum()), rel=1e-10)
        matrix = null_space_projector(cov, Rank(protected)).matrix()
        assert float((matrix @ cov).trace()) == pytest.approx(left, rel=1e-10)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_every_rule_protects_what_it_counts(rule):
    values = torch.exp(-torch.arange(150, dtype=F64) / 20) + 1e-7
    cov = with_spectrum(values)
    matrix = null_space_projector(cov, rule).matrix()
    free = 150 - rule.protected(values)
    assert float(matrix.trace()) == pytest.approx(free, abs=1e-9)
    assert float(torch.linalg.eigvalsh(matrix @ cov @ matrix)[-1]) <= float(values[150 - free]) * (1 + 1e-9)


@given(
    d=st.sampled_from((1, 2, 3, 7, 16, 33)),
    lead=st.lists(st.sampled_from((0, 1, 2)), max_size=2),
    ranks=st.integers(0, 40),
    dtype=st.sampled_from((F64, torch.float32)),
    scale=st.sampled_from((1e-30, 1e-6, 1.0, 1e30)),
    seed=st.integers(0, 2**16),
)
@pytest.mark.filterwarnings("ignore:null_space_projector")
def test_decomposition_holds_for_every_rank_scale_and_batch(d, lead, ranks, dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*lead, ranks, d, dtype=F64, generator=generator)
    cov = ((rows.mT @ rows) * scale).to(dtype)
    cov = (cov + cov.mT) / 2
    values, vectors = symmetric_eigh(cov)
    assert values.shape == cov.shape[:-1]
    assert vectors.shape == cov.shape
    assert values.dtype == vectors.dtype == dtype
    assert bool((values[..., 1:] <= values[..., :-1]).all())
    eps = 1e-5 if dtype == torch.float32 else 1e-12
    eye = torch.eye(d, dtype=dtype).expand_as(cov)
    assert torch.allclose(vectors.mT @ vectors, eye, rtol=0, atol=eps)
    rebuilt = (vectors.double() * values.double()[..., None, :]) @ vectors.double().mT
    largest = float(cov.abs().max()) if cov.numel() else 0.0
    assert torch.allclose(rebuilt, cov.double(), rtol=0, atol=max(eps * d * largest, 1e-300))
    projector = null_space_projector(cov, Energy(0.9))
    assert projector.matrix().shape == cov.shape


def test_signs_are_fixed():
    _, vectors = symmetric_eigh(with_spectrum(torch.linspace(1, 2, 40)))
    assert bool((vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all())


def test_repeated_eigenvalues_and_rank_deficiency():
    for values in ([1.0] * 20, [5.0] * 10 + [0.0] * 10, [3.0] * 7 + [1.0] * 7 + [1e-12] * 6):
        cov = with_spectrum(torch.tensor(values))
        found, vectors = symmetric_eigh(cov)
        assert torch.allclose(found, torch.tensor(values, dtype=F64), atol=1e-12)
        assert torch.allclose(vectors.mT @ vectors, torch.eye(20, dtype=F64), atol=1e-12)


def test_float32_rank_deficiency_does_not_collapse_the_null_space():
    """The official Adam-NSCL logs keep 5 of 4608 directions: its threshold is a multiple of rounding noise."""
    x = torch.randn(60, 200)
    assert null_space_projector((x.mT @ x), RatioToSmallest(10.0)).rank == 60


# -- batches and edges --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:null_space_projector")
def test_a_batch_equals_its_matrices_one_by_one():
    spectra = [
        torch.logspace(0, -8, 12),
        torch.ones(12),
        torch.cat([torch.ones(2), torch.full((10,), 1e-9)]),
        torch.zeros(12),
    ]
    covs = torch.stack([with_spectrum(values, seed) for seed, values in enumerate(spectra)]).reshape(2, 2, 12, 12)
    for rule, eta, norm in itertools.product((Energy(0.9), Rank(11)), (1.0, 0.9), (None, "fro")):
        batch = null_space_projector(covs, rule, mix=eta, normalize=norm)
        assert batch.identity.shape == batch.span.shape == (2, 2)
        matrices = batch.matrix()
        update = torch.randn(2, 2, 3, 12, dtype=F64)
        applied = batch.apply(update)
        for i, j in itertools.product(range(2), range(2)):
            alone = null_space_projector(covs[i, j], rule, mix=eta, normalize=norm)
            assert torch.allclose(matrices[i, j], alone.matrix(), atol=1e-12)
            assert torch.allclose(applied[i, j], alone.apply(update[i, j]), atol=1e-12)
            assert alone.rank <= batch.rank <= 6  # never more than half


def test_an_empty_batch_gives_an_empty_projector():
    projector = null_space_projector(torch.zeros(0, 4, 4), Energy(0.9))
    assert projector.matrix().shape == (0, 4, 4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("norm", "gain"), [(None, 1.0), ("fro", 150**-0.5)])
def test_a_dead_layer_is_free_with_a_warning(rule, norm, gain):
    with pytest.warns(UserWarning, match="cov is zero, so every direction is free"):
        projector = null_space_projector(torch.zeros(150, 150), rule, normalize=norm)
    assert projector.rank == 0
    assert torch.allclose(projector.matrix(), gain * torch.eye(150))


@pytest.mark.parametrize(("eta", "scale"), [(1.0, 0.0), (0.9, 0.1)])
@pytest.mark.parametrize("norm", [None, "fro"])
def test_an_empty_null_space_freezes_the_layer_with_a_warning(eta, scale, norm):
    cov = with_spectrum(torch.linspace(1, 2, 9))
    with pytest.warns(UserWarning, match="leaves no direction free"):
        projector = null_space_projector(cov, Energy(1.0), mix=eta, normalize=norm)
    assert (projector.rank, projector.span) == (0, -eta)  # an empty basis of free directions
    assert torch.allclose(projector.matrix(), scale * torch.eye(9, dtype=F64))
    update = torch.randn(2, 9, dtype=F64)
    assert torch.allclose(projector.apply(update), scale * update)


def test_one_direction():
    assert torch.equal(null_space_projector(torch.ones(1, 1), Rank(0)).matrix(), torch.ones(1, 1))


def test_noise_below_zero_counts_as_zero_and_real_indefiniteness_is_reported():
    values = torch.linspace(1, 0, 20, dtype=F64)
    values[-3:] = -1e-9
    null_space_projector(with_spectrum(values), RatioToSmallest(10.0))
    values[-3:] = -1e-3
    with pytest.warns(UserWarning, match="not positive semi-definite"):
        null_space_projector(with_spectrum(values), Energy(0.9))


def test_slightly_asymmetric_input_is_symmetrised():
    cov = with_spectrum(torch.linspace(1, 2, 20))
    bent = cov + 1e-7 * torch.randn(20, 20, dtype=F64)
    values, _ = symmetric_eigh(bent)
    assert torch.allclose(values, torch.linalg.eigvalsh((bent + bent.mT) / 2).flip(0), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mix": 1.5}, ValueError, "mix"),
        ({"mix": math.nan}, ValueError, "mix"),
        ({"normalize": "frobenius"}, ValueError, "normalize: expected None or 'fro'"),
        ({"solver": "svd"}, ValueError, "solver: expected"),
        ({"rule": 0.95}, TypeError, "rule: expected a rule of clk.rules, such as"),
        ({"cov": torch.zeros(3, 4)}, ValueError, "cov: expected shape"),
        ({"cov": torch.zeros(0, 0)}, ValueError, "at least one direction"),
        ({"cov": torch.eye(3).bfloat16()}, ValueError, "cov: expected torch.float32 or torch.float64"),
        ({"cov": torch.tensor([[1.0, math.nan], [math.nan, 1.0]])}, clk.NonFiniteError, "cov: 2 of 4 entries"),
        ({"cov": torch.tensor([[1.0, 0.5], [-0.5, 1.0]])}, clk.SubspaceMismatchError, "symmetric"),
        ({"rule": Knee()}, ValueError, "n >= 3"),
    ],
)
def test_wrong_calls(arguments, error, message):
    call = {"cov": torch.eye(2), "rule": Energy(0.9), **arguments}
    with pytest.raises(error, match=message):
        null_space_projector(call.pop("cov"), call.pop("rule"), **call)


def test_the_entry_of_a_batch_that_is_not_finite_is_named():
    covs = torch.eye(3).repeat(4, 1, 1)
    covs[2, 0, 0] = math.inf
    with pytest.raises(clk.NonFiniteError, match=r"cov\[2\]: 1 of 9 entries"):
        symmetric_eigh(covs)


def test_nothing_is_left_unwritten(poison):
    covs = torch.stack([torch.zeros(5, 5), torch.eye(5), with_spectrum(torch.linspace(0, 1, 5)).float()])
    values, vectors = symmetric_eigh(covs)
    assert bool(values.isfinite().all())
    assert bool(vectors.isfinite().all())


# -- the ladder ---------------------------------------------------------------------------------------------------


class Eigh:
    """A stand-in for torch.linalg.eigh that misbehaves on its first calls, and notes what it was called with.

    In a batch it spoils the second matrix.
    """

    def __init__(self, *faults):
        self.faults, self.calls, self.counts, self.true = list(faults), [], [], torch.linalg.eigh

    def __call__(self, matrix):
        self.calls.append(matrix.dtype)
        self.counts.append(matrix.shape[0])
        fault = self.faults.pop(0) if self.faults else None
        if fault == "raises":
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        values, vectors = (result.clone() for result in self.true(matrix))
        at = min(1, matrix.shape[0] - 1)
        if fault == "parallel":  # what pytorch#192483 reports: no error, and columns that repeat
            vectors[at, :, 1] = vectors[at, :, 0]
        if fault == "wrong values":
            values[at] += 1e-3 * values[at].abs().max()
        if fault == "nan":
            vectors[at] *= math.nan
        return values, vectors


@pytest.fixture
def ladder(monkeypatch):
    def install(*faults):
        fake = Eigh(*faults)
        monkeypatch.setattr(torch.linalg, "eigh", fake)
        reference.warn_once.cache_clear()
        return fake

    return install


@pytest.mark.parametrize("fault", ["raises", "parallel", "wrong values", "nan"])
def test_float32_goes_on_in_float64(ladder, caplog, fault):
    cov = with_spectrum(torch.linspace(1, 2, 30)).float()
    fake = ladder(fault)
    with caplog.at_level(logging.DEBUG, "cl_kernels.ops.null_space"):
        values, vectors = symmetric_eigh(cov)
    assert fake.calls == [torch.float32, F64]
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.allclose((vectors * values) @ vectors.mT, cov, atol=1e-5)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "float64 on cpu: verified" in caplog.text


def test_a_fall_is_told_once(ladder, caplog):
    cov = with_spectrum(torch.linspace(1, 2, 30)).float()
    ladder("raises", None, "raises", None)
    with caplog.at_level(logging.WARNING, "cl_kernels.ops.null_space"):
        symmetric_eigh(cov)
        symmetric_eigh(cov)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("fault", ["raises", "parallel"])
def test_jitter_is_the_last_rung_and_is_taken_off_again(ladder, fault):
    cov = with_spectrum(torch.linspace(1, 2, 30))
    fake = ladder(fault)
    values, _ = symmetric_eigh(cov)
    assert len(fake.calls) == 2
    assert torch.allclose(values.flip(0), torch.linspace(1, 2, 30, dtype=F64), atol=1e-10)


@pytest.mark.parametrize(
    ("d", "faults", "counts"),
    [
        (10, ["parallel"], [4, 1]),
        (10, ["raises"], [4, 1, 1, 1, 1]),  # together, then one by one to find out which
        (10, ["raises", None, "raises"], [4, 1, 1, 1, 1, 1]),
        (70, [None, "parallel", None, "raises"], [1, 1, 1, 1, 1, 1]),
    ],
)
def test_only_what_failed_is_solved_again(ladder, d, faults, counts):
    covs = torch.stack([with_spectrum(torch.linspace(1, 2, d), seed) for seed in range(4)])
    fake = ladder(*faults)
    values, vectors = symmetric_eigh(covs)
    assert fake.counts == counts
    assert relative((vectors * values[:, None, :]) @ vectors.mT, covs) < 1e-12


def test_all_rungs_failed(ladder, monkeypatch, tmp_path):
    cov = torch.diag(torch.tensor([8.0, 4.0, 2.0])).expand(2, 3, 3)
    monkeypatch.delenv("CL_KERNELS_DUMP", raising=False)
    ladder(*["raises"] * 12)
    with pytest.raises(clk.SolverError) as caught:
        symmetric_eigh(cov)
    text = str(caught.value)
    assert "float32 on cpu: linalg.eigh: The algorithm failed to converge" in text
    assert "float64 on cpu with 1e-12 jitter" in text
    assert "condition is at least 4.0e+00" in text
    assert "CL_KERNELS_DUMP" in text
    monkeypatch.setenv("CL_KERNELS_DUMP", str(tmp_path / "dumps"))
    ladder(*["parallel"] * 12)
    with pytest.raises(clk.SolverError, match=r"not orthonormal .* is in .*symmetric_eigh-.*safetensors"):
        symmetric_eigh(cov)
    (dump,) = (tmp_path / "dumps").iterdir()
    stored = load_file(dump)["scaled"]
    assert torch.allclose(stored / stored[0, 0] * 8, cov[0].double())


def test_a_single_defect_never_slips_through_theprobes():
    """One wrong entry in the vectors, of twice the tolerance, at every dtype."""
    cov = with_spectrum(torch.linspace(1, 2, 200))
    values, vectors = torch.linalg.eigh(cov)
    for tolerance in reference.TOLERANCE.values():
        assert reference._verified(cov[None], values[None], vectors[None], tolerance) == ([True], None)
        for trial in range(20):
            wrong = vectors.clone()
            i, j = torch.randint(200, (2,)).tolist()
            wrong[i, j] += 8 * tolerance * math.sqrt(200 / 64)
            assert reference._verified(cov[None], values[None], wrong[None], tolerance)[0] == [False], trial


# -- registration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 3), (0, 3, 3)])
def test_opcheck(shape):
    rows = torch.randn(*shape, dtype=F64)
    torch.library.opcheck(_registry.OPS["symmetric_eigh"].overload, (rows.mT @ rows,))


def test_compiles_in_one_graph():
    def step(cov):
        values, vectors = symmetric_eigh(cov)
        return (vectors * values) @ vectors.mT

    cov = with_spectrum(torch.linspace(1, 2, 6))
    assert torch.allclose(torch.compile(step, fullgraph=True, backend="aot_eager")(cov), cov)


def test_input_is_not_written_and_result_is_no_view_of_it():
    cov = with_spectrum(torch.linspace(1, 2, 6))
    before = cov.clone()
    values, vectors = symmetric_eigh(cov)
    values.zero_()
    vectors.zero_()
    assert torch.equal(cov, before)


def test_projector_is_a_value_that_travels():
    projector = null_space_projector(with_spectrum(torch.logspace(0, -3, 10)), Energy(0.9), mix=0.9, normalize="fro")
    assert isinstance(projector, Projector)
    assert projector.to(torch.float32).basis.dtype == torch.float32
    assert isinstance(projector.identity, float)
