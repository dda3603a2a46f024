"""``report.html``: a page to look at instead of logs, made from the run folder alone."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vissl_lite.errors import UserError
from vissl_lite.evaluation.embedding import ImageMap
from vissl_lite.options import flatten
from vissl_lite.report.charts import curves
from vissl_lite.report.folder import Record, RunFolder, read_run
from vissl_lite.report.gallery import pictures, predicted
from vissl_lite.report.map import map_layout
from vissl_lite.report.page import Block, render, write_page
from vissl_lite.report.results import main_figures, result_blocks, verdicts
from vissl_lite.run import MAP, METRICS, RESULTS
from vissl_lite.run_folder import CONFIG

REPORT = "report.html"

# What a warning of leaks begins with.
LEAKING = "Leaks:"

# Warnings shown at most (alike ones count as one), and lines of the log.
WARNINGS, LOG_LINES = 12, 30

# Commands that can go on where they stopped.
_RESUMABLE = frozenset({"pretrain", "compare"})


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, from nothing but what is in it.

    What is missing is left out, and so is what is damaged, with a word about it.

    Args:
        folder: a run of any command, perhaps not ended.

    Returns:
        The file.

    Raises:
        OSError: it can't be written.
    """
    run = read_run(folder)
    instead = set()
    if run.metrics:
        instead.add("curves.png")  # the charts say more
    results = result_blocks(run)
    if run.figures.get("per_class"):
        instead.add("per_class.png")
    blocks = [
        *results,
        *pictures(run, frozenset(instead)),
        *predicted(run),
        *_map(run),
        *_curves(run),
        _made(run),
    ]
    # the head comes last, since it tells what the others could not read
    write_page(folder / REPORT, f"{folder.resolve().name}: {run.command or 'run'}",
               [_head(run), *blocks])  # fmt: skip
    return folder / REPORT


def _head(run: RunFolder) -> Block:
    state, kind, said = _state(run)
    warnings = _warnings(run)
    count = sum(one["count"] for one in warnings)
    badges = [(run.command or "run", ""), (state, kind)]
    badges.append((f"{count} warning{'s' * (count != 1)}", "warn") if count else
                  ("no warnings", "good"))  # fmt: skip
    said += [{"text": text, "kind": "warn"} for text in run.unreadable]
    html = render(
        "head",
        badges=badges,
        title=run.folder.resolve().name,
        lines=_lines(run),
        warnings=render("said", said=[*said, *warnings[:WARNINGS]]),
        more=max(0, len(warnings) - WARNINGS),
        verdicts=verdicts(run),
        tiles=main_figures(run),
    )
    return Block("", html)


def _lines(run: RunFolder) -> list[str]:
    """What was run, on what, when."""
    config = run.config
    what = []
    pretext = config.get("pretext")
    if isinstance(pretext, dict) and "name" in pretext:
        what.append(f"{pretext['name']} on {config.get('backbone')}")
    for name in ("model", "encoder", "task"):
        if config.get(name):
            what.append(f"{name} {_words(config[name])}")
    if config.get("image_size"):
        what.append(f"{config['image_size']} pixels")
    lines = [", ".join(what)] if what else []
    if config.get("data"):
        lines.append(f"images: {_words(config['data'])}")
    seconds = run.figures.get("seconds")
    seconds = seconds if isinstance(seconds, int | float) else run.seconds()
    started = run.started()
    if started is not None:
        took = "" if seconds is None else f", {_duration(seconds)}"
        lines.append(f"{started:%Y-%m-%d %H:%M}{took}")
    return lines


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _state(run: RunFolder) -> tuple[str, str, list[dict[str, Any]]]:
    """Whether the run has ended: a word, its colour, and what is to be said of it."""
    if run.figures.get("stopped"):
        return f"stopped: {run.figures['stopped']}", "bad", []
    if run.results is not None:
        return "finished", "good", []
    if run.has(RESULTS):
        return "results unreadable", "bad", []
    more = ""
    if run.command in _RESUMABLE:
        more = f"vissl-lite {run.command} --out {shlex.quote(str(run.folder))} --resume goes on."
    last = run.records[-1].message if run.records else ""
    if last.startswith("stopped"):
        text = f"Stopped by an error: {last.splitlines()[-1].removeprefix('stopped: ')}"
        return "stopped", "bad", [{"text": text, "kind": "bad", "more": more}]
    text = f"Not finished: there is no {RESULTS}. It is still running, or was ended from outside."
    return "not finished", "bad", [{"text": text, "kind": "bad", "more": more}]


