"""From a histogram of |x| to the range that int8 covers: the largest magnitude that is not clipped."""

from __future__ import annotations

import numpy as np

from comask.calib.histograms import BINS, Counts, Histogram

LARGEST_CODE = 127
CANDIDATES = 128  # of thresholds, evenly from the largest value's 128th to itself
LEVELS = 256  # of int8; ONNX Runtime's default of 128 would find the range for 7 bits


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
