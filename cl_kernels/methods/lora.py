"""LoRA methods without a memory of inputs: one adapter for all tasks, O-LoRA, SD-LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cl_kernels.methods._lora import LoRAMethod, LoRAOptions
from cl_kernels.methods._options import Options
from cl_kernels.methods._task import Batches, Task

__all__ = ["OLoRA", "SDLoRA", "SequentialLoRA"]


class SequentialLoRA(LoRAMethod):
    """The lower line of the comparison: one adapter that every task trains on, and nothing protects the earlier ones.
    `penalty`, `inference` and `clusters` are without effect."""

    name: ClassVar[str] = "sequential-lora"

    @property
    def protocol(self) -> str:
        return "one model for every image"

    def _enforcement(self) -> Any:
        return None

    def _start(self, task: Task) -> None:
        if not self.model.training_task:
            self.model.begin_task()

    @torch.no_grad()
    def _finish(self, task: Task, loader: Batches) -> None:
        """The adapter stays open for the next task."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model(images)
        return features


@dataclass(frozen=True, kw_only=True)
class OLoRAOptions(LoRAOptions):
    """As `LoRAOptions`; penalty 0.5 as published."""

    penalty: float = 0.5


class OLoRA(LoRAMethod):
    """O-LoRA (Wang et al., EMNLP 2023): the new down-projection is kept apart from all earlier ones by
    `penalty * sum |A_old^T A|` (element by element, the cross block alone), and all adapters add up.

    Trap of the official code that cannot occur: a history that was not loaded makes the penalty read 0; here it is part
    of the state. Guaranteed: earlier factors do not change. Not guaranteed: that old inputs see no change: A_t^T A_i
    = 0 makes the updates orthogonal, not the new one blind to old inputs."""

    name: ClassVar[str] = "o-lora"
    options_type: ClassVar[type[Options]] = OLoRAOptions
    composition: ClassVar[str] = "o-lora"
    options: OLoRAOptions


class SDLoRA(LoRAMethod):
    """SD-LoRA (Wu et al., ICLR 2025): earlier adapters stay as directions A_i B_i / (||A_i|| ||B_i||) whose sizes go on
    training, and the current one trains with a size of its own. `penalty` is without effect.

    Trap of the official code that cannot occur: its evaluation module overwrites the sum over adapters."""

    name: ClassVar[str] = "sd-lora"
    composition: ClassVar[str] = "sd-lora"
