import math

import pytest
import torch

from tests.conftest import prepared
from vissl_lite.data.stream import Batch
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.diet import DIET


def diet(images: int, **arguments: float) -> DIET:
    return prepared(DIET(build_encoder("test_resnet", 32), **arguments), images)


def batch_of(indices: list[int]) -> Batch:
    views = torch.randint(256, (len(indices), 3, 32, 32), dtype=torch.uint8)
    return Batch([views], torch.tensor(indices), [], [])


def test_loss_is_the_cross_entropy_with_a_smoothed_target_per_image() -> None:
    task, batch = diet(images=5, label_smoothing=0.3), batch_of([3, 0, 4])
    ours = task.training_step(batch, 0)
    logits = task.head(task.encoder(task.encoder.normalize(batch.views[0]))).double()
    total = 0.0
    for row, number in zip(logits.tolist(), [3, 0, 4], strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for image, value in enumerate(row):
            target = 0.3 / 5 + (0.7 if image == number else 0.0)
            total -= target * (value - log_sum)
    assert ours.item() == pytest.approx(total / 3, rel=1e-5)


def test_each_image_is_learned_under_its_number_in_the_data_set() -> None:
    task, batch = diet(images=6), batch_of([5, 2])
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        optimizer.step()
    logits = task.head(task.encoder(task.encoder.normalize(batch.views[0])))
    assert logits.argmax(dim=1).tolist() == [5, 2]


def test_many_images_are_too_many_classes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vissl_lite.pretext.diet.MANY_IMAGES", 5)
    for images in (5, 6):
        assert not caplog.records
        diet(images)
    assert [getattr(record, "code", None) for record in caplog.records] == ["pretext.many_classes"]
