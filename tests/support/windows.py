"""Small runs of TR-DPO: their settings, and the losses that they leave."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.models import make_model, make_tokenizer
from support.runs import simple_rows, write_config, write_jsonl

STEPS, EVERY, ALPHA, BETA, SEED = 14, 4, 0.6, 0.1, 7
LORA = {"r": 4, "alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def write_inputs(folder: Path) -> Path:
    """A tiny model, training and held-out pairs."""
    make_model(folder / "model", make_tokenizer(bos=True))
    write_jsonl(folder / "pairs.jsonl", simple_rows(38))
    write_jsonl(folder / "test.jsonl", simple_rows(6, start=100))
    return folder


def shared_arguments(**changes: Any) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 4,
        # 38 pairs are ten micro-batches: an epoch ends in the middle of an accumulation.
        "gradient_accumulation_steps": 3,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 5e-3,
        "optim": "sgd",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "seed": SEED,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        **changes,
    }


def write_run(folder: Path, output: Path, sync: Mapping[str, Any] | None, *, lora: bool = False, **train: Any) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    return write_config(
        output / "run.yaml",
        data={
            "path": str(folder / "pairs.jsonl"),
            "max_length": 128,
            "eval": {"test": {"path": str(folder / "test.jsonl")}},
        },
        policy={"model": str(folder / "model"), **({"lora": LORA} if lora else {})},
        reference={"sync": dict(sync)} if sync else {},
        precompute={"output": str(output / "shards"), "rows_per_shard": 8},
        loss={"beta": BETA},
        train={"output_dir": str(output / "policy"), **shared_arguments(**train)},
    )


def history(output: Path) -> list[dict[str, float]]:
    state: dict[str, Any] = json.loads((output / "policy" / "trainer_state.json").read_text())
    return [{k: v for k, v in entry.items() if not _is_timing(k)} for entry in state["log_history"]]


def _is_timing(key: str) -> bool:
    return "runtime" in key or "per_second" in key or "preparation" in key


def losses(entries: Sequence[Mapping[str, float]], key: str = "loss") -> dict[int, float]:
    return {int(entry["step"]): entry[key] for entry in entries if key in entry}
