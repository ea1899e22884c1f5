"""A plan for a run far larger than any machine here: 10 million pairs, a 70B reference, 64 preemptible GPUs.

    python tests/support/scale_plan.py --measure    measures the constants here (two minutes), and writes the page
    python tests/support/scale_plan.py --count      counts the requests alone, which do not depend on the machine
    python tests/support/scale_plan.py --write      writes docs/scale.md from the constants measured last

Everything on the page is either measured here, assumed (and named so), or arithmetic on both.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "tests" / "bench"
CONSTANTS = BENCH / "results" / "scale.json"
TEMPLATE = BENCH / "scale.md.jinja"
JOIN = BENCH / "results" / "join.json"
START = BENCH / "results" / "start.json"
MIXED = BENCH / "results" / "mixed.json"
PAGE = ROOT / "docs" / "scale.md"


@dataclass(frozen=True)
class Measured:
    """Constants that were measured, with the machine that they were measured on."""

    machine: str
    bytes_per_pair: float
    """Of a part, besides its token logps"""
    bytes_per_token: float
    """Of a part, for each completion token"""
    requests_per_start: float
    """Of a worker to the object store, with the stored pairs that it scores again before its first unit"""
    requests_per_unit: float
    """Of the worker that scores it"""
    requests_per_part_indexed: float
    """Of the worker that writes the index"""
    index_bytes_per_part: float
    start_seconds: float
    """From the command to the end, where nothing is left to do: imports and looking around"""
    sha256_bytes_per_second: float
    scan_bytes_per_second: float
    """Going through JSON Lines without decoding them, as each worker does to count and to skip"""
    check_bytes_per_second: float
    """Reading parts back and checking them, on the way to the index"""


@dataclass(frozen=True)
class Plan:
    """What is to be done, and what is assumed; every field but the first six is an assumption."""

    pairs: int = 10_000_000
    parameters: float = 70e9
    layers_width: tuple[int, int] = (80, 8192)
    vocabulary: int = 128_256
    gpus: int = 64
    rows_per_shard: int = 1024
    prompt_tokens: int = 200
    completion_tokens: int = 300
    bytes_per_row: int = 3_000
    peak_flops: float = 989e12
    """Dense bf16 of one H100 SXM, NVIDIA's data sheet"""
    utilisation: float = 0.4
    gpus_per_worker: int = 4
    read_bytes_per_second: float = 2e9
    """From shared storage, each worker"""
    hours_between_preemptions: float = 6.0
    """Of one worker, on average"""
    minutes_to_be_back: float = 5.0
    """In the queue, until the worker has GPUs again"""

    @property
    def workers(self) -> int:
        return self.gpus // self.gpus_per_worker

    @property
    def units(self) -> int:
        return -(-self.pairs // self.rows_per_shard)

    @property
    def flops_per_pair(self) -> float:
        """A forward pass: 2 for each weight and token, the head on completions alone, and attention.

        The prompt once for both completions. Attention: scores and values, 2 operations each, over what a token sees.
        """
        layers, width = self.layers_width
        head = self.vocabulary * width
        prompt, completion = self.prompt_tokens, self.completion_tokens
        body = 2 * (self.parameters - 2 * head) * (prompt + 2 * completion)
        seen = prompt**2 / 2 + 2 * (prompt * completion + completion**2 / 2)
        return body + 2 * head * 2 * completion + 4 * layers * width * seen

    @property
    def pairs_per_second(self) -> float:
        """Of one worker, while it scores."""
        return self.gpus_per_worker * self.peak_flops * self.utilisation / self.flops_per_pair

    @property
    def unit_seconds(self) -> float:
        return self.rows_per_shard / self.pairs_per_second

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters

    def restart_seconds(self, measured: Measured, *, digests_cached: bool) -> float:
        """From getting its GPUs back to scoring: imports, the weights' digests, the weights, the data passed over."""
        hashing = 0.0 if digests_cached else self.weight_bytes / measured.sha256_bytes_per_second
        loading = self.weight_bytes / self.read_bytes_per_second
        scanning = self.passes * self.data_bytes / measured.scan_bytes_per_second
        return measured.start_seconds + hashing + loading + scanning

    @property
    def passes(self) -> float:
        """Over the data at each start: to count the rows, and half of it to come to the first missing unit."""
        return 1.5

    @property
    def data_bytes(self) -> float:
        return float(self.pairs * self.bytes_per_row)

    def store_bytes(self, measured: Measured) -> float:
        tokens = 2 * self.completion_tokens
        return self.pairs * (measured.bytes_per_pair + tokens * measured.bytes_per_token)

    def lost_share(self, measured: Measured, *, digests_cached: bool = True) -> float:
        """Share of a worker's hours that preemption costs: half a unit, the restart, and the time in the queue."""
        lost = self.unit_seconds / 2 + self.restart_seconds(measured, digests_cached=digests_cached)
        return (lost + 60 * self.minutes_to_be_back) / (3600 * self.hours_between_preemptions)

    def hours(self, measured: Measured) -> float:
        """Of the whole of stage one."""
        undisturbed = self.pairs / self.pairs_per_second / self.workers
        return undisturbed / (1 - self.lost_share(measured)) / 3600

    def restarts(self, measured: Measured) -> float:
        return self.workers * self.hours(measured) / self.hours_between_preemptions

    def requests(self, measured: Measured) -> float:
        starts = self.workers + self.restarts(measured)
        # A page of a listing has 1,000 names.
        pages = starts * self.units / 1000
        per_unit = measured.requests_per_unit + measured.requests_per_part_indexed
        return starts * measured.requests_per_start + pages + self.units * per_unit


def page(plan: Plan, measured: Measured, join: dict[str, float]) -> str:
    """The page: the template's text with the numbers of the plan."""
    store_bytes = plan.store_bytes(measured)
    sizes = (Plan(rows_per_shard=size) for size in (128, 512, 1024, 4096, 16384))
    rates = (Plan(hours_between_preemptions=hours) for hours in (24, 6, 2, 1))
    values = {
        "plan": plan,
        "measured": measured,
        "join": join,
        "start": json.loads(START.read_text(encoding="utf-8")),
        "mixed": json.loads(MIXED.read_text(encoding="utf-8")),
        "store_bytes": store_bytes,
        "part_bytes": store_bytes / plan.units,
        "warm": plan.restart_seconds(measured, digests_cached=True),
        "cold": plan.restart_seconds(measured, digests_cached=False),
        "scan_seconds": plan.passes * plan.data_bytes / measured.scan_bytes_per_second,
        "load_seconds": plan.weight_bytes / plan.read_bytes_per_second,
        "index_minutes": store_bytes / measured.check_bytes_per_second / 60,
        "sizes": list(sizes),
        "rates": list(rates),
    }
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["number"] = lambda value, digits=0: f"{value:,.{digits}f}"
    environment.filters["percent"] = lambda value, digits=1: f"{value:.{digits}%}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)


def measure() -> Measured:
    """Measure the constants on this machine."""
    import numpy as np

    from pipeline.base.folders import open_folder
    from pipeline.config.data import DataConfig
    from pipeline.data.intake import Ledger
    from pipeline.data.sources import count_rows, open_source
    from pipeline.store.finishing import finish_store
    from pipeline.store.format import ScoredPair, check_part, part_name
    from pipeline.store.store import create_store, read_manifest, write_part
    from support.models import make_model, make_tokenizer
    from support.runs import simple_rows, write_config, write_jsonl
    from support.stores import IDENTITY

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random = np.random.default_rng(0)

        def part_bytes(unit: int, rows: int, tokens: int) -> int:
            pairs = [
                ScoredPair(
                    key=random.bytes(16),
                    row=unit * rows + i,
                    prompt_tokens=int(random.integers(20, 400)),
                    chosen_token_logps=-random.exponential(1.5, tokens).astype(np.float32),
                    rejected_token_logps=-random.exponential(1.5, tokens).astype(np.float32),
                )
                for i in range(rows)
            ]
            ledger = Ledger()
            ledger.rows = ledger.kept = rows
            write_part(store, unit, pairs, ledger, header=header)
            return (store / part_name(unit)).stat().st_size

        store = folder / "store"
        plan = {"rows_per_shard": 1024, "on_identical": "keep", "rows": "0:"}
        header = create_store(store, IDENTITY, plan, {})
        short, long = part_bytes(0, 1024, 100), part_bytes(1, 1024, 500)
        per_token = (long - short) / (1024 * 2 * 400)
        per_pair = short / 1024 - 200 * per_token
        manifest = read_manifest(store)
        start = time.perf_counter()
        for _ in range(10):
            check_part(open_folder(store), 1, (store / part_name(1)).read_bytes(), manifest)
            hashlib.sha256((store / part_name(1)).read_bytes()).hexdigest()
        checked = 10 * long / (time.perf_counter() - start)
        finish_store(store, 2)
        index_bytes = (store / "index.json").stat().st_size / 2

        model = make_model(folder / "model", make_tokenizer(bos=True))
        idle = write_config(
            folder / "idle.yaml",
            data={"path": str(write_jsonl(folder / "idle.jsonl", simple_rows(8)))},
            policy={"model": str(model)},
            precompute={"output": str(folder / "idle"), "tokens_per_batch": 512},
        )
        refshard("precompute", "--config", idle)
        started = min(refshard("precompute", "--config", idle) for _ in range(3))

        row = json.dumps({"prompt": "p" * 500, "chosen": "c" * 1200, "rejected": "r" * 1200}) + "\n"
        data = folder / "long.jsonl"
        data.write_text(row * 100_000)
        start = time.perf_counter()
        count_rows(open_source(DataConfig(path=str(data))))
        scanned = data.stat().st_size / (time.perf_counter() - start)
        start = time.perf_counter()
        with data.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        hashed = data.stat().st_size / (time.perf_counter() - start)
    return Measured(
        machine=f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}",
        bytes_per_pair=per_pair,
        bytes_per_token=per_token,
        **count_requests(),
        index_bytes_per_part=index_bytes,
        start_seconds=started,
        sha256_bytes_per_second=hashed,
        scan_bytes_per_second=scanned,
        check_bytes_per_second=checked,
    )


