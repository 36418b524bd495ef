"""The native module's ground: the loader never raises, numbers agree on both sides, 16-bit floats are exact."""

from __future__ import annotations

import ast
import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import native_build
import native_toolchain
import pytest
import torch
from conftest import ROOT, why_no_nvcc
from native_toolchain import NativeBuildError

import cl_kernels
from cl_kernels.ops import _native

CSRC = ROOT / "csrc"


def test_numbers_agree_on_both_sides() -> None:
    abi = re.search(r"kAbi = (\d+)", (CSRC / "common" / "abi.h").read_text())
    assert abi is not None
    assert int(abi[1]) == _native.ABI
    codes = re.search(r"enum class DType : int \{(.*)\}", (CSRC / "common" / "dtype.h").read_text())
    assert codes is not None
    names = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
    assert {names[name]: int(value) for name, value in re.findall(r"(\w+) = (\d)", codes[1])} == _native.DTYPE


def test_loader_tells_one_story() -> None:
    module, why = _native.load(), _native.why_missing()
    assert (module is None) == (why is not None)
    if module is not None:
        info = module.build_info()
        assert info["abi"] == _native.ABI
        assert _native.cuda_built() == info["cuda"] == _native.build_record()["cuda"]


def broken_package(folder: Path, module: str | None, record: str | None) -> str:
    """why_missing() in a process whose cl_kernels is a copy with another native module in it."""
    package = folder / "cl_kernels"
    package.mkdir()
    for path in (ROOT / "cl_kernels").iterdir():
        if path.suffix != ".so" and path.name != "_build_info.json":
            (package / path.name).symlink_to(path)
    # _native.py looks for the record beside the real file that it is; a copy keeps it in the broken package.
    (package / "ops").unlink()
    (package / "ops").mkdir()
    for path in (ROOT / "cl_kernels" / "ops").iterdir():
        target = package / "ops" / path.name
        target.write_text(path.read_text()) if path.name == "_native.py" else target.symlink_to(path)
    if module is not None:
        (package / "_C.py").write_text(module)
    if record is not None:
        (package / "_build_info.json").write_text(record)
    code = (
        # An editable install's finder would find the real module under the broken package's name.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        f"sys.path.insert(0, {str(folder)!r})\nfrom cl_kernels.ops import _native\n"
        "assert _native.load() is None and not _native.cuda_built()\nprint(_native.why_missing())"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, cwd=folder)
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "record", "words"),
    [
        (None, None, "make native"),
        (None, "{ not json", "make native"),
        (None, json.dumps({"native_reason": "no C++ compiler: g++ not found"}), "g++ not found"),
        ("raise ImportError('libstdc++.so.6: version not found')", None, "libstdc++.so.6: version not found"),
        ("import absent_module", None, "absent_module"),
        ("abi_version = lambda: -7", None, "ABI -7"),
        ("", None, "abi_version"),
    ],
    ids=["nothing", "broken record", "reason", "loader", "module", "abi", "empty"],
)
def test_a_broken_module_is_a_reason_and_not_an_error(
    tmp_path: Path, module: str | None, record: str | None, words: str
) -> None:
    assert words in broken_package(tmp_path, module, record)


CONVERSIONS = """
#include <cstdint>
#include "common/dtype.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void widen(const uint16_t* x, float* half, float* bfloat, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        half[i] = clk::to_float(clk::Half{x[i]});
        bfloat[i] = clk::to_float(clk::BFloat16{x[i]});
    }
}
EXPORT void narrow(const float* x, uint16_t* half, uint16_t* bfloat, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        half[i] = clk::from_float<clk::Half>(x[i]).bits;
        bfloat[i] = clk::from_float<clk::BFloat16>(x[i]).bits;
    }
}
"""


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        cxx, _ = native_toolchain.find_cxx()
    except NativeBuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("conversions")
    (folder / "c.cpp").write_text(CONVERSIONS)
    flags = [word for word in native_build.CXX_FLAGS if word != "-g0"]
    native_toolchain.run([*cxx, *flags, "-shared", f"-I{CSRC}", str(folder / "c.cpp"), "-o", str(folder / "c.so")])
    return ctypes.CDLL(str(folder / "c.so"))


