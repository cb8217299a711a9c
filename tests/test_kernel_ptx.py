"""What NVRTC makes of the kernels for a GPU, run on a CPU: every bit equals that of the CPU's build.

The CPU's build is therefore the reference for `make gpu-check`, without a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import CASES, Case, nms_case, nms_halves, roi_case
from kernel_runner import Runner, make_runner
from ptx_on_cpu import cpp_of_ptx

from comask.kernels import compile

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")

COMMON = 90  # the other capabilities' code hardly differs
LANES = "-DLANES_ARE_THREADS"


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return make_runner(tmp_path_factory.mktemp("translated"), "-O1", "-w")


def translated(source: str, capability: int = COMMON) -> str:
    return cpp_of_ptx(compile.ptx(source, capability).decode())


def large_cases(source: str) -> Iterator[Case]:
    """Coordinates in the hundreds, and overlaps at the threshold: a rounding shows there."""
    if source == "sorted_nms":
        yield nms_case(20, 90, decimals=0)
        yield nms_case(2, 400, decimals=0)
        yield from nms_halves(20, 90, decimals=0)
        yield from nms_halves(2, 400, decimals=0)
    if source == "pyramid_roi_align":
        for size in (7, 14):
            yield roi_case(
                half=False, channels_last=False, channels=6, rois=200, size=size, image=(800, 1344)
            )
            yield roi_case(
                half=True, channels_last=True, channels=8, rois=200, size=size, image=(800, 1344)
            )


@pytest.mark.parametrize(
    "capability", [COMMON, *(pytest.param(x, marks=pytest.mark.slow) for x in (75, 120))]
)
@pytest.mark.parametrize("source", CASES)
def test_a_gpus_code_computes_the_cpus_bits(runner: Runner, source: str, capability: int) -> None:
    library = runner.library(source, translated(source, capability), LANES)
    for case in (*CASES[source](), *large_cases(source)):
        output, _ = runner.run(library, case, case.launch.block)
        assert output == case.one_lane(), case.launch


def test_contraction_would_change_bits(runner: Runner) -> None:
    """Which shows that the comparison above can fail: it is what nvcc does without --fmad=false."""
    if " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no FMA")
    text = translated("pyramid_roi_align")
    library = runner.library("contracted", text, LANES, "-O2", "-ffp-contract=fast")
    case = next(large_cases("pyramid_roi_align"))
    output, _ = runner.run(library, case, case.launch.block)
    contracted, exact = (np.frombuffer(x, np.float32) for x in (output, case.one_lane()))
    assert 1e-6 < np.abs(contracted - exact).max() < 5e-4


@pytest.mark.parametrize("capability", compile.ARCHITECTURES)
@pytest.mark.parametrize("source", CASES)
def test_every_operation_is_rounded_as_ieee_has_it(source: str, capability: int) -> None:
    code = translated(source, capability)
    assert ("std::fma" in code) == (source == "pyramid_roi_align")  # which calls multiply_add


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fmad=true",), r"\w+.f32 is not rounded"),
        (("--fmad=false", "--prec-div=false"), r"div.full.f32 is not rounded"),
        (("--fmad=false", "--ftz=true"), r"\w+.rn.ftz.f32 is not rounded"),
    ],
)
def test_other_rounding_is_noticed(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "CUDA_OPTIONS", ("--std=c++17", *options))
    with pytest.raises(ValueError, match=message):
        translated("pyramid_roi_align")
