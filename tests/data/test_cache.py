import multiprocessing
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.conftest import blobs
from vissl_lite.data import cache as cache_module
from vissl_lite.data.cache import CACHE, CachePlan, ImageCache, forks_workers, plan_cache
from vissl_lite.data.images import read_image
from vissl_lite.data.stream import Batch, StreamSampler, ViewDataset, stream
from vissl_lite.data.views import Views, flip, random_crop
from vissl_lite.errors import UserError

SHORTEST = 24
PLACES = pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "file"])


def views() -> Views:
    one = [random_crop(16, 0.3), flip()]
    return Views([one, one], SHORTEST)


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """Images as people have them, a broken one among them."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    blobs(0, 200, 150).save(folder / "large.jpg", quality=95)
    blobs(1, 90, 120).save(folder / "turned.jpg", quality=95, exif=turned)
    blobs(2, 60, 99).save(folder / "large.png")
    blobs(3, 20, 30).save(folder / "small.png")
    blobs(4, 60, 99).convert("CMYK").save(folder / "print.jpg")
    blobs(5, 60, 99).convert("P").save(folder / "palette.gif")
    deep = np.asarray(blobs(6, 50, 70).convert("L")).astype(np.uint16) * 257
    assert cv2.imwrite(str(folder / "deep.png"), deep)
    (folder / "broken.jpg").write_bytes((folder / "large.jpg").read_bytes()[:2000])
    return sorted(str(file) for file in folder.iterdir())


def plan(paths: list[str], folder: Path, in_memory: bool) -> CachePlan:
    made = plan_cache(paths, SHORTEST, folder, shareable=in_memory)
    assert made.in_memory == in_memory
    return made


def read(paths: list[str], cache: ImageCache | None, workers: int = 0) -> list[Batch]:
    sampler = StreamSampler(len(paths), len(paths), 0, epochs=3)
    return list(stream(ViewDataset(paths, views(), 0, cache), sampler, workers, pin_memory=False))


def content(batches: list[Batch]) -> list[tuple[Any, ...]]:
    return [
        (batch.indices.tolist(), *(view.numpy().tobytes() for view in batch.views))
        for batch in batches
    ]


@pytest.mark.slow
@PLACES
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_views_are_the_same_in_every_epoch_wherever_images_are_kept(
    workers: int, in_memory: bool, mixed: list[str], tmp_path: Path
) -> None:
    never = plan(mixed, tmp_path, True).open(tmp_path)
    never.put = lambda *_: None  # type: ignore[method-assign]
    cache = plan(mixed, tmp_path, in_memory).open(tmp_path)
    batches = read(mixed, cache, workers)
    assert content(batches) == content(read(mixed, never))
    assert [len(batch.broken) for batch in batches] == [1, 1, 1]
    kept = [os.path.basename(path) for i, path in enumerate(mixed) if cache.get(i) is not None]
    assert sorted(kept) == sorted({os.path.basename(path) for path in mixed} - {"broken.jpg"})


@PLACES
def test_later_epochs_open_no_file(in_memory: bool, tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.jpg" for index in range(3)]
    for index, file in enumerate(files):
        blobs(index).save(file)
    paths = [str(file) for file in files]
    cache = plan(paths, tmp_path, in_memory).open(tmp_path)
    data = ViewDataset(paths, views(), 0, cache)
    first = [data[0, index] for index in range(3)]
    assert all(item.fingerprint is not None for item in first)
    for file in files:
        file.unlink()
    later = [data[1, index] for index in range(3)]
    assert [item.number for item in later] == [0, 1, 2]
    assert all(item.fingerprint is None for item in later)


@PLACES
def test_small_images_give_the_views_that_they_give_without_a_cache(
    in_memory: bool, tmp_path: Path
) -> None:
    paths = []
    for index in range(4):
        blobs(index, SHORTEST, SHORTEST + index).save(tmp_path / f"{index}.png")
        paths.append(str(tmp_path / f"{index}.png"))
    cache = plan(paths, tmp_path, in_memory).open(tmp_path)
    assert content(read(paths, cache)) == content(read(paths, None))


def test_large_images_are_kept_small_and_give_nearly_the_same_views(
    mixed: list[str], tmp_path: Path
) -> None:
    path = next(path for path in mixed if path.endswith("large.jpg"))
    cache = plan([path], tmp_path, True).open(tmp_path)
    data, plain = ViewDataset([path], views(), 0, cache), ViewDataset([path], views(), 0)
    for epoch in range(5):
        for ours, theirs in zip(data[epoch, 0].views, plain[epoch, 0].views, strict=True):
            # the picture changes fast, and its crops are up to half a pixel apart: another
            # crop would differ by 60
            assert np.abs(ours.astype(int) - theirs).mean() < 20
    kept = cache.get(0)
    assert kept is not None
    assert kept[0].shape == (32, 24, 3)
    assert kept[1] == (200, 150)
    assert not kept[0].flags.writeable
    expected = cv2.resize(read_image(path), (24, 32), interpolation=cv2.INTER_AREA)
    assert np.abs(kept[0].astype(int) - expected).mean() < 3


def test_an_image_that_is_not_of_its_headers_size_is_not_kept(tmp_path: Path) -> None:
    cache = plan([write(tmp_path / "a.png")], tmp_path, True).open(tmp_path)
    cache.put(0, np.zeros((48, 40, 3), np.uint8), (48, 40))
    assert cache.get(0) is None
    cache.put(0, np.zeros((24, 29, 3), np.uint8), (40, 48))
    assert cache.get(0) is not None


def write(file: Path) -> str:
    blobs(1).save(file)
    return str(file)


def test_a_file_that_an_interrupted_run_left_is_read(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.png") for name in "ab"]
    first = plan(paths, tmp_path, False).open(tmp_path)
    ViewDataset(paths, views(), 0, first)[0, 1]
    again = plan(paths, tmp_path, False).open(tmp_path)
    assert again.get(0) is None
    kept, known = again.get(1), first.get(1)
    assert kept is not None
    assert known is not None
    np.testing.assert_array_equal(kept[0], known[0])


@pytest.mark.parametrize("change", ["touched", "other", "shortest", "cut", "boot"])
def test_a_file_that_was_made_for_other_images_is_made_anew(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / f"{name}.png") for name in "ab"]
    ViewDataset(paths, views(), 0, plan(paths, tmp_path, False).open(tmp_path))[0, 1]
    shortest = SHORTEST
    if change == "touched":
        os.utime(paths[0], (1, 1))
    elif change == "other":
        paths[0] = write(tmp_path / "c.png")
        os.utime(paths[0], ns=(0, os.stat(paths[1]).st_mtime_ns))
    elif change == "shortest":
        shortest = SHORTEST - 1
    elif change == "cut":
        os.truncate(tmp_path / CACHE, 60)
    else:  # what was written may not have reached the disk
        monkeypatch.setattr(cache_module, "_boot", lambda: "another")
    again = plan_cache(paths, shortest, tmp_path, shareable=False).open(tmp_path)
    assert again.get(1) is None


def test_the_file_is_deleted_at_the_end_and_can_still_be_read(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.png")]
    cache = plan(paths, tmp_path, False).open(tmp_path)
    data = ViewDataset(paths, views(), 0, cache)
    data[0, 0]
    cache.remove()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png"]
    assert cache.get(0) is not None
    data[0, 0]


def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / "a.png")]
    cache = plan(paths, tmp_path, False).open(tmp_path)
    opened = Path.open

    def refuse(self: Path, mode: str = "r", *rest: Any) -> Any:
        if mode == "r+b":
            raise OSError(28, "No space left on device")
        return opened(self, mode, *rest)

    monkeypatch.setattr(Path, "open", refuse)
    data = ViewDataset(paths, views(), 0, cache)
    assert [item.number for item in (data[0, 0], data[1, 0])] == [0, 0]
    assert cache.get(0) is None


def test_a_disk_without_room_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / "a.png")]
    monkeypatch.setattr(cache_module, "free_memory", lambda: 1000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"--cache needs 0\.0 GB and .* has 0\.0 GB free"):
        plan_cache(paths, SHORTEST, tmp_path / "not" / "yet", shareable=True)


@pytest.mark.parametrize(("free", "in_memory"), [(None, False), (4000, False), (50000, True)])
def test_half_of_the_free_memory_may_be_taken(
    free: int | None, in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "free_memory", lambda: free)
    made = plan_cache([write(tmp_path / "a.png")], SHORTEST, tmp_path, shareable=True)
    assert 2000 < made.total < 2500  # 24 x 29 pixels
    assert made.in_memory == in_memory


def test_a_set_of_broken_images_alone_has_a_cache_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_text("broken")
    cache = plan([str(path), str(tmp_path / "gone.jpg")], tmp_path, False).open(tmp_path)
    assert cache.get(0) is cache.get(1) is None


def test_a_file_can_be_read_from_a_process_that_is_started_anew(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.png")]
    cache = plan(paths, tmp_path, False).open(tmp_path)
    ViewDataset(paths, views(), 0, cache)[0, 0]
    copied = pickle.loads(pickle.dumps(cache))
    kept, known = copied.get(0), cache.get(0)
    assert kept is not None
    assert known is not None
    np.testing.assert_array_equal(kept[0], known[0])
    in_memory = plan(paths, tmp_path, True).open(tmp_path)
    with pytest.raises(TypeError, match="memory can't be sent"):
        pickle.dumps(in_memory)


def test_memory_is_chosen_where_workers_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert not forks_workers(2)
    assert forks_workers(0)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "fork")
    assert forks_workers(2)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: None)
    assert forks_workers(2) == (multiprocessing.get_all_start_methods()[0] == "fork")


def test_processes_without_proc_plan_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They begin at different times; only another boot makes another file."""
    paths = [write(tmp_path / "a.png")]
    read_text = Path.read_text

    def without_proc(self: Path, *rest: Any, **named: Any) -> str:
        if self.is_relative_to("/proc"):
            raise FileNotFoundError
        return read_text(self, *rest, **named)

    monkeypatch.setattr(Path, "read_text", without_proc)
    digests = []
    for now, up in ((10_000.0, 3000.0), (10_007.3, 3007.3), (10_900.0, 30.0)):
        clock = SimpleNamespace(time=lambda now=now: now, monotonic=lambda up=up: up)
        monkeypatch.setattr(cache_module, "time", clock)
        digests.append(plan(paths, tmp_path, False).digest)
    assert digests[0] == digests[1] != digests[2]