def pointers(*tensors: torch.Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def test_every_16_bit_float_widens_exactly(conversions: ctypes.CDLL) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    half, bfloat = torch.empty(2**16), torch.empty(2**16)
    conversions.widen(*pointers(bits, half, bfloat), ctypes.c_int64(2**16))
    torch.testing.assert_close(half, bits.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat, bits.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


def test_narrowing_rounds_to_nearest_even_as_torch_does(conversions: ctypes.CDLL) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (400_000,), dtype=torch.int64).to(torch.int32)  # any float at all
    every_half = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).double()
    ties = ((every_half + every_half.nextafter(torch.tensor(torch.inf).double()).half().double()) / 2).float()
    halves = every_half.float()
    between = (halves[1:] + halves[:-1]) / 2  # exact ties between neighbours
    x = torch.cat([bits.view(torch.float32), halves, between, ties, torch.tensor([65519.0, 65520.0, 65536.0, 3.4e38])])
    half, bfloat = torch.empty(x.numel(), dtype=torch.int16), torch.empty(x.numel(), dtype=torch.int16)
    conversions.narrow(*pointers(x, half, bfloat), ctypes.c_int64(x.numel()))
    torch.testing.assert_close(half.view(torch.float16), x.half(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat.view(torch.bfloat16), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_jobs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "1")
    assert native_toolchain.jobs() == 1
    for nonsense in ("", "many", "0", "-3", "100000"):
        monkeypatch.setenv("MAX_JOBS", nonsense)
        assert 1 <= native_toolchain.jobs() <= 100_000


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvcc that knows three architectures and compiles nothing, as one does whose host compiler is too new."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\ncase "$1" in\n--list-gpu-arch) printf "compute_75\\ncompute_80\\ncompute_90\\n";;\n'
        '--version) echo "release 99.0";;\n*) echo "error: unsupported GNU version" >&2; exit 1;;\nesac\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for name in ("CL_KERNELS_NO_CUDA", "CL_KERNELS_REQUIRE_CUDA", "CL_KERNELS_WERROR", "CL_KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        (None, ["80", "90"]),
        ("90", ["90"]),
        ("9.0;7.5", ["75", "90"]),
        ("80, 90a,sm_75 100", ["75", "80", "90a"]),
    ],
)
@pytest.mark.usefixtures("fake_nvcc")
def test_architectures_are_cut_to_what_nvcc_knows(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, archs: list[str]
) -> None:
    if asked is not None:
        monkeypatch.setenv("CL_KERNELS_CUDA_ARCHS", asked)
    assert native_toolchain.find_nvcc()[1] == archs
    flags = native_build.gencode(archs)
    assert all(f"code=sm_{arch}" in " ".join(flags) for arch in archs)
    newest = max(int(arch) for arch in archs if arch.isdigit())
    assert flags[-1] == f"-gencode=arch=compute_{newest},code=compute_{newest}", "later devices need PTX"


@pytest.mark.usefixtures("fake_nvcc")
def test_no_known_architecture_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_KERNELS_CUDA_ARCHS", "120")
    with pytest.raises(NativeBuildError, match=r"120.*75"):
        native_toolchain.find_nvcc()


EXPORT = 'extern "C" __attribute__((visibility("default"))) '


@pytest.fixture
def small_csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A csrc/ of one C++ file, which builds in a second."""
    folder = tmp_path / "small csrc"
    folder.mkdir()
    (folder / "one.cpp").write_text('#include "build_config.h"\n' + EXPORT + "const char* cxx() { return CLK_CXX; }\n")
    try:
        native_toolchain.find_cxx()
        native_toolchain.find_ninja()
    except NativeBuildError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(native_build, "CSRC", folder)
    return folder


@pytest.mark.usefixtures("fake_nvcc")
def test_an_nvcc_that_fails_costs_the_cuda_half_only(
    small_csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_csrc / "two.cu").write_text("nothing will read this")
    output, work = tmp_path / "out" / "module.so", tmp_path / "work"
    info = native_build.build(output, work)
    assert info.native
    assert not info.cuda
    assert info.cuda_archs == []
    assert "unsupported GNU version" in str(info.cuda_reason)
    assert ctypes.CDLL(str(output)).cxx is not None
    monkeypatch.setenv("CL_KERNELS_REQUIRE_CUDA", "1")
    with pytest.raises(NativeBuildError, match="unsupported GNU version"):
        native_build.build(output, work)


def test_only_what_changed_is_built_again_and_broken_code_leaves_the_old_module(
    small_csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CL_KERNELS_NO_CUDA", "1")
    output, work = tmp_path / "module.so", tmp_path / "work"
    native_build.build(output, work)
    first = (work / "cpu" / "one.cpp.o").stat().st_mtime_ns
    (small_csrc / "three.cpp").write_text(EXPORT + "int three() { return 3; }\n")
    native_build.build(output, work)
    assert (work / "cpu" / "one.cpp.o").stat().st_mtime_ns == first
    assert ctypes.CDLL(str(output)).three() == 3
    content = output.read_bytes()
    (small_csrc / "three.cpp").write_text("int three( {")
    with pytest.raises(NativeBuildError, match="error"):
        native_build.build(output, work)
    assert output.read_bytes() == content


SPILLS = """
__global__ void __launch_bounds__(1024, 2) cl_spills(float* p) {
    float a[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = p[threadIdx.x + i * 1024];
    for (int k = 0; k < 100; ++k)
#pragma unroll
        for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i * 7 + 3) % 64] + 1;
