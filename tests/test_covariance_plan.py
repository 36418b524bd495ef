"""How second moments are cut into work for the GPU, and what the machine code of it does; no kernel runs here."""

import importlib.util
import itertools
import os
import re

import aot
import pytest
import torch

from cl_kernels.ops import _tuning
from cl_kernels.ops.covariance import plan

FIELDS = 24
VIT_B = [(25216, 768)] * 36 + [(25216, 3072)] * 12
SHAPES = [
    [(25216, 768)],
    [(25216, 768)] * 12,
    [(25216, 1024)] * 24,
    VIT_B,
    [(50432, 64)] * 12,
    [(788, 768)],
    [(1, 1)],
    [(0, 768), (5, 3)],
    [(10**9, 768)],
    [(3 * 10**9, 3)],
    [(197, 12288)],
    [(5, 7)] * 300,
]


def matrix(n, d):
    return plan.Matrix(n, d, 0, plan.SINGLE_LEVEL, d, 1, 1, 0, 1, 0, 0, d, 1, 1, 0, 0)


def records(launch):
    return [launch.records[i : i + FIELDS] for i in range(0, len(launch.records), FIELDS)]


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda shapes: f"{len(shapes)}x{shapes[-1]}")
def test_every_tile_of_every_chunk_is_worked_on_once_in_a_workspace_of_64_mb(shapes, tile):
    seen = {}
    for launch in plan.launches([matrix(*shape) for shape in shapes], tile, 16):
        assert 4 * (tile * tile * launch.tiles + launch.columns) <= plan.WORKSPACE_BYTES
        assert launch.matrices <= plan.MATRICES
        tiles = strips = sums = columns = 0
        for record in records(launch):
            rows, size, *_ = record
            chunk, chunks, first, pairs, *starts = record[16:]
            assert starts == [columns, tiles, strips, sums]
            assert (chunks - 1) * chunk < rows <= chunks * chunk or chunks == rows == 0
            assert chunk < 2**30  # the kernel counts the rows of a chunk in 32 bits
            tiles += pairs * chunks
            strips += chunks * -(-size // plan.STRIP)
            sums += pairs * (tile // 16)
            columns += chunks * (3 * size + 1)
            seen.setdefault((rows, size), []).extend(range(first, first + pairs))
        assert (tiles, strips, sums, columns) == (launch.tiles, launch.strips, launch.sums, launch.columns)
    for (rows, size), pairs in seen.items():
        side = -(-size // tile)
        assert sorted(pairs) == sorted([*range(side * (side + 1) // 2)] * shapes.count((rows, size)))
    assert set(seen) == set(shapes)


def test_the_chunks_of_a_layer_do_not_depend_on_its_company():
    alone = next(plan.launches([matrix(25216, 768)], 128, 16))
    among = list(plan.launches([matrix(*shape) for shape in VIT_B], 128, 16))
    chunks = {tuple(r[16:18]) for launch in among for r in records(launch) if r[1] == 768}
    assert chunks == {tuple(records(alone)[0][16:18])}


def test_one_layer_fills_the_multiprocessors_in_one_wave():
    """The split of performance.md 2.1: 21 tiles of 128 at d = 768 in 6 chunks of about 4200 rows, 126 work items."""
    assert plan.row_chunks(25216, 21, 128) == (4224, 6)
    for (rows, pairs), tile in itertools.product([(25216, 6), (25216, 36), (50432, 21), (6304, 21)], (64, 128)):
        chunk, chunks = plan.row_chunks(rows, pairs, tile)
        assert pairs * chunks >= 100
        assert chunk >= plan.COSTS[tile].least_rows


def test_twelve_layers_of_vit_b_need_two_launches():
    sizes = [launch.tiles for launch in plan.launches([matrix(25216, 768)] * 12, 128, 16)]
    assert len(sizes) == 2
    assert sum(sizes) == 12 * 126


needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None,
    reason="Triton is not installed, or interprets in this process",
)


@needs_compiler
def test_plan_and_kernels_agree():
    from cl_kernels.ops.covariance import kernels

    assert (kernels.MOST, kernels.STRIP.value, kernels.FIELDS.value) == (plan.MATRICES, plan.STRIP, FIELDS)
    assert len(records(next(plan.launches([matrix(5, 5)], 64, 16)))[0]) == FIELDS
    tiles = {config["TILE"] for table in kernels.TILES.configs.values() for config in table.values()}
    assert tiles == set(plan.COSTS)
    for capability, (dtype, config) in itertools.product(_tuning.ARCHITECTURES, kernels.TILES.configs[90].items()):
        sums = kernels.SUM.choose(capability, "fp64", str(config["TILE"]))
        assert sums["TILE"] == config["TILE"], dtype


@needs_compiler
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_sums_leave_the_tensor_core_after_every_step(dtype, capability, tmp_path, monkeypatch):
    """Or they drift by 2e-5. One subtraction an element of the tile is in the machine code, and 16-byte loads are."""
    from cl_kernels.ops.covariance import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = kernels.TILES.choose(capability, dtype, "wide")
    signature = kernels.TILES.signature(dtype)
    kernel, constants = kernels.cl_gram_tiles, dict(config.constants)
    ptx = aot.compile_for(kernel, signature, constants, capability, config.options()).ptx
    wanted = config["TILE"] ** 2 + (
        2 * config["STEP"] * config["TILE"] if config["SPLIT"] else 0
    )  # halves subtract too
    assert len(re.findall(r"\bsub\.(rn\.)?f32", ptx)) >= wanted // (32 * config.warps)
    assert config["STEP"] <= 512
    assert "cp.async.cg.shared.global" in ptx
    assert "wgmma.mma_async" in ptx or capability == 80


def test_explain_without_a_gpu_names_the_reason():
    import cl_kernels as clk

    text = clk.explain("update_covariances_", [torch.zeros(3, 3)], [torch.zeros(2, 3)])
    assert re.search(r"native: (runs|not used)", text)
    assert "triton: not used: the interpreter is for tests" in text
