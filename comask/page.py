"""HTML pages that need nothing beside them: the look, tables and pictures that all reports share."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --faint: #6a6f76;
  --line: #d9dce0; --card: #f4f5f7; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e6e9; --paper: #16181b; --faint: #9aa0a8; --line: #363a40; --card: #202328; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 70rem; margin: 0 auto; padding: 1rem 1.5rem 3rem; }}
h1 {{ margin-bottom: 0.2rem; }}
h2 {{ margin: 2.5rem 0 0.6rem; border-bottom: 1px solid var(--line); }}
h3 {{ margin: 1rem 0 0.3rem; font-size: 1rem; }}
.facts {{ display: flex; flex-wrap: wrap; gap: 0.8rem; margin: 1rem 0; }}
.facts div {{ background: var(--card); border-radius: 8px; padding: 0.6rem 1rem; }}
.facts dt {{ color: var(--faint); font-size: 0.85rem; }}
.facts dd {{ margin: 0; font-size: 1.25rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 0.2rem 0.7rem; border-bottom: 1px solid var(--line); }}
td {{ white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
th {{ color: var(--faint); font-weight: 600; font-size: 0.9rem; }}
.wide {{ overflow-x: auto; }}
.parts {{ columns: 24rem; column-gap: 2rem; }}
.parts section {{ margin-bottom: 1rem; }}
.parts table {{ width: 100%; font-size: 0.88rem; }}
.parts .wide {{ overflow: visible; }}  /* or it could not break across columns */
.parts td {{ white-space: normal; overflow-wrap: anywhere; }}
img {{ max-width: 100%; height: auto; display: block; margin: 0.8rem 0; border-radius: 6px;
  background: white; }}
.verdict {{ font-size: 1.6rem; font-weight: 700; margin: 0.6rem 0; }}
.pass {{ color: #1a7f37; }}
.fail {{ color: #cf222e; }}
details {{ margin: 0.8rem 0; }}
summary {{ cursor: pointer; }}
.note {{ color: var(--faint); font-size: 0.9rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of HTML parts; empty ones are left out."""
    return _PAGE.format(title=escape(title), body="\n".join(filter(None, parts)))


def facts(entries: Iterable[tuple[str, str]]) -> str:
    """Names and values as cards in a row; texts, which are escaped here."""
    items = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in entries)
    return f'<dl class="facts">{"".join(items)}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, which are escaped here."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{titles}</tr>{body}</table></div>'


def picture(content: bytes, name: str, kind: str = "png") -> str:
    """An encoded picture inside the page; `name` stands where it cannot be seen."""
    code = base64.b64encode(content).decode("ascii")
    return f'<img alt="{escape(name)}" src="data:image/{kind};base64,{code}">'
