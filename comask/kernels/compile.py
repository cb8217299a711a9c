"""Compiles kernel sources to cubins, PTX and CPU libraries, and caches the results by content.

The cache is `$COMASK_CACHE/kernels`; without that variable `~/.cache/comask/kernels`; and a temporary
folder if neither can be written.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from comask.errors import KernelError, KernelUnavailableError

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities that the tests compile for
HEADER = "portable.h"
# The sources say why products and sums must not be contracted.
CUDA_OPTIONS = ("--std=c++17", "--fmad=false")
HOST_OPTIONS = (
    "-x", "c++", "-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread",
)  # fmt: skip
# The first PTX version for each target. Compilers write their own version, which needs a newer driver.
PTX_VERSIONS = {
    75: "7.0", 80: "7.0", 86: "7.1", 89: "7.8", 90: "7.8", 100: "8.6", 120: "8.7",
}  # fmt: skip
FOLDER = Path(__file__).parent

logger = logging.getLogger(__name__)


def gpu_module(source: str, capability: int) -> bytes:
    """Compiles a kernel to a module that the driver loads on a GPU of this compute capability.

    That is a cubin. If the GPU is newer than the compiler, it is PTX for the newest capability that the
    compiler knows, which the driver compiles for the GPU; a warning says so once.

    Raises:
        KernelUnavailableError: when neither NVRTC nor nvcc is installed, or the GPU is older than all
            that the compiler supports.
        KernelError: when the compiler reports an error.
    """
    compiler = _cuda_compiler()
    nearest = compiler.nearest(capability)
    if nearest == capability:
        return _cuda(compiler, source, f"sm_{capability}", "cubin")
    _warn_once(
        f"{compiler.name} does not know compute capability {_dotted(capability)}, so the driver compiles "
        f"the kernels from PTX for {_dotted(nearest)} at loading; a newer NVRTC or nvcc avoids that"
    )
    return _ptx(compiler, source, nearest)


def cubin(source: str, capability: int) -> bytes:
    """Compiles a kernel for GPUs of one compute capability (90 for 9.0).

    Raises:
        KernelUnavailableError: when neither NVRTC nor nvcc is installed.
        KernelError: when the compiler does not know the capability, or reports an error.
    """
    return _cuda(_cuda_compiler(), source, f"sm_{capability}", "cubin")


def ptx(source: str, capability: int) -> bytes:
    """Compiles a kernel to PTX for GPUs of at least this capability, for the oldest possible drivers.

    If the compiler does not know the capability, the PTX is for the newest one below it that it knows.

    Raises:
        KernelUnavailableError: when neither NVRTC nor nvcc is installed, or the capability is older than
            all that the compiler supports.
        KernelError: when the compiler reports an error.
    """
    compiler = _cuda_compiler()
    return _ptx(compiler, source, compiler.nearest(capability))


@cache
def host_library(source: str) -> ctypes.CDLL:
    """Compiles a kernel to a CPU library with `<entry>_host(blocks, threads, arguments)` per entry.

    Raises:
        KernelUnavailableError: when no C++ compiler is installed, or no folder allows loading libraries.
        KernelError: when the compiler reports an error.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    commands = [shlex.split(name) for name in names]  # $CXX may be "ccache g++"
    compiler = next((command for command in commands if shutil.which(command[0])), None)
    if compiler is None:
        raise KernelUnavailableError(
            f"no C++ compiler: found none of {', '.join(names)} on PATH; install g++ or set $CXX"
        )
    version = _run([*compiler, "--version"])

    def build(target: Path, tuning: str = "-march=native") -> None:
        code = str(FOLDER / f"{source}.cu")
        try:
            _run([*compiler, *HOST_OPTIONS, tuning, code, "-o", str(target)])
        except KernelError:
            if tuning == "-O3":
                raise
            build(target, "-O3")  # for compilers that do not know -march=native

    path = _cached(source, "host", ".so", (version, _cpu()), build)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # the folder may be mounted noexec
        elsewhere = _temporary_folder() / path.name
        if not elsewhere.exists():  # overwriting a loaded library would crash the process
            shutil.copy(path, elsewhere)
        path = elsewhere
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailableError(
            f"no folder to load kernels from: {_one_line(str(error))}; set $COMASK_CACHE to one"
        ) from error


def entries(source: str) -> list[str]:
    """Returns the names of a source's kernels."""
    code = (FOLDER / f"{source}.cu").read_text(encoding="utf-8")
    return re.findall(r"^(?:KERNEL|ENTRY)\((\w+),", code, flags=re.MULTILINE)


def _ptx(compiler: _CudaCompiler, source: str, capability: int) -> bytes:
    """Compiles a source to PTX of the oldest version that the capability allows."""
    text = _cuda(compiler, source, f"compute_{capability}", "ptx")
    version = PTX_VERSIONS.get(capability)
    if version is None:
        return text
    return re.sub(rb"\.version \S+", f".version {version}".encode(), text, count=1)


def _cuda(compiler: _CudaCompiler, source: str, architecture: str, kind: str) -> bytes:
    """Compiles a source to a cubin or PTX."""

    def build(target: Path) -> None:
        compiler.build(source, architecture, kind, target)

    return _cached(source, architecture, f".{kind}", (compiler.name,), build).read_bytes()


