"""`Predictor`: takes images and returns `Detections`, on any backend."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import numpy as np
from typing_extensions import override

from comask.bundle import Bundle, Manifest
from comask.config import TILE_OVERLAP, PreprocessConfig, require_count
from comask.errors import ConfigError
from comask.preprocess import ImageLike, Pixels, Placement, Prepared, pixels_of, prepare, stacked
from comask.runtime.backends import LoadOptions, open_stages
from comask.runtime.backends.base import Array, Closing, Stages
from comask.runtime.backends.names import Device
from comask.runtime.images import FOUND_AT, ImagePredictor, ImageResult, ImageRunner, batches
from comask.runtime.stream import SLOTS, StreamSession, WhenFull
from comask.runtime.views import ViewedPredictor, Views
from comask.structures import Detections, detections_from_outputs

Item = TypeVar("Item")

ONE_VIEW = Views()


class Predictor(Closing):
    """Detects the instances in images.

    Threads may share a Predictor. It is a context manager; `close` frees its backend.

    Args:
        stages: the backend.
        preprocess: resize and padding.
        class_names: the name of each label.
        category_ids: the data set's id of each label.
        mask_threshold: a pixel belongs to a mask if its probability is at least this.
        max_batch: the number of images of one canvas that run together; fewer if the backend takes fewer.
        views: which views of an image run in calls and in `map`.

    Raises:
        ConfigError: if `max_batch` is not a whole number from 1 on, or a view's canvas is too large.
    """

    def __init__(
        self,
        stages: Stages,
        preprocess: PreprocessConfig,
        *,
        class_names: tuple[str, ...] | None = None,
        category_ids: tuple[int | str, ...] | None = None,
        mask_threshold: float = 0.5,
        max_batch: int = 8,
        views: Views = ONE_VIEW,
    ) -> None:
        require_count("max_batch", max_batch)
        self.stages = stages
        self.preprocess = preprocess
        self.class_names = class_names
        self.category_ids = category_ids
        self.mask_threshold = mask_threshold
        self._sessions: weakref.WeakSet[StreamSession] = weakref.WeakSet()
        self.max_batch = min(max_batch, stages.largest_batch or max_batch)
        self.views = views
        views.sizes(preprocess)  # an error here comes before any image

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "auto",
        *,
        device: Device = None,
        on_mismatch: Literal["error", "rebuild"] = "error",
        max_batch: int = 8,
        proposals: int | None = None,
        short_side: int | None = None,
        tile: int | None = None,
        tile_overlap: float = TILE_OVERLAP,
        tta: Sequence[str] = (),
    ) -> Predictor:
        """Opens a predictor that runs `bundle`.

        Args:
            bundle: folder that `comask export` wrote.
            backend: `tensorrt`, `tensorrt-rtx`, `onnxruntime`, `openvino` or `torch`, with a precision
                after a colon unless it is fp32; or `auto` for the fastest that runs here.
            device: see `LoadOptions`.
            on_mismatch: `rebuild` builds TensorRT engines that do not fit this machine or bundle again,
                which takes minutes and needs the packages of `comask[export]`.
            max_batch: the number of images of one canvas that run together.
            proposals: the number of an image's best proposals that stage 2 takes, fewer being faster;
                None for as many as the bundle was trained with.
            short_side: length in pixels to which an image's shorter side is resized, shorter being
                faster; the limit of the longer side changes in proportion. None for the bundle's.
            tile: see `Views`; None for whole images.
            tile_overlap: see `Views`.
            tta: see `Views`.

        Raises:
            BundleError: if a file of the bundle is missing or was altered.
            BackendUnavailableError: if the backend's packages, engines or GPU are missing.
            ConfigError: if `device` is invalid, the bundle cannot run with `proposals` or `short_side`,
                `max_batch` is not a whole number from 1 on, or `Views` refuses its values.
            EngineError: if its engines do not fit, or cannot be opened or built.
        """
        options = LoadOptions(
            device=device,
            on_mismatch=on_mismatch,
            max_batch=max_batch,
            proposals=proposals,
            short_side=short_side,
            tile=tile,
            tile_overlap=tile_overlap,
            tta=tta,
        )
        return cls.open(bundle, backend, options)

    @classmethod
    def open(cls, bundle: str | Path, backend: str, options: LoadOptions) -> Predictor:
        """Does the same as `load`, with options in one object."""
        require_count("max_batch", options.max_batch)  # before minutes are spent on engines
        views = Views(tile=options.tile, tile_overlap=options.tile_overlap, tta=options.tta)
        opened = Bundle.open(Path(bundle))
        preprocess = opened.manifest.preprocess
        if options.short_side is not None:
            preprocess = preprocess.resized(options.short_side)
        manifest = dataclasses.replace(opened.manifest, preprocess=preprocess)
        stages = open_stages(opened, backend, options)
        return predictor_from_manifest(stages, manifest, options.max_batch, views)

    @overload
    def __call__(self, images: ImageLike) -> Detections: ...

    @overload
    def __call__(self, images: list[ImageLike]) -> list[Detections]: ...

    def __call__(self, images: Any) -> Detections | list[Detections]:
        """Returns the detections in one image, or those in each image of a list.

        Args:
            images: a path, a Pillow image or a u8 array [h, w, 3] in RGB; or a list of these, of any
                sizes.

        Raises:
            ImageError: if an image cannot be decoded.
            EngineError: if memory runs out.
            NotFiniteError: if the backend computes NaN or infinite values.
        """
        predictor = self._of_views
        several = images if isinstance(images, list) else [images]
        ready = [predictor.prepare(pixels_of(image)) for image in several]
        found = [stages["final"] for stages in predictor.predict_stages(ready)]
        return found if isinstance(images, list) else found[0]

    def map(
        self,
        items: Iterable[Item],
        load: Callable[[Item], ImageLike] | None = None,
        *,
        isolate: bool = True,
    ) -> Iterator[ImageResult[Item]]:
        """Yields the detections in many images, in order, with few images in memory at a time.

        Args:
            items: the images, see `__call__`, or the arguments of `load`.
            load: returns an item's image; its ImageErrors name the image. Several threads call it at
                once.
            isolate: whether an image on which the backend fails gets an `error` in its result while the
                others run, as an image does that cannot be decoded; if False, the error is raised.

        Yields:
            the result of each item; an image that cannot be decoded or run has an `error`.

        Raises:
            Exception: of any kind, if the backend and not an image is to blame.
        """

        def decode(item: Item) -> Pixels:
            return pixels_of(load(item) if load else cast("ImageLike", item))

        return self._runner.run(items, decode, isolate=isolate)

    def check(self) -> None:
        """Runs an image that is known to be valid, to check the backend.

        Raises:
            Exception: of any kind, if it fails; the backend is then to blame.
        """
        self._runner.check()

    @cached_property
    def _runner(self) -> ImageRunner:
        return ImageRunner(self._of_views)

    @property
    def _of_views(self) -> ImagePredictor:
        """What runs the images of calls and of `map`."""
        return ViewedPredictor(self, self.views) if self.views.several else self

    def prepare(self, image: ImageLike) -> Prepared:
        """Decodes (if needed), resizes and pads one image, as one view.

        Raises:
            ImageError: if it cannot be decoded, or is not an image.
        """
        return prepare(pixels_of(image), self.preprocess)

    def predict_prepared(self, prepared: Sequence[Prepared]) -> list[Detections]:
        """Returns the detections in prepared images, in their order."""
        return [stages["final"] for stages in self.predict_stages(prepared)]

    def predict_stages(self, prepared: Sequence[Prepared]) -> list[dict[str, Detections]]:
        """Returns the detections in prepared images, in their order, at each point of `FOUND_AT`.

        All points but `final` need graphs with diagnostics.
        """
        results: list[dict[str, Detections]] = [{} for _ in prepared]
        for indices, outputs in self.outputs(prepared):
            batch = [prepared[i] for i in indices]
            for stage, instead in FOUND_AT.items():
                if instead.get("boxes", "boxes") not in outputs:
                    continue
                changed = {n: outputs[other] for n, other in instead.items() if other in outputs}
                of_batch = self.detections({**outputs, **changed}, batch)
                for i, detections in zip(indices, of_batch, strict=True):
                    if "scores" in changed:  # they are in the order of others
                        detections = detections[np.argsort(-detections.scores, kind="stable")]
                    results[i][stage] = detections
        return results

    def outputs(self, prepared: Sequence[Prepared]) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """Yields each batch's indices in `prepared` and stage 2's outputs for it.

        Only images of one canvas share batches: on another canvas an image would have other borders, and
        so other detections.
        """
        for indices in batches((image.canvas.shape for image in prepared), self.max_batch):
            yield indices, self.stages.run(*stacked([prepared[i] for i in indices]))

    def detections(
        self, outputs: Mapping[str, Array], placements: Sequence[Placement]
    ) -> list[Detections]:
        """Returns stage 2's outputs for the images of a batch as `Detections`."""
        return detections_from_outputs(
            outputs,
            placements,
            class_names=self.class_names,
            category_ids=self.category_ids,
            mask_threshold=self.mask_threshold,
        )

    def stream(
        self,
        cuda_stream: Any = None,
        *,
        when_full: WhenFull = "block",
        timeout: float | None = None,
        slots: int = SLOTS,
        graphs: bool = True,
    ) -> StreamSession:
        """Opens a session for video frames, each in one view, which a GPU reads in the caller's memory.

        Another thread runs the slots' batches one after the other, unless the backend is TensorRT.

        Args:
            cuda_stream: the stream that writes the frames, unless `submit` gets another one: a handle, an
                object with `__cuda_stream__`, or a torch or cupy stream.
            when_full: see `StreamSession`.
            timeout: see `StreamSession`.
            slots: the number of batches that may be in progress at once.
            graphs: whether a GPU backend captures the network as a CUDA graph for shapes that come again.

        Raises:
            ConfigError: see `StreamSession`; or if the predictor was opened for several views.
            EngineError: if memory for the slots runs out.
            KernelError: if the kernel for frames cannot be compiled for the GPU.
        """
        if self.views.several:
            raise ConfigError(
                "tile and tta: streams and videos run each frame whole and once: leave both out"
            )
        session = StreamSession(
            self,
            cuda_stream=cuda_stream,
            when_full=when_full,
            timeout=timeout,
            slots=slots,
            graphs=graphs,
        )
        self._sessions.add(session)
        return session

    @override
    def close(self) -> None:
        """Closes all open sessions, then frees the backend, even if some of that fails."""
        with ExitStack() as stack:
            stack.callback(self.stages.close)
            for session in self._sessions:
                stack.callback(session.close)


def predictor_from_manifest(
    stages: Stages, manifest: Manifest, max_batch: int, views: Views = ONE_VIEW
) -> Predictor:
    """Returns a predictor for opened stages, with everything that a bundle's manifest says of it."""
    return Predictor(
        stages,
        manifest.preprocess,
        class_names=tuple(category.name for category in manifest.categories),
        category_ids=tuple(category.id for category in manifest.categories),
        mask_threshold=manifest.mask_threshold,
        max_batch=max_batch,
        views=views,
    )
