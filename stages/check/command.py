"""Check a run before a GPU is booked: its rows, the cost of both stages, and what stage one has already done.

The pairs are read and tokenized as stage one does it, and so counted alike. No weights are loaded. If there are shards,
the weights on disk are read once for their digests, which tell if the shards are this run's.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click
import torch

from pipeline.base.errors import ConfigError, DataError, RefshardError, number_of
from pipeline.config.schema import Config
from pipeline.data.dates import asks_for_date
from pipeline.data.sources import describe
from pipeline.data.survey import Survey
from pipeline.models.adapters import check_adapters
from pipeline.models.files import load_tokenizer, model_settings
from pipeline.models.identity import check_dtypes, identity_of_run, precisions_apart
from pipeline.models.lengths import check_max_length, exact_length_of_reference, length_error, most_positions
from pipeline.models.loading import pick_device
from pipeline.models.precision import policy_precision, reference_precision
from pipeline.scoring.agreement import token_noise
from pipeline.store.dating import with_template_date
from pipeline.store.serving import remedy_for_missing
from pipeline.store.store import check_identity, load_store
from pipeline.training.arguments import refused_here
from pipeline.training.settings import check_training, too_few_pairs
from stages.check.estimate import Estimate, estimate
from stages.check.findings import Findings, PairSet, add_up, look_at_joined, look_at_set, look_at_stores
from stages.check.hardware import Hardware, hardware_named
from stages.check.printed import as_dict, as_text, gigabytes
from stages.check.probe import probe_layer, this_hardware
from stages.check.shapes import shapes_of

__all__ = ["Limits", "above_limits", "run"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Values above which the check fails; None: no limit."""

    max_dropped: float | None = None
    """Share of the rows."""
    max_cut: float | None = None
    """Share of the kept pairs."""
    max_memory: int | None = None
    """Bytes of one device."""
    max_hours: float | None = None
    """Hours of both stages together."""


def run(config: Config, *, hardware: str, rows: int | None, limits: Limits, as_json: bool) -> None:
    """Print what was found; fail afterwards if something is above its limit or would stop a stage.

    `hardware` is what the run is planned for, as `hardware_named` reads it, or this machine: `here`, or its `cpu`. Only
    the first `rows` of each set are surveyed.

    Raises:
        ConfigError: A setting is impossible, or above its limit.
        DataError: Rows would stop stage one, or too many are dropped or cut.
        IdentityError: The stores are of another run.
    """
    if not config.train.is_empty:
        check_training(config)
        check_dtypes(config)
    check_adapters(config)
    check_max_length(config)
    planned = None if hardware in ("here", "cpu") else hardware_named(hardware)
    tokenizer = load_tokenizer(config, weights=False)
    config = with_template_date(config, tokenizer)
    batch_pairs = int(config.train.options.get("per_device_train_batch_size", 8))
    sets = {name: look_at_set(config, name, tokenizer, rows, batch_pairs) for name in config.data.names}
    scored = config.reference.sync is None and config.loss.needs_reference
    stores = look_at_stores(config, sets, tokenizer) if scored else {}
    date = config.data.template_date if asks_for_date(tokenizer) else None
    joined = look_at_joined(config, stores, tokenizer)
    found = Findings(sets=sets, stores=stores, joined=joined, template_date=date)
    first = config.data.training[0]
    if any(sets[name].ledger.kept for name in config.data.training):
        device = torch.device("cpu") if hardware == "cpu" else pick_device()
        host = this_hardware(torch.device("cpu")).memory if planned is None else None
        found = dataclasses.replace(
            found,
            estimate=_estimate(config, found, planned, device),
            host_memory=host,
            refused_here=None if planned or config.train.is_empty else refused_here(config),
            start=None if config.train.is_empty else _distance_from_start(config, sets[first].survey),
        )
    click.echo(json.dumps(as_dict(found), indent=1) if as_json else as_text(found, config.data.max_length))
    if others := [load_store(state.folder) for state in stores.values() if state.differences]:
        check_identity(others, identity_of_run(config, tokenizer), exact_length_of_reference(config))
    if problems := [*_problems(config, found), *above_limits(found, limits)]:
        raise type(problems[0])(". ".join(map(str, problems)))


def _estimate(config: Config, found: Findings, planned: Hardware | None, device: torch.device) -> Estimate:
    """Estimate the cost on the planned hardware, or on this machine, whose speed is then measured."""
    data = config.data
    lengths = add_up({name: found.sets[name] for name in data.training}, found.stores, data.fraction)
    assert lengths is not None
    policy_model, reference_model = model_settings(config)
    shapes = shapes_of(policy_model, config.policy)
    scoring, training = reference_precision(config), policy_precision(config)
    dtype: Any = training.weights
    probe = None if planned else probe_layer(policy_model, shapes, device, scoring=scoring, training=training)
    return estimate(
        dataclasses.replace(config, policy=dataclasses.replace(config.policy, dtype=dtype)),
        shapes,
        lengths,
        planned or this_hardware(device),
        reference=None if reference_model is policy_model else shapes_of(reference_model),
        held_out=add_up({name: found.sets[name] for name in data.eval}, found.stores),
        probe=probe,
    )


