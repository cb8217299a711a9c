"""Measures what tiles bring for large images, and augmented views for usual ones, and what both cost.

Scenes of 1500 pixels are drawn as `shapes` draws: objects of 10 to 100 pixels, as in training, and two
that are larger than a tile; or objects of 40 to 250 pixels, which tiles often cut. The rows of a table
take turns image by image, so that other load on the machine falls on all of them. The second table merges
what the same tiles found by other rules and shares. BUNDLE is of `shapes-tiny`, trained on `shapes`:

    python benchmarks/tiles.py bundle --scenes 40 --images 500
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import cv2
import numpy as np
import pycocotools.mask
from numpy.typing import NDArray

from comask.data import shapes
from comask.data.source import ImageInfo, InstanceSource
from comask.evaluate import Truth
from comask.masks import run_length_mask
from comask.runtime import Predictor, tiles, views
from comask.structures import Detections

SIDE, SEED, TEST_SEED = (
    1500,
    6,
    8_000_000,
)  # of scenes in pixels; of scenes; of images no training saw
SMALL, MEDIUM, LARGE = (10.0, 100.0), (40.0, 250.0), (300.0, 900.0)  # diameters in pixels
OBJECTS, LARGE_OBJECTS = 24, 2  # fewer than the 32 that shapes-tiny detects in one view
# An image of 2 x 2 tiles that share a square of 112 pixels, which the object in the middle exceeds.
FOUR_SIDE, FOUR_TILE, FOUR_DIAMETERS = 400, 256, (190.0, 240.0)
METRICS = (
    ("segm", "AP"), ("segm", "APs"), ("segm", "APm"), ("segm", "APl"), ("bbox", "AP"), ("bbox", "APs"),
)  # fmt: skip
Regions = Mapping[tiles.Region, Detections]
Found = tuple[Detections, Regions, float]  # the arguments of `joined`


class Scenes:
    """Large images of the `shapes` kind; an `InstanceSource`."""

    categories = shapes.CATEGORIES

    def __init__(self, count: int, diameters: tuple[float, float], large: int) -> None:
        self._count, self._diameters, self._large = count, diameters, large
        self._drawn: dict[int, tuple[NDArray[np.uint8], list[dict[str, Any]]]] = {}

    def __len__(self) -> int:
        return self._count

    def info(self, index: int) -> ImageInfo:
        """Id, name and size of scene `index`."""
        return ImageInfo(id=index + 1, file_name=f"{index}.png", height=SIDE, width=SIDE)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Scene `index` as u8 [H, W, 3], RGB."""
        return self._scene(index)[0]

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """The objects of scene `index`, with exact RLE masks."""
        return self._scene(index)[1]

    def _scene(self, index: int) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
        if index not in self._drawn:
            rng = np.random.default_rng([SEED, index])
            scene = shapes._Scene(rng, SIDE, SIDE)
            for diameters, count in ((LARGE, self._large), (self._diameters, OBJECTS)):
                with patch.object(shapes, "DIAMETERS", diameters):
                    for _ in range(count):
                        scene.add_object()
            image = cv2.add(
                scene.canvas, shapes._noise(rng, scene.canvas.shape, 2), dtype=cv2.CV_8U
            )
            annotations = []
            for number, (category, _) in enumerate(scene.painted, start=1):
                mask = (scene.owner == number).astype(np.uint8)
                rle = pycocotools.mask.encode(np.asfortranarray(mask))
                ids = {
                    "id": index * 100 + number,
                    "image_id": index + 1,
                    "category_id": category.id,
                }
                bbox = [float(value) for value in cv2.boundingRect(mask)]
                extent = {"bbox": bbox, "area": int(mask.sum()), "iscrowd": 0}
                annotations.append(
                    ids | extent | {"segmentation": rle | {"counts": rle["counts"].decode("ascii")}}
                )
            self._drawn = {index: (np.asarray(image, np.uint8), annotations)}  # one at a time
        return self._drawn[index]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--scenes", type=click.IntRange(1), default=4, show_default=True)
