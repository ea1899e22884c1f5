"""Check stores: every digest, row, and sum; and, with `--model`, a sample of log-probs scored again."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.base.errors import ConfigError, DataError, IdentityError, RefshardError, number_of, one_line, printable
from pipeline.base.progress import say
from pipeline.config.data import DataConfig
from pipeline.config.schema import Config, PolicyConfig, PrecomputeConfig, Quantization, ReferenceConfig
from pipeline.store.store import Store, find_stores, open_store, read_part
from pipeline.store.verify import Findings, delete_leftovers, verify_store

__all__ = ["run"]


def run(where: str, *, model: str | None, sample: int, clean: bool) -> None:
    """Check the store at a folder or URL, or each store of an output folder, and print the findings.

    Raises:
        DataError: A file is damaged or missing. All problems are printed before.
        IdentityError: Parts are another run's, or `model` is not the reference.
        UnfinishedError: All parts that are there hold, but others are missing.
    """
    problems: list[RefshardError | str] = []
    unfinished = None
    for folder in find_stores(where):
        findings = verify_store(folder)
        say(_as_text(findings))
        for problem in findings.problems:
            say(f"  problem     {one_line(str(problem))}", err=True)
        if clean:
            say(f"  deleted     {delete_leftovers(folder)} temporary files that were more than an hour old")
        problems += findings.problems
        unfinished = unfinished or findings.unfinished
        if model is not None and not findings.problems and findings.unfinished is None:
            say(_score_again(open_store(folder), model, sample))
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
        f"  {state:<11} {number_of(found.parts, 'part')}, {found.pairs:,} pairs, {found.token_logps:,} tokens have the "
        "right checksums, digests, fingerprint, rows and sums",
    ]
    if found.duplicates:
        lines.append(
            f"  duplicates  {found.duplicates:,} pairs occur more than once; their log-probs differ by "
            f"{found.largest_gap:.2g} nats at most"
        )
    if found.leftovers:
        lines.append(f"  leftovers   {len(found.leftovers)} temporary files of writers (--clean deletes old ones)")
    if found.unknown_files:
        lines.append(f"  unknown     {', '.join(found.unknown_files[:5])}: not part of the store; no reader uses them")
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
    from pipeline.models.precision import recorded_precision
    from pipeline.scoring.agreement import allowed_gap, compare, completion_gap
    from pipeline.scoring.scorer import load_scorer

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
    with load_scorer(in_one_process(config), tokenizer, "--model", tokens_per_batch=2048) as scorer:
        for i, chosen, rejected in scorer.logps([pair.pair for pair in pairs]):
            row = stored[pairs[i].row]
            gaps += [
                completion_gap(logps, row.get(f"{side}_token_logps"), row[f"ref_{side}_logps"])
                for side, logps in (("chosen", chosen), ("rejected", rejected))
            ]
    reference_settings = stored_identity["reference"]
    bits = (reference_settings.get("quantization") or {}).get("bits")
    allowed = allowed_gap(store.noise, recorded_precision(reference_settings).products, in_8_bits=bits == 8)
    found_gap = compare(gaps, allowed)
    said = f"{number_of(len(pairs), 'pair')} scored again with {model}: {found_gap}"
    if not found_gap.agrees:
        raise DataError(f"{store.folder}: {said}. Score again into another precompute.output")
    return f"  rescored    {said}"


def _config(store: Store, model: str) -> Config:
    """Give the settings of the store's manifest, with the given model."""
    identity, declared = store.manifest["identity"], store.manifest["declared"]
    if "declared" in identity["reference"] or not isinstance(declared.get("data"), dict):
        raise ConfigError(
            f"--model: {store.folder} was imported, so its data and reference are not known. Run refshard train, whose "
            "gate compares them"
        )
    tokenization, reference = identity["tokenization"], identity["reference"]
    quantization = reference.get("quantization")
    return Config(
        data=DataConfig(
            **declared["data"],
            max_length=tokenization["max_length"],
            template_date=tokenization.get("template_date"),
            on_bad_row="skip",
            on_identical=store.manifest["plan"].get("on_identical", "keep"),
        ),
        policy=PolicyConfig(model=str(declared["tokenizer"])),
        reference=ReferenceConfig(
            model=model,
            adapter=declared.get("reference_adapter"),
            dtype=reference["dtype"],
            autocast=reference.get("autocast"),
            quantization=None if quantization is None else Quantization(**quantization),
        ),
        precompute=PrecomputeConfig(output=str(store.folder), token_logps=tokenization["token_logps"]),
    )


def _sample(store: Store, count: int) -> dict[int, Mapping[str, Any]]:
    """Give rows of the store by their number in the dataset, evenly spread."""
    ends = np.cumsum([0, *(part["rows"] for part in store.index["parts"])])
    at = np.unique(np.linspace(0, ends[-1] - 1, min(count, int(ends[-1]))).round().astype(int))
    rows = {}
    for number, (start, end) in enumerate(pairwise(ends)):
        inside = at[(at >= start) & (at < end)] - start
        if len(inside):
            rows.update({row["row"]: row for row in read_part(store, number).take(inside).to_pylist()})
    return rows
