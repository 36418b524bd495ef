"""Which layers are watched and under which names, and what a model must not be wrapped in."""

from __future__ import annotations

import fnmatch
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.subspace import _multihead
from cl_kernels.subspace._names import plain_name

__all__ = ["CONVOLUTIONS", "Layer", "Targets", "eager", "in_recomputation", "resolve", "unwrap", "warn_if_random"]

Targets = str | Iterable[str] | Callable[[str, nn.Module], bool]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_REFUSED: dict[tuple[type[nn.Module], ...], str] = {
    (nn.Embedding, nn.EmbeddingBag): "its inputs are indices, so there are no rows that multiply its weight",
    _TRANSPOSED: "its input multiplies the weight [in, out, ...] from the other side, so that its moments would "
    "protect dimension 0; replace it by an upsampling and a convolution, or gather its rows with update(name, x)",
    (nn.RNNBase, nn.RNNCellBase): "its weights multiply states inside one fused call that no hook sees; gather the "
    "rows with update(name, x)",
    (nn.Bilinear,): "its output is not linear in one input",
}


class Layer(NamedTuple):
    """A weight [out, ...] that is watched: its parameter's name, its module's, and the module that is called.

    `part` names the weight inside an `nn.MultiheadAttention`, and is empty elsewhere.
    """

    key: str
    name: str
    module: Any
    part: str = ""

    @property
    def weight(self) -> torch.Tensor:
        """The weight itself."""
        weight: torch.Tensor = _multihead.weight_of(self.module, self.part) if self.part else self.module.weight
        return weight

    def width(self, what: str) -> int:
        """Dimension of the rows: in_features, or c kh kw of one group; for "output_grad" the number of outputs."""
        shape = self.weight.shape
        return int(shape[0]) if what == "output_grad" else math.prod(shape[1:])


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile. `ValueError` for what hooks cannot see through."""
    inner = model
    while True:
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod  # type: ignore[assignment]  # torch types the attributes of modules as Tensor | Module
        else:
            break
    for name, module in inner.named_modules():
        where = f"its module {name!r}" if name else "it"
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"model: {where} is DataParallel, which runs copies that hooks do not count reliably; "
                "use DistributedDataParallel"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"model: {where} is FullyShardedDataParallel, which flattens weights so that they have no rows; "
                "use fully_shard (FSDP2), whose activations are whole on every process"
            )
    return inner


def eager() -> AbstractContextManager[Any]:
    """Compiled modules run eagerly while this is open: compiled code does not call hooks that were added later, and
    may call none at all where it was compiled for another model of the same classes (pytorch#117758)."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and loading the compiler takes a second
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def resolve(model: nn.Module, targets: Targets, what: str) -> list[Layer]:
    """Every watched layer; those that share a weight share its first name, and are watched together.

    Raises `SubspaceMismatchError` for a name that matches nothing that can be watched, with the reason.
    """
    layers = _layers(model)
    if isinstance(targets, str):
        kinds = {"linear": (False,), "conv": (True,), "all": (False, True)}
        if targets not in kinds:
            raise ValueError(f"targets: expected 'linear', 'conv', 'all', names or a callable, got {targets!r}")
        if targets != "linear":
            _refuse_transposed(model, targets)
        chosen = [layer for layer in layers if isinstance(layer.module, CONVOLUTIONS) in kinds[targets]]
    elif callable(targets):
        chosen = [layer for layer in layers if targets(layer.name, _seen_as(layer))]
    else:
        chosen = _named(model, layers, targets)
    if not chosen:
        raise SubspaceMismatchError(f"targets: {targets!r} matches no layer of {type(model).__name__}")
    _check(model, chosen, what)
    keys = dict.fromkeys(layer.key for layer in chosen)
    return [layer for key in keys for layer in layers if layer.key == key]


def _layers(model: nn.Module) -> list[Layer]:
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    inside: dict[int, Any] = {}
    layers = []
    for raw, module in model.named_modules():
        name = plain_name(f"{raw}.")[:-1]
        if _multihead.is_watched(module):
            for part, weight in _multihead.weights(module).items():
                own = f"{name}.{part}" if name else part
                layers.append(Layer(names.get(id(weight), own), own.removesuffix("weight")[:-1], module, part))
            inside[id(module.out_proj)] = module
        elif isinstance(module, (nn.Linear, *CONVOLUTIONS)) and id(module) not in inside:
            key = names.get(id(module.weight), f"{name}.weight" if name else "weight")
            layers.append(Layer(key, name, module))
    return layers


def _seen_as(layer: Layer) -> nn.Module:
    module: nn.Module = layer.module.out_proj if layer.part == "out_proj.weight" else layer.module
    return module


def _named(model: nn.Module, layers: list[Layer], patterns: Iterable[str]) -> list[Layer]:
    chosen: dict[tuple[str, str], Layer] = {}
    for pattern in patterns:
        plain = pattern.removesuffix(".weight")
        found = [
            layer
            for layer in layers
            if fnmatch.fnmatchcase(layer.name, plain) or fnmatch.fnmatchcase(layer.key, pattern)
        ]
        if not found:
            raise SubspaceMismatchError(
                f"targets: {pattern!r} names no linear or convolutional layer{_why(model, plain, layers)}"
            )
        chosen |= {(layer.name, layer.part): layer for layer in found}
    return list(chosen.values())


def _why(model: nn.Module, name: str, layers: list[Layer]) -> str:
    for other, module in model.named_modules():
        if other == name:
            for kinds, reason in _REFUSED.items():
                if isinstance(module, kinds):
                    return f": {type(module).__name__} is not supported, because {reason}"
    near = get_close_matches(name, [layer.name for layer in layers], n=3)
    return f"; nearest: {', '.join(near)}" if near else ""


def _refuse_transposed(model: nn.Module, targets: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _TRANSPOSED):
            raise SubspaceMismatchError(
                f"targets: {targets!r} would leave out {name or 'the model'} ({type(module).__name__}), which is not "
                f"supported, because {_REFUSED[_TRANSPOSED]}. Name the layers that you want instead"
            )


def _check(model: nn.Module, layers: list[Layer], what: str) -> None:
    looked_up = {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    for layer in layers:
        if isinstance(layer.weight, nn.UninitializedParameter):
            raise ValueError(f"targets: {layer.key} has no shape yet; run the model once before collecting")
        if what == "output_grad" and layer.part not in ("", "out_proj.weight"):
            raise SubspaceMismatchError(
                f"targets: the outputs of {layer.key} stay inside nn.MultiheadAttention, where no hook sees them; "
                "leave it out of targets=, or use an attention with linear layers of its own"
            )
        if id(layer.weight) in looked_up:
            warnings.warn(
                f"{layer.key} is also the weight of the embedding {looked_up[id(layer.weight)]!r}: the inputs of the "
                "linear layer are protected, what the embedding looks up is not",
                stacklevel=4,
            )


def in_recomputation() -> bool:
    """Whether this call is activation checkpointing running a forward for the second time.

    torch says so only on the call stack: its checkpoint functions are re-entered from `backward` (reentrant) or from
    `unpack_hook` (not reentrant). Walking 50 frames takes about 3 us.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name in ("backward", "unpack_hook", "recompute_fn") and "checkpoint" in Path(code.co_filename).name:
            return True
    return False


def warn_if_random(model: nn.Module) -> None:
    """Warn when dropout or batch statistics are on, which would enter the moments."""
    noisy = [
        name
        for name, module in model.named_modules()
        if module.training
        and (
            (isinstance(module, _DROPOUTS) and module.p > 0)
            or isinstance(module, _BATCH_NORMS)
            or float(getattr(module, "drop_prob", 0) or 0) > 0
            or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
        )
    ]
    if noisy:
        shown = ", ".join(noisy[:3])
        warnings.warn(
            f"model: {len(noisy)} dropout or batch-norm modules are in training mode ({shown}), so what is collected "
            "is not what evaluation sees; call model.eval() first, or pass eval_mode=True",
            stacklevel=3,
        )