@click.option("--images", type=click.IntRange(1), default=60, show_default=True)
@click.option("--tile", default=256, show_default=True, help="Pixels of a scene.")
@click.option(
    "--tile-short-side", default=192, show_default=True, help="Pixels of a tile's canvas."
)
@click.option("--backend", default="onnxruntime", show_default=True)
def main(
    bundle: Path, scenes: int, images: int, tile: int, tile_short_side: int, backend: str
) -> None:
    """Print three Markdown tables: tiles, rules of merging, augmented views."""

    def load(**settings: Any) -> Predictor:
        return Predictor.load(bundle, backend, device="cpu", **settings)

    for name, source in {
        "10 to 100 pixels and 2 of 300 to 900": Scenes(scenes, SMALL, LARGE_OBJECTS),
        "40 to 250 pixels": Scenes(scenes, MEDIUM, 0),
    }.items():
        in_tiles = f"tiles of {tile} at {tile_short_side}"
        settings: dict[str, dict[str, Any]] = {
            f"one resize to {side}": {"short_side": side} for side in (96, 384, 768, SIDE)
        }
        settings[in_tiles] = {"tile": tile, "short_side": tile_short_side}
        collected: list[Found] = []
        with ExitStack() as stack:
            predictors = {k: stack.enter_context(load(**v)) for k, v in settings.items()}
            stack.enter_context(patch.object(views, "joined", _recording(collected)))
            found, seconds = _in_turns(predictors, source)
        click.echo(f"\n{scenes} scenes of {SIDE}x{SIDE}, objects of {name}, exact ground truth\n")
        click.echo("\n".join(_table(source, found, seconds, in_tiles)))
        click.echo("\nthe same tiles, merged by other rules; the first is comask's\n")
        merged, seconds = {}, {}
        for rule, merge in _rules().items():
            started = time.perf_counter()
            merged[rule] = [merge(*of_scene) for of_scene in collected]
            seconds[rule] = [(time.perf_counter() - started) / scenes]
        click.echo("\n".join(_table(source, merged, seconds, next(iter(merged)))))
    with load(tile=FOUR_TILE, short_side=96) as predictor:
        for name, rule in list(_rules().items())[:2]:
            with patch.object(views, "joined", rule):
                found_once, missed, several = _over_four_tiles(predictor, 5 * scenes)
            click.echo(
                f"\n{5 * scenes} images of one object over four tiles, {name}: of detections with a "
                f"score of at least 0.5, one and right in {found_once}, none in {missed}, several in "
                f"{several}"
            )
    source = shapes.ShapesSource(num_images=images, seed=TEST_SEED)
    variants = ("", "flip", "vflip", "flip,vflip", "scale", "flip,scale", "flip,vflip,scale")
    with ExitStack() as stack:
        predictors = {
            tta or "one view": stack.enter_context(load(tta=tta.split(",") if tta else ()))
            for tta in variants
        }
        found, seconds = _in_turns(predictors, source)
    click.echo(f"\n{images} images of shapes, augmented views\n")
    click.echo("\n".join(_table(source, found, seconds, "one view")))


def _over_four_tiles(predictor: Predictor, count: int) -> tuple[int, int, int]:
    """Counts images whose only object, cut by every tile, is found once, not at all, or in pieces."""
    once, missed, several = 0, 0, 0
    for index in range(count):
        rng = np.random.default_rng([SEED, 1, index])
        scene = shapes._Scene(rng, FOUR_SIDE, FOUR_SIDE)
        category = shapes.CATEGORIES[rng.integers(len(shapes.CATEGORIES))]
        stamp = shapes._random_stamp(rng, category, FOUR_DIAMETERS)
        corner = (FOUR_SIDE - np.array(stamp.shape)) // 2
        scene.painted.append((category, False))
        scene._paint(category, *scene._under(stamp, *corner.tolist()))
        found = predictor(scene.canvas.clip(0, 255).astype(np.uint8))
        good = found[found.scores >= 0.5]
        truth = scene.owner == 1
        right = [(m & truth).sum() >= 0.5 * (m | truth).sum() for m in good.masks]
        once += len(good) == 1 and right[0]
        missed += not len(good)
        several += len(good) > 1
    return int(once), missed, several


def _in_turns(
    predictors: Mapping[str, Predictor], source: InstanceSource
) -> tuple[dict[str, list[Detections]], dict[str, list[float]]]:
    """Runs all images on all predictors, in turns; returns detections and seconds of each image."""
    found: dict[str, list[Detections]] = {name: [] for name in predictors}
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    for index in range(len(source)):
        image = source.image(index)
        for name, predictor in predictors.items():
            started = time.perf_counter()
            found[name].append(predictor(image))
            found[name][-1].to_rle()  # pasting and encoding, which every result needs
            seconds[name].append(time.perf_counter() - started)
    return found, seconds


