"""What stage two needs before its first step, with sets to join and with sets that were joined before.

    python tests/bench/start.py [--pairs 32000] [--json FILE] [--folder DIR]

The pairs are made-up texts, the model is tiny, and the log-probs come from a file. Commands train by one step each: the
first joins, three resume it, of which the shortest time counts, and the last is another run with another beta. Times
are processor time of all processes of a command, which other work on the machine changes less; they hold one step and
the saving of a tiny model, too. The elapsed time from the command to the end of its first step is beside them.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from rounds import machine  # noqa: E402

from support.models import CORPUS, make_model, make_tokenizer  # noqa: E402

WORDS = sorted({word for text in CORPUS for word in re.findall(r"\w+", text)})


def write_pairs(file: Path, count: int) -> None:
    """Write pairs with the sums of their log-probs."""
    chance = random.Random(0)

    def text(words: int) -> str:
        return " ".join(chance.choices(WORDS, k=words))

    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = {"prompt": f"{number} {text(40)}?", "chosen": f" {text(60)}.", "rejected": f" {text(60)}."}
            out.write(json.dumps({**row, "up": -chance.uniform(100, 300), "down": -chance.uniform(100, 300)}) + "\n")


def command(*words: str) -> dict[str, float]:
    """Run a command of refshard; give its processor time and the elapsed time to its first step, in seconds."""
    began = time.time()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.Popen([sys.executable, "-m", "stages.cli", *words], env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(done.pid, 0)
    assert status == 0, words
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "began": began}


def first_step(run: Path, began: float) -> float:
    """Give the seconds from a command's begin to the first step that its attempt has logged."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return min(line["time"] for line in lines if line["kind"] == "log" and line["time"] > began) - began


def measure(folder: Path, pairs: int) -> dict[str, Any]:
    """Measure the three commands."""
    write_pairs(folder / "pairs.jsonl", pairs)
    make_model(folder / "model", make_tokenizer())
    settings: dict[str, Any] = {
        "data": {"path": str(folder / "pairs.jsonl"), "max_length": 512},
        "policy": {"model": str(folder / "model")},
        "reference": {"declared": "a file"},
        "precompute": {"output": str(folder / "shards"), "token_logps": False},
        "train": {
            "output_dir": str(folder / "policy"),
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 1,
            "use_cpu": True,
        },
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    command("import", str(folder / "pairs.jsonl"), "--config", str(file), "--chosen", "up", "--rejected", "down")
    result: dict[str, Any] = {"machine": machine(), "pairs": pairs, "starts": {}}
    for name, run, words in (
        ("joined", "policy", []),
        *(("resumed", "policy", ["-o", f"train.max_steps={steps}"]) for steps in (2, 3, 4)),
        ("another beta", "other", ["-o", "loss.beta=0.5", "-o", f"train.output_dir={folder / 'other'}"]),
    ):
        measured = command("train", "--config", str(file), *words)
        measured["seconds_to_first_step"] = first_step(folder / run, measured.pop("began"))
        before = result["starts"].get(name, measured)
        result["starts"][name] = {key: min(value, before[key]) for key, value in measured.items()}
        seconds = measured["seconds_to_first_step"]
        print(
            f"{name}: {measured['cpu_seconds']:.1f} s of processor time, first step after {seconds:.1f} s", flush=True
        )
    result["bytes_per_pair"] = sum(f.stat().st_size for f in (folder / "shards" / ".joined").rglob("*.*")) / pairs
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32_000)
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--folder", type=Path, help="disk to measure on; the system's folder for temporary files")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        result = measure(Path(folder), given.pairs)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
