"""What every pretext must hold, over all that are listed."""

import copy
import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from tests.conftest import prepared, required
from vissl_lite import inference
from vissl_lite.data.images import find_images
from vissl_lite.data.stream import Batch, Key, ViewDataset, collate
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import build_optimizer
from vissl_lite.pretext import PRETEXTS, PretextTask, pretext_class
from vissl_lite.pretext.base import BACKBONE_KINDS
from vissl_lite.pretext.modules.visualization import visualization_of
from vissl_lite.training.freezing import train_only
from vissl_lite.training.resizing import shrink

EXAMPLES = {
    "any": ["test_resnet", "test_vit"],
    "ViT": ["test_vit", "vit_slim_patch4_32"],
    "any ViT": ["test_vit", "vit_slim_patch4_32"],
    "CNN": ["test_resnet", "test_efficientnet"],
    "patches": ["test_vit", "vit_slim_patch4_32"],
}
FIRST = [(name, EXAMPLES[made.info.backbones][0]) for name, made in PRETEXTS.items()]
PAIRS = [
    (name, backbone)
    for name, made in PRETEXTS.items()
    for backbone in EXAMPLES[made.info.backbones]
]
every_pretext = pytest.mark.parametrize(("name", "backbone"), FIRST)
every_pair = pytest.mark.parametrize(("name", "backbone"), PAIRS)


# A loss can't fall below the entropy of what a teacher says: let it be sure of itself.
SHARP = {
    "dino": {"teacher_temperature": 0.005, "warm_teacher_temperature": 0.005},
    "ibot": {"teacher_temperature": 0.005, "warm_teacher_temperature": 0.005},
    "dinov2": {"teacher_temperature": 0.005, "warm_teacher_temperature": 0.005},
}


def make_task(name: str, backbone: str, **options: Any) -> PretextTask:
    torch.manual_seed(0)
    size = 64 if backbone == "test_vit" and pretext_class(name).info.family == "masked" else 32
    options = required(name) | options
    return prepared(pretext_class(name)(build_encoder(backbone, size), **options))


def make_batch(task: PretextTask, photos: Path, first: int = 0) -> Batch:
    dataset = ViewDataset(find_images([photos]), task.views(), seed=0)
    keys: list[Key] = [(0, index) for index in range(first, first + 12)]
    return collate([dataset[key] for key in keys])


def task_and_batch(name: str, backbone: str, photos: Path) -> tuple[PretextTask, Batch]:
    task = make_task(name, backbone)
    return task, make_batch(task, photos)


