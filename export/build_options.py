"""The options of TensorRT's builder, and the sizes that an engine accepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from comask.bundle import Manifest
from comask.errors import ConfigError, EngineError
from comask.export.aot_plugins import check_aot
from comask.kernels.launch import LEVEL_STRIDES
from comask.runtime.gpu import Gpu
from comask.runtime.trt.flavor import Flavor

HARDWARE_COMPATIBILITY = ("ampere_plus", "same_compute_capability")
PLUGINS = ("python", "aot", "none")

Range = tuple[int, int, int]  # least, best, largest
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
CANVAS_STEP = 32  # a canvas's height and width are multiples of this
LARGEST_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of the builder; None keeps TensorRT's default.

    Attributes:
        workspace_mib: the largest scratch memory of a layer, in MiB.
        optimization_level: 0 (builds fast) to 5 (searches long).
        hardware_compatibility: one of `HARDWARE_COMPATIBILITY`, for plans that also run on other GPUs
            than the one they are built on; only for TensorRT.
        version_compatible: whether later versions of TensorRT can run the plan; only for TensorRT.
        compute_capabilities: the GPUs that TensorRT-RTX prepares the plan for, such as 86; empty for
            all that it supports.
    """

    workspace_mib: int | None = None
    optimization_level: int | None = None
    hardware_compatibility: str | None = None
    version_compatible: bool = False
    compute_capabilities: tuple[int, ...] = ()


def check_options(flavor: Flavor, plugin: str, options: BuildOptions, gpu: Gpu | None) -> None:
    """Checks that this flavor and machine support the options.

    Raises:
        EngineError: they do not; the message names the option and an alternative.
    """
    if plugin not in PLUGINS:
        raise EngineError(f"plugin {plugin!r}: expected one of {', '.join(PLUGINS)}")
    if plugin == "aot":
        check_aot(flavor)
    if flavor.name == "tensorrt":
        if plugin == "python" and options.version_compatible:
            raise EngineError(
                "--version-compatible with --plugin python: later versions would run the plan in a lean "
                "runtime, and nothing documents that it finds plugins in Python; use --plugin aot or none"
            )
        if gpu is None:
            raise EngineError(
                "tensorrt tunes its plans on a GPU, and this machine has none; build on the machine "
                "that will run them, or use --engine tensorrt-rtx, which builds anywhere"
            )
        if options.compute_capabilities:
            raise EngineError(
                "--compute-capability: is for tensorrt-rtx; tensorrt builds for this machine's GPU, or "
                "for more GPUs with --hardware-compatibility"
            )
    if flavor.name == "tensorrt-rtx":
        if options.hardware_compatibility:
            raise EngineError(
                "--hardware-compatibility: tensorrt-rtx compiles for the GPU when it loads a plan, so "
                "its plans run on all GPUs that it supports; leave the option out"
            )
        if options.version_compatible:
            raise EngineError(
                "--version-compatible: tensorrt-rtx has no lean runtime for such plans; leave the "
                "option out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The sizes of both graphs, each as (least, best, largest).

    Attributes:
        batch: the number of images.
        height: the canvas's height in pixels, a multiple of 32.
        width: the canvas's width in pixels, a multiple of 32.
        proposals: the number of proposals per image, in stage 2.
    """

    batch: Range
    height: Range
    width: Range
    proposals: Range

    @classmethod
    def of(cls, manifest: Manifest, overrides: Iterable[str] = ()) -> Self:
        """Returns the bundle's own sizes, tuned for one landscape image of 4:3, with overrides.

        Args:
            manifest: the bundle's manifest, whose preprocessing limits the canvas and whose model limits
                the proposals.
            overrides: `NAME=MIN:BEST:MAX`, or `NAME=N` for a single size.

        Raises:
            ConfigError: an override or a size is invalid.
        """
        pre, proposals = manifest.preprocess, manifest.model.proposals
        largest = _round_up(pre.max_side)
        short = _round_up(min(pre.short_side, pre.max_side))
        landscape = min(largest, _round_up(pre.short_side * 4 / 3))
        ranges: dict[str, Range] = {
            "batch": (1, 1, LARGEST_BATCH),
            "height": (CANVAS_STEP, short, largest),
            "width": (CANVAS_STEP, landscape, largest),
            "proposals": (1, proposals, proposals),
        }
        for text in overrides:
            name, values = _parse(text, ranges)
            ranges[name] = values
        profile = cls(**ranges)
        profile._check(proposals)
        return profile

    def _check(self, proposals: int) -> None:
        for name, limits in self.ranges().items():
            least, best, largest = limits
            if not 1 <= least <= best <= largest:
                raise ConfigError(
                    f"profile {name}={_text(limits)}: expected 1 <= MIN <= BEST <= MAX"
                )
            if name in ("height", "width") and any(value % CANVAS_STEP for value in limits):
                raise ConfigError(
                    f"profile {name}={_text(limits)}: expected multiples of {CANVAS_STEP}, the "
                    f"coarsest stride of the network"
                )
        if self.proposals[2] > proposals:
            raise ConfigError(
                f"profile proposals={_text(self.proposals)}: stage 1 gives {proposals} at most"
            )

    def ranges(self) -> dict[str, Range]:
        """Returns the ranges by name."""
        return dataclasses.asdict(self)

    def by_batch(self) -> tuple[Self, ...]:
        """Returns a profile for all batches and one for a single image, if the range has more than that.

        TensorRT takes the kernels that are fastest at a profile's best sizes. The first profile's best
        batch is the range's own unless that is a single image, and then the largest. It has the whole
        range, because other programs take a plan's first profile.
        """
        least, best, largest = self.batch
        if not least == 1 < largest:
            return (self,)
        batch = (1, best if best > 1 else largest, largest)
        return dataclasses.replace(self, batch=batch), dataclasses.replace(self, batch=(1, 1, 1))

    def shapes(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Shapes]:
        """Returns the least, best and largest shape of each input of a graph.

        Args:
            inputs: the inputs in the manifest's description of the graph, with `name` and `shape`.
        """
        shapes: dict[str, Shapes] = {}
        for entry in inputs:
            least, best, largest = (self._shape(entry, place) for place in range(3))
            shapes[entry["name"]] = (least, best, largest)
        return shapes

    def _shape(self, entry: Mapping[str, Any], place: int) -> tuple[int, ...]:
        name, shape = entry["name"], entry["shape"]
        batch, height = self.batch[place], self.height[place]
        width, proposals = self.width[place], self.proposals[place]
        if name in LEVEL_STRIDES:
            return (batch, shape[1], height // LEVEL_STRIDES[name], width // LEVEL_STRIDES[name])
        return {
            "images": (batch, height, width, 3),
            "image_sizes": (batch, 2),
            "proposals": (batch, proposals, 4),
            "proposal_scores": (batch, proposals),
        }[name]


def _parse(text: str, ranges: Mapping[str, Range]) -> tuple[str, Range]:
    name, _, values = text.partition("=")
    parts = values.split(":")
    if name not in ranges or len(parts) not in (1, 3) or not all(p.isdecimal() for p in parts):
        raise ConfigError(
            f"profile {text!r}: expected NAME=MIN:BEST:MAX or NAME=N, NAME one of "
            f"{', '.join(ranges)}"
        )
    numbers = [int(part) for part in parts] * (3 if len(parts) == 1 else 1)
    return name, (numbers[0], numbers[1], numbers[2])


def _text(values: Range) -> str:
    return ":".join(map(str, values))


def _round_up(size: float) -> int:
    return -int(-size // CANVAS_STEP) * CANVAS_STEP
