"""The models that `vs_peers.py` measures: CoMask's bundle and torchvision's Mask R-CNN.

The weights are random, and the work after the RPN depends on them. To make the work equal, all models use
the same canvas, the same number of proposals, of (proposal, class) pairs in NMS, and of detections with
masks.

Heavy imports are inside functions, so that a process whose memory is measured loads only what it needs.

    python benchmarks/peers.py TASK    # prints the peak memory of a contestant, for `vs_peers.py`
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from comask.bundle import WEIGHTS, Bundle
from comask.config import CANDIDATES, PreprocessConfig
from comask.errors import BackendUnavailableError, ComaskError
from comask.masks import rles_from_mask_probs
from comask.preprocess import Pixels, Prepared, prepare
from comask.runtime import Predictor
from comask.runtime.backends.ort import OrtSession
from comask.runtime.bench.machine import peak_resident

if TYPE_CHECKING:
    from torch import Tensor

PHOTO = (800, 1333)
RUNS = 2  # in a process whose memory is measured; buffers have their full size in the second run
Floats = NDArray[np.float32]


class Found(NamedTuple):
    """What a network returns.

    Attributes:
        boxes: [N, 4] f32, in pixels of the canvas.
        masks: [N, 28, 28] f32, in 0..1.
        proposals: the number of proposals that entered the second stage.
    """

    boxes: Floats
    masks: Floats
    proposals: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work that all contestants do.

    Attributes:
        bundle: the folder of CoMask's bundle.
        graph: torchvision's ONNX file.
        proposals: the number of proposals that enter the second stage.
        detections: the maximum number of detections; at most that of the bundle.
        device: `cpu` or `cuda`.
    """

    bundle: str
    graph: str
    proposals: int
    detections: int
    device: str

    @property
    def index(self) -> Any:
        """The device as an argument of `Predictor.load`."""
        return None if self.device == "cuda" else "cpu"


def photo() -> Pixels:
    """Returns noise of the size of COCO's resized photographs; no model's time depends on the content."""
    return np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), dtype=np.uint8)


def on_canvas(image: Pixels, short_side: int) -> Prepared:
    """Resizes the image with CoMask's code for all models; torchvision's, on floats, is slower."""
    return prepare(image, PreprocessConfig().resized(short_side))


class Contestant(Protocol):
    """One model in one runtime; `files` is its size on disk in bytes."""

    files: int

    def network(self, prepared: Prepared, count: int) -> Found:
        """Computes `count` boxes and masks on the host from a canvas."""

    def encode(
        self, masks: Floats, boxes: Floats, size: tuple[int, int], threshold: float
    ) -> list[dict[str, Any]]:
        """Encodes masks over boxes as COCO's RLE of an image of the given size."""


class CoMask:
    """CoMask's bundle on one of its backends.

    Its graphs have fixed shapes: they do the same work for 10 detections as for the maximum, and
    detections with too low a score become rows of zeros. Therefore the first `count` detections are kept.
    """

    encode = staticmethod(rles_from_mask_probs)

    def __init__(self, work: Work, backend: str) -> None:
        self.predictor = Predictor.load(
            work.bundle, backend, device=work.index, proposals=work.proposals, max_batch=1
        )
        self._proposals = work.proposals  # padding is pooled and classified as well
        self.files = sum(file.stat().st_size for file in _files(Path(work.bundle), backend))

    def network(self, prepared: Prepared, count: int) -> Found:
        """Runs both stages on a canvas and keeps the first `count` detections."""
        sizes = np.array([prepared.size], np.int32)
        outputs = self.predictor.stages.run(prepared.canvas[None], sizes)
        found = min(int(outputs["num_detections"][0]), count)
        return Found(outputs["boxes"][0, :found], outputs["masks"][0, :found], self._proposals)


def _files(bundle: Path, backend: str) -> list[Path]:
    """Returns the files that a backend reads in addition to the manifest."""
    if backend == "torch":
        return [bundle / WEIGHTS]
    if backend == "onnxruntime":
        return [Bundle.open(bundle).graph(stage, "fp32") for stage in ("stage1", "stage2")]
    return list(bundle.glob(f"engines/{backend.partition(':')[0]}-[0-9]*-fp16-*/*.plan"))


class Thresholded:
    """Base class: a Mask R-CNN, which returns all detections above a threshold.

    Attributes:
        thresholds: the threshold that leaves `count` detections, by canvas shape and `count`; see
            `calibrate`.
    """

    files: int

    def __init__(self) -> None:
        self.thresholds: dict[tuple[tuple[int, ...], int], float] = {}

    def run(self, prepared: Prepared, threshold: float) -> dict[str, Any]:
        """Returns the outputs of `torchvision_network` by name, on the host."""
        raise NotImplementedError

    def network(self, prepared: Prepared, count: int) -> Found:
        """Runs the network on a canvas with the threshold that leaves `count` detections."""
        found = self.run(prepared, self.thresholds[prepared.canvas.shape, count])
        return Found(found["boxes"], found["masks"], len(found["proposals"]))

    def encode(
        self, masks: Floats, boxes: Floats, size: tuple[int, int], threshold: float
    ) -> list[dict[str, Any]]:
        """Pastes masks with torchvision and encodes them as its reference scripts do."""
        import torch
        from pycocotools import mask as coco
        from torchvision.models.detection.roi_heads import paste_masks_in_image

        pasted = paste_masks_in_image(
            torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), size
        )
        found = (pasted[:, 0] > threshold).numpy().view(np.uint8)
        return [coco.encode(np.asfortranarray(mask)) for mask in found]


