"""What two gloo processes try of FTPAdamW and FTPSGD; optim_workers.py runs these with its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optim_workers import WORLD, Net, batches, same, train, values
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops.weight_projection import FLOORED
from cl_kernels.optim import FTPSGD, FTPAdamW, L2SPAdamW, SPDAdamW

CHECKS: dict[str, Callable[[int, Path], None]] = {}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": lambda named, **k: FTPAdamW(named, **{"lr": 1e-2, "weight_decay": 0.1, "exclude": "empty.bias", **k}),
    "sgd": lambda named, **k: FTPSGD(named, **{"lr": 1e-2, "momentum": 0.9, "nesterov": True, "exclude": (), **k}),
    "tensor": lambda named, **k: FTPAdamW(named, **{"lr": 1e-2, "norm": "l2", "masked": True, "exclude": (), **k}),
}


def check(function: Callable[[int, Path], None]) -> Callable[[int, Path], None]:
    CHECKS[function.__name__] = function
    return function


class Wide(Net):
    """With a (1, N, D) parameter, which one process holds whole."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.pos = nn.Parameter(torch.randn(1, 3, 12))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.pos[0] @ x.mT).square().mean()


def build(kind: str, optimizer: str, seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
    model: nn.Module = Wide(seed)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        fully_shard(model)
    return model, OPTIMIZERS[optimizer](model.named_parameters(), **options)


def equal_on_all_ranks(value: Any) -> None:
    both: list[Any] = [None] * WORLD
    dist.all_gather_object(both, value)
    assert both[0] == both[1]


def close(a: dict[str, float], b: dict[str, float], rtol: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=rtol, abs=1e-6), name


@check
def ftp_ddp_ranks_are_bit_equal(rank: int, folder: Path) -> None:
    for name in OPTIMIZERS:
        single, ddp = build("single", name), build("ddp", name)
        train("single", *single, 10, seed=1)
        train("ddp", *ddp, 10, seed=1)
        same(values(single[0]), values(ddp[0]), 5e-6)
        both: list[Any] = [None] * WORLD
        dist.all_gather_object(both, values(ddp[0]))
        same(both[0], both[1], 0.0)
        equal_on_all_ranks(ddp[1].radii())
        assert single[1].fingerprints() == ddp[1].fingerprints()


@check
def ftp_fsdp2_rows_follow_one_process(rank: int, folder: Path) -> None:
    """Even, uneven and empty shards, vectors cut in pieces, a tensor that one process holds; floors among the steps."""
    for name in OPTIMIZERS:
        single, sharded = build("single", name), build("fsdp", name)
        floors = 0
        for i, x in enumerate(batches(1, 10)):
            for (model, optimizer), part in ((single, x), (sharded, x.chunk(WORLD)[rank])):
                optimizer.zero_grad()
                model(part).backward()
                with CommDebugMode() as communication:
                    optimizer.step()
            counts = communication.get_total_counts()
            assert counts == (1 if name == "tensor" else 2), counts  # all sums in one call, counts of rows in another
            floors += sharded[1].floor_rate() > 0
            assert sharded[1].floor_rate() == single[1].floor_rate(), i
            close(single[1].radii(), sharded[1].radii())
            close(single[1].distances(), sharded[1].distances())
        assert floors >= 1
        close(single[1].projected_fraction(), sharded[1].projected_fraction())
        close(single[1].fire_rate(), sharded[1].fire_rate())
        same(values(single[0]), values(sharded[0]), 5e-6)
        equal_on_all_ranks(sharded[1].radii())
        assert max(sharded[1].projected_fraction().values()) > 0
        start = {n: p.detach() for n, p in Wide().named_parameters()}
        for n, anchor in sharded[1].anchors().items():
            assert isinstance(anchor, DTensor)
            assert torch.equal(anchor.full_tensor(), start[n]), n


@check
def ftp_fsdp2_relative_speed_and_fixed_radius(rank: int, folder: Path) -> None:
    for options in ({"relative_radius_lr": True, "radius_lr": 0.1}, {"radius": 0.05}, {"radius": float("inf")}):
        single, sharded = build("single", "adamw", **options), build("fsdp", "adamw", **options)
        train("single", *single, 6, seed=1)
        train("fsdp", *sharded, 6, seed=1)
        close(single[1].radii(), sharded[1].radii())
        same(values(single[0]), values(sharded[0]), 5e-6)


@check
def ftp_anchors_from_a_file_read_only_their_rows(rank: int, folder: Path) -> None:
    path = folder / "weights.safetensors"
    if rank == 0:
        save_file({name: p.detach() for name, p in Wide().named_parameters()}, path)
    dist.barrier()
    optimizer = build("fsdp", "adamw", anchors=path)[1]
    plain = build("single", "adamw")[1]
    assert optimizer.fingerprints() == plain.fingerprints()
    rows = {held.name: held.slot.shape[0] for held in optimizer._held.values() if held.name.endswith("weight")}
    assert rows == ({"even.weight": 4, "uneven.weight": 3, "empty.weight": 1} if rank == 0 else
                    {"even.weight": 4, "uneven.weight": 2, "empty.weight": 0})  # fmt: skip
    of_mapping = build("fsdp", "adamw", anchors=dict(Wide().named_parameters()))[1]
    assert of_mapping.fingerprints() == plain.fingerprints()


@check
def ftp_an_edit_at_the_floor_is_found_on_all_ranks(rank: int, folder: Path) -> None:
    model, optimizer = build("fsdp", "sgd")
    train("fsdp", model, optimizer, 1, seed=1)
    assert optimizer.floor_rate() == 1.0
    train("fsdp", model, optimizer, 1, seed=2)
    model, optimizer = build("fsdp", "sgd")
    train("fsdp", model, optimizer, 1, seed=1)
    with torch.no_grad():
        model.even.weight.mul_(0.5)
    model(batches(2, 1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"even\.weight: the weight was edited"):
        optimizer.step()


@check
def ftp_a_nan_in_one_shard_skips_the_step_on_all_ranks(rank: int, folder: Path) -> None:
    for name in ("adamw", "sgd"):
        model, optimizer = build("fsdp", name, nonfinite="skip")
        train("fsdp", model, optimizer, 3, seed=1)
        before, radii = values(model), optimizer.radii()
        optimizer.zero_grad()
        model(batches(5, 1)[0].chunk(WORLD)[rank]).backward()
        grad = model.even.weight.grad
        if rank == 1:
            grad.to_local()[0, 0] = float("nan")
        optimizer.step()
        same(values(model), before, 0.0)
        assert optimizer.radii() == radii
        assert optimizer.skipped_steps() == 1


@check
def ftp_checkpoints_load_across_sizes(rank: int, folder: Path) -> None:
    """From the first step, where every tensor is at its floor, and later; with the same engine bit for bit."""
    kinds, cells = ("single", "ddp", "fsdp"), 0
    for done in (1, 4):
        for saved in kinds:
            where = folder / f"from-{saved}-{done}"
            model, optimizer = build(saved, "adamw", full_state=True)
            train(saved, model, optimizer, done, seed=1)
            if saved != "single" or rank == 0:
                parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                dcp.save(parts, checkpoint_id=where, **({"no_dist": True} if saved == "single" else {}))
            dist.barrier()
            floors = optimizer.floor_rate()
            assert floors == 1.0 or done > 1
            train(saved, model, optimizer, 3, seed=2)
            expected, radii = values(model), optimizer.radii()
            for loaded in kinds if done == 1 else (saved,):
                again, fresh = build(loaded, "adamw", full_state=True)
                before = values(again)
                parts = dict(zip(("model", "optimizer"), get_state_dict(again, fresh), strict=True))
                same(values(again), before, 0.0)  # asking for a fresh state steps with lr 0 and zero gradients
                dcp.load(parts, checkpoint_id=where, **({"no_dist": True} if loaded == "single" else {}))
                set_state_dict(again, fresh, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
                assert fresh.floor_rate() == floors
                train(loaded, again, fresh, 3, seed=2)
                same(values(again), expected, 0.0 if loaded == saved else 5e-6)
                close(fresh.radii(), radii, rtol=0.0 if loaded == saved else 1e-4)
                cells += 1
    assert cells == 12


@check
def ftp_plain_state_dicts_of_shards_resume_bit_for_bit(rank: int, folder: Path) -> None:
    for done in (1, 5):
        model, optimizer = build("fsdp", "adamw")
        train("fsdp", model, optimizer, done, seed=1)
        saved, weights = optimizer.state_dict(), {n: p.detach().clone() for n, p in model.named_parameters()}
        saved["state"] = {i: {k: v.clone() for k, v in s.items()} for i, s in saved["state"].items()}
        train("fsdp", model, optimizer, 3, seed=2)
        again, fresh = build("fsdp", "adamw")
        fresh.load_state_dict(saved)
        with torch.no_grad():
            for n, p in again.named_parameters():
                p.copy_(weights[n])
        down = sum(float(s["radius"][FLOORED]) for s in fresh.state.values() if "radius" in s)
        assert (down > 0) == (done == 1)
        train("fsdp", again, fresh, 3, seed=2)
        same(values(model), values(again), 0.0)


@check
def ftp_rows_that_are_cut_are_refused(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    p = nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)]))
    with pytest.raises(SubspaceMismatchError, match=r"w: \(4, 6\) is placed .*which cuts rows"):
        FTPAdamW([("w", p)])
    FTPAdamW([("w", p)], exclude="w")
    wrapped = FullyShardedDataParallel(Net(), use_orig_params=False, device_id=torch.device("cpu"))
    with pytest.raises(SubspaceMismatchError, match="fully_shard"):
        FTPAdamW(wrapped.named_parameters())
    state = dict(Net().named_parameters())
    flat = nn.Parameter(state["even.weight"].detach().flatten().chunk(WORLD)[rank].clone())
    with pytest.raises(ValueError, match="ZeRO"):
        FTPAdamW([("even.weight", flat)], anchors=state)


