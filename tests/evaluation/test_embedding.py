import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from tests.conftest import blobs
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation import embedding
from vissl_lite.evaluation.embedding import (
    ImageMap,
    flat_map,
    make_map,
    methods,
    near_duplicates,
    nearest,
    outlier_score,
)


def features(images: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, 6)).astype(np.float32)


def test_neighbors_are_those_of_the_whole_similarity_matrix_in_blocks_of_any_size() -> None:
    given = features(23)
    unit = given / np.linalg.norm(given, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -2)
    order = np.argsort(-similarity, axis=1)[:, :4]
    for block in (1, 7, 100):
        indices, values = nearest(given * 5, 4, block)
        assert np.array_equal(indices, order)
        assert values == pytest.approx(np.take_along_axis(similarity, order, 1), abs=1e-6)


def test_few_images_have_few_neighbors() -> None:
    assert nearest(features(3), 10)[0].shape == (3, 2)
    assert nearest(features(1), 10)[0].shape == (1, 0)
    assert outlier_score(nearest(features(1), 10)[1]).tolist() == [0]


def test_what_is_far_from_all_is_odd_and_so_are_two_of_it() -> None:
    given = features(20) * 0.1 + 1
    given[[4, 9]] = [-1, 1, -1, 1, -1, 1]
    odd = outlier_score(nearest(given, 3)[1])
    assert set(np.argsort(-odd)[:2]) == {4, 9}
    by_one = outlier_score(nearest(given, 1)[1])
    assert by_one[4] == pytest.approx(0, abs=1e-5)  # the other one is beside it


@pytest.mark.parametrize("block", [3, 100])
def test_near_duplicates_are_found_though_all_features_are_alike(block: int) -> None:
    given = 100 + features(20)  # cosine similarities above 0.99, as from an untrained encoder
    given[17], given[11] = given[2] + 0.001, given[5] + 0.01
    assert near_duplicates(given, 0.98, block=block).tolist() == [[2, 17], [5, 11]]
    assert near_duplicates(given, 0.98, most=1, block=block).tolist() == [[2, 17]]


@pytest.mark.parametrize("images", [2, 5])
def test_images_with_the_same_features_are_duplicates_of_each_other(images: int) -> None:
    given = np.repeat(features(1), images, axis=0)
    given[-1] *= 1 + 1e-7
    pairs = [[a, b] for a in range(images) for b in range(a + 1, images)]
    assert near_duplicates(given, 0.98).tolist() == pairs
    assert near_duplicates(features(2), 0.98).tolist() == []
    two = np.concatenate([given, -given])  # whose mean is at neither of them
    assert len(near_duplicates(two, 0.98)) == 2 * len(pairs)


def test_pca_shows_the_two_largest_directions_of_unit_features() -> None:
    given = features(40) * [5, 3, 1, 1, 1, 1] + [0, 0, 9, 0, 0, 0]
    shown = flat_map(given, "pca", 0)
    unit = given / np.linalg.norm(given, axis=1, keepdims=True)
    axes = np.linalg.eigh(np.cov(unit.T))[1][:, [-1, -2]]
    expected = (unit - unit.mean(axis=0)) @ axes
    assert np.abs(shown) == pytest.approx(np.abs(expected), abs=1e-4)  # a sign is a convention
    assert np.array_equal(shown, flat_map(given, "pca", 0))
    assert flat_map(given * 7, "pca", 3) == pytest.approx(shown, abs=1e-4)


@pytest.mark.parametrize(
    "given", [np.ones((5, 4)), np.full((5, 4), np.nan), np.ones((1, 4)), features(2)]
)
def test_features_of_a_collapsed_or_diverged_encoder_can_be_drawn(given: np.ndarray) -> None:
    shown = flat_map(given.astype(np.float32), "pca", 0)
    assert shown.shape == (len(given), 2)
    assert np.isfinite(shown).all()
    assert np.isfinite(outlier_score(nearest(given.astype(np.float32), 3)[1])).all()
    assert near_duplicates(given.astype(np.float32), 0.98).shape[1] == 2


def test_umap_is_there_where_it_is_installed_and_there_is_something_to_unfold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the real one takes many seconds to import
    class Fake:
        def __init__(self, random_state: int, **options: object) -> None:
            self.seed = random_state

        def fit_transform(self, given: np.ndarray) -> np.ndarray:
            assert np.linalg.norm(given, axis=1) == pytest.approx(1)
            return np.full((len(given), 2), self.seed)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Fake, __spec__="installed"))
    assert methods(30, unfold=True) == ["pca"]
    assert methods(200, unfold=True) == ["pca", "umap"]
    assert methods(200, unfold=False) == ["pca"]
    assert flat_map(features(200), "umap", 7)[0].tolist() == [7, 7]
    monkeypatch.setattr(embedding.importlib.util, "find_spec", lambda name: None)
    assert methods(200, unfold=True) == ["pca"]


def test_a_map_of_images_with_labels_is_saved_and_read_back(tmp_path: Path) -> None:
    paths = []
    for index in range(9):
        # all but the broken one with names that are not UTF-8
        paths.append(str(tmp_path / ("3.png" if index == 3 else f"{index} ä\udcff.png")))
        blobs(index, 80, 60).save(paths[-1])
    Path(paths[3]).write_bytes(b"no picture")
    labels = np.arange(9) % 3
    done: list[int] = []
    encoder = build_encoder("test_resnet", 32)
    made = make_map(encoder, paths, labels, ["a", "b", "<c>"], progress=done.append)
    assert made.paths == paths[:3] + paths[4:]
    assert made.labels is not None
    assert made.labels.tolist() == [0, 1, 2, 1, 2, 0, 1, 2]
    assert sum(done) == 9
    assert made.neighbors.shape == made.similarities.shape == (8, 7)
    assert cv2.imdecode(np.frombuffer(made.thumbnails[0], np.uint8), 1).shape == (64, 64, 3)
    made.save(tmp_path / "map.npz")
    again = ImageMap.load(tmp_path / "map.npz")
    assert again.paths == made.paths
    assert again.classes == ["a", "b", "<c>"]
    assert again.thumbnails == made.thumbnails
    for name in ("labels", "neighbors", "similarities", "outlier_score", "duplicates"):
        assert np.array_equal(getattr(again, name), getattr(made, name))
    assert list(again.coordinates) == ["pca"]
    assert np.array_equal(again.coordinates["pca"], made.coordinates["pca"])


def test_of_many_images_a_seeded_sample_is_shown(photos: Path, tmp_path: Path) -> None:
    paths = sorted(map(str, photos.rglob("*.jpg")))
    encoder = build_encoder("test_resnet", 32)
    one, same, other = (make_map(encoder, paths, most=6, seed=s).paths for s in (0, 0, 1))
    assert len(one) == 6
    assert one == same == sorted(one)
    assert one != other
    made = make_map(encoder, paths, most=6)
    made.save(tmp_path / "map.npz")
    assert ImageMap.load(tmp_path / "map.npz").labels is None


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 and then nothing"])
def test_a_damaged_map_is_refused_in_one_line(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "map.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"map\.npz (does not exist|is damaged)"):
        ImageMap.load(file)


def test_a_map_cut_short_or_of_something_else_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "map.npz", features=features(3))
    with pytest.raises(UserError, match=r"map\.npz is damaged|no map of images"):
        ImageMap.load(tmp_path / "map.npz")
    whole = (tmp_path / "map.npz").read_bytes()
    (tmp_path / "map.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"map\.npz is damaged|no map of images"):
        ImageMap.load(tmp_path / "map.npz")
