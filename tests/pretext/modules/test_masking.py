import math
import random

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.base import PretextInfo
from vissl_lite.pretext.dinov2 import SMALLEST_BLOCK
from vissl_lite.pretext.modules.masking import (
    PatchPredictor,
    block_mask,
    block_masks,
    check_patches,
    check_ratio,
    encode_visible,
    gather_tokens,
    indices_to_mask,
    masked_patches,
    narrow_width,
    normalized_patches,
    patchify,
    random_mask,
    select_patches,
    unpatchify,
)

CPU = torch.device("cpu")
HALF = torch.tensor([[[True, False], [False, True]]]).expand(2, -1, -1)
ABOUT = PretextInfo("masked", "masked", "1", "nobody", "never", backbones="ViT")


@pytest.mark.parametrize(
    ("count", "ratio", "masked"), [(64, 0.75, 48), (49, 0.6, 29), (4, 0.01, 1), (4, 0.99, 3)]
)
def test_each_mask_hides_the_same_number_and_never_all_or_nothing(
    count: int, ratio: float, masked: int
) -> None:
    visible, places = random_mask(50, count, ratio, CPU)
    mask = indices_to_mask(places, count)
    assert torch.equal(indices_to_mask(visible, count), ~mask)
    assert all((one.diff(dim=1) > 0).all() for one in (visible, places))
    assert mask.shape == (50, count)
    assert mask.sum(dim=1).tolist() == [masked] * 50
    assert len(torch.unique(mask, dim=0)) > 1
    assert mask.any(dim=0).all()  # every place is masked at times
    assert (~mask).any(dim=0).all()


def test_masks_follow_the_seed() -> None:
    torch.manual_seed(3)
    one = random_mask(4, 16, 0.5, CPU)[1]
    assert not torch.equal(random_mask(4, 16, 0.5, CPU)[1], one)
    torch.manual_seed(3)
    assert torch.equal(random_mask(4, 16, 0.5, CPU)[1], one)


def test_visible_and_masked_tokens_put_back_restore_the_whole() -> None:
    tokens = torch.randn(3, 10, 2)
    restored = torch.zeros_like(tokens)
    for where in random_mask(3, 10, 0.7, CPU):
        for image in range(3):
            for place, token in zip(where[image], gather_tokens(tokens, where)[image], strict=True):
                restored[image, place] += token
    assert torch.equal(restored, tokens)


def test_patches_are_rows_columns_channels_of_each_square() -> None:
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    for row in range(2):
        for column in range(3):
            square = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(patches[:, 3 * row + column], square.permute(0, 2, 3, 1).flatten(1))


def test_unpatchify_undoes_patchify() -> None:
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4), images)


def test_patches_have_the_order_of_timm() -> None:
    encoder = build_encoder("vit_slim_patch4_32", 32)
    images = torch.randn(2, 3, 32, 32)
    convolution = encoder.model.patch_embed.proj
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
    expected = encoder.model.patch_embed(images).flatten(1, 2)
    ours = patchify(images, 4) @ weight.T + convolution.bias
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_patches_are_normalized_one_by_one() -> None:
    images = torch.randn(2, 3, 8, 8) * 5 + 2
    ours = normalized_patches(images, 4)
    for image, patches in zip(ours, patchify(images, 4).double(), strict=True):
        for patch, values in zip(image, patches.tolist(), strict=True):
            mean = sum(values) / 48
            variance = sum((v - mean) ** 2 for v in values) / 47
            expected = [(v - mean) / math.sqrt(variance + 1e-6) for v in values]
            torch.testing.assert_close(patch, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_an_even_patch_has_zeros_for_targets() -> None:
    assert normalized_patches(torch.full((1, 3, 4, 4), 0.7), 4).abs().max() < 1e-3


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    ours = PatchPredictor(8, side=3, width=32, depth=1, outputs=1).positions
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (row, column):
                for wave in (math.sin, math.cos):
                    expected += [wave(place / 10000 ** (i / 8)) for i in range(8)]
            torch.testing.assert_close(ours[3 * row + column], torch.tensor(expected))


@pytest.mark.parametrize(("features", "width"), [(768, 512), (192, 128), (128, 96), (24, 32)])
def test_narrow_width_is_in_whole_heads(features: int, width: int) -> None:
    assert narrow_width(features, 2 / 3) == width


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dynamic_img_size": False},
        {"pos_embed": "none"},
        {"no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "avg", "reg_tokens": 2, "dynamic_img_size": False},
        {"reg_tokens": 3, "no_embed_class": True},
        {"pre_norm": True},
    ],
    ids=str,
)
def test_with_all_patches_visible_the_encoder_is_timms_own(arguments: dict) -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=64, **arguments)
    encoder = Encoder(model, {"img_size": 64, **arguments}, 64)
    images = torch.randn(2, 3, 64, 64)
    prefix, patches = encode_visible(encoder, images, torch.arange(16).expand(2, -1))
    assert patches.shape == (2, 16, 64)
    torch.testing.assert_close(torch.cat([prefix, patches], dim=1), model.forward_features(images))


