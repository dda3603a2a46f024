import copy
import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vissl_lite.encoders import encoder as module
from vissl_lite.encoders.encoder import Encoder, build_encoder, patch_multiple
from vissl_lite.encoders.folder import (
    fitting_size,
    load_encoder,
    load_model,
    load_weights,
    made_here,
    read_weights,
    save_encoder,
    save_model,
)
from vissl_lite.errors import UserError

CNN, VIT, CIFAR = "test_resnet", "test_vit", "resnet18_cifar"
every_backbone = pytest.mark.parametrize("backbone", [CNN, VIT])


def made(backbone: str = CNN, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    encoder = build_encoder(backbone, 32)
    for name, buffer in encoder.named_buffers():  # as after training: not at their defaults
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    return encoder.eval()


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def same_weights(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_encoder(made(), tmp_path / "encoder", {"pretext": {"name": "simclr"}})
    return tmp_path / "encoder"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


# The module


@every_backbone
def test_names_of_weights_are_timms_own(backbone: str) -> None:
    own = timm.create_model(backbone, num_classes=0, **made(backbone).model_args)
    encoder = made(backbone)
    assert list(encoder.model.state_dict()) == list(own.state_dict())
    assert list(encoder.state_dict()) == [f"model.{name}" for name in own.state_dict()]


@every_backbone
def test_features_are_pooled_vectors(backbone: str) -> None:
    encoder = made(backbone)
    features = encoder(images())
    assert features.shape == (2, encoder.num_features)
    assert torch.equal(features, encoder.model(images()))
    assert encoder.backbone == backbone


@every_backbone
def test_train_and_eval_reach_the_model_and_all_in_it(backbone: str) -> None:
    encoder = made(backbone)
    for mode in (True, False):
        assert encoder.train(mode) is encoder
        assert all(m.training is mode for m in (encoder, *encoder.model.modules()))
    assert encoder.train().eval().model.training is False


@every_backbone
def test_a_copy_is_independent_and_whole(backbone: str) -> None:
    encoder = made(backbone)
    before = encoder(images())
    twin = copy.deepcopy(encoder)
    assert torch.equal(twin(images()), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    twin.train()
    assert torch.equal(encoder(images()), before)
    assert not encoder.model.training
    assert not torch.equal(twin.eval()(images()), before)


@every_backbone
def test_another_dtype_reaches_the_model(backbone: str) -> None:
    encoder = made(backbone)
    expected = encoder(images())
    doubled = encoder.double()(images().double())
    assert doubled.dtype == torch.float64
    torch.testing.assert_close(doubled.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backbone", [CNN, VIT, CIFAR])
def test_stages_go_from_fine_to_coarse(backbone: str) -> None:
    encoder = made(backbone)
    maps = encoder.stages(images())
    assert len(maps) == len(encoder.stage_names()) == len(set(encoder.stage_names()))
    assert len(maps) >= 4
    sides = [stage.shape[-1] for stage in maps]
    assert all(stage.ndim == 4 and len(stage) == 2 for stage in maps)
    assert [stage.shape[-2] for stage in maps] == sides == sorted(sides, reverse=True)
    if backbone != VIT:
        assert sides[0] > sides[-1]


@pytest.mark.parametrize("backbone", [CNN, VIT])
def test_stages_are_the_outputs_of_the_modules_they_are_named_after(backbone: str) -> None:
    encoder = made(backbone)
    seen: dict[str, Tensor] = {}
    for name in encoder.stage_names():
        hook = lambda _, __, output, name=name: seen.update({name: output.detach()})  # noqa: E731
        encoder.model.get_submodule(name).register_forward_hook(hook)
    maps = encoder.stages(images())
    assert list(seen) == encoder.stage_names()
    for output, stage in zip(seen.values(), maps, strict=True):
        if output.ndim == 4:
            assert torch.equal(output, stage)
        else:  # tokens; a ViT's are normalized, which keeps their count
            prefix = encoder.model.num_prefix_tokens
            assert output.shape[1] - prefix == stage.shape[2] * stage.shape[3]
            assert output.shape[2] == stage.shape[1]


def test_a_vit_takes_images_of_another_size() -> None:
    encoder = made(VIT)
    assert encoder(images(size=64)).shape == (2, encoder.num_features)


# Normalization


def test_normalize_is_the_plain_formula_and_denormalize_undoes_it() -> None:
    encoder = made()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    raw = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    raw = raw.contiguous(memory_format=torch.channels_last)
    out = encoder.normalize(raw)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), (raw.double() / 255 - mean) / std, rtol=0, atol=1e-5)
    assert torch.equal(encoder.denormalize(out), raw)


def test_what_is_not_a_number_is_black() -> None:
    encoder = made()
    assert not encoder.denormalize(torch.full((1, 3, 2, 2), torch.nan)).any()


# Building


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "unknown backbone resnet81: did you mean .*resnet18"),
        ("tset_vit", "did you mean test_vit"),
        ("qqqqqqqqqq", "none of the .* known names is close"),
    ],
)
def test_an_unknown_backbone_is_a_mistake(name: str, message: str) -> None:
    for make in (build_encoder, lambda n: load_encoder(f"random:{n}")):
        with pytest.raises(UserError, match=message):
            make(name)


