"""Find what native_build.py needs, prove that it works, or say in one line why it does not."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90"


class NativeBuildError(Exception):
    """The native module, or its CUDA half, cannot be built here; the text says why."""


def flag(name: str) -> bool:
    """Whether an environment switch is on."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def run(command: list[str]) -> str:
    """Run a tool and return all it printed; when it fails, show that and raise with the first error in it."""
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        raise NativeBuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no output"]
        print(*lines[-60:], sep="\n", file=sys.stderr)
        first = next((line for line in lines if re.search(r"\berror\s*:", line)), lines[-1])
        tool = command[2] if command[1] == "-m" else Path(command[0]).name
        raise NativeBuildError(f"{tool} failed: {first.strip()}")
    return done.stdout


def jobs() -> int:
    """min(cores, memory / 2 GB, MAX_JOBS), at least 1: nvcc takes about 1 GB, g++ half of that."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2_000_000_000
    except (ValueError, OSError, AttributeError):
        memory = cores
    asked = os.environ.get("MAX_JOBS", "")
    return max(1, min(cores, memory, int(asked) if asked.isdigit() else cores))


def find_ninja() -> list[str]:
    """The command that runs ninja."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if found := shutil.which("ninja"):
        return [found]
    raise NativeBuildError("ninja is not installed")


def find_cxx() -> tuple[list[str], list[str]]:
    """A working C++20 compiler as a command, and the flags for headers and OpenMP; proven by compiling a few lines."""
    if os.name != "posix":
        raise NativeBuildError(f"the native module is not built on {sys.platform}")
    if importlib.util.find_spec("pybind11") is None:
        raise NativeBuildError("pybind11 is not installed")
    import pybind11

    named = os.environ.get("CXX")
    command = shlex.split(named) if named else [next(filter(shutil.which, ("g++", "clang++", "c++")), "g++")]
    if shutil.which(command[0]) is None:
        raise NativeBuildError(f"no C++ compiler: {command[0]} not found")
    python = sysconfig.get_paths()["include"]
    include = [f"-I{pybind11.get_include()}", f"-I{python}", f"-I{CSRC}"]
    return command, [*_prove(tuple(command), tuple(include)), *include]


@functools.cache
def _prove(command: tuple[str, ...], include: tuple[str, ...]) -> list[str]:
    """Compile a few lines with what the module needs; return the flag for OpenMP, where the compiler has it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <pybind11/pybind11.h>\n#include <bit>\nstatic_assert(std::bit_cast<int>(1.0f) > 0);\n"
        )
        run([*command, "-std=c++20", *include, "-fsyntax-only", str(source)])
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
        try:
            run([*command, "-fopenmp", str(source), "-o", str(Path(folder, "probe"))])
        except NativeBuildError:
            return []  # loops run on one thread
    return ["-fopenmp"]


def find_nvcc() -> tuple[str, list[str]]:
    """nvcc, and the -gencode numbers to compile for; never looks at a device."""
    if flag("CL_KERNELS_NO_CUDA"):
        raise NativeBuildError("switched off by CL_KERNELS_NO_CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin")] if home else [None, "/usr/local/cuda/bin"]  # None: PATH
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if nvcc is None:
        raise NativeBuildError(f"nvcc not found in {places[0]}" if home else "nvcc not found")
    known = re.findall(r"compute_(\d+[af]?)", run([nvcc, "--list-gpu-arch"]))
    asked = re.findall(r"\d+[af]?", (os.environ.get("CL_KERNELS_CUDA_ARCHS") or DEFAULT_ARCHS).replace(".", ""))
    archs = [arch for arch in asked if arch.rstrip("af") in known]
    if not archs:
        raise NativeBuildError(f"nvcc knows none of the architectures {asked}; it knows {known}")
    return nvcc, sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch))


def compiler_name(command: str) -> str:
    """The line of ``--version`` that carries the number."""
    lines = [line for line in run([command, "--version"]).splitlines() if line.strip()]
    return next((line.strip() for line in lines if "release" in line), lines[0].strip() if lines else command)
