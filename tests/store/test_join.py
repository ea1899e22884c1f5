"""The join: each pair gets the log-probs stored under its key, or is counted as missing; never another pair's."""

import hashlib
import math
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import ConfigError, DataError, IdentityError, StorageError
from pipeline.data.intake import KeptPair, Ledger
from pipeline.data.tokens import TokenizedPair
from pipeline.store import join as module
from pipeline.store import reference_table
from pipeline.store.finishing import finish_store
from pipeline.store.format import ScoredPair
from pipeline.store.join import JoinReport, join
from pipeline.store.reference_table import (
    INDEX_ROW,
    ReferenceTable,
    TokenLogps,
    load_reference_table,
)
from pipeline.store.store import Store, check_identity, create_store, open_store, write_part
from support.stores import IDENTITY, forge_part


def identity(**tokenization: Any) -> dict[str, Any]:
    return {**IDENTITY, "tokenization": {**IDENTITY["tokenization"], **tokenization}}


def scored(
    key: bytes, chosen: Sequence[float] = (-1.5, -0.25), rejected: Sequence[float] = (-2.0,), *, prompt_tokens: int = 3
) -> ScoredPair:
    return ScoredPair(
        key=key,
        row=0,
        prompt_tokens=prompt_tokens,
        chosen_token_logps=np.array(chosen, np.float32),
        rejected_token_logps=np.array(rejected, np.float32),
    )


def asked(key: bytes, row: int = 0, chosen: int = 2, rejected: int = 1, *, truncated: bool = False) -> KeptPair:
    """A pair of the run, with as many completion tokens as said."""
    ids = TokenizedPair(prompt_ids=[1, 2, 3], chosen_ids=list(range(chosen)), rejected_ids=list(range(rejected)))
    return KeptPair(row=row, place=f"pairs.jsonl line {row + 1}", key=key, pair=ids, truncated=truncated)


def make_store(folder: Path, parts: Sequence[Sequence[ScoredPair]], stored: Mapping[str, Any] = IDENTITY) -> Store:
    header = create_store(folder, stored, {}, {})
    for unit, pairs in enumerate(parts):
        write_part(
            folder,
            unit,
            pairs,
            Ledger(rows=len(pairs), kept=len(pairs)),
            header=header,
        )
    assert finish_store(folder, len(parts)) == []
    return open_store(folder)


def joined(
    pairs: Sequence[KeptPair], table: ReferenceTable, folder: Path, *, keep_missing: bool = False
) -> tuple[JoinReport, list[dict[str, Any]]]:
    report = join(pairs, table, folder / "joined.arrow", keep_missing=keep_missing)
    with pa.memory_map(str(folder / "joined.arrow")) as source:
        return report, pa.ipc.open_stream(source).read_all().to_pylist()


def token_logps_of(file: Path, row: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """A joined row's token logps, chosen and rejected, as the collator reads them."""
    counts = [len(row["chosen_ids"]), len(row["rejected_ids"])]
    values = TokenLogps(file).read(row["token_start"], sum(counts)).tolist()
    return values[: counts[0]], values[counts[0] :]


def key(number: int) -> bytes:
    return hashlib.blake2b(b"%d" % number, digest_size=16).digest()


# Few distinct bytes, zeros among them: keys that end in zero bytes, keys that are prefixes of others, repeats.
_keys = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.tuples(st.binary(max_size=3), st.sampled_from([b"\0", b"\1", b"\xff"])).map(lambda p: p[0].ljust(16, p[1])),
    st.lists(st.sampled_from([0, 1, 255]), min_size=16, max_size=16).map(bytes),
)


