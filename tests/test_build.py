"""The package as users install it: six installs, what sdist and wheel contain, and the CUDA compile gate.

Every install starts from an unpacked sdist in a folder with spaces, goes into a fresh virtual environment, and sees no
network: where build isolation wants packages, wheels are packed again from those installed here. torch is lent to the
finished environment through a .pth file, never installed again.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, why_no_nvcc
from native_toolchain import NativeBuildError, find_cxx

from cl_kernels.ops import _native

pytestmark = pytest.mark.slow

PROBE = """
import json, sys
import cl_kernels, cl_kernels.benchmarks
from cl_kernels.ops import _native
module = _native.load()
with open("/proc/self/maps") as maps:
    openmp = sorted({line.split()[-1] for line in maps if "libgomp" in line})
print(json.dumps({
    "file": cl_kernels.__file__, "benchmarks": cl_kernels.benchmarks.__file__, "version": cl_kernels.__version__,
    "native": module is not None, "why": _native.why_missing(), "cuda": _native.cuda_built(),
    "record": _native.build_record(), "openmp": openmp, "torch": "torch" in sys.modules,
}))
"""
SITES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


@functools.cache
def why_no_compiler() -> str | None:
    try:
        find_cxx()
    except NativeBuildError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason=f"no compiler: {why_no_compiler()}")


def offline() -> list[str]:
    """A prefix that takes the network away from a command, where the system permits it."""
    unshare = shutil.which("unshare")
    works = unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode == 0
    return [str(unshare), "-rn"] if works else []


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without anything that steers pip or our build, and with pip's indexes off."""
    dropped = ("PIP_", "CL_KERNELS_", "PYTHON", "CUDA_", "MAX_JOBS", "CXX")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **changes}


def call(command: list[str], cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run([*offline(), *command], cwd=cwd, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def repack(name: str, folder: Path) -> None:
    """Make a wheel again from an installed distribution, so that build isolation works without an index."""
    installed = importlib.metadata.distribution(name)
    version = installed.version
    stem = f"{installed.metadata['Name'].replace('-', '_')}-{version}"
    record = f"{stem}.dist-info/RECORD"
    tag = next(line[5:] for line in (installed.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: "))
    scripts = {entry.name for entry in installed.entry_points if entry.group == "console_scripts"}
    names = []
    with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w") as wheel:
        for file in installed.files or []:
            path = str(file)
            if path.startswith("../"):
                path = "" if file.name in scripts else f"{stem}.data/scripts/{file.name}"
            elif path.split("/")[0].endswith(".dist-info"):
                path = f"{stem}.dist-info/{path.split('/', 1)[1]}"
            if not path or path == record or path.endswith((".pyc", "INSTALLER", "REQUESTED", "direct_url.json")):
                continue
            wheel.write(str(file.locate()), path)
            names.append(path)
        wheel.writestr(record, "".join(f"{path},,\n" for path in [*names, record]))


@dataclass
class Factory:
    """The shared pieces: an sdist, unpacked anew for each install, and a folder of wheels for build isolation."""

    base: Path
    sdist: Path
    wheelhouse: Path

    def source(self, name: str) -> Path:
        folder = self.base / f"source of {name}"
        with tarfile.open(self.sdist) as archive:
            archive.extractall(folder, filter="data")
        return next(folder.iterdir())

    def environment(self, name: str, *, lend: bool) -> Path:
        """A new virtual environment with no package in it; lend: all that is installed here can be imported."""
        folder = self.base / f"venv of {name}"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        if lend:
            self.lend(folder)
        return folder

    def lend(self, folder: Path) -> None:
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "lent.pth").write_text("\n".join(SITES) + "\n")

    def pip(self, folder: Path, *arguments: str, cwd: Path, env: dict[str, str]) -> str:
        outer = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
        return call([*outer, *arguments], cwd, env)

    def probe(self, folder: Path, env: dict[str, str]) -> dict[str, Any]:
        """Import the package in its environment, from a folder that is not the source."""
        output = call([str(folder / "bin" / "python"), "-c", PROBE], self.base, env)
        found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    base = tmp_path_factory.mktemp("installs with spaces")
    tree = base / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.so", "build", "dist", "*.egg-info", "_build_info.json")
    shutil.copytree(ROOT, tree, ignore=ignored)
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    call([sys.executable, "-c", code, str(base)], tree, clean_environment())
    wheelhouse = tmp_path_factory.mktemp("wheels")  # no space: pip splits its lists there
    for name in ("setuptools", "pybind11", "ninja"):
        repack(name, wheelhouse)
    return Factory(base, next(base.glob("*.tar.gz")), wheelhouse)


def wheel_names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as wheel:
        return set(wheel.namelist())


def assert_complete(names: set[str]) -> None:
    """Every Python file of the package and of the benchmarks, and the data beside them."""
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "cl_kernels").rglob("*.py")}
    wanted |= {f"cl_kernels/benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
    others = [p for p in (ROOT / "cl_kernels").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".so")]
    wanted |= {str(path.relative_to(ROOT)) for path in others}
    assert wanted <= names | {"cl_kernels/_build_info.json"}, sorted(wanted - names)
    assert "cl_kernels/_build_info.json" in names
    strangers = [name for name in names if not name.startswith(("cl_kernels/", "cl_kernels-"))]
    assert not strangers, f"these belong nowhere in a wheel: {strangers}"
    benchmarks = [name for name in names if name.startswith("cl_kernels/benchmarks/")]
    assert all(name.count("/") == 2 and name.endswith(".py") for name in benchmarks), "code alone, no results"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("entry_points.txt") for name in names)


