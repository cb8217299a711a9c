"""Runs `engine_worker` and turns whatever becomes of it into a result or one error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comask.errors import EngineError
from comask.runtime.trt.engine import search_path

LAST_WORDS = 3  # lines of a dead worker's standard error that go into the message


def build_in_process(
    request: Mapping[str, Any], folder: Path, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Builds one plan in a process of its own.

    Args:
        request: for `engine_worker.build_plan`.
        folder: for what is temporary.
        progress: takes the phase and its finished share.

    Returns:
        what `build_plan` does.

    Raises:
        EngineError: when it cannot be built, and when the process ends without a word.
    """
    (folder / "request.json").write_text(json.dumps(request))
    environment = dict(os.environ)
    reading, writing = os.pipe()
    with (
        tempfile.TemporaryFile(dir=folder) as words,
        os.fdopen(reading) as events,
        # not in the bundle: its path may hold a colon, which ends an entry of LD_LIBRARY_PATH
        tempfile.TemporaryDirectory(prefix="comask-rtx-") as links,
    ):
        path = search_path(Path(links)) if request["flavor"] == "tensorrt-rtx" else None
        if path is not None:
            environment["LD_LIBRARY_PATH"] = path
        command = [
            sys.executable,
            "-m",
            "comask.export.engine_worker",
            str(folder / "request.json"),
        ]
        process = subprocess.Popen(
            [*command, str(writing)],
            env=environment,
            pass_fds=(writing,),
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
        )
        os.close(writing)
        try:
            outcome = _follow(events, progress)
            status = process.wait()
        finally:
            process.kill()  # an interrupt must not leave a build behind
            process.wait()
        if "result" in outcome:
            result: dict[str, Any] = outcome["result"]
            return result
        if "error" in outcome:
            raise EngineError(outcome["error"])
        words.seek(0)
        raise EngineError(
            _obituary(request["flavor"], status, words.read().decode(errors="replace"))
        )


def _follow(events: Any, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Reads events to their end; returns the last one that is no progress."""
    steps, outcome = 1, {}
    for line in events:
        event = json.loads(line)
        if "phase" not in event:
            outcome = event
            continue
        steps = event.get("steps", steps)
        progress(event["phase"], event["done"] / max(steps, 1))
    return outcome


def _obituary(flavor: str, status: int, words: str) -> str:
    if status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
    else:
        how = f"ended with exit code {status}"
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    said = "; ".join(lines[-LAST_WORDS:]) or "nothing"
    hint = ""
    if status == -signal.SIGKILL:
        hint = "; the system may have run out of memory: give a smaller --profile"
    return f"{flavor}'s build {how} and said last: {said}{hint}"
