"""`refshard verify`: whole, unfinished, damaged, another's; leftovers; the model asked again."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base.folders import LocalFolder
from pipeline.data.intake import Ledger
from pipeline.scoring.agreement import NoiseFloor
from pipeline.store.finishing import finish_store
from pipeline.store.format import ScoredPair, SummedPair, sealed
from pipeline.store.store import create_store, write_part
from pipeline.store.verify import delete_leftovers, verify_store
from support.models import make_model
from support.runs import refshard, simple_rows, write_jsonl
from support.stores import IDENTITY, PLAN, contents

MakeRun = Callable[..., Path]


def pair(row: int, key: int | None = None, logp: float = -1.0) -> ScoredPair:
    return ScoredPair(
        key=bytes(15) + bytes([row if key is None else key]),
        row=row,
        prompt_tokens=2,
        chosen_token_logps=np.array([logp, -0.5], np.float32),
        rejected_token_logps=np.array([-2.0], np.float32),
    )


def store_of(folder: Path, units: list[list[Any]], plan: dict[str, Any] = PLAN) -> LocalFolder:
    header = create_store(folder, IDENTITY, plan, {})
    for unit, pairs in enumerate(units):
        rows = max(len(pairs), plan["rows_per_shard"])
        ledger = Ledger(rows=rows, kept=len(pairs), dropped=Counter(identical=rows - len(pairs)))
        write_part(folder, unit, pairs, ledger, NoiseFloor(tokens=4, mean=0.1, largest=0.2), header=header)
    finish_store(folder, len(units))
    return LocalFolder(folder)


def problems_of(folder: LocalFolder) -> str:
    return "\n".join(map(str, verify_store(folder).problems))


def test_a_whole_store_has_no_problems_and_is_counted(tmp_path: Path) -> None:
    found = verify_store(store_of(tmp_path, [[pair(0), pair(1)], [pair(2)]]))
    assert (found.parts, found.pairs, found.token_logps, found.problems) == (2, 3, 9, [])
    assert (found.duplicates, found.leftovers, found.unknown_files) == (0, [], [])


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        ([[pair(0), pair(5)]], "it holds rows 0 to 5, its unit's are 0 to 1"),
        ([[pair(0), pair(1)], [pair(1), pair(2)]], "its rows do not ascend, or an earlier part holds one of them"),
        ([[pair(1), pair(0)]], "its rows do not ascend"),
        ([[pair(0)], []], ""),
    ],
)
def test_rows_must_be_their_units_and_be_there_once(tmp_path: Path, units: list[Any], problem: str) -> None:
    found = problems_of(store_of(tmp_path, units))
    assert problem in found
    assert bool(found) == bool(problem)


def test_the_index_counts_what_its_parts_count(tmp_path: Path) -> None:
    folder = store_of(tmp_path, [[pair(0), pair(1)], [pair(2)]])
    index = json.loads(folder.read("index.json"))
    index["totals"]["dropped"] = {"identical": 3}
    index["totals"]["noted"] = {"truncated": 1}
    index["noise"]["tokens"] = 9
    del index["sha256"]
    folder.replace("index.json", sealed(index))
    found = problems_of(folder)
    assert "totals.dropped.identical is 3, its parts add up to 1" in found
    assert "totals.noted.truncated is 1, its parts add up to None" in found
    assert "noise.tokens is 9, its parts add up to 8" in found
    assert len(found.splitlines()) == 3


def test_each_part_but_the_last_counts_the_rows_of_a_unit(tmp_path: Path) -> None:
    header = create_store(tmp_path, IDENTITY, PLAN, {})
    for unit in range(2):
        write_part(tmp_path, unit, [pair(2 * unit)], Ledger(rows=1, kept=1), header=header)
    finish_store(tmp_path, 2)
    assert problems_of(LocalFolder(tmp_path)) == f"{tmp_path}/part-00000.parquet: it counts 1 rows, a unit has 2"


def test_rows_of_a_range_are_counted_from_its_start(tmp_path: Path) -> None:
    plan = {**PLAN, "rows": "100:104"}
    assert not problems_of(store_of(tmp_path / "right", [[pair(100), pair(101)], [pair(103)]], plan))
    assert "its unit's are 100 to 101" in problems_of(store_of(tmp_path / "wrong", [[pair(0), pair(1)]], plan))
    plan = {**PLAN, "rows": "100:101"}
    assert "its unit's are 100 to 100" in problems_of(store_of(tmp_path / "past", [[pair(100), pair(101)]], plan))


def test_equal_keys_may_differ_by_noise_alone(tmp_path: Path) -> None:
    near = store_of(tmp_path / "near", [[pair(0, key=7), pair(1, key=7, logp=-1.001)]])
    found = verify_store(near)
    assert (found.duplicates, found.problems) == (1, [])
    assert found.largest_gap == pytest.approx(0.001, rel=0.01)
    far = store_of(tmp_path / "far", [[pair(0, key=7)], [pair(2, key=7, logp=-5.0)]])
    assert "two pairs with one key have log-probs that differ by 4 nats" in problems_of(far)


def test_sums_and_token_counts_must_be_those_of_the_token_logps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made with the writer itself, its arithmetic broken: nothing but a look at the values can tell."""
    from pipeline.store import format

    side_of = format._side_of

    def wrong_sums(pairs: Any, side: str) -> Any:
        lengths, sums, lists = side_of(pairs, side)
        return lengths, sums + np.float32(0.25), lists

    monkeypatch.setattr(format, "_side_of", wrong_sums)
    found = problems_of(store_of(tmp_path, [[pair(0), pair(1)]]))
    assert "row 0: ref_chosen_logps is not the sum of its token logps" in found
    assert "row 0: ref_rejected_logps is not the sum" in found


