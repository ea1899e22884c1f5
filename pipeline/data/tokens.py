"""Tokenize a pair into prompt, chosen and rejected ids; truncate them; make the pair's key.

The ids equal TRL 1.16's for the same row, tokenizer and chat template, except for three of its defects: a second EOS
from a tokenizer that adds its own, a second BOS if the prompt already starts with one, and silently dropped pairs
(`intake` counts them).
"""

import contextlib
import dataclasses
import hashlib
import signal
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.base.errors import BadRow, ConfigError
from pipeline.data.pairs import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKENIZATION_VERSION", "TokenizedPair", "pair_key", "renders_prompt_alike", "tokenize", "truncate"]

TOKENIZATION_VERSION = 1
"""Part of every identity. Raise it with any change here, in layouts.py or in pairs.py that changes a token.

It stayed when nulls inside messages and lists of text parts became plain messages. Those rows alone have other keys
now, so their old log-probs are missed, never read, and no other pair must be scored again.
"""


@dataclass(frozen=True, kw_only=True)
class TokenizedPair:
    """Token ids of a pair. The prompt's last token predicts the first token of either completion."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    merged: bool = False
    """True if tokens merged across the prompt's end, so that the completions start a little before their texts."""


def tokenize(pair: Pair, tokenizer: "PreTrainedTokenizerBase", place: str) -> TokenizedPair:
    """Tokenize prompt, prompt+chosen and prompt+rejected as wholes; the ids that all three share are the prompt.

    Plain text ends in one EOS if the tokenizer has one, a conversation's turn in what its chat template writes. The ids
    are not truncated.

    Raises BadRow if the template refuses the messages, or the prompt or a completion has no token; ConfigError if a
    conversation meets a tokenizer without a chat template.
    """
    if isinstance(pair.prompt, str):
        prompt, chosen, rejected = _tokenize_text(pair, tokenizer)
    else:
        prompt, chosen, rejected = _tokenize_messages(pair, tokenizer, place)
    three = enumerate(zip(prompt, chosen, rejected, strict=False))
    length = next((i for i, (a, b, c) in three if not a == b == c), min(map(len, (prompt, chosen, rejected))))
    if length == 0:
        raise BadRow("empty_prompt", f"{place}: the prompt has no token before the completions")
    if length == len(chosen) or length == len(rejected):
        name = "chosen" if length == len(chosen) else "rejected"
        raise BadRow("empty_completion", f"{place}: {name} has no token after the prompt")
    return TokenizedPair(
        prompt_ids=prompt[:length],
        chosen_ids=chosen[length:],
        rejected_ids=rejected[length:],
        merged=length < len(prompt),
    )


def truncate(pair: TokenizedPair, max_length: int | None) -> TokenizedPair | None:
    """Cut both completions so that the prompt and either one fit (TRL's keep_start); None if no room is left."""
    if max_length is None:
        return pair
    room = max_length - len(pair.prompt_ids)
    if room <= 0:
        return None
    if room >= len(pair.chosen_ids) and room >= len(pair.rejected_ids):
        return pair
    return dataclasses.replace(pair, chosen_ids=pair.chosen_ids[:room], rejected_ids=pair.rejected_ids[:room])


def pair_key(pair: TokenizedPair) -> bytes:
    """Return the join key of a pair before truncation, 16 bytes.

    It is BLAKE2b-128 over three lengths (int64) and the ids (int32) of prompt, chosen and rejected, little-endian. The
    lengths distinguish pairs whose concatenated ids are equal.
    """
    parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    digest = hashlib.blake2b(struct.pack("<3q", *map(len, parts)), digest_size=16)
    for ids in parts:
        digest.update(np.asarray(ids, dtype="<i4").tobytes())
    return digest.digest()


def _tokenize_text(pair: Pair, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token or ""
    # The tokens that the tokenizer adds to any text.
    around = tokenizer("a", verbose=False)["input_ids"]
    adds_bos, adds_eos = around[:1] == [bos], around[-1:] == [tokenizer.eos_token_id]
    three = []
    for completion in ("", pair.chosen, pair.rejected):
        text = f"{pair.prompt}{completion}"
        if completion and not text.endswith(eos):
            text += eos
        ids = tokenizer(text, verbose=False)["input_ids"]
        if adds_bos and ids[:2] == [bos, bos]:
            ids = ids[1:]
        # The completion's text already has its EOS, and the prompt alone must not have one.
        if adds_eos:
            ids = ids[:-1]
        three.append(ids)
    return three[0], three[1], three[2]


def _tokenize_messages(pair: Pair, tokenizer: Any, place: str) -> tuple[list[int], list[int], list[int]]:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"policy.model: its tokenizer has no chat template, but {place} is a conversation; "
            "use a chat model, or save a template with its tokenizer"
        )
    arguments = {"tools": pair.tools, **(pair.chat_template_kwargs or {})}
    ids = []
    try:
        with _time_limit():
            for completion in ([], pair.chosen, pair.rejected):
                messages = [*pair.prompt, *completion]
                encoded = tokenizer.apply_chat_template(
                    messages, tokenize=True, return_dict=True, add_generation_prompt=not completion, **arguments
                )
                ids.append(encoded["input_ids"])
    except Exception as error:  # a template is a program and may raise anything
        reason = str(error) or type(error).__name__
        raise BadRow("template_error", f"{place}: the chat template refuses it: {reason}") from error
    return ids[0], ids[1], ids[2]


def renders_prompt_alike(pair: Pair, tokenizer: Any) -> bool:
    """Return True if both whole conversations, as text, begin with the conversation's prompt.

    If the template writes the prompt differently when an answer follows, the rest is scored as part of the answer.
    """
    arguments = {"tools": pair.tools, **(pair.chat_template_kwargs or {}), "tokenize": False}
    with _time_limit():
        prompt = tokenizer.apply_chat_template(pair.prompt, add_generation_prompt=True, **arguments)
        return all(
            tokenizer.apply_chat_template([*pair.prompt, *completion], **arguments).startswith(prompt)
            for completion in (pair.chosen, pair.rejected)
        )


_MOST_SECONDS = 60
"""Time limit for the conversations of one pair, which take milliseconds."""


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Stop a template that runs forever by a signal; without limit in other threads or without interval timers."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"it runs for more than {_MOST_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