def test_the_sdist_holds_what_a_build_and_a_test_run_need(factory: Factory) -> None:
    with tarfile.open(factory.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"pyproject.toml", "setup.py", "LICENSE", "README.md", "Makefile", "constraints-cpu.txt"}
    for folder in ("cl_kernels", "csrc", "benchmarks", "tests", "examples", "scripts"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        wanted |= {str(path.relative_to(ROOT)) for path in files}
    built = ("__pycache__/", "benchmarks/results/", "benchmarks/backbones/")
    wanted = {n for n in wanted if not any(b in n for b in built) and not n.endswith((".so", "_build_info.json"))}
    assert wanted <= names, sorted(wanted - names)
    built_here = (".so", ".pyc", "_build_info.json")
    strangers = [name for name in names if name.endswith(built_here) or name.startswith((".venv", "build/"))]
    assert not strangers, strangers


@needs_compiler
def test_isolated_build_without_torch(factory: Factory) -> None:
    source = factory.source("isolated")
    env = clean_environment(CL_KERNELS_NO_CUDA="1", CL_KERNELS_WERROR="1", PIP_FIND_LINKS=str(factory.wheelhouse))
    if why_no_nvcc() is None:
        env["CXXFLAGS"] = "-O0"  # the build with nvcc compiles the same files with all warnings of -O3
    folder = factory.environment("isolated", lend=False)
    factory.pip(folder, "wheel", "-v", "--no-deps", "-w", "wheels", ".", cwd=source, env=env)
    wheel = next((source / "wheels").glob("*.whl"))
    names = wheel_names(wheel)
    assert_complete(names)
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert "none-any" not in wheel.name

    factory.pip(folder, "install", "--no-deps", str(wheel), cwd=source, env=env)
    factory.lend(folder)
    found = factory.probe(folder, env)
    assert found["native"], found["why"]
    assert not found["cuda"]
    assert found["record"]["cuda_reason"] == "switched off by CL_KERNELS_NO_CUDA"
    assert str(folder) in found["file"]
    assert str(folder) in found["benchmarks"]
    assert len(found["openmp"]) == 1, "torch and the native module must share one OpenMP"
    assert (folder / "bin" / "cl-kernels").exists()


@needs_compiler
def test_without_build_isolation(factory: Factory) -> None:
    source = factory.source("shared tools")
    env = clean_environment(CL_KERNELS_NO_CUDA="1", CXXFLAGS="-O0")
    folder = factory.environment("shared tools", lend=True)
    factory.pip(folder, "install", "--no-deps", "--no-build-isolation", ".", cwd=source, env=env)
    found = factory.probe(folder, env)
    assert found["native"], found["why"]
    assert str(folder) in found["file"]
    assert "-O0" in found["record"]["flags"], "CXXFLAGS must be honoured, and told"


@needs_compiler
def test_editable(factory: Factory) -> None:
    source = factory.source("editable")
    env = clean_environment(CL_KERNELS_NO_CUDA="1", CXXFLAGS="-O0")
    folder = factory.environment("editable", lend=True)
    factory.pip(folder, "install", "--no-deps", "--no-build-isolation", "-e", ".", cwd=source, env=env)
    found = factory.probe(folder, env)
    assert found["native"], found["why"]
    assert Path(found["file"]) == source / "cl_kernels" / "__init__.py"
    assert Path(found["benchmarks"]) == source / "benchmarks" / "__init__.py"
    # The sources may change under an editable install; a module of another ABI must be refused with a reason, not used.
    native = source / "cl_kernels" / "ops" / "_native.py"
    native.write_text(native.read_text().replace(f"ABI = {_native.ABI}", f"ABI = {_native.ABI + 1}"))
    found = factory.probe(folder, env)
    assert not found["native"]
    assert "ABI" in found["why"]


@needs_compiler
def test_without_nvcc(factory: Factory) -> None:
    source = factory.source("no nvcc")
    env = clean_environment(CUDA_HOME=str(factory.base / "no cuda"), CXXFLAGS="-O0")
    folder = factory.environment("no nvcc", lend=True)
    factory.pip(folder, "install", "--no-deps", "--no-build-isolation", ".", cwd=source, env=env)
    found = factory.probe(folder, env)
    assert found["native"], found["why"]
    assert not found["cuda"]
    assert found["record"]["cuda_reason"].startswith("nvcc not found in ")


def test_without_a_compiler(factory: Factory) -> None:
    source = factory.source("no compiler")
    env = clean_environment(PATH=str(factory.base / "empty"))
    folder = factory.environment("no compiler", lend=True)
    factory.pip(folder, "wheel", "--no-deps", "--no-build-isolation", "-w", "wheels", ".", cwd=source, env=env)
    wheel = next((source / "wheels").glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert_complete(wheel_names(wheel))
    factory.pip(folder, "install", "--no-deps", str(wheel), cwd=source, env=env)
    found = factory.probe(folder, env)
    assert not found["native"]
    assert "no C++ compiler" in found["record"]["native_reason"]
    assert "no C++ compiler" in found["why"]
    listed = call([str(folder / "bin" / "cl-kernels"), "bench", "--list", "covariance"], factory.base, env)
    assert "* covariance 25216x768 float32" in listed
    words = ["bench", "covariance", "--quick", "--shape", "50x12", "--json", "r.json"]
    call([str(folder / "bin" / "cl-kernels"), *words], factory.base, env)
    report = json.loads((factory.base / "r.json").read_text())
    assert report["environment"]["commit"] == f"version {found['version']}", "an installed package is of no checkout"


@pytest.fixture(scope="module")
def with_cuda(factory: Factory) -> dict[str, Any]:
    """The install with nvcc: warnings are errors, and a build without CUDA is one too."""
    if reason := why_no_nvcc():
        pytest.skip(reason)
    source = factory.source("nvcc")
    env = clean_environment(CL_KERNELS_REQUIRE_CUDA="1", CL_KERNELS_WERROR="1")
    folder = factory.environment("nvcc", lend=True)
    factory.pip(folder, "install", "--no-deps", "--no-build-isolation", ".", cwd=source, env=env)
    return factory.probe(folder, env)


@pytest.mark.cuda_build
def test_with_nvcc(with_cuda: dict[str, Any]) -> None:
    assert with_cuda["native"], with_cuda["why"]
    assert with_cuda["cuda"], "the module loads beside a CPU torch with its CUDA half in it"
    assert with_cuda["record"]["cuda_archs"] == ["sm_80", "sm_90", "compute_90"]


@pytest.mark.cuda_build
def test_every_cuda_kernel_compiles_for_every_architecture_without_spilling(with_cuda: dict[str, Any]) -> None:
    kernels = with_cuda["record"]["kernels"]
    if list((ROOT / "csrc").glob("*.cu")):
        assert kernels, "there are CUDA sources, but ptxas reported no kernel"
    by_name: dict[str, set[str]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel["name"], set()).add(kernel["arch"])
        assert kernel["spill_stores"] == kernel["spill_loads"] == 0, kernel
        assert kernel["registers"] > 0, f"the report was not understood: {kernel}"
    assert all(archs == {"sm_80", "sm_90"} for archs in by_name.values()), by_name
