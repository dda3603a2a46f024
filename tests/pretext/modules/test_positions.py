import math
from pathlib import Path

import timm
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.pretext.modules.positions import fix_positions, sine_cosine_positions


def test_an_embedding_holds_sines_and_cosines_of_the_row_then_of_the_column() -> None:
    rows, columns, width = 2, 3, 8
    expected = []
    for row in range(rows):
        for column in range(columns):
            angles = [[at / 10000 ** (k / 2) for k in range(2)] for at in (row, column)]
            expected.append([f(a) for part in angles for f in (math.sin, math.cos) for a in part])
    embeddings = sine_cosine_positions(rows, columns, width)
    torch.testing.assert_close(embeddings, torch.tensor(expected))


def test_positions_are_not_trained_and_the_class_token_has_none() -> None:
    encoder = build_encoder("test_vit", 64)
    fix_positions(encoder)
    positions = encoder.model.pos_embed
    assert isinstance(positions, torch.nn.Parameter)
    assert not positions.requires_grad
    assert positions[0, 0].count_nonzero() == 0
    torch.testing.assert_close(positions[0, 1:].data, sine_cosine_positions(4, 4, 64))


def test_timm_loads_an_encoder_with_them(tmp_path: Path) -> None:
    encoder = build_encoder("test_vit", 64).eval()
    fix_positions(encoder)
    save_encoder(encoder, tmp_path, {})
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert model.pos_embed.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model(images), encoder(images))


def test_an_encoder_without_position_embeddings_stays() -> None:
    encoder = build_encoder("test_resnet", 32)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fix_positions(encoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
