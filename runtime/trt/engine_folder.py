"""A folder of engines: two plans, and `engine.json`, which says what they are and what they need.

Its name, as `tensorrt-10.16.1-sm90-nvidia-h200-fp16-python`, is for people; comask reads `engine.json`:

| part | here | is |
|---|---|---|
| flavor | `tensorrt` | the library: `tensorrt` or `tensorrt-rtx` |
| version | `10.16.1` | of the library that built the plans |
| target | `sm90` | the compute capability; `portable` for TensorRT-RTX, which compiles when it loads |
| GPU | `nvidia-h200` | the model that the plans were tuned on; left out when built without one |
| precision | `fp16` | of the graphs: `fp32`, `fp16` or `int8` |
| plugin | `python` | how the custom ops run: `python`, `aot` or `none` |

A plan runs only under the TensorRT that built it, on its GPU, for the graphs it was built from. All of
that is compared before a plan is deserialised, since TensorRT's own message names neither side.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comask.bundle import Bundle, graph_file, sha256
from comask.config_reading import from_dict
from comask.errors import ConfigError, EngineError
from comask.files import parse_json
from comask.kernels.launch import LEVEL_STRIDES
from comask.runtime.device import Gpu

ENGINES = "engines"  # folder of the bundle
DESCRIPTION = "engine.json"
TIMING_CACHE = "timing.cache"
SCHEMA_VERSION = 1
AMPERE = 80  # the oldest GPU of --hardware-compatibility ampere_plus
PLANS = {"stage1": "stage1.plan", "stage2": "stage2.plan"}

logger = logging.getLogger(__name__)

LAST_WORDS = 3  # lines of a failed command's output that go into the message


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCounts:
    """Convolutions and products of one stage by precision, as they were read back after building.

    Attributes:
        of: how many the graph has.
        network: precision → how many layers of the parsed network have it.
        engine: the same of the built engine; None where no GPU could open it.
    """

    of: int
    network: dict[str, int] = field(default_factory=dict)
    engine: dict[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What `engine.json` holds.

    Attributes:
        flavor: `tensorrt` or `tensorrt-rtx`.
        version: of the TensorRT that built the plans.
        target: `sm90` and the like; `portable` for TensorRT-RTX, which compiles when it loads.
        gpu: name of the GPU that the plans were tuned on; None when built without one.
        driver: that machine's CUDA driver version, 13000 for 13.0; for information.
        precision: of the graphs.
        plugin: `python`, `aot` or `none`.
        plugin_sha256: of the kernels inside the plans or behind the plugins; None without plugins.
        profile: name of a size (batch, height, width, proposals) → least, best and largest.
        options: how the builder was asked to work.
        graphs: sha256 of each stage's ONNX file.
        transformed: sha256 of what TensorRT was given of it, which changes with comask too.
        plans: sha256 of each stage's plan.
        layers: per stage.
        seconds: building time of each stage.
        verification: how the plans were compared with PyTorch; `not_run` says why they were not.
        created: ISO 8601 in UTC.
        comask_version: that built it.
        schema_version: of this description.
    """

    flavor: str
    version: str
    target: str
    gpu: str | None
    driver: int | None
    precision: str
    plugin: str
    plugin_sha256: str | None
    profile: dict[str, tuple[int, int, int]]
    options: dict[str, Any]
    graphs: dict[str, str]
    transformed: dict[str, str]
    plans: dict[str, str]
    layers: dict[str, LayerCounts]
    seconds: dict[str, float]
    verification: dict[str, Any]
    created: str
    comask_version: str
    schema_version: int = SCHEMA_VERSION

    @property
    def folder_name(self) -> str:
        """See the top of this file; models of one capability need their own."""
        model = "" if self.gpu is None else "-" + re.sub(r"[^a-z0-9]+", "-", self.gpu.lower())
        return f"{self.flavor}-{self.version}-{self.target}{model}-{self.precision}-{self.plugin}"


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """An existing folder of engines.

    Attributes:
        folder: where it lies.
        info: what it holds.
    """

    folder: Path
    info: EngineInfo

    @classmethod
    def open(cls, folder: Path) -> EngineFolder:
        """Reads the description; the plans are compared when they are asked for.

        Raises:
            EngineError: when there is none, or none that this comask reads.
        """
        path = folder / DESCRIPTION
        mend = "comask-export with --rebuild builds the engines again"
        try:
            values = parse_json(path.read_bytes())
        except FileNotFoundError as error:
            raise EngineError(f"{path}: is missing; {mend}") from error
        except (OSError, ValueError) as error:
            raise EngineError(f"{path}: cannot be read ({error}); {mend}") from error
        try:
            if values["schema_version"] != SCHEMA_VERSION:
                raise EngineError(
                    f"{path}: has schema {values['schema_version']!r}, this comask reads "
                    f"{SCHEMA_VERSION}; {mend}"
                )
            return cls(folder, from_dict(EngineInfo, values))
        except (KeyError, TypeError, ConfigError) as error:
            raise EngineError(
                f"{path}: does not describe engines as this comask does; {mend}"
            ) from error

    def plan(self, stage: str) -> Path:
        """The plan of `stage1` or `stage2`, after comparing its sha256.

        Raises:
            EngineError: when it is missing or altered.
        """
        path = self.folder / PLANS[stage]
        try:
            found = sha256(path)
        except OSError as error:
            raise EngineError(f"{path}: cannot be read: {error.strerror or error}") from error
        if found != self.info.plans[stage]:
            raise EngineError(
                f"{path}: was altered since it was built (sha256 {found[:12]}…, {DESCRIPTION} says "
                f"{self.info.plans[stage][:12]}…); build it again with comask-export --rebuild"
            )
        return path

    def mismatches(
        self, bundle: Bundle, version: str, gpu: Gpu | None, plugin_sha256: str | None
    ) -> list[str]:
        """Why these engines may not run here, each `what: found, built for`; empty when they may.

        Args:
            bundle: that they belong to.
            version: of the installed TensorRT of their flavor.
            gpu: of this machine.
            plugin_sha256: of this comask's kernels.
        """
        info, found = self.info, []
        if not _version_fits(info, version):
            found.append(f"{info.flavor} {version} is installed, it was built with {info.version}")
        for stage, expected in info.graphs.items():
            if bundle.manifest.files.get(graph_file(stage, info.precision)) != expected:
                found.append(
                    f"{graph_file(stage, info.precision)} is not the graph it was built from"
                )
        # the other plugins' kernels are inside the plan
        if info.plugin == "python" and info.plugin_sha256 != plugin_sha256:
            found.append("the plugins' kernels are not those it was built with")
        if reason := why_not_on(info, gpu):
            found.append(reason)
        return found


