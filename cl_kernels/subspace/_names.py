"""Parameter names as keys: the same whatever wraps the model, and safe in files."""

from __future__ import annotations

import re

__all__ = ["checked_name", "plain_name"]

_ALLOWED = re.compile(r"[A-Za-z0-9_./-]{1,512}")
_WRAPPERS = ("module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """`name` without the prefixes that DistributedDataParallel and torch.compile put in it."""
    stripped = name
    while stripped.startswith(_WRAPPERS):
        stripped = stripped.split(".", 1)[1]
    return stripped.replace("._orig_mod.", ".")


def checked_name(name: object) -> str:
    """The plain form of `name`; raises `TypeError` or `ValueError` unless it can name a parameter."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    plain = plain_name(name)
    if not _ALLOWED.fullmatch(plain) or ".." in plain or plain.startswith("/"):
        raise ValueError(f"name: expected letters, digits and _ . / - without '..' or a leading '/', got {name!r}")
    return plain