@pytest.mark.parametrize("size", [8, 40])
def test_a_size_that_does_not_suit_the_backbone_is_a_mistake(size: int) -> None:
    with pytest.raises(UserError, match=f"test_vit can't be built for {size} pixels"):
        build_encoder(VIT, size)  # its patches have 16 pixels


def test_pretrained_weights_without_network_are_a_mistake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants as hub

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(module, "_online", lambda: False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    was_offline = hub.HF_HUB_OFFLINE
    with pytest.raises(
        UserError,
        match=r"pre-trained weights of test_resnet.*can't be downloaded.*put config.json and "
        r"model.safetensors of https://huggingface.co/timm/test_resnet.r160_in1k into a folder",
    ):
        load_encoder("timm:test_resnet.r160_in1k")
    assert was_offline == hub.HF_HUB_OFFLINE


def test_files_of_the_hub_are_an_encoder_folder(tmp_path: Path) -> None:
    plain = timm.create_model("test_resnet").eval()  # with the classifier of ImageNet
    timm.models.save_for_hf(plain, tmp_path, safe_serialization=True)
    encoder = load_encoder(tmp_path).eval()
    expected = plain.forward_head(plain.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(encoder(images()), expected)


def test_a_vit_of_the_hub_takes_images_of_other_sizes(tmp_path: Path) -> None:
    """timm's DINOv2 is strict about its 518 pixels unless it is asked not to be."""
    arguments = {"img_size": 56, "embed_dim": 32, "depth": 1, "num_heads": 2}
    plain = timm.create_model("vit_small_patch14_reg4_dinov2", **arguments).eval()
    timm.models.save_for_hf(plain, tmp_path, model_args=arguments, safe_serialization=True)
    encoder = load_encoder(tmp_path).eval()
    assert not made_here(tmp_path)
    torch.testing.assert_close(encoder(images(size=56)), plain(images(size=56)))
    encoder.use_image_size(84)
    assert encoder(images(size=84)).shape == (2, 32)
    with pytest.raises(UserError, match=r"can't be built for 64 pixels: .*; 70 pixels fit"):
        encoder.use_image_size(64)


def test_a_swin_of_the_hub_takes_images_of_other_sizes(tmp_path: Path) -> None:
    arguments = {"img_size": 56, "embed_dim": 24}
    plain = timm.create_model("swin_tiny_patch4_window7_224", **arguments).eval()
    timm.models.save_for_hf(plain, tmp_path, model_args=arguments, safe_serialization=True)
    encoder = load_encoder(tmp_path).eval()
    expected = plain.forward_head(plain.forward_features(images(size=56)), pre_logits=True)
    torch.testing.assert_close(encoder(images(size=56)), expected)
    encoder.use_image_size(96)
    assert encoder(images(size=96)).shape == (2, 192)


def test_position_embeddings_in_a_file_are_resampled(tmp_path: Path) -> None:
    plain = timm.create_model("test_vit", num_classes=0)  # of 160 pixels
    torch.save(plain.state_dict(), tmp_path / "vit.pt")
    encoder = build_encoder("test_vit", 64)
    load_weights(encoder, tmp_path / "vit.pt")
    own, given = dict(encoder.model.named_parameters()), dict(plain.named_parameters())
    assert own["pos_embed"].shape[1] < given["pos_embed"].shape[1]
    others = [name for name in own if name != "pos_embed"]
    assert all(torch.equal(own[name], given[name]) for name in others)
    # neighbors stay similar, opposite corners as different as before
    patches = own["pos_embed"][0, -16:].unflatten(0, (4, 4))
    before = given["pos_embed"][0, -100:].unflatten(0, (10, 10))
    assert torch.cosine_similarity(patches[0, 0], before[0:2, 0:2].mean(dim=(0, 1)), dim=0) > 0.5


@pytest.mark.parametrize(
    ("backbone", "size", "fits"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", 96, 98),
        (VIT, 100, 96),
        (CNN, 100, 100),
        ("xcit_nano_12_p16_224", 100, 96),
        ("pvt_v2_b0", 100, 100),  # its patches overlap
    ],
)
def test_sizes_are_rounded_to_patches(backbone: str, size: int, fits: int) -> None:
    assert patch_multiple(backbone, size) == fits


@pytest.mark.parametrize(
    ("source", "size", "fits"),
    [
        ("random:vit_small_patch14_dinov2", 416, 420),
        ("timm:vit_small_patch14_dinov2.lvd142m", 96, 98),
        ("random:test_resnet", 416, 416),
        ("random:vit_small_patch14_dinov2", None, None),
        ("nowhere", 416, 416),  # which is refused where it is loaded
    ],
)
def test_sizes_chosen_for_images_fit_the_patches_of_any_source(
    source: str, size: int | None, fits: int | None
) -> None:
    assert fitting_size(source, size) == fits


def test_sizes_chosen_for_images_fit_the_patches_of_a_folder(tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=28, depth=1)
    save_encoder(Encoder(model, {"img_size": 28, "depth": 1}, 28), tmp_path / "encoder", {})
    assert fitting_size(str(tmp_path), 64) == 70
    assert fitting_size(str(tmp_path / "encoder"), 64) == 70


def test_weights_that_are_not_on_the_hub_name_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(module, "_online", lambda: False)
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"put https://github.com/\S+\.pth into \S+/checkpoints"):
        load_encoder("timm:gcvit_xxtiny.in1k")


def test_a_backbone_without_pretrained_weights_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_online", lambda: False)
    with pytest.raises(UserError, match="timm has no pre-trained weights for resnet18_cifar"):
        load_encoder(f"timm:{CIFAR}")


def test_a_random_encoder_follows_torchs_seed() -> None:
    encoders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        encoders.append(load_encoder(f"random:{CNN}", 48))
    assert encoders[0].image_size == 48
    assert same_weights(encoders[0], encoders[1])
    assert not same_weights(encoders[0], encoders[2])


# Folders


@pytest.mark.parametrize("backbone", [CNN, VIT, CIFAR])
def test_timm_loads_the_folder_with_the_same_outputs(backbone: str, tmp_path: Path) -> None:
    encoder = made(backbone)
    save_encoder(encoder, tmp_path / "e", {})
    assert made_here(tmp_path / "e")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True).eval()
    assert torch.equal(loaded(images()), encoder(images()))
    assert same_weights(loaded, encoder.model)
    assert loaded.pretrained_cfg["input_size"][-1] == 32


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [CNN, VIT, CIFAR])
def test_a_folder_and_the_run_around_it_load_as_the_same_encoder(
    backbone: str, tmp_path: Path
) -> None:
    encoder = made(backbone)
    save_encoder(encoder, tmp_path / "run" / "encoder", {})
    for source in (tmp_path / "run", str(tmp_path / "run" / "encoder")):
        loaded = load_encoder(source).eval()
        assert torch.equal(loaded(images()), encoder(images()))
        assert (loaded.image_size, loaded.backbone) == (32, backbone)
        assert (loaded.mean, loaded.std) == (encoder.mean, encoder.std)
        assert loaded.num_features == encoder.num_features