def find_engines(bundle: Bundle) -> list[EngineFolder]:
    """The bundle's engine folders by name; unfinished ones begin with a dot and are left out.

    One that cannot be read is logged and left out too: the others may be what is needed.
    """
    found = []
    for path in sorted((bundle.folder / ENGINES).glob("[!.]*")):
        try:
            found.append(EngineFolder.open(path))
        except EngineError as error:
            logger.warning("%s", error)
    return found


def _version_fits(info: EngineInfo, version: str) -> bool:
    """A version-compatible plan runs under its own and later versions, any other under its own alone."""
    if not info.options.get("version_compatible"):
        return info.version == version
    return _numbers(version) >= _numbers(info.version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def why_not_on(info: EngineInfo, gpu: Gpu | None) -> str:
    """Why the engines may not run on that GPU; empty where they may."""
    if gpu is None:
        return "there is no GPU"
    here = f"the GPU is {gpu.name} (sm{gpu.capability})"
    if info.flavor == "tensorrt-rtx":
        chosen = info.options.get("compute_capabilities") or [gpu.capability]
        return "" if gpu.capability in chosen else f"{here}, it is for {info.target}"
    wider = info.options.get("hardware_compatibility")
    if wider == "ampere_plus":
        return "" if gpu.capability >= AMPERE else f"{here}, it is for sm{AMPERE} and later"
    if info.target != f"sm{gpu.capability}":
        return f"{here}, it is for {info.target}"
    if wider is None and info.gpu != gpu.name:
        return f"{here}, it was tuned on {info.gpu}"
    return ""


def rebuild_arguments(
    bundle: Path, info: EngineInfo, profile: Mapping[str, tuple[int, int, int]]
) -> list[str]:
    """What `comask-export` needs to build engines as these were, with this profile."""
    options = info.options
    arguments = [str(bundle), "--engine", info.flavor, "--precision", info.precision]
    arguments += ["--plugin", info.plugin]
    for name, sizes in profile.items():
        arguments += ["--profile", f"{name}={':'.join(map(str, sizes))}"]
    for option in ("workspace_mib", "optimization_level", "hardware_compatibility"):
        if options.get(option) is not None:
            name = option.removesuffix("_mib").replace("_", "-")
            arguments += [f"--{name}", str(options[option])]
    if options.get("version_compatible"):
        arguments.append("--version-compatible")
    for capability in options.get("compute_capabilities", ()):
        arguments += ["--compute-capability", str(capability)]
    return [*arguments, "--rebuild"]


def rebuild_command(folder: EngineFolder) -> str:
    """The whole command, for a message."""
    arguments = rebuild_arguments(_bundle(folder), folder.info, folder.info.profile)
    return shlex.join(["comask-export", *arguments])


def widening_command(folder: EngineFolder, tensor: str, shape: tuple[int, ...]) -> str:
    """The command that builds engines which also take `tensor` in `shape`.

    A shape that no profile allows (channels, or a canvas of no multiple of 32) changes nothing.
    """
    profile = dict(folder.info.profile)
    for name, size in _sizes(tensor, shape).items():
        least, best, largest = profile[name]
        profile[name] = (min(least, size), best, max(largest, size))
    return shlex.join(["comask-export", *rebuild_arguments(_bundle(folder), folder.info, profile)])


def rebuild(folder: EngineFolder, device: int) -> None:
    """Runs the command for one GPU, which takes minutes.

    Raises:
        EngineError: when it fails, with its last words.
    """
    logger.warning("building again, which takes minutes: %s", rebuild_command(folder))
    arguments = rebuild_arguments(_bundle(folder), folder.info, folder.info.profile)
    done = subprocess.run(
        [*export_command(), *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": _visible(device)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise EngineError(
            f"{folder.folder}: cannot be built again: {'; '.join(lines[-LAST_WORDS:])}"
        )


def export_command() -> list[str]:
    """The `comask-export` that is installed with this comask, run by this interpreter.

    Raises:
        EngineError: there is none, as where comask was only copied.
    """
    found = list(importlib.metadata.entry_points(group="console_scripts", name="comask-export"))
    if not found:
        raise EngineError(
            "engines are built again by comask-export, which is not installed here: install comask "
            "with pip"
        )
    name = found[0].attr
    return [sys.executable, "-c", f"from {found[0].module} import {name}; {name}()"]


def _visible(device: int) -> str:
    """CUDA_VISIBLE_DEVICES for a process whose first GPU is to be number `device` of this one's."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return seen[device] if device < len(seen) and seen[device] else str(device)


def _bundle(folder: EngineFolder) -> Path:
    return folder.folder.parent.parent


def _sizes(tensor: str, shape: tuple[int, ...]) -> dict[str, int]:
    """The sizes of the profile that a tensor's shape shows."""
    if stride := LEVEL_STRIDES.get(tensor):
        batch, _, height, width = shape
        return {"batch": batch, "height": height * stride, "width": width * stride}
    names = {"images": ("batch", "height", "width"), "image_sizes": ("batch",)}
    return dict(zip(names.get(tensor, ("batch", "proposals")), shape, strict=False))
