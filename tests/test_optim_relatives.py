"""SPD, L2-SP, TPGM, MARS-PGM and WiSE-FT: their formulas with the published signs, what they leave alone, and that they
say when they do nothing."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cl_kernels.errors import NonFiniteError, SubspaceMismatchError
from cl_kernels.optim import TPGM, FTPAdamW, L2SPAdamW, SPDAdamW, wise_ft

PULLED: dict[str, Callable[..., Any]] = {
    "spd": SPDAdamW,
    "l2-sp coupled": L2SPAdamW,
    "l2-sp decoupled": lambda *a, **k: L2SPAdamW(*a, coupled=False, **k),
}


class Net(nn.Module):
    """Weights of one, two, three and four dimensions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.position = nn.Parameter(0.1 * torch.randn(1, 4, 4))
        self.body, self.drop, self.head = nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2) + self.position
        out: Tensor = self.head(self.drop(torch.tanh(self.body(tokens.flatten(1)))))
        return out


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        images = torch.randn(6, 3, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
        yield images, torch.randint(0, 3, (6,), generator=generator)


def loss_of(model: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda batch: F.cross_entropy(model(batch[0]).float(), batch[1])


def train(model: Net, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    dtype = model.body.weight.dtype
    for batch in batches(steps, dtype, seed):
        optimizer.zero_grad()
        F.cross_entropy(model.eval()(batch[0]), batch[1]).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def scalar(start: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor([start], dtype=torch.float64))


def push(optimizer: torch.optim.Optimizer, weight: Tensor, gradient: float) -> float:
    weight.grad = torch.full_like(weight, gradient)
    optimizer.step()
    return float(weight.detach())


class TestNothingToDo:
    """strength = 0, a radius of infinity: torch's optimizer."""

    @pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
    @pytest.mark.parametrize("name", PULLED)
    def test_strength_0_is_adamw_bit_for_bit(self, name: str, flags: dict[str, bool]) -> None:
        options = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True, **flags}
        mine, theirs = net(), net()
        optimizer = PULLED[name](mine.named_parameters(), strength=0.0, **options)
        train(mine, optimizer, 30)
        train(theirs, torch.optim.AdamW(theirs.parameters(), **options), 30)
        for key, value in values(theirs).items():
            assert torch.equal(value, values(mine)[key]), key
        assert set(optimizer.fire_rate().values()) == {0.0}

    @pytest.mark.parametrize("name", PULLED)
    def test_what_is_excluded_is_adamw_too(self, name: str) -> None:
        mine, theirs = net(), net()
        optimizer = PULLED[name](mine.named_parameters(), lr=1e-2, strength=0.9)
        grads = []
        for batch in batches(20):
            optimizer.zero_grad()
            F.cross_entropy(mine.eval()(batch[0]), batch[1]).backward()
            grads.append([p.grad.clone() for p in mine.head.parameters() if p.grad is not None])
            optimizer.step()
        twin = torch.optim.AdamW(theirs.head.parameters(), lr=1e-2, weight_decay=0)
        for step in grads:
            for p, grad in zip(theirs.head.parameters(), step, strict=True):
                p.grad = grad
            twin.step()
        assert torch.equal(mine.head.weight, theirs.head.weight)
        assert not torch.equal(mine.body.weight, theirs.body.weight)
        assert set(optimizer.fire_rate()) == {"conv.weight", "conv.bias", "position", "body.weight", "body.bias"}

    @pytest.mark.parametrize("name", PULLED)
    def test_a_step_of_rate_0_without_gradient_changes_no_bit(self, name: str) -> None:
        model = net()
        optimizer = PULLED[name](model.named_parameters(), lr=1e-2)
        train(model, optimizer, 5)
        before, counts = values(model), optimizer.fired()
        for group in optimizer.param_groups:
            group["lr"], group["coupled"] = 0.0, False
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for key, value in values(model).items():
            assert torch.equal(value, before[key]), key
        if name == "spd":
            assert optimizer.fired() == counts

    def test_an_infinite_fixed_radius_is_adamw_to_an_ulp_a_step(self) -> None:
        mine, theirs = net(), net()
        train(mine, FTPAdamW(mine.named_parameters(), lr=1e-2, radius=math.inf), 30)
        train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0), 30)
        for key, value in values(theirs).items():
            torch.testing.assert_close(values(mine)[key], value, rtol=0, atol=30 * 6e-8)


