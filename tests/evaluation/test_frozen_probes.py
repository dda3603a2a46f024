"""The probes on features of labelled images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.probe import (
    LabelledFeatures,
    evaluate_features,
    extract_part,
)
from vissl_lite.transfer.classification.data import Part, load_labelled


def clouds(count: int, seed: int, noise: float = 0.2) -> LabelledFeatures:
    """Images of three classes around three corners; the layer ``noise`` knows nothing."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    features = noise * random.normal(size=(count, 8))
    features[np.arange(count), labels] += 1
    layers = {"last": features, "noise": random.normal(size=(count, 8))}
    return LabelledFeatures({k: v.astype(np.float32) for k, v in layers.items()}, labels)


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_test_labels_are_counted_and_cannot_change_what_is_predicted(probe) -> None:
    train, test = clouds(100, 0, 0.5), clouds(50, 2, 0.5)
    score = evaluate_features(probe, train, test)
    wrong = LabelledFeatures(test.by_layer, (test.labels + 1) % 3)
    other = evaluate_features(probe, train, wrong)
    assert score.accuracy == score.right.mean() > 0.7
    assert other.chosen == score.chosen
    assert not (other.right & score.right).any()  # the same predictions
    assert evaluate_features(probe, train, test, layer="noise").accuracy < 0.6


def test_images_that_cannot_be_read_go_with_their_labels(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    data = load_labelled(labelled, 0)
    part = Part([str(tmp_path / "broken.jpg"), *data.val.paths], np.array([2, *data.val.labels]))
    encoder = build_encoder("test_resnet", 32)
    found = extract_part(encoder, part, layers=True)
    np.testing.assert_array_equal(found.labels, data.val.labels)
    assert list(found.by_layer) == ["last", *encoder.stage_names()]
    assert {len(one) for one in found.by_layer.values()} == {len(data.val)}
    assert len(extract_part(encoder, Part([], np.empty(0, np.int64)))) == 0


def test_the_linear_probe_holds_out_whole_groups(labelled: Path) -> None:
    train, test = clouds(100, 0), clouds(50, 2)
    assert "penalty" in evaluate_features("linear", train, test).chosen
    groups = np.array([f"patient {label}" for label in train.labels])  # of one class each
    grouped = LabelledFeatures(train.by_layer, train.labels, groups)
    assert evaluate_features("linear", grouped, test).chosen == {}
    part = load_labelled(labelled, 0).val
    names = np.arange(len(part)).astype(str)
    found = extract_part(build_encoder("test_resnet", 32), part, groups=names)
    assert found.groups is not None
    assert found.groups.tolist() == names.tolist()


def test_features_that_are_not_finite_are_refused(labelled: Path) -> None:
    encoder = build_encoder("test_resnet", 32)
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        extract_part(encoder, load_labelled(labelled, 0).val)