def _distance_from_start(config: Config, survey: Survey) -> str | None:
    """Tell how far from ln 2 training starts, by the rounding of a token and the number of tokens; None if it does."""
    apart = precisions_apart(config)
    if apart is None or not config.loss.needs_reference:
        return None
    options, beta = config.train.options, config.loss.beta
    pairs = int(options.get("per_device_train_batch_size", 8)) * int(options.get("gradient_accumulation_steps", 1))
    tokens = (survey.scored["chosen"] + survey.scored["rejected"]) / max(1, survey.lengths["pair"].total())
    token = max(token_noise(precision.products) for precision in apart)
    margin = beta * token * math.sqrt(tokens)
    return (
        f"reference.dtype: the reference is scored in {apart[0]}, the policy computes in {apart[1]}. The first "
        f"rewards/margins are about {margin:.2g} away from 0, and the first sigmoid loss, of {pairs} pairs, about "
        f"{margin / 2 / math.sqrt(pairs):.2g} from ln 2 (assumed: {token:g} nats a token, {tokens:.0f} tokens a pair, "
        f"beta {beta:g}; both stages measure it). To start at ln 2, leave reference.dtype and reference.autocast out"
    )


def _problems(config: Config, found: Findings) -> Iterator[RefshardError]:
    """Yield what would stop a stage, besides stores of another run."""
    size, positions = min(model.vocab_size for model in model_settings(config)), most_positions(config)
    yield from _too_few(config, found)
    yield from _unreadable(config, found.sets)
    for name, pairs in found.sets.items():
        if pairs.reading.refused is not None:
            continue
        dataset, ledger, survey = describe(pairs.source), pairs.ledger, pairs.survey
        if ledger.kept == 0 and not (_bad_rows(pairs) and config.data.on_bad_row == "stop"):
            yield DataError(f"{dataset}: no pair was kept, so there is nothing to train on: {ledger.summary()}")
        if survey.highest_id >= size:
            yield ConfigError(
                f"policy.model: a pair of {dataset} holds token id {survey.highest_id}, but the vocabulary has {size}; "
                "weights and tokenizer, or reference and policy, do not belong together"
            )
        if error := length_error(positions, survey.longest, f"a pair of {dataset}", config):
            yield error
        state = found.stores.get(name)
        if state is not None and state.pairs_missing and config.train.on_missing == "stop":
            yield DataError(
                f"{state.pairs_missing:,} of {ledger.kept:,} pairs of {dataset} have no reference logps in "
                f"{state.folder}. {remedy_for_missing(load_store(state.folder))}"
            )


def _unreadable(config: Config, sets: Mapping[str, PairSet]) -> Iterator[RefshardError]:
    """Yield an error about sets that must not be read as they would be, and one about rows that would stop stage one.

    Sets of one file mostly have one cause, which is said once.
    """
    refused = {name: pairs.reading.refused for name, pairs in sets.items() if pairs.reading.refused is not None}
    if refused:
        first, *others = refused
        yield ConfigError(f"{refused[first]}" + (f". The same holds for {', '.join(others)}" if others else ""))
    bad = [pairs for name, pairs in sets.items() if name not in refused and _bad_rows(pairs)]
    if bad and config.data.on_bad_row == "stop":
        examples = (bad[0].survey.examples[reason][0] for reason in _bad_rows(bad[0]))
        example = min(examples, key=lambda example: example.row)
        rows = (f"{number_of(sum(_bad_rows(pairs).values()), 'row')} of {describe(pairs.source)}" for pairs in bad)
        yield DataError(
            f"{' and '.join(rows)} can't be pairs and would stop stage one (first: {example.place}: {example.text}). "
            "Fix these rows, or set data.on_bad_row: skip"
        )


def _bad_rows(pairs: PairSet) -> dict[str, int]:
    """Count the rows of a set that can't be pairs, by reason."""
    kept_apart = ("prompt_too_long", "identical", "tie")
    return {reason: count for reason, count in pairs.ledger.dropped.items() if reason not in kept_apart}


def _too_few(config: Config, found: Findings) -> Iterator[RefshardError]:
    """Yield an error if an epoch has no whole batch, and every row was surveyed."""
    sets, launch = {name: found.sets[name] for name in config.data.training}, config.cluster.train
    pairs = math.ceil(sum(config.data.fraction(name) * pairs.ledger.kept for name, pairs in sets.items()))
    if pairs and all(one.only_first_rows is None for one in sets.values()):
        too_few = too_few_pairs(config.train.options, pairs, launch.nodes * launch.processes)
        yield from () if too_few is None else (too_few,)


def above_limits(found: Findings, limits: Limits) -> Iterator[RefshardError]:
    """Yield an error for each value above its limit, with both."""
    for name, pairs in found.sets.items():
        ledger = pairs.ledger
        for flag, most, count, whole, words in (
            ("--max-dropped", limits.max_dropped, ledger.rows - ledger.kept, ledger.rows, "rows are dropped"),
            ("--max-cut", limits.max_cut, ledger.noted["truncated"], ledger.kept, "pairs are cut at data.max_length"),
        ):
            if most is not None and whole and count > most * whole:
                share = count / whole
                yield DataError(f"{name}: {count:,} of {whole:,} {words} ({share:.2%}); {flag} allows {most:.2%}")
    if found.estimate is None:
        return
    stages = {name: stage for name, stage in found.estimate.stages.items() if stage.tokens}
    for name, stage in stages.items():
        if limits.max_memory is not None and stage.total_memory > limits.max_memory:
            yield ConfigError(
                f"{name}: needs about {gigabytes(stage.total_memory)} of memory on each device; --max-memory allows "
                f"{gigabytes(limits.max_memory)}"
            )
    if limits.max_hours is None:
        return
    seconds = [stage.seconds[1] for stage in stages.values() if stage.seconds is not None]
    if len(seconds) < len(stages):
        yield ConfigError(f"--max-hours: the speed of {found.estimate.hardware.label} is not known")
    elif (hours := sum(seconds) / 3600) > limits.max_hours:
        yield ConfigError(f"both stages take about {hours:,.2f} hours; --max-hours allows {limits.max_hours:g}")
