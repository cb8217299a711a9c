"""Copies of a bundle that keep fewer detections, for benchmarks with random weights."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from comask.bundle import MANIFEST, Bundle, graph_file, sha256, write_manifest


def threshold_for(scores: NDArray[np.float32], count: int) -> float:
    """Returns the threshold that `count` of these falling scores exceed; more if some are equal there.

    In bf16, several scores may be the same. Their detections are computed as well, and left out.
    """
    after = float(scores[count])
    if scores[count - 1] > after:
        return (float(scores[count - 1]) + after) / 2
    return float(np.nextafter(np.float32(after), np.float32(0)))


def with_threshold(model: onnx.ModelProto, threshold: float) -> onnx.ModelProto:
    """Returns stage 2's graph with another threshold for the scores, which come from its Softmax."""
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        scores = producers.get(node.input[0]) if node.op_type == "Greater" else None
        if scores is not None and producers[scores.input[0]].op_type == "Softmax":
            value = numpy_helper.from_array(np.array(threshold, np.float32), "threshold")
            model.graph.initializer.append(value)
            node.input[1] = value.name
            return model
    raise click.ClickException("stage 2 compares no score with a threshold")


def bundle_with_threshold(folder: Path, copy: Path, threshold: float) -> None:
    """Makes a copy of a bundle with another threshold; files that stay the same are hard links."""
    copy.mkdir()
    manifest = Bundle.open(folder).manifest
    changed = {graph_file("stage2", precision) for precision in manifest.precisions}
    files = dict(manifest.files)
    for name in manifest.files:
        if name in changed:
            onnx.save(with_threshold(onnx.load(folder / name), threshold), copy / name)
            files[name] = sha256(copy / name)
        elif name != MANIFEST:
            os.link(folder / name, copy / name)
    model = dataclasses.replace(manifest.model, score_threshold=threshold)
    write_manifest(copy, dataclasses.replace(manifest, model=model, files=files))
