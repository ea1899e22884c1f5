"""The same rows come out of every kind of source, and damage is named with its file and line."""

import contextlib
import csv
import dataclasses
import gzip
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import BadRow, ConfigError, DataError, RefshardError, StorageError
from pipeline.config.data import DataConfig, EvalSetConfig
from pipeline.data import readers
from pipeline.data.layouts import to_pair
from pipeline.data.rows import Row, Source
from pipeline.data.sources import (
    as_recorded,
    count_rows,
    data_files,
    describe,
    digests_of_data,
    open_source,
    read_rows,
)
from support.runs import simple_rows, write_jsonl
from support.tally import tally

# Everything that a cell of a CSV file or a line of JSON could stumble over.
ROWS = [
    *simple_rows(7),
    {"prompt": 'He said "two, plus two"?', "chosen": '"Four",\nor ""four""', "rejected": ", \r\n"},
    {"prompt": "\u2028Γειά\x85 你好 👋🏽\x0b", "chosen": " 'Four' ", "rejected": "\\n \\u0041 \ufeff"},
    {"prompt": "Last.", "chosen": "a", "rejected": "b" * 200_000},
]


@pytest.fixture(autouse=True)
def _without_progress_bars() -> Iterator[None]:
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not were_off:
        datasets.enable_progress_bars()


def source_of(path: Path | str, **settings: Any) -> Source:
    return open_source(DataConfig(path=str(path), **settings))


def values(source: Source) -> list[dict[str, Any]]:
    return [dict(row.load()) for row in read_rows(source)]


def jsonl_bytes(rows: list[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


# --- Kinds of sources ---------------------------------------------------------------------------------------------


def _write_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "pairs.jsonl", ROWS)


def _write_jsonl_gz(folder: Path) -> Path:
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(jsonl_bytes(ROWS)))
    return folder / "pairs.jsonl.gz"


def _write_json_array(folder: Path) -> Path:
    (folder / "pairs.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    return folder / "pairs.json"


def _write_json_array_in_capitals(folder: Path) -> Path:
    (folder / "PAIRS.JSON.GZ").write_bytes(gzip.compress(b"\xef\xbb\xbf" + b" " * 300 + json.dumps(ROWS).encode()))
    return folder / "PAIRS.JSON.GZ"


def _write_json_lines_called_json(folder: Path) -> Path:
    (folder / "pairs.json").write_bytes(jsonl_bytes(ROWS))
    return folder / "pairs.json"


def _write_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "pairs.parquet", row_group_size=3)
    return folder / "pairs.parquet"


def _write_csv(folder: Path) -> Path:
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["rejected", "prompt", "chosen"])
        writer.writeheader()
        writer.writerows(ROWS)
    return folder / "pairs.csv"


def _write_csv_gz(folder: Path) -> Path:
    (folder / "pairs.csv.gz").write_bytes(gzip.compress(_write_csv(folder).read_bytes()))
    return folder / "pairs.csv.gz"


