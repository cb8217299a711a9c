"""`comask doctor`: what is installed, what each part can do, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from comask.cli.command import command, option
from comask.cli.options import check_outputs, json_option, write_json
from comask.errors import one_line

MARKS = {"ok": "ok    ", "absent": "absent", "broken": "BROKEN"}


@command
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@option("--need", "needed", multiple=True, metavar="NAME",
              help="Fail when this is absent: gpu, torch, tensorrt-rtx and so on.")  # fmt: skip
@json_option
def main(bundle: Path | None, needed: tuple[str, ...], json_file: str | None) -> None:
    """Report what this installation can do and how to fix the rest; with a bundle, check that too.

    Exits with 1 when something is broken, or when something that --need names is absent.

    \b
    comask doctor
    comask doctor bundle --need gpu --need tensorrt-rtx
    """
    check_outputs(json=json_file)
    from comask.runtime.doctor import diagnose
    from comask.runtime.doctor_bundle import diagnose_bundle

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
    lines = []
    for finding in findings:
        found = one_line(f"{finding.name}: {finding.found}")
        lines.append(f"{MARKS[finding.status]}  {found}")
        if finding.fix:
            lines.append(f"        -> {one_line(finding.fix)}")
    named = ", ".join(finding.name for finding in faults)
    lines.append(one_line(f"{len(faults)} to fix: {named}") if faults else "all is well")
    click.echo("\n".join(lines), err=json_file == "-")
    content = {"healthy": not faults, "findings": [dataclasses.asdict(f) for f in findings]}
    write_json(json_file, content)
    if faults:
        sys.exit(1)
