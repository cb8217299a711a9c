"""`comask-export --precision int8`: its options, and from them to int8 graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from comask.calib.cache import CACHE, Method

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from comask.bundle import Bundle
    from comask.data.source import InstanceSource
    from comask.runtime.trt.engine_folder import EngineFolder

METHODS = get_args(Method)  # the first is the default
# images of `shapes` that nothing else sees
CALIBRATION_SEED, VALIDATION_SEED = 4_000_000, 5_000_000
DEFAULT_CALIB_IMAGES, MOST_VAL_IMAGES = 64, 500
PROBED_IMAGES = 4  # of the calibration's, on which single layers are quantised


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Options:
    """What the options say; None where one was not given."""

    calib_data: str | None
    calib_images: int | None
    calib_method: Method | None
    calib_seed: int | None
    val_images: int | None
    ap_budget: float | None

    def wanted(self, precisions: tuple[str, ...], source: Path) -> bool:
        """Whether int8 graphs are to be made: `source` has none, or options ask for others.

        Raises:
            UsageError: for options without int8, and int8 without images.
        """
        from comask.bundle import Bundle

        given = [f"--{n.replace('_', '-')}" for n in self.__slots__ if getattr(self, n) is not None]
        if "int8" not in precisions:
            if given:
                raise click.UsageError(f"{given[0]} is for --precision int8")
            return False
        if source.is_dir() and "int8" in Bundle.open(source).manifest.precisions and not given:
            return False
        if self.calib_data is None:
            raise click.UsageError(
                "--precision int8 needs --calib-data: a folder of images like those that the network "
                "will see, which nothing else can stand for"
            )
        return True


def int8_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options, which reach the command as `int8`: `Int8Options`."""
    options = (
        click.option("--calib-data", metavar="DIR|shapes",
                     help="int8: images that tell activations' ranges."),
        click.option("--calib-images", type=click.IntRange(1), metavar="N",
                     help=f"int8: how many. [{DEFAULT_CALIB_IMAGES}]"),
        click.option("--calib-method", type=click.Choice(METHODS), metavar="METHOD",
                     help=f"{'|'.join(METHODS)} [{METHODS[0]}]"),
        click.option("--calib-seed", type=int, metavar="N", help="int8: of their choice. [0]"),
        click.option("--val-images", type=click.IntRange(1), metavar="N",
                     help=f"int8: images for AP. [≤ {MOST_VAL_IMAGES}]"),
        click.option("--ap-budget", type=click.FloatRange(0), metavar="POINTS",
                     help="int8: AP that may be lost. [0.3]"),
    )  # fmt: skip

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        taken = {name: arguments.pop(name) for name in Int8Options.__slots__}
        function(int8=Int8Options(**taken), **arguments)

    for option in reversed(options):
        run = option(run)
    return run


def add_int8_graphs(
    bundle: Bundle, options: Int8Options, val_data: str, report: Callable[[str], None]
) -> Bundle:
    """Calibrates on the images that the options name, and searches within the budget.

    Args:
        bundle: with fp32 and fp16 graphs.
        options: with `calib_data`.
        val_data: as `--val-data` has it.
        report: takes a line before each step.

    Raises:
        PrecisionError: when the promise cannot be kept.
        DataError: when the data cannot be used.
    """
    import numpy as np

    from comask.calib.int8 import add_int8
    from comask.calib.ranges import collect_ranges
    from comask.calib.sampling import choose_images
    from comask.calib.validation import ENOUGH, Scorer, Validation
    from comask.data.open_source import open_source

    assert options.calib_data is not None
    most = options.val_images or MOST_VAL_IMAGES
    source = open_source(val_data, "val", shapes_images=most, shapes_seed=VALIDATION_SEED)
    indices = np.random.default_rng(0).permutation(len(source))[:most]  # sorted data begin alike
    validation = Validation(
        source=source,
        indices=sorted(indices.tolist()),
        name=val_data,
        budget=0.3 if options.ap_budget is None else options.ap_budget,
    )
    if len(indices) < ENOUGH:
        report(
            f"warning: AP on {len(indices)} images says little of others, and its error is not known; "
            f"give {ENOUGH} --val-images or more"
        )
    scorer = Scorer(bundle, validation)  # before the calibration: it may refuse
    method: Method = options.calib_method or METHODS[0]
    seed = options.calib_seed or 0
    count = options.calib_images or DEFAULT_CALIB_IMAGES
    data: InstanceSource | Path = Path(options.calib_data)
    if options.calib_data == "shapes":
        data = open_source("shapes", "train", shapes_images=4 * count, shapes_seed=CALIBRATION_SEED)
    images = choose_images(data, count, seed, report=report)
    calibration = collect_ranges(bundle, images, cache=bundle.folder / CACHE, report=report)
    described = {
        "data": options.calib_data, "images": len(calibration.images), "seed": seed,
        "method": method,
    }  # fmt: skip
    some = [image.decode() for image in images[:PROBED_IMAGES]]
    return add_int8(
        bundle, calibration.ranges(method), some, scorer, calibration=described, report=report
    )


