"""Everything a run needs, opened and checked before the first step: data, stream, backbone, method, device."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels import data as image_data
from cl_kernels import methods
from cl_kernels.continual import stream, transforms
from cl_kernels.continual.config import RunConfig
from cl_kernels.continual.environment import pick_device, pick_precision
from cl_kernels.continual.feed import Feed, Pool, Segment
from cl_kernels.data.architectures import architecture_of
from cl_kernels.data.preprocess import translated
from cl_kernels.ops._registry import backend

__all__ = ["Session", "open_session"]

CACHE_BYTES = 1 << 29  # of preprocessed float images: one task's training images, and all test images together


@dataclass
class Session:
    """What `open_session` found."""

    config: RunConfig
    device: torch.device
    precision: torch.dtype
    epochs: int
    tasks: list[stream.Task]
    class_names: list[str]
    skipped: int
    method: methods.Method
    preprocess: image_data.Preprocessing
    train: Pool
    test: Pool
    fingerprint: str
    parameters: int
    seconds: dict[str, float]

    def training(self, index: int) -> Feed:
        """What task `index` trains on: its own images, or also those of all earlier tasks."""
        first = 0 if self.method.scope == "seen" else index
        parts = [(task.train, task.domain) for task in self.tasks[first : index + 1]]
        return self._feed(self.train, parts, CACHE_BYTES)

    def testing(self, index: int) -> Feed:
        """The test images of task `index`."""
        parts = [(self.tasks[index].test, self.tasks[index].domain)]
        return self._feed(self.test, parts, CACHE_BYTES // len(self.tasks))

    def _feed(self, pool: Pool, parts: list[tuple[Tensor, str]], cache: int) -> Feed:
        return Feed(pool, [Segment(rows, transforms.get(domain)) for rows, domain in parts], self.preprocess, cache)


def open_session(
    config: RunConfig,
    data: image_data.ImageData | None = None,
    backbone: image_data.Backbone | None = None,
) -> Session:
    """Open what `config` names; `data` and `backbone` replace what would be loaded.

    Names and options are checked before anything is read. Raises what the parts raise.
    """
    options = dict(config.options) if config.lr is None else {**config.options, "lr": config.lr}
    methods.check(config.method, **options)
    for domain in config.domains:
        transforms.get(domain)
    backend()  # a wrong CL_KERNELS_BACKEND would show at the first statistics, after the first task
    device = pick_device(config.device)
    seconds, start = {}, time.perf_counter()
    if backbone is None:
        backbone = image_data.load_backbone(config.backbone, config.weights, image_size=config.image_size)
    model, preprocess = backbone
    seconds["backbone"] = time.perf_counter() - start
    start = time.perf_counter()
    if data is None:
        data = image_data.load(config.data, strict=config.strict, image_size=preprocess.size)
    if config.classes is not None or config.images_per_class is not None:
        data = image_data.part_of(data, classes=config.class_range(), per_class=config.images_per_class)
    tasks = _tasks(config, data)
    train = Pool(data.train, torch.cat([task.train for task in tasks]).unique(), device)
    test = Pool(data.test, torch.cat([task.test for task in tasks]).unique(), device)
    seconds["data"] = time.perf_counter() - start
    digests = [_digest_data(data, tasks), _digest_model(model)]
    method = methods.create(config.method, model.to(device), **options)
    _teach(config, method, preprocess, digests, device)
    return Session(
        config=config,
        device=device,
        precision=pick_precision(config.precision, device),
        epochs=1 if config.quick else config.epochs,
        tasks=tasks,
        class_names=[str(name) for name in data.class_names],
        skipped=data.skipped,
        method=method,
        preprocess=preprocess,
        train=train,
        test=test,
        fingerprint=config.fingerprint(*digests),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=seconds,
    )


def _teach(
    config: RunConfig, method: methods.Method, preprocess: Any, digests: list[str], device: torch.device
) -> None:
    """Give `method` the teacher that `config` names, and add the digest of its weights."""
    if config.teacher is None:
        if method.needs_teacher:
            raise ValueError(f"teacher: {config.method} needs one: a backbone larger than {config.backbone!r}")
        return
    architecture_of(config.backbone, method.backbone)  # refuses now what could not be written at the end
    try:
        model, wanted = image_data.load_backbone(config.teacher, config.teacher_weights)
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from error
    digests.append(_digest_model(model))
    method.set_teacher(model.to(device), lambda images: translated(images, preprocess, wanted))


def _tasks(config: RunConfig, data: Any) -> list[stream.Task]:
    if config.stream == "domain":
        tasks = stream.domain_incremental(data, config.domains)
    else:
        seed = config.seed if config.class_seed is None else config.class_seed
        deal = stream.source_incremental if config.stream == "source" else stream.class_incremental
        tasks = deal(data, config.tasks or 1, seed, domains=config.domains)
    return [stream.quick(task, data) for task in tasks] if config.quick else tasks


def _digest_data(data: Any, tasks: list[stream.Task]) -> str:
    """Names, labels and rows: enough to tell two data sets apart without reading every pixel."""
    digest = hashlib.blake2b(repr((data.name, list(data.class_names))).encode(), digest_size=16)
    for labels in (data.train.labels, data.test.labels):
        digest.update(labels.to(torch.int64).contiguous().numpy().tobytes())
    for task in tasks:
        digest.update(repr((task.classes, task.domain, len(task.train), len(task.test))).encode())
    return digest.hexdigest()


def _digest_model(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
