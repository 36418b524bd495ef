"""The log-odds filter on a GPU: accuracy on five spectra, faults, no waiting, graphs, streams (`pytest -m gpu`)."""

import sys
from pathlib import Path

import pytest
import torch
from support import relative, with_spectrum

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import spectra  # found through the line above

import cl_kernels as clk
from cl_kernels.ops import log_odds_filter, null_space_projector, spectral_projector, use_backend
from cl_kernels.ops.null_space import cuda, log_odds, spectral
from cl_kernels.ops.rules import Energy, Knee, Rank, RatioToLargest, RatioToSmallest, Threshold

pytestmark = pytest.mark.gpu
F64 = torch.float64


@pytest.fixture
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def batch(d, dtype=F64):
    """The five spectra at size d, their thresholds, on the GPU."""
    made = [make(d) for make in spectra.SPECTRA.values()]
    covs = torch.stack([spectra.matrix(values, seed) for seed, (values, _) in enumerate(made)]).to("cuda", dtype)
    return covs, torch.tensor([spectra.threshold(*one) for one in made], dtype=F64, device="cuda")


def judge(projectors, covs, taus, steps=3):
    for projector, cov, tau in zip(projectors, covs.double(), taus.tolist(), strict=True):
        known = spectra.eigen(cov)
        assert spectra.leak(projector, cov, tau, known) <= 1e-6  # wanted is 1e-2
        assert spectra.excess(projector, cov, tau) <= 1.05
        assert spectra.lost(projector, cov, tau, known) <= 1e-3
        wanted = lambda values, tau=tau: spectral.response(values / tau, steps)  # noqa: E731
        assert spectra.deviation(projector, cov, wanted, known) <= 2e-6
        assert torch.equal(projector, projector.mT)


@pytest.mark.parametrize("d", [192, 384, 500, 768, 1024])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_five_spectra(d, backend):
    covs, taus = batch(d)
    with use_backend(backend):
        projectors, status = log_odds_filter(covs, taus)
    assert status.tolist() == [0] * 5
    judge(projectors, covs, taus)


def test_twelve_layers_of_768_take_the_wide_tiles():
    covs, taus = batch(768)
    covs, taus = covs.repeat(3, 1, 1)[:12], taus.repeat(3)[:12]
    assert cuda._halves(covs).tile == 128
    projectors, _ = log_odds_filter(covs, taus)
    judge(projectors[:5], covs[:5], taus[:5])
    assert torch.equal(projectors[5:10], projectors[:5])


def test_a_wide_matrix():
    values, cut = spectra.vit(3072)
    cov, tau = spectra.matrix(values).cuda(), spectra.threshold(values, cut)
    projector, status = log_odds_filter(cov, tau)
    assert int(status) == 0
    judge(projector[None], cov[None], torch.tensor([tau]))


