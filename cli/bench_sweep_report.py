"""What a sweep found, as JSON, tables and the picture take it."""

from __future__ import annotations

import dataclasses
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comask.cli.bench_front import Scored, choose, pareto_front
from comask.runtime.backends import LoadOptions

if TYPE_CHECKING:
    from comask.cli.bench_work import Work


def sweep_report(work: Work, *, finished: bool) -> dict[str, Any]:
    """Everything that was measured, the fastest setting first, and the choice."""
    from comask.runtime.bench.machine import describe_machine

    sweep, scored = work.sweep, work.scored
    reference = scored[0]
    chosen, front = choose(scored, sweep.max_loss), pareto_front(scored)
    command, python = usage(
        sweep.bundle, chosen.setting.backend, sweep.options(chosen.setting, work.bundle.manifest)
    )
    return {
        "bundle": str(sweep.bundle),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(sweep.device),
        "data": sweep.data,
        "images": work.images,
        "not_decoded": work.asked - work.images,
        "runs": sweep.runs,
        "max_loss": sweep.max_loss,
        "settings": [
            {
                **dataclasses.asdict(entry.setting),
                "box_ap": entry.box_ap,
                "mask_ap": entry.mask_ap,
                "loss": entry.loss,
                "ms_per_image": entry.ms_per_image,
                "ms_per_batch": entry.ms_per_batch,
                "ratio": reference.ms_per_image / entry.ms_per_image,
                "reference": entry is reference,
                "on_front": entry in front,
                "chosen": entry is chosen,
            }
            for entry in sorted(scored, key=lambda s: s.ms_per_image)
        ],
        "skipped": [{"setting": str(s), "reason": reason} for s, reason in work.skipped],
        "finished": finished,
        "verdict": verdict(chosen, reference, sweep.max_loss),
        "command": command,
        "python": python,
    }


def verdict(chosen: Scored, reference: Scored, max_loss: float) -> str:
    """The choice in a line."""
    within = f"within {max_loss:g} AP points of {reference.setting}"
    if chosen is reference:
        return f"fastest {within}: that setting itself"
    box, mask = chosen.box_ap - reference.box_ap, chosen.mask_ap - reference.mask_ap
    return (
        f"fastest {within}: {chosen.setting}, {chosen.ms_per_image:.2f} ms an image, "
        f"{reference.ms_per_image / chosen.ms_per_image:.2f} times as fast, box AP {box:+.2f}, "
        f"mask AP {mask:+.2f}"
    )


def usage(bundle: Path, backend: str, how: LoadOptions) -> tuple[str, str]:
    """The command line of `comask-infer` and the Python expression that run a setting."""
    given = {
        "device": how.device, "batch": how.max_batch, "proposals": how.proposals,
        "short-side": how.short_side,
    }  # fmt: skip
    options = "".join(f" --{name} {value}" for name, value in given.items() if value is not None)
    keywords = "".join(
        f", {name}={value!r}"
        for name, value in dataclasses.asdict(how).items()
        if value is not None and name != "on_mismatch"
    )
    return (
        f"comask-infer {shlex.quote(str(bundle))} INPUT --output DIR --backend {backend}{options}",
        f"Predictor.load({str(bundle)!r}, {backend!r}{keywords})",
    )
