"""The shard store: what is written is read back, and nothing damaged, foreign or half-done is ever taken for a part."""

import dataclasses
import hashlib
import io
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import (
    BadRow,
    ConfigError,
    DataError,
    IdentityError,
    RefshardError,
    StorageError,
    UnfinishedError,
)
from pipeline.base.folders import LocalFolder
from pipeline.data.intake import Ledger, Outcome
from pipeline.data.rows import Row
from pipeline.scoring.agreement import NoiseFloor
from pipeline.store import format
from pipeline.store.finishing import delete_foreign, finish_store, reopen_store
from pipeline.store.format import ForeignPartError, ScoredPair, SummedPair, part_name, schema, sealed
from pipeline.store.store import (
    PartHeader,
    Store,
    create_store,
    delete_store,
    is_finished,
    load_store,
    open_store,
    part_exists,
    read_part,
    read_parts,
    write_part,
)
from support.stores import DECLARED, IDENTITY, forge_part

# Schema version 1 is a public format: what other programs read.
COLUMNS = {
    "pair_key": "fixed_size_binary[16]",
    "row": "int64",
    "prompt_tokens": "int32",
    "chosen_tokens": "int32",
    "rejected_tokens": "int32",
    "ref_chosen_logps": "float",
    "ref_rejected_logps": "float",
}
TOKEN_COLUMNS = {
    "chosen_token_logps": "list<element: float not null>",
    "rejected_token_logps": "list<element: float not null>",
}

SUMS_ALONE = {**IDENTITY, "tokenization": {**IDENTITY["tokenization"], "token_logps": False}}
PLAN = {"rows_per_shard": 3, "on_identical": "keep", "dataset": {"pairs.jsonl": "d" * 64}, "columns": {}}


def scored(row: int, chosen: Sequence[float] = (-1.5, -0.25), rejected: Sequence[float] = (-2.0,)) -> ScoredPair:
    return ScoredPair(
        key=hashlib.blake2b(b"%d" % row, digest_size=16).digest(),
        row=row,
        prompt_tokens=4 + row,
        chosen_token_logps=np.array(chosen, np.float32),
        rejected_token_logps=np.array(rejected, np.float32),
    )


def summed(row: int, chosen: float = -1.75, rejected: float = -2.0, chosen_tokens: int = 2) -> SummedPair:
    return SummedPair(
        key=hashlib.blake2b(b"%d" % row, digest_size=16).digest(),
        row=row,
        prompt_tokens=4 + row,
        chosen_tokens=chosen_tokens,
        rejected_tokens=1,
        chosen_logps=chosen,
        rejected_logps=rejected,
    )


def put_part(
    folder: Path,
    unit: int,
    pairs: Sequence[ScoredPair] | Sequence[SummedPair],
    header: PartHeader,
    *,
    ledger: Ledger | None = None,
    noise: NoiseFloor | None = None,
) -> bool:
    header = dataclasses.replace(header, provenance={"device": "cpu"})
    return write_part(folder, unit, pairs, ledger or Ledger(rows=len(pairs), kept=len(pairs)), noise, header=header)


def make_store(
    folder: Path, units: int = 3, *, seed: int = 0, identity: Mapping[str, Any] = IDENTITY, finish: bool = True
) -> PartHeader:
    """A store of random log-probs, three pairs to a unit. Gives what its parts carry."""
    header = create_store(folder, identity, PLAN, DECLARED)
    random = np.random.default_rng(seed)
    for unit in range(units):
        rows = range(3 * unit, 3 * unit + 3)
        pairs = [scored(row, -random.exponential(size=row + 1), -random.exponential(size=5)) for row in rows]
        put_part(folder, unit, pairs, header)
    if finish:
        assert finish_store(folder, units) == []
    return header


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_store(tmp_path / "train")
    return tmp_path / "train"


