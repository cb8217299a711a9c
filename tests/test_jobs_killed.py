"""Jobs: whatever was killed, removed or cut, each image is in the results once."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from job_rows import rows_in

from comask.errors import ComaskError, FleetError, JobError
from comask.runtime.backends import LoadOptions
from comask.runtime.jobs.folder import Folder
from comask.runtime.jobs.job import FORMATS, Job, Row, Terms, encoded, failed_row
from comask.runtime.jobs.listing import addresses, write_listing
from comask.runtime.jobs.runners import Outcome, Shard, attempt, run_all
from comask.runtime.jobs.worker import Model

fsspec = pytest.importorskip("fsspec", reason="jobs need comask[jobs]")
pytest.importorskip("pyarrow", reason="Parquet needs comask[jobs]")
NO_MODEL = Model("", "torch", LoadOptions())


def job_of(
    folder: Folder, images: list[str], shard: int, form: Any, scratch: Path
) -> tuple[Job, list[Shard]]:
    """A job over a list of images, begun or continued, with all its shards."""
    (scratch / "list.txt").write_text("".join(f"/{name}\n" for name in images))
    with TemporaryFile() as file:
        listing = write_listing([f"@{scratch / 'list.txt'}"], file, shard)
        terms = Terms(
            images=listing.images, inputs=listing.sha256, bundle="b", backend="torch:fp32",
            proposals=None, short_side=None, shard=shard, format=form,
        )  # fmt: skip
        job = Job.begin(folder, terms, listing)
    return job, [Shard(i, *listing.offsets[i : i + 2]) for i in range(job.shards)]


def pretended(images: list[str]) -> list[Row]:
    """Rows as a worker might give them."""
    return [failed_row(name, f"{name}: is odd") for name in images]


class Pretender:
    """A runner without a network that fails now and then."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def backend(self, model: Model) -> str:
        return "torch"

    def run(self, job: Job, model: Model, shards: list[Shard]) -> Iterator[Outcome]:
        for shard in self._chance.sample(shards, len(shards)):
            fate = self._chance.random()
            if fate < 0.2:
                yield Outcome(shard.number, "no network")
            elif fate > 0.3:  # else it is lost without a word
                yield Outcome(shard.number, attempt(job, shard, pretended))


class Stubborn(Pretender):
    def run(self, job: Job, model: Model, shards: list[Shard]) -> Iterator[Outcome]:
        while True:
            yield Outcome(shards[0].number, "no network")


def damage(folder: Folder, chance: random.Random) -> None:
    """What a kill, a full disk or a hand might do to the parts, the records and the listing."""
    fs, root = folder._place
    if chance.random() < 0.3:
        fs.pipe_file(f"{root}/inputs.jsonl", fs.cat_file(f"{root}/inputs.jsonl")[:-3])
    for place in ("parts", "done"):
        for name in folder.sizes(place):
            path = f"{root}/{place}/{name}"
            match chance.randrange(5):
                case 0:
                    fs.rm_file(path)
                case 1:
                    content = fs.cat_file(path)
                    fs.pipe_file(path, content[: chance.randrange(len(content))])
        if folder.local and Path(root, place).is_dir():
            (Path(root) / place / f".part.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    if folder.local:
        (Path(root) / f".inputs.jsonl.{uuid.uuid4().hex}.tmp").write_bytes(b"half")


@pytest.mark.parametrize("place", ["disk", "memory"])
@settings(max_examples=20)
@given(
    count=st.integers(1, 60),
    shard=st.integers(1, 20),
    form=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32),
)
def test_killed_and_damaged_jobs_end_with_each_image_once(
    tmp_path_factory: pytest.TempPathFactory,
    place: str,
    count: int,
    shard: int,
    form: str,
    seed: int,
) -> None:
    chance = random.Random(seed)
    scratch = tmp_path_factory.mktemp("job")
    folder = Folder(str(scratch / "out") if place == "disk" else f"memory://{uuid.uuid4()}")
    images = [f"{i}.jpg" for i in range(count)]
    for _ in range(chance.randrange(3)):  # kills
        job, shards = job_of(folder, images, shard, form, scratch)
        for some in shards[: chance.randrange(len(shards) + 1)]:
            job.run(*some, pretended)
        damage(folder, chance)
    job, shards = job_of(folder, images, shard, form, scratch)
    done = {record.shard for record in job.done()}
    for _ in range(50):  # a runner that fails may need several commands
        try:
            left = [s for s in shards if s.number not in done]
            run_all(job, NO_MODEL, left, Pretender(chance), lambda images: None)
            break
        except FleetError:
            done = {record.shard for record in job.done()}
    summary = job.finish()
    rows = rows_in(folder)
    assert sorted(row["file"] for row in rows) == sorted(f"/{name}" for name in images)
    assert (summary["images"], summary["failed"], summary["parts"]) == (count, count, job.shards)
    failures = folder.read("failures.jsonl").splitlines()
    assert [json.loads(line)["file"] for line in failures] == [row["file"] for row in rows]
    assert set(folder.sizes("parts")) == {f"part-{i:07d}.{form}" for i in range(job.shards)}
    assert not list(scratch.glob("out/**/.*"))
    shutil.rmtree(scratch)


