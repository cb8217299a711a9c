"""Registers, spills, shared memory and occupancy of the kernels, by `benchmarks/kernel_resources.py`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from comask.kernels import compile
from comask.kernels.launch import (
    TILE_COLUMNS,
    TILE_ROWS,
    MaskLaunches,
    nv12_to_canvas_launch,
)

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MEASURED_WITH = (13, 0)  # NVRTC's version

# The most registers per thread. A GPU gives them to a warp in units of 8 per thread, so the numbers are
# rounded up to that: within a unit, a change does not change the occupancy. There is no further margin,
# since one unit more can cost a block. Another NVRTC allocates otherwise, which is not our regression.
CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 120)
REGISTERS = {
    "pyramid_roi_align_f32_planes": (88, 88, 88, 88, 88, 96, 80, 80),
    "pyramid_roi_align_f16_planes": (80, 80, 80, 80, 80, 88, 80, 80),
    "pyramid_roi_align_f32_channels_last": (120, 120, 120, 120, 120, 128, 128, 128),
    "pyramid_roi_align_f16_channels_last": (128, 120, 120, 120, 120, 128, 120, 120),
    "sorted_nms": (40, 40, 40, 40, 40, 40, 48, 48),
    "nms_overlaps": (48, 48, 48, 48, 48, 56, 48, 48),
    "nms_keep": (40, 32, 40, 40, 40, 40, 64, 64),
    "frame_to_canvas_rgb": (72, 72, 72, 72, 72, 80, 80, 72),
    "frame_to_canvas_nv12": (64, 64, 64, 64, 64, 64, 64, 64),
    "mask_edge_counts": (56, 48, 48, 48, 48, 56, 56, 56),
    "mask_edges": (64, 56, 56, 56, 56, 56, 72, 72),
    "paste_masks": (64, 64, 64, 64, 64, 64, 64, 64),
}
SHARED = {
    "pyramid_roi_align": 4096,
    "sorted_nms": 32768,
    "frame_to_canvas": 4608,
    "paste_masks": 26008,
}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernel_resources

    return kernel_resources


def known(capability: int) -> None:
    if capability not in nvrtc.nvrtcGetSupportedArchs()[1]:
        pytest.skip(f"this NVRTC does not know sm_{capability}")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("source", SHARED)
def test_no_kernel_spills_or_needs_more_than_it_did(
    tool: ModuleType, source: str, capability: int
) -> None:
    known(capability)
    found = tool.resources(source, capability)
    assert set(found) == set(compile.entries(source))
    for needed in found.values():
        assert (needed.stack, needed.spilled) == (0, 0)
        assert 0 < needed.registers <= 255
    assert max(needed.shared for needed in found.values()) <= SHARED[source]
    if nvrtc.nvrtcVersion()[1:] != MEASURED_WITH:
        pytest.skip(f"registers were measured with NVRTC {'.'.join(map(str, MEASURED_WITH))}")
    place = CAPABILITIES.index(capability)
    for entry, needed in found.items():
        assert needed.registers <= REGISTERS[entry][place], entry


def test_every_kernel_is_listed(tool: ModuleType) -> None:
    sources = {path.stem for path in compile.FOLDER.glob("*.cu")}
    assert set(SHARED) == set(tool.BLOCK_THREADS) == sources
    assert set(REGISTERS) == {entry for source in sources for entry in compile.entries(source)}
    assert set(tool.ENTRY_THREADS) < set(REGISTERS)
    assert tuple(tool.MULTIPROCESSORS) == CAPABILITIES


def test_a_spill_is_seen(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8 blocks of 256 threads on a multiprocessor, 32 registers are left to a thread."""
    shutil.copytree(compile.FOLDER, tmp_path / "sources")
    source = tmp_path / "sources" / "paste_masks.cu"
    source.write_text(
        source.read_text().replace(
            "KERNEL(paste_masks, THREADS, 4)", "KERNEL(paste_masks, THREADS, 8)"
        )
    )
    monkeypatch.setattr(tool, "FOLDER", tmp_path / "sources")
    found = tool.resources("paste_masks", 90)
    assert found["paste_masks"].registers == 32
    assert found["paste_masks"].stack > 0
    assert found["paste_masks"].spilled > 0
    assert found["mask_edges"].spilled == 0


NVIDIAS = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
    int capability, warps, shared, reserved, threads, registers, bytes;
    while (std::scanf("%d %d %d %d %d %d %d", &capability, &warps, &shared, &reserved, &threads,
                      &registers, &bytes) == 7) {
        cudaOccDeviceProp gpu;
        gpu.computeMajor = capability / 10, gpu.computeMinor = capability % 10;
        gpu.maxThreadsPerBlock = 1024, gpu.maxThreadsPerMultiprocessor = 32 * warps;
        gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536, gpu.warpSize = 32, gpu.numSms = 1;
        gpu.sharedMemPerBlock = 49152, gpu.sharedMemPerMultiprocessor = shared;
        gpu.sharedMemPerBlockOptin = shared - reserved, gpu.reservedSharedMemPerBlock = reserved;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = bytes;
        kernel.numBlockBarriers = 1;
        cudaOccDeviceState state;
        cudaOccResult result;
        const cudaOccError error =
            cudaOccMaxActiveBlocksPerMultiprocessor(&result, &gpu, &kernel, &state, threads, 0);
        std::printf("%d\\n", error ? -error : result.activeBlocksPerMultiprocessor);
    }
}
"""


def occupancy_header() -> Path | None:
    """The folder of NVIDIA's occupancy calculator, which wheels of the CUDA runtime and Triton have."""
    packages: list[Any] = [importlib.util.find_spec(name) for name in ("nvidia", "triton")]
    roots = [Path(root) for spec in packages if spec for root in spec.submodule_search_locations]
    roots.append(Path("/usr/local/cuda"))
    patterns = ("cu*/include", "cuda_runtime/include", "backends/nvidia/include", "include")
    for root in roots:
        for pattern in patterns:
            for folder in sorted(root.glob(pattern)):
                if (folder / "cuda_occupancy.h").is_file():
                    return folder
    return None


