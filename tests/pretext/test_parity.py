"""Steps of training against a literal version that keeps the order of the authors' code.

``modules/test_losses.py`` compares the losses alone. What counts here is what a step does around
them: which network sees which view, when teachers, queues and centers change, and what momentum and
temperature a step has. The first step gives the same loss whatever changes afterwards, hence three.

Each literal version has the networks of a copy of the pretext, with the same weights and views, and
writes everything else out. Where ours differs from the authors' code, a comment says so. That of
SparK, whose network differs in what it sees, is in a file of its own.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext import dinov2
from vissl_lite.pretext.barlow_twins import BarlowTwins
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.byol import BYOL
from vissl_lite.pretext.densecl import DenseCL
from vissl_lite.pretext.dino import DINO
from vissl_lite.pretext.distillation import Distillation
from vissl_lite.pretext.ibot import IBOT, draw_masks
from vissl_lite.pretext.ijepa import IJEPA
from vissl_lite.pretext.lejepa import LeJEPA
from vissl_lite.pretext.mae import MAE
from vissl_lite.pretext.moco import MoCo
from vissl_lite.pretext.moco_v3 import MoCoV3
from vissl_lite.pretext.nnclr import NNCLR
from vissl_lite.pretext.simclr import SimCLR
from vissl_lite.pretext.simmim import SimMIM
from vissl_lite.pretext.simsiam import SimSiam
from vissl_lite.pretext.swav import SwAV
from vissl_lite.pretext.vicreg import VICReg
from vissl_lite.pretext.visreg import VISReg

IMAGES, RATE = 4, 0.1
PROGRESS = (0.25, 0.5, 0.75)  # fractions of the run at which its three steps are

Network = Callable[[Tensor], Tensor]


def batches(views: int = 2, local_crops: int = 0, side: int = 32) -> list[list[Tensor]]:
    """Views of each step; local crops have half the side."""
    random = torch.Generator().manual_seed(1)
    sides = [side] * views + [side // 2] * local_crops
    return [
        [torch.randn(IMAGES, 3, side, side, generator=random) for side in sides] for _ in PROGRESS
    ]


def made(kind: Callable[..., PretextTask], backbone: str = "test_vit", **options: Any) -> Any:
    """A pretext with a small encoder and without stochastic depth, which is random."""
    task = kind(build_encoder(backbone, 32), **options)
    for module in task.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return task


def losses(task: PretextTask, steps: Sequence[list[Tensor]]) -> list[float]:
    """Losses of steps of a pretext, by its hooks in the order in which Lightning calls them."""
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], RATE)
    task.train()
    found = []
    for step, views in enumerate(steps):
        task.progress = PROGRESS[step]
        torch.manual_seed(step)
        loss = task.loss(views)
        loss.backward()
        task.on_after_backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step()
        found.append(loss.item())
    return found


def assert_parity(
    task: PretextTask, steps: list[list[Tensor]], literal: list[float], moved: float = 1e-3
) -> None:
    ours = losses(task, steps)
    assert ours == pytest.approx(literal, rel=1e-4)
    assert min(abs(a - b) for a, b in pairwise(ours)) > moved


def descend(loss: Tensor, *networks: nn.Module) -> float:
    """A step of gradient descent; the loss."""
    weights = [p for network in networks for p in network.parameters() if p.requires_grad]
    with torch.no_grad():
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight -= RATE * gradient
    return loss.item()


@torch.no_grad()
def average(teacher: nn.Module, student: nn.Module, momentum: float, norms: bool = False) -> None:
    """Average the parameters and, as EMAN does, the statistics of BatchNorms."""
    pairs = [*zip(teacher.parameters(), student.parameters(), strict=True)]
    if norms:
        buffers = zip(teacher.buffers(), student.buffers(), strict=True)
        pairs += [pair for pair in buffers if pair[0].is_floating_point()]
    for kept, new in pairs:
        kept.copy_(momentum * kept + (1 - momentum) * new)


def half_cosine(momentum: float, fraction: float) -> float:
    """From a momentum to 1: BYOL, section 3.3."""
    return 1 - (1 - momentum) * (math.cos(math.pi * fraction) + 1) / 2


def unit(z: Tensor) -> Tensor:
    return z / z.norm(dim=-1, keepdim=True)


def of_first(scores: Iterable[Tensor], temperature: float) -> Tensor:
    """Cross-entropy of scores whose first is the right one."""
    return -(torch.stack(list(scores)) / temperature).log_softmax(dim=0)[0]


def both(network: Network, views: list[Tensor]) -> tuple[Tensor, ...]:
    """Outputs for two views.

    The authors of BYOL, SimSiam, MoCo v3, NNCLR, Barlow Twins and VICReg give them to the network
    one after the other, so that BatchNorms have the statistics of each view. We give them together,
    as the authors of SimCLR do.
    """
    return network(torch.cat(views)).chunk(len(views))


def mean(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()


def test_simclr() -> None:
    """Equation 1: the other view of the image against all other embeddings of both views."""
    task, steps = made(SimCLR, temperature=0.3), batches()
    network, literal = nn.Sequential(*map(copy.deepcopy, (task.encoder, task.head))), []
    for views in steps:
        z = unit(torch.cat(both(network, views)))
        terms = []
        for i in range(2 * IMAGES):
            partner = (i + IMAGES) % (2 * IMAGES)
            others = [j for j in range(2 * IMAGES) if j not in (i, partner)]
            terms.append(of_first([z[i] @ z[j] for j in (partner, *others)], 0.3))
        literal.append(descend(mean(terms), network))
    assert_parity(task, steps, literal)


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_moco(backbone: str) -> None:
    """Algorithm 1 of the paper: keys come from a teacher that has been updated already, in
    evaluation mode with statistics of BatchNorms that follow the student's (EMAN).

    Other than there, the keys of the other images are negatives too, and of the queue only those of
    the last batch, since a teacher of this momentum changes quickly.
    """
    task, steps = made(MoCo, backbone, temperature=0.3, momentum=0.6, queue_size=9), batches()
    query = nn.Sequential(*map(copy.deepcopy, (task.encoder, task.head)))
    key = nn.Sequential(*map(copy.deepcopy, (task.teacher_encoder, task.teacher_head)))
    key[0].eval()
    queue, literal = list(task.queue.items), []
    for first, second in steps:
        average(key, query, 0.6, norms=True)
        q = unit(query(first))
        k = unit(key(second)).detach()
        terms = []
        for i in range(IMAGES):
            others = [k[j] for j in range(IMAGES) if j != i]
            terms.append(of_first([q[i] @ old for old in (k[i], *others, *queue[-IMAGES:])], 0.3))
        literal.append(descend(mean(terms), query))
        queue = [*queue, *k]
    assert_parity(task, steps, literal)


def test_moco_v3() -> None:
    """Algorithm 1. The authors' code has the momentum of the step where ours has that of the one
    before: we update the teacher at the end of a step, they in the middle of the next one.
    """
    task, steps = made(MoCoV3, temperature=0.3, momentum=0.6, hidden_size=32), batches()
    base = nn.Sequential(*map(copy.deepcopy, (task.encoder, task.projector)))
    key = nn.Sequential(*map(copy.deepcopy, (task.teacher_encoder, task.teacher_projector)))
    predictor, literal = copy.deepcopy(task.predictor), []
    for step, views in enumerate(steps):
        q = [unit(one) for one in both(nn.Sequential(base, predictor), views)]
        if step > 0:
            average(key, base, half_cosine(0.6, PROGRESS[step - 1]))
        k = [unit(one).detach() for one in both(key, views)]
        loss = torch.zeros(())
        for a, b in ((0, 1), (1, 0)):
            for i in range(IMAGES):
                others = [j for j in range(IMAGES) if j != i]
                scores = [q[a][i] @ k[b][j] for j in (i, *others)]
                loss = loss + 2 * 0.3 * of_first(scores, 0.3) / IMAGES
        literal.append(descend(loss, base, predictor))
    assert_parity(task, steps, literal)


def test_byol() -> None:
    """Equation 2; the teacher follows after the step, with the momentum of the step."""
    task, steps = made(BYOL, momentum=0.6, hidden_size=32, projection_size=16), batches()
    online = nn.Sequential(*map(copy.deepcopy, (task.encoder, task.projector)))
    target = nn.Sequential(*map(copy.deepcopy, (task.teacher_encoder, task.teacher_projector)))
    predictor, literal = copy.deepcopy(task.predictor), []
    for progress, views in zip(PROGRESS, steps, strict=True):
        q = both(nn.Sequential(online, predictor), views)
        z = [one.detach() for one in both(target, views)]
        loss = torch.zeros(())
        for a, b in ((0, 1), (1, 0)):
            loss = loss + (unit(q[a]) - unit(z[b])).square().sum(dim=1).mean()
        literal.append(descend(loss, online, predictor))
        average(target, online, half_cosine(0.6, progress))
    assert_parity(task, steps, literal)


def test_simsiam() -> None:
    """Algorithm 1."""
    task, steps = made(SimSiam, projection_size=32, hidden_size=16), batches()
    network = nn.Sequential(*map(copy.deepcopy, (task.encoder, task.projector)))
    predictor, literal = copy.deepcopy(task.predictor), []
    for views in steps:
        joined = network(torch.cat(views))
        z, p = joined.detach().chunk(2), predictor(joined).chunk(2)
        loss = torch.zeros(())
        for a, b in ((0, 1), (1, 0)):
            loss = loss - (unit(p[a]) * unit(z[b])).sum(dim=1).mean() / 2
        literal.append(descend(loss, network, predictor))
    assert_parity(task, steps, literal)


def test_nnclr() -> None:
    """Algorithm 1: the support set gets the first views, after it has been used."""
    options = {"queue_size": 6, "hidden_size": 32, "projection_size": 16}
    task, steps = made(NNCLR, temperature=0.3, prediction_hidden_size=32, **options), batches()
    network = nn.Sequential(*map(copy.deepcopy, (task.encoder, task.projector)))
    predictor, support, literal = copy.deepcopy(task.predictor), list(task.queue.items), []
    for views in steps:
        joined = network(torch.cat(views))
        z, p = joined.detach().chunk(2), predictor(joined).chunk(2)
        loss = torch.zeros(())
        for a, b in ((0, 1), (1, 0)):
            for i in range(IMAGES):
                nearest = max(support, key=lambda one: float(one @ unit(z[a][i])))
                others = [j for j in range(IMAGES) if j != i]
                scores = [nearest @ unit(p[b][j]) for j in (i, *others)]
                loss = loss + of_first(scores, 0.3) / IMAGES / 2
        literal.append(descend(loss, network, predictor))
        support = [*support, *unit(z[0])][-6:]
    assert_parity(task, steps, literal)


@pytest.mark.parametrize(("backbone", "side"), [("test_vit", 32), ("test_resnet", 64)])
def test_densecl(backbone: str, side: int) -> None:
    """Equations 2 to 4: the dense queue gets one embedding per image, the mean over its map.

    The negatives, and the statistics of the teacher's BatchNorms, are those of ``test_moco``.
    """
    options = {"temperature": 0.3, "momentum": 0.6, "queue_size": 9, "dense_weight": 0.7}
    task, steps = made(DenseCL, backbone, **options), batches(side=side)
    query = nn.ModuleList(map(copy.deepcopy, (task.encoder, task.head)))
    key = nn.ModuleList(map(copy.deepcopy, (task.teacher_encoder, task.teacher_head)))
    key[0].eval()
    queue, dense_queue, literal = list(task.queue.items), list(task.dense_queue.items), []

    def outputs(network: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, and the maps before and after the head as ``(B, N, D)``."""
        encoder, head = network
        pooled, features = encoder.pooled_and_map(images)
        whole, dense = head(pooled, features)
        return whole, features.flatten(2).transpose(1, 2), dense.transpose(1, 2)

    for first, second in steps:
        average(key, query, 0.6, norms=True)
        q, q_map, q_dense = outputs(query, first)
        k, k_map, k_dense = (one.detach() for one in outputs(key, second))
        k_mean = unit(k_dense.mean(dim=1))
        whole, dense = [], []
        for i in range(IMAGES):
            others = [j for j in range(IMAGES) if j != i]
            negatives = [*unit(k)[others], *queue[-IMAGES:]]
            dense_negatives = [*k_mean[others], *dense_queue[-IMAGES:]]
            whole.append(of_first([unit(q[i]) @ old for old in (unit(k[i]), *negatives)], 0.3))
            for place in range(q_map.shape[1]):
                similar = unit(k_map[i]) @ unit(q_map[i, place])
                partner = k_dense[i, int(similar.argmax())]
                scores = [
                    unit(q_dense[i, place]) @ old for old in (unit(partner), *dense_negatives)
                ]
                dense.append(of_first(scores, 0.3))
        literal.append(descend(0.3 * mean(whole) + 0.7 * mean(dense), query))
        queue, dense_queue = [*queue, *unit(k)], [*dense_queue, *k_mean]
    assert_parity(task, steps, literal)


