"""What a pass that gathers statistics costs beside the forward pass it rides on, and a prompted beside a plain forward.

The promise is at most 1.3 forward passes. Prompt statistics keep it. Those of every linear's input do not: their
triangles alone take 19 d^2 operations a token beside the block's 24 d^2, because the input of fc2 is 4 d wide;
rounding the rows to bfloat16 brings it down where the processor multiplies 16 bits faster.
"official" reads J1 = q W_k of every head and the whole softmax, as the repository of NSP2 does. Outputs checked: the
features, which gathering must not change; and for the inputs of one block of ViT-B at a batch of 128, where the memory
beside the state is measured (promised: at most 64 MB), the sums themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from cl_kernels.benchmarks import official
from cl_kernels.benchmarks.harness import Case, Plan, main, planned
from torch import Tensor

from cl_kernels import CovarianceCollector
from cl_kernels._timm import import_timm
from cl_kernels.nn import PromptedViT

TABLE = (
    "prompt statistics, embedded",
    "input statistics of every linear, embedded",
    "inputs of the linears of 1 blocks, 6304",
)


def vit(width: int, depth: int, heads: int, size: int, patch: int) -> torch.nn.Module:
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
    ).eval()


class Setting(NamedTuple):
    """A model by its sizes, and how many images it sees at once."""

    name: str
    width: int
    depth: int
    heads: int
    size: int
    patch: int
    images: int

    def made(self) -> tuple[torch.nn.Module, Tensor]:
        model = vit(self.width, self.depth, self.heads, self.size, self.patch)
        return model, torch.randn(self.images, 3, self.size, self.size)


def passes(model: torch.nn.Module, images: Tensor, batches: int = 4) -> Tensor:
    """Several batches, because a collector is entered once a task and not once a batch; the last features."""
    for _ in range(batches - 1):
        model(images)
    return model(images)


@planned("prompt statistics, {setting.name}")
def prompt_pass(setting: Setting, prompts: int = 4) -> Case:
    backbone, images = setting.made()
    model = PromptedViT(backbone, prompts=prompts)
    collector = CovarianceCollector(model, what="prompt")

    @torch.no_grad()
    def gathering() -> Tensor:
        with collector:
            return passes(model, images)

    @torch.no_grad()
    def officially() -> Tensor:
        return official.nsp2_statistics(model, lambda: passes(model, images))

    @torch.no_grad()
    def plain() -> Tensor:
        return passes(model, images)

    return Case(
        {"ours": gathering, "forward alone": plain, "official: J1 expanded": officially},
        plain(),
        1e-6,
        yardsticks=("forward alone",),
    )


@planned("input statistics of every linear, {setting.name}")
def input_pass(setting: Setting) -> Case:
    backbone, images = setting.made()

    def gathering(row_dtype: torch.dtype | None) -> Callable[[], Tensor]:
        collector = CovarianceCollector(backbone, "linear", row_dtype=row_dtype)

        @torch.no_grad()
        def call() -> Tensor:
            with collector:
                return passes(backbone, images)

        return call

    @torch.no_grad()
    def plain() -> Tensor:
        return passes(backbone, images)

    @torch.no_grad()
    def eager() -> Tensor:
        def read(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)
            sums[module] = sums[module] + rows.mT @ rows if module in sums else rows.mT @ rows

        sums: dict[torch.nn.Module, Tensor] = {}
        linears = [module for module in backbone.modules() if isinstance(module, torch.nn.Linear)]
        handles = [module.register_forward_pre_hook(read) for module in linears]
        try:
            return passes(backbone, images)
        finally:
            for handle in handles:
                handle.remove()

    return Case(
        {
            "ours": gathering(None),
            "ours, row_dtype=bfloat16": gathering(torch.bfloat16),
            "forward alone": plain,
            "hooks with X.T @ X in float32": eager,
        },
        plain(),
        1e-6,
        yardsticks=("forward alone",),
    )


@planned("inputs of the linears of {blocks} blocks, {rows} rows, width {width}")
def block_inputs(rows: int, width: int, blocks: int) -> Case:
    """The inputs of the linears of a few blocks, as one batch brings them, without the model's own memory around."""
    narrow, wide = torch.randn(rows, width), torch.randn(rows, 4 * width)
    layers = [(f"blocks.{i}.{name}.weight", narrow) for i in range(blocks) for name in ("qkv", "proj", "fc1")]
    layers += [(f"blocks.{i}.fc2.weight", wide) for i in range(blocks)]
    numbers = sum(x.shape[1] * (x.shape[1] + 1) for _, x in layers)  # a matrix and a sum of rows a layer

    def gathering(row_dtype: torch.dtype | None) -> Callable[[], CovarianceCollector]:
        def call() -> CovarianceCollector:
            collector = CovarianceCollector(row_dtype=row_dtype)
            for name, x in layers:
                collector.update(name, x)
            return collector

        return call

    def plain(convert: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            sums = {name: x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32) for name, x in layers}
            for name, x in layers:
                sums[name] = sums[name] + (convert(x).mT @ convert(x)).float()
            return list(sums.values())

        return call

    exact = {id(x): x.double().mT @ x.double() for x in (narrow, wide)}

    def sums(found: CovarianceCollector | list[Tensor]) -> list[Tensor]:
        return found if isinstance(found, list) else [one.matrix for one in found.covariances().values()]

    variants: dict[str, Callable[[], Any]] = {
        "ours": gathering(None),
        "ours, row_dtype=bfloat16": gathering(torch.bfloat16),
        "C = C + X.T @ X in float32": plain(lambda x: x),
        "C = C + X.T @ X, product in bfloat16": plain(lambda x: x.bfloat16()),
    }
    state = {name: numbers * (8 if name.startswith("ours") else 4) for name in variants}
    return Case(
        variants,
        [exact[id(x)] for _, x in layers],
        {name: 1e-6 if name == "ours" else 1e-2 for name in variants},
        flops=sum(x.shape[0] * x.shape[1] * (x.shape[1] + 1.0) for _, x in layers),
        kept_bytes=state,
        read=sums,
        notes={"reading": "a pass is the updates and the reading, which copies nothing"},
    )


def cases(quick: bool) -> Iterable[Plan]:
    embedded = Setting("embedded model", 128, 4, 4, 32, 8, 20 if quick else 100)
    yield prompt_pass(embedded)
    yield input_pass(embedded)
    yield block_inputs(788, 64, 2) if quick else block_inputs(6304, 768, 1)
    if not quick:
        yield block_inputs(25216, 768, 1)
        small = Setting("two blocks of ViT-S/16", 384, 2, 6, 224, 16, 8)
        yield prompt_pass(small)
        yield input_pass(small)


if __name__ == "__main__":
    sys.exit(main(__name__))