def rewrite_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a manifest or index as one who means it: with the digest of what it says now."""
    content = json.loads(file.read_text())
    change(content)
    content.pop("sha256", None)
    file.write_bytes(sealed(content))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_schema_is_the_published_one() -> None:
    for token_logps, columns in ((False, COLUMNS), (True, {**COLUMNS, **TOKEN_COLUMNS})):
        found = schema(token_logps=token_logps)
        assert {field.name: str(field.type) for field in found} == columns
        assert found.names == list(columns)
        assert not any(field.nullable for field in found)


def test_plain_pyarrow_reads_the_documented_columns(folder: Path) -> None:
    table = pq.read_table(folder / "part-00001.parquet")
    rows = table.to_pylist()
    assert table.column_names == [*COLUMNS, *TOKEN_COLUMNS]

    assert [row["row"] for row in rows] == [3, 4, 5]
    assert [row["pair_key"] for row in rows] == [scored(row).key for row in (3, 4, 5)]
    assert [len(row["chosen_token_logps"]) for row in rows] == [row["chosen_tokens"] for row in rows] == [4, 5, 6]
    assert table.schema.metadata[b"refshard.unit"] == b"1"
    assert rows[0]["ref_chosen_logps"] == pytest.approx(sum(rows[0]["chosen_token_logps"]), rel=1e-6)


_logps = st.lists(st.floats(-1e4, 0, width=32), min_size=1, max_size=40)


@given(
    pairs=st.lists(
        st.tuples(
            st.binary(min_size=16, max_size=16), st.integers(0, 2**62), st.integers(1, 2**31 - 1), _logps, _logps
        ),
        max_size=6,
    ),
    token_logps=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_read_back(
    pairs: list[tuple[bytes, int, int, list[float], list[float]]], token_logps: bool
) -> None:
    given_pairs = [
        ScoredPair(
            key=key,
            row=row,
            prompt_tokens=prompt,
            chosen_token_logps=np.array(chosen, np.float32),
            rejected_token_logps=np.array(rejected, np.float32),
        )
        for key, row, prompt, chosen, rejected in pairs
    ]
    with tempfile.TemporaryDirectory() as name:
        header = create_store(Path(name), IDENTITY if token_logps else SUMS_ALONE, PLAN, DECLARED)
        put_part(Path(name), 0, given_pairs, header)
        finish_store(Path(name), 1)
        table = read_part(open_store(Path(name)), 0)
    assert table.schema.equals(schema(token_logps=token_logps))
    assert table.num_rows == len(pairs)
    for found, pair in zip(table.to_pylist(), given_pairs, strict=True):
        assert (found["pair_key"], found["row"], found["prompt_tokens"]) == (pair.key, pair.row, pair.prompt_tokens)
        for side, values in (("chosen", pair.chosen_token_logps), ("rejected", pair.rejected_token_logps)):
            assert found[f"{side}_tokens"] == len(values)
            assert found[f"ref_{side}_logps"] == np.float32(values.astype(np.float64).sum())
            if token_logps:
                assert found[f"{side}_token_logps"] == values.tolist()


def test_sums_are_added_in_float64_and_rounded_once(tmp_path: Path) -> None:
    # In float32 the many small terms vanish beside the large one.
    values = np.array([-(2.0**24), *[-0.5] * 1001], np.float32)
    header = create_store(tmp_path, IDENTITY, PLAN, DECLARED)
    put_part(tmp_path, 0, [scored(0, values, values[::-1])], header)
    row = pq.read_table(tmp_path / part_name(0)).to_pylist()[0]
    assert row["ref_chosen_logps"] == row["ref_rejected_logps"] == np.float32(-(2.0**24) - 500.5)
    assert row["ref_chosen_logps"] != values.cumsum(dtype=np.float32)[-1]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "values",
    [[], [-1.0, float("nan")], [float("-inf")], [float("inf"), -1.0]],
    ids=["none", "nan", "minus infinity", "infinity"],
)
def test_a_log_prob_that_is_missing_or_not_finite_is_never_written(
    tmp_path: Path, side: str, values: list[float]
) -> None:
    header = create_store(tmp_path, IDENTITY, PLAN, DECLARED)
    bad = scored(7, **{side: values})
    with pytest.raises(DataError, match=f"row 7: a {side} log-prob is missing or not finite"):
        put_part(tmp_path, 0, [scored(6), bad], header)
    assert set(contents(tmp_path)) == {"manifest.json"}


def test_a_sum_that_overflows_float32_is_never_written(tmp_path: Path) -> None:
    header = create_store(tmp_path, IDENTITY, PLAN, DECLARED)
    with pytest.raises(DataError, match="row 7"):
        put_part(tmp_path, 0, [scored(7, chosen=[-3e38, -3e38])], header)
    assert set(contents(tmp_path)) == {"manifest.json"}


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_store(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_second_writer_of_a_unit_discards_its_own(folder: Path) -> None:
    before = contents(folder)
    header = create_store(folder, IDENTITY, PLAN, DECLARED)
    assert put_part(folder, 1, [scored(3, chosen=[-9.0])], header) is False
    assert contents(folder) == before


def test_a_unit_whose_every_row_was_dropped_has_an_empty_part(tmp_path: Path) -> None:
    header = create_store(tmp_path, IDENTITY, PLAN, DECLARED)
    put_part(tmp_path, 0, [], header, ledger=Ledger(rows=3, dropped=Counter(prompt_too_long=3)))
    put_part(tmp_path, 1, [scored(3)], header)
    finish_store(tmp_path, 2)
    store = open_store(tmp_path)
    assert [table.num_rows for table in read_parts(store)] == [0, 1]
    assert store.index["totals"] == {"rows": 4, "kept": 1, "dropped": {"prompt_too_long": 3}, "noted": {}}


def test_the_index_adds_up_its_parts_and_lists_what_was_skipped(tmp_path: Path) -> None:
    header = create_store(tmp_path, IDENTITY, PLAN, DECLARED)
    skipped = [{"row": 2, "place": "é.jsonl:3", "reason": "not_json", "message": "half a pair \ud800"}]
    ledger = Ledger(rows=3, kept=2, dropped=Counter(not_json=1), noted=Counter(identical=1), skipped=skipped)
    put_part(tmp_path, 0, [scored(0), scored(1)], header, ledger=ledger)
    put_part(tmp_path, 1, [scored(3)], header)
    finish_store(tmp_path, 2)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["totals"] == {"rows": 4, "kept": 3, "dropped": {"not_json": 1}, "noted": {"identical": 1}}
    assert [(part["file"], part["rows"]) for part in index["parts"]] == [(part_name(0), 2), (part_name(1), 1)]
    for part in index["parts"]:
        content = (tmp_path / part["file"]).read_bytes()
        assert (part["bytes"], part["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    (line,) = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["place"] == "é.jsonl:3"


# Rows of which only the sums are known.


def test_no_skipped_row_makes_a_footer_that_readers_refuse(tmp_path: Path) -> None:
    ledger = Ledger()
    for row in range(9000):
        place = "folder/" * 500 + f"pairs.jsonl:{row}"
        error = BadRow("missing_column", f"{place}: no column 'chosen'; there are {'x' * 9000}. Rename it")
        ledger.take(Outcome(row=Row(row, place, dict), dropped=error.reason, error=error))
    assert max(len(entry["message"]) for entry in ledger.skipped) <= 2000
    assert ledger.skipped[0]["message"].endswith("Rename it")
    write_part(tmp_path, 0, [], ledger, header=create_store(tmp_path, IDENTITY, {}, {}))
    assert finish_store(tmp_path, 1) == []
    footer = pq.read_schema(tmp_path / part_name(0)).metadata
    assert 2000 < len(json.loads(footer[b"refshard.skipped"])) < 9000
    assert open_store(tmp_path).index["totals"]["dropped"] == {"missing_column": 9000}


def test_rows_that_were_skipped_are_listed_up_to_what_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format, "MOST_SKIPPED", 100)
    header = create_store(tmp_path, IDENTITY, {}, {})
    for unit in range(3):
        skipped = [{"row": unit, "place": "p" * 80, "reason": "not_json", "message": ""}]
        write_part(tmp_path, unit, [], Ledger(rows=1, dropped=Counter(not_json=1), skipped=skipped), header=header)
    assert finish_store(tmp_path, 3) == []
    assert [json.loads(line)["row"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [0]
    assert open_store(tmp_path).index["totals"]["dropped"] == {"not_json": 3}


def test_sums_alone_make_the_same_part_as_the_tokens_that_they_sum(tmp_path: Path) -> None:
    for name, pair in (("summed", summed), ("scored", scored)):
        header = create_store(tmp_path / name, SUMS_ALONE, PLAN, DECLARED)
        put_part(tmp_path / name, 0, [pair(row) for row in range(3)], header)
        assert finish_store(tmp_path / name, 1) == []
    assert contents(tmp_path / "summed") == contents(tmp_path / "scored")
    (table,) = read_parts(open_store(tmp_path / "summed"))
    assert table.column_names == list(COLUMNS)
    assert table["ref_chosen_logps"].to_pylist() == [-1.75] * 3
    assert table["chosen_tokens"].to_pylist() == [2] * 3


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1e39])
def test_a_sum_that_is_no_float32_number_is_never_written(tmp_path: Path, value: float) -> None:
    header = create_store(tmp_path, SUMS_ALONE, PLAN, DECLARED)
    for bad in (summed(7, chosen=value), summed(7, rejected=value), summed(7, chosen_tokens=0)):
        with pytest.raises(DataError, match=r"row 7: a (chosen|rejected) log-prob is missing or not finite"):
            put_part(tmp_path, 0, [summed(6), bad], header)
    assert set(contents(tmp_path)) == {"manifest.json"}


# The noise floor.

_floors = st.lists(st.floats(0, 10, allow_subnormal=False), max_size=6)


@given(parts=st.lists(_floors, max_size=5))
@settings(max_examples=60, deadline=None)
def test_noise_floors_of_parts_add_up_to_that_of_all_tokens(parts: list[list[float]]) -> None:
    def floor(gaps: list[float]) -> NoiseFloor:
        return NoiseFloor(tokens=len(gaps), mean=sum(gaps) / len(gaps), largest=max(gaps)) if gaps else NoiseFloor()

    total = sum(map(floor, parts), NoiseFloor())
    expected = floor([gap for gaps in parts for gap in gaps])
    assert (total.tokens, total.largest) == (expected.tokens, expected.largest)
    assert total.mean == pytest.approx(expected.mean)


def test_the_footer_has_a_parts_noise_and_the_index_that_of_all(tmp_path: Path) -> None:
    header = create_store(tmp_path, IDENTITY, PLAN, DECLARED)
    floors = [NoiseFloor(tokens=3, mean=0.5, largest=1.0), None, NoiseFloor(tokens=1, mean=0.25, largest=0.25)]
    for unit, noise in enumerate(floors):
        put_part(tmp_path, unit, [scored(unit)], header, noise=noise)
    footers = [pq.read_schema(tmp_path / part_name(unit)).metadata[b"refshard.noise"] for unit in range(3)]
    nothing = {"tokens": 0, "mean": 0.0, "largest": 0.0}
    assert [json.loads(footer) for footer in footers] == [
        {"tokens": 3, "mean": 0.5, "largest": 1.0},
        nothing,
        {"tokens": 1, "mean": 0.25, "largest": 0.25},
    ]
    assert finish_store(tmp_path, 3) == []
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["noise"] == {"tokens": 4, "mean": pytest.approx(0.4375), "largest": 1.0}
    assert vars(open_store(tmp_path).noise) == index["noise"]


def test_a_store_of_which_nothing_was_scored_twice_has_a_floor_of_no_tokens(folder: Path) -> None:
    assert open_store(folder).noise == NoiseFloor()


@pytest.mark.parametrize("footer", [None, b"{", b"[]", b'{"tokens": 1}x', b'{"token": 1}'])
def test_a_footer_without_its_noise_stops_the_index(tmp_path: Path, footer: bytes | None) -> None:
    make_store(tmp_path, 1, finish=False)
    table = pq.read_table(tmp_path / part_name(0))
    metadata = {k: v for k, v in table.schema.metadata.items() if k != b"refshard.noise"}
    if footer is not None:
        metadata[b"refshard.noise"] = footer
    forge_part(tmp_path / part_name(0), table.replace_schema_metadata(metadata))
    with pytest.raises(DataError, match=r"part-00000\.parquet: its footer: .*\. Delete this part"):
        finish_store(tmp_path, 1)


def test_only_the_columns_asked_for_are_read_part_by_part(folder: Path) -> None:
    tables = list(read_parts(open_store(folder), ["row", "pair_key"]))
    assert [table.column_names for table in tables] == [["row", "pair_key"]] * 3
    assert [table["row"].to_pylist() for table in tables] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


# Unfinished stores and other people's files.


def test_a_store_without_its_index_is_unfinished_not_empty(tmp_path: Path) -> None:
    make_store(tmp_path, 2, finish=False)
    assert not is_finished(tmp_path)
    with pytest.raises(UnfinishedError, match="2 parts so far and no index") as caught:
        open_store(tmp_path)
    assert caught.value.exit_status == 75


def test_finishing_tells_the_missing_units_and_writes_no_index(tmp_path: Path) -> None:
    header = make_store(tmp_path, 1, finish=False)
    put_part(tmp_path, 3, [scored(9)], header)
    assert finish_store(tmp_path, 5) == [1, 2, 4]
    assert not is_finished(tmp_path)


def test_a_folder_without_a_store_is_a_data_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="no shards there"):
            open_store(folder)


def test_a_file_under_a_temporary_name_is_never_read(tmp_path: Path) -> None:
    header = make_store(tmp_path, 2, finish=False)
    part = (tmp_path / part_name(1)).rename(tmp_path / ".tmp-0123")
    assert not part_exists(tmp_path, 1)
    assert finish_store(tmp_path, 2) == [1]
    put_part(tmp_path, 1, [scored(3)], header)
    assert finish_store(tmp_path, 2) == []
    part.write_bytes(b"torn")
    assert [table.num_rows for table in read_parts(open_store(tmp_path))] == [3, 1]


def test_deleting_a_store_leaves_what_is_not_the_stores(folder: Path) -> None:
    (folder / "skipped.jsonl").write_text("{}")
    others = ["notes.txt", "part-00000-0f3a.snappy.parquet", "part-0.parquet", "part-x.parquet", "data.parquet"]
    for name in others:
        (folder / name).write_bytes(b"somebody's")
    (folder / "deeper").mkdir()
    (folder / "deeper" / part_name(0)).write_bytes(b"somebody's")
    delete_store(folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted([*others, "deeper"])
    assert (folder / "deeper" / part_name(0)).exists()
    delete_store(folder)
    delete_store(folder / "missing")


def test_a_deletion_cut_short_leaves_an_unfinished_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink, left = Path.unlink, [2]

    def cut_short(file: Path, missing_ok: bool = False) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise PermissionError(13, "Permission denied")
        unlink(file, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", cut_short)
    with pytest.raises(StorageError, match="can't be deleted"):
        delete_store(folder)
    monkeypatch.undo()
    with pytest.raises(UnfinishedError):
        open_store(folder)


# Whose store it is.


def test_the_same_run_goes_on_with_its_store(folder: Path) -> None:
    before = contents(folder)
    again = create_store(folder, IDENTITY, PLAN, {"reference": "moved/elsewhere"})
    assert again.fingerprint == open_store(folder).fingerprint
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("identity", "plan", "named"),
    [
        (
            {**IDENTITY, "reference": {**IDENTITY["reference"], "weights": "b" * 64}},
            PLAN,
            "reference.weights: shards aaaaaaaaaaaa, this run bbbbbbbbbbbb",
        ),
        (
            {**IDENTITY, "reference": {**IDENTITY["reference"], "adapter": "x"}},
            PLAN,
            "reference.adapter: shards none, this run x",
        ),
        (
            {**IDENTITY, "tokenization": {**IDENTITY["tokenization"], "max_length": 32}},
            PLAN,
            "tokenization.max_length: shards 64, this run 32",
        ),
        (IDENTITY, {**PLAN, "rows_per_shard": 4}, "rows_per_shard: shards 3, this run 4"),
        (IDENTITY, {**PLAN, "columns": {"prompt": "q"}}, "columns.prompt: shards none, this run q"),
        (IDENTITY, {**PLAN, "new": 1}, "new: shards none, this run 1"),
    ],
    ids=["weights", "adapter", "max_length", "rows_per_shard", "columns", "new field"],
)
def test_another_runs_store_is_refused_and_the_field_named(
    folder: Path, identity: Mapping[str, Any], plan: Mapping[str, Any], named: str
) -> None:
    before = contents(folder)
    with pytest.raises(IdentityError) as caught:
        create_store(folder, identity, plan, DECLARED)
    assert caught.value.exit_status == 78
    assert named in str(caught.value)
    assert str(folder) in str(caught.value)
    assert contents(folder) == before


def test_another_programs_files_are_not_deleted(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "manifest.json").write_text('{"parts": ["part-00000.parquet"]}')
    with pytest.raises(ConfigError, match="must delete a store of refshard, got"):
        delete_store(other)
    (other / "manifest.json").unlink()
    delete_store(other)
    assert len(list(other.glob("part-*"))) == 3
    delete_store(folder)
    assert not list(folder.iterdir())


def test_a_plan_is_compared_as_json_gives_it_back(folder: Path) -> None:
    create_store(folder.parent / "other", IDENTITY, {**PLAN, "pair": (1, 2)}, DECLARED)
    create_store(folder.parent / "other", IDENTITY, {**PLAN, "pair": (1, 2)}, DECLARED)


def test_an_output_that_cannot_be_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "train"):
        with pytest.raises(StorageError, match="can't be made"):
            create_store(folder, IDENTITY, PLAN, DECLARED)


def test_a_part_of_another_run_is_refused(tmp_path: Path) -> None:
    other = {**IDENTITY, "reference": {**IDENTITY["reference"], "weights": "b" * 64}}
    make_store(tmp_path / "other", identity=other)
    make_store(tmp_path / "train", finish=False)
    shutil.copy(tmp_path / "other" / part_name(1), tmp_path / "train" / part_name(1))
    with pytest.raises(IdentityError, match=r"part-00001\.parquet: fingerprint .* another run's part") as caught:
        finish_store(tmp_path / "train", 3)
    assert caught.value.exit_status == 78
    assert not is_finished(tmp_path / "train")


OTHER_DATA = {**PLAN, "dataset": {"pairs.jsonl": "e" * 64}}


def test_a_part_of_another_plan_is_never_indexed_nor_read(tmp_path: Path) -> None:
    """Of the same reference and tokenization: a worker of an older dataset has lived on."""
    theirs = create_store(tmp_path / "other", IDENTITY, OTHER_DATA, DECLARED)
    make_store(tmp_path, finish=False)
    (tmp_path / part_name(1)).unlink()
    put_part(tmp_path, 1, [scored(3)], theirs)
    message = r"part-00001\.parquet: of the plan .* another run's part, of other data or other settings\. Run refshard"
    for read in (lambda: finish_store(tmp_path, 3), lambda: read_part(load_store(tmp_path), 1)):
        with pytest.raises(IdentityError, match=message) as caught:
            read()
        assert caught.value.exit_status == 78
    (tmp_path / part_name(2)).unlink()
    put_part(tmp_path, 2, [scored(6)], theirs)
    with pytest.raises(ForeignPartError, match=r"The same holds for part-00002\.parquet$") as several:
        finish_store(tmp_path, 3)
    assert not is_finished(tmp_path)
    # Its own parts, and those that another worker has put right since, stay.
    assert several.value.units == (1, 2)
    assert delete_foreign(tmp_path, (0, 1, 2, 3)) == [part_name(1), part_name(2)]
    assert finish_store(tmp_path, 3) == [1, 2]


def test_a_worker_whose_store_was_replaced_neither_indexes_nor_deletes(tmp_path: Path) -> None:
    """Its dataset has one unit, the new store's has three, the first of them with equal rows."""
    theirs = create_store(tmp_path / "other", IDENTITY, OTHER_DATA, DECLARED)
    make_store(tmp_path / "train", finish=False)
    with pytest.raises(IdentityError, match="was replaced by another run's store") as caught:
        finish_store(tmp_path / "train", 1, header=theirs)
    assert not isinstance(caught.value, ForeignPartError)
    assert not is_finished(tmp_path / "train")


