"""examples/cpp prints the same COCO results as `comask infer`.

The program is compiled against a stand-in for TensorRT and CUDA (cpp/standin.cpp), whose plans are
recorded calls of ONNX Runtime: inputs must equal the recorded ones bit for bit. So everything is tested
that the program computes itself, and nothing of TensorRT.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import doc_blocks
import numpy as np
import pytest
from conftest import run
from numpy.typing import NDArray
from PIL import Image

from comask.bundle import STAGES, Bundle, Manifest, graph_file, write_manifest
from comask.data.shapes import ShapesSource
from comask.kernels.launch import LEVEL_STRIDES
from comask.preprocess import Placement, decode_image, prepare, stacked
from comask.runtime import Predictor
from comask.runtime.trt.engine_folder import DESCRIPTION, ENGINES, PLANS, EngineInfo
from comask.structures import detections_from_outputs

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parent / "examples" / "cpp").glob("*.[ch]pp"))
FLAVORS = ("tensorrt", "tensorrt-rtx")
VERSION = "10.99.1.23"  # the stand-in's
NUMBERS = {np.float32: 0, np.float16: 1, np.int32: 3, np.uint8: 5}  # types as in NvInfer.h
DEBIAN = "apt-get install cmake nlohmann-json3-dev libopencv-imgcodecs-dev"

Arrays = Mapping[str, NDArray[Any]]
Call = tuple[Arrays, Arrays]  # a stage's inputs and outputs


def cuda_headers() -> Path:
    """The CUDA runtime's headers: of a wheel, such as Triton's for PyTorch, or beside nvcc."""
    found = []
    for package in ("triton", "nvidia"):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            found += [path.parent for path in sorted(Path(place).glob("**/cuda_runtime_api.h"))]
    if nvcc := shutil.which("nvcc"):
        found.append(Path(nvcc).resolve().parent.parent / "include")
    for folder in found:
        if all((folder / name).exists() for name in ("cuda_runtime_api.h", "crt/host_defines.h")):
            return folder
    pytest.skip("no CUDA headers: neither a wheel nor nvcc has cuda_runtime_api.h with crt/")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The program for each flavor; the first one ends with an error where memory is misused or lost."""
    folder, headers = tmp_path_factory.mktemp("cpp"), cuda_headers()
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip(f"no cmake or no C++ compiler: {DEBIAN} g++")
    for header in ("nlohmann/json.hpp", "opencv4/opencv2/imgcodecs.hpp"):
        if not any(
            (Path(root) / header).exists() for root in ("/usr/include", "/usr/local/include")
        ):
            pytest.skip(f"no {header}: {DEBIAN}")
    builds = []
    for flavor in FLAVORS:
        checked = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all"
        flags = f"-Wall -Wextra -Werror {checked if flavor == 'tensorrt' else '-O1'}"
        configure = [
            "cmake", "-S", HERE / "cpp", "-B", folder / flavor, f"-DCUDA_INCLUDE={headers}",
            f"-DTENSORRT_RTX={'ON' if flavor == 'tensorrt-rtx' else 'OFF'}", f"-DCMAKE_CXX_FLAGS={flags}",
        ]  # fmt: skip
        done = subprocess.run(configure, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        command = ["cmake", "--build", folder / flavor]
        builds.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for build in builds:
        said, _ = build.communicate()
        assert build.returncode == 0, said.decode()
    return {flavor: folder / flavor / "example" / "comask_trt" for flavor in FLAVORS}


@dataclass(frozen=True)
class Engines:
    """A folder of engines of the stand-in, in its bundle."""

    folder: Path

    @property
    def bundle(self) -> Path:
        return self.folder.parent.parent

    def change(self, **values: Any) -> None:
        """Changes fields of `engine.json`."""
        path = self.folder / DESCRIPTION
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_engines(
    bundle: Path, calls: Mapping[str, Sequence[Call]], *, proposals: int, code: bool = False
) -> Engines:
    """Writes plans that hold `calls` of each stage, into a folder of the bundle."""
    files = Bundle.open(bundle).manifest.files
    info = EngineInfo(
        flavor="tensorrt", version=VERSION, target="sm90", gpu="NVIDIA H200", driver=13000,
        precision="fp32", plugin="aot", plugin_sha256="0", options={}, plans={}, transformed={},
        profile={"proposals": (1, proposals, proposals)}, layers={}, seconds={}, verification={},
        graphs={s: files[graph_file(s, "fp32")] for s in STAGES}, created="", comask_version="",
    )  # fmt: skip
    engines = Engines(bundle / ENGINES / info.folder_name)
    engines.folder.mkdir(parents=True)
    (engines.folder / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(info)))
    for stage, name in PLANS.items():
        (engines.folder / name).write_bytes(plan(calls[stage], code))
    return engines


