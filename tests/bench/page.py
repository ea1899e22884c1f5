"""Results -> docs/benchmarks.md and its pictures.

python tests/bench/page.py                  from tests/bench/results into docs
python tests/bench/page.py --results DIR --docs DIR
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pictures import draw_counts, draw_join, draw_memory, draw_ratios, draw_shares
from report import MIB, compare, describe, precision, reference_bytes, sides, verdict
from workloads import from_json, padded_tokens

HERE = Path(__file__).parent
RUN = "python tests/bench/run.py"

_LONG_RUN = 512

METHOD = """\
## Method

Both sides get the same random weights (from one seed), the same dtype and the same token ids, drawn once per workload;
prompts and completions have log-normal lengths, cut in equally likely parts so that a few pairs have the distribution's
mean. No tokenizer and no text is involved.

- **Rounds.** refshard, TRL, refshard, TRL, ...; a ratio is taken within each round, and the tables give the median with
  the smallest and the largest. Every measurement is a process of its own and warms up before its clock starts. The
  processor times come from a separate set of measurements, on one thread.
- **Stage one** of TRL is `DPOTrainer(precompute_ref_log_probs=True)` with its own loader, collator and passes, {batch}
  pairs a batch (its default; a smaller one pads less: `--only curve-batch` measures it), timed from its first batch to
  its last. Writing TRL's cache and refshard's shards is not timed. refshard scores with its default of {tokens:,}
  tokens a batch. Neither checkpoints gradients nor casts automatically: bfloat16 means weights in it.
- **Stage two** is whole optimizer steps of SGD with reference log-probs in the data, from the end of one step to the
  end of the next, so collating and logging are included; the first step warms up. bfloat16 is autocast over float32
  weights, the default of both. The optimizer is SGD, because the memory and time of AdamW are the same on both sides
  and would only hide the difference. No gradient checkpointing. The reference log-probs are made up, the same for both.
  With a real reference equal to the policy, the first loss would be log 2 even if the log-probs were wrong.
- **Memory** is resident memory: the kernel's high-water mark, reset when the model is loaded and before the warm-up,
  less what was held then. The allocator is the system's, with no settings.
- **Share of the limit** is the useful operations, `2 N (P + C + R) + 2 V H (C + R)` and the attention's, divided by the
  time and by the rate of a matrix product of the model's own shape, measured in the same process right after. N are the
  parameters outside embedding and head, V x H the head, P, C and R the tokens of prompt and completions: each prompt
  counts once, and the head on completions alone. A training step counts three times that.
- **The draw.** In TRL's batches, a few pairs in random order may need more or less padding than many pairs do. The last
  column before the command is TRL's padded tokens a pair in the measurement, divided by those of {long_run} pairs. A
  speed ratio divided by this number is the ratio of a long run.
- **Agreement** is the largest difference of a completion's summed log-probs over all pairs and rounds, or the
  difference of the first step's losses. In bfloat16 both sides round, differently with every shape of a batch, so no
  bar is set.
- **A bar** is a target that was set for a result; the table says whether it is met.
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
            *_join_section(joined, chosen.docs),
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
    batches = [r for r in every if r["workload"]["name"].startswith("batch-")]
    rows = [r for r in every if r not in counts and r not in shares and r not in batches]
    made = ["## Machine", ""]
    for said in dict.fromkeys(describe(r["machine"]) for r in every):
        made += [f"{said}.", ""]
    first = from_json(every[0]["workload"])
    made += [METHOD.format(batch=first.peer_batch, tokens=first.tokens_per_batch, long_run=_LONG_RUN)]
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
    if batches:
        made += _curve("Against TRL's batch size", "curve-batch", batches)
    return made


def _picture(title: str, file: str, name: str, results: Sequence[dict[str, Any]]) -> list[str]:
    heading, blank, *rest = _curve(title, name, results)
    return [heading, blank, f"![{title}]({file})", "", *rest]


