"""Before a GPU is booked: what becomes of the rows, what both stages will take, and what stage one has done already.

The pairs are read and tokenized as stage one does it, and so counted alike. No weights are loaded; once shards are
there, digests of those on disk tell whether the shards are of this run, which reads them once.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch

from pipeline.base.errors import ConfigError, DataError, RefshardError, printable
from pipeline.base.folders import open_folder
from pipeline.config.schema import Config
from pipeline.data.intake import Ledger
from pipeline.data.loading import survey_pairs
from pipeline.data.rows import Source
from pipeline.data.sources import count_rows, describe, open_source
from pipeline.data.survey import PERCENTILES, REASONS, Survey, percentiles
from pipeline.models.files import load_tokenizer, model_settings, resolve_dtype
from pipeline.models.identity import check_dtypes, differences, identity_of_run
from pipeline.models.loading import pick_device
from pipeline.store.format import MANIFEST, pair_keys
from pipeline.store.store import Store, check_identity, is_finished, open_store, parts_there, read_manifest, read_parts
from stages.check.estimate import MEMORY_BAND, UTILISATION, Estimate, Lengths, StageEstimate, estimate, shapes_of
from stages.check.hardware import GB, Hardware, hardware_named
from stages.check.probe import Probe, probe_layer, this_hardware

__all__ = [
    "Limits",
    "run",
]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What fails the check; None: nothing does."""

    max_dropped: float | None = None
    """Share of the rows"""
    max_cut: float | None = None
    """Share of the kept pairs that have a completion cut"""
    max_memory: int | None = None
    """Bytes of one device"""
    max_hours: float | None = None
    """Of both stages together"""


@dataclass(frozen=True, kw_only=True)
class _Set:
    """One set of pairs, looked at."""

    source: Source
    ledger: Ledger
    survey: Survey
    rows: int | None
    """Of the whole set; None where only a full read would tell"""
    looked_at: int | None
    """Where only the first rows were looked at, how many; None: all"""

    @property
    def scale(self) -> float:
        """How many times as many rows the whole set has."""
        if self.looked_at is None or self.rows is None or not self.ledger.rows:
            return 1.0
        return self.rows / self.ledger.rows


def run(
    config: Config, *, hardware: str = "here", rows: int | None = None, limits: Limits | None = None, as_json: bool
) -> None:
    """Print what was found; fail afterwards, if something is above its limit or would stop a stage.

    Args:
        config: The run's settings.
        hardware: What the run is planned for, as `hardware_named` reads it; `here` or `cpu`: this machine.
        rows: Look at so many rows of each set only.
        limits: What fails the check.
        as_json: Print one JSON object instead of text.

    Raises:
        ConfigError: A setting is impossible, or more memory or time is needed than the limits allow.
        DataError: Rows would stop stage one, or more are dropped or cut than the limits allow.
        IdentityError: The stores that are there are not of this run.
    """
    limits = limits or Limits()
    options = config.train.options
    if not config.train.is_empty:
        check_dtypes(config)
    planned = None if hardware in ("here", "cpu") else hardware_named(hardware)
    tokenizer = load_tokenizer(config, weights=False)
    batch_pairs = int(options.get("per_device_train_batch_size", 8))
    sets = {
        name: _look_at(config, open_source(config.data, config.data.eval.get(name)), tokenizer, rows, batch_pairs)
        for name in ("train", *config.data.eval)
    }
    device = torch.device("cpu") if hardware == "cpu" else pick_device()
    stores = {} if config.reference.sync is not None else _look_at_stores(config, sets, tokenizer)
    estimated, probe = _estimate(config, sets, planned, device, stores)
    host = this_hardware(torch.device("cpu")).memory if planned is None else None
    report = _as_dict(sets, estimated, probe, host, stores)
    click.echo(json.dumps(report, indent=1) if as_json else "\n".join(map(printable, _as_text(report, config))))
    if any(entry.get("differences") for entry in stores.values()):
        check_identity(_stores_there(config, stores), identity_of_run(config, tokenizer))
    _fail([*_problems(config, sets, stores), *_above_limits(sets, estimated, limits)])


def _look_at(config: Config, source: Source, tokenizer: Any, rows: int | None, batch_pairs: int) -> _Set:
    total = count_rows(source)
    looked_at = source
    if rows is not None and (total is None or total > rows):
        looked_at = dataclasses.replace(source, stop=source.start + rows)
    ledger = Ledger()
    survey = survey_pairs(
        looked_at,
        tokenizer,
        # One bad row would hide all the others; whether it stops a stage is said at the end.
        dataclasses.replace(config.data, on_bad_row="skip"),
        ledger,
        rows_per_unit=config.precompute.rows_per_shard,
        batch_pairs=batch_pairs,
    )
    part = looked_at is not source and (total is not None or ledger.rows == rows)
    return _Set(source=source, ledger=ledger, survey=survey, rows=total, looked_at=rows if part else None)


