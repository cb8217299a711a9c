"""Bundles: folders with everything that running a model takes, described by a manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comask.config import ModelConfig, PreprocessConfig
from comask.config_reading import from_dict
from comask.data.source import Category
from comask.errors import BundleError, ConfigError
from comask.files import did_you_mean, locked, parse_json, write_whole

__all__ = ["SCHEMA_VERSION", "Bundle", "Category", "Manifest"]

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
BEST = "checkpoint-best.pt"  # the file of a training run that is exported to a bundle
UNFINISHED = ".unfinished"  # suffix of the folders that results are prepared in
WEIGHTS = "weights.safetensors"
PRECISIONS = ("fp32", "fp16", "int8")  # a bundle always has fp32 graphs, as the reference
INT8_BASE = "fp16"  # int8 graphs are made from these: the precision of the layers that stay float
STAGES = {"stage1": "stage1_proposals", "stage2": "stage2_roi_head"}
DEFAULT_THRESHOLD = 0.5  # the score threshold of a class for which no better one was measured


def graph_file(stage: str, precision: str) -> str:
    """Returns a stage's ONNX file: `stage1_proposals.onnx`, `….fp16.onnx` or `….int8.onnx`."""
    return STAGES[stage] + ("" if precision == "fp32" else f".{precision}") + ".onnx"


@dataclass(frozen=True, kw_only=True)
class ScoreThresholds:
    """The scores from which a bundle's detections are best kept, as `comask eval` measured them.

    Attributes:
        classes: by class name, the threshold of the largest F1 of masks at IoU 0.5, in 0..1; classes
            without objects or without a right detection are missing.
        backend: the name of the backend that was measured.
        data: the data set, as the user named it.
        images: the number of images.
    """

    classes: dict[str, float]
    backend: str
    data: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a bundle's content.

    Attributes:
        model: the network's configuration; the graphs have its thresholds.
        preprocess: the steps from an image to the first graph's input.
        categories: the classes in label order.
        mask_threshold: a pixel belongs to a mask when its probability is at least this.
        precisions: the precisions that the bundle has graphs for, `fp32` first.
        graphs: the `inputs` and `outputs` of each stage in fp32, each with name, dtype and shape; a
            dynamic dimension is a string. In fp16 and int8, `p2`…`p5` are float16.
        files: the SHA-256 of every other file of the bundle, by relative path.
        source: the origin of the weights: the checkpoint's SHA-256 and optimiser step.
        parity: the latest measurement of each backend and data set: AP, differences to PyTorch, time.
        verification: by precision, the comparison of its graphs with PyTorch before release. For fp16
            and int8 it also says which layers stayed float and why; for int8, the calibration and the AP.
        latency: the latest measurement of each backend, device and batch: the median seconds of each
            part, the machine, the images and the time. None until measured.
        thresholds: the best score threshold of each class. None until measured.
        comask_version: the version of comask that wrote the bundle.
        created: the time of the export, ISO 8601 in UTC.
        schema_version: the version of the manifest's format.
    """

    model: ModelConfig
    preprocess: PreprocessConfig
    categories: tuple[Category, ...]
    mask_threshold: float = 0.5
    precisions: tuple[str, ...] = ("fp32",)
    graphs: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    parity: list[dict[str, Any]] = field(default_factory=list)
    verification: dict[str, dict[str, Any]] = field(default_factory=dict)
    latency: dict[str, dict[str, Any]] | None = None
    thresholds: ScoreThresholds | None = None
    comask_version: str
    created: str
    schema_version: int = SCHEMA_VERSION

    def require_int64_ids(self, where: str) -> None:
        """Raises an error if a category id is not a 64-bit integer, for formats that store no others.

        Args:
            where: the end of the error's sentence: the format, and an alternative that takes any id.

        Raises:
            BundleError: with the first such id.
        """
        for id_ in (category.id for category in self.categories):
            if not isinstance(id_, int) or not -(2**63) <= id_ < 2**63:
                raise BundleError(
                    f"the bundle has the category id {id_!r}; expected 64-bit integers for {where}"
                )

    def score_thresholds(self) -> tuple[float, ...]:
        """Returns the score threshold of each label, in 0..1.

        A class for which `comask eval` measured none has `DEFAULT_THRESHOLD`, which is 0.5.

        Raises:
            BundleError: when none was measured for any class.
        """
        if self.thresholds is None:
            raise BundleError(
                "the bundle has no score thresholds of its classes; comask eval BUNDLE --data DATA "
                "measures and records them, or give one number for all classes"
            )
        measured = self.thresholds.classes
        return tuple(measured.get(c.name, DEFAULT_THRESHOLD) for c in self.categories)

    def to_json(self) -> str:
        """Returns the text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            BundleError: when the text is not a manifest that this version of comask reads.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise BundleError(f"is not a comask manifest: it is not JSON: {error}") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version is None:
            raise BundleError(
                "is not a comask manifest: expected a JSON object with schema_version"
            )
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"has manifest schema {version!r}, this comask reads {SCHEMA_VERSION}: "
                f"install the comask that wrote it ({values.get('comask_version')}) or export "
                f"the checkpoint again"
            )
        try:
            manifest = from_dict(cls, values)
        except ConfigError as error:
            raise BundleError(f"is not a comask manifest: {error}") from error
        if len(manifest.categories) != manifest.model.num_classes:
            raise BundleError(
                f"has {len(manifest.categories)} categories for "
                f"{manifest.model.num_classes} classes"
            )
        for name in manifest.files:
            if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
                raise BundleError(f"lists {name!r:.80}, which cannot be a file of the bundle")
        return manifest


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        folder: the bundle's folder.
        manifest: the description of its content.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Opens a bundle by its manifest; `file` checks the other files.

        Raises:
            BundleError: when the manifest is missing or cannot be used.
        """
        path = folder / MANIFEST
        try:
            text = _inside(folder, MANIFEST).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleError(f"{folder}: no bundle here{_instead(folder)}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: cannot be read: {error}") from error
        try:
            return cls(folder, Manifest.from_json(text))
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error

    def file(self, name: str) -> Path:
        """Returns the path of a file of the bundle after comparing its SHA-256 with the manifest's.

        Raises:
            BundleError: when the file is not listed, missing or altered.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.folder}: has no {name}; it holds {', '.join(sorted(self.manifest.files))}"
            )
        path = self.folder / name
        try:
            actual = sha256(_inside(self.folder, name))
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
        expected = self.manifest.files[name]
        if actual != expected:
            raise BundleError(
                f"{path}: was altered since the export (sha256 {actual[:12]}…, the manifest says "
                f"{expected[:12]}…); export the bundle again"
            )
        return path

    def graph(self, stage: str, precision: str) -> Path:
        """Returns the ONNX file of `stage1` or `stage2`, checked by `file`.

        Raises:
            BundleError: when `file` raises one.
        """
        return self.file(graph_file(stage, precision))


