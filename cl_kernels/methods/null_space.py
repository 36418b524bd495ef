"""Full-weight training in the null space of earlier tasks' inputs (Adam-NSCL with an energy rule and AdamW)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_kernels.methods._memory import Accumulated, Cut, Memory
from cl_kernels.methods._options import Options
from cl_kernels.methods._projected import ProjectedWeights
from cl_kernels.methods._subspaces import CutOptions, parse_rule
from cl_kernels.methods._weights import LINEAR_TARGETS, WeightOptions

__all__ = ["NullSpace", "NullSpaceOptions"]


@dataclass(frozen=True, kw_only=True)
class NullSpaceOptions(CutOptions, WeightOptions):
    """Options of `null-space`.

    * rule: which input directions are protected, "energy:0.95" by default, see `parse_rule`.
    * eta: weight of the projector against the identity.
    * normalize: "fro" is what Adam-NSCL does; it shrinks the step by 1 / sqrt(free directions).
    * edge: "soft" lets directions near the cut through in part.
    """

    allowed_targets: ClassVar[tuple[str, ...]] = LINEAR_TARGETS
    rule: str = "energy:0.95"
    eta: float = 1.0
    normalize: str = "none"


class NullSpace(ProjectedWeights):
    """From task 2 on every update dW [out, in] becomes `dW P`, P the projector off the protected input directions.

    After each task but the last, one pass over its images adds every layer's sum of `x x^T` over its inputs x to the
    sum of the earlier tasks; P leaves free what the rule does. On an input of the protected span the layer's output
    does not change. State: one [in, in] matrix per layer, whatever the number of tasks."""

    name: ClassVar[str] = "null-space"
    options_type: ClassVar[type[Options]] = NullSpaceOptions
    options: NullSpaceOptions

    def _new_memory(self) -> Memory:
        options = self.options
        return Accumulated({"right": Cut(parse_rule("rule", options.rule), options.eta, options.norm, options.solver)})
