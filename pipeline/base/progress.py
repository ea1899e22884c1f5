"""Progress of a stage in one line (count, rate, time left, values), for people, logs, or machines as JSON.

A terminal's line is rewritten in place. Elsewhere a new line is written every half a minute, without carriage returns.
With `--json-logs` a command prints only JSON objects on stdout, one a line, each with its `kind`.
"""

import contextlib
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from pipeline.base.errors import printable

__all__ = [
    "JSON_LOGS",
    "JsonLines",
    "Progress",
    "emit",
    "is_notebook",
    "is_shown",
    "say",
    "say_loading",
    "start_json",
    "without_nan",
    "without_other_bars",
]

JSON_LOGS = "REFSHARD_JSON_LOGS"
"""Environment variable with the option's effect, also in the processes that a command starts"""

_SECONDS_BETWEEN_LINES = 30.0
_ONE = {"replies": "reply"}
"""Units whose singular is not the plural without its s"""


class JsonLines(io.TextIOBase):
    """A replacement of stdout that makes a JSON object of kind `message` of every printed line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self.put({"kind": "message", "time": time.time(), "text": line})
        return len(text)

    def flush(self) -> None:
        self._out.flush()

    def put(self, record: Mapping[str, Any]) -> None:
        """Print one object at once."""
        self._out.write(json.dumps(without_nan(record)) + "\n")
        self._out.flush()


def start_json() -> None:
    """Make stdout print JSON from here on, also in processes that are started later."""
    os.environ[JSON_LOGS] = "1"
    if not isinstance(sys.stdout, JsonLines):
        sys.stdout = JsonLines(sys.stdout)


def emit(kind: str, record: Mapping[str, Any]) -> None:
    """Print a record if stdout prints JSON, else nothing."""
    if isinstance(sys.stdout, JsonLines):
        sys.stdout.put({"kind": kind, "time": time.time(), **record})


def say(text: str, *, err: bool = False) -> None:
    """Print lines for people, above the progress line if there is one. Escape what a terminal would obey.

    Paths, names and texts of the data are anybody's. The level of the logger `refshard` leaves lines out: warnings and
    what goes to stderr are of level WARNING, the others of INFO.
    """
    if not is_shown(logging.WARNING if err or text.startswith("warning:") else logging.INFO):
        return
    file = sys.stderr if err else sys.stdout
    tqdm.write("\n".join(map(printable, text.split("\n"))), file=file)
    file.flush()


def say_loading() -> None:
    """Say on a terminal why nothing happens for some seconds, before torch and the libraries on it are imported."""
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first and sys.stderr.isatty() and "torch" not in sys.modules:
        say("Loading the libraries ...", err=True)


def is_shown(level: int) -> bool:
    """Return True unless a script or notebook has set the logger `refshard` to a higher level."""
    return logging.getLogger("refshard").level <= level


def is_notebook() -> bool:
    """Return True in the kernel of a notebook, which shows a line that is rewritten, though it is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