@pytest.mark.slow
@every_pretext
def test_learns_with_weights_and_buffers_in_bf16(name: str, backbone: str, photos: Path) -> None:
    """``--precision bf16-true``, with which new tensors are in bf16 too unless told otherwise."""
    precision = HalfPrecision("bf16-true")
    task, batch = task_and_batch(name, backbone, photos)
    precision.convert_module(task)
    with precision.forward_context():
        task.training_step(batch, 0)
        loss = task.training_step(batch, 1)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("spark", "test_convnext"),
        ("mae", "test_vit3"),
        ("simmim", "test_vit2"),
        ("ijepa", "test_vit4"),
    ],
)
def test_layers_after_the_map_are_frozen_where_it_is_all_that_counts(
    name: str, backbone: str, photos: Path
) -> None:
    """DistributedDataParallel waits for a gradient of each weight that is trained."""
    task = pretext_class(name)(build_encoder(backbone, 64))
    task.training_step(make_batch(task, photos), 0).backward()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    frozen = {n for n, p in task.encoder.named_parameters() if not p.requires_grad}
    assert frozen
    assert all("fc_norm" in n or "attn_pool" in n or "head" in n for n in frozen - {"pos_embed"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backbone"), [pair for pair in FIRST if PRETEXTS[pair[0]].info.any_size]
)
def test_views_that_grow_can_be_learned_from_at_each_size(
    name: str, backbone: str, photos: Path
) -> None:
    task = prepared(pretext_class(name)(build_encoder(backbone, 64), **required(name)))
    batch = make_batch(task, photos)
    for share in (0.5, 0.75, 1.0):
        fitting = task.encoder.fitting_size
        small = [shrink(view, fitting(view.shape[-1] * share)) for view in batch.views]
        assert small[0].shape[-1] == 64 * share
        loss = task.training_step(batch._replace(views=small), 0)
        loss.backward()
        assert loss.isfinite()


@pytest.mark.slow
@every_pair
def test_a_step_reaches_the_encoder_and_moves_a_teacher_only_afterwards(
    name: str, backbone: str, photos: Path
) -> None:
    task, batch = task_and_batch(name, backbone, photos)
    assert len(batch.views) == len(task.views())
    for view in batch.views:
        assert view.dtype == torch.uint8
        assert view.shape == (12, 3, view.shape[3], view.shape[3])
        assert view.is_contiguous(memory_format=torch.channels_last)
    teacher = {n: p for n, p in task.named_parameters() if "teacher" in n or "target" in n}
    before = {n: p.clone() for n, p in teacher.items()}
    loss = task.training_step(batch, 0)
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()
    gradients = [p.grad for p in task.encoder.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients if g is not None)
    # what DistributedDataParallel waits for
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    for parameter_name, parameter in teacher.items():
        assert parameter.grad is None, parameter_name
        assert not parameter.requires_grad
    with torch.no_grad():  # as an optimizer would
        for parameter in task.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad.sign()
    assert all(torch.equal(before[n], p) for n, p in teacher.items())
    task.after_step()
    if teacher:
        assert not all(torch.equal(before[n], p) for n, p in teacher.items())


@pytest.mark.parametrize("name", ["byol", "densecl", "moco", "moco_v3"])
def test_a_momentum_teacher_follows_quickly_in_the_first_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretextTask, "largest_momentum", 0.1)
    task = make_task(name, "test_resnet")
    teacher = task.get_submodule("teacher_encoder")
    before = [parameter.clone() for parameter in teacher.parameters()]
    with torch.no_grad():
        for parameter in task.encoder.parameters():
            parameter += 1
    task.after_step()
    for now, old in zip(teacher.parameters(), before, strict=True):
        torch.testing.assert_close(now, old + 0.9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, made in PRETEXTS.items() if "test_vit" in EXAMPLES[made.info.backbones]]
)
def test_low_rank_adapters_are_all_that_is_trained_of_an_encoder(name: str, photos: Path) -> None:
    encoder = build_encoder("test_vit", 64)
    train_only(encoder, "lora:4")
    task = prepared(pretext_class(name)(encoder, **required(name)))
    before = {n: p.clone() for n, p in task.named_parameters()}
    optimizer = task.configure_optimizers()
    for _ in range(2):  # the first step moves the factors that are zero, the second the others
        task.training_step(make_batch(task, photos), 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step()
    moved = {n for n, p in task.named_parameters() if not torch.equal(p, before[n])}
    factors = {n for n in before if n.endswith((".weight.0.a", ".weight.0.b"))}
    trained = {n for n in factors if n.startswith("encoder.")}
    assert {n for n in moved if n.startswith("encoder.")} == trained
    assert len(trained) == 6 * 2 * 2
    teachers = {n for n in before if n.startswith(("teacher_encoder.", "target_encoder."))}
    assert teachers & moved == teachers & factors


@pytest.mark.slow
@every_pretext
def test_loss_falls_when_a_batch_is_repeated(name: str, backbone: str, photos: Path) -> None:
    task = make_task(name, backbone, **SHARP.get(name, {}))
    batch = make_batch(task, photos)
    optimizer = build_optimizer(task, task.optimizer_settings)
    losses = []
    state = {key: value.clone() for key, value in task.named_buffers()}
    for _ in range(25):
        torch.manual_seed(1)  # the same labels where a loss draws them
        for key, value in task.named_buffers():
            value.copy_(state[key])  # a queue full of the same images would be another task
        loss = task.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.9 * losses[0]


@pytest.mark.slow
@every_pretext
def test_bf16_agrees_with_float32(name: str, backbone: str, photos: Path) -> None:
    task, batch = task_and_batch(name, backbone, photos)
    copied = copy.deepcopy(task)  # a step changes queues and centers
    torch.manual_seed(1)
    exact = task.training_step(batch, 0)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = copied.training_step(batch, 0)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backbone"),
    [("simclr", "test_resnet"), ("mae", "test_vit"), ("spark", "test_efficientnet")]
    + [one for one in FIRST if PRETEXTS[one[0]].trained_encoder is not PretextTask.trained_encoder],
)
def test_encoder_folder_loads_in_plain_timm_with_equal_outputs(
    name: str, backbone: str, tmp_path: Path
) -> None:
    task = make_task(name, backbone)
    save_encoder(task.trained_encoder(), tmp_path, {"pretext": name})
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    size = task.encoder.image_size
    images = task.encoder.normalize(torch.randint(256, (4, 3, size, size), dtype=torch.uint8))
    with torch.no_grad():
        ours = task.trained_encoder().eval()(images)
        torch.testing.assert_close(plain(images), ours)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backbone"), [("simclr", "test_resnet"), ("byol", "test_vit")])
