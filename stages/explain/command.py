"""One pair as the models see it: its tokens, what of it is scored, log-probs stored and recomputed, token by token.

In a terminal and on a page tokens are coloured by their log-prob; elsewhere they are a table.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
from markupsafe import Markup

from pipeline.base.errors import printable
from pipeline.base.folders import open_folder
from pipeline.base.progress import without_nan
from pipeline.config.schema import Config
from pipeline.data.sources import open_set
from pipeline.models.files import (
    in_one_process,
    load_tokenizer,
    reference_dtype,
    reference_quantization,
    reference_sources,
)
from pipeline.models.identity import identity_of_run
from pipeline.report import pages
from pipeline.report.heatmap import Cell, Scale, legend, of_differences, of_logps, on_page, on_terminal, width_of
from pipeline.scoring.agreement import Agreement, NoiseFloor, allowed_gap
from stages.explain.row import (
    Completion,
    Explanation,
    StoredPair,
    Token,
    compare,
    explain_row,
    find_row,
    find_stored,
    minus,
    tokens_of,
    with_logps,
    with_stored,
)

__all__ = [
    "run",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Findings:
    """All that is shown."""

    pair: Explanation
    reference: str
    beta: float
    stored: StoredPair | None = None
    policy: Path | None = None
    gap: Agreement | None = None
    remarks: tuple[str, ...] = ()
    """Of the store and the models"""


def run(
    config: Config,
    *,
    row: int,
    set_name: str,
    recompute: bool,
    policy: Path | None,
    html: Path | None,
    as_json: bool,
    full: bool,
    colors: bool | None,
) -> None:
    """Print what becomes of one row.

    A row that is dropped, a store that is missing or of another reference, log-probs that disagree: all of it is
    said, and none of it is an error.

    Args:
        config: The run's settings.
        row: Position in the source, from 0.
        set_name: `train`, or a set of `data.eval`.
        recompute: Load the reference and score the pair again.
        policy: Also score it with the policy that a run, or a checkpoint, holds.
        html: Also write a page there.
        as_json: Print JSON.
        full: Print long prompts whole.
        colors: Paint tokens; None: where the output is a terminal.

    Raises:
        ConfigError: No such set or row, no policy there, or a model can't be loaded.
        DataError: The data is damaged.
        UnfinishedError: The policy's run has saved nothing yet.
        StorageError: The page can't be written.
    """
    source = open_set(config.data, set_name)
    trained = None
    if policy is not None:
        from pipeline.models.files import policy_as_reference
        from pipeline.run.checkpoints import trained_weights

        policy = trained_weights(config, policy, "--policy")
        trained = policy_as_reference(in_one_process(config), policy)
    tokenizer = load_tokenizer(config)
    pair = explain_row(find_row(source, row), tokenizer, config.data, set_name)
    named = config.reference.declared or reference_sources(config)[0].name
    found = _Findings(pair=pair, reference=named, beta=config.loss.beta, policy=policy)
    if pair.dropped is None:
        found = _scored(config, found, tokenizer, recompute, trained)
    if html is not None:
        pages.write_page(html, _page(found))
    if as_json:
        click.echo(json.dumps(_as_json(found), indent=1))
        return
    click.echo("\n".join(_as_text(found, full=full, colors=_is_colorful() if colors is None else colors)), color=True)
    if html is not None:
        click.echo(f"\nThe page is {printable(str(html))}")


def _is_colorful() -> bool:
    # https://no-color.org: set and not empty.
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _scored(config: Config, found: _Findings, tokenizer: Any, recompute: bool, trained: Config | None) -> _Findings:
    """Put stored, recomputed and the policy's log-probs beside the tokens. One model is in memory at a time.

    `trained` are settings whose reference is the policy.
    """
    pair = found.pair
    assert pair.key is not None
    folder = open_folder(config.precompute.output).child(pair.set_name)
    stored, remarks = find_stored(folder, pair.key, pair.row, identity_of_run(config, tokenizer))
    if config.reference.sync is not None:
        remarks = (*remarks, "reference.sync: this is the reference before its first move, and its shards")
    if stored is not None:
        pair = with_stored(pair, stored)
    gap = None
    if recompute and config.reference.declared is not None:
        remarks = (*remarks, "reference.declared: a reference known by name alone can't be scored with again")
    elif recompute:
        key = reference_sources(config)[0].key
        logps = _score(pair, tokenizer, found.reference, in_one_process(config), key)
        pair = with_logps(pair, "recomputed", *logps)
        if stored is not None:
            gap = compare(pair, _allowed(config, stored.noise))
    if trained is not None:
        logps = _score(pair, tokenizer, str(found.policy), trained, "--policy")
        pair = with_logps(pair, "policy", *logps)
        if config.loss.ld_alpha is not None:
            remarks = (*remarks, "loss.ld_alpha: sums and rewards here count every token in full")
    return dataclasses.replace(found, pair=pair, stored=stored, gap=gap, remarks=remarks)


def _allowed(config: Config, noise: NoiseFloor) -> tuple[float, float]:
    quantization = reference_quantization(config)
    in_8_bits = quantization is not None and quantization.bits == 8
    return allowed_gap(noise, reference_dtype(config), in_8_bits=in_8_bits)


def _score(pair: Explanation, tokenizer: Any, name: str, config: Config, key: str) -> list[Any]:
    """Score the pair with the reference of settings, which is let go of after. Gives both completions' token logps."""
    from pipeline.scoring.scorer import reference_scorer

    click.echo(f"Loading {printable(name)} ...", err=True)
    with reference_scorer(config, tokenizer, key, tokens_per_batch=1) as scorer:
        ((_, *logps),) = scorer.logps([tokens_of(pair)])
    return logps