class TestSPD:
    @pytest.mark.parametrize("strength", [0.3, 1.0])
    def test_the_recurrence_of_the_paper(self, strength: float) -> None:
        """Written out for one tensor at a time, over steps of which some fire and some do not."""
        model = net(torch.float64)
        optimizer = SPDAdamW(model.named_parameters(), lr=1e-2, strength=strength, exclude=())
        start = values(model)
        mine = {name: value.clone() for name, value in start.items()}
        first = {name: torch.zeros_like(value) for name, value in start.items()}
        second = {name: torch.zeros_like(value) for name, value in start.items()}
        fired = dict.fromkeys(start, 0)
        for t, batch in enumerate(batches(60, torch.float64), 1):
            optimizer.zero_grad()
            F.cross_entropy(model.eval()(batch[0]), batch[1]).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                first[name] = 0.9 * first[name] + 0.1 * p.grad
                second[name] = 0.999 * second[name] + 0.001 * p.grad**2
                step = first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
                before, after = mine[name] - start[name], mine[name] - 1e-2 * step - start[name]
                condition = -float((p.grad * before).sum()) < 0
                ratio = max(0.0, float((after.norm() - before.norm()) / after.norm())) if condition else 0.0
                mine[name] = start[name] + after - strength * ratio * after
                fired[name] += ratio > 0
            optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), mine[name], rtol=1e-10, atol=1e-12)
        assert optimizer.fired() == fired
        assert 0 < sum(fired.values()) < 60 * len(fired)

    def test_strength_1_puts_the_weight_back_on_the_sphere_it_came_from(self) -> None:
        weight = scalar()
        optimizer = SPDAdamW([("w", weight)], lr=0.1, exclude=())
        for _ in range(5):
            before = push(optimizer, weight, -1.0)
        assert optimizer.fired() == {"w": 0}
        assert push(optimizer, weight, 0.05) == pytest.approx(before, rel=1e-12)  # momentum still went outward
        assert optimizer.fired() == {"w": 1}
        assert optimizer.fire_rate() == {"w": pytest.approx(1 / 6)}

    def test_it_leaves_alone_what_the_gradient_wants_outside(self) -> None:
        """The inverted condition, a mistake in circulation, would act in every one of these steps."""
        weight, twin = scalar(), scalar()
        optimizer = SPDAdamW([("w", weight)], lr=0.1, exclude=())
        adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0)
        for gradient in (-1.0, -0.7, -1.3, -0.2):
            assert push(optimizer, weight, gradient) == push(adamw, twin, gradient)
        assert float(weight.detach()) > 0
        assert optimizer.fired() == {"w": 0}

    def test_it_leaves_alone_a_step_inwards(self) -> None:
        weight, twin = scalar(2.0), scalar(2.0)
        optimizer = SPDAdamW([("w", weight)], lr=0.1, anchors=None, exclude=())  # a zero anchor: d = W
        adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0)
        for gradient in (1.0, 0.7):
            assert push(optimizer, weight, gradient) == push(adamw, twin, gradient)
        assert optimizer.fired() == {"w": 0}

    def test_strength_is_no_rate_and_stops_at_the_anchor(self) -> None:
        for lr in (0.1, 0.01):
            weight = scalar()
            optimizer = SPDAdamW([("w", weight)], lr=lr, strength=1e3, exclude=())
            for _ in range(5):
                push(optimizer, weight, -1.0)
            assert push(optimizer, weight, 0.05) == 0.0


