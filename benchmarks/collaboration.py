"""Shows what the collaboration of mask and boxes does: weighted against uniform cells, RoI by RoI.

`shapes-tiny` is trained on shapes-clutter with weighted cells, with uniform cells and with boxes of the
classification branch (`fc_reg`), with several seeds. Every model then refines the same RoIs: ground-truth
boxes whose centre and size are changed by up to ±15, 25 and 35 %. The measure is the IoU of the refined
box with the truth, and its difference between two models on the same RoIs. The cells' weights in training
and at test are independent of each other, which makes four combinations. Last, the proposals of the test
images are changed by ±35 % and AP75 of boxes is measured.

    python benchmarks/collaboration.py --output runs/collaboration --seeds 3
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from shapes_runs import trained
from torch import Tensor

from comask.config import DataConfig, ModelConfig
from comask.data.shapes_clutter import ShapesClutterSource
from comask.data.training_set import TrainingSet
from comask.evaluate import evaluate
from comask.models.boxes import clip_boxes, decode_boxes, paired_iou
from comask.models.comask import CoMask
from comask.presets import preset
from comask.progress import Progress
from comask.runtime.backends.base import Stages
from comask.runtime.backends.pytorch import torch_stages
from comask.runtime.predictor import Predictor
from comask.training.targets import jitter

AMOUNTS = (0.15, 0.25, 0.35)
LOOSE = AMOUNTS[-1]
ROI_SEED, AP_SEED = 6_000_000, 7_000_000  # of images that no training has seen
PER_OBJECT = 2  # RoIs
VARIANTS: dict[str, dict[str, Any]] = {
    "weighted": {},
    "uniform": {"model.collaboration": "uniform"},
    "fc_reg": {"model.collaboration": "fc_reg"},
}
# Titles of differences, and the two forms, as cells in training/at test.
PAIRS = (
    ("weights in both, against none", "weighted/weighted", "uniform/uniform"),
    ("at test, trained with them", "weighted/weighted", "weighted/uniform"),
    ("at test, trained without", "uniform/weighted", "uniform/uniform"),
    ("weights in both, against fc_reg", "weighted/weighted", "fc_reg"),
)
PREPROCESS = preset("shapes-tiny").preprocess  # of all variants


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", type=click.IntRange(2), default=3, show_default=True)
@click.option("--images", type=click.IntRange(10), default=300, show_default=True,
              help="Number of images whose RoIs are refined.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the differences into this SVG.")
@click.option("--only", type=click.Choice(list(VARIANTS)), help="Train this variant, and stop.")
def main(output: Path, seeds: int, images: int, plot: Path | None, only: str | None) -> None:
    """Train what OUTPUT lacks, and print the tables; OUTPUT/rows.json gets the numbers."""
    if only:
        for seed in range(seeds):
            model_of(output, only, seed)
        return
    rows = [measure(output, seed, images) for seed in range(seeds)]
    (output / "rows.json").write_text(json.dumps(rows, indent=2))
    click.echo("\n".join(tables(rows, images)))
    if plot:
        draw(rows, plot)


def model_of(output: Path, variant: str, seed: int) -> CoMask:
    """Returns the model of one variant and seed."""
    settings = {"train.seed": seed, "train.evaluate_every": 0} | VARIANTS[variant]
    return trained("shapes-clutter", output / f"{variant}-{seed}", settings)


def measure(output: Path, seed: int, images: int) -> dict[str, Any]:
    """Measures the models of one seed.

    Returns:
        `iou[train/test][amount]`: the mean IoU of each image's refined boxes; `ap75[train/test]`.
    """
    row: dict[str, Any] = {"seed": seed, "iou": {}, "ap75": {}}
    for variant in VARIANTS:
        model = model_of(output, variant, seed)
        tests = [model.config.collaboration] if variant == "fc_reg" else ["weighted", "uniform"]
        forms = {
            variant if variant == "fc_reg" else f"{variant}/{test}": dataclasses.replace(
                model.config, collaboration=test
            )
            for test in tests
        }
        row["iou"] |= refined_ious(model, forms, images)
        for name, form in forms.items():
            model.config = form
            row["ap75"][name] = loose_ap75(model)
    return row


@torch.inference_mode()
def refined_ious(
    model: CoMask, forms: dict[str, ModelConfig], images: int
) -> dict[str, dict[str, list[float]]]:
    """Returns the mean IoU of the refined boxes with the truth, for each image with objects.

    Args:
        model: the trained network.
        forms: the configurations with which it refines, by name.
        images: the number of test images.
    """
    generators = {a: torch.Generator().manual_seed(1) for a in AMOUNTS}  # one set for every model
    means: dict[str, dict[str, list[float]]] = {
        name: {str(amount): [] for amount in AMOUNTS} for name in forms
    }
    for canvas, size, boxes, labels in _test_images(images):
        own = torch.arange(len(boxes)).repeat(PER_OBJECT)
        sizes = torch.tensor([size], dtype=torch.int32)
        pyramid = model.pyramid(canvas[None], sizes)
        for amount, generator in generators.items():
            rois = jitter(boxes[own], amount, *size, generator)
            for name, model.config in forms.items():
                refined = refine(model, pyramid, sizes, rois, labels[own])
                iou = paired_iou(refined, boxes[own]).mean()
                means[name][str(amount)].append(float(iou))
    return means


def _test_images(images: int) -> Iterator[tuple[Tensor, tuple[int, int], Tensor, Tensor]]:
    """Yields canvas, size, boxes and labels of each test image with objects."""
    source = ShapesClutterSource(num_images=images, seed=ROI_SEED)
    config = DataConfig(flip_probability=0)
    dataset = TrainingSet(source, list(range(images)), PREPROCESS, config=config, seed=0)
    with Progress("refining", images, unit="images") as progress:
        for index in range(images):
            canvas, size, target, _ = dataset[(0, index)]
            if len(target.labels):
                yield canvas, size, target.boxes, target.labels
            progress.advance()


def refine(
    model: CoMask, pyramid: list[Tensor], sizes: Tensor, rois: Tensor, labels: Tensor
) -> Tensor:
    """Returns the refined boxes [R, 4] of RoIs [R, 4] in one image."""
    if model.config.collaboration == "fc_reg":
        _, deltas = model.classifier(model.pool(pyramid, rois[None], 7))
        boxes = decode_boxes(deltas.reshape(1, -1, 4), rois[None])
    else:
        boxes, *_ = model.refine(pyramid, rois[None], labels)
    return clip_boxes(boxes, sizes)[0]


def loose_ap75(model: CoMask, images: int = 200) -> float:
    """Returns AP75 of boxes in points when every proposal is changed by up to ±35 %."""
    source = ShapesClutterSource(num_images=images, seed=AP_SEED)
    generator = torch.Generator().manual_seed(2)
    stages = torch_stages(model)

    class Loose:
        """Stage 1, whose proposals are changed."""

        inputs, outputs = stages.stage1.inputs, stages.stage1.outputs

        def run(self, feeds: Any, keep: Any = ()) -> dict[str, Any]:
            found = stages.stage1.run(feeds, ())
            proposals = torch.as_tensor(np.asarray(found["proposals"]))
            sizes = np.asarray(feeds["image_sizes"])
            moved = [
                jitter(one, LOOSE, int(h), int(w), generator)
                for one, (h, w) in zip(proposals, sizes, strict=True)
            ]
            return {**found, "proposals": torch.stack(moved).numpy()}

        def close(self) -> None:
            stages.stage1.close()

    loose = Stages(stages.backend, Loose(), stages.stage2)
    predictor = Predictor(loose, PREPROCESS, mask_threshold=model.config.mask_threshold)
    indices = list(range(images))
    metrics = evaluate(source, indices, (predictor(source.image(i)) for i in indices))
    return 100 * metrics.values["bbox"]["AP75"]


def paired(rows: list[dict[str, Any]], one: str, other: str, amount: float) -> tuple[float, float]:
    """Returns the mean difference over seeds in points, and half of its 95 % interval (Student's)."""
    key = str(amount)
    means = [100 * float(np.mean(_differences(row, one, other, key))) for row in rows]
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(means), 1.96)
    return statistics.mean(means), t * statistics.stdev(means) / len(means) ** 0.5


