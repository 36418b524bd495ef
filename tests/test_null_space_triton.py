"""The Triton products of the log-odds filter in Triton's interpreter, in float16 halves against float64."""

import os

import pytest
import torch
from support import relative, with_spectrum

pytestmark = pytest.mark.interpret
if os.environ.get("TRITON_INTERPRET") != "1":  # Triton decides when it is imported, so this is a process of its own
    pytest.skip("needs TRITON_INTERPRET=1 and its own process", allow_module_level=True)
pytest.importorskip("triton")

import cl_kernels as clk  # noqa: E402
from cl_kernels.ops import Projector, log_odds_filter, null_space_projector, spectral_projector, use_backend  # noqa: E402
from cl_kernels.ops.null_space import cuda, log_odds, soft, spectral  # noqa: E402
from cl_kernels.ops.rules import Energy, Rank  # noqa: E402

F64 = torch.float64


@pytest.fixture(autouse=True)
def _interpreted():
    with use_backend("triton"):
        yield


def values_of(halves):
    """What a pair of halves stands for, without its padding; the padding is checked to be zero."""
    full = halves.high.double() + halves.low.double() / 2048
    assert not full[:, halves.size :].any()
    assert not full[:, :, halves.size :].any()
    return full[:, : halves.size, : halves.size]


def symmetric(layers, size):
    """Entries in [-1, 1] and eigenvalues in [-1, 1], as the filter has them, and full of small ones."""
    spectra = torch.rand(layers, size, dtype=F64) * 2 - 1
    return torch.stack([with_spectrum(values, seed) for seed, values in enumerate(spectra)])


@pytest.mark.parametrize(("layers", "size"), [(1, 1), (3, 5), (2, 63), (2, 64), (1, 65), (2, 130)])
@pytest.mark.parametrize("tile", [64, 128])
def test_halves_are_mirrored_padded_and_right_to_22_bits(layers, size, tile, monkeypatch, poison):
    monkeypatch.setattr(cuda, "FEW", 1 if tile == 128 else 10**9)
    s = symmetric(layers, size)
    s[:, -1, 0] = 7.0  # below the diagonal: must not be read
    halves = cuda._halves(s.mT.contiguous().mT)  # neither must it matter how the matrix lies in memory
    assert halves.tile == tile
    upper = s.triu()
    wanted = upper + upper.triu(1).mT if size > 1 else s
    assert halves.high.shape[-1] == -(-size // tile) * tile
    assert float((values_of(halves) - wanted).abs().max()) <= 2.0**-22


@pytest.mark.parametrize(
    ("layers", "size", "tile"), [(3, 5, 64), (2, 64, 64), (2, 150, 64), (2, 40, 128), (1, 130, 128)]
)
def test_each_form_of_the_product(layers, size, tile, monkeypatch, poison):
    monkeypatch.setattr(cuda, "FEW", 1 if tile == 128 else 10**9)
    a = cuda._halves(symmetric(layers, size))
    exact = values_of(a)
    square = cuda._product(a, a, 1.0, 0.0, None, 0.0)
    addition = cuda._product(square, square, -7.1, 4.6, square, 3.4)
    last = cuda._last(a, addition)
    eye = torch.eye(size, dtype=F64)
    two = exact @ exact
    mixed = -7.1 * two @ two + 4.6 * two + 3.4 * eye
    plain = exact.float() @ exact.float()  # the yardstick: float32 products of torch
    budget = 2 * relative(plain, two) + 1e-7
    assert relative(values_of(square), two) <= budget
    assert relative(values_of(addition), mixed) <= 4 * budget
    assert relative(last, (eye + exact @ mixed) / 2) <= 4 * budget
    assert last.dtype == torch.float32
    for result in (values_of(square), values_of(addition), last):
        assert torch.equal(result, result.mT)


@pytest.mark.parametrize(("steps", "dtype"), [(1, F64), (2, F64), (3, F64), (3, torch.float32), (5, F64)])
def test_the_filter_equals_the_float64_curve(steps, dtype):
    values = torch.logspace(0, -5, 70, dtype=F64)
    covs = torch.stack([with_spectrum(values, seed) for seed in range(2)]).to(dtype)
    taus = torch.tensor([1e-2, 1e-3], dtype=F64)
    found, status = log_odds_filter(covs, taus, sharpness=steps)
    assert status.tolist() == [0, 0]
    for one, cov, tau in zip(found, covs.double(), taus, strict=True):
        spectrum, basis = torch.linalg.eigh(cov)
        wanted = (basis * spectral.response(spectrum.clamp_min(0) / tau, steps)) @ basis.mT
        assert float(torch.linalg.matrix_norm(one.double() - wanted, 2)) <= (2e-6 if steps < 4 else 1e-5)
        assert torch.equal(one, one.mT)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, over NaN and infinity
def test_statuses_and_what_stands_in_for_a_failed_matrix():
    good = with_spectrum(torch.logspace(0, -3, 12, dtype=F64))
    covs = torch.stack([good, 0 * good, good, good - 0.5 * torch.eye(12), good])
    covs[2, 1, 3] = torch.nan
    taus = torch.tensor([1e-2, 1e-2, 1e-2, 1e-2, -1.0])
    previous = torch.full((5, 12, 12), 0.25)
    found, status = log_odds_filter(covs, taus, previous=previous)
    assert status[:3].tolist() == [0, 0, log_odds.NOT_FINITE]
    assert int(status[3]) & log_odds.INDEFINITE
    assert int(status[4]) == log_odds.NOT_FINITE
    assert torch.equal(found[1], torch.eye(12))
    assert torch.equal(found[2:], previous[2:])
    assert not log_odds_filter(covs, taus).projector[2:].any()  # blocked, and never the identity


def test_spectral_projector_solves_again_what_the_filter_cannot():
    covs = torch.stack(
        [with_spectrum(torch.logspace(0, -3, 12, dtype=F64)), torch.diag(torch.arange(-3.0, 9.0)).double()]
    )
    found = spectral_projector(covs, 1e-2)
    with use_backend("reference"):
        wanted = spectral_projector(covs, 1e-2)
    assert found.dtype == F64
    assert float((found - wanted).abs().max()) <= 1e-6
    covs[1, 0, 0] = torch.inf
    with pytest.raises(clk.NonFiniteError, match=r"cov\[1\]: 1 of 144"):
        spectral_projector(covs, 1e-2)
    with pytest.raises(ValueError, match="tau: expected finite numbers > 0"):
        spectral_projector(covs[:1], torch.tensor([-1.0]))


def test_empty_batches():
    found, status = log_odds_filter(torch.zeros(0, 4, 4), 1.0)
    assert (found.shape, status.shape) == ((0, 4, 4), (0,))
    assert spectral_projector(torch.zeros(2, 0, 0), 1.0).shape == (2, 0, 0)


@pytest.mark.parametrize("rule", [Rank(12), Energy(0.99)])
def test_a_rule_through_the_kernels_equals_the_rule_through_eigenvalues(rule):
    covs = torch.stack([with_spectrum(torch.logspace(0, -decades, 40, dtype=F64)) for decades in (3, 5)])
    dense = soft.soft_projector(covs, rule, 3, 0.9, "fro", cuda.log_odds_filter)
    wanted = null_space_projector(covs, rule, mix=0.9, normalize="fro", solver="filter").matrix()
    assert isinstance(Projector.from_dense(dense), Projector)
    assert relative(dense, wanted) <= 1e-4  # thresholds of the search agree to 1e-7, and P moves 3.3 times as much
