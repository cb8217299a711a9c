"""The kernels with a thread for each lane, or for each block, under ThreadSanitizer.

On the CPU a block has one lane, so a missing barrier changes nothing there. These builds have all lanes
of a launch, barriers, and memory that the lanes of a block share. No kernel relies on the order of the
lanes of a warp (a shuffle, a vote or __syncwarp would not compile for the CPU), so threads without any
order may stand in for them.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from comask.kernels import compile, run
from comask.kernels.launch import (
    Launch,
    MaskLaunches,
    nms_launch,
    nv12_to_canvas_launch,
    rgb_to_canvas_launch,
    roi_align_launch,
)

SOURCES = sorted(path.stem for path in compile.FOLDER.glob("*.cu"))
SANITIZED = ("-std=c++20", "-O1", "-g", "-march=native", "-fsanitize=thread")
# What a thread stands for; the plain build runs blocks on threads, with one lane each.
OPTIONS = {"lanes": ("-DLANES_ARE_THREADS",), "blocks": ()}
RACE = "WARNING: ThreadSanitizer: data race"


@dataclass(frozen=True)
class Case:
    """A launch, its inputs, and the output's number of bytes."""

    launch: Launch
    inputs: tuple[np.ndarray, ...]
    output: int

    def one_lane(self) -> bytes:
        """The result of the build that PyTorch uses on a CPU."""
        output = np.full(self.output, 0xA5, np.uint8)
        run.on_host(self.launch, [x.ctypes.data for x in self.inputs], output.ctypes.data)
        return output.tobytes()


