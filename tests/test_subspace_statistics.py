"""Covariances as values: shrinkage, rounded rows, merging, files, and what a collection pass costs in memory."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cl_kernels import CheckpointError, NonFiniteError, SubspaceMismatchError, rules
from cl_kernels.subspace import (
    Covariance,
    CovarianceCollector,
    PromptCovariance,
    _files,
    build_store,
    load_covariances,
    save_covariances,
)

F64 = torch.float64


def rows_of(n: int, d: int, seed: int = 0, shift: float = 0.5) -> Tensor:
    """Rows with unequal directions, heavy tails and a mean."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=F64) * torch.linspace(0.3, 2, d, dtype=F64)
    return x * (1 + torch.rand(n, 1, generator=g, dtype=F64)) + shift


def gathered(x: Tensor, splits: int = 1, **options: Any) -> Covariance:
    collector = CovarianceCollector(**options)
    for part in x.chunk(splits):
        collector.update("x", part)
    (found,) = collector.covariances().values()
    return found


# ---------------------------------------------------------------------------------------------------- shrinkage
SIZES = [(7, 20), (20, 7), (400, 30), (3, 3), (2, 5), (50, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("method", ["oas", "ledoit-wolf"])
def test_shrinkage_is_that_of_scikit_learn(method: str, centred: bool, size: tuple[int, int]) -> None:
    peers = pytest.importorskip("sklearn.covariance")
    x = rows_of(*size)
    found = gathered(x, 3, centred=centred, shrinkage="ledoit-wolf")
    kind = peers.OAS if method == "oas" else peers.LedoitWolf
    peer = kind(assume_centered=not centred, store_precision=False).fit(x.numpy())
    assert found.shrinkage(method) == pytest.approx(peer.shrinkage_, abs=1e-10)
    shrunk = found.shrunk(method)
    expected = torch.from_numpy(peer.covariance_)
    assert (shrunk.matrix / shrunk.count - expected).norm() <= 1e-10 * expected.norm()
    assert shrunk.matrix.trace() == pytest.approx(float(found.matrix.trace()), rel=1e-12)
    assert (shrunk.count, shrunk.rows, shrunk.centred) == (found.count, found.rows, centred)


def test_fourth_moments_of_far_means_and_merged_parts() -> None:
    """Centring expands sum |x - m|^4 from sums about 0; merging in any order gives what one pass gives."""
    x = rows_of(60, 6, shift=30.0)
    whole = gathered(x, centred=True, shrinkage="ledoit-wolf")
    parts = [gathered(part, centred=True, shrinkage="ledoit-wolf") for part in (x[:10], x[10:11], x[11:])]
    merged = parts[2].merge(parts[0]).merge(parts[1])
    centred = x - x.mean(0)
    fourth = float(centred.square().sum(1).square().sum())
    for found in (whole, merged):
        assert found._fourth() == pytest.approx(fourth, rel=1e-8)
        assert (found.matrix - centred.mT @ centred).norm() <= 1e-10 * found.matrix.norm()
        assert found.shrinkage("ledoit-wolf") == pytest.approx(whole.shrinkage("ledoit-wolf"), rel=1e-7)


def test_hooks_gather_fourth_moments_of_every_dtype() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(5, 2, 3, 3)
    for dtype in (torch.float32, F64):
        with CovarianceCollector(model, "all", dtype=dtype, shrinkage="ledoit-wolf") as collector:
            model(x)
        found = collector.covariances()
        patches = nn.functional.unfold(x, 2).mT.flatten(0, 1).double()
        inner = model[:2](x).detach().double()
        for name, rows in (("0.weight", patches), ("2.weight", inner)):
            assert found[name].quartic.fourth == pytest.approx(float(rows.square().sum(1).square().sum()), rel=1e-9)
            assert torch.allclose(found[name].quartic.cubic, (rows.square().sum(1) @ rows), rtol=1e-9)
    sixteen = gathered(x.flatten(1).bfloat16(), shrinkage="ledoit-wolf")
    exact = x.flatten(1).bfloat16().double()
    assert sixteen.quartic.fourth == pytest.approx(float(exact.square().sum(1).square().sum()), rel=1e-12)


def test_shrinkage_needs_what_it_needs() -> None:
    plain = gathered(rows_of(9, 4))
    with pytest.raises(ValueError, match=r"shrinkage=\"ledoit-wolf\""):
        plain.shrunk("ledoit-wolf")
    with pytest.raises(ValueError, match="method"):
        plain.shrunk("oracle")
    with pytest.raises(ValueError, match="rows"):
        Covariance(plain.matrix, plain.count, plain.mean).shrunk()
    assert plain.shrunk().quartic is None
    model = nn.Linear(3, 3)
    for options in ({"weighting": "batches"}, {"what": "prompt"}):
        with pytest.raises(ValueError, match="ledoit-wolf"):
            CovarianceCollector(model, shrinkage="ledoit-wolf", **options)
    with pytest.raises(ValueError, match="shrinkage"):
        CovarianceCollector(model, shrinkage="lw")
    both = PromptCovariance(plain, gathered(rows_of(9, 3))).shrunk()
    assert torch.equal(both.left.matrix, plain.shrunk().matrix)
    zero = Covariance(torch.zeros(3, 3, dtype=F64), 5.0, torch.zeros(3, dtype=F64), 5)
    assert not zero.shrunk().matrix.any()


def test_shrinkage_protects_what_few_rows_never_showed() -> None:
    """F29: 12 rows in 40 dimensions leave 28 directions of no energy, which a threshold takes for free ones."""
    d = 40
    x = torch.randn(12, d, dtype=F64, generator=torch.Generator().manual_seed(1))
    x[:, :2] *= 2
    found = gathered(x)
    rule = rules.RatioToLargest(0.02)
    few = build_store({"a": found}, rules.Rank(2)).report()[0]
    with pytest.warns(UserWarning, match="rows are few.*shrink"):
        plain = build_store({"a": found}, rule)
    assert plain.report()[0]["rank"] == 12
    with pytest.warns(UserWarning, match="nothing|all 40|few"):
        shrunk = build_store({"a": found.shrunk()}, rule)
    assert shrunk.report()[0]["rank"] == d
    again = build_store({"a": found.shrunk()}, rules.Rank(2))
    assert few["rank"] == again.report()[0]["rank"] == 2
    both = build_store({"a": found}, rules.Rank(2))["a"].matrix()
    assert (again["a"].matrix() - both).norm() <= 1e-10, "eigenvectors do not turn"


# ---------------------------------------------------------------------------------------------------- merging
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=2, max_size=5),
    d=st.integers(1, 6),
    centred=st.booleans(),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_tasks_merge_in_any_order(sizes: list[int], d: int, centred: bool, order: Any, seed: int) -> None:
    """F26: matrix, mean, counts and fourth moments, whatever the order, are those of one pass over everything."""
    x = rows_of(sum(sizes) + 2, d, seed)
    parts = [part for part in x.split([*sizes, 2]) if len(part)]
    tasks = [gathered(part, centred=centred, shrinkage="ledoit-wolf") for part in parts]
    order.shuffle(tasks)
    merged = tasks[0]
    for task in tasks[1:]:
        merged = merged.merge(task)
    whole = gathered(x, centred=centred, shrinkage="ledoit-wolf")
    scale = float(x.square().sum())
    assert (merged.matrix - whole.matrix).norm() <= 1e-12 * scale
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    assert (merged.count, merged.rows) == (whole.count, whole.rows)
    assert merged.quartic.fourth == pytest.approx(whole.quartic.fourth, rel=1e-12)


def test_centred_and_uncentred_do_not_merge() -> None:
    x = rows_of(5, 3)
    with pytest.raises(SubspaceMismatchError, match="centred"):
        gathered(x).merge(gathered(x, centred=True))
    assert gathered(x, shrinkage="ledoit-wolf").merge(gathered(x)).quartic is None


def test_reading_copies_nothing_and_collecting_on_changes_nothing_read() -> None:
    x = rows_of(6, 4)
    collector = CovarianceCollector(shrinkage="ledoit-wolf")
    collector.update("x", x)
    first, second = collector.covariances()["x"], collector.covariances()["x"]
    assert first.matrix.data_ptr() == second.matrix.data_ptr()
    kept = first.matrix.clone(), first.mean.clone(), first.quartic.cubic.clone()
    collector.update("x", 2 * x)
    for before, now in zip(kept, (first.matrix, first.mean, first.quartic.cubic), strict=True):
        assert torch.equal(before, now)
    assert torch.allclose(collector.covariances()["x"].matrix, 5 * first.matrix)


# ---------------------------------------------------------------------------------------------------- rounded rows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_rows_keep_the_matrix_positive(dtype: torch.dtype) -> None:
    """performance.md 2.5: noise of 3e-5 of the largest eigenvalue in bfloat16 at 12608 rows, 1.1e-4 at these 4000, and
    no eigenvalue below zero."""
    torch.manual_seed(0)
    d = 96
    turn = torch.linalg.qr(torch.randn(d, d, dtype=F64)).Q
    scales = torch.logspace(0, -3, d, dtype=F64)  # eigenvalues fall by 1e-6
    x = ((torch.randn(4000, d, dtype=F64) * scales) @ turn).float()
    exact, rounded = gathered(x), gathered(x, row_dtype=dtype)
    top = float(torch.linalg.eigvalsh(exact.matrix)[-1])
    error = float(torch.linalg.matrix_norm(rounded.matrix - exact.matrix, 2)) / top
    assert 1e-7 < error < (2e-4 if dtype == torch.bfloat16 else 2e-5)
    assert float(torch.linalg.eigvalsh(rounded.matrix)[0]) > -1e-9 * top
    assert torch.equal(rounded.matrix, rounded.matrix.mT)
    wanted = x.to(dtype).double()
    assert (rounded.matrix - wanted.mT @ wanted).norm() <= 1e-5 * exact.matrix.norm()
    assert torch.equal(gathered(x.to(dtype), row_dtype=dtype).matrix, gathered(x.to(dtype)).matrix), "narrow already"


def test_rounded_rows_of_prompts_and_gradients() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    from cl_kernels.nn import PromptedViT

    backbone = timm.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    model, x = PromptedViT(backbone, prompts=2), torch.randn(3, 3, 16, 16)
    pairs = []
    for row_dtype in (None, torch.bfloat16):
        with CovarianceCollector(model, what="prompt", row_dtype=row_dtype) as collector:
            model(x)
        pairs.append(collector.covariances()["prompts.0"])
    error = (pairs[0].right.matrix - pairs[1].right.matrix).norm() / pairs[0].right.matrix.norm()
    assert 1e-5 < error < 1e-2
    assert torch.equal(pairs[0].left.matrix, pairs[1].left.matrix), "softmax columns are left alone"
    layer = nn.Linear(4, 4)
    with CovarianceCollector(layer, what="output_grad", row_dtype=torch.bfloat16) as collector:
        layer(torch.randn(8, 4)).square().sum().backward()
    assert float(torch.linalg.eigvalsh(collector.covariances()["weight"].matrix)[0]) > -1e-9
    with pytest.raises(ValueError, match="row_dtype"):
        CovarianceCollector(layer, row_dtype=torch.float32)


def test_overflow_of_rounded_rows_is_named() -> None:
    with pytest.raises(NonFiniteError, match=r"x: .*batch 0"):
        gathered(torch.full((3, 2), 1e6), row_dtype=torch.float16)


# ---------------------------------------------------------------------------------------------------- memory
class Peak:
    """The largest resident size of this process while the block runs, above that at its start, in MB."""

    def __enter__(self) -> Peak:
        self.start = self.most = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, _resident())
            time.sleep(1e-4)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.megabytes = (max(self.most, _resident()) - self.start) / 2**20


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(768, 1), (64, 197, 768), {}),
    "linear wide": (lambda: nn.Linear(3072, 1), (16, 197, 3072), {"dtype": torch.float32}),
    "skipped tokens": (lambda: nn.Linear(768, 1), (64, 197, 768), {"skip_tokens": 1}),
    "sampled tokens": (lambda: nn.Linear(768, 1), (128, 197, 768), {"token_rate": 0.9}),
    "rounded": (lambda: nn.Linear(768, 1), (64, 197, 768), {"row_dtype": torch.bfloat16}),
    "fourth moments": (lambda: nn.Linear(768, 1), (64, 197, 768), {"shrinkage": "ledoit-wolf"}),
    "convolution": (lambda: nn.Conv2d(32, 1, 3, padding=1), (16, 32, 112, 112), {}),
    "one large image": (lambda: nn.Conv2d(64, 1, 3, padding=1), (1, 64, 224, 224), {}),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the resident size from /proc")
