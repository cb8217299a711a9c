"""AP of a backend: of its detections, and of what they were before the collaboration refined them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from comask.runtime.predictor import Predictor
from comask.runtime.session import Array
from numpy.typing import NDArray

from comask.bundle import Manifest
from comask.data.source import InstanceSource
from comask.errors import DataError
from comask.evaluate import CocoMetrics, coco_results, score
from comask.preprocess import Prepared
from comask.progress import Progress

Results = list[list[dict[str, Any]]]  # COCO results of each image, with the data's ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What one backend found, and its worth.

    Attributes:
        fine: AP of its detections.
        coarse: AP of the coarse masks on the first boxes; None where the backend does not give them.
        results: COCO results of each image.
    """

    fine: CocoMetrics
    coarse: CocoMetrics | None
    results: Results


def labels_in_data(manifest: Manifest, source: InstanceSource) -> NDArray[np.int64]:
    """The data's label of each of the bundle's, matched by class name.

    Raises:
        DataError: when the two do not name the same classes.
    """
    theirs = {category.name: label for label, category in enumerate(source.categories)}
    ours = [category.name for category in manifest.categories]
    if set(theirs) != set(ours):
        missing, surplus = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        raise DataError(
            f"the data's categories are not the bundle's: of the bundle's {len(ours)} the data lack "
            f"{_first(missing)}, of the data's {len(theirs)} the bundle lacks {_first(surplus)}; "
            "evaluate on data with the classes that were trained"
        )
    return np.array([theirs[name] for name in ours], dtype=np.int64)


def _first(names: list[str]) -> str:
    """How many, and some of them."""
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} ({shown})" if names else "none"


def score_backend(
    predictor: Predictor,
    source: InstanceSource,
    indices: Sequence[int],
    labels: NDArray[np.int64],
    title: str,
) -> Scores:
    """Runs images of a data set and scores what is found.

    Args:
        predictor: to score.
        source: the data set.
        indices: of the images.
        labels: see `labels_in_data`.
        title: of the progress that is shown.
    """
    fine: Results = []
    coarse: Results = []
    chunk = 2 * predictor.max_batch  # a full batch of each of two canvases
    with Progress(title, len(indices), unit="images") as progress:
        for start in range(0, len(indices), chunk):
            places = list(indices[start : start + chunk])
            prepared = [predictor.prepare(source.image(i)) for i in places]
            found, first = image_results(predictor, source, places, prepared, labels)
            fine += found
            coarse += first
            for _ in places:
                progress.advance()
    flat = [result for image in coarse for result in image]
    return Scores(
        fine=score_results(source, indices, fine),
        coarse=score(source, list(indices), flat) if coarse else None,
        results=fine,
    )


def image_results(
    predictor: Predictor,
    source: InstanceSource,
    indices: Sequence[int],
    prepared: Sequence[Prepared],
    labels: NDArray[np.int64],
) -> tuple[Results, Results]:
    """COCO results of images, and of their unrefined detections (empty where there are none).

    Args:
        predictor: to run.
        source: of the images.
        indices: of the images.
        prepared: those images.
        labels: see `score_backend`.
    """
    fine: Results = [[] for _ in prepared]
    coarse: Results = [[] for _ in prepared]
    gives_coarse = False

    def put(into: Results, places: Sequence[int], outputs: Mapping[str, Array]) -> None:
        batch = [prepared[i] for i in places]
        for i, found in zip(places, predictor.detections(outputs, batch), strict=True):
            known = dataclasses.replace(found, labels=labels[found.labels], class_names=None)
            into[i] = coco_results(source, indices[i], known)

    for places, outputs in predictor.outputs(prepared):
        put(fine, places, outputs)
        if gives_coarse := {"first_boxes", "coarse_masks"} <= outputs.keys():
            before = {"boxes": outputs["first_boxes"], "masks": outputs["coarse_masks"]}
            put(coarse, places, {**outputs, **before})
    return fine, coarse if gives_coarse else []


def score_results(source: InstanceSource, indices: Sequence[int], results: Results) -> CocoMetrics:
    """AP of COCO results, image by image."""
    return score(source, list(indices), [result for image in results for result in image])
