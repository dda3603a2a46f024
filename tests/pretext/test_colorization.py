"""Lab, bins, weights and the loss against published values and slow literal versions."""

import logging
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vissl_lite.data.image_reader import ImageReader
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext import colorization as module
from vissl_lite.pretext.colorization import (
    CHROMA_BATCHES,
    Colorization,
    annealed_mean,
    candidate_bins,
    color_cross_entropy,
    gamut_bins,
    lab_to_rgb,
    rarity_weights,
    rgb_to_lab,
    smoothing_matrix,
    soft_encode,
)


def made(backbone: str = "test_resnet", size: int = 32, **options: object) -> Colorization:
    torch.manual_seed(0)
    return Colorization(build_encoder(backbone, size), **options)  # type: ignore[arg-type]


def images(count: int = 4, size: int = 32) -> Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8)


# Lab


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [  # Lindbloom's calculator, sRGB and D65
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.2408, 80.0925, 67.2032)),
        ((0, 255, 0), (87.7347, -86.1827, 83.1793)),
        ((0, 0, 255), (32.2970, 79.1875, -107.8602)),
        ((255, 255, 0), (97.1393, -21.5537, 94.4780)),
        ((0, 255, 255), (91.1132, -48.0875, -14.1312)),
        ((255, 0, 255), (60.3242, 98.2343, -60.8249)),
        ((128, 128, 128), (53.5850, 0.0, 0.0)),
    ],
)
def test_lab_has_the_published_values(rgb: tuple[int, ...], lab: tuple[float, ...]) -> None:
    ours = rgb_to_lab(torch.tensor(rgb).view(1, 3, 1, 1) / 255).flatten()
    assert ours.tolist() == pytest.approx(lab, abs=0.005)


