"""Joined sets that are kept: found again by all that they were made from, whole or not at all, harmless to delete."""

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import DataError, StorageError
from pipeline.base.signals import StopFlag
from pipeline.config.data import DataConfig, EvalSetConfig, TrainSetConfig
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.models.files import load_tokenizer
from pipeline.run.inputs import SetInputs
from pipeline.training import joined_cache, joining
from pipeline.training.joined_cache import RECORD, JoinedCache, cached_sets, joined_folder
from pipeline.training.joining import check_joined, join_sets, joined_token_logps, open_joined, open_stores_of_run
from stages import train
from stages.check import command as check
from stages.precompute import command as precompute
from support.runs import simple_rows, write_jsonl
from support.tally import tally

MakeRun = Callable[..., Path]

ROWS = simple_rows(24)
TWIN = {"prompt": "Which one?", "chosen": " Both.", "rejected": " Both."}


class Scored:
    """Settings whose stores are finished, and joins with them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.folder = file.parent
        self.joins = 0

    def config(self, *overrides: str) -> Config:
        return load_config(self.file, overrides)

    def join(self, *overrides: str, cached: bool = True) -> tuple[dict[str, SetInputs], list[Any]]:
        """Join as an attempt does; give the inputs of the sets, and all rows with their token logps."""
        self.joins += 1
        config, folder = self.config(*overrides), self.folder / "attempts" / str(self.joins)
        tokenizer = load_tokenizer(config)
        stores = open_stores_of_run(config, config.data.names, tokenizer)
        cache = JoinedCache(joined_folder(config), lambda: True) if cached else None
        inputs = join_sets(config, stores, tokenizer, folder, StopFlag(), cache=cache)
        check_joined(folder)
        return inputs, rows_of(folder, config)

    @property
    def kept(self) -> list[Path]:
        return sorted((self.folder / "shards" / ".joined").glob("*"))


def rows_of(folder: Path, config: Config) -> list[Any]:
    logps, rows = joined_token_logps(folder), []
    for name in config.data.names:
        for row in open_joined(folder, name).data.table.to_pylist():
            count = len(row["chosen_ids"]) + len(row["rejected_ids"])
            start = row.pop("token_start", -1)
            rows.append((name, repr(row), logps.read(start, count).tobytes() if start >= 0 else b""))
    return rows


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(model_folder, folder / "model")
    write_jsonl(folder / "pairs.jsonl", [*ROWS, TWIN])
    write_jsonl(folder / "heldout.jsonl", simple_rows(6, start=50))
    sections = {
        "data": {
            "path": str(folder / "pairs.jsonl"),
            "max_length": 48,
            "on_bad_row": "stop",
            "eval": {"heldout": {"path": str(folder / "heldout.jsonl")}},
        },
        "policy": {"model": str(folder / "model")},
        "precompute": {"output": str(folder / "shards"), "tokens_per_batch": 512},
        "train": {"output_dir": str(folder / "policy")},
    }
    (folder / "run.yaml").write_text(json.dumps(sections))
    precompute.run(load_config(folder / "run.yaml"))
    Scored(folder / "run.yaml").join()
    shutil.rmtree(folder / "attempts")
    return folder


@pytest.fixture
def joined(original: Path, tmp_path: Path) -> Scored:
    """A copy in which a run has joined."""
    folder = shutil.copytree(original, tmp_path / "run")
    file = folder / "run.yaml"
    file.write_text(file.read_text().replace(str(original), str(folder)))
    return Scored(file)


@pytest.fixture
def scored(joined: Scored) -> Scored:
    """A copy in which no run has joined."""
    shutil.rmtree(joined.folder / "shards" / ".joined")
    return joined


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sets that are tokenized."""
    seen: list[str] = []
    whole = joining.load_pairs

    def load_pairs(source: Any, *given: Any) -> Iterator[Any]:
        seen.append(Path(source.path).stem)
        return whole(source, *given)

    monkeypatch.setattr(joining, "load_pairs", load_pairs)
    return seen


