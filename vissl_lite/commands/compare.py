"""``vissl-lite compare``: measure whether pre-training helps, and by how much."""

import logging
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vissl_lite.commands.labelled import dry_run, show_data
from vissl_lite.commands.leaks import guard
from vissl_lite.comparison.options import CompareOptions
from vissl_lite.comparison.outcome import ComparedEncoder, Outcome
from vissl_lite.comparison.plan import Plan
from vissl_lite.comparison.protocols import Score
from vissl_lite.comparison.runner import Runner
from vissl_lite.comparison.store import Cell, Store
from vissl_lite.data.reading import limit_pixels
from vissl_lite.encoders.folder import choose_slice_axis
from vissl_lite.options import command
from vissl_lite.report.additions import add_report, add_test_embeddings
from vissl_lite.run import (
    RESULTS,
    check_out,
    console,
    open_run,
    read_config,
    write_config,
    write_results,
)
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.tasks import check_given, find_task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareResult:
    """Result of a comparison.

    Attributes:
        run: Run folder.
        verdict: Verdict on the first encoder that is not the baseline, under the last protocol:
            ``helped``, ``no difference`` or ``hurt``.
        sentences: Verdict on every encoder under every protocol, as sentences.
        compared: Differences from the baseline with their intervals, by protocol and encoder.
        left_out: Encoders that could not be loaded, and why.
    """

    run: Path
    verdict: str
    sentences: list[str]
    compared: dict[str, dict[str, ComparedEncoder]]
    left_out: dict[str, str]


@command(CompareOptions)
def compare(options: CompareOptions) -> CompareResult:
    """Compare encoders on the same few labels: did pre-training help, and by how much?

    Every encoder gets the same labels, seeds and budget. Hyperparameters such as learning rates are
    chosen for each encoder on labels that are held out of a training, never on test images. With
    --selection, ways to choose the images that are labelled are compared instead: does choosing
    pay, and how many labels does it save?

    Returns:
        Verdicts and differences.

    Raises:
        UserError: An option is invalid; nothing is written then.
    """
    out = Path(options.out)
    names = ("encoder", "baseline", "data", "annotations")
    inputs = [(name, options.as_config().get(name)) for name in names]
    resume = check_out(out, inputs, options.resume, options.overwrite, "compare")
    if resume:
        options = options.resumed(read_config(out))
    check_given(find_task(options.task), options.given)
    config = options.as_config()
    limit_pixels(options.max_pixels)
    hardware = Hardware(options.precision, devices=1, num_workers=options.num_workers)
    hardware.check()
    plan = Plan(options)
    choose_slice_axis(options.axis, *plan.encoders, options.baseline)
    data = plan.load_data()
    protocols = plan.choose_protocols(data)
    encoders, baseline = plan.choose_encoders()
    left_out: dict[str, str] = {}
    if options.selection:
        plan.load(plan.encoders[0], options.seed, data)  # fails early without its weights
        loaded = plan.encoders
    else:
        encoders, left_out = plan.load_encoders(encoders, baseline, data)
        loaded = encoders
    data, leaks = guard(data, loaded, options.leaks, None if options.dry_run else str(out))
    if options.dry_run:
        dry_run(data, leaks)
        return CompareResult(out, "", [], {}, left_out)
    simulation = plan.simulate(data, leaks.prints)
    if simulation is None:
        amounts, labels = plan.choose_amounts(data)
    else:
        amounts, labels = [], simulation.labels

    with open_run(out, "compare", config, resume) as run:
        show_data(data, leaks)
        if resume:
            write_config(run, config)  # encoders and seeds may have been added
            (run / RESULTS).unlink(missing_ok=True)  # the report would show them as the new ones
        for name, why in left_out.items():
            log.warning(
                "left out: %(encoder)s: %(why)s",
                {"encoder": name, "why": why},
                extra={"code": "encoder.left_out"},
            )
        log.info(
            "%d %s, %s, %s, %d seeds; %d test images",
            len(encoders),
            "encoders" if simulation is None else "ways to choose images",
            " and ".join(protocols),
            ", ".join(f"{count} ({name})" for name, count in labels.items()),
            options.seeds,
            len(data.test),
        )
        log.info("%s", plan.trained_on(data))
        runner = Runner(plan, data, amounts, Store(run / "runs"), hardware, simulation)
        scores: dict[Cell, Score] = {}
        for encoder in encoders:
            scores |= runner.run(encoder, protocols)
        metric = {"knn": "accuracy", "linear": "accuracy", "finetune": plan.finetune_metric(data)}
        outcome = Outcome(
            scores,
            encoders,
            protocols,
            labels,
            options.all_seeds(),
            baseline,
            metric,
            data.groups("test"),
            data.sampling_units(),
            ("with it", "without") if simulation is None else ("chosen by it", "random ones"),
        )
        outcome.write_csv(run / "runs.csv")
        outcome.plot(run / "compare.png")
        majority = data.majority()
        results = outcome.as_dict() | {
            **({} if majority is None else {"majority": majority}),
            "task": options.task,
            "compared": "encoder" if simulation is None else "choice",
            "trained_on": plan.trained_on(data),
            "left_out": left_out,
            "train_images": len(data.train),
            "val_images": len(data.val),
            "test_images": len(data.test),
            "classes": data.classes,
            **leaks.figures(),
            "leaks_by_arm": {encoder: leaks.count_of(encoder) for encoder in loaded},
        }
        leaks.write(run)
        write_results(run, results)
        if majority is not None:
            log.info("Always predicting the most frequent class: accuracy %.3f", majority)
        _print_results(outcome, run, results["compared"])
        if simulation is not None:
            simulation.write_csv(run / "selected.csv")
        first = plan.load(loaded[0], options.seed, data)
        add_test_embeddings(run, first, data, options.seed)
        add_report(run)
    return CompareResult(run, outcome.verdict, outcome.sentences(), outcome.compared, left_out)


