"""Kill stage one at random instants until it has been killed often enough; what it leaves must be what it should be.

Workers, one to three of them, are started on one output, as real processes; after a random time, or when one of them
is in the middle of a write, some are killed with SIGKILL. The next ones are another number. When the output is
finished, every file of it must equal, byte for byte, that of a run that nobody disturbed; then the next output is
begun.
"""

import contextlib
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.folders import LEFTOVERS, Folder, open_folder
from pipeline.store.verify import verify_store
from support.models import make_model, make_tokenizer
from support.object_store import BUCKET, CREDENTIALS, environment, s3_server
from support.processes import Command
from support.runs import simple_rows, write_config, write_jsonl

_ROWS, _UNIT = 60, 5


@dataclass
class Summary:
    """What was done, and what came of it."""

    kills: int = 0
    outputs: int = 0
    in_a_write: int = 0
    """Kills while a worker had a temporary file"""
    lost: int = 0
    """Pairs of the undisturbed run that are not there"""
    wrong: int = 0
    """Files that are missing, too many, or not those of the undisturbed run"""


def contents(folder: Folder) -> dict[str, bytes]:
    """All files of a store but the leftovers."""
    return {name: folder.read(name) for name in folder.names() if not LEFTOVERS.match(name)}


def kill_until(kills: int, work: Path, outputs: str, seed: int) -> Summary:
    """Kill workers until `kills` of them are dead and the last output is finished.

    Args:
        kills: How many.
        work: A folder for data, model and settings.
        outputs: Folder or URL under which the outputs are made.
        seed: Of the instants and of the numbers of workers.
    """
    random_ = random.Random(seed)
    config = _settings(work)
    undisturbed = f"{outputs}/undisturbed"
    start = time.monotonic()
    assert _start(config, undisturbed, 0, 1).wait() == 0
    duration = time.monotonic() - start
    expected = contents(open_folder(f"{undisturbed}/train"))
    summary = Summary()
    while summary.kills < kills:
        output = f"{outputs}/{summary.outputs}"
        _one_output(config, output, kills, duration, random_, summary)
        store = open_folder(f"{output}/train")
        found = contents(store)
        summary.wrong += sum(found.get(name) != expected.get(name) for name in {*found, *expected})
        checked = verify_store(store)
        summary.wrong += len(checked.problems)
        summary.lost += _ROWS - checked.pairs
        summary.outputs += 1
    return summary


def _one_output(
    config: Path, output: str, kills: int, duration: float, random_: random.Random, summary: Summary
) -> None:
    """Start and kill workers until the output is finished."""
    store = open_folder(f"{output}/train")
    while store.size("index.json") is None:
        count = random_.randint(1, 3)
        workers = [_start(config, output, index, count) for index in range(count)]
        if summary.kills < kills:
            _wait(workers, store, duration, random_, summary)
            for worker in random_.sample(workers, random_.randint(1, count)):
                if worker.status is None:
                    worker.kill()
                    summary.kills += worker.wait() == -signal.SIGKILL
        for worker in workers:
            status = worker.wait()
            if status not in (0, -signal.SIGKILL):
                raise AssertionError(f"exit {status}: {worker.said()}")


def _wait(workers: list[Command], store: Folder, duration: float, random_: random.Random, summary: Summary) -> None:
    """Let workers run for a random time; every second time, go on until one is seen in the middle of a write."""
    in_a_write = random_.random() < 0.5
    end = time.monotonic() + (duration if in_a_write else random_.uniform(0, 1.2 * duration))
    before = {name for name in store.names() if LEFTOVERS.match(name)}
    while time.monotonic() < end and any(worker.status is None for worker in workers):
        if in_a_write and any(LEFTOVERS.match(name) and name not in before for name in store.names()):
            summary.in_a_write += 1
            return
        time.sleep(0.0005 if in_a_write else 0.01)


def _settings(work: Path) -> Path:
    tokenizer = make_tokenizer(bos=True)
    return write_config(
        work / "run.yaml",
        data={"path": str(write_jsonl(work / "pairs.jsonl", simple_rows(_ROWS))), "max_length": 128},
        policy={"model": str(make_model(work / "model", tokenizer))},
        precompute={"output": str(work / "shards"), "rows_per_shard": _UNIT, "tokens_per_batch": 512},
    )


def _start(config: Path, output: str, index: int, count: int) -> Command:
    words = ["--config", config, "-o", f"precompute.output={output}", "--worker", f"{index}/{count}"]
    return Command("precompute", *words)


@contextlib.contextmanager
def place(s3: bool, work: Path) -> Iterator[str]:
    """Where outputs are made: a folder, or a server that runs as long as this."""
    if not s3:
        yield str(work / "outputs")
        return
    with s3_server() as server, environment(AWS_ENDPOINT_URL=server, **CREDENTIALS):
        yield f"s3://{BUCKET}/outputs"
