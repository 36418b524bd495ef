"""The official way of each method, at the state that a method of ours has when a task begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cl_kernels.benchmarks import official, official_ends, official_steps
from cl_kernels.benchmarks.official_steps import AdamLoop, FTPLoop, SGDLoop, Trained
from cl_kernels.benchmarks.task_costs import Call, Official, Part, compared, every, layer_parts
from torch import Tensor

from cl_kernels.methods.gpm import subset
from cl_kernels.methods.nsp2 import ln_drift_loss

__all__ = ["WAYS"]


def _trained(method: Any) -> Trained:
    return Trained.of(method.optimizer, {p: name for name, p in method.trainable_parameters()})


def _matrices(method: Any) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Dense factors of the store's projectors, left and right."""
    sides = {name: method.store.sides(name) for name in method.store}
    return {
        name: tuple(None if one is None else one.matrix() for one in (both.left, both.right))
        for name, both in sides.items()
    }  # type: ignore[return-value]  # two of them


def _cut(cut: Any) -> official_ends.Cut:
    return official_ends.Cut(cut.rule.protected, cut.mix, cut.normalize == "fro")


def nsp2(method: Any, task: Any, rounds: int) -> Official:
    found = {int(name.rpartition(".")[2]): (c["right"], c["left"]) for name, c in method.memory.statistics.items()}
    cuts = method.memory.cuts
    memory = official_ends.PromptMoments(method.model, found, _cut(cuts["right"]), _cut(cuts["left"]))
    o = method.options
    loop = AdamLoop(_trained(method), _matrices(method), o.betas, o.eps, foreach=True)
    moments = method._previous
    prompts = list(method.model.prompts)

    def term(loss: Callable[[], Tensor]) -> Call:
        def call() -> list[Tensor]:
            value = loss()
            return [value.detach(), *torch.autograd.grad(value, prompts)]

        return call

    def parts() -> list[Part]:
        ours = term(lambda: ln_drift_loss(prompts, *moments))
        return [compared("drift term", ours, term(lambda: official_steps.drift(prompts, memory.previous)), rounds)]

    def made(done: Any) -> dict[str, Tensor]:
        both = {name: done.store.sides(name) for name in done.store}
        return {f"{n} {side}": getattr(s, side).matrix() for n, s in both.items() for side in ("left", "right")}

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        with unfused(method.backbone):
            features = official.prompts_as_rows(method.model, batch[0])
        value: Tensor = method._cross_entropy(features, batch[1])
        return value + o.ln_weight * official_steps.drift(prompts, memory.previous)

    return Official(loop, parts, end=lambda: memory.end(task.batches()), loss=loss, tensors=memory.tensors, ours=made)


def adam_nscl(method: Any, task: Any, rounds: int) -> Official:
    memory = method.memory
    scale = memory.rows if memory.accumulation == "rows" else {}
    sums = {n: c["right"] * scale.get(n, {}).get("right", 1.0) for n, c in memory.statistics.items()}
    means = method.options.statistic == "batch-mean"
    names = [name.removesuffix(".weight") for name in sums]
    theirs = official_ends.InputMoments(method.backbone, names, sums, _cut(memory.cuts["right"]), batch_means=means)
    o = method.options
    loop = AdamLoop(_trained(method), _matrices(method), o.betas, o.eps, foreach=False)
    return Official(loop, end=lambda: theirs.end(task.batches()), tensors=theirs.tensors, ours=_right)


def gpm(method: Any, task: Any, rounds: int) -> Official:
    bases = {name: sides["right"] for name, sides in method.memory.bases.items()}
    names = [name.removesuffix(".weight") for name in bases]
    keep = method.memory.keep
    theirs = official_ends.Representations(method.backbone, names, bases, lambda name: keep(method.memory.tasks, name))
    protected = {name: m.float() @ m.float().mT for name, m in bases.items()}
    images = subset(task.batches(), method.options.samples_per_task, seed=task.index)

    def made(done: Any) -> dict[str, Tensor]:
        return {name: sides["right"] @ sides["right"].mT for name, sides in done.memory.bases.items()}

    loop = SGDLoop(_trained(method), protected)
    return Official(loop, end=lambda: theirs.end(images), tensors=theirs.tensors, ours=made)


