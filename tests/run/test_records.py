"""What a run writes down: lines that a kill or a full disk cuts, margins as columns, costs of all workers."""

import json
import os
from pathlib import Path

import numpy as np
import polars
import pyarrow.parquet as pq
import pytest

from pipeline.base.folders import open_folder
from pipeline.replies.records import GENERATIONS
from pipeline.run.attempts import Attempt, claim_run
from pipeline.run.records import (
    INPUTS,
    LOG,
    MARGIN_COLUMNS,
    MARGINS,
    RunLog,
    delete_costs,
    delete_records,
    read_costs,
    write_cost,
    write_margins,
)
from support.tally import tally


def lines(folder: Path) -> list[str]:
    return (folder / LOG).read_text().splitlines()


def test_every_line_says_its_kind_its_time_and_its_start(tmp_path: Path) -> None:
    RunLog(Attempt(tmp_path, 1)).add("log", {"step": 1, "loss": 0.7})
    RunLog(Attempt(tmp_path, 2)).add("log", {"step": 2, "loss": float("nan")})
    first, second = map(json.loads, lines(tmp_path))
    assert (first["kind"], first["attempt"], first["step"], first["loss"]) == ("log", 1, 1, 0.7)
    assert first["time"] > 1.7e9
    assert (second["attempt"], second["loss"]) == (2, None)


def test_a_start_that_another_has_taken_over_from_writes_nothing_more(tmp_path: Path) -> None:
    overtaken, newest = (RunLog(claim_run(tmp_path, {})) for _ in range(2))
    overtaken.add("log", {"step": 1})
    newest.add("log", {"step": 2})
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [2]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_kill_has_cut_does_not_swallow_the_next(tmp_path: Path, cut: int) -> None:
    for step in (1, 2):
        RunLog(Attempt(tmp_path, 1)).add("log", {"step": step})
    content = (tmp_path / LOG).read_bytes()
    (tmp_path / LOG).write_bytes(content[:-cut])
    RunLog(Attempt(tmp_path, 2)).add("log", {"step": 3})
    whole = []
    for line in lines(tmp_path):
        try:
            whole.append(json.loads(line)["step"])
        except json.JSONDecodeError:
            assert cut > 1
    assert whole == ([1, 2, 3] if cut == 1 else [1, 3])


def test_the_log_of_a_copy_that_was_made_with_hard_links_is_its_own(tmp_path: Path) -> None:
    original, copy = (tmp_path / name for name in ("original", "copy"))
    for folder in (original, copy):
        folder.mkdir()
    RunLog(Attempt(original, 1)).add("log", {"step": 1})
    os.link(original / LOG, copy / LOG)
    for step in (2, 3):
        RunLog(Attempt(copy, 2)).add("log", {"step": step})
    assert [[json.loads(line)["step"] for line in lines(folder)] for folder in (original, copy)] == [[1], [1, 2, 3]]
    tally("a run copied with hard links, and trained on", 1, outcome="the original's log stays as it is")


def test_a_disk_that_refuses_costs_lines_not_the_run_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(Attempt(tmp_path / "gone", 1))
    for step in range(3):
        log.add("log", {"step": step})
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path / 'gone' / LOG}: a line is lost (No such file or directory)"
    ]


def test_margins_are_plain_columns_with_their_step(tmp_path: Path) -> None:
    rows = np.arange(15, dtype=np.float32).reshape(3, 5)
    keys = [bytes([i]) * 16 for i in (1, 200, 255)]
    ids = np.array([[2**40 + i, *np.frombuffer(key, "<i8")] for i, key in enumerate(keys)])
    write_margins(tmp_path, "test", 3, ids, rows - 100)
    write_margins(tmp_path, "test", 7, ids, rows)
    file = tmp_path / MARGINS / "test.parquet"
    assert polars.read_parquet(file).to_dict(as_series=False) == {
        "row": [2**40, 2**40 + 1, 2**40 + 2],
        "pair_key": keys,
    } | {name: [float(i), float(i + 5), float(i + 10)] for i, name in enumerate(MARGIN_COLUMNS)}
    assert pq.read_schema(file).metadata[b"refshard.step"] == b"7"
    assert [entry.name for entry in file.parent.iterdir()] == ["test.parquet"]


def test_a_new_run_deletes_what_the_old_one_wrote_down_and_nothing_else(tmp_path: Path) -> None:
    RunLog(Attempt(tmp_path, 1)).add("start", {})
    (tmp_path / INPUTS).write_text("{}")
    write_margins(tmp_path, "train", 1, np.zeros((1, 3), np.int64), np.zeros((1, 5), np.float32))
    (tmp_path / GENERATIONS).write_text("{}\n")
    (tmp_path / "report.html").write_text("mine")
    assert {LOG, INPUTS, MARGINS, GENERATIONS} < {entry.name for entry in tmp_path.iterdir()}
    delete_records(tmp_path)
    delete_records(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_costs_of_all_workers_are_read_and_what_is_broken_is_left_out(tmp_path: Path) -> None:
    output = open_folder(str(tmp_path / "shards"))
    assert read_costs(output) == []
    for worker in ("0/2", "1/2"):
        write_cost(output, {"set": "train", "worker": worker, "seconds": 2.5, "tokens": 100})
    folder = tmp_path / "shards" / "costs"
    (folder / "train-broken.json").write_text('{"set": "train", "sec')
    (folder / "notes.txt").write_text("mine")
    assert sorted(cost["worker"] for cost in read_costs(output)) == ["0/2", "1/2"]


def test_the_costs_of_one_set_are_deleted_and_no_others(tmp_path: Path) -> None:
    output = open_folder(str(tmp_path))
    delete_costs(output, "train")
    for name in ("test", "test-2", "test"):
        write_cost(output, {"set": name})
    delete_costs(output, "test")
    assert [cost["set"] for cost in read_costs(output)] == ["test-2"]


def test_a_cost_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").write_text("a file stands where the folder should")
    write_cost(open_folder(str(tmp_path / "shards")), {"set": "train"})
    assert "what scoring train took is not written down" in capsys.readouterr().err


def test_a_file_of_costs_that_is_far_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = open_folder(str(tmp_path / "shards"))
    write_cost(output, {"set": "train", "worker": "0/1", "seconds": 2.5, "tokens": 100})
    large = tmp_path / "shards" / "costs" / "train-000000000000.json"
    large.touch()
    os.truncate(large, 2**40)
    (tmp_path / "shards" / "costs" / "train-edited.json").write_text('{"set": "train", "seconds": "long"}')
    assert [cost["seconds"] for cost in read_costs(output)] == [2.5]
