"""A preference pair: a prompt and two completions. `layouts` makes pairs of rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.base.errors import BadRow

__all__ = [
    "FORMS",
    "Form",
    "Message",
    "Pair",
    "Text",
    "check_text",
    "is_conversational",
    "kind_of",
    "make_pair",
    "without_nulls",
]

Message = dict[str, Any]
"""A message of a conversation, with at least a `role`."""

Text = str | list[Message]

Form = Literal[
    "text",
    "text_shared",
    "transcripts",
    "chat",
    "chat_answers",
    "chat_shared",
    "chat_whole",
    "chat_asked",
    "chat_columns",
    "open_ai",
    "share_gpt",
    "answered_messages",
    "alpaca",
    "swift",
    "whole_conversations",
    "ranked",
    "scored",
    "compared",
]
"""How a row was read as a pair"""

FORMS: Mapping[Form, str] = {
    "text": "text, prompt given",
    "text_shared": "text, prompt = what the two texts share",
    "transcripts": "text, prompt = all up to the last Assistant: turn that the two share",
    "chat": "conversations, prompt given",
    "chat_answers": "conversations, prompt given, answers as text",
    "chat_shared": "conversations, prompt = the messages that the two share",
    "chat_whole": "conversations, prompt = the messages that the two share, text prompt ignored",
    "chat_asked": "conversations, text prompt = the user's message",
    "chat_columns": "conversations, made of the texts that data.columns names",
    "open_ai": "OpenAI's preferences (input.messages, preferred_output, non_preferred_output)",
    "share_gpt": "ShareGPT's preferences (conversations, chosen, rejected)",
    "answered_messages": "messages with two answers (messages, chosen, rejected)",
    "alpaca": "Alpaca's preferences (instruction, input, chosen, rejected)",
    "swift": "ms-swift's preferences (messages, rejected_response or rejected_messages)",
    "whole_conversations": "two whole conversations (chosen_messages, rejected_messages)",
    "ranked": "ranked completions, the lowest rank chosen",
    "scored": "scored completions, the best chosen",
    "compared": "two answers and a number that says which is better (response1, response2, overall_preference)",
}
"""Meaning of each form, for people."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference: for this prompt, `chosen` is better than `rejected`. All three are text, or all messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    form: Form | None = field(default=None, compare=False)
    """How the row was read; None for a pair of no row."""


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


def make_pair(
    prompt: Text, chosen: Text, rejected: Text, tools: Any, template_kwargs: Any, place: str, form: Form
) -> Pair:
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
        form=form,
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
        for number, message in enumerate(value, start=1):
            where = f"{name} message {number}"
            if not isinstance(message["role"], str):
                raise BadRow("wrong_type", f"{place}: {where}: role is {kind_of(message['role'])}, not text")
            if not isinstance(message.get("tool_calls"), list | None):
                kind = kind_of(message["tool_calls"])
                raise BadRow("wrong_type", f"{place}: {where}: tool_calls is {kind}, not a list")
            for key in ("role", "content"):
                if isinstance(message.get(key), str):
                    check_text(message[key], f"{where}: {key}", place)
        return
    if value == []:
        reason = "empty_prompt" if name == "prompt" else "empty_completion"
        raise BadRow(reason, f"{place}: {name} is an empty list of messages")
    raise BadRow(
        "wrong_type", f"{place}: {name} must be text or a list of {{role, content}} messages, got {kind_of(value)}"
    )


def kind_of(value: Any) -> str:
    """Name a value's type for messages, as JSON calls it: with the value if it is short, with the keys of an object."""
    match value:
        case None:
            return "null"
        case bool():
            return f"a boolean ({str(value).lower()})"
        case int() | float():
            return f"a number ({value:g})" if isinstance(value, float) else f"a number ({value})"
        case str():
            return "text"
        case Mapping():
            return f"an object {_keys(value)}"
        case [Mapping() as first, *_]:
            return f"a list of objects {_keys(first)}"
        case [first, *_]:
            return f"a list of {'text' if isinstance(first, str) else kind_of(first)}"
        case list():
            return "an empty list"
        case _:
            return type(value).__name__


def _keys(value: Mapping[Any, Any]) -> str:
    there = [str(key)[:20] for key, inner in value.items() if inner is not None]
    return f"{{{', '.join(there[:6])}{', ...' if len(there) > 6 else ''}}}"


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
    raise BadRow("wrong_type", f"{place}: tools must be a list or its JSON text, got {kind_of(value)}")


def _template_kwargs(value: Any, place: str) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"{place}: chat_template_kwargs must be a mapping, got {kind_of(value)}")
    if refused := sorted(value.keys() & _NO_TEMPLATE_KWARGS):
        raise BadRow("wrong_type", f"{place}: chat_template_kwargs must not hold {', '.join(refused)}")
    return value
