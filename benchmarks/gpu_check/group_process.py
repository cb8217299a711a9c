"""The process of one group: runs the rows whose names it reads from standard input."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from context import Context
from groups import Group
from rows import Check, run_check
from runner import write_answer

PR_SET_PDEATHSIG = 1


def serve(group: Group, checks: Sequence[Check], context: Context, pipe: int) -> None:
    """Runs rows until standard input ends; the pipe gets one line for each."""
    with contextlib.suppress(AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    by_name = {check.name: check for check in checks}
    if context.stand_in:
        # pycuda names functions that the stand-in lacks: bound lazily, they do no harm until called
        sys.setdlopenflags(os.RTLD_LAZY)
    if group.tensorrt_stood_in or (context.stand_in and group.flavor):
        context.install_stand_ins(group.flavor)
    for module in group.imports:
        with contextlib.suppress(ImportError, OSError):  # the row that needs it says so
            importlib.import_module(module)
    with open(pipe, "w", encoding="utf-8") as answers:
        answers.write('{"ready": true}\n')
        answers.flush()
        for line in sys.stdin:
            row, need = run_check(group.name, by_name[line.rstrip("\n")], context)
            write_answer(answers, row, need)
