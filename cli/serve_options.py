"""The options of `comask-export` that make a server's model repository from a bundle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from comask.cli.options import write_json
from comask.export.triton.repository import ServeRequest, write_repository

SERVERS = ("triton",)
SERVE_PARAMETERS = ("serve", "backend", "engines", "model_name", "max_batch")
SHARED_PARAMETERS = ("source", "output", "json_file", "verbose")  # with or without --serve


def serve_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--serve` and what only it uses; they reach the command as `serve`, None where not wanted."""
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

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        _check_usage(arguments["serve"])
        taken = {name: arguments.pop(name) for name in SERVE_PARAMETERS}
        wanted = taken.pop("serve") is not None
        function(serve=ServeRequest(**taken) if wanted else None, **arguments)

    for option in reversed(options):
        run = option(run)
    return run


def _check_usage(serve: str | None) -> None:
    """Refuses options that `--serve` does not use, and those that need it.

    Raises:
        UsageError: naming the first.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is click.core.ParameterSource.DEFAULT or name in SHARED_PARAMETERS:
            continue
        if serve is None and name in SERVE_PARAMETERS:
            raise click.UsageError(f"{parameter.opts[0]} needs --serve")
        if serve is not None and name not in SERVE_PARAMETERS:
            raise click.UsageError(
                f"{parameter.opts[0]} changes a bundle, and --serve takes one as it is: run "
                f"comask-export twice"
            )


def serve_bundle(
    source: Path, output: Path | None, request: ServeRequest, json_file: str | None
) -> None:
    """Writes the repository, and says what its server needs.

    Raises:
        UsageError: there is no `--output`, or `source` is a checkpoint.
        ComaskError: see `write_repository`.
    """
    from comask.bundle import Bundle

    if source.is_file():
        raise click.UsageError(f"--serve takes a bundle, and {source} is a file: export it first")
    if output is None:
        raise click.UsageError("--output is missing: the model repository needs a folder")
    written = write_repository(Bundle.open(source), output, request)
    needs = "comask in the server's Python"
    if "tensorrt_version" in written:
        needs += f", TensorRT {written['tensorrt_version']}, {written['gpu']}"
    click.echo(
        f"{output}: {written['model']} on {written['backend']}, up to {written['max_batch_size']} "
        f"images at once; needs {needs}: see docs/serving.md",
        err=json_file == "-",
    )
    write_json(json_file, written)
