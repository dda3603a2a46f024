"""``vissl-lite demo``: the whole story on sample data that the package draws itself."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table

from vissl_lite.commands.pretrain import pretrain
from vissl_lite.commands.pretrain_options import parse_time
from vissl_lite.commands.probe import probe_encoder
from vissl_lite.data.images import read_image
from vissl_lite.data.labelled import LabelledImages, load_labelled, take_labels
from vissl_lite.data.sample import make_sample_data
from vissl_lite.encoder import Encoder
from vissl_lite.encoder_folder import load_encoder
from vissl_lite.errors import UserError, check_arguments, check_count
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pictures import plot_bars
from vissl_lite.report.additions import add_report
from vissl_lite.run import check_out, console, open_run, write_results
from vissl_lite.session import session
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.classification import (
    ClassifierSettings,
    score_classifier,
    train_classifier,
)

log = logging.getLogger(__name__)

# Small, so that two minutes on two cores are about twenty epochs. The images have no up.
BACKBONE, SIZE = "resnet10t_slim", 48
LARGEST_SET = 10**6  # images to draw
UNTRAINED, TRAINED = "untrained", "pre-trained"

Scores = dict[str, dict[str, list[float]]]  # by measure, by arm: one accuracy a seed


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        run: the folder that was written.
        scores: test accuracies by measure (``kNN``, ``linear``, ``fine-tuned``), then by arm
            (``untrained``, ``pre-trained``): one for each seed.
        picture: the PNG file.
    """

    run: Path
    scores: Scores
    picture: Path


@session()
def demo(
    out: str = "runs/demo",
    shots: int = 10,
    seeds: int = 3,
    unlabelled: int = 4000,
    max_time: str | int = "00:02:00",
    overwrite: bool = False,
) -> DemoResult:
    """Draw sample data, pre-train, probe, fine-tune on few labels, and compare with no training.

    Args:
        out: The run folder to write.
        shots: Labels a class.
        seeds: How often to repeat what is compared, each time with other labels and other
            untrained weights. The pre-trained encoder is one and the same.
        unlabelled: Images to pre-train on.
        max_time: Time for pre-training, as HH:MM:SS or seconds.
        overwrite: Replace the run in --out.

    Returns:
        The accuracies and paths.

    Raises:
        UserError: something that was given can't work.
    """
    config = dict(locals())
    check_arguments(demo, config)
    check_count("seeds", seeds, 1000)
    check_count("shots", shots)
    if not 2 <= unlabelled <= LARGEST_SET:
        raise UserError(f"--unlabelled {unlabelled} must be from 2 to {LARGEST_SET}")
    parse_time(max_time)
    check_out(Path(out), overwrite=overwrite)
    started = time.monotonic()
    with open_run(Path(out), "demo", config) as run:
        data = run / "data"
        with progress_bar() as bar:
            task = bar.add_task("drawing", total=None, info="sample images")
            make_sample_data(
                data,
                unlabelled=unlabelled,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        pretrained = pretrain(
            data=str(data / "unlabelled"),
            out=str(run / "pretrain"),
            pretext={
                "name": "simclr",
                "temperature": 0.2,
                "smallest_crop": 0.5,
                "colour": 0.6,
            },
            upright=False,
            backbone=BACKBONE,
            image_size=SIZE,
            max_time=max_time,
            probe_data=str(data / "labelled"),
        )
        labelled = load_labelled(data / "labelled")
        scores: Scores = {
            measure: {UNTRAINED: [], TRAINED: []} for measure in ("kNN", "linear", "fine-tuned")
        }
        for seed in range(seeds):
            few = take_labels(labelled, None, shots, seed)
            for arm in (UNTRAINED, TRAINED):
                torch.manual_seed(seed)
                source = f"random:{BACKBONE}" if arm == UNTRAINED else str(pretrained.run)
                encoder = load_encoder(source, SIZE)
                probed = probe_encoder(encoder, few)["last"]
                scores["kNN"][arm].append(probed["knn"])
                scores["linear"][arm].append(probed["linear"])
                tuned = _finetuned(encoder, few, arm, seed)
                scores["fine-tuned"][arm].append(tuned)
        picture = run / "demo.png"
        _draw(labelled, scores, shots, picture)
        write_results(
            run,
            {
                "scores": scores,
                "shots": shots,
                "test_images": len(labelled.test),
                "seconds": round(time.monotonic() - started, 1),
            },
        )
        _tell(scores, labelled, shots, run)
        add_report(run)
    return DemoResult(run, scores, picture)


def _finetuned(encoder: Encoder, few: LabelledImages, arm: str, seed: int) -> float:
    """Test accuracy after fine-tuning: layer-wise decay as ``finetune`` has it, all else equal."""
    settings = ClassifierSettings(
        epochs=60,
        batch_size=min(50, len(few.train)),
        optimizer=OptimizerSettings(lr=2e-3, layer_decay=1.0 if arm == UNTRAINED else 0.75),
        smallest_crop=0.5,
        upright=False,
        seed=seed,
    )
    title = f"fine-tuning, {arm}, seed {seed}"
    model = train_classifier(encoder, few, settings, title=title)
    return score_classifier(model, encoder, few).top1


def _tell(scores: Scores, labelled: LabelledImages, shots: int, run: Path) -> None:
    classes = len(labelled.classes)
    console.print(
        f"Test accuracy with {shots} labels a class ({classes} classes, chance {1 / classes:.2f}), "
        f"mean ± standard deviation over seeds:",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("", UNTRAINED, TRAINED, "gain")
    for measure, arms in scores.items():
        before, after = np.array(arms[UNTRAINED]), np.array(arms[TRAINED])
        cells = [f"{x.mean():.3f} ± {_std(x):.3f}" for x in (before, after, after - before)]
        table.add_row(measure, cells[0], cells[1], ("+" if cells[2][0] != "-" else "") + cells[2])
    console.print(table)
    log.info("Written to %s:", run)
    for name, what in (
        ("demo.png", "this table as a picture"),
        ("results.json", "the figures of every seed"),
        ("data/", "the sample data: images, labels, boxes, masks"),
        ("pretrain/encoder/", "the encoder; timm loads it"),
        ("pretrain/curves.png", "how pre-training went"),
    ):
        log.info("  %-20s %s", name, what)


def _std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _draw(labelled: LabelledImages, scores: Scores, shots: int, file: Path) -> None:
    columns = len(labelled.classes)
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    above, below = np.ravel(np.array(figure.subfigures(2, 1, height_ratios=(1, 2))))
    grid = above.subplots(2, columns, squeeze=False)
    for column, name in enumerate(labelled.classes):
        members = np.flatnonzero(labelled.train.labels == column)
        for row, axes in enumerate(grid[:, column]):
            axes.axis("off")
            if row < len(members):
                axes.imshow(read_image(labelled.train.paths[members[row]]))
        grid[0, column].set_title(name, fontsize=9)
    axes = below.subplots()
    seeds = len(scores["kNN"][TRAINED])
    plot_bars(axes, scores, f"test accuracy with {shots} labels a class, {seeds} seeds")
    axes.axhline(1 / columns, color="grey", linestyle=":", linewidth=1)
    figure.savefig(file, dpi=100)