def _save_dataset(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def _save_dataset_dict(folder: Path) -> Path:
    splits = {"test": datasets.Dataset.from_list(ROWS[:1]), "train": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


def _write_folder(folder: Path) -> Path:
    write_jsonl(folder / "set" / "train.jsonl", ROWS)
    write_jsonl(folder / "set" / "test.jsonl", ROWS[:2])
    return folder / "set"


def _write_folder_of_shards(folder: Path) -> Path:
    data = folder / "set" / "data"
    data.mkdir(parents=True)
    for i, part in enumerate((ROWS[:4], ROWS[4:5], ROWS[5:])):
        pq.write_table(pa.Table.from_pylist(part), data / f"train-0000{i}-of-00003.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), data / "train_prefs-00000-of-00001.parquet")
    (folder / "set" / "README.md").write_text("A dataset.", encoding="utf-8")
    return folder / "set"


KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "jsonl": (_write_jsonl, "jsonl"),
    "jsonl.gz": (_write_jsonl_gz, "jsonl"),
    "json array": (_write_json_array, "jsonl"),
    "JSON.GZ array": (_write_json_array_in_capitals, "jsonl"),
    "json of lines": (_write_json_lines_called_json, "jsonl"),
    "parquet": (_write_parquet, "parquet"),
    "csv": (_write_csv, "csv"),
    "csv.gz": (_write_csv_gz, "csv"),
    "saved dataset": (_save_dataset, "disk"),
    "saved dataset dict": (_save_dataset_dict, "disk"),
    "folder": (_write_folder, "jsonl"),
    "folder of shards": (_write_folder_of_shards, "parquet"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_rows_are_equal_whatever_the_source(kind: str, tmp_path: Path) -> None:
    write, format = KINDS[kind]
    source = source_of(write(tmp_path))
    assert source.format == format
    rows = list(read_rows(source))
    assert [dict(row.load()) for row in rows] == ROWS
    assert [row.number for row in rows] == list(range(10))
    assert len({row.place for row in rows}) == 10


@every_kind
@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[3:7]", ROWS[3:7]), ("train[:2]", ROWS[:2]), ("train[8:]", ROWS[8:]), ("train[9:99]", ROWS[9:])],
)
def test_range_of_rows_keeps_their_numbers(kind: str, split: str, expected: list[Any], tmp_path: Path) -> None:
    source = source_of(KINDS[kind][0](tmp_path), split=split)
    rows = list(read_rows(source))
    assert [dict(row.load()) for row in rows] == expected
    assert [row.number for row in rows] == [ROWS.index(row) for row in expected]
    assert count_rows(source) in (len(expected), None)


@every_kind
def test_count_agrees_with_reading_where_there_is_one(kind: str, tmp_path: Path) -> None:
    uncounted = {"json array", "JSON.GZ array"}
    assert count_rows(source_of(KINDS[kind][0](tmp_path))) == (None if kind in uncounted else 10)


@every_kind
@pytest.mark.parametrize("split", ["train[10:]", "train[12:20]"])
def test_range_behind_the_last_row_is_an_error_that_names_the_range(kind: str, split: str, tmp_path: Path) -> None:
    source = source_of(KINDS[kind][0](tmp_path), split=split)
    with pytest.raises(DataError, match=rf"\({re.escape(split)}\): no rows in it"):
        list(read_rows(source))
    assert count_rows(source) in (0, None)


@every_kind
def test_rows_can_be_read_again(kind: str, tmp_path: Path) -> None:
    source = source_of(KINDS[kind][0](tmp_path))
    next(read_rows(source))
    assert values(source) == values(source) == ROWS


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.parquet", "pairs.json"])
def test_source_without_rows_is_an_error(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS[:0], schema=pa.schema([("chosen", pa.string())])), file)
    else:
        file.write_bytes({"pairs.jsonl": b"\n\n", "pairs.csv": b"chosen,rejected\n", "pairs.json": b"[]"}[name])
    with pytest.raises(DataError, match=f"{name} .*no rows in it"):
        list(read_rows(source_of(file)))


def test_large_parquet_file_is_read_in_order(tmp_path: Path) -> None:
    rows = simple_rows(1000)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet", row_group_size=300)
    assert values(source_of(tmp_path / "pairs.parquet")) == rows


def test_parquet_gives_messages_back_and_leaves_other_columns_unread(tmp_path: Path) -> None:
    row = {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
    }
    pq.write_table(pa.Table.from_pylist([{**row, "score": 0.5, "chosen_model": "x"}]), tmp_path / "pairs.parquet")
    assert values(source_of(tmp_path / "pairs.parquet")) == [row]


@pytest.mark.parametrize("size", [1, 100, 256, 1000])
def test_messages_are_read_from_parquet_with_row_groups_of_any_size(tmp_path: Path, size: int) -> None:
    """Many files of the hub have groups of 1,000 rows, so a batch of rows may reach over a group's end."""
    rows = [{"chosen": [{"role": "user", "content": f"a{i}"}], "rejected": [{"role": "user"}]} for i in range(1100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet", row_group_size=size)
    found = values(source_of(tmp_path / "pairs.parquet"))
    assert [row["chosen"] for row in found] == [row["chosen"] for row in rows]


def test_renamed_columns_of_parquet_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"q": "a", "good": "b", "bad": "c", "z": "d"}]), tmp_path / "pairs.parquet")
    names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    source = source_of(tmp_path / "pairs.parquet", columns=names)
    assert values(source) == [{"q": "a", "good": "b", "bad": "c"}]


