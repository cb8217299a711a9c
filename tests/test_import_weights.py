"""What of a file reaches the model: backbones whole, classes by name, the rest as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from weight_networks import TWO, State, classes, network, scramble

from comask.config import Config
from comask.data.source import Category
from comask.errors import CheckpointError
from comask.models.comask import CoMask
from comask.training.checkpoint import Checkpoint, save_checkpoint
from comask.training.import_weights import WeightReport, import_weights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.bin"  # a name that says nothing


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_weights_from_a_file_give_torchvisions_features(name: str, path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None).eval()
    scramble(theirs)
    torch.save(theirs.state_dict(), path)
    model = network(backbone=name)
    report = import_weights(model, str(path), TWO)
    assert report.left == ("fc.weight", "fc.bias")
    ours = model.backbone
    x = torch.randn(2, 3, 64, 96)
    features = []
    with torch.no_grad():
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            expected = layer(expected)
            features.append(expected)
        actual = ours(x)
    assert ours.out_channels == tuple(f.shape[1] for f in features)
    for i, (a, b) in enumerate(zip(actual, features, strict=True)):
        assert a.shape[2:] == (64 // 2 ** (i + 2), 96 // 2 ** (i + 2))
        torch.testing.assert_close(a, b)


@pytest.fixture
def resnet18() -> State:
    torch.manual_seed(2)
    net = torchvision.models.resnet18(weights=None)
    scramble(net)
    return dict(net.state_dict())


def test_weights_without_the_classifier_or_counters_load_too(resnet18: State, path: Path) -> None:
    kept = {
        name: value
        for name, value in resnet18.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    torch.save(kept, path)
    ours = network()
    report = import_weights(ours, str(path), TWO)
    assert torch.equal(ours.backbone.layer4[1].conv2.weight, kept["layer4.1.conv2.weight"])
    assert report.left == ()
    assert not any("backbone" in name for name in report.random)


def test_safetensors_and_half_precision(resnet18: State, path: Path) -> None:
    save_file({name: value.half() for name, value in resnet18.items()}, path)
    ours = network()
    assert import_weights(ours, str(path), TWO).layout == "torchvision ResNet"
    weight = ours.backbone.conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, resnet18["conv1.weight"].half().float())


def test_imagenet_takes_torchvisions_file(
    resnet18: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(resnet18, folder / weights.url.rpartition("/")[2])  # as if downloaded before
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    ours = network()
    report = import_weights(ours, "imagenet", TWO)
    assert torch.equal(ours.backbone.layer1[0].conv1.weight, resnet18["layer1.0.conv1.weight"])
    assert report.lines()[0] == "weights: torchvision ResNet: took backbone (100)"


def test_imagenet_for_a_slim_network_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match=r"train\.weights=imagenet: .*resnet18-slim.*none"):
        import_weights(network(backbone="resnet18-slim"), "imagenet", TWO)


def test_imagenet_without_a_network_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(
        CheckpointError,
        match=r"imagenet: download.pytorch.org cannot be reached \(Name or service not known\); "
        "give.*resnet18 state dict",
    ):
        import_weights(network(), "imagenet", TWO)


def test_source_none_leaves_the_weights() -> None:
    ours = network()
    before = deepcopy(ours.state_dict())
    report = import_weights(ours, "none", TWO)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert report.taken == report.left == ()
    assert report.lines()[0] == "weights: none"
    assert report.lines()[1].startswith("stay random: backbone (100), mfpn.fpn (16)")


def test_group_norm_takes_the_convolutions_alone(resnet18: State, path: Path) -> None:
    torch.save(resnet18, path)
    ours = network(backbone_norm="group")
    norms = deepcopy({k: v for k, v in ours.backbone.state_dict().items() if "bn" in k})
    report = import_weights(ours, str(path), TWO)
    assert len(report.taken) == 20
    assert torch.equal(ours.backbone.conv1.weight, resnet18["conv1.weight"])
    assert all(torch.equal(ours.backbone.state_dict()[k], v) for k, v in norms.items())
    assert "bn1.weight: BatchNorm" in report.left
    assert "bn1.running_mean: BatchNorm" in report.left


def in_a_detector(state: State) -> State:
    return {f"backbone.body.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("resnet101", "resnet50"), ("resnet50", "resnet101"), ("resnet34", "resnet18")],
)
@pytest.mark.parametrize("wrap", [dict, in_a_detector])
def test_another_backbone_is_refused_whole(
    theirs: str, ours: str, wrap: Callable[[State], State], path: Path
) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.get_model(theirs, weights=None).state_dict()
    names = {k: torch.zeros(()).expand(v.shape) for k, v in shapes.items() if k[:3] != "fc."}
    torch.save(wrap(names), path)
    model = network(backbone=ours)
    before = deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=rf"model\.backbone={ours} .*layer\d"):
        import_weights(model, str(path), TWO)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_group_norm_checkpoint_does_not_half_fill_a_batch_norm_backbone(path: Path) -> None:
    checkpoint(network(backbone_norm="group"), TWO, path)
    with pytest.raises(CheckpointError, match=r"model\.backbone_norm=frozen \(no backbone\.bn1"):
        import_weights(network(), str(path), TWO)


def checkpoint(
    model: CoMask, categories: tuple[Category, ...], path: Path, ema: State | None = None
) -> None:
    content = Checkpoint(
        config=Config(model=model.config),
        categories=categories,
        model=model.state_dict(),
        ema=ema,
        optimizer={},
        scaler={},
        step=7,
        best_ap=0.5,
        stale=0,
        data="",
    )
    save_checkpoint(path, content)


def class_values(model: CoMask) -> Iterator[Tensor]:
    heads = [head for head in (model.head, model.fine_head) if head is not None]
    for layer in (model.classifier.logits, *(head.mask for head in heads)):
        yield from (layer.weight, layer.bias)


def fine_tuned(
    old: tuple[str, ...], new: tuple[str, ...], path: Path, **changes: Any
) -> tuple[CoMask, CoMask, CoMask, WeightReport]:
    """A trained network, another as it was at first, and as it is with the trained one's weights."""
    small = {"backbone": "resnet18-slim", "separate_fine_head": True, "train_refined_masks": True}
    trained = network(seed=1, **(small | {"num_classes": len(old)}))
    scramble(trained)
    checkpoint(trained, classes(*old), path)
    ours = network(seed=2, **(small | {"num_classes": len(new)} | changes))
    scramble(ours)
    first = deepcopy(ours)
    return trained, first, ours, import_weights(ours, str(path), classes(*new))


