"""Encoder and model folders that are damaged, or that a stranger made to do harm."""

import json
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tampering import Tried, changed, damaged

from vissl_lite.cli import main
from vissl_lite.commands.export import export
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import load_encoder, read_weights, save_encoder, save_model
from vissl_lite.errors import UserError
from vissl_lite.transfer.classification.model import load_classifier
from vissl_lite.transfer.detection.model import Detector, detect, load_detector, save_detector
from vissl_lite.transfer.segmentation.model import Segmenter, load_segmenter, save_segmenter

CLASSES = ["cat", "dog"]
KINDS = ("encoder", "vit", "classifier", "fcos", "faster_rcnn", "segmenter")


def make(kind: str, folder: Path) -> Path:
    """A folder of a kind, its weights random."""
    torch.manual_seed(0)
    encoder = build_encoder("test_vit" if kind == "vit" else "test_resnet", 32)
    if kind in ("encoder", "vit"):
        save_encoder(encoder, folder, {"pretext": {"name": "simclr"}})
    elif kind == "classifier":
        encoder.model.reset_classifier(len(CLASSES))
        save_model(encoder, folder, {"multi_label": False}, CLASSES)
    elif kind == "segmenter":
        save_segmenter(Segmenter(encoder, CLASSES, 16), folder, {})
    else:
        detector = Detector(encoder, CLASSES, kind, (32, 32))  # type: ignore[arg-type]
        save_detector(detector, folder, {})
    return folder


def use(kind: str, folder: Path) -> None:
    """Load a folder and look at an image with it; what comes out is finite."""
    image = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    with torch.no_grad():
        if kind in ("encoder", "vit"):
            encoder = load_encoder(folder).eval()
            image = image.new_full((1, 3, encoder.image_size, encoder.image_size), 100)
            found = [encoder(encoder.normalize(image))]
        elif kind == "classifier":
            loaded = load_classifier(folder)
            image = image.new_full(
                (1, 3, loaded.encoder.image_size, loaded.encoder.image_size), 100
            )
            found = [loaded.eval()(loaded.encoder.normalize(image))]
        elif kind == "segmenter":
            segmenter = load_segmenter(folder)
            encoder = segmenter.eval().encoder
            found = [segmenter(encoder.normalize(image))]
        else:
            detector = load_detector(folder)
            encoder = detector.eval().encoder
            image = image.new_full((1, 3, *detector.canvas), 100)
            found = list(detector(encoder.normalize(image))[0].values())
    if not all(one.isfinite().all() for one in found):
        raise UserError("the outputs are not finite")  # as the commands say


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    return make(kind, tmp_path / "model")


@pytest.mark.slow
def test_what_a_json_file_says_is_refused_or_works(kind: str, folder: Path) -> None:
    tried = Tried(lambda: use(kind, folder))
    for name in ("config.json", "head.json"):
        if (folder / name).exists():
            tried.sweep_json(folder / name, stride=37 if name == "config.json" else 13)
    assert tried.counts["refused"] > 25, tried.counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "classifier", "fcos", "segmenter"], indirect=True)
def test_bytes_of_weights_are_refused_or_work(kind: str, folder: Path) -> None:
    tried = Tried(lambda: use(kind, folder))
    for name in ("model.safetensors", "head.safetensors"):
        if (folder / name).exists():
            tried.sweep_bytes(folder / name, flips=6)
    assert tried.counts["refused"] >= 12, tried.counts


BAD_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan": lambda t: t.clone().fill_(math.nan),
    "one nan": lambda t: t.clone().index_put_((torch.tensor(0),) * t.ndim, torch.tensor(math.nan)),
    "inf": lambda t: t.clone().fill_(math.inf),
    "float64": lambda t: t.double().fill_(1e300),
    "shape": lambda t: t[None],
    "empty": lambda t: t[:0],
    "whole numbers": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn).fill_(math.nan),
    "bool": lambda t: t.bool(),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "classifier", "fcos", "segmenter"], indirect=True)
def test_tensors_of_another_kind_are_refused(kind: str, folder: Path) -> None:
    """The last weight, or a running statistic."""
    file = next(
        f for f in (folder / "head.safetensors", folder / "model.safetensors") if f.exists()
    )
    whole = load_file(file)
    floats = [name for name, one in whole.items() if one.is_floating_point() and one.ndim]
    last = next((name for name in floats if "running" in name), floats[-1])
    tried = Tried(lambda: use(kind, folder))
    for number, (damage, change) in enumerate(BAD_TENSORS.items()):
        name = (floats[-1], last)[number % 2]
        save_file({**whole, name: change(whole[name]).contiguous()}, file)
        assert not tried(f"{name} {damage}")
    save_file({k: v for k, v in whole.items() if k != floats[0]}, file)
    assert not tried("one missing")
    save_file({**whole, "more": torch.zeros(1)}, file)
    assert not tried("one more")


