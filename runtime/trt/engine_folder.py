"""A folder of engines: two plans, and `engine.json`, which describes them and what they need.

A folder's name, `tensorrt-10.16.1-sm90-nvidia-h200-fp16-python` for example, is for people; comask reads
`engine.json`:

| part | here | meaning |
|---|---|---|
| flavor | `tensorrt` | the library: `tensorrt` or `tensorrt-rtx` |
| version | `10.16.1` | the version of the library that built the plans |
| target | `sm90` | the compute capability; `portable` for TensorRT-RTX, which compiles when it loads |
| GPU | `nvidia-h200` | the model that the plans were tuned on; absent if they were built without a GPU |
| precision | `fp16` | the precision of the graphs: `fp32`, `fp16` or `int8` |
| plugin | `python` | how the custom ops run: `python`, `aot` or `none` |

A plan runs only with the TensorRT version that built it, on its GPU, for the graphs it was built from.
comask compares all of that before it deserialises a plan, since TensorRT's own message names neither what
it found nor what it expected.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
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
from comask.runtime.gpu import Gpu
from comask.runtime.trt.memory_format import LINEAR

ENGINES = "engines"  # a folder in the bundle
DESCRIPTION = "engine.json"
TIMING_CACHE = "timing.cache"
SCHEMA_VERSION = 1
LEAKING = (11, 1), (11, 2, 1)  # the first and the last version with NVIDIA/TensorRT#4849
AMPERE = 80  # the oldest GPU that --hardware-compatibility ampere_plus allows
# GPUs that a plan of TensorRT-RTX supports unless the build names others, by its support matrix. NVIDIA's
# page on building without a GPU adds 8.0 and GPUs later than 12.0, so the plan itself decides on those.
RTX_DEFAULT = (80, 86, 89, 120)
PLANS = {"stage1": "stage1.plan", "stage2": "stage2.plan"}

logger = logging.getLogger(__name__)

LAST_WORDS = 3  # the message ends with so many lines of a failed command's output


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCounts:
    """Counts of one stage's convolutions and matrix products by precision, read back after the build.

    Attributes:
        of: the number that the graph has.
        network: precision → the number of layers of the parsed network.
        engine: the same for the built engine; None if no GPU could open it.
        differing: graph's node → its precision in the engine, if TensorRT's report on the engine seems to
            differ from the graph. The report may name a fused layer's edges only.
    """

    of: int
    network: dict[str, int] = field(default_factory=dict)
    engine: dict[str, int] | None = None
    differing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """The content of `engine.json`.

    Attributes:
        flavor: `tensorrt` or `tensorrt-rtx`.
        version: the version of TensorRT that built the plans.
        target: the GPU's architecture, such as `sm90`; `portable` for TensorRT-RTX, which compiles when
            it loads.
        gpu: name of the GPU that the plans were tuned on; None if they were built without a GPU.
        driver: that machine's CUDA driver version, 13000 for 13.0; for information.
        precision: the precision of the graphs.
        plugin: `python`, `aot` or `none`.
        plugin_sha256: hash of the kernels in the plans or behind the plugins; None without plugins.
        profile: name of a size (batch, height, width, proposals) → least, best and largest value.
        options: the builder's options.
        map_format: TensorRT's name of the memory format in which the feature maps cross between the
            stages; `LINEAR`, `HWC` or `HWC8`.
        graphs: sha256 of each stage's ONNX file.
        transformed: sha256 of each graph as TensorRT received it; another comask may transform it
            differently.
        plans: sha256 of each stage's plan.
        layers: the layer counts of each stage.
        seconds: the building time of each stage.
        verification: the comparison of the plans with PyTorch; `not_run` says why it did not run.
        created: time of the build, ISO 8601 in UTC.
        comask_version: the version of comask that built the engines.
        schema_version: the version of this description's format.
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
    map_format: str = LINEAR  # of engines that an earlier comask built
    schema_version: int = SCHEMA_VERSION

    @property
    def folder_name(self) -> str:
        """The name that the top of this file explains."""
        # GPU models of one capability need plans of their own
        model = "" if self.gpu is None else "-" + re.sub(r"[^a-z0-9]+", "-", self.gpu.lower())
        return f"{self.flavor}-{self.version}-{self.target}{model}-{self.precision}-{self.plugin}"


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """An existing folder of engines.

    Attributes:
        folder: the path.
        info: the content of its `engine.json`.
    """

    folder: Path
    info: EngineInfo

    @classmethod
    def open(cls, folder: Path) -> EngineFolder:
        """Reads the description; `plan` checks the plans.

        Raises:
            EngineError: if the description is missing, or this comask cannot read it.
        """
        path = folder / DESCRIPTION
        fix = "comask build with --rebuild builds the engines again"
        try:
            values = parse_json(path.read_bytes())
        except FileNotFoundError as error:
            raise EngineError(f"{path}: is missing; {fix}") from error
        except (OSError, ValueError) as error:
            raise EngineError(f"{path}: cannot be read ({error}); {fix}") from error
        try:
            if values["schema_version"] != SCHEMA_VERSION:
                raise EngineError(
                    f"{path}: has schema {values['schema_version']!r}, this comask reads "
                    f"{SCHEMA_VERSION}; {fix}"
                )
            return cls(folder, from_dict(EngineInfo, values))
        except (KeyError, TypeError, ConfigError) as error:
            raise EngineError(
                f"{path}: does not describe engines as this comask does; {fix}"
            ) from error

    def plan(self, stage: str) -> Path:
        """Returns the path of the plan of `stage1` or `stage2`, after comparing its sha256.

        Raises:
            EngineError: if the plan is missing or was altered.
        """
        path = self.folder / PLANS[stage]
        try:
            found = sha256(path)
        except OSError as error:
            raise EngineError(f"{path}: cannot be read: {error.strerror or error}") from error
        if found != self.info.plans[stage]:
            raise EngineError(
                f"{path}: was altered since it was built (sha256 {found[:12]}…, {DESCRIPTION} says "
                f"{self.info.plans[stage][:12]}…); build it again with comask build --rebuild"
            )
        return path

    def mismatches(
        self, bundle: Bundle, version: str, gpu: Gpu | None, plugin_sha256: str | None
    ) -> list[str]:
        """Returns the reasons why these engines may not run on this machine; empty if they may.

        Args:
            bundle: the bundle that they belong to.
            version: the installed version of their TensorRT flavor.
            gpu: this machine's GPU.
            plugin_sha256: hash of this comask's kernels.

        Returns:
            one text for each mismatch, with what was found and what the engines were built for.
        """
        info, reasons = self.info, []
        if not _version_fits(info, version):
            reasons.append(
                f"{info.flavor} {version} is installed, it was built with {info.version}"
            )
        for stage, expected in info.graphs.items():
            if bundle.manifest.files.get(graph_file(stage, info.precision)) != expected:
                reasons.append(
                    f"{graph_file(stage, info.precision)} is not the graph it was built from"
                )
        # the other plugins' kernels are inside the plan
        if info.plugin == "python" and info.plugin_sha256 != plugin_sha256:
            reasons.append("the plugins' kernels are not those it was built with")
        if reason := why_not_on(info, gpu):
            reasons.append(reason)
        return reasons


