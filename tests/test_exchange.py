"""Detections from and for other tools: supervision, COCO data sets, and tasks of Label Studio.

Independent decoders judge the files: pycocotools for masks, and brush masks decoded bit by bit. Where the
tools are installed, their own readers do so as well; docs/other_tools.md says which versions did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from comask.data.coco import read_coco
from comask.data.source import Category, ImageInfo
from comask.errors import DataError
from comask.exchange import FolderResults, from_supervision, write_coco_dataset
from comask.label_studio import brush_rle, write_label_studio
from comask.segmentation import read_segmentation
from comask.structures import Detections

HEAVY = (
    "an application of its own, whose packages exclude versions of ours or weigh too much for `dev`"
)
TRACK = "not in `dev`; comes with comask[track]"
CLASSES = (Category(id=7, name="a <b> & 'c' \"d\""), Category(id=3, name="ä"))
NAMES = ("photo.jpg", "sub dir/b #1 & +2%.png", "sub dir/ö.jpg", "none.jpg")

Mask = NDArray[np.bool_]


def bitmaps(most: int = 40) -> st.SearchStrategy[Mask]:
    sizes = st.tuples(st.integers(1, most), st.integers(1, most))
    return sizes.flatmap(lambda size: hnp.arrays(np.bool_, size))


def rle_of(mask: Mask) -> dict[str, Any]:
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def rings(size: tuple[int, int], seed: int) -> Mask:
    """An object of several parts, of which some have holes."""
    y, x = np.indices(size)
    centre = np.random.default_rng(seed).random(2) * size
    distance = np.hypot(y - centre[0], x - centre[1])
    return (distance % 11 < 5) & (distance < 30)


@dataclass
class Folder:
    """Images on the disk, their results, and what tools must read: (class, score, mask) by file name."""

    images: list[ImageInfo]
    results: list[dict[str, Any]]
    truth: dict[str, list[tuple[str, float, Mask]]]

    def gathered(self, threshold: float | tuple[float, float] = 0.0) -> FolderResults:
        return FolderResults.of(self.images, self.results, CLASSES, threshold=threshold)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Objects with holes and parts, an empty mask, boxes beyond their image, an image without objects."""
    made = Folder([], [], {})
    for number, name in enumerate(NAMES, 1):
        path, size = tmp_path / "photos" / name, (40 + number, 90 - number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size, 3), 60 * number, np.uint8)).save(path)
        image = ImageInfo(id=number, file_name=str(path), height=size[0], width=size[1])
        made.images.append(image)
        truth = made.truth.setdefault(name, [])
        for place in range(0 if name == "none.jpg" else 3):
            mask, score = rings(size, 10 * number + place), 0.9 - 0.2 * place
            category = CLASSES[place % 2]
            truth.append((category.name, score, mask))
            made.results.append(
                {
                    "image_id": number, "category_id": category.id, "score": score,
                    "bbox": [-7.6, -3.2, 200.0, 50.7], "segmentation": rle_of(mask),
                }
            )  # fmt: skip
    empty = made.results[0] | {"segmentation": rle_of(np.zeros((41, 89), np.bool_))}
    made.results.insert(1, empty)
    return made


# supervision


@dataclass
class Found:
    """What `from_supervision` reads of a `supervision.Detections`."""

    xyxy: NDArray[np.floating[Any]]
    mask: Any = None
    confidence: NDArray[np.floating[Any]] | None = None
    class_id: NDArray[np.integer[Any]] | None = None

    def __len__(self) -> int:
        return len(self.xyxy)


class Compact:
    """Has what supervision's `CompactMask` has: the shape, and one dense mask at a time."""

    def __init__(self, masks: Mask) -> None:
        self._masks, self.shape = masks, masks.shape

    def __getitem__(self, index: Any) -> Mask:
        assert isinstance(index, int | np.integer)
        return np.asarray(self._masks[index])


