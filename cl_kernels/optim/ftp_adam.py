"""AdamW whose weights stay in learned balls around their anchor."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from cl_kernels.ops.weight_projection import ftp_adam_
from cl_kernels.ops.weight_projection.arguments import Adam
from cl_kernels.optim import _shards
from cl_kernels.optim._adam import ADAM, AdamTwin, Betas
from cl_kernels.optim._radii import Lists, RadiusOptimizer, RadiusOptions

__all__ = ["FTPAdamW"]


class FTPAdamW(RadiusOptimizer, AdamTwin):
    """`torch.optim.AdamW` whose weights stay near an anchor: rows of W - W_0 longer than a learned radius are scaled.

    W <- W_0 + min(gamma / n_i, 1) c_i for each row i, with c = (W - u) - W_0, u the complete AdamW update and n_i its
    norm; gamma, one for each tensor, moves by a small Adam of its own along the gradient that the step has anyway. It
    starts at `radius_floor`, on the anchor: the first step moves nothing.

    `params`: `model.named_parameters()`, groups, or bare tensors (then nothing is excluded by name). `anchors`: "init"
    (the weights as they are now; frozen ones when they first train), a mapping of names to tensors, the path of a
    safetensors file, None for zero. `exclude`: globs, names of modules or parameters, or parameters, stepped by torch's
    AdamW; a pattern that matches nothing raises, only the default may. `anchor_dtype`: "auto" keeps anchors in bfloat16
    or float16 where that is exact, a dtype demands it. `kappa` in [0, 1] multiplies radius gradients above 0 (1 holds
    most). `radius_lr`: the step of the radius, in units of the norm, or with `relative_radius_lr` of the mean row norm
    of W_0. `masked` leaves rows inside the ball out of the radius's gradient. `norm`: "row_l1", "row_l2", or "l2" for
    the whole tensor. `radius` fixes it (MARS-PGM; infinite: AdamW). The defaults are the published arithmetic; groups
    may have their own. `master_weights`: 16-bit parameters are stepped in a float32 copy, kept in the state.
    `full_state`: every anchor's memory goes into the state dict, so that distributed checkpoints are exact too.

    Weight decay pulls towards zero, as in AdamW, not towards the anchor. A tensor whose gradient is 0 while lr is 0 is
    left alone. Editing a weight while its radius is at the floor raises `RuntimeError` in the next step: the weight is
    the only copy of the anchor then (an edit through `.data` goes unnoticed). Raises `ValueError` for settings, shapes
    and patterns, `SubspaceMismatchError` for names, `NonFiniteError` for anchors.

    Memory: 4 bytes a parameter beside AdamW's (2 with a 16-bit anchor). Cost: 32 + 12 f bytes a parameter, f the share
    in projected rows, against 28. Source: FTP, Tian et al. 2023; the radius's gradient without a cache is ours.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[RadiusOptions],
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in ADAM} | {"decoupled_weight_decay": True}
        super().__init__(params, defaults, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # a state of plain Adam says otherwise

    def _moments(self, group: dict[str, Any], params: list[Tensor]) -> tuple[list[Tensor], ...]:
        self._masters(group, params, "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        return self._twin_lists(group, params, on_device=True)

    def _base(self, group: dict[str, Any]) -> Adam:
        beta1, beta2 = group["betas"]
        return Adam(float(beta1), float(beta2), group["eps"], True)

    def _fused(
        self, group: dict[str, Any], lists: Lists, rule: tuple[Any, ...], scale: Tensor | None, found: Tensor | None
    ) -> None:
        beta1, beta2, eps, decoupled = self._base(group)
        ftp_adam_(
            lists.weights, lists.grads, lists.firsts, lists.seconds, lists.largests, lists.steps, lists.slots,
            lists.records, _shards.local(group["lr"]), group["weight_decay"], group["maximize"], scale, found,
            (beta1, beta2, eps, decoupled), rule,
        )  # fmt: skip
