"""Two gloo processes that try what test_optim_distributed.py asserts: started by it, `optim_workers.py RANK FOLDER`.

One start of two interpreters serves all checks. Each check runs on both ranks; what it raises is reported by its name.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops import Projector, Sides
from cl_kernels.optim import ProjectedAdam, ProjectedAdamW, ProjectedSGD, project_updates
from cl_kernels.subspace import SubspaceStore

WORLD = 2
CHECKS: dict[str, Callable[[int, Path], None]] = {}
OPTIMIZERS: dict[str, Callable[[Any, Any], Any]] = {
    "adamw": lambda named, store: ProjectedAdamW(named, lr=1e-2, subspace=store),
    "adam": lambda named, store: ProjectedAdam(named, lr=1e-2, weight_decay=0.1, amsgrad=True, subspace=store),
    "sgd": lambda named, store: ProjectedSGD(named, lr=1e-2, momentum=0.9, weight_decay=0.1, subspace=store),
}


def check(function: Callable[[int, Path], None]) -> Callable[[int, Path], None]:
    CHECKS[function.__name__] = function
    return function


class Net(nn.Module):
    """Weights of 8, 5 and 1 rows: over two processes 4 + 4, 3 + 2 and 1 + 0."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.even, self.uneven, self.empty = nn.Linear(12, 8), nn.Linear(8, 5), nn.Linear(5, 1)
        self.prompt = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.empty(torch.tanh(self.uneven(torch.tanh(self.even(x))))).square().mean()
        return loss + (self.prompt @ x.mT).square().mean()


def basis(d: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, r))[0]


def store() -> SubspaceStore:
    torch.manual_seed(11)
    return SubspaceStore(
        {
            "even.weight": Projector(basis(12, 5)),
            "uneven.weight": Projector(basis(8, 3)),
            "empty.weight": Projector(basis(5, 2), 0.7, 0.7),
            "prompt": Projector(basis(12, 4)),
        }
    )


def build(kind: str, optimizer: str, seed: int = 0) -> tuple[nn.Module, Any]:
    model: nn.Module = Net(seed)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        fully_shard(model)
    return model, OPTIMIZERS[optimizer](model.named_parameters(), store())


def batches(seed: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 12, generator=generator) for _ in range(steps)]


def train(kind: str, model: nn.Module, optimizer: Any, steps: int, seed: int) -> None:
    rank = dist.get_rank()
    for x in batches(seed, steps):
        optimizer.zero_grad()
        model(x if kind == "single" else x.chunk(WORLD)[rank]).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def refused(words: str, act: Callable[[], Any]) -> None:
    with pytest.raises(SubspaceMismatchError, match=re.escape(words)):
        act()


@check
def ddp_is_one_process(rank: int, folder: Path) -> None:
    for name in OPTIMIZERS:
        single, ddp = build("single", name), build("ddp", name)
        train("single", *single, 8, seed=1)
        train("ddp", *ddp, 8, seed=1)
        same(values(single[0]), values(ddp[0]), 1e-6)
        both: list[Any] = [None] * WORLD
        dist.all_gather_object(both, values(ddp[0]))
        same(both[0], both[1], 0.0)
        assert max(ddp[1].violations().values()) <= 1e-4


