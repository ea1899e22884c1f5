"""Replies of the policy and of the reference to the same prompts, written to and read from `generations.jsonl`."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.base.errors import DataError, first_line
from pipeline.base.files import replace_file

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
    generations = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            generations.append(_generation(json.loads(line)))
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise DataError(
                f"{file}, line {number}: must be a prompt with two replies ({first_line(error)}). "
                "Run `refshard generate` again"
            ) from error
    return generations


_OPTIONAL = {"step": int, "temperature": float, "max_tokens": int, "seed": int, "num_prompts": int, "reward_by": str}


def _generation(row: Any) -> Generation:
    given = {name: row[_KEYS.get(name, name)] for name in _OPTIONAL if row.get(_KEYS.get(name, name)) is not None}
    return Generation(
        set_name=str(row["set"]),
        row=int(row["row"]),
        prompt=_text(row["prompt"]),
        reference=_reply(row["reference"]),
        policy=_reply(row["policy"]),
        **{name: kind(given[name]) if name in given else None for name, kind in _OPTIONAL.items()},
    )


def _reply(row: Mapping[str, Any]) -> Reply:
    reward = row["reward"]
    return Reply(
        text=_text(row["text"]),
        num_tokens=int(row["num_tokens"]),
        ref_logps=_finite(row["ref_logps"]),
        policy_logps=_finite(row["policy_logps"]),
        reward=reward if reward is not None and math.isfinite(reward) else None,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"must be text, got {value!r}")
    return value


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"must be a finite number, got {value!r}")
    return number
