"""`make gpu-check`: builds and runs everything that needs a GPU, and prints one table.

Needs no installation: run it with any Python from 3.11 on that has torch; rows whose packages are not
there are `unavailable` and say what is missing. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_VERSION = 1
FOLDERS = ("export", "runtime", "cli", "calib")  # sub-packages that lie beside `comask/`


def main() -> int:
    """Runs the checks that `--only` names, all by default; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write machine, versions and rows to this file")
    parser.add_argument("--bundle", type=Path, help="a trained bundle; default: train shapes-tiny")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument(
        "--rehearse", action="store_true",
        help="small sizes on the CPU: tries the code of the rows that can run there, proves nothing",
    )  # fmt: skip
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="comask-gpu-check-") as temporary:
        link_package(Path(temporary) / "package")
        return check_all(options, Path(temporary))


def link_package(folder: Path) -> None:
    """Makes `import comask` work without an installation, for this process and its children."""
    package = folder / "comask"
    package.mkdir(parents=True)
    for path in (ROOT / "comask").iterdir():
        (package / path.name).symlink_to(path)
    for name in FOLDERS:
        (package / name).symlink_to(ROOT / name)
    sys.path.insert(0, str(folder))
    # what builds and evaluates in processes of their own must find it as well
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def check_all(options: argparse.Namespace, folder: Path) -> int:
    """Every group of checks, row by row; the table grows while they run."""
    import backends
    import kernels
    import machine
    import speed
    from context import REHEARSAL, Context, Sizes
    from rows import FAIL, PASS, run_check
    from table import HEAD, line

    device = "cpu" if options.rehearse else "cuda"
    sizes = REHEARSAL if options.rehearse else Sizes()
    context = Context(device=device, sizes=sizes, folder=folder, trained=options.bundle)
    facts = machine.facts()
    for name, value in facts.items():
        print(f"{name}: {value}")
    if options.rehearse:
        print("rehearsal: small sizes on the CPU; this says nothing about a GPU")
    missing = None if options.rehearse else machine.why_no_gpu()
    print(f"\n{HEAD}", flush=True)
    rows = []
    groups = {"kernels": kernels.CHECKS, "backends": backends.CHECKS, "speed": speed.CHECKS}
    for group, checks in groups.items():
        for name, check in checks.items():
            if options.only in name:
                row = run_check(group, name, machine.unavailable(missing) or check, context)
                print(line(row), flush=True)
                rows.append(row)
    count = {status: sum(row.status == status for row in rows) for status in (PASS, FAIL)}
    left = len(rows) - sum(count.values())
    print(f"\n{count[PASS]} passed, {count[FAIL]} failed, {left} unavailable")
    if options.json:
        content = {
            "schema_version": SCHEMA_VERSION,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "rehearsal": options.rehearse,
            "machine": facts,
            "rows": [row.as_json() for row in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")
    return 1 if count[FAIL] else 0


if __name__ == "__main__":
    sys.exit(main())
