"""Reference log-probs from outside, and for others: the same numbers go out as came in, filed under their pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
import trl

from pipeline.base.errors import IdentityError
from pipeline.config.reader import load_config
from pipeline.data.intake import kept_rows
from pipeline.store.store import open_store, read_parts
from stages.import_scores import command as import_scores
from support.models import make_tokenizer
from support.runs import refshard, simple_rows, write_jsonl
from support.tally import tally

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]


def stored(folder: Path) -> list[dict[str, Any]]:
    return [row for part in read_parts(open_store(folder)) for row in part.to_pylist()]


def history(output: Path) -> list[dict[str, float]]:
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


@pytest.fixture
def scored(make_run: MakeRun, tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A config, and its rows with the log-probs that stage one gave them as columns."""
    config = make_run()
    refshard("precompute", "--config", config, "-o", f"precompute.output={tmp_path / 'original'}")
    rows = [
        {
            **row,
            "ref_chosen_logps": scores["ref_chosen_logps"],
            "ref_rejected_logps": scores["ref_rejected_logps"],
            "chosen_tokens_logps": scores["chosen_token_logps"],
            "rejected_tokens_logps": scores["rejected_token_logps"],
        }
        for row, scores in zip(simple_rows(24), stored(tmp_path / "original" / "train"), strict=True)
    ]
    return config, rows


