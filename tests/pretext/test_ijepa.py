import math
import random

import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.ijepa import IJEPA, block_size, draw_context, place_blocks
from vissl_lite.pretext.modules.masking import indices_to_mask

CPU = torch.device("cpu")


def ijepa(backbone: str = "test_vit", size: int = 64, **arguments: object) -> IJEPA:
    torch.manual_seed(0)
    return IJEPA(build_encoder(backbone, size), **arguments)


def moved(task: IJEPA) -> IJEPA:
    """With a target encoder that differs from the encoder."""
    with torch.no_grad():
        for parameter in task.target_encoder.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return task


@pytest.mark.slow
def test_loss_equals_the_literal_one() -> None:
    """Section 3, with the smooth L1 distance and the normalized targets of the authors' code."""
    task, images = moved(ijepa()), torch.randn(2, 3, 64, 64)
    torch.manual_seed(5)
    ours = task.loss([images])
    torch.manual_seed(5)
    context, targets = task.draw_blocks(2, CPU)
    total, count = 0.0, 0
    for image in range(2):  # one block of one image at a time
        whole = task.target_encoder.model.forward_features(images[image : image + 1])[0, 1:]
        for block in targets[image]:
            alone = task.predict(
                images[image : image + 1], context[image : image + 1], block[None, None]
            )
            for predicted, place in zip(alone[0, 0].detach().double(), block, strict=True):
                token = whole[place].detach().double()
                spread = (token.var(unbiased=False) + 1e-5).sqrt()
                for value, target in zip(predicted, (token - token.mean()) / spread, strict=True):
                    error = abs(float(value - target))
                    total += error**2 / 2 if error < 1 else error - 0.5
                    count += 1
    assert ours.item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_context_encoder_sees_the_context_only() -> None:
    task, images = ijepa(), torch.randn(2, 3, 64, 64)
    context, targets = torch.tensor([[5, 6], [5, 6]]), torch.tensor([[[10, 11]], [[14, 15]]])
    predicted = task.predict(images, context, targets)
    changed = torch.randn(2, 3, 64, 64)
    changed[..., 16:32, 16:48] = images[..., 16:32, 16:48]
    assert torch.equal(task.predict(changed, context, targets), predicted)
    assert not torch.allclose(task.features(changed, targets), task.features(images, targets))


