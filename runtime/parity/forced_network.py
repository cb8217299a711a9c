"""The PyTorch network, held to a graph layer by layer (teacher forcing).

Each layer of it reads what the graph's layer read, and hands on what the graph's layer gave. So what it
would have done instead is known of every step by itself, and differences do not add up: that matters in
int8, where many small roundings lead far away from the network though each step is right. What int8
rounds, activations and weights, the network takes from the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from comask.runtime.compare import relative_error
from comask.runtime.parity.graph_layers import GraphTensors, Key
from comask.runtime.session import Array

if TYPE_CHECKING:
    from torch import Tensor, nn

    from comask.models.comask import CoMask

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")


class ForcedNetwork:
    """A copy of a network on the CPU.

    Args:
        model: fp32, in evaluation mode; stays as it is.
    """

    def __init__(self, model: CoMask) -> None:
        from torch import nn

        from comask.models.backbone import fold_batch_norms

        self._model = deepcopy(model).cpu()
        fold_batch_norms(self._model.backbone)  # as in the graphs
        self._graph = GraphTensors({}, {}, [])
        self._errors: dict[tuple[Key, Side], float] = {}
        self._uses: Counter[str] = Counter()
        for name, module in list(self._model.named_modules()):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                self._hold(name, module)
            elif hasattr(module, "downsample"):  # a residual block
                self._hold_shortcut(name, module)
        self._pool, self._pools = self._model.pool, 0
        self._model.pool = self._pool_as_graph  # type: ignore[method-assign]

    def compare(
        self, stage: str, feeds: Mapping[str, Array], graph: GraphTensors, diagnostics: bool
    ) -> dict[tuple[Key, Side], float]:
        """How far each layer's tensors in a graph lie off what the network makes of the same.

        Args:
            stage: `stage1` or `stage2`.
            feeds: what the graph got.
            graph: what it computed.
            diagnostics: whether it has the diagnostics' outputs, which may run layers more.

        Returns:
            max|a-b| / max|a|, see `relative_error`; nothing of layers that the network does not run.
        """
        import torch

        self._graph, self._pools = graph, 0
        self._errors.clear()
        self._uses.clear()
        options = {"diagnostics": True} if diagnostics else {}
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
            getattr(self._model, stage)(**tensors, **options)
        return dict(self._errors)

    def _hold(self, name: str, module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            key = name, self._uses[name]
            if key not in self._graph.layers:
                return None
            theirs, (own,) = self._graph.layers[key], arguments
            if theirs.weight is not None:
                module.weight.data = _forced(module.weight.data, theirs.weight)
            self._errors[key, "input"] = relative_error(own.numpy(), theirs.given)
            return (_forced(own, theirs.read),)

        def after(_: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
            key = name, self._uses[name]
            self._uses[name] += 1
            if key not in self._graph.layers:
                return None
            theirs = self._graph.layers[key].output
            self._errors[key, "output"] = relative_error(output.numpy(), theirs)
            return _forced(output, theirs)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _hold_shortcut(self, name: str, block: nn.Module) -> None:
        from torch import nn

        def theirs(module: nn.Module, arguments: Any, own: Tensor) -> Tensor:
            shortcuts = self._graph.shortcuts
            return _forced(own, shortcuts[name]) if name in shortcuts else own

        shortcut = block.downsample if isinstance(block.downsample, nn.Module) else nn.Identity()
        shortcut.register_forward_hook(theirs)
        block.downsample = shortcut  # where there was none, a place for the hook

    def _pool_as_graph(self, pyramid: list[Tensor], rois: Tensor, size: int) -> Tensor:
        theirs = self._graph.rois[self._pools]
        self._pools += 1
        return self._pool(pyramid, _forced(rois, theirs), size)


def _forced(own: Tensor, theirs: Array) -> Tensor:
    """A copy of the graph's tensor, as what follows may be in place; if it is useless, the network's."""
    import torch

    if theirs.shape != own.shape or not np.isfinite(theirs).all():
        return own
    return torch.tensor(theirs)
