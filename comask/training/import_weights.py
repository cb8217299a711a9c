"""Copies the weights of a file that fit into a model, and reports which ones did.

See `comask.training.weight_files` for the supported files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from comask.data.source import Category
from comask.errors import CheckpointError
from comask.models.comask import CoMask
from comask.training.weight_files import HUB, WeightFile, nothing_fits, read_hub, read_weights

MODULES = ("backbone", "rpn", "head", "fine_head", "mask_scorer")  # that reports name as a whole
CLASS_LAYERS = ("classifier.logits.", "head.mask.", "fine_head.mask.")  # row 0 is the background
OWN_NORMS = "backbone.norms."  # of ConvNeXt's outputs, which a classifier does not have
# Layers whose weights have a different meaning under another value of a setting.
SETTINGS = {
    "rpn.objectness.": ("anchor_ratios",),
    "rpn.deltas.": ("anchor_ratios",),
    "head.offset": ("offset_activation",),
    "mfpn.modules_per_level.": ("msfem_mode", "msfem_place", "residual_attention"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReport:
    """Reports which values of a file and of a model were used, without BatchNorm's step counters.

    Attributes:
        layout: the file's layout.
        taken: the model's names that were filled, possibly only in the rows of some classes.
        left: the file's names that were not used, followed by `: reason` if the model has their place.
        random: the model's names that were not filled.
        class_rows: the classes whose rows came from the file.
        new_classes: the model's classes whose rows stay random, although others came from the file.
        lost_classes: the file's classes that the model does not have.
    """

    layout: str
    taken: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    class_rows: tuple[str, ...] = ()
    new_classes: tuple[str, ...] = ()
    lost_classes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Returns a few lines for the user, with values counted by module."""
        took = f": took {_grouped(self.taken)}" if self.taken else ""
        lines = [f"weights: {self.layout}{took}"]
        if any(name.startswith(CLASS_LAYERS) for name in self.taken):
            lines.append(f"class rows from the file: {_listed(('background', *self.class_rows))}")
            if self.new_classes:
                lines.append(f"class rows that stay random: {_listed(self.new_classes)}")
            if self.lost_classes:
                lines.append(f"classes only in the file: {_listed(self.lost_classes)}")
        if self.left:
            lines.append(f"left in the file: {_grouped(self.left)}")
        if self.random:
            lines.append(f"stay random: {_grouped(self.random)}")
        return lines


def import_weights(model: CoMask, source: str, categories: tuple[Category, ...]) -> WeightReport:
    """Copies the weights of `source` that fit into `model`; on an error the model stays unchanged.

    A file with a backbone must fill the model's whole backbone, except for BatchNorm if the model has
    GroupNorm. In layers that have a row or channel per class, only a comask checkpoint fills rows, of
    classes of the same name; other layouts order classes differently.

    Args:
        model: the model to fill.
        source: `none`, `imagenet` or `imagenet-v2` (torchvision's weights of the backbone, downloaded
            once), or the path of a PyTorch or safetensors file.
        categories: the model's classes in label order.

    Raises:
        CheckpointError: the weights cannot be loaded, or do not fit.
    """
    targets = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    if source == "none":
        return WeightReport(layout="none", random=tuple(targets))
    try:
        hub = source in HUB
        file = read_hub(model.config.backbone, source) if hub else read_weights(Path(source))
        values, report = _fit(model, targets, file, categories)
    except CheckpointError as error:
        raise CheckpointError(f"train.weights={source}: {error}") from error
    for name, value in values.items():
        targets[name].copy_(value)  # A state dict shares the model's memory.
    return report


