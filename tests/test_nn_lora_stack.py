"""LoRAStack: the same function as dense updates, a history that nothing touches, importance, PEFT's format.

Tolerances are those of method-lora-composition.md 11.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_kernels._timm import import_timm
from cl_kernels.errors import NonFiniteError

try:
    import_timm()
except ImportError as reason:
    pytest.skip(str(reason), allow_module_level=True)

from timm.layers import AttentionRope
from timm.models.vision_transformer import VisionTransformer

from cl_kernels.nn import COMPOSITIONS, LoRAStack, from_peft, olora_init, peft_config, to_peft_state_dict
from cl_kernels.nn._lora_linear import LoRALinear


class SeparateAttention(AttentionRope):
    """timm's attention with separate q, k and v projections, as a class that VisionTransformer can build."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs, qkv_fused=False)


def vit(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> VisionTransformer:
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    torch.manual_seed(seed)
    model = VisionTransformer(**(settings | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.02, std=0.2)
    return model.to(dtype)


def images(dtype: torch.dtype = torch.float64, count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(7))


def train(stack: LoRAStack, steps: int = 3, *, weight_decay: float = 0.0) -> None:
    """A few steps on an arbitrary loss."""
    optimizer = torch.optim.AdamW([p for _, p in stack.trainable_parameters()], lr=1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        ((stack(images()) - 0.1 * stack.task).square().sum() + 0.1 * stack.penalty()).backward()
        optimizer.step()


def trained(tasks: int = 3, **options: Any) -> LoRAStack:
    stack = LoRAStack(vit(), **({"rank": 4, "alpha": 4.0} | options))
    for _ in range(tasks):
        stack.begin_task()
        train(stack)
        stack.end_task()
    return stack


def dense(stack: LoRAStack) -> nn.Module:
    """The plain timm model with the update of every layer added to its weight."""
    plain = vit()
    plain.reset_classifier(0)
    modules = dict(plain.named_modules())
    for name, layer in stack.layers():
        weight = layer.base.weight.detach().clone()
        for part, adapters in layer.named_adapters():
            update = torch.zeros(adapters.past_a.shape[0], adapters.past_b.shape[1], dtype=weight.dtype)
            first = 0
            for rank, coefficient, norm in zip(adapters.ranks, adapters.omega.detach(), adapters.norms):
                here = slice(first, first + rank)
                share = coefficient / norm if adapters.normalized else coefficient
                update += share * adapters.past_a[:, here] @ adapters.past_b[here]
                first += rank
            weight[layer.slices[part]] += stack.scale * update.mT
        modules[name].weight.data.copy_(weight)
    return plain


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("orthogonality", ["penalty", "qr", "absorb", None])
def test_every_composition_equals_dense_weights_and_starts_and_ends_tasks_without_a_jump(composition, orthogonality):
    stack = LoRAStack(vit(), rank=4, alpha=4.0, composition=composition, orthogonality=orthogonality)
    for _ in range(3):
        before = stack(images())
        stack.begin_task()
        torch.testing.assert_close(stack(images()), before, rtol=1e-9, atol=1e-9)
        train(stack)
        trained_features = stack(images())
        assert not torch.allclose(trained_features, before)
        stack.end_task()
        torch.testing.assert_close(stack(images()), trained_features, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stack(images()), dense(stack)(images()), rtol=1e-10, atol=1e-10)


def test_gradients_equal_those_of_the_dense_form():
    """A_t, B_t and omega of one layer against autograd through x (W + s sum omega_i A_i B_i + s A_t B_t)."""
    stack = trained(2)
    stack.begin_task()
    train(stack, 1)
    stack.zero_grad()
    layer = dict(stack.layers())["blocks.0.mlp.fc1"]
    (_, adapters), *_ = layer.named_adapters()
    x = torch.randn(5, 48, dtype=torch.float64)
    layer(x).square().sum().backward()
    a, b, omega = (p.detach().clone().requires_grad_() for p in (adapters.lora_a, adapters.lora_b, adapters.omega))
    history = sum(omega[i] * adapters.past_a[:, 4 * i : 4 * i + 4] @ adapters.past_b[4 * i : 4 * i + 4] for i in (0, 1))
    weight = layer.base.weight.mT + stack.scale * (history + a @ b)
    (x @ weight + layer.base.bias).square().sum().backward()
    wanted = [torch.zeros_like(p) if p.grad is None else p.grad for p in (a, b, omega)]
    for parameter, want in zip((adapters.lora_a, adapters.lora_b, adapters.omega), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-10, atol=1e-10)


def test_no_dense_update_is_formed(monkeypatch):
    """No tensor of a weight's size comes to life in a forward and backward pass."""
    stack = trained(2, positions=("fc1",))
    stack.begin_task()
    seen: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in str(func) and isinstance(out, Tensor):
                seen.append(tuple(out.shape))
            return out

    with Watch():
        stack(images()).square().sum().backward()
    assert seen
    assert not {(48, 192), (192, 48)} & set(seen)


def test_past_and_frozen_parts_are_untouched_whatever_the_optimizer_does():
    """Weight decay, momentum and clipping reach only the current adapter (trap 8)."""
    stack = trained(2)
    stack.begin_task()
    before = {name: value.clone() for name, value in stack.state_dict().items() if isinstance(value, Tensor)}
    train(stack, 5, weight_decay=0.5)
    current = {name for name, _ in stack.trainable_parameters()}
    assert any("omega" in name for name in current)
    for name, value in stack.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, before[name]) == (name not in current), name


def test_a_snapshot_is_the_model_at_the_end_of_its_task():
    stack = LoRAStack(vit(), rank=4, alpha=4.0)
    kept = []
    for _ in range(3):
        stack.begin_task()
        train(stack)
        stack.end_task()
        kept.append(stack(images()).detach())
    for task, features in enumerate(kept):
        with stack.at(task):
            assert torch.equal(stack(images()), features)
    assert torch.equal(stack(images()), kept[-1])
    with pytest.raises(ValueError, match="0 to 2, got 3"), stack.at(3):
        pass


def test_freezing_is_bit_exact_per_position():
    """K frozen with Q free, and the other way: the official code gates K by Q's mask (trap 1)."""
    for first, other in (("k", "q"), ("q", "k")):
        stack = trained(1)
        named = stack.places()
        name, free = f"blocks.0.attn.qkv.{first}", f"blocks.0.attn.qkv.{other}"
        named[name].frozen_after = 0
        frozen = named[name].delta().clone()
        open_before = named[free].delta().clone()
        for _ in range(2):
            stack.begin_task()
            assert named[name].current is None
            assert not named[name].omega.requires_grad
            train(stack, weight_decay=0.1)
            assert torch.equal(named[name].delta(), frozen)
            assert not torch.equal(named[free].delta(), open_before)
            stack.end_task()
            assert torch.equal(named[name].delta(), frozen)
        assert all(parameter.grad is None for parameter in named[name].parameters())


def test_qr_keeps_the_stack_orthonormal_at_every_step():
    stack = LoRAStack(vit(), rank=4, alpha=4.0, orthogonality="qr")
    for _ in range(3):
        stack.begin_task()
        train(stack)
        stack(images())
        for adapters in stack.places().values():
            a = torch.cat((adapters.past_a, adapters.current.a), dim=1)
            assert (a.mT @ a - torch.eye(a.shape[1], dtype=a.dtype)).abs().max() < 1e-12
        stack.end_task()


def test_the_penalty_is_the_official_term_and_skips_frozen_positions():
    stack = trained(2)
    named = stack.places()
    named["blocks.1.mlp.fc2"].frozen_after = 1
    stack.begin_task()
    expected = 0.0
    for name, adapters in named.items():
        if name != "blocks.1.mlp.fc2":
            a = torch.cat((adapters.past_a, adapters.lora_a), dim=1)
            expected = expected + torch.linalg.matrix_norm(a.mT @ a - torch.eye(12, dtype=a.dtype))
    torch.testing.assert_close(stack.penalty(), expected, rtol=1e-10, atol=0)
    grads = torch.autograd.grad(stack.penalty(), [a.lora_a for a in named.values() if a.lora_a is not None])
    wanted = torch.autograd.grad(expected, [a.lora_a for a in named.values() if a.lora_a is not None])
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_o_lora_sums_the_absolute_cross_products():
    stack = trained(2, composition="o-lora")
    stack.begin_task()
    expected = sum((a.past_a.mT @ a.lora_a).abs().sum() for a in stack.places().values())
    torch.testing.assert_close(stack.penalty(), expected)
    assert float(LoRAStack(vit(), composition="sum").penalty()) == 0


def test_importance_is_the_mean_of_weight_times_gradient():
    """Against dense autograd, fused qkv slices included; averages as the document's recurrence."""
    stack = trained(1)
    stack.begin_task()
    train(stack, 2)
    with stack.record_importance() as importance:
        stack(images()).square().sum().backward()
    plain = vit()
    plain.reset_classifier(0)
    for name, layer in stack.layers():
        weight = layer.base.weight.clone()
        for part, adapters in layer.named_adapters():
            weight[layer.slices[part]] += adapters.delta().mT
        dict(plain.named_modules())[name].weight.data.copy_(weight)
    plain(images()).square().sum().backward()
    for name, layer in stack.layers():
        weight = dict(plain.named_modules())[name].weight
        for part, where in layer.slices.items():
            want = 0.15 * (weight[where] * weight.grad[where]).abs().mean()
            got = importance._mean[layer.place(name, part)]
            torch.testing.assert_close(got, want.detach(), rtol=1e-10, atol=0)


def test_freeze_important_takes_the_top_share_with_ties_and_empty_selections_defined():
    stack = LoRAStack(vit(), rank=2, alpha=2.0)
    names = list(stack.places())
    with pytest.raises(RuntimeError, match="no statistics"):
        stack.freeze_important(0.5)
    assert stack.freeze_important(0.0) == []
    assert stack.freeze_important(0.05) == []  # int(0.05 * 12) = 0: the official code fails here (trap 5)

    def observe(values: dict[str, float]) -> None:
        with stack.record_importance() as importance:
            for name, value in values.items():
                importance.update(name, torch.tensor(value))

    observe(dict.fromkeys(names, 1.0))
    assert stack.freeze_important(0.25) == names[:3]  # equal scores: exactly K, in order
    observe({names[0]: 9.0, names[5]: 3.0, names[7]: 2.0})
    assert stack.freeze_important(0.17) == [names[5], names[7]]  # frozen ones cannot be chosen again
    observe({names[8]: 1.0})
    assert set(stack.freeze_important(1.0)) == set(names) - set(names[:3]) - {names[5], names[7]}
    stack.begin_task()
    assert stack.trainable_parameters() == []


def test_a_state_dict_of_any_task_goes_into_a_fresh_stack():
    stack = trained(2)
    stack.begin_task()
    train(stack, 2)
    other = LoRAStack(vit(seed=5), rank=4, alpha=4.0)
    other.load_state_dict(stack.state_dict())
    assert torch.equal(other(images()), stack(images()))
    assert [n for n, _ in other.trainable_parameters()] == [n for n, _ in stack.trainable_parameters()]
    assert torch.equal(other.penalty(), stack.penalty())
    for one in (stack, other):
        train(one, 2)
        one.end_task()
    assert torch.equal(other(images()), stack(images()))
    with other.at(0), stack.at(0):
        assert torch.equal(other(images()), stack(images()))


def test_merging_is_the_same_function_and_unmerging_restores_every_bit():
    stack = trained(2)
    with stack.at(0):
        first = stack(images()).detach()
    live, weights = stack(images()).detach(), {n: layer.base.weight.clone() for n, layer in stack.layers()}
    stack.merge()
    torch.testing.assert_close(stack(images()), live, rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="merged"):
        stack.begin_task()
    stack.unmerge()
    stack.merge(0)
    torch.testing.assert_close(stack(images()), first, rtol=1e-10, atol=1e-10)
    stack.unmerge()
    assert all(torch.equal(layer.base.weight, weights[name]) for name, layer in stack.layers())
    next(iter(stack.places().values())).past_b[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.attn\.qkv"):
        stack.merge()
    assert all(torch.equal(layer.base.weight, weights[name]) for name, layer in stack.layers())


def test_to_peft_and_back_is_the_same_function():
    stack = trained(2, composition="sum")
    state = to_peft_state_dict(stack)
    assert state["base_model.model.blocks.0.attn.qkv.lora_A.weight"].shape == (24, 48)
    fresh = LoRAStack(vit(), rank=4, alpha=4.0, composition="sum")
    from_peft(fresh, state, peft_config(state))
    torch.testing.assert_close(fresh(images()), stack(images()), rtol=1e-10, atol=1e-10)
    assert fresh.places()["blocks.0.attn.qkv.k"].ranks == [8]  # only the columns that reach it
    torch.testing.assert_close(to_peft_state_dict(fresh), state)
    with stack.at(0):
        first = stack(images())
    older = LoRAStack(vit(), rank=4, alpha=4.0, composition="sum")
    from_peft(older, to_peft_state_dict(stack, 0))
    torch.testing.assert_close(older(images()), first, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "base_model.model.head.lora_A.weight": torch.zeros(1, 1)}, "not lora_A or lora_B of a layer"),
        (lambda s: {k: v for k, v in s.items() if "fc1.lora_B" not in k}, r"fc1 expected .* None"),
        (lambda s: {k: v[..., :-1] if "fc1.lora_A" in k else v for k, v in s.items()}, r"fc1 expected"),
    ],
)
def test_a_foreign_peft_state_is_refused_and_changes_nothing(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
):
    state = change(to_peft_state_dict(trained(1, composition="sum")))
    stack = LoRAStack(vit(), rank=4, alpha=4.0, composition="sum")
    before = copy.deepcopy(stack.state_dict())
    with pytest.raises(ValueError, match=message):
        from_peft(stack, state)
    torch.testing.assert_close(dict(stack.state_dict()), dict(before))
    narrow = LoRAStack(vit(), rank=4, alpha=4.0, composition="sum", positions=("q", "fc1"))
    some = {k: v for k, v in to_peft_state_dict(trained(1, composition="sum")).items() if "qkv" in k}
    with pytest.raises(ValueError, match="does not adapt"):
        from_peft(narrow, some)


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
def test_the_real_peft_loads_what_we_write(tmp_path):
    import peft
    from safetensors.torch import save_file

    stack = trained(2, composition="sum")
    state = to_peft_state_dict(stack)
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(state)))
    plain = vit()
    plain.reset_classifier(0)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(images()), stack(images()), rtol=1e-6, atol=1e-6)
    written = peft.get_peft_model_state_dict(loaded)
    fresh = LoRAStack(vit(), rank=4, alpha=4.0, composition="sum")
    from_peft(fresh, {key: value.double() for key, value in written.items()}, peft_config(state))
    torch.testing.assert_close(fresh(images()), stack(images()), rtol=1e-6, atol=1e-6)


