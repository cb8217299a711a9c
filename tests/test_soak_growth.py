"""The judgement of a soak, on made-up series."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comask.runtime.bench.growth import LEAST, LIMITS, PARTS, WARM_UP, growths

SAMPLES = 200
SECONDS = np.arange(1.0, SAMPLES + 1)
FIRST = round(WARM_UP * SAMPLES)  # sample after the warm-up
NAMES = st.sampled_from(sorted(LIMITS))
LEVELS = st.floats(1.0, 1e9)


def judged(name: str, values: np.ndarray) -> bool:
    return growths(SECONDS, {name: values})[name].passed


@given(NAMES, LEVELS)
def test_what_is_constant_passes(name: str, level: float) -> None:
    found = growths(SECONDS, {name: np.full(SAMPLES, level)})[name]
    assert found.grown == 0
    assert found.passed


@given(NAMES, LEVELS, st.floats(0.0, 1e9))
def test_what_happens_in_the_warm_up_does_not_matter(
    name: str, level: float, before: float
) -> None:
    values = np.full(SAMPLES, level)
    values[:FIRST] = before
    assert judged(name, values)


@given(NAMES, LEVELS, st.floats(1.5, 100.0))
def test_a_steady_leak_fails_by_what_it_is(name: str, level: float, times: float) -> None:
    """From the middle of the first fifth to that of the last are four fifths of the growth."""
    limit = LIMITS[name]
    whole = limit.allowed * times / 0.8 * (level if limit.relative else 1) + (not limit.allowed)
    values = level + whole * np.clip((SECONDS - FIRST) / (SAMPLES - FIRST), 0, None)
    found = growths(SECONDS, {name: values})[name]
    assert not found.passed
    assert found.after - found.before == pytest.approx(0.8 * whole, rel=0.01)


@given(LEVELS, st.lists(st.integers(0, SAMPLES - 1), max_size=15), st.floats(1.0, 100.0))
def test_some_peaks_do_not_matter(level: float, places: list[int], factor: float) -> None:
    """15 of 200 samples are fewer than half of the 32 of a fifth."""
    values = np.full(SAMPLES, level)
    values[places] *= factor
    assert all(judged(name, values) for name, limit in LIMITS.items() if limit.quantile == 0.5)


@given(LEVELS, st.integers(0, 2**32 - 1), st.floats(1.0, 100.0))
def test_times_are_those_without_other_load(level: float, seed: int, factor: float) -> None:
    """Another process that slows two of three samples of the last fifth down."""
    values = np.full(SAMPLES, level)
    values[-32:][np.random.default_rng(seed).permutation(32)[:21]] *= factor
    assert judged("call_p50_ms", values)
    values[-32:] = level * 1.3
    assert not judged("call_p50_ms", values)


@given(st.integers(0, 2 * LEAST * PARTS))
def test_too_few_samples_are_not_judged(count: int) -> None:
    seconds = SECONDS[:count]
    warm = int(np.count_nonzero(seconds > WARM_UP * count))
    found = growths(seconds, {"threads": np.full(count, 4.0)})
    assert bool(found) == (warm >= LEAST * PARTS)


def test_in_words() -> None:
    values = np.full(SAMPLES, 100.0 * 2**20)
    values[-40:] *= 1.5
    grown = growths(SECONDS, {"resident_bytes": values, "files": values / 2**20})
    assert str(grown["resident_bytes"]) == (
        "resident memory grew by 50.0% (100 to 150 MiB, limit 1%)"
    )
    assert str(grown["files"]) == "open files grew by 50 (100 to 150, limit 0)"
