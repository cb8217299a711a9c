"""`comask check`: whether a data set is sound, before hours of training find out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import click

from comask.cli.command import command, option
from comask.cli.options import check_outputs, json_option, write_json
from comask.errors import one_line

SHAPES_IMAGES = 1000  # as many as `comask shapes` writes


@command
@click.argument("data", metavar="DATA|shapes")
@option("--split", type=click.Choice(["train", "val"]), default="train",
        help="Which part of the data. [train]")  # fmt: skip
@option("--boxes", type=click.Choice(["annotated", "mask"]), default="annotated",
        help="Use the annotated boxes, or the masks' bounds. [annotated]")  # fmt: skip
@json_option
@option("--page", type=click.Path(path_type=Path), metavar="FILE",
        help="Write a page with histograms and pictures: .html.")  # fmt: skip
def main(
    data: str,
    split: Literal["train", "val"],
    boxes: Literal["annotated", "mask"],
    json_file: str | None,
    page: Path | None,
) -> None:
    """Check a data set as training and evaluation do, and count what it holds.

    It may have any of the formats that comask train takes. Prints a line for each kind of problem with
    examples. Exits with 1 when something has to be left out or changed.

    \b
    comask check /data/mine
    comask check /data/mine --page check.html
    """
    check_outputs(json=json_file, page=page)
    if page is not None:
        from comask.data.check_page import require_matplotlib, write_check_page

        require_matplotlib()
    from comask.data.open_data import open_source
    from comask.data.problems import without_objects
    from comask.data.summary import Summary

    to_stderr = json_file == "-"

    def report(line: str) -> None:
        click.echo(line, err=to_stderr)

    source = open_source(
        data, split, shapes_images=SHAPES_IMAGES, shapes_seed=0, boxes=boxes, report=report
    )
    summary = Summary.of(source)
    report(
        f"{one_line(data)}: {_count(summary.images, 'image')}, {_count(summary.objects, 'object')}, "
        f"{_count(summary.crowds, 'crowd')}; {_count(summary.without_objects, 'image')} without an "
        "object"
    )
    there = [category for category in summary.categories if category.objects]
    if empty := [category.name for category in summary.categories if not category.objects]:
        report(without_objects(empty, "not trained"))
    for category in there:
        report(
            f"  {one_line(category.name)}: {_count(category.objects, 'object')} in "
            f"{_count(category.images, 'image')}"
        )
    unsound = "a part is left out or changed: see the lines above"
    report("the whole data set is used" if summary.sound else unsound)
    write_json(json_file, dataclasses.asdict(summary))
    if page is not None:
        write_check_page(source, summary, page, title=f"Data set {one_line(data)}")
        report(f"wrote {page}")
    if not summary.sound:
        sys.exit(1)


def _count(number: int, noun: str) -> str:
    """Returns `1 image` or `2 images`."""
    return f"{number} {noun}{'s' * (number != 1)}"
