import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vissl_lite.data.stream import StreamSampler, stream
from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.errors import UserError
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.optim import OptimizerSettings
from vissl_lite.training.fit import TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.segmentation import metrics
from vissl_lite.transfer.segmentation.data import LabelledMasks, load_masks
from vissl_lite.transfer.segmentation.mask_source import IGNORE_INDEX
from vissl_lite.transfer.segmentation.metrics import score_confusion, score_segmenter
from vissl_lite.transfer.segmentation.model import Segmenter, load_segmenter, save_segmenter
from vissl_lite.transfer.segmentation.options import SegmenterSettings
from vissl_lite.transfer.segmentation.training import (
    MaskDataset,
    build_segmenter,
    train_segmenter,
    weigh_classes,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog

HERE = Hardware("32-true", devices=1, num_workers=0)
FAST = OptimizerSettings("adamw", lr=4e-3)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red and green squares on gray noise, with two white rows that are ignored; 40 x 48 pixels."""
    folder = tmp_path_factory.mktemp("squares")
    for part, count in (("train", 16), ("val", 2), ("test", 3)):
        for kind in ("images", "masks"):
            (folder / kind / part).mkdir(parents=True)
        for index in range(count):
            random = np.random.default_rng((len(part), index))
            image = random.integers(60, 120, (40, 48, 3), dtype=np.uint8)
            mask = np.zeros((40, 48), np.uint8)
            for which, left in enumerate((0, 24)):
                y, x = random.integers(2, 20), left + random.integers(2, 6)
                image[y : y + 16, x : x + 16, which] = 240
                mask[y : y + 16, x : x + 16] = 1 + which
            image[:2], mask[:2] = 255, IGNORE_INDEX
            Image.fromarray(image).save(folder / "images" / part / f"{index}.png")
            Image.fromarray(mask).save(folder / "masks" / part / f"{index}.png")
    (folder / "classes.txt").write_text("nothing\nred\ngreen\n")
    return folder


@pytest.fixture
def data(squares: Path) -> LabelledMasks:
    return load_masks(squares)


def settings(epochs: int, **more: object) -> SegmenterSettings:
    return SegmenterSettings(epochs=epochs, batch_size=8, optimizer=FAST, **more)  # type: ignore[arg-type]


def trained(
    encoder: Encoder, data: LabelledMasks, chosen: SegmenterSettings, *rest: Any
) -> Segmenter:
    segmenter = build_segmenter(encoder, data, chosen)
    train_segmenter(segmenter, data, chosen, *rest)
    return segmenter


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_learns_and_is_saved(backbone: str, data: LabelledMasks, tmp_path: Path) -> None:
    torch.manual_seed(1)
    encoder = build_encoder(backbone, 32)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    metrics = MetricsFile(tmp_path / "metrics.csv")
    chosen = settings(7, frozen_norm=False, min_crop_scale=0.6)
    segmenter = trained(encoder, data, chosen, HERE, TrainingFiles(metrics))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    scores = score_segmenter(segmenter, data.test)
    assert scores.miou > 0.45  # predicting one class everywhere gives 0.24
    assert scores.per_class.keys() == {"nothing", "red", "green"}
    last = score_segmenter(segmenter, data.val)
    assert last.miou == pytest.approx(metrics.series("val_miou")[1][-1], abs=1e-3)
    assert all(metrics.series(name)[1] for name in ("loss", "val_dice", "val_loss"))

    save_segmenter(segmenter, tmp_path / "run" / "model", {"version": "1"})
    head = json.loads((tmp_path / "run" / "model" / "head.json").read_text())
    assert head["task"] == "segmentation"
    images = torch.randn(2, 3, 40, 40)
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        again = load_segmenter(folder)
        classes = again.classes
        assert classes == ["nothing", "red", "green"]
        with torch.no_grad():
            torch.testing.assert_close(
                again.eval()(images), segmenter.eval()(images), atol=1e-4, rtol=1e-4
            )


def test_every_weight_to_be_trained_gets_a_gradient(data: LabelledMasks) -> None:
    segmenter = build_segmenter(build_encoder("test_vit", 32), data, settings(1)).train()
    segmenter(torch.rand(2, 3, 32, 32)).square().sum().backward()
    without = {name for name, p in segmenter.named_parameters() if p.grad is None}
    assert without == {"encoder.model.norm.weight", "encoder.model.norm.bias"}
    assert without == {name for name, p in segmenter.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("kind", ["frozen", "frozen_norm"])
def test_frozen_weights_do_not_change_after_validation(kind: str, data: LabelledMasks) -> None:
    encoder = build_encoder("test_resnet", 32)
    frozen = kind == "frozen"
    chosen = settings(3, frozen=frozen, frozen_norm=not frozen, pretrained=True)
    segmenter = trained(encoder, data, chosen, HERE)
    norms = {
        f"{name}.{inner}"
        for name, module in encoder.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for inner in module.state_dict()
    }
    assert len(norms) > 10
    after = segmenter.encoder.state_dict()
    changed = {n for n, tensor in encoder.state_dict().items() if not torch.equal(tensor, after[n])}
    assert not changed & norms
    assert bool(changed) == (kind == "frozen_norm")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_segmenter(data: LabelledMasks) -> None:
    encoder = build_encoder("test_resnet", 32)
    one, other = (trained(encoder, data, settings(1), HERE) for _ in range(2))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], msg=name)


def test_a_batch_is_images_and_masks(data: LabelledMasks) -> None:
    dataset = MaskDataset(data.train, 32, settings(1))
    sampler = StreamSampler(len(data.train), 8, seed=0, epochs=1)
    batches = list(stream(dataset, sampler, workers=0, pin_memory=False))
    assert sorted(int(i) for batch in batches for i in batch.indices) == list(range(16))
    for batch in batches:
        images, masks = batch.views
        assert images.shape == (8, 3, 32, 32)
        assert masks.shape == (8, 1, 32, 32)
        assert images.dtype == masks.dtype == torch.uint8
        red, green = images[:, 0].int(), images[:, 1].int()
        assert ((red > green + 40)[masks[:, 0] == 1]).float().mean() > 0.9
        assert ((green > red + 40)[masks[:, 0] == 2]).float().mean() > 0.9


def test_the_mask_follows_a_large_photograph_at_its_own_scale(tmp_path: Path) -> None:
    mask = np.kron(np.random.default_rng(0).integers(0, 2, (100, 100), np.uint8), np.ones((4, 4)))
    photo = Image.fromarray((mask[..., None] * [200, 200, 200]).astype(np.uint8))
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for index in range(3):
        photo.save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / f"{index}.png")
    dataset = MaskDataset(load_masks(tmp_path).train, 32, settings(1))
    edges = []
    for index in range(8):
        views = dataset[index, 0].views
        light = views[0].mean(axis=2) > 100
        assert (light == views[1][..., 0]).mean() > 0.93
        edges.append((np.diff(views[1][..., 0].astype(int), axis=1) != 0).mean())
    # half of the borders between squares of 4 pixels are edges; shrinking 12 times gives more
    assert 0.06 < np.mean(edges) < 0.2


# Scores


def test_scores_equal_their_definitions() -> None:
    random = np.random.default_rng(0)
    truth, guess = random.integers(0, 3, (2, 500))  # class 3 occurs in neither
    confusion = np.zeros((5, 5), np.int64)
    guess[truth == 1] = np.where(random.random((truth == 1).sum()) < 0.5, 4, 1)
    np.add.at(confusion, (truth, guess), 1)
    scores = score_confusion(confusion, list("abcde"), 0.5)
    expected = {}
    for index, name in enumerate("abcde"):
        both = int(((truth == index) & (guess == index)).sum())
        either = int(((truth == index) | (guess == index)).sum())
        if either:
            expected[name] = {"iou": both / either, "dice": 2 * both / (both + either)}
    assert expected.keys() == set("abce")  # e is predicted but never true
    assert scores.per_class == {name: pytest.approx(values) for name, values in expected.items()}
    assert scores.miou == pytest.approx(np.mean([values["iou"] for values in expected.values()]))
    assert scores.dice == pytest.approx(np.mean([values["dice"] for values in expected.values()]))
    assert scores.accuracy == pytest.approx((truth == guess).mean())


class RedOrGreen(Segmenter):
    """Segments the squares perfectly by color, without using the encoder."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red, green = images[:, 0] - images[:, 2], images[:, 1] - images[:, 2]
        nothing = torch.full_like(red, 0.5)
        return 20 * torch.stack([nothing, red, green], dim=1)


def test_pixels_are_counted_at_the_resolution_of_the_masks(data: LabelledMasks) -> None:
    segmenter = RedOrGreen(
        build_encoder("test_resnet", 40), classes=["none", "red", "green"], channels=16
    )
    done: list[int] = []
    scores = score_segmenter(segmenter, data.train, done.append)
    assert sum(done) == len(data.train)
    assert scores.miou > 0.99
    masks = [one.mask.read() for one in data.train]
    counts = [sum(int((mask == index).sum()) for mask in masks) for index in range(3)]
    assert scores.confusion.sum(axis=1).tolist() == counts  # 255 is not counted


def test_large_images_are_segmented_one_by_one(
    data: LabelledMasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_encoder("test_resnet", 40)
    segmenter = RedOrGreen(encoder, classes=["none", "red", "green"], channels=16)
    segment_all, together = metrics.segment_all, []

    def noted(segmenter: Segmenter, images: Sequence[np.ndarray], device: Any) -> Any:
        together.append(len(images))
        return segment_all(segmenter, images, device)

    monkeypatch.setattr(metrics, "segment_all", noted)
    whole = score_segmenter(segmenter, data.train[:5])
    monkeypatch.setattr(metrics, "MOST_PROBABILITIES", 1)
    assert score_segmenter(segmenter, data.train[:5]).metrics == whole.metrics
    assert together == [5, 1, 1, 1, 1, 1]


def test_each_image_has_its_part_in_the_mean_iou(data: LabelledMasks) -> None:
    encoder = build_encoder("test_resnet", 40)
    segmenter = RedOrGreen(encoder, classes=["none", "red", "green"], channels=16)
    part, blocks = data.train[:4], np.array([0, 1, 0, 2])
    segmenter.eval()
    scores = score_segmenter(segmenter, part, units=blocks)
    expected = np.empty(4)
    for block in range(3):
        kept = [one for one, number in zip(part, blocks, strict=True) if number != block]
        weight = 4 / (4 - len(kept))
        without = score_segmenter(segmenter, kept).miou
        expected[blocks == block] = weight * scores.miou - (weight - 1) * without
    assert scores.per_image == pytest.approx(expected)


def test_broken_images_are_skipped_and_logged(
    squares: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_masks(squares)
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(data.test[0].path).read_bytes()[:200])
    bad = type(data.test[0])(str(broken), data.test[0].mask)
    segmenter = RedOrGreen(
        build_encoder("test_resnet", 48), classes=["none", "red", "green"], channels=16
    )
    with caplog.at_level(logging.WARNING, "vissl_lite"):
        scores = score_segmenter(segmenter, [bad, *data.test[1:]])
    assert "broken.png" in caplog.text
    alone = score_segmenter(segmenter, data.test[1:])
    assert scores.confusion.tolist() == alone.confusion.tolist()
    with pytest.raises(UserError, match="none of 1 images can be read"):
        score_segmenter(segmenter, [bad])


# Settings and folders


def test_class_weights(data: LabelledMasks) -> None:
    assert weigh_classes(data, None) is None
    by_name = weigh_classes(data, {"red": 3})
    assert by_name is not None
    assert by_name.tolist() == [1, 3, 1]
    balanced = weigh_classes(data, "balanced")
    assert balanced is not None
    masks = np.stack([one.mask.read() for one in data.train])
    pixels = np.array([(masks == index).sum() for index in range(3)])
    np.testing.assert_allclose(balanced.numpy(), pixels.mean() / pixels, rtol=1e-5)
    rare = LabelledMasks(["a", "b", "c", "unseen"], data.train, [], [], ReadingLog("data"))
    more = weigh_classes(rare, "balanced")
    assert more is not None
    assert more.tolist() == [*balanced.tolist(), 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("equal", "equal is neither balanced nor weights by name"),
        ({"reed": 2.0}, "the unknown class reed: did you mean red"),
        ({"red": 0.0}, "gives red 0.0: it must be above 0"),
        ({"red": float("nan")}, "gives red nan: it must be above 0"),
        ({"red": float("inf")}, "gives red inf: it must be above 0 and finite"),
    ],
)
def test_invalid_class_weights(
    given: str | dict[str, float], message: str, data: LabelledMasks
) -> None:
    with pytest.raises(UserError, match=message):
        weigh_classes(data, given)


def test_folders_without_a_segmenter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model at .*: give a run of finetune"):
        load_segmenter(tmp_path)
    segmenter = Segmenter(build_encoder("test_resnet", 32), classes=["a", "b"], channels=16)
    save_segmenter(segmenter, tmp_path, {})
    head = json.loads((tmp_path / "head.json").read_text())
    (tmp_path / "head.json").write_text(json.dumps(head | {"task": "detection"}))
    with pytest.raises(UserError, match="is a model for detection, not for segmentation"):
        load_segmenter(tmp_path)
    (tmp_path / "head.json").write_text(json.dumps(head | {"classes": ["a"]}))
    with pytest.raises(UserError, match="is damaged"):
        load_segmenter(tmp_path)
