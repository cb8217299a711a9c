"""The range scan sees every value that fp16 would have to hold, exactly."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from strategies import tiny_model
from test_fp16 import pictures

from comask.errors import PrecisionError
from comask.export.fp16 import FP16_END, HEADROOM, Extreme, scan_ranges
from comask.export.onnx_export import in_precision
from comask.models.comask import CoMask, folded
from comask.models.precision import FLOAT_OUTPUTS
from comask.preprocess import prepare
from comask.presets import PRESETS

PREPROCESS = PRESETS["shapes-tiny"].preprocess


def scan(model: CoMask) -> list[Extreme]:
    return scan_ranges(model, list(pictures()), PREPROCESS)


def test_the_largest_magnitudes_are_exact_and_the_model_stays() -> None:
    model = tiny_model()
    before = deepcopy(model.state_dict())
    found = {(e.module, e.kind): e for e in scan(model)}
    network, expected = folded(model), []
    for image in pictures():
        prepared = prepare(image, PREPROCESS)
        pixels = torch.from_numpy(prepared.canvas[None]).float()
        x = ((pixels - model.mean) / model.std).permute(0, 3, 1, 2)
        assert prepared.size == prepared.canvas.shape[:2]  # nothing to blank
        first = network.backbone.conv1
        expected.append(F.conv2d(x, first.weight, first.bias, stride=2, padding=3))
    largest = [float(y.detach().abs().max()) for y in expected]
    conv = found["backbone.conv1", "output"]
    assert (conv.largest, conv.image) == (max(largest), largest.index(max(largest)))
    # ReLU overwrites what it reads: both sides of zero must have been seen before
    assert found["backbone.relu", "input"].largest == max(largest)
    assert found["backbone.relu", "output"].largest == max(
        float(y.detach().max()) for y in expected
    )
    weight = found["backbone.conv1", "weight"]
    assert (weight.largest, weight.image) == (
        float(network.backbone.conv1.weight.detach().abs().max()),
        None,
    )
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_every_weight_and_map_that_becomes_f16_is_looked_at() -> None:
    model = tiny_model()
    found = {(e.module, e.kind) for e in scan(model)}
    halves = {n for n, p in in_precision(model, "fp16").named_parameters() if p.dtype == torch.half}
    assert {f"{m}.{kind}" for m, kind in found if kind not in ("input", "output")} == halves
    assert {(name, "output") for name in ("p2", "p3", "p4", "p5")} <= found
    assert not any((name, "output") in found for name in FLOAT_OUTPUTS)  # stay f32 in any case


def test_what_is_not_finite_in_fp32_is_an_error_that_names_its_module() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.classifier.fc2.weight[0, 0] = torch.nan
    with pytest.raises(
        PrecisionError, match=r"classifier\.fc2: its output is not finite on image 0"
    ):
        scan(model)


@pytest.mark.parametrize(
    ("kind", "largest", "fits", "words"),
    [
        (
            "output",
            FP16_END / HEADROOM,
            True,
            "a.b reaches 1.64e+04 on image 2, fp16 ends at 65504",
        ),
        ("output", 2e4, False, "fp16 ends at 65504 and other images may reach 4 times as far"),
        ("input", 7e4, False, "the input of a.b reaches 7.00e+04 on image 2, fp16 ends at 65504"),
        ("weight", FP16_END, True, "the weight of a.b reaches 6.55e+04"),
        ("weight", 7e4, False, "fp16 ends at 65504"),
    ],
)
def test_activations_need_headroom(kind: str, largest: float, fits: bool, words: str) -> None:
    extreme = Extreme("a.b", kind, largest, 2)
    assert extreme.fits == fits
    assert words in str(extreme)
    assert ("other images" in str(extreme)) == (largest == 2e4)
