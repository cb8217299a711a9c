"""Expected times of the kernels, computed from data sheets; `kernel_resources.py --expected` prints them.

The model of a kernel is the longest of three times, plus the launch:

- memory: the bytes that have to be read and written once, at a share of the memory's bandwidth;
- issue: the instructions of all warps, at a share of the rate at which the multiprocessors issue them;
- double: the operations in double, at their own rate.

It has no caches and no latencies, since no data sheet gives theirs. Where one of these decides, the row
says so and gives no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

WARP = 32
# Our assumptions; no data sheet has them, and only a measurement can replace them.
MEMORY_SHARE = 0.85  # of the bandwidth, in long streams of whole sectors
ISSUE_SHARE = 0.6  # of the issue slots, the others wait for memory or for registers
LAUNCH = 2e-6  # seconds from a kernel's start to the next one's on a stream, beside its work


@dataclass(frozen=True)
class Gpu:
    """Figures of NVIDIA's data sheets, and of the CUDA programming guide.

    Attributes:
        name: of the product.
        multiprocessors: their number; each issues `issued` instructions of a warp per clock.
        bandwidth: of the memory, in bytes per second.
        clock: the highest, in Hz.
        doubles: operations in double per clock and multiprocessor ("Throughput of Native Arithmetic
            Instructions" of the guide; 8.7 as 8.6, since the guide does not list it).
        issued: warp instructions per clock: the four schedulers of a multiprocessor.
    """

    name: str
    multiprocessors: int
    bandwidth: float
    clock: float
    doubles: int
    issued: int = 4


GPUS = {
    90: Gpu("H200", 132, 4.8e12, 1.98e9, 64),
    89: Gpu("L4", 58, 300e9, 2.04e9, 2),
    87: Gpu("Jetson AGX Orin", 16, 204.8e9, 1.3e9, 2),
}


@dataclass(frozen=True)
class Work:
    """What a kernel does at its typical size.

    Attributes:
        entry: the kernel.
        size: a description.
        read: bytes that have to be read once.
        written: bytes that have to be written once.
        steps: (number of a thread's steps, instructions per step); the instructions are counted in the
            machine code for sm_90.
        doubles: operations in double of all threads.
        unknown: why the model has no time for this kernel; empty if it has one.
    """

    entry: str
    size: str
    read: int
    written: int
    steps: tuple[tuple[int, int], ...] = ()
    doubles: int = 0
    unknown: str = ""


CACHES = "decided by L1 and L2"
LATENCY = "decided by dependent steps"


def _roi_align(rois: int, bins: int) -> Work:
    """Of f16 maps over 800 x 1344 with 256 channels, channels-last; two samples per bin and axis."""
    channels, bytes_ = 256, 2
    pixels = sum((800 // s) * (1344 // s) for s in (4, 8, 16, 32))
    pooled = rois * bins**2 * channels
    return Work(
        "pyramid_roi_align_f16_channels_last", f"{rois} RoIs, {bins} x {bins}",
        read=pixels * channels * bytes_ + 16 * rois, written=pooled * bytes_,
        steps=((pooled // 8, 470),),  # the loop over vectors of 8 channels
        unknown=CACHES,  # each bin reads 16 pixels of a map, so that the maps are read several times
    )  # fmt: skip


def _nms(entry: str) -> Work:
    rows, boxes, tiles = 5, 1000, 32
    words = rows * tiles * (tiles + 1) // 2 * 32 * 4
    ends = rows * boxes * 20, rows * boxes
    read, written = {
        "sorted_nms": ends, "nms_overlaps": (ends[0], words), "nms_keep": (words, ends[1]),
    }[entry]  # fmt: skip
    return Work(entry, f"{rows} x {boxes} boxes", read, written, unknown=LATENCY)


def _canvas() -> Work:
    height, width = 800, 1344
    resized, tiles = (750, 1333), (800 // 16) * -(-width // 128)
    return Work(
        "frame_to_canvas_nv12", "1080p to 800 x 1344",
        read=1920 * 1080 * 3 // 2, written=height * width * 3,
        # groups of four pixels: 736 instructions of the loop without the 36 for unaligned canvases
        steps=((resized[0] * -(-resized[1] // 4), 700),),
        doubles=tiles * (128 + 16) * 5,  # per column and row of a tile
    )  # fmt: skip


MASKS, CELLS, IMAGE = 100, 28, (1080, 1920)
BOX = (300, 200)  # rows and columns of a mask; a choice of ours
PASTE_STRIPS = 16  # blocks per mask, of launch.py


def _paste() -> Work:
    pixels = IMAGE[0] * IMAGE[1]
    rows, columns = BOX
    chunks = MASKS * rows * (columns // 16 + 1)
    touching = -(-rows * PASTE_STRIPS // IMAGE[0]) + 1  # of a mask's blocks
    return Work(
        "paste_masks", f"{MASKS} masks of {rows} x {columns} in 1080p",
        read=MASKS * CELLS**2 * 4, written=MASKS * pixels,
        # a chunk of 16 zeros; what one on the mask takes in addition; a pixel on the mask
        steps=((MASKS * pixels // 16, 55), (chunks, 140), (MASKS * rows * columns, 34)),
        # A warp of each block places the box (about 120); its cells' positions are tabulated.
        doubles=MASKS * (PASTE_STRIPS * WARP * 120 + 9 * (touching * columns + rows)),
    )  # fmt: skip


def _edges(entry: str) -> Work:
    probs, counts, edges = MASKS * CELLS**2 * 4, 4 * MASKS * (1 + IMAGE[1]), MASKS * BOX[1] * 2 * 4
    size = f"{MASKS} masks of {BOX[0]} x {BOX[1]} in 1080p"
    if entry == "mask_edge_counts":
        return Work(entry, size, probs, counts, unknown=LATENCY)
    return Work(entry, size, probs + counts, edges, unknown=LATENCY)


WORK = (
    _roi_align(1000, 7), _roi_align(100, 14), _nms("sorted_nms"), _nms("nms_overlaps"),
    _nms("nms_keep"), _canvas(), _paste(), _edges("mask_edge_counts"), _edges("mask_edges"),
)  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """Times in seconds; `floor` is that of the bytes at the full bandwidth."""

    floor: float
    memory: float
    issue: float
    double: float

    @property
    def total(self) -> float:
        """The longest of memory, issue and double, and the launch."""
        return max(self.memory, self.issue, self.double) + LAUNCH


def expected(work: Work, gpu: Gpu) -> Expected:
    """Returns the times of a kernel on a GPU."""
    floor = (work.read + work.written) / gpu.bandwidth
    warps = sum(count * instructions for count, instructions in work.steps) / WARP
    per_second = gpu.multiprocessors * gpu.clock
    issue = warps / (per_second * gpu.issued * ISSUE_SHARE)
    double = work.doubles / (per_second * gpu.doubles)
    return Expected(floor, floor / MEMORY_SHARE, issue, double)


def table(describe: Callable[[str, int], str]) -> str:
    """Returns a Markdown table of all kernels at their typical sizes.

    Args:
        describe: returns a kernel's registers and occupancy on a compute capability.
    """
    lines = [
        "| kernel | size | GPU | MB | floor µs | registers, occupancy | issue µs | double µs "
        "| expected µs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for work in WORK:
        for capability, gpu in GPUS.items():
            times = expected(work, gpu)
            cells = [
                work.entry, work.size, gpu.name, f"{(work.read + work.written) / 1e6:.2f}",
                _microseconds(times.floor), describe(work.entry, capability),
                _microseconds(times.issue) if work.steps else "none",
                _microseconds(times.double) if work.doubles else "none",
                f"none: {work.unknown}" if work.unknown else _microseconds(times.total),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.3g}"
