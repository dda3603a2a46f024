"""Nearest neighbors among features, and classification by them, which needs no training."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

TEMPERATURE = 0.07  # of the vote, in InstDisc and DINO


def nearest_neighbors(
    bank: np.ndarray, queries: np.ndarray, k: int, batch_size: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """The features of a bank that are most similar to each query, by cosine similarity.

    Args:
        bank: ``(N, D)`` features to search.
        queries: ``(M, D)`` features.
        k: Neighbors; at most N are returned.
        batch_size: Queries at a time, so that N x M similarities are never in memory.

    Returns:
        ``(M, k)`` int64 indices into the bank and ``(M, k)`` similarities, most similar first.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys = F.normalize(torch.from_numpy(bank).to(device), dim=1)
    similarities, indices = [], []
    for some in torch.from_numpy(queries).to(device).split(batch_size):
        similarity, index = (F.normalize(some, dim=1) @ keys.T).topk(min(k, len(keys)), dim=1)
        similarities.append(similarity.cpu())
        indices.append(index.cpu())
    return torch.cat(indices).numpy(), torch.cat(similarities).numpy()


def knn_predict(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    k: int = 20,
    temperature: float = TEMPERATURE,
    batch_size: int = 1024,
) -> np.ndarray:
    """Classify by a weighted vote of the k most similar training features.

    InstDisc (Wu et al. 2018, section 3.4) as in DINO (``eval_knn.py``): neighbors by cosine
    similarity s, each voting with weight exp(s / temperature).

    Args:
        bank: ``(N, D)`` training features.
        labels: ``(N,)`` int class indices of the bank.
        queries: ``(M, D)`` features to classify.
        k: Neighbors; at most N of them can vote.
        temperature: 0.07 in both papers.
        batch_size: Queries at a time.

    Returns:
        ``(M,)`` predicted class indices.
    """
    indices, similarities = nearest_neighbors(bank, queries, k, batch_size)
    one_hot = F.one_hot(torch.from_numpy(labels)).float()
    predicted = []
    for index, nearest in zip(
        torch.from_numpy(indices).split(batch_size),
        torch.from_numpy(similarities).split(batch_size),
        strict=True,
    ):
        # the largest exponent is taken out: it cancels in the vote, and could overflow
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = torch.einsum("mk,mkc->mc", weights, one_hot[index])
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted).numpy()
