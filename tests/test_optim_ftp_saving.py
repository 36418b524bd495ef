"""FTP's anchors and radii through checkpoints, files, copies, toolboxes and edits from outside."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from official_ftp import gradients
from safetensors.torch import save_file
from test_optim_ftp import MAKERS, backward, kinds, record_of, start, weights_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from cl_kernels.errors import CheckpointError, NonFiniteError, SubspaceMismatchError
from cl_kernels.ops.weight_projection import FLOORED, GAMMA
from cl_kernels.optim import FTPSGD, FTPAdamW


def train(net: nn.Module, optimizer: Any, steps: range) -> None:
    for i in steps:
        backward(net, i)
        optimizer.step()


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def floored(optimizer: Any) -> int:
    return sum(bool(record_of(optimizer, p)[FLOORED]) for p, _ in optimizer._present() if optimizer.state[p])


# -- resume ------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("at", ["fresh", "converged"])
@pytest.mark.parametrize("include", [False, True])
def test_resume_is_bit_exact(kind: str, at: str, include: bool) -> None:
    """At every one of the first steps and later, tensors at their floor among them."""
    pretrained, net = start(at), start(at)
    optimizer = MAKERS[kind](net.named_parameters())
    at_floor = 0
    for done in (1, 2, 3, 12):
        train(net, optimizer, range(int(optimizer.state[net.pos].get("step", 0)), done))
        at_floor += floored(optimizer)
        saved = through_a_file({"net": net.state_dict(), "o": optimizer.state_dict(include_anchors=include)})
        straight = copy.deepcopy((net, optimizer))
        train(*straight, range(done, done + 6))
        again = copy.deepcopy(pretrained)
        if include:  # such a state needs no anchors
            again.load_state_dict(saved["net"])
        resumed = MAKERS[kind](again.named_parameters())
        resumed.load_state_dict(saved["o"])
        again.load_state_dict(saved["net"])
        assert all(torch.equal(a, optimizer.anchors()[name]) for name, a in resumed.anchors().items())
        train(again, resumed, range(done, done + 6))
        assert same(straight[0], again), done
        assert straight[1].radii() == resumed.radii()
        assert straight[1].fire_rate() == resumed.fire_rate()
    assert at_floor >= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kinds
def test_resume_of_16_bit_weights_keeps_float32(kind: str, dtype: torch.dtype) -> None:
    """torch's load_state_dict casts a state to its parameter's type, which would lose radii, moments and masters."""
    net = start().to(dtype)
    optimizer = MAKERS[kind](net.named_parameters())

    def walk(model: nn.Module, o: Any, steps: range) -> None:
        for i in steps:
            grads = gradients(start(), {name: w.float() for name, w in weights_of(model).items()}, i)
            for name, p in model.named_parameters():
                p.grad = grads[name].to(dtype)
            o.step()

    for done in (1, 7):
        walk(net, optimizer, range(done - 1, done))
        saved = through_a_file({"net": net.state_dict(), "o": optimizer.state_dict()})
        again = start().to(dtype)
        resumed = MAKERS[kind](again.named_parameters())
        resumed.load_state_dict(saved["o"])
        again.load_state_dict(saved["net"])
        for p, _ in resumed._present():
            assert {value.dtype for value in resumed.state[p].values()} == {torch.float32}
        straight = copy.deepcopy((net, optimizer))
        walk(*straight, range(done, done + 5))
        walk(again, resumed, range(done, done + 5))
        assert same(straight[0], again)
        assert straight[1].radii() == resumed.radii()


@kinds
def test_going_back_within_a_run_is_exact(kind: str) -> None:
    """Tensors lie on their anchors when the older state comes, or lay on them when it was saved: slots change hands."""
    net = start("converged")
    optimizer = MAKERS[kind](net.named_parameters())
    kept, finals, down = {}, {}, {}
    for i in range(14):
        kept[i] = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        down[i] = floored(optimizer) if i else 0
        train(net, optimizer, range(i, i + 1))
        finals[i] = weights_of(net)
    assert len(set(down.values())) > 2
    for i in (9, 1, 12, 2, 5, 1):
        optimizer.load_state_dict(copy.deepcopy(kept[i][1]))  # as torch's, it takes the tensors themselves
        net.load_state_dict(kept[i][0])
        train(net, optimizer, range(i, i + 1))
        assert all(torch.equal(p, finals[i][name]) for name, p in net.named_parameters()), i


def test_other_anchors_are_refused_on_load_and_nothing_changes() -> None:
    net = start()
    optimizer = FTPAdamW(net.named_parameters())
    train(net, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    trained = copy.deepcopy(net)  # the usual mistake: trained weights first, the optimizer after
    other = FTPAdamW(trained.named_parameters())
    train(trained, other, range(1))
    before, group = copy.deepcopy(other.state_dict()), copy.deepcopy(other.param_groups[0]["lr"])
    with pytest.raises(
        SubspaceMismatchError, match=r"other anchors; differing: .*conv.*before trained ones are loaded"
    ):
        other.load_state_dict(saved)
    after = other.state_dict()
    assert after["anchors"] == before["anchors"]
    assert all(torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items())
    assert other.param_groups[0]["lr"] == group
    other.load_state_dict(saved, strict=False)
    left_out = FTPAdamW(start().named_parameters(), exclude=("fc1.*", "head.*"))
    with pytest.raises(SubspaceMismatchError, match="fc1"):
        left_out.load_state_dict(saved)


@kinds
def test_a_state_of_torchs_twin_loads_and_goes_back(kind: str) -> None:
    net = start()
    torchs = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
    given = {"lr": 1e-3, **({} if kind == "adamw" else {"momentum": 0.9})}
    twin = torchs(net.named_parameters(), **given)
    train(net, twin, range(5))
    moment = "exp_avg" if kind == "adamw" else "momentum_buffer"
    kept = twin.state[net.pos][moment].clone()
    ours = MAKERS[kind](net.named_parameters())
    ours.load_state_dict(copy.deepcopy(twin.state_dict()))
    assert torch.equal(ours.state[net.pos][moment], kept)
    backward(net, 50)
    grad = net.pos.grad.clone()
    ours.step()
    wanted = 0.9 * kept + 0.1 * grad if kind == "adamw" else 0.9 * kept + grad
    torch.testing.assert_close(ours.state[net.pos][moment], wanted)  # not the first step's rule
    back = torchs(net.named_parameters(), **given)
    back.load_state_dict(through_a_file(ours.state_dict()))
    train(net, back, range(6, 8))


@kinds
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_a_state_without_master_weights_is_widened(kind: str, saved: torch.dtype) -> None:
    """torch's own of 16-bit parameters, or a float32 run that goes on in bfloat16: the bound holds for the master."""
    twins = {"adamw": torch.optim.AdamW, "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)}
    net = start().to(saved)
    twin = twins[kind](net.named_parameters())
    train(net, twin, range(2))
    net.bfloat16()
    anchors = {name: p.detach().float() for name, p in net.named_parameters()}
    optimizer = MAKERS[kind](net.named_parameters(), lr=1e-2)
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    optimizer.load_state_dict(twin.state_dict())
    optimizer.param_groups[0].update(settings)
    train(net, optimizer, range(2, 8))
    for name, radius in optimizer.radii().items():
        p = dict(net.named_parameters())[name]
        state = optimizer.state[p]
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert torch.equal(p, state["master"].bfloat16())
        moved = (state["master"] - anchors[name]).reshape(p.shape[0] if p.ndim > 1 else 1, -1).abs().sum(1)
        assert float(moved.max()) <= radius * (1 + 1e-5) + 1e-6, name
    assert max(optimizer.radii().values()) > 1e-3


@kinds
@pytest.mark.parametrize("full_state", [False, True])
def test_distributed_checkpoints_of_a_fresh_optimizer_move_nothing(kind: str, full_state: bool) -> None:
    """DCP initialises a fresh optimizer by a step with lr 0 and zero gradients. Bit for bit, radii included, and with
    `full_state` the continued run too, also from a floor."""
    net = start("converged")
    optimizer = MAKERS[kind](net.named_parameters(), full_state=full_state)
    train(net, optimizer, range(1))
    assert floored(optimizer) == 8
    saved = through_a_file(get_optimizer_state_dict(net, optimizer))
    weights = copy.deepcopy(net.state_dict())
    again = start("converged")
    fresh = MAKERS[kind](again.named_parameters(), full_state=full_state)
    before = weights_of(again)
    template = get_optimizer_state_dict(again, fresh)
    assert {name: set(s) for name, s in template["state"].items() if full_state} == {
        name: set(s) for name, s in saved["state"].items() if full_state
    }
    for name, p in again.named_parameters():
        assert torch.equal(p.detach().view(torch.int32), before[name].view(torch.int32))
        if not name.startswith("head"):
            assert not record_of(fresh, p).any()
    if not full_state:  # what DCP reads is what the template has
        saved["state"] = {
            n: {k: v for k, v in s.items() if k in template["state"][n]} for n, s in saved["state"].items()
        }
    set_optimizer_state_dict(again, fresh, saved)
    again.load_state_dict(weights)
    train(net, optimizer, range(1, 8))
    train(again, fresh, range(1, 8))
    assert same(net, again) == full_state
    assert all(torch.equal(a, optimizer.anchors()[name]) for name, a in fresh.anchors().items())


@kinds
def test_a_dummy_step_in_the_middle_of_a_run_changes_only_the_count(kind: str) -> None:
    net = start("converged")
    optimizer = MAKERS[kind](net.named_parameters(), weight_decay=0.1)
    train(net, optimizer, range(9))
    before, records = weights_of(net), {p: record_of(optimizer, p).clone() for p, _ in optimizer._present()}
    slots = {p: held.slot.clone() for p, held in optimizer._present()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]), name
    assert all(torch.equal(record_of(optimizer, p), record) for p, record in records.items())
    assert all(torch.equal(optimizer._held[p].slot, slot) for p, slot in slots.items())
    assert {float(optimizer.state[p]["step"]) for p in records} == {10.0}


