"""Measurements -> medians, ratios, gaps and shares, and the tables in Markdown that show them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from workloads import Workload, from_json, make_pairs, padded_tokens, useful_operations

MIB = 2**20
RUN = "python tests/bench/run.py"
LONG_RUN = 512
"""Pairs of a run whose padding is that of many pairs"""

SIDES = {
    "ours": "refshard",
    "trl-completions": "TRL, completion positions only",
    "trl": "TRL",
    "trl-live": "TRL, live reference",
}


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest over the rounds."""

    middle: float
    least: float
    most: float

    def show(self, digits: int = 2) -> str:
        return f"{self.middle:.{digits}f} ({self.least:.{digits}f} to {self.most:.{digits}f})"


@dataclass(frozen=True)
class Side:
    """One side in one mode."""

    rate: Spread
    """Pairs per second, or seconds per step"""
    wall: Spread
    """Seconds, of the whole timed pass"""
    cpu: Spread
    extra: float
    """Bytes above the loaded model at the peak, median"""
    peak: float
    """Bytes"""
    share: float
    """Useful operations over time, against the matrix rate measured in the same process; median"""


@dataclass(frozen=True)
class Comparison:
    """Ours against one peer in one mode."""

    ratios: Spread
    """The peer's time over ours, by round: wall clock, or processor time in the mode of one thread"""
    memory: float
    """The peer's extra memory over ours"""
    gap: float | None
    """Largest difference of the summed log-probs, in nats, or the first step's losses; None where the peer's
    reference is another one, its own policy"""

    @property
    def ratio(self) -> float:
        return self.ratios.middle


def sides(result: dict[str, Any], mode: str) -> dict[str, Side]:
    workload = from_json(result["workload"])
    pairs, units = _timed(workload, mode)
    useful = useful_operations(workload, pairs)
    return {
        name: Side(
            rate=_spread([units / m["wall"] if workload.stage == 1 else m["wall"] / units for m in done]),
            wall=_spread([m["wall"] for m in done]),
            cpu=_spread([m["cpu"] for m in done]),
            extra=median(m["peak"] - m["loaded"] for m in done),
            peak=median(m["peak"] for m in done),
            share=median(useful / m["wall"] / m["matrix_rate"] for m in done),
        )
        for name, done in result["measured"][mode].items()
    }


def _timed(workload: Workload, mode: str) -> tuple[Sequence[Any], int]:
    """Pairs of the timed pass, and what a rate counts: pairs in stage one, steps in stage two."""
    pairs = make_pairs(workload, workload.pairs if mode == "wall" else workload.cpu_pairs)
    if workload.stage == 1:
        return pairs, len(pairs)
    # The first step warms up; a last one that is not full is not made.
    steps = len(pairs) // workload.batch
    return pairs[workload.batch : steps * workload.batch], steps - 1


def compare(result: dict[str, Any], mode: str, peer: str) -> Comparison:
    ours, theirs = result["measured"][mode]["ours"], result["measured"][mode][peer]
    measured = sides(result, mode)
    # Stage two: the loss alone; the gradient's norm is the second value.
    count = None if result["workload"]["stage"] == 1 else 1
    values = [zip(a["values"][:count], b["values"][:count], strict=True) for a, b in zip(ours, theirs, strict=True)]
    return Comparison(
        ratios=_spread([b[mode] / a[mode] for a, b in zip(ours, theirs, strict=True)]),
        memory=measured[peer].extra / max(measured["ours"].extra, 1),
        gap=None if peer == "trl-live" else max(abs(x - y) for both in values for x, y in both),
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def describe(machine: dict[str, Any]) -> str:
    device = f"{machine['gpu']} ({machine['gpu_memory_gib']} GiB), " if machine.get("gpu") else ""
    names = ("driver", "python", "torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {machine[name]}" for name in names if name in machine)
    return (
        f"{device}{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB of memory; "
        f"{machine['threads']} threads for the wall clock; {versions}"
    )


def describe_peer(peers: Iterable[str]) -> list[str]:
    """Say which TRL the first ratio compares with, in lines of a paragraph."""
    if "trl-completions" in peers:
        return [
            "TRL here projects only the completions' positions through its head, as it does on CUDA. On a CPU, TRL",
            "projects prompts and padding too, so the ratio to TRL as it runs on a CPU is larger.",
        ]
    return [
        "The ratio includes a fallback of TRL: on a CPU it projects every position through its head, prompts and",
        "padding too; on CUDA, only the completions' positions. `make bench` measures that side too.",
    ]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (heads, *rows)]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:], ""]


def tables(results: Sequence[dict[str, Any]]) -> list[str]:
    """All that was measured of some workloads, but for their models and lengths."""
    return [*_ratio_table(results), *_speed_table(results, 1), *_speed_table(results, 2)]


