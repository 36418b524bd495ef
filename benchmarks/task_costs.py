"""What one task in the middle of a stream costs a method, ours beside the official way of doing the method's own part.

`measured(method, task)` trains the task with the method; at every step the official optimizer (`official_steps`) steps
copies of the same parameters with the same gradients, so that both are timed in turns at the true state, and what they
made of the weights is compared at the end. Terms of the loss and adapted layers are timed the same way beside the loop,
the end of the task on copies of the method. Process CPU seconds of one thread, medians of steps, least of few ends.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from cl_kernels.benchmarks.cpu_timing import clock
from cl_kernels.benchmarks.memory import peak_extra
from cl_kernels.benchmarks.official_steps import AdamLoop, FTPLoop, SGDLoop
from torch import Tensor

from cl_kernels.methods import HeadMethod

__all__ = [
    "Official",
    "Part",
    "Steps",
    "bytes_of",
    "compared",
    "layer_parts",
    "measured",
    "relative",
    "step_row",
    "turns",
]

#: What a step's results may differ by (rounding of float32 weights, relative to how far they went), and an end's
#: projectors (statistics in float32 instead of float64).
STEP_LIMIT, END_LIMIT = 1e-3, 1e-2

Call = Callable[[], list[Tensor]]
Loop = AdamLoop | SGDLoop | FTPLoop


@dataclass
class Part:
    """One part of a step in both ways: CPU seconds, and the largest relative difference of what they gave."""

    name: str
    ours_s: float
    official_s: float
    difference: float


@dataclass
class Official:
    """The official way at the state in which a task begins; what it does not have is None."""

    steps: Loop | None = None
    parts: Callable[[], list[Part]] = list
    begin: tuple[Callable[[], Any], Callable[[], Any]] | None = None  # the pass before the task, ours and theirs
    end: Callable[[], dict[str, Tensor]] | None = None
    loss: Callable[[Any], Tensor] | None = None  # where its forward pass is another
    tensors: Callable[[], list[Tensor]] = list  # what it keeps for the next task
    ours: Callable[[Any], dict[str, Tensor]] = field(default=lambda method: {})  # what `end` is compared with
    kept: Callable[[Any], Any] = field(default=lambda method: method.state_dict()["own"])  # what ours keeps
    held: Callable[[], list[Tensor]] | None = None  # in its place, what ours holds while the task is trained


# ------------------------------------------------------------------------------------------------ measures
def relative(ours: Sequence[Tensor], theirs: Sequence[Tensor], least: Sequence[float] | None = None) -> float:
    """The largest |a - b| / |b| of the pairs, |b| counted as no smaller than `least`."""
    gaps = []
    for a, b, floor in zip(ours, theirs, least or [0.0] * len(ours), strict=True):
        gap, size = float((a.double() - b.double()).norm()), max(float(b.double().norm()), floor)
        gaps.append(gap / size if size else gap)
    return max(gaps, default=0.0)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Of different tensors; one that is there twice counts once."""
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors if t.numel()}.values())