def test_a_loaded_encoder_can_be_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    save_encoder(load_encoder(folder), tmp_path / "again", {})
    assert torch.equal(load_encoder(tmp_path / "again").eval()(images()), made()(images()))
    ours, theirs = config_of(tmp_path / "again"), config_of(folder)
    assert {**ours, "vissl_lite": 0} == {**theirs, "vissl_lite": 0}


def test_the_config_says_how_images_go_in_and_how_it_was_trained(folder: Path) -> None:
    config = config_of(folder)
    assert config["architecture"] == CNN
    assert config["num_classes"] == 0
    assert config["pretrained_cfg"]["mean"] == list(made().mean)
    assert config["pretrained_cfg"]["std"] == list(made().std)
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["vissl_lite"] == {"pretext": {"name": "simclr"}}


def test_the_folder_holds_no_leftovers(folder: Path) -> None:
    save_encoder(made(seed=1), folder, {})
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert same_weights(load_encoder(folder), made(seed=1))


@pytest.mark.slow
@every_backbone
def test_a_classifiers_folder_gives_its_encoder(backbone: str, tmp_path: Path) -> None:
    encoder = made(backbone)
    expected = encoder(images())
    classifier = copy.deepcopy(encoder)
    model = classifier.model
    model.reset_classifier(5)
    save_model(classifier, tmp_path / "m", {}, list("abcde"))
    assert torch.equal(load_encoder(tmp_path / "m").eval()(images()), expected)
    whole, config = load_model(tmp_path / "m")
    assert torch.equal(whole.model.eval()(images()), model.eval()(images()))
    assert config["label_names"] == list("abcde")


