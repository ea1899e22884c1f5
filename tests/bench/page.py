"""Results -> docs/benchmarks.md with its pictures, the comparison in README.md, and what docs/choosing.md measured.

python tests/bench/page.py                  from tests/bench/results into docs
python tests/bench/page.py --results DIR --docs DIR
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from choices import choices, frontier
from pictures import draw_betas, draw_choices, draw_counts, draw_join, draw_memory, draw_ratios, draw_shares
from readme import replace_made, write_comparison
from report import (
    LONG_RUN,
    MIB,
    RUN,
    SIDES,
    compare,
    describe,
    describe_peer,
    join_tables,
    shape_table,
    sides,
    table,
    tables,
)
from rounds import AGREEMENT
from workloads import from_json

from pipeline.base.errors import number_of

HERE = Path(__file__).parent

METHOD = """\
## Method

Both sides get the same random weights (from one seed), the same dtype and the same token ids, drawn once for each
workload. The lengths of prompts and completions are log-normal. They are the quantiles of equally likely parts, so a
few pairs have the distribution's mean. No tokenizer and no text is involved.

- **Two ways of TRL.** On CUDA, TRL projects only the completions' positions through its head. On a CPU it projects
  every position, prompts and padding too. "TRL, completion positions only" does on the CPU what TRL does on CUDA: the
  benchmark switches TRL's own code. "TRL" is TRL as it runs on this device.
- **Rounds.** The order is refshard, TRL in each way, refshard, ... Each ratio compares two sides of one round. The
  tables give the median, the smallest and the largest. Every measurement is a process of its own and warms up before
  its clock starts. The processor times come from a separate set of measurements, on one thread.
- **Stage one** of TRL is `DPOTrainer(precompute_ref_log_probs=True)` with its own loader, collator and passes, {batch}
  pairs a batch. This is its default; a smaller batch has less padding (`--only curve-batch` measures it). The time runs
  from its first batch to its last. Writing TRL's cache and refshard's shards is not timed. refshard scores with its
  default of {tokens:,} tokens a batch. Neither uses gradient checkpointing or autocast: bfloat16 is the dtype of the
  weights.
- **Stage two** is whole optimizer steps of SGD with reference log-probs in the data. The time runs from the end of one
  step to the end of the next, so it includes collating and logging; the first step warms up. bfloat16 is autocast over
  float32 weights, the default of both. The optimizer is SGD, because the memory and time of AdamW are the same on both
  sides and would only hide the difference. There is no gradient checkpointing. The reference log-probs are made up, the
  same for both. With a real reference equal to the policy, the first loss would be log 2 even if the log-probs were
  wrong.
- **Memory** is resident memory: the kernel's high-water mark, minus the memory in use when the mark was reset. It is
  reset when the model is loaded, before the warm-up. The allocator is the system's, with no settings.
- **Share of the limit** is the rate of useful operations, divided by the rate of a matrix product of the model's own
  shape, which the same process measures right after. The useful operations are `2 N (P + C + R) + 2 V H (C + R)` and
  those of the attention. N is the number of parameters outside embedding and head, V x H the size of the head; P, C and
  R are the tokens of prompt and completions. Each prompt counts once, and the head counts for completions only. A
  training step counts three times that.
- **The draw.** In TRL's batches, a few pairs in random order may need more or less padding than many pairs do. The last
  column before the command is TRL's padded tokens a pair in the measurement, divided by those of {long_run} pairs. A
  speed ratio divided by this number is the ratio of a long run.
- **Agreement** is the largest difference of a completion's summed log-probs over all pairs and rounds, or the
  difference of the losses of the first step. In float32, the benchmark stops if a sum, a loss or a gradient norm
  differs by more than {agreement} of itself. In bfloat16 both sides round, and each shape of a batch rounds
  differently.
