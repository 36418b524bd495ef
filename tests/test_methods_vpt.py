"""Visual prompt tuning as methods, and the options that put it and full fine-tuning on an equal footing.

| property | what | tolerance |
|---|---|---|
| PB1 | no prompts: the frozen backbone and its head | exact |
| PB2 | prompts of a block in another order, or before the tokens: the same feature | 3e-6 |
| PB3 | the prefix form is the definition, with rows that are cut off: logits; gradients | 5e-6; 1e-5 (float64 1e-12) |
| PB4 | shallow is deep where there is one block | exact |
| PB5 | start: within +-v, mean 0 within 3 standard errors, variance v^2 / 3 | 5 % of the variance |
| PB6 | numbers that train; the 19 shares of VTAB-1k | exact; 0.005 points |
| PB7 | prompts leave the backbone as it is, without a gradient; fine-tuning changes every tensor | exact |
| PB8 | a checkpoint of prompts and head alone gives the same logits | exact |
| PB9 | first learning rate above 0, last at most 0.001 of the top; weight decay; class of the optimizer | exact |
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_tiny import one_thread, tiny_model
from test_methods import TASKS, Toy, created, train
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import cl_kernels as clk
from cl_kernels import methods
from cl_kernels.continual import checkpoint
from cl_kernels.data import load_backbone
from cl_kernels.methods._groups import depth_of
from cl_kernels.nn import PromptedViT
from cl_kernels.nn._backbone import digest
from cl_kernels.optim import ProjectedAdamW

timm = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
pytestmark = pytest.mark.usefixtures(one_thread.__name__)

VPT = ("vpt-shallow", "vpt-deep")
LINEAR = {"head": "linear", "head_init": "kaiming"}

# Classes, prompts of each block and printed share of tuned numbers of the 19 tasks of VTAB-1k (ViT-B/16, VPT-deep).
VTAB = [
    (100, 10, 0.20), (102, 10, 0.20), (47, 10, 0.15), (102, 1, 0.10), (37, 1, 0.04), (10, 50, 0.54), (397, 5, 0.41),
    (2, 100, 1.06), (10, 100, 1.07), (45, 10, 0.15), (5, 1, 0.02),
    (8, 50, 0.54), (6, 200, 2.11), (6, 100, 1.07), (4, 50, 0.54), (16, 10, 0.12), (16, 50, 0.55), (18, 200, 2.12),
    (9, 200, 2.11),
]  # fmt: skip


def embedded(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The backbone that ships with the package: 4 blocks of width 128 and 16 patches, of which it takes the mean."""
    return load_backbone().model.to(dtype)


def digits(count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3)).to(dtype)


def begun(name: str, backbone: nn.Module | None = None, task: Toy = TASKS[0], **options: Any) -> Any:
    model: Any = tiny_model() if backbone is None else backbone
    method: Any = methods.create(name, model, **options)
    method.begin_task(Large(*vars(task).values()) if model.patch_embed.img_size[0] == 32 else task)
    return method


def counted(method: Any) -> int:
    return sum(parameter.numel() for _, parameter in method.trainable_parameters())


class Large(Toy):
    """A task of images as the embedded backbone takes them."""

    def images(self) -> tuple[Tensor, Tensor]:
        return digits().to(self.dtype), torch.tensor([3, 1] * 3)


class Wide(Toy):
    """A task nobody looks at, of so many classes."""

    def batches(self) -> Any:
        return iter(())


def definition(model: PromptedViT, prompts: list[Tensor], x: Tensor) -> Tensor:
    """VPT-deep as its paper has it: [first row, P_l, others] through timm's block, then prompt rows are overwritten."""
    backbone: Any = model.backbone
    rows = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(x)))
    for prompt, block in zip(prompts, backbone.blocks, strict=True):
        wide = block(torch.cat([rows[:, :1], prompt.expand(len(x), -1, -1), rows[:, 1:]], dim=1))
        rows = torch.cat([wide[:, :1], wide[:, 1 + prompt.shape[1] :]], dim=1)
    feature: Tensor = backbone.forward_head(backbone.norm(rows), pre_logits=True)
    return feature


