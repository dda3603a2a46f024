"""Recipes: every one can be run as it stands."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import required
from vissl_lite.cli import parse_words
from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import build_optimizer, canonical_optimizer
from vissl_lite.pretext import PRETEXTS, pretext_class

CONFIGS = Path(__file__).parents[1] / "configs"
SHARED = ("cifar10", "imagenette", "cifar10_minutes")
IMAGENET = sorted((CONFIGS / "imagenet").glob("*.yaml"))


def recipe(file: Path, pretext: str) -> dict:
    """The options of a file for a pretext, checked."""
    options = PretrainOptions
    words = ["--config", str(file), "--pretext", pretext, "--data", "DATA", "--out", "RUN"]
    values = options.merged(parse_words(options, words))
    return options(**values).as_config()


def test_every_pretext_has_the_settings_of_its_paper() -> None:
    assert {path.stem for path in IMAGENET} == set(PRETEXTS)
    for path in IMAGENET:
        assert yaml.safe_load(path.read_text())["pretext"]["name"] == path.stem


@pytest.mark.slow
def test_recipes_for_imagenet_are_known_options() -> None:
    for path in IMAGENET:
        content = yaml.safe_load(path.read_text())
        options = recipe(path, path.stem)
        assert {n: options[n] for n in content if n != "pretext"} == {
            n: v for n, v in content.items() if n != "pretext"
        }
        assert canonical_optimizer(content["optimizer"]) == content["optimizer"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_a_shared_file_has_options_for_every_pretext(name: str) -> None:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    overrides = content.pop("overrides")
    assert set(overrides) <= set(PRETEXTS)
    for pretext in PRETEXTS:
        options = recipe(CONFIGS / f"{name}.yaml", pretext)
        own = {**content, **overrides.get(pretext, {})}
        hyperparameters = own.pop("pretext", {})
        assert {option: options[option] for option in own} == own
        assert options["pretext"] == {**options["pretext"], "name": pretext, **hyperparameters}


def test_what_is_given_wins_over_an_override() -> None:
    file = {"lr": 0.1, "overrides": {"mae": {"lr": 0.2, "pretext": {"mask_ratio": 0.5}}}}
    assert PretrainOptions.merged([file, {"pretext": {"name": "moco"}}])["lr"] == 0.1
    values = PretrainOptions.merged([file, {"pretext": "mae"}])
    assert values["lr"] == 0.2
    assert values["pretext"]["mask_ratio"] == 0.5
    assert PretrainOptions.merged([file, {"pretext": "mae", "lr": "0.3"}])["lr"] == 0.3


def test_overrides_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(UserError, match="overrides must be a mapping"):
        PretrainOptions.merged([{"overrides": {"mae": 3}}])


def distinct() -> list[tuple[str, str, int, str]]:
    """One recipe of each pretext, backbone and size that ``imagenet`` and the shared files name."""
    found: dict[tuple[str, str, int], str] = {}
    for path in IMAGENET:
        content = yaml.safe_load(path.read_text())
        found.setdefault((path.stem, content["backbone"], content["image_size"]), str(path))
    for name in SHARED:
        content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        for pretext, own in content["overrides"].items():
            if "pretext" in own:
                merged = {**content, **own}
                key = (pretext, merged["backbone"], merged["image_size"])
                found.setdefault(key, str(CONFIGS / f"{name}.yaml"))
    return [(*key, file) for key, file in found.items()]


@pytest.mark.slow
def test_pretexts_can_be_built_on_their_backbones() -> None:
    """Without memory or arithmetic, on the meta device, where the pretext allows it."""
    built = set()
    for name, backbone, size, file in distinct():
        if (name, size) in built:
            continue
        built.add((name, size))
        options = dict(recipe(Path(file), name)["pretext"])
        options.pop("name")
        options |= required(name)  # instead of weights from a hub
        # at masks, at colors, at the weights of a random teacher
        looks_at_values = name in ("spark", "colorization", "distillation")
        with torch.device("cpu" if looks_at_values else "meta"):
            task = pretext_class(name)(build_encoder(backbone, size), **options)
        assert build_optimizer(task, task.optimizer_settings).param_groups
    assert len(built) >= len(PRETEXTS)
