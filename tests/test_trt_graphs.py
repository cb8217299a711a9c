"""CUDA graphs, scratch memory and GPUs that a flavor does not support, on the stand-in TensorRT."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MICRO, run, settings
from standin import counts, run_on_standin, skip_without_pycuda
from standin_engines import PROFILE, assert_equal, picture, write_engines

from comask.bundle import Bundle, sha256
from comask.errors import EngineError, UnsupportedGpuError
from comask.export.engine import _proved
from comask.preprocess import stacked
from comask.runtime import Predictor
from comask.runtime.backends.trt import open_engines
from comask.runtime.gpu import find_gpu
from comask.runtime.trt.engine_folder import EngineFolder
from comask.runtime.trt.flavor import load_flavor

PICTURE = picture(90, 120)


def load(folder: str, flavor: str = "tensorrt", **changes: Any) -> Predictor:
    import standin_tensorrt

    standin_tensorrt.install(flavor.replace("-", "_"))
    if flavor == "tensorrt-rtx":
        changes |= {"flavor": flavor, "target": "portable", "gpu": None}
    write_engines(folder, **changes)
    return Predictor.load(folder, flavor)


def messages() -> list[str]:
    """The log's texts from now on."""
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    logging.getLogger("comask").addHandler(Keep())
    return texts


def calls_of_one_shape_become_graphs(folder: str) -> None:
    other = picture(64, 64)
    with load(folder) as predictor:
        expected = predictor(PICTURE)
        assert counts().graph_launches == 0
        for launches in (1, 2):
            assert_equal(predictor(PICTURE), expected)
            assert counts().graph_launches == launches
        small = predictor(other)
        assert_equal(predictor(PICTURE), expected)  # its graph went with the other shape
        assert counts().graph_launches == 2
        timed: dict[str, float] = {}
        images, sizes = stacked([predictor.prepare(PICTURE)])
        predictor.stages.run(images, sizes, seconds=timed)  # events between the stages
        assert timed
        assert counts().graph_launches == 2
        assert_equal(predictor(PICTURE), expected)
        assert counts().graph_launches == 3
        with pytest.raises(EngineError, match="stage1: images is"):
            predictor(np.zeros((400, 40, 3), np.uint8))
        assert_equal(predictor(PICTURE), expected)
        assert counts().graph_launches == 3
        assert_equal(predictor(other), small)


def rtx_captures_calls_itself(folder: str) -> None:
    import standin_rtx

    with load(folder, "tensorrt-rtx") as predictor:
        for _ in range(3):
            predictor(PICTURE)
        with predictor.stream(slots=1, graphs=False) as session:
            session.submit(PICTURE).result()
    strategy = standin_rtx.CudaGraphStrategy
    assert standin_rtx.graphs_used == [strategy.WHOLE_GRAPH_CAPTURE] * 6 + [strategy.DISABLED] * 2
    assert standin_rtx.captured == []
    assert counts().graph_launches == 0


def stream_four_times(predictor: Predictor) -> None:
    expected = predictor(PICTURE)
    with predictor.stream(slots=1) as session:
        for _ in range(4):
            assert_equal(session.submit(PICTURE).result(), expected)


def graphs_hold_specialized_kernels(folder: str) -> None:
    import standin_rtx

    with load(folder, "tensorrt-rtx") as predictor:
        stream_four_times(predictor)
    assert counts().graph_launches == 3
    assert standin_rtx.captured == ["specialized", "specialized"]


def a_flavor_that_cannot_capture(folder: str) -> None:
    import standin_rtx

    texts = messages()
    standin_rtx.capturable.append(False)
    with load(folder, "tensorrt-rtx") as predictor:
        stream_four_times(predictor)
    assert counts().graph_launches == 0
    assert standin_rtx.captured == []
    (text,) = [text for text in texts if "CUDA graphs" in text]
    assert text.endswith("TensorRT cannot capture stage1 and stage2")


def a_capture_that_fails_once(folder: str) -> None:
    fails = ctypes.c_int.in_dll(ctypes.CDLL("libcuda.so.1"), "standin_no_capture")
    with load(folder) as predictor, predictor.stream(slots=1) as session:
        expected = predictor(PICTURE)
        fails.value = 1
        for _ in range(2):  # without a graph; with one that cannot be captured
            assert_equal(session.submit(PICTURE).result(), expected)
        fails.value = 0
        assert counts().graph_launches == 0
        assert_equal(session.submit(PICTURE).result(), expected)
        assert counts().graph_launches == 1


def no_garbage_is_collected_during_a_capture(folder: str) -> None:
    import standin_tensorrt

    collected: list[bool] = []

    def note(phase: str, details: object) -> None:
        capturing = standin_tensorrt.driver.standin_is_capturing(ctypes.c_void_p(stream))
        collected.append(bool(capturing))

    with load(folder) as predictor, predictor.stream(slots=1) as session:
        stream = session._idle[0].stream.handle  # type: ignore[attr-defined]
        gc.callbacks.append(note)
        gc.set_threshold(1)
        for _ in range(3):
            session.submit(PICTURE).result()
        gc.callbacks.remove(note)
        gc.set_threshold(700)
    assert counts().graph_launches == 2
    assert collected, "nothing was collected at all"
    assert not any(collected)
    assert gc.isenabled()


def scratch_memory_of_unknown_size(folder: str) -> None:
    import standin_tensorrt

    with load(folder) as predictor:
        expected = predictor(PICTURE)
        predictor.close()
    standin_tensorrt.tells_scratch = False
    with load(folder) as predictor:
        assert_equal(predictor(PICTURE), expected)


