"""Other people's loops: timm's factory, and the call sequences of Avalanche, Mammoth, PILOT, Accelerate and Lightning.

Sequences are replayed by stand-ins that do to the optimizer what the original does, in its order (sources: the files
named at each), because `make test` installs none of these packages. test_integrations_packages.py runs the real ones
where they are installed; Mammoth and PILOT are not packages, so their replay is all there is.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cl_kernels import rules
from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.integrations import avalanche, timm
from cl_kernels.ops import Projector
from cl_kernels.optim import FTPSGD, FTPAdamW, ProjectedAdam, ProjectedAdamW, ProjectedSGD
from cl_kernels.subspace import CovarianceCollector, SubspaceStore, build_store

ROUNDING = 5e-5


class Net(nn.Module):
    """Inputs of low rank leave something free; the head can grow."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x)))
        return out


def basis(d: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, r))[0]


def task(number: int, rows: int = 96) -> TensorDataset:
    """Two classes of inputs that span four dimensions of sixteen, others for each task."""
    generator = torch.Generator().manual_seed(number)
    span = torch.randn(4, 16, generator=generator)
    x = torch.randn(rows, 4, generator=generator)
    return TensorDataset(x @ span, (x[:, 0] > 0).long() + 2 * number)


def protect(model: nn.Module, data: TensorDataset, targets: Any = "linear") -> SubspaceStore:
    with CovarianceCollector(model, targets, eval_mode=True) as collector, torch.no_grad():
        model(data.tensors[0])
    return build_store(collector.covariances(), rules.Energy(0.999), dtype=torch.float32)


# -- timm --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def factory() -> Any:
    pytest.importorskip("timm", reason="timm is not installed")
    timm.register()
    import timm.optim as optim

    return optim


@pytest.mark.parametrize(
    ("name", "kind"), [("nspadam", ProjectedAdam), ("nspadamw", ProjectedAdamW), ("nspsgd", ProjectedSGD)]
)
def test_timm_makes_ours_and_not_its_own(factory: Any, name: str, kind: type) -> None:
    net = Net()
    store = {"body.weight": Projector(basis(16, 4))}
    optimizer = factory.create_optimizer_v2(net.named_parameters(), name, lr=1e-3, subspace=store)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    if name == "nspsgd":
        assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["nesterov"]) == (0.9, True)
    for _ in range(5):
        net(torch.randn(9, 16)).square().mean().backward()
        optimizer.step()
    assert set(optimizer.violations()) == {"body.weight"}
    assert max(optimizer.violations().values()) <= 1e-3
    assert name in factory.list_optimizers("nsp*")


@pytest.mark.parametrize(("name", "kind"), [("ftpadamw", FTPAdamW), ("ftpsgd", FTPSGD)])
def test_timm_makes_anchored_optimizers(factory: Any, name: str, kind: type) -> None:
    net = Net()
    given = {"anchors": dict(net.named_parameters()), "kappa": 0.5}
    optimizer = factory.create_optimizer_v2(net, name, lr=1e-3, param_group_fn=timm.named_groups(0.05), **given)
    assert type(optimizer) is kind
    assert [group["kappa"] for group in optimizer.param_groups] == [0.5] * len(optimizer.param_groups)
    if name == "ftpsgd":
        assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["nesterov"]) == (0.9, True)
    for _ in range(5):
        net(torch.randn(9, 16)).square().mean().backward()
        optimizer.step()
    assert set(optimizer.radii()) == {"body.weight", "body.bias"}
    assert max(optimizer.radii().values()) > 0
    assert name in factory.list_optimizers("ftp*")


