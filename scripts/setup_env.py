"""Make `.venv` ready for the demo, the tests, the linters or the GPU run, and say each decision in one line.

    python3 scripts/setup_env.py demo|test|lint|gpu

Rules: an installed torch is never upgraded nor doubled; every install is held by constraints that pin it; nothing is
installed that is there already, so a second run, or a run on a machine that has everything, needs no network. pip is
used as it is configured (PIP_FIND_LINKS, indexes, caches). Written for old Pythons too, so that they can say so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "Scripts" if os.name == "nt" else "bin", "python")
CONSTRAINTS = os.path.join(VENV, "constraints.txt")
EXTRAS = {"demo": ["demo"], "test": ["test"], "lint": ["dev"], "gpu": []}
BUILD = ["setuptools>=77", "pybind11>=2.13", "ninja>=1.11"]
OLDEST_TORCH = (2, 11)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # as tests/test_compare_browser.py

# Run by an interpreter: which of the requirements given on the command line are not met there?
MISSING = """
import importlib.metadata, json, sys
from pip._vendor.packaging.requirements import Requirement
missing = []
for text in json.loads(sys.argv[1]):
    wanted = Requirement(text)
    if wanted.marker is not None and not wanted.marker.evaluate():
        continue
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not wanted.specifier.contains(found, prereleases=True):
        missing.append(text)