class TestL2SP:
    def test_coupled_is_the_gradient_of_the_penalty(self) -> None:
        mine, theirs = net(torch.float64), net(torch.float64)
        train(mine, L2SPAdamW(mine.named_parameters(), lr=1e-2, strength=0.7, exclude=()), 40)
        start = {name: p.detach().clone() for name, p in theirs.named_parameters()}
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0)
        for batch in batches(40, torch.float64):
            optimizer.zero_grad()
            penalty = sum(((p - start[name]) ** 2).sum() for name, p in theirs.named_parameters())
            (F.cross_entropy(theirs.eval()(batch[0]), batch[1]) + 0.35 * penalty).backward()
            optimizer.step()
        for key, value in values(theirs).items():
            torch.testing.assert_close(values(mine)[key], value, rtol=1e-9, atol=1e-11)

    def test_decoupled_with_a_zero_anchor_is_weight_decay(self) -> None:
        mine, theirs = net(), net()
        options = {"lr": 1e-2, "foreach": False}
        pulled = L2SPAdamW(mine.named_parameters(), strength=0.5, coupled=False, anchors=None, exclude=(), **options)
        train(mine, pulled, 30)
        train(theirs, torch.optim.AdamW(theirs.parameters(), weight_decay=0.5, **options), 30)
        for key, value in values(theirs).items():
            torch.testing.assert_close(values(mine)[key], value, rtol=0, atol=30 * 6e-8)

    @pytest.mark.parametrize("coupled", [True, False])
    def test_it_fires_once_the_weight_has_left_its_anchor(self, coupled: bool) -> None:
        weight = scalar()
        optimizer = L2SPAdamW([("w", weight)], lr=0.1, strength=0.5, coupled=coupled, exclude=())
        push(optimizer, weight, -1.0)
        assert optimizer.fired() == {"w": 0}
        push(optimizer, weight, -1.0)
        assert optimizer.fired() == {"w": 1}

    def test_gradients_are_left_as_they_are(self) -> None:
        weight = scalar()
        optimizer = L2SPAdamW([("w", weight)], lr=0.1, strength=9.0, exclude=())
        for _ in range(3):
            push(optimizer, weight, -1.0)
            assert float(weight.grad) == -1.0  # type: ignore[arg-type]  # push has set it