def _ratio_table(results: Sequence[dict[str, Any]]) -> list[str]:
    heads = ["", "against", "times its speed, wall clock", "CPU time of one thread", "its extra memory over ours"]
    heads += ["largest difference", "share of the limit", "TRL's padded tokens, draw over long run: wall, CPU"]
    rows = []
    for result in results:
        workload = from_json(result["workload"])
        long_run = padded_tokens(workload, LONG_RUN)
        draws = [padded_tokens(workload, count) / long_run for count in (workload.pairs, workload.cpu_pairs) if count]
        for peer in workload.peers:
            wall = compare(result, "wall", peer)
            cells = [
                f"`{workload.name}`",
                SIDES[peer],
                show_ratio(wall, bold=peer == workload.peers[0]),
                show_ratio(compare(result, "cpu", peer), bold=peer == workload.peers[0])
                if "cpu" in result["measured"]
                else "",
                f"{wall.memory:.1f}x",
                "" if wall.gap is None else f"{wall.gap:.0e}",
                f"{sides(result, 'wall')['ours'].share:.0%}",
                ", ".join(f"{draw:.2f}" for draw in draws),
                f"`{RUN} --only {workload.name}`",
            ]
            rows.append(cells)
    return table([*heads, "command"], rows)


def show_ratio(compared: Comparison, *, bold: bool) -> str:
    mark = "**" if bold else ""
    return f"{mark}{compared.ratio:.1f}x{mark}, {compared.ratios.least:.1f} to {compared.ratios.most:.1f}"


def _speed_table(results: Sequence[dict[str, Any]], stage: int) -> list[str]:
    heads = ["stage one" if stage == 1 else "stage two", "threads", "side", "pairs/s" if stage == 1 else "s per step"]
    heads += ["wall, s", "CPU, s", "peak, MiB", "above the model, MiB", "share of the limit"]
    rows = [
        [
            f"`{result['workload']['name']}`",
            str(result["machine"]["threads"] if mode == "wall" else 1),
            SIDES[name],
            side.rate.show(),
            side.wall.show(1),
            side.cpu.show(1),
            f"{side.peak / MIB:,.0f}",
            f"{side.extra / MIB:,.0f}",
            f"{side.share:.0%}",
        ]
        for result in results
        if result["workload"]["stage"] == stage
        for mode in result["measured"]
        for name, side in sides(result, mode).items()
    ]
    return table(heads, rows) if rows else []


def shape_table(results: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for result in results:
        workload = from_json(result["workload"])
        pairs = str(workload.pairs)
        if "cpu" in result["measured"]:
            pairs += f", on one thread {workload.cpu_pairs}"
        if workload.stage == 2:
            pairs += f"; {workload.batch} a step, the first step warms up"
        kind = f"{workload.dtype} autocast over float32 weights" if workload.is_autocast else workload.dtype
        kind += f"{', LoRA' if workload.lora else ''}{', gradient checkpointing' if workload.checkpointing else ''}"
        rounds = str(len(result["measured"]["wall"]["ours"]))
        shape, lengths = workload.shape.describe(), workload.lengths.describe()
        rows.append([f"`{workload.name}`", shape, lengths, kind, pairs, rounds])
    return table(["", "model", "lengths", "dtype", "pairs", "rounds"], rows)


def join_tables(results: dict[str, Any]) -> list[str]:
    """The join by number of pairs, and what it adds to a batch."""
    heads = ["pairs", "index, s", "look-ups of all, s", "us a pair", "peak, MiB: index, look-ups", "index, MiB"]
    rows = []
    for row in results["series"]:
        pairs, build, lookup = row["pairs"], row["build_us_per_pair"], row["lookup_us_per_pair"]
        seconds = [f"{each * pairs / 1e6:,.1f}" for each in (build, lookup)]
        peaks = f"{row['build_peak_bytes'] / MIB:.0f}, {row['lookup_peak_bytes'] / MIB:.0f}"
        rows.append([f"{pairs:,}", *seconds, f"{build + lookup:.1f}", peaks, f"{row['index_bytes'] / MIB:,.0f}"])
    said = "In a step, beside reading and collating the ids, which any trainer does:"
    added = ["pairs of a micro-batch", "ids, us", "what the join adds: sums and token logps, us", "1% of a step of, ms"]
    batches = [
        [size, f"{costs['ids_us']:,.0f}", f"{costs['join_us']:.0f}", f"{costs['join_us'] / 10:.1f}"]
        for size, costs in results["batches"].items()
    ]
    files = results["files"]
    hours = (files["parquet_us_per_pair"] + files["join_us_per_pair"]) * 1e8 / 3.6e9
    left_out = (
        "What the simulation leaves out, at two texts of 256 tokens a pair: reading the Parquet parts, "
        f"{files['parquet_us_per_pair']:.0f} us a pair, and writing the joined set, {files['join_us_per_pair']:.0f} "
        f"us; extrapolated, {hours:.1f} hours for 100 million, with "
        f"{files['token_logp_bytes_per_pair'] / 10:,.0f} GB of token logps and "
        f"{files['arrow_bytes_per_pair'] / 10:,.0f} GB of joined set on the disk. Reading and tokenizing the source is "
        "left out, too."
    )
    return [*table(heads, rows), left_out, "", said, "", *table(added, batches)]
