"""Writes a bundle as a model repository of Triton: all three models, or none of them."""

from __future__ import annotations

import dataclasses
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comask import __version__
from comask.bundle import MANIFEST, STAGES, WEIGHTS, Bundle, graph_file, scratch_folder, sha256
from comask.config import require_count
from comask.errors import BundleError, ConfigError, EngineError
from comask.export.triton.model_config import client_config, stage_config, to_pbtxt
from comask.runtime.backends import require_precision
from comask.runtime.backends.names import parse_backend
from comask.runtime.triton_tensors import stage_name
from comask.runtime.trt.engine_folder import EngineFolder, find_engines, rebuild_command
from comask.runtime.trt.memory_format import LINEAR

VERSION = "1"  # the version of each model
LARGEST_BATCH = 8  # the default for graphs, which take any batch; the same as a `Predictor`'s
SERVED = ("onnxruntime", "tensorrt")
CLIENT_MODEL = '''"""Triton loads this file. The model is in comask, which the server's Python needs."""

from comask.runtime.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRequest:
    """The options of `comask serve`.

    Attributes:
        backend: `onnxruntime` or `tensorrt`, followed by a colon and the precision if it is not fp32.
        model_name: the name that clients ask for.
        max_batch: the most images per request; None for the engines' largest batch, or 8 for graphs.
        engines: the name of the engines' folder; None if the bundle has only one that fits.
    """

    backend: str = "onnxruntime"
    model_name: str = "comask"
    max_batch: int | None = None
    engines: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFiles:
    """The files from which the server runs the stages.

    Attributes:
        name: the file's name in the repository.
        paths: the path of each stage's file.
        largest_batch: the most images that may run together.
        best_batch: the batch that the files are tuned for.
        map_format: TensorRT's name of the memory format of the feature maps.
        needs: what the server must have.
    """

    name: str
    paths: dict[str, Path]
    largest_batch: int
    best_batch: int
    map_format: str = LINEAR
    needs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A bundle in a model repository.

    Attributes:
        repository: the repository's folder.
        model: the name that clients ask for.
        backend: the backend of the stages, with the precision.
        max_batch_size: the most images per request.
        weights_sha256: the SHA-256 of the bundle's weights.
        needs: what the server must have; for engines `tensorrt_version`, `target` and `gpu`.
    """

    repository: str
    model: str
    backend: str
    max_batch_size: int
    weights_sha256: str
    needs: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Returns all values in one flat object, for JSON."""
        values = dataclasses.asdict(self)
        needs: dict[str, str] = values.pop("needs")
        return {**values, **needs}


def write_repository(bundle: Bundle, output: Path, request: ServeRequest) -> ServedModel:
    """Writes a model repository.

    Args:
        bundle: the bundle to serve.
        output: the repository's folder, to which the models are added; created if it does not exist.
        request: the options.

    Raises:
        BundleError: `output` holds models of these names, or is not a repository; or the bundle lacks
            the graphs, has altered files, or has category ids that are not integers.
        ConfigError: the backend, name or batch is invalid.
        EngineError: the bundle has no engines that Triton can load, or several that fit.
    """
    name, manifest = request.model_name, bundle.manifest
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ConfigError(
            f"model name {name!r}: expected letters, digits, _, - and ., since it names folders and is "
            f"part of an address"
        )
    _check_room(output, name)
    manifest.require_int64_ids("Triton's category_ids: train and export with such ids")
    library, precision = _parse_served(request.backend)
    backend = f"{library}:{precision}"
    require_precision(bundle, library, precision)
    if library == "tensorrt":
        files = _plans(bundle, precision, request.engines)
    elif request.engines:
        raise ConfigError(f"--engines {request.engines}: the backend {library} uses no engines")
    else:
        files = _graphs(bundle, precision, request.max_batch)
    if request.max_batch is not None:
        require_count("max_batch", request.max_batch, files.largest_batch)
    max_batch = request.max_batch or files.largest_batch
    preferred = sorted({min(files.best_batch, max_batch), max_batch} - {1}) or [1]
    # The scratch folder is beside the output, so that a rename publishes the finished models.
    with scratch_folder(output, output.parent) as folder:
        for stage, path in files.paths.items():
            digest = {"sha256": sha256(path)}
            config = stage_config(
                name, stage, manifest, backend, max_batch,
                map_format=files.map_format, **digest, **files.needs,
            )  # fmt: skip
            shutil.copy(path, _add_model(folder, config) / files.name)
        version = _add_model(folder, client_config(name, manifest, backend, max_batch, preferred))
        (version / "model.py").write_text(CLIENT_MODEL, encoding="utf-8")
        (version / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        _move(folder, output, _models(name))
    return ServedModel(
        repository=str(output),
        model=name,
        backend=backend,
        max_batch_size=max_batch,
        weights_sha256=manifest.files[WEIGHTS],
        needs=files.needs,
    )


def _models(name: str) -> list[str]:
    """Returns the folders of a bundle in a repository; the last one is the model that clients ask for."""
    return [*(stage_name(name, stage) for stage in STAGES), name]


def _check_room(output: Path, name: str) -> None:
    """Checks that the models can be added to a folder.

    Raises:
        BundleError: the folder holds models of these names, or is not a repository.
    """
    if not output.exists():
        return
    for model in reversed(_models(name)):
        if (output / model).exists():
            raise BundleError(f"{output / model} is there already; give another --model-name")
    used = not output.is_dir() or any(output.iterdir())
    if used and not any(output.glob("*/config.pbtxt")):
        raise BundleError(
            f"{output}: is there already and is not a model repository; give one, or a folder that is "
            f"new or empty"
        )


def _move(folder: Path, output: Path, models: list[str]) -> None:
    """Moves all models of a folder into the repository, or none of them.

    Raises:
        OSError: a move failed.
    """
    if not output.exists() or not any(output.iterdir()):
        folder.chmod(0o755)  # The scratch folder is private.
        folder.rename(output)  # This replaces an empty folder.
        return
    with ExitStack() as undo:
        for model in models:
            (folder / model).rename(output / model)
            undo.callback((output / model).rename, folder / model)
        undo.pop_all()


def _add_model(repository: Path, config: dict[str, Any]) -> Path:
    """Creates a model's folder with its configuration; returns the folder of its version."""
    version = repository / str(config["name"]) / VERSION
    version.mkdir(parents=True)
    head = f"# Written by 'comask serve' of comask {__version__}; docs/serving.md explains it.\n"
    (version.parent / "config.pbtxt").write_text(head + to_pbtxt(config), encoding="utf-8")
    return version


def _parse_served(backend: str) -> tuple[str, str]:
    """Returns the library and the precision of a backend that Triton can run.

    Raises:
        ConfigError: Triton does not run the backend.
    """
    library, precision = parse_backend(backend)
    if library not in SERVED:
        why = {
            "tensorrt-rtx": "Triton's TensorRT backend does not load TensorRT-RTX's plans",
            "openvino": "comask makes no models for Triton's OpenVINO backend",
            "torch": "comask's network is not TorchScript",
        }[library]
        raise ConfigError(f"backend {library}: {why}; use {' or '.join(SERVED)}")
    return library, precision


def _graphs(bundle: Bundle, precision: str, max_batch: int | None) -> StageFiles:
    return StageFiles(
        name="model.onnx",
        paths={stage: bundle.graph(stage, precision) for stage in STAGES},
        largest_batch=max_batch or LARGEST_BATCH,
        best_batch=1,
    )


def _plans(bundle: Bundle, precision: str, name: str | None) -> StageFiles:
    """Returns the plans of the engines to serve.

    Raises:
        EngineError: the bundle has no engines that Triton can load, or several that fit.
    """
    build = f"comask build {bundle.folder} --engine tensorrt --precision {precision} --plugin aot"
    there = [
        engines
        for engines in find_engines(bundle)
        if (engines.info.flavor, engines.info.precision) == ("tensorrt", precision)
        and name in (None, engines.folder.name)
    ]
    if not there:
        raise EngineError(
            f"{bundle.folder}: has no tensorrt engines of {precision}"
            f"{f' named {name}' if name else ''}; build them: {build}"
        )
    loadable = [engines for engines in there if engines.info.plugin != "python"]
    if not loadable:
        raise EngineError(
            f"{there[0].folder}: calls comask's plugins in Python, which Triton's TensorRT backend "
            f"does not have; build engines that contain them (or use --plugin none): {build}"
        )
    if len(loadable) > 1:
        names = ", ".join(engines.folder.name for engines in loadable)
        raise EngineError(
            f"{bundle.folder}: has several such engines; give --engines, one of {names}"
        )
    (engines,) = loadable
    _check(bundle, engines)
    info = engines.info
    return StageFiles(
        name="model.plan",
        paths={stage: engines.plan(stage) for stage in STAGES},
        largest_batch=info.profile["batch"][2],
        best_batch=info.profile["batch"][1],
        map_format=info.map_format,
        needs={"tensorrt_version": info.version, "target": info.target, "gpu": info.gpu or ""},
    )


def _check(bundle: Bundle, engines: EngineFolder) -> None:
    """Checks that engines can answer every request of a server.

    Raises:
        EngineError: they cannot; the message names the reason and a command that fixes it.
    """
    info, manifest = engines.info, bundle.manifest
    build = f"build it again: {rebuild_command(engines)}"
    for stage, built_from in info.graphs.items():
        file = graph_file(stage, info.precision)
        if manifest.files.get(file) != built_from:
            raise EngineError(
                f"{engines.folder}: {file} is not the graph it was built from; {build}"
            )
    if (least := info.profile["batch"][0]) > 1:
        raise EngineError(
            f"{engines.folder}: takes at least {least} images, but a request may have only one; "
            f"{build} --profile batch=1:{least}:{info.profile['batch'][2]}"
        )
    if (most := info.profile["proposals"][2]) < manifest.model.proposals:
        raise EngineError(
            f"{engines.folder}: stage 2 takes {most} proposals, stage 1 gives "
            f"{manifest.model.proposals}; {build} --profile proposals={manifest.model.proposals}"
        )
