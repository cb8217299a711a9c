"""The OpenVINO backend: parity with PyTorch, real int8, refusals, cache, threads; what `auto` takes."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("openvino", reason="pip install 'comask[openvino]'")

from comask.bundle import STAGES, Bundle, Manifest
from comask.data.shapes import ShapesSource
from comask.errors import BackendUnavailableError, BundleError, ComaskError
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions, choice, openvino
from comask.runtime.backends.base import Stages
from comask.runtime.compare import Comparison, compare_stages
from comask.runtime.parity.open_backends import openvino_backends
from comask.runtime.tolerances import TOLERANCES

LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
HAS_BF16 = "BF16" in openvino.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 arithmetic")


@pytest.fixture(autouse=True)
def without_a_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the bundles of other tests as they are."""
    if "kept_beside" not in request.node.name:
        monkeypatch.setattr(openvino, "_cache", lambda bundle: {})


def test_it_is_compared_by_default_where_it_is_installed(
    micro_bundle: Path, int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    names = openvino_backends(Bundle.open(micro_bundle))
    assert names == ["openvino", "openvino:bf16", "openvino:fp16"]
    assert "openvino:int8" in openvino_backends(Bundle.open(int8_bundle))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert openvino_backends(Bundle.open(micro_bundle)) == []


def stages_of(bundle: Path, name: str, **options: Any) -> Stages:
    return Predictor.load(bundle, name, **options).stages


@pytest.mark.parametrize("count", [1, 3])
def test_fp32_equals_pytorch(micro_bundle: Path, count: int) -> None:
    source = ShapesSource(num_images=count, seed=7)
    reference = Predictor.load(micro_bundle, "torch", device="cpu")
    images = [reference.prepare(source.image(i)[: 96 + 8 * i]) for i in range(count)]
    shape = images[0].canvas.shape
    images = [image for image in images if image.canvas.shape == shape]
    comparison = Comparison()
    compare_stages(
        reference.stages, stages_of(micro_bundle, "openvino"), images,
        Bundle.open(micro_bundle).manifest.model, tolerance=TOLERANCES["fp32"], into=comparison,
    )  # fmt: skip
    assert not comparison.failures
    assert comparison.proposals > 0
    assert max(comparison.relative.values()) < 1e-4


def test_names_types_and_shapes_are_those_of_the_graphs(micro_fp16: Path) -> None:
    expected, found = (stages_of(micro_fp16, name) for name in ("onnxruntime", "openvino"))
    for stage in STAGES:
        for side in ("inputs", "outputs"):
            assert getattr(getattr(found, stage), side) == getattr(getattr(expected, stage), side)
    assert found.backend == "openvino:fp32"
    assert found.device == "cpu"


@bf16
def test_bf16_computes_in_bf16(micro_bundle: Path) -> None:
    exact, rounded = (stages_of(micro_bundle, name) for name in ("openvino", "openvino:bf16"))
    assert "bf16" in executed(rounded).values()
    assert "bf16" not in executed(exact).values()
    image = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3), dtype=np.uint8)
    feeds = {"images": image, "image_sizes": np.array([[96, 96]], np.int32)}
    a, b = (stages.stage1.run(feeds)["p3"] for stages in (exact, rounded))
    error = np.abs(a - b).max() / np.abs(a).max()
    assert 1e-4 < error < 4e-2  # bf16 has 8 bits: less than that is not bf16, more is an error


@bf16
def test_torch_bf16_computes_in_bf16(micro_bundle: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3), dtype=np.uint8)
    sizes = np.array([[96, 96]], np.int32)
    exact, rounded = (stages_of(micro_bundle, name) for name in ("torch", "torch:bf16"))
    assert rounded.backend == "torch:bf16"
    a, b = (
        stages.stage1.run({"images": image, "image_sizes": sizes})["p3"]
        for stages in (exact, rounded)
    )
    assert b.dtype == np.float32
    assert 1e-4 < np.abs(a - b).max() / np.abs(a).max() < 4e-2
    assert rounded.run(image, sizes)["boxes"].dtype == np.float32


def test_int8_computes_in_int8(int8_bundle: Path) -> None:
    stages = stages_of(int8_bundle, "openvino:int8")
    kinds = executed(stages)
    layers = {name: kind for name, kind in kinds.items() if kind in ("i8", "u8")}
    proof = Bundle.open(int8_bundle).manifest.verification["int8"]
    wanted = proof["layers"] - len(proof["float_layers"])
    assert len(layers) >= 0.9 * wanted, f"{len(layers)} of {wanted} layers run in int8"


