"""What `null_space_projector` warns about. Each points at the line that called it, however deep it is found."""

from __future__ import annotations

import sys
import warnings
from typing import Final

from cl_kernels.ops.rules import Rule

__all__ = ["INDEFINITE", "frozen", "indefinite", "indefinite_somewhere", "missed", "zero"]

INDEFINITE: Final = 1e-5  # of the largest eigenvalue; float32 sums leave 2e-7, sums rounded to bfloat16 3e-5
_ROOM: Final = __name__.rpartition(".")[0]


def frozen(rule: Rule, mix: float) -> None:
    effect = "updates are frozen" if mix == 1 else f"updates are only scaled by {1 - mix:g}"
    _warn(f"{rule} leaves no direction free: {effect}")


def zero() -> None:
    _warn("cov is zero, so every direction is free")


def indefinite(largest: float, smallest: float) -> None:
    """Warns only if the smallest eigenvalue is too far below 0 to be rounding."""
    if smallest < -INDEFINITE * max(largest, -smallest):
        _warn(
            f"cov is not positive semi-definite, its eigenvalues run from {largest:.3e} to {smallest:.3e}; those below "
            "0 count as 0. Sums kept in 16 bits do this"
        )


def indefinite_somewhere(at: int) -> None:
    _warn(f"cov[{at}] is not positive semi-definite; eigenvalues below 0 count as 0. Sums kept in 16 bits do this")


def missed(rule: Rule, at: int, reached: float, energy: bool, evaluations: int) -> None:
    what = f"{reached:.3g} of the energy passes" if energy else f"{reached:.1f} directions stay free"
    _warn(
        f"{rule} is not met by a threshold on cov[{at}]: {what} after {evaluations} evaluations. What lies below the "
        "rounding of the matrix cannot be told apart, nor can equal eigenvalues be parted"
    )


def _warn(message: str) -> None:
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_ROOM):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(f"null_space_projector: {message}", UserWarning, stacklevel=depth)
