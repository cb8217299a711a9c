"""What several commands take: where a bundle runs, files, and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from comask.bundle import PRECISIONS
from comask.cli.command import option
from comask.config import AUGMENTATIONS, LEAST_TILE, MOST_OVERLAP, TILE_OVERLAP
from comask.errors import ComaskError
from comask.files import write_whole
from comask.media_files import Kind, PassedOver, find_media

if TYPE_CHECKING:
    from comask.data.source import InstanceSource
SHAPES_SEED = 3_000_000  # images that neither training, validation nor export saw
SCORED_SHAPES = 200
VERIFIED_IMAGES = 3  # that graphs and engines are compared on, where nothing is said
VERIFY_SEED = 2_000_000  # other images than training and validation see
RUNS = "Where it runs"  # heading of options


class DeviceType(click.ParamType[int | Literal["cpu", "gpu", "npu"]]):
    """The index of a GPU, or `cpu`, `gpu` or `npu`."""

    name = "INDEX|cpu|gpu|npu"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["cpu", "gpu", "npu"]:
        """Returns the index as an integer, or the word."""
        if value in ("cpu", "gpu", "npu"):
            return cast("Literal['cpu', 'gpu', 'npu']", value)
        if not str(value).isdecimal():
            self.fail(
                f"{value!r}: expected the index of a GPU, 0 for the first, or cpu, gpu or npu",
                param,
                ctx,
            )
        return int(value)


def _named(
    context: click.Context, parameter: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    if "auto" in names:
        raise click.UsageError("--backend auto: name the backends that are to be compared")
    return names


def backends_option(default: str) -> Callable[[Any], Any]:
    """Makes the option `--backend`, which may be repeated.

    Args:
        default: what the help says of a command without it.
    """
    return option(
        "--backend", "backends", multiple=True, metavar="NAME[:PRECISION]", group=RUNS,
        callback=_named, help=f"Repeated; the first is the reference. {default}",
    )  # fmt: skip


backend_option = option(
    "--backend", default="auto", metavar="NAME[:PRECISION]", group=RUNS,
    help="tensorrt, tensorrt-rtx, onnxruntime, openvino, torch. [auto]",
)  # fmt: skip
json_option = option("--json", "json_file", metavar="FILE", help="Write the result as JSON.")
plot_option = option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE",
    help="Draw the result: .png, .svg or .pdf.",
)  # fmt: skip
device_option = option(
    "--device", type=DeviceType(), metavar="INDEX|cpu|…", group=RUNS,
    help="GPU, cpu, openvino's gpu/npu. [GPU 0, else cpu]",
)  # fmt: skip


def predictor_options(
    *, batch: int, views: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes the options of where a bundle runs; the command gets them as `how`: `LoadOptions`.

    Args:
        batch: default of `--batch`.
        views: whether images may run in tiles and augmented views.
    """
    options: tuple[Callable[[Any], Any], ...] = (
        device_option,
        option("--batch", "max_batch", type=click.IntRange(1), default=batch, metavar="N", group=RUNS,
               help=f"Images or frames of one size at once. [{batch}]"),
        option("--proposals", type=click.IntRange(1), metavar="N", group=RUNS,
               help="Use only the N best proposals, which is faster."),
        option("--short-side", type=click.IntRange(1), metavar="PIXELS", group=RUNS,
               help="Shorter side after resizing. [the bundle's]"),
    )  # fmt: skip
    if views:
        options += _view_options()

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            from comask.runtime.backends import LoadOptions  # late: the runtime imports numpy

            if arguments.get("tile_overlap") is not None and arguments["tile"] is None:
                raise click.UsageError("--tile-overlap: there are no tiles without --tile")
            gathered("how", LoadOptions)(function)(**arguments)

        for add in reversed(options):
            run = add(run)
        return run

    return decorate


def _view_options() -> tuple[Callable[[Any], Any], ...]:
    return (
        option("--tile", type=click.IntRange(LEAST_TILE), metavar="PIXELS", group=RUNS,
               help="Also run images in overlapping tiles of this side."),
        option("--tile-overlap", type=click.FloatRange(0, MOST_OVERLAP, min_open=True), group=RUNS,
               metavar="SHARE", help=f"Share of a tile that the next has, too. [{TILE_OVERLAP}]"),
        option("--tta", metavar="VIEWS", callback=_augmentations, group=RUNS,
               help=f"Merge several views: any of {','.join(AUGMENTATIONS)}."),
    )  # fmt: skip


def _augmentations(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = [name.strip() for name in value.split(",")]
    if unknown := [name for name in names if name not in AUGMENTATIONS]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(AUGMENTATIONS)}")
    return tuple(name for name in AUGMENTATIONS if name in names)


