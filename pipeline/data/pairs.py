"""A preference pair: a prompt and two completions. `layouts` makes pairs of rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import BadRow

__all__ = ["Message", "Pair", "Text", "check_text", "is_conversational", "kind_of", "make_pair", "without_nulls"]

Message = dict[str, Any]
"""A message of a conversation, with at least a `role`."""

Text = str | list[Message]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference: for this prompt, `chosen` is better than `rejected`. All three are text, or all messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


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
"""Arguments of `apply_chat_template` that would change the template or cut tokens, and no identity would record it"""


def make_pair(prompt: Text, chosen: Text, rejected: Text, tools: Any, template_kwargs: Any, place: str) -> Pair:
    """Make a pair of checked texts or messages. Raises BadRow for an empty completion or a wrong type."""
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if _is_empty(completion):
            raise BadRow("empty_completion", f"{place}: {name} is empty after the prompt")
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        tools=_tools(tools, place),
        chat_template_kwargs=_template_kwargs(template_kwargs, place),
    )


def without_nulls(value: Any) -> Any:
    """Drop the keys that are null, at every depth: Arrow gives each mapping the keys of all rows' mappings."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def is_conversational(value: Any) -> bool:
    """Return True if a column's value is a list of messages, each with at least a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def check_text(value: Any, name: str, place: str) -> None:
    """Check that a value is text, or a non-empty list of messages, and can be written as UTF-8. Raises BadRow."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("not_utf8", f"{place}: {name} holds half a surrogate pair, which is not text") from error
        return
    if is_conversational(value):
        for message in value:
            if not isinstance(message["role"], str):
                raise BadRow("wrong_type", f"{place}: {name} holds a message whose role is not text")
            if isinstance(message.get("content"), str):
                check_text(message["content"], name, place)
        return
    if value == []:
        reason = "empty_prompt" if name == "prompt" else "empty_completion"
        raise BadRow(reason, f"{place}: {name} is an empty list of messages")
    raise BadRow(
        "wrong_type", f"{place}: {name} must be text or a list of {{role, content}} messages, found {kind_of(value)}"
    )


def kind_of(value: Any) -> str:
    """Name a value's type for messages."""
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
    if isinstance(value, str):
        try:
            # CSV has no null, so empty text stands for none.
            value = without_nulls(json.loads(value)) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadRow("wrong_type", f"{place}: tools is text but not JSON: {error}") from error
    if value is None or isinstance(value, list):
        return value
    raise BadRow("wrong_type", f"{place}: tools must be a list or its JSON text, found {kind_of(value)}")


def _template_kwargs(value: Any, place: str) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"{place}: chat_template_kwargs must be a mapping, found {kind_of(value)}")
    if refused := sorted(value.keys() & _NO_TEMPLATE_KWARGS):
        raise BadRow("wrong_type", f"{place}: chat_template_kwargs must not hold {', '.join(refused)}")
    return value
