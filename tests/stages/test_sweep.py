"""`refshard sweep`: several policies on shards that are scored once, whatever kills it, and a page of all of them."""

import json
import math
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import ConfigError
from pipeline.base.signals import StopFlag
from pipeline.config.reader import load_config
from pipeline.replies.means import estimate
from stages import cli
from stages.subprocesses import Commands
from stages.sweep import command
from stages.sweep.grid import make_grid
from support.processes import Command
from support.runs import refshard, simple_rows, write_jsonl
from support.stores import digests
from support.tally import tally

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_file_in_the_place_of_the_page_is_refused_before_the_first_run(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "sweep.html").write_text("mine")
    sweep = command.Sweep(
        config_file=make_run(), overrides=(), over=["loss.beta=0.1,0.2"], num_prompts=0, max_tokens=8, into=tmp_path
    )
    with pytest.raises(ConfigError, match=r"sweep\.html: must be a new file or a page of refshard"):
        command.run(sweep, Commands(entry=lambda: pytest.fail("begun"), flag=StopFlag()))
    assert (tmp_path / "sweep.html").read_text() == "mine"
    tally("a sweep's page that would replace a file", 1, outcome="2 before the first run")


def test_three_betas_are_trained_on_shards_that_are_scored_once_through_a_kill_and_compared_on_a_page(
    make_run: MakeRun, tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "heldout.jsonl", simple_rows(8, start=100))
    # A folder's name that YAML would read as something else.
    into = tmp_path / "all: 'betas'"
    settings: dict[str, Any] = {"learning_rate": "1e-2", "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    config = make_run(data={"eval": {"test": {"path": str(held_out)}}}, train=settings)
    words = ["sweep", "--config", config, "--over", "loss.beta=0.05,0.1,0.5", "--into", into]
    words += ["--prompts", 4, "--max-tokens", 8]

    killed = Command(*words)
    deadline = time.monotonic() + 300
    while not (into / "beta-0.1" / "checkpoint-2" / "refshard-commit.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    first = [(into / "beta-0.05" / name).stat().st_mtime_ns for name in ("run.json", "generations.jsonl")]
    assert not (into / "beta-0.1" / "run.json").exists()
    scored = digests(tmp_path / "shards")

    done = refshard(*words)
    assert digests(tmp_path / "shards") == scored
    costs = [json.loads(file.read_text()) for file in (tmp_path / "shards" / "costs").glob("*.json")]
    assert sorted((cost["set"], cost["pairs"]) for cost in costs) == [("test", 8), ("train", 24)]
    assert [(into / "beta-0.05" / name).stat().st_mtime_ns for name in ("run.json", "generations.jsonl")] == first
    assert "Resuming" in done.stdout
    refshard("train", "--config", config, "-o", "loss.beta=0.5", "-o", f"train.output_dir={tmp_path / 'alone'}")
    assert losses(into / "beta-0.5") == losses(tmp_path / "alone")
    ends = {beta: losses(into / f"beta-{beta}") for beta in ("0.05", "0.1", "0.5")}
    assert all(len(found) == 8 for found in ends.values())
    assert len({found[-1] for found in ends.values()}) == 3

    table = [line.split() for line in done.stdout.splitlines() if line.startswith("beta=")]
    assert [row[0] for row in table] == ["beta=0.05", "beta=0.1", "beta=0.5"]
    for row, beta in zip(table, ends, strict=True):
        metrics = json.loads((into / f"beta-{beta}" / "run.json").read_text())["metrics"]
        shown = [metrics[f"eval_{name}"] for name in ("loss", "rewards/accuracies", "rewards/margins")]
        assert row[1:6] == ["8", "test", *(f"{value:.4g}" for value in shown)]
        lines = (into / f"beta-{beta}" / "generations.jsonl").read_text().splitlines()
        kls = [row["policy"]["policy_logps"] - row["policy"]["ref_logps"] for row in map(json.loads, lines)]
        assert row[6] == str(estimate(kls)).split()[0]
    page = (into / "sweep.html").read_text()
    assert all(f"beta={beta}" in page for beta in ends)


@pytest.mark.nightly
def test_a_sweep_that_is_asked_to_stop_saves_says_75_and_goes_on(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(train={"max_steps": 400, "save_strategy": "steps", "save_steps": 400})
    # A shorter cut is served by the same shards.
    words = ["sweep", "--config", config, "--over", "data.max_length=36,128", "--prompts", 0]
    stopped = Command(*words)
    runs = [tmp_path / "policy" / f"max_length-{length}" for length in (36, 128)]
    deadline = time.monotonic() + 300
    log = runs[0] / "log.jsonl"
    while not (log.exists() and '"loss"' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped.signal(signal.SIGTERM)
    assert stopped.wait() == 75
    out, err = stopped.said()
    assert "the same command resumes" in err
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
    assert (tmp_path / "policy" / "sweep.html").exists()


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ("data.max_length=64,256", "tokenization.max_length: shards 128, this run 256"),
        ("reference.dtype=float32,bfloat16", "reference.dtype: shards float32, this run bfloat16"),
        ("precompute.token_logps=true,false", "precompute.token_logps: the runs share stage one"),
        ("train.output_dir=a,b", "by --into"),
        ("loss.beta=0.1,1e-1", "are the same settings"),
        ("loss.beta=0.1,-1", "loss.beta: must be a positive finite number"),
        ("train.learning_rat=0.1,0.2", "did you mean train.learning_rate"),
    ],
)
def test_what_one_set_of_shards_can_not_serve_is_refused_before_anything_runs(
    make_run: MakeRun, tmp_path: Path, over: str, said: str
) -> None:
    sweep = command.Sweep(config_file=make_run(), overrides=[], over=[over], num_prompts=0, max_tokens=1)
    with pytest.raises(ConfigError, match=re.escape(said)):
        command.run(sweep, Commands(entry=cli.run, flag=StopFlag()))
    assert not (tmp_path / "shards").exists()
    assert not (tmp_path / "policy").exists()


def test_the_runs_of_a_sweep_have_names_of_their_own_in_trackers(make_run: MakeRun, tmp_path: Path) -> None:
    over = ["loss.beta=0.1,0.5"]
    sweep = command.Sweep(
        config_file=make_run(train={"run_name": "uf"}), overrides=[], over=over, num_prompts=0, max_tokens=1
    )
    runs = [command._one_run(sweep, member, tmp_path) for member in make_grid(over)]
    assert [run.config.train.options["run_name"] for run in runs] == ["uf-beta-0.1", "uf-beta-0.5"]
    assert command._told(runs[0].config) == command._told(load_config(sweep.config_file))


@pytest.mark.nightly
def test_fractions_of_a_set_are_swept_on_shards_that_are_scored_once(make_run: MakeRun, tmp_path: Path) -> None:
    files = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", simple_rows(8, start)) for start, name in ((0, "a"), (8, "b"))
    }
    config = make_run(data={"path": None, "sets": {name: {"path": str(file)} for name, file in files.items()}})
    words = ["sweep", "--config", config, "--over", "data.sets.b.fraction=0.5,1,3", "--prompts", 0]
    done = refshard(*words)
    costs = [json.loads(file.read_text()) for file in (tmp_path / "shards" / "costs").glob("*.json")]
    assert sorted((cost["set"], cost["pairs"]) for cost in costs) == [("a", 8), ("b", 8)]
    runs = sorted((tmp_path / "policy").glob("*/inputs.json"))
    counts = [json.loads(file.read_text())["sets"]["b"]["of_epoch"] for file in runs]
    assert len(counts) == 3 and 0 < counts[0] < 8 and counts[1:] == [8, 24], done.stdout


@pytest.mark.nightly
def test_a_reference_that_moves_has_the_shards_of_each_run_to_itself(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(train={"max_steps": 2, "save_strategy": "steps", "save_steps": 1})
    words = ["sweep", "--config", config, "--over", "reference.sync={steps: 1, mixup_alpha: 1}"]
    done = refshard(*words, "--prompts", 2, "--max-tokens", 4)
    run = tmp_path / "policy" / "sync-steps-1+mixup_alpha-1"
    # A copied policy is the reference of every window's first step.
    assert losses(run) == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert (run / "shards").exists()
    assert not (tmp_path / "shards").exists()
    assert "The reference moved in training" in done.stdout
    assert len((run / "generations.jsonl").read_text().splitlines()) == 2