class Torchvision(Thresholded):
    """Mask R-CNN in eager PyTorch.

    Attributes:
        module: the network that `torchvision_network` returns.
    """

    def __init__(self, work: Work, version: str, *, half: bool = False) -> None:
        import torch
        from torchvision_network import torchvision_network

        super().__init__()
        if half and work.device != "cuda":
            raise BackendUnavailableError(
                "autocast to fp16 needs a GPU, and this machine has no GPU"
            )
        self._torch, self.device, self._half = torch, work.device, half
        self.module = torchvision_network(version, work.proposals, work.detections).to(work.device)
        self.files = sum(x.numel() * x.element_size() for x in self.module.state_dict().values())

    @override
    def run(self, prepared: Prepared, threshold: float) -> dict[str, Any]:
        torch = self._torch
        cast: Any = torch.autocast("cuda", torch.float16) if self._half else nullcontext()
        with torch.inference_mode(), cast:
            canvas = torch.from_numpy(prepared.canvas).to(self.device)
            outputs = self.module(canvas, torch.tensor(threshold, device=self.device))
        return {name: x.float().cpu().numpy() for name, x in outputs.items()}

    def calibrate(self, prepared: Prepared, counts: Sequence[int]) -> None:
        """Computes the thresholds for a canvas.

        For the maximum number of detections, as many (proposal, class) pairs enter NMS as in CoMask. For
        fewer, the threshold lies between the last detection that remains and the next one.
        """
        logits: list[Tensor] = []
        hook = self.module.model.roi_heads.box_predictor.register_forward_hook(
            lambda module, inputs, outputs: logits.append(outputs[0].float().cpu())
        )
        with hook:
            self.run(prepared, 1.0)
        pairs = self._torch.softmax(logits[0], -1)[:, 1:].flatten().sort(descending=True).values
        most = float(pairs[CANDIDATES - 1 : CANDIDATES + 1].mean())
        scores = self.run(prepared, most)["scores"]
        for count in counts:
            between = float(scores[count - 1 : count + 1].mean())
            self.thresholds[prepared.canvas.shape, count] = (
                most if count == len(scores) else between
            )


class TorchvisionOnnx(Thresholded):
    """The same network in ONNX Runtime, with the options that CoMask's graphs use."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._session = OrtSession(Path(work.graph), work.index)
        self.files = Path(work.graph).stat().st_size

    @override
    def run(self, prepared: Prepared, threshold: float) -> dict[str, Any]:
        return self._session.run({"canvas": prepared.canvas, "threshold": np.float32(threshold)})


def _tensorrt(work: Work, flavor: str) -> CoMask:
    """Opens the bundle's fp16 engine; builds it if the bundle has none."""
    if work.device != "cuda":
        raise BackendUnavailableError("there is no GPU")
    backend = f"{flavor}:fp16"
    if not _files(Path(work.bundle), backend):
        build = [sys.executable, "-c", "from comask.cli.build import main; main()", work.bundle]
        done = subprocess.run(
            [*build, "--precision", "fp16", "--engine", flavor],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise BackendUnavailableError(done.stderr.strip().splitlines()[-1])
    return CoMask(work, backend)


CONTESTANTS: dict[str, Callable[[Work], Contestant]] = {
    "torchvision eager": partial(Torchvision, version="v1"),
    "torchvision onnxruntime": TorchvisionOnnx,
    "torchvision v2 eager": partial(Torchvision, version="v2"),
    "comask torch": partial(CoMask, backend="torch"),
    "comask onnxruntime": partial(CoMask, backend="onnxruntime"),
    "torchvision eager fp16": partial(Torchvision, version="v1", half=True),
    "comask tensorrt:fp16": partial(_tensorrt, flavor="tensorrt"),
    "comask tensorrt-rtx:fp16": partial(_tensorrt, flavor="tensorrt-rtx"),
}


def peak_memory(name: str, work: Work, short_side: int, threshold: float) -> int:
    """Returns the peak memory in bytes of a fresh process that runs one network on one image.

    Raises:
        ComaskError: if the process fails.
    """
    task = [name, asdict(work), short_side, threshold]
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(task)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ComaskError(f"memory of {name}: {done.stderr.strip()[-300:]}")
    return int(done.stdout.splitlines()[-1])


def _run_alone(name: str, work: dict[str, Any], short_side: int, threshold: float) -> None:
    contestant = CONTESTANTS[name](Work(**work))
    prepared = on_canvas(photo(), short_side)
    count = work["detections"]
    if isinstance(contestant, Thresholded):
        contestant.thresholds[prepared.canvas.shape, count] = threshold
    for _ in range(RUNS):
        contestant.network(prepared, count)
    print(peak_resident())


if __name__ == "__main__":
    _run_alone(*json.loads(sys.argv[1]))
