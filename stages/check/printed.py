"""Write the findings of a check as one JSON object, or as lines of text."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from pipeline.base.errors import number_of, printable
from pipeline.base.tables import aligned
from pipeline.data.reading import written_forms
from pipeline.data.sources import describe
from pipeline.data.survey import PERCENTILES, REASONS, Survey, percentiles
from stages.check.estimate import MEMORY_BAND, UTILISATION, Estimate, StageEstimate
from stages.check.findings import Findings, PairSet, StoreState
from stages.check.hardware import GB

__all__ = ["as_dict", "as_text", "estimate_lines", "gigabytes"]


def as_dict(found: Findings) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "sets": {name: _set_as_dict(pairs) for name, pairs in found.sets.items()},
        "template_date": found.template_date,
        "start": found.start,
        "refused_here": None if found.refused_here is None else str(found.refused_here),
        "estimate": None if found.estimate is None else _estimate_as_dict(found.estimate, found.host_memory),
        "stores": {
            name: {key: value for key, value in dataclasses.asdict(state).items() if value is not None}
            for name, state in found.stores.items()
        },
        "joined": None if found.joined is None else dataclasses.asdict(found.joined),
    }


def _set_as_dict(pairs: PairSet) -> dict[str, Any]:
    survey = pairs.survey
    return {
        "dataset": describe(pairs.source),
        "rows_of_set": pairs.rows,
        "only_first_rows": pairs.only_first_rows,
        "read_as": dict(survey.forms),
        "columns_not_read": list(pairs.reading.unread),
        "reading": dict(pairs.reading.findings),
        **pairs.ledger.as_dict(),
        "found": dict(sorted(survey.found.items())),
        "examples": {
            reason: [dataclasses.asdict(example) for example in examples]
            for reason, examples in sorted(survey.examples.items())
        },
        "lengths": {name: percentiles(counts) for name, counts in sorted(survey.lengths.items())},
        "tokens": {
            **{side: survey.scored[side] for side in ("prompt", "chosen", "rejected")},
            "unshared": _unshared_tokens(survey),
            "shared": survey.shared_tokens,
            "padded": survey.padded_tokens,
            "padded_batch_pairs": survey.batch_pairs,
        },
        "duplicates": survey.duplicates,
        "prompts": survey.prompt_groups(),
    }


def _unshared_tokens(survey: Survey) -> int:
    return survey.scored.total() + survey.scored["prompt"]


def _estimate_as_dict(estimate: Estimate, host_memory_here: int | None) -> dict[str, Any]:
    return {
        "hardware": dataclasses.asdict(estimate.hardware),
        "memory_band": MEMORY_BAND,
        "utilisation": None if estimate.probe else UTILISATION,
        "probe": estimate.probe and estimate.probe._asdict(),
        "stages": {
            name: dataclasses.asdict(stage) | {"measured": estimate.probe is not None}
            for name, stage in estimate.stages.items()
        },
        "host_memory": estimate.host_memory,
        "host_memory_here": host_memory_here,
        "disk": dict(estimate.disk),
    }


def as_text(found: Findings, max_length: int | None) -> str:
    """Return the text for people, made printable, since it quotes the data."""
    lines: list[str] = []
    for name, pairs in found.sets.items():
        lines += [f"{name}: {describe(pairs.source)}", *_set_lines(pairs, max_length), ""]
    if found.template_date is not None:
        lines += [f"template date: {found.template_date}, which the chat template asks for (data.template_date)", ""]
    if found.refused_here is not None:
        lines += [f"warning: refshard train would stop on this machine: {found.refused_here}", ""]
    if found.start is not None:
        lines += [f"warning: {found.start}", ""]
    if found.estimate is not None:
        lines += [*estimate_lines(found.estimate, found.host_memory), ""]
    for name, state in found.stores.items():
        lines += _store_lines(name, state)
    if found.joined is not None:
        size, folder = found.joined.bytes, found.joined.folder
        found_as = "not there, stage two makes them" if size is None else f"{gigabytes(size)}, taken as they are"
        lines.append(f"joined sets: {found_as}; {folder}")
    return "\n".join(map(printable, lines))


def _set_lines(pairs: PairSet, max_length: int | None) -> Iterator[str]:
    ledger, survey = pairs.ledger, pairs.survey
    if pairs.only_first_rows is not None:
        total = "an unknown number of" if pairs.rows is None else f"{pairs.rows:,}"
        known = "not of the whole set" if pairs.rows is None else "extended to the whole set"
        yield f"  only the first {ledger.rows:,} of {total} rows; the estimates are {known}"
    yield f"  read as       {written_forms(survey.forms)}; columns not read: {pairs.reading.columns_not_read}"
    if pairs.reading.first is not None:
        yield f"  first row     {pairs.reading.first}"
    yield f"  rows          {ledger.rows:,} in, {ledger.kept:,} kept{_share(ledger.kept, ledger.rows)}"
    for kind, counts, whole in (("dropped", ledger.dropped, ledger.rows), ("found", survey.found, ledger.kept)):
        for reason, count in sorted(counts.items()):
            if reason == "truncated" and count == counts["eos_cut"]:
                continue  # said with EOS
            yield f"  {kind:14}{count:,}{_share(count, whole)}: {REASONS.get(reason, reason.replace('_', ' '))}"
            yield from (f"    {example.place}: {example.text}" for example in survey.examples.get(reason, ()))
    for name, text in pairs.reading.findings.items():
        # The text of a refusal is the command's error.
        yield f"  found         {name.replace('_', ' ')}" + ("" if text in str(pairs.reading.refused) else f": {text}")
    if survey.lengths:
        yield ""
        rows = [["tokens", *(f"{p}%" if p < 100 else "max" for p in PERCENTILES)]]
        for label in ("prompt", "chosen", "rejected", "total"):
            rows.append([label, *(f"{length:,}" for length in percentiles(survey.lengths[label]).values())])
        yield from (f"  {line}" for line in aligned(rows))
        yield f"  Lengths before the cut at max_length {max_length}. Total: prompt and longer completion."
    if ledger.kept:
        shared, unshared, padded = survey.shared_tokens, _unshared_tokens(survey), survey.padded_tokens
        prompts = survey.prompt_groups()
        yield ""
        yield (
            f"  computed      {shared:,} tokens with shared prompts, {unshared:,} without (saves "
            f"{1 - shared / unshared:.0%}), {padded:,} in padded batches of {survey.batch_pairs} pairs (saves "
            f"{1 - shared / padded:.0%})"
        )
        yield (
            f"  equal         {survey.duplicates:,} duplicate pairs; {prompts['distinct']:,} distinct prompts, "
            f"{prompts['shared']:,} of them in several pairs"
            + (f" (one in {prompts['largest']:,})" if prompts["shared"] else "")
        )


def _share(count: int, whole: int) -> str:
    return f" ({count / whole:.1%})" if whole else ""


def estimate_lines(estimate: Estimate, host_memory_here: int | None) -> Iterator[str]:
    """Yield the lines about both stages, the CPU's memory (its size here, if known) and the disk."""
    hardware, probe, needed = estimate.hardware, estimate.probe, estimate.host_memory
    each = " each" if hardware.count > 1 else ""
    yield f"Estimate for {hardware.label}: {gigabytes(hardware.memory)} of memory{each} ({hardware.source})"
    for name, stage in estimate.stages.items():
        yield from _stage_lines(name, stage, hardware.memory)
    verdict = ""
    if host_memory_here is not None:
        fits = "too much" if needed > host_memory_here else "fits"
        verdict = f": {fits}, this machine has {gigabytes(host_memory_here)}"
    yield (
        f"  {'CPU memory':14}{gigabytes(needed)} on the machine for all its processes together, while the policy is "
        f"loaded{verdict}"
    )
    disk = ", ".join(f"{part} {gigabytes(size)}" for part, size in estimate.disk.items())
    yield f"  {'disk':14}{gigabytes(estimate.total_disk)}: {disk}"
    if probe is not None:
        yield (
            f"  One layer of the model was measured on this machine: {probe.forward / 1e9:,.0f} GFLOP/s forward, "
            f"{probe.training / 1e9:,.0f} in training. All other numbers are computed."
        )
    elif hardware.tflops_16bit is None:
        yield "  Nothing was measured. The speed of this hardware is not known, so times are not estimated."
    else:
        bad, usual, good = UTILISATION
        yield (
            f"  Nothing was measured: {usual:.0%} of the data sheet's peak is assumed ({bad:.0%} to {good:.0%} for the "
            "range). Memory is computed from the model's config."
        )


