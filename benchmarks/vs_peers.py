"""Compares the time, memory and size of CoMask's bundle and torchvision's Mask R-CNN.

Both have ResNet-50 and FPN. All models take turns in one run on the same photo, with equal numbers of
proposals, pairs in NMS and detections; see `peers.py`. Training and accuracy are not compared.

    python benchmarks/vs_peers.py --plot docs/peers.svg --docs docs/performance.md
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import peers_report
import torch
from paste_and_rle import instances
from peers import (
    CONTESTANTS,
    PHOTO,
    CoMask,
    Contestant,
    Thresholded,
    Torchvision,
    Work,
    on_canvas,
    peak_memory,
    photo,
)
from pycocotools import mask as coco
from torch.utils.flop_counter import FlopCounterMode
from torchvision_network import CLASSES, export_network

from comask.bundle import (
    INT8_BASE,
    STAGES,
    Bundle,
    extend,
    graph_file,
    scratch_folder,
    sha256,
    with_graphs,
)
from comask.errors import BackendUnavailableError, ComaskError
from comask.parallel import cores
from comask.preprocess import Prepared
from comask.progress import Progress
from comask.runtime.bench.machine import describe_machine
from comask.runtime.bench.plots import check_plot

REFERENCE = "torchvision eager"
FILE = ("torchvision onnxruntime", "torchvision openvino")  # those that run torchvision's ONNX file
MASK_THRESHOLD = 0.5
NEAR = 0.01  # allowed relative difference of the outputs of torchvision's ONNX file
ALIKE = 0.9  # least IoU of pasted masks; torchvision rounds boxes to whole pixels

Contestants = dict[str, Contestant]


class DifferentError(ComaskError):
    """A contestant does not compute what its original does, so its time says nothing."""


@click.command()
@click.option("--bundle", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="CoMask's bundle, score threshold 0. [comask-r50 with random weights]")  # fmt: skip
@click.option("--sizes", metavar="N,…", help="Short sides of the resized photo. [800,480]")
@click.option("--detections", default="100,10", show_default=True, metavar="N,…")
@click.option("--proposals", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--runs", type=click.IntRange(2), help="Number of turns. [5]")
@click.option("--only", multiple=True, type=click.Choice(list(CONTESTANTS)),
              help=f"Measure only these; {REFERENCE} always runs.")  # fmt: skip
@click.option("--accuracy", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="JSON of comask eval on a trained bundle, for the column of AP.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Run quickly: --sizes 320 --runs 3.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), help="Write a plot: .png, .svg or .pdf.")
@click.option("--docs", type=click.Path(exists=True, path_type=Path),
              help="Replace the tables between the markers of this page.")  # fmt: skip
def main(
    bundle: Path | None, sizes: str | None, detections: str, proposals: int, runs: int | None,
    only: tuple[str, ...], accuracy: Path | None, quick: bool, json_file: Path | None,
    plot: Path | None, docs: Path | None,
) -> None:  # fmt: skip
    """Compare CoMask with other networks. On a GPU, fp16 engines are added to a bundle without them."""
    sides = numbers(sizes or ("320" if quick else "800,480"))
    counts = numbers(detections)
    runs = runs or (3 if quick else 5)
    try:
        if plot:
            check_plot(plot)
        if docs:
            peers_report.check_page(docs)
        with tempfile.TemporaryDirectory() as folder:
            work = Work(
                bundle=str(bundle or Path(folder) / "bundle"),
                graph=str(Path(folder) / "torchvision.onnx"),
                proposals=proposals,
                detections=max(counts),
                device="cuda" if torch.cuda.is_available() else "cpu",
            )
            if bundle is None:
                click.echo("exporting comask-r50", err=True)
                make_bundle(Path(work.bundle))
            names = [name for name in CONTESTANTS if not only or name in (REFERENCE, *only)]
            report = measure(work, names, sides, counts, runs)
            report["accuracy"] = json.loads(accuracy.read_text()) if accuracy else None
    except ComaskError as error:
        raise click.ClickException(str(error)) from error
    click.echo(peers_report.tables(report))
    if json_file:
        json_file.write_text(json.dumps(report, indent=1))
    if plot:
        peers_report.draw(report, plot)
    if docs:
        peers_report.write_page(report, docs)


def numbers(text: str) -> list[int]:
    """Parses `100,10` as [100, 10]."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise click.UsageError(f"{text}: expected positive whole numbers separated by commas")
    return [int(part) for part in parts]