def test_registered_names_have_no_underscore(factory: Any, caplog: pytest.LogCaptureFixture) -> None:
    """timm keeps what follows the last underscore: nsp_adamw is its own AdamW, silently."""
    assert all("_" not in name for name in timm.register())
    assert not caplog.records, "registering again warned"
    trap = factory.create_optimizer_v2([nn.Parameter(torch.ones(2))], "nsp_adamw", lr=1e-3)
    assert type(trap) is torch.optim.AdamW, "if timm mends this, names with underscores become possible"


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_timms_groups_keep_their_names_with_our_group_function(factory: Any, layer_decay: float | None) -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    store = {"blocks.1.mlp.fc1.weight": Projector(basis(16, 5))}
    with pytest.raises(SubspaceMismatchError, match="named_parameters"):
        factory.create_optimizer_v2(model, "nspadamw", lr=1e-3, weight_decay=0.05, subspace=store)
    optimizer = factory.create_optimizer_v2(
        model, "nspadamw", lr=1e-2, subspace=store, param_group_fn=timm.named_groups(0.05, layer_decay)
    )
    twin = factory.create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=layer_decay)
    for ours, theirs in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        assert ours["weight_decay"] == theirs["weight_decay"]
        assert ours.get("lr_scale") == theirs.get("lr_scale")
    before = model.blocks[1].mlp.fc1.weight.detach().clone()
    for _ in range(3):
        model(torch.randn(2, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    moved = model.blocks[1].mlp.fc1.weight.detach() - before
    assert moved.norm() > 1e-3
    assert optimizer.violations()["blocks.1.mlp.fc1.weight"] <= ROUNDING


def test_timms_scheduler_honours_lr_scale_with_a_subspace(factory: Any) -> None:
    from timm.scheduler import CosineLRScheduler

    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    store = {"body.weight": Projector(basis(16, 4))}
    finals = []
    for net, kind, scaled in ((nets[0], ProjectedAdamW, True), (nets[1], ProjectedAdamW, False)):
        groups = [
            {"params": [(n, p) for n, p in net.named_parameters() if n.startswith(part)], "lr_scale": scale}
            for part, scale in (("body", 0.5 if scaled else 1.0), ("head", 1.0))
        ]
        optimizer = kind(groups, lr=1e-2, subspace=store)
        scheduler = CosineLRScheduler(optimizer, t_initial=8, warmup_t=2, warmup_lr_init=1e-4)
        rates = []
        for epoch in range(8):
            scheduler.step(epoch)
            rates.append([group["lr"] for group in optimizer.param_groups])
            net(torch.ones(4, 16)).square().mean().backward()
            optimizer.step()
        finals.append(rates)
        assert max(optimizer.violations().values()) <= 1e-3
    assert all(a == pytest.approx(0.5 * b) for (a, _), (b, _) in zip(*finals, strict=True))
    assert len({rate for rate, _ in finals[0]}) > 5


def test_timms_lookahead_keeps_the_promise(factory: Any) -> None:
    net = Net()
    store = {"body.weight": Projector(basis(16, 4))}
    optimizer = factory.create_optimizer_v2(net.named_parameters(), "lookahead_nspadamw", lr=1e-2, subspace=store)
    assert type(optimizer).__name__ == "Lookahead"
    before = net.body.weight.detach().clone()
    for _ in range(13):
        optimizer.zero_grad()
        net(torch.randn(9, 16)).square().mean().backward()
        optimizer.step()
    moved = net.body.weight.detach() - before
    assert (moved @ store["body.weight"].basis).norm() <= ROUNDING * moved.norm()


# -- Avalanche ---------------------------------------------------------------------------------------------------------


def rewrite(optimizer: Any, model: nn.Module, known: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """What avalanche/models/dynamic_optimizers.py (0.6) does before each experience: the state wiped the first time,
    tensors replaced in place in `params`, new ones appended with `state[p] = {}`; `param_names` is never touched."""
    present = dict(model.named_parameters())
    params = optimizer.param_groups[0]["params"]
    for name, p in present.items():
        old = (known or {}).get(name)
        place = next((i for i, q in enumerate(params) if q is (p if old is None else old)), None)
        if place is None:
            params.append(p)
            optimizer.state[p] = {}
        elif params[place] is not p:
            params[place] = p
            if old in optimizer.state:
                optimizer.state.pop(old)
                optimizer.state[p] = {}
    if known is None:
        optimizer.state = defaultdict(dict)
    return present


class Strategy:
    """The part of Avalanche's SGD templates that a plugin and an optimizer see."""

    def __init__(self, model: nn.Module, optimizer: Any, plugins: list[Any]) -> None:
        self.model, self.optimizer, self.plugins = model, optimizer, plugins
        self.known: dict[str, Tensor] | None = None
        self.experience: Any = None
        self.train_mb_size = 32

    def trigger(self, event: str) -> None:
        for plugin in self.plugins:
            if hasattr(plugin, event):
                getattr(plugin, event)(self)

    def train(self, data: TensorDataset, epochs: int = 6) -> None:
        self.experience = SimpleNamespace(dataset=data)
        classes = int(data.tensors[1].max()) + 1
        if self.model.head.out_features < classes:  # the incremental classifier grows: a new parameter
            old, self.model.head = self.model.head, nn.Linear(8, classes)
            with torch.no_grad():
                self.model.head.weight[: old.out_features] = old.weight
        self.known = rewrite(self.optimizer, self.model, self.known)
        self.trigger("before_training_exp")
        for _ in range(epochs):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(data.tensors[0]), data.tensors[1]).backward()
            self.trigger("after_backward")
            self.optimizer.step()
        self.trigger("after_training_exp")


@pytest.mark.parametrize(
    "make",
    [
        lambda net: ProjectedAdamW(net.named_parameters(), lr=1e-2),
        lambda net: ProjectedSGD(net.named_parameters(), lr=0.1, momentum=0.9),
        lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2),
    ],
    ids=["ProjectedAdamW", "ProjectedSGD", "torch's AdamW"],
)
def test_avalanches_sequence_with_the_plugin(make: Any) -> None:
    net = Net()
    plugin = avalanche.SubspacePlugin(rules.Energy(0.999), targets=["body"])
    strategy = Strategy(net, make(net), [plugin])
    strategy.train(task(0))
    assert set(plugin.store) == {"body.weight"}
    assert plugin.store["body.weight"].rank in (4, 12)
    inputs = task(0).tensors[0]
    hidden, weight = (inputs @ net.body.weight.mT).detach(), net.body.weight.detach().clone()
    for number in (1, 2):
        strategy.train(task(number))
        assert (net.body.weight.detach() - weight).norm() > 1e-2
    drift = (inputs @ net.body.weight.mT).detach() - hidden
    assert drift.norm() <= 2e-3 * hidden.norm(), "what task 1 sees before its bias has moved"
    assert plugin.store.capacity()["body.weight"] == pytest.approx(4 / 16)
    assert net.head.out_features == 6
    free = Net()
    unprotected = Strategy(free, make(free), [])
    unprotected.train(task(0))
    hidden = (inputs @ free.body.weight.mT).detach()
    unprotected.train(task(1))
    assert (inputs @ free.body.weight.mT - hidden).norm() > 0.02 * hidden.norm(), "the tasks do not interfere"


def test_the_plugin_needs_no_avalanche_and_bounds_its_pass() -> None:
    import sys

    seen = []
    net = Net()
    net.body.register_forward_hook(lambda *_: seen.append(net.training))
    plugin = avalanche.SubspacePlugin(rules.Energy(0.9), max_batches=2)
    strategy = Strategy(net, ProjectedAdamW(net.named_parameters()), [plugin])
    strategy.train(task(0), epochs=0)
    assert seen == [False, False], "two batches, in eval mode"
    assert plugin.supports_distributed
    assert net.training
    assert "avalanche" not in sys.modules or sys.modules["avalanche"].__file__


# -- Mammoth -----------------------------------------------------------------------------------------------------------


class ContinualModel(nn.Module):
    """models/utils/continual_model.py: a new optimizer in `meta_begin_task`, before the user's `begin_task`."""

    def __init__(self, net: nn.Module, args: Namespace) -> None:
        super().__init__()
        self.net, self.args = net, args
        self.opt = self.get_optimizer()

    def get_optimizer(self, params: Any = None, lr: float | None = None) -> Any:
        raise NotImplementedError

    def meta_begin_task(self, data: TensorDataset) -> None:
        self.opt = self.get_optimizer()
        self.begin_task(data)

    def begin_task(self, data: TensorDataset) -> None: ...


class NSP(ContinualModel):
    """The recipe of docs/optimizers.md."""

    def __init__(self, net: nn.Module, args: Namespace) -> None:
        object.__setattr__(self, "store", SubspaceStore())
        super().__init__(net, args)

    def get_optimizer(self, params: Any = None, lr: float | None = None) -> Any:
        return ProjectedAdamW(self.net.named_parameters(), lr=lr or self.args.lr, subspace=self.store)

    def observe(self, inputs: Tensor, labels: Tensor) -> float:
        self.opt.zero_grad()
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        loss.backward()
        self.opt.step()
        return loss.item()

    def end_task(self, data: TensorDataset) -> None:
        self.store.merge(protect(self.net, data, ["body"]))


def test_mammoths_sequence() -> None:
    model = NSP(Net(6), Namespace(lr=1e-2))
    inputs, hidden = task(0).tensors[0], None
    for number in range(3):
        data = task(number)
        model.meta_begin_task(data)
        for _ in range(6):
            model.observe(*data.tensors)
        if hidden is None:
            hidden = (inputs @ model.net.body.weight.mT).detach()
        assert all(v <= 1e-3 for v in model.opt.violations().values())
        model.end_task(data)
    drift = (inputs @ model.net.body.weight.mT).detach() - hidden
    assert drift.norm() <= 2e-3 * hidden.norm()
    assert "store" not in dict(model.named_modules())


# -- PILOT -------------------------------------------------------------------------------------------------------------


class Learner:
    """models/l2p.py: an optimizer over what requires gradients, the scheduler made before the groups are edited, the
    group's parameters replaced by a generator, and on request a second optimizer that the scheduler never sees."""

    def __init__(self, net: nn.Module, reinit: bool) -> None:
        self._network, self.reinit, self.store, self.init_lr = net, reinit, SubspaceStore(), 1e-2

    def get_optimizer(self) -> Any:
        return ProjectedAdamW(self._network.named_parameters(), lr=self.init_lr, subspace=self.store)

    def incremental_train(self, data: TensorDataset, number: int) -> Any:
        optimizer = self.get_optimizer()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer=optimizer, T_max=6, eta_min=1e-8)
        if number > 0:
            with torch.no_grad():
                self._network.body.weight.grad.zero_()
                self._network.body.bias[:2] = self._network.body.bias[2:4]
                optimizer.param_groups[0]["params"] = self._network.parameters()
            if self.reinit:
                optimizer = self.get_optimizer()
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self._network(data.tensors[0]), data.tensors[1]).backward()
            optimizer.step()
            scheduler.step()
        return optimizer


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("reinit", [False, True])
def test_pilots_sequence(reinit: bool) -> None:
    learner = Learner(Net(6), reinit)
    inputs, hidden = task(0).tensors[0], None
    for number in range(3):
        optimizer = learner.incremental_train(task(number), number)
        assert all(v <= 1e-3 for v in optimizer.violations().values())
        assert len(optimizer.state) == 4
        if hidden is None:
            hidden = (inputs @ learner._network.body.weight.mT).detach()
        learner.store.merge(protect(learner._network, task(number), ["body"]))
    drift = (inputs @ learner._network.body.weight.mT).detach() - hidden
    assert drift.norm() <= 2e-3 * hidden.norm()


