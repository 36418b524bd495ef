"""The inner problem of TPGM: a model evaluated at other weights, in eval mode, on batches that do not end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["Owner", "endless", "evaluating"]


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    """`batches` again and again; an iterator once."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty or isinstance(batches, Iterator):
            raise ValueError("batches: expected at least one more, got none")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module is in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Owner(nn.Module):
    """A function as a module that owns `model`, so that `functional_call` swaps the weights that the function uses."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *arguments: Any) -> Tensor:
        return self._function(*arguments)
