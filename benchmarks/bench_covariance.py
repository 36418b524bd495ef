"""Second moments: C += X^T X, many layers in one call, and head Grams against the official NSP2 expansion.

The floor is half the multiplications of X^T X (one triangle) at the rate of torch's own square product in the same
process, or reading X once. Above 100 % means that the products themselves are faster than torch's: MKL does not use
AVX-512 on every processor that has it. On a GPU the triangle is counted in tiles of 128, at the rate of the best format
that keeps the accuracy: bf16 for 16-bit rows, a third of fp16 for float32 ones. The official expansion of 256 images
takes 1.9 GB and several seconds a call; it is measured, not extrapolated, with fewer rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from cl_kernels.benchmarks import official
from cl_kernels.benchmarks.harness import Case, Plan, can_compile, main, planned
from cl_kernels.benchmarks.options import expect
from torch import Tensor

from cl_kernels import ops

TABLE = (
    "head Grams 4x12",
    "head Grams 256x12",
    "covariance 25216x768 float32",
    "covariance 25216x768 bfloat16",
    "covariance 6304x3072 float32",
    "covariances 12 layers of 1576x768 float32",
)
RATE = {torch.float32: "sgemm", torch.float64: "dgemm", torch.float16: "sgemm", torch.bfloat16: "bf16gemm"}
CUDA_RATE = {torch.float32: "split3gemm", torch.float64: "dgemm", torch.float16: "bf16gemm", torch.bfloat16: "bf16gemm"}
CUDA_ERROR = 5e-6  # tensor cores truncate when they add: 7e-7 of the largest eigenvalue between two promotions
TILE = 128  # of the GPU kernel; diagonal tiles are computed whole


def state(d: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(d, d, dtype=dtype, device=device)


def adding(product: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    """What a user writes: form the product, add it to the state."""
    cov = state(x.shape[-1], x.device.type, dtype)
    return lambda: cov.add_(product(x))


def gram(x: Tensor) -> Tensor:
    return x.mT @ x


def wide_gram(x: Tensor) -> Tensor:
    wide = x.float()
    return wide.mT @ wide


def float32_out_gram(x: Tensor) -> Tensor:
    """The best form that torch has for 16-bit rows on a GPU: products summed and returned in float32."""
    product: Tensor = torch.mm(x.mT, x, out_dtype=torch.float32)
    return product


def tf32_gram(x: Tensor) -> Tensor:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return x.mT @ x
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@planned("covariance {n}x{d} {dtype}")
def one_layer(n: int, d: int, dtype: torch.dtype, *, compiled: bool = False) -> Case:
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
    if compiled and can_compile():
        variants["torch.compile"] = adding(torch.compile(gram), x)
        tolerance["torch.compile"] = tolerance["torch C += X.T @ X"]
    return Case(
        variants,
        exact,
        tolerance,
        flops=n * d * (d + 1),
        bytes_moved=x.nbytes,
        rate=RATE[dtype],
        notes={"state": "float64"},
    )


@planned("covariances {layers} layers of {n}x{d} {dtype}")
def many_layers(layers: int, n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    xs = [torch.randn(n, d, device=device).to(dtype) for _ in range(layers)]
    covs = [state(d, device) for _ in xs]
    variants: dict[str, Callable[[], list[Tensor]]] = {"ours": lambda: (ops.update_covariances_(covs, xs), covs)[1]}

    def loop(name: str, product: Callable[[Tensor], Tensor], kept: torch.dtype) -> None:
        plain = [state(d, device, kept) for _ in xs]
        variants[name] = lambda: [cov.add_(product(x)) for cov, x in zip(plain, xs, strict=True)]

    if device == "cuda" and dtype.itemsize == 2:
        loop("torch loop, mm(out_dtype=float32) + add", float32_out_gram, torch.float32)
    else:
        loop("torch loop, X.float().T @ X.float()", wide_gram, torch.float64)
    cuda = device == "cuda"
    return Case(
        variants,
        [x.double().mT @ x.double() for x in xs],
        {name: (CUDA_ERROR if name == "ours" else 1e-4) if cuda else 1e-6 for name in variants},
        flops=layers * (triangle(n, d) if cuda else n * d * (d + 1)),
        bytes_moved=sum(x.nbytes for x in xs) + (16 * layers * d * d if cuda else 0),
        rate=(CUDA_RATE if cuda else RATE)[dtype],
    )


def triangle(n: int, d: int) -> float:
    """Operations of the triangle in whole tiles: (t + 1) / 2t of the full product."""
    tiles = -(-d // TILE)
    return 2.0 * n * TILE * TILE * tiles * (tiles + 1) / 2


@planned("covariance {n}x{d} {dtype}")
def on_gpu(n: int, d: int, dtype: torch.dtype) -> Case:
    """One layer on a GPU, against what torch has there in the same accuracy, and in less."""
    x = torch.randn(n, d, device="cuda").to(dtype)
    cov = state(d, "cuda")
    variants: dict[str, Callable[[], Tensor]] = {"ours": lambda: ops.update_covariance_(cov, x)}
    if dtype.itemsize == 2:
        variants["torch mm(out_dtype=float32) + add"] = adding(float32_out_gram, x, torch.float32)
        variants["torch C += X.T @ X"] = adding(gram, x, torch.float32)
    variants["torch, float32 product"] = adding(wide_gram, x, torch.float32)
    variants["torch, tf32 product"] = adding(lambda x: tf32_gram(x.float()), x, torch.float32)
    loose = {"ours": CUDA_ERROR, "torch C += X.T @ X": 1e-2, "torch, tf32 product": 1e-2}
    return Case(
        variants,
        x.double().mT @ x.double(),
        {name: loose.get(name, 1e-4) for name in variants},
        flops=triangle(n, d),
        bytes_moved=x.nbytes + 16 * d * d,
        rate=CUDA_RATE[dtype],
        notes={"state": "float64; float32 for torch's"},
    )


@planned("head Grams {images}x{heads}x{tokens}x{width} float32")
def head_grams(
    images: int, heads: int = 12, tokens: int = 197, width: int = 64, device: str = "cpu", *, compiled: bool = False
) -> Case:
    """One layer of NSP2's first matrix: the key-side statistic of `images` images."""
    d = heads * width
    qkv = torch.randn(images, tokens, 3, heads, width, device=device)
    q = qkv.add_(0.5).permute(2, 0, 3, 1, 4)[0]  # [B, H, N, dh], with a mean as real queries have
    weight = torch.randn(d, d, device=device) / d**0.5
    slices = weight.reshape(heads, width, d)
    grams = torch.zeros(heads, width, width, dtype=torch.float64, device=device)
    official_state = state(d, device)
    exact = torch.zeros(d, d, dtype=torch.float64, device=device)
    for head, part in enumerate(slices.double()):  # the official expansion below is checked against it too
        rows = q[:, head].reshape(-1, width).double()
        exact += part.mT @ (rows.mT @ rows) @ part

    def batched(q: Tensor) -> Tensor:
        flat = q.transpose(0, 1).reshape(heads, -1, width)
        return flat.mT @ flat

    def torch_grams(product: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        plain = torch.zeros(heads, width, width, device=device)
        return lambda: plain.add_(product(q))

    variants = {
        "ours": lambda: ops.update_head_grams_(grams, q),
        "torch batched Grams": torch_grams(batched),
        "official expansion": lambda: official_state.add_(official.expanded_gram(q, slices)),
    }
    if compiled and can_compile():
        variants["torch.compile of batched Grams"] = torch_grams(torch.compile(batched))
    return Case(
        variants,
        exact,
        {name: (2e-6 if device == "cpu" else CUDA_ERROR) if name == "ours" else 1e-4 for name in variants},
        flops=images * tokens * heads * width * (width + 1),
        bytes_moved=q.nbytes,
        rate="sgemm" if device == "cpu" else "split3gemm",
        notes={"expansion": "for the check alone: a task expands once, and it is timed apart"},
        read=lambda found: found if found.ndim == 2 else ops.expand_head_grams(found, weight),
    )


@planned(lambda heads, width: f"expand head Grams {heads}x{width} to {heads * width}")
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
        {"ours": lambda: ops.expand_head_grams(grams, weight)},
        exact,
        1e-13,
        flops=2 * d * d * (d + width),
        rate="dgemm",
    )