def literal_lab(r: float, g: float, b: float) -> list[float]:
    """IEC 61966-2-1 and CIE 15, one pixel in double precision."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (r, g, b)]
    x = 0.4124564 * linear[0] + 0.3575761 * linear[1] + 0.1804375 * linear[2]
    y = 0.2126729 * linear[0] + 0.7151522 * linear[1] + 0.0721750 * linear[2]
    z = 0.0193339 * linear[0] + 0.1191920 * linear[1] + 0.9503041 * linear[2]

    def f(t: float) -> float:
        return t ** (1 / 3) if t > (6 / 29) ** 3 else t / 3 * (29 / 6) ** 2 + 4 / 29

    fx, fy, fz = f(x / 0.95047), f(y), f(z / 1.08883)
    return [116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)]


@pytest.mark.parametrize("brightness", [1.0, 0.03])
def test_lab_equals_its_definition_pixel_by_pixel(brightness: float) -> None:
    rgb = brightness * torch.rand(2, 3, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = rgb_to_lab(rgb)
    for image in range(2):
        for row in range(5):
            for column in range(4):
                expected = literal_lab(*rgb[image, :, row, column].tolist())
                assert ours[image, :, row, column].tolist() == pytest.approx(expected, abs=0.01)


def test_the_encoder_sees_lightness_alone_as_a_gray_image() -> None:
    task = made("vit_slim_patch4_32")  # its channels have different means and deviations
    batch = images()
    gray, target = task.split(task.encoder.normalize(batch))
    lightness = rgb_to_lab(batch / 255)[:, :1] / 100
    mean, std = torch.tensor([task.encoder.mean, task.encoder.std])[:, None, :, None, None]
    torch.testing.assert_close(gray, (lightness - mean) / std, atol=1e-4, rtol=1e-4)
    assert target.shape == (4, 2, 8, 8)
    expected = rgb_to_lab(batch / 255)[:, 1:, 4:8, 12:16].mean(dim=(2, 3))
    torch.testing.assert_close(target[:, :, 1, 3], expected, atol=1e-3, rtol=1e-4)
    # another color of the same lightness is no other input
    other, _ = task.split(task.encoder.normalize(lightness_as_gray(batch)))
    assert (other - gray).abs().max() < 0.02


def lightness_as_gray(batch: Tensor) -> Tensor:
    """The gray images of the same lightness; not rounded."""
    level = (rgb_to_lab(batch / 255)[:, :1] + 16) / 116
    linear = torch.where(level > 6 / 29, level**3, 3 * (6 / 29) ** 2 * (level - 4 / 29))
    bright = 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055
    rgb = torch.where(linear <= 0.0031308, 12.92 * linear, bright)
    return (255 * rgb).expand(-1, 3, -1, -1)


# Bins


@pytest.mark.slow
def test_bins_are_those_that_an_srgb_color_falls_into() -> None:
    bins = gamut_bins()
    assert len(bins) == 261  # the number in the documentation
    level = torch.arange(0, 256, 5) / 255
    cube = torch.cartesian_prod(level, level, level)
    hit = (rgb_to_lab(cube)[:, 1:] / 10).round() * 10
    ours = {tuple(one) for one in bins.tolist()}
    assert {tuple(one) for one in hit.unique(dim=0).tolist()} <= ours
    assert (0.0, 0.0) in ours
    assert (-110.0, 110.0) not in ours


@pytest.mark.slow
def test_soft_encoding_equals_a_loop_over_all_bins() -> None:
    bins = gamut_bins()
    colors = rgb_to_lab(torch.rand(400, 3))[:, 1:]
    primaries = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    colors = torch.cat([colors, rgb_to_lab(primaries)[:, 1:]])  # at the gamut's corners
    nearest, shares = soft_encode(colors, bins, candidate_bins(bins))
    for color, ours, weights in zip(colors.tolist(), nearest, shares, strict=True):
        distances = [math.dist(color, one) for one in bins.tolist()]
        five = sorted(range(len(bins)), key=lambda q: distances[q])[:5]
        kernel = [math.exp(-(distances[q] ** 2) / (2 * 5**2)) for q in five]
        found = [distances[q] for q in ours.tolist()]
        assert found == pytest.approx([distances[q] for q in five], abs=1e-3)
        expected = [one / sum(kernel) for one in kernel]
        assert weights.tolist() == pytest.approx(expected, abs=1e-3)


def test_candidates_hold_the_five_nearest_bins_of_all_colors_in_a_square() -> None:
    bins = gamut_bins()
    colors = torch.rand(3000, 2) * 219.9 - 110  # outside the gamut, too
    ours, _ = soft_encode(colors, bins, candidate_bins(bins))
    distance = torch.cdist(colors, bins, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distance.gather(1, ours), distance.topk(5, largest=False)[0])


# Weights


@pytest.mark.slow
@pytest.mark.parametrize("uniform", [0.5, 0.1, 1.0])
def test_weights_are_those_of_equation_4(uniform: float) -> None:
    bins = gamut_bins()
    counts = torch.randint(1, 10_000, (len(bins),)) ** 2
    ours = rarity_weights(counts, smoothing_matrix(bins), uniform)
    centers, total, number = bins.tolist(), counts.sum().item(), len(bins)
    smoothed = [0.0] * number
    for q in range(number):  # each bin spreads its share by a Gaussian
        kernel = [math.exp(-(math.dist(centers[q], c) ** 2) / (2 * 5**2)) for c in centers]
        for other in range(number):
            smoothed[other] += counts[q].item() / total * kernel[other] / sum(kernel)
    assert sum(smoothed) == pytest.approx(1)
    weights = [1 / ((1 - uniform) * p + uniform / number) for p in smoothed]
    expectation = sum(p * w for p, w in zip(smoothed, weights, strict=True))
    assert ours.tolist() == pytest.approx([w / expectation for w in weights], rel=1e-3)


def test_equal_counts_give_nearly_equal_weights_and_rare_colors_larger_ones() -> None:
    task = made()
    start = rarity_weights(task.counts, task.smoothing, 0.5)
    assert start.min() > 0.6
    assert start.max() < 1.3
    gray = (task.bins == 0).all(dim=1).nonzero().item()
    task.counts[gray] += 1_000_000
    after = rarity_weights(task.counts, task.smoothing, 0.5)
    assert after.argmin() == gray
    assert after.max() > 10 * after[gray]


@pytest.mark.slow
def test_colors_are_counted_at_a_quarter_of_the_resolution() -> None:
    task = made()
    task.training_step(Batch(images()), 0)
    assert task.counts.dtype == torch.int64
    assert task.counts.sum() == len(task.bins) + 4 * 8 * 8
    red = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    red[:, 0] = 255
    before = task.counts.clone()
    task.training_step(Batch(red), 0)
    change = (task.counts - before).nonzero().flatten()
    assert change.numel() == 1
    assert task.bins[change[0]].tolist() == [80.0, 70.0]
    assert "counts" in task.state_dict()  # a resumed run goes on


class Batch:
    """What ``training_step`` reads of a batch."""

    def __init__(self, view: Tensor) -> None:
        self.views = [view]


def test_counts_are_summed_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    task = made()
    monkeypatch.setattr(module, "world", lambda: (0, 3))
    monkeypatch.setattr(dist, "all_reduce", lambda counts: counts.mul_(3))  # three equal ones
    nearest = torch.tensor([5, 5, 9])
    task.count_colors(torch.zeros(3, 2), nearest)
    assert (task.counts - 1).nonzero().flatten().tolist() == [5, 9]
    assert task.counts[[5, 9]].tolist() == [7, 4]


# The loss


def test_loss_equals_equations_2_and_3() -> None:
    logits = torch.randn(6, 40, dtype=torch.float64)
    nearest = torch.stack([torch.randperm(40)[:5] for _ in range(6)])
    shares = torch.rand(6, 5).double().softmax(dim=1)
    rarity = torch.rand(40).double() + 0.5
    total = 0.0
    for pixel in range(6):
        below = sum(math.exp(value) for value in logits[pixel].tolist())
        target = np.zeros(40)
        for bin_, share in zip(nearest[pixel].tolist(), shares[pixel].tolist(), strict=True):
            target[bin_] = share
        entropy = 0.0
        for q in range(40):
            entropy -= target[q] * math.log(math.exp(logits[pixel, q].item()) / below)
        total += rarity[nearest[pixel, 0]].item() * entropy
    ours = color_cross_entropy(logits, nearest, shares.float(), rarity.float())
    assert ours.item() == pytest.approx(total / 6, rel=1e-5)


def test_logits_and_colors_belong_to_the_same_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that knows the answer gives the smallest loss there is, that of the shares."""
    task = made(uniform=1.0)
    batch = task.encoder.normalize(images(3))
    _, target = task.split(batch)
    distance = (task.bins[None, :, :, None, None] - target[:, None]).square().sum(dim=2)
    answer = -distance / (2 * 5**2)  # log of the Gaussian kernel: (B, Q, h, w)
    five = torch.full_like(answer, -60.0).scatter(1, answer.topk(5, dim=1)[1], 0.0)
    monkeypatch.setattr(task.decoder, "forward", lambda *_: answer + five)
    loss = task.loss([batch]).item()
    shares = soft_encode(target.permute(0, 2, 3, 1).reshape(-1, 2), task.bins, task.candidates)[1]
    entropy = -(shares * shares.log()).sum(dim=1).mean().item()
    assert loss == pytest.approx(entropy, rel=1e-3)


