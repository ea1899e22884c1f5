"""Reference log-probs for fairseq2 and open-instruct: their names and order, only where their tokens are ours."""

import datetime
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from pipeline.base.errors import ConfigError, DataError, StorageError
from pipeline.config.data import DataConfig
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.data.intake import Ledger, Outcome, outcome_of
from pipeline.data.rows import Row
from pipeline.models.files import load_tokenizer
from stages.export import as_fairseq2, as_open_instruct, command
from stages.export.scored import ScoredRow
from stages.import_scores import command as import_scores
from support.models import make_tokenizer
from support.runs import kept, simple_rows, write_jsonl

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that marks the assistant's tokens, as fairseq2 needs it"""


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class Rows(list[ScoredRow]):
    """Scored rows in place of a set with a store: sums -1 and -2, -3 and -4, and so on."""

    def __init__(self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int | None = None) -> None:
        self.tokenizer, self.ledger = tokenizer, Ledger()
        data = DataConfig(path="x", max_length=max_length)
        made = [outcome_of(Row(i, f"x:{i}", lambda row=row: row), tokenizer, data) for i, row in enumerate(rows)]
        super().__init__(scored(outcome, -1.0 - 2 * i) for i, outcome in enumerate(made))

    def summary(self) -> str:
        return self.ledger.summary()


def scored(outcome: Outcome, chosen: float) -> ScoredRow:
    assert outcome.kept is not None
    return ScoredRow(outcome, outcome.kept, chosen, chosen - 1)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train" / "pairs.jsonl").read_text().splitlines()]


def write(rows: Rows, folder: Path) -> None:
    as_fairseq2.write({"train": rows}, folder)  # type: ignore[dict-item]


def test_fairseq2_gets_texts_and_sums_under_its_names(tmp_path: Path) -> None:
    rows = simple_rows(2)
    write(Rows(rows, make_tokenizer(bos=True)), tmp_path)
    assert lines(tmp_path) == [
        {
            "id": i,
            "src": row["prompt"],
            "tgt_chosen": row["chosen"],
            "tgt_rejected": row["rejected"],
            "reference_score_chosen": -1.0 - 2 * i,
            "reference_score_rejected": -2.0 - 2 * i,
        }
        for i, row in enumerate(rows)
    ]


def test_fairseq2_gets_conversations_whose_marked_tokens_are_the_completion(tmp_path: Path, capsys: Captured) -> None:
    prompt = [turn("user", "how?")]
    one = {"prompt": prompt, "chosen": [turn("assistant", "so")], "rejected": [turn("assistant", "no")]}
    earlier = [turn("user", "what?"), turn("assistant", "that"), *prompt]
    write(Rows([one, {**one, "prompt": earlier}, {**one, "tools": [{}]}], make_tokenizer(template=MARKED)), tmp_path)
    [line] = lines(tmp_path)
    assert line["chat_chosen"] == [*prompt, turn("assistant", "so")]
    assert line["chat_rejected"] == [*prompt, turn("assistant", "no")]
    assert (line["reference_score_chosen"], line["reference_score_rejected"]) == (-1, -2)
    said = capsys.readouterr().out
    # The mark is on every turn of the assistant's, and ours is on the last.
    assert "train: 1 pair; 1 left out: fairseq2 would score other tokens; 1 left out: fairseq2 has no tools" in said


def test_fairseq2_gets_no_pair_that_it_would_tokenize_or_cut_otherwise(tmp_path: Path, capsys: Captured) -> None:
    tokenizer = make_tokenizer(bos=True)
    [long] = simple_rows(1, start=7)
    ends = {"prompt": "Is it", "chosen": " so</s>", "rejected": " no"}
    texts = [*simple_rows(1), ends, {**long, "chosen": long["chosen"] * 9}]
    write(Rows(texts, tokenizer, max_length=60), tmp_path)
    assert [line["id"] for line in lines(tmp_path)] == [0]
    said = capsys.readouterr().out
    assert "1 left out: fairseq2 would score other tokens" in said
    assert "1 left out: data.max_length cuts them" in said
    # Tokenized apart, two parts of a word are not what the word is.
    apart = {"prompt": "The qui", "chosen": "ck fox", "rejected": "z"}
    with pytest.raises(DataError, match="train: no pair can be written for fairseq2; 1 left out: fairseq2 would"):
        write(Rows([apart], tokenizer), tmp_path / "apart")


