"""PooledViT and KDToken: parity with timm and with attention written out, what is frozen, what each loss reaches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cl_kernels._timm import import_timm

try:
    import_timm()
except ImportError as reason:
    pytest.skip(str(reason), allow_module_level=True)

from test_nn_prompted_vit import VARIANTS, images, timm_features, vit

from cl_kernels.data import load_backbone
from cl_kernels.nn import APT, L2P, CODAPrompt, DualPrompt, KDHead, KDToken, PooledViT, PromptPool

POOLS: list[type[PromptPool]] = [L2P, DualPrompt, CODAPrompt, APT]
BACKBONES = {
    "cls": {},
    "average pool, no class token": {"global_pool": "avg", "class_token": False},
    "average pool with class token": {"global_pool": "avg"},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "q and k norms, layer scale": {"qk_norm": True, "init_values": 0.3},
    "separate q, k, v": VARIANTS["separate q, k, v"],
}


def pooled(
    backbone: Any, kind: type[PromptPool] | None = CODAPrompt, tasks: int = 1, *, prune: bool = True, **kd: Any
) -> Any:
    """A model with a pool and, where `kd` says anything, a KD token."""
    pool: Any = None
    if kind is not None:
        options = {"components": 3} if kind is CODAPrompt else {"size": 8, "top": 3} if kind is L2P else {}
        pool = kind.of(backbone, **options)
        for task in range(tasks):
            pool.begin_task(task)
    token = KDToken(24, len(backbone.blocks), 3, **kd) if kd else None
    model = PooledViT(backbone, pool, token, prune=prune)
    if pool is not None:  # CODA-Prompt and APT start so small that a missing one would hardly show
        with torch.no_grad():
            for _, parameter in pool.trainable_parameters():
                parameter.mul_(3)
    return model


def written_out(model: Any, x: Tensor, query: Tensor | None, *, train: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The definition: one softmax over concatenated keys in every block, no block shortened."""
    backbone, kd, pool = model.backbone, model.kd, model.pool
    tokens = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(x)))
    has_token = kd is not None and kd.token is not None
    if has_token:
        tokens = torch.cat((tokens, kd.token.expand(len(x), 1, -1)), dim=1)
    loss = torch.zeros((), dtype=x.dtype)
    for index, block in enumerate(backbone.blocks):
        attention, normed = block.attn, block.norm1(tokens)
        if attention.qkv is not None:
            q, k, v = attention.qkv(normed).chunk(3, dim=-1)
        else:
            q, k, v = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
        q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in (q, k, v))
        q, k = attention.q_norm(q), attention.k_norm(k)
        given = None if pool is None else pool.prompts(query, index, train=train)
        if given is not None and given.loss is not None:
            loss = loss + given.loss
        if given is not None and pool.adds:
            where = torch.zeros(k.shape[2], 1, dtype=x.dtype)
            first = backbone.num_prefix_tokens
            where[: 1 if backbone.has_class_token else k.shape[2] - has_token] = 1
            assert backbone.has_class_token or first == 0
            k, v = k + where * given.k, v + where * given.v
        elif given is not None:
            k, v = (torch.cat((p.expand(len(x), -1, -1, -1), rows), dim=2) for p, rows in ((given.k, k), (given.v, v)))
        if kd is not None and index > 0 and str(index) in kd.prompts:
            g = kd.prompts[str(index)]
            half = len(g) // 2
            for_k, for_v = (part.unflatten(-1, (3, 8)).transpose(0, 1) for part in (g[:half], g[half:]))
            k = torch.cat((k, for_k.expand(len(x), -1, -1, -1)), dim=2)
            v = torch.cat((v, for_v.expand(len(x), -1, -1, -1)), dim=2)
        mixed = (q @ k.mT * attention.scale).softmax(-1) @ v
        tokens = tokens + block.ls1(attention.proj(mixed.transpose(1, 2).flatten(2)))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    tokens = backbone.norm(tokens)
    rows = tokens[:, :-1] if has_token else tokens
    cls = backbone.forward_head(rows, pre_logits=True)
    return cls, backbone.fc_norm(tokens[:, -1]) if has_token else None, loss


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [p for _, p in named], retain_graph=True, allow_unused=True)
    return {name: torch.zeros(1) if g is None else g for (name, _), g in zip(named, found, strict=True)}


