"""Merging the boxes that a detector finds in several turns of an image."""

from collections.abc import Sequence

import numpy as np

# Smallest intersection over union of two boxes that are taken for one object: the value of
# Solovyev et al. 2021, above the 0.5 of most non-maximum suppression.
SAME_OBJECT = 0.55


def fuse_boxes(
    boxes: Sequence[np.ndarray], scores: Sequence[np.ndarray], labels: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge boxes of several turns by weighted boxes fusion (Solovyev et al. 2021, section 3).

    From the highest score down, each box joins the cluster of its class that it overlaps most, or
    starts one. A cluster has at most one box from each turn, so that neighbors that a turn tells
    apart stay apart. The fused box is the mean of the boxes weighted by their scores. Its score is
    the mean of theirs over all turns, with 0 for a turn that does not find the object: the paper's
    mean over the cluster times its share of the turns.

    Args:
        boxes: ``(N_i, 4)`` x1, y1, x2, y2 for each of T turns, mapped back to the image.
        scores: ``(N_i,)``.
        labels: ``(N_i,)`` class indices.

    Returns:
        ``(M, 4)`` float32 boxes, ``(M,)`` float32 scores and ``(M,)`` labels, best first.
    """
    all_boxes, all_scores = np.concatenate(boxes).astype(float), np.concatenate(scores)
    all_labels = np.concatenate(labels)
    turn_of = np.repeat(np.arange(len(boxes)), [len(some) for some in boxes])
    count, found = 0, len(all_boxes)  # clusters so far, and at most
    sums, weights = np.zeros((found, 4)), np.zeros(found)  # of boxes times scores, of scores
    classes, has = np.zeros(found, all_labels.dtype), np.zeros((found, len(boxes)), bool)
    for index in np.argsort(-all_scores, kind="stable"):
        box, score, turn = all_boxes[index], float(all_scores[index]), turn_of[index]
        open_to = np.flatnonzero((classes[:count] == all_labels[index]) & ~has[:count, turn])
        overlaps = _overlaps(box, sums[open_to] / weights[open_to, None])
        if len(overlaps) and overlaps.max() > SAME_OBJECT:
            cluster = open_to[overlaps.argmax()]
        else:
            cluster, count = count, count + 1
            classes[cluster] = all_labels[index]
        sums[cluster] += box * score
        weights[cluster] += score
        has[cluster, turn] = True
    fused, means = sums[:count] / weights[:count, None], weights[:count] / len(boxes)
    order = np.argsort(-means, kind="stable")
    return fused[order].astype(np.float32), means[order].astype(np.float32), classes[order]


def _overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of a box ``(4,)`` and others ``(N, 4)``, which have an area."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    intersection = sides.clip(min=0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return np.asarray(intersection / (areas - intersection))