def _facts(found: _Findings) -> dict[str, str]:
    """What is said of the pair in words, by name."""
    pair = found.pair
    facts = {"row": f"{pair.row} of {pair.set_name}, {pair.place}"}
    if pair.dropped is not None:
        facts["dropped"] = f"{pair.dropped.replace('_', ' ')}: {pair.why}"
    if pair.key is not None:
        facts["key"] = pair.key
    if pair.prompt:
        facts["prompt"] = f"{len(pair.prompt):,} tokens, not scored"
    for side, completion in pair.completions.items():
        facts[side] = _counts(completion, pair.max_length)
    if pair.prompt:
        before, *after = pair.first_tokens
        facts["they meet"] = f"{before} | {' and '.join(dict.fromkeys(after))}"
    if pair.dropped is None:
        facts["reference"] = found.reference
        facts["stored"] = "nothing" if found.stored is None else found.stored.place
        if found.policy is not None:
            facts["policy"] = str(found.policy)
        if found.gap is not None:
            facts["compared"] = _verdict(found)
    remarks = [*pair.remarks, *found.remarks]
    facts |= {"remark" if i == 0 else f"remark {i + 1}": remark for i, remark in enumerate(remarks)}
    return facts


def _counts(completion: Completion, max_length: int | None) -> str:
    if not completion.scored:
        return f"{len(completion.tokens):,} tokens, none of them scored; {completion.ending}"
    cut = f", {completion.num_cut:,} more cut by max_length {max_length}" if completion.num_cut else ""
    return f"{len(completion.scored):,} tokens scored{cut}; {completion.ending}"


def _verdict(found: _Findings) -> str:
    gap = found.gap
    assert gap is not None
    if gap.agrees:
        return f"stored and recomputed agree: {gap}"
    return f"stored and recomputed DISAGREE: {gap}. What is stored is not what this reference gives for this pair"


_SUMS: dict[str, Callable[[Completion], float | None]] = {
    "stored": lambda c: c.stored_sum,
    "recomputed": lambda c: c.sum("recomputed"),
    "difference": lambda c: c.sum("gap"),
    "policy": lambda c: c.sum("policy"),
    "policy - reference": lambda c: c.sum("shift"),
}


def _sums(found: _Findings) -> tuple[list[str], list[list[str]]]:
    """The table of sums, nats: chosen, rejected, their difference. Columns of which nothing is known are left out."""
    sides = [found.pair.completions[side] for side in ("chosen", "rejected")] if found.pair.completions else []
    columns: dict[str, list[float | None]] = {}
    for name, read in _SUMS.items():
        chosen, rejected = (read(side) for side in sides) if sides else (None, None)
        if chosen is not None or rejected is not None:
            columns[name] = [chosen, rejected, minus(chosen, rejected)]
    if "policy - reference" in columns:
        shifts = columns["policy - reference"]
        columns[f"reward, beta {found.beta:g}"] = [None if v is None else found.beta * v for v in shifts]
    names = ("chosen", "rejected", "chosen - rejected")
    rows = [[name, *(_number(values[i]) for values in columns.values())] for i, name in enumerate(names)]
    return ["nats", *columns], rows if columns else []


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value == 0 or not math.isfinite(value) or abs(value) >= 1e-3 else f"{value:.1e}"