def total(found: Any) -> Tensor:
    """A number in which everything that a model returns counts, each part differently."""
    generator = torch.Generator().manual_seed(2)
    value = found[2].double()
    for part in found[:2]:
        if part is not None:
            value = value + (part * torch.randn(part.shape, generator=generator, dtype=torch.float64)).sum()
    return value


class TestParity:
    @pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
    def test_with_nothing_added_it_is_the_timm_model(self, options: dict[str, object]) -> None:
        backbone = vit(**options)
        x = images(backbone)
        expected = timm_features(backbone, x)
        whole, pruned = PooledViT(copy.deepcopy(backbone), prune=False), PooledViT(backbone)
        with torch.no_grad():
            assert torch.equal(whole(x).cls, expected)
            assert torch.equal(whole.query(x), expected)
            for got in (pruned(x).cls, pruned.query(x)):
                torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * max(1.0, float(expected.abs().max())))
        assert pruned(x).kd is None
        assert float(pruned(x).loss) == 0

    @pytest.mark.parametrize("kind", POOLS)
    @pytest.mark.parametrize("kd", [{}, {"length": 4}], ids=["pool", "pool and kd"])
    @pytest.mark.parametrize("options", BACKBONES.values(), ids=BACKBONES)
    def test_outputs_and_gradients_are_those_of_the_definition(
        self, options: dict[str, object], kd: dict[str, Any], kind: type[PromptPool]
    ) -> None:
        backbone = vit(**options).double()
        x = images(backbone, dtype=torch.float64)
        model = pooled(backbone, kind, 2, **kd)
        query = model.query(x)
        got, expected = model(x), written_out(model, x, query, train=True)
        for mine, its in zip(got, expected, strict=True):
            assert (mine is None) == (its is None)
            if mine is not None:
                torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10, check_dtype=False)
        mine, its = gradients(model, total(got)), gradients(model, total(expected))
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, its[name], rtol=1e-8, atol=1e-9, msg=name)
        if not (kind is APT and not backbone.has_class_token):  # there its keys shift all rows alike
            assert all(float(g.abs().max()) > 0 for g in mine.values())

    @pytest.mark.parametrize("kind", POOLS)
    @pytest.mark.parametrize("decouple", ["none", "mask", "stopgrad"])
    def test_the_last_block_needs_only_the_rows_that_are_read(self, kind: type[PromptPool], decouple: str) -> None:
        backbone = vit()
        x = images(backbone)
        torch.manual_seed(1)
        pruned = pooled(copy.deepcopy(backbone), kind, decouple=decouple)
        torch.manual_seed(1)
        whole = pooled(backbone, kind, prune=False, decouple=decouple)
        a, b = pruned(x), whole(x)
        for mine, its in zip(a, b, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-6, atol=2e-6)
        found = [gradients(model, total(y)) for model, y in ((pruned, a), (whole, b))]
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5, msg=name)

    def test_pruning_saves_most_of_the_last_block(self) -> None:
        def flops(prune: bool) -> int:
            backbone = vit(img_size=64)
            model, x = PooledViT(backbone, prune=prune), images(backbone)
            with FlopCounterMode(display=False) as counter:
                model.query(x)
            return counter.get_total_flops()

        block = flops(False) / 3.1  # three blocks and the patch embedding
        assert 0.6 * block < flops(False) - flops(True) < block

    @pytest.mark.parametrize("kind", POOLS)
    def test_on_the_embedded_backbone(self, kind: type[PromptPool]) -> None:
        backbone: Any = load_backbone("embedded").model
        assert backbone.global_pool == "avg"
        x = torch.randn(3, 3, 32, 32)
        with torch.no_grad():
            plain = backbone.forward_head(backbone.forward_features(x), pre_logits=True)
        pool: Any = kind.of(backbone)
        pool.begin_task(0)
        model: Any = PooledViT(backbone, pool, KDToken(128, 4, 4))
        assert torch.equal(model.query(x), plain)
        found = model(x)
        assert found.cls.shape == found.kd.shape == (3, 128)
        assert float((found.cls - plain).detach().abs().max()) > 1e-3
        total(found).backward()
        names = {name for name, p in model.named_parameters() if p.grad is not None}
        assert names == {name for name, p in model.named_parameters() if p.requires_grad}
        assert not any(name.startswith("backbone") for name in names)

    def test_a_prefix_has_no_order(self) -> None:
        """PA2: rows may be permuted, keys and values alike, and stand anywhere."""
        backbone = vit()
        x = images(backbone)
        model = pooled(backbone, DualPrompt, length=6)
        before = model(x)
        with torch.no_grad():
            for prompt in [*model.pool.general.parameters(), *model.kd.prompts.parameters()]:
                half = prompt.shape[-2] // 2
                order = torch.randperm(half)
                prompt.copy_(prompt[..., torch.cat((order, order + half)), :])
        after = model(x)
        for mine, its in ((before.cls, after.cls), (before.kd, after.kd)):
            torch.testing.assert_close(mine, its, rtol=3e-6, atol=3e-6 * float(its.detach().abs().max()))

    def test_gradient_checkpointing_gives_the_same(self) -> None:
        backbone = vit().double()
        x = images(backbone, dtype=torch.float64)
        model = pooled(backbone, CODAPrompt, length=4)
        plain = gradients(model, total(model(x)))
        backbone.set_grad_checkpointing()
        again = gradients(model, total(model(x)))
        assert all(torch.allclose(plain[name], value, rtol=1e-12) for name, value in again.items())

    def test_autocast(self) -> None:
        backbone = vit()
        x = images(backbone)
        model = pooled(backbone, L2P, length=4)
        exact = model(x, query=model.query(x)).cls
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x).cls
        assert float((half - exact).detach().norm() / exact.detach().norm()) < 0.05

    @pytest.mark.parametrize("kind", POOLS)
    def test_a_16_bit_backbone(self, kind: type[PromptPool]) -> None:
        backbone = vit()
        x = images(backbone)
        model = pooled(backbone, kind, length=4)
        query = model.query(x)
        exact = model(x, query)
        model.to(torch.bfloat16)
        half = model(x.bfloat16(), query)
        assert half.cls.dtype == half.kd.dtype == torch.bfloat16
        assert half.loss.dtype == torch.float32
        for mine, its in ((half.cls, exact.cls), (half.kd, exact.kd)):
            assert float((mine - its).detach().norm() / its.detach().norm()) < 0.1

    @pytest.mark.gpu
    @pytest.mark.parametrize("kind", POOLS)
    @pytest.mark.parametrize("decouple", ["none", "stopgrad"])
    def test_on_a_gpu(self, kind: type[PromptPool], decouple: str) -> None:
        backbone = vit().double()
        x = images(backbone, dtype=torch.float64)
        model = pooled(backbone, kind, 2, decouple=decouple)
        expected = [model(x, train=train) for train in (True, False)]
        of_cpu = gradients(model, total(expected[0]))
        state, digest = copy.deepcopy(model.state_dict()), model.backbone_digest()
        model.cuda()
        again = [model(x.cuda(), train=train) for train in (True, False)]
        for found, wanted in zip(again, expected, strict=True):
            for mine, its in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine.cpu(), its, rtol=1e-8, atol=1e-9, check_dtype=False)
        of_gpu = gradients(model, total([part.cpu() for part in again[0]]))
        for name, gradient in of_cpu.items():
            torch.testing.assert_close(of_gpu[name].cpu(), gradient, rtol=1e-7, atol=1e-8, msg=name)
        model.pool.end_task()
        model.pool.begin_task(2, generator=torch.Generator().manual_seed(0))
        assert all(p.device.type == "cuda" for p in model.parameters())
        assert bool(model(x.cuda()).cls.isfinite().all())
        model.load_state_dict(state)
        assert all(t.device.type == "cuda" for t in (*model.parameters(), *model.buffers()))
        assert model.backbone_digest() == digest

    @pytest.mark.parametrize("kind", POOLS)
    def test_no_images(self, kind: type[PromptPool]) -> None:
        backbone = vit()
        model = pooled(backbone, kind, length=4)
        found = model(images(backbone)[:0], train=False)
        assert found.cls.shape == found.kd.shape == (0, 24)