def test_visible_patches_keep_their_positions() -> None:
    encoder = build_encoder("test_vit", 64)
    gray = torch.zeros(2, 3, 64, 64)  # patches differ by their positions only
    where = torch.tensor([[0, 5], [9, 5]])
    _, patches = encode_visible(encoder, gray, where)
    assert not torch.allclose(patches[0, 0], patches[1, 0], atol=1e-4)
    _, swapped = encode_visible(encoder, gray, where.flip(1))
    torch.testing.assert_close(swapped.flip(1), patches)


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_token_stands_in_for_masked_patches_of_a_vit(dynamic: bool) -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=32, dynamic_img_size=dynamic)
    check_replaced(model, width=64, channels_first=False)


def test_the_token_stands_in_for_masked_patches_of_channels_first_tokens() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 5, 16, 16)

    check_replaced(Model(), width=5, channels_first=True)


def check_replaced(model: nn.Module, width: int, channels_first: bool) -> None:
    images, token = torch.randn(2, 3, 32, 32), torch.full((width,), 7.0)
    plain = model.patch_embed(images)
    with masked_patches(model, HALF, token):
        masked = model.patch_embed(images)
    assert masked.shape == plain.shape
    if channels_first:
        plain, masked = plain.permute(0, 2, 3, 1), masked.permute(0, 2, 3, 1)
    plain, masked = plain.reshape(2, 4, width), masked.reshape(2, 4, width)
    for place, hidden in enumerate([True, False, False, True]):
        expected = token.expand(2, -1) if hidden else plain[:, place]
        assert torch.equal(masked[:, place], expected)


def test_no_hook_is_left_after_an_error() -> None:
    model = build_encoder("test_vit", 32).model

    def fail() -> None:
        with masked_patches(model, HALF, torch.zeros(64)):
            assert model.patch_embed._forward_hooks
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not model.patch_embed._forward_hooks


def test_predictor_equals_the_papers_unshuffled_sequence() -> None:
    """MAE, section 3: mask tokens put between the others, in the order of the image."""
    predictor = PatchPredictor(features=12, side=3, width=32, depth=2, outputs=5)
    prefix, tokens = torch.randn(1, 1, 12), torch.randn(1, 4, 12)
    where, wanted = torch.tensor([[7, 0, 4, 2]]), torch.tensor([[8, 1, 3, 5, 6]])
    ours = predictor(prefix, tokens, where, wanted)
    sequence = [predictor.embed(prefix[0, 0])]
    for place in range(9):
        token = predictor.mask_token
        if place in where:
            token = predictor.embed(tokens[0, where[0].tolist().index(place)])
        sequence.append(token + predictor.positions[place])
    whole = predictor.head(predictor.norm(predictor.blocks(torch.stack(sequence)[None])))[0, 1:]
    torch.testing.assert_close(ours[0], whole[wanted[0]])


def test_predictor_has_no_weights_that_a_checkpoint_need_not_hold() -> None:
    predictor = PatchPredictor(features=12, side=3, width=32, depth=1, outputs=5)
    assert "positions" not in predictor.state_dict()
    assert not predictor.positions.requires_grad


@pytest.mark.parametrize(("width", "depth"), [(40, 1), (0, 1), (32, 0)])
def test_a_predictor_that_cannot_be_built_is_the_users_mistake(width: int, depth: int) -> None:
    with pytest.raises(UserError, match="multiple of 32"):
        PatchPredictor(features=12, side=3, width=width, depth=depth, outputs=5)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 75])
def test_a_ratio_that_is_no_share_is_the_users_mistake(ratio: float) -> None:
    with pytest.raises(UserError, match="mask_ratio"):
        check_ratio(ratio)


@pytest.mark.slow
def test_patches_that_see_beyond_themselves_are_refused() -> None:
    encoder = build_encoder("vit_tiny_r_s16_p8_224", 64)
    with pytest.raises(UserError, match="do not overlap"):
        check_patches(ABOUT, encoder)


