"""Every operation, so that none can be forgotten: soundly registered, traced by its fake, honest about writes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cl_kernels as clk
from cl_kernels.ops._registry import OPS

Arguments = tuple[Any, ...]


def _moments() -> Arguments:
    return torch.zeros(3, 3, dtype=torch.float64), torch.randn(5, 3), torch.zeros(3), torch.zeros(()), None, 1.0, 1.0


def _many_moments() -> Arguments:
    covs = [torch.zeros(3, 3), torch.zeros(2, 2, dtype=torch.float64)]
    return covs, [torch.randn(4, 3), torch.randn(2, 2)], [], [], [], 0.5, 0.9


def _adam_step() -> Arguments:
    params = [torch.randn(4, 3), torch.randn(2, 3)]
    basis = torch.linalg.qr(torch.randn(3, 1)).Q
    moments = [[torch.rand_like(p) for p in params] for _ in range(3)]
    steps = [torch.zeros(()) for _ in params]
    sides = ([None, None], [basis, None], [0, 1, 0, 0], [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    rates = (None, 1e-3, None, 0.9, 0.999, 1e-8, 1e-2, True, True, False, None, None)
    return (params, moments[0], moments[1], moments[2], [], steps, *sides, *rates)


def _ftp(moments: int, *base: Any) -> Arguments:
    params = [torch.randn(4, 3), torch.randn(5), torch.randn(2, 3)]
    state = [[torch.rand_like(p) for p in params] for _ in range(moments)]
    anchors = [torch.randn(4, 3), torch.randn(5).bfloat16(), torch.empty(0)]
    lists = ([torch.ones(()) for _ in params], anchors, [torch.rand(8) for _ in params])
    rule = (0.5, [1e-2], False, 1e-8, [], 0)
    return (
        params,
        [torch.randn_like(p) for p in params],
        *state,
        *lists,
        1e-3,
        None,
        1e-2,
        False,
        None,
        None,
        *base,
        *rule,
    )


def _anchored() -> Arguments:
    return [torch.randn(4, 3), torch.randn(5)], [torch.randn(4, 3).half(), torch.empty(0)]


def _tall() -> torch.Tensor:
    return torch.randn(2, 5, 3, dtype=torch.float64)


def _factors() -> Arguments:
    q, r = torch.linalg.qr(_tall())
    return _tall(), torch.randn(2, 3, 3, dtype=torch.float64), q, r, torch.linalg.inv(r).mT.contiguous()


def _prefix() -> Arguments:
    """Few queries, so that the merged form is taken; a prefix that the batch shares."""
    sizes = ((2, 2, 3, 4), (2, 2, 7, 4), (2, 2, 7, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    return tuple(torch.randn(size, dtype=torch.float64) for size in sizes)


def _prefix_backward() -> Arguments:
    inputs = _prefix()
    out, lse = OPS["prefix_attention"].overload(*inputs, 0.5)
    return torch.randn_like(out), *inputs, out, lse, 0.5, True


def _heads() -> list[torch.Tensor]:
    """Logits of two students that learn and of a teacher."""
    return [torch.randn(4, 7, dtype=torch.float64).requires_grad_(i < 2) for i in range(3)]


def _linear_heads() -> Arguments:
    """Features and heads of a student that learns and of a teacher."""
    shapes = ((5, 3), (7, 3), (7,), (5, 4), (7, 4), (7,))
    made = [torch.randn(shape, dtype=torch.float64).requires_grad_(i < 3) for i, shape in enumerate(shapes)]
    return *made, 2.0, 2, 2, True, True, True


SAMPLES: dict[str, Callable[[], Arguments]] = {
    "update_covariance_": _moments,
    "update_covariances_": _many_moments,
    "update_head_grams_": lambda: (torch.zeros(2, 3, 3), torch.randn(2, 2, 4, 3), 1.0, 1.0),
    "expand_head_grams": lambda: (
        torch.rand(2, 3, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(6, 5, dtype=torch.float64, requires_grad=True),
    ),
    "symmetric_eigh": lambda: (torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64)),),
    "spectral_projector": lambda: (torch.eye(3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), 3),
    "log_odds_filter": lambda: (torch.eye(3).expand(2, 3, 3) * 0.1, torch.ones(2), 3, None, True),
    "project": lambda: (
        torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
        *(None, None, None, 0),
        torch.linalg.qr(torch.randn(3, 1, dtype=torch.float64)).Q.requires_grad_(),
        *(torch.tensor(1.0), torch.tensor(0.5), 1),
    ),
    "projected_adam_step_": _adam_step,
    "project_to_anchor": lambda: (
        torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 3, dtype=torch.float64),
        torch.rand(4, dtype=torch.float64, requires_grad=True),
        0,
    ),
    "ftp_adam_step_": lambda: _ftp(3, 0.9, 0.999, 1e-8, True),
    "ftp_sgd_step_": lambda: _ftp(1, 0.9, 0.0, True),
    "displacement_products": lambda: ([torch.randn(4, 3), torch.randn(5)], *_anchored()),
    "rescale_": lambda: (*_anchored(), [torch.rand(4), torch.tensor(0.5)], 0),
    "qr": lambda: (_tall().requires_grad_(), None),
    "qr_backward": _factors,
    "polar": lambda: (_tall().requires_grad_(),),
    "prefix_attention": lambda: (*(x.requires_grad_() for x in _prefix()), 0.5),
    "prefix_attention_backward": _prefix_backward,
    "distillation_loss": lambda: (*_heads(), torch.arange(2, 6), None, 1, 6, 0.3, 2.0, 2, True, True),
    "kl_loss": lambda: (*_heads()[1:], 0, -1, 2.0, 2, True),
    "dkd_loss": lambda: (*_heads()[1:], torch.arange(2, 6), torch.ones(4).double(), 1, 6, 1.0, 4.0, 4.0, 0, True),
    "jsd_loss": lambda: (*_heads()[1:], 2, 5, 0.5, 2.0, 1, True),
    "linear_kl_loss": _linear_heads,
    "extend_basis": lambda: (torch.linalg.qr(_tall()[..., :2]).Q, _tall().requires_grad_(), 1e-6),
}


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [t for value in values for t in _tensors(value)] if isinstance(values, (list, tuple)) else []


def test_every_operation_has_a_sample():
    assert set(SAMPLES) == {name for name in OPS if not name.startswith("test_")}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", SAMPLES)
def test_schema_fake_autograd_and_tracing_are_sound(name, backend):
    with clk.use_backend(backend):
        report = torch.library.opcheck(OPS[name].overload, SAMPLES[name]())
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", SAMPLES)
def test_an_operation_writes_its_arguments_or_returns_fresh_tensors_never_both(name):
    arguments = SAMPLES[name]()
    result = OPS[name].overload(*arguments)
    written = any(a.alias_info is not None and a.alias_info.is_write for a in OPS[name].overload._schema.arguments)
    assert written == (result is None)
    taken = {t.untyped_storage().data_ptr() for t in _tensors(arguments)}
    assert not any(t.untyped_storage().data_ptr() in taken for t in _tensors(result))


@pytest.mark.parametrize("name", SAMPLES)
def test_it_carries_the_tag_that_lets_compilers_trust_it(name):
    assert torch.Tag.pt2_compliant_tag in OPS[name].overload.tags
