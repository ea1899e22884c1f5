"""Read the row layouts of other tools as prompt, chosen and rejected: one table of layouts, each with its function.

A layout is recognized by a row's keys and the types of their values, never by the texts.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pipeline.base.errors import BadRow
from pipeline.data.pairs import Form, kind_of
from pipeline.data.turns import are_messages, as_messages, first_speaker, is_answer, is_message, with_tool_calls

__all__ = ["COLUMNS_OF_FORMS", "OtherLayout", "find_layout", "looks_like"]

Values = dict[str, Any]
"""Values of a pair's columns: prompt, chosen, rejected, tools"""


class _Rule(NamedTuple):
    """Type that a layout asks of a column."""

    holds: Callable[[Any], bool]
    words: str


class OtherLayout(NamedTuple):
    """One layout: the columns that a row must have, and the function that makes a pair's columns of them."""

    form: Form
    name: str
    needs: Mapping[str, _Rule]
    """Rules by column; `a|b`: one of the two."""
    read: Callable[[Mapping[str, Any], str], Values]
    """Takes the row and its place. Raises BadRow."""
    also: tuple[str, ...] = ()
    """Columns that the layout may have besides."""
    read_random: Callable[[Mapping[str, Any], str, int], Values] | None = None
    """Takes a seed too, and rejects a random one of the worse completions."""

    def values(self, row: Mapping[str, Any], place: str, seed: int | None) -> Values:
        """Make the values of a pair's columns. Raises BadRow, also for a tie."""
        if seed is None or self.read_random is None:
            return self.read(row, place)
        return self.read_random(row, place, seed)

    def lacks(self, row: Mapping[str, Any]) -> list[str]:
        """List what the row lacks of the layout, in words."""
        lacks = []
        for columns, rule in self.needs.items():
            there = [name for name in columns.split("|") if row.get(name) is not None]
            if not there:
                lacks.append(f"no {columns.replace('|', ' or ')}")
            elif not any(rule.holds(row[name]) for name in there):
                lacks.append(f"{there[0]} is {kind_of(row[there[0]])}, not {rule.words}")
        return lacks


def find_layout(row: Mapping[str, Any]) -> OtherLayout | None:
    """Return the layout of a row by the column names of the layouts; None for a row with our own columns."""
    is_ours = row.get("chosen") is not None and row.get("rejected") is not None
    for layout in _LAYOUTS:
        takes_ours = "chosen" in layout.needs
        # Answers in our columns belong to the prompt in our column.
        if is_ours == takes_ours and not (takes_ours and row.get("prompt") is not None) and not layout.lacks(row):
            return layout
    return None


def looks_like(row: Mapping[str, Any], otherwise: str = "") -> str | None:
    """Say which layout a row comes nearest to and what it lacks; None if it is like none.

    `otherwise` is the remedy for a row in our own layout. It is given too, unless the row is known to hold no pair.
    """
    there = {name: value for name, value in row.items() if value is not None}
    for name, is_like, remedy in _NOT_PAIRS:
        if is_like(there):
            return f"It looks like {name}: {remedy} (docs/guide.md, Layouts of other tools)"
    found: tuple[float, OtherLayout] | None = None
    for layout in _LAYOUTS:
        own = [columns for columns in layout.needs if columns not in ("chosen", "rejected", _ASKED)]
        share = 1 - len(layout.lacks(there)) / len(layout.needs)
        is_near = any(name in there for columns in own for name in columns.split("|"))
        if is_near and 1 > share >= 0.3 and (found is None or share > found[0]):
            found = share, layout
    if found is None:
        return otherwise or None
    lacks = "; ".join(found[1].lacks(there))
    nearest = f"It comes nearest to {found[1].name}, but has {lacks} (docs/guide.md, Layouts of other tools)"
    return f"{nearest}. {otherwise} if a pair's columns have other names" if otherwise else nearest


def _is_rejected(value: Any) -> bool:
    return is_answer(value) or are_messages(value)


def _are_unanswered(value: Any) -> bool:
    """Return True for messages that do not end in the assistant's: those of a prompt."""
    return are_messages(value) and first_speaker(value[-1:]) != "assistant"


def _is_asked(value: Any) -> bool:
    return isinstance(value, str) or are_messages(value) or is_message(value)


