"""Attention over tokens and a prefix, forward and with gradients; VPT-deep as a prefix against prompts as rows.

Against torch's attention over concatenated keys (eager and compiled), and the softmax written out as the official
prompt repositories do. "ours" takes the merge by log-sum-exp or the concatenation, by shape; "merged" always merges.
"prefix alone" is the first block of a frozen model: the tokens need no gradient.

The whole-model case is the issue's: in the official VPT every prompt is a row of its block, with a query, an output and
an MLP, all of it thrown away; as a prefix it has a key and a value.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from cl_kernels.benchmarks import official
from cl_kernels.benchmarks.harness import Case, Plan, can_compile, main, planned
from cl_kernels.benchmarks.options import expect
from torch import Tensor
from torch.nn import functional as F

from cl_kernels._timm import import_timm
from cl_kernels.nn import PromptedViT
from cl_kernels.ops import prefix_attention, use_backend

TABLE = (
    "VPT-deep ViT width 384",
    "prefix attention 8x6, 197 tokens of 64 + 100 shared, float32, forward + backward",
    "prefix attention 8x6, 197 tokens of 64 + 100 shared, float32, prefix alone",
    "prefix attention 64x6, 2 queries of 198 tokens of 64 + 53 shared, float32, forward + backward",
    "prefix attention 64x6, 17 tokens of 64",
)
SHAPE = "vit-s16"
FORWARD, ALL, PREFIX = "forward", "forward + backward", "prefix alone, forward + backward"
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


class Sizes(NamedTuple):
    """Images, heads, queries, tokens, keys of the prefix, width of a head, whether the images share the prefix."""

    images: int
    heads: int
    queries: int
    tokens: int
    prefix: int
    width: int = 64
    shared: bool = True

    @property
    def name(self) -> str:
        queries = "" if self.queries == self.tokens else f"{self.queries} queries of "
        owner = "shared" if self.shared else "own"
        return f"{self.images}x{self.heads}, {queries}{self.tokens} tokens of {self.width} + {self.prefix} {owner}"


def concatenated(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    keys, values = (torch.cat((x, p.expand(len(x), -1, -1, -1)), 2) for x, p in ((k, prefix_k), (v, prefix_v)))
    return F.scaled_dot_product_attention(q, keys, values)


def merged(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    with use_backend("triton" if q.is_cuda else "reference"):
        return prefix_attention(q, k, v, prefix_k, prefix_v)


def tensors(sizes: Sizes, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v as a fused projection gives them, then the prefix."""

    def heads(images: int, rows: int) -> Tensor:
        return torch.randn(images, rows, sizes.heads, sizes.width, device=device).to(dtype).transpose(1, 2)

    fused = torch.randn(sizes.images, sizes.tokens, 3, sizes.heads, sizes.width, device=device).to(dtype)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    owners = 1 if sizes.shared else sizes.images
    q = q if sizes.queries == sizes.tokens else heads(sizes.images, sizes.queries)
    return [q, k, v, heads(owners, sizes.prefix), heads(owners, sizes.prefix)]