@given(data=st.data(), stored=st.lists(_keys, max_size=30), strange=st.lists(_keys, max_size=10))
@settings(max_examples=35, deadline=None)
def test_joined_rows_are_those_of_a_lookup_by_key(
    data: st.DataObject, stored: list[bytes], strange: list[bytes]
) -> None:
    wanted = data.draw(st.lists(st.sampled_from([*stored, *strange, bytes(16)]), max_size=40))
    unique = list(dict.fromkeys(stored))
    lookup = {k: (-1.0 - i, -0.5 * i - 2) for i, k in enumerate(unique)}
    pairs = [asked(k, row=2 * i) for i, k in enumerate(wanted)]
    with tempfile.TemporaryDirectory() as folder:
        # Equal keys are equal pairs, so a key that is stored twice has equal values.
        rows = [scored(k, (lookup[k][0], 0.0), (lookup[k][1],)) for k in stored]
        store = make_store(Path(folder, "train"), [rows[::2], rows[1::2]])
        report, found = joined(pairs, load_reference_table([store], 64), Path(folder))
    hits = [pair for pair in pairs if pair.key in lookup]
    misses = [pair for pair in pairs if pair.key not in lookup]
    assert [(row["row"], row["pair_key"]) for row in found] == [(pair.row, pair.key) for pair in hits]
    assert [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in found] == [lookup[p.key] for p in hits]
    assert report == JoinReport(
        matched=len(hits),
        missing=len(misses),
        first_missing=misses[0].place if misses else None,
        surplus=len(lookup.keys() - set(wanted)),
    )


def test_keys_that_differ_only_in_trailing_zero_bytes_are_kept_apart(tmp_path: Path) -> None:
    keys = [bytes(16), b"\1" + bytes(15), b"\1\0\1" + bytes(13), b"\1" + bytes(14) + b"\1", bytes(15) + b"\1"]
    store = make_store(tmp_path / "train", [[scored(k, (-1.0 - i, 0.0)) for i, k in enumerate(keys)]])
    report, rows = joined([asked(k) for k in reversed(keys)], load_reference_table([store], 64), tmp_path)
    assert report.matched == 5
    assert [row["pair_key"] for row in rows] == keys[::-1]
    assert [row["ref_chosen_logps"] for row in rows] == [-5, -4, -3, -2, -1]


