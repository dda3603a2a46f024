"""``vissl-lite compare``: did pre-training help, and by how much?"""

import logging
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vissl_lite.commands.leaks import guard
from vissl_lite.comparison.options import CompareOptions
from vissl_lite.comparison.outcome import ComparedEncoder, Outcome
from vissl_lite.comparison.plan import Plan
from vissl_lite.comparison.protocols import Score
from vissl_lite.comparison.runner import Runner
from vissl_lite.comparison.store import Cell, Store
from vissl_lite.data.reading import limit_pixels
from vissl_lite.options import command
from vissl_lite.report.additions import add_report, add_test_embeddings
from vissl_lite.run import (
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
    """What the comparison found.

    Attributes:
        run: the folder that was written.
        verdict: of the first encoder that is not the baseline, under the last protocol: helped, no
            difference, or hurt.
        sentences: the verdict on every encoder under every protocol, in words.
        compared: by protocol and encoder: the differences from the baseline with their intervals.
        left_out: encoders that could not be had, and why.
    """

    run: Path
    verdict: str
    sentences: list[str]
    compared: dict[str, dict[str, ComparedEncoder]]
    left_out: dict[str, str]


@command(CompareOptions)
def compare(options: CompareOptions) -> CompareResult:
    """Compare encoders on the same few labels: did pre-training help, and by how much?

    Every encoder gets the same labels, seeds and budget. What has to be chosen, such as learning
    rates, is chosen for each of them on validation images alone.

    Returns:
        The verdicts.

    Raises:
        UserError: something that was given can't work; nothing is written then.
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
    whole = plan.load_data()
    wanted = plan.choose_protocols(whole)
    encoders, baseline = plan.choose_encoders()
    found, left_out = plan.try_encoders(encoders, baseline, whole)
    whole, leaked = guard(whole, found, options.leaks, str(out))
    amounts, labels = plan.choose_amounts(whole)

    with open_run(out, "compare", config, resume) as run:
        if resume:
            write_config(run, config)  # there may be more encoders and seeds than before
        for name, why in left_out.items():
            log.warning(
                "left out: %(encoder)s: %(why)s",
                {"encoder": name, "why": why},
                extra={"code": "encoder.left_out"},
            )
        log.info(
            "%d encoders, %s, %s, %d seeds; %d test images",
            len(found),
            " and ".join(wanted),
            ", ".join(f"{labels[a.name]} labels ({a.name})" for a in amounts),
            options.seeds,
            len(whole.test),
        )
        runner = Runner(plan, whole, amounts, Store(run / "runs"), hardware)
        scores: dict[Cell, Score] = {}
        for encoder in found:
            scores |= runner.run(encoder, wanted)
        metric = {"knn": "accuracy", "linear": "accuracy", "finetune": plan.figure(whole)}
        outcome = Outcome(scores, found, wanted, labels, options.all_seeds(), baseline, metric)
        outcome.write_csv(run / "runs.csv")
        outcome.plot(run / "compare.png")
        results = outcome.as_dict() | {
            "task": options.task,
            "left_out": left_out,
            "train_images": len(whole.train),
            "val_images": len(whole.val),
            "test_images": len(whole.test),
            "classes": whole.classes,
            **leaked.figures(),
            "leaks_by_arm": {encoder: leaked.count_of(encoder) for encoder in found},
        }
        leaked.write(run)
        write_results(run, results)
        _print_results(outcome, run)
        first = plan.load(found[0], options.seed, whole)
        add_test_embeddings(run, first, whole, options.seed)
        add_report(run)
    return CompareResult(run, outcome.verdict, outcome.sentences(), outcome.compared, left_out)


def _print_results(outcome: Outcome, run: Path) -> None:
    for protocol in outcome.protocols:
        table = Table(
            title=f"{protocol}: test {outcome.metric[protocol]}, mean ± standard "
            f"deviation over {len(outcome.seeds)} seeds"
        )
        table.add_column("labels", overflow="fold")
        for amount, count in outcome.labels.items():
            table.add_column(f"{count}\n({amount})")
        for encoder in outcome.encoders:
            figures = (outcome.runs(encoder, protocol, amount) for amount in outcome.labels)
            table.add_row(encoder, *(f"{one.mean:.3f} ± {one.std:.3f}" for one in figures))
            if encoder != outcome.baseline:
                found = outcome.compared[protocol][encoder].by_amount.values()
                gains = (f"{one.mean:+.3f}\n({one.low:+.3f} to {one.high:+.3f})" for one in found)
                table.add_row("  difference (95 %)", *gains, style="dim")
        console.print(table)
    for sentence in outcome.sentences():
        log.info("%s", sentence)
    log.info("Written: %s, %s, %s", run / "results.json", run / "runs.csv", run / "compare.png")