@check
def ddp_accumulates_under_no_sync(rank: int, folder: Path) -> None:
    single, ddp = build("single", "adamw"), build("ddp", "adamw")
    for x in batches(2, 4):
        for model, optimizer, kind in ((*single, "single"), (*ddp, "ddp")):
            optimizer.zero_grad()
            halves = (x if kind == "single" else x.chunk(WORLD)[rank]).chunk(2)
            if kind == "ddp":
                with model.no_sync():
                    (model(halves[0]) / 2).backward()
            else:
                (model(halves[0]) / 2).backward()
            (model(halves[1]) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    same(values(single[0]), values(ddp[0]), 1e-6)


@check
def fsdp2_rows_are_projected_without_communication(rank: int, folder: Path) -> None:
    for name in OPTIMIZERS:
        single, sharded = build("single", name), build("fsdp", name)
        shapes = [p.to_local().shape[0] for n, p in sharded[0].named_parameters() if n.endswith("weight")]
        assert shapes == ([4, 3, 1] if rank == 0 else [4, 2, 0])
        train("single", *single, 8, seed=1)
        for x in batches(1, 8):
            sharded[1].zero_grad()
            sharded[0](x.chunk(WORLD)[rank]).backward()
            with CommDebugMode() as communication:
                sharded[1].step()
            assert communication.get_total_counts() == 0
        same(values(single[0]), values(sharded[0]), 2e-6)
        a, b = single[1].violations(), sharded[1].violations()
        assert a.keys() == b.keys()
        assert max(b.values()) <= 1e-4
        for p, state in sharded[1].state.items():
            assert all(isinstance(v, DTensor) and v.placements == p.placements for k, v in state.items() if k != "step")


@check
def fsdp2_clips_and_wraps_any_optimizer(rank: int, folder: Path) -> None:
    finals = []
    for kind in ("single", "fsdp"):
        model, _ = build(kind, "adamw")
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
        project_updates(optimizer, store())
        for x in batches(3, 5):
            optimizer.zero_grad()
            model(x if kind == "single" else x.chunk(WORLD)[rank]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        finals.append(values(model))
    same(*finals, 2e-6)


@check
def left_projectors_are_refused_on_row_shards(rank: int, folder: Path) -> None:
    model = fully_shard(Net())
    torch.manual_seed(3)
    left, right = Projector(basis(4, 1)), Projector(basis(12, 4))
    for sides in (Sides(left, None), Sides(left, right)):
        refused(
            "left projector mixes what dimension 0",
            lambda sides=sides: ProjectedAdamW(model.named_parameters(), subspace={"prompt": sides}),
        )
        plain = torch.optim.AdamW(model.named_parameters())
        refused("ignored_params", lambda sides=sides, plain=plain: project_updates(plain, {"prompt": sides}))
    refused("(5,)", lambda: ProjectedAdamW(model.named_parameters(), subspace={"uneven.bias": Projector(basis(5, 1))}))
    kept, single = Net(), Net()
    fully_shard(kept, ignored_params={kept.prompt})
    two_sided = {"prompt": Sides(left, right)}
    optimizers = [ProjectedAdamW(m.named_parameters(), lr=1e-2, subspace=two_sided) for m in (kept, single)]
    for x in batches(4, 4):  # the same batch on both, so that the prompt's gradients agree without a reduction
        for m, optimizer in zip((kept, single), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).backward()
            optimizer.step()
    same(values(kept), values(single), 2e-6)


@check
def placements_decide(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(7)
    weight, left, right = torch.randn(6, 10), Projector(basis(6, 2)), Projector(basis(10, 3))
    whole = nn.Parameter(weight.clone())
    grad = torch.randn(6, 10)
    cases = (
        (Shard(0), (None, right), None),
        (Shard(1), (left, None), None),
        (Replicate(), (left, right), None),
        (Shard(1), (None, right), "right projector mixes what dimension 1"),
        (Shard(0), (left, right), "left projector mixes what dimension 0"),
    )
    for placement, sides, words in cases:
        shard = nn.Parameter(dist.tensor.distribute_tensor(weight, mesh, [placement]))
        make = lambda p, sides=sides: ProjectedAdamW([("w", p)], lr=1e-2, subspace={"w": Sides(*sides)})  # noqa: E731
        if words:
            refused(words, lambda shard=shard, make=make: make(shard))
            continue
        other = nn.Parameter(whole.detach().clone())
        shard.grad = dist.tensor.distribute_tensor(grad, mesh, [placement])
        other.grad = grad
        for p in (shard, other):
            optimizer = make(p)
            optimizer.step()
        torch.testing.assert_close(shard.full_tensor(), other, rtol=0, atol=1e-6)


@check
def a_nan_in_one_shard_skips_the_step_on_all_ranks(rank: int, folder: Path) -> None:
    for kind in (ProjectedAdamW, ProjectedSGD):
        model = fully_shard(Net())
        optimizer = kind(model.named_parameters(), lr=1e-2, subspace=store(), nonfinite="skip")
        train("fsdp", model, optimizer, 2, seed=1)
        before = values(model)
        model(batches(5, 1)[0].chunk(WORLD)[rank]).backward()
        weight = model.even.weight.grad
        if rank == 1:
            weight.to_local()[0, 0] = float("nan")
        optimizer.step()
        same(values(model), before, 0.0)
        assert optimizer.skipped_steps() == 1
        train("fsdp", model, optimizer, 1, seed=1)
        assert optimizer.skipped_steps() == 1


@check
def checkpoints_load_across_sizes(rank: int, folder: Path) -> None:
    kinds, cells = ("single", "ddp", "fsdp"), 0
    for saved in kinds:
        where = folder / f"from-{saved}"
        alone = {"no_dist": True} if saved == "single" else {}
        model, optimizer = build(saved, "adam")
        train(saved, model, optimizer, 3, seed=1)
        if saved != "single" or rank == 0:
            parts = get_state_dict(model, optimizer)
            dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=where, **alone)
        dist.barrier()
        train(saved, model, optimizer, 3, seed=2)
        expected = values(model)
        for loaded in kinds:
            again, fresh = build(loaded, "adam", seed=99)
            before = values(again)
            parts = dict(zip(("model", "optimizer"), get_state_dict(again, fresh), strict=True))
            same(values(again), before, 0.0)  # asking for a fresh state steps with lr 0 and zero gradients: F40
            dcp.load(parts, checkpoint_id=where, **({"no_dist": True} if loaded == "single" else {}))
            set_state_dict(again, fresh, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
            fresh.set_subspace(store())
            assert {int(s["step"]) for s in fresh.state.values()} == {3}
            train(loaded, again, fresh, 3, seed=2)
            same(values(again), expected, 0.0 if loaded == saved else 2e-6)
            assert max(fresh.violations().values()) <= 1e-3  # three steps from weights near 1: rounding
            cells += 1
    assert cells == 9


@check
def one_store_on_all_ranks(rank: int, folder: Path) -> None:
    """Rank 0 writes it, all load it, and the fingerprints are compared."""
    if rank == 0:
        store().save(folder / "subspace.safetensors")
    dist.barrier()
    mine = SubspaceStore.load(folder / "subspace.safetensors")
    prints: list[Any] = [None] * WORLD
    dist.all_gather_object(prints, {name: mine.fingerprint(name) for name in mine})
    assert prints[0] == prints[1]
    assert len(prints[0]) == 4


@check
def flat_parameters_are_refused(rank: int, folder: Path) -> None:
    for original in (False, True):
        wrapped = FullyShardedDataParallel(Net(), use_orig_params=original, device_id=torch.device("cpu"))
        refused("fully_shard", lambda w=wrapped: ProjectedAdamW(w.named_parameters(), subspace=store()))
        refused(
            "fully_shard",
            lambda w=wrapped: project_updates(torch.optim.AdamW(w.named_parameters()), store(), strict=False),
        )
    net = Net()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in net.parameters()]).chunk(WORLD)[rank].clone())
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=store())
    optimizer.param_groups[0]["params"] = [flat]  # DeepSpeed's ZeRO puts its own partition into the group
    flat.grad = torch.ones_like(flat)
    before = flat.detach().clone()
    refused("ZeRO", optimizer.step)
    assert torch.equal(flat, before)
    slices = [("even.weight", nn.Parameter(net.even.weight.detach().flatten().chunk(WORLD)[rank].clone()))]
    refused("ZeRO", lambda: ProjectedAdamW(slices, subspace={"even.weight": Projector(basis(12, 5))}))


@check
def zero_redundancy_is_refused(rank: int, folder: Path) -> None:
    net = Net()
    refused(
        "named_parameters",
        lambda: ZeroRedundancyOptimizer(net.parameters(), optimizer_class=ProjectedAdamW, lr=1e-2, subspace=store()),
    )


def main() -> None:
    import optim_ftp_workers  # which takes the network and the loop from here

    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    outcome: dict[str, str] = {}
    report = folder / f"outcome-{rank}.json"
    for name, function in (CHECKS | optim_ftp_workers.CHECKS).items():
        (folder / name).mkdir(exist_ok=True)
        try:
            function(rank, folder / name)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
        report.write_text(json.dumps(outcome))
        dist.barrier()  # after a failure the two may be out of step: then this ends the run, and the report says why
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