def test_ids_and_row_numbers_are_carried_over(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train", [[scored(key(0))]])
    _, rows = joined([asked(key(0), row=2**40)], load_reference_table([store], 64), tmp_path)
    assert rows == [
        {
            "pair_key": key(0),
            "row": 2**40,
            "prompt_ids": [1, 2, 3],
            "chosen_ids": [0, 1],
            "rejected_ids": [0],
            "truncated": False,
            "part": 0,
            "ref_chosen_logps": -1.75,
            "ref_rejected_logps": -2.0,
        }
    ]


def test_the_part_that_scored_a_pair_and_whether_it_was_cut_are_carried_over(tmp_path: Path) -> None:
    """Parts are counted through the stores, in the order in which these are given."""
    first = make_store(tmp_path / "a", [[scored(key(0))], [], [scored(key(1))]])
    second = make_store(tmp_path / "b", [[scored(key(2)), scored(key(0))]])
    pairs = [asked(key(n), truncated=n == 1) for n in (2, 1, 0)]
    _, rows = joined(pairs, load_reference_table([first, second], 64), tmp_path)
    # A pair that is in both stores is taken from the first.
    assert [(row["part"], row["truncated"]) for row in rows] == [(3, False), (2, True), (0, False)]


def test_token_logps_come_with_the_pairs_where_they_are_asked_for(tmp_path: Path) -> None:
    values = {n: ([-1.0 * n, -0.5], [-2.0 - n]) for n in range(4)}
    parts = [[scored(key(n), *values[n]) for n in numbers] for numbers in ((0, 1), (2, 3))]
    store = make_store(tmp_path / "train", parts)
    token_file = tmp_path / "new" / "tokens"
    table = load_reference_table([store], 64, token_file=token_file)
    _, rows = joined([asked(key(n)) for n in (3, 0, 2, 2)], table, tmp_path)
    assert [token_logps_of(token_file, row) for row in rows] == [values[n] for n in (3, 0, 2, 2)]
    _, rows = joined([asked(key(0))], load_reference_table([store], 64), tmp_path)
    assert not any("token" in name for name in rows[0])


def test_token_logps_that_another_process_deletes_while_they_are_written_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened anew, the file would have the later parts alone, where the earlier ones should be."""
    store = make_store(tmp_path / "train", [[scored(key(n), (-1.0,), (-2.0,))] for n in range(3)])
    token_file = tmp_path / "tokens"

    read_all = reference_table.read_parts

    def read_parts(store: Any) -> Any:
        for number, part in enumerate(read_all(store)):
            if number == 2:
                token_file.unlink()
            yield part

    monkeypatch.setattr(reference_table, "read_parts", read_parts)
    with pytest.raises(StorageError, match="must hold 4 values before part 2, got 0"):
        load_reference_table([store], 64, token_file=token_file)


def test_several_sets_share_one_file_of_token_logps(tmp_path: Path) -> None:
    """One collator serves training and held-out sets."""
    token_file = tmp_path / "tokens"
    for n, name in enumerate(("train", "test")):
        store = make_store(tmp_path / name, [[scored(key(0), (-1.0, -2.0 - n), (-4.0 - n,))]])
        table = load_reference_table([store], 64, token_file=token_file)
        _, rows = joined([asked(key(0))], table, tmp_path)
        assert token_logps_of(token_file, rows[0]) == ([-1.0, -2.0 - n], [-4.0 - n])


def test_a_reader_that_was_sent_to_a_worker_reads_the_same(tmp_path: Path) -> None:
    np.arange(6, dtype="<f4").tofile(tmp_path / "tokens")
    reader = TokenLogps(tmp_path / "tokens")
    assert reader.read(2, 3).tolist() == [2, 3, 4]
    sent = pickle.dumps(reader)
    assert len(sent) < 500
    assert pickle.loads(sent).read(4, 2).tolist() == [4, 5]


def test_a_file_of_token_logps_that_ends_early_is_a_storage_error(tmp_path: Path) -> None:
    """Values that are not there must not read as fewer tokens."""
    np.arange(6, dtype="<f4").tofile(tmp_path / "tokens")
    with pytest.raises(StorageError, match="cut short"):
        TokenLogps(tmp_path / "tokens").read(4, 3)
    with pytest.raises(StorageError, match="can't be read"):
        TokenLogps(tmp_path / "none").read(0, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_has_all_chosen_token_logps_and_then_all_rejected_ones(tmp_path: Path, num_workers: int) -> None:
    import torch

    from pipeline.training.batches import Collator

    values: dict[int, tuple[list[float], list[float]]] = {0: ([-1.0, -2.0], [-3.0]), 1: ([-4.0], [-5.0, -6.0])}
    store = make_store(tmp_path / "train", [[scored(key(n), *values[n]) for n in values]])
    table = load_reference_table([store], 64, token_file=tmp_path / "tokens")
    pairs = [asked(key(1), chosen=1, rejected=2), asked(key(7), chosen=2, rejected=1), asked(key(0))]
    _, rows = joined(pairs, table, tmp_path, keep_missing=True)
    reader = TokenLogps(tmp_path / "tokens")
    # Open before the workers start, who then share the file.
    reader.read(0, 1)
    loader = torch.utils.data.DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=3,
        collate_fn=Collator(0, 64, reader, packed=True),
        num_workers=num_workers,
    )
    (batch,) = loader
    nan = math.nan
    # Of the pair that was not scored nothing reads as a number.
    expected = np.array([-4, nan, nan, -1, -2, -5, -6, nan, -3], np.float32)
    assert np.array_equal(batch["joined"].ref_token_logps.numpy(), expected, equal_nan=True)
    assert Collator(0, 64, packed=True)(rows)["joined"].ref_token_logps is None
    for row in rows:
        del row["token_start"]
    assert Collator(0, 64, reader, packed=True)(rows)["joined"].ref_token_logps is None


def test_token_logps_are_cut_as_the_sums_are(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train", [[scored(key(0), (-1.0, -2.0, -4.0, -8.0), (-16.0,))]])
    table = load_reference_table([store], 5, token_file=tmp_path / "tokens")
    _, rows = joined([asked(key(0), chosen=2, rejected=1)], table, tmp_path)
    assert token_logps_of(tmp_path / "tokens", rows[0]) == ([-1.0, -2.0], [-16.0])
    assert (rows[0]["ref_chosen_logps"], rows[0]["ref_rejected_logps"]) == (-3.0, -16.0)


def test_stores_without_token_logps_give_none_though_asked(tmp_path: Path) -> None:
    """One such store among others is enough: a column is there for all rows, or for none."""
    token_file = tmp_path / "token-logps"
    sums = make_store(tmp_path / "sums", [[scored(key(0))]], identity(token_logps=False))
    tokens = make_store(tmp_path / "tokens", [[scored(key(1))]])
    table = load_reference_table([tokens, sums], 64, token_file=token_file)
    assert not table.with_tokens
    assert not token_file.exists()
    _, rows = joined([asked(key(0)), asked(key(1))], table, tmp_path)
    assert [row["ref_chosen_logps"] for row in rows] == [-1.75, -1.75]
    assert not any("token" in name for name in rows[0])


def test_a_token_file_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train", [[scored(key(0))]])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="can't be written"):
        load_reference_table([store], 64, token_file=tmp_path / "file" / "tokens")


def test_an_index_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train", [[scored(key(0))]])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/index: the stores' index can't be written"):
        load_reference_table([store], 64, folder=tmp_path / "file" / "index")


def test_the_index_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_table, "_ROWS_PER_WRITE", 2)
    store = make_store(tmp_path / "train", [[scored(key(n)) for n in range(9)]])
    table = load_reference_table([store], 64, folder=tmp_path / "index")
    assert list((tmp_path / "index").iterdir()) == []
    assert len(table.keys) == 9


@pytest.mark.parametrize("with_tokens", [False, True])
def test_missing_pairs_are_kept_with_nan_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tokens: bool
) -> None:
    """So that a pair's place in the joined set does not depend on which pairs are scored."""
    monkeypatch.setattr(module, "_CHUNK", 3)
    store = make_store(tmp_path / "train", [[scored(key(n), (-1.0 * n, -0.5)) for n in range(3)]])
    table = load_reference_table([store], 64, token_file=tmp_path / "tokens" if with_tokens else None)
    order = [9, 2, 8, 7, 6, 5, 0, 4, 1]
    pairs = [asked(key(n), row=i) for i, n in enumerate(order)]
    report, rows = joined(pairs, table, tmp_path, keep_missing=True)
    assert report == JoinReport(matched=3, missing=6, first_missing="pairs.jsonl line 1", surplus=0)
    assert [(row["row"], row["pair_key"]) for row in rows] == [(pair.row, pair.key) for pair in pairs]
    for n, row in zip(order, rows, strict=True):
        assert row["chosen_ids"] == [0, 1]
        if n < 3:
            assert (row["ref_chosen_logps"], row["ref_rejected_logps"], row["part"]) == (-1.0 * n - 0.5, -2.0, 0)
        else:
            assert math.isnan(row["ref_chosen_logps"]) and math.isnan(row["ref_rejected_logps"])
            assert row["part"] == -1
        if with_tokens:
            if n < 3:
                assert token_logps_of(tmp_path / "tokens", row) == ([-1.0 * n, -0.5], [-2.0])
            else:
                assert row["token_start"] == -1
    assert ("token_start" in rows[0]) == with_tokens


@pytest.mark.parametrize("with_tokens", [False, True])
def test_all_pairs_are_kept_beside_an_empty_store(tmp_path: Path, with_tokens: bool) -> None:
    store = make_store(tmp_path / "train", [[]])
    table = load_reference_table([store], 64, token_file=tmp_path / "tokens" if with_tokens else None)
    report, rows = joined([asked(bytes(16)), asked(key(1))], table, tmp_path, keep_missing=True)
    assert (report.matched, report.missing) == (0, 2)
    assert len(rows) == 2 and all(math.isnan(row["ref_chosen_logps"]) for row in rows)
    if with_tokens:
        assert [row["token_start"] for row in rows] == [-1, -1]


def test_order_is_kept_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    store = make_store(tmp_path / "train", [[scored(key(i), (-1.0 * i, 0.0)) for i in range(11)]])
    order = [10, 3, 99, 0, 7, 7, 98, 97, 96, 95, 1, 2]
    report, rows = joined(
        [asked(key(n), row=i) for i, n in enumerate(order)], load_reference_table([store], 64), tmp_path
    )
    assert [row["ref_chosen_logps"] for row in rows] == [-10, -3, 0, -7, -7, -1, -2]
    assert report == JoinReport(matched=7, missing=5, first_missing="pairs.jsonl line 3", surplus=5)


@pytest.mark.parametrize("batch_bytes", [1, 2000, 2**25])
def test_order_is_kept_across_arrows_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    monkeypatch.setattr(module, "_BATCH_BYTES", batch_bytes)
    store = make_store(tmp_path / "train", [[scored(key(i)) for i in range(50)]])
    pairs = [asked(key(n), row=n) for n in range(60)]
    _, rows = joined(pairs, load_reference_table([store], 64), tmp_path)
    assert [row["row"] for row in rows] == list(range(50))
    with pa.memory_map(str(tmp_path / "joined.arrow")) as source:
        batches = len(list(pa.ipc.open_stream(source)))
    assert batches in {1: [13], 2000: range(2, 13), 2**25: [1]}[batch_bytes]


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    report = JoinReport(matched=1234, missing=5, first_missing="x", surplus=0)
    assert report.summary() == "1,234 matched, 5 missing, 0 surplus in the shards"


def test_no_pair_matches_an_empty_table(tmp_path: Path) -> None:
    """All rows of a split can have been dropped: its parts are there, and hold nothing."""
    store = make_store(tmp_path / "train", [[], []])
    for max_length in (64, 8):
        table = load_reference_table([store], max_length)
        assert len(table.keys) == 0
        report, rows = joined([asked(bytes(16)), asked(key(1))], table, tmp_path)
        assert rows == []
        assert (report.matched, report.missing, report.surplus) == (0, 2, 0)


def test_no_pairs_leave_a_readable_file(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train", [[scored(key(0))]])
    report, rows = joined([], load_reference_table([store], 64), tmp_path)
    assert (rows, report) == ([], JoinReport(matched=0, missing=0, first_missing=None, surplus=1))


def test_a_file_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train", [[scored(key(0))]])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="can't be written"):
        join([asked(key(0))], load_reference_table([store], 64), tmp_path / "file" / "joined.arrow")


# Counts.


@pytest.mark.parametrize(("chosen", "rejected"), [(3, 1), (1, 1), (2, 2)])
def test_another_token_count_than_the_shards_is_an_error(tmp_path: Path, chosen: int, rejected: int) -> None:
    table = load_reference_table([make_store(tmp_path / "train", [[scored(key(0)), scored(key(1))]])], 64)
    pairs = [asked(key(1)), asked(key(0), row=6, chosen=chosen, rejected=rejected)]
    with pytest.raises(DataError, match=f"line 7: the shards scored 2 and 1 .* has {chosen} and {rejected}") as caught:
        join(pairs, table, tmp_path / "joined.arrow")
    assert caught.value.exit_status == 65


# A smaller max_length.

_logps = st.lists(st.floats(-50, 0, width=32), min_size=1, max_size=30)


@given(
    pairs=st.lists(st.tuples(st.integers(1, 20), _logps, _logps), min_size=1, max_size=8),
    max_length=st.integers(1, 63),
    stored_length=st.sampled_from([64, None]),
)
@settings(max_examples=25, deadline=None)
def test_a_smaller_max_length_takes_the_sums_of_the_stored_prefixes(
    pairs: list[tuple[int, list[float], list[float]]], max_length: int, stored_length: int | None
) -> None:
    rows = [scored(key(i), c, r, prompt_tokens=p) for i, (p, c, r) in enumerate(pairs)]
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), [rows[:3], rows[3:]], identity(max_length=stored_length))
        table = load_reference_table([store], max_length)
    assert len(table.keys) == len(pairs)
    at = {bytes(k).ljust(16, b"\0"): i for i, k in enumerate(table.keys)}
    for n, (prompt_tokens, chosen, rejected) in enumerate(pairs):
        i, room = at[key(n)], max(max_length - prompt_tokens, 0)
        assert table.rows["chosen_tokens"][i] == len(chosen[:room])
        assert table.rows["rejected_tokens"][i] == len(rejected[:room])
        assert table.rows["chosen_logps"][i] == np.float32(np.sum(chosen[:room], dtype=np.float64))
        assert table.rows["rejected_logps"][i] == np.float32(np.sum(rejected[:room], dtype=np.float64))