class TestPulledLoops:
    """What real loops do to them."""

    @pytest.mark.parametrize("name", PULLED)
    def test_a_resumed_run_is_the_same_run(self, name: str) -> None:
        whole, half = net(), net()
        straight = PULLED[name](whole.named_parameters(), lr=1e-2, strength=0.8)
        train(whole, straight, 12)
        train(whole, straight, 12, seed=1)
        train(half, first := PULLED[name](half.named_parameters(), lr=1e-2, strength=0.8), 12)
        again = net()
        resumed = PULLED[name](again.named_parameters(), lr=1e-2, strength=0.8)  # anchors: the weights before training
        again.load_state_dict(half.state_dict())
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
        train(again, resumed, 12, seed=1)
        for key, value in values(whole).items():
            assert torch.equal(value, values(again)[key]), key
        assert resumed.fired() == straight.fired()
        assert sum(straight.fired().values()) > 0

    @pytest.mark.parametrize("name", PULLED)
    def test_maximize_turns_the_sign(self, name: str) -> None:
        models = net(torch.float64), net(torch.float64)
        for model, sign in zip(models, (1.0, -1.0), strict=True):
            optimizer = PULLED[name](model.named_parameters(), lr=1e-2, strength=0.9, maximize=sign < 0, exclude=())
            for batch in batches(30, torch.float64):
                optimizer.zero_grad()
                (sign * F.cross_entropy(model.eval()(batch[0]), batch[1])).backward()
                optimizer.step()
            assert sum(optimizer.fired().values()) > 0
        for key, value in values(models[0]).items():
            torch.testing.assert_close(values(models[1])[key], value, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("name", PULLED)
    @pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])  # noqa: S301 - its own bytes
    def test_copies_go_on_as_the_original(self, name: str, how: Callable[[Any], Any]) -> None:
        model = net()
        optimizer = PULLED[name](model.named_parameters(), lr=1e-2)
        train(model, optimizer, 5)
        other, copied = how((model, optimizer))
        for each, stepper in ((model, optimizer), (other, copied)):
            train(each, stepper, 5, seed=2)
        for key, value in values(model).items():
            assert torch.equal(value, values(other)[key]), key
        assert copied.fired() == optimizer.fired()

    @pytest.mark.parametrize("name", PULLED)
    def test_it_goes_on_from_a_state_of_torchs_adamw(self, name: str) -> None:
        runs = []
        for strength in (0.0, 0.6):
            model, twin = net(), net()
            adamw = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0)
            train(twin, adamw, 5)
            optimizer = PULLED[name](model.named_parameters(), lr=1e-2, strength=strength)
            model.load_state_dict(twin.state_dict())
            optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
            train(model, optimizer, 5, seed=2)
            train(twin, adamw, 5, seed=2)
            runs.append(torch.equal(model.body.weight, twin.body.weight))
        assert runs == [True, False], "the strength is this optimizer's"

    @pytest.mark.parametrize("name", ["spd", "l2-sp coupled"])
    def test_it_compiles_to_one_graph(self, name: str) -> None:
        torch.compiler.reset()
        weights = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
        made = [PULLED[name]([("w", w)], lr=torch.tensor(1e-2), foreach=False, exclude=()) for w in weights]
        steps = made[0].step, torch.compile(made[1].step, fullgraph=True, backend="eager")
        generator = torch.Generator().manual_seed(2)
        for _ in range(4):
            gradient = torch.randn(3, 4, generator=generator)
            for w, step in zip(weights, steps, strict=True):
                w.grad = gradient.clone()
                step()
        torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)
        assert made[0].fired() == made[1].fired()

    def test_a_state_of_other_anchors_is_refused(self) -> None:
        model = net()
        optimizer = SPDAdamW(model.named_parameters(), lr=1e-2)
        train(model, optimizer, 3)
        state = copy.deepcopy(optimizer.state_dict())
        other = SPDAdamW(model.named_parameters(), lr=1e-2)  # anchored where training has led
        with pytest.raises(SubspaceMismatchError, match=r"other anchors.*weight"):
            other.load_state_dict(state)

    @pytest.mark.parametrize("name", PULLED)
    def test_counts_of_16_bit_weights_go_beyond_256(self, name: str) -> None:
        weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        optimizer = PULLED[name]([("w", weight)], lr=1e-2, exclude=())
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.state[weight]["fired"].fill_(1001.0)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.fired() == {"w": 1001}

    @pytest.mark.parametrize("name", PULLED)
    def test_a_gradient_that_is_missing_leaves_the_parameter_and_its_state(self, name: str) -> None:
        model = net()
        optimizer = PULLED[name](model.named_parameters(), lr=1e-2)
        train(model, optimizer, 4)
        before, state = values(model), copy.deepcopy(optimizer.state[model.body.weight])
        for batch in batches(4, seed=5):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            model.body.weight.grad = None
            optimizer.step()
        assert torch.equal(model.body.weight, before["body.weight"])
        for key, value in state.items():
            assert torch.equal(value, optimizer.state[model.body.weight][key]), key
        assert not torch.equal(model.conv.weight, before["conv.weight"])

    @pytest.mark.parametrize("name", PULLED)
    def test_a_model_on_two_devices_is_stepped_on_each(self, name: str) -> None:
        """As torch's AdamW does; the second device holds no numbers, so the first one's are compared."""
        alone, both = net(), net()
        far = nn.Linear(3, 3, device="meta")
        single = PULLED[name](alone.named_parameters(), lr=1e-2)
        spread = [("far.weight", far.weight), *both.named_parameters(), ("far.bias", far.bias)]
        optimizer = PULLED[name](spread, lr=1e-2)
        for batch in batches(8):
            for model in (alone, both):
                model.zero_grad()
                F.cross_entropy(model.eval()(batch[0]), batch[1]).backward()
            for p in far.parameters():
                p.grad = torch.ones_like(p)
            single.step()
            optimizer.step()
        for key, value in values(alone).items():
            assert torch.equal(value, values(both)[key]), key
        assert optimizer.state[far.weight]["exp_avg"].device.type == "meta"

    @pytest.mark.parametrize("name", PULLED)
    def test_a_scaled_step_is_the_unscaled_one_and_an_overflow_is_none(self, name: str) -> None:
        models = [net(), net()]
        made = [PULLED[name](m.named_parameters(), lr=1e-2, fused=True) for m in models]
        for batch in batches(12):
            for model, optimizer, scale in zip(models, made, (1.0, 64.0), strict=True):
                optimizer.zero_grad()
                (scale * F.cross_entropy(model.eval()(batch[0]), batch[1])).backward()
                if scale != 1:
                    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
                optimizer.step()
        for key, value in values(models[0]).items():
            torch.testing.assert_close(values(models[1])[key], value, rtol=1e-6, atol=1e-7)
        assert made[0].fired() == made[1].fired()
        before, counts = values(models[1]), made[1].fired()
        made[1].found_inf = torch.tensor(1.0)
        for p in models[1].parameters():
            p.grad = torch.full_like(p, math.inf)
        made[1].step()
        for key, value in values(models[1]).items():
            assert torch.equal(value, before[key]), key
        assert made[1].fired() == counts

    def test_nothing_is_read_on_the_host(self) -> None:
        class Reads(TorchDispatchMode):
            count = 0

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.count += func is torch.ops.aten._local_scalar_dense.default
                return func(*args, **(kwargs or {}))

        counts = {}
        for name, make in {"adamw": torch.optim.AdamW, **PULLED}.items():
            model = net()
            optimizer = make(list(model.named_parameters()), lr=1e-2, fused=True)
            train(model, optimizer, 3)
            with Reads() as reads:
                optimizer.step()
            counts[name] = reads.count
        assert len(set(counts.values())) == 1, counts

    @pytest.mark.parametrize("name", PULLED)
    @pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf])
    def test_a_strength_out_of_range(self, name: str, strength: float) -> None:
        with pytest.raises(ValueError, match=f"Invalid strength value: {strength}"):
            PULLED[name](net().named_parameters(), strength=strength)

    def test_an_unknown_exclusion_raises(self) -> None:
        with pytest.raises(ValueError, match=r"'haed\.\*' matches no parameter.*head"):
            SPDAdamW(net().named_parameters(), exclude=("haed.*",))


