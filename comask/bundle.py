"""The bundle: a folder with everything it takes to run a model, and the manifest that describes it."""

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
from comask.files import locked, parse_json, write_whole

__all__ = ["SCHEMA_VERSION", "Bundle", "Category", "Manifest"]

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
BEST = "checkpoint-best.pt"  # of a training run, what a bundle is made of
UNFINISHED = ".unfinished"  # ends the names of folders that something is made in
WEIGHTS = "weights.safetensors"
PRECISIONS = ("fp32", "fp16", "int8")  # of graphs; fp32 is always there, as the reference
INT8_BASE = "fp16"  # of which int8 graphs are made: what they keep float
STAGES = {"stage1": "stage1_proposals", "stage2": "stage2_roi_head"}


def graph_file(stage: str, precision: str) -> str:
    """The ONNX file of `stage1` or `stage2`: `stage1_proposals.onnx`, `….fp16.onnx`, `….int8.onnx`."""
    return STAGES[stage] + ("" if precision == "fp32" else f".{precision}") + ".onnx"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle is.

    Attributes:
        model: configuration of the network; its thresholds are those of the graphs.
        preprocess: from an image to the first graph's input.
        categories: the classes in label order.
        mask_threshold: a pixel belongs to a mask when its probability is at least this.
        precisions: of the graphs that are there, `fp32` first.
        graphs: per stage the `inputs` and `outputs` in fp32, each with name, dtype and shape; a dynamic
            dimension is a string. In fp16 and int8 `p2`…`p5` are float16.
        files: sha256 of every other file of the bundle by its relative path.
        source: where the weights come from: checkpoint's sha256 and optimiser step.
        parity: measurements, the latest of each backend and data set: AP, deltas to PyTorch, when.
        verification: by precision, how its graphs were compared with PyTorch before release; of fp16 and
            int8 also which layers stayed float and why; of int8, how it was calibrated, and its AP.
        latency: measurements, the latest of each backend, device and batch: median seconds of each part,
            on which machine and images, when; None until measured.
        comask_version: that wrote the bundle.
        created: time of export, ISO 8601 in UTC.
        schema_version: of this manifest.
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
    comask_version: str
    created: str
    schema_version: int = SCHEMA_VERSION

    def require_int64_ids(self, where: str) -> None:
        """Refuses category ids that are no integers of 64 bits, where a format has room for no others.

        Args:
            where: the format, and what takes any ids in its place; the end of a sentence.

        Raises:
            BundleError: naming the first such id.
        """
        for id_ in (category.id for category in self.categories):
            if not isinstance(id_, int) or not -(2**63) <= id_ < 2**63:
                raise BundleError(
                    f"the bundle has the category id {id_!r}; expected integers of 64 bits for {where}"
                )

    def to_json(self) -> str:
        """As the text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of `to_json`.

        Raises:
            BundleError: when the text is no manifest that this comask reads.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise BundleError(f"is not a comask manifest: it is no JSON: {error}") from error
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
                f"names {len(manifest.categories)} categories for "
                f"{manifest.model.num_classes} classes"
            )
        for name in manifest.files:
            if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
                raise BundleError(f"lists {name!r:.80}, which cannot be a file of the bundle")
        return manifest


@dataclass(frozen=True, slots=True)
class Bundle:
    """An existing bundle.

    Attributes:
        folder: where it lies.
        manifest: what it holds.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Reads the manifest; files are checked when they are asked for.

        Raises:
            BundleError: when there is no manifest, or none that can be used.
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
        """The path of a file of the bundle, after comparing its sha256 with the manifest's.

        Raises:
            BundleError: when it is not listed, missing or altered.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.folder}: has no {name}; it holds {', '.join(sorted(self.manifest.files))}"
            )
        path = self.folder / name
        try:
            found = sha256(_inside(self.folder, name))
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
        expected = self.manifest.files[name]
        if found != expected:
            raise BundleError(
                f"{path}: was altered since the export (sha256 {found[:12]}…, the manifest says "
                f"{expected[:12]}…); export the bundle again"
            )
        return path

    def graph(self, stage: str, precision: str) -> Path:
        """The checked ONNX file of `stage1` or `stage2`.

        Raises:
            BundleError: see `file`.
        """
        return self.file(graph_file(stage, precision))


def _instead(folder: Path) -> str:
    """What lies where a bundle was expected, and what to do about it."""
    if folder.is_file():
        mend = (
            f"; comask-export {folder} --output bundle makes one" if folder.suffix == ".pt" else ""
        )
        return f": it is a file, and a bundle is a folder{mend}"
    if not folder.exists():
        return ": no such folder"
    if (folder / BEST).is_file():
        return f": it is a training run; comask-export {folder / BEST} --output bundle makes one"
    return f" ({MANIFEST} is missing); comask-export writes one"


def _inside(folder: Path, name: str) -> Path:
    """The path of a file of a bundle, which may come from anywhere.

    Raises:
        BundleError: it is a link that leads out of the folder, or a pipe, which might never end.
        OSError: it is missing.
    """
    path = folder / name
    if not path.resolve(strict=True).is_relative_to(folder.resolve()):
        raise BundleError(f"{path}: is a link out of the bundle; put the file itself there")
    if not path.is_file():
        raise BundleError(f"{path}: is no file")
    return path


@contextlib.contextmanager
def scratch_folder(bundle: Path, parent: Path) -> Iterator[Path]:
    """A folder in `parent`, gone afterwards unless it was renamed; errors name `bundle`.

    Those that killed processes left are removed: the living hold a lock on theirs.

    Raises:
        BundleError: when it cannot be made.
    """
    prefix = f".{bundle.name}."
    with contextlib.ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent):  # a new folder is not without its lock when others look
                for left in parent.glob(f"{glob.escape(prefix)}*{UNFINISHED}"):
                    with contextlib.suppress(OSError), locked(left, patience=0) as nobodys:
                        if nobodys:  # without locks it may be somebody's
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
        bundle: to extend.
        files: a folder on the same file system.
        change: see `update_manifest`.
    """
    # until the manifest names them, nobody reads the files
    for path in files.iterdir():
        path.replace(bundle.folder / path.name)
    return update_manifest(bundle.folder, change)


def update_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> Bundle:
    """Changes the manifest as it is now, which may not be what the caller read long ago.

    Args:
        folder: of the bundle.
        change: from the manifest that is there to the one to write; called under a lock.

    Raises:
        BundleError: when there is no bundle by now.
        OSError: when it cannot be written.
    """
    with locked(folder):
        changed = change(Bundle.open(folder).manifest)
        write_manifest(folder, changed)
    return Bundle(folder, changed)


def with_graphs(
    manifest: Manifest, files: dict[str, str], verification: dict[str, dict[str, Any]]
) -> Manifest:
    """The manifest of a bundle that holds more graphs, or others.

    Args:
        manifest: as it was.
        files: sha256 of the graphs by file name.
        verification: by precision, how they were made and compared.
    """
    return dataclasses.replace(
        manifest,
        precisions=tuple(p for p in PRECISIONS if p in {*manifest.precisions, *verification}),
        files=manifest.files | files,
        verification=manifest.verification | verification,
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces the manifest of a bundle, whole or not at all."""
    write_whole(folder / MANIFEST, manifest.to_json().encode())


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
