"""What share of a ViT's training step each part costs, before (the official way) and after (ours).

`cl-kernels bench --end-to-end --out DIR`. The parts are the rooms' own cases at the model's shapes, checked and
measured one by one, and added up: a composition, not one long run. Work that ours does not touch is the same in both
columns. What is done once a task stands below the step. The model is ViT-B/16 with a few images; --quick takes a tiny
one, except for the LoRA stack, whose block is always ViT-B's; of its step only the adapted layers are in the sum.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from cl_kernels.benchmarks import (
    bench_distillation,
    bench_lora_stack,
    bench_null_space,
    bench_optim,
    bench_prefix_attention,
    bench_statistics,
    bench_weight_projection,
    figures,
    harness,
    records,
    suite,
)
from cl_kernels.benchmarks.options import Options
from torch import Tensor

from cl_kernels._timm import import_timm

__all__ = ["Part", "command", "parts", "shares"]


@dataclass(frozen=True)
class Model:
    """The shapes everything is measured at."""

    name: str = "ViT-B/16"
    width: int = 768
    depth: int = 12
    size: int = 224
    images: int = 4
    prompts: int = 10
    layers: int = 12  # of the optimizer's and the projectors' cases
    ftp: str = "ViT-B/16"
    classes: int = 100


TINY: Final = Model("a tiny ViT", 64, 2, 48, 2, 4, 2, "2 blocks of width 128", 20)


@dataclass(frozen=True)
class Part:
    """One part of a method's step (or of its task): its case, the official variant of it, how often it is done."""

    method: str
    name: str
    plan: harness.Plan
    before: str
    times: int = 1
    each: str = "step"


