"""`comask serve`: from a bundle to a model repository of Triton."""

from __future__ import annotations

from pathlib import Path

import click

from comask.bundle import Bundle
from comask.cli.command import command, option
from comask.cli.options import check_outputs, gathered, json_option, write_json
from comask.export.triton.repository import ServeRequest, write_repository


@command
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--output", required=True, type=click.Path(path_type=Path), metavar="DIR",
        help="Folder of the model repository.")  # fmt: skip
@option("--backend", default="onnxruntime", metavar="NAME[:PRECISION]",
        help="What runs the stages: onnxruntime or tensorrt. [onnxruntime]")  # fmt: skip
@option("--engines", metavar="NAME", help="Engine folder to use, if the bundle has several.")
@option(
    "--model-name", default="comask", metavar="NAME", help="Name that clients ask for. [comask]"
)
@option("--batch", "max_batch", type=click.IntRange(1), metavar="N", aliases=("--max-batch",),
        help="Most images per request. [8, or what the engines take]")  # fmt: skip
@json_option
@gathered("request", ServeRequest)
def main(bundle: Path, output: Path, request: ServeRequest, json_file: str | None) -> None:
    """Write a bundle into a model repository for the Triton Inference Server.

    \b
    comask serve bundle --output repository --backend tensorrt:fp16
    """
    check_outputs(made=output, json=json_file)
    served = write_repository(Bundle.open(bundle), output, request)
    needs = "comask in the server's Python"
    if version := served.needs.get("tensorrt_version"):
        needs += f", TensorRT {version}, {served.needs['gpu']}"
    click.echo(
        f"{output}: {served.model} on {served.backend}, up to {served.max_batch_size} images at once; "
        f"needs {needs}: see docs/serving.md",
        err=json_file == "-",
    )
    write_json(json_file, served.to_dict())
