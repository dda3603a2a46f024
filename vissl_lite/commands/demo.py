"""``vissl-lite demo``: run ``pretrain`` and ``compare`` on sample data."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vissl_lite.commands.compare import CompareResult, compare
from vissl_lite.commands.pretrain import PretrainResult, pretrain
from vissl_lite.comparison.outcome import PROTOCOL_WORDS
from vissl_lite.errors import UserError, check_count
from vissl_lite.options import Options, StrPath, command, parse_time
from vissl_lite.report.additions import add_report
from vissl_lite.run import check_out, open_run, read_results, write_results
from vissl_lite.sample.dataset import make_sample_data
from vissl_lite.training.progress import progress_bar

log = logging.getLogger(__name__)

# Small enough for about twenty epochs in two minutes on two cores.
BACKBONE, IMAGE_SIZE = "resnet10t_slim", 48
FINETUNE_EPOCHS, FINETUNE_LR = 20, 3e-3
MAX_UNLABELLED = 10**6


@dataclass(frozen=True)
class DemoResult:
    """Result of the demo.

    Attributes:
        run: Run folder.
        pretrained: Result of ``pretrain``.
        compared: Result of ``compare``, with the verdict.
    """

    run: Path
    pretrained: PretrainResult
    compared: CompareResult


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Options of ``demo``."""

    out: StrPath = "runs/demo"
    """Run folder to write."""
    shots: int = 10
    """Number of training and of validation labels per class, at most 50 and 20."""
    seeds: int = 3
    """Number of repetitions of the comparison, at least 3, each with other labels and other
    untrained weights. The pre-trained encoder is always the same."""
    unlabelled: int = 4000
    """Number of images to pre-train on."""
    kind: Literal["photographs", "multiband"] = "photographs"
    """Kind of the images: photographs, or arrays of six bands of 16 bits, as of a satellite."""
    max_time: str | int = "00:02:00"
    """Time budget of pre-training, as HH:MM:SS or in seconds."""
    overwrite: bool = False
    """Replace an existing run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 3:
            raise UserError(f"--seeds {self.seeds} must be at least 3 to estimate the spread")
        check_count("seeds", self.seeds, 1000)
        check_count("shots", self.shots, 50)
        if not 2 <= self.unlabelled <= MAX_UNLABELLED:
            raise UserError(f"--unlabelled {self.unlabelled} must be from 2 to {MAX_UNLABELLED}")
        parse_time(self.max_time)


@command(DemoOptions)
def demo(options: DemoOptions) -> DemoResult:
    """Generate sample images, pre-train an encoder, and compare it with an untrained one.

    Returns:
        The results of both commands.

    Raises:
        UserError: An option is invalid; nothing is written then.
    """
    out = Path(options.out)
    check_out(out, overwrite=options.overwrite)
    started = time.monotonic()
    with open_run(out, "demo", options.as_config()) as run:
        data = run / "data"
        with progress_bar() as bar:
            task = bar.add_task("drawing", total=None, info="sample images")
            make_sample_data(
                data,
                unlabelled=options.unlabelled,
                kind=options.kind,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        pretrained = pretrain(
            data=str(data / "unlabelled"),
            out=str(run / "pretrain"),
            pretext={
                "name": "simclr",
                "temperature": 0.2,
                "min_crop_scale": 0.5,
                "color": 0.6,
            },
            upright=False,
            backbone=BACKBONE,
            image_size=IMAGE_SIZE,
            max_time=options.max_time,
            probe_data=str(data / "labelled"),
        )
        compared = compare(
            encoder=str(pretrained.run),
            data=str(data / "labelled"),
            out=str(run / "compare"),
            protocols=["knn", "linear", "finetune"],
            shots=options.shots,
            seeds=options.seeds,
            image_size=IMAGE_SIZE,
            upright=False,
            refit=True,
            frozen_norm=False,  # the encoder is trained for minutes: its norms may change
            lr=FINETUNE_LR,
            epochs=FINETUNE_EPOCHS,
        )
        found = read_results(compared.run, "protocols", "sentences", "test_images", "majority")
        results = {
            "scores": _scores(found["protocols"], str(pretrained.run)),
            "majority": found["majority"],
            "verdict": compared.verdict,
            "sentences": found["sentences"],
            "shots": options.shots,
            "test_images": found["test_images"],
            "seconds": round(time.monotonic() - started, 1),
        }
        write_results(run, results)
        log.info("Written to %s:", run)
        for name, what in (
            ("compare/", "the comparison: report.html, compare.png, results.json"),
            ("pretrain/", "pre-training: report.html, curves.png"),
            ("pretrain/encoder/", "the encoder; timm loads it"),
            ("data/", "the sample data: images, labels, boxes, masks"),
        ):
            log.info("  %-20s %s", name, what)
        add_report(run)
    return DemoResult(run, pretrained, compared)


def _scores(protocols: dict[str, Any], pretrained: str) -> dict[str, dict[str, list[float]]]:
    """Test metric of each seed, by protocol and ``untrained`` or ``pre-trained``."""
    scores: dict[str, dict[str, list[float]]] = {}
    for protocol, title in PROTOCOL_WORDS.items():
        encoders: dict[str, Any] = protocols[protocol]["arms"]
        (trained,) = encoders[pretrained].values()  # there is only one amount of labels
        ((untrained,),) = (one.values() for name, one in encoders.items() if name != pretrained)
        scores[title] = {"untrained": untrained["runs"], "pre-trained": trained["runs"]}
    return scores
