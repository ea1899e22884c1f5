"""The embedded default, from nothing to its table, through the real commands: what it promises must hold."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.replies.means import estimate_kl
from pipeline.run.reading import read_run
from stages.demo import command
from stages.demo.reviews import true_reward
from support.processes import ROOT
from support.runs import refshard

RECIPE = ROOT / "stages" / "recipes" / "default.yaml"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is made and trained, and what is learned of it at least."""

    pairs: int
    steps: int
    accuracy: float
    true_ranking: float
    overrides: tuple[str, ...] = ()
    before: Callable[[], None] | None = None


def _make_less() -> None:
    """Have `prepare` train the model on fewer reviews, and draw fewer pairs, in its own process."""
    command._REVIEWS, command._BATCH_REVIEWS = 4000, 8
    command._PAIRS = SMALL.pairs


WHOLE = Size(pairs=4000, steps=250, accuracy=0.70, true_ranking=0.85)
SMALL = Size(
    pairs=1200,
    steps=150,
    accuracy=0.60,
    true_ranking=0.70,
    overrides=("train.max_steps=150", "train.eval_steps=150", "train.per_device_train_batch_size=8"),
    before=_make_less,
)


@pytest.mark.slow
@pytest.mark.parametrize("size", [SMALL, pytest.param(WHOLE, marks=pytest.mark.nightly)], ids=["small", "whole"])
def test_the_embedded_default_learns_the_true_ranking_and_stays_near_the_reference(tmp_path: Path, size: Size) -> None:
    settings = {
        "data.path": tmp_path / "train.jsonl",
        "data.eval.heldout.path": tmp_path / "heldout.jsonl",
        "policy.model": tmp_path / "model",
        "precompute.output": tmp_path / "shards",
        "train.output_dir": tmp_path / "policy",
        "train.use_cpu": "true",
    }
    overrides = (*(f"{key}={value}" for key, value in settings.items()), *size.overrides)
    arguments = ["--config", RECIPE, *(x for override in overrides for x in ("-o", override))]
    early = refshard("demo", "prepare", tmp_path, before=size.before)
    assert f"{size.pairs} pairs" in early.stdout
    refshard("demo", "summary", tmp_path, *arguments, check=75)
    refshard("precompute", *arguments)
    refshard("train", *arguments)
    told = refshard("demo", "summary", tmp_path, *arguments).stdout

    figures = json.loads((tmp_path / "policy" / "demo.json").read_text())
    assert figures["accuracy"] >= size.accuracy
    assert figures["accuracy"] <= figures["accuracy_ceiling"] < 0.95
    assert figures["true_ranking"] >= size.true_ranking
    assert figures["reward_after"] - figures["reward_before"] >= 1.0
    assert figures["reward_after"] <= figures["reward_optimum"] + 0.2
    assert 0.3 <= figures["kl"] <= 4
    assert figures["grammatical_after"] >= 0.80
    assert abs(figures["reward_before"]) < 0.5
    # The margins are those of the trainer's evaluation at the last step.
    metrics = json.loads((tmp_path / "policy" / "run.json").read_text())["metrics"]
    assert figures["accuracy"] == pytest.approx(metrics["eval_rewards/accuracies"], abs=0.005)
    assert figures["margin"] == pytest.approx(metrics["eval_rewards/margins"], abs=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "policy" / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == 400
    assert {(row["set"], row["step"]) for row in rows} == {("heldout", size.steps)}
    for row in rows:
        for who in ("reference", "policy"):
            assert row[who]["reward"] == true_reward(row[who]["text"])
    assert figures["reward_after"] == pytest.approx(sum(row["policy"]["reward"] for row in rows) / 400)
    assert figures["kl"] == pytest.approx(estimate_kl(read_run(tmp_path / "policy").generations).mean, abs=1e-3)
    # Towards the reference it is a divergence too.
    assert sum(row["reference"]["ref_logps"] - row["reference"]["policy_logps"] for row in rows) > 0
    assert told.count("before (") == told.count("after  (") == 2
    for place in ("shards", "policy"):
        assert str(tmp_path / place) in told
    assert "prepared already" in refshard("demo", "prepare", tmp_path).stdout