def custom(sizes: Sequence[int], dtype: torch.dtype | None, device: str) -> Iterable[Plan]:
    expect("covariance", sizes, "n x d")
    n, d = sizes
    yield (on_gpu if device == "cuda" else one_layer)(n, d, dtype or torch.float32)


def cases(quick: bool) -> Iterable[Plan]:
    yield head_grams(1, heads=2) if quick else head_grams(4, compiled=True)
    if not quick:
        yield head_grams(32)
        yield head_grams(256)
    yield expansion(2) if quick else expansion()
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        sizes = [(788, 128)] if quick else [(25216, 768), (6304, 768), (25216, 384), (6304, 1024)]
        if dtype == torch.float16 and not quick:
            sizes = [(6304, 384)]  # torch's float16 product takes a second there
        for n, d in sizes:
            yield one_layer(n, d, dtype, compiled=not quick and (n, d) == (6304, 768))
    if not quick:
        yield one_layer(6304, 3072, torch.float32)
        yield one_layer(6304, 3072, torch.bfloat16)
    for n, d in [(197, 64)] if quick else [(197, 64), (788, 128), (64, 768), (50_000, 4)]:
        for dtype in (torch.float32, torch.bfloat16):
            yield one_layer(n, d, dtype)
    yield many_layers(2 if quick else 12, 197 if quick else 1576, 128 if quick else 768, torch.bfloat16)
    yield many_layers(2 if quick else 12, 197 if quick else 1576, 128 if quick else 768, torch.float32)


def cuda_cases(quick: bool) -> Iterable[Plan]:
    """The shapes of a ViT, the plainest first; the largest come last."""
    yield on_gpu(25216, 768, torch.bfloat16)
    yield many_layers(12, 25216, 768, torch.bfloat16, "cuda")
    yield head_grams(4 if quick else 256, device="cuda")
    yield on_gpu(25216, 768, torch.float32)
    if quick:
        return
    yield on_gpu(25117, 768, torch.bfloat16)  # rows that fill no tile
    yield on_gpu(25216, 768, torch.float16)
    for d in (384, 1024):
        for dtype in (torch.bfloat16, torch.float32):
            yield on_gpu(25216, d, dtype)
    yield on_gpu(50432, 768, torch.bfloat16)
    yield many_layers(24, 25216, 1024, torch.bfloat16, "cuda")
    yield many_layers(12, 25216, 768, torch.float32, "cuda")
    for dtype in (torch.bfloat16, torch.float32):
        yield on_gpu(25216, 3072, dtype)


if __name__ == "__main__":
    sys.exit(main(__name__))
