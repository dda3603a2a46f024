"""``vissl-lite compare``: did pre-training help, and by how much?"""

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from vissl_lite.commands.leaks import guard
from vissl_lite.comparison.outcome import Judged, Outcome
from vissl_lite.comparison.plan import Plan
from vissl_lite.comparison.protocols import (
    Protocol,
    Score,
)
from vissl_lite.comparison.runner import Runner
from vissl_lite.comparison.store import Cell, Store
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.errors import check_arguments
from vissl_lite.report.additions import add_report, add_test_embeddings
from vissl_lite.run import (
    check_out,
    console,
    open_run,
    plain,
    resumed_config,
    write_config,
    write_results,
)
from vissl_lite.session import session
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.tasks import TaskName

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareResult:
    """What the comparison found.

    Attributes:
        run: the folder that was written.
        verdict: of the first encoder that is not the baseline, under the last protocol: helped, no
            difference, or hurt.
        sentences: the verdict on every arm under every protocol, in words.
        judged: by protocol and arm: the differences from the baseline with their intervals.
        left_out: arms that could not be had, and why.
    """

    run: Path
    verdict: str
    sentences: list[str]
    judged: dict[str, dict[str, Judged]]
    left_out: dict[str, str]


@session()
def compare(
    encoder: list[str] | str,
    data: str,
    out: str,
    task: TaskName = "classification",
    protocols: list[Protocol] | Protocol | None = None,
    fractions: list[float] | float | None = None,
    shots: list[int] | int | None = None,
    seeds: int = 3,
    baseline: str | None = None,
    layers: bool = False,
    annotations: str | None = None,
    detector: Literal["fcos", "retinanet", "faster_rcnn"] | None = None,
    k: int = 20,
    lr: list[float] | float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    upright: bool = True,
    leaks: Literal["warn", "exclude", "error"] = "warn",
    max_pixels: int = MAX_PIXELS,
    seed: int = 0,
    precision: str = "auto",
    num_workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> CompareResult:
    """Compare encoders on the same few labels: did pre-training help, and by how much?

    Every encoder gets the same labels, seeds and budget. What has to be chosen, such as learning
    rates, is chosen for each of them on validation images alone.

    Args:
        encoder: Runs, encoder folders, timm:NAME (pre-trained weights) or random:NAME (untrained).
        data: Labelled images, as for finetune.
        out: The run folder to write.
        task: What to learn from the labels.
        protocols: How to judge an encoder: knn and linear for a frozen one, finetune to train it.
            Default knn and linear, or finetune for detection, segmentation and several labels an
            image.
        fractions: Shares of the labels; default 0.01 0.05 0.1 1.
        shots: Labels a class, instead.
        seeds: How often each amount of labels is drawn, at least 3; the same for all encoders.
        baseline: The encoder that others are held against; default the untrained one, which is
            added if it is not among them.
        layers: Judge every stage by knn and linear too.
        annotations: Where the boxes or masks are, if --data is the folder of the images alone.
        detector: Which detector; default faster_rcnn.
        k: Neighbours that vote in knn.
        lr: Learning rates of finetune to choose from; default 0.0003 0.001 0.003. They are chosen
            for each encoder and amount of labels with the first seed.
        epochs: Of finetune; default as many as make 1,000 steps, between 10 and 100.
        batch_size: Of finetune; default its own.
        image_size: Side in pixels; default each encoder's own, or for random:NAME that of the
            images (for detection and segmentation that of finetune).
        upright: Whether the images have an up, for finetune.
        leaks: What to do about test images that an encoder has seen in pre-training, or that are in
            the training part too: warn, exclude them for all encoders, or stop with an error.
        max_pixels: Skip images with more pixels (height times width): a small file may decode to
            billions. The default is what Pillow takes.
        seed: The first of the seeds.
        precision: auto, or one of Lightning's such as 32-true or bf16-mixed.
        num_workers: Data workers of finetune; default by the cores there are.
        resume: Continue the comparison in --out: what is missing is run, further encoders and seeds
            included.
        overwrite: Replace the run in --out.

    Returns:
        The verdicts.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    config = plain(locals())
    check_arguments(compare, config)
    for name in ("encoder", "protocols", "fractions", "shots", "lr"):
        config[name] = _listed(config[name])
    inputs = [(name, config[name]) for name in ("encoder", "baseline", "data", "annotations")]
    resume = check_out(Path(out), inputs, resume, overwrite, "compare")
    if resume:
        defaults = {n: p.default for n, p in inspect.signature(compare).parameters.items()}
        config = resumed_config(Path(out), config, defaults)
        check_arguments(compare, config)
    limit_pixels(config["max_pixels"])
    hardware = Hardware(config["precision"], devices=1, num_workers=config["num_workers"])
    hardware.check()
    plan = Plan(**{name: config[name] for name in Plan.__annotations__})
    whole = plan.load_data()
    wanted = plan.choose_protocols(whole)
    arms, basis = plan.choose_arms()
    found, left_out = plan.try_arms(arms, basis, whole)
    whole, leaked = guard(whole, found, leaks, out)
    amounts, labels = plan.choose_amounts(whole)

    with open_run(Path(out), "compare", config, resume) as run:
        if resume:
            write_config(run, config)  # there may be more encoders and seeds than before
        for name, why in left_out.items():
            log.warning("left out: %(encoder)s: %(why)s", {"encoder": name, "why": why},
                        extra={"code": "encoder.left_out"})  # fmt: skip
        log.info(
            "%d encoders, %s, %s, %d seeds; %d test images",
            len(found), " and ".join(wanted), ", ".join(f"{labels[a.name]} labels ({a.name})"
            for a in amounts), plan.seeds, len(whole.test),
        )  # fmt: skip
        runner = Runner(plan, whole, amounts, Store(run / "runs"), hardware)
        scores: dict[Cell, Score] = {}
        for arm in found:
            scores |= runner.run(arm, wanted)
        metric = {"knn": "accuracy", "linear": "accuracy", "finetune": plan.figure(whole)}
        outcome = Outcome(scores, found, wanted, labels, plan.all_seeds(), basis, metric)
        outcome.write_csv(run / "runs.csv")
        outcome.plot(run / "compare.png")
        results = outcome.as_dict() | {
            "task": plan.task,
            "left_out": left_out,
            "train_images": len(whole.train),
            "val_images": len(whole.val),
            "test_images": len(whole.test),
            "classes": whole.classes,
            **leaked.figures(),
            "leaks_by_arm": {arm: leaked.count_of(arm) for arm in found},
        }
        leaked.write(run)
        write_results(run, results)
        _tell(outcome, run)
        first = plan.load(found[0], plan.seed, whole)
        add_test_embeddings(run, first, whole, plan.seed)
        add_report(run)
    return CompareResult(run, outcome.verdict, outcome.sentences(), outcome.judged, left_out)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]


def _tell(outcome: Outcome, run: Path) -> None:
    for protocol in outcome.protocols:
        table = Table(title=f"{protocol}: test {outcome.metric[protocol]}, mean ± standard "
                      f"deviation over {len(outcome.seeds)} seeds")  # fmt: skip
        table.add_column("labels", overflow="fold")
        for amount, count in outcome.labels.items():
            table.add_column(f"{count}\n({amount})")
        for arm in outcome.arms:
            figures = (outcome.runs(arm, protocol, amount) for amount in outcome.labels)
            table.add_row(arm, *(f"{one.mean:.3f} ± {one.std:.3f}" for one in figures))
            if arm != outcome.baseline:
                found = outcome.judged[protocol][arm].by_amount.values()
                gains = (f"{one.mean:+.3f}\n({one.low:+.3f} to {one.high:+.3f})" for one in found)
                table.add_row("  difference (95 %)", *gains, style="dim")
        console.print(table)
    for sentence in outcome.sentences():
        log.info("%s", sentence)
    log.info("Written: %s, %s, %s", run / "results.json", run / "runs.csv", run / "compare.png")
