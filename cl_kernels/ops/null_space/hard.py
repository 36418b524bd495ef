"""The hard edge: whole eigenvectors are protected or free, and the thinner of the two bases is kept."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cl_kernels.ops._projector import Projector
from cl_kernels.ops.null_space import notes
from cl_kernels.ops.rules import Rule

__all__ = ["hard_projector"]


class _Kept(NamedTuple):
    """Which eigenvectors a projector keeps, and its two numbers."""

    free: int
    first: int
    columns: int
    identity: float
    span: float

    @classmethod
    def of(cls, protected: int, size: int, mix: float, normalize: str | None) -> _Kept:
        free = size - protected
        if free == 0:
            return cls(0, size, 0, 1 - mix, -mix)
        scale = mix / math.sqrt(free) if normalize == "fro" else mix
        if protected <= free:
            return cls(free, 0, protected, scale + 1 - mix, scale)
        return cls(free, protected, free, 1 - mix, -scale)


def hard_projector(values: Tensor, vectors: Tensor, rule: Rule, mix: float, normalize: str | None) -> Projector:
    """mix U0 U0^T / s + (1 - mix) I from eigenvalues [..., d], descending, and eigenvectors [..., d, d]."""
    size = values.shape[-1]
    kept = [_Kept.of(count, size, mix, normalize) for count in _protected(values.reshape(-1, size), rule)]
    if any(one.free == 0 for one in kept):
        notes.frozen(rule, mix)
    columns = max((one.columns for one in kept), default=0)
    if len({(one.first, one.columns) for one in kept}) == 1:
        basis = vectors.narrow(-1, kept[0].first, columns).clone(memory_format=torch.contiguous_format)
    else:
        basis = vectors.new_zeros(len(kept), size, columns)
        for target, one, source in zip(basis, kept, vectors.reshape(-1, size, size), strict=True):
            target[:, : one.columns] = source[:, one.first : one.first + one.columns]
        basis = basis.reshape(*values.shape, columns)
    if values.ndim == 1:
        return Projector(basis, kept[0].identity, kept[0].span)
    scalars = values.new_tensor([[one.identity, one.span] for one in kept]).reshape(-1, 2).T
    return Projector(basis, scalars[0].reshape(values.shape[:-1]), scalars[1].reshape(values.shape[:-1]))


def _protected(spectra: Tensor, rule: Rule) -> list[int]:
    counts = []
    spectra = spectra.cpu()  # once, and not number by number
    for spectrum, (largest, smallest) in zip(spectra.clamp_min(0), spectra[:, [0, -1]].tolist(), strict=True):
        notes.indefinite(largest, smallest)
        if largest <= 0:
            notes.zero()
            counts.append(0)
            continue
        counts.append(rule.protected(spectrum))
        if not 0 <= counts[-1] <= spectrum.numel():
            raise ValueError(f"rule: {rule} protects {counts[-1]} of {spectrum.numel()} directions")
    return counts
