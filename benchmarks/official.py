"""The official repositories' ways of doing it, written anew from their formulas, in one place.

Each is a variant of a benchmark, where its output is checked against float64 before it is timed; tests/test_official.py
checks that none is left out. Kept are the steps that cost: what is expanded, looped over, formed again or read on the
host. FTP's recurrence is in official_ftp.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "attention_map",
    "distillation",
    "dkd",
    "expanded_gram",
    "frozen_movement",
    "kdp_task",
    "lorac_penalty",
    "lorac_weight",
    "nsp2_apply",
    "nsp2_statistics",
    "prompts_as_rows",
    "svd_free_basis",
]


def expanded_gram(q: Tensor, slices: Tensor) -> Tensor:
    """VPT-NSP2, first matrix: keys' weights repeated over the batch, queries expanded to D, one D x D Gram.

    `q` [B, H, N, dh], `slices` [H, dh, D] -> [D, D].
    """
    flat = (q @ slices.expand(len(q), *slices.shape)).reshape(-1, slices.shape[-1])
    return flat.mT @ flat


def nsp2_statistics(
    model: Any, forward: Callable[[], Tensor], sums: dict[int, tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """VPT-NSP2, reading a pass: J1 = q W_k of every head, the whole softmax, a Gram of each, layer by layer.

    `sums`: by block, (C1 [D, D], C2 [M, M]) so far; the means of each batch are added.
    """
    found = {} if sums is None else sums

    def read(block: int, q: Tensor, mass: Tensor) -> None:
        weight = model.key_weight(block).unflatten(0, (q.shape[1], -1))
        rows = torch.einsum("bhnd,hdw->bhnw", q, weight).flatten(0, 2)
        right = rows.mT @ rows / len(rows)
        left = mass.flatten(0, 2).mT @ mass.flatten(0, 2) / len(rows)
        if block in found:
            right, left = found[block][0] + right, found[block][1] + left
        found[block] = right, left

    with model.observe(read):
        return forward()


def svd_free_basis(cov: Tensor, cut: int) -> Tensor:
    """NSP2 and Adam-NSCL: the free directions from a full SVD of the covariance."""
    return torch.linalg.svd(cov)[0][:, cut:]


def nsp2_apply(
    params: Sequence[Tensor], updates: Iterable[Tensor], left: Sequence[Tensor | None], right: Sequence[Tensor | None]
) -> None:
    """VPT-NSP2, after the foreach Adam of all parameters: dense factors, parameter by parameter."""
    for p, u, a, b in zip(params, updates, left, right, strict=True):
        u = u if a is None else a @ u
        p.data.add_(u if b is None else u @ b)


def frozen_movement(
    net: nn.Module, optimizer: torch.optim.Optimizer, dense: Mapping[str, Sequence[Tensor | None]]
) -> None:
    """A step of a plain optimizer, then each projected parameter's movement multiplied by dense (left, right)."""
    named = dict(net.named_parameters())
    before = {name: named[name].detach().clone() for name in dense}
    optimizer.step()
    with torch.no_grad():
        for name, (left, right) in dense.items():
            p, old = named[name], before[name]
            u = p - old
            u = u if left is None else left @ u
            p.copy_(old + (u if right is None else u @ right))


def lorac_weight(
    base: Tensor, lora_a: Tensor, lora_b: Tensor, past: tuple[Tensor, Tensor, Tensor] | None, scale: float
) -> Tensor:
    """LoRAC: W_0 + s (sum omega_i A_i B_i + A_t B_t), formed from one dense product for each task in every forward.

    `base` [out, in], `lora_a` [in, r], `lora_b` [r, out]; `past`: A [tasks, in, r], B [tasks, r, out], omega [tasks].
    """
    delta = lora_a @ lora_b
    if past is not None:
        old_a, old_b, omega = past
        delta = delta + (omega[:, None, None] * torch.einsum("tdr,trl->tdl", old_a, old_b)).sum(dim=0)
    return base + (scale * delta).mT