def _differences(row: dict[str, Any], one: str, other: str, key: str) -> NDArray[np.float64]:
    return np.array(row["iou"][one][key]) - np.array(row["iou"][other][key])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the paired differences with their intervals, and each seed's mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for place, (title, one, other) in enumerate(PAIRS):
        for step, amount in enumerate(AMOUNTS):
            mean, half = paired(rows, one, other, amount)
            x = step + 0.18 * (place - (len(PAIRS) - 1) / 2)
            label = title if step == 0 else None
            axes.errorbar(x, mean, half, fmt="o", color=f"C{place}", capsize=4, label=label)
            seeds = [100 * _differences(row, one, other, str(amount)).mean() for row in rows]
            axes.plot([x] * len(seeds), seeds, "_", color=f"C{place}", alpha=0.6, markersize=9)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(AMOUNTS)), [f"±{amount:.0%}" for amount in AMOUNTS])
    axes.set_xlabel("change of the RoIs")
    axes.set_ylabel("difference of the refined IoU, points")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def tables(rows: list[dict[str, Any]], images: int) -> Iterator[str]:
    """Yields Markdown tables of refined IoU, of paired differences, and of AP75."""
    names = list(rows[0]["iou"])
    yield f"Refined IoU in points, mean ± sd of {len(rows)} seeds, {images} images:"
    yield ""
    yield (
        "| cells in training/at test | "
        + " | ".join(f"RoIs ±{a:.0%}" for a in AMOUNTS)
        + " | AP75, loose |"
    )
    yield "|---|" + "---|" * (len(AMOUNTS) + 1)
    for name in names:
        cells = []
        for amount in AMOUNTS:
            values = [100 * float(np.mean(row["iou"][name][str(amount)])) for row in rows]
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
        values = [row["ap75"][name] for row in rows]
        cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield "Paired differences on the same RoIs, with 95 % intervals over images, or seeds (all):"
    yield ""
    seeds = " | ".join(f"seed {row['seed']}" for row in rows)
    yield f"| difference | RoIs | {seeds} | all |"
    yield "|---|---|" + "---|" * (len(rows) + 1)
    for title, one, other in PAIRS:
        for amount in AMOUNTS:
            differences = [100 * _differences(row, one, other, str(amount)) for row in rows]
            cells = [
                f"{d.mean():+.2f} ± {1.96 * d.std(ddof=1) / len(d) ** 0.5:.2f}" for d in differences
            ]
            mean, half = paired(rows, one, other, amount)
            yield f"| {title} | ±{amount:.0%} | {' | '.join(cells)} | {mean:+.2f} ± {half:.2f} |"


if __name__ == "__main__":
    main()
