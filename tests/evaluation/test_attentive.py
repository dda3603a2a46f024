import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from tests.conftest import blobs
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation import attentive
from vissl_lite.evaluation.attentive import (
    DEFAULT_PENALTY,
    AttentiveHead,
    AttentiveProbe,
    check_memory,
    extract_tokens,
    fit_attentive,
    number_of_fits,
    predict_attentive,
)


def one_token_decides(images: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Tokens ``(N, 9, 8)`` of noise but for one, which feature 0 marks and 1 to 3 give a class."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, images)
    tokens = random.normal(size=(images, 9, 8))
    rows, place = np.arange(images), random.integers(0, 9, images)
    tokens[rows, place, :4] = 0
    tokens[rows, place, 0], tokens[rows, place, 1 + labels] = 4, 3
    return torch.from_numpy(tokens).half(), labels


def classify(head: AttentiveHead, tokens: Tensor) -> np.ndarray:
    return head(tokens.float()).argmax(dim=1).numpy()


def drawn_head(features: int = 16) -> AttentiveHead:
    """A head of random numbers."""
    center, scales = torch.randn(features), torch.rand(2, features) + 0.5
    head = AttentiveHead(center, *scales, classes=5)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def test_finds_the_token_that_decides_which_the_mean_of_tokens_hides() -> None:
    (tokens, labels), (test, truth) = one_token_decides(120, 0), one_token_decides(300, 1)
    probe = fit_attentive(tokens, labels, 3, folds=[])
    assert (classify(probe.head, test) == truth).mean() > 0.97
    assert (probe.penalty, probe.accuracy) == (DEFAULT_PENALTY, None)
    linear = LogisticRegression().fit(tokens.float().mean(dim=1).numpy(), labels)
    assert linear.score(test.float().mean(dim=1).numpy(), truth) < 0.7


def test_the_loss_equals_its_definition() -> None:
    head, tokens, labels = drawn_head(), torch.randn(3, 4, 16), torch.tensor([4, 0, 2])
    total = 0.0
    queries, mixing = head.queries.tolist(), head.mixing.tolist()
    size = 16 // len(queries)
    for image, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        values = []
        for m, query in enumerate(queries):
            keys = [
                math.exp(
                    sum(
                        q * (x - c) / s
                        for q, x, c, s in zip(
                            query,
                            token,
                            head.center.tolist(),
                            head.token_scale.tolist(),
                            strict=True,
                        )
                    )
                )
                for token in image
            ]
            pooled = [
                (sum(k * token[d] for k, token in zip(keys, image, strict=True)) / sum(keys) - c)
                / s
                for d, (c, s) in enumerate(
                    zip(head.center.tolist(), head.pooled_scale.tolist(), strict=True)
                )
            ]
            for d in range(m * size, (m + 1) * size):
                mixed = sum(w * z for w, z in zip(mixing[d], pooled, strict=True))
                values.append(pooled[d] + mixed)
        logits = [
            bias + sum(w * v for w, v in zip(row, values, strict=True))
            for row, bias in zip(head.weight.tolist(), head.bias.tolist(), strict=True)
        ]
        total += math.log(sum(map(math.exp, logits))) - logits[label]
    weights = [head.queries, head.mixing, head.weight]
    squares = sum(value**2 for one in weights for value in one.flatten().tolist())
    found = head.loss(tokens, labels, penalty=0.01)
    assert found.item() == pytest.approx(total / 3 + 0.005 * squares, rel=1e-4)


def test_starts_as_a_linear_classifier_of_the_mean() -> None:
    head, tokens = drawn_head(), torch.randn(2, 6, 16)
    torch.nn.init.zeros_(head.queries)
    torch.nn.init.zeros_(head.mixing)
    mean = (tokens.mean(dim=1) - head.center) / head.pooled_scale
    torch.testing.assert_close(head(tokens), mean @ head.weight.T + head.bias)


def test_the_penalty_is_the_one_with_the_least_loss_on_held_out_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attentive, "MAX_STEPS", 30)
    monkeypatch.setattr(attentive, "PENALTIES", (1.0, 1e-4))
    tokens, labels = one_token_decides(60, 0)
    labels = np.random.default_rng(0).permutation(labels)  # nothing can be learned
    done: list[int] = []
    honest = [
        (np.arange(0, 60, 2), np.arange(1, 60, 2)),
        (np.arange(1, 60, 2), np.arange(0, 60, 2)),
    ]
    probe = fit_attentive(tokens, labels, 3, honest, progress=lambda: done.append(1))
    assert probe.penalty == 1.0
    assert len(done) == number_of_fits(honest) == 5
    seen = [(np.arange(60), np.arange(60))]
    overfit = fit_attentive(tokens, labels, 3, seen)
    assert overfit.penalty == 1e-4
    assert overfit.accuracy is not None
    assert overfit.accuracy == (classify(overfit.head, tokens) == labels).mean()


def test_the_unit_of_a_feature_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentive, "MAX_STEPS", 10)
    tokens, labels = one_token_decides(30, 0)
    one, other = (
        fit_attentive(some, labels, 3, folds=[]).head(some)
        for some in (tokens.float(), 5 * tokens.float() + 3)
    )
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="of one class only: an attentive probe needs two"):
        fit_attentive(torch.zeros(4, 2, 8), np.zeros(4, int), 3, folds=[])


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_tokens_are_kept_for_training_images_and_not_for_test_images(
    backbone: str, tmp_path: Path
) -> None:
    encoder = build_encoder(backbone, 48)
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i in (0, 2):
        blobs(i, 48, 48).save(paths[i])
    (tmp_path / "1.png").write_bytes(b"broken")
    tokens, good = extract_tokens(encoder, paths)
    assert good.tolist() == [True, False, True]
    assert tokens.shape == (2, *encoder.token_shape())
    assert tokens.dtype == torch.float16
    features = encoder.map_features
    head = AttentiveHead(torch.zeros(features), *torch.ones(2, features), classes=2)
    torch.nn.init.normal_(head.weight)
    found, good = predict_attentive(AttentiveProbe(head, 0.01, None), encoder, paths)
    assert good.tolist() == [True, False, True]
    assert np.array_equal(found, classify(head, tokens))


def test_tokens_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder("test_vit", 48)
    count, features = encoder.token_shape()
    room = 2 * 1000 * count * features / attentive.MEMORY_SHARE
    monkeypatch.setattr(attentive, "free_memory", lambda: int(room + 10))
    check_memory(encoder, 1000)
    with pytest.raises(UserError, match=r"--attentive keeps the tokens of 1010 training images"):
        check_memory(encoder, 1010)
    monkeypatch.setattr(attentive, "free_memory", lambda: None)  # it is not known
    check_memory(encoder, 10**9)