def test_counts_are_checked_at_the_smaller_length_too(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train", [[scored(key(0), (-1.0, -2.0, -4.0, -8.0), (-16.0, -32.0, -64.0))]])
    table = load_reference_table([store], 5)
    _, rows = joined([asked(key(0), chosen=2, rejected=2)], table, tmp_path)
    assert (rows[0]["ref_chosen_logps"], rows[0]["ref_rejected_logps"]) == (-3.0, -48.0)
    with pytest.raises(DataError, match="scored 2 and 2"):
        joined([asked(key(0), chosen=4, rejected=3)], table, tmp_path)


def test_the_same_max_length_needs_no_token_logps(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train", [[scored(key(0))]], identity(token_logps=False))
    table = load_reference_table([store], 64)
    assert (table.rows["chosen_logps"][0], table.rows["rejected_logps"][0]) == (-1.75, -2.0)
    assert (table.rows["chosen_tokens"][0], table.rows["rejected_tokens"][0]) == (2, 1)


# Weights on the tail (LD-DPO).


@given(
    pairs=st.lists(st.tuples(st.integers(1, 20), _logps, _logps), min_size=1, max_size=8),
    max_length=st.integers(1, 64),
    ld_alpha=st.floats(0, 1),
    with_tokens=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_weighted_sums_are_those_of_a_loop_over_the_prefixes_tokens(
    pairs: list[tuple[int, list[float], list[float]]], max_length: int, ld_alpha: float, with_tokens: bool
) -> None:
    rows = [scored(key(i), c, r, prompt_tokens=p) for i, (p, c, r) in enumerate(pairs)]
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder, "train"), [rows[:3], rows[3:]])
        token_file = Path(folder, "tokens") if with_tokens else None
        table = load_reference_table([store], max_length, ld_alpha=ld_alpha, token_file=token_file)
        flat = np.fromfile(token_file, "<f4").tolist() if token_file else None
    at = {bytes(k).ljust(16, b"\0"): i for i, k in enumerate(table.keys)}
    for n, (prompt_tokens, *sides) in enumerate(pairs):
        i, room = at[key(n)], max(max_length - prompt_tokens, 0)
        kept = [side[:room] for side in sides]
        # The common length is that of the completions as this run cuts them.
        shared = min(map(len, kept))
        for values, sums in zip(kept, (table.rows["chosen_logps"], table.rows["rejected_logps"]), strict=True):
            expected = sum(value * (1.0 if t < shared else ld_alpha) for t, value in enumerate(values))
            assert sums[i] == pytest.approx(expected, rel=1e-6, abs=1e-6)
        if flat is not None:
            # The tokens themselves are not weighed: the policy's are compared with them one by one.
            start = table.rows["token_start"][i]
            assert flat[start : start + sum(map(len, kept))] == [*kept[0], *kept[1]]


def test_a_weight_of_1_gives_the_plain_sums(tmp_path: Path) -> None:
    rows = [scored(key(i), [-0.1 * i - 0.3] * (i + 1), [-0.7] * 3) for i in range(9)]
    store = make_store(tmp_path / "train", [rows])
    plain, weighted = (load_reference_table([store], 64, ld_alpha=alpha) for alpha in (None, 1.0))
    assert np.array_equal(plain.rows["chosen_logps"], weighted.rows["chosen_logps"])
    assert np.array_equal(plain.rows["rejected_logps"], weighted.rows["rejected_logps"])


def test_weights_need_token_logps_in_every_store(tmp_path: Path) -> None:
    tokens = make_store(tmp_path / "tokens", [[scored(key(1))]])
    sums = make_store(tmp_path / "sums", [[scored(key(0))]], identity(token_logps=False))
    for stores in ([sums], [sums, tokens]):
        with pytest.raises(ConfigError, match=r"loss\.ld_alpha: .*sums holds sums alone.*token_logps: true") as caught:
            load_reference_table(stores, 64, ld_alpha=0.5)
        assert caught.value.exit_status == 2


def test_the_store_without_token_logps_is_the_one_that_is_named(tmp_path: Path) -> None:
    tokens = make_store(tmp_path / "first", [[scored(key(1))]])
    sums = make_store(tmp_path / "second", [[scored(key(0))]], identity(token_logps=False))
    with pytest.raises(ConfigError, match="second holds sums alone"):
        load_reference_table([tokens, sums], 64, ld_alpha=0.5)


# Sums and token logps of one row must agree.


def _make_store_with_edited_sum(folder: Path, change: float) -> Store:
    """A store whose sums were changed by another program, which made all digests anew."""
    make_store(folder, [[scored(key(0))], [scored(key(1), (-100.0, -200.0))]])
    file = folder / "part-00001.parquet"
    table = pq.read_table(file)
    at = table.column_names.index("ref_chosen_logps")
    edited = pa.array([-300.0 + change], pa.float32())
    forge_part(file, table.set_column(at, table.schema.field(at), edited))
    (folder / "index.json").unlink()
    assert finish_store(folder, 2) == []
    return open_store(folder)


@pytest.mark.parametrize("max_length", [64, 4])
@pytest.mark.parametrize("change", [0.5, -0.01, 600.0])
def test_sums_that_are_not_those_of_the_token_logps_are_refused(tmp_path: Path, change: float, max_length: int) -> None:
    store = _make_store_with_edited_sum(tmp_path / "train", change)
    with pytest.raises(DataError, match=r"train, part 1: its sums are not those of its token logps") as caught:
        load_reference_table([store], max_length)
    assert caught.value.exit_status == 65
    assert "Delete the part, then run refshard precompute" in str(caught.value)


def test_a_sum_rounded_otherwise_is_taken(tmp_path: Path) -> None:
    store = _make_store_with_edited_sum(tmp_path / "train", 2e-4)
    assert len(load_reference_table([store], 64).keys) == 2


# Several stores.


def test_stores_of_one_reference_are_joined_together(tmp_path: Path) -> None:
    first = make_store(tmp_path / "a", [[scored(key(0), (-1.0, 0.0)), scored(key(1), (-2.0, 0.0))]])
    # A pair that is in both counts once.
    second = make_store(tmp_path / "b", [[scored(key(1), (-2.0, 0.0))], [scored(key(2), (-3.0, 0.0))]])
    assert first.fingerprint == second.fingerprint
    check_identity([first, second], IDENTITY)
    table = load_reference_table([first, second], 64)
    assert len(table.keys) == 3
    report, rows = joined([asked(key(n)) for n in (2, 0, 1)], table, tmp_path)
    assert [row["ref_chosen_logps"] for row in rows] == [-3, -1, -2]
    assert report == JoinReport(matched=3, missing=0, first_missing=None, surplus=0)


def test_a_store_cut_later_joins_with_one_cut_at_this_runs_length(tmp_path: Path) -> None:
    longer = make_store(tmp_path / "a", [[scored(key(0), (-1.0, -2.0, -4.0))]], identity(max_length=None))
    equal = make_store(tmp_path / "b", [[scored(key(1), (-8.0, -16.0))]], identity(max_length=5))
    check_identity([longer, equal], identity(max_length=5))
    _, rows = joined([asked(key(0)), asked(key(1))], load_reference_table([longer, equal], 5), tmp_path)
    assert [row["ref_chosen_logps"] for row in rows] == [-3.0, -24.0]


# The index.


@given(
    pieces=st.lists(st.lists(_keys, max_size=12), max_size=8),
    asked_for=st.lists(_keys, max_size=12),
    rows_per_write=st.sampled_from([1, 3, 2**18]),
    block=st.sampled_from([1, 4, 128]),
)
@settings(max_examples=150, deadline=None)
def test_an_index_is_a_dict(pieces: list[list[bytes]], asked_for: list[bytes], rows_per_write: int, block: int) -> None:
    """The first of equal keys is what is kept, and an absent key gives nothing, below, between and above the others."""
    oracle: dict[bytes, int] = {}
    arrays = []
    for number, keys in enumerate(pieces):
        piece = np.zeros(len(keys), INDEX_ROW)
        piece["key"], piece["part"], piece["token_start"] = keys, number, np.arange(len(keys)) + 100 * number
        arrays.append(piece)
        for k, start in zip(keys, piece["token_start"].tolist(), strict=True):
            oracle.setdefault(k, start)
    wanted = [*asked_for, bytes(16), b"\xff" * 16, *oracle]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_table, "_ROWS_PER_WRITE", rows_per_write)
        patch.setattr(reference_table, "_BLOCK", block)
        table = ReferenceTable(iter(arrays))
        at, found = table.look_up(wanted)
    assert [k.ljust(16, b"\0") for k in table.keys.tolist()] == sorted(oracle)
    assert table.rows["token_start"].tolist() == [oracle[k] for k in sorted(oracle)]
    for k, i, row in zip(wanted, at.tolist(), found, strict=True):
        if k in oracle:
            assert sorted(oracle)[i] == k
            assert (row["token_start"], row["part"]) == (oracle[k], oracle[k] // 100)
        else:
            assert (i, row["token_start"], row["part"]) == (-1, -1, -1)
            assert math.isnan(row["chosen_logps"]) and math.isnan(row["rejected_logps"])


def test_several_stores_of_several_parts_join_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [scored(key(n % 70), (-1.0 * (n % 70), -0.5), (-2.0 - n % 70,)) for n in range(100)]
    stores = [
        make_store(tmp_path / "a", [rows[:30], [], rows[30:60]]),
        make_store(tmp_path / "b", [rows[60:]]),
        make_store(tmp_path / "empty", [[]]),
    ]
    pairs = [asked(key(n), row=n) for n in range(90)]
    found = []
    for rows_per_write in (2**18, 7):
        monkeypatch.setattr(reference_table, "_ROWS_PER_WRITE", rows_per_write)
        token_file = tmp_path / f"tokens-{rows_per_write}"
        table = load_reference_table(stores, 64, token_file=token_file)
        report, joined_rows = joined(pairs, table, tmp_path)
        assert report == JoinReport(matched=70, missing=20, first_missing="pairs.jsonl line 71", surplus=0)
        found.append((joined_rows, [token_logps_of(token_file, row) for row in joined_rows]))
    assert found[0] == found[1]


@pytest.mark.parametrize("stores", [0, 1])
def test_an_empty_table_finds_nothing(tmp_path: Path, stores: int) -> None:
    table = load_reference_table([make_store(tmp_path / "train", [[], []])] * stores, 64)
    assert len(table) == 0
    at, found = table.look_up([key(0), bytes(16)])
    assert at.tolist() == [-1, -1]
    assert np.isnan(found["chosen_logps"]).all()


# Identity.


def test_a_store_of_the_same_identity_is_taken(tmp_path: Path) -> None:
    check_identity([make_store(tmp_path / "train", [[scored(key(0))]])], IDENTITY)


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (
            {**IDENTITY, "reference": {**IDENTITY["reference"], "weights": "b" * 64, "dtype": "bfloat16"}},
            ["reference.weights: shards aaaaaaaaaaaa, this run bbbbbbbbbbbb", "reference.dtype: shards float32"],
        ),
        (
            {**IDENTITY, "reference": {**IDENTITY["reference"], "adapter": "x"}},
            ["reference.adapter: shards none, this run x"],
        ),
        (identity(tokenizer="u"), ["tokenization.tokenizer: shards t, this run u"]),
        (identity(max_length=128), ["tokenization.max_length: shards 64, this run 128; the shards were cut shorter"]),
        (identity(max_length=None), ["tokenization.max_length: shards 64, this run none"]),
    ],
    ids=["weights and dtype", "adapter", "tokenizer", "longer", "uncut"],
)
def test_each_differing_field_is_named(tmp_path: Path, run: Mapping[str, Any], named: list[str]) -> None:
    good = make_store(tmp_path / "good", [[scored(key(0))]], run)
    other = make_store(tmp_path / "other", [[scored(key(0))]])
    with pytest.raises(IdentityError) as caught:
        check_identity([good, other], run)
    assert caught.value.exit_status == 78
    assert str(tmp_path / "other") in str(caught.value)
    for text in named:
        assert text in str(caught.value)


def test_a_smaller_max_length_is_served_only_where_token_logps_are_stored(tmp_path: Path) -> None:
    run = identity(max_length=32)
    check_identity([make_store(tmp_path / "with", [[scored(key(0))]])], run)
    without = make_store(tmp_path / "without", [[scored(key(0))]], identity(token_logps=False))
    check_identity([without], IDENTITY)
    with pytest.raises(IdentityError, match=r"tokenization\.max_length: shards 64, this run 32; .* no token logps"):
        check_identity([without], run)
