"""What a report of `comask-eval`, or the record of one in a manifest, comes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def has_failed(report: Mapping[str, Any]) -> bool:
    """Whether something is wrong, whether or not enough was found to judge the rest."""
    failures = report.get("failures")  # unknown to older records
    return bool(failures) or not all(found["passed"] for found in report["comparisons"].values())
