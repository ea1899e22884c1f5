"""Replies of the policy and the reference to a prompt, as `generations.jsonl` holds them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

__all__ = [
    "Generation",
    "Reply",
    "generation_row",
]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one model has replied to a prompt."""

    text: str
    num_tokens: int
    ref_logps: float
    """Nats, of the whole reply under the reference"""
    policy_logps: float
    reward: float | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt with the reply of either model."""

    set_name: str
    row: int
    prompt: str
    step: int | None
    temperature: float | None
    max_tokens: int | None
    seed: int | None
    num_prompts: int | None
    """How many were asked for: the set may have fewer"""
    reward_by: str | None
    """Who gave the rewards; None where there are none."""
    reference: Reply
    policy: Reply


def generation_row(generation: Generation) -> Mapping[str, Any]:
    """Give a line of a run's generations.jsonl, as `runs.read_run` reads it."""
    names = {"set_name": "set", "num_prompts": "prompts"}
    return {names.get(name, name): value for name, value in asdict(generation).items()}