@pytest.mark.parametrize(
    ("backbone", "size", "side"),
    [("test_resnet", 64, 16), ("test_vit", 32, 8), ("vit_slim_patch4_32", 32, 8),
     ("test_resnet", 50, 13)],
)  # fmt: skip
def test_colors_are_predicted_at_a_quarter_of_the_resolution(
    backbone: str, size: int, side: int
) -> None:
    task = made(backbone, size)
    gray, target = task.split(torch.randn(2, 3, size, size))
    logits = task.decoder(*task.encoder.pooled_and_map(gray), task.decoder.size(gray))
    assert logits.shape == (2, len(task.bins), side, side)
    assert target.shape[2:] == (side, side)


# Images without colors, and what a user did wrong


def gray_warnings(caplog: pytest.LogCaptureFixture, batch: Tensor) -> list[str]:
    task = made()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for step in range(CHROMA_BATCHES + 3):
            assert step >= CHROMA_BATCHES or not caplog.messages
            _, target = task.split(task.encoder.normalize(batch))
            colors = target.permute(0, 2, 3, 1).reshape(-1, 2)
            task.count_colors(colors, torch.zeros(len(colors), dtype=torch.long))
    return caplog.messages


@pytest.mark.slow
def test_gray_images_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    gray = images()[:, :1].expand(-1, 3, -1, -1)
    messages = gray_warnings(caplog, gray)
    assert len(messages) == 1
    assert "can't learn from them" in messages[0]
    tinted = gray.clone().clamp(60, 200)
    tinted[:, 0] += 40
    assert gray_warnings(caplog, tinted) == []


