"""The failure tree: each error carries the exit status that the command ends with.

A message has three facts in one line: what was found, where, and what to do. It may quote data from strangers, so it
is shown by way of `one_line`.
"""

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

__all__ = [
    "BadRow",
    "ConfigError",
    "DataError",
    "FencedError",
    "IdentityError",
    "RefshardError",
    "StorageError",
    "UnfinishedError",
    "did_you_mean",
    "first_line",
    "one_line",
    "printable",
]


class RefshardError(Exception):
    """What the user can do something about; anything else that is raised is a bug (exit status 1)."""

    exit_status = 1


class ConfigError(RefshardError):
    """A wrong command, an unknown or impossible setting, a model or file that a setting names in vain."""

    exit_status = 2


class DataError(RefshardError):
    """Bad data or a damaged file: preference rows, shards, checkpoints."""

    exit_status = 65


class BadRow(DataError):
    """One preference row that can't be a pair. `reason` is the short name under which drops are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # As it stands an exception is made again from its message alone.
        return type(self), (self.reason, str(self)), self.__dict__


class StorageError(RefshardError):
    """The disk or the network failed."""

    exit_status = 74


class UnfinishedError(RefshardError):
    """What is done is saved, but not all is done: run the same command again."""

    exit_status = 75


class IdentityError(RefshardError):
    """Another identity (reference, tokenization, run) than that of the shards or checkpoints on disk."""

    exit_status = 78


class FencedError(RefshardError):
    """Another start of this run has taken over; this one, which was thought dead, saves nothing more."""

    exit_status = 79


def one_line(text: str, most: int = 2000) -> str:
    """Make text safe to show: in one line, shortened in its middle, with nothing in it that a terminal obeys."""
    line = printable(" ".join(text.split()))
    # The end says what to do.
    return line if len(line) <= most else f"{line[: most * 3 // 4]} ... {line[-most // 4 :]}"


def printable(text: str) -> str:
    """Write whatever does not print (escape sequences, marks that turn the writing direction, half surrogate pairs) as
    Python would write it in a string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known[:20])}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
