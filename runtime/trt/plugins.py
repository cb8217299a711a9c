"""Our ops as TensorRT plugins in Python: `IPluginV3`, launching the kernels of `comask.kernels`.

No compiler, no headers, no library to find. TensorRT calls them on its own threads, with the stream and
the pointers of a call; nothing here may synchronise or allocate.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from comask.runtime.trt.flavors import Flavor
from comask.runtime.trt.ops import NAMESPACE, OPS, VERSION, Op, TensorDesc

from comask.errors import EngineError
from comask.kernels import driver

_registering = threading.Lock()


@functools.cache
def _creators(flavor: Flavor) -> list[Any]:
    """One creator an op; cached because TensorRT's registry does not own Python objects."""
    plugin = _plugin_class(flavor.trt)
    return [_creator_class(flavor.trt, plugin, op, flavor.plugin_errors)() for op in OPS]


def register_plugins(flavor: Flavor) -> None:
    """Makes the ops known to a TensorRT; again is harmless, in any order of imports.

    A creator of that name that is there already stays.
    """
    registry = flavor.trt.get_plugin_registry()
    with _registering:
        for creator in _creators(flavor):
            if registry.get_creator(creator.name, VERSION, NAMESPACE) is None:
                registry.register_creator(creator, NAMESPACE)


def _plugin_class(trt: Any) -> Any:
    """The plugin over one TensorRT's base classes; one class serves both ops."""

    class Plugin(
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        """TensorRT's view of an `Op`."""

        def __init__(self, op: Op) -> None:
            # the bases are bound C++ classes, each wants its own call
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.op = op
            self.plugin_name = op.name
            self.plugin_version = VERSION
            self.plugin_namespace = NAMESPACE
            self.num_outputs = 1

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.op)

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection(
                [_field(trt, name, value) for name, value in self.op.fields().items()]
            )

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            name = self.op.output_type([kind.name for kind in input_types])
            return [getattr(trt.DataType, name)]

        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expressions: Any
        ) -> list[Any]:
            product = functools.partial(expressions.operation, trt.DimensionOperation.PROD)
            dims = self.op.output_shape(inputs, expressions.constant, product)
            output = trt.DimsExprs(len(dims))
            for axis, dim in enumerate(dims):
                output[axis] = dim
            return [output]

        def supports_format_combination(
            self, position: int, in_out: Sequence[Any], num_inputs: int
        ) -> bool:
            return self.op.supports(position, [_desc(d.desc) for d in in_out[: position + 1]])

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Nothing depends on the profile."""

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Shapes come with every call."""

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            """There is one tactic."""

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return 0

        def attach_to_context(self, context: Any) -> Any:
            # compile now: the first call may already be part of a captured CUDA graph
            driver.prepare(self.op.kernel)
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
            launch = self.op.launch([_desc(desc) for desc in input_desc])
            driver.launch(launch, list(inputs), outputs[0], stream)

    return Plugin


def _creator_class(trt: Any, plugin: Any, op: type[Op], errors: list[str]) -> Any:
    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes the plugin from an ONNX node's attributes, or from an engine's fields."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = op.name
            self.plugin_version = VERSION
            self.plugin_namespace = NAMESPACE
            empty = np.array([])
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(name, empty, _field_type(trt, kind))
                    for name, kind in op.attributes.items()
                ]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            try:
                return plugin(op.from_attributes(_values(op.attributes, fields)))
            except EngineError as error:
                errors.append(str(error))
                raise

    return Creator


def _desc(desc: Any) -> TensorDesc:
    return TensorDesc(tuple(desc.dims), desc.type.name, desc.format.name)


def _field_type(trt: Any, kind: type) -> Any:
    return trt.PluginFieldType.FLOAT32 if kind is float else trt.PluginFieldType.INT32


def _field(trt: Any, name: str, value: float) -> Any:
    dtype = np.float32 if isinstance(value, float) else np.int32
    return trt.PluginField(name, np.array([value], dtype), _field_type(trt, type(value)))


def _values(attributes: Mapping[str, type], fields: Any) -> dict[str, Any]:
    """Fields as Python values; the parser drops attributes that the creator does not name."""
    return {
        field.name: attributes[field.name](np.asarray(field.data).reshape(-1)[0])
        for field in fields
    }