@check
def relatives_of_ftp_are_one_process(rank: int, folder: Path) -> None:
    """Whole tensors decide, so the shards' sums meet; with random gradients some steps act and some do not."""
    made: list[Callable[[Any], Any]] = [
        lambda named: SPDAdamW(named, lr=1e-2, exclude=()),
        lambda named: L2SPAdamW(named, lr=1e-2, exclude=()),
        lambda named: L2SPAdamW(named, lr=1e-2, strength=5.0, coupled=False, exclude=()),
    ]
    for make in made:
        single, sharded = Net(), Net()
        fully_shard(sharded)
        pairs = [(model, make(model.named_parameters())) for model in (single, sharded)]
        for step in range(12):
            torch.manual_seed(100 + step)
            grads = {name: torch.randn(p.shape) for name, p in single.named_parameters()}
            for model, optimizer in pairs:
                for name, p in model.named_parameters():
                    sharding = isinstance(p, DTensor)
                    p.grad = distribute_tensor(grads[name], p.device_mesh, p.placements) if sharding else grads[name]
                optimizer.step()
        same(values(single), values(sharded), 1e-6)
        counts = [optimizer.fired() for _, optimizer in pairs]
        assert counts[0] == counts[1]
        assert 0 < sum(counts[0].values()) < 12 * len(counts[0])
        equal_on_all_ranks(counts[1])