@pytest.mark.parametrize("name", ["part-00000.parquet", "index.json", "skipped.jsonl"])
def test_a_store_is_not_made_among_another_programs_files_of_its_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"theirs": 1}')
    with pytest.raises(ConfigError, match=rf"^precompute\.output: must be a new folder, .* holds {name} of another"):
        create_store(tmp_path, IDENTITY, PLAN, DECLARED)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b'{"theirs": 1}']


def test_a_store_that_lost_its_manifest_is_made_again(tmp_path: Path) -> None:
    make_store(tmp_path)
    (tmp_path / "manifest.json").unlink()
    create_store(tmp_path, IDENTITY, PLAN, DECLARED)
    assert is_finished(tmp_path) and delete_foreign(tmp_path, (0, 1, 2)) == []


def test_a_part_without_a_plan_is_read_in_a_store_that_never_had_one(tmp_path: Path) -> None:
    """Versions before this one wrote no digest of the plan."""
    header = make_store(tmp_path, finish=False)
    table = pq.read_table(tmp_path / part_name(1))
    without = {key: value for key, value in table.schema.metadata.items() if key != b"refshard.plan"}
    forge_part(tmp_path / part_name(1), table.replace_schema_metadata(without))
    with pytest.raises(IdentityError, match=r"part-00001\.parquet: of the plan none"):
        finish_store(tmp_path, 3)
    rewrite_json(tmp_path / "manifest.json", lambda manifest: manifest.pop("plan_digest"))
    assert create_store(tmp_path, IDENTITY, PLAN, DECLARED) == header
    assert finish_store(tmp_path, 3) == []
    assert read_part(open_store(tmp_path), 1).num_rows == 3