@pytest.mark.parametrize("case", CASES)
def test_a_collection_pass_needs_its_state_and_64_megabytes(case: str) -> None:
    """ViT-B-like inputs of 39 MB and more, and patches of up to 230 MB; reading counts too."""
    build, shape, options = CASES[case]
    module, x = build(), torch.randn(*shape)
    with torch.no_grad():
        module(x)  # whatever the forward pass itself needs is there already
        CovarianceCollector(module, "all", **options).update("warm", x[..., :8].reshape(-1, 8)[:64])
        with CovarianceCollector(module, "all", **options) as collector, Peak() as peak:
            collector._on_input(collector._layers[0])(module, (x,), {})
            collector._on_input(collector._layers[0])(module, (x,), {})
            found = collector.covariances()
    assert found["weight"].rows > 0
    assert peak.megabytes <= collector.nbytes / 2**20 + 64


# ---------------------------------------------------------------------------------------------------- files
def saved() -> dict[str, Covariance | PromptCovariance]:
    return {
        "blocks.0.attn.qkv.weight": gathered(rows_of(9, 4)),
        "deep/er.weight": gathered(rows_of(9, 3), centred=True, dtype=torch.float32),
        "prompts.1": PromptCovariance(gathered(rows_of(5, 2)), gathered(rows_of(5, 6, 1))),
        "whole": gathered(rows_of(4, 2), shrinkage="ledoit-wolf"),
    }