def test_distillation() -> None:
    """SEED, equations 3 to 5: the similarities to the image itself and to a queue that holds no
    embedding of the batch; the queue, and the center that ours has, follow after the loss.

    The distributions have the same temperature, as CompRess' have. Maps: Liu et al. 2019, eq. 3.
    """
    options = {"teacher": "random:test_vit", "teacher_size": 32, "mixup": False, "map_weight": 2.0}
    task = made(Distillation, temperature=0.3, queue_size=6, **options)
    steps = batches(views=1)
    student = nn.ModuleList(map(copy.deepcopy, (task.encoder, task.head)))
    teacher, center, literal = task.teacher.encoder, torch.zeros(task.head.out_features), []
    queue = list(task.queue.items)
    for (views,) in steps:
        pooled, student_map = student[0].pooled_and_map(views)
        # Both networks have the same normalization.
        target, teacher_map = (one.detach() for one in teacher.pooled_and_map(views))
        target, predicted = unit(target), unit(student[1](pooled))
        divergences, differences = [], []
        for own, wanted in zip(predicted, unit(target - center), strict=True):
            others = [wanted, *(unit(old - center) for old in queue)]
            of_student, of_teacher = (
                (torch.stack([one @ other for other in others]) / 0.3).log_softmax(dim=0)
                for one in (own, wanted)
            )
            divergences.append((of_teacher.exp() * (of_teacher - of_student)).sum())
        for one, other in zip(student_map, teacher_map, strict=True):
            similarities = []
            for features in (one, other):
                places = unit(features.flatten(1).T)
                similarities.append(torch.stack([place @ places.T for place in places]))
            differences.append((similarities[0] - similarities[1]).square().mean())
        literal.append(descend(mean(divergences) + 2 * mean(differences), student))
        queue = [*queue, *target][-6:]
        center = 0.9 * center + 0.1 * target.mean(dim=0)
    assert_parity(task, steps, literal)