def test_parts_that_are_gone_or_of_another_size_are_asked_for_again(folder: Path) -> None:
    before = contents(folder)
    assert reopen_store(folder) == []
    assert contents(folder) == before
    (folder / part_name(0)).unlink()
    (folder / part_name(2)).write_bytes(before[part_name(2)][:-1])
    assert reopen_store(folder) == [part_name(0), part_name(2)]
    assert contents(folder).keys() == {"manifest.json", part_name(1)}
    assert finish_store(folder, 3) == [0, 2]


def test_a_store_that_is_there_is_opened_without_a_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("read-only")

    for name in ("make", "put_if_absent", "replace", "delete"):
        monkeypatch.setattr(LocalFolder, name, refuse)
    create_store(folder, IDENTITY, PLAN, DECLARED)
    assert reopen_store(folder) == []


def test_the_index_is_written_once_a_pair_of_each_part_is_approved(tmp_path: Path) -> None:
    make_store(tmp_path, finish=False)
    seen: dict[int, list[int]] = {}

    def refuse(samples: Mapping[int, pa.Table], noise: NoiseFloor) -> None:
        seen.update({unit: sample["row"].to_pylist() for unit, sample in samples.items()})
        raise IdentityError("another kernel")

    with pytest.raises(IdentityError, match="another kernel"):
        finish_store(tmp_path, 3, refuse)
    # The longest of each.
    assert seen == {0: [2], 1: [5], 2: [8]}
    assert not is_finished(tmp_path)


