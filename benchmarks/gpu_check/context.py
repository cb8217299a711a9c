"""What the checks share: the device, their sizes, and bundles made once for all of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rows import UnavailableError, is_ours

LAST_LINES = 3  # of a failed command
# cuDNN's convolutions take TensorFloat-32 by default, whose mantissa is f16's
COMMAND = (
    "import torch; torch.backends.cudnn.allow_tf32 = False; from comask.cli.{} import main; main()"
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the checks are; a rehearsal on a CPU has to end this year.

    Attributes:
        height, width: of the canvas in pixels.
        channels: of the pyramid.
        proposals: an image.
        repeats: of a timed call.
        batch: of the larger benchmark.
        preset: of the network that is timed.
    """

    height: int = 800
    width: int = 1344
    channels: int = 256
    proposals: int = 1000
    repeats: int = 50
    batch: int = 8
    preset: str = "comask-r50"


REHEARSAL = Sizes(
    height=96, width=128, channels=32, proposals=40, repeats=2, batch=2, preset="shapes-tiny"
)


@dataclass
class Context:
    """Handed to every check. Each runs in a process of its own; what they share lies in `folder`.

    Attributes:
        device: `cuda`, or `cpu` in a rehearsal.
        sizes: of the checks.
        folder: for what they write.
        trained: a bundle with real accuracy; None: train one.
    """

    device: str
    sizes: Sizes
    folder: Path
    trained: Path | None = None

    def need_gpu(self) -> None:
        """Raises `UnavailableError` in a rehearsal."""
        if self.device != "cuda":
            raise UnavailableError("needs a GPU")

    @cached_property
    def timed_bundle(self) -> Path:
        """The network that is timed, with random weights: its work does not depend on them."""
        return self._bundle(
            "timed", "--preset", self.sizes.preset, "--set", "train.max_steps=0",
            "--set", "train.weights=none",
        )  # fmt: skip

    @cached_property
    def trained_bundle(self) -> Path:
        """A network whose accuracy means something."""
        if self.trained is not None:
            return self.trained
        steps = [] if self.device == "cuda" else ["--set", "train.max_steps=2"]
        return self._bundle("trained", "--preset", "shapes-tiny", *steps)

    def without_engines(self, bundle: Path, flavor: str, plugin: str) -> Path:
        """A copy for the engines of one flavor and plugin, lest another's be run instead of them."""
        copy = self.folder / f"{bundle.name}-{flavor}-{plugin}"
        if not copy.exists():
            unfinished = copy.with_name(f".{copy.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(bundle, unfinished, ignore=shutil.ignore_patterns("engines"))
            unfinished.rename(copy)
        return copy

    def _bundle(self, name: str, *train_options: str) -> Path:
        failed = self.folder / f"{name}-failed.txt"
        if failed.exists():
            raise UnavailableError(failed.read_text(encoding="utf-8"))
        run, bundle = self.folder / f"{name}-run", self.folder / f"{name}-bundle"
        try:
            if not (bundle / "manifest.json").exists():
                self.command("train", "--data", "shapes", "--output", str(run), *train_options)
                self.command(
                    "export", str(run / "checkpoint-last.pt"), "--output", str(bundle),
                    "--precision", "fp32,fp16", "--score-threshold", "0" if name == "timed" else "0.05",
                )  # fmt: skip
        except RuntimeError as error:
            failed.write_text(f"the {name} bundle cannot be made: {error}", encoding="utf-8")
            raise
        return bundle

    def command(self, name: str, *arguments: str) -> str:
        """Runs a comask command in a process of its own; returns its standard output.

        Raises:
            RuntimeError: with its last words, when it fails.
            UnavailableError: when a package that it needs is not installed.
        """
        result = subprocess.run(
            [sys.executable, "-c", COMMAND.format(name), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            words = (result.stderr or result.stdout).strip().splitlines()[-LAST_LINES:]
            missing = re.match(r"ModuleNotFoundError: No module named '(.+)'", " ".join(words[-1:]))
            if missing and not is_ours(missing[1]):
                raise UnavailableError(f"comask-{name}: {words[-1]}")
            raise RuntimeError(f"comask-{name} ended with {result.returncode}: {'; '.join(words)}")
        return result.stdout

    def images(self, batch: int) -> dict[str, Any]:
        """Noise on full canvases: `images` u8 [B, H, W, 3] and `image_sizes` i32 [B, 2]."""
        size = (self.sizes.height, self.sizes.width)
        noise = np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
        return {"images": noise, "image_sizes": np.array([size] * batch, dtype=np.int32)}