def test_olora_starts_from_the_weight_and_changes_neither_function_nor_weights():
    stack = LoRAStack(vit(), rank=4, alpha=2.0, composition="sum", orthogonality=None)
    before, weights = stack(images()).detach(), {n: layer.base.weight.clone() for n, layer in stack.layers()}
    stack.begin_task()
    olora_init(stack)
    torch.testing.assert_close(stack(images()), before, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(layer.base.weight, weights[name]) for name, layer in stack.layers())
    layer = dict(stack.layers())["blocks.0.mlp.fc1"]
    (_, adapters), *_ = layer.named_adapters()
    q, r = torch.linalg.qr(weights["blocks.0.mlp.fc1"])
    signs = r.diagonal().sign()
    torch.testing.assert_close(adapters.lora_b.detach().mT, (q * signs)[:, :4], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapters.lora_a.detach().mT, (signs[:, None] * r)[:4], rtol=1e-10, atol=1e-10)
    train(stack, 2)
    stack.end_task()
    with pytest.raises(RuntimeError, match="begin a task"):
        olora_init(stack)
    open_stack = trained(1)
    open_stack.begin_task()
    with pytest.raises(ValueError, match="fixed coefficients"):
        olora_init(open_stack)


def test_given_directions_start_the_adapters_and_inf_lora_trains_b_alone():
    stack = LoRAStack(vit(), rank=4, alpha=4.0, composition="inf-lora")
    directions = torch.linalg.qr(torch.randn(48, 4, dtype=torch.float64)).Q
    with pytest.raises(ValueError, match=r"'blocks\.9\.x' expected"):
        stack.begin_task({"blocks.9.x": directions})
    with pytest.raises(ValueError, match=r"expected a matrix of shape \(192, 4\), got \(48, 4\)"):
        stack.begin_task({"blocks.0.mlp.fc2": directions})
    assert stack.task == -1
    stack.begin_task({"blocks.0.mlp.fc1": directions})
    train(stack)
    adapters = stack.places()["blocks.0.mlp.fc1"]
    assert torch.equal(adapters.lora_a, directions)
    assert not any("lora_a" in name for name, _ in stack.trainable_parameters())