def test_a_single_patch_is_refused() -> None:
    with pytest.raises(UserError, match="those of 32 do"):
        check_patches(ABOUT, build_encoder("test_vit", 16))
    assert check_patches(ABOUT, build_encoder("test_vit", 32)) == 16


def test_blocks_are_few_rectangles_and_mask_no_more_than_asked_for() -> None:
    rng = np.random.default_rng(0)
    shares, neighbors = [], []
    for _ in range(100):
        mask = block_mask(14, 14, 60, rng)
        shares.append(mask.sum())
        inner = mask[1:-1, 1:-1]
        around = mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        neighbors.append((inner & around).sum() / max(1, inner.sum()))
    assert max(shares) <= 60
    assert np.mean(shares) > 50
    # of 60 patches masked one by one, 0.3 ** 4 would have all four neighbors masked
    assert np.mean(neighbors) > 0.25


def literal_blocks(
    rows: int, columns: int, count: int, smallest: int, draw: random.Random
) -> set[tuple[int, int]]:
    """Masked patches by BEiT's algorithm 1 with the numbers of iBOT and DINOv2, patch by patch.

    A block has an aspect ratio of 0.3 to 1/0.3 and about as many patches as the smallest, or more;
    it must mask something new, and no more than is left. After ten blocks in a row that do not fit,
    the mask is what it is.
    """
    masked: set[tuple[int, int]] = set()
    while len(masked) < count:
        left = count - len(masked)
        for _ in range(10):
            area = draw.uniform(smallest, left)
            aspect = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height >= rows or width >= columns:
                continue
            top, start = draw.randint(0, rows - height), draw.randint(0, columns - width)
            block = {(top + y, start + x) for y in range(height) for x in range(width)}
            if 0 < len(block - masked) <= left:
                masked |= block
                break
        else:
            break
    return masked


@pytest.mark.parametrize(
    ("rows", "columns", "count", "given", "smallest"),
    [(14, 14, 60, None, 16), (8, 12, 30, None, 4), (14, 14, 60, SMALLEST_BLOCK, 4)],
    ids=["ibot", "ibot, not square", "dinov2"],
)
def test_blocks_are_distributed_as_the_authors(
    rows: int, columns: int, count: int, given: int | None, smallest: int
) -> None:
    """How many patches are masked, where, and how often both of two neighbors are."""
    rng, draw, images = np.random.default_rng(0), random.Random(0), 2000
    ours = np.stack([block_mask(rows, columns, count, rng, given) for _ in range(images)])
    theirs = np.zeros_like(ours)
    for mask in theirs:
        for place in literal_blocks(rows, columns, count, smallest, draw):
            mask[place] = True
    numbers = [masks.sum(axis=(1, 2)) for masks in (ours, theirs)]
    assert numbers[0].mean() == pytest.approx(numbers[1].mean(), abs=0.4)
    assert numbers[0].std() == pytest.approx(numbers[1].std(), abs=0.4)
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=0.06)
    pairs = [(masks[:, 1:] & masks[:, :-1]).mean() for masks in (ours, theirs)]
    assert pairs[0] == pytest.approx(pairs[1], abs=0.01)


def test_no_block_is_masked_of_a_grid_without_room() -> None:
    assert block_mask(2, 2, 0, np.random.default_rng(0)).sum() == 0
    assert block_mask(2, 2, 1, np.random.default_rng(0)).sum() <= 1


def test_each_image_has_its_share_masked_and_a_batch_at_least_one_patch() -> None:
    rng = np.random.default_rng(0)
    shares = [0.0, 0.5, 0.25, 0.0]
    counts = torch.stack([block_masks(shares, 8, 8, rng).flatten(1).sum(dim=1) for _ in range(50)])
    assert (counts[:, [0, 3]] == 0).all()
    assert (counts[:, 1] <= 32).all()
    assert (counts[:, 2] <= 16).all()
    assert counts.float().mean(dim=0)[1:3].tolist() == pytest.approx([31, 15], abs=1.5)
    assert block_masks([0.0, 0.0], 2, 2, rng).sum() == 1


def test_patches_are_selected_as_a_mask_does() -> None:
    patches, mask = torch.randn(2, 5, 3, 4), torch.rand(2, 3, 4) < 0.4
    expected = torch.stack([patches[i, :, r, c] for i, r, c in mask.nonzero().tolist()])
    assert torch.equal(select_patches(patches, mask.flatten().nonzero()[:, 0]), expected)