def test_sums_alone_are_checked_too(tmp_path: Path) -> None:
    identity = {**IDENTITY, "tokenization": {**IDENTITY["tokenization"], "token_logps": False}}
    header = create_store(tmp_path, identity, PLAN, {})
    summed = SummedPair(
        key=bytes(16), row=0, prompt_tokens=2, chosen_tokens=2, rejected_tokens=1, chosen_logps=-1, rejected_logps=-2
    )
    write_part(tmp_path, 0, [summed], Ledger(1, 1), header=header)
    finish_store(tmp_path, 1)
    found = verify_store(LocalFolder(tmp_path))
    assert (found.pairs, found.token_logps, found.problems) == (1, 3, [])


def test_nothing_is_deleted_in_another_programs_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    left = tmp_path / f".tmp-{'a' * 32}"
    left.write_bytes(b"")
    assert delete_leftovers(LocalFolder(tmp_path), older_than=0) == 0
    assert left.exists()


@pytest.mark.parametrize("changed", ["gone", "cut", "edited", "another's", "a FIFO"])
def test_the_list_of_skipped_rows_is_compared_with_the_parts(tmp_path: Path, changed: str) -> None:
    folder, file = LocalFolder(tmp_path), tmp_path / "skipped.jsonl"
    skipped = [{"row": row, "place": "p.jsonl", "reason": "not_json", "message": "é \ud800"} for row in (0, 1)]
    counts = Ledger(rows=2, dropped=Counter(not_json=2), skipped=[] if changed == "another's" else skipped)
    write_part(folder, 0, [], counts, header=create_store(folder, IDENTITY, PLAN, {}))
    finish_store(folder, 1)
    assert problems_of(folder) == ""
    content = b"" if changed == "another's" else file.read_bytes()
    file.unlink(missing_ok=True)
    match changed:
        case "cut":
            file.write_bytes(content[: content.index(b"\n") + 1])
        case "edited":
            file.write_bytes(content.replace(b'"row": 1', b'"row": 7'))
        case "another's":
            file.write_bytes(b"{}\n")
        case "a FIFO":
            os.mkfifo(file)
    assert "skipped.jsonl: " in problems_of(folder)
    if changed == "a FIFO":
        file.unlink()
    # As the message says.
    (tmp_path / "index.json").unlink()
    finish_store(folder, 1)
    assert problems_of(folder) == ""
    assert (file.read_bytes() if file.exists() else b"") == content


