"""Slices, pages and frames in shards, and what ``pretrain`` finds out about them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vissl_lite
from tests.data.formats.making import nifti, noise, npy, tiff
from vissl_lite.commands.pretrain_data import TrainingImages, find_training_images
from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.data.image_reader import PHOTOGRAPHS
from vissl_lite.data.image_survey import ImageSet
from vissl_lite.data.reading import pixel_limit, slice_axis
from vissl_lite.data.shards.index import find_shards
from vissl_lite.data.shards.stream import read_images
from vissl_lite.errors import UserError


@pytest.fixture(autouse=True)
def own_axis() -> Iterator[None]:
    with pixel_limit():
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def sharded(source: Path, name: str = "shards", **options: int) -> str:
    out = source.parent / name
    vissl_lite.shard(data=str(source), out=str(out), **{"images_per_shard": 4} | options)
    return str(out)


def options_for(shards: str, axis: int | None = None) -> PretrainOptions:
    return PretrainOptions(data=shards, out=f"{shards}.run", axis=axis)


def found(options: PretrainOptions, resume: bool = False) -> TrainingImages:
    return find_training_images(options, Path(options.out), resume)


def test_frames_are_looked_at_beside_other_images(source: Path) -> None:
    """Also in a run that is resumed, which has the sample in its folder."""
    (source / "photo.tif").write_bytes(tiff(noise(9, 8)))
    (source / "scan.nii").write_bytes(nifti(noise(9, 8, 5)))
    options = options_for(sharded(source))
    images = found(options)
    names = [Path(path).name for path in images.paths]
    assert sorted(Path(name).suffix for name in names) == [*[".npz"] * 5, ".tif"]
    Path(options.out).mkdir()
    images.keep_sample(Path(options.out))
    for one in (images, found(options, resume=True)):
        assert [Path(path).name for path in one.paths] == names
        assert all(path.startswith(options.out) for path in one.paths)


def test_pretrain_knows_the_axis_of_the_slices(source: Path) -> None:
    (source / "scan.nii").write_bytes(nifti(noise(9, 8, 5)))
    shards = sharded(source, axis=1)
    assert json.loads(Path(shards, "index.json").read_text())["axis"] == 1
    for axis in (None, 1):
        options = options_for(shards, axis)
        images = found(options)
        assert len(images) == 8
        assert slice_axis() == 1
        assert ImageSet(images.paths, options).reader.axis == 1
    with pytest.raises(UserError, match=r"--axis 0: the shards hold slices .* along axis 1"):
        found(options_for(shards, 0))
    other = sharded(source, "other")
    with pytest.raises(UserError, match=r"--axis 1: .* along its own axis: .* shard --axis 1"):
        found(options_for(other, 1))
    with pytest.raises(UserError, match=r"slices along different axes \(.*: 1, .*: none\)"):
        find_shards([shards, other])


def test_volumes_on_scales_of_their_own_are_refused(source: Path) -> None:
    for number in range(4):
        values = noise(5, 20, 24, 1, dtype=np.float32) * 10.0**number
        (source / f"{number}.npy").write_bytes(npy(values.astype(np.float32)))
    shards = sharded(source)
    with pytest.raises(UserError, match="volumes are on scales of their own, and shards hold"):
        vissl_lite.pretrain(data=shards, out=f"{shards}.run", backbone="test_resnet", epochs=1)
    together = PretrainOptions(data=shards, out=f"{shards}.run", value_range="percentile")
    assert ImageSet(found(together).paths, together).reader.scope == "dataset"


def test_empty_slices_in_shards_make_no_scales_of_their_own(source: Path) -> None:
    """A volume is judged by all of its slices in the sample, and not by one or two."""
    for number in range(12):
        values = noise(8, 20, 24, 1)
        values[:3] = values[-3:] = 0
        (source / f"{number}.npy").write_bytes(npy(values if number < 4 else values[:2]))
    options = options_for(sharded(source, images_per_shard=30))
    assert ImageSet(found(options).paths, options).reader.scope == "dataset"


def test_pages_of_eight_bits_stay_photographs(source: Path) -> None:
    pages = [Image.fromarray(noise(9, 8, 3, dtype=np.uint8, high=256) // n) for n in (1, 2, 3)]
    pages[0].save(source / "pages.tif", save_all=True, append_images=pages[1:])
    folder = sharded(source)
    options = options_for(folder)
    assert ImageSet(found(options).paths, options).reader is PHOTOGRAPHS
    shards = find_shards([folder])
    assert shards is not None
    for one in read_images(shards, np.arange(3)):
        number = int(one.name.partition("#")[2][0])
        image = PHOTOGRAPHS.decode_reduced(one.data, one.name, lambda height, width: 1)[0]
        np.testing.assert_array_equal(image, np.asarray(pages[number]))
