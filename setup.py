"""The part of the build that pyproject.toml cannot say: the native module, which is optional.

No compiler: a pure wheel. No nvcc: the CPU half alone. Either way the install succeeds with one message, and
``cl_kernels/_build_info.json`` records what was built, or why not; see csrc/native_build.py for the switches.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import native_build  # noqa: E402 - found through the line above: an isolated build does not see the source folder

MODULE = "cl_kernels._C"


def why_pure() -> str | None:
    """Why no native module can be built here, or None; decided early, because it decides the wheel's name."""
    try:
        native_build.find_cxx()
        native_build.find_ninja()
    except native_build.NativeBuildError as error:
        if native_build.flag("CL_KERNELS_REQUIRE_CUDA"):
            raise SystemExit(f"CL_KERNELS_REQUIRE_CUDA is set, but there is no native module: {error}") from error
        return str(error)
    return None


def record(folder: Path, info: native_build.BuildInfo) -> None:
    """Write the build's report into the package, and say in one line what was left out."""
    (folder / "_build_info.json").write_text(json.dumps(info.as_dict(), indent=1) + "\n")
    if not info.native:
        message = f"pure Python, because {info.native_reason}"
    elif not info.cuda:
        message = f"native module for the CPU, without CUDA because {info.cuda_reason}"
    else:
        message = f"native module with CUDA for {' '.join(info.cuda_archs)}"
    print(f"cl_kernels: {message}")


class BuildPython(build_py):
    """Copies the Python files, and records why there is no native module when there is none."""

    def run(self) -> None:
        package = ROOT / "cl_kernels" if self.editable_mode else Path(self.build_lib, "cl_kernels")
        if not self.editable_mode and package.exists():
            shutil.rmtree(package)  # a module deleted since the last build must not live on in the wheel
        super().run()
        if PURE:
            record(package, native_build.BuildInfo(native_reason=PURE))


class BuildNative(build_ext):
    """Hands the one extension to native_build; a failure that is not required to succeed leaves a pure package."""

    def run(self) -> None:
        output = Path(self.get_ext_fullpath(MODULE)).resolve()
        try:
            info = native_build.build(output, ROOT / "build" / f"native-{sys.implementation.cache_tag}")
        except native_build.NativeBuildError as error:
            if native_build.flag("CL_KERNELS_REQUIRE_CUDA") or native_build.flag("CL_KERNELS_WERROR"):
                raise SystemExit(str(error)) from error
            info = native_build.BuildInfo(native_reason=str(error))
        record(output.parent, info)

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an in-place build writes straight to its place."""

    def get_outputs(self) -> list[str]:
        output = Path(self.get_ext_fullpath(MODULE))
        return [str(output)] if output.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


PURE = why_pure()
setup(
    # The benchmarks lie beside the package in the tree and inside it once installed, where `cl-kernels bench` looks.
    packages=[*find_packages(include=["cl_kernels", "cl_kernels.*"]), "cl_kernels.benchmarks"],
    package_dir={"cl_kernels.benchmarks": "benchmarks"},
    ext_modules=[] if PURE else [Extension(MODULE, sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
