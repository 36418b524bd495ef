"""Compile csrc/ into one extension module: g++ for .cpp, nvcc for .cu, ninja for the schedule. No torch anywhere.

``setup.py`` calls :func:`build`; tests call the pieces. Everything that can go wrong with a toolchain raises
:class:`NativeBuildError` with one readable reason, so that the caller can fall back to less: the CPU half
alone, then pure Python. The environment steers it:

``CL_KERNELS_NO_CUDA=1``       leave the CUDA half out
``CL_KERNELS_REQUIRE_CUDA=1``  a missing CUDA half is an error instead of a note
``CL_KERNELS_CUDA_ARCHS``      for example ``"80;90"`` (the default); cut to what nvcc knows, PTX of the newest is added
``CL_KERNELS_WERROR=1``        warnings (spilled registers among them) are errors, and errors stop the build
``MAX_JOBS``                   most compilers at once; never more than the cores, nor than memory / 2 GB
``CXX``, ``CUDA_HOME``         which compilers; ``CXXFLAGS`` is added to the former's flags
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from native_toolchain import (
    CSRC,
    NativeBuildError,
    compiler_name,
    find_cxx,
    find_ninja,
    find_nvcc,
    flag,
    jobs,
    run,
)

CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-g0"]
# No psabi: vectors passed by value between inlined functions never meet another compiler's idea of them.
CXX_WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-Xfatbin", "-compress-all", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_WARNINGS = ["-Xptxas", "-v,-warn-spills", "-Xcompiler", "-Wall,-Wextra"]


@dataclass
class Kernel:
    """What ptxas said about one kernel on one architecture."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0