def lorac_penalty(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """LoRAC's orthogonality: the sum over positions of |S^T S - I| with S = [A_1 .. A_t], all of it every time."""
    terms = []
    for old, new in pairs:
        stack = torch.cat([old, new], dim=-1)
        gram = stack.mT @ stack
        terms.append((gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).norm())
    return torch.stack(terms).sum()


def distillation(z: Tensor, s: Tensor, t: Tensor, y: Tensor, *, alpha: float, temperature: float) -> Tensor:
    """CE of one head and KL of another: softmax of the teacher, summed kl_div, division by the batch, T^2."""
    with torch.no_grad():
        p_t = F.softmax(t / temperature, dim=1)
    soft = F.kl_div(F.log_softmax(s / temperature, dim=1), p_t, reduction="sum") / s.shape[0]
    return F.cross_entropy(z, y) * (1 - alpha) + soft * (temperature**2) * alpha


def dkd(s: Tensor, t: Tensor, y: Tensor, *, temperature: float = 4.0, beta: float = 4.0) -> Tensor:
    """DKD as its authors write it, with 1000 subtracted from the target's logit; that is float32's limit."""
    rows, hot = len(s), F.one_hot(y, s.shape[1])
    p, q = F.softmax(s / temperature, 1), F.softmax(t / temperature, 1)
    two_s, two_t = (torch.stack([(x * hot).sum(1), (x * (1 - hot)).sum(1)], 1) for x in (p, q))
    two_way = F.kl_div(two_s.log(), two_t, reduction="sum") * temperature**2 / rows
    low = 1000 * hot
    rest = F.kl_div(F.log_softmax(s / temperature - low, 1), F.softmax(t / temperature - low, 1), reduction="sum")
    return two_way + beta * rest * temperature**2 / rows


def attention_map(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Attention over a prefix with the softmax written out and its map in memory, as the prompt repositories do."""
    keys, values = (torch.cat((x, p.expand(len(x), -1, -1, -1)), 2) for x, p in ((k, prefix_k), (v, prefix_v)))
    return ((q @ keys.mT) * q.shape[-1] ** -0.5).softmax(-1) @ values


def prompts_as_rows(model: Any, x: Tensor) -> Tensor:
    """VPT-deep: every prompt is a row of its block, with a query, an output and an MLP, all of it thrown away."""
    body = model.backbone
    rows = body.norm_pre(body._pos_embed(body.patch_embed(x)))
    count = model.prompts[0].shape[1]
    for index, block in enumerate(body.blocks):
        prompt = model.prompts[index].expand(len(x), -1, -1)
        rows = block(torch.cat((rows[:, :1], prompt, rows[:, 1 if index == 0 else 1 + count :]), 1))
    rows = torch.cat((rows[:, :1], rows[:, 1 + count :]), 1)  # a head that averages would see them
    features: Tensor = body.forward_head(body.norm(rows), pre_logits=True)
    return features


def kdp_task(
    method: Any,
    images: Tensor,
    labels: Tensor,
    order: Callable[[], Iterable[Tensor]],
    step: Callable[[Any, Tensor], None],
) -> None:
    """Both phases of a task of KDP: backbones unfrozen, each model's query by itself, a correlation nobody reads."""
    student, teacher = method.model, method.teacher.model
    student.prune = teacher.prune = False
    for model in (student, teacher):
        for parameter in model.backbone.parameters():
            parameter.requires_grad_()
    correlations: dict[int, Tensor] = {}
    for index, block in enumerate(teacher.backbone.blocks):
        block.register_forward_hook(
            lambda _, __, out, index=index: correlations.update({index: (out @ out.mT).detach()})
        )
    for phase in (0, 1):
        if phase:
            method.begin_phase(phase)
        for rows in order():
            batch = images[rows], labels[rows]
            if phase:
                student.query(batch[0])  # the student's own copy of what the teacher's pool has asked
            step(method, method.loss(batch))
