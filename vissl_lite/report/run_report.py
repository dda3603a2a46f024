"""``report.html``: one page with the results of a run, made from its run folder alone."""

import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from vissl_lite.encoders.config import ENCODER_CONFIG, read_model_config
from vissl_lite.errors import UserError
from vissl_lite.evaluation.embedding import CHOSEN, ImageMap
from vissl_lite.options import flatten
from vissl_lite.report.charts import curves, histograms
from vissl_lite.report.folder import RunFolder, read_run
from vissl_lite.report.gallery import pictures, predicted
from vissl_lite.report.map import map_layout
from vissl_lite.report.page import Block, render, write_page
from vissl_lite.report.results import leak_blocks, main_figures, result_blocks, verdicts
from vissl_lite.report.selection import chosen_images, coverage_by_budget
from vissl_lite.run import LOG, MAP, METRICS, RESULTS
from vissl_lite.run_folder import RUN_CONFIG
from vissl_lite.run_record import RunRecord, WarningRecord
from vissl_lite.transfer.summary import rows_of, title_of

REPORT = "report.html"

# Code of warnings about leaks.
LEAK = "leak"

# Maximum number of kinds of warnings, and of warnings per kind.
MAX_KINDS, MAX_PER_KIND = 12, 5

# Run times above this number of seconds are considered invalid.
MAX_SECONDS = 10**9