def test_the_other_processes_wait_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / "a.png")]
    made = plan(paths, tmp_path, False)
    monkeypatch.setattr(cache_module, "_WAIT", 0)
    with pytest.raises(UserError, match="was not made within 0 seconds"):
        made.open(tmp_path, maker=False)
    main = made.open(tmp_path)
    ViewDataset(paths, views(), 0, main)[0, 0]
    assert made.open(tmp_path, maker=False).get(0) is not None


def test_fingerprints_are_those_of_the_images(mixed: list[str], tmp_path: Path) -> None:
    cache = plan(mixed, tmp_path, True).open(tmp_path)
    data, plain = ViewDataset(mixed, views(), 0, cache), ViewDataset(mixed, views(), 0)
    for index in range(len(mixed)):
        first, again, other = data[0, index], data[0, index], plain[0, index]
        assert first.fingerprint is not None
        assert again.fingerprint is not None
        assert other.fingerprint is not None
        np.testing.assert_array_equal(first.fingerprint, again.fingerprint)
        np.testing.assert_array_equal(first.fingerprint[:16], other.fingerprint[:16])
        looks = [f.fingerprint[16:].view(np.int8).astype(float) for f in (first, other)]
        assert looks[0] @ looks[1] > 0.98 * np.linalg.norm(looks[0]) * np.linalg.norm(looks[1])


def test_views_that_begin_without_a_crop_take_images_that_are_kept(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.png")]
    cache = plan(paths, tmp_path, False).open(tmp_path)
    data = ViewDataset(paths, Views([[flip()], []], SHORTEST), 0, cache)
    first, again = data[0, 0], data[0, 0]
    assert np.array_equal(first.views[0], again.views[0])
    assert first.views[1].shape == (24, 29, 3)
