"""PromptedViT: parity with timm and with a naive prompted block, what trains, and what an observer sees."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cl_kernels._timm import import_timm

try:
    import_timm()
except ImportError as reason:
    pytest.skip(str(reason), allow_module_level=True)

from timm.layers import AttentionRope, RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer

import cl_kernels as clk
from cl_kernels.nn import PromptedViT


class SeparateAttention(AttentionRope):
    """timm's attention with separate q, k and v projections, as a class that VisionTransformer can build."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs, qkv_fused=False)


VARIANTS = {
    "cls": {},
    "average pool": {"global_pool": "avg"},
    "average pool, norm before": {"global_pool": "avg", "fc_norm": False},
    "average pool, no class token": {"global_pool": "avg", "class_token": False},
    "average pool with prefix tokens": {"global_pool": "avg", "pool_include_prefix": True},
    "attention pool": {"global_pool": "map", "class_token": False},
    "max pool": {"global_pool": "avgmax"},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "q and k norms": {"qk_norm": True},
    "rms q and k norms": {"qk_norm": True, "norm_layer": RmsNorm},
    "layer scale": {"init_values": 0.3},
    "pre norm, no qkv bias": {"pre_norm": True, "qkv_bias": False},
    "other patch and size": {"patch_size": 4, "img_size": (12, 20)},
    "no positions": {"pos_embed": "none"},
    "scaled norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "separate q, k, v": {"attn_layer": SeparateAttention},
    "stochastic depth and dropout": {"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5},
    "any image size": {"dynamic_img_size": True},
}


def vit(seed: int = 0, **options: object) -> VisionTransformer:
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    torch.manual_seed(seed)
    model = VisionTransformer(**(settings | options))
    for parameter in model.parameters():  # timm starts norms at one and biases at zero, which would hide a missing one
        nn.init.normal_(parameter, mean=0.1, std=0.4)
    return model


def images(model: VisionTransformer, batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator, dtype=dtype)


def timm_features(model: VisionTransformer, x: Tensor) -> Tensor:
    model = copy.deepcopy(model).eval().requires_grad_(False)  # a gradient can pick another attention kernel
    return model.forward_head(model.forward_features(x), pre_logits=True)


def reference(model: PromptedViT, x: Tensor) -> Tensor:
    """The definition: prompts join the tokens of every prompted block, timm's block runs, their rows are cut off."""
    backbone = model.backbone
    tokens = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(x)))
    count = tokens.shape[1]
    for index, block in enumerate(backbone.blocks):
        if index in model.prompted_blocks:
            tokens = torch.cat((tokens, model.prompts[index].expand(len(x), -1, -1)), dim=1)
        tokens = block(tokens)
        if not model.shallow:
            tokens = tokens[:, :count]
    return backbone.forward_head(backbone.norm(tokens[:, :count]), pre_logits=True)


def queries_and_keys(attention: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    if attention.qkv is not None:
        q, k, _ = attention.qkv(rows).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    else:
        q, k = (part(rows).unflatten(-1, (3, 8)).transpose(1, 2) for part in (attention.q_proj, attention.k_proj))
    return attention.q_norm(q), attention.k_norm(k)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_without_prompts_it_is_the_timm_model(options: dict[str, object]) -> None:
    backbone = vit(**options)
    x = images(backbone)
    expected = timm_features(backbone, x)
    model = PromptedViT(backbone, prompts=0)
    assert torch.equal(model(x), expected)
    assert list(model.prompts) == []


PLACED = [("deep", "append"), ("deep", "prepend"), ("deep", "prefix"), ("shallow", "append"), ("shallow", "prepend")]
PLACED += [(range(1, 3), "append"), (range(1, 3), "prepend")]


@pytest.mark.parametrize(("depth", "placement"), PLACED, ids=str)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_prompted_features_and_gradients_are_those_of_the_definition(
    options: dict[str, object], depth: str | range, placement: str
) -> None:
    backbone = vit(**options).double()
    x = images(backbone, dtype=torch.float64)
    plain = timm_features(backbone, x)
    model = PromptedViT(backbone, prompts=2, depth=depth, placement=placement)
    got, expected = model(x), reference(model, x)
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(got, plain, rtol=1e-3, atol=1e-3)
    weight = torch.randn(got.shape, dtype=got.dtype)
    parameters = list(model.prompts)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("dtype", "value", "slope"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 5e-6, 1e-5)])
