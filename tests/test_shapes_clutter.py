"""The synthetic set of thin and crowded objects."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from pycocotools import mask as coco

from comask.data.check import sound_part
from comask.data.open_data import open_source
from comask.data.shapes import ShapesSource
from comask.data.shapes_clutter import (
    CATEGORIES,
    DIAMETERS,
    MAX_OBJECTS,
    MIN_VISIBLE_PIXELS,
    ShapesClutterSource,
    render,
)

IMAGES = 60


@pytest.fixture(scope="module")
def source() -> ShapesClutterSource:
    return ShapesClutterSource(num_images=IMAGES, seed=5)


def test_an_image_depends_on_seed_and_index_alone(source: ShapesClutterSource) -> None:
    image, annotations = render(5, 17)
    for order in ((17,), (3, 17, 17)):
        again = ShapesClutterSource(num_images=IMAGES, seed=5)
        for index in order:
            pixels = again.image(index)
        assert np.array_equal(pixels, image)
        assert again.annotations(17) == annotations
    assert render(6, 17)[1] != annotations


def test_it_is_sound_and_unlike_shapes(source: ShapesClutterSource) -> None:
    part, problems = sound_part(source)
    assert part is source
    assert not problems
    assert len(CATEGORIES) == 8
    own, plain = (
        [a for i in range(IMAGES) for a in s.annotations(i)]
        for s in (source, ShapesSource(num_images=IMAGES, seed=5))
    )
    assert len(own) > 1.5 * len(plain)

    def filled(annotations: list[dict[str, object]]) -> float:
        """How much of its box an object fills, on average."""
        shares = [a["area"] / (a["bbox"][2] * a["bbox"][3]) for a in annotations]  # type: ignore[operator, index]
        return float(np.mean(shares))

    assert filled(own) < 0.75 * filled(plain)


def test_annotations_are_exact_and_disjoint(source: ShapesClutterSource) -> None:
    shared = []
    for index in range(IMAGES):
        info, annotations = source.info(index), source.annotations(index)
        assert len(annotations) <= MAX_OBJECTS
        total = np.zeros((info.height, info.width), int)
        for annotation in annotations:
            mask = coco.decode(annotation["segmentation"])
            assert mask.sum() == annotation["area"] >= MIN_VISIBLE_PIXELS
            rows, columns = np.nonzero(mask)
            x, y, w, h = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)
            assert max(w, h) <= 2 * DIAMETERS[1]
            total += mask
        assert total.max(initial=0) <= 1
        labels = [annotation["category_id"] for annotation in annotations]
        if len(labels) >= 4:
            shared.append(max(map(labels.count, labels)) / len(labels))
    assert np.mean(shared) > 0.6  # two thirds are of the image's class


def test_every_command_knows_it(tmp_path: Path) -> None:
    written = run("shapes", tmp_path / "set", "--count", 3, "--seed", 2, "--clutter")
    assert written.exit_code == 0, written.output
    files = sorted((tmp_path / "set" / "images").iterdir())
    generated = open_source("shapes-clutter", "train", shapes_images=3, shapes_seed=2)
    for index, file in enumerate(files):
        assert generated.info(index).file_name == file.name
    checked = run("check", "shapes-clutter")
    assert checked.exit_code == 0, checked.output
    assert "sickle: " in checked.output
    both = run(
        "train", "--data", "shapes-clutter", "--data", "shapes", "--output", tmp_path / "run"
    )
    assert both.exit_code == 1
    assert "shapes-clutter cannot be joined with other data" in both.output


def test_the_generator_is_the_one_of_the_published_figures() -> None:
    digest = hashlib.sha256()
    for index in range(20):
        image, annotations = render(0, index)
        digest.update(
            repr([(a["bbox"], a["area"], a["category_id"]) for a in annotations]).encode()
        )
        digest.update(repr(image.shape).encode())
    assert digest.hexdigest()[:16] == "84212abf8b4c93c6"
