"""Sums of all processes: lower triangles in buckets of 32 MB, one under way while the next is packed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.subspace._moments import Sums

__all__ = ["all_reduce_sums", "same_everywhere"]

BUCKET_BYTES = 32 << 20
BLOCK_ROWS = 256  # of a triangle, to their last column: 4 % more than half of a matrix of 3072, and no index tensors


def all_reduce_sums(names: list[str], sums: list[Sums], group: dist.ProcessGroup) -> list[Sums]:
    """The sums over `group`. Raises `SubspaceMismatchError` on every process when their layers or dtypes differ.

    About half the bytes of the matrices travel, in their own dtype; counts and totals in fp64. Memory beside the
    results: two buckets.
    """
    layers = [(name, tuple(x.matrix.shape), x.matrix.dtype, x.quartic is None) for name, x in zip(names, sums)]
    described = repr(layers)
    if not same_everywhere(described, sums[0].matrix.device if sums else None, group):
        raise SubspaceMismatchError(
            f"process_group: its processes collected different layers; this one has {described}"
        )
    if not sums:
        return []
    matrices = _reduced_matrices([item.matrix for item in sums], group)
    return [item._replace(matrix=matrix) for item, matrix in zip(_reduced_vectors(sums, group), matrices, strict=True)]


def same_everywhere(described: str, device: torch.device | None, group: dist.ProcessGroup) -> bool:
    """Whether every process passes the same text; one that has no tensors, and so no `device`, must ask as well."""
    if device is None:
        here = "nccl" in dist.get_backend(group)
        device = torch.device("cuda", torch.cuda.current_device()) if here else torch.device("cpu")
    digest = int.from_bytes(hashlib.blake2b(described.encode(), digest_size=6).digest())
    both = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    return bool(both[0] == -both[1])


def _reduced_vectors(sums: list[Sums], group: dist.ProcessGroup) -> list[Sums]:
    """Counts, totals, fourth moments, and the first bad batch of any process, in two small calls."""
    device = sums[0].matrix.device
    packed = [_vector(item) for item in sums]
    flat = torch.cat(packed)
    dist.all_reduce(flat, dist.ReduceOp.SUM, group=group)
    local = [math.inf if item.first_bad is None else item.first_bad for item in sums]
    first_bad = torch.tensor(local, dtype=torch.float64, device=device)
    dist.all_reduce(first_bad, dist.ReduceOp.MIN, group=group)
    reduced = []
    for item, part, bad in zip(sums, flat.split([len(v) for v in packed]), first_bad.tolist(), strict=True):
        weight, number, updates = part[:3].tolist()
        size = item.total.numel()
        total = part[3 : 3 + size].reshape(item.total.shape).to(item.total.dtype)
        quartic = None if item.quartic is None else part[3 + size :].clone()
        found = None if math.isinf(bad) else int(bad)
        reduced.append(Sums(item.matrix, total, weight, int(number), int(updates), found, quartic))
    return reduced


def _vector(item: Sums) -> Tensor:
    counts = item.total.new_tensor([item.weight, item.rows, item.updates], dtype=torch.float64)
    rest = [] if item.quartic is None else [item.quartic]
    return torch.cat((counts, item.total.double().flatten(), *rest))


class _Block(NamedTuple):
    """Rows `first` to `last` of the lower triangle of one matrix."""

    matrix: int
    first: int
    last: int

    def of(self, matrices: Sequence[Tensor]) -> Tensor:
        return matrices[self.matrix][..., self.first : self.last, : self.last]


def _reduced_matrices(matrices: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    results = [torch.empty_like(matrix) for matrix in matrices]
    under_way: list[tuple[dist.Work | None, Tensor, list[_Block]]] = []
    for bucket in _buckets(matrices):
        sizes = [block.of(matrices).numel() for block in bucket]
        flat = matrices[0].new_empty(sum(sizes))
        for block, part in zip(bucket, flat.split(sizes), strict=True):
            source = block.of(matrices)
            part.view(source.shape).copy_(source)
        under_way.append((dist.all_reduce(flat, group=group, async_op=True), flat, bucket))
        if len(under_way) > 1:
            _unpack(results, *under_way.pop(0))
    for rest in under_way:
        _unpack(results, *rest)
    return results


def _buckets(matrices: list[Tensor]) -> Iterator[list[_Block]]:
    bucket: list[_Block] = []
    held = 0
    for index, matrix in enumerate(matrices):
        for first in range(0, matrix.shape[-1], BLOCK_ROWS):
            block = _Block(index, first, min(first + BLOCK_ROWS, matrix.shape[-1]))
            size = block.of(matrices).numel() * matrix.element_size()
            if bucket and held + size > BUCKET_BYTES:
                yield bucket
                bucket, held = [], 0
            bucket.append(block)
            held += size
    if bucket:
        yield bucket


def _unpack(results: list[Tensor], work: dist.Work | None, flat: Tensor, bucket: list[_Block]) -> None:
    if work is not None:
        work.wait()
    sizes = [block.of(results).numel() for block in bucket]
    for block, part in zip(bucket, flat.split(sizes), strict=True):
        target = block.of(results)
        values = part.view(target.shape)
        corner = values[..., block.first :]  # both triangles were summed, maybe in another order: one of them counts
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        target.copy_(values)
        results[block.matrix][..., : block.last, block.first : block.last].copy_(values.mT)