def test_occupancy_is_nvidias(tool: ModuleType, tmp_path: Path) -> None:
    folder = occupancy_header()
    if folder is None:
        pytest.skip("cuda_occupancy.h is not installed")
    (tmp_path / "occupancy.cpp").write_text(NVIDIAS)
    command = ["g++", f"-I{folder}", "occupancy.cpp", "-o", "occupancy"]
    subprocess.run(command, check=True, cwd=tmp_path)
    lines, ours = [], []
    for capability, on in tool.MULTIPROCESSORS.items():
        for threads in (32, 48, 96, 128, 256, 512, 736, 1024):
            for registers in (16, 32, 38, 40, 63, 64, 65, 88, 96, 123, 128, 200, 255):
                for shared in (0, 1, 928, 4096, 14264, 24576, 49152):
                    needed = tool.Resources(registers, shared, 0, 0)
                    ours.append(tool.occupancy(capability, threads, needed).blocks)
                    numbers = (
                        capability,
                        on.warps,
                        on.shared,
                        on.reserved,
                        threads,
                        registers,
                        shared,
                    )
                    lines.append(" ".join(map(str, numbers)))
    done = subprocess.run(
        [tmp_path / "occupancy"], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    theirs = [int(word) for word in done.stdout.split()]
    wrong = [x for x in zip(lines, ours, theirs, strict=True) if x[1] != x[2]]
    assert wrong == []
    assert len({*theirs}) > 10


def test_the_command_writes_a_table(tool: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "new" / "table.md"
    arguments = ["--output", str(target), "--capability", "90"]
    result = CliRunner().invoke(tool.main, arguments)
    assert result.exit_code == 0, result.output
    text = target.read_text()
    assert text == result.output
    header, rule, *rows = text.splitlines()
    assert header == "| kernel | threads | shared memory | H200 (sm_90) |"
    assert len(rows) == len(REGISTERS)
    assert {line.count("|") for line in (header, rule, *rows)} == {5}
    assert any(row.startswith("| sorted_nms | 1024 | 928 B | ") and "50%" in row for row in rows)
    assert any(row.startswith("| nms_keep | 256 | 32768 B | ") and "75%" in row for row in rows)


def test_the_model_of_times_by_hand(tool: ModuleType) -> None:
    times = tool.expected_times
    gpu = times.Gpu("made up", multiprocessors=10, bandwidth=1e9, clock=1e9, doubles=2)
    work = times.Work("k", "s", read=600, written=400, steps=((3200, 12), (320, 2)), doubles=10**5)
    found = times.expected(work, gpu)
    assert found.floor == pytest.approx(1e-6)
    assert found.memory == pytest.approx(1e-6 / 0.85)
    assert found.issue == pytest.approx((3200 * 12 + 320 * 2) / 32 / (10 * 1e9 * 4 * 0.6))
    assert found.issue == pytest.approx(5.0833e-8, rel=1e-4)
    assert found.double == pytest.approx(5e-6)  # 10^5 operations, 20 in a nanosecond
    assert found.total == pytest.approx(7e-6)  # and 2 µs for the launch


def test_the_model_has_the_launches_sizes(tool: ModuleType) -> None:
    works = {work.entry: work for work in tool.expected_times.WORK}
    assert set(works) <= set(REGISTERS)
    masks = MaskLaunches(tool.expected_times.MASKS, 28, tool.expected_times.IMAGE, 0.5).bitmaps()
    assert masks.grid == tool.expected_times.MASKS * tool.expected_times.PASTE_STRIPS
    assert works["paste_masks"].written == masks.integers[0] * 1080 * 1920
    canvas = nv12_to_canvas_launch(
        (1080, 1920), (540, 960), (1920, 1920), (750, 1333), (800, 1344), matrix="bt709",
        full_range=False,
    )  # fmt: skip
    assert works["frame_to_canvas_nv12"].doubles == canvas.grid * 5 * (TILE_ROWS + TILE_COLUMNS)


def test_expected_times_are_a_table_on_request(tool: ModuleType) -> None:
    result = CliRunner().invoke(tool.main, ["--expected"])
    assert result.exit_code == 0, result.output
    header, rule, *rows = result.output.splitlines()
    assert len(rows) == len(tool.expected_times.WORK) * len(tool.expected_times.GPUS)
    assert {line.count("|") for line in (header, rule, *rows)} == {10}
    latency = [row for row in rows if row.endswith("| none: decided by dependent steps |")]
    assert {row.split()[1][:4] for row in latency} == {"sort", "nms_", "mask"}