def test_a_part_of_another_run_is_refused_though_the_index_vouches_for_it(tmp_path: Path) -> None:
    other = {**IDENTITY, "reference": {**IDENTITY["reference"], "weights": "b" * 64}}
    for name, identity in (("train", IDENTITY), ("other", other)):
        make_store(tmp_path / name, identity=identity)
    shutil.copy(tmp_path / "other" / part_name(1), tmp_path / "train" / part_name(1))
    entry = json.loads((tmp_path / "other" / "index.json").read_text())["parts"][1]
    rewrite_json(tmp_path / "train" / "index.json", lambda index: index["parts"].__setitem__(1, entry))
    with pytest.raises(IdentityError, match="another run's part"):
        read_part(open_store(tmp_path / "train"), 1)


def test_a_foreign_parquet_file_under_a_parts_name_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path, finish=False)
    pq.write_table(pa.table({"a": [1]}), tmp_path / part_name(1))
    with pytest.raises(IdentityError, match=r"fingerprint none.* another program's part"):
        finish_store(tmp_path, 3)
    with pytest.raises(IdentityError, match="another program's part"):
        delete_foreign(tmp_path, (1,))
    assert (tmp_path / part_name(1)).exists()


def test_a_part_under_another_units_name_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path, finish=False)
    (tmp_path / part_name(2)).unlink()
    shutil.copy(tmp_path / part_name(0), tmp_path / part_name(2))
    with pytest.raises(DataError, match=r"part-00002\.parquet: holds another unit than its name says"):
        finish_store(tmp_path, 3)


