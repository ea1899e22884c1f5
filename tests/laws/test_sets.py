"""Several training sets in one run: each pair is scored once, and a mixture trains as a file of the same pairs does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import IdentityError
from pipeline.base.folders import open_folder
from pipeline.config.reader import load_config
from pipeline.run.records import read_costs
from pipeline.training.mixture import copies_of
from stages import train
from stages.precompute import command as precompute
from support.runs import kept, logged_steps, simple_rows, write_jsonl
from support.stores import bytes_of_stores, stored_rows

MakeRun = Callable[..., Path]


def with_sets(make_run: MakeRun, **sets: Any) -> Path:
    """Write a run on sets in place of one path."""
    file = make_run(data={"sets": sets})
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith("  path:")))
    return file


def scored_pairs(output: Path) -> dict[str, int]:
    """Give the number of pairs that the reference has scored, by set."""
    counts: dict[str, int] = {}
    for cost in read_costs(open_folder(str(output))):
        counts[cost["set"]] = counts.get(cost["set"], 0) + cost["pairs"]
    return counts


def test_a_pair_of_two_sets_is_scored_once_and_sets_and_fractions_may_change(make_run: MakeRun, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    ultra = {"path": str(write_jsonl(tmp_path / "ultra.jsonl", simple_rows(16)))}
    renamed = [{"question": row.pop("prompt"), **row} for row in simple_rows(12, start=10)]
    own = {"path": str(write_jsonl(tmp_path / "hh.jsonl", renamed)), "columns": {"prompt": "question"}}
    more = {"path": str(write_jsonl(tmp_path / "more.jsonl", simple_rows(6, start=20)))}

    precompute.run(load_config(with_sets(make_run, ultra=ultra, hh=own)))
    # Rows 10 to 15 of the one are rows 0 to 5 of the other.
    assert scored_pairs(shards) == {"ultra": 16, "hh": 6}
    first = {row["pair_key"]: row["chosen_token_logps"] for row in stored_rows(shards / "ultra")}
    second = {row["pair_key"]: row["chosen_token_logps"] for row in stored_rows(shards / "hh")}
    assert len(shared := first.keys() & second.keys()) == 6
    assert all(first[key] == second[key] for key in shared)

    before = bytes_of_stores(shards)
    precompute.run(load_config(with_sets(make_run, more=more, hh={**own, "fraction": 0.5})))
    # Rows 0 and 1 of the new set are rows 10 and 11 of the one that stays.
    assert scored_pairs(shards) == {"ultra": 16, "hh": 6, "more": 4}
    after = bytes_of_stores(shards)
    assert before.items() <= after.items()


def test_a_mixture_trains_as_a_file_with_the_same_pairs_as_often(make_run: MakeRun, tmp_path: Path) -> None:
    one, two = simple_rows(8), simple_rows(16, start=8)
    sets = {
        "twice": {"path": str(write_jsonl(tmp_path / "one.jsonl", one)), "fraction": 2.0},
        "half": {"path": str(write_jsonl(tmp_path / "two.jsonl", two)), "fraction": 0.5},
    }
    mixed = load_config(with_sets(make_run, **sets))
    precompute.run(mixed)
    train.run(mixed)
    found = logged_steps(mixed.train.folder)

    chosen = copies_of([pair.key for pair in kept(load_config(make_run(rows=two)))], 0.5, 42)
    assert 0 < chosen.sum() < 16
    # In the order of the sets' names.
    rows = [row for row, is_in in zip(two, chosen, strict=True) if is_in] + [row for row in one for _ in range(2)]
    other = {"output_dir": str(tmp_path / "plain")}
    plain = load_config(make_run(rows=rows, precompute={"output": str(tmp_path / "plain-shards")}, train=other))
    precompute.run(plain)
    train.run(plain)
    expected = logged_steps(plain.train.folder)
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in expected], abs=1e-6)

    for step in found:
        parts = [step.get(f"rewards/accuracies/{name}") for name in sets]
        means = [part for part in parts if part is not None]
        assert min(means) <= step["rewards/accuracies"] <= max(means)
    inputs = json.loads((mixed.train.folder / "inputs.json").read_text())["sets"]
    assert {name: inputs[name]["of_epoch"] for name in sets} == {"twice": 16, "half": int(chosen.sum())}
    card = (mixed.train.folder / "README.md").read_text()
    assert "two.jsonl (train)`, fraction 0.5" in card and "| twice |" in card

    sets["half"]["fraction"] = 0.25
    with pytest.raises(IdentityError, match=r"data\.sets\.half\.fraction: saved 0\.5, this run 0\.25"):
        train.run(load_config(with_sets(make_run, **sets), [f"train.output_dir={mixed.train.folder}"]))
