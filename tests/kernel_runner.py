"""Builds kernels for the CPU in unusual ways and runs their launches in processes of their own.

A program in C++ does this (run_kernel.cpp): ThreadSanitizer does not take Python, and a launch that
crashes or never ends fails one test alone.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from kernel_cases import Case

from comask.kernels import compile

RACE = "WARNING: ThreadSanitizer: data race"
FOUND = 66  # the exit code of what ThreadSanitizer reports
PROBE = """
#include <barrier>
std::barrier<> barrier{1};
extern "C" void probe_host(int, int, void **) {}
"""


@dataclass(frozen=True)
class Runner:
    """Libraries in a folder, compiled with the same options as the program that runs them."""

    folder: Path
    options: tuple[str, ...]
    command: tuple[str, ...]

    def library(self, name: str, text: str, *options: str) -> Path:
        """Compiles the text of a kernel's source."""
        code, target = self.folder / f"{name}.cpp", self.folder / f"{name}.so"
        code.write_text(text)
        options = (*compile.HOST_OPTIONS, *self.options, *options, f"-I{compile.FOLDER}")
        subprocess.run(["g++", *options, code, "-o", target], check=True)
        return target

    def run(
        self, library: Path, case: Case, threads: int, *, seconds: float = 120
    ) -> tuple[bytes, str]:
        """Returns the output of a launch and what the sanitizer says.

        Raises:
            subprocess.TimeoutExpired: if the launch takes longer; `stderr` is what was said until then.
        """
        launch = case.launch
        data = b"".join(struct.pack("<q", x.nbytes) + x.tobytes() for x in case.inputs)
        for value in launch.integers:
            data += struct.pack("<qi", -1, value)
        data += struct.pack("<q", case.output) + case.untouched()
        words = (str(library), f"{launch.entry}_host", str(launch.grid), str(threads))
        # A lane that skips a barrier leaves the others waiting.
        command = [*self.command, *words]
        done = subprocess.run(command, input=data, capture_output=True, timeout=seconds)
        report = done.stderr.decode(errors="replace")
        assert done.returncode in (0, FOUND), f"exit code {done.returncode}: {report}"
        return done.stdout, report


def make_runner(folder: Path, *options: str) -> Runner:
    """Compiles the program with these options of g++; skips the test where that cannot be or run."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    runner = Runner(
        folder, ("-std=c++20", "-march=native", *options), (str(folder / "run_kernel"),)
    )
    code = str(Path(__file__).with_name("run_kernel.cpp"))
    command = ["g++", *runner.options, "-pthread", code, "-o", *runner.command, "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        probe = str(runner.library("probe", PROBE))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"g++ lacks ThreadSanitizer or C++20's barriers: {error}: {error.stderr}")
    # Where addresses are very random, ThreadSanitizer may find no room; setarch makes them less so.
    said = ""
    for prefix in ((), ("setarch", "-R")):
        words = [*prefix, *runner.command, probe, "probe_host", "1", "1"]
        if shutil.which(words[0]):
            done = subprocess.run(words, input=bytes(8), capture_output=True)
            if done.returncode == 0:
                return Runner(folder, runner.options, (*prefix, *runner.command))
            said = done.stderr.decode(errors="replace").strip()
    pytest.skip(f"what g++ compiles with {options} does not run here: {said}")
