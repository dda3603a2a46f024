import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from tests.conftest import blobs, without_pictures
from vissl_lite.cli import main
from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.data.fingerprints import Fingerprints
from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import find_images
from vissl_lite.data.stream import Key, ViewDataset, collate
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.errors import UserError
from vissl_lite.inference import predict_images
from vissl_lite.pretext.distillation import (
    LARGEST_MAP,
    LONGEST_WAIT,
    TEACHER,
    Distillation,
    Teacher,
    mixup,
    pairwise_distillation,
    similarity_distillation,
)
from vissl_lite.run_folder import lock
from vissl_lite.training.checkpoints import read_checkpoint


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def slow_similarity(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float) -> float:
    total = 0.0
    for one, target in zip(student.tolist(), teacher.tolist(), strict=True):
        others = [target, *queue.tolist()]
        p, q = (
            [math.exp(cosine(z, other) / temperature) for other in others] for z in (target, one)
        )
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True))
    return total / len(student)


def slow_pairwise(student: Tensor, teacher: Tensor) -> float:
    total, count = 0.0, 0
    for one, other in zip(student.flatten(2), teacher.flatten(2), strict=True):
        s, t = one.T.tolist(), other.T.tolist()
        for i in range(len(s)):
            for j in range(len(s)):
                total += (cosine(t[i], t[j]) - cosine(s[i], s[j])) ** 2
                count += 1
    return total / count


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_similarities_to_a_queue(temperature: float) -> None:
    student, teacher = 3 * torch.randn(4, 5), torch.randn(4, 5)
    queue = torch.nn.functional.normalize(torch.randn(7, 5), dim=1)
    found = similarity_distillation(student, teacher, queue, temperature)
    expected = slow_similarity(student, teacher, queue, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_a_student_that_agrees_has_no_loss_and_no_gradient() -> None:
    teacher, queue = torch.randn(4, 5), torch.eye(5)
    student = (2 * teacher).requires_grad_()
    loss = similarity_distillation(student, teacher, queue, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-5


def test_similarities_between_positions() -> None:
    student, teacher = torch.randn(2, 4, 2, 3), torch.randn(2, 6, 2, 3)
    found = pairwise_distillation(student, 5 * teacher)
    assert found.item() == pytest.approx(slow_pairwise(student, teacher), rel=1e-4)


@pytest.mark.parametrize("side", [2, 7])
def test_the_teachers_map_is_resized_to_the_students(side: int) -> None:
    student, teacher = torch.randn(2, 4, 3, 3), torch.randn(2, 6, side, side)
    resized = interpolate(teacher, size=(3, 3), mode="bilinear", antialias=True)
    found = pairwise_distillation(student, teacher)
    assert found.item() == pytest.approx(slow_pairwise(student, resized), rel=1e-4)


def test_a_large_map_is_compared_at_a_lower_resolution() -> None:
    large = torch.randn(1, 4, LARGEST_MAP, LARGEST_MAP).repeat_interleave(2, 2)
    large = large.repeat_interleave(2, 3)
    small = interpolate(large, size=(LARGEST_MAP,) * 2, mode="bilinear", antialias=True)
    teacher = torch.randn(1, 3, 5, 5)
    expected = pairwise_distillation(small, teacher)
    torch.testing.assert_close(pairwise_distillation(large, teacher), expected)


def test_mixup_mixes_each_image_with_another() -> None:
    images = torch.randn(6, 3, 4, 4)
    mixed, partner = mixup(images), images.roll(1, 0)
    shares = ((mixed - partner) / (images - partner)).flatten(1)
    assert (shares.amax(dim=1) - shares.amin(dim=1)).max() < 1e-3  # one for the whole image
    assert ((shares > 0) & (shares < 1)).all()
    assert shares[:, 0].std() > 0.05


def saved(folder: Path, backbone: str = "test_resnet", seed: int = 0, size: int = 48) -> Path:
    """An encoder folder with a normalization of its own."""
    torch.manual_seed(seed)
    encoder = build_encoder(backbone, size)
    encoder.model.pretrained_cfg |= {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]}
    save_encoder(encoder, folder, {})
    return folder


def test_the_teacher_has_its_own_size_and_normalization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Distillation(
        build_encoder("test_resnet", 32), str(saved(tmp_path)), mixup=False, queue_size=8
    )
    teacher, seen = task.teacher.encoder, []
    monkeypatch.setattr(
        teacher.model, "forward_features", record(teacher.model.forward_features, seen)
    )
    raw = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    task.loss([task.encoder.normalize(raw)])
    resized = interpolate(raw.float(), size=(48, 48), mode="bilinear")
    mean, std = torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.5, 0.6, 0.7])
    expected = (resized / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-4)


