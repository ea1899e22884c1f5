"""One row of any preference dataset -> a pair: prompt, chosen, rejected.

Three forms are accepted, those of TRL's dataset-format page: an explicit prompt, an implicit prompt (the shared
start of chosen and rejected), and conversations (lists of messages), explicit or implicit. A fourth is read where the
settings name its columns: texts of what system and user say, and of two answers, which become a conversation.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import BadRow
from pipeline.config.schema import PAIR_COLUMNS, SPOKEN_COLUMNS
from pipeline.data.rows import LARGEST_ROW

__all__ = [
    "Message",
    "Pair",
    "is_conversational",
    "split_shared_prompt",
    "to_pair",
]

Message = dict[str, Any]


Text = str | list[Message]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One preference: for this prompt, `chosen` is better than `rejected`. All three are text, or all messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


def is_conversational(value: Any) -> bool:
    """Tell whether a column's value is a list of messages, each with at least a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def to_pair(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Pair:
    """Read a pair from a row, whichever of the forms it has.

    Args:
        row: The row's columns.
        columns: Renames, from our column names to the row's. With `user` among them, the prompt is a message of that
            text, after one of the `system` column's text where that is named and not empty.
        place: Where the row stands, for messages.

    Raises:
        BadRow: A column is missing or of a wrong type, a completion is empty, no prompt is shared.
    """
    values: dict[str, Any] = {name: row.get(columns.get(name, name)) for name in PAIR_COLUMNS}
    values |= {name: row.get(columns[name]) for name in SPOKEN_COLUMNS if name in columns}
    # A prompt column that was named must be there: without it the shared start would silently take its place.
    named = [name for name in ("prompt", *SPOKEN_COLUMNS) if name in columns]
    for name in (*named, "chosen", "rejected"):
        if columns.get(name, name) not in row:
            raise BadRow(
                "missing_column",
                f"{place}: no column {columns.get(name, name)!r}; there are {_names(row)}. Rename with data.columns",
            )
    if _size(values, LARGEST_ROW) > LARGEST_ROW:
        raise BadRow("too_large", f"{place}: more than {LARGEST_ROW:,} characters of text, which no pair may have")
    for name in ("chosen", "rejected"):
        _check_text(values[name], name, place)
    prompt, chosen, rejected = values["prompt"], values["chosen"], values["rejected"]
    if "user" in columns:
        prompt = _spoken(values, place)
        chosen, rejected = (_answer(values[name], name, place) for name in ("chosen", "rejected"))
    if is_conversational(chosen) != is_conversational(rejected):
        raise BadRow("wrong_type", f"{place}: one of chosen and rejected is text, the other a list of messages")
    if prompt is not None:
        _check_text(prompt, "prompt", place)

    if is_conversational(chosen):
        prompt, chosen, rejected = _conversation(prompt, _clean(chosen), _clean(rejected), place)
    elif prompt is None:
        try:
            prompt, chosen, rejected = split_shared_prompt(chosen, rejected)
        except ValueError as error:
            raise BadRow("no_shared_prompt", f"{place}: {error}") from error
    elif not isinstance(prompt, str):
        raise BadRow("wrong_type", f"{place}: the prompt is a list of messages, chosen and rejected are text")
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if _is_empty(completion):
            raise BadRow("empty_completion", f"{place}: {name} is empty after the prompt")
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        tools=_tools(values["tools"], place),
        chat_template_kwargs=_template_kwargs(values["chat_template_kwargs"], place),
    )


def _spoken(values: Mapping[str, Any], place: str) -> list[Message]:
    """Make the prompt's messages of the texts of system and user. No system text, no message of it."""
    messages = []
    for role in SPOKEN_COLUMNS:
        text = values.get(role)
        if role == "system" and (text is None or text == ""):
            continue
        if not isinstance(text, str):
            raise BadRow("wrong_type", f"{place}: {role} must be text, found {_kind(text)}")
        _check_text(text, role, place)
        messages.append({"role": role, "content": text})
    return messages


def _answer(completion: Text, name: str, place: str) -> list[Message]:
    """Make the assistant's message of a text; messages are left as they are, if they do not repeat the prompt."""
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    if completion[0]["role"] != "assistant":
        raise BadRow(
            "wrong_type",
            f"{place}: {name} is a conversation of its own, which begins with {completion[0]['role']}; leave "
            "data.columns.user and system out, its messages say who speaks",
        )
    return completion


def _names(row: Mapping[str, Any], most: int = 20) -> str:
    more = f" and {len(row) - most} more" if len(row) > most else ""
    return ", ".join(map(repr, list(row)[:most])) + more


