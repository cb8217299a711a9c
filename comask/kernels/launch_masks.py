"""How the kernels that paste masks into an image are launched.

All take mask_probs f32 [N, M, M], probabilities over the boxes, and boxes f32 [N, 4], `xyxy` in pixels of
the resized image, and paste as `comask.masks.paste_masks` does, pixel by pixel, into the image before it
was resized. `found` i32 [1] says how many of the N rows hold masks; the others have none.
"""

from __future__ import annotations

from comask.errors import KernelError
from comask.kernels.launch import INT32_MAX, Launch, float_bits

MASKS = "paste_masks"  # name of the source

# As in paste_masks.cu.
THREADS = 128
MAX_CELLS = 56  # M

STRIPS = 8  # blocks that share a bitmap


def mask_edge_counts_launch(
    masks: int,
    cells: int,
    image_size: tuple[int, int],
    threshold: float,
    scale: tuple[float, float] = (1.0, 1.0),
) -> Launch:
    """`mask_edge_counts(mask_probs, boxes, found) → counts`, the first step to COCO's RLE.

    An edge is where a walk over the image, column by column, enters or leaves the mask. `counts` is i32
    [N + N·W]: each mask's number of edges, then those of each mask up to the end of each column.

    Args:
        masks: N.
        cells: M.
        image_size: (H, W) in pixels.
        threshold: a pixel belongs to the mask when its probability is at least this.
        scale: (y, x), resized pixels a pixel of the image.

    Raises:
        KernelError: the kernel cannot do it.
    """
    integers = _integers(masks, cells, image_size, threshold, scale)
    return Launch(MASKS, "mask_edge_counts", masks, THREADS, integers)


def mask_edges_launch(
    masks: int,
    cells: int,
    image_size: tuple[int, int],
    threshold: float,
    capacity: int,
    scale: tuple[float, float] = (1.0, 1.0),
) -> Launch:
    """`mask_edges(mask_probs, boxes, counts) → edges`, the second step.

    `edges` is i32 [capacity]: those of mask 0, of mask 1 and so on, each in rising order as
    column · H + row. What exceeds the capacity is left out; `counts` says how many there are. For
    `comask.segmentation.rles_from_edges`.

    Args:
        masks: N.
        cells: M.
        image_size: (H, W) in pixels.
        threshold: as for the counts.
        capacity: of `edges`; a compact mask has about two a column.
        scale: as for the counts.

    Raises:
        KernelError: the kernel cannot do it.
    """
    integers = (*_integers(masks, cells, image_size, threshold, scale), capacity)
    return Launch(MASKS, "mask_edges", masks, THREADS, integers)


def paste_masks_launch(
    masks: int,
    cells: int,
    image_size: tuple[int, int],
    threshold: float,
    scale: tuple[float, float] = (1.0, 1.0),
) -> Launch:
    """`paste_masks(mask_probs, boxes, found) → bitmaps` u8 [N, H, W], 1 inside of the mask.

    Args:
        masks: N.
        cells: M.
        image_size: (H, W) in pixels.
        threshold: as for the counts.
        scale: as for the counts.

    Raises:
        KernelError: the kernel cannot do it.
    """
    integers = (*_integers(masks, cells, image_size, threshold, scale), STRIPS)
    return Launch(MASKS, "paste_masks", masks * STRIPS, THREADS, integers)


def _integers(
    masks: int,
    cells: int,
    image_size: tuple[int, int],
    threshold: float,
    scale: tuple[float, float],
) -> tuple[int, ...]:
    height, width = image_size
    if not 1 <= cells <= MAX_CELLS:
        raise KernelError(f"masks have {cells} x {cells} cells; the kernel takes 1 to {MAX_CELLS}")
    if min(image_size) < 1 or height * width > INT32_MAX or masks * (width + 1) > INT32_MAX:
        raise KernelError(
            f"{masks} masks in an image of {height} x {width}: the kernel takes images with up to "
            "2^31 - 1 pixels, and as many columns in all"
        )
    if not threshold > 0:
        raise KernelError(f"mask threshold {threshold}; it must be above 0")
    y_scale, x_scale = scale
    return (
        masks, cells, height, width, float_bits(x_scale), float_bits(y_scale), float_bits(threshold),
    )  # fmt: skip
