"""Rows in the layouts of other tools are read as those tools read them; any other says which it is nearest to."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base.errors import BadRow
from pipeline.config.columns import LAYOUT_COLUMNS, PAIR_COLUMNS
from pipeline.config.data import DataConfig
from pipeline.data.layouts import to_pair
from pipeline.data.other_layouts import COLUMNS_OF_FORMS, looks_like
from pipeline.data.pairs import FORMS, Pair
from pipeline.data.sources import open_source, read_rows
from support.processes import ROOT


def says(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


ASK, YES, NO = says("user", "Two?"), says("assistant", "Yes."), says("assistant", "No.")
BRIEF = says("system", "Be brief.")
PAIR = Pair(prompt=[ASK], chosen=[YES], rejected=[NO])


def turn(who: str, text: Any) -> dict[str, Any]:
    return {"from": who, "value": text}


def read(row: dict[str, Any], **columns: str) -> Pair:
    return to_pair(row, columns, "pairs.jsonl:7")


SHARE_GPT = {
    "conversations": [turn("human", "Two?")],
    "chosen": turn("gpt", "Yes."),
    "rejected": turn("gpt", "No."),
}
OPEN_AI = {
    "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [YES],
    "non_preferred_output": [NO],
}
ALPACA = {"instruction": "Two?", "input": "", "chosen": "Yes.", "rejected": "No."}
SWIFT = {"messages": [ASK, YES], "rejected_response": "No."}
RANKED = {"context": [ASK], "completions": [{"rank": 1, "completion": [NO]}, {"rank": 0, "completion": [YES]}]}
COMPARED = {"domain": "general", "context": [ASK], "response1": "Yes.", "response2": "No.", "overall_preference": -2}
SCORED = {
    "source": "evol_instruct",
    "instruction": "Two?",
    "completions": [
        {"model": "a", "response": "Perhaps.", "fine-grained_score": 4.0, "overall_score": 6.5},
        {"model": "b", "response": "No.", "fine-grained_score": 5.0, "overall_score": 2.0},
        {"model": "c", "response": "Yes.", "fine-grained_score": 1.0, "overall_score": 8.0},
    ],
}


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("open_ai", OPEN_AI),
        # As Arrow gives them, with the keys of all rows.
        ("open_ai", {**OPEN_AI, "chosen": None, "rejected": None, "messages": None}),
        ("share_gpt", SHARE_GPT),
        ("share_gpt", {**SHARE_GPT, "chosen": "Yes.", "rejected": "No."}),
        ("share_gpt", {**SHARE_GPT, "conversations": [ASK], "chosen": YES, "rejected": NO}),
        ("chat_shared", {"chosen": [turn("human", "Two?"), turn("gpt", "Yes.")],
                         "rejected": [turn("human", "Two?"), turn("gpt", "No.")]}),
        ("alpaca", ALPACA),
        ("alpaca", {**ALPACA, "input": None, "system": "", "history": []}),
        # The answers share a beginning, which is not the prompt.
        ("answered_messages", {"messages": [ASK], "chosen": YES, "rejected": NO}),
        ("answered_messages", {"messages": [ASK], "chosen_message": YES, "rejected_message": NO}),
        ("whole_conversations", {"chosen_messages": [ASK, YES], "rejected_messages": [ASK, NO]}),
        ("swift", SWIFT),
        ("swift", {"messages": [ASK, YES], "rejected_messages": [ASK, NO]}),
        ("swift", {"messages": [ASK, YES], "rejected_messages": [NO]}),
        ("ranked", RANKED),
        ("ranked", {**RANKED, "context": "Two?"}),
        ("compared", COMPARED),
        ("compared", {**COMPARED, "context": "Two?", "response1": "No.", "response2": "Yes.", "overall_preference": 1}),
        ("compared", {**COMPARED, "overall_preference": "-1"}),
        ("scored", SCORED),
        ("chat_answers", {"prompt": [ASK], "chosen": "Yes.", "rejected": "No."}),
        ("chat", {"prompt": ASK, "chosen": YES, "rejected": NO}),
        ("chat", {"prompt": [ASK], "chosen": YES, "rejected": NO}),
        ("chat_asked", {"prompt": "Two?", "chosen": YES, "rejected": NO}),
    ],
)  # fmt: skip
def test_a_row_of_each_layout_is_the_same_pair(form: str, row: dict[str, Any]) -> None:
    pair = read(row)
    assert pair == PAIR and pair.form == form and form in FORMS


def test_llama_factorys_instruction_input_history_and_system_are_one_conversation() -> None:
    # Its converter: earlier rounds first, instruction and input joined by a line end, the system text in front.
    row = {**ALPACA, "instruction": "Add them.", "input": "2, 3", "system": "Be brief.", "history": [["Hi", "Hello."]]}
    before = [BRIEF, says("user", "Hi"), says("assistant", "Hello.")]
    assert read(row) == Pair(prompt=[*before, says("user", "Add them.\n2, 3")], chosen=[YES], rejected=[NO])
    assert read({**row, "chosen": "The red.", "rejected": "The big."}).prompt[-1] == says("user", "Add them.\n2, 3")


def test_share_gpts_speakers_are_roles_and_its_function_calls_tool_calls() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [turn("human", "Sum?"), turn("function_call", json.dumps(call)), turn("observation", "2")]
    row = {**SHARE_GPT, "conversations": turns, "tools": json.dumps([{"name": "add"}])}
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    pair = read(row)
    assert pair.prompt == [says("user", "Sum?"), called, says("tool", "2")] and pair.tools == [{"name": "add"}]
    # A system message of the conversation stands for the column.
    spoken = {**SHARE_GPT, "conversations": [turn("system", "Be brief."), *SHARE_GPT["conversations"]]}
    for system in ({**SHARE_GPT, "system": "Be brief."}, {**spoken, "system": "Be long."}):
        assert read(system).prompt == [BRIEF, ASK]
    with pytest.raises(BadRow, match=r"conversations turn 1: from must be one of human, .* got 'robot'"):
        read({**SHARE_GPT, "conversations": [turn("robot", "Two?")]})


def test_turns_and_messages_of_one_arrow_file_have_the_keys_of_both() -> None:
    table = pa.Table.from_pylist([{"chosen": [turn("human", "Two?"), turn("gpt", "Yes.")]}, {"chosen": [ASK, YES]}])
    table = table.append_column("rejected", pa.array([[turn("human", "Two?"), turn("gpt", "No.")], [ASK, NO]]))
    share_gpt = pa.Table.from_pylist(
        [{**SHARE_GPT, "tools": None}, {"conversations": [ASK], "chosen": YES, "rejected": NO}]
    )
    for row in (*table.to_pylist(), *share_gpt.to_pylist()):
        assert read(row) == PAIR


def test_open_ais_tools_are_the_pairs() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert read({**OPEN_AI, "input": {"messages": [ASK], "tools": tools}}).tools == tools


def test_ms_swifts_earlier_rounds_are_the_prompt() -> None:
    rounds = [BRIEF, says("user", "Hi"), says("assistant", "Hello."), ASK]
    for rejected in ({"rejected_response": "No."}, {"rejected_messages": [*rounds, NO]}):
        assert read({"messages": [*rounds, YES], **rejected}).prompt == rounds


def test_a_system_column_beside_ms_swifts_messages_is_their_first_message() -> None:
    for rejected in ({"rejected_response": "No."}, {"rejected_messages": [ASK, NO]}, {"rejected_messages": [NO]}):
        row = {"system": "Be brief.", "messages": [ASK, YES], **rejected}
        assert read(row) == Pair(prompt=[BRIEF, ASK], chosen=[YES], rejected=[NO])
    spoken = {"system": "Be long.", "messages": [BRIEF, ASK, YES], "rejected_response": "No."}
    assert read(spoken).prompt == [BRIEF, ASK]


def test_the_best_of_several_is_chosen_and_the_worst_rejected_whatever_their_order() -> None:
    for completions in (SCORED["completions"], SCORED["completions"][::-1]):
        assert read({**SCORED, "completions": completions}) == PAIR
    ranked = [{"rank": rank, "completion": [says("assistant", text)]} for rank, text in ((2, "No."), (1, "Well."))]
    assert read({"context": [ASK], "completions": [*ranked, {"rank": 0, "completion": [YES]}]}) == PAIR


def test_a_random_worse_completion_depends_on_seed_and_texts_alone() -> None:
    def rejected(row: dict[str, Any], seed: int, place: str = "row") -> str:
        pair = to_pair(row, {}, place, seed)
        assert pair.chosen == [YES]
        [message] = pair.rejected
        return str(message["content"])

    turned = {**SCORED, "completions": SCORED["completions"][::-1], "source": "other"}
    drawn = [rejected(SCORED, seed) for seed in range(20)]
    assert set(drawn) == {"Perhaps.", "No."}
    assert drawn == [rejected(turned, seed, "elsewhere") for seed in range(20)]
    others = [rejected({**SCORED, "instruction": f"Two {i}?"}, 0) for i in range(20)]
    assert set(others) == {"Perhaps.", "No."}
    assert to_pair(COMPARED, {}, "row", 0) == PAIR


@pytest.mark.parametrize(
    "row",
    [
        {**COMPARED, "overall_preference": 0},
        {**SCORED, "completions": [{**item, "overall_score": 7.5} for item in SCORED["completions"]]},
        {**RANKED, "completions": [{**item, "rank": 0} for item in RANKED["completions"]]},
    ],
)
def test_a_row_of_which_no_answer_is_better_is_a_tie(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match=r"^pairs\.jsonl:7: ") as caught:
        read(row)
    assert caught.value.reason == "tie"


def test_a_layouts_columns_may_have_other_names_and_dots_lead_into_objects() -> None:
    row = {"asked": [ASK], "a": "No.", "b": "Yes.", "vote": {"all": 2}}
    names = {"context": "asked", "response1": "a", "response2": "b", "overall_preference": "vote.all"}
    assert read(row, **names) == PAIR
    nested = {"input": {"messages": [ASK]}, "output": {"good": [YES], "bad": [NO], "a.b": 1}}
    paths = {"prompt": "input.messages", "chosen": "output.good", "rejected": "output.bad"}
    assert read(nested, **paths) == PAIR
    # A column of that very name is taken first.
    assert read({**nested, "output.good": [NO]}, **paths).chosen == [NO]
    with pytest.raises(BadRow, match=r"no column 'input\.asked'"):
        read(nested, **{**paths, "prompt": "input.asked"})
    with pytest.raises(BadRow, match="no column 'votes'"):
        read(row, **{**names, "overall_preference": "votes"})


def test_columns_of_other_layouts_change_no_row_that_has_a_prompt_of_its_own() -> None:
    others = {**OPEN_AI, **SHARE_GPT, **ALPACA, **SWIFT, **RANKED, **COMPARED}
    chat = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}
    text = {"prompt": "Two?", "chosen": " Yes.", "rejected": " No."}
    for row in (chat, text, {"chosen": [ASK, YES], "rejected": [ASK, NO]}):
        assert read({**others, **row}) == read(row) and read({**others, **row}).form == read(row).form
    whole = {"chosen": "Two? Yes.", "rejected": "Two? No."}
    assert read({**ALPACA, **whole}) == read(whole)
    transcripts = {side: f"\n\nHuman: Hi\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    assert read({**ALPACA, **transcripts}) == read(transcripts)
    assert read(ALPACA | {"chosen": "Two? Yes.", "rejected": "Two? No."}, prompt="instruction").form == "text"


def test_content_parts_of_llama_factory_are_their_text() -> None:
    parts = [{"type": "text", "value": "Tw"}, {"type": "text", "value": "o?"}]
    row = {"chosen_messages": [says("user", parts), YES], "rejected_messages": [says("user", parts), NO]}
    assert read(row) == PAIR
    with pytest.raises(BadRow, match=r"content part 1 is of type 'image_url'.*\(the row is read as two whole"):
        read({**row, "chosen_messages": [says("user", [{"type": "image_url", "image_url": "a"}]), YES]})


@pytest.mark.parametrize("columns", [{}, {"prompt": "input.messages", "chosen": "preferred_output"}])
def test_parquet_gives_the_columns_that_a_layout_needs(tmp_path: Path, columns: dict[str, str]) -> None:
    rows = [OPEN_AI] if columns else [{**ALPACA, "history": [["Hi", "Hello."]], "system": "Be brief."}]
    if columns:
        columns = {**columns, "rejected": "non_preferred_output"}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    data = DataConfig(path=str(tmp_path / "pairs.parquet"), columns=columns)
    [row] = read_rows(open_source(data))
    assert to_pair(row.load(), columns, row.place) == to_pair(rows[0], columns, "row")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {key: value for key, value in OPEN_AI.items() if key != "preferred_output"},
            "OpenAI.*has no preferred_output",
        ),
        ({**OPEN_AI, "input": {"prompt": "Two?"}}, r"OpenAI.*input is an object \{prompt\}, not an object with a list"),
        ({"messages": [ASK, YES], "rejected_response": 5}, r"ms-swift.*rejected_response is a number \(5\), not an"),
        ({**COMPARED, "overall_preference": None}, "two answers.*has no overall_preference"),
        ({**ALPACA, "chosen": 5}, r"Alpaca.*chosen is a number \(5\), not text"),
        ({**SHARE_GPT, "conversations": "Two?"}, "ShareGPT.*conversations is text, not a list of messages"),
        ({**RANKED, "completions": RANKED["completions"][:1]}, "ranked completions.*not two completions or more"),
    ],
)
def test_a_row_that_fits_no_layout_says_which_is_nearest_and_what_it_lacks(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=rf"pairs\.jsonl:7: .*It comes nearest to {message}.*Layouts of other tools\)"):
        read(row)


def test_a_message_about_a_layout_knows_the_names_that_the_settings_give() -> None:
    row, names = {"asked": [ASK], "a": "Yes.", "b": "No."}, {"context": "asked", "response1": "a", "response2": "b"}
    with pytest.raises(BadRow, match=r"nearest to two answers .* but has no overall_preference \(") as refusal:
        read({**row, "vote": None}, **names, overall_preference="vote")
    assert "YOUR_COLUMN" not in str(refusal.value)


def test_a_pair_under_other_names_is_told_how_to_name_them_though_a_layout_is_near() -> None:
    row = {"prompt": "Two?", "chosen_response": " Yes.", "rejected_response": " No."}
    with pytest.raises(BadRow, match=r"Set data\.columns: \{chosen: YOUR_COLUMN, rejected: YOUR_COLUMN\} if a pair's"):
        read(row)
    assert read(row, chosen="chosen_response", rejected="rejected_response").form == "text"
    with pytest.raises(BadRow, match="KTO") as refusal:
        read({"prompt": "Two?", "completion": "Yes.", "label": True})
    assert "YOUR_COLUMN" not in str(refusal.value)


@pytest.mark.parametrize(
    "row",
    [
        {**COMPARED, "prompt": 5},
        {**RANKED, "prompt": 5, "instruction": {"id": 1}},
        {**SCORED, "completions": ["Yes.", "No."], "responses": SCORED["completions"]},
        {**SWIFT, "rejected_messages": []},
        {"messages": [ASK], "chosen_message": YES, "rejected_message": NO, "chosen": None, "rejected": None},
    ],
)
def test_of_the_columns_that_a_layout_may_read_the_one_that_fits_is_read(row: dict[str, Any]) -> None:
    assert read(row) == PAIR


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "Two?", "completion": "Yes.", "label": True}, "KTO"),
        ({"prompt": "Two?", "chosen": ["Yes."], "rejected": ["No."]}, "lists of texts"),
    ],
)
def test_a_row_of_no_pair_is_called_what_it_looks_like(row: dict[str, Any], name: str) -> None:
    with pytest.raises(BadRow, match=rf"pairs\.jsonl:7: .*It looks like .*{name}"):
        read(row)


@pytest.mark.parametrize("row", [{}, {"a": 1}, {"prompt": "Two?", "chosen": None, "rejected": 5}, {"chosen": [[]]}])
def test_a_row_like_no_layout_is_called_nothing(row: dict[str, Any]) -> None:
    assert looks_like(row) is None


def test_a_null_prompt_is_called_null() -> None:
    for row in ({"prompt": None, "chosen": [YES], "rejected": [NO]}, {"prompt": None, "chosen": "a", "rejected": "b"}):
        with pytest.raises(BadRow, match="prompt is null, and chosen and rejected share no"):
            read(row)


def test_every_column_of_a_layout_can_be_named() -> None:
    known = {*PAIR_COLUMNS, *LAYOUT_COLUMNS, "system", "question", "responses"}
    assert frozenset().union(*COLUMNS_OF_FORMS.values()) <= known and set(COLUMNS_OF_FORMS) <= set(FORMS)


def test_the_pages_rows_are_read_as_it_says() -> None:
    text = (ROOT / "docs" / "guide.md").read_text()
    section = text[text.index("## Layouts of other tools") :]
    rows = [line.strip() for line in section[: section.index("\n## ", 5)].splitlines() if line.startswith("    {")]
    forms = [read(json.loads(row)).form for row in rows]
    assert {*COLUMNS_OF_FORMS, "chat_answers"} <= set(forms)


def test_a_row_without_a_prompt_among_others_is_read_in_its_layout_from_parquet_too(tmp_path: Path) -> None:
    plain = {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "conversations": None}
    rows = [*[plain] * 300, {**plain, "prompt": None, "conversations": SHARE_GPT["conversations"]}, plain]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet", row_group_size=100)
    found = [row.load() for row in read_rows(open_source(DataConfig(path=str(tmp_path / "pairs.parquet"))))]
    assert "conversations" not in found[0] and len(found) == 302
    assert [read(dict(row)) for row in found] == [PAIR] * 302
