"""Code blocks and code spans of the documentation, and what can be checked of them without running."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
from conftest import COMMANDS
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "sh", "json", "yaml", "text", "dockerfile"}
NOT_RUN = re.compile(r"<!-- not run: (?P<why>.+?) -->\s*")
FOREIGN = {".", "docker"}  # programs that are not ours
ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """A fenced block; `why` says why its page has it not run, by a comment right before it."""

    page: Path
    line: int
    language: str
    text: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found, before = [], None
    for token in _tokens(page):
        if token.type == "fence":
            match = NOT_RUN.fullmatch(before.content) if before else None
            why = match["why"] if match else None
            language, line = token.info.strip(), (token.map or [0])[0] + 1
            found.append(Block(page, line, language, token.content, why))
        before = token if token.type == "html_block" else None
    return found


def spans(page: Path) -> list[str]:
    """What stands in backticks in sentences and tables, each on one line."""
    inlines = [child for token in _tokens(page) for child in token.children or ()]
    return [" ".join(child.content.split()) for child in inlines if child.type == "code_inline"]


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def commands(script: str) -> list[list[str]]:
    """The simple commands of a script, in words and without assignments before them."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word in (";", "&&", "|", "||", "&"):
                found.append(words)
                words = []
            elif words or not ASSIGNMENT.match(word):
                words.append(word)
    return [words for words in found if words]


def check_command(words: list[str]) -> None:
    """Raises `AssertionError` or `click.UsageError` if a command of ours is wrong or does not exist."""
    name, rest = words[0], words[1:]
    if name == "torchrun":
        module = rest.index("-m")
        assert rest[module + 1] == "comask.cli.train"
        COMMANDS["train"].make_context(name, rest[module + 2 :])
    elif name == "comask" or name.startswith("comask-"):
        make_context(words)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        asked = [word for word in rest if not ASSIGNMENT.match(word)]
        assert set(asked) <= set(targets), f"make has no {asked}"
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for named in re.findall(r"(?:comask|\.)\[([\w,-]+)\]", " ".join(rest)):
            assert set(named.split(",")) <= set(extras["optional-dependencies"]), named
    elif re.fullmatch(r"(\S*/)?python3?", name):
        if rest[0] == "-m":
            assert importlib.util.find_spec(rest[1]), f"there is no module {rest[1]}"
        else:
            assert (ROOT / rest[0]).exists(), f"there is no {rest[0]}"
    else:
        assert name in FOREIGN, f"nothing here checks {name}"


def make_context(words: list[str]) -> None:
    """Parses a command line as the command would; nothing is run."""
    name, arguments = short_name(words)
    with contextlib.suppress(click.exceptions.Exit):  # --help
        COMMANDS[name].make_context(name, arguments)


def short_name(words: list[str]) -> tuple[str, list[str]]:
    """`comask infer …` and `comask-infer …` → `infer`, and the other words."""
    first, *rest = words
    name = rest.pop(0) if first == "comask" else first.removeprefix("comask-")
    assert name in COMMANDS, f"there is no command {name}"
    return name, rest


def unknown_options(span: str) -> set[str]:
    """Options in a span like `comask eval … --data shapes` that its command does not have."""
    name, words = short_name(span.split())
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    known |= {"--help", "--version"}
    return {word.partition("=")[0] for word in words if word.startswith("--")} - known
