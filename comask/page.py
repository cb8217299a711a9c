"""Renders self-contained HTML pages from Jinja templates, which lie beside the modules that use them.

All pages share the layout of `page.html.jinja` and the tables and pictures of `parts.html.jinja`.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from comask.evaluate import ap_text


def render(template: Path, **values: Any) -> bytes:
    """Renders a page; all text in the values is escaped.

    Args:
        template: the page's file, which extends `page.html.jinja`. Besides Jinja's own filters it may
            use `ap` (`ap_text`), `number` (Python's `format`) and `data_url`.
        values: the template's variables; a missing one is an error, not an empty text.

    Returns:
        HTML in UTF-8.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"ap": ap_text, "number": format, "data_url": _data_url}
    return environment.get_template(template.name).render(values).encode()


def _data_url(content: bytes, kind: str = "png") -> str:
    """Returns a URL that contains an encoded picture."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