@given(
    masks=hnp.arrays(
        np.bool_, st.tuples(st.integers(0, 4), st.integers(1, 30), st.integers(1, 30))
    ),
    compact=st.booleans(),
    data=st.data(),
)
def test_masks_from_supervision_keep_every_pixel(
    masks: Mask, compact: bool, data: st.DataObject
) -> None:
    count = len(masks)
    scores = data.draw(hnp.arrays(np.float32, count, elements=st.sampled_from([0.25, 0.5, 0.75])))
    boxes = np.arange(4 * count, dtype=np.float64).reshape(-1, 4) + 0.25
    labels = np.arange(count) % 2
    found = from_supervision(
        Found(boxes, Compact(masks) if compact else masks, scores, labels),
        class_names=["x", "y"], category_ids=[5, "six"],
    )  # fmt: skip
    order = sorted(range(count), key=lambda place: (-scores[place], place))
    np.testing.assert_array_equal(found.masks, masks[order])
    assert found.to_rle() == [rle_of(masks[place]) for place in order]
    np.testing.assert_array_equal(found.boxes_xyxy, boxes[order])
    np.testing.assert_array_equal(found.scores, scores[order])
    assert found.labels.tolist() == [place % 2 for place in order]
    ids = [result["category_id"] for result in found.to_coco(1)]
    assert ids == [(5, "six")[place % 2] for place in order]


def test_from_supervision_without_scores_and_classes() -> None:
    masks = np.stack([rings((20, 30), 0), rings((20, 30), 1)])
    found = from_supervision(Found(np.zeros((2, 4)), masks))
    assert found.scores.tolist() == [1, 1]
    assert found.labels.tolist() == [0, 0]
    assert found.class_names is None
    np.testing.assert_array_equal(found.masks, masks)


def test_nothing_from_supervision_needs_a_size() -> None:
    nothing = Found(np.zeros((0, 4)))
    assert from_supervision(nothing, (6, 9)).masks.shape == (0, 6, 9)
    with pytest.raises(DataError, match=r"0 boxes and no masks: expected .* image_size"):
        from_supervision(nothing)


def test_from_supervision_refuses() -> None:
    found = Found(np.zeros((1, 4)), np.ones((1, 5, 6), np.bool_), class_id=np.array([2]))
    with pytest.raises(DataError, match=r"expected \(5, 6\), that of the masks, got \(6, 5\)"):
        from_supervision(found, (6, 5))
    with pytest.raises(DataError, match="1 boxes and no masks"):
        from_supervision(Found(np.zeros((1, 4))), (5, 6))
    with pytest.raises(ValueError, match=r"labels: expected 0\.\.1"):
        from_supervision(found, class_names=["a", "b"])


# COCO data sets


