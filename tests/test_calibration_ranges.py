"""Calibration of a bundle: what is counted, going on after an interruption, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from comask.bundle import Bundle, sha256, write_manifest
from comask.calib.cache import Calibration
from comask.calib.histograms import Histogram
from comask.calib.qdq import activations
from comask.calib.ranges import collect_ranges
from comask.calib.sampling import CalibrationImage, choose_images
from comask.data.shapes import ShapesSource
from comask.errors import CalibrationError, ConfigError
from comask.preprocess import prepare
from comask.runtime.backends.base import Array


def ignore(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def bundle(micro_bundle: Path) -> Bundle:
    return Bundle.open(micro_bundle)


@pytest.fixture(scope="module")
def images() -> list[CalibrationImage]:
    return choose_images(ShapesSource(num_images=4, seed=11), 4, 0, report=ignore)


@pytest.fixture(scope="module")
def calibration(bundle: Bundle, images: list[CalibrationImage]) -> Calibration:
    return collect_ranges(bundle, images, cache=None, report=ignore)


def changed_bundle(bundle: Bundle, folder: Path, change: Callable[[str, Array], Array]) -> Bundle:
    """A copy with other weights in its graphs; `change` gets their name and values."""
    shutil.copytree(bundle.folder, folder)
    files = dict(bundle.manifest.files)
    for name in ("stage1_proposals.onnx", "stage2_roi_head.onnx"):
        model = onnx.load(folder / name)
        for weight in model.graph.initializer:
            values = change(weight.name, onnx.numpy_helper.to_array(weight))
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, folder / name)
        files[name] = sha256(folder / name)
    write_manifest(folder, dataclasses.replace(bundle.manifest, files=files))
    return Bundle.open(folder)


def whole_graph(
    bundle: Bundle, stage: str, feeds: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Outputs and activations of a graph that ONNX Runtime runs as one, with extra outputs."""
    model = onnx.load(bundle.graph(stage, "fp32"))
    outputs = [value.name for value in model.graph.output]
    keys = activations(model)
    present = {*outputs, *(value.name for value in model.graph.input)}
    for tensor in sorted({*keys.values()} - present):
        model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    values = dict(zip(names, session.run(names, feeds), strict=True)) | feeds
    return {name: values[name] for name in outputs}, {k: values[t] for k, t in keys.items()}


def test_activations_are_those_of_the_whole_graphs_without_padding(
    bundle: Bundle, images: list[CalibrationImage], tmp_path: Path
) -> None:
    def change(name: str, values: Array) -> Array:
        # Boxes that are all of the image, of which NMS leaves one a level, and detections one a class.
        if name.startswith("model.rpn.deltas."):
            return values * 0 + np.float32(4 * name.endswith("bias"))
        return values

    bundle = changed_bundle(bundle, tmp_path / "bundle", change)
    expected: dict[str, list[Array]] = {}
    rows = np.zeros((2, 2), np.int64)  # of proposals and detections: how many hold one, and all
    for image in images:
        prepared = prepare(image.decode(), bundle.manifest.preprocess)
        sizes = {"image_sizes": np.array([prepared.size], np.int32)}
        pyramid, found = whole_graph(bundle, "stage1", {"images": prepared.canvas[None], **sizes})
        detections, found2 = whole_graph(bundle, "stage2", {**pyramid, **sizes})
        proposals = pyramid["proposal_scores"][0] > 0
        count = int(detections["num_detections"][0])
        rows += [[proposals.sum(), proposals.size], [count, detections["scores"].size]]
        for key, value in found2.items():
            found[key] = value[proposals] if key.startswith("classifier.") else value[:count]
        for key, value in found.items():
            expected.setdefault(key, []).append(value.ravel())
    assert (rows[:, 0] > 0).all()
    assert (rows[:, 0] < rows[:, 1]).all(), "there was no padding, so nothing was tested of it"
    calibration = collect_ranges(bundle, images, cache=None, report=ignore)
    assert set(calibration.histograms) == set(expected)
    for key, histogram in calibration.histograms.items():
        values = np.abs(np.concatenate(expected[key]))
        assert histogram.total == values.size, key
        np.testing.assert_allclose(histogram.largest, values.max(), rtol=1e-4, err_msg=key)
        # ONNX Runtime fuses the pieces otherwise than the whole: a few values change their bin.
        moved = np.abs(histogram.counts - Histogram.of(values).counts).sum() / values.size
        assert moved < 0.02, key


def test_methods_agree_on_what_they_may_clip(calibration: Calibration) -> None:
    some = dict(list(calibration.histograms.items())[::8])  # entropy takes a while
    calibration = dataclasses.replace(calibration, histograms=some)
    entropy, percentile, largest = (
        calibration.ranges(method) for method in ("entropy", "percentile", "minmax")
    )
    assert set(entropy) == set(percentile) == set(largest) == set(some)
    assert all(0 <= entropy[key] <= largest[key] for key in largest)
    assert all(0 <= percentile[key] <= largest[key] for key in largest)
    assert entropy != largest
    assert calibration.ranges("percentile", percentile=100) == largest
    with pytest.raises(ConfigError, match="percentile of 101"):
        calibration.ranges("percentile", percentile=101)


