import gc
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import blobs
from vissl_lite.data.images import find_images
from vissl_lite.data.reading import Broken
from vissl_lite.data.stream import (
    Batch,
    Item,
    KeyedDataset,
    StreamSampler,
    ViewDataset,
    collate,
    stream,
)
from vissl_lite.data.views import Views, color_distortion, flip, random_crop
from vissl_lite.errors import UserError

IMAGES, BATCH, EPOCHS = 24, 7, 2
PER_EPOCH = IMAGES // BATCH


def views() -> Views:
    one = [random_crop(16, 0.3), flip(), *color_distortion(0.5)]
    return Views([one, one], shortest=16)


def dataset(photos: Path, seed: int = 0) -> ViewDataset:
    return ViewDataset(find_images([photos]), views(), seed)


def read(
    photos: Path, workers: int = 0, start: int = 0, rank: int = 0, world: int = 1, seed: int = 0,
    batch_size: int = BATCH,
) -> list[Batch]:  # fmt: skip
    sampler = StreamSampler(IMAGES, batch_size, seed, EPOCHS, start, rank, world)
    return list(stream(dataset(photos, seed), sampler, workers, pin_memory=False))


def content(batches: list[Batch]) -> list[tuple[bytes, ...]]:
    return [
        (batch.indices.numpy().tobytes(), *(view.numpy().tobytes() for view in batch.views))
        for batch in batches
    ]


def indices(batches: list[Batch]) -> np.ndarray:
    return torch.stack([batch.indices for batch in batches]).numpy()


@pytest.fixture(scope="module")
def whole(photos: Path) -> list[Batch]:
    return read(photos)


def test_a_batch_is_uint8_and_channels_last(whole: list[Batch]) -> None:
    for view in whole[0].views:
        assert view.shape == (BATCH, 3, 16, 16)
        assert view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert whole[0].indices.dtype == torch.int64
    assert whole[0].broken == []


@pytest.mark.parametrize("workers", [1, 2])
def test_the_stream_is_the_same_with_any_number_of_workers(
    workers: int, photos: Path, whole: list[Batch]
) -> None:
    assert len(whole) == EPOCHS * PER_EPOCH
    assert content(read(photos, workers)) == content(whole)


def test_an_epoch_has_each_image_at_most_once(whole: list[Batch]) -> None:
    for epoch in range(EPOCHS):
        seen = indices(whole[epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH]).ravel()
        assert len(set(seen)) == PER_EPOCH * BATCH
        assert set(seen) <= set(range(IMAGES))


def test_epochs_differ_in_order_and_in_pixels(photos: Path, whole: list[Batch]) -> None:
    assert indices(whole)[:PER_EPOCH].tolist() != indices(whole)[PER_EPOCH:].tolist()
    data = dataset(photos)
    for a, b in zip(data[0, 5].views, data[1, 5].views, strict=True):
        assert not np.array_equal(a, b)


def test_another_seed_gives_another_stream(photos: Path, whole: list[Batch]) -> None:
    other = read(photos, seed=1)
    assert indices(other).tolist() != indices(whole).tolist()


def test_a_batch_holds_what_its_keys_say(photos: Path, whole: list[Batch]) -> None:
    data = dataset(photos)
    second = PER_EPOCH  # the first batch of epoch 1
    expected = collate([data[1, int(index)] for index in whole[second].indices])
    assert content([expected]) == content([whole[second]])


@pytest.mark.parametrize("start", [1, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 1])
def test_starting_later_gives_the_tail_of_the_stream(
    start: int, photos: Path, whole: list[Batch]
) -> None:
    assert content(read(photos, start=start)) == content(whole[start:])


def test_workers_can_start_later_too(photos: Path, whole: list[Batch]) -> None:
    assert content(read(photos, workers=2, start=2)) == content(whole[2:])


def test_nothing_is_left_after_the_end(photos: Path) -> None:
    assert read(photos, start=EPOCHS * PER_EPOCH) == []


def test_two_ranks_together_see_what_one_process_sees(photos: Path) -> None:
    one = read(photos, batch_size=6)
    ranks = [read(photos, batch_size=6, rank=rank, world=2) for rank in (0, 1)]
    for batch, *shares in zip(one, *ranks, strict=True):
        assert [len(share.indices) for share in shares] == [3, 3]
        assert torch.equal(torch.cat([share.indices for share in shares]), batch.indices)
        for number, view in enumerate(batch.views):
            joined = torch.cat([share.views[number] for share in shares])
            assert torch.equal(joined, view)