TOKENS = ["--chosen", "chosen_tokens_logps", "--rejected", "rejected_tokens_logps"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["sums", "tokens"])
def test_imported_scores_train_as_those_that_stage_one_wrote(
    scored: tuple[Path, list[dict[str, Any]]], tmp_path: Path, form: str, kind: str
) -> None:
    config, rows = scored
    # Another order: what counts is the pair, not its place.
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    file = tmp_path / f"scores.{form}"
    if form == "jsonl":
        write_jsonl(file, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    done = refshard("import", file, "--config", config, *(TOKENS if kind == "tokens" else []))
    assert "24 pairs kept" in done.stdout
    store = open_store(tmp_path / "shards" / "train")
    assert store.manifest["declared"]["imported"]
    assert store.manifest["identity"]["tokenization"]["token_logps"] == (kind == "tokens")
    assert store.index["totals"]["rows"] == 24
    original = {row["pair_key"]: row for row in stored(tmp_path / "original" / "train")}
    for row in stored(store.folder):
        for column in row.keys() - {"row"}:
            assert row[column] == original[row["pair_key"]][column]

    done = refshard("train", "--config", config)
    assert "Parity gate: the policy before its first step is the reference" in done.stdout
    output = ["-o", f"train.output_dir={tmp_path / 'native'}", "-o", f"precompute.output={tmp_path / 'original'}"]
    refshard("train", "--config", config, *output)
    for ours, native in zip(history(tmp_path / "policy"), history(tmp_path / "native"), strict=True):
        assert ours["loss"] == native["loss"]
        assert ("kl/chosen" in ours) == (kind == "tokens")
    assert (
        "imported already" in refshard("import", file, "--config", config, *(TOKENS if kind == "tokens" else [])).stdout
    )


def test_a_reference_known_by_name_alone_serves_under_that_name_only(
    scored: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    config, rows = scored
    file = write_jsonl(tmp_path / "scores.jsonl", rows)
    name = ["-o", "reference.declared=judge-70b"]
    refshard("import", file, "--config", config, *name)
    assert "judge-70b (declared by name" in refshard("inspect", tmp_path / "shards").stdout
    refused = refshard("precompute", "--config", config, *name, check=2)
    assert "refshard import" in refused.stderr
    refused = refshard("train", "--config", config, check=78)
    assert "reference.declared: shards judge-70b, this run none" in refused.stderr
    refused = refshard("train", "--config", config, "-o", "reference.declared=other", check=78)
    assert "shards judge-70b, this run other" in refused.stderr
    done = refshard("train", "--config", config, *name)
    assert "Parity gate" not in done.stdout


def test_a_held_out_set_is_imported_by_its_name(scored: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    config, rows = scored
    file = write_jsonl(tmp_path / "scores.jsonl", rows)
    overrides = ["-o", f"data.eval.test.path={tmp_path / 'pairs.jsonl'}"]
    refshard("import", file, "--config", config, *overrides, "--set", "test")
    assert open_store(tmp_path / "shards" / "test").index["totals"]["kept"] == 24
    refused = refshard("import", file, "--config", config, *overrides, "--set", "tset", check=2)
    assert "there are train, test" in refused.stderr


@pytest.mark.parametrize(
    ("change", "arguments", "status", "words"),
    [
        ({"ref_chosen_logps": None}, [], 65, ["scores.jsonl:3", "got nothing"]),
        ({"ref_chosen_logps": "-3"}, [], 65, ["scores.jsonl:3", "'-3'"]),
        ({"ref_rejected_logps": 1.5}, [], 65, ["scores.jsonl:3", "at most 0"]),
        ({"chosen_tokens_logps": [-1.0]}, TOKENS, 65, ["scores.jsonl:3", "has 1 log-probs", "chat template or EOS"]),
        ({"chosen_tokens_logps": -1.0}, TOKENS, 65, ["scores.jsonl:3", "must be a list"]),
        ({"chosen": ""}, [], 65, ["scores.jsonl:3"]),
        ({"ref_chosen_logps": -1e300}, [], 65, ["scores.jsonl:3", "ref_chosen_logps"]),
        (simple_rows(1)[0], [], 65, ["appears twice"]),
        ({}, ["--chosen", "nowhere"], 65, ["scores.jsonl:1", "no column 'nowhere'", "'ref_chosen_logps'"]),
    ],
    ids=[
        "none",
        "text",
        "positive",
        "too few",
        "a number among lists",
        "a bad pair",
        "beyond float32",
        "a pair twice with other scores",
        "no such column",
    ],
)
def test_a_bad_score_is_refused_by_file_and_line(
    scored: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    change: dict[str, Any],
    arguments: list[str],
    status: int,
    words: list[str],
) -> None:
    config, rows = scored
    file = write_jsonl(tmp_path / "scores.jsonl", [*rows[:2], {**rows[2], **change}, *rows[3:]])
    refused = refshard("import", file, "--config", config, *arguments, check=status)
    for word in words:
        assert word in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    # The first part was not read to its end, so nothing is in the way of a mended file.
    assert not (tmp_path / "shards").exists()


def test_a_sum_over_more_than_max_length_leaves_is_refused_but_tokens_are_cut(
    scored: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    config, rows = scored
    file = write_jsonl(tmp_path / "scores.jsonl", rows)
    shorter = ["-o", "data.max_length=40"]
    assert "a sum can't be cut" in refshard("import", file, "--config", config, *shorter, check=65).stderr
    refshard("import", file, "--config", config, *shorter, *TOKENS, "--overwrite")
    refshard("train", "--config", config, *shorter)
    assert history(tmp_path / "policy")[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert history(tmp_path / "policy")[0]["lengths/truncated"] > 0


def test_sums_alone_refuse_what_needs_tokens(scored: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    config, rows = scored
    refshard("import", write_jsonl(tmp_path / "scores.jsonl", rows), "--config", config)
    assert "holds sums alone" in refshard("train", "--config", config, "-o", "loss.ld_alpha=0.5", check=2).stderr
    assert "must be equal" in refshard("train", "--config", config, "-o", "data.max_length=100", check=78).stderr


class ReadsColumns(trl.DPOTrainer):
    """The guide's: TRL's trainer, taking the reference log-probs from the dataset instead of scoring."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset


def test_exported_columns_serve_another_trainer(make_run: MakeRun, tmp_path: Path, model_folder: Path) -> None:
    rows = [{**row, "source": f"s{i}"} for i, row in enumerate(simple_rows(24))]
    held_out = write_jsonl(tmp_path / "test.jsonl", simple_rows(4, start=50))
    config = make_run(
        rows=rows, data={"eval": {"test": {"path": str(held_out)}}}, train={"optim": "sgd", "learning_rate": "1e-2"}
    )
    refshard("precompute", "--config", config)
    refshard("train", "--config", config)
    done = refshard("export", tmp_path / "exported", "--config", config)
    assert "train: 24 pairs" in done.stdout and "test: 4 pairs" in done.stdout

    sets = datasets.load_from_disk(str(tmp_path / "exported"))
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 24, "test": 4}
    for exported, row, scores in zip(sets["train"], rows, stored(tmp_path / "shards" / "train"), strict=True):
        assert {key: exported[key] for key in row} == row
        assert exported["ref_chosen_logps"] == scores["ref_chosen_logps"]
        assert exported["ref_rejected_logps"] == scores["ref_rejected_logps"]

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        precompute_ref_log_probs=True,
        max_length=128,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        optim="sgd",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = ReadsColumns(
        model=transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32"),
        args=arguments,
        train_dataset=sets["train"],
        processing_class=make_tokenizer(bos=True),
    )
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for ours, other in zip(history(tmp_path / "policy"), theirs, strict=True):
        assert ours["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert theirs[-1]["rewards/margins"] != 0


def test_every_column_of_a_parquet_file_is_exported(make_run: MakeRun, tmp_path: Path) -> None:
    rows = [{**row, "source": f"s{i}", "score": i / 7} for i, row in enumerate(simple_rows(6))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    config = make_run(data={"path": str(tmp_path / "pairs.parquet")})
    refshard("precompute", "--config", config)
    refshard("export", tmp_path / "exported", "--config", config)
    exported = datasets.load_from_disk(str(tmp_path / "exported"))["train"]
    assert [{key: row[key] for key in rows[0]} for row in exported] == rows


def test_a_column_that_only_some_lines_have_is_exported_with_nothing_in_the_others(
    make_run: MakeRun, tmp_path: Path
) -> None:
    rows = [{**row, **({"extra": f"e{i}"} if i % 2 else {})} for i, row in enumerate(simple_rows(6))]
    config = make_run(rows=rows)
    refshard("precompute", "--config", config)
    refshard("export", tmp_path / "exported", "--config", config)
    exported = datasets.load_from_disk(str(tmp_path / "exported"))["train"]
    assert exported["extra"][:] == [None, "e1", None, "e3", None, "e5"]


def test_scores_of_answers_alone_are_refused_with_the_column_that_holds_the_prompt(
    scored: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    config, rows = scored
    rows = [{"question": row["prompt"], **{key: row[key] for key in row.keys() - {"prompt"}}} for row in rows]
    file = write_jsonl(tmp_path / "scores.jsonl", rows)
    said = refshard("import", file, "--config", config, check=2).stderr
    assert "set data.columns: {prompt: question}" in said and not (tmp_path / "shards").exists()


def test_a_file_that_changes_while_it_is_imported_gets_no_part_of_it(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan records the digest of the file as it was, and the same command would keep the parts."""
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in simple_rows(12)]
    file = write_jsonl(tmp_path / "scores.jsonl", rows)
    config = load_config(make_run(reference={"declared": "some/model"}))

    def changed_at_the_end(*arguments: Any) -> Any:
        yield from kept_rows(*arguments)
        write_jsonl(file, [{**row, "ref_chosen_logps": -3.0} for row in rows])

    monkeypatch.setattr(import_scores, "kept_rows", changed_at_the_end)
    with pytest.raises(IdentityError, match="changed while it was in use"):
        import_scores.run(config, file, set_name="train", chosen="ref_chosen_logps", rejected="ref_rejected_logps")
    assert not list((tmp_path / "shards/train").glob("part-*"))
    tally("a file of scores that is replaced while it is imported", 1, outcome="78, no part")


def test_scores_are_not_read_from_csv(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("prompt,chosen,rejected,ref_chosen_logps,ref_rejected_logps\na,b,c,-1,-2\n")
    assert (
        "Parquet or a JSON Lines" in refshard("import", tmp_path / "scores.csv", "--config", make_run(), check=2).stderr
    )


def test_export_refuses_what_was_not_scored_and_never_replaces(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run()
    refshard("precompute", "--config", config)
    write_jsonl(tmp_path / "pairs.jsonl", [*simple_rows(24), *simple_rows(1, start=90)])
    refused = refshard("export", tmp_path / "exported", "--config", config, check=65)
    assert f"{tmp_path / 'pairs.jsonl'}:25" in refused.stderr and "no reference logps" in refused.stderr
    assert not (tmp_path / "exported").exists() and not list(tmp_path.glob(".tmp-*"))
    refshard("export", tmp_path / "exported", "--config", config, "-o", "train.on_missing=drop")
    assert len(datasets.load_from_disk(str(tmp_path / "exported"))["train"]) == 24
    assert "must be a new folder" in refshard("export", tmp_path / "exported", "--config", config, check=65).stderr
