"""Files of others: comask computes with them what their owner does, or says why it cannot."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from weight_networks import BACKBONE18, TWO, State, mmdetection, network, old_torchvision, scramble

from comask.errors import CheckpointError
from comask.models.boxes import decode_boxes
from comask.models.comask import CoMask
from comask.models.neck import coarsest
from comask.training.import_weights import import_weights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.bin"  # a name that says nothing


def wide_network(**changes: Any) -> CoMask:
    """With the widths of torchvision's detectors."""
    return network(**({"channels": 256, "classifier_width": 1024} | changes))


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    net = MaskRCNN(backbone, num_classes=5).eval()
    scramble(net)
    for layer in (net.rpn.head.cls_logits, net.rpn.head.bbox_pred):
        nn.init.normal_(layer.weight, std=0.05)
    return net


@pytest.fixture(scope="module")
def state(theirs: nn.Module) -> State:
    return dict(theirs.state_dict())


@torch.no_grad()
def assert_computes_the_same(ours: CoMask, theirs: nn.Module) -> None:
    """Backbone, FPN before the MSFEMs, RPN down to its boxes, and fully connected layers."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 128)
    features = theirs.backbone.body(images)
    for actual, expected in zip(ours.backbone(images), features.values(), strict=True):
        torch.testing.assert_close(actual, expected)

    levels = ours.mfpn.fpn(list(features.values()))
    levels.append(coarsest(levels[-1]))
    pyramid = list(theirs.backbone.fpn(features).values())
    for actual, expected in zip(levels, pyramid, strict=True):
        torch.testing.assert_close(actual, expected)

    outputs = ours.rpn(pyramid)
    logits, deltas = concat_box_prediction_layers(*theirs.rpn.head(pyramid))
    anchors = theirs.rpn.anchor_generator(ImageList(images, [(64, 128)] * 2), pyramid)
    boxes = theirs.rpn.box_coder.decode(deltas, anchors).reshape(2, -1, 4)
    torch.testing.assert_close(
        torch.cat([level.logits for level in outputs], 1), logits.reshape(2, -1)
    )
    decoded = torch.cat([decode_boxes(level.deltas, level.anchors) for level in outputs], 1)
    torch.testing.assert_close(decoded, boxes, atol=1e-3, rtol=1e-4)  # pixels, up to hundreds

    pooled = torch.randn(3, 256, 7, 7)
    head = ours.classifier
    hidden = F.relu(head.fc2(F.relu(head.fc1(pooled.flatten(1)))))
    torch.testing.assert_close(hidden, theirs.roi_heads.box_head(pooled))


FILES: dict[str, Callable[[State], object]] = {
    "torchvision": lambda state: state,
    "torchvision before 0.13": old_torchvision,
    "torchvision's reference script": lambda state: {"model": state, "optimizer": {}, "epoch": 3},
    "distributed": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "mmdetection": lambda state: {
        "state_dict": mmdetection(state),
        "meta": {"config": "style='pytorch' to_rgb=True", "epoch": 12},
    },
    "mmdetection 1": lambda state: {"meta": {}, "state_dict": mmdetection(state, "bbox_head")},
}


@pytest.mark.parametrize("kind", FILES)
def test_detectors_of_others_compute_the_same_in_comask(
    kind: str, theirs: nn.Module, state: State, path: Path
) -> None:
    torch.save(FILES[kind](state), path)
    ours = wide_network(anchor_sizes=(32.0, 64.0, 128.0, 256.0, 512.0))
    before = deepcopy(ours.state_dict())
    report = import_weights(ours, str(path), TWO)
    assert_computes_the_same(ours, theirs)

    assert len(report.taken) == BACKBONE18 + 16 + 6 + 4
    for name, value in ours.state_dict().items():
        assert name in report.taken or torch.equal(value, before[name])
    assert {name.partition(".")[0] for name in report.random} == {"mfpn", "classifier", "head"}
    assert report.class_rows == report.new_classes == report.lost_classes == ()
    assert any("mask_head" in name for name in report.left)
    first, left, random = report.lines()
    title = "mmdetection" if "mmdet" in kind else "torchvision Mask R-CNN"
    expected = f"weights: {title}: took backbone (100), mfpn.fpn (16), rpn (6), classifier.fc (4)"
    assert first == expected
    mask_head = "roi_head.mask_head (8)" if "mmdet" in kind else "roi_heads.mask_head (8)"
    assert left.startswith("left in the file: ")
    assert mask_head in left
    assert random.startswith("stay random: mfpn.modules_per_level (")
    assert "head (" in random


def test_without_the_fpns_last_convolutions_its_laterals_are_taken(
    state: State, path: Path
) -> None:
    torch.save(state, path)
    report = import_weights(network(channels=256, msfem_place="replace"), str(path), TWO)
    assert sum(name.startswith("mfpn.fpn.lateral.") for name in report.taken) == 8
    assert "backbone.fpn.layer_blocks.3.0.bias" in report.left


def test_torchvision_itself_reads_the_old_names(theirs: nn.Module, state: State) -> None:
    deepcopy(theirs).load_state_dict(old_torchvision(state))


def test_images_are_normalised_like_torchvisions(theirs: nn.Module) -> None:
    ours = network()
    torch.testing.assert_close(ours.mean / 255, torch.tensor(theirs.transform.image_mean))
    torch.testing.assert_close(ours.std / 255, torch.tensor(theirs.transform.image_std))


def test_modules_built_otherwise_are_left(path: Path) -> None:
    """Those of torchvision's second versions have the old names on other layers."""
    resnet = torchvision.models.resnet18(weights=None)
    backbone = _resnet_fpn_extractor(resnet, 5, norm_layer=nn.BatchNorm2d)
    net = FasterRCNN(
        backbone,
        num_classes=5,
        rpn_head=RPNHead(256, 3, conv_depth=2),
        box_head=FastRCNNConvFCHead((256, 7, 7), [256], [1024]),
    )
    torch.save(net.state_dict(), path)
    ours = network(channels=256)
    report = import_weights(ours, str(path), TWO)
    assert len(report.taken) == BACKBONE18
    assert all(name.startswith("backbone.") for name in report.taken)
    assert "backbone.fpn.inner_blocks.0.0.weight: built otherwise" in report.left
    assert "rpn.head.cls_logits.weight: built otherwise" in report.left
    assert report.lines()[0] == "weights: torchvision detector: took backbone (100)"
    assert "rpn (8: built otherwise)" in report.lines()[1]