def _warnings(run: RunFolder) -> list[dict[str, Any]]:
    """Leaks, then what else the results and the log warn of, alike ones as one."""
    kept = run.figures.get("warnings")
    kept = [str(one) for one in kept] if isinstance(kept, list) else []
    left_out = run.figures.get("left_out")
    if isinstance(left_out, dict):  # the words of compare, so that they are not said twice
        kept += [f"left out: {name}: {why}" for name, why in left_out.items()]
    logged = [one.message for one in run.records if one.level == "WARNING"]
    texts = list(dict.fromkeys([*kept, *logged]))
    if not any(text.startswith(LEAKING) for text in texts):
        texts += _leaks(run)
    texts.sort(key=lambda text: not text.startswith(LEAKING))
    alike: dict[str, list[str]] = {}
    for text in texts:
        # such as a hundred files that can't be read: what stands before the colon is the same
        alike.setdefault(re.split(r": (?=\S+$)", text)[0], []).append(text)
    return [
        {
            "text": some[0],
            "kind": "bad" if some[0].startswith(LEAKING) else "warn",
            "more": f"and {len(some) - 1} more of the kind; see log.txt" if len(some) > 1 else "",
            "count": len(some),
        }
        for some in alike.values()
    ]


def _leaks(run: RunFolder) -> list[str]:
    """What the results say of leaks, where the log is silent."""
    found = run.figures.get("leaks")
    if run.figures.get("leaks_left_out"):
        return []  # the log tells of them
    counts = found if isinstance(found, dict) else {"": found}
    return [
        f"{LEAKING} {count} of the test images were seen in training"
        + (f" ({name})." if name else ".")
        for name, count in counts.items()
        if isinstance(count, int) and count > 0
    ]


def _curves(run: RunFolder) -> list[Block]:
    charts = curves(run.metrics)
    note = f"From {METRICS}. Hover over a line to read it."
    return [Block("Curves", charts, note)] if charts else []


def _map(run: RunFolder) -> list[Block]:
    if not run.has(MAP):
        return []
    try:
        layout = map_layout(ImageMap.load(run.folder / MAP))
    except UserError:
        run.unreadable.append(f"{MAP} is damaged and left out.")
        return []
    note = "Images whose features are alike lie close together."
    return [Block("Map of the images", layout, note)]


def _made(run: RunFolder) -> Block:
    file = shlex.quote(str(run.folder / CONFIG))
    command = f"vissl-lite {run.command} --config {file} --out NEW_FOLDER" if run.command else ""
    options = {
        name: "" if value is None else yaml.safe_dump(value, default_flow_style=True, width=1 << 30)
        for name, value in flatten(run.config).items()
    }
    html = render(
        "made",
        command=command,
        versions=_versions(run.records),
        options={name: text.removesuffix("...\n").strip() for name, text in options.items()},
        log=_tail(run.records),
        inside=[one.parent.name for one in sorted(run.folder.glob(f"*/{REPORT}"))],
    )
    return Block("How it was made", html)


def _versions(records: Sequence[Record]) -> str:
    """The line of the log that names them; the last one, where a run was resumed."""
    named = [one.message for one in records if one.message.startswith("Python ")]
    return named[-1] if named else ""


def _tail(records: Sequence[Record]) -> list[str]:
    lines = [f"{one.time:%H:%M:%S} {one.level} {one.message}" for one in records[-LOG_LINES:]]
    return "\n".join(lines).splitlines()[-LOG_LINES:]