@pytest.mark.slow
def test_a_negative_variance_is_refused(tmp_path: Path) -> None:
    folder = make("encoder", tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("running_var"))
    save_file({**weights, name: -weights[name]}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"variance .* is negative"):
        load_encoder(folder)


# What a stranger's folder must not reach


watched: list[str] | None = None


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if watched is not None and (
        event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "urllib.", "shutil."))
        or event in ("pickle.find_class", "os.remove", "os.mkdir")
    ):
        watched.append(f"{event} {arguments!r:.200}")
    elif watched is not None and event == "open" and isinstance(arguments[0], str | Path):
        watched.append(f"open {arguments[0]}")


sys.addaudithook(hook)


@pytest.fixture
def events() -> Iterator[list[str]]:
    """What is opened, connected to and run; nothing is imported for the first time meanwhile."""
    global watched
    watched = []
    yield watched
    watched = None


def reaching(trap: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Names of what would be reached, ``pretrained_cfg`` and ``model_args`` that reach it."""
    url, file = "https://127.0.0.1:9/w.safetensors", str(trap)
    cfgs: list[dict[str, Any]] = [
        {"url": url}, {"file": file}, {"hf_hub_id": "timm/resnet18.a1_in1k", "source": "hf-hub"},
        {"hf_hub_id": "x/y", "hf_hub_filename": "w.bin"}, {"url": url, "custom_load": True},
        {"file": file, "custom_load": True}, {"state_dict": {"a": 1}}, {"source": "local-dir"},
        {"file": file, "source": "local-dir"},
    ]  # fmt: skip
    args: list[dict[str, Any]] = [
        {}, {"pretrained": True}, {"checkpoint_path": file}, {"cache_dir": file},
        {"pretrained": True, "pretrained_cfg": {"url": url}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": file}},
        {"pretrained_strict": False}, {"features_only": True, "out_indices": [1]},
        {"pruned": True}, {"scriptable": True}, {"exportable": True}, {"no_jit": True},
        {"model_cfg": {}}, {"feature_cfg": {}}, {"kwargs_filter": ["x"]}, {"block": "os.system"},
        {"norm_layer": "x"}, {"act_layer": "relu"}, {"device": "cuda"}, {"dtype": "float16"},
        {"pretrained_model_args": {"a": 1}},
    ]  # fmt: skip
    each = [(one, {}) for one in cfgs] + [(cfgs[i % 9], one) for i, one in enumerate(args[1:])]
    return [(f"{cfg} {arguments}", cfg, arguments) for cfg, arguments in each]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_no_place_that_a_config_names_is_reached(
    kind: str, tmp_path: Path, events: list[str]
) -> None:
    folder = make(kind, tmp_path / "model")
    trap = tmp_path / "trap.pth"
    trap.write_bytes(pickle.dumps({"a": 1}))
    use(kind, folder)  # what is imported is imported now
    whole = json.loads((folder / "config.json").read_text())
    tried = Tried(lambda: use(kind, folder))
    inside = (str(folder), sys.prefix, sys.base_prefix)
    for what, cfg, args in reaching(trap):
        content = {**whole, "pretrained_cfg": whole["pretrained_cfg"] | cfg, "model_args": args}
        content |= {"url": "https://127.0.0.1:9", "checkpoint_path": str(trap), "_target_": "os.x"}
        (folder / "config.json").write_text(json.dumps(content))
        events.clear()
        assert tried(what) == (args == {}), what
        reached = [
            one
            for one in events
            if not one.startswith("open ") or not one.removeprefix("open ").startswith(inside)
        ]
        assert not reached, (what, reached)
    # of each config one that reaches for nothing more, with each way of reaching once
    assert tried.counts == {"loaded": 9, "refused": 20}


def test_the_hook_sees_what_is_opened_and_connected_to(tmp_path: Path, events: list[str]) -> None:
    import socket

    (tmp_path / "x").write_text("x")
    with socket.socket() as one, pytest.raises(OSError, match="refused"):
        one.connect(("127.0.0.1", 9))
    assert any("x" in one for one in events if one.startswith("open"))
    assert any(one.startswith("socket.connect") for one in events)


@pytest.mark.slow
def test_sizes_that_the_weights_do_not_have_take_no_memory(tmp_path: Path) -> None:
    folder = make("vit", tmp_path / "encoder")
    whole = (folder / "config.json").read_text()
    tried = Tried(lambda: load_encoder(folder))  # what it asserts is the test
    model, size = ("model_args",), ("pretrained_cfg", "input_size")
    for place, value in (
        (model, {"img_size": 10**6}), (model, {"img_size": 4096}), (model, {"embed_dim": 10**9}),
        (model, {"embed_dim": 2**20}), (model, {"depth": 10**6}), (model, {"patch_size": 1}),
        (model, {"num_heads": 2**20}), (model, {"mlp_ratio": 1000.0}),
        (model, {"reg_tokens": 2**20}), (("num_classes",), 2**20),
        (("architecture",), "vit_giant_patch14_dinov2"), (size, [3, 10**6, 10**6]),
        (size, [3, 4096, 4096]), (size, [2**20, 32, 32]),
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(changed(json.loads(whole), place, value)))
        tried(f"{place} {value}")
    assert tried.counts["refused"] >= 10, tried.counts


@pytest.mark.slow
def test_headers_of_safetensors_promise_in_vain(tmp_path: Path) -> None:
    folder = make("encoder", tmp_path / "encoder")
    tried = Tried(lambda: load_encoder(folder))
    for shape in ([10**6, 10**6], [0, 10**9], [2**62], [-1], [], ["a"], [10**30]):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
        header = json.dumps({"a": entry}).encode()
        content = len(header).to_bytes(8, "little") + header + bytes(4)
        (folder / "model.safetensors").write_bytes(content)
        assert not tried(str(shape))
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + header)
    assert not tried("a header of 2**62 bytes")


@pytest.mark.slow
def test_weights_for_init_are_refused_or_read(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save({"state_dict": build_encoder("test_resnet", 32).state_dict(), "epoch": 3}, file)
    tried = Tried(lambda: read_weights(file))
    for what, content in damaged(file.read_bytes(), flips=30):
        file.write_bytes(content)
        tried(what)
    assert tried.counts["refused"] > 10


@pytest.mark.slow
def test_a_torch_file_that_would_grow_is_refused(tmp_path: Path) -> None:
    import zipfile

    torch.save({"a": torch.zeros(2**22)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as whole,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    with pytest.raises(UserError, match="it is compressed"):
        read_weights(tmp_path / "small.pth")


# Through the command line, one of each kind


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "data" / f"{number}.png")
    return tmp_path / "data"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(one) for one in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    if lines[0].startswith("what was predicted up to here is in "):
        del lines[0]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "fcos", "segmenter"])
def test_a_head_of_nan_is_refused_by_predict_and_export(
    kind: str, folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / ("model.safetensors" if kind == "classifier" else "head.safetensors")
    weights = load_file(file)
    save_file({k: v * math.nan if v.is_floating_point() else v for k, v in weights.items()}, file)
    for command in (
        ("predict", "--model", folder, "--data", pictures, "--out", tmp_path / "run"),
        ("export", "--model", folder, "--out", tmp_path / "m.onnx"),
    ):
        assert "are not finite numbers" in refused(capsys, *command)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.slow
def test_statistics_that_can_not_be_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 is the mean of some of timm's models."""
    folder = make("encoder", tmp_path / "encoder")
    whole = json.loads((folder / "config.json").read_text())
    command = ("embed", "--encoder", folder, "--data", pictures, "--out", tmp_path / "f.npz")
    bad = (-1, 1e30, math.nan, math.inf, "x", None, True)
    tries = [("mean", one) for one in bad] + [("std", one) for one in (0, 1e-30, *bad)]
    for key, value in tries:
        config = changed(whole, ("pretrained_cfg", key), [0.5, value, 0.5])
        (folder / "config.json").write_text(json.dumps(config))
        assert f"is damaged: {key} is not a number" in refused(capsys, *command), value
        assert not (tmp_path / "f.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "classifier", "faster_rcnn", "segmenter"])
def test_sums_that_overflow_are_refused(
    kind: str, folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite weights, but what goes through them is not."""
    for file in folder.rglob("*.safetensors"):
        weights = load_file(file)
        many = {k: v.fill_(3e38) for k, v in weights.items() if k.endswith("weight")}
        save_file({**weights, **many}, file)
    if kind == "encoder":
        command: tuple[object, ...] = ("embed", "--encoder", folder, "--out", tmp_path / "f.npz")
    else:
        command = ("predict", "--model", folder, "--out", tmp_path / "run")
    assert "are not finite numbers" in refused(capsys, *command, "--data", pictures)


@pytest.mark.slow
def test_detections_are_not_dropped_in_silence(tmp_path: Path, pictures: Path) -> None:
    detector = load_detector(make("fcos", tmp_path / "model"))
    detector.net.head.classification_head.cls_logits.bias.data.fill_(math.nan)
    with pytest.raises(UserError, match="are not finite numbers"):
        detect(detector, [str(file) for file in sorted(pictures.iterdir())])


@pytest.mark.slow
def test_a_timm_folder_is_exported_without_what_a_stranger_wrote_into_it(tmp_path: Path) -> None:
    folder = make("encoder", tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["url"] = "https://127.0.0.1:9/w"
    config["more"] = "x"
    (folder / "config.json").write_text(json.dumps(config))
    export(out=str(tmp_path / "out"), encoder=str(folder), format="safetensors")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "url" not in written["pretrained_cfg"]
    assert "more" not in written
    assert written["vissl_lite"] == config["vissl_lite"]