def _instead(folder: Path) -> str:
    """Says what is at `folder` instead of a bundle, and what to do about it."""
    if folder.is_file():
        remedy = (
            f"; comask export {folder} --output bundle makes one" if folder.suffix == ".pt" else ""
        )
        return f": it is a file, and a bundle is a folder{remedy}"
    if not folder.exists():
        return f": no such folder{did_you_mean(folder)}"
    if (folder / BEST).is_file():
        return f": it is a training run; comask export {folder / BEST} --output bundle makes one"
    return f" ({MANIFEST} is missing); comask export writes one"


def _inside(folder: Path, name: str) -> Path:
    """Returns the path of a file of a bundle, whose origin need not be trustworthy.

    Raises:
        BundleError: when the file is a link that leads out of the folder, or not a regular file, such as
            a pipe that might never end.
        OSError: when the file is missing.
    """
    path = folder / name
    if not path.resolve(strict=True).is_relative_to(folder.resolve()):
        raise BundleError(f"{path}: is a link out of the bundle; put the file itself there")
    if not path.is_file():
        raise BundleError(f"{path}: is not a file")
    return path


@contextlib.contextmanager
def scratch_folder(bundle: Path, parent: Path) -> Iterator[Path]:
    """Makes a folder in `parent` and removes it afterwards, unless it was renamed; errors name `bundle`.

    Folders that killed processes left behind are removed first. Running processes hold a lock on theirs.

    Raises:
        BundleError: when the folder cannot be made.
    """
    prefix = f".{bundle.name}."
    with contextlib.ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            # Under this lock, no other process sees the new folder before it is locked.
            with locked(parent):
                for left in parent.glob(f"{glob.escape(prefix)}*{UNFINISHED}"):
                    with contextlib.suppress(OSError), locked(left, patience=0) as abandoned:
                        if abandoned:  # False without locks, when the folder may still be in use
                            shutil.rmtree(left, ignore_errors=True)
                folder = Path(tempfile.mkdtemp(UNFINISHED, prefix, parent))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                stack.enter_context(locked(folder))
        except OSError as error:
            raise BundleError(f"{bundle}: cannot be written: {error.strerror or error}") from error
        yield folder


def extend(bundle: Bundle, files: Path, change: Callable[[Manifest], Manifest]) -> Bundle:
    """Moves the files of a folder into a bundle, then changes the manifest so that it names them.

    Args:
        bundle: the bundle to extend.
        files: a folder on the same file system.
        change: changes the manifest, as for `update_manifest`.
    """
    # Nobody reads the files until the manifest names them.
    for path in files.iterdir():
        path.replace(bundle.folder / path.name)
    return update_manifest(bundle.folder, change)


def update_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> Bundle:
    """Changes the manifest on disk, which may have changed since the caller read it.

    Args:
        folder: the bundle's folder.
        change: maps the current manifest to the new one; called under a lock.

    Raises:
        BundleError: when the bundle does not exist any more.
        OSError: when the manifest cannot be written.
    """
    with locked(folder):
        changed = change(Bundle.open(folder).manifest)
        write_manifest(folder, changed)
    return Bundle(folder, changed)


def with_graphs(
    manifest: Manifest, files: dict[str, str], verification: dict[str, dict[str, Any]]
) -> Manifest:
    """Returns the manifest with further or replaced graphs.

    Args:
        manifest: the present manifest.
        files: the SHA-256 of each graph, by file name.
        verification: by precision, how the graphs were made and compared.
    """
    return dataclasses.replace(
        manifest,
        precisions=tuple(p for p in PRECISIONS if p in {*manifest.precisions, *verification}),
        files=manifest.files | files,
        verification=manifest.verification | verification,
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces the manifest of a bundle atomically."""
    write_whole(folder / MANIFEST, manifest.to_json().encode())


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
