"""`comask-infer --runner`: jobs over more images than one run gets through."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import click

from comask.cli.options import Interruption, write_json
from comask.errors import BackendUnavailableError, one_line
from comask.progress import Progress
from comask.runtime.backends import LoadOptions

if TYPE_CHECKING:
    from comask.runtime.jobs.job import Format, Job
    from comask.runtime.jobs.runners import Runner

RUNNERS = ("ray", "local")
FORMATS = ("parquet", "jsonl")  # as `Format`
SHARD = 200  # images: what a kill loses a worker, at most
SHOWN_FAILURES = 20
NOT_FOR_JOBS = ("save", "threshold", "every", "track", "decode", "encode")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """What a job takes besides bundle, inputs and output.

    Attributes:
        runner: of `RUNNERS`.
        format: of the parts.
        shard: images a part.
        actors: of Ray; None for as many as there is room for.
    """

    runner: str
    format: Format
    shard: int
    actors: int | None


def fleet_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options, which reach the command as `fleet`: `FleetOptions`, None without `--runner`."""

    @click.option("--runner", type=click.Choice(RUNNERS),
                  help="A job that goes on after a kill: docs/fleet.md.")  # fmt: skip
    @click.option(
        "--format", "form", type=click.Choice(FORMATS), help="Jobs: of the parts. [parquet]"
    )
    @click.option("--shard", type=click.IntRange(1), metavar="N",
                  help=f"Jobs: images a part. [{SHARD}]")  # fmt: skip
    @click.option("--actors", type=click.IntRange(1), metavar="N",
                  help="--runner ray: how many. [all GPUs, else CPUs]")  # fmt: skip
    @functools.wraps(function)
    def run(
        *,
        runner: str | None,
        form: Format | None,
        shard: int | None,
        actors: int | None,
        **rest: Any,
    ) -> None:
        own = {"--format": form, "--shard": shard, "--actors": actors}
        if given := [name for name, value in own.items() if value is not None]:
            if runner is None:
                raise click.UsageError(f"{given[0]} goes with --runner")
            if runner == "local" and actors is not None:
                raise click.UsageError("--actors goes with --runner ray")
        if runner == "ray" and isinstance(rest["how"].device, int):
            raise click.UsageError("--device: Ray tells GPUs apart itself; cpu, or leave it out")
        context = click.get_current_context()
        for name in NOT_FOR_JOBS if runner else ():
            if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
                raise click.UsageError(f"--{name} does not go with --runner")
        fleet = None
        if runner:
            fleet = FleetOptions(
                runner=runner, format=form or "parquet", shard=shard or SHARD, actors=actors
            )
        function(fleet=fleet, **rest)

    return run


def run_fleet(
    bundle: Path,
    inputs: tuple[str, ...],
    output: str,
    backend: str,
    how: LoadOptions,
    fleet: FleetOptions,
    json_file: str | None,
) -> None:
    """Begins the job, or continues it; exits as the command does.

    Raises:
        ComaskError: when it cannot be begun or ended.
    """
    stop = Interruption()
    try:
        with stop.on_signal(_leave), ExitStack() as stack:
            summary = _run(bundle, inputs, output, backend, how, fleet, stack)
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
    """A signal came: no error, and not to be taken for one on its way up; says how far it was."""


def _leave() -> None:
    raise _Left


def _run(
    bundle: Path,
    inputs: tuple[str, ...],
    output: str,
    backend: str,
    how: LoadOptions,
    fleet: FleetOptions,
    stack: ExitStack,
) -> dict[str, Any]:
    """The summary of the job, which is finished then."""
    _require_packages(fleet)
    from comask.bundle import Bundle
    from comask.runtime.jobs.folder import Folder, is_url
    from comask.runtime.jobs.job import Job, Terms, bundle_digest, full_name
    from comask.runtime.jobs.listing import write_listing
    from comask.runtime.jobs.runners import Shard, run_all
    from comask.runtime.jobs.worker import Model

    opened = Bundle.open(bundle)  # before Ray is started for it
    if fleet.format == "parquet":
        opened.manifest.require_int64_ids("Parquet's category_id: --format jsonl takes any")
    folder = Folder(output if is_url(output) else str(Path(output).absolute()))
    there = Job.terms_in(folder)
    model = Model(str(bundle.resolve()), backend, how)
    runner: Runner | None = None
    if backend == "auto":
        if there:
            backend = there.backend
        else:
            runner = _runner(fleet, how, stack)
            backend = runner.backend(model)
    backend = full_name(backend)
    digest = bundle_digest(bundle, backend)
    model = replace(model, backend=backend, digest=digest)
    with TemporaryFile() as file:  # which has no name that a kill would leave
        listing = write_listing(inputs, file, fleet.shard)
        terms = Terms(
            images=listing.images,
            inputs=listing.sha256,
            bundle=digest,
            backend=backend,
            proposals=how.proposals,
            short_side=how.short_side,
            shard=fleet.shard,
            format=fleet.format,
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
                run_all(job, model, left, runner or _runner(fleet, how, stack), progress.advance)
            except _Left:
                ready = sum(job.images_in(record.shard) for record in job.done())
                raise _Left(f": {ready} of {terms.images} images are done") from None
    summary = job.finish()
    _show_failures(job, summary["failed"])
    return summary


def _require_packages(fleet: FleetOptions) -> None:
    """Refuses to begin where a package is missing.

    Raises:
        BackendUnavailableError: naming all that are.
    """
    needed = ["fsspec"]
    if fleet.runner == "ray":
        needed += ["pyarrow", "ray"]  # Ray Data takes it whatever the parts' format
    elif fleet.format == "parquet":
        needed.append("pyarrow")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"--runner {fleet.runner} --format {fleet.format} needs {', '.join(needed)}; not "
            f"installed: {', '.join(missing)}: pip install 'comask[fleet]'"
        )


def _show_failures(job: Job, count: int) -> None:
    failures = (failure["error"] for record in job.done() for failure in record.failures)
    for error in islice(failures, SHOWN_FAILURES):
        click.echo(f"skipped: {error}", err=True)
    if count > SHOWN_FAILURES:
        click.echo(f"and {count - SHOWN_FAILURES} more", err=True)


def _runner(fleet: FleetOptions, how: LoadOptions, stack: ExitStack) -> Runner:
    from comask.runtime.jobs.runners import LocalRunner

    if fleet.runner == "local":
        return LocalRunner()
    from comask.runtime.jobs.ray_runner import RayRunner

    return stack.enter_context(RayRunner(fleet.actors, cpu=how.device == "cpu"))
