"""Options that several commands of the command line share, and the types of their values."""

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.base.progress import JSON_LOGS, start_json
from pipeline.config.reader import load_config

__all__ = [
    "AT_LEAST_1",
    "CONFIG",
    "EXISTING_FOLDER",
    "FILE",
    "FOLDER",
    "INTO",
    "JSON",
    "JSON_LINES",
    "MAX_TOKENS",
    "OVERRIDES",
    "PATH",
    "PROCESSES",
    "REWARD_MODEL",
    "SET",
    "STOP_AFTER",
    "WORKERS",
    "parse_memory",
    "parse_stop_after",
    "parse_worker",
    "with_config",
]

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
PATH = click.Path(path_type=Path)
AT_LEAST_1 = click.IntRange(min=1)


def parse_stop_after(text: str) -> float:
    """Return the time to stop on `time.monotonic`'s clock; the libraries' import counts too."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or parts is None:
        raise click.BadParameter(f"{text!r}: expected hours, minutes, seconds, like 3h50m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return time.monotonic() + 3600 * hours + 60 * minutes + seconds


def parse_worker(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise click.BadParameter(f"{text!r}: expected I/N with I from 0 to N-1, like 0/8")
    return int(index), int(count)


def parse_memory(text: str) -> int:
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|MB)", text.strip(), re.IGNORECASE)
    if size is None:
        raise click.BadParameter(f"{text!r}: expected a size like 24GB or 800MB")
    return round(float(size[1]) * (10**9 if size[2].upper() == "GB" else 10**6))


def _start_json(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        start_json()


CONFIG = click.option(
    "--config",
    "config_file",
    required=True,
    type=FILE,
    metavar="FILE",
    help="The run's YAML file; both stages read it.",
)
OVERRIDES = click.option(
    "-o",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key of the file, like -o loss.beta=0.2. Repeatable.",
)
SET = click.option(
    "--set", "set_name", default="train", help="Set of pairs: train, or a name in data.sets or data.eval."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
PROCESSES = click.option(
    "--processes", default=1, type=AT_LEAST_1, metavar="N", help="Start N processes on this machine, one for each GPU."
)
STOP_AFTER = click.option(
    "--stop-after",
    "stop_at",
    type=parse_stop_after,
    metavar="TIME",
    help="Save and exit with 75 after this time, like 3h50m, before a known time limit.",
)
JSON_LINES = click.option(
    "--json-logs",
    is_flag=True,
    envvar=JSON_LOGS,
    is_eager=True,
    expose_value=False,
    callback=_start_json,
    help=f"Write one JSON object per line to stdout. {JSON_LOGS}=1 does the same.",
)
MAX_TOKENS = click.option("--max-tokens", default=256, type=AT_LEAST_1, help="Largest number of tokens of a reply.")
REWARD_MODEL = click.option(
    "--reward-model", metavar="MODEL", help="Folder or hub name of a sequence classifier that rates the replies."
)
WORKERS = click.option("--workers", type=AT_LEAST_1, help="Number of workers of stage one; overrides cluster.workers.")
INTO = click.option(
    "--into", type=FOLDER, metavar="DIR", help="Folder of the job files; if left out, jobs in train.output_dir."
)


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options for its settings, and the settings that they name as `config`."""

    @CONFIG
    @OVERRIDES
    @functools.wraps(command)
    def load_and_run(config_file: Path, overrides: tuple[str, ...], workers: int | None = None, **options: Any) -> None:
        own = () if workers is None else (f"cluster.workers={workers}",)
        command(config=load_config(config_file, (*overrides, *own)), **options)

    return load_and_run
