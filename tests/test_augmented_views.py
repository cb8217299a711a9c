"""Test-time augmentation: mirrored and resized views, how they are averaged, and the commands."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from made_masks import ColourNetwork, detections
from PIL import Image
from pycocotools import mask as coco

from comask.data.shapes import ShapesSource
from comask.errors import ConfigError
from comask.masks import paste_probs
from comask.preprocess import prepare
from comask.runtime import Predictor
from comask.runtime.augmented import SAME_BOX, averaged
from comask.runtime.views import Views
from comask.structures import Detections

FLIPS = list(product((False, True), repeat=2))
SIZE = (24, 30)


def random_detections(seed: int, count: int = 4, cells: int = 7) -> Detections:
    """Detections of two classes with boxes inside and over the edge of the image."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-3, 20, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(2, 14, (count, 2))], axis=1)
    return Detections(
        boxes_xyxy=boxes.astype(np.float32),
        scores=np.sort(rng.uniform(0.1, 1, count).astype(np.float32))[::-1].copy(),
        labels=rng.integers(0, 2, count),
        mask_probs=rng.random((count, cells, cells), np.float32),
        image_size=SIZE,
    )


def mirrored(masks: np.ndarray, flips: tuple[bool, bool]) -> np.ndarray:
    """Masks or images [..., h, w] with left and right, top and bottom exchanged."""
    return masks[..., :: -1 if flips[1] else 1, :: -1 if flips[0] else 1]


@given(
    hnp.arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))),
    st.sampled_from(FLIPS),
)
def test_masks_and_boxes_are_mirrored_back_exactly(
    masks: np.ndarray, flips: tuple[bool, bool]
) -> None:
    size = masks.shape[1:]
    kept = [mask for mask in masks if mask.any()]
    labels = range(len(kept))  # so that none is the same as another
    seen = detections([mirrored(mask, flips) for mask in kept], size, labels=labels)
    expected = detections(kept, size, labels=labels)
    found = averaged([(flips, seen)])
    np.testing.assert_array_equal(found.masks, expected.masks)
    np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy)
    both = averaged([((False, False), expected), (flips, seen)])
    np.testing.assert_array_equal(both.masks, expected.masks)
    np.testing.assert_array_equal(both.boxes_xyxy, expected.boxes_xyxy)
    np.testing.assert_array_equal(both.scores, expected.scores)


@given(st.integers(0, 2**32 - 1), st.sampled_from(FLIPS))
def test_pasted_masks_are_mirrored_pixel_for_pixel(seed: int, flips: tuple[bool, bool]) -> None:
    seen = random_detections(seed)
    found = averaged([(flips, seen)])
    np.testing.assert_array_equal(found.masks, mirrored(seen.masks, flips))
    np.testing.assert_array_equal(found.scores, seen.scores)


def fused_by_loops(views: list[Detections]) -> list[tuple[int, float, np.ndarray, np.ndarray]]:
    """Weighted boxes fusion of views that are not mirrored: (class, score, box, mask) of each group."""
    pool = sorted(
        (-float(view.scores[i]), v, i) for v, view in enumerate(views) for i in range(len(view))
    )
    groups: list[list[tuple[int, int]]] = []

    def box(group: list[tuple[int, int]]) -> np.ndarray:
        weights = [views[v].scores[i] for v, i in group]
        return np.average([views[v].boxes_xyxy[i].astype(float) for v, i in group], 0, weights)

    def xywh(corners: np.ndarray) -> list[list[float]]:
        return [[*corners[:2], *(corners[2:] - corners[:2])]]

    for _, v, i in pool:
        best, home = SAME_BOX, None
        for group in groups:
            same_class = views[group[0][0]].labels[group[0][1]] == views[v].labels[i]
            if not same_class or any(member[0] == v for member in group):
                continue
            mine = xywh(views[v].boxes_xyxy[i].astype(float))
            iou = coco.iou(np.array(xywh(box(group))), np.array(mine), [0])[0, 0]
            if iou > best:
                best, home = iou, group
        if home is None:
            groups.append([(v, i)])
        else:
            home.append((v, i))
    result = []
    for group in groups:
        weights = np.array([views[v].scores[i] for v, i in group], np.float64)
        dense = np.zeros((len(group), *SIZE))
        for plane, (v, i) in zip(dense, group, strict=True):
            x, y, probs = paste_probs(views[v].mask_probs[i], views[v].boxes_xyxy[i].tolist(), SIZE)
            plane[y : y + probs.shape[0], x : x + probs.shape[1]] = probs
        average = (dense * weights[:, None, None]).sum(0) / weights.sum()
        label = int(views[group[0][0]].labels[group[0][1]])
        result.append((label, weights.sum() / len(views), box(group), average))
    return sorted(result, key=lambda entry: -entry[1])


