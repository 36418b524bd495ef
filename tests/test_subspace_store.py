"""SubspaceStore: names, soundness, merging, files."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_kernels import CheckpointError, NonFiniteError, Projector, Sides, SubspaceError, SubspaceMismatchError
from cl_kernels.subspace import SubspaceStore, _files


def basis(d: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=generator)).Q.to(dtype)


def blended(v: Tensor, mix: float = 1.0, normalized: bool = False, thin: str = "protected") -> Projector:
    """mix * Q / (||Q||_F or 1) + (1 - mix) I with Q = I - V V^T, on either basis."""
    d, r = v.shape
    size = mix / math.sqrt(d - r) if normalized else mix
    if thin == "protected":
        return Projector(v, size + 1 - mix, size)
    return Projector(torch.linalg.qr(v, mode="complete").Q[:, r:], 1 - mix, -size)


def example() -> SubspaceStore:
    store = SubspaceStore({"blocks.0.attn.qkv.weight": Projector(basis(6, 2))})
    store["prompts.1"] = Sides(blended(basis(4, 1), 0.97, True), blended(basis(8, 5, dtype=torch.float32), 0.97, True))
    store["head.weight"] = Sides(left=Projector(basis(3, 1)))
    store["dense"] = Projector.from_dense(Projector(basis(5, 2)).matrix())
    store.put("noted", Projector(basis(5, 0)), right_energy=0.9, right_condition=1e4)
    return store


def same(a: SubspaceStore, b: SubspaceStore) -> bool:
    return list(a) == list(b) and all(a.fingerprint(name) == b.fingerprint(name) for name in a)


# ---------------------------------------------------------------------------------------------------- mapping
def test_mapping() -> None:
    store = example()
    assert list(store) == ["blocks.0.attn.qkv.weight", "prompts.1", "head.weight", "dense", "noted"]
    assert isinstance(store["blocks.0.attn.qkv.weight"], Projector)
    assert isinstance(store["prompts.1"], Sides)
    assert store.sides("blocks.0.attn.qkv.weight").left is None
    assert store["head.weight"].right is None
    assert store.get("absent") is None
    with pytest.raises(KeyError, match="absent"):
        store["absent"]
    version = store.version
    del store["dense"]
    assert "dense" not in store
    assert store.version > version


def test_wrapper_prefixes_are_stripped() -> None:
    store = SubspaceStore({"module._orig_mod.blocks.0.weight": Projector(basis(3, 1))})
    assert list(store) == ["blocks.0.weight"]
    assert "module.blocks.0.weight" in store
    assert store["module.blocks.0.weight"] is store["blocks.0.weight"]
    assert store.fingerprint("module.blocks.0.weight") == store.fingerprint("blocks.0.weight")


@pytest.mark.parametrize("name", ["../weight", "/etc/passwd", "a/../b", "", "a b", "ünïcode", "a\n", "x" * 513])
def test_unsafe_names_are_refused(name: str) -> None:
    store = example()
    before = store.version
    with pytest.raises(ValueError, match="name"):
        store[name] = Projector(basis(3, 1))
    assert store.version == before
    assert same(store, example())


def test_what_is_no_projector_is_refused() -> None:
    store = SubspaceStore()
    good = basis(6, 2, dtype=torch.float32)
    with pytest.raises(SubspaceError, match=r"layer \(right\).*2\.00.*e-01"):
        store["layer"] = Projector(good * math.sqrt(1.2))
    with pytest.raises(SubspaceError, match="not orthonormal"):
        store["layer"] = Sides(Projector(torch.cat((good, good), 1)), None)
    with pytest.raises(NonFiniteError, match="2 entries"):
        store["layer"] = Projector(good.clone().index_fill_(0, torch.tensor(0), float("nan")))
    with pytest.raises(NonFiniteError, match="layer"):
        store["layer"] = Projector(good, float("inf"))
    with pytest.raises(SubspaceError, match="more columns"):
        store["layer"] = Projector(torch.eye(2, 3))
    with pytest.raises(SubspaceError, match=r"P - P\^T"):
        store["layer"] = Projector.from_dense(torch.tensor([[1.0, 0.1], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="two-dimensional"):
        store["layer"] = Projector(torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match="neither"):
        store["layer"] = Sides()
    with pytest.raises(TypeError, match="Projector"):
        store["layer"] = torch.eye(3)
    with pytest.raises(TypeError, match="name"):
        store[3] = Projector(good)
    assert len(store) == 0
    assert store.version == 0


def test_zero_padding_is_no_error() -> None:
    padded = torch.cat((basis(6, 2), torch.zeros(6, 3, dtype=torch.float64)), 1)
    store = SubspaceStore({"a": Projector(padded)})
    assert store.report()[0]["rank"] == 2
    assert store.capacity() == {"a": pytest.approx(4 / 6)}


def test_report_and_capacity() -> None:
    rows = {(row["layer"], row["side"]): row for row in example().report()}
    assert rows["blocks.0.attn.qkv.weight", "right"]["rank"] == 2
    assert rows["prompts.1", "left"]["rank"] == 1
    assert rows["prompts.1", "right"]["rank"] == 5
    assert rows["prompts.1", "right"]["dimension"] == 8
    assert rows["dense", "right"]["rank"] is None
    assert rows["noted", "right"]["energy"] == 0.9
    assert rows["noted", "right"]["condition"] == 1e4
    assert rows["prompts.1", "right"]["energy"] is None
    assert all(row["orthogonality_error"] < 1e-6 for row in rows.values())
    assert rows["prompts.1", "right"]["orthogonality_error"] > 0
    shares = example().capacity()
    assert list(shares.values()) == pytest.approx([4 / 6, 3 / 4 * 3 / 8, 2 / 3, 3 / 5, 1])
    dense = Projector.from_dense(0.1 * Projector(basis(8, 5)).matrix())
    free = SubspaceStore({"a": blended(basis(8, 5), 0.97, True, thin="free"), "b": dense})
    assert free.capacity() == pytest.approx({"a": 3 / 8, "b": 3 / 8})
    assert [row["rank"] for row in free.report()] == [5, None]


def test_room_that_is_used_and_left() -> None:
    """Spans of coordinates: task 1 uses 3 of 12, task 2 adds 2 of which one is new, task 3 adds nothing."""
    eye = torch.eye(12, dtype=torch.float64)

    def task(*columns: int, normalized: bool = False) -> SubspaceStore:
        return SubspaceStore({"a": blended(eye[:, list(columns)], 1.0, normalized)})

    def row(store: SubspaceStore) -> tuple[float, float | None, float | None]:
        (found,) = store.report()
        return found["used"], found["added"], found["tasks_left"]

    for normalized in (False, True):
        store = SubspaceStore()
        store.merge(task(0, 1, 2, normalized=normalized))
        assert row(store) == (0.25, 3, 3)
        store.merge(task(2, 3, normalized=normalized))
        assert row(store) == (pytest.approx(4 / 12), 1, 8)
        store.merge(task(0, 3, normalized=normalized))
        assert row(store) == (pytest.approx(4 / 12), 0, math.inf)
        store.merge(task(*range(4, 9), normalized=normalized))
        assert row(store) == (0.75, 5, 0)
        assert store.capacity() == {"a": 0.25}
    store.replace(task(*range(7)))  # a rule that cuts anew may give directions back
    assert row(store) == (pytest.approx(7 / 12), -2, math.inf)
    store.replace(task(*range(9)))
    assert row(store) == (0.75, 2, 1)
    half = SubspaceStore({"a": Sides(None, Projector(eye[:, :3])), "b": Sides(Projector(eye[:, :2]), None)})
    half.merge({"a": Sides(Projector(eye[:2, :1]), None)})
    assert [(r["layer"], r["side"], r["added"], r["tasks_left"]) for r in half.report()] == [
        ("a", "left", 1, 1),
        ("a", "right", 0, math.inf),
        ("b", "left", 2, 5),
    ]
    with pytest.warns(UserWarning, match="all 12"):
        store.merge(task(9, 10, 11))
    assert row(store) == (1, 3, 0)


def test_room_of_dense_projectors() -> None:
    """A soft edge is counted by its participation ratio; one of a projection with rank 5 of 8 counts 5."""
    hard = Projector.from_dense(Projector(basis(8, 5)).matrix())
    (row,) = SubspaceStore({"a": hard}).report()
    assert (row["used"], row["added"], row["tasks_left"]) == (pytest.approx(5 / 8), pytest.approx(5), 0)
    store = SubspaceStore({"a": Projector.from_dense(Projector(basis(8, 2)).matrix())})
    store["a"] = Projector.from_dense(Projector(basis(8, 4)).matrix())
    (row,) = store.report()
    assert (row["added"], row["tasks_left"]) == (pytest.approx(2), 2)
    store["a"] = Projector.from_dense(Projector(basis(8, 4)).matrix())
    assert store.report()[0]["tasks_left"] == math.inf


def test_replacing_takes_what_is_known_and_refuses_other_sizes() -> None:
    fresh = SubspaceStore()
    fresh.put("a", Projector(basis(6, 3)), right_energy=0.8, right_condition=50.0)
    fresh.put("new", Projector(basis(4, 1)), right_energy=0.5)
    store = SubspaceStore({"a": Projector(basis(6, 2)), "kept": Projector(basis(3, 1))})
    store.replace(fresh)
    rows = {row["layer"]: row for row in store.report()}
    assert list(rows) == ["a", "kept", "new"]
    assert (rows["a"]["energy"], rows["a"]["condition"], rows["a"]["added"]) == (0.8, 50.0, 1)
    assert (rows["new"]["energy"], rows["new"]["added"]) == (0.5, 1)
    before = store.version
    with pytest.raises(SubspaceMismatchError, match=r"kept \(right\).*dimension 3 by one of 4"):
        store.replace(SubspaceStore({"a": Projector(basis(6, 1)), "kept": Projector(basis(4, 1))}))
    assert store.version == before
    merged = SubspaceStore({"a": Projector(basis(6, 2))})
    merged.merge(fresh)
    assert [row["energy"] for row in merged.report()] == [None, 0.5]


@pytest.mark.parametrize("bad", [Projector(2 * basis(4, 2)), Sides(None, None), Projector(basis(4, 2) * float("nan"))])
def test_a_merge_that_fails_at_a_later_name_changes_nothing(bad: Projector | Sides) -> None:
    store = SubspaceStore({"a": Projector(basis(6, 1))})
    before, version = store.fingerprint("a"), store.version
    with pytest.raises((SubspaceError, NonFiniteError, ValueError), match="b"):
        store.merge({"a": Projector(basis(6, 2, seed=5)), "b": bad})
    assert (store.version, list(store), store.fingerprint("a")) == (version, ["a"], before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_notes_are_numbers(value: float) -> None:
    store = SubspaceStore()
    with pytest.raises(NonFiniteError, match="right/energy"):
        store.put("a", Projector(basis(6, 3)), right_energy=value)
    assert not store


def test_what_the_last_task_added_survives_files(tmp_path: Path) -> None:
    store = SubspaceStore({"a": Projector(basis(6, 1))})
    store["a"] = Projector(basis(6, 3))
    store.save(tmp_path / "s")
    loaded = SubspaceStore.load(tmp_path / "s")
    assert loaded.report() == store.report()
    assert loaded.report()[0]["added"] == 2
    assert store.clone().to(torch.float32).report()[0]["added"] == 2
    old = {key: tensor for key, tensor in store.state_dict().items() if not key.endswith("added")}
    loaded.load_state_dict(old)
    assert (loaded.report()[0]["added"], loaded.report()[0]["tasks_left"]) == (None, None)


def test_fingerprints_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    computed: list[bytes] = []
    plain = hashlib.blake2b

    def counted(data: bytes, **options: int) -> object:
        computed.append(data)
        return plain(data, **options)

    monkeypatch.setattr(hashlib, "blake2b", counted)
    store = example()
    first = {name: store.fingerprint(name) for name in store}
    assert len(computed) == 5
    assert {name: store.fingerprint(name) for name in store} == first
    assert len(computed) == 5
    store["dense"] = store["dense"]
    assert store.fingerprint("dense") == first["dense"]
    assert len(computed) == 6
    store["noted"] = Projector(basis(5, 1))
    assert store.fingerprint("noted") != first["noted"]
    store["head.weight"].left.basis.mul_(-1)
    assert store.fingerprint("head.weight") != first["head.weight"], "written to in place"
    del store["dense"]
    store["dense"] = Projector(basis(5, 2))
    assert store.fingerprint("dense") != first["dense"]
    store.to(torch.float32)
    assert store.fingerprint("prompts.1") != first["prompts.1"]
    with torch.inference_mode():
        store["inferred"] = Projector(basis(5, 2))
    before = store.fingerprint("inferred")
    with torch.inference_mode():
        store["inferred"].basis.mul_(-1)
    assert store.fingerprint("inferred") != before


def test_fingerprint_follows_the_content() -> None:
    store, other = example(), example()
    assert same(store, other)
    other["prompts.1"] = Sides(*other["prompts.1"])
    assert same(store, other)
    changes = {
        "basis": Projector(basis(6, 2, seed=1)),
        "rank": Projector(basis(6, 3)),
        "scale": Projector(basis(6, 2), 0.5),
        "side": Sides(left=Projector(basis(6, 2))),
        "dtype": Projector(basis(6, 2, dtype=torch.float32)),
    }
    seen = {store.fingerprint("blocks.0.attn.qkv.weight")}
    for change in changes.values():
        store["blocks.0.attn.qkv.weight"] = change
        seen.add(store.fingerprint("blocks.0.attn.qkv.weight"))
    assert len(seen) == 1 + len(changes)
    assert len(store.fingerprint("dense")) == 32


def test_to_and_clone() -> None:
    store = example()
    version = store.version
    copy = store.clone()
    assert same(store, copy)
    assert copy.report() == store.report()
    assert store.to(torch.float32) is store
    assert store.version > version
    assert {p.basis.dtype for name in store for p in store.sides(name) if p is not None} == {torch.float32}
    assert copy["blocks.0.attn.qkv.weight"].basis.dtype == torch.float64
    copy["blocks.0.attn.qkv.weight"].basis.zero_()
    assert store["blocks.0.attn.qkv.weight"].basis.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------- merging
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    d=st.integers(3, 12),
    ranks=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)),
    shared=st.integers(0, 2),
    mix=st.sampled_from([1.0, 0.97]),
    normalized=st.booleans(),
    thin=st.sampled_from(["protected", "free"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 999),
)
def test_merging_protects_the_sum_of_spans_in_any_order(
    d: int,
    ranks: tuple[int, int, int],
    shared: int,
    mix: float,
    normalized: bool,
    thin: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    common = basis(d, min(shared, d - 1), seed + 1)
    spans = [torch.linalg.qr(torch.cat((common, basis(d, min(r, d), seed + 2 + i)), 1)).Q for i, r in enumerate(ranks)]
    total = torch.cat(spans, 1)
    rank = int(torch.linalg.matrix_rank(total, atol=1e-6))
    if rank == d:
        return  # the next test
    stores = [SubspaceStore({"a": blended(v, mix, normalized, thin).to(dtype)}) for v in spans]
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    matrices = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        merged = SubspaceStore()
        for index in order:
            merged.merge(stores[index])
        assert merged["a"].basis.dtype == dtype
        assert merged.capacity()["a"] == pytest.approx((d - rank) / d)
        assert merged["a"].rank <= d / 2 + 1
        matrices.append(merged["a"].matrix().double())
    for matrix in matrices[1:]:
        assert (matrix - matrices[0]).norm() <= tolerance * d
    left = torch.linalg.svd(total, full_matrices=False)[0][:, :rank] if rank else total[:, :0]
    expected = blended(left, mix, normalized).matrix()
    assert (matrices[0] - expected).norm() <= tolerance * d


def test_merging_until_nothing_is_free() -> None:
    """F24: freeze warns once, raise stops, relax gives a direction back."""

    def half(low: bool, mix: float = 1.0, normalized: bool = False) -> SubspaceStore:
        eye = torch.eye(6, dtype=torch.float64)
        return SubspaceStore({"layer": blended(eye[:, :4] if low else eye[:, 3:], mix, normalized)})

    store = half(True)
    with pytest.warns(UserWarning, match=r"layer \(right\): all 6 directions") as caught:
        store.merge(half(False))
    assert len(caught) == 1
    assert not store["layer"].matrix().any()
    assert store.capacity()["layer"] == 0
    assert store.report()[0]["rank"] == 6
    with pytest.warns(UserWarning, match="all 6 directions"):
        store.merge(half(True))  # a frozen layer stays frozen
    assert not store["layer"].matrix().any()
    with pytest.raises(SubspaceError, match=r"layer.*nothing is left"):
        half(True).merge(half(False), on_full="raise")
    relaxed = half(True)
    relaxed.merge(half(False), on_full="relax")
    assert relaxed.report()[0]["rank"] == 5
    with pytest.raises(ValueError, match="on_full"):
        half(True).merge(half(False), on_full="ignore")
    mixed = half(True, 0.9, True)
    with pytest.warns(UserWarning, match="all 6"):
        mixed.merge(half(False, 0.9, True))
    assert torch.allclose(mixed["layer"].matrix(), 0.1 * torch.eye(6, dtype=torch.float64))


def test_merging_takes_new_layers_and_sides() -> None:
    store = SubspaceStore({"a": Projector(basis(4, 1)), "b": Sides(left=Projector(basis(3, 1)))})
    store.merge({"b": Projector(basis(5, 2)), "c": Projector(basis(2, 1))})
    assert list(store) == ["a", "b", "c"]
    assert store["b"].left.rank == 1
    assert store["b"].right.rank == 2


def test_a_multiple_of_the_identity_protects_nothing() -> None:
    """The matched-step control is c I with span 0; (1 - mix) I of a full space has an empty free basis, span -mix."""
    empty = torch.zeros(6, 0, dtype=torch.float64)
    store = SubspaceStore(
        {"scaled": Projector(empty, 0.3, 0.0), "full": Projector(empty, 0.3, -0.7), "off": Projector(empty, 0.0, 0.0)}
    )
    assert [row["rank"] for row in store.report()] == [0, 6, 6]
    assert list(store.capacity().values()) == [1, 0, 0]
    assert [row["rank"] for row in store.clone().report()] == [0, 6, 6]
    with pytest.raises(SubspaceError, match="form"):
        store.merge({"scaled": Projector(basis(6, 1))})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (Projector(basis(5, 1)), SubspaceMismatchError, "dimension 5"),
        (Projector.from_dense(Projector(basis(4, 1)).matrix()), SubspaceError, "dense"),
        (blended(basis(4, 1), 0.9), SubspaceError, "mix"),
        (blended(basis(4, 1), 1.0, True), SubspaceError, "normalisation"),
        (Projector(basis(4, 1), 0.3, 0.2), SubspaceError, "form"),
    ],
)
def test_unlike_projectors_are_not_merged(value: Projector, error: type[Exception], message: str) -> None:
    store = SubspaceStore({"z": Projector(basis(4, 1)), "a": Projector(basis(4, 2))})
    before = {name: store.fingerprint(name) for name in store}
    with pytest.raises(error, match=message):
        store.merge({"z": Projector(basis(4, 2)), "a": value})
    assert {name: store.fingerprint(name) for name in store} == before


# ---------------------------------------------------------------------------------------------------- state and files
def test_state_dict_round_trip() -> None:
    store, other = example(), SubspaceStore()
    state = store.state_dict()
    assert all(isinstance(tensor, Tensor) for tensor in state.values())
    other.load_state_dict(state)
    assert same(store, other)
    assert other.report() == store.report()
    other.load_state_dict(state)
    changed = SubspaceStore({"prompts.1": Projector(basis(8, 1)), "extra": Projector(basis(2, 1))})
    with pytest.raises(SubspaceMismatchError, match=r"extra.*strict=False"):
        other.load_state_dict(changed.state_dict())
    assert same(store, other)
    other.load_state_dict(changed.state_dict(), strict=False)
    assert set(other) == {*store, "extra"}
    assert other.fingerprint("prompts.1") == changed.fingerprint("prompts.1")
    for bad in ("prompts.1", "a/right/color", "a/up/basis"):
        with pytest.raises(SubspaceMismatchError, match=bad):
            SubspaceStore().load_state_dict({bad: torch.zeros(2, 2)})
    with pytest.raises(SubspaceMismatchError, match="lacks identity, span"):
        SubspaceStore().load_state_dict({"a/right/basis": basis(2, 1)})


def test_file_round_trip(tmp_path: Path) -> None:
    store = example()
    store.provenance["task"] = "3"
    path = tmp_path / "store.safetensors"
    store.save(path)
    loaded = SubspaceStore.load(path)
    assert same(store, loaded)
    assert loaded.report() == store.report()
    assert loaded.provenance == {"task": "3"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["store.safetensors"]
    store.save(str(path))


def test_views_are_saved_and_ties_are_written_once(tmp_path: Path) -> None:
    """F62."""
    shared = basis(40, 3)
    projector = Projector(basis(40, 40)[:, ::7])  # not contiguous
    store = SubspaceStore({"q": Projector(shared), "k": Projector(shared), "v": projector})
    path = tmp_path / "s.safetensors"
    store.save(path)
    assert same(store, SubspaceStore.load(path))
    assert sorted(key for key in load_file(path) if key.endswith("basis")) == ["q/right/basis", "v/right/basis"]
    SubspaceStore().save(path)
    assert len(SubspaceStore.load(path)) == 0


def damaged(whole: bytes) -> dict[str, bytes]:
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    tensors = {key: value for key, value in header.items() if key != "__metadata__"}
    name = next(iter(tensors))

    def remake(edited: dict[str, object], body: bytes = whole[8 + length :]) -> bytes:
        text = json.dumps(edited).encode()
        return len(text).to_bytes(8, "little") + text + body

    meta = header["__metadata__"]
    without_span = {key: value for key, value in header.items() if not key.endswith("prompts.1/left/span")}
    return {
        "empty": b"",
        "short": whole[:5],
        "truncated header": whole[: 8 + length // 2],
        "truncated body": whole[:-3],
        "random": os.urandom(64),
        "huge header": (1 << 62).to_bytes(8, "little") + whole[8:],
        "no json": whole[:8] + b"x" * length + whole[8 + length :],
        "wrong json": remake({name: [1, 2]}),
        "foreign": remake(tensors),
        "other format": remake({**header, "__metadata__": {**meta, "format": "pt"}}),
        "newer": remake({**header, "__metadata__": {**meta, "format_version": "3"}}),
        "no version": remake({**header, "__metadata__": {k: v for k, v in meta.items() if k != "format_version"}}),
        "word for version": remake({**header, "__metadata__": {**meta, "format_version": "one"}}),
        "ties to nowhere": remake({**header, "__metadata__": {**meta, "ties": '{"a/right/basis": "b/right/basis"}'}}),
        "ties of another kind": remake({**header, "__metadata__": {**meta, "ties": "[1]"}}),
        "no ties": remake({**header, "__metadata__": {k: v for k, v in meta.items() if k != "ties"}}),
        "missing key": remake(without_span),
        "names of others": remake({**header, "__metadata__": {**meta, "names": '["x"]'}}),
        "fewer names": remake({**header, "__metadata__": {**meta, "names": json.dumps(json.loads(meta["names"])[1:])}}),
        "nested names": remake({**header, "__metadata__": {**meta, "names": "[" * 100_000}}),
        "nested ties": remake({**header, "__metadata__": {**meta, "ties": "[" * 100_000}}),
        "text": b"hello, this is a text file",
    }


DAMAGE = [
    *(
        "empty",
        "short",
        "truncated header",
        "truncated body",
        "random",
        "huge header",
        "no json",
        "wrong json",
        "foreign",
    ),
    *("other format", "newer", "no version", "word for version", "ties to nowhere", "ties of another kind", "no ties"),
    *("missing key", "names of others", "fewer names", "nested names", "nested ties", "text"),
]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_and_foreign_files_are_refused(kind: str, tmp_path: Path) -> None:
    """F60 and F61."""
    path = tmp_path / "store.safetensors"
    example().save(path)
    path.write_bytes(damaged(path.read_bytes())[kind])
    with pytest.raises(CheckpointError, match=r"store\.safetensors"):
        SubspaceStore.load(path)


@pytest.mark.parametrize(
    "what", ["not orthonormal", "NaN", "shape", "dtype", "name", "key", "scales", "NaN energy", "infinite growth"]
)
def test_contents_of_another_kind_are_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    SubspaceStore({"a": Projector(basis(4, 2))}).save(path)
    tensors = load_file(path)
    good = tensors.pop("a/right/basis")
    replacement = {
        "not orthonormal": ("a/right/basis", good * 2),
        "NaN": ("a/right/basis", good * float("nan")),
        "shape": ("a/right/basis", good.flatten()),
        "dtype": ("a/right/basis", good.to(torch.int64)),
        "name": ("../a/right/basis", good),
        "key": ("a/right/colour", good),
        "scales": ("a/right/identity", torch.ones(2)),
        "NaN energy": ("a/right/energy", torch.tensor(float("nan"))),
        "infinite growth": ("a/right/added", torch.tensor(float("inf"))),
    }[what]
    if not replacement[0].endswith(("basis", "colour")):
        tensors["a/right/basis"] = good
    header = {
        "format": "cl_kernels.subspace",
        "format_version": "1",
        "ties": "{}",
        "names": '["a"]',
        "provenance": "{}",
    }
    save_file({**tensors, replacement[0]: replacement[1]}, path, header)
    with pytest.raises(CheckpointError, match="subspace store") as caught:
        SubspaceStore.load(path)
    assert caught.value.__cause__ is not None


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    """F63: by magic bytes; nothing is executed."""
    evil = tmp_path / "evil.pkl"
    trap = tmp_path / "trap"
    evil.write_bytes(pickle.dumps(_Trap(str(trap))))
    zipped = tmp_path / "evil.pt"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Trap(str(trap))))
    for path, what in ((evil, "a pickle"), (zipped, "zip")):
        with pytest.raises(CheckpointError, match=what):
            SubspaceStore.load(path)
    assert not trap.exists()
    with pytest.raises(CheckpointError, match="no such file"):
        SubspaceStore.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="directory"):
        SubspaceStore.load(tmp_path)


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (self.path, "w"))


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    """A header of 0x80 bytes begins with a pickle's magic byte."""
    path = tmp_path / "s.safetensors"
    store = SubspaceStore()
    for padding in range(0, 264, 8):  # safetensors pads its header to a multiple of 8 bytes
        store.provenance["x"] = "y" * padding
        path.write_bytes(b"")
        store.save(path)
        if path.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no header of that length")
    assert SubspaceStore.load(path).provenance == store.provenance


