"""FP16 on real images: which values exceed its range, and the modules that stay fp32 for it.

fp16 ends at 65504, and what exceeds it becomes infinite without a word. So the fp32 network is watched
while it looks at images. Around a layer that exceeds the range, the smallest module that takes and gives
values within it becomes a *float island*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from comask.config import PreprocessConfig
from comask.errors import PrecisionError
from comask.export.onnx_export import folded
from comask.models.comask import CoMask
from comask.models.precision import FLOAT_OUTPUTS, FloatTensors
from comask.preprocess import prepare
from comask.runtime.backends.pytorch import torch_stages
from comask.runtime.compare import PYRAMID

FP16_END = 65504.0
# Other images reach farther than the few that are scanned: on a trained network, 200 images up to 2.7
# times as far as three.
HEADROOM = 4.0
ACTIVATIONS = ("input", "output")


@dataclass(frozen=True, slots=True)
class Extreme:
    """The largest magnitude of a module's inputs, of its outputs, or of one of its parameters.

    Attributes:
        module: its path as `backbone.layer3.2.conv2`, or one of `PYRAMID`.
        kind: one of `ACTIVATIONS`, or the parameter's name in the module.
        largest: the magnitude.
        image: the place of the image that it was found on; None for parameters.
    """

    module: str
    kind: str
    largest: float
    image: int | None

    @property
    def fits(self) -> bool:
        """Whether fp16 holds it; activations, which other images change, with headroom."""
        return self.largest <= FP16_END / (HEADROOM if self.kind in ACTIVATIONS else 1.0)

    def __str__(self) -> str:
        subject = self.module if self.kind == "output" else f"the {self.kind} of {self.module}"
        place = "" if self.image is None else f" on image {self.image}"
        text = f"{subject} reaches {self.largest:.2e}{place}, fp16 ends at {FP16_END:.0f}"
        if self.largest <= FP16_END and not self.fits:
            text += f" and other images may reach {HEADROOM:g} times as far"
        return text


def scan_ranges(
    model: CoMask, images: Sequence[NDArray[np.uint8]], preprocess: PreprocessConfig
) -> list[Extreme]:
    """Runs both stages on each image at its own size, and notes the largest magnitudes exactly.

    Watched are the modules of the network whose halves are exported, so with BatchNorm folded. What
    stays f32 in fp16 graphs anyway is not: outputs of `FLOAT_OUTPUTS`, own parameters of `FloatTensors`.

    Args:
        model: f32, in evaluation mode; stays as it is.
        images: u8 [h, w, 3], RGB.
        preprocess: from an image to the network's input.

    Returns:
        `PYRAMID` first, then outputs, inner modules before outer ones, inputs and parameters, so that the
        first of equals is where a value arises.

    Raises:
        PrecisionError: where fp32 itself is not finite.
    """
    network = folded(model)
    watch = _Watch()
    for path, module in network.named_modules():
        watch.follow(path, module)
    stages = torch_stages(network, diagnostics=True)  # all that any graph holds
    for index, image in enumerate(images):
        watch.image = index
        prepared = prepare(image, preprocess)
        sizes = np.array([prepared.size], dtype=np.int32)
        maps = stages.stage1.run({"images": prepared.canvas[None], "image_sizes": sizes})
        for name in PYRAMID:
            watch.note(name, "output", torch.from_numpy(maps[name]))
        stages.stage2.run({**maps, "image_sizes": sizes})
    watch.image = None
    for path in list(watch.called):
        module = network.get_submodule(path)
        if not isinstance(module, FloatTensors):
            for name, parameter in module.named_parameters(recurse=False):
                watch.note(path, name, parameter.detach())
    order = {"output": 0, "input": 1}
    return sorted(
        watch.extremes.values(), key=lambda e: (e.module not in PYRAMID, order.get(e.kind, 2))
    )


class _Watch:
    """Hooks that keep the largest magnitude of everything.

    Attributes:
        image: the place of the one that is shown.
        called: paths of the modules that something went through.
        extremes: by path and kind.
    """

    def __init__(self) -> None:
        self.image: int | None = None
        self.called: dict[str, None] = {}
        self.extremes: dict[tuple[str, str], Extreme] = {}

    def follow(self, path: str, module: nn.Module) -> None:
        # a hook of its own for inputs: a module may overwrite them
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.called[path] = None
            self.note(path, "input", args)

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if path not in FLOAT_OUTPUTS:
                self.note(path, "output", output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def note(self, path: str, kind: str, value: Any) -> None:
        for tensor in _float_tensors(value):
            # in the order of memory: over maps whose channels come last it takes 20 times as long
            dims = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
            low, high = torch.aminmax(tensor.permute(dims))  # both are NaN where anything is
            largest = max(-low.item(), high.item())
            if not np.isfinite(largest):
                where = "" if self.image is None else f" on image {self.image}"
                raise PrecisionError(
                    f"{path}: its {kind} is not finite{where} in fp32 already, so no precision will "
                    f"do; import or train the weights again"
                )
            last = self.extremes.get((path, kind))
            if last is None or largest > last.largest:
                self.extremes[path, kind] = Extreme(path, kind, largest, self.image)


def _float_tensors(value: Any) -> Iterator[Tensor]:
    """All in a tensor or in nested lists and tuples; empty ones have no largest value."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _float_tensors(part)


