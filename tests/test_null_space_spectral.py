"""The soft projector f(C / tau): the curve, the requirements of performance.md 9, faults, and registration."""

import math

import pytest
import torch
from support import with_spectrum

import cl_kernels as clk
from cl_kernels.ops import _registry, spectral_projector
from cl_kernels.ops.null_space.spectral import QUINTICS, response

F64 = torch.float64
N = torch.arange(1, 257, dtype=F64)
SPECTRA = {
    "vit": 0.04 * N**-1.2 * torch.exp(-0.8 * (N / 83) ** 1.5) + 2e-6,
    "power": N**-2,
    "exponential": torch.exp(-(N - 1) / 10),
    "rank 20": torch.where(N <= 20, 1 / N, 0.0),
}


def test_quintics_stay_within_one_and_meet_their_next_interval():
    for steps, rows in QUINTICS.items():
        assert len(rows) == steps
        low = {1: 0.3, 2: 0.3, 3: 0.2, 4: 0.05, 5: 0.015}[steps]
        for a, b, c in rows:
            s = torch.linspace(low, 1, 20001, dtype=F64)
            q = a * s + b * s**3 + c * s**5
            assert float(q.max()) == pytest.approx(1.0, abs=1e-9)
            assert float(q.min()) == pytest.approx(float(q[0]), abs=1e-9)  # the smallest value is at the left end
            low = float(q[0])


def test_the_published_coefficients_of_the_hard_filter():
    assert QUINTICS[3][0] == (3.474334218801, -7.131071178557, 4.656736959755)
    assert all(sum(row) == pytest.approx(1.0, abs=1e-7) for row in QUINTICS[3])


@pytest.mark.parametrize(
    ("gain", "ratio"), [(0.99, 0.76), (0.9, 0.86), (0.5, 1.0), (0.1, 1.16), (0.01, 1.30)], ids=lambda v: str(v)
)
def test_the_edge_of_the_hard_filter(gain, ratio):
    assert float(response(torch.tensor(ratio, dtype=F64), 3)) == pytest.approx(gain, abs=0.03)


@pytest.mark.parametrize(
    ("steps", "energy", "transition"),
    [(1, 0.39, 4.1), (2, 0.58, 2.0), (3, 0.755, 1.35), (4, 0.92, 1.077), (5, 0.98, 1.02)],
)
def test_no_more_energy_passes_than_through_a_hard_cut(steps, energy, transition):
    ratio = torch.logspace(-3, 3, 100001, dtype=F64)
    gains = response(ratio, steps)
    assert float((ratio * gains.square()).max()) == pytest.approx(energy, rel=0.02)
    assert bool((gains >= 0).all())
    assert bool((gains <= 1).all())
    edge = float(ratio[gains < 0.1][0] / ratio[gains < 0.9][0])
    assert edge == pytest.approx(transition, rel=0.02)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_leak_energy_and_loss(name, dtype):
    values = SPECTRA[name]
    tau = float(values[99]) if name != "rank 20" else float(values[19]) / 100
    cov = with_spectrum(values).to(dtype)
    p = spectral_projector(cov, tau)
    assert p.dtype == dtype
    assert torch.equal(p, p.mT)
    spectrum, basis = torch.linalg.eigh(cov.double())
    spectrum = spectrum.clamp_min(0)
    passed = p.double() @ basis
    leak = (spectrum * passed.square().sum(0) / tau)[spectrum > 4 * tau]
    kept = (basis * passed).sum(0)[spectrum < tau / 4]
    assert not len(leak) or float(leak.max()) <= 1e-2
    assert not len(kept) or float((1 - kept).max()) <= 1e-3
    assert float(torch.linalg.matrix_norm(p.double() @ cov.double() @ p.double(), 2)) <= 1.05 * tau
    expected = (basis * response(spectrum / tau, 3)) @ basis.mT
    assert float(torch.linalg.matrix_norm(p.double() - expected, 2)) <= 2e-6


def test_known_matrices():
    eye = torch.eye(8, dtype=F64)
    assert torch.allclose(spectral_projector(2.5 * eye, 2.5), eye / 2, atol=1e-12)  # at tau, a soft filter halves
    assert torch.allclose(spectral_projector(1e6 * eye, 1.0), 0 * eye, atol=1e-6)
    assert torch.allclose(spectral_projector(1e-6 * eye, 1.0), eye, atol=1e-6)
    assert torch.equal(spectral_projector(0 * eye, 1.0), eye)
    rank_one = torch.ones(8, 8, dtype=F64)
    assert float(spectral_projector(rank_one, 1e-3).trace()) == pytest.approx(7, abs=1e-5)


def test_scaling_both_changes_nothing():
    cov = with_spectrum(SPECTRA["vit"])
    tau = float(SPECTRA["vit"][50])
    assert torch.allclose(spectral_projector(cov, tau), spectral_projector(1e4 * cov, 1e4 * tau), atol=1e-10)


def test_noise_below_zero_counts_as_zero():
    values = torch.tensor([1.0, 0.5, -0.01, -0.13])
    p = spectral_projector(with_spectrum(values), 0.1)
    assert bool((torch.linalg.eigvalsh(p) <= 1 + 1e-12).all())
    assert float(p.trace()) == pytest.approx(2, abs=1e-3)


def test_batches_take_a_threshold_each():
    covs = torch.stack([with_spectrum(torch.logspace(0, -4, 12), seed) for seed in range(4)]).reshape(2, 2, 12, 12)
    taus = torch.tensor([[1e-1, 1e-2], [1e-3, 3e-2]], dtype=F64)
    together = spectral_projector(covs, taus, sharpness="soft")
    for i in range(2):
        for j in range(2):
            alone = spectral_projector(covs[i, j], float(taus[i, j]), sharpness=2)
            assert torch.allclose(together[i, j], alone, atol=1e-12)
    assert torch.allclose(spectral_projector(covs, 1e-2)[0, 1], spectral_projector(covs[0, 1], 1e-2), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau: expected finite numbers > 0"),
        ({"tau": -1.0}, ValueError, "tau"),
        ({"tau": math.nan}, ValueError, "tau"),
        ({"tau": math.inf}, ValueError, "tau"),
        ({"tau": "1"}, TypeError, "tau"),
        ({"tau": torch.ones(3)}, ValueError, r"tau: expected shape \(\) or a number"),
        ({"sharpness": "sharp"}, ValueError, "sharpness"),
        ({"sharpness": 0}, ValueError, "sharpness"),
        ({"sharpness": True}, ValueError, "sharpness"),
        ({"cov": torch.full((2, 2), math.nan)}, clk.NonFiniteError, "cov: 4 of 4"),
        ({"cov": torch.zeros(2, 3)}, ValueError, "cov"),
        ({"cov": torch.eye(2).half()}, ValueError, "cov"),
    ],
)
def test_wrong_calls(arguments, error, message):
    call = {"cov": torch.eye(2), "tau": 1.0, **arguments}
    with pytest.raises(error, match=message):
        spectral_projector(call.pop("cov"), call.pop("tau"), **call)


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 3)])
def test_opcheck(shape):
    rows = torch.randn(*shape, dtype=F64)
    torch.library.opcheck(_registry.OPS["spectral_projector"].overload, (rows.mT @ rows, torch.ones(shape[:-2]), 3))


def test_compiles_in_one_graph():
    cov = with_spectrum(torch.logspace(0, -4, 6))
    compiled = torch.compile(lambda c: spectral_projector(c, 1e-2), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(cov), spectral_projector(cov, 1e-2))
