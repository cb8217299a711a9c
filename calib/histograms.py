"""Histograms of |x|, and from one the range that int8 covers: the largest magnitude that is not clipped.

The sum of histograms does not depend on the order: all counts are exact and so is re-binning. The width
of a bin is a power of two, the smallest with which the largest value fits. A larger value makes bins
pairs of bins, so a histogram depends on which values were seen and on nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_VALUES = 2**53  # that f64 counts exactly
BINS = 2048  # between 1024 and 2048 of them are in use; TensorRT's calibrators use as many
_SMALLEST_EXPONENT = -100  # of a width: its reciprocal is an f32 still
_CHUNK = 1 << 16  # values at once, so that what is computed from them stays in the cache

Counts = NDArray[np.int64]

LARGEST_CODE = 127
CANDIDATES = 128  # of thresholds, evenly from the largest value's 128th to itself
LEVELS = 256  # of int8; ONNX Runtime's default of 128 would find the range for 7 bits


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """How often magnitudes fell into bins.

    Attributes:
        counts: [BINS]; bin i holds the values with i · width ≤ |x| < (i + 1) · width.
        exponent: of the width, which is 2 ** exponent.
        largest: the largest |x|, exactly; 0 where there was no value.
    """

    counts: Counts
    exponent: int
    largest: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Histogram:
        """That of an f32 or f16 array of any shape.

        Raises:
            FloatingPointError: when a value is not finite.
        """
        flat = values.reshape(-1)
        largest = max(abs(float(flat.max())), abs(float(flat.min()))) if flat.size else 0.0
        if not math.isfinite(largest):
            raise FloatingPointError("NaN" if math.isnan(largest) else "infinity")
        exponent = _SMALLEST_EXPONENT
        if largest:  # which is below 2 ** its exponent
            exponent = max(exponent, math.frexp(largest)[1] - (BINS - 1).bit_length())
        counts = np.zeros(BINS, np.int64)
        for start in range(0, flat.size, _CHUNK):
            scaled = np.abs(flat[start : start + _CHUNK], dtype=np.float32)
            scaled *= np.float32(2.0**-exponent)  # exact, as it is a power of two
            counts += np.bincount(scaled.astype(np.int64), minlength=BINS)
        return cls(counts, exponent, largest)

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def __add__(self, other: Histogram) -> Histogram:
        """That of both sets of values."""
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
        """The counts in wider bins."""
        place = np.arange(BINS) >> min(exponent - self.exponent, BINS.bit_length())
        counts = np.zeros(BINS, np.int64)
        np.add.at(counts, place, self.counts)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """For JSON; bins beyond the last value are left out."""
        used = int(np.flatnonzero(self.counts)[-1]) + 1 if self.counts.any() else 0
        counts = self.counts[:used].tolist()
        return {"largest": self.largest, "bin_width": self.width, "counts": counts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Histogram:
        """Inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: when the entries are not those of a histogram.
        """
        mantissa, exponent = math.frexp(values["bin_width"])
        found, largest = values["counts"], float(values["largest"])
        if mantissa != 0.5 or len(found) > BINS or not all(type(count) is int for count in found):
            raise ValueError(f"expected a power of two and up to {BINS} counts")
        if any(count < 0 for count in found) or sum(found) > MOST_VALUES:
            raise ValueError(f"expected counts from 0, of {MOST_VALUES} values at most")
        used = [i for i, count in enumerate(found) if count]
        if not (largest // values["bin_width"] == used[-1] if used else largest == 0):
            raise ValueError(f"the largest value, {largest}, is not in the last bin that has any")
        counts = np.pad(np.array(found, np.int64), (0, BINS - len(found)))
        return cls(counts, exponent - 1, largest)


def percentile_threshold(histogram: Histogram, percentile: float) -> float:
    """A magnitude that at least `percentile` % of the values do not exceed.

    It is the upper end of the bin in which the percentile lies, so it is above it by one bin at most.
    """
    below = np.cumsum(histogram.counts)
    place = int(np.searchsorted(below, percentile / 100 * below[-1]))
    return min((place + 1) * histogram.width, histogram.largest)


def error_threshold(histogram: Histogram) -> float:
    """The magnitude with the least Σ(x - q(x))², q rounding to int8 and clipping.

    Values count as the middle of their bin; those that rounding hides in a bin are as many for every
    candidate.
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
    """The magnitude whose int8 distribution has the least Kullback–Leibler divergence from the values'.

    As `HistogramCollector.get_entropy_threshold` of ONNX Runtime finds it in a histogram of x with as
    many values below zero as above, without the loops over bins in Python that take seconds a tensor.
    """
    counts = np.concatenate((histogram.counts[::-1], histogram.counts))
    candidates = range(LEVELS // 2, BINS + 1)
    best = candidates[int(np.argmin([_divergence(counts, bins) for bins in candidates]))]
    return min(min(best + 1, BINS) * histogram.width, histogram.largest)


def _divergence(counts: Counts, bins: int) -> float:
    """From the values to what int8 makes of them when it covers so many bins at each side of zero."""
    from onnxruntime.quantization.calibrate import entropy
    from onnxruntime.quantization.quant_utils import smooth_distribution

    zero = len(counts) // 2
    start, end = zero - bins, min(zero + bins + 1, len(counts))
    covered = counts[start:end]
    values = covered.copy()
    values[0] += counts[:start].sum()
    values[-1] += counts[end:].sum()

    merged = len(covered) // LEVELS  # bins a level; what remains belongs to the last level
    whole = LEVELS * merged
    levels = covered[:whole].reshape(LEVELS, merged).sum(1)
    levels[-1] += covered[whole:].sum()
    occupied = (values[:whole] != 0).reshape(LEVELS, merged).sum(1)
    # Spread over a level's bins in whole numbers; those that remain stay empty.
    spread = np.zeros(len(covered), np.int64)
    spread[:whole] = np.repeat((levels / np.maximum(occupied, 1)).astype(np.int64), merged)
    spread[:whole][np.repeat(occupied == 0, merged)] = 0

    smooth_values, smooth_spread = smooth_distribution(values), smooth_distribution(spread)
    if smooth_values is None or smooth_spread is None:
        return float("inf")
    return float(entropy(smooth_values, smooth_spread))
