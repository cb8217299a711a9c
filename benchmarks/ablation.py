"""Repeats the paper's ablations (Tables 2 and 3) on shapes: MSFEM branches and collaboration.

Every row is `shapes-tiny` with one setting changed, trained with several seeds and scored on the same
200 unseen images. `make ablation` runs this program; a stopped run continues where it ended.

python benchmarks/ablation.py --output runs/ablation --seeds 3
"""

from __future__ import annotations

import statistics
from pathlib import Path

import click
from shapes_runs import TEST_IMAGES, measured

VARIANTS = {
    "1 branch": ("model.msfem_branches=1",),
    "2 branches": (),
    "4 branches": ("model.msfem_branches=4",),
    "w/o collaboration": ("model.collaboration=uniform",),
}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", type=click.IntRange(2), default=3, show_default=True)
def main(output: Path, seeds: int) -> None:
    """Print a Markdown table and write its rows to OUTPUT/rows.jsonl."""
    lines = [
        f"mean ± sd of {seeds} seeds, {TEST_IMAGES} unseen images",
        "",
        "| variant | mask AP | box AP | GFLOP per image | parameters |",
        "|---|---|---|---|---|",
    ]
    for name, settings in VARIANTS.items():
        rows = measured(output, name, settings, seeds)
        cells = [name]
        for metric in ("mask_ap", "box_ap"):
            values = [100 * row[metric] for row in rows]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        cells += [f"{rows[0]['gflop_per_image']:.2f}", f"{rows[0]['parameters'] / 1e6:.2f} M"]
        lines.append("| " + " | ".join(cells) + " |")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