class TestPB1NoPrompts:
    @pytest.mark.parametrize("name", VPT)
    def test_it_is_the_frozen_backbone_and_its_head(self, name: str) -> None:
        options = {"prompts": 0, "head": "linear"}
        ours = begun(name, embedded(), **options)
        plain: Any = begun("linear", embedded(), head="linear")
        plain.heads.head(0).load_state_dict(ours.heads.head(0).state_dict())
        x = digits()
        assert torch.equal(ours.predict(x), plain.predict(x))
        assert torch.equal(ours.loss((x, torch.tensor([3, 1] * 3))), plain.loss((x, torch.tensor([3, 1] * 3))))
        assert [key for key, _ in ours.trainable_parameters()] == ["heads.0.weight", "heads.0.bias"]


class TestPB2Order:
    def test_order_and_place_do_not_matter(self) -> None:
        model = PromptedViT(embedded(), prompts=9, init="vpt")
        other = PromptedViT(embedded(), prompts=9, init="vpt", placement="prepend")
        other.prompts.load_state_dict(model.prompts.state_dict())
        x = digits()
        with torch.no_grad():
            feature = model(x)
            assert float((other(x) - feature).abs().max()) <= 3e-6
            model.prompts[2].copy_(model.prompts[2][:, torch.randperm(9)])
            assert float((model(x) - feature).abs().max()) <= 3e-6
            model.prompts[2].mul_(-1)
            assert float((model(x) - feature).abs().max()) > 1e-3, "prompts matter at all"


class TestPB3Prefix:
    @pytest.mark.parametrize(("dtype", "value", "slope"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 5e-6, 1e-5)])
    def test_logits_and_gradients_are_those_of_the_definition(
        self, dtype: torch.dtype, value: float, slope: float
    ) -> None:
        method = begun("vpt-deep", embedded(dtype), prompts=10, dropout=0.0, head="linear", head_init="default")
        x, labels = digits(8, dtype), torch.tensor([3, 1] * 4)
        logits = method.predict(x)
        method.loss((x, labels)).backward()
        got = [parameter.grad for parameter in method.model.prompts]
        wide, prompts = method.model.double(), [p.detach().double().requires_grad_() for p in method.model.prompts]
        head = copy.deepcopy(method.heads).double()
        expected = head(definition(wide, prompts, x.double()))
        loss = nn.functional.cross_entropy(expected, head.columns(labels))
        wanted = torch.autograd.grad(loss, prompts)
        assert 0.1 < float(expected.detach().abs().mean()) < 3  # the bound is for logits of order 1
        assert float((logits - expected).detach().abs().max()) <= value
        for ours, theirs in zip(got, wanted, strict=True):
            assert float((ours - theirs).norm()) <= slope * float(theirs.norm())

    def test_with_dropout_every_image_has_its_own_prompts(self) -> None:
        model = PromptedViT(embedded(torch.float64), prompts=6, init="vpt", dropout=0.5)
        model.generator = torch.Generator().manual_seed(4)
        masks = torch.Generator().manual_seed(4)
        x = digits(5, torch.float64)
        kept = [
            2 * p.detach() * torch.empty(5, *p.shape[1:], dtype=p.dtype).bernoulli_(0.5, generator=masks)
            for p in model.prompts
        ]
        torch.testing.assert_close(model(x), definition(model, kept, x), rtol=0, atol=1e-12)
        assert len({tuple(mask.flatten()[:64].tolist()) for mask in kept[0]}) == 5


class TestPB4OneBlock:
    @pytest.mark.parametrize("backend", ["auto", "reference"])  # a concatenation here, and the merge of two parts
    def test_shallow_is_deep(self, backend: str) -> None:
        found = []
        for name in VPT:
            torch.manual_seed(0)
            method: Any = created(name, tiny_model(depth=1), prompts=5, dropout=0.2, lr=1e-2)
            with clk.use_backend(backend):
                train(method, TASKS[0])
                found.append((method.predict(TASKS[0].images()[0]), method.model.prompts[0].detach()))
        assert torch.equal(*(logits for logits, _ in found))
        assert torch.equal(*(prompts for _, prompts in found))

    def test_with_two_blocks_it_is_not(self) -> None:
        torch.manual_seed(0)
        shallow = PromptedViT(tiny_model(), prompts=5, depth="shallow", init="vpt")
        deep = PromptedViT(tiny_model(), prompts=5, depth=[0], init="vpt")
        deep.prompts.load_state_dict(shallow.prompts.state_dict())
        x = TASKS[0].images()[0]
        assert float((shallow(x) - deep(x)).detach().abs().max()) > 1e-4, "the prompts' outputs travel on"


