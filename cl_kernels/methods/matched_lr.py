"""The control the papers lack: no projection, but from task 2 on the step is as small as the projector makes it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor, nn

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._bodies import BodyOptions
from cl_kernels.methods._options import Options, number, require
from cl_kernels.methods._prompts import PromptMethod, PromptOptions
from cl_kernels.methods._subspaces import matched
from cl_kernels.methods._weights import WeightMethod, WeightOptions
from cl_kernels.methods.nsp2 import NSP2, NSP2Options
from cl_kernels.methods.null_space import NullSpace, NullSpaceOptions
from cl_kernels.ops import Sides

__all__ = ["MatchedOptions", "create_matched"]


@dataclass(frozen=True, kw_only=True)
class MatchedOptions(BodyOptions):
    """Options of `matched-lr`.

    * base: "prompts" is the control of nsp2, "full" that of null-space.
    * scale: a number multiplies the body's learning rate from task 2 on; "auto" gives every layer the RMS gain of the
      projector that the projecting method would use there, measured task by task.
    * rule, rule_left, eta, eta_left, normalize, edge, weighting, accumulation, sides: of the projecting method (None:
      its default).
    """

    scale: float | str = "auto"
    rule: str | None = None
    rule_left: str | None = None
    eta: float | None = None
    eta_left: float | None = None
    normalize: str | None = None
    edge: str | None = None
    weighting: str | None = None
    accumulation: str | None = None
    sides: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.scale == "auto" or number(self.scale, 0.0, 1e3)
        require("scale", fits, "auto or a number in [0, 1000]", self.scale)
        self.projecting()

    def projecting(self) -> Options:
        """The options of the method whose step is matched; those of plain training for a given scale."""
        kind: type[Options]
        if self.base == "full":
            kind = NullSpaceOptions if self.scale == "auto" else WeightOptions
        else:
            kind = NSP2Options if self.scale == "auto" else PromptOptions
        known = {field.name: getattr(self, field.name) for field in fields(kind) if hasattr(self, field.name)}
        plain = {field.name for field in fields(PromptOptions)}
        return kind(**{name: value for name, value in known.items() if name in plain or value is not None})


class _Scaled(HeadMethod):
    """The body's learning rate times `scale` in every task but the first; heads keep theirs."""

    name: ClassVar[str] = "matched-lr"
    scale: float = 1.0

    def _body_scale(self) -> float:
        return self.scale if len(self.tasks) > 1 else 1.0


class ScaledPrompts(_Scaled, PromptMethod):
    """Sequential prompts with a constant factor."""


class ScaledFull(_Scaled, WeightMethod):
    """Sequential full fine-tuning with a constant factor."""


class GainMatchedPrompts(NSP2):
    """NSP2 with every projector replaced by the multiple of the identity that has the same RMS gain; no drift loss."""

    name: ClassVar[str] = "matched-lr"

    def _adjusted(self, sides: Sides) -> Sides:
        return matched(sides)

    def _regulariser(self) -> Tensor | None:
        return None


class GainMatchedFull(NullSpace):
    """`null-space` with every projector replaced by the multiple of the identity that has the same RMS gain."""

    name: ClassVar[str] = "matched-lr"

    def _adjusted(self, sides: Sides) -> Sides:
        return matched(sides)


def create_matched(backbone: nn.Module, options: MatchedOptions) -> HeadMethod:
    """The control that `options` describes."""
    inner = options.projecting()
    if options.scale == "auto":
        return GainMatchedFull(backbone, inner) if options.base == "full" else GainMatchedPrompts(backbone, inner)
    method: _Scaled = ScaledFull(backbone, inner) if options.base == "full" else ScaledPrompts(backbone, inner)
    method.scale = float(options.scale)
    return method
