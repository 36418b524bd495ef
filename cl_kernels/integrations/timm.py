"""The optimizers in timm's factory, so that timm's training scripts can name them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from cl_kernels._timm import import_timm
from cl_kernels.optim import FTPSGD, FTPAdamW, ProjectedAdam, ProjectedAdamW, ProjectedSGD

__all__ = ["named_groups", "register"]

# No underscores: timm's factory keeps only what follows the last one, and nsp_adamw would silently be its own AdamW.
_ADAM: dict[str, Any] = {"has_betas": True}
_SGD: dict[str, Any] = {"has_eps": False, "has_momentum": True, "defaults": {"nesterov": True}}
_PROJECTED, _ANCHORED = "each update is projected, see its `subspace`", "weights stay near their anchors, see `anchors`"
_OPTIMIZERS: tuple[tuple[str, type, dict[str, Any], str], ...] = (
    ("nspadam", ProjectedAdam, _ADAM, _PROJECTED),
    ("nspadamw", ProjectedAdamW, _ADAM, _PROJECTED),
    ("nspsgd", ProjectedSGD, _SGD, _PROJECTED),
    ("ftpadamw", FTPAdamW, _ADAM, _ANCHORED),
    ("ftpsgd", FTPSGD, _SGD, _ANCHORED),
)


def register() -> tuple[str, ...]:
    """Add nspadam, nspadamw, nspsgd, ftpadamw and ftpsgd to timm's optimizers and return these names; doing it again
    changes nothing.

        register()
        create_optimizer_v2(model.named_parameters(), "nspadamw", lr=1e-3, subspace=store)
        create_optimizer_v2(model.named_parameters(), "ftpadamw", lr=1e-4, anchors="pretrained.safetensors")

    Defaults are those that timm gives adam, adamw and sgd: no weight decay unless asked for, Nesterov momentum 0.9.
    Raises `ImportError` where timm is missing or too old (it needs `timm.optim.OptimInfo`, 1.0.12).
    """
    import_timm()
    try:
        factory = importlib.import_module("timm.optim._optim_factory")
        registry, info = factory.default_registry, factory.OptimInfo
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f'this timm has no registry of optimizers ({error}); pip install "cl-kernels[timm]" brings one that has'
        ) from error
    known = set(registry.list_optimizers())
    for name, kind, traits, what in _OPTIMIZERS:
        if name not in known:
            text = f"{kind.__name__} of cl_kernels: {what}"
            registry.register(info(name=name, opt_class=kind, description=text, **traits))
    return tuple(name for name, *_ in _OPTIMIZERS)


def named_groups(
    weight_decay: float = 0.0, layer_decay: float | None = None, **options: Any
) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """timm's own parameter groups, with the parameters' names: a `param_group_fn` for `create_optimizer_v2`.

        create_optimizer_v2(model, "nspadamw", lr=1e-3, subspace=store,
                            param_group_fn=named_groups(weight_decay=0.05, layer_decay=0.75))

    timm's groups carry no names, and a subspace is kept by name. `options` go to timm's `param_groups_layer_decay` or
    `param_groups_weight_decay`.
    """

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        import_timm()
        optim = importlib.import_module("timm.optim")
        spared: set[str] = getattr(model, "no_weight_decay", set)()
        given = {"weight_decay": weight_decay, "no_weight_decay_list": spared, **options}
        if layer_decay is None:
            made = optim.param_groups_weight_decay(model, **given)
        else:
            made = optim.param_groups_layer_decay(model, layer_decay=layer_decay, **given)
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group in made:
            group.pop("param_names", None)
            group["params"] = [(names[parameter], parameter) for parameter in group["params"]]
        return [group for group in made if group["params"]]

    return groups
