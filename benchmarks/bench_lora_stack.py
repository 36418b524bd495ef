"""A stack of LoRA adapters on the six weights of a ViT-B block: forward and backward, memory, and the penalty.

Against the official LoRAC form, written anew from its formulas: in every forward pass W = W_0 + s (sum omega_i A_i B_i
+ A_t B_t) is formed from one dense product for each task, and autograd goes through it. Timed are the six layers with
their frozen products, to the gradients of inputs, A_t, B_t and omega. What the adapters add is the difference to
"frozen layers alone", outputs and gradients of inputs without any adapter: no form can be faster than that.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from cl_kernels.benchmarks import official
from cl_kernels.benchmarks.harness import Case, Plan, main, planned
from cl_kernels.benchmarks.options import expect
from torch import Tensor
from torch.nn import functional as F

from cl_kernels._timm import import_timm
from cl_kernels.nn import LoRAStack

TABLE = (
    "layers of a block, 10 tasks",
    "forward of one image",
    "penalty of a block, 10 tasks",
)
SHAPE = "vit-b16"
RANK = 16
TOKENS = 197


class Block:
    """The adapted layers of one block at task number `tasks`, with inputs and gradients of the outputs."""

    def __init__(self, tasks: int, images: int, device: str) -> None:
        import_timm()
        torch.manual_seed(0)
        model = importlib.import_module("timm.models.vision_transformer").VisionTransformer(
            img_size=32, patch_size=16, embed_dim=768, depth=1, num_heads=12, num_classes=0
        )
        self.stack = LoRAStack(model, rank=RANK, alpha=RANK).to(device)
        for task in range(tasks):
            self.stack.begin_task()
            for adapters in self.stack.places().values():
                with torch.no_grad():
                    adapters.lora_b.normal_(std=0.02)
            if task < tasks - 1:
                self.stack.end_task()
        self.layers = dict(self.stack.layers())
        rows = images * TOKENS
        self.x = {n: torch.randn(rows, layer.in_features, device=device) for n, layer in self.layers.items()}
        self.g = {n: torch.randn(rows, layer.out_features, device=device) for n, layer in self.layers.items()}
        self.trained = [parameter for _, parameter in self.stack.trainable_parameters()]
        self.bytes = 4 * sum(p.numel() for a in self.stack.places().values() for p in (*a.parameters(), *a.buffers()))

    def inputs(self) -> dict[str, Tensor]:
        return {name: x.detach().requires_grad_() for name, x in self.x.items()}

    def whole(self, forward: Callable[[str, Tensor], Tensor], *, trains: bool = True) -> list[Tensor]:
        """Outputs, and the gradients of inputs and adapters."""
        x = self.inputs()
        y = {name: forward(name, one) for name, one in x.items()}
        wanted = [*x.values(), *(self.trained if trains else [])]
        gradients = torch.autograd.grad(list(y.values()), wanted, list(self.g.values()))
        return [*(one.detach() for one in y.values()), *gradients]

    def exact(self, call: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What a call gives in float64; afterwards everything is as it was."""
        narrow = self.x, self.g
        self.stack.double()
        self.x, self.g = ({name: value.double() for name, value in values.items()} for values in narrow)
        try:
            return call()
        finally:
            self.stack.float()
            self.x, self.g = narrow

    def ours(self, name: str, x: Tensor) -> Tensor:
        return self.layers[name](x)

    def frozen(self, name: str, x: Tensor) -> Tensor:
        return self.layers[name].base(x)

    def official(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.official_weight(name), self.layers[name].base.bias)

    def official_weight(self, name: str) -> Tensor:
        """[out, in], q, k and v formed apart."""
        layer = self.layers[name]
        parts = []
        for part, adapters in layer.named_adapters():
            past = None
            if adapters.ranks:
                old_a = adapters.past_a.unflatten(1, (-1, RANK)).permute(1, 0, 2)  # [tasks, in, r], a view
                past = (old_a, adapters.past_b.unflatten(0, (-1, RANK)), adapters.omega)
            base = layer.base.weight[layer.slices[part]]
            parts.append(official.lorac_weight(base, adapters.lora_a, adapters.lora_b, past, self.stack.scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@planned("layers of a block, {tasks} tasks, {images} images")
def layers(tasks: int, images: int, device: str) -> Case:
    block = Block(tasks, images, device)
    variants = {
        "ours": partial(block.whole, block.ours),
        "official rebuild": partial(block.whole, block.official),
        "frozen layers alone": partial(block.whole, block.frozen, trains=False),
    }
    right = block.exact(variants["official rebuild"])
    alone = block.exact(variants["frozen layers alone"])
    base = sum(layer.base.weight.numel() for layer in block.layers.values())
    return Case(
        variants,
        {"ours": right, "official rebuild": right, "frozen layers alone": alone},
        1e-4,
        flops=4.0 * images * TOKENS * base,
        notes={"adapters_bytes": block.bytes},
        yardsticks=("frozen layers alone",),
    )


@planned("forward of one image, {tasks} tasks")
def one_image(tasks: int, device: str) -> Case:
    """Evaluation image by image, as the official code does it: W is formed again for each."""
    block = Block(tasks, 1, device)

    def run(forward: Callable[[str, Tensor], Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [forward(name, x) for name, x in block.x.items()]

    variants = {
        "ours": partial(run, block.ours),
        "official rebuild": partial(run, block.official),
        "frozen layers alone": partial(run, block.frozen),
    }
    right, alone = block.exact(variants["official rebuild"]), block.exact(variants["frozen layers alone"])
    expected = {"ours": right, "official rebuild": right, "frozen layers alone": alone}
    return Case(variants, expected, 1e-4, yardsticks=("frozen layers alone",))


@planned("penalty of a block, {tasks} tasks")
def penalty(tasks: int, device: str) -> Case:
    """The orthogonality term of the block's six positions and its gradient; `bench_orthogonal_qr` has all twelve."""
    block = Block(tasks, 1, device)
    downs = [adapters.lora_a for adapters in block.stack.places().values()]

    def ours() -> list[Tensor]:
        value = block.stack.penalty()
        return [value.detach(), *torch.autograd.grad(value, downs)]

    def officially() -> list[Tensor]:
        value = official.lorac_penalty((adapters.past_a, adapters.lora_a) for adapters in block.stack.places().values())
        return [value.detach(), *torch.autograd.grad(value, downs)]

    return Case({"ours": ours, "official": officially}, block.exact(officially), 1e-4)


def custom(sizes: Sequence[int], dtype: torch.dtype | None, device: str) -> Iterable[Plan]:
    """A block of ViT-B, float32."""
    expect("lora_stack", sizes, "tasks x images")
    yield layers(*sizes, device)


def all_cases(quick: bool, device: str) -> Iterable[Plan]:
    if quick:
        yield layers(2, 1, device)
        yield one_image(2, device)
        yield penalty(2, device)
        return
    for images in (1, 8, 64) if device == "cuda" else (1, 8):
        for tasks in (1, 5, 10):
            yield layers(tasks, images, device)
    yield one_image(10, device)
    for tasks in (1, 5, 10):
        yield penalty(tasks, device)


def cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cpu")


def cuda_cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cuda")


if __name__ == "__main__":
    sys.exit(main(__name__))
