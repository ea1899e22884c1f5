"""Look at the first rows of a set: how they are read as pairs, which columns are not read, and what that misses."""

import contextlib
import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import BadRow, ConfigError
from pipeline.base.progress import say
from pipeline.config.columns import PAIR_COLUMNS
from pipeline.config.data import DataConfig
from pipeline.data.layouts import is_in_row, to_pair
from pipeline.data.other_layouts import COLUMNS_OF_FORMS
from pipeline.data.pairs import FORMS, Form, Pair, Text
from pipeline.data.rows import Source
from pipeline.data.sources import describe, read_rows

__all__ = ["Reading", "look_at_rows", "say_how_read", "written_forms"]

_ROWS = 200
"""Rows to look at: enough to know a set by, and read in a blink"""
_MOST_NAMES = 12
_MOST_TURNS = 4
_SHOWN = 60
"""Most characters of a text of the first row"""
_PROMPT_NAMES = frozenset(
    (
        "instruction",
        "question",
        "query",
        "input",
        "context",
        "user",
        "problem",
        "conversation",
        "conversations",
        "history",
    )
)
"""Columns, in lower case, that hold a prompt or a part of it"""
_SYSTEM_NAMES = frozenset(("system", "system_prompt", "system_message"))
_MARK = re.compile(r"<\|[^\s|]{1,40}\|>|\[/?INST\]|<(?:start|end)_of_turn>")
"""Marks with which a chat template writes who speaks"""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the first rows of a set are read."""

    forms: Mapping[str, int]
    """Number of pairs by form (a key of `FORMS`)."""
    unread: tuple[str, ...]
    """Columns that no pair is made of."""
    findings: Mapping[str, str]
    """Probable misreadings by name, each with a remedy."""
    refused: ConfigError | None = None
    """Error of a set that must not be read as it would be; None if there is no such."""
    first: str | None = None
    """Place and texts of the first row that is a pair, cut; None if there is no such."""

    @property
    def line(self) -> str:
        return f"{written_forms(self.forms)}; columns not read: {self.columns_not_read}"

    @property
    def columns_not_read(self) -> str:
        more = len(self.unread) - _MOST_NAMES
        return (", ".join(self.unread[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")) or "none"


def written_forms(forms: Mapping[str, int]) -> str:
    """Write how rows are read, most frequent form first, with counts if there are several."""
    total, ordered = sum(forms.values()), sorted(forms.items(), key=lambda item: -item[1])
    words: Mapping[Any, str] = FORMS
    return " | ".join(words[form] + (f" ({count:,})" if count < total else "") for form, count in ordered) or "no pairs"


def look_at_rows(source: Source, data: DataConfig, *, has_template: bool) -> Reading:
    """Read the first rows of a source with all their columns. Bad rows are passed over; stage one names them.

    Raises DataError, StorageError or ConfigError if the source can't be read.
    """
    whole = dataclasses.replace(source, all_columns=True)
    rows: list[_Row] = []
    for row in itertools.islice(read_rows(whole), _ROWS):
        with contextlib.suppress(BadRow):
            rows.append(_Row.of(row.load(), data, row.place))
    return _Looking(rows=rows, columns=data.columns, dataset=describe(source), has_template=has_template).reading()


def say_how_read(name: str, source: Source, data: DataConfig, *, has_template: bool) -> None:
    """Say how the rows of a set are read. Raises ConfigError if they must not be read so, and as `look_at_rows`."""
    reading = look_at_rows(source, data, has_template=has_template)
    if reading.refused is not None:
        raise reading.refused
    say(f"{name}: read as {reading.line}")
    if reading.first is not None:
        say(f"{name}: first row as read: {reading.first}")
    for text in reading.findings.values():
        say(f"note: {name}: {text}", err=True)


@dataclass(frozen=True)
class _Row:
    """Columns of a row, and the pair in it."""

    values: Mapping[str, Any]
    pair: Pair | None
    """None if it is none."""
    shares_nothing: bool = False
    """True if it is none because chosen and rejected share no prompt."""
    place: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any], data: DataConfig, place: str) -> "_Row":
        try:
            pair = to_pair(values, data.columns, place, data.random_rejected, data.roles)
            return cls(values, pair, place=place)
        except BadRow as error:
            return cls(values, None, shares_nothing=error.reason == "no_shared_prompt")

    @property
    def form(self) -> Form | None:
        return None if self.pair is None else self.pair.form

    def says(self, text: str) -> bool:
        """Return True if the prompt holds this text; spaces do not count."""
        if self.pair is None:
            return False
        prompt = self.pair.prompt
        parts = [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]
        return any(_spaced(text) in _spaced(part) for part in parts if isinstance(part, str))


def _shown(pair: Pair, place: str) -> str:
    """Write the three texts of a pair for people, each cut."""
    parts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return f"{place}: " + " | ".join(f"{name} {_written(text)}" for name, text in parts.items())


def _written(text: Text) -> str:
    """Write a text, or messages with who says them."""
    if isinstance(text, str):
        return repr(_cut(text))
    said = [f"{message['role']}: {_cut(_said(message))!r}" for message in text]
    return (
        f"[{', '.join(said[:_MOST_TURNS] + ([f'{len(said) - _MOST_TURNS} more'] if len(said) > _MOST_TURNS else []))}]"
    )


def _said(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else str(message.get("tool_calls", content))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _text(value: Any) -> str:
    """Give a column's text: its own, or that of the last of its messages."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        value = value.get("content", value.get("value", value.get("messages")))
        return _text(value) if not isinstance(value, str) else value
    return value if isinstance(value, str) else ""