class TestPB5Start:
    @pytest.mark.parametrize("name", VPT)
    def test_the_law(self, name: str) -> None:
        model = timm.VisionTransformer(img_size=32, patch_size=16, embed_dim=768, depth=2, num_heads=12, num_classes=0)
        torch.manual_seed(5)
        prompts = torch.cat(
            [value.detach().flatten() for value in begun(name, model, prompts=50, **LINEAR).model.prompts]
        )
        v = math.sqrt(6 / (3 * 16**2 + 768))
        assert v == 0.0625
        assert float(prompts.abs().max()) <= v
        assert abs(float(prompts.double().mean())) <= 3 * v / math.sqrt(3 * prompts.numel())
        assert float(prompts.double().var()) == pytest.approx(v**2 / 3, rel=0.05)

    def test_the_head_is_kaiming_normal_by_its_outputs(self) -> None:
        method = begun("vpt-deep", tiny_model(dim=64), Wide(0, tuple(range(200))), **LINEAR)
        head = method.heads.head(0)
        assert float(head.weight.detach().double().std()) == pytest.approx(math.sqrt(2 / 200), rel=0.03)
        assert not head.bias.any()


class TestPB6Numbers:
    def test_the_embedded_backbone(self) -> None:
        dim, depth, classes = 128, 4, 2
        for name, blocks in (("vpt-deep", depth), ("vpt-shallow", 1)):
            method = begun(name, embedded(), prompts=7, **LINEAR)
            assert counted(method) == blocks * 7 * dim + dim * classes + classes

    def test_the_shares_of_vtab(self) -> None:
        with torch.device("meta"):
            backbone = timm.vit_base_patch16_224(num_classes=0)
        total = sum(parameter.numel() for parameter in backbone.parameters())
        assert total == 85_798_656
        for classes, prompts, printed in VTAB:
            method: Any = methods.create("vpt-deep", backbone, prompts=prompts, head="linear", head_init="zeros")
            method.begin_task(Wide(0, tuple(range(classes))))
            tuned = counted(method)
            assert tuned == 12 * prompts * 768 + 768 * classes + classes
            assert 100 * tuned / (total + tuned) == pytest.approx(printed, abs=0.005 + 1e-9)


class TestPB7WhatChanges:
    @pytest.mark.parametrize("name", VPT)
    def test_prompts_leave_the_backbone_alone(self, name: str) -> None:
        backbone = embedded()
        before = digest(backbone)
        method = begun(name, backbone, prompts=3, lr=0.1)
        step(method, digits(), torch.tensor([3, 1] * 3))
        assert digest(backbone) == before
        assert all(parameter.grad is None for parameter in backbone.parameters())
        assert all(parameter.grad is not None for _, parameter in method.trainable_parameters())

    def test_full_fine_tuning_changes_every_tensor(self) -> None:
        backbone = embedded()
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        method = begun("full", backbone, targets="all", layer_decay=0.75, lr=1e-3)
        step(method, digits(), torch.tensor([3, 1] * 3))
        assert [key for key, value in backbone.state_dict().items() if torch.equal(value, before[key])] == []

    def test_mixed_trains_both_at_their_own_rates(self) -> None:
        backbone = embedded()
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        method = begun("vpt-deep", backbone, prompts=3, lr=0.1, backbone_lr=1e-4, head_lr=0.01)
        assert [group["lr"] for group in method.optimizer.param_groups] == [0.1, 1e-4, 0.01]
        step(method, digits(), torch.tensor([3, 1] * 3))
        assert [key for key, value in backbone.state_dict().items() if torch.equal(value, before[key])] == []
        moved = max(float((value - before[key]).abs().max()) for key, value in backbone.state_dict().items())
        assert moved == pytest.approx(1e-4, rel=0.01), "the first step of Adam is the learning rate"


def step(method: Any, images: Tensor, labels: Tensor, count: int = 1) -> None:
    for _ in range(count):
        method.optimizer.zero_grad()
        method.loss((images, labels)).backward()
        method.optimizer.step()


class TestPB8Checkpoint:
    @pytest.mark.parametrize("name", VPT)
    def test_prompts_and_head_are_enough(self, name: str, tmp_path: Path) -> None:
        options = {"prompts": 5, "lr": 0.05, "head": "linear"}
        method = begun(name, embedded(), **options)
        step(method, digits(), torch.tensor([3, 1] * 3), count=3)
        method.end_task(TASKS[0], ())
        path = tmp_path / "prompts.safetensors"
        checkpoint.save_atomically(path, method.inference_state(), fingerprint="test")
        again: Any = methods.create(name, embedded(), **options)
        again.load_state_dict(checkpoint.load(path, fingerprint="test", device=torch.device("cpu")))
        assert torch.equal(method.predict(digits()), again.predict(digits()))
        assert path.stat().st_size < 4 * (4 * 5 * 128 + 2 * 129) + 4000, "no weight of the backbone is in it"