def test_a_second_run_takes_what_the_first_has_joined_and_says_the_same(
    scored: Scored, tokenized: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = scored.join()
    said = capsys.readouterr()
    second = scored.join("train.output_dir=other", "loss.beta=0.5", "loss.type=ipo")
    assert capsys.readouterr() == said
    assert "21 matched, 0 missing" in said.out
    assert list(first[0]) == list(second[0]) == ["train", "heldout"]
    assert second == first
    assert tokenized == ["pairs", "heldout"]
    assert len(scored.kept) == 1


# What is changed, and whether the sets are found afterwards


def no_change(scored: Scored) -> None:
    pass


def shuffle(scored: Scored) -> None:
    write_jsonl(scored.folder / "pairs.jsonl", [TWIN, *ROWS[::-1]])


def drop_a_row(scored: Scored) -> None:
    write_jsonl(scored.folder / "pairs.jsonl", [*ROWS[:5], *ROWS[6:], TWIN])


def drop_a_held_out_row(scored: Scored) -> None:
    write_jsonl(scored.folder / "heldout.jsonl", simple_rows(5, start=50))


def touch(scored: Scored) -> None:
    (scored.folder / "pairs.jsonl").write_bytes((scored.folder / "pairs.jsonl").read_bytes())


def move_data(scored: Scored) -> None:
    (scored.folder / "elsewhere").mkdir()
    shutil.copy(scored.folder / "pairs.jsonl", scored.folder / "elsewhere" / "pairs.jsonl")


def move_model(scored: Scored) -> None:
    shutil.copytree(scored.folder / "model", scored.folder / "moved")


def set_in_tokenizer(scored: Scored, **values: Any) -> None:
    file = scored.folder / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def add_vocabulary(scored: Scored) -> None:
    (scored.folder / "model" / "vocab.txt").write_text("a\n")


def score_again(scored: Scored) -> None:
    for name in ("train", "heldout"):
        shutil.rmtree(scored.folder / "shards" / name)
    precompute.run(scored.config("precompute.rows_per_shard=5"))


Change = tuple[Callable[[Scored], None], tuple[str, ...], bool]
CHANGES: dict[str, Change] = {
    "nothing": (no_change, (), True),
    "the data's times": (touch, (), True),
    "the data's place": (move_data, ("data.path={folder}/elsewhere/pairs.jsonl",), True),
    "the model's place": (move_model, ("policy.model={folder}/moved",), True),
    "beta": (no_change, ("loss.beta=0.7",), True),
    "another loss": (no_change, ("loss.type=[sigmoid, sft]",), True),
    "an adapter": (no_change, ("policy.lora.r=4",), True),
    "the learning rate": (no_change, ("train.learning_rate=3e-4",), True),
    "the run's folder": (no_change, ("train.output_dir=other",), True),
    "rows in another order": (shuffle, (), False),
    "a row less": (drop_a_row, (), False),
    "a held-out row less": (drop_a_held_out_row, (), False),
    "without the held-out set": (no_change, ("data.eval={{}}",), False),
    "a range of rows": (no_change, ("data.split=train[3:20]",), False),
    "columns": (no_change, ("data.columns={{tools: other}}",), False),
    "a shorter cut": (no_change, ("data.max_length=30",), False),
    "bad rows skipped": (no_change, ("data.on_bad_row=skip",), False),
    "equal pairs dropped": (no_change, ("data.on_identical=drop",), False),
    "a date": (no_change, ("data.template_date=2024-01-01",), False),
    "weights of tails": (no_change, ("loss.ld_alpha=0.3",), False),
    "missing pairs": (no_change, ("train.on_missing=drop",), False),
    "a setting of the tokenizer": (lambda scored: set_in_tokenizer(scored, model_max_length=99), (), False),
    "a file of the tokenizer": (add_vocabulary, (), False),
    "the same pairs in other shards": (score_again, (), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_of_what_sets_are_made_from_is_joined_anew_and_no_other(
    joined: Scored, tokenized: list[str], name: str
) -> None:
    change, overrides, found = CHANGES[name]
    change(joined)
    words = tuple(word.format(folder=joined.folder) for word in overrides)
    through_cache = joined.join(*words)
    assert (tokenized == []) == found
    assert len(joined.kept) == (1 if found else 2)
    assert joined.join(*words, cached=False) == through_cache
    tally("a change beside joined sets that are kept", 1, outcome="found or joined anew, the same rows and values")


def test_a_tokenizers_setting_that_no_identity_shows_is_not_hidden_by_the_cache(joined: Scored) -> None:
    """These ids of the end of a text are others, so that no pair has log-probs."""
    set_in_tokenizer(joined, split_special_tokens=True)
    with pytest.raises(DataError, match="21 of 21 pairs"):
        joined.join()


@pytest.mark.parametrize("what", ["library_versions", "digest_of_code"])
def test_other_code_or_libraries_join_anew(
    joined: Scored, tokenized: list[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(joined_cache, what, lambda: {"transformers": "99"} if "versions" in what else "0" * 64)
    joined.join()
    assert len(tokenized) == 2


def entry_of(scored: Scored, tokenizer: Any = None, *overrides: str, keep_missing: bool = False) -> Any:
    config = scored.config(*overrides)
    loaded = load_tokenizer(config)
    stores = open_stores_of_run(config, config.data.names, loaded)
    return cached_sets(scored.folder, config, stores, tokenizer or loaded, keep_missing=keep_missing)


def test_a_window_of_a_moving_reference_has_sets_of_its_own(scored: Scored) -> None:
    assert entry_of(scored) != entry_of(scored, keep_missing=True)


def test_a_held_out_set_that_is_trained_on_is_joined_anew(scored: Scored) -> None:
    """The pairs of weight 0 of a held-out set are joined, those of a training set are not."""
    config, tokenizer = scored.config(), load_tokenizer(scored.config())
    one, two = ({"path": str(scored.folder / name)} for name in ("pairs.jsonl", "heldout.jsonl"))

    def entry(sets: dict[str, Any], held_out: dict[str, Any]) -> Any:
        data = DataConfig(
            sets={name: TrainSetConfig(**own) for name, own in sets.items()},
            eval={name: EvalSetConfig(**own) for name, own in held_out.items()},
        )
        changed = dataclasses.replace(config, data=data)
        return cached_sets(scored.folder, changed, {}, tokenizer, keep_missing=False)

    assert entry({"a": one}, {"b": two}) != entry({"a": one, "b": two}, {})
    more = entry({"a": {**one, "fraction": 0.5}, "b": two}, {})
    assert more is not None and more == entry({"a": one, "b": two}, {})


def test_sets_whose_tokens_depend_on_todays_date_are_not_kept(scored: Scored) -> None:
    class Clock:
        chat_template = "{{ strftime_now('%d %b %Y') }}"

    assert entry_of(scored, Clock()) is None
    assert entry_of(scored) is not None


def test_a_streamed_dataset_is_not_kept_and_a_fetched_one_is_known_by_its_content(
    scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fetched:
        cache_files = [{"filename": str(scored.folder / "heldout.jsonl")}]

    monkeypatch.setattr("datasets.load_dataset", lambda *given, **more: Fetched())
    hub = ("data.path=owner/pairs", "data.format=hub", "data.eval={}")
    first = entry_of(scored, None, *hub)
    drop_a_held_out_row(scored)
    assert first is not None
    assert entry_of(scored, None, *hub) not in (None, first)
    assert entry_of(scored, None, *hub, "data.streaming=true") is None


# Damage, deletion, several at once


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "flipped") for name in ("train.arrow", "heldout.arrow", "token-logps.f32", RECORD)),
        ("train.arrow", "cut"),
        *((name, "gone") for name in ("token-logps.f32", RECORD)),
    ],
)
def test_damaged_sets_are_never_used_and_made_again(
    joined: Scored, tokenized: list[str], capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    [kept] = joined.kept
    file = kept / name
    match how:
        case "flipped":
            flip(file)
        case "cut":
            file.write_bytes(file.read_bytes()[:-9])
        case "gone":
            file.unlink()
    made_again = joined.join()
    assert "can't be used" in capsys.readouterr().err
    assert tokenized == ["pairs", "heldout"]
    assert joined.join() == made_again == joined.join(cached=False)
    assert len(tokenized) == 4
    tally(f"a file of kept joined sets {how}", 1, outcome="joined anew, the same rows and values")


def test_a_count_that_was_edited_is_noticed(scored: Scored, tokenized: list[str]) -> None:
    expected = scored.join()
    [kept] = scored.kept
    (kept / RECORD).write_text((kept / RECORD).read_text().replace('"matched": 21', '"matched": 20'))
    assert scored.join() == expected
    assert len(tokenized) == 4


def test_what_is_half_made_is_not_found(scored: Scored, tokenized: list[str]) -> None:
    scored.join()
    [kept] = scored.kept
    kept.rename(kept.with_name(f".tmp-{'0' * 32}"))
    scored.join()
    assert len(tokenized) == 4


def test_a_run_keeps_its_files_when_the_cache_is_deleted(scored: Scored) -> None:
    _, expected = scored.join()
    shutil.rmtree(scored.folder / "shards" / ".joined")
    folder = scored.folder / "attempts" / "1"
    check_joined(folder)
    assert rows_of(folder, scored.config()) == expected


def test_where_links_can_not_be_made_files_are_copied(
    scored: Scored, tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any, **more: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    first = scored.join()
    assert scored.join() == first
    assert len(tokenized) == 2
    [kept] = scored.kept
    assert (kept / "train.arrow").stat().st_nlink == 1


def test_a_cache_that_can_not_be_written_costs_time_alone(
    scored: Scored, tokenized: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (scored.folder / "shards" / ".joined").write_text("not a folder")
    first = scored.join()
    assert "not kept for later runs" in capsys.readouterr().err
    assert scored.join() == first
    assert len(tokenized) == 4


def test_a_full_disk_of_the_cache_leaves_nothing_half_made(
    scored: Scored, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = joined_cache._link

    def full(source: Path, target: Path) -> None:
        if target.name == "token-logps.f32":
            raise OSError(28, "No space left on device")
        whole(source, target)

    monkeypatch.setattr(joined_cache, "_link", full)
    scored.join()
    assert scored.kept == []
    assert "No space left" in capsys.readouterr().err


def test_a_full_disk_of_the_run_deletes_nothing_of_the_cache(
    scored: Scored, tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored.join()
    with monkeypatch.context() as patch:
        patch.setattr(joined_cache, "_link", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left")))
        scored.join()
    assert len(tokenized) == 4
    scored.join()
    assert len(tokenized) == 4


def test_of_two_processes_that_join_at_once_the_first_is_kept(
    scored: Scored, capsys: pytest.CaptureFixture[str]
) -> None:
    config = scored.config()
    tokenizer = load_tokenizer(config)
    stores = open_stores_of_run(config, config.data.names, tokenizer)

    def other_is_faster() -> bool:
        scored.join()
        return True

    mine = scored.folder / "attempts" / "mine"
    join_sets(config, stores, tokenizer, mine, StopFlag(), cache=JoinedCache(joined_folder(config), other_is_faster))
    [kept] = scored.kept
    assert (kept / "train.arrow").samefile(scored.folder / "attempts" / "1" / "train.arrow")
    check_joined(mine)
    assert capsys.readouterr().err == ""


def test_sets_that_changed_while_they_were_joined_are_not_kept(scored: Scored) -> None:
    config = scored.config()
    tokenizer = load_tokenizer(config)
    stores = open_stores_of_run(config, config.data.names, tokenizer)
    cache = JoinedCache(joined_folder(config), lambda: False)
    join_sets(config, stores, tokenizer, scored.folder / "joined", StopFlag(), cache=cache)
    assert scored.kept == []


def test_those_used_last_are_kept_and_what_is_not_ours_stays(scored: Scored, tmp_path: Path) -> None:
    scored.join()
    [kept] = scored.kept
    folder = kept.parent
    for i in range(9):
        other = shutil.copytree(kept, folder / f"{i:064x}")
        os.utime(other / RECORD, (1000 + i, 1000 + i))
    for name, age in ((f".tmp-{'1' * 32}", 10**6), (f".tmp-{'2' * 32}", 60), ("notes", 10**6)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    scored.join("data.max_length=30")
    names = {path.name for path in scored.kept}
    assert {f".tmp-{'2' * 32}", "notes", kept.name} < names
    assert f".tmp-{'1' * 32}" not in names
    assert sorted(name for name in names if name.startswith("0" * 60)) == [f"{i:064x}" for i in range(3, 9)]


def test_the_cache_lies_beside_the_stores_or_where_the_settings_say(
    scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = scored.config()
    assert joined_folder(config) == scored.folder / "shards" / ".joined"
    assert joined_folder(scored.config("train.joined_dir=/fast/joined")) == Path("/fast/joined")
    in_bucket = dataclasses.replace(config, precompute=dataclasses.replace(config.precompute, output="s3://b/shards"))
    assert joined_folder(in_bucket) == tmp_path / "refshard" / "joined"


def test_a_resumed_run_that_finds_its_sets_has_the_weights_of_one_that_joins_again(
    make_run: MakeRun, tmp_path: Path, tokenized: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    file = make_run(train={**schedule, "max_steps": 2})
    precompute.run(load_config(file))
    train.run(load_config(file))
    capsys.readouterr()
    check.run(load_config(file), hardware="rtx4090-24gb", rows=None, limits=check.Limits(), as_json=False)
    assert re.search(r"^joined sets: \d.* kB, taken as they are; \S+$", capsys.readouterr().out, re.MULTILINE)
    shutil.copytree(tmp_path / "policy", tmp_path / "again")
    longer = load_config(file, ["train.max_steps=4"])
    train.run(longer)
    assert tokenized == ["pairs"]
    shutil.rmtree(tmp_path / "shards" / ".joined")
    train.run(load_config(file, ["train.max_steps=4", f"train.output_dir={tmp_path / 'again'}"]))
    assert tokenized == ["pairs", "pairs"]
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("policy", "again"))
    assert one == other
    assert not (tmp_path / "policy" / "joined").exists()
    tally("a run resumed with its joined sets found, and joined again", 2, outcome="the same weights bit for bit")


@pytest.mark.parametrize("gone", ["token-logps.f32", "train.arrow"])
def test_sets_of_which_a_newer_attempt_deletes_a_file_are_not_kept(
    scored: Scored, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Kept without it, they would stop every later run."""
    join = joining.join

    def join_and_lose(pairs: Any, table: Any, file: Path, **options: Any) -> Any:
        report = join(pairs, table, file, **options)
        if file.name == "heldout.arrow":
            (file.parent / gone).unlink()
        return report

    monkeypatch.setattr(joining, "join", join_and_lose)
    with pytest.raises(StorageError, match=gone):
        scored.join()
    assert scored.kept == []