@pytest.mark.parametrize("fault", ["", "{{ 1 + '' }}"], ids=["no marks", "a template that fails"])
def test_fairseq2_gets_no_conversation_whose_tokens_the_library_can_t_mark(tmp_path: Path, fault: str) -> None:
    plain = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    one = {"prompt": [turn("user", "how?")], "chosen": [turn("assistant", "so")], "rejected": [turn("assistant", "no")]}
    rows = Rows([one], make_tokenizer(template=plain))
    rows.tokenizer.chat_template = plain.replace("{{ m.content }}", fault + "{{ m.content }}")
    with pytest.raises(DataError, match="fairseq2 would score other tokens"):
        write(rows, tmp_path)


def test_fairseq2_gets_no_conversation_whose_template_writes_the_day_s_date(tmp_path: Path) -> None:
    """The tokens would be these today, and others when fairseq2 trains."""
    one = {"prompt": [turn("user", "how?")], "chosen": [turn("assistant", "so")], "rejected": [turn("assistant", "no")]}
    dated = "{% if messages[0].role == 'system' %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    with pytest.raises(DataError, match="1 left out: the chat template writes the day's date"):
        write(Rows([one], make_tokenizer(template=MARKED + dated)), tmp_path)


def test_fairseq2_gets_messages_with_keys_that_are_no_json(tmp_path: Path) -> None:
    asked = {**turn("user", "how?"), "at": datetime.datetime(2026, 1, 2, 3)}
    one = {"prompt": [asked], "chosen": [turn("assistant", "so")], "rejected": [turn("assistant", "no")]}
    write(Rows([one], make_tokenizer(template=MARKED)), tmp_path)
    assert lines(tmp_path)[0]["chat_chosen"][0]["at"] == "2026-01-02 03:00:00"


@pytest.fixture
def stored(make_run: MakeRun, tmp_path: Path) -> tuple[Config, list[tuple[float, float]]]:
    """A run whose store has made-up log-probs, and their sums."""
    rows = simple_rows(6)
    config = load_config(make_run(rows, reference={"declared": "judge"}))
    sums, scores = [], []
    for i, (row, pair) in enumerate(zip(rows, kept(config), strict=True)):
        logps = [
            [-(i + 1) / 4 - j / 8] * len(ids) for j, ids in enumerate((pair.pair.chosen_ids, pair.pair.rejected_ids))
        ]
        sums.append((sum(logps[0]), sum(logps[1])))
        scores.append({**row, "c": logps[0], "r": logps[1]})
    file = write_jsonl(tmp_path / "scores.jsonl", scores)
    import_scores.run(config, file, set_name="train", chosen="c", rejected="r")
    return config, sums


def tokenized(config: Config, folder: Path, order: list[int], *, indexed: bool = True) -> Path:
    """Write the run's pairs as open-instruct's transformations leave them, in another order."""
    rows = []
    for pair in (found.pair for found in kept(config)):
        row: dict[str, Any] = {}
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            row[f"{side}_input_ids"] = [*pair.prompt_ids, *ids]
            row[f"{side}_labels"] = [*[-100] * len(pair.prompt_ids), *ids]
            row[f"{side}_attention_mask"] = [1] * (len(pair.prompt_ids) + len(ids))
        rows.append(row)
    indices = {"index": list(reversed(range(len(order))))} if indexed else {}
    columns = {name: [rows[i][name] for i in order] for name in rows[0]}
    datasets.Dataset.from_dict({**columns, **indices}).save_to_disk(str(folder))
    return folder


ORDER = [3, 0, 5, 1, 4, 2]


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "position"])
def test_open_instruct_finds_each_row_s_log_probs_at_its_index(
    stored: tuple[Config, list[tuple[float, float]]], tmp_path: Path, indexed: bool
) -> None:
    config, sums = stored
    folder = tokenized(config, tmp_path / "tokenized", ORDER, indexed=indexed)
    command.run(config, tmp_path / "cache.pt", form="open-instruct", tokenized=folder)
    # As its TensorCache.from_disk does.
    cache = torch.load(tmp_path / "cache.pt", weights_only=True)
    assert {name: (t.dtype, len(t)) for name, t in cache.items()} == {
        "chosen_logps": (torch.float32, 6),
        "rejected_logps": (torch.float32, 6),
    }
    at = list(reversed(range(6))) if indexed else list(range(6))
    for position, i in enumerate(ORDER):
        found = tuple(float(cache[name][at[position]]) for name in ("chosen_logps", "rejected_logps"))
        assert found == pytest.approx(sums[i])


