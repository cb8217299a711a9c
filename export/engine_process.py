"""Builds one TensorRT plan in a process of its own.

TensorRT can end its process instead of raising an exception. So `build_in_process` runs this module as a
program, which writes lines of JSON to a file descriptor: progress, then the result or an error. If the
program ends without either, the error of `build_in_process` says how it ended.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comask.config_reading import from_dict
from comask.errors import ComaskError, EngineError
from comask.export.aot_plugins import ptx_capability, register_aot_plugins
from comask.export.build_options import BuildOptions, Shapes
from comask.export.layer_precision import engine_layers, network_layers
from comask.kernels.launch import LEVEL_STRIDES
from comask.runtime.gpu import find_gpu
from comask.runtime.trt.flavor import Flavor, load_flavor, search_path
from comask.runtime.trt.plugins import register_plugins

LAST_WORDS = 3  # lines of a dead process's standard error that go into the message
MIB = 2**20
PR_SET_PDEATHSIG = 1  # constant of Linux's prctl
Emit = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A request to build one plan.

    Attributes:
        flavor: `tensorrt` or `tensorrt-rtx`.
        plugin: `python`, `aot` or `none`.
        graph: path of the ONNX file.
        plan: path of the plan to write.
        profiles: least, best and largest shape of each input, in each profile of the plan.
        options: the builder's options.
        map_format: TensorRT's name of the memory format of the feature maps.
        timing_cache: path of the cache that is read and written; None for no cache.
        tuned_here: whether this GPU can run the plan, so that its layers can be read back.
    """

    flavor: str
    plugin: str
    graph: str
    plan: str
    profiles: tuple[dict[str, Shapes], ...]
    options: BuildOptions
    map_format: str
    timing_cache: str | None
    tuned_here: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltPlan:
    """The result of building one plan.

    Attributes:
        seconds: the time that TensorRT took.
        network: the precision of each heavy layer of the parsed network, see `network_layers`.
        engine: the precision of each heavy layer of the plan, see `engine_layers`; None if the plan
            cannot be opened here.
    """

    seconds: float
    network: dict[str, str]
    engine: dict[str, str] | None


def build_in_process(
    request: PlanRequest, folder: Path, progress: Callable[[str, float], None]
) -> BuiltPlan:
    """Builds one plan in a process of its own.

    Args:
        request: the plan to build.
        folder: the folder for temporary files.
        progress: called with the phase and its finished share.

    Raises:
        EngineError: the plan cannot be built, or the process ends without a result.
    """
    request_file = folder / "request.json"
    request_file.write_text(json.dumps(dataclasses.asdict(request)))
    environment = dict(os.environ)
    reading, writing = os.pipe()
    with (
        tempfile.TemporaryFile(dir=folder) as words,
        os.fdopen(reading) as events,
        # Not in the bundle: its path may contain a colon, which separates entries of LD_LIBRARY_PATH.
        tempfile.TemporaryDirectory(prefix="comask-rtx-") as links,
    ):
        path = search_path(Path(links)) if request.flavor == "tensorrt-rtx" else None
        if path is not None:
            environment["LD_LIBRARY_PATH"] = path
        process = subprocess.Popen(
            [sys.executable, "-m", "comask.export.engine_process", str(request_file), str(writing)],
            env=environment,
            pass_fds=(writing,),
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
        )
        os.close(writing)
        try:
            outcome = _follow(events, progress)
            status = process.wait()
        finally:
            process.kill()  # An interrupt must not leave a build running.
            process.wait()
        if "result" in outcome:
            return BuiltPlan(**outcome["result"])
        if "error" in outcome:
            raise EngineError(outcome["error"])
        words.seek(0)
        raise EngineError(_obituary(request.flavor, status, words.read().decode(errors="replace")))