def measure(
    work: Work, names: list[str], sides: list[int], counts: list[int], runs: int
) -> dict[str, Any]:
    """Measures all contestants and returns the report that `--json` writes."""
    torch.set_num_threads(cores())  # ONNX Runtime uses this number by default
    machine = describe_machine(None if work.device == "cuda" else "cpu")
    canvases = {side: on_canvas(photo(), side) for side in sides}
    contestants, unavailable = open_all(work, names, canvases, counts)
    check_encoding(contestants, max(counts))
    models: dict[str, Any] = {
        name: {"parameters": parameters(one), "gflop": {}}
        for name, one in contestants.items()
        if parameters(one)
    }
    cases = []
    for side, prepared in canvases.items():
        height, width, _ = prepared.canvas.shape
        for count in counts:
            title = f"{height}x{width}, {count} detections"
            for name, one in contestants.items():
                if isinstance(one, CoMask):
                    one.begin(prepared, count)
                gflop = check(name, one, prepared, count, work.proposals)
                if name in models and count == max(counts):
                    models[name]["gflop"][f"{height}x{width}"] = gflop
            seconds = take_turns(contestants, side, count, runs, title)
            rows = {
                name: peers_report.row(seconds[name], seconds[REFERENCE]) for name in contestants
            }
            cases.append({"canvas": [height, width], "detections": count, "rows": rows})
    memory = memory_of_each(work, contestants, sides[0], canvases[sides[0]])
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": dataclasses.asdict(machine),
        "threads": torch.get_num_threads(),
        "photo": list(PHOTO),
        "proposals": work.proposals,
        "runs": runs,
        "reference": REFERENCE,
        "models": models,
        "contestants": {
            name: {"files": one.files, "memory": memory[name]} for name, one in contestants.items()
        },
        "unavailable": unavailable,
        "cases": cases,
    }


def make_bundle(folder: Path) -> None:
    """Exports `comask-r50` with random weights and COCO's number of classes."""
    from comask.data.shapes import ShapesSource
    from comask.data.source import Category
    from comask.export.pipeline import export_bundle
    from comask.models.comask import CoMask as Network
    from comask.presets import preset
    from comask.training.checkpoint import Checkpoint, save_checkpoint

    torch.manual_seed(0)
    config = preset("comask-r50")
    config = replace(
        config, preprocess=config.preprocess.resized(160)
    )  # makes the verification faster
    checkpoint = Checkpoint(
        config=config,
        categories=tuple(Category(id=i, name=f"class {i}") for i in range(1, CLASSES + 1)),
        model=Network(config.model, config.preprocess).state_dict(),
        ema=None, optimizer={}, scaler={}, step=0, best_ap=-1.0, stale=0, data="",
    )  # fmt: skip
    file = folder.with_suffix(".pt")
    save_checkpoint(file, checkpoint)
    images = [ShapesSource(num_images=1, seed=0).image(0)]
    export_bundle(
        checkpoint,
        file,
        folder,
        images,
        precisions=("fp32", "fp16"),
        settings=("model.score_threshold=0",),
    )
    add_int8(folder, images)


def add_int8(folder: Path, images: list[Any]) -> None:
    """Adds int8 graphs for timing alone: every layer in int8, AP unknown, since weights are random."""
    from comask.calib.qdq import graph_layers, quantize_graph
    from comask.calib.ranges import collect_ranges
    from comask.calib.sampling import CalibrationImage

    bundle = Bundle.open(folder)
    chosen = [
        CalibrationImage(str(place), str(place), partial(np.asarray, image))
        for place, image in enumerate(images)
    ]
    ranges = collect_ranges(bundle, chosen, cache=None, report=click.echo)
    largest = ranges.ranges("minmax")
    with scratch_folder(folder, folder) as made:
        for stage in STAGES:
            graph = onnx.load(bundle.graph(stage, INT8_BASE))
            layers = {layer.name for layer in graph_layers(graph)}
            quantized = quantize_graph(graph, largest, layers)
            onnx.save(quantized, made / graph_file(stage, "int8"))
        files = {path.name: sha256(path) for path in made.iterdir()}
        extend(bundle, made, lambda now: with_graphs(now, files, {"int8": {"timing_only": True}}))


def open_all(
    work: Work, names: list[str], canvases: dict[int, Prepared], counts: list[int]
) -> tuple[Contestants, dict[str, str]]:
    """Opens the contestants for all canvases; returns them and why the others cannot run."""
    most = Bundle.open(Path(work.bundle)).manifest.model.detections
    if most < work.detections:
        raise ComaskError(
            f"{work.bundle}: has {most} detections, and --detections asks for {work.detections}: ask for "
            f"fewer"
        )
    found: Contestants = {}
    unavailable: dict[str, str] = {}
    with Progress("opening", len(names), unit="contestants") as progress:
        for name in names:
            try:
                if name.startswith(FILE) and not Path(work.graph).exists():
                    export(found[REFERENCE], canvases, Path(work.graph))
                one = CONTESTANTS[name](work)
                if isinstance(one, Torchvision):
                    for prepared in canvases.values():
                        one.calibrate(prepared, counts)
                elif isinstance(one, Thresholded):
                    one.thresholds = dict(found[REFERENCE].thresholds)
                    smallest = min(canvases.values(), key=lambda prepared: prepared.canvas.size)
                    if name.endswith(":bf16"):  # too coarse to compare single rows
                        for prepared in canvases.values():
                            one.recalibrate(prepared, counts)
                    else:
                        compare(found[REFERENCE], one, smallest, max(counts))
            except (BackendUnavailableError, DifferentError) as error:
                unavailable[name] = str(error)
            else:
                found[name] = one
            progress.advance()
    return found, unavailable


