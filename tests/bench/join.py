"""What stage two's join costs, for growing numbers of pairs: time, memory, disk; and what 100 million would.

    python tests/bench/join.py [--pairs 1e5,1e6,1e8] [--json FILE] [--folder DIR]

Simulated are stores of N pairs: keys of random bytes, which is what digests are, in pieces of 16,384 rows, with two
token logps a completion in the flat file (real ones have hundreds; that file is written once, in order, at the disk's
speed). They go to `build_reference_table`, the function that `load_reference_table` hands its parts to. Then keys are
looked up in chunks of 1,024, as the join does, in an order that has nothing to do with the index's. Real stores
and joined sets of a few thousand pairs show what a pair costs in Parquet and Arrow, and in a batch. Each N runs in a
process of its own, whose peak memory is the kernel's high-water mark above that of the imports, mapped pages included.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.data.intake import KeptPair, Ledger  # noqa: E402
from pipeline.data.tokens import TokenizedPair  # noqa: E402
from pipeline.store.format import ScoredPair  # noqa: E402
from pipeline.store.join import join  # noqa: E402
from pipeline.store.reference_table import (  # noqa: E402
    INDEX_ROW,
    TokenLogps,
    build_reference_table,
    load_reference_table,
)
from pipeline.store.store import PartHeader, create_store, finish_store, open_store, write_part  # noqa: E402

PIECE, CHUNK, TOKENS_A_PAIR = 16_384, 1024, 4
MOST_LOOKED_UP = 4_000_000
TARGET = 100_000_000

# A real store's pairs: 256 tokens each of prompt, chosen and rejected.
REAL_PAIRS, REAL_TOKENS, REAL_PART = 8192, 256, 1024
MIB = 2**20


def memory(field: str) -> int:
    """Bytes, as the kernel counts them."""
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def keys_of(piece: int, rows: int) -> npt.NDArray[np.bytes_]:
    return np.frombuffer(np.random.default_rng(piece).bytes(16 * rows), "S16")


def simulated(pairs: int, token_file: Path) -> Iterator[npt.NDArray[np.void]]:
    """Yield pieces of an index; their token logps are appended to a file on the way, as the join does it."""
    random = np.random.default_rng(0)
    for number, start in enumerate(range(0, pairs, PIECE)):
        rows = np.zeros(min(PIECE, pairs - start), INDEX_ROW)
        rows["key"], rows["part"] = keys_of(number, len(rows)), number
        rows["token_start"] = TOKENS_A_PAIR * (start + np.arange(len(rows)))
        rows["chosen_logps"], rows["rejected_logps"] = random.standard_normal((2, len(rows)), np.float32)
        rows["chosen_tokens"] = rows["rejected_tokens"] = TOKENS_A_PAIR // 2
        with token_file.open("ab") as sink:
            sink.write(random.standard_normal(TOKENS_A_PAIR * len(rows), np.float32).tobytes())
        yield rows


def measure_index(pairs: int, folder: Path) -> dict[str, Any]:
    """Build an index, then look keys up in it; this process has done nothing else."""
    token_file = folder / "token-logps.f32"
    Path("/proc/self/clear_refs").write_text("5")
    held = memory("VmRSS")
    began, cpu = time.perf_counter(), time.process_time()
    table = build_reference_table(simulated(pairs, token_file), folder=folder, with_tokens=True)
    build, build_cpu = time.perf_counter() - began, time.process_time() - cpu
    assert len(table) == pairs
    build_peak = memory("VmHWM") - held

    # All pieces or an even choice of them.
    pieces = -(-pairs // PIECE)
    chosen = np.unique(np.linspace(0, pieces - 1, min(pieces, max(MOST_LOOKED_UP // PIECE, 1))).astype(int)).tolist()
    Path("/proc/self/clear_refs").write_text("5")
    looked_up, lookup, lookup_cpu = 0, 0.0, 0.0
    for piece in np.random.default_rng(1).permutation(chosen).tolist():
        keys = keys_of(piece, min(PIECE, pairs - piece * PIECE)).tolist()
        began, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(keys), CHUNK):
            at, found = table.look_up(keys[start : start + CHUNK])
            assert at.min() >= 0 and found["part"][0] == piece
        lookup += time.perf_counter() - began
        lookup_cpu += time.process_time() - cpu
        looked_up += len(keys)
    lookup_peak = memory("VmHWM") - held
    return {
        "pairs": pairs,
        "build_seconds": build,
        "build_us_per_pair": 1e6 * build / pairs,
        "build_cpu_us_per_pair": 1e6 * build_cpu / pairs,
        "looked_up": looked_up,
        "lookup_all_seconds": lookup / looked_up * pairs,
        "lookup_us_per_pair": 1e6 * lookup / looked_up,
        "lookup_cpu_us_per_pair": 1e6 * lookup_cpu / looked_up,
        "build_peak_bytes": build_peak,
        "lookup_peak_bytes": lookup_peak,
        "index_bytes": table.rows.nbytes,
        "token_logp_bytes": token_file.stat().st_size,
    }


def measure_in_a_process(pairs: int, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        done = subprocess.run(
            [sys.executable, __file__, "--alone", str(pairs), "--folder", work],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return dict(json.loads(done.stdout))


def measure_files(folder: Path) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """What a real pair costs: out of Parquet, into Arrow, and in a batch."""
    random = np.random.default_rng(2)
    lists = random.standard_normal((2, REAL_PAIRS, REAL_TOKENS), np.float32)
    keys = keys_of(0, REAL_PAIRS)
    ids = random.integers(0, 100_000, (3, REAL_PAIRS, REAL_TOKENS)).tolist()
    identity: dict[str, Any] = {"reference": {"declared": "random"}, "tokenization": {"token_logps": True}}
    fingerprint = create_store(folder / "store", identity, {}, {})
    for unit, start in enumerate(range(0, REAL_PAIRS, REAL_PART)):
        part = [
            ScoredPair(
                key=keys[i].ljust(16, b"\0"),
                row=i,
                prompt_tokens=REAL_TOKENS,
                chosen_token_logps=lists[0, i],
                rejected_token_logps=lists[1, i],
            )
            for i in range(start, start + REAL_PART)
        ]
        ledger = Ledger(rows=REAL_PART, kept=REAL_PART)
        write_part(folder / "store", unit, part, ledger, header=PartHeader(fingerprint=fingerprint, token_logps=True))
    finish_store(folder / "store", REAL_PAIRS // REAL_PART)
    pairs = [
        KeptPair(
            row=i,
            place=f"row {i}",
            key=keys[i].ljust(16, b"\0"),
            pair=TokenizedPair(prompt_ids=ids[0][i], chosen_ids=ids[1][i], rejected_ids=ids[2][i]),
        )
        for i in range(REAL_PAIRS)
    ]
    began = time.perf_counter()
    store, token_file = open_store(folder / "store"), folder / "token-logps.f32"
    table = load_reference_table([store], None, folder=folder, token_file=token_file)
    loaded = time.perf_counter()
    assert join(pairs, table, folder / "joined.arrow").matched == REAL_PAIRS
    joined = time.perf_counter()
    costs = {
        "parquet_us_per_pair": 1e6 * (loaded - began) / REAL_PAIRS,
        "join_us_per_pair": 1e6 * (joined - loaded) / REAL_PAIRS,
        "token_logp_bytes_per_pair": token_file.stat().st_size / REAL_PAIRS,
        "arrow_bytes_per_pair": (folder / "joined.arrow").stat().st_size / REAL_PAIRS,
    }
    return costs, _measure_batches(folder / "joined.arrow", TokenLogps(token_file))


def _measure_batches(file: Path, token_logps: TokenLogps) -> dict[int, dict[str, float]]:
    import datasets

    from pipeline.training.batches import make_collator

    whole = datasets.Dataset.from_file(str(file))
    references = [name for name in whole.column_names if name.startswith("ref_") or name == "token_start"]
    without = whole.remove_columns(references)
    collate, collate_sums = (make_collator(0, None, logps, packed=True) for logps in (token_logps, None))
    results = {}
    for size in (4, 8, 16):
        random = np.random.default_rng(3)
        batches = [random.integers(0, REAL_PAIRS, size).tolist() for _ in range(100)]
        fetched = [whole.__getitems__(batch) for batch in batches]
        fetch_ids, fetch_columns = _median_us(without.__getitems__, whole.__getitems__, batches)
        sums_alone, token_logps_too = _median_us(collate_sums, collate, fetched)
        reads, _ = _median_us(
            lambda rows: [token_logps.read(row["token_start"], 2 * REAL_TOKENS) for row in rows], len, fetched
        )
        results[size] = {
            "fetch_ids_us": fetch_ids,
            "collate_ids_and_sums_us": sums_alone,
            "fetch_reference_columns_us": fetch_columns,
            "collate_token_logps_us": token_logps_too,
            "of_which_file_reads_us": reads,
        }
    return results


def _median_us(one: Callable[[Any], Any], other: Callable[[Any], Any], inputs: list[Any]) -> tuple[float, float]:
    """Median of the one's time, and what the other's median is above it.

    In turn, so that others' load hits both, and each as often first, since the second finds warm caches.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(10):
        for i, given in enumerate(inputs):
            for which in (0, 1) if (turn + i) % 2 else (1, 0):
                began = time.perf_counter()
                (one, other)[which](given)
                times[which].append(time.perf_counter() - began)
    first, second = (float(np.median(taken)) * 1e6 for taken in times)
    return first, second - first