def test_interrupted_and_resumed_equals_uninterrupted(
    bundle: Bundle, images: list[CalibrationImage], calibration: Calibration, tmp_path: Path
) -> None:
    cache, uninterrupted = tmp_path / "calibration.json", tmp_path / "uninterrupted.json"

    def interrupt() -> Array:
        raise KeyboardInterrupt

    stopped = [*images[:2], dataclasses.replace(images[2], decode=interrupt), images[3]]
    with pytest.raises(KeyboardInterrupt):
        collect_ranges(bundle, stopped, cache=cache, report=ignore)
    assert list(Calibration.load(cache).images.values()) == [image.name for image in images[:2]]
    lines: list[str] = []
    collect_ranges(bundle, images, cache=cache, report=lines.append)
    assert lines == [f"{cache}: has 2 of 4 images"]
    calibration.save(uninterrupted)
    assert cache.read_bytes() == uninterrupted.read_bytes()


def test_a_cache_is_enough(
    bundle: Bundle, images: list[CalibrationImage], calibration: Calibration, tmp_path: Path
) -> None:
    """No image is decoded and no graph is run again."""
    cache = tmp_path / "calibration.json"
    calibration.save(cache)
    before = cache.read_bytes()

    def fail() -> Array:
        raise AssertionError("decoded again")

    lines: list[str] = []
    asked = [dataclasses.replace(image, decode=fail) for image in images]
    found = collect_ranges(bundle, asked, cache=cache, report=lines.append)
    assert lines == [f"{cache}: has 4 of 4 images"]
    assert found == Calibration.load(cache) == calibration
    assert cache.read_bytes() == before


def test_images_of_another_choice_do_not_count(
    bundle: Bundle, images: list[CalibrationImage], calibration: Calibration, tmp_path: Path
) -> None:
    cache = tmp_path / "calibration.json"
    calibration.save(cache)
    lines: list[str] = []
    found = collect_ranges(bundle, images[:2], cache=cache, report=lines.append)
    assert lines == [f"{cache}: replaced, since 2 of its images are not among those chosen now"]
    assert found == collect_ranges(bundle, images[:2], cache=None, report=ignore)
    assert Calibration.load(cache) == found != calibration


def test_order_of_images_does_not_matter(
    bundle: Bundle, images: list[CalibrationImage], calibration: Calibration
) -> None:
    reverse = collect_ranges(bundle, images[::-1], cache=None, report=ignore)
    assert reverse.histograms == calibration.histograms


def test_the_cache_reads_like_a_table(calibration: Calibration, tmp_path: Path) -> None:
    cache = tmp_path / "calibration.json"
    calibration.save(cache)
    text = cache.read_text()
    json.loads(text)
    # braces and brackets, and three lines of header
    assert len(text.splitlines()) == 9 + len(calibration.images) + len(calibration.histograms)
    assert '"backbone.conv1": {"largest": ' in text


def other_graph(content: dict[str, dict[str, str]]) -> None:
    content["graphs"]["stage2_roi_head.onnx"] = "0" * 64


def other_size(content: dict[str, dict[str, int]]) -> None:
    content["preprocess"]["short_side"] = 64


def other_format(content: dict[str, int]) -> None:
    content["format"] = 99


def no_counts(content: dict[str, dict[str, dict[str, list[int]]]]) -> None:
    content["activations"]["backbone.conv1"]["counts"] = [-1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (other_graph, r"another stage2_roi_head\.onnx \(sha256 0000"),
        (other_size, r"preprocess\.short_side = 64, .* has 96"),
        (other_format, "format 99"),
        (no_counts, "not a calibration cache"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    bundle: Bundle,
    images: list[CalibrationImage],
    calibration: Calibration,
    tmp_path: Path,
    change: Callable[[object], None],
    match: str,
) -> None:
    cache = tmp_path / "calibration.json"
    calibration.save(cache)
    content = json.loads(cache.read_text())
    change(content)
    cache.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match=match):
        collect_ranges(bundle, images, cache=cache, report=ignore)


def test_what_is_no_cache_is_refused(bundle: Bundle, images: list[CalibrationImage]) -> None:
    with pytest.raises(CalibrationError, match="not a calibration cache"):
        collect_ranges(bundle, images, cache=bundle.folder / "manifest.json", report=ignore)
    with pytest.raises(CalibrationError, match="no images"):
        collect_ranges(bundle, [], cache=None, report=ignore)


def test_what_is_not_finite_is_named(
    bundle: Bundle, images: list[CalibrationImage], tmp_path: Path
) -> None:
    def change(name: str, values: Array) -> Array:
        return values + np.float32(np.nan) if name.endswith("layer2.0.conv1.weight") else values

    broken = changed_bundle(bundle, tmp_path / "bundle", change)
    with pytest.raises(CalibrationError, match=r"\.png: the input of .*layer2\.0\.conv2 holds NaN"):
        collect_ranges(broken, images, cache=tmp_path / "calibration.json", report=ignore)
    assert not (tmp_path / "calibration.json").exists()


def test_where_nothing_is_detected_the_head_has_no_range(
    bundle: Bundle, images: list[CalibrationImage], tmp_path: Path
) -> None:
    def change(name: str, values: Array) -> Array:
        if name != "model.classifier.logits.bias":
            return values
        return values + np.float32(1e6) * (np.arange(len(values)) == 0)  # all is background

    lines: list[str] = []
    blind = changed_bundle(bundle, tmp_path / "bundle", change)
    found = collect_ranges(blind, images[:1], cache=None, report=lines.append)
    (line,) = lines
    assert "nothing was detected" in line
    without = set(found.histograms) - set(found.ranges("minmax"))
    assert without == {key for key in found.histograms if key.startswith("head.")} != set()
