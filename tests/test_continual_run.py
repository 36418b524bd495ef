"""Whole runs: what they report, what they write, and what they do when something goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from continual_tiny import one_thread, tiny_backbone, tiny_config, tiny_data
from safetensors import safe_open

from cl_kernels import continual, data, methods
from cl_kernels.continual import checkpoint, evaluate, feed, log, session
from cl_kernels.errors import CheckpointError, NonFiniteError
from cl_kernels.methods import HeadMethod

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


TAUGHT = {"kdp": {"teacher": "embedded-small"}}


def run(method: str = "sequential", **changes: Any) -> dict[str, Any]:
    return continual.run(tiny_config(method, **changes), data=tiny_data(), backbone=tiny_backbone())


def comparable(results: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in results.items() if key != "seconds"}, sort_keys=True)


class TestResults:
    @pytest.mark.parametrize("name", methods.names())
    def test_layout(self, name: str, tmp_path: Path) -> None:
        found = run(name, out=tmp_path, **TAUGHT.get(name, {}))
        assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
        assert (found["version"], found["method"], found["seed"], found["stream"]) == (1, name, 0, "class")
        matrix = found["accuracy_matrix"]
        for i, row in enumerate(matrix):
            assert len(row) == 3
            assert all(value is None for value in row[i + 1 :])
            assert all(0 <= value <= 1 for value in row[: i + 1])
            inside = found["task_incremental"]["accuracy_matrix"][i]
            assert all(one <= other for one, other in zip(row[: i + 1], inside, strict=False))
        assert found["average_accuracy"] == pytest.approx(sum(matrix[-1]) / 3)
        assert matrix[0][0] == found["task_incremental"]["accuracy_matrix"][0][0]
        assert found["average_accuracy"] > 1.5 / 6, "better than guessing"
        drift = found["feature_drift"]
        assert [drift["relative"][i][i] for i in range(3)] == [0, 0, 0]
        assert (drift["final_relative"] == 0) == (name in ("class-mean", "linear"))
        assert 0 <= drift["final_cosine"] <= 2
        protects = name in ("nsp2", "nsp2-exact", "null-space", "adam-nscl", "gpm", "inf-lora", "matched-lr")
        assert [bool(part) for part in found["subspace"]] == [protects] * 3
        assert [len(part) for part in found["loss"]] == [{"class-mean": 0, "kdp": 6}.get(name, 3)] * 3
        assert [found[part] is not None for part in ("teacher", "student")] == [name in TAUGHT] * 2
        phase = found["loss"][0][:3]
        assert not phase or phase[-1] < phase[0], "the first task trains unprojected"
        assert (found["parameters"]["trainable"][0] > 0) is True
        assert found["seconds"]["total"] > 0
        assert found["tasks"][0]["train"] == 20
        assert sorted(label for task in found["tasks"] for label in task["classes"]) == list(range(6))

    def test_the_same_twice_and_another_with_another_seed(self) -> None:
        first = run("nsp2")
        assert comparable(run("nsp2")) == comparable(first)
        other = run("nsp2", seed=1)
        assert other["loss"] != first["loss"]
        assert other["tasks"] != first["tasks"]
        assert run("nsp2", seed=1, class_seed=0)["tasks"] == first["tasks"]

    def test_the_callers_random_numbers_do_not_matter_and_are_not_touched(self) -> None:
        config, backbone = tiny_config("sequential"), tiny_backbone()
        torch.manual_seed(123)
        np.random.seed(5)
        before, state = torch.get_rng_state(), np.random.get_state()[1]
        first = continual.run(config, data=tiny_data(), backbone=backbone)
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], state)
        torch.manual_seed(321)
        assert comparable(run()) == comparable(first)

    def test_domain_stream_shares_one_head(self) -> None:
        config = tiny_config("null-space", tasks=None, stream="domain", domains=("identity", "invert", "rotate90"))
        found = continual.run(config, data=tiny_data(), backbone=tiny_backbone())
        assert [task["domain"] for task in found["tasks"]] == ["identity", "invert", "rotate90"]
        assert found["task_incremental"] is None
        weights = found["parameters"]["trainable"]
        assert len(set(weights)) == 1
        assert found["average_accuracy"] > 0.3

    @pytest.mark.parametrize("name", ["linear", "joint"])
    def test_domains_and_augmentation(self, name: str) -> None:
        for augment in ("flip", "crop"):
            found = run(name, domains=("invert", "identity"), augment=augment)
            assert [task["domain"] for task in found["tasks"]] == ["invert", "identity", "invert"]
            assert found["loss"] != run(name, domains=("invert", "identity"))["loss"]

    def test_quick_cuts_epochs_and_images(self) -> None:
        found = continual.run(
            tiny_config("sequential", quick=True), data=tiny_data(train=60, test=30), backbone=tiny_backbone()
        )
        assert [len(part) for part in found["loss"]] == [1, 1, 1]
        assert [(task["train"], task["test"]) for task in found["tasks"]] == [(80, 40)] * 3

    def test_frozen_features_are_computed_once_and_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cached = run("linear")
        monkeypatch.setattr(feed.Feed, "mapped", lambda self, features, size: self)
        assert comparable(run("linear"))[:40] == comparable(cached)[:40]
        for key in ("accuracy_matrix", "task_incremental"):
            assert run("linear")[key] == cached[key]

    def test_a_pool_that_reads_image_by_image_gives_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = run("joint", domains=("invert", "identity"))
        monkeypatch.setattr(feed.Pool, "_fits", staticmethod(lambda source, rows: False))
        assert comparable(run("joint", domains=("invert", "identity"))) == comparable(expected)
        monkeypatch.setattr(session, "CACHE_BYTES", 0)
        assert comparable(run("joint", domains=("invert", "identity"))) == comparable(expected)

    def test_the_embedded_data_and_backbone(self) -> None:
        found = continual.run(continual.RunConfig("class-mean", quick=True, threads=1, device="cpu"))
        assert found["average_accuracy"] > 0.4


class TestFeed:
    @pytest.mark.parametrize("cache", [0, 1 << 20])
    def test_several_tasks_keep_their_own_domains(self, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(session, "CACHE_BYTES", cache)
        config = tiny_config("joint", domains=("invert", "identity"))
        opened = session.open_session(config, tiny_data(), tiny_backbone())
        both, images = opened.training(1), tiny_data().train.tensors()
        rows = torch.cat([opened.tasks[0].train, opened.tasks[1].train])
        expected = torch.cat([255 - images[opened.tasks[0].train], images[opened.tasks[1].train]])
        order = torch.randperm(len(rows))
        values, labels = both.batch(order)
        torch.testing.assert_close(values, opened.preprocess(expected)[order])
        assert torch.equal(labels, tiny_data().train.labels[rows][order])

    @pytest.mark.parametrize("kind", ["flip", "crop"])
    def test_augmentation_moves_pixels_and_depends_on_its_place_alone(self, kind: str) -> None:
        images = torch.rand(6, 3, 16, 16)
        made = feed.augment(images, kind, 0, 1, 2, 3)
        assert torch.equal(made, feed.augment(images, kind, 0, 1, 2, 3))
        assert not torch.equal(made, feed.augment(images, kind, 0, 1, 2, 4))
        for one, source in zip(made, images, strict=True):
            assert torch.isin(one, source).all()
        if kind == "flip":
            assert all(torch.equal(one, s) or torch.equal(one, s.flip(-1)) for one, s in zip(made, images, strict=True))


class TestEvaluate:
    class Fixed:
        """Logits that are read off the picture; every feature is the logit."""

        classes = (4, 2, 0, 1)

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

        def logits(self, features: torch.Tensor) -> torch.Tensor:
            return features

    class Pictures:
        labels = torch.tensor([0, 1, 1, 0])
        rows = torch.tensor([[9.0, 0, 5, 1], [0, 9, 1, 5], [0, 0, 1, 9], [0, 0, 1, 5]])

        def __len__(self) -> int:
            return 4

        def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield from zip(self.rows.split(size), self.labels.split(size), strict=True)

    @pytest.mark.parametrize("size", [1, 3, 4])
    def test_columns_outside_the_task_count_in_one_accuracy_only(self, size: int) -> None:
        method: Any = self.Fixed()
        pictures: Any = self.Pictures()
        score = evaluate.evaluate(method, pictures, (0, 1), size)
        assert score.accuracy == 0.25  # labels 4 and 2 win twice, label 1 wins for the last picture of label 0
        assert score.task_accuracy == 0.75
        assert torch.equal(score.features, pictures.rows)

    def test_features_are_kept_evenly_and_the_same_whatever_the_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evaluate, "DRIFT_IMAGES", 2)
        method: Any = self.Fixed()
        pictures: Any = self.Pictures()
        for size in (1, 3, 4):
            score = evaluate.evaluate(method, pictures, (0, 1), size)
            assert torch.equal(score.features, pictures.rows[::2])

    def test_drift_of_a_rotation_and_of_a_stretch(self) -> None:
        before = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        assert evaluate.feature_drift(before, before) == (0, 0)
        assert evaluate.feature_drift(3 * before, before) == (pytest.approx(2), pytest.approx(0, abs=1e-15))
        turned = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
        assert evaluate.feature_drift(turned, before) == (pytest.approx(2**0.5), pytest.approx(1))


class TestFiles:
    def test_metrics_have_a_line_an_epoch_and_a_task(self, tmp_path: Path) -> None:
        found = run(out=tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["event"] for line in lines] == (["epoch"] * 3 + ["task"]) * 3
        assert [line["loss"] for line in lines if line["event"] == "epoch"] == [
            x for part in found["loss"] for x in part
        ]
        assert lines[-1]["accuracy"] == found["accuracy_matrix"][-1]

    def test_the_learning_rate_follows_the_schedule(self, tmp_path: Path) -> None:
        run(out=tmp_path, epochs=10, lr=0.5, options={"schedule": "steps-official"})
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        rates = [line["lr"] for line in lines if line["event"] == "epoch"]
        assert rates == pytest.approx([0.5 * rate for rate in methods.multipliers("steps-official", 10)] * 3, rel=1e-12)

    def test_a_directory_that_holds_a_run_is_not_written_over(self, tmp_path: Path) -> None:
        first = run(out=tmp_path)
        with pytest.raises(FileExistsError, match=r"out: .*resume"):
            run(out=tmp_path)
        assert comparable(json.loads((tmp_path / "results.json").read_text())) == comparable(first)
        models = [tmp_path / name for name in ("student.safetensors", "report.html", "notes.txt")]
        for path in models:
            path.write_bytes(b"of the run before")
        assert comparable(run(out=tmp_path, overwrite=True, seed=1)) != comparable(first)
        assert [path.exists() for path in models] == [False, False, True], "what that run wrote, and nothing else"
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 12

    def test_a_directory_that_a_run_is_writing_to_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("fcntl", reason="directories are locked through flock")
        original, refused = HeadMethod.end_task, []

        def end_task(self: HeadMethod, *given: Any) -> None:
            for changes in ({"resume": True}, {"overwrite": True}, {}):
                with pytest.raises(FileExistsError) as caught:
                    continual.run(tiny_config("linear", out=tmp_path, **changes), data=tiny_data())
                refused.append(str(caught.value))
            original(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(HeadMethod, "end_task", end_task)
            found = run("class-mean", out=tmp_path)
        assert ["another process is writing" in text for text in refused[:3]] == [True] * 3
        assert comparable(found) == comparable(run("class-mean")), "what was refused has touched nothing"
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "metrics.jsonl", "results.json"}
        assert comparable(run("class-mean", out=tmp_path, overwrite=True)) == comparable(found), "let go at the end"

    def test_tensorboard(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        run(out=tmp_path, tensorboard=True)
        assert list((tmp_path / "tensorboard").glob("events*"))

    def test_no_output_without_out_and_nothing_printed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run()
        assert os.listdir(tmp_path) == []
        assert capfd.readouterr() == ("", "")

    def test_a_bar_on_a_terminal_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("rich", reason="rich is not installed")

        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        for terminal in (Terminal(), io.StringIO()):
            monkeypatch.setattr(sys, "stderr", terminal)
            run("linear")
            assert ("linear" in terminal.getvalue()) == terminal.isatty()

    def test_the_subspace_is_left_for_inspection(self, tmp_path: Path) -> None:
        run("null-space", out=tmp_path)
        with safe_open(tmp_path / "subspace.safetensors", "pt") as file:
            assert any(key.startswith("blocks.0.attn.qkv.weight/right") for key in file.keys())  # noqa: SIM118 - not a dict


class TestResume:
    def interrupted(self, out: Path, monkeypatch: pytest.MonkeyPatch, step: int, **changes: Any) -> None:
        """Run until the given training step, then fail as if the machine went away."""
        original, count = HeadMethod.loss, iter(range(10**9))

        def loss(self: HeadMethod, batch: Any) -> torch.Tensor:
            if next(count) == step:
                raise KeyboardInterrupt
            return original(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(HeadMethod, "loss", loss)
            with pytest.raises(KeyboardInterrupt):
                run(out=out, **changes)

    @pytest.mark.parametrize("name", ["nsp2", "nsp2-exact", "null-space", "matched-lr", "joint", "linear"])
    @pytest.mark.parametrize("step", [6, 11, 26])
    def test_ends_in_the_same_results(
        self, name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Random heads draw from torch's generator in every task; at step 6 a line of metrics.jsonl is newer than the
        # checkpoint.
        options = {
            "options": {"schedule": "cosine", "head_init": "default"},
            "checkpoint_steps": 2,
            "augment": "crop",
        }
        expected = run(name, **options)
        self.interrupted(tmp_path, monkeypatch, step, method=name, **options)
        assert comparable(run(name, out=tmp_path, resume=True, **options)) == comparable(expected)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["event"] for line in lines] == (["epoch"] * 3 + ["task"]) * 3
        assert comparable(run(name, out=tmp_path, resume=True, **options)) == comparable(expected), "again, when done"

    def test_without_a_checkpoint_it_starts(self, tmp_path: Path) -> None:
        assert comparable(run(out=tmp_path, resume=True)) == comparable(run())

    def test_another_runs_checkpoint_is_refused_and_kept(self, tmp_path: Path) -> None:
        run(out=tmp_path)
        last = tmp_path / "checkpoints" / "last.safetensors"
        content = last.read_bytes()
        for changes in ({"seed": 1}, {"method": "nsp2"}, {"lr": 0.5}, {"tasks": 2}, {"options": {"prompts": 3}}):
            with pytest.raises(CheckpointError, match="another run"):
                run(out=tmp_path, resume=True, **changes)
        with pytest.raises(CheckpointError, match="another run"):
            continual.run(
                tiny_config("sequential", out=tmp_path, resume=True),
                data=tiny_data(),
                backbone=tiny_backbone(dim=32, depth=1),
            )
        with pytest.raises(CheckpointError, match="another run"):
            continual.run(
                tiny_config("sequential", out=tmp_path, resume=True), data=tiny_data(7), backbone=tiny_backbone()
            )
        assert last.read_bytes() == content

    @pytest.mark.parametrize("damage", ["truncate", "empty", "other version"])
    def test_a_damaged_checkpoint_is_refused_and_kept(self, damage: str, tmp_path: Path) -> None:
        run(out=tmp_path)
        last = tmp_path / "checkpoints" / "last.safetensors"
        content = last.read_bytes()
        new = {
            "truncate": content[:-100],
            "empty": b"",
            "other version": content.replace(b'"version":"1"', b'"version":"2"'),
        }
        last.write_bytes(new[damage])
        with pytest.raises(CheckpointError, match=str(last)):
            run(out=tmp_path, resume=True)
        assert last.read_bytes() == new[damage]

    def test_a_checkpoint_that_lacks_a_part_is_refused(self, tmp_path: Path) -> None:
        run(out=tmp_path)
        last = tmp_path / "checkpoints" / "last.safetensors"
        with safe_open(last, "pt") as file:
            fingerprint = file.metadata()["fingerprint"]
        tree = checkpoint.load(last, fingerprint=fingerprint, device=torch.device("cpu"))
        del tree["method"]["parameters"]["prompts.0"]
        checkpoint.save_atomically(last, tree, fingerprint=fingerprint)
        with pytest.raises(CheckpointError, match=r"does not fit this run.*prompts\.0"):
            run(out=tmp_path, resume=True)

    def test_sigterm_finishes_the_step_saves_and_exits_0(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original, count = HeadMethod.loss, iter(range(10**9))
        before = signal.getsignal(signal.SIGTERM)

        def loss(self: HeadMethod, batch: Any) -> torch.Tensor:
            if next(count) == 13:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(HeadMethod, "loss", loss)
            with pytest.raises(continual.RunStopped, match="task 2, epoch 2, step 3") as stopped:
                run(out=tmp_path)
        assert stopped.value.code == 0
        assert isinstance(stopped.value, SystemExit)
        assert signal.getsignal(signal.SIGTERM) is before
        assert not (tmp_path / "results.json").exists()
        assert comparable(run(out=tmp_path, resume=True)) == comparable(run())


class TestFaults:
    def test_nan_loss_names_task_step_and_last_good_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, count = HeadMethod.loss, iter(range(10**9))

        def loss(self: HeadMethod, batch: Any) -> torch.Tensor:
            value = original(self, batch)
            return value * float("nan") if next(count) == 14 else value

        with monkeypatch.context() as patch:
            patch.setattr(HeadMethod, "loss", loss)
            with pytest.raises(NonFiniteError) as caught:
                run(out=tmp_path, checkpoint_steps=2)
        message = str(caught.value)
        assert "loss is nan at task 2, epoch 2, step 3 of 3 tasks" in message
        assert str(tmp_path / "checkpoints" / "last.safetensors") in message
        assert "(next: task 2, epoch 2, step 2)" in message
        assert comparable(run(out=tmp_path, checkpoint_steps=2, resume=True)) == comparable(run())

    def test_a_parameter_that_is_not_finite_is_never_saved(self, tmp_path: Path) -> None:
        backbone = tiny_backbone()
        with pytest.raises(NonFiniteError, match=r"parameter .* is not finite|loss is"):
            continual.run(
                tiny_config("full", lr=1e3, options={"weight_decay": 1e3, "head": "linear"}, out=tmp_path, epochs=20),
                data=tiny_data(),
                backbone=backbone,
            )

    def test_statistics_that_are_not_finite_name_task_and_last_good_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = HeadMethod.end_task

        def end_task(self: Any, task: Any, loader: Any) -> None:
            if task.index == 1:
                self.backbone.blocks[0].norm1.weight.fill_(torch.nan)
            original(self, task, loader)

        monkeypatch.setattr(HeadMethod, "end_task", end_task)
        words = r"weight: .* NaN.*; at the end of task 2 of 3 tasks \(null-space\); last good.*next: task 2, epoch 1"
        with pytest.raises(NonFiniteError, match=words):
            run("null-space", out=tmp_path)

    def test_a_full_disk_while_saving_keeps_the_old_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, saves = os.fsync, iter(range(10**9))

        def full(descriptor: int) -> None:
            if next(saves) >= 2 * 2 + 2 * 3:  # two probes and three checkpoints pass: a file and its directory each
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="checkpoint not saved") as caught:
                run(out=tmp_path, checkpoint_steps=2)
        assert caught.value.errno == errno.ENOSPC
        assert "last good checkpoint" in str(caught.value)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.safetensors"]
        assert comparable(run(out=tmp_path, checkpoint_steps=2, resume=True)) == comparable(run())

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        place = tmp_path / "disk"
        place.mkdir()
        if os.system(f"mount -t tmpfs -o size=160k tmpfs {place} 2>/dev/null") != 0:
            pytest.skip("this user may not mount a file system of its own")
        yield place
        os.system(f"umount {place}")

    def test_a_log_that_cannot_be_written_is_named(self) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("there is no /dev/full")
        with pytest.raises(OSError, match=r"No space.*/dev/full"):
            log.Log(Path("/dev/full"), None).event("epoch", 1, loss=0.5)

    def test_a_really_full_disk(self, small_disk: Path) -> None:
        (small_disk / "filler").write_bytes(bytes(110_000))
        with pytest.raises(OSError, match="out: cannot write") as caught:
            run(out=small_disk / "run")
        assert caught.value.errno == errno.ENOSPC
        (small_disk / "filler").unlink()
        with pytest.raises(OSError, match=r"checkpoint not saved|No space left"):
            run("null-space", out=small_disk / "run", checkpoint_steps=1)
        left = [path.name for path in (small_disk / "run" / "checkpoints").iterdir()]
        assert set(left) <= {"last.safetensors"}

    def test_out_is_probed_before_anything_is_loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(data, "load_backbone", lambda *a, **k: pytest.fail("loaded the backbone first"))
        with pytest.raises(OSError, match="out"):
            continual.run(tiny_config("linear", out=tmp_path / "file" / "run"))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"method": "nsp3"}, "method.*'nsp3'.*nsp2"),
            ({"options": {"promts": 3}}, "'promts'.*prompts"),
            ({"domains": ("inverse",)}, "'inverse'.*invert"),
            ({"data": "digit"}, "digits"),
            ({"backbone": "vit_base_patch16_225"}, "vit_base_patch16_224"),
            ({"device": "tpu"}, "device.*tpu"),
        ],
    )
    def test_unknown_names_offer_the_nearest(self, changes: dict[str, Any], words: str) -> None:
        config = dataclasses.replace(tiny_config("nsp2", data="digits", backbone="embedded"), **changes)
        with pytest.raises(ValueError, match=words):
            continual.run(config)

    def test_a_wrong_backend_is_refused_before_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CL_KERNELS_BACKEND", "nativ")
        with pytest.raises(ValueError, match=r"backend.*'nativ'"):
            run("class-mean")

    def test_more_tasks_than_classes(self) -> None:
        with pytest.raises(ValueError, match="6 classes"):
            run(tasks=7)

    @pytest.mark.gpu
    def test_a_run_on_cuda_agrees_with_the_cpu(self) -> None:
        for name in ("nsp2", "null-space"):
            here = run(name)
            there = run(name, device="cuda", precision="float32")
            again = run(name, device="cuda", precision="float32")
            assert comparable(there) == comparable(again)
            assert there["average_accuracy"] == pytest.approx(here["average_accuracy"], abs=0.1)
            assert run(name, device="cuda", precision="float16")["average_accuracy"] > 1.5 / 6