def print_int8(bundle: Bundle, *, to_stderr: bool) -> None:
    """What int8 costs in AP, what it saves, and which layers stayed float."""
    proof = bundle.manifest.verification["int8"]
    ap = ", ".join(
        f"{task} AP {proof['ap'][task]:.2f} ({proof['ap'][task] - value:+.2f})"
        for task, value in proof["reference"].items()
    )
    sizes, (loss, error) = proof["bytes"], proof["loss"]
    click.echo(
        f"{bundle.folder}: int8 graphs, {proof['layers'] - len(proof['float_layers'])} of "
        f"{proof['layers']} layers in int8, {sizes['int8'] / sizes['fp32']:.3f} times the size of fp32; "
        f"on {proof['images']} images {ap}: {loss:+.2f} ± {error:.2f} points lost to PyTorch, "
        f"{proof['budget']:g} may be",
        err=to_stderr,
    )
    for layer in proof["float_layers"]:
        click.echo(
            f"  float: {layer['layer']}: {layer['reason']}",
            err=to_stderr,
        )
    if proof["latency"] is None:
        click.echo(
            "warning: whether int8 is faster than fp16 was not measured; building engines of both on "
            "a GPU does that",
            err=True,
        )


def judge_speed(
    bundle: Bundle, built: list[EngineFolder], images: Callable[[], list[NDArray[np.uint8]]]
) -> Bundle:
    """Compares int8 engines with fp16 ones where there are both and a GPU that runs them.

    The times go into the manifest.

    Raises:
        PrecisionError: when int8 is not faster; its engines are gone then.
    """
    import dataclasses
    import shutil

    from comask.bundle import Manifest, update_manifest
    from comask.calib.search import measure_speed, require_faster
    from comask.errors import PrecisionError
    from comask.export.verify import why_not_proved
    from comask.runtime.gpu import find_gpu
    from comask.runtime.trt.engine_folder import find_engines

    gpu, kinds = find_gpu(), {(folder.info.flavor, folder.info.plugin) for folder in built}
    for kind in sorted(kinds):
        pair = {
            folder.info.precision: folder
            for folder in find_engines(bundle)
            if (folder.info.flavor, folder.info.plugin) == kind
            and folder.info.precision in ("fp16", "int8")
            and not why_not_proved(folder.info, gpu)
        }
        if len(pair) < 2:
            continue
        seconds = measure_speed(bundle, pair, images())
        try:
            require_faster(seconds)
        except PrecisionError:
            shutil.rmtree(pair["int8"].folder)
            raise

        def record(manifest: Manifest, seconds: dict[str, float] = seconds) -> Manifest:
            int8 = manifest.verification["int8"] | {"latency": seconds}
            return dataclasses.replace(
                manifest, verification=manifest.verification | {"int8": int8}
            )

        bundle = update_manifest(bundle.folder, record)
        click.echo(
            f"{pair['int8'].folder}: {1e3 * seconds['int8']:.2f} ms an image in both graphs, fp16 takes "
            f"{1e3 * seconds['fp16']:.2f} ms",
            err=True,
        )
    return bundle
