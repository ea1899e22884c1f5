"""Both stages on a mixture of a public size: made-up rows in three layouts, from four sources, with a tiny model.

    python tests/bench/mixed.py [--pairs 200000] [--json FILE] [--folder DIR]

The same is done with a quarter of the rows first: memory must not grow with them. Stage two joins all sets, takes two
of them by fractions, and trains 20 steps. Memory is the most that one process of a command has allocated (anonymous
pages), looked at twice a second. A command has at most three at once here, and they share many of their pages. Pages of
mapped files are not in it: the kernel takes them back when it needs them.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from rounds import machine  # noqa: E402
from start import WORDS  # noqa: E402

from support.models import make_model, make_tokenizer  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
Texts = tuple[str, str, str]


def explicit(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def openai(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    answers = {
        "preferred_output": [{"role": "assistant", "content": chosen}],
        "non_preferred_output": [{"role": "assistant", "content": rejected}],
    }
    return {"input": {"messages": turns}, **answers}


def sharegpt(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    answers = {"chosen": {"from": "gpt", "value": chosen}, "rejected": {"from": "gpt", "value": rejected}}
    return {"conversations": [{"from": "human", "value": prompt}], **answers}


SOURCES: dict[str, Callable[..., dict[str, Any]]] = {
    "texts": explicit,
    "texts.parquet": explicit,
    "openai": openai,
    "sharegpt": sharegpt,
}


def write_source(file: Path, shape: Callable[..., dict[str, Any]], first: int, count: int) -> None:
    """Write rows of one layout, as JSON Lines or, by the file's name, as Parquet."""
    chance = random.Random(first)

    def text(words: int) -> str:
        return " ".join(chance.choices(WORDS, k=words))

    rows = (shape(f"{n} {text(12)}?", f"{text(18)}.", f"{text(18)}.") for n in range(first, first + count))
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=10_000)
        return
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def command(*words: str) -> dict[str, float]:
    """Run a command; give its elapsed and processor time in seconds, and its largest process's memory in bytes."""
    began, most = time.monotonic(), 0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = psutil.Popen([sys.executable, "-m", "stages.cli", *words], env=environment, stdout=subprocess.DEVNULL)
    before = os.times()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        most = max(most, *map(_allocated, (process, *process.children(recursive=True))))
        time.sleep(0.5)
    assert process.wait() == 0, words
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.monotonic() - began, "cpu_seconds": cpu, "bytes": most}


def _allocated(process: psutil.Process) -> int:
    # A process may have ended since it was listed.
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
    return 0


def measure(folder: Path, pairs: int) -> dict[str, Any]:
    """Measure both stages on that many rows."""
    folder.mkdir()
    make_model(folder / "model", make_tokenizer(template=TEMPLATE))
    each, sets = pairs // len(SOURCES), {}
    for number, (name, shape) in enumerate(SOURCES.items()):
        file = folder / (name if name.endswith(".parquet") else f"{name}.jsonl")
        write_source(file, shape, number * each, each)
        sets[name.replace(".", "_")] = {"path": str(file)}
    sets["openai"]["fraction"], sets["sharegpt"]["fraction"] = 0.25, 2.0
    settings: dict[str, Any] = {
        "data": {"sets": sets, "max_length": 256},
        "policy": {"model": str(folder / "model")},
        "precompute": {"output": str(folder / "shards"), "tokens_per_batch": 8192},
        "train": {
            "output_dir": str(folder / "policy"),
            "per_device_train_batch_size": 8,
            "max_steps": 20,
            "save_strategy": "no",
            "use_cpu": True,
        },
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    found: dict[str, Any] = {"pairs": pairs}
    for stage in ("precompute", "train"):
        found[stage] = command(stage, "--config", str(file))
        seconds, cpu, held = found[stage].values()
        print(
            f"{pairs:,} rows: {stage} {seconds:.0f} s, {cpu:.0f} s of processor time, {held / 2**20:.0f} MiB",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--folder", type=Path, help="disk to measure on; the system's folder for temporary files")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        sizes = [measure(Path(folder) / str(pairs), pairs) for pairs in (given.pairs // 4, given.pairs)]
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "sizes": sizes}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
