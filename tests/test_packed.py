"""Data sets in arrays: what goes in comes out, from memory and from a file that processes share."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

from data_sets import Content, shapes_set
from hypothesis import given
from hypothesis import strategies as st

from comask.data.layouts import read_data_set
from comask.data.packed import PackedSource, Records, open_arrays, write_arrays
from comask.data.source import InstanceSource

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(leaves, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=8)


def reopened(value: Any) -> Any:
    """What another process gets of it. Its files are gone, but not its memory."""
    folder = write_arrays(value)
    try:
        return open_arrays(folder)
    finally:
        shutil.rmtree(folder)


@given(st.lists(values, max_size=6))
def test_records_come_out_as_they_went_in(expected: list[Any]) -> None:
    records = Records(iter(expected))
    assert [records[i] for i in range(len(records))] == expected
    if expected:  # an empty file cannot be mapped; a data set has at least one image
        opened = reopened(records)
        assert [opened[i] for i in range(len(opened))] == expected


def test_what_comes_out_is_a_copy() -> None:
    records = Records([{"bbox": [1, 2, 3, 4]}])
    records[0]["bbox"].clear()
    assert records[0] == {"bbox": [1, 2, 3, 4]}


def whole(source: InstanceSource) -> list[Any]:
    return [
        (source.info(i), source.annotations(i), source.image(i).tolist())
        for i in range(len(source))
    ]


def odd_ids(content: Content) -> None:
    content["categories"].append({"id": "none", "name": "nothing"})
    for annotation in content["annotations"][::2]:
        annotation["iscrowd"] = 1


def test_a_packed_source_is_the_source(tmp_path: Path) -> None:
    plain = read_data_set(shapes_set(tmp_path / "set", odd_ids), "train")
    packed = PackedSource.of(plain, plain.images)
    opened = reopened(packed)
    counted: dict[Any, int] = {}
    for index in range(len(plain)):
        for annotation in plain.annotations(index):
            if not annotation["iscrowd"]:
                id_ = annotation["category_id"]
                counted[id_] = counted.get(id_, 0) + 1
    for source in (packed, opened):
        assert whole(source) == whole(plain)
        assert source.categories == plain.categories
        assert source.objects == counted
        assert [source.path(i) for i in range(4)] == [plain.path(i) for i in range(4)]
        some = source.with_categories(plain.categories[:8])
        assert some.categories == plain.categories[:8]
        assert whole(some) == whole(plain)


def _last(source: PackedSource, queue: Any) -> None:
    queue.put(source.annotations(len(source) - 1))


def test_another_process_reads_the_same(tmp_path: Path) -> None:
    plain = read_data_set(shapes_set(tmp_path / "set"), "train")
    opened = reopened(PackedSource.of(plain, plain.images))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_last, args=(opened, queue))
    process.start()
    assert queue.get(timeout=60) == plain.annotations(3)
    process.join()