print(json.dumps(missing))
"""


def say(text: str) -> None:
    print("setup: " + text, flush=True)


def stop(text: str) -> None:
    say("stopped: " + text)
    sys.exit(1)


def run(*command: str) -> None:
    """Run a command that must succeed; its output is shown."""
    code = subprocess.call(command, cwd=ROOT)
    if code:
        stop(f"'{' '.join(command)}' failed with exit code {code}")


def ask(python: str, code: str, *arguments: str) -> str | None:
    """What a piece of Python prints in another interpreter, or None where it fails."""
    # The folder is one without packages in it: this checkout must not be taken for an installed package.
    folder = os.path.join(ROOT, "scripts")
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, cwd=folder, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    """The version of a package as .venv sees it, or None."""
    return ask(PYTHON, "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))", package)


def missing(wanted: list[str]) -> list[str]:
    """Those requirements that .venv does not meet."""
    found = ask(PYTHON, MISSING, json.dumps(wanted))
    return wanted if found is None else json.loads(found)


def find_python() -> str:
    """This interpreter when it is new enough, else the newest on PATH."""
    if sys.version_info >= (3, 11):
        return sys.executable
    for minor in (13, 12, 11):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    stop("Python 3.11 or newer is needed, this is {}.{}; try: make PYTHON=python3.12 ...".format(*sys.version_info))
    return ""


def make_venv() -> None:
    """Create .venv once; it sees the packages of the interpreter outside when that one has a torch."""
    if os.path.exists(PYTHON) and ask(PYTHON, "import pip; print(1)"):
        say(".venv is there already")
        return
    python = find_python()
    torch = ask(python, "import torch; print(torch.__version__)")
    if torch:
        say(f"{python} has torch {torch}: .venv uses it (--system-site-packages)")
    else:
        say(f"{python} has no torch: .venv gets its own")
    if subprocess.call([python, "-m", "venv", *(["--system-site-packages"] if torch else []), VENV]):
        stop("no virtual environment could be made (on Debian and Ubuntu: apt install python3-venv)")
    if torch:
        borrow_from(python)


def borrow_from(python: str) -> None:
    """Make sure that .venv sees what the interpreter outside sees, its setuptools included."""
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inside, outside = ask(PYTHON, site) or "", ask(python, site) or ""
    if ask(PYTHON, "import torch") is None:
        # The interpreter outside is a virtual environment itself, and Python would look past it.
        with open(os.path.join(inside, "outer_environment.pth"), "w") as out:
            out.write(outside + "\n")
    if os.path.isdir(os.path.join(inside, "setuptools")):
        # Python 3.11 puts an old setuptools into each new environment, in front of the one outside.
        run(PYTHON, "-m", "pip", "uninstall", "-qq", "-y", "setuptools")


def install_torch() -> str:
    """Install torch where there is none, pin it for all that follows, and return its version."""
    found = version_of("torch")
    if found:
        if ask(PYTHON, "import torch") is None:
            stop(f"torch {found} is installed but does not import")
        if tuple(map(int, found.split(".")[:2])) < OLDEST_TORCH:
            stop(
                f"torch {found} is older than {'.'.join(map(str, OLDEST_TORCH))}, and is not upgraded behind your back"
            )
        say(f"torch {found} is there and stays")
    elif shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version"):
        say("NVIDIA driver found: installing torch with CUDA (several GB)")
        run(PYTHON, "-m", "pip", "install", "-qq", "torch>=2.11")
    else:
        say("no NVIDIA driver: installing the torch of constraints-cpu.txt")
        run(PYTHON, "-m", "pip", "install", "-qq", "-c", "constraints-cpu.txt", "torch")
    version = version_of("torch") or ""
    write_constraints(version)
    return version


def write_constraints(torch: str) -> None:
    """Pin torch, and torchvision too: the one that is there, else the one known to go with this torch."""
    with open(os.path.join(ROOT, "constraints-cpu.txt")) as lines:
        known = dict(re.findall(r"^(\w+)==(\S+)", lines.read(), re.M))
    pins = {"torch": torch.split("+")[0]}
    vision = version_of("torchvision") or (known["torchvision"] if known["torch"] == pins["torch"] else None)
    if vision:
        pins["torchvision"] = vision.split("+")[0]
    with open(CONSTRAINTS, "w") as out:
        out.writelines(f"{name}=={version}\n" for name, version in pins.items())


def requirements(extras: list[str]) -> list[str]:
    """What pyproject.toml asks for these extras, with our own extras followed."""
    code = "import json, tomllib; print(json.dumps(tomllib.load(open('../pyproject.toml', 'rb'))['project']))"
    project = json.loads(ask(PYTHON, code) or "{}")
    found, todo = list(project["dependencies"]), list(extras)
    while todo:
        for text in project["optional-dependencies"][todo.pop()]:
            own = re.match(r"cl-kernels\[([\w,]+)\]", text)
            if own:
                todo.extend(own.group(1).split(","))
            elif text not in found:
                found.append(text)
    return found


def install_requirements(goal: str) -> None:
    """Install what is missing for the goal, held by the constraints."""
    wanted = list(dict.fromkeys(BUILD + requirements(EXTRAS[goal])))
    lacking = missing(wanted)
    if not lacking:
        say(f"all {len(wanted)} requirements of '{goal}' are there")
        return
    say("installing " + ", ".join(re.split(r"[<>=;\[ ]", text)[0] for text in lacking))
    run(PYTHON, "-m", "pip", "install", "-qq", "-c", CONSTRAINTS, *lacking)


def install_package() -> None:
    """Build and install the package itself, and nothing else."""
    if missing(BUILD):
        say("building cl_kernels with build isolation")
        run(PYTHON, "-m", "pip", "install", "-qq", "--no-deps", "-e", ".")
    else:
        say("building cl_kernels without build isolation: no network needed")
        run(PYTHON, "-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation", "-e", ".")
    with open(os.path.join(ROOT, "cl_kernels", "_build_info.json")) as text:
        info = json.load(text)
    if not info["native"]:
        say(f"no native module: {info['native_reason']}; the reference code runs instead")
    elif info["cuda"]:
        say(f"native module built by {info['compiler']}, with CUDA for {' '.join(info['cuda_archs'])}")
    else:
        say(f"native module built by {info['compiler']}; CUDA part left out: {info['cuda_reason']}")


def install_browser() -> None:
    """In CI, where root can ask apt, install Debian's Chromium for the browser tests; anywhere else leave the machine
    as it is. Whatever goes wrong here skips those tests and stops nothing."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found:
        say(f"browser tests use {found}")
        return
    apt = shutil.which("apt-get")
    if os.environ.get("CI", "").lower() not in ("1", "true", "yes") or apt is None or os.geteuid() != 0:
        say("no Chromium: the browser tests are skipped (only CI as root, with apt, installs one)")
        return
    options = [
        "-qq",
        "-y",
        "-o",
        "DPkg::Lock::Timeout=60",
        "-o",
        "Acquire::Retries=1",
        "-o",
        "Acquire::http::Timeout=20",
    ]
    wanted = ["--no-install-recommends", "install", "chromium", "fonts-dejavu-core"]  # without a font text has no size
    start, env = time.time(), dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    try:
        for command in (["update"], wanted):
            done = subprocess.run(
                [apt, *options, *command], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, timeout=300, check=False,
            )  # fmt: skip
        reason = "" if done.returncode == 0 else f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = type(error).__name__
    if reason or not shutil.which("chromium"):
        say(
            "apt-get could not install chromium ({}): the browser tests are skipped".format(reason or "not on the path")
        )
    else:
        say(f"apt-get installed chromium for the browser tests in {time.time() - start:.0f} s")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRAS:
        stop("usage: setup_env.py " + "|".join(EXTRAS))
    goal = sys.argv[1]
    make_venv()
    before = install_torch()
    install_requirements(goal)
    if goal == "test":
        install_browser()
    if goal != "lint":
        install_package()
    after = version_of("torch")
    if before != after:
        stop(f"an install changed torch from {before} to {after}; remove .venv and run again")


if __name__ == "__main__":
    main()
