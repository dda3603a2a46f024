"""Recipes: every one can be run as it stands."""

from pathlib import Path

import pytest
import torch
import yaml

from vissl_lite.cli import parse_words
from vissl_lite.commands.finetune import finetune
from vissl_lite.commands.pretrain_options import PretrainOptions, whole_pretext
from vissl_lite.encoder import build_encoder
from vissl_lite.optim import build_optimizer, check_optimizer
from vissl_lite.options import options_of
from vissl_lite.pretext import PRETEXTS, pretext_class

CONFIGS = Path(__file__).parents[1] / "configs"
TRANSFERS = sorted((CONFIGS / "sample").glob("*.yaml"))
RECIPES = sorted(set(CONFIGS.glob("*/*.yaml")) - set(TRANSFERS))


@pytest.mark.parametrize("folder", ["cifar10", "imagenette", "imagenet"])
def test_every_pretext_has_a_recipe(folder: str) -> None:
    assert {path.stem for path in (CONFIGS / folder).glob("*.yaml")} == set(PRETEXTS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_options_are_known_and_of_the_right_type(path: Path) -> None:
    arguments = ["--config", str(path), "--data", "DATA", "--out", "RUN"]
    options = PretrainOptions.merged(parse_words(PretrainOptions, arguments))
    content = yaml.safe_load(path.read_text())
    assert options["pretext"]["name"] == content["pretext"]["name"]
    assert path.stem.startswith(content["pretext"]["name"])
    for name, value in content.items():
        if name != "pretext":
            assert options[name] == value
    check_optimizer(content.get("optimizer", "adamw"))


@pytest.mark.parametrize("path", TRANSFERS, ids=lambda path: path.stem)
def test_every_transfer_has_a_recipe_for_the_sample_data(path: Path) -> None:
    options = options_of(finetune)
    arguments = ["--config", str(path), "--data", "DATA", "--out", "RUN"]
    made = options(**options.merged(parse_words(options, arguments))).as_config()
    content = yaml.safe_load(path.read_text())
    assert made["task"] == path.stem
    assert {name: made[name] for name in content} == content


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_pretext_can_be_built_on_its_backbone(path: Path) -> None:
    """Without memory or arithmetic, on the meta device, where the pretext allows it."""
    content = yaml.safe_load(path.read_text())
    options = whole_pretext(content["pretext"])
    made = pretext_class(options.pop("name"))
    looks_at_values = made.about.name in ("spark", "colorization")  # at masks, at colours
    with torch.device("cpu" if looks_at_values else "meta"):
        task = made(build_encoder(content["backbone"], content["image_size"]), **options)
    assert len(task.views()) >= 1
    build_optimizer(task, task.optimizer_settings)


def test_a_recipes_learning_rate_follows_the_batch() -> None:
    """A paper's recipe on a machine that can't hold its batch: a batch of 256 instead of 4096."""
    content = yaml.safe_load((CONFIGS / "imagenet" / "simclr.yaml").read_text())
    options = PretrainOptions(data="DATA", out="RUN", base_lr=content["base_lr"])
    task = pretext_class("simclr")(build_encoder("test_resnet", 32))
    settings = options.optimizer_settings
    assert settings(task, 4096).lr == pytest.approx(4.8)  # section 4.1 of the paper: 0.3 x B / 256
    assert settings(task, 256).lr == pytest.approx(0.3)