def test_pb3_a_prefix_is_the_same_as_prompts_that_are_rows(
    backend: str, dtype: torch.dtype, value: float, slope: float
) -> None:
    """VPT-deep: what the queries and MLPs of prompt rows compute is thrown away, so a prefix leaves them out."""
    torch.manual_seed(3)
    backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=0).to(dtype)
    model = PromptedViT(backbone, prompts=11, placement="prefix")
    x = images(backbone, dtype=dtype)
    with clk.use_backend(backend):
        got = model(x)
        weight = torch.randn(got.shape, dtype=dtype)
        slopes = torch.autograd.grad((got * weight).sum(), list(model.prompts))
    model.double()
    wanted = reference(model, x.double())
    expected = torch.autograd.grad((wanted * weight).sum(), list(model.prompts))
    assert 0.5 < float(wanted.abs().mean()) < 2  # the bound is for values of order 1
    assert float((got - wanted).abs().max()) <= value
    for ours, theirs in zip(slopes, expected, strict=True):
        assert float((ours - theirs).norm()) <= slope * float(theirs.norm())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_pb2_the_order_of_prompts_and_their_place_do_not_matter(backend: str) -> None:
    backbone = vit(embed_dim=48, depth=2)
    model = PromptedViT(backbone, prompts=9, init="vpt")
    x = images(backbone)
    with clk.use_backend(backend):
        plain = model(x)
        with torch.no_grad():
            for prompt in model.prompts:
                prompt.copy_(prompt[:, torch.randperm(9, generator=torch.Generator().manual_seed(2))])
        shuffled = model(x)
        model.placement = "prepend"
        before = model(x)
    size = float(plain.abs().mean())
    assert not torch.equal(plain, before)
    assert float((plain - shuffled).abs().max()) <= 3e-6 * max(1.0, size)
    assert float((plain - before).abs().max()) <= 3e-6 * max(1.0, size)


def test_prompt_names_are_block_indices() -> None:
    model = PromptedViT(vit(), prompts=2, depth=[2, 0])
    trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"prompts.0": (1, 2, 24), "prompts.2": (1, 2, 24)}
    assert model.prompted_blocks == (0, 2)
    assert model.prompts[2] is dict(model.named_parameters())["prompts.2"]
    with pytest.raises(ValueError, match="block 1 has no prompts"):
        model.key_weight(1)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_only_prompts_train(depth: str) -> None:
    backbone = vit(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, pos_drop_rate=0.5, drop_rate=0.5)
    model = PromptedViT(backbone, depth=depth).train()
    assert model.training
    assert not any(module.training for module in model.backbone.modules())
    before = copy.deepcopy(backbone.state_dict())
    x = images(backbone)
    assert torch.equal(model(x), model(x)), "dropout or stochastic depth is on"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    moved = copy.deepcopy(list(model.prompts))
    optimizer.step()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("prompts."))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(not torch.equal(a, b) for a, b in zip(moved, model.prompts, strict=True))


def test_trainable_count() -> None:
    """L p D deep, p D shallow."""
    for depth, expected in (("deep", 3 * 5 * 24), ("shallow", 5 * 24)):
        model = PromptedViT(vit(), prompts=5, depth=depth)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_initialisation() -> None:
    def draw(**options: object) -> Tensor:
        model = PromptedViT(vit(embed_dim=96, patch_size=8), 50, generator=torch.Generator().manual_seed(3), **options)
        return torch.cat([p.detach().flatten() for p in model.prompts])

    for init, bound in (("uniform", 1.0), ("vpt", (6 / (3 * 64 + 96)) ** 0.5), (0.25, 0.25)):
        drawn = draw(init=init)
        assert drawn.abs().max() <= bound
        assert drawn.var() == pytest.approx(bound**2 / 3, rel=0.05)
        assert abs(drawn.mean()) < 3 * bound / (3 * len(drawn)) ** 0.5
    assert torch.equal(draw(), draw())


