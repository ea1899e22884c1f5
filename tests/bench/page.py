"""Results -> docs/benchmarks.md and its pictures.

python tests/bench/page.py                  from tests/bench/results into docs
python tests/bench/page.py --results DIR --docs DIR
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pictures import draw_counts, draw_memory, draw_ratios, draw_shares
from report import MIB, compare, describe, precision, reference_bytes, sides, verdict
from workloads import from_json

HERE = Path(__file__).parent
RUN = "python tests/bench/run.py"

METHOD = """\
## Method

Both sides get the same random weights (from one seed), the same dtype and the same token ids, drawn once per workload;
prompts and completions have log-normal lengths, cut in equally likely parts so that a few pairs have the distribution's
mean. No tokenizer and no text is involved.

- **Rounds.** refshard, TRL, refshard, TRL, ...; a ratio is taken within each round, and the tables give the median with
  the smallest and the largest. Every measurement is a process of its own and warms up before its clock starts. The
  processor times are of another set of measurements, on one thread.
- **Stage one** of TRL is `DPOTrainer(precompute_ref_log_probs=True)` with its own loader, collator and passes,
  {batch} pairs a batch, timed from its first batch to its last; the writing of its cache is left out, as is that of our
  shards. Ours scores under its default budget of {tokens:,} tokens. Neither checkpoints gradients nor casts
  automatically: bfloat16 means weights in it.
- **Stage two** is whole optimizer steps of SGD with reference log-probs in the data, from the end of one step to the
  end of the next, so collating and logging are in; the first step warms up. bfloat16 is autocast over float32 weights,
  the default of both. SGD, because what AdamW keeps and does is the same on either side and only blurs the ratios. No
  gradient checkpointing. The reference log-probs are made up, the same for both: a policy equal to its reference has a
  loss of log 2 whatever is computed.
- **Memory** is resident memory: the kernel's high-water mark, reset when the model is loaded and before the warm-up,
  less what was held then. The allocator is the system's, with no settings.
- **Share of the limit** is the useful operations, `2 N (P + C + R) + 2 V H (C + R)` and the attention's, over the time
  and over the rate of a matrix product of the model's own shape, measured in the same process right after. N are the
  parameters outside embedding and head, V x H the head, P, C and R the tokens of prompt and completions: each prompt
  counts once, and the head on completions alone. A training step counts three times that.
