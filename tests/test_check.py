"""The data set checker: one set with every problem, and random junk."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from comask.config import DataConfig, PreprocessConfig
from comask.data.check import sound_part
from comask.data.coco import read_coco
from comask.data.layouts import read_data_set
from comask.data.problems import NOTES, Problem, describe
from comask.data.shapes import ShapesSource
from comask.data.source import Category, ImageInfo, InstanceSource
from comask.data.training_set import TrainingSet
from comask.errors import DataError, ImageError
from comask.evaluate import Truth
from comask.preprocess import decode_image

WIDTH, HEIGHT = 20, 12
SQUARE = [2.0, 2.0, 10.0, 2.0, 10.0, 8.0, 2.0, 8.0]
SOUND: dict[str, Any] = {
    "id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0, "bbox": [2, 2, 8, 6], "area": 48,
    "segmentation": [SQUARE],
}  # fmt: skip
RLE = {"size": [HEIGHT, WIDTH], "counts": [14, 8, WIDTH * HEIGHT - 22]}
SOUND_ANNOTATIONS = [
    SOUND,
    SOUND | {"id": 2, "iscrowd": 1, "segmentation": RLE},  # a crowd
    SOUND | {"id": 3, "bbox": [0.8, 1.2, 10.2, 7.8]},  # as far from the mask as some of COCO's own
    {key: SOUND[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"id": 4},
]
# One or two of each kind that a single annotation can have: kind, changes, what is reported of it.
UNSOUND = [
    ("annotations listed again", {}, ""),
    ("annotations without bbox or category_id", {"id": 10, "bbox": None}, "bbox None"),
    ("annotations without bbox or category_id", {"id": 11, "category_id": None}, "category_id None"),
    ("annotations of unknown categories", {"id": 12, "category_id": 4}, "category 4"),
    ("annotations of unknown categories", {"id": 13, "category_id": [3]}, "category [3]"),
    ("annotations with an iscrowd other than 0 and 1", {"id": 14, "iscrowd": "no"}, "iscrowd 'no'"),
    ("boxes that are not four numbers", {"id": 44, "bbox": [2, 2, 5]}, "[2, 2, 5]"),
    ("boxes without area", {"id": 15, "bbox": [2, 2, 0, 6]}, "[2, 2, 0, 6]"),
    ("boxes without area", {"id": 16, "bbox": [2, 2, 6, -1]}, "[2, 2, 6, -1]"),
    ("boxes outside the image", {"id": 17, "bbox": [20, 2, 8, 6]}, "[20, 2, 8, 6] in 20x12"),
    ("boxes outside the image", {"id": 18, "bbox": [2, -7, 8, 6]}, "[2, -7, 8, 6] in 20x12"),
    ("annotations without segmentation", {"id": 19, "segmentation": None}, ""),
    ("annotations without segmentation", {"id": 20, "segmentation": []}, ""),
    ("annotations with only polygons of fewer than 3 points",
     {"id": 21, "segmentation": [[1, 2, 3, 4]]}, "[[1, 2, 3, 4]]"),
    ("segmentations neither polygons nor RLE", {"id": 22, "segmentation": SQUARE}, "got 2.0"),
    ("segmentations neither polygons nor RLE", {"id": 23, "segmentation": "mask"}, "got 'mask'"),
    ("masks in RLE that cannot be of the image",
     {"id": 24, "segmentation": {"size": [20, 12], "counts": [5, 235]}}, "[20, 12]"),
    ("masks in RLE that cannot be of the image",
     {"id": 25, "segmentation": {"size": [12, 20], "counts": "\ud800"}}, "add up to 12 x 20"),
    ("masks without a pixel",
     {"id": 26, "segmentation": {"size": [12, 20], "counts": [240]}}, "[240]"),
    ("masks without a pixel",
     {"id": 27, "segmentation": [[30, 2, 40, 2, 40, 8]]}, "[30, 2, 40, 2, 40, 8]"),
    ("boxes partly outside the image", {"id": 28, "bbox": [-3, 2, 13, 6]}, "[-3, 2, 13, 6]"),
    ("annotations with a polygon of fewer than 3 points",
     {"id": 29, "segmentation": [[5, 5], SQUARE]}, "[5, 5]"),
    ("annotations with an area that is not a number", {"id": 30, "area": None}, "None"),
    ("annotations without a unique id", {"id": 2}, "annotation 2"),
    ("annotations without a unique id", {"id": None}, "annotation None"),
]  # fmt: skip
# what becomes of those that are kept
MENDED = [
    SOUND | {"id": 28, "bbox": [0, 2, 10, 6]},
    SOUND | {"id": 29},
    {key: value for key, value in SOUND.items() if key != "area"} | {"id": 30},
    SOUND | {"id": 31},
    SOUND | {"id": 32},
]


def entry(id_: int, name: str, width: int = WIDTH, height: int = HEIGHT) -> dict[str, Any]:
    return {"id": id_, "file_name": name, "height": height, "width": width}


def unsound_set(folder: Path) -> InstanceSource:
    """Images 1 and 2 are sound, the latter without annotations; EXIF turns 3, and it fits."""
    images = folder / "images"
    images.mkdir(parents=True)
    (folder / "annotations").mkdir()
    exif = Image.Exif()
    exif[0x112] = 6
    for name in ("1.png", "2.tiff", "same.png", "other.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / name)
    Image.new("RGB", (HEIGHT, WIDTH)).save(images / "3.jpg", exif=exif)
    Image.new("RGB", (HEIGHT, WIDTH)).save(images / "turned.tiff", tiffinfo={0x112: 6})
    Image.new("RGB", (WIDTH, HEIGHT)).save(images / "wrong.png", exif=exif)
    (images / "text.jpg").write_text("no image")
    entries = [
        entry(1, "1.png"), entry(2, "2.tiff"), entry(3, "3.jpg"), entry(4, "turned.tiff"),
        entry(5, "flat.png", height=0), entry(6, "same.png"), entry(6, "other.png"),
        entry(1, "1.png"), entry(7, "absent.png"), entry(8, "text.jpg"), entry(9, "wrong.png"),
        entry(10, "../images/1.png"), entry(11, str(images / "1.png")),
    ]  # fmt: skip
    strays = [SOUND | {"id": 40, "image_id": 99}, {"id": 41}, SOUND | {"id": 42, "image_id": [1]}]
    annotations = [*SOUND_ANNOTATIONS, *(SOUND | changes for _, changes, _ in UNSOUND), *strays]
    annotations.append(SOUND | {"id": 43, "image_id": 7, "bbox": None})  # goes with its image
    content = {
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "car"}],
    }
    (folder / "annotations" / "instances.json").write_text(json.dumps(content))
    return read_data_set(folder, "train")


def test_every_kind_is_found_counted_and_exemplified(tmp_path: Path) -> None:
    _, problems = sound_part(unsound_set(tmp_path / "set"))
    found = {problem.kind: problem for problem in problems}
    expected: dict[str, list[str]] = {
        "images annotated with a side below 1 pixel": ["flat.png: 20x0"],
        "images sharing an id with a different one": ["same.png: id 6", "other.png: id 6"],
        "images listed again": ["1.png: id 1"],
        "images with a file_name that leads out of their folder": [
            "../images/1.png", str(tmp_path / "set" / "images" / "1.png"),
        ],
        "images without a file": ["absent.png"],
        "images with an unreadable header": ["text.jpg"],
        "images of another size than annotated": ["wrong.png: 12x20, annotated 20x12"],
        "annotations of unknown images": [
            "annotation 40: image 99", "annotation 41: image None", "annotation 42: image [1]",
        ],
    }  # fmt: skip
    for kind, changes, words in UNSOUND:
        start = f"1.png annotation {changes.get('id', 1)}"
        expected.setdefault(kind, []).append(f"{start}…{words}")
    assert list(found) == list(expected)  # the report's order
    for kind, examples in expected.items():
        assert found[kind].count == len(examples) == len(found[kind].examples), kind
        for example, words in zip(found[kind].examples, examples, strict=True):
            start, _, rest = words.partition("…")
            assert example.startswith(start), (kind, example)
            assert rest in example, (kind, example)
    assert found["boxes partly outside the image"].consequence == "clipped"
    assert found["images without a file"].consequence == "left out"


def test_what_is_sound_survives_untouched_and_the_rest_is_mended(tmp_path: Path) -> None:
    source = unsound_set(tmp_path / "set")
    before = json.dumps([source.annotations(index) for index in range(len(source))])
    part, _ = sound_part(source)
    assert part.categories == source.categories
    assert [part.info(i).file_name for i in range(len(part))] == [
        "1.png", "2.tiff", "3.jpg", "turned.tiff",
    ]  # fmt: skip
    assert part.annotations(0) == SOUND_ANNOTATIONS + MENDED
    assert [part.annotations(i) for i in range(1, 4)] == [[], [], []]
    for index in range(len(part)):
        assert part.image(index).shape == (HEIGHT, WIDTH, 3)
    assert json.dumps([source.annotations(i) for i in range(len(source))]) == before
    again, problems = sound_part(part)
    assert again is part
    assert problems == []
    # its files are looked at again, too
    (tmp_path / "set" / "images" / "1.png").unlink()
    assert [p.kind for p in sound_part(part)[1]] == ["images without a file"]


def test_no_sound_image_is_an_error(tmp_path: Path) -> None:
    source = unsound_set(tmp_path / "set")
    for file in (tmp_path / "set" / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"no image.* can be used; .*7 images without a file"):
        sound_part(source)
    with pytest.raises(DataError, match="the file lists no images"):
        sound_part(MemorySource([], []))


def test_a_description_is_one_line_each() -> None:
    names = ("1.jpg", "2.jpg", "3.jpg")
    problems = [
        Problem(kind="images without a file", count=4, examples=names, consequence="left out"),
        Problem(kind="boxes without area", count=1, examples=("5: [0]",), consequence="left out"),
        Problem(kind="images listed again", count=3, examples=names, consequence="left out"),
    ]
    assert describe(problems) == [
        "data: 4 images without a file (left out): 1.jpg, 2.jpg, 3.jpg, …",
        "data: 1 box without area (left out): 5: [0]",
        "data: 3 images listed again (left out): 1.jpg, 2.jpg, 3.jpg",
    ]


def test_sound_sources_are_returned_themselves(shared_data: Path) -> None:
    shapes = ShapesSource(num_images=20, seed=0)
    assert sound_part(shapes) == (shapes, [])
    real = read_data_set(shared_data / "coco_dev", "val")
    part, problems = sound_part(real)
    assert describe(problems) == []
    assert part is real


def test_headers_tell_what_decoding_tells(shared_data: Path, tmp_path: Path) -> None:
    sizes: dict[str, tuple[int, ...]] = {}
    for path in sorted((shared_data / "odd").iterdir()):
        with suppress(ImageError):
            sizes[path.name] = decode_image(path).shape
    assert len(sizes) == 19
    for turned in (False, True):
        entries = [
            entry(id_, name, *((h, w) if turned else (w, h)))
            for id_, (name, (h, w, _)) in enumerate(sizes.items())
        ]
        content = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "odd"}]}
        (tmp_path / "odd.json").write_text(json.dumps(content))
        source = read_coco(tmp_path / "odd.json", shared_data / "odd")
        part, problems = sound_part(source)
        if turned:
            square = [name for name, (h, w, _) in sizes.items() if h == w]
            assert [part.info(i).file_name for i in range(len(part))] == square
            assert problems[0].count == len(sizes) - len(square)
        else:
            assert part is source


# what follows: random sources, sound and unsound


class MemorySource:
    """Black images of the annotated sizes."""

    categories = (Category(id=3, name="car"), Category(id=90, name="toothbrush"))

    def __init__(self, infos: list[ImageInfo], annotations: list[list[dict[str, Any]]]) -> None:
        self._infos, self._annotations = infos, annotations

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, index: int) -> ImageInfo:
        return self._infos[index]

    def image(self, index: int) -> NDArray[np.uint8]:
        return np.zeros((self._infos[index].height, self._infos[index].width, 3), np.uint8)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        return self._annotations[index]


def lists(elements: st.SearchStrategy[Any], *sizes: int) -> st.SearchStrategy[list[Any]]:
    return st.sampled_from(sizes).flatmap(
        lambda size: st.lists(elements, min_size=size, max_size=size)
    )


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
numbers = st.integers(-10, 40) | st.floats(-10, 40, width=16)
wild = numbers | st.sampled_from([float("nan"), float("inf"), 1e6, -1e300, 10**400])
rles = st.fixed_dictionaries(
    {
        "size": st.just([HEIGHT, WIDTH]) | junk,
        "counts": st.sampled_from([[240], [0, 240], [9, 1, 230], [9], "0", "b7", b"b7"]) | junk,
    }
)
polygons = lists(lists(numbers, 4, 6, 8, 10), 1, 2)
common: dict[str, st.SearchStrategy[Any]] = {
    "id": st.integers(1, 9) | st.integers(1, 10**6),
    "category_id": st.sampled_from([3, 90]),
    "iscrowd": st.sampled_from([0, 0, 1]),
    "bbox": st.tuples(st.floats(-3, 18), st.floats(-3, 10), st.floats(0.5, 9), st.floats(0, 9)),
    "area": st.just(20.0),
    "segmentation": polygons,
}
odd: dict[str, st.SearchStrategy[Any]] = {
    "id": junk,
    "category_id": st.just(4) | junk,
    "iscrowd": junk,
    "bbox": lists(numbers, 4) | lists(wild, 3, 4) | junk,
    "area": junk,
    "segmentation": rles | lists(lists(wild, 5, 6, 8) | polygons, 1, 2) | junk,
}


@st.composite
def annotations(draw: st.DrawFn) -> dict[str, Any]:
    """One in the common form, but for at most two fields."""
    annotation = {field: draw(values) for field, values in common.items()}
    for field in draw(st.lists(st.sampled_from(list(odd)), max_size=2, unique=True)):
        annotation[field] = draw(odd[field])
        if draw(st.integers(0, 5)) == 0:
            del annotation[field]
    return annotation


@st.composite
def sources(draw: st.DrawFn) -> MemorySource:
    infos = [ImageInfo(id=1, file_name="first", height=HEIGHT, width=WIDTH)]
    infos += draw(
        st.lists(
            st.builds(
                ImageInfo,
                id=st.integers(2, 4),
                file_name=st.sampled_from("ab"),
                height=st.integers(-1, HEIGHT),
                width=st.just(WIDTH),
            ),
            max_size=4,
        )
    )
    return MemorySource(infos, [draw(st.lists(annotations(), max_size=5)) for _ in infos])


def changes(problems: list[Problem]) -> list[Problem]:
    """Those that are not merely pointed out."""
    notes = {kind.value[0] for kind in NOTES}
    return [problem for problem in problems if problem.kind not in notes]


@given(sources())
def test_the_sound_part_is_sound_and_can_be_used(source: MemorySource) -> None:
    part, problems = sound_part(source)
    assert all(line.isprintable() for line in describe(problems))
    assert (part is source) == (not changes(problems))
    again, rest = sound_part(part)
    assert changes(rest) == []
    assert again is part
    indices = list(range(len(part)))
    assert len({part.info(i).id for i in indices}) == len(indices)
    ids = [annotation["id"] for i in indices for annotation in part.annotations(i)]
    assert len(set(ids)) == len(ids)
    size = PreprocessConfig(short_side=24, max_side=40)
    dataset = TrainingSet(part, indices, size, config=DataConfig(flip_probability=0.5), seed=0)
    for index in indices:
        target = dataset[(0, index)][2]
        assert target.boxes.isfinite().all()
        assert (target.boxes[:, 2:] > target.boxes[:, :2]).all()
        assert target.masks.bitmaps().flatten(1).any(dim=1).all()
        objects = [a for a in part.annotations(index) if not a.get("iscrowd")]
        assert len(objects) == len(target.labels)
    assert len(Truth(part, indices).dataset["annotations"]) == len(ids)


def test_a_sound_part_reaches_the_loader_s_processes(tmp_path: Path) -> None:
    part, _ = sound_part(unsound_set(tmp_path / "set"))
    copy = pickle.loads(pickle.dumps(part))
    assert asdict(copy.info(0)) == asdict(part.info(0))
    assert copy.annotations(0) == part.annotations(0)
