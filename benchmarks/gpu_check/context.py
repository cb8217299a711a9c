"""Provides what the checks share: the device, the sizes, and bundles that are made only once."""

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

LAST_LINES = 3  # shown of a failed command's output
# By default cuDNN's convolutions use TensorFloat-32, which has the mantissa of f16.
COMMAND = (
    "import torch; torch.backends.cudnn.allow_tf32 = False; "
    "from comask.cli.main import main; main()"
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the checks; a rehearsal on a CPU needs small ones.

    Attributes:
        height, width: the size of the canvas in pixels.
        channels: the number of channels of the pyramid.
        proposals: the number of proposals per image.
        repeats: how often a timed call is repeated.
        batch: the batch of the larger benchmark.
        preset: the preset of the network that is timed.
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
    """The argument of every check. Each check runs in its own process; they share files in `folder`.

    Attributes:
        device: `cuda`, or `cpu` in a rehearsal.
        sizes: the sizes of the checks.
        folder: the folder for the files of the checks.
        trained: a bundle with real accuracy; if None, one is trained.
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
        """The bundle to time; its weights are random, since they do not affect the time."""
        return self._bundle(
            "timed", "--preset", self.sizes.preset, "--set", "train.max_steps=0",
            "--set", "train.weights=none",
        )  # fmt: skip

    @cached_property
    def trained_bundle(self) -> Path:
        """A bundle of a trained network, whose accuracy is meaningful."""
        if self.trained is not None:
            return self.trained
        steps = [] if self.device == "cuda" else ["--set", "train.max_steps=2"]
        return self._bundle("trained", "--preset", "shapes-tiny", *steps)

    def without_engines(self, bundle: Path, flavor: str, plugin: str) -> Path:
        """Returns a copy for the engines of one flavor and plugin, so that no other engine can run."""
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
            failed.write_text(f"the {name} bundle could not be made: {error}", encoding="utf-8")
            raise
        return bundle

    def command(self, name: str, *arguments: str) -> str:
        """Runs a comask command in its own process and returns its standard output.

        Raises:
            RuntimeError: if the command fails; the message contains its last lines.
            UnavailableError: if a package that it needs is not installed.
        """
        result = subprocess.run(
            [sys.executable, "-c", COMMAND, name, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            words = (result.stderr or result.stdout).strip().splitlines()[-LAST_LINES:]
            missing = re.match(r"ModuleNotFoundError: No module named '(.+)'", " ".join(words[-1:]))
            if missing and not is_ours(missing[1]):
                raise UnavailableError(f"comask {name}: {words[-1]}")
            raise RuntimeError(f"comask {name} exited with {result.returncode}: {'; '.join(words)}")
        return result.stdout

    def images(self, batch: int) -> dict[str, Any]:
        """Returns noise on full canvases: `images` u8 [B, H, W, 3] and `image_sizes` i32 [B, 2]."""
        size = (self.sizes.height, self.sizes.width)
        noise = np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
        return {"images": noise, "image_sizes": np.array([size] * batch, dtype=np.int32)}
