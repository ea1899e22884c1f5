"""Write an explained pair for a terminal, as a page, or as JSON.

In a terminal and on a page tokens are colored by their log-prob; other text output has tables.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import click
from markupsafe import Markup

from pipeline.base.errors import number_of, printable
from pipeline.base.tables import aligned
from pipeline.report import pages
from pipeline.report.heatmap import Cell, Scale, legend, of_differences, of_logps, on_page, on_terminal
from pipeline.scoring.agreement import Agreement
from stages.explain.row import SIDES, Completion, Explanation, Logps, Token, minus
from stages.explain.stored import StoredPair

__all__ = ["Findings", "as_json", "as_page", "as_text"]

# Tokens at the head of a long prompt, where the template's marks are, and at its end, before the completion.
_HEAD, _TAIL = 24, 48

_SIGNS = r"· is a blank, ↵ an end of line, \xe2 part of a character; what max_length cuts is crossed out."

_PLAIN = "tokens"
"""Title of the map in which no token has a color."""

_Values = Callable[[Token], float | None]


def _numbers(logps: Logps) -> dict[str, float | None]:
    """Return what is shown of a token or of a completion, by title."""
    return {
        "stored": logps.stored,
        "recomputed": logps.recomputed,
        "difference": logps.gap,
        "policy": logps.policy,
        "policy - reference": logps.shift,
    }


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that is shown."""

    pair: Explanation
    reference: str
    beta: float
    stored: StoredPair | None = None
    policy: Path | None = None
    gap: Agreement | None = None
    remarks: tuple[str, ...] = ()
    """Sentences about the store and the models."""


def as_text(found: Findings, *, full: bool, colors: bool) -> Iterator[str]:
    """Yield lines for a terminal, without anything in them that a terminal obeys but colors."""
    pair = found.pair
    facts = {**_facts(found), **{f"  {name}": _cut(value, full) for name, value in pair.columns.items()}}
    yield from aligned([[printable(name), printable(value)] for name, value in facts.items()], left=(0, 1))
    if sums := _sums(found):
        yield from ("", *_table(sums))
    if pair.prompt:
        hidden = 0 if full else max(0, len(pair.prompt) - _HEAD - _TAIL)
        yield from _heat_maps(pair, hidden) if colors else _token_tables(pair, hidden)


def as_page(found: Findings) -> str:
    """Return an HTML page."""
    pair = found.pair
    sections = [pages.Section(title="The pair", body=pages.facts(_facts(found)))]
    if pair.columns:
        sections.append(pages.Section(title="Columns of the row", body=pages.facts(pair.columns)))
    if sums := _sums(found):
        sections.append(pages.Section(title="Log-probs of the completions", body=_page_table(sums)))
    if pair.prompt:
        prompt = on_page([_cell(token, None) for token in pair.prompt], of_logps())
        sections.append(pages.Section(title="Prompt", body=prompt, note="Not scored. " + _SIGNS))
        sections += _map_sections(pair)
    return pages.page(f"Row {pair.row} of {pair.set_name}", sections, subtitle=f"{pair.place}, as refshard scores it")


def as_json(found: Findings) -> str:
    """Return JSON, with null for numbers that JSON does not have."""
    pair = found.pair
    described = {
        **{name: getattr(pair, name) for name in ("set_name", "row", "place", "key", "max_length")},
        "dropped": None if pair.dropped is None else {"reason": pair.dropped, "why": pair.why},
        "columns": dict(pair.columns),
        "reference": found.reference,
        "store": None if found.stored is None else {"place": found.stored.place, "row": found.stored.row},
        "policy": None if found.policy is None else str(found.policy),
        "compared": None if found.gap is None else {**vars(found.gap), "agrees": found.gap.agrees},
        "remarks": [*pair.remarks, *found.remarks],
        "prompt": [vars(token) for token in pair.prompt],
        "completions": {
            side: {
                "ending": completion.ending,
                "sums": _numbers(completion.sums),
                "tokens": [vars(token) for token in completion.tokens],
            }
            for side, completion in pair.completions.items()
        },
    }
    return json.dumps(json.loads(json.dumps(described), parse_constant=lambda name: None), indent=1)


