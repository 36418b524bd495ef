"""The peak memory that one call takes beyond what was in use before: resident pages, so native scratch counts too."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

__all__ = ["peak_extra"]

MAPPED_FROM: Final = 1 << 16  # bytes; larger blocks go back to the system at once, so that the peak is of this call
# What glibc's own adaptation ends at after a few large blocks; with it, temporaries are reused as in a long run.
STEADY: Final = 32 << 20
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's names for mallopt


def peak_extra(call: Callable[[], Any]) -> int | None:
    """Bytes at the peak of one call minus bytes before it, its result included; None where the system cannot say.

    Linux only: the peak of the resident set is reset through /proc/self/clear_refs. Exact to a few hundred kB.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, MAPPED_FROM)
        gc.collect()
        libc.malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            result = call()
            peak = _status("VmHWM")
            del result
        finally:
            libc.mallopt(_MMAP_THRESHOLD, STEADY)
            libc.mallopt(_TRIM_THRESHOLD, 2 * STEADY)
    except (OSError, AttributeError, KeyError):  # not Linux, not glibc, or a container that forbids it
        return None
    return max(0, peak - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))
