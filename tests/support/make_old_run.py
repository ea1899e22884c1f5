"""Makes `tests/data/written_by_VERSION`: a finished store, and a run that was killed after a checkpoint in its middle.

    python tests/support/make_old_run.py FOLDER --root CHECKOUT

CHECKOUT is of the version that the data is to be from: later versions must go on with what it has written. All paths
in the folder are relative, so that a copy of it, as the working folder, is the same run.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from recording import made_with, make_model, write_pairs

SETTINGS = {
    "data": {"path": "pairs.jsonl", "max_length": 64, "eval": {"heldout": {"path": "heldout.jsonl"}}},
    "policy": {"model": "model"},
    "precompute": {"output": "shards", "rows_per_shard": 5, "tokens_per_batch": 512},
    "train": {
        "output_dir": "policy",
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 3,
        "use_cpu": True,
    },
}


def start(root: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start a command of the checkout, with the run's folder as its working folder."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "-m", "stages.cli", *words], cwd=folder, env=environment, text=True)


def run(root: Path, folder: Path, *words: str) -> None:
    """Run a command of the checkout to its end."""
    if status := start(root, folder, *words).wait():
        raise SystemExit(f"refshard {' '.join(words)}: exit {status}")


def train_up_to_the_middle(root: Path, folder: Path) -> None:
    """Train, and kill the process as soon as it has committed the checkpoint of step 3."""
    process = start(root, folder, "train", "--config", "run.yaml")
    while not (folder / "policy" / "checkpoint-3" / "refshard-commit.json").exists():
        if process.poll() is not None:
            raise SystemExit(f"refshard train ended with {process.returncode} before step 3 was saved")
        time.sleep(0.0005)
    process.kill()
    process.wait()
    if (folder / "policy" / "run.json").exists() or (folder / "policy" / "checkpoint-6").exists():
        raise SystemExit("refshard train was faster than the kill; start again")
    # What belonged to the killed start alone, and the name of the machine.
    shutil.rmtree(folder / "policy" / "joined", ignore_errors=True)
    claim = folder / "policy" / "attempts" / "0001.json"
    content = json.loads(claim.read_text(encoding="utf-8"))
    claim.write_text(json.dumps({**content, "host": "localhost"}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def finished(root: Path, folder: Path) -> dict[str, Any]:
    """Finish the run in a copy, and say what it came to."""
    with tempfile.TemporaryDirectory() as elsewhere:
        copy = Path(shutil.copytree(folder, Path(elsewhere, "copy")))
        run(root, copy, "train", "--config", "run.yaml")
        log = json.loads((copy / "policy" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        return {
            "made_with": made_with(),
            "sha256 of model.safetensors": hashlib.sha256((copy / "policy/model.safetensors").read_bytes()).hexdigest(),
            "losses": [entry["loss"] for entry in log if "loss" in entry],
            "eval_losses": [entry["eval_loss"] for entry in log if "eval_loss" in entry],
        }


def main() -> None:
    """Read the command line and make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="checkout whose code writes the data")
    arguments = parser.parse_args()
    folder, root = arguments.folder.resolve(), arguments.root.resolve()
    folder.mkdir(parents=True)
    make_model(
        folder / "model",
        "Llama",
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    write_pairs(folder / "pairs.jsonl", 12)
    write_pairs(folder / "heldout.jsonl", 4, start=100)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False), encoding="utf-8")
    run(root, folder, "precompute", "--config", "run.yaml")
    train_up_to_the_middle(root, folder)
    (folder / "expected.json").write_text(json.dumps(finished(root, folder), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
