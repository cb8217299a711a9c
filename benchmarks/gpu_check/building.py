"""Builds engines with `comask build`, each flavor, precision and plugin in a bundle of its own.

In a rehearsal, engines of the stand-in TensorRT take their place, which run the fp32 graphs on the CPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from context import Context
from rows import UnavailableError

if TYPE_CHECKING:
    from comask.runtime.trt.engine_folder import EngineInfo

FLAVORS = ("tensorrt", "tensorrt-rtx")
WORKS = {flavor: f"{flavor} works" for flavor in FLAVORS}


def engines_name(flavor: str, precision: str, plugin: str = "python", timed: str = "") -> str:
    """Returns the name of engines as a requirement of rows."""
    return f"{timed}{flavor} {precision} engines, plugin {plugin}"


def engine_bundle(
    context: Context, flavor: str, plugin: str = "python", *, timed: bool = False, label: str = ""
) -> Path:
    """Returns a copy of a bundle for the engines of one flavor and plugin, so that no other can run.

    Args:
        context: the context of the checks.
        flavor, plugin: the properties of the engines.
        timed: whether the bundle is the one to time; otherwise it is the trained one.
        label: tells copies apart that are made of different states of the bundle.
    """
    source = context.timed if timed else context.trained
    copy = context.folder / "-".join(filter(None, [source.name, flavor, plugin, label]))
    if not copy.exists():
        unfinished = copy.with_name(f".{copy.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("engines"))
        unfinished.rename(copy)
    return copy


def build_engine(
    context: Context, bundle: Path, flavor: str, precision: str, plugin: str = "python"
) -> tuple[EngineInfo, str]:
    """Runs `comask build` in an `engine_bundle`; existing engines are not built again.

    Returns:
        the engines' description, and what the command printed.

    Raises:
        UnavailableError: if the flavor does not support the plugin, or not this GPU.
        RuntimeError: if the command fails, or other engines are there.
    """
    from comask.bundle import Bundle
    from comask.errors import EngineError
    from comask.export.build_options import BuildOptions, check_options
    from comask.runtime.gpu import find_gpu
    from comask.runtime.trt.engine_folder import find_engines
    from comask.runtime.trt.flavor import load_flavor

    printed = ""
    if context.stand_in:
        _write_stand_ins(bundle, flavor, precision, plugin)
    else:
        try:
            check_options(load_flavor(flavor), plugin, BuildOptions(), find_gpu())
        except EngineError as error:
            raise UnavailableError(str(error)) from error
        printed = context.command(
            "build", str(bundle), "--precision", precision, "--engine", flavor, "--plugin", plugin
        )
    infos = [engines.info for engines in find_engines(Bundle.open(bundle))]
    found = [info for info in infos if info.precision == precision]
    if [(info.flavor, info.plugin) for info in found] != [(flavor, plugin)]:
        raise RuntimeError(f"{bundle} holds {found} in {precision}, not {flavor} with {plugin}")
    if reason := found[0].verification.get("not_run"):
        raise UnavailableError(f"the engines were built and cannot run here: {reason}")
    return found[0], printed


def _write_stand_ins(bundle: Path, flavor: str, precision: str, plugin: str) -> None:
    from standin_engines import write_engines

    from comask.bundle import STAGES, Bundle, graph_file
    from comask.runtime.trt.memory_format import map_format

    files = Bundle.open(bundle).manifest.files
    graphs = {stage: files[graph_file(stage, precision)] for stage in STAGES}
    changes: dict[str, Any] = {
        "precision": precision, "graphs": graphs, "map_format": map_format(precision, plugin),
    }  # fmt: skip
    if flavor == "tensorrt-rtx":
        changes |= {"target": "portable", "gpu": None}
    write_engines(bundle, flavor=flavor, plugin=plugin, **changes)


def ap_difference(context: Context, bundle: Path, backend: str) -> tuple[float, str]:
    """Measures the larger difference of box and mask AP from PyTorch with `comask eval`, and a note."""
    printed = context.command(
        "eval", str(bundle), "--data", "shapes", "--limit", str(context.sizes.images),
        "--backend", "torch", "--backend", backend, "--no-record", "--json", "-",
        "--tolerance", "1000",
    )  # fmt: skip
    report = json.loads(printed)
    comparison = report["comparisons"][backend]
    worst = max(abs(comparison["deltas"][task]["AP"]) for task in ("bbox", "segm"))
    note = (
        f"mask AP {report['backends']['torch']['segm']['AP']:.1f} in PyTorch; "
        f"largest difference of 24 numbers {comparison['largest']:.2g}"
    )
    return worst, note