def test_two_parts_that_changed_places_are_refused(folder: Path) -> None:
    (folder / part_name(0)).rename(folder / "x")
    (folder / part_name(1)).rename(folder / part_name(0))
    (folder / "x").rename(folder / part_name(1))
    for number in (0, 1):
        with pytest.raises(DataError, match=f"{part_name(number)}: damaged"):
            read_part(open_store(folder), number)


# Damage.


def _expect_refused(file: Path, content: bytes, read: Callable[[], Any]) -> None:
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read()
    assert file.name in str(caught.value)


def test_any_flipped_byte_of_a_part_is_detected(folder: Path) -> None:
    store, file = open_store(folder), folder / part_name(1)
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        for mask in (0x01, 0x80, 0xFF):
            flipped = bytearray(whole)
            flipped[at] ^= mask
            _expect_refused(file, bytes(flipped), lambda: read_part(store, 1))
    file.write_bytes(whole)
    assert read_part(store, 1).num_rows == 3


def test_a_part_cut_or_grown_to_any_length_is_detected(folder: Path) -> None:
    store, file = open_store(folder), folder / part_name(1)
    whole = file.read_bytes()
    for length in [*range(16), *range(16, len(whole), 211), len(whole) - 1]:
        _expect_refused(file, whole[:length], lambda: read_part(store, 1))
    _expect_refused(file, whole + b"\0", lambda: read_part(store, 1))
    _expect_refused(file, bytes(len(whole)), lambda: read_part(store, 1))