@dataclass(frozen=True)
class _CudaCompiler:
    """NVRTC or nvcc.

    Attributes:
        name: its name and version.
        capabilities: the compute capabilities that it knows.
        build: compiles a source for an architecture to a "cubin" or "ptx" and writes that file.
    """

    name: str
    capabilities: tuple[int, ...]
    build: Callable[[str, str, str, Path], None]

    def nearest(self, capability: int) -> int:
        """Returns the newest known capability whose PTX runs on a GPU of this one."""
        usable = [known for known in self.capabilities if known <= capability]
        if not usable:
            raise KernelUnavailableError(
                f"the kernels cannot be compiled for compute capability {_dotted(capability)}: "
                f"{self.name} supports {_dotted(min(self.capabilities))} and newer; "
                "install an NVRTC or nvcc of a CUDA version that supports this GPU"
            )
        return max(usable)


def _cuda_compiler() -> _CudaCompiler:
    """Returns NVRTC or, without it, nvcc."""
    try:
        nvrtc = import_module("cuda.bindings.nvrtc")
        _, major, minor = nvrtc.nvrtcVersion()
        _, known = nvrtc.nvrtcGetSupportedArchs()
    except (ImportError, OSError, RuntimeError) as error:
        # Without the library, cuda-bindings raises RuntimeError at the first call.
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise KernelUnavailableError(
                f"no CUDA compiler: cuda.bindings.nvrtc says {error!r} and nvcc is not on PATH; "
                "pip install 'comask[gpu]', or install the CUDA toolkit"
            ) from error
        return _nvcc(nvcc)

    def build(source: str, architecture: str, kind: str, target: Path) -> None:
        target.write_bytes(_by_nvrtc(nvrtc, source, architecture, kind))

    return _CudaCompiler(f"NVRTC {major}.{minor}", tuple(known), build)


def _nvcc(nvcc: str) -> _CudaCompiler:
    version = re.search(r"\bV[\d.]+", _run([nvcc, "--version"]))
    known = re.findall(r"^compute_(\d+)$", _run([nvcc, "--list-gpu-arch"]), flags=re.MULTILINE)

    def build(source: str, architecture: str, kind: str, target: Path) -> None:
        code = str(FOLDER / f"{source}.cu")
        _run([nvcc, f"--{kind}", f"-arch={architecture}", *CUDA_OPTIONS, code, "-o", str(target)])

    return _CudaCompiler(f"nvcc {version[0] if version else ''}", tuple(map(int, known)), build)


def _by_nvrtc(nvrtc: Any, source: str, architecture: str, kind: str) -> bytes:
    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelError(
                f"NVRTC, compiling {source}.cu for {architecture}: {status.name} {log()}"
            )
        return values[0] if values else None

    def log() -> str:
        size: int = nvrtc.nvrtcGetProgramLogSize(program)[1]
        text = b" " * size
        nvrtc.nvrtcGetProgramLog(program, text)
        return _one_line(text.rstrip(b"\0").decode(errors="replace"))

    code = (FOLDER / f"{source}.cu").read_bytes()
    header = (FOLDER / HEADER).read_bytes()
    program = nvrtc.nvrtcCreateProgram(
        code, f"{source}.cu".encode(), 1, [header], [HEADER.encode()]
    )[1]
    try:
        options = [option.encode() for option in (f"-arch={architecture}", *CUDA_OPTIONS)]
        call(nvrtc.nvrtcCompileProgram, program, len(options), options)
        name = "CUBIN" if kind == "cubin" else "PTX"
        result: bytes = b" " * call(getattr(nvrtc, f"nvrtcGet{name}Size"), program)
        call(getattr(nvrtc, f"nvrtcGet{name}"), program, result)
        return result.rstrip(b"\0") if kind == "ptx" else result
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _cached(
    source: str, target: str, suffix: str, versions: tuple[str, ...], build: Callable[[Path], None]
) -> Path:
    """Returns the file that `build` writes, cached under a name that hashes everything it depends on."""
    digest = hashlib.sha256()
    for part in (target, *versions, *CUDA_OPTIONS, *HOST_OPTIONS):
        digest.update(part.encode() + b"\0")
    for name in (f"{source}.cu", HEADER):
        digest.update((FOLDER / name).read_bytes())
    folder = _cache_folder()
    path = folder / f"{source}-{target}-{digest.hexdigest()[:20]}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:  # other processes may build it, too
            built = Path(work) / path.name
            build(built)
            os.replace(built, path)
    return path


@cache
def _cache_folder() -> Path:
    chosen = Path(os.environ.get("COMASK_CACHE") or "~/.cache/comask").expanduser() / "kernels"
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=chosen).close()
    except OSError:
        return _temporary_folder()
    return chosen


@cache
def _temporary_folder() -> Path:
    temporary = tempfile.mkdtemp(prefix="comask-kernels-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def _cpu() -> str:
    """Returns a text that identifies the CPU as far as -march=native depends on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({x for x in lines if x.startswith(names)}))


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise KernelError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise KernelError(f"{' '.join(command)} failed: {_one_line(done.stderr)}")
    return done.stdout


def _one_line(text: str) -> str:
    return " ".join(text.split())
