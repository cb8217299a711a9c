"""JSON from outside: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value that `text` holds.

    Raises:
        ValueError: it is no JSON, not UTF-8, or holds a number or a nesting that Python refuses.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
