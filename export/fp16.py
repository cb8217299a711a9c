"""Finds values that exceed fp16's range on real images, and the modules that must stay fp32 for them.

fp16 ends at 65504, and larger values silently become infinite. So the fp32 network is observed while it
runs on images. Around a layer that exceeds the range, the smallest module whose inputs and outputs are
within the range becomes a *float island*.
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
from comask.models.comask import CoMask, folded
from comask.models.precision import FLOAT_OUTPUTS, FloatTensors
from comask.preprocess import prepare
from comask.runtime.backends.pytorch import torch_stages
from comask.runtime.compare import PYRAMID

FP16_END = 65504.0
# Other images reach larger values than the few that are scanned. On a trained network, the maximum over
# 200 images was up to 2.7 times the maximum over three.
HEADROOM = 4.0
ACTIVATIONS = ("input", "output")


@dataclass(frozen=True, slots=True)
class Extreme:
    """The largest magnitude of a module's inputs, of its outputs, or of one of its parameters.

    Attributes:
        module: the module's path, such as `backbone.layer3.2.conv2`, or one of `PYRAMID`.
        kind: one of `ACTIVATIONS`, or the parameter's name in the module.
        largest: the largest magnitude.
        image: the index of the image with the largest magnitude; None for parameters.
    """

    module: str
    kind: str
    largest: float
    image: int | None

    @property
    def fits(self) -> bool:
        """Whether fp16 can hold the value; for activations with headroom, since images differ."""
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
    """Runs both stages on each image at its own size, and returns the exact largest magnitudes.

    It observes the modules of the network that is exported, which has BatchNorm folded. It leaves out
    tensors that stay f32 in fp16 graphs: outputs of `FLOAT_OUTPUTS` and parameters of `FloatTensors`.

    Args:
        model: the f32 model in evaluation mode, which is not changed.
        images: u8 [h, w, 3], RGB.
        preprocess: the preprocessing of images.

    Returns:
        The extremes, ordered so that of equal values the first one is where the value arises: `PYRAMID`,
        then outputs (inner modules before outer ones), inputs and parameters.

    Raises:
        PrecisionError: a value is not finite even in fp32.
    """
    network = folded(model)
    watch = _Watch()
    for path, module in network.named_modules():
        watch.follow(path, module)
    stages = torch_stages(network, diagnostics=True)  # everything that any exported graph computes
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
    """Hooks that record the largest magnitude of every module's inputs and outputs.

    Attributes:
        image: the index of the current image.
        called: the paths of the modules that were called.
        extremes: the largest magnitudes by path and kind.
    """

    def __init__(self) -> None:
        self.image: int | None = None
        self.called: dict[str, None] = {}
        self.extremes: dict[tuple[str, str], Extreme] = {}

    def follow(self, path: str, module: nn.Module) -> None:
        # A hook of its own is needed for inputs, since a module may overwrite them.
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
            # In memory order, since channels-last maps would otherwise take 20 times as long.
            dims = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
            low, high = torch.aminmax(tensor.permute(dims))  # Both are NaN if any value is NaN.
            largest = max(-low.item(), high.item())
            if not np.isfinite(largest):
                where = "" if self.image is None else f" on image {self.image}"
                raise PrecisionError(
                    f"{path}: its {kind} is not finite{where} even in fp32, so no precision can hold "
                    f"it; import or train the weights again"
                )
            last = self.extremes.get((path, kind))
            if last is None or largest > last.largest:
                self.extremes[path, kind] = Extreme(path, kind, largest, self.image)


def _float_tensors(value: Any) -> Iterator[Tensor]:
    """Yields the nonempty float tensors in a tensor or in nested lists and tuples."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _float_tensors(part)


def float_islands(extremes: Sequence[Extreme]) -> dict[str, Extreme]:
    """Returns the smallest modules to keep in fp32 so that no value outside of them exceeds fp16.

    Args:
        extremes: the result of `scan_ranges`.

    Returns:
        The worst value of each module, by the module's path. No module is inside another.

    Raises:
        PrecisionError: no such module surrounds a value, for example one between stage 1 and stage 2.
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
    """Reports the values that fp16 cannot hold, and the largest one that it has to.

    Attributes:
        islands: the result of `float_islands`.
        largest: the largest value that remains in fp16.
    """

    islands: Mapping[str, Extreme]
    largest: Extreme

    @classmethod
    def of(cls, extremes: Sequence[Extreme], islands: Mapping[str, Extreme]) -> Self:
        """Returns the report on a network.

        Args:
            extremes: the result of `scan_ranges`.
            islands: the result of `float_islands`.
        """
        halves = [
            e
            for e in extremes
            if not _inside(e.module, islands)
            and (e.module not in islands or e.kind in ACTIVATIONS)  # An island's border is fp16.
        ]
        return cls(islands, max(halves, key=lambda e: e.largest))

    def to_dict(self) -> dict[str, Any]:
        """Returns the manifest's entries `float_layers` and `range`."""
        return {
            "float_layers": [
                {"module": path, "largest": e.largest, "image": e.image, "reason": str(e)}
                for path, e in self.islands.items()
            ],
            "range": {**dataclasses.asdict(self.largest), "end": FP16_END},
        }


def _lineage(path: str) -> Iterator[str]:
    """Yields a path and its parents: for `a.b.c`, `a.b.c`, `a.b` and `a`."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _inside(path: str, islands: Collection[str]) -> bool:
    """Returns whether a module lies inside one of the islands, without being one itself."""
    return any(outer in islands for outer in _lineage(path.rpartition(".")[0]))
