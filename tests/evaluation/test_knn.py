import math

import numpy as np

from vissl_lite.evaluation.knn import knn_predict, nearest_neighbors


def literal_knn(bank, labels, queries, k, temperature):
    """InstDisc, section 3.4: the k nearest by cosine, each voting exp(s / temperature)."""
    predicted = []
    for query in queries:
        cosines = [float(query @ key / np.linalg.norm(query) / np.linalg.norm(key)) for key in bank]
        votes: dict[int, float] = {}
        for index in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            vote = math.exp(cosines[index] / temperature)
            votes[int(labels[index])] = votes.get(int(labels[index]), 0) + vote
        predicted.append(max(votes, key=votes.__getitem__))
    return np.array(predicted)


def test_equals_the_literal_vote() -> None:
    random = np.random.default_rng(0)
    bank = random.normal(size=(60, 8)).astype(np.float32)
    labels, queries = random.integers(0, 4, 60), random.normal(size=(40, 8)).astype(np.float32)
    for k, temperature in ((1, 0.07), (5, 0.1), (20, 0.5), (60, 1.0)):
        expected = literal_knn(bank, labels, queries, k, temperature)
        ours = knn_predict(bank, labels, queries, k, temperature, batch_size=7)
        np.testing.assert_array_equal(ours, expected)


def test_more_neighbors_than_images_means_all() -> None:
    bank = np.eye(3, dtype=np.float32)
    labels = np.array([0, 1, 2])
    assert knn_predict(bank, labels, bank, k=200).tolist() == [0, 1, 2]


def test_a_low_temperature_does_not_overflow() -> None:
    bank = np.eye(2, dtype=np.float32)
    assert knn_predict(bank, np.array([0, 1]), bank, k=2, temperature=1e-3).tolist() == [0, 1]


def test_neighbors_are_the_most_similar_of_the_bank_first() -> None:
    random = np.random.default_rng(0)
    bank, queries = random.normal(size=(30, 8)), random.normal(size=(11, 8))
    cosines = np.array(
        [[q @ b / np.linalg.norm(q) / np.linalg.norm(b) for b in bank] for q in queries]
    )
    expected = np.argsort(-cosines, axis=1)[:, :4]
    indices, similarities = nearest_neighbors(bank, queries, 4, batch_size=3)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(similarities, np.take_along_axis(cosines, expected, axis=1))
    assert nearest_neighbors(bank, queries, 99)[0].shape == (11, 30)
