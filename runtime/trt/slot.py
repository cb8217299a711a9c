"""A slot: all that one call at a time needs to run both stages on the GPU.

Device buffers go by tensor name and belong to both stages: what stage 1 writes as `p2` stage 2 reads as
`p2`, without a copy. Buffers grow when a larger shape comes and never shrink, so that after the first
calls nothing is allocated and addresses stay, which captured CUDA graphs need.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from comask.errors import EngineError
from comask.runtime.device import Device, DeviceMemory, Event, PinnedMemory
from comask.runtime.dlpack import SharedArray
from comask.runtime.session import PROPOSALS, Array
from comask.runtime.trt.engine import PROFILE, Engine, Flavor, Shape, manages_memory

BEST = {name: f"best {name}" for name in PROPOSALS}  # their buffers


class Slot:
    """A stream, an execution context of each stage, and their buffers; all inside `with device:`.

    Args:
        device: to run on.
        flavor: of the engines.
        engines: by stage.
        proposals: see `Stages`.

    Attributes:
        stream: that all is queued on.
        buffers: by tensor name.
        closing: frees what others keep with the slot, when its work is done.
    """

    def __init__(
        self,
        device: Device,
        flavor: Flavor,
        engines: Mapping[str, Engine],
        proposals: int | None = None,
    ) -> None:
        self._device, self._flavor, self._engines = device, flavor, engines
        self.buffers: dict[str, DeviceMemory] = {}
        self.closing = ExitStack()
        self._staging: dict[str, PinnedMemory] = {}
        self._proposals = proposals
        self._cuts: dict[str, tuple[Shape, Shape]] = {}  # of `PROPOSALS`: as written, as read
        self._scratch: DeviceMemory | None = None  # of both stages, which run one after the other
        self._specs = {s.name: s for e in engines.values() for s in (*e.inputs, *e.outputs)}
        # what each context was last told: its tensors' shapes, and where they and its scratch lie
        self._shapes: dict[str, dict[str, Shape]] = {}
        self._addresses: dict[str, list[int]] = {}
        self._contexts = {stage: engine.new_context() for stage, engine in engines.items()}
        self.stream = device.stream()
        for stage in engines:
            # TensorRT gives its only profile to the first context of an engine by itself
            if self._contexts[stage].active_optimization_profile != PROFILE:
                taken = self._contexts[stage].set_optimization_profile_async(
                    PROFILE, self.stream.handle
                )
                self._must(taken, f"{stage}: its profile for another context")
        self.stream.synchronize()

    def run(
        self,
        stages: Sequence[str],
        feeds: Mapping[str, Array],
        seconds: dict[str, float] | None = None,
    ) -> dict[str, Array]:
        """Runs stages one after the other; those after the first read what the ones before wrote.

        Args:
            stages: `stage1`, `stage2`, or both.
            feeds: inputs that no earlier stage writes, by name.
            seconds: is told how long each stage took on the GPU, where given.

        Returns:
            the last stage's outputs in arrays of the caller's.

        Raises:
            EngineError: for a shape outside the profile, too little memory, or a failure of the GPU.
        """
        wanted = self.output_names(stages)
        shapes = self.reserve(stages, {name: a.shape for name, a in feeds.items()}, feeds)
        marks = [] if seconds is None else [self._device.event(timed=True) for _ in (0, *stages)]
        with ExitStack() as ends:
            for mark in marks:
                ends.callback(mark.close)
            try:
                for name, array in feeds.items():
                    staged = self.host_view(name, array.shape)
                    staged[...] = array  # in the engine's type, which may be another one
                    self.stream.copy_in(self.buffers[name], staged)
                self.enqueue(stages, marks)
                for name in wanted:
                    self.stream.copy_out(self.host_view(name, shapes[name]), self.buffers[name])
            finally:
                self.stream.synchronize()  # after an error too: nothing may move while work is queued
            for stage, before, behind in zip(stages, marks, marks[1:], strict=False):
                assert seconds is not None
                seconds[stage] = behind.since(before)
        return {name: self.host_view(name, shapes[name]).copy() for name in wanted}

    def output_names(self, stages: Sequence[str]) -> list[str]:
        """Of the last stage."""
        return [spec.name for spec in self._engines[stages[-1]].outputs]

    def reserve(
        self, stages: Sequence[str], fed: Mapping[str, Shape], staged: Iterable[str]
    ) -> dict[str, Shape]:
        """Makes everything ready for a call; nothing of an earlier one may be running.

        Args:
            stages: to run.
            fed: shapes of the inputs that no earlier stage writes.
            staged: tensors that need page-locked memory besides the outputs.

        Returns:
            the shapes of all tensors by name.

        Raises:
            EngineError: for a shape outside the profile, or too little memory.
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
                self._stage_on_host(name, shapes[name])
        except EngineError:
            self._shapes.clear()  # memory may be missing that they stand for
            raise
        for stage in stages:
            self._set_addresses(stage)
        return shapes

    def enqueue(self, stages: Sequence[str], marks: Sequence[Event] = ()) -> None:
        """Queues what `reserve` made ready, one stage after the other.

        Args:
            stages: as `reserve` was given.
            marks: recorded before the first stage and behind each, where given.
        """
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
        """Shapes of the best proposals, which lie in buffers of their own, image behind image."""
        for name in PROPOSALS:
            batch, count, *rest = shapes[name]
            best = (batch, min(count, self._proposals or count), *rest)
            held = self.buffers.pop(BEST[name], None)
            self.buffers[BEST[name]] = self._grown(held, self._size(name, best))
            self._cuts[name] = shapes[name], best
        return {name: best for name, (_, best) in self._cuts.items()}

    def _copy_best(self) -> None:
        for name, (written, read) in self._cuts.items():
            row, part = (self._size(name, shape[1:]) for shape in (written, read))
            for image in range(written[0]):
                source = self.buffers[name].address + image * row
                self.stream.copy_over(self.buffers[BEST[name]], source, image * part, part)

    def layout(self, stages: Sequence[str]) -> object:
        """Shapes and addresses as they are: where these are equal, a captured graph holds."""
        return [(stage, self._shapes[stage], self._addresses[stage]) for stage in stages]

    # No local variable holds a context: an exception's traceback would keep it alive beyond `close`.

    def _set_shapes(self, stage: str, known: Mapping[str, Shape]) -> None:
        """Tells a context its inputs' shapes; makes room for all of its tensors."""
        engine = self._engines[stage]
        inputs: dict[str, Shape] = {spec.name: known[spec.name] for spec in engine.inputs}
        if inputs.items() <= self._shapes.get(stage, {}).items():
            return
        engine.check(inputs)
        self._addresses.pop(stage, None)
        self._flavor.clear()
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
            self.buffers[name] = self._grown(self.buffers.pop(name, None), self._size(name, shape))
        if manages_memory(self._flavor.trt):
            held, self._scratch = self._scratch, None
            size = int(self._contexts[stage].update_device_memory_size_for_shapes())
            self._scratch = self._grown(held, size)
        self._shapes[stage] = shapes

    def _set_addresses(self, stage: str) -> None:
        """Tells a context where its tensors and its scratch memory lie, if anything changed."""
        names = list(self._shapes[stage])
        own = stage == "stage2" and self._cuts
        addresses = [self.buffers[BEST[n] if own and n in BEST else n].address for n in names]
        if self._scratch is not None:
            addresses.append(self._scratch.address)
        if self._addresses.get(stage) == addresses:
            return
        self._flavor.clear()
        for name, address in zip(names, addresses, strict=False):
            taken = self._contexts[stage].set_tensor_address(name, address)
            self._must(taken, f"{stage}: address of {name}")
        if self._scratch is not None:
            self._contexts[stage].set_device_memory(self._scratch.address, self._scratch.size)
        self._addresses[stage] = addresses

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of a tensor."""
        return self._specs[name].dtype

    def _size(self, name: str, shape: Shape) -> int:
        return math.prod(shape) * self._specs[name].dtype.itemsize

    def _stage_on_host(self, name: str, shape: Shape) -> None:
        size = self._size(name, shape)
        held = self._staging.get(name)
        if held is not None and held.bytes.size >= size:
            return
        if held is not None:
            del self._staging[name]
            held.free()
        self._staging[name] = self._device.pinned(max(size, 1))

    def host_view(self, name: str, shape: Shape) -> Array:
        """A tensor's page-locked memory, to be used until the slot's next call."""
        staged = self._staging[name].bytes[: self._size(name, shape)]
        return staged.view(self._specs[name].dtype).reshape(shape)

    def _grown(self, held: DeviceMemory | None, size: int) -> DeviceMemory:
        """At least `size` bytes, in place of what is held; freed first, so that both need never fit."""
        if held is not None and held.size >= size:
            return held
        if held is not None:
            self.stream.synchronize()  # which waits for whom outputs were lent to
            held.free()
        return self._device.memory(max(size, 1))  # CUDA has no empty allocations

    def _must(self, succeeded: Any, what: str) -> None:
        if not succeeded:
            raise EngineError(f"{self._flavor.name} refuses {what}: {self._flavor.errors()}")

    def close(self) -> None:
        """Frees everything when the stream's work is done; no call may be running."""
        self.stream.synchronize()  # a session that nobody closed may have left work
        self.closing.close()
        self._contexts.clear()  # TensorRT frees a context with its last reference
        self.stream.close()
        for memory in self.buffers.values():
            memory.free()
        if self._scratch is not None:
            self._scratch.free()
        for staged in self._staging.values():
            staged.free()
        self.buffers, self._staging, self._scratch = {}, {}, None


class CopiedMemory:
    """The owner of a copied output; all work on it is done.

    Args:
        device: of the memory.
        memory: its own from here on.
    """

    def __init__(self, device: Device, memory: DeviceMemory) -> None:
        self._device, self._memory = device, memory
        weakref.finalize(self, _free, device, memory)

    def shared(self, like: SharedArray) -> SharedArray:
        """It as an array of the same shape and type as another."""
        return SharedArray(self._memory.address, like.shape, like.dtype, like.device, self)

    def share(self, stream: int | None) -> int | None:
        """Nothing to wait for."""
        return None

    def copy(self, array: SharedArray) -> SharedArray:
        """See `SharedArray.copy`."""
        with self._device:
            memory, stream = self._device.memory(self._memory.size), self._device.stream()
            stream.copy_over(memory, self._memory.address)
            stream.close()
        return CopiedMemory(self._device, memory).shared(array)


def _free(device: Device, memory: DeviceMemory) -> None:
    with device:
        memory.free()
