"""Exports a checkpoint to a bundle (weights, verified graphs, manifest), and adds graphs to a bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comask import __version__
from comask.bundle import (
    STAGES,
    WEIGHTS,
    Bundle,
    Manifest,
    extend,
    graph_file,
    scratch_folder,
    sha256,
    with_graphs,
    write_manifest,
)
from comask.config import Config, PreprocessConfig
from comask.config_reading import override
from comask.errors import BundleError, ConfigError
from comask.export.fp16 import Fp16Report, float_islands, scan_ranges
from comask.export.onnx_export import export_stage1, export_stage2, in_precision
from comask.export.verify import Verification, verification_batches, verify
from comask.models.comask import DIAGNOSTIC_OUTPUTS, CoMask
from comask.runtime.backends.base import Stage
from comask.runtime.backends.ort import ort_stages
from comask.runtime.backends.ort_install import import_onnxruntime
from comask.runtime.backends.pytorch import model_from_bundle, torch_stages
from comask.runtime.tolerances import TOLERANCES
from comask.training.checkpoint import Checkpoint, model_from_checkpoint

# The settings of `ModelConfig` with which the same weights may be exported.
CHANGEABLE = (
    "rpn_nms_iou", "rpn_top_k", "proposals", "score_threshold", "nms_iou", "detections",
    "refined_nms_iou", "agreement_score", "second_boxes", "mask_threshold",
)  # fmt: skip

Images = Sequence[NDArray[np.uint8]]
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphReport:
    """Reports how the graphs of one precision were made and compared with PyTorch before release.

    Attributes:
        images: the number of images on which they were compared.
        verification: the comparison of the graphs in ONNX Runtime.
        rounded: the comparison of PyTorch in the same precision, which rounds like a GPU; None for fp32.
        fp16: the modules that stay fp32 in fp16 graphs; None for other precisions.
    """

    images: int
    verification: Verification
    rounded: Verification | None = None
    fp16: Fp16Report | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry of the manifest's `verification`."""
        entry = {"images": self.images, **self.verification.to_dict()}
        if self.rounded:
            entry["rounded"] = self.rounded.to_dict()
        return entry | (self.fp16.to_dict() if self.fp16 else {})


class Exported(NamedTuple):
    """A bundle, and the reports on the graphs that were added, by precision."""

    bundle: Bundle
    reports: dict[str, GraphReport]