def test_an_infinite_stream_has_no_length_and_goes_on() -> None:
    sampler = StreamSampler(IMAGES, BATCH, seed=0)
    with pytest.raises(TypeError, match="no end"):
        len(sampler)
    keys = iter(sampler)
    first = [next(keys) for _ in range(5 * PER_EPOCH)]
    assert [batch[0][0] for batch in first] == [e for e in range(5) for _ in range(PER_EPOCH)]
    finite = StreamSampler(IMAGES, BATCH, seed=0, epochs=5)
    assert len(finite) == 5 * PER_EPOCH
    assert list(finite) == first


def test_weights_sample_classes_equally_often() -> None:
    labels = np.array([0] * 80 + [1] * 15 + [2] * 5)
    weights = 1 / np.bincount(labels)[labels]
    sampler = StreamSampler(len(labels), 10, seed=0, epochs=60, weights=weights)
    drawn = np.array([index for batch in sampler for _, index in batch])
    assert len(drawn) == 6000
    shares = np.bincount(labels[drawn]) / len(drawn)
    # five standard deviations: 5 sqrt(1/3 2/3 / 6000) = 0.03
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)
    within = np.bincount(drawn, minlength=100)[labels == 0]
    assert within.min() > 0


def test_weights_follow_the_epoch_and_can_be_resumed() -> None:
    weights = np.linspace(1, 2, IMAGES)
    whole = list(StreamSampler(IMAGES, BATCH, 0, EPOCHS, weights=weights))
    assert [[i for _, i in batch] for batch in whole[:PER_EPOCH]] != [
        [i for _, i in batch] for batch in whole[PER_EPOCH:]
    ]
    assert list(StreamSampler(IMAGES, BATCH, 0, EPOCHS, start=4, weights=weights)) == whole[4:]


def test_views_of_a_batch_are_drawn_at_its_resolution(photos: Path) -> None:
    one = views()
    data = ViewDataset(find_images([photos]), one, 0, smaller=[one.resized(0.5, round)])
    sampler = StreamSampler(IMAGES, BATCH, 0, 1, resolution=lambda batch: batch % 2)
    sides = [batch.views[0].shape[-1] for batch in stream(data, sampler, 0, pin_memory=False)]
    assert sides == [16, 8, 16]
    whole, small = data[0, 3].views[0], data[0, 3, 1].views[0]
    halved = cv2.resize(whole, small.shape[:2], interpolation=cv2.INTER_AREA).astype(float)
    same = np.corrcoef(halved.ravel(), small.ravel())[0, 1]
    assert same > 0.9  # the same crop, flip and colors


def spoilt(photos: Path, *broken: int) -> ViewDataset:
    """The photos, some of them replaced by what is no image."""
    data = dataset(photos)
    paths = list(data.paths)
    for index in broken:
        paths[index] += ".gone"
    return ViewDataset(paths, data.views[0], data.seed)


