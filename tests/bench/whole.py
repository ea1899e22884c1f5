"""Compare whole runs on a real model and real text, through the command lines of refshard and of TRL.

python tests/bench/whole.py --model DIR --data FILE.jsonl[.gz] [--pairs 64] [--rounds 2] [--json FILE]

DIR holds a model with its tokenizer. Both train on the same first pairs of FILE, in the same order, in float32, for one
epoch. refshard's time goes from the start of `precompute` to the finished store, and from the start of `train` to the
saved policy; TRL's from the start of its DPO script, which computes the reference's log-probs first, to the same.
tests/bench/page.py puts the file on docs/benchmarks.md if it is tests/bench/results/whole.json.
"""

import argparse
import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rounds import ROOT, machine, threads

SIDES = ("ours", "trl-completions", "trl")
_TRL = "from trl.scripts.dpo import main, make_parser; main(*make_parser().parse_args_and_config())"
_TRL_COMPLETIONS = f"import theirs; theirs.score_completions_only(); {_TRL}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare whole runs of refshard and TRL.")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="preference pairs, JSON Lines; may end in .gz")
    parser.add_argument("--pairs", type=int, default=64, help="the first so many (default 64)")
    parser.add_argument("--rounds", type=int, default=2, help="interleaved runs of every side (default 2)")
    parser.add_argument("--json", type=Path, help="file for the result")
    chosen = parser.parse_args()
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "data", "train.jsonl")
        data.parent.mkdir()
        data.write_text("".join(_first(chosen.data, chosen.pairs)), encoding="utf-8")
        for number, side in itertools.product(range(chosen.rounds), SIDES):
            run = run_refshard if side == "ours" else run_trl
            measured[side].append(run(side, chosen.model.resolve(), data, Path(scratch, f"{side}-{number}")))
            print(f"round {number + 1}, {side}: {measured[side][-1]}", flush=True)
    result = {
        "machine": machine(),
        "model": chosen.model.name,
        "data": chosen.data.name,
        "pairs": chosen.pairs,
        "measured": measured,
    }
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _first(file: Path, count: int) -> Sequence[str]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        return list(itertools.islice(lines, count))


MAX_LENGTH = 1024


def settings(folder: Path) -> dict[str, Any]:
    """Give the training arguments, alike for both."""
    return {
        "output_dir": str(folder / "policy"),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }


def run_refshard(side: str, model: Path, data: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    config = {
        # JSON is YAML.
        "data": {"path": str(data), "max_length": MAX_LENGTH},
        "policy": {"model": str(model), "dtype": "float32"},
        "precompute": {"output": str(folder / "shards")},
        "train": settings(folder),
    }
    (folder / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    stages = [
        _timed([sys.executable, "-m", "stages.cli", stage, "--config", str(folder / "run.yaml")], folder)
        for stage in ("precompute", "train")
    ]
    log = (folder / "policy" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "store": stages[0]["wall"],
        "wall": sum(stage["wall"] for stage in stages),
        "cpu": sum(stage["cpu"] for stage in stages),
        "peak": max(stage["peak"] for stage in stages),
        "losses": [line["loss"] for line in map(json.loads, log) if "loss" in line],
    }


def run_trl(side: str, model: Path, data: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    arguments = {
        **settings(folder),
        "save_strategy": "epoch",
        "save_only_model": True,
        "model_name_or_path": str(model),
        "dtype": "float32",
        "dataset_name": str(data.parent),
        "max_length": MAX_LENGTH,
        "precompute_ref_log_probs": True,
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    script = _TRL_COMPLETIONS if side == "trl-completions" else _TRL
    timed = _timed([sys.executable, "-c", script, *words], folder)
    state = next((folder / "policy").glob("checkpoint-*/trainer_state.json"))
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return {**timed, "losses": [line["loss"] for line in history if "loss" in line]}


def _timed(command: Sequence[str], folder: Path) -> Mapping[str, Any]:
    """Run a command; give its wall clock and processor time in seconds, and its peak of resident memory in bytes.

    Raises:
        RuntimeError: It failed; the message is the end of what it said.
    """
    # TRL's caches of data and of log-probs go into the run's own folder, so that every run makes them.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads()),
    }
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command[:4])}: failed\n{said.read()[-3000:]}")
    return {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024}


if __name__ == "__main__":
    main()
