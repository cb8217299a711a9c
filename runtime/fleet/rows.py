"""A row of results an image, and the files of such rows."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, Literal

from comask.errors import one_line

if TYPE_CHECKING:
    from comask.structures import Detections

Format = Literal["parquet", "jsonl"]
FORMATS = ("parquet", "jsonl")  # as `Format`
Row = dict[str, Any]


def found_row(address: str, found: Detections) -> Row:
    """The row of an image that was run.

    `detections` are COCO results without `image_id`, with the name of the `category`.
    """
    entries = found.to_coco(0)
    for entry, label in zip(entries, found.labels.tolist(), strict=True):
        del entry["image_id"]
        entry["category"] = found.name(label)
    height, width = found.image_size
    return _row(address, width, height, None, entries)


def failed_row(address: str, error: str) -> Row:
    """The row of an image that could not be run: `error` says why, and nothing was found or not found."""
    return _row(address, None, None, one_line(error), None)


def encoded(rows: list[Row], form: Format) -> bytes:
    """Rows as a file.

    Parquet needs pyarrow.
    """
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows, schema=_schema())
    pyarrow.parquet.write_table(table, file, compression="zstd")
    return file.getvalue()


def _row(
    address: str,
    width: int | None,
    height: int | None,
    error: str | None,
    entries: list[Any] | None,
) -> Row:
    return {
        "file": _text(address),
        "width": width,
        "height": height,
        "error": error,
        "detections": entries,
    }


def _text(text: str) -> str:
    """Without what UTF-8 cannot hold: a file's name may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _schema() -> Any:
    from pyarrow import field, float64, int32, int64, list_, schema, string, struct

    mask = struct([field("size", list_(int32())), field("counts", string())])
    detection = struct(
        [
            field("category_id", int64()),
            field("category", string()),
            field("bbox", list_(float64())),  # x, y, w, h in pixels
            field("score", float64()),
            field("segmentation", mask),
        ]
    )
    return schema(
        [
            field("file", string(), nullable=False),
            field("width", int32()),
            field("height", int32()),
            field("error", string()),
            field("detections", list_(detection)),
        ]
    )