def every(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from every(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from every(one)


def turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every call, in turns, each round beginning with another; a first call of each is not counted."""
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for way in ways.values():
        way()
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            ways[name]()
            seconds[name].append(clock() - start)
    return seconds


def compared(name: str, ours: Call, theirs: Call, rounds: int, alone: Call | None = None) -> Part:
    """Both ways of a part; `alone`: what both contain and is no part of it."""
    difference = relative(ours(), theirs())
    ways: dict[str, Call] = {"ours": ours, "official": theirs} | ({} if alone is None else {"alone": alone})
    found = turns(ways, rounds)
    base = found.get("alone", [0.0] * rounds)
    own, other = ([a - b for a, b in zip(found[way], base, strict=True)] for way in ("ours", "official"))
    return Part(name, statistics.median(own), statistics.median(other), difference)


class Steps:
    """An optimizer of ours and an official loop on copies of its parameters, in turns, with the same gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, loop: Loop | None) -> None:
        self.optimizer, self.loop = optimizer, loop
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.before = [p.detach().clone() for p in self.params]
        self.seconds: dict[str, list[float]] = {"ours": [], "official": []}

    def step(self) -> None:
        """With the gradients that the parameters have."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in self.params]
        ways: dict[str, Callable[[], Any]] = {"ours": self.optimizer.step}
        if self.loop is not None:
            loop = self.loop
            ways["official"] = lambda: loop.step(grads)
        order = sorted(ways, reverse=len(self.seconds["ours"]) % 2 == 1)
        for name in order:
            start = clock()
            ways[name]()
            self.seconds[name].append(clock() - start)

    def part(self, name: str) -> Part:
        """The first step, in which states are made, is left out."""
        ours = statistics.median(self.seconds["ours"][1:])
        if self.loop is None:
            return Part(name, ours, ours, 0.0)
        moved, theirs = [], []
        for p, start, copied in zip(self.params, self.before, self.loop.own.values, strict=True):
            moved.append(p.detach().double() - start.double())
            theirs.append(copied.double() - start.double())
        rounding = [1e-6 * float(start.norm()) for start in self.before]  # what float32 weights cannot show
        difference = relative(moved, theirs, rounding)
        return Part(name, ours, statistics.median(self.seconds["official"][1:]), difference)


def layer_parts(stack: Any, images: Tensor, theirs: Callable[..., Tensor], rounds: int) -> list[Part]:
    """Forward and backward of all adapted layers beyond those of the frozen ones, at the inputs that `images` give."""
    layers, inputs = dict(stack.layers()), {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.__setitem__(name, args[0].detach())

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    with torch.no_grad():
        stack(images)
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(0)
    outs = {n: torch.randn(*x.shape[:-1], layers[n].out_features, generator=generator) for n, x in inputs.items()}
    trained = [p for layer in layers.values() for p in layer.adapters.parameters() if p.requires_grad]

    def whole(forward: Callable[[Any, Tensor], Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
        given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        y = [forward(layers[name], x) for name, x in given.items()]
        grads = torch.autograd.grad(y, [*given.values(), *wanted], [outs[name] for name in given])
        return [*(one.detach() for one in y), *grads]

    def official_layer(layer: Any, x: Tensor) -> Tensor:
        return theirs(layer, stack.rank, stack.scale, x)

    return [
        compared(
            "adapters in the layers", lambda: whole(lambda layer, x: layer(x), trained),
            lambda: whole(official_layer, trained), rounds, lambda: whole(lambda layer, x: layer.base(x), []),
        )
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ a task
def measured(
    method: HeadMethod,
    task: Any,
    batches: Sequence[Callable[[], tuple[Tensor, Tensor]]],
    way: Callable[[Any, Any, int], Official],
    *,
    rounds: int,
    ends: int,
    peaks: bool = True,
) -> dict[str, Any]:
    """Train `task` with the `batches` given and end it. `way` gives the official way at the state after `begin_task`.

    Milliseconds of a step, seconds of an end, bytes of different tensors. Raises `ValueError` where the two ways differ
    by more than rounding: what is wrong has no time.
    """
    method.begin_task(task)
    theirs = way(method, task, rounds)
    if method.optimizer is None:
        raise ValueError(f"method: {method.name} does not train")
    begun = {"ours": [0.0], "official": [0.0]}
    if theirs.begin is not None:
        begun = turns(dict(zip(begun, theirs.begin, strict=True)), ends)
    steps, passes = Steps(method.optimizer, theirs.steps), []
    for batch in batches:
        given = batch()
        method.optimizer.zero_grad(set_to_none=True)
        start = clock()
        torch.autograd.backward(method.loss(given))
        passes.append(clock() - start)
        steps.step()
    found = step_row([*theirs.parts(), steps.part("optimizer step")], statistics.median(passes))
    if theirs.loss is not None:
        found |= _forward(method, theirs.loss, batches[0](), rounds)
    held = theirs.held() if theirs.held else None
    found |= _end(method, task, theirs, {name: min(seconds) for name, seconds in begun.items()}, ends, peaks)
    kept = every(theirs.kept(method)) if held is None else held
    found |= {"kept_bytes": bytes_of(list(kept)), "official_kept_bytes": bytes_of(theirs.tensors())}
    limits = {"step_difference": STEP_LIMIT, "forward_difference": STEP_LIMIT, "end_difference": END_LIMIT}
    for name, limit in limits.items():
        if not found.get(name, 0.0) <= limit:
            raise ValueError(f"{method.name}: {name} is {found[name]:.1e}, expected at most {limit:.0e}")
    return found


def step_row(parts: Sequence[Part], forward: float | None) -> dict[str, Any]:
    """Of a step: the whole, whose `forward` and backward hold all parts but the last, and the method's own parts."""
    own, last = sum(part.ours_s for part in parts), parts[-1].ours_s
    found: dict[str, Any] = {
        "own_ms": 1e3 * own,
        "official_own_x": sum(part.official_s for part in parts) / own,
        "parts": {p.name: {"ours_ms": 1e3 * p.ours_s, "official_ms": 1e3 * p.official_s} for p in parts},
        "step_difference": max(part.difference for part in parts),
    }
    if forward is not None:
        found |= {"step_ms": 1e3 * (forward + last), "own_share": own / (forward + last)}
    return found


def _forward(method: Any, theirs: Callable[[Any], Tensor], batch: Any, rounds: int) -> dict[str, Any]:
    """Forward and backward as the official code has them, where they differ."""
    body = [p for _, p in method._body()]

    def gradients(loss: Callable[[Any], Tensor]) -> Call:
        return lambda: list(torch.autograd.grad(loss(batch), body))

    part = compared("forward and backward", gradients(method.loss), gradients(theirs), rounds)
    return {"official_forward_x": part.official_s / part.ours_s, "forward_difference": part.difference}


def _end(
    method: Any, task: Any, theirs: Official, begun: Mapping[str, float], ends: int, peaks: bool
) -> dict[str, Any]:
    """The end of the task on copies, in turns, with the pass before it where there is one; then on `method` itself."""
    method.optimizer = method.scheduler = None  # as end_task does; a copy would copy them too
    copies = [copy.deepcopy(method) for _ in range(ends + 2)]
    left = iter(copies)
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: next(left).end_task(task, task.batches())}
    if theirs.end is not None:
        ways["official"] = theirs.end
    seconds = {name: min(one) + begun[name] for name, one in turns(ways, ends).items()}
    found: dict[str, Any] = {"end_s": seconds["ours"]}
    if theirs.end is not None:
        mine, result = theirs.ours(copies[0]), theirs.end()
        found |= {
            "official_end_x": seconds["official"] / seconds["ours"],
            "end_difference": relative([mine[name] for name in result], list(result.values())),
        }
        if peaks:
            found |= {"peak_bytes": peak_extra(ways["ours"]), "official_peak_bytes": peak_extra(theirs.end)}
    method.end_task(task, task.batches())
    return found
