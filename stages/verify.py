"""Check stores: whole, of one piece, what stage one wrote; and, asked to, what the model still says."""

from collections.abc import Mapping
from typing import Any

import click
import numpy as np

from pipeline.base.errors import ConfigError, DataError, IdentityError, RefshardError, one_line, printable
from pipeline.config.schema import Config, DataConfig, PolicyConfig, PrecomputeConfig, Quantization, ReferenceConfig
from pipeline.store.store import Store, find_stores, open_store, read_part
from pipeline.store.verify import Findings, delete_leftovers, verify_store

__all__ = [
    "run",
]


def run(where: str, *, model: str | None, sample: int, clean: bool) -> None:
    """Check one store, or each store of an output folder, and print what is found.

    Args:
        where: Folder or URL.
        model: Score some pairs of each store again with this model, which must be the reference.
        sample: How many.
        clean: Also delete temporary files of writers that were killed.

    Raises:
        DataError: Something is damaged or missing; all of it is printed before.
        IdentityError: Parts of another run, or `model` is not the reference.
        UnfinishedError: What is there is whole, but not all is there yet.
    """
    problems: list[RefshardError | str] = []
    unfinished = None
    for folder in find_stores(where):
        findings = verify_store(folder)
        click.echo(_as_text(findings))
        for problem in findings.problems:
            click.echo(f"  problem     {one_line(str(problem))}", err=True)
        if clean:
            click.echo(f"  deleted     {delete_leftovers(folder)} temporary files, of more than an hour ago")
        problems += findings.problems
        unfinished = unfinished or findings.unfinished
        if model is not None and not findings.problems and findings.unfinished is None:
            click.echo(_score_again(open_store(folder), model, sample))
    if problems:
        kind = IdentityError if all(isinstance(problem, IdentityError) for problem in problems) else DataError
        first = str(problems[0])
        raise kind(first if len(problems) == 1 else f"{len(problems)} problems, the first: {first}")
    if unfinished is not None:
        raise unfinished


def _as_text(found: Findings) -> str:
    state = "damaged" if found.problems else "unfinished" if found.unfinished else "whole"
    lines = [
        found.place,
        f"  {state:<11} {found.parts:,} parts, {found.pairs:,} pairs, {found.token_logps:,} tokens in which checksums, "
        "digests, fingerprint, rows and sums hold",
    ]
    if found.duplicates:
        lines.append(
            f"  duplicates  {found.duplicates:,} pairs are in it more than once, {found.largest_gap:.2g} nats apart at "
            "most"
        )
    if found.leftovers:
        lines.append(
            f"  leftovers   {len(found.leftovers)} temporary files, of writers killed or at work; nobody reads them "
            "(--clean deletes old ones)"
        )
    if found.strangers:
        lines.append(f"  strangers   {', '.join(found.strangers[:5])}: not the store's; nobody reads them")
    return "\n".join(map(printable, lines))


