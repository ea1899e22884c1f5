"""Read a pair from a row, in whichever of the common layouts it is.

Three layouts are those of TRL's dataset formats: an explicit prompt, an implicit prompt (the shared beginning of
chosen and rejected), and conversations (lists of messages), explicit or implicit. The fourth has texts in columns of
their own for system and user; the settings name them, and the texts become a conversation. Those of other tools are
read as one of these (`other_layouts`).
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from pipeline.base.errors import BadRow
from pipeline.config.columns import LAYOUT_COLUMNS, LOSS_COLUMNS, PAIR_COLUMNS, SPOKEN_COLUMNS
from pipeline.data.other_layouts import OtherLayout, find_layout, looks_like
from pipeline.data.pairs import (
    Form,
    Message,
    Pair,
    Text,
    check_text,
    is_conversational,
    kind_of,
    make_pair,
    without_nulls,
)
from pipeline.data.rows import LARGEST_ROW
from pipeline.data.turns import as_messages, with_our_roles

__all__ = ["in_row", "is_in_row", "split_shared_prompt", "to_pair"]


def to_pair(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    place: str,
    seed: int | None = None,
    roles: Mapping[str, str] | None = None,
) -> Pair:
    """Read a pair from a row; `columns` maps our column names to the row's. Raises BadRow if there is no pair in it.

    `seed` is `data.random_rejected`, `roles` is `data.roles`.
    """
    if roles:
        row = with_our_roles(row, roles, place)
    columns = {name: column for name, column in columns.items() if name not in LOSS_COLUMNS}
    try:
        return _read_pair(row, columns, place, seed)
    except BadRow as error:
        if error.reason not in _REASONS_OF_LAYOUT:
            raise
        remedy = looks_like(_renamed(row, columns), _rename(row, columns) if error.reason == "missing_column" else "")
        if remedy is None:
            raise
        raise BadRow(error.reason, f"{error}. {remedy}") from error


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Say how data.columns names the columns that a pair must have and the row has not.

    Say nothing if it names those of another layout.
    """
    if columns.keys() & set(LAYOUT_COLUMNS):
        return ""
    needed = (*(name for name in ("prompt", *SPOKEN_COLUMNS) if name in columns), "chosen", "rejected")
    named = ", ".join(f"{name}: YOUR_COLUMN" for name in needed if not is_in_row(row, columns.get(name, name)))
    return f"Set data.columns: {{{named}}}"


_REASONS_OF_LAYOUT = ("missing_column", "wrong_type", "no_shared_prompt")
"""Reasons that a row of another tool's layout may be dropped for"""


def _read_pair(row: Mapping[str, Any], columns: Mapping[str, str], place: str, seed: int | None) -> Pair:
    values: dict[str, Any] = {name: in_row(row, columns.get(name, name)) for name in PAIR_COLUMNS}
    values |= {name: in_row(row, columns[name]) for name in SPOKEN_COLUMNS if name in columns}
    layout = _other_layout(row, columns)
    # Another column that the settings name must be there: without a prompt, the shared beginning would replace it.
    named = [name for name in columns if name not in ("chosen", "rejected", "tools", "chat_template_kwargs")]
    for name in (*named, *(() if layout else ("chosen", "rejected"))):
        if not is_in_row(row, columns.get(name, name)):
            there = ", ".join(map(repr, list(row)[:20])) + (f" and {len(row) - 20} more" if len(row) > 20 else "")
            raise BadRow(
                "missing_column",
                f"{place}: no column {columns.get(name, name)!r}; there are {there}",
            )
    if layout is None:
        values |= {name: as_messages(values[name], name, place) for name in ("prompt", "chosen", "rejected")}
        return _pair_of(values, row, columns, place)
    try:
        values |= layout.values(_renamed(row, columns), place, seed)
        return _pair_of(values, row, columns, place, layout.form)
    except BadRow as error:
        raise BadRow(error.reason, f"{error} (the row is read as {layout.name})") from error


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give a row with the columns that the settings name under our names."""
    return {**row, **{name: in_row(row, column) for name, column in columns.items() if name not in SPOKEN_COLUMNS}}


def _other_layout(row: Mapping[str, Any], columns: Mapping[str, str]) -> OtherLayout | None:
    """Find the layout of another tool that a row is read in; None if its own columns make a pair."""
    values = _renamed(row, columns)
    layout = None if "user" in columns else find_layout(values)
    if layout is None or "chosen" not in layout.needs:
        return layout
    chosen, rejected = values["chosen"], values["rejected"]
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return layout
    # Whole texts that hold what the other columns ask are pairs without them.
    try:
        shared, *_ = split_shared_prompt(chosen, rejected)
    except ValueError:
        return layout
    asked = values["instruction"] if layout.form == "alpaca" else values[next(iter(layout.needs))][-1]
    text = asked if isinstance(asked, str) else asked.get("content", asked.get("value"))
    is_there = isinstance(text, str) and bool(text.strip()) and " ".join(text.split()) in " ".join(shared.split())
    return None if is_there or shared.endswith("Assistant:") else layout


def is_in_row(row: Mapping[str, Any], column: str) -> bool:
    """Return True if a row has the column, or the value that a dotted name leads to."""
    if column in row:
        return True
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return bool(rest) and isinstance(inner, Mapping) and is_in_row(inner, rest)


def in_row(row: Mapping[str, Any], column: str) -> Any:
    """Return a column's value, or the one that a dotted name leads to; None if it is not there."""
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return in_row(inner, rest) if rest and isinstance(inner, Mapping) else None


