"""Stage 2's padded outputs → `Detections` of each image, in pixels of the original image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from comask.errors import NotFiniteError
from comask.preprocess import Prepared
from comask.structures import Detections


def detections_from_outputs(
    outputs: Mapping[str, NDArray[np.generic]],
    prepared: Sequence[Prepared],
    *,
    class_names: tuple[str, ...] | None = None,
    category_ids: tuple[int | str, ...] | None = None,
    mask_threshold: float = 0.5,
) -> list[Detections]:
    """One `Detections` an image.

    Args:
        outputs: `num_detections` [B], `boxes` [B, D, 4] f32 `xyxy` in pixels of the resized image,
            `scores` [B, D], `labels` [B, D], `masks` [B, D, 28, 28].
        prepared: the B images, for their sizes.
        class_names: see `Detections`.
        category_ids: see `Detections`.
        mask_threshold: see `Detections`.

    Raises:
        NotFiniteError: when what was found is not finite.
    """
    results = []
    for i, image in enumerate(prepared):
        count = count_detections(outputs, i)
        for name in ("boxes", "scores", "masks"):
            require_finite(f"stage 2's {name}", outputs[name][i, :count])
        scale_y, scale_x = image.scale
        scale = np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32)
        results.append(
            Detections(
                boxes_xyxy=np.asarray(outputs["boxes"][i, :count], dtype=np.float32) / scale,
                scores=np.array(outputs["scores"][i, :count], dtype=np.float32),
                labels=np.array(outputs["labels"][i, :count], dtype=np.int64),
                mask_probs=np.array(outputs["masks"][i, :count], dtype=np.float32),
                image_size=image.original_size,
                class_names=class_names,
                category_ids=category_ids,
                mask_threshold=mask_threshold,
            )
        )
    return results


def count_detections(outputs: Mapping[str, NDArray[np.generic]], image: int) -> int:
    """Number of detections of an image of a batch.

    Raises:
        NotFiniteError: its scores are not finite, which stage 2 says by a count of -1.
    """
    count = int(outputs["num_detections"][image])
    if count < 0:
        raise _not_finite("stage 2's class scores, or the proposals it was given,")
    return count


def require_finite(name: str, values: NDArray[np.generic]) -> None:
    """Checks what a backend computed.

    Raises:
        NotFiniteError: there is a NaN or an infinity; the text begins with `name`.
    """
    if not np.isfinite(values).all():
        raise _not_finite(name)


def _not_finite(name: str) -> NotFiniteError:
    return NotFiniteError(
        f"{name} are not finite, so its precision or its weights cannot be trusted: take fp32 if "
        f"it is a lower one; comask-eval names the layer that it begins in"
    )