class TestPB9Training:
    @pytest.mark.parametrize("epochs", [2, 3, 4, 10, 37, 100])
    @pytest.mark.parametrize("warmup", [0.0, 0.05, 0.1, 0.5])
    def test_the_schedule(self, epochs: int, warmup: float) -> None:
        rates = methods.multipliers("warmup-cosine", epochs, warmup)
        top = rates.index(1.0)
        assert len(rates) == epochs
        assert rates[0] > 0
        assert rates[-1] == pytest.approx(1e-3, rel=1e-12)
        assert rates[-1] <= 1e-3
        assert top == min(round(warmup * epochs), epochs - 2)
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)

    def test_golden(self) -> None:
        falling = [1e-3 + 0.999 * 0.5 * (1 + math.cos(math.pi * part / 8)) for part in range(9)]
        assert methods.multipliers("warmup-cosine", 10) == pytest.approx([0.5, *falling], rel=1e-12)
        assert methods.multipliers("warmup-cosine", 1) == [1.0]

    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    @pytest.mark.parametrize("decay", [0.0, 0.03])
    @pytest.mark.parametrize("name", VPT)
    def test_prompts(self, name: str, decay: float, optimizer: str) -> None:
        method = begun(name, optimizer=optimizer, weight_decay=decay, lr=0.5, head_lr=None, momentum=0.8, **LINEAR)
        assert type(method.optimizer) is {"adamw": AdamW, "sgd": SGD}[optimizer], "whatever the decay (T1)"
        if optimizer == "sgd":
            assert {group["momentum"] for group in method.optimizer.param_groups} == {0.8}
        assert {group["lr"] for group in method.optimizer.param_groups} == {0.5}
        decays = decay_of(method)
        assert decays.pop("heads.0.bias") == 0.0
        assert set(decays.values()) == {decay}
        assert {"heads.0.weight", "prompts.0"} <= set(decays)

    @pytest.mark.parametrize("decay", [0.0, 0.03])
    def test_fine_tuning(self, decay: float) -> None:
        method = begun("full", embedded(), targets="all", weight_decay=decay, decay="matrices", **LINEAR)
        assert type(method.optimizer) is ProjectedAdamW
        assert len(method.optimizer.param_groups) == (4 if decay else 2)
        for key, value in decay_of(method).items():
            free = "norm" in key or key.endswith("bias") or key in ("pos_embed", "cls_token")
            assert value == (0.0 if free else decay), key

    def test_decay_of_all_is_as_it_was(self) -> None:
        method = begun("full", targets="all", weight_decay=0.03)
        assert set(decay_of(method).values()) == {0.03}
        assert len(method.optimizer.param_groups) == 2

    def test_decay_does_decay_and_spares_the_rest(self) -> None:
        """A step without a gradient is decay alone."""
        method = begun("full", tiny_model(), targets="all", weight_decay=0.5, lr=0.1, head_lr=None, decay="matrices")
        before = {key: value.detach().clone() for key, value in method.trainable_parameters()}
        for _, parameter in method.trainable_parameters():
            parameter.grad = torch.zeros_like(parameter)
        method.optimizer.step()
        for key, value in method.trainable_parameters():
            factor = 1.0 if value.ndim == 1 or key in ("pos_embed", "cls_token") else 0.95
            torch.testing.assert_close(value.detach(), factor * before[key])


def decay_of(method: Any) -> dict[str, float]:
    """By the parameter's name."""
    names = {id(parameter): name for name, parameter in method.trainable_parameters()}
    groups = method.optimizer.param_groups
    return {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}


