"""The documentation is true: its blocks run, and what it names exists."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import doc_blocks
import pytest
from conftest import MICRO, run, settings
from doc_blocks import PAGES, ROOT, Block
from video_clips import make_clip, pictures

from comask.config_reading import read_config
from comask.presets import preset

BLOCKS = [block for page in PAGES for block in doc_blocks.blocks(page)]
PACKAGES = ("comask", "export", "runtime", "cli", "calib")
# What stands in a block, and what runs in its place: nobody's data, and a network that trains in seconds.
STAND_INS = {
    "/data/coco": "coco",
    "--preset shapes-tiny": " ".join(["--preset shapes-tiny", *settings(*MICRO)]),
    "--preset coco-slim": " ".join(["--preset shapes-tiny", *settings(*MICRO)]),
}


@pytest.fixture(scope="module")
def belongings(
    micro_run: Path, micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What a reader has: photographs, a clip, a data set, a run and a bundle."""
    folder = tmp_path_factory.mktemp("belongings")
    assert run("shapes", folder / "coco", "--count", 20).exit_code == 0
    images = sorted((folder / "coco" / "images").iterdir())
    for place in ("photos/a.png", "photos/b.png", "more/c.jpg", "photo.jpg"):
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copy(images.pop(), folder / place)
    shutil.copytree(folder / "coco", folder / "mine")
    for place in ("clip.mp4", "clips/clip.mp4"):
        (folder / place).parent.mkdir(exist_ok=True)
        make_clip(folder / place, pictures(6))
    for name in ("r50", "shapes", "mine"):
        shutil.copytree(micro_run, folder / "runs" / name)
    shutil.copytree(micro_bundle, folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def pages(
    belongings: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, tuple[Path, dict[str, Any]]]:
    """Folder and Python names of each page; what a page makes itself is not there before."""
    found = {}
    for page in dict.fromkeys(block.page for block in BLOCKS):
        folder = tmp_path_factory.mktemp("page") / "work"
        shutil.copytree(belongings, folder, copy_function=os.link)  # commands replace, never change
        runs = "".join(block.text for block in BLOCKS if block.page == page and not block.why)
        for made in re.findall(r"--output (\S+)", runs):
            shutil.rmtree(folder / made, ignore_errors=True)
        found[page] = folder, dict[str, Any]()
    return found


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(
    block: Block,
    pages: dict[Path, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of a page run one after the other, in one folder."""
    folder, names = pages[block.page]
    monkeypatch.chdir(folder)
    assert block.language in doc_blocks.LANGUAGES, f"{block}: name the language"
    if block.language == "sh":
        for words in doc_blocks.commands(block.text):
            doc_blocks.check_command(words)
        if not block.why:
            run_script(block.text)
    elif block.language == "python":
        code = compile(block.text, str(block), "exec")
        if block.why:
            check_types(block.text, tmp_path)
        else:
            exec(code, names)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":  # settings, in the file that its first line names
        file = Path(block.text.partition("\n")[0].removeprefix("# "))
        file.write_text(block.text)
        read_config(file, preset("comask-r50"))
    if block.why:
        pytest.skip(f"checked, not run: {block.why}")


def run_script(text: str) -> None:
    for name, replacement in STAND_INS.items():
        text = text.replace(name, replacement)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        env=os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def check_types(text: str, folder: Path) -> None:
    """Names, attributes and arguments of comask that the text uses; its other names may be anything."""
    packages = folder / "packages" / "comask"
    packages.mkdir(parents=True)
    for entry in (*(ROOT / "comask").iterdir(), *(ROOT / name for name in PACKAGES[1:])):
        (packages / entry.name).symlink_to(entry)
    (folder / "block.py").write_text(text)
    options = ("--config-file=", "--disable-error-code=name-defined", "--ignore-missing-imports",
               "--follow-imports=silent", f"--cache-dir={ROOT / '.mypy_cache'}")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "block.py"],
        cwd=folder, env=os.environ | {"MYPYPATH": str(packages.parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    wrong = []
    for span in doc_blocks.spans(page):
        if re.match(r"comask[ -][a-z]+ ", span):
            wrong += [f"{span}: {name}" for name in doc_blocks.unknown_options(span)]
        if re.fullmatch(
            r"(comask|export|runtime|cli|calib|tests|examples|benchmarks)/[\w./*-]+", span
        ):
            wrong += [] if list(ROOT.glob(span.rstrip("/"))) else [span]
        if match := re.fullmatch(r"((?:model|train|data)\.(?!yaml)[a-z]\w+)(=\S*)?", span):
            section, _, key = match[1].partition(".")
            wrong += [] if hasattr(getattr(preset("comask-r50"), section), key) else [span]
    assert not wrong


def sources() -> list[Path]:
    return [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


HOLE = "\0"  # stands where a message has a value


def templates() -> list[str]:
    """Every text of the source, with holes where values go."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else HOLE for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [" ".join(text.split()) for text in found]


def test_troubleshooting_quotes_messages_that_exist() -> None:
    """A row quotes one with … in place of values: its pieces stand in one text, in this order."""
    page = ROOT / "docs" / "troubleshooting.md"
    rows = re.findall(r"^\| `(.+?)` \|", page.read_text(), re.MULTILINE)
    known = templates()
    assert len(rows) > 40
    missing = []
    for row in rows:
        pieces = [re.escape(piece.strip()) for piece in row.split("…") if piece.strip()]
        pattern = re.compile(".*".join(pieces))
        if not any(pattern.search(text) for text in known):
            missing.append(row)
    assert not missing


def test_equations_have_the_places_that_the_table_names() -> None:
    text = (ROOT / "docs" / "algorithm.md").read_text().partition("\n## What")[0]
    rows = re.findall(r"^\| (?!paper|---)(.+?) \| (.+?) \|$", text, re.MULTILINE)
    numbered = [what.partition(",")[0] for what, _ in rows if what.startswith("eq")]
    assert set(re.findall(r"\d", " ".join(numbered))) == set("123456789")
    file = ""
    for what, place in rows:
        name, *files = re.findall(r"`([^`]+)`", place)
        file = files[0] if files else file  # a row without one means that of the row above
        node: ast.AST = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            found = [inner for inner in ast.walk(node) if getattr(inner, "name", None) == part]
            assert found, f"{what}: {file} has no {name}"
            node = found[0]


def test_the_image_gets_what_it_copies() -> None:
    """No Docker is needed to see that names are right."""
    text = (ROOT / "Dockerfile").read_text()
    copied = {
        source
        for words in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for source in words.split()[:-1]
    }
    let_through = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert copied == set(let_through)
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["package-dir"].values()) <= copied
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= copied
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
