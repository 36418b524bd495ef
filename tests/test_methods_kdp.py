"""KDP: what each phase may move, what the losses and the prediction are, and the student by itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from continual_tiny import one_thread, tiny_backbone, tiny_config, tiny_data, tiny_model
from test_methods import TASKS, Toy
from torch import Tensor

from cl_kernels import continual, methods
from cl_kernels.continual.config import RunConfig
from cl_kernels.data.preprocess import Preprocessing, normalise, translated
from cl_kernels.errors import CheckpointError
from cl_kernels.methods.kdp import DISTILLATIONS, KDP

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

TEACHER = {"teacher": "embedded-small"}
POOLS = ("l2p", "dualprompt", "coda-prompt", "apt")


def student(teacher: Any = None, backbone: Any = None, **options: Any) -> KDP:
    torch.manual_seed(3)
    made = methods.create("kdp", tiny_model(depth=3) if backbone is None else backbone, **options)
    assert isinstance(made, KDP)
    if made.needs_teacher:
        made.set_teacher(tiny_model(dim=48, depth=3) if teacher is None else teacher, lambda images: images)
    return made


def steps(method: KDP, task: Toy, count: int = 3, facts: bool = False) -> list[float]:
    images, labels = task.images()
    losses = []
    for step in range(count):
        rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(step))[:8]
        known = method.per_image(images) if facts else ()
        assert method.optimizer is not None
        method.optimizer.zero_grad()
        loss = method.loss((images[rows], labels[rows]), *(fact[rows] for fact in known))
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        method.optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def learn(method: KDP, task: Toy, **how: Any) -> None:
    method.begin_task(task)
    for phase in range(len(method.phases)):
        if phase:
            method.begin_phase(phase)
        steps(method, task, **how)
    method.end_task(task, task.batches())


def everything(*modules: torch.nn.Module) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": value.clone()
        for number, module in enumerate(modules)
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestToken:
    """What the KD token and prompts start as, and when they train."""

    def test_it_starts_as_the_class_token(self) -> None:
        """As published both attend to the same rows, so the two features are equal until the token is trained."""
        images, _ = TASKS[0].images()
        for start, equal in (("class-token", True), ("uniform", False)):
            method = student(distillation="labels", kd_init=start)
            method.begin_task(TASKS[0])
            found = method.model(images, train=True)
            assert torch.allclose(found.kd, found.cls, atol=1e-5) == equal
        prompts = student(distillation="labels", kd_init="class-token").model.kd
        assert prompts is not None
        assert [float(p.detach().abs().max()) for p in prompts.prompts.values()] == [0.0, 0.0]

    def test_a_backbone_without_a_class_token_is_refused(self) -> None:
        backbone = tiny_model(depth=3, class_token=False, global_pool="avg")
        with pytest.raises(ValueError, match=r"kd_init.*class token"):
            student(backbone=backbone, distillation="labels", kd_init="class-token")

    def test_fixed_after_the_first_task(self) -> None:
        method = student(kd_tasks="first")
        kd = method.model.kd
        assert kd is not None
        before = everything(kd)
        learn(method, TASKS[0])
        after = everything(kd)
        assert not same(before, after)
        names = [name for name, _ in method.trainable_parameters()]
        method.begin_task(TASKS[1])
        method.begin_phase(1)
        assert {name for name in names if name.startswith("kd.")}
        assert not [name for name, _ in method.trainable_parameters() if name.startswith("kd.")]
        head = everything(method.kd_heads.head(1))
        steps(method, TASKS[1])
        assert same(everything(kd), after)
        assert not same(everything(method.kd_heads.head(1)), head), "the KD head goes on learning from the teacher"
        assert all(not p.requires_grad for p in kd.parameters())

    def test_a_learning_rate_of_their_own(self) -> None:
        still, moved = student(kd_lr=0.0, lr=1e-2), student(kd_lr=1e-2, lr=0.0)
        for method, moves in ((still, False), (moved, True)):
            kd, pool = method.model.kd, method.model.pool
            assert kd is not None
            assert pool is not None
            method.begin_task(TASKS[0])
            method.begin_phase(1)
            before = everything(kd), everything(pool)
            steps(method, TASKS[0])
            assert same(everything(kd), before[0]) != moves
            assert same(everything(pool), before[1]) == moves

    @pytest.mark.parametrize("options", [{"kd_tasks": "first"}, {"kd_lr": 1e-3, "kd_init": "class-token"}], ids=str)
    def test_saved_in_a_later_task_it_goes_on_bit_for_bit(self, options: dict[str, Any]) -> None:
        method = student(**options)
        learn(method, TASKS[0])
        method.begin_task(TASKS[1])
        method.begin_phase(1)
        steps(method, TASKS[1], 2)
        other = student(**options)
        other.load_state_dict(copy.deepcopy(method.state_dict()))
        assert steps(method, TASKS[1]) == steps(other, TASKS[1])
        assert same(everything(*method.modules()), everything(*other.modules()))


class TestPhases:
    @pytest.mark.parametrize("pool", POOLS)
    @pytest.mark.parametrize("distillation", [name for name in DISTILLATIONS if name not in ("none", "labels")])
    def test_each_phase_moves_its_own_model_alone(self, pool: str, distillation: str) -> None:
        """PA7, PA8: the teacher is bit for bit the same while it teaches, and neither backbone ever has a gradient."""
        method = student(prompt_pool=pool, distillation=distillation)
        teacher = method.teacher
        assert teacher is not None
        backbones = everything(method.backbone, teacher.backbone)
        learn(method, TASKS[0])
        method.begin_task(TASKS[1])
        mine, its = everything(*method.modules()), everything(*teacher.modules())
        steps(method, TASKS[1])
        assert same(mine, everything(*method.modules())), "the student waits"
        assert not same(its, everything(*teacher.modules())), "the teacher learns"
        method.begin_phase(1)
        its = everything(*teacher.modules())
        for part in teacher.modules():
            part.zero_grad(set_to_none=True)
        steps(method, TASKS[1])
        assert same(its, everything(*teacher.modules()))
        assert all(p.grad is None for part in teacher.modules() for p in part.parameters())
        assert not same(mine, everything(*method.modules()))
        method.end_task(TASKS[1], TASKS[1].batches())
        assert same(backbones, everything(method.backbone, teacher.backbone))
        assert all(p.grad is None for model in (method.backbone, teacher.backbone) for p in model.parameters())

    def test_heads_of_other_tasks_stay_bit_for_bit(self) -> None:
        """PA6, on both heads of the student and on the teacher's."""
        method = student()
        learn(method, TASKS[0])
        teacher = method.teacher
        assert teacher is not None
        old = [everything(heads.head(0)) for heads in (method.heads, method.kd_heads, teacher.heads)]
        learn(method, TASKS[1])
        assert all(
            same(before, everything(heads.head(0)))
            for before, heads in zip(old, (method.heads, method.kd_heads, teacher.heads), strict=True)
        )

    @pytest.mark.parametrize("distillation", DISTILLATIONS)
    def test_facts_computed_once_change_nothing(self, distillation: str) -> None:
        plain, known = student(distillation=distillation), student(distillation=distillation)
        for method, facts in ((plain, False), (known, True)):
            method.begin_task(TASKS[0])
            for phase in range(len(method.phases)):
                if phase:
                    method.begin_phase(phase)
                steps(method, TASKS[0], facts=facts)
        a, b = everything(*plain.modules()), everything(*known.modules())
        for key, value in a.items():  # batches of other sizes round differently
            torch.testing.assert_close(b[key], value, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("distillation", ["kdp", "feature", "none"])
    def test_saved_in_the_students_phase_it_goes_on_bit_for_bit(self, distillation: str) -> None:
        """PA17, in one process."""
        straight = student(distillation=distillation, schedule="cosine")
        learn(straight, TASKS[0])
        straight.begin_task(TASKS[1])
        if straight.needs_teacher:
            steps(straight, TASKS[1])
            straight.begin_phase(1)
        steps(straight, TASKS[1], count=2)
        saved = copy.deepcopy(straight.state_dict())
        resumed = student(distillation=distillation, schedule="cosine")
        resumed.load_state_dict(saved)
        assert resumed.phase == straight.phase
        if resumed.teacher is not None:
            assert not any(p.requires_grad for part in resumed.teacher.modules() for p in part.parameters())
        for method in (straight, resumed):
            steps(method, TASKS[1], count=4)
            method.end_task(TASKS[1], TASKS[1].batches())
            learn(method, TASKS[2])
        pairs = [(straight, resumed)]
        if straight.teacher is not None and resumed.teacher is not None:
            pairs.append((straight.teacher, resumed.teacher))  # type: ignore[arg-type]  # both are methods
        assert all(same(everything(*a.modules()), everything(*b.modules())) for a, b in pairs)

    def test_kd_prompts_get_the_sum_of_the_images_gradients(self) -> None:
        """PA12."""
        method = student()
        method.begin_task(TASKS[0])
        method.begin_phase(1)
        images, labels = TASKS[0].images()
        kd = method.model.kd
        assert kd is not None

        def gradient(rows: slice) -> Tensor:
            for parameter in kd.parameters():
                parameter.grad = None
            count = len(labels[rows])
            (method.loss((images[rows], labels[rows])) * count).backward()  # type: ignore[no-untyped-call]
            return torch.cat([p.grad.flatten() for p in kd.parameters() if p.grad is not None])

        whole = gradient(slice(0, 6))
        single = sum((gradient(slice(i, i + 1)) for i in range(6)), torch.zeros_like(whole))
        assert float((whole - single).norm() / whole.norm()) < 5e-6

    def test_apt_teaches_with_what_it_has_learned(self) -> None:
        """Trap T7: the official teacher distils task 1 with prompts of zeros."""
        method = student(prompt_pool="apt")
        method.begin_task(TASKS[0])
        steps(method, TASKS[0])
        method.begin_phase(1)
        teacher = method.teacher
        assert teacher is not None
        pool: Any = teacher.pool
        assert torch.equal(pool.merged, pool.vectors)
        assert float(pool.merged.abs().max()) > 0


class TestLosses:
    def setup_student(self, **options: Any) -> tuple[KDP, Tensor, Tensor]:
        method = student(**options)
        learn(method, TASKS[0])
        method.begin_task(TASKS[1])
        steps(method, TASKS[1])
        method.begin_phase(1)
        return method, *TASKS[1].images()

    def parts(self, method: KDP, images: Tensor, labels: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        """What the model gives, the class head's logits, the teacher's, and the labels among the task's classes."""
        teacher = method.teacher
        assert teacher is not None
        query = method.model.query(images)
        found = method.model(images, query, train=True)
        with torch.no_grad():
            taught = teacher.heads.head(1)(teacher.model(images, query, train=False).cls)
        return found, method.heads.head(1)(found.cls), taught, method.heads.columns(labels) - 2

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("distillation", ["logit", "token", "kdp"])
    def test_the_students_loss(self, distillation: str, alpha: float) -> None:
        method, images, labels = self.setup_student(distillation=distillation, alpha=alpha, kd_temperature=3.0)
        found, hard, taught, local = self.parts(method, images, labels)
        signal = hard if distillation == "logit" else method.kd_heads.head(1)(found.kd)
        kl = F.kl_div(
            F.log_softmax(signal / 3, 1), F.log_softmax(taught / 3, 1), log_target=True, reduction="batchmean"
        )
        expected = (1 - alpha) * F.cross_entropy(hard, local) + alpha * 9 * kl + found.loss
        torch.testing.assert_close(method.loss((images, labels)), expected, atol=2e-6, rtol=2e-6)

    @pytest.mark.parametrize("pool", POOLS)
    @pytest.mark.parametrize("distillation", DISTILLATIONS)
    def test_a_batch_in_two_halves_has_the_same_loss_and_gradients(self, pool: str, distillation: str) -> None:
        """PA14: what DDP's mean of equal shards gives is what one device computes, in both phases."""
        method, task = student(distillation=distillation, prompt_pool=pool), TASKS[0]
        method.begin_task(task)
        images, labels = (part[4:12] for part in task.images())
        for phase in range(len(method.phases)):
            if phase:
                method.begin_phase(phase)
            found = []
            for shards in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
                assert method.optimizer is not None
                method.optimizer.zero_grad()
                losses = [method.loss((images[shard], labels[shard])) / len(shards) for shard in shards]
                sum(losses, torch.zeros(())).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                trained = [p for group in method.optimizer.param_groups for p in group["params"]]
                grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]
                found.append((float(sum(losses, torch.zeros(()))), grads))
            (whole, grads), (halves, other) = found
            assert halves == pytest.approx(whole, rel=1e-5)
            assert len(grads) == len(other)
            for one, two in zip(grads, other, strict=True):
                torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)

    def test_a_second_head_by_itself(self) -> None:
        """The control: both heads learn the labels, and nobody teaches."""
        method = student(distillation="labels", alpha=0.3)
        method.begin_task(TASKS[0])
        images, labels = TASKS[0].images()
        found = method.model(images, train=True)
        local = method.heads.columns(labels)
        hard, soft = (F.cross_entropy(h(z), local) for h, z in ((method.heads, found.cls), (method.kd_heads, found.kd)))
        torch.testing.assert_close(method.loss((images, labels)), 0.7 * hard + 0.3 * soft + found.loss)

    def test_decoupled(self) -> None:
        method, images, labels = self.setup_student(distillation="decoupled", alpha=0.25)
        found, hard, taught, local = self.parts(method, images, labels)
        p, q = (F.softmax(z / 4, 1).gather(1, local[:, None]) for z in (taught, hard))
        two = 16 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()  # two classes: the rest is certain
        expected = 0.75 * F.cross_entropy(hard, local) + 0.25 * two + found.loss
        torch.testing.assert_close(method.loss((images, labels)), expected, atol=2e-5, rtol=2e-5)

    def test_decoupled_within_a_task_of_one_class(self) -> None:
        """There is no rest to compare: nothing is lost, and the run goes on."""
        method = student(distillation="decoupled")
        learn(method, Toy(0, (3,)))
        learn(method, TASKS[1])
        method.begin_task(Toy(2, (5,)))
        method.begin_phase(1)
        images, labels = Toy(2, (5,)).images()
        assert float(method.loss((images, labels)).detach()) == 0

    def test_features(self) -> None:
        method, images, labels = self.setup_student(distillation="feature", feature_weight=0.7)
        found, hard, taught, local = self.parts(method, images, labels)
        rows: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _, given: rows.update({name: given[0]})

        teacher = method.teacher
        assert teacher is not None
        query = method.model.query(images)
        for name, model in (("student", method.model), ("teacher", teacher.model)):
            handle = model.backbone.get_submodule("norm").register_forward_pre_hook(keep(name))
            model(images, query, train=name == "student")
            handle.remove()
        assert method.projection is not None
        error = F.mse_loss(method.projection(rows["student"]), rows["teacher"].detach())
        kl = F.kl_div(F.log_softmax(hard / 2, 1), F.log_softmax(taught / 2, 1), log_target=True, reduction="batchmean")
        expected = 0.5 * F.cross_entropy(hard, local) + 2 * kl + found.loss + 0.7 * error
        torch.testing.assert_close(method.loss((images, labels)), expected, atol=2e-6, rtol=2e-6)

    def test_the_teachers_loss_is_the_labels_and_its_pools(self) -> None:
        method = student(prompt_pool="l2p")
        method.begin_task(TASKS[0])
        images, labels = TASKS[0].images()
        teacher = method.teacher
        assert teacher is not None
        found = teacher.model(images, method.model.query(images), train=True)
        local = teacher.heads.columns(labels)
        expected = F.cross_entropy(teacher.heads(found.cls), local) + found.loss
        torch.testing.assert_close(method.loss((images, labels)), expected)
        assert float(found.loss.detach()) > 0