def roi_cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for half, channels_last, channels, stride, ratio, grid in (
        (False, False, 70, 70, 2, None),
        (True, False, 130, 130, 3, 2),
        (False, True, 66, 72, 2, 3),
        (True, True, 130, 136, 2, None),
        (True, True, 13, 13, 2, 2),  # without vectors
    ):
        dtype = np.float16 if half else np.float32
        shapes = [(2, channels, 48 // s, 64 // s) for s in (1, 2, 4, 8)]
        maps = []
        for batch, count, height, width in shapes:
            values = rng.standard_normal((batch, stride, height, width)).astype(dtype)
            values[:, count:] = 0
            order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
            maps.append(np.ascontiguousarray(values.transpose(order)))
        corners = rng.uniform(-20, 180, (3, 2, 2)).astype(np.float32)
        rois = np.concatenate(([[0], [1], [1]], np.sort(corners, axis=1).reshape(3, 4)), axis=1)
        launch = roi_align_launch(
            shapes, 3, 0, 7, ratio, 56.0, half=half, channels_last=channels_last,
            channel_stride=stride,
        )  # fmt: skip
        yield Case(
            replace(launch, grid=grid or launch.grid),
            (*maps, rois.astype(np.float32)),
            3 * stride * 49 * dtype().itemsize,
        )


def nms_cases() -> Iterator[Case]:
    rng = np.random.default_rng(1)
    for rows, count, grid in ((3, 150, 2), (1, 33, 1), (1, 1000, 1)):
        corner = rng.uniform(0, 200, (rows, count, 2))
        boxes = np.concatenate((corner, corner + rng.uniform(1, 90, (rows, count, 2))), axis=2)
        groups = rng.integers(0, 3, (rows, count), np.int32)
        launch = replace(nms_launch(rows, count, 0.5), grid=grid)
        yield Case(launch, (boxes.astype(np.float32), groups), rows * count)


def frame_cases() -> Iterator[Case]:
    rng = np.random.default_rng(2)
    size, resized, canvas = (13, 300), (24, 270), (32, 288)
    output = canvas[0] * canvas[1] * 3
    pixels = rng.integers(0, 256, (3, *size), np.uint8)
    for strides in ((900, 3, 1), (300, 1, 3900)):  # packed, planar
        launch = rgb_to_canvas_launch(size, strides, resized, canvas)
        yield Case(replace(launch, grid=5), (pixels,), output)
    chroma = rng.integers(0, 256, (7, 150, 2), np.uint8)
    launch = nv12_to_canvas_launch(
        size, (7, 150), (300, 300), resized, canvas, matrix="bt709", full_range=False
    )
    yield Case(launch, (pixels[0], chroma), output)


def mask_cases() -> Iterator[Case]:
    rng = np.random.default_rng(3)
    count, found, cells, (height, width) = 4, np.array([3], np.int32), 28, (40, 300)
    y, x = np.mgrid[:cells, :cells] - (cells - 1) / 2
    disc = 1 / (1 + np.exp(np.hypot(x, y) - cells / 3))
    probs = (disc + rng.uniform(-0.2, 0.2, (count, cells, cells))).astype(np.float32)
    corner = rng.uniform(-10, 20, (count, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(20, 280, (count, 2))), axis=1)
    boxes = boxes.astype(np.float32)
    launches = MaskLaunches(count, cells, (height, width), 0.5, (1.1, 0.9))
    counting = Case(launches.edge_counts(), (probs, boxes, found), 4 * (count + count * width))
    counts = np.frombuffer(counting.one_lane(), np.int32)
    assert counts[:3].all()
    edges = int(counts[:count].sum())
    bitmaps = Case(launches.bitmaps(), (probs, boxes, found), count * height * width)
    cases = (
        counting,
        Case(launches.edges(edges), (probs, boxes, counts), 4 * edges),
        Case(launches.edges(edges // 2), (probs, boxes, counts), 4 * edges),
        bitmaps,
    )
    for case in cases:
        yield replace(case, launch=replace(case.launch, grid=2))
    yield bitmaps


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "frame_to_canvas": frame_cases,
    "paste_masks": mask_cases,
    "pyramid_roi_align": roi_cases,
    "sorted_nms": nms_cases,
}


@dataclass(frozen=True)
class Sanitizer:
    """Compiles kernels with ThreadSanitizer and runs their launches in processes of their own."""

    folder: Path
    command: tuple[str, ...]

    def library(self, source: str, how: str, text: str | None = None) -> Path:
        """Compiles a source, or another text in its place."""
        target = self.folder / f"{source}-{how}.so"
        code = compile.FOLDER / f"{source}.cu"
        if text is not None:
            code = self.folder / code.name
            code.write_text(text)
        options = (*compile.HOST_OPTIONS, *SANITIZED, *OPTIONS[how], f"-I{compile.FOLDER}")
        subprocess.run(["g++", *options, code, "-o", target], check=True)
        return target

    def run(self, library: Path, case: Case, threads: int) -> tuple[bytes, str]:
        """Returns the output and what the sanitizer says."""
        launch = case.launch
        data = b"".join(struct.pack("<q", x.nbytes) + x.tobytes() for x in case.inputs)
        for value in launch.integers:
            data += struct.pack("<qi", -1, value)
        data += struct.pack("<q", case.output) + b"\xa5" * case.output
        words = (str(library), f"{launch.entry}_host", str(launch.grid), str(threads))
        # A lane that skips a barrier leaves the others waiting.
        done = subprocess.run([*self.command, *words], input=data, capture_output=True, timeout=120)
        assert done.returncode in (0, 66), done.stderr.decode()
        return done.stdout, done.stderr.decode()


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Sanitizer:
    folder = tmp_path_factory.mktemp("sanitized")
    program = folder / "run_kernel"
    code = str(Path(__file__).with_name("run_kernel.cpp"))
    probe = 'extern "C" void probe_host(int, int, void **) {}\n'
    (folder / "probe.cpp").write_text("#include <barrier>\nstd::barrier<> barrier{1};\n" + probe)
    builds = (
        ["g++", *SANITIZED, "-pthread", code, "-o", str(program), "-ldl"],
        ["g++", *SANITIZED, "-shared", "-fPIC", "-pthread", str(folder / "probe.cpp"),
         "-o", str(folder / "probe.so")],
    )  # fmt: skip
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    for build in builds:
        built = subprocess.run(build, capture_output=True, text=True)
        if built.returncode:
            pytest.skip(f"g++ lacks ThreadSanitizer or std::barrier: {built.stderr.strip()}")
    said = ""
    # Where addresses are random in many bits, ThreadSanitizer may find no place for its shadow.
    for prefix in ((), ("setarch", "-R")):
        if prefix and shutil.which(prefix[0]) is None:
            continue
        command = (*prefix, str(program))
        words = (str(folder / "probe.so"), "probe_host", "1", "1")
        done = subprocess.run([*command, *words], input=bytes(8), capture_output=True)
        if done.returncode == 0:
            return Sanitizer(folder, command)
        said = done.stderr.decode(errors="replace").strip()
    pytest.skip(f"ThreadSanitizer does not run here: {said}")


def test_every_entry_has_a_case() -> None:
    assert sorted(CASES) == SOURCES
    for source, cases in CASES.items():
        assert {case.launch.entry for case in cases()} == set(compile.entries(source))


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("source", SOURCES)
def test_lanes_and_blocks_do_not_race(sanitizer: Sanitizer, source: str, how: str) -> None:
    """The launches have a GPU's blocks and threads, or fewer blocks, each of which works repeatedly."""
    library = sanitizer.library(source, how)
    for case in CASES[source]():
        threads = case.launch.block if how == "lanes" else case.launch.grid
        output, report = sanitizer.run(library, case, threads)
        assert RACE not in report, report
        assert report == ""
        assert output == case.one_lane()


def test_without_its_barriers_nms_is_reported(sanitizer: Sanitizer) -> None:
    text = (compile.FOLDER / "sorted_nms.cu").read_text()
    library = sanitizer.library("sorted_nms", "lanes", text.replace("BARRIER();", ""))
    case = next(nms_cases())
    output, report = sanitizer.run(library, case, case.launch.block)
    assert RACE in report
    assert "sorted_nms.cu" in report
    assert output != case.one_lane()


def test_blocks_that_write_the_same_bytes_are_reported(sanitizer: Sanitizer) -> None:
    text = (compile.FOLDER / "frame_to_canvas.cu").read_text()
    text = text.replace("int row = BLOCK;", "int row = BLOCK / 2;")
    case = next(frame_cases())
    _, report = sanitizer.run(
        sanitizer.library("frame_to_canvas", "blocks", text), case, case.launch.grid
    )
    assert RACE in report


@pytest.mark.slow
@pytest.mark.parametrize("source", ["paste_masks", "pyramid_roi_align", "sorted_nms"])
def test_every_barrier_is_needed(sanitizer: Sanitizer, source: str) -> None:
    """Also shows that the cases reach all of them."""
    text = (compile.FOLDER / f"{source}.cu").read_text()
    barriers = list(re.finditer(r"BARRIER\(\);", text))
    assert barriers
    for barrier in barriers:
        changed = text[: barrier.start()] + text[barrier.end() :]
        library = sanitizer.library(source, "lanes", changed)
        line = text[: barrier.start()].count("\n") + 1
        assert any(
            RACE in sanitizer.run(library, case, case.launch.block)[1] for case in CASES[source]()
        ), f"{source}.cu does not race without the barrier of line {line}"
