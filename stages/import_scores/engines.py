"""Read a completion's token log-probs from the answer of an inference engine, vLLM or SGLang.

The engine was asked for the log-probs of a prompt that holds prompt and completion. It gives none for the first token,
and the completion's tokens begin after the prompt's. Each token id is compared with the pair's.

vLLM: `prompt_logprobs`, a list from the first position, null, then {"ID": {"logprob": ...}, ...}. SGLang:
`meta_info.input_token_logprobs`, a list from `logprob_start_len`, [LOGPROB or null, ID, TEXT]. It writes 0 in place of
the vocabulary's last id, which it takes for a picture's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import DataError
from pipeline.data.intake import KeptPair

__all__ = ["is_answer", "logps_of_answer"]

_MINUS_INFINITY = -9999.0
"""Number that vLLM writes in place of minus infinity (`clamp_prompt_logprobs`)"""


@dataclass(frozen=True)
class _Answer:
    """Scored tokens of one sequence."""

    start: int
    """Position of the first token in the sequence"""
    tokens: Sequence[tuple[int | None, Any]]
    """Id and log-prob of each token; both may be None for the first"""
    hides_last_id: bool = False
    """True if 0 may stand for the last id of the vocabulary"""


class _Unreadable(Exception):
    """An answer without the log-probs of its prompt; the text says what to ask for."""


def is_answer(value: Any) -> bool:
    """Return True if a column's value is an engine's answer or its list, not a number or a list of numbers."""
    value = _decoded(value)
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value[:2])


def logps_of_answer(value: Any, pair: KeptPair, completion: Sequence[int], column: str, vocabulary: int) -> list[Any]:
    """Give the log-probs of a completion's tokens, as they stand in the answer; `vocabulary` is the number of ids.

    Raises:
        DataError: The answer is of other tokens than the pair's, or lacks a log-prob.
    """
    where = f"{pair.place}: column {column!r}"
    try:
        answer = _read(_decoded(value))
    except _Unreadable as error:
        raise DataError(f"{where}: {error}") from error
    ids, first = [*pair.pair.prompt_ids, *completion], len(pair.pair.prompt_ids)
    end = answer.start + len(answer.tokens)
    hidden = vocabulary - 1 if answer.hides_last_id else None
    for position, (token, _) in enumerate(answer.tokens[: max(len(ids) - answer.start, 0)], start=answer.start):
        if token not in (None, ids[position]) and (token, ids[position]) != (0, hidden):
            raise DataError(
                f"{where}: token {position} must be {ids[position]}, as refshard tokenizes the pair, got {token}. Send "
                "the pair's own ids, with chat template and EOS"
            )
    # Tokens past max_length may have been scored too.
    if end < len(ids) or (end > len(ids) and not pair.truncated):
        raise DataError(
            f"{where}: must hold the pair's {len(ids)} tokens, got {end}. Send prompt and completion, with chat "
            "template and EOS"
        )
    logps = [logp for _, logp in answer.tokens[max(first - answer.start, 0) : len(ids) - answer.start]]
    if answer.start > first or logps[0] is None:
        raise DataError(
            f"{where}: must score the completion from its first token, {first}, got none for it. Ask for "
            f"logprob_start_len below {first}"
        )
    if _MINUS_INFINITY in logps:
        at = first + logps.index(_MINUS_INFINITY)
        raise DataError(f"{where}: token {at} must have a finite log-prob, got -9999.0, which is vLLM's minus infinity")
    return logps


def _decoded(value: Any) -> Any:
    """Read JSON from a column of texts, as Parquet files have it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _read(value: Any) -> _Answer:
    if isinstance(value, Mapping):
        if isinstance(meta := value.get("meta_info"), Mapping):
            entries = meta.get("input_token_logprobs")
            if not isinstance(entries, list) or not isinstance(meta.get("prompt_tokens"), int):
                raise _Unreadable(
                    "must hold meta_info.input_token_logprobs and meta_info.prompt_tokens, got an answer without. Ask "
                    "for return_logprob: true, logprob_start_len: 0"
                )
            return _sglang(entries, meta["prompt_tokens"] - len(entries))
        choices = value.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
        # A completion has both in its choice, a chat completion beside it.
        both = {**{name: value.get(name) for name in _OF_VLLM}, **{n: choice[n] for n in _OF_VLLM if choice.get(n)}}
        if not isinstance(both["prompt_logprobs"], list):
            raise _Unreadable("must hold prompt_logprobs, got an answer without. Ask vLLM for prompt_logprobs: 0")
        return _vllm(both["prompt_logprobs"], both["prompt_token_ids"])
    if isinstance(value, list) and any(isinstance(item, list) for item in value[:2]):
        return _sglang(value, 0)
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value[:2]):
        return _vllm(value, None)
    raise _Unreadable("must be the answer of an engine, as in the first row, got something else")


_OF_VLLM = ("prompt_logprobs", "prompt_token_ids")


def _sglang(entries: Sequence[Any], start: int) -> _Answer:
    tokens = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[1], int):
            raise _Unreadable(f"token {start + number} must be [log-prob, id, text], got {str(entry)[:40]}")
        tokens.append((entry[1], entry[0]))
    if start < 0:
        raise _Unreadable(f"must hold at most meta_info.prompt_tokens tokens, got {len(entries)}")
    return _Answer(start, tokens, hides_last_id=True)


def _vllm(entries: Sequence[Any], given: Any) -> _Answer:
    if given is not None and (not isinstance(given, list) or len(given) != len(entries)):
        raise _Unreadable(f"prompt_token_ids must be {len(entries)} ids, as many as prompt_logprobs")
    tokens: list[tuple[int | None, Any]] = []
    for position, entry in enumerate(entries):
        if entry is None:
            tokens.append((given[position] if given else None, None))
            continue
        if not isinstance(entry, Mapping) or not all(isinstance(found, Mapping) for found in entry.values()):
            raise _Unreadable(f"token {position} must be {{id: {{logprob: ...}}}}, got {str(entry)[:40]}")
        # Beside the prompt's own token there are the likeliest ones.
        if given is None and len(entry) != 1:
            raise _Unreadable(
                f"token {position} must be one, got {len(entry)}. Ask vLLM for prompt_logprobs: 0, or for "
                "return_token_ids: true"
            )
        token = str(given[position]) if given else next(iter(entry))
        if token not in entry or not token.isdecimal():
            raise _Unreadable(
                f"token {position} must have a log-prob under its id {token}, got {', '.join(entry)[:40]}"
            )
        tokens.append((int(token), entry[token].get("logprob")))
    return _Answer(0, tokens)
