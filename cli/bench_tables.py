"""The tables that `comask-bench` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from comask.data.source import not_decoded_text
from comask.errors import one_line
from comask.runtime.bench.vitals import MIB

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HEADS = {
    "prepare": "prepare", "stage1": "stage 1", "stage2": "stage 2", "other": "other",
    "results": "results", "encode": "paste+RLE", "sum": "sum",
}  # fmt: skip


def console(*, to_stderr: bool) -> Console:
    """Wide enough for the tables where there is no terminal."""
    from rich.console import Console

    return Console(
        stderr=to_stderr,
        width=None if sys.stdout.isatty() else 130,
        highlight=False,
        markup=False,  # names of files may look like it
        soft_wrap=True,
    )


def _table(title: str, *heads: str) -> Table:
    """A table that is no wider than 80 columns; numbers under `heads`, text under empty ones."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for head in heads:
        text = head in ("", "backend")
        table.add_column(head, justify="left" if text else "right", no_wrap=True)
    return table


def print_timing(report: dict[str, Any], *, to_stderr: bool) -> None:
    """Milliseconds by part, then one line a backend with everything else."""
    out = console(to_stderr=to_stderr)
    batch = report["batch"]
    title = "milliseconds" if batch == 1 else f"milliseconds of a batch of {batch}"
    parts = _table(title, "backend", "", *(head.replace("+", "\n+") for head in HEADS.values()))
    rest = _table(
        "batch after batch", "backend", "images\n/s", "ratio", "outside\nstages",
        "detections\nan image", "cores\nbusy", "memory\nMiB", "GPU\nMiB",
    )  # fmt: skip
    streams = _table("as a stream of frames", "backend", "ms\np50", "images\n/s", "GPU\nMiB")
    for name, found in report["backends"].items():
        for rank in ("p50", "p90", "p99"):
            values = (_number(found["milliseconds"][part][rank]) for part in HEADS)
            parts.add_row(name if rank == "p50" else "", rank, *values)
        rest.add_row(
            name,
            _number(found["images_per_second"]),
            f"{found['ratio']:.2f}",
            f"{100 * found['outside_stages']:.2f} %",
            f"{found['detections_per_image']:.1f}",
            f"{found['cores_busy']:.1f}",
            _mib(found["resident_bytes"]),
            _mib(found["gpu_bytes"]),
        )
        if stream := found["stream"]:
            streams.add_row(
                name,
                _number(stream["milliseconds"]["p50"]),
                f"{stream['images_per_second']:.1f}",
                _mib(stream["gpu_bytes"]),
            )
    for table in (parts, rest, streams):
        if table.row_count:
            out.print(table, "")
    canvases = ", ".join(f"{height}x{width}" for height, width in report["canvases"])
    out.print(
        f"{one_line(report['subject'])} on canvases of {canvases}; {report['runs']} runs of each in "
        f"turn; {machine_line(report['machine'])}"
    )


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in half a line."""
    limit = machine["omp_num_threads"]
    threads = "" if limit is None else f", OMP_NUM_THREADS={limit}"
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    load = "" if machine["load"] is None else f", load {machine['load']:.1f} before"
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    return f"{cores} of {machine['cpu']}{threads}{gpu}{load}"


def print_sweep(report: dict[str, Any], *, to_stderr: bool) -> None:
    """All settings by falling speed, what was skipped, and the choice."""
    out = console(to_stderr=to_stderr)
    table = _table(
        f"AP points on {report['images']} images, against milliseconds", "", "backend",
        "pro-\nposals", "short\nside", "batch", "box\nAP", "mask\nAP", "loss", "ms an\nimage",
        "ms a\nbatch", "ratio",
    )  # fmt: skip
    for entry in report["settings"]:
        table.add_row(
            mark(entry), entry["backend"],
            *(str(entry[key]) for key in ("proposals", "short_side", "batch")),
            *(_number(entry[key]) for key in (
                "box_ap", "mask_ap", "loss", "ms_per_image", "ms_per_batch", "ratio")),
            style="bold" if entry["chosen"] else None,
        )  # fmt: skip
    out.print(table, "")
    out.print("> fastest within the loss, * on the Pareto front, = the bundle's own setting")
    if report["not_decoded"]:
        out.print(not_decoded_text(report))
    for entry in report["skipped"]:
        out.print(f"skipped: {entry['setting']}: {entry['reason']}")
    if not report["finished"]:
        out.print("interrupted: only a part of the grid was measured")
    out.print(f"{report['verdict']}\n  {report['command']}\n  {report['python']}")
    out.print(machine_line(report["machine"]))


def print_soak(report: dict[str, Any], *, to_stderr: bool) -> None:
    """What each series did, and the verdict."""
    out = console(to_stderr=to_stderr)
    table = _table("soak", "", "unit", "after\nwarm-up", "at the\nend", "growth", "limit", "")
    for growth in report["growth"].values():
        scale = MIB if growth["unit"] == "MiB" else 1
        relative = growth["relative"]
        table.add_row(
            growth["name"], growth["unit"],
            *(_number(growth[key] / scale) for key in ("before", "after")),
            f"{growth['grown']:+.2%}" if relative else f"{growth['grown']:+g}",
            f"{growth['allowed']:.0%}" if relative else f"{growth['allowed']:g}",
            "" if growth["passed"] else "TOO MUCH",
        )  # fmt: skip
    if table.row_count:
        out.print(table, "")
    out.print(
        f"{report['images']} images in {report['rounds']} rounds and {report['seconds'] / 60:.1f} "
        f"minutes on {report['runs_as']} ({report['device']}): {one_line(report['subject'])}; "
        f"{report['detections']} detections, {report['unreadable']} attempts to read a broken image; "
        f"{machine_line(report['machine'])}"
    )
    if report["waited"]:
        out.print(
            f"others had the processor for {report['waited']:.0%} of a call's time, which latencies are "
            f"without"
        )
    if not report["detections"]:
        out.print("warning: nothing was found in these images, so masks were not under load")
    if report["passed"]:
        out.print(report["verdict"])


def mark(entry: dict[str, Any]) -> str:
    """What a setting of a sweep's report is, in signs."""
    signs = {"chosen": ">", "on_front": "*", "reference": "="}
    return "".join(sign for key, sign in signs.items() if entry[key])


def _number(value: float) -> str:
    """Two decimals, fewer where they would not fit a column."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.0f}"
