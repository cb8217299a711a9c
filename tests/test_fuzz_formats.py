"""Whatever stands in a file of ours, its reader returns a value or raises a ComaskError, soon."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from comask.bundle import Manifest
from comask.calib.cache import Calibration
from comask.calib.histograms import Histogram
from comask.config import Config, ModelConfig, PreprocessConfig
from comask.config_reading import from_dict, override
from comask.data.check import sound_part
from comask.data.coco import read_coco, write_coco
from comask.data.shapes import ShapesSource
from comask.data.source import Category
from comask.errors import ComaskError, DataError, one_line
from comask.files import parse_json
from comask.runtime.parity.scores import read_results
from comask.runtime.trt.engine_folder import DESCRIPTION, EngineFolder, EngineInfo
from comask.segmentation import compress_runs, decompress_runs, read_segmentation

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**400, 10**9, float("nan"), float("inf"), -0.0])
    | st.floats()
    | st.text(st.characters(), max_size=6)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "\ud800", "\x1b[31m", "a\nb", "\0"])
)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=10,
)
# What no strategy would draw: nestings and numbers that Python's own parser refuses or barely bears.
ODD_TEXTS = [
    b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b"9" * 5000,
    b"[" + b"9" * 4200 + b"]", b"1e999", b"NaN", b'"\\ud800"', b"null", b'{"a": 1', b"\x80\x04K\x01.",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """`value` with one to three of its parts replaced, removed or copied into another name."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value) or [()]))
        if not path:
            return draw(JSON)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if action == "replace":
            holder[path[-1]] = draw(JSON)
        elif action == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = holder[path[-1]]
    return value


