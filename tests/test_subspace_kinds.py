"""CovarianceCollector: which layers it can watch, which it refuses and why, and models that are wrapped or compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_kernels import SubspaceMismatchError
from cl_kernels.nn import PromptedViT
from cl_kernels.subspace import CovarianceCollector


def gram(x: Tensor) -> Tensor:
    rows = x.detach().double().flatten(0, -2)
    return rows.mT @ rows


def close(a: Tensor, b: Tensor, bound: float = 1e-6) -> bool:
    return bool((a.double() - b.double()).norm() <= bound * b.double().norm() + 1e-30)


def collected(model: nn.Module, run: Callable[[], Any], targets: Any = "linear", **options: Any) -> dict[str, Any]:
    with CovarianceCollector(model, targets, **options) as collector:
        run()
    return collector.covariances()


# ---------------------------------------------------------------------------------------------------- attention
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"attn_mask": torch.full((6, 6), float("-inf")).triu(1), "is_causal": True},
    "padded": {"key_padding_mask": torch.arange(6) > torch.tensor([[5], [3], [4]])},
    "weights": {"need_weights": True},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_of_torch(batch_first: bool, options: dict[str, Any], mask: str) -> None:
    """Rows of the output projection are those that give the module's output, for any weight and mask."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).eval()
    module.out_proj.weight.data.normal_()
    x = torch.randn(3, 6, 8) if batch_first else torch.randn(6, 3, 8)
    outputs: list[Tensor] = []
    call = {"need_weights": False, **MASKS[mask]}
    found = collected(module, lambda: outputs.append(module(x, x, x, **call)[0].detach()))
    assert list(found) == ["in_proj_weight", "out_proj.weight"]
    assert close(found["in_proj_weight"].matrix, gram(x))
    assert found["out_proj.weight"].rows == 18
    bias = 0 if module.out_proj.bias is None else module.out_proj.bias.detach()
    weight = module.out_proj.weight.detach().double()
    assert close(weight @ found["out_proj.weight"].matrix @ weight.mT, gram(outputs[0] - bias))


