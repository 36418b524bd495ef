"""The size sweep: every arm on the same nested subsets; each cell (size, draw) for all arms or for none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cl_kernels.compare.arms import Arm
from cl_kernels.compare.planner import LOOKS, Plan
from cl_kernels.compare.runner import Runner
from cl_kernels.compare.trial import Trial
from cl_kernels.compare.tuning import Tuned
from cl_kernels.continual import Deployed, save_model

if TYPE_CHECKING:
    from cl_kernels.compare.engine import Work

__all__ = ["Run", "cell_is_cached", "run_cell", "weights_file"]


@dataclass
class Run:
    """One finished run: its record, and the test log-probabilities by epoch, the last one's among them."""

    arm: str
    size: int
    draw: int
    options: dict[str, Any]
    record: dict[str, Any]
    test: dict[int, Tensor]
    best_epoch: int

    @property
    def final(self) -> Tensor:
        """Test log-probabilities after the last epoch, which is the one that decides."""
        return self.test[max(self.test)]


def weights_file(arm: str) -> str:
    """Where the best weights of an arm go."""
    return f"best_{arm}.safetensors"


def run_cell(work: Work, runner: Runner, plan: Plan, tuned: dict[str, Tuned], size: int, draw: int) -> list[Run]:
    """All arms at one size and draw. Settings whose loss was not finite are replaced by the next best of the tuning.

    Raises `OutOfTime`, and `RuntimeError` where an arm fails with every setting."""
    epochs = plan.epochs_at(size)
    lead = draw == 0 and size > work.lead
    found = []
    for arm in work.session.arms:
        keep = _saver(work, arm) if lead else None
        for entry in tuned[arm.name].entries(size):
            options = entry["options"]
            wanted = max(1, round(entry["best_share"] * epochs))
            every = max(1, epochs // LOOKS) if lead else wanted
            record = runner.measure(arm, options, size, draw, epochs, every, keep)
            if record["status"] == "done":
                break
            work.missing.append(f"{arm.title}, size {size}, draw {draw + 1}: {record['reason']}; the next best was run")
        else:
            raise RuntimeError(f"{arm.name}: no setting of its grid trains at size {size}: {record['reason']}")
        tensors = work.cache.tensors("sweep", runner.sweep_key(arm, options, size, draw, epochs))
        test = {int(name): value for name, value in tensors.items() if name != "final"}
        test[epochs] = tensors["final"]
        best = min(test, key=lambda epoch: (abs(epoch - wanted), -epoch))
        found.append(Run(arm.name, size, draw, options, record, test, best))
    work.lead = max(work.lead, size) if draw == 0 else work.lead
    return found


def cell_is_cached(work: Work, runner: Runner, plan: Plan, tuned: dict[str, Tuned], size: int, draw: int) -> bool:
    """Whether a process that was killed has run all of it already."""
    epochs = plan.epochs_at(size)
    return all(
        work.cache.get("sweep", runner.sweep_key(arm, tuned[arm.name].chosen(size), size, draw, epochs)) is not None
        for arm in work.session.arms
    )


def _saver(work: Work, arm: Arm) -> Any:
    """Writes the weights of the first run with the most images, as the model to use."""
    session = work.session

    def keep(trial: Trial) -> None:
        if trial.method is None:
            return
        names = [str(name) for name in session.data.class_names]
        work.models[arm.name] = Deployed(trial.method, session.backbone.preprocessing, names)
        try:
            save_model(
                session.config.folder / weights_file(arm.name), trial.method, name=trial.method_name,
                options=trial.options, backbone=session.config.backbone,
                preprocess=session.backbone.preprocessing, class_names=names,
            )  # fmt: skip
        except ValueError as error:
            work.missing.append(f"the weights of {arm.title}: {error}")

    return keep
