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
