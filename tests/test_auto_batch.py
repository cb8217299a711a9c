"""The largest batch that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MICRO, run, settings
from hypothesis import given
from hypothesis import strategies as st

from comask.config import Config
from comask.models.comask import CoMask
from comask.presets import preset
from comask.training.auto_batch import MOST, largest, trial
from comask.training.losses import Objective


@given(limit=st.integers(0, 2 * MOST))
def test_the_largest_number_is_found_in_few_trials(limit: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    assert largest(fits) == min(limit, MOST)
    assert len(tried) == len(set(tried)) <= 18
    assert max(tried) <= min(2 * limit + 1, MOST)  # far too large batches are not tried


def test_a_trial_trains_on_the_largest_canvas() -> None:
    config = preset("shapes-tiny")
    images, sizes, targets = trial(config, 2)
    assert images.shape == (2, 96, 160, 3)
    model = CoMask(config.model, config.preprocess).train()
    losses = Objective(model)(images, sizes, targets)
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())


def test_without_a_gpu_the_option_is_refused(tmp_path: Path) -> None:
    result = run("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "run",
                 *settings(*MICRO, "train.batch_size=auto"))  # fmt: skip
    assert result.exit_code == 1
    assert "train.batch_size=auto: needs a GPU" in result.output


def test_the_trials_save_memory_as_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed = []

    def measured(model: CoMask, config: Config) -> int:
        recomputed.append(model.backbone.recompute)
        return 4

    monkeypatch.setattr("comask.training.run.find_batch_size", measured)  # it needs a GPU
    result = run("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "run",
                 *settings(*MICRO, "train.batch_size=auto", "train.checkpoint_activations=true",
                           "model.backbone_norm=group"))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "train.batch_size=4, which fits into the GPU's memory" in result.output
    assert recomputed == [True]
