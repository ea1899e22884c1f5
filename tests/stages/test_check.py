"""`refshard check`: counts that stage one will have, thresholds that fail, and what is done, missing or other."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import transformers

from pipeline.base.errors import ConfigError
from pipeline.config.data import DataConfig
from pipeline.config.schema import Config, PolicyConfig, PrecomputeConfig
from pipeline.config.training import TrainSection
from pipeline.data.intake import Ledger
from pipeline.data.reading import Reading
from pipeline.data.rows import Source
from pipeline.data.sources import open_source
from pipeline.data.survey import Example, Survey
from stages.check.command import Limits, _unreadable, above_limits
from stages.check.estimate import Lengths, estimate
from stages.check.findings import Findings, PairSet, add_up
from stages.check.hardware import HARDWARE, hardware_named
from stages.check.printed import as_text, estimate_lines
from stages.check.shapes import shapes_of
from stages.cli import main
from support.models import make_model, make_tokenizer
from support.runs import refshard, simple_rows, write_config

GPU = ("--hardware", "rtx4090-24gb")

# Three bad rows, one whose prompt is too long, two that are cut, one that is identical, and one that is there twice.
ROWS: list[Any] = [
    *simple_rows(20),
    {"prompt": "A?", "chosen": " same.", "rejected": " same."},
    {"prompt": "A?", "chosen": None, "rejected": " no."},
    {"prompt": "A?", "chosen": "", "rejected": " no."},
    {"chosen": "Yes.", "rejected": "No."},
    {"prompt": "Please. " * 60, "chosen": " yes.", "rejected": " no."},
    {"prompt": "B\x1b[31m?", "chosen": " yes." * 60, "rejected": " no."},
    {"prompt": "C?", "chosen": " yes.", "rejected": " no." * 60},
    simple_rows(1)[0],
]


def checked(*arguments: Any, status: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(refshard("check", *arguments, "--json", check=status).stdout)
    return found


def ledgers(found: dict[str, Any]) -> dict[str, Any]:
    names = ("rows", "kept", "dropped")
    return {name: {key: entry[key] for key in (*names, "noted")} for name, entry in found["sets"].items()}


def test_counts_are_those_of_stage_one_and_then_it_says_what_is_done_missing_and_other(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_run(rows=ROWS, data={"on_bad_row": "skip", "eval": {"test": {"split": "train[10:]"}}})
    before = checked("--config", config, *GPU)
    assert {name: entry["state"] for name, entry in before["stores"].items()} == dict.fromkeys(
        ("train", "test"), "not begun"
    )
    scored = refshard("precompute", "--config", config)
    assert "train: read as text, prompt given; columns not read: none\n" in scored.stdout
    totals = {
        name: json.loads((tmp_path / "shards" / name / "index.json").read_text())["totals"]
        for name in ("train", "test")
    }
    assert ledgers(before) == totals
    assert totals["train"]["rows"] == 28 and sum(totals["train"]["dropped"].values()) == 4
    train = before["sets"]["train"]
    assert train["duplicates"] == 1 and train["found"]["eos_cut"] == train["found"]["truncated"] == 2
    # Shards: the files' size is the estimate's, footers aside.
    parts = list((tmp_path / "shards").glob("*/part-*.parquet"))
    size = sum(part.stat().st_size for part in parts)
    assert before["estimate"]["disk"]["shards"] == pytest.approx(size, rel=0.3)
    assert before["joined"] is None

    done = checked("--config", config, *GPU)
    assert done["joined"]["bytes"] is None
    stores = done["stores"].items()
    assert {name: (entry["state"], entry["units"], entry["pairs_missing"]) for name, entry in stores} == {
        "train": ("finished", 4, 0),
        "test": ("finished", 3, 0),
    }
    # Stage one costs nothing any more.
    assert before["estimate"]["stages"]["precompute"]["tokens"] > 0
    assert done["estimate"]["stages"]["precompute"]["tokens"] == 0
    # The training set has grown by three pairs.
    data = tmp_path / "pairs.jsonl"
    data.write_text(data.read_text() + "".join(json.dumps(row) + "\n" for row in simple_rows(3, start=100)))
    grown = ("--config", config, *GPU, "-o", "data.eval={}")
    said = refshard("check", *grown, check=65)
    assert "3 of 27 pairs" in said.stderr and "3 pairs missing" in said.stdout
    assert not re.search(r"precompute +done", said.stdout)
    assert "have no reference logps" in refshard("train", "--config", config, "-o", "data.eval={}", check=65).stderr
    refshard("check", *grown, "-o", "train.on_missing=drop")

    # Of another tokenization: the error is that of training.
    other = ("--config", config, "-o", "data.eval={}", "-o", "data.max_length=256")
    said = refshard("check", *other, *GPU, check=78)
    assert "differs in tokenization.max_length: shards 128, this run 256" in said.stdout
    assert said.stderr == refshard("train", *other, check=78).stderr

    # One part and the index gone: eight rows are missing of a store that is not finished.
    folder = tmp_path / "shards" / "train"
    (folder / "index.json").unlink()
    (folder / "part-00001.parquet").unlink()
    found = checked(*grown)
    unfinished = found["stores"]["train"]
    assert (unfinished["state"], unfinished["units_done"], unfinished["units"]) == ("unfinished", 3, 4)
    assert unfinished["rows_missing"] == 8
    tokens = found["sets"]["train"]["tokens"]["shared"]
    assert found["estimate"]["stages"]["precompute"]["tokens"] == pytest.approx(8 / 31 * tokens, abs=1)


def test_bad_rows_that_would_stop_stage_one_fail_the_check_which_counts_all_of_them(
    make_run: Callable[..., Path],
) -> None:
    config = make_run(rows=ROWS)
    said = refshard("check", "--config", config, *GPU, check=65)
    assert "3 rows of" in said.stderr and "pairs.jsonl:22: chosen must be text" in said.stderr
    assert "Fix these rows, or set data.on_bad_row: skip" in said.stderr
    assert "  read as       text, prompt given; columns not read: none\n" in said.stdout
    for count, meaning in ((1, "wrong type"), (1, "empty completion"), (1, "no shared prompt")):
        assert f"{count} (3.6%): {meaning}" in said.stdout
    assert "pairs.jsonl:25: " in said.stdout and "prompt alone fills max_length" in said.stdout
    # Each place once, also where an error has it in its message.
    assert re.search(r"pairs\.jsonl:22: chosen must be text", said.stdout)
    assert not re.search(r"(pairs\.jsonl:\d+): \S*\1", said.stdout)
    # What the data holds can't change the terminal.
    assert "\x1b" not in said.stdout and "B\\x1b[31m?" in said.stdout


def test_answers_alone_beside_an_unread_prompt_stop_check_and_stage_one_before_any_work(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_run(
        rows=[{"question": f"Name {i}.", "chosen": f"The {i}", "rejected": f"The {i + 1}"} for i in range(8)],
        data={"on_bad_row": "skip"},
    )
    for command in (["check", *GPU], ["precompute"]):
        done = refshard(command[0], "--config", config, *command[1:], check=2)
        assert "set data.columns: {prompt: question}" in done.stderr
        assert "refshard: data.columns: must name the column of the prompt" in done.stderr
        if command[0] == "check":
            assert "columns not read: question" in done.stdout and "found         missed prompt\n" in done.stdout
    assert not (tmp_path / "shards").exists()


SOURCE = Source(
    path="a/b", format="hub", name=None, revision=None, split="train", start=0, stop=None, files=(), columns={},
    streaming=True,
)  # fmt: skip


def test_a_cause_that_two_sets_have_is_said_once() -> None:
    def one(refused: ConfigError | None, row: int) -> PairSet:
        survey = Survey(examples={"wrong_type": [Example(f"a:{row}", row, "no text")]})
        ledger = Ledger(rows=9, dropped=Counter(wrong_type=row, tie=1))
        reading = Reading(forms={}, unread=(), findings={}, refused=refused)
        return PairSet(source=SOURCE, ledger=ledger, survey=survey, reading=reading, rows=9, only_first_rows=None)

    data = DataConfig(path="a/b")
    config = Config(data=data, policy=PolicyConfig(model="m"), precompute=PrecomputeConfig(output="o"))
    refused = ConfigError("data.columns: must name one. Name it")
    [bad] = _unreadable(config, {"train": one(None, 2), "test": one(None, 1)})
    assert str(bad) == (
        "2 rows of a/b (train) and 1 row of a/b (train) can't be pairs and would stop stage one (first: a:2: no text). "
        "Fix these rows, or set data.on_bad_row: skip"
    )
    [error] = _unreadable(config, {name: one(refused, 2) for name in ("train", "a", "b")})
    assert str(error) == "data.columns: must name one. Name it. The same holds for a, b"
    skips = dataclasses.replace(config, data=dataclasses.replace(data, on_bad_row="skip"))
    assert list(_unreadable(skips, {"train": one(None, 2)})) == []


def test_the_first_rows_of_an_unknown_number_are_called_so() -> None:
    ledger = Ledger(rows=20, dropped=Counter(wrong_type=20))
    reading = Reading(forms={}, unread=(), findings={})
    pairs = PairSet(source=SOURCE, ledger=ledger, survey=Survey(), reading=reading, rows=None, only_first_rows=20)
    said = as_text(Findings(sets={"train": pairs}, stores={}), 64)
    assert "only the first 20 of an unknown number of rows; the estimates are not of the whole set" in said


@pytest.mark.parametrize(
    ("truncated", "eos_cut", "lines"),
    [
        (2, 2, ["2: a completion is cut at max_length, and EOS with it"]),
        (2, 1, ["1: a completion is cut at max_length, and EOS with it", "2: a completion is cut at max_length"]),
        (2, 0, ["2: a completion is cut at max_length"]),
    ],
)
def test_a_cut_is_found_once_whether_eos_is_lost_with_it_or_not(truncated: int, eos_cut: int, lines: list[str]) -> None:
    counts = Counter(truncated=truncated, eos_cut=eos_cut)
    survey, ledger = Survey(found=+counts), Ledger(rows=8, kept=0)
    reading = Reading(forms={}, unread=(), findings={})
    pairs = PairSet(source=SOURCE, ledger=ledger, survey=survey, reading=reading, rows=8, only_first_rows=None)
    said = as_text(Findings(sets={"train": pairs}, stores={}), 64)
    assert re.findall(r"^  found +(.*)$", said, flags=re.MULTILINE) == lines


def test_an_epoch_has_no_pair_of_weight_0() -> None:
    survey = Survey(found=Counter(weight_0=2), scored=Counter(prompt=10, chosen=10, rejected=20))
    source = open_source(DataConfig(path="a/b"))
    reading = Reading(forms={}, unread=(), findings={})
    pairs = PairSet(
        source=source, ledger=Ledger(rows=9, kept=8), survey=survey, reading=reading, rows=9, only_first_rows=None
    )
    lengths = add_up({"train": pairs}, {}, lambda name: 2.0)
    assert lengths is not None
    assert (lengths.pairs, lengths.pairs_of_epoch, lengths.share_of_epoch) == (8, 12, 1.5)


def test_each_limit_fails_with_what_was_found_and_what_is_allowed(make_run: Callable[..., Path]) -> None:
    config = make_run(rows=ROWS, data={"on_bad_row": "skip"})
    allowed = ("--max-dropped", 0.2, "--max-cut", 0.1, "--max-memory", "24GB", "--max-hours", 1)
    refshard("check", "--config", config, *GPU, *allowed)
    above = ("--max-dropped", 0.1, "--max-cut", 0.05, "--max-memory", "100MB", "--max-hours", 0)
    said = refshard("check", "--config", config, *GPU, *above, check=65).stderr
    assert "4 of 28 rows are dropped (14.29%); --max-dropped allows 10.00%" in said
    assert "2 of 24 pairs are cut at data.max_length (8.33%); --max-cut allows 5.00%" in said
    assert re.search(r"train: needs about 1\.\d GB of memory on each device; --max-memory allows 100 MB", said)
    assert "--max-hours allows 0" in said
    said = refshard("check", "--config", config, *GPU, *above[4:], check=2).stderr
    assert "--max-memory allows" in said and "dropped" not in said
    assert "rtx4090-24gb" in refshard("check", "--config", config, "--hardware", "tpu", check=2).stderr


def test_the_first_rows_stand_for_all_and_no_weights_are_read(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", make_tokenizer(bos=True))
    # Nothing that could be loaded.
    (folder / "model.safetensors").write_bytes(b"no weights")
    config = make_run(rows=simple_rows(1) * 40, policy={"model": str(folder)})
    few, all_of_them = checked("--config", config, "--rows", 10, "--hardware", "cpu"), checked("--config", config, *GPU)
    assert few["sets"]["train"]["rows"] == 10 and few["sets"]["train"]["rows_of_set"] == 40
    assert few["estimate"]["stages"]["train"]["tokens"] == all_of_them["estimate"]["stages"]["train"]["tokens"]
    assert few["estimate"]["disk"] == all_of_them["estimate"]["disk"]
    # The speed of this machine is measured, that of another one assumed, and it says which.
    assert few["estimate"]["probe"]["forward"] > 0 and few["estimate"]["stages"]["train"]["measured"]
    assert all_of_them["estimate"]["probe"] is None and all_of_them["estimate"]["utilisation"]
    # Of the machine that a GPU is named for nothing is known.
    assert few["estimate"]["host_memory_here"] > 0 and all_of_them["estimate"]["host_memory_here"] is None


def test_ids_past_the_vocabulary_are_found(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", make_tokenizer(bos=True), vocab_size=60)
    config = make_run(policy={"model": str(folder)})
    said = refshard("check", "--config", config, *GPU, check=2).stderr
    assert "token id" in said and "the vocabulary has 60" in said


def test_settings_without_training_are_checked_for_stage_one_alone(make_run: Callable[..., Path]) -> None:
    config = make_run()
    settings = {key: value for key, value in _read(config).items() if key != "train"}
    write_config(config, **settings)
    said = refshard("check", "--config", config, *GPU, "--rows", 5).stdout
    assert "only the first 5 of 24 rows; the estimates are extended to the whole set" in said
    assert "35% of the data sheet's peak is assumed" in said and "precompute" in said and "steps" not in said


def test_a_finished_stage_is_done_and_too_little_memory_of_the_machine_is_said() -> None:
    sizes = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 352}
    config = Config(
        data=DataConfig(path="x"),
        policy=PolicyConfig(model="m"),
        precompute=PrecomputeConfig(output="o"),
        train=TrainSection(output_dir="o"),
    )
    lengths = Lengths(
        pairs=9, prompt_tokens=90, chosen_tokens=90, rejected_tokens=90, longest_pair=30, usual_pair=30, unscored=0
    )
    found = estimate(
        config,
        shapes_of(transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=8)),
        lengths,
        hardware_named("2xt4-16gb"),
    )
    for here, verdict in ((10**9, ": too much, this machine has 1.0 GB"), (2 * 10**9, ": fits"), (None, "is loaded")):
        lines = list(estimate_lines(found, here))
        [memory] = [line for line in lines if "CPU memory" in line]
        assert "1.0 GB on the machine for all its processes together" in memory and verdict in memory
        assert "  precompute    done" in lines
    [above] = above_limits(Findings(sets={}, stores={}, estimate=found), Limits(max_memory=1))
    assert str(above).startswith("train: ")


def test_the_help_names_all_hardware_and_says_what_is_read_and_assumed() -> None:
    command = main.commands["check"]
    said = " ".join(command.get_help(click.Context(command)).split())
    assert all(name in said for name in HARDWARE)
    assert "loads no weights" in said and "digests" in said and "assumed" in said


def _read(config: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(config.read_text())
    return found