@pytest.mark.parametrize(
    ("broken", "asked", "successor"), [([3], 3, 4), ([3, 4], 3, 5), ([23], 23, 0)]
)
def test_a_broken_image_gives_way_to_its_successor_and_is_named(
    broken: list[int], asked: int, successor: int, photos: Path
) -> None:
    data = spoilt(photos, *broken)
    item = data[1, asked]
    assert item.number == successor
    why = "No such file or directory"
    assert item.broken == [Broken(data.paths[index], why) for index in broken]
    for ours, expected in zip(item.views, dataset(photos)[1, successor].views, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_name_all_their_broken_images(workers: int, photos: Path) -> None:
    data = spoilt(photos, 3, 10)
    sampler = StreamSampler(IMAGES, 12, 0, epochs=1)
    batches = list(stream(data, sampler, workers, pin_memory=False))
    named = [one.path for batch in batches for one in batch.broken]
    assert sorted(named) == sorted([data.paths[3], data.paths[10]])
    seen = indices(batches).ravel().tolist()
    assert sorted(seen) == sorted([*set(range(24)) - {3, 10}, 4, 11])


def test_a_set_of_broken_images_alone_is_an_error(photos: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{index}.jpg") for index in range(3)]
    for path in paths:
        Path(path).write_text("broken")
    with pytest.raises(UserError, match=r"1 of 3 images can't be read, the first .*1\.jpg \(no "):
        ViewDataset(paths, views(), 0)[0, 1]
    with pytest.raises(UserError, match="none of 3 images can be read"):
        ViewDataset(paths, views(), 0).first()
    assert ViewDataset([*paths, find_images([photos])[0]], views(), 0).first().number == 3


class Worker(KeyedDataset):
    """Tells what a data worker holds, beside the path it was asked for."""

    def item(self, epoch: int, index: int, resolution: int = 0) -> Item:
        told = (type(self.paths).__name__, self.paths[index], gc.get_freeze_count() > 0)
        return Item([np.zeros((1, 1, 3), np.uint8)], index, [], told)


@pytest.mark.slow
def test_workers_copy_neither_paths_nor_what_the_main_process_has() -> None:
    paths = ["plain.jpg", "two\nlines.jpg", os.fsdecode(b"caf\xe9.jpg"), "日本.jpg"]
    sampler = StreamSampler(4, 2, seed=0, epochs=1)
    batches = list(stream(Worker(paths, 0), sampler, 2, pin_memory=False))
    expected = [("PathList", path, True) for path in paths]  # a list would be copied bit by bit
    assert sorted(told for batch in batches for told in batch.targets) == sorted(expected)
    assert gc.get_freeze_count() == 0  # here, garbage is collected as ever


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Six photographs that are many times as large as their views, one on its side."""
    folder = tmp_path_factory.mktemp("large")
    for index in range(6):
        exif = Image.Exif()
        exif[0x0112] = 6 if index == 2 else 1
        blobs(index, 300, 400).save(folder / f"{index}.jpg", quality=95, exif=exif)
    return find_images([folder])


def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Will hold height and width of every image that OpenCV decodes."""
    sizes, decode = [], cv2.imdecode

    def seen(*arguments: Any) -> Any:
        image = decode(*arguments)
        sizes.append(image.shape[:2])
        return image

    monkeypatch.setattr(cv2, "imdecode", seen)
    return sizes


def test_large_photographs_are_decoded_as_small_as_their_own_crops_allow(
    large: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = [random_crop(16, 0.05), flip(), *color_distortion(0.5)]
    data, whole = (ViewDataset(large, Views([one, one], shortest=82), 0) for _ in range(2))
    sizes = decoded_sizes(monkeypatch)
    monkeypatch.setattr(whole.views[0], "times", lambda *_: 1)
    apart = []
    for epoch in range(4):
        for index in range(6):
            ours, plain = data[epoch, index], whole[epoch, index]
            apart += [
                np.abs(a.astype(int) - b).mean()
                for a, b in zip(ours.views, plain.views, strict=True)
            ]
            if epoch == 0:  # the leak guard knows the image at any size
                looks = [item.fingerprint[16:].view(np.int8) * 1.0 for item in (ours, plain)]
                lengths = np.linalg.norm(looks[0]) * np.linalg.norm(looks[1])
                assert looks[0] @ looks[1] > 0.98 * lengths
                assert np.array_equal(ours.fingerprint[:16], plain.fingerprint[:16])
    assert max(apart) < 20  # of other crops or colors: 50 and more
    assert set(sizes[1::2]) == {(300, 400), (400, 300)}
    assert {max(size) for size in sizes[::2]} >= {50, 100}


@pytest.mark.parametrize("workers", [1, 2])
def test_views_of_large_photographs_do_not_depend_on_workers(
    workers: int, large: list[str]
) -> None:
    def batches(workers: int) -> list[Batch]:
        sampler = StreamSampler(6, 3, 0, epochs=2)
        return list(stream(ViewDataset(large, views(), 0), sampler, workers, pin_memory=False))

    assert content(batches(workers)) == content(batches(0))


def test_an_error_of_ours_is_not_taken_for_a_broken_image(photos: Path) -> None:
    class Failing(Views):
        def __call__(self, *_: object) -> list[np.ndarray]:
            raise ZeroDivisionError

    data = dataset(photos)
    with pytest.raises(ZeroDivisionError):
        ViewDataset(data.paths, Failing([[flip()]], shortest=16), 0)[0, 0]
