"""Prompt pools by their definitions: what is chosen, what trains, what earlier tasks keep."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.nn import APT, L2P, CODAPrompt, DualPrompt, PromptPool
from cl_kernels.nn.coda_prompt import coda_weights, fresh_rows

POOLS = [L2P, DualPrompt, CODAPrompt, APT]
DIM, HEADS, QUERY, BATCH = 24, 3, 20, 5


def made(kind: type[PromptPool], tasks: int = 1, blocks: int = 6, **options: Any) -> Any:
    pool: Any = kind(DIM, blocks, HEADS, query_dim=QUERY, **options)
    for task in range(tasks):
        pool.begin_task(task)
    return pool


def query(batch: int = BATCH, seed: int = 3) -> Tensor:
    return torch.randn(batch, QUERY, generator=torch.Generator().manual_seed(seed))


def prompts(pool: Any, layer: int, q: Tensor | None = None, *, train: bool = True) -> Any:
    return pool.prompts(query() if q is None else q, layer, train=train)


def nudged(pool: Any, size: float = 0.1) -> None:
    """As if the task had been trained."""
    with torch.no_grad():
        for _, parameter in pool.trainable_parameters():
            parameter.add_(size * torch.randn_like(parameter))


def rows(heads: Tensor) -> Tensor:
    """[B, H, m, dh] as [B, m, D] again."""
    return heads.transpose(1, 2).flatten(2)


class TestInterface:
    @pytest.mark.parametrize("kind", POOLS)
    @pytest.mark.parametrize("train", [True, False])
    def test_keys_and_values_in_heads(self, kind: type[PromptPool], train: bool) -> None:
        pool = made(kind)
        for layer in range(6):
            given = prompts(pool, layer, train=train)
            assert (given is None) == (layer not in pool.layers)
            if given is None:
                continue
            assert given.k.shape == given.v.shape
            assert given.k.shape[0] in (1, BATCH)
            assert (given.k.shape[1], given.k.shape[3]) == (HEADS, DIM // HEADS)
            assert train or given.loss is None

    def test_heads_are_consecutive_channels_and_the_first_half_is_the_keys(self) -> None:
        pool = made(DualPrompt)
        whole = torch.arange(6.0 * DIM).reshape(1, 6, DIM)
        with torch.no_grad():
            pool.general["0"].copy_(whole)
        given = prompts(pool, 0)
        for head in range(HEADS):
            some = slice(8 * head, 8 * head + 8)
            assert torch.equal(given.k[0, head], whole[0, :3, some])
            assert torch.equal(given.v[0, head], whole[0, 3:, some])

    @pytest.mark.parametrize("kind", POOLS)
    def test_tasks_come_in_order_and_before_prompts(self, kind: type[PromptPool]) -> None:
        pool = made(kind, 0)
        with pytest.raises(RuntimeError, match="begin a task"):
            prompts(pool, 0)
        with pytest.raises(ValueError, match=r"task: expected 0.*got 1"):
            pool.begin_task(1)
        pool.begin_task(0)
        with pytest.raises(ValueError, match=r"task: expected 1.*got 0"):
            pool.begin_task(0)

    @pytest.mark.parametrize("kind", [L2P, DualPrompt, CODAPrompt])
    @pytest.mark.parametrize("wrong", [None, torch.zeros(4, 7), torch.zeros(QUERY)], ids=["none", "width", "1-d"])
    def test_a_query_of_another_shape(self, kind: type[PromptPool], wrong: Tensor | None) -> None:
        with pytest.raises(ValueError, match=rf"query: expected shape \[batch, {QUERY}\]"):
            made(kind).prompts(wrong, 0, train=True)

    @pytest.mark.parametrize(
        ("kind", "options", "named"),
        [
            (L2P, {"length": 5}, "length"),
            (L2P, {"length": 0}, "length"),
            (L2P, {"top": 31}, "top"),
            (L2P, {"top": 0}, "top"),
            (L2P, {"size": True}, "size"),
            (L2P, {"layers": [6]}, "layers"),
            (L2P, {"layers": [1, 1]}, "layers"),
            (DualPrompt, {"length": 7}, "length"),
            (DualPrompt, {"general_length": 3}, "general_length"),
            (DualPrompt, {"general": [0, 1], "expert": [1]}, "layers"),
            (DualPrompt, {"candidates": "best"}, "candidates"),
            (DualPrompt, {"size": 0}, "size"),
            (CODAPrompt, {"length": 9}, "length"),
            (CODAPrompt, {"components": 0}, "components"),
            (CODAPrompt, {"orthogonalize": "no"}, "orthogonalize"),
            (APT, {"momentum": 1.5}, "momentum"),
            (APT, {"merge": "never"}, "merge"),
        ],
    )
    def test_sizes_that_do_not_fit(self, kind: type[PromptPool], options: dict[str, Any], named: str) -> None:
        with pytest.raises(ValueError, match=f"^{named}: expected"):
            made(kind, **options)
        with pytest.raises(ValueError, match="heads: expected a divisor"):
            kind(25, 6, 3)
        with pytest.raises(ValueError, match="query_dim"):
            kind(24, 6, 3, query_dim=0)

    @pytest.mark.parametrize("kind", POOLS)
    def test_a_seed_gives_the_same_pool(self, kind: type[PromptPool]) -> None:
        def drawn() -> dict[str, Any]:
            generator = torch.Generator().manual_seed(8)
            options = {} if kind is CODAPrompt else {"generator": generator}
            pool = made(kind, 0, **options)
            torch.randn(3)  # the global generator plays no part
            for task in range(12):
                pool.begin_task(task, generator=torch.Generator().manual_seed(task))
            return dict(pool.state_dict())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # twelve tasks leave no room in 20 dimensions
            one, other = drawn(), drawn()
        assert all(torch.equal(value, other[name]) for name, value in one.items() if isinstance(value, Tensor))

    @pytest.mark.parametrize("kind", POOLS)
    def test_a_state_dict_goes_on_exactly(self, kind: type[PromptPool]) -> None:
        pool = made(kind, 1, components=4) if kind is CODAPrompt else made(kind, 1)
        for task in (1, 2):
            nudged(pool)
            if task == 2:
                pool.end_task()
            other = made(kind, 0, components=4) if kind is CODAPrompt else made(kind, 0)
            other.load_state_dict(copy.deepcopy(pool.state_dict()))
            for both in (pool, other):
                both.begin_task(task, generator=torch.Generator().manual_seed(4))
            for layer in pool.layers:
                for train in (True, False):
                    mine, its = (prompts(p, layer, train=train) for p in (pool, other))
                    assert torch.equal(mine.k, its.k)
                    assert torch.equal(mine.v, its.v)

    @pytest.mark.parametrize("kind", [L2P, DualPrompt, CODAPrompt])
    def test_no_gradient_reaches_the_query(self, kind: type[PromptPool]) -> None:
        pool, q = made(kind, 2), query().requires_grad_()
        for layer in pool.layers:
            given = prompts(pool, layer, q)
            loss = given.k.sum() + given.v.sum() + (0 if given.loss is None else given.loss)
            if loss.requires_grad:
                loss.backward()
        assert q.grad is None

    @pytest.mark.parametrize("kind", [L2P, DualPrompt, CODAPrompt])
    def test_one_image_alone_or_in_a_batch(self, kind: type[PromptPool]) -> None:
        pool = made(kind, 2)
        nudged(pool)
        for layer in pool.layers:
            together = prompts(pool, layer, train=False)
            for image, q in enumerate(query()):
                alone = prompts(pool, layer, q[None], train=False)
                one = slice(image, image + 1) if len(together.k) > 1 else slice(None)
                torch.testing.assert_close(alone.k, together.k[one], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", [L2P, DualPrompt])
    def test_the_loss_does_not_grow_with_the_batch(self, kind: type[PromptPool]) -> None:
        pool, q = made(kind, 2), query()
        layer = pool.layers[-1]
        once, thrice = prompts(pool, layer, q).loss, prompts(pool, layer, q.repeat(3, 1)).loss
        torch.testing.assert_close(once, thrice)


class TestL2P:
    def test_against_a_loop_over_images(self) -> None:
        pool, q = made(L2P), query()
        given = prompts(pool, 0)
        prompt, keys = pool.entries["0"].prompts, pool.entries["0"].keys
        loss = torch.zeros(())
        for image in range(BATCH):
            similar = F.cosine_similarity(q[image], keys)
            best = similar.sort(descending=True).indices[:5]
            torch.testing.assert_close(rows(given.k)[image], torch.cat([prompt[j, :10] for j in best]))
            torch.testing.assert_close(rows(given.v)[image], torch.cat([prompt[j, 10:] for j in best]))
            loss = loss + (1 - similar[best]).sum() / BATCH
        assert given.k.shape[2] == 50
        torch.testing.assert_close(given.loss, loss)

    def test_only_what_is_selected_gets_a_gradient(self) -> None:
        pool = made(L2P)
        entries = pool.entries["0"]
        given = prompts(pool, 0)
        (given.k.square().sum() + given.v.square().sum() + given.loss).backward()
        chosen = pool.usage(query())[0] > 0
        assert 5 <= int(chosen.sum()) < 30
        for gradient in (entries.prompts.grad.flatten(1), entries.keys.grad):
            assert torch.equal(gradient.abs().sum(1) > 0, chosen)

    def test_defaults_are_the_published_ones(self) -> None:
        pool = L2P(384, 12, 6)
        assert sum(p.numel() for p in pool.parameters()) == 241_920
        assert all(bool(((p >= 0) & (p < 1)).all()) for p in pool.parameters())
        assert pool.layers == (0,)

    def test_cosines_of_a_16_bit_pool_are_not_rounded(self) -> None:
        pool = made(L2P).to(torch.bfloat16)
        keys = pool.entries["0"].keys.float()
        exact = (F.normalize(query(), dim=1) @ F.normalize(keys, dim=1).mT).topk(5).values
        with torch.autocast("cpu", torch.bfloat16):
            given = prompts(pool, 0)
        torch.testing.assert_close(given.loss, (1 - exact).sum(1).mean())
        assert given.k.dtype == torch.bfloat16


class TestDualPrompt:
    @pytest.mark.parametrize(
        ("blocks", "general", "expert"),
        [(12, 2, 3), (5, 2, 3), (4, 2, 2), (3, 1, 2), (2, 1, 1), (1, 0, 1)],
    )
    def test_blocks_of_smaller_backbones(self, blocks: int, general: int, expert: int) -> None:
        pool = DualPrompt(8, blocks, 2)
        assert sorted(pool.general) == [str(i) for i in range(general)]
        assert sorted(pool.expert) == [str(i) for i in range(general, general + expert)]

    def test_defaults_are_the_published_ones(self) -> None:
        pool = DualPrompt(384, 12, 6)
        banks = sum(bank.bank_prompts.numel() + bank.bank_keys.numel() for bank in pool.expert.values())
        assert banks + sum(p.numel() for p in pool.general.parameters()) == 246_528

    def test_a_task_trains_its_own_entry(self) -> None:
        pool = made(DualPrompt, 3)
        bank = pool.expert["2"]
        given = prompts(pool, 2)
        assert torch.equal(rows(given.k), bank.prompt[:, :10])
        expected = (1 - F.cosine_similarity(query(), bank.key)).mean()
        torch.testing.assert_close(given.loss, expected)
        assert set(dict(pool.trainable_parameters())) == {
            *(f"general.{layer}" for layer in (0, 1)),
            *(f"expert.{layer}.{part}" for layer in (2, 3, 4) for part in ("prompt", "key")),
        }

    def test_earlier_entries_stay_to_the_bit(self) -> None:
        pool = made(DualPrompt, 1)
        trained = []
        for task in range(1, 13):  # two more than there are entries
            nudged(pool)
            trained.append(pool.expert["3"].prompt.detach().clone())
            pool.begin_task(task)
        assert torch.equal(pool.expert["3"].bank_prompts[:12], torch.cat(trained))
        assert len(pool.expert["3"].bank_keys) == 13

    @pytest.mark.parametrize("candidates", ["seen", "all"])
    def test_inference_takes_the_nearest_key(self, candidates: str) -> None:
        pool = made(DualPrompt, 4, candidates=candidates)
        nudged(pool)
        bank = pool.expert["2"]
        keys, values = bank.bank_keys.clone(), bank.bank_prompts.clone()
        keys[3:4], values[3:4] = bank.key.detach(), bank.prompt.detach()
        known = 4 if candidates == "seen" else 10
        q = keys[:10] + 0.05 * torch.randn(10, QUERY)  # near each key in turn, those of tasks to come too
        chosen = F.cosine_similarity(q[:, None], keys[None, :known], dim=2).argmax(1)
        given = prompts(pool, 2, q, train=False)
        torch.testing.assert_close(rows(given.v), values[chosen, 10:])
        assert (chosen[:4] == torch.arange(4)).all()
        assert (int(chosen.max()) > 3) == (candidates == "all")
        assert torch.equal(pool.usage(q)[2], torch.bincount(chosen, minlength=known).double())


class TestCODA:
    def test_defaults_are_the_published_ones(self) -> None:
        pool = CODAPrompt(384, 12, 6)
        for task in range(10):
            pool.begin_task(task)
        kept = sum(value.numel() for value in pool.state_dict().values() if isinstance(value, Tensor))
        assert kept == 1_920_000
        assert pool.layers == (0, 1, 2, 3, 4)
        assert CODAPrompt(384, 3, 6).layers == (0, 1, 2)

    @pytest.mark.parametrize("batch", [1, 7])
    def test_weights_against_the_definition(self, batch: int) -> None:
        q, a, k = (torch.randn(n, 96, dtype=torch.float32) for n in (batch, 40, 40))
        definition = F.cosine_similarity(q[:, None] * a, k[None], dim=2)
        got = coda_weights(q, a, k)
        assert float((got - definition).abs().max()) < 1e-6
        assert float(coda_weights(k, torch.ones_like(a), k).abs().max()) <= 1 + 1e-6

    def test_prompts_and_gradients_against_the_definition(self) -> None:
        pool = made(CODAPrompt, 2, components=5).double()
        part, q = pool.parts["1"], query().double()
        given = prompts(pool, 1, q)
        new = {kind: getattr(part, kind) for kind in ("prompt", "key", "attention")}
        whole = {kind: torch.cat((getattr(part, f"past_{kind}"), rows)) for kind, rows in new.items()}
        weight = F.cosine_similarity(q[:, None] * whole["attention"], whole["key"][None], dim=2)
        expected = torch.einsum("bm,mld->bld", weight, whole["prompt"].unflatten(1, (8, DIM)))
        got = torch.cat((rows(given.k), rows(given.v)), dim=1)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert int((weight.abs() > 1e-3).sum()) > 40, "earlier components are in the sum"
        up = torch.randn_like(got)
        mine, its = (torch.autograd.grad((y * up).sum(), list(new.values())) for y in (got, expected))
        for a, b in zip(mine, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert given.loss is None

    def test_earlier_components_stay_to_the_bit_and_do_not_train(self) -> None:
        pool = made(CODAPrompt, 1, components=4)
        nudged(pool)
        before = {name: value.detach().clone() for name, value in pool.trainable_parameters()}
        pool.begin_task(1)
        optimizer = torch.optim.Adam(pool.parameters(), lr=0.1)
        given = prompts(pool, 2)
        (given.k.square().sum() + given.v.sum()).backward()
        optimizer.step()
        pool.begin_task(2)
        for layer in range(5):
            for kind in ("prompt", "key", "attention"):
                past = getattr(pool.parts[str(layer)], f"past_{kind}")
                assert torch.equal(past[:4], before[f"parts.{layer}.{kind}"])
                assert len(past) == 8

    @pytest.mark.parametrize("noise", [0.0, 0.05])
    def test_new_rows_are_orthonormal_and_orthogonal_to_the_span_of_the_old(self, noise: float) -> None:
        pool = made(CODAPrompt, 1, components=4)
        nudged(pool, noise)
        for task in (1, 2, 3):
            pool.begin_task(task)
            for kind in ("prompt", "key", "attention"):
                old = getattr(pool.parts["0"], f"past_{kind}").double()
                new = getattr(pool.parts["0"], kind).detach().double()
                span = torch.linalg.qr(old.mT).Q
                assert float((new @ new.mT - torch.eye(4)).abs().max()) < 1e-5
                assert float((new @ span).abs().max()) < 1e-5
            nudged(pool, noise)

    def test_the_published_gram_schmidt_is_orthogonal_in_task_1_alone(self) -> None:
        first = fresh_rows(torch.randn(10, 384), torch.empty(0, 384), published=True).double()
        assert float((first @ first.mT - torch.eye(10)).abs().max()) < 1e-5
        trained = (first + 0.05 * torch.randn_like(first)).float()
        second = {form: fresh_rows(torch.randn(10, 384), trained, published=form).double() for form in (True, False)}
        unit = F.normalize(trained.double(), dim=1)
        off = {form: float((rows @ unit.mT).abs().max()) for form, rows in second.items()}
        assert off[True] > 0.02
        assert off[False] < 1e-6

    def test_more_components_than_directions(self) -> None:
        past = torch.randn(18, QUERY)
        with pytest.warns(UserWarning, match="room for 2 orthogonal ones, 5 were asked"):
            rows = fresh_rows(torch.randn(5, QUERY), past)
        span = torch.linalg.qr(past.double().mT).Q
        assert float((rows[:2].double() @ span).abs().max()) < 1e-5
        assert torch.allclose(rows.norm(dim=1), torch.ones(5))
        with pytest.warns(UserWarning, match="room for 0"):
            assert bool(fresh_rows(torch.randn(3, QUERY), torch.randn(30, QUERY)).isfinite().all())

    def test_usage_is_the_mean_weight(self) -> None:
        pool = made(CODAPrompt, 2, components=3)
        part = pool.parts["0"]
        a, k = (torch.cat((getattr(part, f"past_{kind}"), getattr(part, kind))) for kind in ("attention", "key"))
        expected = F.cosine_similarity(query()[:, None] * a, k[None], dim=2).abs().sum(0)
        torch.testing.assert_close(pool.usage(query())[0], expected.double(), rtol=1e-5, atol=1e-6)


class TestAPT:
    def test_it_has_two_vectors_a_block_and_no_loss(self) -> None:
        pool = made(APT)
        assert pool.layers == tuple(range(6))
        assert 0.01 < float(pool.vectors.detach().std()) < 0.03
        given = pool.prompts(None, 2, train=True)
        assert torch.equal(rows(given.k)[0, 0], pool.vectors[2, 0])
        assert torch.equal(rows(given.v)[0, 0], pool.vectors[2, 1])
        assert given.loss is None

    def test_the_running_mean(self) -> None:
        pool, seen = made(APT, 0), []
        for task in range(3):
            pool.begin_task(task)
            nudged(pool)
            seen.append(pool.vectors.detach().clone())
            pool.end_task()
            pool.end_task()  # a second time changes nothing
        expected = 0.7 * (0.7 * seen[0] + 0.3 * seen[1]) + 0.3 * seen[2]
        torch.testing.assert_close(pool.merged, expected)
        assert torch.equal(rows(pool.prompts(None, 4, train=False).v)[0, 0], pool.merged[4, 1])

    @pytest.mark.parametrize("merge", ["before", "after"])
    def test_targets_are_made_with_what_was_trained(self, merge: str) -> None:
        """The official code merges after the student's phase: zeros in task 1, stale prompts later (T7)."""
        pool = made(APT, 1, merge=merge)
        nudged(pool)
        first = rows(pool.prompts(None, 0, train=False).k)[0, 0]
        assert torch.equal(first, pool.vectors[0, 0] if merge == "before" else torch.zeros(DIM))
        pool.end_task()
        merged = pool.merged.clone()
        pool.begin_task(1)
        nudged(pool)
        second = rows(pool.prompts(None, 0, train=False).k)[0, 0]
        fresh = 0.7 * merged[0, 0] + 0.3 * pool.vectors[0, 0]
        torch.testing.assert_close(second, fresh.detach() if merge == "before" else merged[0, 0])
