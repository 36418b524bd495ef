"""Run the drop-in tests with the real packages, in an environment of their own beside .venv.

    .venv/bin/python scripts/integrations.py [arguments of pytest]

`.venv-integrations` sees everything of the interpreter that runs this, and gets the extra `integrations` on top, held
by a constraint on torch: it is never replaced, and .venv is not touched. Mammoth and PILOT are not packages; their call
sequences are replayed, which the end of the run says.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-integrations"
PYTHON = VENV / ("Scripts" if os.name == "nt" else "bin") / "python"
TESTS = ("tests/test_integrations.py", "tests/test_integrations_packages.py")


def run(*command: str | Path) -> None:
    """Run a command that must succeed; its output is shown."""
    code = subprocess.call([str(word) for word in command], cwd=ROOT)
    if code:
        sys.exit(f"integrations: '{' '.join(map(str, command))}' failed with exit code {code}")


def ask(code: str) -> str:
    done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, cwd=ROOT / "scripts", check=True)
    return done.stdout.strip()


def make_venv() -> None:
    """An empty environment that looks into this one as well."""
    if not PYTHON.exists():
        run(sys.executable, "-m", "venv", VENV)
        inside = Path(ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
        outside = sysconfig.get_path("purelib")
        (inside / "outer.pth").write_text(f"import site; site.addsitedir({outside!r})\n", encoding="utf-8")


def install() -> None:
    """The extra, with torch and torchvision pinned to what is there."""
    pins = VENV / "constraints.txt"
    names = ("torch", "torchvision")
    pins.write_text("".join(f"{name}=={importlib.metadata.version(name).split('+')[0]}\n" for name in names))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    run(PYTHON, "-m", "pip", "install", "-qq", "-c", pins, *project["optional-dependencies"]["integrations"])
    before, after = importlib.metadata.version("torch"), ask("import torch; print(torch.__version__)")
    if before != after:
        sys.exit(f"integrations: stopped, torch became {after} instead of {before}; remove {VENV.name}")


def main() -> None:
    make_venv()
    install()
    run(PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(sys.argv[1:] or TESTS))


if __name__ == "__main__":
    main()
