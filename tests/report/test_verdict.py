"""What training and held-out pairs say together, in plain words, by their standard errors."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.report.run_page import report_page
from pipeline.report.verdict import verdict_of
from pipeline.run.reading import read_run
from pipeline.run.records import write_margins
from support.runs import write_log, write_settings


def run_of(folder: Path, **rewards: list[float]) -> Path:
    """A run whose sets have these reward margins, which are also the changes of their margins."""
    write_log(folder, [{"step": 3, "loss": 0.5}])
    write_settings(folder, loss={"type": "sigmoid", "beta": 1.0})
    for name, margins in rewards.items():
        values = np.array([[0, m, m, m, 0] for m in margins], np.float32)
        write_margins(folder, name, 3, np.array([[100 + i, 0, 0] for i in range(len(margins))]), values)
    return folder


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ([1.0] * 50, [1.0] * 50, "it generalizes. Pairs do not show whether its own replies got better: read them"),
        ([1.0] * 50, [1.0] * 36 + [-0.5] * 14, "a part of that is overfitting"),
        ([1.0] * 50, [0.1, -0.1] * 3, "or the held-out pairs are too few to tell"),
        ([2.0] * 50, [-1.0] * 38 + [1.0] * 12, "has overfitted: it has learned the training pairs and is worse"),
        # Right more often than not, and far off where it is wrong.
        ([2.0] * 50, [0.1] * 60 + [-5.0, -6.0] * 20, "has overfitted"),
        ([0.1, -0.1] * 20, [0.1, -0.1] * 20, "Neither training nor held-out pairs show a change"),
        ([0.1, -0.1] * 20, [-1.0] * 40, "It is worse than the reference on held-out pairs"),
    ],
)
def test_the_verdict_weighs_training_and_held_out_pairs(
    tmp_path: Path, train: list[float], test: list[float], words: str
) -> None:
    [verdict] = verdict_of(read_run(run_of(tmp_path / "run", train=train, test=test)))
    assert words in verdict
    assert f"Held-out pairs test ({len(test)})" in verdict


def test_a_pair_of_several_epochs_is_one_measurement_its_last(tmp_path: Path) -> None:
    write_log(folder := tmp_path / "run", [{"step": 3, "loss": 0.5}])
    write_settings(folder, loss={"type": "sigmoid", "beta": 1.0})
    values = np.array([[0, m, m, m, 0] for m in (-2.0, -2.0, 1.0, 1.0)], np.float32)
    write_margins(folder, "train", 3, np.array([[row, 0, 0] for row in (7, 8, 7, 8)]), values)
    write_margins(folder, "test", 3, np.array([[1, 0, 0], [2, 0, 0]]), values[2:])
    [verdict] = verdict_of(read_run(folder))
    assert "Training pairs, the last 2, each as it was last trained on: accuracy 1" in verdict


def test_a_run_without_held_out_pairs_has_no_verdict_on_them(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", train=[1.0] * 9)
    assert verdict_of(read_run(folder)) == []
    (folder / "run.json").write_text('{"finished": true, "step": 3}')
    [verdict] = verdict_of(read_run(folder))
    assert "No held-out pairs were evaluated" in verdict and "set data.eval" in verdict


def test_the_page_says_the_verdict_which_run_and_which_pairs_got_worst(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "uf/policy", train=[1.0] * 9, test=[1.0, -2.0, -0.5, 3.0])
    margins = np.array([[0, -5, -5, -5, 0]], np.float32)
    write_margins(folder, "large", 3, np.array([[12345, 0, 0]]), margins)
    page = report_page([read_run(folder)])
    # A row stands as it is typed.
    assert '<td class="number">12345</td>' in page
    assert f"refshard explain --config {folder}/refshard.yaml --policy {folder} --set SET --row ROW</pre>" in page
    assert "<h1>Run uf/policy</h1>" in page
    assert verdict_of(read_run(folder))[0].split(":")[0] in page
    worst = page.split("<h2>Pairs that got worst</h2>")[1].split("</section>")[0]
    assert worst.index('<td class="number">101</td>') < worst.index('<td class="number">102</td>')
    assert '<td class="number">-2.00</td>' in worst
    assert '<td class="number">100</td>' not in worst
