import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vissl_lite.data.stream import Batch
from vissl_lite.data.view_steps import GaussianBlur, HorizontalFlip, RandomResizedCrop
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.training.resizing import (
    SHARES,
    ProgressiveResizing,
    resolution_at,
    resolution_of,
    shrink,
)
from vissl_lite.training.schedule import Schedule


def test_views_are_small_for_half_of_the_run_and_whole_in_the_last_fifth() -> None:
    shares = [SHARES[resolution_at(progress / 1000)] for progress in range(1001)]
    assert set(shares[:500]) == {0.5}
    assert set(shares[800:]) == {1.0}
    assert all(a <= b for a, b in itertools.pairwise(shares))
    assert sorted(set(shares)) == [0.5, 0.625, 0.75, 0.875, 1.0]
    area = sum(share**2 for share in shares) / len(shares)
    assert area == pytest.approx(0.5, abs=0.03)  # what the help promises


def test_the_resolution_of_a_batch_follows_its_number_or_the_time() -> None:
    counted = Schedule(0.1, 0.0, 0, batches=100)
    assert [resolution_of(batch, counted) for batch in (0, 1, 60, 90)] == [0, 1, 2, 0]
    timed = Schedule(0.1, 0.0, 0, seconds=600.0)
    timed.fraction = 0.6
    assert [resolution_of(batch, timed) for batch in (0, 7)] == [0, 2]


def test_batches_that_are_sent_ahead_have_the_resolution_of_their_time() -> None:
    """In a short run, those on their way to the workers are a large part of it."""
    timed = Schedule(0.1, 0.0, 0, seconds=100.0)
    timed.batches, timed.fraction, timed._step_seconds = 10, 0.55, 6.0
    timed._fraction_of = 10
    assert [resolution_of(batch, timed) for batch in (10, 12, 15)] == [1, 3, 0]


def test_short_runs_do_not_begin_with_a_whole_step() -> None:
    schedule = Schedule(0.1, 0.0, 0, seconds=599.0)
    assert [resolution_of(batch, schedule) for batch in (0, 7)] == [1, 1]


@pytest.mark.parametrize("length", [{"batches": 100}, {"seconds": 1000.0}])
def test_views_of_a_resumed_run_are_as_large_as_before(length: dict[str, Any]) -> None:
    """Those of the first batches are ordered before the first step."""
    schedule = Schedule(0.1, 0.0, 0, **length)
    schedule.load_state_dict(
        {"batches": 95, "elapsed": 950.0, "begun": 0.0, "step_seconds": 10.0, "ended": False}
    )
    assert resolution_of(95, schedule) == 0


def test_crops_are_resized_and_blurred_in_proportion() -> None:
    crop, blur = RandomResizedCrop((64, 64)), GaussianBlur((0.1, 0.6))
    views = Views([[crop, HorizontalFlip(), blur], [HorizontalFlip()]], shortest=100)
    small = views.resized(0.5, lambda side: 8 * round(side / 8))
    (first, steps), (none, others) = small._pipelines
    assert first is not None
    assert first.size == (32, 32)
    assert steps == [HorizontalFlip(), GaussianBlur((0.1, 0.3))]
    assert none is None
    assert others == [HorizontalFlip()]


def test_a_pixel_is_the_mean_of_those_it_stands_for() -> None:
    views = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    views = views.contiguous(memory_format=torch.channels_last)
    small = shrink(views, 48)
    assert small.shape == (2, 3, 48, 48)
    assert small.dtype == torch.uint8
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert small.float().mean() == pytest.approx(float(views.float().mean()), abs=1)
    block = torch.full((1, 3, 96, 96), 10, dtype=torch.uint8)
    block[..., 48:] = 200
    half = shrink(block, 48)[0, 0, 24]
    assert half[:22].eq(10).all()
    assert half[26:].eq(200).all()
    assert shrink(small, 96) is small


@pytest.mark.parametrize(("batch", "sides"), [(1, [40, 16]), (95, [84, 32])])
def test_a_full_side_is_kept_whatever_the_backbone_prefers(batch: int, sides: list[int]) -> None:
    """84 pixels are not a multiple of 8, which smaller views for a CNN are."""
    views = [torch.zeros(2, 3, side, side, dtype=torch.uint8) for side in (84, 32)]
    schedule, logged = Schedule(0.1, 0.0, 0, batches=100), {}
    schedule.batches = batch
    module: Any = SimpleNamespace(log=logged.__setitem__)
    callback = ProgressiveResizing(schedule, build_encoder("test_resnet", 84), [84, 32])
    data = Batch(views, torch.arange(2), [], [])
    callback.on_train_batch_start(module, module, data, 0)
    assert [view.shape[-1] for view in data.views] == sides
    assert logged == {"view_size": sides[0]}
