"""`comask`: one command, whose subcommands have a file each."""

from __future__ import annotations

import importlib

import click

from comask import __version__
from comask.cli.options import CONTEXT

# Each subcommand in its order of use: the module whose `main` it is, by heading.
COMMANDS = {
    "Train": {"shapes": "shapes", "check": "check", "train": "train"},
    "Deploy": {"export": "export", "quantize": "quantize", "build": "build", "serve": "serve"},
    "Run": {"infer": "infer", "job": "job"},
    "Prove": {"eval": "evaluate", "bench": "bench", "sweep": "sweep", "soak": "soak",
              "doctor": "doctor"},
}  # fmt: skip
MODULES = {name: module for commands in COMMANDS.values() for name, module in commands.items()}


class _Commands(click.Group):
    """A group that imports a subcommand when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULES:
            return None
        command: click.Command = importlib.import_module(f"comask.cli.{MODULES[cmd_name]}").main
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and args[0] not in MODULES:
            raise click.exceptions.NoSuchCommand(args[0], possibilities=list(MODULES), ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the subcommands below their headings."""
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                rows = []
                for name in commands:
                    command = self.get_command(ctx, name)
                    assert command is not None
                    rows.append((name, command.get_short_help_str(limit=formatter.width)))
                formatter.write_dl(rows)


@click.group(cls=_Commands, context_settings=CONTEXT, epilog="comask COMMAND --help says more.")
@click.version_option(__version__, prog_name="comask")
def main() -> None:
    """Train CoMask, deploy it to ONNX Runtime and TensorRT, and prove that it is still your model."""
