"""Which backends `comask-bench` measures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from comask.errors import BackendUnavailableError, BundleError, EngineError, KernelError
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions

if TYPE_CHECKING:
    from comask.bundle import Bundle


def runnable(bundle: Bundle, named: tuple[str, ...], how: LoadOptions) -> list[str]:
    """The backends that run here, each opened once to see.

    Args:
        bundle: to run.
        named: on the command line; what of these does not run is an error. Empty: whatever the bundle
            holds, PyTorch first; what of these does not run is reported.
        how: to open them.

    Raises:
        ComaskError: one that was named does not run, or none does.
    """
    found = []
    for name in dict.fromkeys(named or held_backends(bundle)):
        try:
            Predictor.open(bundle.folder, name, how).close()
        except (BackendUnavailableError, BundleError, EngineError, KernelError) as error:
            if named:
                raise
            click.echo(f"left out: {name}: {' '.join(str(error).split())}", err=True)
        else:
            found.append(name)
    if not found:
        raise BackendUnavailableError(
            f"none of the backends that {bundle.folder} is for runs here; comask-doctor says what is "
            f"missing"
        )
    return found


def held_backends(bundle: Bundle) -> list[str]:
    """Every backend and precision that the bundle has graphs or engines for, PyTorch first."""
    from comask.runtime.trt.engine_folder import find_engines

    engines = {f"{engine.info.flavor}:{engine.info.precision}" for engine in find_engines(bundle)}
    graphs = [f"onnxruntime:{precision}" for precision in bundle.manifest.precisions]
    return ["torch", *graphs, *sorted(engines)]
