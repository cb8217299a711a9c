"""`comask eval --results`: a pipeline of one's own, its mistakes and its malformed files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run
from evaluated import IMAGES, entry, evaluate
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from comask.bundle import Bundle
from comask.cli.options import SHAPES_SEED
from comask.config import PreprocessConfig
from comask.data.shapes import ShapesSource
from comask.errors import DataError
from comask.runtime import Predictor
from comask.runtime.parity.causes import explain_input
from comask.runtime.parity.scores import read_results
from comask.runtime.parity.verdict import agreement, pairs, shared


def own_results(
    bundle: Path,
    path: Path,
    change: Callable[[np.ndarray], np.ndarray] = lambda image: image,
    shift: int = 0,
) -> Path:
    """COCO results of a pipeline that changes images before and category ids after."""
    source = ShapesSource(num_images=IMAGES, seed=SHAPES_SEED)
    rows = []
    with Predictor.load(bundle, "onnxruntime") as predictor:
        for i in range(IMAGES):
            found = predictor(np.ascontiguousarray(change(source.image(i))))
            rows += [
                row | {"category_id": row["category_id"] + shift}
                for row in found.to_coco(source.info(i).id)
            ]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("change", "shift", "mistake"),
    [
        (lambda image: image, 0, None),
        (lambda image: image[..., ::-1], 0, "channels reversed"),
        (lambda image: image // 255, 0, "pixels scaled to 0..1"),
        (lambda image: image, -1, "category ids one too low"),
    ],
)
def test_a_pipeline_of_ones_own_is_compared_and_its_mistake_named(
    micro_bundle: Path, tmp_path: Path, change: Any, shift: int, mistake: str | None
) -> None:
    file = own_results(micro_bundle, tmp_path / "own.json", change, shift)
    code, report, page = evaluate(
        micro_bundle, tmp_path, "--backend", "torch", "--results", file, "--no-record"
    )
    found = report["comparisons"]["own.json"]
    assert code == (1 if mistake else 0)
    assert found["passed"] is (mistake is None)
    if shift:
        assert any(
            "have a category_id that the data lack (0;" in text for text in found["failures"]
        )
    if mistake:
        assert mistake in found["failures"][0]
        assert mistake in page
        assert 'src="data:image/jpeg;base64,' in page  # the worst disagreements


def own_image() -> dict[str, Any]:
    info = ShapesSource(num_images=1, seed=SHAPES_SEED).info(0)
    rle = {"size": [info.height, info.width], "counts": [0, info.height * info.width]}
    return {"image_id": info.id, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5,
            "segmentation": rle}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bbox": []}, "entry 1: bbox: expected four numbers"),
        ({"bbox": "abcd"}, "entry 1: bbox: expected four numbers"),
        ({"bbox": [0, 0, None, 1]}, "entry 1: bbox: expected four numbers"),
        ({"score": "0.5"}, "entry 1: score: expected a number"),
        ({"score": None}, "entry 1: score: expected a number"),
        ({"score": float("nan")}, "entry 1: score: expected a number"),
        ({"image_id": [1]}, "entry 1: image_id: expected an integer or a string, got [1]"),
        ({"category_id": None}, "entry 1: category_id: expected an integer or a string, got None"),
        ({"segmentation": None}, "entry 1: segmentation: expected a list of polygons or an RLE"),
        ({"size": 5}, "entry 1: segmentation: expected an RLE of its image's size"),
        ({"size": [5, 5]}, "entry 1: segmentation: expected an RLE of its image's size"),
        ({"counts": "!!"}, "entry 1: segmentation: expected RLE counts that add up"),
        ({"counts": [1, 2]}, "entry 1: segmentation: expected RLE counts that add up"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    good = own_image()
    bad = good | {name: value for name, value in change.items() if name in good}
    bad["segmentation"] = bad["segmentation"] and bad["segmentation"] | {
        name: value for name, value in change.items() if name not in good
    }
    (tmp_path / "own.json").write_text(json.dumps([good, bad]))
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        read_results(tmp_path / "own.json", ShapesSource(num_images=1, seed=SHAPES_SEED), [0])
    assert "\n" not in str(caught.value)


def test_every_form_of_mask_is_read(tmp_path: Path) -> None:
    good = own_image()
    height, width = good["segmentation"]["size"]
    corners = [[0, 0, width, 0, width, height, 0, height]]
    packed = coco_mask.encode(np.ones((height, width), np.uint8, order="F"))
    packed["counts"] = packed["counts"].decode()
    forms = [good | {"segmentation": form} for form in (good["segmentation"], corners, packed)]
    (tmp_path / "own.json").write_text(json.dumps(forms))
    (found,) = read_results(
        tmp_path / "own.json", ShapesSource(num_images=1, seed=SHAPES_SEED), [0]
    )
    assert [row["segmentation"] for row in found] == 3 * [packed]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("{}", "expected a list"),
        ("[3]", "entry 0: expected an object"),
        ('[{"image_id": 1}]', "entry 0: has no category_id"),
        (json.dumps([own_image() | {"image_id": 99}]), "holds nothing on the 1 images"),
    ],
)
def test_results_that_cannot_be_used_are_refused(
    micro_bundle: Path, tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "own.json").write_text(content)
    result = run("eval", micro_bundle, "--data", "shapes", "--limit", "1", "--backend", "torch",
                 "--no-record", "--results", tmp_path / "own.json")  # fmt: skip
    assert result.exit_code == 1
    assert words in result.output


def test_empty_results_fail_themselves_and_not_the_bundle(
    micro_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(micro_bundle, tmp_path / "bundle"))
    (tmp_path / "own.json").write_text("[]")
    code, report, _ = evaluate(bundle, tmp_path, "--results", tmp_path / "own.json")
    assert (code, report["failures"]) == (1, [])
    found = report["comparisons"]["own.json"]
    assert "no detections at all" in found["failures"][-1]
    assert "mistakes" not in found
    (recorded,) = Bundle.open(bundle).manifest.parity
    assert recorded["passed"]
    assert "own.json" not in json.dumps(recorded)
    assert run("doctor", bundle).exit_code == 0


def normalised(image: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    return ((image - np.array(mean)) / np.array(std)).transpose(2, 0, 1).astype(np.float32)


def test_each_usual_mistake_of_normalisation_is_told() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3)).astype(np.uint8)
    config = PreprocessConfig()
    mean, std = config.mean, config.std
    pixels = image.astype(np.float64)
    for found, words in (
        (normalised(pixels[..., ::-1], mean, std), "BGR"),
        (normalised(pixels, 0, 1), "not normalised (pixels of 0..255)"),
        (normalised(pixels / 255, 0, 1), "not normalised (pixels of 0..1)"),
        (normalised(pixels / 255, mean, std), "scaled to 0..1 before"),
        (normalised(pixels, 127.5, 127.5), "scaled to -1..1"),
        (normalised(pixels, mean[::-1], std[::-1]), "reversed order"),
        (normalised(pixels, mean, 1), "not divided"),
        (normalised(pixels, 0, std), "mean subtracted"),
        (normalised(pixels, (100, 110, 120), std), "mean (100, 110, 120)"),
        (normalised(pixels[..., [1, 2, 0]], mean, std), "from GBR"),
        (
            normalised(np.roll(pixels, 3, axis=1), mean, std),
            "the graph resizes, crops or moves them",
        ),
        (normalised(pixels, mean, std), "not zero outside"),
    ):
        assert words in explain_input(image, (32, 64), found, config, 1e-3)


def agree(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    return agreement([shared(a, b)])


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=6), st.integers(0, 5))
def test_agreement_is_a_share(scores: list[float], lost: int) -> None:
    """Of detections apart from each other it is what formula and counting say."""
    whole = [entry(30 * i, score) for i, score in enumerate(scores)]
    part = [row for i, row in enumerate(whole) if i != lost]
    assert agree(whole, whole) == pytest.approx(1)
    assert agree(whole, []) == 0
    kept = sum(row["score"] for row in part)
    assert agree(whole, part) == pytest.approx(2 * kept / (sum(scores) + kept))
    assert agree(part, whole) == pytest.approx(agree(whole, part))
    # images without detections change nothing
    assert agreement([shared(whole, part), shared([], [])]) == agree(whole, part)


def test_only_one_class_overlapping_by_half_is_the_same() -> None:
    assert agree([], []) == 1
    assert pairs([entry(0, 0.9)], [entry(0, 0.9, label=2), entry(15, 0.9)]) == []
    ((_, _, overlap),) = pairs([entry(0, 0.9)], [entry(5, 0.9)])
    assert overlap == pytest.approx(15 / 25)
    # each is shared once
    assert len(pairs([entry(0, 0.9), entry(1, 0.8)], [entry(0, 0.9)])) == 1