def test_cross_attention_and_separate_weights() -> None:
    """One weight for three inputs sees each distinct one once; three weights see one each."""
    q, k, v = torch.randn(2, 4, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    joint = nn.MultiheadAttention(8, 2, batch_first=True)
    found = collected(joint, lambda: joint(q, k, key_padding_mask=None, value=v))
    assert close(found["in_proj_weight"].matrix, gram(q) + gram(k) + gram(v))
    assert found["in_proj_weight"].rows == 28
    assert close(collected(joint, lambda: joint(q, k, k))["in_proj_weight"].matrix, gram(q) + gram(k))
    assert close(collected(joint, lambda: joint(q, q[:], q.view(2, 4, 8)))["in_proj_weight"].matrix, gram(q))
    apart = nn.MultiheadAttention(8, 2, kdim=3, vdim=5, batch_first=True)
    k, v = torch.randn(2, 5, 3), torch.randn(2, 5, 5)
    found = collected(apart, lambda: apart(q, k, v))
    assert list(found) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert close(found[f"{name}_proj_weight"].matrix, gram(x))
    assert found["out_proj.weight"].rows == 8


@pytest.mark.parametrize("nested", [False, True])
def test_transformer_layers_of_torch(nested: bool) -> None:
    """torch's fast path skips submodules unless they have hooks; padded batches become nested tensors in eval mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=False)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        found = collected(model, lambda: model(x, src_key_padding_mask=padding if nested else None))
    parts = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert list(found) == [f"layers.{i}.{part}" for i in range(2) for part in parts]
    assert {c.rows for c in found.values()} == {8 if nested else 10}
    seen = torch.cat((x[0], x[1, :3])) if nested else x
    assert close(found["layers.0.self_attn.in_proj_weight"].matrix, gram(seen))
    first = model.layers[0]
    with torch.no_grad():
        attended = first.self_attn(x, x, x, key_padding_mask=padding if nested else None, need_weights=False)[0]
    bias, weight = first.self_attn.out_proj.bias.detach(), first.self_attn.out_proj.weight.detach().double()
    kept = torch.cat((attended[0], attended[1, :3])) if nested else attended
    assert close(weight @ found["layers.0.self_attn.out_proj.weight"].matrix @ weight.mT, gram(kept - bias), 1e-5)


def test_attention_under_autocast_counts_and_does_not_disturb() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(3, 6, 8)
    outputs: list[Tensor] = []
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        plain = module(x, x, x, need_weights=False)[0]
        found = (
            collected(module, lambda: outputs.append(module(x, x, x, need_weights=False)[0]))
            if (outputs := []) == []
            else {}
        )
    assert torch.equal(outputs[0], plain)
    assert torch.equal(torch.get_rng_state(), state)
    exact = collected(module, lambda: module(x, x, x, need_weights=False))
    assert close(found["out_proj.weight"].matrix, exact["out_proj.weight"].matrix, 2e-2)


def test_outputs_of_attention() -> None:
    module, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 6, 8)
    found = collected(module, lambda: module(x, x, x)[0].square().sum().backward(), ["out_proj"], what="output_grad")
    out = module(x, x, x)[0]
    assert close(found["out_proj.weight"].matrix, gram(2 * out), 1e-5)
    with pytest.raises(SubspaceMismatchError, match=r"outputs of in_proj_weight stay inside"):
        CovarianceCollector(module, what="output_grad")


def test_attention_that_calls_its_projections_is_a_model_like_any_other() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.out_proj(x)

    module, x = Own(8, 2), torch.randn(3, 8)
    assert close(collected(module, lambda: module(x))["out_proj.weight"].matrix, gram(x))


def test_targets_name_attention_by_module_and_parameter() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    for targets, keys in {
        ("attn.*",): ["attn.in_proj_weight", "attn.out_proj.weight"],
        ("attn.in_proj_weight",): ["attn.in_proj_weight"],
        ("*.in_proj", "fc"): ["attn.in_proj_weight", "fc.weight"],
        ("attn.out_proj",): ["attn.out_proj.weight"],
    }.items():
        assert sorted(CovarianceCollector(model, targets)._tally.plans) == sorted(keys)
    linears = CovarianceCollector(model, lambda name, module: type(module).__name__.endswith("Linear"))
    assert list(linears._tally.plans) == ["attn.out_proj.weight", "fc.weight"]


# ---------------------------------------------------------------------------------------------------- refusals
def test_layers_that_cannot_be_watched_are_refused_with_the_reason() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(4, 3),
            "up": nn.ConvTranspose2d(2, 3, 2),
            "rnn": nn.GRU(3, 3),
            "pair": nn.Bilinear(2, 2, 2),
            "fc": nn.Linear(3, 3),
        }
    )
    reasons = {"table": "indices", "up": "other side", "rnn": "no hook sees", "pair": "one input", "fcc": "nearest: fc"}
    for name, reason in reasons.items():
        with pytest.raises(SubspaceMismatchError, match=f"{name!r}.*{reason}"):
            CovarianceCollector(model, [name])
    for kind in ("conv", "all"):
        with pytest.raises(SubspaceMismatchError, match=r"leave out up \(ConvTranspose2d\).*other side"):
            CovarianceCollector(model, kind)
    assert list(CovarianceCollector(model)._tally.plans) == ["fc.weight"]
    for targets in ("conv", lambda name, module: False, []):
        with pytest.raises(SubspaceMismatchError, match="matches no layer of Linear"):
            CovarianceCollector(nn.Linear(2, 2), targets)
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        CovarianceCollector(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (nn.Linear(5, 3), torch.randn(2, 4), r"5 at dimension -1 for a weight of shape \(3, 5\), got \(2, 4\)"),
        (nn.Linear(5, 3), torch.ones(2, 5, dtype=torch.int64), r"rows of a real floating dtype, got torch.int64"),
        (nn.Conv2d(3, 4, 3), torch.randn(2, 2, 8, 8), r"3 at dimension -3 .*\(4, 3, 3, 3\), got \(2, 2, 8, 8\)"),
        (nn.Conv1d(3, 4, 3), torch.randn(8), r"expected 3 at dimension -2 .*\(4, 3, 3\), got \(8,\)"),
        (nn.Linear(5, 3), [1.0], r"weight: expected a tensor of rows for the weight \(3, 5\), got list"),
    ],
    ids=["width", "dtype", "channels", "dimensions", "kind"],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_named(module: nn.Module, x: Any, message: str) -> None:
    model = nn.Sequential(module)
    collector = CovarianceCollector(model, "all")
    with collector, pytest.raises(SubspaceMismatchError, match=message) as caught:
        model(x)
    assert "0.weight" in str(caught.value)
    assert collector.counts() == {}


def test_tensor_parallel_inputs_are_refused() -> None:
    class Sharded(torch.Tensor):
        placements = ()

    layer = nn.Linear(3, 3)
    with CovarianceCollector(layer), pytest.raises(SubspaceMismatchError, match="DTensor"):
        layer(torch.randn(2, 3).as_subclass(Sharded))


# ---------------------------------------------------------------------------------------------------- one weight
def test_tied_parameters_are_one_entry_whichever_module_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    x = torch.randn(6, 4)
    inner = model[1](model[0](x))
    for targets in ("linear", ["2"], ["0", "2"], ["0.weight"], lambda name, module: name == "2"):
        found = collected(model, lambda: model(x), targets)
        assert close(found["0.weight"].matrix, gram(x) + gram(inner))
        assert found["0.weight"].rows == 12
        assert ("3.weight" in found) == (targets == "linear")


def test_weights_tied_to_an_embedding_are_warned_of() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["table"].weight
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match=r"table\.weight is also the weight of the embedding 'table'"):
        found = collected(model, lambda: model["head"](x))
    assert close(found["table.weight"].matrix, gram(x))


# ---------------------------------------------------------------------------------------------------- compiled
def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 7), nn.ReLU()), nn.Linear(7, 3))


def compiled_whole() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = torch.compile(net(), backend="eager")
    return model, model


def compiled_outside() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = net()
    return model, torch.compile(model, backend="eager")


def compiled_in_place() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = net()
    model.compile(backend="eager")
    return model, model


def compiled_child() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = net()
    model[2] = torch.compile(model[2], backend="eager")
    return model, model


def compiled_function() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = net()
    return model, torch.compile(lambda x: model(x) * 2, backend="eager")


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize(
    "build", [compiled_whole, compiled_outside, compiled_in_place, compiled_child, compiled_function]
)
@pytest.mark.parametrize("what", ["input", "output_grad"])
def test_compiled_modules_are_seen(build: Callable[[], Any], what: str, warm: bool) -> None:
    """F28 and pytorch#117758: code compiled before the hooks came would not call them."""
    torch.compiler.reset()
    model, run = build()
    x, plain = torch.randn(6, 5), net()
    if warm:
        run(x)
    found = collected(model, lambda: run(x).sum().backward(), what=what)
    scale = 2 if build is compiled_function else 1
    expected = collected(plain, lambda: (scale * plain(x)).sum().backward(), what=what)
    assert list(found) == list(expected) == ["0.weight", "2.0.weight", "3.weight"]
    for name, covariance in expected.items():
        assert found[name].rows == 6
        assert close(found[name].matrix, covariance.matrix)
    assert run(x).shape == (6, 3)


def test_code_compiled_for_another_model_is_not_taken_for_this_one() -> None:
    """torch reuses code between models of the same classes, without a look at their hooks."""
    torch.compiler.reset()
    x = torch.randn(6, 5)
    torch.compile(net(1), backend="eager")(x)
    model = net()
    assert collected(model, lambda: torch.compile(model, backend="eager")(x))["3.weight"].rows == 6


def test_what_was_compiled_stays_compiled_afterwards() -> None:
    torch.compiler.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def counting(*args: Tensor) -> Any:
            graphs.append(1)
            return graph.forward(*args)

        return counting

    model, x = net(), torch.randn(6, 5)
    fast = torch.compile(model, backend=backend)
    fast(x)
    before = len(graphs)
    with CovarianceCollector(model) as collector:
        fast(x)
    assert len(graphs) == before
    fast(x)
    assert len(graphs) > before
    assert collector.covariances()["0.weight"].rows == 6


def test_models_compiled_inside_the_block_stop_counting_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler may not be loaded when the block opens, so its code can keep the hooks."""
    from cl_kernels.subspace import _layers

    torch.compiler.reset()
    monkeypatch.setattr(_layers, "eager", warnings.catch_warnings)
    model, x = net(), torch.randn(6, 5)
    with CovarianceCollector(model) as collector:
        fast = torch.compile(model, backend="eager")
        fast(x)
    assert collector.covariances()["0.weight"].rows == 6
    fast(x)
    collector._on_input(collector._layers[0])(model[0], (x,), {})  # as code that kept the hook would
    assert collector.covariances()["0.weight"].rows == 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_compiled_code(reentrant: bool) -> None:
    torch.compiler.reset()
    model, x = net(), torch.randn(6, 5, requires_grad=True)
    run = torch.compile(lambda x: checkpoint(model, x, use_reentrant=reentrant), backend="eager")
    assert collected(model, lambda: run(x).sum().backward())["0.weight"].rows == 6


def test_a_compiled_prompted_model() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.compiler.reset()
    backbone = timm.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    model, x = PromptedViT(backbone, prompts=2), torch.randn(3, 3, 16, 16)
    fast = torch.compile(model, backend="eager")
    with torch.no_grad():
        fast(x)
        found = collected(fast, lambda: fast(x), what="prompt")
        expected = collected(model, lambda: model(x), what="prompt")
    assert list(found) == ["prompts.0", "prompts.1"]
    for name, pair in expected.items():
        assert close(found[name].right.matrix, pair.right.matrix)
        assert close(found[name].left.matrix, pair.left.matrix)


# ---------------------------------------------------------------------------------------------------- checkpointing
@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize(
    "model", [nn.MultiheadAttention(8, 2, batch_first=True), nn.Conv1d(8, 8, 3)], ids=["mha", "conv"]
)
def test_recomputation_counts_once_for_every_kind(model: nn.Module, options: dict[str, Any]) -> None:
    x = torch.randn(3, 8, 8, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return model(x, x, x)[0] if isinstance(model, nn.MultiheadAttention) else model(x)

    once = collected(model, lambda: run(x), "all")
    both = collected(model, lambda: checkpoint(run, x, **options).sum().backward(), "all")
    assert {name: c.rows for name, c in both.items()} == {name: c.rows for name, c in once.items()}
