"""Reading, scoring and writing go on at once, and what comes out is what one process alone would have made."""

import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch

from pipeline.base.errors import BadRow, DataError, StorageError, UnfinishedError
from pipeline.base.signals import StopFlag
from pipeline.config.data import DataConfig
from pipeline.config.reader import load_config
from pipeline.data import loading as module
from pipeline.data.intake import Ledger, kept_pairs
from pipeline.data.loading import Unit, UnitQueue, count_loaders, load_pairs
from pipeline.data.rows import Row, Source
from pipeline.data.sources import open_source, read_rows
from stages.precompute import command as precompute
from stages.precompute import worker
from support.models import make_tokenizer
from support.processes import ROOT
from support.runs import simple_rows, write_jsonl
from support.stores import bytes_of_stores
from support.watched import Watched

MakeRun = Callable[..., Path]

# More loaders than there are CPUs is what some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TOKENIZER = make_tokenizer(bos=True)

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="loaders see what a test has replaced in forks only")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(DataConfig(path=str(write_jsonl(tmp_path / "pairs.jsonl", simple_rows(43)))))


def load(source: Source, num_loaders: int, **changes: Any) -> tuple[list[Unit], int]:
    data = DataConfig(path=source.path, max_length=64, on_bad_row="skip")
    with UnitQueue(source, TOKENIZER, data, **{"rows_per_unit": 4, **changes}, num_loaders=num_loaders) as units:
        return list(units), units.num_units


def loaders() -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.daemon]


# --- The same units, whoever loads them ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_loaders", [1, 2, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share": (1, 3)},
        {"wanted": frozenset(range(3, 40, 3))},
        {"wanted": frozenset(range(3, 40, 3)), "share": (1, 2)},
        {"wanted": frozenset()},
        {"is_done": {0, 1, 2, 7, 10}.__contains__},
        {"is_done": {0, 2, 7}.__contains__, "share": (0, 2)},
        {"rows_per_unit": 1},
        {"rows_per_unit": 100},
    ],
    ids=["all", "a share", "wanted rows", "a share of wanted rows", "none", "some done", "some of a share done",
         "a row a unit", "one unit"],
)  # fmt: skip
def test_loaders_give_the_units_of_one_process_in_order(
    source: Source, num_loaders: int, changes: dict[str, Any]
) -> None:
    assert load(source, num_loaders, **changes) == load(source, 0, **changes)


def test_units_are_those_of_the_share_and_the_number_is_that_of_all(source: Source) -> None:
    units, count = load(source, 2, share=(1, 3), is_done={4}.__contains__)
    assert [unit.number for unit in units] == [1, 7, 10]
    assert count == 11
    assert [pair.row for pair in units[0].pairs] == [4, 5, 6, 7]
    assert [unit.ledger.rows for unit in units] == [4, 4, 3]


def test_whose_unit_it_is_does_not_depend_on_what_is_done_by_then(source: Source, tmp_path: Path) -> None:
    """While loaders read, the taker finishes units: a loader that looks later sees other units done."""
    given = []

    def is_done(unit: int) -> bool:
        return (tmp_path / f"{unit}").exists()

    data = DataConfig(path=source.path)
    with UnitQueue(source, TOKENIZER, data, rows_per_unit=2, is_done=is_done, num_loaders=3) as units:
        for unit in units:
            given.append(unit.number)
            (tmp_path / f"{unit.number}").touch()
            time.sleep(0.01)
    assert given == list(range(22))


def test_the_rows_of_units_done_or_of_other_shares_are_never_decoded(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", simple_rows(8))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], "no", "JSON", *lines[4:6], "at", "all"]))
    source = open_source(DataConfig(path=str(file)))
    for num_loaders in (0, 2):
        units, _ = load(source, num_loaders, rows_per_unit=2, share=(0, 2))
        assert [unit.ledger.dropped for unit in units] == [{}, {}]
        units, _ = load(source, num_loaders, rows_per_unit=2, is_done={1, 3}.__contains__)
        assert [unit.ledger.dropped for unit in units] == [{}, {}]


def test_pairs_and_books_of_a_whole_source_are_those_of_the_intake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*simple_rows(5), {"chosen": "no"}, *simple_rows(40, start=5), {"prompt": 3}, *simple_rows(3)]
    data = DataConfig(path=str(write_jsonl(tmp_path / "pairs.jsonl", rows)), max_length=32, on_bad_row="skip")
    source = open_source(data)
    expected = Ledger()
    pairs = list(kept_pairs(read_rows(source), TOKENIZER, data, expected))
    monkeypatch.setattr(module, "_ROWS_PER_UNIT", 8)
    for num_loaders in (0, 2):
        monkeypatch.setattr(module, "count_loaders", lambda *_, n=num_loaders, **__: n)
        ledger = Ledger()
        assert list(load_pairs(source, TOKENIZER, data, ledger)) == pairs
        assert ledger == expected
        assert len(ledger.skipped) == 2


