"""`Predictor`: images in, `Detections` out, whatever runs in between."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import numpy as np

from comask.config import PreprocessConfig, require_count
from comask.preprocess import ImageLike, Pixels, Placement, Prepared, pixels_of, prepare
from comask.runtime.backends import LoadOptions, open_stages
from comask.runtime.backends.base import Array, Closing, Stages
from comask.runtime.images import FOUND_AT, ImageResult, ImageRunner, batches
from comask.runtime.stream import SLOTS, StreamSession, WhenFull
from comask.structures import Detections, detections_from_outputs

Item = TypeVar("Item")


class Predictor(Closing):
    """Finds the instances in images.

    One Predictor may be shared by threads. It is a context manager; `close` frees its backend.

    Args:
        stages: the backend.
        preprocess: resize and padding.
        class_names: of the labels.
        category_ids: of the labels in the data set's numbering.
        mask_threshold: a pixel belongs to the mask when its probability is at least this.
        max_batch: images of one canvas that run together, fewer where the backend takes fewer.

    Raises:
        ConfigError: `max_batch` is no whole number from 1 on.
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
    ) -> None:
        require_count("max_batch", max_batch)
        self.stages = stages
        self.preprocess = preprocess
        self.class_names = class_names
        self.category_ids = category_ids
        self.mask_threshold = mask_threshold
        self._sessions: weakref.WeakSet[StreamSession] = weakref.WeakSet()
        self.max_batch = min(max_batch, stages.largest_batch or max_batch)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "auto",
        *,
        device: int | Literal["cpu"] | None = None,
        on_mismatch: Literal["error", "rebuild"] = "error",
        max_batch: int = 8,
        proposals: int | None = None,
        short_side: int | None = None,
    ) -> Predictor:
        """A predictor that runs `bundle`.

        Args:
            bundle: folder that `comask-export` wrote.
            backend: `tensorrt`, `tensorrt-rtx`, `onnxruntime`, `torch`, each with a precision behind a
                colon where it is not fp32, or `auto` for the fastest that runs here.
            device: index of the GPU, or `cpu`; None for the first GPU where the backend can use one.
            on_mismatch: when TensorRT engines do not fit this machine or bundle, `rebuild` builds them
                again first, which takes minutes and the packages of `comask[export]`.
            max_batch: images of one canvas that run together.
            proposals: of an image's, stage 2 looks at so many of the best, which is faster where they
                are fewer; None for as many as the bundle was trained for.
            short_side: images are resized to this, in pixels, in place of the bundle's; the limit of
                the longer side changes in proportion. Smaller is faster.

        Raises:
            BundleError: when a file of the bundle is missing or altered.
            BackendUnavailableError: when the backend's packages, engines or GPU are missing.
            ConfigError: when `device` is none, `proposals` or `short_side` is none that the bundle can
                run with, or `max_batch` is no whole number from 1 on.
            EngineError: when its engines do not fit, or cannot be opened or built.
        """
        options = LoadOptions(
            device=device,
            on_mismatch=on_mismatch,
            max_batch=max_batch,
            proposals=proposals,
            short_side=short_side,
        )
        return cls.open(bundle, backend, options)

    @classmethod
    def open(cls, bundle: str | Path, backend: str, options: LoadOptions) -> Predictor:
        """The same as `load`, by options that are there already."""
        from comask.bundle import Bundle

        require_count("max_batch", options.max_batch)  # before minutes are spent on engines
        opened = Bundle.open(Path(bundle))
        preprocess = opened.manifest.preprocess
        if options.short_side is not None:
            preprocess = preprocess.resized(options.short_side)
        return cls(
            open_stages(opened, backend, options),
            preprocess,
            class_names=tuple(c.name for c in opened.manifest.categories),
            category_ids=tuple(c.id for c in opened.manifest.categories),
            mask_threshold=opened.manifest.mask_threshold,
            max_batch=options.max_batch,
        )

    @overload
    def __call__(self, images: ImageLike) -> Detections: ...

    @overload
    def __call__(self, images: list[ImageLike]) -> list[Detections]: ...

    def __call__(self, images: Any) -> Detections | list[Detections]:
        """Detections of one image, or of each of a list.

        Args:
            images: a path, a Pillow image or a u8 array [h, w, 3] in RGB; or a list of those, of any
                sizes.

        Raises:
            ImageError: when one cannot be decoded.
            EngineError: when there is no memory.
            NotFiniteError: when the backend gives NaN or infinities.
        """
        if isinstance(images, list):
            return self.predict_prepared([self.prepare(image) for image in images])
        return self.predict_prepared([self.prepare(images)])[0]

    def map(
        self,
        items: Iterable[Item],
        load: Callable[[Item], ImageLike] | None = None,
        *,
        isolate: bool = True,
    ) -> Iterator[ImageResult[Item]]:
        """Detections of many images, in order, with few of them in memory at a time.

        Args:
            items: the images, see `__call__`, or whatever `load` makes an image of.
            load: gives an item's image; its ImageErrors name the image.
            isolate: an image at which the backend fails while others run gets an error of its own, as one
                that cannot be decoded does; False: the backend's error is raised.

        Yields:
            the result of each item; an image that cannot be decoded or run has an `error`.

        Raises:
            Exception: of any kind, when the backend is to blame and not an image.
        """

        def decode(item: Item) -> Pixels:
            return pixels_of(load(item) if load else cast("ImageLike", item))

        return self._runner.run(items, decode, isolate=isolate)

    def check(self) -> None:
        """Runs an image that is known to be sound.

        Raises:
            Exception: of any kind, when that is impossible: the backend is to blame for a failure.
        """
        self._runner.check()

    @cached_property
    def _runner(self) -> ImageRunner:
        return ImageRunner(self)

    def prepare(self, image: ImageLike) -> Prepared:
        """Decodes (where needed), resizes and pads one image.

        Raises:
            ImageError: when it cannot be decoded, or is not an image.
        """
        return prepare(pixels_of(image), self.preprocess)

    def predict_prepared(self, prepared: Sequence[Prepared]) -> list[Detections]:
        """Detections in the order of `prepared`."""
        return [stages["final"] for stages in self.predict_stages(prepared)]

    def predict_stages(self, prepared: Sequence[Prepared]) -> list[dict[str, Detections]]:
        """Detections at each point of `FOUND_AT`, in the order of `prepared`.

        All but `final` need graphs with diagnostics.
        """
        results: list[dict[str, Detections]] = [{} for _ in prepared]
        for indices, outputs in self.outputs(prepared):
            batch = [prepared[i] for i in indices]
            for stage, instead in FOUND_AT.items():
                if not outputs.keys() >= set(instead.values()):
                    continue
                changed = {name: outputs[other] for name, other in instead.items()}
                found = self.detections({**outputs, **changed}, batch)
                for i, detections in zip(indices, found, strict=True):
                    results[i][stage] = detections
        return results

    def outputs(self, prepared: Sequence[Prepared]) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """What stage 2 returns for each batch, and the batch's indices in `prepared`.

        Images of one canvas share batches. Only those: on another canvas an image has other borders,
        so other detections.
        """
        for indices in batches((image.canvas.shape for image in prepared), self.max_batch):
            sizes = np.array([prepared[i].size for i in indices], dtype=np.int32)
            images = np.stack([prepared[i].canvas for i in indices])
            yield indices, self.stages.run(images, sizes)

    def detections(
        self, outputs: Mapping[str, Array], placements: Sequence[Placement]
    ) -> list[Detections]:
        """Stage 2's outputs for the images of a batch, as `Detections`."""
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
        """A session for frames of video, which a GPU reads where the caller has them.

        Backends without a GPU work through the slots' batches one after the other, in another thread.

        Args:
            cuda_stream: that frames are written on, unless `submit` is told: a handle, an object with
                `__cuda_stream__`, or a torch or cupy stream.
            when_full: see `StreamSession`.
            timeout: see `StreamSession`.
            slots: batches on their way at once.
            graphs: whether a GPU backend captures the network as a CUDA graph for shapes that come again.

        Raises:
            ConfigError: see `StreamSession`.
            EngineError: there is no memory for the slots.
            KernelError: the kernel for frames cannot be compiled for the GPU.
        """
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

    def close(self) -> None:
        """Closes the sessions that are open, then frees the backend; an error stops none of it."""
        with ExitStack() as stack:
            stack.callback(self.stages.close)
            for session in self._sessions:
                stack.callback(session.close)
