"""Faults of disks, people and object stores, each made for real: a clear error or a clean retry, and nothing wrong.

The kills and power cuts are in test_kills and test_crashes.
"""

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base import folders
from pipeline.base.errors import DataError, IdentityError, RefshardError, StorageError
from pipeline.base.folders import LocalFolder, ObjectFolder
from pipeline.store.finishing import finish_store
from pipeline.store.format import check_part, part_name
from pipeline.store.store import create_store, open_store, read_content, read_manifest, read_part, read_parts
from pipeline.store.verify import delete_leftovers, verify_store
from support.disks import remount, tmpfs
from support.stores import IDENTITY, PLAN, UNITS, contents, pair_of, stored_rows, write_store, write_unit
from support.tally import tally


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "train")
    return tmp_path / "train"


# Disks.


def test_a_disk_that_is_full_at_any_point_keeps_whole_parts_and_no_rests_and_the_run_goes_on(tmp_path: Path) -> None:
    """On disks of one page, two pages, ... until all fits."""
    write_store(tmp_path / "expected" / "train")
    expected = contents(tmp_path / "expected" / "train")
    full = 0
    for pages in range(1, 100):
        with tmpfs(tmp_path / f"disk{pages}", f"{4 * pages}k") as disk:
            try:
                write_store(disk / "train")
            except StorageError as error:
                assert "the disk is full. Free some space and run the same command again" in str(error)
                full += 1
            else:
                break
            found = contents(disk / "train")
            assert found.items() <= expected.items()
            assert len(list((disk / "train").iterdir())) == len(found)
            remount(disk, "size=1m")
            write_store(disk / "train")
            assert contents(disk / "train") == expected
    # Of the manifest, each part, what was skipped and the index, each found no room in its turn.
    assert full >= UNITS + 2
    tally("disk full (tmpfs of 4, 8, 12, ... KiB)", full, outcome="74, no rests; finished once there is room")


def test_a_read_only_disk_is_a_storage_error_and_stays_as_it_is(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "1m") as disk:
        header = create_store(disk / "train", IDENTITY, PLAN, {})
        remount(disk, "ro")
        before = contents(disk / "train")
        with pytest.raises(StorageError, match="Read-only file system"):
            write_unit(disk / "train", 0, [], header)
        with pytest.raises(StorageError, match="Read-only file system"):
            create_store(disk / "other", IDENTITY, PLAN, {})
        assert contents(disk / "train") == before
        remount(disk, "rw")
    tally("disk read-only", 2, outcome="74, nothing changed")


# Damage.


def test_a_part_cut_at_every_page_boundary_is_refused(store: Path) -> None:
    file = store / part_name(1)
    whole = file.read_bytes()
    metadata = pq.ParquetFile(file).metadata
    edges = {0, 4, len(whole) - 8, len(whole) - 4, len(whole) - 1}
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            edges |= {start, chunk.data_page_offset, start + chunk.total_compressed_size}
    assert len(edges) > 15
    for edge in edges:
        file.write_bytes(whole[:edge])
        with pytest.raises(DataError, match=r"part-00001\.parquet: damaged"):
            read_part(open_store(store), 1)
        with pytest.raises(DataError, match=r"part-00001\.parquet: damaged"):
            check_part(LocalFolder(store), 1, whole[:edge], read_manifest(store))
        assert len(verify_store(LocalFolder(store)).problems) == 1
    tally("a part cut at every page boundary", len(edges), outcome="65, the part named, before and after the index")


def _large_part(folder: Path) -> bytes:
    """A part of about a megabyte."""
    header = create_store(folder, IDENTITY, PLAN, {})
    values = np.random.default_rng(0).exponential(size=(500, 300)).astype(np.float32)
    pairs = [pair_of(row, -values[row], -values[row] - 1) for row in range(500)]
    write_unit(folder, 0, pairs, header, provenance={"a": 1})
    assert finish_store(folder, 1) == []
    return (folder / part_name(0)).read_bytes()


