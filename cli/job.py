"""`comask job`: a bundle on more images than one run gets through; continues after a kill."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import click

from comask.cli.command import command, option
from comask.cli.options import (
    Interruption,
    backend_option,
    check_outputs,
    gathered,
    json_option,
    predictor_options,
    write_json,
)
from comask.errors import BackendUnavailableError, one_line
from comask.progress import Progress

if TYPE_CHECKING:
    from comask.runtime.backends import LoadOptions
    from comask.runtime.jobs.job import Format, Job
    from comask.runtime.jobs.runners import Runner

RUNNERS = ("local", "ray")
FORMATS = ("parquet", "jsonl")  # as `Format`
SHARD = 200  # images: what a kill loses a worker, at most
SHOWN_FAILURES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """The options of a job.

    Attributes:
        runner: one of `RUNNERS`.
        format: the parts' format.
        shard: images per part.
        actors: number of Ray's workers; None for as many as the cluster has room for.
    """

    runner: str
    format: Format
    shard: int
    actors: int | None = None


@command
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@option("--output", required=True, metavar="DIR|ADDRESS", help="Folder of the job and its results.")
@option("--runner", type=click.Choice(RUNNERS), default="local",
        help="This process, or a Ray cluster. [local]")  # fmt: skip
@option("--format", type=click.Choice(FORMATS), default="parquet",
        help="Format of the parts. [parquet]")  # fmt: skip
@option("--shard", type=click.IntRange(1), default=SHARD, metavar="N",
        help=f"Images per part. [{SHARD}]")  # fmt: skip
@option("--actors", type=click.IntRange(1), metavar="N",
        help="Number of Ray's workers. [all GPUs, else all CPUs]")  # fmt: skip
@json_option
@backend_option
@predictor_options(batch=8)
@gathered("options", JobOptions)
def main(
    bundle: Path,
    inputs: tuple[str, ...],
    output: str,
    backend: str,
    how: LoadOptions,
    options: JobOptions,
    json_file: str | None,
) -> None:
    """Run a bundle on millions of images; the same command continues after a kill.

    An INPUT is an image, a folder, a pattern, or @LIST, local or in object storage (s3://…). Results are
    parts in DIR/parts. Images that cannot be run are listed in failures.jsonl; the exit code is then 1.

    \b
    comask job bundle 's3://photos/**/*.jpg' --output s3://results --runner ray
    """
    check_outputs(made=output, json=json_file)
    if options.runner == "local" and options.actors is not None:
        raise click.UsageError("--actors needs --runner ray")
    if options.runner == "ray" and isinstance(how.device, int):
        raise click.UsageError("--device: Ray assigns GPUs itself; give cpu, or leave it out")
    stop = Interruption()
    try:
        with stop.on_signal(_leave), ExitStack() as stack:
            summary = _run(bundle, inputs, output, backend, how, options, stack)
    except _Left as left:
        click.echo(
            f"interrupted{left}; the same command continues the job in {one_line(output)}", err=True
        )
        sys.exit(128 + stop.signal)
    click.echo(
        f"{summary['images'] - summary['failed']} of {summary['images']} images, "
        f"{summary['detections']} detections in {one_line(output)}/parts",
        err=json_file == "-",
    )
    write_json(json_file, summary)
    if summary["failed"]:
        click.echo(f"failures: {one_line(output)}/failures.jsonl", err=True)
        sys.exit(1)


class _Left(BaseException):
    """Interrupted, with how far the job got. A BaseException, so that no handler swallows it."""


def _leave() -> None:
    raise _Left


def _run(
    bundle: Path,
    inputs: tuple[str, ...],
    output: str,
    backend: str,
    how: LoadOptions,
    options: JobOptions,
    stack: ExitStack,
) -> dict[str, Any]:
    """Runs the job to its end and returns its summary."""
    _require_packages(options)
    from comask.bundle import Bundle
    from comask.runtime.jobs.folder import Folder, is_url
    from comask.runtime.jobs.job import Job, Terms, bundle_digest, full_name
    from comask.runtime.jobs.listing import write_listing
    from comask.runtime.jobs.runners import Shard, run_all
    from comask.runtime.jobs.worker import Model

    opened = Bundle.open(bundle)  # before Ray is started for it
    if options.format == "parquet":
        opened.manifest.require_int64_ids("Parquet's category_id: --format jsonl takes any")
    folder = Folder(output if is_url(output) else str(Path(output).absolute()))
    there = Job.terms_in(folder)
    model = Model(str(bundle.resolve()), backend, how)
    runner: Runner | None = None
    if backend == "auto":
        if there:
            backend = there.backend
        else:
            runner = _runner(options, how, stack)
            backend = runner.backend(model)
    backend = full_name(backend)
    digest = bundle_digest(bundle, backend)
    model = replace(model, backend=backend, digest=digest)
    with TemporaryFile() as file:  # which has no name that a kill would leave
        listing = write_listing(inputs, file, options.shard)
        terms = Terms(
            images=listing.images,
            inputs=listing.sha256,
            bundle=digest,
            backend=backend,
            proposals=how.proposals,
            short_side=how.short_side,
            **how.views(),
            shard=options.shard,
            format=options.format,
        )
        job = Job.begin(folder, terms, listing)
    done = {record.shard for record in job.done()}
    left = [Shard(i, *listing.offsets[i : i + 2]) for i in range(job.shards) if i not in done]
    if not left and (summary := job.summary()):
        click.echo(
            f"the job in {one_line(output)} is finished already; another one needs another --output",
            err=True,
        )
        return summary
    finished = sum(map(job.images_in, done))
    if there:
        click.echo(f"continues: {finished} of {terms.images} images are done", err=True)
    click.echo(f"backend {backend}", err=True)
    if left:
        with Progress("inferring", terms.images, unit="images", done=finished) as progress:
            try:
                run_all(job, model, left, runner or _runner(options, how, stack), progress.advance)
            except _Left:
                ready = sum(job.images_in(record.shard) for record in job.done())
                raise _Left(f": {ready} of {terms.images} images are done") from None
    summary = job.finish()
    _show_failures(job, summary["failed"])
    return summary


def _require_packages(options: JobOptions) -> None:
    """Checks that all packages are installed before the job begins.

    Raises:
        BackendUnavailableError: naming all that are.
    """
    needed = ["fsspec"]
    if options.runner == "ray":
        needed += ["pyarrow", "ray"]  # Ray Data takes it whatever the parts' format
    elif options.format == "parquet":
        needed.append("pyarrow")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"--runner {options.runner} --format {options.format} needs {', '.join(needed)}; not "
            f"installed: {', '.join(missing)}: pip install 'comask[jobs]'"
        )


def _show_failures(job: Job, count: int) -> None:
    if not count:
        return
    failures = (failure["error"] for record in job.done() for failure in record.failures)
    for error in islice(failures, SHOWN_FAILURES):
        click.echo(f"skipped: {error}", err=True)
    if count > SHOWN_FAILURES:
        click.echo(f"and {count - SHOWN_FAILURES} more", err=True)


def _runner(options: JobOptions, how: LoadOptions, stack: ExitStack) -> Runner:
    from comask.runtime.jobs.runners import LocalRunner

    if options.runner == "local":
        return LocalRunner()
    from comask.runtime.jobs.ray_runner import RayRunner

    return stack.enter_context(RayRunner(options.actors, cpu=how.device == "cpu"))
