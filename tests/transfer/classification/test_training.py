import copy
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from sklearn import metrics as sk
from torch import Tensor, nn

from vissl_lite.data.image_reader import ImageReader
from vissl_lite.data.stream import Batch
from vissl_lite.encoders.encoder import adapt_encoder, build_encoder
from vissl_lite.encoders.folder import save_model
from vissl_lite.errors import UserError
from vissl_lite.evaluation.features import extract
from vissl_lite.optim import OptimizerSettings
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.classification import metrics as class_scores
from vissl_lite.transfer.classification.data import LabelledImages, Part
from vissl_lite.transfer.classification.linear_head import fit_linear
from vissl_lite.transfer.classification.model import (
    Classifier,
    class_logits,
    load_classifier,
    save_classifier,
    score_classifier,
)
from vissl_lite.transfer.classification.options import ClassifierSettings
from vissl_lite.transfer.classification.task import Classification
from vissl_lite.transfer.classification.training import (
    ClassifierTraining,
    build_classifier,
    check_drop_path,
    check_settings,
    classifier_views,
    loss_weights,
    one_label_loss,
    several_labels_loss,
    train_classifier,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog


@pytest.fixture
def warnings(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """Captured log, even if another test has stopped the logger from propagating."""
    monkeypatch.setattr(logging.getLogger("vissl_lite"), "propagate", True)
    return caplog


def labels_only(labels: list[Any], classes: str = "abc") -> LabelledImages:
    part = Part([f"{i}.jpg" for i in range(len(labels))], np.array(labels))
    return LabelledImages(list(classes), part, part, part, reading=ReadingLog("data"))


ONE = labels_only([0, 0, 0, 0, 1, 1, 2, 0])
SEVERAL = labels_only([[1, 0, 1], [1, 1, 1], [1, 0, 1], [1, 0, 0]])


# The loss


def log_softmax(row: Tensor, index: int) -> float:
    return float(row[index]) - math.log(sum(math.exp(float(x)) for x in row))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_one_label(smoothing: float) -> None:
    logits, target, weights = torch.randn(5, 3), [0, 2, 2, 1, 0], [0.5, 1.0, 3.0]
    total = 0.0
    for row, label in zip(logits, target, strict=True):
        for k in range(3):
            wanted = (1 - smoothing) * (k == label) + smoothing / 3
            total -= weights[label] * wanted * log_softmax(row, k)
    one_hot = torch.eye(3)[target]
    ours = one_label_loss(logits, one_hot, torch.tensor(weights), smoothing)
    assert float(ours) == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize("loss", [one_label_loss, several_labels_loss])
def test_weights_of_images_multiply_their_losses(loss: Callable[..., Tensor]) -> None:
    logits, target, weights = torch.randn(3, 2), torch.eye(2)[[0, 1, 1]], torch.tensor([1.0, 3.0])
    each = [loss(logits[i : i + 1], target[i : i + 1], weights, 0.1) for i in range(3)]
    ours = loss(logits, target, weights, 0.1, torch.tensor([1.0, 0.5, 0.0]))
    assert float(ours) == pytest.approx(float(each[0] + 0.5 * each[1]) / 3, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_several_labels(smoothing: float) -> None:
    """Targets are s / 2 and 1 - s / 2; only the positive term is weighted."""
    logits, weights = torch.randn(4, 3), [0.5, 1.0, 3.0]
    target = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    total = 0.0
    for row, wanted in zip(logits, target, strict=True):
        for k in range(3):
            yes = 1 - smoothing / 2 if wanted[k] == 1 else smoothing / 2
            p = 1 / (1 + math.exp(-float(row[k])))
            total -= weights[k] * yes * math.log(p) + (1 - yes) * math.log(1 - p)
    ours = several_labels_loss(logits, target, torch.tensor(weights), smoothing)
    assert float(ours) == pytest.approx(total / 12, rel=1e-5)


def test_balanced_weights_of_one_label_are_inverse_frequencies_with_mean_one() -> None:
    weights = loss_weights("balanced", ONE).numpy()
    assert weights == pytest.approx([8 / 15, 8 / 6, 8 / 3])  # as often as 5, 2, 1 of 8
    assert weights[ONE.train.labels].mean() == pytest.approx(1)


def test_balanced_weights_of_several_labels_are_negatives_over_positives() -> None:
    """Weights stay in [0.1, 100], even if all images or none have the class."""
    assert loss_weights("balanced", SEVERAL).tolist() == pytest.approx([0.1, 3, 1 / 3])
    rare = labels_only([[1, 0]] + [[0, 0]] * 299, "ab")
    assert loss_weights("balanced", rare).tolist() == [100, 100]


def test_weights_by_name() -> None:
    assert loss_weights({"b": 2, "c": 0.5}, SEVERAL).tolist() == [1, 2, 0.5]
    weights = loss_weights({"b": 20.0, "a": 10.0, "c": 10.0}, ONE)
    assert weights.tolist() == pytest.approx([0.8, 1.6, 0.8])  # only ratios count; the mean is 1
    digits = labels_only([0, 1], "01")
    by_number: Any = {0: 3.0}  # as YAML parses {0: 3}
    assert loss_weights(by_number, digits).tolist() == [1.5, 0.5]
    assert loss_weights(None, ONE).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cats": 2.0}, "unknown class cats: did you mean cat?"),
        ({"cat": 0.0}, "0.0 for cat must be above 0"),
        ({"cat": -1.0}, "-1.0 for cat must be above 0"),
        ({"cat": math.nan}, "nan for cat must be above 0"),
        ("balance", "--class_weights balance: give balanced, or a weight for each class name"),
    ],
)
def test_invalid_weights(weights: str | dict[str, float], message: str) -> None:
    data = LabelledImages(["cat", "dog"], ONE.train, ONE.val, ONE.test, reading=ReadingLog("data"))
    with pytest.raises(UserError, match=message):
        check_settings(ClassifierSettings(class_weights=weights), data, ImageReader())


def test_balanced_sampling_needs_one_label_per_image() -> None:
    check_settings(ClassifierSettings(balanced=True), ONE, ImageReader())
    with pytest.raises(UserError, match=r"--balanced .* give --class_weights balanced"):
        check_settings(ClassifierSettings(balanced=True), SEVERAL, ImageReader())


def test_rand_augment_needs_photographs() -> None:
    reader = ImageReader(bands=(0, 1), low=(0.0, 0.0), high=(1.0, 1.0))
    with pytest.raises(UserError, match=r"--rand_augment .* read as 2 bands: leave it out"):
        check_settings(ClassifierSettings(rand_augment=9), ONE, reader)


def test_the_moving_average_of_the_weights() -> None:
    torch.manual_seed(0)
    classifier = Classifier(build_encoder("test_resnet", 32), ["a", "b"], multi_label=False)
    training = ClassifierTraining(classifier, ONE, ClassifierSettings(ema=0.5))
    weight = classifier.network.get_classifier().weight
    mean = next(buffer for name, buffer in classifier.named_buffers() if "running_mean" in name)
    expected: list[torch.Tensor] = []
    for step in range(8):
        with torch.no_grad():
            weight.normal_()
            mean.normal_()
        training.optimizer_step(0, step, SimpleNamespace(step=lambda closure: None))
        decay = min(0.5, (1 + step) / (10 + step))
        current = [weight.detach().clone(), mean.clone()]
        if step:
            current = [decay * a + (1 - decay) * b for a, b in zip(expected, current, strict=True)]
        expected = current
    last = [weight.detach().clone(), mean.clone()]
    with training.averaged():
        torch.testing.assert_close([weight.detach(), mean], expected)
    assert (weight == last[0]).all()
    assert (mean == last[1]).all()
    training.keep_average()
    torch.testing.assert_close([weight.detach(), mean], expected)


def test_training_views_with_rand_augment() -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    plain, strong = (classifier_views(32, 1.0, True, rand_augment=m) for m in (0.0, 9.0))
    pairs = [
        [views(image, seed=0, epoch=epoch, index=0)[0] for views in (plain, strong)]
        for epoch in range(8)
    ]
    assert sum((a != b).any() for a, b in pairs) > 4


@pytest.mark.parametrize("data", [ONE, SEVERAL], ids=["one", "several"])
def test_a_training_step_uses_labels_weights_and_smoothing(data: LabelledImages) -> None:
    logits = torch.randn(3, 3)
    settings = ClassifierSettings(class_weights={"a": 5.0}, label_smoothing=0.3)
    classifier = Classifier(build_encoder("test_resnet", 32), data.classes, data.multi_label)
    classifier.forward = lambda images: logits  # type: ignore[method-assign]
    task = ClassifierTraining(classifier, data, settings)
    task.log = lambda *_: None  # type: ignore[method-assign,assignment]
    chosen = [3, 0, 2]
    loss = task.training_step(Batch([torch.zeros(3, 3, 8, 8)], torch.tensor(chosen), [], []), 0)
    expected = several_labels_loss if data.multi_label else one_label_loss
    target = torch.from_numpy(data.train.labels[chosen])
    target = target if data.multi_label else torch.eye(3)[target]
    weights = loss_weights({"a": 5.0}, data)
    torch.testing.assert_close(loss, expected(logits, target.float(), weights, 0.3))


def test_a_first_layer_that_is_adapted_to_other_bands_has_no_layer_decay() -> None:
    scale = {"low": (0.0,) * 5, "high": (1.0,) * 5, "mean": (0.5,) * 5, "std": (0.25,) * 5}
    encoder = adapt_encoder(
        build_encoder("test_vit", 32), ImageReader(bands=(0, 1, 2, 3, 4), **scale)
    )
    settings = ClassifierSettings(optimizer=OptimizerSettings(layer_decay=0.5))
    classifier = build_classifier(encoder, ONE, settings)
    groups = ClassifierTraining(classifier, ONE, settings).configure_optimizers().param_groups
    scales = {id(p): one["lr_scale"] for one in groups for p in one["params"]}
    embed = classifier.encoder.model.patch_embed.proj
    assert scales[id(embed.weight)] == 1
    assert scales[id(embed.bias)] < 0.2


@pytest.mark.parametrize("backbone", ["test_resnet", "deit_tiny_distilled_patch16_224"])
def test_only_the_classifier_of_a_frozen_encoder_is_trained(backbone: str) -> None:
    encoder = build_encoder(backbone, 32)
    classifier = Classifier(encoder, ONE.classes)
    ClassifierTraining(classifier, ONE, ClassifierSettings(frozen=True))
    trained = {n for n, p in classifier.network.named_parameters() if p.requires_grad}
    heads = ("head", "head_dist") if "deit" in backbone else ("fc",)
    assert trained == {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}


# Scores


def test_scores_of_one_label_against_scikit_learn() -> None:
    logits, target = torch.randn(60, 3), torch.randint(0, 3, (60,))
    scores = class_scores.score_one(logits, target, ["a", "b", "c"])
    best = logits.argmax(dim=1)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(target, best)
    for k, name in enumerate("abc"):
        expected = {"precision": precision[k], "recall": recall[k], "f1": f1[k]}
        assert scores.per_class[name] == pytest.approx(expected)
    assert scores.top1 == pytest.approx(sk.accuracy_score(target, best))
    assert scores.macro_f1 == pytest.approx(f1.mean())
    assert scores.confusion is not None
    assert scores.confusion.tolist() == sk.confusion_matrix(target, best).tolist()


@pytest.mark.slow
def test_scores_of_several_labels_against_scikit_learn(warnings: pytest.LogCaptureFixture) -> None:
    """Classes that all test images or none have are not counted; ties stay ties."""
    logits, target = torch.randn(60, 5).mul(2).round(), torch.randint(0, 2, (60, 5))
    logits[:, 3] += 20  # in float32 all of these probabilities would be one
    target[:, 1], target[:, 4] = 1, 0
    scores = class_scores.score_several(logits, target, list("abcde"))
    assert list(scores.per_class) == ["a", "c", "d"]
    for k, name in ((0, "a"), (2, "c"), (3, "d")):
        expected = {
            "ap": sk.average_precision_score(target[:, k], logits[:, k]),
            "auroc": sk.roc_auc_score(target[:, k], logits[:, k]),
            "f1": sk.f1_score(target[:, k], logits[:, k] > 0),
        }
        assert scores.per_class[name] == pytest.approx(expected)
    for metric, measure in (("map", "ap"), ("auroc", "auroc"), ("macro_f1", "f1")):
        mean = np.mean([values[measure] for values in scores.per_class.values()])
        assert scores.metrics[metric] == pytest.approx(mean)
    assert scores.confusion is None
    assert "all test images or none have it: b, e" in warnings.text


def test_evaluation_of_several_labels() -> None:
    logits, target = torch.randn(30, 3), torch.randint(0, 2, (30, 3))
    target[:, 1] = 0
    result = class_scores.evaluate_several(logits, target)
    precise = sk.average_precision_score(target[:, [0, 2]], logits[:, [0, 2]], average="macro")
    probability = logits.double().sigmoid().clamp(1e-12, 1 - 1e-12)
    loss = np.mean([sk.log_loss(target[:, k], probability[:, k], labels=[0, 1]) for k in range(3)])
    assert (result["map"], result["loss"]) == pytest.approx((precise, loss), rel=1e-5)


def test_evaluation_without_a_rankable_class_uses_the_loss() -> None:
    result = class_scores.evaluate_several(torch.zeros(2, 2), torch.tensor([[1, 0], [1, 0]]))
    assert result == pytest.approx({"loss": math.log(2), "calibrated_loss": math.log(2)})


def test_an_overconfident_model_is_not_worse_than_a_calibrated_one() -> None:
    logits, target = torch.randn(40, 3), torch.randint(0, 3, (40,))
    logits[range(30), target[:30]] += 2
    plain, bold = (class_scores.evaluate_one(scale * logits, target) for scale in (1, 8))
    assert bold["loss"] > 2 * plain["loss"]
    assert bold["calibrated_loss"] == pytest.approx(plain["calibrated_loss"], rel=1e-4)
    tried = [float(F.cross_entropy(logits / t, target)) for t in np.geomspace(0.1, 10, 400)]
    assert plain["calibrated_loss"] == pytest.approx(min(tried), rel=1e-4)
    assert math.isnan(class_scores.evaluate_one(logits * math.nan, target)["calibrated_loss"])


# Training


@pytest.fixture(scope="module")
def colored(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """Noise whose bright channels give the classes. No image has the class `nothing`."""
    folder, random = tmp_path_factory.mktemp("colored"), np.random.default_rng(0)
    parts = []
    for part, count in (("train", 48), ("val", 16), ("test", 32)):
        labels = np.zeros((count, 4), np.int64)
        labels[:, [0, 1, 3]] = random.integers(0, 2, (count, 3))
        paths = []
        for index, row in enumerate(labels):
            image = random.integers(0, 120, (32, 32, 3)) + 130 * row[[3, 1, 0]]
            paths.append(str(folder / f"{part}{index}.png"))
            Image.fromarray(image.astype(np.uint8)).save(paths[-1])
        parts.append(Part(paths, labels))
    return LabelledImages(["blue", "green", "nothing", "red"], *parts, reading=ReadingLog("data"))


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_pretrained_encoder_starts_at_its_linear_probe(
    backbone: str, colored: LabelledImages
) -> None:
    """The logits before the first step are those of a probe on the encoder's features."""
    encoder = build_encoder(backbone, 32)
    settings = ClassifierSettings(pretrained=True)
    model = build_classifier(encoder, colored, settings)
    assert Classification().starts_fitted(model, colored, settings)
    weights = np.ones(len(colored.train), np.float32)
    weighted = replace(colored, train=replace(colored.train, weights=weights))
    assert not Classification().starts_fitted(model, weighted, settings)
    features, _ = extract(encoder, colored.train.paths)
    head, _ = fit_linear(features["last"], colored.train.labels, len(colored.classes))
    expected = head.logits(features["last"])
    found, _ = class_logits(model, colored.train.paths)
    # bf16 where the processor has it: a value is exact to one part in 256
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
    untrained = build_classifier(encoder, colored, ClassifierSettings())
    assert not Classification().starts_fitted(untrained, colored, ClassifierSettings())


def test_stochastic_depth_is_refused_where_timm_has_none() -> None:
    for backbone in ("test_vit", "test_resnet", "test_convnext"):
        check_drop_path(0.3, build_encoder(backbone, 32))
    check_drop_path(0.0, build_encoder("dla46_c", 32))
    with pytest.raises(UserError, match=r"--drop_path 0\.3: timm has no stochastic depth for dla"):
        check_drop_path(0.3, build_encoder("dla46_c", 32))


def test_training_views_change_colors_unless_they_are_to_be_left_alone() -> None:
    image = np.full((40, 40, 3), (200, 120, 40), np.uint8)
    kept, changed = (classifier_views(32, 0.5, True, color) for color in (0.0, 0.5))
    for epoch in range(5):
        (view,) = kept(image, seed=0, epoch=epoch, index=0)
        assert (view == image[0, 0]).all()
    means = {tuple(changed(image, seed=0, epoch=epoch, index=0)[0][0, 0]) for epoch in range(5)}
    assert len(means) > 2


def test_norms_of_a_pretrained_encoder_are_frozen_where_images_are_few(
    colored: LabelledImages,
) -> None:
    encoder = build_encoder("test_resnet", 32)

    def trains_norms(settings: ClassifierSettings, data: LabelledImages) -> bool:
        classifier = Classifier(copy.deepcopy(encoder), data.classes, multi_label=True)
        training = ClassifierTraining(classifier, data, settings).train()
        norms = [one for one in training.modules() if isinstance(one, nn.BatchNorm2d)]
        return norms[0].training

    some = colored.train
    many = replace(colored, train=Part(some.paths * 25, np.tile(some.labels, (25, 1))))
    assert not trains_norms(ClassifierSettings(pretrained=True), colored)
    assert trains_norms(ClassifierSettings(pretrained=True), many)
    assert trains_norms(ClassifierSettings(pretrained=False), colored)
    assert not trains_norms(ClassifierSettings(pretrained=True, frozen_norm=True), many)

    def tried(settings: ClassifierSettings, data: LabelledImages, backbone: nn.Module) -> list:
        return [one.frozen_norm for one in Classification().variants(backbone, data, settings)]

    assert tried(ClassifierSettings(pretrained=True), colored, encoder) == [True, False]
    assert tried(ClassifierSettings(pretrained=True), many, encoder) == [False]
    assert tried(ClassifierSettings(), colored, encoder) == [None]
    vit = build_encoder("test_vit", 32)
    assert tried(ClassifierSettings(pretrained=True), colored, vit) == [None]


def test_each_image_has_its_part_in_the_mean_precision_of_several_labels(
    colored: LabelledImages,
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", 32)
    model = build_classifier(encoder, colored, ClassifierSettings()).eval()
    scores, count = score_classifier(model, colored), len(colored.test)
    assert scores.per_image is not None
    for image in (0, count - 1):
        kept = [index for index in range(count) if index != image]
        without = score_classifier(model, colored.take({"test": kept})).metrics["map"]
        expected = count * scores.metrics["map"] - (count - 1) * without
        assert scores.per_image[image] == pytest.approx(expected)


@pytest.mark.slow
def test_learns_several_labels_per_image(
    colored: LabelledImages, warnings: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    encoder = build_encoder("test_resnet", 32)
    settings = ClassifierSettings(
        epochs=5, batch_size=8, class_weights="balanced", optimizer=OptimizerSettings(lr=3e-3)
    )
    model = build_classifier(encoder, colored, settings)
    train_classifier(model, colored, settings, Hardware(devices=1, num_workers=0))
    assert "can't be learned, as no training image has it: nothing" in warnings.text
    scores = score_classifier(model, colored)
    assert scores.metrics["map"] > 0.9
    assert scores.metrics["macro_f1"] > 0.8
    assert sorted(scores.per_class) == ["blue", "green", "red"]

    save_classifier(model, tmp_path / "model", {})
    loaded = load_classifier(tmp_path)
    assert loaded.multi_label
    assert loaded.classes == colored.classes
    assert loaded.encoder.image_size == 32
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded.eval()(images), model.eval()(images))


def test_a_model_folder_has_one_label_by_default(tmp_path: Path) -> None:
    encoder = build_encoder("test_resnet", 32)
    encoder.model.reset_classifier(2)
    save_model(encoder, tmp_path, {}, ["a", "b"])
    assert not load_classifier(tmp_path).multi_label