def _is_sentence(text: str) -> bool:
    """Return False for an empty text, and for a name or a number that identifies something."""
    return len(text.split()) > 1 or not text.isascii()


@dataclass(frozen=True, kw_only=True)
class _Looking:
    """The first rows of one set, and what is found in them."""

    rows: list[_Row]
    columns: Mapping[str, str]
    """Column names, ours to theirs (`data.columns`)."""
    dataset: str
    has_template: bool

    def reading(self) -> Reading:
        missed, is_refused = self._missed_prompt()
        findings = {
            "missed_prompt": missed,
            "unread_system": self._unread_system(),
            "ignored_prompt": self._ignored_prompt(),
            "repeated_prompt": self._repeated_prompt(),
            "template_unused": None if missed else self._template_unused(),
        }
        return Reading(
            forms=Counter(str(row.form) for row in self.rows if row.pair is not None),
            unread=tuple(self._unread()),
            findings={name: text for name, text in findings.items() if text is not None},
            refused=ConfigError(f"data.columns: {missed}") if is_refused else None,
            first=next((_shown(row.pair, row.place) for row in self.rows if row.pair is not None), None),
        )

    def _unread(self) -> list[str]:
        """List the columns that no pair is made of, in the rows' order."""
        ours = {*PAIR_COLUMNS, *self.columns} - ({"prompt"} if "user" in self.columns else set())
        ours |= {name for row in self.rows for name in COLUMNS_OF_FORMS.get(str(row.form), ())}
        named = {self.columns.get(name, name) for name in ours}
        there: dict[str, bool] = {}
        for row in self.rows:
            for name in row.values:
                there.setdefault(name, False)
            # A dotted name leads into a column.
            dotted = (name for name in named if name not in row.values and is_in_row(row.values, name))
            there |= dict.fromkeys((name.partition(".")[0] for name in dotted), True)
        return [name for name, is_read in there.items() if not is_read and name not in named]

    def _missed_prompt(self) -> tuple[str | None, bool]:
        """Find prompts that are not read, while the shared beginning of two answers is taken for one.

        True: most rows are so, and no other reading makes sense.
        """
        alone = [row for row in self.rows if row.form == "text_shared" or row.shares_nothing]
        names = [name for name in self._unread() if name.strip().lower() in _PROMPT_NAMES]
        missed = {
            name: count
            for name in names
            if (count := sum(bool(text := _text(row.values.get(name)).strip()) and not row.says(text) for row in alone))
        }
        if not any(_is_sentence(_text(row.values.get(name))) for row in alone for name in missed):
            return None, False
        most = max(missed.values())
        lists = any(isinstance(row.values.get(name), list | Mapping) for row in alone for name in missed)
        if lists:
            ours = {"prompt": next(iter(missed)), **self.columns}
            remedy = f"set data.columns: {{{', '.join(f'{name}: {column}' for name, column in ours.items())}}}"
        elif len(missed) > 1:
            joined = " and ".join(missed)
            remedy = f"join {joined} in one column, say request, and {self._set(asked='request')}"
        else:
            remedy = self._set(asked=next(iter(missed)))
        columns = f"column {next(iter(missed))}" if len(missed) == 1 else f"columns {', '.join(missed)}"
        text = (
            f"must name the column of the prompt, got none: in {self._share(most)} of {self.dataset} the prompt would "
            f"be what chosen and rejected share, and the {columns} would not be read. To read it, {remedy}; or rename "
            "it, if it holds no prompts"
        )
        return text, 2 * len(alone) > len(self.rows) and 2 * most > len(alone)

    def _unread_system(self) -> str | None:
        """Find system messages that are not read."""
        for name in self._unread():
            if name.strip().lower() not in _SYSTEM_NAMES:
                continue
            texts = ((row, _text(row.values.get(name)).strip()) for row in self.rows if row.pair is not None)
            missed = Counter(row.form for row, text in texts if text and not row.says(text))
            if not missed:
                continue
            [(form, _)] = missed.most_common(1)
            if form == "chat_columns":
                remedy = self._set(asked=self.columns["user"], system=name)
            elif form == "text" and self.has_template:
                remedy = self._set(asked=self.columns.get("prompt", "prompt"), system=name)
            elif form in ("text", "text_shared", "transcripts"):
                remedy = "write it in front of the prompt"
            else:
                remedy = "write it as the first message, of role system (docs/guide.md, Layouts of other tools)"
            return f"column {name} is not read in {self._share(missed.total())}. To use it, {remedy}"
        return None

    def _ignored_prompt(self) -> str | None:
        """Find prompts beside whole conversations that these do not have."""
        name = self.columns.get("prompt", "prompt")
        whole = [row for row in self.rows if row.form == "chat_whole"]
        missed = sum(bool(text := _text(row.values.get(name)).strip()) and not row.says(text) for row in whole)
        if 2 * missed <= len(whole):
            return None
        return (
            f"the text of {name} is in none of the messages that chosen and rejected share, and not read, in "
            f"{self._share(missed)}. If it belongs to them, write it as a message of theirs"
        )

    def _repeated_prompt(self) -> str | None:
        """Find prompts that the answers begin with."""
        given = [row.pair for row in self.rows if row.pair is not None and row.form == "text"]
        count = 0
        for pair in given:
            prompt, *answers = (_spaced(str(text)) for text in (pair.prompt, pair.chosen, pair.rejected))
            count += bool(prompt) and all(answer.startswith(prompt) for answer in answers)
        if 2 * count <= len(given):
            return None
        return (
            "chosen and rejected begin with the text of the prompt, so it occurs twice, in "
            f"{self._share(count)}. Cut it from both, or take the column {self.columns.get('prompt', 'prompt')} out"
        )

    def _template_unused(self) -> str | None:
        """Find texts that a chat model would see without its template. Texts with marks of their own are left alone."""
        pairs = [row.pair for row in self.rows if row.pair is not None]
        plain = [pair for pair in pairs if pair.form in ("text", "text_shared") and not _MARK.search(str(pair.prompt))]
        if not self.has_template or 2 * len(plain) <= len(pairs):
            return None
        if plain[0].form == "text":
            remedy = self._set(asked=self.columns.get("prompt", "prompt"))
        else:
            remedy = f"write the prompt into a column, say request, and {self._set(asked='request')}"
        return f"the model's chat template is not used on text, in {self._share(len(plain))}. To use it, {remedy}"

    def _share(self, count: int) -> str:
        return f"{count:,} of the first {len(self.rows):,} rows"

    def _set(self, *, asked: str, system: str | None = None) -> str:
        """Give the setting that reads these columns: as messages for a chat model, or else as text."""
        chosen = self.columns.get("chosen", "chosen")
        is_chat = self.has_template or any(isinstance(row.values.get(chosen), list) for row in self.rows)
        system = system or next((name for name in self._unread() if name.strip().lower() in _SYSTEM_NAMES), None)
        ours = {"system": system, "user": asked} if is_chat and system else {"user" if is_chat else "prompt": asked}
        ours |= {name: column for name, column in self.columns.items() if name not in ("prompt", "user", "system")}
        return f"set data.columns: {{{', '.join(f'{name}: {column}' for name, column in ours.items())}}}"
