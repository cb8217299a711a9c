"""Kills a `comask job` repeatedly and checks that no image is lost or processed twice.

python benchmarks/job_kills.py bundle --images 1000 --kills 5

The program makes images, a tenth of them broken, runs the job, and ends it with SIGKILL at random
moments. In turn, it kills the driver alone, its process group, or the driver with all of Ray's processes.
It then continues the job and compares the parts with the images. It exits with 1 if they differ.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from PIL import Image

from comask.data.shapes import ShapesSource
from comask.runtime import Predictor

COMMAND = [sys.executable, "-c", "from comask.cli.job import main; main()"]
VICTIMS = ("the driver", "its process group", "driver and Ray")
LONGEST_RUN = 1800  # seconds without a kill; a longer run is considered hung


def png_of_size(width: int, height: int) -> bytes:
    """Returns a PNG header whose pixels would fill the memory."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + struct.pack(">I", zlib.crc32(header))


BREAKERS: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "noise": lambda path: path.write_bytes(random.Random(path.name).randbytes(5000)),
    "bomb": lambda path: path.write_bytes(png_of_size(60_000, 60_000)),
    "missing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


def make_images(folder: Path, count: int, chance: random.Random) -> dict[str, str]:
    """Writes `count` images, a tenth of them broken; returns the kind of damage by path."""
    folder.mkdir()
    source = ShapesSource(num_images=count, seed=3)
    paths = [folder / f"{i:05}.{'jpg' if i % 2 else 'png'}" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(source.image(i)).save(path)
    broken = {}
    for i, path in enumerate(chance.sample(paths, count // 10)):
        kind = list(BREAKERS)[i % len(BREAKERS)]
        BREAKERS[kind](path)
        broken[str(path)] = kind
    return broken


def rows_of(job: Path) -> Iterator[dict[str, Any]]:
    """Yields all rows of a job's parts."""
    for path in sorted((job / "parts").iterdir()):
        if path.suffix == ".jsonl":
            yield from map(json.loads, path.read_text().splitlines())
        else:
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()


def kill(process: subprocess.Popen[bytes], victim: str) -> None:
    """Ends the victim with SIGKILL."""
    processes = [process.pid]
    if victim == "driver and Ray":
        processes += descendants(process.pid)
    if victim == "its process group":
        os.killpg(process.pid, signal.SIGKILL)
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def descendants(pid: int) -> list[int]:
    """Returns the child processes of `pid` and their descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
        except (OSError, IndexError):
            continue
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def problems(job: Path, images: Path, broken: dict[str, str]) -> list[str]:
    """Returns a description of each error in a finished job."""
    rows = list(rows_of(job))
    times = Counter(row["file"] for row in rows)
    names = {str(path) for path in images.iterdir()}
    reported = {row["file"] for row in rows if row["error"]}
    listed = [
        json.loads(line)["file"] for line in (job / "failures.jsonl").read_text().splitlines()
    ]
    summary = json.loads((job / "summary.json").read_text())
    counts = (summary["images"], summary["failed"])
    checks = {
        "lost": sorted(names - times.keys()),
        "processed twice": sorted(name for name, count in times.items() if count > 1),
        "not requested": sorted(times.keys() - names),
        "broken but not reported": sorted(broken.keys() - reported),
        "intact but reported": sorted(reported - broken.keys()),
        "failures.jsonl differs": sorted(set(listed) ^ broken.keys()) or listed[len(broken) :],
        "summary differs": [] if counts == (len(names), len(broken)) else [counts],
        "left behind": [path.name for path in (job / "parts").glob(".*")],
    }
    return [f"{what}: {len(which)}, {which[:3]}" for what, which in checks.items() if which]


def differing(job: Path, bundle: Path, count: int, short_side: int) -> int:
    """Returns how many of the first `count` images have other detections than a `Predictor` gives."""
    wrong = 0
    with Predictor.load(bundle, "onnxruntime", short_side=short_side, max_batch=1) as predictor:
        sound = [row for row in rows_of(job) if not row["error"]][:count]
        for row in sound:
            expected = predictor(row["file"]).to_coco(0)
            found = [{k: v for k, v in d.items() if k != "category"} for d in row["detections"]]
            wrong += found != [{k: v for k, v in d.items() if k != "image_id"} for d in expected]
    return wrong


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--images", "count", default=1000, show_default=True)
@click.option("--kills", default=5, show_default=True)
@click.option("--shard", default=20, show_default=True)
@click.option("--runner", type=click.Choice(["ray", "local"]), default="ray", show_default=True)
@click.option("--format", "form", default="parquet", show_default=True)
@click.option("--short-side", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    bundle: Path,
    count: int,
    kills: int,
    shard: int,
    runner: str,
    form: str,
    short_side: int,
    seed: int,
) -> None:
    """Kill a job of BUNDLE repeatedly, continue it, and check its results."""
    chance = random.Random(seed)
    with TemporaryDirectory(prefix="comask-kills-") as scratch:
        images, job = Path(scratch) / "images", Path(scratch) / "job"
        broken = make_images(images, count, chance)
        command = [
            *COMMAND, str(bundle), str(images), "--output", str(job), "--runner", runner,
            "--format", form, "--shard", str(shard), "--short-side", str(short_side),
            "--backend", "onnxruntime",
        ]  # fmt: skip
        parts = -(-count // shard)
        moments = sorted(
            chance.sample(range(parts - 1), kills)
        )  # number of finished parts before each kill
        click.echo(f"{count} images, {len(broken)} broken: {dict(Counter(broken.values()))}")
        click.echo("run  killed                  seconds  parts done")
        for run, moment in enumerate([*moments, None]):
            started = time.monotonic()
            process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
            victim, output = "", b""
            if moment is None:
                try:
                    _, output = process.communicate(timeout=LONGEST_RUN)
                finally:
                    process.kill()
            else:
                victim = VICTIMS[run % len(VICTIMS)]
                while process.poll() is None and done(job) <= moment:
                    time.sleep(0.05)
                time.sleep(chance.uniform(0, 2))
                if process.poll() is not None:
                    raise click.ClickException(
                        f"ended before it was killed: {process.communicate()}"
                    )
                kill(process, victim)
            seconds = time.monotonic() - started
            ending = victim or f"no, exit code {process.returncode}"
            click.echo(f"{run + 1:<3}  {ending:<22}  {seconds:7.1f}  {done(job)} of {parts}")
        found = problems(job, images, broken)
        if process.returncode != 1:
            found.append(f"exit code {process.returncode}, expected 1: {output.decode()[-500:]}")
        if wrong := differing(job, bundle, 50, short_side):
            found.append(f"{wrong} of 50 images have other detections than a Predictor gives")
    good = count - len(broken)
    click.echo(
        "\n".join(found)
        or f"each of {good} intact images appears once, {len(broken)} broken ones are reported"
    )
    sys.exit(bool(found))


def done(job: Path) -> int:
    """Returns the number of recorded parts."""
    return len(list((job / "done").glob("part-*.json")))


if __name__ == "__main__":
    main()
