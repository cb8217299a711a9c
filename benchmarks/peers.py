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
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from thresholds import bundle_with_threshold, threshold_for
from typing_extensions import override

from comask.bundle import WEIGHTS, Bundle
from comask.config import CANDIDATES, PreprocessConfig
from comask.errors import BackendUnavailableError, ComaskError
from comask.masks import rles_from_mask_probs
from comask.preprocess import Pixels, Prepared, prepare
from comask.runtime import Predictor
from comask.runtime.backends.names import graph_precision, parse_backend
from comask.runtime.backends.ort import OrtSession
from comask.runtime.bench.machine import peak_resident

if TYPE_CHECKING:
    from torch import Tensor

PHOTO = (800, 1333)
RUNS = 2  # in a process whose memory is measured; buffers have their full size in the second run
BF16_STEP = 2**-7  # relative difference of neighbouring numbers in bf16
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

    Attributes:
        predictor: the bundle, or a copy of it for the current case, see `begin`.
    """

    encode = staticmethod(rles_from_mask_probs)

    def __init__(self, work: Work, backend: str) -> None:
        self._work, self._backend = work, backend
        self.predictor = self._open(Path(work.bundle))
        self.files = sum(file.stat().st_size for file in _files(Path(work.bundle), backend))

    def _open(self, bundle: Path) -> Predictor:
        work = self._work
        return Predictor.load(
            bundle, self._backend, device=work.index, proposals=work.proposals, max_batch=1
        )

    def begin(self, prepared: Prepared, count: int) -> None:
        """Opens a copy of the bundle with the threshold that leaves `count` detections of this canvas.

        The threshold is between the scores of this backend, since precisions differ in them. TensorRT's
        plans cannot be copied so; they do the same work for any number.
        """
        self.predictor.close()
        if count == self._work.detections or self._backend.startswith("tensorrt"):
            self.predictor = self._open(Path(self._work.bundle))
            return
        with self._open(Path(self._work.bundle)) as predictor:
            scores = predictor.stages.run(*_inputs(prepared))["scores"][0]
        threshold = threshold_for(scores, count)
        with tempfile.TemporaryDirectory(dir=Path(self._work.bundle).parent) as folder:
            bundle_with_threshold(Path(self._work.bundle), Path(folder) / "bundle", threshold)
            self.predictor = self._open(Path(folder) / "bundle")

    def network(self, prepared: Prepared, count: int) -> Found:
        """Runs both stages on a canvas; keeps the first `count` detections."""
        outputs = self.predictor.stages.run(*_inputs(prepared))
        found = min(int(outputs["num_detections"][0]), count)
        # padding is pooled and classified as well
        return Found(outputs["boxes"][0, :found], outputs["masks"][0, :found], self._work.proposals)


def _inputs(prepared: Prepared) -> tuple[Pixels, NDArray[np.int32]]:
    return prepared.canvas[None], np.array([prepared.size], np.int32)


def _files(bundle: Path, backend: str) -> list[Path]:
    """Returns the files that a backend reads in addition to the manifest."""
    name, precision = parse_backend(backend)
    if name == "torch":
        return [bundle / WEIGHTS]
    if name in ("onnxruntime", "openvino"):
        graphs = graph_precision(name, precision)
        return [Bundle.open(bundle).graph(stage, graphs) for stage in ("stage1", "stage2")]
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

    def recalibrate(self, prepared: Prepared, counts: Sequence[int]) -> None:
        """Lowers the reference's thresholds until at least `count` detections remain here, too."""
        most = self.thresholds[prepared.canvas.shape, max(counts)]
        while len(scores := self.run(prepared, most)["scores"]) < max(counts):
            most *= 1 - BF16_STEP
        for count in counts:
            lower = float(scores[count]) * (1 - BF16_STEP) if count < len(scores) else most
            self.thresholds[prepared.canvas.shape, count] = lower

    def network(self, prepared: Prepared, count: int) -> Found:
        """Runs the network on a canvas with the threshold that leaves `count` detections."""
        found = self.run(prepared, self.thresholds[prepared.canvas.shape, count])
        return Found(found["boxes"][:count], found["masks"][:count], len(found["proposals"]))

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

    def __init__(self, work: Work, version: str, *, autocast: str | None = None) -> None:
        import torch
        from torchvision_network import torchvision_network

        super().__init__()
        if autocast == "float16" and work.device != "cuda":
            raise BackendUnavailableError(
                "autocast to fp16 needs a GPU, and this machine has no GPU"
            )
        self._torch, self.device = torch, work.device
        self._type = getattr(torch, autocast) if autocast else None
        self.module = torchvision_network(version, work.proposals, work.detections).to(work.device)
        self.files = sum(x.numel() * x.element_size() for x in self.module.state_dict().values())

    @override
    def run(self, prepared: Prepared, threshold: float) -> dict[str, Any]:
        torch = self._torch
        cast: Any = torch.autocast(self.device, self._type) if self._type else nullcontext()
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
            threshold = threshold_for(scores, count) if count < len(scores) else most
            if self._type and count < len(scores):
                # torchvision rounds the threshold as well: one step lower, or it meets the score itself
                threshold = float(scores[count]) * (1 - BF16_STEP)
            self.thresholds[prepared.canvas.shape, count] = threshold


class TorchvisionOnnx(Thresholded):
    """The same network in ONNX Runtime, with the options that CoMask's graphs use."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._session = OrtSession(Path(work.graph), work.index)
        self.files = Path(work.graph).stat().st_size

    @override
    def run(self, prepared: Prepared, threshold: float) -> dict[str, Any]:
        return self._session.run({"canvas": prepared.canvas, "threshold": np.float32(threshold)})


class TorchvisionOpenVino(Thresholded):
    """The same ONNX file in OpenVINO, with the settings that CoMask's graphs use."""

    def __init__(self, work: Work, precision: str) -> None:
        from comask.runtime.backends.openvino import OpenVinoStage, settings_for

        super().__init__()
        if work.device != "cpu":
            raise BackendUnavailableError("it runs on the processor, and the others on a GPU")
        self._stage = OpenVinoStage(Path(work.graph), "CPU", settings_for("CPU", precision))
        self.files = Path(work.graph).stat().st_size

    @override
    def run(self, prepared: Prepared, threshold: float) -> dict[str, Any]:
        return self._stage.run({"canvas": prepared.canvas, "threshold": np.float32(threshold)})


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
    "torchvision eager bf16": partial(Torchvision, version="v1", autocast="bfloat16"),
    "torchvision onnxruntime": TorchvisionOnnx,
    "torchvision openvino": partial(TorchvisionOpenVino, precision="fp32"),
    "torchvision openvino:bf16": partial(TorchvisionOpenVino, precision="bf16"),
    "torchvision v2 eager": partial(Torchvision, version="v2"),
    "comask torch": partial(CoMask, backend="torch"),
    "comask torch:bf16": partial(CoMask, backend="torch:bf16"),
    "comask onnxruntime": partial(CoMask, backend="onnxruntime"),
    "comask openvino": partial(CoMask, backend="openvino"),
    "comask openvino:bf16": partial(CoMask, backend="openvino:bf16"),
    "comask openvino:int8": partial(CoMask, backend="openvino:int8"),
    "torchvision eager fp16": partial(Torchvision, version="v1", autocast="float16"),
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
