"""Results -> pictures, as SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from report import MIB, SIDES, compare, sides

OURS, THEIRS, HEIGHT = "#1b6ca8", "#c9803a", 0.36
_COLORS = {"ours": OURS, "trl-completions": THEIRS, "trl": "#e3bf97"}

plt.rcParams.update(
    {
        # A white ground reads on light and dark pages alike; the same input gives the same file.
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "svg.hashsalt": "refshard",
        "svg.fonttype": "path",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def draw_ratios(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the ratios to each workload's first peer, wall clock and processor time, as bars.

    A thin line goes from the smallest to the largest; a diamond marks the ratio to TRL as it runs on this device. Bars
    have one meaning: a workload whose first peer is another than that of the others is left out.
    """
    firsts = [result["workload"]["peers"][0] for result in results]
    if "trl-completions" in firsts:
        results = [result for result, first in zip(results, firsts, strict=True) if first == "trl-completions"]
    label = "times TRL's speed, median of the rounds; thin lines from smallest to largest"
    figure, axes = _bars(results, label)
    marked = None
    for shift, mode, color, ink, label in (
        (-0.5, "wall", OURS, "white", "wall clock"),
        (0.5, "cpu", "#7fb2d6", "#222222", "CPU time, one thread"),
    ):
        for i, result in enumerate(results):
            if mode in result["measured"]:
                first, *others = result["workload"]["peers"]
                found, y = compare(result, mode, first).ratios, i + shift * HEIGHT
                axes.barh(y, found.middle, HEIGHT, color=color, label=label if i == 0 else None)
                axes.plot([found.least, found.most], [y, y], color="#555555", linewidth=1)
                axes.text(0, y, f" {found.middle:.1f}x", va="center", fontsize=9, color=ink)
                for peer in others:
                    ratio, said = compare(result, mode, peer).ratio, None if marked else "TRL as it runs on this device"
                    (marked,) = axes.plot(ratio, y, "D", color=THEIRS, markersize=4, label=said)
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    _finish(figure, axes, file)