def _score_again(store: Store, model: str, sample: int) -> str:
    """Score a sample of a store's pairs with the model that should be its reference, and compare token by token.

    Raises:
        IdentityError: The model, or its tokenizer, is not what the store was made with.
        DataError: The data has changed, or the log-probs differ by more than the store's noise floor allows.
    """
    from pipeline.data.intake import Ledger, kept_pairs
    from pipeline.data.sources import open_source, read_rows
    from pipeline.models.files import in_one_process, load_tokenizer
    from pipeline.models.identity import differences, identity_of_run
    from pipeline.scoring.agreement import allowed_gap
    from pipeline.scoring.scorer import reference_scorer

    config = _config(store, model)
    stored_identity = store.manifest["identity"]
    tokenizer = load_tokenizer(config)
    found = differences(stored_identity, identity_of_run(config, tokenizer), joining=False)
    if found:
        raise IdentityError(f"--model {model}: not the reference of {store.folder}. It differs in {'; '.join(found)}")
    stored = _sample(store, sample)
    source = open_source(config.data)
    rows = (row for row in read_rows(source) if row.number in stored)
    pairs = [pair for pair in kept_pairs(rows, tokenizer, config.data, Ledger()) if pair.row in stored]
    changed = sorted(stored.keys() - {pair.row for pair in pairs if pair.key == stored[pair.row]["pair_key"]})
    if changed:
        raise DataError(
            f"{config.data.path}: row {changed[0]} is not what was scored, nor are {len(changed) - 1} others of "
            f"{len(stored)}: the dataset has changed since"
        )
    gaps = []
    with reference_scorer(in_one_process(config), tokenizer, "--model", tokens_per_batch=2048) as scorer:
        for i, chosen, rejected in scorer.logps([pair.pair for pair in pairs]):
            row = stored[pairs[i].row]
            gaps += [_gap(row, "chosen", chosen), _gap(row, "rejected", rejected)]
    flat = np.concatenate(gaps)
    mean, largest = float(flat.mean()), float(flat.max())
    reference_settings = stored_identity["reference"]
    bits = (reference_settings.get("quantization") or {}).get("bits")
    allowed = allowed_gap(store.noise, "int8" if bits == 8 else str(reference_settings["dtype"]))
    said = (
        f"{len(pairs)} pairs scored again with {model}: token logps {mean:.2g} nats apart on average, {largest:.2g} at "
        f"most (allowed {allowed[0]:.2g} and {allowed[1]:.2g})"
    )
    # NaN is beyond every bound.
    if not (mean <= allowed[0] and largest <= allowed[1]):
        raise DataError(f"{store.folder}: {said}. Score again into another precompute.output")
    return f"  rescored    {said}"


def _config(store: Store, model: str) -> Config:
    """The settings that the store was made with, as its manifest has them, with the model given."""
    identity, declared = store.manifest["identity"], store.manifest["declared"]
    if "declared" in identity["reference"] or not isinstance(declared.get("data"), dict):
        raise ConfigError(
            f"--model: {store.folder} was imported, so what its data and reference were is not known here; compare "
            "with refshard train, whose gate does"
        )
    tokenization, reference = identity["tokenization"], identity["reference"]
    quantization = reference.get("quantization")
    return Config(
        data=DataConfig(
            **declared["data"],
            max_length=tokenization["max_length"],
            on_bad_row="skip",
            on_identical=store.manifest["plan"].get("on_identical", "keep"),
        ),
        policy=PolicyConfig(model=str(declared["tokenizer"])),
        reference=ReferenceConfig(
            model=model,
            adapter=declared.get("reference_adapter"),
            dtype=reference["dtype"],
            quantization=None if quantization is None else Quantization(**quantization),
        ),
        precompute=PrecomputeConfig(output=str(store.folder), token_logps=tokenization["token_logps"]),
    )


def _sample(store: Store, count: int) -> dict[int, Mapping[str, Any]]:
    """Rows of the store, evenly spread over it, by their number in the dataset."""
    ends = np.cumsum([part["rows"] for part in store.parts])
    total = int(ends[-1]) if len(ends) else 0
    at = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
    rows = {}
    for number, end in enumerate(ends):
        start = int(end) - store.parts[number]["rows"]
        inside = at[(at >= start) & (at < end)] - start
        if len(inside):
            rows.update({row["row"]: row for row in read_part(store, number).take(inside).to_pylist()})
    return rows


def _gap(stored: Mapping[str, Any], side: str, again: Any) -> Any:
    """Absolute differences of one completion, nats a token; of sums, where they alone are stored, over its tokens."""
    again = np.asarray(again, dtype=np.float64)
    if f"{side}_token_logps" in stored:
        return np.abs(again - np.array(stored[f"{side}_token_logps"], dtype=np.float64))
    return np.abs(np.array([again.sum() - stored[f"ref_{side}_logps"]])) / len(again)
