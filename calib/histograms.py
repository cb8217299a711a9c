"""Histograms of |x|, and methods that choose int8's range (its largest unclipped magnitude) from them.

A sum of histograms does not depend on their order, since all counts and re-binning are exact. The width
of a bin is the smallest power of two with which the largest value fits. For a larger value, pairs of bins
are merged, so a histogram depends only on the values that were counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_VALUES = 2**53  # f64 can count up to this number exactly
BINS = 2048  # as in TensorRT's calibrators; between 1024 and 2048 bins are in use
_SMALLEST_EXPONENT = -100  # smallest exponent of a width, whose reciprocal must be an f32
_CHUNK = 1 << 16  # values processed at once, so that intermediate results stay in the cache

Counts = NDArray[np.int64]

LARGEST_CODE = 127
CANDIDATES = 128  # number of thresholds, evenly spaced up to the largest value
LEVELS = 256  # levels of int8; ONNX Runtime's default of 128 would give the range for 7 bits


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of magnitudes by bins.

    Attributes:
        counts: [BINS]; bin i counts the values with i · width ≤ |x| < (i + 1) · width.
        exponent: the exponent of the width, which is 2 ** exponent.
        largest: the exact largest |x|; 0 without any value.
    """

    counts: Counts
    exponent: int
    largest: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Histogram:
        """Returns the histogram of an f32 or f16 array of any shape.

        Raises:
            FloatingPointError: a value is not finite.
        """
        flat = values.reshape(-1)
        largest = max(abs(float(flat.max())), abs(float(flat.min()))) if flat.size else 0.0
        if not math.isfinite(largest):
            raise FloatingPointError("NaN" if math.isnan(largest) else "infinity")
        exponent = _SMALLEST_EXPONENT
        if largest:  # `frexp` gives the exponent with `largest` < 2 ** exponent.
            exponent = max(exponent, math.frexp(largest)[1] - (BINS - 1).bit_length())
        counts = np.zeros(BINS, np.int64)
        for start in range(0, flat.size, _CHUNK):
            scaled = np.abs(flat[start : start + _CHUNK], dtype=np.float32)
            scaled *= np.float32(2.0**-exponent)  # Exact, since it is a power of two.
            counts += np.bincount(scaled.astype(np.int64), minlength=BINS)
        return cls(counts, exponent, largest)

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """The number of values."""
        return int(self.counts.sum())

    def __add__(self, other: Histogram) -> Histogram:
        """Returns the histogram of both sets of values."""
        exponent = max(self.exponent, other.exponent)
        counts = self._coarser(exponent) + other._coarser(exponent)
        return Histogram(counts, exponent, max(self.largest, other.largest))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Histogram)
            and (self.exponent, self.largest) == (other.exponent, other.largest)
            and np.array_equal(self.counts, other.counts)
        )

    def _coarser(self, exponent: int) -> Counts:
        """Returns the counts in wider bins."""
        place = np.arange(BINS) >> min(exponent - self.exponent, BINS.bit_length())
        counts = np.zeros(BINS, np.int64)
        np.add.at(counts, place, self.counts)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON, without the bins beyond the last value."""
        used = int(np.flatnonzero(self.counts)[-1]) + 1 if self.counts.any() else 0
        counts = self.counts[:used].tolist()
        return {"largest": self.largest, "bin_width": self.width, "counts": counts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Histogram:
        """Returns the histogram from the dict of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: the entries are not those of a histogram.
        """
        mantissa, exponent = math.frexp(values["bin_width"])
        stored, largest = values["counts"], float(values["largest"])
        if mantissa != 0.5 or len(stored) > BINS or not all(type(count) is int for count in stored):
            raise ValueError(f"expected a power of two and up to {BINS} counts")
        if any(count < 0 for count in stored) or sum(stored) > MOST_VALUES:
            raise ValueError(f"expected counts from 0, of {MOST_VALUES} values at most")
        used = [i for i, count in enumerate(stored) if count]
        if not (largest // values["bin_width"] == used[-1] if used else largest == 0):
            raise ValueError(f"the largest value, {largest}, is not in the last nonempty bin")
        counts = np.pad(np.array(stored, np.int64), (0, BINS - len(stored)))
        return cls(counts, exponent - 1, largest)


def percentile_threshold(histogram: Histogram, percentile: float) -> float:
    """Returns a magnitude that at least `percentile` % of the values do not exceed.

    It is the upper end of the percentile's bin, so it is at most one bin above the percentile.
    """
    below = np.cumsum(histogram.counts)
    place = int(np.searchsorted(below, percentile / 100 * below[-1]))
    return min((place + 1) * histogram.width, histogram.largest)


def error_threshold(histogram: Histogram) -> float:
    """Returns the magnitude with the least Σ(x - q(x))², where q rounds to int8 and clips.

    Each value counts as the middle of its bin. The error of this is about the same for all candidates.
    """
    used = np.flatnonzero(histogram.counts)
    if not len(used):
        return 0.0
    values = (used + 0.5) * histogram.width
    thresholds = histogram.largest * np.arange(1, CANDIDATES + 1) / CANDIDATES
    scales = thresholds[:, None] / LARGEST_CODE
    rounded = np.minimum(np.rint(values / scales), LARGEST_CODE) * scales
    errors = np.square(values - rounded) @ histogram.counts[used].astype(np.float64)
    return float(thresholds[np.argmin(errors)])


def entropy_threshold(histogram: Histogram) -> float:
    """Returns the magnitude whose int8 distribution diverges least (Kullback–Leibler) from the values'.

    The result is that of ONNX Runtime's `HistogramCollector.get_entropy_threshold` for a symmetric
    histogram of x, without its Python loops over bins, which take seconds per tensor.
    """
    counts = np.concatenate((histogram.counts[::-1], histogram.counts))
    candidates = range(LEVELS // 2, BINS + 1)
    best = candidates[int(np.argmin([_divergence(counts, bins) for bins in candidates]))]
    return min(min(best + 1, BINS) * histogram.width, histogram.largest)


def _divergence(counts: Counts, bins: int) -> float:
    """Returns the divergence of the int8 distribution that covers `bins` bins on each side of zero."""
    from onnxruntime.quantization.calibrate import entropy
    from onnxruntime.quantization.quant_utils import smooth_distribution

    zero = len(counts) // 2
    start, end = zero - bins, min(zero + bins + 1, len(counts))
    covered = counts[start:end]
    values = covered.copy()
    values[0] += counts[:start].sum()
    values[-1] += counts[end:].sum()

    merged = len(covered) // LEVELS  # bins per level; the remaining ones belong to the last level
    whole = LEVELS * merged
    levels = covered[:whole].reshape(LEVELS, merged).sum(1)
    levels[-1] += covered[whole:].sum()
    occupied = (values[:whole] != 0).reshape(LEVELS, merged).sum(1)
    # Spread each level's count over its bins in whole numbers; the remaining bins stay empty.
    spread = np.zeros(len(covered), np.int64)
    spread[:whole] = np.repeat((levels / np.maximum(occupied, 1)).astype(np.int64), merged)
    spread[:whole][np.repeat(occupied == 0, merged)] = 0

    smooth_values, smooth_spread = smooth_distribution(values), smooth_distribution(spread)
    if smooth_values is None or smooth_spread is None:
        return float("inf")
    return float(entropy(smooth_values, smooth_spread))
