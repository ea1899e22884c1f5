"""Explain one pair: its tokens, which of them are scored, and log-probs stored and recomputed, token by token."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.base.errors import ConfigError
from pipeline.base.folders import open_folder
from pipeline.base.progress import say, say_loading
from pipeline.config.schema import Config
from pipeline.data.sources import open_source
from pipeline.models.files import (
    in_one_process,
    load_tokenizer,
    policy_as_reference,
    reference_quantization,
    reference_sources,
)
from pipeline.models.identity import identity_of_run
from pipeline.models.lengths import check_max_length, exact_length_of_reference
from pipeline.models.precision import reference_precision
from pipeline.report import pages
from pipeline.run.checkpoints import trained_weights
from pipeline.scoring.agreement import allowed_gap
from pipeline.store.dating import with_template_date
from stages.explain.row import Explanation, explain_row, find_row, with_logps
from stages.explain.shown import Findings, as_json, as_page, as_text
from stages.explain.stored import compare, find_stored, with_stored

__all__ = ["View", "run"]


@dataclass(frozen=True, kw_only=True)
class View:
    """Form of the output."""

    html: Path | None = None
    """Page to write as well."""
    as_json: bool = False
    full: bool = False
    """Print long prompts whole."""
    colors: bool | None = None
    """Paint tokens by their log-probs; None: if the output is a terminal."""


def run(config: Config, *, row: int, set_name: str, recompute: bool, policy: Path | None, view: View) -> None:
    """Print what becomes of one row of a set, counted from 0.

    A dropped row, a missing store, a store of another reference and log-probs that disagree are findings, not errors.
    `recompute` loads the reference and scores the pair again; `policy`, a run or checkpoint, scores it too.

    Raises:
        ConfigError: There is no such set, row or policy, or a model can't be loaded.
        UnfinishedError: The policy's run has saved nothing yet.
    """
    # Before the tokenizer, whose library loads for seconds.
    found_row = find_row(open_source(config.data, set_name), row)
    if policy is not None:
        policy = trained_weights(config, policy, "--policy")
    say_loading()
    tokenizer = load_tokenizer(config)
    config = with_template_date(config, tokenizer)
    pair = explain_row(found_row, tokenizer, config.data.of(set_name), set_name)
    named = config.reference.declared or reference_sources(config)[0].name
    found = Findings(pair=pair, reference=named, beta=config.loss.beta, policy=policy)
    if pair.dropped is None:
        trained = None if policy is None else policy_as_reference(in_one_process(config), policy)
        found = _with_logps(config, found, tokenizer, recompute, trained)
    if view.html is not None:
        pages.write_page(view.html, as_page(found))
    if view.as_json:
        click.echo(as_json(found))
        return
    colors = _is_colorful() if view.colors is None else view.colors
    click.echo("\n".join(as_text(found, full=view.full, colors=colors)), color=True)
    if view.html is not None:
        say(f"\nThe page is {view.html}")


def _is_colorful() -> bool:
    # https://no-color.org: set and not empty.
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _with_logps(config: Config, found: Findings, tokenizer: Any, recompute: bool, trained: Config | None) -> Findings:
    """Add the log-probs of the store, of the reference, and of the policy: the reference of the settings `trained`."""
    pair, gap = found.pair, None
    assert pair.key is not None
    folder = open_folder(config.precompute.output).child(pair.set_name)
    exact = exact_length_of_reference(config)
    stored, remarks = find_stored(folder, pair.key, pair.row, identity_of_run(config, tokenizer), exact)
    if stored is not None:
        pair = with_stored(pair, stored)
    if recompute and config.reference.declared is None:
        key = reference_sources(config)[0].key
        pair = with_logps(pair, "recomputed", *_score(pair, tokenizer, found.reference, in_one_process(config), key))
        if stored is not None:
            quantization = reference_quantization(config)
            in_8_bits = quantization is not None and quantization.bits == 8
            products = reference_precision(config).products
            gap = compare(pair, allowed_gap(stored.noise, products, in_8_bits=in_8_bits))
    if trained is not None:
        pair = with_logps(pair, "policy", *_score(pair, tokenizer, str(found.policy), trained, "--policy"))
    remarks = (*remarks, *_remarks(config, recompute, trained is not None))
    return dataclasses.replace(found, pair=pair, stored=stored, gap=gap, remarks=remarks)


def _remarks(config: Config, recompute: bool, has_policy: bool) -> Iterator[str]:
    if config.reference.sync is not None:
        yield "reference.sync: this is the reference before its first move, and its shards"
    try:
        check_max_length(config)
    except ConfigError as error:
        yield str(error)
    if recompute and config.reference.declared is not None:
        yield "reference.declared: a reference known by name alone can't be scored with again"
    if has_policy and config.loss.ld_alpha is not None:
        yield "loss.ld_alpha: sums and rewards here count every token in full"


def _score(pair: Explanation, tokenizer: Any, name: str, config: Config, key: str) -> list[list[float]]:
    """Return the token logps of both completions under the reference of `config`, nats."""
    say(f"Loading {name} ...", err=True)
    # It imports torch, which explaining without a model does without.
    from pipeline.scoring.scorer import load_scorer

    with load_scorer(config, tokenizer, key, tokens_per_batch=1) as scorer:
        ((_, *logps),) = scorer.logps([pair.scored_ids])
    return [values.tolist() for values in logps]
