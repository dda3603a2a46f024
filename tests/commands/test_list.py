"""``vissl-lite list``."""

import pytest
import timm

import vissl_lite
from vissl_lite.cli import main
from vissl_lite.pretext import PRETEXTS


def test_pretexts_with_family_backbones_views_paper_and_use(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list", "pretexts"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(PRETEXTS)
    for line, (name, made) in zip(lines, PRETEXTS.items(), strict=True):
        info = made.info
        assert line.split()[0] == name
        assert all(part in line for part in (info.family, info.views, info.paper, info.use))


def test_every_pretext_cites_a_paper_and_fits_a_line() -> None:
    for made in PRETEXTS.values():
        assert "arXiv" in made.info.paper
        assert len(made.info.use) < 80


def test_backbones_are_timms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "backbones"]) == 0
    assert capsys.readouterr().out.splitlines() == timm.list_models()


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("resnet18*", "resnet18_cifar", "seresnet18"),
        ("patch4_32", "vit_tiny_patch4_32", "resnet18"),
    ],
)
def test_backbones_by_pattern(pattern: str, inside: str, outside: str) -> None:
    names = vissl_lite.list_("backbones", pattern)
    assert inside in names
    assert outside not in names