def _lengths(sets: list[_Set]) -> Lengths | None:
    """The tokens of some sets together, those of the rows that were not looked at included."""
    pairs = Lengths(
        pairs=sum(round(s.scale * s.ledger.kept) for s in sets),
        prompt_tokens=sum(round(s.scale * s.survey.scored["prompt"]) for s in sets),
        chosen_tokens=sum(round(s.scale * s.survey.scored["chosen"]) for s in sets),
        rejected_tokens=sum(round(s.scale * s.survey.scored["rejected"]) for s in sets),
        longest_pair=max((percentiles(s.survey.lengths.get("pair", {})).get("p100", 0) for s in sets), default=0),
        usual_pair=max((percentiles(s.survey.lengths.get("pair", {})).get("p95", 0) for s in sets), default=0),
        shared_tokens=sum(round(s.scale * s.survey.shared_tokens) for s in sets),
    )
    return pairs if pairs.pairs else None


def _estimate(
    config: Config,
    sets: Mapping[str, _Set],
    planned: Hardware | None,
    device: torch.device,
    stores: Mapping[str, Mapping[str, Any]],
) -> tuple[Estimate | None, Probe | None]:
    """Estimate on the planned hardware, or on this machine, whose speed is measured then."""
    lengths = _lengths([sets["train"]])
    if lengths is None:
        return None, None
    policy_model, reference_model = model_settings(config)
    shapes = shapes_of(policy_model, config.policy)
    reference = None if reference_model is policy_model else shapes_of(reference_model)
    dtype = resolve_dtype(config.reference.dtype, reference_model.to_dict())
    probe = None
    if planned is None:
        options = config.train.options
        sixteen = torch.bfloat16 if options.get("bf16") else torch.float16 if options.get("fp16") else None
        probe = probe_layer(
            policy_model,
            shapes,
            device,
            scoring=dtype,
            training=resolve_dtype(config.policy.dtype, policy_model.to_dict()),
            autocast=sixteen,
        )
    estimated = estimate(
        config,
        shapes,
        lengths,
        planned or this_hardware(device),
        reference=reference,
        reference_dtype=dtype,
        held_out=_lengths([entry for name, entry in sets.items() if name != "train"]),
        measured=None if probe is None else (probe.forward, probe.training),
        unscored=_unscored(sets, stores),
    )
    return estimated, probe


