"""Dropping in, with the real packages: Accelerate, Lightning, Avalanche.

They are the extra `integrations`, in an environment of their own (`make integrations`), and skipped where they are not
installed: test_integrations.py replays their call sequences there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cl_kernels import rules
from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.integrations.avalanche import SubspacePlugin
from cl_kernels.ops import Projector
from cl_kernels.optim import ProjectedAdamW, ProjectedSGD, project_updates
from cl_kernels.subspace import SubspaceStore

ROUNDING = 5e-5


def needs(package: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed (make integrations runs this)")


class Net(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 16), nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x)))
        return out


def digits(classes: range = range(10)) -> TensorDataset:
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = torch.from_numpy(data.target).long()
    kept = (labels >= classes.start) & (labels < classes.stop)
    return TensorDataset(torch.from_numpy(data.data).float()[kept] / 16, labels[kept])


def store_for_body(rank: int = 20) -> SubspaceStore:
    torch.manual_seed(3)
    return SubspaceStore({"body.weight": Projector(torch.linalg.qr(torch.randn(64, rank))[0])})


@needs("accelerate")
@pytest.mark.parametrize("kind", ["ours", "wrapped"])
def test_accelerate_trains_saves_and_resumes(tmp_path: Path, kind: str) -> None:
    from accelerate import Accelerator

    def make(store: SubspaceStore, seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        net = Net()
        if kind == "ours":
            optimizer: Any = ProjectedAdamW(net.named_parameters(), lr=1e-2, subspace=store)
        else:
            optimizer = torch.optim.AdamW(net.named_parameters(), lr=1e-2)
            project_updates(optimizer, store)
        loader = DataLoader(digits(), batch_size=64)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        prepared = accelerator.prepare(net, optimizer, loader, scheduler)
        accelerator.register_for_checkpointing(store)
        return (accelerator, *prepared)

    def run(accelerator: Any, net: Any, optimizer: Any, loader: Any, scheduler: Any, batches: int) -> None:
        for number, (x, y) in enumerate(loader):
            if number == batches:
                return
            with accelerator.accumulate(net):
                accelerator.backward(nn.functional.cross_entropy(net(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    first = make(store_for_body(), 0)
    start = first[1].body.weight.detach().clone()
    run(*first, batches=8)
    moved = first[1].body.weight.detach() - start
    assert moved.norm() > 1e-3
    assert (moved @ store_for_body()["body.weight"].basis).norm() <= ROUNDING * moved.norm()
    first[0].save_state(str(tmp_path))
    run(*first, batches=8)
    if kind == "wrapped":
        return
    late = SubspaceStore()  # Accelerate loads custom objects last
    second = make(late, 9)
    second[0].load_state(str(tmp_path))
    assert late.fingerprint("body.weight") == store_for_body().fingerprint("body.weight")
    run(*second, batches=8)
    for p, q in zip(first[1].parameters(), second[1].parameters(), strict=True):
        assert torch.equal(p, q)


@needs("lightning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_saves_and_resumes(tmp_path: Path, precision: str) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, store: SubspaceStore) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net, self.store = Net(), store

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = ProjectedAdamW(self.net.named_parameters(), lr=1e-2, subspace=self.store)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["subspace"] = self.store.state_dict()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.store.load_state_dict(checkpoint["subspace"])

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, precision=precision,
            enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, accumulate_grad_batches=2,
        )  # fmt: skip

    data = DataLoader(digits(), batch_size=128)
    straight = Module(store_for_body())
    whole = trainer(4)
    start = straight.net.body.weight.detach().clone()
    whole.fit(straight, data)
    moved = straight.net.body.weight.detach() - start
    assert moved.norm() > 1e-2
    assert (moved @ store_for_body()["body.weight"].basis).norm() <= ROUNDING * moved.norm()
    assert whole.optimizers[0].violations()["body.weight"] <= ROUNDING
    half = trainer(2)
    half.fit(Module(store_for_body()), data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = Module(SubspaceStore())
    trainer(4).fit(again, data, ckpt_path=tmp_path / "half.ckpt")
    for p, q in zip(straight.net.parameters(), again.net.parameters(), strict=True):
        assert torch.equal(p, q)


@needs("avalanche")
@pytest.mark.parametrize("kind", ["adamw", "sgd", "torch"])
def test_avalanche_strategy_with_a_growing_head(kind: str) -> None:
    from avalanche.benchmarks.scenarios.supervised import class_incremental_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.models import IncrementalClassifier
    from avalanche.training.supervised import Naive

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classifier = nn.Linear(64, 16), IncrementalClassifier(16, initial_out_features=2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.classifier(torch.tanh(self.body(x)))
            return out

    data = digits()
    data.targets = data.tensors[1].tolist()  # type: ignore[attr-defined]
    both = as_classification_dataset(data)
    benchmark = class_incremental_benchmark(
        {"train": both, "test": both}, class_order=list(range(10)), num_experiences=5
    )

    def run(plugins: list[Any]) -> tuple[float, Any, Any]:
        torch.manual_seed(0)
        net = Growing()
        optimizer: Any = {
            "adamw": lambda: ProjectedAdamW(net.named_parameters(), lr=5e-3),
            "sgd": lambda: ProjectedSGD(net.named_parameters(), lr=0.1, momentum=0.9),
            "torch": lambda: torch.optim.AdamW(net.parameters(), lr=5e-3),
        }[kind]()
        strategy = Naive(
            model=net, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), plugins=plugins, train_mb_size=64,
            train_epochs=3, evaluator=None,
        )  # fmt: skip
        first = digits(range(2)).tensors[0]
        for experience in benchmark.train_stream:
            strategy.train(experience)
            if experience.current_experience == 0:
                hidden = (first @ net.body.weight.mT).detach()
        drift = float((first @ net.body.weight.detach().mT - hidden).norm() / hidden.norm())
        return drift, optimizer, net

    plugin = SubspacePlugin(rules.Energy(0.999), targets=["body"])
    drift, optimizer, net = run([plugin])
    free, *_ = run([])
    assert free > 0.1
    assert drift < 0.1 * free
    assert net.classifier.classifier.out_features == 10
    assert len(plugin.store) == 1
    if kind != "torch":
        assert optimizer.violations()["body.weight"] <= ROUNDING
        assert optimizer.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]


@needs("avalanche")
def test_without_bind_avalanches_rewrite_is_refused() -> None:
    from avalanche.models.dynamic_optimizers import update_optimizer

    net = Net(2)
    optimizer = ProjectedAdamW(net.named_parameters(), lr=1e-2, subspace=store_for_body())
    known = update_optimizer(optimizer, dict(net.named_parameters()), None, reset_state=True)
    net.head = nn.Linear(16, 4)
    update_optimizer(optimizer, dict(net.named_parameters()), known)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = net.body.weight.detach().clone()
    with pytest.raises(SubspaceMismatchError, match="bind"):
        optimizer.step()
    assert torch.equal(net.body.weight, before)
    optimizer.bind(net)
    optimizer.step()
    assert not torch.equal(net.body.weight, before)
