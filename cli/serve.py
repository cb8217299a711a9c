"""`comask-export --serve triton`: from a bundle to a model repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from comask.bundle import Bundle
from comask.cli.options import gathered
from comask.export.triton.repository import ServedModel, ServeRequest, write_repository

SERVERS = ("triton",)


def serve_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--serve`, and what only it uses as `serving`: `ServeRequest`."""
    options = [
        click.option("--serve", type=click.Choice(SERVERS), metavar="triton",
                     help="Write BUNDLE into a model repository."),
        click.option("--backend", default="onnxruntime", metavar="NAME[:PRECISION]",
                     help="--serve: tensorrt, … [onnxruntime]"),
        click.option("--engines", metavar="NAME",
                     help="--serve: which of several engine folders."),
        click.option("--model-name", default="comask", metavar="NAME",
                     help="--serve: what clients ask for. [comask]"),
        click.option("--max-batch", type=click.IntRange(1), metavar="N",
                     help="--serve: images a request. [8]"),
    ]  # fmt: skip
    function = gathered("serving", ServeRequest)(function)
    for option in reversed(options):
        function = option(function)
    return function


def serve_bundle(
    source: Path, output: Path | None, request: ServeRequest, *, to_stderr: bool
) -> ServedModel:
    """Writes the repository, and says what its server needs.

    Raises:
        UsageError: there is no `--output`, or `source` is a checkpoint.
        ComaskError: see `write_repository`.
    """
    if source.is_file():
        raise click.UsageError(f"--serve takes a bundle, and {source} is a file: export it first")
    if output is None:
        raise click.UsageError("--output is missing: the model repository needs a folder")
    served = write_repository(Bundle.open(source), output, request)
    needs = "comask in the server's Python"
    if version := served.needs.get("tensorrt_version"):
        needs += f", TensorRT {version}, {served.needs['gpu']}"
    click.echo(
        f"{output}: {served.model} on {served.backend}, up to {served.max_batch_size} images at once; "
        f"needs {needs}: see docs/serving.md",
        err=to_stderr,
    )
    return served
