"""Histograms and thresholds of calibration against NumPy and ONNX Runtime's calibrators."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import (
    CalibrationMethod,
    HistogramCollector,
    create_calibrator,
)

import comask.calib.histograms
from comask.calib import ranges
from comask.calib.histograms import BINS, LEVELS, Histogram, entropy_threshold, percentile_threshold
from comask.calib.ranges import Pieces

floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
samples = hnp.arrays(np.float32, st.integers(0, 60), elements=floats)
tame_floats = st.floats(-100, 100, width=32)
tame = hnp.arrays(np.float32, st.integers(1, 200), elements=tame_floats)


def edges(histogram: Histogram) -> NDArray[np.float64]:
    return np.arange(BINS + 1) * histogram.width


@given(samples)
def test_counts_are_numpys(values: NDArray[np.float32]) -> None:
    found = Histogram.of(values)
    expected, _ = np.histogram(np.abs(values.astype(np.float64)), edges(found))
    np.testing.assert_array_equal(found.counts, expected)
    assert found.total == values.size
    assert found.largest == (np.abs(values).max() if values.size else 0)


@given(samples, samples, samples)
def test_order_does_not_matter(
    a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]
) -> None:
    together = Histogram.of(np.concatenate((a, b, c)))
    x, y, z = map(Histogram.of, (a, b, c))
    assert x + y + z == together
    assert z + (y + x) == together
    assert (Histogram.of(b) + x) + z == together


@pytest.mark.parametrize("scale", [1, 1e-38, 1e37])
def test_many_values_are_counted_in_chunks(scale: float) -> None:
    values = np.random.default_rng(0).standard_normal((3, 70_000)).astype(np.float32)
    values *= np.float32(scale)
    found = Histogram.of(values)
    expected, _ = np.histogram(np.abs(values.astype(np.float64)), edges(found))
    np.testing.assert_array_equal(found.counts, expected)
    assert sum((Histogram.of(row) for row in values[1:]), Histogram.of(values[0])) == found


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_histogram(value: float) -> None:
    with pytest.raises(FloatingPointError, match="NaN" if np.isnan(value) else "infinity"):
        Histogram.of(np.array([1, value, -2], np.float32))


@given(samples)
def test_json_round_trip(values: NDArray[np.float32]) -> None:
    found = Histogram.of(values)
    assert Histogram.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@given(tame, st.floats(1, 100))
def test_percentile_is_numpys_within_a_bin(values: NDArray[np.float32], percentile: float) -> None:
    histogram = Histogram.of(values)
    found = percentile_threshold(histogram, percentile)
    exact = np.percentile(np.abs(values), percentile, method="inverted_cdf")
    assert exact <= found <= min(exact + histogram.width, histogram.largest)


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_entropy_clips_and_never_widens(spread: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(200_000) * np.exp(spread * rng.standard_normal(200_000))
    histogram = Histogram.of(values.astype(np.float32))
    assert 0 < entropy_threshold(histogram) <= histogram.largest
    if spread:  # its tail is long
        assert entropy_threshold(histogram) < 0.9 * histogram.largest


@pytest.mark.parametrize("value", [0.0, 1.5, -3e-30])
def test_constants_keep_their_value_in_range(value: float) -> None:
    histogram = Histogram.of(np.full(1000, value, np.float32))
    assert entropy_threshold(histogram) == histogram.largest == abs(np.float32(value))
    assert percentile_threshold(histogram, 50) == histogram.largest


def onnxruntimes_threshold(histogram: Histogram, levels: int) -> float:
    """From a histogram of x that is the same below zero as above."""
    counts, bins = histogram.counts, len(histogram.counts)
    signed = (
        np.concatenate((counts[::-1], counts)),
        np.arange(-bins, bins + 1) * histogram.width,
        np.float64(-histogram.largest),
        np.float64(histogram.largest),
    )
    collector = HistogramCollector("entropy", True, 2 * bins, levels, 0, "same")
    return float(collector.get_entropy_threshold(signed, levels)[1])


@given(st.integers(0, 2**31))
def test_entropy_is_onnxruntimes(seed: int) -> None:
    """With fewer bins and levels, since its loops take seconds with ours."""
    bins, levels = 80, 16
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.choice([0.1, 3, 1000]) * rng.random(bins) ** rng.choice([1, 4]))
    if rng.random() < 0.5:
        counts = np.sort(counts)[::-1].copy()
    counts[0] += 1
    histogram = Histogram(counts, 0, float(np.flatnonzero(counts)[-1] + rng.random()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comask.calib.histograms, "BINS", bins)
        patch.setattr(comask.calib.histograms, "LEVELS", levels)
        assert entropy_threshold(histogram) == onnxruntimes_threshold(histogram, levels)


def test_entropy_is_onnxruntimes_with_all_bins() -> None:
    values = np.maximum(np.random.default_rng(0).standard_normal(100_000), 0) ** 2
    histogram = Histogram.of(values.astype(np.float32))
    assert entropy_threshold(histogram) == onnxruntimes_threshold(histogram, LEVELS)


NETWORK = """
<ir_version: 10, opset_import: ["" : 20]>
network (float[1,3,h,w] x) => (float[1,5,a,b] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1)
    b = Relu (a)
    c = Conv <pads = [1, 1, 1, 1]> (b, w2)
    d = Add (c, a)
    e = Sigmoid (d)
    f = Concat <axis = 1> (e, b)
    y = Conv (f, w3)
}
"""


def network() -> onnx.ModelProto:
    """With a tensor that is needed much later, and its types."""
    model = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (4, 3, 3, 3)), ("w2", (4, 4, 3, 3)), ("w3", (5, 8, 1, 1))):
        weight = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_histograms_are_those_of_onnxruntimes_calibrator(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "WANTED_AT_ONCE", at_once)
    rng = np.random.default_rng(1)
    images = [rng.standard_normal((1, 3, *size)).astype(np.float32) for size in ((9, 14), (20, 7))]
    names = [*"xabcdef", "y"]
    found: dict[str, Histogram] = {}
    run = Pieces(network(), names)
    for image in images:
        order = []
        for name, value in run.run({"x": image}):
            order.append(name)
            found[name] = (
                found[name] + Histogram.of(value) if name in found else Histogram.of(value)
            )
        assert order == names

    path = f"{tmp_path}/network.onnx"
    onnx.save(network(), path)
    calibrator = create_calibrator(
        path,
        augmented_model_path=f"{tmp_path}/augmented.onnx",
        calibrate_method=CalibrationMethod.Percentile,
    )
    # Its bins would depend on the first image; with ours the counts must be equal.
    calibrator.collector = HistogramCollector("percentile", True, BINS, 128, 99.0, "same")
    calibrator.collector.histogram_dict = {
        name: (
            np.zeros(BINS, np.int64),
            edges(found[name]).astype(np.float32),
            *np.zeros((2, 1), np.float32),
        )
        for name in names
    }
    for image in images:
        calibrator.collect_data(Reader([image]))
    for name, (counts, *_) in calibrator.collector.histogram_dict.items():
        np.testing.assert_array_equal(counts, found[name].counts, err_msg=name)
    thresholds = calibrator.collector.compute_collection_result()
    for name, (_, high, *_) in thresholds.items():
        # ONNX Runtime takes the lower end of the percentile's bin.
        ours = percentile_threshold(found[name], 99.0)
        assert high <= ours <= high + found[name].width + 1e-6


class Reader:
    """ONNX Runtime's way to be given images."""

    def __init__(self, images: list[NDArray[np.float32]]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self._images, None)
        return None if image is None else {"x": image}