"""

JOIN = """\
Stage two joins the tokenized pairs to the shards by key. The keys and sums of the stores (44 bytes a pair) are sorted
in memory and written to an index, which is then memory-mapped. Token logps go to one flat file, which is read batch
by batch. The benchmark simulates stores of random keys with four token logps a pair, in one process for each size.
Memory is the peak above what the imports hold. Above four million pairs, a random sample of four million is looked up
and the time is scaled to all.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the page of results and its pictures.")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs")
    chosen = parser.parse_args()
    names = ("cpu", "whole", "gpu", "join", "choosing")
    cpu, whole, gpu, joined, choosing = (_read(chosen.results / f"{name}.json") for name in names)
    chosen.docs.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Benchmarks",
        "",
        "refshard side by side with TRL's `DPOTrainer`. `make bench` measures everything that needs no GPU, in about "
        "an hour on two quiet cores, and writes this page. The command beside a table or a picture repeats that "
        "measurement alone; add `--json tests/bench/results/cpu.json` to put it on the page.",
        "",
        *(_processor_section(cpu["results"], chosen.docs) if cpu else ["Not measured. Command: `make bench`.", ""]),
        "## Whole runs on a real model",
        "",
        *(_whole_section(whole) if whole else ["Not measured. Command: `python tests/bench/whole.py --help`.", ""]),
        "## GPU",
        "",
        "Command: `make bench-gpu`",
        "",
        *(_gpu_section(gpu) if gpu else ["Not measured.", ""]),
        "## Join",
        "",
        JOIN,
        *(_join_section(joined, chosen.docs) if joined else ["Not measured. Command: `python tests/bench/join.py`."]),
    ]
    (chosen.docs / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    readme = chosen.docs.parent / "README.md"
    if cpu and readme.exists():
        write_comparison(cpu["results"], readme)
    page = chosen.docs / "choosing.md"
    if choosing and page.exists():
        draw_choices(choosing["runs"], frontier(choosing), chosen.docs / "choosing-kl.svg")
        draw_betas(choosing["runs"], chosen.docs / "choosing-beta.svg")
        replace_made(page, choices(choosing))


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _machines(results: Sequence[dict[str, Any]]) -> list[str]:
    return [line for said in dict.fromkeys(describe(r["machine"]) for r in results) for line in (f"{said}.", "")]


def _whole_section(found: dict[str, Any]) -> list[str]:
    measured = found["measured"]

    def middle(side: str, key: str) -> float:
        return median(one[key] for one in measured[side])

    ours = measured["ours"]
    rows = []
    for side, done in measured.items():
        ratios = [b["wall"] / a["wall"] for a, b in zip(ours, done, strict=True)]
        both = [zip(a["losses"], b["losses"], strict=True) for a, b in zip(ours, done, strict=True)]
        gap = max(abs(x - y) for losses in both for x, y in losses)
        numbers = [f"{middle(side, 'wall'):,.0f}", f"{middle(side, 'cpu'):,.0f}", f"{middle(side, 'peak') / MIB:,.0f}"]
        compared = ["", ""] if side == "ours" else [f"{median(ratios):.1f}x", f"{gap:.0e}"]
        rows.append([SIDES[side], *numbers, *compared])
    heads = ["", "wall, s", "CPU, s", "peak, MiB", "time over refshard's", "largest difference of a step's loss"]
    return [
        f"{describe(found['machine'])}.",
        "",
        f"Both command lines on the model {found['model']} and the first {found['pairs']} pairs of {found['data']}, in "
        f"float32, from their start to the saved policy, imports included; "
        f"{number_of(len(ours), 'interleaved round')}. refshard's store was finished after "
        f"{median(one['store'] for one in ours):,.0f} s. Command: `python tests/bench/whole.py --model DIR --data FILE "
        "--json tests/bench/results/whole.json`.",
        "",
        *table(heads, rows),
    ]


def _gpu_section(found: dict[str, Any]) -> list[str]:
    made = [f"{describe(found['machine'])}. One round.", "", *tables(found["results"]), *shape_table(found["results"])]
    for finding in found["findings"]:
        made += [f"**{finding['question']}**", "", "```text", *finding["lines"], "```", ""]
    if found["left_out"]:
        made += [
            "Not measured: " + "; ".join(f"{name} ({why.splitlines()[-1]})" for name, why in found["left_out"].items())
        ]
    return [*made, ""]


def _processor_section(results: Sequence[dict[str, Any]], docs: Path) -> list[str]:
    curves = {
        kind: [r for r in results if r["workload"]["name"].startswith(kind)] for kind in ("pairs-", "share-", "batch-")
    }
    rows = [r for r in results if not any(r in curve for curve in curves.values())]
    first = from_json(results[0]["workload"])
    made = ["## Machine", "", *_machines(results)]
    numbers = {"batch": first.peer_batch, "tokens": first.tokens_per_batch, "agreement": f"{AGREEMENT:.0e}"}
    made += [METHOD.format(long_run=LONG_RUN, **numbers)]
    if rows:
        draw_ratios(rows, docs / "bench-ratios.svg")
        draw_memory(rows, docs / "bench-memory.svg")
        made += ["## Against TRL", "", "![Ratio to TRL](bench-ratios.svg)", "", "Command: `make bench`", ""]
        made += [*describe_peer(r["workload"]["peers"][0] for r in rows), ""]
        made += [*tables(rows), "![Memory above the model](bench-memory.svg)", "", f"Command: `{RUN}`", ""]
        made += ["### Models and lengths", "", *shape_table(rows)]
    for kind, title, name, picture, draw in (
        ("pairs-", "Cost against the number of pairs", "curve-pairs", "bench-pairs.svg", draw_counts),
        ("share-", "Cost against the prompt's share", "curve-share", "bench-prompt-share.svg", draw_shares),
        ("batch-", "Against TRL's batch size", "curve-batch", None, None),
    ):
        if curves[kind]:
            made += [f"## {title}", ""]
            if draw is not None:
                draw(curves[kind], docs / picture)
                made += [f"![{title}]({picture})", ""]
            made += _curve(name, curves[kind])
    return made


def _curve(name: str, results: Sequence[dict[str, Any]]) -> list[str]:
    shape, rows = from_json(results[0]["workload"]).shape.describe(), []
    for result in results:
        peer = result["workload"]["peers"][0]
        measured, compared = sides(result, "wall"), compare(result, "wall", peer)
        seconds = [f"{measured[side].wall.middle:.2f}" for side in ("ours", peer)]
        rows.append([result["workload"]["name"], *seconds, f"{compared.ratio:.1f}x", f"{compared.gap:.0e}"])
    heads = ["", "refshard, s", f"{SIDES[results[0]['workload']['peers'][0]]}, s", "ratio", "largest difference"]
    return [f"Command: `{RUN} --only {name}`. {shape}; float32.", "", *table(heads, rows)]


def _join_section(results: dict[str, Any], docs: Path) -> list[str]:
    machine, sizes = results["machine"], ",".join(str(row["pairs"]) for row in results["series"])
    draw_join(results["series"], docs / "bench-join.svg")
    return [
        "![Cost of the join against the number of pairs](bench-join.svg)",
        "",
        f"Command: `python tests/bench/join.py --pairs {sizes}`. {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB.",
        "",
        *join_tables(results),
    ]


if __name__ == "__main__":
    main()
