"""The kernels with a thread for each lane, or for each block, under ThreadSanitizer; and alignment.

On the CPU a block has one lane, so a missing barrier changes nothing there. These builds have all lanes
of a launch, barriers, and memory that the lanes of a block share. No kernel relies on the order of the
lanes of a warp (a shuffle, a vote or __syncwarp would not compile for the CPU), so threads without any
order may stand in for them.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from kernel_cases import CASES, Case, frame_cases, nms_case, nms_cases, nms_halves
from kernel_runner import RACE, Runner, make_runner

from comask.kernels import compile

# What a thread stands for; the plain build runs blocks on threads, with one lane each.
OPTIONS = {"lanes": ("-DLANES_ARE_THREADS",), "blocks": ()}


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return make_runner(tmp_path_factory.mktemp("sanitized"), "-O1", "-g", "-fsanitize=thread")


def text_of(source: str) -> str:
    return (compile.FOLDER / f"{source}.cu").read_text()


def test_every_entry_has_a_case() -> None:
    assert set(CASES) == {path.stem for path in compile.FOLDER.glob("*.cu")}
    for source, cases in CASES.items():
        assert {case.launch.entry for case in cases()} == set(compile.entries(source))


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("source", CASES)
def test_lanes_and_blocks_do_not_race(sanitizer: Runner, source: str, how: str) -> None:
    """The launches have a GPU's blocks and threads, or fewer blocks, each of which works repeatedly."""
    library = sanitizer.library(f"{source}-{how}", text_of(source), *OPTIONS[how])
    for case in CASES[source]():
        threads = case.launch.block if how == "lanes" else case.launch.grid
        output, report = sanitizer.run(library, case, threads)
        assert RACE not in report, report
        assert report == ""
        assert output == case.one_lane()


@pytest.mark.slow
def test_the_largest_block_does_not_race(sanitizer: Runner) -> None:
    case = nms_case(1, 1000)
    assert case.launch.block == 1024
    library = sanitizer.library("nms", text_of("sorted_nms"), *OPTIONS["lanes"])
    assert sanitizer.run(library, case, case.launch.block) == (case.one_lane(), "")


@pytest.mark.parametrize("source", CASES)
def test_no_address_is_misaligned(tmp_path: Path, source: str) -> None:
    """A GPU takes no misaligned word, nor does C++; the CPUs that the other tests run on take it."""
    runner = make_runner(tmp_path, "-O1", "-g", "-fsanitize=undefined")
    library = runner.library(source, text_of(source), *OPTIONS["blocks"])
    for case in CASES[source]():
        assert runner.run(library, case, 1) == (case.one_lane(), "")


def test_without_its_barriers_nms_is_reported(sanitizer: Runner) -> None:
    text = text_of("sorted_nms").replace("BARRIER();", "")
    library = sanitizer.library("without_barriers", text, *OPTIONS["lanes"])
    case = next(nms_cases())
    output, report = sanitizer.run(library, case, case.launch.block)
    assert RACE in report
    assert "suppress_row" in report
    assert output != case.one_lane()
    for case in nms_halves(3, 150, grid=2):
        output, report = sanitizer.run(library, case, case.launch.block)
        assert RACE in report
        assert ("nms_overlaps" if case.launch.entry == "nms_overlaps" else "keep_row") in report


def test_blocks_that_write_the_same_bytes_are_reported(sanitizer: Runner) -> None:
    text = text_of("frame_to_canvas").replace("int tile = BLOCK;", "int tile = BLOCK / 2;")
    library = sanitizer.library("tiles_twice", text, *OPTIONS["blocks"])
    case = next(frame_cases())
    assert RACE in sanitizer.run(library, case, case.launch.grid)[1]


@pytest.mark.slow
@pytest.mark.parametrize("source", CASES)
def test_every_barrier_is_needed(
    sanitizer: Runner, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also shows that the cases reach all of them."""
    # After a race, the lanes may no longer agree on the number of barriers, and wait for each other.
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")

    def races(library: Path, case: Case) -> bool:
        try:
            report = sanitizer.run(library, case, case.launch.block, seconds=20)[1]
        except subprocess.TimeoutExpired as late:
            report = (late.stderr or b"").decode(errors="replace")
        return RACE in report

    text = text_of(source)
    barriers = list(re.finditer(r"BARRIER\(\);", text))
    assert barriers
    for barrier in barriers:
        changed = text[: barrier.start()] + text[barrier.end() :]
        library = sanitizer.library("changed", changed, *OPTIONS["lanes"])
        line = text[: barrier.start()].count("\n") + 1
        assert any(races(library, case) for case in CASES[source]()), (
            f"{source}.cu does not race without the barrier of line {line}"
        )
