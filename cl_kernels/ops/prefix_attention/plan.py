"""Merge or concatenate: which of the two forms is faster, by shape."""

from __future__ import annotations

__all__ = ["merges"]


def merges(device: str, queries: int, keys: int, prefix: int) -> bool:
    """Whether merging beats concatenation."""
    return 8 * queries <= keys + prefix