def test_separate_projections_and_a_subset_of_positions_work():
    stack = LoRAStack(vit(attn_layer=SeparateAttention), rank=2, alpha=2.0, positions=("q", "v"))
    assert list(stack.places())[:2] == ["blocks.0.attn.q_proj", "blocks.0.attn.v_proj"]
    fused = LoRAStack(vit(), rank=2, alpha=2.0, positions=("v", "q"))
    assert list(fused.places())[:2] == ["blocks.0.attn.qkv.q", "blocks.0.attn.qkv.v"]
    for one in (stack, fused):
        one.begin_task()
        before = one(images()).detach()
        train(one)
        one.end_task()
        assert not torch.allclose(one(images()), before)


def test_capacity_is_said_before_a_task_starts():
    stack = LoRAStack(vit(), rank=30, alpha=30.0, positions=("q",), orthogonality="qr")
    stack.begin_task()
    stack.end_task()
    with pytest.raises(ValueError, match="30 earlier columns and 30 new ones cannot be orthogonal in 48"):
        stack.begin_task()
    assert (stack.task, stack.training_task) == (0, False)
    soft = LoRAStack(vit(), rank=30, alpha=30.0, positions=("q",))
    soft.begin_task()
    soft.end_task()
    with pytest.warns(UserWarning, match="cannot be orthogonal"):
        soft.begin_task()
    assert float(soft.penalty().detach()) >= 2 * (60 - 48) ** 0.5  # two blocks, each at least sqrt(N - in)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": True}, "rank"),
        ({"positions": ("q", "x")}, "positions"),
        ({"positions": ()}, "positions"),
        ({"composition": "mean"}, "composition"),
        ({"orthogonality": "hard"}, "orthogonality"),
    ],
)
def test_a_wrong_call_names_the_argument_and_leaves_the_model_as_it_was(options, message):
    model = vit()
    with pytest.raises(ValueError, match=message):
        LoRAStack(model, **options)
    assert isinstance(model.blocks[0].attn.qkv, nn.Linear)
    assert isinstance(model.head, nn.Linear)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tasks_begin_and_end_in_turn():
    stack = LoRAStack(vit(), rank=2, alpha=2.0)
    with pytest.raises(RuntimeError, match="no task is open"):
        stack.end_task()
    stack.begin_task()
    with pytest.raises(RuntimeError, match="has not been ended"):
        stack.begin_task()
    with pytest.raises(RuntimeError, match="end the task first"):
        stack.freeze_important(0.1)
    with pytest.raises(RuntimeError, match="end the task first"):
        from_peft(stack, {})
    assert not stack.train().backbone.training