def refshard(*words: object) -> float:
    """Run a command; give its seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "stages.cli", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - start


def count_requests() -> dict[str, float]:
    """Count the requests of workers to an object store, whatever the machine; give the constants by name."""
    from support.models import make_model, make_tokenizer
    from support.object_store import CREDENTIALS, environment, faulty, s3_server
    from support.runs import simple_rows, write_config, write_jsonl

    counted: Counter[str] = Counter()

    def count(method: str, path: str) -> None:
        counted[method] += 1

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", make_tokenizer(bos=True))

        def requests(units: int) -> list[int]:
            """Of a worker that scores half of the units, and of one that joins, scores the rest and ends."""
            config = write_config(
                folder / f"{units}.yaml",
                data={"path": str(write_jsonl(folder / f"{units}.jsonl", simple_rows(units)))},
                policy={"model": str(model)},
                precompute={"output": f"s3://shards/{units}", "rows_per_shard": 1, "tokens_per_batch": 512},
            )
            found = []
            for worker in ("0/2", "1/2"):
                counted.clear()
                refshard("precompute", "--config", config, "--worker", worker)
                found.append(counted.total())
            return found

        with s3_server() as server, faulty(server, count) as proxy, environment(AWS_ENDPOINT_URL=proxy, **CREDENTIALS):
            few, many = requests(8), requests(40)
    scored = (many[0] - few[0]) / 16
    indexed = (many[1] - few[1] - 16 * scored) / 32
    return {
        "requests_per_start": few[1] - 4 * scored - 8 * indexed,
        "requests_per_unit": scored,
        "requests_per_part_indexed": indexed,
    }


def join_constants() -> dict[str, float]:
    """Of the join of as many pairs, as the benchmark measured it."""
    series = json.loads(JOIN.read_text(encoding="utf-8"))["series"]
    (entry,) = (entry for entry in series if entry["pairs"] == Plan.pairs)
    return {
        "build_us": entry["build_us_per_pair"],
        "lookup_us": entry["lookup_us_per_pair"],
        "bytes": entry["index_bytes"] / entry["pairs"],
    }


def written_page() -> str:
    """The page as it should be."""
    return page(Plan(), Measured(**json.loads(CONSTANTS.read_text(encoding="utf-8"))), join_constants())


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan a large run on paper, from measured constants.")
    parser.add_argument("--measure", action="store_true", help="measure the constants again")
    parser.add_argument("--count", action="store_true", help="count the requests again")
    parser.add_argument("--write", action="store_true", help="write docs/scale.md")
    chosen = parser.parse_args()
    if chosen.measure:
        CONSTANTS.write_text(json.dumps(asdict(measure()), indent=1) + "\n", encoding="utf-8")
    elif chosen.count:
        constants = json.loads(CONSTANTS.read_text(encoding="utf-8")) | count_requests()
        CONSTANTS.write_text(json.dumps(constants, indent=1) + "\n", encoding="utf-8")
    if chosen.measure or chosen.count or chosen.write:
        PAGE.write_text(written_page(), encoding="utf-8")
    else:
        print(written_page())


if __name__ == "__main__":
    main()
