"""Recognize the row layouts of other tools, which are not read, and say how to convert them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["looks_like"]


class _Layout(NamedTuple):
    """One layout, recognized by a row's keys and the types of their values."""

    name: str
    fits: Callable[[Mapping[str, Any]], bool]
    remedy: str


def looks_like(row: Mapping[str, Any]) -> str | None:
    """Say which other tool's layout a row has, and what to write instead; None if it has none that is known."""
    there = {name: value for name, value in row.items() if value is not None}
    found = next((layout for layout in _LAYOUTS if layout.fits(there)), None)
    return None if found is None else f"It looks like {found.name}: {found.remedy} (docs/guide.md, Converting rows)"


def _first_message(value: Any) -> Mapping[str, Any]:
    """Give a message, or the first of a list of messages; an empty one if the value is neither."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, Mapping) else {}


def _is_share_gpt(row: Mapping[str, Any]) -> bool:
    values = (row.get(name) for name in ("conversations", "prompt", "chosen", "rejected"))
    return any({"from", "value"} <= _first_message(value).keys() for value in values)


def _is_open_ai(row: Mapping[str, Any]) -> bool:
    asked = row.get("input")
    return {"preferred_output", "non_preferred_output"} <= row.keys() or (
        isinstance(asked, Mapping) and "messages" in asked
    )


def _has_one_message(row: Mapping[str, Any]) -> bool:
    values = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    return any(isinstance(value, Mapping) and "role" in value for value in values)


def _has_listed_texts(row: Mapping[str, Any]) -> bool:
    values = (row.get(name) for name in ("chosen", "rejected"))
    return any(isinstance(value, list) and bool(value) and isinstance(value[0], str) for value in values)


_LAYOUTS = (
    _Layout(
        "OpenAI's preferences (input.messages, preferred_output, non_preferred_output)",
        _is_open_ai,
        "write input.messages as prompt, input.tools as tools, the two outputs as chosen and rejected",
    ),
    _Layout(
        "ShareGPT (messages of from and value)",
        _is_share_gpt,
        "write each message as role (human: user, gpt: assistant) and content, the conversations as prompt, and "
        "chosen and rejected as lists",
    ),
    _Layout(
        "ms-swift's preferences (messages, rejected_response or rejected_messages)",
        lambda row: "messages" in row and bool({"rejected_response", "rejected_messages"} & row.keys()),
        "write the messages before the last answer as prompt, the last answer as chosen, the rejected one as rejected",
    ),
    _Layout(
        "LLaMA-Factory's messages (messages, chosen_message, rejected_message)",
        lambda row: {"chosen_message", "rejected_message"} <= row.keys(),
        "write messages as prompt, the two others as chosen and rejected, each as a list of one message",
    ),
    _Layout(
        "several scored or ranked completions of one prompt",
        lambda row: isinstance(row.get("completions", row.get("responses")), list),
        "write the best one as chosen and another one as rejected",
    ),
    _Layout(
        "two answers and a number that says which is better (response1, response2)",
        lambda row: {"response1", "response2"} <= row.keys(),
        "write the better one as chosen, the other one as rejected",
    ),
    _Layout(
        "single answers with a label (KTO), which are no pairs",
        lambda row: {"completion", "label"} <= row.keys(),
        "pair a wanted and an unwanted answer of the same prompt",
    ),
    _Layout(
        "Alpaca (instruction, input)",
        lambda row: "instruction" in row and "prompt" not in row,
        "set data.columns.user, for a chat model, or data.columns.prompt to instruction; join the input to it first "
        "if there is one",
    ),
    _Layout("one message where a list is expected", _has_one_message, "put it into a list"),
    _Layout("lists of texts", _has_listed_texts, "write one text as chosen and one as rejected"),
)