def export(reference: Torchvision, canvases: dict[int, Prepared], path: Path) -> None:
    """Writes torchvision's ONNX file, traced on the smallest canvas."""
    canvas = min(canvases.values(), key=lambda prepared: prepared.canvas.size).canvas
    threshold = max(reference.thresholds.values())
    network = reference.module.cpu()
    export_network(network, torch.from_numpy(canvas), threshold, path)
    network.to(reference.device)


def check(name: str, one: Contestant, prepared: Prepared, count: int, proposals: int) -> float:
    """Checks in a first run, which also warms up, that a contestant does the requested work.

    Returns:
        The GFLOPs of its network without RoIAlign; 0 if PyTorch does not run it.

    Raises:
        ComaskError: if it does other work.
    """
    height, width, _ = prepared.canvas.shape
    with FlopCounterMode(display=False) as counter:
        boxes, masks, entered = one.network(prepared, count)
    shapes = boxes.shape, masks.shape, entered
    if shapes != ((count, 4), (count, 28, 28), proposals):
        raise ComaskError(
            f"{name} on {height}x{width}: boxes, masks and proposals are {shapes}, expected {count} "
            f"detections of {proposals} proposals: ask for fewer"
        )
    inside = (boxes >= 0).all() and (boxes <= [width, height] * 2).all()
    if not (inside and (masks >= 0).all() and (masks <= 1).all()):  # false for NaN as well
        raise ComaskError(f"{name} on {height}x{width}: boxes outside it, or masks outside 0..1")
    return counter.get_total_flops() / 1e9


def check_encoding(contestants: Contestants, count: int) -> None:
    """Raises ComaskError if the contestants paste masks differently."""
    pasted = {name: one.encode(*made(count)) for name, one in contestants.items()}
    for name, rles in pasted.items():
        overlap = float(np.mean(np.diag(coco.iou(rles, pasted[REFERENCE], [False] * count))))
        if not overlap >= ALIKE:
            raise ComaskError(f"{name}: its masks have an IoU of {overlap:.2f} with {REFERENCE}'s")


def compare(eager: Thresholded, onnx: Thresholded, prepared: Prepared, count: int) -> None:
    """Raises DifferentError if the exported file does not compute what eager PyTorch does."""
    threshold = eager.thresholds[prepared.canvas.shape, count]
    expected, found = (one.run(prepared, threshold) for one in (eager, onnx))
    for name in ("scores", "boxes", "masks"):
        # the median, because rows with nearly equal scores may be exchanged
        error = np.median(np.abs(found[name] - expected[name])) / np.abs(expected[name]).max()
        if not error <= NEAR:
            raise DifferentError(f"its {name} differ by {error:.2g} from PyTorch's")


def made(count: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int], float]:
    """Returns blurred discs for `Contestant.encode`, since masks from random weights have long RLEs."""
    probs, boxes = instances()
    places = np.arange(count) % len(boxes)
    return probs[places], boxes[places], PHOTO, MASK_THRESHOLD


def take_turns(
    contestants: Contestants, short_side: int, count: int, runs: int, title: str
) -> dict[str, list[list[float]]]:
    """Returns the seconds of preparation, network and masks for each run of each contestant."""
    image, discs = photo(), made(count)
    seconds: dict[str, list[list[float]]] = {name: [] for name in contestants}
    with Progress(title, runs, unit="turns") as progress:
        for _ in range(runs):
            for name, one in contestants.items():
                marks = [time.perf_counter()]
                prepared = on_canvas(image, short_side)
                marks.append(time.perf_counter())
                one.network(prepared, count)
                marks.append(time.perf_counter())
                one.encode(*discs)
                marks.append(time.perf_counter())
                seconds[name].append(np.diff(marks).tolist())
            progress.advance()
    return seconds


def parameters(one: Contestant) -> int | None:
    """Returns the number of parameters of a PyTorch network, without batch statistics; else None."""
    if isinstance(one, Torchvision):
        network = one.module
    elif isinstance(one, CoMask) and one.predictor.stages.backend.startswith("torch"):
        network = one.predictor.stages.stage1.model
    else:
        return None
    return sum(weight.numel() for weight in network.parameters())


def memory_of_each(
    work: Work, contestants: Contestants, short_side: int, prepared: Prepared
) -> dict[str, int]:
    """Returns the peak resident bytes of each contestant in a separate process."""
    found = {}
    with Progress("memory", len(contestants), unit="contestants") as progress:
        for name, one in contestants.items():
            threshold = 0.0
            if isinstance(one, Thresholded):
                threshold = one.thresholds[prepared.canvas.shape, work.detections]
            found[name] = peak_memory(name, work, short_side, threshold)
            progress.advance()
    return found


if __name__ == "__main__":
    main()
