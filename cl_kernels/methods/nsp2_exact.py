"""NSP2 with exact LayerNorm handling: gain, centring and sigma folded into the statistics, and a tangent step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_kernels.methods._options import Options
from cl_kernels.methods.nsp2 import NSP2, NSP2Options
from cl_kernels.ops import Projector
from cl_kernels.subspace import fold_gain_and_centring, fold_sigma, tangent_update

__all__ = ["NSP2Exact", "NSP2ExactOptions"]


@dataclass(frozen=True, kw_only=True)
class NSP2ExactOptions(NSP2Options):
    """As `NSP2Options`, with no blending, no normalisation and no drift loss by default.

    * fold_gain: C1* = C_c diag(alpha) C1 diag(alpha) C_c.
    * fold_sigma: C2* = diag(1/sigma) C2 diag(1/sigma) with the prompts' sigma when the projector is built.
    * tangent: remove the part of every step that changes sigma; needs both unblended projectors (eta = 1, normalize =
      "none").
    """

    eta: float = 1.0
    normalize: str = "none"
    weighting: Literal["rows", "batches"] = "rows"
    ln_weight: float = 0.0
    fold_gain: bool = True
    fold_sigma: bool = True
    tangent: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        exact = self.eta == 1 and self.eta_left in (None, 1) and self.normalize == "none" and self.sides == "both"
        if self.tangent and not exact:
            raise ValueError("tangent: expected eta = 1, normalize = 'none' and sides = 'both' with tangent = True")


class NSP2Exact(NSP2):
    """The condition that keeps the attention output, not an approximation of it (method-null-space.md 7.2 b, c, d).

    LN(p) = alpha * C_c p / sigma + beta, so what must vanish is J1 diag(alpha) C_c (p'/sigma' - p/sigma) and
    J2 diag(1/sigma) dP. Folding makes both first order conditions exact at fixed sigma; the joint tangent removes the
    sigma drift, so what remains is second order in the step.
    """

    name: ClassVar[str] = "nsp2-exact"
    options_type: ClassVar[type[Options]] = NSP2ExactOptions
    options: NSP2ExactOptions

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self._before: list[Tensor] = []
        self._stacked: tuple[Projector, Projector] | None = None

    @torch.no_grad()
    def _folded(self, name: str, side: str, moment: Tensor) -> Tensor:
        block = int(name.rpartition(".")[2])
        if side == "right" and self.options.fold_gain:
            gain, centring = self.model.norm1(block)[0], self.model.norm1_centres(block)
            return fold_gain_and_centring(moment, gain, centring=centring)
        if side == "left" and self.options.fold_sigma:
            return fold_sigma(moment, self.model.layernorm_sigma(block))
        return moment

    def _build_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        optimizer = super()._build_optimizer(groups)
        if self.store is not None and self.options.tangent:
            pairs = [self.store.sides(name) for name, _ in self._body()]
            left = torch.stack([side.left.matrix() for side in pairs if side.left is not None])
            right = torch.stack([side.right.matrix() for side in pairs if side.right is not None])
            self._stacked = (Projector.from_dense(left), Projector.from_dense(right))
            optimizer.register_step_pre_hook(self._remember)
            optimizer.register_step_post_hook(self._make_tangent)
        return optimizer

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        self._before = [prompt.clone() for _, prompt in self._body()]

    @torch.no_grad()
    def _make_tangent(self, *_: Any) -> None:
        """Replace the step just taken by its tangent part."""
        if self._stacked is None:
            return
        left, right = self._stacked
        prompts = [prompt for _, prompt in self._body()]
        before = torch.cat(self._before)
        step = tangent_update(torch.cat([p.detach() for p in prompts]) - before, before, right, left)
        for prompt, value in zip(prompts, before + step, strict=True):
            prompt.copy_(value[None])
