"""`comask`: one command, whose subcommands have a file each."""

from __future__ import annotations

import importlib
from typing import Any

import click

from comask import __version__
from comask.cli.command import CONTEXT, replace_what_terminals_lack

# The subcommands in the order in which they are used, by heading: what each does, in a line.
COMMANDS = {
    "Train": {
        "shapes": "Write a synthetic data set.",
        "check": "Check a data set before training does.",
        "train": "Train on your data, or on synthetic images.",
    },
    "Deploy": {
        "export": "Export a checkpoint to a bundle that equals PyTorch.",
        "quantize": "Add int8 graphs to a bundle, within a budget of AP.",
        "build": "Build TensorRT engines for a bundle.",
        "serve": "Write a model repository for Triton.",
    },
    "Run": {
        "infer": "Run a bundle on images, videos, cameras and streams.",
        "job": "Run a bundle on millions of images; continues after a kill.",
    },
    "Prove": {
        "eval": "Compare the AP of every backend with PyTorch's.",
        "bench": "Time a bundle part by part.",
        "sweep": "Find the fastest setting that keeps AP.",
        "soak": "Run for a long time, and fail when memory or latency grows.",
        "doctor": "Report what is installed, what is broken, and how to fix it.",
    },
}
NAMES = [name for commands in COMMANDS.values() for name in commands]
MODULES = {name: name for name in NAMES} | {"eval": "evaluate"}  # the module that has its `main`


class _Commands(click.Group):
    """A group that imports a subcommand when it is asked for."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Runs the command on any terminal."""
        replace_what_terminals_lack()
        return super().main(*arguments, **settings)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the subcommands."""
        return NAMES

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand; None where the name is unknown."""
        if cmd_name not in MODULES:
            return None
        command: click.Command = importlib.import_module(f"comask.cli.{MODULES[cmd_name]}").main
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The subcommand that the arguments begin with; an unknown one is answered with a likely one."""
        if not args[0].startswith("-") and args[0] not in MODULES:
            raise click.exceptions.NoSuchCommand(args[0], possibilities=NAMES, ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the subcommands below their headings."""
        widest = max(map(len, NAMES))
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(widest), text) for name, text in commands.items()])


@click.group(cls=_Commands, context_settings=CONTEXT, epilog="comask COMMAND --help says more.")
@click.version_option(__version__, prog_name="comask")
def main() -> None:
    """Train CoMask, deploy it to ONNX Runtime and TensorRT, and prove that it is still your model."""