def precision_list(*known: str) -> Callable[..., tuple[str, ...]]:
    """Makes a callback that reads `fp16,fp32` as the precisions in the order of `PRECISIONS`."""

    def read(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        wanted = {name.strip() for name in value.split(",")}
        if "int8" in wanted - set(known):
            raise click.BadParameter("int8 graphs are made by: comask quantize BUNDLE")
        if unknown := sorted(wanted.difference(known)):
            raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return tuple(name for name in PRECISIONS if name in wanted)

    return read


def verification_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--data` and `--limit`: the images on which graphs and engines are compared with PyTorch."""
    for add in (
        option("--limit", type=click.IntRange(1), default=VERIFIED_IMAGES, metavar="N",
               aliases=("--verify-images",),
               help=f"Compare on N images of the data. [{VERIFIED_IMAGES}]"),
        option("--data", default="shapes", metavar="DATA|shapes", aliases=("--val-data",),
               help="Images to compare with PyTorch on. [shapes]"),
    ):  # fmt: skip
        function = add(function)
    return function


def verification_images(data: str, limit: int) -> Callable[[], list[Any]]:
    """Makes a function that reads the images of `verification_options`: u8 [h, w, 3], RGB, decoded once.

    It raises a ComaskError when the data holds no images.
    """

    @functools.cache
    def images() -> list[Any]:
        from comask.data.open_data import open_source
        from comask.data.source import readable_images

        source = open_source(data, "val", shapes_images=4 * limit, shapes_seed=VERIFY_SEED)
        # images with most objects first: an empty image proves little
        busiest = sorted(range(len(source)), key=lambda i: -len(source.annotations(i)))
        decoded = [pixels for _, pixels in islice(readable_images(source, busiest), limit)]
        if not decoded:
            raise ComaskError(f"--data {data}: holds no images")
        return decoded

    return images


def scored_source(
    data: str, limit: int | None, boxes: Literal["annotated", "mask"] = "annotated"
) -> tuple[InstanceSource, list[int]]:
    """Opens the data that backends are scored on, and returns it with the indices of the images.

    Args:
        data: the value of `--data`.
        limit: the number of images; None for all of a folder, and `SCORED_SHAPES` of `shapes`.
        boxes: see `open_source`.
    """
    from comask.data.open_data import open_source

    count = limit or SCORED_SHAPES
    source = open_source(data, "val", shapes_images=count, shapes_seed=SHAPES_SEED, boxes=boxes)
    return source, list(range(min(limit or len(source), len(source))))


def gathered(name: str, kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a decorator that passes several options as one argument.

    Args:
        name: of the argument.
        kind: a dataclass whose fields are called as the options' parameters; the default of a field
            stands for an option that was not given or does not exist.
    """
    fields = [field.name for field in dataclasses.fields(kind)]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            taken = {field: arguments.pop(field) for field in fields if field in arguments}
            given = {field: value for field, value in taken.items() if value is not None}
            function(**arguments, **{name: kind(**given)})

        return run

    return decorate


def check_outputs(
    plot: Path | None = None, *, made: str | Path | None = None, **files: str | Path | None
) -> None:
    """Checks that long work will be able to write its results.

    Args:
        plot: the file of `--plot`.
        made: a folder that the command creates.
        files: other files, by the names of their options.

    Raises:
        ComaskError: when a file's folder does not exist, or a plot cannot be drawn.
    """
    for name, file in (("plot", plot), *files.items()):
        if file is None or file == "-":
            continue
        folder = Path(file).resolve().parent
        if not folder.is_dir() and (made is None or folder != Path(made).resolve()):
            raise ComaskError(f"--{name} {file}: its folder does not exist; make it first")
    if plot is not None:
        from comask.runtime.bench.plots import check_plot

        check_plot(plot)


def write_json(target: str | None, content: Any) -> None:
    """Writes `content` to the file of `--json`; does nothing without that option.

    Raises:
        ComaskError: when the file cannot be written.
    """
    if target is None:
        return
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)  # JSON has no NaN
    ascii_only = target == "-" and (sys.stdout.encoding or "ascii").lower() != "utf-8"
    text = json.dumps(finite, indent=2, ensure_ascii=ascii_only) + "\n"
    # a name that is not UTF-8 holds half characters, which JSON can escape
    text = text.encode(errors="backslashreplace").decode()
    if target == "-":
        click.echo(text, nl=False)
        return
    try:
        write_whole(Path(target), text.encode())
    except OSError as error:
        raise ComaskError(f"--json {target}: cannot be written: {error.strerror}") from error


def find_files(text: str, *kinds: Kind) -> list[Path]:
    """Returns the files that an input names, see `find_media`; prints which files are passed over.

    Args:
        text: a file, a folder or a pattern.
        kinds: of the files that a folder gives: `image`, `video`.

    Raises:
        ComaskError: when it names nothing.
    """
    passed_over = PassedOver()
    try:
        return find_media(text, frozenset(kinds), passed_over)
    finally:
        for line in passed_over.lines(text):
            click.echo(line, err=True)


class Interruption:
    """Turns SIGINT and SIGTERM into a request to stop; a second one ends the process as usual.

    Attributes:
        signal: the number of the one that came, 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextlib.contextmanager
    def on_signal(self, stop: Callable[[], None] | None = None) -> Iterator[None]:
        """A signal during the block sets `signal` and calls `stop`."""
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def received(number: int, frame: FrameType | None) -> None:
            self.signal = number
            restore()
            if stop is not None:
                stop()

        for number in before:
            signal.signal(number, received)
        try:
            yield
        finally:
            restore()
