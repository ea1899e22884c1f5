"""The embedded default, from nothing to its table, through the real commands: what it promises must hold."""

import json
from pathlib import Path

import pytest

from pipeline.replies.means import estimate_kl
from pipeline.run.reading import read_run
from stages.demo.reviews import true_reward
from support.processes import ROOT
from support.runs import refshard

RECIPE = ROOT / "stages" / "recipes" / "default.yaml"


@pytest.mark.slow
def test_the_embedded_default_learns_the_true_ranking_and_stays_near_the_reference(tmp_path: Path) -> None:
    settings = {
        "data.path": tmp_path / "train.jsonl",
        "data.eval.heldout.path": tmp_path / "heldout.jsonl",
        "policy.model": tmp_path / "model",
        "precompute.output": tmp_path / "shards",
        "train.output_dir": tmp_path / "policy",
        "train.use_cpu": "true",
    }
    arguments = ["--config", RECIPE, *(x for key, value in settings.items() for x in ("-o", f"{key}={value}"))]
    early = refshard("demo", "prepare", tmp_path)
    assert "4000 pairs" in early.stdout
    refshard("demo", "summary", tmp_path, *arguments, check=75)
    refshard("precompute", *arguments)
    refshard("train", *arguments)
    told = refshard("demo", "summary", tmp_path, *arguments).stdout

    figures = json.loads((tmp_path / "policy" / "demo.json").read_text())
    assert figures["accuracy"] >= 0.70
    assert figures["accuracy"] <= figures["accuracy_ceiling"] < 0.95
    assert figures["true_ranking"] >= 0.85
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
    assert {(row["set"], row["step"]) for row in rows} == {("heldout", 250)}
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