@pytest.mark.parametrize("columns", [{}, {"prompt": "qestion"}])
def test_missing_column_of_parquet_is_reported_with_all_that_are_there(columns: dict[str, str], tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"question": "a", "chosen": "b", "rejekted": "c"}])
    pq.write_table(table, tmp_path / "pairs.parquet")
    row = next(read_rows(source_of(tmp_path / "pairs.parquet", columns=columns)))
    with pytest.raises(BadRow, match="there are 'question', 'chosen', 'rejekted'"):
        to_pair(row.load(), columns, row.place)


# --- Finding the files --------------------------------------------------------------------------------------------


def test_split_of_a_folder_takes_its_numbered_files_in_order_and_no_other_splits(tmp_path: Path) -> None:
    (tmp_path / "train-00001.jsonl.gz").write_bytes(gzip.compress(jsonl_bytes(ROWS[5:])))
    (tmp_path / "train-00000.jsonl").write_bytes(jsonl_bytes(ROWS[:5]))
    for name in ("train_prefs.jsonl", "train.old.jsonl", "training.jsonl", "test.jsonl", "train.jsonl.tmp"):
        write_jsonl(tmp_path / name, [{"chosen": "not this", "rejected": "one"}])
    assert values(source_of(tmp_path)) == ROWS
    assert len(values(source_of(tmp_path, split="train_prefs"))) == 1
    assert len(values(source_of(tmp_path, split="train.old"))) == 1


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("train.jsonl", "train.jsonl.gz"), r"must hold each row once, got train\.jsonl and train\.jsonl\.gz"),
        (("train.json", "train.jsonl"), r"must hold each row once, got train\.json and train\.jsonl"),
        (("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"), "must hold all 3 files of the split, got 2"),
        (("train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"), "must hold one set of numbered files"),
        (("train-1-of-2.jsonl", "train-2-of-2.jsonl", "test-00000-of-00009.jsonl"), None),
        (("train-00000.jsonl", "train-00007.jsonl"), None),
    ],
)
def test_a_split_with_a_missing_or_a_doubled_file_is_refused(
    tmp_path: Path, names: tuple[str, ...], refused: str | None
) -> None:
    """As a download that broke off leaves it, or a file that was unpacked beside its archive."""
    for name in names:
        content = jsonl_bytes(ROWS[:2])
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ConfigError, match=rf"^data\.path: {refused}") if refused else contextlib.nullcontext():
        open_source(DataConfig(path=str(tmp_path)))
    if refused:
        tally("a split of which a file is missing or doubled", 1, outcome="2, the files named")


def test_files_of_several_formats_need_the_format_named(tmp_path: Path) -> None:
    _write_jsonl(tmp_path).rename(tmp_path / "train.jsonl")
    _write_parquet(tmp_path).rename(tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match=r"several formats for split train; set data\.format"):
        source_of(tmp_path)
    assert values(source_of(tmp_path, format="parquet")) == ROWS


