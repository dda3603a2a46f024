"""Run lengths of masks, as numbers and as text, as COCO stores them.

Runs of background and foreground alternate, column by column, from the upper left pixel on.
"""

import numpy as np


def runs_of_text(text: str) -> list[int] | None:
    """Decode COCO's compressed run-length encoding.

    Each number is the difference from the one two before (from the fourth on), in groups of five
    bits, the lowest first; the sixth bit of a character says that more follow (pycocotools,
    ``maskApi.c``, ``rleFrString``).

    Returns:
        Lengths of background and foreground in turn, column by column, without a number that is cut
        short at the end; None if the text is not of this form.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # negative
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs


def text_of_runs(runs: np.ndarray) -> str:
    """Encode run lengths as text; the inverse of ``runs_of_text``.

    Args:
        runs: Lengths of background and foreground in turn, ``(N,)``.
    """
    lengths = [int(run) for run in runs]
    characters: list[str] = []
    for index, length in enumerate(lengths):
        value = length - lengths[index - 2] if index > 2 else length
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)  # the highest bit written is the sign
            characters.append(chr(48 + (bits | 32 if more else bits)))
    return "".join(characters)


def runs_of_mask(
    mask: np.ndarray, corner: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None
) -> np.ndarray:
    """Encode a mask, or a part of a mask that is empty elsewhere.

    Args:
        mask: ``(h, w)`` bool.
        corner: Column and row of its upper left pixel in the whole mask.
        size: Height and width of the whole mask; default those of ``mask``.

    Returns:
        Lengths of background and foreground in turn, ``(N,)`` uint32; they sum to the pixels of the
        whole mask.
    """
    rows, columns = mask.shape
    height, width = size or mask.shape
    padded = np.zeros((columns, rows + 2), np.int8)  # background before and after each column
    padded[:, 1:-1] = mask.T
    steps = np.diff(padded, axis=1)
    (column, first), (_, end) = np.nonzero(steps > 0), np.nonzero(steps < 0)
    offsets = (column + corner[0]) * height + corner[1]
    starts, ends = offsets + first, offsets + end
    if len(starts):  # a run that goes on at the top of the next column
        apart = starts[1:] != ends[:-1]
        starts, ends = starts[np.r_[True, apart]], ends[np.r_[apart, True]]
    edges = np.stack([starts, ends], axis=1).ravel()
    runs = np.diff(edges, prepend=0, append=height * width).astype(np.uint32)
    return runs[:-1] if len(edges) and runs[-1] == 0 else runs  # as pycocotools writes them


def mask_of_runs(runs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Decode run lengths.

    Args:
        runs: Lengths of background and foreground in turn, whose sum is the number of pixels.
        size: Height and width.

    Returns:
        ``(H, W)`` uint8 of 0 and 1.
    """
    inside = np.repeat(np.arange(len(runs), dtype=np.uint8) % 2, runs)
    return inside.reshape(size[1], size[0]).T
