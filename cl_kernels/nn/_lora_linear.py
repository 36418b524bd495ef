"""A frozen linear layer with adapters on slices of its output, and where such layers lie in a timm ViT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.nn._adapters import Adapters
from cl_kernels.nn._composed import composed_linear

__all__ = ["POSITIONS", "LoRALinear", "places"]

POSITIONS = ("q", "k", "v", "proj", "fc1", "fc2")
Watcher = Callable[["LoRALinear", Tensor, Tensor], None]


class LoRALinear(nn.Module):
    """y = base(x) + x dW, where dW has one stack of adapters for each named slice of the output.

    A fused qkv projection has up to three slices, so that q, k and v are adapted, frozen and counted apart; any other
    layer has one. `watch`, when set, is called in the backward pass with (self, x, gradient of y).
    """

    def __init__(self, base: nn.Linear, slices: dict[str, slice], scale: float, *, normalized: bool) -> None:
        super().__init__()
        self.base = base
        self.slices = slices
        self.adapters = nn.ModuleDict(
            {
                name: Adapters(base.in_features, part.stop - part.start, scale, base.weight, normalized=normalized)
                for name, part in slices.items()
            }
        )
        self.watch: Watcher | None = None
        self.merged: Tensor | None = None  # the base weight as it was before merging

    @property
    def weight(self) -> Tensor:
        """The frozen weight; code that reads `attn.qkv.weight` goes on working."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def place(self, layer: str, part: str) -> str:
        """The name of one adapted weight of the layer called `layer`: that name where it is the whole output."""
        return layer if self.slices[part] == slice(0, self.out_features) else f"{layer}.{part}"

    def named_adapters(self) -> Iterator[tuple[str, Adapters]]:
        for name, part in self.adapters.items():
            if isinstance(part, Adapters):
                yield name, part

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return self.base(x)  # type: ignore[no-any-return]  # a linear layer gives a tensor
        given = [one.part(self.slices[name]) for name, one in self.named_adapters()] if self._many(x) else []
        parts = [part for part in given if part is not None]
        if parts:
            y = composed_linear(x, self.base.weight, self.base.bias, parts)
        else:
            y = self.base(x)
            deltas = {name: adapters(x) for name, adapters in self.named_adapters()}
            if any(delta is not None for delta in deltas.values()):
                y = self._added(y, deltas)
        if self.watch is not None and y.requires_grad:
            seen, watch = x.detach(), self.watch
            y.register_hook(lambda grad: watch(self, seen, grad.detach()))
        return y

    def _many(self, x: Tensor) -> bool:
        """Whether x has so many rows N that one composed weight takes half the operations of the thin products, or
        less: N (in + out) >= 2 in out for the narrowest slice. Not under autocast, where the weight would be rounded
        after the updates were added to it, which may be smaller than its last digit; and not where somebody has hooked
        the frozen layer, such as a CovarianceCollector, who would wait for a call in vain."""
        if self.base._forward_hooks or self.base._forward_pre_hooks:
            return False
        if torch.is_autocast_enabled(x.device.type) or x.dtype != self.base.weight.dtype or x.dtype.itemsize < 4:
            return False
        size, width = self.in_features, min(part.stop - part.start for part in self.slices.values())
        return bool(x.numel() // size * (size + width) >= 2 * size * width)

    def _added(self, y: Tensor, deltas: dict[str, Tensor | None]) -> Tensor:
        if len(deltas) == 1:
            (name, delta), *_ = deltas.items()
            if delta is not None and self.slices[name] == slice(0, self.out_features):
                return y + delta
        parts, done = [], 0
        for name, part in self.slices.items():  # in the order of the output
            if part.start > done:
                parts.append(y[..., done : part.start])
            delta = deltas[name]
            parts.append(y[..., part] if delta is None else y[..., part] + delta)
            done = part.stop
        if done < self.out_features:
            parts.append(y[..., done:])
        return torch.cat(parts, dim=-1)


def places(backbone: Any, positions: tuple[str, ...]) -> Iterator[tuple[Any, str, nn.Linear, dict[str, slice]]]:
    """(owner, attribute, linear, slices) of every layer that holds one of `positions`, block by block.

    Raises `ValueError` for a block without such a layer.
    """
    for index, block in enumerate(backbone.blocks):
        attention = getattr(block, "attn", None)
        fused = [name for name in ("q", "k", "v") if name in positions]
        qkv = getattr(attention, "qkv", None)
        if fused and getattr(attention, "q_bias", None) is not None:  # BEiT, EVA: qkv.weight is read, qkv never called
            raise ValueError(
                f"module: block {index} ({type(attention).__name__}) adds biases of q and v of its own to the weight "
                "of its qkv layer, so that adapters of q, k and v would have no effect; adapt proj, fc1 and fc2 only"
            )
        if fused and isinstance(qkv, nn.Linear):
            width = qkv.out_features // 3
            starts = {"q": 0, "k": width, "v": 2 * width}
            yield attention, "qkv", qkv, {name: slice(starts[name], starts[name] + width) for name in fused}
            fused = []
        wanted: list[tuple[Any, str, str]] = [(attention, f"{name}_proj", name) for name in fused]
        wanted += [(attention, "proj", "proj")] if "proj" in positions else []
        wanted += [(getattr(block, "mlp", None), name, name) for name in ("fc1", "fc2") if name in positions]
        for owner, attribute, name in wanted:
            layer = getattr(owner, attribute, None)
            if not isinstance(layer, nn.Linear):
                raise ValueError(
                    f"module: block {index} ({type(block).__name__}) has no linear layer for position {name!r} "
                    f"(looked for {attribute})"
                )
            yield owner, attribute, layer, {name: slice(0, layer.out_features)}