# -- Accelerate and Lightning ------------------------------------------------------------------------------------------


def test_accelerates_sequence() -> None:
    """accelerate/optimizer.py: `step` is wrapped on the instance to see whether the scaler called it, the optimizer's
    state is taken out and loaded back when it is prepared, and checkpoints load the optimizer before custom objects."""
    net = Net()
    store = SubspaceStore({"body.weight": Projector(basis(16, 4))})
    optimizer = ProjectedAdamW(net.named_parameters(), lr=1e-2, subspace=store, fused=True)
    optimizer.load_state_dict(optimizer.state_dict())
    inner, called = optimizer.step, []

    def patched(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return inner(*args, **kwargs)

    optimizer.step = patched  # type: ignore[method-assign]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(net(torch.randn(9, 16)).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert len(called) == 3
    assert optimizer.violations()["body.weight"] <= ROUNDING
    saved, kept = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(store.state_dict())
    late = SubspaceStore()
    again = ProjectedAdamW(Net().named_parameters(), lr=1e-2, subspace=late)
    again.load_state_dict(saved)  # the store is still empty: the fingerprints are compared before the next step
    for p in again.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(SubspaceMismatchError, match=r"another subspace.*body.weight"):
        again.step()
    late.load_state_dict(kept)
    again.step()
    assert {int(s["step"]) for s in again.state.values()} == {4}
    late["head.weight"] = Projector(basis(8, 2))
    again.step()  # compared once: the store may change from then on


def test_lightnings_sequence() -> None:
    """lightning/pytorch/core/optimizer.py: a wrapper takes over the optimizer's dictionary, and each step has a closure
    that runs the training step and clips."""
    net = Net()
    store = {"body.weight": Projector(basis(16, 4))}
    optimizer = ProjectedAdamW(net.named_parameters(), lr=1e-2, subspace=store)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8)

    class Wrapper:
        def __init__(self) -> None:
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("step", "__del__")}
            self._optimizer = optimizer

    wrapper = Wrapper()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net(torch.randn(9, 16)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        return loss

    for _ in range(8):
        assert wrapper._optimizer.step(closure=closure).requires_grad
        scheduler.step()
    assert optimizer.violations()["body.weight"] <= ROUNDING
    assert optimizer.param_groups[0]["betas"][0] != 0.9, "OneCycleLR cycles the first beta"