def _facts(found: Findings) -> dict[str, str]:
    """Return the facts about the pair by name."""
    pair = found.pair
    facts = {"row": f"{pair.row} of {pair.set_name}, {pair.place}"}
    if pair.dropped is not None:
        facts["dropped"] = f"{pair.dropped.replace('_', ' ')}: {pair.why}"
    if pair.key is not None:
        facts["key"] = pair.key
    if pair.prompt:
        facts["prompt"] = f"{number_of(len(pair.prompt), 'token')}, not scored"
        facts |= {side: _counts(completion, pair.max_length) for side, completion in pair.completions.items()}
        first = dict.fromkeys(pair.completions[side].tokens[0].text for side in SIDES)
        facts["boundary"] = f"{pair.prompt[-1].text} | {' and '.join(first)}"
    if pair.dropped is None:
        facts["reference"] = found.reference
        facts["stored"] = "nothing" if found.stored is None else found.stored.place
        if found.policy is not None:
            facts["policy"] = str(found.policy)
        if found.gap is not None:
            verdict = "agree" if found.gap.agrees else "DISAGREE"
            otherwise = "" if found.gap.agrees else ". This reference does not give the stored log-probs of this pair"
            facts["compared"] = f"stored and recomputed {verdict}: {found.gap}{otherwise}"
    remarks = [*pair.remarks, *found.remarks]
    return facts | {"remark" if i == 0 else f"remark {i + 1}": remark for i, remark in enumerate(remarks)}


def _counts(completion: Completion, max_length: int | None) -> str:
    total, scored = len(completion.tokens), len(completion.scored)
    if not scored:
        return f"{number_of(total, 'token')}, none of them scored; {completion.ending}"
    cut = f", {total - scored:,} more cut by max_length {max_length}" if total > scored else ""
    return f"{number_of(scored, 'token')} scored{cut}; {completion.ending}"


def _sums(found: Findings) -> list[list[str]]:
    """Return the table of sums, nats: chosen, rejected, their difference. Unknown columns are left out."""
    if not found.pair.completions:
        return []
    chosen, rejected = (_numbers(found.pair.completions[side].sums) for side in SIDES)
    rows = {"chosen": chosen, "rejected": rejected}
    rows["chosen - rejected"] = {title: minus(chosen[title], rejected[title]) for title in chosen}
    for numbers in rows.values():
        shift = numbers["policy - reference"]
        numbers[f"reward, beta {found.beta:g}"] = None if shift is None else found.beta * shift
    known = _known(list(rows.values()))
    table = [[name, *(_number(numbers[title]) for title in known)] for name, numbers in rows.items()]
    return [["nats", *known], *table] if known else []


def _known(rows: Sequence[Mapping[str, float | None]]) -> list[str]:
    """Return the titles of the columns that hold a number."""
    return [title for title in rows[0] if any(numbers[title] is not None for numbers in rows)]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value == 0 or not math.isfinite(value) or abs(value) >= 1e-3 else f"{value:.1e}"


def _cut(text: str, full: bool) -> str:
    return text if full or len(text) <= 400 else f"{text[:400]} ... ({len(text):,} characters)"