def executed(stages: Stages) -> Mapping[str, str]:
    """Returns the arithmetic of each convolution and product that OpenVINO has compiled."""
    found = {}
    for number, stage in enumerate((stages.stage1, stages.stage2)):
        assert isinstance(stage, openvino.OpenVinoStage)
        for node in stage._compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            if info["layerType"].astype(str) in LAYERS:
                found[f"{number}/{node.friendly_name}"] = info["runtimePrecision"].astype(str)
    return found


def test_what_cannot_be_honoured_is_refused(micro_bundle: Path) -> None:
    offered = openvino.core().available_devices
    for device in ("npu", "gpu", 3):
        if {"npu": "NPU", "gpu": "GPU", 3: "GPU.3"}[device] in offered:
            continue
        with pytest.raises(BackendUnavailableError, match=f"device {device} .* finds CPU"):
            Predictor.load(micro_bundle, "openvino", device=device)
    with pytest.raises(
        BackendUnavailableError, match="does not run on an NPU; the openvino backend"
    ):
        Predictor.load(micro_bundle, "onnxruntime", device="npu")
    with pytest.raises(BundleError, match="computes in fp32, bf16; int8 was asked for"):
        Predictor.load(micro_bundle, "torch:int8")
    with pytest.raises(BundleError, match="holds no int8 graphs, only fp32; comask quantize"):
        Predictor.load(micro_bundle, "openvino:int8")


def test_missing_arithmetic_is_refused(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldCore:
        available_devices = ("CPU",)

        def get_property(self, device: str, name: str) -> list[str]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "core", OldCore)
    assert openvino.precisions_on(None) == ("int8", "fp32")
    for precision in ("bf16", "fp16"):
        with pytest.raises(
            BackendUnavailableError, match=f"CPU here has no {precision} arithmetic"
        ):
            Predictor.load(micro_bundle, f"openvino:{precision}")


def test_fp16_that_cannot_hold_the_values_is_refused(micro_bundle: Path) -> None:
    bundle = Bundle.open(micro_bundle)
    proof = {"fp16": {"float_layers": [{"module": "mfpn.lateral"}]}}
    scanned = dataclasses.replace(bundle.manifest, verification=proof)
    refused = pytest.raises(BackendUnavailableError, match=r"1 modules .* such as mfpn\.lateral's")
    with refused:
        openvino.open_backend(Bundle(bundle.folder, scanned), "openvino", "fp16", LoadOptions())


def test_compiled_graphs_are_kept_beside_the_engines(micro_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(micro_bundle, tmp_path / "bundle"))
    shutil.rmtree(folder / "engines", ignore_errors=True)
    image = np.zeros((1, 64, 64, 3), np.uint8)
    sizes = np.array([[64, 64]], np.int32)
    first = stages_of(folder, "openvino").run(image, sizes)
    (cache,) = (folder / "engines").iterdir()
    assert cache.name.startswith(".openvino-")
    files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 2
    second = stages_of(folder, "openvino").run(image, sizes)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values)
    (folder / "other").write_text("")
    shutil.rmtree(folder / "engines")
    (folder / "engines").write_text("a file where the cache would be")
    third = stages_of(folder, "openvino").run(image, sizes)
    np.testing.assert_array_equal(third["boxes"], first["boxes"])


def test_threads_share_a_backend(micro_bundle: Path) -> None:
    stages = stages_of(micro_bundle, "openvino")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (1, 64, 64 + 32 * (i % 2), 3), dtype=np.uint8) for i in range(8)]

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        return stages.run(image, np.array([image.shape[1:3]], np.int32))

    alone = list(map(run, images))
    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(alone, pool.map(run, images), strict=True):
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values)
    stages.close()
    with pytest.raises(RuntimeError, match="closed"):
        run(images[0])