def test_a_job_that_became_another_one_or_lost_a_part_is_not_finished(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "out"))
    job, shards = job_of(folder, ["a.jpg", "b.jpg"], 1, "jsonl", tmp_path)
    terms = folder.read("job.json")
    for shard in shards:
        job.run(*shard, pretended)
    folder.write("parts/part-0000001.jsonl", b"")
    with pytest.raises(JobError, match="only 1 of 2 parts are still there"):
        job.finish()
    assert job.summary() is None
    folder.write("inputs.jsonl", b"")  # begun by two commands at the same moment
    with pytest.raises(JobError, match="damaged"):
        job.run(*shards[0], pretended)
    folder.write("job.json", terms.replace(b'"shard": 1', b'"shard": 2'))
    with pytest.raises(JobError, match="holds another job now"):
        job.run(*shards[0], pretended)


def test_failures_and_parts_are_lists_too(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "out"))
    job, shards = job_of(folder, ["a.jpg", "b c.jpg"], 2, "jsonl", tmp_path)
    job.run(*shards[0], pretended)
    job.finish()
    for name in ("failures.jsonl", "parts/part-0000000.jsonl", "inputs.jsonl"):
        assert list(addresses(f"@{tmp_path}/out/{name}")) == ["/a.jpg", "/b c.jpg"]
    (tmp_path / "windows.txt").write_bytes("\ufeff/ä.jpg\r\n\r\n/b.jpg\r\n".encode())
    assert list(addresses(f"@{tmp_path}/windows.txt")) == ["/ä.jpg", "/b.jpg"]


def test_a_fault_that_stays_ends_the_job_in_one_line(tmp_path: Path) -> None:
    job, shards = job_of(Folder(str(tmp_path / "out")), ["a.jpg", "b.jpg"], 1, "jsonl", tmp_path)
    with pytest.raises(FleetError, match="2 of 2 parts cannot be written: no network"):
        run_all(job, NO_MODEL, shards, Stubborn(random.Random()), lambda images: None)


def test_parts_without_their_job_and_a_spoilt_job_are_refused(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "out"))
    folder.write("parts/part-0000000.jsonl", b"{}\n")
    with pytest.raises(JobError, match=r"holds parts but no job\.json"):
        job_of(folder, ["a.jpg"], 1, "jsonl", tmp_path)
    folder.write("job.json", b"{}")
    with pytest.raises(JobError, match="was not written by this version"):
        job_of(folder, ["a.jpg"], 1, "jsonl", tmp_path)


@given(
    names=st.lists(
        st.binary(min_size=1, max_size=8).filter(lambda name: not set(name) & set(b"\0/")),
        unique=True, max_size=12,
    ),
    shard=st.integers(1, 5),
)  # fmt: skip
@example(names=[b"._a"], shard=1)
@example(names=[b"."], shard=1)  # "..jpg" is a JPEG to pathlib, and has no suffix to os.path
def test_any_file_name_is_listed_once_and_found_again(
    tmp_path_factory: pytest.TempPathFactory, names: list[bytes], shard: int
) -> None:
    folder = tmp_path_factory.mktemp("names")
    expected = [os.path.join(folder, os.fsdecode(name) + ".jpg") for name in [b"one", *names]]
    for path in expected:
        Path(path).touch()
    (folder / "notes.txt").touch()
    file = folder.parent / f"{folder.name}.jsonl"
    inputs = [str(folder), expected[0], f"file://{expected[0]}", str(folder)]
    with file.open("wb") as output:
        listing = write_listing(inputs, output, shard)
    content = file.read_bytes()
    shards = [
        content[listing.offsets[i] : listing.offsets[i + 1]].splitlines()
        for i in range(len(listing.offsets) - 1)
    ]
    assert {len(lines) for lines in shards[:-1]} <= {shard}
    # from Python 3.14 on pathlib agrees with os.path about "..jpg"; "._.jpg" is macOS's
    expected = sorted(
        path
        for path in expected
        if Path(path).suffix == ".jpg" and not Path(path).name.startswith("._")
    )
    assert sorted(json.loads(line) for lines in shards for line in lines) == expected
    assert sorted(addresses(f"@{file}")) == expected
    for form in FORMATS:  # whatever the name is, it can be written
        encoded([failed_row(path, path) for path in expected], form)


def test_inputs_that_name_nothing_or_videos_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    fsspec.filesystem("memory").pipe_file("/refused/notes.txt", b"")
    for text, words in [
        (str(tmp_path), "no image lies directly in it"),
        (str(tmp_path / "*.jpg"), "no file matches"),
        (f"@{tmp_path}/empty.txt", "names no image"),
        (f"@{tmp_path}/none.txt", "no such list"),
        (f"@{tmp_path}/wrong.jsonl", "line 1: expected a JSON string"),
        ("memory://refused", "no image lies directly in it"),
        ("memory://refused/none.jpg", "no such file"),
        ("memory://refused/*.jpg", "no file matches"),
        ("zip://*.jpg::memory://a.zip", "chained file systems"),
        ("nowhere://a", "Protocol not known"),
        ("clip.mp4", "'comask job' runs images only"),
        ("rtsp://camera/live", "'comask job' runs images only"),
        ("camera:0", "'comask job' runs images only"),
    ]:
        with pytest.raises(ComaskError, match=words):
            write_listing([text], io.BytesIO(), 1)