def test_open_instruct_s_dpo_norm_gets_averages(
    stored: tuple[Config, list[tuple[float, float]]], make_run: MakeRun, tmp_path: Path
) -> None:
    config = load_config(
        make_run(simple_rows(6), reference={"declared": "judge"}, loss={"type": "sigmoid_norm", "beta": 5})
    )
    folder = tokenized(config, tmp_path / "tokenized", list(range(6)))
    command.run(config, tmp_path / "cache.pt", form="open-instruct", tokenized=folder)
    cache = torch.load(tmp_path / "cache.pt", weights_only=True)
    assert cache["chosen_logps"].flip(0).tolist() == pytest.approx([-(i + 1) / 4 for i in range(6)])
    assert cache["rejected_logps"].flip(0).tolist() == pytest.approx([-(i + 1) / 4 - 1 / 8 for i in range(6)])


def test_open_instruct_gets_no_file_for_rows_of_other_tokens(
    stored: tuple[Config, list[tuple[float, float]]], tmp_path: Path
) -> None:
    config, _ = stored
    whole = datasets.load_from_disk(str(tokenized(config, tmp_path / "tokenized", ORDER)))
    faults: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "another token": lambda row: {"chosen_input_ids": [9, *row["chosen_input_ids"][1:]]},
        "a label amid the prompt": lambda row: {
            "chosen_labels": [row["chosen_input_ids"][0], *row["chosen_labels"][1:]]
        },
        "nothing scored": lambda row: {"rejected_labels": [-100] * len(row["rejected_labels"])},
    }
    for name, fault in faults.items():
        folder = tmp_path / name
        whole.map(lambda row, i, fault=fault: fault(row) if i == 2 else {}, with_indices=True).save_to_disk(str(folder))
        with pytest.raises(DataError, match=r"1 row of 6 are not pairs of this run, .* \(first: row 2\)"):
            command.run(config, tmp_path / "cache.pt", form="open-instruct", tokenized=folder)
    twice = whole.remove_columns("index").add_column("index", [0, 1, 1, 3, 4, 5])
    twice.save_to_disk(str(tmp_path / "twice"))
    with pytest.raises(DataError, match="row 2: index must be a row's own number, got 1"):
        command.run(config, tmp_path / "cache.pt", form="open-instruct", tokenized=tmp_path / "twice")
    whole.remove_columns("chosen_labels").save_to_disk(str(tmp_path / "texts"))
    for folder in (tmp_path, tmp_path / "texts"):
        with pytest.raises(ConfigError, match="--tokenized: must "):
            command.run(config, tmp_path / "cache.pt", form="open-instruct", tokenized=folder)
    with pytest.raises(ConfigError, match="--tokenized: must be given with --format open-instruct"):
        command.run(config, tmp_path / "cache.pt", form="open-instruct")
    assert not (tmp_path / "cache.pt").exists() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("form", ["datasets", "fairseq2"])
def test_pairs_that_were_not_scored_are_left_out_and_counted(
    stored: tuple[Config, list[tuple[float, float]]], make_run: MakeRun, tmp_path: Path, capsys: Captured, form: str
) -> None:
    config = load_config(make_run(simple_rows(8), reference={"declared": "judge"}, train={"on_missing": "drop"}))
    command.run(config, tmp_path / "out", form=form)
    assert "train: 6 pairs; 8 rows, 8 pairs kept; 2 left out: not scored" in capsys.readouterr().out


def test_a_full_disk_is_a_failure_of_the_disk(
    stored: tuple[Config, list[tuple[float, float]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = stored

    def full(*arguments: Any, **more: Any) -> None:
        # As its builder raises whatever stops it.
        raise datasets.exceptions.DatasetGenerationError("while generating") from OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(datasets.Dataset, "from_generator", full)
    with pytest.raises(StorageError, match=r"/out: the disk is full\. Free some space"):
        command.run(config, tmp_path / "out")
    assert not list(tmp_path.glob(".tmp-*"))
    folder = tokenized(config, tmp_path / "tokenized", ORDER)
    rows: Any = Rows(simple_rows(6), load_tokenizer(config))
    with pytest.raises(OSError, match="No space left"):
        as_open_instruct.write([rows], folder, Path("/dev/full"), averages=False)


def test_fairseq2_s_lines_are_written_from_a_store(
    stored: tuple[Config, list[tuple[float, float]]], tmp_path: Path
) -> None:
    config, sums = stored
    command.run(config, tmp_path / "lines", form="fairseq2")
    found = [(line["reference_score_chosen"], line["reference_score_rejected"]) for line in lines(tmp_path / "lines")]
    assert found == [pytest.approx(pair) for pair in sums]