# Of a long prompt: tokens at its head, where the template's marks stand, and at its end, before the completion.
_HEAD, _TAIL = 24, 48


def _shortened(prompt: Sequence[Token], full: bool) -> tuple[Sequence[Token], int, Sequence[Token]]:
    """The head of a prompt, how many tokens are left out after it, and its end."""
    if full or len(prompt) <= _HEAD + _TAIL:
        return prompt, 0, ()
    return prompt[:_HEAD], len(prompt) - _HEAD - _TAIL, prompt[-_TAIL:]


def _as_text(found: _Findings, *, full: bool, colors: bool) -> Iterator[str]:
    pair = found.pair
    facts = {**_facts(found), **{f"  {name}": _cut(value, full) for name, value in pair.columns.items()}}
    widest = max(map(width_of, map(printable, facts)))
    for name, value in facts.items():
        name = "remark" if name.startswith("remark ") else printable(name)
        yield f"{name}{' ' * (widest - width_of(name))}  {printable(value)}"
    header, rows = _sums(found)
    if rows:
        yield from ("", *_table(header, rows))
    if pair.prompt:
        yield from _heat_maps(found, full) if colors else _token_tables(pair, full)


def _cut(text: str, full: bool, most: int = 400) -> str:
    return text if full or len(text) <= most else f"{text[:most]} ... ({len(text):,} characters)"


def _heat_maps(found: _Findings, full: bool) -> Iterator[str]:
    pair, width = found.pair, shutil.get_terminal_size().columns
    head, left_out, tail = _shortened(pair.prompt, full)
    none = of_logps()
    yield from ("", click.style("prompt", bold=True), *on_terminal([_cell(t, None) for t in head], none, width))
    if left_out:
        yield click.style(f"... {left_out:,} tokens, shown with --full ...", italic=True)
        yield from on_terminal([_cell(t, None) for t in tail], none, width)
    for title, scale, read in _maps(pair):
        for side, completion in pair.completions.items():
            yield from ("", click.style(f"{side}, {title}", bold=True))
            yield from on_terminal([_cell(t, read(t)) for t in completion.tokens], scale, width)
        if any(read(t) is not None for c in pair.completions.values() for t in c.scored):
            yield from ("", *on_terminal(legend(scale), scale, width))
    yield "· blank  ↵ end of line  \\xe2 part of a character; dim: not scored; crossed out: cut by max_length"


def _maps(pair: Explanation) -> Iterator[tuple[str, Scale, Callable[[Token], float | None]]]:
    """What completions are coloured by: title, scale, and the number of a token."""
    tokens = [token for completion in pair.completions.values() for token in completion.scored]
    whose = "recomputed" if any(t.recomputed is not None for t in tokens) else "stored"
    if all(t.reference is None for t in tokens):
        yield "tokens", of_logps(), lambda token: None
    else:
        yield f"reference log-probs, {whose}", of_logps(), lambda token: token.reference
    shifts = [t.shift for t in tokens if t.shift is not None]
    if shifts:
        yield "policy minus reference, nats", of_differences(shifts), lambda token: token.shift
    elif any(t.policy is not None for t in tokens):
        yield "policy log-probs", of_logps(), lambda token: token.policy


def _cell(token: Token, value: float | None) -> Cell:
    return Cell(text=token.text, value=value, struck=token.cut, ends_line=token.text.endswith("↵"), hint=_hint(token))


def _hint(token: Token) -> str:
    parts = [f"id {token.id}", _role(token)]
    parts += [f"{name} {_number(value)}" for name, value in _numbers(token).items() if value is not None]
    return ", ".join(parts)


def _role(token: Token) -> str:
    role = "scored" if token.scored else "cut" if token.cut else "not scored"
    return f"{role}, special" if token.special else role


def _numbers(token: Token) -> dict[str, float | None]:
    return {
        "stored": token.stored,
        "recomputed": token.recomputed,
        "difference": token.gap,
        "policy": token.policy,
        "policy - reference": token.shift,
    }