def _size(value: Any, most: int) -> int:
    """Characters of all text in a row's value, however deep; counting stops above `most`."""
    size, left = 0, [value]
    while left and size <= most:
        item = left.pop()
        if isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            left += item
        # Anything but text counts too, for a list of a million numbers is as long as one of letters.
        size += len(item) if isinstance(item, str) else 1
    return size


_TURN = re.compile(r"(?:^|\n)[ \t]*Assistant:")


def split_shared_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two whole texts into the prompt that they share and the two completions.

    A transcript with `Assistant:` turns (HH-RLHF) is split after the last such turn that both share, so that each
    completion is the whole last turn. Any other text is split before the first word that differs, the space before
    it going to the completion: never inside a word, so no token straddles the boundary by our doing.

    Raises:
        ValueError: The texts share no beginning, or are equal and mark no turn.
    """
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared += 1
    turns = list(_TURN.finditer(chosen, 0, shared))
    if turns:
        end = turns[-1].end()
    elif chosen == rejected:
        raise ValueError(
            "chosen and rejected are the same text without a prompt column; where the prompt ends is unknown"
        )
    else:
        # Each completion keeps at least its last character.
        end = min(shared, len(chosen) - 1, len(rejected) - 1)
        while end > 0 and (_inside_word(chosen, end) or _inside_word(rejected, end)):
            end -= 1
        if end > 0 and chosen[end - 1] == " ":
            end -= 1
    if end <= 0 or not chosen[:end].strip():
        raise ValueError("chosen and rejected share no beginning that could be the prompt; add a prompt column")
    return chosen[:end], chosen[end:], rejected[end:]


def _inside_word(text: str, i: int) -> bool:
    return _is_word(text[i - 1]) and _is_word(text[i])


def _is_word(character: str) -> bool:
    # Scripts written without spaces (Chinese, Japanese) have no word boundary to look for. Korean has spaces.
    if unicodedata.east_asian_width(character) in "WF" and not "\uac00" <= character <= "\ud7a3":
        return False
    return character.isalnum() or character in "_'’-" or unicodedata.category(character) in ("Mn", "Mc")


def _conversation(
    prompt: Text | None, chosen: list[Message], rejected: list[Message], place: str
) -> tuple[list[Message], list[Message], list[Message]]:
    if isinstance(prompt, list):
        return _clean(prompt), chosen, rejected
    if isinstance(prompt, str) and all(m["role"] == "assistant" for m in (chosen[0], rejected[0])):
        return [{"role": "user", "content": prompt}], chosen, rejected
    # No prompt, or its text beside whole conversations that repeat it (UltraFeedback): the messages are what counts.
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise BadRow(
            "no_shared_prompt", f"{place}: chosen and rejected share no first message that could be the prompt"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _clean(messages: list[Message]) -> list[Message]:
    """Drop keys that are null: Arrow adds them to messages that never had them, and templates ask `is defined`."""
    return [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]


def _check_text(value: Any, name: str, place: str) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("not_utf8", f"{place}: {name} holds half a surrogate pair, which is no text") from error
        return
    if is_conversational(value):
        for message in value:
            if not isinstance(message["role"], str):
                raise BadRow("wrong_type", f"{place}: {name} holds a message whose role is no text")
            if isinstance(message.get("content"), str):
                _check_text(message["content"], name, place)
        return
    if value == []:
        reason = "empty_prompt" if name == "prompt" else "empty_completion"
        raise BadRow(reason, f"{place}: {name} is an empty list of messages")
    raise BadRow(
        "wrong_type", f"{place}: {name} must be text or a list of {{role, content}} messages, found {_kind(value)}"
    )


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _is_empty(completion: Text) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    for message in completion:
        content = message.get("content")
        if message.get("tool_calls") or (content.strip() if isinstance(content, str) else content):
            return False
    return True


def _tools(value: Any, place: str) -> list[Any] | None:
    """Tools are a list of schemas, or the JSON text of one; empty text is none, for CSV knows no null."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise BadRow("wrong_type", f"{place}: tools is text but not JSON: {error}") from error
    if value is None or isinstance(value, list):
        return value
    raise BadRow("wrong_type", f"{place}: tools must be a list or its JSON text, found {type(value).__name__}")


def _template_kwargs(value: Any, place: str) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"{place}: chat_template_kwargs must be a mapping, found {type(value).__name__}")
    # Arrow gives every row all keys that any row has; null means that this row did not set it.
    kwargs = {k: v for k, v in value.items() if v is not None}
    if taken := sorted(kwargs.keys() & _NO_TEMPLATE_KWARGS):
        # A row could bring a template of its own by them, or have its tokens cut, and no fingerprint would tell.
        raise BadRow("wrong_type", f"{place}: chat_template_kwargs must not hold {', '.join(taken)}")
    return kwargs


# How a template is applied, which is not the row's to say.
_NO_TEMPLATE_KWARGS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}
