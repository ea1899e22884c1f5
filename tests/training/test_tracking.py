"""What trackers show of a run: its metrics, the library's settings and refshard's own, and stage one."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.reader import load_config
from pipeline.run.inputs import PolicyInputs, ReferenceInputs, RunInputs
from pipeline.training.arguments import arguments_of_loop, training_arguments
from pipeline.training.tracking import attach
from support.processes import ROOT
from support.runs import refshard

MakeRun = Callable[..., Path]

POLICY = PolicyInputs(model="m", adapter=None, dtype=None, parameters=1, trained_parameters=1)
INPUTS = RunInputs(
    reference=ReferenceInputs(name="sft", identity={}, fingerprint="f00d"),
    policy=POLICY,
    sets={},
    stage_one=[
        {"set": "train", "worker": "0/2", "pairs": 10, "tokens": 300, "seconds": 2.5, "device": "H200"},
        {"set": "train", "worker": "1/2", "pairs": 11, "tokens": 310, "seconds": 2.0, "device": "H200"},
        {"set": "test", "worker": "0/2", "pairs": None, "tokens": None, "seconds": None, "device": None},
    ],
)


def test_arguments_give_trackers_refshard_s_settings_and_stage_one_s_figures(make_run: MakeRun) -> None:
    held_out = {"été_2": {"split": "test"}}
    config = load_config(make_run(data={"eval": held_out}, cluster={"setup": "export KEY=secret"}))
    arguments = arguments_of_loop(training_arguments(config))
    before = arguments.to_dict()
    attach(arguments, config, INPUTS)
    shown = arguments.to_dict()
    assert before.items() <= shown.items()
    ours = {name: value for name, value in shown.items() if name not in before}
    assert json.loads(arguments.to_json_string()).keys() == shown.keys()
    assert (ours["loss/beta"], ours["loss/type"], ours["data/max_length"]) == (0.1, "sigmoid", 128)
    assert ours["precompute/output"] == config.precompute.output
    assert (ours["train/on_missing"], ours["data/eval/_t__2/split"]) == ("stop", "test")
    stage_one = {
        name.removeprefix("stage_one/"): value for name, value in ours.items() if name.startswith("stage_one/")
    }
    assert stage_one == {
        "reference": "sft",
        "fingerprint": "f00d",
        "pairs": 21,
        "tokens": 610,
        "seconds": 4.5,
        "device": "H200, None",
    }
    assert "secret" not in str(shown) and not any(name.startswith("cluster") for name in shown)


def test_a_run_without_a_reference_or_costs_shows_none(make_run: MakeRun) -> None:
    config = load_config(make_run())
    arguments = training_arguments(config)
    attach(arguments, config, dataclasses.replace(INPUTS, reference=None, stage_one=[]))
    assert not any(name.startswith("stage_one") for name in arguments.to_dict())


# --- The trackers themselves: pip install wandb mlflow trackio ---


def read_wandb(folder: Path) -> tuple[str, dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    """Read the file of an offline run: blocks of 32 KiB with pieces of records, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    name, settings, logged = "", {}, []
    for content in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        name = record.run.display_name or name
        for update in (*record.run.config.update, *record.config.update):
            settings[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if items:
            logged.append((items["train/global_step"], items))
    return name, settings, logged


def _records(content: bytes) -> Iterator[bytes]:
    at, whole = 7, b""
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole = (b"" if kind in (1, 2) else whole) + content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole


def read_mlflow(folder: Path) -> tuple[str, dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    import mlflow

    client = mlflow.MlflowClient(f"file://{folder / 'mlruns'}")
    [run] = client.search_runs(["0"])
    by_step: dict[int, dict[str, Any]] = {}
    for key in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            by_step.setdefault(metric.step, {})[f"train/{key}"] = metric.value
    return str(run.info.run_name), run.data.params, sorted(by_step.items())


def read_trackio(folder: Path) -> tuple[str, dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    import sqlite3

    import orjson

    [file] = (folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        [(name, settings)] = database.execute("SELECT run_name, config FROM configs")
        rows = database.execute("SELECT metrics FROM metrics ORDER BY step").fetchall()
    logged = [orjson.loads(metrics) for (metrics,) in rows]
    return name, orjson.loads(settings), [(entry["train/global_step"], entry) for entry in logged]


READERS: dict[str, Callable[[Path], tuple[str, Mapping[str, Any], list[tuple[int, dict[str, Any]]]]]] = {
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


@pytest.mark.nightly
@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_shows_the_metrics_the_settings_and_stage_one(make_run: MakeRun, tracker: str) -> None:
    pytest.importorskip(tracker)
    config = make_run(train={"report_to": tracker, "run_name": "first"}, loss={"beta": 0.3})
    folder = config.parent
    refshard("precompute", "--config", config)
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": f"file://{folder / 'mlruns'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    # A process of its own: trackers keep threads and services.
    words = [sys.executable, "-m", "stages.cli", "train", "--config", str(config)]
    subprocess.run(words, cwd=ROOT, env=environment, check=True)
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    name, settings, logged = READERS[tracker](folder)
    assert name == "first"
    # MLflow's values are texts.
    assert float(settings["loss/beta"]) == 0.3
    assert float(settings["learning_rate"]) == 1e-3
    assert float(settings["stage_one/pairs"]) == 24
    log = [json.loads(line) for line in (folder / "policy" / "log.jsonl").read_text().splitlines()]
    ours = [(entry["step"], entry["rewards/margins"], entry["loss"]) for entry in log if "loss" in entry]
    theirs = [(step, e["train/rewards/margins"], e["train/loss"]) for step, e in logged if "train/loss" in e]
    assert [step for step, *_ in theirs] == [1, 2, 3, 4]
    assert theirs == [tuple(map(pytest.approx, entry)) for entry in ours]