def draw_memory(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Bars of the memory above the loaded model."""
    figure, axes = _bars(results, "peak memory above the loaded model, MiB")
    named: set[str] = set()
    for i, result in enumerate(results):
        measured = sides(result, "wall")
        height = 2 * HEIGHT / len(measured)
        for j, (side, found) in enumerate(measured.items()):
            extra, y = found.extra / MIB, i + (j + 0.5) * height - HEIGHT
            axes.barh(y, extra, height, color=_COLORS[side], label=None if side in named else SIDES[side])
            axes.text(extra, y, f"  {extra:,.0f}", va="center", fontsize=9 if len(measured) == 2 else 7)
            named.add(side)
    _finish(figure, axes, file)


def _bars(results: Sequence[dict[str, Any]], label: str) -> tuple[Any, Any]:
    """Begin a picture of two bars a workload."""
    figure, axes = plt.subplots(figsize=(8, 0.75 * len(results) + 1.4), layout="constrained")
    axes.set_yticks(range(len(results)), [result["workload"]["name"] for result in results])
    axes.set_xlabel(label)
    return figure, axes


def _finish(figure: Any, axes: Any, file: Path) -> None:
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    _save(figure, file)


def draw_counts(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Lines of the time of stage one against the number of pairs."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    counts = [result["workload"]["pairs"] for result in results]
    peer = results[0]["workload"]["peers"][0]
    for side, color, label in ((peer, THEIRS, SIDES[peer]), ("ours", OURS, "refshard")):
        times = [sides(result, "wall")[side].wall.middle for result in results]
        axes.plot(counts, times, "o-", color=color, label=label)
        axes.annotate(f"{times[-1]:.1f} s", (counts[-1], times[-1]), (6, 0), textcoords="offset points", va="center")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlim(0, counts[-1] * 1.15)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("pairs")
    axes.set_ylabel("stage one, seconds")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    _save(figure, file)


def draw_shares(results: Sequence[dict[str, Any]], file: Path) -> None:
    """A line of the ratio to TRL against the prompt's share of the length."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    percents = [int(result["workload"]["name"].split("-")[1]) for result in results]
    ratios = [compare(result, "wall", result["workload"]["peers"][0]).ratio for result in results]
    axes.plot(percents, ratios, "o-", color=OURS)
    for percent, ratio in zip(percents, ratios, strict=True):
        axes.annotate(f"{ratio:.1f}x", (percent, ratio), (0, 8), textcoords="offset points", ha="center")
    axes.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xticks(percents, [f"{percent}%" for percent in percents])
    axes.set_ylim(0, max(ratios) * 1.15)
    axes.set_xlabel("prompt's share of prompt and completion, 512 tokens together")
    axes.set_ylabel("times TRL's speed, stage one")
    _save(figure, file)


def draw_join(series: Sequence[dict[str, Any]], file: Path) -> None:
    """Lines of time a pair, and of memory, against the number of pairs."""
    figure, (times, memory) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    pairs = [row["pairs"] for row in series]
    for name, color, label in (("lookup", OURS, "look-ups"), ("build", THEIRS, "index")):
        times.plot(pairs, [row[f"{name}_us_per_pair"] for row in series], "o-", color=color, label=label)
        memory.plot(pairs, [row[f"{name}_peak_bytes"] / MIB for row in series], "o-", color=color, label=label)
    memory.plot(pairs, [row["index_bytes"] / MIB for row in series], ":", color="#999999", label="the index itself")
    memory.set_yscale("log")
    for axes, label in ((times, "microseconds a pair"), (memory, "peak memory, MiB")):
        axes.set_xscale("log")
        axes.set_xlabel("pairs")
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    times.set_ylim(bottom=0)
    _save(figure, file)


def draw_choices(runs: Sequence[dict[str, Any]], frontier: Sequence[tuple[float, float]], file: Path) -> None:
    """Draw the true reward against the KL: a point with its error for each run, and the curve of the best policies."""
    figure, axes = plt.subplots(figsize=(5.6, 5), layout="constrained")
    kls, rewards = zip(*frontier, strict=True)
    axes.plot(kls, rewards, "-", color="#999999", linewidth=1, label="best possible at a KL")
    right, above, below = ((7, 3), "left"), ((0, 7), "center"), ((0, -14), "center")
    for kind, marker, color, label, beside in (
        (("DPO", 250, 0), "o", OURS, "DPO, 250 steps", right),
        (("DPO", 250, 1), "o", "#7fb2d6", "the same, another seed", None),
        (("DPO", 1000, 0), "s", THEIRS, "DPO, 1,000 steps", above),
        (("IPO", 250, 0), "^", "#5a8f4e", "IPO, beta per token", below),
        (("LoRA", 250, 0), "v", "#8a5a9e", "LoRA", below),
    ):
        found = [run for run in runs if (run["series"], run["steps"], run["seed"]) == kind]
        if found:
            x, y = [run["kl"] for run in found], [run["reward_after"] for run in found]
            errors = [run["reward_error"] for run in found]
            line = "-" if kind[0] == "DPO" else ""
            axes.errorbar(x, y, errors, fmt=marker + line, color=color, linewidth=1, markersize=5, label=label)
        for run in found if beside else ():
            place, (shift, anchor) = (run["kl"], run["reward_after"]), beside
            said = {"textcoords": "offset points", "fontsize": 9, "color": color, "ha": anchor}
            axes.annotate(f"{run['beta']:g}", place, shift, **said)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("KL from the reference, nats per reply")
    axes.set_ylabel("true reward of a reply (numbers: beta)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    _save(figure, file)


def draw_betas(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw, against beta, what a run without a true reward sees, and below it what the replies are worth."""
    figure, rows = plt.subplots(4, 1, figsize=(5.6, 7.6), sharex=True, layout="constrained")
    for steps, seed, marker, color, label in (
        (250, 0, "o", OURS, "250 steps"),
        (250, 1, "o", "#7fb2d6", "the same, another seed"),
        (1000, 0, "s", THEIRS, "1,000 steps"),
    ):
        found = [run for run in runs if (run["series"], run["steps"], run["seed"]) == ("DPO", steps, seed)]
        betas = [run["beta"] for run in found]
        for axes, values in zip(
            rows,
            (
                [run["margin"] / run["beta"] for run in found],
                [100 * run["accuracy"] for run in found],
                [100 * run["grammatical_after"] for run in found],
                [run["reward_after"] for run in found],
            ),
            strict=True,
        ):
            axes.plot(betas, values, f"{marker}-", color=color, linewidth=1, markersize=5, label=label)
    titles = ("held-out pairs: margin / beta, nats", "held-out pairs: accuracy, %")
    for axes, title in zip(rows, (*titles, "replies: grammatical, %", "replies: true reward"), strict=True):
        axes.set_title(title, loc="left", fontsize=10)
    rows[-1].set_xscale("log")
    tried = sorted({run["beta"] for run in runs if run["series"] == "DPO"})
    rows[-1].set_xticks(tried, [f"{beta:g}" for beta in tried])
    rows[-1].minorticks_off()
    rows[-1].set_xlabel("beta")
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # Matplotlib ends lines of paths with blanks, which every diff would complain of.
    text = "\n".join(line.rstrip() for line in file.read_text(encoding="utf-8").splitlines())
    file.write_text(text + "\n", encoding="utf-8")
