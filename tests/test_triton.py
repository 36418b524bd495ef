"""The ground that Triton kernels share, run in Triton's interpreter: `TRITON_INTERPRET=1 pytest -m interpret`."""

import os

import pytest
import torch
from support import relative

pytestmark = pytest.mark.interpret
if os.environ.get("TRITON_INTERPRET") != "1":  # Triton decides when it is imported, so this is a process of its own
    pytest.skip("needs TRITON_INTERPRET=1 and its own process", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = triton.language

from cl_kernels.ops import _triton  # noqa: E402 - imports Triton
from cl_kernels.ops._triton import dot3, split, triangle, work_item  # noqa: E402


@triton.jit
def cl_tiles(rows, columns):
    item = work_item()
    i, j = triangle(item)
    tl.store(rows + item, i)
    tl.store(columns + item, j)


@triton.jit
def cl_product(a, b, c, SIZE: tl.constexpr, STEP: tl.constexpr):
    at, k = tl.arange(0, SIZE), tl.arange(0, STEP)
    a_high, a_low = split(tl.load(a + k[:, None] * SIZE + at[None, :]))
    b_high, b_low = split(tl.load(b + k[:, None] * SIZE + at[None, :]))
    total = dot3(tl.trans(a_high), tl.trans(a_low), b_high, b_low)
    tl.store(c + at[:, None] * SIZE + at[None, :], total)


@triton.jit
def cl_halves(x, high, low, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = split(tl.load(x + at))
    tl.store(high + at, a)
    tl.store(low + at, b)


def test_work_items_walk_the_upper_triangle_once():
    n = 40
    rows, columns = torch.empty(2, n * (n + 1) // 2, dtype=torch.int64)
    cl_tiles[(len(rows),)](rows, columns)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(i, j) for j in range(n) for i in range(j + 1)]


@pytest.mark.parametrize("column", [1, 90, 2047, 4094])
def test_the_triangle_is_exact_where_float32_roots_are_not(column):
    first = column * (column + 1) // 2
    rows, columns = torch.full((2, first + 1), -1, dtype=torch.int64)

    @triton.jit
    def cl_one(rows, columns, item):
        i, j = triangle(item.to(tl.int64))
        tl.store(rows + item, i)
        tl.store(columns + item, j)

    for item in (first - 1, first):
        cl_one[(1,)](rows, columns, item)
    assert (int(rows[first - 1]), int(columns[first - 1])) == (column - 1, column - 1)
    assert (int(rows[first]), int(columns[first])) == (0, column)


def test_halves_hold_22_bits():
    x = (1 + torch.rand(1024)) * 2.0 ** torch.randint(-14, 15, (1024,)) * torch.randn(1024).sign()
    high, low = torch.empty(2, 1024, dtype=torch.float16)
    cl_halves[(1,)](x, high, low, SIZE=1024)
    rebuilt = high.double() + low.double() / 2048
    assert float(((rebuilt - x.double()) / x.double()).abs().max()) <= 2.0**-22


def test_three_products_are_as_good_as_float32():
    a, b, c = torch.randn(64, 32), torch.randn(64, 32), torch.empty(32, 32)
    cl_product[(1,)](a, b, c, SIZE=32, STEP=64)
    wanted = a.double().mT @ b.double()
    assert relative(c, wanted) <= 2 * relative(a.mT @ b, wanted)
    assert relative(a.half().mT.float() @ b.half().float(), wanted) > 1e-4  # what one product would give


def test_tables_hold_addresses_of_64_bits():
    values = [0, 1, 2**62 + 12345, -1, *range(30)]
    assert _triton.device_table(values, torch.device("cpu")).tolist() == values


def test_a_table_written_by_launches_holds_the_same_numbers():
    """The form that is used while a CUDA graph is captured."""
    values = [2**62 + i for i in range(16)]
    table = torch.zeros(16, dtype=torch.int64)
    _triton.cl_write_table[(1,)](table, *values)
    assert table.tolist() == values
