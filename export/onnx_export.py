"""Exports the PyTorch network to its two ONNX files with torch's dynamo exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from comask.export.functions import OPSET, add_functions
from comask.models.comask import (
    STAGE1_INPUTS,
    STAGE1_OUTPUTS,
    STAGE2_INPUTS,
    CoMask,
    folded,
    stage2_outputs,
)
from comask.models.precision import half_around
from comask.models.roi_align import STRIDES

# The traced example. All sizes differ, so that no two dynamic dimensions can be confused.
BATCH, HEIGHT, WIDTH, PROPOSALS, FOUND = 2, 192, 320, 24, 7
ROWS = "rows"  # name of stage 2's input that exists while it is traced; see `FoundRows`


class Stage1Graph(nn.Module):
    """The module of the first graph: `images, image_sizes` → `p2 … p5, proposals, proposal_scores`."""

    def __init__(self, model: CoMask) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs of `CoMask.stage1` as a tuple."""
        outputs = self.model.stage1(images, image_sizes)
        return tuple(outputs[name] for name in STAGE1_OUTPUTS)


class Stage2Graph(nn.Module):
    """The module of the second graph: the first one's outputs and `image_sizes` → padded detections."""

    def __init__(self, model: CoMask, *, diagnostics: bool) -> None:
        super().__init__()
        self.model = model
        self.diagnostics = diagnostics
        self.output_names = stage2_outputs(model.config, diagnostics=diagnostics)

    def forward(
        self,
        p2: Tensor,
        p3: Tensor,
        p4: Tensor,
        p5: Tensor,
        proposals: Tensor,
        proposal_scores: Tensor,
        image_sizes: Tensor,
        rows: Tensor,
    ) -> tuple[Tensor, ...]:
        """Returns the outputs of `CoMask.stage2` as a tuple."""
        outputs = self.model.stage2(
            p2, p3, p4, p5, proposals, proposal_scores, image_sizes,
            diagnostics=self.diagnostics, rows=rows,
        )  # fmt: skip
        return tuple(outputs[name] for name in self.output_names)


def in_precision(model: CoMask, precision: str, islands: Collection[str] = ()) -> CoMask:
    """Returns the network to export in `precision`, a copy in the form of `folded`.

    Args:
        model: the f32 model in evaluation mode.
        precision: `fp32` or `fp16`.
        islands: the paths of the modules that stay f32 in fp16, see `comask.export.fp16`.
    """
    copy = folded(model)
    if precision != "fp32":
        half_around(copy, islands)
    return copy


def export_stage1(model: CoMask, path: Path) -> None:
    """Writes `images, image_sizes` → pyramid and proposals; batch, height and width are dynamic."""
    images = torch.zeros(BATCH, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    sizes = torch.tensor([[HEIGHT, WIDTH]] * BATCH, dtype=torch.int32)
    batch, rows, columns = _dims("batch", "rows", "columns")
    shapes = ({0: batch, 1: 32 * rows, 2: 32 * columns}, {0: batch})
    _export(Stage1Graph(model), (images, sizes), shapes, STAGE1_INPUTS, STAGE1_OUTPUTS, path)


def export_stage2(model: CoMask, path: Path, *, diagnostics: bool) -> None:
    """Writes pyramid and proposals → detections; the number of proposals is dynamic, too."""
    channels = model.config.channels
    pyramid = [
        torch.zeros(BATCH, channels, HEIGHT // s, WIDTH // s, dtype=model.dtype) for s in STRIDES
    ]
    proposals = torch.zeros(BATCH, PROPOSALS, 4)
    scores = torch.zeros(BATCH, PROPOSALS)
    sizes = torch.tensor([[HEIGHT, WIDTH]] * BATCH, dtype=torch.int32)
    batch, rows, columns, count = _dims("batch", "rows", "columns", "proposals")
    found = torch.export.Dim("found", min=1, max=model.config.detections)
    shapes = (
        {0: batch, 2: 8 * rows, 3: 8 * columns},
        {0: batch, 2: 4 * rows, 3: 4 * columns},
        {0: batch, 2: 2 * rows, 3: 2 * columns},
        {0: batch, 2: rows, 3: columns},
        {0: batch, 1: count},
        {0: batch, 1: count},
        {0: batch},
        {1: found},
    )
    graph = Stage2Graph(model, diagnostics=diagnostics)
    inputs = (
        *pyramid,
        proposals,
        scores,
        sizes,
        torch.zeros(1, min(FOUND, model.config.detections)),
    )
    _export(graph, inputs, shapes, (*STAGE2_INPUTS, ROWS), graph.output_names, path)


def _count_rows(graph: Any) -> None:
    """Replaces the input `rows`, of which only the shape is read, by the first tensor that is cut."""
    (rows,) = [value for value in graph.inputs if value.name == ROWS]
    assert {node.op_type for node, _ in rows.uses()} == {"Shape"}
    cut = next(node.outputs[0] for node in graph if node.op_type == "CutRows")
    rows.replace_all_uses_with(cut)
    graph.inputs.remove(rows)
    graph.sort()  # the shape was known from the beginning


def _dims(*names: str) -> tuple[Any, ...]:
    return tuple(torch.export.Dim(name, min=1, max=2**14) for name in names)


def _export(
    graph: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    input_names: tuple[str, ...],
    output_names: tuple[str, ...],
    path: Path,
) -> None:
    graph.eval()
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic_shapes,
            input_names=list(input_names),
            output_names=list(output_names),
            verbose=False,
        )
    assert program is not None
    if ROWS in input_names:
        _count_rows(program.model.graph)
    model = program.model_proto
    add_functions(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter, whose messages are about its internals; it raises real errors."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
