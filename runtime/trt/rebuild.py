"""The `comask-export` command that builds a folder's engines again, and running it.

The runtime never imports the exporter, which needs PyTorch and ONNX; it may start it.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from comask.errors import EngineError
from comask.runtime.trt.engine_folder import EngineFolder, EngineInfo

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
LAST_WORDS = 3  # lines of a failed command's output that go into the message
RUN = "from comask.cli.export import main; main()"

logger = logging.getLogger(__name__)


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
        [sys.executable, "-c", RUN, *arguments],
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


def _visible(device: int) -> str:
    """CUDA_VISIBLE_DEVICES for a process whose first GPU is to be number `device` of this one's."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return seen[device] if device < len(seen) and seen[device] else str(device)


def _bundle(folder: EngineFolder) -> Path:
    return folder.folder.parent.parent


def _sizes(tensor: str, shape: tuple[int, ...]) -> dict[str, int]:
    """The sizes of the profile that a tensor's shape shows."""
    if tensor in STRIDES:
        batch, _, height, width = shape
        return {
            "batch": batch, "height": height * STRIDES[tensor], "width": width * STRIDES[tensor],
        }  # fmt: skip
    names = {"images": ("batch", "height", "width"), "image_sizes": ("batch",)}
    return dict(zip(names.get(tensor, ("batch", "proposals")), shape, strict=False))