def balanced(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """SwAV, listing 1 of the appendix."""
    codes = (scores.double() / epsilon).exp().T
    codes = codes / codes.sum()
    for _ in range(iterations):
        codes = codes / codes.sum(dim=1, keepdim=True) / len(codes)
        codes = codes / codes.sum(dim=0, keepdim=True) / codes.shape[1]
    return (codes * codes.shape[1]).T.float()


def test_swav() -> None:
    """Equations 3 to 6 with a local crop; the queue gets a batch when it has been used.

    The authors' code normalizes the prototypes before a step, so that their gradient has a part
    along the prototypes, which ours has not. It fills its queue from the epoch on in which it uses
    it. The head, with a BatchNorm, sees global and local crops together.
    """
    options = {"prototypes": 5, "hidden_size": 32, "projection_size": 16, "local_crops": 1}
    task = made(SwAV, temperature=0.3, queue_size=6, queue_start=0.5, **options)
    steps, literal = batches(local_crops=1), []
    encoder, head = copy.deepcopy(task.encoder), copy.deepcopy(task.head)
    prototypes = copy.deepcopy(task.prototypes)
    queues = [list(queue.items) for queue in task.queues]
    for progress, views in zip(PROGRESS, steps, strict=True):
        z = unit(head(torch.cat([encoder(view) for view in views]))).chunk(3)
        clusters = unit(prototypes.weight)
        terms = []
        for large in range(2):
            batch, earlier = z[large].detach(), queues[large]
            used = torch.stack(earlier + list(batch)) if progress >= 0.5 else batch
            code = balanced(used @ clusters.detach().T, 0.05, 3)[-IMAGES:]
            queues[large] = (earlier + list(batch))[-6:]
            for view in range(3):
                if view != large:
                    log = (z[view] @ clusters.T / 0.3).log_softmax(dim=1)
                    terms.append(-(code * log).sum(dim=1).mean())
        literal.append(descend(mean(terms), encoder, head, prototypes))
    assert_parity(task, steps, literal)


def test_barlow_twins() -> None:
    """Algorithm 1."""
    task, steps = made(BarlowTwins, lambd=0.02, projection_size=8), batches()
    network, literal = nn.Sequential(*map(copy.deepcopy, (task.encoder, task.projector))), []
    for views in steps:
        z1, z2 = (
            (z - z.mean(dim=0)) / (z.var(dim=0, correction=0) + 1e-5).sqrt()
            for z in both(network, views)
        )
        loss = torch.zeros(())
        for i in range(8):
            for j in range(8):
                correlation = (z1[:, i] * z2[:, j]).sum() / IMAGES
                loss = loss + ((1 - correlation) ** 2 if i == j else 0.02 * correlation**2)
        literal.append(descend(loss, network))
    assert_parity(task, steps, literal)


def test_vicreg() -> None:
    """Algorithm 1, with the halves of the variance terms that the authors' code has."""
    task, steps = made(VICReg, projection_size=8, sim_weight=2, std_weight=3), batches()
    network, literal = nn.Sequential(*map(copy.deepcopy, (task.encoder, task.projector))), []
    for views in steps:
        z = both(network, views)
        loss = 2 * (z[0] - z[1]).square().mean()
        for one in z:
            centered = one - one.mean(dim=0)
            covariance = centered.T @ centered / (IMAGES - 1)
            std = (covariance.diagonal() + 1e-4).sqrt()
            loss = loss + 3 * (1 - std).clamp(min=0).mean() / 2
            loss = loss + sum(
                covariance[i, j] ** 2 / 8 for i in range(8) for j in range(8) if i != j
            )
        literal.append(descend(loss, network))
    assert_parity(task, steps, literal)


PROTOTYPES = {
    "prototypes": 7,
    "hidden_size": 32,
    "bottleneck_size": 8,
    "temperature": 0.3,
    "warm_teacher_temperature": 0.1,
    "teacher_temperature": 0.2,
    "temperature_warmup": 0.6,
    "momentum": 0.6,
    "center_momentum": 0.7,
    "freeze_last_layer": 0.4,
}


def teacher_temperature(progress: float) -> float:
    """The authors' code changes it from epoch to epoch, ours from step to step."""
    return 0.1 + min(1.0, progress / 0.6) * (0.2 - 0.1)


def cross_entropy(target: Tensor, scores: Tensor) -> Tensor:
    """Of the student's distribution; ``(B,)``."""
    return -(target * (scores / 0.3).log_softmax(dim=-1)).sum(dim=-1)


def frozen_at_first(progress: float, head: Any) -> None:
    """The prototypes get no gradient in the first epoch; here, in the first of three steps."""
    head.prototypes.requires_grad_(progress >= 0.4)


def test_dino() -> None:
    """Algorithm 1 with a local crop: the center changes when it has been used, the teacher last."""
    task, steps = made(DINO, local_crops=1, **PROTOTYPES), batches(local_crops=1)
    encoder, head = copy.deepcopy(task.encoder), copy.deepcopy(task.head)
    student = nn.Sequential(encoder, head)
    teacher = nn.Sequential(*map(copy.deepcopy, (task.teacher_encoder, task.teacher_head)))
    center, literal = torch.zeros(7), []
    for progress, views in zip(PROGRESS, steps, strict=True):
        frozen_at_first(progress, head)
        outputs = [teacher(view).detach() for view in views[:2]]
        scores = [student(view) for view in views]
        terms = []
        for t, output in enumerate(outputs):
            target = ((output - center) / teacher_temperature(progress)).softmax(dim=1)
            terms += [
                cross_entropy(target, score).mean() for s, score in enumerate(scores) if s != t
            ]
        center = 0.7 * center + 0.3 * torch.cat(outputs).mean(dim=0)
        literal.append(descend(mean(terms), student))
        average(teacher, student, half_cosine(0.6, progress))
    assert_parity(task, steps, literal)


def tokens(
    model: Any, images: Tensor, mask: Tensor | None = None, token: Tensor | None = None
) -> Tensor:
    """``(B, 1 + N, D)``: blocks see a token in place of masked patches, at their positions."""
    patches = model.patch_embed(images)
    if mask is not None:
        rows = patches.flatten(1, -2)
        rows = torch.where(mask.flatten(1)[..., None], token, rows)
        patches = rows.view_as(patches)
    return model.norm(model.blocks(model.norm_pre(model._pos_embed(patches))))


def closeness(z: Tensor) -> Tensor:
    """KoLeo: minus the mean logarithm of the distance to the nearest other image."""
    z, total = unit(z), torch.zeros(())
    for i in range(len(z)):
        others = [(z[i] - z[j]).norm() for j in range(len(z)) if j != i]
        total = total - min(others).log() / len(z)
    return total


def test_ibot() -> None:
    """Equations 1 to 3, and KoLeo: the student sees masks in its global crops, the teacher none.

    The authors' center of patches is that of all patches; ours is that of masked ones, as in
    DINOv2, which does without the others.
    """
    task = made(IBOT, "vit_slim_patch4_32", local_crops=1, koleo_weight=0.2, **PROTOTYPES)
    steps, literal = batches(local_crops=1), []
    encoder, head = copy.deepcopy(task.encoder), copy.deepcopy(task.head)
    student, token = nn.Sequential(encoder, head), nn.ParameterList([task.mask_token.clone()])
    teacher_encoder, teacher_head = map(copy.deepcopy, (task.teacher_encoder, task.teacher_head))
    center, patch_center = torch.zeros(7), torch.zeros(7)

    for step, (progress, views) in enumerate(zip(PROGRESS, steps, strict=True)):
        frozen_at_first(progress, head)
        torch.manual_seed(step)
        masks = draw_masks(2 * IMAGES, 8, 8).chunk(2)
        temperature = teacher_temperature(progress)
        with torch.no_grad():
            seen = [tokens(teacher_encoder.model, view) for view in views[:2]]
            outputs = [teacher_head(one.flatten(0, 1)).view(IMAGES, 65, 7) for one in seen]
        hidden = [
            tokens(encoder.model, view, mask, token[0])
            for view, mask in zip(views, masks, strict=False)
        ]
        scores = [head(one.flatten(0, 1)).view(IMAGES, 65, 7) for one in hidden]
        local = student(views[2])
        on_images, on_patches, spread = [], [], torch.zeros(())
        for t, output in enumerate(outputs):
            target = ((output[:, 0] - center) / temperature).softmax(dim=1)
            on_images += [
                cross_entropy(target, score).mean() for score in (scores[1 - t][:, 0], local)
            ]
            patch_target = ((output[:, 1:] - patch_center) / temperature).softmax(dim=-1)
            each = cross_entropy(patch_target, scores[t][:, 1:])
            for image, mask in zip(each, masks[t].flatten(1), strict=True):
                on_patches.append(image[mask].mean() if mask.any() else torch.zeros(()))
            spread = spread + closeness(hidden[t][:, 0])
        center = 0.7 * center + 0.3 * torch.cat(outputs)[:, 0].mean(dim=0)
        masked = torch.cat(outputs)[:, 1:][torch.cat(masks).flatten(1)]
        patch_center = 0.7 * patch_center + 0.3 * masked.mean(dim=0)
        loss = mean(on_images) + mean(on_patches) + 0.2 * spread
        literal.append(descend(loss, student, token))
        for teacher, follows in ((teacher_encoder, encoder), (teacher_head, head)):
            average(teacher, follows, half_cosine(0.6, progress))
    assert_parity(task, steps, literal)


def test_dinov2() -> None:
    """As the authors' code: a head for images and one for masked patches, no centers.

    Sinkhorn-Knopp balances the images of both global crops together, and the masked patches of
    both. KoLeo is computed in each crop.
    """
    options = {name: value for name, value in PROTOTYPES.items() if name != "center_momentum"}
    task = made(dinov2.DINOv2, "vit_slim_patch4_32", local_crops=1, koleo_weight=0.2, **options)
    steps, literal = batches(local_crops=1), []
    students = [task.encoder, task.head, task.patch_head]
    encoder, head, patch_head = students = [copy.deepcopy(one) for one in students]
    teachers = [task.teacher_encoder, task.teacher_head, task.teacher_patch_head]
    teacher, teacher_head, teacher_patch_head = teachers = [copy.deepcopy(one) for one in teachers]
    token = nn.ParameterList([task.mask_token.clone()])
    for step, (progress, views) in enumerate(zip(PROGRESS, steps, strict=True)):
        for one in (head, patch_head):
            frozen_at_first(progress, one)
        torch.manual_seed(step)
        masks = dinov2.draw_masks(2 * IMAGES, 8, 8).flatten(1).chunk(2)
        temperature = teacher_temperature(progress)
        with torch.no_grad():
            seen = [tokens(teacher.model, view) for view in views[:2]]
            outputs = torch.cat([teacher_head(one[:, 0]) for one in seen])
            targets = balanced(outputs, temperature, 3).chunk(2)
            masked = [one[:, 1:][mask] for one, mask in zip(seen, masks, strict=True)]
            patch_targets = balanced(teacher_patch_head(torch.cat(masked)), temperature, 3)
        hidden = [
            tokens(encoder.model, view, mask, token[0])
            for view, mask in zip(views, masks, strict=False)
        ]
        local = head(tokens(encoder.model, views[2])[:, 0])
        on_images, on_patches, spread, place = [], [], torch.zeros(()), 0
        for t, target in enumerate(targets):
            other = head(hidden[1 - t][:, 0])
            on_images += [cross_entropy(target, score).mean() for score in (other, local)]
            spread = spread + closeness(hidden[t][:, 0])
            for image, mask in zip(hidden[t][:, 1:], masks[t], strict=True):
                if not mask.any():
                    on_patches.append(torch.zeros(()))
                    continue
                own = patch_targets[place : place + int(mask.sum())]
                place += len(own)
                on_patches.append(cross_entropy(own, patch_head(image[mask])).mean())
        loss = mean(on_images) + mean(on_patches) + 0.2 * spread
        literal.append(descend(loss, *students, token))
        for follower, followed in zip(teachers, students, strict=True):
            average(follower, followed, half_cosine(0.6, progress))
    assert_parity(task, steps, literal)


def epps_pulley(values: Tensor) -> Tensor:
    """Of ``(B,)`` projections: an integral from -5 to 5, in the steps that ours has from 0 to 5."""
    points = torch.linspace(-5, 5, 33)
    heights = []
    for t in points:
        real = (t * values).cos().mean() - (-t * t / 2).exp()
        heights.append((real**2 + (t * values).sin().mean() ** 2) * (-t * t / 2).exp())
    inner = torch.stack(heights[1:-1]).sum() + (heights[0] + heights[-1]) / 2
    return len(values) * inner * 10 / 32


def sliced_normality(values: Tensor) -> Tensor:
    """Of ``(B,)`` standardized projections: squared distance of the sorted ones to quantiles."""
    ranks = torch.arange(1, len(values) + 1) / (len(values) + 1)
    quantiles = math.sqrt(2) * torch.erfinv(2 * ranks - 1)
    return (values.sort().values - quantiles).square().mean()


def lejepa_normality(z: Tensor, directions: Tensor) -> Tensor:
    return mean(epps_pulley(z @ direction) for direction in directions.T)


def visreg_normality(z: Tensor, directions: Tensor) -> Tensor:
    center = z.mean(dim=0)
    std = (z - center).norm(dim=0) / math.sqrt(len(z))
    standard = (z - center) / std.detach()
    shape = mean(sliced_normality(standard @ direction) for direction in directions.T)
    return (std - 1).square().mean() + shape + center.square().mean()


@pytest.mark.parametrize(
    ("kind", "normality"), [(LeJEPA, lejepa_normality), (VISReg, visreg_normality)]
)
def test_lejepa_and_visreg(
    kind: Callable[..., PretextTask], normality: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """All views are drawn to the mean of the global ones; directions are the same for each view."""
    options = {"hidden_size": 32, "projection_size": 8, "directions": 5, "local_crops": 1}
    task, steps = made(kind, lambd=0.3, **options), batches(local_crops=1)
    network, literal = nn.Sequential(*map(copy.deepcopy, (task.encoder, task.head))), []
    for step, views in enumerate(steps):
        z = [*both(network, views[:2]), network(views[2])]
        torch.manual_seed(step)
        directions = torch.randn(8, 5)
        directions = directions / directions.norm(dim=0)
        center = (z[0] + z[1]) / 2
        agreement = mean((one - center).square().mean() for one in z)
        regularity = mean(normality(one, directions) for one in z)
        literal.append(descend(0.7 * agreement + 0.3 * regularity, network))
    assert_parity(task, steps, literal)


def square(image: Tensor, place: int, side: int) -> Tensor:
    """The pixels of a patch, ``(C, side, side)``."""
    row, column = side * (place // (32 // side)), side * (place % (32 // side))
    return image[:, row : row + side, column : column + side]


def lowest(count: int, patches: int) -> list[list[int]]:
    """For each image, the places of the lowest of its random numbers, in the order of the image.

    The authors of MAE keep these and remove the others; ours removes them and keeps the others.
    """
    noise = torch.rand(IMAGES, patches)
    return [sorted(sorted(range(patches), key=list(row).__getitem__)[:count]) for row in noise]


def encoded(model: Any, image: Tensor, places: list[int]) -> Tensor:
    """``(1 + K, D)``: the class token and some patches, with their positions, after all blocks."""
    placed = model._pos_embed(model.patch_embed(image[None]))[0]
    sequence = torch.stack([placed[0], *(placed[1 + place] for place in places)])
    return model.norm(model.blocks(sequence[None]))[0]


def decoded(predictor: Any, latent: Tensor, seen: list[int], wanted: list[int]) -> Tensor:
    """Outputs at wanted patches, for the class token and seen patches at their places."""
    embedded = predictor.embed(latent)
    rows = [embedded[0]]
    rows += [embedded[1 + n] + predictor.positions[place] for n, place in enumerate(seen)]
    rows += [predictor.mask_token + predictor.positions[place] for place in wanted]
    return predictor.head(predictor.norm(predictor.blocks(torch.stack(rows)[None])))[
        0, -len(wanted) :
    ]


def test_mae() -> None:
    """Section 3 and ``models_mae.py``: the mean over the masked patches, each normalized."""
    task, steps = made(MAE, "vit_slim_patch4_32", mask_ratio=0.75), batches(views=1)
    encoder, decoder, literal = copy.deepcopy(task.encoder), copy.deepcopy(task.decoder), []
    for step, (images,) in enumerate(steps):
        torch.manual_seed(step)
        errors = []
        for image, masked in zip(images, lowest(48, 64), strict=True):
            shown = [place for place in range(64) if place not in masked]
            predicted = decoded(decoder, encoded(encoder.model, image, shown), shown, masked)
            for output, place in zip(predicted, masked, strict=True):
                pixels = square(image, place, 4).permute(1, 2, 0).flatten()
                target = (pixels - pixels.mean()) / (pixels.var(unbiased=True) + 1e-6).sqrt()
                errors.append((output - target).square().mean())
        literal.append(descend(mean(errors), encoder, decoder))
    assert_parity(task, steps, literal)


def test_simmim() -> None:
    """Section 3.4 and ``simmim.py``: the mean distance over masked pixels and their channels."""
    task, steps = made(SimMIM, "vit_slim_patch4_32", mask_unit=8), batches(views=1)
    encoder, head, literal = copy.deepcopy(task.encoder), copy.deepcopy(task.head), []
    token = nn.ParameterList([task.mask_token.clone()])
    for step, (images,) in enumerate(steps):
        torch.manual_seed(step)
        units = lowest(math.ceil(0.6 * 16), 16)
        mask = torch.zeros(IMAGES, 8, 8, dtype=torch.bool)  # patches of 4 in units of 8 pixels
        for one, places in zip(mask, units, strict=True):
            for place in places:
                row, column = 2 * (place // 4), 2 * (place % 4)
                one[row : row + 2, column : column + 2] = True
        outputs = tokens(encoder.model, images, mask, token[0])[:, 1:] @ head[0].weight.flatten(1).T
        errors = []
        for image, output, places in zip(images, outputs + head[0].bias, units, strict=True):
            rows = output.view(8, 8, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(3, 32, 32)
            for place in places:
                errors.append((square(rows, place, 8) - square(image, place, 8)).abs().mean())
        literal.append(descend(mean(errors), encoder, head, token))
    assert_parity(task, steps, literal)


def test_ijepa() -> None:
    """Section 3 and ``train.py``: smooth L1 distance of each block from the normalized targets.

    Blocks are ours: the authors' may overlap with the context where they would leave too little.
    """
    task, steps = made(IJEPA, "vit_slim_patch4_32", momentum=0.6), batches(views=1)
    with torch.no_grad():  # so that it matters how the teacher follows
        for weight in task.target_encoder.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    encoder, predictor, literal = copy.deepcopy(task.encoder), copy.deepcopy(task.predictor), []
    teacher = copy.deepcopy(task.target_encoder)
    for step, (progress, (images,)) in enumerate(zip(PROGRESS, steps, strict=True)):
        torch.manual_seed(step)
        contexts, blocks = (one.tolist() for one in task.draw_blocks(IMAGES, torch.device("cpu")))
        distances = []
        for image, context, wanted in zip(images, contexts, blocks, strict=True):
            whole = tokens(teacher.model, image[None])[0, 1:].detach()
            latent = encoded(encoder.model, image, context)
            for block in wanted:
                for output, place in zip(
                    decoded(predictor, latent, context, block), block, strict=True
                ):
                    spread = (whole[place].var(unbiased=False) + 1e-5).sqrt()
                    error = (output - (whole[place] - whole[place].mean()) / spread).abs()
                    distances.append(torch.where(error < 1, error**2 / 2, error - 0.5).mean())
        literal.append(descend(mean(distances), encoder, predictor))
        average(teacher, encoder, 0.6 + 0.4 * progress)
    assert_parity(task, steps, literal, moved=3e-4)
