import copy
import itertools

import pytest
import timm
import torch
from torch import nn

from vissl_lite.errors import UserError
from vissl_lite.optim import (
    OptimizerSettings,
    build_optimizer,
    canonical_optimizer,
    check_has_betas,
    cosine_schedule,
    cosine_with_warmup,
    set_lr,
    set_weight_decay,
)

every_backbone = pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])


@pytest.mark.parametrize(
    ("fraction", "warmup", "expected"),
    [
        (0.0, 0.1, 0.0),
        (0.05, 0.1, 0.5),
        (0.1, 0.1, 1.0),
        (0.55, 0.1, 0.5),  # halfway down
        (1.0, 0.1, 0.0),
        (1.2, 0.1, 0.0),  # a time budget may be overrun by a step
        (0.0, 0.0, 1.0),
        (0.5, 0.0, 0.5),
        (1.0, 0.0, 0.0),
    ],
)
def test_cosine_with_warmup_at_its_corners(fraction: float, warmup: float, expected: float) -> None:
    assert cosine_with_warmup(fraction, warmup) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("progress", "value"), [(0, 0.99), (0.5, 0.995), (1, 1.0)])
def test_cosine_rises_from_start_to_end(progress: float, value: float) -> None:
    assert cosine_schedule(0.99, 1.0, progress) == pytest.approx(value)


def test_the_rate_rises_once_and_falls_once_without_a_jump() -> None:
    rates = [cosine_with_warmup(step / 1000, 0.2) for step in range(1001)]
    assert rates[:201] == sorted(rates[:201])
    assert rates[200:] == sorted(rates[200:], reverse=True)
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) < 0.006


@every_backbone
@pytest.mark.parametrize(("name", "layer_decay"), [("adamw", 0.5), ("sgd", 1.0), ("lars", 1.0)])
def test_weights_decay_and_biases_and_norms_do_not(
    name: str, layer_decay: float, backbone: str
) -> None:
    model = timm.create_model(backbone, num_classes=3)
    settings = OptimizerSettings(name, weight_decay=0.3, layer_decay=layer_decay)
    decay = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(model, settings).param_groups
        for parameter in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    for key, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and key not in exempt
        assert decay[id(parameter)] == (0.3 if matrix else 0.0), key


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = build_optimizer(model, OptimizerSettings()).param_groups
    kept = {id(parameter) for group in groups for parameter in group["params"]}
    assert kept == {id(parameter) for parameter in model[1].parameters()}


@every_backbone
def test_layer_decay_scales_the_rate_down_from_the_last_layer(backbone: str) -> None:
    model = timm.create_model(backbone, num_classes=3)
    optimizer = build_optimizer(model, OptimizerSettings(lr=0.1, layer_decay=0.5))
    set_lr(optimizer, 2.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {key: rate[id(p)] for key, p in model.named_parameters()}
    first, last = next(iter(rates)), list(rates)[-1]
    assert rates[last] == max(rates.values()) == 2.0
    assert rates[first] == min(rates.values()) < 0.5
    values = sorted(set(rates.values()))
    assert all(b == pytest.approx(2 * a) for a, b in itertools.pairwise(values))


def test_a_layer_of_a_resnet_is_a_stage() -> None:
    """A deeper network of the same stages has the same rates."""
    scales = []
    for backbone in ("resnet18", "resnet50"):
        with torch.device("meta"):
            model = timm.create_model(backbone, num_classes=3)
        groups = build_optimizer(model, OptimizerSettings("lars", layer_decay=0.5)).param_groups
        scales.append({group["lr_scale"] for group in groups})
    assert scales[0] == scales[1] == {0.5**power for power in range(6)}


@pytest.mark.parametrize(("backbone", "decays"), [("test_resnet", False), ("test_vit", True)])
def test_by_default_only_a_plain_vit_has_layer_decay(backbone: str, decays: bool) -> None:
    settings = OptimizerSettings(layer_decay=None)
    groups = build_optimizer(timm.create_model(backbone), settings).param_groups
    scales = sorted({group["lr_scale"] for group in groups}, reverse=True)
    assert (len(scales) > 1) == decays
    assert scales == pytest.approx([0.75**power for power in range(len(scales))])


def test_layers_that_are_not_known_have_no_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 2))  # as a timm model without ``group_matcher``
    build_optimizer(model, OptimizerSettings(layer_decay=None))
    with pytest.raises(UserError, match="--layer_decay: timm does not say which layers"):
        build_optimizer(model, OptimizerSettings(layer_decay=0.5))


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_layer_decay_leaves_out_what_keeps_the_full_rate(decay: float) -> None:
    encoder, head = timm.create_model("test_vit", num_classes=0), nn.Linear(8, 2)
    settings = OptimizerSettings(layer_decay=decay, head_scale=10.0)
    module, names = nn.ModuleList([encoder, head]), {"patch_embed.proj.weight"}
    groups = build_optimizer(module, settings, encoder, full_rate=names).param_groups
    group = {id(parameter): one for one in groups for parameter in one["params"]}
    first = group[id(encoder.patch_embed.proj.weight)]
    assert (first["lr_scale"], first["in_encoder"], first["decayed"]) == (1, True, True)
    assert group[id(encoder.patch_embed.proj.bias)]["lr_scale"] == pytest.approx(decay**6)
    assert group[id(head.weight)]["lr_scale"] == 10


