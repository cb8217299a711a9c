"""Defines `Detections`, the result type of every backend and of `Predictor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comask.errors import NotFiniteError
from comask.masks import (
    paste_mask,
    paste_masks,
    paste_probs,
    resized_mask,
    rles_from_mask_probs,
)
from comask.preprocess import Placement
from comask.segmentation import RunLengthMask

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """The instances found in one image, by falling score.

    The network gives each mask as probabilities over a box. What is merged from several views of an image
    has masks that no such grid expresses, and gives their pixels instead.

    Attributes:
        boxes_xyxy: [N, 4] f32, corners in pixels of the original image.
        scores: [N] f32, probabilities in 0..1.
        labels: [N] i64, classes counted from 0.
        mask_probs: [N, 28, 28] f32, foreground probabilities over the box, in 0..1; [N, 0, 0] with
            `run_length_masks`.
        mask_boxes_xyxy: [N, 4] f32, the boxes over which `mask_probs` lie instead; None for
            `boxes_xyxy`, which are the same unless the model has `second_boxes`.
        image_size: (height, width) of the original image in pixels.
        class_names: the name of each label, or None if unknown.
        category_ids: the data set's id of each label (COCO's have gaps); None stands for label + 1.
        mask_threshold: a pixel belongs to the mask when its probability is at least this.
        run_length_masks: the N masks in pixels of the image, in place of probabilities; else None.

    Raises:
        ValueError: when a field has another shape or dtype than stated here.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    mask_probs: NDArray[np.float32]
    image_size: tuple[int, int]
    class_names: tuple[str, ...] | None = None
    category_ids: tuple[int | str, ...] | None = None
    mask_threshold: float = 0.5
    mask_boxes_xyxy: NDArray[np.float32] | None = None
    run_length_masks: tuple[RunLengthMask, ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.scores)
        expected: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "boxes_xyxy": ((count, 4), np.float32),
            "scores": ((count,), np.float32),
            "labels": ((count,), np.int64),
            "mask_probs": ((count, *self.mask_probs.shape[1:2] * 2), np.float32),
        }
        if self.mask_boxes_xyxy is not None:
            expected["mask_boxes_xyxy"] = (count, 4), np.float32
        for name, (shape, dtype) in expected.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"Detections.{name}: expected {np.dtype(dtype)} {shape} for {count} scores, "
                    f"got {array.dtype} {array.shape}"
                )
        self._check_run_length_masks()
        if min(self.image_size) < 1:
            raise ValueError(f"Detections.image_size: expected (h, w) ≥ 1, got {self.image_size}")
        names = self.class_names
        if (
            names is not None
            and count
            and not 0 <= self.labels.min() <= self.labels.max() < len(names)
        ):
            raise ValueError(f"Detections.labels: expected 0..{len(names) - 1}, got {self.labels}")

    def _check_run_length_masks(self) -> None:
        masks = self.run_length_masks
        if masks is None:
            return
        if self.mask_probs.size or self.mask_boxes_xyxy is not None:
            raise ValueError(
                "Detections.run_length_masks: expected mask_probs [N, 0, 0] and no mask_boxes_xyxy with "
                f"them, got mask_probs {self.mask_probs.shape}"
            )
        sizes = [mask.size for mask in masks]
        if sizes != [self.image_size] * len(self):
            raise ValueError(
                f"Detections.run_length_masks: expected {len(self)} of {self.image_size} pixels, got "
                f"{len(sizes)} of {sorted(set(sizes))}"
            )

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: slice | NDArray[np.bool_] | NDArray[np.intp]) -> Detections:
        """Returns the detections that `index`, a slice, a mask or an array of indices, selects."""
        places, masks = np.arange(len(self))[index], self.run_length_masks
        chosen = Detections(
            boxes_xyxy=self.boxes_xyxy[index],
            scores=self.scores[index],
            labels=self.labels[index],
            mask_probs=self.mask_probs[index],
            image_size=self.image_size,
            class_names=self.class_names,
            category_ids=self.category_ids,
            mask_threshold=self.mask_threshold,
            mask_boxes_xyxy=None if self.mask_boxes_xyxy is None else self.mask_boxes_xyxy[index],
            run_length_masks=None if masks is None else tuple(masks[i] for i in places),
        )
        return chosen.with_rles([self._rles[i] for i in places]) if self.has_rles else chosen

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """The masks as [N, H, W] bool of the original image, which are pasted at the first access."""
        if self.run_length_masks is not None:
            masks = [mask.bitmap() for mask in self.run_length_masks]
            return np.array(masks, np.bool_).reshape(-1, *self.image_size)
        return paste_masks(self.mask_probs, self._frames, self.image_size, self.mask_threshold)

    @property
    def _frames(self) -> NDArray[np.float32]:
        """The boxes over which the masks lie."""
        return self.boxes_xyxy if self.mask_boxes_xyxy is None else self.mask_boxes_xyxy

    def reach(self, threshold: float | Sequence[float]) -> NDArray[np.bool_]:
        """Returns [N] bool, whether each score reaches the threshold: of all classes, or of its label."""
        limits = np.array(threshold, np.float32)
        reached: NDArray[np.bool_] = self.scores >= (limits[self.labels] if limits.ndim else limits)
        return reached

    def crop(self, index: int) -> tuple[int, int, NDArray[np.bool_]]:
        """Returns one mask, cut to the part of the image that it can touch; `masks` has whole images.

        Returns:
            (x, y, mask): `mask` is [h, w] bool, its top left pixel lies at (x, y) of the image.
        """
        if self.run_length_masks is not None:
            return self.run_length_masks[index].crop()
        box = self._frames[index].tolist()
        return paste_mask(self.mask_probs[index], box, self.image_size, self.mask_threshold)

    def crop_probs(self, index: int) -> tuple[int, int, NDArray[np.float32]]:
        """Returns one mask's probabilities at the pixels that it can touch.

        Returns:
            (x, y, probs): `probs` is [h, w] f32 in 0..1, its top left pixel lies at (x, y) of the image.
            Masks without probabilities have 1 and 0.
        """
        if self.run_length_masks is not None:
            x, y, mask = self.run_length_masks[index].crop()
            return x, y, mask.astype(np.float32)
        return paste_probs(self.mask_probs[index], self._frames[index].tolist(), self.image_size)

    def with_instances(
        self,
        boxes_xyxy: NDArray[np.floating],
        scores: NDArray[np.floating],
        labels: NDArray[np.int64],
        masks: Sequence[RunLengthMask],
    ) -> Detections:
        """Returns other instances of the same image and classes, by falling score.

        Args:
            boxes_xyxy: [N, 4], corners in pixels of the image.
            scores: [N], probabilities in 0..1, in any order.
            labels: [N] i64, classes counted from 0.
            masks: N masks of the image.
        """
        order = np.argsort(-scores, kind="stable")
        return replace(
            self,
            boxes_xyxy=boxes_xyxy[order].astype(np.float32),
            scores=scores[order].astype(np.float32),
            labels=labels[order],
            mask_probs=np.zeros((len(masks), 0, 0), np.float32),
            mask_boxes_xyxy=None,
            run_length_masks=tuple(masks[i] for i in order),
        )

    def resized(self, image_size: tuple[int, int]) -> Detections:
        """Returns the detections in the image when it is resized to (height, width)."""
        (height, width), (h, w) = image_size, self.image_size
        factors = np.array([width / w, height / h] * 2, np.float32)
        frames, masks = self.mask_boxes_xyxy, self.run_length_masks
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy * factors,
            mask_boxes_xyxy=None if frames is None else frames * factors,
            run_length_masks=masks and tuple(resized_mask(mask, image_size) for mask in masks),
            image_size=image_size,
        )

    def name(self, label: int) -> str:
        """Returns the name of class `label`, or its number if names are unknown."""
        return self.class_names[label] if self.class_names else str(label)

    def to_rle(self) -> list[dict[str, Any]]:
        """Returns a COCO RLE (`size`, `counts` as str) per instance, as pycocotools encodes `masks`."""
        return [dict(rle) for rle in self._rles]

    @cached_property
    def _rles(self) -> Sequence[dict[str, Any]]:
        # This is not a field, since `dataclasses.replace` would copy the RLEs to other masks.
        if self.run_length_masks is not None:
            return [mask.to_coco() for mask in self.run_length_masks]
        return rles_from_mask_probs(
            self.mask_probs, self._frames, self.image_size, self.mask_threshold
        )

    @property
    def has_rles(self) -> bool:
        """Whether the RLEs are known already, so that `to_rle` and `to_coco` need not compute them."""
        return "_rles" in self.__dict__

    def with_rles(self, rles: Sequence[dict[str, Any]]) -> Detections:
        """Returns a copy with RLEs that were computed elsewhere; copies with other fields drop them.

        Args:
            rles: one per instance, equal to the result of `to_rle`.

        Raises:
            ValueError: when their number differs from the number of instances.
        """
        if len(rles) != len(self):
            raise ValueError(f"Detections.with_rles: expected {len(self)} RLEs, got {len(rles)}")
        same = replace(self)
        same.__dict__["_rles"] = rles
        return same

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Returns COCO results: `image_id`, `category_id`, `bbox` (xywh), `score`, `segmentation`."""
        ids: Sequence[int | str] | None = self.category_ids
        results = []
        for box, score, label, rle in zip(
            self.boxes_xyxy.astype(float), self.scores, self.labels, self.to_rle(), strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            results.append(
                {
                    "image_id": image_id,
                    "category_id": ids[label] if ids else int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": float(score),
                    "segmentation": rle,
                }
            )
        return results

    def to_supervision(self) -> supervision.Detections:
        """Converts to `supervision.Detections`; needs the package `supervision`."""
        import supervision

        return supervision.Detections(
            xyxy=self.boxes_xyxy,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array([self.name(int(label)) for label in self.labels])},
        )


def detections_from_outputs(
    outputs: Mapping[str, NDArray[np.generic]],
    placements: Sequence[Placement],
    *,
    class_names: tuple[str, ...] | None = None,
    category_ids: tuple[int | str, ...] | None = None,
    mask_threshold: float = 0.5,
) -> list[Detections]:
    """Returns one `Detections` per image.

    Args:
        outputs: `num_detections` [B], `boxes` [B, D, 4] f32 `xyxy` in pixels of the resized image,
            `scores` [B, D], `labels` [B, D], `masks` [B, D, 28, 28]; and `mask_boxes` [B, D, 4] if the
            masks lie over other boxes.
        placements: the placements of the B images on their canvases.
        class_names: as in `Detections`.
        category_ids: as in `Detections`.
        mask_threshold: as in `Detections`.

    Raises:
        NotFiniteError: when a detection has values that are not finite.
    """
    results = []
    for i, placement in enumerate(placements):
        count = count_detections(outputs, i)
        for name in ("boxes", "scores", "masks", "mask_boxes"):
            if name in outputs:
                require_finite(f"stage 2's {name}", outputs[name][i, :count])
        scale_y, scale_x = placement.scale
        scale = np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32)
        boxes = {
            name: np.asarray(outputs[name][i, :count], dtype=np.float32) / scale
            for name in ("boxes", "mask_boxes")
            if name in outputs
        }
        results.append(
            Detections(
                boxes_xyxy=boxes["boxes"],
                mask_boxes_xyxy=boxes.get("mask_boxes"),
                scores=np.array(outputs["scores"][i, :count], dtype=np.float32),
                labels=np.array(outputs["labels"][i, :count], dtype=np.int64),
                mask_probs=np.array(outputs["masks"][i, :count], dtype=np.float32),
                image_size=placement.original_size,
                class_names=class_names,
                category_ids=category_ids,
                mask_threshold=mask_threshold,
            )
        )
    return results


def count_detections(outputs: Mapping[str, NDArray[np.generic]], image: int) -> int:
    """Returns the number of detections of one image of a batch.

    Raises:
        NotFiniteError: when the image's scores are not finite; stage 2 then gives a count of -1.
    """
    count = int(outputs["num_detections"][image])
    if count < 0:
        raise _not_finite("stage 2's class scores, or the proposals it was given,")
    return count


def require_finite(name: str, values: NDArray[np.generic]) -> None:
    """Checks that a backend computed finite values only.

    Raises:
        NotFiniteError: when a value is NaN or infinite; the text begins with `name`.
    """
    if not np.isfinite(values).all():
        raise _not_finite(name)


def _not_finite(name: str) -> NotFiniteError:
    return NotFiniteError(
        f"{name} are not finite, so the precision or the weights cannot be trusted: use fp32 if the "
        f"precision is lower; comask eval names the first layer whose values are not finite"
    )