@pytest.mark.parametrize("side", [2, 3, 4, 8, 14])
def test_context_never_overlaps_targets_and_keeps_a_patch(side: int) -> None:
    task = ijepa()
    task.side = side
    for _ in range(20):
        context, targets = task.draw_blocks(16, CPU)
        assert context.shape[1] >= max(1, side * side // 4)
        for seen, blocks in zip(context.tolist(), targets.flatten(1).tolist(), strict=True):
            assert len(set(seen)) == len(seen)
            assert not set(seen) & set(blocks)
            assert all(0 <= place < side * side for place in seen + blocks)


def literal_blocks(side: int) -> tuple[set[int], list[set[int]]]:
    """Section 3 for one image: a context block without what four target blocks cover."""

    def block(scale: tuple[float, float], aspect: tuple[float, float]) -> set[int]:
        area, ratio = random.uniform(*scale) * side**2, random.uniform(*aspect)
        height = min(round(math.sqrt(area * ratio)), side)
        width = min(round(math.sqrt(area / ratio)), side)
        top, left = random.randint(0, side - height), random.randint(0, side - width)
        return {(top + y) * side + left + x for y in range(height) for x in range(width)}

    blocks = [block((0.15, 0.2), (0.75, 1.5)) for _ in range(4)]
    return block((0.85, 1.0), (1.0, 1.0)).difference(*blocks), blocks


def test_blocks_are_distributed_as_in_the_paper() -> None:
    """Sizes, and how often each patch is context and target, on the grid of ViT-L/16 at 224."""
    task, images = ijepa(), 3000
    task.side = side = 14
    random.seed(0)
    seen, covered = torch.zeros(2, side * side), torch.zeros(2, side * side)
    for _ in range(images):
        context, targets = task.draw_blocks(1, CPU)  # of several, contexts are cut to one length
        seen[0, context[0]] += 1
        covered[0] += targets[0].flatten().bincount(minlength=side * side)
        expected, blocks = literal_blocks(side)
        seen[1, list(expected)] += 1
        for block in blocks:
            covered[1, list(block)] += 1
    seen, covered = seen / images, covered / images
    assert seen[0].mean() == pytest.approx(float(seen[1].mean()), rel=0.02)
    assert covered[0].mean() == pytest.approx(float(covered[1].mean()), rel=0.02)
    assert (seen[0] - seen[1]).abs().max() < 0.06
    assert (covered[0] - covered[1]).abs().max() < 0.1


def test_targets_that_cover_everything_give_way_to_the_context() -> None:
    quarters = torch.tensor([[[0, 1], [2, 3], [4, 5], [6, 7]]])  # all of the first two rows
    row_and_a_half = torch.zeros(1, 16, dtype=torch.bool)
    row_and_a_half[:, :8] = True
    context, targets = draw_context(row_and_a_half, quarters, side=4)
    # a quarter of 16 patches stays: two targets fit, the others repeat the first one
    assert sorted(context[0].tolist()) == [4, 5, 6, 7]
    assert targets.tolist() == [[[0, 1], [2, 3], [0, 1], [0, 1]]]


def test_a_target_on_the_whole_context_leaves_everything_else() -> None:
    corner = indices_to_mask(torch.tensor([[0, 1]]), 16)
    context, targets = draw_context(corner, torch.tensor([[[0, 1, 4, 5]]]), side=4)
    assert sorted(context[0].tolist()) == [2, 3, *range(6, 16)]
    assert targets.tolist() == [[[0, 1, 4, 5]]]


def test_contexts_are_cut_to_the_smallest_at_random() -> None:
    whole = torch.ones(2, 16, dtype=torch.bool)
    whole[1, 8:] = False
    targets = torch.tensor([[[0]], [[0]]])
    kept = {tuple(sorted(draw_context(whole, targets, 4)[0][0].tolist())) for _ in range(10)}
    assert {len(places) for places in kept} == {7}
    assert len(kept) > 1


def test_blocks_are_rectangles_of_one_size_all_over_the_image() -> None:
    blocks = place_blocks(200, 2, side=5, size=(2, 3), device=CPU)
    corners = set()
    for block in blocks.flatten(0, 1).tolist():
        row, column = block[0] // 5, block[0] % 5
        assert block == [(row + y) * 5 + column + x for y in range(2) for x in range(3)]
        corners.add((row, column))
    assert corners == {(row, column) for row in range(4) for column in range(3)}


@pytest.mark.parametrize(
    ("side", "scale", "aspect", "size"),
    [
        (14, 0.2, 1.0, (6, 6)),
        (14, 0.15, 1.5, (7, 4)),
        (14, 0.15, 0.75, (5, 6)),
        (2, 0.15, 1.0, (1, 1)),
        (4, 1.0, 1.0, (3, 3)),
        (8, 0.2, 100.0, (7, 1)),
    ],
)
def test_block_sizes(side: int, scale: float, aspect: float, size: tuple[int, int]) -> None:
    assert block_size(side, scale, aspect, largest=side - 1) == size


@pytest.mark.slow
def test_gradient_never_reaches_the_target_encoder() -> None:
    task = moved(ijepa())
    before = [parameter.clone() for parameter in task.target_encoder.parameters()]
    task.loss([torch.randn(2, 3, 64, 64)]).backward()
    task.configure_optimizers().step()
    assert all(parameter.grad is None for parameter in task.target_encoder.parameters())
    for parameter, old in zip(task.target_encoder.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    assert all(parameter.grad is not None for parameter in task.encoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("progress", "momentum"), [(0.0, 0.9), (0.5, 0.95), (1.0, 1.0)])
def test_target_encoder_follows_by_a_momentum_that_rises_linearly(
    progress: float, momentum: float
) -> None:
    task = moved(ijepa(momentum=0.9))
    student = [parameter.clone() for parameter in task.encoder.parameters()]
    teacher = [parameter.clone() for parameter in task.target_encoder.parameters()]
    task.progress = progress
    task.after_step()
    for now, old, own in zip(task.target_encoder.parameters(), teacher, student, strict=True):
        torch.testing.assert_close(now, momentum * old + (1 - momentum) * own)
    for now, own in zip(task.encoder.parameters(), student, strict=True):
        assert torch.equal(now, own)


def test_the_target_encoder_is_what_training_is_for() -> None:
    task = ijepa()
    assert task.trained_encoder() is task.target_encoder
    assert task.target_encoder is not task.encoder
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(task.target_encoder(images), task.encoder(images))


@pytest.mark.slow
def test_predictor_is_scaled_to_the_encoder() -> None:
    small = ijepa("vit_slim_patch4_32", 32).predictor
    assert (small.embed.out_features, len(small.blocks), small.head.out_features) == (64, 1, 128)
    large = ijepa("vit_small_patch16_224", 64).predictor
    assert (large.embed.out_features, len(large.blocks), large.head.out_features) == (192, 6, 384)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_scale": (0.2, 0.1)},
        {"context_scale": (0.5, 1.5)},
        {"target_aspect": (0.0, 1.0)},
        {"momentum": 1.5},
        {"targets": 0},
    ],
    ids=str,
)
def test_what_makes_no_blocks_is_the_users_mistake(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        ijepa(**wrong)
