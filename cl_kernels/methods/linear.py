"""Heads only, on features that never change."""

from __future__ import annotations

from typing import ClassVar

from cl_kernels.methods._base import HeadMethod

__all__ = ["Linear"]


class Linear(HeadMethod):
    """One head per task on the frozen feature: what is learned without touching the backbone. It cannot drift."""

    name: ClassVar[str] = "linear"
    frozen = True
