"""The TensorRT backends on stand-ins for driver and TensorRT: binding, buffers, slots, choice, errors.

The stand-in TensorRT runs the bundle's graphs by ONNX Runtime, so results must equal that backend's.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from in_threads import in_threads
from standin import counts, live, run_on_standin, skip_without_pycuda
from standin_engines import PROFILE, assert_equal, picture, write_engines

from comask.bundle import STAGES, Bundle, sha256, write_manifest
from comask.errors import BackendUnavailableError, EngineError, ParityError
from comask.export.verify import prove_engines
from comask.runtime import Predictor
from comask.runtime.backends import open_stages
from comask.runtime.gpu import find_gpu
from comask.runtime.trt import engine_folder as rebuild_module
from comask.runtime.trt.engine_folder import DESCRIPTION, PLANS

skip_without_pycuda()


PICTURES = [picture(96, 128, 0), picture(128, 96, 1), picture(96, 128, 2), picture(64, 64, 3)]


def assert_all_freed() -> None:
    import standin_tensorrt

    assert standin_tensorrt.failures == []
    assert live() == {}
    assert set(standin_tensorrt.alive.values()) == {0}


def results_and_allocations(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    with Predictor.load(folder, "onnxruntime") as predictor:
        alone = [predictor(image) for image in PICTURES]
        together = predictor(PICTURES)
    predictor = Predictor.load(folder, "tensorrt")
    assert predictor.stages.backend == "tensorrt:fp32"
    assert predictor.max_batch == PROFILE.batch[2]

    def check() -> None:
        for image, expected in zip(PICTURES, alone, strict=True):
            assert_equal(predictor(image), expected)
        for found, expected in zip(predictor(PICTURES), together, strict=True):
            assert_equal(found, expected)

    check()
    warm = counts().device_allocations, counts().host_allocations, counts().device_bytes
    check()
    assert (counts().device_allocations, counts().host_allocations, counts().device_bytes) == warm
    predictor(PICTURES[0])
    standin_tensorrt.calls.clear()
    predictor(PICTURES[0])
    assert standin_tensorrt.calls == []  # the same shapes again: nothing is told twice
    predictor.close()
    predictor.close()
    with pytest.raises(RuntimeError, match="closed"):
        predictor(PICTURES[0])
    assert_all_freed()


def each_batch_has_its_profile(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    taken: list[int] = []
    set_profile = standin_tensorrt.IExecutionContext.set_optimization_profile_async

    def noted(self: Any, index: int, stream: int) -> bool:
        taken.append(index)
        return set_profile(self, index, stream)

    standin_tensorrt.IExecutionContext.set_optimization_profile_async = noted  # type: ignore[method-assign]
    same = [PICTURES[0], PICTURES[2], PICTURES[0]]
    with Predictor.load(folder, "onnxruntime") as predictor:
        expected = [predictor(same[:count]) for count in (1, 3, 2)]
    with Predictor.load(folder, "tensorrt") as predictor:
        for _ in range(2):
            taken.clear()
            for wanted in expected:
                for found, one in zip(predictor(same[: len(wanted)]), wanted, strict=True):
                    assert_equal(found, one)
        assert taken == [1, 1, 0, 0]  # of both stages; the batches of 3 and 2 share one
        with pytest.raises(EngineError, match=r"images is 4x96x128x3.*takes 1x32x32x3 to 3x128"):
            predictor.stages.stage1.run(
                {"images": np.zeros((4, 96, 128, 3)), "image_sizes": np.ones((4, 2))}
            )
    assert_all_freed()


def one_stage_at_a_time(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    sizes = np.array([[96, 128], [90, 100]], np.int32)
    feeds: dict[str, Any] = {"images": np.stack([PICTURES[0], PICTURES[2]]), "image_sizes": sizes}
    bundle = Bundle.open(Path(folder))
    with open_stages(bundle, "tensorrt") as found, open_stages(bundle, "onnxruntime") as expected:
        for stage in STAGES:
            mine, reference = getattr(found, stage), getattr(expected, stage)
            assert {s.name: s.dtype for s in mine.inputs} == {
                s.name: s.dtype for s in reference.inputs
            }
            outputs = reference.run(feeds)
            results = mine.run(feeds)
            assert set(results) == set(outputs)
            for name in outputs:
                np.testing.assert_array_equal(results[name], outputs[name])
            kept = {name: array.copy() for name, array in results.items()}
            mine.run(feeds | {"image_sizes": sizes // 2})
            for name in kept:  # the caller's for good
                np.testing.assert_array_equal(results[name], kept[name])
            feeds |= outputs
        for name in ("proposals", "proposal_scores"):
            feeds[name] = feeds[name][:, :7].astype(np.float64)  # not contiguous, another type
        a, b = (stages.stage2.run(feeds) for stages in (found, expected))
        np.testing.assert_array_equal(a["boxes"], b["boxes"])
    assert_all_freed()


def four_threads(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    with Predictor.load(folder, "onnxruntime") as predictor:
        expected = [predictor(image) for image in PICTURES]
    with Predictor.load(folder, "tensorrt") as predictor:

        def work(place: int) -> None:
            for i in range(12):
                image = (place + i) % len(PICTURES)
                assert_equal(predictor(PICTURES[image]), expected[image])

        assert in_threads(4, work) == []
        assert standin_tensorrt.alive["context"] == 4  # of two slots and two stages
        assert counts().contexts_current == 0
    assert_all_freed()


def freed_without_close(folder: str) -> None:
    import standin_tensorrt

    class Last:
        """Finalised after what is made later."""

    last = Last()
    weakref.finalize(last, lambda: print(live(), "retained", counts().contexts_retained))
    standin_tensorrt.install()
    write_engines(folder)
    Predictor.load(folder, "tensorrt")(PICTURES[0])  # collected
    assert_all_freed()
    globals()["kept"] = last, Predictor.load(folder, "tensorrt")
    globals()["kept"][1](PICTURES[0])
    assert live()


def sizes_outside_the_profile(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    with open_stages(Bundle.open(Path(folder)), "tensorrt") as stages:

        def run(batch: int, height: int, width: int) -> Any:
            sizes = np.array([[height, width]] * batch, np.int32)
            return stages.run(np.zeros((batch, height, width, 3), np.uint8), sizes)

        good = run(1, 96, 128)
        with pytest.raises(EngineError) as caught:
            run(1, 160, 128)
        for words in (
            "stage1: images is 1x160x128x3", "takes 1x32x32x3 to 3x128x128x3",
            f"comask build {folder} --engine tensorrt --precision fp32 --plugin python",
            "--profile height=32:96:160 --profile width=32:128:128", "--rebuild",
        ):  # fmt: skip
            assert words in str(caught.value)
        with pytest.raises(EngineError, match="--profile batch=1:1:4 "):
            run(4, 32, 32)
        feeds = {"image_sizes": np.ones((1, 2), np.int32), "proposals": np.ones((1, 300, 4))}
        feeds |= {"proposal_scores": np.ones((1, 300))}
        feeds |= {f"p{k}": np.ones((1, 32, 128 >> k, 128 >> k)) for k in (2, 3, 4, 5)}
        with pytest.raises(EngineError, match=r"1x300.*--profile proposals=1:200:300 "):
            stages.stage2.run(feeds)
        again = run(1, 96, 128)
        np.testing.assert_array_equal(good["boxes"], again["boxes"])
    assert_all_freed()


def too_little_memory(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    small, large = picture(32, 32), picture(128, 128)
    with Predictor.load(folder, "onnxruntime") as predictor:
        expected = predictor(small)
    with Predictor.load(folder, "tensorrt") as predictor:
        assert_equal(predictor(small), expected)
        for _ in range(2):
            with pytest.raises(
                EngineError, match="GPU 0: out of memory, cannot allocate 1 MiB more"
            ):
                predictor([large] * 3)
            assert_equal(predictor(small), expected)
    assert_all_freed()


def plans_that_do_not_open(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    engines = write_engines(folder, plugin="none")
    path = engines.folder / PLANS["stage2"]
    path.write_bytes(b"nothing that anybody reads")
    with pytest.raises(EngineError, match="was altered since it was built"):
        Predictor.load(folder, "tensorrt")
    plans = engines.info.plans | {"stage2": sha256(path)}
    info = dataclasses.replace(engines.info, plans=plans)
    (engines.folder / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(info)))
    with pytest.raises(
        EngineError, match=r"stage2.plan: tensorrt 10.99.0 cannot open it: .*magic tag"
    ):
        Predictor.load(folder, "tensorrt")


def choices(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(  # type: ignore[method-assign]
        f"{record.levelname} {record.getMessage()}"
    )
    logging.getLogger("comask").addHandler(handler)
    with pytest.raises(
        BackendUnavailableError, match=r"no engines for tensorrt:fp32 \(it has none\)"
    ):
        Predictor.load(folder, "tensorrt")
    with Predictor.load(folder) as predictor:
        assert predictor.stages.backend == "onnxruntime:fp32"
    assert not any(line.startswith("WARNING") for line in records)

    other = write_engines(folder, gpu="another", version="9.1.0")
    with pytest.raises(EngineError) as caught:
        Predictor.load(folder, "tensorrt")
    for words in (
        "tensorrt 10.99.0 is installed, it was built with 9.1.0", "tuned on another",
        f"comask build {folder} --engine tensorrt", "--rebuild",
    ):  # fmt: skip
        assert words in str(caught.value)
    records.clear()
    with Predictor.load(folder) as predictor:
        assert predictor.stages.backend == "onnxruntime:fp32"
    assert any("WARNING" in line and "built with 9.1.0" in line for line in records)

    write_engines(folder, plugin="none")
    write_engines(folder, plugin="aot", options={"version_compatible": True})
    with Predictor.load(folder) as predictor:
        assert predictor.stages.backend == "tensorrt:fp32"
        assert_equal(predictor(PICTURES[0]), predictor(PICTURES[0]))
    assert records[-1] == "INFO backend auto: taking tensorrt:fp32, the fastest that runs here"
    shutil.rmtree(other.folder.parent)

    other = write_engines(folder, gpu="another")
    rebuild_module.installed_command = lambda: [sys.executable, "-c", REBUILDING]
    with Predictor.load(folder, "tensorrt", on_mismatch="rebuild") as predictor:
        assert len(predictor(PICTURES[0])) > 0
    with pytest.raises(BackendUnavailableError, match="tensorrt-rtx"):
        Predictor.load(folder, "tensorrt-rtx")
    with pytest.raises(BackendUnavailableError, match="number 5 was asked for"):
        Predictor.load(folder, "tensorrt", device=5)
    assert_all_freed()


# in place of `comask`
REBUILDING = """
import sys, os
sys.setdlopenflags(os.RTLD_LAZY)
import standin_engines
assert (sys.argv[1], sys.argv[-1]) == ("build", "--rebuild")
standin_engines.write_engines(sys.argv[2])
"""


def jit_cache(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install("tensorrt_rtx")
    engines = write_engines(folder, flavor="tensorrt-rtx", target="portable", gpu=None)
    with Predictor.load(folder, "tensorrt-rtx") as predictor:
        predictor(PICTURES[0])
    path = engines.folder / "stage1.jit.cache"
    first = set(path.read_text().splitlines())
    assert len(first) == 1
    with Predictor.load(folder, "tensorrt-rtx") as predictor:
        predictor(PICTURES[1])
    second = set(path.read_text().splitlines())
    assert second > first
    assert len(second) == 2
    written = path.stat().st_mtime_ns
    with Predictor.load(folder, "tensorrt-rtx") as predictor:
        predictor(PICTURES[1])
        assert path.stat().st_mtime_ns == written
        # a process that is killed later loses nothing
        predictor([PICTURES[0]] * 2)
        third = set(path.read_text().splitlines())
        assert third > second
        with predictor.stream(slots=1) as session:
            session.submit([PICTURES[0]] * 3).result()
            assert set(path.read_text().splitlines()) > third
    assert not list(engines.folder.glob(".*"))
    assert_all_freed()


def proofs(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    bundle, images = Bundle.open(Path(folder)), PICTURES[:2]
    proof = prove_engines(bundle, write_engines(folder), images)
    assert proof["detections"] > 0
    assert proof["batches"] > 2
    assert max(proof["relative"].values()) < 1e-3
    narrow = write_engines(folder, profile={**PROFILE.ranges(), "height": (32, 32, 32)})
    with pytest.raises(EngineError, match="support none of the canvases"):
        prove_engines(bundle, narrow, images)

    graph = onnx.load(bundle.folder / "stage2_roi_head.onnx")
    weight = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = (1.5 * onnx.numpy_helper.to_array(weight)).tobytes()
    onnx.save(graph, bundle.folder / "stage2_roi_head.onnx")
    files = bundle.manifest.files | {
        "stage2_roi_head.onnx": sha256(bundle.folder / "stage2_roi_head.onnx")
    }
    write_manifest(bundle.folder, dataclasses.replace(bundle.manifest, files=files))
    with pytest.raises(ParityError, match="does not compute what PyTorch does"):
        prove_engines(Bundle.open(Path(folder)), write_engines(folder), images)


@pytest.mark.parametrize(
    "function",
    [results_and_allocations, each_batch_has_its_profile, one_stage_at_a_time, four_threads,
     sizes_outside_the_profile,
     plans_that_do_not_open, choices, jit_cache, proofs],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_on_the_standins(function: Any, micro_bundle: Path, tmp_path: Path) -> None:
    run_on_standin(function, shutil.copytree(micro_bundle, tmp_path / "bundle"))


def test_a_full_gpu_leaves_a_backend_that_works(micro_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(micro_bundle, tmp_path / "bundle")
    run_on_standin(too_little_memory, folder, STANDIN_MEMORY="900000")


def test_what_nobody_closes_is_freed_at_the_end(micro_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(micro_bundle, tmp_path / "bundle")
    # pycuda makes a context current in order to detach from it, and leaves it so
    expected = "{'contexts_current': 1} retained 0\n"
    assert run_on_standin(freed_without_close, folder) == expected


def test_without_gpu_the_reason_is_given(micro_bundle: Path, tmp_path: Path) -> None:
    if find_gpu() is not None:
        pytest.skip("there is a GPU")
    folder = shutil.copytree(micro_bundle, tmp_path / "bundle")
    run_on_standin(write_engines, folder)
    with pytest.raises(BackendUnavailableError, match="tensorrt needs a GPU: no NVIDIA driver"):
        Predictor.load(folder, "tensorrt")
    with Predictor.load(folder) as predictor:
        assert predictor.stages.backend == "onnxruntime:fp32"
