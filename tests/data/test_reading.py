"""How a set's first rows are read, what is not read, and what is refused; a healthy set raises no alarm."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base.errors import ConfigError
from pipeline.config.data import DataConfig
from pipeline.data.reading import Reading, look_at_rows, say_how_read
from pipeline.data.sources import open_source
from support.runs import HH, write_jsonl


def says(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def look(folder: Path, rows: list[dict[str, Any]], *, has_template: bool = True, **columns: str) -> Reading:
    data = DataConfig(path=str(write_jsonl(folder / "pairs.jsonl", rows)), columns=columns)
    return look_at_rows(open_source(data), data, has_template=has_template)


ALPACA = [{"instruction": f"Name {i}", "chosen": f"The red of {i}", "rejected": f"The big of {i}"} for i in range(8)]
ASKED = [{"question": row["instruction"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ALPACA]
TEXTS = [{"prompt": f"Name {i}", "chosen": f"Red {i}", "rejected": f"Big {i}"} for i in range(8)]
CHATS: list[dict[str, Any]] = [
    {
        "prompt": [says("user", row["prompt"])],
        "chosen": [says("assistant", row["chosen"])],
        "rejected": [says("assistant", row["rejected"])],
    }
    for row in TEXTS
]
WHOLE = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHATS]


@pytest.mark.parametrize(
    ("rows", "columns", "line"),
    [
        (TEXTS, {}, "text, prompt given; columns not read: none"),
        (WHOLE, {}, "conversations, prompt = the messages that the two share; columns not read: none"),
        (
            [{**row, "prompt": f" Name {i}", "id": i, "score": 0.5} for i, row in enumerate(WHOLE)],
            {},
            "conversations, prompt = the messages that the two share, text prompt ignored; columns not read: id, score",
        ),
        (
            [{**row, "system": "Be brief."} for row in TEXTS],
            {"system": "system", "user": "prompt"},
            "conversations, made of the texts that data.columns names; columns not read: none",
        ),
        (ALPACA, {}, "Alpaca's preferences (instruction, input, chosen, rejected); columns not read: none"),
        (
            [{"input": {"messages": row["prompt"]}, "good": row["chosen"], "bad": row["rejected"]} for row in CHATS],
            {"prompt": "input.messages", "chosen": "good", "rejected": "bad"},
            "conversations, prompt given; columns not read: none",
        ),
        (
            [*CHATS, TEXTS[0]],
            {},
            "conversations, prompt given (8) | text, prompt given (1); columns not read: none",
        ),
    ],
)
def test_a_healthy_set_has_one_line_and_no_finding(
    tmp_path: Path, rows: list[dict[str, Any]], columns: dict[str, str], line: str
) -> None:
    reading = look(tmp_path, rows, has_template=rows is not TEXTS, **columns)
    assert (reading.line, dict(reading.findings), reading.refused) == (line, {}, None)


@pytest.mark.skipif(not HH.exists(), reason=f"no {HH}")
def test_real_transcripts_raise_no_alarm_even_for_a_chat_model() -> None:
    data = DataConfig(path=str(HH))
    reading = look_at_rows(open_source(data), data, has_template=True)
    assert list(reading.forms) == ["transcripts"] and not reading.findings and reading.refused is None


@pytest.mark.parametrize(
    ("rows", "has_template", "setting"),
    [
        (ASKED, True, "{user: question}"),
        (ASKED, False, "{prompt: question}"),
        # Answers that share nothing are no pairs at all.
        ([{**row, "rejected": "No."} for row in ASKED], True, "{user: question}"),
        ([{**row, "system": "Be brief."} for row in ASKED], True, "{system: system, user: question}"),
        ([{**row, "input": "" if i % 2 else "3"} for i, row in enumerate(ASKED)], True, "join question and input"),
        (
            [{"Question": row["prompt"][0]["content"], "chosen": row["chosen"], "rejected": row["rejected"]}
             for row in CHATS], False, "{user: Question}",
        ),
        (
            [{"conversation": [{"from": "human", "value": row["instruction"]}], "chosen": row["chosen"],
              "rejected": row["rejected"]} for row in ALPACA], True, "set data.columns: {prompt: conversation",
        ),
    ],
)  # fmt: skip
def test_answers_alone_beside_an_unread_prompt_are_refused_with_the_setting_that_reads_it(
    tmp_path: Path, rows: list[dict[str, Any]], has_template: bool, setting: str
) -> None:
    reading = look(tmp_path, rows, has_template=has_template)
    assert set(reading.findings) <= {"missed_prompt", "unread_system"}
    assert setting in str(reading.refused) and str(reading.refused).startswith("data.columns: must name the column")
    data = DataConfig(path=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.columns: must name"):
        say_how_read("train", open_source(data), data, has_template=has_template)


def test_a_prompt_that_both_texts_begin_with_is_read_whatever_columns_there_are(tmp_path: Path) -> None:
    rows = [
        {**row, **{side: f"{row['instruction']}?\n{row[side]}" for side in ("chosen", "rejected")}} for row in ALPACA
    ]
    reading = look(tmp_path, rows, has_template=False)
    assert not reading.findings and reading.refused is None and reading.unread == ("instruction",)


def test_a_column_of_names_is_no_prompt(tmp_path: Path) -> None:
    rows = [{"user": f"user{i}", "chosen": row["chosen"], "rejected": row["rejected"]} for i, row in enumerate(ALPACA)]
    assert look(tmp_path, rows, has_template=False).refused is None


@pytest.mark.parametrize(
    ("rows", "has_template", "found", "remedy"),
    [
        ([{**row, "system": "Be brief."} for row in CHATS], True, "unread_system", "write it as the first message"),
        ([{**row, "system": "Be brief."} for row in TEXTS], False, "unread_system", "in front of the prompt"),
        (TEXTS, True, "template_unused", "set data.columns: {user: prompt}"),
        ([{**row, "prompt": "What else?"} for row in WHOLE], True, "ignored_prompt", "write it as a message"),
        ([{**row, "chosen": f"{row['prompt']}: red", "rejected": f"{row['prompt']}: big"} for row in TEXTS], False,
         "repeated_prompt", "take the column prompt out"),
    ],
)  # fmt: skip
def test_what_is_probably_meant_otherwise_is_found_with_a_remedy(
    tmp_path: Path, rows: list[dict[str, Any]], has_template: bool, found: str, remedy: str
) -> None:
    reading = look(tmp_path, rows, has_template=has_template)
    assert list(reading.findings) == [found] and remedy in reading.findings[found] and reading.refused is None


def test_a_remedy_keeps_the_columns_that_are_named(tmp_path: Path) -> None:
    rows = [{"ask": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "system": "Be brief."} for r in TEXTS]
    found = look(tmp_path, rows, prompt="ask", chosen="good", rejected="bad").findings
    for name in ("unread_system", "template_unused"):
        assert "{system: system, user: ask, chosen: good, rejected: bad}" in found[name]


def test_texts_with_the_marks_of_a_template_are_as_they_are_meant(tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"} for row in TEXTS]
    assert not look(tmp_path, rows).findings


def test_a_system_message_that_is_read_is_not_missed(tmp_path: Path) -> None:
    rows = [{**row, "system": "Be brief.", "prompt": [says("system", "Be  brief."), *row["prompt"]]} for row in CHATS]
    assert not look(tmp_path, rows).findings


def test_columns_that_a_pair_does_not_need_are_seen_in_parquet_too(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ASKED), tmp_path / "pairs.parquet")
    data = DataConfig(path=str(tmp_path / "pairs.parquet"))
    assert look_at_rows(open_source(data), data, has_template=True).refused is not None


def test_many_columns_are_named_in_part(tmp_path: Path) -> None:
    reading = look(tmp_path, [{**TEXTS[0], **{f"c{i}": i for i in range(20)}}], has_template=False)
    assert reading.line.endswith("c10, c11 and 8 more")


def test_the_first_row_is_shown_as_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"chosen": 5}, {**ALPACA[0], "input": "a" * 100, "system": "Be brief."}]
    reading = look(tmp_path, rows)
    place, cut = tmp_path / "pairs.jsonl", "Name 0\\n" + "a" * 50 + "..."
    shown = f"prompt [system: 'Be brief.', user: '{cut}'] | chosen [assistant: 'The red of 0'] | rejected [assistant: "
    assert reading.first == f"{place}:2: {shown}'The big of 0']"
    data = DataConfig(path=str(place))
    say_how_read("train", open_source(data), data, has_template=True)
    assert f"train: first row as read: {reading.first}" in capsys.readouterr().out
    assert look(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}]).first == (
        f"{place}:1: prompt 'a' | chosen 'b' | rejected 'c'"
    )