def test_accumulating_two_batches_is_one_step(name: str, backbone: str, photos: Path) -> None:
    """The optimizer steps once, and so does the teacher: ``after_step`` is called once."""
    task = make_task(name, backbone)
    steps = []
    task.after_step = lambda: steps.append(task.global_step)  # type: ignore[method-assign]
    batches = [make_batch(task, photos, first) for first in (0, 12)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    before = [p.clone() for p in task.encoder.parameters()]
    trainer = pl.Trainer(
        max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, loader)
    assert len(steps) == 1
    assert any(
        not torch.equal(a, b) for a, b in zip(before, task.encoder.parameters(), strict=True)
    )


@pytest.mark.slow
@every_pretext
def test_everything_that_a_resumed_run_needs_is_in_the_state(
    name: str, backbone: str, photos: Path
) -> None:
    """Queues, centers and teachers included: a copy by ``state_dict`` goes on in the same way."""
    task, batch = task_and_batch(name, backbone, photos)
    optimizer = build_optimizer(task, task.optimizer_settings)
    for _ in range(2):
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        optimizer.step()
        task.after_step()
    torch.manual_seed(5)
    encoder = build_encoder(backbone, task.encoder.image_size)
    other = prepared(pretext_class(name)(encoder, **required(name)))
    other.load_state_dict(task.state_dict())
    torch.manual_seed(6)
    expected = task.training_step(make_batch(task, photos, 12), 0)
    torch.manual_seed(6)
    assert torch.equal(other.training_step(make_batch(task, photos, 12), 0), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n, made in PRETEXTS.items() if made.info.backbones != "any"]
)
def test_a_backbone_that_does_not_suit_names_some_that_do(name: str) -> None:
    kind = pretext_class(name).info.backbones
    wrong = "test_vit" if kind == "CNN" else "test_resnet"
    with pytest.raises(UserError, match=f"{name} needs .*{wrong} is not: try one of") as raised:
        pretext_class(name)(build_encoder(wrong, 32))
    assert len(str(raised.value).splitlines()) == 1
    for suggested in BACKBONE_KINDS[kind][1].split(", "):
        size = 32 if suggested.endswith("_32") else 224
        pretext_class(name)(build_encoder(suggested, size))


