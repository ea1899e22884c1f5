"""What a real run says and writes down on its way: against its shards, its weights, the trainer's own state."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from pipeline.run.records import MARGIN_COLUMNS
from support.processes import ROOT, Command
from support.runs import refshard, simple_rows, write_jsonl

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]
BETA = 0.3


def records(run: Path, *kinds: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if not kinds or entry["kind"] in kinds]


def plain_logps(model: Any, rows: list[dict[str, str]]) -> np.ndarray:
    """Summed logps of chosen and rejected by a forward of each text alone: [P, 2], float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums = []
    for row in rows:
        both = []
        for side in ("chosen", "rejected"):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                logps = policy(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            scored = torch.arange(len(prompt) - 1, len(ids) - 1)
            both.append(float(logps[scored, torch.tensor(ids)[scored + 1]].sum()))
        sums.append(both)
    return np.array(sums)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> tuple[Path, Any, Any]:
    """A run with a held-out set, evaluated twice, in a batch log: its folder, and what both stages said."""
    folder = tmp_path_factory.mktemp("recorded")
    write_jsonl(folder / "train.jsonl", simple_rows(20))
    write_jsonl(folder / "test.jsonl", simple_rows(7, 50))
    settings = {
        "data": {"path": str(folder / "train.jsonl"), "eval": {"test": {"path": str(folder / "test.jsonl")}}},
        "policy": {"model": str(model_folder)},
        "precompute": {"output": str(folder / "shards"), "rows_per_shard": 8, "tokens_per_batch": 512},
        "loss": {"beta": BETA},
        "train": {
            "output_dir": str(folder / "policy"),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "tensorboard",
        },
    }
    (folder / "run.yaml").write_text(json.dumps(settings))
    scored = refshard("precompute", "--config", folder / "run.yaml")
    # A new process, not a fork, so that what is set before the libraries are imported is seen to work.
    environment = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
    words = [sys.executable, "-m", "stages.cli", "train", "--config", str(folder / "run.yaml")]
    trained = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return folder, scored, trained


def test_the_log_has_the_start_what_the_trainer_logged_and_the_end(finished: tuple[Path, Any, Any]) -> None:
    run = finished[0] / "policy"
    start, *_, end = records(run)
    assert (start["kind"], start["step"], start["max_steps"], start["batch_pairs"]) == ("start", 0, 6, 2)
    assert (start["pairs"], start["processes"], start["attempt"]) == ({"train": 20, "test": 7}, 1, 1)
    assert start["versions"]["torch"] == torch.__version__
    assert (end["kind"], end["step"], end["finished"]) == ("end", 6, True)

    state = json.loads((run / "trainer_state.json").read_text())["log_history"]
    logged = records(run, "log")
    assert [entry["step"] for entry in logged] == [2, 3, 4, 6, 6]
    held_out = [entry for entry in logged if "eval_test_loss" in entry or "eval_loss" in entry]
    assert [entry["step"] for entry in held_out] == [3, 6]
    for entry, theirs in zip(logged, [e for e in state if "train_runtime" not in e], strict=True):
        assert theirs.items() <= entry.items()
        assert entry["memory_bytes"] > 1e8
        assert entry["seconds"] > 0
    assert [entry["step"] for entry in records(run, "summary")] == [6]


def test_a_batch_log_has_lines_without_carriage_returns_and_no_bars(finished: tuple[Path, Any, Any]) -> None:
    for done in finished[1:]:
        assert "\r" not in done.stdout + done.stderr
        assert "%|" not in done.stderr
        assert "pin_memory" not in done.stderr
    lines = finished[2].stderr.splitlines()
    progress = [line for line in lines if line.startswith("train: ")]
    assert len(progress) == 3
    assert progress[0] == "train: 0 of 6 steps, parity gate, 0 of 20 pairs"
    assert progress[1].startswith("train: 1 of 6 steps, ")
    assert progress[2].startswith("train: 6 of 6 steps, ")
    assert re.search(r" steps/s, | s/step, ", progress[2])
    for part in (" tokens/s, ", " GiB, ", "loss ", "margin ", "accuracy "):
        assert part in progress[2]
    said = finished[2].stdout.splitlines()
    assert [line.split(" loss ")[0] for line in said if line.startswith("step ")] == [
        "step 3: held-out",
        "step 6: held-out",
    ]


def test_margins_of_the_held_out_set_are_those_of_the_shards_and_of_the_saved_policy(
    finished: tuple[Path, Any, Any], model_folder: Path
) -> None:
    folder = finished[0]
    file = folder / "policy" / "margins" / "test.parquet"
    assert pq.read_schema(file).metadata[b"refshard.step"] == b"6"
    table = pq.read_table(file)
    assert tuple(table.column_names) == ("row", "pair_key", *MARGIN_COLUMNS)
    rows = np.stack([table[name].to_numpy() for name in MARGIN_COLUMNS], axis=1)
    held_out = simple_rows(7, 50)
    ref, policy = plain_logps(model_folder, held_out), plain_logps(folder / "policy", held_out)
    shift = policy - ref
    by_hand = np.stack(
        [
            ref[:, 0] - ref[:, 1],
            policy[:, 0] - policy[:, 1],
            BETA * (shift[:, 0] - shift[:, 1]),
            shift[:, 0],
            shift[:, 1],
        ],
        axis=1,
    )
    order = np.argsort(rows[:, 0])
    np.testing.assert_allclose(rows[order], by_hand[np.argsort(by_hand[:, 0])], atol=2e-4)
    assert np.abs(by_hand[:, 2]).max() > 0.01, "the policy has moved"

    last = [entry for entry in records(folder / "policy", "log") if "eval_rewards/margins" in entry][-1]
    assert rows[:, 2].mean() == pytest.approx(last["eval_rewards/margins"], abs=1e-5)
    stored = pq.read_table(folder / "shards" / "test" / "part-00000.parquet")
    gaps = stored["ref_chosen_logps"].to_numpy() - stored["ref_rejected_logps"].to_numpy()
    np.testing.assert_allclose(np.sort(rows[:, 0]), np.sort(gaps), atol=1e-5)
    by_key = dict(zip(stored["pair_key"].to_pylist(), zip(stored["row"].to_pylist(), gaps, strict=True), strict=True))
    for key, row, margin in zip(table["pair_key"].to_pylist(), table["row"].to_pylist(), rows[:, 0], strict=True):
        assert by_key[key] == (row, pytest.approx(margin, abs=1e-5))

    trained = pq.read_table(folder / "policy" / "margins" / "train.parquet")
    assert trained.num_rows == 12, "six steps of two pairs"


def test_inputs_say_who_the_reference_is_what_was_read_and_what_stage_one_took(
    finished: tuple[Path, Any, Any],
) -> None:
    folder = finished[0]
    inputs = json.loads((folder / "policy" / "inputs.json").read_text())
    manifest = json.loads((folder / "shards" / "train" / "manifest.json").read_text())
    assert inputs["reference"]["fingerprint"] == manifest["fingerprint"]
    assert inputs["reference"]["identity"] == manifest["identity"]["reference"]
    parameters = sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(folder / "policy").parameters()
    )
    assert inputs["policy"]["parameters"] == inputs["policy"]["trained_parameters"] == parameters
    for name, pairs in (("train", 20), ("test", 7)):
        described = inputs["sets"][name]
        assert (described["ledger"]["rows"], described["ledger"]["kept"], described["matched"]) == (pairs, pairs, pairs)
        assert described["missing"] == 0
        parts = [pq.read_table(part) for part in (folder / "shards" / name).glob("part-*.parquet")]
        assert described["tokens"]["chosen"] == sum(sum(part["chosen_tokens"].to_pylist()) for part in parts)
    costs = {cost["set"]: cost for cost in inputs["stage_one"]}
    assert {name: cost["pairs"] for name, cost in costs.items()} == {"train": 20, "test": 7}
    assert all(cost["worker"] == "0/1" and cost["seconds"] > 0 and cost["tokens"] > 0 for cost in costs.values())


