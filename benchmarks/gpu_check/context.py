"""Provides what the checks share: the device, the sizes, and files that are made only once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rows import UnavailableError, is_ours

if TYPE_CHECKING:
    from comask.bundle import Bundle

LAST_LINES = 3  # shown of a failed command's output
# By default cuDNN's convolutions use TensorFloat-32, which has the mantissa of f16.
COMMAND = (
    "import torch; torch.backends.cudnn.allow_tf32 = False; "
    "from comask.cli.main import main; main()"
)
# The same commands where a stand-in takes the driver's place, for a TensorRT flavor.
STAND_IN = (
    "import os, sys; sys.setdlopenflags(os.RTLD_LAZY); import standin_tensorrt; "
    "standin_tensorrt.install({module!r}); "
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
        frames: the number of frames of a stream.
        steps: the number of training steps.
        images: the number of images on which AP is measured.
    """

    height: int = 800
    width: int = 1344
    channels: int = 256
    proposals: int = 1000
    repeats: int = 50
    batch: int = 8
    preset: str = "comask-r50"
    frames: int = 48
    steps: int = 60
    images: int = 200


REHEARSAL = Sizes(
    height=96, width=128, channels=32, proposals=40, repeats=2, batch=2, preset="shapes-tiny",
    frames=6, steps=12, images=4,
)  # fmt: skip


@dataclass
class Context:
    """The argument of every check. The processes of all groups share the files in `folder`.

    Attributes:
        device: `cuda`, or `cpu` in a rehearsal; PyTorch's name.
        sizes: the sizes of the checks.
        folder: the folder for the files of the checks.
        given: a bundle with real accuracy; if None, one is trained.
        stand_in: whether stand-ins take the place of driver and TensorRT in this process.
    """

    device: str
    sizes: Sizes
    folder: Path
    given: Path | None = None
    stand_in: bool = False
    flavor: str = ""

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU."""
        return self.device == "cpu"

    @property
    def trained(self) -> Path:
        """The bundle of a trained network, which the row of that name provides."""
        return self.folder / "trained-bundle"

    @property
    def timed(self) -> Path:
        """The bundle to time; its weights are random, since they do not affect the time."""
        return self.folder / "timed-bundle"

    def bundle(self) -> Bundle:
        """Opens the trained bundle."""
        from comask.bundle import Bundle

        return Bundle.open(self.trained)

    def install_stand_ins(self, flavor: str) -> None:
        """Makes the stand-in TensorRT take the place of a flavor in this process."""
        self.flavor = flavor
        import standin_tensorrt

        standin_tensorrt.install(module_of(flavor))

    def make_bundle(self, bundle: Path, *train_options: str, score_threshold: str) -> None:
        """Trains a network and exports it with fp32 and fp16 graphs.

        Raises:
            RuntimeError: if a command fails.
            UnavailableError: if a package that it needs is not installed.
        """
        run = bundle.with_name(f"{bundle.name}-run")
        self.command("train", "--data", "shapes", "--output", str(run), *train_options)
        self.command(
            "export", str(run / "checkpoint-last.pt"), "--output", str(bundle),
            "--precision", "fp32,fp16", "--score-threshold", score_threshold,
        )  # fmt: skip

    def command(self, name: str, *arguments: str) -> str:
        """Runs a comask command in its own process and returns its standard output.

        Raises:
            RuntimeError: if the command fails; the message contains its last lines.
            UnavailableError: if a package that it needs is not installed.
        """
        boot = STAND_IN.format(module=module_of(self.flavor)) if self.stand_in else ""
        result = subprocess.run(
            # -P: the working directory may be the tree, whose comask/ lacks the other folders
            [sys.executable, "-P", "-c", boot + COMMAND, name, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        sys.stderr.write(result.stderr)  # to the log
        if result.returncode:
            words = (result.stderr or result.stdout).strip().splitlines()[-LAST_LINES:]
            missing = re.match(r"ModuleNotFoundError: No module named '(.+)'", " ".join(words[-1:]))
            if missing and not is_ours(missing[1]):
                need = f"module {missing[1].split('.')[0]}"
                raise UnavailableError(f"comask {name}: {words[-1]}", need)
            raise RuntimeError(f"comask {name} exited with {result.returncode}: {'; '.join(words)}")
        return result.stdout

    def images(self, batch: int) -> dict[str, Any]:
        """Returns noise on full canvases: `images` u8 [B, H, W, 3] and `image_sizes` i32 [B, 2]."""
        size = (self.sizes.height, self.sizes.width)
        noise = np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
        return {"images": noise, "image_sizes": np.array([size] * batch, dtype=np.int32)}

    def remember(self, name: str, value: float) -> None:
        """Keeps a figure for later rows, which may run in other processes."""
        (self.folder / f"{name}.figure").write_text(json.dumps(value), encoding="utf-8")

    def recall(self, name: str) -> float:
        """Returns a remembered figure."""
        return float(json.loads((self.folder / f"{name}.figure").read_text(encoding="utf-8")))


def module_of(flavor: str) -> str:
    """Returns the module of a TensorRT flavor; that of `tensorrt` if the flavor is empty."""
    return (flavor or "tensorrt").replace("-", "_")