def _number(value: Any) -> float | None:
    """Give a finite number, also of a CSV's text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _as_prompt(value: Any, name: str, place: str) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else as_messages(value, name, place)


def _as_completion(value: Any, name: str, place: str) -> Any:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else as_messages(value, name, place)


def _pair_of(prompt: Any, chosen: Any, rejected: Any, place: str, **others: Any) -> Values:
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {name: _as_completion(value, name, place) for name, value in sides.items()}
    return {"prompt": _as_prompt(prompt, "prompt", place), **answers, **others}


def _open_ai(row: Mapping[str, Any], place: str) -> Values:
    asked = row["input"]
    tools = asked.get("tools") or None
    return _pair_of(asked["messages"], row["preferred_output"], row["non_preferred_output"], place, tools=tools)


def _with_system(row: Mapping[str, Any], messages: Any, place: str) -> Any:
    """Put the text of the column `system` in front of messages without a system message."""
    system = row.get("system")
    if system in (None, "") or not isinstance(messages, list) or not messages or messages[0].get("role") == "system":
        return messages
    if not isinstance(system, str):
        raise BadRow("wrong_type", f"{place}: system must be text, got {kind_of(system)}. Mend the row")
    return [{"role": "system", "content": system}, *messages]


def _share_gpt(row: Mapping[str, Any], place: str) -> Values:
    asked = as_messages(row["conversations"], "conversations", place)
    return _pair_of(_with_system(row, asked, place), row["chosen"], row["rejected"], place)


def _answered_messages(row: Mapping[str, Any], place: str) -> Values:
    asked = as_messages(row["messages"], "messages", place)
    # A file of several layouts has nulls in the columns of the others.
    names = ("chosen", "rejected") if row.get("chosen") is not None else ("chosen_message", "rejected_message")
    return _pair_of(_with_system(row, asked, place), row[names[0]], row[names[1]], place)


def _alpaca(row: Mapping[str, Any], place: str) -> Values:
    messages: list[dict[str, Any]] = []
    history = row.get("history") or []
    for number, turn in enumerate(history if isinstance(history, list) else [history], start=1):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise BadRow(
                "wrong_type", f"{place}: history {number} must be two texts, got {kind_of(turn)}. Mend the row"
            )
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages.append({"role": "user", "content": _instruction(row, place)})
    return _pair_of(_with_system(row, messages, place), row["chosen"], row["rejected"], place)


def _instruction(row: Mapping[str, Any], place: str) -> str:
    """Join the instruction and its input by a line end, as LLaMA-Factory and ms-swift do."""
    more = row.get("input")
    if not isinstance(more, str | None):
        raise BadRow("wrong_type", f"{place}: input must be text, got {kind_of(more)}. Mend the row")
    return "\n".join(text for text in (row["instruction"], more) if text)


def _swift(row: Mapping[str, Any], place: str) -> Values:
    messages = _with_system(row, with_tool_calls(row["messages"], "messages", place), place)
    name = next(name for name in ("rejected_messages", "rejected_response") if _is_rejected(row.get(name)))
    rejected = with_tool_calls(row[name], name, place)
    if not is_answer(rejected):
        # Both are whole conversations: the prompt is what they share.
        return {"prompt": None, "chosen": messages, "rejected": _with_system(row, rejected, place)}
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise BadRow("wrong_type", f"{place}: messages must end in the assistant's answer, which is the chosen one")
    return _pair_of(messages[:-1], messages[-1:], rejected, place)


def _whole_conversations(row: Mapping[str, Any], place: str) -> Values:
    sides = ("chosen", "rejected")
    return {"prompt": None, **{side: as_messages(row[f"{side}_messages"], side, place) for side in sides}}


def _compared(row: Mapping[str, Any], place: str) -> Values:
    preference = _number(row["overall_preference"])
    if preference is None or preference == 0:
        raise BadRow("tie", f"{place}: overall_preference is 0, so neither answer is better")
    first, second = row["response1"], row["response2"]
    chosen, rejected = (first, second) if preference < 0 else (second, first)
    return _pair_of(_asked(row, place), chosen, rejected, place)


def _asked(row: Mapping[str, Any], place: str) -> Any:
    """Give what the completions answer: the first of the columns that may hold it."""
    name = next(name for name in _ASKED.split("|") if _is_asked(row.get(name)))
    value = _instruction(row, place) if name == "instruction" and isinstance(row[name], str) else row[name]
    return _as_prompt(value, name, place)


def _several(row: Mapping[str, Any], place: str, seed: int | None = None) -> Values:
    """Make a pair of the best completion and the worst one, or a random one of the worse if there is a seed."""
    lowest_is_best = _are_ranked(_completions(row))
    score = "rank" if lowest_is_best else _score_of(_completions(row)[0])
    assert score is not None
    answers: list[tuple[float, Any]] = []
    for number, item in enumerate(_completions(row), start=1):
        value, where = _number(item.get(score)), f"{place}: completion {number}"
        text = next((item[name] for name in _TEXTS if item.get(name) is not None), None)
        if value is None:
            raise BadRow("wrong_type", f"{where}: {score} must be a finite number, got {kind_of(item.get(score))}")
        if not is_answer(text):
            raise BadRow("wrong_type", f"{where}: {' or '.join(_TEXTS)} must be an answer, got {kind_of(text)}")
        answers.append((-value if lowest_is_best else value, text))
    # The first of several equal ones is taken.
    best, worst = max(answers, key=lambda answer: answer[0]), min(answers, key=lambda answer: answer[0])
    if best[0] == worst[0]:
        raise BadRow("tie", f"{place}: all completions have the same {score}, so none is better")
    asked = _asked(row, place)
    if seed is not None:
        # By the texts, so that neither the row's place nor the order of its completions decides.
        worse = [answer for answer in answers if answer[0] < best[0]]
        worst = min(worse, key=lambda answer: _digest([seed, asked, answer[1]]))
    return _pair_of(asked, best[1], worst[1], place)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()


def _completions(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    there: list[Any] = [row.get(name) for name in _COMPLETIONS.split("|")]
    return next(value for value in there if _are_ranked(value) or _are_scored(value))


def _score_of(item: Any) -> str | None:
    return next((name for name in _SCORES if item.get(name) is not None), None) if isinstance(item, Mapping) else None


def _are_scored(value: Any) -> bool:
    return _are_objects(value) and _score_of(value[0]) is not None


def _are_ranked(value: Any) -> bool:
    return _are_objects(value) and value[0].get("rank") is not None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, Mapping) for item in value)


_SCORES = ("overall_score", "score", "rating", "reward")
_TEXTS = ("completion", "response", "text", "content")
_COMPLETIONS = "completions|responses"
_ASKED = "prompt|context|instruction|question|messages"

_TEXT = _Rule(lambda value: isinstance(value, str), "text")
_ANSWER = _Rule(is_answer, "an answer: text, or the assistant's message")
_MESSAGES = _Rule(are_messages, "a list of messages")
_UNANSWERED = _Rule(_are_unanswered, "a list of messages that the answers follow")
_PROMPT = _Rule(_is_asked, "text or messages")
_NUMBER = _Rule(lambda value: _number(value) is not None, "a finite number")

_LAYOUTS = (
    OtherLayout(
        "open_ai",
        "OpenAI's preferences",
        {
            "preferred_output": _ANSWER,
            "non_preferred_output": _ANSWER,
            "input": _Rule(
                lambda value: isinstance(value, Mapping) and are_messages(value.get("messages")),
                "an object with a list of messages",
            ),
        },
        _open_ai,
    ),
    OtherLayout(
        "share_gpt",
        "ShareGPT's preferences",
        {"conversations": _UNANSWERED, "chosen": _ANSWER, "rejected": _ANSWER},
        _share_gpt,
        ("system",),
    ),
    OtherLayout(
        "answered_messages",
        "messages with two answers",
        {"messages": _UNANSWERED, "chosen": _ANSWER, "rejected": _ANSWER},
        _answered_messages,
        ("system",),
    ),
    OtherLayout(
        "answered_messages",
        "messages with two answers",
        {"messages": _UNANSWERED, "chosen_message": _ANSWER, "rejected_message": _ANSWER},
        _answered_messages,
        ("system",),
    ),
    OtherLayout(
        "alpaca",
        "Alpaca's preferences",
        {"instruction": _TEXT, "chosen": _TEXT, "rejected": _TEXT},
        _alpaca,
        ("input", "system", "history"),
    ),
    OtherLayout(
        "whole_conversations",
        "two whole conversations",
        {"chosen_messages": _MESSAGES, "rejected_messages": _MESSAGES},
        _whole_conversations,
    ),
    OtherLayout(
        "swift",
        "ms-swift's preferences",
        {
            "messages": _MESSAGES,
            "rejected_response|rejected_messages": _Rule(_is_rejected, "an answer or a list of messages"),
        },
        _swift,
        ("system",),
    ),
    OtherLayout(
        "ranked",
        "ranked completions",
        {_COMPLETIONS: _Rule(_are_ranked, "two completions or more, each with a rank"), _ASKED: _PROMPT},
        _several,
        ("input",),
        _several,
    ),
    OtherLayout(
        "scored",
        "scored completions",
        {
            _COMPLETIONS: _Rule(_are_scored, f"two completions or more, each with {' or '.join(_SCORES)}"),
            _ASKED: _PROMPT,
        },
        _several,
        ("input",),
        _several,
    ),
    OtherLayout(
        "compared",
        "two answers and a number that says which is better",
        {"response1": _ANSWER, "response2": _ANSWER, "overall_preference": _NUMBER, _ASKED: _PROMPT},
        _compared,
        ("input",),
    ),
)

COLUMNS_OF_FORMS: Mapping[str, frozenset[str]] = {
    layout.form: frozenset(name for columns in (*layout.needs, *layout.also) for name in columns.split("|"))
    for layout in _LAYOUTS
}
"""Columns that the rows of a form may be read from"""


def _has_listed_texts(row: Mapping[str, Any]) -> bool:
    values = (row.get(name) for name in ("chosen", "rejected"))
    return any(isinstance(value, list) and bool(value) and isinstance(value[0], str) for value in values)


_NOT_PAIRS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool], str], ...] = (
    (
        "single answers with a label (KTO), which are no pairs",
        lambda row: {"completion", "label"} <= row.keys(),
        "pair a wanted and an unwanted answer of the same prompt",
    ),
    ("lists of texts", _has_listed_texts, "write one text as chosen and one as rejected"),
)