def maps_cross_channels_last(folder: str) -> None:
    """The model has 36 feature channels, which HWC8 pads to 40."""
    with load(folder) as predictor:
        images = PICTURE, picture(64, 64, 1)
        expected = [predictor(image) for image in images]
        feeds = predictor.prepare(PICTURE)
        maps = predictor.stages.stage1.run(_inputs(feeds))
        assert maps["p2"].shape[1] == 36
        rest = predictor.stages.stage2.run(maps | _inputs(feeds))
    for kind in ("HWC", "HWC8"):
        shutil.rmtree(Path(folder) / "engines")
        with load(folder, map_format=kind) as predictor, predictor.stream(slots=1) as session:
            for image, detections in zip(images, expected, strict=True):
                assert_equal(predictor(image), detections)
                for _ in range(3):
                    assert_equal(session.submit(image).result(), detections)
            alone = predictor.stages.stage1.run(_inputs(feeds))
            for name, array in maps.items():
                np.testing.assert_array_equal(alone[name], array, err_msg=name)
            again = predictor.stages.stage2.run(alone | _inputs(feeds))
            for name, array in rest.items():
                np.testing.assert_array_equal(again[name], array, err_msg=name)


def _inputs(prepared: Any) -> dict[str, Any]:
    images, sizes = stacked([prepared])
    return {"images": images, "image_sizes": sizes}


def maps_in_formats_that_do_not_fit(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    engines = write_engines(folder, map_format="HWC8")
    other = write_engines(folder, map_format="HWC", gpu="other")
    shutil.copy(other.plan("stage2"), engines.folder / "stage2.plan")
    with pytest.raises(
        EngineError, match=r"stage2.plan: has p. in TensorRT's format HWC, expected HWC8"
    ):
        open_engines(_with_plan(engines), device=0)
    strange = write_engines(folder, map_format="CHW4")
    with pytest.raises(EngineError, match="TensorRT's format CHW4; comask reads LINEAR, HWC, HWC8"):
        open_engines(strange, device=0)


def _with_plan(engines: EngineFolder) -> EngineFolder:
    """The folder, described as if its plan of stage 2 belonged to it."""
    plans = engines.info.plans | {"stage2": sha256(engines.folder / "stage2.plan")}
    return EngineFolder(engines.folder, dataclasses.replace(engines.info, plans=plans))


def a_leak_of_tensorrt(folder: str) -> None:
    import standin_tensorrt

    one = {"batch": (1, 1, 1), "height": (96, 96, 96), "width": (128, 128, 128)}
    texts = messages()
    for version, sizes, leaks in [
        ("10.99.0", {}, False), ("11.1.0", {}, True), ("11.2.1.2", {}, True), ("11.2.2", {}, False),
        ("11.1.0", one, False),
    ]:  # fmt: skip
        standin_tensorrt.__version__ = version
        load_flavor.cache_clear()
        load(folder, plugin="aot", profile=PROFILE.ranges() | sizes).close()
        told = [text for text in texts if "4849" in text]
        assert len(told) == leaks, (version, sizes, texts)
        assert all(f"tensorrt {version} loses GPU memory" in text for text in told)
        texts.clear()
        shutil.rmtree(Path(folder) / "engines")


def a_gpu_that_rtx_does_not_support(folder: str) -> None:
    import standin_rtx

    invalid = standin_rtx.EngineValidity.INVALID
    standin_rtx.validity.append((invalid, 2))
    with pytest.raises(UnsupportedGpuError, match="on this machine: UNSUPPORTED_CC"):
        load(folder, "tensorrt-rtx")
    # the proof of a build takes it for no fault of the plan
    bundle, gpu = Bundle.open(Path(folder)), find_gpu()
    (path,) = (Path(folder) / "engines").iterdir()
    lines: list[str] = []
    info = _proved(bundle, EngineFolder.open(path), lambda: [PICTURE], gpu, lines.append)
    assert "UNSUPPORTED_CC" in info.verification["not_run"]
    standin_rtx.validity[:] = [(invalid, 32)]  # a malformed plan is left to TensorRT's own message
    plan = path / "stage1.plan"
    plan.write_bytes(b"damaged" + plan.read_bytes())
    described = EngineFolder.open(path)
    plans = described.info.plans | {"stage1": sha256(plan)}
    damaged = EngineFolder(path, dataclasses.replace(described.info, plans=plans))
    with pytest.raises(EngineError, match="magic tag") as caught:
        _proved(bundle, damaged, lambda: [PICTURE], gpu, lines.append)
    assert not isinstance(caught.value, UnsupportedGpuError)


@pytest.mark.parametrize(
    "function",
    [calls_of_one_shape_become_graphs, rtx_captures_calls_itself,
     graphs_hold_specialized_kernels, a_flavor_that_cannot_capture, a_capture_that_fails_once,
     no_garbage_is_collected_during_a_capture, scratch_memory_of_unknown_size, a_leak_of_tensorrt,
     a_gpu_that_rtx_does_not_support, maps_in_formats_that_do_not_fit],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_on_the_standins(function: Any, micro_bundle: Path, tmp_path: Path) -> None:
    skip_without_pycuda()
    run_on_standin(function, shutil.copytree(micro_bundle, tmp_path / "bundle"))


@pytest.mark.slow
def test_maps_cross_channels_last(tmp_path: Path) -> None:
    skip_without_pycuda()
    channels = settings("model.norm_groups=4", "model.channels=36")
    arguments = ("--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "run")
    trained = run("train", *arguments, *settings(*MICRO), *channels)
    assert trained.exit_code == 0, trained.output
    exported = run(
        "export", tmp_path / "run" / "checkpoint-last.pt", "--output", tmp_path / "bundle",
        "--score-threshold", "0", "--limit", "1",
    )  # fmt: skip
    assert exported.exit_code == 0, exported.output
    run_on_standin(maps_cross_channels_last, tmp_path / "bundle")
