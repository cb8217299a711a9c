"""Checks contexts, lanes, CUDA graphs and masks with the stand-in TensorRT on the GPU's own memory."""

from __future__ import annotations

import gc
import time
from functools import partial

import numpy as np
from context import Context
from device import allocations, free_memory
from in_threads import in_threads
from rows import Check, Figure
from stand_in_session import (
    ALIKE,
    PICTURES,
    SIZES,
    OwnFrame,
    distance,
    drawn,
    launches,
    load,
    on_host,
    require_clean,
    the,
)  # fmt: skip

SLOTS = 2
MIB = 2**20


def calls(context: Context) -> Figure:
    """Calls the predictor with images of three canvases and with a batch."""
    parts, worst = the(context), 0.0
    for frames in (
        [PICTURES[0]],
        PICTURES,
        [drawn(SIZES[1], 5)],
        [drawn(SIZES[2], 6)],
        PICTURES[:2],
    ):
        for found, expected in zip(parts.run(frames), parts.expected(frames), strict=True):
            worst = max(worst, distance(found, expected))
    return _judged(worst)


def streamed(context: Context, *, graphs: bool) -> Figure:
    """Streams frames on the GPU through two lanes, eagerly or as replayed CUDA graphs."""
    parts, count = the(context), context.sizes.frames
    frames = [OwnFrame(image) for image in PICTURES]
    expected = [parts.expected([image])[0] for image in PICTURES]
    with launches() as launched, parts.predictor.stream(graphs=graphs, slots=SLOTS) as session:
        start = time.perf_counter()
        futures = [session.submit(frames[place % 3]) for place in range(count)]
        found = [future.result() for future in futures]
        seconds = time.perf_counter() - start
    worst = max(distance(one, expected[place % 3]) for place, one in enumerate(found))
    should = count - SLOTS if graphs else 0  # a lane's first batch is not a graph's
    if launched[0] != should:  # a failed capture only logs a warning
        raise RuntimeError(f"{launched[0]} of {count} frames were graphs; expected {should}")
    return _judged(worst, f"{count / seconds:.0f} frames/s, computed on the CPU")


def recaptured(context: Context) -> Figure:
    """Changes the frames' shape twice in one lane, which must drop its graph and capture a new one."""
    parts, worst = the(context), 0.0
    pictures = [PICTURES[0], drawn(SIZES[1], 5), PICTURES[1]]
    with launches() as launched, parts.predictor.stream(slots=1) as session:
        for image in pictures:
            expected = parts.expected([image])[0]
            for _ in range(4):
                worst = max(worst, distance(session.submit(OwnFrame(image)).result(), expected))
    if launched[0] != 9:
        raise RuntimeError(f"{launched[0]} of 12 frames were graphs; expected 3 of each 4")
    return _judged(worst)


def grown(context: Context) -> Figure:
    """Runs small, large and small batches: buffers and scratch memory grow once and never again."""
    worst, parts, made = 0.0, load(context.folder), []
    with allocations() as blocks, parts.predictor, parts.predictor.stream(slots=1) as session:
        batches = [[drawn(SIZES[2], 6)], PICTURES, [drawn(SIZES[2], 7)]]
        frames = [[OwnFrame(image) for image in images] for images in batches]
        for _ in range(3):
            for images, sources in zip(batches, frames, strict=True):
                found = session.submit(sources).result()
                for one, other in zip(found, parts.expected(images), strict=True):
                    worst = max(worst, distance(one, other))
            made.append(blocks.made)
        del frames, sources
    if made[2] != made[0]:
        raise RuntimeError(f"{made[2] - made[0]} allocations for shapes that were known")
    return _judged(worst, f"{made[0]} allocations")