class Published:
    """The loop of the paper, as published: a copy of the model for every inner step, a parameter for every radius."""

    def __init__(self, model: nn.Module, l2: bool) -> None:
        self.anchor, self.l2, self.new = copy.deepcopy(model), l2, True
        self.radii = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in model.parameters()]
        self.adam = torch.optim.Adam(self.radii, lr=1e-2)

    def ratio(self, index: int, moved: Tensor) -> Tensor:
        many = tuple(range(1, moved.ndim)) if moved.ndim > 1 and not self.l2 else tuple(range(moved.ndim))
        norms = moved.norm() if self.l2 else moved.abs().sum(many, keepdim=True)
        with torch.no_grad():
            if self.new:
                self.radii[index].fill_(float(norms.min()) / 2)
            self.radii[index].clamp_(1e-8, max(float(norms.max()), 1e-8))
        return F.hardtanh(self.radii[index] / (norms + 1e-8), 0.0, 1.0)

    def place(self, model: nn.Module, write: bool) -> dict[str, Tensor]:
        made = {}
        for index, ((name, p), anchor) in enumerate(
            zip(model.named_parameters(), self.anchor.parameters(), strict=True)
        ):
            moved = p.detach() - anchor.detach()
            made[name] = anchor.detach() + moved * self.ratio(index, moved)
            if write:
                with torch.no_grad():
                    p.copy_(made[name])
        self.new = False
        return made

    def project(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        inner = copy.deepcopy(model).eval()
        made = self.place(model, write=False)
        loss = F.cross_entropy(torch.func.functional_call(inner, made, (batch[0],)).float(), batch[1])
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.place(model, write=True)


class TestTPGM:
    @pytest.mark.parametrize(("norm", "l2"), [("mars", False), ("row_l1", False), ("l2", True)])
    def test_the_published_loop(self, norm: str, l2: bool) -> None:
        """Every order of work that shows: the radii start after the first step, learn from the weights before their
        projection, and the projected weights are what the next step starts from."""
        mine, theirs = net(torch.float64), net(torch.float64)
        tpgm, published = TPGM(mine, norm=norm, exclude=()), Published(theirs, l2)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-3, foreach=False) for m in (mine, theirs)]
        pairs = zip(batches(40, torch.float64), batches(40, torch.float64, seed=9), strict=True)
        for batch, held in pairs:
            for model, optimizer in zip((mine, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model.eval()(batch[0]), batch[1]).backward()
                optimizer.step()
                model.train()
            tpgm.project(loss_of(mine), [held])
            published.project(theirs, held)
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6, msg=name)
        for mine_, theirs_ in zip(tpgm.radii().values(), published.radii, strict=True):
            assert mine_ == pytest.approx(float(theirs_.detach()), rel=1e-4, abs=1e-6)

    def moved(self, by: float = 0.05) -> tuple[Net, TPGM, dict[str, Tensor]]:
        model = net()
        tpgm = TPGM(model)
        torch.manual_seed(8)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(by * torch.randn_like(p))
        return model, tpgm, values(model)

    def test_rows_lie_within_the_radius_and_the_head_is_free(self) -> None:
        model, tpgm, before = self.moved()
        start = values(net())
        tpgm.project(loss_of(model), list(batches(1)))
        radii = tpgm.radii()
        assert set(radii) == {"conv.weight", "conv.bias", "position", "body.weight", "body.bias"}
        for name, radius in radii.items():
            moved = values(model)[name] - start[name]
            rows = moved.reshape(1, -1) if moved.ndim < 2 else moved.flatten(1)
            norms = rows.abs().sum(1)
            assert float(norms.max()) <= radius * (1 + 1e-5) + 1e-6
            whole = before[name] - start[name]
            limit = (whole.reshape(1, -1) if whole.ndim < 2 else whole.flatten(1)).abs().sum(1).min() / 2
            assert radius == pytest.approx(float(limit), abs=1.01e-2)  # half the smallest row norm, and one Adam step
        assert torch.equal(model.head.weight, before["head.weight"])

    def test_the_radius_gradient_is_masked(self) -> None:
        """It is the slope of the loss in the radius, to which rows inside the ball add nothing."""
        model = nn.Linear(3, 4, bias=False, dtype=torch.float64)
        start = values(model)["weight"]
        tpgm = TPGM(model)
        moved = torch.tensor([[0.1, -0.1, 0.0], [0.3, 0.2, -0.1], [0.0, 0.0, 0.2], [-0.4, 0.1, 0.2]]).double()
        with torch.no_grad():
            model.weight.add_(moved)
        radius, (inputs, labels) = 0.4, (torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0]))

        def at(gamma: float) -> float:
            scale = (gamma / moved.abs().sum(1, keepdim=True)).clamp(max=1)
            return float(F.cross_entropy(inputs @ (start + scale * moved).mT, labels))

        state = tpgm.state_dict()
        tpgm.load_state_dict(state | {"radii": torch.tensor([radius]), "started": True})
        tpgm.project(lambda: F.cross_entropy(model(inputs), labels))
        slope = (at(radius + 1e-5) - at(radius - 1e-5)) / 2e-5
        assert float(tpgm.state_dict()["adam"]["state"][0]["exp_avg"]) == pytest.approx(0.1 * slope, rel=1e-5)
        assert tpgm.projected_fraction() == {"weight": 0.5}
        assert tpgm.radii() == {"weight": pytest.approx(radius - 1e-2 * math.copysign(1, slope), rel=1e-5)}
        assert torch.equal(model.weight[0::2], (start + moved)[0::2])

    def test_fires_and_rates(self) -> None:
        model, tpgm, _ = self.moved()
        tpgm.project(loss_of(model), list(batches(1)))
        assert set(tpgm.fired().values()) == {1}
        tpgm.load_state_dict(tpgm.state_dict() | {"radii": torch.full((5,), 1e3)})
        tpgm.project(loss_of(model), iterations=0)
        assert set(tpgm.fire_rate().values()) == {0.5}
        assert set(tpgm.projected_fraction().values()) == {0.0}

    def test_a_model_that_has_not_moved_is_no_error(self) -> None:
        model = net()
        before = values(model)
        tpgm = TPGM(model)
        tpgm.project(loss_of(model), list(batches(2)), iterations=2)
        for key, value in values(model).items():
            assert torch.equal(value, before[key]), key
        assert all(radius == pytest.approx(1e-8) for radius in tpgm.radii().values())

    def test_modes_and_gradients_are_left_as_they_were(self) -> None:
        model, tpgm, _ = self.moved()
        model.train()
        model.drop.eval()
        seen = []
        model.drop.register_forward_hook(lambda module, *_: seen.append((module.training, model.training)))
        with torch.no_grad():
            tpgm.project(loss_of(model), list(batches(1)))
        assert (model.training, model.body.training, model.drop.training) == (True, True, False)
        assert seen == [(False, False)]
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        with pytest.raises(ZeroDivisionError):
            tpgm.project(lambda batch: 1 / 0 * batch[0], list(batches(1)))
        assert (model.training, model.drop.training) == (True, False)

    def test_weights_stay_during_the_inner_steps(self) -> None:
        """Two inner steps are from the same weights; the second is not from weights that the first has projected."""
        model, tpgm, before = self.moved()
        norms = []

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            norms.append(float((model.body.weight - net().body.weight).detach().norm()))
            return loss_of(model)(batch)

        tpgm.project(loss, list(batches(3)), iterations=3)
        radius = tpgm.radii()["body.weight"]
        assert norms[0] < float((before["body.weight"] - net().body.weight).detach().norm()), (
            "evaluated at projected weights"
        )
        assert max(norms) / min(norms) < 1 + 3 * 1e-2 / radius

    def test_batches_go_on_from_call_to_call_and_start_again(self) -> None:
        model, tpgm, _ = self.moved()
        seen = []
        supply = list(batches(3))

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append(next(i for i, known in enumerate(supply) if known is batch))
            return loss_of(model)(batch)

        for iterations in (2, 1, 2):
            tpgm.project(loss, supply, iterations=iterations)
        assert seen == [0, 1, 2, 0, 1]
        with pytest.raises(ValueError, match="batches"):
            tpgm.project(loss, iter(supply[:1]), iterations=2)
        with pytest.raises(ValueError, match="batches"):
            tpgm.project(loss, [])

    def test_a_closure_needs_no_batches(self) -> None:
        model, tpgm, before = self.moved()
        batch = next(batches(1))
        tpgm.project(lambda: loss_of(model)(batch))
        assert not torch.equal(model.body.weight, before["body.weight"])

    def test_a_loss_that_is_not_finite_does_not_end_the_radii(self) -> None:
        model, tpgm, _ = self.moved()
        tpgm.project(lambda batch: loss_of(model)(batch) * math.nan, list(batches(1)))
        assert all(math.isfinite(radius) and radius > 0 for radius in tpgm.radii().values())
        assert all(bool(torch.isfinite(value).all()) for value in values(model).values())

    def test_a_resumed_run_is_the_same_run(self) -> None:
        runs = []
        for stop in (None, 3):
            model = net()
            tpgm, optimizer = TPGM(model), torch.optim.SGD(model.parameters(), lr=0.1)
            for index, batch in enumerate(batches(6)):
                if index == stop:
                    saved = copy.deepcopy(tpgm.state_dict())
                    fresh = net()
                    tpgm = TPGM(fresh)
                    fresh.load_state_dict(model.state_dict())
                    model, optimizer = fresh, torch.optim.SGD(fresh.parameters(), lr=0.1)
                    tpgm.load_state_dict(saved)
                optimizer.zero_grad()
                F.cross_entropy(model.eval()(batch[0]), batch[1]).backward()
                optimizer.step()
                tpgm.project(loss_of(model), [batch])
            runs.append((values(model), tpgm.radii(), tpgm.fire_rate()))
        for key, value in runs[0][0].items():
            assert torch.equal(value, runs[1][0][key]), key
        assert runs[0][1:] == runs[1][1:]

    def test_a_state_of_another_model_or_of_other_anchors_is_refused(self) -> None:
        model, tpgm, _ = self.moved()
        with pytest.raises(SubspaceMismatchError, match="other anchors"):
            TPGM(model).load_state_dict(tpgm.state_dict())
        with pytest.raises(SubspaceMismatchError, match=r"other parameters.*0\.weight"):
            tpgm.load_state_dict(TPGM(nn.Sequential(nn.Linear(2, 2))).state_dict())

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"norm": "linf"}, "norm"),
            ({"radius_lr": -1.0}, "radius_lr"),
            ({"radius_lr": math.nan}, "radius_lr"),
            ({"exclude": ("haed.*",)}, "exclude"),
            ({"exclude": ("*",)}, "excluded"),
        ],
    )
    def test_wrong_arguments(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            TPGM(net(), **options)
        model = net()
        for iterations in (-1, 1.5, True):
            with pytest.raises(ValueError, match="iterations"):
                TPGM(model).project(loss_of(model), list(batches(1)), iterations=iterations)  # type: ignore[arg-type]  # the test
        with pytest.raises(ValueError, match="does not depend"):
            TPGM(model).project(lambda: torch.ones((), requires_grad=True).sum())
        with pytest.raises(SubspaceMismatchError, match=r"body\.bias"):
            TPGM(model, anchors={key: value for key, value in values(model).items() if key != "body.bias"})


class TestMARS:
    """MARS-PGM is FTPAdamW with a radius that is given."""

    def test_it_is_adamw_and_a_projection_of_every_row(self) -> None:
        mine, theirs = net(torch.float64), net(torch.float64)
        optimizer = FTPAdamW(mine.named_parameters(), lr=1e-2, radius=0.02, exclude=())
        train(mine, optimizer, 40)
        adamw, start = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0), values(theirs)
        for batch in batches(40, torch.float64):
            adamw.zero_grad()
            F.cross_entropy(theirs.eval()(batch[0]), batch[1]).backward()
            adamw.step()
            with torch.no_grad():
                for name, p in theirs.named_parameters():
                    moved = p - start[name]
                    norms = moved.reshape(1, -1).abs().sum() if p.ndim < 2 else moved.flatten(1).abs().sum(1)
                    shape = (-1, *[1] * (p.ndim - 1))
                    p.copy_(start[name] + moved * (0.02 / (norms + 1e-8)).clamp(max=1).reshape(shape))
        for key, value in values(theirs).items():
            torch.testing.assert_close(values(mine)[key], value, rtol=1e-9, atol=1e-11)
        assert set(optimizer.radii().values()) == {0.02}

    def test_it_fires_where_rows_leave_the_ball_and_only_there(self) -> None:
        for radius, rate in ((1e-4, 1.0), (1e3, 0.0)):
            model = net()
            optimizer = FTPAdamW(model.named_parameters(), lr=1e-2, radius=radius)
            train(model, optimizer, 5)
            assert set(optimizer.fire_rate().values()) == {rate}


