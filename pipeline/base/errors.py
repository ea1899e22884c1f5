"""The errors for users, each with the exit status of the command.

A message states in one line where, what was found, and what to do: `KEY: must be RULE, got VALUE. IMPERATIVE.` It may
quote untrusted data, so it is shown through `one_line`.
"""

import contextlib
import difflib
import errno
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

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
    "interruption_of",
    "is_out_of_memory",
    "nearest",
    "number_of",
    "one_line",
    "panics_as_errors",
    "printable",
    "status_and_text",
    "stopped_as_asked",
]


class RefshardError(Exception):
    """An error that the user can act on; any other exception is a bug (exit status 1)."""

    exit_status = 1


class ConfigError(RefshardError):
    """A wrong command, an unknown or impossible setting, or a setting that names a missing model or file."""

    exit_status = 2


class DataError(RefshardError):
    """Bad data or a damaged file: preference rows, shards, checkpoints."""

    exit_status = 65


class BadRow(DataError):
    """A preference row that can't be a pair. `reason` is the short name under which drops are counted.

    Its message quotes the row, and is cut: a store's parts hold the messages of skipped rows.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(one_line(message))
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is unpickled from its message alone.
        return type(self), (self.reason, str(self)), self.__dict__


class StorageError(RefshardError):
    """The disk or the network failed."""

    exit_status = 74


class UnfinishedError(RefshardError):
    """Not all is done; what is done is saved, and the same command resumes."""

    exit_status = 75


def stopped_as_asked(saved: str, when: str = "") -> UnfinishedError:
    """Make the error of a command that leaves at a stop request, like `after step 5`; `saved` says what is saved."""
    return UnfinishedError(f"stopped as asked{when and f' {when}'}; {saved}. Run the same command again")


class IdentityError(RefshardError):
    """The identity (reference, tokenization, run) differs from that of the shards or checkpoints on disk."""

    exit_status = 78


class FencedError(RefshardError):
    """Another attempt of this run has taken over; this one saves nothing more."""

    exit_status = 79


def number_of(count: int, noun: str) -> str:
    """Write a count with its noun, in the plural unless it is 1."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def one_line(text: str, most: int = 2000) -> str:
    """Make text safe to show: one line, shortened in its middle, without control characters."""
    # Cut first: a row has megabytes. Escapes make it longer again.
    return _cut(printable(_cut(" ".join(text.split()), most)), most)


def _cut(line: str, most: int) -> str:
    # The end says what to do.
    return line if len(line) <= most else f"{line[: most * 3 // 4 - 5]} ... {line[-most // 4 :]}"


def printable(text: str) -> str:
    """Escape characters that do not print: control characters, direction marks, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory ran out: a GPU has a class for it, a CPU mostly only words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory")
    return getattr(error, "errno", None) == errno.ENOMEM or any(word in str(error) for word in words)


def interruption_of(error: BaseException) -> UnfinishedError | None:
    """Make the error of a command whose loader was killed or whose memory ran out; None for any other cause."""
    if isinstance(error, RefshardError):
        return None
    # A process that dies while it sends a batch cuts the connection; a DataLoader notices the others.
    frames = traceback.walk_tb(error.__traceback__)
    is_cut = isinstance(error, ConnectionError | EOFError) and any(
        "multiprocessing" in frame.f_code.co_filename for frame, _ in frames
    )
    if is_cut or (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")):
        return UnfinishedError(
            f"a process that reads the data was ended from outside ({first_line(error)}), maybe for lack of memory; "
            "what is finished is saved. Run the same command again"
        )
    if is_out_of_memory(error):
        return UnfinishedError(
            f"memory ran out ({first_line(error)}); what is finished is saved. Run the same command again with more "
            "memory, or with less to hold (train.gradient_checkpointing: true; a smaller precompute.tokens_per_batch)"
        )
    return None


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a RuntimeError in place of a panic of a library in Rust, which no `except Exception` would catch."""
    try:
        yield
    except BaseException as error:
        # The class is each extension's own, and can't be imported.
        if type(error).__name__ == "PanicException":
            raise RuntimeError(f"the library panicked: {first_line(error)}") from error
        raise


def _loss_of_peer(error: BaseException) -> RefshardError | None:
    """Make the error of a process whose collective failed as another process of the run was gone.

    Its status is 1: that of the other process says whether to run again.
    """
    words = ("closed by peer", "reset by peer", "remote process exiting prematurely", "Connection was likely closed")
    if not isinstance(error, RuntimeError) or not any(word in str(error) for word in words):
        return None
    return RefshardError(
        f"another process of this run has ended ({first_line(error)}), and this one can't go on without it. See what "
        "the other one said"
    )


def status_and_text(error: Exception) -> tuple[int, str]:
    """Give the exit status of an error that ends a command, and its line for the user."""
    error = interruption_of(error) or _loss_of_peer(error) or error
    if isinstance(error, RefshardError):
        return error.exit_status, one_line(str(error))
    bug = f"{type(error).__name__}: {one_line(str(error), most=500)}"
    return 1, f"this is a bug: {bug}. Run again with refshard --debug for the traceback"


def nearest(word: str, known: Sequence[str]) -> str | None:
    """Give the known word that another one most likely is a misspelling of; None if none is near."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.65)), None)


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """Give a hint for an unknown key: the nearest known one, or some of them."""
    near = nearest(key, known)
    return f"; did you mean {near}?" if near is not None else f"; known: {', '.join(known[:20])}"


def first_line(error: BaseException) -> str:
    """Give the first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
