"""`eval_shift`: the last model on corrupted test images, reported beside the clean ones, survived and resumed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_tiny import SIZE, one_thread, tiny_backbone, tiny_config, tiny_data

from cl_kernels import continual, data
from cl_kernels.continual import RunConfig, RunStopped, checkpoint, feed, session, shift
from cl_kernels.continual.record import Record
from cl_kernels.data import corruptions
from cl_kernels.methods import HeadMethod

pytestmark = pytest.mark.usefixtures(one_thread.__name__, "needs_pillow")
FAMILIES = corruptions.names()


@pytest.fixture(scope="module")
def needs_pillow() -> None:
    pytest.importorskip("PIL", reason="two of the corruptions go through Pillow")


def run(method: str = "class-mean", **changes: Any) -> dict[str, Any]:
    config = tiny_config(method, **{"eval_shift": True, **changes})
    return continual.run(config, data=tiny_data(), backbone=tiny_backbone())


def comparable(results: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in results.items() if key != "seconds"}, sort_keys=True)


class TestResults:
    @pytest.mark.parametrize("method", ["class-mean", "linear", "full", "lorac-ipc", "gpm"])
    def test_layout(self, method: str, tmp_path: Path) -> None:
        found = run(method, out=tmp_path)
        assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
        part = found["shift"]
        assert list(part["families"]) == FAMILIES
        assert {len(values) for values in part["families"].values()} == {5}
        everything = [value for values in part["families"].values() for value in values]
        assert all(0 <= value <= 1 for value in everything)
        assert part["clean"] == found["average_accuracy"]
        assert part["mean"] == pytest.approx(sum(everything) / 75)
        assert part["relative"] == pytest.approx(part["mean"] / part["clean"])
        assert sum(part["severities"]) / 5 == pytest.approx(part["mean"])
        sizes = {kind: len(group) for kind, group in corruptions.GROUPS.items()}
        assert sum(part["groups"][kind] * size for kind, size in sizes.items()) / 15 == pytest.approx(part["mean"])
        assert part["severities"][4] < part["severities"][0], "the strongest corruptions cost something"
        assert found["seconds"]["shift"] > 0

    def test_without_it_nothing_is_evaluated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain, full = run(eval_shift=False), run()
        monkeypatch.setattr(shift, "accuracies", lambda *given: pytest.fail("evaluated"))
        assert comparable(run(eval_shift=False)) == comparable(plain)
        assert plain["shift"] is None
        assert "shift" not in plain["seconds"]
        same = set(plain) - {"shift", "config", "fingerprint", "seconds"}
        assert {key: plain[key] for key in same} == {key: full[key] for key in same}

    def test_fingerprints_of_runs_without_it_are_what_they_were(self) -> None:
        """The first is that of the version before there was such a field."""
        assert RunConfig("nsp2").fingerprint("data", "model") == "6fc2bd5fd9d6b53de55bb86b4b8ff813"
        assert RunConfig("nsp2", eval_shift=True).fingerprint("data", "model") != RunConfig("nsp2").fingerprint(
            "data", "model"
        )

    def test_a_model_that_is_always_wrong(self) -> None:
        found = shift.summary(dict.fromkeys(FAMILIES, [0.0] * 5), 0.0)
        assert found["relative"] is None
        assert found["mean"] == 0

    def test_a_wrong_type(self) -> None:
        with pytest.raises(TypeError, match="eval_shift must be true or false, got 'yes'"):
            RunConfig("nsp2", eval_shift="yes")  # type: ignore[arg-type]  # what is refused


class TestImages:
    @pytest.mark.parametrize("changes", [{}, {"stream": "domain", "tasks": None, "domains": ("invert", "rotate90")}])
    def test_are_corrupted_in_their_domain_at_the_backbones_size(self, changes: dict[str, Any]) -> None:
        big = tiny_data(size=2 * SIZE)
        opened = session.open_session(tiny_config("class-mean", **changes), big, tiny_backbone())
        for task in opened.tasks:
            made, labels = shift._feed(opened, task.index, "snow", 3).batch(torch.arange(len(task.test)))
            images = big.test.tensors()[task.test]
            images = {"identity": images, "invert": 255 - images, "rotate90": images.rot90(1, (-2, -1))}[task.domain]
            small = data.preprocess.cover(images, SIZE)
            assert small.shape[-1] == SIZE
            torch.testing.assert_close(made, opened.preprocess(corruptions.corrupt(small, "snow", 3)))
            assert torch.equal(labels, big.test.labels[task.test])

    def test_numbers_are_those_of_predict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By hand, from the trained method and the formulas."""
        kept: list[session.Session] = []
        original = shift.accuracies

        def accuracies(opened: session.Session, name: str) -> list[float]:
            kept.append(opened)
            return original(opened, name)

        monkeypatch.setattr(shift, "accuracies", accuracies)
        found = run("full")
        method, preprocess, pictures = kept[0].method, kept[0].preprocess, tiny_data().test
        for name, severity in (("fog", 5), ("jpeg", 1), ("glass-blur", 3)):
            scores = []
            for task in kept[0].tasks:
                images = corruptions.corrupt(pictures.tensors()[task.test], name, severity)
                said = torch.tensor(method.classes)[method.predict(preprocess(images)).argmax(dim=1)]
                scores.append(float((said == pictures.labels[task.test]).double().mean()))
            assert found["shift"]["families"][name][severity - 1] == pytest.approx(sum(scores) / len(scores))

    def test_batches_and_seeds_do_not_change_them(self) -> None:
        expected = run()
        assert run(eval_batch_size=7)["shift"] == expected["shift"]
        other = run(seed=5, class_seed=0)
        assert other["shift"] == expected["shift"], "class means depend on no seed, and the images must not either"

    def test_frozen_features(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cached = run("linear")
        monkeypatch.setattr(feed.Feed, "mapped", lambda self, features, size: self)
        assert run("linear")["shift"] == cached["shift"]

    def test_a_protocol_is_told_the_task(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[int | None] = []
        monkeypatch.setattr(HeadMethod, "assume_task", lambda self, task: told.append(task))
        opened = session.open_session(tiny_config("class-mean"), tiny_data(), tiny_backbone())
        for task in opened.tasks:
            opened.method.begin_task(_view(opened, task.index))
            opened.method.end_task(_view(opened, task.index), opened.training(task.index).batches(10))
        shift.accuracies(opened, "contrast")
        assert told == [*[0, 1, 2] * 5, None]


def _view(opened: session.Session, index: int) -> Any:
    from cl_kernels.continual.trainer import _View

    task = opened.tasks[index]
    return _View(index, task.classes, 1, task.last, opened.training(index), 10)


class TestSurvival:
    def stopped(self, monkeypatch: pytest.MonkeyPatch, at: int, do: Callable[[], None], **changes: Any) -> list[str]:
        """Run until family number `at` is to be evaluated; the families that were."""
        original, done = shift.accuracies, []

        def accuracies(opened: session.Session, name: str) -> list[float]:
            if len(done) == at:
                do()
            done.append(name)
            return original(opened, name)

        with monkeypatch.context() as patch:
            patch.setattr(shift, "accuracies", accuracies)
            with pytest.raises((KeyboardInterrupt, RunStopped)):
                run(**changes)
        return done

    @staticmethod
    def lose_the_machine() -> None:
        raise KeyboardInterrupt

    @pytest.mark.parametrize(("minutes", "left"), [(0.0, 8), (10.0, 15)])
    def test_goes_on_or_repeats(
        self, minutes: float, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changes: dict[str, Any] = {"out": tmp_path, "checkpoint_minutes": minutes, "method": "linear"}
        assert len(self.stopped(monkeypatch, 7, self.lose_the_machine, **changes)) == 7
        assert not (tmp_path / "results.json").exists()
        original, again = shift.accuracies, []
        monkeypatch.setattr(shift, "accuracies", lambda s, name: (again.append(name), original(s, name))[1])
        found = run(**changes, resume=True)
        assert again == FAMILIES[-left:]
        assert comparable(found) == comparable(run("linear"))
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["family"] for line in lines if line["event"] == "shift"] == FAMILIES

    def test_sigterm_saves_what_is_done(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        changes: dict[str, Any] = {"out": tmp_path, "method": "linear"}
        done = self.stopped(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM), **changes)
        assert len(done) == 4, "the family that was begun is finished"
        assert comparable(run(**changes, resume=True)) == comparable(run("linear"))

    def test_a_finished_run_resumes_into_the_same_file(self, tmp_path: Path) -> None:
        first = run(out=tmp_path)
        assert comparable(run(out=tmp_path, resume=True)) == comparable(first)

    def test_a_checkpoint_without_it_is_another_run(self, tmp_path: Path) -> None:
        run(out=tmp_path, eval_shift=False)
        with pytest.raises(continual.checkpoint.CheckpointError, match="another run"):
            run(out=tmp_path, resume=True)

    def test_an_older_checkpoint_still_loads(self, tmp_path: Path) -> None:
        """One whose record knows nothing of corrupted images."""
        expected = run("linear", out=tmp_path, eval_shift=False)
        path = tmp_path / "checkpoints" / "last.safetensors"
        tree = checkpoint.load(path, fingerprint=expected["fingerprint"], device=torch.device("cpu"))
        older = {name for name in tree["record"] if not name.startswith("shift")}
        assert len(older) == len(tree["record"]) - 2
        tree["record"] = {name: tree["record"][name] for name in older}
        assert Record(**tree["record"]).shift == {}
        checkpoint.save_atomically(path, tree, fingerprint=expected["fingerprint"])
        assert comparable(run("linear", out=tmp_path, eval_shift=False, resume=True)) == comparable(expected)

    def test_what_is_missing_is_said_before_anything_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        monkeypatch.setattr(data, "load_backbone", lambda *a, **k: pytest.fail("loaded the backbone first"))
        with pytest.raises(ImportError, match="need Pillow"):
            continual.run(tiny_config("linear", eval_shift=True))


def test_the_command(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    out = tmp_path / "run"
    words = ("train", "class-mean", "--tasks", "1", "--quick", "--eval-shift", "--no-plot", "--out", str(out))
    code, said, _ = command(*words)
    assert code == 0
    found = json.loads((out / "results.json").read_text())
    assert f"{100 * found['shift']['mean']:.1f}" in said
    assert "Corrupted images: accuracy" in said
    assert 0.5 < found["shift"]["mean"] < found["shift"]["clean"]
    assert "In and out of distribution" in (out / "report.html").read_text()
