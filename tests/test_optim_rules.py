"""Which test holds which rule; and the tests of those rules that no other file holds.

O1-O12 are the rules for optimizers, F8-F16 faults in tensors and kernels, F40-F50 faults in an optimizer's life. Rows
that need a GPU say so. `test_the_table_names_tests_that_exist` reads this table; a name without a file is here.

    O1  torch's base class, hooks once     test_optim_twins: test_the_parent_is_torchs_base_class, test_step_hooks_fire_once
    O2  names, wrappers, unnamed refused   test_optim: test_wrapper_prefixes_do_not_matter, test_unnamed_parameters_are_refused_with_advice
    O3  generators, frozen, edited groups  test_optim: test_constructor_takes_generators_and_frozen_parameters, test_pilots_generator_in_a_group
    O3  no cached lists                    test_groups_may_be_edited_between_any_two_steps
    O4  an empty state is no state         test_optim_twins: test_an_empty_state_is_no_state
    O5  tensors only, 0-d fp32 step        test_state_is_tensors_and_the_step_a_scalar, test_optim_twins: test_state_has_the_names_and_kinds_of_torch
    O5  DTensor in, DTensor state          optim_workers: fsdp2_rows_are_projected_without_communication
    O6  store by reference, fingerprints   test_optim: test_another_subspace_is_refused_on_load, test_an_embedded_subspace_needs_no_store
    O7  zero gradient and lr 0             test_zero_gradient_and_zero_rate_change_no_bit
    O8  no gradient, no step               test_optim: test_parameters_without_gradient_are_left_out
    O9  GradScaler's contract              test_optim: test_grad_scaler_contract, test_grad_scaler_of_torch
    O10 lr as a tensor, schedulers         test_a_tensor_rate_is_followed_in_place, test_integrations: test_timms_scheduler_honours_lr_scale_with_a_subspace
    O10 in a CUDA graph                    test_projection_gpu: test_optimizer_in_a_cuda_graph
    O11 add_param_group                    test_optim_twins: test_groups_are_checked_when_added, test_optim: test_groups_can_grow_and_have_their_own_settings
    O12 the update is projected            test_optim: test_moments_see_raw_gradients, test_decay_is_projected_unless_told_otherwise
    F8  NaN: propagate, or skip the whole  test_optim: test_a_nonfinite_gradient_skips_the_whole_step_or_propagates
    F8  no half-applied step               test_what_does_not_fit_stops_the_step_before_it_begins
    F9  NaN in activations                 test_subspace_collector: test_non_finite_inputs_are_named
    F10 gradients of some only             test_optim: test_parameters_without_gradient_are_left_out
    F8  after the model moved to a GPU     test_optim_gpu: test_a_model_that_moved_is_refused_until_the_store_follows
    F11 no gradients at all                test_optim: test_no_gradients_at_all_is_no_step, test_a_scaler_without_any_gradient_says_so
    F12 denormals, zeros, eps = 0          test_eps_zero_and_denormals_give_no_nan
    O12 also with 16-bit bases             test_a_16_bit_basis_stays_16_bit_and_keeps_the_promise
    F13 fake tensors, compile              test_optim: test_a_compiled_step_is_one_graph_and_is_not_compiled_again
    F13 vmap                               test_vmap_over_a_step_is_refused
    F14 threads; streams on a GPU          test_two_threads_train_two_models, test_projection_gpu: test_side_stream
    F15 deterministic mode                 test_deterministic_mode_repeats_bit_for_bit
    F16 out of memory before any write     test_running_out_of_memory_changes_nothing, test_optim_project_updates: test_what_fails_after_the_step_puts_the_parameters_back
    F40 DCP's dummy step                   optim_workers: checkpoints_load_across_sizes, test_optim: test_distributed_checkpoints_initialise_a_fresh_optimizer_without_moving_anything
    F41 kill -9 in a save                  test_subspace_store: test_a_failed_write_keeps_the_old_file
    F42 kill -9 between steps              test_kill_9_between_steps_and_resume_bit_for_bit
    F43 another world size                 optim_workers: checkpoints_load_across_sizes, one_store_on_all_ranks
    F44 added, removed, resized, frozen    test_groups_may_be_edited_between_any_two_steps, test_optim: test_bind_moves_state_by_name_and_resets_what_was_resized
    F45 Avalanche, PILOT, Mammoth          test_integrations: test_avalanches_sequence_with_the_plugin, test_pilots_sequence, test_mammoths_sequence
    F46 schedulers, cycling betas          test_schedulers_with_a_subspace, test_optim_twins: test_schedulers
    F47 a scaler's overflow                test_an_overflow_of_the_scaler_changes_nothing
    F48 accumulation, no_sync, clipping    test_accumulated_and_clipped_gradients_are_gradients, optim_workers: ddp_accumulates_under_no_sync
    F49 deepcopy, pickle                   test_optim: test_deepcopy_and_pickle_keep_projecting
    F50 state to and from torch's          test_optim_twins: test_state_moves_between_twins, test_torchs_state_loads_under_a_subspace
    V2  the golden update                  test_golden_two_steps_of_the_optimizer
"""  # noqa: E501 - a table