class TestGivenRadii:
    """FTP goes on around old anchors with the radii of the optimizer before."""

    def test_the_first_step_stays_where_training_had_led(self) -> None:
        model = net()
        first = FTPAdamW(model.named_parameters(), lr=1e-2)
        anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, first, 20)
        before, radii = values(model), first.radii()
        second = FTPAdamW(model.named_parameters(), lr=1e-4, anchors=anchors, radius_lr=1e-4)
        second.set_radii(radii)
        train(model, second, 1, seed=4)
        for name, radius in radii.items():
            assert 0.5 * radius < second.radii()[name] < radius + 1.01e-4, (
                name
            )  # at most the longest row, which shrinks
            moved = float((values(model)[name] - before[name]).norm())
            assert moved < 0.5 * float((before[name] - anchors[name]).norm()), name

    def test_what_does_not_fit_changes_nothing(self) -> None:
        model = net()
        optimizer = FTPAdamW(model.named_parameters(), lr=1e-2)
        train(model, optimizer, 5)
        before = optimizer.radii()
        for wrong in ({"body.weight": -1.0}, {"body.bias": 1.0, "conv.weight": math.nan}):
            with pytest.raises(ValueError, match="radii"):
                optimizer.set_radii(wrong)
        with pytest.raises(SubspaceMismatchError, match=r"head\.weight"):
            optimizer.set_radii({"body.bias": 1.0, "head.weight": 1.0})
        assert optimizer.radii() == before


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)


