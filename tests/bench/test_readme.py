"""The comparison in README is what the results say, and never names a side that was not measured."""

import copy
import json
from typing import Any

import pytest

from support.forked_benchmark import BENCH
from support.processes import ROOT

RESULTS = json.loads((BENCH / "results" / "cpu.json").read_text(encoding="utf-8"))["results"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def made(results: list[dict[str, Any]]) -> str:
    import readme

    return "\n".join(readme.comparison(results))


def with_completions_only(result: dict[str, Any]) -> dict[str, Any]:
    """Add the side that projects completions only, at half of TRL's time."""
    measured = copy.deepcopy(result)
    measured["workload"]["peers"] = ["trl-completions", "trl"]
    for sides in measured["measured"].values():
        sides["trl-completions"] = [{**m, "wall": m["wall"] / 2, "cpu": m["cpu"] / 2} for m in sides["trl"]]
    return measured


def test_readme_holds_what_the_results_say() -> None:
    assert made(RESULTS) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_headline_is_the_ratio_to_completion_positions_only() -> None:
    old = next(r for r in RESULTS if r["workload"]["name"] == "score-hh")
    if "trl-completions" in old["workload"]["peers"]:
        old = copy.deepcopy(old)
        old["workload"]["peers"] = ["trl"]
    import report

    ratio = report.compare(old, "wall", "trl").ratio
    assert f"**{ratio:.1f}x**" in made([old]) and "includes a fallback of TRL" in made([old])
    new = made([with_completions_only(old)])
    assert f"| **{ratio / 2:.1f}x** | {ratio:.1f}x |" in new and "as it does on CUDA" in new


def test_a_workload_without_the_headlines_side_is_left_out() -> None:
    first, second = (r for r in RESULTS if r["workload"]["name"] in ("score-hh", "train-hh"))
    second = copy.deepcopy(second)
    second["workload"]["peers"] = ["trl"]
    text = made([with_completions_only(first), second])
    assert "HH-like lengths" in text and "stage two" not in text


def test_sides_that_compute_something_else_are_not_compared() -> None:
    import rounds
    import workloads

    one = [{"values": [-100.0, -3.0]}]
    close, apart = [{"values": [-100.005, -3.0]}], [{"values": [-100.0, -3.001]}]
    rounds._require_agreement(workloads.WORKLOADS[0], {"ours": one, "trl": close, "trl-live": apart})
    with pytest.raises(RuntimeError, match=r"score-32k: refshard computed -3.0, trl-completions -3.001"):
        rounds._require_agreement(workloads.WORKLOADS[0], {"ours": one, "trl": one, "trl-completions": apart})