def same(a: Covariance, b: Covariance) -> bool:
    numbers = (a.count, a.rows, a.centred) == (b.count, b.rows, b.centred)
    tensors = torch.equal(a.matrix, b.matrix) and torch.equal(a.mean, b.mean) and a.matrix.dtype == b.matrix.dtype
    if a.quartic is None or b.quartic is None:
        return numbers and tensors and a.quartic is b.quartic
    return (
        numbers and tensors and a.quartic.fourth == b.quartic.fourth and torch.equal(a.quartic.cubic, b.quartic.cubic)
    )


def test_covariances_survive_files(tmp_path: Path) -> None:
    """A run resumes, and tasks collected elsewhere merge as if collected here."""
    path = tmp_path / "c.safetensors"
    save_covariances(path, saved())
    loaded = load_covariances(path)
    assert list(loaded) == list(saved())
    for name, value in saved().items():
        other = loaded[name]
        if isinstance(value, PromptCovariance):
            assert isinstance(other, PromptCovariance)
            assert same(other.left, value.left)
            assert same(other.right, value.right)
        else:
            assert isinstance(other, Covariance)
            assert same(other, value)
            merged = other.merge(value)
            assert torch.allclose(merged.matrix, 2 * value.matrix)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.safetensors"]
    save_covariances(path, {})
    assert load_covariances(path) == {}


