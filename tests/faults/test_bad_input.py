"""Bad input through the real commands: the exit status says the kind, one line says what, where and what to do."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from support.models import make_model, make_tokenizer
from support.processes import ROOT
from support.runs import refshard, simple_rows, write_config, write_jsonl

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]

PROGRESS = re.compile(
    r"\s*$|.*\d+%\|.*|.*\d+it \[.*|[\w-]+: [\d,]+( of [\d,]+)? (rows|steps), .* tokens/s.*"
    r"|step [\d,]+: held-out .*|warning: .*"
)
GOOD = simple_rows(4)


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that the command failed with; anything else on stderr must be a progress bar or a warning."""
    lines = result.stderr.splitlines()
    found = [line for line in lines if line.startswith("refshard:")]
    assert len(found) == 1, result.stderr
    assert [line for line in lines if line not in found and not PROGRESS.match(line)] == []
    assert "Traceback" not in result.stdout + result.stderr
    assert "this is a bug" not in found[0]
    return found[0]


def usage_error(result: subprocess.CompletedProcess[str]) -> str:
    """The last line of click's own few: usage, where help is, what is wrong."""
    assert "Traceback" not in result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: "), result.stderr
    return last


def put_lines(config: Path, lines: list[bytes]) -> Path:
    """Replace the dataset of a config by raw lines."""
    data = Path(yaml.safe_load(config.read_text())["data"]["path"])
    data.write_bytes(b"".join(line + b"\n" for line in lines))
    return data