# ---------------------------------------------------------------------------------------------------- atomic writes
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F65 and F41: an error between any two steps leaves the old bytes and no temporary file."""
    path = tmp_path / "s.safetensors"
    example().save(path)
    old = path.read_bytes()
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, _full_disk)
            with pytest.raises(OSError, match="No space left"):
                SubspaceStore().save(path)
        assert path.read_bytes() == old
        assert [entry.name for entry in tmp_path.iterdir()] == ["s.safetensors"]
    with pytest.raises(OSError, match="absent"):
        example().save(tmp_path / "absent" / "s.safetensors")


def in_child(work: Callable[[], None]) -> int | None:
    """Exit code of `work` in a forked process, negative for the signal that killed it."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


def _full_disk(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """The same with a real limit on the size of files."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "s"
    _files.write_atomically(path, b"old")

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            _files.write_atomically(path, bytes(100000))
        except OSError:
            os._exit(7)

    assert in_child(write) == 7
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_temporary_files_of_the_dead_are_swept(tmp_path: Path) -> None:
    """F41: what kill -9 left is ignored by readers and removed by the next writer; others' files are left alone."""
    path = tmp_path / "s"
    _files.write_atomically(path, b"old")

    def write() -> None:
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
        _files.write_atomically(path, b"half")

    assert in_child(write) == -signal.SIGKILL
    left = [entry.name for entry in tmp_path.iterdir() if entry.name != "s"]
    assert len(left) == 1
    assert path.read_bytes() == b"old"
    keep = [f".s.{os.getppid()}-abc.tmp", ".other.1-abc.tmp", ".s.notes.tmp", "s.tmp"]
    for name in (*keep, f".s.{os.getpid()}-abc.tmp"):  # the last one of a killed process that had our number
        (tmp_path / name).write_bytes(b"")
    _files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["s", *keep])


def test_two_writers_of_one_process_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fsync = tmp_path / "s", os.fsync

    def interrupted(handle: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        _files.write_atomically(path, b"inner")
        assert path.read_bytes() == b"inner"

    monkeypatch.setattr(os, "fsync", interrupted)
    _files.write_atomically(path, b"outer")
    assert path.read_bytes() == b"outer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """F64: writing to a link inside the directory does not write outside it."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (tmp_path / "in").mkdir()
    link = tmp_path / "in" / "s"
    link.symlink_to(outside)
    _files.write_atomically(link, b"new")
    assert outside.read_bytes() == b"precious"
    assert link.read_bytes() == b"new"
    assert not link.is_symlink()
