"""The page of runs: what its charts and tables hold, against the library's own log, the shards, and sums by hand."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, Browser
from conftest import refshard, simple_rows, write_config, write_jsonl
from test_runs import write_log, write_settings

from pipeline.charts import histogram_chart, running_mean, thin
from pipeline.errors import ConfigError
from pipeline.report import report_page
from pipeline.runs import read_run
from stages.report import run as report

REPLY = {"text": "a reply", "num_tokens": 3, "ref_logps": -9.0, "policy_logps": -8.0, "reward": None}


def figures(page: str) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The charts of a page, by title: traces and layout, as the page hands them to Plotly."""
    decoder = json.JSONDecoder()
    found = {}
    for part in page.split('<figure role="img"')[1:]:
        title = re.search(r"<figcaption>(.*?)</figcaption>", part)
        start = re.search(r'Plotly\.newPlot\(\s*"[^"]+",\s*', part)
        assert title and start
        data, end = decoder.raw_decode(part, start.end())
        layout, _ = decoder.raw_decode(part, part.index("{", end))
        assert title[1] not in found
        found[title[1]] = data, layout
    return found


def rows_of(page: str, section: str) -> list[list[str]]:
    """The rows of all tables in a section, header included, as text."""
    body = page[page.index(f"<h2>{section}</h2>") :].split("</section>")[0]
    return [
        [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", body)
    ]


def write_generations(folder: Path, pairs: list[tuple[dict[str, Any], dict[str, Any]]], **changes: Any) -> None:
    base = {"set": "test", "step": 4, "temperature": 1.0, "max_tokens": 64, "reward_by": "a judge", **changes}
    lines = [
        {"row": i, "prompt": f"prompt {i}", **base, "reference": {**REPLY, **before}, "policy": {**REPLY, **after}}
        for i, (before, after) in enumerate(pairs)
    ]
    write_jsonl(folder / "generations.jsonl", lines)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Two runs of different beta on the same shards, through the real commands."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_jsonl(folder / "pairs.jsonl", simple_rows(24))
    held_out = write_jsonl(folder / "test.jsonl", simple_rows(9, start=100))
    config = write_config(
        folder / "run.yaml",
        data={"path": str(data), "max_length": 128, "eval": {"test": {"path": str(held_out)}}},
        policy={"model": str(model_folder)},
        precompute={"output": str(folder / "shards"), "rows_per_shard": 8, "tokens_per_batch": 512},
        train={
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": "1e-3",
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "use_cpu": True,
        },
    )
    refshard("precompute", "--config", config, "-o", f"train.output_dir={folder / 'none'}")
    for beta in ("0.1", "0.5"):
        output = folder / "sweep" / f"beta-{beta}"
        refshard("train", "--config", config, "-o", f"loss.beta={beta}", "-o", f"train.output_dir={output}")
    return folder


def test_curves_and_margins_of_a_run_are_those_of_its_training(trained: Path) -> None:
    run = trained / "sweep" / "beta-0.5"
    told = refshard("report", run)
    assert str(run / "report.html") in told.stdout
    page = (run / "report.html").read_text()
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    charts = figures(page)
    metrics = {
        "Loss": {"training": "loss", "test": "eval_loss"},
        "Reward margin": {"training": "rewards/margins", "test": "eval_rewards/margins"},
        "Rewards: beta times the log-prob shift": {
            "chosen": "rewards/chosen",
            "rejected, test": "eval_rewards/rejected",
        },
        "Entropy of the policy": {"training": "entropy"},
        "Gradient norm": {"training": "grad_norm"},
        "Learning rate": {"training": "learning_rate"},
    }
    for title, named in metrics.items():
        traces = {trace["name"]: trace for trace in charts[title][0]}
        for name, metric in named.items():
            logged = {entry["step"]: entry[metric] for entry in history if metric in entry}
            assert len(logged) == (2 if "test" in name else 4)
            assert traces[name]["x"] == list(logged)
            assert traces[name]["y"] == pytest.approx(list(logged.values()), rel=1e-5)
    # The loss is a sigmoid's: rewards are beta times the shifts, on both sides.
    shifts, rewards = (
        charts[t][0] for t in ("Log-prob shift: policy less reference", "Rewards: beta times the log-prob shift")
    )
    for shift, reward in zip(shifts, rewards, strict=True):
        assert reward["name"] == shift["name"]
        assert reward["y"] == pytest.approx([0.5 * y for y in shift["y"]], rel=1e-4, abs=1e-5)

    stored = pq.read_table(sorted((trained / "shards" / "test").glob("part-*.parquet"))).to_pylist()
    margins = np.array([row["ref_chosen_logps"] - row["ref_rejected_logps"] for row in stored])
    header, held_out, train = rows_of(page, "Margins before and after")
    told_of = dict(zip(header, held_out, strict=True))
    last = {key: value for entry in history if "eval_loss" in entry for key, value in entry.items()}
    assert (told_of["pairs of"], told_of["after step"], told_of["pairs"]) == ("test", "4", "9")
    assert float(told_of["mean margin before, nats"]) == pytest.approx(margins.mean(), rel=1e-3)
    assert told_of["reference prefers chosen"] == f"{(margins > 0).mean():.1%}"
    assert float(told_of["mean reward margin"]) == pytest.approx(last["eval_rewards/margins"], rel=1e-3)
    assert float(told_of["after, nats"]) == pytest.approx(
        last["eval_logps/chosen"] - last["eval_logps/rejected"], rel=1e-3
    )
    assert train[:3] == ["train", "4", "16"]
    for trace in charts["Margins of held-out pairs: test"][0]:
        assert sum(trace["y"][:-1]) == pytest.approx(1)

    data = {row[0]: dict(zip(rows[0], row, strict=True)) for rows in [rows_of(page, "Data")] for row in rows}
    assert [data["train"][key] for key in ("rows", "kept", "dropped", "joined", "missing")] == [
        "24",
        "24",
        "none",
        "24",
        "0",
    ]
    assert data["test"]["chosen tokens"] == str(sum(row["chosen_tokens"] for row in stored))
    manifest = json.loads((trained / "shards" / "test" / "manifest.json").read_text())
    for text in (manifest["fingerprint"], manifest["identity"]["reference"]["weights"], "finished, 4 steps"):
        assert text in page
    assert f"refshard generate {run}" in page


def test_runs_of_a_sweep_are_told_apart_by_what_differs(trained: Path) -> None:
    runs = sorted((trained / "sweep").glob("beta-*"))
    for run, (shift, rewards) in zip(runs, ((2.0, (1.0, 3.0)), (4.0, (5.0, 5.0))), strict=True):
        write_generations(run, [({"reward": r - 2}, {"policy_logps": -9.0 + shift, "reward": r}) for r in rewards])
    try:
        refshard("report", *runs, runs[0])
    finally:
        for run in runs:
            (run / "generations.jsonl").unlink()
    page = (trained / "sweep" / "report.html").read_text()
    summary = [dict(zip(rows[0], row, strict=True)) for rows in [rows_of(page, "Summary")] for row in rows[1:]]
    assert [row["run"] for row in summary] == ["beta=0.1", "beta=0.5"]
    assert [row["loss.beta"] for row in summary] == ["0.1", "0.5"]
    assert [row["reward of replies"] for row in summary] == ["2 ± 1", "5 ± 0"]
    for run, row in zip(runs, summary, strict=True):
        metrics = json.loads((run / "run.json").read_text())["metrics"]
        assert float(row["test: accuracy"]) == pytest.approx(metrics["eval_rewards/accuracies"], rel=1e-3)
    charts = figures(page)
    traces, layout = charts["Mean reward of replies (a judge) against KL"]
    assert [(t["name"], t["x"], t["y"]) for t in traces] == [
        ("reference", [0], [0]),
        ("beta=0.1", [2], [2]),
        ("beta=0.5", [4], [5]),
    ]
    assert [t["error_y"].get("value") for t in traces] == [1, 1, 0]
    assert layout["xaxis"]["title"]["text"] == "KL(policy ‖ reference), nats per reply"
    before = [trace for trace in charts["Margins of held-out pairs: test"][0] if "reference" in trace["name"]]
    assert len(before) == 1
    assert "Rewards and margins are in units of beta, which differs" in page
    assert {trace["name"] for trace in charts["Loss"][0]} == {"beta=0.1", "beta=0.5"}