def _pair_of(
    values: dict[str, Any], row: Mapping[str, Any], columns: Mapping[str, str], place: str, other: Form | None = None
) -> Pair:
    """Make a pair of the values of its columns; `other` is the form of a row in another tool's layout."""
    if _size(values, LARGEST_ROW) > LARGEST_ROW:
        raise BadRow("too_large", f"{place}: more than {LARGEST_ROW:,} characters of text, which no pair may have")
    try:
        values = {name: without_nulls(value) for name, value in values.items()}
    except RecursionError as error:
        raise BadRow("too_large", f"{place}: nested deeper than any message or tool is") from error
    values |= {name: _plain(values[name], name, place) for name in ("prompt", "chosen", "rejected")}
    for name in ("chosen", "rejected"):
        check_text(values[name], name, place)
    _refuse_written_messages(values, columns, place)
    prompt, chosen, rejected = values["prompt"], values["chosen"], values["rejected"]
    if "user" in columns:
        prompt = _spoken(values, place)
        chosen, rejected = _answer(chosen, "chosen", place), _answer(rejected, "rejected", place)
    form: Form = "text"
    if is_conversational(prompt) and isinstance(chosen, str) and isinstance(rejected, str):
        form = "chat_answers"
        chosen, rejected = _answer(chosen, "chosen", place), _answer(rejected, "rejected", place)
    if is_conversational(chosen) != is_conversational(rejected):
        raise BadRow("wrong_type", f"{place}: one of chosen and rejected is text, the other a list of messages")
    if prompt is not None:
        check_text(prompt, "prompt", place)

    try:
        if is_conversational(chosen):
            read_as, prompt, chosen, rejected = _conversation(prompt, chosen, rejected, place)
            form = "chat_columns" if "user" in columns else form if form == "chat_answers" else read_as
        elif prompt is None:
            prompt, chosen, rejected = split_shared_prompt(chosen, rejected)
            form = "transcripts" if prompt.endswith("Assistant:") else "text_shared"
    except ValueError as error:
        column = columns.get("prompt", "prompt")
        null = f"{column} is null, and " if column in row and prompt is None else ""
        raise BadRow("no_shared_prompt", f"{place}: {null}{error}") from error
    return make_pair(prompt, chosen, rejected, values["tools"], values["chat_template_kwargs"], place, other or form)


_MESSAGE_BEGINS = re.compile(r"""\s*\[?\s*\{\s*["'](?:role|content|from|value)["']\s*:""")
_SPEAKER = re.compile(r"""["'](?:role|from)["']\s*:\s*["'](?:system|developer|user|assistant|tool|human|gpt)["']""")
"""Marks of messages that were written as text: in JSON, or in Python's notation"""


def _refuse_written_messages(values: Mapping[str, Any], columns: Mapping[str, str], place: str) -> None:
    """Refuse a row whose messages are text: a CSV of lists, as pandas writes it. Raises BadRow."""
    written = [
        name
        for name in ("prompt", "user", "chosen", "rejected")
        if isinstance(values.get(name), str) and _is_written_message(values[name])
    ]
    if {"chosen", "rejected"} <= set(written) or {"prompt", "user"} & set(written):
        names = ", ".join(columns.get(name, name) for name in written)
        raise BadRow(
            "messages_as_text",
            f"{place}: {names}: must be messages, got their JSON or Python notation as text. Write the lists "
            "themselves, as JSON Lines or Parquet, not CSV (pandas: to_json(FILE, orient='records', lines=True))",
        )


def _is_written_message(text: str) -> bool:
    ends = text.rstrip().endswith(("}", "]"))
    return ends and _MESSAGE_BEGINS.match(text) is not None and _SPEAKER.search(text) is not None