class TestPrediction:
    @pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
    def test_the_blend_of_both_heads(self, alpha: float) -> None:
        """PA13."""
        method = student(alpha=alpha)
        learn(method, TASKS[0])
        images, _ = TASKS[0].images()
        with torch.no_grad():
            found = method.model(images, train=False)
            expected = (1 - alpha) * method.heads(found.cls) + alpha * method.kd_heads(found.kd)
        torch.testing.assert_close(method.predict(images), expected, atol=1e-6, rtol=1e-6)

    def test_no_distillation_is_the_pools_own_method(self) -> None:
        """Without a teacher, `kdp` is `coda-prompt` bit for bit, at the same learning rate (their defaults differ)."""
        images, _ = TASKS[1].images()
        predictions = []
        for name in ("kdp", "coda-prompt"):
            torch.manual_seed(3)
            options: dict[str, Any] = {"distillation": "none"} if name == "kdp" else {}
            method: Any = methods.create(name, tiny_model(depth=3), lr=1e-3, **options)
            for task in TASKS[:2]:
                learn(method, task)
            predictions.append(method.predict(images))
        assert torch.equal(*predictions)


class TestWrongCalls:
    def test_a_teacher_is_needed_and_only_then_taken(self) -> None:
        alone = methods.create("kdp", tiny_model())
        with pytest.raises(RuntimeError, match="set_teacher"):
            alone.begin_task(TASKS[0])
        with pytest.raises(ValueError, match="no teacher"):
            methods.create("kdp", tiny_model(), distillation="none").set_teacher(tiny_model(), lambda x: x)
        with pytest.raises(ValueError, match="no teacher"):
            methods.create("nsp2", tiny_model()).set_teacher(tiny_model(), lambda x: x)
        late = student()
        learn(late, TASKS[0])
        with pytest.raises(ValueError, match="first task"):
            late.set_teacher(tiny_model(), lambda x: x)

    def test_features_of_other_shapes(self) -> None:
        method = methods.create("kdp", tiny_model(), distillation="feature")
        other = tiny_model(class_token=False, global_pool="avg")
        with pytest.raises(ValueError, match="rows, of which it has 4, not 5"):
            method.set_teacher(other, lambda x: x)
        assert method.teacher is None
        assert all(p.requires_grad for p in other.parameters()), "a wrong call leaves the model as it was"
        with pytest.raises(ValueError, match="Linear"):
            method.set_teacher(torch.nn.Linear(3, 3), lambda x: x)

    def test_phases_in_order(self) -> None:
        method = student()
        method.begin_task(TASKS[0])
        with pytest.raises(RuntimeError, match="student has not learned"):
            method.end_task(TASKS[0], TASKS[0].batches())
        method.begin_phase(1)
        with pytest.raises(RuntimeError, match="begin_phase"):
            method.begin_phase(1)

    @pytest.mark.parametrize(
        "options",
        [
            {"prompt_pool": "l3p"}, {"pool_options": {"depth": 3}}, {"pool_options": {"length": 3}}, {"alpha": 1.5},
            {"distillation": "magic"}, {"kd_temperature": 0}, {"kd_temperature": float("nan")}, {"kd_length": 5},
            {"decouple": "half"}, {"feature_weight": -1}, {"kd_init": "noise"}, {"kd_lr": -1.0}, {"kd_lr": "fast"},
            {"kd_tasks": "last"}, {"prompt_pool": "apt", "pool_options": {"size": 3}},
        ],
    )  # fmt: skip
    def test_options_out_of_range(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="expected"):
            methods.check("kdp", **options)

    def test_the_configuration(self) -> None:
        with pytest.raises(ValueError, match="teacher"):
            continual.run(tiny_config("kdp"), data=tiny_data(), backbone=tiny_backbone())
        with pytest.raises(ValueError, match="no teacher"):
            continual.run(tiny_config("nsp2", **TEACHER), data=tiny_data(), backbone=tiny_backbone())
        for name in ("embeded", "vit_tiny_patch16_224"):
            with pytest.raises(ValueError, match=f"^teacher: .*{name}"):
                continual.run(tiny_config("kdp", teacher=name), data=tiny_data(), backbone=tiny_backbone())
        with pytest.raises(ValueError, match="teacher_weights"):
            RunConfig("kdp", teacher_weights="w.safetensors")