class TestFrozen:
    @pytest.mark.parametrize("kind", POOLS)
    def test_the_backbone_neither_moves_nor_gets_gradients(self, kind: type[PromptPool]) -> None:
        """PA8."""
        backbone = vit(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, pos_drop_rate=0.5)
        x = images(backbone)
        model = pooled(backbone, kind, length=4)
        before = model.backbone_digest()
        model.requires_grad_(True).train()
        assert model.training
        assert torch.equal(model(x).cls, model(x).cls), "dropout or stochastic depth is on"
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            total(model(x)).backward()
            optimizer.step()
        assert model.backbone_digest() == before
        assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
        assert not any(module.training for module in backbone.modules())
        assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("backbone."))

    def test_the_digest_sees_every_bit(self) -> None:
        model = PooledViT(vit())
        before = model.backbone_digest()
        assert len(before) == 64
        weight = model.backbone.blocks[1].mlp.fc2.bias
        with torch.no_grad():
            weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
        assert model.backbone_digest() != before
        assert PooledViT(vit(), prune=False).backbone_digest() == before

    def test_the_query_has_no_gradient_and_no_prompts(self) -> None:
        backbone = vit()
        x = images(backbone).requires_grad_()
        model = pooled(backbone, L2P, length=4)
        query = model.query(x)
        assert not query.requires_grad
        with torch.no_grad():
            for parameter in (*model.pool.parameters(), *model.kd.parameters()):
                parameter.add_(1)
        assert torch.equal(model.query(x), query)