def _heat_maps(pair: Explanation, hidden: int) -> Iterator[str]:
    width, prompt = shutil.get_terminal_size().columns, [_cell(token, None) for token in pair.prompt]
    yield from ("", click.style("prompt", bold=True))
    if hidden:
        yield from on_terminal(prompt[:_HEAD], of_logps(), width)
        yield click.style(f"... {number_of(hidden, 'token')}, shown with --full ...", italic=True)
    yield from on_terminal(prompt[-_TAIL:] if hidden else prompt, of_logps(), width)
    for title, scale, values in _maps(pair):
        for side, completion in pair.completions.items():
            yield from ("", click.style(f"{side}, {title}", bold=True))
            yield from on_terminal([_cell(t, values(t)) for t in completion.tokens], scale, width)
        if title != _PLAIN:
            yield from ("", *on_terminal(legend(scale), scale, width))
    yield "· blank  ↵ end of line  \\xe2 part of a character; dim: not scored; crossed out: cut by max_length"


def _map_sections(pair: Explanation) -> Iterator[pages.Section]:
    for number, (title, scale, values) in enumerate(_maps(pair)):
        for side, completion in pair.completions.items():
            body = on_page([_cell(token, values(token)) for token in completion.tokens], scale)
            if title != _PLAIN:
                body = on_page(legend(scale), scale) + body
            if number == 0:
                table = _page_table(_token_table(completion.tokens))
                body += Markup("<details><summary>As a table</summary>{}</details>").format(table)
            yield pages.Section(title=f"{side.capitalize()}: {title}", body=body)


def _maps(pair: Explanation) -> Iterator[tuple[str, Scale, _Values]]:
    """Yield the maps of the completions: title, scale, and the number of a token that colors it."""
    tokens = [token for completion in pair.completions.values() for token in completion.scored]
    if all(t.reference is None for t in tokens):
        yield _PLAIN, of_logps(), lambda token: None
    else:
        source = "recomputed" if any(t.recomputed is not None for t in tokens) else "stored"
        yield f"reference log-probs, {source}", of_logps(), lambda token: token.reference
    shifts = [t.shift for t in tokens if t.shift is not None]
    if shifts:
        yield "policy minus reference, nats", of_differences(shifts), lambda token: token.shift
    elif any(t.policy is not None for t in tokens):
        yield "policy log-probs", of_logps(), lambda token: token.policy


def _cell(token: Token, value: float | None) -> Cell:
    numbers = [f"{title} {_number(number)}" for title, number in _numbers(token).items() if number is not None]
    hint = ", ".join([f"id {token.id}", _role(token), *numbers])
    return Cell(text=token.text, value=value, struck=token.cut, ends_line=token.text.endswith("↵"), hint=hint)


def _role(token: Token) -> str:
    role = "scored" if token.scored else "cut" if token.cut else "not scored"
    return f"{role}, special" if token.special else role


def _token_tables(pair: Explanation, hidden: int) -> Iterator[str]:
    lines = _table(_token_table(pair.prompt))
    if hidden:
        lines[1 + _HEAD : -_TAIL] = [f"... {number_of(hidden, 'token')}, shown with --full ..."]
    yield from ("", "prompt", *lines)
    for side, completion in pair.completions.items():
        yield from ("", side, *_table(_token_table(completion.tokens)))


def _token_table(tokens: Sequence[Token]) -> list[list[str]]:
    rows = [_numbers(token) for token in tokens]
    known = _known(rows)
    table = [
        [token.text, str(token.id), _role(token), *(_number(numbers[title]) for title in known)]
        for token, numbers in zip(tokens, rows, strict=True)
    ]
    return [["token", "id", "", *(title if title == "difference" else f"{title} logp" for title in known)], *table]


def _left(header: Sequence[str]) -> list[int]:
    """Return the columns of words: the first one, and one without a title. The others have numbers."""
    return [i for i, title in enumerate(header) if i == 0 or not title]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"  {line}" for line in aligned(rows, _left(rows[0]))]


def _page_table(rows: Sequence[Sequence[str]]) -> Markup:
    """Return a page's table, its numbers with the digits of the terminal's."""
    header, *body = rows
    left = _left(header)
    cells = [[cell if i in left else Decimal(cell) if cell else None for i, cell in enumerate(row)] for row in body]
    return pages.table(header, cells)
