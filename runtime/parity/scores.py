"""Scores a backend: AP of its detections, also before the second stage refines them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.bundle import Manifest
from comask.data.source import Id, ImageInfo, InstanceSource
from comask.errors import DataError, one_line
from comask.evaluate import CocoMetrics, Truth, coco_results
from comask.files import parse_json
from comask.preprocess import Prepared
from comask.progress import Progress
from comask.runtime.predictor import Predictor
from comask.segmentation import read_segmentation
from comask.structures import Detections

Results = list[list[dict[str, Any]]]  # COCO results of each image, with the data's ids

LARGEST = 1e9  # for pixels and scores; integers beyond may not even fit a float
FIELDS = ("image_id", "category_id", "bbox", "score", "segmentation")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One backend's results and their AP.

    Attributes:
        final: AP of its detections.
        first: AP of the proposals' boxes and the coarse masks; None if the backend does not return them.
        plain: AP of the boxes for which all cells count alike; None if the backend does not return them.
        results: COCO results of each image.
        truth: the ground truth of those images, which are the ones that could be decoded.
    """

    final: CocoMetrics
    first: CocoMetrics | None = None
    plain: CocoMetrics | None = None
    results: Results
    truth: Truth


def labels_in_data(manifest: Manifest, source: InstanceSource) -> NDArray[np.int64]:
    """Returns the data's label for each of the bundle's labels, matched by class name.

    The bundle may lack classes of the data that have no objects, because training leaves them out.

    Raises:
        DataError: if the two do not name the same classes.
    """
    theirs = {category.name: label for label, category in enumerate(source.categories)}
    ours = [category.name for category in manifest.categories]
    # by id; unknown in sources that make images on the fly
    objects = getattr(source, "objects", None)
    empty = {c.name for c in source.categories if objects is not None and not objects.get(c.id)}
    missing, surplus = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if not missing:
        surplus = [name for name in surplus if name not in empty]
    if missing or surplus:
        raise DataError(
            f"the data's categories are not the bundle's: of the bundle's {len(ours)} the data lack "
            f"{_first(missing)}, of the data's {len(theirs)} the bundle lacks {_first(surplus)}; "
            "evaluate on data with the classes that were trained"
        )
    return np.array([theirs[name] for name in ours], dtype=np.int64)


def _first(names: list[str]) -> str:
    """Returns the number of names and the first of them, as a text."""
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} ({shown})" if names else "none"


def detect(
    predictor: Predictor,
    source: InstanceSource,
    indices: Sequence[int],
    title: str,
    *,
    quiet: bool = False,
) -> Iterator[tuple[int, Mapping[str, Detections]]]:
    """Yields the detections in a data set's images; images that cannot be decoded are logged and skipped.

    Args:
        predictor: the predictor to run.
        source: the data set.
        indices: the images' indices.
        title: the title of the progress bar.
        quiet: whether to show no progress.

    Yields:
        an image's index and its detections at each point of `FOUND_AT` that the backend returns.

    Raises:
        ComaskError: if the backend fails.
    """
    with Progress(title, len(indices), unit="images", quiet=quiet) as progress:
        for result in predictor.map(indices, source.image, isolate=False):
            if result.error:
                logger.warning("skipped: %s", one_line(result.error))
            else:
                yield result.item, result.stages
            progress.advance()


def with_labels(detections: Detections, labels: NDArray[np.int64]) -> Detections:
    """Returns detections with the data's labels in place of the bundle's; see `labels_in_data`."""
    return dataclasses.replace(detections, labels=labels[detections.labels], class_names=None)