def test_a_part_damaged_before_the_index_was_written_is_never_vouched_for(tmp_path: Path) -> None:
    """Page checksums guard the pages; what passes (statistics, the writer's version) must give what was written."""
    make_store(tmp_path / "train", 1, finish=False)
    file = tmp_path / "train" / part_name(0)
    whole, meant = file.read_bytes(), pq.read_table(file)
    detected = accepted = 0
    for at in range(0, len(whole), 13):
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        file.write_bytes(bytes(flipped))
        try:
            finish_store(tmp_path / "train", 1)
            assert read_part(open_store(tmp_path / "train"), 0).equals(meant), at
            accepted += 1
        except RefshardError as error:
            assert file.name in str(error)
            detected += 1
        (tmp_path / "train" / "index.json").unlink(missing_ok=True)
    # What is accepted hit the types that a writer in Arrow had, which no reader of parts looks at, or statistics.
    assert detected > 100
    assert accepted > 0


def test_a_damaged_page_stops_the_index(tmp_path: Path) -> None:
    make_store(tmp_path, finish=False)
    file = tmp_path / part_name(1)
    content = bytearray(file.read_bytes())
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(5)
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 0xFF
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"part-00001\.parquet: damaged .* Delete this part, then run"):
        finish_store(tmp_path, 3)
    assert not is_finished(tmp_path)


def test_a_column_whose_name_was_damaged_stops_the_index(tmp_path: Path) -> None:
    make_store(tmp_path, finish=False)
    file = tmp_path / part_name(1)
    whole = file.read_bytes()
    for name in (b"ref_chosen_l\xffgps", b"ref_chosen_l0gps"):
        file.write_bytes(whole.replace(b"ref_chosen_logps", name))
        with pytest.raises(DataError, match=r"part-00001\.parquet: damaged"):
            finish_store(tmp_path, 3)


def test_a_part_with_other_rows_than_its_footer_counts_stops_the_index(tmp_path: Path) -> None:
    header = create_store(tmp_path, IDENTITY, PLAN, DECLARED)
    put_part(tmp_path, 0, [scored(0)], header, ledger=Ledger(rows=2, kept=2))
    with pytest.raises(DataError, match="its 1 rows are not what its footer counts"):
        finish_store(tmp_path, 1)


def test_a_part_that_would_not_read_back_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = create_store(tmp_path, IDENTITY, PLAN, DECLARED)
    write_table = pq.write_table

    def write_wrong(table: pa.Table, sink: io.BytesIO, **options: Any) -> None:
        at = table.column_names.index("ref_chosen_logps")
        wrong = pa.array([0.0] * table.num_rows, pa.float32())
        write_table(table.set_column(at, table.schema.field(at), wrong), sink, **options)

    monkeypatch.setattr(pq, "write_table", write_wrong)
    with pytest.raises(DataError, match="does not read back as written; nothing was committed"):
        put_part(tmp_path, 0, [scored(0)], header)
    assert set(contents(tmp_path)) == {"manifest.json"}


def test_a_deleted_part_is_named(folder: Path) -> None:
    (folder / part_name(2)).unlink()
    with pytest.raises(DataError, match=r"part-00002\.parquet: missing, though the index lists it"):
        list(read_parts(open_store(folder)))


