"""Run every linter over the whole tree, all of them even when one fails; ``--fix`` lets the formatters write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    fix = "--fix" in sys.argv[1:]
    tool = [sys.executable, "-m"]
    native = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in CXX_SUFFIXES)
    checks = {
        "ruff check": [*tool, "ruff", "check", "."] + (["--fix"] if fix else []),
        "ruff format": [*tool, "ruff", "format", "."] + ([] if fix else ["--check"]),
        "mypy": [*tool, "mypy"],
        "clang-format": [str(Path(sys.executable).parent / "clang-format")]
        + (["-i"] if fix else ["--dry-run", "--Werror"])
        + native,
    }
    failed = []
    for name, command in checks.items():
        print(f"lint: {name}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    print(f"lint: {len(checks) - len(failed)} passed, {len(failed)} failed" + "".join(f" [{name}]" for name in failed))
    return 1 if failed else 0


CXX_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}

if __name__ == "__main__":
    sys.exit(main())