# -- copies, toolboxes, edits ------------------------------------------------------------------------------------------


@kinds
def test_deepcopy_and_pickle_go_on_alike(kind: str) -> None:
    net = start("converged")
    optimizer = MAKERS[kind](net.named_parameters())
    train(net, optimizer, range(1))
    assert floored(optimizer)
    copies = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]  # noqa: S301 - our own bytes
    train(net, optimizer, range(1, 6))
    for other, o in copies:
        train(other, o, range(1, 6))
        assert same(net, other)
        assert o.radii() == optimizer.radii()
        assert o.fingerprints() == optimizer.fingerprints()


@kinds
def test_radii_survive_a_toolbox_that_wipes_the_state(kind: str) -> None:
    """Avalanche clears `optimizer.state`; the official optimizer would return to the pre-trained weights then."""
    net = start()
    optimizer = MAKERS[kind](net.named_parameters(), lr=1e-3)
    train(net, optimizer, range(10))
    radii, before, anchors = optimizer.radii(), optimizer.distances(), optimizer.anchors()
    optimizer.state = defaultdict(dict)
    train(net, optimizer, range(10, 11))
    for name, radius in radii.items():
        assert abs(optimizer.radii()[name] - radius) <= 0.05, name
        assert optimizer.distances()[name] >= before[name] - 0.05, name
    assert optimizer.distances()["fc1.weight"] > 0.05
    assert all(torch.equal(a, anchors[name]) for name, a in optimizer.anchors().items())