@pytest.mark.slow
def test_the_command_tells_whole_unfinished_damaged_and_cleans_up(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(rows=simple_rows(24), data={"eval": {"test": {"split": "train[:8]"}}})
    folder = tmp_path / "shards" / "train"
    refshard("precompute", "--config", config, "--worker", "0/2")
    said = refshard("verify", tmp_path / "shards", check=75)
    assert "unfinished" in said.stdout
    assert "unfinished, 2 parts so far and no index" in said.stderr
    refshard("precompute", "--config", config)

    left, theirs = folder / f".tmp-{'a' * 32}", folder / ".tmp-mine"
    left.write_bytes(b"half")
    theirs.write_text("theirs")
    (folder / "notes.txt").write_text("mine")
    said = refshard("verify", tmp_path / "shards")
    assert said.stdout.count("  whole ") == 2
    assert "3 parts, 24 pairs" in said.stdout
    assert "1 temporary files" in said.stdout
    assert ".tmp-mine, notes.txt: not part of the store" in said.stdout
    before = contents(folder)
    assert "deleted     0 temporary files" in refshard("verify", folder, "--clean").stdout
    for file in (left, theirs):
        os.utime(file, (1, 1))
    assert "deleted     1 temporary files" in refshard("verify", folder, "--clean").stdout
    assert (left.exists(), theirs.read_text()) == (False, "theirs")
    assert contents(folder) == before

    (folder / "part-00001.parquet").write_bytes(before["part-00000.parquet"])
    (folder / "part-00002.parquet").unlink()
    said = refshard("verify", tmp_path / "shards", check=65)
    assert said.stderr.count("problem     ") == 2
    assert "2 problems, the first:" in said.stderr
    refshard("verify", tmp_path / "nothing", check=65)


@pytest.mark.slow
def test_the_model_is_asked_again_and_another_model_or_dataset_or_value_is_found_out(
    make_run: MakeRun, tmp_path: Path, model_folder: Path, tokenizer: Any
) -> None:
    config = make_run(rows=simple_rows(40))
    refshard("precompute", "--config", config)
    shards = tmp_path / "shards"
    said = refshard("verify", shards, "--model", model_folder, "--sample", 10).stdout
    assert "10 pairs scored again" in said

    other = make_model(tmp_path / "other", tokenizer, seed=1)
    said = refshard("verify", shards, "--model", other, check=78).stderr
    assert "not the reference" in said
    assert "reference.weights" in said

    # Values of another model under this one's name, which every checksum agrees with.
    refshard(
        "precompute", "--config", config, "-o", f"policy.model={other}", "-o", f"precompute.output={tmp_path / 'o'}"
    )
    (tmp_path / "forged").mkdir()
    _forge(tmp_path / "o" / "train", shards / "train", tmp_path / "forged" / "train")
    assert "whole" in refshard("verify", tmp_path / "forged").stdout
    said = refshard("verify", tmp_path / "forged", "--model", model_folder, check=65).stderr
    assert "nats on average" in said

    rows = simple_rows(40)
    rows[0]["chosen"] = " Something else."
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    said = refshard("verify", shards, "--model", model_folder, check=65).stderr
    assert "row 0 is not what was scored" in said


def _forge(values: Path, identity: Path, target: Path) -> None:
    """A store that says it is of one reference and holds the values of another."""
    from pipeline.store.store import open_store, read_parts

    source, manifest = open_store(values), json.loads((identity / "manifest.json").read_text())
    header = create_store(target, manifest["identity"], manifest["plan"], manifest["declared"])
    for unit, part in enumerate(read_parts(source)):
        pairs = [
            ScoredPair(
                key=row["pair_key"],
                row=row["row"],
                prompt_tokens=row["prompt_tokens"],
                chosen_token_logps=np.array(row["chosen_token_logps"], np.float32),
                rejected_token_logps=np.array(row["rejected_token_logps"], np.float32),
            )
            for row in part.to_pylist()
        ]
        ledger = Ledger(rows=len(pairs), kept=len(pairs))
        write_part(target, unit, pairs, ledger, header=header)
    finish_store(target, len(source.units))
