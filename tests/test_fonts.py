"""Class names in any script: drawn by a font that has them, or told apart by their numbers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from comask import draw
from comask.draw import draw_overlay, font_for, has_characters
from comask.structures import Detections

WORDS = ("叶子", "苹果")
ASCII = "".join(map(chr, range(32, 127)))


def drawn(*names: str, label: int = 0) -> np.ndarray:
    found = Detections(
        boxes_xyxy=np.array([[20, 40, 160, 90]], np.float32),
        scores=np.array([0.9], np.float32),
        labels=np.array([label]),
        mask_probs=np.ones((1, 28, 28), np.float32),
        image_size=(100, 200),
        class_names=names,
    )
    return draw_overlay(np.full((100, 200, 3), 90, np.uint8), found)


def make_font(path: Path, characters: str) -> None:
    """A font in which each character is a bar of a height of its own."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    builder = FontBuilder(1000, isTTF=True)
    names = {c: f"u{ord(c):04X}" for c in characters}
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord(c): name for c, name in names.items()})
    glyphs = {}
    for place, name in enumerate([".notdef", *names.values()]):
        pen = TTGlyphPen(None)
        height = 300 + 5 * place
        pen.moveTo((100, 0))
        for point in ((100, height), (500, height), (500, 0)):
            pen.lineTo(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (600, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Made Sans", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def font_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder in which fontconfig looks."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    config = tmp_path / "fonts.conf"
    config.write_text(
        f'<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>'
        f"<dir>{folder}</dir><cachedir>{tmp_path / 'cache'}</cachedir></fontconfig>"
    )
    monkeypatch.setenv("FONTCONFIG_FILE", str(config))
    forget()
    yield folder
    forget()


def forget() -> None:
    font_for.cache_clear()
    draw._machine_fonts.cache_clear()
    draw._names_without_font.clear()


@pytest.mark.skipif(shutil.which("fc-list") is None, reason="needs fontconfig's fc-list")
def test_a_font_of_the_machine_is_found_for_other_scripts(
    font_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_font(font_folder / "latin.ttf", ASCII)
    make_font(font_folder / "some.ttf", ASCII + "叶")
    make_font(font_folder / "all.ttf", ASCII + "叶子苹果")
    (font_folder / "broken.ttf").write_bytes(b"no font")
    font = font_for("叶子 0.90", 20)
    assert font is not None
    assert Path(str(font.path)).name == "all.ttf"  # type: ignore[union-attr]
    assert not np.array_equal(drawn(WORDS[0]), drawn(WORDS[1]))
    assert not caplog.records


def test_without_a_font_the_number_is_drawn_and_one_warning_given(
    font_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tags = [drawn(*WORDS, label=label) for label in (0, 1)]
    plain = [drawn("class 0", "class 1", label=label) for label in (0, 1)]
    for ours, expected in zip(tags, plain, strict=True):
        np.testing.assert_array_equal(ours, expected)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "no font here can show the class name 叶子" in message
    assert "install fontconfig and a font that has them" in message


def test_a_machine_without_fontconfig_warns_too(
    font_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    np.testing.assert_array_equal(drawn(WORDS[0]), drawn("class 0"))
    assert len(caplog.records) == 1


def test_ascii_takes_pillows_own_font_and_asks_for_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget()
    monkeypatch.setattr(shutil, "which", lambda name: pytest.fail("looked for others"))
    own = font_for(ASCII, 20)
    assert own is not None
    assert has_characters(own, ASCII)
    assert not has_characters(own, "叶")


def test_a_name_of_several_lines_is_one() -> None:
    np.testing.assert_array_equal(drawn("a\nb\x1b"), drawn("a b\\x1b"))