def test_errors_say_what_would_work() -> None:
    gray = ImageReader(bands=(0,), low=(0.0,), high=(9.0,), mean=(0.5,), std=(0.5,))
    with pytest.raises(UserError, match="needs photographs of 8-bit color"):
        Colorization(build_encoder("test_resnet", 32, reader=gray))
    with pytest.raises(UserError, match="uniform 0"):
        made(uniform=0.0)


# What it shows


AB = ((30.0, 20.0), (-30.0, 10.0))  # of two bins


def test_lab_becomes_rgb_again() -> None:
    cube = torch.cartesian_prod(*[torch.linspace(0, 1, 18)] * 3)  # dark ones too
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(cube)), cube, atol=2e-4, rtol=0)
    beyond = lab_to_rgb(torch.tensor([[50.0, 120.0, -120.0], [0.0, 0.0, 0.0]]))
    assert beyond.min() == 0
    assert beyond.isfinite().all()


def test_the_annealed_mean_is_that_of_equation_5() -> None:
    bins, logits = gamut_bins(), 3 * torch.randn(1, 261, 1, 2)
    ours = annealed_mean(logits, bins)
    for place in range(2):
        shares = logits[0, :, 0, place].double().softmax(dim=0)
        weights = [math.exp(math.log(share) / 0.38) for share in shares.tolist()]
        for axis in range(2):
            mean = sum(w * c for w, c in zip(weights, bins[:, axis].tolist(), strict=True))
            assert ours[0, axis, 0, place].item() == pytest.approx(mean / sum(weights), abs=0.01)


def test_right_colors_give_the_image_back(monkeypatch: pytest.MonkeyPatch) -> None:
    task = made("vit_slim_patch4_32")
    left, right = (int((task.bins == torch.tensor(ab)).all(dim=1).nonzero()) for ab in AB)
    lab = torch.full((2, 3, 32, 32), 60.0)  # lightness
    lab[1, 0] = 45.0
    lab[:, 1:, :, :16] = torch.tensor(AB[0])[:, None, None]
    lab[:, 1:, :, 16:] = torch.tensor(AB[1])[:, None, None]
    batch = (255 * lab_to_rgb(lab)).round().byte()
    logits = torch.zeros(2, len(task.bins), 8, 8)
    logits[:, left, :, :4] = logits[:, right, :, 4:] = 30.0
    monkeypatch.setattr(task, "predict", lambda gray: logits)
    before = task.counts.clone()
    shown = task.visualize([task.encoder.normalize(batch)])
    for row, image in zip(shown.rows, batch.permute(0, 2, 3, 1).numpy(), strict=True):
        gray, painted, truth = (picture.image for picture in row)
        assert np.array_equal(truth, image)
        assert gray.std(axis=2).max() == 0
        sides = np.r_[0:12, 20:32]  # not where colors are interpolated
        difference = painted[:, sides].astype(int) - truth[:, sides]
        assert np.abs(difference).max() <= 2
    assert torch.equal(task.counts, before)