def test_layer_decay_and_exemptions_of_an_encoder_in_a_model() -> None:
    encoder, head = timm.create_model("test_vit", num_classes=0), nn.Linear(8, 2)
    settings = OptimizerSettings(layer_decay=0.5, weight_decay=0.3)
    groups = build_optimizer(nn.ModuleList([encoder, head]), settings, encoder).param_groups
    group = {id(parameter): one for one in groups for parameter in one["params"]}
    assert group[id(head.weight)]["lr_scale"] == 1
    assert group[id(head.weight)]["weight_decay"] == 0.3
    assert group[id(encoder.pos_embed)]["lr_scale"] < 0.5
    assert group[id(encoder.pos_embed)]["weight_decay"] == 0


@pytest.mark.parametrize("backbone", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_what_timm_excludes_does_not_decay_wherever_the_model_is(backbone: str) -> None:
    with torch.device("meta"):
        encoder, head = timm.create_model(backbone, num_classes=0), nn.Linear(8, 2)
    module = nn.ModuleList([nn.Sequential(encoder), head])
    groups = build_optimizer(module, OptimizerSettings(weight_decay=0.3)).param_groups
    decay = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
    excluded = [p for n, p in encoder.named_parameters() if n in encoder.no_weight_decay()]
    assert any(parameter.ndim > 1 for parameter in excluded)
    assert {decay[id(parameter)] for parameter in excluded} == {0.0}
    assert decay[id(head.weight)] == 0.3


@pytest.mark.parametrize("start", [0.0, 0.04])
def test_weight_decay_follows_a_cosine_and_biases_still_have_none(start: float) -> None:
    model = nn.Linear(2, 2)
    settings = OptimizerSettings(weight_decay=start, weight_decay_end=0.4)
    optimizer = build_optimizer(model, settings)
    for progress, expected in ((0.0, start), (0.5, (start + 0.4) / 2), (1.0, 0.4)):
        set_weight_decay(optimizer, progress)
        decay = {
            id(p): group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert decay[id(model.weight)] == pytest.approx(expected)
        assert decay[id(model.bias)] == 0


def test_without_an_end_the_weight_decay_stays() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerSettings(weight_decay=0.3))
    set_weight_decay(optimizer, 1.0)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}


def test_one_part_keeps_the_peak_rate() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = build_optimizer(model, OptimizerSettings("sgd", lr=0.5), constant=model[1])
    set_lr(optimizer, 0.1)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rate[id(parameter)] for parameter in model.parameters()] == [0.1, 0.1, 0.5, 0.5]


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_a_part_may_get_its_first_gradient_later(name: str) -> None:
    """As a last layer that is frozen at first does; the fused kernel of SGD is not made for it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = build_optimizer(module, OptimizerSettings(name, lr=0.1, weight_decay=0.01))
    expected = copy.deepcopy(module)
    momentum: dict[str, torch.Tensor] = {}
    for step in range(4):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        if step < 2:
            module[1].weight.grad = None
        with torch.no_grad():
            for key, parameter in expected.named_parameters():
                gradient = module.get_parameter(key).grad
                if gradient is None:
                    continue
                gradient = gradient + (0.01 * parameter if parameter.ndim > 1 else 0)
                before = momentum.get(key, torch.zeros_like(parameter))
                momentum[key] = 0.9 * before + gradient
                ahead = name == "sgd"  # timm's name for Nesterov's
                parameter -= 0.1 * (gradient + 0.9 * momentum[key] if ahead else momentum[key])
        optimizer.step()
    for (key, ours), theirs in zip(module.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)


def test_betas() -> None:
    (group, *_) = build_optimizer(nn.Linear(2, 2), OptimizerSettings(betas=(0.8, 0.9))).param_groups
    assert group["betas"] == (0.8, 0.9)
    with pytest.raises(UserError, match="--betas: sgd has none"):
        check_has_betas("sgd")


@pytest.mark.parametrize(("clip_norm", "own"), [(0.0, 1.0), (5.0, None)])
def test_lamb_clips_by_itself_only_without_a_norm_of_ours(
    clip_norm: float, own: float | None
) -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerSettings("lamb", clip_norm=clip_norm))
    assert optimizer.defaults["max_grad_norm"] == own


def test_set_lr_is_the_same_for_all_without_layer_decay() -> None:
    optimizer = build_optimizer(timm.create_model("test_vit", num_classes=3), OptimizerSettings())
    set_lr(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_set_lr_counts_from_the_peak_each_time() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    optimizer = build_optimizer(model, OptimizerSettings(layer_decay=0.5))
    set_lr(optimizer, 2.0)
    once = [group["lr"] for group in optimizer.param_groups]
    set_lr(optimizer, 5.0)
    set_lr(optimizer, 2.0)
    assert [group["lr"] for group in optimizer.param_groups] == once


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lars", "lamb"])
def test_each_optimizer_moves_the_weights_downhill(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, OptimizerSettings(name, lr=1e-2, weight_decay=0.0))
    x = torch.randn(16, 4)
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamww", "unknown optimizer adamww: did you mean .*adamw"),
        ("sdg", "did you mean .*sgd"),
        ("qqqqqqq", "none of the .* known names is close to it"),
        ("adahessian", "needs second derivatives"),
    ],
)
def test_an_unknown_optimizer_is_a_mistake(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        canonical_optimizer(name)


def test_a_known_optimizer_is_fine() -> None:
    for name in ("adamw", "sgd", "lars"):
        canonical_optimizer(name)