@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_averages_are_those_of_weighted_boxes_fusion(seed: int, count: int) -> None:
    rng, first = np.random.default_rng(seed), random_detections(seed)
    views = [first]
    for number in range(1, count):  # the same objects, moved by little, and one of the view's own
        other = random_detections(seed + number, 1)
        moved = first.boxes_xyxy + rng.normal(0, 0.7, first.boxes_xyxy.shape)
        views.append(
            Detections(
                boxes_xyxy=np.concatenate([moved.astype(np.float32), other.boxes_xyxy]),
                scores=rng.uniform(0.1, 1, 5).astype(np.float32),
                labels=np.concatenate([first.labels, other.labels]),
                mask_probs=rng.random((5, 7, 7), np.float32),
                image_size=SIZE,
            )
        )
    found = averaged([((False, False), view) for view in views])
    expected = fused_by_loops(views)
    assert len(found) == len(expected) <= sum(map(len, views))
    assert found.labels.tolist() == [label for label, *_ in expected]
    np.testing.assert_allclose(found.scores, [score for _, score, *_ in expected], rtol=1e-6)
    np.testing.assert_allclose(found.boxes_xyxy, [box for *_, box, _ in expected], rtol=1e-5)
    for mask, (*_, average) in zip(found.masks, expected, strict=True):
        sure = abs(average - 0.5) > 1e-5
        np.testing.assert_array_equal(mask[sure], average[sure] >= 0.5)


def test_a_view_that_lacks_an_object_halves_its_score() -> None:
    mask = np.zeros(SIZE, np.bool_)
    mask[3:9, 4:14] = True
    one, none = detections([mask], SIZE, [0.8]), detections([], SIZE)
    straight, across = (False, False), (True, False)
    found = averaged([(straight, one), (across, none)])
    assert found.scores.tolist() == [np.float32(0.4)]
    np.testing.assert_array_equal(found.masks, [mask])
    assert len(averaged([(straight, none), (across, none)])) == 0


def test_detections_of_one_view_stay_apart() -> None:
    masks = [np.zeros(SIZE, np.bool_) for _ in range(2)]
    masks[0][2:12, 2:12] = masks[1][3:13, 2:12] = True  # an IoU of 0.82
    view = detections(masks, SIZE, [0.9, 0.6])
    found = averaged([((False, False), view), ((False, False), view)])
    np.testing.assert_array_equal(found.masks, masks)


@pytest.mark.parametrize(
    ("tta", "count"),
    [(("flip",), 2), (("flip", "vflip"), 4), (("scale",), 3), (("flip", "scale"), 6)],
)
def test_views_are_batched_by_canvas(tta: tuple[str, ...], count: int) -> None:
    network = ColourNetwork(64, max_batch=8)
    image = np.zeros((64, 64, 3), np.uint8)
    image[5:20, 8:40] = 1, 3, 80
    found = network.look_at(image, tta=tta)
    assert sum(batch[0] for batch in network.batches) == count
    assert len(network.batches) == len({batch[1:] for batch in network.batches})
    mirrors = 2 ** len({"flip", "vflip"} & set(tta))
    np.testing.assert_array_equal(found.masks, [image[..., 0] == 1])
    # the network finds nothing in other sizes
    assert found.scores[0] == pytest.approx(0.8 * mirrors / count)


def test_tiles_run_in_every_view() -> None:
    image = np.zeros((100, 120, 3), np.uint8)
    image[30:80, 20:110] = 1, 0, 80
    network = ColourNetwork(64)
    found = network.look_at(image, tile=64, tta=("flip", "vflip"))
    assert sum(batch[0] for batch in network.batches) == 4 * len(Views(tile=64).regions((100, 120)))
    np.testing.assert_array_equal(found.masks, [image[..., 0] == 1])
    assert found.scores.tolist() == [np.float32(0.8)]