def test_the_librarys_trackers_get_what_the_log_gets(finished: tuple[Path, Any, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finished[0] / "policy"
    events = EventAccumulator(str(next(run.rglob("events.out.tfevents*"))))
    events.Reload()
    for tag, key in (
        ("train/rewards/margins", "rewards/margins"),
        ("train/loss", "loss"),
        ("eval/rewards/accuracies", "eval_rewards/accuracies"),
    ):
        tracked = [(event.step, event.value) for event in events.Scalars(tag)]
        logged = [(entry["step"], entry[key]) for entry in records(run, "log") if key in entry]
        assert tracked == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
    [text] = [event.tensor_proto.string_val[0] for event in events.Tensors("args/text_summary")]
    settings = json.loads(text)
    assert (settings["loss/beta"], settings["learning_rate"], settings["stage_one/pairs"]) == (BETA, 1e-3, 27)


@pytest.mark.parametrize(("tracker", "why"), [("comet_ml", "pip install comet-ml"), ("nonsense", "only azure_ml")])
def test_a_tracker_that_is_not_there_is_refused_before_a_model_is_loaded(
    make_run: MakeRun, tracker: str, why: str
) -> None:
    done = refshard("precompute", "--config", make_run(train={"report_to": tracker}), check=2)
    assert "refshard: train.report_to: " in done.stderr
    assert why in done.stderr


def test_what_a_held_out_set_came_to_is_logged_where_nothing_is_left_to_train(make_run: MakeRun) -> None:
    """The last of a moving reference's windows has only evaluations to make."""
    held_out = write_jsonl(make_run().parent / "test.jsonl", simple_rows(4, 50))
    config = make_run(
        rows=simple_rows(9),
        data={"eval": {"test": {"path": str(held_out)}}},
        reference={"sync": {"steps": 2, "mixup_alpha": 0.5}},
    )
    refshard("train", "--config", config)
    run = config.parent / "policy"
    last = [entry for entry in records(run, "log") if "eval_rewards/margins" in entry]
    assert [entry["step"] for entry in last] == [4]
    assert last[0]["eval_loss"] == json.loads((run / "run.json").read_text())["metrics"]["eval_loss"]
    assert records(run)[-1] | {"time": 0, "attempt": 0} == {
        "kind": "end",
        "time": 0,
        "attempt": 0,
        "step": 4,
        "finished": True,
    }


def test_json_logs_are_objects_on_stdout_and_nothing_else(make_run: MakeRun) -> None:
    config = make_run(rows=simple_rows(9))
    kinds = {}
    for stage in ("precompute", "train"):
        done = refshard(stage, "--config", config, "--json-logs")
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        kinds[stage] = [line["kind"] for line in lines]
        assert all("time" in line for line in lines)
        assert done.stderr == ""
    assert {"message", "progress", "cost"} == set(kinds["precompute"])
    assert {"message", "start", "progress", "log", "summary", "end"} == set(kinds["train"])
    for words, status in ((("train",), 2), (("train", "--config", config, "-o", "loss.beat=1"), 2)):
        last = json.loads(refshard(*words, "--json-logs", check=status).stdout.splitlines()[-1])
        assert (last["kind"], last["status"]) == ("error", status)
    refused = refshard("train", "--config", config, "-o", "data.max_length=4096", "--json-logs", check=78)
    last = json.loads(refused.stdout.splitlines()[-1])
    assert (last["kind"], last["status"]) == ("error", 78)
    assert last["text"] in refused.stderr


def test_a_run_that_goes_on_appends_to_its_log_under_another_start(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(rows=simple_rows(9), train={"max_steps": 100})
    refshard("precompute", "--config", config)
    started = Command("train", "--config", config)
    log = tmp_path / "policy" / "log.jsonl"
    while started.status is None and not (log.exists() and '"log"' in log.read_text()):
        time.sleep(0.01)
    started.signal(signal.SIGTERM)
    assert started.wait() == 75, started.said()
    run = tmp_path / "policy"
    stopped = records(run)
    assert stopped[-1]["kind"] == "end"
    assert not stopped[-1]["finished"]
    refshard("train", "--config", config)
    entries = records(run)
    assert entries[: len(stopped)] == stopped
    starts = [entry for entry in entries if entry["kind"] == "start"]
    assert [entry["attempt"] for entry in starts] == [1, 2]
    assert starts[1]["step"] == stopped[-1]["step"] > 0
    assert [entry["step"] for entry in entries if entry["kind"] == "log"] == list(range(1, 101))
    assert entries[-1]["finished"]
    refshard("train", "--config", config, "--overwrite", "-o", "train.max_steps=1")
    assert [entry["attempt"] for entry in records(run) if entry["kind"] == "start"] == [3]