def test_format_overrules_the_ending(tmp_path: Path) -> None:
    file = _write_jsonl(tmp_path).rename(tmp_path / "pairs.txt")
    with pytest.raises(ConfigError, match=r"can't tell its format; set data\.format"):
        source_of(file)
    assert values(source_of(file, format="jsonl")) == ROWS


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("missing.jsonl", {}, "no such file or folder"),
        ("./missing", {}, "no such file or folder"),
        ("a/b/c", {}, "no such file or folder"),
        ("missing", {"format": "parquet"}, "no such file or folder"),
        ("", {}, "no such file or folder"),
        (".", {"split": "validation"}, "no file of split 'validation' in it"),
        (".", {"format": "disk"}, "save_to_disk"),
        ("pairs.jsonl", {"format": "disk"}, "save_to_disk"),
        ("pairs.jsonl", {"split": "train[5]"}, "data.split: must be"),
        ("pairs.jsonl", {"split": "train[:10%]"}, "data.split: must be"),
        ("pairs.jsonl", {"split": "train[-5:]"}, "data.split: must be"),
        ("pairs.jsonl", {"split": ""}, "data.split: must be"),
        ("pairs.jsonl", {"split": "train[7:7]"}, "data.split: must hold rows"),
        ("pairs.jsonl", {"split": "train[:0]"}, "data.split: must hold rows"),
    ],
)
def test_path_or_split_that_leads_nowhere_is_refused(
    path: str, settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write_jsonl(tmp_path)
    with pytest.raises(ConfigError, match=message):
        source_of(path, **settings)


def test_split_that_a_saved_dict_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    source = source_of(_save_dataset_dict(tmp_path), split="validation")
    with pytest.raises(ConfigError, match="no split 'validation'; it has test, train"):
        list(read_rows(source))


def test_saved_data_is_known_by_its_split_and_all_that_decides_its_rows_wherever_it_lies(tmp_path: Path) -> None:
    def save(folder: str, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Path:
        splits = {name: datasets.Dataset.from_list(rows) for name, rows in (("train", train), ("test", test))}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / folder, num_shards={"train": 2, "test": 2})
        return tmp_path / folder

    rows = simple_rows(8)
    saved = save("a", rows, rows[:4])
    digests = digests_of_data(source_of(saved))
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "state.json"]
    assert sorted(digests) == [f"train/{name}" for name in names]
    assert digests_of_data(source_of(save("b", rows, rows[4:]))) == digests
    # Both splits have files of the same names.
    assert digests_of_data(source_of(save("c", rows[::-1], rows[:4]))) != digests
    state = json.loads((saved / "train" / "state.json").read_text())
    state["_fingerprint"] = "of another session"
    (saved / "train" / "state.json").write_text(json.dumps(state))
    assert digests_of_data(source_of(saved)) == digests
    # The state alone decides the order of the files.
    (saved / "train" / "state.json").write_text(json.dumps({**state, "_data_files": state["_data_files"][::-1]}))
    assert values(source_of(saved)) == rows[4:] + rows[:4]
    changed = digests_of_data(source_of(saved))
    assert [name for name in digests if changed[name] != digests[name]] == ["train/state.json"]
    assert {file.name for file in data_files(source_of(saved))} == {*names, "dataset_info.json"}


def test_digests_of_saved_data_that_an_earlier_version_recorded_are_completed() -> None:
    now = {"data-0.arrow": "a", "state.json": "s"}
    assert as_recorded({"data-0.arrow": "a"}, now) == now
    assert as_recorded({"data-0.arrow": "b", "data-1.arrow": "c"}, now) == {**now, "data-0.arrow": "b"}
    # It recorded the digest of one of the splits, and not of which.
    split = {f"train/{name}": digest for name, digest in now.items()}
    assert as_recorded({"data-0.arrow": "b"}, split) == split
    for stored, other in (({**now, "state.json": "t"}, now), ({"p.jsonl": "a"}, {"p.jsonl": "b"}), ("v1", now)):
        assert as_recorded(stored, other) == stored


def test_source_is_described_with_its_range() -> None:
    source = source_of("org/pairs")
    assert describe(source) == "org/pairs (train)"
    assert describe(dataclasses.replace(source, start=3, stop=7)) == "org/pairs (train[3:7])"
    assert describe(dataclasses.replace(source, stop=7)) == "org/pairs (train[:7])"


# --- The hub ------------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands for `datasets.load_dataset`; remembers what it was asked for."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        self.calls.append((arguments, settings))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset_is_asked_for_as_configured(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    hub = FakeHub(dataset.to_iterable_dataset() if streaming else dataset)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    source = source_of("org/pairs", name="prefs", revision="v1", split="train[3:7]", streaming=streaming)
    assert source.format == "hub"
    assert count_rows(source) is None
    assert not hub.calls
    rows = list(read_rows(source))
    assert [dict(row.load()) for row in rows] == ROWS[3:7]
    assert [row.number for row in rows] == [3, 4, 5, 6]
    assert rows[0].place == "org/pairs (train) row 3"
    assert hub.calls == [(("org/pairs", "prefs"), {"split": "train", "revision": "v1", "streaming": streaming})]