def test_a_flipped_bit_in_every_thousandth_byte_is_detected(tmp_path: Path) -> None:
    whole = _large_part(tmp_path)
    assert len(whole) > 900_000
    store, bit = open_store(tmp_path), random.Random(0)
    with (tmp_path / part_name(0)).open("r+b") as file:
        for at in range(0, len(whole), 1000):
            os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << bit.randrange(8)]), at)
            with pytest.raises(DataError, match=r"part-00000\.parquet: damaged"):
                read_part(store, 0)
            os.pwrite(file.fileno(), whole[at : at + 1], at)
    assert read_part(store, 0).num_rows == 500
    tally("a bit flipped in every 1,000th byte", len(range(0, len(whole), 1000)), outcome="65, the part named")


@pytest.mark.parametrize(
    "flips", [pytest.param(300, id="some"), pytest.param(4000, id="many", marks=pytest.mark.nightly)]
)
def test_a_flipped_bit_before_there_is_an_index_is_detected_or_changes_nothing(store: Path, flips: int) -> None:
    """Page checksums alone let some through; the digest of the content lets none through."""
    folder, manifest, place = LocalFolder(store), read_manifest(store), random.Random(0)
    whole = (store / part_name(1)).read_bytes()
    meant = check_part(folder, 1, whole, manifest)
    harmless = 0
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[place.randrange(len(whole))] ^= 1 << place.randrange(8)
        try:
            found = check_part(folder, 1, bytes(damaged), manifest)
        except RefshardError as error:
            assert part_name(1) in str(error)
        else:
            assert found.table.equals(meant.table)
            assert (found.ledger, found.skipped, found.noise) == (meant.ledger, meant.skipped, meant.noise)
            harmless += 1
    # About half of so small a part is names of types and statistics, which no reader looks at.
    assert harmless < flips * 3 / 4
    outcome = f"65, or the content is what was written ({harmless} flips in bytes that say nothing)"
    tally("a bit flipped before there is an index", flips, outcome=outcome)


def _swap(store: Path, one: str, other: str) -> None:
    a, b = (store / one).read_bytes(), (store / other).read_bytes()
    (store / one).write_bytes(b)
    (store / other).write_bytes(a)


def _edit(store: Path, name: str, change: Callable[[Any], Any]) -> None:
    content = json.loads((store / name).read_text())
    change(content)
    (store / name).write_text(json.dumps(content))