def test_a_part_that_is_a_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    make_store(tmp_path, finish=False)
    (tmp_path / part_name(1)).unlink()
    (tmp_path / part_name(1)).mkdir()
    with pytest.raises(DataError, match=r"part-00001\.parquet: must be a regular file, got a folder"):
        finish_store(tmp_path, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["identity"]["reference"].update(weights="b" * 64), "edited or damaged"),
        (lambda m: m["identity"]["tokenization"].update(max_length=1), "edited or damaged"),
        (lambda m: m.update(fingerprint="0" * 64), "edited or damaged"),
        (lambda m: m.pop("fingerprint"), "fingerprint: must be there, got nothing"),
        (lambda m: m.pop("identity"), "identity: must be there, got nothing"),
        (lambda m: m.update(plan=[]), "plan: must be object, got a list"),
        (lambda m: m.update(format="other"), "not a refshard manifest"),
    ],
    ids=["weights", "max_length", "fingerprint", "no fingerprint", "no identity", "plan", "format"],
)
def test_an_edited_manifest_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    rewrite_json(folder / "manifest.json", change)
    with pytest.raises(DataError, match=message) as caught:
        open_store(folder)
    assert "manifest.json" in str(caught.value)
    with pytest.raises(DataError, match=message):
        create_store(folder, IDENTITY, PLAN, DECLARED)


@pytest.mark.parametrize("name", ["manifest.json", "index.json"])
def test_an_edit_of_any_field_is_noticed_by_the_digest_of_the_file(folder: Path, name: str) -> None:
    whole = json.loads((folder / name).read_text())

    def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if isinstance(tree, dict | list) and tree:
            items = tree.items() if isinstance(tree, dict) else enumerate(tree)
            return [leaf for key, value in items for leaf in leaves(value, (*path, key))]
        return [path]

    for path in leaves(whole):
        edited = json.loads(json.dumps(whole))
        at = edited
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = "edited" if at[path[-1]] != "edited" else None
        (folder / name).write_text(json.dumps(edited))
        with pytest.raises(RefshardError, match=re.escape(name)):
            open_store(folder)
    assert len(leaves(whole)) > 15


def test_a_store_of_another_schema_version_is_another_identity(folder: Path) -> None:
    rewrite_json(folder / "manifest.json", lambda manifest: manifest.update(schema_version=2))
    with pytest.raises(IdentityError, match="schema version 2, this refshard reads 1"):
        open_store(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["parts"][0].update(file="../x"),
        lambda index: index["parts"][0].update(file="/etc/passwd"),
        lambda index: index["parts"][1].update(file=part_name(0)),
        lambda index: index["parts"].reverse(),
        lambda index: index["parts"].pop(0),
        lambda index: index["parts"].pop(),
        lambda index: index["parts"][0].pop("rows"),
        lambda index: index["parts"][0].update(rows="3"),
        lambda index: index["parts"].__setitem__(0, "part-00000.parquet"),
        lambda index: index.pop("parts"),
        lambda index: index.pop("totals"),
        lambda index: index["totals"].pop("dropped"),
        lambda index: index["totals"].update(kept=8),
        lambda index: index.update(fingerprint="0" * 64),
        lambda index: index.pop("noise"),
        lambda index: index["noise"].pop("mean"),
        lambda index: index["noise"].update(more=1),
    ],
    ids=[
        "leads out of the folder",
        "absolute",
        "a part twice",
        "another order",
        "first part left out",
        "last part left out",
        "no rows",
        "rows as text",
        "entry as text",
        "no parts",
        "no totals",
        "no drops",
        "another total",
        "another fingerprint",
        "no noise",
        "half a noise",
        "more than a noise",
    ],
)
def test_an_edited_index_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite_json(folder / "index.json", change)
    with pytest.raises(DataError, match=r"index\.json: .*Delete it and run refshard precompute again"):
        open_store(folder)
    (folder / "index.json").unlink()
    assert finish_store(folder, 3) == []
    assert len(list(read_parts(open_store(folder)))) == 3


@pytest.mark.parametrize("key", ["bytes", "sha256"])
def test_an_index_entry_without_its_digest_vouches_for_nothing(folder: Path, key: str) -> None:
    rewrite_json(folder / "index.json", lambda index: index["parts"][1].pop(key))
    with pytest.raises(DataError, match=rf"index\.json: parts\[1\]\.{key}: must be there, got nothing\. Delete it"):
        read_part(open_store(folder), 1)


@pytest.mark.parametrize("name", ["manifest.json", "index.json"])
def test_a_flipped_bit_of_manifest_or_index_never_changes_what_is_read(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    meant = [table.to_pylist() for table in read_parts(open_store(folder))]
    for at in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[at] ^= 0x04
        (folder / name).write_bytes(bytes(flipped))
        try:
            assert [table.to_pylist() for table in read_parts(open_store(folder))] == meant, at
        except RefshardError:
            continue


def test_a_store_is_a_value(folder: Path) -> None:
    store = open_store(folder)
    assert dataclasses.is_dataclass(Store)
    with pytest.raises(dataclasses.FrozenInstanceError):
        store.folder = LocalFolder(folder)  # type: ignore[misc]
    assert store.fingerprint == json.loads((folder / "manifest.json").read_text())["fingerprint"]
