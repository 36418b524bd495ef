"""How matrices are cut into work for the Triton kernels: chunks of rows, launches that share one workspace, records.

Chunks depend on the shape of one matrix alone, never on what else is in the call: a layer gets the same bits alone and
among others. Plain Python, without Triton: it is tested where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["MOST_INNER", "SINGLE_LEVEL", "WORKSPACE_BYTES", "Launch", "Matrix", "launches", "row_chunks"]

WORKSPACE_BYTES = 64 << 20
STRIP = 32  # columns of a strip (kernels.py)
MATRICES = 128  # of one launch (kernels.py: MOST)
MOST_ROWS, MOST_CHUNKS, ROW_STEP = 32768, 256, 64
MOST_INNER = 1 << 30
SINGLE_LEVEL = 1 << 20  # rows with one stride are told as if there were two levels, so that counts fit 32 bits


@dataclass(frozen=True)
class Cost:
    """What decides the number of chunks, for a size of tiles.

    `blocks` run at once: of the 132 multiprocessors of an H100 or H200, each holds one block of 128 x 128 or four of
    64 x 64. A constant, so that one shape is cut alike on every device. `overhead`: rows that could be multiplied
    while a partial sum is written and read again (128 KB at 33 GB/s a multiprocessor is 4 us, a row 5.5 ns [E]).
    """

    blocks: int
    overhead: int
    least_rows: int


COSTS = {128: Cost(132, 512, 512), 64: Cost(528, 256, 1024)}


@dataclass(frozen=True)
class Matrix:
    """One matrix to update, in numbers: addresses, strides in elements, sizes."""

    rows: int
    size: int
    outer_stride: int
    inner: int
    inner_stride: int
    column_stride: int
    x: int
    weight: int
    cov: int
    total: int
    count: int
    cov_row: int
    cov_column: int
    total_stride: int
    total_wide: int
    count_wide: int

    def pairs(self, tile: int) -> int:
        side = -(-self.size // tile)
        return side * (side + 1) // 2


@dataclass
class Launch:
    """One launch of tiles and one of sums: some tiles of some matrices, with all chunks of each."""

    tiles: int = 0
    strips: int = 0
    sums: int = 0
    columns: int = 0
    matrices: int = 0
    records: list[int] = field(default_factory=list)

    def add(
        self, matrix: Matrix, chunk: int, chunks: int, first: int, pairs: int, tile: int, rows_at_once: int
    ) -> None:
        self.records += (
            matrix.rows, matrix.size, matrix.outer_stride, matrix.inner, matrix.inner_stride, matrix.column_stride,
            matrix.x, matrix.weight, matrix.cov, matrix.total, matrix.count, matrix.cov_row, matrix.cov_column,
            matrix.total_stride, matrix.total_wide, matrix.count_wide,
            chunk, chunks, first, pairs, self.columns, self.tiles, self.strips, self.sums,
        )  # fmt: skip
        self.matrices += 1
        self.tiles += pairs * chunks
        self.sums += pairs * (tile // rows_at_once)
        self.strips += chunks * -(-matrix.size // STRIP)
        self.columns += chunks * (3 * matrix.size + 1)


def launches(matrices: list[Matrix], tile: int, rows_at_once: int) -> Iterator[Launch]:
    """Cut the tiles of all matrices into launches whose partial sums fit the workspace; usually it is one."""
    launch, tile_bytes = Launch(), 4 * tile * tile
    for matrix in sorted(matrices, key=lambda m: -m.rows):  # the longest first, so that the shortest end last
        all_pairs = matrix.pairs(tile)
        chunk, chunks = row_chunks(matrix.rows, all_pairs, tile)
        columns = 4 * chunks * (3 * matrix.size + 1)
        first = 0
        while first < all_pairs:
            room = WORKSPACE_BYTES - 4 * launch.columns - columns - launch.tiles * tile_bytes
            fit = all_pairs - first if chunks == 0 else min(all_pairs - first, room // (chunks * tile_bytes))
            if (fit <= 0 and launch.matrices) or launch.matrices == MATRICES:
                yield launch
                launch = Launch()
                continue
            fit = max(fit, 1)
            launch.add(matrix, chunk, chunks, first, fit, tile, rows_at_once)
            first += fit
    if launch.matrices:
        yield launch


@functools.cache
def row_chunks(rows: int, pairs: int, tile: int) -> tuple[int, int]:
    """Rows of a chunk and the number of chunks: the cheapest, counted in rows that one multiprocessor works through."""
    if rows == 0:
        return ROW_STEP, 0
    cost = COSTS[tile]
    most = max(1, min(rows // cost.least_rows, MOST_CHUNKS, -(-4 * cost.blocks // max(pairs, 1))))
    fewest = min(-(-rows // MOST_ROWS), MOST_CHUNKS)
    found = []
    for wanted in range(fewest, max(fewest, most) + 1):
        chunk = -(-rows // (wanted * ROW_STEP)) * ROW_STEP
        chunks = -(-rows // chunk)
        waves = -(-pairs * chunks // cost.blocks)
        found.append((waves * (chunk + cost.overhead), chunks, chunk))
    _, chunks, chunk = min(found)
    return chunk, chunks
