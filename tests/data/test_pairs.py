"""Every form of a preference row becomes the same pair, and what can't be one says why."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pipeline.base.errors import BadRow
from pipeline.config.data import DataConfig
from pipeline.data.layouts import split_shared_prompt, to_pair
from pipeline.data.pairs import Pair, is_conversational
from pipeline.data.sources import open_source, read_rows


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def read(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Pair:
    return to_pair(row, columns or {}, "pairs.jsonl:7")


relaxed = settings(deadline=None)

TEXT = {"prompt": "Two plus two?", "chosen": " Four.", "rejected": " Five."}
SIDES = ("chosen", "rejected")
CHAT = {"prompt": [user("Two plus two?")], "chosen": [assistant("Four.")], "rejected": [assistant("Five.")]}


# --- Forms --------------------------------------------------------------------------------------------------------


def test_explicit_prompt_is_taken_as_it_stands() -> None:
    assert read(TEXT) == Pair(**TEXT)


def test_explicit_prompt_is_not_split_further_though_the_answers_share_words() -> None:
    row = {"prompt": "Two plus two?", "chosen": " It is four.", "rejected": " It is five."}
    assert read(row) == Pair(**row)


def test_empty_explicit_prompt_is_a_prompt() -> None:
    assert read({**TEXT, "prompt": ""}).prompt == ""


def test_null_prompt_is_no_prompt() -> None:
    assert read({"prompt": None, "chosen": "Two? Four.", "rejected": "Two? Five."}).prompt == "Two?"


def test_messages_are_taken_as_they_stand() -> None:
    assert read(CHAT) == Pair(**CHAT)


def test_shared_messages_are_the_prompt() -> None:
    turns = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hi!"), user("Two plus two?")]
    row = {"chosen": [*turns, assistant("Four.")], "rejected": [*turns, assistant("Five."), user("Really?")]}
    pair = read(row)
    assert pair.prompt == turns
    assert pair.chosen == [assistant("Four.")]
    assert pair.rejected == [assistant("Five."), user("Really?")]


def test_equal_conversations_keep_their_last_message_as_completion() -> None:
    turns = [user("Two plus two?"), assistant("Four.")]
    pair = read({"chosen": turns, "rejected": turns})
    assert (pair.prompt, pair.chosen, pair.rejected) == (turns[:1], turns[1:], turns[1:])


def test_conversation_that_starts_another_keeps_a_message_of_its_own() -> None:
    short = [user("Hi"), assistant("Hello.")]
    pair = read({"chosen": short, "rejected": [*short, user("Go on"), assistant("No.")]})
    assert (pair.prompt, pair.chosen) == (short[:1], short[1:])


def test_prompt_text_beside_whole_conversations_is_their_own_first_message() -> None:
    turn = [user("Two plus two?")]
    pair = read({"prompt": "Two plus two?", "chosen": turn + CHAT["chosen"], "rejected": turn + CHAT["rejected"]})
    assert pair == Pair(**CHAT)


def test_prompt_text_beside_answers_of_the_assistant_alone_becomes_the_users_message() -> None:
    assert read({**CHAT, "prompt": "Two plus two?"}) == Pair(**CHAT)


def test_renamed_columns_are_found() -> None:
    row = {"question": "Two plus two?", "good": " Four.", "bad": " Five.", "chosen": "not this", "prompt": "nor this"}
    assert read(row, {"prompt": "question", "chosen": "good", "rejected": "bad"}) == Pair(**TEXT)


SPOKEN = {"system": "system", "user": "question"}
ORCA = {"system": "Be brief.", "question": "Two plus two?", "chosen": "Four.", "rejected": "Five."}


def test_texts_of_system_and_user_become_a_conversation_where_their_columns_are_named() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, user("Two plus two?")]
    assert read(ORCA, SPOKEN) == Pair(**{**CHAT, "prompt": prompt})
    assert read({**ORCA, "chosen": CHAT["chosen"]}, SPOKEN) == Pair(**{**CHAT, "prompt": prompt})


@pytest.mark.parametrize("nothing", ["", None])
def test_a_system_text_that_is_empty_is_no_message(nothing: str | None) -> None:
    assert read({**ORCA, "system": nothing}, SPOKEN) == Pair(**CHAT)


def test_user_alone_makes_a_conversation_and_replaces_the_prompt_column() -> None:
    row = {"prompt": "Two plus two?", "system": "not this", "chosen": "Four.", "rejected": "Five."}
    assert read(row, {"user": "prompt"}) == Pair(**CHAT)
    assert read({**row, "instruction": "Two plus two?", "prompt": 5}, {"user": "instruction"}) == Pair(**CHAT)


def test_columns_of_speakers_mean_nothing_unless_they_are_named() -> None:
    assert read({**TEXT, "system": "Be brief.", "user": "Someone"}) == Pair(**TEXT)


def test_speakers_are_missed_by_name() -> None:
    for name, column in SPOKEN.items():
        with pytest.raises(BadRow, match=f"no column '{column}'"):
            read({key: value for key, value in ORCA.items() if key != column}, SPOKEN)
        if name == "user":
            with pytest.raises(BadRow, match="user must be text, got null"):
                read({**ORCA, column: None}, SPOKEN)
    with pytest.raises(BadRow, match="chosen is a conversation of its own, which begins with user"):
        read({**ORCA, "chosen": [user("Two plus two?"), assistant("Four.")]}, SPOKEN)
    with pytest.raises(BadRow, match="chosen is empty"):
        read({**ORCA, "chosen": " "}, SPOKEN)
    with pytest.raises(BadRow, match="user holds half a surrogate pair"):
        read({**ORCA, "question": "\ud83d"}, SPOKEN)


def test_other_columns_are_ignored() -> None:
    assert read({**TEXT, "score": float("nan"), "id": "\ud83d"}) == Pair(**TEXT)


def test_null_keys_that_arrow_adds_are_dropped_at_every_depth() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": {"c": [{"d": 2}, 3]}}}}
    arguments = {"a": 1, "city": None, "b": {"x": None, "c": [{"d": 2, "e": None}, 3]}}
    nulls = {"type": "function", "id": None, "function": {"name": "add", "arguments": arguments}}
    tool = {"name": "add", "parameters": {"a": {"type": "int"}}}
    tool_with_nulls = {"name": "add", "parameters": {"a": {"type": "int", "enum": None}, "city": None}}
    row = {
        "prompt": [{**user("Two plus two?"), "tool_calls": None, "name": None}],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [nulls]}],
        "rejected": [{**assistant("Five."), "tool_calls": None}],
        "chat_template_kwargs": {"documents": [{"title": "a", "url": None}]},
    }
    for tools in ([tool_with_nulls], json.dumps([tool_with_nulls])):
        assert read({**row, "tools": tools}) == Pair(
            prompt=CHAT["prompt"],
            chosen=[{"role": "assistant", "tool_calls": [call]}],
            rejected=CHAT["rejected"],
            tools=[tool],
            chat_template_kwargs={"documents": [{"title": "a"}]},
        )


def test_rows_are_the_same_pairs_from_json_lines_and_parquet(tmp_path: Path) -> None:
    calls = [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "add", "arguments": {"a": 1, "b": 2}}]
    rows = [
        {**CHAT, "chosen": [{"role": "assistant", "content": "", "tool_calls": [{"function": call}]}]} for call in calls
    ]
    # Without content beside messages with one, and a call without arguments.
    rows.append({**CHAT, "chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "now"}}]}]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = []
    for name in ("rows.jsonl", "rows.parquet"):
        data = DataConfig(path=str(tmp_path / name))
        found.append([to_pair(row.load(), {}, "row") for row in read_rows(open_source(data))])
    assert found[0] == found[1]
    assert found[0][0].chosen[0]["tool_calls"] == [{"function": calls[0]}]


def test_messages_that_differ_in_null_keys_alone_are_shared() -> None:
    pair = read(
        {"chosen": [{**user("Hi"), "name": None}, assistant("Hello.")], "rejected": [user("Hi"), assistant("Go away.")]}
    )
    assert pair.prompt == [user("Hi")]


def test_text_parts_are_their_text() -> None:
    parts = [{"type": "text", "text": "Fo", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "ur."}]
    spoken = [{"type": "text", "text": "Two plus two?", "image_url": None}]
    pair = read({"prompt": [user(spoken)], "chosen": [assistant(parts)], "rejected": [assistant("Five.")]})
    assert pair == Pair(**CHAT)
    shared = {"chosen": [user(spoken), assistant(parts)], "rejected": [user("Two plus two?"), assistant("Five.")]}
    assert read(shared) == Pair(**CHAT)


def test_a_tools_result_may_be_an_object_which_templates_write_as_json() -> None:
    for result in ({"sum": 4}, 4, [1, 2]):
        prompt = [user("Two plus two?"), {"role": "tool", "content": result}]
        assert read({**CHAT, "prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("tools", [[{"name": "add"}], json.dumps([{"name": "add"}])], ids=["list", "JSON"])
def test_tools_are_a_list_or_its_json(tools: Any) -> None:
    assert read({**CHAT, "tools": tools}).tools == [{"name": "add"}]


@pytest.mark.parametrize("tools", [None, "null", "", " "])
def test_no_tools_are_none(tools: Any) -> None:
    assert read({**CHAT, "tools": tools}).tools is None
    assert read(CHAT).tools is None


def test_template_kwargs_that_are_null_are_not_set() -> None:
    assert read({**CHAT, "chat_template_kwargs": {"today": None, "enable_thinking": False}}).chat_template_kwargs == {
        "enable_thinking": False
    }
    assert read({**CHAT, "chat_template_kwargs": None}).chat_template_kwargs is None


@pytest.mark.parametrize("value", ["text", [], [{}], [{"content": "no role"}], [user("a"), "text"], None])
def test_only_a_list_of_messages_with_roles_is_a_conversation(value: Any) -> None:
    assert not is_conversational(value)
    assert is_conversational([{"role": "user"}])


# --- Implicit prompts of plain text -------------------------------------------------------------------------------


def test_transcript_is_split_after_the_last_turn_that_both_share_though_the_answers_start_alike() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Two plus two?\n\nAssistant:"
    pair = read({"chosen": f"{start} It is four.", "rejected": f"{start} It is five."})
    assert (pair.prompt, pair.chosen, pair.rejected) == (start, " It is four.", " It is five.")


def test_transcript_whose_humans_differ_is_split_before_they_do() -> None:
    start = "Human: Hi\n\nAssistant:"
    pair = read({"chosen": f"{start} Hello!\n\nHuman: A?\n\nAssistant: B.", "rejected": f"{start} Hello!\n\nHuman: C?"})
    assert pair.prompt == start


def test_transcript_with_crlf_and_indented_turns_is_split_too() -> None:
    start = "Human: Hi\r\n\r\n  Assistant:"
    assert read({"chosen": f"{start} Yes.", "rejected": f"{start} Yes!"}).prompt == start


def test_transcript_may_begin_with_the_assistant() -> None:
    assert read({"chosen": "Assistant: It is four.", "rejected": "Assistant: It is five."}).prompt == "Assistant:"


def test_equal_transcripts_are_split_at_their_last_turn() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Hello!"
    pair = read({"chosen": text, "rejected": text})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("\n\nHuman: Hi\n\nAssistant:", " Hello!", " Hello!")


def test_word_assistant_inside_a_line_is_no_turn() -> None:
    pair = read({"chosen": "Ask the Assistant: is it four", "rejected": "Ask the Assistant: is it five"})
    assert pair.prompt == "Ask the Assistant: is it"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Two plus two? Four.", "Two plus two? Five.", "Two plus two?"),
        ("Two plus two?\nFour.", "Two plus two?\nFive.", "Two plus two?\n"),
        ("It is well-known", "It is well-made", "It is"),
        ("I can't", "I can", "I"),
        ("Say it", "Say it again", "Say"),
        ("Say it.", "Say it. Again", "Say it"),
        ("Say Γειά", "Say Γεια", "Say"),
        ("Caf\u0065\u0301 no", "Cafe\u0301 na", "Cafe\u0301"),
        ("Say ne\u0301e", "Say ne\u0300e", "Say"),
        ("说：你好", "说：你们", "说：你"),
        ("Two  spaces", "Two  places", "Two "),
    ],
)
def test_other_text_is_split_before_the_first_word_that_differs(chosen: str, rejected: str, prompt: str) -> None:
    assert split_shared_prompt(chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


WORDS = st.lists(
    st.sampled_from(
        ["Two", "two?", "plus", "can't", "well-known", " ", "\n", ".", "\n\nAssistant:", "你好", "é", "<|x|>"]
    ),
    max_size=8,
).map(" ".join)
TEXTS = st.one_of(WORDS, st.text(max_size=12))


def _inside_ascii_word(text: str, i: int) -> bool:
    return 0 < i < len(text) and re.fullmatch(r"[A-Za-z0-9_]{2}", text[i - 1 : i + 1]) is not None


@given(shared=TEXTS, chosen=TEXTS, rejected=TEXTS)
@example(shared="Two plus t", chosen="wo", rejected="hree")
@example(shared="Two plus two", chosen="", rejected="nty")
@example(shared="\n\nAssistant:", chosen="", rejected=" Yes")
@relaxed
def test_split_keeps_both_texts_and_every_word_whole(shared: str, chosen: str, rejected: str) -> None:
    chosen, rejected = shared + chosen, shared + rejected
    try:
        prompt, good, bad = split_shared_prompt(chosen, rejected)
    except ValueError:
        assume(False)
        return
    assert (prompt + good, prompt + bad) == (chosen, rejected)
    assert prompt.strip()
    for text in (chosen, rejected):
        assert not _inside_ascii_word(text, len(prompt))
    if not prompt.endswith("Assistant:"):
        assert good
        assert bad


@given(prompt=st.text("ab ?.\n", min_size=1), chosen=st.text("ab ?.\n"), rejected=st.text("ab ?.\n"))
@relaxed
def test_split_depends_on_no_order_of_the_two(prompt: str, chosen: str, rejected: str) -> None:
    try:
        start, good, bad = split_shared_prompt(prompt + chosen, prompt + rejected)
    except ValueError:
        with pytest.raises(ValueError, match=r"share no beginning|are the same text"):
            split_shared_prompt(prompt + rejected, prompt + chosen)
        return
    assert split_shared_prompt(prompt + rejected, prompt + chosen) == (start, bad, good)


@given(words=st.lists(st.text("abc", min_size=1), min_size=1), last=st.text("xyz", min_size=1))
@relaxed
def test_words_before_the_first_that_differs_are_all_in_the_prompt(words: list[str], last: str) -> None:
    shared = " ".join(words)
    assert split_shared_prompt(f"{shared} a{last}.", f"{shared} ab{last}.") == (shared, f" a{last}.", f" ab{last}.")


# --- Rows that can't be a pair ------------------------------------------------------------------------------------

BAD: list[tuple[str, str, dict[str, Any]]] = [
    (
        "missing_column",
        r"no column 'rejected'.* Set data.columns: \{rejected: YOUR_COLUMN\}",
        {"prompt": "a", "chosen": "b"},
    ),
    ("missing_column", r"no column 'chosen'.* \{chosen: YOUR_COLUMN, rejected: YOUR_COLUMN\}", {"good": "a"}),
    ("wrong_type", "chosen must be text .* got null", {**TEXT, "chosen": None}),
    ("wrong_type", r"rejected must be text .* got a number \(5\)", {**TEXT, "rejected": 5}),
    ("wrong_type", "chosen must be text .* got bytes", {**TEXT, "chosen": b"Four."}),
    ("wrong_type", "chosen must be text .* got a list of text", {**TEXT, "chosen": ["Four."]}),
    (
        "wrong_type",
        r"chosen must be text .* got a list of objects \{content\}",
        {**CHAT, "chosen": [{"content": "no role"}]},
    ),
    ("wrong_type", r"prompt must be text .* got an object \{content\}", {**TEXT, "prompt": {"content": "a"}}),
    ("wrong_type", "one of chosen and rejected is text", {**CHAT, "rejected": "Five."}),
    ("wrong_type", "one of chosen and rejected is text", {**CHAT, "chosen": "Four."}),
    (
        "wrong_type",
        r"rejected message 1: role is a number \(5\), not text",
        {**CHAT, "rejected": [{"role": 5, "content": "a"}]},
    ),
    (
        "wrong_type",
        "rejected must be text .* got a list of objects",
        {**CHAT, "rejected": [{"role": None, "content": "a"}]},
    ),
    (
        "not_text",
        "prompt message 1: content part 2 is of type 'image_url'",
        {**CHAT, "prompt": [user([{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": "a"}])]},
    ),
    (
        "not_text",
        "content part 1 is of type 'pizza'",
        {**CHAT, "chosen": [assistant([{"type": "pizza", "text": "a"}])]},
    ),
    (
        "not_text",
        r"content part 1 holds no text, it is an object \{type\}",
        {**CHAT, "chosen": [assistant([{"type": "text"}])]},
    ),
    (
        "not_text",
        r"chosen message 1: content is an object \{text\}, not text",
        {**CHAT, "chosen": [assistant({"text": "a"})]},
    ),
    ("not_text", "chosen message 1: content is a list of text, not text", {**CHAT, "chosen": [assistant(["Four."])]}),
    ("not_utf8", "half a surrogate", {**CHAT, "chosen": [assistant([{"type": "text", "text": "\ud83d"}])]}),
    ("too_large", "nested deeper", {**CHAT, "tools": functools.reduce(lambda inner, _: [inner], range(9000), [])}),
    ("wrong_type", "tools is text but not JSON", {**CHAT, "tools": "[{"}),
    ("wrong_type", "tools must be a list .* got an object", {**CHAT, "tools": {"name": "add"}}),
    ("wrong_type", "tools must be a list .* got an object", {**CHAT, "tools": '{"name": "add"}'}),
    ("wrong_type", "chat_template_kwargs must be a mapping", {**CHAT, "chat_template_kwargs": "today"}),
    ("empty_completion", "chosen is empty after the prompt", {**TEXT, "chosen": ""}),
    ("empty_completion", "rejected is empty after the prompt", {**TEXT, "rejected": " \n"}),
    ("empty_completion", "chosen is an empty list of messages", {**CHAT, "chosen": []}),
    ("empty_completion", "chosen is empty after the prompt", {**CHAT, "chosen": [assistant(" ")]}),
    ("empty_completion", "rejected is empty after the prompt", {**CHAT, "rejected": [assistant(None)]}),
    (
        "empty_completion",
        "chosen is empty after the prompt",
        {"chosen": "Human: Hi\n\nAssistant:", "rejected": "Human: Hi\n\nAssistant: Hello"},
    ),
    ("empty_prompt", "prompt is an empty list of messages", {**CHAT, "prompt": []}),
    ("no_shared_prompt", "share no beginning", {"chosen": "Four.", "rejected": "Five."}),
    ("no_shared_prompt", "share no beginning", {"chosen": "Fourteen", "rejected": "Fourth"}),
    ("no_shared_prompt", "share no beginning", {"chosen": "\n Four", "rejected": "\n Five"}),
    ("no_shared_prompt", "share no beginning", {"chosen": "", "rejected": "Five"}),
    ("no_shared_prompt", "same text", {"chosen": "Two? Four.", "rejected": "Two? Four."}),
    ("no_shared_prompt", "share no first message", {"chosen": [user("a"), user("b")], "rejected": [user("b")]}),
    ("no_shared_prompt", "share no first message", {"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}),
    (
        "messages_as_text",
        "prompt, chosen, rejected: must be messages",
        {name: json.dumps(messages) for name, messages in CHAT.items()},
    ),
    # As pandas writes lists of objects to CSV, from lists and from Parquet.
    ("messages_as_text", "chosen, rejected: must be messages", {**TEXT, **{s: str(CHAT[s]) for s in SIDES}}),
    (
        "messages_as_text",
        "chosen, rejected: must be messages",
        {
            **TEXT,
            **dict.fromkeys(SIDES, "[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'assistant'}]"),
        },
    ),
    ("messages_as_text", "prompt: must be messages", {**TEXT, "prompt": json.dumps([{"from": "human", "value": "a"}])}),
    (
        "repeated_prompt",
        "chosen begins with messages of the prompt",
        {**CHAT, "chosen": [*CHAT["prompt"], *CHAT["chosen"]]},
    ),
    (
        "repeated_prompt",
        "rejected begins with messages of the prompt",
        {
            **CHAT,
            "prompt": [{"role": "system", "content": "Be brief."}, *CHAT["prompt"]],
            "rejected": [*CHAT["prompt"], *CHAT["rejected"]],
        },
    ),
    (
        "wrong_type",
        "chosen message 1: tool_calls is text, not a list",
        {**CHAT, "chosen": [{**assistant(""), "tool_calls": "[]"}]},
    ),
    (
        "not_text",
        r"chosen message 1: content is a boolean \(true\), not text",
        {**CHAT, "chosen": [assistant(True)]},
    ),
    ("not_utf8", "chosen message 1: role holds half", {**CHAT, "chosen": [{"role": "\ud83d", "content": "a"}]}),
    ("not_utf8", "prompt holds half a surrogate pair", {**TEXT, "prompt": "\ud83d"}),
    ("not_utf8", "rejected holds half a surrogate pair", {**TEXT, "rejected": "a\udc4b"}),
    ("not_utf8", "chosen message 1: content holds half a surrogate pair", {**CHAT, "chosen": [assistant("\ud83d")]}),
]


@pytest.mark.parametrize(
    "text",
    [
        '{"role": "admin", "content": "all"}',
        '[{"content": "a"}]',
        '{"messages": [{"role": "user", "content": "a"}]}',
        'Send [{"role": "user", "content": "a"}]',
        '[{"role": "user", "content": "a"}] is what you send.',
    ],
)
def test_json_that_is_an_answer_is_text(text: str) -> None:
    assert read({**TEXT, "chosen": text, "rejected": f" {text}"}).chosen == text


def test_one_answer_of_written_messages_is_text() -> None:
    assert read({**TEXT, "chosen": str(CHAT["chosen"])}).form == "text"


def test_a_completion_that_begins_with_another_user_message_repeats_nothing() -> None:
    row = {**CHAT, "chosen": [user("And three?"), assistant("Six.")]}
    assert read(row).chosen == row["chosen"]
    begun = {**CHAT, "prompt": [*CHAT["prompt"], assistant("Four.")]}
    assert read(begun).chosen == CHAT["chosen"]


@pytest.mark.parametrize(("reason", "message", "row"), BAD)
def test_bad_row_says_where_it_stands_and_what_is_wrong(reason: str, message: str, row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match=rf"pairs\.jsonl:7: .*{message}") as caught:
        read(row)
    assert caught.value.reason == reason
    assert caught.value.exit_status == 65


def test_missing_column_names_those_that_are_there_and_the_setting() -> None:
    with pytest.raises(BadRow, match=r"there are 'question', 'good'.*data\.columns"):
        read({"question": "Two?", "good": "Four"})


@pytest.mark.parametrize("ours", ["prompt", "chosen", "rejected"])
def test_renamed_column_that_is_not_there_is_missing_even_if_the_row_could_do_without(ours: str) -> None:
    row = {"prompt": "Two?", "chosen": "The answer is four", "rejected": "The answer is five"}
    with pytest.raises(BadRow, match="no column 'qestion'") as caught:
        read(row, {ours: "qestion"})
    assert caught.value.reason == "missing_column"


def test_a_korean_word_is_not_cut_though_its_characters_are_wide() -> None:
    assert split_shared_prompt("질문입니다 대답은", "질문입니다 대신에") == ("질문입니다", " 대답은", " 대신에")