def test_order_of_prompts_does_not_matter() -> None:
    backbone = vit()
    x = images(backbone)
    model = PromptedViT(backbone, prompts=4)
    before = model(x).detach()
    with torch.no_grad():
        for prompt in model.prompts:
            prompt.copy_(prompt.flip(1))
    assert torch.allclose(model(x), before, atol=3e-6 * float(before.abs().max()))


def test_shallow_and_deep_agree_for_one_block() -> None:
    backbone = vit(depth=1).double()
    x = images(backbone, dtype=torch.float64)
    deep, shallow = PromptedViT(copy.deepcopy(backbone)), PromptedViT(backbone, depth="shallow")
    shallow.prompts.load_state_dict(deep.prompts.state_dict())
    assert torch.allclose(deep(x), shallow(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("depth", ["deep", "shallow", [1]], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"reg_tokens": 2}, {"attn_layer": SeparateAttention}], ids=str
)
def test_observer_sees_queries_and_the_softmax_slice(
    options: dict[str, object], depth: str | list[int], dtype: torch.dtype
) -> None:
    """Property 7: S_P from the log-sum-exp equals the softmax slice, 1e-12 in fp64 and 2e-6 in fp32."""
    backbone = vit(**options).to(dtype)
    model = PromptedViT(backbone, prompts=3, depth=depth)
    x = images(backbone, dtype=dtype)
    plain = model(x).detach()
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), model.observe(lambda i, q, s: seen.__setitem__(i, (q, s))):
        observed = model(x)
    bound = 1e-12 if dtype == torch.float64 else 2e-5  # fp32: rounding of the tokens themselves, block after block
    assert (observed - plain).norm() <= bound * plain.norm()
    assert tuple(seen) == model.prompted_blocks
    model.double()
    tokens = backbone._pos_embed(backbone.patch_embed(x.double()))
    count = tokens.shape[1]
    for index, block in enumerate(backbone.blocks):
        if index in seen:
            tokens = torch.cat((tokens, model.prompts[index].detach().expand(len(x), -1, -1)), dim=1)
            q, k = queries_and_keys(block.attn, block.norm1(tokens))
            softmax = (q @ k.mT * block.attn.scale).softmax(-1)[:, :, :count, count:]
            for got, expected in zip(seen[index], (q[:, :, :count], softmax), strict=True):
                assert got.dtype == dtype
                assert not got.requires_grad
                assert got.shape == expected.shape
                assert (got - expected).norm() <= bound * expected.norm()
        tokens = block(tokens)
        if not model.shallow:
            tokens = tokens[:, :count]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_mass_from_log_sum_exp_on_unit_normal_scores(dtype: torch.dtype, bound: float) -> None:
    from cl_kernels.nn import _attention

    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 4, 33, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    prompt = torch.randn(1, 4, 5, 16, generator=generator, dtype=torch.float64).to(dtype)
    keys, values = torch.cat((k, prompt.expand(2, -1, -1, -1)), 2), torch.cat((v, prompt.expand(2, -1, -1, -1)), 2)
    exact = (q.double() @ keys.double().mT / 4).softmax(-1)
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                patch.setattr(_attention._tokens, "fused", lambda *_: None)
            out, mass = _attention.attend_with_mass(q, keys, values, prompt, 0.25)
        assert (mass.double() - exact[..., 33:]).norm() <= bound * exact[..., 33:].norm()
        assert (out.double() - exact @ values.double()).norm() <= bound * out.norm()