def score_backend(
    predictor: Predictor, truth: Truth, labels: NDArray[np.int64], detections: int, title: str
) -> Scores:
    """Runs a predictor on the images of a ground truth and scores its detections.

    Images that cannot be decoded are logged and not scored.

    Args:
        predictor: the predictor to score.
        truth: the ground truth.
        labels: see `labels_in_data`.
        detections: the largest number of detections per image that the model returns.
        title: the title of the progress bar.

    Raises:
        DataError: if no image can be decoded.
    """
    results: dict[str, Results] = {"final": []}
    scored: list[int] = []
    for index, stages in detect(predictor, truth.source, truth.indices, title):
        for stage, found in stages.items():
            known = with_labels(found, labels)
            results.setdefault(stage, []).append(coco_results(truth.source, index, known))
        scored.append(index)
    truth = truth.of(scored)
    metrics = {
        stage: truth.score(flat(rows), detections=detections) for stage, rows in results.items()
    }
    return Scores(**metrics, results=results["final"], truth=truth)


def image_results(
    predictor: Predictor,
    source: InstanceSource,
    indices: Sequence[int],
    prepared: Sequence[Prepared],
    labels: NDArray[np.int64],
) -> dict[str, Results]:
    """Returns the COCO results of images for each stage that the backend returns; see `FOUND_AT`.

    Args:
        predictor: the predictor to run.
        source: the data set.
        indices: the images' indices.
        prepared: the prepared images.
        labels: see `labels_in_data`.
    """
    results: dict[str, Results] = {"final": [[] for _ in prepared]}
    for place, stages in enumerate(predictor.predict_stages(prepared)):
        for stage, found in stages.items():
            rows = results.setdefault(stage, [[] for _ in prepared])
            rows[place] = coco_results(source, indices[place], with_labels(found, labels))
    return results


def flat(results: Results) -> list[dict[str, Any]]:
    """Returns the results of all images in one list."""
    return [result for image in results for result in image]


def read_results(path: Path, source: InstanceSource, indices: Sequence[int]) -> Results:
    """Reads the COCO results of a data set's images; results of other images are left out.

    Results of categories that the data lack are kept; they match nothing.

    Raises:
        DataError: if the file does not hold such results; the text names entry and field.
    """
    try:
        entries = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"--results {path}: cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise DataError(f"--results {path}: expected a list of COCO results")
    infos = {info.id: info for info in map(source.info, indices)}
    results: dict[Id, list[dict[str, Any]]] = {number: [] for number in infos}
    for number, entry in enumerate(entries):
        try:
            checked = _checked(entry, infos)
        except DataError as error:
            raise DataError(f"--results {path}: entry {number}: {error}") from error
        if checked is not None:
            results[checked["image_id"]].append(checked)
    if entries and not any(results.values()):
        raise DataError(f"--results {path}: holds nothing on the {len(indices)} images evaluated")
    return [results[source.info(index).id] for index in indices]


def _checked(entry: object, infos: dict[Id, ImageInfo]) -> dict[str, Any] | None:
    """Checks an entry and returns it with its mask as compressed RLE; None if its image is another."""
    if not isinstance(entry, dict):
        raise DataError(f"expected an object, got {entry!r:.80}")
    if missing := [name for name in FIELDS if name not in entry]:
        raise DataError(f"has no {missing[0]}; it needs {', '.join(FIELDS)}")
    for name in ("image_id", "category_id"):
        if type(entry[name]) not in (int, str):
            raise DataError(f"{name}: expected an integer or a string, got {entry[name]!r:.80}")
    if not _is_number(entry["score"]):
        raise DataError(f"score: expected a number, got {entry['score']!r:.80}")
    box = entry["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise DataError(f"bbox: expected four numbers x, y, width, height, got {box!r:.80}")
    if entry["image_id"] not in infos:
        return None
    info = infos[entry["image_id"]]
    mask = read_segmentation(entry["segmentation"], info.height, info.width)
    return {**{name: entry[name] for name in FIELDS}, "segmentation": mask.to_coco()}


def _is_number(value: object) -> bool:
    if type(value) not in (int, float):
        return False
    return -LARGEST <= value <= LARGEST  # type: ignore[operator] # false for NaN, too
