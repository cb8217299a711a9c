"""Which images are for training and which for validation, and several data sets in one."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import exports
import pytest
from conftest import MICRO, run, settings
from exports import (
    CLASSES,
    IMAGES,
    expected,
    found,
    opened,
)
from hypothesis import given
from hypothesis import strategies as st

from comask.config import DataConfig
from comask.data.coco import CocoSource
from comask.data.joined import join
from comask.data.layouts import read_data_set
from comask.data.open_data import _set_aside, open_source, open_training_data
from comask.errors import DataError


def training(data: list[Path], val: list[Path] = [], **keys: Any) -> tuple[Any, list[list[str]]]:  # noqa: B006
    """The opened data, and the names of the images for training and for validation."""
    config = DataConfig(**keys)
    both = open_training_data(config, [*map(str, data)], [*map(str, val)], seed=3)
    names = [
        [Path(source.info(index).file_name).stem for index in indices]
        for source, indices in ((both.train, both.train_indices), (both.val, both.val_indices))
    ]
    return both, names


def test_without_val_its_own_part_else_a_share(coco: Path, tmp_path: Path) -> None:
    exports.yolo(coco, tmp_path / "parts")
    exports.labelme(coco, tmp_path / "whole")
    parts = exports.parts_of(exports.content_of(coco))
    stems = {
        name: [Path(i["file_name"]).stem for i in part["images"]] for name, part in parts.items()
    }
    _, (train, val) = training([tmp_path / "parts"])
    assert (set(train), set(val)) == (set(stems["train"]), set(stems["valid"]))
    _, (train, val) = training([tmp_path / "whole"], val_fraction=0.25)
    assert (len(train), len(val)) == (6, 2)
    assert not set(train) & set(val)
    # one of two has no such part, so that a share of both is taken
    _, (train, val) = training([tmp_path / "parts", tmp_path / "whole"], val_fraction=0.25)
    assert (len(train), len(val)) == (10, 4)
    # --val wins over the part
    _, (train, val) = training([tmp_path / "parts"], [tmp_path / "whole"])
    assert (len(train), len(val)) == (6, 8)


def test_validation_gets_the_class_ids_of_training(coco: Path, tmp_path: Path) -> None:
    """LabelMe numbers the classes that occur, YOLO counts from 0, COCO has any ids."""
    exports.labelme_parted(coco, tmp_path / "labelme")
    both, _ = training([coco], [tmp_path / "labelme"])
    assert both.val.categories == both.train.categories
    whole = expected(coco)
    assert {name: whole[name] for name in found(both.val)} == found(both.val)
    file = next((tmp_path / "labelme" / "valid").glob("*.json"))
    content = json.loads(file.read_text())
    content["shapes"].append(exports.labelme_shape("new", [0, 0, 9, 0, 9, 9]))
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="has the categories new, which the training data lacks"):
        training([coco], [tmp_path / "labelme"])


def test_several_sets_are_joined_by_class_name(
    coco: Path, coco_disjoint: Path, tmp_path: Path
) -> None:
    exports.yolo(coco, tmp_path / "a")
    exports.cvat_masks(coco_disjoint, tmp_path / "b")
    (tmp_path / "b" / "labelmap.txt").write_text(
        (tmp_path / "b" / "labelmap.txt").read_text().replace("bolt", "nut")
    )
    done = run(
        "train", "--data", tmp_path / "a", "--data", tmp_path / "b", "--preset", "shapes-tiny",
        "--output", tmp_path / "run",
        *settings(*MICRO, "train.max_steps=1", "train.evaluate_every=0"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "13 training images, 1 for validation, 4 classes" in done.output
    both, _ = training([tmp_path / "a", tmp_path / "b"])
    assert [c.name for c in both.train.categories] == [*CLASSES, "nut"]
    counts = Counter(name for part in expected(coco_disjoint).values() for name, *_ in part)
    train_only = exports.parts_of(exports.content_of(coco))["train"]["annotations"]
    in_a = Counter(CLASSES[a["category_id"] - 1] for a in train_only)
    in_b = Counter({"nut" if name == "bolt" else name: n for name, n in counts.items()})
    names = {c.id: c.name for c in both.train.categories}
    assert Counter({names[id_]: n for id_, n in both.train.objects.items()}) == in_a + in_b


def test_a_joined_set_has_the_problems_of_its_parts(coco: Path, tmp_path: Path) -> None:
    """Ids become other ones, and what they hide in one set must not be hidden in the joined one."""
    shutil.copytree(coco, tmp_path / "a")
    content = exports.content_of(coco)
    first = content["annotations"][0]
    content["annotations"] += [first, first | {"category_id": 77, "id": 900}]
    content["annotations"].append(
        {k: v for k, v in first.items() if k != "category_id"} | {"id": 901}
    )
    content["annotations"].append(first | {"image_id": 999, "id": 902})
    content["annotations"].append({k: v for k, v in first.items() if k != "id"})
    content["images"].append(content["images"][0])
    content["categories"].append({"id": 9, "name": CLASSES[0]})
    (tmp_path / "a" / "annotations" / "instances.json").write_text(json.dumps(content))
    _, alone = opened(tmp_path / "a")
    lines: list[str] = []
    joined = open_source(
        [str(tmp_path / "a"), str(coco)],
        "train",
        shapes_images=0,
        shapes_seed=0,
        report=lines.append,
    )
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        line.partition(": ")[2].partition(":")[0] for line in alone
    ]
    assert len(alone) == 7
    assert len(joined) == 2 * IMAGES


def test_images_of_joined_sets_must_not_lead_out(coco: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("../b/images/x.png", "/etc/hostname")):
        shutil.copytree(coco, tmp_path / f"{number}" / "a")
        shutil.copytree(coco, tmp_path / f"{number}" / "b")
        shutil.copy(
            next((coco / "images").iterdir()), tmp_path / f"{number}" / "b" / "images" / "x.png"
        )
        content = exports.content_of(coco)
        content["images"][0]["file_name"] = name
        (tmp_path / f"{number}" / "a" / "annotations" / "instances.json").write_text(
            json.dumps(content)
        )
        sources = [read_data_set(tmp_path / f"{number}" / part, "train") for part in "ab"]
        lines: list[str] = []
        open_source([str(tmp_path / f"{number}" / part) for part in "ab"], "train", shapes_images=0,
                    shapes_seed=0, report=lines.append)  # fmt: skip
        assert [line.partition(" (")[0] for line in lines] == [
            "data: 1 image with a file_name that leads out of their folder"
        ]
        assert len(join(sources)) == 2 * IMAGES


def test_a_group_stays_together(coco: Path) -> None:
    pattern = r"(clip \d)"
    _, (train, val) = training([coco], val_group=pattern, val_fraction=0.3)
    parted = [{re.findall(pattern, name)[0] for name in names} for names in (train, val)]
    assert parted[0] | parted[1] == {f"clip {i}" for i in range(4)}
    assert not parted[0] & parted[1]
    assert len(val) == 2
    with pytest.raises(DataError, match=r"data\.val_group=frame: matches no file, such as clip"):
        training([coco], val_group="frame")
    with pytest.raises(DataError, match=r"too few images \(8 in 1 groups of data\.val_group\)"):
        training([coco], val_group="clip")


def test_files_without_a_match_are_told(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, (train, val) = training([coco], val_group=r"clip 1|clip 2 für (00)")
    assert len(train) + len(val) == IMAGES
    assert (
        "data.val_group=clip 1|clip 2 für (00) does not match 4 files, such as clip" in caplog.text
    )


def named(files: list[str], categories: list[tuple[int, str]], objects: list[int]) -> CocoSource:
    """A set in memory, with an object of each of the categories in its first image."""
    images = [
        {"id": i, "file_name": name, "height": 9, "width": 9} for i, name in enumerate(files, 1)
    ]
    annotations = [
        {"id": i, "image_id": 1, "category_id": categories[number % len(categories)][0]}
        for i, number in enumerate(objects, 1)
    ]
    listed = [{"id": id_, "name": name} for id_, name in categories]
    return CocoSource(
        Path("/nowhere"), {"images": images, "annotations": annotations, "categories": listed}
    )


SETS = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abcde")), min_size=1, max_size=4,
                 unique_by=(lambda c: c[0], lambda c: c[1])),
        st.lists(st.integers(0, 9), max_size=6),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


@given(SETS)
def test_joining_adds_counts(sets: list[tuple[int, list[tuple[int, str]], list[int]]]) -> None:
    sources = [
        named([f"{i}.png" for i in range(n)], classes, objects) for n, classes, objects in sets
    ]
    joined = join(sources)
    assert len(joined) == sum(map(len, sources))
    assert len({joined.info(index).id for index in range(len(joined))}) == len(joined)

    def counts(source: CocoSource) -> Counter[str]:
        names = {c.id: c.name for c in source.categories}
        return Counter(
            names[a["category_id"]] for i in range(len(source)) for a in source.annotations(i)
        )

    assert counts(joined) == sum(map(counts, sources), Counter())
    assert {c.name for c in joined.categories} == {c.name for s in sources for c in s.categories}


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(0, 99), st.floats(0.01, 0.99)
)
def test_the_share_never_parts_a_group(clips: list[int], seed: int, share: float) -> None:
    source = named([f"clip{clip}/{i}.png" for i, clip in enumerate(clips)], [(1, "a")], [])
    config = DataConfig(val_fraction=share, val_group=r"clip(\d)")
    if len(set(clips)) == 1:
        with pytest.raises(DataError, match="too few images"):
            _set_aside(source, config, seed, "d")
        return
    if round(len(clips) * share) == len(clips):  # all of them are asked for
        return
    train, val = _set_aside(source, config, seed, "d")
    assert sorted(train + val) == list(range(len(clips)))
    assert not {clips[i] for i in train} & {clips[i] for i in val}
    most = max(1, round(len(clips) * share))
    assert len(val) <= max(most, min(Counter(clips).values()))


def test_the_setting_is_a_regular_expression() -> None:
    with pytest.raises(ValueError, match="regular expression"):
        DataConfig(val_group="(")
