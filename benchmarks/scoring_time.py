"""Measures how long a training run waits for AP after each evaluation, without the network's time.

python benchmarks/scoring_time.py --images 5000
python benchmarks/scoring_time.py --images 600 --other "env PYTHONPATH=/tmp/older python"

`--other` is a Python that imports another version of comask. Both versions then score the same files.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

HEIGHT, WIDTH, CLASSES = 480, 640, 80
OBJECTS = 7  # per image, as in COCO's validation set
STAGES = ("final", "first", "plain")  # scored at the end of a run


def outline(rng: np.random.Generator, box: np.ndarray) -> list[float]:
    """Returns a star-like polygon of 24 corners in a box (x, y, w, h)."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = rng.uniform(0.6, 1.0, 24) / 2
    centre, size = box[:2] + box[2:] / 2, box[2:]
    points = centre + size * radius[:, None] * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    return [round(float(value), 2) for value in points.ravel()]


def make(folder: Path, images: int, detections: int) -> None:
    """Writes ground truth and results; each object also is a detection, slightly moved."""
    from pycocotools import mask as coco

    rng = np.random.default_rng(0)
    entries, annotations, results = [], [], []
    for image in range(1, images + 1):
        entries.append({"id": image, "file_name": f"{image}.jpg", "height": HEIGHT, "width": WIDTH})
        found = []
        for number in range(max(detections, OBJECTS)):
            size = np.exp(rng.uniform(np.log(12), np.log(300), 2))
            box = np.concatenate((rng.uniform(0, [WIDTH - 1, HEIGHT - 1] - size / 2), size))
            category = int(rng.integers(1, CLASSES + 1))
            polygon = outline(rng, box)
            if number < OBJECTS:
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": image, "category_id": category,
                     "iscrowd": 0, "area": float(np.prod(size)) * 0.6, "bbox": box.tolist(),
                     "segmentation": [polygon]}
                )  # fmt: skip
                box[:2] += rng.normal(0, 2, 2)
            (rle,) = coco.frPyObjects([outline(rng, box)], HEIGHT, WIDTH)
            rle["counts"] = rle["counts"].decode()
            found.append(
                {"image_id": image, "category_id": category, "bbox": box.tolist(),
                 "score": float(rng.random()), "segmentation": rle}
            )  # fmt: skip
        results += found[:detections]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(results))


def measure(folder: Path) -> dict[str, Any]:
    """Returns this version's seconds for the first, a later and the last evaluation of a run."""
    import comask.evaluate as evaluation
    from comask.data.coco import read_coco

    source = read_coco(folder / "truth.json", folder)
    indices = list(range(len(source)))
    results = json.loads((folder / "results.json").read_text())
    seconds: dict[str, float] = {}
    ap = {}
    if hasattr(evaluation, "Truth"):
        truth = evaluation.Truth(source, indices)
        rounds: Iterable[tuple[str, tuple[str, ...]]] = (
            ("first", STAGES[:1]), ("later", STAGES[:1]), ("last", STAGES),
        )  # fmt: skip
        for name, stages in rounds:
            start = time.perf_counter()
            ap = {stage: truth.score(results).values["segm"]["AP"] for stage in stages}
            seconds[name] = time.perf_counter() - start
    else:  # until 0.1 every evaluation scored two stages and read the ground truth for each
        for name in ("first", "later", "last"):
            start = time.perf_counter()
            ap = {
                stage: evaluation.score(source, indices, results).values["segm"]["AP"]
                for stage in STAGES[:2]
            }
            seconds[name] = time.perf_counter() - start
    return {"seconds": seconds, "ap": ap["final"]}


@click.command()
@click.option(
    "--images", default=5000, show_default=True, help="Number of images; val2017 has 5000."
)
@click.option("--detections", default=100, show_default=True, help="Detections per image.")
@click.option("--other", metavar="COMMAND", help="A Python that imports another comask.")
@click.option("--measure", "folder", type=click.Path(path_type=Path), hidden=True)
def main(images: int, detections: int, other: str | None, folder: Path | None) -> None:
    """Print the seconds of each version and their ratio."""
    if folder is not None:
        print(json.dumps(measure(folder)))
        return
    with TemporaryDirectory() as name:
        make(Path(name), images, detections)
        commands = {"this": [sys.executable]} | ({"other": shlex.split(other)} if other else {})
        found = {
            which: json.loads(
                subprocess.run(
                    [*command, __file__, "--measure", name], check=True, capture_output=True
                ).stdout.splitlines()[-1]
            )
            for which, command in commands.items()
        }
    click.echo(f"{images} images, {detections} detections each; seconds of an evaluation")
    for which, report in found.items():
        times = "  ".join(f"{k} {s:.1f}" for k, s in report["seconds"].items())
        click.echo(f"{which:>6}: {times}  (mask AP {report['ap']:.4f})")
    if other:
        ratios = "  ".join(
            f"{k} {found['other']['seconds'][k] / s:.1f}"
            for k, s in found["this"]["seconds"].items()
        )
        click.echo(f" ratio: {ratios}")


if __name__ == "__main__":
    main()
