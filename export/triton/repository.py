"""From a bundle to a model repository of Triton: three models, written whole or not at all."""

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
from comask.runtime.backends import parse_backend, require_precision
from comask.runtime.triton_tensors import stage_name
from comask.runtime.trt.engine_folder import EngineFolder, find_engines, rebuild_command

VERSION = "1"  # of each model
LARGEST_BATCH = 8  # of graphs, which take any, as of a `Predictor`
SERVED = ("onnxruntime", "tensorrt")
CLIENT_MODEL = '''"""Triton loads this; the model is in comask, which the server's Python needs."""

from comask.runtime.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRequest:
    """What is to be served.

    Attributes:
        backend: `onnxruntime` or `tensorrt`, with the precision behind a colon where it is not fp32.
        model_name: that clients ask for.
        max_batch: most images of a request; None for what the engines take, of graphs 8.
        engines: name of the engines' folder; None where only one can be meant.
    """

    backend: str = "onnxruntime"
    model_name: str = "comask"
    max_batch: int | None = None
    engines: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFiles:
    """What the server runs the stages from.

    Attributes:
        name: of the file in the repository.
        paths: by stage.
        largest_batch: images that may run together.
        best_batch: that it is tuned for.
        needs: what the server must have.
    """

    name: str
    paths: dict[str, Path]
    largest_batch: int
    best_batch: int
    needs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A bundle in a model repository.

    Attributes:
        repository: its folder.
        model: what clients ask for.
        backend: of the stages, with the precision.
        max_batch_size: most images of a request.
        weights_sha256: of the bundle.
        needs: what the server must have; of engines `tensorrt_version`, `target` and `gpu`.
    """

    repository: str
    model: str
    backend: str
    max_batch_size: int
    weights_sha256: str
    needs: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all in one object."""
        values = dataclasses.asdict(self)
        needs: dict[str, str] = values.pop("needs")
        return {**values, **needs}


def write_repository(bundle: Bundle, output: Path, request: ServeRequest) -> ServedModel:
    """Writes a model repository.

    Args:
        bundle: to serve.
        output: folder of the repository, to which the models are added; made where it is missing.
        request: what is to be served.

    Raises:
        BundleError: when `output` holds models of these names, or is no repository; when the bundle
            lacks the graphs, has altered files, or category ids that are no integers.
        ConfigError: for a backend, name or batch that cannot be.
        EngineError: when there are no engines that Triton can load, or several.
    """
    name, manifest = request.model_name, bundle.manifest
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ConfigError(
            f"model name {name!r}: it names folders and is part of an address; expected letters, "
            f"digits, _, - and ."
        )
    _check_room(output, name)
    manifest.require_int64_ids("Triton's category_ids: train and export with such ids")
    library, precision = _parse_served(request.backend)
    backend = f"{library}:{precision}"
    require_precision(bundle, precision)
    if library == "tensorrt":
        files = _plans(bundle, precision, request.engines)
    elif request.engines:
        raise ConfigError(f"engines {request.engines}: are for tensorrt, not for {library}")
    else:
        files = _graphs(bundle, precision, request.max_batch)
    if request.max_batch is not None:
        require_count("max_batch", request.max_batch, files.largest_batch)
    max_batch = request.max_batch or files.largest_batch
    preferred = sorted({min(files.best_batch, max_batch), max_batch} - {1}) or [1]
    # beside the output, so that what is finished appears by a rename
    with scratch_folder(output, output.parent) as folder:
        for stage, path in files.paths.items():
            digest = {"sha256": sha256(path)}
            config = stage_config(
                name, stage, manifest, backend, max_batch, **digest, **files.needs
            )
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
    """The folders of a bundle in a repository; last the one that clients ask."""
    return [*(stage_name(name, stage) for stage in STAGES), name]


def _check_room(output: Path, name: str) -> None:
    """Refuses a folder that the models cannot be added to.

    Raises:
        BundleError: see `write_repository`.
    """
    if not output.exists():
        return
    for model in reversed(_models(name)):
        if (output / model).exists():
            raise BundleError(f"{output / model} is there already; give another --model-name")
    used = not output.is_dir() or any(output.iterdir())
    if used and not any(output.glob("*/config.pbtxt")):
        raise BundleError(
            f"{output}: is there already and no model repository; give one, or a folder that is new "
            f"or empty"
        )


def _move(folder: Path, output: Path, models: list[str]) -> None:
    """Moves all models of a folder into the repository, or none.

    Raises:
        OSError: when that fails.
    """
    if not output.exists() or not any(output.iterdir()):
        folder.chmod(0o755)  # mkdtemp's is private
        folder.rename(output)  # an empty one is replaced
        return
    with ExitStack() as undo:
        for model in models:
            (folder / model).rename(output / model)
            undo.callback((output / model).rename, folder / model)
        undo.pop_all()


def _add_model(repository: Path, config: dict[str, Any]) -> Path:
    """A model's folder with its configuration; returns that of its version."""
    version = repository / str(config["name"]) / VERSION
    version.mkdir(parents=True)
    head = (
        f"# Written by comask-export {__version__} --serve triton; docs/serving.md explains it.\n"
    )
    (version.parent / "config.pbtxt").write_text(head + to_pbtxt(config), encoding="utf-8")
    return version


def _parse_served(backend: str) -> tuple[str, str]:
    """Library and precision.

    Raises:
        ConfigError: Triton does not run it.
    """
    library, precision = parse_backend(backend)
    if library not in SERVED:
        why = {
            "tensorrt-rtx": "Triton's TensorRT backend does not load TensorRT-RTX's plans",
            "torch": "comask's network is no TorchScript",
        }[library]
        raise ConfigError(f"backend {library}: {why}; take {' or '.join(SERVED)}")
    return library, precision


def _graphs(bundle: Bundle, precision: str, max_batch: int | None) -> StageFiles:
    return StageFiles(
        name="model.onnx",
        paths={stage: bundle.graph(stage, precision) for stage in STAGES},
        largest_batch=max_batch or LARGEST_BATCH,
        best_batch=1,
    )


def _plans(bundle: Bundle, precision: str, name: str | None) -> StageFiles:
    """The plans of the engines that are meant.

    Raises:
        EngineError: see `write_repository`.
    """
    build = f"comask-export {bundle.folder} --engine tensorrt --precision {precision} --plugin aot"
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
            f"{there[0].folder}: calls our plugins in Python, which Triton's TensorRT backend does "
            f"not have; build engines that hold them, or none (--plugin none): {build}"
        )
    if len(loadable) > 1:
        names = ", ".join(engines.folder.name for engines in loadable)
        raise EngineError(f"{bundle.folder}: has several such engines; name one of {names}")
    (engines,) = loadable
    _check(bundle, engines)
    info = engines.info
    return StageFiles(
        name="model.plan",
        paths={stage: engines.plan(stage) for stage in STAGES},
        largest_batch=info.profile["batch"][2],
        best_batch=info.profile["batch"][1],
        needs={"tensorrt_version": info.version, "target": info.target, "gpu": info.gpu or ""},
    )


def _check(bundle: Bundle, engines: EngineFolder) -> None:
    """What a server's requests would fail by.

    Raises:
        EngineError: naming it, and how to build such as will do.
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
            f"{engines.folder}: takes no fewer than {least} images, and requests may have one; "
            f"{build} --profile batch=1:{least}:{info.profile['batch'][2]}"
        )
    if (most := info.profile["proposals"][2]) < manifest.model.proposals:
        raise EngineError(
            f"{engines.folder}: stage 2 takes {most} proposals, stage 1 gives "
            f"{manifest.model.proposals}; {build} --profile proposals={manifest.model.proposals}"
        )
