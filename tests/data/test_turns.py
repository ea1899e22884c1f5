"""ms-swift's calls of tools and their results are messages that chat templates know."""

import json
from typing import Any

import pytest

from pipeline.base.errors import BadRow
from pipeline.data.layouts import to_pair
from pipeline.data.turns import with_tool_calls

CALL = {"name": "add", "arguments": {"a": 1}}


def says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def calls(*functions: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": each} for each in functions]}


def test_ms_swifts_tool_call_and_tool_response_are_roles_of_templates() -> None:
    written = [says("user", "Sum?"), says("tool_call", json.dumps(CALL)), says("tool_response", "2")]
    row = {"messages": [*written, says("assistant", "2.")], "rejected_response": "3.", "tools": '[{"name": "add"}]'}
    pair = to_pair(row, {}, "pairs.jsonl:7")
    assert pair.prompt == [says("user", "Sum?"), calls(CALL), says("tool", "2")]
    assert pair.chosen == [says("assistant", "2.")] and pair.rejected == [says("assistant", "3.")]
    whole = {"messages": row["messages"], "rejected_messages": [*written, says("assistant", "3.")]}
    assert to_pair(whole, {}, "pairs.jsonl:7") == to_pair({**row, "tools": None}, {}, "pairs.jsonl:7")


def test_calls_that_follow_each_other_are_one_messages() -> None:
    other = {"name": "sub", "arguments": {}}
    messages = [says("tool_call", json.dumps(CALL)), says("tool_call", json.dumps(other)), says("tool_response", "2")]
    assert with_tool_calls(messages, "messages", "row") == [calls(CALL, other), says("tool", "2")]


def test_a_call_that_is_no_json_is_named_with_its_message() -> None:
    with pytest.raises(BadRow, match=r"^row: messages message 2: a function call must be JSON"):
        with_tool_calls([says("user", "Sum?"), says("tool_call", "add(1)")], "messages", "row")


ROLES = {"user": "customer", "assistant": "agent", "tool": "system_b", "function_call": "lookup"}


def test_turns_of_speakers_with_other_names_are_read_by_the_names_that_are_set() -> None:
    asked = [
        {"from": "system", "value": "Be brief."},
        {"from": "customer", "value": "Sum?"},
        {"from": "lookup", "value": json.dumps(CALL)},
        {"from": "system_b", "value": "2"},
    ]
    row = {
        "conversations": asked,
        "chosen": {"from": "agent", "value": "2."},
        "rejected": {"from": "agent", "value": "3."},
    }
    pair = to_pair(row, {}, "row", roles=ROLES)
    assert pair.prompt == [says("system", "Be brief."), says("user", "Sum?"), calls(CALL), says("tool", "2")]
    assert (pair.chosen, pair.rejected, pair.form) == (
        [says("assistant", "2.")],
        [says("assistant", "3.")],
        "share_gpt",
    )
    with pytest.raises(BadRow, match=r"from must be one of human, gpt, .* got 'customer'\. Name it in data\.roles"):
        to_pair(row, {}, "row")


def test_messages_of_speakers_with_other_names_are_read_where_columns_lead_to_them() -> None:
    row = {"talk": {"before": [says("customer", "Sum?")]}, "chosen": [says("agent", "2.")], "rejected": "3."}
    pair = to_pair({**row, "rejected": [says("agent", "3.")]}, {"prompt": "talk.before"}, "row", roles=ROLES)
    assert (pair.prompt, pair.chosen) == ([says("user", "Sum?")], [says("assistant", "2.")])


def test_names_that_change_places_are_told_apart() -> None:
    row = {"conversations": [{"from": "gpt", "value": "Sum?"}], "chosen": "2.", "rejected": "3."}
    assert to_pair(row, {}, "row", roles={"user": "gpt", "assistant": "human"}).prompt == [says("user", "Sum?")]


def test_names_in_tools_and_in_text_stay() -> None:
    tools = [{"type": "function", "function": {"name": "customer", "parameters": {"role": "customer"}}}]
    row = {"prompt": [says("customer", "agent")], "chosen": "2.", "rejected": "3.", "tools": tools}
    pair = to_pair(row, {}, "row", roles=ROLES)
    assert pair.tools == tools and pair.prompt == [says("user", "agent")]


def test_a_row_nested_too_deep_is_a_bad_row_under_other_names_too() -> None:
    nested: Any = {}
    for _ in range(3000):
        nested = {"a": nested}
    with pytest.raises(BadRow, match="nested deeper"):
        to_pair({"prompt": nested, "chosen": "a", "rejected": "b"}, {}, "row", roles=ROLES)
