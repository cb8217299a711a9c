"""Measures what augmentation brings with few images: 160 of shapes, beside the horizontal flip alone.

Every row is `shapes-tiny` on the same 160 images, trained for as many steps as the preset has, with
several seeds, and scored on the same 200 unseen images. A stopped run continues where it ended.

    python benchmarks/augmentation.py --output runs/augmentation --seeds 3
"""

from __future__ import annotations

import statistics
from pathlib import Path

import click
from shapes_runs import TEST_IMAGES, measured

IMAGES = 160
# 32 epochs of 160 images are as many steps as the preset's 2 of 2560.
FEW = (f"data.shapes_train={IMAGES}", "train.epochs=32")
SCALES, TURNS = "data.scale_range=[0.6, 1.6]", "data.turn_probability=0.75"
PASTE, COLOUR = "data.copy_paste_probability=0.5", "data.colour=0.2"
VARIANTS = {
    "flip alone": (),
    "turns": (TURNS, "data.vertical_flip_probability=0.5"),
    "sizes and crops": (SCALES,),
    "copy-paste": (PASTE,),
    "colour": (COLOUR,),
    "all": (SCALES, TURNS, "data.vertical_flip_probability=0.5", PASTE, COLOUR),
}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", type=click.IntRange(2), default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="Only these rows.")
def main(output: Path, seeds: int, only: tuple[str, ...]) -> None:
    """Print a Markdown table and write its rows to OUTPUT/rows.jsonl."""
    lines = [
        f"mean ± sd of {seeds} seeds, {IMAGES} training images, {TEST_IMAGES} unseen images; gain: mean "
        f"of the paired differences ± its standard error",
        "",
        "| augmentation | mask AP | gain | box AP | gain |",
        "|---|---|---|---|---|",
    ]
    first: dict[str, list[float]] = {}
    for name in only or VARIANTS:
        rows = measured(output, name, (*FEW, *VARIANTS[name]), seeds)
        cells = [name]
        for metric in ("mask_ap", "box_ap"):
            values = [100 * row[metric] for row in rows]
            gains = [a - b for a, b in zip(values, first.setdefault(metric, values), strict=True)]
            error = statistics.stdev(gains) / len(gains) ** 0.5
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
            cells.append(f"{statistics.mean(gains):+.1f} ± {error:.1f}" if any(gains) else "")
        lines.append("| " + " | ".join(cells) + " |")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
