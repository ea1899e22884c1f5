"""`refshard sweep`: several policies on shards that are scored once, whatever kills it, and a page of all of them."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import refshard, simple_rows, write_jsonl
from processes import Command
from test_laws import digests

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_three_betas_are_trained_on_shards_that_are_scored_once_through_a_kill_and_compared_on_a_page(
    make_run: MakeRun, tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "heldout.jsonl", simple_rows(8, start=100))
    # A page of its own for the folder's name, which has what YAML would read as something else.
    into = tmp_path / "all: 'betas'"
    settings: dict[str, Any] = {"learning_rate": "1e-2", "max_steps": 12, "save_strategy": "steps", "save_steps": 1}
    config = make_run(data={"eval": {"test": {"path": str(held_out)}}}, train=settings)
    words = ["sweep", "--config", config, "--over", "loss.beta=0.05,0.1,0.5", "--into", into]
    words += ["--prompts", 4, "--max-tokens", 8]

    killed = Command(*words)
    deadline = time.monotonic() + 300
    while not (into / "beta-0.1" / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    first = (into / "beta-0.05" / "run.json").stat().st_mtime_ns
    assert not (into / "beta-0.1" / "run.json").exists()
    scored = digests(tmp_path / "shards")

    done = refshard(*words)
    assert digests(tmp_path / "shards") == scored
    costs = [json.loads(file.read_text()) for file in (tmp_path / "shards" / "costs").glob("*.json")]
    assert sorted((cost["set"], cost["pairs"]) for cost in costs) == [("test", 8), ("train", 24)]
    assert (into / "beta-0.05" / "run.json").stat().st_mtime_ns == first
    assert "Going on from" in done.stdout
    refshard("train", "--config", config, "-o", "loss.beta=0.5", "-o", f"train.output_dir={tmp_path / 'alone'}")
    assert losses(into / "beta-0.5") == losses(tmp_path / "alone")
    ends = {beta: losses(into / f"beta-{beta}") for beta in ("0.05", "0.1", "0.5")}
    assert all(len(found) == 12 for found in ends.values())
    assert len({found[-1] for found in ends.values()}) == 3

    table = [line.split() for line in done.stdout.splitlines() if line.startswith("beta=")]
    assert [row[0] for row in table] == ["beta=0.05", "beta=0.1", "beta=0.5"]
    for row, beta in zip(table, ends, strict=True):
        metrics = json.loads((into / f"beta-{beta}" / "run.json").read_text())["metrics"]
        shown = [metrics[f"eval_{name}"] for name in ("loss", "rewards/accuracies", "rewards/margins")]
        assert row[1:5] == ["12", *(f"{value:.4g}" for value in shown)]
        lines = (into / f"beta-{beta}" / "generations.jsonl").read_text().splitlines()
        kls = [row["policy"]["policy_logps"] - row["policy"]["ref_logps"] for row in map(json.loads, lines)]
        assert row[5] == f"{sum(kls) / 4:.4g}"
    page = (into / "report.html").read_text()
    assert all(f"beta={beta}" in page for beta in ends)

    replies = [(into / f"beta-{beta}" / "generations.jsonl").stat().st_mtime_ns for beta in ends]
    again = refshard(*words)
    assert again.stdout.count("finished already") == 3
    assert [(into / f"beta-{beta}" / "generations.jsonl").stat().st_mtime_ns for beta in ends] == replies


def test_a_sweep_that_is_asked_to_stop_saves_says_75_and_goes_on(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(train={"max_steps": 400, "save_strategy": "steps", "save_steps": 400})
    words = ["sweep", "--config", config, "--over", "train.seed=1,2", "--prompts", 0]
    stopped = Command(*words)
    runs = [tmp_path / "policy" / f"seed-{seed}" for seed in (1, 2)]
    deadline = time.monotonic() + 300
    while not (runs[0] / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped.signal(signal.SIGTERM)
    assert stopped.wait() == 75
    out, err = stopped.said()
    assert "the same command goes on" in err
    assert "Run 2 of 2" not in out
    assert list(runs[0].glob("checkpoint-*"))
    assert not runs[1].exists()


def test_a_run_that_fails_is_named_and_the_others_are_trained(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(data={"split": "train[:8]"}, train={"max_steps": 1})
    words = ["sweep", "--config", config, "--over", "data.split=train,train[:4]", "--prompts", 0]
    done = refshard(*words, check=65)
    assert "16 of 24 pairs" in done.stderr
    assert "split-train (exit status 65)" in done.stderr
    assert (tmp_path / "policy" / "split-train-4" / "run.json").exists()
    assert (tmp_path / "policy" / "report.html").exists()


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ("data.max_length=64,256", "tokenization.max_length: shards 128, this run 256"),
        ("reference.dtype=float32,bfloat16", "reference.dtype: shards float32, this run bfloat16"),
        ("precompute.token_logps=true,false", "precompute.token_logps: the runs share one stage one"),
        ("train.output_dir=a,b", "--into says where"),
        ("loss.beta=0.1,1e-1", "are the same settings"),
        ("loss.beta=0.1,-1", "loss.beta: above 0"),
        ("loss.betta=0.1,0.2", "did you mean beta"),
    ],
)
def test_what_one_set_of_shards_can_not_serve_is_refused_before_anything_runs(
    make_run: MakeRun, tmp_path: Path, over: str, said: str
) -> None:
    config = make_run()
    assert said in refshard("sweep", "--config", config, "--over", over, check=2).stderr
    assert not (tmp_path / "shards").exists()
    assert not (tmp_path / "policy").exists()


def test_shorter_cuts_and_moving_references_are_swept_too(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(train={"max_steps": 2, "save_strategy": "steps", "save_steps": 2})
    over = ["--over", "data.max_length=36,128", "--prompts", 0]
    refshard("sweep", "--config", config, *over)
    shards = digests(tmp_path / "shards")
    moving = ["--over", "reference.sync={steps: 1},null", "-o", f"train.output_dir={tmp_path / 'moving'}"]
    done = refshard("sweep", "--config", config, *moving, "--prompts", 2, "--max-tokens", 4)
    assert "The reference moved in training" in done.stdout
    assert digests(tmp_path / "shards") == shards
    assert losses(tmp_path / "moving" / "sync-null") == losses(tmp_path / "policy" / "max_length-128")
    moved = losses(tmp_path / "moving" / "sync-steps-1")
    assert moved[0] == losses(tmp_path / "moving" / "sync-null")[0]
    assert moved[1] != losses(tmp_path / "moving" / "sync-null")[1]
