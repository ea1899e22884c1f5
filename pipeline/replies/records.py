"""Replies of the policy and of the reference to the same prompts, written to and read from `generations.jsonl`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.base.files import read_file, replace_file
from pipeline.base.schemas import Schema

__all__ = ["GENERATIONS", "Generation", "Reply", "read_generations", "write_generations"]

GENERATIONS = "generations.jsonl"

_SCHEMA = Schema(__package__, "generation", "Run refshard generate again")


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
        row = _SCHEMA.parse(f"{file}, line {number}", line)
        sides = {side: _record(Reply, row[side]) for side in ("reference", "policy")}
        generations.append(_record(Generation, {**row, **sides}))
    return generations


def _record(kind: Any, row: Mapping[str, Any]) -> Any:
    """Make a `Generation` or a `Reply` of a JSON object that fits the schema."""
    return kind(**{field.name: row.get(_KEYS.get(field.name, field.name)) for field in fields(kind)})