class TestQuery:
    def test_a_teacher_is_keyed_by_the_students_query(self) -> None:
        student, teacher = PooledViT(vit(embed_dim=12)), vit()
        pool = L2P.of(teacher, query_dim=12, size=8)
        pool.begin_task(0)
        model = PooledViT(teacher, pool)
        x = images(teacher)
        query = student.query(x)
        assert model(x, query).cls.shape == (4, 24)
        with pytest.raises(ValueError, match=r"query: expected shape \[batch, 12\], got \(4, 24\)"):
            model(x)

    def test_a_given_query_is_what_the_model_would_compute(self) -> None:
        backbone = vit()
        x = images(backbone)
        model = pooled(backbone, DualPrompt)
        assert torch.equal(model(x).cls, model(x, model.query(x)).cls)
        with FlopCounterMode(display=False) as shared:
            model(x, torch.zeros(4, 24))
        with FlopCounterMode(display=False) as alone:
            model(x)
        assert shared.get_total_flops() < 0.6 * alone.get_total_flops()

    def test_train_and_inference_prompts(self) -> None:
        backbone = vit()
        x = images(backbone)
        model = pooled(backbone, DualPrompt, 3)
        query = torch.zeros(4, 24)
        query[:] = model.pool.expert["1"].bank_keys[0]  # all look like the first task
        training, inference = model(x, query), model.eval()(x, query)
        assert float(training.loss.detach()) > 0
        assert float(inference.loss) == 0
        assert not torch.allclose(training.cls, inference.cls)
        assert torch.equal(inference.cls, model.train()(x, query, train=False).cls)


