"""WiSE-FT: the average of a fine-tuned model and the model before (Wortsman et al., CVPR 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops.weight_projection import rescale_
from cl_kernels.optim import _anchors, _names
from cl_kernels.optim._names import plain_name

__all__ = ["wise_ft"]


@torch.no_grad()
def wise_ft(model: nn.Module, anchors: Any, alpha: float = 0.5, *, exclude: Iterable[Any] = ()) -> None:
    """Move a fine-tuned model part of the way back to its anchors, in place: W <- W_0 + alpha (W - W_0).

    As published, alpha = 0 is the pre-trained model, byte for byte, and alpha = 1 leaves the fine-tuned one as it is.
    `anchors`: a mapping of names to tensors, such as a copy of `model.state_dict()` before training, or the path of a
    safetensors file. Every parameter needs one or must be in `exclude` (globs, modules' or parameters' names, or
    parameters; each must match); floating buffers, such as the statistics of a batch norm, move where the anchors hold
    them. Raises `ValueError` for alpha outside [0, 1] and for shapes, `SubspaceMismatchError` for missing names,
    `NonFiniteError`, `TypeError`, and then changes nothing. One pass: 12 bytes a weight, and a copy of the anchors.
    """
    if isinstance(alpha, bool) or not 0.0 <= alpha <= 1.0 or not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha!r}")
    if anchors is None or (isinstance(anchors, str) and anchors == "init"):
        raise TypeError(f"anchors: expected a mapping of names to tensors, or a path, got {anchors!r}")
    named: dict[Tensor, str] = {p: plain_name(name) for name, p in model.named_parameters()}
    left_out = _anchors.excluded(tuple(exclude), named, list(named), must=True)
    buffers = {b: plain_name(name) for name, b in model.named_buffers() if b.is_floating_point()}
    with _anchors.lookup(anchors) as (look, known):
        wanted = {p: name for p, name in named.items() if p not in left_out}
        missing = [name for name in wanted.values() if not known(name)]
        if missing:
            raise SubspaceMismatchError(f"anchors: none for {_names.few(missing)}; name them in `exclude` to keep them")
        wanted |= {b: name for b, name in buffers.items() if known(name)}
        found = [(name, tensor, look(name, tensor)) for tensor, name in wanted.items()]
    _anchors.finite([(name, anchor) for name, _, anchor in found if anchor is not None])
    rescale_([tensor for _, tensor, _ in found], [anchor for _, _, anchor in found], [alpha] * len(found), norm="l2")
