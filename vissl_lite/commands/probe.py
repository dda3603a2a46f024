"""``vissl-lite probe``: judge a frozen encoder."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from vissl_lite.commands.leaks import guard
from vissl_lite.data.images import suitable_size
from vissl_lite.data.labelled import LabelledImages, Part, load_labelled, take_labels
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
from vissl_lite.evaluation.features import extract
from vissl_lite.evaluation.knn import knn_predict
from vissl_lite.evaluation.linear import linear_probe
from vissl_lite.inference import check_outputs
from vissl_lite.report.additions import add_report, add_test_embeddings
from vissl_lite.run import check_out, console, open_run, write_results
from vissl_lite.session import session
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


@session()
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
    """kNN and linear accuracy on the test part, by layer (``last``: the encoder's output).

    kNN votes among training and validation images; the linear probe chooses its penalty on the
    validation part and is then fitted to both. Test labels are used for counting alone.

    Args:
        encoder: the frozen encoder.
        labelled: the data.
        layers: judge every stage too.
        k: neighbours.
        temperature: of their votes.
    """
    parts = (labelled.train, labelled.val, labelled.test)
    with progress_bar() as bar:
        task = bar.add_task("features", total=sum(len(part) for part in parts), info="")

        def advance(images: int) -> None:
            bar.advance(task, images)

        (train, y_train), (val, y_val), (test, y_test) = (
            _features(encoder, part, layers, advance) for part in parts
        )
        fitting = bar.add_task("linear probes", total=len(test), info="")
        scores = {}
        for name in test:
            both = [train[name], val[name]] if len(y_val) else [train[name]]
            labels = np.concatenate([y_train, y_val])
            near = knn_predict(np.concatenate(both), labels, test[name], k, temperature)
            fitted = linear_probe((train[name], y_train), (val[name], y_val), test[name])
            scores[name] = {
                "knn": float((near == y_test).mean()),
                "linear": float((fitted.test_predictions == y_test).mean()),
            }
            bar.advance(fitting)
    return scores


def _features(
    encoder: Encoder, part: Part, layers: bool, progress: Callable[[int], None]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    if len(part) == 0:  # too few labels for a validation part
        names = ["last", *(encoder.stage_names() if layers else [])]
        return dict.fromkeys(names, np.empty((0, 1), np.float32)), part.labels
    features, good = extract(encoder, part.paths, layers, progress)
    check_outputs(features.values(), f"some of the {len(part.paths)} images")
    return features, part.labels[good]