def test_mass_under_autocast_is_not_rounded_to_16_bits() -> None:
    backbone = vit()
    model = PromptedViT(backbone, depth=[0])
    seen: dict[torch.dtype, Tensor] = {}
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        model.observe(lambda i, q, s: seen.update({q.dtype: s})),
    ):
        model(images(backbone))
    assert seen.keys() == {torch.bfloat16}
    assert seen[torch.bfloat16].dtype == torch.float32
    assert not torch.equal(seen[torch.bfloat16], seen[torch.bfloat16].bfloat16().float())


def test_observing_while_training_keeps_the_gradient() -> None:
    backbone = vit().double()
    x = images(backbone, dtype=torch.float64)
    model = PromptedViT(backbone)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.prompts))
    with model.observe(lambda i, q, s: None):
        got = torch.autograd.grad(model(x).square().sum(), list(model.prompts))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got, expected, strict=True))


def test_observer_is_removed_after_an_error() -> None:
    backbone = vit()
    model = PromptedViT(backbone)

    def fail(index: int, q: Tensor, mass: Tensor) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), model.observe(fail):
        model(images(backbone))
    model(images(backbone))


def test_activation_checkpointing_gives_the_same_gradient() -> None:
    backbone = vit().double()
    x = images(backbone, dtype=torch.float64)
    model = PromptedViT(backbone)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.prompts))
    backbone.set_grad_checkpointing(True)
    got = torch.autograd.grad(model(x).square().sum(), list(model.prompts))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(got, expected, strict=True))


