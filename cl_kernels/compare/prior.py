"""What has been published (Han et al., ICLR 2024; method-vpt-or-finetune.md 4): shown beside a verdict, never in it."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["prior"]

SOURCE = "Han et al., ICLR 2024 (arXiv 2401.12902), tables as corrected in method-vpt-or-finetune.md 4"

GROUPS = ("Natural", "Specialized", "Structured")
# Prompts minus full fine-tuning in points by the number of training images, ViT-B/16 supervised on ImageNet-21k,
# means over the tasks that have so many images (4.2; the 5000 of Structured as corrected there).
BY_SIZE = {400: (8.6, -2.8, 7.9), 800: (4.3, -0.7, 8.0), 5000: (3.8, -1.8, -2.3), 10_000: (1.2, -1.5, -3.3)}
# (full, prompts) with 1000 images, group means, and in how many tasks prompts won (4.1).
BACKBONES = {
    "ViT-B/16, supervised on ImageNet-21k": (
        (75.19, 83.35, 48.06), (79.53, 82.65, 56.09), ("6 of 7", "2 of 4", "7 of 8"),
    ),
    "Swin-B, supervised on ImageNet-21k": ((79.1, 86.2, 59.7), (82.5, 83.3, 51.9), ("6 of 7", "0 of 4", "0 of 8")),
    "ViT-B, masked autoencoder": ((59.3, 79.7, 53.8), (35.3, 73.0, 27.9), ("2 of 7", "2 of 4", "0 of 8")),
    "ViT-B, MoCo v3": ((71.9, 84.7, 52.0), (70.3, 82.3, 42.4), ("4 of 7", "0 of 4", "0 of 8")),
}  # fmt: skip
SUPERVISED, SWIN, MASKED, MOCO = BACKBONES
NOISE = "Two laboratories differ by up to 9 points on a task; below about 5 points a single task says little."


def family(backbone: str) -> tuple[str, bool]:
    """(the published backbone that is nearest, whether `backbone` is of that family), by its name."""
    name = backbone.lower()
    for sign, found in (("swin", SWIN), ("mae", MASKED), ("moco", MOCO)):
        if sign in name:
            return found, True
    return SUPERVISED, name.startswith("vit_base") and "21k" in name


def prior(backbone: str, size: int) -> dict[str, Any]:
    """The section results["decision"]["prior"]: what is published for the backbone's family and about so many images.

    Gaps are prompts minus full fine-tuning in points, by group of tasks. Nothing of it enters a verdict."""
    nearest, same = family(backbone)
    full, prompts, wins = BACKBONES[nearest]
    gaps = dict(zip(GROUPS, (round(p - f, 1) for f, p in zip(full, prompts))))
    at: float = 1000
    if nearest == SUPERVISED:
        at = min(BY_SIZE, key=lambda known: abs(math.log(known / max(size, 1))))
        gaps = dict(zip(GROUPS, BY_SIZE[int(at)]))
    told = ", ".join(f"{name} {gap:+.1f}" for name, gap in gaps.items())
    text = (
        f"Published for {nearest}, {int(at)} training images: prompts minus full fine-tuning is {told} points by group "
        f"of tasks; with 1000 images prompts won {', '.join(f'{won} {name}' for won, name in zip(wins, GROUPS))}. "
    )
    if not same:
        text += f"Your backbone, {backbone}, is none of those that were studied: take it as background. "
    elif size < 200 or size > 20_000:
        text += f"Your {size} images lie outside of what was studied. "
    return {
        "text": text + NOISE, "source": SOURCE, "backbone": nearest, "same_family": same, "size": int(at), "gaps": gaps,
        "enforced": False,
    }  # fmt: skip