from __future__ import annotations

import ast
import copy
import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops import Projector, Sides, projected_adam_step_
from cl_kernels.optim import ProjectedAdam, ProjectedAdamW, ProjectedSGD, project_updates

TESTS = Path(__file__).parent
OPTIMIZERS = {
    "adamw": lambda named, **k: ProjectedAdamW(named, **{"lr": 1e-2, **k}),
    "adam": lambda named, **k: ProjectedAdam(named, **{"lr": 1e-2, "weight_decay": 1e-2, "amsgrad": True, **k}),
    "sgd": lambda named, **k: ProjectedSGD(named, **{"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-2, **k}),
}
kinds = pytest.mark.parametrize("kind", sorted(OPTIMIZERS))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 8), nn.Linear(8, 3)
        self.prompt = nn.Parameter(torch.randn(1, 4, 12))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.head(torch.tanh(self.first(x))).square().mean() + self.prompt.square().mean()
        return loss


def basis(d: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, r))[0]


def subspace() -> dict[str, Any]:
    torch.manual_seed(11)
    return {
        "first.weight": Projector(basis(12, 5)),
        "prompt": Sides(Projector(basis(4, 1)), Projector(basis(12, 3), 0.6, 0.6)),
    }


@pytest.fixture
def net() -> Net:
    torch.manual_seed(5)
    return Net()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 12, generator=generator)).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Also the sign of zero."""
    return all(
        torch.equal(p.detach().view(torch.int32), before[n].view(torch.int32)) for n, p in model.named_parameters()
    )


def rows() -> list[tuple[str, list[tuple[str, str]]]]:
    """(row, its tests as (file, name)) of the table above."""
    found = []
    for row, text in re.findall(r"^    ([OFV]\d+)\s.{35}(.+)$", __doc__ or "", re.M):
        file, tests = Path(__file__).stem, []
        for word in text.split(","):
            *stem, name = word.strip().split(": ")
            file = stem[0] if stem else file
            tests.append((file, name))
        found.append((row, tests))
    return found


def test_the_table_names_tests_that_exist() -> None:
    table = rows()
    wanted = {f"O{i}" for i in range(1, 13)} | {f"F{i}" for i in (*range(8, 17), *range(40, 51))} | {"V2"}
    assert {row for row, _ in table} == wanted
    here = Path(__file__).read_text(encoding="utf-8")
    for row, tests in table:
        for file, name in tests:
            text = (TESTS / f"{file}.py").read_text(encoding="utf-8")
            assert f"def {name}(" in text or f"def {name}(" in here, f"{row}: {file}.py has no {name}"


def test_the_documentation_is_python_and_names_what_exists() -> None:
    import cl_kernels.integrations as integrations
    from cl_kernels import optim

    text = (TESTS.parent / "docs" / "optimizers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 8
    for block in blocks:
        ast.parse(block)
    for name in set(
        re.findall(r"\b(?:Projected\w+|FTP(?:AdamW|SGD)|project_updates|SubspacePlugin|named_groups)\b", text)
    ):
        assert any(hasattr(place, name) for place in (optim, integrations.timm, integrations.avalanche)), name


# -- the rules ---------------------------------------------------------------------------------------------------------


@kinds
def test_groups_may_be_edited_between_any_two_steps(net: Net, kind: str) -> None:
    """Parameters removed, put back in another order, frozen and thawed, and new ones appended and named by bind."""
    optimizer = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace())
    group = optimizer.param_groups[0]
    train(net, optimizer, 2)
    removed = group["params"].pop(1)
    before = values(net)
    train(net, optimizer, 2)
    assert torch.equal(removed, before[next(n for n, p in net.named_parameters() if p is removed)])
    group["params"] = [*reversed(group["params"]), removed]
    net.prompt.requires_grad_(False)
    kept = net.prompt.detach().clone()
    optimizer.zero_grad()
    train(net, optimizer, 2)
    assert torch.equal(net.prompt, kept)
    net.prompt.requires_grad_(True)
    net.head = nn.Linear(8, 5)
    group["params"] = (p for p in net.parameters())
    with pytest.warns(UserWarning, match="resized"):
        optimizer.bind(net)
    train(net, optimizer, 20)
    assert max(optimizer.violations().values()) <= 5e-5
    assert not torch.equal(net.prompt, kept)


@kinds
def test_state_is_tensors_and_the_step_a_scalar(net: Net, kind: str) -> None:
    optimizer = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace())
    train(net, optimizer, 2)
    for p, state in optimizer.state.items():
        assert state
        for key, value in state.items():
            assert isinstance(value, Tensor)
            if key == "step":
                assert (value.shape, value.dtype, float(value)) == ((), torch.float32, 2.0)
            else:
                assert (value.shape, value.dtype) == (p.shape, p.dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(include_subspace=True), file)
    file.seek(0)
    torch.load(file, weights_only=True)


@kinds
def test_zero_gradient_and_zero_rate_change_no_bit(net: Net, kind: str) -> None:
    with torch.no_grad():
        net.first.weight[0, :2] = -0.0
        net.prompt[0, 0, 0] = -0.0
        net.head.bias[0] = -0.0
    optimizer = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace(), lr=0.0, weight_decay=0.0)
    before = values(net)
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert same_bits(net, before)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_a_tensor_rate_is_followed_in_place(net: Net, kind: str) -> None:
    twin = copy.deepcopy(net)
    rate = torch.tensor(1e-2)
    by_tensor = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace(), lr=rate)
    by_number = OPTIMIZERS[kind](twin.named_parameters(), subspace=subspace(), lr=float(rate))
    for i in range(6):
        train(net, by_tensor, 1, seed=i)
        train(twin, by_number, 1, seed=i)
        rate.mul_(0.5)  # as torch's schedulers write it
        by_number.param_groups[0]["lr"] *= 0.5
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    assert by_tensor.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    ("eta", "wanted"),
    [
        (1.0, [[0.4974225579, -0.2474225579, 0.9874738533], [0.1025774421, 0.1974225579, -0.2874738533]]),
        (0.97, [[0.4975678653, -0.2469891277, 0.9872754816], [0.1021972255, 0.1972023514, -0.2873609150]]),
    ],
)
def test_golden_two_steps_of_the_optimizer(
    backend: str, dtype: torch.dtype, tolerance: float, eta: float, wanted: list[list[float]]
) -> None:
    """V2 of method-null-space 14.2: normalised, mixed, two-sided, coupled weight decay."""
    from cl_kernels import use_backend

    def side(direction: list[float], free: int) -> Projector:
        v = torch.tensor(direction, dtype=dtype)[:, None]
        return Projector(v / v.norm(), eta / free**0.5 + 1 - eta, eta / free**0.5)

    p = nn.Parameter(torch.tensor([[0.5, -0.25, 1.0], [0.1, 0.2, -0.3]], dtype=dtype))
    store = {"prompt": Sides(side([1.0, 1.0], 1), side([1.0, 1.0, 0.0], 2))}
    optimizer = ProjectedAdam([("prompt", p)], lr=0.01, weight_decay=5e-5, subspace=store)
    with use_backend(backend):
        for grad in ([[0.1, -0.2, 0.3], [0.0, 0.5, -0.4]], [[-0.3, 0.1, 0.2], [0.25, -0.15, 0.05]]):
            p.grad = torch.tensor(grad, dtype=dtype)
            optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor(wanted, dtype=dtype), rtol=0, atol=tolerance)
    moments = torch.tensor([[-0.02099527, -0.00800236, 0.04700946], [0.02500097, 0.03000188, -0.03100281]], dtype=dtype)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], moments, rtol=0, atol=2e-8)


# -- faults in tensors -------------------------------------------------------------------------------------------------


def _resize_state(net: Net, optimizer: Any) -> None:
    for key, value in optimizer.state[net.first.weight].items():
        if key != "step":
            optimizer.state[net.first.weight][key] = value[:4].clone()


def _move_state(net: Net, optimizer: Any) -> None:
    for key, value in optimizer.state[net.first.weight].items():
        if key != "step":
            optimizer.state[net.first.weight][key] = value.to("meta")


def _sparse_gradient(net: Net, optimizer: Any) -> None:
    net.first.weight.grad = net.first.weight.grad.to_sparse()


def _resize_parameter(net: Net, optimizer: Any) -> None:
    net.first.weight.grad = None
    net.first.weight.data = torch.randn(8, 13)
    net.first.weight.grad = torch.randn(8, 13)


def _move_parameter(net: Net, optimizer: Any) -> None:
    net.first.weight.grad = None
    torch.utils.swap_tensors(net.first.weight, nn.Parameter(net.first.weight.detach().to("meta")))
    net.first.weight.grad = torch.zeros(8, 12, device="meta")


MISFITS = {
    "resized state": (_resize_state, ValueError, r"first\.weight.*\(8, 12\).*\(4, 12\)"),
    "moved state": (_move_state, RuntimeError, r"first\.weight.*cpu.*meta"),
    "sparse gradient": (_sparse_gradient, RuntimeError, "sparse"),
    "resized parameter": (_resize_parameter, SubspaceMismatchError, r"first\.weight.*\(8, 13\)"),
    "moved parameter": (_move_parameter, RuntimeError, r"first\.weight.*meta.*store\.to"),
}


@kinds
@pytest.mark.parametrize("misfit", sorted(MISFITS))
def test_what_does_not_fit_stops_the_step_before_it_begins(net: Net, kind: str, misfit: str) -> None:
    """Two groups, the misfit in the second: neither group, nor free nor projected parameters, have moved then.

    A kernel that is given addresses would read and write beyond a moment of another shape.
    """
    change, error, words = MISFITS[misfit]
    named = list(net.named_parameters())
    late = [pair for pair in named if pair[0] == "first.weight"]
    optimizer = OPTIMIZERS[kind](
        [{"params": [p for p in named if p not in late]}, {"params": late}], subspace=subspace()
    )
    train(net, optimizer, 2)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    change(net, optimizer)
    others = {n: p for n, p in net.named_parameters() if n != "first.weight"}
    before = {n: p.detach().clone() for n, p in others.items()}
    state = {n: copy.deepcopy(dict(optimizer.state[p])) for n, p in others.items()}
    with pytest.raises(error, match=words):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in others.items())
    assert all(torch.equal(v, state[n][k]) for n, p in others.items() for k, v in optimizer.state[p].items())


def test_a_state_of_another_shape_is_refused_on_load_and_changes_nothing(net: Net) -> None:
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace())
    train(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(saved)
    wrong["state"][0]["exp_avg"] = wrong["state"][0]["exp_avg"][:, :3]
    wrong["param_groups"][0]["lr"] = 9.0
    with pytest.raises(ValueError, match=r"prompt has shape \(1, 4, 12\), but its exp_avg"):
        optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()
    assert after["param_groups"] == saved["param_groups"]
    assert all(torch.equal(v, saved["state"][i][k]) for i, s in after["state"].items() for k, v in s.items())


def test_a_scaler_without_any_gradient_says_so(net: Net) -> None:
    """torch's own words reach the user, and the docstring says what they mean; a fused step is left alone by torch."""
    before = values(net)
    for fused in (False, True):
        optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace(), fused=fused, nonfinite="skip")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        if fused:
            scaler.step(optimizer)
        else:
            with pytest.raises(AssertionError, match="No inf checks were recorded"):
                scaler.step(optimizer)
        assert same_bits(net, before)
    assert "No inf checks were recorded" in (ProjectedAdam.__doc__ or "")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("eps", "scales"), [(0.0, (0.0, 1.0, 0.0)), (1e-8, (0.0, 1e-38, 1e-45, 0.0, 1e-30))])
