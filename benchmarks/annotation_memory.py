"""Measures how long training takes to open a data set of COCO's size, and the memory of all processes.

python benchmarks/annotation_memory.py --ranks 8 --workers 2
python benchmarks/annotation_memory.py --images 7100 --objects 51500 --ranks 2 \
    --other "env PYTHONPATH=/tmp/older python"

The data set has as many images and annotations as train2017; the images are a few files under many names.
Each rank opens the data as `comask train` does and forks workers that read every annotation. Memory is
the sum of the processes' PSS, which divides shared pages among the processes that share them, minus what
the ranks had before. `--other` is a Python that imports another version of comask.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

HEIGHT, WIDTH, CLASSES = 48, 64, 80  # small, because nothing reads the pixels
CORNERS = 24  # per polygon, about as many as in COCO


def make(folder: Path, images: int, objects: int) -> None:
    """Writes the data set, with about half a KiB per annotation."""
    from PIL import Image

    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "one.jpg")
    rng = np.random.default_rng(0)
    counts = rng.multinomial(objects, [1 / images] * images)
    entries, number = [], 0
    with (folder / "annotations" / "instances.json").open("w") as file:
        file.write('{"annotations": [')
        for image, count in enumerate(counts.tolist(), start=1):
            name = f"{image:012}.jpg"
            if image % 60_000 == 1:  # a file can have at most 65,000 hard links
                source = folder / f"{image}.jpg"
                source.write_bytes((folder / "one.jpg").read_bytes())
            os.link(source, folder / "images" / name)
            entries.append({"id": image, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for _ in range(count):
                number += 1
                corner, size = rng.uniform(0, 30, 2), rng.uniform(8, 16, 2)
                points = corner + size * rng.random((CORNERS, 2))
                points[:2] = corner, corner + size
                annotation = {
                    "id": number, "image_id": image, "category_id": int(rng.integers(1, CLASSES)),
                    "iscrowd": 0, "area": float(size.prod()),
                    "bbox": [*corner.round(2).tolist(), *size.round(2).tolist()],
                    "segmentation": [points.round(2).ravel().tolist()],
                }  # fmt: skip
                file.write(("," if number > 1 else "") + json.dumps(annotation))
        rest = {
            "images": entries,
            "categories": [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)],
        }
        file.write("]," + json.dumps(rest)[1:])


def own_memory(process: int | str = "self") -> float:
    """Returns the MiB of a process, including its share of shared pages."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return (
        next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024
    )


def rank(data: str, workers: int, output: Path) -> None:
    """Runs one training process, which opens the data and forks its loading processes."""
    from comask.config import DataConfig
    from comask.training.distributed import gather, join

    with join() as ranks:
        before, start = own_memory(), time.perf_counter()
        try:
            from comask.training.run import open_shared
        except ImportError:  # until 0.1 every process opened the data itself
            from comask.data import open_source

            source = open_source.training_sources(DataConfig(), data, None, 0)[0]
        else:
            source = open_shared(DataConfig(), data, None, 0, ranks).train
        seconds = time.perf_counter() - start
        pipes = []
        for _ in range(workers):
            done, go = os.pipe(), os.pipe()
            if not (child := os.fork()):
                for index in range(len(source)):
                    for annotation in source.annotations(
                        index
                    ):  # reads each number, as mask creation does
                        np.array(annotation["segmentation"][0])
                os.write(done[1], b".")
                os.read(go[0], 1)
                os._exit(0)
            pipes.append((child, done[0], go[1]))
        for _, done_file, _ in pipes:
            os.read(done_file, 1)
        gather(None)  # after this, every process has allocated its memory
        mine = {
            "seconds": seconds,
            "before": before,
            "rank": own_memory(),
            "workers": [own_memory(child) for child, _, _ in pipes],
        }
        every = gather(mine)
        for child, _, go_file in pipes:
            os.write(go_file, b".")
            os.waitpid(child, 0)
        if ranks.rank == 0:
            output.write_text(json.dumps(every))


def measured(python: list[str], data: str, ranks: int, workers: int) -> list[dict[str, Any]]:
    """Runs the ranks with one Python and returns their measurements."""
    output = Path(data, "found.json")
    launcher = [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    subprocess.run(
        [*launcher, __file__, "--rank", data, "--workers", str(workers), "--output", str(output)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found: list[dict[str, Any]] = json.loads(output.read_text())
    return found


@click.command()
@click.option("--images", default=118_287, show_default=True)
@click.option("--objects", default=860_001, show_default=True)
@click.option("--ranks", default=8, show_default=True, help="Training processes.")
@click.option("--workers", default=2, show_default=True, help="Loading processes per rank.")
@click.option("--other", metavar="COMMAND", help="A Python that imports another comask.")
@click.option("--rank", "data", hidden=True)
@click.option("--output", type=click.Path(path_type=Path), hidden=True)
def main(
    images: int,
    objects: int,
    ranks: int,
    workers: int,
    other: str | None,
    data: str | None,
    output: Path | None,
) -> None:
    """Print the seconds and MiB of each version."""
    if data is not None and output is not None:
        rank(data, workers, output)
        return
    with TemporaryDirectory() as folder:
        make(Path(folder), images, objects)
        size = (Path(folder) / "annotations" / "instances.json").stat().st_size / 2**20
        click.echo(
            f"{images} images, {objects} objects ({size:.0f} MiB of JSON), {ranks} ranks with "
            f"{workers} workers each"
        )
        commands = {"this": [sys.executable]} | ({"other": shlex.split(other)} if other else {})
        for which, python in commands.items():
            found = measured(python, folder, ranks, workers)
            seconds = max(entry["seconds"] for entry in found)
            before = sum(entry["before"] for entry in found)
            after = sum(entry["rank"] + sum(entry["workers"]) for entry in found)
            click.echo(
                f"{which:>6}: open after {seconds:.1f} s; {after - before:.0f} MiB more in all "
                f"processes, which had {before:.0f} MiB"
            )


if __name__ == "__main__":
    main()
