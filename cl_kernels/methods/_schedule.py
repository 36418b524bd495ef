"""Learning rate multipliers, one per epoch (or per step, where a task says how many steps it has)."""

from __future__ import annotations

import math

__all__ = ["SCHEDULES", "multipliers"]

SCHEDULES = ("constant", "cosine", "warmup-cosine", "steps", "steps-official", "halves", "quarter-cosine")
FLOOR = 1e-3  # where "warmup-cosine" ends, as a share of its top


def multipliers(schedule: str, epochs: int, warmup: float = 0.1) -> list[float]:
    """The factor on the learning rate in each of `epochs` epochs.

    "constant": 1. "cosine": (1 + cos(pi e / E)) / 2. "warmup-cosine": climbs by (e + 1) / (W + 1) in the first W =
    round(warmup E) epochs (at most E - 2), so that the first is not spent at rate 0 as in the official VPT code, is 1
    in epoch W and falls by half a cosine to 0.001 in the last. "steps": x 0.1 at 50 % and again at 80 % (the NSP2
    paper). "steps-official": the same one epoch early, because the official code's scheduler looks up epoch + 1; ten
    epochs split 4/3/3 (method-null-space.md T4). "halves": x 0.5 at 3/8 and again at 3/4 (Adam-NSCL: epochs 30 and 60
    of 80). "quarter-cosine": cos(99 pi e / (200 (E - 1))), from 1 to 0.0157 (CODA-Prompt; its code repeats the first
    factor and never takes the last). Raises `ValueError` for another name."""
    if schedule == "constant":
        return [1.0] * epochs
    if schedule == "cosine":
        return [0.5 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)]
    if schedule == "warmup-cosine":
        rising = max(min(round(warmup * epochs), epochs - 2), 0)
        falling = max(epochs - 1 - rising, 1)
        climb = [(epoch + 1) / (rising + 1) for epoch in range(rising)]
        waves = [0.5 * (1 + math.cos(math.pi * epoch / falling)) for epoch in range(epochs - rising)]
        return climb + [FLOOR + (1 - FLOOR) * wave for wave in waves]
    if schedule == "quarter-cosine":
        return [math.cos(0.495 * math.pi * epoch / max(epochs - 1, 1)) for epoch in range(epochs)]
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "halves":
        return [0.5 ** sum(epoch >= part * epochs for part in (0.375, 0.75)) for epoch in range(epochs)]
    early = 1 if schedule == "steps-official" else 0
    milestones = (round(0.5 * epochs), round(0.8 * epochs))
    return [0.1 ** sum(epoch + early >= milestone for milestone in milestones) for epoch in range(epochs)]
