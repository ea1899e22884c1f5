"""Replies of the policy and of the reference to the same prompts, written to and read from `generations.jsonl`."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.base.errors import DataError, first_line
from pipeline.base.files import read_file, replace_file

__all__ = ["GENERATIONS", "Generation", "Reply", "read_generations", "write_generations"]

GENERATIONS = "generations.jsonl"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One model's reply to a prompt."""

    text: str
    num_tokens: int
    ref_logps: float
    """Log-prob of the whole reply under the reference, nats"""
    policy_logps: float
    """Log-prob of the whole reply under the policy, nats"""
    reward: float | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt with a reply of each model. The optional fields say how the replies were drawn."""

    set_name: str
    row: int
    prompt: str
    step: int | None
    """Optimizer step of the policy"""
    temperature: float | None
    max_tokens: int | None
    seed: int | None
    num_prompts: int | None
    """Number of prompts that were asked for; a small set gives fewer"""
    reward_by: str | None
    """Name of the judge; None without rewards"""
    reference: Reply
    policy: Reply


_KEYS = {"set_name": "set", "num_prompts": "prompts"}
"""Field -> its key in the file, where the two differ"""


def write_generations(run_folder: Path, generations: Iterable[Generation]) -> None:
    """Write a run's replies, one prompt a line. Raises StorageError."""
    rows = ({_KEYS.get(name, name): value for name, value in asdict(one).items()} for one in generations)
    replace_file(run_folder / GENERATIONS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_generations(file: Path) -> list[Generation]:
    """Read what `write_generations` wrote. Raises DataError for any other content, OSError if it can't be read."""
    generations: list[Generation] = []
    for number, line in enumerate(read_file(file, most=2**32).splitlines(), start=1):
        try:
            generations.append(_record(Generation, json.loads(line)))
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise DataError(
                f"{file}, line {number}: must be a prompt with two replies ({first_line(error)}). "
                "Run `refshard generate` again"
            ) from error
    return generations


def _record(kind: Any, row: Any) -> Any:
    """Make a `Generation` or a `Reply` of a JSON object, whose values must have the types of the fields."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        value = row.get(_KEYS.get(name, name))
        if hint is Reply:
            value = _record(Reply, value)
        elif isinstance(value, int) and hint in (float, float | None):
            value = float(value)
        finite = not isinstance(value, float) or math.isfinite(value)
        if name == "reward" and not finite:
            value = None
        elif not finite or not isinstance(value, hint):
            raise TypeError(f"{name} must be {getattr(hint, '__name__', hint)}, got {value!r}")
        values[name] = value
    return kind(**values)