@dataclass
class BuildInfo:
    """Written to ``cl_kernels/_build_info.json``; ``cl-kernels doctor`` shows it."""

    native: bool = False
    native_reason: str | None = None
    cuda: bool = False
    cuda_reason: str | None = None
    compiler: str | None = None
    flags: str | None = None
    cuda_compiler: str | None = None
    cuda_flags: str | None = None
    cuda_archs: list[str] = field(default_factory=list)
    jobs: int = 0
    kernels: list[Kernel] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def gencode(archs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest portable one for every later device."""
    portable = [arch for arch in archs if arch.isdigit()]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if portable:
        flags.append(f"-gencode=arch=compute_{portable[-1]},code=compute_{portable[-1]}")
    return flags


def sources(cuda: bool) -> list[Path]:
    """Every source in csrc/, so that a room only adds its files."""
    return sorted(CSRC.glob("*.cpp")) + (sorted(CSRC.glob("*.cu")) if cuda else [])


@dataclass
class Toolchain:
    """The programs of one build and their flags; ``nvcc`` is None for the CPU half alone."""

    ninja: list[str]
    cxx: list[str]
    cxx_flags: list[str]
    nvcc: str | None = None
    nvcc_flags: list[str] = field(default_factory=list)


def build(output: Path, work: Path) -> BuildInfo:
    """Compile and link ``output``, with ``work`` kept between calls so that only what changed is compiled again.

    Raises NativeBuildError when not even the CPU half can be built, or CUDA is required and cannot be.
    """
    strict = flag("CL_KERNELS_WERROR")
    cxx, extra = find_cxx()
    added = shlex.split(os.environ.get("CXXFLAGS", ""))
    tools = Toolchain(find_ninja(), cxx, [*CXX_FLAGS, *CXX_WARNINGS, *(["-Werror"] if strict else []), *added, *extra])
    flags = shlex.join(word for word in tools.cxx_flags if not word.startswith("-I"))
    info = BuildInfo(native=True, compiler=compiler_name(cxx[0]), flags=flags, jobs=jobs())
    try:
        nvcc, archs = find_nvcc()
        warnings = [*NVCC_WARNINGS, *(["-Werror", "all-warnings"] if strict else [])]
        host = ["-ccbin", cxx[0]] if "CXX" in os.environ else []
        nvcc_flags = [*NVCC_FLAGS, *warnings, *host, *gencode(archs)]
        info.cuda_compiler = compiler_name(nvcc)
    except NativeBuildError as error:
        return _without_cuda(output, work, tools, info, error)
    flags = shlex.join(nvcc_flags)
    with_cuda = replace(info, cuda=True, cuda_flags=flags, cuda_archs=re.findall(r",code=(\w+)", flags))
    try:
        return _compile(output, work / "cuda", replace(tools, nvcc=nvcc, nvcc_flags=nvcc_flags), with_cuda)
    except NativeBuildError as error:
        if strict:
            raise
        return _without_cuda(output, work, tools, info, error)


def _without_cuda(output: Path, work: Path, tools: Toolchain, info: BuildInfo, error: NativeBuildError) -> BuildInfo:
    if flag("CL_KERNELS_REQUIRE_CUDA"):
        raise NativeBuildError(f"CL_KERNELS_REQUIRE_CUDA is set, but there is no CUDA half: {error}") from error
    return _compile(output, work / "cpu", tools, replace(info, cuda_reason=str(error)))


def _compile(output: Path, work: Path, tools: Toolchain, info: BuildInfo) -> BuildInfo:
    work.mkdir(parents=True, exist_ok=True)
    _write(work / "build_config.h", _header(info))
    objects = [(source, work / f"{source.name}.o") for source in sources(info.cuda)]
    _write(work / "build.ninja", _ninja(work, objects, tools))
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(work / "lock"):
        run([*tools.ninja, "-C", str(work), "-j", str(info.jobs)])
        # Linked there, moved here in one step: a process that runs keeps the old file, and the CPU and CUDA work
        # folders, which share one output, cannot take each other's for their own.
        shutil.copy2(work / "module.so", f"{output}.new")
        os.replace(f"{output}.new", output)
    info.kernels = [kernel for source, target in objects if source.suffix == ".cu" for kernel in spills(target)]
    return info


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one build at a time into a work folder; ninja itself does not look."""
    import fcntl  # POSIX only, as the module is

    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _header(info: BuildInfo) -> str:
    texts = {"CLK_CXX": info.compiler, "CLK_CXX_FLAGS": info.flags}
    if info.cuda:
        archs = " ".join(info.cuda_archs)
        texts |= {"CLK_NVCC": info.cuda_compiler, "CLK_NVCC_FLAGS": info.cuda_flags, "CLK_CUDA_ARCHS": archs}
    # A JSON string is a C string, as long as it is ASCII.
    lines = [f"#define {name} {json.dumps(text)}" for name, text in texts.items()]
    return "\n".join(
        ["// Made by native_build.py.", "#pragma once", *lines, "#define CLK_CUDA 1" if info.cuda else "", ""]
    )


def _write(path: Path, text: str) -> None:
    """Leave an unchanged file alone, so that ninja sees nothing new."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _ninja(work: Path, objects: list[tuple[Path, Path]], tools: Toolchain) -> str:
    def path(value: Path) -> str:
        return re.sub(r"([ :$])", r"$\1", str(value))

    def command(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    openmp = ["-fopenmp"] if "-fopenmp" in tools.cxx_flags else []
    # nvcc links when there is CUDA code: it alone knows where its static run-time library lies.
    cuda_link = [tools.nvcc or "", "-shared", "-cudart", "static", *(f"-Xcompiler={word}" for word in openmp)]
    link = cuda_link if tools.nvcc else [*tools.cxx, "-shared", *openmp]
    # Linux: none of what is linked in, libcudart_static above all, may be seen from outside.
    hide = ["-Xlinker", "--exclude-libs", "-Xlinker", "ALL"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else hide
    nvcc = command(tools.nvcc or "", *tools.nvcc_flags, f"-I{CSRC}")
    # ptxas's report is kept beside the object, where spills() reads it; it is shown when the compiler fails.
    text = f"""ninja_required_version = 1.8
rule cxx
  command = {command(*tools.cxx, *tools.cxx_flags, f"-I{work}")} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)
  depfile = $out.d
  deps = gcc
rule link
  command = {command(*link, *undefined)} $in -o $out
"""
    for source, target in objects:
        text += f"build {path(target)}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {path(source)}\n"
    return text + f"build module.so: link {' '.join(path(target) for _, target in objects)}\n"


def spills(target: Path) -> list[Kernel]:
    """Read ptxas's report on one object file: registers, stack, spilled bytes and shared memory of each kernel."""
    log = Path(f"{target}.log")
    kernels: list[Kernel] = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernels.append(Kernel(*found.groups()))
        elif kernels:
            for pattern, name in (
                (r"(\d+) bytes stack frame", "stack"),
                (r"(\d+) bytes spill stores", "spill_stores"),
                (r"(\d+) bytes spill loads", "spill_loads"),
                (r"Used (\d+) registers", "registers"),
                (r"(\d+) bytes smem", "shared"),
            ):
                if number := re.search(pattern, line):
                    setattr(kernels[-1], name, max(getattr(kernels[-1], name), int(number[1])))
    return kernels
