from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import blobs
from vissl_lite.commands import embed as embed_module
from vissl_lite.commands.embed import embed
from vissl_lite.data.image_survey import NO_SETTINGS
from vissl_lite.data.images import find_images
from vissl_lite.encoders.folder import load_encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.features import extract


@pytest.mark.slow
def test_both_formats_hold_the_features_of_the_encoder(
    encoder: Path, photos: Path, tmp_path: Path
) -> None:
    paths = find_images([photos])
    expected = extract(load_encoder(encoder), paths)[0]["last"]
    result = embed(encoder=str(encoder), data=str(photos), out=str(tmp_path / "new" / "e.npz"))
    assert (result.images, result.num_features) == expected.shape
    with np.load(result.path, allow_pickle=False) as read:
        assert read["paths"].tolist() == paths
        assert np.array_equal(read["features"], expected)
        assert read["features"].dtype == np.float32
    embed(encoder=str(encoder), data=[str(photos)], out=str(tmp_path / "e.parquet"))
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.column("path").to_pylist() == paths
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    assert np.array_equal(np.stack(table.column("embedding").to_numpy()), expected)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["e.parquet", "new"]


@pytest.mark.slow
def test_a_stage_by_its_name(encoder: Path, photos: Path, tmp_path: Path) -> None:
    expected = extract(load_encoder(encoder), find_images([photos]), layers=True)[0]["layer2"]
    # the format decides, whatever the name
    embed(
        encoder=str(encoder),
        data=str(photos),
        out=str(tmp_path / "e.bin"),
        format="npz",
        layer="layer2",
    )
    with np.load(tmp_path / "e.bin") as read:
        assert np.array_equal(read["features"], expected)
    with pytest.raises(UserError, match=r"no layer layr2: did you mean layer"):
        embed(encoder=str(encoder), data=str(photos), out=str(tmp_path / "x.npz"), layer="layr2")
    assert not (tmp_path / "x.npz").exists()


def test_the_size_of_the_images_fits_the_patches_of_an_untrained_encoder(photos: Path) -> None:
    source, paths = "random:vit_small_patch14_dinov2", find_images([photos])
    assert embed_module.encoder_for_images(source, None, paths, NO_SETTINGS).image_size == 28


def test_broken_images_are_left_out_and_named(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        blobs(index).save(folder / f"{index}.png")
    (folder / "1.png").write_bytes(b"no picture")
    embed(encoder=str(encoder), data=str(folder), out=str(tmp_path / "e.npz"))
    with np.load(tmp_path / "e.npz") as read:
        assert [Path(path).name for path in read["paths"]] == ["0.png", "2.png"]
        assert read["features"].shape[0] == 2
    assert f"skipped, can't be read: {folder / '1.png'}" in capsys.readouterr().err
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of 3 images can be read"):
        embed(encoder=str(encoder), data=str(folder), out=str(tmp_path / "none.npz"))
    assert not (tmp_path / "none.npz").exists()


def test_names_that_are_not_utf8(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    blobs(0).save(folder / "ok.png")
    blobs(1).save(str(folder / "caf\udce9.png"))
    with pytest.raises(UserError, match=r"caf\\udce9\.png, which is not UTF-8"):
        embed(encoder=str(encoder), data=str(folder), out=str(tmp_path / "e.parquet"))
    embed(encoder=str(encoder), data=str(folder), out=str(tmp_path / "e.npz"))
    with np.load(tmp_path / "e.npz") as read:
        assert all(Path(path).is_file() for path in read["paths"].tolist())


def test_places_that_can_not_be_written(encoder: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.npz"
    file.write_bytes(b"precious")
    for out, words in (
        (file, "exists: give a new file, or --overwrite"),
        (tmp_path, "ends in neither"),
        (tmp_path / "e.csv", "ends in neither .parquet nor .npz"),
        (file / "e.npz", f"{file} is a file"),
    ):
        with pytest.raises(UserError, match=words):
            embed(encoder=str(encoder), data=str(photos), out=str(out))
    with pytest.raises(UserError, match="is a folder"):
        embed(encoder=str(encoder), data=str(photos), out=str(tmp_path), format="npz")
    assert file.read_bytes() == b"precious"
    embed(encoder=str(encoder), data=str(photos), out=str(file), overwrite=True)
    assert file.read_bytes() != b"precious"


def test_an_old_file_stays_whole_when_writing_fails(
    encoder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, *_: object) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(embed_module, "_write_npz", full)
    (tmp_path / "e.npz").write_bytes(b"old")
    with pytest.raises(OSError, match="no space"):
        embed(encoder=str(encoder), data=str(photos), out=str(tmp_path / "e.npz"), overwrite=True)
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"old"]


def test_parquet_needs_its_extra(
    encoder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vissl-lite\[parquet\]'"):
        embed(encoder=str(encoder), data=str(photos), out=str(tmp_path / "e.parquet"))
