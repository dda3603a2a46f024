import pytest
import torch
from torch import nn

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.optim import build_optimizer
from vissl_lite.pretext.dino import DINO
from vissl_lite.pretext.modules.losses import Center


def made(**options: object) -> DINO:
    torch.manual_seed(0)
    return DINO(build_encoder("test_resnet", 32), prototypes=16, **options)


@pytest.mark.parametrize(
    ("progress", "value"), [(0.0, 0.04), (0.15, 0.055), (0.3, 0.07), (1, 0.07)]
)
def test_the_teachers_temperature_warms_up(
    progress: float, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = made(teacher_temperature=0.07, warm_teacher_temperature=0.04, temperature_warmup=0.3)
    task.progress = progress
    used: list[float] = []
    targets = Center.targets
    monkeypatch.setattr(
        Center,
        "targets",
        lambda one, x, temperature: targets(one, x, used.append(temperature) or 1),
    )
    task.loss([torch.randn(4, 3, 32, 32) for _ in range(2)])
    assert used == [pytest.approx(value)]


@pytest.mark.slow
@pytest.mark.parametrize(("progress", "moves"), [(0.0, False), (0.5, True)])
def test_the_last_layer_stays_at_first(progress: float, moves: bool) -> None:
    task = made(freeze_last_layer=0.1)
    task.progress = progress
    optimizer = build_optimizer(task, task.optimizer_settings)
    before = task.head.prototypes.weight.clone()
    task.loss([torch.randn(4, 3, 32, 32) for _ in range(2)]).backward()
    task.on_after_backward()
    optimizer.step()
    assert torch.equal(before, task.head.prototypes.weight) != moves


def test_weight_decay_rises_for_transformers_alone() -> None:
    assert made().optimizer_settings.weight_decay_end is None
    vit = DINO(build_encoder("test_vit", 32), prototypes=16)
    assert vit.optimizer_settings.weight_decay_end == 0.4


def test_the_teacher_is_what_a_run_saves() -> None:
    task = made()
    assert task.trained_encoder() is task.teacher_encoder
    assert task.trained_encoder() is not task.encoder


def test_the_batch_norm_of_the_head_sees_all_crops_at_once() -> None:
    """As ``MultiCropWrapper`` of the authors' code, which runs the head on all outputs."""
    task = made()
    assert isinstance(task.head.layers[1], nn.BatchNorm1d)
    sizes: list[int] = []
    task.head.layers[1].register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    task.loss([torch.randn(3, 3, side, side) for side in (32, 32, 16)])
    assert sizes == [9]


@pytest.mark.slow
def test_the_loss_leaves_out_equal_views_and_centers_the_teacher() -> None:
    """Algorithm 1 with two large crops and one small one, term by term."""
    task = made().eval()
    views = [torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    with torch.no_grad():
        task.center.mean.normal_(std=0.1)
        center = task.center.mean.clone()
        student = [task.head(task.encoder(view)) for view in views]
        teacher = [task.teacher_head(task.teacher_encoder(view)) for view in views[:2]]
        terms = []
        for t, target in enumerate(teacher):
            for s, score in enumerate(student):
                if s != t:
                    p = ((target - center) / 0.04).softmax(dim=1)
                    terms.append(-(p * (score / 0.1).log_softmax(dim=1)).sum(dim=1).mean())
        assert task.loss(views).item() == pytest.approx(float(torch.stack(terms).mean()), rel=1e-4)
    expected = 0.9 * center + 0.1 * torch.cat(teacher).mean(dim=0)
    torch.testing.assert_close(task.center.mean, expected)
