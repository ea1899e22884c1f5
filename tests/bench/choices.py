"""Results of the demo under several settings -> the table of docs/choosing.md."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import table

sys.path.insert(0, str(Path(__file__).parents[2]))

from stages.demo.reviews import optimum

NAMES = {"DPO": "DPO", "IPO": "IPO", "LoRA": "DPO, LoRA", "LoRA-fast": "DPO, LoRA, rate 3e-3"}


def frontier(found: dict[str, Any]) -> list[tuple[float, float]]:
    """Give KL and true reward of the best policies, from large beta to small."""
    rewards = [int(reward) for reward, count in found["reference_rewards"].items() for _ in range(count)]
    most = max(run["kl"] for run in found["runs"])
    # Beyond the last one all replies have the largest reward.
    return [*(tuple(optimum(rewards, 10 ** (i / 10))) for i in range(6, -9, -1)), (most, float(max(rewards)))]


def choices(found: dict[str, Any]) -> list[str]:
    """Make the table of all runs and the sentence that says what they ran on."""
    machine = found["machine"]
    rows = [_row(run) for run in found["runs"]]
    heads = ["run", "beta", "accuracy", "true ranking", "margin / beta", "chosen shift", "KL", "true reward"]
    return [
        *table([*heads, "best at this KL", "grammatical"], rows),
        f"{machine['processor']}, one thread; torch {machine['torch']}, transformers {machine['transformers']}.",
        "",
    ]


def _row(run: dict[str, Any]) -> Sequence[str]:
    return [
        f"{NAMES[run['series']]}, {run['steps']:,} steps, seed {run['seed']}",
        f"{run['beta']:g}",
        f"{run['accuracy']:.3f}",
        f"{run['true_ranking']:.3f}",
        f"{run['margin'] / run['beta']:.1f}",
        f"{run['logps/chosen_shift']:.1f}",
        f"{run['kl']:.1f} ± {run['kl_error']:.1f}",
        f"{run['reward_after']:.2f} ± {run['reward_error']:.2f}",
        f"{run['reward_optimum']:.2f}",
        f"{run['grammatical_after']:.0%}",
    ]