def record(function: Callable[[Tensor], Tensor], seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def recorded(images: Tensor) -> Tensor:
        seen.append(images)
        return function(images)

    return recorded


def test_embeddings_are_centered_and_queued_after_the_loss() -> None:
    task = Distillation(
        build_encoder("test_resnet", 32), "random:test_resnet", queue_size=5, temperature=0.2
    )
    torch.nn.init.normal_(task.head.bias)
    queue, mean = task.queue.items.clone(), torch.zeros(task.head.out_features)
    for step in range(4):
        pooled, target = torch.randn(2, task.head.in_features), torch.rand(2, len(mean))
        found = task._global_loss(pooled, target)
        target = normalize(target, dim=1)
        expected = slow_similarity(task.head(pooled), target - mean, queue - mean, 0.2)
        assert found.item() == pytest.approx(expected, rel=1e-3)
        for one in range(2):
            queue[(2 * step + one) % 5] = target[one]
        mean = 0.9 * mean + 0.1 * target.mean(dim=0)


def test_a_smaller_size_for_the_teacher(tmp_path: Path) -> None:
    student = build_encoder("test_resnet", 32)
    assert Teacher(str(saved(tmp_path)), None, student).encoder.image_size == 48
    assert Teacher(str(saved(tmp_path)), 40, student).encoder.image_size == 40
    with pytest.raises(UserError, match="can't be built for 33 pixels"):
        Teacher("random:test_vit", 33, student)


def test_both_networks_see_the_mixed_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Distillation(build_encoder("test_resnet", 48), str(saved(tmp_path)), queue_size=8)
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, encoder in (("student", task.encoder), ("teacher", task.teacher.encoder)):
        model = encoder.model
        monkeypatch.setattr(model, "forward_features", record(model.forward_features, seen[name]))
    view = task.encoder.normalize(torch.randint(256, (4, 3, 48, 48), dtype=torch.uint8))
    task.loss([view])
    student, teacher = task.encoder, task.teacher.encoder
    raw = (seen["student"][0] - student.shift) / student.scale
    torch.testing.assert_close(teacher.normalize(raw), seen["teacher"][0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(seen["student"][0], view)


def test_the_teacher_stays_as_it_is_and_is_no_part_of_the_task(tmp_path: Path) -> None:
    task = Distillation(build_encoder("test_resnet", 32), str(saved(tmp_path)), queue_size=8)
    names = {name.split(".")[0] for name in task.state_dict()}
    assert names == {"encoder", "head", "queue", "center"}
    assert {name.split(".")[0] for name, _ in task.named_parameters()} == {"encoder", "head"}
    before = {name: one.clone() for name, one in task.teacher.encoder.state_dict().items()}
    task.train()
    task.loss([torch.randn(4, 3, 32, 32)]).backward()
    assert not any(module.training for module in task.teacher.encoder.modules())
    after = task.teacher.encoder.state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())
    assert all(one.grad is None for one in task.teacher.encoder.parameters())


def test_a_random_teacher_follows_its_name_and_leaves_the_generator_alone() -> None:
    student, digests = build_encoder("test_resnet", 32), set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        digests.add(Teacher("random:test_vit", None, student).digest)
        assert torch.equal(torch.get_rng_state(), before)
    assert len(digests) == 1


def test_a_resumed_run_needs_the_same_teacher(tmp_path: Path) -> None:
    student = build_encoder("test_resnet", 32)
    one, other = (str(saved(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    checkpoint: dict[str, Any] = {}
    Distillation(student, one).on_save_checkpoint(checkpoint)
    Distillation(student, one).on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="teacher is not the one that the run began with"):
        Distillation(student, other).on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="teacher is not the one that the run began with"):
        Distillation(student, one, teacher_size=40).on_load_checkpoint(checkpoint)


def test_a_missing_teacher_says_what_to_give(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", photos, "--out", tmp_path / "run", "--pretext", "distillation"]
    assert main(["pretrain", *map(str, given), "--backbone", "test_resnet"]) == 2
    assert "give --pretext.teacher with a run, an encoder folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_path_as_teacher_is_text_in_the_config(tmp_path: Path) -> None:
    pretext = {"name": "distillation", "teacher": tmp_path}
    options = PretrainOptions(data=["photos"], out="run", pretext=pretext)
    assert options.as_config()["pretext"]["teacher"] == str(tmp_path)


@pytest.mark.parametrize(
    ("student", "teacher"), [("test_resnet", "test_vit"), ("test_vit", "test_resnet")]
)
def test_cnns_learn_from_vits_and_back(student: str, teacher: str) -> None:
    losses = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        encoder = build_encoder(student, 64)
        task = Distillation(encoder, f"random:{teacher}", map_weight=weight, queue_size=8)
        loss = task.loss([torch.randn(4, 3, 64, 64)])
        loss.backward()
        losses.append(loss.item())
    assert losses[1] > losses[0] > 0  # the maps have several positions


def test_a_map_of_one_position_is_said_once_and_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    losses = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        task = Distillation(
            build_encoder("resnet10t_slim", 32), "random:test_vit", map_weight=weight
        )
        view = torch.randn(4, 3, 32, 32)
        with caplog.at_level(logging.WARNING):
            losses.append([task.loss([view]).item() for _ in range(2)])
    assert losses[0] == losses[1]
    assert len(caplog.records) == 1
    assert "resnet10t_slim, the student, at 32 pixels has fewer than 2x2" in caplog.text


def test_backbones_of_several_maps_are_refused_before_the_training() -> None:
    student = build_encoder("crossvit_9_240")
    with pytest.raises(UserError, match=r"several feature maps.*give --pretext.map_weight 0"):
        Distillation(student, "random:test_resnet")
    Distillation(student, "random:test_resnet", map_weight=0)
    Distillation(student, "random:test_resnet", fixed_views=True)


def test_small_views_of_progressive_resizing_are_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = Distillation(build_encoder("resnet10t_slim", 64), "random:test_vit")
    with caplog.at_level(logging.INFO, "vissl_lite"):
        for side in (32, 64):
            task.loss([torch.randn(4, 3, side, side)])
    assert not caplog.records


def test_a_teacher_of_photographs_is_adapted_to_bands() -> None:
    bands = ImageReader(
        bands=(0, 1), low=(0.0, 0.0), high=(9.0, 9.0), mean=(0.5, 0.4), std=(0.2, 0.1)
    )
    task = Distillation(build_encoder("test_resnet", 32, reader=bands), "random:test_vit")
    raw = torch.randint(2**16, (4, 2, 32, 32)).to(torch.uint16)
    assert task.loss([task.encoder.normalize(raw)]).isfinite()
    assert task.teacher.encoder.mean == (0.5, 0.4)


def of_bands(low: float, high: float, count: int = 1, **given: Any) -> ImageReader:
    """A reader of bands with the same range and different statistics."""
    ends = {"low": (low,) * count, "high": (high,) * count}
    mean, std = tuple(0.2 + 0.1 * n for n in range(count)), (0.05,) * count
    given = {"bands": tuple(range(count)), **ends, "mean": mean, "std": std, **given}
    return ImageReader(**given)


PER_IMAGE = replace(of_bands(0, 1), low=(), high=(), scope="image")


def seen_by_teacher(
    folder: Path, teacher: ImageReader, student: ImageReader, raw: Tensor
) -> Tensor:
    """What the network of a teacher gets of images that a student's reader has read."""
    save_encoder(build_encoder("test_resnet", 32, reader=teacher), folder, {})
    encoder = build_encoder("test_resnet", 32, reader=student)
    task = Distillation(encoder, folder, mixup=False, map_weight=0, queue_size=8)
    seen: list[Tensor] = []
    forward = task.teacher.encoder.model.forward
    task.teacher.encoder.model.forward = record(forward, seen)
    assert task.loss([encoder.normalize(raw)]).isfinite()
    return seen[0]


def random_raw(reader: ImageReader) -> Tensor:
    raw = torch.randint(reader.max_value + 1, (4, reader.channels, 32, 32))
    return raw.to(torch.uint8 if reader.bands is None else torch.uint16)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (of_bands(-1000, 1000), of_bands(-50, 250, mean=(0.5,), std=(0.2,))),  # --window 100,300
        (of_bands(-50, 250), of_bands(-1000, 1000, mean=(0.5,), std=(0.2,))),
        (of_bands(12, 240, 3), PHOTOGRAPHS),
        (PHOTOGRAPHS, of_bands(12, 240, 3)),
    ],
)
def test_the_teacher_sees_values_on_the_scale_of_its_training(
    tmp_path: Path, teacher: ImageReader, student: ImageReader, caplog: pytest.LogCaptureFixture
) -> None:
    raw = random_raw(student)
    with caplog.at_level(logging.INFO, "vissl_lite"):
        seen = seen_by_teacher(tmp_path, teacher, student, raw)
    assert "The teacher keeps its mean and standard deviation" in caplog.text
    units = raw.permute(0, 2, 3, 1).numpy()
    if student.bands is not None:
        units = student.to_units(units)
    scaled = units / 255
    if teacher.bands is not None:
        scaled = np.clip((units - teacher.low) / np.subtract(teacher.high, teacher.low), 0, 1)
    own = build_encoder("test_resnet", 32, reader=teacher)  # with ImageNet's mean for photographs
    expected = torch.from_numpy((scaled - own.mean) / own.std).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(seen, expected, atol=2e-3, rtol=1e-3)


def test_a_teacher_on_another_scale_is_not_the_same(tmp_path: Path) -> None:
    save_encoder(build_encoder("test_resnet", 32, reader=of_bands(-1000, 1000)), tmp_path, {})
    students = (build_encoder("test_resnet", 32, reader=of_bands(0, high)) for high in (250, 300))
    digests = {Teacher(str(tmp_path), None, student).digest for student in students}
    assert len(digests) == 2


def test_what_a_teacher_of_photographs_and_one_of_other_bands_have_in_common(
    tmp_path: Path,
) -> None:
    """The ends of the ranges are the same, and bands have the order of their names."""
    names = ("blue", "green", "red")
    bands, raw = of_bands(0, 4000, 3, names=names), random_raw(PHOTOGRAPHS)
    seen = seen_by_teacher(tmp_path / "bands", bands, PHOTOGRAPHS, raw)
    mean, std = (torch.tensor(one[::-1]).view(3, 1, 1) for one in (bands.mean, bands.std))
    torch.testing.assert_close(seen, (raw / 255 - mean) / std, atol=1e-3, rtol=1e-3)
    raw = random_raw(bands)
    seen = seen_by_teacher(tmp_path / "photographs", PHOTOGRAPHS, bands, raw)
    own = build_encoder("test_resnet", 32)
    mean, std = (torch.tensor(one[::-1]).view(3, 1, 1) for one in (own.mean, own.std))
    torch.testing.assert_close(seen, (raw.float() / 65535 - mean) / std, atol=1e-3, rtol=1e-3)


def test_bands_in_another_order_get_the_weights_of_their_names(tmp_path: Path) -> None:
    nir_first = of_bands(0, 100, 3, names=("nir", "red", "green"))
    nir_last = of_bands(0, 50, 3, names=("red", "green", "nir"), mean=(0.7,) * 3)
    encoder = build_encoder("test_resnet", 32, reader=nir_first).eval()
    save_encoder(encoder, tmp_path, {})
    teacher = Teacher(str(tmp_path), None, build_encoder("test_resnet", 32, reader=nir_last))
    units = 50 * torch.rand(2, 3, 32, 32)
    shown, images = teacher.see(units / 50 * 65535)
    expected = encoder(encoder.normalize(units[:, [2, 0, 1]] / 100 * 65535))
    torch.testing.assert_close(shown(images), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("teacher", "student", "said"),
    [
        (of_bands(0, 1), of_bands(0, 1, 2), "The teacher for 1 bands is adapted to 2"),
        (of_bands(0, 1), of_bands(300, 900, mean=(0.5,)), "can't be converted"),
        (
            of_bands(0, 1),
            replace(PER_IMAGE, mean=(0.5,)),
            "can't be converted to the scale that the teacher was trained on",
        ),
    ],
)
def test_the_log_names_a_teacher_that_gets_the_students_normalization(
    tmp_path: Path,
    teacher: ImageReader,
    student: ImageReader,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw = random_raw(student)
    with caplog.at_level(logging.INFO, "vissl_lite"):
        seen = seen_by_teacher(tmp_path, teacher, student, raw)
    assert said in caplog.text
    expected = build_encoder("test_resnet", 32, reader=student).normalize(raw)
    torch.testing.assert_close(seen, expected, atol=1e-3, rtol=1e-3)


def test_a_range_of_each_image_leaves_the_teacher_its_statistics(tmp_path: Path) -> None:
    student = replace(PER_IMAGE, mean=(0.5,), std=(0.3,))
    raw = random_raw(student)
    seen = seen_by_teacher(tmp_path, PER_IMAGE, student, raw)
    torch.testing.assert_close(seen, (raw.float() / 65535 - 0.2) / 0.05, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_run_as_teacher(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The student is saved without the teacher, and counts what the teacher has seen as seen."""
    more = tmp_path / "more"
    more.mkdir()
    for index in range(8):
        blobs(100 + index).save(more / f"{index}.png")
    common = ["--image_size", "32", "--batch_size", "8", "--epochs", "1", "--num_workers", "0"]
    teacher, student = tmp_path / "teacher", tmp_path / "student"

    def pretrain(*arguments: object) -> int:
        with without_pictures():
            return main(["pretrain", *map(str, arguments), *common])

    assert pretrain("--data", photos, "--out", teacher, "--backbone", "test_vit") == 0
    distilled = ("--data", more, "--pretext", "distillation", "--pretext.teacher", teacher)
    distilled += ("--backbone", "test_resnet")
    assert pretrain(*distilled, "--out", student) == 0
    seen = {
        Path(path).parent.name for path in Fingerprints.load(student / "fingerprints.npz").paths
    }
    assert seen == {"a", "b", "more"}
    config = json.loads((student / "encoder" / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    weights = load_file(student / "encoder" / "model.safetensors")
    assert weights.keys() == build_encoder("test_resnet", 32).model.state_dict().keys()
    kept = read_checkpoint(student / "checkpoints" / "last.ckpt")["state_dict"]
    assert {name.split(".")[0] for name in kept} == {"encoder", "head", "queue", "center"}
    capsys.readouterr()
    assert pretrain(*distilled, "--out", teacher, "--overwrite") == 2
    assert f"--pretext.teacher {teacher} lies in --out" in capsys.readouterr().err


def test_fixed_views_show_the_teacher_each_image_once(photos: Path, tmp_path: Path) -> None:
    paths = find_images([photos])
    teacher = str(saved(tmp_path / "teacher"))
    task = Distillation(
        build_encoder("test_resnet", 32), teacher, fixed_views=True, queue_size=8
    ).eval()
    data = ViewDataset(paths, task.views(), seed=0)
    task.prepare(data, tmp_path)
    (expected,), _ = predict_images(
        task.teacher.encoder, lambda x: [task.teacher.encoder(x)], task.teacher.encoder, paths
    )
    keys: list[Key] = [(0, index) for index in (5, 2, 11)]
    batch, mean = collate([data[key] for key in keys]), normalize(expected, dim=1).mean(dim=0)
    queue = normalize(task.queue.items - mean, dim=1)
    predicted = task.head(task.encoder(task.encoder.normalize(batch.views[0])))
    target = normalize(expected[[5, 2, 11]], dim=1) - mean
    loss = similarity_distillation(predicted, target, queue, task.temperature)
    torch.testing.assert_close(task.training_step(batch, 0), loss, atol=1e-2, rtol=1e-2)
    # The mean over all images stays the center.
    torch.testing.assert_close(task.center.mean, mean, atol=1e-3, rtol=1e-3)


def test_other_processes_wait_for_the_main_one(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = build_encoder("test_resnet", 32)
    main_one, other = (
        Distillation(student, "random:test_vit", fixed_views=True, queue_size=8) for _ in range(2)
    )
    data = ViewDataset(find_images([photos]), other.views(), 0)
    naps = []

    def main_process_writes(seconds: float) -> None:
        naps.append(seconds)
        monkeypatch.setenv("RANK", "0")
        main_one.prepare(data, tmp_path)

    monkeypatch.setattr("vissl_lite.pretext.distillation.time.sleep", main_process_writes)
    monkeypatch.setattr(other.teacher, "embeddings", None)  # it must not be called
    monkeypatch.setenv("RANK", "1")
    other.prepare(data, tmp_path)
    assert len(naps) == 1
    assert other._embeddings is not None
    assert torch.equal(other._embeddings, main_one._embeddings)


def test_other_processes_wait_while_an_overwritten_run_is_removed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embeddings of its teacher are still there, and then vanish while they are read."""
    task = Distillation(build_encoder("test_resnet", 32), "random:test_vit", fixed_views=True)
    data, file = ViewDataset(find_images([photos]), task.views(), 0), tmp_path / TEACHER
    embeddings = torch.rand(len(data), task.teacher.encoder.num_features).half()
    key = f"{task.teacher.digest} {data.digest()}"
    states: list[dict[str, Tensor] | None] = [None, {key: embeddings}]
    save_file({"another teacher": embeddings}, file)

    def main_process_goes_on(seconds: float) -> None:
        state = states.pop(0)
        file.write_bytes(b"") if state is None else save_file(state, file)

    monkeypatch.setattr("vissl_lite.pretext.distillation.time.sleep", main_process_goes_on)
    monkeypatch.setenv("RANK", "1")
    task.prepare(data, tmp_path)
    assert not states
    assert task._embeddings is not None
    assert torch.equal(task._embeddings, embeddings)


@pytest.mark.parametrize("locks", [True, False])
def test_the_wait_for_a_main_process_that_ended_has_an_end(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    task = Distillation(build_encoder("test_resnet", 32), "random:test_vit", fixed_views=True)
    data = ViewDataset(find_images([photos]), task.views(), 0)
    held, naps, now = lock(tmp_path), [], [time.monotonic()]
    if locks:
        held.__enter__()

    def nap(seconds: float) -> None:
        naps.append(seconds)
        assert len(naps) < 10
        if len(naps) == 5:
            now[0] += 2 * LONGEST_WAIT  # without end while the main process is alive
        if len(naps) == 7 and locks:
            held.__exit__(None, None, None)

    monkeypatch.setattr("vissl_lite.pretext.distillation.time.sleep", nap)
    monkeypatch.setattr("vissl_lite.pretext.distillation.time.monotonic", lambda: now[0])
    monkeypatch.setenv("RANK", "1")
    said = "the main process ended before" if locks else "was not written within 24 hours"
    with pytest.raises(UserError, match=said):
        task.prepare(data, tmp_path)
    assert len(naps) == (7 if locks else 5)


def test_with_fixed_views_the_student_sees_no_more_than_the_teacher(photos: Path) -> None:
    student = build_encoder("test_resnet", 32)
    gradient = np.tile(np.arange(240, dtype=np.uint8)[:, None], (40, 1, 3)).reshape(40, 240, 3)
    pixels: dict[bool, list[np.ndarray]] = {}
    for fixed in (False, True):
        task = Distillation(student, "random:test_vit", fixed_views=fixed, color=0.0)
        views = task.views()
        pixels[fixed] = [views(gradient, 0, 0, index)[0] for index in range(50)]
        square = [views(gradient[:, 100:140], 0, 0, index)[0] for index in range(50)]
        pixels[fixed] += square
    assert min(one.min() for one in pixels[False]) < 20
    assert min(one.min() for one in pixels[True]) >= 100
    assert max(one.max() for one in pixels[True]) < 140
    equal = zip(pixels[False][50:], pixels[True][50:], strict=True)
    assert all((one == other).all() for one, other in equal)


def test_a_resumed_run_finds_what_the_teacher_saw(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, calls = build_encoder("test_resnet", 32), []
    embed = Teacher.embeddings
    monkeypatch.setattr(
        Teacher, "embeddings", lambda self, *given: calls.append(1) or embed(self, *given)
    )
    data = ViewDataset(find_images([photos]), Distillation(student, "random:test_vit").views(), 0)
    for _ in range(2):
        teacher = str(saved(tmp_path / "0", seed=0))
        Distillation(student, teacher, fixed_views=True).prepare(data, tmp_path)
    assert len(calls) == 1
    other = Distillation(student, str(saved(tmp_path / "1", seed=1)), fixed_views=True)
    with pytest.raises(UserError, match="is not the one that the run began with"):
        other.prepare(data, tmp_path)


@pytest.mark.parametrize("given", [{"mixup": True}, {"map_weight": 1.0}])
def test_what_needs_views_of_the_teacher_is_refused_with_fixed_ones(given: dict[str, Any]) -> None:
    encoder, (name,) = build_encoder("test_resnet", 32), given
    with pytest.raises(UserError, match=f"--pretext.{name} needs a teacher that sees the views"):
        Distillation(encoder, "random:test_vit", fixed_views=True, **given)


def test_a_cpu_is_told_of_fixed_views(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = Distillation(build_encoder("test_resnet", 32), "random:test_vit")
    with caplog.at_level(logging.INFO, "vissl_lite"):
        task.prepare(ViewDataset(find_images([photos]), task.views(), 0), tmp_path)
    assert ("--pretext.fixed_views true" in caplog.text) != torch.cuda.is_available()


@pytest.mark.slow
def test_a_run_with_fixed_views_leaves_no_embeddings_behind(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ("--data", photos, "--out", out, "--pretext", "distillation", "--epochs", 1)
    given += ("--pretext.teacher", "random:test_vit", "--pretext.fixed_views=true")
    given += ("--image_size", 32)
    given += ("--backbone", "test_resnet", "--batch_size", 8, "--num_workers", 0)
    with without_pictures():
        assert main(["pretrain", *map(str, given)]) == 0
    assert (out / "encoder").is_dir()
    assert not (out / "teacher.safetensors").exists()
