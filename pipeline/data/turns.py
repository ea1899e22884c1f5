"""Read the messages that other tools write: ShareGPT's turns, ms-swift's calls of tools, other names of roles."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.base.errors import BadRow
from pipeline.data.pairs import is_conversational, kind_of

__all__ = [
    "are_messages",
    "as_messages",
    "first_speaker",
    "is_answer",
    "is_message",
    "with_our_roles",
    "with_tool_calls",
]

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool"), "tool"),
}


def as_messages(value: Any, name: str, place: str) -> Any:
    """Give a message as a list of one, and ShareGPT's turns as messages; any other value as it is.

    Raises BadRow for a turn of an unknown speaker, and for a function call that is not JSON.
    """
    if isinstance(value, Mapping) and (_is_turn(value) or value.get("role") is not None):
        value = [value]
    if not _are_turns(value):
        return value
    return [_message(turn, f"{place}: {name} turn {i}") for i, turn in enumerate(value, start=1)]


def with_tool_calls(value: Any, name: str, place: str) -> Any:
    """Give messages as `as_messages`, with ms-swift's roles tool_call and tool_response as templates know them.

    Calls without a message between them are one message's. Raises BadRow, also for a call that is not JSON.
    """
    value, written = as_messages(value, name, place), list[Any]()
    if not is_conversational(value):
        return value
    for number, message in enumerate(value, start=1):
        if message["role"] == "tool_call":
            called = _tool_call(message.get("content"), f"{place}: {name} message {number}")
            if number > 1 and value[number - 2]["role"] == "tool_call":
                written[-1]["tool_calls"] += called["tool_calls"]
            else:
                written.append(called)
        else:
            written.append({**message, "role": "tool"} if message["role"] == "tool_response" else message)
    return written


def with_our_roles(row: Mapping[str, Any], roles: Mapping[str, str], place: str) -> dict[str, Any]:
    """Give a row whose messages and turns name who speaks as we do; `roles` maps our names to the row's.

    Raises BadRow for a row that is nested deeper than any conversation is.
    """
    ours = {theirs: role for role, theirs in roles.items()}
    try:
        return {column: _in_our_roles(value, ours) for column, value in row.items()}
    except RecursionError as error:
        raise BadRow("too_large", f"{place}: nested deeper than any message or tool is") from error


def _in_our_roles(value: Any, ours: Mapping[str, str]) -> Any:
    if is_message(value):
        key = "from" if _is_turn(value) else "role"
        who = value[key]
        # A call is written in a turn's text; a message has tool_calls.
        role = ours.get(who) if isinstance(who, str) else None
        return value if role is None or (role, key) == ("function_call", "role") else {**value, key: role}
    if are_messages(value):
        return [_in_our_roles(item, ours) for item in value]
    return {key: _in_our_roles(inner, ours) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _message(turn: Mapping[str, Any], place: str) -> dict[str, Any]:
    who, said = turn["from"], turn["value"]
    if who != "function_call":
        if not isinstance(who, str) or who not in _ROLES:
            known = ", ".join(("human", "gpt", "system", "function_call", "observation"))
            raise BadRow("wrong_type", f"{place}: from must be one of {known}, got {who!r}. Name it in data.roles")
        return {"role": _ROLES[who], "content": said}
    return _tool_call(said, place)


def _tool_call(said: Any, place: str) -> dict[str, Any]:
    """Make the assistant's message of a function call, or several, in JSON."""
    try:
        calls = json.loads(said) if isinstance(said, str) else said
    except (ValueError, RecursionError) as error:
        raise BadRow("wrong_type", f"{place}: a function call must be JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow("wrong_type", f"{place}: a function call must be {{name, arguments}}, got {kind_of(calls)}")
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": dict(call)} for call in calls]}


def _is_turn(value: Any) -> bool:
    # Arrow gives a mapping the keys of all rows' mappings, with nulls.
    is_turn = isinstance(value, Mapping) and value.get("from") is not None and "value" in value
    return is_turn and value.get("role") is None


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def are_messages(value: Any) -> bool:
    """Return True for a list of messages, or of turns."""
    return is_conversational(value) or _are_turns(value)


def is_message(value: Any) -> bool:
    """Return True for one message, or one turn."""
    return _is_turn(value) or (isinstance(value, Mapping) and value.get("role") is not None)


def is_answer(value: Any) -> bool:
    """Return True for a text, a message, or messages that begin with the assistant's."""
    return isinstance(value, str) or is_message(value) or (are_messages(value) and first_speaker(value) == "assistant")


def first_speaker(value: Sequence[Mapping[str, Any]]) -> Any:
    """Give the role of the first message, or turn; None if it is not text."""
    who = value[0].get("from") if value[0].get("role") is None else value[0]["role"]
    return _ROLES.get(who, who) if isinstance(who, str) else None
