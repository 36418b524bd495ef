"""The projector value: its algebra, whichever of the two bases is kept, and the pair that acts on a matrix."""

import pytest
import torch

from cl_kernels import Projector, Sides


def _basis(d: int, r: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("rank", [0, 1, 3, 7])
def test_removing_a_span_is_a_symmetric_idempotent_of_the_right_trace(rank):
    p = Projector(_basis(7, rank)).matrix()
    assert torch.allclose(p, p.mT, atol=0)
    assert torch.allclose(p @ p, p, atol=1e-14)
    assert p.trace().item() == pytest.approx(7 - rank, abs=1e-13)


def test_keeping_the_free_basis_or_removing_the_protected_one_is_the_same_projector():
    q = _basis(9, 9)
    free, protected = q[:, :6], q[:, 6:]
    kept, removed = Projector(free, identity=0.0, span=-1.0), Projector(protected)
    assert torch.allclose(kept.matrix(), removed.matrix(), atol=1e-14)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.0, -1.0), (0.7, 0.4)])
def test_applying_equals_the_dense_product(side, scales):
    projector = Projector(_basis(6, 2), *scales)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = x @ projector.matrix()
    got = projector.apply(x) if side == "right" else projector.apply(x.mT, "left").mT
    assert torch.allclose(got, expected, atol=1e-14)


def test_a_batch_may_carry_its_own_scales():
    basis = torch.stack([_basis(5, 2, seed) for seed in range(3)])
    scales = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    batched = Projector(basis, scales, scales)
    for i in range(3):
        single = Projector(basis[i], float(scales[i]), float(scales[i]))
        assert torch.allclose(batched.matrix()[i], single.matrix(), atol=1e-15)
        x = torch.randn(4, 5, dtype=torch.float64)
        assert torch.allclose(batched.apply(x)[i], single.apply(x), atol=1e-15)


def test_a_dense_matrix_is_kept_as_it_is():
    matrix = torch.randn(4, 4, dtype=torch.float64)
    matrix = matrix + matrix.mT
    projector = Projector.from_dense(matrix)
    assert projector.matrix() is matrix
    assert (projector.dim, projector.rank) == (4, 0)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(projector.apply(x), x @ matrix)
    with pytest.raises(ValueError, match=r"matrix: expected \[..., d, d\], got \(2, 3\)"):
        Projector.from_dense(torch.randn(2, 3))


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="'middle'"):
        Projector(_basis(3, 1)).apply(torch.randn(3, 3, dtype=torch.float64), "middle")


def test_conversion_reaches_every_tensor_and_leaves_numbers_alone():
    converted = Projector(_basis(4, 2), torch.tensor(0.5, dtype=torch.float64), 0.25).to(torch.float32)
    assert converted.basis.dtype == torch.float32
    assert isinstance(converted.identity, torch.Tensor)
    assert converted.identity.dtype == torch.float32
    assert converted.span == 0.25


def test_a_lone_projector_acts_on_the_last_dimension():
    p, q = Projector(_basis(3, 1)), Projector(_basis(4, 1))
    assert Sides.of(q) == Sides(None, q)
    assert Sides.of((p, q)) == Sides(p, q)
    assert Sides.of((p, None)).right is None
    with pytest.raises(TypeError, match="expected a Projector or a \\(left, right\\) pair"):
        Sides.of([p, q])  # type: ignore[arg-type]