def test_pycocotools_reads_the_data_set(folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    assert write_coco_dataset(folder.gathered(), path) == 1
    read = COCO(str(path))
    assert [image["file_name"] for image in read.loadImgs(read.getImgIds())] == list(NAMES)
    assert sorted(read.anns) == list(range(1, 10))
    for image in read.loadImgs(read.getImgIds()):
        annotations = read.loadAnns(read.getAnnIds(image["id"]))
        truth = folder.truth[image["file_name"]]
        for annotation, (name, score, mask) in zip(annotations, truth, strict=True):
            np.testing.assert_array_equal(read.annToMask(annotation), mask)
            assert read.cats[annotation["category_id"]]["name"] == name
            assert annotation["score"] == score
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == coco.toBbox(rle_of(mask)).tolist()
            assert annotation["iscrowd"] == 0
            # FiftyOne takes a mask's pixels inside its rounded box, and looks for none elsewhere.
            x, y, w, h = annotation["bbox"]
            assert mask[round(y) : round(y + h), round(x) : round(x + w)].sum() == mask.sum()


def test_comask_reads_its_data_set(folder: Folder, tmp_path: Path) -> None:
    write_coco_dataset(folder.gathered(), tmp_path / "dataset.json")
    source = read_coco(tmp_path / "dataset.json", tmp_path / "photos")
    assert {category.name for category in source.categories} == {c.name for c in CLASSES}
    for index in range(len(source)):
        info = source.info(index)
        assert source.image(index).shape == (info.height, info.width, 3)
        masks = [
            read_segmentation(annotation["segmentation"], info.height, info.width).bitmap()
            for annotation in source.annotations(index)
        ]
        truth = [mask for _, _, mask in folder.truth[info.file_name]]
        np.testing.assert_array_equal(masks, truth)


@pytest.mark.parametrize(
    ("ids", "written"),
    [((7, 3), [7, 3]), ((0, 1), [1, 2]), (("7", "3"), [1, 2]), ((-7, 3), [1, 2])],
    ids=str,
)
def test_categories_have_positive_ids(
    folder: Folder, tmp_path: Path, ids: Sequence[int | str], written: list[int]
) -> None:
    new = dict(zip((7, 3), ids, strict=True))
    results = [r | {"category_id": new[r["category_id"]]} for r in folder.results]
    classes = [replace(c, id=id_) for c, id_ in zip(CLASSES, ids, strict=True)]
    write_coco_dataset(FolderResults.of(folder.images, results, classes), tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert names == dict(zip(written, (c.name for c in CLASSES), strict=True))
    found = [names[annotation["category_id"]] for annotation in content["annotations"]]
    assert found == [name for truth in folder.truth.values() for name, _, _ in truth]


def test_images_have_numbers(folder: Folder, tmp_path: Path) -> None:
    images = [replace(image, id=f"id {image.id}") for image in folder.images]
    results = [result | {"image_id": f"id {result['image_id']}"} for result in folder.results]
    write_coco_dataset(FolderResults.of(images, results, CLASSES), tmp_path / "text.json")
    write_coco_dataset(folder.gathered(), tmp_path / "number.json")
    assert (tmp_path / "text.json").read_text() == (tmp_path / "number.json").read_text()


def test_threshold_and_the_deepest_folder(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(threshold: float | tuple[float, float]) -> list[list[float]]:
        found = folder.gathered(threshold).found
        return [[result["score"] for result in results] for _, results in found]

    assert scores(0.7) == [[0.9, 0.9, 0.7], [0.9, 0.7], [0.9, 0.7], []]
    assert scores((0.8, 0.4)) == [[0.9, 0.9, 0.7], [0.9, 0.7], [0.9, 0.7], []]
    assert scores((0.4, 0.8)) == [[0.9, 0.9, 0.5], [0.9, 0.5], [0.9, 0.5], []]
    for result in folder.results:  # as the network gives them: lower than 0.7 in f64
        result["score"] = float(np.float32(0.7))
    assert [len(some) for some in scores(0.7)] == [4, 3, 3, 0]
    assert folder.gathered().folder == tmp_path / "photos"
    monkeypatch.chdir(tmp_path / "photos")
    below = [replace(image, file_name=f"./{NAMES[image.id - 1]}") for image in folder.images[1:3]]
    part = FolderResults.of(below, [], CLASSES)
    assert part.folder == tmp_path / "photos" / "sub dir"
    assert [info.file_name for info, _ in part.found] == ["b #1 & +2%.png", "ö.jpg"]


def test_what_no_tool_could_read_is_refused(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no images"):
        FolderResults.of([], [], CLASSES)
    with pytest.raises(DataError, match="of the image 99, which is unknown"):
        FolderResults.of(folder.images, [folder.results[0] | {"image_id": 99}], CLASSES)
    folder.results[3]["category_id"] = 4
    with pytest.raises(DataError, match="of the image 1 has the category 4; expected one of 7, 3"):
        folder.gathered()
    folder.results[3]["category_id"] = 7
    folder.results[3]["segmentation"] = {"size": [1, 1], "counts": "1"}
    with pytest.raises(DataError, match="an RLE of its image's size"):
        write_label_studio(folder.gathered(), tmp_path / "a.json", tmp_path / "a.xml")
    assert not (tmp_path / "a.json").exists()


def test_images_are_written_one_at_a_time(folder: Folder, tmp_path: Path) -> None:
    """A generator is enough, and each image is written before the next one is asked for."""
    gathered = folder.gathered()
    sizes = []

    def found() -> Iterator[Any]:
        for image, results in gathered.found:
            sizes.append(sum(path.stat().st_size for path in tmp_path.glob(".*.tmp")))
            yield image, results * 400  # more than a buffer of the file takes

    write_coco_dataset(replace(gathered, found=found()), tmp_path / "a.json")
    assert sizes == sorted(set(sizes))
    assert len(json.loads((tmp_path / "a.json").read_text())["annotations"]) == 9 * 400


# Label Studio


def decoded(data: Sequence[int], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Decodes rle-pack bit by bit, as its description says; returns [height, width, 4]."""
    bits = "".join(f"{byte:08b}" for byte in data)
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    count, word = read(32), read(5) + 1
    length_bits = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        repeated = read(1)
        length = read(length_bits[read(2)]) + 1
        values += [read(word)] * length if repeated else [read(word) for _ in range(length)]
    assert len(values) == count == 4 * shape[0] * shape[1]
    assert len(bits) - place < 8, "bytes after the end"
    assert "1" not in bits[place:]
    return np.array(values, np.uint8).reshape(*shape, 4)


def brush(mask: Mask) -> list[int]:
    return brush_rle(read_segmentation(rle_of(mask), *mask.shape))


@given(bitmaps())
@example(np.ones((1, 1), np.bool_))
@example(np.zeros((3, 5), np.bool_))
@example(np.ones((128, 128), np.bool_))  # 65,536 values: the longest run
@example(np.ones((129, 128), np.bool_))  # two runs, of which one is full
@example(np.arange(200 * 331).reshape(200, 331) % 66000 == 7)
def test_brush_masks_have_every_pixel(mask: Mask) -> None:
    expected = np.repeat(255 * mask[..., None].astype(np.uint8), 4, axis=2)
    np.testing.assert_array_equal(decoded(brush(mask), mask.shape), expected)


def test_a_brush_takes_as_many_pixels_as_it_counts() -> None:
    huge = read_segmentation({"size": [2**15, 2**15], "counts": [2**30]}, 2**15, 2**15)
    with pytest.raises(DataError, match="32768x32768 pixels is too large"):
        brush_rle(huge)


def test_tasks_and_their_configuration(folder: Folder, tmp_path: Path) -> None:
    tasks_file, configuration = tmp_path / "tasks.json", tmp_path / "labels.xml"
    assert write_label_studio(folder.gathered(), tasks_file, configuration) == 1
    view = ElementTree.parse(configuration).getroot()
    image, brushes = view.find("Image"), view.find("BrushLabels")
    assert image is not None
    assert brushes is not None
    labels = brushes.findall("Label")
    assert [label.get("value") for label in labels] == [category.name for category in CLASSES]
    assert len({label.get("background") for label in labels}) == 2
    assert brushes.get("toName") == image.get("name")

    tasks = json.loads(tasks_file.read_text())
    assert len(tasks) == len(NAMES)
    for task, info, name in zip(tasks, folder.images, NAMES, strict=True):
        address = task["data"][str(image.get("value")).removeprefix("$")]
        path, _, query = address.partition("?d=")
        assert (path, unquote(query)) == ("/data/local-files/", f"photos/{name}")
        assert not set(query) & set(" #&+"), "a server would read the address otherwise"
        (prediction,) = task["predictions"]
        truth = folder.truth[name]
        scores = [score for _, score, _ in truth]
        assert prediction["score"] == pytest.approx(np.mean(scores) if scores else 0)
        for region, (label, score, mask) in zip(prediction["result"], truth, strict=True):
            assert region["from_name"] == brushes.get("name")
            assert region["to_name"] == image.get("name")
            assert region["type"] == "brushlabels"
            assert region["value"]["brushlabels"] == [label]
            assert region["score"] == score
            shape = region["original_height"], region["original_width"]
            assert shape == (info.height, info.width)
            np.testing.assert_array_equal(
                decoded(region["value"]["rle"], shape)[..., 3] == 255, mask
            )
        assert len({region["id"] for region in prediction["result"]}) == len(truth)


def test_addresses_elsewhere(folder: Folder, tmp_path: Path) -> None:
    write_label_studio(
        folder.gathered(), tmp_path / "tasks.json", tmp_path / "labels.xml",
        address=lambda path: f"s3://bucket/{path}", model_version="v2",
    )  # fmt: skip
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert [task["data"]["image"] for task in tasks] == [f"s3://bucket/{name}" for name in NAMES]
    assert {task["predictions"][0]["model_version"] for task in tasks} == {"v2"}


# The tools' own readers


def test_fiftyone_reads_the_data_set(folder: Folder, tmp_path: Path) -> None:
    utils = pytest.importorskip("fiftyone.utils.coco", reason=HEAVY)
    write_coco_dataset(folder.gathered(), tmp_path / "dataset.json")
    importer = utils.COCODetectionDatasetImporter(
        data_path=str(tmp_path / "photos"), labels_path=str(tmp_path / "dataset.json"),
        label_types="segmentations",
    )  # fmt: skip
    with importer:
        for path, metadata, label in importer:
            truth = folder.truth[Path(path).relative_to(tmp_path / "photos").as_posix()]
            found = label.detections if label else []
            for detection, (name, score, mask) in zip(found, truth, strict=True):
                x, y, _, _ = np.multiply(
                    detection.bounding_box, [metadata.width, metadata.height] * 2
                )
                whole = np.zeros_like(mask)
                height, width = detection.mask.shape
                whole[round(y) : round(y) + height, round(x) : round(x) + width] = detection.mask
                np.testing.assert_array_equal(whole, mask)
                assert (detection.label, detection.confidence) == (name, score)


@pytest.mark.parametrize("stream", [False, True])
def test_datumaro_reads_the_data_set(folder: Folder, tmp_path: Path, stream: bool) -> None:
    """CVAT reads COCO with a fork of it, and refuses masks without a pixel and ids below 1."""
    datumaro = pytest.importorskip("datumaro.components.dataset", reason=HEAVY)
    kind = datumaro.StreamDataset if stream else datumaro.Dataset
    (tmp_path / "annotations").mkdir()
    (tmp_path / "photos").rename(tmp_path / "images")
    gathered = folder.gathered()
    write_coco_dataset(gathered, tmp_path / "annotations" / "instances_default.json")
    read = kind.import_from(str(tmp_path), "coco_instances")
    names = {name.rpartition(".")[0]: name for name in NAMES}
    items = list(read)
    assert len(items) == len(NAMES)
    for item in items:
        found = [a for a in item.annotations if a.type.name == "mask"]
        truth = folder.truth[names[item.id]]
        for annotation, (name, score, mask) in zip(
            sorted(found, key=lambda annotation: annotation.id), truth, strict=True
        ):
            np.testing.assert_array_equal(annotation.image, mask)
            label = read.categories()[next(iter(read.categories()))].items[annotation.label]
            assert label.name == name
            assert annotation.attributes["score"] == score


def test_label_studio_reads_the_tasks(folder: Folder, tmp_path: Path) -> None:
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason=HEAVY)
    from label_studio_sdk.converter.brush import decode_from_annotation, mask2rle

    write_label_studio(folder.gathered(), tmp_path / "tasks.json", tmp_path / "labels.xml")
    project = interface.LabelInterface((tmp_path / "labels.xml").read_text())
    project.validate()
    for task, name in zip(json.loads((tmp_path / "tasks.json").read_text()), NAMES, strict=True):
        (prediction,) = task["predictions"]
        assert project.validate_prediction(prediction, return_errors=True) == []
        flat = [region | region["value"] for region in prediction["result"]]
        layers = decode_from_annotation("brush", flat)
        for layer, (_, _, mask) in zip(layers.values(), folder.truth[name], strict=True):
            np.testing.assert_array_equal(layer, 255 * mask)
            assert mask2rle(np.uint8(255) * mask)[: len(brush(mask))] == brush(mask)


def test_supervision_reads_what_comask_makes(folder: Folder, tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision", reason=TRACK)
    write_coco_dataset(folder.gathered(), tmp_path / "dataset.json")
    read = supervision.DetectionDataset.from_coco(
        images_directory_path=str(tmp_path / "photos"),
        annotations_path=str(tmp_path / "dataset.json"), force_masks=True,
    )  # fmt: skip
    for path, _, found in read:
        truth = folder.truth[Path(path).relative_to(tmp_path / "photos").as_posix()]
        assert len(found) == len(truth)
        for place, (name, _, mask) in enumerate(truth):
            np.testing.assert_array_equal(found.mask[place], mask)
            assert read.classes[found.class_id[place]] == name


@pytest.mark.parametrize("compact", [False, True])
def test_there_and_back_through_supervision(compact: bool) -> None:
    supervision = pytest.importorskip("supervision", reason=TRACK)
    own = Detections(
        boxes_xyxy=np.array([[4, 2, 34, 31.5], [10, 0.5, 90, 30]], np.float32),
        scores=np.array([0.75, 0.5], np.float32),
        labels=np.array([1, 0]),
        mask_probs=np.random.default_rng(0).random((2, 28, 28), np.float32),
        image_size=(40, 100),
        class_names=("a", "b"),
    )
    there = own.to_supervision()
    if compact:
        from supervision.detection.compact_mask import CompactMask

        whole = np.tile(np.array([0, 0, 99, 39], np.float32), (2, 1))
        there.mask = CompactMask.from_dense(there.mask, whole, image_shape=(40, 100))
    back = from_supervision(there, class_names=own.class_names)
    for name in ("boxes_xyxy", "scores", "labels", "masks"):
        np.testing.assert_array_equal(getattr(back, name), getattr(own, name))
    assert back.to_coco(1) == own.to_coco(1)
    assert from_supervision(supervision.Detections.empty(), (4, 5)).masks.shape == (0, 4, 5)
