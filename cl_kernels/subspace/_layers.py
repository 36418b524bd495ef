"""Which layers are watched, under which names, and the rows that their weights see."""

from __future__ import annotations

import fnmatch
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cl_kernels.errors import SubspaceMismatchError

__all__ = [
    "Rows",
    "Targets",
    "in_recomputation",
    "input_rows",
    "output_rows",
    "resolve",
    "token_rows",
    "unwrap",
    "warn_if_random",
    "width",
]

Targets = str | Iterable[str] | Callable[[str, nn.Module], bool]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv": _CONVOLUTIONS,
    "all": (nn.Linear, *_CONVOLUTIONS),
}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
UNFOLD_BYTES = 64 << 20  # unfolded patches are kh kw times the input: a batch goes through in pieces of this size


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel. Raises `ValueError` for what hooks cannot see through."""
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "model: DataParallel runs copies that hooks do not count reliably; use DistributedDataParallel"
        )
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    for name, module in inner.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            where = f"its module {name!r} is" if name else "it is"
            raise ValueError(
                f"model: {where} compiled, and hooks added after compilation are not called; "
                "collect on the original module (`compiled._orig_mod`), or before compiling"
            )
    return inner


def resolve(model: nn.Module, targets: Targets) -> list[tuple[str, nn.Module]]:
    """(parameter name, module) of every watched layer; modules that share a weight share its first name.

    Raises `SubspaceMismatchError` for a name that matches no linear or convolutional layer.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [
        (name, names.get(id(module.weight), f"{name}.weight" if name else "weight"), module)
        for name, module in model.named_modules()
        if isinstance(module, _KINDS["all"])
    ]
    if callable(targets):
        return [(key, module) for name, key, module in layers if targets(name, module)]
    if isinstance(targets, str):
        if targets not in _KINDS:
            raise ValueError(f"targets: expected 'linear', 'conv', 'all', names or a callable, got {targets!r}")
        return [(key, module) for _, key, module in layers if isinstance(module, _KINDS[targets])]
    chosen: dict[int, tuple[str, nn.Module]] = {}
    for pattern in targets:
        plain = pattern.removesuffix(".weight")
        found = [layer for layer in layers if fnmatch.fnmatchcase(layer[0], plain) or layer[1] == pattern]
        if not found:
            near = get_close_matches(plain, [name for name, _, _ in layers], n=3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise SubspaceMismatchError(f"targets: {pattern!r} names no linear or convolutional layer{hint}")
        chosen |= {id(module): (key, module) for _, key, module in found}
    return list(chosen.values())


def width(module: Any, what: str) -> int:
    """Dimension of the rows: in_features, or c kh kw of one group; for "output_grad" the number of outputs."""
    if what == "output_grad":
        return int(module.weight.shape[0])
    return math.prod(module.weight.shape[1:])


class Rows(NamedTuple):
    """`number` rows of one batch, in pieces."""

    number: int
    pieces: Iterable[Tensor]


def input_rows(module: Any, x: Tensor, skip_tokens: int) -> Rows:
    """The rows that multiply the weight; convolutions as unfolded patches, their groups as rows of their own."""
    if not isinstance(module, _CONVOLUTIONS):
        return token_rows(x, skip_tokens)
    if isinstance(module, nn.Conv1d):
        x = x.unsqueeze(-2)
    if x.ndim == 3:
        x = x.unsqueeze(0)
    kernel, stride, dilation = (_pair(value) for value in (module.kernel_size, module.stride, module.dilation))
    x = _padded(module, x, kernel, dilation)
    places = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)]
    size = max(1, x[0].numel() * math.prod(kernel) * x.element_size()) if len(x) else 1

    def unfolded() -> Iterator[Tensor]:
        for piece in x.split(max(1, UNFOLD_BYTES // size)):
            patches = F.unfold(piece, kernel, dilation=dilation, stride=stride).unflatten(1, (module.groups, -1))
            yield patches.permute(0, 3, 1, 2).reshape(-1, patches.shape[2])

    return Rows(len(x) * math.prod(places) * int(module.groups), unfolded())


def output_rows(module: nn.Module, grad: Tensor, skip_tokens: int) -> Rows:
    """The rows [n, out] of a gradient with respect to the output."""
    if isinstance(module, _CONVOLUTIONS):
        channels = -2 if isinstance(module, nn.Conv1d) else -3
        return token_rows(grad.movedim(channels, -1), 0)
    return token_rows(grad, skip_tokens)


def token_rows(x: Tensor, skip: int) -> Rows:
    """[..., tokens, d] without the first `skip` tokens (the last -skip if negative), as rows."""
    if skip and x.ndim >= 3:
        x = x[..., skip:, :] if skip > 0 else x[..., :skip, :]
    rows = x.reshape(-1, x.shape[-1])
    return Rows(len(rows), [rows])


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return (1, value[0]) if len(value) == 1 else (value[0], value[1])


def _padded(module: Any, x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """`x` with the padding that the convolution would add."""
    if module.padding == "valid":
        return x
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in ((0, module.padding[0]) if len(module.padding) == 1 else module.padding)]
    (top, bottom), (left, right) = sides
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, (left, right, top, bottom), mode=mode) if any((top, bottom, left, right)) else x


def in_recomputation() -> bool:
    """Whether this call is activation checkpointing running a forward for the second time.

    torch says so only on the call stack: its checkpoint functions are re-entered from `backward` (reentrant) or from
    `unpack_hook` (not reentrant). Walking 50 frames takes about 3 us.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name in ("backward", "unpack_hook", "recompute_fn") and "checkpoint" in code.co_filename:
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
        )
    ]
    if noisy:
        shown = ", ".join(noisy[:3])
        warnings.warn(
            f"model: {len(noisy)} dropout or batch-norm modules are in training mode ({shown}), so what is collected "
            "is not what evaluation sees; call model.eval() first, or pass eval_mode=True",
            stacklevel=3,
        )