class TestDropout:
    def test_only_while_training(self) -> None:
        method = begun("vpt-deep", embedded(), prompts=8, dropout=0.5)
        x, labels = digits(), torch.tensor([3, 1] * 3)
        logits = method.predict(x)
        assert torch.equal(method.predict(x), logits)
        losses = {float(method.loss((x, labels)).detach()) for _ in range(3)}
        assert len(losses) == 3
        assert torch.equal(method.predict(x), logits)
        assert torch.equal(method.features(x), method.features(x))

    def test_the_share_and_the_scale(self) -> None:
        model = PromptedViT(tiny_model(), prompts=50, init=1.0, dropout=0.1)
        with torch.no_grad():
            model.prompts[0].fill_(1.0)
            masked = model._prompt(0, 40)
            assert masked.shape == (40, 50, 32)
            assert set(masked.unique().tolist()) == {0.0, float(torch.tensor(1.0) / torch.tensor(0.9))}
            assert float((masked == 0).float().mean()) == pytest.approx(0.1, abs=0.005)
            model.generator = torch.Generator().manual_seed(0)
            drawn = model._prompt(0, 40)
            assert float((drawn == 0).float().mean()) == pytest.approx(0.1, abs=0.005)
            assert float(drawn.mean()) == pytest.approx(1.0, abs=0.01)
            assert torch.equal(model.eval()._prompt(0, 40), model.prompts[0])

    def test_off_for_shallow_and_on_for_deep(self) -> None:
        assert [methods.options(name)["dropout"] for name in VPT] == [0.0, 0.1]
        shallow = begun("vpt-shallow", embedded())
        x, labels = digits(), torch.tensor([3, 1] * 3)
        assert float(shallow.loss((x, labels)).detach()) == float(shallow.loss((x, labels)).detach())

    @pytest.mark.parametrize("name", VPT)
    def test_what_is_computed_twice_is_dropped_once(self, name: str) -> None:
        found = []
        for recompute in (False, True):
            torch.manual_seed(0)
            method = begun(name, embedded(), prompts=8, dropout=0.5)
            method.backbone.set_grad_checkpointing(recompute)
            method.loss((digits(), torch.tensor([3, 1] * 3))).backward()
            found.append([parameter.grad for parameter in method.model.prompts])
        for plain, again in zip(*found, strict=True):
            torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan, True, "half"])
    def test_a_wrong_share(self, dropout: Any) -> None:
        with pytest.raises(ValueError, match="dropout: expected a number in"):
            PromptedViT(tiny_model(), dropout=dropout)


class TestLayerDecay:
    def test_depths(self) -> None:
        names = [name for name, _ in embedded().named_parameters()]
        depths = {name: depth_of(name, 4) for name in names}
        assert {name for name, depth in depths.items() if depth == 0} == {
            "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        }  # fmt: skip
        assert depth_of("cls_token", 4) == depth_of("reg_token", 4) == 0
        assert depths["blocks.0.norm1.weight"] == 1
        assert depths["blocks.3.mlp.fc2.bias"] == 4
        assert {name for name, depth in depths.items() if depth == 5} == {
            name for name in names if name.startswith(("norm.", "fc_norm."))
        }

    @pytest.mark.parametrize("name", ["full", "ftp", "l2-sp"])
    def test_rates(self, name: str) -> None:
        method = begun(name, embedded(), targets="all", lr=0.01, layer_decay=0.5, head_lr=None)
        names = {id(parameter): key for key, parameter in method.trainable_parameters()}
        rates = {names[id(p)]: group["lr"] for group in method.optimizer.param_groups for p in group["params"]}
        assert set(rates) == set(names.values())
        for key, rate in rates.items():
            expected = 0.01 if key.startswith("heads") else 0.01 * 0.5 ** (5 - depth_of(key, 4))
            assert rate == pytest.approx(expected, rel=1e-12)
        assert method.scheduler.get_last_lr()[0] == 0.01, "the first group is the fastest, which is what logs show"

    def test_one_is_off(self) -> None:
        assert len(begun("full", targets="all", layer_decay=1.0).optimizer.param_groups) == 2

    def test_blocks_alone(self) -> None:
        method = begun("full", lr=0.01, layer_decay=0.5)
        assert [group["lr"] for group in method.optimizer.param_groups] == pytest.approx([0.005, 0.0025, 1e-3])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vpt-deep", {"prompts": -1}),
        ("vpt-deep", {"dropout": 1.0}),
        ("vpt-shallow", {"optimizer": "adam"}),
        ("vpt-deep", {"momentum": 1.0}),
        ("vpt-deep", {"backbone_lr": -1.0}),
        ("vpt-deep", {"decay": "none"}),
        ("vpt-deep", {"warmup": 1.0}),
        ("full", {"layer_decay": 0.0}),
        ("full", {"layer_decay": 1.5}),
    ],
)
def test_values_out_of_range(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        methods.check(method, **options)