def test_eps_zero_and_denormals_give_no_nan(net: Net, backend: str, eps: float, scales: tuple[float, ...]) -> None:
    """With eps = 0 where the gradient is 0 (as documented: a square that underflows is infinite there, as in torch)."""
    from cl_kernels import use_backend

    optimizer = ProjectedAdam([("prompt", net.prompt)], lr=1e-3, eps=eps, subspace={"prompt": subspace()["prompt"]})
    with use_backend(backend):
        for scale in scales:
            net.prompt.grad = torch.full_like(net.prompt, scale)
            net.prompt.grad[0, 1] = 0.0
            optimizer.step()
            assert net.prompt.isfinite().all(), scale


@pytest.mark.parametrize("how", ["adamw", "sgd", "wrapped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_basis_stays_16_bit_and_keeps_the_promise(how: str, dtype: torch.dtype) -> None:
    """It is orthonormal to three digits: applied once it would leave a thousandth of each step inside."""
    v = basis(64, 16).to(dtype)
    p, x = nn.Parameter(0.1 * torch.randn(8, 64)), {"w": Projector(v)}
    start = p.detach().clone()
    if how == "wrapped":
        optimizer: Any = torch.optim.AdamW([("w", p)], lr=1e-2)
        project_updates(optimizer, x)
    else:
        optimizer = OPTIMIZERS[how]([("w", p)], subspace=x)
        held = optimizer._ready[p][0][1][0]
        assert held.dtype == dtype
    for _ in range(50):
        p.grad = torch.randn_like(p)
        optimizer.step()
    moved = (p.detach() - start).double()
    span = torch.linalg.qr(v.double())[0]
    assert (moved @ span).norm() <= 3e-5 * moved.norm()
    once = torch.randn(8, 64).double()
    once = once - once @ v.double() @ v.double().mT
    assert (once @ span).norm() > 5e-5 * once.norm()


def test_vmap_over_a_step_is_refused() -> None:
    v = basis(12, 3)

    def step(p: Tensor, g: Tensor, m: Tensor, s: Tensor) -> None:
        projected_adam_step_(
            [p], [g], [m], [s], [torch.zeros(())], [None], [Projector(v)], lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8,
            weight_decay=0.0, decoupled_weight_decay=False,
        )  # fmt: skip

    many = [torch.randn(5, 4, 12) for _ in range(4)]
    before = many[0].clone()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for cl_kernels::projected_adam_step_"):
        torch.vmap(step)(*many)
    assert torch.equal(many[0], before)


def test_two_threads_train_two_models() -> None:
    def run(seed: int, out: dict[int, dict[str, Tensor]]) -> None:
        model = models[seed]
        optimizer = ProjectedAdamW(model.named_parameters(), lr=1e-2, subspace=store)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        out[seed] = values(model)

    store = subspace()
    start = [Net() for _ in range(2)]
    models = copy.deepcopy(start)
    alone: dict[int, dict[str, Tensor]] = {}
    for seed in range(2):
        run(seed, alone)
    models, together = copy.deepcopy(start), {}
    threads = [threading.Thread(target=run, args=(seed, together)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[s][n], together[s][n]) for s in range(2) for n in alone[s])


@kinds
def test_deterministic_mode_repeats_bit_for_bit(net: Net, kind: str) -> None:
    twin = copy.deepcopy(net)
    torch.use_deterministic_algorithms(True)
    try:
        for model in (net, twin):
            train(model, OPTIMIZERS[kind](model.named_parameters(), subspace=subspace(), nonfinite="skip"), 5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(net, values(twin))


@kinds
def test_running_out_of_memory_changes_nothing(net: Net, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the last projected parameter cannot be made: no parameter has moved by then."""
    optimizer = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace())
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    before, real = values(net), torch.zeros_like

    def exhausted(like: Tensor, **options: Any) -> Tensor:
        if like is net.first.weight:
            raise torch.OutOfMemoryError("out of memory")
        return real(like, **options)

    monkeypatch.setattr(torch, "zeros_like", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert same_bits(net, before)
    monkeypatch.undo()
    optimizer.step()
    assert not torch.equal(net.first.weight, before["first.weight"])


# -- faults in an optimizer's life -------------------------------------------------------------------------------------

RESUMED = """
import os, random, signal, sys, time
import torch
from torch import nn
from cl_kernels.ops import Projector, Sides
from cl_kernels import optim
torch.set_num_threads(1)
folder, kills, steps = sys.argv[1], int(sys.argv[2]), 150
basis = lambda d, r: torch.linalg.qr(torch.randn(d, r, generator=torch.Generator().manual_seed(d)))[0]
sides = Sides(Projector(basis(4, 1)), Projector(basis(8, 3), 0.6, 0.6))
store = {"0.weight": Projector(basis(12, 5)), "2.weight": sides}

def train(kind, file, pause):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))
    options = {"amsgrad": True} if kind != "ProjectedSGD" else {"momentum": 0.9}
    options |= {"exclude": ()} if kind == "FTPAdamW" else {"subspace": store}
    optimizer = getattr(optim, kind)(net.named_parameters(), lr=1e-2, **options)
    step = 0
    if os.path.exists(file):
        saved = torch.load(file, weights_only=True)
        net.load_state_dict(saved["net"]); optimizer.load_state_dict(saved["optimizer"]); step = saved["step"]
    while step < steps:
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(); net(x).square().mean().backward(); optimizer.step(); step += 1
        if pause:
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, file + ".new")
            os.replace(file + ".new", file)
    return net

for kind in ("ProjectedAdamW", "ProjectedSGD", "FTPAdamW"):
    path = os.path.join(folder, kind)
    straight = train(kind, path + ".other", False)  # also the imports that torch puts off until a first step
    rng, killed, resumed = random.Random(7), 0, 0
    while killed < kills:
        child = os.fork()
        if child == 0:
            train(kind, path, True); os._exit(0)
        before = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
        while not os.path.exists(path) or os.stat(path).st_mtime_ns == before:
            time.sleep(0.001)  # until it has taken one more step
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1]:
            killed += 1
            resumed += os.path.exists(path)
        else:
            break
    at = torch.load(path, weights_only=True)["step"] if os.path.exists(path) else 0
    a, b = train(kind, path, True), straight
    print(killed, resumed, at, all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs to be killed are forked")
def test_kill_9_between_steps_and_resume_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RESUMED, str(tmp_path), "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    for line in done.stdout.splitlines():
        killed, resumed, at, same = line.split()
        assert int(killed) >= 2
        assert int(resumed) >= 1
        assert int(at) > 0
        assert same == "True"


@kinds
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("scheduler", ["step", "onecycle", "cyclic", "plateau", "lambda first"])
def test_schedulers_with_a_subspace(net: Net, kind: str, scheduler: str) -> None:
    """Against torch's own optimizer with `project_updates`, under the same scheduler, betas or momentum cycling too."""
    make = {
        "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=14),
        "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
        "lambda first": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (i + 1)),
    }[scheduler]
    twin = copy.deepcopy(net)
    ours = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace())
    torchs = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[kind]
    given = {"lr": 1e-2, "weight_decay": 1e-2} | {"adam": {"amsgrad": True}, "sgd": {"momentum": 0.9}}.get(kind, {})
    theirs = torchs(twin.named_parameters(), **given)
    project_updates(theirs, subspace())
    cycled = set()
    for model, optimizer in ((net, ours), (twin, theirs)):
        schedule = make(optimizer)
        for i in range(10):
            if scheduler == "lambda first":
                schedule.step()
            train(model, optimizer, 1, seed=i)
            if scheduler != "lambda first":
                schedule.step(*([1.0] if scheduler == "plateau" else []))
            group = optimizer.param_groups[0]
            cycled.add(group["betas"][0] if "betas" in group else group["momentum"])
    assert (len(cycled) > 1) == (scheduler in ("onecycle", "cyclic"))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_of_the_scaler_changes_nothing(net: Net, kind: str, fused: bool) -> None:
    optimizer = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    kept: tuple[Any, ...] = ()
    for bad in (False, False, True, False):
        kept = (values(net), copy.deepcopy(optimizer.state_dict()["state"]))
        optimizer.zero_grad()
        loss = net(torch.randn(6, 12))
        scaler.scale(loss * float("inf") if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        state = optimizer.state_dict()["state"]
        unchanged = bool(kept[1]) and all(torch.equal(v, kept[1][i][k]) for i, s in state.items() for k, v in s.items())
        assert same_bits(net, kept[0]) == unchanged == bad
    assert max(optimizer.violations().values()) <= 1e-3


@kinds
def test_accumulated_and_clipped_gradients_are_gradients(net: Net, kind: str) -> None:
    twin, x = copy.deepcopy(net), torch.randn(8, 12)
    pairs = [(m, OPTIMIZERS[kind](m.named_parameters(), subspace=subspace())) for m in (net, twin)]
    for _ in range(4):
        for parts, (model, optimizer) in zip((1, 4), pairs, strict=True):
            optimizer.zero_grad()
            for part in x.chunk(parts):
                (model(part) / parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


def test_torchs_state_loads_under_a_subspace(net: Net) -> None:
    """A run that begins with torch.optim.AdamW goes on projected, and back again, with its moments."""
    plain = torch.optim.AdamW(net.named_parameters(), lr=1e-2)
    train(net, plain, 5)
    ours = ProjectedAdamW(net.named_parameters(), lr=1e-2, subspace=subspace())
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert torch.equal(ours.state[net.prompt]["exp_avg"], plain.state[net.prompt]["exp_avg"])
    train(net, ours, 20, seed=1)
    assert max(ours.violations().values()) <= 5e-5
    assert {int(s["step"]) for s in ours.state.values()} == {25}
    again = torch.optim.AdamW(net.named_parameters(), lr=1e-2)
    again.load_state_dict(ours.state_dict())
    train(net, again, 1)
    assert {int(s["step"]) for s in again.state.values()} == {26}