#pragma unroll
    for (int i = 0; i < 64; ++i) p[threadIdx.x + i * 1024] = a[i];
}
"""


@pytest.mark.cuda_build
@pytest.mark.slow
def test_the_compile_gate_sees_a_spill(small_csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that could not fail would prove nothing about the kernels that pass it."""
    assert why_no_nvcc() is None
    monkeypatch.delenv("CL_KERNELS_NO_CUDA", raising=False)
    monkeypatch.delenv("CL_KERNELS_WERROR", raising=False)
    monkeypatch.setenv("CL_KERNELS_CUDA_ARCHS", "80")
    (small_csrc / "spills.cu").write_text(SPILLS)
    info = native_build.build(tmp_path / "module.so", tmp_path / "work")
    assert info.cuda, info.cuda_reason
    assert [kernel.arch for kernel in info.kernels] == ["sm_80"]
    assert info.kernels[0].spill_stores > 0
    assert info.kernels[0].spill_loads > 0
    assert info.kernels[0].registers > 0
    monkeypatch.setenv("CL_KERNELS_WERROR", "1")
    with pytest.raises(NativeBuildError, match="spilled"):
        native_build.build(tmp_path / "module.so", tmp_path / "strict")


def forbidden(node: ast.AST) -> str | None:
    """What a piece of syntax does that the package must not."""
    pickles = ("pickle", "cPickle", "cloudpickle", "joblib", "dill", "shelve", "marshal")
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
        return next((name for name in names if name.split(".")[0] in pickles), None)
    if isinstance(node, ast.ImportFrom):
        package = (node.module or "").split(".")[0]
        private = package == "torch" and any(alias.name.startswith("_") for alias in node.names)
        return f"from {node.module}" if private or package in pickles else None
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return f"torch.{node.attr}" if node.attr in ("load", "save") else None
    if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
        return None if isinstance(node.value, ast.Constant) and node.value.value is False else "allow_pickle"
    return None


def test_package_has_no_pickle_and_no_private_names_of_torch() -> None:
    found = []
    for path in sorted(Path(cl_kernels.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            what = forbidden(node)
            if what:
                found.append(f"{path}:{getattr(node, 'lineno', '?')}: {what}")
    assert not found, "\n".join(found)


def test_timm_comes_in_by_one_door() -> None:
    """A file may import timm's parts inside a function, but only one that opens the door, where the shim is."""
    for path in sorted(Path(cl_kernels.__file__).parent.rglob("*.py")):
        text = path.read_text()
        assert not re.search(r"^(import|from) timm", text, re.MULTILINE), f"{path}: timm at the top of a module"
        if re.search(r"^\s+(import|from) timm", text, re.MULTILINE):
            assert "import_timm()" in text, f"{path} imports timm without _timm.import_timm"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "from torch.optim.optimizer import _params_doc",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert any(forbidden(node) for node in ast.walk(ast.parse(line)))


OPTIONAL = ("timm", "triton", "typer", "rich", "sklearn", "matplotlib", "PIL", "tensorboard", "torchvision", "scipy")


@pytest.mark.slow
def test_import_loads_nothing_optional_and_starts_nothing() -> None:
    code = f"""
import sys, torch, numpy, safetensors
before = set(sys.modules)
import cl_kernels
names = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not names & set({OPTIONAL!r}), names & set({OPTIONAL!r})
assert "cl_kernels._C" not in sys.modules, "the native module loads on first use"
assert not torch.cuda.is_initialized()
import threading
assert threading.active_count() == 1
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_gpu_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "run_gpu.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 3
    assert "no GPU here" in done.stdout
    assert not (tmp_path / "out").exists()


LAUNCH_ERRORS = """
#include <cstdio>
#include "common/launch.h"
static void show(cudaError_t status, bool pending) {
    try {
        clk::cuda_check(status, "kernel", pending);
        std::puts("fine");
    } catch (const std::runtime_error& error) {
        std::puts(error.what());
    }
}
int main() {
    show(cudaSuccess, true);
    show(cudaErrorInvalidConfiguration, false);
    show(cudaErrorInvalidConfiguration, true);
    show(cudaErrorIllegalAddress, false);
    show(cudaErrorAssert, false);
}
"""


@pytest.mark.cuda_build
def test_an_error_of_earlier_work_is_not_blamed_on_a_launch(tmp_path: Path) -> None:
    """F17: a sticky error of another kernel. Needs no GPU."""
    nvcc, _ = native_toolchain.find_nvcc()
    (tmp_path / "e.cu").write_text(LAUNCH_ERRORS)
    native_toolchain.run([nvcc, "-std=c++20", f"-I{CSRC}", str(tmp_path / "e.cu"), "-o", str(tmp_path / "e")])
    done = subprocess.run([str(tmp_path / "e")], text=True, capture_output=True, check=True)
    fine, ours, *earlier = done.stdout.splitlines()
    assert fine == "fine"
    assert "cudaErrorInvalidConfiguration" in ours
    assert "earlier work" not in ours
    assert len(earlier) == 3
    assert all("left by earlier work" in line and "kernel: cudaError" in line for line in earlier)
