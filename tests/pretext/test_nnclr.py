import torch
from torch.nn.functional import normalize

from vissl_lite.pretext.nnclr import nearest_neighbors


def test_the_nearest_of_the_support_set_without_gradient() -> None:
    support = normalize(torch.randn(20, 4), dim=1)
    embeddings = torch.randn(6, 4, requires_grad=True)
    found = nearest_neighbors(embeddings, support)
    for embedding, neighbor in zip(embeddings, found, strict=True):
        best = max(support, key=lambda item: float(item @ embedding.detach()))
        assert torch.equal(neighbor, best)
    assert not found.requires_grad
