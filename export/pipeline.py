"""Checkpoint → bundle: weights, graphs, verification, manifest."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from comask.export.onnx_export import export_stage1, export_stage2
from comask.export.verify import verify
from comask.runtime.ort_session import ort_stages
from comask.runtime.session import Session
from comask.runtime.torch_session import torch_stages
from numpy.typing import NDArray

from comask import __version__
from comask.bundle import WEIGHTS, Bundle, Manifest, graph_file, sha256, write_manifest
from comask.errors import BundleError
from comask.training.checkpoint import Checkpoint, model_from_checkpoint


def export_bundle(
    checkpoint: Checkpoint,
    checkpoint_file: Path,
    output: Path,
    images: Sequence[NDArray[np.uint8]],
    *,
    score_threshold: float | None = None,
    diagnostics: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Writes a bundle that has been compared with PyTorch, or nothing.

    Args:
        checkpoint: to export.
        checkpoint_file: where it came from; its hash goes into the manifest.
        output: folder of the bundle; must not exist, or be empty.
        images: real images for the comparison, u8 [h, w, 3].
        score_threshold: detections below it are dropped in the graph; None: the model's own.
        diagnostics: also give stage 2 the outputs that show what the collaboration changed.
        report: takes a line before each step.

    Raises:
        BundleError: when `output` is in use.
        ParityError: when a graph differs from PyTorch.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BundleError(f"{output}: is there already; give a folder that is new or empty")
    config = checkpoint.config
    if score_threshold is not None:
        model_config = dataclasses.replace(config.model, score_threshold=score_threshold)
        config = dataclasses.replace(config, model=model_config)
        checkpoint = dataclasses.replace(checkpoint, config=config)
    model = model_from_checkpoint(checkpoint)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # beside the output, so that the finished bundle appears by a rename
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise BundleError(f"{output}: cannot be written: {error.strerror or error}") from error
    try:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
        report("exporting stage 1 (backbone, MFPN, RPN)")
        export_stage1(model, folder / graph_file("stage1", "fp32"))
        report("exporting stage 2 (collaborative RoI head)")
        export_stage2(model, folder / graph_file("stage2", "fp32"), diagnostics=diagnostics)
        manifest = Manifest(
            model=config.model,
            preprocess=config.preprocess,
            categories=checkpoint.categories,
            mask_threshold=config.model.mask_threshold,
            files={path.name: sha256(path) for path in sorted(folder.iterdir())},
            source={"checkpoint_sha256": sha256(checkpoint_file), "step": checkpoint.step},
            comask_version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        report(f"comparing the graphs with PyTorch on {len(images)} images")
        reference = torch_stages(model)
        with ort_stages(Bundle(folder, manifest), "fp32") as exported:
            manifest = dataclasses.replace(
                manifest,
                verification=verify(reference, exported, images, config.model, config.preprocess),
                graphs={
                    "stage1": _contract(exported.stage1),
                    "stage2": _contract(exported.stage2),
                },
            )
        write_manifest(folder, manifest)
        folder.chmod(0o755)  # mkdtemp's is private
        if output.exists():
            output.rmdir()
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Bundle(output, manifest)


def _contract(session: Session) -> dict[str, list[dict[str, object]]]:
    """A graph's inputs and outputs for the manifest."""
    return {
        side: [{"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape)} for s in specs]
        for side, specs in (("inputs", session.inputs), ("outputs", session.outputs))
    }