def _stage_lines(name: str, stage: StageEstimate, memory: int) -> Iterator[str]:
    if not stage.tokens:
        yield f"  {name:14}done"
        return
    low, high = (share * stage.total_memory for share in MEMORY_BAND)
    largest = sorted(stage.memory.items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{part} {gigabytes(size)}" for part, size in largest)
    verdict = "too much" if low > memory else "maybe too much" if high > memory else "fits"
    steps = f", {number_of(stage.steps, 'step')}" if stage.steps else ""
    yield f"  {name:14}{_time(stage.seconds)} for {stage.tokens:,} tokens{steps}"
    yield (
        f"  {'':14}{gigabytes(stage.total_memory)} of memory on each device ({gigabytes(low)} to {gigabytes(high)}: "
        f"{verdict}): {parts}; {stage.batch_tokens:,} tokens in a batch"
    )


def gigabytes(size: float) -> str:
    """Write a number of bytes in the unit that fits."""
    unit, name = (GB, "GB") if size >= GB else (10**6, "MB") if size >= 10**6 else (1000, "kB")
    digits = 1 if unit > 1000 and size < 100 * unit else 0
    return f"{size / unit:,.{digits}f} {name}"


def _time(seconds: tuple[float, float, float] | None) -> str:
    if seconds is None:
        return "unknown time"
    best, about, worst = seconds
    unit, name = (3600, "hours") if about >= 3600 else (60, "minutes") if about >= 60 else (1, "seconds")
    return f"{about / unit:,.1f} {name} ({best / unit:,.1f} to {worst / unit:,.1f})"


def _store_lines(name: str, state: StoreState) -> Iterator[str]:
    if state.units_done is None:
        yield f"stage one, {name}: not begun in {state.folder}"
        return
    of = "" if state.units is None else f" of {state.units:,}"
    missing = f"; {state.rows_missing:,} rows missing" if state.rows_missing else ""
    missing += f"; {state.pairs_missing:,} pairs missing" if state.pairs_missing else ""
    yield f"stage one, {name}: {state.state}, {state.units_done:,}{of} units in {state.folder}{missing}"
    yield from (f"  differs in {difference}" for difference in state.differences or ())
