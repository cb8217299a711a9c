"""`make gpu-check`: builds and runs everything that needs a GPU, and prints one table.

It needs no installation: run it with any Python from 3.11 on that has torch. Rows whose packages are
missing are `unavailable` and name them. Nothing is downloaded. Every row runs in its own process, because
an abort or a failed kernel makes CUDA unusable in its process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rows import Check, Row

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_VERSION = 1
FOLDERS = ("export", "runtime", "cli", "calib")  # sub-packages beside `comask/`


def main() -> int:
    """Runs all checks, or those that `--only` names, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write machine, versions and rows to this file")
    parser.add_argument(
        "--bundle", type=Path, help="a trained bundle; without it, shapes-tiny is trained"
    )
    parser.add_argument(
        "--only", default="", help="run only the rows whose name contains this text"
    )
    parser.add_argument(
        "--rehearse", action="store_true",
        help="use small sizes on the CPU to test the code of the rows; proves nothing about a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--row", nargs=3, metavar=("GROUP", "NAME", "FOLDER"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if importlib.util.find_spec("numpy") is None:
        sys.exit(f"error: {sys.executable} has no numpy; name a Python that has it with PYTHON=…")
    if options.bundle and not (options.bundle / "manifest.json").is_file():
        sys.exit(f"error: {options.bundle}: there is no bundle here; comask export writes one")
    if options.row:
        return run_here(options)
    with tempfile.TemporaryDirectory(prefix="comask-gpu-check-") as temporary:
        link_package(Path(temporary) / "package")
        return check_all(options, Path(temporary))


def link_package(folder: Path) -> None:
    """Makes `import comask` work without an installation in this process and its children."""
    package = folder / "comask"
    package.mkdir(parents=True)
    for path in (ROOT / "comask").iterdir():
        (package / path.name).symlink_to(path)
    for name in FOLDERS:
        (package / name).symlink_to(ROOT / name)
    sys.path.insert(0, str(folder))
    # the processes of the rows, and the commands that they run, must find it as well
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def all_checks() -> dict[str, dict[str, Check]]:
    """Returns the checks by group and name, in the order of the table."""
    import backends
    import kernels
    import speed

    return {"kernels": kernels.CHECKS, "backends": backends.CHECKS, "speed": speed.CHECKS}


def check_all(options: argparse.Namespace, folder: Path) -> int:
    """Runs the checks row by row and writes the table and the file after each row."""
    import machine
    from rows import FAIL, PASS, UNAVAILABLE, Row
    from table import HEAD, line

    facts = machine.facts()
    for name, value in facts.items():
        print(f"{name}: {value}")
    if options.rehearse:
        print("rehearsal: small sizes on the CPU; this says nothing about a GPU")
    missing = None if options.rehearse else machine.why_no_gpu()
    print(f"\n{HEAD}", flush=True)
    content = {
        "schema_version": SCHEMA_VERSION,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "rehearsal": options.rehearse,
        "machine": facts,
    }
    rows: list[Row] = []
    for group, checks in all_checks().items():
        for name in checks:
            if options.only in name:
                if missing is None:
                    rows.append(run_apart(group, name, options, folder))
                else:
                    rows.append(Row(group=group, name=name, status=UNAVAILABLE, note=missing))
                print(line(rows[-1]), flush=True)
                write(options.json, content, rows)
    count = {status: sum(row.status == status for row in rows) for status in (PASS, FAIL)}
    left = len(rows) - sum(count.values())
    print(f"\n{count[PASS]} passed, {count[FAIL]} failed, {left} unavailable")
    if options.json:
        print(f"wrote {options.json}")
    return 1 if count[FAIL] else 0


def write(path: Path | None, content: dict[str, Any], rows: list[Row]) -> None:
    """Writes the rows so far to the file that `--json` names."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        full = content | {"rows": [row.as_json() for row in rows]}
        path.write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")


def run_apart(group: str, name: str, options: argparse.Namespace, folder: Path) -> Row:
    """Runs one row in its own process and returns it."""
    from rows import finished_row

    arguments = ["--row", group, name, str(folder)]
    arguments += ["--rehearse"] if options.rehearse else []
    arguments += ["--bundle", str(options.bundle)] if options.bundle else []
    command = [sys.executable, str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return finished_row(group, name, done)


def run_here(options: argparse.Namespace) -> int:
    """Runs one row in this process and prints it as one line of JSON."""
    from context import REHEARSAL, Context, Sizes
    from rows import run_check

    group, name, folder = options.row
    context = Context(
        device="cpu" if options.rehearse else "cuda",
        sizes=REHEARSAL if options.rehearse else Sizes(),
        folder=Path(folder),
        trained=options.bundle,
    )
    row = run_check(group, name, all_checks()[group][name], context)
    print(f"\n{json.dumps(row.as_json())}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
