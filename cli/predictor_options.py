"""Where and how large a bundle runs: `--device`, `--batch`, `--proposals`, `--short-side`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from comask.errors import ConfigError

if TYPE_CHECKING:
    from comask.runtime import Predictor


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorOptions:
    """What `Predictor.load` takes besides bundle and backend; see there."""

    device: int | Literal["cpu"] | None
    max_batch: int
    proposals: int | None
    short_side: int | None

    def load(self, bundle: Path, backend: str) -> Predictor:
        """See `Predictor.load`."""
        from comask.runtime import Predictor

        try:
            return Predictor.load(bundle, backend, **asdict(self))
        except ConfigError as error:  # which names the argument
            raise ConfigError(str(error).replace("short_side", "--short-side", 1)) from error


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
    """The options, which reach the command as `how`: `PredictorOptions`.

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
            function(how=PredictorOptions(max_batch=batch, **taken), **arguments)

        for option in reversed(options):
            run = option(run)
        return run

    return decorate
