"""What one continual run is asked to do: :class:`RunConfig`, checked before anything is read or allocated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STREAMS = ("class", "domain", "source")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
AUGMENTATIONS = ("none", "flip", "crop")

_NOT_OF_THE_RUN = frozenset(
    {"out", "resume", "overwrite", "checkpoint_minutes", "checkpoint_steps", "tensorboard", "device", "threads"}
)
"""Fields that decide where and how often, never what: a checkpoint is not refused because of them."""

_ADDED = {"teacher": None, "teacher_weights": None, "eval_shift": False}
"""Fields younger than the first checkpoints, with what those ran with: at that value they leave a fingerprint as it
was."""

_OF_DATA = ("classes", "images_per_class")
"""Younger still: not said at all where they are None, so that finished runs keep being those of their settings."""


@dataclass(frozen=True)
class RunConfig:
    """One method on one stream with one seed.

    Every number is range-checked here, before data are read or memory is allocated (``ValueError`` naming the field,
    the value and the allowed range; ``TypeError`` for a wrong type). Names of methods, data, transforms and backbones
    are checked by the parts that know them, with the nearest names offered.

    Fields
        method: a name in ``cl_kernels.methods.names()``.
        data: an embedded name, an ``.npz`` shard or an image folder; several joined by ``+`` are one set.
        classes: "A:B" takes the classes A to B - 1 of the data alone: tune on others than those that are reported.
        images_per_class: at most so many training images of a class, the first ones.
        tasks: of a class-incremental stream; for ``stream="domain"`` None or ``len(domains)``.
        backbone, weights: name or file of the pre-trained model, and the file of its weights.
        image_size: builds a timm model for another input size; None takes the model's own.
        teacher, teacher_weights: the second backbone and its weights, named like the first, for a method that distils
            (``backbone`` is the student); every task is then learned twice, by the teacher first.
        epochs, batch_size: per task.
        lr: None takes the method's own default.
        seed: class order, initialisation and data order.
        class_seed: the class order alone (None: ``seed``): tune on other orders than those reported.
        device: ``auto`` is CUDA where there is a working one.
        out: directory for results.json, metrics.jsonl and checkpoints/; None writes nothing.
        resume: continue from ``out/checkpoints``, from the beginning when there is none.
        overwrite: without ``resume``, allow ``out`` to hold an earlier run, which is then replaced.
        stream: ``class`` (new classes per task), ``source`` (the same, of one joined data set, or one group of class
            names such as "Greek/character01", after another) or ``domain`` (the same classes in new domains, one
            shared head).
        domains: of ``continual.transforms.names()``, or a corruption and its severity ("fog@3"), one per task of a
            domain stream; in another stream they are applied to the tasks in turn (one
            name: to every task), none by default.
        options: further keyword arguments of ``methods.create(method, backbone, **options)``.
        strict: stop at the first broken image instead of counting it, and at a CUDA algorithm that has no deterministic
            form instead of warning.
        quick: 1 epoch, and at most 40 training and 20 test images of a class.
        checkpoint_minutes, checkpoint_steps: save this often inside a task; one is always saved at a task's end.
        precision: ``auto`` is bf16 autocast on CUDA devices that have it, float32 everywhere else; ``float16`` uses a
            GradScaler. On the CPU training is always float32.
        augment: ``none``, ``flip`` (horizontal) or ``crop`` (pad by 1/8, crop at random); training batches only.
        eval_batch_size, statistics_batch: batches of the evaluation, and of the pass handed to ``end_task`` (NSP2's
            official per-batch weighting depends on the latter: 100 there).
        eval_shift: after the last task evaluate on corrupted versions of all test images too: fifteen families at five
            severities (``cl_kernels.data.corruptions``), so 75 evaluations more. Needs Pillow.
        threads: torch CPU threads during the run; None leaves torch's setting.
        tensorboard: also write event files to ``out/tensorboard`` when tensorboard is importable.

    results.json (also the return value of :func:`cl_kernels.continual.run`); T is the number of tasks, accuracies are
    in [0, 1], entries above the diagonal, where the task has not been seen, are null::

        version                 1
        method, data, backbone, stream, seed, config{...}, fingerprint
        tasks[T]                {"name", "classes": [global class index], "class_names", "domain", "train", "test"}
        teacher                 null, or {"backbone", "accuracy_matrix", "average_accuracy", "forgetting",
                                "parameters", "bytes", "trainable"[T]}: the teacher after each task, and its size
        student                 null, or {"parameters", "bytes"}: the size of the model that student.safetensors holds
        protocol                how a test image finds its model; numbers of different protocols may not be compared
        accuracy_matrix[T][T]   R[i][j]: accuracy on task j after task i, argmax over every class seen
        average_accuracy        mean of the last row
        forgetting              mean over old tasks of (best before the last task) - last: the paper's, may be negative
        forgetting_variants     {"maximum", "diagonal", "diagonal_over_all"}, see ``continual.metrics``
        accuracy_after[T]       mean over the tasks seen, after each task; forgetting_after[T] likewise
        average_incremental_accuracy    mean of accuracy_after
        repository              {"average_accuracy", "forgetting"}: sample-weighted; maximum including the last row
        task_incremental        {"accuracy_matrix", "average_accuracy", "forgetting"} with the task's own classes as
                                the only candidates; null for a domain stream
        feature_drift           {"relative"[T][T], "cosine"[T][T], "final_relative", "final_cosine"}: |f_i - f_j| by
                                |f_j| and 1 - cos(f_i, f_j), task j's test images after task i against the end of
                                task j; final: mean over old tasks after the last (null for one task)
        shift                   null without eval_shift, else of the last model, means over the tasks' test images:
                                {"clean": average_accuracy, "mean": over all corruptions, "relative": mean by clean,
                                "severities"[5], "groups": {noise, blur, weather, digital},
                                "families": {name: accuracies at severity 1 to 5}}
        subspace[T]             after each task {parameter: {"left"|"right": {"dim", "protected", "gain", "energy",
                                "added", "tasks_left"}}}, {} where nothing is kept; energy: share of the statistic's
                                trace that is protected; added: directions more than after the task before; tasks_left:
                                how many tasks that add as many still fit, null where the last one added none
        prompt_usage[T]         after each task {block: [share of the task's images that choose each entry of the pool]}
                                (coda-prompt: the mean absolute weight), {} for methods without a pool
        anchoring[T]            after each task {parameter: {"distance", "relative", ...}}, {} for methods without
                                anchors; distance: L2 norm of weight - anchor, relative: by that of the anchor;
                                radius: what rows (or the tensor) are held within; projected: share of rows held in
                                the last step; fire_rate: share of the task's steps in which the rule acted
        loss[T][epochs]         mean training loss; a method with phases has as many epochs in each
        parameters              {"trainable"[T], "total"}
        skipped_images          broken files left out
        seconds                 {"data", "backbone", "train"[T], "end_task"[T], "evaluate"[T], "checkpoint", "total"},
                                with eval_shift also "shift",
                                with a teacher also "phases"[T][2], "latency": {"teacher", "student": {"one", "batch"}}
        environment             {"cl_kernels", "torch", "python", "platform", "device", "threads", "precision"}

    Two runs of one config on one machine give the same file but for ``seconds``, killed and resumed or not.
    """

    method: str
    data: str = "digits"
    tasks: int | None = 5
    backbone: str = "embedded"
    weights: str | None = None
    image_size: int | None = None
    teacher: str | None = None
    teacher_weights: str | None = None
    epochs: int = 10
    batch_size: int = 64
    lr: float | None = None
    seed: int = 0
    class_seed: int | None = None
    device: str = "auto"
    out: str | Path | None = None
    resume: bool = False
    overwrite: bool = False
    stream: str = "class"
    domains: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    quick: bool = False
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int | None = None
    precision: str = "auto"
    augment: str = "none"
    eval_batch_size: int = 250
    statistics_batch: int = 100
    eval_shift: bool = False
    threads: int | None = None
    tensorboard: bool = False
    classes: str | None = None
    images_per_class: int | None = None

    def __post_init__(self) -> None:
        for name in ("method", "data", "backbone", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise TypeError(f"{name} must be a non-empty string, got {value!r}")
        if self.teacher is not None and (not isinstance(self.teacher, str) or not self.teacher):
            raise TypeError(f"teacher must be a non-empty string or None, got {self.teacher!r}")
        if self.teacher is None and self.teacher_weights is not None:
            raise ValueError("teacher_weights needs a teacher, got none")
        for name in ("weights", "teacher_weights", "out"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (str, Path)) or not str(value)):
                raise TypeError(f"{name} must be a path or None, got {value!r}")
        for name in ("resume", "overwrite", "strict", "quick", "eval_shift", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        _one_of("stream", self.stream, STREAMS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("augment", self.augment, AUGMENTATIONS)
        _integer("epochs", self.epochs, 1, 100_000)
        _integer("batch_size", self.batch_size, 1, 65_536)
        _integer("eval_batch_size", self.eval_batch_size, 1, 65_536)
        _integer("statistics_batch", self.statistics_batch, 1, 65_536)
        _integer("seed", self.seed, 0, 2**32 - 1)
        for name, low, high in (
            ("tasks", 1, 10_000),
            ("class_seed", 0, 2**32 - 1),
            ("checkpoint_steps", 1, 10**9),
            ("threads", 1, 1024),
            ("images_per_class", 1, 10**9),
            ("image_size", 1, 4096),
        ):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), low, high)
        if self.lr is not None:
            _real("lr", self.lr, 0.0, 1e3)
        _real("checkpoint_minutes", self.checkpoint_minutes, 0.0, 1e6)
        if not isinstance(self.options, dict) or not all(isinstance(key, str) for key in self.options):
            raise TypeError(f"options must be a dict with string keys, got {self.options!r}")
        if not isinstance(self.domains, (tuple, list)) or not all(isinstance(name, str) for name in self.domains):
            raise TypeError(f"domains must be a sequence of names, got {self.domains!r}")
        object.__setattr__(self, "domains", tuple(self.domains))
        self.class_range()
        self._check_stream()

    def class_range(self) -> tuple[int, int] | None:
        """`classes` as numbers."""
        if self.classes is None:
            return None
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.classes) if isinstance(self.classes, str) else None
        if found is None or int(found[1]) >= int(found[2]):
            raise ValueError(f"classes must be a range such as '0:20', got {self.classes!r}")
        return int(found[1]), int(found[2])

    def _check_stream(self) -> None:
        if self.stream != "domain":
            if self.tasks is None:
                raise ValueError(f"tasks must be given for stream={self.stream!r}")
            return
        if not self.domains:
            raise ValueError("domains must name at least one transform for stream='domain', got none")
        if self.tasks is not None and self.tasks != len(self.domains):
            count = len(self.domains)
            raise ValueError(
                f"tasks must be None or the number of domains ({count}) for stream='domain', got {self.tasks}"
            )

    def as_json(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON values (paths as given; nothing about where the run writes)."""
        values = dataclasses.asdict(self)
        kept: dict[str, Any] = {name: value for name, value in values.items() if name not in _NOT_OF_THE_RUN}
        kept = {name: value for name, value in kept.items() if name not in _OF_DATA or value is not None}
        result: dict[str, Any] = json.loads(json.dumps(kept, default=str))
        return result

    def fingerprint(self, *parts: str) -> str:
        """blake2b over the fields that decide the result and ``parts`` (digests of the data and of the backbones)."""
        said = {name: value for name, value in self.as_json().items() if name not in _ADDED or value != _ADDED[name]}
        text = json.dumps([said, *parts], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


def _real(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be finite and between {low:g} and {high:g}, got {value}")
