"""``vissl-lite probe``: evaluate a frozen encoder."""

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from vissl_lite.commands.labelled import dry_run, show_data
from vissl_lite.commands.leaks import guard
from vissl_lite.data.image_survey import ImageSet, ImageSettings
from vissl_lite.data.images import suitable_size
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.encoders.folder import choose_slice_axis, encoder_for, fitting_size, is_untrained
from vissl_lite.errors import (
    check_count,
    check_image_size,
    check_positive,
    check_seed,
)
from vissl_lite.evaluation.attentive import (
    check_memory,
    extract_tokens,
    fit_attentive,
    number_of_fits,
    predict_attentive,
)
from vissl_lite.evaluation.probe import (
    PROBES,
    ProbeScore,
    evaluate_features,
    extract_part,
    score_predictions,
)
from vissl_lite.options import Options, StrPath, command
from vissl_lite.report.additions import add_report, add_test_embeddings
from vissl_lite.run import check_out, console, open_run, write_results
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.classification.data import LabelledImages, load_labelled
from vissl_lite.transfer.classification.linear_head import make_folds
from vissl_lite.transfer.classification.options import LabelOptions
from vissl_lite.transfer.sources.parts import Split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy of frozen features on the test images.

    Attributes:
        run: Run folder.
        knn: KNN accuracy of the encoder's output.
        linear: Accuracy of the linear probe on the encoder's output.
        layers: ``{"layer3": {"knn": ..., "linear": ...}, ...}`` for each stage, if requested.
        attentive: Accuracy of the attentive probe on the encoder's tokens; None unless requested.
    """

    run: Path
    knn: float
    linear: float
    layers: dict[str, dict[str, float]]
    attentive: float | None = None

    def __fspath__(self) -> str:
        return str(self.run)


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(Options, ImageSettings, LabelOptions):
    """Options of ``probe``."""

    encoder: StrPath
    """A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME (untrained, as a
    baseline)."""
    data: StrPath
    """Labelled images: class folders, with or without train/, val/ and test/, or a table (.csv,
    .tsv, .jsonl) of images and labels; docs/data.md lists the layouts."""
    out: StrPath
    """Run folder to write."""
    layers: bool = False
    """Also evaluate every stage. Pretexts often learn the best features before the last stage."""
    attentive: bool = False
    """Also train an attentive probe: attention pooling over the patch tokens, or over the positions
    of the last feature map, and a linear classifier. Fairer to masked encoders such as mae, whose
    pooled features understate them. Keeps the tokens of the training images in memory."""
    k: int = 20
    """Number of neighbors in kNN."""
    temperature: float = 0.07
    """Temperature in kNN: a neighbor with similarity s votes with weight exp(s / temperature)."""
    fraction: float | None = None
    """Use this fraction of the labels."""
    shots: int | None = None
    """Use this many training and validation labels per class."""
    image_size: int | None = None
    """Side length of the input in pixels. Default: that of the encoder, or for random:NAME that of
    the images."""
    leaks: Literal["warn", "exclude", "error"] = "warn"
    """What to do about test images that were used in pre-training or are also among the training
    images: warn, exclude them, or stop with an error."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width) than this; a small file can decode to
    billions of pixels. The default is Pillow's limit."""
    refit: bool | None = None
    """Whether the probes are fitted to the validation labels too. Default: true if the validation
    part was taken out of the training labels, false for a validation part of your own."""
    seed: int = 0
    """Seed for the split, the choice of labels, and the weights of an untrained encoder."""
    dry_run: bool = False
    """Only print what is read of the data, and write nothing."""
    overwrite: bool = False
    """Replace an existing run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_images()
        check_count("k", self.k)
        check_count("class_level", self.class_level)
        check_image_size(self.image_size)
        check_positive("temperature", self.temperature)
        check_seed(self.seed)


@command(ProbeOptions)
def probe(options: ProbeOptions) -> ProbeResult:
    """Evaluate a frozen encoder by kNN and by a linear classifier on its features.

    With --attentive also by a classifier that pools its tokens by attention.

    Returns:
        The accuracies.

    Raises:
        UserError: An option is invalid; nothing is written then.
    """
    out, name, data = Path(options.out), os.fspath(options.encoder), os.fspath(options.data)
    limit_pixels(options.max_pixels)
    choose_slice_axis(options.axis, options.encoder)
    check_out(out, [("encoder", name), ("data", data)], overwrite=options.overwrite)
    labelled = load_labelled(data, options.seed, options=options)
    labelled = labelled.subsample(options.fraction, options.shots, options.seed)
    torch.manual_seed(options.seed)
    size = options.image_size
    if size is None and is_untrained(name):
        size = fitting_size(name, suitable_size(labelled.train.paths))
    encoder = encoder_for(name, size, ImageSet(labelled.train.paths, options))
    labelled, leaks = guard(labelled, [name], options.leaks, None if options.dry_run else str(out))
    used = labelled.for_probes(options.refit)
    if options.attentive:
        check_memory(encoder, len(used.train))
    if options.dry_run:
        dry_run(labelled, leaks)
        return ProbeResult(out, 0.0, 0.0, {})
    with open_run(out, "probe", options.as_config()) as run:
        show_data(labelled, leaks)
        labelled.write(run / "split.csv")
        leaks.write(run)
        scores = probe_encoder(encoder, used, options.layers, options.k, options.temperature)
        last = scores.pop("last")
        if options.attentive:
            score = probe_tokens(encoder, used, options.seed)
            last["attentive"] = score.accuracy
            log.info("penalty of the attentive probe: %g", score.chosen["penalty"])
        groups = used.groups("train")
        trained_on = (
            f"Fitted to {len(used.train)} labels"
            f"{'' if groups is None else f' of {len(np.unique(groups))} groups'}; penalties are "
            f"chosen by cross-validation of them, where there are enough."
        )
        results: dict[str, Any] = {
            **last,
            "majority": labelled.majority(),
            "layers": scores,
            "encoder": name,
            "k": min(options.k, len(used.train)),
            "temperature": options.temperature,
            "image_size": encoder.image_size,
            "train_images": len(used.train),
            "refit": used is not labelled,
            "trained_on": trained_on,
            "test_images": len(labelled.test),
            "classes": labelled.classes,
            **leaks.figures(),
        }
        write_results(run, results)
        log.info(trained_on)
        console.print(f"{name}: test accuracy", highlight=False, soft_wrap=True)
        table = Table("layer", "kNN", *(name for name in last if name != "knn"))
        for layer, row in {**scores, "last": last}.items():
            table.add_row(layer, *(f"{row[name]:.3f}" if name in row else "" for name in last))
        majority = [f"{results['majority']:.3f}"] * len(last)
        table.add_row("always the most frequent class", *majority, style="dim")
        console.print(table)
        log.info("Written: %s", run / "results.json")
        add_test_embeddings(run, encoder, labelled, options.seed)
        add_report(run)
    return ProbeResult(run, last["knn"], last["linear"], scores, last.get("attentive"))


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
        labelled: Labelled images; the probes are fitted to the training part.
        layers: Also evaluate every stage.
        k: Number of neighbors that vote.
        temperature: Temperature of the votes.

    Returns:
        ``{"last": {"knn": ..., "linear": ...}, ...}``; ``last`` is the encoder's output.
    """
    parts: tuple[Split, ...] = ("train", "test")
    with progress_bar() as bar:
        total = sum(len(labelled.part(name)) for name in parts)
        advance = partial(bar.advance, bar.add_task("features", total=total, info=""))
        train, test = (
            extract_part(encoder, labelled.part(name), layers, advance, labelled.groups(name))
            for name in parts
        )
        fitting = bar.add_task("probes", total=len(test.by_layer), info="")
        scores: dict[str, dict[str, float]] = {}
        for layer in test.by_layer:
            found = {
                name: evaluate_features(name, train, test, k, temperature, layer) for name in PROBES
            }
            scores[layer] = {name: score.accuracy for name, score in found.items()}
            for name, score in found.items():
                _warn_of_one_class(name, layer, score, labelled.classes)
            bar.advance(fitting)
    return scores


