"""`comask-doctor`: what is installed, what each part can do, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from comask.cli.options import command, json_option, write_json
from comask.errors import one_line

if TYPE_CHECKING:
    from comask.runtime.doctor import Finding

MARKS = {"ok": "ok    ", "absent": "absent", "broken": "BROKEN"}


@command
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--need", "needed", multiple=True, metavar="NAME",
              help="Fail when this is absent: gpu, torch, tensorrt-rtx and so on.")  # fmt: skip
@json_option
def main(bundle: Path | None, needed: tuple[str, ...], json_file: str | None) -> None:
    """Say what this installation can do, and what mends the rest; with BUNDLE, whether it is whole.

    What is absent is no fault, since nobody needs everything; what is broken is. Exits with 1 when
    something is broken, or absent though --need names it.

    \b
    comask-doctor
    comask-doctor bundle --need gpu --need tensorrt-rtx
    """
    from comask.runtime.doctor import diagnose, diagnose_bundle

    findings = diagnose()
    if bundle is not None:
        findings += diagnose_bundle(bundle)
    unknown = sorted(set(needed) - {finding.name for finding in findings})
    if unknown:
        names = ", ".join(finding.name for finding in findings)
        raise click.UsageError(f"--need {unknown[0]}: expected one of {names}")
    faults = [
        finding
        for finding in findings
        if finding.status == "broken" or (finding.status == "absent" and finding.name in needed)
    ]
    for finding in findings:
        _print(finding, to_stderr=json_file == "-")
    named = ", ".join(finding.name for finding in faults)
    verdict = one_line(f"{len(faults)} to mend: {named}") if faults else "all is well"
    click.echo(verdict, err=json_file == "-")
    write_json(
        json_file,
        {"healthy": not faults, "findings": [dataclasses.asdict(finding) for finding in findings]},
    )
    if faults:
        sys.exit(1)


def _print(finding: Finding, *, to_stderr: bool) -> None:
    line = one_line(f"{finding.name}: {finding.found}")
    click.echo(f"{MARKS[finding.status]}  {line}", err=to_stderr)
    if finding.mend:
        click.echo(f"        -> {one_line(finding.mend)}", err=to_stderr)
