"""One line per stage: how far, how fast, how long still, how it goes. For people, for logs, or as JSON for machines.

On a terminal the line is rewritten in place. Elsewhere it is written anew every half a minute, without carriage
returns. With `--json-logs` all that a command says on stdout is one JSON object a line, each with its `kind`.
"""

import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import click
from tqdm import tqdm

__all__ = ["JSON_LOGS", "JsonLines", "Progress", "emit", "says_json", "start_json", "without_nan"]

JSON_LOGS = "REFSHARD_JSON_LOGS"
"""Environment variable that does what the option does, also in the processes that a command starts"""

_SECONDS_BETWEEN_LINES = 30.0


class JsonLines(io.TextIOBase):
    """Stands for stdout: every line of text that is printed becomes a JSON object of kind `message`."""

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
        """Print one object, whole and at once."""
        self._out.write(json.dumps(without_nan(record)) + "\n")
        self._out.flush()


def start_json() -> None:
    """Have stdout, and that of processes to be started, say JSON from here on."""
    os.environ[JSON_LOGS] = "1"
    if not says_json():
        sys.stdout = JsonLines(sys.stdout)


def says_json() -> bool:
    return isinstance(sys.stdout, JsonLines)


def emit(kind: str, record: Mapping[str, Any]) -> None:
    """Print a record where stdout says JSON; nothing elsewhere."""
    if isinstance(sys.stdout, JsonLines):
        sys.stdout.put({"kind": kind, "time": time.time(), **record})


def without_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace numbers that are not finite, which JSON does not have, by null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


class Progress:
    """How far one stage is.

    Args:
        name: Of the stage, or of the set that it works on.
        total: How many there are to be done, where that is known.
        unit: What is counted: pairs, steps.
        done: How many are done already, by an earlier start.
    """

    def __init__(self, name: str, total: int | None, unit: str, *, done: int = 0) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done = self._done_before = done
        self._values: dict[str, float] = {}
        self._start = time.monotonic()
        # The first line comes soon, so that one sees whether it works; the others seldom.
        self._last_line = -math.inf
        shown = sys.stderr.isatty() and not says_json() and total != done
        self._bar = tqdm(total=total, initial=done, desc=name, unit=f" {unit}", disable=not shown, dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._start

    def advance(self, count: int, values: Mapping[str, float]) -> None:
        """Count what was done, and say it if it is time to.

        Args:
            count: How many more are done.
            values: What to show beside: `tokens/s`, `memory` in bytes, `loss`, `margin`, ...
        """
        self._done += count
        self._values.update(values)
        self._bar.set_postfix_str(", ".join(_shown(self._values)), refresh=False)
        self._bar.update(count)
        self.pulse()

    def pulse(self, doing: str = "") -> None:
        """Show that something goes on, though nothing more is done yet."""
        if not self._bar.disable:
            self._bar.set_description_str(f"{self._name} ({doing})" if doing else self._name)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._write_line(doing)

    def say(self, text: str) -> None:
        """Write a line of its own beside the progress, for people."""
        self._bar.clear()
        click.echo(text, err=not says_json())
        self._bar.refresh()

    def close(self) -> None:
        """Write the last line."""
        self._bar.close()
        if self._bar.disable and self._done > self._done_before:
            self._write_line("")

    def _write_line(self, doing: str) -> None:
        self._last_line = time.monotonic()
        rate = (self._done - self._done_before) / max(self.seconds, 1e-9)
        left = (self._total - self._done) / rate if self._total is not None and rate > 0 else None
        if says_json():
            emit(
                "progress",
                {
                    "stage": self._name,
                    "doing": doing,
                    "unit": self._unit,
                    "done": self._done,
                    "total": self._total,
                    "per_second": rate,
                    "seconds_left": left,
                    **self._values,
                },
            )
            return
        of = f" of {self._total:,}" if self._total else ""
        parts = [f"{self._done:,}{of} {self._unit}", f"{rate:,.1f} {self._unit}/s", *_shown(self._values)]
        if left:
            parts.append(f"{tqdm.format_interval(left)} left")
        if doing:
            parts.append(doing)
        click.echo(f"{self._name}: {', '.join(parts)}", err=True)


def _shown(values: Mapping[str, float]) -> list[str]:
    shown = []
    for name, value in values.items():
        if name == "memory":
            shown.append(f"{value / 2**30:.1f} GiB")
        elif name == "tokens/s":
            shown.append(f"{value:,.0f} tokens/s")
        else:
            shown.append(f"{name} {value:.4g}")
    return shown