@kinds
def test_an_edit_of_a_weight_at_its_floor_is_refused_and_one_taken_back_is_none(kind: str) -> None:
    net = start("converged")
    optimizer = MAKERS[kind](net.named_parameters())
    train(net, optimizer, range(1))
    assert floored(optimizer) == 8
    kept = weights_of(net)
    with torch.no_grad():  # an average is swapped in for a test, and out
        for p in net.parameters():
            p.mul_(0.5)
        for name, p in net.named_parameters():
            p.copy_(kept[name])
    train(net, optimizer, range(1, 2))
    net = start("converged")
    optimizer = MAKERS[kind](net.named_parameters())
    train(net, optimizer, range(1))
    anchors = optimizer.anchors()
    with torch.no_grad():
        net.fc2.weight.clamp_(-0.01, 0.01)
    edited = weights_of(net)
    backward(net, 1)
    for act in (optimizer.step, optimizer.anchors, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"fc2\.weight: the weight was edited while its radius is at the floor"):
            act()
    assert all(torch.equal(p, edited[name]) for name, p in net.named_parameters())
    optimizer.set_anchors(anchors)
    with pytest.warns(UserWarning, match=r"first step returns weights to their anchors.*fc2\.weight"):
        optimizer.step()
    assert torch.equal(net.fc2.weight, anchors["fc2.weight"])