def test_hub_format_goes_past_a_folder_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "imdb" / "train.jsonl", ROWS)
    assert source_of("imdb").format == "jsonl"
    assert source_of("imdb", format="hub").format == "hub"


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (FileNotFoundError("Dataset 'org/pairs' doesn't exist on the Hub"), ConfigError),
        (ValueError('Unknown split "train"'), ConfigError),
        (ConnectionError("Couldn't reach 'org/pairs' on the Hub"), StorageError),
    ],
)
def test_hub_that_fails_is_told_from_a_name_that_it_does_not_know(
    failure: Exception, error: type[RefshardError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", FakeHub(failure))
    with pytest.raises(error, match="'org/pairs'"):
        list(read_rows(source_of("org/pairs")))


def test_stream_that_breaks_off_is_an_error_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield ROWS[0]
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", FakeHub(broken()))
    rows = read_rows(source_of("org/pairs", streaming=True))
    next(rows)
    with pytest.raises(StorageError, match=r"org/pairs: the stream broke off \(connection reset\)"):
        next(rows)


def test_held_out_set_takes_from_the_training_set_what_it_leaves_out() -> None:
    held_out = {"held": EvalSetConfig(split="test[:5]")}
    data = DataConfig(path="org/pairs", name="prefs", revision="v1", columns={"prompt": "q"}, eval=held_out)
    source = open_source(data, "held")
    assert (source.path, source.name, source.revision) == ("org/pairs", "prefs", "v1")
    assert (source.split, source.start, source.stop, source.columns) == ("test", 0, 5, {"prompt": "q"})


def test_held_out_set_of_another_repository_does_not_take_the_revision() -> None:
    data = DataConfig(path="org/pairs", revision="v1", eval={"held": EvalSetConfig(path="org/others")})
    assert open_source(data, "held").revision is None


# --- Any text, any range ------------------------------------------------------------------------------------------

_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    rows=st.lists(st.fixed_dictionaries({"chosen": _TEXTS, "rejected": _TEXTS}), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 6), max_size=3),
    ending=st.sampled_from(["jsonl", "jsonl.gz", "json", "parquet", "csv"]),
)
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back_and_ranges_make_up_the_whole(
    rows: list[dict[str, str]], cuts: list[int], ending: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"pairs.{ending}"
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        elif ending == "csv":
            with file.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, ["chosen", "rejected"], quoting=csv.QUOTE_ALL)
                writer.writeheader()
                writer.writerows(rows)
        else:
            content = json.dumps(rows).encode() if ending == "json" else jsonl_bytes(rows)
            file.write_bytes(gzip.compress(content) if ending == "jsonl.gz" else content)
        assert values(source_of(file)) == rows
        edges = sorted({0, *(cut for cut in cuts if cut < len(rows)), len(rows)})
        parts = [values(source_of(file, split=f"train[{a}:{b}]")) for a, b in itertools.pairwise(edges)]
        assert [row for part in parts for row in part] == rows


# --- Decoding is put off ------------------------------------------------------------------------------------------

BROKEN_LINES = [b"{", b"\xff", b"[1]", b'{"chosen": 1, "chosen": 2}', b"\x00", b"[" * 100_000, b"nope"]