def test_a_checkpoint_of_the_same_classes_is_taken_whole(path: Path) -> None:
    trained, _, ours, report = fine_tuned(("cat", "dog"), ("cat", "dog"), path)
    for name, value in trained.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, ours.state_dict()[name])
    assert report.left == report.random == report.new_classes == report.lost_classes == ()
    assert report.class_rows == ("cat", "dog")
    assert report.lines()[0].startswith("weights: comask checkpoint: took backbone (105), ")
    assert report.lines()[1:] == ["class rows from the file: background, cat, dog"]


def test_rows_of_classes_go_by_name(path: Path) -> None:
    old, new = ("cat", "dog", "eel", "fox"), ("fox", "gnu", "cat")
    trained, first, ours, report = fine_tuned(old, new, path)
    values = list(zip(class_values(trained), class_values(first), class_values(ours), strict=True))
    assert len(values) == 6
    for theirs, before, after in values:
        assert torch.equal(after[0], theirs[0])  # background
        assert torch.equal(after[1], theirs[4])
        assert torch.equal(after[2], before[2])
        assert torch.equal(after[3], theirs[1])
    assert torch.equal(ours.head.offsets.weight, trained.head.offsets.weight)
    assert (report.class_rows, report.new_classes) == (("fox", "cat"), ("gnu",))
    assert report.lost_classes == ("dog", "eel")
    assert report.left == report.random == ()
    assert report.lines()[1:] == [
        "class rows from the file: background, fox, cat",
        "class rows that stay random: gnu",
        "classes only in the file: dog, eel",
    ]


def test_classes_without_a_common_name_share_the_background(path: Path) -> None:
    trained, first, ours, report = fine_tuned(("cat", "dog"), ("gnu", "fox"), path)
    for theirs, before, after in zip(
        class_values(trained), class_values(first), class_values(ours), strict=True
    ):
        assert torch.equal(after[0], theirs[0])
        assert torch.equal(after[1:], before[1:])
    assert report.class_rows == ()
    assert "class rows that stay random: gnu, fox" in report.lines()


def test_layers_that_mean_something_else_stay_random(path: Path) -> None:
    _, first, ours, report = fine_tuned(
        ("cat", "dog"), ("dog", "cat"), path,
        offset_activation="exp", anchor_ratios=(1.0, 0.5, 2.0), mask_kernel=1,
    )  # fmt: skip
    assert set(report.random) == {
        "rpn.objectness.weight", "rpn.objectness.bias", "rpn.deltas.weight", "rpn.deltas.bias",
        "head.offsets.weight", "head.offset_bias", "head.mask.weight", "head.mask.bias",
        "fine_head.mask.weight", "fine_head.mask.bias",
    }  # fmt: skip
    assert torch.equal(ours.head.mask.weight, first.head.mask.weight)
    assert "head.offset_bias: another model.offset_activation" in report.left


def test_a_head_that_the_checkpoint_lacks_stays_random(path: Path) -> None:
    checkpoint(network(backbone="resnet18-slim"), TWO, path)
    ours = network(
        backbone="resnet18-slim", separate_fine_head=True, train_refined_masks=True, head_convs=2
    )
    report = import_weights(ours, str(path), TWO)
    assert {name.partition(".")[0] for name in report.random} == {"head", "fine_head"}
    assert any(line.startswith("stay random: head (3), fine_head (") for line in report.lines())


def test_averaged_weights_win(path: Path) -> None:
    trained = network(backbone="resnet18-slim")
    average = {
        name: value + 1 if value.is_floating_point() else value
        for name, value in trained.state_dict().items()
    }
    checkpoint(trained, TWO, path, ema=average)
    ours = network(seed=6, backbone="resnet18-slim")
    import_weights(ours, str(path), TWO)
    assert torch.equal(ours.head.mask.bias, average["head.mask.bias"])
    assert torch.equal(ours.backbone.bn1.running_mean, average["backbone.bn1.running_mean"])


def test_a_bundles_weights_have_no_class_names(path: Path) -> None:
    trained = network(backbone="resnet18-slim")
    save_file(trained.state_dict(), path)
    report = import_weights(network(seed=6, backbone="resnet18-slim"), str(path), TWO)
    assert report.layout == "comask weights without class names"
    layers = ("classifier.logits", "head.mask")
    assert set(report.random) == {f"{n}.{part}" for n in layers for part in ("weight", "bias")}
    assert "head.mask.bias: class names unknown" in report.left
