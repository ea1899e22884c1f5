"""Faults of stage one through the real command: a clear error or a clean retry, and nothing wrong written.

The kills are in test_kills, the store's own faults in test_store_faults, memory that ran out in test_memory.
"""

import json
import multiprocessing
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from faults.kill_scoring import place
from pipeline.base.folders import open_folder
from support.disks import remount, tmpfs
from support.processes import ROOT, Command
from support.runs import refshard, simple_rows, write_jsonl
from support.stores import contents, stored_rows
from support.tally import tally
from support.watched import Watched

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]


def test_stores_on_an_object_store_serve_every_command_as_those_in_a_folder_do(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run(rows=simple_rows(24), data={"eval": {"test": {"split": "train[:8]"}}})
    refshard("precompute", "--config", config)
    refshard("train", "--config", config)
    with place(True, tmp_path) as url:
        remote = ["--config", config, "-o", f"precompute.output={url}", "-o", f"train.output_dir={tmp_path / 'remote'}"]
        refshard("precompute", *remote, "--worker", "1/2")
        refshard("train", *remote, check=75)
        refshard("precompute", *remote)
        assert "nothing" not in refshard("precompute", *remote).stderr
        for name in ("train", "test"):
            there, here = open_folder(f"{url}/{name}"), tmp_path / "shards" / name
            assert {file: there.read(file) for file in there.names()} == contents(here)
        refshard("train", *remote)
        assert "24 in 3 parts" in refshard("inspect", url).stdout
        there, here = (json.loads(refshard("inspect", where, "--json").stdout) for where in (url, tmp_path / "shards"))
        assert [entry.pop("store") for entry in there] == [f"{url}/train", f"{url}/test"]
        assert there == [{key: entry[key] for key in entry if key != "store"} for entry in here]
        assert refshard("verify", url).stdout.count("  whole ") == 2
        # What is scored there is copied into a store here.
        copied = ["-o", f"precompute.reuse=[{url}/train]", "-o", f"precompute.output={tmp_path / 'copied'}"]
        assert "24 copied from other shards" in refshard("precompute", "--config", config, *copied).stdout
        said = refshard("precompute", "--config", config, "-o", "precompute.output=s3://no-such-bucket/a", check=74)
        assert "no such bucket" in said.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("policy", "remote")]
    assert weights[0] == weights[1]


