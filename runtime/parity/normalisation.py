"""What a graph did to the pixels before the first convolution, if not what the manifest says."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from comask.config import PreprocessConfig
from comask.runtime.compare import relative_error
from comask.runtime.session import Array

START = "preprocessing differs: the normalised image, which backbone.conv1 reads, "


def explain_input(
    image: Array,
    image_size: tuple[int, int],
    found: Array,
    preprocess: PreprocessConfig,
    tolerance: float,
) -> str:
    """A sentence on how `found` was made of `image`.

    Each channel is fitted as a·(r, g, b) + offset, which tells order, mean and deviation at once.

    Args:
        image: u8 [H, W, 3] on its canvas.
        image_size: (h, w) of the image on it.
        found: f32 [3, H, W], what the first convolution read.
        preprocess: what was expected.
        tolerance: relative error of a fit that explains `found`.
    """
    h, w = image_size
    pixels = image[:h, :w].reshape(-1, 3).astype(np.float64)
    inside = found[:, :h, :w].reshape(3, -1).T.astype(np.float64)
    design = np.concatenate((pixels, np.ones((len(pixels), 1))), axis=1)
    fit, *_ = np.linalg.lstsq(design, inside, rcond=None)
    if not relative_error(inside, design @ fit) <= tolerance:
        return START + (
            "is no normalisation of the pixels at their places: resized, cropped or moved in the graph"
        )
    factors, offsets = fit[:3].T, fit[3]  # [channel of the input, channel of the image]
    order = np.abs(factors).argmax(axis=1)
    factor = factors[np.arange(3), order]
    if not (factor > 0).all():
        return START + f"does not grow with the pixels: factors {_numbers(factor)}"
    mean, std = -offsets / factor, 1 / factor
    faults = []
    if order.tolist() == [2, 1, 0]:
        faults.append("has its channels reversed (BGR where RGB is expected)")
    elif order.tolist() != [0, 1, 2]:
        faults.append(f"takes its channels from {''.join('RGB'[i] for i in order)}, not RGB")
    wrong = _normalisation(mean, std, preprocess)
    if wrong:
        faults.append(wrong)
    if not faults:
        faults.append("is not zero outside the image")
    return START + " and ".join(faults)


def _normalisation(
    mean: NDArray[np.float64], std: NDArray[np.float64], preprocess: PreprocessConfig
) -> str:
    """What is wrong with a mean and deviation; empty where nothing is."""
    wanted = np.array(preprocess.mean), np.array(preprocess.std)
    zero, one = np.zeros(3), np.ones(3)
    usual = {
        "": wanted,
        "is not normalised (pixels of 0..255)": (zero, one),
        "is not normalised (pixels of 0..1)": (zero, 255 * one),
        "is scaled to -1..1 instead of normalised": (127.5 * one, 127.5 * one),
        "was scaled to 0..1 before a mean and deviation for 0..255": (255 * wanted[0], 255 * wanted[1]),
        "is normalised with mean and deviation in reversed order": (wanted[0][::-1], wanted[1][::-1]),
        "is not divided by the deviation": (wanted[0], one),
        "does not have the mean taken off": (zero, wanted[1]),
    }  # fmt: skip
    for sentence, (m, s) in usual.items():
        if np.allclose(std, s, rtol=0.02) and np.allclose(mean, m, rtol=0.02, atol=0.02 * s.max()):
            return sentence
    return (
        f"is normalised with mean {_numbers(mean)} and deviation {_numbers(std)}; the manifest has "
        f"{_numbers(wanted[0])} and {_numbers(wanted[1])}"
    )


def _numbers(values: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