@contextlib.contextmanager
def without_other_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own through the progress line."""
    import transformers.utils.logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()  # type: ignore[no-untyped-call]


def without_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace numbers that are not finite, which JSON lacks, by null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


class _Point(NamedTuple):
    time: float
    done: int
    tokens: int


class Progress:
    """Progress of a stage or of its set: the number of units, named by `unit`; `done` by earlier attempts."""

    def __init__(self, name: str, total: int | None, unit: str, *, done: int = 0) -> None:
        self._name, self._total, self._unit = printable(name), total, unit
        self._start = self._latest = _Point(time.monotonic(), done, 0)
        # Rates count from the end of the first piece, which also pays for threads, kernels and caches.
        self._first = self._start
        self._values: dict[str, float] = {}
        # The first line is written at once, the others seldom.
        self._last_line = -math.inf
        self._last_said: int | None = None
        self._is_shown = is_shown(logging.INFO)
        is_live = (sys.stderr.isatty() or is_notebook()) and not isinstance(sys.stdout, JsonLines)
        self._rewrites = is_live and self._is_shown and total != done
        self._bar = tqdm(
            total=total, initial=done, desc=self._name, unit=f" {unit}", disable=not self._rewrites, dynamic_ncols=True
        )

    @property
    def seconds(self) -> float:
        """Seconds since the start, or since `restart`."""
        return time.monotonic() - self._start.time

    @property
    def tokens(self) -> int:
        """Number of tokens done since the start."""
        return self._latest.tokens

    def restart(self) -> None:
        """Let time and rates count from here: what came before was loading."""
        self._start = self._first = self._latest._replace(time=time.monotonic())
        self._last_line = -math.inf
        self._bar.unpause()

    def advance(self, count: int, *, tokens: int, memory: int) -> None:
        """Count further units and their tokens, and write a line if one is due. `memory` is the peak so far, bytes."""
        self._latest = _Point(time.monotonic(), self._latest.done + count, self._latest.tokens + tokens)
        if self._first is self._start:
            self._first = self._latest
        self._bar.update(count)
        self.show({"tokens/s": self._rates()[1], "memory": memory})

    def show(self, values: Mapping[str, float]) -> None:
        """Show these values in the line from now on: `loss`, `margin`, ..."""
        self._values |= values
        self._bar.set_postfix_str(", ".join(_shown(self._values)), refresh=False)
        self.pulse()

    def pulse(self, doing: str = "") -> None:
        """Show activity, though nothing more is done yet."""
        if self._rewrites:
            self._bar.set_description_str(f"{self._name} ({doing})" if doing else self._name)
        elif self._is_shown and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._write_line(doing)

    def close(self) -> None:
        """Write the last line."""
        self._bar.close()
        if self._is_shown and not self._rewrites and self._latest.done not in (self._start.done, self._last_said):
            self._write_line("", is_last=True)

    def _rates(self) -> tuple[float, float]:
        """Return units and tokens per second."""
        latest = self._latest
        since = self._first if latest.done > self._first.done else self._start
        seconds = max(latest.time - since.time, 1e-9)
        return (latest.done - since.done) / seconds, (latest.tokens - since.tokens) / seconds

    def _write_line(self, doing: str, *, is_last: bool = False) -> None:
        done, rate = self._latest.done, self._rates()[0]
        self._last_line, self._last_said = time.monotonic(), done
        # The first piece pays for the start, so its rate would promise hours.
        is_steady = done > self._first.done
        left = (self._total - done) / rate if self._total is not None and is_steady else None
        if isinstance(sys.stdout, JsonLines):
            counts = {"unit": self._unit, "done": done, "total": self._total, "per_second": rate, "seconds_left": left}
            emit("progress", {"stage": self._name, "doing": doing, **counts, **self._values})
            return
        of = f" of {self._total:,}" if self._total else ""
        shows_rate = rate and (is_steady or is_last)
        values = {name: value for name, value in self._values.items() if shows_rate or name != "tokens/s"}
        speed = [_speed(rate, self._unit)] if shows_rate else []
        unit = _one(self._unit) if (self._total or done) == 1 else self._unit
        parts = [f"{done:,}{of} {unit}", *speed, *_shown(values)]
        if left:
            parts.append(f"{tqdm.format_interval(left)} left")
        if doing:
            parts.append(doing)
        say(f"{self._name}: {', '.join(parts)}", err=True)


def _speed(per_second: float, unit: str) -> str:
    """Show a rate as units a second, or as seconds a unit where it is slower than that."""
    if per_second >= 1:
        return f"{per_second:,.1f} {unit}/s"
    return f"{1 / per_second:,.1f} s/{_one(unit)}"


def _one(unit: str) -> str:
    """Return a unit's singular."""
    return _ONE.get(unit, unit.removesuffix("s"))


def _shown(values: Mapping[str, float]) -> list[str]:
    units = {"memory": lambda value: f"{value / 2**30:.1f} GiB", "tokens/s": lambda value: f"{value:,.0f} tokens/s"}
    return [units[name](value) if name in units else f"{name} {value:.4g}" for name, value in values.items()]
