"""Fonts for text in pictures: Pillow's own, else one of the machine's that has the characters."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_NO_CHARACTER = "\U0010ffff"  # that no font has: it is drawn as the box for missing ones
_UPRIGHT = {"Regular", "Book", "Roman", "Normal", "Medium", "Text"}
_SECONDS = 10.0  # that fontconfig may take, which builds its cache at first


@functools.lru_cache(maxsize=4096)
def font_for(text: str, size: int) -> Font | None:
    """A font that has every character of `text`; None where the machine has none.

    Pillow's own font has ASCII alone. Others are found by fontconfig's `fc-list`, where it is installed.

    Args:
        text: one line.
        size: in pixels.
    """
    from PIL import ImageFont

    own = ImageFont.load_default(size=size)
    if has_characters(own, text):
        return own
    for file, index in _machine_fonts(frozenset(text)):
        try:
            font = ImageFont.truetype(file, size, index=index)
        except OSError:  # as of fonts of bitmaps, emoji among them
            continue
        if has_characters(font, text):
            return font
    return None


def has_characters(font: Font, text: str) -> bool:
    """Whether a font draws every character of `text` as something else than missing."""
    missing = _drawn(font, _NO_CHARACTER)
    return all(_drawn(font, c) != missing for c in set(text) if not c.isspace())


def _drawn(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@functools.lru_cache(maxsize=1024)
def _machine_fonts(characters: frozenset[str]) -> tuple[tuple[str, int], ...]:
    """Fonts of the machine that have the characters, as (file, index in the file), the best first."""
    program = shutil.which("fc-list")
    if program is None:
        return ()
    charset = " ".join(f"{ord(c):x}" for c in sorted(characters) if not c.isspace())
    form = "%{file}\t%{index}\t%{style[0]}\n"
    try:
        listed = subprocess.run(
            [program, "--format", form, f":charset={charset}"],
            capture_output=True, timeout=_SECONDS, check=False,
        ).stdout.decode(errors="replace")  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple((file, index) for _, file, index in sorted(_ranked(listed)))


def _ranked(listed: str) -> Iterator[tuple[int, str, int]]:
    """(rank, file, index) of `fc-list`'s lines; upright sans-serif fonts of even weight come first."""
    for line in listed.splitlines():
        file, index, style = (*line.split("\t"), "", "")[:3]
        if not index.isdecimal() or int(index) >= 2**16:  # beyond are instances of variable fonts
            continue
        serif = "Serif" in file or "Sans" not in file
        yield 4 * (style not in _UPRIGHT) + 2 * ("Mono" in file) + serif, file, int(index)