def probe_tokens(encoder: Encoder, labelled: LabelledImages, seed: int) -> ProbeScore:
    """Score of an attentive probe on the test part; see ``fit_attentive``.

    Args:
        encoder: Frozen encoder.
        labelled: Labelled images; the probe is fitted to the training part.
        seed: Seed of the order of the images.
    """
    train, test = labelled.train, labelled.test
    with progress_bar() as bar:
        task = bar.add_task("tokens", total=len(train), info="")
        tokens, good = extract_tokens(encoder, train.paths, partial(bar.advance, task))
        labels, groups = train.labels[good], labelled.groups("train")
        folds = make_folds(labels, seed, None if groups is None else groups[good])
        task = bar.add_task("attentive probe", total=number_of_fits(folds), info="")
        count, done = len(labelled.classes), partial(bar.advance, task)
        probe = fit_attentive(tokens, labels, count, folds, seed, done)
        task = bar.add_task("test", total=len(test), info="")
        found, good = predict_attentive(probe, encoder, test.paths, partial(bar.advance, task))
    score = score_predictions(found, test.labels[good], {"penalty": probe.penalty})
    _warn_of_one_class("attentive", "last", score, labelled.classes)
    return score


def _warn_of_one_class(probe: str, layer: str, score: ProbeScore, classes: list[str]) -> None:
    if score.one_class is not None:
        log.warning(
            "%(probe)s on the layer %(layer)s classifies all %(images)d test images as %(class)s",
            {
                "probe": probe,
                "layer": layer,
                "images": len(score.right),
                "class": classes[score.one_class],
            },
            extra={"code": "prediction.one_class"},
        )
