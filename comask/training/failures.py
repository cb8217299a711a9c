"""Ends of a run that its user can do something about."""

from __future__ import annotations

import json
from pathlib import Path

from comask.data.loading import Batch
from comask.data.source import Id
from comask.errors import TrainingError
from comask.whole_file import write_whole


def non_finite(
    folder: Path, step: int, losses: dict[str, float], image_ids: list[Id]
) -> TrainingError:
    """The error of a loss that is not finite; what is needed to find out why is kept in a file.

    Args:
        folder: of the run; gets `non_finite.json`.
        step: optimiser steps done.
        losses: of the step that failed.
        image_ids: of its images, on all processes; none on any but the first process, which writes.
    """
    file = folder / "non_finite.json"
    if image_ids:
        # NaN and infinity are not JSON
        report = {
            "step": step,
            "losses": {name: str(loss) for name, loss in losses.items()},
            "image_ids": image_ids,
        }
        write_whole(file, (json.dumps(report, indent=2) + "\n").encode())
    parts = ", ".join(f"{name} {loss:.3g}" for name, loss in losses.items())
    return TrainingError(
        f"the loss is not finite at step {step} ({parts}); its images {image_ids} are kept in {file}; "
        f"lower train.learning_rate, raise train.warmup_steps or set train.clip_norm, then go on "
        f"with --resume"
    )


def out_of_memory(batch: Batch) -> TrainingError:
    """The error of a batch that is too large for the GPU, naming the settings that shrink it."""
    count, height, width = batch.images.shape[:3]
    found = f"out of GPU memory with {count} images of {width}x{height} at once"
    if count == 1:
        return TrainingError(
            f"{found}: go on with --resume --set train.precision=bf16, or start anew with a smaller "
            f"preprocess.max_side"
        )
    return TrainingError(
        f"{found}: go on with --resume --set train.micro_batch={count // 2} (a step keeps its images, "
        f"in smaller parts) or train.precision=bf16"
    )