def test_nothing_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no encoder at .*give a run, an encoder folder, timm:NAME"
    ):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no encoder: neither config\.json"):
        load_encoder(tmp_path)


def test_a_run_of_finetune_is_refused_with_its_model_folder(tmp_path: Path) -> None:
    save_encoder(build_encoder("test_resnet", 32), tmp_path / "model" / "encoder", {})
    with pytest.raises(UserError, match=rf"a fine-tuned model: give {tmp_path / 'model'} to use"):
        load_encoder(tmp_path)
    load_encoder(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"architecture": "test_resnet"}', "\x00\x01", '"text"']
)
def test_a_damaged_config_is_a_mistake(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is (damaged|not JSON)"):
        load_encoder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrained_cfg": {"mean": 3, "std": [1, 1, 1], "input_size": [3, 32, 32]}},
        {"pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "input_size": []}},
        {"pretrained_cfg": None},
        {"model_args": {"no_such_argument": 1}},
        {"model_args": 3},
        {"architecture": 7},
        {"architecture": "no_such_model"},
    ],
)
def test_a_config_of_senseless_values_is_a_mistake(changes: dict[str, Any], folder: Path) -> None:
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=r"config\.json"):
        load_encoder(folder)


def test_a_folder_without_weights_is_a_mistake(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        load_encoder(folder)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_weights_that_are_cut_short_are_a_mistake(kept: float, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(UserError, match=r"model\.safetensors can't be loaded"):
        load_encoder(folder)


@pytest.mark.slow
def test_weights_of_another_architecture_are_a_mistake(folder: Path) -> None:
    rewrite(folder, architecture="test_convnext")
    message = r"not those of test_convnext: \d+ tensors missing, \d+ too many"
    with pytest.raises(UserError, match=message):
        load_encoder(folder)


def test_weights_of_another_shape_are_a_mistake(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["conv1.weight" if "conv1.weight" in weights else next(iter(weights))] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="1 of another shape"):
        load_encoder(folder)


# Files of weights


def classifier_state(backbone: str) -> dict[str, Tensor]:
    torch.manual_seed(5)
    args = {"img_size": 32} if backbone == VIT else {}
    return timm.create_model(backbone, num_classes=10, **args).state_dict()


def parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "bare.pth": lambda state, file: torch.save(state, file),
    "nested.pt": lambda state, file: torch.save({"state_dict": state, "epoch": 3}, file),
    "model.tar": lambda state, file: torch.save({"model": state}, file),
    "parallel.pth": lambda state, file: torch.save({"state_dict": parallel(state)}, file),
    "old.pth": lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False),
    "weights.safetensors": lambda state, file: save_file(state, file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_weights_load_from_each_kind_of_file_without_their_classifier(
    name: str, tmp_path: Path
) -> None:
    state = classifier_state(CNN)
    WRITERS[name](state, tmp_path / name)
    encoder = made(CNN)
    load_weights(encoder, tmp_path / name)
    loaded = encoder.model.state_dict()
    assert len(loaded) == len(state) - 2
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_weights_without_classifier_load_too(tmp_path: Path) -> None:
    torch.save(made(seed=3).model.state_dict(), tmp_path / "w.pth")
    encoder = made(seed=4)
    load_weights(encoder, tmp_path / "w.pth")
    assert same_weights(encoder, made(seed=3))


def test_weights_of_clip_load_without_its_projection(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_base_patch32_clip_224", num_classes=0, img_size=64, embed_dim=32, depth=1, num_heads=2
    )
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    given = {
        "token_embedding.weight": torch.zeros(5, 8),
        "visual.proj": torch.zeros(32, 8),
        "visual.class_embedding": state["cls_token"][0, 0],
        "visual.positional_embedding": state["pos_embed"][0],
    }
    names = {
        "patch_embed.proj": "conv1", "blocks.": "transformer.resblocks.", "norm_pre": "ln_pre",
        "norm1": "ln_1", "norm2": "ln_2", "norm.": "ln_post.", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj",
    }  # fmt: skip
    for name, value in state.items():
        if name not in ("cls_token", "pos_embed"):
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            given[f"visual.{name}"] = value
    torch.save(given, tmp_path / "clip.pt")
    encoder = Encoder(model, {}, 64)
    load_weights(encoder, tmp_path / "clip.pt")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_another_architectures_file_is_a_mistake_and_changes_nothing(tmp_path: Path) -> None:
    torch.save(classifier_state(VIT), tmp_path / "w.pth")
    encoder = made()
    with pytest.raises(UserError, match="not those of test_resnet"):
        load_weights(encoder, tmp_path / "w.pth")
    assert same_weights(encoder, made())


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def plain_pickle(content: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_code_in_a_file_is_never_executed(name: str, write: Any, tmp_path: Path) -> None:
    trace, file = tmp_path / "executed", tmp_path / name
    write({"state_dict": made().state_dict(), "extra": Evil(trace)}, file)
    with pytest.raises(UserError, match="can't be loaded"):
        load_weights(made(), file)
    assert not trace.exists()
    with file.open("rb") as opened:  # the file was a threat, indeed
        if write is plain_pickle:
            pickle.load(opened)
        else:
            torch.load(opened, weights_only=False)
    assert trace.exists()


def test_the_refusal_of_code_says_why(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": Evil(tmp_path / "x")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="pickled Python objects beside tensors, which are never"):
        load_weights(made(), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_damaged_file_is_a_mistake(name: str, tmp_path: Path) -> None:
    text, pickles = (b"", b"text, not weights"), (b"\x80", b"\x80\x04", b"PK\x03\x04")
    for content in (*text, *pickles, bytes(range(256))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="can't be loaded"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_torch_file_that_is_cut_short_is_a_mistake(kept: float, tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(made().state_dict(), file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(UserError, match="can't be loaded"):
        read_weights(file)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"epoch": 3}, "text"])
def test_a_file_of_anything_else_is_no_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="is not a state dict: expected tensors by name"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["gone.pth", "gone.safetensors"])
def test_a_missing_file_is_a_mistake(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_weights(tmp_path / name)


def test_a_folder_that_timm_itself_saved_loads(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=0).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(tmp_path).eval()(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dtype"), [(16, torch.float32), (32, torch.bfloat16)])
def test_images_below_32_pixels_are_not_computed_in_bf16_on_a_cpu(
    size: int, dtype: torch.dtype
) -> None:
    """Where oneDNN's gradients of strided convolutions are partly uninitialized."""
    encoder = build_encoder("resnet18", 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(torch.randn(2, 3, size, size)).dtype == dtype
        assert encoder.pooled_and_map(torch.randn(2, 3, size, size))[1].dtype == dtype


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet", "test_efficientnet"])
def test_tokens_are_what_the_last_map_shows_and_the_class_token(backbone: str) -> None:
    encoder = build_encoder(backbone, 64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled, last = encoder.pooled_and_map(images)
        tokens = encoder.tokens(images)
    assert tokens.shape[1:] == encoder.token_shape()
    extra = tokens.shape[1] - last[0, 0].numel()
    assert extra == (1 if backbone == "test_vit" else 0)
    torch.testing.assert_close(tokens[:, extra:], last.flatten(2).transpose(1, 2))
    if extra:
        torch.testing.assert_close(tokens[:, 0], pooled)


def test_a_backbone_with_several_maps_has_no_tokens() -> None:
    encoder = build_encoder("crossvit_9_240")
    with pytest.raises(UserError, match="crossvit_9_240 has several feature maps"):
        encoder.token_shape()