# Commands that support --resume.
_RESUMABLE = frozenset({"pretrain", "finetune", "compare"})


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, using only the files in it.

    Missing and damaged files are left out; damaged ones are reported on the page.

    Args:
        folder: Run folder of any command; the run need not have finished.

    Returns:
        Path of the report.

    Raises:
        OSError: If the file cannot be written.
    """
    run = read_run(folder)
    replaced = set()  # Pictures that charts and tables replace.
    if run.metrics:
        replaced.add("curves.png")
    results = result_blocks(run)
    if run.figures.get("per_class"):
        replaced.add("per_class.png")
    blocks = [
        *results,
        *coverage_by_budget(run),
        *_labelled(run),
        *_bands(run),
        *pictures(run, frozenset(replaced)),
        *predicted(run),
        *chosen_images(run),
        *_map(run),
        *_curves(run),
        *leak_blocks(run),
        _provenance(run),
    ]
    # The head is rendered last, because it lists the files that the other blocks could not read.
    write_page(
        folder / REPORT, f"{folder.resolve().name}: {run.command or 'run'}", [_head(run), *blocks]
    )
    return folder / REPORT


def _head(run: RunFolder) -> Block:
    state, kind, alerts = _state(run)
    warnings = _warnings(run)
    count = sum(one["count"] for one in warnings)
    badges = [(run.command or "run", ""), (state, kind)]
    badges.append(
        (f"{count} warning{'s' * (count != 1)}", "warn") if count else ("no warnings", "good")
    )
    alerts += [{"text": text, "kind": "warn"} for text in run.unreadable]
    html = render(
        "head",
        badges=badges,
        title=run.folder.resolve().name,
        lines=_lines(run),
        warnings=render("alerts", alerts=[*alerts, *warnings[:MAX_KINDS]]),
        more=max(0, len(warnings) - MAX_KINDS),
        verdicts=verdicts(run),
        tiles=main_figures(run),
        explained=_explained(run),
    )
    return Block("", html)


def _explained(run: RunFolder) -> str:
    """Say where the figures of a pre-training are explained, and how to measure the encoder."""
    if run.command != "pretrain" or run.results is None:
        return ""
    folder = shlex.quote(str(run.folder))
    return (
        "The page docs/watching.md of the documentation explains these numbers. Whether the "
        f"features are useful, only labels can show: vissl-lite probe --encoder {folder} "
        "--data LABELLED --out NEW_FOLDER"
    )


def _lines(run: RunFolder) -> list[str]:
    """Return lines with the model, the images, and the start and duration of the run."""
    config = run.config
    model = []
    pretext = config.get("pretext")
    if isinstance(pretext, dict) and "name" in pretext:
        model.append(f"{pretext['name']} on {config.get('backbone')}")
    for name in ("model", "encoder", "task"):
        if config.get(name):
            model.append(f"{name} {_as_text(config[name])}")
    if config.get("image_size"):
        model.append(f"{config['image_size']} pixels")
    lines = [", ".join(model)] if model else []
    if config.get("data"):
        lines.append(f"images: {_as_text(config['data'])}")
    started = None if run.record is None else run.record.start()
    if started is not None:
        seconds = _seconds(run, started)
        duration = "" if seconds is None else f", {_duration(seconds)}"
        lines.append(f"{started:%Y-%m-%d %H:%M}{duration}")
    return lines


def _seconds(run: RunFolder, started: datetime) -> float | None:
    """Return how long the run took or has been running; None if it was killed."""
    assert run.record is not None
    seconds = run.figures.get("seconds")
    if isinstance(seconds, int | float) and 0 <= seconds < MAX_SECONDS:
        return seconds
    if run.record.status != "running":
        return run.record.seconds
    return (datetime.now(started.tzinfo) - started).total_seconds() if run.is_open() else None


def _as_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _state(run: RunFolder) -> tuple[str, str, list[dict[str, Any]]]:
    """Return the state of the run as a word, its color, and alerts about it."""
    status = "" if run.record is None else run.record.status
    reason = "" if run.record is None else run.record.reason or ""
    more = ""
    if run.command in _RESUMABLE:
        folder = shlex.quote(str(run.folder))
        more = f"To continue: vissl-lite {run.command} --out {folder} --resume"
    if status in ("stopped", "failed"):
        text = f"{'Stopped' if status == 'stopped' else 'Stopped by an error'}: {reason}"
        return status, "bad", [{"text": text, "kind": "bad", "more": more}]
    if run.figures.get("stopped") == "plateau":
        return "finished: no longer improving", "good", []
    if run.figures.get("stopped"):
        return f"stopped: {run.figures['stopped']}", "bad", []
    if run.results is not None and (status != "running" or run.is_open()):
        return "finished", "good", []  # A run writes its report last, while it is still open.
    if run.has(RESULTS) and run.results is None:
        return "results unreadable", "bad", []
    if run.is_open():
        return "running", "", [{"text": "Still running.", "kind": "", "more": ""}]
    if status == "running":
        text = "Killed: the process ended without a message, for example by kill -9 or power loss."
        return "killed", "bad", [{"text": text, "kind": "bad", "more": more}]
    text = f"There is no {RESULTS}."
    return "no results", "bad", [{"text": text, "kind": "bad", "more": ""}]


def _warnings(run: RunFolder) -> list[dict[str, Any]]:
    """Group the warnings of the run by kind, leaks first."""
    kinds: dict[str, list[WarningRecord]] = {}
    for one in [] if run.record is None else run.record.warnings:
        kinds.setdefault(one.code, []).append(one)
    if LEAK not in kinds:
        kinds |= _leaks(run)
    return [
        {
            "text": some[0].message,
            "kind": "bad" if code == LEAK else "warn",
            "more": _and_more([one.message for one in some[1:]], sum(one.count for one in some)),
            "count": sum(one.count for one in some),
        }
        for code, some in sorted(kinds.items(), key=lambda item: item[0] != LEAK)
    ]


def _and_more(others: list[str], count: int) -> str:
    """Join further warnings of a kind, and add the number of those that are not shown."""
    shown = others[: MAX_PER_KIND - 1]
    rest = count - 1 - len(shown)
    return "; ".join([*shown, *([f"and {rest} more of this kind; see {LOG}"] if rest else [])])


def _leaks(run: RunFolder) -> dict[str, list[WarningRecord]]:
    """Return a warning about leaks from the results, for runs without one in ``run.json``."""
    found = run.figures.get("leaks")
    if not isinstance(found, int) or found <= 0 or run.figures.get("leaks_left_out"):
        return {}
    message = f"Leaks: {found} of the test images were seen in training."
    return {LEAK: [WarningRecord(LEAK, message)]}


def _labelled(run: RunFolder) -> list[Block]:
    """Return a table of the labelled data: parts, origins and labels per class."""
    summary = {} if run.record is None else run.record.labelled
    if not summary:
        return []
    try:
        columns = ["part", "images", "from", "labels per class"]
        table = render("table", columns=columns, rows=rows_of(summary))
        left_out = [f"{count:,} {kind}" for kind, count in summary["left_out"].items()]
        sentences = [f"{title_of(summary)}.", summary["split"], *summary["notes"]]
        if left_out:
            sentences.append(f"Left out or corrected: {'; '.join(left_out)}.")
        return [Block("Labelled data", table, " ".join(filter(None, sentences)))]
    except (LookupError, TypeError, AttributeError, ValueError):
        run.unreadable.append("The summary of the labelled data is damaged and left out.")
        return []


def _bands(run: RunFolder) -> list[Block]:
    """Return a table of the bands of the images and their value ranges, as the encoder has them."""
    for folder in ("encoder", "model", "model/encoder"):
        if not run.has(f"{folder}/{ENCODER_CONFIG}"):
            continue
        try:
            reader = read_model_config(run.folder / folder / ENCODER_CONFIG)["reader"]
        except UserError:
            run.unreadable.append(f"{folder}/{ENCODER_CONFIG} is damaged and left out.")
            return []
        if reader.bands is None:
            return []
        table = render("table", columns=list(reader.COLUMNS), rows=reader.rows())
        note = f"{reader.summary()} Mean and standard deviation are those of scaled values, 0 to 1."
        blocks = [Block("Bands", table, note)]
        if reader.histogram:
            names = reader.names or [str(band + 1) for band in reader.bands]
            shares = dict(zip(names, reader.histogram, strict=True))
            note = "Values of a sample of the training images. A high step at an end is values that"
            note += " are cut off there."
            blocks.append(Block("Values of the bands", histograms(shares), note))
        return blocks
    return []


def _curves(run: RunFolder) -> list[Block]:
    charts = curves(run.metrics)
    note = f"From {METRICS}. Hover over a line to see its values."
    return [Block("Curves", charts, note)] if charts else []


def _map(run: RunFolder) -> list[Block]:
    if not run.has(MAP):
        return []
    try:
        marked = CHOSEN if run.command == "select" else None
        layout = map_layout(ImageMap.load(run.folder / MAP), marked=marked)
    except UserError:
        run.unreadable.append(f"{MAP} is damaged and left out.")
        return []
    note = "Images with similar features are close together."
    return [Block("Map of the images", layout, note)]


def _provenance(run: RunFolder) -> Block:
    file = shlex.quote(str(run.folder / RUN_CONFIG))
    command = f"vissl-lite {run.command} --config {file} --out NEW_FOLDER" if run.command else ""
    options = {
        name: "" if value is None else yaml.safe_dump(value, default_flow_style=True, width=1 << 30)
        for name, value in flatten(run.config).items()
    }
    html = render(
        "provenance",
        command=command,
        environment={} if run.record is None else _environment(run.record),
        options={name: text.removesuffix("...\n").strip() for name, text in options.items()},
        log=run.log,
        inside=[one.parent.name for one in sorted(run.folder.glob(f"*/{REPORT}"))],
    )
    return Block("Provenance", html)


def _environment(record: RunRecord) -> dict[str, str]:
    """Return the versions, machine and device of a run as text."""
    used = {"vissl-lite": record.version, **record.environment}
    return {str(name): str(value) for name, value in used.items()}
