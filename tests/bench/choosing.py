"""The demo trained under several betas, lengths, losses and adapters: its true reward against the KL.

    python tests/bench/choosing.py --json tests/bench/results/choosing.json [--folder DIR]

All runs share one set of shards. The demo knows the true reward of a reply, so a policy that wins on its own margins
and loses on the reward is seen. The same command with the same folder trains only the runs that are missing.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parents[1])]

from rounds import machine  # noqa: E402

from pipeline.replies.means import estimate_kl, estimate_reward  # noqa: E402
from pipeline.run.reading import read_run  # noqa: E402

CONFIG, PREPARED, RUNS = ROOT / "stages" / "recipes" / "default.yaml", Path("runs/default"), Path("runs/choosing")
BETAS, SEEDS, SHORT, LONG = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2), (0, 1), 250, 1000
LONG_BETAS = (0.1, 0.5)
OTHERS: dict[str, tuple[tuple[float, ...], list[str]]] = {
    # Its beta is per token: 0.1 asks for a log-ratio margin of 5 nats a token.
    "IPO": ((0.1, 0.5, 2, 10), ["loss.type=ipo"]),
    "LoRA": ((0.1, 0.5), ["policy.lora.r=16"]),
    "LoRA-fast": ((0.1, 0.5), ["policy.lora.r=16", "train.learning_rate=3e-3"]),
}
"""Name -> betas, and what differs from the default run, which trains all weights by the loss `sigmoid`"""
METRICS = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen_shift")


@dataclass(frozen=True)
class Member:
    """One run: its series in the picture, and what differs from the demo's settings."""

    series: str
    beta: float
    steps: int = SHORT
    seed: int = 0
    overrides: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.series}-beta{self.beta}-{self.steps}-seed{self.seed}"


def members() -> Iterator[Member]:
    """Give the runs in the order in which they train."""
    for seed in SEEDS:
        yield from (Member("DPO", beta, seed=seed) for beta in BETAS)
    yield from (Member("DPO", beta, LONG) for beta in LONG_BETAS)
    for name, (betas, overrides) in OTHERS.items():
        yield from (Member(name, beta, overrides=overrides) for beta in betas)


def command(folder: Path, *words: str) -> None:
    """Run a command of refshard in a folder, on one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "stages.cli", *words], env=environment, cwd=folder, check=True)


def train(folder: Path, member: Member) -> dict[str, Any]:
    """Train a policy unless it is there, let it reply, and give its figures on the held-out pairs and prompts."""
    run = member.folder
    if not (folder / run / "demo.json").exists():
        given = [f"loss.beta={member.beta}", f"train.max_steps={member.steps}", f"train.seed={member.seed}"]
        given += [*member.overrides, f"train.output_dir={run}"]
        given += ["train.save_strategy=no", f"train.eval_steps={member.steps}"]
        options = ["--config", str(CONFIG), *(word for one in given for word in ("-o", one))]
        command(folder, "train", *options)
        command(folder, "demo", "summary", str(PREPARED), *options)
    done = read_run(folder / run)
    ((_, prefix),) = done.held_out().items()
    kl, reward = estimate_kl(done.generations), estimate_reward(done.generations, "policy")
    assert reward is not None
    figures = json.loads((folder / run / "demo.json").read_text(encoding="utf-8"))
    return {
        **figures,
        "kl_error": kl.error,
        "reward_error": reward.error,
        **{name: done.figure(prefix + name) for name in METRICS},
    }


def measure(folder: Path) -> dict[str, Any]:
    """Prepare the demo, score its pairs once, and train all runs."""
    command(folder, "demo", "prepare", str(PREPARED))
    command(folder, "precompute", "--config", str(CONFIG))
    done: list[dict[str, Any]] = []
    for member in members():
        figures = train(folder, member)
        done.append({**dataclasses.asdict(member), **figures})
        print(f"{member.folder.name}: reward {figures['reward_after']:.2f}, KL {figures['kl']:.2f}", flush=True)
    prepared = json.loads((folder / PREPARED / "prepared.json").read_text(encoding="utf-8"))
    return {"machine": machine(), "reference_rewards": prepared["reference_rewards"], "runs": done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; a temporary folder if left out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure((given.folder or Path(temporary)).resolve())
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