def _change_bytes(store: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (store / name).write_bytes(change((store / name).read_bytes()))


def _rewrite(store: Path, unit: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """A part written anew by somebody with pyarrow, its footer kept."""
    table = pq.read_table(store / part_name(unit))
    changed = change(table).replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, store / part_name(unit), write_page_checksum=True)


def _with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    at = table.column_names.index(name)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


def _of_another_run(store: Path, unit: int) -> None:
    other = store.parent / "other"
    identity = {**IDENTITY, "reference": {"weights": "b" * 64, "dtype": "float32", "adapter": None}}
    header = create_store(other, identity, PLAN, {})
    write_unit(other, unit, [], header)
    shutil.copy(other / part_name(unit), store / part_name(unit))


P0, P1, P2, INDEX, MANIFEST = part_name(0), part_name(1), part_name(2), "index.json", "manifest.json"

CORRUPTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a part deleted": (lambda s: (s / P1).unlink(), P1),
    "the last part deleted": (lambda s: (s / P2).unlink(), P2),
    "a part emptied": (lambda s: (s / P1).write_bytes(b""), P1),
    "a part of zeros": (lambda s: _change_bytes(s, P1, lambda c: bytes(len(c))), P1),
    "a page of zeros": (lambda s: _change_bytes(s, P1, lambda c: c[:100] + bytes(64) + c[164:]), P1),
    "a part cut in half": (lambda s: _change_bytes(s, P1, lambda c: c[: len(c) // 2]), P1),
    "a part one byte short": (lambda s: _change_bytes(s, P1, lambda c: c[:-1]), P1),
    "a part one byte long": (lambda s: _change_bytes(s, P1, lambda c: c + b"\0"), P1),
    "a part twice over": (lambda s: _change_bytes(s, P1, lambda c: c + c), P1),
    "a part with bytes before it": (lambda s: _change_bytes(s, P1, lambda c: b"\0" * 8 + c), P1),
    "the magic changed": (lambda s: _change_bytes(s, P1, lambda c: b"PARX" + c[4:]), P1),
    "the footer's length changed": (
        lambda s: _change_bytes(s, P1, lambda c: c[:-8] + b"\xff\xff\xff\x7f" + c[-4:]),
        P1,
    ),
    "two parts swapped": (lambda s: _swap(s, P0, P1), P0),
    "a part copied over another": (lambda s: shutil.copy(s / P0, s / P2), P2),
    "a part of another run": (lambda s: _of_another_run(s, 1), P1),
    "a part that is text": (lambda s: (s / P1).write_text("hello"), P1),
    "a part that is a folder": (lambda s: ((s / P1).unlink(), (s / P1).mkdir()), P1),
    "a part that is a dead link": (lambda s: ((s / P1).unlink(), (s / P1).symlink_to("nowhere")), P1),
    "a part renamed": (lambda s: (s / P1).rename(s / part_name(9)), P1),
    "a foreign parquet file": (lambda s: pq.write_table(pa.table({"a": [1]}), s / P1), P1),
    "one value changed": (lambda s: _rewrite(s, 1, lambda t: _with_column(t, "ref_chosen_logps", [-9.0, -9.0])), P1),
    "values of zero": (
        lambda s: _rewrite(s, 1, lambda t: _with_column(t, "chosen_token_logps", [[0.0, 0.0], [0.0, 0.0]])),
        P1,
    ),
    "values of NaN": (
        lambda s: _rewrite(s, 1, lambda t: _with_column(t, "ref_rejected_logps", [float("nan")] * 2)),
        P1,
    ),
    "keys swapped": (
        lambda s: _rewrite(s, 1, lambda t: _with_column(t, "pair_key", t["pair_key"].to_pylist()[::-1])),
        P1,
    ),
    "a row left out": (lambda s: _rewrite(s, 1, lambda t: t.slice(1)), P1),
    "rows in another order": (lambda s: _rewrite(s, 1, lambda t: t.take([1, 0])), P1),
    "a column left out": (lambda s: _rewrite(s, 1, lambda t: t.drop_columns(["row"])), P1),
    "a part written anew, all equal": (lambda s: _rewrite(s, 1, lambda t: t), P1),
    "the index emptied": (lambda s: (s / INDEX).write_bytes(b""), INDEX),
    "the index cut": (lambda s: _change_bytes(s, INDEX, lambda c: c[: len(c) // 2]), INDEX),
    "an entry left out": (lambda s: _edit(s, INDEX, lambda i: i["parts"].pop()), INDEX),
    "a digest edited": (lambda s: _edit(s, INDEX, lambda i: i["parts"][0].update(sha256="0" * 64)), INDEX),
    "the noise floor widened": (lambda s: _edit(s, INDEX, lambda i: i["noise"].update(largest=9.0)), INDEX),
    "a name that leads out": (lambda s: _edit(s, INDEX, lambda i: i["parts"][0].update(file="../x.parquet")), INDEX),
    "the manifest deleted": (lambda s: (s / MANIFEST).unlink(), "no shards there"),
    "the manifest emptied": (lambda s: (s / MANIFEST).write_bytes(b""), MANIFEST),
    "the identity edited": (
        lambda s: _edit(s, MANIFEST, lambda m: m["identity"]["reference"].update(dtype="x")),
        MANIFEST,
    ),
    "the plan edited": (lambda s: _edit(s, MANIFEST, lambda m: m["plan"].update(rows_per_shard=4)), MANIFEST),
    "what is declared edited": (lambda s: _edit(s, MANIFEST, lambda m: m["declared"].update(reference="x")), MANIFEST),
    "the manifest of another run": (
        lambda s: (_of_another_run(s, 1), shutil.copy(s.parent / "other" / MANIFEST, s / MANIFEST)),
        INDEX,
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_damage_and_meddling_are_detected_by_readers_and_by_verify_and_named(store: Path, name: str) -> None:
    damage, named = CORRUPTIONS[name]
    damage(store)
    with pytest.raises(RefshardError) as caught:
        list(read_parts(open_store(store)))
    assert isinstance(caught.value, DataError | IdentityError | StorageError)
    assert named in str(caught.value)
    problems = verify_store(LocalFolder(store)).problems
    assert any(named in str(problem) for problem in problems)
    tally("damage and meddling, each by name", 1, outcome="65 or 78, the file named, by readers and by verify")


@pytest.mark.parametrize(
    "name", [name for name, (_, named) in CORRUPTIONS.items() if named.startswith("part") and "all equal" not in name]
)
def test_damage_before_there_is_an_index_never_gets_one_unless_all_is_read_as_it_was_written(
    store: Path, name: str
) -> None:
    damage, named = CORRUPTIONS[name]
    meant = stored_rows(store)
    (store / INDEX).unlink()
    damage(store)
    try:
        missing = finish_store(store, UNITS)
    except RefshardError as error:
        assert named in str(error)
        assert not (store / INDEX).exists()
    else:
        if missing:
            assert [part_name(unit) for unit in missing] == [named]
        else:
            assert name in ("a part twice over", "the magic changed")
            assert stored_rows(store) == meant


def test_there_are_thirty_kinds_of_damage() -> None:
    assert len(CORRUPTIONS) >= 30


def test_verify_names_everything_that_is_wrong_and_not_only_the_first(store: Path) -> None:
    (store / P0).unlink()
    (store / P2).write_bytes(b"")
    problems = [str(problem) for problem in verify_store(LocalFolder(store)).problems]
    assert len(problems) == 2
    assert P0 in problems[0]
    assert P2 in problems[1]


# Several writers.


def _write_noisy(folder: Path, noise: float, barrier: Any) -> None:
    """A worker on all units whose numbers are its own, as another GPU's would be."""
    header = create_store(folder, IDENTITY, PLAN, {})
    barrier.wait(60)
    for unit in range(20):
        pairs = [pair_of(row, [-1 - noise] * 3, [-2 - noise] * 3) for row in (2 * unit, 2 * unit + 1)]
        write_unit(folder, unit, pairs, header, provenance={"w": noise})
    assert finish_store(folder, 20) == []


@pytest.mark.parametrize("rounds", [pytest.param(3, id="some"), pytest.param(20, id="many", marks=pytest.mark.nightly)])
def test_of_four_workers_on_the_same_units_each_unit_is_one_workers_alone(tmp_path: Path, rounds: int) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(rounds):
        folder = tmp_path / str(number)
        barrier = context.Barrier(4)
        workers = [context.Process(target=_write_noisy, args=(folder, 0.1 * i, barrier)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * 4
        for part in read_parts(open_store(folder)):
            chosen, rejected = (
                part[f"{side}_token_logps"].combine_chunks().flatten() for side in ("chosen", "rejected")
            )
            assert len(set(chosen.to_pylist())) == len(set(rejected.to_pylist())) == 1
            assert chosen[0].as_py() - rejected[0].as_py() == pytest.approx(1)
        assert not verify_store(LocalFolder(folder)).problems
        assert not list(folder.glob(".tmp-*"))
    tally("four workers with different numbers on 20 units at once", rounds, outcome="each unit one worker's alone")


def test_temporary_files_are_never_read_and_cleaning_them_beside_writers_is_safe(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folder, barrier = tmp_path / "train", context.Barrier(2)
    folder.mkdir()
    (folder / f".tmp-{'d' * 32}").write_bytes(b"half of a part")
    assert delete_leftovers(LocalFolder(folder)) == 0
    workers = [context.Process(target=_write_noisy, args=(folder, 0.1 * i, barrier)) for i in range(2)]
    for worker in workers:
        worker.start()
    deleted = 0
    # Each time a writer may lose one file, and it writes a file ten times.
    for _ in range(9):
        deleted += delete_leftovers(LocalFolder(folder), older_than=0)
        time.sleep(0.005)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert deleted >= 1
    found = verify_store(LocalFolder(folder))
    assert (found.problems, found.pairs, found.leftovers) == ([], 40, [])
    tally("temporary files deleted under two writers", deleted, outcome="written again")


# Object stores, in memory, with everything that can go wrong in any order.


class _Chaos:
    """A store of objects that loses requests and answers, lists late, and has other writers in it."""

    protocol = ("chaos",)

    def __init__(self, seed: int, others: dict[str, bytes]) -> None:
        self.random = random.Random(seed)
        self.objects: dict[str, bytes] = {}
        self.stale: list[str] = []
        self.others = others

    def _fails(self, chance: float = 0.03) -> None:
        if self.random.random() < chance:
            raise ConnectionError("lost")

    def _meanwhile(self) -> None:
        """Another writer commits one of its parts, the index excepted: only who saw all parts writes that."""
        if self.others and self.random.random() < 0.2:
            name, content = self.random.choice(sorted(self.others.items()))
            self.objects.setdefault(name, content)

    def pipe_file(self, path: str, content: bytes, mode: str) -> None:
        self._meanwhile()
        self._fails(0.1)
        if mode == "create" and path in self.objects:
            raise FileExistsError(path)
        assert path not in self.objects or ".probe-" in path, "an object was replaced"
        self.objects[path] = content
        self._fails(0.2)

    def cat_file(self, path: str) -> bytes:
        self._fails()
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def info(self, path: str) -> dict[str, Any]:
        self._fails()
        if path not in self.objects:
            raise FileNotFoundError(path)
        return {"type": "file", "size": len(self.objects[path])}

    def ls(self, path: str, detail: bool) -> list[str]:
        self._meanwhile()
        self._fails()
        fresh = sorted(self.objects)
        seen = self.stale if self.random.random() < 0.2 else fresh
        self.stale = fresh
        return seen

    def rm_file(self, path: str) -> None:
        self._fails()
        assert ".probe-" in path, "a live object was deleted"
        self.objects.pop(path, None)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of one store, and the parts of it as a worker with other noise would write them."""
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    for folder, noise in ((ours, 0.0), (theirs, 0.1)):
        header = create_store(folder, IDENTITY, PLAN, {})
        for unit in range(3):
            write_unit(folder, unit, [pair_of(2 * unit, [-1 - noise], [-2 - noise])], header)
    return contents(ours), contents(theirs)


@pytest.mark.parametrize(
    "schedules", [pytest.param(300, id="some"), pytest.param(10_000, id="many", marks=pytest.mark.nightly)]
)
def test_in_an_object_store_that_fails_at_random_no_part_is_lost_replaced_or_mixed(
    monkeypatch: pytest.MonkeyPatch, two_runs: tuple[dict[str, bytes], dict[str, bytes]], schedules: int
) -> None:
    ours, theirs = two_runs
    monkeypatch.setattr(folders, "_puts_if_absent", lambda url: True)
    failures = 0
    for seed in range(schedules):
        others = {f"store/{name}": content for name, content in theirs.items() if name.startswith("part")}
        chaos = _Chaos(seed, others)
        monkeypatch.setattr(folders, "_connect", lambda url, chaos=chaos: (chaos, "store"))
        folder = ObjectFolder("chaos://store")
        for _ in range(200):
            try:
                create_store(folder, IDENTITY, PLAN, {})
                for name in (part_name(unit) for unit in range(3)):
                    folder.put_if_absent(name, ours[name])
                if finish_store(folder, 3):
                    continue
                parts = list(read_parts(open_store(folder)))
                break
            except StorageError:
                failures += 1
        else:
            raise AssertionError(f"seed {seed}: never finished")
        assert len(parts) == 3
        for unit in range(3):
            assert chaos.objects[f"store/{part_name(unit)}"] in (ours[part_name(unit)], theirs[part_name(unit)])
        assert json.loads(chaos.objects["store/index.json"])["totals"]["kept"] == 3
    assert failures > schedules / 2
    fault = f"object store in memory that fails at random ({failures:,} failures, other writers, late listings)"
    tally(fault, schedules, outcome="finished; no object replaced or deleted")


def test_a_file_of_a_store_that_is_far_too_large_is_not_read(store: Path) -> None:
    with (store / P1).open("r+b") as file:
        file.truncate(5 * 2**30)
    with pytest.raises(DataError, match=r"part-00001\.parquet: damaged"):
        read_part(open_store(store), 1)
    with pytest.raises(DataError, match="more than any file of a store has"):
        read_content(LocalFolder(store), P1, "Delete it")