@pytest.mark.parametrize("d", [1, 2, 31, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_odd_sizes(d, dtype):
    covs = torch.stack([with_spectrum(torch.logspace(0, -5, d, dtype=F64), seed) for seed in range(3)]).to(
        "cuda", dtype
    )
    taus = torch.tensor([1e-1, 1e-2, 1e-3], device="cuda")
    projectors, status = log_odds_filter(covs, taus)
    assert not status.any()
    wanted = spectral_projector(covs.double().cpu(), taus.double().cpu())
    assert float((projectors.cpu() - wanted).abs().max()) <= 3e-6


def test_faults():
    good = with_spectrum(torch.logspace(0, -3, 40, dtype=F64))
    covs = torch.stack([good, 0 * good, good, good - 0.5 * torch.eye(40), good, good]).cuda()
    covs[2, 1, 3] = torch.nan
    taus = torch.tensor([1e-2, 1e-2, 1e-2, 1e-2, -1.0, 1e-12], dtype=F64, device="cuda")
    previous = torch.rand(6, 40, 40, device="cuda")
    projectors, status = log_odds_filter(covs, taus, previous=previous)
    assert (status.cpu() != 0).tolist() == [False, False, True, True, True, True]
    assert [int(status[i]) & bit for i, bit in ((2, 1), (3, 4), (4, 1), (5, 8))] == [1, 4, 1, 8]
    assert torch.equal(projectors[1], torch.eye(40, device="cuda"))
    assert torch.equal(projectors[2:], previous[2:])
    assert not log_odds_filter(covs, taus).projector[2:].any()
    with pytest.raises(clk.NonFiniteError, match=r"cov\[2\]"):
        spectral_projector(covs, 1e-2)
    with pytest.raises(ValueError, match="tau: expected finite numbers > 0"):
        spectral_projector(covs[4:5], taus[4:5])
    solved = spectral_projector(covs[[0, 1, 3, 5]], taus[[0, 1, 3, 5]])
    wanted = spectral_projector(covs[[0, 1, 3, 5]].cpu(), taus[[0, 1, 3, 5]].cpu())
    assert relative(solved.cpu(), wanted) <= 2e-6


def test_nothing_waits(no_waiting):
    covs = torch.rand(3, 96, 96, device="cuda", dtype=F64)
    log_odds_filter(covs @ covs.mT, torch.ones(3, device="cuda"), previous=torch.zeros(3, 96, 96, device="cuda"))


def test_the_same_bits_every_time():
    covs, taus = batch(384)
    first = log_odds_filter(covs, taus).projector
    assert all(torch.equal(first, log_odds_filter(covs, taus).projector) for _ in range(3))


def test_side_stream():
    """The filter must run on the current stream: it waits there for a matrix that arrives late."""
    covs, taus = batch(192)
    late = torch.full_like(covs, torch.nan)
    log_odds_filter(covs, taus)  # compile before the clock runs
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(covs)
        projectors, status = log_odds_filter(late, taus)
    stream.synchronize()
    assert not status.any()
    judge(projectors, covs, taus)


@pytest.mark.parametrize("layers", [1, 5])
def test_cuda_graph_reads_matrices_and_thresholds_at_each_replay(layers):
    covs, taus = batch(384)
    held, held_taus = covs[:layers].clone(), taus[:layers].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        log_odds_filter(held, held_taus)
        spectral_projector(held, held_taus)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        projectors, status = log_odds_filter(held, held_taus)
        checked = spectral_projector(held, held_taus)
    for factor in (1.0, 3.0):
        held_taus.copy_(taus[:layers] * factor)
        graph.replay()
        torch.cuda.synchronize()
        assert not status.any()
        judge(projectors, covs[:layers], taus[:layers] * factor)
        assert torch.equal(checked, projectors.double())
    held[0, 0, 0] = torch.nan
    graph.replay()
    torch.cuda.synchronize()
    assert int(status[0]) == log_odds.NOT_FINITE
    assert not projectors[0].any()  # nothing can be solved again here: the update is blocked
    assert not checked[0].any()


@pytest.mark.parametrize(
    "rule",
    [Rank(40), Energy(0.99), Threshold(1e-3), RatioToLargest(1e-3), RatioToSmallest(10.0), Knee(ties="first")],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:null_space_projector")
def test_every_rule_as_on_the_cpu(rule):
    covs, _ = batch(192)
    for options in ({}, {"mix": 0.9, "normalize": "fro"}):
        found = null_space_projector(covs, rule, solver="filter", **options)
        wanted = null_space_projector(covs.cpu(), rule, solver="filter", **options).matrix()
        assert found.dense is not None
        assert float((found.matrix().cpu() - wanted).abs().max()) <= 2e-3  # P moves by 3.3 dtau/tau


def test_auto_takes_the_filter_only_where_the_form_does_not_matter():
    covs, _ = batch(192)
    assert null_space_projector(covs, Rank(40)).dense is None
    assert null_space_projector(covs, Rank(40), basis=False).dense is not None


def test_tf32_does_not_reach_the_products():
    covs, taus = batch(384)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for backend in ("triton", "reference"):
            with use_backend(backend):
                judge(log_odds_filter(covs, taus).projector, covs, taus)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_compiles_in_one_graph():
    covs, taus = batch(192)
    compiled = torch.compile(lambda c, t: log_odds_filter(c, t).projector, fullgraph=True)
    assert torch.equal(compiled(covs, taus), log_odds_filter(covs, taus).projector)