@pytest.mark.parametrize("line", BROKEN_LINES, ids=[repr(line[:20]) for line in BROKEN_LINES])
def test_broken_line_raises_only_when_it_is_loaded(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(jsonl_bytes(ROWS[:1]) + line + b"\n" + jsonl_bytes(ROWS[1:2]))
    rows = list(read_rows(source_of(file)))
    assert [dict(rows[0].load()), dict(rows[2].load())] == ROWS[:2]
    assert count_rows(source_of(file)) == 3
    with pytest.raises(BadRow, match=r"pairs\.jsonl:2: "):
        rows[1].load()


def test_range_skips_broken_lines_without_looking_at_them(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(b"{\n" * 3 + jsonl_bytes(ROWS[:2]))
    assert values(source_of(tmp_path / "pairs.jsonl", split="train[3:]")) == ROWS[:2]


def test_saved_dataset_is_not_decoded_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(_save_dataset(tmp_path))
    fetched: list[Any] = []
    fetch = datasets.Dataset.__getitem__
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda self, key: fetched.append(key) or fetch(self, key))
    rows = list(read_rows(source))
    assert fetched == []
    rows[4].load()
    assert fetched == [4]


# --- What is accepted ---------------------------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"
ACCEPTED = {
    "BOM": BOM + jsonl_bytes(ROWS),
    "CRLF": jsonl_bytes(ROWS, "\r\n"),
    "blank lines": b"\n \n" + b"\n\t\r\n".join(jsonl_bytes([row]) for row in ROWS) + b"\n\n",
    "BOM before a blank line": BOM + b"\r\n" + jsonl_bytes(ROWS),
    "no final newline": jsonl_bytes(ROWS)[:-1],
    "space around": b" \t" + jsonl_bytes(ROWS, " \n\t "),
}


@pytest.mark.parametrize("content", ACCEPTED.values(), ids=ACCEPTED)
def test_untidy_json_lines_are_accepted(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(content)
    assert values(source_of(tmp_path / "pairs.jsonl")) == ROWS
    assert count_rows(source_of(tmp_path / "pairs.jsonl")) == 10


def test_numbers_that_json_does_not_know_are_accepted_in_other_columns(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "a b", "rejected": "a c", "score": NaN, "low": -Infinity}\n')
    row = next(read_rows(source_of(tmp_path / "pairs.jsonl")))
    assert to_pair(row.load(), {}, row.place).prompt == "a"


CSV_ROWS = [{"chosen": "a\nb", "rejected": 'c "d"'}, {"chosen": "é", "rejected": ""}]
CSV_TEXT = 'chosen,rejected\n"a\nb","c ""d"""\né,\n'
ACCEPTED_CSV = {
    "plain": CSV_TEXT.encode(),
    "BOM": BOM + CSV_TEXT.encode(),
    "no final newline": CSV_TEXT.rstrip("\n").encode(),
    "blank lines": b"\n\r\n" + CSV_TEXT.replace('"""\n', '"""\n\n\n').encode() + b"\n",
    "CRLF between rows": CSV_TEXT.replace("rejected\n", "rejected\r\n").replace('"""\n', '"""\r\n').encode(),
    "CR between rows": CSV_TEXT.replace("rejected\n", "rejected\r").replace('"""\n', '"""\r').encode(),
}


@pytest.mark.parametrize("content", ACCEPTED_CSV.values(), ids=ACCEPTED_CSV)
def test_untidy_csv_is_accepted(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_bytes(content)
    assert values(source_of(tmp_path / "pairs.csv")) == CSV_ROWS


def test_csv_rows_stand_where_they_begin(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text('chosen,rejected\n"a\n\nb",c\n\nd,e\n')
    assert [row.place.rpartition(":")[2] for row in read_rows(source_of(tmp_path / "pairs.csv"))] == ["2", "6"]


# --- What is refused ----------------------------------------------------------------------------------------------

PAIR = '{"chosen": "a b", "rejected": "a c"}\n'
BAD_ROWS: dict[str, tuple[str, bytes, str, str]] = {
    "not UTF-8": ("p.jsonl", b'{"chosen": "\xe9"}\n', "not_utf8", r"p\.jsonl:2: not UTF-8 at byte 13 of the line$"),
    "not JSON": ("p.jsonl", b'{"chosen": }\n', "not_json", r"p\.jsonl:2: not JSON at column 12"),
    "cut off": ("p.jsonl", b'{"chosen": "a', "not_json", r"p\.jsonl:2: not JSON"),
    "Python": ("p.jsonl", b"{'chosen': 'a'}\n", "not_json", r"p\.jsonl:2: not JSON"),
    "no object": ("p.jsonl", b'"chosen"\n', "not_json", r"p\.jsonl:2: must be a JSON object, got text"),
    "null": ("p.jsonl", b"null\n", "not_json", r"p\.jsonl:2: must be a JSON object, got null"),
    "key twice": ("p.jsonl", b'{"chosen": 1, "chosen": 1}\n', "not_json", r"p\.jsonl:2: .*'chosen' is repeated"),
    "inner key twice": (
        "p.jsonl",
        b'{"chosen": [{"role": "a", "role": "b"}]}\n',
        "not_json",
        r"p\.jsonl:2: .*'role' is repeated",
    ),
    "huge number": ("p.jsonl", b'{"id": ' + b"1" * 5000 + b"}\n", "not_json", r"p\.jsonl:2: not usable JSON"),
    "too deep": ("p.jsonl", b"[" * 100_000 + b"\n", "not_json", r"p\.jsonl:2: not usable JSON"),
    "too few cells": ("p.csv", b"a\n", "not_csv", r"p\.csv:2: 1 cells where the header names 2 columns"),
    "too many cells": ("p.csv", b"a,b,c\n", "not_csv", r"p\.csv:2: 3 cells where the header names 2 columns"),
    "CSV not UTF-8": ("p.csv", b"\xe9,b\n", "not_utf8", r"p\.csv:2: not UTF-8; save the file as UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "reason", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_named_by_file_and_line(
    name: str, content: bytes, reason: str, message: str, tmp_path: Path
) -> None:
    before = b"chosen,rejected\n" if name == "p.csv" else PAIR.encode()
    after = b"a b,a c\n" if name == "p.csv" else PAIR.encode()
    (tmp_path / name).write_bytes(before + content + (after if content.endswith(b"\n") else b""))
    rows = list(read_rows(source_of(tmp_path / name)))
    if content.endswith(b"\n"):
        assert rows[-1].load() == {"chosen": "a b", "rejected": "a c"}
    with pytest.raises(BadRow, match=message) as caught:
        for row in rows:
            row.load()
    assert caught.value.reason == reason


def test_half_a_surrogate_pair_in_json_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(PAIR + PAIR.replace("a c", "a \\ud83d"))
    rows = list(read_rows(source_of(tmp_path / "p.jsonl")))
    to_pair(rows[0].load(), {}, rows[0].place)
    with pytest.raises(BadRow, match=r"p\.jsonl:2: rejected holds half a surrogate pair") as caught:
        to_pair(rows[1].load(), {}, rows[1].place)
    assert caught.value.reason == "not_utf8"


def test_utf_16_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(PAIR.encode("utf-16"))
    with pytest.raises(BadRow, match=r"p\.jsonl:1: .*looks like UTF-16, save it as UTF-8"):
        next(read_rows(source_of(tmp_path / "p.jsonl"))).load()


def test_parquet_text_that_is_not_utf_8_is_a_bad_row(tmp_path: Path) -> None:
    text = pa.array([b"a b", b"a \xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"chosen": text, "rejected": ["a c", "a d"]}), tmp_path / "p.parquet")
    rows = list(read_rows(source_of(tmp_path / "p.parquet")))
    assert rows[0].load() == {"chosen": "a b", "rejected": "a c"}
    with pytest.raises(BadRow, match=r"p\.parquet row 1: .* not UTF-8") as caught:
        rows[1].load()
    assert caught.value.reason == "not_utf8"


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


LINES = gzip.compress(jsonl_bytes(simple_rows(200)), mtime=0)
ARRAY = gzip.compress(json.dumps(simple_rows(200)).encode(), mtime=0)
TABLE = gzip.compress(b"chosen,rejected\n" + b"a b,a c\n" * 200, mtime=0)
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "gzip of lines, cut": ("p.jsonl.gz", LINES[:-20], "damaged gzip file"),
    "gzip of lines, cut to its header": ("p.jsonl.gz", LINES[:12], "damaged gzip file"),
    "gzip of lines, wrong checksum": ("p.jsonl.gz", _flip(LINES, -6), "damaged gzip file"),
    # 7 opens a deflate block of a type that does not exist.
    "gzip of lines, damaged": ("p.jsonl.gz", LINES[:10] + b"\x07" + LINES[11:], "damaged gzip file"),
    "lines called gzip": ("p.jsonl.gz", PAIR.encode(), "damaged gzip file"),
    "gzip of an array, cut": ("p.json.gz", ARRAY[:-20], "damaged gzip file"),
    "gzip of an array, cut to its header": ("p.json.gz", ARRAY[:12], "damaged gzip file"),
    "array called gzip": ("p.json.gz", b"[]", "damaged gzip file"),
    "gzip of CSV, damaged": ("p.csv.gz", TABLE[:10] + b"\x07" + TABLE[11:], "damaged gzip file"),
    "gzip of CSV, cut": ("p.csv.gz", TABLE[:-9], "damaged gzip file"),
    "gzip of CSV, wrong checksum": ("p.csv.gz", _flip(TABLE, -6), "damaged gzip file"),
    "CSV called gzip": ("p.csv.gz", b"chosen,rejected\n", "damaged gzip file"),
    "array, cut": ("p.json", b'[{"chosen": "a"}, {', "not usable as a JSON array"),
    "array, not UTF-8": ("p.json", b'[{"chosen": "\xff"}]', "not usable as a JSON array"),
    "array of UTF-16": ("p.json", "[]".encode("utf-16"), r"p\.json:1: .*looks like UTF-16"),
    "array, key twice": ("p.json", b'[{"chosen": 1, "chosen": 2}]', "'chosen' is repeated"),
    "CSV, open quote": ("p.csv", b'chosen,rejected\na,b\n"c,d\n', r"p\.csv:3: not CSV"),
    "CSV, text after a quote": ("p.csv", b'chosen,rejected\n"a"b,c\n', r"p\.csv:2: not CSV"),
    "CSV, column twice": ("p.csv", b"chosen,rejected,chosen\na,b,c\n", r"p\.csv:1: .* a column twice"),
    "CSV of UTF-16": ("p.csv", "chosen,rejected\na,b\n".encode("utf-16"), r"p\.csv:1: .*not UTF-8"),
    "CSV of UTF-16 without a mark": ("p.csv", "chosen,rejected\na,b\n".encode("utf-16-be"), r"p\.csv:1: .*not UTF-8"),
    "no Parquet": ("p.parquet", b"PAR1 no", "not a readable Parquet file"),
    "empty Parquet": ("p.parquet", b"", "not a readable Parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        for row in read_rows(source_of(tmp_path / name)):
            row.load()
    assert str(tmp_path / name) in str(caught.value)


def test_cut_parquet_file_is_named(tmp_path: Path) -> None:
    file = _write_parquet(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"pairs\.parquet: not a readable Parquet file"):
        list(read_rows(source_of(file)))
    with pytest.raises(DataError, match=r"pairs\.parquet: not a readable Parquet file"):
        count_rows(source_of(file))


def test_parquet_file_damaged_within_is_named_with_the_rows_before(tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(simple_rows(600)), file, row_group_size=300, use_dictionary=False)
    second = pq.ParquetFile(file).metadata.row_group(1).column(0)
    content = file.read_bytes()
    start, end = second.data_page_offset, second.data_page_offset + second.total_compressed_size
    file.write_bytes(content[:start] + b"\xff" * (end - start) + content[end:])
    read: list[Row] = []
    with pytest.raises(DataError, match=r"pairs\.parquet: damaged after row \d+") as caught:
        read.extend(read_rows(source_of(file)))
    assert f"damaged after row {len(read)} " in str(caught.value)
    assert 0 < len(read) <= 300


def test_gzip_cut_in_its_middle_gives_the_rows_before_the_cut(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(LINES[: len(LINES) // 2])
    read: list[dict[str, Any]] = []
    with pytest.raises(DataError, match="damaged gzip file"):
        read.extend(dict(row.load()) for row in read_rows(source_of(tmp_path / "p.jsonl.gz")))
    assert 0 < len(read) < 200
    assert read == simple_rows(len(read))


@pytest.mark.parametrize("content", ["{", '{"_data_files": [{}]}', '{"_data_files": 3}'])
def test_a_saved_dataset_whose_state_is_damaged_has_no_digests(content: str, tmp_path: Path) -> None:
    folder = _save_dataset(tmp_path)
    state = (folder / "state.json").read_text()
    (folder / "state.json").write_text(content)
    with pytest.raises(DataError, match=rf"{folder}: not a readable save_to_disk folder"):
        digests_of_data(source_of(folder))
    (folder / "state.json").write_text(state)
    (folder / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"no file data-00000-of-00002\.arrow in it"):
        digests_of_data(source_of(folder))


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "data-00000-of-00002.arrow"])
def test_damaged_saved_dataset_is_named(name: str, tmp_path: Path) -> None:
    folder = _save_dataset(tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 3])
    with pytest.raises(DataError, match=rf"{folder}: not a readable save_to_disk folder"):
        values(source_of(folder))


def test_file_that_can_not_be_read_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(_write_jsonl(tmp_path))

    def refuse(file: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(readers, "open_file", refuse)
    with pytest.raises(StorageError, match=r"pairs\.jsonl: can't be read \(Permission denied\)"):
        list(read_rows(source))


def test_a_set_is_opened_by_its_name_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", simple_rows(4))
    data = DataConfig(path=str(tmp_path / "pairs.jsonl"), eval={"held": EvalSetConfig(split="train[2:]")})
    assert [[row.number for row in read_rows(open_source(data, name))] for name in ("train", "held")] == [
        [0, 1, 2, 3],
        [2, 3],
    ]
    for find in (open_source, DataConfig.of):
        with pytest.raises(ConfigError, match=r"^--set x: data\.eval names no such set; there are train, held$"):
            find(data, "x")