class TestRuns:
    def run(self, **changes: Any) -> dict[str, Any]:
        return continual.run(
            tiny_config("kdp", **{**TEACHER, **changes}), data=tiny_data(), backbone=tiny_backbone(depth=3)
        )

    def test_teacher_and_student_in_the_results(self, tmp_path: Path) -> None:
        found = self.run(out=tmp_path)
        teacher, small = found["teacher"], found["student"]
        assert teacher["backbone"] == "embedded-small"
        assert teacher["parameters"] > 200_000 > small["parameters"]
        assert 0 <= small["bytes"] - 4 * small["parameters"] < 500, "float32, and the columns of a few labels"
        assert [len(row) for row in teacher["accuracy_matrix"]] == [3, 3, 3]
        assert teacher["average_accuracy"] == pytest.approx(sum(teacher["accuracy_matrix"][2]) / 3)
        assert all(count > 0 for count in teacher["trainable"])
        assert [len(part) for part in found["seconds"]["phases"]] == [2, 2, 2]
        assert all(
            found["seconds"]["latency"][who][what] > 0 for who in ("teacher", "student") for what in ("one", "batch")
        )

    @pytest.mark.parametrize("distillation", ["kdp", "logit"])
    @pytest.mark.parametrize("pool", ["dualprompt", "apt"])
    def test_the_student_runs_alone(self, pool: str, distillation: str, tmp_path: Path) -> None:
        self.run(out=tmp_path, options={"prompt_pool": pool, "distillation": distillation})
        deployed = continual.load_model(tmp_path / "student.safetensors")
        results = json.loads((tmp_path / "results.json").read_text())
        data = tiny_data()
        labels = torch.tensor(deployed.classes)
        hits = labels[deployed(data.test.tensors()).argmax(1)] == data.test.labels
        for j, task in enumerate(results["tasks"]):
            mine = torch.isin(data.test.labels, torch.tensor(task["classes"]))
            assert float(hits[mine].float().mean()) == pytest.approx(results["accuracy_matrix"][2][j])
        names = deployed.names(data.test.tensors()[:2])
        assert all(name in data.class_names for name in names)
        assert (tmp_path / "student.safetensors").stat().st_size < 4 * results["teacher"]["parameters"]

    def test_a_damaged_student(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            continual.load_model(tmp_path / "student.safetensors")
        self.run(out=tmp_path)
        whole = (tmp_path / "student.safetensors").read_bytes()
        for broken in (
            whole[:1000],
            whole[:-10],
            b"PK" + whole[2:],
            (tmp_path / "checkpoints/last.safetensors").read_bytes(),
        ):
            (tmp_path / "broken.safetensors").write_bytes(broken)
            with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
                continual.load_model(tmp_path / "broken.safetensors")

    def test_later_tasks_do_not_matter_to_earlier_rows(self) -> None:
        """PA18, for the student and its teacher."""
        first = self.run()
        data = tiny_data()
        task = torch.tensor(first["tasks"][2]["classes"])
        rows = torch.isin(data.train.labels, task).nonzero().flatten()
        images: Any = data.train.tensors()
        images[rows] = images[rows.flip(0)]
        other = continual.run(tiny_config("kdp", **TEACHER), data=data, backbone=tiny_backbone(depth=3))
        assert first["loss"][2] != other["loss"][2], "the third task did change"
        assert first["loss"][:2] == other["loss"][:2]
        for part in (lambda r: r, lambda r: r["teacher"]):
            assert part(first)["accuracy_matrix"][:2] == part(other)["accuracy_matrix"][:2]

    def test_augmented_images_are_looked_at_anew(self) -> None:
        assert self.run(augment="crop")["loss"] != self.run()["loss"]


def test_fingerprints_of_runs_without_a_teacher_are_what_they_were() -> None:
    """A checkpoint from before there were teachers can still be resumed."""
    config = tiny_config("nsp2")
    known = {"teacher", "teacher_weights"}
    assert known <= set(config.as_json())
    with_teacher = tiny_config("kdp", **TEACHER)
    assert with_teacher.fingerprint("d") != tiny_config("kdp").fingerprint("d")
    assert config.fingerprint("data", "weights") == "e0d50d0754c1a17c525f8ef09f68d3ad"


def test_translated_images() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    a = Preprocessing(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert translated(a(pixels), a, copy.copy(a)) is not None
    images = a(pixels)
    assert translated(images, a, a) is images
    b = Preprocessing(16, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    torch.testing.assert_close(translated(images, a, b), b(pixels), atol=1e-5, rtol=1e-5)
    grey = Preprocessing(16, (0.5,), (0.5,), channels=1)
    torch.testing.assert_close(translated(images, a, grey), grey(pixels), atol=1e-5, rtol=1e-5)
    small = Preprocessing(8, (0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close(translated(images, a, small), small(pixels), atol=1e-5, rtol=1e-5)
    large = translated(images, a, Preprocessing(32, (0.5,) * 3, (0.5,) * 3))
    assert large.shape == (2, 3, 32, 32)
    assert torch.isfinite(normalise(large, (0.0,) * 3, (1.0,) * 3)).all()