def test_statistics_of_the_norms() -> None:
    model = PromptedViT(vit().double(), prompts=3)
    gain, eps = model.norm1(1)
    norm = model.backbone.blocks[1].norm1
    assert torch.equal(gain, norm.weight)
    assert eps == norm.eps
    prompt = model.prompts[1].detach()
    normed = (prompt - prompt.mean(-1, keepdim=True)) / model.layernorm_sigma(1)[None, :, None] * gain + norm.bias
    assert torch.allclose(normed, norm(prompt), rtol=1e-12)
    rms = PromptedViT(vit(norm_layer=RmsNorm).double(), prompts=3)
    prompt = rms.prompts[0].detach()
    normed = prompt / rms.layernorm_sigma(0)[None, :, None] * rms.norm1(0)[0]
    assert not rms.norm1_centres(0)
    assert torch.allclose(normed, rms.backbone.blocks[0].norm1(prompt), rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qk_norm": True, "norm_layer": RmsNorm}], ids=str)
def test_key_weight_is_the_linear_part_of_the_keys(options: dict[str, object]) -> None:
    """q . d(k_P) = 0 for every change of LN(P) that is orthogonal to q W_k, up to the key norm's own scale."""
    model = PromptedViT(vit(**options).double(), prompts=3)
    weight = model.key_weight(1)
    assert weight.shape == (24, 24)
    attention = model.backbone.blocks[1].attn
    if not options:
        assert torch.equal(weight, attention.qkv.weight[24:48])
        return
    tokens, step = torch.randn(1, 1, 24).double(), torch.randn(1, 1, 24).double()

    def raw_and_normed(x: Tensor) -> tuple[Tensor, Tensor]:
        raw = nn.functional.linear(x, attention.qkv.weight[24:48], attention.qkv.bias[24:48]).reshape(3, 8)
        return raw, attention.k_norm(raw)

    (raw, before), (_, after) = raw_and_normed(tokens), raw_and_normed(tokens + 1e-7 * step)
    centred = raw - raw.mean(-1, keepdim=True) if model.norm1_centres(1) else raw
    sigma = (centred.square().mean(-1, keepdim=True) + attention.k_norm.eps).sqrt()
    derivative = (after - before) / 1e-7
    linear = (weight @ step.flatten()).reshape(3, 8) / sigma
    gain = attention.k_norm.weight.detach()
    radial = gain * centred  # what the drift of the key norm's scale adds points along this
    residual = derivative - linear
    parallel = (residual * radial).sum(-1, keepdim=True) / radial.square().sum(-1, keepdim=True) * radial
    assert (residual - parallel).norm() <= 1e-5 * linear.norm()


REFUSED = {
    "no pooling": ({"global_pool": ""}, {}, "does not pool"),
    "post norm": ({"block_fn": ResPostBlock}, {}, "block 0"),
    "parallel": ({"block_fn": ParallelScalingBlock}, {}, "ParallelScalingBlock"),
    "differential": ({"attn_layer": "diff"}, {}, "differential"),
    "shallow prefix": ({}, {"placement": "prefix", "depth": "shallow"}, "placement: shallow"),
    "placement": ({}, {"placement": "middle"}, "placement"),
    "depth": ({}, {"depth": "wide"}, "depth"),
    "empty depth": ({}, {"depth": range(0)}, "distinct block indices"),
    "far depth": ({}, {"depth": [3]}, r"0\.\.2"),
    "twice": ({}, {"depth": [1, 1]}, "distinct"),
    "negative": ({}, {"prompts": -1}, "prompts"),
    "fraction": ({}, {"prompts": 1.5}, "prompts"),
    "init": ({}, {"init": "zeros"}, "init"),
    "infinite": ({}, {"init": float("inf")}, "init"),
}


@pytest.mark.parametrize(("options", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused(
    options: dict[str, object], arguments: dict[str, object], message: str
) -> None:
    backbone = vit(**options)
    frozen = [p.requires_grad for p in backbone.parameters()]
    with pytest.raises(ValueError, match=message):
        PromptedViT(backbone, **arguments)
    assert [p.requires_grad for p in backbone.parameters()] == frozen, "a refused model was changed"


def test_foreign_models_and_images_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_embed"):
        PromptedViT(nn.Linear(2, 2))
    model = PromptedViT(vit())
    for shape in ((2, 3, 16, 24), (2, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match="images"):
            model(torch.zeros(shape))


def test_registered_models_work() -> None:
    timm = import_timm()
    for name in ("deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"):
        size = 28 if "14" in name else 32
        backbone = timm.create_model(name, img_size=size, depth=2, embed_dim=48, num_heads=3)
        x = torch.randn(2, 3, size, size)
        expected = timm_features(backbone, x)
        model = PromptedViT(backbone, prompts=0)
        assert torch.equal(model(x), expected)
        prompted = PromptedViT(backbone)
        assert torch.allclose(prompted(x), reference(prompted, x), rtol=1e-4, atol=1e-4)


def test_deepcopy_and_state_dict_keep_the_features() -> None:
    backbone = vit()
    x = images(backbone)
    model = PromptedViT(backbone)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    other = PromptedViT(vit(seed=7))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)


def test_prompt_keys_cost_less_than_prompt_rows() -> None:
    """A deep block with many prompts projects them once, not once an image: no return of the naive form."""
    backbone = vit(embed_dim=96, num_heads=4, depth=2)
    x = images(backbone, batch=32)
    model = PromptedViT(backbone, prompts=200)
    operations = []
    for forward in (model, lambda x: reference(model, x)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward(x)
        operations.append(counter.get_total_flops())
    assert operations[0] < 0.5 * operations[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mass_in_pieces_and_without_a_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images go through some at a time, prompts may differ between them, and scores are never rounded to 16 bits."""
    from cl_kernels.nn import _attention

    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(5, 2, 9, 16, generator=generator).to(dtype) for _ in range(3))
    keys, values = torch.cat((k, k[:, :, :3]), 2), torch.cat((v, v[:, :, :3]), 2)
    exact = (q.double() @ keys.double().mT / 4).softmax(-1)[..., 9:]
    for piece in (1, 2 * 2 * 9 * 16 * 4, 1 << 30):
        monkeypatch.setattr(_attention, "PIECE_BYTES", piece)
        for fused in (_attention._tokens.fused, lambda *_: None):
            with monkeypatch.context() as patch:
                patch.setattr(_attention._tokens, "fused", fused)
                _, mass = _attention.attend_with_mass(q, keys, values, k[:, :, :3], 0.25)
            assert mass.dtype == torch.float32
            assert (mass.double() - exact).norm() <= (2e-6 if dtype == torch.float32 else 2e-5) * exact.norm()


def test_shortened_products_do_not_reach_the_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch may shorten float32 products to TF32 or bfloat16, the prompts' scores are taken in float64."""
    from cl_kernels.nn import _attention

    seen: list[torch.dtype] = []
    plain = torch.matmul

    def watched(a: Tensor, b: Tensor) -> Tensor:
        seen.append(a.dtype)
        return plain(a, b)

    q = torch.randn(2, 2, 5, 8)
    monkeypatch.setattr(torch, "matmul", watched)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            _, mass = _attention.attend_with_mass(q, q, q, q[:1, :, :2], 0.3)
            assert mass.dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [torch.float32, torch.float64]


def test_running_out_of_memory_is_not_taken_for_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_kernels.nn import _attention

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    q = torch.randn(1, 1, 4, 8)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", full)
    with pytest.raises(torch.OutOfMemoryError):
        _attention.attend_with_mass(q, q, q, q[:, :, :1], 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 80, 36, 33, 288])
@pytest.mark.parametrize("tokens", [197, 32, 1])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)], ids=str
)
def test_mass_on_a_gpu_for_every_shape(dtype: torch.dtype, bound: float, tokens: int, width: int) -> None:
    """Heads that flash attention, the memory-efficient kernel or neither takes; strided views of a fused qkv."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from cl_kernels.nn import _attention

    qkv = torch.randn(3, tokens, 3, 4, width, device="cuda").to(dtype).permute(2, 0, 3, 1, 4)
    prompt = torch.randn(1, 4, 4, width, device="cuda").to(dtype)
    q, scale = qkv[0], width**-0.5
    keys, values = (torch.cat((x, prompt.expand(3, -1, -1, -1)), 2) for x in qkv[1:])
    exact = (q.double() @ keys.double().mT * scale).softmax(-1)
    out, mass = _attention.attend_with_mass(q, keys, values, prompt, scale)
    assert mass.shape == (3, 4, tokens, 4)
    assert (mass.double() - exact[..., tokens:]).norm() <= bound * exact[..., tokens:].norm()
    assert (out.double() - exact @ values.double()).norm() <= bound * out.double().norm()


@pytest.mark.gpu
def test_both_gpu_kernels_give_the_same_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention serves 16-bit heads; with it taken away the memory-efficient kernel does, and agrees."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from cl_kernels.nn import _attention

    q, k, v = (torch.randn(2, 4, 45, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    exact = (q.double() @ k.double().mT / 8).logsumexp(-1)
    for widest in (256, 0):
        monkeypatch.setattr(_attention._tokens, "FUSED_HEAD_DIM", widest)
        found = _attention._tokens.fused(q, k, v, 0.125)
        assert found is not None
        assert found[1].shape == exact.shape
        assert found[1].dtype == torch.float32
        assert (found[1].double() - exact).abs().max() <= 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)], ids=str
)
def test_mass_on_a_gpu(dtype: torch.dtype, bound: float) -> None:
    """The log-sum-exp of torch's CUDA kernels is used, and is the one of the definition."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from cl_kernels.nn import _attention

    q, k, v = (torch.randn(2, 4, 197, 64, device="cuda", dtype=dtype) for _ in range(3))
    prompt = torch.randn(1, 4, 4, 64, device="cuda", dtype=dtype)
    keys, values = torch.cat((k, prompt.expand(2, -1, -1, -1)), 2), torch.cat((v, prompt.expand(2, -1, -1, -1)), 2)
    assert _attention._tokens.fused(q, keys, values, 0.125) is not None
    out, mass = _attention.attend_with_mass(q, keys, values, prompt, 0.125)
    exact = (q.double() @ keys.double().mT / 8).softmax(-1)
    assert (mass.double() - exact[..., 197:]).norm() <= bound * exact[..., 197:].norm()
    assert (out.double() - exact @ values.double()).norm() <= bound * out.double().norm()
