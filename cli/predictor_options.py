"""Where and how large a bundle runs: `--device`, `--batch`, `--proposals`, `--short-side`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import click

from comask.runtime.backends import LoadOptions


class DeviceType(click.ParamType[int | Literal["cpu"]]):
    """The index of a GPU, or `cpu`."""

    name = "INDEX|cpu"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["cpu"]:
        """See `click.ParamType`."""
        if value == "cpu":
            return "cpu"
        if not str(value).isdecimal():
            self.fail(
                f"{value!r}: expected the index of a GPU, 0 for the first, or cpu", param, ctx
            )
        return int(value)


def predictor_options(*, batch: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options, which reach the command as `how`: `LoadOptions`.

    Args:
        batch: default of `--batch`.
    """
    options = (
        click.option("--device", type=DeviceType(), metavar="INDEX|cpu",
                     help="GPU to run on. [the first, else cpu]"),
        click.option("--batch", type=click.IntRange(1), default=batch, metavar="N",
                     help=f"Images or frames of one size at once. [{batch}]"),
        click.option("--proposals", type=click.IntRange(1), metavar="N",
                     help="Only the N best proposals: faster."),
        click.option("--short-side", type=click.IntRange(1), metavar="PIXELS",
                     help="Resize to less than the bundle's: faster."),
    )  # fmt: skip

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, batch: int, **arguments: Any) -> None:
            taken = {name: arguments.pop(name) for name in ("device", "proposals", "short_side")}
            function(how=LoadOptions(max_batch=batch, **taken), **arguments)

        for option in reversed(options):
            run = option(run)
        return run

    return decorate
