"""Compiling the kernels for every GPU, without one, and the cache of what was compiled."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from comask.errors import KernelError, KernelUnavailableError
from comask.kernels import compile, launch, run
from comask.models.nms import sorted_nms
from comask.models.roi_align import LEVEL_FACTORS, pyramid_roi_align
from comask.runtime.trt import ops

ENTRIES = {
    "pyramid_roi_align": {
        f"pyramid_roi_align_{dtype}_{layout}"
        for dtype in ("f32", "f16")
        for layout in ("planes", "channels_last")
    },
    "sorted_nms": {"sorted_nms", "nms_overlaps", "nms_keep"},
    "frame_to_canvas": {"frame_to_canvas_rgb", "frame_to_canvas_nv12"},
    "paste_masks": {"mask_edge_counts", "mask_edges", "paste_masks"},
}
PTXAS = shutil.which("ptxas") or shutil.which("/usr/local/cuda/bin/ptxas")
NVCC = shutil.which("nvcc")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COMASK_CACHE", str(tmp_path))
    caches = (compile._cache_folder, compile.host_library, compile._warn_once, run.available)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path / "kernels"
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def nvrtc() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")


@pytest.mark.parametrize("capability", compile.ARCHITECTURES)
@pytest.mark.parametrize("source", ENTRIES)
def test_cubins_have_every_entry(nvrtc: None, source: str, capability: int) -> None:
    image = compile.cubin(source, capability)
    assert image.startswith(b"\x7fELF")
    found = {name.decode() for name in re.findall(rb"\.text\.(\w+)", image)}
    assert found == ENTRIES[source]


@pytest.mark.parametrize("capability", compile.ARCHITECTURES)
@pytest.mark.parametrize("source", ENTRIES)
def test_ptx_assembles_without_spills(
    nvrtc: None, source: str, capability: int, tmp_path: Path
) -> None:
    text = compile.ptx(source, capability)
    assert set(re.findall(rb"\.entry (\w+)", text)) == {name.encode() for name in ENTRIES[source]}
    assert (
        f".version {compile.PTX_VERSIONS[capability]}\n.target sm_{capability}\n".encode() in text
    )
    assert b"used_bytes_mask" not in text  # of PTX 8.3, written for loads that leave out a part
    if PTXAS is None:
        pytest.skip("ptxas is not installed")
    (tmp_path / "kernel.ptx").write_bytes(text)
    command = [PTXAS, "-v", f"-arch=sm_{capability}", "kernel.ptx", "-o", os.devnull]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "not defined for option" in done.stderr:
        pytest.skip(f"this ptxas does not know sm_{capability}")
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert spills == [("0", "0")] * len(ENTRIES[source])


def test_vectors_are_loaded_and_stored_at_once(nvrtc: None) -> None:
    functions = compile.ptx("pyramid_roi_align", 80).decode().split(".entry ")[1:]
    for function in functions:
        vectors = {"ld.global" in line for line in function.splitlines() if ".global.v4." in line}
        assert vectors == ({True, False} if function.split("(")[0].endswith("last") else set())


def test_nvrtcs_errors_are_passed_on(nvrtc: None, empty_cache: Path) -> None:
    with pytest.raises(KernelError, match=r"sm_70: .*gpu-architecture"):
        compile.cubin("sorted_nms", 70)
    assert list(empty_cache.iterdir()) == []


@pytest.mark.parametrize("compiler", ["NVRTC", "nvcc"])
def test_a_gpu_newer_than_the_compiler_gets_ptx(
    compiler: str,
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if compiler == "NVRTC":
        pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
    else:
        monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
        if NVCC is None:
            pytest.skip("nvcc is not installed")
    assert compile.gpu_module("sorted_nms", 90).startswith(b"\x7fELF")
    assert caplog.messages == []
    known = compile._cuda_compiler().capabilities
    oldest, newest = min(known), max(known)
    for capability, nearest in ((newest + 1, newest), (newest + 700, newest), (99, 90)):
        caplog.clear()
        for _ in range(2):  # the second time, nothing is said
            text = compile.gpu_module("sorted_nms", capability)
            assert f"\n.target sm_{nearest}\n".encode() in text
        dotted = f"{capability // 10}.{capability % 10}"
        (message,) = caplog.messages
        assert message.startswith(compiler)
        assert f"does not know compute capability {dotted}, so the driver compiles" in message
        assert compile.ptx("sorted_nms", capability) == text  # plugins of plans take the same
    told = rf"capability 1\.0: {compiler}.* supports {oldest // 10}\.{oldest % 10} and newer"
    with pytest.raises(KernelUnavailableError, match=told):
        compile.gpu_module("sorted_nms", 10)


@pytest.mark.parametrize("kind", [compile.cubin, compile.ptx])
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_nvcc_compiles_where_nvrtc_is_missing(
    kind: object, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    image = kind("pyramid_roi_align", 80)  # type: ignore[operator]
    for name in ENTRIES["pyramid_roi_align"]:
        assert name.encode() in image


def test_no_cuda_compiler_is_said(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelError, match=r"nvcc is not on PATH; pip install 'comask\[gpu\]'"):
        compile.cubin("sorted_nms", 80)


def test_what_was_compiled_is_kept(
    nvrtc: None, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compile.cubin("sorted_nms", 80)
    compile.ptx("sorted_nms", 80)
    library = compile.host_library("sorted_nms")._name
    assert sorted(path.suffix for path in empty_cache.iterdir()) == [".cubin", ".ptx", ".so"]
    monkeypatch.setattr(compile, "_by_nvrtc", None)
    assert compile.cubin("sorted_nms", 80) == first
    compile.host_library.cache_clear()
    assert compile.host_library("sorted_nms")._name == library
    with pytest.raises(TypeError):
        compile.cubin("sorted_nms", 86)  # has to be compiled


def test_a_changed_source_is_compiled_anew(
    nvrtc: None, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sources"
    shutil.copytree(compile.FOLDER, folder)
    monkeypatch.setattr(compile, "FOLDER", folder)
    for name in ("sorted_nms.cu", "portable.h"):
        before = len(list(empty_cache.iterdir())) if empty_cache.exists() else 0
        compile.cubin("sorted_nms", 80)
        (folder / name).write_text((folder / name).read_text() + "// changed\n")
        compile.cubin("sorted_nms", 80)
        assert len(list(empty_cache.iterdir())) > before + (before == 0)


def test_engines_are_tied_to_the_kernels_of_plugins_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sources"
    shutil.copytree(compile.FOLDER, folder)
    monkeypatch.setattr(ops, "FOLDER", folder)
    before = ops.kernels_sha256()

    def changes(name: str) -> bool:
        (folder / name).write_text((folder / name).read_text() + "// changed\n")
        return ops.kernels_sha256() != before

    assert not changes("frame_to_canvas.cu")
    assert not changes("paste_masks.cu")
    for name in ("sorted_nms.cu", "pyramid_roi_align.cu", "portable.h"):
        assert changes(name)
        before = ops.kernels_sha256()


def test_processes_may_compile_at_once(empty_cache: Path) -> None:
    code = "from comask.kernels import compile; compile.host_library('sorted_nms').sorted_nms_host"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd="/") for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list(empty_cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_replaced(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMASK_CACHE", str(tmp_path / "file"))
    library = Path(compile.host_library("sorted_nms")._name)
    assert library.exists()
    assert tmp_path not in library.parents


def test_without_a_compiler_the_operators_are_torchvisions(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 64 // s, 64 // s, generator=generator) for s in (1, 2, 4, 8)]
    corner = torch.rand(2, 9, 2, generator=generator) * 150
    boxes = torch.cat((corner, corner + 20 + corner.flip(1)), dim=2)
    groups = torch.randint(0, 2, (2, 9), generator=generator)

    def results() -> list[torch.Tensor]:
        pooled = [
            pyramid_roi_align(list(m), boxes, 7, sampling_ratio=2, canonical_size=56.0)
            for m in (maps, [x.half().to(memory_format=torch.channels_last) for x in maps])
        ]
        return [*pooled, sorted_nms(boxes, groups, 0.3)]

    kernels = results()
    monkeypatch.setenv("CXX", "no-such-compiler")
    compile.host_library.cache_clear()
    run.available.cache_clear()
    with caplog.at_level(logging.WARNING):
        for ours, theirs in zip(kernels, results() and results(), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs)
    assert len(caplog.messages) == 2  # one a kernel
    assert "falls back to torchvision: no C++ compiler: found none of no-such" in caplog.text


def test_constants_agree() -> None:
    def constants(source: str) -> dict[str, float]:
        text = (compile.FOLDER / f"{source}.cu").read_text()
        return {k: float(v) for k, v in re.findall(r"(\b[A-Z_0-9]{4,}) = ([\d.]+)", text)}

    kernel = constants("pyramid_roi_align")
    for name in ("MAX_SAMPLES", "CHANNEL_BYTES", "THREADS"):
        assert kernel[name] == getattr(launch, name)
    factors = [np.float32(kernel[f"LEAVES_P{level}"]) for level in (2, 3, 4)]
    assert factors == [np.float32(factor) for factor in LEVEL_FACTORS]
    kernel = constants("sorted_nms")
    for name in ("MAX_THREADS", "KEEP_THREADS", "MAX_BOXES", "TILE"):
        assert kernel[name] == getattr(launch, name)


def test_importing_kernels_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from comask.kernels import compile, launch, run\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(new - set(sys.stdlib_module_names) - {'comask'})"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert out.stdout.strip() == "set()", out.stdout + out.stderr