def test_the_network_sees_the_mirrored_and_resized_image(micro_bundle: Path) -> None:
    image = ShapesSource(num_images=1, seed=9).image(0)
    with Predictor.load(
        micro_bundle, "onnxruntime", device="cpu", tta=["flip", "vflip", "scale"]
    ) as predictor:
        found = predictor(image)
        (mapped,) = predictor.map([image])
        views = []
        for flips in FLIPS:
            picture = np.ascontiguousarray(
                mirrored(image.transpose(2, 0, 1), flips).transpose(1, 2, 0)
            )
            for factor in (1, 0.8, 1.25):
                config = predictor.preprocess.resized(
                    round(factor * predictor.preprocess.short_side)
                )
                views.append((flips, predictor.predict_prepared([prepare(picture, config)])[0]))
    expected = averaged(views)
    assert len(found) == len(expected) > 20
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    assert found.to_coco(1) == mapped.detections.to_coco(1)
    shared = coco.iou(found.to_rle(), expected.to_rle(), [0] * len(expected))
    assert (shared.diagonal() > 0.99).mean() > 0.9  # batches round differently


def test_a_mirrored_image_has_mirrored_detections(micro_bundle: Path) -> None:
    """What one view sees in an image, another sees in the mirrored image."""
    image = ShapesSource(num_images=1, seed=9).image(0)
    with Predictor.load(
        micro_bundle, "onnxruntime", device="cpu", tta=("flip",), max_batch=1
    ) as predictor:
        found = predictor(image)
        other = predictor(np.ascontiguousarray(image[:, ::-1]))
    np.testing.assert_array_equal(found.scores, other.scores)
    np.testing.assert_array_equal(found.masks, other.masks[..., ::-1])


def test_the_commands(micro_bundle: Path, own_truth: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="jobs need comask[jobs]")
    photo = tmp_path / "photo.png"
    Image.fromarray(ShapesSource(num_images=1, seed=9).image(0)).save(photo)
    where = ("--backend", "onnxruntime", "--device", "cpu", "--tta", "vflip, flip")
    result = run("infer", micro_bundle, photo, "--output", tmp_path / "out", *where)
    assert result.exit_code == 0, result.output
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    with Predictor.load(micro_bundle, "onnxruntime", device="cpu", tta=("flip", "vflip")) as p:
        assert entries == p(photo).to_coco(1)
    job = run("job", micro_bundle, photo, "--output", tmp_path / "job", *where, "--format", "jsonl")
    assert job.exit_code == 0, job.output
    row = json.loads((tmp_path / "job/parts/part-0000000.jsonl").read_text())
    assert [entry["bbox"] for entry in row["detections"]] == [entry["bbox"] for entry in entries]
    file = tmp_path / "result.json"
    scored = run("eval", micro_bundle, "--data", own_truth, *where, "--no-record", "--json", file)
    assert scored.exit_code == 1  # one backend, so nothing was compared
    content = json.loads(file.read_text())
    assert content["backends"]["onnxruntime"]["detections"] > 100


@pytest.mark.parametrize("command", ["infer", "eval", "job"])
def test_unknown_views_are_refused(command: str, tmp_path: Path) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "infer": (tmp_path, "photo.jpg", "--output", tmp_path / "out"),
        "eval": (tmp_path, "--data", "shapes"),
        "job": (tmp_path, "photo.jpg", "--output", tmp_path / "out"),
    }
    result = run(command, *arguments[command], "--tta", "flip,turn")
    assert result.exit_code == 2
    assert "'turn' is not one of flip, vflip, scale" in result.output


@pytest.mark.parametrize("tta", [("turn",), "flip", ("flip", "")])
def test_wrong_values(tta: Any) -> None:
    with pytest.raises(ConfigError, match="tta: expected some of flip, vflip, scale, got"):
        Views(tta=tta)


def test_a_canvas_that_is_too_large_is_refused_before_any_image_runs(micro_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="short_side: expected a canvas of at most"):
        Predictor.load(micro_bundle, "onnxruntime", device="cpu", short_side=20_000, tta=("scale",))


def test_streams_refuse_several_views(micro_bundle: Path) -> None:
    with (
        Predictor.load(micro_bundle, "onnxruntime", device="cpu", tta=("flip",)) as predictor,
        pytest.raises(ConfigError, match="tile and tta: streams and videos"),
    ):
        predictor.stream()
