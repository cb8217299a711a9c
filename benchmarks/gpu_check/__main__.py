"""`make gpu-check`: builds and runs everything that needs a GPU, and prints one table.

It needs no installation: run it with any Python from 3.11 on that has torch. Wheels that
`make gpu-upload` collected are used from where they lie. Rows whose packages are missing are
`unavailable` and name them. Nothing is downloaded. Each group of rows runs in a process of its own, and
the file is written after every row, so that a run can be ended at any time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from places import BUNDLE, ROOT, TESTS, UPLOADED, WHEELS, paths

if TYPE_CHECKING:
    from groups import Group
    from rows import Check

SCHEMA_VERSION = 2
FOLDERS = ("export", "runtime", "cli", "calib")  # sub-packages beside `comask/`
BUNDLES = (*sorted(UPLOADED.glob(f"*/{BUNDLE}")), ROOT / "demo" / "bundle")  # if none is named
INTERRUPTED = 130


def main() -> int:
    """Runs all rows, or those of `--groups` and `--only`, and returns the exit code."""
    options = parsed()
    if importlib.util.find_spec("numpy") is None:
        sys.exit(f"error: {sys.executable} has no numpy; name a Python that has it with PYTHON=…")
    if options.bundle and not (options.bundle / "manifest.json").is_file():
        sys.exit(f"error: {options.bundle}: there is no bundle here; comask export writes one")
    if options.process:
        return run_here(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the run as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="comask-gpu-check-") as temporary:
        folder = Path(temporary)
        link_package(folder / "package")
        import wheels

        wheels.use([*UPLOADED.glob(f"*/{WHEELS}")], folder / "site")
        rows = chosen(options)
        if options.list:
            from table import described

            for group, checks in rows.items():
                print(f"{group.name}:", *map(described, checks), sep="\n")
            return 0
        return run_all(options, rows, folder)


def parsed() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write machine, versions and rows to this file")
    parser.add_argument(
        "--bundle", type=Path,
        help="a trained bundle; otherwise that of `make gpu-upload` or `make demo`, or one is trained",
    )  # fmt: skip
    parser.add_argument(
        "--groups", default="", metavar="NAME,NAME", help="run only these groups of rows"
    )
    parser.add_argument(
        "--only", default="", help="run only the rows whose name contains this text"
    )
    parser.add_argument(
        "--minutes", type=float, help="start no further row after this time; kill the one that runs"
    )
    parser.add_argument("--list", action="store_true", help="say what each row compares, and end")
    parser.add_argument(
        "--rehearse", action="store_true",
        help="use small sizes on the CPU to test the code of the rows; proves nothing about a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--process", nargs=3, metavar=("GROUP", "FOLDER", "PIPE"), help=argparse.SUPPRESS
    )
    return parser.parse_args()


def link_package(folder: Path) -> None:
    """Makes `import comask` work without an installation in this process and its children."""
    package = folder / "comask"
    package.mkdir(parents=True)
    for path in (ROOT / "comask").iterdir():
        (package / path.name).symlink_to(path)
    for name in FOLDERS:
        (package / name).symlink_to(ROOT / name)
    sys.path[1:1] = [str(folder), str(TESTS)]
    # the processes of the rows, and the commands that they run, must find it as well
    os.environ |= paths(folder, TESTS)


def chosen(options: argparse.Namespace) -> Mapping[Group, Sequence[Check]]:
    """Returns the rows to run by group, with those that provide what they need."""
    from groups import GROUPS
    from runner import with_providers

    every = {group: group.checks() for group in GROUPS}
    names = [name for name in options.groups.split(",") if name]
    known = [group.name for group in GROUPS]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"error: no group {', '.join(unknown)}; expected some of {', '.join(known)}")
    wanted = {
        check.name
        for group, checks in every.items()
        for check in checks
        if options.only in check.name and (not names or group.name in names)
    }
    if not wanted:
        sys.exit(f"error: no row of these groups contains {options.only!r}; --list prints all rows")
    needed = with_providers({group.name: checks for group, checks in every.items()}, wanted)
    rows = {g: [check for check in checks if check.name in needed] for g, checks in every.items()}
    return {group: checks for group, checks in rows.items() if checks}


def run_all(
    options: argparse.Namespace, rows: Mapping[Group, Sequence[Check]], folder: Path
) -> int:
    """Runs the groups one after the other; an interrupt ends the run with what was measured."""
    import machine
    from runner import GroupProcess, Runner
    from table import HEAD, Table

    facts = machine.facts()
    for name, value in facts.items():
        print(f"{name}: {value}")
    if options.rehearse:
        print("rehearsal: small sizes on the CPU; this says nothing about a GPU")
    print(f"\n{HEAD}", flush=True)
    head = {
        "schema_version": SCHEMA_VERSION,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "rehearsal": options.rehearse,
        "machine": facts,
    }
    table = Table(options.json, head)
    log = options.json.with_suffix(".log") if options.json else folder / "log"
    log.unlink(missing_ok=True)
    bundle = options.bundle or next((path for path in BUNDLES if path.is_dir()), None)

    def launch(name: str) -> GroupProcess:
        command = [sys.executable, str(Path(__file__).parent)]
        command += ["--rehearse"] if options.rehearse else []
        command += ["--bundle", str(bundle)] if bundle else []
        group = next(group for group in rows if group.name == name)
        environment = os.environ | environment_of(group, options, folder)
        return GroupProcess([*command, "--process", name, str(folder)], environment, log)

    runner = Runner(
        launch, table.add, rehearsal=options.rehearse,
        seconds=None if options.minutes is None else 60 * options.minutes,
    )  # fmt: skip
    code = 0
    try:
        for group, checks in rows.items():
            start = time.monotonic()
            try:
                runner.run(group.name, checks)
            finally:
                table.seconds[group.name] = time.monotonic() - start
        table.finish()
    except KeyboardInterrupt:
        print("interrupted; the rows so far count")
        code = INTERRUPTED
    print(f"\n{table.summary()}")
    if options.json:
        print(f"wrote {options.json} and {log}")
    return code or int(table.failed)


def environment_of(group: Group, options: argparse.Namespace, folder: Path) -> Mapping[str, str]:
    """Returns the variables of a group's process."""
    if not options.rehearse or group.rehearsed != "stand-in":
        return {}
    from rehearsal import stand_in_environment

    return stand_in_environment(folder)


def run_here(options: argparse.Namespace) -> int:
    """Runs rows of one group in this process, as the other process asks."""
    from context import REHEARSAL, Context, Sizes
    from group_process import serve
    from groups import GROUPS

    name, folder, pipe = options.process
    group = next(group for group in GROUPS if group.name == name)
    context = Context(
        device="cpu" if options.rehearse else "cuda",
        sizes=REHEARSAL if options.rehearse else Sizes(),
        folder=Path(folder),
        given=options.bundle,
        stand_in=options.rehearse and group.rehearsed == "stand-in",
    )
    serve(group, group.checks(), context, int(pipe))
    return 0


if __name__ == "__main__":
    sys.exit(main())
