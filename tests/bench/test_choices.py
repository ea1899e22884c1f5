"""The page that chooses has the table of the committed runs, and its sentences about them hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.forked_benchmark import BENCH
from support.processes import ROOT

FOUND = json.loads((BENCH / "results" / "choosing.json").read_text(encoding="utf-8"))
SHORT = [run for run in FOUND["runs"] if run["series"] == "DPO" and run["steps"] == 250]


def of(seed: int, value: str) -> dict[float, Any]:
    return {run["beta"]: run[value] for run in SHORT if run["seed"] == seed}


def test_the_page_has_the_table_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import choices

    assert "\n".join(choices.choices(FOUND)) in Path(ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", [0, 1])
def test_with_a_smaller_beta_the_margin_grows_and_the_reward_rises_and_then_falls(seed: int) -> None:
    margins = [margin / beta for beta, margin in sorted(of(seed, "margin").items())]
    assert margins == sorted(margins, reverse=True)
    rewards = of(seed, "reward_after")
    assert max(rewards, key=rewards.__getitem__) == 0.1
    assert rewards[0.02] < rewards[1] < rewards[0.5] < rewards[0.1]
    accuracies = of(seed, "accuracy")
    assert accuracies[0.02] == min(accuracies.values()) > 0.7
    assert all(shift < 0 for beta, shift in of(seed, "logps/chosen_shift").items() if beta < 2)
