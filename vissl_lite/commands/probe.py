"""``vissl-lite probe``: judge a frozen encoder."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from vissl_lite.commands.leaks import guard
from vissl_lite.commands.report import add_report, add_test_embeddings
from vissl_lite.data.images import suitable_size
from vissl_lite.data.labelled import LabelledImages, load_labelled, take_labels
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.encoder import Encoder
from vissl_lite.encoder_folder import encoder_for
from vissl_lite.errors import (
    check_arguments,
    check_count,
    check_image_size,
    check_positive,
    check_seed,
)
from vissl_lite.evaluation.probe import PROBES, evaluate_features, extract_part
from vissl_lite.run import check_out, console, open_run, write_results
from vissl_lite.training.progress import progress_bar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeResult:
    """How good frozen features are, as accuracy on the test part.

    Attributes:
        run: the folder that was written.
        knn: of the encoder's output.
        linear: likewise.
        layers: ``{"layer3": {"knn": ..., "linear": ...}, ...}`` for each stage, if asked for.
    """

    run: Path
    knn: float
    linear: float
    layers: dict[str, dict[str, float]]


def probe(
    encoder: str,
    data: str,
    out: str,
    layers: bool = False,
    k: int = 20,
    temperature: float = 0.07,
    fraction: float | None = None,
    shots: int | None = None,
    image_size: int | None = None,
    leaks: Literal["warn", "exclude", "error"] = "warn",
    max_pixels: int = MAX_PIXELS,
    seed: int = 0,
    overwrite: bool = False,
) -> ProbeResult:
    """Judge a frozen encoder by kNN and by a linear classifier on its features.

    Args:
        encoder: A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME
            (untrained, the baseline).
        data: Labelled images: train/<class> and test/<class> folders, plain class folders, or a
            .csv file.
        out: The run folder to write.
        layers: Judge every stage too: pretext tasks are often best before the last one.
        k: Neighbours that vote.
        temperature: A neighbour of similarity s votes with weight exp(s / temperature).
        fraction: Use this share of the labels.
        shots: Use this many labels a class.
        image_size: Side in pixels; default the encoder's, or for random:NAME that of the images.
        leaks: What to do about test images that were seen in pre-training or are in the training
            part too: warn, exclude them, or stop with an error.
        max_pixels: Skip images with more pixels (height times width): a small file may decode to
            billions. The default is what Pillow takes.
        seed: Of the split, the part of the labels, and an untrained encoder.
        overwrite: Replace the run in --out.

    Returns:
        The accuracies.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    config = dict(locals())
    check_arguments(probe, config)
    limit_pixels(max_pixels)
    check_count("k", k)
    check_image_size(image_size)
    check_positive("temperature", temperature)
    check_seed(seed)
    check_out(Path(out), [("encoder", encoder), ("data", data)], overwrite=overwrite)
    labelled = take_labels(load_labelled(data, seed), fraction, shots, seed)
    torch.manual_seed(seed)
    if image_size is None and encoder.startswith("random:"):
        image_size = suitable_size(labelled.train.paths)
    judged = encoder_for(encoder, image_size)
    labelled, found = guard(labelled, [encoder], leaks, out)
    with open_run(Path(out), "probe", config) as run:
        labelled.write(run / "split.csv")
        found.write(run)
        scores = probe_encoder(judged, labelled, layers, k, temperature)
        last = scores.pop("last")
        results: dict[str, Any] = {
            **last,
            "layers": scores,
            "encoder": encoder,
            "k": min(k, len(labelled.train) + len(labelled.val)),
            "temperature": temperature,
            "image_size": judged.image_size,
            "train_images": len(labelled.train) + len(labelled.val),
            "test_images": len(labelled.test),
            "classes": labelled.classes,
            **found.figures(),
        }
        write_results(run, results)
        console.print(f"{encoder}: test accuracy", highlight=False, soft_wrap=True)
        table = Table("layer", "kNN", "linear")
        for name, row in {**scores, "last": last}.items():
            table.add_row(name, f"{row['knn']:.3f}", f"{row['linear']:.3f}")
        console.print(table)
        log.info("Written: %s", run / "results.json")
        add_test_embeddings(run, judged, labelled, seed)
        add_report(run)
    return ProbeResult(run, last["knn"], last["linear"], scores)


def probe_encoder(
    encoder: Encoder,
    labelled: LabelledImages,
    layers: bool = False,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, dict[str, float]]:
    """kNN and linear accuracy on the test part, by layer; see ``evaluate_features``.

    Args:
        encoder: Frozen encoder.
        labelled: Labelled images.
        layers: Also evaluate every stage.
        k: Number of neighbors that vote.
        temperature: Temperature of their votes.

    Returns:
        ``{"last": {"knn": ..., "linear": ...}, ...}``; ``last`` is the encoder's output.
    """
    parts = (labelled.train, labelled.val, labelled.test)
    with progress_bar() as bar:
        task = bar.add_task("features", total=sum(len(part) for part in parts), info="")
        train, val, test = (
            extract_part(encoder, part, layers, partial(bar.advance, task)) for part in parts
        )
        fitting = bar.add_task("probes", total=len(test.by_layer), info="")
        scores = {}
        for layer in test.by_layer:
            scores[layer] = {
                name: evaluate_features(name, train, val, test, k, temperature, layer).accuracy
                for name in PROBES
            }
            bar.advance(fitting)
    return scores