# What no hyperparameter of such a name can be, whatever the pretext.
IMPOSSIBLE = {
    "temperature": -0.1, "teacher_temperature": 0.0, "warm_teacher_temperature": 0.0,
    "momentum": 1.5, "queue_size": -1, "prototypes": 0, "hidden_size": 0, "projection_size": 0,
    "prediction_hidden_size": 0, "bottleneck_size": 0, "min_crop_scale": 0.0,
    "min_global_crop_scale": 2.0, "global_crops": 0, "mask_ratio": 1.0, "decoder_width": -1,
    "decoder_depth": -1, "permutations": 1, "patch_size": -1, "tile_size": -1, "gap": -1,
    "jitter": -1, "mask_unit": 5, "gray": 1.5, "masked": 0.0, "epsilon": 0.0,
    "sinkhorn_iterations": 0, "targets": 0, "predictor_width": 33, "dense_weight": 2.0,
    "tile_features": 0, "cell_size": 1, "uniform": 0.0, "predictor_depth": -1, "map_weight": -1.0,
    "teacher_size": 0, "label_smoothing": 1.0, "patch_weight": -1.0, "koleo_weight": -1.0,
}  # fmt: skip


@every_pretext
def test_hyperparameters_are_documented_and_impossible_ones_the_users_mistake(
    name: str, backbone: str
) -> None:
    made = pretext_class(name)
    parameters = list(inspect.signature(made).parameters.values())[1:]
    for parameter in parameters:
        assert parameter.default is not inspect.Parameter.empty
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"{parameter.name}:" in (made.__doc__ or "")
    for option_of_short_runs in made.info.short_run:
        assert inspect.signature(made).parameters[option_of_short_runs].default is None
    encoder = build_encoder(EXAMPLES[made.info.backbones][-1], 32)
    known = [p.name for p in parameters if p.name in IMPOSSIBLE]
    known += ["lambd"] if name in ("lejepa", "visreg", "barlow_twins") else []
    assert known
    for option in known:
        with pytest.raises(UserError) as raised:
            made(encoder, **required(name) | {option: IMPOSSIBLE.get(option, -1.0)}).views()
        assert len(str(raised.value).splitlines()) == 1, option
    # no labels of the user's, and no indices to look them up by
    assert list(inspect.signature(made.loss).parameters) == ["self", "views"]


def test_unknown_name_gives_the_close_ones() -> None:
    with pytest.raises(UserError, match="did you mean rotation"):
        pretext_class("rotations")


SEEN = {
    "rotation", "relative_patch", "jigsaw", "colorization", "inpainting", "mae", "simmim", "spark",
    "multi",
}  # fmt: skip


@pytest.mark.slow
@every_pretext
def test_showing_it_at_work_leaves_everything_as_it_was(
    name: str, backbone: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is most likely to break
    monkeypatch.setattr(inference, "cpu_gains_from_bf16", lambda: True)
    task, batch = task_and_batch(name, backbone, photos)
    task.training_step(batch, 0)  # queues and centers hold something
    next(task.encoder.model.children()).eval()  # as a user may have frozen a part
    state = copy.deepcopy(task.state_dict())
    modes = [module.training for module in task.modules()]
    random = torch.get_rng_state()
    views, paths = task.views(), find_images([photos])
    with monkeypatch.context() as patch:
        patch.setattr(task, "measure", lambda *_: pytest.fail("it is no step of the training"))
        shown, again = (visualization_of(task, paths, views, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in task.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in task.state_dict().items())
    task.training_step(batch, 0).backward()  # and it can be trained on
    assert (shown is not None) == (name in SEEN)
    if shown is None or again is None:
        return
    assert len(shown.rows) == 8
    for row, same in zip(shown.rows, again.rows, strict=True):
        assert len(row) == len(shown.columns)
        for picture, twin in zip(row, same, strict=True):
            assert picture.image.dtype == np.uint8
            assert picture.image.shape[2:] == (3,)
            assert np.array_equal(picture.image, twin.image)
    assert not np.array_equal(shown.rows[0][0].image, shown.rows[1][0].image)
