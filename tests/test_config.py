"""Settings: round trips, overrides and what their errors say."""

from __future__ import annotations

import dataclasses
import json

import pytest

from comask.config import Config, ModelConfig
from comask.config_reading import from_dict, override
from comask.errors import ConfigError
from comask.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = preset(name)
    assert from_dict(Config, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_paper_defaults() -> None:
    config = preset("comask-r50")
    assert (config.preprocess.short_side, config.preprocess.max_side) == (800, 1333)
    assert (config.train.optimizer, config.train.momentum, config.train.weight_decay) == (
        "sgd", 0.9, 1e-4,
    )  # fmt: skip
    assert (config.train.learning_rate, config.train.reference_batch) == (0.01, 8)
    assert (config.train.epochs, config.train.step_epochs) == (24, (20, 23))
    assert (config.model.score_threshold, config.model.nms_iou, config.model.detections) == (
        0.05, 0.3, 100,
    )  # fmt: skip


def test_presets_differ_as_the_tables_say() -> None:
    base = preset("comask-r50").model
    assert preset("comask-r101").model == dataclasses.replace(base, backbone="resnet101")
    assert preset("comask1-r50").model == dataclasses.replace(base, msfem_branches=1)
    assert preset("comask2-r50").model == dataclasses.replace(base, msfem_branches=2)
    assert preset("no-collaboration-r50").model == dataclasses.replace(
        base, collaboration="uniform"
    )


def test_override_parses_by_type() -> None:
    config = override(
        Config(),
        (
            "model.msfem_branches=2",
            "train.step_epochs=[16, 22]",
            "train.learning_rate=1",
            "model.train_refined_masks=true",
            "train.weights=none",
        ),
    )
    assert config.model.msfem_branches == 2
    assert config.train.step_epochs == (16, 22)
    assert isinstance(config.train.learning_rate, float)
    assert config.model.train_refined_masks is True
    assert config.train.weights == "none"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("model.msfem_branchs=2", "did you mean model.msfem_branches"),
        ("model.msfem_branches", "key=value"),
        ("model.msfem_branches=5", "1 to 4"),
        ("model.msfem_branches=two", "type int"),
        ("model.msfem_branches=true", "type int"),
        ("model.msfem_mode=rows", "one of independent, chain, tied"),
        ("model.channels=100", "multiple of model.norm_groups"),
        ("model.anchor_sizes=[1, 2]", "5 sizes"),
        ("preprocess.mean=[1, 2]", "3 numbers"),
        ("preprocess.pad_multiple=20", "multiple of 32"),
        ("train.max_steps=-2", "-1 or more"),
        ("model.mask_kernel=2", "one of 1, 3"),
        ("model.mask_kernel=true", "one of 1, 3"),
        ("model.separate_fine_head=true", "train_refined_masks"),
        ("train.ema_decay=1", "0 ≤ value < 1"),
        ("model.norm_groups=0", "at least 1"),
        ("data.workers=-1", "0 or more"),
        ("data.val_fraction=3", "0 < value < 1"),
        ("train.seed=-1", "0 or more"),
        ("train.precision=fp8", "fp32, bf16, fp16"),
        ("nothing.at.all=1", "unknown setting"),
    ],
)
def test_override_errors_name_the_setting(assignment: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")) as caught:
        override(Config(), (assignment,))
    assert assignment.split("=")[0] in str(caught.value)


def test_settings_without_an_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.box_loss: expected iou: it has no effect"):
        override(Config(), ("model.collaboration=fc_reg", "model.box_loss=giou"))
    override(Config(), ("model.collaboration=uniform", "model.box_loss=giou"))
    with pytest.raises(ConfigError, match=r"model\.cell_threshold"):
        override(Config(), ("model.collaboration=uniform", "model.cell_threshold=0"))


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="comask-r50"):
        preset("comask-r500")


def test_from_dict_refuses_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"did you mean model\.channels"):
        from_dict(ModelConfig, {"channel": 3}, "model.")
