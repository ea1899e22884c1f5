"""What stage two's join costs, for growing numbers of pairs: time, memory, disk.

    python tests/bench/join.py [--pairs 1e5,1e6,1e8] [--json FILE] [--folder DIR]

Simulated are stores of N pairs: keys of random bytes, which is what digests are, in pieces of 16,384 rows, with two
token logps a completion in the flat file (real ones have hundreds; that file is written once, in order, at the disk's
speed). They go to `ReferenceTable`, as `load_reference_table` hands its parts over. Then keys are
looked up in chunks of 1,024, as the join does, in an order that has nothing to do with the index's. Real stores
and joined sets of a few thousand pairs show what a pair costs in Parquet and Arrow, and in a batch. Each N runs in a
process of its own, whose peak memory is the kernel's high-water mark above that of the imports, mapped pages included.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from report import join_tables  # noqa: E402
from rounds import machine  # noqa: E402

from pipeline.data.intake import KeptPair  # noqa: E402
from pipeline.data.tokens import TokenizedPair  # noqa: E402
from pipeline.store.format import ScoredPair  # noqa: E402
from pipeline.store.join import join  # noqa: E402
from pipeline.store.reference_table import INDEX_ROW, ReferenceTable, TokenLogps, load_reference_table  # noqa: E402
from pipeline.store.store import open_store  # noqa: E402
from support.stores import make_store  # noqa: E402

PIECE, CHUNK, TOKENS_A_PAIR = 16_384, 1024, 4
MOST_LOOKED_UP = 4_000_000

# A real store's pairs: 256 tokens each of prompt, chosen and rejected.
REAL_PAIRS, REAL_TOKENS, REAL_PART = 8192, 256, 1024


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
    Path("/proc/self/clear_refs").write_text("5")
    held, began = memory("VmRSS"), time.perf_counter()
    table = ReferenceTable(simulated(pairs, folder / f"{pairs}.f32"), folder=folder, with_tokens=True)
    build = time.perf_counter() - began
    assert len(table) == pairs
    build_peak = memory("VmHWM") - held

    # All pieces or an even choice of them.
    pieces = -(-pairs // PIECE)
    chosen = np.unique(np.linspace(0, pieces - 1, min(pieces, max(MOST_LOOKED_UP // PIECE, 1))).astype(int)).tolist()
    Path("/proc/self/clear_refs").write_text("5")
    looked_up, lookup = 0, 0.0
    for piece in np.random.default_rng(1).permutation(chosen).tolist():
        keys = keys_of(piece, min(PIECE, pairs - piece * PIECE)).tolist()
        began = time.perf_counter()
        for start in range(0, len(keys), CHUNK):
            at, found = table.look_up(keys[start : start + CHUNK])
            assert at.min() >= 0 and found["part"][0] == piece
        lookup += time.perf_counter() - began
        looked_up += len(keys)
    return {
        "pairs": pairs,
        "build_us_per_pair": 1e6 * build / pairs,
        "lookup_us_per_pair": 1e6 * lookup / looked_up,
        "build_peak_bytes": build_peak,
        "lookup_peak_bytes": memory("VmHWM") - held,
        "index_bytes": table.rows.nbytes,
    }


def measure_files(folder: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What a real pair costs: out of Parquet, into Arrow, and in a batch."""
    random = np.random.default_rng(2)
    lists = random.standard_normal((2, REAL_PAIRS, REAL_TOKENS), np.float32)
    keys = [key.ljust(16, b"\0") for key in keys_of(0, REAL_PAIRS).tolist()]
    ids = random.integers(0, 100_000, (3, REAL_PAIRS, REAL_TOKENS)).tolist()
    scored = [
        ScoredPair(
            key=keys[i],
            row=i,
            prompt_tokens=REAL_TOKENS,
            chosen_token_logps=lists[0, i],
            rejected_token_logps=lists[1, i],
        )
        for i in range(REAL_PAIRS)
    ]
    make_store(folder / "store", [scored[i : i + REAL_PART] for i in range(0, REAL_PAIRS, REAL_PART)])
    pairs = [
        KeptPair(
            row=i,
            place=f"row {i}",
            key=keys[i],
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


def _measure_batches(file: Path, token_logps: TokenLogps) -> dict[str, dict[str, float]]:
    """Time to fetch and collate a batch's ids and sums, and what reference columns and token logps add to it."""
    import datasets

    from pipeline.training.batches import Collator

    whole = datasets.Dataset.from_file(str(file))
    references = [name for name in whole.column_names if name.startswith("ref_") or name == "token_start"]
    without = whole.remove_columns(references)
    collate, collate_sums = (Collator(0, None, logps, packed=True) for logps in (token_logps, None))
    results = {}
    for size in (4, 8, 16):
        random = np.random.default_rng(3)
        batches = [random.integers(0, REAL_PAIRS, size).tolist() for _ in range(100)]
        fetched = [whole.__getitems__(batch) for batch in batches]
        fetch, fetch_more = _median_us(without.__getitems__, whole.__getitems__, batches)
        sums, token_logps_too = _median_us(collate_sums, collate, fetched)
        results[str(size)] = {"ids_us": fetch + sums, "join_us": fetch_more + token_logps_too}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="1e5,1e6,5e6,1e7,3e7", help="comma-separated numbers of pairs")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--folder", type=Path, help="disk to measure on; the system's folder for temporary files")
    given = parser.parse_args()
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
    series, spawn = [], multiprocessing.get_context("spawn")
    for size in given.pairs.split(","):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder, ProcessPoolExecutor(1, spawn) as alone:
            series.append(alone.submit(measure_index, int(float(size)), Path(folder)).result())
        print(f"{series[-1]['pairs']:,} pairs measured", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        costs, batches = measure_files(Path(folder))
    result = {"machine": machine(), "series": series, "files": costs, "batches": batches}
    print("\n".join(join_tables(result)))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
