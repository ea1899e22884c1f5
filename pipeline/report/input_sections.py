"""Sections about inputs and cost: the rows of each set, reference and policy, time and memory of both stages."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

from pipeline.base.nested import flatten
from pipeline.report.comparison import Shown, by_equal, runs_table
from pipeline.report.pages import Section, facts, table
from pipeline.run.reading import Run, part

__all__ = ["input_sections"]


def input_sections(shown: Sequence[Shown]) -> list[Section]:
    """Make the sections Data, Reference and policy, and Cost; a section without content is left out."""
    sections = [_data(shown), _identity(shown), _cost(shown)]
    return [section for section in sections if section.body]


def _data(shown: Sequence[Shown]) -> Section:
    header = ["set", "source", "rows", "kept", "dropped", "remarks", "joined", "missing", "an epoch"]
    header += ["prompt tokens", "chosen tokens", "rejected tokens", "noise floor, nats per token"]
    note = "These are the rows of the last attempt. A joined pair has its reference log-probs; a missing pair has none."
    if any(part(one.run.settings, "reference", "sync") for one in shown):
        note += " If the reference moves, the numbers are those of the last window."
    return Section(title="Data", body=by_equal(shown, _data_rows, lambda rows: table(header, rows)), note=note)


def _data_rows(run: Run) -> list[list[object]]:
    moves = bool(part(run.settings, "reference", "sync"))
    rows: list[list[object]] = []
    for name, given in sorted(part(run.inputs, "sets").items(), key=_train_first):
        ledger, tokens, noise = (part(given, key) for key in ("ledger", "tokens", "noise"))
        rows.append(
            [
                name,
                given.get("dataset"),
                ledger.get("rows"),
                ledger.get("kept"),
                _counts(ledger.get("dropped")),
                _counts(ledger.get("noted")),
                # A window of held-out sets alone joins no training pairs.
                None if moves and not given.get("store") else given.get("matched"),
                # All pairs outside of the window are missing, as they should be.
                None if moves else given.get("missing"),
                given.get("of_epoch"),
                *(tokens.get(side) for side in ("prompt", "chosen", "rejected")),
                f"{noise['mean']:.2g}, {noise['largest']:.2g} at most" if noise.get("tokens") else "not measured",
            ]
        )
    return rows


def _counts(counts: Mapping[str, int] | None) -> str:
    return ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in (counts or {}).items()) or "none"


def _identity(shown: Sequence[Shown]) -> Section:
    body = by_equal(shown, lambda run: _identity_facts(run.inputs), facts)
    return Section(title="Reference and policy", body=body, note="Digests are SHA-256 of content, as in the shards.")


def _identity_facts(inputs: Mapping[str, Any]) -> dict[str, object]:
    reference, policy = part(inputs, "reference"), part(inputs, "policy")
    if not reference and not policy:
        return {}
    step = _moved_after(inputs)
    moved = f" as moved after step {step:,}" if step else ""
    found: dict[str, object] = {"reference": reference.get("name")}
    found[f"fingerprint{moved}"] = reference.get("fingerprint")
    found |= {f"reference{moved}, {key}": value for key, value in flatten(part(reference, "identity")).items()}
    found |= {"policy before training": policy.get("model"), "policy, adapter": policy.get("adapter") or "none"}
    total, trained = policy.get("parameters"), policy.get("trained_parameters")
    if total and trained is not None:
        share = f" ({trained / total:.2%})" if trained < total else ""
        found["policy, parameters"] = f"{total:,}, of which {trained:,}{share} are trained"
    found["policy, dtype"] = policy.get("dtype")
    return {name: value for name, value in found.items() if value is not None}


def _moved_after(inputs: Mapping[str, Any]) -> int | None:
    """Give the step of the moved reference that scored the sets; None for the first reference."""
    folders = [str(given.get("store")) for given in part(inputs, "sets").values()]
    steps = [int(found[1]) for folder in folders if (found := re.search(r"/references/step-(\d+)/", folder))]
    return max(steps, default=None)


def _cost(shown: Sequence[Shown]) -> Section:
    header = ["stage one", "workers", "pairs", "tokens", "time of all workers", "tokens/s of a worker"]
    header += ["peak memory of a worker", "device"]
    body = by_equal(shown, _stage_one_rows, lambda rows: table(header, rows))
    if rows := [(one, _stage_two_row(one.run)) for one in shown if one.run.attempts]:
        header_two = ["stage two", "processes", "steps", "steps repeated", "tokens", "time", "peak memory", "device"]
        body += runs_table(header_two, rows)
    note = (
        "All runs on a store share its stage one. The time includes scoring, training and evaluation, but not loading. "
        "Memory is the GPU's, or that of the process if there is no GPU; with several processes, that of the first. "
        "A pair's tokens are those of prompt and chosen plus those of prompt and rejected."
    )
    return Section(title="Cost", body=body, note=note)


def _stage_one_rows(run: Run) -> list[list[object]]:
    by_set: dict[str, list[Mapping[str, Any]]] = {}
    for cost in run.inputs.get("stage_one") or []:
        by_set.setdefault(str(cost.get("set")), []).append(cost)
    rows = [_stage_one_row(name, costs) for name, costs in sorted(by_set.items(), key=_train_first)]
    if len(rows) > 1:
        rows.append(_stage_one_row("all", [cost for costs in by_set.values() for cost in costs]))
    return rows


def _train_first(item: tuple[str, object]) -> tuple[bool, str]:
    return item[0] != "train", item[0]


def _stage_one_row(name: str, costs: Sequence[Mapping[str, Any]]) -> list[object]:
    pairs, tokens, seconds = (math.fsum(cost.get(key) or 0 for cost in costs) for key in ("pairs", "tokens", "seconds"))
    return [
        name,
        len({cost.get("worker") for cost in costs}),
        int(pairs),
        int(tokens),
        str(timedelta(seconds=round(seconds))),
        int(tokens / seconds) if seconds else None,
        _memory(max(cost.get("memory_bytes") or 0 for cost in costs)),
        ", ".join(sorted({str(cost.get("device")) for cost in costs})),
    ]


def _stage_two_row(run: Run) -> list[object]:
    attempts = run.attempts
    tokens = run.curve("num_tokens").last
    return [
        f"{len(attempts):,} {'attempt' if len(attempts) == 1 else 'attempts'}",
        attempts[-1].processes,
        run.step,
        sum(max(before.last_step - after.step, 0) for before, after in pairwise(attempts)),
        None if tokens is None else int(tokens),
        str(timedelta(seconds=round(math.fsum(attempt.seconds for attempt in attempts)))),
        _memory(max(attempt.memory_bytes or 0 for attempt in attempts)),
        ", ".join(dict.fromkeys(attempt.device for attempt in attempts if attempt.device)),
    ]


def _memory(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size else "not measured"