def float_islands(extremes: Sequence[Extreme]) -> dict[str, Extreme]:
    """The smallest modules to keep in fp32 so that no value exceeds fp16 outside of them.

    Args:
        extremes: see `scan_ranges`.

    Returns:
        by path, none inside another: the worst value that the module is kept for.

    Raises:
        PrecisionError: when a value has no such module around it, as those that stage 1 hands to stage 2.
    """
    beyond = sorted((e for e in extremes if not e.fits), key=lambda e: -e.largest)
    called = {e.module for e in extremes if e.kind in ACTIVATIONS}
    quiet = called.difference(e.module for e in beyond if e.kind in ACTIVATIONS)
    worst, homeless = dict[str, Extreme](), list[Extreme]()
    for extreme in beyond:
        home = next((path for path in _lineage(extreme.module) if path in quiet), None)
        if home is None:
            homeless.append(extreme)
        else:
            worst.setdefault(home, extreme)
    if homeless:
        outermost = min(homeless, key=lambda e: e.module.count("."))
        raise PrecisionError(
            f"this network does not fit fp16: {outermost}, and no module around it could be kept in "
            f"fp32; use fp32"
        )
    return {path: e for path, e in worst.items() if not _inside(path, worst)}


@dataclass(frozen=True, slots=True)
class Fp16Report:
    """What fp16 could not hold, and how much room there is in the rest.

    Attributes:
        islands: see `float_islands`.
        largest: the largest value that remains in fp16.
    """

    islands: Mapping[str, Extreme]
    largest: Extreme

    @classmethod
    def of(cls, extremes: Sequence[Extreme], islands: Mapping[str, Extreme]) -> Self:
        """The report on a network.

        Args:
            extremes: see `scan_ranges`.
            islands: see `float_islands`.
        """
        halves = [
            e
            for e in extremes
            if not _inside(e.module, islands)
            and (e.module not in islands or e.kind in ACTIVATIONS)  # its border is fp16
        ]
        return cls(islands, max(halves, key=lambda e: e.largest))

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: `float_layers` and `range`."""
        return {
            "float_layers": [
                {"module": path, "largest": e.largest, "image": e.image, "reason": str(e)}
                for path, e in self.islands.items()
            ],
            "range": {**dataclasses.asdict(self.largest), "end": FP16_END},
        }


def _lineage(path: str) -> Iterator[str]:
    """`a.b.c` → `a.b.c`, `a.b`, `a`."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _inside(path: str, islands: Collection[str]) -> bool:
    """Whether a module lies in one of the islands, and is none itself."""
    return any(outer in islands for outer in _lineage(path.rpartition(".")[0]))
