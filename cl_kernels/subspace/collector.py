"""Second moments of what a model's weights see, gathered by hooks."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.subspace import _layers
from cl_kernels.subspace._moments import Moments, unguarded
from cl_kernels.subspace._names import checked_name
from cl_kernels.subspace._plans import Plan, prompt_plans, refuse_large
from cl_kernels.subspace._reduce import all_reduce_sums
from cl_kernels.subspace.prompts import Prompted, PromptMoments
from cl_kernels.subspace.prompts import read as read_prompts

__all__ = ["CovarianceCollector"]

What = Literal["input", "output_grad", "prompt"]
Weighting = Literal["rows", "batches"]


class CovarianceCollector:
    """Sums x x^T over everything that `targets` see while the ``with`` block is open; hooks are always removed.

    `targets`: "linear" (every `nn.Linear`), "conv", "all", names or patterns of modules ("blocks.*.attn.qkv"), or
    ``callable(name, module) -> bool``. `what`: "input" rows protect the right side of a weight (convolutions as
    unfolded patches, c kh kw wide); "output_grad" rows its left side; "prompt" both sides of each prompt of a model
    such as `nn.PromptedViT`, by head Grams, and `targets` does not count.

    Results are keyed by the parameter they protect, "blocks.0.attn.qkv.weight". `weighting` "rows" sums all rows and
    does not depend on how they come in batches; "batches" sums per-batch means, as NSP2's repository does. `dtype` is
    that of the sums, fp64 or fp32; `device="cpu"` keeps them there. `max_bytes` refuses before anything is allocated.
    `token_rate` < 1 uses a random share of the rows (seeded), `skip_tokens` leaves out the first tokens (the last if
    negative), `centred` subtracts the mean at reading, `eval_mode` switches the model to eval and back.
    `process_group` makes reading a collective call that sums over its processes.

    A module called twice counts twice, except when activation checkpointing recomputes it. Nothing waits for the device
    until results are read. Cost: one symmetric product of the rows a layer and call.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        targets: _layers.Targets = "linear",
        *,
        what: What = "input",
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        max_bytes: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        weighting: Weighting = "rows",
        centred: bool = False,
        token_rate: float = 1.0,
        skip_tokens: int = 0,
        eval_mode: bool = False,
        seed: int = 0,
    ) -> None:
        if what not in ("input", "output_grad", "prompt"):
            raise ValueError(f"what: expected 'input', 'output_grad' or 'prompt', got {what!r}")
        if weighting not in ("rows", "batches"):
            raise ValueError(f"weighting: expected 'rows' or 'batches', got {weighting!r}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        if not 0 < token_rate <= 1:
            raise ValueError(f"Invalid token_rate value: {token_rate} (expected 0 < token_rate <= 1)")
        self.what, self.weighting, self.dtype = what, weighting, dtype
        self.max_bytes, self.process_group, self.centred = max_bytes, process_group, centred
        self.token_rate, self.skip_tokens, self.eval_mode = token_rate, skip_tokens, eval_mode
        self._device = None if device is None else torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._exits: contextlib.ExitStack | None = None
        self._states: dict[str, Moments | PromptMoments] = {}
        self._model = None if model is None else _layers.unwrap(model)
        self._layers: list[tuple[str, nn.Module]] = []
        if what == "prompt":
            self._plans = dict(prompt_plans(self._model))
        else:
            self._layers = [] if self._model is None else _layers.resolve(self._model, targets)
            self._plans = {name: Plan((_layers.width(module, what),)) for name, module in self._layers}
        refuse_large(self._plans, dtype, max_bytes)

    # ------------------------------------------------------------------------------------------------ the with block
    def __enter__(self) -> CovarianceCollector:
        if self._exits is not None:
            raise RuntimeError("CovarianceCollector: it is open already; leave its with block before entering again")
        if self._model is None:
            raise ValueError("model: there is none to watch; without one, call update(name, x) and no with block")
        exits = contextlib.ExitStack()
        try:
            self._prepare(self._model, exits)
        except BaseException:
            exits.close()
            raise
        self._exits = exits
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        exits, self._exits = self._exits, None
        if exits is not None:
            exits.close()

    def _prepare(self, model: nn.Module, exits: contextlib.ExitStack) -> None:
        if self.eval_mode:
            exits.callback(_restore_modes, [(module, module.training) for module in model.modules()])
            model.eval()
        else:
            _layers.warn_if_random(model)
        if self.what == "prompt":
            exits.enter_context(self._prompted().observe(self._on_prompt))
        for name, module in self._layers:
            if self.what == "input":
                handle = module.register_forward_pre_hook(self._on_input(name), with_kwargs=True)
            else:
                handle = module.register_forward_hook(self._on_output(name))
            exits.callback(handle.remove)

    # ------------------------------------------------------------------------------------------------ hooks
    def _on_input(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not _layers.in_recomputation():
                x: Tensor = args[0] if args else kwargs["input"]
                with unguarded(x.device):
                    self._add(name, _layers.input_rows(module, x.detach(), self.skip_tokens))

        return hook

    def _on_output(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda grad: self._on_gradient(name, module, grad))

        return hook

    def _on_gradient(self, name: str, module: nn.Module, grad: Tensor) -> None:
        if self._exits is not None:  # a graph may outlive the with block
            with unguarded(grad.device):
                self._add(name, _layers.output_rows(module, grad.detach(), self.skip_tokens))

    def _on_prompt(self, index: int, q: Tensor, mass: Tensor) -> None:
        if _layers.in_recomputation():
            return
        name = f"prompts.{index}"
        with unguarded(q.device):
            if self.skip_tokens:
                kept = slice(self.skip_tokens, None) if self.skip_tokens > 0 else slice(None, self.skip_tokens)
                q, mass = q[:, :, kept], mass[:, :, kept]
            if self.token_rate < 1:
                chosen = self._sample(q.shape[2], q.device)
                q, mass = q.index_select(2, chosen), mass.index_select(2, chosen)
            state = self._state(name, q.device)
            if isinstance(state, PromptMoments):
                state.update(q, mass, self.weighting)

    # ------------------------------------------------------------------------------------------------ sums
    def update(self, name: str, x: Tensor) -> None:
        """Add the rows x [..., d] to `name` directly, for inputs that no hook sees; no with block is needed.

        Raises `SubspaceMismatchError` when `name` has rows of another width.
        """
        key = checked_name(name)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
            raise ValueError(f"x: expected a real floating-point tensor [..., d], got {type(x).__name__}")
        if key not in self._plans:
            plan = Plan((x.shape[-1],))
            refuse_large({**self._plans, key: plan}, self.dtype, self.max_bytes)
            self._plans[key] = plan
        elif self._plans[key] != Plan((x.shape[-1],)):
            raise SubspaceMismatchError(
                f"{key}: expected rows of width {self._plans[key].shape[-1]}, got {x.shape[-1]}"
            )
        with unguarded(x.device):
            self._add(key, _layers.token_rows(x.detach(), 0))

    def _add(self, name: str, rows: _layers.Rows) -> None:
        if self.token_rate < 1:
            kept = [
                piece.index_select(0, self._sample(len(piece), piece.device)) for piece in rows.pieces if len(piece)
            ]
            rows = _layers.Rows(sum(len(piece) for piece in kept), kept)
        if not rows.number:
            return
        pieces = iter(rows.pieces)
        first = next(pieces)
        state = self._state(name, first.device)
        if isinstance(state, Moments):
            state.update(itertools.chain((first,), pieces), rows.number, self.weighting)

    def _state(self, name: str, device: torch.device) -> Moments | PromptMoments:
        state = self._states.get(name)
        if state is None:
            state = self._states[name] = self._plans[name].state(self.dtype, self._device or device)
        return state

    def _sample(self, count: int, device: torch.device) -> Tensor:
        kept = max(1, round(self.token_rate * count))
        return torch.randperm(count, generator=self._generator)[:kept].sort().values.to(device, non_blocking=True)

    # ------------------------------------------------------------------------------------------------ results
    def covariances(self) -> dict[str, Any]:
        """`Covariance` by parameter name; for "prompt" `PromptCovariance` by "prompts.<block>".

        Checked finite (`NonFiniteError` names layer and batch) and symmetric. Layers that no row reached are left out
        with a warning. Waits for the device; with a process group every process must call it.
        """
        if self.process_group is not None:
            for name in self._plans:  # a process without samples takes part with zeros
                self._state(name, self._home())
        read = {name: self._states[name].sums() for name in self._plans if name in self._states}
        flat = [part for parts in read.values() for part in parts]
        if self.process_group is not None:
            flat = all_reduce_sums([name for name, parts in read.items() for _ in parts], flat, self.process_group)
        results: dict[str, Any] = {}
        for name in read:
            count = len(read[name])
            mine, flat = tuple(flat[:count]), flat[count:]
            if mine[0].updates == 0:
                continue
            if self._plans[name].prompts:
                weight = self._prompted().key_weight(int(name.rpartition(".")[2]))
                results[name] = read_prompts(name, mine, weight, self.centred)
            else:
                results[name] = mine[0].checked(name).covariance(self.centred)
        unseen = [name for name in self._plans if name not in results]
        if unseen:
            shown = ", ".join(unseen[:5]) + (" ..." if len(unseen) > 5 else "")
            warnings.warn(f"no input reached {len(unseen)} layers, which are left out: {shown}", stacklevel=2)
        return results

    def counts(self) -> dict[str, float]:
        """Rows so far by name (batches with that weighting), on this process."""
        return {name: state.count for name, state in self._states.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the state once every layer has been seen."""
        return sum(plan.nbytes(self.dtype) for plan in self._plans.values())

    def reset(self) -> None:
        """Forget all sums; hooks stay."""
        self._states.clear()

    def _home(self) -> torch.device:
        if self._device is not None:
            return self._device
        parameters = iter(()) if self._model is None else self._model.parameters()
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def _prompted(self) -> Prompted:
        if not isinstance(self._model, Prompted):
            raise ValueError("model: what='prompt' needs a model with prompts, such as PromptedViT")
        return self._model


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