class TestWiSEFT:
    def tuned(self) -> tuple[Normed, dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(1)
        model = Normed()
        start = values(model)
        with torch.no_grad():
            for tensor in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
                tensor.add_(torch.rand_like(tensor))  # type: ignore[union-attr,arg-type]  # it has running statistics
        return model, start, values(model)

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_alpha_0_is_before_and_1_is_after(self, alpha: float) -> None:
        model, start, after = self.tuned()
        wise_ft(model, start, alpha)
        for key, value in values(model).items():
            if alpha in (0.0, 1.0) or not value.is_floating_point():
                assert torch.equal(value, (after if alpha else start)[key]), key
            else:
                torch.testing.assert_close(value, (1 - alpha) * start[key] + alpha * after[key])

    def test_a_file_and_what_is_excluded(self, tmp_path: Path) -> None:
        model, start, after = self.tuned()
        save_file({f"module.{key}": value for key, value in start.items()}, tmp_path / "before.safetensors")
        wise_ft(model, tmp_path / "before.safetensors", 0.0, exclude=("head.*",))
        assert torch.equal(model.body.weight, start["body.weight"])
        assert torch.equal(model.head.weight, after["head.weight"])

    def test_what_is_wrong_changes_nothing(self) -> None:
        model, start, after = self.tuned()
        parameters = {name: start[name] for name, _ in model.named_parameters()}
        for alpha in (-0.1, 1.1, math.nan, True):
            with pytest.raises(ValueError, match="alpha"):
                wise_ft(model, start, alpha)
        with pytest.raises(SubspaceMismatchError, match=r"head\.bias"):
            wise_ft(model, {key: value for key, value in start.items() if key != "head.bias"})
        with pytest.raises(ValueError, match=r"head\.bias.*\(2,\).*\(3,\)"):
            wise_ft(model, start | {"head.bias": torch.zeros(3)})
        with pytest.raises(NonFiniteError, match=r"head\.bias"):
            wise_ft(model, start | {"head.bias": torch.full((2,), math.nan)})
        with pytest.raises(TypeError, match="anchors"):
            wise_ft(model, "init")
        for key, value in values(model).items():
            assert torch.equal(value, after[key]), key
        wise_ft(model, parameters, 0.0)  # statistics stay where there are none to go to
        assert torch.equal(values(model)["norm.running_mean"], after["norm.running_mean"])