def _table(
    source: InstanceSource,
    found: Mapping[str, Sequence[Detections]],
    seconds: Mapping[str, Sequence[float]],
    reference: str,
) -> Iterator[str]:
    """Yields a Markdown table of AP in points, seconds and their ratio to a reference's."""
    truth = Truth(source, list(range(len(source))))
    titles = [f"{'mask' if task == 'segm' else 'box'} {metric}" for task, metric in METRICS]
    yield f"| | {' | '.join(titles)} | detections | s per image | time |"
    yield "|---" * (len(titles) + 4) + "|"
    for name, of_images in found.items():
        results = [
            row
            for i, of_image in enumerate(of_images)
            for row in of_image.to_coco(source.info(i).id)
        ]
        values = truth.score(results).values
        cells = [100 * values[task][metric] for task, metric in METRICS]
        texts = [f"{value:.1f}" if value >= 0 else "n/a" for value in cells]
        ratio = statistics.median(np.divide(seconds[name], seconds[reference]).tolist())
        spent = statistics.median(seconds[name])
        yield f"| {name} | {' | '.join(texts)} | {len(results)} | {spent:.3g} | {ratio:.2f} |"


def _recording(collected: list[Found]) -> Callable[..., Detections]:
    """Returns `joined`, which also keeps what it was given."""

    def run(whole: Detections, of_tiles: Regions, scale: float) -> Detections:
        collected.append((whole, of_tiles, scale))
        return tiles.joined(whole, of_tiles, scale)

    return run


def _rules() -> dict[str, Callable[[Detections, Regions, float], Detections]]:
    """Returns rules of merging, comask's first."""

    def with_shares(**shares: float) -> Callable[..., Detections]:
        def run(*found: Any) -> Detections:
            with patch.multiple(tiles, **shares):
                return tiles.joined(*found)

        return run

    def tiles_alone(whole: Detections, of_tiles: Regions, scale: float) -> Detections:
        return tiles.joined(whole[:0], of_tiles, scale)

    return {
        "masks where regions overlap": tiles.joined,
        "tiles without the whole image": tiles_alone,
        **{f"SAME = {share}": with_shares(SAME=share) for share in (0.3, 0.4, 0.6)},
        **{f"MOST = {share}": with_shares(MOST=share) for share in (0.6, 0.9)},
        **{f"FULL = {share}": with_shares(FULL=share) for share in (0.2, 0.6, 0.8)},
        "NMS of boxes, IoU 0.5": _nms,
        "greedy, union, boxes' intersection over the smaller 0.5 (SAHI)": _sahi,
    }


def _nms(whole: Detections, of_tiles: Regions, scale: float) -> Detections:
    """Keeps the best of boxes of one class whose IoU exceeds 0.5."""
    return _greedy(whole, of_tiles, smaller=False)


def _sahi(whole: Detections, of_tiles: Regions, scale: float) -> Detections:
    """Unites boxes and masks of one class with the best whose box they overlap."""
    return _greedy(whole, of_tiles, smaller=True)


def _greedy(whole: Detections, of_tiles: Regions, *, smaller: bool) -> Detections:
    height, width = whole.image_size
    regions = {(0, 0, width, height): whole, **of_tiles}
    members = [(region, found, i) for region, found in regions.items() for i in range(len(found))]
    boxes = np.concatenate(
        [f.boxes_xyxy + np.array(r[:2] * 2, np.float64) for r, f in regions.items()]
    )
    scores = np.concatenate([found.scores for found in regions.values()])
    labels = np.concatenate([found.labels for found in regions.values()])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    left = np.argsort(-scores, kind="stable")
    kept, corners, masks = [], [], []
    while len(left):
        best = left[0]
        low = np.maximum(boxes[left, :2], boxes[best, :2])
        both = (np.minimum(boxes[left, 2:], boxes[best, 2:]) - low).clip(0).prod(axis=1)
        over = np.minimum(areas[left], areas[best]) if smaller else areas[left] + areas[best] - both
        group = (labels[left] == labels[best]) & (both > 0.5 * over)
        group[0] = True
        chosen = left[group] if smaller else left[:1]
        crops = [(members[m][0], members[m][1].crop(members[m][2])) for m in chosen]
        dense = np.zeros((height, width), np.bool_)
        for (x, y, _, _), (left_, top, crop) in crops:
            rows, columns = crop.shape
            dense[y + top : y + top + rows, x + left_ : x + left_ + columns] |= crop
        masks.append(run_length_mask(0, 0, dense, (height, width)))
        corners.append([*boxes[chosen, :2].min(axis=0), *boxes[chosen, 2:].max(axis=0)])
        kept.append(best)
        left = left[~group]
    return Detections(
        boxes_xyxy=np.array(corners, np.float32).reshape(-1, 4),
        scores=scores[kept],
        labels=labels[kept],
        mask_probs=np.zeros((len(kept), 0, 0), np.float32),
        run_length_masks=tuple(masks),
        image_size=(height, width),
        category_ids=whole.category_ids,
    )


if __name__ == "__main__":
    main()
