"""The compiled CUDA form of `projected_adam_step_` (csrc/projection.cu).

Small parameters (prompts, adapters) go through one launch, a block of threads for each. For large weights the update is
made by one launch, multiplied by the thin bases with torch's matrix product, and added by another: there the products
are work for tensor cores, and the rest is bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops._registry import Unsupported
from cl_kernels.ops.projection.arguments import Step, distinct
from cl_kernels.ops.projection.lists import Lists
from cl_kernels.ops.projection.reference import BASIS, DENSE, Scale

__all__ = ["step_cuda"]

_SMALL_ROWS, _SMALL_ELEMENTS = 128, 1 << 17  # one block does 4 m d r operations alone: beyond this, far too many
_KINDS = {(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)}


@dataclass(slots=True)
class _Call:
    """Parameters of one device, of one pair of element types, and of one size class."""

    lists: Lists
    small: bool
    indices: list[int] = field(default_factory=list)
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    floats: int = 0
    workspace: Tensor = field(default_factory=lambda: torch.empty(0))
    products: list[list[Tensor]] = field(default_factory=list)  # of large parameters: what each matrix product fills

    def allocate(self, device: torch.device, s: Step) -> None:
        """All memory is taken before anything is written: running out of it leaves the parameters as they were."""
        self.workspace = torch.empty(max(self.floats, 1), dtype=torch.float32, device=device)
        for i, (batch, rows, columns) in zip(self.indices, self.shapes, strict=True) if not self.small else ():
            a, b = s.left[i], s.right[i]
            shapes = [] if b is None else [(batch, rows, b.shape[-1])]
            shapes += [] if a is None else [(batch, a.shape[-1], columns)]
            self.products.append([torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes])


def step_cuda(*arguments: Any) -> None:
    """Never waits for the device: learning rate, steps, scale and found_inf are read there if they live there."""
    s = Step(*arguments)
    if s.found_inf is not None and not all(step.is_cuda for step in s.steps):
        raise Unsupported("found_inf on the device needs the step counts there too")
    distinct(s)
    calls = _calls(s)
    for (device, *_), call in calls.items():
        call.allocate(device, s)
    for (device, *_), call in calls.items():
        with torch.cuda.device(device):
            _launch(device, call, s)
        call.lists.write_back()
    for step in s.steps:
        if not step.is_cuda:
            step += 1


def _calls(s: Step) -> dict[tuple[torch.device, torch.dtype, torch.dtype, bool], _Call]:
    """The parameters, each in the call that takes its kind."""
    calls: dict[tuple[torch.device, torch.dtype, torch.dtype, bool], _Call] = {}
    for i, param in enumerate(s.params):
        kinds = (param.dtype, s.exp_avgs[i].dtype)
        if kinds not in _KINDS:
            raise Unsupported(f"{kinds[0]} parameters with {kinds[1]} moments have no kernel")
        small = _is_small(param, s.left[i], s.right[i], s.forms[2 * i + 1])
        call = calls.setdefault((param.device, *kinds, small), _Call(Lists(*kinds), small))
        step = s.steps[i] if s.steps[i].is_cuda else None
        shape = call.lists.add(s, i, step)
        call.lists.numbers += (
            *(s.scales[4 * i : 4 * i + 4] or (1.0, 0.0, 1.0, 0.0)),
            0.0 if step is not None else float(s.steps[i]),
        )
        call.indices.append(i)
        call.shapes.append(shape)
        batch, rows, columns = shape
        ranks = [0 if side is None else side.shape[-1] for side in (s.left[i], s.right[i])]
        call.floats += batch * (rows * columns * (2 if small else 1) + small * max(rows * ranks[1], ranks[0] * columns))
    return calls


def _is_small(param: Tensor, left: Tensor | None, right: Tensor | None, right_form: int) -> bool:
    rows = 1 if param.ndim < 2 else param.shape[-2] if param.ndim < 4 else param.shape[0]
    inner = 0 if right is None else right.shape[-1] if right_form == BASIS else param.shape[-1]
    return rows <= _SMALL_ROWS and param.numel() <= _SMALL_ELEMENTS and inner <= 1024


def _launch(device: torch.device, call: _Call, s: Step) -> None:
    rate, lr = None, s.lr
    if s.lr_tensor is not None:
        if s.lr_tensor.is_cuda:
            rate = s.lr_tensor if s.lr_tensor.dtype in (torch.float32, torch.float64) else s.lr_tensor.double()
        else:
            lr = float(s.lr_tensor)
    read = [None if t is None else t.to(device, torch.float32) for t in (s.grad_scale, s.found_inf)]
    given = s.device_scales
    if given is not None:  # a selection sends its indices to the device
        given = (given if len(call.indices) == len(s.params) else given[call.indices]).contiguous()
    lists, workspace = call.lists, call.workspace
    tensors = (
        0 if rate is None else rate.data_ptr(), rate is not None and rate.dtype == torch.float64,
        *(0 if t is None else t.data_ptr() for t in read), 0 if given is None else given.data_ptr(), not call.small,
    )  # fmt: skip
    args = (
        lists.pointers, lists.sizes, lists.numbers, _native.DTYPE[lists.weight], _native.DTYPE[lists.moment],
        lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.decoupled_weight_decay, s.project_decay,
        -1.0 if s.maximize else 1.0, *tensors, workspace.data_ptr(), torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip
    module = _native.load()
    if call.small:
        module.projected_adam_cuda(0, *args)
        return
    module.projected_adam_cuda(1, *args)
    start = 0
    for i, shape, products in zip(call.indices, call.shapes, call.products, strict=True):
        size = shape[0] * shape[1] * shape[2]
        x = workspace[start : start + size].view(shape)
        a = s.scales[4 * i : 4 * i + 4] if s.device_scales is None else s.device_scales[i].float().unbind()
        if (matrix := s.right[i]) is not None:
            _side_in_place(x, matrix.float(), s.forms[2 * i + 1], a[2], a[3], products[0], from_left=False)
        if (matrix := s.left[i]) is not None:
            _side_in_place(x, matrix.float(), s.forms[2 * i], a[0], a[1], products[-1], from_left=True)
        start += size
    module.projected_adam_cuda(2, *args)


def _side_in_place(
    x: Tensor, matrix: Tensor, form: int, identity: Scale, span: Scale, product: Tensor, *, from_left: bool
) -> None:
    """x <- P x or x P, by way of `product`."""
    if form == DENSE:
        torch.matmul(matrix, x, out=product) if from_left else torch.matmul(x, matrix, out=product)
        x.copy_(product)
        return
    torch.matmul(matrix.mT, x, out=product) if from_left else torch.matmul(x, matrix, out=product)
    x.mul_(identity)
    product.mul_(span)
    wide = matrix.expand(x.shape[0], *matrix.shape)
    if from_left:
        x.baddbmm_(wide, product, alpha=-1)
    else:
        x.baddbmm_(product, wide.mT, alpha=-1)
