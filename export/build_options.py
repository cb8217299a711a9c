"""What TensorRT's builder is asked for: plugins, precision, and the sizes that an engine accepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from comask.bundle import Manifest
from comask.errors import ConfigError, EngineError
from comask.export.aot_plugins import check_aot
from comask.kernels.launch import LEVEL_STRIDES
from comask.runtime.device import Gpu
from comask.runtime.trt.engine import Flavor

HARDWARE_COMPATIBILITY = ("ampere_plus", "same_compute_capability")
PLUGINS = ("python", "aot", "none")

Range = tuple[int, int, int]  # least, best, largest
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
CANVAS_STEP = 32  # canvases are multiples of this
LARGEST_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of the builder; None leaves TensorRT's default.

    Attributes:
        workspace_mib: most scratch memory of a layer.
        optimization_level: 0 (builds fast) to 5 (searches long).
        hardware_compatibility: one of `HARDWARE_COMPATIBILITY`, for plans that run on other GPUs than
            the one they are built on; TensorRT alone.
        version_compatible: the plan runs under later versions of TensorRT; TensorRT alone.
        compute_capabilities: 86 and the like, for which TensorRT-RTX prepares the plan; empty: all that
            it serves.
    """

    workspace_mib: int | None = None
    optimization_level: int | None = None
    hardware_compatibility: str | None = None
    version_compatible: bool = False
    compute_capabilities: tuple[int, ...] = ()


def check_options(flavor: Flavor, plugin: str, options: BuildOptions, gpu: Gpu | None) -> None:
    """Refuses what this flavor or machine cannot honour.

    Raises:
        EngineError: naming the option and what to do instead.
    """
    if plugin not in PLUGINS:
        raise EngineError(f"plugin {plugin!r}: expected one of {', '.join(PLUGINS)}")
    if plugin == "aot":
        check_aot(flavor)
    if flavor.name == "tensorrt":
        if gpu is None:
            raise EngineError(
                "tensorrt tunes its plans on a GPU and there is none here; build on the machine that "
                "will run them, or take --engine tensorrt-rtx, which builds anywhere"
            )
        if options.compute_capabilities:
            raise EngineError(
                "--compute-capability: is for tensorrt-rtx; tensorrt builds for the GPU at hand, or "
                "for more with --hardware-compatibility"
            )
    if flavor.name == "tensorrt-rtx":
        if options.hardware_compatibility:
            raise EngineError(
                "--hardware-compatibility: tensorrt-rtx compiles for the GPU when it loads a plan, so "
                "its plans fit all GPUs that it serves; leave the option out"
            )
        if options.version_compatible:
            raise EngineError(
                "--version-compatible: tensorrt-rtx has no lean runtime to go with such plans; leave "
                "the option out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The sizes of both graphs, each as (least, best, largest).

    Attributes:
        batch: images.
        height: of the canvas in pixels, a multiple of 32.
        width: likewise.
        proposals: an image, in stage 2.
    """

    batch: Range
    height: Range
    width: Range
    proposals: Range

    @classmethod
    def of(cls, manifest: Manifest, overrides: Iterable[str] = ()) -> Self:
        """The bundle's own sizes, tuned for one landscape image of 4:3, with some of them replaced.

        Args:
            manifest: its preprocessing bounds the canvas, its model the proposals.
            overrides: `NAME=MIN:BEST:MAX`, or `NAME=N` for one size alone.

        Raises:
            ConfigError: for an override that is none, or a size that cannot be.
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
        """By name."""
        return dataclasses.asdict(self)

    def shapes(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Shapes]:
        """Least, best and largest shape of each input of a graph.

        Args:
            inputs: of the manifest's description of the graph, with `name` and `shape`.
        """
        found: dict[str, Shapes] = {}
        for entry in inputs:
            one, two, three = (self._shape(entry, place) for place in range(3))
            found[entry["name"]] = (one, two, three)
        return found

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
