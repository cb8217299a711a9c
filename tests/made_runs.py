"""A run that was never trained, for the tests of what runs show."""

from __future__ import annotations

from pathlib import Path

from comask.data.source import Category
from comask.evaluate import METRICS, TASKS, CocoMetrics
from comask.training.record import RunRecord, Step

CLASSES = ("cat", 'a,"b"\nc', "<b>&")
CATEGORIES = tuple(Category(id=i, name=name) for i, name in enumerate(CLASSES, start=1))


def metrics(box: float, mask: float) -> CocoMetrics:
    """Numbers of which AP is as given; the class `cat` has no objects."""
    values = {
        task: {name: ap if name == "AP" else ap / 2 for name in METRICS}
        for task, ap in zip(TASKS, (box, mask), strict=True)
    }
    per_class = {task: {name: values[task]["AP"] for name in CLASSES[1:]} for task in TASKS}
    return CocoMetrics(values=values, per_class=per_class, images=2, detections=3)


def write_run(
    folder: Path, evaluations: int, *, box_gain: float = 0.02, mask_gain: float = 0.01
) -> None:
    """Ten steps an evaluation, at least ten; box AP ends at 0.5 and mask AP at 0.4.

    The last evaluation is that of a run's end, in which the plain average is half a point below.
    """
    record = RunRecord(folder, keep_until=0)
    for step in range(1, 10 * max(1, evaluations) + 1):
        losses = {"mask": 1 / step, "box": 2 / step}
        record.add_step(
            Step(
                step=step,
                epoch=step // 20,
                rate=0.1,
                losses=losses,
                seconds=0.5,
                data_seconds=0.125,
            )
        )
        if evaluations and step % 10 == 0:
            rise = step / evaluations / 10
            stages = {"final": metrics(0.5 * rise, 0.4 * rise)}
            if rise == 1:
                stages["first"] = metrics(0.5 - box_gain, 0.4 - mask_gain)
                stages["plain"] = metrics(0.495, 0.4)
            record.add_metrics(step, step // 20, stages)
