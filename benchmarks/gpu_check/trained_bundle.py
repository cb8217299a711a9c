"""Provides the bundle of a trained network: a copy of the given one, or one that is trained here."""

from __future__ import annotations

import shutil

from context import Context
from rows import Check, Figure


def provide(context: Context) -> Figure:
    """Copies the given bundle and checks its files; without one, trains `shapes-tiny` and exports it."""
    if context.given is None:
        steps = ["--set", "train.max_steps=2"] if context.rehearsal else []
        context.make_bundle(
            context.trained, "--preset", "shapes-tiny", *steps, score_threshold="0.05"
        )
        note = "trained here"
    else:
        shutil.copytree(
            context.given, context.trained, ignore=shutil.ignore_patterns("engines"),
            dirs_exist_ok=True,
        )  # fmt: skip
        note = "given"
    bundle = context.bundle()
    for name in bundle.manifest.files:
        if not name.startswith("engines"):
            bundle.file(name)
    return Figure(value=1.0, note=f"{note}, {', '.join(bundle.manifest.precisions)}")


def checks() -> list[Check]:
    """Returns the only row of the group."""
    return [
        Check(
            name="a trained bundle", needs=("GPU",), run=provide, provides="trained bundle", limit=300,
            compared="the checksums of its manifest",
            fails="a file is altered; without --bundle, training or export fails",
        )
    ]  # fmt: skip
