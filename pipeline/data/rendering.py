"""Apply a chat template in a process of its own, which the kernel ends after a minute.

A template is a stranger's program. No handler and no thread stops one that computes inside C code; the end of its
process does, and meanwhile this process heeds a request to stop.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base.errors import UnfinishedError, one_line, panics_as_errors, stopped_as_asked
from pipeline.base.signals import STOP_SIGNALS, is_stop_requested
from pipeline.data.dates import fix_date
from pipeline.data.pairs import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rendered", "TemplateError", "apply_template"]

_MOST_SECONDS = 60.0
"""Time limit for the conversations of one pair, which take milliseconds"""
_MOST_CHARACTERS = 16 * 2**20
"""Most that a template may write: four times a row's limit"""
_MOST_MEMORY = 4 * 2**30
"""Bytes that a template's process may take on top of what it begins with"""


Rendered = tuple[str, list[int]]
"""Text and token ids"""


class TemplateError(Exception):
    """A chat template refuses a conversation, or goes beyond a limit."""


def apply_template(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[tuple[list[Message], bool]],
    arguments: Mapping[str, Any],
    date: str | None = None,
) -> list[Rendered]:
    """Give each conversation's text and token ids, True: with the beginning of an answer after it.

    `date` is what the template is told if it asks for today's; without one, it is told today's.

    Raises:
        TemplateError: The template fails, or takes more than its time, memory or text.
        UnfinishedError: This process is asked to stop, or the template's was ended from outside.
    """
    request = (conversations, arguments, date)
    process: _Process | None = getattr(_of_thread, "process", None)
    if process is None or not process.serves(tokenizer):
        process = _of_thread.process = _Process(tokenizer) if hasattr(os, "fork") else None
    try:
        answer = process.ask(request) if process else _answer(tokenizer, request)
    except BaseException:
        # An answer that is still to come would be taken for the next one's.
        _of_thread.process = None
        raise
    if isinstance(answer, str):
        raise TemplateError(answer)
    rendered: list[Rendered] = answer
    return rendered


_of_thread = threading.local()


class _Process:
    """A fork of this process that applies one tokenizer's template. Loaders may have no child of multiprocessing."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        # A text at a time needs no threads, and some versions of tokenizers warn in a fork of a threaded process.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer, self._state, self._owner = tokenizer, _state(tokenizer), os.getpid()
        self._connection, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            # Newer versions of Python warn of other threads' locks; the child uses none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            with contextlib.suppress(BaseException):
                self._connection.close()
                _serve(theirs, tokenizer)
            os._exit(0)
        theirs.close()

    def serves(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Return True if this process made it, of this tokenizer as it still is."""
        return self._owner == os.getpid() and self._tokenizer is tokenizer and self._state == _state(tokenizer)

    def ask(self, request: Any) -> Any:
        """Send a request and wait for the answer."""
        try:
            self._connection.send(request)
            while not self._connection.poll(0.1):
                if is_stop_requested():
                    raise stopped_as_asked("all that was done is saved")
            return self._connection.recv()
        except (EOFError, ConnectionError):
            ended = self._end()
        if ended == signal.SIGALRM:
            raise TemplateError(f"it runs for more than {_MOST_SECONDS:g} seconds")
        if ended in (signal.SIGKILL, None):
            raise UnfinishedError(
                "a process that applies the chat template was ended from outside, maybe for lack of memory; all that "
                "was done is saved. Run the same command again"
            )
        raise TemplateError(f"it ends its process by signal {ended}")

    def __del__(self) -> None:
        if getattr(self, "_pid", 0) and self._owner == os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._end()

    def _end(self) -> int | None:
        """Wait for the process's end. Return the signal that ended it, None if that is not known."""
        try:
            _, status = os.waitpid(self._pid, 0)
        except ChildProcessError:
            return None
        finally:
            self._pid = 0
            self._connection.close()
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def _state(tokenizer: "PreTrainedTokenizerBase") -> tuple[Any, ...]:
    """Give what may change in a tokenizer after the fork and decides what its template gives."""
    return tokenizer.chat_template, tokenizer.special_tokens_map, len(tokenizer)


def _serve(connection: Connection, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Answer requests, in the child, until the parent is gone."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The system's own handling ends the process whatever it computes.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_memory()
    while True:
        request = connection.recv()
        signal.setitimer(signal.ITIMER_REAL, _MOST_SECONDS)
        answer = _answer(tokenizer, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _MOST_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _answer(tokenizer: Any, request: tuple[Sequence[tuple[list[Message], bool]], Mapping[str, Any], str | None]) -> Any:
    """Give what `apply_template` returns, or the reason why the template fails."""
    conversations, arguments, date = request
    rendered: list[Rendered] = []
    try:
        fix_date(tokenizer, arguments.get("tools"), date)
        for messages, begin in conversations:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin, **arguments)
            if len(text) > _MOST_CHARACTERS:
                return f"it writes {len(text):,} characters, more than {_MOST_CHARACTERS:,}"
            with panics_as_errors():
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            rendered.append((text, ids))
    except Exception as error:  # a template is a program and may raise anything
        return one_line(str(error)) or type(error).__name__
    return rendered
