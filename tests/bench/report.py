"""Measurements -> medians, ratios, gaps and shares, and the lines that print them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from workloads import Workload, from_json, make_pairs, useful_operations

MIB = 2**20


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

    ratios: list[float]
    """The peer's time over ours, round by round: wall clock, or processor time in the mode of one thread"""
    memory: float
    """The peer's extra memory over ours"""
    gap: float | None
    """Largest difference of the summed log-probs, in nats, or the first step's losses; None where the peer's
    reference is another one, its own policy"""
    norm_gap: float | None = None
    """Relative difference of the first step's gradient norms"""

    @property
    def ratio(self) -> float:
        return median(self.ratios)


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
    workload = from_json(result["workload"])
    ours, theirs = result["measured"][mode]["ours"], result["measured"][mode][peer]
    clock = "cpu" if mode == "cpu" else "wall"
    measured = sides(result, mode)
    values, norm_gap = [(a["values"], b["values"]) for a, b in zip(ours, theirs, strict=True)], None
    if workload.stage == 2:
        norm_gap = max(abs(a[1] - b[1]) / abs(b[1]) for a, b in values)
        values = [(a[:1], b[:1]) for a, b in values]
    gap = max(abs(x - y) for a, b in values for x, y in zip(a, b, strict=True))
    is_same = peer != "trl-live"
    return Comparison(
        ratios=[b[clock] / a[clock] for a, b in zip(ours, theirs, strict=True)],
        memory=measured[peer].extra / max(measured["ours"].extra, 1),
        gap=gap if is_same else None,
        norm_gap=norm_gap if is_same else None,
    )


def verdict(value: float, bar: float | None, *, at_most: bool = False) -> str:
    """Say whether a bar is met; empty without one."""
    if bar is None:
        return ""
    met = value <= bar if at_most else value >= bar
    sign = "at most " if at_most else ""
    return f"(bar {sign}{bar:g}: {'met' if met else 'NOT MET'})"


def describe(machine: dict[str, Any]) -> str:
    device = f"{machine['gpu']} ({machine['gpu_memory_gib']} GiB), " if machine.get("gpu") else ""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "trl", "peft"))
    return (
        f"{device}{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB of memory; "
        f"{machine['threads']} threads for the wall clock; {versions}"
    )


def lines(result: dict[str, Any]) -> list[str]:
    """Everything about one workload, to print."""
    workload = from_json(result["workload"])
    unit = "pairs/s" if workload.stage == 1 else "s per step"
    said = [
        f"== {workload.name}: stage {'one' if workload.stage == 1 else 'two'}, {precision(workload)}"
        f"{', LoRA' if workload.lora else ''}{', gradient checkpointing' if workload.checkpointing else ''}",
        f"   {workload.shape.describe()}",
        f"   {workload.lengths.describe()}",
        f"   {describe(result['machine'])}",
    ]
    for mode, count in (("wall", workload.pairs), ("cpu", workload.cpu_pairs)):
        if mode not in result["measured"]:
            continue
        cores = f"{result['machine']['threads']} threads" if mode == "wall" else "one thread"
        said.append(f" - {cores}, {count} pairs, {len(result['measured'][mode]['ours'])} rounds")
        for name, side in sides(result, mode).items():
            said.append(
                f"   {name:9} {side.rate.show(3)} {unit}; wall {side.wall.show()} s, CPU {side.cpu.show()} s; memory "
                f"{side.peak / MIB:,.0f} MiB, above the model {side.extra / MIB:,.0f} MiB; "
                f"{side.share:.0%} of the limit"
            )
        for peer in workload.peers:
            said += _comparison_lines(result, workload, mode, peer)
    return said


def _comparison_lines(result: dict[str, Any], workload: Workload, mode: str, peer: str) -> list[str]:
    compared = compare(result, mode, peer)
    bars = workload.bars
    each = ", ".join(f"{ratio:.2f}" for ratio in compared.ratios)
    clock, bar = ("wall clock", bars.wall) if mode == "wall" else ("CPU time", bars.cpu)
    said = [f"   {peer} over ours, {clock}: {compared.ratio:.2f}x [{each}] {verdict(compared.ratio, bar)}"]
    if mode == "wall":
        said.append(
            f"   {peer} over ours, memory above the model: {compared.memory:.1f}x "
            f"{verdict(compared.memory, bars.memory)}"
        )
        share = sides(result, mode)["ours"].share
        said.append(f"   ours, share of the limit: {share:.0%} {verdict(share, bars.share)}")
    if peer == "trl-live" and not workload.lora and mode == "wall":
        measured = sides(result, mode)
        less, reference = measured[peer].peak - measured["ours"].peak, reference_bytes(workload)
        said.append(
            f"   ours below {peer}: {less / MIB:,.0f} MiB; the reference has {reference / MIB:,.0f} MiB: "
            f"{'met' if less >= reference else 'NOT MET'}"
        )
    if compared.gap is not None:
        what = "summed log-probs differ by at most" if workload.stage == 1 else "first step's loss differs by"
        norm = f", gradient norm by {compared.norm_gap:.1e} of it" if compared.norm_gap is not None else ""
        said.append(f"   agreement: {what} {compared.gap:.1e}{norm} {verdict(compared.gap, bars.gap, at_most=True)}")
    return [line.rstrip() for line in said]


def precision(workload: Workload) -> str:
    return f"{workload.dtype} autocast over float32 weights" if workload.is_autocast else workload.dtype


def reference_bytes(workload: Workload) -> int:
    return workload.shape.parameters * (4 if workload.weight_dtype == "float32" else 2)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))