def _curve(title: str, name: str, results: Sequence[dict[str, Any]]) -> list[str]:
    shape = from_json(results[0]["workload"]).shape.describe()
    table = ["| | refshard, s | TRL, s | ratio | largest difference |", "|---|---|---|---|---|"]
    for result in results:
        measured, compared = sides(result, "wall"), compare(result, "wall", "trl")
        table.append(
            f"| {result['workload']['name']} | {measured['ours'].wall.middle:.2f} | {measured['trl'].wall.middle:.2f} "
            f"| {compared.ratio:.1f}x | {compared.gap:.0e} |"
        )
    command = f"Command: `{RUN} --only {name}`"
    return [f"## {title}", "", f"{command}. {shape}; float32.", "", *table, ""]


def _ratio_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    table = [
        "| | times TRL, wall clock | times TRL, CPU time of one thread | TRL's extra memory over ours | "
        "largest difference | share of the limit | TRL's padded tokens, draw over long run: wall, CPU | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in rows:
        workload = from_json(result["workload"])
        bars = workload.bars
        long_run = padded_tokens(workload, _LONG_RUN)
        draws = [padded_tokens(workload, count) / long_run for count in (workload.pairs, workload.cpu_pairs) if count]
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
            ", ".join(f"{draw:.2f}" for draw in draws),
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


JOIN = """\
Stage two joins the tokenized pairs to the shards by key. The keys and sums of the stores (44 bytes a pair) are sorted
in memory and written to an index, which is then memory-mapped. Token logps go to one flat file, which is read batch
by batch. The benchmark simulates stores of random keys with four token logps a pair, in one process for each size.
Memory is the peak above what the imports hold. Above four million pairs, a random sample of four million is looked up
and the time is scaled to all.
"""


def _join_section(results: dict[str, Any] | None, docs: Path) -> list[str]:
    made = ["## Join", "", JOIN]
    if results is None:
        return [*made, "Not measured. Command: `python tests/bench/join.py`.", ""]
    hardware = results["hardware"]
    series, files, batches = results["series"], results["files"], results["batches"]
    draw_join(series, docs / "bench-join.svg")
    largest = max(row["pairs"] for row in series)
    sizes = ",".join(str(row["pairs"]) for row in series)
    made += ["![Cost of the join against the number of pairs](bench-join.svg)", ""]
    machine = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
    made += [f"Command: `python tests/bench/join.py --pairs {sizes}`. {machine}."]
    made += ["", "| pairs | index, s | look-ups of all, s | us a pair | peak, MiB: index, look-ups | index, MiB |"]
    made += ["|---|---|---|---|---|---|"]
    for row in series:
        each = row["build_us_per_pair"] + row["lookup_us_per_pair"]
        peaks = f"{row['build_peak_bytes'] / MIB:.0f}, {row['lookup_peak_bytes'] / MIB:.0f}"
        made.append(
            f"| {row['pairs']:,} | {row['build_seconds']:,.1f} | {row['lookup_all_seconds']:,.1f} | {each:.1f} | "
            f"{peaks} | {row['index_bytes'] / MIB:,.0f} |"
        )
    hours = (files["parquet_us_per_pair"] + files["join_us_per_pair"]) * 1e8 / 3.6e9
    made += [
        "",
        f"So the index of {largest:,} pairs was built and queried on one node. What the simulation leaves out, at two "
        f"texts of 256 tokens a pair: reading the Parquet parts, {files['parquet_us_per_pair']:.0f} us a pair, and "
        f"writing the joined set, {files['join_us_per_pair']:.0f} us; extrapolated, {hours:.1f} hours for 100 million, "
        f"with {files['token_logp_bytes_per_pair'] / 10:,.0f} GB of token logps and "
        f"{files['arrow_bytes_per_pair'] / 10:,.0f} GB of joined set on the disk. Reading and tokenizing the source is "
        "left out, too.",
        "",
        "In a step, beside reading and collating the ids, which any trainer does:",
        "",
        "| pairs of a micro-batch | ids, us | what the join adds: sums and token logps, us | 1% of a step of, ms |",
        "|---|---|---|---|",
    ]
    for pairs, costs in batches.items():
        added = costs["fetch_reference_columns_us"] + costs["collate_token_logps_us"]
        ids = costs["fetch_ids_us"] + costs["collate_ids_and_sums_us"]
        made.append(f"| {pairs} | {ids:,.0f} | {added:.0f} | {added / 10:.1f} |")
    return [*made, ""]


if __name__ == "__main__":
    main()