def export_bundle(
    checkpoint: Checkpoint,
    checkpoint_file: Path,
    output: Path,
    images: Images,
    *,
    precisions: Sequence[str] = ("fp32",),
    settings: Sequence[str] = (),
    diagnostics: bool = False,
    report: Report = lambda line: None,
) -> Exported:
    """Writes a bundle whose graphs have been compared with PyTorch; on failure, writes nothing.

    Args:
        checkpoint: the checkpoint to export.
        checkpoint_file: the checkpoint's file, whose SHA-256 goes into the manifest.
        output: the bundle's folder, which must be new or empty.
        images: real images for the comparison, u8 [h, w, 3].
        precisions: the precisions of the graphs, `fp32` first.
        settings: changes of `CHANGEABLE` settings, such as `model.score_threshold=0.1`.
        diagnostics: whether stage 2 gets the extra outputs that the first stage's AP needs.
        report: called with a line before each step.

    Raises:
        BackendUnavailableError: ONNX Runtime, which runs the graphs, is not installed.
        BundleError: `output` is in use.
        ConfigError: a setting needs training, or its value does not fit.
        ParityError: a graph differs from PyTorch.
        PrecisionError: fp16 cannot hold the network's values.
    """
    import_onnxruntime()  # before minutes are spent on graphs
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BundleError(f"{output}: is there already; give a folder that is new or empty")
    config = with_settings(checkpoint.config, settings)
    model = model_from_checkpoint(dataclasses.replace(checkpoint, config=config))
    # The scratch folder is beside the output, so that a rename publishes the finished bundle.
    with scratch_folder(output, output.parent) as folder:
        _write_weights(model, config.preprocess, folder / WEIGHTS)
        manifest = Manifest(
            model=config.model,
            preprocess=config.preprocess,
            categories=checkpoint.categories,
            mask_threshold=config.model.mask_threshold,
            precisions=(),
            files={WEIGHTS: sha256(folder / WEIGHTS)},
            source={"checkpoint_sha256": sha256(checkpoint_file), "step": checkpoint.step},
            comask_version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        exported = Exported(Bundle(folder, manifest), {})
        for precision in precisions:
            exported = _with_graphs(exported, model, precision, images, diagnostics, report)
        write_manifest(folder, exported.bundle.manifest)
        folder.chmod(0o755)  # The scratch folder is private.
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return Exported(Bundle(output, exported.bundle.manifest), exported.reports)


def with_settings(config: Config, settings: Sequence[str]) -> Config:
    """Returns the configuration of a trained network with changes that need no training.

    Raises:
        ConfigError: a setting needs training, or its value does not fit.
    """
    changed = override(config, tuple(settings))
    for assignment in settings:
        name = assignment.partition("=")[0]
        if name.removeprefix("model.") not in CHANGEABLE:
            raise ConfigError(
                f"--set {assignment}: {name} cannot change after training; expected one of model."
                + ", model.".join(CHANGEABLE)
            )
    return changed


def add_precisions(
    bundle: Bundle,
    precisions: Sequence[str],
    images: Images,
    *,
    report: Report = lambda line: None,
) -> Exported:
    """Adds graphs of more precisions to a bundle; on failure, the bundle stays unchanged.

    Args:
        bundle: the bundle, with its weights.
        precisions: precisions that it does not hold yet.
        images: real images for the comparison, u8 [h, w, 3].
        report: called with a line before each step.

    Raises:
        BackendUnavailableError: ONNX Runtime, which runs the graphs, is not installed.
        BundleError: the bundle cannot be read or written.
        ParityError: a graph differs from PyTorch.
        PrecisionError: fp16 cannot hold the network's values.
    """
    import_onnxruntime()  # before minutes are spent on graphs
    model = model_from_bundle(bundle)
    names = {output["name"] for output in bundle.manifest.graphs["stage2"]["outputs"]}
    diagnostics = names.issuperset(DIAGNOSTIC_OUTPUTS)
    with scratch_folder(bundle.folder, bundle.folder) as folder:
        exported = Exported(Bundle(folder, bundle.manifest), {})
        for precision in precisions:
            exported = _with_graphs(exported, model, precision, images, diagnostics, report)
        made = exported.bundle.manifest
        files = {name: made.files[name] for name in made.files.keys() - bundle.manifest.files}
        verification = {precision: made.verification[precision] for precision in precisions}
        extended = extend(bundle, folder, lambda now: with_graphs(now, files, verification))
        return Exported(extended, exported.reports)


def _with_graphs(
    exported: Exported,
    model: CoMask,
    precision: str,
    images: Images,
    diagnostics: bool,
    report: Report,
) -> Exported:
    """Adds graphs of one more precision, compared with PyTorch; does not write the manifest."""
    bundle, manifest = exported.bundle, exported.bundle.manifest
    fp16, rounded = None, None
    if precision == "fp16":
        report(f"scanning {len(images)} images for values beyond fp16")
        extremes = scan_ranges(model, images, manifest.preprocess)
        fp16 = Fp16Report.of(extremes, float_islands(extremes))
    converted = in_precision(model, precision, fp16.islands if fp16 else ())
    report(f"exporting stage 1 (backbone, MFPN, RPN) in {precision}")
    paths = {stage: bundle.folder / graph_file(stage, precision) for stage in STAGES}
    export_stage1(converted, paths["stage1"])
    report(f"exporting stage 2 (collaborative RoI head) in {precision}")
    export_stage2(converted, paths["stage2"], diagnostics=diagnostics)
    written = {path.name: sha256(path) for path in paths.values()}
    bundle = Bundle(bundle.folder, dataclasses.replace(manifest, files=manifest.files | written))

    report(f"comparing the {precision} graphs with PyTorch on {len(images)} images")
    reference, tolerance = torch_stages(model), TOLERANCES[precision]
    batches = verification_batches(images, manifest.preprocess)
    with ort_stages(bundle, precision) as graphs:
        verification = verify(reference, graphs, batches, manifest.model, tolerance)
        contract = {name: _contract(getattr(graphs, name)) for name in STAGES}
    if precision == "fp16":
        # On a CPU, ONNX Runtime computes fp16 graphs in fp32, while PyTorch rounds every activation. Only
        # this comparison shows an overflow.
        report(f"comparing PyTorch in {precision} with PyTorch in fp32")
        half = torch_stages(converted)
        rounded = verify(reference, half, batches[:1], manifest.model, tolerance)
    made = GraphReport(images=len(images), verification=verification, rounded=rounded, fp16=fp16)
    changed = with_graphs(manifest, written, {precision: made.to_dict()})
    changed = dataclasses.replace(changed, graphs=manifest.graphs or contract)
    return Exported(Bundle(bundle.folder, changed), exported.reports | {precision: made})


def _write_weights(model: CoMask, preprocess: PreprocessConfig, path: Path) -> None:
    """Writes the weights and the preprocessing, so that `comask eval` can detect an altered manifest."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    try:
        save_file(tensors, path, {"preprocess": json.dumps(dataclasses.asdict(preprocess))})
    except SafetensorError as error:  # safetensors raises it instead of OSError.
        raise BundleError(f"{path.name} cannot be written: {error}") from error


def _contract(session: Stage) -> dict[str, list[dict[str, object]]]:
    """Returns a graph's inputs and outputs for the manifest."""
    return {
        side: [{"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape)} for s in specs]
        for side, specs in (("inputs", session.inputs), ("outputs", session.outputs))
    }
