"""The PyTorch backend: runs the network itself, the reference for all other backends."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.torch import load_file

from comask.bundle import WEIGHTS, Bundle
from comask.errors import BackendUnavailableError, BundleError, ComaskError
from comask.kernels import run
from comask.kernels.launch import LEVEL_STRIDES, Launch
from comask.models.comask import (
    STAGE1_INPUTS,
    STAGE1_OUTPUTS,
    STAGE2_INPUTS,
    CoMask,
    load_weights,
    stage2_outputs,
)
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.base import Array, Stages, TensorSpec
from comask.runtime.backends.names import nvidia_device
from comask.runtime.resident import with_kernels


class TorchStage:
    """One stage of a `CoMask` in evaluation mode, which runs on the device of its weights.

    Args:
        model: the network, in evaluation mode.
        stage: the stage to run.
        bf16: whether convolutions and matrix products are computed in bf16, by autocast.
        options: keyword arguments of the network's method.

    Attributes:
        model: the network.
        bf16: as above.
    """

    def __init__(
        self,
        model: CoMask,
        stage: Literal["stage1", "stage2"],
        *,
        bf16: bool = False,
        **options: bool,
    ) -> None:
        self.model, self.bf16 = model, bf16
        self._run = partial(getattr(model, stage), **options)
        inputs, outputs = {
            "stage1": (STAGE1_INPUTS, STAGE1_OUTPUTS),
            "stage2": (STAGE2_INPUTS, stage2_outputs(model.config)),
        }[stage]
        self.inputs = tuple(graph_spec(name, model) for name in inputs)
        self.outputs = tuple(graph_spec(name, model) for name in outputs)

    def run(self, feeds: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
        """Runs the stage; the outputs in `keep` are tensors on its device, the others arrays."""
        kind = self.model.mean.device.type
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=self.bf16):
            outputs = self._run(**{s.name: self._tensor(feeds[s.name], s) for s in self.inputs})
        if self.bf16:  # which neither NumPy nor RoIAlign's kernel knows
            outputs = {name: _without_bf16(tensor) for name, tensor in outputs.items()}
        return {
            name: tensor if name in keep else tensor.cpu().numpy()
            for name, tensor in outputs.items()
        }

    def _tensor(self, value: Array | torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        return torch.from_numpy(value.astype(spec.dtype, copy=False)).to(self.model.mean.device)

    def close(self) -> None:
        """Does nothing, since the model belongs to its creator."""


class TorchMemory:
    """Allocates tensors on a model's device; see `comask.runtime.resident.Memory`.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.gpu = device.index if device.type == "cuda" else None

    def prepare(self, source: str) -> None:
        """Compiles and loads a kernel."""
        run.prepare_on(source, self.gpu)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> torch.Tensor:
        """Allocates a tensor."""
        return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), device=self._device)

    def from_host(self, array: Array) -> torch.Tensor:
        """Copies an array to the device."""
        return torch.from_numpy(array).to(self._device)

    def to_host(self, value: torch.Tensor) -> Array:
        """Copies a tensor to the host, once the work that was queued before is done."""
        host: Array = value.cpu().numpy()
        return host

    def address(self, value: torch.Tensor) -> int:
        """Returns the address of a tensor's first byte."""
        return value.data_ptr()

    def launch(self, launch: Launch, inputs: Sequence[int], output: int) -> None:
        """Runs a kernel in the current stream."""
        run.on_device(launch, inputs, output, self._device)

    @property
    def stream(self) -> int:
        """Handle of the current stream."""
        if self.gpu is None:
            return run.LEGACY_STREAM
        return torch.cuda.current_stream(self._device).cuda_stream or run.LEGACY_STREAM

    def synchronize(self, stream: int) -> None:
        """Waits for the work that is now queued on a stream."""
        if self.gpu is not None:
            with torch.cuda.device(self._device):
                run.use_primary_context(self.gpu)
                run.synchronize(stream)


