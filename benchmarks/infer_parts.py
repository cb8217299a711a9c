"""Times the parts of `comask infer` one by one, then the command, which runs them at the same time.

python benchmarks/infer_parts.py BUNDLE PHOTOS [--count 60 --backend onnxruntime --repeats 3]

The command cannot be faster than its slowest part, nor than its CPU seconds shared by all cores.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from comask.cli.infer_images import OverlayFiles, OverlayFormat
from comask.draw import draw_overlay
from comask.media_files import IMAGE_SUFFIXES
from comask.parallel import cores
from comask.preprocess import pixels_of
from comask.runtime import Predictor

BATCH = 8  # the command's default


def timed(work: Callable[[], list[Any]]) -> tuple[list[Any], float]:
    """Returns what `work` returns, and its seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def parts(bundle: str, backend: str, photos: list[Path], format: OverlayFormat) -> dict[str, float]:
    """Returns the seconds of each part alone, in one thread but for the network's own."""
    with Predictor.load(bundle, backend) as predictor:
        decoded, decoding = timed(lambda: [pixels_of(photo) for photo in photos])
        prepared, preparing = timed(lambda: [predictor.prepare(pixels) for pixels in decoded])
        predictor.predict_prepared(prepared[:BATCH])  # to allocate memory
        windows = [prepared[i : i + 2 * BATCH] for i in range(0, len(prepared), 2 * BATCH)]
        found, network = timed(
            lambda: list(itertools.chain(*map(predictor.predict_prepared, windows)))
        )
    shown = [each[each.scores >= 0.5] for each in found]
    drawn, drawing = timed(lambda: list(map(draw_overlay, decoded, shown)))
    files = OverlayFiles(format, None)
    with tempfile.TemporaryDirectory() as folder:
        _, encoding = timed(
            lambda: [
                files.write(Path(folder) / photo.name, overlay, photo)
                for photo, overlay in zip(photos, drawn, strict=True)
            ]
        )
    return {
        "decode": decoding, "prepare": preparing, "network": network, "draw": drawing,
        f"encode {format}": encoding,
    }  # fmt: skip


def command(
    bundle: str, backend: str, photos: list[Path], format: OverlayFormat
) -> tuple[float, float, float]:
    """Returns the command's seconds: of the images, of the whole process, and of the CPUs."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            ["comask", "infer", bundle, *photos, "--backend", backend, "--output", folder,
             "--overlay-format", format, "--json", report], check=True, capture_output=True,
        )  # fmt: skip
        whole = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return json.loads(report.read_text())["seconds"], whole, cpu


@click.command()
@click.argument("bundle")
@click.argument("photos", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--count", default=60)
@click.option("--backend", default="onnxruntime")
@click.option("--repeats", default=3)
def main(bundle: str, photos: Path, count: int, backend: str, repeats: int) -> None:
    """Prints a Markdown table for the folder PHOTOS."""
    files = [file for file in sorted(photos.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
    if len(files) < count:
        sys.exit(f"{photos}: {len(files)} images, --count asks for {count}")
    files = files[:count]
    print("| overlays | slowest part | CPU s / cores | bound | images | ratio | with start |")
    print("|---|---|---|---|---|---|---|")
    for format in ("jpeg", "png"):
        rows = []
        for _ in range(repeats):
            alone = parts(bundle, backend, files, format)
            slowest = max(alone, key=lambda name: alone[name])
            images, whole, cpu = command(bundle, backend, files, format)
            _, start, start_cpu = command(bundle, backend, files[:1], format)
            shared = (cpu - start_cpu) / cores()
            bound = max(alone[slowest], shared)
            rows.append(
                (images / bound, slowest, alone[slowest], shared, bound, images, whole, start)
            )
        ratio, slowest, alone_s, shared, bound, images, whole, start = sorted(rows)[len(rows) // 2]
        print(
            f"| {format} | {slowest} {alone_s:.2f} s | {shared:.2f} s | {bound:.2f} s | {images:.2f} s "
            f"| {ratio:.2f} | {whole:.2f} s, {start:.2f} s of it for a single image |",
            flush=True,
        )
        print(
            f"ratios of all repeats: {', '.join(f'{row[0]:.2f}' for row in rows)}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
