"""Finished runs of a comparison on the disk."""

from pathlib import Path

import numpy as np
import pytest

from vissl_lite.comparison.protocols import Score
from vissl_lite.comparison.store import Cell, Store, digest_names, digest_weights
from vissl_lite.encoders.encoder import build_encoder

CELL = Cell("runs/a", "linear", "10 per class", 3)
ABOUT = {"weights": "abc", "labels": "def"}


@pytest.mark.parametrize("per_image", [np.arange(13) % 3 == 0, np.linspace(-0.1, 1.3, 7)])
def test_a_score_reads_back_as_it_was(per_image: np.ndarray, tmp_path: Path) -> None:
    score = Score(0.25, {"accuracy": 0.25}, {"penalty": 0.01}, per_image, {"layer1": 0.2})
    store = Store(tmp_path)
    store.save(CELL, score, ABOUT)
    found = store.load(CELL, ABOUT)
    assert found is not None
    assert found.per_image is not None
    np.testing.assert_array_equal(found.per_image, per_image)
    assert found.per_image.dtype == per_image.dtype
    assert (found.value, found.metrics, found.chosen, found.layers) == (
        score.value,
        score.metrics,
        score.chosen,
        score.layers,
    )


def test_a_score_of_other_weights_or_labels_does_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(CELL, Score(0.5, {"miou": 0.5}), ABOUT)
    assert store.load(CELL, ABOUT) is not None
    assert store.load(CELL, {**ABOUT, "weights": "other"}) is None
    assert store.load(Cell("runs/a", "linear", "10 per class", 4), ABOUT) is None


def test_amounts_that_are_no_whole_percents_have_files_of_their_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cells = [Cell("a", "knn", amount, seed) for amount in ("0.5%", "0.1%") for seed in (0, 1)]
    for number, cell in enumerate(cells):
        store.save(cell, Score(number / 10, {}), ABOUT)
    found = [store.load(cell, ABOUT) for cell in cells]
    assert [one and one.value for one in found] == [0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize("damage", ["", "[]", '{"about": 1}'])
def test_a_damaged_score_does_not_count(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    store.save(CELL, Score(0.5, {"miou": 0.5}), ABOUT)
    (file,) = tmp_path.glob("*/*.json")
    file.write_text(damage)
    assert store.load(CELL, ABOUT) is None


def test_encoders_that_differ_in_odd_characters_have_places_of_their_own(tmp_path: Path) -> None:
    places = {Store(tmp_path).path(Cell(name, "knn", "1%", 0)) for name in ("a/b", "a-b", "a:b")}
    assert len(places) == 3
    assert all(place.is_relative_to(tmp_path) for place in places)


def test_digests_tell_weights_and_names_apart() -> None:
    encoder = build_encoder("test_resnet", 32)
    before = digest_weights(encoder)
    assert digest_weights(encoder) == before
    next(encoder.parameters()).data[0] += 1
    assert digest_weights(encoder) != before
    assert digest_names(["a", "b"]) != digest_names(["b", "a"])
