"""Each damage of the table is refused by place and reason or read whole, by the functions that the commands use.

One damage of each kind goes through the real commands too: the exit status says the kind; one line says what, where,
and what to do. An exception other than `RefshardError` would be "this is a bug" to the user, so it fails the test; so
does an input that takes long.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from pipeline.base.errors import RefshardError, one_line
from pipeline.base.folders import LocalFolder
from pipeline.config.data import DataConfig
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.data import readers
from pipeline.data.intake import KeptPair, Ledger, kept_pairs
from pipeline.data.sources import count_rows, open_source, read_rows
from pipeline.models.files import NamedModel, load_tokenizer
from pipeline.models.identity import identity_of_run
from pipeline.models.loading import load_policy, load_reference
from pipeline.store.verify import verify_store
from stages import cli, inspect
from support.damage import (
    ADAPTERS,
    DATA,
    EVIL,
    GOOD,
    LINE,
    MARK,
    MODELS,
    PART,
    SETTINGS,
    SMALLEST,
    STORES,
    TEMPLATE,
    WRONG_VALUES,
    Damage,
    bytes_of,
    json_paths,
    make_table,
    signed,
)
from support.models import make_model, make_tokenizer
from support.processes import ROOT
from support.runs import refshard, simple_rows, write_config, write_jsonl
from support.stores import stored_rows
from support.tally import tally

MakeRun = Callable[..., Path]

SECONDS = 5.0
"""Processor time that an input may take at most; most take milliseconds"""

TOKENIZER = make_tokenizer(bos=True, template=TEMPLATE)


def refusal(act: Callable[[], object], case: Damage, place: str) -> RefshardError | None:
    """Act, and compare the outcome with the table; give the error, None if the input was accepted."""
    start = time.process_time()
    try:
        act()
    except RefshardError as error:
        message = one_line(str(error))
        assert error.exit_status in case.statuses, message
        assert place in message
        assert len(message) < 3000
        return error
    finally:
        assert time.process_time() - start < SECONDS
    assert 0 in case.statuses
    return None


def test_the_table_is_large_and_each_case_its_own() -> None:
    cases = [*DATA.values(), *SETTINGS.values()]
    assert len(cases) >= 200
    assert len({(case.file, case.content) for case in cases}) == len(cases)


# Data and settings


def take(file: Path, on_bad_row: str) -> tuple[list[KeptPair], Ledger]:
    data = DataConfig(path=str(file), on_bad_row=on_bad_row)  # type: ignore[arg-type]
    source, ledger = open_source(data), Ledger()
    count_rows(source)
    return list(kept_pairs(read_rows(source), TOKENIZER, data, ledger)), ledger


def refused(file: Path) -> RefshardError:
    with pytest.raises(RefshardError) as caught:
        take(file, "stop")
    return caught.value


@pytest.mark.parametrize("case", DATA.values(), ids=DATA)
def test_data_is_read_whole_or_refused_by_place_and_reason(case: Damage, tmp_path: Path) -> None:
    file, start = case.make(tmp_path), time.process_time()
    if case.status == 0:
        kept, ledger = take(file, "stop")
        assert len(kept) == ledger.rows == ledger.kept == case.kept
    elif error := refusal(lambda: take(file, "stop"), case, file.name):
        reason = getattr(error, "reason", None)
        assert case.names == reason or case.names in str(error)
        if reason is not None:
            assert "data.on_bad_row: skip" in str(error)
    if case.in_row:
        kept, ledger = take(file, "skip")
        assert len(kept) == case.kept
        assert ledger.dropped == {case.names: 1}
        assert ledger.rows == 3
        assert [entry["row"] for entry in ledger.skipped] == [1]
    assert time.process_time() - start < SECONDS
    tally("malformed or odd data", 1, outcome="refused by file, line and reason, or read whole")


def read_settings(file: Path) -> None:
    config = load_config(file)
    open_source(config.data)
    _ = config.train.options


@pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS)
def test_settings_are_refused_by_file_or_key(case: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_bytes(LINE)
    (tmp_path / "good.yaml").write_bytes(SMALLEST + b"train: {output_dir: o}\n")
    read_settings(tmp_path / "good.yaml")
    file = case.make(tmp_path)
    error = refusal(lambda: read_settings(file), case, case.names)
    assert "secret" not in str(error)
    tally("malformed settings", 1, outcome="refused by file or key")


def test_a_long_line_is_never_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LARGEST_ROW", 2**16)
    (tmp_path / "p.jsonl").write_bytes(LINE + b"a" * 2**24 + b"\n" + LINE)
    rows = read_rows(open_source(DataConfig(path=str(tmp_path / "p.jsonl"))))
    tracemalloc.start()
    assert sum(1 for _ in rows) == 3
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_text_stored_once_for_many_rows_stays_one_in_memory(tmp_path: Path) -> None:
    # 256 rows of a batch, unpacked, would be 256 MB.
    text = pa.DictionaryArray.from_arrays(np.zeros(256, np.int32), [" " + "a" * 1_000_000])
    pq.write_table(make_table(256, chosen=text), tmp_path / "p.parquet")
    assert (tmp_path / "p.parquet").stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    rows = list(read_rows(open_source(DataConfig(path=str(tmp_path / "p.parquet")))))
    assert len(rows) == 256
    assert pa.total_allocated_bytes() - before < 20_000_000
    assert len(rows[-1].load()["chosen"]) == 1_000_001


def test_flipped_bits_in_parquet_are_never_a_bug_nor_a_lost_row(tmp_path: Path) -> None:
    rows = [{**GOOD, "chosen": f" Yes {i}."} for i in range(300)]
    whole = bytes_of(pa.Table.from_pylist(rows), row_group_size=100, write_page_checksum=True)
    random, refusals = np.random.default_rng(0), 0
    for _ in range(150):
        changed = bytearray(whole)
        changed[random.integers(len(whole))] ^= 1 << random.integers(8)
        (tmp_path / "p.parquet").write_bytes(changed)
        try:
            kept, _ = take(tmp_path / "p.parquet", "stop")
        except RefshardError as error:
            assert error.exit_status == 65
            refusals += 1
            continue
        assert len(kept) == 300
    assert refusals > 50


def test_a_footer_that_can_not_be_true_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(make_table(100), tmp_path / "p.parquet", row_group_size=50)
    monkeypatch.setattr(readers, "_LARGEST_GROUP", 10)
    assert "unpacks to more than 10 bytes" in str(refused(tmp_path / "p.parquet"))


def test_a_disk_that_fails_under_parquet_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(make_table(), tmp_path / "p.parquet")

    def refuse(file: Path) -> Any:
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(readers, "open_file", refuse)
    error = refused(tmp_path / "p.parquet")
    assert error.exit_status == 74
    assert "Input/output error" in str(error)


def test_an_array_that_is_too_large_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_LARGEST_ARRAY", 2**20)
    (tmp_path / "p.json.gz").write_bytes(gzip.compress(b"[" + b" " * 2**24))
    tracemalloc.start()
    assert "a JSON array of more than" in str(refused(tmp_path / "p.json.gz"))
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


# Models and adapters


def load_all(folder: Path, **policy: str) -> Config:
    """Load what either stage loads of a policy and its reference."""
    config = load_config(
        write_config(folder.parent / "run.yaml", data={"path": "x"}, policy=policy, precompute={"output": "y"})
    )
    identity_of_run(config, load_tokenizer(config))
    NamedModel.policy(config).text_config()
    load_reference(config, torch.device("cpu"))
    load_policy(config)
    return config


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = LlamaForCausalLM.from_pretrained(model_folder)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def load_damaged(case: Damage, folder: Path, **policy: str) -> None:
    """Damage a copy, load it, and see that no code or pickle in it was run."""
    case.make(folder)
    error = refusal(lambda: load_all(folder, **policy), case, str(folder))
    if error is not None:
        assert "policy.model" in str(error) or "adapter" in policy or error.exit_status == 65
        assert case.names in str(error)
    assert not (folder.parent / MARK).exists()
    tally("a damaged model or adapter, or one with code", 1, outcome="refused by its setting, or loaded; nothing run")


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_a_damaged_model_is_refused_by_its_key_or_loads(case: Damage, model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    load_damaged(case, folder, model=str(folder))


@pytest.mark.parametrize("case", ADAPTERS.values(), ids=ADAPTERS)
def test_a_damaged_adapter_is_refused_by_its_folder_or_loads(
    case: Damage, model_folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text(EVIL.format(mark=str(tmp_path / MARK)))
    monkeypatch.syspath_prepend(tmp_path)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    load_damaged(case, folder, model=str(model_folder), adapter=str(folder))


# Stores


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """An output folder with one finished store of three parts, as `make_run` without changes would make it."""
    folder = tmp_path_factory.mktemp("scored")
    data = write_jsonl(folder / "pairs.jsonl", simple_rows(24))
    config = write_config(
        folder / "run.yaml",
        data={"path": str(data), "max_length": 128},
        policy={"model": str(model_folder)},
        precompute={"output": str(folder / "shards"), "rows_per_shard": 8, "tokens_per_batch": 512},
    )
    refshard("precompute", "--config", config)
    return folder / "shards"


@pytest.mark.slow
@pytest.mark.parametrize("case", STORES.values(), ids=STORES)
def test_a_damaged_store_is_refused_by_name(case: Damage, scored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scored / "train", tmp_path / "train")
    case.make(folder)
    assert case.names in str(refusal(lambda: stored_rows(folder), case, str(folder)))
    tally("a store damaged in one of many ways", 1, outcome="refused by name")


@pytest.mark.slow
@pytest.mark.parametrize("sign", [bytes, signed], ids=["edited", "signed"])
@pytest.mark.parametrize("file", ["manifest.json", "index.json"])
@pytest.mark.parametrize(
    "values",
    [pytest.param((None, -1, "x", {}), id="some"), pytest.param(WRONG_VALUES, id="all", marks=pytest.mark.nightly)],
)
def test_any_wrong_value_in_a_store_s_json_is_refused_or_changes_no_row(
    scored: Path, tmp_path: Path, file: str, sign: Callable[[bytes], bytes], values: tuple[Any, ...]
) -> None:
    folder = shutil.copytree(scored / "train", tmp_path / "train")
    expected, content = stored_rows(folder), (folder / file).read_text()
    tried = refusals = 0
    for path in json_paths(json.loads(content)):
        for value in (*values, ...):
            tree = parent = json.loads(content)
            for key in path[:-1]:
                parent = parent[key]
            if value is ...:
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            (folder / file).write_bytes(sign(json.dumps(tree).encode()))
            tried += 1
            try:
                found = stored_rows(folder)
                assert verify_store(LocalFolder(folder)).parts
                inspect.run(str(folder), as_json=False)
            except RefshardError as error:
                assert error.exit_status in (65, 74, 75, 78)
                refusals += 1
                continue
            assert found == expected, (path, value)
    assert tried > 80
    assert refusals > tried // 3
    tally(f"a wrong value in {file}", tried, outcome="refused, or not a row changed")


# Through the real commands

PROGRESS = re.compile(
    r"\s*$|.*\d+%\|.*|.*\d+it \[.*|[\w-]+: [\d,]+( of [\d,]+)? (rows|steps), .*(tokens/s|GiB).*"
    r"|step [\d,]+: held-out .*|warning: .*"
)


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """Give the one line that the command failed with; all else on stderr must be progress or warnings."""
    lines = result.stderr.splitlines()
    found = [line for line in lines if line.startswith("refshard:")]
    assert len(found) == 1, result.stderr
    assert [line for line in lines if line not in found and not PROGRESS.match(line)] == []
    assert "Traceback" not in result.stdout + result.stderr
    assert "this is a bug" not in found[0]
    return found[0]


@pytest.fixture
def scored_run(make_run: MakeRun, scored: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A config whose shards are finished, and the store, which a test may damage."""
    shutil.copytree(scored, tmp_path / "shards")
    return make_run(), tmp_path / "shards" / "train"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["jsonl row: too long", "csv: open quote", "parquet: encrypted", "disk: offsets out of bounds"]
)
def test_bad_data_stops_the_command_with_its_place_and_leaves_no_store(
    make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    file = DATA[name].make(tmp_path)
    message = complaint(refshard("precompute", "--config", make_run(data={"path": str(file)}), check=65))
    assert str(file) in message
    if DATA[name].in_row:
        assert f"{file}:2" in message
        assert "data.on_bad_row: skip" in message
    assert not (tmp_path / "shards" / "train" / "index.json").exists()


@pytest.mark.slow
def test_wrong_settings_stop_either_command_before_any_work(make_run: MakeRun, tmp_path: Path) -> None:
    laughs = SETTINGS["yaml: many laughs"].make(tmp_path)
    assert str(laughs) in complaint(refshard("precompute", "--config", laughs, check=2))
    config = make_run()
    for command in ("precompute", "train"):
        message = complaint(refshard(command, "--config", config, "-o", "data.max_lenght=64", check=2))
        assert "data.max_lenght" in message
        assert "max_length" in message
    assert str(tmp_path / "gone") in complaint(refshard("train", "--config", tmp_path / "gone", check=2))
    message = complaint(refshard("precompute", "--config", config, "-o", "data.path=gone.jsonl", check=2))
    assert "data.path" in message
    assert "gone.jsonl" in message
    assert not (tmp_path / "shards").exists()
    assert not (tmp_path / "policy").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no weights", "weights cut at 100000"])
def test_a_damaged_model_stops_either_command(
    scored_run: tuple[Path, Path], model_folder: Path, tmp_path: Path, name: str
) -> None:
    config, _ = scored_run
    folder = shutil.copytree(model_folder, tmp_path / "model")
    MODELS[name].make(folder)
    (status,) = MODELS[name].statuses
    elsewhere = ("-o", f"precompute.output={tmp_path / 'other'}")
    for words, key in (
        (("precompute", "-o", f"reference.model={folder}", *elsewhere), "reference.model"),
        (("train", "-o", f"policy.model={folder}", "-o", f"reference.model={model_folder}"), "policy.model"),
    ):
        message = complaint(refshard(words[0], "--config", config, *words[1:], check=status))
        assert key in message
        assert str(folder) in message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["part flipped at 0.5", "part gone", "index gone", "index.json is b'{'"])