def ftp(method: Any, task: Any, rounds: int) -> Official:
    loop = FTPLoop(_trained(method), [name for name, _ in method._body()])

    def held() -> list[Tensor]:
        moments = {"exp_avg", "exp_avg_sq", "step"}
        state = [v[key] for v in method.optimizer.state.values() for key in v.keys() - moments]
        anchors = [t for one in method.optimizer._held.values() for t in (one.slot, one.record) if t is not None]
        return [*every(state), *anchors, *method._anchors.values()]

    return Official(loop, tensors=loop.tensors, held=held)


def lorac(method: Any, task: Any, rounds: int) -> Official:
    stack, o = method.model, method.options
    images = next(iter(task.batches()))[0][: task.batch_size]

    def pairs() -> list[tuple[Tensor, Tensor]]:
        return [(one.past_a, one.lora_a) for one in stack.places().values()]

    def term(loss: Callable[[], Tensor]) -> Call:
        def call() -> list[Tensor]:
            value = o.penalty * loss()
            return [value.detach(), *torch.autograd.grad(value, [new for _, new in pairs()])]

        return call

    def parts() -> list[Part]:
        penalty = compared("penalty", term(stack.penalty), term(lambda: official.lorac_penalty(pairs())), rounds)
        return [*layer_parts(stack, images, official_steps.lorac_layer, rounds), penalty]

    return Official(
        parts=parts, tensors=lambda: _pools(stack, task.index + 1, omegas=True),
        kept=lambda done: done.state_dict()["own"]["stack"],
    )  # fmt: skip


def inf_lora(method: Any, task: Any, rounds: int) -> Official:
    stack = method.model
    images = next(iter(task.batches()))[0][: task.batch_size]
    names = {f"backbone.{name}": name for name, _ in stack.layers()}  # the wrapped layers, seen from the stack
    bases = {f"{full}.weight": method.bases[name] for full, name in names.items()}
    keep = min(method.options.threshold + method.options.increment * task.index, 1.0)
    theirs = official_ends.Directions(stack, list(names), bases, method.options.rank, keep)

    def made(done: Any) -> dict[str, Tensor]:
        first = list(done.model.layers())
        out = {f"backbone.{name}.weight": done.bases[name] @ done.bases[name].mT for name, _ in first}
        for name, layer in first:
            part = next(one for _, one in layer.named_adapters())
            a = part.past_a[:, -done.options.rank :]
            out[f"backbone.{name}.weight A"] = a @ a.mT
        return out

    began: dict[str, Tensor] = {}

    def end() -> dict[str, Tensor]:
        return theirs.end(task.batches()) | {f"{name} A": a @ a.mT for name, a in began.items()}

    def begin() -> None:  # B is still 0, so that inputs are those of the model before the task
        began.update(theirs.begin(task.batches()))

    return Official(
        parts=lambda: layer_parts(stack, images, official_steps.inf_lora_layer, rounds),
        begin=(lambda: method._initial(task), begin), end=end,
        tensors=lambda: [*_pools(stack, task.index + 1, omegas=False), *theirs.tensors()], ours=made,
    )  # fmt: skip


WAYS: dict[str, Callable[[Any, Any, int], Official]] = {
    "nsp2": nsp2, "adam-nscl": adam_nscl, "gpm": gpm, "ftp": ftp, "lorac": lorac, "inf-lora": inf_lora,
}  # fmt: skip


@contextmanager
def unfused(backbone: Any) -> Iterator[None]:
    """timm's attention with its softmax written out, as the official code needs it to read the map."""
    layers = [block.attn for block in backbone.blocks]
    before = [layer.fused_attn for layer in layers]
    for layer in layers:
        layer.fused_attn = False
    try:
        yield
    finally:
        for layer, fused in zip(layers, before, strict=True):
            layer.fused_attn = fused


def _right(method: Any) -> dict[str, Tensor]:
    return {name: method.store.sides(name).right.matrix() for name in method.store}


def _pools(stack: Any, tasks: int, *, omegas: bool) -> list[Tensor]:
    """The factors of all tasks so far, one tensor each; LoRAC's shares, mask and snapshots beside them."""
    found = []
    for one in stack.places().values():
        found += [one.past_a.new_zeros(tasks, len(one.past_a), stack.rank)]
        found += [one.past_b.new_zeros(tasks, stack.rank, one.past_b.shape[1])]
        if omegas:
            found += [one.past_a.new_zeros(tasks), one.past_a.new_zeros(tasks), one.past_a.new_zeros(tasks, tasks)]
    return found
