"""Results -> the comparison in README.md, between two marks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import MIB, compare, describe_peer, sides, table
from workloads import from_json

BEGIN = "<!-- Made by tests/bench/page.py: -->"
END = "<!-- until here. -->"

_ROWS = {
    "score-32k": "stage one, UltraFeedback-like lengths, float32",
    "score-32k-bf16": "the same, bfloat16",
    "score-hh": "stage one, HH-like lengths (long prompts), float32",
    "train-32k": "a step of stage two, UltraFeedback-like, float32",
    "train-32k-bf16": "the same, bfloat16 autocast",
    "train-hh": "a step of stage two, HH-like, float32",
}


def write_comparison(results: Sequence[dict[str, Any]], readme: Path) -> None:
    """Replace what stands between the two marks."""
    replace_made(readme, comparison(results))


def replace_made(file: Path, lines: Sequence[str]) -> None:
    """Replace what stands between the two marks of a page."""
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    file.write_text(before + "\n".join([BEGIN, "", *lines, END]) + after, encoding="utf-8")


def comparison(results: Sequence[dict[str, Any]]) -> list[str]:
    """Make the table of the workloads that README names, and the sentences around it."""
    shown = [result for result in results if result["workload"]["name"] in _ROWS]
    # Results from before that side was measured have no place beside it.
    fair = [result for result in shown if "trl-completions" in result["workload"]["peers"]]
    shown = fair or shown
    rounds = sorted({len(result["measured"]["wall"]["ours"]) for result in shown})
    machine, shape = shown[0]["machine"], from_json(shown[0]["workload"]).shape
    peers = list(dict.fromkeys(result["workload"]["peers"][0] for result in shown))
    heads = ["", "refshard", "TRL", "times TRL's speed"]
    if "trl-completions" in peers:
        heads.append("times TRL's speed as it runs on a CPU")
    rows = [_row(result, as_it_runs=bool(fair)) for result in shown]
    return [
        f"Compared with TRL {machine['trl']}'s `DPOTrainer`: same weights, token ids and dtype, a Llama of "
        f"{shape.parameters / 1e6:.0f} million parameters",
        f"with a vocabulary of {shape.vocabulary:,}, {machine['cores']} cores of an {machine['processor']} with "
        f"{machine['memory_gib']} GiB, medians of {' to '.join(map(str, rounds))} interleaved",
        "rounds ([all results](docs/benchmarks.md), `make bench`):",
        "",
        *table([*heads, "memory above the model's, refshard", "TRL"], rows),
        *describe_peer(peers),
        "",
    ]


def _row(result: dict[str, Any], *, as_it_runs: bool) -> list[str]:
    workload, measured = from_json(result["workload"]), sides(result, "wall")
    peer = workload.peers[0]
    ours, theirs = measured["ours"], measured[peer]
    unit = "pairs/s" if workload.stage == 1 else "s"
    rates = [f"{side.rate.middle:.2f} {unit}" for side in (ours, theirs)]
    ratio = f"**{compare(result, 'wall', peer).ratio:.1f}x**"
    extras = [f"{side.extra / MIB:,.0f} MiB" for side in (ours, theirs)]
    as_is = [f"{compare(result, 'wall', 'trl').ratio:.1f}x"] if as_it_runs else []
    return [_ROWS[workload.name], *rates, ratio, *as_is, *extras]
