"""`borrow_frame`: NV12 in one buffer is its (Y, UV) pair, as a view that holds its owner."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FEW, seeds

from comask.errors import ImageError
from comask.runtime.dlpack import UNORDERED
from comask.runtime.frames import Coding, Frame, borrow_frame


def nv12(source: Any) -> Frame:
    return borrow_frame(source, UNORDERED, Coding("nv12", "bt601", False))


def buffer(height: int, width: int, padding: int, seed: int) -> np.ndarray:
    """[3/2·h, w] of noise, with rows `padding` bytes apart."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height * 3 // 2, width + padding), np.uint8)[:, :width]


@FEW
@given(
    rows=st.integers(1, 20), columns=st.integers(1, 20), padding=st.integers(0, 7), seed=seeds,
    layout=st.sampled_from([
        lambda b: b, lambda b: b[None], lambda b: b[..., None], torch.from_numpy,
        lambda b: torch.from_numpy(b)[None],
    ]),
)  # fmt: skip
def test_one_buffer_is_its_pair(
    rows: int, columns: int, padding: int, seed: int, layout: Any
) -> None:
    height, width = 2 * rows, 2 * columns
    whole = buffer(height, width, padding, seed)
    chroma = whole[height:]
    pairs = np.lib.stride_tricks.as_strided(chroma, (rows, columns, 2), (chroma.strides[0], 2, 1))
    one, two = nv12(layout(whole)), nv12((whole[:height], pairs))
    assert one.size == two.size == (height, width)
    np.testing.assert_array_equal(one.pixels(), two.pixels())
    assert one.launch((32, 32), (32, 32)) == two.launch((32, 32), (32, 32))  # no copy
    assert one.planes[0].address == whole.ctypes.data


def test_the_owner_lives_until_both_planes_are_released() -> None:
    class Array(np.ndarray):
        """One that weak references can point to."""

    for borrowed_by in (lambda array: array, torch.from_numpy):
        array = buffer(4, 6, 2, 0).view(Array)
        gone = weakref.ref(array)
        frame = nv12(borrowed_by(array))
        del array
        frame.planes[0].release()
        gc.collect()
        assert gone() is not None
        frame.release()
        gc.collect()
        assert gone() is None


def test_a_producers_stream_is_that_of_both_planes() -> None:
    class Producer:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": (6, 4), "typestr": "|u1", "data": (4096, False), "version": 3,
            "strides": (512, 1), "stream": 9,
        }  # fmt: skip
        device = SimpleNamespace(id=1)  # as cupy's arrays have it

    frame = borrow_frame(Producer(), 5, Coding("nv12", "bt709", True))
    assert [plane.stream for plane in frame.planes] == [9, 9]
    assert [plane.address for plane in frame.planes] == [4096, 4096 + 4 * 512]
    assert [plane.shape for plane in frame.planes] == [(4, 4), (2, 4)]
    assert frame.device == 1


@pytest.mark.parametrize(
    "shape", [(7, 8), (6, 7), (2, 6, 8), (6,), (6, 8, 3), (0, 8), (6, 0), (6, 1), ()]
)
def test_what_is_no_nv12_buffer_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"h and w even|in one"):
        nv12(np.zeros(shape, np.uint8))


def test_other_types_and_gaps_are_refused() -> None:
    for whole in (np.zeros((6, 8), np.float32), np.zeros((6, 16), np.uint8)[:, ::2]):
        with pytest.raises(ImageError, match=r"both in one \[3/2·h, w\]"):
            nv12(whole)