def plan(calls: Sequence[Call], code: bool) -> bytes:
    """A plan as cpp/standin.cpp reads it, whose profile just covers the calls."""
    lines, data = ["stand-in plan", f"code {code:d}"], b""
    for name in calls[0][0]:
        shapes = np.array([inputs[name].shape for inputs, _ in calls])
        limits = [*shapes.min(axis=0), *shapes.max(axis=0)]
        lines.append(" ".join(map(str, ["profile", name, shapes.shape[1], *limits])))
    for call in calls:
        lines.append("case")
        for kind, tensors in zip(("in", "out"), call, strict=True):
            for name, array in tensors.items():
                words = kind, name, NUMBERS[array.dtype.type], array.ndim, *array.shape
                lines.append(" ".join(map(str, words)))
                data += array.tobytes()
    return "\n".join([*lines, "data\n"]).encode() + data


def recorded(bundle: Path, images: Sequence[Path]) -> dict[str, list[Call]]:
    """The calls of both stages for each image."""
    calls: dict[str, list[Call]] = {stage: [] for stage in STAGES}
    with Predictor.load(bundle, "onnxruntime") as predictor:
        for image in images:
            canvas, sizes = stacked([predictor.prepare(image)])
            tensors = {"images": canvas, "image_sizes": sizes}
            for name in STAGES:
                stage = getattr(predictor.stages, name)
                inputs = {spec.name: tensors[spec.name] for spec in stage.inputs}
                outputs = stage.run(inputs)
                tensors |= outputs
                calls[name].append((inputs, outputs))
    return calls


def detect(program: Path, *arguments: object, fails: bool = False, **environment: str) -> Any:
    """Runs the program and returns what it prints, and its errors where it `fails`."""
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | {"OPENCV_LOG_LEVEL": "SILENT"} | environment,
    )  # fmt: skip
    assert done.returncode == fails, done.stdout + done.stderr
    results = json.loads(done.stdout) if done.stdout else None
    if not fails:
        assert done.stderr == ""
        return results
    return results, done.stderr