def _without_bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def torch_stages(model: CoMask, *, bf16: bool = False, diagnostics: bool = False) -> Stages:
    """Returns both stages of a model in evaluation mode.

    `TorchStage` explains `bf16`, and `CoMask.stage2` explains `diagnostics`.
    """
    precision = "fp32" if model.dtype == torch.float32 else "fp16"
    name = "torch:bf16" if bf16 else {"fp32": "torch", "fp16": "torch:fp16"}[precision]
    return Stages(
        name,
        TorchStage(model, "stage1", bf16=bf16),
        TorchStage(model, "stage2", bf16=bf16, diagnostics=diagnostics),
        device=str(model.mean.device),
    )


def graph_spec(name: str, model: CoMask) -> TensorSpec:
    """Returns name, dtype and shape of a graph's input or output, as docs/bundle.md promises them."""
    f32, i32 = np.dtype(np.float32), np.dtype(np.int32)
    maps = f32 if model.dtype == torch.float32 else np.dtype(np.float16)
    d = model.config.detections
    if stride := LEVEL_STRIDES.get(name):
        return TensorSpec(
            name, maps, ("batch", model.config.channels, f"height/{stride}", f"width/{stride}")
        )
    return {
        "images": TensorSpec(name, np.dtype(np.uint8), ("batch", "height", "width", 3)),
        "image_sizes": TensorSpec(name, i32, ("batch", 2)),
        "proposals": TensorSpec(name, f32, ("batch", "proposals", 4)),
        "proposal_scores": TensorSpec(name, f32, ("batch", "proposals")),
        "num_detections": TensorSpec(name, i32, ("batch",)),
        "boxes": TensorSpec(name, f32, ("batch", d, 4)),
        "scores": TensorSpec(name, f32, ("batch", d)),
        "labels": TensorSpec(name, i32, ("batch", d)),
        "masks": TensorSpec(name, f32, ("batch", d, 28, 28)),
        "mask_boxes": TensorSpec(name, f32, ("batch", d, 4)),
        "class_scores": TensorSpec(name, f32, ("batch", d)),
    }[name]


def model_from_bundle(bundle: Bundle) -> CoMask:
    """Loads the network of a bundle in evaluation mode, on the CPU.

    Raises:
        BundleError: if its weights are missing, were altered or do not fit.
    """
    path = bundle.file(WEIGHTS)
    model = CoMask(bundle.manifest.model, bundle.manifest.preprocess)
    try:
        load_weights(model, load_file(path))
    except (SafetensorError, ComaskError) as error:
        raise BundleError(f"{path}: {error}") from error
    return model.eval()


def open_backend(bundle: Bundle, name: str, precision: str | None, options: LoadOptions) -> Stages:
    """Opens the network; see `comask.runtime.backends.names.BACKENDS`.

    Raises:
        BackendUnavailableError: if PyTorch does not see the requested GPU, or the device has no bf16.
        BundleError: see `model_from_bundle`.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = nvidia_device(name, options.device)
    if device is None:
        device = 0 if there else "cpu"
    if device != "cpu" and device >= there:
        raise BackendUnavailableError(
            f"the torch backend: PyTorch sees {there} GPUs, number {device} was asked for"
        )
    place = device if device == "cpu" else f"cuda:{device}"
    if precision == "bf16":
        _require_bf16(place)
    stages = torch_stages(model_from_bundle(bundle).to(place), bf16=precision == "bf16")
    if device == "cpu":
        return stages
    memory = with_kernels(TorchMemory(torch.device(place)), stages.backend)
    return dataclasses.replace(stages, memory=memory)


def _require_bf16(place: str) -> None:
    """Raises BackendUnavailableError if a device would only imitate bf16, which is slower than fp32."""
    if place == "cpu":
        has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        has = torch.cuda.get_device_capability(place) >= (8, 0)
    if not has:
        raise BackendUnavailableError(
            f"torch:bf16: {place} here has no bf16 arithmetic: take torch in fp32"
        )
