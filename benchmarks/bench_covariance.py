"""Second moments: C += X^T X, many layers in one call, and head Grams against the official NSP2 expansion.

The floor is half the multiplications of X^T X (one triangle) at the rate of torch's own square product in the same
process, or reading X once. Above 100 % means that the products themselves are faster than torch's: MKL does not use
AVX-512 on every processor that has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cl_kernels import ops

if __package__:
    from .harness import Case, can_compile, main
else:
    from harness import Case, can_compile, main

RATE = {torch.float32: "sgemm", torch.float64: "dgemm", torch.float16: "sgemm", torch.bfloat16: "bf16gemm"}


def state(d: int) -> Tensor:
    return torch.zeros(d, d, dtype=torch.float64)


def adding(product: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """What a user writes: form the product, add it to the state."""
    cov = state(x.shape[-1])
    return lambda: cov.add_(product(x))


def gram(x: Tensor) -> Tensor:
    return x.mT @ x


def wide_gram(x: Tensor) -> Tensor:
    wide = x.float()
    return wide.mT @ wide


def one_layer(n: int, d: int, dtype: torch.dtype, compiled: Callable[[Tensor], Tensor] | None) -> Case:
    x = torch.randn(n, d).to(dtype)
    cov = state(d)
    exact = x.double().mT @ x.double()
    variants: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ops.update_covariance_(cov, x),
        "torch C += X.T @ X": adding(gram, x),
    }
    tolerance = {"ours": 1e-6, "torch C += X.T @ X": 1e-2 if dtype.itemsize == 2 else 1e-4}  # 50000 x 4: 4e-5
    if dtype.itemsize == 2:
        variants["torch, X.float() first"] = adding(wide_gram, x)
        tolerance["torch, X.float() first"] = 1e-4
    if compiled is not None:
        variants["torch.compile"] = adding(compiled, x)
        tolerance["torch.compile"] = tolerance["torch C += X.T @ X"]
    return Case(
        f"covariance {n}x{d} {str(dtype).removeprefix('torch.')}",
        variants,
        exact,
        tolerance,
        flops=n * d * (d + 1),
        bytes_moved=x.nbytes,
        rate=RATE[dtype],
        notes={"state": "float64"},
    )


def many_layers(layers: int, n: int, d: int, dtype: torch.dtype) -> Case:
    xs = [torch.randn(n, d).to(dtype) for _ in range(layers)]
    covs, plain = [state(d) for _ in xs], [state(d) for _ in xs]
    exact = [x.double().mT @ x.double() for x in xs]

    def ours() -> list[Tensor]:
        ops.update_covariances_(covs, xs)
        return covs

    def loop() -> list[Tensor]:
        return [cov.add_(wide_gram(x)) for cov, x in zip(plain, xs, strict=True)]

    return Case(
        f"covariances {layers} layers of {n}x{d} {str(dtype).removeprefix('torch.')}",
        {"ours": ours, "torch loop, X.float().T @ X.float()": loop},
        exact,
        1e-6,
        flops=layers * n * d * (d + 1),
        bytes_moved=sum(x.nbytes for x in xs),
        rate=RATE[dtype],
    )


def head_grams(images: int, heads: int = 12, tokens: int = 197, width: int = 64) -> Case:
    """One layer of NSP2's first matrix: the key-side statistic of `images` images."""
    d = heads * width
    qkv = torch.randn(images, tokens, 3, heads, width)
    q = qkv.permute(2, 0, 3, 1, 4)[0] + 0.5  # [B, H, N, dh], with a mean as real queries have
    weight = torch.randn(d, d) / d**0.5
    slices = weight.reshape(heads, width, d)
    grams, plain = torch.zeros(heads, width, width, dtype=torch.float64), torch.zeros(heads, width, width)
    official_state = state(d)
    rows = torch.einsum("bhnd,hde->bhne", q.double(), slices.double()).reshape(-1, d)
    exact = rows.mT @ rows

    def official() -> Tensor:
        """Keys' weights repeated over the batch, queries expanded to D, one D x D Gram (train_eval.py:552-568)."""
        expanded = q @ slices.expand(images, heads, width, d)
        flat = expanded.reshape(-1, d)
        return official_state.add_(flat.mT @ flat)

    def torch_grams() -> Tensor:
        flat = q.transpose(0, 1).reshape(heads, -1, width)
        plain.add_(flat.mT @ flat)
        return plain

    def ours() -> Tensor:
        return ops.update_head_grams_(grams, q)

    def expanded(update: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Checked once as the expanded matrix; later calls are the update alone, because a task expands once."""
        first = True

        def call() -> Tensor:
            nonlocal first
            result = update()
            if first:
                first = False
                return ops.expand_head_grams(result, weight).to(torch.float64)
            return result

        return call

    return Case(
        f"head Grams {images}x{heads}x{tokens}x{width} float32",
        {"ours": expanded(ours), "torch batched Grams": expanded(torch_grams), "official expansion": official},
        exact,
        2e-6,
        flops=images * tokens * heads * width * (width + 1),
        bytes_moved=q.nbytes,
        notes={"expansion": "timed apart"},
    )


def expansion(heads: int = 12, width: int = 64) -> Case:
    d = heads * width
    grams, weight = torch.randn(heads, width, width, dtype=torch.float64), torch.randn(d, d)
    grams = grams @ grams.mT
    exact = torch.einsum(
        "hae,hab,hbf->ef",
        *(t.double() for t in (weight.view(heads, width, d), grams)),
        weight.view(heads, width, d).double(),
    )
    return Case(
        f"expand head Grams {heads}x{width} to {d}",
        {"ours": lambda: ops.expand_head_grams(grams, weight)},
        exact,
        1e-13,
        flops=2 * d * d * (d + width),
        rate="dgemm",
    )


def cases(quick: bool) -> Iterable[Case]:
    compiled = torch.compile(gram) if not quick and can_compile() else None
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        sizes = [(788, 128)] if quick else [(25216, 768), (6304, 768), (25216, 384), (6304, 1024)]
        if dtype == torch.float16 and not quick:
            sizes = [(6304, 384)]  # torch's float16 product takes a second there
        for n, d in sizes:
            yield one_layer(n, d, dtype, compiled if (n, d) == (6304, 768) else None)
    if not quick:
        yield one_layer(6304, 3072, torch.float32, None)
        yield one_layer(6304, 3072, torch.bfloat16, None)
    for n, d in [(197, 64)] if quick else [(197, 64), (788, 128), (64, 768), (50_000, 4)]:
        for dtype in (torch.float32, torch.bfloat16):
            yield one_layer(n, d, dtype, None)
    yield many_layers(2 if quick else 12, 197 if quick else 1576, 128 if quick else 768, torch.bfloat16)
    yield many_layers(2 if quick else 12, 197 if quick else 1576, 128 if quick else 768, torch.float32)
    yield head_grams(1, heads=2) if quick else head_grams(4)
    yield expansion(2) if quick else expansion()


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
