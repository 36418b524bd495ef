"""Second moments of what a model's weights see, gathered by hooks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.subspace import _layers, _multihead, _rows
from cl_kernels.subspace._covariance import Shrinkage
from cl_kernels.subspace._moments import unguarded
from cl_kernels.subspace._names import checked_name
from cl_kernels.subspace._options import check_options
from cl_kernels.subspace._plans import Plan, prompt_plans
from cl_kernels.subspace._tally import Tally, Weighting
from cl_kernels.subspace.prompts import Prompted
from cl_kernels.subspace.prompts import read as read_prompts

__all__ = ["CovarianceCollector"]

What = Literal["input", "output_grad", "prompt"]


class CovarianceCollector:
    """Sums x x^T over everything that `targets` see while the ``with`` block is open; hooks are always removed.

    `targets`: "linear" (every `nn.Linear`, and the projections of `nn.MultiheadAttention`), "conv" (1d, 2d, 3d), "all",
    names or patterns of modules ("blocks.*.attn.qkv"), or ``callable(name, module) -> bool``. `what`: "input" rows
    protect the right side of a weight (convolutions as unfolded patches, c kh kw wide); "output_grad" rows its left
    side; "prompt" both sides of each prompt of a model such as `nn.PromptedViT`, by head Grams; `targets` is not read.

    Results are keyed by the parameter they protect, "blocks.0.attn.qkv.weight". `weighting` "rows" sums all rows and
    does not depend on how they come in batches; "batches" sums per-batch means, as NSP2's repository does. `dtype` is
    that of the sums, fp64 or fp32; `device="cpu"` keeps them there. `max_bytes` refuses before anything is allocated.
    `token_rate` < 1 uses a random share of the rows (seeded), `skip_tokens` leaves out the first tokens (the last if
    negative), `centred` subtracts the mean at reading, `eval_mode` switches the model to eval and back.
    `process_group` makes reading a collective call that sums over its processes. `row_dtype` (bfloat16 or float16)
    rounds rows before they are multiplied, which is faster where the processor multiplies 16 bits: the matrix stays
    positive semi-definite, with noise of 3e-5 to 1e-4 of the largest eigenvalue (bfloat16; float16 a tenth of that, but
    it overflows past 65504), so it suits rules that cut well above that. `shrinkage="ledoit-wolf"` gathers sum |x|^4
    and sum |x|^2 x too, which `Covariance.shrunk` needs; it shrinks nothing itself, so that tasks still add up.

    A module called twice counts twice, except when activation checkpointing recomputes it. Compiled modules run eagerly
    inside the block, because compiled code skips hooks. Nothing waits for the device until results are read, unless the
    sums are on another one. Cost: one symmetric product of the rows a layer and call, for the output projection of an
    `nn.MultiheadAttention` also that attention once more. Memory beside the state: at most 64 MB.

    Raises `SubspaceMismatchError` for targets that match nothing or cannot be watched (with the reason) and inputs that
    do not fit a weight, `ValueError` for bad options, models in DataParallel or FSDP1, and state beyond `max_bytes`.
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
        row_dtype: torch.dtype | None = None,
        shrinkage: Shrinkage | None = None,
    ) -> None:
        check_options(what, weighting, dtype, token_rate, row_dtype, shrinkage)
        self.what, self.process_group, self.centred = what, process_group, centred
        self.skip_tokens, self.eval_mode = skip_tokens, eval_mode
        self._quartic = shrinkage == "ledoit-wolf"
        self._exits: contextlib.ExitStack | None = None
        self._model = None if model is None else _layers.unwrap(model)
        self._layers: list[_layers.Layer] = []
        if what == "prompt":
            plans = dict(prompt_plans(self._model))
        else:
            self._layers = [] if self._model is None else _layers.resolve(self._model, targets, what)
            plans = {layer.key: Plan((layer.width(what),), quartic=self._quartic) for layer in self._layers}
        self._tally = Tally(
            plans,
            dtype=dtype,
            device=None if device is None else torch.device(device),
            max_bytes=max_bytes,
            weighting=weighting,
            token_rate=token_rate,
            row_dtype=row_dtype,
            seed=seed,
        )

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
        exits.enter_context(_layers.eager())
        if self.what == "prompt":
            exits.enter_context(self._prompted().observe(self._on_prompt))
        for layer in self._layers:
            if self.what == "input":
                handle = layer.module.register_forward_pre_hook(self._on_input(layer), with_kwargs=True)
            else:
                handle = layer.module.register_forward_hook(self._on_output(layer))
            exits.callback(handle.remove)

    # ------------------------------------------------------------------------------------------------ hooks
    # Each hook updates its layer at once, one launch a layer, although `ops.update_covariances_` takes many in one. A
    # hook may not keep its input for a grouped launch later: the model may write into it in place right after (as an
    # in-place ReLU does), and the inputs of one ViT-B pass at batch 256 are 13 GB. 50000 rows fill a GPU by themselves.
    def _on_input(self, layer: _layers.Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._exits is None or _layers.in_recomputation():  # code compiled inside the block keeps its hooks
                return
            if isinstance(module, nn.MultiheadAttention) and layer.part:
                inputs = _multihead.rows_of(module, layer.part, args, kwargs)
            else:
                inputs = [args[0] if args else next(iter(kwargs.values()))]
            with unguarded(getattr(inputs[0], "device", torch.device("cpu"))):
                self._tally.add(layer.key, _rows.joined(_rows.input_rows(layer, x, self.skip_tokens) for x in inputs))

        return hook

    def _on_output(self, layer: _layers.Layer) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            out: Tensor = output[0] if layer.part else output
            if self._exits is not None and out.requires_grad:
                out.register_hook(lambda grad: self._on_gradient(layer, grad))

        return hook

    def _on_gradient(self, layer: _layers.Layer, grad: Tensor) -> None:
        if self._exits is not None:  # a graph may outlive the with block
            with unguarded(grad.device):
                self._tally.add(layer.key, _rows.output_rows(layer, grad.detach(), self.skip_tokens))

    def _on_prompt(self, index: int, q: Tensor, mass: Tensor) -> None:
        if self._exits is None or _layers.in_recomputation():
            return
        with unguarded(q.device):
            if self.skip_tokens:
                kept = slice(self.skip_tokens, None) if self.skip_tokens > 0 else slice(None, self.skip_tokens)
                q, mass = q[:, :, kept], mass[:, :, kept]
            self._tally.add_prompt(f"prompts.{index}", q, mass)

    # ------------------------------------------------------------------------------------------------ sums
    def update(self, name: str, x: Tensor) -> None:
        """Add the rows x [..., d] to `name` directly, for inputs that no hook sees; no with block is needed.

        Raises `SubspaceMismatchError` when `name` has rows of another width.
        """
        key, plans = checked_name(name), self._tally.plans
        if not isinstance(x, Tensor):
            raise ValueError(f"x: expected a tensor [..., d], got {type(x).__name__}")
        if not x.is_floating_point() or x.layout not in (torch.strided, torch.jagged) or x.ndim == 0:
            raise ValueError(
                f"x: expected a dense tensor [..., d] of a real dtype, got {x.ndim}-d {x.dtype}, {x.layout}"
            )
        if key not in plans:
            self._tally.plan(key, Plan((x.shape[-1],), quartic=self._quartic))
        elif plans[key].prompts or plans[key].shape != (x.shape[-1],):
            raise SubspaceMismatchError(
                f"{key}: expected rows of width {plans[key].shape[-1]}, got {x.shape[-1]} (shape {tuple(x.shape)})"
            )
        with unguarded(x.device):
            self._tally.add(key, _rows.token_rows(x.detach(), 0))

    # ------------------------------------------------------------------------------------------------ results
    def covariances(self) -> dict[str, Any]:
        """`Covariance` by parameter name; for "prompt" `PromptCovariance` by "prompts.<block>".

        Checked finite (`NonFiniteError` names layer and batch) and symmetric, all of them before any is returned.
        Layers that no row reached are left out with a warning. The matrices are the collector's own, uncopied, unless
        centred, expanded or all-reduced: do not write into them; collecting on works on a copy. Waits for the device;
        with a process group every process must call it.
        """
        results: dict[str, Any] = {}
        plans = self._tally.plans
        for name, sums in self._tally.read(self.process_group, self._home()).items():
            if sums[0].updates == 0:
                continue
            if plans[name].prompts:
                weight = self._prompted().key_weight(int(name.rpartition(".")[2]))
                results[name] = read_prompts(name, sums, weight, self.centred)
            else:
                results[name] = sums[0].checked(name).covariance(self.centred)
        unseen = [name for name in plans if name not in results]
        if unseen:
            shown = ", ".join(unseen[:5]) + (" ..." if len(unseen) > 5 else "")
            warnings.warn(f"no input reached {len(unseen)} layers, which are left out: {shown}", stacklevel=2)
        return results

    def counts(self) -> dict[str, float]:
        """Rows so far by name (batches with that weighting), on this process."""
        return {name: state.count for name, state in self._tally.states.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the state once every layer has been seen."""
        return self._tally.nbytes

    def reset(self) -> None:
        """Forget all sums; hooks stay."""
        self._tally.states.clear()

    def _home(self) -> torch.device:
        if self._tally.device is not None:
            return self._tally.device
        parameters = iter(()) if self._model is None else self._model.parameters()
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def _prompted(self) -> Prompted:
        if not isinstance(self._model, Prompted):
            raise ValueError("model: what='prompt' needs a model with prompts, such as PromptedViT")
        return self._model


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
