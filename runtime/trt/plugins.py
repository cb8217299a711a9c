"""Our ops as TensorRT plugins in Python: `IPluginV3`, which launches the kernels of `comask.kernels`.

They need no compiler, headers or library. `enqueue` runs on the thread that executes the engine, in its
CUDA context, with the stream and the pointers of the call; it must not synchronise or allocate.

TensorRT's bindings keep bare pointers into their arguments (a field's numbers, a collection's fields) and
drop the errors that a callback raises. Therefore a plugin keeps its arguments alive, and errors are
stored in the flavor.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from comask.errors import ComaskError, EngineError
from comask.kernels import run
from comask.runtime.trt.flavor import Flavor
from comask.runtime.trt.ops import NAMESPACE, OPS, VERSION, DimensionMath, Op, TensorDesc

__all__ = ["register_plugins"]

_registering = threading.Lock()


@functools.cache
def _creators(flavor: Flavor) -> list[Any]:
    """Returns a creator for each op; cached because TensorRT's registry does not own Python objects."""
    plugin = _plugin_class(flavor)
    return [_creator_class(flavor, plugin, op)() for op in OPS]


def register_plugins(flavor: Flavor) -> None:
    """Registers the ops with a TensorRT; a second call does nothing.

    A creator that is already registered under an op's name stays.

    Raises:
        EngineError: if TensorRT refuses a creator.
    """
    registry = flavor.trt.get_plugin_registry()
    with _registering:
        for creator in _creators(flavor):
            known = registry.get_creator(creator.name, VERSION, NAMESPACE) is not None
            if not known and not registry.register_creator(creator, NAMESPACE):
                raise EngineError(
                    f"{flavor.name} does not take the plugin {creator.name}: {flavor.errors()}"
                )


class Fields:
    """A `PluginFieldCollection` that keeps alive the memory it points into.

    Args:
        trt: TensorRT's module.
        values: the number of each field by name; None in a creator, which has no numbers yet.
        kinds: the Python type of each field.
    """

    def __init__(
        self, trt: Any, values: Mapping[str, float | None], kinds: Mapping[str, type]
    ) -> None:
        types = {float: trt.PluginFieldType.FLOAT32, int: trt.PluginFieldType.INT32}
        dtypes = {float: np.float32, int: np.int32}
        self._numbers = [
            np.array([] if value is None else [value], dtypes[kinds[name]])
            for name, value in values.items()
        ]
        self._fields = [
            trt.PluginField(name, numbers, types[kinds[name]])
            for name, numbers in zip(values, self._numbers, strict=True)
        ]
        self.collection = trt.PluginFieldCollection(self._fields)


class OneTactic:
    """The methods of `IPluginV3` that a plugin with a single tactic and no state leaves empty."""

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Does nothing, since the plugin does not depend on the profile."""

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Does nothing, since `enqueue` compares the shapes with those of its last call."""

    def get_valid_tactics(self) -> list[int]:
        """Returns no tactics besides TensorRT's default."""
        return []

    def set_tactic(self, tactic: int) -> None:
        """Does nothing, since the plugin has a single tactic."""

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Returns 0, since the kernels need no memory but that of their inputs and outputs."""
        return 0


def _plugin_class(flavor: Flavor) -> Any:
    """Creates the plugin class over a TensorRT's base classes; it serves all ops."""
    trt: Any = flavor.trt

    class Plugin(
        OneTactic,
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        """TensorRT's view of an `Op`."""

        def __init__(self, op: Op) -> None:
            # the base classes are bindings of C++ classes, each of which must be initialised by itself
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.op = op
            # the last call's
            self.shapes: tuple[tuple[int, ...], ...] = ()
            self.launch: run.BoundLaunch | None = None
            self.plugin_name = op.name
            self.plugin_version = VERSION
            self.plugin_namespace = NAMESPACE
            self.num_outputs = 1
            self.fields = Fields(trt, op.fields(), op.attributes)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.op)

        def get_fields_to_serialize(self) -> Any:
            return self.fields.collection

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            name = self.op.output_type([kind.name for kind in input_types])
            return [getattr(trt.DataType, name)]

        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expressions: Any
        ) -> list[Any]:
            math = DimensionMath(
                expressions.constant,
                functools.partial(expressions.operation, trt.DimensionOperation.PROD),
                functools.partial(expressions.operation, trt.DimensionOperation.CEIL_DIV),
            )
            dims = self.op.output_shape(inputs, math)
            output = trt.DimsExprs(len(dims))
            for axis, dim in enumerate(dims):
                output[axis] = dim
            return [output]

        def supports_format_combination(
            self, position: int, in_out: Sequence[Any], num_inputs: int
        ) -> bool:
            return self.op.supports(position, [_desc(d.desc) for d in in_out[: position + 1]])

        def attach_to_context(self, context: Any) -> Any:
            with _telling(flavor):
                # compile now: the first call may already be part of a captured CUDA graph
                run.prepare(self.op.kernel)
            return self.clone()

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            with _telling(flavor):
                # A context runs a plugin of its own, so its formats and types never change.
                shapes = tuple([tuple(desc.dims) for desc in input_desc])
                if self.launch is None or shapes != self.shapes:
                    launch = self.op.launch([_desc(desc) for desc in input_desc])
                    self.launch, self.shapes = run.BoundLaunch(launch), shapes
                self.launch.queue(inputs, outputs[0], stream)

    return Plugin


def _creator_class(flavor: Flavor, plugin: Any, op: type[Op]) -> Any:
    trt: Any = flavor.trt

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Creates the plugin from an ONNX node's attributes or an engine's fields."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = op.name
            self.plugin_version = VERSION
            self.plugin_namespace = NAMESPACE
            self.fields = Fields(trt, dict.fromkeys(op.attributes), op.attributes)
            self.field_names = self.fields.collection

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            with _telling(flavor):
                return plugin(op.from_attributes(_values(op.attributes, fields)))

    return Creator


@contextmanager
def _telling(flavor: Flavor) -> Iterator[None]:
    """Records a callback's error in the flavor, since TensorRT only reports that the callback failed."""
    try:
        yield
    except ComaskError as error:
        flavor.plugin_errors.append(" ".join(str(error).split()))
        raise


def _desc(desc: Any) -> TensorDesc:
    return TensorDesc(tuple(desc.dims), desc.type.name, desc.format.name)


def _values(attributes: Mapping[str, type], fields: Any) -> dict[str, Any]:
    """Returns fields as Python values; the parser drops attributes that the creator does not name."""
    return {
        field.name: attributes[field.name](np.asarray(field.data).reshape(-1)[0])
        for field in fields
    }
