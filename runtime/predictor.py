"""`Predictor`: images in, `Detections` out, whatever runs in between."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from comask.config import PreprocessConfig, require_count
from comask.errors import ImageError
from comask.postprocess import detections_from_outputs
from comask.preprocess import Prepared, decode_image, prepare, rgb_from_pil
from comask.runtime.backends import LoadOptions, open_stages
from comask.runtime.session import Array, Closing, Stages
from comask.runtime.stream import SLOTS, StreamSession, WhenFull
from comask.structures import Detections

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    ImageLike: TypeAlias = str | Path | PILImage | NDArray[np.uint8]

# What the network found at each point, and the outputs that give it in place of stage 2's own:
# its result, the proposals with the coarse masks, and the boxes of cells that all count alike.
FOUND_AT: dict[str, dict[str, str]] = {
    "final": {},
    "first": {"boxes": "first_boxes", "masks": "coarse_masks"},
    "plain": {"boxes": "plain_boxes"},
}


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

    def prepare(self, image: ImageLike) -> Prepared:
        """Decodes (where needed), resizes and pads one image.

        Raises:
            ImageError: when it cannot be decoded, or is no image.
        """
        if isinstance(image, str | Path):
            return prepare(decode_image(image), self.preprocess)
        if isinstance(image, np.ndarray):
            return prepare(image, self.preprocess)
        try:
            return prepare(rgb_from_pil(image), self.preprocess)
        except ImageError:
            raise
        # whatever Pillow raises where a file is only decoded now, or where this is no image at all
        except Exception as error:
            raise ImageError(
                f"expected a path, a Pillow image or a u8 array [h, w, 3], got "
                f"{type(image).__name__}: {error}"
            ) from error

    def predict_prepared(self, prepared: Sequence[Prepared]) -> list[Detections]:
        """Detections in the order of `prepared`."""
        results: list[Detections | None] = [None] * len(prepared)
        for places, outputs in self.outputs(prepared):
            batch = [prepared[i] for i in places]
            for i, found in zip(places, self.detections(outputs, batch), strict=True):
                results[i] = found
        return [found for found in results if found is not None]

    def outputs(self, prepared: Sequence[Prepared]) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """What stage 2 returns for each batch, and the batch's places in `prepared`.

        Images of one canvas share batches. Only those: on another canvas an image has other borders,
        so other detections.
        """
        by_canvas: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(prepared):
            by_canvas.setdefault(image.canvas.shape, []).append(i)
        for same in by_canvas.values():
            for start in range(0, len(same), self.max_batch):
                places = same[start : start + self.max_batch]
                sizes = np.array([prepared[i].size for i in places], dtype=np.int32)
                images = np.stack([prepared[i].canvas for i in places])
                yield places, self.stages.run(images, sizes)

    def detections(
        self, outputs: Mapping[str, Array], batch: Sequence[Prepared]
    ) -> list[Detections]:
        """Stage 2's outputs for the images of `batch`, as `Detections`."""
        return detections_from_outputs(
            outputs,
            batch,
            class_names=self.class_names,
            category_ids=self.category_ids,
            mask_threshold=self.mask_threshold,
        )

    def predict_stages(self, prepared: Sequence[Prepared]) -> list[dict[str, Detections]]:
        """Detections of each of `FOUND_AT`, in the order of `prepared`.

        All but `final` need graphs with diagnostics.
        """
        results: list[dict[str, Detections]] = [{} for _ in prepared]
        for places, outputs in self.outputs(prepared):
            batch = [prepared[i] for i in places]
            for stage, instead in FOUND_AT.items():
                if not outputs.keys() >= set(instead.values()):
                    continue
                changed = {name: outputs[other] for name, other in instead.items()}
                for i, found in zip(
                    places, self.detections({**outputs, **changed}, batch), strict=True
                ):
                    results[i][stage] = found
        return results

    def map(self, images: Iterable[NDArray[np.uint8]]) -> Iterator[Detections]:
        """Detections of many images in order, holding few of them in memory at a time."""
        waiting: list[Prepared] = []
        for image in images:
            waiting.append(self.prepare(image))
            # enough for a full batch of each of two canvases, as in a set of mixed orientation
            if len(waiting) == 2 * self.max_batch:
                yield from self.predict_prepared(waiting)
                waiting = []
        yield from self.predict_prepared(waiting)

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
