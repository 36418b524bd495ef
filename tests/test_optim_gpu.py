"""What the optimizers do when a model goes to a GPU after they were made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cl_kernels.ops import Projector
from cl_kernels.optim import ProjectedAdamW, ProjectedSGD, project_updates
from cl_kernels.subspace import SubspaceStore

pytestmark = pytest.mark.gpu

MAKERS = {
    "ProjectedAdamW": lambda named, store: ProjectedAdamW(named, lr=1e-2, subspace=store),
    "ProjectedSGD": lambda named, store: ProjectedSGD(named, lr=1e-2, momentum=0.9, subspace=store),
    "project_updates": lambda named, store: wrapped(named, store, low_memory=False),
    "project_updates, low memory": lambda named, store: wrapped(named, store, low_memory=True),
}


def wrapped(named: Any, store: Any, *, low_memory: bool) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(named, lr=1e-2)
    project_updates(optimizer, store, low_memory=low_memory)
    return optimizer


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_model_that_moved_is_refused_until_the_store_follows(kind: str) -> None:
    net = nn.Linear(64, 8)
    v = torch.linalg.qr(torch.randn(64, 12))[0]
    store = SubspaceStore({"weight": Projector(v)})
    optimizer = MAKERS[kind](net.named_parameters(), store)
    step(net, optimizer)
    net.cuda()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(RuntimeError, match=r"weight.*cuda.*cpu.*store\.to"):
        step(net, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    store.to("cuda")
    optimizer.load_state_dict(optimizer.state_dict())  # moments follow their parameters
    for _ in range(10):
        step(net, optimizer)
    moved = net.weight.detach() - before["weight"]
    assert moved.norm() > 1e-2
    assert (moved @ v.cuda()).norm() <= 1e-4 * moved.norm()