def test_other_anchors_leave_the_rpns_outputs(state: State, path: Path) -> None:
    torch.save(state, path)
    ours = wide_network(anchor_ratios=(2.0, 1.0, 0.5))
    report = import_weights(ours, str(path), TWO)
    assert "rpn.conv.weight" in report.taken
    assert {"rpn.objectness.weight", "rpn.deltas.bias"} <= set(report.random)
    assert "rpn.head.cls_logits.weight: another model.anchor_ratios" in report.left


def test_values_of_another_shape_stay_random_and_are_listed(state: State, path: Path) -> None:
    torch.save(state, path)
    ours = network()  # 32 channels
    report = import_weights(ours, str(path), TWO)
    assert len(report.taken) == BACKBONE18  # and no bias of the RPN, though that fits by itself
    assert (
        "backbone.fpn.inner_blocks.0.0.weight: another shape, [256, 64, 1, 1]; the model has "
        "[32, 64, 1, 1]" in report.left
    )
    assert "rpn.head.bbox_pred.bias: the rest of its layer does not fit" in report.left
    assert {"rpn.deltas.bias", "classifier.fc1.weight"} <= set(report.random)
    assert (
        "rpn (4: another shape), rpn (2: the rest of its layer does not fit)" in report.lines()[1]
    )


def test_caffes_style_is_refused_where_the_file_says_so(state: State, path: Path) -> None:
    for key, text in (
        ("config", "img_norm_cfg = dict(mean=[103.5, 116.3, 123.7], to_rgb=False)"),
        ("cfg", "data_preprocessor=dict(bgr_to_rgb=False)"),
        ("cfg", "backbone=dict(depth=50, style='caffe')"),
    ):
        torch.save({"meta": {key: text}, "state_dict": mmdetection(state)}, path)
        with pytest.raises(CheckpointError, match="Caffe's style"):
            import_weights(network(), str(path), TWO)


class Malicious:
    """Its unpickling would make a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"meta": x, "state_dict": {}}])
def test_code_in_a_file_is_not_run(wrap: Callable[[object], object], path: Path) -> None:
    trace = path.with_name("trace")
    torch.save(wrap(Malicious(trace)), path)
    with pytest.raises(CheckpointError, match=r"pickled posix\.mkdir.*never run") as caught:
        import_weights(network(), str(path), TWO)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not trace.exists()


def truncated(path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    path.write_bytes(path.read_bytes()[:10_000])


def endless(path: Path) -> None:
    content: dict[str, object] = {}
    content["model"] = content
    torch.save(content, path)


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "directory": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no weights\n" * 50),
    "another text": lambda path: path.write_text("text\n" * 50),
    "json": lambda path: path.write_text('{"a": {"b": 1}}'),
    "brace": lambda path: path.write_bytes(b"\x08" + bytes(7) + b"{" + bytes(20)),
    "html": lambda path: path.write_text("<html>404</html>\n"),
    "picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "truncated": truncated,
    "endless": endless,
    "list": lambda path: torch.save([torch.zeros(2)], path),
    "object": lambda path: torch.save(nn.Linear(2, 2), path),
    "other network": lambda path: torch.save({"weight": torch.zeros(2)}, path),
    "numbered": lambda path: torch.save({0: torch.zeros(2)}, path),
    "lines": lambda path: torch.save({"a\nb": torch.zeros(2)}, path),
    "other shapes": lambda path: torch.save(
        torchvision.models.resnet34(weights=None).state_dict(), path
    ),
    "numbers": lambda path: torch.save(dict.fromkeys(network().state_dict(), 1.0), path),
    "half": lambda path: torch.save({"layer1.0.conv1.weight": torch.zeros(2)}, path),
    "checkpoint": lambda path: torch.save({"format": 0, "config": {}, "categories": []}, path),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_wrong_file_is_one_line_that_names_it(kind: str, path: Path) -> None:
    BROKEN[kind](path)
    ours = network()
    before = deepcopy(ours.state_dict())
    with pytest.raises(CheckpointError, match=f"^train.weights={re.escape(str(path))}: ") as caught:
        import_weights(ours, str(path), TWO)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_an_unknown_layout_says_what_it_looks_like(path: Path) -> None:
    names = ("stem.weight", "stem.bias", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight")
    torch.save({"state_dict": dict.fromkeys(names, torch.zeros(3))}, path)
    with pytest.raises(CheckpointError, match=r"'stem\.weight', 'stem\.bias', .*mmdetection"):
        import_weights(network(), str(path), TWO)


def test_known_names_of_which_none_fits(path: Path) -> None:
    torch.save({"neck.lateral_convs.0.conv.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"nothing in it fits: it holds 'neck\.lateral"):
        import_weights(network(), str(path), TWO)
