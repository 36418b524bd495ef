"""Sums of all processes: one all-reduce of packed lower triangles a bucket."""

from __future__ import annotations

import hashlib
import math

import torch
import torch.distributed as dist
from torch import Tensor

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.subspace._moments import Sums

__all__ = ["all_reduce_sums"]

BUCKET_BYTES = 32 << 20


def all_reduce_sums(names: list[str], sums: list[Sums], group: dist.ProcessGroup) -> list[Sums]:
    """The sums over `group`. Raises `SubspaceMismatchError` on every process when their layers differ.

    Only the lower triangles travel, flattened into buckets of about 32 MB: half the bytes of the matrices.
    """
    if not sums:
        return []
    device = sums[0].matrix.device
    _same_layers(names, sums, group)
    reduced: list[Sums] = []
    bucket: list[Sums] = []
    for index, item in enumerate(sums):
        bucket.append(item)
        full = sum(_packed(entry).numel() * 8 for entry in bucket) >= BUCKET_BYTES
        if full or index == len(sums) - 1:
            reduced += _reduce_bucket(bucket, group)
            bucket = []
    local = [math.inf if item.first_bad is None else item.first_bad for item in sums]
    first_bad = torch.tensor(local, dtype=torch.float64, device=device)
    dist.all_reduce(first_bad, dist.ReduceOp.MIN, group=group)
    return [
        item._replace(first_bad=None if math.isinf(bad) else int(bad))
        for item, bad in zip(reduced, first_bad.tolist(), strict=True)
    ]


def _same_layers(names: list[str], sums: list[Sums], group: dist.ProcessGroup) -> None:
    described = repr([(name, tuple(item.matrix.shape)) for name, item in zip(names, sums, strict=True)])
    digest = int.from_bytes(hashlib.blake2b(described.encode(), digest_size=6).digest())
    both = torch.tensor([digest, -digest], dtype=torch.int64, device=sums[0].matrix.device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    if both[0] != -both[1]:
        raise SubspaceMismatchError(
            f"process_group: its processes collected different layers; this one has {described}"
        )


def _reduce_bucket(bucket: list[Sums], group: dist.ProcessGroup) -> list[Sums]:
    flat = torch.cat([_packed(item) for item in bucket])
    dist.all_reduce(flat, dist.ReduceOp.SUM, group=group)
    return [_unpacked(part, item) for part, item in zip(flat.split([_packed(i).numel() for i in bucket]), bucket)]


def _packed(item: Sums) -> Tensor:
    """[weight, rows, updates, total ..., lower triangles ...] in fp64."""
    rows, columns = torch.tril_indices(item.matrix.shape[-1], item.matrix.shape[-1], device=item.matrix.device)
    counts = torch.tensor([item.weight, item.rows, item.updates], dtype=torch.float64, device=item.matrix.device)
    triangle = item.matrix[..., rows, columns].double().flatten()
    return torch.cat((counts, item.total.double().flatten(), triangle))


def _unpacked(flat: Tensor, like: Sums) -> Sums:
    n = like.matrix.shape[-1]
    rows, columns = torch.tril_indices(n, n, device=flat.device)
    counts, total, triangle = flat.split([3, like.total.numel(), flat.numel() - 3 - like.total.numel()])
    matrix = torch.empty_like(like.matrix)
    values = triangle.reshape(*like.matrix.shape[:-2], -1).to(matrix)
    matrix[..., rows, columns] = values
    matrix[..., columns, rows] = values
    weight, number, updates = counts.tolist()
    return Sums(matrix, total.reshape(like.total.shape).to(like.total), weight, int(number), int(updates), None)
