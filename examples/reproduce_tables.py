"""Trains the models of the paper's Tables 1 to 3 and writes their AP beside the paper's figures.

python examples/reproduce_tables.py /data/coco runs/tables
python examples/reproduce_tables.py /data/coco runs/tables --processes 4 --set train.batch_size=16

Each row is a run of `comask train`. A run that was stopped continues, and the result of a finished run is
read. The paper scores Table 1 on test-dev, whose annotations are not public. Here every row is scored on
val2017, which are the images of "minival" in Tables 2 and 3.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from comask.training.record import read_evaluations

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Row:
    """One row of a table, with its preset and the paper's mask AP in points."""

    table: int
    name: str
    preset: str
    paper: tuple[float, ...]


ROWS = (
    Row(1, "CoMask, ResNet-50", "comask-r50", (37.7, 59.0, 40.9, 21.0, 40.9, 48.5)),
    Row(1, "CoMask, ResNet-101", "comask-r101", (38.6, 60.1, 41.9, 21.2, 41.9, 50.3)),
    Row(2, "CoMask, 1 branch", "comask1-r50", (36.7, 57.4, 39.6, 19.8, 40.3, 49.1)),
    Row(2, "CoMask, 2 branches", "comask2-r50", (37.2, 58.2, 40.2, 20.1, 40.9, 49.9)),
    Row(2, "CoMask, 4 branches", "comask-r50", (37.3, 58.2, 40.2, 20.2, 40.8, 50.3)),
    Row(3, "CoMask", "comask-r50", (37.3, 58.2, 40.2, 20.2, 40.8, 50.3)),
    Row(3, "w/o collaboration", "no-collaboration-r50", (37.0, 58.2, 39.8, 20.3, 40.5, 49.9)),
)


def train(preset: str, data: str, output: Path, processes: int, settings: tuple[str, ...]) -> None:
    """Runs `comask train` in `output` until it is finished."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [
        *launcher, "comask.cli.train", "--data", data, "--val", data, "--preset", preset,
        "--output", str(output), "--resume",
    ]  # fmt: skip
    for setting in settings:
        command += ["--set", setting]
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise click.ClickException(
            f"{output}: comask train exited with {error.returncode}"
        ) from error


def mask_ap(run: Path) -> list[float]:
    """Returns the mask AP of the run's last evaluation in points."""
    evaluations = read_evaluations(run)
    if not evaluations:
        raise click.ClickException(f"{run}: has no evaluation; do not set train.evaluate_every")
    return [evaluations[-1].points("final", "segm", name) for name in METRICS]


def table(rows: dict[Row, list[float]]) -> str:
    """Returns a Markdown table with one line per row; each cell is our figure / the paper's."""
    lines = ["| table | model | " + " | ".join(METRICS) + " |", "|" + "---|" * (2 + len(METRICS))]
    for row, measured in rows.items():
        cells = [
            f"{ours:.1f} / {paper:.1f}" for ours, paper in zip(measured, row.paper, strict=True)
        ]
        lines.append(f"| {row.table} | {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("data")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--processes", default=1, show_default=True, help="Number of GPUs per training.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting of every row."
)
def main(data: str, output: Path, processes: int, settings: tuple[str, ...]) -> None:
    """Reproduce Tables 1 to 3 with COCO 2017 in DATA and write OUTPUT/tables.md."""
    measured: dict[Row, list[float]] = {}
    for row in ROWS:
        run = output / row.preset
        train(row.preset, data, run, processes, settings)
        measured[row] = mask_ap(run)
        (output / "tables.md").write_text("Mask AP, ours / paper.\n\n" + table(measured))
    click.echo((output / "tables.md").read_text())


if __name__ == "__main__":
    main()