def as_lines(rows: list[dict[str, str]]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def totals(store: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((store / "index.json").read_text())["totals"]
    return found


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


@pytest.fixture
def scored_run(make_run: MakeRun, scored: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A config whose shards are finished, and the store, which a test may damage."""
    shutil.copytree(scored, tmp_path / "shards")
    return make_run(), tmp_path / "shards" / "train"


# Rows


BAD_ROWS = {
    "broken_json": (b'{"prompt": "a", "chosen": ', "column"),
    "not_an_object": (b'["prompt", "chosen", "rejected"]', "list"),
    "missing_column": (b'{"prompt": "What?", "chosen": " Yes."}', "rejected"),
    "wrong_type": (b'{"prompt": "What?", "chosen": 7, "rejected": " No."}', "chosen"),
    "null": (b'{"prompt": "What?", "chosen": " Yes.", "rejected": null}', "rejected"),
    "empty_completion": (b'{"prompt": "What?", "chosen": "", "rejected": " No."}', "chosen"),
    "invalid_utf8": (b'{"prompt": "What?", "chosen": " Yes\xff.", "rejected": " No."}', "UTF-8"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_the_run_naming_file_line_and_the_way_on(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    line, word = BAD_ROWS[name]
    config = make_run()
    data = put_lines(config, [*as_lines(GOOD[:2]), line, *as_lines(GOOD[2:])])
    message = complaint(refshard("precompute", "--config", config, check=65))
    assert f"{data}:3" in message
    assert word in message.replace(str(tmp_path), "")
    assert "data.on_bad_row: skip" in message
    assert not (tmp_path / "shards" / "train" / "index.json").exists()


def test_skipped_bad_rows_are_counted_on_screen_and_listed_in_a_file(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(data={"on_bad_row": "skip"})
    bad = [line for line, _ in BAD_ROWS.values()]
    data = put_lines(config, [*as_lines(GOOD[:2]), *bad, *as_lines(GOOD[2:])])
    result = refshard("precompute", "--config", config)
    store = tmp_path / "shards" / "train"
    listed = [json.loads(line) for line in (store / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["place"]) for entry in listed] == [(2 + i, f"{data}:{3 + i}") for i in range(len(bad))]
    assert all(entry["reason"] and entry["message"] for entry in listed)
    counted = totals(store)
    assert (counted["rows"], counted["kept"]) == (len(bad) + len(GOOD), len(GOOD))
    assert sum(counted["dropped"].values()) == len(bad)
    for reason, count in counted["dropped"].items():
        assert f"{count} dropped: {reason.replace('_', ' ')}" in result.stdout


IDENTICAL = {"prompt": "Same?", "chosen": " Same.", "rejected": " Same."}


def test_a_pair_of_identical_completions_is_kept_and_reported(make_run: MakeRun, tmp_path: Path) -> None:
    result = refshard("precompute", "--config", make_run([*GOOD, IDENTICAL]))
    counted = totals(tmp_path / "shards" / "train")
    assert (counted["kept"], counted["dropped"], counted["noted"]["identical"]) == (5, {}, 1)
    assert "1 identical" in result.stdout


def test_a_pair_of_identical_completions_is_dropped_on_request(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run([*GOOD, IDENTICAL])
    result = refshard("precompute", "--config", config, "-o", "data.on_identical=drop")
    counted = totals(tmp_path / "shards" / "train")
    assert (counted["kept"], counted["dropped"]) == (4, {"identical": 1})
    assert "1 dropped: identical" in result.stdout


def test_a_prompt_longer_than_max_length_is_dropped_and_counted(make_run: MakeRun, tmp_path: Path) -> None:
    long = {"prompt": "word " * 500, "chosen": " Yes.", "rejected": " No."}
    result = refshard("precompute", "--config", make_run([GOOD[0], long, *GOOD[1:]]))
    counted = totals(tmp_path / "shards" / "train")
    assert (counted["rows"], counted["kept"], counted["dropped"]) == (5, 4, {"prompt_too_long": 1})
    assert "1 dropped: prompt too long" in result.stdout


def test_an_empty_file_is_bad_data(make_run: MakeRun, tmp_path: Path) -> None:
    message = complaint(refshard("precompute", "--config", make_run([]), check=65))
    assert str(tmp_path / "pairs.jsonl") in message
    assert "no rows" in message


def test_a_missing_data_file_is_a_wrong_setting(make_run: MakeRun, tmp_path: Path) -> None:
    gone = tmp_path / "gone.jsonl"
    message = complaint(refshard("precompute", "--config", make_run(data={"path": str(gone)}), check=2))
    assert "data.path" in message
    assert str(gone) in message


def test_a_run_whose_rows_are_all_dropped_fails_and_says_why(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run([IDENTICAL, IDENTICAL], data={"on_identical": "drop"})
    for _ in range(2):  # the second time the store is there already
        message = complaint(refshard("precompute", "--config", config, check=65))
        assert str(tmp_path / "shards" / "train") in message
        assert "2 dropped: identical" in message


def test_training_on_a_store_without_pairs_is_bad_data(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run([IDENTICAL, IDENTICAL], data={"on_identical": "drop"})
    refshard("precompute", "--config", config, check=65)
    assert str(tmp_path) in complaint(refshard("train", "--config", config, check=65))
    refshard("inspect", tmp_path / "shards")


def test_a_conversation_needs_a_tokenizer_with_a_chat_template(make_run: MakeRun, tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "What?"}],
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    message = complaint(refshard("precompute", "--config", make_run([row]), check=2))
    assert "policy.model" in message
    assert "chat template" in message
    assert f"{tmp_path / 'pairs.jsonl'}:1" in message


def test_rows_changed_after_scoring_are_noticed_by_training(scored_run: tuple[Path, Path], tmp_path: Path) -> None:
    config, _ = scored_run
    rows = simple_rows(24)
    rows[5]["chosen"] = " Something else."
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    message = complaint(refshard("train", "--config", config, check=65))
    assert f"{data}:6" in message
    assert "train.on_missing: drop" in message


# Settings and the command line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"max_lenght": 64}}, ("data.max_lenght", "max_length")),
        ({"lossy": {"beta": 0.1}}, ("lossy", "loss")),
        ({"train": {"learning_rat": 1e-4}}, ("train.learning_rat", "learning_rate")),
        ({"loss": {"beta": "small"}}, ("loss.beta", "'small'")),
        ({"train": {"learning_rate": "slow"}}, ("train.learning_rate", "'slow'")),
        ({"precompute": {"rows_per_shard": "many"}}, ("precompute.rows_per_shard", "'many'")),
        ({"data": {"max_length": "1e400"}}, ("data.max_length", "'1e400'")),
        ({"data": {"on_identical": "ignore"}}, ("data.on_identical", "drop")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("command", ["precompute", "train"])
def test_a_wrong_setting_is_refused_by_its_key_before_any_work(
    make_run: MakeRun, tmp_path: Path, command: str, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = complaint(refshard(command, "--config", make_run(**changes), check=2))
    assert all(word in message for word in words), message
    assert not (tmp_path / "shards").exists()
    assert not (tmp_path / "policy").exists()


def test_a_wrong_override_is_refused_by_its_key(make_run: MakeRun) -> None:
    config = make_run()
    message = complaint(refshard("precompute", "--config", config, "-o", "loss.bta=0.2", check=2))
    assert "loss.bta" in message
    assert "beta" in message.replace("loss.bta", "")
    assert "loss.beta" in complaint(refshard("precompute", "--config", config, "-o", "loss.beta", check=2))


def test_a_learning_rate_that_yaml_takes_for_text_is_a_number(scored_run: tuple[Path, Path], tmp_path: Path) -> None:
    config, _ = scored_run
    text = config.read_text().replace("learning_rate: 1e-3", "learning_rate: 5e-7")
    assert "learning_rate: 5e-7" in text
    config.write_text(text)
    refshard("train", "--config", config, "-o", "train.max_steps=1")
    history = json.loads((tmp_path / "policy" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["learning_rate"] == 5e-7


def test_damaged_yaml_is_refused_with_its_file_and_line(make_run: MakeRun) -> None:
    config = make_run()
    config.write_text("data:\n  path: [pairs.jsonl\npolicy:\n  model: m\n")
    message = complaint(refshard("precompute", "--config", config, check=2))
    assert str(config) in message
    assert "line " in message


@pytest.mark.parametrize("content", [b"", b"just words", b"- a list", b"\xff\xfe\x00", b"data: \x00"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, content: bytes) -> None:
    config = tmp_path / "run.yaml"
    config.write_bytes(content)
    assert str(config) in complaint(refshard("precompute", "--config", config, check=2))


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "gone.yaml"
    assert str(config) in complaint(refshard("train", "--config", config, check=2))


@pytest.mark.parametrize("worker", ["8/8", "0/0", "-1/8", "1", "one/two", "1/8/9", "²/3"])
def test_a_wrong_worker_is_a_usage_error(make_run: MakeRun, worker: str) -> None:
    result = refshard("precompute", "--config", make_run(), f"--worker={worker}", check=2)
    assert "--worker" in usage_error(result)
    assert worker in usage_error(result)


@pytest.mark.parametrize(
    ("arguments", "word"), [(["precompute"], "--config"), (["score"], "score"), (["inspect"], "SHARDS")]
)
def test_a_wrong_command_is_a_usage_error(arguments: list[str], word: str) -> None:
    assert word in usage_error(refshard(*arguments, check=2))


# Models


def test_a_missing_model_folder_is_refused_by_its_key(make_run: MakeRun, tmp_path: Path) -> None:
    gone = tmp_path / "models" / "gone"
    message = complaint(refshard("precompute", "--config", make_run(policy={"model": str(gone)}), check=2))
    assert "policy.model" in message
    assert str(gone) in message


def test_a_missing_reference_folder_is_refused_by_its_key(make_run: MakeRun, tmp_path: Path) -> None:
    gone = tmp_path / "models" / "gone"
    message = complaint(refshard("precompute", "--config", make_run(reference={"model": str(gone)}), check=2))
    assert "reference.model" in message
    assert str(gone) in message


@pytest.mark.parametrize("other", [None, "pytorch_model.bin"])
def test_a_model_folder_without_safetensors_is_refused(
    make_run: MakeRun, model_folder: Path, tmp_path: Path, other: str | None
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if other:
        (folder / other).write_bytes(b"not loaded, whatever it holds")
    message = complaint(refshard("precompute", "--config", make_run(policy={"model": str(folder)}), check=2))
    assert "policy.model" in message
    assert str(folder) in message
    assert "safetensors" in message


@pytest.mark.parametrize("command", ["precompute", "train"])
@pytest.mark.parametrize("length", [4, 100_000])
def test_a_truncated_weight_file_is_bad_data(
    make_run: MakeRun, model_folder: Path, tmp_path: Path, command: str, length: int
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = make_run(policy={"model": str(folder)}, reference={"model": str(model_folder)})
    if command == "train":
        refshard("precompute", "--config", config)
    else:
        config = make_run(policy={"model": str(model_folder)}, reference={"model": str(folder)})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    message = complaint(refshard(command, "--config", config, check=65))
    assert "policy.model" in message or "reference.model" in message
    assert str(folder) in message


def test_a_policy_without_an_embedding_for_a_token_is_refused_by_its_key(
    make_run: MakeRun, model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    small = make_model(tmp_path / "small", tokenizer, vocab_size=300)
    config = make_run(policy={"model": str(small)}, reference={"model": str(model_folder)})
    refshard("precompute", "--config", config)
    message = complaint(refshard("train", "--config", config, check=2))
    assert "policy.model" in message
    assert "the model's vocabulary has 300" in message
    assert f"{tmp_path / 'pairs.jsonl'}:" in message


# Stores


def test_shards_of_another_reference_are_never_continued(
    scored_run: tuple[Path, Path], tmp_path: Path, tokenizer: Any
) -> None:
    config, store = scored_run
    other = make_model(tmp_path / "other", tokenizer, seed=1)
    for command in ("precompute", "train"):
        message = complaint(refshard(command, "--config", config, "-o", f"reference.model={other}", check=78))
        assert str(store) in message
        assert "reference.weights" in message


def test_shards_of_another_tokenizer_are_never_trained_on(
    scored_run: tuple[Path, Path], tmp_path: Path, model_folder: Path
) -> None:
    config, store = scored_run
    other = make_model(tmp_path / "other", make_tokenizer(bos=False))
    arguments = ("-o", f"policy.model={other}", "-o", f"reference.model={model_folder}")
    message = complaint(refshard("train", "--config", config, *arguments, check=78))
    assert str(store) in message
    assert "tokeniz" in message


def test_shards_of_another_dataset_are_never_continued(scored_run: tuple[Path, Path], tmp_path: Path) -> None:
    config, store = scored_run
    write_jsonl(tmp_path / "pairs.jsonl", simple_rows(24, start=1))
    message = complaint(refshard("precompute", "--config", config, check=78))
    assert str(store) in message
    assert "dataset" in message


@pytest.mark.parametrize("where", [0.02, 0.5, 0.98])
def test_a_flipped_byte_in_a_part_stops_training_and_inspect(scored_run: tuple[Path, Path], where: float) -> None:
    config, store = scored_run
    part = store / "part-00001.parquet"
    content = bytearray(part.read_bytes())
    content[int(len(content) * where)] ^= 0x40
    part.write_bytes(content)
    for arguments in (("train", "--config", config), ("inspect", store)):
        message = complaint(refshard(*arguments, check=65))
        assert str(part) in message
        assert "precompute again" in message


def test_a_flipped_byte_in_a_part_of_an_unfinished_store_stops_precompute(scored_run: tuple[Path, Path]) -> None:
    config, store = scored_run
    (store / "index.json").unlink()
    part = store / "part-00001.parquet"
    content = bytearray(part.read_bytes())
    # Among values; a page's header also has words that say nothing of them.
    logps = next(
        column
        for column in map(pq.read_metadata(part).row_group(0).column, range(9))
        if column.path_in_schema.startswith("chosen_token_logps")
    )
    content[logps.dictionary_page_offset + logps.total_compressed_size - 4] ^= 0x40
    part.write_bytes(content)
    message = complaint(refshard("precompute", "--config", config, check=65))
    assert str(part) in message
    assert not (store / "index.json").exists()


def test_a_deleted_part_stops_training_and_is_scored_again_on_request(scored_run: tuple[Path, Path]) -> None:
    config, store = scored_run
    part = store / "part-00002.parquet"
    before = part.read_bytes()
    part.unlink()
    message = complaint(refshard("train", "--config", config, check=65))
    assert str(part) in message
    assert "missing" in message
    # The message's way on works.
    (store / "index.json").unlink()
    refshard("precompute", "--config", config)
    assert len(part.read_bytes()) == len(before)
    refshard("inspect", store)


def test_a_part_of_another_store_is_another_identity(
    scored_run: tuple[Path, Path], make_run: MakeRun, tmp_path: Path, tokenizer: Any
) -> None:
    config, store = scored_run
    other = make_model(tmp_path / "other", tokenizer, seed=1)
    elsewhere = tmp_path / "elsewhere"
    refshard("precompute", "--config", config, "-o", f"reference.model={other}", "-o", f"precompute.output={elsewhere}")
    (store / "index.json").unlink()
    part = shutil.copy(elsewhere / "train" / "part-00001.parquet", store)
    message = complaint(refshard("precompute", "--config", config, check=78))
    assert str(part) in message


def test_a_store_without_index_is_unfinished(scored_run: tuple[Path, Path]) -> None:
    config, store = scored_run
    (store / "index.json").unlink()
    for arguments in (("train", "--config", config), ("inspect", store)):
        message = complaint(refshard(*arguments, check=75))
        assert str(store) in message
        assert "refshard precompute" in message


@pytest.mark.parametrize("file", ["index.json", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_index_or_manifest_is_bad_data(scored_run: tuple[Path, Path], file: str, content: bytes) -> None:
    config, store = scored_run
    (store / file).write_bytes(content)
    for arguments in (("train", "--config", config), ("inspect", store)):
        assert str(store / file) in complaint(refshard(*arguments, check=65))


def test_training_without_a_store_names_the_command_to_run(make_run: MakeRun, tmp_path: Path) -> None:
    message = complaint(refshard("train", "--config", make_run(), check=65))
    assert str(tmp_path / "shards" / "train") in message
    assert "refshard precompute" in message


def test_inspecting_a_folder_without_a_store_is_bad_data(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        assert str(folder) in complaint(refshard("inspect", folder, check=65))


def test_an_output_that_is_a_file_is_a_failure_of_the_disk(make_run: MakeRun, tmp_path: Path) -> None:
    taken = tmp_path / "shards"
    taken.write_text("a file\n")
    assert str(taken) in complaint(refshard("precompute", "--config", make_run(), check=74))


# Without torch


def without_torch(tmp_path: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run the command where an import of torch fails."""
    blocked = tmp_path / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(blocked)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["precompute"],
        ["train"],
        ["inspect"],
        ["demo"],
        ["demo", "prepare"],
        ["demo", "summary"],
    ],
    ids=" ".join,
)
def test_help_needs_no_torch(tmp_path: Path, words: list[str]) -> None:
    result = without_torch(tmp_path, "-m", "stages.cli", *words, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage: ")
    assert result.stderr == ""


def test_inspect_needs_no_torch(tmp_path: Path, scored: Path) -> None:
    assert "torch was imported" in without_torch(tmp_path, "-c", "import torch").stderr
    for option in ((), ("--json",)):
        result = without_torch(tmp_path, "-m", "stages.cli", "inspect", scored / "train", *option)
        assert result.returncode == 0, result.stderr
        assert "reference" in result.stdout
