"""`Job`: a folder that describes the work to do, and holds one part for each finished shard."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal

from comask import __version__
from comask.bundle import STAGES, WEIGHTS, Bundle, graph_file
from comask.errors import JobError, one_line
from comask.files import parse_json
from comask.runtime.backends.names import graph_precision, parse_backend
from comask.runtime.jobs.folder import Folder
from comask.runtime.jobs.listing import Listing

if TYPE_CHECKING:
    from comask.structures import Detections

Format = Literal["parquet", "jsonl"]
FORMATS = ("parquet", "jsonl")  # the values of `Format`
Row = dict[str, Any]

TERMS, INPUTS, SUMMARY, FAILURES = "job.json", "inputs.jsonl", "summary.json", "failures.jsonl"
PARTS, DONE = "parts", "done"
PLAIN = frozenset({"detections.json", "images.json"})  # the results of `comask infer`


def found_row(address: str, detections: Detections) -> Row:
    """Returns the row of an image that was run.

    Its `detections` are COCO results with the category's name as `category` instead of `image_id`.
    """
    entries = detections.to_coco(0)
    for entry, label in zip(entries, detections.labels.tolist(), strict=True):
        del entry["image_id"]
        entry["category"] = detections.name(label)
    height, width = detections.image_size
    return _row(address, width, height, None, entries)


def failed_row(address: str, error: str) -> Row:
    """Returns the row of an image that could not be run: `error` says why, `detections` is None."""
    return _row(address, None, None, one_line(error), None)


def encoded(rows: list[Row], form: Format) -> bytes:
    """Returns the content of a file that holds the rows. Parquet needs pyarrow."""
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows, schema=_schema())
    pyarrow.parquet.write_table(table, file, compression="zstd")
    return file.getvalue()


def _row(
    address: str,
    width: int | None,
    height: int | None,
    error: str | None,
    entries: list[Any] | None,
) -> Row:
    return {
        "file": _text(address),
        "width": width,
        "height": height,
        "error": error,
        "detections": entries,
    }


def _text(text: str) -> str:
    """Returns `text` with escapes for what UTF-8 cannot encode, since file names may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _schema() -> Any:
    from pyarrow import field, float64, int32, int64, list_, schema, string, struct

    mask = struct([field("size", list_(int32())), field("counts", string())])
    detection = struct(
        [
            field("category_id", int64()),
            field("category", string()),
            field("bbox", list_(float64())),  # x, y, w, h in pixels
            field("score", float64()),
            field("segmentation", mask),
        ]
    )
    return schema(
        [
            field("file", string(), nullable=False),
            field("width", int32()),
            field("height", int32()),
            field("error", string()),
            field("detections", list_(detection)),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Everything that determines a job's results, except rounding, which depends on batch and device.

    Attributes:
        images: the number of images.
        inputs: the listing's SHA-256.
        bundle: the bundle's digest, see `bundle_digest`.
        backend: the backend's name with its precision.
        proposals: the number of proposals, see `Predictor.load`.
        short_side: the length of the short side, see `Predictor.load`.
        tile: side of the tiles, see `LoadOptions.views`.
        tile_overlap: the share of a tile that the next one has, too.
        tta: augmented views.
        shard: images per part.
        format: the file format of the parts.
        comask: comask's version.
    """

    images: int
    inputs: str
    bundle: str
    backend: str
    proposals: int | None
    short_side: int | None
    tile: int | None = None
    tile_overlap: float | None = None
    tta: str | None = None
    shard: int
    format: Format
    comask: str = __version__

    @property
    def id(self) -> str:
        """Job id: the first 16 hex digits of the SHA-256 of its terms."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:16]


def full_name(backend: str) -> str:
    """Returns a backend's name with its precision, see `parse_backend`."""
    return ":".join(parse_backend(backend))


def bundle_digest(bundle: Path, backend: str) -> str:
    """Returns a digest that is equal for bundles that give the same results on a backend.

    Measurements and engines do not change it.

    Raises:
        BundleError: the folder holds no bundle.
    """
    manifest = Bundle.open(bundle).manifest
    precision = graph_precision(*parse_backend(backend))
    names = {WEIGHTS, *(graph_file(stage, precision) for stage in STAGES)}
    same = {
        "model": dataclasses.asdict(manifest.model),
        "preprocess": dataclasses.asdict(manifest.preprocess),
        "categories": [dataclasses.asdict(category) for category in manifest.categories],
        "mask_threshold": manifest.mask_threshold,
        "files": {name: manifest.files[name] for name in sorted(names & manifest.files.keys())},
    }
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Record:
    """A note about a finished part, written after the part itself.

    Attributes:
        job: the job's id.
        shard: the shard's number, from 0.
        bytes: the part's size.
        images: the number of rows in the part.
        detections: the number of detections in all rows.
        failures: `file` and `error` of each image that could not be run.
    """

    job: str
    shard: int
    bytes: int
    images: int
    detections: int
    failures: list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Job:
    """A job in its folder.

    Attributes:
        folder: the job's folder.
        terms: everything that determines the job's results.
    """

    folder: Folder
    terms: Terms

    @classmethod
    def terms_in(cls, folder: Folder) -> Terms | None:
        """Returns the terms of the job in a folder; None if the folder holds no job yet.

        Raises:
            JobError: the folder holds something other than a job of this comask.
        """
        if not folder.exists(TERMS):
            if folder.sizes(PARTS) or folder.sizes(DONE):
                raise JobError(
                    f"{folder.address}: holds parts but no {TERMS}: name another --output"
                )
            if plain := sorted(PLAIN & folder.sizes("").keys()):
                raise JobError(
                    f"{folder.address}: holds {plain[0]} of 'comask infer': name another --output"
                )
            return None
        try:
            return Terms(**parse_json(folder.read(TERMS)))
        except (TypeError, ValueError) as error:
            raise JobError(
                f"{folder.address}: its {TERMS} was not written by this version of comask: name another "
                f"--output"
            ) from error

    @classmethod
    def begin(cls, folder: Folder, terms: Terms, listing: Listing) -> Job:
        """Returns the job of these terms in a folder; begins it if the folder holds no job yet.

        Raises:
            JobError: the folder holds another job.
        """
        there = cls.terms_in(folder)
        if there is None:
            folder.put(INPUTS, listing.file)
            folder.write(TERMS, _json(dataclasses.asdict(terms)))  # This file makes it a job.
        elif there != terms:
            raise JobError(_difference(folder, there, terms))
        elif folder.sizes("").get(INPUTS) != listing.offsets[-1]:  # truncated or lost since then
            folder.put(INPUTS, listing.file)
        return cls(folder, terms)

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.terms.images // self.terms.shard)

    def images_in(self, shard: int) -> int:
        """Returns the number of images in a shard."""
        return min(self.terms.shard, self.terms.images - shard * self.terms.shard)

    def run(self, shard: int, start: int, end: int, work: Callable[[list[str]], list[Row]]) -> None:
        """Runs a shard. Two processes may run the same shard: both write the same part.

        Args:
            shard: the shard's number.
            start: the shard's first byte in the listing.
            end: the byte after the shard's last one in the listing.
            work: returns a row for each image.

        Raises:
            JobError: the folder now belongs to another job, or its listing is damaged.
        """
        # Another job may have begun at the same moment.
        if self.terms_in(self.folder) != self.terms:
            raise JobError(f"{self.folder.address}: holds another job now: name another --output")
        lines = self.folder.read(INPUTS, start, end).splitlines()
        if len(lines) != self.images_in(shard):
            raise JobError(f"{self.folder.address}: its {INPUTS} is damaged")
        rows = work([json.loads(line) for line in lines])
        content = encoded(rows, self.terms.format)
        record = Record(
            self.terms.id,
            shard,
            len(content),
            len(rows),
            sum(len(row["detections"] or ()) for row in rows),
            [{"file": row["file"], "error": row["error"]} for row in rows if row["error"]],
        )
        self.folder.write(f"{PARTS}/{self._part(shard)}", content)
        self.folder.write(f"{DONE}/{_done(shard)}", _json(dataclasses.asdict(record)))

    def done(self) -> Iterator[Record]:
        """Yields the records of the parts that exist and are complete, in order."""
        sizes, there = self.folder.sizes(PARTS), self.folder.sizes(DONE)
        names = [f"{DONE}/{name}" for name in sorted(there) if name.endswith(".json")]
        for content in self.folder.read_each(names):
            try:
                record = Record(**parse_json(content))
            except (TypeError, ValueError):
                continue  # Some storage leaves truncated files behind.
            if record.job == self.terms.id and sizes.get(self._part(record.shard)) == record.bytes:
                yield record

    def finish(self) -> dict[str, Any]:
        """Writes `failures.jsonl` and `summary.json`, and removes the remains of interrupted writes.

        Returns:
            The summary.

        Raises:
            JobError: a part was removed or overwritten after it was finished.
        """
        summary = {"failed": 0, "detections": 0, "parts": 0}
        with TemporaryFile() as failures:
            for record in self.done():
                summary["failed"] += len(record.failures)
                summary["detections"] += record.detections
                summary["parts"] += 1
                for failure in record.failures:
                    failures.write(json.dumps(failure, ensure_ascii=False).encode() + b"\n")
            if summary["parts"] != self.shards:
                raise JobError(
                    f"{self.folder.address}: only {summary['parts']} of {self.shards} parts are still "
                    f"there; another command may be changing the folder: run the same command again"
                )
            self.folder.put(FAILURES, failures)
        whole = {**dataclasses.asdict(self.terms), **summary}
        self.folder.write(SUMMARY, _json(whole))
        for name in ("", PARTS, DONE):
            self.folder.sweep(name)
        return whole

    def summary(self) -> dict[str, Any] | None:
        """Returns the summary of a finished job; None if the job is not finished."""
        if not self.folder.exists(SUMMARY):
            return None
        try:
            summary: dict[str, Any] = parse_json(self.folder.read(SUMMARY))
        except ValueError:
            return None  # truncated, see `done`
        return summary

    def _part(self, shard: int) -> str:
        return f"part-{shard:07d}.{self.terms.format}"


def _done(shard: int) -> str:
    return f"part-{shard:07d}.json"


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _difference(folder: Folder, there: Terms, here: Terms) -> str:
    differing = []
    if (there.images, there.inputs) != (here.images, here.inputs):
        differing.append(f"other images, {there.images} there, {here.images} here")
    if there.bundle != here.bundle:
        differing.append("another network, preprocessing or classes in the bundle")
    knobs = "proposals", "short_side", "tile", "tile_overlap", "tta"
    for name in ("backend", *knobs, "shard", "format"):
        values = [getattr(terms, name) or "not given" for terms in (there, here)]
        if values[0] != values[1]:
            option = name.replace("_", "-")
            differing.append(f"--{option} {values[0]} there, {values[1]} here")
    if there.comask != here.comask:
        differing.append(f"comask {there.comask} there, {here.comask} here")
    fix = "name another --output"
    if not folder.sizes(DONE):
        fix += ", or remove the folder, in which nothing is done yet"
    if there.inputs != here.inputs:
        fix += f", or continue with its own listing, @{folder.address}/{INPUTS}, as the input"
    return f"{folder.address}: holds another job ({'; '.join(differing)}): {fix}"
