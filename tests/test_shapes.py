import copy
import hashlib
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from pycocotools.coco import COCO

import comask.data.shapes
from comask.data.shapes import ShapesSource
from comask.data.source import InstanceSource

SOURCE_SHA256 = "6733f613f84e960761d4c1821aa676e029e6004bc4a2c5b8ee0fdedfd807c62b"
CONTENT_SHA256 = "71bdb7c4a6b211132b9ee130996f14b046b5d6a717386e8e863ff6c020046112"
NUM_IMAGES = 300


@pytest.fixture(scope="module")
def source():
    return ShapesSource(num_images=NUM_IMAGES, seed=0)


@pytest.fixture(scope="module")
def per_image(source):
    """The annotations of each image."""
    return [source.annotations(index) for index in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def objects(per_image):
    return [a for annotations in per_image for a in annotations if not a["iscrowd"]]


def test_generator_is_frozen():
    text = Path(comask.data.shapes.__file__).read_text(encoding="utf-8")
    assert hashlib.sha256(text.encode()).hexdigest() == SOURCE_SHA256, (
        "shapes.py is frozen, since published figures were measured on what it makes. Undo the "
        "change; or, if you need another generator, give it a new name, set the hashes in this "
        "test anew, and measure every figure again."
    )


def test_content_is_frozen(source):
    digest = hashlib.sha256()
    for index in range(8):
        digest.update(source.image(index).tobytes())
        digest.update(json.dumps(source.annotations(index), sort_keys=True).encode())
    assert digest.hexdigest() == CONTENT_SHA256, (
        "shapes.py makes other images here than where its figures were measured. If the file's own "
        "hash is right, this NumPy or OpenCV draws differently (OpenCV before 4.11 is known to): "
        "figures measured with it cannot be compared with the published ones."
    )


def test_an_image_depends_on_seed_and_index_alone(source):
    order = [5, 40, 3, 77, 5, 12, 0, 81, 82, 83, 84, 5]  # the last 5 is no longer cached
    longer = pickle.loads(pickle.dumps(ShapesSource(num_images=1000, seed=0)))
    for index in order:
        annotations = longer.annotations(index)  # before the pixels, for once
        np.testing.assert_array_equal(longer.image(index), source.image(index))
        assert annotations == source.annotations(index)
        assert longer.info(index) == source.info(index)
    other_seed = ShapesSource(num_images=10, seed=1)
    assert other_seed.image(5).tobytes() != source.image(5).tobytes()


def test_callers_cannot_spoil_the_cache():
    source = ShapesSource(num_images=20, seed=3)
    image, annotations = source.image(0), source.annotations(0)
    expected = image.copy(), copy.deepcopy(annotations)
    image[:] = 0
    for annotation in annotations:
        annotation["bbox"][0] = -1.0
    np.testing.assert_array_equal(source.image(0), expected[0])
    assert source.annotations(0) == expected[1]


def test_length_and_range():
    source: InstanceSource = ShapesSource(num_images=3, seed=0)
    assert len(source) == 3
    assert [c.id for c in source.categories] == list(range(1, 9))
    for method in (source.info, source.image, source.annotations):
        with pytest.raises(IndexError):
            method(3)


def test_info_tells_the_size(source):
    infos = [source.info(index) for index in range(40)]
    assert {(i.width, i.height) for i in infos} == {(128, 96), (96, 128)}
    assert (infos[7].id, infos[7].file_name) == (8, "000008.png")
    for index, info in enumerate(infos):
        image = source.image(index)
        assert image.shape == (info.height, info.width, 3)
        assert image.dtype == np.uint8


def test_annotations_agree_with_their_masks(source, per_image):
    for index, annotations in enumerate(per_image):
        info = source.info(index)
        shown = np.zeros((info.height, info.width), int)
        for annotation in annotations:
            mask = pycocotools.mask.decode(annotation["segmentation"])
            shown += mask
            ys, xs = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y) == (xs.min(), ys.min())
            assert (x + width, y + height) == (xs.max() + 1, ys.max() + 1)
            assert annotation["area"] == len(xs) >= (1 if annotation["iscrowd"] else 24)
            assert annotation["image_id"] == info.id
        assert shown.max() <= 1  # no pixel belongs to two
    ids = [a["id"] for annotations in per_image for a in annotations]
    assert len(set(ids)) == len(ids)
    assert min(ids) > 0


def test_objects_stand_out(source, per_image):
    """What is annotated was painted: its mean colour is not that of its surroundings."""
    differences = []
    for index, annotations in enumerate(per_image[:60]):
        image = source.image(index).astype(float)
        masks = [pycocotools.mask.decode(a["segmentation"]) > 0 for a in annotations]
        background = ~np.any([np.zeros(image.shape[:2], bool), *masks], axis=0)
        for mask in masks:
            difference = image[mask].mean(axis=0) - image[background].mean(axis=0)
            differences.append(np.linalg.norm(difference))
    assert np.median(differences) > 60


def test_variety(source, per_image, objects):
    assert {a["category_id"] for a in objects} == {c.id for c in source.categories}
    sizes = [np.sqrt(a["bbox"][2] * a["bbox"][3]) for a in objects]
    assert max(sizes) / min(sizes) >= 8
    assert np.mean([a["area"] < 16**2 for a in objects]) >= 0.15
    counts = np.array([len(annotations) for annotations in per_image])
    assert 0.01 <= np.mean(counts == 0) <= 0.08
    assert 2 <= len(objects) / NUM_IMAGES <= 4
    assert max(counts) <= 5  # four objects and a crowd
    crowds = [a for annotations in per_image for a in annotations if a["iscrowd"]]
    assert 0.01 <= len(crowds) / NUM_IMAGES <= 0.1


def test_objects_hide_each_other(per_image):
    def any_boxes_overlap(annotations):
        boxes = [a["bbox"] for a in annotations if not a["iscrowd"]]
        return any(
            pycocotools.mask.iou(np.array([a]), np.array([b]), [0])[0, 0] > 0.02
            for a, b in itertools.combinations(boxes, 2)
        )

    assert np.mean([any_boxes_overlap(annotations) for annotations in per_image]) > 0.2


def test_loads_as_coco(source, per_image, capsys):
    coco = COCO()
    infos = [source.info(index) for index in range(NUM_IMAGES)]
    coco.dataset = {
        "images": [
            {"id": i.id, "file_name": i.file_name, "height": i.height, "width": i.width}
            for i in infos
        ],
        "annotations": json.loads(json.dumps(list(itertools.chain(*per_image)))),
        "categories": [{"id": c.id, "name": c.name} for c in source.categories],
    }
    coco.createIndex()
    capsys.readouterr()  # pycocotools reports its progress
    assert len(coco.getImgIds()) == NUM_IMAGES
    assert len(coco.getCatIds()) == 8
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[1, 2, 3])):
        assert coco.annToMask(annotation).sum() == annotation["area"]