def extrapolate(series: list[dict[str, Any]], costs: dict[str, float]) -> dict[str, float]:
    """Fit what a pair costs over N by least squares, and read it at 100 million, which is itself left out of the fit.

    The build sorts, and a look-up searches and reads one block of the file: both a + b log2 N. The build's memory
    grows with N, that of look-ups by a key for each block of 32 rows.
    """
    fitted = [row for row in series if row["pairs"] < TARGET] or series
    # Smaller ones fit the processor's caches, if there are enough of the others to fit.
    fitted = [row for row in fitted if row["pairs"] > 5e5] or fitted
    growth = np.log2([row["pairs"] / TARGET for row in fitted])
    found: dict[str, float] = {}
    for what in ("build", "lookup"):
        for clock in ("", "_cpu"):
            y = np.array([row[f"{what}{clock}_us_per_pair"] for row in fitted])
            slope, level = np.polyfit(growth, y, 1) if len(y) > 1 else (0.0, y[0])
            # A cost that seems to fall with N is noise: then their mean stands.
            found[f"{what}{clock}_us_per_pair"] = float(level if slope > 0 else y.mean())
        found[f"{what}_seconds"] = found[f"{what}_us_per_pair"] * TARGET / 1e6
    found["peak_bytes"] = max(row["build_peak_bytes"] / row["pairs"] for row in fitted) * TARGET
    found["index_bytes"] = TARGET * INDEX_ROW.itemsize
    found["parquet_seconds"] = costs["parquet_us_per_pair"] * TARGET / 1e6
    found["join_seconds"] = costs["join_us_per_pair"] * TARGET / 1e6
    return found


