"""ImageNet weights for the backbone, from torchvision's hub or a local file of the same layout."""

from __future__ import annotations

import pickle
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision

from comask.errors import CheckpointError
from comask.models.backbone import ResNet


def load_backbone_weights(backbone: ResNet, name: str, source: str) -> None:
    """Fills the backbone.

    Args:
        backbone: to fill.
        name: of the backbone.
        source: `none` leaves it random, `imagenet` takes torchvision's weights (downloaded once),
            anything else is the path of a state dict in torchvision's layout.

    Raises:
        CheckpointError: when they cannot be had or do not fit.
    """
    if source == "none":
        return
    try:
        if source == "imagenet":
            weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
            state = weights.get_state_dict(progress=False)
        else:
            state = torch.load(Path(source), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, URLError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"train.backbone_weights={source}: cannot be loaded ({reason}); give the path of a "
            f"torchvision {name} state dict, or none to start from random weights"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{source}: expected a state dict, names with tensors")
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source}: does not fit {name}: {reason}") from error
