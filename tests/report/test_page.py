"""Pages without a browser: what is in them, whatever state the run folder is in."""

import json
import math
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markupsafe import Markup
from PIL import Image

from vissl_lite.report.charts import COLORS, POINTS, curves, stages
from vissl_lite.report.folder import read_run
from vissl_lite.report.page import Block, write_page
from vissl_lite.report.run_report import write_report
from vissl_lite.run_folder import lock
from vissl_lite.run_record import RunRecord, Status, WarningRecord

LINE = "2026-11-23 16:40:01,000 INFO working\n"

ENVIRONMENT = {"python": "3.11.7", "torch": "2.15.0", "device": "CPU"}

CONFIGS: dict[str, dict[str, Any]] = {
    "pretrain": {
        "data": ["images"],
        "out": "run",
        "pretext": {"name": "simclr", "temperature": 0.5},
        "backbone": "resnet18",
        "lr": None,
    },
    "probe": {"encoder": "runs/a", "data": "labelled", "out": "run", "k": 20, "temperature": 0.07},
    "finetune": {"data": "labelled", "encoder": "runs/a", "task": "classification",
                 "detector": None},
    "compare": {"encoder": ["runs/a", "timm:resnet18"], "data": "labelled", "protocols": None,
                "detector": None},
    "predict": {"model": "runs/m", "data": "images", "out": "run", "pictures": 3},
    "select": {"encoder": "runs/a", "data": ["images"], "budget": 50, "out": "run"},
    "demo": {"out": "run", "unlabelled": 4000},
}  # fmt: skip


