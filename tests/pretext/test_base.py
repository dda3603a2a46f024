from types import SimpleNamespace

import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext.dino import DINO


@pytest.mark.slow
def test_float16_gradients_are_clipped_without_their_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = []
    for scale in (None, 1024.0):
        torch.manual_seed(0)
        task = DINO(build_encoder("test_vit", 32))
        optimizer = task.configure_optimizers()
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
        monkeypatch.setattr(task, "_trainer", trainer)
        weights = list(task.head.parameters())
        loss = sum(weight.square().sum() for weight in weights)
        (loss if scaler is None else scaler.scale(loss)).backward()
        task.on_before_optimizer_step(optimizer)
        steps.append(torch.cat([w.grad.flatten() for w in weights if w.grad is not None]))
        assert steps[-1].norm() == pytest.approx(task.optimizer_settings.clip_norm, rel=1e-3)
    torch.testing.assert_close(steps[0], steps[1])
