"""NSP2 against an independent, dense re-implementation of its whole timeline, and the exact form against its claims."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from continual_tiny import one_thread, tiny_model
from test_methods import Toy
from torch import Tensor

from cl_kernels import methods
from cl_kernels.methods.nsp2 import ln_drift_loss, prompt_moments

F64 = torch.float64

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


class Dense:
    """Everything of NSP2 by definition: full attention with prompts as queries too, J1 expanded, SVD, dense projectors,
    Adam written out. Shares no code with the package."""

    def __init__(self, weights: dict[str, Tensor], depth: int, heads: int, exact: bool) -> None:
        self.w, self.depth, self.heads, self.exact = weights, depth, heads, exact
        self.eta = 1.0 if exact else 0.97
        self.c1: list[Any] = [0.0] * depth
        self.c2: list[Any] = [0.0] * depth
        self.pairs: list[tuple[Tensor, Tensor]] | None = None
        self.previous: list[Tensor] | None = None
        self.classifiers: list[tuple[Tensor, Tensor]] = []

    def forward(self, prompts: list[Tensor], x: Tensor, seen: list[Any] | None = None) -> Tensor:
        w = self.w
        x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).mT
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
        n, d = x.shape[1], x.shape[2]
        for layer in range(self.depth):
            b = f"blocks.{layer}."
            z = torch.cat([x, prompts[layer].expand(len(x), -1, -1)], 1)
            z = F.layer_norm(z, (d,), w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-6)
            parts = (z @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"]).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
            s = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            out = (s @ v).transpose(1, 2).flatten(2) @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
            x = x + out[:, :n]
            z = F.layer_norm(x, (d,), w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-6)
            z = F.gelu(z @ w[b + "mlp.fc1.weight"].T + w[b + "mlp.fc1.bias"])
            x = x + z @ w[b + "mlp.fc2.weight"].T + w[b + "mlp.fc2.bias"]
            if seen is not None:
                seen.append((q[:, :, :n], s[:, :, :n, n:]))
        return F.layer_norm(x, (d,), w["norm.weight"], w["norm.bias"], 1e-6)[:, 0]

    def train(
        self, prompts: list[Tensor], head: list[Tensor], batches: list[Any], epochs: int, options: dict[str, Any]
    ) -> None:
        """One task: a new Adam; the learning rate falls after the epochs that method-null-space.md T4 gives."""
        params = [*prompts, *head]
        m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
        tau = 0
        for epoch in range(epochs):
            lr = options["lr"] * 0.1 ** ((epoch + 1 >= round(0.5 * epochs)) + (epoch + 1 >= round(0.8 * epochs)))
            for images, target in batches:
                tau += 1
                leaves = [p.clone().requires_grad_() for p in params]
                logits = F.linear(self.forward(leaves[: self.depth], images), *leaves[self.depth :])
                loss = F.cross_entropy(logits / options["temperature"], target)
                if self.previous is not None and not self.exact:
                    loss = loss + self.drift(leaves[: self.depth], self.previous)
                grads = torch.autograd.grad(loss, leaves)
                for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                    g = g + options["weight_decay"] * p
                    m[i] = 0.9 * m[i] + 0.1 * g
                    v[i] = 0.999 * v[i] + 0.001 * g * g
                    u = -lr / (1 - 0.9**tau) * m[i] / ((v[i] / (1 - 0.999**tau)).sqrt() + 1e-8)
                    if i < self.depth and self.pairs is not None:
                        left, right = self.pairs[i]
                        u = self.tangent(left @ u[0] @ right, p[0], left, right)[None]
                    p += u

    @staticmethod
    def drift(prompts: list[Tensor], previous: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=F64)
        for now, before in zip(prompts, previous, strict=True):
            for a, b in zip(now[0], before[0], strict=True):
                total = total + ((a.mean() - b.mean()).abs() + (a.std(correction=0) - b.std(correction=0)).abs()) / 4
        return total

    def tangent(self, x: Tensor, p: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if not self.exact:
            return x
        c = p - p.mean(1, keepdim=True)
        n = c @ right
        system = left * (c @ right @ c.T)
        mu = torch.linalg.pinv(system) @ (n * x).sum(1)
        return x - left @ torch.diag(mu) @ n

    def collect(self, prompts: list[Tensor], batches: list[Tensor]) -> None:
        for images in batches:
            seen: list[Any] = []
            self.forward(prompts, images, seen)
            for layer, (q, s) in enumerate(seen):
                d = q.shape[1] * q.shape[3]
                keys = self.w[f"blocks.{layer}.attn.qkv.weight"][d : 2 * d].unflatten(0, (self.heads, -1))
                j1 = torch.einsum("bhnd,hde->bhne", q, keys).reshape(-1, d)
                j2 = s.reshape(-1, s.shape[-1])
                rows = 1 if self.exact else len(j1)
                self.c1[layer] = self.c1[layer] + j1.T @ j1 / rows
                self.c2[layer] = self.c2[layer] + j2.T @ j2 / rows
        self.pairs = [(self.projector(a), self.projector(b)) for a, b in map(self.folded, range(self.depth), prompts)]
        self.previous = [p.clone() for p in prompts]

    def folded(self, layer: int, prompt: Tensor) -> tuple[Tensor, Tensor]:
        c1, c2 = self.c1[layer], self.c2[layer]
        if self.exact:
            d = len(c1)
            fold = torch.diag(self.w[f"blocks.{layer}.norm1.weight"]) @ (torch.eye(d, dtype=F64) - 1 / d)
            sigma = torch.diag(1 / (prompt[0].var(1, correction=0) + 1e-6).sqrt())
            c1, c2 = fold.T @ c1 @ fold, sigma @ c2 @ sigma
        return c2, c1

    def projector(self, c: Tensor) -> Tensor:
        u, values, _ = torch.linalg.svd(c)
        null = u[:, self.cut(values.numpy()) :]
        b = null @ null.T
        if not self.exact:
            b = b / torch.linalg.matrix_norm(b)
        return self.eta * b + (1 - self.eta) * torch.eye(len(c), dtype=F64)

    @staticmethod
    def cut(values: np.ndarray) -> int:
        n, drop, curve = len(values), 0, values
        if n >= 128:
            ndimage = pytest.importorskip("scipy.ndimage", reason="scipy gives the reference smoothing")
            curve, drop = ndimage.gaussian_filter1d(values, 10), int(0.03 * n / 2)
        bend = np.diff(curve, 2)[drop : n - 2 - drop]
        threshold = values[int(bend.argmax()) + drop + 1]
        return int(np.nonzero(values >= threshold)[0][-1])


@pytest.mark.parametrize(
    ("name", "dim", "depth", "heads"), [("nsp2", 32, 2, 2), ("nsp2", 128, 1, 4), ("nsp2-exact", 32, 2, 2)]
)
def test_the_whole_timeline_against_a_dense_reimplementation(name: str, dim: int, depth: int, heads: int) -> None:
    options = {**methods.published(name), "lr": 0.05}
    backbone = tiny_model(dim, depth, heads).double()
    exact = name == "nsp2-exact"
    dense = Dense({key: value.clone() for key, value in backbone.state_dict().items()}, depth, heads, exact)
    method: Any = methods.create(name, backbone, **options)
    prompts = [parameter.detach().clone() for key, parameter in method.model.named_parameters() if "prompts" in key]
    first_moves = []
    for index in range(3):
        task = Toy(index, (2 * index, 2 * index + 1), last=index == 2, epochs=4, dtype=F64, batch=6)
        images, labels = task.images()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(index))
        batches = [(images[rows], labels[rows]) for rows in order.split(7)]
        start = [p.clone() for p in prompts]
        method.begin_task(task)
        mine = dict(method.trainable_parameters())
        head = [mine[f"heads.{index}.{part}"].detach().clone() for part in ("weight", "bias")]
        if index == 1:  # the second task goes on from the first one's head
            head = [part.clone() for part in dense.classifiers[0]]
        for _ in range(task.epochs):
            for batch in batches:
                method.optimizer.zero_grad()
                method.loss(batch).backward()
                method.optimizer.step()
            method.scheduler.step()
        method.end_task(task, task.batches())
        dense.train(prompts, head, [(x, y - 2 * index) for x, y in batches], task.epochs, options)
        dense.classifiers.append((head[0], head[1]))
        if not task.last:
            dense.collect(prompts, [x for x, _ in task.batches()])
        first_moves.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(prompts, start, strict=True))))
    trained = dict(method.state_dict()["parameters"])
    for layer, prompt in enumerate(prompts):
        torch.testing.assert_close(trained[f"prompts.{layer}"], prompt, rtol=1e-6, atol=1e-6)
    for index, (weight, bias) in enumerate(dense.classifiers):
        torch.testing.assert_close(trained[f"heads.{index}.weight"], weight, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(trained[f"heads.{index}.bias"], bias, rtol=1e-6, atol=1e-6)
    images, _ = Toy(0, (0, 1), dtype=F64).images()
    expected = torch.cat([F.linear(dense.forward(prompts, images), *part) for part in dense.classifiers], 1)
    torch.testing.assert_close(method.predict(images), expected, rtol=1e-6, atol=1e-6)
    assert 0 < first_moves[1] < 0.7 * first_moves[0], "the projector must have acted, or nothing was tested"


class TestLayerNormLoss:
    now = torch.tensor([[[0.4, 0, 1.2], [0.3, 0.1, -0.7]]], dtype=F64)
    before = torch.tensor([[[0.5, -0.25, 1], [0.1, 0.2, -0.3]]], dtype=F64)

    def test_golden(self) -> None:
        # method-null-space.md 14.2, V4
        p = self.now.clone().requires_grad_()
        mean, std = prompt_moments([self.before])
        now_mean, now_std = prompt_moments([self.now])
        assert float((now_mean - mean).abs().mean()) == pytest.approx(0.1083333333, abs=1e-10)
        assert float((now_std - std).abs().mean()) == pytest.approx(0.1154191026, abs=1e-10)
        loss = ln_drift_loss([p], mean, std)
        assert float(loss.detach()) == pytest.approx(0.2237524359, abs=1e-10)
        (gradient,) = torch.autograd.grad(loss, p)
        expected = [[0.2112102070, 0.3448408279, -0.0560510349], [-0.0123633167, -0.0895149917, -0.3981216916]]
        torch.testing.assert_close(gradient[0], torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)

    def test_properties(self) -> None:
        # 14.1, property 13
        mean, std = prompt_moments([self.before])
        p = self.before.clone().requires_grad_()
        loss = ln_drift_loss([p], mean, std)
        assert float(loss.detach()) == 0
        assert torch.equal(torch.autograd.grad(loss, p)[0], torch.zeros_like(p))
        assert float(ln_drift_loss([self.before + 0.3], mean, std)) == pytest.approx(0.3, abs=1e-12)
        stretched = self.before - self.before.mean(-1, keepdim=True)
        mean, std = prompt_moments([stretched])
        expected = float((0.7 * std).mean())
        assert float(ln_drift_loss([1.7 * stretched], mean, std)) == pytest.approx(expected, abs=1e-12)

    def test_layers_add_up(self) -> None:
        mean, std = prompt_moments([self.before, self.now])
        assert mean.shape == (2, 2)
        both = ln_drift_loss([self.now, self.before], mean, std)
        one = ln_drift_loss([self.now], *prompt_moments([self.before]))
        other = ln_drift_loss([self.before], *prompt_moments([self.now]))
        torch.testing.assert_close(both, one + other)


def test_mean_accumulation_weighs_by_images_and_survives_a_checkpoint() -> None:
    first, second = Toy(0, (0, 1)), Toy(1, (2, 3, 4, 5))  # 16 and 32 images
    found: dict[str, list[dict[str, dict[str, Tensor]]]] = {}
    for accumulation in ("sum", "mean"):
        torch.manual_seed(0)
        method: Any = methods.create("nsp2", tiny_model(), accumulation=accumulation)
        kept = []
        for task in (first, second):
            method.begin_task(task)
            method.end_task(task, task.batches())
            kept.append({name: dict(sides) for name, sides in method.memory.statistics.items()})
            state, method = method.state_dict(), methods.create("nsp2", tiny_model(), accumulation=accumulation)
            method.load_state_dict(state)
        found[accumulation] = kept
    for name, total in found["sum"][1].items():
        for side in ("left", "right"):
            one, other = found["sum"][0][name][side], total[side] - found["sum"][0][name][side]
            assert torch.equal(found["mean"][0][name][side], one)
            torch.testing.assert_close(found["mean"][1][name][side], (16 * one + 32 * other) / 48)