def _fit(
    model: CoMask, targets: dict[str, Tensor], file: WeightFile, categories: tuple[Category, ...]
) -> tuple[dict[str, Tensor], WeightReport]:
    """Returns the values for the model by its names, and the report on them."""
    their_row = {category.name: row for row, category in enumerate(file.categories, 1)}
    rows = [(0, 0)]  # (the model's row, the file's row)
    rows += [(i, their_row[c.name]) for i, c in enumerate(categories, 1) if c.name in their_row]
    values: dict[str, Tensor] = {}
    left = dict(file.left)
    reasons = {name: _misfit(model, targets, file, name) for name in file.values}
    unfit = {_layer(name) for name, reason in reasons.items() if reason is not None}
    for name, value in file.values.items():
        reason = reasons[name]
        if reason is None and _layer(name) in unfit:
            reason = "the rest of its layer does not fit"  # A bias is useless without its weight.
        if reason is not None:
            left[file.names[name]] = reason
        elif name.startswith(CLASS_LAYERS):
            values[name] = targets[name].clone()
            for row, theirs in rows:
                values[name][row] = value[theirs]
        else:
            values[name] = value
    _require_backbone(model, targets, file, values)
    if not values:
        raise nothing_fits(dict.fromkeys((*file.names.values(), *file.left)))

    by_class = any(name.startswith(CLASS_LAYERS) for name in values)
    ours = [category.name for category in categories] if by_class else []
    return values, WeightReport(
        layout=file.layout,
        taken=tuple(values),
        left=tuple(f"{name}: {reason}" if reason else name for name, reason in left.items()),
        random=tuple(name for name in targets if name not in values),
        class_rows=tuple(name for name in ours if name in their_row),
        new_classes=tuple(name for name in ours if name not in their_row),
        lost_classes=tuple(name for name in their_row if by_class and name not in ours),
    )


def _misfit(model: CoMask, targets: dict[str, Tensor], file: WeightFile, name: str) -> str | None:
    """Returns why the file's value of `name` does not fit the model; None if it fits."""
    if _loses_batch_norm(targets, file, name):
        return "BatchNorm"
    if name not in targets:
        return ""
    for start, settings in SETTINGS.items():
        for setting in settings if name.startswith(start) else ():
            ours = getattr(model.config, setting)
            if file.settings.get(setting, ours) != ours:
                return f"another model.{setting}"
    shape, own_shape = list(file.values[name].shape), list(targets[name].shape)
    expected = own_shape
    if name.startswith(CLASS_LAYERS):
        if not file.categories:
            return "class names unknown"
        expected = [len(file.categories) + 1, *own_shape[1:]]
    return None if shape == expected else f"another shape, {shape}; the model has {own_shape}"


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _loses_batch_norm(targets: dict[str, Tensor], file: WeightFile, name: str) -> bool:
    """Returns whether `name` belongs to a BatchNorm in the file, but to a GroupNorm in the model."""
    statistics = f"{_layer(name)}.running_mean"
    return statistics in file.values and statistics not in targets


def _require_backbone(
    model: CoMask, targets: dict[str, Tensor], file: WeightFile, values: dict[str, Tensor]
) -> None:
    """Rejects a partial backbone, which would mix trained and random layers."""
    names = [
        name
        for name in {**file.values, **targets}
        if name.startswith("backbone.") and not name.startswith(OWN_NORMS)
        if not _loses_batch_norm(targets, file, name)
    ]
    wrong = [name for name in names if name not in values]
    if not wrong or not any(name in file.values for name in names):
        return
    first = f"{file.names[wrong[0]]} does not fit" if wrong[0] in file.values else f"no {wrong[0]}"
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    config = model.config
    raise CheckpointError(
        f"its backbone is not model.backbone={config.backbone} with "
        f"model.backbone_norm={config.backbone_norm} ({first}{more}); give a file of that backbone, or "
        "set model.backbone to the file's"
    )


def _grouped(names: Iterable[str]) -> str:
    """Counts names by module and reason, as in `backbone (100), rpn (2: another shape)`."""
    counts: Counter[tuple[str, str]] = Counter()
    for entry in names:
        name, _, reason = entry.partition(": ")
        parts = name.split(".")
        one = parts[0] in MODULES and parts[1:2] != ["fpn"]
        module = parts[0] if one or len(parts) < 3 else ".".join(parts[:2]).rstrip("0123456789")
        counts[module, reason.partition(",")[0]] += 1
    return ", ".join(
        f"{module} ({count}{f': {reason}' if reason else ''})"
        for (module, reason), count in counts.items()
    )


def _listed(names: tuple[str, ...], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
