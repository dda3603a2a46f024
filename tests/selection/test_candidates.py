"""What may be chosen: near-duplicates once, so many of a group."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import blobs
from vissl_lite.data.fingerprints import Fingerprints, fingerprints_of, similar_to
from vissl_lite.selection import METHODS, Candidates
from vissl_lite.selection.herding import herding


def prints(folder: Path) -> Fingerprints:
    """Three pictures; the first also flipped, turned and as a smaller JPEG, the second copied."""
    first, second, third = (blobs(seed, 64, 64) for seed in range(3))
    pictures = [
        first,
        first.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        first.transpose(Image.Transpose.ROTATE_90),
        first.resize((48, 48)),
        second,
        second,
        third,
    ]
    paths = []
    for index, picture in enumerate(pictures):
        paths.append(str(folder / f"{index}.{'jpg' if index == 3 else 'png'}"))
        picture.save(paths[-1])
    return fingerprints_of(paths)


def test_pictures_are_chosen_once(tmp_path: Path) -> None:
    found = prints(tmp_path)
    assert similar_to(found, 2).tolist() == [0, 1, 2, 3]
    assert similar_to(found, 4).tolist() == [4, 5]
    assert similar_to(found, 6).tolist() == [6]
    order = METHODS["random"](np.zeros((7, 2)), 7, candidates=Candidates(7, prints=found)).indices
    sets = np.array([0, 0, 0, 0, 1, 1, 2])
    assert sorted(sets[order].tolist()) == [0, 1, 2]


def test_pictures_that_are_labelled_are_not_chosen(tmp_path: Path) -> None:
    candidates = Candidates(7, np.array([1, 6]), prints(tmp_path))
    assert np.flatnonzero(candidates.open).tolist() == [4, 5]


def test_pictures_that_are_excluded_are_not_chosen(tmp_path: Path) -> None:
    """Unlike labelled ones, excluded images count neither in groups nor among all images."""
    found = prints(tmp_path)
    others, excluded = found.take(np.array([0, 2, 3, 5, 6])), found.take(np.array([1, 4]))
    groups = np.array(["a"] * 5)
    candidates = Candidates(5, prints=others, groups=groups, per_group=1, excluded=excluded)
    assert np.flatnonzero(candidates.open).tolist() == [4]


def test_labelled_images_of_one_picture_do_not_narrow_the_kernel(tmp_path: Path) -> None:
    """The second of them is a flipped copy whose features are nearly the same."""
    labelled, found = np.array([0, 1, 6]), prints(tmp_path)
    assert Candidates(7, labelled, found).distinct.tolist() == [0, 6]
    assert Candidates(7, labelled).distinct.tolist() == [0, 1, 6]
    angles = np.radians([0, 0.5, 275, 265, 180, 270, 20])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    uncertainty = np.array([0, 0, 0.9, 0.9, 1, 0.9, 0], np.float32)  # three near 270 degrees

    def chosen(prints: Fingerprints | None) -> list[int]:
        candidates = Candidates(7, labelled, prints)
        candidates.open[[2, 3]] = False
        return herding(features, 1, labelled, uncertainty, candidates=candidates).indices.tolist()

    assert chosen(found) == [5]
    assert chosen(None) == [4]  # the most uncertain, as the kernel covers nothing beside an image


def test_groups_have_so_many_images_labelled_ones_included() -> None:
    groups = np.array(["a", "a", "a", "b", "b", "c"])
    candidates = Candidates(6, np.array([0]), groups=groups, per_group=2)
    assert candidates.open.tolist() == [False, True, True, True, True, True]
    candidates.take(1)
    assert candidates.open.tolist() == [False, False, False, True, True, True]
    candidates.take(4)
    assert candidates.remaining == 2
    candidates.take(3)
    assert np.flatnonzero(candidates.open).tolist() == [5]
