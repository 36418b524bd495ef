"""`cl-kernels doctor`: what is installed, what was built, which implementation runs, and whether it is right."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cl_kernels.cli import _console, _errors, selftest
from cl_kernels.cli._options import nearest

if TYPE_CHECKING:
    import typer

#: Every variable of ours that anything reads: a test compares it with the sources.
VARIABLES = {
    "CL_KERNELS_BACKEND": "auto, native, triton or reference",
    "CL_KERNELS_CUDA_ARCHS": "architectures to build for",
    "CL_KERNELS_DATA": "folder of data sets",
    "CL_KERNELS_DEBUG": "1 shows tracebacks on the command line",
    "CL_KERNELS_DUMP": "folder for matrices that no eigensolver could handle",
    "CL_KERNELS_NO_CUDA": "1 leaves the CUDA part out of the build",
    "CL_KERNELS_REQUIRE_CUDA": "1 makes a failed CUDA build fatal",
    "CL_KERNELS_STRICT": "1 turns a fallback into an error",
    "CL_KERNELS_WERROR": "1 makes compiler warnings errors in a build",
}
EXTRAS = (
    "numpy",
    "safetensors",
    "triton",
    "timm",
    "torchvision",
    "typer",
    "rich",
    "scikit-learn",
    "pillow",
    "matplotlib",
    "tensorboard",
)
OLDEST_TORCH = (2, 11)


def register(app: "typer.Typer") -> None:
    """Add the command."""
    from typer import Exit, Option, echo

    @app.command()
    def doctor(
        as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of tables")] = False,
    ) -> None:
        """Report versions, devices, the native build and what runs each operation, and test all of it (10 s)."""
        facts = examine()
        if as_json:
            echo(json.dumps(facts, indent=1))
        else:
            show(facts)
        raise Exit(_errors.FAILED if facts["problems"] else _errors.FINE)


def examine() -> dict[str, Any]:
    """Everything doctor knows, as JSON values. `problems` is what must be mended, `notes` what is worth knowing."""
    import torch

    from cl_kernels._version import __version__
    from cl_kernels.ops import _native, _registry

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    kinds = sorted({device.type for device in devices})
    tests = list(selftest.run(devices))
    facts: dict[str, Any] = {
        "cl_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()},
        "packages": {name: _version(name) for name in EXTRAS},
        "devices": [_device(d) for d in devices],
        "driver": _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _ask(_nvcc(), "--version"),
        "native": {
            "loaded": _native.load() is not None,
            "reason": _native.why_missing(),
            "cuda": _native.cuda_built(),
            "build": _native.build_record(),
        },
        "backend": _registry.backend(),
        "ops": {
            name: {kind: _registry.explain(name, torch.empty(0, device=kind)) for kind in kinds}
            for name in sorted(_registry.OPS)
        },
        "environment": {n: os.environ[n] for n in sorted(os.environ) if n in VARIABLES},
        "unknown_variables": [n for n in sorted(os.environ) if n.startswith("CL_KERNELS_") and n not in VARIABLES],
        "self_test": [{**asdict(t), "ok": t.ok} for t in tests],
    }
    facts["problems"], facts["notes"] = _judge(facts)
    return facts


def _judge(facts: dict[str, Any]) -> tuple[list[str], list[str]]:
    problems = [
        f"{t['op']} on {t['device']} ({t['backend']}): {t['failure']}" for t in facts["self_test"] if not t["ok"]
    ]
    notes: list[str] = []
    if not facts["self_test"]:
        problems.append("no operation is registered: the package is not whole")
    version = facts["torch"]["version"]
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()) < OLDEST_TORCH:
        problems.append(f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}, the oldest supported")
    native = facts["native"]
    if not native["loaded"]:
        built = native["build"].get("native")
        (problems if built else notes).append(f"{native['reason']}; the plain torch reference runs instead")
    elif not native["cuda"]:
        notes.append(
            f"the native module has no CUDA part: {native['build'].get('cuda_reason') or 'reason not recorded'}"
        )
    for name in facts["unknown_variables"]:
        notes.append(f"environment variable {name} is read by nothing{nearest(name, VARIABLES)}")
    cuda = facts["torch"]["cuda"]
    if cuda is None and facts["driver"]:
        notes.append("there is an NVIDIA driver, but this torch was built without CUDA")
    if cuda and "11.6" <= cuda <= "12.1":
        notes.append(
            f"eigh of CUDA {cuda} is known to be unstable; every result is verified, and retried on the CPU if wrong"
        )
    return problems, notes


def show(facts: dict[str, Any]) -> None:
    """The facts as tables."""
    console = _console.console()
    plain = _console.listing()
    torch_facts, native = facts["torch"], facts["native"]
    plain.add_row("cl_kernels", facts["cl_kernels"])
    plain.add_row("python", f"{facts['python']} on {facts['platform']}")
    plain.add_row(
        "torch", f"{torch_facts['version']}, CUDA {torch_facts['cuda'] or 'none'}, {torch_facts['threads']} threads"
    )
    plain.add_row("packages", ", ".join(f"{n} {v}" for n, v in facts["packages"].items() if v))
    plain.add_row("not installed", ", ".join(n for n, v in facts["packages"].items() if not v) or "-")
    plain.add_row("devices", "; ".join(facts["devices"]))
    plain.add_row("driver, nvcc", f"{facts['driver'] or 'no NVIDIA driver'}; {facts['nvcc'] or 'no nvcc'}")
    built = "loaded" if native["loaded"] else f"not loaded: {native['reason']}"
    plain.add_row(
        "native module", built + (", with CUDA" if native["cuda"] else ", CPU only" if native["loaded"] else "")
    )
    console.print(plain)
    title = f"Self-test, backend {facts['backend']!r}: the first line of an operation and device is what runs"
    console.print(f"\n{title}", markup=False)
    table = _console.table("operation", "device", "implementation", "error", "")
    for test in facts["self_test"]:
        error = "-" if test["error"] is None else f"{test['error']:.0e}"
        table.add_row(test["op"], test["device"], test["backend"], error, "ok" if test["ok"] else "FAILED")
    console.print(table)
    for kind in ("problems", "notes"):
        for text in facts[kind]:
            console.print(f"{kind[:-1]}: {text}", markup=False)
    console.print("All is well." if not facts["problems"] else f"{len(facts['problems'])} problem(s).")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: Any) -> str:
    import torch

    if device.type == "cpu":
        return f"cpu ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})"
    facts = torch.cuda.get_device_properties(device)
    return f"{device} {facts.name} (sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB)"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return os.path.join(home, "bin", "nvcc") if home else "nvcc"


def _ask(program: str, *arguments: str) -> str | None:
    """What a program says about its version, or None: it may be missing, hang, or fail."""
    found = shutil.which(program)
    if found is None:
        return None
    try:
        answer = subprocess.run([found, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[-1] if lines else None)