def refused(read: Callable[[], object], *kinds: type[Exception]) -> bool:
    """Whether `read` raises a ComaskError, or one of `kinds`, whose text a terminal can show."""
    try:
        read()
    except (ComaskError, *kinds) as error:
        line = one_line(error)
        assert line.isprintable()
        assert 0 < len(line) < 1500
        return True
    return False


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_json_is_one_kind_of_error(text: bytes) -> None:
    refused(lambda: parse_json(text), ValueError)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name of the format: a sound value, and what reads such a text."""
    folder = tmp_path_factory.mktemp("fuzz")
    source = ShapesSource(num_images=2, seed=1)
    write_coco(source, folder / "set")
    annotations = json.loads((folder / "set" / "annotations" / "instances.json").read_text())
    first = next(entry for entry in annotations["annotations"] if entry["image_id"] == 1)
    result = {name: first[name] for name in ("image_id", "category_id", "bbox", "segmentation")}
    manifest = json.loads(
        Manifest(
            model=ModelConfig(num_classes=2), preprocess=PreprocessConfig(),
            categories=(Category(id=1, name="a"), Category(id=7, name="b")),
            files={"weights.safetensors": "0" * 64}, graphs={"stage1": {"inputs": [], "outputs": []}},
            comask_version="0", created="now",
        ).to_json()
    )  # fmt: skip
    cache = {
        "format": 1,
        "graphs": {"a.onnx": "0" * 64},
        "preprocess": manifest["preprocess"],
        "images": [{"name": "a.png", "sha256": "0" * 64}],
        "activations": {"x": Histogram.of(np.array([0.5, 2.0], np.float32)).to_dict()},
    }
    engine: dict[str, Any] = dict.fromkeys(EngineInfo.__dataclass_fields__, "x")
    engine |= {
        "gpu": None, "driver": 13000, "plugin_sha256": None, "schema_version": 1,
        "profile": {"batch": [1, 1, 2]}, "options": {}, "graphs": {"stage1": "0"},
        "transformed": {}, "plans": {"stage1": "0"}, "layers": {"stage1": {"of": 3}},
        "seconds": {"stage1": 1.5}, "verification": {},
    }  # fmt: skip

    def read_annotations(text: bytes) -> None:
        (folder / "c.json").write_bytes(text)
        sound, _ = sound_part(read_coco(folder / "c.json", folder / "set" / "images"))
        for index in range(len(sound)):
            for entry in sound.annotations(index):
                info = sound.info(index)
                read_segmentation(entry["segmentation"], info.height, info.width).bitmap()

    def read_own(text: bytes) -> None:
        (folder / "r.json").write_bytes(text)
        read_results(folder / "r.json", source, [0, 1])

    def read_cache(text: bytes) -> None:
        (folder / "calibration.json").write_bytes(text)
        Calibration.load(folder / "calibration.json").ranges()

    def read_engine(text: bytes) -> None:
        (folder / DESCRIPTION).write_bytes(text)
        EngineFolder.open(folder)

    return {
        "manifest": (manifest, lambda text: Manifest.from_json(text.decode(errors="replace"))),
        "annotations": (annotations, read_annotations),
        "results": ([result | {"score": 0.5}] * 2, read_own),
        "calibration": (cache, read_cache),
        "engine": (engine, read_engine),
    }


FORMATS = ("manifest", "annotations", "results", "calibration", "engine")


@pytest.mark.parametrize("name", FORMATS)
def test_sound_files_are_read(readers: dict[str, Any], name: str) -> None:
    value, read = readers[name]
    read(json.dumps(value).encode())


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_such_file_is_refused(readers: dict[str, Any], name: str) -> None:
    _, read = readers[name]
    for text in ODD_TEXTS:
        assert refused(lambda text=text: read(text)), text[:20]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(
    readers: dict[str, Any], name: str, data: st.DataObject
) -> None:
    value, read = readers[name]
    text = json.dumps(data.draw(mutated(value) | JSON))
    refused(lambda: read(text.encode()))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("results", (0, "bbox", 0), 10**400),  # no float is as large
        ("results", (0, "score"), 10**400),
        ("calibration", ("activations", "x", "counts", 0), 10**400),
        ("calibration", ("activations", "x", "counts", 0), 2**62),  # the sum is too large for i64
        ("calibration", ("activations", "x", "counts", 0), "1"),
        ("calibration", ("activations", "x", "largest"), float("nan")),
        ("calibration", ("activations", "x", "largest"), float("inf")),
        ("calibration", ("activations", "x", "bin_width"), 2.0**900),
        ("manifest", ("files", "../../etc/passwd"), "0" * 64),
        ("manifest", ("files", "/etc/passwd"), "0" * 64),
        ("manifest", ("files", "a\0b"), "0" * 64),
        ("manifest", ("mask_threshold",), float("nan")),
        ("manifest", ("model", "num_classes"), 10**30),
        ("engine", ("graphs",), ["stage1"]),
        ("engine", ("profile", "batch"), [1]),
    ],
)
def test_what_the_fuzzer_found(
    readers: dict[str, Any], name: str, path: tuple[Any, ...], value: Any
) -> None:
    content, read = copy.deepcopy(readers[name][0]), readers[name][1]
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    assert refused(lambda: read(json.dumps(content).encode()))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_settings_are_converted_or_refused(data: st.DataObject) -> None:
    assert Config() == from_dict(Config, json.loads(json.dumps(_plain(Config()))))
    refused(lambda: from_dict(Config, data.draw(mutated(_plain(Config())))))


def _plain(config: Config) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize(
    "assignment",
    ["train.seed=1e400", "train.seed=9999999999999999999999", "train.learning_rate=Infinity",
     "train.learning_rate=NaN", "train.seed=" + "9" * 5000, "model.anchor_sizes=" + "[" * 5000,
     "=", "model.=1", "a.b.c=1", "\x1b[31m=2"],
)  # fmt: skip
def test_settings_without_end_are_refused(assignment: str) -> None:
    assert refused(lambda: override(Config(), (assignment,)))


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(0, 9) | st.sampled_from([10**6, 2**40]),
    width=st.integers(0, 9),
    size=st.none() | JSON,
    counts=st.text(st.characters(min_codepoint=40, max_codepoint=125), max_size=30)
    | st.binary(max_size=30)
    | st.lists(st.integers(-3, 60) | st.sampled_from([2**31, 2**63, -(2**63), 10**30]), max_size=9)
    | JSON,
)
@example(height=4, width=5, size=None, counts="o" * 40)  # a number of 200 bits
@example(height=2**40, width=3, size=None, counts=[3 * 2**40 + 1])  # too many by one
@example(height=4, width=5, size=None, counts=[10**30, -(10**30), 20])
@example(height=4, width=5, size=None, counts=[True, 19])
@example(height=0, width=0, size=None, counts="\ud800")  # half a character
def test_hostile_rles_are_decoded_or_refused(
    height: int, width: int, size: Any, counts: Any
) -> None:
    rle = {"size": [height, width] if size is None else size, "counts": counts}

    def decode() -> None:
        mask = read_segmentation(rle, height, width).bitmap()
        assert mask.shape == (height, width)

    if height * width < 10**6 or counts != [height * width]:
        refused(decode)


runs_of = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30)


@given(runs_of)
def test_runs_survive_compression(runs: list[int]) -> None:
    (text,) = compress_runs(np.array(runs), np.array([len(runs)]))
    assert decompress_runs(text.encode()).tolist() == runs


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_what_pycocotools_accepts_is_the_same_here(
    height: int, width: int, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, height * width), max_size=8).map(sorted))
    runs = np.diff([0, *cuts, height * width]).tolist()  # some of them 0
    theirs = coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    expected = coco.decode(theirs).astype(bool)
    for counts in (runs, theirs["counts"], theirs["counts"].decode()):
        ours = read_segmentation(
            {"size": [height, width], "counts": counts}, height, width
        ).bitmap()
        np.testing.assert_array_equal(ours, expected)


def test_a_small_rle_of_a_huge_image_allocates_nothing() -> None:
    with pytest.raises(DataError, match="add up"):
        read_segmentation({"size": [2**40, 2**20], "counts": [5]}, 2**40, 2**20).bitmap()


def test_preprocessing_of_a_manifest_is_bounded() -> None:
    with pytest.raises(ComaskError, match="pixels"):
        from_dict(PreprocessConfig, {"short_side": 10**6, "max_side": 10**6})