@planned("prefix attention {sizes.name}, {dtype}, {what}")
def attention(
    sizes: Sizes, what: str, device: str, dtype: torch.dtype = torch.float32, *, compiled: bool = False
) -> Case:
    given = tensors(sizes, dtype, device)
    trained = {FORWARD: [], ALL: given, PREFIX: given[3:]}[what]
    for x in trained:
        x.requires_grad_()
    weight = torch.randn(sizes.images, sizes.queries, sizes.heads, sizes.width, device=device).to(dtype).transpose(1, 2)

    def call(form: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(bool(wanted)):
            out = form(*inputs)
        return [out.detach(), *(torch.autograd.grad(out, wanted, weight.to(out.dtype)) if wanted else ())]

    forms = {
        "ours": prefix_attention,
        "torch concat + SDPA": concatenated,
        "softmax written out": official.attention_map,
    }
    forms["merged"] = merged
    if compiled and can_compile():
        forms["torch.compile of concat + SDPA"] = torch.compile(concatenated, fullgraph=True)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    expected = call(official.attention_map, wide, [x for x in wide if x.requires_grad])
    b, h, n, m, d = sizes.images, sizes.heads, sizes.queries, sizes.tokens + sizes.prefix, sizes.width
    queries, keys = b * h * n * d, b * h * sizes.tokens * d
    moved = {FORWARD: 2 * queries + 2 * keys, ALL: 6 * queries + 6 * keys, PREFIX: 5 * queries + 2 * keys}[what]
    extra = {FORWARD: 0, ALL: 10 * m, PREFIX: 8 * sizes.prefix}[what]
    return Case(
        {name: lambda form=form: call(form, given, trained) for name, form in forms.items()},
        expected,
        TOLERANCE[dtype],
        flops=float(b * h * n * d * (4 * m + extra)),
        bytes_moved=float(moved * given[0].element_size()),
        rate="sgemm" if dtype == torch.float32 else "bf16gemm",
    )


def model_title(width: int, depth: int, images: int, prompts: int, size: int, **_: str) -> str:
    rows = (size // 16) ** 2 + 1
    return f"VPT-deep ViT width {width}, {depth} blocks, {images} images of {rows} rows, {prompts} prompts"


@planned(model_title)
def vpt_deep(width: int, depth: int, images: int, prompts: int, size: int, device: str) -> Case:
    """A frozen timm ViT with patches of 16 and prompts in every block: the feature and the gradients of all prompts."""
    import_timm()
    vit = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    backbone = vit(img_size=size, patch_size=16, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=0)
    model = PromptedViT(backbone, prompts, init="vpt").to(device)
    x = torch.randn(images, 3, size, size, device=device)
    weight = torch.randn(images, width, device=device)

    def step(form: Callable[[PromptedViT, Tensor], Tensor], model: PromptedViT, x: Tensor) -> list[Tensor]:
        features = form(model, x)
        return [features.detach(), *torch.autograd.grad(features, list(model.prompts), weight.to(features))]

    model.double()
    expected = step(official.prompts_as_rows, model, x.double())
    model.float()
    rows = (size // 16) ** 2 + 1
    linear = 24 * rows * width**2
    scores = rows * (rows + prompts) * width
    return Case(
        {
            "ours": lambda: step(PromptedViT.forward, model, x),
            "prompts as rows": lambda: step(official.prompts_as_rows, model, x),
        },
        expected,
        2e-5,
        flops=float(depth * images * (2 * linear + 14 * scores)),
        rate="sgemm",
    )


def custom(sizes: Sequence[int], dtype: torch.dtype | None, device: str) -> Iterable[Plan]:
    expect("prefix_attention", sizes, "images x heads x tokens x prefix")
    images, heads, tokens, prefix = sizes
    given = Sizes(images, heads, tokens, tokens, prefix)
    yield attention(given, ALL, device, dtype or torch.float32)


def cases(quick: bool) -> Iterable[Plan]:
    if quick:
        for what in (FORWARD, ALL, PREFIX):
            yield attention(Sizes(2, 3, 17, 17, 5), what, "cpu")
        yield attention(Sizes(3, 2, 2, 30, 7, 32, shared=False), ALL, "cpu")
        yield vpt_deep(64, 2, 2, 20, 48, "cpu")
        return
    yield vpt_deep(384, 12, 4, 100, 224, "cpu")
    for prefix in (4, 100):
        for what in (FORWARD, ALL, PREFIX):
            yield attention(Sizes(8, 6, 197, 197, prefix), what, "cpu", compiled=what == ALL)
    yield attention(Sizes(64, 6, 2, 198, 53), FORWARD, "cpu")
    yield attention(Sizes(64, 6, 2, 198, 53), ALL, "cpu")
    yield attention(Sizes(64, 6, 17, 17, 100), ALL, "cpu")
    yield attention(Sizes(8, 6, 197, 197, 50, shared=False), ALL, "cpu")
    yield attention(Sizes(8, 6, 197, 197, 50), ALL, "cpu", torch.bfloat16)


def cuda_cases(quick: bool) -> Iterable[Plan]:
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        for prefix in (4, 100):
            for what in (FORWARD, ALL, PREFIX):
                yield attention(Sizes(64, 6, 197, 197, prefix), what, "cuda", dtype, compiled=not quick)
        yield attention(Sizes(64, 6, 2, 198, 53), ALL, "cuda", dtype)
        yield attention(Sizes(64, 12, 197, 197, 50, shared=False), ALL, "cuda", dtype)
        yield attention(Sizes(64, 12, 197, 197, 200), ALL, "cuda", dtype)
    if not quick:
        yield vpt_deep(768, 12, 32, 100, 224, "cuda")


if __name__ == "__main__":
    sys.exit(main(__name__))