SIZES = {  # (h, w); the bundle resizes to a shorter side of 96, unless the longer one exceeds 160
    "landscape.png": (240, 320),
    "portrait.png": (321, 193),
    "odd.png": (77, 53),
    "small.png": (9, 31),
    "unchanged.png": (96, 128),
    "wide.png": (40, 400),
    "large.png": (700, 1100),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of several sizes and kinds."""
    folder, found = tmp_path_factory.mktemp("pictures"), []
    source = ShapesSource(num_images=len(SIZES) + 3, seed=5)
    for i, (name, (h, w)) in enumerate(SIZES.items()):
        found.append(folder / name)
        Image.fromarray(source.image(i)).resize((w, h), Image.Resampling.BICUBIC).save(found[-1])
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = Image.fromarray(source.image(len(SIZES))).resize((150, 90))
    picture.save(folder / "turned.jpg", exif=turned, quality=92)
    picture.convert("L").save(folder / "gray.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    return [*found, *(folder / name for name in ("turned.jpg", "gray.png", "alpha.png"))]


def test_results_equal_those_of_comask_infer(
    programs: dict[str, Path], micro_bundle: Path, pictures: list[Path], tmp_path: Path
) -> None:
    bundle = shutil.copytree(micro_bundle, tmp_path / "bundle")
    most = Bundle.open(bundle).manifest.model.proposals
    engines = write_engines(bundle, recorded(bundle, pictures), proposals=most)
    result = run(
        "infer", bundle, *pictures, "--output", tmp_path / "results", "--save", "coco", "--backend",
        "onnxruntime", "--batch", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = json.loads((tmp_path / "results" / "detections.json").read_text())
    found = detect(programs["tensorrt"], engines.folder, *pictures)
    assert found == expected  # floats included: both round alike everywhere
    assert {entry["image_id"] for entry in found} == set(range(1, len(pictures) + 1))
    lengths = [len(entry["segmentation"]["counts"]) for entry in found]
    assert np.mean(np.array(lengths) > 20) > 0.5  # masks with an outline


def test_photographs(programs: dict[str, Path], made: Made, shared_data: Path) -> None:
    photographs = sorted((shared_data / "coco_dev" / "images").iterdir())[:12]
    photographs += sorted((shared_data / "odd").glob("exif*.jpg"))
    prepared = [prepare(decode_image(path), made.manifest.preprocess) for path in photographs]
    made.record(prepared)
    expected = made.expected(prepared)
    assert detect(programs["tensorrt"], made.engines.folder, *photographs) == expected
    # this one is optimised, so the compiler might round otherwise
    made.engines.change(flavor="tensorrt-rtx", plugin="none")
    assert detect(programs["tensorrt-rtx"], made.engines.folder, *photographs) == expected


BOXES = [  # in fractions of the image; most leave it
    (0, 0, 1, 1), (0.2, 0.3, 0.8, 0.7), (-0.3, -0.2, 0.4, 0.5), (0.6, 0.5, 1.4, 1.3),
    (-0.5, -0.5, 1.5, 1.5), (0.1, -0.4, 0.5, 1.4), (-0.4, 0.1, 1.4, 0.5), (0.45, 0, 0.47, 1),
    (0, 0.5, 1, 0.51), (0.3, 0.3, 0.3, 0.9), (0.8, 0.2, 0.4, 0.6), (1.2, 1.2, 1.6, 1.7),
    (-0.9, 0.2, -0.1, 0.6), (0, 0, 0.001, 0.001), (-20, -20, 30, 30), (0.5, 0, 1, 1),
]  # fmt: skip


class Made:
    """A bundle whose "plans" give results that no network gives, at the edges of what is allowed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        categories = tuple(
            dataclasses.replace(category, id=id_)
            for category, id_ in zip(manifest.categories, (7, 90, "x"), strict=False)
        )
        self.manifest = dataclasses.replace(
            manifest, categories=categories, mask_threshold=0.4,
            model=dataclasses.replace(manifest.model, num_classes=len(categories)),
        )  # fmt: skip
        self.bundle = folder / "bundle"
        self.bundle.mkdir()
        write_manifest(self.bundle, self.manifest)
        self.calls: dict[str, list[Call]] = {"stage1": [], "stage2": []}
        self.engines: Engines

    def record(self, prepared: Sequence[Any], *, proposals: int = 12, **how: Any) -> None:
        """Records calls for images, which find 12 proposals, of which stage 2 takes some."""
        for number, image in enumerate(prepared):
            rng = np.random.default_rng(number)
            canvas, sizes = stacked([image])
            first: Arrays = {"images": canvas, "image_sizes": sizes}
            h, w = canvas.shape[1:3]
            maps = {
                name: rng.random((1, 3, h // stride, w // stride)).astype(np.float16)
                for name, stride in LEVEL_STRIDES.items()
            }
            best = {"proposals": rng.random((1, 12, 4), np.float32),
                    "proposal_scores": rng.random((1, 12), np.float32)}  # fmt: skip
            cut = {name: values[:, :proposals] for name, values in best.items()}
            self.calls["stage1"].append((first, {**maps, **best}))
            outputs = self.outputs(rng, image, len(self.manifest.categories))
            self.calls["stage2"].append(({**maps, **cut, "image_sizes": sizes}, outputs))
        shutil.rmtree(self.bundle / ENGINES, ignore_errors=True)
        self.engines = write_engines(self.bundle, self.calls, proposals=proposals, **how)

    @staticmethod
    def outputs(
        rng: np.random.Generator, image: Placement, classes: int
    ) -> dict[str, NDArray[Any]]:
        h, w = image.size
        count = len(BOXES) + 4
        boxes = np.zeros((1, count + 3, 4), np.float32)  # the last rows are padding
        inside = np.sort(rng.random((4, 2, 2)), axis=1).reshape(4, 4)
        boxes[0, :count] = np.concatenate([BOXES, inside]) * (w, h, w, h)
        masks = np.zeros((1, count + 3, 28, 28), np.float32)
        masks[0, :count] = rng.random((count, 28, 28)).cumsum(2).cumsum(1) % 1  # with an outline
        masks[0, 0:count:5] = 1
        masks[0, 3] = 0
        masks[0, 4, :14] = np.float32(0.4)  # the threshold itself
        scores = np.zeros((1, count + 3), np.float32)
        scores[0, :count] = np.sort(rng.random(count))[::-1]
        labels = rng.integers(0, classes, (1, count + 3)).astype(np.int32)
        return {
            "num_detections": np.array([count], np.int32), "boxes": boxes, "scores": scores,
            "labels": labels, "masks": masks, "plain_boxes": boxes[:, ::-1].copy(),
        }  # fmt: skip

    def expected(self, prepared: Sequence[Placement]) -> list[dict[str, Any]]:
        results = []
        for i, image in enumerate(prepared):
            (found,) = detections_from_outputs(
                self.calls["stage2"][i][1], [image], mask_threshold=self.manifest.mask_threshold,
                category_ids=tuple(category.id for category in self.manifest.categories),
            )  # fmt: skip
            results += found.to_coco(i + 1)
        return results


@pytest.fixture
def made(micro_bundle: Path, tmp_path: Path) -> Made:
    return Made(tmp_path, Bundle.open(micro_bundle).manifest)


@pytest.fixture
def prepared(made: Made, pictures: list[Path]) -> list[Any]:
    return [prepare(decode_image(path), made.manifest.preprocess) for path in pictures]


def test_odd_boxes_and_masks(
    programs: dict[str, Path], made: Made, pictures: list[Path], prepared: list[Any]
) -> None:
    made.record(prepared)
    expected = made.expected(prepared)
    found = detect(programs["tensorrt"], made.engines.folder, *pictures)
    assert found == expected
    assert {entry["category_id"] for entry in found} == {7, 90, "x"}


def test_stage_2_takes_no_more_proposals_than_its_plan(
    programs: dict[str, Path], made: Made, pictures: list[Path], prepared: list[Any]
) -> None:
    made.record(prepared, proposals=5)
    assert detect(programs["tensorrt"], made.engines.folder, *pictures) == made.expected(prepared)


def test_scratch_memory_whose_size_tensorrt_does_not_say(
    programs: dict[str, Path], made: Made, pictures: list[Path], prepared: list[Any]
) -> None:
    made.record(prepared)
    found = detect(programs["tensorrt"], made.engines.folder, *pictures, STANDIN_NO_SIZE="1")
    assert found == made.expected(prepared)


def test_plans_for_later_versions(
    programs: dict[str, Path], made: Made, pictures: list[Path], prepared: list[Any]
) -> None:
    made.record(prepared, code=True)
    made.engines.change(version="10.9.0.34", options={"version_compatible": True})
    assert detect(programs["tensorrt"], made.engines.folder, *pictures) == made.expected(prepared)


def test_version_of_three_numbers(
    programs: dict[str, Path], made: Made, pictures: list[Path], prepared: list[Any]
) -> None:
    made.record(prepared)
    made.engines.change(version="10.99.1")
    assert detect(programs["tensorrt"], made.engines.folder, *pictures) == made.expected(prepared)


@pytest.mark.parametrize(
    ("flavor", "changes", "words", "command"),
    [
        (
            "tensorrt", {"flavor": "tensorrt-rtx", "plugin": "none"},
            "are for tensorrt-rtx, this program was compiled for tensorrt",
            "--engine tensorrt --precision fp32 --plugin aot --rebuild",
        ),
        (
            "tensorrt-rtx", {}, "are for tensorrt, this program was compiled for tensorrt-rtx",
            "--engine tensorrt-rtx --precision fp32 --plugin none --rebuild",
        ),
        (
            "tensorrt", {"plugin": "python"}, "run their operators in Python",
            "--engine tensorrt --precision fp32 --plugin aot --rebuild",
        ),
        (
            "tensorrt", {"version": "10.9.0.34"},
            f"are for tensorrt 10.9.0.34, version {VERSION} is loaded",
            "--engine tensorrt --precision fp32 --plugin aot --rebuild",
        ),
        ("tensorrt", {"version": "10.99.1.2"}, f"are for tensorrt 10.99.1.2, version {VERSION}", ""),
        (
            "tensorrt", {"graphs": {"stage1": "0", "stage2": "0"}},
            "were built from other graphs than those of the bundle", "",
        ),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit_are_refused(
    programs: dict[str, Path], made: Made, pictures: list[Path], prepared: list[Any],
    flavor: str, changes: dict[str, Any], words: str, command: str,
) -> None:  # fmt: skip
    made.record(prepared)
    made.engines.change(**changes)
    results, said = detect(programs[flavor], made.engines.folder, pictures[0], fails=True)
    assert results is None
    assert said.startswith(f"error: the plans in {made.engines.folder} {words}")
    (build,) = re.findall(r"; (comask build .+) builds others\n$", said)
    assert build.startswith(f"comask build {made.bundle} ")
    assert build.endswith(command)
    doc_blocks.make_context(shlex.split(build))  # the command understands it


def test_rtx_runs_its_plans(
    programs: dict[str, Path], made: Made, pictures: list[Path], prepared: list[Any]
) -> None:
    made.record(prepared)
    made.engines.change(flavor="tensorrt-rtx", plugin="none")
    found = detect(programs["tensorrt-rtx"], made.engines.folder, *pictures)
    assert found == made.expected(prepared)


def not_finite(name: str, value: float) -> Callable[[Arrays], None]:
    def change(outputs: Arrays) -> None:
        outputs[name].reshape(-1)[1] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (not_finite("boxes", math.inf), "boxes are not finite"),
        (not_finite("masks", math.nan), "masks are not finite"),
        (lambda outputs: outputs["num_detections"].fill(-1), "the scores are not finite"),
    ],
    ids=["boxes", "masks", "scores"],
)
def test_an_image_that_fails_is_told_and_the_others_run(
    programs: dict[str, Path], made: Made, pictures: list[Path], prepared: list[Any],
    change: Callable[[Arrays], None], words: str,
) -> None:  # fmt: skip
    made.record(prepared)
    expected = [entry for entry in made.expected(prepared) if entry["image_id"] != 2]
    change(made.calls["stage2"][1][1])
    shutil.rmtree(made.engines.folder)
    made.engines = write_engines(made.bundle, made.calls, proposals=12)
    results, said = detect(programs["tensorrt"], made.engines.folder, *pictures, fails=True)
    assert results == expected
    assert said.startswith(f"{pictures[1]}: {words}; ")
    assert said.count("\n") == 1


def test_images_that_cannot_run(
    programs: dict[str, Path], made: Made, pictures: list[Path], prepared: list[Any]
) -> None:
    made.record(prepared[:1])
    text = made.bundle / "no image.jpg"
    text.write_text("no image")
    files = [made.bundle / "absent.png", text, pictures[1], pictures[0]]
    results, said = detect(programs["tensorrt"], made.engines.folder, *files, fails=True)
    assert results == [entry | {"image_id": 4} for entry in made.expected(prepared[:1])]
    lines = said.splitlines()
    assert lines[0] == f"{files[0]}: there is no such file, or OpenCV cannot decode it"
    assert lines[1] == f"{files[1]}: there is no such file, or OpenCV cannot decode it"
    assert lines[2].startswith("TensorRT: images is 1x")  # the stand-in's own words
    assert lines[3].startswith(f"{files[2]}: TensorRT refuses images of this shape")
    assert "comask build --profile" in lines[3]


def test_what_cannot_be_opened(
    programs: dict[str, Path], made: Made, pictures: list[Path], prepared: list[Any]
) -> None:
    made.record(prepared)
    program, folder = programs["tensorrt"], made.engines.folder
    assert detect(program, fails=True) == (
        None, "error: usage: comask_trt BUNDLE/engines/FOLDER IMAGE...\n",
    )  # fmt: skip
    assert "absent" in detect(program, made.bundle / "absent", pictures[0], fails=True)[1]
    no_gpu = detect(program, folder, pictures[0], fails=True, STANDIN_NO_GPU="1")[1]
    assert no_gpu == "error: a CUDA stream: no CUDA-capable device is detected\n"
    plan = folder / PLANS["stage2"]
    plan.write_bytes(plan.read_bytes()[:-1])
    said = detect(program, folder, pictures[0], fails=True)[1].splitlines()
    assert said[-1] == "error: TensorRT refuses the plan of stage 2; the lines above say why"
    plan.unlink()
    assert "stage2.plan" in detect(program, folder, pictures[0], fails=True)[1]
    made.engines.change(schema_version=2)
    said_once = detect(program, folder, pictures[0], fails=True)[1]
    assert (
        f"error: {folder / DESCRIPTION}: has schema 2, this program reads schema 1; " in said_once
    )


def test_schemas_are_those_of_the_sources() -> None:
    """The program names the schemas that it reads by numbers."""
    from comask.bundle import SCHEMA_VERSION as OF_MANIFESTS
    from comask.runtime.trt.engine_folder import SCHEMA_VERSION as OF_ENGINES

    text = (HERE.parent / "examples" / "cpp" / "main.cpp").read_text()
    assert f'"engine.json", {OF_ENGINES})' in text
    assert f'"manifest.json", {OF_MANIFESTS})' in text


def test_the_program_is_short() -> None:
    lines = [line.strip() for path in SOURCES for line in path.read_text().splitlines()]
    assert len([line for line in lines if line and not line.startswith("//")]) < 300