def threaded(context: Context) -> Figure:
    """Streams and calls from four threads that share a predictor and a session."""
    parts, worst = the(context), []
    expected = [parts.expected([image])[0] for image in PICTURES]
    frames = [OwnFrame(image) for image in PICTURES]
    with parts.predictor.stream(slots=SLOTS) as session:

        def work(place: int) -> None:
            for i in range(context.sizes.frames // 3):
                at = (place + i) % 3
                if i % 4 == 3:
                    worst.append(distance(parts.run([PICTURES[at]])[0], expected[at]))
                worst.append(distance(session.submit(frames[at]).result(60), expected[at]))

        errors = in_threads(4, work)
    if errors:
        raise errors[0]
    return _judged(max(worst))


def collected(context: Context) -> Figure:
    """Captures graphs while garbage waits whose collection frees the GPU's memory."""
    parts, worst = the(context), 0.0
    expected = parts.expected([PICTURES[0]])[0]
    threshold = gc.get_threshold()
    with launches() as launched, parts.predictor.stream(slots=1) as session:
        frame = OwnFrame(PICTURES[0])
        gc.set_threshold(10)
        try:
            for _ in range(8):
                future = session.submit(frame)
                worst = max(worst, distance(future.result(), expected))
                garbage = [future.outputs["scores"].copy()]
                garbage.append(garbage)  # which only the collector frees
        finally:
            gc.set_threshold(*threshold)
    if launched[0] != 7:
        raise RuntimeError(f"{launched[0]} of 8 frames were graphs; expected all but the first")
    return _judged(worst)


def masks(context: Context) -> Figure:
    """Compares a stream's bitmaps and RLEs, from frames that are resized, with those from the host."""
    parts, wrong, masks_found = the(context), 0, 0
    with parts.predictor.stream(slots=1) as session:
        for image in (drawn((90, 120), 8), PICTURES[0], PICTURES[0], PICTURES[0]):
            future = session.submit(OwnFrame(image), rle=True)
            bitmaps = on_host(future.bitmaps())
            found, expected = future.result(), parts.expected([image])[0]
            masks = np.zeros_like(bitmaps)
            masks[: len(found)] = found.masks
            wrong += int((bitmaps != masks).sum())
            pairs = zip(found.to_rle(), expected.to_rle(), strict=True)
            wrong += sum(ours != theirs for ours, theirs in pairs)
            masks_found += len(found)
    require_clean()
    note = f"{masks_found} masks"
    return Figure(value=float(wrong), unit="pixels and strings", most=0, note=note)


def closed(context: Context) -> Figure:
    """Loads, streams and closes; all that was allocated must be freed, and TensorRT's objects gone."""
    import standin_tensorrt

    from comask.runtime.device import open_device

    standing = dict(standin_tensorrt.alive)
    with allocations() as blocks:
        for _ in range(2):
            with open_device():
                before = free_memory()
            parts = load(context.folder)
            with parts.predictor, parts.predictor.stream() as session:
                frame = OwnFrame(PICTURES[0])
                for _ in range(4):
                    session.submit(frame).result()
                session.submit(frame)  # and nobody waits for it
            del frame, session, parts
            gc.collect()
            with open_device():
                lost = (before - free_memory()) / MIB
    if standin_tensorrt.alive != standing:
        raise RuntimeError(f"objects of TensorRT are left: {standin_tensorrt.alive}, {standing}")
    require_clean()
    note = f"of {blocks.made}; the second time, the driver kept {lost:.1f} MiB"
    return Figure(value=float(len(blocks.live)), unit="blocks left", most=0, note=note)


def _judged(worst: float, note: str = "") -> Figure:
    require_clean()
    return Figure(value=worst, unit="px or %", most=ALIKE, note=note)


def checks() -> list[Check]:
    """Returns the rows of the group."""
    reference = "the same graphs in ONNX Runtime on the CPU"
    needs = ("device", "kernels", "C++ compiler", "onnxruntime", "trained bundle")

    def row(
        name: str, run: object, fails: str, compared: str = reference, limit: float = 30
    ) -> Check:
        return Check(
            name=f"stand-in: {name}", run=run, compared=compared, fails=fails, limit=limit,
            needs=needs, provides="stand-in session" if run is calls else "",
        )  # type: ignore[arg-type]  # fmt: skip

    return [
        row("contexts", calls, "shapes, addresses or scratch memory are told wrongly", limit=45),
        row("frames, eager", partial(streamed, graphs=False), "an event or a wait is missing"),
        row(
            "frames, CUDA graphs", partial(streamed, graphs=True),
            "a capture fails, or a replay reads another batch's memory",
        ),
        row("frames, captured anew after another shape", recaptured, "an old graph is replayed"),
        row("frames, growth of buffers and scratch memory", grown, "memory moves under queued work"),
        row("frames from four threads", threaded, "threads block each other or mix up batches"),
        row("garbage collection around captures", collected, "a free during a capture ends graphs"),
        row(
            "bitmaps and RLEs", masks, "a pixel or a string differs",
            compared="the host's masks of the same detections",
        ),
        row("closing frees everything", closed, "memory or objects are left",
            compared="the blocks that were allocated"),
    ]  # fmt: skip