def make(
    folder: Path,
    command: str = "pretrain",
    warnings: Sequence[WarningRecord] = (),
    status: Status = "finished",
    reason: str | None = None,
    **results: Any,
) -> Path:
    """A run folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIGS[command], sort_keys=False))
    (folder / "log.txt").write_text(LINE)
    RunRecord(
        command, status, reason, "2026-11-23T16:40:00+00:00", 12.0, "0.1.0", ENVIRONMENT,
        list(warnings),
    ).write(folder)  # fmt: skip
    if results:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def words(folder: Path) -> str:
    """What the report says, without its tags, in one line."""
    text = write_report(folder).read_text(encoding="utf-8")
    body = re.sub(r"<(script|style).*?</\1>", " ", text[text.index("<body") :], flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def without_log(shown: str) -> str:
    return re.sub(r"The last \d+ lines of the log.*(?=vissl_lite \d)", "", shown)


@pytest.mark.parametrize("command", CONFIGS)
def test_run_json_says_what_the_run_was(command: str, tmp_path: Path) -> None:
    shown = words(make(tmp_path / "run", command, seconds=600))
    assert shown.startswith(f"{command} finished no warnings run")
    assert "10 min 0 s" in shown
    assert f"vissl-lite {command} --config {tmp_path}/run/config.yaml --out NEW_FOLDER" in shown
    assert "vissl-lite 0.1.0, python 3.11.7, torch 2.15.0, device CPU" in shown


def test_the_log_is_quoted_and_not_read(tmp_path: Path) -> None:
    warned = [WarningRecord("image.unreadable", "skipped: /a.png", {"path": "/a.png"})]
    run = make(tmp_path / "run", "probe", warned, knn=0.5)
    whole = words(run)
    garbage = [
        b"2026-11-23 16:40:05,000 WARNING Leaks: 9 test images\nstopped: no\nPython 2.7\n",
        b"\xff\xfe\x00" * 50_000,
        b"",
    ]
    for content in garbage:
        (run / "log.txt").write_bytes(content)
        assert without_log(words(run)) == without_log(whole)
    (run / "log.txt").unlink()
    assert words(run) == without_log(whole)
    assert "1 warning " in whole
    assert "INFO working" in whole


def test_warnings_and_leaks_come_before_the_figures(tmp_path: Path) -> None:
    warned = [
        *(WarningRecord("image.unreadable", f"skipped: /a/{i}.png") for i in range(20)),
        WarningRecord("image.unreadable", "skipped: /a/20.png", count=20),
        WarningRecord("features.collapsed", "The encoder has collapsed."),
        WarningRecord("leak", "Leaks: 3 test images are in the training part."),
    ]
    run = make(tmp_path / "run", "probe", warned, knn=0.5, linear=0.625, leaks=3)
    rows = [f"test,/t/{i}.png,train,,/u/{i}.png,exact,1.0\n" for i in range(25)]
    columns = "part,path,where,encoder,twin,kind,similarity\n"
    usual = "val,/v/0.png,pretraining,runs/a,/w/0.png,exact,1.0\n"  # no harm
    (run / "leaks.csv").write_text(columns + usual + "".join(rows))
    shown = words(run)
    assert "/t/0.png /u/0.png train exact" in shown
    assert "The first 20 of 25 images" in shown
    assert shown.index("0.625 linear accuracy") < shown.index("/t/0.png")  # Below the results.
    assert "<details><summary>The first 20 of 25 images</summary>" in (
        (run / "report.html").read_text(encoding="utf-8")
    )
    assert "/v/0.png" not in shown
    assert "42 warnings" in shown
    order = [
        shown.index(part)
        for part in ("Leaks: 3 test images", "skipped: /a/0.png", "skipped: /a/4.png",
                     "and 35 more of this kind", "has collapsed", "0.625 linear accuracy")
    ]  # fmt: skip
    assert order == sorted(order)
    assert "/a/5.png" not in shown


def test_the_figures_of_pretrain_say_what_is_good(tmp_path: Path) -> None:
    good = words(make(tmp_path / "good", feature_std=0.5, effective_rank=20.0, loss=1.0))
    assert "0.500 spread of the features No collapse (that is below 0.02)" in good
    assert "1.000 last loss Should have fallen" in good
    assert "docs/watching.md" in good
    bad = words(make(tmp_path / "bad", feature_std=0.01, effective_rank=1.01))
    assert "0.010 spread of the features Collapsed" in bad
    assert "1.010 effective rank Collapsed" in bad
    assert "docs/watching.md" not in words(make(tmp_path / "probe", "probe", knn=0.5))


def test_leaks_in_the_results_alone_are_said_too(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "probe", knn=0.5, leaks=3, trained_on="Fitted to 36 labels.")
    assert "Fitted to 36 labels." in words(run)
    assert "Leaks: 3 of the test images were seen in training" in words(run)


@pytest.mark.slow
def test_a_run_that_did_not_finish_says_why(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shown = words(make(run, status="failed", reason="<disk> is full"))
    assert "pretrain failed" in shown
    assert "Stopped by an error: <disk> is full" in shown
    assert "To continue: vissl-lite pretrain --out" in shown
    shown = words(make(run, "probe", status="stopped", reason="stopped by SIGTERM"))
    assert "probe stopped" in shown
    assert "Stopped: stopped by SIGTERM" in shown
    assert "--resume" not in shown
    results = run / "results.json"
    results.write_text(json.dumps({"loss": 1, "stopped": "plateau"}))
    RunRecord("pretrain", "finished").write(run)
    assert "pretrain finished: no longer improving" in words(run)
    results.unlink()
    make(run, status="running")
    assert "pretrain killed" in words(run)
    with lock(run):
        assert "pretrain running" in words(run)
        (run / "results.json").write_text('{"loss": 1}')  # the page is the last that is written
        assert "pretrain finished" in words(run)
    assert "pretrain killed" in words(run)
    assert "probe no results" in words(make(tmp_path / "other", "probe"))


@pytest.mark.slow
def test_what_is_damaged_is_left_out_and_said(tmp_path: Path) -> None:
    run = make(tmp_path / "run", loss=1.0)
    (run / "results.json").write_text('{"loss": 1')
    (run / "metrics.csv").write_bytes(
        b"step,seconds,loss\n0,0.1,5\n1,0.2,4\n2,0.3,\xff\n3,0.4,2,9\n4"
    )
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(run / "views.png")
    whole = (run / "views.png").read_bytes()
    (run / "views.png").write_bytes(whole[: len(whole) // 2])
    (run / "map.npz").write_bytes(b"PK no map")
    shown = words(run)
    assert "results.json is damaged" in shown
    assert "views.png is damaged" in shown
    assert "map.npz is damaged" in shown
    assert "2 damaged rows of metrics.csv are left out" in shown
    assert read_run(run).metrics["loss"] == ([0, 1], [5, 4])
    (run / "config.yaml").write_text("a: [1")
    (run / "metrics.csv").write_text("")
    (run / "run.json").write_text('{"command": "pretrain"')
    shown = words(run)
    assert "run.json is damaged" in shown
    assert "config.yaml is damaged" in shown
    assert "metrics.csv can't be read: there are no curves" in shown


def test_stages_of_many_encoders_are_all_in_the_chart() -> None:
    names = [f"runs/{index}" for index in range(len(COLORS) + 2)]
    chart = stages({"layer1": dict.fromkeys(names, 0.5), "layer2": dict.fromkeys(names, 0.6)})
    shown = [item.label.value for item in chart.legend[0].items]
    assert shown == names


@pytest.mark.slow
def test_a_comparison_begins_with_its_verdict(tmp_path: Path) -> None:
    few = {"labels": 1500, "train_labels": 1000, "val_labels": 500}
    many = {"labels": 15000, "train_labels": 10000, "val_labels": 5000}
    sentence = "runs/a helped: knn accuracy +0.100 against random:resnet18."
    found = {
        "metric": "accuracy",
        "amounts": ["1%", "10%"],
        "arms": {
            "runs/a": {
                "1%": {"mean": 0.4, "std": 0.01, "runs": [0.4], **few},
                "10%": {"mean": 0.6, "std": 0.02, "runs": [0.6], **many},
            },
            "random:resnet18": {"1%": {"mean": 0.3, "std": 0.01, "runs": [0.3], **few}},
        },
        "differences": {"runs/a": {"1%": {"mean": 0.1, "low": 0.05, "high": 0.15}}},
        "verdicts": {"runs/a": {"verdict": "helped", "sentence": sentence}},
        "layers": {"runs/a": {"layer1": {"1%": 0.1, "10%": 0.2}}},
    }
    warned = [
        WarningRecord("leak", "Leaks: 2 test images are among the pre-training images."),
        WarningRecord("encoder.left_out", "left out: timm:resnet18: no network"),
    ]
    run = make(tmp_path / "run", "compare", warned, protocols={"knn": found}, verdict="helped",
               baseline="random:resnet18", left_out={"timm:resnet18": "no network"},
               leaks=2, sentences=[sentence])  # fmt: skip
    shown = words(run)
    assert shown.index(sentence) < shown.index("Comparison Mean ± standard deviation")
    assert shown.count(sentence) == 1
    assert "2 warnings" in shown
    assert "Accuracy per stage" in shown
    assert "left out: timm:resnet18: no network" in shown
    columns = ("1% 1,000 training + 500 validation", "10% 10,000 training + 5,000 validation")
    assert f"encoder {' labels '.join(columns)} labels overall" in shown
    assert "runs/a 0.400 ± 0.010 +0.100 (+0.050 to +0.150) 0.600 ± 0.020 helped" in shown
    assert "random:resnet18 0.300 ± 0.010 baseline" in shown


@pytest.mark.parametrize("damage", [
    {"protocols": {"knn": {}}}, {"protocols": ["knn"]}, {"protocols": {"knn": {"arms": {"a": 3}}}},
    {"protocols": {"knn": {"arms": {"a": {"1%": None}}, "verdicts": {"a": "helped"}}}},
    {"layers": {"layer1": {"knn": "good"}}}, {"per_class": {"cat": {"f1": None}}}, {"scores": []},
    {"test": {"top1": math.nan}}, {"warnings": "none"}, {"leaks": {"a": None}}, {"seconds": "ten"},
])  # fmt: skip
def test_results_with_parts_missing_make_a_page(damage: dict[str, Any], tmp_path: Path) -> None:
    assert "Provenance" in words(make(tmp_path / "run", "finetune", **damage))


def test_the_figures_of_finetune_and_its_classes(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "finetune", test={"top1": 0.75}, train_images=12345,
               per_class={"<b>cat</b>": {"f1": 0.5}, "dog": {"f1": 1.0}})  # fmt: skip
    Image.new("RGB", (8, 8)).save(run / "per_class.png")
    Image.new("RGB", (8, 8)).save(run / "confusion.png")
    Image.new("RGB", (8, 8)).save(run / "my_own.png")
    shown = words(run)
    assert "0.750 accuracy (test) 12,345 training images" in shown
    assert "class f1 <b>cat</b> 0.500 dog 1.000" in shown
    text = (run / "report.html").read_text()
    assert "<b>cat" not in text
    assert text.count("<img ") == 2  # the table says what per_class.png does
    assert "My own" in text


@pytest.mark.slow
def test_overfitting_is_shown(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "finetune", test={"top1": 0.6, "macro_f1": 0.5},
               train={"top1": 0.975, "loss": 0.3}, val={"top1": 0.65, "loss": 1.2},
               trained_on="By 30 validation images: the trained weights.")  # fmt: skip
    shown = words(run)
    assert "By 30 validation images: the trained weights." in shown
    assert "accuracy 0.975 0.650 0.600 0.375" in shown
    figures = {"mean": 0.6, "by_part": {"train": 1.0, "test": 0.6}}
    found = {"metric": "top1", "arms": {"runs/a": {"1%": figures}}}
    shown = words(make(tmp_path / "compared", "compare", protocols={"finetune": found}))
    assert "runs/a 1% 1.000 none 0.600 0.400" in shown


def test_the_picture_of_a_comparison_is_named_after_what_it_shows(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "compare", labels={"1%": 10, "10%": 100})
    Image.new("RGB", (8, 8)).save(run / "compare.png")
    curves = words(run)
    assert "Test results by number of labels Means over the seeds; bands are" in curves
    bars = words(make(tmp_path / "run", "compare", labels={"100%": 1000}))
    assert "Test results Bars are means over the seeds" in bars
    assert "dashed" not in bars


def test_large_pictures_become_small_ones(tmp_path: Path) -> None:
    run = make(tmp_path / "run", seconds=1)
    noise = np.random.default_rng(0).integers(0, 256, (150, 240, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((2400, 1500), Image.Resampling.BICUBIC)
    smooth.save(run / "test.png", compress_level=1)
    assert write_report(run).stat().st_size < (run / "test.png").stat().st_size / 10
    assert "data:image/webp" in (run / "report.html").read_text()


@pytest.mark.slow
def test_predictions_are_shown_small_and_only_some(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "predict", images=30, skipped=0)
    (run / "pictures" / "a").mkdir(parents=True)
    for index in range(30):
        Image.new("RGB", (600, 400)).save(run / "pictures" / "a" / f"{index:02}.jpg.png")
    shown = words(run)
    assert "24 of 30 in the folder pictures" in shown
    assert "a/00.jpg" in shown


@pytest.mark.slow
def test_a_page_takes_bokeh_once_and_only_where_there_is_a_chart(tmp_path: Path) -> None:
    write_page(tmp_path / "plain.html", "<a>", [Block("A & B", Markup("<p>text</p>"), "1 < 2")])
    plain = (tmp_path / "plain.html").read_text()
    assert len(plain) < 20_000
    assert "<title>&lt;a&gt;</title>" in plain
    assert "A &amp; B" in plain
    assert "1 &lt; 2" in plain
    series = {name: ([0.0, 1.0], [1.0, 2.0]) for name in ("loss", "knn", "</script>")}
    write_page(tmp_path / "charts.html", "charts", [Block("Curves", curves(series))])
    charts = (tmp_path / "charts.html").read_text()
    assert 1_000_000 < len(charts) < 2_000_000
    assert charts.count("data-root-id=") == 3
    assert not re.search(r"<(script|link|img)[^>]* (src|href)=.http", charts)


def test_names_that_are_no_utf8_do_not_stop_a_page(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "bad \udcff name", [Block("", Markup("\udcff"))])
    assert "bad ? name" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_validation_stands_with_training_and_long_lines_are_thinned() -> None:
    steps = [float(step) for step in range(5000)]
    series = {
        "step": (steps, steps),
        "seconds": (steps, steps),
        "lr": (steps, steps),
        "val_map": (steps[:3], steps[:3]),
        "val_loss": (steps[:3], [3.0, math.nan, 1.0]),
        "loss": (steps, [1000 / (step + 1) for step in steps]),
    }
    charts = curves(series)
    assert [chart.heading for chart in charts] == ["loss", "val map", "lr"]
    lines = [one.data_source.data for one in charts[0].content.renderers]
    assert {line["name"][0] for line in lines} == {"loss", "val_loss"}
    assert max(len(line["x"]) for line in lines) == POINTS
    assert type(charts[0].content.y_scale).__name__ == "LogScale"
    assert type(charts[2].content.y_scale).__name__ == "LinearScale"


def test_a_selection_shows_its_coverage_and_its_images(tmp_path: Path) -> None:
    coverage = {"selected": [0, 0.5, 0.6], "continued": [0.6, 0.7], "random": [0, 0.4, 0.5, 0.6],
                "knee": 2}  # fmt: skip
    run = make(tmp_path / "run", "select", chosen=2, coverage=coverage)
    (run / "selected.csv").write_text("rank,path,reason,covers\n1,/a/b.png,because,7\n")
    shown = words(run)
    assert "beyond 2 images, each further one adds less" in shown
    assert "1 /a/b.png because 7" in shown
    straight = make(tmp_path / "straight", "select", coverage={**coverage, "knee": 0})
    assert "knee" not in words(straight).partition("Provenance")[0]
    damaged = make(tmp_path / "damaged", "select", coverage={"selected": "x"})
    (damaged / "selected.csv").write_text("rank\n1\n")
    shown = words(damaged)
    assert "The coverage in results.json is damaged" in shown
    assert "selected.csv is damaged" in shown
