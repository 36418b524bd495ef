"""CovarianceCollector: what it sums, under which names, and what it survives."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cl_kernels import NonFiniteError, SubspaceMismatchError
from cl_kernels.subspace import CovarianceCollector, _rows


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.drop = nn.Dropout(dropout)
        self.second = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.norm(self.first(x)).relu()))


def hidden(model: Net, x: Tensor) -> Tensor:
    return model.norm(model.first(x)).relu()


def rows(x: Tensor) -> Tensor:
    return x.detach().double().flatten(0, -2)


def gram(x: Tensor) -> Tensor:
    return rows(x).mT @ rows(x)


def close(a: Tensor, b: Tensor, bound: float = 1e-6) -> bool:
    return bool((a.double() - b.double()).norm() <= bound * b.double().norm() + 1e-30)


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------------------------------------------- what is summed
@pytest.mark.parametrize("weighting", ["rows", "batches"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_linear_inputs(dtype: torch.dtype, weighting: str) -> None:
    model = Net()
    batches = [data(4, 6, 5, seed=1), data(4, 6, 5, seed=2), data(2, 6, 5, seed=3)]
    with CovarianceCollector(model, dtype=dtype, weighting=weighting) as collector, torch.no_grad():
        for x in batches:
            model(x)
    found = collector.covariances()
    assert list(found) == ["first.weight", "second.weight"]
    for name, inputs in (("first.weight", batches), ("second.weight", [hidden(model, x) for x in batches])):
        scale = [1.0 if weighting == "rows" else 1 / len(rows(x)) for x in inputs]
        expected = sum(s * gram(x) for s, x in zip(scale, inputs, strict=True))
        total = sum(s * rows(x).sum(0) for s, x in zip(scale, inputs, strict=True))
        count = 60 if weighting == "rows" else 3
        assert found[name].matrix.dtype == dtype
        assert close(found[name].matrix, expected)
        assert torch.equal(found[name].matrix, found[name].matrix.mT)
        assert found[name].count == pytest.approx(count)
        assert found[name].rows == 60
        assert close(found[name].mean, total / count, 1e-5)
    assert collector.counts() == pytest.approx({"first.weight": count, "second.weight": count})


def test_rows_do_not_depend_on_the_batch_split() -> None:
    model, x = Net().double(), data(12, 5).double()
    results = []
    for sizes in ([12], [5, 7], [1] * 12):
        with CovarianceCollector(model) as collector, torch.no_grad():
            for part in x.split(sizes):
                model(part)
        results.append(collector.covariances()["second.weight"])
    for result in results[1:]:
        assert close(result.matrix, results[0].matrix, 1e-13)
        assert close(result.mean, results[0].mean, 1e-12)


def test_centring() -> None:
    model = Net().double()
    x = data(40, 5).double() + 3
    with CovarianceCollector(model, ["first"], centred=True) as collector:
        model(x[:10])
        model(x[10:])
    found = collector.covariances()["first.weight"]
    assert close(found.matrix, 39 * torch.cov(x.mT), 1e-12)
    assert close(found.mean, x.mean(0), 1e-12)


CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 8, 7)),
    "stride, padding, dilation": (
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (2, 3, 8, 7),
    ),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    "same": (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=2), (2, 2, 9, 8)),
    "valid": (nn.Conv2d(2, 3, 3, padding="valid"), (2, 2, 5, 5)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
    "patches": (nn.Conv2d(3, 8, 4, stride=4), (2, 3, 8, 12)),
    "no batch": (nn.Conv2d(3, 4, 3), (3, 8, 7)),
    "1d": (nn.Conv1d(3, 4, 5, padding=2, stride=2), (2, 3, 11)),
    "1d same": (nn.Conv1d(4, 6, 4, padding="same", groups=2), (2, 4, 11)),
    "3d": (nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(1, 1, 2)), (2, 2, 5, 6, 5)),
    "3d circular groups": (nn.Conv3d(4, 6, 2, padding=1, padding_mode="circular", groups=2), (1, 4, 3, 4, 3)),
    "channels last": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 6)),
}


@pytest.mark.parametrize("weighting", ["rows", "batches"])
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_inputs_are_unfolded(
    layer: tuple[nn.Conv2d, tuple[int, ...]], pieces: bool, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quadratic form of the moments is the energy of the convolution's output, for any weight."""
    module, shape = layer[0].double(), layer[1]
    if pieces:
        monkeypatch.setattr(_rows, "WORKSPACE_BYTES", 1)
    x = data(*shape).double()
    if module is CONVOLUTIONS["channels last"][0]:
        x = x.to(memory_format=torch.channels_last)
    with CovarianceCollector(module, "conv", weighting=weighting) as collector:
        out = module(x)
    found = collector.covariances()["weight"]
    weight = module.weight.detach().flatten(1)
    energy = torch.einsum("od,de,oe->", weight, found.matrix, weight)
    bias = module.bias.detach().reshape(-1, *[1] * (out.ndim - 1 if shape == (3, 8, 7) else out.ndim - 2))
    rows_of_each = out.numel() / len(weight)
    if module.groups == 1:
        assert found.rows == rows_of_each
        expected = (out.detach() - bias).square().sum()
    else:  # the patches of every group are rows for every output channel
        assert found.rows == rows_of_each * module.groups
        dense = type(module)(module.in_channels // module.groups, len(weight), **convolution_options(module)).double()
        dense.weight.data.copy_(module.weight)
        parts = [dense(part) for part in x.chunk(module.groups, dim=1)]
        expected = sum((part.detach()).square().sum() for part in parts)
    scale = found.rows if weighting == "batches" else 1
    assert float(energy) * scale == pytest.approx(float(expected), rel=1e-10)


def convolution_options(module: nn.Conv2d) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {"bias": False, **{name: getattr(module, name) for name in names}}


def test_output_gradients() -> None:
    model, x = Net(), data(4, 6, 5)
    outputs: dict[str, Tensor] = {}
    handle = model.first.register_forward_hook(lambda _, args, out: outputs.__setitem__("first", out))
    with CovarianceCollector(model, what="output_grad") as collector:
        for _ in range(2):
            out = model(x)
            gradient = torch.autograd.grad(out.square().sum(), [outputs["first"], out], retain_graph=True)
            collector.reset()
            out.square().sum().backward()
        with torch.no_grad():
            model(x)
        late = model(x)
    handle.remove()
    late.square().sum().backward()  # the block is closed: this one must not count
    found = collector.covariances()
    assert close(found["first.weight"].matrix, gram(gradient[0]))
    assert close(found["second.weight"].matrix, gram(gradient[1]))
    convolution = nn.Conv2d(2, 3, 2)
    with CovarianceCollector(convolution, "all", what="output_grad") as collector:
        out = convolution(data(2, 2, 4, 4))
        out.square().sum().backward()
    assert close(collector.covariances()["weight"].matrix, gram(2 * out.movedim(1, -1)))


@pytest.mark.parametrize("skip", [2, -3])
def test_skipped_tokens(skip: int) -> None:
    model, x = Net(), data(4, 6, 5)
    with CovarianceCollector(model, ["first"], skip_tokens=skip) as collector:
        model(x)
        model(x[0, :1])  # two dimensions: rows, not tokens
    kept = x[:, 2:] if skip > 0 else x[:, :-3]
    assert close(collector.covariances()["first.weight"].matrix, gram(kept) + gram(x[0, :1]))


def test_sampled_tokens() -> None:
    model, x = Net(), data(50, 40, 5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        with CovarianceCollector(model, ["first"], token_rate=0.25, seed=seed, weighting="batches") as collector:
            model(x)
        found.append(collector.covariances()["first.weight"])
    assert torch.equal(torch.get_rng_state(), before), "sampling drew from the global generator"
    assert found[0].rows == 500
    assert torch.equal(found[0].matrix, found[1].matrix)
    assert not torch.equal(found[0].matrix, found[2].matrix)
    assert 1e-6 < (found[0].matrix - gram(x) / 2000).norm() / (gram(x) / 2000).norm() < 0.2
    with CovarianceCollector(nn.Conv2d(1, 1, 2), "conv", token_rate=0.5) as collector:
        collector._model(data(3, 1, 5, 5))
    assert collector.covariances()["weight"].rows == 24
    collector = CovarianceCollector(token_rate=0.3)
    for count in (1, 2, 5, 10):  # never none of a batch
        collector.update("x", data(count, 3))
    assert collector.covariances()["x"].rows == 1 + 1 + 2 + 3


def test_sampling_in_pieces_uses_the_same_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that goes through in pieces of 3 rows: 28 of 40 rows, each at most once, weighed as one batch."""
    monkeypatch.setattr(_rows, "WORKSPACE_BYTES", 3 * 40 * 4)
    for weighting, scale in (("rows", 1), ("batches", 28)):
        collector = CovarianceCollector(token_rate=0.7, weighting=weighting)
        collector.update("x", torch.eye(40))
        found = collector.covariances()["x"]
        assert found.rows == 28
        assert sorted((found.matrix.diagonal() * scale).round().tolist()) == [0] * 12 + [1] * 28


def test_direct_update() -> None:
    collector = CovarianceCollector()
    x = data(3, 4, 6)
    collector.update("attention.map", x)
    collector.update("attention.map", x[0])
    collector.update("empty", x[:0])
    with pytest.warns(UserWarning, match="empty"):
        found = collector.covariances()
    assert list(found) == ["attention.map"]
    assert close(found["attention.map"].matrix, gram(x) + gram(x[:1]))
    with pytest.raises(SubspaceMismatchError, match="width 6, got 5"):
        collector.update("attention.map", data(2, 5))
    for wrong, got in ((torch.ones(3, 3, dtype=torch.int64), "int64"), (torch.eye(3).to_sparse(), "sparse_coo")):
        with pytest.raises(ValueError, match=f"x: expected a dense tensor .*{got}"):
            collector.update("other", wrong)
    assert list(collector.counts()) == ["attention.map"]
    with pytest.warns(UserWarning, match="1 layers"):
        collector.covariances()
    with pytest.raises(ValueError, match="name"):
        collector.update("../x", x)
    with pytest.raises(ValueError, match="model"):
        collector.__enter__()
    collector.reset()
    with pytest.warns(UserWarning, match="2 layers"):
        assert collector.covariances() == {}


# ---------------------------------------------------------------------------------------------------- names
def test_targets() -> None:
    model = nn.ModuleDict({"a": Net(), "b": Net(), "c": nn.Conv2d(1, 1, 1)})
    names = {
        "linear": ["a.first.weight", "a.second.weight", "b.first.weight", "b.second.weight"],
        "conv": ["c.weight"],
        "all": ["a.first.weight", "a.second.weight", "b.first.weight", "b.second.weight", "c.weight"],
    }
    for targets, expected in names.items():
        assert list(CovarianceCollector(model, targets)._tally.plans) == expected
    assert list(CovarianceCollector(model, ["*.second"])._tally.plans) == ["a.second.weight", "b.second.weight"]
    assert list(CovarianceCollector(model, ["b.first.weight", "c"])._tally.plans) == ["b.first.weight", "c.weight"]
    chosen = CovarianceCollector(model, lambda name, module: isinstance(module, nn.Linear) and module.out_features == 3)
    assert list(chosen._tally.plans) == ["a.second.weight", "b.second.weight"]
    with pytest.raises(SubspaceMismatchError, match=r"'a\.frist'.*a\.first"):
        CovarianceCollector(model, ["a.frist"])
    with pytest.raises(SubspaceMismatchError, match="norm"):
        CovarianceCollector(model, ["a.norm"])
    with pytest.raises(ValueError, match="targets"):
        CovarianceCollector(model, "linears")


def test_shared_weights_and_repeated_calls_are_summed() -> None:
    """F28: a module called twice counts twice; modules with one weight share its first name."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    x = data(6, 4)
    with CovarianceCollector(model) as collector:
        out = model(x)
    found = collector.covariances()
    assert list(found) == ["0.weight"]
    assert close(found["0.weight"].matrix, gram(x) + gram(model[0](x)))
    layer = nn.Linear(4, 4)
    twice = nn.Sequential(layer, layer)
    with CovarianceCollector(twice) as collector:
        twice(x)
    assert close(collector.covariances()["0.weight"].matrix, gram(x) + gram(layer(x)))
    assert out.shape == (6, 4)


def test_layers_that_nothing_reached_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    with CovarianceCollector(model) as collector:
        model["used"](data(2, 3))
    with pytest.warns(UserWarning, match=r"unused\.weight"):
        assert list(collector.covariances()) == ["used.weight"]


def test_inputs_may_be_written_over_after_the_call() -> None:
    """Why each hook adds its rows at once: nothing is kept for a grouped launch later."""

    class Reusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            buffer = x.clone()
            out = self.fc(buffer)
            buffer.zero_()
            return out

    model, x = Reusing(), data(4, 5)
    with CovarianceCollector(model) as collector, torch.no_grad():
        model(x)
    assert close(collector.covariances()["fc.weight"].matrix, gram(x))


def test_keyword_inputs_count() -> None:
    layer = nn.Linear(3, 3)
    with CovarianceCollector(layer) as collector:
        layer(input=data(2, 3))
    assert collector.covariances()["weight"].rows == 2


# ---------------------------------------------------------------------------------------------------- contexts
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", ["input", "output_grad"])
def test_activation_checkpointing_counts_once(what: str, reentrant: bool) -> None:
    """F28: the recomputation in backward is no second look at the data."""
    model, x = Net(), data(8, 5).requires_grad_()

    def collected(run: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        with CovarianceCollector(model, what=what) as collector:
            run(x).square().sum().backward()
            run(x).sum().backward()
        return collector.covariances()

    plain = collected(model)
    recomputed = collected(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    nested = collected(
        lambda x: checkpoint(lambda y: checkpoint(model, y, use_reentrant=reentrant), x, use_reentrant=reentrant)
    )
    for other in (recomputed, nested):
        assert {name: c.rows for name, c in other.items()} == {"first.weight": 16, "second.weight": 16}
        for name in plain:
            assert close(other[name].matrix, plain[name].matrix)


def test_a_backward_of_the_users_own_is_no_recomputation() -> None:
    model, x = Net(), data(8, 5)

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            with torch.enable_grad():
                model(x)
            return grad

    with CovarianceCollector(model) as collector:
        Own.apply(data(3).requires_grad_()).sum().backward()
    assert collector.covariances()["first.weight"].rows == 8


def test_a_script_in_a_folder_of_checkpoints_is_no_recomputation() -> None:
    model, x = Net(), data(8, 5)
    scope: dict[str, Any] = {}
    source = "def backward(model, x):\n    model(x).sum().backward()\n"
    exec(compile(source, os.path.join("checkpoints", "train.py"), "exec"), scope)
    with CovarianceCollector(model) as collector:
        scope["backward"](model, x)
    assert collector.covariances()["first.weight"].rows == 8


@pytest.mark.parametrize("context", ["plain", "no_grad", "inference_mode", "autocast"])
def test_contexts(context: str) -> None:
    model, x = Net(), data(64, 5)
    managers: dict[str, Callable[[], Any]] = {
        "plain": warnings.catch_warnings,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    with CovarianceCollector(model) as collector:
        with managers[context]():
            model(x)
        model(x)
    found = collector.covariances()
    assert close(found["first.weight"].matrix, 2 * gram(x), 1e-6)
    assert close(found["second.weight"].matrix, 2 * gram(hidden(model, x)), 1e-2 if context == "autocast" else 1e-6)
    assert not found["first.weight"].matrix.is_inference()


def test_half_precision_inputs() -> None:
    """F6: squares of 300 overflow in fp16; the sums do not."""
    layer = nn.Linear(4, 4).half()
    x = 300 * data(8, 4).half()
    with CovarianceCollector(layer, dtype=torch.float32) as collector, torch.no_grad():
        layer(x)
    assert close(collector.covariances()["weight"].matrix, gram(x))


def test_hooks_are_always_removed() -> None:
    """F27."""
    model = Net()
    collector = CovarianceCollector(model)

    def interrupted() -> None:
        with collector:
            model(data(2, 5))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert hooks(model) == 0
    model(data(2, 5))
    assert collector.covariances()["first.weight"].rows == 2
    with collector:
        assert hooks(model) == 2
        with pytest.raises(RuntimeError, match="open already"):
            collector.__enter__()
        assert hooks(model) == 2
        model(data(3, 5))
    assert hooks(model) == 0
    assert collector.covariances()["first.weight"].rows == 5


def test_a_hook_that_fails_to_attach_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(dropout=0.5)
    monkeypatch.setattr(model.second, "register_forward_pre_hook", None)
    with pytest.raises(TypeError), CovarianceCollector(model, eval_mode=True):
        pass
    assert hooks(model) == 0
    assert model.training


def test_wrappers_that_hooks_cannot_see_through_are_refused() -> None:
    """F28."""
    with pytest.raises(ValueError, match="it is DataParallel"):
        CovarianceCollector(nn.DataParallel(Net()))
    with pytest.raises(ValueError, match="'0' is DataParallel"):
        CovarianceCollector(nn.Sequential(nn.DataParallel(Net())))
    flattened = type("FullyShardedDataParallel", (nn.Sequential,), {})
    with pytest.raises(ValueError, match=r"fully_shard \(FSDP2\)"):
        CovarianceCollector(flattened(Net()))


def test_training_mode_with_dropout_warns() -> None:
    """F30."""
    model = Net(dropout=0.5)
    model.norm.eval()
    with pytest.warns(UserWarning, match=r"training mode \(drop\)"), CovarianceCollector(model):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with CovarianceCollector(model, eval_mode=True):
            assert not any(module.training for module in model.modules())
        with CovarianceCollector(Net()), CovarianceCollector(Net(dropout=0.5).eval()):
            pass
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    normed = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=r"training mode \(0\)"), CovarianceCollector(normed):
        pass
    with (
        pytest.warns(UserWarning, match="training mode"),
        CovarianceCollector(nn.MultiheadAttention(4, 2, dropout=0.1)),
    ):
        pass


# ---------------------------------------------------------------------------------------------------- refusals
def test_too_large_state_is_refused_before_it_is_allocated() -> None:
    """F31."""
    model = nn.Sequential(nn.Linear(10, 300), nn.Linear(300, 20), nn.Linear(20, 2))
    needed = 8 * sum(d * d + d for d in (10, 300, 20))
    assert CovarianceCollector(model, max_bytes=needed).nbytes == needed
    with pytest.raises(ValueError, match=rf"{needed:,} bytes.*largest layers: 1\.weight.*device=\"cpu\".*targets="):
        CovarianceCollector(model, max_bytes=needed - 1)
    assert CovarianceCollector(model, max_bytes=needed // 2, dtype=torch.float32).nbytes == needed // 2
    huge = nn.Linear(1 << 20, 1, device="meta")  # 8 TB of sums
    with pytest.raises(ValueError, match="max_bytes"):
        CovarianceCollector(huge, max_bytes=1 << 30)
    direct = CovarianceCollector(max_bytes=100)
    with pytest.raises(ValueError, match="wide"):
        direct.update("wide", data(1, 10))
    assert direct.nbytes == 0
    direct.update("narrow", data(1, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_inputs_are_named(bad: float) -> None:
    """F9: layer and batch; the batches before it were fine."""
    model = Net()
    with CovarianceCollector(model) as collector, torch.no_grad():
        for batch in range(5):
            x = data(4, 5)
            if batch in (2, 4):
                x[1, 3] = bad
            model(x)
    with pytest.raises(NonFiniteError, match=r"first\.weight.*batch 2 .*of 5 seen"):
        collector.covariances()


def test_an_overflow_of_the_sum_is_named() -> None:
    collector = CovarianceCollector(dtype=torch.float32)
    collector.update("big", torch.full((4, 2), 1e25))
    with pytest.raises(NonFiniteError, match=r"big.*overflow"):
        collector.covariances()


class Synchronisations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"weighting": "batches"}, {"token_rate": 0.5}], ids=str)
def test_a_batch_waits_for_nothing(options: dict[str, Any]) -> None:
    model = Net()
    with CovarianceCollector(model, **options) as collector, torch.no_grad(), Synchronisations() as mode:
        model(data(4, 5))
        assert mode.seen == []
        collector.covariances()
        assert mode.seen, "the mode sees nothing"


def test_bad_options_are_refused() -> None:
    model = Net()
    for options in (
        {"what": "outputs"},
        {"weighting": "sum"},
        {"dtype": torch.float16},
        {"token_rate": 0.0},
        {"token_rate": 1.5},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            CovarianceCollector(model, **options)
    with pytest.raises(ValueError, match="PromptedViT"):
        CovarianceCollector(model, what="prompt")


# ---------------------------------------------------------------------------------------------------- devices
@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("device", [None, "cpu"])
def test_on_a_gpu(gpu: torch.device, device: str | None) -> None:
    model, x = Net().to(gpu), data(64, 5)
    with CovarianceCollector(model, device=device) as collector, torch.no_grad():
        model(x.to(gpu))
    found = collector.covariances()["first.weight"]
    assert found.matrix.device.type == (device or "cuda")
    assert close(found.matrix.cpu(), gram(x))
