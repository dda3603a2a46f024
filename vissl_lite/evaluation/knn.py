"""k-nearest-neighbor classification of features, which needs no training."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812


def knn_predict(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys = F.normalize(torch.from_numpy(bank).to(device), dim=1)
    one_hot = F.one_hot(torch.from_numpy(labels).to(device)).float()
    predicted = []
    for some in torch.from_numpy(queries).to(device).split(batch_size):
        similarity = F.normalize(some, dim=1) @ keys.T
        nearest, index = similarity.topk(min(k, len(keys)), dim=1)
        # the largest exponent is taken out: it cancels in the vote, and could overflow
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = torch.einsum("mk,mkc->mc", weights, one_hot[index])
        predicted.append(votes.argmax(dim=1).cpu())
    return torch.cat(predicted).numpy()
