"""AP of a bundle on a data set, for the commands that compare backends or settings."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from comask.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from comask.runtime import Predictor
    from numpy.typing import NDArray

    from comask.bundle import Manifest
    from comask.data.source import InstanceSource
    from comask.evaluate import CocoMetrics


def labels_in_data(manifest: Manifest, source: InstanceSource) -> NDArray[np.int64]:
    """The data's label of each of the bundle's, matched by class name.

    Raises:
        DataError: when the two do not name the same classes.
    """
    import numpy as np

    theirs = {category.name: label for label, category in enumerate(source.categories)}
    ours = [category.name for category in manifest.categories]
    if set(theirs) != set(ours):
        missing, surplus = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        raise DataError(
            f"the data's categories are not the bundle's: not in the data {missing[:5]}, "
            f"not in the bundle {surplus[:5]}; evaluate on data with the classes that were trained"
        )
    return np.array([theirs[name] for name in ours], dtype=np.int64)


def score_predictor(
    predictor: Predictor,
    source: InstanceSource,
    indices: list[int],
    labels: NDArray[np.int64],
    title: str,
) -> CocoMetrics:
    """Runs images of a data set and scores what is found.

    Args:
        predictor: to score.
        source: the data set.
        indices: of the images.
        labels: see `labels_in_data`.
        title: of the progress that is shown.
    """
    from comask.evaluate import evaluate
    from comask.progress import Progress

    found = []
    with Progress(title, len(indices), unit="images") as progress:
        for detections in predictor.map(source.image(i) for i in indices):
            renumbered = labels[detections.labels]
            found.append(dataclasses.replace(detections, labels=renumbered, class_names=None))
            progress.advance()
    return evaluate(source, indices, found)