def test_with_qr_a_stack_is_copied_and_merged_as_it_is_now_not_as_of_the_last_forward_pass():
    stack = LoRAStack(vit(), rank=4, alpha=4.0, orthogonality="qr")
    stack.begin_task()
    train(stack)  # ends with a step after the last forward pass
    twin = copy.deepcopy(stack)
    stack.merge()
    merged = stack(images())
    stack.unmerge()
    torch.testing.assert_close(merged, stack(images()), rtol=1e-10, atol=1e-10)
    assert torch.equal(twin(images()), stack(images()))
    train(twin)
    state = to_peft_state_dict(twin)
    fresh = LoRAStack(vit(), rank=4, alpha=4.0, composition="sum")
    from_peft(fresh, state)
    torch.testing.assert_close(fresh(images()), twin(images()), rtol=1e-10, atol=1e-10)


def test_importance_under_autocast_is_near_that_in_full_precision():
    """A layer's input is float32 there (LayerNorm's output) and the gradient of its output bfloat16."""
    scores = []
    for half in (False, True):
        stack = LoRAStack(vit(dtype=torch.float32), rank=4, alpha=4.0, generator=torch.Generator().manual_seed(0))
        stack.begin_task()
        with stack.record_importance() as importance, torch.autocast("cpu", torch.bfloat16, enabled=half):
            stack(images(torch.float32)).square().sum().backward()
        scores.append(torch.tensor(list(importance.scores().values())))
    assert (scores[0] > 0).all()
    torch.testing.assert_close(scores[1], scores[0], rtol=0.2, atol=0.0)