class TestKDToken:
    def test_parameters_are_the_published_ones(self) -> None:
        for dim, heads, count in ((192, 3, 12_864), (384, 6, 25_728), (768, 12, 51_456)):
            token = KDToken(dim, 12, heads)
            assert sum(p.numel() for p in token.parameters()) == count
            assert sorted(token.prompts, key=int) == [str(layer) for layer in range(1, 12)]
            assert all(bool(((p >= 0) & (p < 1)).all()) for p in token.parameters())
        assert token.prefix(0) is None

    @pytest.mark.parametrize(
        ("options", "prefixes", "has_token"),
        [
            ({"blocks": 0}, 0, True),
            ({"blocks": 1}, 0, True),
            ({"length": 0}, 0, True),
            ({"prompts": False}, 0, True),
            ({"token": False}, 2, False),
            ({"token": False, "prompts": False}, 0, False),
        ],
        ids=str,
    )
    def test_parts_alone(self, options: dict[str, Any], prefixes: int, has_token: bool) -> None:
        backbone = vit()
        x = images(backbone)
        kd = KDToken(**({"dim": 24, "blocks": 3, "heads": 3} | options))
        assert sum(kd.prefix(layer) is not None for layer in range(3)) == prefixes
        plain = timm_features(backbone, x)
        model: Any = PooledViT(backbone, None, kd)
        found = model(x)
        assert (found.kd is not None) == has_token
        changed = has_token or prefixes > 0
        assert torch.allclose(found.cls.detach(), plain, atol=1e-5) != changed

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"length": 5}, "length: expected an even number"),
            ({"length": -2}, "length"),
            ({"blocks": -1}, "blocks"),
            ({"heads": 5}, "heads"),
            ({"decouple": "cut"}, "decouple: expected one of none, mask, stopgrad"),
            ({"decouple": "mask", "token": False}, "decouple"),
        ],
    )
    def test_what_does_not_fit(self, options: dict[str, Any], named: str) -> None:
        with pytest.raises(ValueError, match=named):
            KDToken(**({"dim": 24, "blocks": 3, "heads": 3} | options))

    def test_start_sets_the_token_and_silences_the_prompts(self) -> None:
        kd = KDToken(24, 3, 3)
        row = torch.arange(24.0)
        kd.start(row)
        assert kd.token is not None
        assert torch.equal(kd.token[0], row)
        assert all(not bool(prompt.any()) for prompt in kd.prompts.values())
        with pytest.raises(ValueError, match=r"token: expected shape \(24,\), got \(1, 24\)"):
            kd.start(row[None])
        assert torch.equal(kd.token[0], row)

    def test_all_images_share_the_prompts(self) -> None:
        """PA12: the gradient is the sum over images of each one's own."""
        backbone = vit().double()
        x = images(backbone, dtype=torch.float64)
        model = pooled(backbone, None, length=6)
        assert all(len(part) == 1 for part in model.kd.prefix(2))

        def of(some: Tensor) -> dict[str, Tensor]:
            return gradients(model, (model(some).kd.sin() + model(some).cls.cos()).sum())

        whole = of(x)
        apart = [of(image[None]) for image in x]
        for name, value in whole.items():
            torch.testing.assert_close(value, sum(part[name] for part in apart), rtol=1e-6, atol=1e-12)

    @pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "class_token": False}], ids=["cls", "average"])
    @pytest.mark.parametrize("kind", [L2P, APT])
    @pytest.mark.parametrize("decouple", ["none", "mask", "stopgrad"])
    def test_what_each_loss_reaches(self, decouple: str, kind: type[PromptPool], options: dict[str, Any]) -> None:
        backbone = vit(**options).double()
        x = images(backbone, dtype=torch.float64)
        model = pooled(backbone, kind, decouple=decouple)
        found = model(x)
        of_class = gradients(model, found.cls.sin().sum())
        of_kd = gradients(model, found.kd.sin().sum())
        to_kd = max(float(g.abs().max()) for name, g in of_class.items() if name.startswith("kd."))
        to_pool = max(float(g.abs().max()) for name, g in of_kd.items() if name.startswith("pool."))
        assert (to_kd > 1e-9) == (decouple == "none"), "class loss to token and KD prompts"
        assert (to_pool > 1e-9) == (decouple != "stopgrad"), "KD loss to the pool"
        assert max(float(g.abs().max()) for name, g in of_kd.items() if name.startswith("kd.")) > 1e-9
        assert max(float(g.abs().max()) for name, g in of_class.items() if name.startswith("pool.")) > 1e-9

    @pytest.mark.parametrize("kind", [L2P, CODAPrompt])
    def test_a_masked_token_does_not_see_the_pools_prompts(self, kind: type[PromptPool]) -> None:
        backbone = vit(depth=1).double()  # in one block no image row can tell it
        x = images(backbone, dtype=torch.float64)
        model = pooled(backbone, kind, decouple="mask")
        alone = pooled(backbone, None, decouple="mask")
        alone.kd.load_state_dict(model.kd.state_dict())
        torch.testing.assert_close(model(x).kd, alone(x).kd, rtol=1e-11, atol=1e-11)
        model.kd.decouple = "none"
        assert not torch.allclose(model(x).kd, alone(x).kd, rtol=1e-3)

    @pytest.mark.parametrize("kind", POOLS)
    def test_forms_of_decoupling(self, kind: type[PromptPool]) -> None:
        backbone = vit().double()
        x = images(backbone, dtype=torch.float64)
        model = pooled(backbone, kind, decouple="none")
        by_name = {}
        for name in ("none", "mask", "stopgrad"):
            model.kd.decouple = name
            by_name[name] = model(x)
        plain = PooledViT(backbone, model.pool)(x)
        for mine, its in zip(by_name["stopgrad"], by_name["none"], strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(by_name["mask"].cls, plain.cls, rtol=1e-11, atol=1e-11)
        assert not torch.allclose(by_name["mask"].cls, by_name["none"].cls, rtol=1e-3)
        assert not torch.allclose(by_name["mask"].kd, by_name["none"].kd, rtol=1e-3)

    def test_the_head_and_the_blend(self) -> None:
        head, features = KDHead(24, 10), torch.randn(4, 24)
        whole, some = head(features), head(features, slice(4, 7))
        torch.testing.assert_close(some, whole[:, 4:7])
        torch.testing.assert_close(whole, F.linear(features, head.weight, head.bias))
        some.sum().backward()
        outside = torch.ones(10, dtype=torch.bool)
        outside[4:7] = False
        assert not head.weight.grad[outside].any()  # PA6
        assert head.weight.grad[~outside].abs().min() > 0
        other = torch.randn(4, 10)
        assert torch.equal(KDHead.blend(other, whole, 0.0), other)
        torch.testing.assert_close(KDHead.blend(other, whole, 1.0), whole)
        torch.testing.assert_close(KDHead.blend(other, whole, 0.3), 0.7 * other + 0.3 * whole)
        with pytest.raises(ValueError, match="alpha"):
            KDHead.blend(other, whole, 1.1)
        with pytest.raises(ValueError, match="kd_logits"):
            KDHead.blend(other, whole[:, :4])


class TestWhatDoesNotFit:
    @pytest.mark.parametrize(
        ("pool", "kd", "named"),
        [
            (L2P(25, 3, 5), None, "pool: expected width 24 and 3 heads.*got 25 and 5"),
            (L2P(24, 3, 2), None, "pool: expected width 24 and 3 heads.*got 24 and 2"),
            (L2P(24, 4, 3), None, "pool: expected 3 blocks.*got 4"),
            (None, KDToken(32, 3, 4), "kd: expected width 24.*got 32 and 4"),
            (None, KDToken(24, 4, 3), "kd: expected at most the 3 blocks.*got 4"),
        ],
    )
    def test_sizes(self, pool: PromptPool | None, kd: KDToken | None, named: str) -> None:
        backbone = vit()
        with pytest.raises(ValueError, match=named):
            PooledViT(backbone, pool, kd)
        assert all(p.requires_grad for p in backbone.parameters()), "a wrong call leaves the model as it was"
        assert backbone.num_classes == 5

    def test_models_and_images(self) -> None:
        with pytest.raises(ValueError, match="Linear"):
            PooledViT(nn.Linear(3, 3))
        with pytest.raises(ValueError, match="images: expected shape"):
            PooledViT(vit())(torch.zeros(2, 3, 8, 8))
        with pytest.raises(ValueError, match="images: expected shape"):
            PooledViT(vit()).query(torch.zeros(3, 16, 16))
