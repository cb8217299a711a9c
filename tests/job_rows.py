"""What a job found, read as its user would."""

from __future__ import annotations

import json

from comask.runtime.jobs.folder import Folder
from comask.runtime.jobs.job import Row


def rows_in(folder: Folder) -> list[Row]:
    """All rows of the parts of a job, in order."""
    rows: list[Row] = []
    for name in sorted(folder.sizes("parts")):
        content = folder.read(f"parts/{name}")
        if name.endswith(".jsonl"):
            rows += map(json.loads, content.splitlines())
        else:
            import pyarrow.parquet

            rows += pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    return rows