def find_engines(bundle: Bundle) -> list[EngineFolder]:
    """Returns the bundle's engine folders in the order of their names.

    Unfinished folders, whose names begin with a dot, are left out. A folder that cannot be read is logged
    and left out, too: another one may be the one that is needed.
    """
    folders = []
    for path in sorted((bundle.folder / ENGINES).glob("[!.]*")):
        try:
            folders.append(EngineFolder.open(path))
        except EngineError as error:
            logger.warning("%s", error)
    return folders


def _version_fits(info: EngineInfo, version: str) -> bool:
    """Returns whether a TensorRT version can run these plans.

    A version-compatible plan runs with its own and later versions, any other plan only with its own.
    """
    if not info.options.get("version_compatible"):
        return info.version == version
    return _numbers(version) >= _numbers(info.version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def why_not_on(info: EngineInfo, gpu: Gpu | None) -> str:
    """Returns the reason why the engines may not run on that GPU; empty if they may."""
    if gpu is None:
        return "there is no GPU"
    here = f"the GPU is {gpu.name} (sm{gpu.capability})"
    if info.flavor == "tensorrt-rtx":
        chosen = info.options.get("compute_capabilities")
        later = not chosen and gpu.capability > max(RTX_DEFAULT)
        if later or gpu.capability in (chosen or RTX_DEFAULT):
            return ""
        if chosen:
            return f"{here}, it is for {info.target}"
        served = ", ".join(f"sm{capability}" for capability in RTX_DEFAULT)
        return (
            f"{here}; plans of tensorrt-rtx support {served} and later, others only where they are built "
            f"with --compute-capability and tensorrt-rtx supports the GPU at all"
        )
    wider = info.options.get("hardware_compatibility")
    if wider == "ampere_plus":
        return "" if gpu.capability >= AMPERE else f"{here}, it is for sm{AMPERE} and later"
    if info.target != f"sm{gpu.capability}":
        return f"{here}, it is for {info.target}"
    if wider is None and info.gpu != gpu.name:
        return f"{here}, it was tuned on {info.gpu}"
    return ""


def leak_of(info: EngineInfo) -> str:
    """Returns what to know about a memory leak of the engines' TensorRT; empty if it has none."""
    if info.plugin != "aot" or not LEAKING[0] <= _numbers(info.version)[:3] <= LEAKING[1]:
        return ""
    ranges = [name for name in ("batch", "height", "width") if len(set(info.profile[name])) > 1]
    if not ranges:
        return ""
    return (
        f"tensorrt {info.version} loses GPU memory whenever the shape of the images changes, because "
        f"ahead-of-time plugins are loaded again (NVIDIA/TensorRT#4849); a server should use --plugin "
        f"none, or a single size of {' and '.join(ranges)} by --profile"
    )


def why_not_proved(info: EngineInfo, gpu: Gpu | None) -> str:
    """Returns why engines cannot run here and thus cannot be verified; empty if they can."""
    if reason := why_not_on(info, gpu):
        return reason
    return "" if importlib.util.find_spec("pycuda") else "pycuda is not installed"


def rebuild_arguments(
    bundle: Path, info: EngineInfo, profile: Mapping[str, tuple[int, int, int]]
) -> list[str]:
    """Returns `comask build`'s arguments that build such engines again, with this profile."""
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
    """Returns the command that builds the engines again, for a message."""
    return _command(folder, folder.info.profile)


def widening_command(folder: EngineFolder, tensor: str, shape: tuple[int, ...]) -> str:
    """Returns the command that builds engines which also take `tensor` in `shape`.

    Sizes that no profile allows stay out of it: other channels, or a canvas that is not a multiple of 32.
    """
    profile = dict(folder.info.profile)
    for name, size in _sizes(tensor, shape).items():
        least, best, largest = profile[name]
        profile[name] = (min(least, size), best, max(largest, size))
    return _command(folder, profile)


def _command(folder: EngineFolder, profile: Mapping[str, tuple[int, int, int]]) -> str:
    arguments = rebuild_arguments(_bundle(folder), folder.info, profile)
    return shlex.join(["comask", "build", *arguments])


def rebuild(folder: EngineFolder, device: int) -> None:
    """Builds the engines again for one GPU, which takes minutes.

    Raises:
        EngineError: if the command fails; the text ends with the last lines of its output.
    """
    logger.warning("building again, which takes minutes: %s", rebuild_command(folder))
    arguments = rebuild_arguments(_bundle(folder), folder.info, folder.info.profile)
    done = subprocess.run(
        [*installed_command(), "build", *arguments],
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


def installed_command() -> list[str]:
    """Returns the arguments that run the installed `comask` with this interpreter.

    Raises:
        EngineError: if `comask` is not installed, as when its files were only copied.
    """
    scripts = list(importlib.metadata.entry_points(group="console_scripts", name="comask"))
    if not scripts:
        raise EngineError(
            "engines are built again by comask build, which is not installed here: install comask "
            "with pip"
        )
    name = scripts[0].attr
    return [sys.executable, "-c", f"from {scripts[0].module} import {name}; {name}()"]


def _visible(device: int) -> str:
    """Returns the CUDA_VISIBLE_DEVICES with which GPU `device` of this process is another's first."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return seen[device] if device < len(seen) and seen[device] else str(device)


def _bundle(folder: EngineFolder) -> Path:
    return folder.folder.parent.parent


def _sizes(tensor: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Returns the profile's sizes that a tensor's shape implies."""
    if stride := LEVEL_STRIDES.get(tensor):
        batch, _, height, width = shape
        return {"batch": batch, "height": height * stride, "width": width * stride}
    names = {"images": ("batch", "height", "width"), "image_sizes": ("batch",)}
    return dict(zip(names.get(tensor, ("batch", "proposals")), shape, strict=False))
