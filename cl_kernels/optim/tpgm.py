"""TPGM: radii around the anchor that are learned on held-out images (Tian et al., CVPR 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops.weight_projection import NORMS, project_to_anchor
from cl_kernels.optim import _anchors, _names
from cl_kernels.optim._inner import Owner, endless, evaluating
from cl_kernels.optim._names import plain_name

__all__ = ["TPGM"]

FLOOR = 1e-8  # of a radius, and what is added to a row norm, as published
SLACK = 1e-6  # relative: a radius that is clipped to the largest row counts as above it, however that was rounded
PUBLISHED_NAMES = {"mars": "row_l1"}


class TPGM:
    """Trainable projected gradient method: a radius for each weight, learned on batches that do not train the weights.

        tpgm = TPGM(model, norm="row_l1")                # anchors: the weights as they are now
        for batch in train:
            ...; optimizer.step()
            tpgm.project(lambda batch: loss(model, batch), held_out)

    W <- W_0 + min(gamma / (n_i + 1e-8), 1) (W - W_0) for each row i, n_i its L1 norm ("row_l1", called mars by the
    paper; a vector is one row) or the tensor's L2 norm ("l2"). `project` does as published, in this order: on its first
    call gamma = half the smallest row norm; for each of `iterations` batches gamma is clipped into [1e-8, max n], the
    model is evaluated in eval mode at the projected weights, and gamma takes an Adam step (lr 1e-2) against the loss's
    gradient through the clamp, which is 0 for rows inside; last, the weights themselves are projected. During the
    iterations the weights stay where the optimizer put them. DomainNet: one iteration after each step; ImageNet: 200,
    once after training, "l2".

    `model` is not copied, and left in the mode in which it was. `exclude`, `anchors` as in `FTPAdamW`. Parameters that
    do not require a gradient, or had none when this was made, are left alone. A weight that has not moved from its
    anchor keeps radius 1e-8 (the official clip raises there). A gradient of a radius that is not finite counts as 0.
    Under DDP every process must see the same batches. No host synchronisation. Raises `ValueError` for arguments and
    for a loss that does not depend on the weights.

    Cost: a forward and a backward pass for each iteration, one copy of the weights as anchors, a projected copy while
    an iteration runs. Source: method-trainable-projection 10."""

    def __init__(
        self,
        model: nn.Module,
        *,
        anchors: Any = "init",
        norm: str = "row_l1",
        radius_lr: float = 1e-2,
        exclude: Iterable[Any] = _anchors.DEFAULT_EXCLUDE,
    ) -> None:
        if isinstance(radius_lr, bool) or not 0.0 <= radius_lr < math.inf:
            raise ValueError(f"Invalid radius_lr: {radius_lr!r} (expected a number from 0)")
        self._norm = PUBLISHED_NAMES.get(norm, norm)
        if self._norm not in NORMS:
            raise ValueError(f"Invalid norm: {norm!r} (expected one of {', '.join((*NORMS, *PUBLISHED_NAMES))})")
        self._model = model
        self._names = _held(model, exclude)
        self._anchors: list[Tensor | None] = []
        self.set_anchors(anchors)
        device = next(iter(self._present().values())).device
        self._radii = torch.zeros(len(self._names), dtype=torch.float32, device=device)
        self._adam = torch.optim.Adam([self._radii], lr=radius_lr)
        self._fired, self._projected = torch.zeros_like(self._radii), torch.zeros_like(self._radii)
        self._started, self._projections = False, 0
        self._batches: Iterable[Any] | None = None
        self._supply: Iterator[Any] | None = None

    def set_anchors(self, anchors: Any = "init") -> None:
        """Hold the weights to other anchors from now on; the radii are kept. Raises what the constructor raises, and
        then changes nothing."""
        found = []
        with _anchors.lookup(anchors) as (look, known):
            missing = [name for name in self._names if not known(name)]
            if missing:
                raise SubspaceMismatchError(f"anchors: none for {_names.few(missing)}")
            for name, parameter in zip(self._names, self._present().values(), strict=True):
                found.append(look(name, parameter))
        _anchors.finite([(name, a) for name, a in zip(self._names, found, strict=True) if a is not None])
        self._anchors = found

    # -- use ----------------------------------------------------------------------------------------------------------

    def project(
        self, loss: Callable[..., Tensor], batches: Iterable[Any] | None = None, *, iterations: int = 1
    ) -> None:
        """Learn the radii for `iterations` batches, then project the weights.

        `loss(batch)` evaluates the model that this was made with; without `batches` it is called as `loss()`. A call
        with the same `batches` goes on where the last one ended, and they start again when they end, unless they are an
        iterator. With 0 iterations the radii stay as they are: the official code between two of its `proj_freq` steps.
        Raises `ValueError` for no batches, for a loss that does not depend on the weights, and for `iterations`.
        """
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
            raise ValueError(f"iterations: expected a whole number from 0, got {iterations!r}")
        if batches is not self._batches:
            self._batches, self._supply = batches, None if batches is None else endless(batches)
        with evaluating(self._model):
            for _ in range(iterations):
                self._learn(loss, () if self._supply is None else (next(self._supply),))
        self._write()

    def radii(self) -> dict[str, float]:
        """By name, what rows (or the tensor) are held within; 0 before the first projection. Reads the device once."""
        return dict(zip(self._names, self._radii.tolist(), strict=True))

    def projected_fraction(self) -> dict[str, float]:
        """By name, the share of rows that the last projection moved."""
        return dict(zip(self._names, self._projected.tolist(), strict=True))

    def fired(self) -> dict[str, int]:
        """By name, in how many projections any row was moved."""
        return {name: int(count) for name, count in zip(self._names, self._fired.tolist(), strict=True)}

    def fire_rate(self) -> dict[str, float]:
        """`fired()` as a share of all projections."""
        return {name: count / max(self._projections, 1) for name, count in self.fired().items()}

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Radii, their Adam and the counts, tensors and plain values; checksums of the anchors, not the anchors."""
        return {
            "names": list(self._names),
            "checksums": self._checksums(),
            "radii": self._radii.clone(),
            "adam": self._adam.state_dict(),
            "fired": self._fired.clone(),
            "projected": self._projected.clone(),
            "started": self._started,
            "projections": self._projections,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises `SubspaceMismatchError` for other parameters or anchors, and changes nothing."""
        if state["names"] != self._names:
            differing = _names.few(set(state["names"]) ^ set(self._names)) or "their order"
            raise SubspaceMismatchError(f"the state is of other parameters; differing: {differing}")
        sums = zip(self._names, state["checksums"], self._checksums(), strict=True)
        if other := [name for name, saved, mine in sums if saved != mine]:
            raise SubspaceMismatchError(f"the state was saved with other anchors of {_names.few(other)}")
        self._adam.load_state_dict(state["adam"])
        for mine, name in ((self._radii, "radii"), (self._fired, "fired"), (self._projected, "projected")):
            mine.copy_(state[name])
        self._started, self._projections = state["started"], state["projections"]

    def _checksums(self) -> list[int]:
        return [0 if anchor is None else int(_anchors.checksum(anchor)) for anchor in self._anchors]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _present(self) -> dict[str, Tensor]:
        """By the name that the model has for it now, each parameter: a toolbox may have replaced or wrapped it."""
        present = {plain_name(name): (name, parameter) for name, parameter in self._model.named_parameters()}
        return dict(present[name] for name in self._names)

    def _clip(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Row norms of every displacement; the radii are set at first, and clipped into [1e-8, largest norm]."""
        norms = [self._row_norms(*pair) for pair in zip(params, self._anchors, strict=True)]
        if not self._started:
            self._radii.copy_(torch.stack([each.min() for each in norms]) / 2)
            self._started = True
        largest = torch.stack([each.max() for each in norms])
        self._radii.copy_(torch.minimum(self._radii, largest).clamp(min=FLOOR))
        return norms

    def _row_norms(self, param: Tensor, anchor: Tensor | None) -> Tensor:
        moved = param.to(torch.promote_types(param.dtype, torch.float32))
        if anchor is not None:
            moved = moved - anchor.to(moved.dtype)
        if self._norm == "l2" or moved.ndim < 2:
            moved = moved.reshape(1, -1)
        order = 1 if self._norm == "row_l1" else 2
        norms: Tensor = torch.linalg.vector_norm(moved.flatten(1), order, dim=1)
        return norms

    def _learn(self, loss: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
        present = {name: parameter.detach() for name, parameter in self._present().items()}
        with torch.no_grad():
            self._clip(present.values())
        radii = self._radii.clone().requires_grad_()
        with torch.enable_grad():
            swapped = {
                f"model.{name}": project_to_anchor(parameter, anchor, radius, norm=self._norm)
                for (name, parameter), anchor, radius in zip(
                    present.items(), self._anchors, radii.unbind(), strict=True
                )
            }
            value = functional_call(Owner(self._model, loss), swapped, arguments)
            (slope,) = torch.autograd.grad(value, radii, allow_unused=True)
        if slope is None:
            raise ValueError("loss: it does not depend on the weights of the model that TPGM was made with")
        self._radii.grad = slope.nan_to_num(0.0, 0.0, 0.0)
        self._adam.step()
        self._radii.grad = None

    @torch.no_grad()
    def _write(self) -> None:
        params = list(self._present().values())
        norms, radii = self._clip(params), self._radii.unbind()
        for param, anchor, radius in zip(params, self._anchors, radii, strict=True):
            param.copy_(project_to_anchor(param, anchor, radius, norm=self._norm))
        hit = [each > radius * (1 + SLACK) for each, radius in zip(norms, radii, strict=True)]
        self._projected = torch.stack([rows.float().mean() for rows in hit])
        self._fired += torch.stack([rows.any() for rows in hit])
        self._projections += 1


def _held(model: nn.Module, exclude: Iterable[Any]) -> list[str]:
    """Names of the parameters that require a gradient and are not excluded."""
    names: dict[Tensor, str] = {
        p: plain_name(name) for name, p in model.named_parameters() if p.requires_grad and p.numel()
    }
    given = tuple(exclude)
    left_out = _anchors.excluded(given, names, list(names), must=given != _anchors.DEFAULT_EXCLUDE)
    held = [name for parameter, name in names.items() if parameter not in left_out]
    if not held:
        raise ValueError("model: no parameter requires a gradient, or all are excluded")
    return held