def _unscored(sets: Mapping[str, _Set], stores: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """Share of the training pairs, and of all held-out ones, that no store has."""
    tokens: dict[bool, list[float]] = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for name, entry in sets.items():
        of_set = entry.scale * entry.survey.shared_tokens
        counts = tokens[name == "train"]
        counts[0] += of_set * _missing_share(stores.get(name, {}), entry.ledger.kept)
        counts[1] += of_set
    train, held_out = (missing / whole if whole else 1.0 for missing, whole in (tokens[True], tokens[False]))
    return train, held_out


def _missing_share(store: Mapping[str, Any], kept: int) -> float:
    """Share of a set that its store lacks; all of it where the store is another run's or its rows are not known."""
    if store.get("differences"):
        return 1.0
    if store.get("state") == "finished":
        return float(store.get("pairs_missing", 0) / max(1, kept))
    return float(store["rows_missing"] / max(1, store["rows_of_set"])) if "rows_missing" in store else 1.0


def _look_at_stores(config: Config, sets: Mapping[str, _Set], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Say of each set what stage one has done, what is missing, and what disagrees with this run."""
    identity = None
    stores: dict[str, dict[str, Any]] = {}
    for name, looked in sets.items():
        folder = open_folder(config.precompute.output).child(name)
        if folder.size(MANIFEST) is None:
            stores[name] = {"folder": str(folder), "state": "not begun"}
            continue
        # Takes digests of the weights, so it is left until it is needed.
        identity = identity or identity_of_run(config, tokenizer)
        manifest = read_manifest(folder)
        there = parts_there(folder)
        finished = is_finished(folder)
        entry: dict[str, Any] = {
            "folder": str(folder),
            "state": "finished" if finished else "unfinished",
            "differences": differences(manifest["identity"], identity, joining=True),
            "units_done": len(there),
        }
        size = int(manifest["plan"].get("rows_per_shard", config.precompute.rows_per_shard))
        total = looked.rows if looked.rows is not None else None if looked.looked_at else looked.ledger.rows
        if finished:
            entry["units"] = entry["units_done"]
            entry["totals"] = open_store(folder).index["totals"]
            if looked.looked_at is None and not entry["differences"]:
                keys = (_first_bytes(pair_keys(part)) for part in read_parts(open_store(folder), ["pair_key"]))
                entry["pairs_missing"] = looked.survey.missing_from(keys)
        elif total is not None and "window" not in manifest["plan"]:
            entry["units"] = -(-total // size)
            entry["rows_of_set"] = total
            entry["rows_missing"] = sum(
                min(size, total - unit * size) for unit in range(entry["units"]) if unit not in there
            )
        stores[name] = entry
    return stores


def _stores_there(config: Config, stores: Mapping[str, Any]) -> list[Store]:
    """The stores that have begun, known by their manifests alone."""
    output = open_folder(config.precompute.output)
    folders = [output.child(name) for name, entry in stores.items() if entry["state"] != "not begun"]
    return [Store(folder=folder, manifest=read_manifest(folder), index={}) for folder in folders]


def _first_bytes(keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of each key as a number, as the survey has them."""
    return keys.view(np.uint8).reshape(-1, 16)[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64)


def _as_dict(
    sets: Mapping[str, _Set],
    estimated: Estimate | None,
    probe: Probe | None,
    host: int | None,
    stores: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "sets": {name: _set_as_dict(entry) for name, entry in sets.items()},
        "estimate": None if estimated is None else _estimate_as_dict(estimated, probe, host),
        "stores": dict(stores),
    }


def _set_as_dict(entry: _Set) -> dict[str, Any]:
    survey, ledger = entry.survey, entry.ledger
    scored = {side: int(survey.scored[side]) for side in ("prompt", "chosen", "rejected")}
    unshared = 2 * scored["prompt"] + scored["chosen"] + scored["rejected"]
    return {
        "dataset": describe(entry.source),
        "rows_of_set": entry.rows,
        "only_first_rows": entry.looked_at,
        **ledger.as_dict(),
        "found": dict(sorted(survey.found.items())),
        "examples": {
            reason: [dataclasses.asdict(example) for example in examples]
            for reason, examples in sorted(survey.examples.items())
        },
        "lengths": {name: percentiles(counts) for name, counts in sorted(survey.lengths.items())},
        "tokens": {
            **scored,
            "unshared": unshared,
            "shared": survey.shared_tokens,
            "padded": survey.padded_tokens,
            "padded_batch_pairs": survey.batch_pairs,
        },
        "duplicates": survey.duplicates,
        "prompts": survey.prompt_groups(),
    }


def _estimate_as_dict(estimated: Estimate, probe: Probe | None, host: int | None) -> dict[str, Any]:
    stages = {"precompute": estimated.precompute, "train": estimated.train}
    return {
        "hardware": dataclasses.asdict(estimated.hardware),
        "memory_band": MEMORY_BAND,
        "utilisation": None if estimated.precompute.measured else UTILISATION,
        "probe": None if probe is None else dataclasses.asdict(probe),
        "stages": {name: dataclasses.asdict(stage) for name, stage in stages.items() if stage is not None},
        "host_memory": estimated.host_memory,
        "host_memory_here": host,
        "disk": dict(estimated.disk),
    }


def _as_text(report: Mapping[str, Any], config: Config) -> list[str]:
    lines: list[str] = []
    for name, entry in report["sets"].items():
        lines += [*_set_as_text(name, entry, config), ""]
    if report["estimate"] is not None:
        lines += [*_estimate_as_text(report["estimate"]), ""]
    lines += _stores_as_text(report["stores"])
    return lines


def _set_as_text(name: str, entry: Mapping[str, Any], config: Config) -> list[str]:
    lines = [f"{name}: {entry['dataset']}"]
    if entry["only_first_rows"] is not None:
        total = "an unknown number" if entry["rows_of_set"] is None else f"{entry['rows_of_set']:,}"
        known = "not of the whole set" if entry["rows_of_set"] is None else "extended to the whole set"
        lines.append(f"  only the first {entry['rows']:,} of {total} rows; the estimates are {known}")
    lines.append(f"  rows          {entry['rows']:,} in, {entry['kept']:,} kept{_share(entry['kept'], entry['rows'])}")
    for kind, counts, whole in (("dropped", entry["dropped"], "rows"), ("found", entry["found"], "kept")):
        for reason, count in counts.items():
            meaning = REASONS.get(reason, reason.replace("_", " "))
            lines.append(f"  {kind:14}{count:,}{_share(count, entry[whole])}: {meaning}")
            lines += [f"    {shown['place']}: {shown['text']}" for shown in entry["examples"].get(reason, ())]
    if entry["lengths"]:
        lines += ["", f"  {'tokens':22}" + "".join(f"{f'{p}%' if p < 100 else 'max':>8}" for p in PERCENTILES)]
        for label in ("prompt", "chosen", "rejected", "total"):
            values = entry["lengths"][label]
            lines.append(f"  {label:22}" + "".join(f"{values[f'p{p}']:>8,}" for p in PERCENTILES))
        lines.append(f"  before truncation at max_length {config.data.max_length}; total: prompt and longer completion")
    tokens = entry["tokens"]
    if entry["kept"]:
        lines += [
            "",
            f"  computed      {tokens['shared']:,} tokens with shared prompts, {tokens['unshared']:,} without "
            f"(saves {1 - tokens['shared'] / tokens['unshared']:.0%}), {tokens['padded']:,} in padded batches of "
            f"{tokens['padded_batch_pairs']} pairs (saves {1 - tokens['shared'] / tokens['padded']:.0%})",
            f"  equal         {entry['duplicates']:,} pairs are duplicates; {entry['prompts']['distinct']:,} "
            f"distinct prompts, {entry['prompts']['shared']:,} of them in several pairs, at most "
            f"{entry['prompts']['largest']:,}",
        ]
    return lines


def _share(count: int, whole: int) -> str:
    return f" ({count / whole:.1%})" if whole else ""


def _estimate_as_text(entry: Mapping[str, Any]) -> list[str]:
    hardware = Hardware(**entry["hardware"])
    lines = [f"about, on {hardware.label} ({_gb(hardware.memory)} each; {hardware.source})"]
    for name, stage in entry["stages"].items():
        made = StageEstimate(**stage)
        if not made.tokens:
            lines.append(f"  {name:14}done")
            continue
        low, high = made.memory_range
        parts = ", ".join(f"{part} {_gb(size)}" for part, size in sorted(made.memory.items(), key=lambda i: -i[1])[:4])
        verdict = "too much" if low > hardware.memory else "maybe too much" if high > hardware.memory else "fits"
        steps = f", {made.steps:,} steps" if made.steps else ""
        lines += [
            f"  {name:14}{_time(made.seconds)} for {made.tokens:,} tokens{steps}",
            f"  {'':14}{_gb(made.total_memory)} of memory a device ({_gb(low)} to {_gb(high)}: {verdict}): {parts}; "
            f"at {made.batch_tokens:,} tokens at once",
        ]
    lines.append(f"  {'CPU memory':14}{_host_memory(entry['host_memory'], entry['host_memory_here'])}")
    disk = ", ".join(f"{part} {_gb(size)}" for part, size in entry["disk"].items())
    lines.append(f"  {'disk':14}{_gb(sum(entry['disk'].values()))}: {disk}")
    if entry["probe"] is not None:
        probe = entry["probe"]
        lines.append(
            f"  Measured here: one layer of the model reaches {probe['forward'] / 1e9:,.0f} GFLOP/s "
            f"forward, {probe['training'] / 1e9:,.0f} in training ({probe['device']}). The rest is arithmetic."
        )
    elif hardware.tflops_16bit is None:
        lines.append("  Nothing is measured, and the speed of this hardware is not known: no times.")
    else:
        bad, usual, good = entry["utilisation"]
        lines.append(
            f"  Nothing is measured: {usual:.0%} of the data sheet's peak is assumed ({bad:.0%} to {good:.0%} in the "
            "range), and memory counted from the model's config."
        )
    return lines


def _host_memory(needed: int, here: int | None) -> str:
    text = f"{_gb(needed)} on the machine, all its processes together, while each loads the policy whole"
    if here is None:
        return text
    return f"{text}: {'too much' if needed > here else 'fits'}, this machine has {_gb(here)}"


def _gb(size: float) -> str:
    for unit, name in ((GB, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}" if size < 100 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 1000:,.0f} kB"


def _time(seconds: tuple[float, float, float] | None) -> str:
    if seconds is None:
        return "no time known"
    best, about, worst = seconds
    unit, name = (3600, "hours") if about >= 3600 else (60, "minutes") if about >= 60 else (1, "seconds")
    return f"{about / unit:,.1f} {name} ({best / unit:,.1f} to {worst / unit:,.1f})"


def _stores_as_text(stores: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, entry in stores.items():
        if entry["state"] == "not begun":
            lines.append(f"stage one, {name}: not begun in {entry['folder']}")
            continue
        of = f" of {entry['units']:,}" if "units" in entry else ""
        missing = f"; {entry['rows_missing']:,} rows missing" if entry.get("rows_missing") else ""
        missing += f"; {entry['pairs_missing']:,} pairs missing" if entry.get("pairs_missing") else ""
        lines.append(
            f"stage one, {name}: {entry['state']}, {entry['units_done']:,}{of} units in {entry['folder']}{missing}"
        )
        lines += [f"  differs in {difference}" for difference in entry["differences"]]
    return lines


def _problems(config: Config, sets: Mapping[str, _Set], stores: Mapping[str, Any]) -> list[RefshardError]:
    """What would stop a stage. (Stores of another run do too, and are refused by then.)"""
    problems: list[RefshardError] = []
    policy, reference = model_settings(config)
    size = min(policy.vocab_size, reference.vocab_size)
    for name, entry in sets.items():
        ledger, survey = entry.ledger, entry.survey
        bad = {reason: n for reason, n in ledger.dropped.items() if reason not in ("prompt_too_long", "identical")}
        if bad and config.data.on_bad_row == "stop":
            first = min((survey.examples[reason][0] for reason in bad), key=lambda example: example.row)
            count = sum(bad.values())
            problems.append(
                DataError(
                    f"{count:,} {'row' if count == 1 else 'rows'} of {describe(entry.source)} can't be pairs and would "
                    f"stop stage one (first: {first.place}: {first.text}). Set data.on_bad_row: skip, or mend them"
                )
            )
        if ledger.kept == 0:
            problems.append(
                DataError(
                    f"{describe(entry.source)}: no pair was kept, so there is nothing to train on: {ledger.summary()}"
                )
            )
        if survey.highest_id >= size:
            problems.append(
                ConfigError(
                    f"policy.model: a pair of {describe(entry.source)} holds token id {survey.highest_id}, but the "
                    f"vocabulary has {size}; weights and tokenizer, or reference and policy, do not belong together"
                )
            )
        missing = stores.get(name, {}).get("pairs_missing", 0)
        if missing and config.train.on_missing == "stop":
            problems.append(
                DataError(
                    f"{missing:,} of {ledger.kept:,} pairs of {describe(entry.source)} have no reference logps in "
                    f"{stores[name]['folder']}: the dataset has changed since they were scored. Score again "
                    "into a new precompute.output, or train without these pairs: train.on_missing: drop"
                )
            )
    return problems


def _above_limits(sets: Mapping[str, _Set], estimated: Estimate | None, limits: Limits) -> list[RefshardError]:
    """What is above its limit, with what was found and what is allowed."""
    found: list[RefshardError] = []
    for name, entry in sets.items():
        ledger = entry.ledger
        for flag, most, count, whole, words in (
            ("--max-dropped", limits.max_dropped, ledger.rows - ledger.kept, ledger.rows, "rows are dropped"),
            ("--max-cut", limits.max_cut, ledger.noted["truncated"], ledger.kept, "pairs are cut at data.max_length"),
        ):
            if most is not None and whole and count > most * whole:
                found.append(
                    DataError(f"{name}: {count:,} of {whole:,} {words} ({count / whole:.2%}); {flag} allows {most:.2%}")
                )
    if estimated is None:
        return found
    stages = {"precompute": estimated.precompute, "train": estimated.train}
    hours = 0.0
    for name, stage in stages.items():
        if stage is None or not stage.tokens:
            continue
        if limits.max_memory is not None and stage.total_memory > limits.max_memory:
            found.append(
                ConfigError(
                    f"{name}: needs about {_gb(stage.total_memory)} of memory a device; --max-memory allows "
                    f"{_gb(limits.max_memory)}"
                )
            )
        if stage.seconds is None and limits.max_hours is not None:
            found.append(ConfigError(f"--max-hours: the speed of {estimated.hardware.label} is not known"))
            return found
        hours += stage.seconds[1] / 3600 if stage.seconds is not None else 0
    if limits.max_hours is not None and hours > limits.max_hours:
        found.append(ConfigError(f"both stages take about {hours:,.2f} hours; --max-hours allows {limits.max_hours:g}"))
    return found


def _fail(problems: list[RefshardError]) -> None:
    """Raise the first problem's error, which says all."""
    if problems:
        raise type(problems[0])("; ".join(map(str, problems)))