@pytest.mark.parametrize("num_loaders", [0, 1])
@needs_fork
def test_a_stream_of_several_shards_is_read_whole_and_numbered_as_it_comes(
    num_loaders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a loader the library's streams give that loader's share of their shards alone; one has them all."""

    def shard(starts: list[int]) -> Iterator[dict[str, str]]:
        for start in starts:
            yield from simple_rows(7, start=start)

    stream = datasets.IterableDataset.from_generator(shard, gen_kwargs={"starts": [0, 100, 200]})
    assert stream.num_shards == 3
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    source = open_source(DataConfig(path="org/pairs", streaming=True))
    assert count_loaders(source, None, 1024, most=4) == 1
    units, _ = load(source, num_loaders)
    pairs = [pair for unit in units for pair in unit.pairs]
    assert [pair.row for pair in pairs] == list(range(21))
    prompts = [row["prompt"] for start in (0, 100, 200) for row in simple_rows(7, start=start)]
    assert [TOKENIZER.decode(pair.pair.prompt_ids, skip_special_tokens=True) for pair in pairs] == prompts


def test_the_run_s_random_numbers_are_not_touched(source: Source) -> None:
    before = torch.get_rng_state(), random.getstate()
    load(source, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_tokenizer_that_has_used_threads_is_quiet_in_loaders(
    source: Source, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    TOKENIZER(["one", "two", "three"] * 100)
    load(source, 1)
    assert "forked" not in capfd.readouterr().err


def test_what_a_loader_starts_with_can_be_sent_to_a_process_that_is_no_fork(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.sys, "platform", "elsewhere")
    assert load(source, 1) == load(source, 0)


# --- How many -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "local_processes", "rows", "rows_per_unit", "expected"),
    [
        (64, None, 100_000, 1024, 4),
        (3, None, 100_000, 1024, 2),
        (2, None, 100_000, 1024, 1),
        (1, None, 100_000, 1024, 1),
        (64, "16", 100_000, 1024, 3),
        (8, "8", 100_000, 1024, 1),
        (64, None, 2048, 1024, 2),
        (64, None, 1024, 1024, 0),
        (64, None, 0, 1024, 0),
        (64, None, 500, 8, 0),
        (64, None, None, 1024, 4),
    ],
)
def test_loaders_are_as_many_as_there_is_room_and_work_for(
    cpus: int,
    local_processes: str | None,
    rows: int | None,
    rows_per_unit: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_processes)
    (tmp_path / "pairs.csv").touch()
    source = open_source(DataConfig(path=str(tmp_path / "pairs.csv")))
    assert count_loaders(source, rows, rows_per_unit, most=4) == expected


def test_a_range_of_rows_bounds_what_can_not_be_counted() -> None:
    assert count_loaders(open_source(DataConfig(path="org/pairs", split="train[100:300]")), None, 8, most=4) == 0


def test_a_json_array_is_held_by_one_loader_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    (tmp_path / "pairs.json").write_text(json.dumps(simple_rows(3)))
    source = open_source(DataConfig(path=str(tmp_path / "pairs.json")))
    assert count_loaders(source, None, 8, most=4) == count_loaders(source, 10_000, 8, most=4) == 1


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_loaders", [0, 1, 3])
def test_an_error_comes_where_its_unit_would_have_and_with_its_own_type(tmp_path: Path, num_loaders: int) -> None:
    # Two bad rows: which of the two is named must not depend on who is quicker.
    rows = [*simple_rows(18), {"chosen": "no"}, *simple_rows(2), {"prompt": 3}, *simple_rows(20)]
    data = DataConfig(path=str(write_jsonl(tmp_path / "pairs.jsonl", rows)))
    given: list[int] = []
    with (
        pytest.raises(BadRow, match=r"pairs\.jsonl:19: .*Set data\.on_bad_row: skip") as caught,
        UnitQueue(open_source(data), TOKENIZER, data, rows_per_unit=4, num_loaders=num_loaders) as units,
    ):
        for unit in units:
            given.append(unit.number)
    assert given == [0, 1, 2, 3]
    assert caught.value.reason == "missing_column"
    assert not loaders()
    if num_loaders:
        assert "in to_pair" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("num_loaders", [0, 3])
def test_a_file_that_breaks_off_is_an_error_of_its_own_kind(tmp_path: Path, num_loaders: int) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("prompt,chosen,rejected\n" + "a, b, c\n" * 30 + '"a, b')
    with pytest.raises(DataError, match=r"pairs\.csv:32: not CSV"):
        load(open_source(DataConfig(path=str(file))), num_loaders)


class _Odd(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize(
    "error", [KeyError("surprise"), _Odd(1, 2), MemoryError(), UnicodeDecodeError("a", b"", 0, 1, "b")]
)
@needs_fork
def test_a_bug_in_a_loader_is_raised_with_its_traceback(
    source: Source, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Iterator[Any]:
        raise error
        yield

    monkeypatch.setattr(module, "kept_pairs", broken)
    with pytest.raises(Exception) as caught:
        load(source, 2)
    assert type(caught.value) is type(error) or type(caught.value) is RuntimeError
    assert str(error) in str(caught.value)
    assert type(error).__name__ in f"{type(caught.value).__name__}: {caught.value}"
    assert "in broken" in "".join(caught.value.__notes__)


def test_a_bad_row_is_itself_after_a_journey() -> None:
    error = pickle.loads(pickle.dumps(BadRow("not_json", "here: bad")))
    assert (type(error), error.reason, str(error)) == (BadRow, "not_json", "here: bad")


# --- Loaders live as long as they are needed ----------------------------------------------------------------------


def slow_rows(seconds: float) -> Callable[[Any], Iterator[Row]]:
    def read(source: Source) -> Iterator[Row]:
        for row in read_rows(source):
            time.sleep(seconds)
            yield row

    return read


@needs_fork
def test_a_taker_that_stops_early_leaves_no_loader_and_waits_for_no_unit(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_rows", slow_rows(0.2))
    data = DataConfig(path=source.path)
    start = time.monotonic()
    with (
        pytest.raises(KeyError),
        UnitQueue(source, TOKENIZER, data, rows_per_unit=10, num_loaders=2) as units,
    ):
        for unit in units:
            assert unit.number == 0
            assert len(loaders()) == 2
            raise KeyError
    assert not loaders()
    # The first unit takes two seconds, the second as long again.
    assert time.monotonic() - start < 3.5


@needs_fork
def test_signals_to_the_whole_group_are_the_main_process_s_alone(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_rows", slow_rows(0.02))
    expected = load(source, 0)
    data = DataConfig(path=source.path, max_length=64, on_bad_row="skip")
    with UnitQueue(source, TOKENIZER, data, rows_per_unit=4, num_loaders=2) as units:
        given = []
        for unit in units:
            given.append(unit)
            for loader in loaders():
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    os.kill(loader.pid, number)
    assert given == expected[0]


@needs_fork
def test_a_loader_killed_from_outside_is_an_unfinished_run_and_not_a_bug(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_rows", slow_rows(0.02))
    data = DataConfig(path=source.path)
    with (
        pytest.raises(UnfinishedError, match="ended from outside"),
        UnitQueue(source, TOKENIZER, data, rows_per_unit=4, num_loaders=2) as units,
    ):
        for _ in units:
            for loader in loaders():
                loader.kill()
            time.sleep(5)
    assert not loaders()


@pytest.mark.slow
def test_a_process_that_ends_with_a_queue_still_open_ends_at_once(source: Source) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pipeline.config.data import DataConfig\n"
        "from pipeline.data.loading import UnitQueue\n"
        "from pipeline.data.sources import open_source\n"
        "from support.models import make_tokenizer\n"
        f"data = DataConfig(path={source.path!r})\n"
        "queue = UnitQueue(open_source(data), make_tokenizer(bos=True), data, rows_per_unit=2, num_loaders=2)\n"
        "units = iter(queue); print(next(units).number)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def _slow_with_three_loaders() -> None:
    """Change stage one in its process, the first of a group: slow enough to be caught in the middle."""
    os.setsid()
    score = worker.Reference.score_unit

    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        return score(*arguments)

    worker.Reference.score_unit = slow
    worker.count_loaders = lambda *_, **__: 3


def _start(config: Path) -> Watched:
    return Watched("precompute", "--config", config, before=_slow_with_three_loaders)


def _wait_for_a_part(process: Watched, folder: Path) -> list[psutil.Process]:
    assert process.wait_until(lambda: bool(list(folder.glob("part-*")))), process.err
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 3
    return children


@pytest.mark.slow
def test_a_killed_stage_one_leaves_no_loader_behind(make_run: MakeRun, tmp_path: Path) -> None:
    # Units that no pipe holds: a loader's queue waits for a reader, and would do so forever.
    config = make_run(rows=simple_rows(6000), precompute={"rows_per_shard": 1000}, data={"max_length": 256})
    process = _start(config)
    started = _wait_for_a_part(process, tmp_path / "shards" / "train")
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(started, timeout=3)
    for loader in alive:
        loader.kill()
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_ends_stage_one_and_its_loaders_with_75(make_run: MakeRun, tmp_path: Path, whole_group: bool) -> None:
    config = make_run(rows=simple_rows(4000), precompute={"rows_per_shard": 100})
    process = _start(config)
    started = _wait_for_a_part(process, tmp_path / "shards" / "train")
    if whole_group:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.signal(signal.SIGTERM)
    start = time.monotonic()
    assert process.finish(30) == 75, process.err
    errors = process.err
    assert "Traceback" not in errors
    assert "Run the same command again" in errors.splitlines()[-1]
    assert time.monotonic() - start < 5
    _, alive = psutil.wait_procs(started, timeout=1)
    assert not alive
    assert not list((tmp_path / "shards" / "train").glob(".tmp-*"))


# --- Stage one ----------------------------------------------------------------------------------------------------


def _precompute(config: Path, monkeypatch: pytest.MonkeyPatch, output: Path, num_loaders: int) -> dict[str, bytes]:
    monkeypatch.setattr(worker, "count_loaders", lambda *_, **__: num_loaders)
    monkeypatch.setattr(module, "count_loaders", lambda *_, **__: num_loaders)
    precompute.run(load_config(config, [f"precompute.output={output}"]))
    return bytes_of_stores(output)


def test_stage_one_writes_the_same_bytes_with_any_number_of_loaders(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "eval.jsonl", simple_rows(9, start=70))
    rows = [*simple_rows(20), {"chosen": "no"}, *simple_rows(20, start=20), {"prompt": 3}, *simple_rows(3)]
    config = make_run(rows=rows, data={"on_bad_row": "skip", "eval": {"held_out": {"path": f"{tmp_path}/eval.jsonl"}}})
    expected = _precompute(config, monkeypatch, tmp_path / "0", 0)
    assert len(expected) == 2 + 6 + 1 + 2 + 2
    for num_loaders in (1, 3):
        assert _precompute(config, monkeypatch, tmp_path / f"{num_loaders}", num_loaders) == expected
    # What is there is not made again, and what is missing is.
    for number in (1, 4):
        (tmp_path / "3" / "train" / f"part-{number:05d}.parquet").unlink()
    (tmp_path / "3" / "train" / "index.json").unlink()
    assert _precompute(config, monkeypatch, tmp_path / "3", 3) == expected


def test_stage_one_stops_at_the_same_bad_row_with_the_same_parts(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(rows=[*simple_rows(20), {"chosen": "no"}, *simple_rows(20, start=20), {"prompt": 3}])
    ends = []
    for num_loaders in (0, 1, 3):
        with pytest.raises(BadRow) as caught:
            _precompute(config, monkeypatch, tmp_path / f"{num_loaders}", num_loaders)
        parts = sorted(file.name for file in (tmp_path / f"{num_loaders}").rglob("*.parquet"))
        ends.append((str(caught.value), caught.value.exit_status, parts))
    assert ends[0][1:] == (65, ["part-00000.parquet", "part-00001.parquet"])
    assert ends == [ends[0]] * 3


def test_a_disk_that_fails_stops_the_run_with_the_disk_s_own_error(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, unit: int, *arguments: Any, **settings: Any) -> bool:
        if unit == 1:
            raise StorageError("the disk is full")
        return write(folder, unit, *arguments, **settings)

    write = worker.write_part
    monkeypatch.setattr(worker, "write_part", full)
    config = make_run(rows=simple_rows(80))
    with pytest.raises(StorageError, match="the disk is full"):
        _precompute(config, monkeypatch, tmp_path / "shards", 1)
    # Those before it, and at most those that were pending with it.
    assert 1 <= len(list((tmp_path / "shards").rglob("*.parquet"))) <= 4
    assert not loaders()


def test_a_last_part_that_can_not_be_written_is_not_forgotten(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> bool:
        time.sleep(0.2)
        raise StorageError("the disk is full")

    monkeypatch.setattr(worker, "write_part", full)
    with pytest.raises(StorageError, match="the disk is full"):
        _precompute(make_run(rows=simple_rows(4)), monkeypatch, tmp_path / "shards", 0)


def test_what_is_scored_when_a_signal_comes_is_written(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = StopFlag()
    score, write = worker.Reference.score_unit, worker.write_part
    scored: list[int] = []

    def stopping(*arguments: Any) -> Any:
        result = score(*arguments)
        scored.append(len(scored))
        if len(scored) == 3:
            flag.request()
        return result

    def slow(*arguments: Any, **settings: Any) -> bool:
        time.sleep(0.2)
        return write(*arguments, **settings)

    monkeypatch.setattr(precompute, "watch_signals", lambda stop_at: flag)
    monkeypatch.setattr(worker.Reference, "score_unit", stopping)
    monkeypatch.setattr(worker, "write_part", slow)
    with pytest.raises(UnfinishedError):
        _precompute(make_run(rows=simple_rows(80)), monkeypatch, tmp_path / "shards", 1)
    assert len(list((tmp_path / "shards").rglob("*.parquet"))) == 3


# --- At once ------------------------------------------------------------------------------------------------------


def _slow_stage_one(monkeypatch: pytest.MonkeyPatch, *, a_row: float = 0, a_unit: float = 0, a_part: float = 0) -> None:
    """Have reading, scoring and writing take so many seconds more, each asleep, so that CPUs don't matter."""
    score, write = worker.Reference.score_unit, worker.write_part

    def slow_score(*arguments: Any) -> Any:
        time.sleep(a_unit)
        return score(*arguments)

    def slow_write(*arguments: Any, **settings: Any) -> bool:
        time.sleep(a_part)
        return write(*arguments, **settings)

    monkeypatch.setattr(module, "read_rows", slow_rows(a_row))
    monkeypatch.setattr(worker.Reference, "score_unit", slow_score)
    monkeypatch.setattr(worker, "write_part", slow_write)


def _seconds(config: Path, monkeypatch: pytest.MonkeyPatch, output: Path, num_loaders: int) -> float:
    start = time.monotonic()
    _precompute(config, monkeypatch, output, num_loaders)
    return time.monotonic() - start


@pytest.mark.slow
@needs_fork
def test_reading_scoring_and_writing_take_the_time_of_the_slowest_and_not_of_all(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(rows=simple_rows(96))
    plain = _seconds(config, monkeypatch, tmp_path / "plain", 1)
    # 12 units of 8 rows: 2.4 seconds of each.
    _slow_stage_one(monkeypatch, a_row=0.025, a_unit=0.2, a_part=0.2)
    assert _seconds(config, monkeypatch, tmp_path / "overlapped", 1) - plain < 2.4 + 2 * 0.2 + 1
    # In one process reading and scoring add up, and only writing is beside them.
    assert _seconds(config, monkeypatch, tmp_path / "in line", 0) - plain > 4.4


@needs_fork
@pytest.mark.parametrize(("num_loaders", "ahead"), [(1, 2), (3, 3)])
def test_readers_wait_for_a_scorer_that_is_stuck(
    source: Source, num_loaders: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Any = multiprocessing.get_context("fork").Value("i", 0)

    def counting(rows: Any, *arguments: Any) -> Any:
        with read.get_lock():
            read.value += 1
        return kept_pairs(rows, *arguments)

    monkeypatch.setattr(module, "kept_pairs", counting)
    data = DataConfig(path=source.path)
    with UnitQueue(source, TOKENIZER, data, rows_per_unit=2, num_loaders=num_loaders) as units:
        for unit in units:
            if unit.number in (0, 4):
                deadline = time.monotonic() + 10
                while read.value < unit.number + 1 + ahead and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(0.3)
                assert read.value == unit.number + 1 + ahead


@needs_fork
def test_a_writer_that_is_stuck_stops_the_scorer_after_a_few_parts(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    scored, written = [], []
    score, write = worker.Reference.score_unit, worker.write_part

    def counting(*arguments: Any) -> Any:
        nonlocal most
        scored.append(0)
        most = max(most, len(scored) - len(written))
        return score(*arguments)

    def slow(*arguments: Any, **settings: Any) -> bool:
        time.sleep(0.1)
        done = write(*arguments, **settings)
        written.append(0)
        return done

    monkeypatch.setattr(worker.Reference, "score_unit", counting)
    monkeypatch.setattr(worker, "write_part", slow)
    _precompute(make_run(rows=simple_rows(96)), monkeypatch, tmp_path / "shards", 1)
    # Two pending, one being scored; one more is scored and waits to be taken.
    assert 2 <= most <= 4
