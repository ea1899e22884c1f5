"""End stage two at random instants, run it again until it is finished, compare it with a run that nobody disturbed.

Half of the instants are anywhere in a run, half of them in the middle of saving a checkpoint. After each of them the
same command goes on; a finished run is compared, and the next one begins in a new folder.
"""

import hashlib
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.models import make_model, make_tokenizer
from support.runs import refshard, simple_rows, write_config, write_jsonl
from support.watched import Watched, start_ranks

MARKER = "refshard-commit.json"


@dataclass(frozen=True)
class Scenario:
    """A run to be disturbed, and what it comes to undisturbed."""

    folder: Path
    sync: bool
    weights: str
    """SHA-256 of the finished policy's weights"""
    seconds: float
    """How long a run takes, from its first command to its last"""
    processes: int = 1

    def commands(self, output: Path) -> list[list[str]]:
        """The commands that are run in turn until the run is finished."""
        common = ["--config", str(self.folder / "run.yaml"), "-o", f"train.output_dir={output}"]
        if not self.sync:
            return [["train", *common]]
        common += ["-o", f"precompute.output={output}-shards"]
        return [["precompute", *common], ["train", *common, "--one-window"]]

    def train(self, words: list[str]) -> None:
        """Run a command undisturbed, in as many processes as the run has."""
        if self.processes == 1:
            refshard(*words)
            return
        ranks = start_ranks(self.processes, *words)
        statuses = [rank.finish() for rank in ranks]
        assert not any(statuses), [rank.err for rank in ranks]


@dataclass
class Summary:
    """What came of it."""

    kills: int = 0
    in_saves: int = 0
    damaged: int = 0
    """Checkpoints that a restart set aside"""
    runs: int = 0
    equal: int = 0
    """Of the runs, those with the weights of the undisturbed one, bit for bit"""


def prepare(
    folder: Path, *, sync: bool = False, processes: int = 1, rows: int = 38, eval_rows: int = 6, **train: Any
) -> Scenario:
    """Make a tiny run in a folder and let it run once undisturbed."""
    make_model(folder / "model", make_tokenizer(bos=True))
    write_config(
        folder / "run.yaml",
        data={
            "path": str(write_jsonl(folder / "pairs.jsonl", simple_rows(rows))),
            "max_length": 128,
            "eval": {"test": {"path": str(write_jsonl(folder / "test.jsonl", simple_rows(eval_rows, start=100)))}},
        },
        policy={"model": str(folder / "model")},
        reference={"sync": {"steps": 4, "mixup_alpha": 0.6}} if sync else {},
        precompute={"output": str(folder / "shards"), "rows_per_shard": 8},
        loss={"beta": 0.1},
        train={
            "output_dir": str(folder / "undisturbed"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            # 38 pairs are ten micro-batches: epochs end between the saves, and in the middle of an accumulation.
            "gradient_accumulation_steps": 3,
            "max_steps": 7 if sync else 10,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 2,
            "disable_tqdm": True,
            "use_cpu": True,
            **train,
        },
    )
    scenario = Scenario(folder, sync, "", 0.0, processes)
    if not sync:
        refshard("precompute", "--config", folder / "run.yaml")
    start = time.monotonic()
    output = folder / "undisturbed"
    while not (output / "run.json").exists():
        for words in scenario.commands(output):
            scenario.train(words)
    return Scenario(folder, sync, digest(output), time.monotonic() - start, processes)


def digest(output: Path) -> str:
    """SHA-256 of a policy's weights."""
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def disturb(scenario: Scenario, *, kills: int, seed: int, signals: bool = False) -> Summary:
    """End runs until they were ended `kills` times, and compare each that is finished.

    Raises:
        AssertionError: A command ended otherwise than it should, or came to other weights.
    """
    chance, summary = random.Random(seed), Summary()
    while summary.kills < kills:
        summary.runs += 1
        output = scenario.folder / f"run-{seed}-{summary.runs}"
        while not (output / "run.json").exists():
            _go_on(scenario, output, chance, summary, signals, disturb=summary.kills < kills)
        found = digest(output)
        assert found == scenario.weights, f"{output}: other weights than the undisturbed run, seed {seed}; {summary}"
        summary.equal += 1
        summary.damaged += len(list(output.glob("broken-checkpoint-*")))
        shutil.rmtree(output)
        shutil.rmtree(f"{output}-shards", ignore_errors=True)
    return summary


def _go_on(
    scenario: Scenario, output: Path, chance: random.Random, summary: Summary, signals: bool, *, disturb: bool
) -> None:
    """Run the commands in turn until the run is finished or is ended."""
    number = chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]) if signals else signal.SIGKILL
    in_save = chance.random() < 0.5
    saves_to_pass, pause = chance.randrange(3), chance.uniform(0, 0.02)
    instant = time.monotonic() + chance.uniform(0, scenario.seconds)
    seen = _unmarked(output)
    while not (output / "run.json").exists():
        for words in scenario.commands(output):
            command = Watched(*words)
            while disturb and command.status is None:
                if in_save:
                    fresh = _unmarked(output) - seen
                    seen |= fresh
                    saves_to_pass -= len(fresh)
                    due = saves_to_pass < 0 and bool(fresh)
                    time.sleep(pause if due else 0.0005)
                    if due and not fresh & _unmarked(output):
                        # The save was over before the pause: the next one, sooner.
                        due, pause = False, pause / 2
                else:
                    due = time.monotonic() >= instant
                    time.sleep(0.0005)
                if due and (not signals or command.watches(number)):
                    summary.in_saves += in_save and bool(_unmarked(output) & seen)
                    command.signal(number)
                    summary.kills += 1
                    status = command.finish()
                    allowed = (75, 0) if signals else (-number, 0)
                    assert status in allowed, f"{words}: exit {status}\n{command.out}\n{command.err}"
                    return
            status = command.finish()
            assert status == 0, f"{words}: exit {status}\n{command.out}\n{command.err}"


def _unmarked(output: Path) -> set[Path]:
    """Checkpoints that are being saved, or were when their process died."""
    try:
        return {folder for folder in output.glob("checkpoint-*") if not (folder / MARKER).exists()}
    except OSError:
        return set()
