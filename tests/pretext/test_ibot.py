import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.ibot import IBOT, draw_masks


def test_half_of_the_images_get_a_tenth_to_half_of_their_patches_masked() -> None:
    torch.manual_seed(0)
    shares = draw_masks(400, 8, 8).flatten(1).float().mean(dim=1)
    masked = shares[shares > 0]
    assert len(masked) / 400 == pytest.approx(0.5, abs=0.08)
    assert masked.max() <= 0.52
    assert masked.mean() == pytest.approx(0.3, abs=0.05)


def test_a_batch_never_goes_without_a_mask() -> None:
    assert all(draw_masks(1, 2, 2).any() for _ in range(50))


@pytest.mark.slow
def test_the_student_does_not_see_masked_patches_and_the_teacher_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    task = IBOT(build_encoder("vit_slim_patch4_32", 32), prototypes=16)
    mask = torch.zeros(4, 8, 8, dtype=torch.bool)
    mask[:, :4] = True  # the upper half
    monkeypatch.setattr("vissl_lite.pretext.ibot.draw_masks", lambda *_: mask)
    seen: dict[str, torch.Tensor] = {}
    for name in ("encoder", "teacher_encoder"):
        first = getattr(task, name).model.blocks[0]
        first.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].detach()}))
    views = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    task.loss(views)
    before = dict(seen)
    for view in views:
        view[:, :, :16] += 1.0
    task.loss(views)
    assert torch.equal(before["encoder"], seen["encoder"])
    assert not torch.equal(before["teacher_encoder"], seen["teacher_encoder"])
