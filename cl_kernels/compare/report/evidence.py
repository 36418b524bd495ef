"""The evidence beside the sweep: the data card, probes without training, the distance to pre-training."""

from __future__ import annotations

from .arms import Arms, Results
from .blocks import Block, Note, Section

__all__ = ["evidence"]


def evidence(results: Results, arms: Arms) -> Section:
    """Data card, probes and distance."""
    blocks: list[Block] = [Note("No evidence was recorded.")]
    return Section("evidence", "Evidence about the data", blocks)