def test_two_copies_of_a_worker_at_once_both_end_well_and_leave_one_of_each_part(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run(rows=simple_rows(60), precompute={"rows_per_shard": 4})
    refshard("precompute", "--config", config, "-o", f"precompute.output={tmp_path / 'alone'}")
    copies = [Command("precompute", "--config", config) for _ in range(3)]
    assert [copy.wait() for copy in copies] == [0, 0, 0]
    assert contents(tmp_path / "shards" / "train") == contents(tmp_path / "alone" / "train")
    assert not list((tmp_path / "shards" / "train").glob(".tmp-*"))
    tally("three copies of one worker at once", 3, outcome="all exit 0, one of each part")


def test_a_worker_of_another_run_is_refused_and_writes_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run()
    refshard("precompute", "--config", config, "--worker", "0/2")
    before = contents(tmp_path / "shards" / "train")
    other = ["-o", "reference.dtype=bfloat16", "--worker", "1/2"]
    said = refshard("precompute", "--config", config, *other, check=78).stderr
    assert "reference.dtype: shards float32, this run bfloat16" in said
    assert contents(tmp_path / "shards" / "train") == before
    tally("a worker with another fingerprint", 1, outcome="78, the field named; nothing written")


def test_a_model_that_yields_nan_stops_at_the_pair_or_drops_it_and_writes_no_nan(
    make_run: MakeRun, tmp_path: Path, model_folder: Path, tokenizer: Any
) -> None:
    """One token's embedding is NaN: the pairs without it are scored."""
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    (token,) = tokenizer("~", add_special_tokens=False).input_ids
    weights["model.embed_tokens.weight"][token] = torch.nan
    safetensors.torch.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    rows = simple_rows(24)
    rows[13]["chosen"] = " It is ~ 27."
    config = make_run(rows=rows, policy={"model": str(broken)})
    said = refshard("precompute", "--config", config, check=65).stderr
    assert re.search(r"pairs\.jsonl:14: the reference gives a log-prob that is not finite", said)
    assert [file.name for file in (tmp_path / "shards" / "train").glob("part-*")] == ["part-00000.parquet"]
    said = refshard("precompute", "--config", config, "-o", "precompute.on_nonfinite=drop").stdout
    assert "24 rows, 23 pairs kept; 1 dropped: nonfinite" in said
    stored = stored_rows(tmp_path / "shards" / "train")
    assert [row["row"] for row in stored] == [row for row in range(24) if row != 13]
    tally("a model that yields NaN", 2, outcome="65, the row named; or the pair dropped and counted")


def test_a_full_disk_ends_the_run_with_74_and_it_goes_on_once_there_is_room(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(rows=simple_rows(60), precompute={"rows_per_shard": 4})
    refshard("precompute", "--config", config, "-o", f"precompute.output={tmp_path / 'alone'}")
    expected = contents(tmp_path / "alone" / "train")
    with tmpfs(tmp_path / "disk", "64k") as disk:
        words = ["--config", config, "-o", f"precompute.output={disk}"]
        said = refshard("precompute", *words, check=74).stderr
        assert "the disk is full. Free some space and run the same command again" in said
        assert said.count("\n") == 1 or "Traceback" not in said
        found = contents(disk / "train")
        assert 1 < len(found) < len(expected)
        assert found.items() <= expected.items()
        assert not list((disk / "train").glob(".tmp-*"))
        remount(disk, "size=4m")
        refshard("precompute", *words)
        assert contents(disk / "train") == expected
    tally("disk full in the middle of stage one", 1, outcome="74; finished once there is room")


@pytest.mark.parametrize("times", [pytest.param(4, id="some"), pytest.param(30, id="many", marks=pytest.mark.nightly)])
def test_signals_at_any_time_end_it_with_75_or_done_and_leave_nothing_half(
    make_run: MakeRun, tmp_path: Path, times: int
) -> None:
    config = make_run(rows=simple_rows(60), precompute={"rows_per_shard": 4})
    start = time.monotonic()
    refshard("precompute", "--config", config, "-o", f"precompute.output={tmp_path / 'alone'}")
    duration = time.monotonic() - start
    expected = contents(tmp_path / "alone" / "train")
    instants = random.Random(times)
    stopped = 0
    for number in range(times):
        output = tmp_path / str(number)
        command = Command("precompute", "--config", config, "-o", f"precompute.output={output}")
        time.sleep(instants.uniform(0.3, 0.9) * duration)
        command.signal(instants.choice([signal.SIGTERM, signal.SIGUSR1]))
        status = command.wait()
        # Before Python has its handlers, a signal ends a process as signals do.
        assert status in (0, 75, -signal.SIGTERM, -signal.SIGUSR1), command.said()
        stopped += status == 75
        assert not list(output.rglob(".tmp-*"))
        refshard("precompute", "--config", config, "-o", f"precompute.output={output}")
        assert contents(output / "train") == expected
        shutil.rmtree(output)
    assert stopped or times < 10
    tally("SIGTERM or USR1 to stage one at random moments", times, outcome="75 or done; then the same bytes")


def test_a_dataset_that_changed_between_two_starts_is_another_run(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(rows=simple_rows(24))
    refshard("precompute", "--config", config, "--worker", "0/2")
    rows = simple_rows(24)
    rows[9]["rejected"] = " Changed."
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    said = refshard("precompute", "--config", config, check=78).stderr
    assert "dataset.pairs.jsonl: shards" in said
    tally("the dataset changed between two launches", 1, outcome="78")


def test_a_dataset_that_changes_while_it_is_scored_gets_no_index(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(rows=simple_rows(400), precompute={"rows_per_shard": 4})
    command, store = Watched("precompute", "--config", config), tmp_path / "shards" / "train"
    command.wait_until(lambda: bool(list(store.glob("part-*"))))
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write("\n")
    assert command.finish() == 78, command.err
    assert "changed while it was in use" in command.err
    assert not (store / "index.json").exists()
    tally("the dataset changed while it was scored", 1, outcome="78, no index")


def test_a_reference_that_is_replaced_before_it_is_loaded_or_while_it_scores_gets_no_part(
    make_run: MakeRun, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.base.errors import IdentityError
    from pipeline.config.reader import load_config
    from stages.precompute import command, worker

    reference = shutil.copytree(model_folder, tmp_path / "reference")
    weights = reference / "model.safetensors"
    config = load_config(make_run(rows=simple_rows(24), reference={"model": str(reference)}), ())

    def replace() -> None:
        other = {name: tensor + 1 for name, tensor in safetensors.torch.load_file(weights).items()}
        safetensors.torch.save_file(other, tmp_path / "new.safetensors", metadata={"format": "pt"})
        (tmp_path / "new.safetensors").replace(weights)

    def load_another_and_put_back(*given: Any) -> Any:
        weights.rename(tmp_path / "aside")
        shutil.copy(tmp_path / "aside", weights)
        replace()
        scorer = load(*given)
        (tmp_path / "aside").replace(weights)
        return scorer

    load, score = worker.load_reference_scorer, worker.Reference.score
    for name, changed in (
        ("load_reference_scorer", load_another_and_put_back),
        ("load_reference_scorer", lambda *given: (replace(), load(*given))[1]),
        ("Reference.score", lambda *given: (replace(), score(*given))[1]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"stages.precompute.worker.{name}", changed)
            with pytest.raises(IdentityError, match=r"model\.safetensors: changed while it was in use"):
                command.run(config)
        assert [file.name for file in (tmp_path / "shards" / "train").iterdir()] == ["manifest.json"]
        shutil.rmtree(tmp_path / "shards")
    tally("the reference replaced between its digest and its loading, or while it scores", 3, outcome="78, no part")


def _run_both_stages_on_a_jumping_clock(config: Path, output: Path) -> None:
    from stages.cli import main

    jump = random.Random(0)
    honest, honest_ns = time.time, time.time_ns
    time.time = lambda: honest() + jump.uniform(-1e8, 1e8)
    time.time_ns = lambda: honest_ns() + jump.randrange(-(10**17), 10**17)
    places = [f"precompute.output={output}", f"train.output_dir={output / 'policy'}"]
    for command in ("precompute", "train"):
        main([command, "--config", str(config), "-o", places[0], "-o", places[1]], standalone_mode=False)


def test_a_clock_that_jumps_changes_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(train={"save_strategy": "steps", "save_steps": 1})
    still = ["-o", f"precompute.output={tmp_path / 'a'}", "-o", f"train.output_dir={tmp_path / 'a' / 'policy'}"]
    for command in ("precompute", "train"):
        refshard(command, "--config", config, *still)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_run_both_stages_on_a_jumping_clock, args=(config, tmp_path / "b"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    for name in ("train/part-00000.parquet", "train/index.json", "policy/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tally("a clock that jumps by years, both stages", 1, outcome="the same bytes")


def test_no_decision_hangs_on_a_clock() -> None:
    """A machine's clock may jump; only clocks that never go back are read, but for what is written down for people."""
    files = [file for package in ("pipeline", "stages") for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 40
    # A length of time is read off no clock.
    wall_clock = re.compile(r"time\.time\b|datetime(?! import timedelta$)|localtime|gmtime|getmtime", re.MULTILINE)
    found = {file.relative_to(ROOT).as_posix() for file in files if wall_clock.search(file.read_text())}
    told = {"pipeline/base/progress.py", "pipeline/run/records.py", "pipeline/report/run_page.py"}
    # A store's date, which is read once and recorded.
    dates = {"pipeline/config/data.py", "pipeline/data/dates.py", "pipeline/store/dating.py"}
    # The age of joined sets in a cache. Without one, a run joins again.
    caches = {"pipeline/training/joined_cache.py"}
    assert found == told | dates | caches