def test_what_is_no_covariance_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_covariances(path, {"a": gathered(rows_of(9, 2))})
    before = path.read_bytes()
    good = gathered(rows_of(9, 2))
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({"../a": good}, ValueError, "name"),
        ({"a": good.matrix}, TypeError, "Tensor"),
        ({"a": Covariance(good.matrix * float("nan"), 1.0, good.mean)}, NonFiniteError, r"a \(whole\)"),
        ({"a": Covariance(good.matrix, math.inf, good.mean)}, NonFiniteError, r"a \(whole\)"),
        ({"a": Covariance(good.matrix.triu(), 1.0, good.mean)}, SubspaceMismatchError, "not symmetric"),
        ({"a": Covariance(good.matrix[:1], 1.0, good.mean)}, SubspaceMismatchError, r"\(1, 2\)"),
        ({"a": Covariance(good.matrix, 1.0, good.mean[:1])}, SubspaceMismatchError, "mean"),
        ({"a": Covariance(good.matrix.bfloat16(), 1.0, good.mean)}, SubspaceMismatchError, "bfloat16"),
    ]
    for value, error, message in wrong:
        with pytest.raises(error, match=message):
            save_covariances(path, value)
    assert path.read_bytes() == before


DAMAGED = {
    "missing field": lambda t: t.pop("a/whole/mean"),
    "extra field": lambda t: t.update({"a/whole/colour": torch.zeros(1)}),
    "half a quartic": lambda t: t.update({"a/whole/fourth": torch.zeros(1)}),
    "another part": lambda t: t.update({k.replace("whole", "middle"): t.pop(k) for k in list(t)}),
    "one side": lambda t: t.update({k.replace("whole", "left"): t.pop(k) for k in list(t)}),
    "unlisted": lambda t: t.update({k.replace("a/", "b/"): v.clone() for k, v in list(t.items())}),
    "short key": lambda t: t.update({"matrix": torch.zeros(1)}),
    "unsafe name": lambda t: t.update({f"../{k}": t.pop(k) for k in list(t)}),
    "NaN": lambda t: t["a/whole/matrix"].fill_(float("nan")),
    "skew": lambda t: t["a/whole/matrix"].triu_(),
    "shape": lambda t: t.update({"a/whole/matrix": t["a/whole/matrix"][:2].clone()}),
    "dtype": lambda t: t.update({"a/whole/matrix": t["a/whole/matrix"].long()}),
    "mean": lambda t: t.update({"a/whole/mean": t["a/whole/mean"][:2].clone()}),
    "count": lambda t: t["a/whole/count"].fill_(-1.0),
    "vector of counts": lambda t: t.update({"a/whole/rows": torch.ones(2, dtype=torch.int64)}),
    "endless rows": lambda t: t.update({"a/whole/rows": torch.tensor(float("inf"))}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_contents_are_refused(kind: str, tmp_path: Path) -> None:
    """F60 and F61."""
    path = tmp_path / "c.safetensors"
    save_covariances(path, {"a": gathered(rows_of(9, 3))})
    tensors = load_file(path)
    header = {"format": "cl_kernels.covariances", "format_version": "1", "names": '["a"]'}
    save_file(tensors, path, header)
    assert list(load_covariances(path)) == ["a"], "the damage below is what is refused"
    DAMAGED[kind](tensors)
    if kind == "unsafe name":
        header["names"] = json.dumps(["../a"])
    save_file(tensors, path, header)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: its contents") as caught:
        load_covariances(path)
    assert caught.value.__cause__ is not None


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """F60, F61, F63, F64: stores, newer versions, pickles, cut files; a link is replaced and not followed."""
    path = tmp_path / "c"
    save_covariances(path, {"a": gathered(rows_of(9, 3))})
    whole = path.read_bytes()
    build_store({"a": gathered(rows_of(90, 3))}, rules.Rank(1)).save(tmp_path / "store")
    _files.save_tensors(tmp_path / "newer", load_file(path), kind="cl_kernels.covariances", version=2, metadata={})
    (tmp_path / "short").write_bytes(whole[:-5])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    for name in ("store", "newer", "short", "empty", "pickle", "absent"):
        with pytest.raises(CheckpointError, match=name):
            load_covariances(tmp_path / name)
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(outside)
    save_covariances(tmp_path / "link", {"a": gathered(rows_of(9, 3))})
    assert outside.read_bytes() == b"precious"
    assert list(load_covariances(tmp_path / "link")) == ["a"]