def split_shared_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two whole texts into their shared prompt and the two completions.

    A transcript with `Assistant:` turns (HH-RLHF) is split after the last such turn that both share, so that each
    completion is the whole last turn. Any other text is split before the first word that differs, and the space before
    it belongs to the completion. A split is never inside a word, so it makes no token straddle the boundary.

    Raises ValueError if the texts share no beginning, or are equal and mark no turn.
    """
    both = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in both if a != b), min(len(chosen), len(rejected)))
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


_TURN = re.compile(r"(?:^|\n)[ \t]*Assistant:")


def _inside_word(text: str, i: int) -> bool:
    return _is_word(text[i - 1]) and _is_word(text[i])


def _is_word(character: str) -> bool:
    # Chinese and Japanese are written without spaces, so they have no word boundaries. Korean has spaces.
    if unicodedata.east_asian_width(character) in "WF" and not "\uac00" <= character <= "\ud7a3":
        return False
    return character.isalnum() or character in "_'’-" or unicodedata.category(character) in ("Mn", "Mc")


def _spoken(values: Mapping[str, Any], place: str) -> list[Message]:
    """Make messages of the system's and the user's text; an empty system text gives none."""
    messages = []
    for role in SPOKEN_COLUMNS:
        text = values.get(role)
        if role == "system" and (text is None or text == ""):
            continue
        if not isinstance(text, str):
            remedy = "Leave data.columns.user and system out" if is_conversational(text) else "Mend the row"
            raise BadRow("wrong_type", f"{place}: {role} must be text, got {kind_of(text)}. {remedy}")
        check_text(text, role, place)
        messages.append({"role": role, "content": text})
    return messages


def _answer(completion: Text, name: str, place: str) -> list[Message]:
    """Make an assistant's message of a text. Messages are returned as they are, unless they repeat the prompt."""
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    if completion[0]["role"] != "assistant":
        raise BadRow(
            "wrong_type",
            f"{place}: {name} is a conversation of its own, which begins with {completion[0]['role']}; leave "
            "data.columns.user and system out, its messages say who speaks",
        )
    return completion


def _conversation(
    prompt: Text | None, chosen: list[Message], rejected: list[Message], place: str
) -> tuple[Form, list[Message], list[Message], list[Message]]:
    if isinstance(prompt, list):
        for name, completion in (("chosen", chosen), ("rejected", rejected)):
            if _repeats(prompt, completion):
                raise BadRow(
                    "repeated_prompt",
                    f"{place}: {name} begins with messages of the prompt, which would then occur twice. Take them out "
                    "of chosen and rejected, or take the column of the prompt out: it is then what the two share",
                )
        return "chat", prompt, chosen, rejected
    if isinstance(prompt, str) and all(m["role"] == "assistant" for m in (chosen[0], rejected[0])):
        return "chat_asked", [{"role": "user", "content": prompt}], chosen, rejected
    # Without a prompt, or with a text that the conversations repeat (UltraFeedback), their shared messages are it.
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise ValueError("chosen and rejected share no first message that could be the prompt")
    form: Form = "chat_shared" if prompt is None else "chat_whole"
    return form, chosen[:shared], chosen[shared:], rejected[shared:]


def _repeats(prompt: list[Message], completion: list[Message]) -> bool:
    """Return True if a completion begins with the prompt's messages, or with its last ones from a user's on."""
    if completion[0]["role"] == "assistant":
        return False
    return any(completion[: len(prompt) - i] == prompt[i:] for i in range(len(prompt)))


def _plain(value: Any, name: str, place: str) -> Any:
    """Replace each message's content that is a list of text parts by their text. Raises BadRow for other parts."""
    if not is_conversational(value):
        return value
    plain = []
    for number, message in enumerate(value, start=1):
        content, where = message.get("content"), f"{place}: {name} message {number}: content"
        if isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content):
            # Templates that read parts write one after the other, without a space.
            content = "".join(_text_of_part(part, f"{where} part {i}") for i, part in enumerate(content, start=1))
            message = {**message, "content": content}
        elif not isinstance(content, str | None) and message["role"] in ("system", "developer", "user", "assistant"):
            # A tool's result may be an object, which templates write as JSON. A speaker's would be Python's notation.
            raise BadRow("not_text", f"{where} is {kind_of(content)}, not text. Take the row out")
        plain.append(message)
    return plain


def _text_of_part(part: Mapping[str, Any], where: str) -> str:
    # LLaMA-Factory's parts have their text under value.
    text = part.get("text", part.get("value"))
    if part["type"] == "text" and isinstance(text, str):
        return text
    if part["type"] != "text":
        raise BadRow("not_text", f"{where} is of type {part['type']!r}. Take the row out, only text can be trained on")
    raise BadRow("not_text", f"{where} holds no text, it is {kind_of(part)}. Write it as {{type: text, text: ...}}")


def _size(value: Any, most: int) -> int:
    """Count the characters of all text in a value, however deep. Counting stops above `most`."""
    size, left = 0, [value]
    while left and size <= most:
        item = left.pop()
        if isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            left += item
        # Other values count too, since a list of a million numbers is as long as one of letters.
        size += len(item) if isinstance(item, str) else 1
    return size