def _follow(events: Iterable[str], progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Reads all events, and returns the last one that does not report progress."""
    steps, outcome = 1, {}
    for line in events:
        event = json.loads(line)
        if "phase" not in event:
            outcome = event
            continue
        steps = event.get("steps", steps)
        progress(event["phase"], event["done"] / max(steps, 1))
    return outcome


def _obituary(flavor: str, status: int, words: str) -> str:
    if status < 0:
        end = f"was ended by {signal.Signals(-status).name}"
    else:
        end = f"ended with exit code {status}"
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    said = "; ".join(lines[-LAST_WORDS:]) or "none"
    hint = ""
    if status == -signal.SIGKILL:
        hint = "; the system may have run out of memory: give a smaller --profile"
    return f"the {flavor} build {end}; its last output: {said}{hint}"


def main(request_file: str, events: str) -> None:
    """Runs in the new process: builds the request in the file, and reports on the descriptor `events`."""
    # The build ends if the process that asked for it ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with os.fdopen(int(events), "w", buffering=1) as pipe:

        def emit(event: Mapping[str, Any]) -> None:
            pipe.write(json.dumps(event) + "\n")

        try:
            request = from_dict(PlanRequest, json.loads(Path(request_file).read_text()))
            emit({"result": dataclasses.asdict(build_plan(request, emit))})
        except (ComaskError, OSError, MemoryError) as error:
            emit({"error": f"{error}" or type(error).__name__})


def build_plan(request: PlanRequest, emit: Emit) -> BuiltPlan:
    """Parses the graph, builds it and writes the plan.

    Raises:
        EngineError: TensorRT rejects the graph, the profile or an option, or the plan cannot be written.
    """
    flavor = load_flavor(request.flavor)
    trt = flavor.trt
    _register(flavor, request.plugin, request.options)
    builder = trt.Builder(flavor.log)
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    _parse(flavor, network, request.graph)
    _set_map_format(flavor, network, request.map_format)
    config = builder.create_builder_config()
    _apply_options(flavor, config, request.options)
    for shapes in request.profiles:
        _add_profile(flavor, builder, config, shapes)
    monitor = _monitor(trt, emit)
    config.progress_monitor = monitor
    cache = _load_timing_cache(config, request.timing_cache)

    start = time.perf_counter()
    flavor.clear()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{flavor.name} cannot build it: {flavor.errors()}")
    seconds = time.perf_counter() - start
    data = memoryview(plan)
    try:
        Path(request.plan).write_bytes(data)
    except OSError as error:
        raise EngineError(f"{request.plan}: cannot be written: {error.strerror}") from error
    if cache is not None and request.timing_cache is not None:
        Path(request.timing_cache).write_bytes(memoryview(config.get_timing_cache().serialize()))
    return BuiltPlan(
        seconds=seconds,
        network=network_layers(network),
        engine=_inspect(flavor, data) if request.tuned_here else None,
    )


def _register(flavor: Flavor, plugin: str, options: BuildOptions) -> None:
    if plugin == "python":
        register_plugins(flavor)
    elif plugin == "aot":
        gpu = find_gpu()
        assert gpu is not None  # `check_options` has made sure of it.
        capability = ptx_capability(gpu, options.hardware_compatibility)
        register_aot_plugins(flavor, capability)


def _inspect(flavor: Flavor, plan: memoryview) -> dict[str, str]:
    """Returns the layers' precisions in the finished engine, which only its own GPU can open."""
    trt = flavor.trt
    runtime = trt.Runtime(flavor.log)
    runtime.engine_host_code_allowed = True  # A version-compatible plan contains a lean runtime.
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{flavor.name} cannot open the plan that it built: {flavor.errors()}")
    inspector = engine.create_engine_inspector()
    return engine_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _parse(flavor: Flavor, network: Any, graph: str) -> None:
    parser = flavor.trt.OnnxParser(network, flavor.log)
    flavor.clear()
    if parser.parse_from_file(graph):
        return
    # These give the reason behind the parser's "could not create the plugin".
    errors = list(flavor.plugin_errors)
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        node = f" (node {error.node_name()}, {error.node_operator()})" if error.node_name() else ""
        errors.append(f"{error.desc()}{node}")
    raise EngineError(
        f"{flavor.name} {flavor.version} cannot parse the graph: "
        f"{'; '.join(errors) or flavor.errors()}"
    )


def _set_map_format(flavor: Flavor, network: Any, name: str) -> None:
    """Requires one memory format of every feature map that enters or leaves a network."""
    sides = ((network.num_inputs, network.get_input), (network.num_outputs, network.get_output))
    for count, get in sides:
        for tensor in map(get, range(count)):
            if tensor.name in LEVEL_STRIDES:
                tensor.allowed_formats = 1 << int(getattr(flavor.trt.TensorFormat, name))


def _apply_options(flavor: Flavor, config: Any, options: BuildOptions) -> None:
    trt = flavor.trt
    if options.workspace_mib is not None:
        limit = options.workspace_mib * MIB
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility:
        name = options.hardware_compatibility.upper()
        level = getattr(trt.HardwareCompatibilityLevel, name, None)
        if level is None:
            raise EngineError(
                f"--hardware-compatibility {name.lower()}: {flavor.name} {flavor.version} does not "
                f"support it; leave it out, or use a newer TensorRT"
            )
        config.hardware_compatibility_level = level
    config.clear_flag(trt.BuilderFlag.TF32)  # Its 10 bits of mantissa are fewer than fp32 promises.
    # With full names, the inspector tells which layer has which precision.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if flavor.name == "tensorrt-rtx" and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # Without it, TensorRT-RTX may allocate while it runs, which a CUDA graph's capture forbids.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for place, capability in enumerate(options.compute_capabilities):
            config.set_compute_capability(_capability(trt, capability), place)


def _capability(trt: Any, capability: int) -> Any:
    value = getattr(trt.ComputeCapability, f"SM{capability}", None)
    if value is None:
        known = sorted(n for n in dir(trt.ComputeCapability) if n.startswith("SM"))
        raise EngineError(
            f"--compute-capability {capability}: this TensorRT-RTX supports only {', '.join(known)}"
        )
    return value


def _add_profile(flavor: Flavor, builder: Any, config: Any, shapes: Mapping[str, Shapes]) -> None:
    profile = builder.create_optimization_profile()
    for name, (least, best, largest) in shapes.items():
        profile.set_shape(name, least, best, largest)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"{flavor.name} refuses the profile: {flavor.errors()}")


def _load_timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    data = Path(path).read_bytes() if Path(path).exists() else b""
    cache = config.create_timing_cache(data)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        # The cache is of another GPU or version: begin a new one, which replaces it.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _monitor(trt: Any, emit: Emit) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the outermost phase; the inner ones pass too fast to read."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer: str | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outer = name
                emit({"phase": name, "done": 0, "steps": steps})

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.outer:
                emit({"phase": name, "done": step + 1})
            return True  # Continue the build.

        def phase_finish(self, name: str) -> None:
            """Does nothing: the last step has already reported 100 %."""

    return Monitor()


if __name__ == "__main__":
    main(*sys.argv[1:])