def test_what_the_penalty_keeps_follows_the_stack_to_another_dtype_in_the_middle_of_a_task():
    stack = trained(1)
    stack.begin_task()
    before = stack.penalty()
    stack.to(torch.float32)
    assert stack.penalty().dtype == torch.float32
    torch.testing.assert_close(stack.penalty().double(), before, rtol=1e-5, atol=0.0)


def test_merged_weights_do_not_go_into_a_state_dict():
    """Whoever loads them would add the adapters a second time."""
    stack = trained(1)
    stack.merge()
    with pytest.raises(RuntimeError, match="call unmerge"):
        stack.state_dict()
    assert stack.backbone.state_dict()  # the plain model, for export
    stack.unmerge()
    assert stack.state_dict()


def test_attention_that_reads_the_weight_of_its_qkv_layer_is_refused():
    """BEiT's biases of q and v: adapters in a layer that is never called would train without any effect."""
    model = vit()
    model.blocks[1].attn.q_bias = nn.Parameter(torch.zeros(48))
    with pytest.raises(ValueError, match=r"block 1 .* no effect"):
        LoRAStack(model, positions=("v", "fc1"))
    assert isinstance(model.blocks[0].attn.qkv, nn.Linear)
    LoRAStack(model, positions=("proj", "fc1"))


