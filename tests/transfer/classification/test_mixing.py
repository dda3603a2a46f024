import pytest
import torch

from vissl_lite.transfer.classification.mixing import mix

# Each image has its class as the value of all its pixels, so that a mixed image tells its target.
VALUES = torch.arange(6.0)
IMAGES = VALUES[:, None, None, None].expand(6, 3, 16, 12).contiguous()
TARGETS = torch.eye(6)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_are_mixed_as_the_pixels_are(mixup: float, cutmix: float) -> None:
    cut = added = 0
    for seed in range(20):
        torch.manual_seed(seed)
        images, targets = mix(IMAGES, TARGETS, mixup, cutmix)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        torch.testing.assert_close(images.mean(dim=(1, 2, 3)), targets @ VALUES, atol=1e-4, rtol=0)
        whole = bool((images == images[:, :, :1, :1]).all())
        added += whole and not torch.equal(images, IMAGES)
        cut += not whole
    assert (cut > 0) == (cutmix > 0)
    assert (added > 0) == (mixup > 0)
    assert torch.equal(IMAGES[:, 0, 0, 0], VALUES)  # the batch itself is left as it is


def test_nothing_is_mixed_by_default_and_the_seed_decides() -> None:
    images, targets = mix(IMAGES, TARGETS, 0.0, 0.0)
    assert images is IMAGES
    assert targets is TARGETS
    torch.manual_seed(1)
    first, _ = mix(IMAGES, TARGETS, 0.8, 1.0)
    torch.manual_seed(1)
    assert torch.equal(first, mix(IMAGES, TARGETS, 0.8, 1.0)[0])