@kinds
def test_an_edit_off_the_floor_is_followed(kind: str) -> None:
    net = start()
    optimizer = MAKERS[kind](net.named_parameters(), lr=1e-3)
    train(net, optimizer, range(8))
    assert not record_of(optimizer, net.fc1.weight)[FLOORED]
    with torch.no_grad():
        net.fc1.weight.mul_(0.999)
    train(net, optimizer, range(8, 12))
    assert optimizer.radii()["fc1.weight"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_an_edit_of_16_bit_weights_reaches_the_master(dtype: torch.dtype) -> None:
    net = start().to(dtype)
    optimizer = FTPAdamW(net.named_parameters(), lr=0.0, radius=float("inf"))
    backward(net, 0)
    optimizer.step()
    master = optimizer.state[net.fc1.weight]["master"]
    with torch.no_grad():
        master.add_(1e-6)  # as steps leave it: between two numbers of the weight's type
        net.fc1.weight[0, 0] = 0.5
    optimizer.step()
    assert float(master[0, 0]) == 0.5
    assert float((master - net.fc1.weight.detach().float())[1:].abs().max()) > 0


def test_set_anchors_begins_a_task_anew() -> None:
    net = start()
    optimizer = FTPAdamW(net.named_parameters(), lr=1e-3)
    train(net, optimizer, range(10))
    after = weights_of(net)
    moments = optimizer.state[net.pos]["exp_avg"].clone()
    optimizer.set_anchors()
    assert all(torch.equal(a, after[name]) for name, a in optimizer.anchors().items())
    assert set(optimizer.radii().values()) == {0.0}
    assert torch.equal(optimizer.state[net.pos]["exp_avg"], moments)
    train(net, optimizer, range(10, 11))
    assert all(torch.equal(p, after[n]) for n, p in net.named_parameters() if not n.startswith("head"))
    train(net, optimizer, range(11, 20))
    assert max(optimizer.distances().values()) > 1e-3
    assert all(torch.equal(a, after[name]) for name, a in optimizer.anchors().items())


# -- where anchors come from -------------------------------------------------------------------------------------------


def sources(folder: Path) -> dict[str, Any]:
    state = {f"module.{name}": value for name, value in start().state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    half = {name: value.half() for name, value in start().half().state_dict().items()}
    save_file(half, folder / "half.safetensors")
    return {
        "init": "init",
        "mapping": state,
        "file": folder / "weights.safetensors",
        "text": str(folder / "weights.safetensors"),
    }


@pytest.mark.parametrize("source", ["init", "mapping", "file", "text"])
def test_anchors_from_weights_mappings_and_files_are_the_same(source: str, tmp_path: Path) -> None:
    anchors = sources(tmp_path)[source]
    net = start()
    optimizer = FTPAdamW(net.named_parameters(), anchors=anchors)
    if isinstance(anchors, dict):
        for value in anchors.values():
            value.zero_()  # a copy was taken
    wanted = FTPAdamW(start().named_parameters()).fingerprints()
    assert optimizer.fingerprints() == wanted
    train(net, optimizer, range(5))
    other = start()
    o = FTPAdamW(other.named_parameters())
    train(other, o, range(5))
    assert same(net, other)


def test_a_file_is_read_by_slices_and_in_its_own_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources(tmp_path)
    from cl_kernels.subspace import _files

    asked: list[str] = []
    real = _files.safe_open

    class Watched:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = real(*args, **options)

        def __enter__(self) -> Any:
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> Any:
            return self.opened.keys()

        def get_slice(self, key: str) -> Any:
            asked.append(key)
            return self.opened.get_slice(key)

        def get_tensor(self, key: str) -> Any:
            return self.opened.get_tensor(key)

    monkeypatch.setattr(_files, "safe_open", Watched)
    net = start().half().float()
    optimizer = FTPAdamW(net.named_parameters(), anchors=tmp_path / "half.safetensors", anchor_dtype="auto")
    assert sorted(asked) == sorted(name for name, _ in net.named_parameters() if not name.startswith("head"))
    kinds_of = {held.slot.dtype for held in optimizer._held.values()}
    assert torch.float32 not in kinds_of
    train(net, optimizer, range(3))


def test_anchors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = dict(start().state_dict())
    cases: list[tuple[Any, type[Exception], str]] = [
        ({k: v for k, v in state.items() if k != "pos"}, SubspaceMismatchError, r"anchors: none for pos; exclude"),
        (state | {"pos": torch.zeros(1, 4, 9)}, ValueError, r"pos: .*\(1, 4, 8\), its anchor \(1, 4, 9\)"),
        (state | {"pos": torch.full((1, 4, 8), float("nan"))}, NonFiniteError, "NaN or infinity in pos"),
        (state | {"pos": torch.zeros(1, 4, 8, dtype=torch.int64)}, ValueError, "floating point"),
        (state | {"pos": [0.0]}, TypeError, r"anchors\['pos'\]: expected a Tensor or None, got list"),
        (3, TypeError, "anchors: expected 'init', a mapping of names to tensors, a path or None, got int"),
        (tmp_path / "nothing.safetensors", CheckpointError, "there is no such file"),
    ]
    torch.save(state, tmp_path / "pickle.safetensors")
    cases.append((tmp_path / "pickle.safetensors", CheckpointError, "refused: loading it could run code"))
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    cases.append((tmp_path / "damaged.safetensors", CheckpointError, "damaged"))
    net = start()
    optimizer = FTPAdamW(net.named_parameters())
    train(net, optimizer, range(3))
    before, radii = optimizer.anchors(), optimizer.radii()
    for anchors, error, words in cases:
        with pytest.raises(error, match=words):
            FTPAdamW(start().named_parameters(), anchors=anchors)
        with pytest.raises(error, match=words):
            optimizer.set_anchors(anchors)
        assert all(torch.equal(a, before[name]) for name, a in optimizer.anchors().items())
        assert optimizer.radii() == radii
    optimizer.set_anchors({"pos": torch.zeros(1, 4, 8)}, strict=False)
    assert not optimizer.anchors()["pos"].any()
    assert torch.equal(optimizer.anchors()["conv.weight"], before["conv.weight"])
    assert optimizer.radii()["conv.weight"] == radii["conv.weight"]


def test_a_zero_anchor_takes_no_memory_and_holds() -> None:
    adapter = nn.Linear(6, 4, bias=False)
    nn.init.zeros_(adapter.weight)
    optimizer = FTPAdamW(adapter.named_parameters(), lr=1e-2, anchors=None)
    full = copy.deepcopy(adapter)
    other = FTPAdamW(full.named_parameters(), lr=1e-2, anchors={"weight": torch.zeros(4, 6)})
    for i in range(12):
        grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
        for net, o in ((adapter, optimizer), (full, other)):
            net.weight.grad = grad - 1.0
            o.step()
    torch.testing.assert_close(adapter.weight, full.weight, rtol=0, atol=1e-6)
    assert optimizer.anchors() == {"weight": None}
    assert 0 < optimizer.distances()["weight"] <= optimizer.radii()["weight"] * 1.001
    saved = through_a_file(optimizer.state_dict(include_anchors=True))
    optimizer.load_state_dict(saved)
    assert optimizer.anchors() == {"weight": None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto", None])
def test_16_bit_anchors_are_exact_or_refused(dtype: Any) -> None:
    exact, rough = start().bfloat16().float(), start()
    if isinstance(dtype, torch.dtype):
        with pytest.raises(ValueError, match=rf"pos: anchor_dtype={dtype} does not hold .* 'auto' keeps"):
            FTPAdamW(rough.named_parameters(), anchor_dtype=dtype)
    else:
        held = FTPAdamW(rough.named_parameters(), anchor_dtype=dtype)._held.values()
        assert {h.slot.dtype for h in held} == {torch.float32}
    if dtype is torch.float16:
        return
    optimizer = FTPAdamW(exact.named_parameters(), anchor_dtype=dtype)
    plain = FTPAdamW(start().bfloat16().float().named_parameters())
    assert optimizer.fingerprints() == plain.fingerprints()
    assert {h.slot.dtype for h in optimizer._held.values()} == {torch.float32 if dtype is None else torch.bfloat16}


@pytest.mark.parametrize("value", [torch.int32, "half", 16])
def test_anchor_dtypes_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="anchor_dtype"):
        FTPAdamW(start().named_parameters(), anchor_dtype=value)


def test_fingerprints_tell_anchors_apart() -> None:
    base = start()
    prints = FTPAdamW(base.named_parameters()).fingerprints()
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints.values())
    assert len(set(prints.values())) == len(prints)
    for change in (lambda w: w.view(-1)[1:].view(-1)[0].add_(1e-7), lambda w: w.copy_(w.flip(0))):
        other = start()
        with torch.no_grad():
            change(other.conv.weight)
        assert FTPAdamW(other.named_parameters()).fingerprints()["conv.weight"] != prints["conv.weight"]
    large = torch.randn(3000, 700)  # more than one block of the hash
    from cl_kernels.optim._anchors import checksum

    whole = int(checksum(large))
    parts = int(checksum(large[:1000])) + int(checksum(large[1000:], 1000 * 700))
    assert (whole - parts) % (1 << 64) == 0


def test_frozen_parameters_are_anchored_when_they_first_train() -> None:
    net = start()
    net.fc1.weight.requires_grad_(False)
    optimizer = FTPSGD(net.named_parameters(), lr=1e-3)
    assert "fc1.weight" not in optimizer.anchors()
    train(net, optimizer, range(3))
    net.fc1.weight.requires_grad_(True)
    at = net.fc1.weight.detach().clone()
    train(net, optimizer, range(3, 9))
    assert torch.equal(optimizer.anchors()["fc1.weight"], at)
    assert not torch.equal(net.fc1.weight, at)
    assert float(optimizer.state[net.fc1.weight]["step"]) == 6
    assert float(record_of(optimizer, net.fc1.weight)[GAMMA]) > 0