@harness.planned("forward and backward of all weights, width {width}, {depth} blocks, {images} images")
def training(width: int, depth: int, size: int, images: int, device: str) -> harness.Case:
    """A whole model's loss and gradients, which FTP leaves as they are."""
    import_timm()
    vit = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    model = vit(img_size=size, patch_size=16, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=10)
    model = model.to(device).eval()
    x, y = torch.randn(images, 3, size, size, device=device), torch.arange(images, device=device) % 10

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        return loss.detach()

    rows = (size // 16) ** 2 + 1
    flops = 3.0 * depth * images * (24 * rows * width**2 + 4 * rows**2 * width)
    return harness.Case({"ours": step}, step(), 1e-4, flops=flops)


def parts(model: Model, device: str) -> Iterator[Part]:
    """Method by method, in the order of a step."""
    m = model
    deep = bench_prefix_attention.vpt_deep(m.width, m.depth, m.images, m.prompts, m.size, device)
    yield Part("nsp2", "model, prompts trained", deep, "prompts as rows")
    many = bench_optim.optimizer_case(
        f"{m.name} prompts M={m.prompts}, rank {m.width // 12}",
        lambda: bench_optim.prompt_set(m.layers, m.prompts, m.width, m.width // 12),
        device,
    )
    yield Part("nsp2", "optimizer, projected", many, "official loop")
    setting = bench_statistics.Setting(m.name, m.width, m.depth, max(1, m.width // 64), m.size, 16, m.images)
    statistics = bench_statistics.prompt_pass(setting, m.prompts)
    yield Part("nsp2", "statistics, four batches", statistics, "official: J1 expanded", each="task")
    projectors = bench_null_space.projectors(m.layers, m.width, device=device, brief=True)
    yield Part("nsp2", "projectors", projectors, "official: full SVD loop, dense", each="task")
    whole = training(m.width, m.depth, m.size, m.images, device)
    yield Part("ftp-adamw", "model, all weights trained", whole, "ours")
    step = bench_weight_projection.step_case(m.ftp, 0.3, device)
    yield Part("ftp-adamw", "optimizer, projected", step, "official loop")
    adapted = bench_lora_stack.layers(5, m.images, device)
    yield Part("lora stack, 5 tasks", "adapted layers", adapted, "official rebuild", m.depth)
    penalty = bench_lora_stack.penalty(5, device)
    yield Part("lora stack, 5 tasks", "orthogonality penalty", penalty, "official", m.depth)
    soft = bench_distillation.two_heads(m.images, m.classes, torch.float32, device, False)
    yield Part("distillation", "student, all weights trained", whole, "ours")
    yield Part("distillation", "loss of two heads", soft, "official")


def shares(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each method its parts' seconds and shares of the step, before and after; `found`: rows of `measured`."""
    methods = []
    for name in dict.fromkeys(one["method"] for one in found):
        own = [one for one in found if one["method"] == name and one["each"] == "step"]
        total = {way: sum(one[way] for one in own) for way in ("before_s", "after_s")}
        rows = [
            one | {"before": one["before_s"] / total["before_s"], "after": one["after_s"] / total["after_s"]}
            for one in own
        ]
        tasks = [one for one in found if one["method"] == name and one["each"] == "task"]
        methods.append({"method": name, **total, "parts": rows, "once_a_task": tasks})
    return methods


def measured(part: Part, known: dict[str, Any], rates: harness.Rates, device: str, budget: float) -> dict[str, Any]:
    """A part's seconds before and after. Raises `ValueError` where a variant was wrong."""
    if part.plan.name not in known:
        known[part.plan.name] = harness.measure(part.plan, rates, device=device, budget_s=budget, peaks=False)
    rows = {row["variant"]: row for row in known[part.plan.name]["rows"]}
    for name in ("ours", part.before):
        if "median_s" not in rows.get(name, {}):
            raise ValueError(f"{part.plan.name}: {rows.get(name, {}).get('failed', f'{name} was not run')}")
    before, after = rows[part.before]["median_s"], rows["ours"]["median_s"]
    return {
        "method": part.method, "part": part.name, "each": part.each, "times": part.times, "case": part.plan.name,
        "before_s": part.times * before, "after_s": part.times * after,
    }  # fmt: skip


def command(given: Options, device: str) -> int:
    """Measure all parts, print the table, write DIR/end-to-end.json, .md and figures."""
    out, model = given.out or Path("bench-out"), TINY if given.quick else Model()
    report = suite.empty_report(given, device) | {"model": vars(model)}
    threads, known, found, wrong = torch.get_num_threads(), {}, [], []
    torch.set_num_threads(1)
    try:
        rates = harness.measure_rates(device)
        for part in parts(model, device):
            try:
                found.append(measured(part, known, rates, device, 0.05 if given.quick else given.case_budget))
            except (ValueError, ImportError, harness.NotHereError) as problem:
                wrong.append(f"{part.method}: {part.name}: {problem}")
    finally:
        torch.set_num_threads(threads)
    report |= {"results": [{"room": "end_to_end", **one} for one in known.values()], "methods": shares(found)}
    records.write(out / "end-to-end.json", report)
    text = markdown(report)
    (out / "end-to-end.md").write_text(text, encoding="utf-8")
    if figures.available():
        for one in report["methods"]:
            stacks = {way: {part["part"]: part[f"{way}_s"] for part in one["parts"]} for way in ("before", "after")}
            path = out / "figures" / f"step-{one['method'].replace(' ', '-').replace(',', '')}.png"
            figures.bars(path, f"{one['method']}: a training step of {model.name}", stacks)
    sys.stdout.write(text + "".join(f"WRONG: {line}\n" for line in wrong))
    return 1 if wrong else 0


def markdown(report: dict[str, Any]) -> str:
    """A table a method."""
    m, machine = report["model"], report["environment"]
    what = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    lines = [
        f"{m['name']}, {m['images']} images of {m['size']} pixels, on {what}, one thread, torch {machine['torch']}, "
        f"commit {machine['commit']}. Parts measured one by one and added up; before: the official way, after: ours.",
    ]
    for one in report["methods"]:
        lines += ["", f"### {one['method']}", "", "| part of a step | before | share | after | share |"]
        lines.append("|---|---:|---:|---:|---:|")
        for part in one["parts"]:
            before, after = records.unit(part["before_s"]), records.unit(part["after_s"])
            share = f"{100 * part['before']:.1f} % | {after} | {100 * part['after']:.1f} %"
            lines.append(f"| {part['part']} | {before} | {share} |")
        total = f"{records.unit(one['before_s'])} | | {records.unit(one['after_s'])} | "
        lines.append(f"| sum of these parts | {total} |")
        for task in one["once_a_task"]:
            times = f"{records.unit(task['before_s'])} | | {records.unit(task['after_s'])} | "
            lines.append(f"| once a task: {task['part']} | {times} |")
    return "\n".join(lines) + "\n"