def _print_parts(outcome: Outcome, protocol: str, compared: str) -> None:
    """Print what training, held-out and test images show beside each other: overfitting."""
    table = Table(
        title=f"{protocol}: {outcome.metric[protocol]} on training / held-out / test images"
    )
    table.add_column(compared, overflow="fold")
    for amount in outcome.labels:
        table.add_column(amount)
    for encoder in outcome.encoders:
        cells = []
        for amount in outcome.labels:
            found = outcome.by_part(encoder, protocol, amount)
            figures = [found.get(part) for part in ("train", "val", "test")]
            cells.append(" / ".join("-" if one is None else f"{one:.3f}" for one in figures))
        table.add_row(encoder, *cells)
    console.print(table)


def _print_results(outcome: Outcome, run: Path, compared: str) -> None:
    for protocol in outcome.protocols:
        table = Table(
            title=f"{protocol}: test {outcome.metric[protocol]}, mean ± standard "
            f"deviation over {len(outcome.seeds)} seeds"
        )
        split = any(count.val for count in outcome.labels.values())
        heading = "labels: training\n+ validation" if split else "labels"
        table.add_column(heading, overflow="fold")
        for amount, count in outcome.labels.items():
            table.add_column(f"{count.short}\n({amount})")
        for encoder in outcome.encoders:
            runs = (outcome.runs(encoder, protocol, amount) for amount in outcome.labels)
            table.add_row(encoder, *(f"{one.mean:.3f} ± {one.std:.3f}" for one in runs))
            if encoder != outcome.baseline:
                found = outcome.compared[protocol][encoder].by_amount.values()
                gains = (f"{one.mean:+.3f}\n({one.interval})" for one in found)
                table.add_row("  difference (95 %)", *gains, style="dim")
        console.print(table)
        if outcome.by_part(outcome.encoders[0], protocol, next(iter(outcome.labels))):
            _print_parts(outcome, protocol, compared)
    for sentence in outcome.sentences():
        log.info("%s", sentence)
    log.info("Written: %s, %s, %s", run / "results.json", run / "runs.csv", run / "compare.png")