def test_a_broken_graph_is_named(micro_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x0a")
    with pytest.raises(ComaskError, match=r"broken\.onnx: OpenVINO cannot load it"):
        openvino.OpenVinoStage(path, "CPU", {})


records = st.lists(
    st.tuples(st.booleans(), st.floats(0, 0.5), st.sampled_from([None, 50])), max_size=4
)


@given(records, st.sampled_from(["openvino:bf16", "torch:bf16"]))
def test_a_backend_that_rounds_needs_records_within_the_tolerance(
    entries: list[tuple[bool, float, int | None]], name: str
) -> None:
    manifest = made(
        parity=[
            {"comparisons": {name: {"passed": p, "largest": lost}}, "proposals": cut}
            for p, lost, cut in entries
        ]
    )
    own = [(passed, lost) for passed, lost, cut in entries if cut is None]
    assert choice.is_proved(manifest, name) == (
        len(own) > 0 and all(passed and lost <= 0.3 for passed, lost in own)
    )
    assert choice.is_proved(manifest, "openvino")
    assert not choice.is_proved(manifest, "openvino:int8")  # no graphs


def made(**fields: Any) -> Manifest:
    manifest: Any = object.__new__(Manifest)
    values: dict[str, Any] = {field.name: None for field in dataclasses.fields(Manifest)}
    values |= {"precisions": ("fp32",), "verification": {}, "parity": []} | fields
    for key, value in values.items():
        object.__setattr__(manifest, key, value)
    return manifest


def test_the_fastest_on_this_processor_comes_first() -> None:
    def entry(seconds: float, batch: int, cpu: str, device: str = "cpu") -> dict[str, Any]:
        return {
            "seconds": {"sum": seconds},
            "batch": batch,
            "device": device,
            "machine": {"cpu": cpu},
        }

    latency = {
        "openvino:fp32 on cpu, batch 8": entry(8, 8, "this"),
        "openvino:fp32 on cpu, batch 1": entry(1.5, 1, "this"),
        "onnxruntime:fp32 on cpu, batch 8": entry(16, 8, "this"),
        "onnxruntime:fp32 on cuda:0, batch 8": entry(0.1, 8, "this", "cuda:0"),
        "torch on cpu, batch 1": entry(0.1, 1, "another"),
    }
    found = choice.recorded_seconds(made(latency=latency), "this")
    assert found == {"openvino": 1.0, "onnxruntime": 2.0}
    assert choice.recorded_seconds(made(), "this") == {}


@pytest.mark.parametrize("gpu", [None, "a GPU"])
def test_the_order_of_auto(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch, gpu: str | None
) -> None:
    monkeypatch.setattr(choice, "find_gpu", lambda index: gpu)
    monkeypatch.setattr(choice, "recorded_seconds", lambda *_: {"torch": 1.0, "onnxruntime": 2.0})
    bundle = Bundle.open(micro_bundle)
    on_cpu = ["tensorrt", "tensorrt-rtx", "torch", "onnxruntime", "openvino"]
    assert choice.candidates(bundle, "cpu") == on_cpu
    on_gpu = ["tensorrt", "tensorrt-rtx", "onnxruntime", "torch", "openvino"]
    assert choice.candidates(bundle, None) == (on_gpu if gpu else on_cpu)


def test_auto_takes_what_was_proved(micro_bundle: Path, tmp_path: Path) -> None:
    from comask.bundle import update_manifest

    folder = Path(shutil.copytree(micro_bundle, tmp_path / "bundle"))
    with Predictor.load(folder, "auto", device="cpu") as predictor:
        assert predictor.stages.backend == "onnxruntime:fp32"
    if not HAS_BF16:
        pytest.skip("this CPU has no bf16 arithmetic")
    record = {"comparisons": {"openvino:bf16": {"passed": True, "largest": 0.1}}, "backends": {}}
    update_manifest(folder, lambda now: dataclasses.replace(now, parity=[record]))
    with Predictor.load(folder, "auto", device="cpu") as predictor:
        assert predictor.stages.backend == "openvino:bf16"


def test_openvino_is_timed_in_each_precision(int8_bundle: Path) -> None:
    from comask.calib.speed import measure_on_cpu

    bundle = Bundle.open(int8_bundle)
    graphs = {stage: bundle.graph(stage, "int8") for stage in STAGES}
    found = measure_on_cpu(bundle, graphs, [ShapesSource(num_images=1, seed=0).image(0)])
    assert found is not None
    assert set(found) == {"fp32", "bf16", "int8"} & set(openvino.precisions_on("cpu"))
    assert min(found.values()) > 0


HANDLED = """
import os, signal, sys, threading
from comask.runtime import Predictor
predictors = [Predictor.load(sys.argv[1], "openvino")]
def drop():
    predictors.pop().close()
thread = threading.Thread(target=drop)
thread.start()
thread.join()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
print("alive")
"""


def test_signals_are_handled_after_another_thread_has_closed_it(
    micro_bundle: Path, tmp_path: Path
) -> None:
    """OpenVINO's own core would leave a stack for signal handlers that is freed."""
    bundle = shutil.copytree(micro_bundle, tmp_path / "bundle")  # which gets a cache
    ended = subprocess.run(
        [sys.executable, "-c", HANDLED, str(bundle)], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "handled\nalive\n"), ended.stderr
