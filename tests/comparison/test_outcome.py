"""What a comparison says of its scores."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vissl_lite.comparison.amounts import LabelCount
from vissl_lite.comparison.outcome import Outcome
from vissl_lite.comparison.protocols import Score
from vissl_lite.comparison.statistics import Difference
from vissl_lite.comparison.store import Cell

RATES = {"good": 0.9, "random:net": 0.5}


def outcome(
    amounts: tuple[str, ...] = ("1%", "10%"),
    rates: dict[str, float] = RATES,
    groups: np.ndarray | None = None,
) -> Outcome:
    random = np.random.default_rng(0)
    scores = {}
    for arm, rate in rates.items():
        for protocol in ("knn", "linear"):
            for step, amount in enumerate(amounts):
                for seed in range(3):
                    right = random.random(400) < rate + 0.05 * step
                    value = float(right.mean())
                    scores[Cell(arm, protocol, amount, seed)] = Score(
                        value, {"accuracy": value}, {"penalty": 0.1}, right, {"layer1": 0.5}
                    )
    labels = {name: LabelCount(6 * 10**step, 4 * 10**step) for step, name in enumerate(amounts)}
    metric = dict.fromkeys(("knn", "linear"), "accuracy")
    protocols, seeds = ["knn", "linear"], [0, 1, 2]
    return Outcome(scores, list(rates), protocols, labels, seeds, "random:net", metric, groups)


def test_groups_of_test_images_are_counted_where_intervals_are_taken_over_them() -> None:
    found = outcome(groups=np.arange(400) // 10)
    assert found.as_dict()["test_groups"] == 40
    assert "3 seeds, 40 groups of test images)" in found.sentences()[0]
    by_image = outcome()
    assert "test_groups" not in by_image.as_dict()
    assert "3 seeds)" in by_image.sentences()[0]
    (ours,), (theirs,) = (one.compared["knn"].values() for one in (found, by_image))
    assert ours.overall.mean == theirs.overall.mean
    assert ours.overall.high != theirs.overall.high


def test_seeds_that_gave_the_same_are_said_to_have() -> None:
    found = outcome(("100%",))
    assert "3 seeds)" in found.sentences()[0]
    same = {cell: found.scores[replace(cell, seed=0)] for cell in found.scores}
    protocols, metric = ["knn", "linear"], found.metric
    rest = (found.encoders, protocols, found.labels, [0, 1, 2], "random:net", metric)
    again = Outcome(same, *rest)
    assert (
        "3 seeds, which all gave the same: it covers the test images alone)"
        in (again.sentences()[0])
    )
    alone = Outcome(same, *rest, np.zeros(400, int))
    assert (
        "(no interval can be given, 3 seeds, which all gave the same, one group of test"
        in (alone.sentences()[0])
    )
    assert alone.verdict == "no difference"


@pytest.mark.parametrize(
    ("rate", "verdict", "words"),
    [
        (
            0.9,
            "helped",
            "6 training + 4 validation labels with it are at least as good as the 100 without",
        ),
        (0.5, "no difference", "made no difference that these seeds can show"),
        (0.2, "hurt", "good hurt: linear accuracy -0."),
    ],
)
def test_the_verdict_and_its_words(rate: float, verdict: str, words: str) -> None:
    found = outcome(rates={"good": rate, "random:net": 0.5})
    assert found.verdict == verdict
    assert len(found.sentences()) == 2  # one per protocol
    assert words in found.sentences()[-1]


def test_a_verdict_that_differs_by_amount_is_one_statement() -> None:
    helped, none = Difference(0.1, 0.05, 0.15), Difference(0.01, -0.02, 0.04)
    found = outcome()._sentence("good", "knn", {"1%": helped, "10%": none}, none, {})
    assert found == (
        "good helped at 1%, but made no difference that these seeds can show on average: kNN "
        "accuracy +0.010 against random:net (averaged over 2 amounts of labels, 95 % interval "
        "-0.020 to +0.040, 3 seeds)."
    )


def test_results_hold_the_figures_of_every_seed() -> None:
    results: dict[str, Any] = outcome().as_dict()
    assert results["arms"] == results["protocols"]["linear"]["arms"]  # of the last protocol
    figures = results["arms"]["good"]["10%"]
    assert (figures["labels"], figures["train_labels"], figures["val_labels"]) == (100, 60, 40)
    assert (results["train_labels"]["1%"], results["val_labels"]["1%"]) == (6, 4)
    assert figures["mean"] == pytest.approx(np.mean(figures["runs"]))
    assert figures["std"] == pytest.approx(np.std(figures["runs"], ddof=1))
    assert results["protocols"]["knn"]["layers"]["good"] == {"layer1": {"1%": 0.5, "10%": 0.5}}
    difference = results["protocols"]["linear"]["differences"]["good"]["10%"]
    assert difference["low"] < difference["mean"] < difference["high"]


def test_the_table_has_a_row_for_every_run(tmp_path: Path) -> None:
    outcome().write_csv(tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 3
    assert {row["chosen"] for row in rows} == {"penalty=0.1"}


@pytest.mark.slow
@pytest.mark.parametrize("amounts", [("1%",), ("1%", "10%")])
def test_one_amount_and_several_are_drawn(amounts: tuple[str, ...], tmp_path: Path) -> None:
    outcome(amounts).plot(tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 3000


@pytest.mark.parametrize("amounts", [("1%",), ("1%", "10%")])
def test_names_that_matplotlib_reads_otherwise_are_in_the_legend(
    amounts: tuple[str, ...], tmp_path: Path
) -> None:
    names = ("_old", "lr$1_$2", "random:net")
    found = outcome(amounts, dict.fromkeys(names, 0.5))
    figure = found._bars() if len(amounts) == 1 else found._curves()
    figure.savefig(tmp_path / "compare.png")
    legend = (figure.legends or [figure.axes[0].get_legend()])[0]
    assert [text.get_text().replace("\\$", "$") for text in legend.get_texts()] == list(names)


def test_labels_are_not_said_to_be_worth_fewer_than_they_are() -> None:
    names = ("a", "b", "c", "d")
    rates = {"good": (0.2, 0.5, 0.37, 0.6), "net": (0.2, 0.5, 0.3, 0.6)}  # "net" sags at "c"
    scores = {}
    for arm, values in rates.items():
        for amount, rate in zip(names, values, strict=True):
            right = np.arange(1000) < 1000 * rate
            for seed in range(3):
                scores[Cell(arm, "knn", amount, seed)] = Score(rate, {}, {}, right)
    labels = {name: LabelCount(10 * 2**step, 0) for step, name in enumerate(names)}
    found = Outcome(scores, list(rates), ["knn"], labels, [0, 1, 2], "net", {"knn": "accuracy"})
    compared = found.compared["knn"]["good"]
    assert compared.by_amount["c"].verdict == "helped"
    assert compared.equivalent_labels == {}
    assert compared.sentence.endswith(" alone).")  # no sentence on labels follows


def test_training_held_out_and_test_figures_stand_side_by_side() -> None:
    scores = {
        Cell("net", "finetune", "1%", seed): Score(
            0.6, {"top1": 0.6, "train_top1": 0.9 + 0.05 * seed, "val_top1": 0.7}
        )
        for seed in range(3)
    }
    scores |= {
        Cell("base", cell.protocol, cell.amount, cell.seed): one for cell, one in scores.items()
    }
    found = Outcome(
        scores, ["net", "base"], ["finetune"], {"1%": LabelCount(6, 4)}, [0, 1, 2], "base",
        {"finetune": "top1"},
    )  # fmt: skip
    expected = {"train": pytest.approx(0.95), "val": pytest.approx(0.7), "test": pytest.approx(0.6)}
    assert found.by_part("net", "finetune", "1%") == expected
    assert found.as_dict()["arms"]["net"]["1%"]["by_part"] == expected
    assert outcome().by_part("good", "knn", "1%") == {}