def test_a_damaged_store_stops_training_and_inspect(scored_run: tuple[Path, Path], name: str) -> None:
    config, store = scored_run
    STORES[name].make(store)
    (status,) = STORES[name].statuses
    for words in (("train", "--config", config), ("inspect", store)):
        message = complaint(refshard(*words, check=status))
        assert str(store) in message
        assert STORES[name].names in message
        assert "refshard precompute" in message or not name.startswith("part")
    if name == "part gone":
        # The remedy that the message names works.
        (store / "index.json").unlink()
        refshard("precompute", "--config", config)
        refshard("inspect", store)
        assert (store / PART).exists()


@pytest.mark.slow
def test_a_store_that_is_not_there_or_can_not_be_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    config, output = make_run(), tmp_path / "shards"
    message = complaint(refshard("train", "--config", config, check=65))
    assert str(output / "train") in message
    assert "refshard precompute" in message
    for folder in (tmp_path, tmp_path / "gone"):
        assert str(folder) in complaint(refshard("inspect", folder, check=65))
    output.write_text("a file\n")
    assert str(output) in complaint(refshard("precompute", "--config", config, check=74))


@pytest.mark.slow
def test_a_policy_without_an_embedding_for_a_token_is_refused_by_its_key(
    scored_run: tuple[Path, Path], model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    config, _ = scored_run
    small = make_model(tmp_path / "small", tokenizer, vocab_size=300)
    words = ("-o", f"policy.model={small}", "-o", f"reference.model={model_folder}")
    message = complaint(refshard("train", "--config", config, *words, check=2))
    assert "policy.model" in message
    assert "the model's vocabulary has 300" in message
    assert f"{tmp_path / 'pairs.jsonl'}:" in message


IDENTICAL = {"prompt": "Same?", "chosen": " Same.", "rejected": " Same."}
LONG = {"prompt": "word " * 500, "chosen": " Yes.", "rejected": " No."}


def totals(store: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((store / "index.json").read_text())["totals"]
    return found


@pytest.mark.slow
def test_skipped_dropped_and_noted_rows_are_counted_on_screen_and_listed_in_a_file(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config, store = make_run(data={"on_bad_row": "skip"}), tmp_path / "shards" / "train"
    names = ("cut at 11", "list", "no rejected", "chosen is int", "rejected is null", "chosen is ''", "0xff")
    # Of each file, the bad row between two good ones.
    bad = [DATA[f"jsonl row: {name}"].content.split(b"\n")[1] for name in names]  # type: ignore[union-attr]
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(b"\n".join([LINE.strip(), *bad, json.dumps(IDENTICAL).encode(), json.dumps(LONG).encode()]))
    said = refshard("precompute", "--config", config).stdout
    listed = [json.loads(line) for line in (store / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["place"]) for entry in listed] == [(1 + i, f"{data}:{2 + i}") for i in range(len(bad))]
    assert all(entry["reason"] and entry["message"] for entry in listed)
    counted = totals(store)
    assert (counted["rows"], counted["kept"], counted["noted"]["identical"]) == (len(bad) + 3, 2, 1)
    assert sum(counted["dropped"].values()) == len(bad) + 1
    assert counted["dropped"]["prompt_too_long"] == 1
    for reason, count in counted["dropped"].items():
        assert f"{count} dropped: {reason.replace('_', ' ')}" in said
    assert "1 identical" in said

    # Of a run whose rows are all dropped, nothing can be trained on.
    write_jsonl(data, [IDENTICAL, IDENTICAL])
    words = ("--config", config, "-o", "data.on_identical=drop", "-o", f"precompute.output={tmp_path / 'dropped'}")
    for command in ("precompute", "precompute", "train"):  # the second time the store is there already
        message = complaint(refshard(command, *words, check=65))
        assert str(tmp_path / "dropped" / "train") in message
        assert command == "train" or "2 dropped: identical" in message
    assert totals(tmp_path / "dropped" / "train")["dropped"] == {"identical": 2}
    refshard("inspect", tmp_path / "dropped")


# The command line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        *((["precompute", "--config", "x", f"--worker={w}"], w) for w in ("8/8", "0/0", "-1/8", "1", "one/two", "²/3")),
        (["precompute", "--config", "x", "--worker=1/8/9"], "--worker"),
        (["precompute"], "--config"),
        (["score"], "score"),
        (["inspect"], "SHARDS"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_command_line_is_a_usage_error(words: list[str], named: str) -> None:
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert named in last


_HELP = """
import os
import sys
from click.testing import CliRunner
from stages.cli import main
def check(command, words):
    done = CliRunner().invoke(main, [*words, "--help"])
    assert (done.exit_code, done.stderr) == (0, ""), (words, done.stderr)
    assert done.stdout.startswith("Usage: "), done.stdout
    for name, inner in getattr(command, "commands", {}).items():
        check(inner, [*words, name])
check(main, [])
for option in ([], ["--json"]):
    done = CliRunner().invoke(main, ["inspect", sys.argv[1], *option])
    assert done.exit_code == 0 and "reference" in done.stdout, done.output
# Threads of C++ libraries now and then abort a process that leaves through their destructors.
os._exit(0)
"""


@pytest.mark.slow
def test_help_of_every_command_and_inspect_need_no_torch(tmp_path: Path, scored: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for code, said in (("import torch", "torch was imported"), (_HELP, "")):
        words = [sys.executable, "-c", code, str(scored / "train")]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert said in done.stderr
        assert (done.returncode == 0) == (not said), done.stderr
