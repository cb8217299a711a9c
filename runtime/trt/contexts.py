"""Execution contexts: what one call at a time needs to run both stages on the GPU.

Device buffers are kept by tensor name and shared by both stages: stage 2 reads `p2` where stage 1 wrote
it, without a copy. Buffers grow for a larger shape and never shrink. After the first calls, therefore,
nothing is allocated and no address changes, as captured CUDA graphs require.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from comask.errors import EngineError
from comask.runtime.backends.base import PROPOSALS, Array
from comask.runtime.device import Device, DeviceMemory, Event, PinnedMemory, Stream
from comask.runtime.trt.engine import Engine, Shape, manages_memory
from comask.runtime.trt.flavor import Flavor
from comask.runtime.trt.graphs import Graphs, RepeatedWork, graphs_of_calls
from comask.runtime.trt.memory_format import MemoryFormat

Key = TypeVar("Key", bound=Hashable)
Memory = TypeVar("Memory", DeviceMemory, PinnedMemory)

BEST = {name: f"best {name}" for name in PROPOSALS}  # names of the buffers of the best proposals
SCRATCH = "scratch memory"  # name of the buffer that the stages share: they run one after the other


def grow(
    held: dict[Key, Memory], key: Key, size: int, allocate: Callable[[int], Memory], stream: Stream
) -> Memory:
    """Returns the memory that `held` has for `key`; it is replaced if it has fewer than `size` bytes.

    The old memory is freed first, so that both never occupy memory at once.
    """
    old = held.get(key)
    if old is not None and old.size >= size:
        return old
    if old is not None:
        stream.synchronize()  # also waits for the streams that outputs were lent to
        del held[key]
        old.free()
    held[key] = allocate(max(size, 1))  # CUDA has no empty allocations
    return held[key]


def _shared_formats(engines: Mapping[str, Engine]) -> dict[str, MemoryFormat]:
    """Returns the format of every tensor; what stage 1 writes, stage 2 must read as it lies there."""
    formats: dict[str, MemoryFormat] = {}
    for stage, engine in engines.items():
        for name, found in engine.formats.items():
            written = formats.setdefault(name, found)
            if written != found:
                raise EngineError(
                    f"{stage} reads {name} in TensorRT's format {found.name}, but it is written in "
                    f"{written.name}: build both engines again with comask build --rebuild"
                )
    return formats


class Contexts:
    """An execution context for each stage, with a stream and buffers; use it inside `with device:`.

    Args:
        device: the device to run on.
        flavor: the engines' flavor.
        engines: the engine of each stage.
        proposals: see `Stages`.
        graphs: who captures repeated calls as CUDA graphs; None for what suits calls of any shape.

    Attributes:
        stream: the stream on which all work is queued.
        buffers: the device memory of each tensor, by name.
    """

    def __init__(
        self,
        device: Device,
        flavor: Flavor,
        engines: Mapping[str, Engine],
        proposals: int | None = None,
        *,
        graphs: Graphs | None = None,
    ) -> None:
        self._device, self._flavor, self._engines = device, flavor, engines
        self.buffers: dict[str, DeviceMemory] = {}
        self._staging: dict[str, PinnedMemory] = {}
        self._proposals = proposals
        # shapes of `PROPOSALS`: as stage 1 writes them, as stage 2 reads them
        self._cuts: dict[str, tuple[Shape, Shape]] = {}
        self._specs = {s.name: s for e in engines.values() for s in (*e.inputs, *e.outputs)}
        self._formats = _shared_formats(engines)
        # what each context was last told: its tensors' shapes, their addresses and its scratch memory's
        self._shapes: dict[str, dict[str, Shape]] = {}
        self._addresses: dict[str, list[int]] = {}
        # stages that may have compiled kernels since the last save
        self._new_shapes: set[str] = set()
        graphs = graphs or graphs_of_calls(flavor.trt)
        self._contexts = {stage: engine.new_context(graphs) for stage, engine in engines.items()}
        self.stream = device.stream()
        self._repeated = RepeatedWork(self.stream, enabled=graphs == "captured")

    def run(
        self,
        stages: Sequence[str],
        feeds: Mapping[str, Array],
        seconds: dict[str, float] | None = None,
    ) -> dict[str, Array]:
        """Runs stages one after the other; later ones read the outputs of earlier ones.

        Args:
            stages: `stage1`, `stage2`, or both.
            feeds: inputs that no earlier stage writes, by name.
            seconds: receives the seconds that each stage took on the GPU, if given.

        Returns:
            the last stage's outputs, in arrays that belong to the caller.

        Raises:
            EngineError: if a shape is outside the profile, memory runs out, or the GPU fails.
        """
        shapes = self.reserve(stages, {name: a.shape for name, a in feeds.items()}, feeds)
        marks = [] if seconds is None else [self._device.event(timed=True) for _ in (0, *stages)]
        with ExitStack() as ends:
            for mark in marks:
                ends.callback(mark.close)
            try:
                for name, array in feeds.items():
                    self.stage_in(name, array)
                self.queue(stages, feeds, shapes, marks=marks)
            finally:
                # after an error, too: no memory may be freed while work on it is queued
                self.stream.synchronize()
            self.save_compiled()
            for stage, before, behind in zip(stages, marks, marks[1:], strict=False):
                assert seconds is not None
                seconds[stage] = behind.since(before)
        return self.copied_out(self.output_names(stages), shapes)

    def save_compiled(self) -> None:
        """Saves what a flavor compiled for new shapes; the calls with these shapes must be done."""
        while self._new_shapes:
            self._engines[self._new_shapes.pop()].save_compiled()

    def stage_in(self, name: str, values: Array) -> None:
        """Puts an input into page-locked memory, in the engine's type; `queue` copies it to the GPU."""
        staged = self._staged(name, values.shape)
        view = self.host_view(name, values.shape)
        if view.nbytes != staged.nbytes:
            staged[...] = 0  # the padding
        view[...] = values

    def copied_out(self, names: Iterable[str], shapes: Mapping[str, Shape]) -> dict[str, Array]:
        """Returns what `queue` copied, once that is done, in arrays that belong to the caller."""
        return {name: self.host_view(name, shapes[name]).copy("C") for name in names}

    def output_names(self, stages: Sequence[str]) -> list[str]:
        """Returns the names of the last stage's outputs."""
        return [spec.name for spec in self._engines[stages[-1]].outputs]

    def reserve(
        self, stages: Sequence[str], fed: Mapping[str, Shape], staged: Iterable[str]
    ) -> dict[str, Shape]:
        """Prepares contexts and memory for a call; no earlier call may still be running.

        Args:
            stages: the stages to run.
            fed: shapes of the inputs that no earlier stage writes.
            staged: names of the tensors that need page-locked memory besides the outputs.

        Returns:
            the shapes of all tensors by name.

        Raises:
            EngineError: if a shape is outside the profile, or memory runs out.
        """
        shapes = dict(fed)
        self._cuts = {}
        try:
            for stage in stages:
                self._set_shapes(stage, shapes)
                shapes |= self._shapes[stage]
                if self._proposals is not None and stage != stages[-1]:
                    shapes |= self._cut(shapes)
            for name in (*staged, *self.output_names(stages)):
                size = self._size(name, shapes[name])
                grow(self._staging, name, size, self._device.pinned, self.stream)
        except BaseException:
            self._shapes.clear()  # memory for them may be missing
            self._repeated.drop()  # TensorRT forbids graphs of shapes before those that it was told last
            raise
        for stage in stages:
            self._set_addresses(stage)
        return shapes

    def queue(
        self,
        stages: Sequence[str],
        staged: Iterable[str],
        shapes: Mapping[str, Shape],
        *,
        marks: Sequence[Event] = (),
        then: Callable[[], None] | None = None,
        depends: object = None,
    ) -> None:
        """Queues stages and copies that `reserve` prepared, as a CUDA graph if the last call was alike.

        The last stage's outputs are copied to page-locked memory, so that a caller waits only once.

        Args:
            stages: the stages that were given to `reserve`.
            staged: names of the inputs to copy to the GPU first, from page-locked memory.
            shapes: the shapes that `reserve` returned.
            marks: events to record before the first stage and after each one, if given; the work then
                runs without a graph.
            then: queues further work behind the stages, if given.
            depends: all that this further work depends on.

        Raises:
            EngineError: if TensorRT does not start a stage.
        """
        inputs, outputs = tuple(staged), self.output_names(stages)

        def work() -> None:
            for name in inputs:
                self.stream.copy_in(self.buffers[name], self._staged(name, shapes[name]))
            self.enqueue(stages, marks)
            if then is not None:
                then()
            for name in outputs:
                self.stream.copy_out(self._staged(name, shapes[name]), self.buffers[name])

        if marks:
            work()
            return
        host = [(name, self._staging[name].address) for name in (*inputs, *outputs)]
        layout = self._layout(stages), host, depends
        self._repeated.run(layout, work, lambda: self._refusing_capture(stages))

    def enqueue(self, stages: Sequence[str], marks: Sequence[Event] = ()) -> None:
        """Queues the stages that `reserve` prepared, one after the other; `queue` explains `marks`."""
        for place, stage in enumerate(stages):
            if marks:
                marks[place].record(self.stream)
            if place:
                self._copy_best()
            self._flavor.clear()
            started = self._contexts[stage].execute_async_v3(self.stream.handle)
            self._must(started, f"{stage} does not start")
        if marks:
            marks[-1].record(self.stream)

    def _cut(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Makes room for the best proposals, which have buffers of their own; returns their shapes."""
        for name in PROPOSALS:
            batch, count, *rest = shapes[name]
            best = (batch, min(count, self._proposals or count), *rest)
            self._make_room(BEST[name], self._size(name, best))
            self._cuts[name] = shapes[name], best
        return {name: best for name, (_, best) in self._cuts.items()}

    def _copy_best(self) -> None:
        for name, (written, read) in self._cuts.items():
            row, part = (self._size(name, (1, *shape[1:])) for shape in (written, read))
            for image in range(written[0]):
                source = self.buffers[name].address + image * row
                self.stream.copy_over(self.buffers[BEST[name]], source, image * part, part)

    def _layout(self, stages: Sequence[str]) -> object:
        """Returns all shapes and addresses on the GPU, which a captured graph depends on."""
        return [(stage, self._shapes[stage], self._addresses[stage]) for stage in stages]

    def _refusing_capture(self, stages: Sequence[str]) -> list[str]:
        """Returns the stages that the flavor says cannot be captured as a graph on this stream."""
        return [
            stage
            for stage in stages
            if hasattr(self._contexts[stage], "is_stream_capturable")
            and not self._contexts[stage].is_stream_capturable(self.stream.handle)
        ]

    # Local variables must not hold a context: an exception's traceback would keep it alive after `close`.

    def _set_shapes(self, stage: str, known: Mapping[str, Shape]) -> None:
        """Tells a context the shapes of its inputs, and makes room for all its tensors."""
        engine = self._engines[stage]
        inputs: dict[str, Shape] = {spec.name: known[spec.name] for spec in engine.inputs}
        if inputs.items() <= self._shapes.get(stage, {}).items():
            return
        profile = engine.profile_for(inputs)
        self._addresses.pop(stage, None)
        self._flavor.clear()
        if self._contexts[stage].active_optimization_profile != profile:
            taken = self._contexts[stage].set_optimization_profile_async(
                profile, self.stream.handle
            )
            self._must(taken, f"{stage}: profile {profile}")
            self.stream.synchronize()
        for name, shape in inputs.items():
            taken = self._contexts[stage].set_input_shape(name, shape)
            self._must(taken, f"{stage}: {name} {shape}")
        try:
            unknown = self._contexts[stage].infer_shapes()
        except RuntimeError as error:
            raise EngineError(f"{stage}: shapes do not fit together: {error}") from error
        self._must(not unknown, f"{stage}: no shape follows for {unknown}")
        shapes = inputs | {
            spec.name: tuple(int(n) for n in self._contexts[stage].get_tensor_shape(spec.name))
            for spec in engine.outputs
        }
        for name, shape in shapes.items():
            self._make_room(name, self._size(name, shape))
        if manages_memory(self._flavor.trt):
            size = int(self._contexts[stage].update_device_memory_size_for_shapes())
            self._make_room(SCRATCH, size or engine.largest_scratch(profile))
        self._shapes[stage] = shapes
        self._new_shapes.add(stage)

    def _set_addresses(self, stage: str) -> None:
        """Tells a context the addresses of its tensors and scratch memory, if anything changed."""
        names = list(self._shapes[stage])
        own = stage == "stage2" and self._cuts
        addresses = [self.buffers[BEST[n] if own and n in BEST else n].address for n in names]
        scratch = self.buffers.get(SCRATCH)
        if scratch is not None:
            addresses.append(scratch.address)
        if self._addresses.get(stage) == addresses:
            return
        self._flavor.clear()
        for name, address in zip(names, addresses, strict=False):
            taken = self._contexts[stage].set_tensor_address(name, address)
            self._must(taken, f"{stage}: address of {name}")
        if scratch is not None:
            self._contexts[stage].set_device_memory(scratch.address, scratch.size)
        self._addresses[stage] = addresses

    def _size(self, name: str, shape: Shape) -> int:
        return self._formats[name].count(shape) * self._specs[name].dtype.itemsize

    def _staged(self, name: str, shape: Shape) -> Array:
        return self._staging[name].bytes[: self._size(name, shape)]

    def host_view(self, name: str, shape: Shape) -> Array:
        """Returns a view of a tensor's page-locked memory, which is valid until the next call.

        It has the tensor's shape; in memory, the values may be in another order.
        """
        values = self._staged(name, shape).view(self._specs[name].dtype)
        return self._formats[name].view(values, shape)

    def _make_room(self, name: str, size: int) -> None:
        grow(self.buffers, name, size, self._device.memory, self.stream)

    def _must(self, succeeded: Any, what: str) -> None:
        if not succeeded:
            raise EngineError(f"{self._flavor.name} refuses {what}: {self._flavor.errors()}")

    def close(self) -> None:
        """Waits for the stream's work and frees everything; no call may be running."""
        self.stream.synchronize()  # a session that nobody closed may have left work behind
        self._repeated.drop()
        self._contexts.clear()  # TensorRT frees a context with its last reference
        self.stream.close()
        for memory in self.buffers.values():
            memory.free()
        for staged in self._staging.values():
            staged.free()
        self.buffers, self._staging = {}, {}
