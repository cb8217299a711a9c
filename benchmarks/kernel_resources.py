"""Lists the registers, memory and occupancy of every kernel on several GPUs; needs NVRTC, but no GPU.

python benchmarks/kernel_resources.py --output runs/kernel_resources.md
python benchmarks/kernel_resources.py --expected  # times on three GPUs: computed, not measured
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import expected_times

from comask.errors import KernelError
from comask.kernels.compile import CUDA_OPTIONS, FOLDER, HEADER, entries
from comask.kernels.launch import (
    FRAME,
    FRAME_THREADS,
    KEEP_THREADS,
    MASK_THREADS,
    MASKS,
    MAX_THREADS,
    NMS,
    ROI_ALIGN,
    THREADS,
    TILE,
)

WARP = 32  # threads
# Threads per block by source; SortedNms has this many for 1000 boxes and more. Then those of entries that
# differ from their source.
BLOCK_THREADS = {
    ROI_ALIGN: THREADS, NMS: MAX_THREADS, FRAME: FRAME_THREADS, MASKS: MASK_THREADS,
}  # fmt: skip
ENTRY_THREADS = {"nms_overlaps": TILE, "nms_keep": KEEP_THREADS}


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one multiprocessor share; it has 65536 registers in four parts.

    CUDA programming guide, "Technical Specifications per Compute Capability".

    Attributes:
        gpu: a GPU that has it.
        warps: the most warps at once.
        blocks: the most blocks at once.
        shared: the bytes of shared memory.
        reserved: the bytes of it that the driver takes from each block.
    """

    gpu: str
    warps: int
    blocks: int
    shared: int
    reserved: int = 1024


MULTIPROCESSORS = {
    75: Multiprocessor("T4", warps=32, blocks=16, shared=64 * 1024, reserved=0),
    80: Multiprocessor("A100", warps=64, blocks=32, shared=164 * 1024),
    86: Multiprocessor("RTX 30", warps=48, blocks=16, shared=100 * 1024),
    87: Multiprocessor("Orin", warps=48, blocks=16, shared=164 * 1024),
    89: Multiprocessor("L4", warps=48, blocks=24, shared=100 * 1024),
    90: Multiprocessor("H200", warps=64, blocks=32, shared=228 * 1024),
    100: Multiprocessor("B200", warps=64, blocks=32, shared=228 * 1024),
    120: Multiprocessor("RTX 50", warps=48, blocks=24, shared=100 * 1024),
}
REGISTERS_PER_PART, PARTS = 16384, 4
REGISTER_UNIT = 256  # registers are given to a warp in this unit: 8 per thread


@dataclass(frozen=True)
class Resources:
    """What a kernel needs.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory per block.
        stack: bytes of local memory per thread.
        spilled: bytes of registers that are stored to local memory and loaded again.
    """

    registers: int
    shared: int
    stack: int
    spilled: int


def resources(source: str, capability: int) -> dict[str, Resources]:
    """Returns what each entry of a source needs, as NVRTC's assembler reports it.

    Raises:
        ImportError: if cuda-bindings are not installed.
        KernelError: if NVRTC does not compile the source.
    """
    report = _assembler_report(source, capability)
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        numbers = {
            name: int(match[1]) if (match := re.search(pattern, part)) else 0
            for name, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("shared", r"(\d+) bytes smem"),
                ("stack", r"(\d+) bytes stack frame"),
                ("spilled", r"(\d+) bytes spill stores"),
            )
        }
        found[part.partition("'")[0]] = Resources(**numbers)
    return found


class Occupancy(NamedTuple):
    """How far a kernel fills a multiprocessor: blocks at once, and their share of the most warps."""

    blocks: int
    share: float


def occupancy(capability: int, threads: int, needed: Resources) -> Occupancy:
    """Returns a kernel's occupancy, as NVIDIA's cuda_occupancy.h computes it.

    Args:
        capability: of the GPU, 90 for 9.0; one of `MULTIPROCESSORS`.
        threads: per block.
        needed: what the kernel needs; none of ours has dynamic shared memory.
    """
    on = MULTIPROCESSORS[capability]
    warps = -(-threads // WARP)
    registers = _rounded_up(needed.registers * WARP, REGISTER_UNIT)
    shared = _rounded_up(needed.shared + on.reserved, 128 if capability >= 80 else 256)
    blocks = min(
        on.blocks,
        on.warps // warps,
        PARTS * (REGISTERS_PER_PART // registers) // warps,
        on.shared // shared if shared else on.blocks,
    )
    return Occupancy(blocks, blocks * warps / on.warps)


def table(capabilities: Sequence[int]) -> str:
    """Returns a Markdown table of all kernels on GPUs of these compute capabilities."""
    lines = [
        "| kernel | threads | shared memory | "
        + " | ".join(f"{MULTIPROCESSORS[c].gpu} (sm_{c})" for c in capabilities)
        + " |",
        "|---|---|---|" + "---|" * len(capabilities),
    ]
    for source in BLOCK_THREADS:
        by_capability = {c: resources(source, c) for c in capabilities}
        for entry in by_capability[capabilities[0]]:
            cells, threads = [], ENTRY_THREADS.get(entry, BLOCK_THREADS[source])
            for capability, found in by_capability.items():
                needed = found[entry]
                share = occupancy(capability, threads, needed).share
                cell = f"{needed.registers} registers, {share:.0%}"
                if needed.stack or needed.spilled:
                    cell += f", stack {needed.stack} B, spilled {needed.spilled} B"
                cells.append(cell)
            shared = by_capability[capabilities[0]][entry].shared
            lines.append(f"| {entry} | {threads} | {shared} B | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def expected_table() -> str:
    """Returns a Markdown table of the times that `expected_times` computes; nothing is measured."""
    found = {
        (entry, capability): needed
        for capability in expected_times.GPUS
        for source in BLOCK_THREADS
        for entry, needed in resources(source, capability).items()
    }
    threads = {work: BLOCK_THREADS[s] for s in BLOCK_THREADS for work in entries(s)} | ENTRY_THREADS

    def describe(entry: str, capability: int) -> str:
        needed = found[entry, capability]
        share = occupancy(capability, threads[entry], needed).share
        return f"{needed.registers}, {share:.0%}"

    return expected_times.table(describe)


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _assembler_report(source: str, capability: int) -> str:
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    code, header = (FOLDER / f"{source}.cu").read_bytes(), (FOLDER / HEADER).read_bytes()
    _, program = nvrtc.nvrtcCreateProgram(code, source.encode(), 1, [header], [HEADER.encode()])
    try:
        options = [f"-arch=sm_{capability}", *CUDA_OPTIONS, "--ptxas-options=-v"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        text = b" " * size
        nvrtc.nvrtcGetProgramLog(program, text)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    report: str = text.decode(errors="replace")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(
            f"NVRTC, compiling {source}.cu for sm_{capability}: {status.name} {report}"
        )
    return report


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write the table to this file, too."
)
@click.option(
    "--capability", "capabilities", multiple=True, type=click.Choice([*map(str, MULTIPROCESSORS)]),
    help="Only GPUs of this compute capability (90 for 9.0); may be repeated.",
)  # fmt: skip
@click.option(
    "--expected", is_flag=True, help="Print times on three GPUs instead: computed, not measured."
)
def main(output: Path | None, capabilities: tuple[str, ...], expected: bool) -> None:
    """Print registers per thread and occupancy of every kernel as a Markdown table."""
    chosen = [int(c) for c in capabilities] or list(MULTIPROCESSORS)
    text = expected_table() if expected else table(chosen)
    click.echo(text, nl=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
