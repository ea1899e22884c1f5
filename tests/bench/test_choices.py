"""The page that chooses has the table of the committed runs, and its sentences about them hold."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from support.forked_benchmark import BENCH
from support.processes import ROOT

FOUND = json.loads((BENCH / "results" / "choosing.json").read_text(encoding="utf-8"))
PAGE = Path(ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


def of(value: str, series: str = "DPO", steps: int = 250, seed: int = 0) -> dict[float, Any]:
    """Give a value of the runs of one series by their beta."""
    runs = (run for run in FOUND["runs"] if (run["series"], run["steps"], run["seed"]) == (series, steps, seed))
    return {run["beta"]: run[value] for run in runs}


def says(*words: str) -> bool:
    text = " ".join(PAGE.split())
    return all(word in text for word in words)


def test_the_page_has_the_table_of_the_results_and_these_are_of_the_runs_that_the_script_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import choices
    import choosing

    assert "\n".join(choices.choices(FOUND)) in PAGE
    made = json.loads(json.dumps([dataclasses.asdict(member) for member in choosing.members()]))
    assert [{key: run[key] for key in made[0]} for run in FOUND["runs"]] == made


@pytest.mark.parametrize("seed", [0, 1])
def test_with_a_smaller_beta_the_margin_grows_and_the_reward_rises_and_then_falls(seed: int) -> None:
    margins = [margin / beta for beta, margin in sorted(of("margin", seed=seed).items())]
    assert margins == sorted(margins, reverse=True)
    rewards = of("reward_after", seed=seed)
    assert max(rewards, key=rewards.__getitem__) == 0.1
    assert rewards[0.02] < rewards[1] < rewards[0.5] < rewards[0.1]
    accuracies = of("accuracy", seed=seed)
    assert accuracies[0.02] == min(accuracies.values()) > 0.7
    assert max(accuracies, key=accuracies.__getitem__) == (0.5, 0.2)[seed]
    assert all(shift < 0 for beta, shift in of("logps/chosen_shift", seed=seed).items() if beta < 2)
    possible = of("reward_optimum", seed=seed)
    far = [beta for beta in rewards if beta >= 0.1 and rewards[beta] < 0.8 * possible[beta]]
    assert far == [[0.2], []][seed]


def test_the_numbers_in_the_sentences_are_those_of_the_runs() -> None:
    loss, accuracy, grammatical = (of(name)[0.02] for name in ("loss", "accuracy", "grammatical_after"))
    assert says(f"a held-out loss of {loss:.2f} and an accuracy of {accuracy:.2f}", "one of its 400 replies")
    assert 400 * grammatical == 1
    [(reward, share)] = {(run["reward_before"], run["grammatical_before"]) for run in FOUND["runs"]}
    assert says(f"the mean true reward is {reward:.2f}, and {share:.1%} of the replies are grammatical")
    enough = [value for seed in (0, 1) for beta, value in of("accuracy", seed=seed).items() if beta >= 0.1]
    assert says(f"{min(enough):.3f} to {max(enough):.3f} from beta 0.1 up") and min(enough) > of("accuracy")[0.05]
    assert {round(of("kl", seed=seed)[0.1]) for seed in (0, 1)} == {4} and says("about 4 nats per reply")
    assert round(of("kl")[0.2] / of("kl", seed=1)[0.2]) == 3 and says("a KL three times that of the other")
    small = sorted(f"{kl:.1f}" for kl in of("kl", "LoRA").values())
    assert says(f"(KL {' and '.join(small)})")


def test_longer_training_gains_reward_at_more_than_twice_the_kl_with_fewer_grammatical_replies() -> None:
    for beta in of("kl", steps=1000):
        assert of("kl", steps=1000)[beta] > 2 * of("kl")[beta]
        assert of("reward_after", steps=1000)[beta] > of("reward_after")[beta]
        assert of("grammatical_after", steps=1000)[beta] < of("grammatical_after")[beta]


def test_a_large_rate_for_lora_and_a_small_beta_for_ipo_break_the_replies() -> None:
    assert all(share < 0.5 for share in of("grammatical_after", "LoRA-fast").values())
    assert of("grammatical_after", "IPO")[0.1] < 0.1 and of("grammatical_after", "IPO")[2] > 0.9