def hardware() -> dict[str, Any]:
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else "unknown",
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def _print(result: dict[str, Any]) -> None:
    machine = result["hardware"]
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB\n")
    print("      pairs   build s  us/pair (cpu)   look up all s  us/pair (cpu)   peak MiB build, look up   disk MiB")
    for row in result["series"]:
        print(
            f"{row['pairs']:11,}  {row['build_seconds']:8.1f}  {row['build_us_per_pair']:7.2f} "
            f"({row['build_cpu_us_per_pair']:.2f})  {row['lookup_all_seconds']:13.1f}  "
            f"{row['lookup_us_per_pair']:7.2f} ({row['lookup_cpu_us_per_pair']:.2f})   "
            f"{row['build_peak_bytes'] / MIB:14.0f}, {row['lookup_peak_bytes'] / MIB:<7.0f}   "
            f"{(row['index_bytes'] + row['token_logp_bytes']) / MIB:8.0f}"
        )
    costs, at = result["files"], result["at_100_million"]
    print(
        f"\nA pair of {REAL_TOKENS} tokens each of prompt, chosen and rejected: {costs['parquet_us_per_pair']:.0f} us "
        f"out of Parquet into index and flat file, {costs['join_us_per_pair']:.0f} us looked up and into Arrow "
        f"(source and tokenizer not counted)\n\nOne batch, us:   ids: fetch, collate     reference: columns, "
        "token logps (file reads)    share of ids"
    )
    for size, batch in result["batches"].items():
        ids = batch["fetch_ids_us"] + batch["collate_ids_and_sums_us"]
        reference = batch["fetch_reference_columns_us"] + batch["collate_token_logps_us"]
        print(
            f"{size:>4} pairs        {batch['fetch_ids_us']:10.0f}, {batch['collate_ids_and_sums_us']:<7.0f}   "
            f"{batch['fetch_reference_columns_us']:16.0f}, {batch['collate_token_logps_us']:4.0f} "
            f"({batch['of_which_file_reads_us']:.0f})  {reference / ids:25.0%}, and under 1% of a step of "
            f"{reference / 10:.0f} ms or more"
        )
    print(
        f"\n100 million pairs, by a fit to fewer: index {at['build_seconds'] / 60:.0f} min "
        f"({at['build_us_per_pair']:.2f} us a pair, {at['build_cpu_us_per_pair']:.2f} of a core), look-ups "
        f"{at['lookup_seconds'] / 60:.0f} min ({at['lookup_us_per_pair']:.2f} and "
        f"{at['lookup_cpu_us_per_pair']:.2f}); {at['peak_bytes'] / 1e9:.1f} GB of memory while it is built; "
        f"{at['index_bytes'] / 1e9:.1f} GB on disk; and "
        f"{at['parquet_seconds'] / 3600:.1f} h for Parquet, {at['join_seconds'] / 3600:.1f} h for Arrow at "
        f"{REAL_TOKENS} tokens a text"
    )
    print(
        "Assumed: the cost of a pair goes on growing as fitted (a + b log2 N), the build's memory by the same bytes a "
        "pair; the index stays in the system's cache, since it was just written (from a cold disk a look-up costs one "
        "read); the disk takes the flat file, a float32 a token, as fast as here."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="1e5,1e6,5e6,1e7,3e7", help="comma-separated numbers of pairs")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--folder", type=Path, help="disk to measure on; the system's folder for temporary files")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(measure_index(given.alone, given.folder)))
        return
    sizes = [int(float(size)) for size in given.pairs.split(",")]
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        series = []
        for size in sizes:
            series.append(measure_in_a_process(size, Path(folder)))
            print(f"{size:,} pairs measured", file=sys.stderr)
        costs, batches = measure_files(Path(folder))
    result = {
        "hardware": hardware(),
        "series": series,
        "files": costs,
        "batches": batches,
        "at_100_million": extrapolate(series, costs),
    }
    _print(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