def test_patterns_of_a_peft_configuration_are_read_as_peft_reads_them():
    """Keys are regular expressions for the end of a name: "attn.qkv" means the one of every block."""
    state = to_peft_state_dict(trained(1, composition="sum", positions=("q", "k", "v", "fc1")))
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"attn.qkv": 12}, "alpha_pattern": {r".*\.fc1": 2, "fc": 99}}
    stack = LoRAStack(vit(), rank=4, alpha=4.0, composition="sum", positions=("q", "k", "v", "fc1"))
    from_peft(stack, state, config)
    for name, adapters in stack.places().items():
        layer = name if name.endswith("fc1") else name.rpartition(".")[0]
        a, b = (state[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        scaling = 2 / 4 if name.endswith("fc1") else 8 / 12
        rows = dict(stack.layers())[layer].slices[name.rpartition(".")[2]] if layer != name else slice(None)
        torch.testing.assert_close(adapters.delta(), scaling * (b @ a)[rows].mT, rtol=1e-10, atol=1e-12)
    bias = {**state, "base_model.model.blocks.0.mlp.fc1.lora_B.bias": torch.zeros(192)}
    with pytest.raises(ValueError, match=r"lora_B\.bias"):
        from_peft(stack, bias)


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("positions", [("q", "k", "v", "proj", "fc1", "fc2"), ("k", "fc2")])
def test_with_many_rows_one_composed_weight_gives_the_same_outputs_and_gradients(composition, positions, monkeypatch):
    stack = trained(2, composition=composition, positions=positions, orthogonality=None)
    stack.places()["blocks.0.attn.qkv.k"].frozen_after = 1
    stack.begin_task()
    train(stack, 1)
    many = images(count=24).requires_grad_()
    names, trains = zip(*stack.trainable_parameters(), strict=True)
    used, found = [], []
    for _ in range(2):
        y = stack(many)
        used.append("Composed" in _graph(y))
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        found.append((y, *torch.autograd.grad(loss, [many, *trains], allow_unused=True)))
        monkeypatch.setattr(LoRALinear, "_many", lambda layer, x: False)
    assert used == [True, False]
    for name, got, want in zip(("output", "images", *names), *found, strict=True):
        assert (got is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def _graph(y: Tensor) -> str:
    """The names of all nodes behind y."""
    nodes, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [next_node for next_node, _ in node.next_functions]
    return " ".join(type(node).__name__ for node in nodes)


def test_snapshots_and_importance_with_many_rows():
    stack = trained(2)
    many = images(count=24)
    last = stack(many)
    with stack.at(0):
        first = stack(many)
    stack.begin_task()
    torch.testing.assert_close(stack(many), last, rtol=1e-10, atol=1e-10)
    with stack.at(0):
        assert torch.equal(stack(many), first)
    with stack.record_importance() as importance:
        stack(many).square().sum().backward()
    assert all(score > 0 for score in importance.scores().values())


@pytest.mark.parametrize("rows", [8, 200])
def test_hooks_of_a_frozen_layer_see_every_call_and_a_layer_compiles_whole(rows):
    """8 rows take the thin products, 200 the composed weight, unless somebody listens to the frozen layer."""
    stack = trained(2)
    stack.begin_task()
    layer = dict(stack.layers())["blocks.0.attn.qkv"]
    x = torch.randn(rows, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = layer(x)
    assert ("Composed" in _graph(plain)) == (rows == 200)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain, rtol=1e-10, atol=1e-10)
    seen: list[Tensor] = []
    with layer.base.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        torch.testing.assert_close(layer(x), plain, rtol=1e-10, atol=1e-10)
    assert seen[0] is x