- **Agreement** is the largest difference of a completion's summed log-probs over all pairs and rounds, or the
  difference of the first step's losses. In bfloat16 both sides round, differently with every shape of a batch; there is
  no bar.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the page of results and its pictures.")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs")
    chosen = parser.parse_args()
    cpu, gpu, joined = (_read(chosen.results / f"{name}.json") for name in ("cpu", "gpu", "join"))
    text = "\n".join(
        [
            "# Benchmarks",
            "",
            "refshard side by side with TRL's `DPOTrainer`. `make bench` measures everything here that needs no GPU "
            "and makes this page; the command beside a table or a picture measures that alone.",
            "",
            *_processor_section(cpu, chosen.docs),
            *_gpu_section(gpu),
            *_join_section(joined),
        ]
    )
    chosen.docs.mkdir(parents=True, exist_ok=True)
    (chosen.docs / "benchmarks.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _processor_section(results: dict[str, Any] | None, docs: Path) -> list[str]:
    if results is None:
        return ["## Processor", "", "Not measured. Command: `make bench`.", ""]
    every = results["results"]
    counts = [r for r in every if r["workload"]["name"].startswith("pairs-")]
    shares = [r for r in every if r["workload"]["name"].startswith("share-")]
    rows = [r for r in every if r not in counts and r not in shares]
    made = ["## Machine", ""]
    for said in dict.fromkeys(describe(r["machine"]) for r in every):
        made += [f"{said}.", ""]
    first = from_json(every[0]["workload"])
    made += [METHOD.format(batch=first.peer_batch, tokens=first.tokens_per_batch)]
    if rows:
        draw_ratios(rows, docs / "bench-ratios.svg")
        draw_memory(rows, docs / "bench-memory.svg")
        made += ["## Against TRL", "", "![Ratio to TRL](bench-ratios.svg)", "", "Command: `make bench`", ""]
        made += [*_ratio_table(rows), "", *_speed_table(rows, 1), "", *_speed_table(rows, 2), ""]
        made += ["![Memory above the model](bench-memory.svg)", "", f"Command: `{RUN}`", ""]
        made += ["### Models and lengths", "", *_shape_table(rows), ""]
    if counts:
        draw_counts(counts, docs / "bench-pairs.svg")
        made += _picture("Cost against the number of pairs", "bench-pairs.svg", "curve-pairs", counts)
    if shares:
        draw_shares(shares, docs / "bench-prompt-share.svg")
        made += _picture("Cost against the prompt's share", "bench-prompt-share.svg", "curve-share", shares)
    return made


def _picture(title: str, file: str, name: str, results: Sequence[dict[str, Any]]) -> list[str]:
    shape = from_json(results[0]["workload"]).shape.describe()
    table = ["| | refshard, s | TRL, s | ratio | largest difference |", "|---|---|---|---|---|"]
    for result in results:
        measured, compared = sides(result, "wall"), compare(result, "wall", "trl")
        table.append(
            f"| {result['workload']['name']} | {measured['ours'].wall.middle:.2f} | {measured['trl'].wall.middle:.2f} "
            f"| {compared.ratio:.1f}x | {compared.gap:.0e} |"
        )
    command = f"Command: `{RUN} --only {name}`"
    return [f"## {title}", "", f"![{title}]({file})", "", f"{command}. {shape}; float32.", "", *table, ""]


def _ratio_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    table = [
        "| | times TRL, wall clock | times TRL, CPU time of one thread | TRL's extra memory over ours | "
        "largest difference | share of the limit | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in rows:
        bars = from_json(result["workload"]).bars
        wall = compare(result, "wall", "trl")
        cpu = compare(result, "cpu", "trl") if "cpu" in result["measured"] else None
        share = sides(result, "wall")["ours"].share
        cells = [
            f"`{result['workload']['name']}`",
            f"{_range(wall.ratios, wall.ratio)} {verdict(wall.ratio, bars.wall)}",
            f"{_range(cpu.ratios, cpu.ratio)} {verdict(cpu.ratio, bars.cpu)}" if cpu else "",
            f"{wall.memory:.1f}x {verdict(wall.memory, bars.memory)}",
            f"{wall.gap:.0e} {verdict(wall.gap or 0.0, bars.gap, at_most=True)}",
            f"{share:.0%} {verdict(share, bars.share)}",
            f"`{RUN} --only {result['workload']['name']}`",
        ]
        table.append(f"| {' | '.join(cell.rstrip() for cell in cells)} |")
    return table


def _range(ratios: Sequence[float], middle: float) -> str:
    return f"**{middle:.1f}x**, {min(ratios):.1f} to {max(ratios):.1f}"


def _speed_table(rows: Sequence[dict[str, Any]], stage: int) -> list[str]:
    unit = "pairs/s" if stage == 1 else "s per step"
    table = [
        f"| stage {'one' if stage == 1 else 'two'} | threads | side | {unit} | wall, s | CPU, s | peak, MiB | "
        "above the model, MiB | share of the limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in rows:
        workload = from_json(result["workload"])
        if workload.stage != stage:
            continue
        for mode in result["measured"]:
            for name, side in sides(result, mode).items():
                cells = [
                    f"`{workload.name}`",
                    str(result["machine"]["threads"] if mode == "wall" else 1),
                    "refshard" if name == "ours" else "TRL" if name == "trl" else "TRL, live reference",
                    side.rate.show(),
                    side.wall.show(1),
                    side.cpu.show(1),
                    f"{side.peak / MIB:,.0f}",
                    f"{side.extra / MIB:,.0f}",
                    f"{side.share:.0%}",
                ]
                table.append(f"| {' | '.join(cells)} |")
    return table


def _shape_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    table = ["| | model | lengths | dtype | pairs |", "|---|---|---|---|---|"]
    for result in rows:
        workload = from_json(result["workload"])
        pairs = str(workload.pairs)
        if "cpu" in result["measured"]:
            pairs += f", on one thread {workload.cpu_pairs}"
        if workload.stage == 2:
            pairs += f"; {workload.batch} a step, the first step warms up"
        table.append(
            f"| `{workload.name}` | {workload.shape.describe()} | {workload.lengths.describe()} | "
            f"{precision(workload)} | {pairs} |"
        )
    return table


def _gpu_section(results: dict[str, Any] | None) -> list[str]:
    made = ["## GPU", "", "Command: `make bench-gpu`", ""]
    if results is None:
        return [*made, "Not measured.", ""]
    for said in dict.fromkeys(describe(r["machine"]) for r in results["results"]):
        made += [f"{said}.", ""]
    table = [
        "| | against | ratio | largest difference | refshard, peak GiB | peer, peak GiB | share of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results["results"]:
        workload = from_json(result["workload"])
        measured = sides(result, "wall")
        for peer in workload.peers:
            compared = compare(result, "wall", peer)
            ours, theirs = measured["ours"], measured[peer]
            saved = ""
            if peer == "trl-live" and not workload.lora:
                met = "met" if theirs.peak - ours.peak >= reference_bytes(workload) else "NOT MET"
                saved = f" (bar: {reference_bytes(workload) / 2**30:.1f} above ours, {met})"
            cells = [
                f"`{workload.name}`",
                "TRL, live reference" if peer == "trl-live" else "TRL",
                f"{_range(compared.ratios, compared.ratio)} {verdict(compared.ratio, workload.bars.wall)}",
                f"{compared.gap:.0e}" if compared.gap is not None else "",
                f"{ours.peak / 2**30:.1f}",
                f"{theirs.peak / 2**30:.1f}{saved}",
                f"{ours.share:.0%} {verdict(ours.share, workload.bars.share)}",
            ]
            table.append(f"| {' | '.join(cell.rstrip() for cell in cells)} |")
    return [*made, *table, "", *_shape_table(results["results"]), ""]


def _join_section(results: dict[str, Any] | None) -> list[str]:
    """The join's own benchmark hands over its Markdown, or rows of a table, or plain values."""
    made = ["## Join", ""]
    if results is None:
        return [*made, "Not measured.", ""]
    if "command" in results:
        made += [f"Command: `{results['command']}`", ""]
    if "markdown" in results:
        return [*made, results["markdown"], ""]
    rows = results.get("rows")
    if rows:
        names = list(rows[0])
        made += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        made += [f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows]
        return [*made, ""]
    return [*made, *(f"- {name}: {value}" for name, value in results.items() if name != "command"), ""]


if __name__ == "__main__":
    main()