def _token_tables(pair: Explanation, full: bool) -> Iterator[str]:
    head, left_out, tail = _shortened(pair.prompt, full)
    yield from ("", "prompt", *_table(*_token_table(head)))
    if left_out:
        yield f"... {left_out:,} tokens, shown with --full ..."
        yield from _table(*_token_table(tail))[1:]
    for side, completion in pair.completions.items():
        yield from ("", side, *_table(*_token_table(completion.tokens)))


def _token_table(tokens: Sequence[Token]) -> tuple[list[str], list[list[str]]]:
    known = [name for name in _numbers(tokens[0]) if any(_numbers(token)[name] is not None for token in tokens)]
    rows = [
        [token.text, str(token.id), _role(token), *(_number(_numbers(token)[name]) for name in known)]
        for token in tokens
    ]
    return ["token", "id", "", *(name if name == "difference" else f"{name} logp" for name in known)], rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; its first column is set to the left, as is one without a name, the others to the right."""
    widths = [max(width_of(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in (header, *rows):
        padded = [
            cell + " " * (width - width_of(cell)) if i == 0 or not header[i] else " " * (width - width_of(cell)) + cell
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(f"  {'  '.join(padded)}".rstrip())
    return lines


def _page(found: _Findings) -> str:
    pair = found.pair
    sections = [pages.Section(title="The pair", body=pages.facts(_facts(found)))]
    if pair.columns:
        sections.append(pages.Section(title="What the row says", body=pages.facts(pair.columns)))
    header, rows = _sums(found)
    if rows:
        numbers = [[row[0], *map(_as_number, row[1:])] for row in rows]
        sections.append(pages.Section(title="Log-probs of the completions", body=pages.table(header, numbers)))
    if pair.prompt:
        prompt = on_page([_cell(token, None) for token in pair.prompt], of_logps())
        sections.append(pages.Section(title="Prompt", body=prompt, note="Not scored. " + _SIGNS))
        sections += _map_sections(pair)
    return pages.page(f"Row {pair.row} of {pair.set_name}", sections, subtitle=f"{pair.place}, as refshard scores it")


_SIGNS = r"· is a blank, ↵ an end of line, \xe2 part of a character; what max_length cuts is crossed out."


def _map_sections(pair: Explanation) -> Iterator[pages.Section]:
    for number, (title, scale, read) in enumerate(_maps(pair)):
        painted = any(read(token) is not None for c in pair.completions.values() for token in c.scored)
        for side, completion in pair.completions.items():
            body = on_page([_cell(token, read(token)) for token in completion.tokens], scale)
            if painted:
                body = on_page(legend(scale), scale) + body
            if number == 0:
                body += _details(completion)
            yield pages.Section(title=f"{side.capitalize()}: {title}", body=body)


def _details(completion: Completion) -> Markup:
    header, rows = _token_table(completion.tokens)
    cells = [[row[0], _as_number(row[1]), row[2], *map(_as_number, row[3:])] for row in rows]
    return Markup("<details><summary>As a table</summary>{}</details>").format(pages.table(header, cells))


def _as_number(text: str) -> Decimal | None:
    """What a page's table sets to the right, with just these digits."""
    return Decimal(text) if text else None


def _as_json(found: _Findings) -> dict[str, Any]:
    pair = found.pair
    gap = None if found.gap is None else {**vars(found.gap), "agrees": found.gap.agrees}
    described: dict[str, Any] = _finite(
        {
            **{name: getattr(pair, name) for name in ("set_name", "row", "place", "key", "max_length")},
            "dropped": None if pair.dropped is None else {"reason": pair.dropped, "why": pair.why},
            "columns": dict(pair.columns),
            "reference": found.reference,
            "store": None if found.stored is None else {"place": found.stored.place, "row": found.stored.row},
            "policy": None if found.policy is None else str(found.policy),
            "compared": gap,
            "remarks": [*pair.remarks, *found.remarks],
            "prompt": [vars(token) for token in pair.prompt],
            "completions": {
                side: {
                    "ending": completion.ending,
                    "sums": {name: read(completion) for name, read in _SUMS.items()},
                    "tokens": [vars(token) for token in completion.tokens],
                }
                for side, completion in pair.completions.items()
            },
        }
    )
    return described


def _finite(value: Any) -> Any:
    """The same all the way down, with null for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in without_nan(value).items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
